"use strict";
// One stop of the tab key for each drawing; arrows go from box to box, and what is pointed at is told below.
(() => {
  for (const drawing of document.querySelectorAll(".network")) {
    const boxes = [...drawing.querySelectorAll(".box")];
    const told = document.getElementById(drawing.dataset.told);
    if (!boxes.length) continue;
    let at = boxes[0];
    at.setAttribute("tabindex", "0");
    const tell = (box) => { told.textContent = box.querySelector("title").textContent; };
    const go = (box) => {
      at.setAttribute("tabindex", "-1");
      at = box;
      at.setAttribute("tabindex", "0");
      at.focus();
    };
    for (const box of boxes) {
      box.addEventListener("mouseenter", () => tell(box));
      box.addEventListener("focus", () => tell(box));
      box.addEventListener("click", () => go(box));
    }
    drawing.addEventListener("keydown", (event) => {
      const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, Home: -boxes.length, End: boxes.length };
      const step = steps[event.key];
      if (!step || !boxes.includes(document.activeElement)) return;
      event.preventDefault();
      go(boxes[Math.min(boxes.length - 1, Math.max(0, boxes.indexOf(at) + step))]);
    });
  }
})();
