"use strict";

/** An element; attributes that are null or false are left out, `--names` are CSS variables. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name.startsWith("--")) element.style.setProperty(name, String(value));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

/** 0.0123 as 1.23%. */
const percent = (share) => `${shortNumber(100 * share)}%`;

const grouped = (count) => count.toLocaleString("en");

const plural = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;

/** [0, 1, 2, 5] as 0–2, 5. */
function ranges(numbers) {
  const parts = [];
  for (const number of numbers) {
    const last = parts[parts.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}
