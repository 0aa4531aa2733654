// One or two videos that play, pause and seek together, and how they differ.

const VIEWS = [
  ["sides", "Side by side"],
  ["wipe", "Slider"],
  ["difference", "Difference"],
];
const CURVE_HEIGHT = 96;
const CURVE_PAD = 8; // half the width of the timeline's thumb, so that both line up

class Players {
  /**
   * @param {object} report The page's data.
   * @param {(text: string) => string} nameOf Names the video of an index.
   */
  constructor(report, nameOf) {
    this.problem = make(
      "p", { role: "alert", hidden: true },
      "This browser cannot play a video of this page, which is H.264. The files beside the "
        + "page play elsewhere.",
    );
    this.report = report;
    this.nameOf = nameOf;
    this.frame = 0;
    this.videos = report.videos.map((_, index) => this.makeVideo(index));
    const alone = report.videos.map((_, index) => ({ left: index, right: null }));
    this.pairs = report.pairs.length > 0 ? report.pairs : alone;
    this.whole = this.build();
    this.showPair(0);
    this.setView("sides");
    onWidth(this.curve, (width) => this.drawCurve(width));
  }

  makeVideo(index) {
    const text = readElement(`video-${index}`);
    if (text === null) return null;
    const blob = new Blob([bytesOf(text)], { type: "video/mp4" });
    const video = make("video", {
      src: URL.createObjectURL(blob),
      preload: "auto",
      playsinline: true,
      "aria-label": this.nameOf(index),
    });
    video.muted = true;
    video.addEventListener("error", () => { this.problem.hidden = false; });
    video.addEventListener("ended", () => this.atEnd(video));
    video.addEventListener("loadedmetadata", () => this.seek(this.frame));
    return video;
  }

  build() {
    this.stage = make("div", { class: "stage" });
    this.wipe = make("input", {
      type: "range", min: 0, max: 100, value: 50, step: 0.5, id: "wipe",
      oninput: () => this.moveWipe(Number(this.wipe.value)),
    });
    this.wipeField = make(
      "div", { class: "field wide" },
      make("label", { for: "wipe" }, "Border between the two"), this.wipe,
    );
    this.stage.addEventListener("pointerdown", (event) => this.drag(event));
    this.stage.addEventListener("pointermove", (event) => this.drag(event));
    this.pairChoice = choice(
      "Videos", this.pairs.map((pair) => this.describePair(pair)),
      (index) => this.showPair(index),
    );
    this.note = make("p", { class: "note" });
    this.amplified = make("p", { class: "note" }, "Differences are four times as strong.");
    return section(
      "videos", "Video",
      make(
        "div", { class: "bar" },
        this.pairs.length > 1 ? this.pairChoice.whole : null, this.buildViews(),
      ),
      this.problem, this.stage, this.amplified, this.wipeField, this.buildControls(), this.buildCurve(), this.note,
    );
  }

  buildViews() {
    this.views = VIEWS.map(([value, text]) => {
      const input = make("input", {
        type: "radio", name: "view", value, id: `view-${value}`,
        checked: value === "sides", onchange: () => this.setView(value),
      });
      return make("label", { for: `view-${value}` }, input, make("span", {}, text));
    });
    this.viewField = make("fieldset", { class: "segments" });
    this.viewField.append(make("legend", {}, "View"), ...this.views);
    return this.viewField;
  }

  buildControls() {
    this.playButton = make("button", {
      type: "button", class: "primary", id: "play", onclick: () => this.toggle(),
    });
    const step = (by, text, name) => make(
      "button",
      { type: "button", "aria-label": name, title: name,
        onclick: () => { this.pause(); this.seek(this.frame + by); } },
      text,
    );
    this.timeline = make("input", {
      type: "range", min: 0, value: 0, step: 1, id: "timeline", "aria-label": "Frame",
      oninput: () => this.seek(Number(this.timeline.value)),
    });
    this.position = make("output", { for: "timeline", class: "position" });
    this.loop = make("input", { type: "checkbox", id: "loop", checked: true });
    this.speed = choice("Speed", ["0.25 ×", "0.5 ×", "1 ×", "2 ×"], () => this.setSpeed());
    this.speed.select.value = "2";
    this.showPlaying(false);
    return make(
      "div", { class: "player" },
      make(
        "div", { class: "bar" },
        this.playButton, step(-1, "‹", "Previous frame"), step(1, "›", "Next frame"),
        this.position,
        make("label", { class: "check", for: "loop" }, this.loop, "Repeat"),
        this.speed.whole,
      ),
      this.timeline,
    );
  }

