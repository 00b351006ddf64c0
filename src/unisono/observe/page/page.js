// Draws the page from the JSON block. Charts are SVG made here; whatever comes from a run becomes a
// text node or a number, never markup. Arrow keys move through a focused chart as the pointer does.
(() => {
"use strict";
const byId = (id) => document.getElementById(id);
const live = document.documentElement.hasAttribute("data-live");
let gone = ""; // when a live page was last answered, once nobody answers
let data = JSON.parse(byId("data").textContent);
const chosen = { run: 0, step: {}, view: {}, open: new Set() };

// --- elements

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== "" && child !== false) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const placed = (node, left, width) => {
  node.style.left = `${left}%`;
  node.style.width = `${width}%`;
  return node;
};

// --- numbers

const whole = (v) => Math.round(v).toLocaleString("en-US");
function num(v) {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  if (a >= 1e4) return whole(v);
  if (a >= 100) return v.toFixed(0);
  if (a === 0 || a >= 1e-3) return String(Number(v.toPrecision(4)));
  return v.toExponential(2).replace("e-", "e−");
}
function tickText(v) {
  const a = Math.abs(v);
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (a >= size) return `${Number((v / size).toPrecision(4))}${unit}`;
  }
  if (a && a < 1e-3) return v.toExponential().replace("e-", "e−");
  return String(Number(v.toPrecision(6)));
}
const ms = (v) => (v === null || v === undefined ? "–" : v >= 100 ? `${v.toFixed(0)} ms` : v >= 1 ? `${v.toFixed(1)} ms` : v >= 0.1 ? `${v.toFixed(2)} ms` : `${(v * 1000).toFixed(0)} µs`);
const inSeconds = (v) => `${Number(v.toPrecision(3))} s`;
const percent = (v, digits = 1) => `${(100 * v).toFixed(digits)}%`;
function bytes(v) {
  for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (v >= size) return `${Number((v / size).toPrecision(3))} ${unit}`;
  }
  return `${v} B`;
}

// --- scales

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= rough) || rough;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}
function logTicks(low, high, most) {
  const decades = Math.log10(high / low);
  const steps = decades < 1 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 2, 5] : [1];
  const found = [];
  for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d++) {
    for (const k of steps) {
      const v = k * 10 ** d;
      if (v >= low * 0.999 && v <= high * 1.001) found.push(v);
    }
  }
  const stride = Math.ceil(found.length / most);
  return found.length > 1 ? found.filter((_, k) => (found.length - 1 - k) % stride === 0) : [low, high];
}
function scale(low, high, from, to, log) {
  if (!(high > low)) { high = low + (Math.abs(low) || 1) * 0.5; low -= log ? low / 2 : (Math.abs(low) || 1) * 0.5; }
  const f = log ? Math.log : (v) => v;
  const [a, b] = [f(low), f(high)];
  const at = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
  at.low = low; at.high = high;
  at.ticks = (n) => (log ? logTicks(low, high, n) : ticks(low, high, n));
  return at;
}

// --- tooltip: one for the page, shown by pointer and by keyboard

