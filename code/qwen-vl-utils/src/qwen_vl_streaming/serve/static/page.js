// The page: connects the settings, a source, the connection and a column for each model.

import { Column } from "./column.js";
import { Connection, download, whyClosed } from "./connection.js";
import { checkCanvas, Sampler } from "./sampler.js";
import { chooseFile, chosen, chosenModels, makeSource, offer, offerPaces } from "./settings.js";
import { Film, Live, Remote, Trouble } from "./sources.js";
import { clock } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const PERIOD = 250; // milliseconds between two looks at the gauges
const ACTIONS = { running: "Stop", behind: "Stop", queued: "Cancel", finishing: "Stop now", lost: "Reconnect", ended: "Start again" };

const server = { session: null, connection: null, used: false };
let run = null; // what belongs to one session: source, sampler, columns, …
let previous = null; // the source of the last run: a film stays visible until the next
let columns = [];

// States -------------------------------------------------------------------------------------------------------------

function state(name, text) {
  document.body.dataset.state = name;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
  $("action").textContent = ACTIONS[name] ?? "Start";
  // A button that is really disabled would lose the focus.
  $("action").setAttribute("aria-disabled", name === "connecting" || name === "asking");
  const fixed = ["asking", "queued", "running", "behind", "finishing"].includes(name);
  if (fixed && $("choices").contains(document.activeElement)) $("action").focus();
  $("choices").disabled = fixed;
}

const alertText = (text) => ($("alert").textContent = text);
const announce = (text) => ($("announcer").textContent = text);

// Connection ---------------------------------------------------------------------------------------------------------

/** Connect; resolves with whether session.created has arrived. */
function connect() {
  server.connection?.close();
  state("connecting", "Connecting");
  return new Promise((resolve) => {
    server.used = false;
    server.connection = new Connection({
      "session.created": ({ session }) => {
        server.session = session;
        offer(session);
        showModels();
        state("ready", "Ready");
        resolve(true);
      },
      "session.queued": ({ place }) => state("queued", `Waiting for a place: you are number ${place}`),
      "session.updated": ({ session }) => run?.begin(session),
      "input_video_frame.acknowledged": (message) => run?.acknowledged(message),
      output_video_frame: ({ time, last }, jpeg) => run?.shown(time, jpeg, last),
      "response.created": ({ response }) => run?.created(response),
      "response.output_text.delta": (message) => run?.token(message),
      "response.done": ({ response }) => run?.finished(response),
      error({ error }) {
        if (!run && error.code === "idle") return; // start() connects again
        alertText(error.message);
        if (run && !run.source.started) run.leave();
      },
      closed: async (opened) => {
        if (run) run.lost();
        else if (!opened) lost(await whyClosed());
        // A page that waits may lose its connection: start() makes a new one.
        resolve(false);
      },
    });
  });
}

function lost(why) {
  state("lost", "Connection lost");
  if (why && !$("alert").textContent) alertText(why);
}

// Columns -------------------------------------------------------------------------------------------------------------

/** A column, empty yet, for each model that is chosen. */
function showModels() {
  const models = chosenModels(server.session.models);
  offerPaces(models);
  showColumns(models);
}

async function save(path, name) {
  alertText("");
  await download(path, name).catch((error) => alertText(error.message));
}

function showColumns(models, fps = server.session.frames_per_second) {
  const single = models.length === 1;
  document.body.dataset.models = single ? "one" : "several";
  $("caption").replaceChildren();
  columns = models.map((model) => {
    const say = (sentence) => announce(single ? sentence : `${model.name}: ${sentence}`);
    const caption = single ? $("caption") : undefined;
    const about = { caption, announce: say, download: save, secondsPerClip: 2 / fps, kept: $("keep").checked };
    return new Column($("column"), model, about);
  });
  $("columns").replaceChildren(...columns.map((column) => column.element));
}

// A run --------------------------------------------------------------------------------------------------------------

class Run {
  constructor(source) {
    this.source = source;
    this.remote = source instanceof Remote;
    this.sampler = null;
    this.end = null; // seconds of the stream when it ended
    this.newest = 0; // when the newest frame of a source of the server was captured
    this.dropped = 0; // by the server
    this.timer = setInterval(() => this.render(), PERIOD);
  }

  /** session.updated: there is a place. */
  async begin(session) {
    state("running", "Running");
    const { frame } = session;
    if (this.sampler) return void (this.sampler.size = frame);
    const fps = Number(this.source.fps.toFixed(2));
    $("sampling").textContent = frame ? `${fps} frames a second, ${frame.width} × ${frame.height} pixels` : "";
    this.source.begin();
    if (this.remote) return;
    this.sampler = new Sampler(this.source, server.connection, frame, (canvas, time) => this.drawn(canvas, time));
    try {
      await this.sampler.run();
    } catch (error) {
      alertText(`The video stopped: ${error.message ?? "it cannot be read further"}`);
    }
    if (run === this && this.end === null) this.stop();
  }

  drawn(canvas, time) {
    for (const column of columns) column.timeline.show(canvas, time);
  }

