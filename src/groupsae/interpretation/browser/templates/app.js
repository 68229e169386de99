"use strict";

// The address says what is seen: "#layers-00-02/17" a latent, "#pairs" or "#pairs/3" the pairs,
// "#about", else the list.

const known = catalogue();
const scores = scoresByRow(known);
const marks = new Marks(data.index.about.of);
const list = new LatentList(byId("list"), rowElement);
const form = byId("filters");
let current = null; // the row whose card is seen
let scrolled = 0; // how far the pairs or about page was, before it was left
let descending = false;
let hits = new Set(); // ids of the tokens that are searched for
let figure = densityFigure; // what the list says of each latent: what it is sorted by

function start() {
  const { about } = data.index;
  document.title = `Latents of ${about.host} – groupsae`;
  byId("host").append("of ", make("bdi", {}, about.host));
  if (about.report_href) {
    byId("report").href = about.report_href;
    byId("report").hidden = false;
  }
  fillFilters();
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("number").addEventListener("keydown", (event) => {
    if (event.key === "Enter") jump();
  });
  byId("direction").addEventListener("click", () => {
    descending = !descending;
    byId("direction").setAttribute("aria-pressed", String(descending));
    byId("direction").textContent = descending ? "↓" : "↑";
    filter();
  });
  byId("export").addEventListener("click", exportMarks);
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", importMarks);
  marks.changed = showMarks;
  window.addEventListener("hashchange", route);
  document.addEventListener("keydown", onKey);
  filter();
  showMarks();
  route();
  document.documentElement.dataset.ready = "true";
}

function option(value, text) {
  return make("option", { value }, text);
}

function fillFilters() {
  const { about } = data.index;
  const whose = [option("", "all")];
  for (const shown of about.shown) {
    const names = [...new Set(Object.values(shown.saes))];
    const options = names.map((name) => option(`sae:${name}`, name));
    whose.push(
      make("optgroup", { label: shown.name }, option(`partition:${shown.name}`, `all of ${shown.name}`), ...options),
    );
  }
  byId("whose").replaceChildren(...whose);
  const layers = [...new Set(about.saes.flatMap((sae) => sae.layers))].sort((a, b) => a - b);
  byId("layer").replaceChildren(option("", "any"), ...layers.map((layer) => option(layer, layer)));
  const there = Object.entries(SCORES).filter(([kind]) =>
    [...scores.values()].some((score) => score[kind] !== null),
  );
  const kinds = there.map(([kind, words]) => option(kind, words));
  byId("kind").replaceChildren(...(kinds.length ? kinds : [option("", "none yet")]));
  byId("sort").replaceChildren(
    option("index", "SAE, number"),
    option("density", "density"),
    option("maximum", "largest activation"),
    option("centre", "centre of mass"),
    option("span", "layers it spans"),
    option("latent", "number"),
    ...there.map(([kind, words]) => option(kind, words)),
  );
}

/** What the form asks for; see `matchingRows`. */
function asked() {
  const fields = Object.fromEntries(new FormData(form));
  const number = (name) => (fields[name].trim() === "" ? null : Number(fields[name].replace(",", ".")));
  const range = (name, unit = 1) => {
    const ends = [number(`${name}-low`), number(`${name}-high`)];
    const right = ends.map((end) => (Number.isFinite(end) ? end / unit : null));
    return right.some((end) => end !== null) ? right : null;
  };
  const [of, ...name] = fields.whose.split(":");
  return {
    text: fields.text.trim(),
    where: fields.where,
    sae: of === "sae" ? name.join(":") : null,
    partition: of === "partition" ? name.join(":") : null,
    layer: number("layer"),
    density: range("density", 100),
    centre: range("centre"),
    kind: fields.kind,
    score: range("score"),
    mark: fields.mark,
    sort: fields.sort,
    descending,
  };
}