  buildCurve() {
    this.curve = make("div", { class: "curve", id: "curve" });
    this.curve.addEventListener("pointerdown", (event) => {
      const { left, width } = this.curve.getBoundingClientRect();
      const share = (event.clientX - left - CURVE_PAD) / (width - 2 * CURVE_PAD);
      this.pause();
      this.seek(Math.round(share * (this.frames - 1)));
    });
    return this.curve;
  }

  describePair(pair) {
    const left = this.nameOf(pair.left);
    return pair.right === null ? left : `${left} | ${this.nameOf(pair.right)}`;
  }

  /** The videos on the stage that the page really has. */
  get shown() {
    const { left, right } = this.pair;
    const indices = right === null ? [left] : [left, right];
    return indices.map((index) => this.videos[index]).filter((video) => video !== null);
  }

  showPair(index) {
    if (this.pair) this.pause();
    this.pair = this.pairs[index];
    const { left, right } = this.pair;
    const indices = right === null ? [left] : [left, right];
    this.stage.replaceChildren(...indices.map((each) => this.figure(each)));
    this.handle = make("div", { class: "handle", "aria-hidden": "true" });
    this.stage.append(this.handle);
    const about = this.report.videos[left];
    this.frames = Math.min(...indices.map((each) => this.report.videos[each].frames));
    this.fps = about.fps;
    this.stage.style.setProperty("--ratio", `${about.size[0]} / ${about.size[1]}`);
    this.timeline.max = this.frames - 1;
    const two = this.shown.length === 2;
    const same = two && String(this.report.videos[right].size) === String(about.size);
    this.viewField.hidden = !two;
    for (const label of this.views.slice(1)) label.firstChild.disabled = !same;
    if (!same) this.setView("sides");
    this.setSpeed();
    this.seek(0);
    this.drawCurve(this.curve.clientWidth);
  }

  figure(index) {
    const about = this.report.videos[index];
    const name = make("figcaption", {}, this.nameOf(index));
    if (about.shown !== "whole") {
      const words = about.shown === "preview" ? "A preview. " : "Too large for this page. ";
      name.append(make("span", { class: "note" }, ` ${words}`));
      if (about.file !== null) {
        name.append(make("a", { href: encodeURIComponent(about.file) }, "The original"));
      }
    }
    const video = this.videos[index];
    return make("figure", {}, video ?? make("div", { class: "absent" }, "No video"), name);
  }

  setView(view) {
    this.stage.dataset.view = view;
    for (const label of this.views) label.firstChild.checked = label.firstChild.value === view;
    this.wipeField.hidden = view !== "wipe";
    this.amplified.hidden = view !== "difference";
    this.moveWipe(Number(this.wipe.value));
  }

  moveWipe(share) {
    this.wipe.value = share;
    this.wipe.setAttribute("aria-valuetext", `${Math.round(share)} % from the left`);
    this.stage.style.setProperty("--wipe", `${share}%`);
  }

  drag(event) {
    if (this.stage.dataset.view !== "wipe" || event.buttons !== 1) return;
    const { left, width } = this.shown[0].getBoundingClientRect();
    this.moveWipe(Math.min(100, Math.max(0, (100 * (event.clientX - left)) / width)));
  }

