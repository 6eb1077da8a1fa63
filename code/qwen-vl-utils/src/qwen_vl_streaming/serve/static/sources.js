// What can be watched: camera, screen, file, or a source of the server. Knows nothing of sockets and models.
//
// A source has
//   open()   → the source of session.update: asks for permission, shows the picture. Throws Trouble.
//   fps      frames per second to sample
//   begin()  starts its clock
//   now()    → seconds since then
//   latest   seconds that a frame may be late
//   frame(time) → waits until `time` is due, and returns what to draw, or null at the end. Not for the server's sources
//   close()

/** An error whose message is meant for the viewer. */
export class Trouble extends Error {}

export const SLACK = 0.002; // seconds, as in video/frames.py: containers round timestamps
const LONGEST = 20; // seconds that an event of a video may take

/** A worker that answers each message. */
export class Calls {
  /** `name`: of its file. `found`: makes what `call` returns of an answer. */
  constructor(name, found = () => undefined) {
    this.worker = new Worker(new URL(name, import.meta.url));
    this.waiting = new Map();
    this.last = 0;
    this.broken = null;
    this.worker.onmessage = ({ data }) => {
      const { resolve, reject } = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve(found(data));
    };
    this.worker.onerror = () => {
      this.broken = new Error(`${name} does not run in this browser`);
      for (const { reject } of this.waiting.values()) reject(this.broken);
      this.waiting.clear();
    };
  }

  /** Send `message`, with the objects that are handed over; resolves with the answer, rejects if there is none. */
  call(message, handed = []) {
    return new Promise((resolve, reject) => {
      if (this.broken) return reject(this.broken);
      this.waiting.set(++this.last, { resolve, reject });
      this.worker.postMessage({ ...message, id: this.last }, handed);
    });
  }
}

const ticker = new Calls("tick.js");

/** Wait, also in a tab in the background. */
export function sleep(seconds) {
  return seconds <= 0 ? Promise.resolve() : ticker.call({ milliseconds: seconds * 1000 });
}

const seconds = () => performance.now() / 1000;

/** Resolves at the first of the events `names`; rejects at an error of the video, or after LONGEST seconds. */
function event(video, ...names) {
  return new Promise((resolve, reject) => {
    const stop = new AbortController();
    const once = (then) => (what) => (stop.abort(), clearTimeout(timer), then(what));
    const timer = setTimeout(once(reject), LONGEST * 1000, new Error(`no ${names[0]} within ${LONGEST} s`));
    for (const name of names) video.addEventListener(name, once(resolve), { signal: stop.signal });
    video.addEventListener("error", once(reject), { signal: stop.signal });
  });
}

/** Load `url` until its first frame is there. Phones load nothing before it plays. */
async function load(video, url) {
  Object.assign(video, { muted: true, playsInline: true, preload: "auto" });
  const loaded = event(video, "loadeddata");
  video.src = url;
  const slow = await Promise.race([loaded.then(() => false), sleep(0.5).then(() => true)]);
  if (slow) video.play().catch(() => {});
  await loaded;
  if (!slow) return;
  video.pause();
  video.currentTime = 0;
}

class Source {
  constructor(video, fps) {
    this.video = video;
    this.fps = fps;
    this.started = null;
    this.latest = 2; // seconds: frames that are later than this are skipped
  }

  begin() {
    this.started = seconds();
  }

  now() {
    return this.started === null ? 0 : seconds() - this.started;
  }
}

/** The camera, or a shared screen. */
export class Live extends Source {
  constructor(video, fps, screen) {
    super(video, fps);
    this.screen = screen;
    this.over = false;
    this.latest = 0.8 / fps; // what is taken later is not the picture of that time
  }