function filter() {
  const query = asked();
  const rows = matchingRows(query, known, scores, marks);
  const more = [query.where, query.layer !== null, query.density, query.centre, query.score, query.mark];
  const count = more.filter(Boolean).length;
  byId("active").textContent = count ? `(${count})` : "";
  byId("found").textContent =
    rows.length === known.size ? plural(rows.length, "latent") : `${grouped(rows.length)} of ${plural(known.size, "latent")}`;
  byId("list").scrollTop = 0;
  hits = matchingTokens(query.text);
  figure = FIGURES[query.sort] || densityFigure;
  list.show(rows);
  if (current !== null) list.reveal(current);
}

/** Go to the latent of that number: of the chosen SAE, else of the one that is seen. */
function jump() {
  const text = byId("number").value.trim();
  const [, named, latent] = text.match(/^(?:(.+)\/)?(\d+)$/) || [];
  if (latent === undefined) {
    say(text ? `“${text.slice(0, 40)}” is no number of a latent.` : "");
    return;
  }
  const { sae } = asked();
  const seen = current === null ? 0 : data.index.columns.sae[current];
  const name = named || sae || data.index.about.saes[seen]?.name;
  if (known.row(name, Number(latent)) === undefined) {
    say(`There is no card of ${name}/${Number(latent)}: it does not fire, or was not drawn.`);
    return;
  }
  say("");
  location.hash = `#${name}/${Number(latent)}`;
}

/** A latent in the list: its name, depth, density, mark, and what it fires on. */
function rowElement(row) {
  const { columns } = data.index;
  const name = known.name(row);
  const { mark, note } = marks.of(name);
  const score = scores.get(row);
  const kinds = [byId("sort").value, ...Object.keys(SCORES)];
  const kind = kinds.find((name) => Number.isFinite(score?.[name]));
  const layers = known.layers(row);
  const densities = columns.density_by_layer[row];
  return make(
    "li",
    { class: "row", role: "option", "aria-selected": String(row === current), "data-mark": mark || null },
    make(
      "a",
      { href: `#${name}`, tabindex: "-1" },
      make("span", { class: "name" }, name),
      mark || note ? make("span", { class: "mark", title: MARKS[mark] || "A note" }, mark ? SIGNS[mark] : "✎") : null,
      make(
        "span",
        { class: "figures" },
        kind ? make("span", { class: "score", title: SCORES[kind] }, score[kind].toFixed(2)) : null,
        layers.length > 1 ? sparkline(densities, `Density at layers ${ranges(layers)}`) : null,
        figure(row),
      ),
      peakTokens(row, hits),
    ),
  );
}

const FIGURES = {
  maximum: (row) => named("largest activation", shortNumber(data.index.columns.maximum[row])),
  centre: (row) => named("centre of mass", `layer ${data.index.columns.centre[row].toFixed(1)}`),
  span: (row) => {
    const { first, last } = data.index.columns;
    return named("layers from the first to the last it lives at", `${first[row]}–${last[row]}`);
  },
};

function densityFigure(row) {
  return named("density", percent(data.index.columns.density[row]));
}

function named(title, text) {
  return make("span", { class: "figure", title }, text);
}

const SIGNS = { interpretable: "✓", not: "✗", unsure: "?" };

/* what is seen */

async function route() {
  let address = location.hash.slice(1);
  try {
    address = decodeURIComponent(address);
  } catch {
    // a stray % in a name: taken as it is
  }
  const [view, rest] = address.split("/");
  say("");
  if (view === "pairs") {
    const choose = (layer) => (location.hash = `#pairs/${layer}`);
    const layer = /^\d+$/.test(rest) ? Number(rest) : undefined;
    showPage("pairs", address, () => pairsElements(layer, known, choose));
    return;
  }
  if (view === "about") {
    showPage("about", address, aboutElements);
    return;
  }
  const at = address.lastIndexOf("/");
  const row = at < 0 ? undefined : known.row(address.slice(0, at), Number(address.slice(at + 1)));
  if (row === undefined) {
    if (address) say(`There is no card of ${address.slice(0, 80)}.`);
    seen("list");
    if (known.size === 0) byId("card").replaceChildren(make("p", { class: "missing" }, "No latent has a card."));
    else if (current === null) await showCard(list.rows[0] ?? 0);
    return;
  }
  seen("card");
  await showCard(row);
}

