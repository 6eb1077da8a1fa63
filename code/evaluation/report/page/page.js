// Shows each video up to one slot: the last frame that has arrived and the words written by then, the new ones highlighted.
"use strict";
for (const story of document.querySelectorAll(".story")) {
  const clips = Number(story.dataset.clips);
  const [slider, play, output, big, strip] = ["input", ".play", "output", ".big", ".strip"].map((s) => story.querySelector(s));
  let timer = null;

  function show(slot) {
    const head = story.querySelector(`[data-go="${slot}"]`);
    slider.value = slot;
    output.textContent = `${head.textContent.trim()} of ${story.dataset.end}`;
    if (big) {
      big.src = head.querySelector("img").src;
      big.hidden = false;
    }
    for (const told of story.querySelectorAll(".told")) {
      let said = 0;
      for (const word of told.querySelectorAll(".word")) {
        const when = Number(word.dataset.slot);
        word.classList.toggle("later", when > slot);
        word.classList.toggle("new", when === slot);
        said += when <= slot;
      }
      told.classList.toggle("silent", said === 0);
      told.classList.toggle("finished", Number(told.dataset.ended) <= slot);
    }
    for (const cell of story.querySelectorAll("[data-column]")) {
      cell.classList.toggle("now", Number(cell.dataset.column) === slot);
    }
    const column = head.parentElement;
    const labels = story.querySelector(".strip .method").offsetWidth;
    if (column.offsetLeft - labels < strip.scrollLeft) strip.scrollLeft = column.offsetLeft - labels;
    const end = column.offsetLeft + column.offsetWidth - strip.clientWidth;
    if (end > strip.scrollLeft) strip.scrollLeft = end;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.classList.remove("on");
    play.setAttribute("aria-label", "play");
  }

  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) === clips) show(1);
    play.classList.add("on");
    play.setAttribute("aria-label", "pause");
    timer = setInterval(() => {
      const next = Number(slider.value) + 1;
      show(Math.min(next, clips));
      if (next >= clips) stop();
    }, 1000);
  });
  for (const button of story.querySelectorAll("[data-go]")) {
    button.addEventListener("click", () => { stop(); show(Number(button.dataset.go)); });
  }
  show(Number(slider.value));
}
