// One latent at a time; every change is kept at once. Needs tokens.js and dom.js.

const { sheet, items, texts } = JSON.parse(byId("sheet").textContent);
const places = new Map(items.map((item, i) => [item.id, i]));
const MARKS = ["interpretable", "not", "unsure"];
const DONE = "All are marked: export them now";
const STORED = `groupsae annotation ${sheet}`;

const state = { annotator: "", at: 0, marks: new Map() };

/** What the exported file holds. */
function exported() {
  const marks = Object.fromEntries(state.marks);
  return { format: 1, sheet, annotator: state.annotator.trim(), marks };
}

/** Take a file's marks over; those of other items stay. Throws an Error that says what is wrong. */
function take(text) {
  const content = parsed(text);
  if (content.sheet !== sheet) {
    throw new Error(`it is of the sheet ${content.sheet}; this page is the sheet ${sheet}`);
  }
  const name = state.annotator.trim();
  if (name !== "" && content.annotator !== name && state.marks.size > 0) {
    throw new Error(`it has marks of ${content.annotator}, this page those of ${name}`);
  }
  const marks = checkedMarks(content.marks);
  for (const [id, entry] of marks) state.marks.set(id, entry);
  state.annotator = content.annotator;
  return marks.length;
}

function parsed(text) {
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (content?.format !== 1 || typeof content.annotator !== "string" || !content.marks) {
    throw new Error("it was not exported from such a page");
  }
  return content;
}

function checkedMarks(marks) {
  return Object.entries(marks).map(([id, entry]) => {
    const mark = entry?.mark ?? null;
    if (!places.has(id)) throw new Error(`it marks ${id}, which is not on this page`);
    if (mark !== null && !MARKS.includes(mark)) throw new Error(`${id} is marked ${mark}`);
    return [id, { mark, note: String(entry?.note ?? "") }];
  });
}

// Kept in the browser

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED));
    if (stored === null) return;
    state.annotator = String(stored.annotator);
    state.marks = new Map(checkedMarks(stored.marks));
    if (Number.isInteger(stored.at) && stored.at in items) state.at = stored.at;
  } catch (error) {
    say(`What this browser kept cannot be read: ${error.message}`, true);
  }
}

function keep() {
  try {
    const { at } = state;
    localStorage.setItem(STORED, JSON.stringify({ ...exported(), at }));
  } catch {
    say("This browser keeps nothing: export before you close the page", true);
  }
}

// Marks

const entryOf = (id) => state.marks.get(id) || { mark: null, note: "" };
const isMarked = (item) => entryOf(item.id).mark !== null;

function change(changes) {
  const { id } = items[state.at];
  const entry = { ...entryOf(id), ...changes };
  if (entry.mark === null && entry.note === "") state.marks.delete(id);
  else state.marks.set(id, entry);
  keep();
}

function mark(kind) {
  change({ mark: kind });
  say(kind === null ? "No mark" : `Latent ${state.at + 1}: ${kind}`);
  if (kind === null || state.at === items.length - 1) drawMarks();
  else move(state.at + 1);
  if (items.every(isMarked)) say(DONE);
}

function move(to) {
  if (!(to in items)) return;
  state.at = to;
  byId("help").open = false; // or the next latent would lie below it
  keep();
  drawItem();
}

function moveToUnmarked() {
  const order = items.map((_, i) => (state.at + 1 + i) % items.length);
  const next = order.find((i) => !isMarked(items[i]));
  if (next === undefined) say(DONE);
  else move(next);
}

// Drawing

function drawItem() {
  const item = items[state.at];
  byId("title").textContent = `Latent ${grouped(state.at + 1)} of ${grouped(items.length)}`;
  byId("contexts").replaceChildren(
    ...item.contexts.map((context) => {
      const text = make("p", { class: "tokens" });
      drawTokens(text, context.ids, context.percent, texts, { max: 100, peak: context.peak });
      for (const token of text.querySelectorAll("[data-value]")) token.dataset.value += "%";
      return make("li", {}, text);
    }),
  );
  byId("logits").hidden = item.largest.length === 0;
  for (const end of ["largest", "smallest"]) {
    byId(end).replaceChildren(...item[end].map((id) => tokenElement(id, texts)));
  }
  byId("previous").disabled = state.at === 0;
  byId("next").disabled = state.at === items.length - 1;
  byId("note").value = entryOf(item.id).note;
  window.scrollTo(0, 0);
  drawMarks();
}

