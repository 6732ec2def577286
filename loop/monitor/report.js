// The script of the page report.html: draws the runs that lie in it, and tells values.
"use strict";
const { axes, panels, colors, runs, differences } =
  JSON.parse(document.getElementById("data").textContent);
const noisy = panels.flatMap((panel) => panel.series.filter((series) => series.noisy));
const many = runs.some((run) => noisy.some(({ key }) => run.curves[key]?.value.length >= 60));
const state = { axis: Object.keys(axes)[0], smooth: many ? 0.8 : 0, hidden: new Set(), at: null };
const root = document.documentElement;
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const color = (index) => colors[root.dataset.theme][index];
const shown = () => runs.map((run, index) => ({ ...run, index }))
  .filter((run) => !state.hidden.has(run.index));

function brief(value) {
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

// Ticks at 1, 2 or 5 times a power of ten, about so many.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1)
    found.push(Number((n * step).toPrecision(12)));
  return found;
}

// The exponential mean that starts without a bias, as Adam's moments do.
function smoothed(values) {
  let mean = 0;
  return values.map((value, index) => {
    mean = state.smooth * mean + (1 - state.smooth) * value;
    return mean / (1 - state.smooth ** (index + 1));
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
  const svg = make("svg", { class: "plot", width, height, tabindex: 0, role: "img",
    "aria-label": `${panel.title} over ${axes[state.axis]}; arrow keys read values` });
  box.append(svg);
  panel.svg = svg;
  if (!curves.length) { panel.scale = null; return; }
  const [first, end] = range(panels.flatMap(curvesOf).flatMap((curve) => range(curve.x)));
  let [low, high] = range(curves.flatMap((curve) => range(curve.y)));
  if (fromZero) low = Math.min(0, low);
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  high += pad;
  if (!fromZero) low -= pad;
  const x = (value) => left + (value - first) / (end - first || 1) * (width - left - right);
  const y = (value) => height - bottom - (value - low) / (high - low) * (height - top - bottom);
  Object.assign(panel, { scale: { x, y, first, end, top, left, right, width, height, bottom },
    lines: curves });
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
    const smooth = state.smooth > 0 && curve.series.noisy;
    if (smooth) path(curve.y, "faint");
    path(smooth ? smoothed(curve.y) : curve.y, dashed);
    if (curve.x.length < 30)
      curve.y.forEach((value, n) => svg.append(make("circle", { cx: x(curve.x[n]),
        cy: y(value), r: 2.4, fill: color(curve.run.index), opacity: smooth ? .3 : 1 })));
  }
  const place = (event) => {
    const px = event.clientX - svg.getBoundingClientRect().left;
    point(panel, first + (px - left) / (width - left - right) * (end - first));
  };
  svg.addEventListener("pointermove", place);
  svg.addEventListener("pointerdown", place);
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("blur", () => point(null));
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const places = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    const now = places.indexOf(nearest(places, state.at ?? first));
    const next = state.at === null ? 0 : now + way;
    point(panel, places[Math.max(0, Math.min(places.length - 1, next))]);
  });
}

function nearest(places, at) {
  return places.reduce((best, place) =>
    Math.abs(place - at) < Math.abs(best - at) ? place : best, places[0]);
}

// Show what was logged nearest to a place: a line in every panel, the values beside the pointer.
function point(panel, at = null) {
  state.at = panel && at;
  for (const each of panels) {
    each.svg.querySelectorAll(".cross").forEach((old) => old.remove());
    each.tip.style.display = "none";
    if (!panel || !each.scale) continue;
    const snapped = nearest(panel.lines.flatMap((curve) => curve.x), at);
    const { x, y, top, height, bottom, width } = each.scale;
    each.svg.append(make("line", { class: "cross", x1: x(snapped), x2: x(snapped), y1: top,
      y2: height - bottom }));
    const rows = each.lines.map((curve) => {
      const n = curve.x.indexOf(nearest(curve.x, snapped));
      each.svg.append(make("circle", { class: "cross", cx: x(curve.x[n]), cy: y(curve.y[n]),
        r: 3.5, fill: color(curve.run.index) }));
      const key = make("span", { class: "key" });
      key.style.background = color(curve.run.index);
      const names = [runs.length > 1 && curve.run.name,
        (each.series.length > 1 || runs.length === 1) && curve.series.label];
      return make("tr", {}, make("td", {}, key),
        make("td", {}, names.filter(Boolean).join(", ")), make("td", {}, brief(curve.y[n])));
    });
    if (each !== panel) continue;
    each.tip.replaceChildren(make("div", { class: "note" },
      state.axis === "step" ? `step ${snapped}` : `${brief(snapped)} ${axes[state.axis]}`),
      make("table", {}, ...rows));
    each.tip.style.display = "block";
    const beside = x(snapped) + 26 + each.tip.offsetWidth > width;
    each.tip.style.left = `${x(snapped) + (beside ? -each.tip.offsetWidth - 4 : 26)}px`;
    each.tip.style.top = "42px";
  }
}

function legend() {
  byId("runs").hidden = runs.length < 2;
  byId("runs").replaceChildren(...(runs.length < 2 ? [] : runs.map((run, index) => {
    const key = make("span", { class: "key" });
    key.style.background = color(index);
    const button = make("button", { type: "button", "aria-pressed": !state.hidden.has(index) },
      key, run.name);
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
  state.at = null;
  byId("theme").textContent = root.dataset.theme === "dark" ? "light" : "dark";
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
byId("smooth").value = state.smooth;
byId("smooth").addEventListener("input", (event) => {
  state.smooth = Number(event.target.value);
  drawAll();
});
byId("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  drawAll();
});
const told = Object.keys(runs[0].facts).filter((fact) => runs.some((run) => run.facts[fact]));
byId("facts").append(...table([["run", ...told],
  ...runs.map((run) => [run.name, ...told.map((fact) => run.facts[fact] ?? "")])]));
if (Object.keys(differences).length) {
  byId("changed").hidden = false;
  byId("differences").append(...table([["", ...runs.map((run) => run.name)],
    ...Object.entries(differences).map(([name, values]) => [name, ...values])]));
}
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
addEventListener("resize", drawAll);
drawAll();
