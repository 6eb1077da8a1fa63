// The time line: an <ol> with one <li> per second, the frame of that second, and the tokens that were written in it.
// Old seconds are folded into one item, so that a stream without end needs bounded memory.

const ROWS = 180; // seconds that are shown
const FOLDED_TEXT = 2000; // characters of the folded seconds that are kept
const THUMBNAIL = 96; // pixels wide

/** "7 s", or "1:05" from one minute on. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (!parts[0]) parts.shift();
  return parts.map((part, index) => (index ? String(part).padStart(2, "0") : part)).join(":");
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export class Timeline {
  constructor(list, rows = ROWS) {
    this.list = list;
    this.scroller = list.parentElement;
    this.limit = rows;
    this.rows = new Map(); // second → {item, picture, text, lag, raw}
    this.newest = 0;
    this.over = false;
    this.folded = null;
    this.foldedText = "";
    this.follows = true; // the newest second stays in view, until the viewer scrolls back
    this.scroller.onscroll = () => (this.follows = this._atEnd());
    list.replaceChildren();
  }

  /** Add the seconds up to the one that contains `time`. */
  advance(time) {
    const now = Math.floor(time) + 1;
    if (now <= this.newest) return;
    for (let second = Math.max(this.newest + 1, now - this.limit + 1); second <= now; second++) this._add(second);
    this.rows.get(this.newest)?.item.classList.remove("now");
    this.rows.get(now).item.classList.add("now");
    this.newest = now;
    this._fold();
    if (this.follows) this._toEnd();
  }

  /** Show `canvas` as the frame of the second that contains `time`. */
  show(canvas, time) {
    this.advance(time);
    const row = this.rows.get(Math.floor(time) + 1);
    if (!row || row.drawn) return;
    row.drawn = true;
    row.picture.width = THUMBNAIL;
    row.picture.height = Math.round((THUMBNAIL * canvas.height) / canvas.width);
    row.picture.getContext("2d").drawImage(canvas, 0, 0, row.picture.width, row.picture.height);
  }

  /** Write a token at `time`; `age` is how old the newest frame was that it had seen, in seconds. */
  write(text, time, age) {
    this.advance(time);
    const row = this.rows.get(Math.floor(time) + 1);
    if (!row) return void this._keep(text);
    row.text.append(element("span", "token", row.raw ? text : text.trimStart()));
    row.raw += text;
    row.lag.textContent = age > 1.5 ? `${age.toFixed(age < 10 ? 1 : 0)} s late` : "";
    if (this.follows) this._toEnd();
  }

  /** The video ends at `time`: what is written later is written after its end. */
  end(time) {
    this.advance(time);
    const row = this.rows.get(Math.floor(time) + 1);
    if (!row || this.over) return;
    this.over = true;
    row.item.classList.add("over");
    row.item.append(element("span", "hidden", " (the video ends)"));
  }

  /** Nothing more will be written. */
  finish() {
    this.rows.get(this.newest)?.item.classList.remove("now");
  }

  _add(second) {
    const item = element("li", this.over ? "second after" : "second");
    const row = {
      item,
      picture: element("canvas", "thumbnail"),
      text: Object.assign(element("span", "tokens"), { dir: "auto" }),
      lag: element("span", "lag"),
      raw: "",
    };
    row.picture.setAttribute("aria-hidden", "true");
    row.picture.width = row.picture.height = 0;
    item.append(element("span", "time", clock(second)), row.picture, row.text, row.lag);
    this.list.append(item);
    this.rows.set(second, row);
  }

  _fold() {
    for (const [second, row] of this.rows) {
      if (second > this.newest - this.limit) break;
      this._keep(row.raw, second);
      row.item.remove();
      this.rows.delete(second);
    }
  }

  /** Keep the end of the text of folded seconds, up to `second`. */
  _keep(text, second) {
    if (!this.folded) {
      this.folded = element("li", "folded");
      const details = document.createElement("details");
      details.append(element("summary", ""), Object.assign(element("p", ""), { dir: "auto" }));
      this.folded.append(details);
      this.list.prepend(this.folded);
    }
    this.foldedText = (this.foldedText + text).slice(-FOLDED_TEXT);
    const [summary, paragraph] = this.folded.firstChild.children;
    if (second) summary.textContent = `Up to ${clock(second)}`;
    paragraph.textContent = (this.foldedText.length === FOLDED_TEXT ? "… " : "") + this.foldedText;
  }

  _atEnd() {
    const { scrollTop, scrollHeight, clientHeight, scrollLeft, scrollWidth, clientWidth } = this.scroller;
    return scrollHeight - clientHeight - scrollTop < 40 && scrollWidth - clientWidth - scrollLeft < 200;
  }

  _toEnd() {
    this.scroller.scrollTo(this.scroller.scrollWidth, this.scroller.scrollHeight);
  }
}
