"use strict";

/** Everything about one latent, below its title. */
function cardElements(card, row, known, scores) {
  const layers = known.layers(row);
  return [
    facts(card, row, layers),
    scored(scores.get(row)),
    contextSection(card, layers),
    logits(card, layers),
    make(
      "div",
      { class: "columns" },
      section("Depth", depthTable(card, layers), caption(depthWords(layers))),
      make(
        "div",
        {},
        section("Activations", histogram(card, layers)),
        layers.length > 1 ? section("Persistence", persistence(card.persistence)) : null,
      ),
    ),
    neighbours(card, row, known),
  ];
}

function section(title, ...content) {
  return make("section", {}, make("h3", {}, title), ...content);
}

const caption = (text) => make("p", { class: "caption" }, text);

function facts(card, row, layers) {
  const { density } = data.index.columns;
  const often = density[row];
  const [first, last] = card.span;
  const shown = [
    ["density", percent(often), `1 token in ${grouped(Math.round(1 / often))}`],
    ["largest activation", shortNumber(Math.max(...card.maximum)), ""],
  ];
  if (layers.length > 1) {
    const span = first === last ? `layer ${first}` : `layers ${first}–${last}`;
    shown.push(["lives at", span, `of ${ranges(layers)}`]);
    shown.push(["centre of mass", `layer ${card.centre.toFixed(1)}`, ""]);
  }
  const rarer = density.filter((other) => other > often).length / density.length;
  shown[0][2] += `; denser than ${Math.round(100 * (1 - rarer))}%`;
  return make(
    "dl",
    { class: "facts" },
    ...shown.map(([term, value, note]) =>
      make(
        "div",
        {},
        make("dt", {}, term),
        make("dd", {}, make("b", {}, value), note ? make("small", {}, ` ${note}`) : null),
      ),
    ),
    layers.length > 1
      ? make(
          "div",
          {},
          make("dt", {}, `density at layers ${ranges(layers)}`),
          make("dd", {}, sparkline(card.density, `Density at layers ${ranges(layers)}: ${card.density.map(percent).join(", ")}`)),
        )
      : null,
  );
}

function depthWords(layers) {
  if (layers.length === 1) return "Density: share of the tokens on which it fires.";
  return (
    "Density: share of the tokens on which it fires. Faint: layers where it does not live, firing " +
    "less than a tenth as often as where it fires most. Persistence: of the tokens on which it " +
    "fires at any layer, at how many layers it does."
  );
}

/** Explanations and scores, with the layer that each is of. */
function scored(scores) {
  if (!scores) return null;
  const rows = scores.details.map((score) => {
    const named = score.explanation ?? score.attribute;
    const values = Object.entries(SCORES)
      .filter(([kind]) => Number.isFinite(score[kind]))
      .map(([kind, words]) => make("span", { class: "score" }, `${words} `, make("b", {}, score[kind].toFixed(2))));
    const notes = (score.notes || []).map((note) => make("p", { class: "noted" }, `“${note}”`));
    const at = Number.isInteger(score.layer) ? `layer ${score.layer}` : null;
    return make(
      "li",
      {},
      named ? make("p", { class: "explanation", dir: "auto" }, named) : null,
      make("p", { class: "scores" }, at ? make("span", { class: "chip" }, at) : null, ...values),
      ...notes,
    );
  });
  return section("Explanation and scores", make("ul", { class: "scored" }, ...rows));
}

let contextKind = "Strongest"; // stays from latent to latent

/** The contexts, of which one kind is seen at a time. */
function contextSection(card, layers) {
  const max = Math.max(...card.maximum);
  const kinds = [["Strongest", () => contextList(card.top, max, layers)]];
  for (const layer of layers.filter((layer) => card.top_by_layer[layer])) {
    kinds.push([`Layer ${layer}`, () => contextList(card.top_by_layer[layer], max, [layer])]);
  }
  kinds.push(["Deciles", () => decileList(card.deciles, max, layers)]);
  const panel = make("div");
  const chosen = Math.max(0, kinds.findIndex(([name]) => name === contextKind));
  const buttons = kinds.map(([name, draw], i) =>
    make(
      "button",
      {
        type: "button",
        "aria-pressed": String(i === chosen),
        click: (event) => {
          contextKind = name;
          for (const button of buttons) button.setAttribute("aria-pressed", "false");
          event.currentTarget.setAttribute("aria-pressed", "true");
          panel.replaceChildren(draw());
        },
      },
      name,
    ),
  );
  panel.append(kinds[chosen][1]());
  return make(
    "section",
    {},
    make("h3", {}, "Contexts"),
    make("div", { class: "switch", role: "group", "aria-label": "Which contexts" }, ...buttons),
    panel,
    caption(
      `The background is the activation as a share of the latent's largest, ${shortNumber(max)}` +
        (layers.length > 1 ? "; over several layers the largest at a token." : ".") +
        " Point at a token for its value; underlined: where the context was found.",
    ),
  );
}

