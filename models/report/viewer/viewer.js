// Puts the page together from its data.

const MODEL = [
  "checkpoint", "model", "family", "commit", "method", "preset", "linears", "loras", "image", "fps",
];
const PASSES = ["dense", "sparse"];
const HEADINGS = {
  model: "Model", sampling: "Video", draft: "Draft attention", schedule: "Schedule",
  hardware: "Hardware", versions: "Versions",
};

function plain(value) {
  if (value === null) return "–";
  if (Array.isArray(value)) return value.length ? value.map(plain).join(", ") : "none";
  if (typeof value === "object") {
    return Object.entries(value).map(([key, each]) => `${key} ${plain(each)}`).join(", ");
  }
  return value === "" ? "–" : String(value);
}

function words(name) {
  return name.replaceAll("_", " ");
}

/** Says in one line what was made. */
function summaryOf(report) {
  const { sampling, date, draft, attention, model, family, step } = report;
  const last = report.sparse ?? report;
  const parts = [
    model ?? `${family} model`,
    `${sampling.width} × ${sampling.height} pixels`, `${sampling.frames} frames`,
    `${sampling.num_steps} steps`, `seed ${sampling.seed}`,
  ];
  if (last.stopped) parts.push(`stopped after ${last.timesteps.length} steps`);
  if (step !== undefined) parts.push(`looked at step ${step}`);
  if (attention !== "dense") parts.push(`${percent(draft.sparsity)} of tile pairs skipped`);
  if (date) parts.push(date.replace("T", " ").replace("+00:00", " UTC"));
  return parts.join(" · ");
}

/** Returns the main numbers of a run, each with its name. */
function figuresOf(report) {
  const figures = [];
  const add = (name, text) => figures.push([text, name]);
  const addShares = (pass) => {
    add("of token pairs computed", percent(pass.kept_share));
    // Not by the extra work itself: earlier reports call it otherwise.
    if (pass.work_share > pass.kept_share) {
      add("of dense attention's work, with means and exact rows", percent(pass.work_share));
    }
  };
  if ("psnr_db" in report) {
    add("PSNR, sparse against dense", decibels(report.psnr_db));
    add("SSIM", number(report.ssim, 3));
    if (report.speed_up_of_sparse_steps) {
      add("speed-up of sparse steps", `${number(report.speed_up_of_sparse_steps, 2)} ×`);
    }
    add("speed-up of all steps", `${number(report.speed_up_of_all_steps, 2)} ×`);
    addShares(report.sparse);
  } else if (report.time_ms_per_step) {
    add("for all steps", seconds(report.time_ms_all_steps));
    add("for a step, median", seconds(report.time_ms_median_step));
    addShares(report);
  }
  return figures;
}

function header(data, prefixes) {
  const several = data.runs.length > 1;
  const runs = data.runs.map(({ report }, index) => {
    const figures = figuresOf(report).map(([value, name]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    return make(
      "div", { class: "run" },
      make(
        several ? "h2" : "h1", { class: report.prompt.length > 140 ? "long" : null },
        prefixes[index] + (report.prompt || "(no prompt)"),
      ),
      make("p", { class: "summary" }, summaryOf(report)),
      figures.length ? make("dl", { class: "figures" }, ...figures) : null,
    );
  });
  const title = several ? [make("h1", {}, "Two runs side by side")] : [];
  return make("header", {}, ...title, make("div", { class: "columns" }, ...runs));
}

function command(report, label) {
  if (!report.command) return null;
  const text = make("code", { tabindex: 0 }, report.command);
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text); // for browsers that forbid what follows
    try {
      await navigator.clipboard.writeText(report.command);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
  });
  return make(
    "div", { class: "command" }, make("h3", {}, label),
    make("div", {}, make("pre", {}, text), button),
  );
}

/** Returns settings as rows: a name, and what it is in each run. */
function settingsTable(name, reports) {
  const keys = [...new Set(reports.flatMap((report) => Object.keys(report[name] ?? {})))];
  const rows = keys.flatMap((key) => {
    const values = reports.map((report) => plain(report[name]?.[key] ?? null));
    if (values.every((value) => value === "–")) return [];
    const differ = values.some((value) => value !== values[0]);
    return make(
      "tr", { class: differ ? "differs" : null },
      make("th", { scope: "row" }, words(key)),
      ...values.map((value) => make("td", {}, value)),
    );
  });
  if (rows.length === 0) return null;
  return make("table", {}, make("caption", {}, HEADINGS[name] ?? words(name)), make("tbody", {}, ...rows));
}

function settings(data, prefixes) {
  const reports = data.runs.map(({ report }) => report);
  const model = reports.map((report) => ({
    model: Object.fromEntries(
      MODEL.filter((key) => key in report).map((key) => [key, report[key]]),
    ),
  }));
  const groups = new Set(Object.keys(HEADINGS).slice(1));
  for (const report of reports) {
    for (const [key, value] of Object.entries(report)) {
      const isGroup = value !== null && typeof value === "object" && !Array.isArray(value);
      if (isGroup && !PASSES.includes(key) && !MODEL.includes(key)) groups.add(key);
    }
  }
  const tables = [settingsTable("model", model)];
  for (const name of groups) tables.push(settingsTable(name, reports));
  return section(
    "settings", "Settings",
    ...reports.map((report, index) =>
      command(report, `${prefixes[index]}The command that makes it again`)),
    make("div", { class: "tables" }, ...tables.filter((table) => table !== null)),
  );
}

function build() {
  const data = readElement("report");
  const several = data.runs.length > 1;
  const prefixes = data.runs.map((_, index) => (several ? `${"AB"[index]}: ` : ""));
  const nameOf = (index) => {
    const { run, label } = data.videos[index];
    return prefixes[run] + label;
  };
  const page = document.getElementById("page");
  page.replaceChildren(header(data, prefixes));
  const parts = {};
  if (data.videos.length > 0) {
    parts.players = new Players(data, nameOf);
    page.append(parts.players.whole);
    addKeys(parts.players);
  }
  const steps = stepSection(data, prefixes);
  if (steps !== null) page.append(steps);
  parts.explorers = data.runs.flatMap(({ report }, index) => {
    const found = readElement(`explorer-${index}`);
    if (found === null) return [];
    const title = `${prefixes[index]}Where attention looks`;
    const work = (report.sparse ?? report).work_per_step ?? [];
    const explorer = new Explorer(found, work, title, `explorer-of-${index}`);
    page.append(explorer.whole);
    explorer.draw();
    return [explorer];
  });
  page.append(settings(data, prefixes));
  window.report = parts;
}

/** Space plays and pauses, the comma and the full stop go frame by frame. */
function addKeys(players) {
  const actions = {
    " ": () => players.toggle(),
    ",": () => { players.pause(); players.seek(players.frame - 1); },
    ".": () => { players.pause(); players.seek(players.frame + 1); },
  };
  document.addEventListener("keydown", (event) => {
    const own = event.target.closest("button, select, input, textarea, a, summary, canvas");
    if (own !== null || !(event.key in actions) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    actions[event.key]();
  });
}

build();