  get playing() {
    return this.shown.some((video) => !video.paused && !video.ended);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  async play() {
    if (this.frame >= this.frames - 1) this.seek(0);
    this.showPlaying(true);
    this.wanted = true;
    try {
      await Promise.all(this.shown.map((video) => video.play()));
    } catch (error) {
      if (error.name !== "AbortError") this.pause(); // a pause came first
    }
    this.follow();
  }

  pause() {
    this.wanted = false;
    for (const video of this.shown) video.pause();
    this.showPlaying(false);
    if (this.shown.length > 0) this.seek(this.frame); // both on the same frame
  }

  showPlaying(playing) {
    this.playButton.textContent = playing ? "Pause" : "Play";
    this.playButton.setAttribute("aria-pressed", String(playing));
  }

  atEnd(video) {
    if (!this.wanted || video !== this.shown[0]) return;
    if (this.loop.checked) {
      this.seek(0);
      this.play();
    } else {
      this.pause();
      this.seek(this.frames - 1);
    }
  }

  setSpeed() {
    const rate = [0.25, 0.5, 1, 2][Number(this.speed.select.value)];
    for (const video of this.shown) video.playbackRate = rate;
  }

  /** Frames each second; a report of an early version does not say them. */
  rate() {
    const [first] = this.shown;
    const measured = first && first.duration > 0 ? this.frames / first.duration : 12;
    return this.fps ?? measured;
  }

  seek(frame) {
    if (!this.pair) return;
    this.frame = Math.min(this.frames - 1, Math.max(0, frame));
    for (const video of this.shown) {
      if (video.readyState > 0) video.currentTime = (this.frame + 0.5) / this.rate();
    }
    this.showPosition();
  }

  /** Shows the frame that plays, and keeps the second video on it. */
  follow() {
    if (!this.playing) return;
    const [first, second] = this.shown;
    this.frame = Math.min(this.frames - 1, Math.floor(first.currentTime * this.rate()));
    if (second && Math.abs(second.currentTime - first.currentTime) > 1 / this.rate()) {
      second.currentTime = first.currentTime;
    }
    this.showPosition();
    requestAnimationFrame(() => this.follow());
  }

  showPosition() {
    const values = this.pair.psnr_db_per_frame;
    const text = `frame ${this.frame + 1} of ${this.frames}`;
    const difference = values ? `, PSNR ${decibels(values[this.frame])}` : "";
    this.timeline.value = this.frame;
    this.timeline.setAttribute("aria-valuetext", text + difference);
    this.position.textContent = text + difference;
    if (this.cursor) {
      const x = this.x(this.frame);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
    }
  }

  x(frame) {
    return CURVE_PAD + (frame / Math.max(1, this.frames - 1)) * (this.width - 2 * CURVE_PAD);
  }

  drawCurve(width) {
    const { psnr_db_per_frame: values, note, of } = this.pair;
    this.curve.hidden = !values;
    this.note.textContent = note ?? (values
      ? `PSNR of each frame, right against left, ${of}. Click the curve to go to a frame.`
      : "");
    this.cursor = null;
    if (!values || width === 0) return;
    this.width = width;
    const known = values.filter((value) => value !== null);
    const low = Math.min(...known), high = Math.max(...known);
    const [bottom, top] = high - low < 1 ? [low - 0.5, low + 1] : [low, high];
    const inner = CURVE_HEIGHT - 34;
    const y = (value) => value === null
      ? 12 : 16 + inner * (1 - (value - bottom) / (top - bottom));
    const points = values.map((value, frame) => `${this.x(frame)},${y(value)}`);
    this.cursor = draw("line", { y1: 0, y2: CURVE_HEIGHT, class: "cursor" });
    const label = (text, where) => draw("text", { x: CURVE_PAD, y: where }, text);
    const picture = draw(
      "svg",
      { width, height: CURVE_HEIGHT, role: "img",
        "aria-label": known.length === 0 ? "PSNR: all frames are equal"
          : `PSNR by frame, from ${decibels(low)} to ${decibels(high)}` },
      draw("polyline", { points: points.join(" "), class: "line" }),
      ...values.map((value, frame) => draw("circle", {
        cx: this.x(frame), cy: y(value), r: values.length > 60 ? 1 : 2.5, class: "dot",
      })),
      known.length ? label(decibels(high), 11) : label("equal", 11),
      known.length ? label(decibels(low), CURVE_HEIGHT - 3) : null,
      this.cursor,
    );
    this.curve.replaceChildren(picture);
    this.showPosition();
  }
}
