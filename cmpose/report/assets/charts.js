"use strict";
// Curves as SVG, drawn to the width there is, so that text keeps its size on a phone.

const SVG = (() => {
  const template = document.createElement("template");
  template.innerHTML = "<svg></svg>";
  return template.content.firstChild.namespaceURI;
})();

function make(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}

function text(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// Round numbers from low to high, about count of them.
function ticks(low, high, count) {
  if (high <= low) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) marks.push(i * step);
  return marks;
}

// 1, 2 and 5 times powers of ten; powers alone where that would be too many, round numbers where
// it would be too few.
function logTicks(low, high) {
  const marks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of [1, 2, 5]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) marks.push(m * 10 ** e);
  }
  if (marks.length < 3) return ticks(low, high, 4);
  return marks.length > 7 ? marks.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-9) : marks;
}

function chart(figure, data) {
  const plot = figure.querySelector(".plot");
  const reading = figure.querySelector(".reading");
  const hidden = new Set();
  const xs = [...new Set(data.lines.flatMap((line) => line.points.map((p) => p[0])))].sort((a, b) => a - b);
  let at = null; // index into xs that is being read
  let scales = null; // x, y → pixels, of the last drawing

  if (data.lines.length > 1) data.lines.forEach((line, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chip";
    button.setAttribute("aria-pressed", "true");
    const swatch = document.createElement("i");
    swatch.style.background = `var(--l${i % 8})`;
    button.append(swatch, line.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(i)) hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      draw();
    });
    figure.querySelector(".legend").append(button);
  });

  function draw() {
    const width = plot.clientWidth, height = plot.clientHeight;
    if (!width) return;
    plot.replaceChildren();
    const first = data.lines.map((line) => `${line.name} from ${text(line.points[0][1])} to ${text(line.points.at(-1)[1])}`);
    const svg = make("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0",
      "aria-label": `${data.title} by ${data.x}: ${first.join(", ")}. Arrow keys read values.`,
    }, plot);
    const shown = data.lines.map((line, i) => [line, i]).filter(([, i]) => !hidden.has(i));
    const values = shown.flatMap(([line]) => line.points.map((p) => p[1]));
    if (!values.length) return;
    let low = Math.min(...values), high = Math.max(...values);
    const log = data.log && low > 0;
    if (data.zero && !log) low = Math.min(low, 0);
    if (high === low) { high = high * 1.1 || 1; low = log ? low / 1.1 : Math.min(low, 0); }
    let marks = log ? logTicks(low, high) : ticks(low, high, 5);
    if (!log && marks.length > 1) {
      high = Math.ceil(high / (marks[1] - marks[0]) - 1e-9) * (marks[1] - marks[0]);
      marks = ticks(low, high, 5);
    }
    const box = { left: 12 + 7.6 * Math.max(...marks.map((m) => text(m).length), 1), right: width - 10, top: 8, bottom: height - 42 };
    const span = xs.at(-1) - xs[0] || 1;
    const scale = (v) => (log ? Math.log(v) : v);
    scales = [
      (x) => (xs.length === 1 ? (box.left + box.right) / 2 : box.left + ((x - xs[0]) / span) * (box.right - box.left)),
      (y) => box.bottom - ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (box.bottom - box.top),
    ];
    for (const mark of marks) {
      const y = scales[1](mark);
      make("line", { class: "rule", x1: box.left, x2: box.right, y1: y, y2: y }, svg);
      make("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, svg).textContent = text(mark);
    }
    for (const mark of xs.length === 1 ? xs : ticks(xs[0], xs.at(-1), Math.max(2, Math.min(6, width / 110)))) {
      const x = scales[0](mark);
      make("line", { class: "rule", x1: x, x2: x, y1: box.bottom, y2: box.bottom + 5 }, svg);
      make("text", { x, y: box.bottom + 19, "text-anchor": "middle" }, svg).textContent = text(mark);
    }
    make("text", { x: box.right, y: height - 6, "text-anchor": "end" }, svg).textContent = data.x;
    // Backwards: the first line, the sum or the mean, lies on top.
    for (const [line, i] of shown.reverse()) {
      const color = `var(--l${i % 8})`;
      const points = line.points.map(([x, y]) => `${scales[0](x).toFixed(1)},${scales[1](y).toFixed(1)}`);
      make("polyline", { class: "line", points: points.join(" "), stroke: color }, svg);
      if (points.length <= 24) {
        for (const [x, y] of line.points) make("circle", { cx: scales[0](x), cy: scales[1](y), r: 3.5, fill: color }, svg);
      }
    }
    if (at !== null) make("line", { class: "mark", x1: scales[0](xs[at]), x2: scales[0](xs[at]), y1: box.top, y2: box.bottom }, svg);
  }

  function read(index) {
    at = Math.min(Math.max(index, 0), xs.length - 1);
    const values = data.lines.flatMap((line, i) => {
      const point = line.points.find((p) => p[0] === xs[at]);
      return hidden.has(i) || !point ? [] : [`${line.name} ${text(point[1])}`];
    });
    reading.textContent = `${data.x} ${text(xs[at])}: ${values.join(", ")}`;
  }

  plot.addEventListener("pointermove", (event) => {
    if (!scales) return;
    const x = event.clientX - plot.getBoundingClientRect().left;
    const near = xs.reduce((best, v, i) => (Math.abs(scales[0](v) - x) < Math.abs(scales[0](xs[best]) - x) ? i : best), 0);
    if (near !== at) { read(near); draw(); }
  });
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    read(at === null ? (step > 0 ? 0 : xs.length - 1) : at + step);
    draw();
    plot.firstChild.focus();
  });
  reading.textContent = "Point at the curve, or use the arrow keys on it, to read values.";
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth !== width) { width = plot.clientWidth; draw(); }
  }).observe(plot);
  draw();
}
