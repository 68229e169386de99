"use strict";

// One's own marks and notes, kept in this browser's storage, and exported and imported as JSON.

const MARKS = { interpretable: "Interpretable", not: "Not", unsure: "Unsure" };
const LONGEST_NOTE = 10_000;

const isEntry = (entry) =>
  (entry?.mark === "" || Object.hasOwn(MARKS, entry?.mark)) &&
  typeof entry.note === "string" &&
  entry.note.length <= LONGEST_NOTE;

class Marks {
  constructor(of) {
    this.subject = of;
    this.key = `groupsae marks ${of}`;
    this.marks = new Map();
    this.changed = () => {};
    this.read();
    // the same page in another tab
    window.addEventListener("storage", (event) => {
      if (event.key === this.key) this.read();
      this.changed();
    });
  }

  of(name) {
    return this.marks.get(name) || { mark: "", note: "" };
  }

  set(name, change) {
    const { mark, note } = { ...this.of(name), ...change };
    if (mark || note) this.marks.set(name, { mark, note });
    else this.marks.delete(name);
    this.keep();
  }

  /** Which of the marks there are, how often. */
  counts() {
    const counts = { interpretable: 0, not: 0, unsure: 0 };
    for (const { mark } of this.marks.values()) if (mark) counts[mark] += 1;
    return counts;
  }

  exported() {
    const sorted = [...this.marks].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
    const content = { format: 1, browser: this.subject, marks: Object.fromEntries(sorted) };
    return `${JSON.stringify(content, null, 1)}\n`;
  }

  /** Take over what a file says, its marks before ours; an error says what is wrong with it. */
  imported(text) {
    let content;
    try {
      content = JSON.parse(text);
    } catch {
      throw new Error("The file is not JSON. Choose one that this page exported.");
    }
    if (content?.format !== 1 || typeof content.marks !== "object" || content.marks === null) {
      throw new Error("The file holds no marks. Choose one that this page exported.");
    }
    if (content.browser !== this.subject) {
      throw new Error("The file's marks are of another run's latents.");
    }
    const entries = Object.entries(content.marks);
    const wrong = entries.find(([, entry]) => !isEntry(entry));
    if (wrong) throw new Error(`The mark of ${wrong[0].slice(0, 80)} cannot be read.`);
    for (const [name, { mark, note }] of entries) {
      if (mark || note) this.marks.set(name, { mark, note });
    }
    this.keep();
    return entries.length;
  }

  read() {
    try {
      const kept = Object.entries(JSON.parse(localStorage.getItem(this.key)) || {});
      this.marks = new Map(kept.filter(([, entry]) => isEntry(entry)));
    } catch {
      this.marks = new Map(); // storage that is switched off, or holds something else
    }
  }

  keep() {
    try {
      localStorage.setItem(this.key, JSON.stringify(Object.fromEntries(this.marks)));
      this.problem = "";
    } catch {
      this.problem = "This browser keeps nothing: export your marks before you close the page.";
    }
    this.changed();
  }
}