function seen(view) {
  if (["pairs", "about"].includes(document.body.dataset.view)) scrolled = byId("page").scrollTop;
  document.body.dataset.view = view;
  for (const link of document.querySelectorAll("nav [data-for]")) {
    if (link.dataset.for.split(" ").includes(view)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Show a page beside the list's; one that was left for a latent is found again as it was. */
function showPage(view, address, elements) {
  const page = byId("page");
  const left = page.dataset.address === address ? scrolled : 0;
  seen(view);
  if (page.dataset.address !== address) {
    page.replaceChildren(make("div", { class: "inner" }, ...elements()));
    page.dataset.address = address;
  }
  page.scrollTop = left;
}

async function showCard(row) {
  current = row;
  list.redraw();
  list.reveal(row);
  byId("list").setAttribute("aria-activedescendant", list.elementId(row) || "");
  let content;
  try {
    content = cardElements(await loadCard(row), row, known, scores);
  } catch (error) {
    content = [make("p", { class: "missing" }, error.message)];
  }
  if (row !== current) return; // another was asked for while this one was loaded
  const pane = byId("card");
  const left = pane.contains(document.activeElement) ? document.activeElement : null;
  pane.replaceChildren(
    make("div", { class: "inner" }, cardTitle(row), ...content.filter((element) => element)),
  );
  pane.scrollTop = 0;
  pane.dataset.latent = known.name(row);
  if (left) (byId(left.id) || pane.querySelector("h2")).focus();
}

function cardTitle(row) {
  const name = known.name(row);
  const layers = known.layers(row);
  const whose = known.partitions[data.index.columns.sae[row]].join(", ");
  const step = (id, by, sign, words) => {
    const other = list.beside(row, by);
    const there = other !== undefined && other !== row;
    return make("a", { class: "step", id, href: there ? `#${known.name(other)}` : null, "aria-disabled": there ? null : "true", "aria-label": words, title: words }, sign);
  };
  const { mark: own, note } = marks.of(name);
  const buttons = Object.entries(MARKS).map(([mark, words], i) =>
    make(
      "button",
      { type: "button", "data-mark": mark, "aria-pressed": String(mark === own), title: `${words} (key ${i + 1})`, click: () => toggleMark(mark) },
      `${SIGNS[mark]} ${words}`,
    ),
  );
  const field = make("textarea", {
    id: "note",
    rows: 2,
    maxlength: LONGEST_NOTE,
    placeholder: "Your note",
    "aria-label": "Your note",
    hidden: note === "",
    input: (event) => marks.set(name, { note: event.target.value }),
  });
  field.value = note;
  const open = () => {
    field.hidden = false;
    field.focus();
  };
  return make(
    "header",
    { class: "title" },
    make("a", { class: "back", href: "#" }, "← List"),
    make("div", { class: "heading" },
      make("h2", { tabindex: "-1" }, name),
      make("p", { class: "kind" }, `${layers.length > 1 ? `SAE of layers ${ranges(layers)}` : `SAE of layer ${layers[0]}`}${whose ? ` · ${whose}` : ""}`)),
    make("div", { class: "steps" }, step("previous", -1, "↑", "Previous (k)"), step("next", 1, "↓", "Next (j)")),
    make(
      "div",
      { class: "marks", role: "group", "aria-label": "Your mark" },
      ...buttons,
      make("button", { type: "button", id: "add-note", title: "Note (key n)", click: open }, "✎ Note"),
    ),
    field,
  );
}

function aboutElements() {
  const { about } = data.index;
  const rows = [
    ["Host model", about.host],
    ["Text", about.source],
    ["Tokens", about.special ? `${grouped(about.tokens)}, and ${plural(about.special, "special token")} left out` : grouped(about.tokens)],
    ["Latents with a card", grouped(known.size)],
    ...about.shown.map((shown) => [shown.name, [...new Set(Object.values(shown.saes))].join(", ")]),
  ];
  const terms = (given) =>
    make("dl", { class: "definitions" }, ...given.flatMap(([term, meaning]) => [make("dt", {}, term), make("dd", {}, meaning)]));
  const keys = [
    ["j, k", "the next and the previous latent of the list"],
    ["/", "search"],
    ["1, 2, 3", "mark as interpretable, not, unsure; again takes the mark away"],
    ["n", "write a note"],
    ["Esc", "leave a field; back to the list"],
    ["↑ ↓", "from latent to latent, once the list has the focus"],
    ["← →", "from token to token, once one has the focus"],
  ];
  return [
    make("h2", { tabindex: "-1" }, "About these latents"),
    make("section", {}, terms(rows)),
    make("section", {}, make("h3", {}, "What the figures mean"), terms([...about.definitions, ...OWN_DEFINITIONS])),
    make("section", {}, make("h3", {}, "Keys"), terms(keys)),
  ];
}

const OWN_DEFINITIONS = [
  ["density, in the list", "share of the tokens on which a latent fires, the mean over the SAE's layers"],
  ["score, in the list", "that of all layers together where there is one; else the mean over the layers that have one, of AUROC the largest"],
  ["marks", "are kept by this browser on this machine; export them to keep or share them"],
];

/* marks */

function toggleMark(mark) {
  const name = known.name(current);
  marks.set(name, { mark: marks.of(name).mark === mark ? "" : mark });
}

function showMarks() {
  const counts = marks.counts();
  byId("marked").textContent =
    `✓ ${counts.interpretable}  ✗ ${counts.not}  ? ${counts.unsure}`;
  byId("marked").title = "Your marks: interpretable, not, unsure";
  if (marks.problem) say(marks.problem);
  list.redraw();
  if (current === null) return;
  const { mark } = marks.of(known.name(current));
  for (const button of document.querySelectorAll(".marks [data-mark]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
  }
}

function exportMarks() {
  const address = URL.createObjectURL(new Blob([marks.exported()], { type: "application/json" }));
  make("a", { href: address, download: "marks.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

async function importMarks(event) {
  const [file] = event.target.files;
  if (!file) return;
  try {
    const count = marks.imported(await file.text());
    say(`${plural(count, "mark")} taken over.`);
    if (current !== null) await showCard(current);
  } catch (error) {
    say(error.message);
  }
  event.target.value = "";
}

function say(text) {
  byId("message").textContent = text;
}

/* keys */

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const within = event.target.closest?.("input, textarea, select");
  if (event.key === "Escape") {
    if (within) within.blur();
    else if (document.body.dataset.view !== "list") location.hash = "#";
    return;
  }
  if (within) return;
  if (event.target.classList?.contains("token") && alongTokens(event)) return;
  if (event.target === byId("list") && alongList(event)) return;
  const card = ["card", "list"].includes(document.body.dataset.view) && current !== null;
  const keys = {
    "/": () => byId("text").focus(),
    j: card && (() => step(1)),
    k: card && (() => step(-1)),
    n: card && (() => byId("add-note").click()),
    1: card && (() => toggleMark("interpretable")),
    2: card && (() => toggleMark("not")),
    3: card && (() => toggleMark("unsure")),
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
}

function step(by) {
  const row = list.beside(current, by);
  if (row !== undefined) location.hash = `#${known.name(row)}`;
}

function alongList(event) {
  const page = Math.floor(byId("list").clientHeight / ROW_HEIGHT);
  const far = list.rows.length;
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, End: far, Home: -far }[event.key];
  if (!by) return false;
  event.preventDefault();
  step(by);
  return true;
}

/** The arrows move the focus from token to token within a context. */
function alongTokens(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return false;
  const token = event.target;
  const turned = token.parentElement.dir === "rtl" ? -by : by;
  const next = turned > 0 ? token.nextElementSibling : token.previousElementSibling;
  event.preventDefault();
  if (!next) return true;
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  return true;
}

start();
