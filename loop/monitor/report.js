// The script of report.html: draws the embedded runs, and shows the values under the pointer.
"use strict";
const { axes, panels, colors, runs, differences } =
  JSON.parse(document.getElementById("data").textContent);
const SMOOTHED_FROM = 60, MARKED_BELOW = 30, DECAY = 0.8;  // points, points, of the moving average
const state = { axis: Object.keys(axes)[0], hidden: new Set() };
const dark = matchMedia("(prefers-color-scheme: dark)");
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const color = (index) => colors[dark.matches ? "dark" : "light"][index];
const shown = () => runs.map((run, index) => ({ ...run, index }))
  .filter((run) => !state.hidden.has(run.index));

function brief(value) {
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

// About `count` ticks at multiples of 1, 2 or 5 times a power of ten.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1)
    found.push(Number((n * step).toPrecision(12)));
  return found;
}

// An exponential moving average with Adam's bias correction.
function smoothed(values) {
  let mean = 0;
  return values.map((value, index) => {
    mean = DECAY * mean + (1 - DECAY) * value;
    return mean / (1 - DECAY ** (index + 1));
  });
}

function curvesOf(panel) {
  return panel.series.flatMap((series) => shown().flatMap((run) => {
    const curve = run.curves[series.key];
    return curve ? [{ run, series, x: curve[state.axis], y: curve.value }] : [];
  }));
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

function draw(panel) {
  const { box, fromZero } = panel;
  box.querySelector(".plot")?.remove();
  const wide = box === byId("panels").firstElementChild;
  const width = box.clientWidth - 26, height = wide ? 300 : 190;
  const left = 52, right = 24, top = 8, bottom = 34;
  const curves = curvesOf(panel);
  const svg = make("svg", { class: "plot", width, height, role: "img",
    "aria-label": `${panel.title} over ${axes[state.axis]}` });
  box.append(svg);
  if (!curves.length) return;
  const [first, end] = range(panels.flatMap(curvesOf).flatMap((curve) => range(curve.x)));
  let [low, high] = range(curves.flatMap((curve) => range(curve.y)));
  if (fromZero) low = Math.min(0, low);
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  high += pad;
  if (!fromZero) low -= pad;
  const x = (value) => left + (value - first) / (end - first || 1) * (width - left - right);
  const y = (value) => height - bottom - (value - low) / (high - low) * (height - top - bottom);
  for (const value of ticks(low, high, wide ? 5 : 4)) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right,
      y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, brief(value)));
  }
  for (const value of ticks(first, end, width / 110))
    svg.append(make("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" },
      brief(value)));
  svg.append(make("text", { x: width - right, y: height - 3, "text-anchor": "end" },
    axes[state.axis]));
  for (const run of shown())
    for (const at of run.resumed[state.axis]) {
      const mark = make("line", { class: "resume", stroke: color(run.index),
        x1: x(at), x2: x(at), y1: top, y2: height - bottom });
      mark.append(make("title", {}, `${run.name}: resumed`));
      svg.append(mark);
    }
  for (const curve of curves) {
    const path = (values, more) => svg.append(make("path", {
      class: `curve ${more}`, stroke: color(curve.run.index),
      "data-run": curve.run.name, "data-key": curve.series.key,
      d: values.map((value, n) =>
        `${n ? "L" : "M"}${x(curve.x[n]).toFixed(1)} ${y(value).toFixed(1)}`).join(""),
    }));
    const dashed = curve.series.dashed ? "dashed" : "";
    const smooth = curve.series.noisy && curve.x.length >= SMOOTHED_FROM;
    if (smooth) path(curve.y, "faint");
    path(smooth ? smoothed(curve.y) : curve.y, dashed);
    if (curve.x.length < MARKED_BELOW)
      curve.y.forEach((value, n) => svg.append(make("circle", { cx: x(curve.x[n]),
        cy: y(value), r: 2.4, fill: color(curve.run.index) })));
  }
  const hide = () => {
    panel.tip.style.display = "none";
    svg.querySelectorAll(".cross").forEach((old) => old.remove());
  };
  const show = (event) => {
    hide();
    const px = event.clientX - svg.getBoundingClientRect().left;
    const at = first + (px - left) / (width - left - right) * (end - first);
    showValues(panel, svg, curves, nearest(curves.flatMap((curve) => curve.x), at),
      { x, y, top, bottom: height - bottom, width });
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

function nearest(values, at) {
  return values.reduce((best, value) =>
    Math.abs(value - at) < Math.abs(best - at) ? value : best, values[0]);
}

// Show a vertical line at `at` and, in a tooltip, each curve's value nearest to it.
function showValues(panel, svg, curves, at, scale) {
  const { x, y, top, bottom, width } = scale;
  svg.append(make("line", { class: "cross", x1: x(at), x2: x(at), y1: top, y2: bottom }));
  const rows = curves.map(({ run, series, ...curve }) => {
    const n = curve.x.indexOf(nearest(curve.x, at));
    svg.append(make("circle", { class: "cross", cx: x(curve.x[n]), cy: y(curve.y[n]), r: 3.5,
      fill: color(run.index) }));
    const names = [runs.length > 1 && run.name,
      (panel.series.length > 1 || runs.length === 1) && series.label];
    return make("tr", {}, make("td", {}, colorKey(run.index)),
      make("td", {}, names.filter(Boolean).join(", ")), make("td", {}, brief(curve.y[n])));
  });
  panel.tip.replaceChildren(make("div", { class: "note" },
    state.axis === "step" ? `step ${at}` : `${brief(at)} ${axes[state.axis]}`),
    make("table", {}, ...rows));
  panel.tip.style.display = "block";
  const left = x(at) + 26 + panel.tip.offsetWidth > width;  // place the tooltip left of the line
  panel.tip.style.left = `${x(at) + (left ? -panel.tip.offsetWidth - 4 : 26)}px`;
  panel.tip.style.top = "42px";
}

function colorKey(index) {
  const key = make("span", { class: "key" });
  key.style.background = color(index);
  return key;
}

function legend() {
  byId("runs").hidden = runs.length < 2;
  byId("runs").replaceChildren(...(runs.length < 2 ? [] : runs.map((run, index) => {
    const button = make("button", { type: "button", "aria-pressed": !state.hidden.has(index) },
      colorKey(index), run.name);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(index)) state.hidden.add(index);
      drawAll();
    });
    return button;
  })));
  for (const panel of panels) {
    const line = (series) => {
      const svg = make("svg", { width: 26, height: 8 });
      svg.append(make("path", { class: `curve ${series.dashed ? "dashed" : ""}`, d: "M0 4H26",
        stroke: runs.length > 1 ? "var(--grey)" : color(0) }));
      return make("span", {}, svg, series.label);
    };
    panel.box.querySelector(".styles").replaceChildren(
      ...(panel.series.length > 1 ? panel.series.map(line) : []));
  }
}