const tip = byId("tip");
let later = null;
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(6, Math.min(document.documentElement.clientWidth - width - 6, x + 14));
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(y - height - 12 < 4 ? y + 18 : y - height - 12) + window.scrollY}px`;
}
function hideTip() {
  tip.hidden = true;
  if (later) { const draw = later; later = null; draw(); }
}

// `items`: what can be pointed at, in the order of the arrow keys. `near(x, y)` in the SVG's own
// units gives an index or -1; `mark(index)` highlights it (-1: none) and gives {x, y, text}.
function explore(root, count, near, mark) {
  let index = -1;
  const point = (x, y) => {
    const box = root.getBoundingClientRect();
    const unit = box.width / root.viewBox.baseVal.width;
    return [box.left + x * unit, box.top + y * unit, unit, box];
  };
  const go = (k) => {
    index = k;
    const found = mark(k);
    if (k < 0 || !found) return hideTip();
    const [x, y] = point(found.x, found.y);
    showTip(found.text, x, y);
  };
  root.addEventListener("pointermove", (event) => {
    const [, , unit, box] = point(0, 0);
    const k = near((event.clientX - box.left) / unit, (event.clientY - box.top) / unit);
    if (k !== index || tip.hidden) go(k);
  });
  root.addEventListener("pointerleave", () => go(-1));
  root.addEventListener("blur", () => go(-1));
  root.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (step) go(index < 0 ? (step > 0 ? 0 : count - 1) : Math.max(0, Math.min(count - 1, index + step)));
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(count - 1);
    else if (event.key === "Escape") go(-1);
    else return;
    event.preventDefault();
  });
}

// --- figures are drawn at the width they have, and again when that changes

let figures = [];
function figure(title, unit, note, draw, wide) {
  const box = el("div", {});
  const node = el("figure", { class: wide ? "wide" : null },
    title && el("figcaption", {}, el("h3", {}, title, unit && el("small", {}, unit))), box,
    note && el("p", { class: "note" }, note));
  figures.push({ box, draw, width: 0, wide });
  return node;
}
function redraw(width) {
  for (const f of figures) {
    const now = width ? (f.wide ? width : (width - 32) / 2) : f.box.clientWidth;
    if (now && now !== f.width) { f.width = now; f.box.replaceChildren(f.draw(now)); }
  }
}
new ResizeObserver(() => redraw()).observe(byId("main"));
addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((d) => (d.open = true)); redraw(690); });
addEventListener("afterprint", () => { for (const f of figures) f.width = 0; redraw(); });

const canvas = (w, h, label) =>
  svg("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", tabindex: 0, "aria-label": `${label}. Arrow keys read values.` });

function axes(root, x, y, { l, r, t, b }, w, h, { xText = tickText, yText = tickText, xLabel, n = 4 }) {
  for (const v of y.ticks(n)) {
    root.append(svg("line", { class: "grid-line", x1: l, x2: w - r, y1: y(v), y2: y(v) }),
      svg("text", { x: l - 8, y: y(v) + 4, "text-anchor": "end" }, yText(v)));
  }
  root.append(svg("line", { class: "axis", x1: l, x2: w - r, y1: h - b, y2: h - b }));
  const marks = x.ticks(Math.max(2, Math.floor((w - l - r) / 72))).filter((v) => !xLabel || x(v) > l + 8);
  for (const v of marks) {
    root.append(svg("line", { class: "axis", x1: x(v), x2: x(v), y1: h - b, y2: h - b + 4 }),
      svg("text", { x: x(v), y: h - b + 17, "text-anchor": "middle" }, xText(v)));
  }
  if (xLabel) root.append(svg("text", { x: l - 8, y: h - b + 17, "text-anchor": "end" }, xLabel));
}
// Labels at the end of lines, pushed apart where they would touch.
function spread(labels, low, high) {
  labels.sort((a, b) => a.y - b.y);
  for (let k = 1; k < labels.length; k++) labels[k].y = Math.max(labels[k].y, labels[k - 1].y + 14);
  const over = labels.length ? labels[labels.length - 1].y - high : 0;
  if (over > 0) for (let k = labels.length - 1, y = high; k >= 0; k--, y -= 14) labels[k].y = Math.min(labels[k].y, y);
  for (const label of labels) label.y = Math.max(low, label.y);
}

const DASHES = [null, "6 6", "2 4", "9 3 2 3"];
function lineChart(spec, wide) {
  const values = spec.lines.flatMap((s) => s.points.flatMap((p) => p.slice(1)));
  const log = spec.log && Math.min(...values) > 0;
  const kept = values.concat(spec.rules.map((r) => r[1]).filter((v) => !log || v > 0));
  return figure(spec.title, spec.unit, spec.note, (w) => {
    const alone = spec.lines.length === 1 && !spec.rules.length;
    const ends = !alone && w > 560;
    const base = spec.low ? 150 : w > 560 ? 250 : 210;
    const longest = Math.max(...spec.lines.map((s) => 7.6 * s.name.length), ...spec.rules.map(([label, v]) => 6.6 * (1 + label.length + num(v).length)));
    const pad = { l: 52, r: ends ? Math.min(240, 14 + longest) : 12, t: 10, b: 26 };
    // Without room at the ends of the lines, their names stand in rows above.
    const names = alone ? [] : [...spec.lines.map((s) => [s.name, `ink label c-${s.colour}`]),
      ...spec.rules.map(([label, value]) => [`${ends ? "" : "- - "}${label} ${num(value)}`, ""])];
    const above = [];
    let left = pad.l, top = 12;
    for (const [text, kind] of ends ? [] : names) {
      const width = text.length * (kind ? 7.4 : 6.8);
      if (left > pad.l && left + width > w) { left = pad.l; top += 15; }
      above.push(svg("text", { class: kind, x: left, y: top }, text));
      left += width + 14;
    }
    if (above.length) pad.t = top + 12;
    if (spec.marks && spec.marks.length) pad.t += 8;
    const h = base + Math.max(0, pad.t - 24);
    const root = canvas(w, h, `${spec.title}${spec.unit ? ` in ${spec.unit}` : ""} over steps`);
    const steps = spec.lines.flatMap((s) => s.points.map((p) => p[0]));
    const x = scale(Math.min(...steps), Math.max(...steps), pad.l, w - pad.r, false);
    let low = Math.min(...kept), high = Math.max(...kept);
    if (log) { low /= 1.15; high *= 1.15; } else { const room = (high - low) * 0.06; high += room; low = spec.zero ? Math.min(0, low) : low - room; }
    if (!(high > low)) high = low + (Math.abs(low) || 1);
    const y = scale(low, high, h - pad.b, pad.t, log);
    axes(root, x, y, pad, w, h, { xLabel: "step", n: spec.low ? 3 : 4 });
    for (const [label, value] of spec.rules) {
      if (log && value <= 0) continue;
      root.append(svg("line", { class: "rule", x1: pad.l, x2: w - pad.r, y1: y(value), y2: y(value) }));
    }
    const heights = [], lengths = [];
    for (const s of spec.lines) {
      const group = svg("g", { class: `c-${s.colour}` });
      if (s.points.some((p) => p.length > 2)) {
        const up = s.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[3] ?? p[1]).toFixed(1)}`);
        const down = s.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[2] ?? p[1]).toFixed(1)}`).reverse();
        group.append(svg("path", { class: "area fill line", d: `M${up.concat(down).join("L")}Z` }));
      }
      const dash = spec.dashed && DASHES[spec.lines.indexOf(s) % DASHES.length];
      group.append(svg("path", { class: "ln line", "stroke-dasharray": dash, d: `M${s.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("L")}` }));
      if (s.dots || s.points.length === 1) {
        for (const p of s.points) group.append(svg("circle", { class: "fill", cx: x(p[0]), cy: y(p[1]), r: s.points.length > 60 ? 2 : 3.5 }));
      }
      const last = s.points[s.points.length - 1];
      heights.push(y(last[1]));
      lengths.push(x(last[0]));
      root.append(group);
    }
    for (const [step] of spec.marks || []) {
      const at = x(step);
      root.append(svg("path", { class: "mark", d: `M${at - 4},${pad.t - 8}h8l-4,6z` }), svg("line", { class: "mark-line", x1: at, x2: at, y1: pad.t, y2: h - pad.b }));
    }
    root.append(...above);
    for (const [, value] of spec.rules) heights.push(log && value <= 0 ? h - pad.b : y(value));
    const labels = ends ? names.map(([text, kind], k) => ({ text, kind, y: heights[k] + 4, x: lengths[k] ?? w })) : [];
    // A line that ends early is named where it ends.
    const early = labels.filter((label) => label.x < w - pad.r - 60);
    const rest = labels.filter((label) => !early.includes(label));
    spread(rest, pad.t + 8, h - pad.b);
    for (const { text, kind, x: end, y: at } of [...early, ...rest]) {
      root.append(svg("text", { class: kind, x: Math.min(end, w - pad.r) + 8, y: at }, text));
    }
    const all = [...new Set(steps)].sort((a, b) => a - b);
    const cross = svg("g", {});
    root.append(cross);
    explore(root, all.length, (px) => {
      if (px < pad.l - 12 || px > w - pad.r + 12) return -1;
      let best = 0;
      all.forEach((v, k) => { if (Math.abs(x(v) - px) < Math.abs(x(all[best]) - px)) best = k; });
      return best;
    }, (k) => {
      cross.replaceChildren();
      if (k < 0) return null;
      const at = all[k];
      cross.append(svg("line", { class: "cross", x1: x(at), x2: x(at), y1: pad.t, y2: h - pad.b }));
      const text = [`step ${whole(at)}`];
      let highest = h;
      for (const s of spec.lines) {
        const p = s.points.find((q) => q[0] === at);
        if (!p) continue;
        highest = Math.min(highest, y(p[1]));
        cross.append(svg("circle", { class: `fill hot c-${s.colour}`, cx: x(at), cy: y(p[1]), r: 4 }));
        text.push(`${s.name} ${num(p[1])}${p.length > 2 ? ` (${num(p[2])} to ${num(p[3])})` : ""}`);
      }
      text.push(...(spec.marks || []).filter(([step]) => step === at).map(([, what]) => `▾ ${what}`));
      return { x: x(at), y: highest, text: text.join("\n") };
    });
    return root;
  }, wide);
}

// --- where the time went

function waterfall(time) {
  const body = el("tbody", {});
  let before = 0;
  for (const row of time.rows) {
    const bar = placed(el("b", { class: `bg c-${row.phase}` }), 100 * Math.min(before, 0.998), 100 * row.share);
    const joint = placed(el("u", {}), 100 * Math.min(before, 0.998), 0);
    const track = el("div", { class: "track" }, before ? joint : null, bar);
    before += row.share;
    body.append(el("tr", {},
      el("th", { scope: "row", class: "phase" }, el("i", { class: `bg c-${row.phase}` }), row.phase, el("span", { class: "meaning" }, row.meaning)),
      el("td", { class: "n" }, percent(row.share)),
      el("td", { class: "n wide-only" }, row.step_ms === null ? "–" : ms(row.step_ms)),
      el("td", { class: "bar" }, track),
      el("td", { class: "n" }, row.gain === null ? "–" : `+${percent(row.gain)}`)));
  }
  const total = time.rows.reduce((sum, r) => sum + r.share, 0);
  body.append(el("tr", {}, el("th", { scope: "row" }, "sum"), el("td", { class: "n" }, percent(total)),
    el("td", { class: "n wide-only" }, ""), el("td", { class: "bar" }), el("td", {})));
  return el("table", { class: "bars" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "phase"), el("th", { scope: "col", class: "n" }, "of the time"),
      el("th", { scope: "col", class: "n wide-only" }, "a step"), el("th", { scope: "col", class: "bar" }, "from the first to the last"),
      el("th", { scope: "col", class: "n" }, "if it were gone"))), body);
}
function byRank(found) {
  const most = Math.max(...found.rows.map((r) => r.seconds.reduce((a, b) => a + b, 0)));
  const rows = found.rows.flatMap(({ rank, seconds }) => {
    const stack = el("div", { class: "stack", role: "img", tabindex: 0,
      "aria-label": `rank ${rank}: ${seconds.map((s, k) => `${data.phases[k]} ${num(s)} s`).join(", ")}` });
    const text = `rank ${rank}\n${seconds.map((s, k) => [s, `${data.phases[k]} ${num(s)} s`]).filter(([s]) => s > 0).map(([, t]) => t).join("\n")}`;
    seconds.forEach((s, k) => {
      const part = el("span", { class: `bg c-${data.phases[k]}` });
      part.style.width = `${(100 * s) / most}%`;
      stack.append(part);
    });
    const show = () => { const b = stack.getBoundingClientRect(); showTip(text, b.left + b.width / 2, b.top); };
    for (const name of ["pointerenter", "focus"]) stack.addEventListener(name, show);
    for (const name of ["pointerleave", "blur"]) stack.addEventListener(name, hideTip);
    const waited = seconds[data.phases.indexOf("waiting")];
    return [el("span", {}, `rank ${rank}`), stack, el("span", { class: "soft" }, `waited ${inSeconds(waited)}`)];
  });
  return el("figure", {}, el("figcaption", {}, el("h3", {}, "By rank")), el("div", { class: "ranks" }, rows),
    found.note && el("p", { class: "note" }, found.note));
}

// --- the timeline of one step

function key(phases) {
  return el("div", { class: "key" }, phases.map((p) => el("span", {}, el("i", { class: `bg c-${p}` }), p)));
}
function timeline(run, found) {
  const holder = el("div", {});
  const draw = () => {
    const step = found.steps.find((s) => s.step === chosen.step[run.name]) || found.steps[found.steps.length - 1];
    const id = `${run.name}/${step.step}`;
    const all = [step.begin, step.end];
    const view = chosen.view[id] || all;
    const zoom = (factor, centre) => {
      const [a, b] = chosen.view[id] || all;
      const middle = centre ?? (a + b) / 2;
      const half = Math.max(0.05, ((b - a) / 2) * factor);
      let low = middle - half, high = middle + half;
      if (high - low >= all[1] - all[0]) [low, high] = all;
      else if (low < all[0]) [low, high] = [all[0], all[0] + high - low];
      else if (high > all[1]) [low, high] = [all[1] - (high - low), all[1]];
      chosen.view[id] = [low, high];
      draw();
      redraw();
    };
    const steps = found.steps.map((s) => el("button", { type: "button", "aria-pressed": s === step, onclick: () => { chosen.step[run.name] = s.step; draw(); redraw(); } }, whole(s.step)));
    const tools = el("span", { class: "zoom" },
      el("button", { type: "button", "aria-label": "Zoom in", onclick: () => zoom(0.5) }, "+"),
      el("button", { type: "button", "aria-label": "Zoom out", onclick: () => zoom(2) }, "−"),
      el("button", { type: "button", onclick: () => { delete chosen.view[id]; draw(); redraw(); } }, "whole step"));
    figures = figures.filter((f) => f.timeline !== holder);
    const picture = figure("", "", "", (w) => lanes(step, view, w, zoom, (range) => { chosen.view[id] = range; draw(); redraw(); }), true);
    figures[figures.length - 1].timeline = holder;
    const present = data.phases.filter((p, k) => step.ranks.some((r) => r.spans.some((s) => s[0] === k)));
    holder.replaceChildren(
      el("div", { class: "steps" }, el("span", {}, "step"), steps, tools),
      picture, key(present), el("p", { class: "note" }, aboutStep(step, found)));
  };
  draw();
  return holder;
}
function aboutStep(step, found) {
  const text = [`Step ${whole(step.step)} took ${ms(step.end - step.begin)}.`];
  const waits = step.waits.filter((w) => w[2] >= 0.05).slice(0, 3);
  if (waits.length) text.push(`${waits.map(([a, b, t]) => `Rank ${a} stood still ${ms(t)} for rank ${b}`).join("; ")}.`);
  else if (step.num_ranks > 1) text.push("Nobody waited long for another rank.");
  text.push("Upper band of a rank: what ran. Thin bars below: collectives from their start until this rank knew them finished, hatched while it stood still.");
  const error = Math.max(...step.ranks.map((r) => r.error));
  if (step.num_ranks > 1) text.push(`Clocks agree to ±${ms(error)}.`);
  if (step.ranks.length < step.num_ranks) text.push(`${step.ranks.length} of ${step.num_ranks} ranks: those that waited most and least.`);
  const left = step.ranks.reduce((sum, r) => sum + r.left_out, 0);
  if (left) text.push(`${left} of the shortest spans and smallest collectives are left out.`);
  if (found.recorded > found.steps.length) text.push(`${found.recorded} steps were recorded.`);
  return text.join(" ");
}
function lanes(step, [low, high], w, zoom, select) {
  const small = step.ranks.length > 12;
  const band = small ? 9 : 20, thin = small ? 3 : 6, most = small ? 2 : 5, gap = small ? 6 : 14;
  const pad = { l: w > 560 ? 62 : 48, r: 6, t: 4, b: 30 };
  // Collectives that overlap go to rows of their own, the first that is free.
  const packed = step.ranks.map((rank) => {
    const free = [];
    return rank.collectives.map((c) => {
      const end = c[6] ?? step.end;
      let row = free.findIndex((t) => t <= c[4]);
      if (row < 0) row = free.length < most ? free.length : free.indexOf(Math.min(...free));
      free[row] = end;
      return row;
    });
  });
  const rows = Math.max(0, ...packed.flat().map((r) => r + 1));
  const each = band + rows * (thin + 1) + gap;
  const h = pad.t + step.ranks.length * each + pad.b;
  const root = canvas(w, h, `Timeline of step ${step.step}: ${step.num_ranks} ranks. Plus and minus zoom`);
  root.append(svg("defs", {},
    svg("clipPath", { id: "window" }, svg("rect", { x: pad.l, y: 0, width: Math.max(1, w - pad.l - pad.r), height: h })),
    svg("pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("rect", { width: 5, height: 5, class: "fill c-waiting" }), svg("rect", { width: 2, height: 5, fill: "#fff", opacity: 0.5 }))));
  const x = scale(low, high, pad.l, w - pad.r, false);
  for (const v of x.ticks(Math.max(2, Math.floor(w / 110)))) {
    root.append(svg("line", { class: "grid-line", x1: x(v), x2: x(v), y1: 0, y2: h - pad.b }),
      svg("text", { x: x(v), y: h - pad.b + 16, "text-anchor": "middle" }, tickText(v)));
  }
  root.append(svg("text", { x: pad.l - 8, y: h - pad.b + 16, "text-anchor": "end" }, "ms"));
  const inside = svg("g", { "clip-path": "url(#window)" });
  root.append(inside);
  const items = [];
  // What is thinner than a pixel stays so, lest a thousand calls of microseconds look like a lot.
  const rect = (a, b, y, height, kind, text, least = 0.15) => {
    if (b < low || a > high) return;
    const left = Math.max(x(a), pad.l - 2), width = Math.max(least, Math.min(x(b), w) - left);
    const node = svg("rect", { x: left.toFixed(2), y, width: width.toFixed(2), height, ...kind });
    inside.append(node);
    if (text) items.push({ node, a, b, left, right: left + width, y, height, text });
  };
  step.ranks.forEach((rank, index) => {
    const top = pad.t + index * each;
    root.append(svg("text", { x: pad.l - 8, y: top + band / 2 + 4, "text-anchor": "end" }, small && index % 2 ? "" : `${w > 560 ? "rank " : ""}${rank.rank}`));
    rank.spans.forEach(([phase, a, b]) => {
      const name = data.phases[phase];
      const kind = name === "waiting" ? { fill: "url(#hatch)" } : { class: `fill c-${name}` };
      rect(a, b, top, band, kind, `rank ${rank.rank}${rank.host ? ` on ${rank.host}` : ""}\n${name} ${ms(b - a)}\nfrom ${num(a)} to ${num(b)} ms`);
    });
    rank.collectives.forEach(([operation, group, sequence, sent, a, waited, end, last, blamed], k) => {
      const y = top + band + 2 + packed[index][k] * (thin + 1);
      const until = end ?? step.end;
      const text = [`rank ${rank.rank}: ${operation} ${sequence} (${group})`, `sends ${bytes(sent)}`,
        end === null ? "still on its way when the step ended" : `${ms(end - a)} from start to known finished`,
        `stood still ${ms(waited)}${blamed >= 0.05 ? `, ${ms(blamed)} of it until rank ${last} came` : ""}`].join("\n");
      rect(a, until, y, thin, { class: "fill c-communication" }, text, 1);
      if (waited > 0 && end !== null) rect(Math.max(a, end - waited), end, y, thin, { fill: "url(#hatch)" }, "");
    });
  });
  const frame = svg("rect", { class: "hot", fill: "none", visibility: "hidden" });
  inside.append(frame);
  let current = -1;
  explore(root, items.length, (px, py) => {
    let best = -1;
    items.forEach((item, k) => {
      if (py >= item.y - 1 && py <= item.y + item.height + 1 && px >= item.left - 2 && px <= item.right + 2
        && (best < 0 || item.right - item.left < items[best].right - items[best].left)) best = k;
    });
    return best;
  }, (k) => {
    current = k;
    frame.setAttribute("visibility", k < 0 ? "hidden" : "visible");
    if (k < 0) return null;
    const item = items[k];
    for (const [name, value] of Object.entries({ x: item.left, y: item.y, width: item.right - item.left, height: item.height })) frame.setAttribute(name, value);
    return { x: Math.max(pad.l, Math.min(w - pad.r, (item.left + item.right) / 2)), y: item.y, text: item.text };
  });
  root.addEventListener("keydown", (event) => {
    const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
    if (!factor) return;
    const parent = root.parentNode;
    zoom(factor, items[current] && (items[current].a + items[current].b) / 2);
    if (!parent.isConnected) document.querySelector(".steps ~ figure svg")?.focus();
  });
  // A mouse selects a stretch of time by dragging.
  let from = null;
  const shade = svg("rect", { y: 0, height: h - pad.b, fill: "currentColor", opacity: 0.1, visibility: "hidden" });
  root.append(shade);
  const where = (event) => {
    const box = root.getBoundingClientRect();
    return Math.max(pad.l, Math.min(w - pad.r, ((event.clientX - box.left) / box.width) * w));
  };
  root.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") { from = where(event); root.setPointerCapture(event.pointerId); } });
  root.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const to = where(event);
    shade.setAttribute("visibility", "visible");
    shade.setAttribute("x", Math.min(from, to));
    shade.setAttribute("width", Math.abs(to - from));
  });
  root.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const to = where(event), start = from;
    from = null;
    shade.setAttribute("visibility", "hidden");
    const time = (p) => low + ((p - pad.l) / (w - pad.l - pad.r)) * (high - low);
    if (Math.abs(to - start) > 8) select([time(Math.min(start, to)), time(Math.max(start, to))]);
  });
  root.addEventListener("dblclick", () => select([step.begin, step.end]));
  return root;
}

// --- forecast, bandwidth, scaling

function forecast(found) {
  const offs = found.rows.map((r) => (r.measured === null ? 0 : r.forecast - r.measured));
  const [least, most] = [Math.min(0, ...offs), Math.max(0, ...offs)];
  const span = most - least || 1, zero = (100 * -least) / span;
  const signed = (v) => `${v >= 0 ? "+" : "−"}${percent(Math.abs(v))}`;
  const body = el("tbody", {}, found.rows.map((r, k) => {
    const track = el("div", { class: "off" });
    if (r.measured !== null) {
      track.append(placed(el("u", {}), zero, 0),
        placed(el("b", { class: `bg ${k ? `c-${r.part}` : "c-step"}` }), zero + (100 * Math.min(0, offs[k])) / span, (100 * Math.abs(offs[k])) / span));
    }
    return el("tr", {}, el("th", { scope: "row" }, r.part), el("td", { class: "n" }, ms(r.forecast)), el("td", { class: "n" }, ms(r.measured)),
      el("td", { class: "n" }, r.measured === null ? "–" : `${offs[k] >= 0 ? "+" : "−"}${ms(Math.abs(offs[k]))}`),
      el("td", { class: "bar", "aria-hidden": "true" }, track));
  }), found.facts.filter(([, a, b]) => a !== "–" || b !== "–").map(([name, a, b, off]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "n" }, a), el("td", { class: "n" }, b),
    el("td", { class: "n" }, off === null ? "–" : signed(off)), el("td", { class: "bar" }))));
  const head = [["part of a step", ""], ["forecast", "n"], ["measured", "n"], ["off by", "n"], ["too short ← → too long", "bar"]];
  return el("table", { class: "bars four" }, el("thead", {}, el("tr", {}, head.map(([text, kind]) => el("th", { scope: "col", class: kind || null }, text)))), body);
}
function bandwidth(found) {
  const colours = ["a", "b", "c", "d", "e", "checkpoint", "evaluation", "run7"];
  const names = [...new Set([...found.points, ...found.lines].map((s) => s.operation))];
  const colour = (s) => colours[names.indexOf(s.operation) % colours.length];
  const axis = [...new Set(found.lines.map((s) => s.axis))];
  const dash = (s) => (axis.indexOf(s.axis) ? `${2 + 3 * axis.indexOf(s.axis)} 3` : null);
  return figure("Bus bandwidth by size", "MB/s", "Size: the whole tensor. Bus bandwidth as nccl-tests defines it: what each rank sends over the time. A collective of the recorded steps lasts from the last rank's arrival until the first rank knew the end; what overlapped with computation may have been faster.", (w) => {
    const pad = { l: 52, r: 14, t: 8, b: 28 }, h = w > 560 ? 290 : 230;
    const every = [...found.points, ...found.lines].flatMap((s) => s.points);
    const root = canvas(w, h, "Bus bandwidth in MB/s by bytes");
    const x = scale(Math.min(...every.map((p) => p[0])) / 1.3, Math.max(...every.map((p) => p[0])) * 1.3, pad.l, w - pad.r, true);
    const y = scale(Math.min(...every.map((p) => p[1])) / 1.4, Math.max(...every.map((p) => p[1])) * 1.4, h - pad.b, pad.t, true);
    const powers = [];
    for (let p = Math.ceil(Math.log2(x.low)); p <= Math.log2(x.high); p++) powers.push(2 ** p);
    const stride = Math.max(1, Math.ceil(powers.length / Math.max(2, (w - pad.l) / 80)));
    x.ticks = () => powers.filter((_, k) => k % stride === 0);
    axes(root, x, y, pad, w, h, { xText: bytes, n: 7 });
    for (const s of found.lines) {
      root.append(svg("g", { class: `c-${colour(s)}` },
        svg("path", { class: "ln line", "stroke-dasharray": dash(s), d: `M${s.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("L")}` })));
    }
    const items = [];
    for (const s of found.points) for (const p of s.points) {
      root.append(svg("circle", { class: `fill c-${colour(s)}`, cx: x(p[0]), cy: y(p[1]), r: 3.2, opacity: 0.75 }));
      items.push({ x: x(p[0]), y: y(p[1]), text: `${s.operation} of ${bytes(p[0])}\n${num(p[1])} MB/s` });
    }
    for (const s of found.lines) for (const p of s.points) items.push({ x: x(p[0]), y: y(p[1]), text: `probe: ${s.operation}${s.axis && ` over ${s.axis}`} of ${bytes(p[0])}\n${num(p[1])} MB/s` });
    const ring = svg("circle", { r: 5.5, class: "hot", fill: "none", visibility: "hidden" });
    root.append(ring);
    explore(root, items.length, (px, py) => {
      let best = -1, nearest = 22 ** 2;
      items.forEach((item, k) => { const d = (item.x - px) ** 2 + (item.y - py) ** 2; if (d < nearest) [best, nearest] = [k, d]; });
      return best;
    }, (k) => {
      ring.setAttribute("visibility", k < 0 ? "hidden" : "visible");
      if (k < 0) return null;
      ring.setAttribute("cx", items[k].x);
      ring.setAttribute("cy", items[k].y);
      return items[k];
    });
    const legend = el("div", { class: "key" }, el("span", {}, "● this run"), found.lines.length > 0 && el("span", {}, "— the probe"), names.map((n) => el("span", { class: `c-${colour({ operation: n })}` }, el("i", { class: "bg" }), n)),
      axis.length > 1 && axis.map((a, k) => el("span", {}, `probe over ${a}: ${k ? "dashed" : "solid"}`)));
    return el("div", {}, root, legend);
  }, true);
}
function scaling(found) {
  const counts = [...new Set(found.map((f) => f.replicas))];
  if (counts.length < 2) return null;
  const first = found[0], last = counts[counts.length - 1];
  const told = found.some((f) => f.foretold);
  const log = last / counts[0] > 8;
  return figure("Scaling", "tokens/s by replicas", `Dashed: the first point times the number of replicas; percentages are the efficiency against it.${told ? " Rings: what was foretold before the first step." : ""}`, (w) => {
    const pad = { l: 56, r: 64, t: 16, b: 28 }, h = w > 560 ? 320 : 250;
    const root = canvas(w, h, "Throughput by number of replicas");
    const x = log ? scale(counts[0] / 1.25, last * 1.25, pad.l, w - pad.r, true) : scale(0, last * 1.08, pad.l, w - pad.r, false);
    const ideal = (log ? counts : [0, ...counts]).map((n) => [n, (first.rate * n) / first.replicas]);
    const rates = found.flatMap((f) => [f.rate, f.foretold || f.rate]).concat(ideal.map((p) => p[1]));
    const y = log ? scale(Math.min(...rates) / 1.2, Math.max(...rates) * 1.2, h - pad.b, pad.t, true) : scale(0, Math.max(...rates) * 1.06, h - pad.b, pad.t, false);
    x.ticks = () => counts;
    axes(root, x, y, pad, w, h, { xText: (n) => `${n}×` });
    const path = (points) => `M${points.map((p) => `${x(p[0])},${y(p[1])}`).join("L")}`;
    const best = counts.map((n) => found.find((f) => f.replicas === n));
    const end = ideal[ideal.length - 1];
    root.append(svg("path", { class: "gap", d: `${path(ideal.filter((p) => p[0] >= first.replicas))}L${path(best.map((f) => [f.replicas, f.rate]).reverse()).slice(1)}Z` }),
      svg("path", { class: "rule", fill: "none", d: path(ideal) }),
      svg("text", { x: x(end[0]) + 10, y: y(end[1]) + 4 }, "linear"),
      svg("g", { class: "c-a" }, svg("path", { class: "ln line", d: path(best.map((f) => [f.replicas, f.rate])) })));
    const items = found.map((f) => ({ x: x(f.replicas), y: y(f.rate), text: `${f.name}\n${whole(f.rate)} tokens/s on ${f.replicas}\n${percent(f.efficiency)} of linear${f.own === null ? "" : `\n${percent(f.own)} by its own receipt`}${f.foretold ? `\nforetold ${whole(f.foretold)}` : ""}` }));
    found.forEach((f, k) => {
      if (f.foretold) root.append(svg("circle", { class: "ring", cx: x(f.replicas), cy: y(f.foretold), r: 5 }));
      root.append(svg("circle", { class: "fill c-a", cx: items[k].x, cy: items[k].y, r: 4.5 }));
      if (best.includes(f)) root.append(svg("text", { class: "ink label c-a", x: items[k].x + 10, y: items[k].y + 16 }, percent(f.efficiency, 0)));
    });
    explore(root, items.length, (px, py) => {
      let found_ = -1, nearest = 30 ** 2;
      items.forEach((item, k) => { const d = (item.x - px) ** 2 + (item.y - py) ** 2; if (d < nearest) [found_, nearest] = [k, d]; });
      return found_;
    }, (k) => (k < 0 ? null : items[k]));
    return root;
  }, true);
}

// --- tables and sections

const section = (title, note, ...parts) => el("section", {}, el("h2", {}, title), note && el("p", { class: "note" }, note), parts);
// `kinds`: classes of the columns after the first.
function table(head, rows, kind, kinds = []) {
  const of = (k) => (k ? kinds[Math.min(k, kinds.length) - 1] || null : null);
  return el("div", { class: "scroll" }, el("table", { class: kind },
    head && el("thead", {}, el("tr", {}, head.map((h, k) => el("th", { scope: "col", class: of(k) }, h)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, k) => (k ? el("td", { class: of(k) }, cell) : el("th", { scope: "row" }, cell))))))));
}
const facts = (rows) => el("dl", { class: "facts" }, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
const tiles = (found) => {
  const list = el("dl", { class: "tiles" }, found.map((t) => el("div", {}, el("dt", {}, t.label), el("dd", {}, el("span", { class: "value" }, t.value), el("div", { class: "under" }, t.note)))));
  list.style.setProperty("--columns", found.length > 5 ? Math.ceil(found.length / Math.ceil(found.length / 5)) : found.length);
  return list;
};
const WORTH = 0.005, MOST_ADVICE = 3;
function advice(run) {
  const row = (a) => [a.gain === null ? "" : `up to ${a.gain >= 0 ? "+" : "−"}${percent(Math.abs(a.gain))}`, a.what, a.do];
  const many = run.advice.filter((a) => a.gain === null || a.gain >= WORTH);
  const [first, others] = [many.slice(0, MOST_ADVICE), run.advice.filter((a) => !many.slice(0, MOST_ADVICE).includes(a))];
  const list = (rows) => table(null, rows.map(row), "do", ["what", "why"]);
  return el("figure", {}, el("figcaption", {}, el("h3", {}, "What to change", el("small", {}, "throughput, if all of it were gone"))),
    first.length ? list(first) : el("p", { class: "note" }, "Nothing is worth half a percent."),
    others.length > 0 && folded(`${run.name}/advice`, `${others.length} more`, list(others)));
}
function said(run) {
  const rows = run.said.map((s) => [s.what, s.text]);
  return el("figure", {}, el("figcaption", {}, el("h3", {}, "Named")), table(null, rows, "said", ["why"]));
}
function peaks(found) {
  const most = Math.max(...found.rows.map((r) => r.bytes));
  const rows = found.rows.flatMap((r) => {
    const bar = el("span", { class: "bg c-a" });
    bar.style.width = `${(100 * r.bytes) / most}%`;
    return [el("span", {}, `rank ${r.rank}`), el("div", { class: "stack" }, bar), el("span", { class: "soft" }, r.text)];
  });
  return el("figure", {}, el("figcaption", {}, el("h3", {}, "Peak by rank")), el("div", { class: "ranks" }, rows), found.note && el("p", { class: "note" }, found.note));
}
function folded(id, title, ...parts) {
  const node = el("details", { open: chosen.open.has(id) ? "" : null }, el("summary", {}, title), parts);
  node.addEventListener("toggle", () => (node.open ? chosen.open.add(id) : chosen.open.delete(id)));
  return node;
}
function lineCharts(title, found, said = []) {
  if (!found.length && !said.length) return null;
  const cut = found.some((c) => c.id !== "noise" && c.lines.some((s) => s.points.some((p) => p.length > 2)));
  const wide = (c) => c.id.startsWith("loss") || c.id.startsWith("throughput") || found.length < 3;
  return section(title, cut && "Lines are means of neighbouring rows, bands their least and greatest.",
    said.length ? el("ul", { class: "advice" }, said.map((text) => el("li", {}, text))) : null,
    el("div", { class: "grid" }, found.map((c) => lineChart(c, wide(c)))));
}
const chartsOf = (run, title, ...names) => lineCharts(title, names.map((n) => run.charts.find((c) => c.id === n)).filter(Boolean));

function plan(rows) {
  const decided = rows.filter(([, , why]) => why && why !== "as given"), rest = rows.filter((row) => !decided.includes(row));
  return [decided.length > 0 && table(["", "value", "reason"], decided, "plan", ["", "why"]),
    rest.length > 0 && el("figure", {}, el("figcaption", {}, el("h3", {}, "As given, or following from it")), facts(rest))];
}
const state = ({ kind, text }) => (gone && kind === "open"
  ? el("span", { class: "state gone" }, `${text}, last seen ${gone}`) : el("span", { class: `state ${kind}` }, text));
function showRun(run) {
  const parts = [
    el("h1", {}, run.name, state(run.state)),
    el("p", { class: "subtitle" }, run.subtitle),
    run.tiles.length ? tiles(run.tiles) : null,
  ];
  if (run.time) {
    parts.push(section("Where the time went", `Shares of ${inSeconds(run.time.seconds)} (${run.time.source}). Last column: how much faster steps would be without it.`, waterfall(run.time),
      run.time.by_rank && byRank(run.time.by_rank), run.said.length ? said(run) : null, run.advice.length ? advice(run) : null));
  }
  if (run.timeline) parts.push(section("Timeline of a step", "", timeline(run, run.timeline)));
  parts.push(chartsOf(run, "Learning", "loss", "reward", "rate", "norm"));
  parts.push(chartsOf(run, "Speed", "throughput", "exposed", "mfu"));
  if (run.forecast) parts.push(section("Forecast against measurement", [run.forecast.error === null ? "Written before the first step." : `Written before the first step, which it foretold ${percent(Math.abs(run.forecast.error))} too ${run.forecast.error < 0 ? "short" : "long"}.`, ...run.forecast.sources.map((x) => `${x[0].toUpperCase()}${x.slice(1)}.`)].join(" "), forecast(run.forecast)));
  if (run.bandwidth) parts.push(section("The link", "", bandwidth(run.bandwidth)));
  parts.push(lineCharts("Batch size", run.charts.filter((c) => c.id === "noise"), run.batch));
  const memory = run.charts.filter((c) => c.id === "memory");
  if (memory.length || run.memory) parts.push(section("Memory", "", el("div", { class: "grid" }, memory.map((c) => lineChart(c, true))), run.memory && peaks(run.memory)));
  if (run.plan.length) {
    parts.push(section("Plan", "What was decided before the first step, and why.", plan(run.plan),
      Object.keys(run.config).length ? folded(`${run.name}/config`, "Configuration as asked", facts(Object.entries(run.config))) : null));
  }
  if (Object.keys(run.environment).length) parts.push(section("Environment", "", facts(Object.entries(run.environment))));
  if (run.missing.length) {
    parts.push(el("aside", { class: "missing" }, el("h2", {}, "Not on this page"),
      el("ul", {}, run.missing.map(([what, why, how]) => el("li", {}, el("strong", {}, what), `: ${why}. `, el("span", { class: "soft" }, `${how[0].toUpperCase()}${how.slice(1)}.`))))));
  }
  return parts;
}
function showComparison(found) {
  const parts = [el("h1", {}, "Side by side"), el("p", { class: "subtitle" }, data.runs.map((r) => r.name).join(" · "))];
  const curve = scaling(found.scaling);
  if (found.scaling.length) {
    parts.push(section("Throughput", curve ? "" : "All of these runs have the same number of replicas: there is no scaling curve.", curve,
      table(["run", "replicas", "tokens/s", "foretold", "efficiency", "by its own receipt"], found.scaling.map((f) => [f.name, num(f.replicas), whole(f.rate), f.foretold ? whole(f.foretold) : "–", percent(f.efficiency), f.own === null ? "–" : percent(f.own)]), null, ["n"])));
  } else parts.push(section("Throughput", "None of these runs has a receipt yet."));
  if (found.time.length) {
    const most = Math.max(...found.time.map((t) => Object.values(t.rows).reduce((a, b) => a + (b || 0), 0)));
    const used = data.phases.filter((p) => found.time.some((t) => t.rows[p]));
    const totals = found.time.map((t) => used.reduce((a, p) => a + (t.rows[p] || 0), 0));
    const change = (a, b) => (Math.abs(b - a) < 1e-3 ? "–" : `${b >= a ? "+" : "−"}${ms(Math.abs(b - a))}`);
    const bars = found.time.flatMap((t, k) => {
      const stack = el("div", { class: "stack", role: "img", "aria-label": used.map((p) => `${p} ${ms(t.rows[p])}`).join(", ") });
      for (const p of used) { const part = el("span", { class: `bg c-${p}` }); part.style.width = `${(100 * (t.rows[p] || 0)) / most}%`; stack.append(part); }
      return [el("span", {}, t.name), stack, el("span", { class: "n" }, ms(totals[k]))];
    });
    parts.push(section("A step", "Milliseconds by phase, mean over ranks.", el("div", { class: "ranks" }, bars), key(used),
      table(["phase", ...found.time.map((t) => t.name), ...(found.time.length === 2 ? ["difference"] : [])],
        [...used.map((p) => [p, ...found.time.map((t) => t.rows[p] || 0)]), ["step", ...totals]].map(([p, ...row]) => [p, ...row.map((v) => (v ? ms(v) : "–")), ...(row.length === 2 ? [change(...row)] : [])]), null, ["n"])));
  }
  parts.push(lineCharts("Over steps", found.charts));
  parts.push(section("What changed", found.changed.length ? "" : "Configuration, plan and environment are the same.", found.changed.length ? table(["", ...data.runs.map((r) => r.name)], found.changed, null, ["n"]) : null));
  return parts;
}

// --- the page

function render() {
  const views = data.runs.map((r) => ({ name: r.name, show: () => showRun(r) }));
  if (data.compare) views.push({ name: "Side by side", show: () => showComparison(data.compare) });
  chosen.run = Math.min(chosen.run, views.length - 1);
  const tabs = byId("runs");
  tabs.hidden = views.length < 2;
  tabs.replaceChildren(...views.map((v, k) => el("button", {
    type: "button", role: "tab", id: `tab-${k}`, "aria-controls": "main", "aria-selected": k === chosen.run, tabindex: k === chosen.run ? 0 : -1,
    onclick: () => { chosen.run = k; history.replaceState(null, "", `#${k}`); render(); byId(`tab-${k}`).focus(); },
  }, v.name)));
  figures = [];
  const main = byId("main");
  main.replaceChildren(...views[chosen.run].show().filter(Boolean), el("footer", {}, "Every number comes from the run's own files."));
  byId("made").textContent = gone ? `no answer since ${gone}: the run has ended or cannot be reached`
    : live ? `live, ${new Date(data.made).toLocaleTimeString("en-GB")}`
    : new Date(data.made).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  for (const f of figures) f.width = 0;
  redraw();
}
byId("runs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const tabs = [...byId("runs").children];
  if (step) tabs[(chosen.run + step + tabs.length) % tabs.length].click();
});
chosen.run = Number(/^#(\d+)$/.exec(location.hash)?.[1] ?? (data.compare ? data.runs.length : 0));
render();

// --- live: ask for newer data, and say when nobody answers

if (live) {
  const now = () => new Date().toLocaleTimeString("en-GB");
  let seen = null, failures = 0, answered = now();
  const ask = async () => {
    if (!document.hidden) {
      let changed = false;
      try {
        const answer = await fetch("data.json", { cache: "no-store", headers: seen ? { "If-None-Match": seen } : {} });
        if (answer.status === 200) {
          data = await answer.json(); // may break off half-way
          seen = answer.headers.get("ETag");
          changed = true;
        }
        failures = 0;
        answered = now();
      } catch (error) {
        failures += 1;
      }
      const last = failures ? answered : "";
      changed ||= last !== gone;
      gone = last;
      if (changed) { if (tip.hidden) render(); else later = render; }
    }
    setTimeout(ask, failures ? Math.min(30000, 2000 * 2 ** failures) : 2000);
  };
  ask();
}
})();
