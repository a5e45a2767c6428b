"use strict";
// Curves of a phigrow report. Everything from the data goes into text nodes and numbers, never into markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("controls");
  const FIRST = 5; // arms drawn beside the baseline until more are asked for
  const hidden = new Set(data.order.slice(FIRST + 1));
  const SVG = "http://www.w3.org/2000/svg";
  const UNITS = { tokens: "training tokens", flops: "training FLOPs", seconds: "training time" };
  const all = data.arms.map((arm, place) => ({
    ...arm, name: arm.arm + (arm.lr_edge ? " †" : ""), place, runs: data.curves[place].runs, fit: data.fits[place], target: data.targets[place],
  }));
  const arms = data.order.map((place) => all[place]); // the baseline, then the best first
  let serial = 0;

  const make = (parent, name, attributes = {}, text = null) => {
    const svg = parent.namespaceURI === SVG || name === "svg";
    const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    parent.append(node);
    return node;
  };
  const paint = (node, place) => {
    node.style.setProperty("--colour", `var(--arm${place === 0 ? 0 : 1 + ((place - 1) % 12)})`);
    if (place > 12) node.dataset.round = Math.floor((place - 1) / 12); // colours repeat: dashed, then dotted
    return node;
  };
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const figures = (value, count = 3) => String(Number(value.toPrecision(count)));

  function tokens(value) {
    const [scale, letter] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]].find(([s]) => Math.abs(value) >= s) || [1, ""];
    return figures(value / scale) + letter;
  }
  function formatter(unit, most) {
    if (unit === "tokens") return tokens;
    if (unit === "flops") return (value) => (value ? Number(value.toPrecision(3)).toExponential().replace("+", "") : "0");
    const [scale, name] = most >= 7200 ? [3600, " h"] : most >= 300 ? [60, " min"] : [1, " s"];
    return (value) => figures(value / scale) + name;
  }

  function ticks(low, high, log, most) {
    if (log) {
      for (const mantissas of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
        const found = [];
        for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
          for (const times of mantissas) found.push(times * 10 ** power);
        const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
        if (inside.length <= most + 2 && inside.length > 1) return inside;
      }
    }
    const rough = (high - low) / most;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((times) => times * unit >= rough) * unit;
    const linear = [];
    for (let k = Math.ceil(low / step); k * step <= high + 1e-9 * step; k += 1) linear.push(k * step);
    return linear;
  }

  // spec: lines [{name, place, points [[x, y, text]], seed, dashed, whiskers [[x, low, high]], marks [{x, y, shape, solid}]}],
  // xlog, ylog, x and y (formatters), xlabel, title, yrange, goal, xs (values that the x axis must span), dodge (number of
  // places with marks side by side), infinite (a line for infinite values above the others).
  function chart(host, spec) {
    host.replaceChildren();
    const width = Math.max(host.clientWidth, 240), height = spec.height || Math.round(Math.min(430, Math.max(270, width * 0.45)));
    const all = spec.lines.flatMap((line) => line.points).filter(([x, y]) => known(x) && known(y) && (!spec.xlog || x > 0));
    if (!all.length && !spec.infinite) return make(host, "p", { class: "small" }, "Nothing to show here.");
    const xs = spec.xs || all.map(([x]) => x), ys = all.map(([, y]) => y);
    const xrange = [spec.xlog ? Math.min(...xs) : Math.min(0, ...xs), Math.max(...xs)];
    const yrange = spec.yrange || [Math.min(...ys), Math.max(...ys)];
    if (xrange[0] === xrange[1]) xrange[spec.xlog ? 0 : 1] *= spec.xlog ? 0.5 : 2;
    if (yrange[0] === yrange[1]) { yrange[0] *= 0.99; yrange[1] = yrange[1] * 1.01 || 1; }
    const warp = (log) => (log ? Math.log : (value) => value);
    const wx = warp(spec.xlog), wy = warp(spec.ylog);
    const room = { left: 52, right: 16, top: spec.infinite ? 62 : 26, bottom: 40 };
    // Marks at the same place stand side by side.
    const step = spec.dodge ? Math.min(9, (0.6 * width) / (spec.dodge * Math.max(1, spec.lines.length))) : 0;
    const shift = (line) => step * (spec.lines.indexOf(line) - (spec.lines.length - 1) / 2);
    const right = width - room.right, bottom = height - room.bottom;
    const edge = spec.dodge ? (step * spec.lines.length) / 2 + 8 : 0;
    const px = (x) => room.left + edge + ((wx(x) - wx(xrange[0])) / (wx(xrange[1]) - wx(xrange[0]))) * (right - room.left - 2 * edge);
    const py = (y) => bottom - ((wy(y) - wy(yrange[0])) / (wy(yrange[1]) - wy(yrange[0]))) * (bottom - room.top);

    const svg = make(host, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spec.title });
    make(svg, "text", { x: 0, y: 13, class: "title" }, spec.title);
    for (const y of ticks(...yrange, spec.ylog, Math.max(3, Math.floor((bottom - room.top) / 55)))) {
      make(svg, "line", { x1: room.left, x2: right, y1: py(y), y2: py(y), class: "rule" });
      make(svg, "text", { x: room.left - 7, y: py(y) + 4, "text-anchor": "end" }, spec.y(y));
    }
    let free = -Infinity;
    for (const x of spec.xs ? [...spec.xs].sort((a, b) => a - b) : ticks(...xrange, spec.xlog, Math.max(2, Math.floor((right - room.left) / 80)))) {
      if (px(x) - free < 44) continue;
      free = px(x);
      make(svg, "line", { x1: px(x), x2: px(x), y1: bottom, y2: bottom + 4, class: "frame" });
      make(svg, "text", { x: px(x), y: bottom + 17, "text-anchor": "middle" }, spec.x(x));
    }
    make(svg, "line", { x1: room.left, x2: right, y1: bottom, y2: bottom, class: "frame" });
    make(svg, "text", { x: (room.left + right) / 2, y: height - 5, "text-anchor": "middle" }, spec.xlabel);
    const clip = `clip${(serial += 1)}`;
    make(make(svg, "clipPath", { id: clip }), "rect", { x: room.left, y: room.top - 4, width: right - room.left + 4, height: bottom - room.top + 8 });
    const inside = make(svg, "g", { "clip-path": `url(#${clip})` });
    if (spec.infinite) {
      make(svg, "line", { x1: room.left, x2: right, y1: room.top - 24, y2: room.top - 24, class: "rule" });
      make(svg, "text", { x: room.left - 7, y: room.top - 20, "text-anchor": "end" }, "∞");
    }
    if (known(spec.goal)) make(inside, "line", { x1: room.left, x2: right, y1: py(spec.goal), y2: py(spec.goal), class: "goal" });
    for (const line of spec.lines) {
      const spot = ([x, y]) => `${(px(x) + shift(line)).toFixed(1)},${py(y).toFixed(1)}`;
      for (const [x, low, high] of line.whiskers || [])
        paint(make(inside, "line", { x1: px(x) + shift(line), x2: px(x) + shift(line), y1: py(Math.max(low, yrange[0])), y2: py(Math.min(high, yrange[1])), class: "whisker" }), line.place);
      // A loss that is not a number interrupts its curve.
      let piece = [];
      const draw = () => {
        if (piece.length > 1)
          paint(make(inside, "polyline", { points: piece.map(spot).join(" "), class: `curve${line.seed ? " seed" : ""}${line.dashed ? " dashed" : ""}${line.fit ? " fit" : ""}` }), line.place);
        piece = [];
      };
      for (const point of line.points) {
        if (known(point[0]) && known(point[1]) && (!spec.xlog || point[0] > 0) && (!spec.ylog || point[1] > 0)) piece.push(point);
        else draw();
      }
      draw();
    }
    for (const line of spec.lines)
      for (const { x, y, shape, solid } of line.marks || []) {
        const top = y === Infinity && spec.infinite;
        if (!known(x) || (spec.xlog && x <= 0) || !(top || (known(y) && y >= yrange[0] * 0.999 && y <= yrange[1] * 1.001))) continue;
        const [a, b] = [px(x) + shift(line), top ? room.top - 24 : py(y)];
        const turn = shape === "down" ? 1 : -1;
        const node = shape
          ? make(svg, "polygon", { points: `${a - 5},${b - 4 * turn} ${a + 5},${b - 4 * turn} ${a},${b + 5 * turn}`, class: "mark" })
          : make(svg, "circle", { cx: a, cy: b, r: solid ? 3.5 : 5, class: solid ? "mark solid" : "mark" });
        paint(node, line.place);
      }
    hover(host, svg, spec, { px, width, top: room.top, bottom, left: room.left, right });
    return svg;
  }

  function hover(host, svg, spec, at) {
    const cursor = make(svg, "line", { y1: at.top, y2: at.bottom, class: "cursor", visibility: "hidden" });
    const tip = make(host, "div", { class: "tip", hidden: "" });
    const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * at.width;
      if (x < at.left - 8 || x > at.right + 8) return hide();
      const near = spec.lines.filter((line) => !line.seed && !line.fit).map((line) => {
        const there = line.points.filter((point) => known(point[0]) && known(point[1]) && (!spec.xlog || point[0] > 0));
        const best = there.reduce((a, b) => (a && Math.abs(at.px(a[0]) - x) <= Math.abs(at.px(b[0]) - x) ? a : b), null);
        return { line, best };
      }).filter(({ best }) => best);
      if (!near.length) return hide();
      const first = near.reduce((a, b) => (Math.abs(at.px(a.best[0]) - x) <= Math.abs(at.px(b.best[0]) - x) ? a : b)).best[0];
      const place = at.px(first);
      for (const [key, value] of [["x1", place], ["x2", place], ["visibility", "visible"]]) cursor.setAttribute(key, value);
      tip.replaceChildren();
      make(tip, "b", {}, spec.x(first));
      for (const { line, best } of near.sort((a, b) => a.best[1] - b.best[1]))
        if (Math.abs(at.px(best[0]) - place) < 30) paint(make(tip, "span", {}, `${line.name}: ${best[2] || spec.y(best[1], true)}`), line.place);
      tip.hidden = false;
      const scale = box.width / at.width;
      const left = place * scale + (place * scale > box.width / 2 ? -tip.offsetWidth - 12 : 12);
      tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
      return undefined;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }

  const chosen = () => {
    const form_ = new FormData(form);
    return Object.fromEntries(["unit", "accounting", "xlog", "ylog", "whole", "loss"].map((key) => [key, form_.get(key)]));
  };
  const visible = () => arms.filter((arm) => !hidden.has(arm.place));
  const find = (estimates, { unit, accounting }) => estimates.find((e) => e.unit === unit && e.accounting === accounting);

  function series(run, { unit, accounting, loss }) {
    const from = loss === "train" ? run.train : run.evals;
    const losses = loss && loss !== "train" ? run.sources[loss.slice(2)] || [] : from.loss;
    const before = accounting === "charged" ? run.source[unit] : 0;
    if (before === null) return [];
    return from[unit].map((cost, index) => [cost + before + run.expansion[unit], losses[index] ?? null]);
  }
  const mean = (values) => (values.every(known) ? values.reduce((a, b) => a + b, 0) / values.length : null);

  function armLines(arm, curves, more = {}) {
    const full = curves.filter((points) => points.length);
    if (!full.length) return [];
    const line = { name: arm.name, place: arm.place, ...more };
    if (full.length === 1) return [{ ...line, points: full[0] }];
    const seeds = full.map((points) => ({ name: arm.name, place: arm.place, seed: true, points }));
    if (full.some((points) => points.length !== full[0].length)) return [...seeds, { ...line, points: full[0], seed: true }];
    const middle = full[0].map((_, index) => [0, 1].map((axis) => mean(full.map((points) => points[index][axis]))));
    return [...seeds, { ...line, points: middle }];
  }

  // The fitted curve from which an arm's cost was read, with the cost on it.
  function fitLines(arm, options) {
    const estimate = find(arm.estimates, options);
    if (options.loss || !estimate || estimate.censored || estimate.upper_bound || !known(estimate.cost)) return [];
    const before = options.accounting === "charged" ? mean(arm.runs.map((run) => run.source[options.unit])) : 0;
    if (!known(before)) return [];
    const points = (arm.fit[options.unit] || []).map(([cost, loss]) => [cost + before, loss]);
    return [{ name: arm.name, place: arm.place, fit: true, points, marks: [{ x: estimate.cost, y: arm.target }] }];
  }

  function drawLoss(options) {
    const lines = visible().flatMap((arm) => [
      ...armLines(arm, arm.runs.map((run) => series(run, options))), ...fitLines(arm, options),
    ]);
    const most = Math.max(0, ...lines.flatMap((line) => line.points.map(([x]) => x || 0)));
    const losses = lines.flatMap((line) => line.points).filter(([x, y]) => known(y) && (options.whole || x >= 0.08 * most)).map(([, y]) => y);
    const free = options.whole || options.loss;
    chart(document.getElementById("loss"), {
      lines, xlog: options.xlog, ylog: options.ylog, x: formatter(options.unit, most), xlabel: UNITS[options.unit] + (options.accounting === "charged" ? ", source's included" : ""),
      y: (value, fine) => value.toFixed(fine ? 3 : value < 10 ? 2 : 1), goal: options.loss ? null : data.target,
      yrange: free && losses.length ? [Math.min(...losses), Math.max(...losses)] : free ? null : [...data.range],
      title: options.loss === "train" ? "Training loss, nats per token" : `Held-out loss${options.loss ? `, ${options.loss.slice(2)}` : ""}, nats per token`,
    });
    document.getElementById("loss-caption").textContent = options.loss ? "" :
      `Grey dashes: the target, ${data.baseline}'s final loss. Coloured dashes: the fitted curve from which an arm's cost is read. Rings: that cost. Thin lines: single seeds.`;
  }

  function drawBudgets(options) {
    const lines = visible().filter((arm) => arm.budgets.length).map((arm) => {
      const every = arm.budgets.filter((point) => !point.source_meets_target).map((point) => ({ point, e: find(point.estimates, options) }));
      const points = every.filter(({ e }) => known(e.speedup) && e.speedup > 0);
      const before = every.filter(({ e }) => e.at_target_from_the_start);
      const sign = (e) => (e.censored ? "< " : e.upper_bound ? "> " : "");
      const ends = (e) => (e.speedup_interval && e.speedup_interval.every(known) ? ` [${e.speedup_interval.map((end) => end.toFixed(2)).join(", ")}]` : "");
      // Bounds stand alone: a line between a bound and a value would be neither.
      const joined = points.flatMap(({ point, e }) => {
        const spot = [point.budget, e.speedup, `${sign(e)}${e.speedup.toFixed(2)}x${ends(e)}`];
        return sign(e) ? [[null, null], spot, [null, null]] : [spot];
      });
      return {
        name: arm.name, place: arm.place, dashed: arm.budgets.some(({ basis }) => basis === "curve"),
        points: joined,
        whiskers: points.filter(({ e }) => e.speedup_interval).map(({ point, e }) => [point.budget, e.speedup_interval[0] ?? Infinity, e.speedup_interval[1] ?? Infinity]),
        marks: before.map(({ point }) => ({ x: point.budget, y: Infinity, solid: point.basis !== "curve" })).concat(points.map(({ point, e }) => ({ x: point.budget, y: e.speedup, solid: point.basis !== "curve", shape: e.censored ? "down" : e.upper_bound ? "up" : null }))),
      };
    });
    const figure = document.getElementById("budget-figure");
    figure.hidden = !arms.some((arm) => arm.budgets.length);
    if (figure.hidden) return;
    const budgets = [...new Set(arms.flatMap((arm) => arm.budgets.map((point) => point.budget)))];
    const infinite = lines.some((line) => line.marks.some(({ y }) => y === Infinity));
    const values = lines.flatMap((line) => line.points.map(([, y]) => y)).filter(known);
    const lows = lines.flatMap((line) => line.whiskers.map(([, low]) => low)), highs = lines.flatMap((line) => line.whiskers.map(([, , high]) => high));
    const top = Math.max(1, ...values), low = Math.min(1, ...values);
    chart(document.getElementById("budget"), {
      lines, xlog: true, ylog: true, goal: 1, x: tokens, xs: budgets, dodge: budgets.length, infinite, y: (value) => `${figures(value)}x`, xlabel: `${data.baseline}'s budget, tokens`,
      yrange: [0.9 * Math.max(low / 2, Math.min(low, ...lows)), 1.1 * Math.min(2 * top, Math.max(top, ...highs))],
      title: `Speedup against budget (${options.unit === "flops" ? "FLOPs" : options.unit}, ${options.accounting})`,
    });
    const middle = lines.some((line) => line.dashed);
    const bases = new Set(visible().flatMap((arm) => arm.budgets.map((point) => point.basis)));
    const shapes = lines.flatMap((line) => line.marks).map((mark) => mark.shape);
    const sentences = [
      `1x is ${data.baseline}; higher is faster.`,
      ...(middle ? [`Dashed: ${data.mid_schedule}`] : []),
      ...(bases.has("ends") ? [`${bases.size > 1 ? "Solid" : "All"} points are read off curves through decayed ends.`] : []),
      ...(bases.has("constant") ? [`${bases.size > 1 ? "Other" : "All"} points are read off curves with a constant learning rate.`] : []),
      ...(lines.some((line) => line.whiskers.length) ? [`Vertical lines: ${data.budget_intervals}`] : []),
      ...(infinite ? ["∞: the arm had reached the target before its first update."] : []),
      ...(shapes.includes("up") ? ["Triangle up: a lower bound, because the arm was already below the target at its smallest budget."] : []),
      ...(shapes.includes("down") ? ["Triangle down: an upper bound, because the arm did not reach the target."] : []),
    ];
    document.getElementById("budget-caption").textContent = sentences.join(" ");
  }

  // Decayed ends of flat models with their lower envelope, and of the arms.
  function drawFrontier(options) {
    const { sizes, envelope, arms: ends } = data.flat;
    const figure = document.getElementById("frontier-figure");
    figure.hidden = !sizes.length;
    if (!sizes.length) return;
    const mean = (points) => {
      const sorted = [...points].sort((a, b) => a[0] - b[0]), groups = [];
      for (const point of sorted) {
        const last = groups[groups.length - 1];
        if (last && point[0] < last[0][0] * 1.01) last.push(point);
        else groups.push([point]);
      }
      return groups.map((group) => [0, 1].map((axis) => group.reduce((sum, point) => sum + point[axis], 0) / group.length));
    };
    const dots = (points) => points.map(([x, y]) => ({ x, y, solid: true }));
    const flat = sizes.map((size) => ({ name: size.arm, place: 0, seed: true, points: mean(size.ends), marks: dots(mean(size.ends)) }));
    const lines = [
      ...flat, { name: "flat frontier", place: 0, points: envelope },
      ...visible().filter((arm) => arm.place).map((arm) => ({ name: arm.name, place: arm.place, points: ends[arm.place][options.accounting], marks: dots(ends[arm.place][options.accounting]) })),
    ];
    const losses = lines.flatMap((line) => line.points.map(([, y]) => y)).filter(known);
    const [low, high] = [Math.min(...losses), Math.max(...losses)];
    chart(document.getElementById("frontier"), {
      lines, xlog: true, yrange: [low - 0.03 * (high - low), high + 0.03 * (high - low)], x: formatter("flops"), xlabel: `training FLOPs, ${options.accounting}`, y: (value, fine) => value.toFixed(fine ? 3 : 2),
      title: "Held-out loss of decayed ends, nats per token",
    });
    document.getElementById("frontier-caption").textContent =
      "Thin dark lines: flat models, each size trained from scratch. Thick dark line: their lower envelope. An arm below it needs fewer FLOPs than the best flat model. The switch above the loss curves counts the source's training.";
  }

  function drawAges(options) {
    document.getElementById("ages-section").hidden = !data.ages.length;
    if (!data.ages.length) return;
    const lines = data.ages.map(({ method, points }) => {
      const every = points.map(({ age, arm }) => ({ age, arm: all[arm], e: find(all[arm].estimates, options) })).filter(({ e }) => known(e.saving));
      const text = (arm, e) => `${e.censored ? "< " : e.upper_bound ? "> " : ""}${(100 * e.saving).toFixed(0)} %${arm.lr_edge ? " †" : ""}`;
      return {
        name: method, place: points[0].arm,
        points: every.flatMap(({ age, arm, e }) => (e.censored || e.upper_bound ? [[null, null], [age, 100 * e.saving, text(arm, e)], [null, null]] : [[age, 100 * e.saving, text(arm, e)]])),
        whiskers: every.filter(({ e }) => e.saving_interval && e.saving_interval.every(known)).map(({ age, e }) => [age, 100 * e.saving_interval[0], 100 * e.saving_interval[1]]),
        marks: every.map(({ age, e }) => ({ x: age, y: 100 * e.saving, solid: true, shape: e.censored ? "down" : e.upper_bound ? "up" : null })),
      };
    });
    const key = document.getElementById("ages-key");
    key.replaceChildren();
    for (const line of lines) paint(make(key, "span", {}, line.name), line.place);
    const values = lines.flatMap((line) => [...line.points.map(([, y]) => y), ...line.whiskers.flatMap(([, low, high]) => [low, high])]).filter(known);
    const ages = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)).filter(known))];
    chart(document.getElementById("ages"), {
      lines, xlog: true, goal: 0, xs: ages, dodge: ages.length, x: (value) => figures(value), y: (value) => `${figures(value)} %`,
      xlabel: "source's age, tokens per parameter",
      yrange: [Math.max(-100, Math.min(0, ...values)) - 3, Math.max(0, ...values) + 3],
      title: `Saving against age (${options.unit === "flops" ? "FLOPs" : options.unit}, ${options.accounting})`,
    });
    document.getElementById("ages-caption").textContent =
      `0 % is ${data.baseline}. Vertical lines: 95 % intervals. Triangles: bounds. Arms whose source is already below the target are left out. The switches above the charts choose the unit and count the source's training.`;
  }

  function drawDiagnostics() {
    const host = document.getElementById("diagnostics");
    host.replaceChildren();
    document.getElementById("symmetry").hidden = !arms.some((arm) => arm.runs.some((run) => Object.keys(data.words).some((key) => run.diagnostics[key])));
    const wanted = [];
    for (const [key, title] of Object.entries(data.words)) {
      const lines = visible().flatMap((arm) => armLines(arm, arm.runs.filter((run) => run.diagnostics[key]).map((run) => run.diagnostics.step.map((step, index) => [step, run.diagnostics[key][index]]))));
      if (!lines.length) continue;
      wanted.push([make(make(host, "figure"), "div", { class: "chart" }), lines, title[0].toUpperCase() + title.slice(1)]);
    }
    // Drawn when all are there, since each takes its width from the grid.
    for (const [box, lines, title] of wanted) chart(box, { lines, x: String, y: (value) => figures(value, 4), xlabel: "step", title, height: 240 });
  }

  // One row an arm, best first: a dot with the source's training not counted, a ring with it counted.
  function drawSpeedups({ unit }) {
    const host = document.getElementById("speedup");
    host.replaceChildren();
    const rows = arms.slice(1).map((arm) => ({ arm, found: ["sunk", "charged"].map((accounting) => find(arm.estimates, { unit, accounting })) }));
    document.getElementById("speedup-figure").hidden = !rows.length;
    if (!rows.length) return;
    for (const row of rows)
      if (row.found[0].cost === row.found[1].cost && row.found[0].baseline_cost === row.found[1].baseline_cost) row.found.pop();
    const width = Math.max(host.clientWidth, 240), narrow = width < 560;
    const height = narrow ? 58 : 38, top = 24, bottom = top + height * rows.length;
    const longest = Math.max(...rows.map(({ arm }) => arm.name.length));
    const left = narrow ? 8 : Math.min(width * 0.3, 7.2 * longest + 12), right = width - (narrow ? 118 : 132);
    const finite = rows.flatMap(({ found }) => found.flatMap((e) => [e.speedup, ...(e.speedup_interval || [])])).filter((value) => known(value) && value > 0);
    const most = Math.max(...rows.flatMap(({ found }) => found.map((e) => e.speedup)).filter(known), 1);
    const low = Math.max(Math.min(...finite, 0.9), most / 100), high = Math.min(Math.max(...finite, 1.1), 3 * most);
    const px = (x) => left + 6 + (Math.log(Math.min(Math.max(x, low), high) / low) / Math.log(high / low)) * (right - left - 12);
    const svg = make(host, "svg", { viewBox: `0 0 ${width} ${bottom + 24}`, role: "img", "aria-label": "Speedup of every arm" });
    for (const x of ticks(low, high, true, narrow ? 3 : 6)) {
      make(svg, "line", { x1: px(x), x2: px(x), y1: top - 6, y2: bottom, class: "rule" });
      make(svg, "text", { x: px(x), y: bottom + 16, "text-anchor": "middle" }, `${figures(x)}x`);
    }
    make(svg, "line", { x1: px(1), x2: px(1), y1: top - 6, y2: bottom, class: "goal" });
    make(svg, "text", { x: px(1), y: 12, "text-anchor": "middle" }, data.baseline);
    const value = (e) => {
      if (e.at_target_from_the_start) return "before training";
      if (!known(e.speedup)) return "unknown";
      const ends = e.speedup_interval && e.speedup_interval.every(known) ? ` [${e.speedup_interval.map((end) => end.toFixed(2)).join(", ")}]` : "";
      return `${e.censored ? "< " : e.upper_bound ? "> " : ""}${e.speedup.toFixed(2)}x${e.shared_machine ? " ‡" : ""}${ends}`;
    };
    rows.forEach(({ arm, found }, index) => {
      const start = top + height * index, line = narrow ? start + 17 : start;
      const name = paint(make(svg, "text", { x: narrow ? 2 : left - 4, y: narrow ? start + 13 : start + (found.length > 1 ? 22 : 18), "text-anchor": narrow ? "start" : "end", class: "name" }, arm.name), arm.place);
      if (!narrow) while (name.textContent.length > 4 && name.getComputedTextLength() > left - 8) name.textContent = `${name.textContent.slice(0, -2)}…`;
      found.forEach((e, row) => {
        const y = line + 12 + 16 * row, group = paint(make(svg, "g", { class: row ? "charged" : "sunk" }), arm.place);
        make(svg, "text", { x: right + 8, y: y + 4, class: row ? "" : "name" }, value(e));
        if (!known(e.speedup)) return;
        const [from, to] = e.speedup_interval || [];
        if (known(from)) make(group, "line", { x1: px(from), x2: px(known(to) ? to : high), y1: y, y2: y, class: "whisker" });
        const x = px(e.speedup), turn = e.upper_bound ? 1 : -1;
        if (e.censored || e.upper_bound) make(group, "polygon", { points: `${x - 4 * turn},${y - 5} ${x - 4 * turn},${y + 5} ${x + 5 * turn},${y}`, class: "mark" });
        else make(group, "circle", { cx: x, cy: y, r: 4.5, class: row ? "mark" : "mark solid" });
      });
    });
    const intervals = rows.some(({ found }) => found.some((e) => e.speedup_interval));
    const sentences = ["Dots: the source's training is not counted (sunk).", "Rings: it is counted (charged)."];
    const none = data.intervals.startsWith("There are no") ? data.intervals : "There are no intervals in this unit.";
    sentences.push(intervals ? `Lines: ${data.intervals}` : none);
    if (rows.some(({ found }) => found.some((e) => e.censored || e.upper_bound))) sentences.push("Triangles: bounds.");
    if (arms.some((arm) => arm.lr_edge)) sentences.push("†: the best learning rate lies at the edge of those tried, so a better one may exist.");
    if (rows.some(({ found }) => found.some((e) => e.shared_machine))) sentences.push("‡: other runs shared the machine, so these seconds have no interval.");
    document.getElementById("speedup-caption").textContent = sentences.join(" ");
  }

  function drawKeys() {
    for (const key of document.querySelectorAll(".key")) {
      key.replaceChildren();
      for (const arm of visible().filter((arm) => arm.place || !key.classList.contains("grown"))) paint(make(key, "span", {}, arm.name), arm.place);
    }
  }

  function draw() {
    const options = chosen();
    drawSpeedups(options);
    drawKeys();
    drawLoss(options);
    drawBudgets(options);
    drawFrontier(options);
    drawAges(options);
    drawDiagnostics();
  }

  for (const unit of data.units) {
    const label = make(make(document.getElementById("units"), "label"), "input", { type: "radio", name: "unit", value: unit });
    label.checked = unit === data.units[0];
    label.parentNode.append(unit === "flops" ? "FLOPs" : unit);
  }
  const legend = document.getElementById("legend");
  const buttons = arms.map((arm) => {
    const button = paint(make(legend, "button", { type: "button", class: "arm" }, arm.name), arm.place);
    button.addEventListener("click", () => {
      if (!hidden.delete(arm.place)) hidden.add(arm.place);
      press();
      draw();
    });
    return [arm, button];
  });
  const press = () => {
    for (const [arm, button] of buttons) button.setAttribute("aria-pressed", String(!hidden.has(arm.place)));
    if (more) more.textContent = hidden.size ? "show all" : `show the best ${FIRST}`;
  };
  const more = arms.length > FIRST + 1 ? make(legend, "button", { type: "button", id: "more" }) : null;
  if (more)
    more.addEventListener("click", () => {
      const some = hidden.size === 0;
      hidden.clear();
      if (some) for (const arm of arms.slice(FIRST + 1)) hidden.add(arm.place);
      press();
      draw();
    });
  press();
  const names = new Set(arms.flatMap((arm) => arm.runs.flatMap((run) => Object.keys(run.sources))));
  for (const name of names) make(form.elements.loss, "option", { value: `s:${name}` }, `held-out, ${name}`);
  form.hidden = document.getElementById("curve-controls").hidden = false;
  for (const control of form.elements) control.addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => {
    const now = document.getElementById("loss").clientWidth;
    if (now !== width) { width = now; draw(); }
  }).observe(document.getElementById("charts"));
  draw();
  document.documentElement.dataset.ready = "yes";
})();
