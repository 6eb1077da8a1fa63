// The settings: what the viewer can choose from, and what was chosen. Knows nothing of connections.

import { explain, familyOf } from "./column.js";
import { Film, Live, Remote, Trouble } from "./sources.js";

const $ = (id) => document.getElementById(id);
const OWN = "own"; // the question that is typed
const SERVER = "server:"; // before the name of a source of the server
let film = null; // the file that was chosen

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const sourceOf = (value) => [...document.querySelectorAll("[name=source]")].find((each) => each.value === value);
const chosenSource = () => document.querySelector("[name=source]:checked").value;

/** Offer what a session has to offer; keep what was chosen where it is still there. */
export function offer({ models, questions, sources = [], limits = {} }) {
  const question = $("question").value;
  $("question").replaceChildren(...questions.map((text) => new Option(text, text)), new Option("Type a question …", OWN));
  $("question").value = question || questions.at(-1);
  $("own-question").maxLength = limits.question_characters ?? 500;

  const source = chosenSource();
  for (const old of document.querySelectorAll("#sources .named")) old.remove();
  for (const name of sources) {
    const input = make("input", { type: "radio", name: "source", value: SERVER + name });
    $("sources").append(make("label", { className: "named" }, input, make("span", { textContent: name })));
  }
  (sourceOf(source) ?? sourceOf("camera")).checked = true;

  const off = [...document.querySelectorAll("[name=model]:not(:checked)")].map((box) => box.value);
  $("models").replaceChildren(
    ...models.map(({ name, variant }) => {
      const box = make("input", { type: "checkbox", name: "model", value: name, checked: !off.includes(name) });
      const kind = [name === variant ? familyOf(variant) : variant].filter((each) => each !== name);
      const title = make("b", { textContent: name });
      const text = make("span", {}, title, kind.length ? ` (${kind}) ` : " ", make("small", { textContent: explain(variant) }));
      return make("label", { className: "model" }, box, text);
    }),
  );
}

/** Those of `models` that are chosen. */
export function chosenModels(models) {
  const names = [...document.querySelectorAll("[name=model]:checked")].map((box) => box.value);
  return models.filter((model) => names.includes(model.name));
}

/** Offer the schedules that all of the chosen `models` have. An offline model has none. */
export function offerPaces(models) {
  const [first, ...others] = models.map((model) => model.schedules).filter((schedules) => schedules.length);
  $("pace").hidden = first === undefined;
  const common = (first ?? []).filter((schedule) => others.every((each) => each.includes(schedule)));
  const chosen = $("schedule").value;
  $("schedule").replaceChildren(...common.map((schedule) => new Option(inWords(schedule), schedule)));
  if (common.includes(chosen)) $("schedule").value = chosen;
}

function inWords(schedule) {
  const count = /^wait-(\d+)$/.exec(schedule)?.[1];
  if (count) return `${schedule}: ${count} token${count === "1" ? "" : "s"} a second`;
  if (schedule === "model") return "model: speaks when it decides to";
  return schedule === "greedy" ? "greedy: as many tokens as it can" : schedule;
}

/** The chosen models of `session`, question, schedule and consent, as in session.update. Throws Trouble. */
export function chosen(session) {
  const models = chosenModels(session.models).map((model) => model.name);
  if (!models.length) throw new Trouble("Choose at least one model.");
  if (!$("pace").hidden && !$("schedule").value)
    throw new Trouble("The chosen models have no pace in common: choose fewer.");
  const question = $("question").value === OWN ? $("own-question").value.trim() : $("question").value;
  if (!question) throw new Trouble("Type a question first.");
  return { models, question, schedule: $("schedule").value || undefined, keep: $("keep").checked };
}

/** The chosen source. Throws Trouble. */
export function makeSource(fps) {
  const kind = chosenSource();
  if (kind === "camera" || kind === "screen") return new Live($("video"), fps, kind === "screen");
  if (kind.startsWith(SERVER)) return new Remote($("remote"), fps, kind.slice(SERVER.length));
  if (!film) throw new Trouble("Choose a video file first, or drop one on the page.");
  return new Film($("video"), fps, film);
}

/** Choose the files of a drop as the source. */
export function chooseFile(files) {
  film = files[0];
  $("file").files = files;
  sourceOf("file").checked = true;
  $("file-field").hidden = false;
}

$("question").addEventListener("change", () => {
  $("own-question").hidden = $("question").value !== OWN;
  if (!$("own-question").hidden) $("own-question").focus();
});
$("sources").addEventListener("change", () => ($("file-field").hidden = chosenSource() !== "file"));
$("file").addEventListener("change", () => (film = $("file").files[0] ?? null));