  async open() {
    const devices = navigator.mediaDevices;
    const what = this.screen ? "screen" : "camera";
    const ask = this.screen ? devices?.getDisplayMedia : devices?.getUserMedia;
    if (!ask)
      throw new Trouble(
        devices
          ? `This browser cannot share a ${what}.`
          : `Browsers give the ${what} only to pages from https or 127.0.0.1: reach the server through an SSH tunnel.`,
      );
    const wishes = this.screen ? { frameRate: 15 } : { width: { ideal: 1280 }, height: { ideal: 720 } };
    try {
      this.stream = await ask.call(devices, { video: wishes, audio: false });
    } catch (error) {
      throw new Trouble(
        { NotAllowedError: `The browser was not allowed to use the ${what}.`, NotFoundError: `No ${what} was found.` }[
          error.name
        ] ?? `The ${what} could not be opened: ${error.message}`,
      );
    }
    [this.track] = this.stream.getVideoTracks();
    this.track.addEventListener("ended", () => (this.over = true));
    this.video.srcObject = this.stream;
    await this.video.play();
    if (!this.video.videoWidth) await event(this.video, "resize", "loadeddata");
    return { kind: "client", width: this.video.videoWidth, height: this.video.videoHeight, frames_per_second: this.fps };
  }

  /** Whether the browser or the system has paused it, so that the picture stands still: in a call, or behind a lock. */
  get paused() {
    return this.track.muted || this.video.paused;
  }

  async frame(time) {
    await sleep(time - this.now());
    if (this.video.paused) this.video.play().catch(() => {}); // as browsers do to pages in the background
    return this.over ? null : this.video;
  }

  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.video.srcObject = null;
  }
}

/** Whether a browser that was sent to `asked` seconds said just that. */
const echo = (said, asked) => said !== null && Math.abs(said - asked) < SLACK / 10;

/** A video file. It plays for the viewer; a second, hidden player gives the frame on screen at exactly each time. (In
 * WebM and MKV files of a variable rate that claim a wrong duration for a frame, it may be the frame before.) */
export class Film extends Source {
  constructor(video, fps, file) {
    super(video, fps);
    this.file = file;
  }

  async open() {
    const name = this.file.name;
    this.url = URL.createObjectURL(this.file);
    this.finder = Object.assign(document.createElement("video"), { className: "finder", tabIndex: -1 });
    this.finder.setAttribute("aria-hidden", "true");
    this.video.before(this.finder); // WebKit reports frames of players in the page only
    try {
      await Promise.all([load(this.finder, this.url), load(this.video, this.url)]);
      do {
        while (document.hidden) await sleep(0.2); // a page in the background is not told what is shown
        await this._measure();
      } while (document.hidden);
      // Firefox goes on decoding in the background what was drawn before.
      document.createElement("canvas").getContext("2d").drawImage(this.finder, 0, 0);
    } catch {
      throw new Trouble(`This browser cannot play ${name}. Convert it first: ffmpeg -i INPUT -pix_fmt yuv420p OUTPUT.mp4`);
    }
    const { videoWidth: width, videoHeight: height } = this.video;
    if (!width) throw new Trouble(`${name} has no picture.`);
    const shortest = Number((2 / this.fps).toFixed(2));
    if (this.length < shortest - SLACK)
      throw new Trouble(`${name} lasts ${this.length.toFixed(2)} s: the model needs at least ${shortest} s.`);
    this.frames = Math.ceil((this.length - SLACK) * this.fps);
    return { kind: "client", width, height, frames: this.frames, frames_per_second: this.fps };
  }

  /** Find `first`, the time of the first frame, `length`, from there to the end of the last frame, and the rate of
   * a film with fewer frames than are sampled, as in video/frames.py. */
  async _measure() {
    if (!Number.isFinite(this.finder.duration)) await this._seek(1e9); // a recording whose header lacks its length
    const duration = this.finder.duration;
    this.first = (await this._seek(0)) ?? 0;
    // Not to the very end: WebKitGTK does not find its way back.
    let last = await this._seek(duration - SLACK);
    const before = last > this.first ? await this._seek(last - SLACK) : null;
    let gap = before === null ? null : last - before;
    // Firefox and WebKitGTK say of a frame that was sought only where it was sought.
    const echoes = echo(last, duration - SLACK) || echo(before, last - SLACK);
    if (echoes) ({ last, gap } = await this._tail(duration));
    this.length = (gap === null ? duration : last + gap) - this.first;
    if (gap > 1 / (0.99 * this.fps)) {
      const between = this.first + gap / 2;
      const second = echoes
        ? (await this._play(between, Math.max(1, gap), 1))[0]?.start
        : await this._seek(this.first + gap + SLACK);
      const count = (last - this.first) / gap;
      const even = Math.abs(second - this.first - gap) < SLACK && Math.abs(count - Math.round(count)) < 0.01;
      if (even) this.fps = 1 / gap;
    }
    if (echoes) await load(this.finder, this.url); // a player that has ended
    await this._seek(this.first);
  }

