"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const many = data.runs.length > 1;
  const byId = (id) => document.getElementById(id);
  const state = {
    axis: "x", smooth: 0, marks: !many, hidden: new Set(), logs: new Set(),
  };
  const charts = [];
  const canHover = matchMedia("(hover: hover)").matches;
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash"];
  const phases = ["train", "val", "test"];

  // ---------------------------------------------------------------- light and dark

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let chosenTheme = null;
  function applyTheme(theme) {
    root.dataset.theme = theme;
    charts.forEach((chart) => chart.drawn && draw(chart));
  }
  const themeNow = () => chosenTheme || (prefersDark.matches ? "dark" : "light");
  prefersDark.addEventListener("change", () => applyTheme(themeNow()));
  byId("theme").addEventListener("click", () => {
    chosenTheme = themeNow() === "dark" ? "light" : "dark";
    applyTheme(chosenTheme);
  });
  root.dataset.theme = themeNow();
  const color = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const faded = (hex, alpha) =>
    hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

  // ---------------------------------------------------------------- what is drawn

  const longest = Math.max(0, ...data.charts.flatMap((chart) =>
    chart.lines.flatMap((line) => (line.t && line.t.length ? line.t[line.t.length - 1] : 0))));
  const [unit, unitSeconds] =
    longest < 300 ? ["seconds", 1] : longest < 3 * 3600 ? ["minutes", 60] :
    longest < 72 * 3600 ? ["hours", 3600] : ["days", 86400];
  const along = (points) =>
    state.axis === "x" ? points.x : points.t.map((t) => t === null ? null : t / unitSeconds);
  const alongMark = (mark) => state.axis === "x" ? mark.x : mark.t / unitSeconds;
  const isPlaced = (points) => state.axis === "x" || points.t !== null;

  /** On the clock nothing is drawn from one start of a run to the next. */
  function broken(x, y, points, run, chart) {
    const isWhole = chart.kind === "measured" || !run.restarts.length;
    if (state.axis === "x" || isWhole) return { x, y };
    const found = { x: [], y: [] };
    let next = 0;
    points.x.forEach((step, index) => {
      const before = next;
      while (next < run.restarts.length && step > run.restarts[next].x) next += 1;
      if (index && next > before) { found.x.push(x[index]); found.y.push(null); }
      found.x.push(x[index]);
      found.y.push(y[index]);
    });
    return found;
  }

  /** Exponential mean that starts unbiased; a gap stays a gap. */
  function smoothed(values, weight) {
    let sum = 0, norm = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return sum / norm;
    });
  }

  function lineColor(chart, line, index) {
    if (many) return color("run" + (line.run % 8));
    const phase = phases.indexOf(line.part);
    return color("run" + ((phase >= 0 ? phase : index) % 8));
  }

  function label(chart, line) {
    const part = chart.lines.some((other) => other.part !== line.part) ? line.part : null;
    if (many) return data.runs[line.run].label + (part ? " " + part : "");
    return part || line.name;
  }

  function tracesOf(chart, line, index) {
    const parts = [...new Set(chart.lines.map((one) => one.part))];
    const ink = lineColor(chart, line, index);
    const isVal = line.part === "val" || line.part === "test";
    const run = data.runs[line.run];
    const few = line.y.length <= 60;
    const style = {
      color: ink,
      width: isVal ? 2.4 : 1.5,
      dash: many && !parts.some((part) => phases.includes(part)) ?
        dashes[parts.indexOf(line.part) % dashes.length] : "solid",
    };
    const raw = {
      type: "scatter", mode: few ? "lines+markers" : "lines", ...broken(along(line), line.y, line, run, chart),
      name: label(chart, line), line: style, marker: { size: isVal ? 6 : 4, color: ink },
      opacity: many && parts.length > 1 && line.part === "train" ? 0.55 : 1,
      connectgaps: false, showlegend: !many && chart.lines.length > 1, hovertemplate: "%{y:.6~g}",
    };
    if (!state.smooth || line.y.length < 3) return [raw];
    const source = line.means || line;
    const smooth = {
      ...raw, ...broken(along(source), smoothed(source.y, state.smooth), source, run, chart), mode: "lines", opacity: 1,
      line: { ...style, width: style.width + 0.6 },
    };
    return [
      { ...raw, mode: "lines", opacity: 0.22, showlegend: false, hoverinfo: "skip", hovertemplate: null },
      smooth,
    ];
  }

  /** With a colour a run, what the lines of each run are is told once for all. */
  function keysOf(chart) {
    const parts = [...new Set(chart.lines.map((one) => one.part))];
    if (!many || parts.length < 2) return [];
    return parts.map((part) => {
      const line = chart.lines.find((one) => one.part === part);
      const [like] = tracesOf(chart, line, 0);
      return { ...like, x: [null], y: [null], name: part, showlegend: true, hoverinfo: "skip",
        hovertemplate: null, opacity: part === "train" ? 0.55 : 1,
        line: { ...like.line, color: color("text") }, marker: { ...like.marker, color: color("text") } };
    });
  }

  /** Marks lie on an axis of their own: 0 is the bottom of the chart, 1 the top. */
  function marksOf(chart) {
    if (!state.marks) return [];
    const traces = [];
    data.runs.forEach((run, index) => {
      if (state.hidden.has(index)) return;
      const ink = many ? color("run" + (index % 8)) : color("quiet");
      const add = (marks, y, symbol, size, own) => {
        const placed = marks.filter((mark) => state.axis === "x" || mark.t !== null);
        if (placed.length) traces.push({
          type: "scatter", mode: "markers", yaxis: "y2", showlegend: false, cliponaxis: false,
          x: placed.map(alongMark), y: placed.map(() => y), text: placed.map((mark) =>
            (many ? run.label + ": " : "") + mark.text),
          name: "", hovertemplate: "%{text}<extra></extra>",
          marker: { symbol, size, color: own || ink, line: { width: 1, color: color("card") } },
        });
      };
      const isBest = (mark) => mark.kinds.includes("best");
      add(run.checkpoints.filter((mark) => !isBest(mark)), 0, "triangle-up", 9);
      add(run.checkpoints.filter(isBest), 0, "star", 12, many ? null : color("run4"));
      add(run.restarts, 1, "triangle-down", 9, many ? null : color("lost"));
      const best = run.best;
      if (best && chart.lines.some((line) => line.name === best.metric) &&
          (state.axis === "x" || best.t !== null)) traces.push({
        type: "scatter", mode: "markers", showlegend: false, x: [alongMark(best)], y: [best.y],
        name: "", text: [(many ? run.label + ": " : "") + best.text],
        hovertemplate: "%{text}<extra></extra>",
        marker: { symbol: "circle-open", size: 13, color: ink, line: { width: 2 } },
      });
    });
    return traces;
  }

  function shapesOf() {
    if (!state.marks) return [];
    const shapes = [];
    data.runs.forEach((run, index) => {
      if (state.hidden.has(index)) return;
      const ink = many ? color("run" + (index % 8)) : color("lost");
      run.restarts.forEach((mark) => {
        if (state.axis === "t" && mark.t === null) return;
        const x = alongMark(mark);
        shapes.push({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1,
          layer: "below", line: { color: faded(ink, 0.7), width: 1, dash: "dot" } });
      });
      if (!many && state.axis === "t") run.bands.forEach(([from, to, kind]) => {
        shapes.push({ type: "rect", xref: "x", yref: "paper", layer: "below",
          x0: from / unitSeconds, x1: to / unitSeconds, y0: 0, y1: 1,
          line: { width: 0 }, fillcolor: faded(color(kind), kind === "down" ? 0.35 : 0.22) });
      });
    });
    return shapes.slice(0, 400);
  }

  function layoutOf(chart) {
    const grid = { gridcolor: color("line"), linecolor: color("line"), zerolinecolor: color("line") };
    return {
      margin: { l: 56, r: 14, t: 8, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      hovermode: "x unified",
      hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
      xaxis: { ...grid, rangemode: "nonnegative",
        title: { text: state.axis === "x" ? "optimizer steps" : unit, standoff: 6 },
        automargin: true, hoverformat: state.axis === "x" ? ",d" : ".3~f" },
      yaxis: { ...grid, type: state.logs.has(chart) ? "log" : "linear", automargin: true,
        exponentformat: "power", minorloglabels: "complete", nticks: 7,
        tickformat: state.logs.has(chart) ? "~g" : "" },
      yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11.5 } },
      showlegend: true, uirevision: state.axis + state.logs.has(chart), shapes: shapesOf(),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("quiet"), activecolor: color("accent") },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    };
  }

  function draw(chart) {
    const lines = chart.lines.filter((line) => !state.hidden.has(line.run) && isPlaced(line));
    const traces = lines.flatMap((line) => tracesOf(chart, line, chart.lines.indexOf(line)));
    chart.drawn = true;
    return Plotly.react(chart.plot, [...keysOf(chart), ...traces, ...marksOf(chart)], layoutOf(chart), {
      responsive: true, displaylogo: false, displayModeBar: canHover ? "hover" : false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "png", scale: 3, filename: chart.title.replaceAll("/", "-") },
    });
  }

  const redraw = () => charts.forEach((chart) => chart.drawn && draw(chart));
  const drawAll = () => charts.forEach((chart) => chart.drawn || draw(chart));

  // ---------------------------------------------------------------- the page

  function button(text, title, isPressed) {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "own";
    made.textContent = text;
    made.title = title;
    made.setAttribute("aria-pressed", String(isPressed));
    return made;
  }

  function addChart(chart) {
    const box = document.createElement("div");
    const head = document.createElement("div");
    const title = document.createElement("h3");
    box.className = "chart";
    title.textContent = chart.title.replaceAll("_", " ");
    chart.logButton = button("log", "logarithmic scale", false);
    chart.logButton.addEventListener("click", () => setLog(chart, !state.logs.has(chart)));
    const whole = button("⤢", "whole width", false);
    whole.addEventListener("click", () => {
      whole.setAttribute("aria-pressed", String(box.classList.toggle("whole")));
      draw(chart).then(() => Plotly.Plots.resize(chart.plot));
    });
    chart.plot = document.createElement("div");
    chart.plot.className = "plot";
    head.append(title, chart.logButton, whole);
    box.append(head, chart.plot);
    chart.box = box;
    byId("charts").append(box);
    charts.push(chart);
  }

  function setLog(chart, isLog) {
    isLog ? state.logs.add(chart) : state.logs.delete(chart);
    chart.logButton.setAttribute("aria-pressed", String(isLog));
    if (chart.drawn) draw(chart);
  }

  function addLegend() {
    if (!many) return;
    data.runs.forEach((run, index) => {
      const made = button("", "show or hide this run", true);
      made.className = "key";
      const dot = document.createElement("i");
      dot.className = "run run" + (index % 8);
      made.append(dot, run.label);
      made.addEventListener("click", () => {
        state.hidden.has(index) ? state.hidden.delete(index) : state.hidden.add(index);
        made.setAttribute("aria-pressed", String(!state.hidden.has(index)));
        redraw();
      });
      byId("legend").append(made);
    });
  }

  function addTools() {
    const axes = [...byId("axis").children];
    axes[1].disabled = !longest;
    if (!longest) axes[1].title = "no timeline.jsonl tells when steps were done";
    axes.forEach((one) => one.addEventListener("click", () => {
      state.axis = one.dataset.axis;
      axes.forEach((other) => other.setAttribute("aria-pressed", String(other === one)));
      redraw();
    }));
    byId("smooth").addEventListener("input", (event) => {
      state.smooth = Number(event.target.value);
      byId("smoothed").value = state.smooth || "0";
      redraw();
    });
    byId("log").addEventListener("change", (event) =>
      charts.forEach((chart) => setLog(chart, event.target.checked)));
    byId("marks").checked = state.marks;
    byId("marks").addEventListener("change", (event) => {
      state.marks = event.target.checked;
      redraw();
    });
    byId("find").addEventListener("input", (event) => {
      const word = event.target.value.toLowerCase();
      charts.forEach((chart) => {
        chart.box.hidden = !chart.lines.some((line) => line.name.toLowerCase().includes(word));
      });
    });
  }

  /** Charts are drawn when they come near: a run may have hundreds. */
  function drawWhenSeen() {
    const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
      if (!entry.isIntersecting) return;
      seen.unobserve(entry.target);
      const chart = charts.find((one) => one.box === entry.target);
      if (!chart.drawn) draw(chart);
    }), { rootMargin: "600px" });
    charts.forEach((chart) => seen.observe(chart.box));
    addEventListener("beforeprint", () => { applyTheme("light"); drawAll(); });
    addEventListener("afterprint", () => applyTheme(themeNow()));
  }

  function addSearch() {
    const search = byId("search");
    if (search) search.addEventListener("input", () => {
      const word = search.value.toLowerCase();
      document.querySelectorAll("#config .option").forEach((one) => {
        one.hidden = !one.dataset.find.includes(word);
      });
      document.querySelectorAll("#config details").forEach((one) => {
        one.hidden = Boolean(word) && !one.querySelector(".option:not([hidden])");
        if (word && !one.hidden) one.open = true;
      });
    });
  }

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(byId("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  addSearch();
  if (!byId("charts")) return;
  data.charts.forEach(addChart);
  addLegend();
  addTools();
  loadPlotly().then(drawWhenSeen).catch((error) => {
    byId("charts").textContent =
      `The curves cannot be drawn: ${error}. They need a browser of 2023 or later.`;
  }).finally(() => { root.dataset.ready = "true"; });
})();
