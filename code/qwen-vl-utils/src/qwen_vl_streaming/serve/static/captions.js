// The newest sentence of a text that grows. Knows nothing of the page.

const ENDS = /(?<=[.!?]["”’)]?)\s+|(?<=[。！？])\s*/u;
const KEPT = 2000; // characters

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
