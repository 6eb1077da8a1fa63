// Numbers of one model's answer while it is written, with bounded memory. Knows nothing of the page.

const REMEMBERED = 1000; // tokens in median and 95%
const RECENT = 10; // seconds in the rate
const BEHIND = 2; // clips waiting, or seconds of age, that count as having fallen behind, as in live/watch.py
const CALM = 3; // seconds without that count as having caught up

/** The value below which the share `part` of `values` lies, interpolated as NumPy does. */
export function percentile(values, part) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const place = part * (sorted.length - 1);
  const low = Math.floor(place);
  const high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (sorted[high] - sorted[low]) * (place - low);
}

export class Gauges {
  constructor(secondsPerClip = 1) {
    this.secondsPerClip = secondsPerClip;
    this.ages = [];
    this.times = [];
    this.tokens = this.waiting = this.missed = this.lag = 0;
    this.behind = false;
    this.late = -Infinity; // when it was late last
  }

  /** A token was written at `time` (stream seconds), `age` seconds after the newest frame it had seen. `last`: the source
   * is over and its last frame was seen, so that nothing newer could be. */
  add(time, age, last) {
    this.tokens++;
    if (!last) this.ages.push(age);
    if (this.ages.length > REMEMBERED) this.ages.shift();
    this.times.push(time);
    while (this.times[0] < time - RECENT) this.times.shift();
    this.lag = last ? 0 : age;
  }

  /** What the server counts: clips that wait, and slots that were not finished in time. */
  count(waiting = 0, missed = 0) {
    this.waiting = waiting;
    this.missed = missed;
  }

  /** Update `behind` at `now`, in seconds of the stream. */
  judge(now) {
    if (this.waiting >= BEHIND || this.lag >= BEHIND) this.late = now;
    this.behind = now - this.late < CALM;
  }

  /** Seconds from the newest frame to what is being written. */
  get secondsBehind() {
    return Math.max(this.waiting * this.secondsPerClip, this.lag);
  }

  /** Tokens per second until `now`, or null. */
  rate(now) {
    const recent = this.times.filter((time) => time >= now - RECENT);
    const span = Math.min(RECENT, now - this.times[0]);
    return recent.length > 1 && span > 0 ? recent.length / span : null;
  }

  get age() {
    return { median: percentile(this.ages, 0.5), p95: percentile(this.ages, 0.95) };
  }
}
