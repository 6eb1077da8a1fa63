// Takes frame k at k / fps seconds from a source and sends it as a JPEG of the size that the server asked for.

import { Calls, Trouble } from "./sources.js";

const QUALITY = 0.92;
const LEAST_BACKLOG = 200_000; // bytes that may wait in the socket, and at least three frames

const encoder = new Calls("encode.js", ({ jpeg }) => jpeg);

/** Throws Trouble where a browser gives pages false pixels, against fingerprinting. */
export function checkCanvas() {
  const context = Object.assign(document.createElement("canvas"), { width: 16, height: 16 }).getContext("2d");
  context.fillStyle = "rgb(200 100 50)";
  context.fillRect(0, 0, 16, 16);
  const { data } = context.getImageData(0, 0, 16, 16);
  if (data.some((value, index) => Math.abs(value - [200, 100, 50, 255][index % 4]) > 8))
    throw new Trouble("This browser hides pictures from pages: allow this page to read canvases (in Firefox, at the left of the address).");
}

export class Sampler {
  /** `size`: {width, height} of a frame. `onframe` is called with the canvas and the time of each frame. */
  constructor(source, connection, size, onframe) {
    Object.assign(this, { source, connection, fps: source.fps, size, onframe });
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.dropped = this.largest = 0;
    this.newest = 0; // when the newest frame that was sent was captured
    this.stopped = false;
    this.shape = null;
  }

  /** Resolves when the source has ended or `stop` was called. */
  async run() {
    for (let k = 0; ; ) {
      const picture = await this.source.frame(k / this.fps);
      if (!picture || this.stopped) return;
      await this._send(k / this.fps, picture);
      const due = Math.ceil((this.source.now() - this.source.latest) * this.fps);
      this.dropped += Math.max(0, due - (k + 1));
      k = Math.max(k + 1, due);
    }
  }

  stop() {
    this.stopped = true;
  }

  async _send(time, picture) {
    this._draw(picture);
    this.onframe(this.canvas, time);
    if (this.connection.unsent > Math.max(LEAST_BACKLOG, 3 * this.largest)) {
      this.dropped++;
      return;
    }
    const bitmap = await createImageBitmap(this.canvas);
    const jpeg = await encoder.call({ picture: bitmap, quality: QUALITY }, [bitmap]);
    this.largest = Math.max(this.largest, jpeg.size);
    if (this.stopped) return;
    this.connection.sendFrame(time, jpeg);
    this.newest = time;
  }

  /** Fill the frame. A picture that has changed its shape since the start (a turned phone) gets black bars. */
  _draw(picture) {
    const { width, height } = this.size;
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, this.size);
    const shape = picture.videoWidth / picture.videoHeight;
    this.shape ??= shape;
    const wide = Math.min(1, shape / this.shape);
    const high = Math.min(1, this.shape / shape);
    this.context.imageSmoothingQuality = "high";
    this.context.fillRect(0, 0, width, height);
    this.context.drawImage(
      picture, (width * (1 - wide)) / 2, (height * (1 - high)) / 2, width * wide, height * high,
    );
  }
}