  /** When the last frame begins, and the time from one frame to the next there, or null, by playing the end. */
  async _tail(duration) {
    for (let span = 0.25; ; span *= 4) {
      const from = Math.max(0, duration - span);
      const frames = await this._play(from, Math.max(1, 2 * span));
      if (!from) frames.unshift({ start: this.first, number: 0 });
      const [before, last] = frames.slice(-2);
      if (last) return { last: last.start, gap: (last.start - before.start) / Math.max(1, from ? last.number - before.number : 1) };
      if (!from) return { last: this.first, gap: null };
    }
  }

  /** Play from `from` at `rate` times real time; returns when each frame after it begins, and its number, of the first
   * `count` or of all to the end. */
  async _play(from, rate, count = Infinity) {
    const { finder } = this;
    const frames = [];
    let over = false;
    await this._seek(from);
    await new Promise((resolve, reject) => {
      const note = (_, { mediaTime, presentedFrames }) => {
        if (over) return;
        if (mediaTime > from + SLACK) frames.push({ start: mediaTime, number: presentedFrames });
        if (frames.length < count) finder.requestVideoFrameCallback(note);
        else resolve();
      };
      finder.requestVideoFrameCallback(note);
      finder.playbackRate = rate;
      Promise.all([event(finder, "ended"), finder.play()]).then(() => sleep(0.1).then(resolve), reject);
    });
    over = true;
    finder.pause();
    finder.playbackRate = 1;
    return frames;
  }

  /** Show the frame at `time`; returns the time at which it begins, or null where the browser does not say. */
  async _seek(time) {
    const shown = new Promise((resolve) =>
      this.finder.requestVideoFrameCallback?.((_, frame) => resolve(frame.mediaTime)),
    );
    const sought = event(this.finder, "seeked");
    this.finder.currentTime = time;
    await sought;
    return Promise.race([shown, sleep(0.3).then(() => null)]);
  }

  begin() {
    this.video.play().catch(() => {}); // frames come from the finder
    super.begin();
  }

  async frame(time) {
    if (Math.round(time * this.fps) >= this.frames) {
      await sleep(this.length - this.now());
      return null;
    }
    const sought = this.first + time + SLACK;
    const shown = await this._seek(sought); // at "seeked" alone, the frame before may still be drawn
    // Firefox does so in a WebM without an index, as browsers record it.
    if (shown > sought + SLACK)
      throw new Trouble(`this browser skips frames of ${this.file.name}. Convert it first: ffmpeg -i INPUT OUTPUT.mp4`);
    await sleep(time - this.now());
    return this.finder;
  }

  close() {
    this.video.pause();
    this.finder?.removeAttribute("src");
    this.finder?.remove();
    this.video.removeAttribute("src");
    this.video.load();
    URL.revokeObjectURL(this.url);
  }
}

/** A source of the server, by name. The server samples it and sends what it sampled, to be shown. */
export class Remote extends Source {
  constructor(canvas, fps, name) {
    super(null, fps);
    this.canvas = canvas;
    this.name = name;
    this.time = 0;
  }

  async open() {
    return { kind: "server", name: this.name };
  }

  /** Show the frame `jpeg`, a Blob, of `time` seconds, unless a newer one is there already; returns whether it did. */
  async show(time, jpeg) {
    this.started = seconds() - time;
    this.time = time;
    const picture = await createImageBitmap(jpeg);
    if (time < this.time) return false;
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.canvas.getContext("2d").drawImage(picture, 0, 0);
    picture.close();
    return true;
  }

  close() {}
}
