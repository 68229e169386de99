"use strict";

// Latents of a group beside the most similar ones of a layer's baseline, from unlike to alike.

const PAIR_CONTEXTS = 4;

/** The view of all pairs of one layer of one partition; their contexts come as one scrolls. */
function pairsElements(layer, known, choose) {
  const strata = data.index.pairs;
  if (strata.length === 0) {
    return [make("p", { class: "missing" }, "There are no pairs: no baseline was kept to compare with.")];
  }
  const layers = [...new Set(strata.map((stratum) => stratum.layer))].sort((a, b) => a - b);
  const chosen = layers.includes(layer) ? layer : layers[0];
  const here = strata.filter((stratum) => stratum.layer === chosen);
  const buttons = layers.map((other) =>
    make(
      "button",
      { type: "button", "aria-pressed": other === chosen ? "true" : "false", click: () => choose(other) },
      `Layer ${other}`,
    ),
  );
  const all = here.reduce((sum, { population }) => sum + population, 0);
  const most = Math.max(...here.map(({ population }) => population), 1);
  const overview = make(
    "table",
    { class: "bars strata" },
    make("caption", {}, `Largest cosine with a latent of the baseline, ${plural(all, "latent")}`),
    make(
      "tbody",
      {},
      ...here.map((stratum, i) =>
        make(
          "tr",
          {},
          make(
            "th",
            { scope: "row" },
            stratum.pairs.length
              ? make("button", { type: "button", class: "plain", click: () => byId(`stratum-${i}`).scrollIntoView({ block: "start" }) }, between(stratum))
              : between(stratum),
          ),
          make("td", {}, bar(stratum.population / most, grouped(stratum.population))),
        ),
      ),
    ),
  );
  const lazily = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        lazily.unobserve(target);
        target.draw();
      }
    },
    { rootMargin: "400px" },
  );
  const parts = here.flatMap((stratum, i) => {
    if (stratum.pairs.length === 0) return [];
    const heading = make(
      "h3",
      { id: `stratum-${i}` },
      `Cosine ${between(stratum)}`,
      make("small", {}, ` ${plural(stratum.population, "latent")}, ${stratum.pairs.length} drawn`),
    );
    return [heading, ...stratum.pairs.map((pair) => pairElement(pair, known, lazily))];
  });
  return [
    make("h2", { tabindex: "-1" }, "Pairs"),
    make(
      "p",
      { class: "lead" },
      "A group's latent on the left, the most similar latent of the layer's own SAE on the right: do they stand for the same thing? Each with its strongest contexts at this layer.",
    ),
    make("div", { class: "switch", role: "group", "aria-label": "Layer" }, ...buttons),
    overview,
    ...parts,
  ];
}

const between = ({ low, high }) => `${low.toFixed(2)} to ${high.toFixed(2)}`;

function pairElement(pair, known, lazily) {
  return make(
    "article",
    { class: "pair" },
    make(
      "p",
      { class: "similar" },
      "cosine ",
      make("b", {}, pair.cosine.toFixed(2)),
      " · same tokens ",
      make("b", {}, pair.jaccard.toFixed(2)),
    ),
    pairSide(pair.sae, pair.latent, pair.layer, known, lazily),
    pairSide(pair.baseline, pair.baseline_latent, pair.layer, known, lazily),
  );
}

function pairSide(sae, latent, layer, known, lazily) {
  const row = known.row(sae, latent);
  const body = make("div", { class: "body" });
  const side = make("div", { class: "side" }, make("h4", {}, latentLink(sae, latent, known)), body);
  if (row === undefined) {
    body.append(make("p", { class: "missing" }, "No card was made of this latent."));
    return side;
  }
  side.draw = () =>
    loadCard(row)
      .then((card) => {
        const at = known.layers(row).indexOf(layer);
        const max = Math.max(card.maximum[at], Number.MIN_VALUE);
        const several = known.layers(row).length > 1;
        const contexts = several ? card.top_by_layer[layer] || [] : card.top;
        body.replaceChildren(
          contexts.length
            ? contextList(contexts.slice(0, PAIR_CONTEXTS), max, [layer])
            : make("p", { class: "missing" }, "It does not fire at this layer."),
        );
      })
      .catch((error) => body.replaceChildren(make("p", { class: "missing" }, error.message)));
  lazily.observe(side);
  return side;
}
