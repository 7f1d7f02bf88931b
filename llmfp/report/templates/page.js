"use strict";
// Reads out the points of a drawing, under the pointer and by the arrow keys, and saves the JSON. No data is code here.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const says = document.getElementById("says");
  let picked = null;

  const marks = (drawing) => [...drawing.querySelectorAll('.role-mark [role="graphics-symbol"][aria-label]')];

  const unpick = () => {
    if (picked) picked.classList.remove("picked");
    picked = null;
    tip.hidden = true;
  };

  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 12, room))}px`;
    tip.style.top = `${y - tip.offsetHeight - 12 < 0 ? y + 16 : y - tip.offsetHeight - 12}px`;
  };

  const pick = (mark) => {
    unpick();
    picked = mark;
    mark.classList.add("picked");
    const box = mark.getBoundingClientRect();
    show(mark.getAttribute("aria-label"), box.left + box.width / 2, box.top + box.height / 2);
  };

  // What is nearest to the pointer; across is worth more than up and down, since points stand side by side.
  const nearest = (drawing, x, y) => {
    let best = null;
    let least = 40 * 40;
    for (const mark of marks(drawing)) {
      const box = mark.getBoundingClientRect();
      const dx = Math.max(box.left - x, 0, x - box.right);
      const dy = Math.max(box.top - y, 0, y - box.bottom);
      const far = dx * dx + (dy * dy) / 4;
      if (far < least) [best, least] = [mark, far];
    }
    return best;
  };

  // The cell of a heat map under the pointer, by its place: cells are too many to carry words.
  const cell = (drawing, x, y) => {
    const box = drawing.querySelector(".role-frame .background").getBoundingClientRect();
    const matrix = data[drawing.dataset.matrix].matrix;
    const i = Math.floor(((y - box.top) / box.height) * matrix.length);
    const j = Math.floor(((x - box.left) / box.width) * matrix[0].length);
    const line = matrix[i];
    if (line === undefined || line[j] === undefined) return null;
    const value = line[j] === null ? "none" : line[j].toFixed(2).replace("-", "−");
    return `layer ${data.a.layer_numbers[i]} of A with layer ${data.b.layer_numbers[j]} of B: r = ${value}`;
  };

  for (const drawing of document.querySelectorAll(".drawing")) {
    drawing.addEventListener("pointermove", (event) => {
      if (drawing.dataset.matrix) {
        const text = cell(drawing, event.clientX, event.clientY);
        if (text === null) unpick();
        else show(text, event.clientX, event.clientY);
        return;
      }
      const mark = nearest(drawing, event.clientX, event.clientY);
      if (mark === null) unpick();
      else if (mark !== picked) pick(mark);
    });
    drawing.addEventListener("pointerleave", unpick);
    drawing.addEventListener("blur", unpick);
    drawing.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") unpick();
      if (step === undefined) return;
      const all = marks(drawing);
      if (!all.length) return;
      event.preventDefault();
      const next = all[(all.indexOf(picked) + step + all.length) % all.length];
      pick(next);
      says.textContent = next.getAttribute("aria-label");
    });
  }
  addEventListener("scroll", unpick, { passive: true });

  const save = document.getElementById("save-json");
  save.hidden = false;
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
    link.download = `${data.schema.replaceAll("/", "-")}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
