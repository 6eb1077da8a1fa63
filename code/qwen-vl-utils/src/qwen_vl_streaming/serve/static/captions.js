// The newest sentence of a text that grows. Knows nothing of the page.

const ENDS = /(?<=[.!?]["”’)]?)\s+|(?<=[。！？])\s*/u;
const KEPT = 2000; // characters
const LONGEST = 160; // characters of a sentence that are shown

/** The end of a sentence that is too long to be shown, from a word on if there is one. */
export function ending(sentence) {
  const characters = [...sentence.trim()];
  if (characters.length <= LONGEST) return sentence;
  const text = characters.slice(-LONGEST).join("");
  return `… ${text.replace(/^\S{0,30}\s+/u, "")}`;
}

export class Caption {
  constructor() {
    this.text = "";
  }

  /** Add text; returns the sentences that it completed. */
  add(text) {
    const before = this.sentences().length;
    this.text += text;
    const now = this.sentences();
    if (this.text.length > KEPT) this.text = now.slice(-2).join(" ").slice(-KEPT);
    return now.slice(Math.max(0, before - 1), -1);
  }

  sentences() {
    return this.text.split(ENDS).filter((sentence) => sentence.trim());
  }

  get newest() {
    return this.sentences().at(-1) ?? "";
  }

  get previous() {
    return this.sentences().at(-2) ?? "";
  }
}
