// Times and kept shares of each step, as charts and as a table.

const CHART_HEIGHT = 170;
const MARGIN = { left: 44, right: 8, top: 10, bottom: 34 };

/** Returns the passes of all runs that have times, with a name for each. */
function seriesOf(report, prefixes) {
  return report.runs.flatMap(({ report: run }, index) => {
    const passes = [["Dense", run.dense], ["Sparse", run.sparse]];
    const found = passes.filter(([, pass]) => pass && pass.time_ms_per_step);
    if (run.time_ms_per_step) {
      found.push([run.attention === "dense" ? "Dense" : "Sparse", run]);
    }
    return found.map(([name, pass]) => {
      const kinds = pass.work_per_step ?? [];
      const work = pass.time_ms_per_step.map((_, step) =>
        (kinds[step] === "skipped" ? ", skipped by a cache" : ""));
      return { name: prefixes[index] + name, pass, work };
    });
  });
}

function meanOf(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** A chart of bars, one group for each step and one bar for each series. */
class StepChart {
  constructor(title, unit, series, format) {
    Object.assign(this, { title, unit, series, format });
    this.box = make("div", { class: "chart" });
    this.whole = make("figure", {}, make("figcaption", {}, `${title}, ${unit}`), this.box);
    onWidth(this.box, (width) => this.draw(width));
  }

  draw(width) {
    const steps = Math.max(...this.series.map(({ values }) => values.length));
    const most = Math.max(...this.series.flatMap(({ values }) => values), 1e-9);
    const inner = width - MARGIN.left - MARGIN.right;
    const height = CHART_HEIGHT - MARGIN.top - MARGIN.bottom;
    const y = (value) => MARGIN.top + height * (1 - value / most);
    const group = inner / steps;
    const bar = (0.8 * group) / this.series.length;
    const x = (step, index) => MARGIN.left + group * step + 0.1 * group + bar * index;
    const bars = this.series.flatMap(({ name, values, work }, index) =>
      values.map((value, step) => draw(
        "rect",
        { x: x(step, index), y: y(value), width: Math.max(0.5, bar - (bar > 4 ? 1 : 0)),
          height: MARGIN.top + height - y(value), class: `series-${index}` },
        draw("title", {}, `${name}, step ${step}: ${this.format(value)}${work[step]}`),
      )));
    const lines = [0, most / 2, most].flatMap((value) => [
      draw("line", {
        x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value), class: "grid",
      }),
      draw("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" },
        this.format(value)),
    ]);
    const every = Math.ceil(steps / Math.max(1, Math.floor(inner / 34)));
    const labels = Array.from({ length: Math.ceil(steps / every) }, (_, index) => draw(
      "text",
      { x: MARGIN.left + group * (index * every + 0.5), y: CHART_HEIGHT - 18,
        "text-anchor": "middle" },
      String(index * every),
    ));
    const name = draw("text", {
      x: MARGIN.left + inner / 2, y: CHART_HEIGHT - 2, "text-anchor": "middle",
    }, "step");
    this.box.replaceChildren(draw(
      "svg",
      { width, height: CHART_HEIGHT, role: "img",
        "aria-label": `${this.title} of each step; the table below has the numbers` },
      ...lines, ...bars, ...labels, name,
    ));
  }
}

/** Returns the section on steps, or null if the report has no times. */
function stepSection(report, prefixes) {
  const series = seriesOf(report, prefixes);
  if (series.length === 0) return null;
  const keptOf = (pass) => pass.kept_share_per_step_and_layer.map(meanOf);
  const legend = make("ul", { class: "legend" }, ...series.map(({ name }, index) =>
    make("li", {}, make("span", { class: `swatch series-${index}` }), name)));
  const times = new StepChart(
    "Time", "s",
    series.map(({ name, pass, work }) => ({
      name, work, values: pass.time_ms_per_step.map((value) => value / 1000),
    })),
    (value) => (value === 0 ? "0" : number(value, value < 10 ? 2 : 0)),
  );
  const kept = new StepChart(
    "Kept share of token pairs", "%",
    series.map(({ name, pass, work }) => ({
      name, work, values: keptOf(pass).map((value) => 100 * value),
    })),
    (value) => number(value, 0),
  );
  return section(
    "steps", "Steps", legend,
    make("div", { class: "columns" }, times.whole, kept.whole), stepTable(series, keptOf),
  );
}

function stepTable(series, keptOf) {
  const head = make("tr", {}, make("th", { scope: "col" }, "Step"),
    make("th", { scope: "col" }, "Timestep"),
    ...series.flatMap(({ name }) => [
      make("th", { scope: "col" }, `${name}: time`),
      make("th", { scope: "col" }, `${name}: kept`),
    ]));
  const longest = series.reduce((best, { pass }) =>
    (pass.timesteps.length > best.length ? pass.timesteps : best), []);
  const kept = series.map(({ pass }) => keptOf(pass));
  const rows = longest.map((timestep, step) => make(
    "tr", {}, make("th", { scope: "row" }, String(step)),
    make("td", {}, number(timestep, 0)),
    ...series.flatMap(({ pass, work }, index) => {
      const time = pass.time_ms_per_step[step];
      return [
        make("td", {}, time === undefined ? "–" : seconds(time)),
        make("td", {}, time === undefined ? "–" : percent(kept[index][step], 1) + work[step]),
      ];
    }),
  ));
  const total = (name, valueOf) => make(
    "tr", { class: "total" }, make("th", { scope: "row", colspan: 2 }, name),
    ...series.flatMap(({ pass }) => valueOf(pass).map((text) => make("td", {}, text))),
  );
  return make(
    "details", {}, make("summary", {}, "All numbers"),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Numbers of each step" },
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows,
        total("All steps", (pass) => [seconds(pass.time_ms_all_steps),
          percent(pass.kept_share, 1)]),
        total("To compile", (pass) => [seconds(pass.compile_ms), ""]),
        total("To decode", (pass) => [seconds(pass.decode_ms), ""])))),
  );
}