function drawMarks() {
  const own = entryOf(items[state.at].id).mark;
  for (const button of document.querySelectorAll("[data-mark]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mark === own));
  }
  const counts = MARKS.map((kind) => items.filter((item) => entryOf(item.id).mark === kind).length);
  const marked = counts.reduce((sum, count) => sum + count, 0);
  byId("progress").max = items.length;
  byId("progress").value = marked;
  const kinds = MARKS.map((kind, i) => `${grouped(counts[i])} ${kind}`).join(", ");
  byId("counts").textContent = `${grouped(marked)} of ${grouped(items.length)} marked: ${kinds}`;
  byId("export").classList.toggle("ready", marked === items.length);
}

function say(text, bad = false) {
  byId("message").textContent = text;
  byId("message").classList.toggle("bad", bad);
}

// What the reader does

function exportFile() {
  const { annotator, marks } = exported();
  if (annotator === "") {
    say("Write your name first: scores tell annotators apart by it", true);
    byId("annotator").focus();
    return;
  }
  const content = new Blob([JSON.stringify(exported(), null, 1)], { type: "application/json" });
  const name = annotator.replace(/[^\p{L}\p{N}]+/gu, "-");
  const link = make("a", { href: URL.createObjectURL(content) });
  link.download = `annotation-${sheet}-${name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  const marked = Object.values(marks).filter((entry) => entry.mark !== null).length;
  say(`Exported ${plural(marked, "mark")} as ${link.download}`);
}

async function importFile(file) {
  try {
    const count = take(await file.text());
    keep();
    byId("annotator").value = state.annotator;
    drawItem();
    say(`Imported ${plural(count, "mark")} from ${file.name}`);
  } catch (error) {
    say(`${file.name} was not imported: ${error.message}`, true);
  }
}

function clear() {
  const lost = `Remove ${plural(state.marks.size, "mark")} and the name? Export first to keep them.`;
  if (state.marks.size > 0 && !window.confirm(lost)) return;
  Object.assign(state, { annotator: "", at: 0, marks: new Map() });
  keep();
  byId("annotator").value = "";
  drawItem();
  say("");
}

const KEYS = {
  1: () => mark("interpretable"),
  y: () => mark("interpretable"),
  2: () => mark("not"),
  n: () => mark("not"),
  3: () => mark("unsure"),
  u: () => mark("unsure"),
  0: () => mark(null),
  ArrowLeft: () => move(state.at - 1),
  ArrowRight: () => move(state.at + 1),
  g: moveToUnmarked,
  e: () => byId("note").focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const act = Object.hasOwn(KEYS, event.key) ? KEYS[event.key] : null;
  if (act === null || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (!event.repeat || event.key.startsWith("Arrow")) act(); // a key held down marks one latent
});

for (const button of document.querySelectorAll("[data-mark]")) {
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") === "true";
    mark(pressed ? null : button.dataset.mark);
  });
}
byId("previous").addEventListener("click", () => move(state.at - 1));
byId("next").addEventListener("click", () => move(state.at + 1));
byId("note").addEventListener("input", (event) => change({ note: event.target.value }));
byId("annotator").addEventListener("input", (event) => {
  state.annotator = event.target.value;
  keep();
});
byId("export").addEventListener("click", exportFile);
byId("import").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", ({ target }) => {
  if (target.files.length > 0) importFile(target.files[0]);
  target.value = "";
});
byId("clear").addEventListener("click", clear);

load();
byId("annotator").value = state.annotator;
byId("help").open = state.marks.size === 0;
drawItem();
document.documentElement.dataset.ready = "true";
