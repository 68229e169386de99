"use strict";

// The text of tokens is untrusted, and much of it is invisible. All of it is drawn here: as text
// alone, each token isolated from the direction of its neighbours.

const LONGEST_TOKEN = 64; // characters
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]|(?![ \u3000])\p{Zs}/gu;
const COMBINING = /^\p{M}/u;
const RIGHT_TO_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}]/gu;
const LETTER = /\p{L}/gu;

/**
 * Draw a context token by token, each on a background as strong as its activation.
 *
 * @param parent The element that gets the tokens: it is emptied first.
 * @param ids Token ids.
 * @param strengths Activation at each token; 0 or missing where the latent is silent.
 * @param texts Text by token id: an array or an object.
 * @param max The activation that has the full background.
 * @param peak Which token of the context is marked; none where it is missing.
 */
function drawTokens(parent, ids, strengths, texts, { max = 1, peak = -1 } = {}) {
  const tokens = ids.map((id, i) => {
    const token = tokenElement(id, texts);
    const strength = strengths[i] || 0;
    if (strength > 0) {
      token.classList.add("fires");
      token.style.setProperty("--strength", max > 0 ? Math.min(strength / max, 1).toFixed(3) : "0");
      token.dataset.value = shortNumber(strength);
    }
    if (i === peak) token.classList.add("peak");
    return token;
  });
  const text = ids.map((id) => String(texts[id] ?? "").slice(0, LONGEST_TOKEN)).join("");
  const count = (pattern) => (text.match(pattern) || []).length;
  parent.dir = 2 * count(RIGHT_TO_LEFT) > count(LETTER) ? "rtl" : "ltr";
  parent.replaceChildren(...tokens);
}

/** One token as an element of its own. */
function tokenElement(id, texts) {
  const text = String(texts[id] ?? `[id ${id}]`);
  const token = document.createElement("bdi");
  token.className = "token";
  const shown = Array.from(text.slice(0, 2 * LONGEST_TOKEN)).slice(0, LONGEST_TOKEN).join("");
  if (COMBINING.test(shown)) token.append("\u25cc"); // or it would sit on the token before
  let drawn = 0;
  for (const { 0: character, index } of shown.matchAll(INVISIBLE)) {
    token.append(shown.slice(drawn, index), symbol(visible(character)));
    drawn = index + character.length;
  }
  token.append(shown.slice(drawn));
  if (shown.length < text.length) {
    token.append(symbol("…"));
    token.title = `${text.length.toLocaleString("en")} characters`;
  }
  return token;
}

/** The sign that stands for a character that has none: ↵ for a newline, ⟨U+202E⟩ for a mark. */
function visible(character) {
  if (character === "\n") return "↵";
  if (character === "\t") return "⇥";
  const code = character.codePointAt(0);
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

function symbol(text) {
  const element = document.createElement("span");
  element.className = "symbol";
  element.textContent = text;
  return element;
}

/** Three significant digits, without zeros at the end. */
function shortNumber(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