function drawAll() {
  legend();
  panels.forEach((panel) => { panel.tip.style.display = "none"; draw(panel); });
}

function table(rows) {
  return rows.map((row, n) => make("tr", {},
    ...row.map((cell, m) => make(n === 0 || m === 0 ? "th" : "td", {}, cell))));
}

byId("panels").append(...panels.map((panel) => {
  panel.tip = make("div", { class: "tip", role: "status" });
  panel.box = make("div", { class: "card panel" },
    make("header", {}, make("h2", {}, `${panel.title} `, make("span", {}, panel.unit)),
      make("div", { class: "styles" })), panel.tip);
  return panel.box;
}));
document.querySelector("h1").textContent = runs.map((run) => run.name).join(", ");
byId("axis").append(...Object.entries(axes).map(([value, label]) =>
  make("option", { value }, label)));
byId("axis").addEventListener("change", (event) => { state.axis = event.target.value; drawAll(); });
const facts = Object.keys(runs[0].facts).filter((fact) => runs.some((run) => run.facts[fact]));
byId("facts").append(...table([["run", ...facts],
  ...runs.map((run) => [run.name, ...facts.map((fact) => run.facts[fact] ?? "")])]));
if (Object.keys(differences).length) {
  byId("changed").hidden = false;
  byId("differences").append(...table([["", ...runs.map((run) => run.name)],
    ...Object.entries(differences).map(([name, values]) => [name, ...values])]));
}
dark.addEventListener("change", drawAll);
addEventListener("resize", drawAll);
drawAll();
