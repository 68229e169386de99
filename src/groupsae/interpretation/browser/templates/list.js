"use strict";

// The list draws the rows that can be seen and no others, whatever the number of latents.

const ROW_HEIGHT = 62; // pixels, as --row-height in browser.css
const BEYOND = 6; // rows drawn above and below what can be seen

class LatentList {
  /**
   * @param pane The element that scrolls.
   * @param rowElement Draws a row of the index.
   */
  constructor(pane, rowElement) {
    this.pane = pane;
    this.rowElement = rowElement;
    this.rows = [];
    this.drawn = new Map(); // place in the list -> element
    this.space = make("ol", { class: "rows", role: "none" });
    pane.replaceChildren(this.space);
    pane.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(pane);
  }

  /** Show other rows, or the same ones anew. */
  show(rows) {
    this.rows = rows;
    this.places = new Map(rows.map((row, place) => [row, place]));
    this.space.style.height = `${rows.length * ROW_HEIGHT}px`;
    this.redraw();
  }

  redraw() {
    const focused = this.space.contains(document.activeElement);
    for (const element of this.drawn.values()) element.remove();
    this.drawn.clear();
    this.draw();
    if (focused) this.pane.focus({ preventScroll: true });
  }

  draw() {
    const { scrollTop, clientHeight } = this.pane;
    const from = Math.max(0, Math.floor(scrollTop / ROW_HEIGHT) - BEYOND);
    const seen = Math.ceil((scrollTop + clientHeight) / ROW_HEIGHT);
    const to = Math.min(this.rows.length, seen + BEYOND);
    for (const [place, element] of this.drawn) {
      if (place < from || place >= to) {
        element.remove();
        this.drawn.delete(place);
      }
    }
    let after = null;
    for (let place = to - 1; place >= from; place--) {
      if (!this.drawn.has(place)) {
        const element = this.rowElement(this.rows[place]);
        element.id = `place-${place}`;
        element.style.top = `${place * ROW_HEIGHT}px`;
        element.setAttribute("aria-setsize", this.rows.length);
        element.setAttribute("aria-posinset", place + 1);
        this.space.insertBefore(element, after); // in the order of reading
        this.drawn.set(place, element);
      }
      after = this.drawn.get(place);
    }
  }

  /** Scroll as little as is needed to see a row; nothing happens where the list lacks it. */
  reveal(row) {
    const place = this.places.get(row);
    if (place === undefined) return;
    const { scrollTop, clientHeight } = this.pane;
    const top = place * ROW_HEIGHT;
    if (top < scrollTop) this.pane.scrollTop = top - ROW_HEIGHT;
    else if (top + ROW_HEIGHT > scrollTop + clientHeight) {
      this.pane.scrollTop = top + 2 * ROW_HEIGHT - clientHeight;
    }
    this.draw();
  }

  /** The id of a row's element; null where it is not drawn. */
  elementId(row) {
    const place = this.places.get(row);
    return this.drawn.has(place) ? `place-${place}` : null;
  }

  /** The row that lies `step` places from another; the first where the list lacks that. */
  beside(row, step) {
    const place = this.places.get(row);
    if (place === undefined) return this.rows[0];
    return this.rows[Math.min(Math.max(place + step, 0), this.rows.length - 1)];
  }
}
