"use strict";
// Draws each figure's JSON as lines over optimizer steps. Text from data only ever becomes text nodes and attributes.
const W = 420, H = 220, LEFT = 48, RIGHT = 10, TOP = 8, BOTTOM = 24, COLOURS = 7;

function make(name, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.append(node);
  return node;
}

function html(name, parent, text = "") {
  const node = document.createElement(name);
  node.textContent = text;
  parent.append(node);
  return node;
}

function show(value, share) {
  if (share) return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** About `count` round numbers from low to high. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function range(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  const room = high > low ? (high - low) * pad : Math.abs(high) * 0.1 || 0.5;
  return [low - room, high + room];
}

function stroke(line) {
  return {
    stroke: `var(--c${line.colour % COLOURS})`, fill: "none", "stroke-width": 1.8, "stroke-linejoin": "round",
    "stroke-dasharray": line.held_out ? "5 4" : "none",
  };
}

function draw(figure, plot, hidden) {
  figure.querySelector("svg.plot")?.remove();
  const svg = make("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img" });
  const lines = plot.lines.filter((_, i) => !hidden.has(i));
  svg.setAttribute("aria-label", `${plot.title}. Last values: ` +
    lines.map((l) => `${l.label} ${show(l.values.at(-1), plot.share)}`).join(", "));
  figure.querySelector("h3").after(svg);
  if (!lines.length) return;
  const values = lines.flatMap((l) => l.values);
  let [x0, x1] = range(lines.flatMap((l) => l.steps), 0);
  let [y0, y1] = range(values, 0.06);
  // Accuracies live above chance; weights and shares use the whole range. As in curves.png.
  if (plot.share) [y0, y1] = values.every((v) => v >= 0.4) ? [0.37, 1.03] : [-0.03, 1.03];
  const x = (step) => LEFT + (W - LEFT - RIGHT) * (step - x0) / (x1 - x0);
  const y = (value) => H - BOTTOM - (H - TOP - BOTTOM) * (value - y0) / (y1 - y0);

  for (const tick of ticks(y0, y1, 5)) {
    make("line", { x1: LEFT, x2: W - RIGHT, y1: y(tick), y2: y(tick), stroke: "var(--grid)" }, svg);
    make("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, svg).textContent =
      plot.share ? Math.round(100 * tick) + "%" : show(Math.abs(tick) < 1e-12 ? 0 : tick);
  }
  for (const tick of ticks(x0, x1, 6).filter(Number.isInteger)) {
    make("text", { x: x(tick), y: H - 7, "text-anchor": "middle" }, svg).textContent = tick;
  }
  make("line", { x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM, stroke: "var(--rule)" }, svg);
  for (const line of lines) {
    const places = line.steps.map((step, i) => `${x(step).toFixed(1)} ${y(line.values[i]).toFixed(1)}`);
    make("path", { ...stroke(line), d: "M" + places.join("L"), "data-key": line.key }, svg);
    // One logged point is invisible as a line; held-out points are few.
    if (places.length === 1 || (line.held_out && places.length <= 60)) {
      for (const place of places) {
        const [cx, cy] = place.split(" ");
        make("circle", { cx, cy, r: 2.6, fill: stroke(line).stroke }, svg);
      }
    }
  }
  hover(figure, svg, plot, lines, x, y, (px) => x0 + (x1 - x0) * (px - LEFT) / (W - LEFT - RIGHT));
}

/** Under the pointer, or stepped through with the arrow keys: the values of every line at the nearest logged step. */
function hover(figure, svg, plot, lines, x, y, stepAt) {
  const steps = [...new Set(lines.flatMap((l) => l.steps))].sort((a, b) => a - b);
  const marks = make("g", { "pointer-events": "none" }, svg);
  let tip = null, at = -1;

  function clear() { marks.replaceChildren(); tip?.remove(); tip = null; }

  function point(i) {
    clear();
    at = i;
    const step = steps[i];
    make("line", { x1: x(step), x2: x(step), y1: TOP, y2: H - BOTTOM, stroke: "var(--quiet)", "stroke-dasharray": "2 3" }, marks);
    tip = html("div", figure);
    tip.className = "tip";
    html("div", tip, `step ${step}`);
    for (const line of lines) {
      const k = line.steps.indexOf(step);
      if (k < 0) continue;
      make("circle", { cx: x(step), cy: y(line.values[k]), r: 3.6, fill: stroke(line).stroke }, marks);
      const row = html("div", tip);
      html("span", row, line.label).style.color = stroke(line).stroke;
      html("b", row, show(line.values[k], plot.share));
    }
    const where = svg.getBoundingClientRect(), frame = figure.getBoundingClientRect();
    const px = where.left - frame.left + x(step) / W * where.width;
    const left = px + 12 + tip.offsetWidth > frame.width ? px - 12 - tip.offsetWidth : px + 12;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = where.top - frame.top + 6 + "px";
  }

  svg.addEventListener("pointermove", (event) => {
    const where = svg.getBoundingClientRect();
    const step = stepAt((event.clientX - where.left) / where.width * W);
    let nearest = 0;
    steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[nearest] - step)) nearest = i; });
    point(nearest);
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { event.preventDefault(); point(Math.min(steps.length - 1, Math.max(0, at + move))); }
  });
}

for (const figure of document.querySelectorAll("figure")) {
  const plot = JSON.parse(figure.querySelector("script").textContent);
  const hidden = new Set();
  const legend = html("div", figure);
  legend.className = "legend";
  plot.lines.forEach((line, i) => {
    const button = html("button", legend);
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    make("line", { x1: 0, x2: 22, y1: 4, y2: 4, ...stroke(line) }, make("svg", { viewBox: "0 0 22 8" }, button));
    button.append(line.label);
    button.addEventListener("click", () => {
      hidden.has(i) ? hidden.delete(i) : hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      draw(figure, plot, hidden);
    });
  });
  draw(figure, plot, hidden);
}
