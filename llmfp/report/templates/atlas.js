"use strict";
// Sorts and searches the table, draws the map, and saves the JSON. No data is code here.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const n = data.models.length;

  // --- the table

  const body = document.querySelector("#models tbody");
  const rows = [...body.rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const heads = [...document.querySelectorAll("#models thead th")];
  const count = document.getElementById("count");

  document.getElementById("search").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      if (!row.hidden) shown += 1;
    });
    count.textContent = `${shown.toLocaleString("en")} shown`;
  });

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keys = new Map(rows.map((row) => [row, row.cells[column].textContent]));
      const numbers = [...keys.values()].every((key) => key === "" || !Number.isNaN(Number(key)));
      const order = new Intl.Collator("en", { numeric: true });
      const compare = (a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return (down ? -1 : 1) * (numbers ? Number(x) - Number(y) : order.compare(x, y));
      };
      body.append(...[...rows].sort(compare));
    });
  });

  // --- the map

  const codes = Uint8Array.from(atob(data.similarity), (c) => c.charCodeAt(0));
  const code = (i, j) => {
    const [a, b] = i < j ? [i, j] : [j, i];
    return a === b ? 254 : codes[a * n - (a * (a + 1)) / 2 + b - a - 1];
  };
  const canvas = document.getElementById("map");
  const pen = canvas.getContext("2d");
  const tree = 180;
  const side = canvas.height;
  const cells = document.createElement("canvas");
  cells.width = cells.height = Math.max(n, 1);
  let ink = "";
  let from = 0; // the first model shown, and how many
  let span = n;

  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    ink = style.getPropertyValue("--muted");
    const brush = cells.getContext("2d");
    const dot = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const colour = (name) => {
      dot.fillStyle = style.getPropertyValue(name);
      dot.fillRect(0, 0, 1, 1);
      const [r, g, b] = dot.getImageData(0, 0, 1, 1).data;
      return (255 << 24) | (b << 16) | (g << 8) | r;
    };
    const steps = Array.from({ length: 9 }, (_, i) => colour(`--h${i}`));
    const paper = colour("--paper");
    const bounds = [-0.8, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.8];
    const table = new Int32Array(256).fill(paper);
    for (let c = 0; c < 255; c += 1) table[c] = steps[bounds.filter((bound) => c / 127 - 1 >= bound).length];
    const image = brush.createImageData(cells.width, cells.height);
    const pixels = new Int32Array(image.data.buffer);
    for (let i = 0; i < n; i += 1) {
      for (let j = i; j < n; j += 1) {
        const pixel = table[code(data.order[i], data.order[j])];
        pixels[i * n + j] = pixel;
        pixels[j * n + i] = pixel;
      }
    }
    brush.putImageData(image, 0, 0);
  };

  const draw = () => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.imageSmoothingEnabled = span > side;
    pen.drawImage(cells, from, from, span, span, tree, 0, side, side);
    const at = (place) => ((place + 0.5 - from) / span) * side;
    const places = new Float64Array(n + data.merges.length);
    const heights = new Float64Array(n + data.merges.length);
    data.order.forEach((model, place) => { places[model] = place; });
    const top = Math.max(1e-9, ...data.merges.map((merge) => merge[2]));
    const x = (height) => (tree - 6) * (1 - height / top) + 2;
    pen.strokeStyle = ink;
    pen.lineWidth = 1;
    pen.beginPath();
    data.merges.forEach(([left, right, height], i) => {
      places[n + i] = (places[left] + places[right]) / 2;
      heights[n + i] = height;
      pen.moveTo(x(heights[left]), at(places[left]));
      pen.lineTo(x(height), at(places[left]));
      pen.lineTo(x(height), at(places[right]));
      pen.lineTo(x(heights[right]), at(places[right]));
    });
    pen.stroke();
  };

  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };

  const show = (first, width) => {
    span = Math.min(n, Math.max(Math.min(n, 4), width));
    from = Math.min(n - span, Math.max(0, first));
    canvas.dataset.span = Math.round(span);
    redraw();
  };
  const zoom = (factor, around) => show(around - (around - from) * factor, span * factor);

  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale - tree, (event.clientY - box.top) * scale].map((v) => from + (v / side) * span);
  };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 0.8 : 1.25, under(event)[1]);
  }, { passive: false });
  let held = null;
  canvas.addEventListener("pointerdown", (event) => { held = [event.clientY, from]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (held) {
      show(held[1] + ((held[0] - event.clientY) / canvas.getBoundingClientRect().height) * span, span);
      return;
    }
    const [column, row] = under(event).map(Math.floor);
    if (row < from || column < from || row >= from + span || column >= from + span) { tip.hidden = true; return; }
    const [i, j] = [data.order[row], data.order[column]];
    const value = code(i, j) === 255 ? "no score" : (code(i, j) / 127 - 1).toFixed(2).replace("-", "−");
    tip.textContent = `${data.models[i].repo} with ${data.models[j].repo}: ${value}`;
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("keydown", (event) => {
    const middle = from + span / 2;
    const act = {
      "+": () => zoom(0.8, middle), "=": () => zoom(0.8, middle), "-": () => zoom(1.25, middle), 0: () => show(0, n),
      ArrowUp: () => show(from - span / 8, span), ArrowDown: () => show(from + span / 8, span),
      ArrowLeft: () => show(from - span / 8, span), ArrowRight: () => show(from + span / 8, span),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest(".find") && event.target.closest("tr");
    if (!row) return;
    const place = data.order.indexOf(Number(row.dataset.model));
    const width = Math.min(n, 40);
    show(place - width / 2, width);
    canvas.scrollIntoView({ block: "center" });
    canvas.focus({ preventScroll: true });
  });
  const again = () => { paint(); draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  if (n) again();
  document.body.dataset.ready = "yes";

  const save = document.getElementById("save-json");
  save.hidden = false;
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(data)], { type: "application/json" }));
    link.download = `${data.schema.replaceAll("/", "-")}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