function contextList(contexts, max, layers) {
  return make("ol", { class: "contexts" }, ...contexts.map((given) => contextItem(given, max, layers)));
}

function decileList(deciles, max, layers) {
  const parts = deciles.map((contexts, i) => [i, contexts]).filter(([, contexts]) => contexts.length);
  return make(
    "div",
    {},
    ...parts.reverse().flatMap(([i, contexts]) => [
      make("h4", {}, `${10 * i}–${10 * (i + 1)}% of its firings by activation`),
      contextList(contexts, max, layers),
    ]),
  );
}

/** One context, the activation and, of several, its layer beside it. */
function contextItem(given, max, layers) {
  const context = asContext(given);
  const { ids, strengths } = contextTokens(context);
  const text = make("p", { class: "tokens" });
  drawTokens(text, ids, strengths, data.tokens, { max, peak: context.peak });
  const peak = text.children[context.peak];
  if (peak) peak.tabIndex = 0; // the arrow keys lead to the other tokens
  return make(
    "li",
    {},
    make(
      "span",
      { class: "value" },
      make("b", {}, shortNumber(strengths[context.peak])),
      layers.length > 1 ? make("small", {}, ` layer ${context.layer}`) : null,
    ),
    text,
  );
}

function logits(card, layers) {
  const ends = [...card.largest, ...card.smallest].map(([, logit]) => Math.abs(logit));
  const most = Math.max(...ends, Number.MIN_VALUE);
  const column = (title, given, kind) =>
    make(
      "table",
      { class: "bars logits" },
      make("caption", {}, title),
      make(
        "tbody",
        {},
        ...given.map(([id, logit]) =>
          make(
            "tr",
            {},
            make("th", { scope: "row" }, boxedToken(id)),
            make("td", {}, bar(Math.abs(logit) / most, shortNumber(logit), kind)),
          ),
        ),
      ),
    );
  return make(
    "section",
    {},
    make("h3", {}, "Logits"),
    make(
      "div",
      { class: "columns" },
      column("Promotes", card.largest, "positive"),
      column("Suppresses", card.smallest, "negative"),
    ),
    caption(
      "What the decoder row adds to the logits through the unembedding" +
        (layers.length > 1 ? `, at layer ${card.logits_layer}, where the latent fires most.` : "."),
    ),
  );
}

/** A token by itself, its spaces visible by its box. */
function boxedToken(id) {
  const element = tokenElement(id, data.tokens);
  element.classList.add("boxed");
  return element;
}

const BY = { cosine: "cosine", jaccard: "same tokens" };

function neighbours(card, row, known) {
  const table = (title, given) =>
    make(
      "table",
      { class: "bars neighbours" },
      make("caption", {}, title),
      make(
        "tbody",
        {},
        ...given.map(([number, latent, by, similarity]) => {
          const sae = data.index.about.saes[number].name;
          return make(
            "tr",
            {},
            make("th", { scope: "row" }, latentLink(sae, latent, known)),
            make("td", {}, bar(similarity, similarity.toFixed(2), by)),
            make("td", { class: "by" }, BY[by] || by),
          );
        }),
      ),
    );
  const byLayer = Object.entries(card.neighbours_by_layer).filter(([, given]) => given.length);
  return make(
    "section",
    {},
    make("h3", {}, "Neighbours"),
    make(
      "div",
      { class: "columns" },
      card.neighbours.length ? table("In the same SAE", card.neighbours) : null,
      ...byLayer.map(([layer, given]) => table(`Elsewhere at layer ${layer}`, given)),
    ),
    caption(
      "cosine: of decoder rows. same tokens: tokens on which both fire, as a share of those on which either does.",
    ),
  );
}

/** A latent's name and what it is about; a link where it has a card. */
function latentLink(sae, latent, known) {
  const row = known.row(sae, latent);
  const name = make("span", { class: "name" }, `${sae}/${latent}`);
  if (row === undefined) {
    return make("span", { class: "latent", title: "No card was made of this latent." }, name);
  }
  return make("a", { class: "latent", href: `#${sae}/${latent}` }, name, peakTokens(row));
}

/** The tokens on which a latent fires most strongly; those that are searched for stand out. */
function peakTokens(row, hits = new Set()) {
  const { peaks, logits } = data.index.columns;
  const promoted = logits[row].filter((id) => hits.has(id));
  const element = make("span", { class: "peaks" }, ...peaks[row].map(boxedToken));
  if (promoted.length) element.append("promotes", ...promoted.map(boxedToken));
  [...peaks[row], ...promoted].forEach((id, i) => {
    if (hits.has(id)) element.children[i].classList.add("hit");
  });
  return element;
}
