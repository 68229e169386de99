"use strict";

// Which latents the filters leave, and in which order. Over columns of numbers: 10,000 latents take
// a few milliseconds.

const LIVES = 0.1; // of a latent's largest density: as the depth profiles' span

/**
 * The rows that match, in order.
 *
 * @param query Every field may be missing: sae, partition, text, where ("peaks" or "logits"),
 *   density, centre and score ([low, high], null where open), kind (of score), layer, mark, sort,
 *   descending.
 */
function matchingRows(query, known, scores, marks) {
  const { columns } = data.index;
  const tests = [];
  if (query.sae) {
    const wanted = known.saeNumber.get(query.sae);
    tests.push((row) => columns.sae[row] === wanted);
  }
  if (query.partition) {
    tests.push((row) => known.partitions[columns.sae[row]].includes(query.partition));
  }
  for (const name of ["density", "centre"]) {
    if (query[name]) tests.push((row) => within(columns[name][row], query[name]));
  }
  if (query.layer !== null && query.layer !== undefined) {
    tests.push((row) => lives(row, query.layer, known));
  }
  if (query.score) {
    tests.push((row) => {
      const score = scores.get(row)?.[query.kind];
      return Number.isFinite(score) && within(score, query.score);
    });
  }
  if (query.mark) {
    tests.push((row) => (marks.of(known.name(row)).mark || "none") === query.mark);
  }
  if (query.text) tests.push(textTest(query.text, query.where, scores));

  const rows = [];
  for (let row = 0; row < known.size; row++) {
    if (tests.every((test) => test(row))) rows.push(row);
  }
  return sorted(rows, query, known, scores);
}

const within = (value, [low, high]) =>
  (low === null || value >= low) && (high === null || value <= high);

/** It fires at the layer at least a tenth as often as where it fires most. */
function lives(row, layer, known) {
  const at = known.layers(row).indexOf(layer);
  const densities = data.index.columns.density_by_layer[row];
  return at >= 0 && densities[at] > 0 && densities[at] >= LIVES * Math.max(...densities);
}

const quotedText = (text) => text.trim().match(/^"(.+)"$/)?.[1];

const wantedText = (text) => (quotedText(text) ?? text).trim().toLowerCase();

/** Token ids that a text names: "whole" in quotes is a whole token, spaces aside; else a part. */
function matchingTokens(text) {
  const [whole, wanted] = [quotedText(text) !== undefined, wantedText(text)];
  const ids = new Set();
  if (wanted === "") return ids;
  for (const [id, token] of Object.entries(data.tokens)) {
    const lower = token.toLowerCase();
    if (whole ? lower.trim() === wanted : lower.includes(wanted)) ids.add(Number(id));
  }
  return ids;
}

/** Tokens are searched, and parts of explanations where `where` does not say which tokens. */
function textTest(text, where, scores) {
  const [ids, wanted] = [matchingTokens(text), wantedText(text)];
  const { peaks, logits } = data.index.columns;
  const among = (columns) => (row) => columns[row].some((id) => ids.has(id));
  if (where === "peaks") return among(peaks);
  if (where === "logits") return among(logits);
  const explained = (row) =>
    quotedText(text) === undefined &&
    (scores.get(row)?.details || []).some(
      ({ explanation, attribute }) =>
        explanation?.toLowerCase().includes(wanted) || attribute?.toLowerCase().includes(wanted),
    );
  const [inPeaks, inLogits] = [among(peaks), among(logits)];
  return (row) => inPeaks(row) || inLogits(row) || explained(row);
}

/** Latents without a value come last either way; equal ones stay in the order of the index. */
function sorted(rows, { sort, descending }, known, scores) {
  const { columns } = data.index;
  if (!sort || sort === "index") return descending ? rows.reverse() : rows;
  const key = {
    latent: (row) => columns.latent[row],
    density: (row) => columns.density[row],
    maximum: (row) => columns.maximum[row],
    centre: (row) => columns.centre[row],
    span: (row) => columns.last[row] - columns.first[row],
  }[sort];
  const value = key || ((row) => scores.get(row)?.[sort]);
  const keyed = rows.map((row) => [value(row), row]);
  const there = keyed.filter(([given]) => Number.isFinite(given));
  const missing = keyed.filter(([given]) => !Number.isFinite(given));
  there.sort((a, b) => (descending ? b[0] - a[0] : a[0] - b[0]) || a[1] - b[1]);
  return [...there, ...missing].map(([, row]) => row);
}
