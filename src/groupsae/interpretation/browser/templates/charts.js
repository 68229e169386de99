"use strict";

// Small charts of plain elements: a bar's length is a CSS variable.

/** A bar with its number beside it. */
function bar(share, text, kind = "") {
  const length = Number.isFinite(share) ? Math.min(Math.max(share, 0), 1) : 0;
  return make(
    "span",
    { class: `bar ${kind}` },
    make("span", { class: "fill", "--size": length.toFixed(4) }),
    make("span", { class: "number" }, text),
  );
}

/** How much a latent fires at each layer, as bars too small for numbers. */
function sparkline(values, label) {
  const most = Math.max(...values);
  const bars = values.map((value) =>
    make("span", { "--size": most > 0 ? (value / most).toFixed(3) : 0 }),
  );
  return make("span", { class: "sparkline", role: "img", "aria-label": label, title: label }, ...bars);
}

/** Where in the range of layers a layer lies, from 0 to 1: the strength of its blue. */
const shade = (i, n) => (n > 1 ? i / (n - 1) : 0.5);

/** How many firings are how strong, the layers above one another. */
function histogram(card, layers) {
  const edges = card.histogram_edges;
  const totals = edges.slice(1).map((_, bin) => card.histogram.reduce((sum, at) => sum + at[bin], 0));
  const most = Math.max(...totals, 1);
  const bins = totals.map((total, bin) => {
    const range = `${shortNumber(edges[bin])} to ${shortNumber(edges[bin + 1])}`;
    const byLayer = layers
      .map((layer, i) => [layer, card.histogram[i][bin]])
      .filter(([, count]) => count && layers.length > 1)
      .map(([layer, count]) => `layer ${layer}: ${grouped(count)}`);
    const title = [`Activation ${range}: ${plural(total, "firing")}`, ...byLayer].join("\n");
    const parts = layers.map((_, i) =>
      make("span", {
        "--size": (card.histogram[i][bin] / most).toFixed(4),
        "--shade": shade(i, layers.length).toFixed(3),
      }),
    );
    return make("span", { class: "bin", title }, ...parts);
  });
  const all = totals.reduce((sum, total) => sum + total, 0);
  const label = `Activations of ${plural(all, "firing")}, up to ${shortNumber(edges[edges.length - 1])}`;
  return make(
    "div",
    { class: "histogram" },
    make("div", { class: "bins", role: "img", "aria-label": label }, ...bins),
    make(
      "div",
      { class: "axis", "aria-hidden": "true" },
      make("span", {}, "0"),
      make("span", {}, "activation"),
      make("span", {}, shortNumber(edges[edges.length - 1])),
    ),
  );
}

/** On how many tokens a latent fires at exactly 1, 2, ... layers. */
function persistence(counts) {
  const all = counts.reduce((sum, count) => sum + count, 0) || 1;
  const rows = counts.map((count, i) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, plural(i + 1, "layer")),
      make("td", {}, bar(count / all, percent(count / all))),
      make("td", { class: "count" }, grouped(count)),
    ),
  );
  return make("table", { class: "bars" }, make("tbody", {}, ...rows));
}

/** At each layer: how often a latent fires, how strongly on average and at most. */
function depthTable(card, layers) {
  const [often, strong] = [Math.max(...card.density), Math.max(...card.mean)];
  const rows = layers.map((layer, i) =>
    make(
      "tr",
      { class: card.density[i] >= LIVES * often ? null : "faint" },
      make(
        "th",
        { scope: "row" },
        layers.length > 1
          ? make("span", { class: "key", "--shade": shade(i, layers.length).toFixed(3) })
          : null,
        `layer ${layer}`,
      ),
      make("td", {}, bar(card.density[i] / often, percent(card.density[i]))),
      make("td", {}, bar(card.mean[i] / strong, shortNumber(card.mean[i]), "mean")),
      make("td", { class: "count" }, shortNumber(card.maximum[i])),
    ),
  );
  const heads = ["", "density", "mean activation", "largest"];
  return make(
    "table",
    { class: "bars depth" },
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows),
  );
}
