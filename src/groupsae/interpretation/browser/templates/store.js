"use strict";

// The files in data/ call `groupsaeData`. Cards and text are loaded when they are first needed, by
// adding a script: a page that is opened from disk may fetch nothing.

const data = { index: null, tokens: {}, scores: [], cards: new Map(), text: new Map() };
const requested = new Map();

function groupsaeData(kind, value, number) {
  if (number === undefined) data[kind] = value;
  else data[kind].set(number, value);
}

function load(kind, number) {
  const file = `data/${kind}-${String(number).padStart(5, "0")}.js`;
  if (!requested.has(file)) {
    const done = new Promise((resolve, reject) => {
      const script = make("script", { src: file });
      script.addEventListener("load", () => resolve(script.remove()));
      script.addEventListener("error", () => {
        requested.delete(file);
        reject(new Error(`${file} cannot be read. Is the folder whole?`));
      });
      document.head.append(script);
    });
    requested.set(file, done);
  }
  return requested.get(file);
}

/** The card of a row of the index, and all text that its contexts show. */
async function loadCard(row) {
  const { cards_per_file: perFile, tokens_per_file: perText } = data.index;
  const number = Math.floor(row / perFile);
  await load("cards", number);
  const card = data.cards.get(number)[row % perFile];
  const files = new Set();
  const contexts = [card.top, ...Object.values(card.top_by_layer), ...card.deciles].flat();
  for (const { start, length } of contexts.map(asContext)) {
    files.add(Math.floor(start / perText));
    files.add(Math.floor((start + length - 1) / perText));
  }
  await Promise.all(Array.from(files, (file) => load("text", file)));
  return card;
}

/** A context as the files hold it: [layer, start, peak, length, [place, activation, ...]]. */
function asContext([layer, start, peak, length, firing]) {
  return { layer, start, peak, length, firing };
}

/** The token ids of a context, and the activation at each. */
function contextTokens({ start, length, firing }) {
  const perText = data.index.tokens_per_file;
  const ids = Array.from({ length }, (_, i) => {
    const position = start + i;
    return data.text.get(Math.floor(position / perText))[position % perText];
  });
  const strengths = new Array(length).fill(0);
  for (let i = 0; i < firing.length; i += 2) strengths[firing[i]] = firing[i + 1];
  return { ids, strengths };
}

/** What is known of SAEs and latents by name, made once from the index. */
function catalogue() {
  const { about, columns } = data.index;
  const saeNumber = new Map(about.saes.map(({ name }, i) => [name, i]));
  const rows = new Map(columns.latent.map((latent, row) => [`${columns.sae[row]}/${latent}`, row]));
  const partitions = about.saes.map(() => []);
  for (const shown of about.shown) {
    for (const i of new Set(Object.values(shown.saes).map((name) => saeNumber.get(name)))) {
      if (i !== undefined) partitions[i].push(shown.name);
    }
  }
  return {
    size: columns.latent.length,
    partitions,
    name: (row) => `${about.saes[columns.sae[row]].name}/${columns.latent[row]}`,
    layers: (row) => about.saes[columns.sae[row]].layers,
    /** The row of a latent's card; undefined where it has none. */
    row: (sae, latent) => rows.get(`${saeNumber.get(sae)}/${latent}`),
    saeNumber,
  };
}

/** Of each row that has any: its scores over all layers, and the rows of the file behind them. */
function scoresByRow(known) {
  const byRow = new Map();
  for (const score of data.scores) {
    const row = known.row(score.sae, score.latent);
    if (row === undefined) continue;
    if (!byRow.has(row)) byRow.set(row, { details: [] });
    byRow.get(row).details.push(score);
  }
  for (const scores of byRow.values()) {
    for (const kind of Object.keys(SCORES)) scores[kind] = overLayers(scores.details, kind);
  }
  return byRow;
}

const SCORES = {
  human: "human score",
  detection: "detection",
  fuzzing: "fuzzing",
  auroc: "AUROC",
};

/** The score that is given for all layers together; else the layers' mean, of AUROC the largest. */
function overLayers(details, kind) {
  const given = details.filter((score) => Number.isFinite(score[kind]));
  if (given.length === 0) return null;
  const whole = given.filter((score) => score.layer === null || score.layer === undefined);
  const values = (whole.length ? whole : given).map((score) => score[kind]);
  if (kind === "auroc") return Math.max(...values);
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
