// The protocol of /v1/realtime (docs/serving.md): JSON messages, and a binary one after each frame's header.
// Knows nothing of the page.

const PROTOCOL = "qwen-vl-streaming";

/** The token of this address (#token=…). It stays in the fragment, which browsers do not send. */
export function accessToken() {
  return new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
}

export class Connection {
  /** `on`: a function for each type of message, called with the message (and the Blob of a frame), and `closed`,
   * called once, unless `close` was called, with whether `session.created` had arrived. */
  constructor(on) {
    const address = new URL("v1/realtime", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    address.hash = address.search = "";
    const token = accessToken();
    this.socket = new WebSocket(address, token ? [PROTOCOL, `token.${token}`] : [PROTOCOL]);
    this.header = null;
    this.frames = 0;
    let opened = false;
    this.socket.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        const header = this.header;
        this.header = null;
        if (header) on[header.type]?.(header, data);
        return;
      }
      const message = JSON.parse(data);
      opened ||= message.type === "session.created";
      if (message.type === "output_video_frame") this.header = message;
      else on[message.type]?.(message);
    };
    this.socket.onclose = () => on.closed(opened);
    this.close = () => {
      this.socket.onmessage = this.socket.onclose = null;
      this.socket.close();
    };
  }

  get open() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  /** Bytes that were sent and have not left this machine. */
  get unsent() {
    return this.socket.bufferedAmount;
  }

  send(type, fields = {}) {
    if (this.open) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  /** Send a frame, a Blob of image/jpeg, captured at `time` seconds of the stream. */
  sendFrame(time, jpeg) {
    this.send("input_video_frame.append", { event_id: `frame-${this.frames++}`, time, format: "jpeg", bytes: jpeg.size });
    if (this.open) this.socket.send(jpeg);
  }
}

/** Ask the server for `path`, with the token. */
function ask(path) {
  const headers = accessToken() ? { Authorization: `Bearer ${accessToken()}` } : {};
  return fetch(path, { headers, cache: "no-store" });
}

/** Why no connection was possible, as one sentence. */
export async function whyClosed() {
  try {
    const { status } = await ask("v1/models");
    if (status === 401 || status === 403)
      return "This server asks for a token: open the address that it printed, which ends in #token=…";
    return "The server closed the connection. It may have too many viewers from this address.";
  } catch {
    return "The server does not answer.";
  }
}

/** Save what the server has at `path` as the file `name`. Throws an Error if it has nothing there. */
export async function download(path, name) {
  const answer = await ask(path);
  if (!answer.ok) throw new Error(`The server did not give the file: ${(await answer.text()).trim()}`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
