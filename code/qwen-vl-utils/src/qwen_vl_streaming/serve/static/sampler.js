// Takes frame k at k / fps seconds from a source and sends it as a JPEG of the size that the server asked for.

const QUALITY = 0.92;
const LEAST_BACKLOG = 200_000; // bytes that may wait in the socket, and at least three frames
const LATEST = 2; // seconds: frames that are later than this are skipped

export class Sampler {
  /** `size`: {width, height} of a frame. `onframe` is called with the canvas and the time of each frame. */
  constructor(source, connection, size, onframe) {
    Object.assign(this, { source, connection, fps: source.fps, size, onframe });
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.dropped = this.largest = 0;
    this.stopped = false;
    this.shape = null;
  }

  /** Resolves when the source has ended or `stop` was called. */
  async run() {
    for (let k = 0; ; ) {
      const picture = await this.source.frame(k / this.fps);
      if (!picture || this.stopped) return;
      await this._send(k / this.fps, picture);
      const due = Math.floor((this.source.now() - LATEST) * this.fps);
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
    const jpeg = await new Promise((resolve) => this.canvas.toBlob(resolve, "image/jpeg", QUALITY));
    this.largest = Math.max(this.largest, jpeg.size);
    if (this.stopped) return;
    this.connection.sendFrame(time, jpeg);
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