  async shown(time, jpeg, last) {
    this.newest = time;
    const drawn = this.source.show(time, jpeg);
    if (last && this.end === null) this.over();
    if (await drawn) this.drawn(this.source.canvas, time);
  }

  /** No more frames come: answers are written to their end. */
  over() {
    this.end = this.source.now();
    if (this.source instanceof Live) this.freeze();
    this.render();
    state("finishing", "The video is over: finishing the answer");
  }

  acknowledged({ dropped, waiting, deadline_misses }) {
    this.dropped = dropped;
    for (const { gauges, model } of columns) gauges.count(waiting[model.name], deadline_misses[model.name]);
  }

  created({ id, model }) {
    const column = columns.find((column) => column.model.name === model);
    if (column) column.id = id;
  }

  token(message) {
    columns.find((column) => column.model.name === message.model)?.token(message, this.source.now(), this.end === null ? null : (this.sampler ?? this).newest);
  }

  /** The source is over, or the viewer stops: answers are written to their end. A second time: stop now. */
  stop() {
    if (!this.source.started) return this.leave();
    if (this.end !== null) return void server.connection.send("response.cancel");
    this.sampler?.stop();
    server.connection.send("input_video.end");
    this.over();
  }

  finished(response) {
    if (this.end === null && this.remote) this.end = this.source.now();
    columns.find((column) => column.model.name === response.model)?.finish(response);
    if (columns.some((column) => !column.done)) return;
    this.close();
    server.connection.close();
    state("ended", "Ended");
  }

  /** Leave the queue. */
  leave() {
    this.close();
    server.connection.close();
    show("empty");
    state("ready", "Ready");
  }

  lost() {
    for (const column of columns) column.finish({ status: "lost", record_id: column.id });
    this.close();
    lost("The server closed the connection, or the network did. This session is over and cannot be continued: Reconnect starts a new one. Its record can be downloaded once the server answers again.");
  }

  close() {
    run = null;
    clearInterval(this.timer);
    this.render();
    this.sampler?.stop();
    if (this.source instanceof Film) this.source.video.pause();
    else if (this.source instanceof Live) this.freeze();
    previous = this.source;
  }

  /** Switch the camera off, and leave its last picture on the screen. */
  freeze() {
    const { video } = this.source;
    if (video.srcObject && video.videoWidth) {
      Object.assign($("remote"), { width: video.videoWidth, height: video.videoHeight });
      $("remote").getContext("2d").drawImage(video, 0, 0);
      show("remote");
    }
    this.source.close();
  }

  render() {
    if (!this.source.started) return;
    const now = this.source.now();
    for (const column of columns) column.render(now, this.end);
    const dropped = this.dropped + (this.sampler?.dropped ?? 0);
    $("clock").textContent = clock(this.end ?? now);
    $("dropped").textContent = dropped ? `${dropped} frame${dropped === 1 ? "" : "s"} dropped: network, server or this computer is too slow` : "";
    const late = columns.filter((column) => column.behind).map((column) => column.model.name);
    if (this.end !== null || run !== this) return;
    if (this.source.paused) state("behind", "The picture stands still: the browser has paused it");
    else if (late.length) state("behind", `Cannot keep up: ${late.join(", ")}`);
    else state("running", "Running");
  }
}

async function start() {
  const lostBefore = document.body.dataset.state === "lost";
  let source;
  alertText("");
  try {
    if ((lostBefore || !server.session) && !(await connect())) return;
    const wishes = chosen(server.session);
    source = makeSource(server.session.frames_per_second);
    checkCanvas();
    $("asked").textContent = `“${wishes.question}”`;
    $("sampling").textContent = $("dropped").textContent = $("clock").textContent = "";
    state("asking", "Opening the video");
    previous?.close();
    previous = null;
    show(source instanceof Remote ? "remote" : "video");
    const description = await source.open(); // may take long: the viewer is asked for permission
    const ready = server.connection.open && !server.used;
    if (!ready && !(await connect())) return source.close();
    server.used = true;
    run = new Run(source);
    showColumns(chosenModels(server.session.models), source.fps);
    server.connection.send("session.update", { session: { ...wishes, source: description } });
    state("queued", "Waiting for the server");
  } catch (error) {
    if (!(error instanceof Trouble)) console.error(error);
    source?.close();
    show("empty");
    alertText(error.message);
    state("ready", "Ready");
  }
}

/** Which of the three is in the screen. */
function show(what) {
  for (const id of ["video", "remote", "empty"]) $(id).hidden = id !== what;
  $("facts").hidden = what === "empty";
}

// What the viewer does -----------------------------------------------------------------------------------------------

const busy = () => $("action").getAttribute("aria-disabled") === "true";

$("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  if (busy()) return;
  if (run) run.stop();
  else start();
});
$("models").addEventListener("change", showModels);

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.toggle("dropping", !run);
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (!event.dataTransfer.files.length || run || busy()) return;
  chooseFile(event.dataTransfer.files);
  start();
});
addEventListener("pagehide", () => {
  server.connection?.close();
  run?.lost();
});
addEventListener("pageshow", ({ persisted }) => {
  if (persisted && document.body.dataset.state === "connecting") connect();
});

show("empty");
connect();
