// One model's part of the page: its caption, time line and gauges.

import { Caption, ending } from "./captions.js";
import { Gauges } from "./gauges.js";
import { Timeline } from "./timeline.js";

const FAMILIES = {
  offline: "Watches to the end, then writes.",
  interleave: "Takes turns: watches a second, then writes a little.",
  parallel: "Watches and writes at the same time.",
};
const FAMILY = { origin: "offline", batch: "offline", interleave: "interleave" }; // all others are parallel
const OUTCOMES = {
  completed: "Finished",
  cancelled: "Stopped",
  failed: "Failed",
  lost: "Connection lost",
  too_slow: "Stopped: too slow",
};

export const familyOf = (variant) => FAMILY[variant] ?? "parallel";
export const explain = (variant) => FAMILIES[familyOf(variant)];

const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const spread = (median, p95) => (median === null || median === undefined ? "–" : `${number(median, 2)} s · 95% ${number(p95, 2)} s`);

export class Column {
  /** `model`: as in session.created. `caption`: where the newest sentence is shown, if not in the column.
   * `announce`: called with each sentence that is complete. `download`: called with a path and a file name. */
  constructor(template, model, { caption, announce, download, secondsPerClip, kept }) {
    Object.assign(this, { model, announce, download, kept });
    this.family = familyOf(model.variant);
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.element.dataset.model = model.name;
    find("use").setAttribute("href", `#lanes-${this.family}`);
    find("h2").textContent = model.name;
    find(".how").textContent = explain(model.variant);
    find(".scroller").setAttribute("aria-label", `Time line of ${model.name}`);
    this.pace = find(".pace");
    this.record = find(".record");
    this.caption = caption ?? find(".caption");
    find(".caption").hidden = caption !== undefined;
    this.caption.replaceChildren();
    this.dials = Object.fromEntries([...this.element.querySelectorAll("[data-gauge]")].map((dial) => [dial.dataset.gauge, dial]));
    this.timeline = new Timeline(find(".timeline"));
    this.gauges = new Gauges(secondsPerClip);
    this.words = new Caption();
    this.id = null; // of the response, and of its record
    this.done = null; // the response of response.done
  }

  /** A response.output_text.delta that came at `now`, in seconds of the stream. `final`: when the last frame was
   * captured, if the video is over, or null. The age is counted from the capture here to the token here; what the server states lacks the way of the frame. */
  token({ delta, token_ids, capture_time, age_ms, waiting, deadline_misses }, now, final) {
    const age = Math.max(now - capture_time, age_ms / 1000);
    const time = capture_time + age;
    const last = final !== null && capture_time > final - this.gauges.secondsPerClip / 2;
    this.gauges.count(waiting, deadline_misses);
    if (token_ids.length) this.gauges.add(time, age, last);
    if (!delta) return;
    this.timeline.write(delta, time, last ? 0 : age);
    this.words.add(delta).forEach(this.announce);
    this._caption();
  }

  /** A response.done, or {status: "lost", record_id} without figures. */
  finish(response) {
    if (this.done) return;
    this.done = response;
    this.timeline.finish();
    if (this.words.newest) this.announce(this.words.newest);
    if (response.record_id) this._offer(response.record_id);
    const found = response.figures;
    this._showAge();
    if (found) {
      this._dial("rate", number(found.tokens_per_second, 1));
      this._dial("waiting", found.clips_waiting ?? 0);
      this._dial("missed", found.deadline_misses ?? 0);
    }
    this._pace(OUTCOMES[response.status] ?? response.status, { completed: "good", cancelled: "" }[response.status] ?? "bad");
  }

  _offer(id) {
    this.record.hidden = false;
    this.record.firstElementChild.textContent = `Record ${id}`;
    for (const button of this.record.querySelectorAll("button")) {
      const clips = button.dataset.path !== "";
      button.hidden = clips && !this.kept;
      const name = clips ? `${id}.clips.safetensors` : `${id}.json`;
      button.onclick = () => this.download(`v1/records/${encodeURIComponent(id)}${button.dataset.path}`, name);
    }
  }

  get behind() {
    return !this.done && this.family !== "offline" && this.gauges.behind;
  }

  /** Show the gauges at `now`, in seconds of the stream. `end`: when it ended, or null. */
  render(now, end) {
    if (this.done) return;
    const over = end !== null;
    if (over) this.timeline.end(end);
    this.timeline.advance(now);
    const { gauges } = this;
    gauges.judge(now);
    this._showAge();
    this._dial("rate", number(gauges.rate(now), 1));
    this._dial("waiting", gauges.waiting);
    this._dial("missed", gauges.missed);
    if (this.behind) this._pace(`${Math.max(1, Math.round(gauges.secondsBehind))} s behind`, "bad");
    else if (gauges.tokens) this._pace(over ? "Finishing" : "Keeps up", "good");
    else this._pace(this.family === "offline" && !over ? "Silent until the end" : "Starting", "");
  }

  _showAge() {
    const { median, p95 } = this.gauges.age;
    this._dial("age", spread(median, p95));
  }

  _caption() {
    const line = (className, text) => Object.assign(document.createElement("p"), { className, dir: "auto", textContent: text });
    this.caption.replaceChildren(line("previous", this.words.previous), line("newest", ending(this.words.newest)));
  }

  _dial(name, text) {
    if (this.dials[name].textContent !== String(text)) this.dials[name].textContent = text;
  }

  _pace(text, mood) {
    this.pace.textContent = text;
    this.pace.dataset.mood = mood;
  }
}
