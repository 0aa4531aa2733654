// Draft maps and masks, and the tiles that a chosen tile attends to.

const MAGMA = [
  [0, 0, 4], [40, 17, 89], [113, 31, 129], [183, 55, 121], [241, 96, 93], [254, 176, 120],
  [252, 253, 191],
];
const FRAME_WIDTH = 200; // CSS pixels that a frame has at least, where there is room

/** Returns red, green and blue of a share in [0, 1]. */
function magma(share) {
  const place = share * (MAGMA.length - 1);
  const index = Math.min(MAGMA.length - 2, Math.floor(place));
  const part = place - index;
  return MAGMA[index].map((low, c) => Math.round(low + part * (MAGMA[index + 1][c] - low)));
}

class Explorer {
  /**
   * @param {object} data From the element of a run's explorer.
   * @param {string[]} work How each step of the run was computed.
   */
  constructor(data, work, title, id) {
    this.data = data;
    this.work = work;
    this.levels = bytesOf(data.levels);
    this.bits = bytesOf(data.masks);
    const [rows, columns] = data.grid.tiles;
    this.perFrame = rows * columns;
    this.tiles = data.grid.frames * this.perFrame;
    this.rowBytes = Math.ceil(this.tiles / 8);
    // A frame of its own, such as a reference image, stands before those of the video.
    this.unpictured = data.frames.length ? data.grid.frames - data.frames.length : 0;
    this.query = Math.floor(data.grid.frames / 2) * this.perFrame
      + Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    this.chosen = { look: 0, layer: 0, head: 0 };
    this.images = {};
    this.whole = this.build(title, id);
    this.pictures = data.frames.map((text) => {
      const picture = new Image();
      picture.onload = () => this.drawFrames();
      picture.src = `data:image/jpeg;base64,${text}`;
      return picture;
    });
    onWidth(this.frames, () => this.drawFrames());
    onWidth(this.maps[0].box, () => this.drawMaps());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  build(title, id) {
    const { data } = this;
    const names = {
      look: data.looks.map(({ step, timestep }) => `${step} (timestep ${number(timestep, 0)})`),
      layer: data.layers.map(String),
      head: data.heads.map(String),
    };
    const label = { look: "Step", layer: "Layer", head: "Head" };
    const choices = Object.keys(names).map((key) => choice(label[key], names[key], (index) => {
      this.chosen[key] = index;
      this.draw();
    }));
    this.strip = make("canvas", {
      tabindex: 0, role: "application", class: "strip",
      "aria-label": "Frames and their tiles. Arrow keys choose a tile, "
        + "Page Up and Page Down the frame.",
      onpointerdown: (event) => this.pickInFrames(event),
      onkeydown: (event) => this.pickByKey(event),
    });
    this.frames = make("div", {}, this.strip);
    this.maps = [["Draft map", "draft"], ["Mask", "mask"]].map(([name, kind]) => {
      const canvas = make("canvas", {
        role: "img", class: "map", onpointerdown: (event) => this.pickInMap(event),
      });
      const square = make("div", { class: "square" }, canvas);
      return { name, kind, canvas, box: square };
    });
    this.said = make("p", { class: "said", "aria-live": "polite" });
    const figures = this.maps.map(({ name, box: square }) =>
      make("figure", { class: "panel" }, make("figcaption", {}, name), square));
    return section(
      id, title,
      make("div", { class: "bar" }, ...choices.map(({ whole }) => whole)),
      this.said,
      make(
        "div", { class: "explorer" },
        make(
          "figure", { class: "panel" },
          make("figcaption", {}, "Click a tile to see what it attends to"),
          this.frames,
          this.buildKey(),
        ),
        make("div", { class: "maps" }, ...figures),
      ),
      make("p", { class: "note" }, this.notes()),
    );
  }

  buildKey() {
    const item = (kind, text) =>
      make("li", {}, make("span", { class: `swatch ${kind}` }), text);
    return make(
      "ul", { class: "legend" }, item("query", "chosen tile"),
      item("kept", "attended to, brighter where the draft is stronger"),
      item("skipped", "skipped"),
    );
  }

  notes() {
    const { data } = this;
    const decades = "Colours of draft maps are logarithmic, from a map's least score to its "
      + `largest; below it ${data.decades} decades are told apart.`;
    const text = data.grid.text > 0 ? "All tiles attend to the text, too." : "";
    const time = data.time_ms > 0
      ? `Recording took ${seconds(data.time_ms)}, which no step's time has in it.` : "";
    return [data.left_out, decades, text, time].filter(Boolean).join(" ");
  }

  /** Index of the chosen map among all maps. */
  get map() {
    const { look, layer, head } = this.chosen;
    return (look * this.data.layers.length + layer) * this.data.heads.length + head;
  }

  level(query, key) {
    return this.levels[(this.map * this.tiles + query) * this.tiles + key];
  }

  isKept(query, key) {
    const byte = this.bits[(this.map * this.tiles + query) * this.rowBytes + (key >> 3)];
    return ((byte >> (7 - (key & 7))) & 1) === 1;
  }

  get peak() {
    const { look, layer, head } = this.chosen;
    return this.data.peaks[look][layer][head];
  }

  score(level) {
    return this.peak * 10 ** (this.data.decades * (level / 255 - 1));
  }

  describe(tile) {
    const [, columns] = this.data.grid.tiles;
    const frame = Math.floor(tile / this.perFrame) - this.unpictured;
    const place = tile % this.perFrame;
    const where = frame < 0 ? "the reference frame" : `frame ${frame + 1}`;
    return `${where}, row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`;
  }

  choose(tile) {
    this.query = Math.min(this.tiles - 1, Math.max(0, tile));
    this.draw();
  }

  pickInFrames(event) {
    const { left, top } = this.strip.getBoundingClientRect();
    const { across, width, height, gap } = this.layout;
    const column = Math.floor((event.clientX - left) / (width + gap));
    const row = Math.floor((event.clientY - top) / (height + gap));
    const frame = row * across + column;
    const x = event.clientX - left - column * (width + gap);
    const y = event.clientY - top - row * (height + gap);
    if (column >= across || frame >= this.data.grid.frames || x > width || y > height) return;
    const [rows, columns] = this.data.grid.tiles;
    const [tileRows, tileColumns] = this.data.grid.tile;
    const [tokenRows, tokenColumns] = this.data.grid.tokens;
    const tileRow = Math.floor(((y / height) * tokenRows) / tileRows);
    const tileColumn = Math.floor(((x / width) * tokenColumns) / tileColumns);
    this.choose(frame * this.perFrame + Math.min(rows - 1, tileRow) * columns
      + Math.min(columns - 1, tileColumn));
  }

  pickByKey(event) {
    const [, columns] = this.data.grid.tiles;
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      PageUp: -this.perFrame, PageDown: this.perFrame,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(this.query + steps[event.key]);
  }

  pickInMap(event) {
    const { top, height } = event.target.getBoundingClientRect();
    this.choose(Math.floor(((event.clientY - top) / height) * this.tiles));
  }

  draw() {
    this.drawFrames();
    this.drawMaps();
    this.say();
  }

  say() {
    const { look, layer } = this.chosen;
    let kept = 0, share = 0, all = 0, best = -1;
    for (let key = 0; key < this.tiles; key++) {
      const score = this.score(this.level(this.query, key));
      all += score;
      if (!this.isKept(this.query, key)) continue;
      kept++;
      share += score;
      if (best < 0 || this.level(this.query, key) > this.level(this.query, best)) best = key;
    }
    let unused = "";
    if (this.work[this.data.looks[look].step] === "skipped") {
      unused = " A cache skipped this step: the mask was not used.";
    } else if (this.data.dense[look][layer]) {
      unused = " This layer ran dense at this step: its mask was not used.";
    }
    const strongest = best < 0 ? "" : ` Strongest: ${this.describe(best)}.`;
    this.said.textContent = `The tile in ${this.describe(this.query)} attends to ${kept} of `
      + `${this.tiles} tiles (${percent(kept / this.tiles)}), which have `
      + `${percent(share / all)} of its draft.${strongest}${unused}`;
  }

  /** Draws every frame with its tiles: those attended to bright, the others dim. */
  drawFrames() {
    const available = this.frames.clientWidth;
    if (available === 0) return;
    const { frames, tokens, tiles, tile } = this.data.grid;
    const gap = 6;
    const fit = Math.floor((available + gap) / (FRAME_WIDTH + gap));
    const across = Math.min(frames, Math.max(2, fit));
    const width = Math.floor((available - gap * (across - 1)) / across);
    const height = Math.round((width * tokens[0]) / tokens[1]);
    this.layout = { across, width, height, gap };
    const down = Math.ceil(frames / across);
    const context = contextOf(
      this.strip, across * (width + gap) - gap, down * (height + gap) - gap,
    );
    const levels = this.maxLevel();
    for (let frame = 0; frame < frames; frame++) {
      const x = (frame % across) * (width + gap);
      const y = Math.floor(frame / across) * (height + gap);
      this.drawPicture(context, frame, x, y, width, height);
      for (let place = 0; place < this.perFrame; place++) {
        const row = Math.floor(place / tiles[1]) * tile[0];
        const column = (place % tiles[1]) * tile[1];
        const rectangle = [
          x + (width * column) / tokens[1], y + (height * row) / tokens[0],
          (width * Math.min(tile[1], tokens[1] - column)) / tokens[1],
          (height * Math.min(tile[0], tokens[0] - row)) / tokens[0],
        ];
        this.drawTile(context, frame * this.perFrame + place, rectangle, levels);
      }
      this.drawNumber(context, frame, x, y);
    }
  }

  drawNumber(context, frame, x, y) {
    const own = frame - this.unpictured;
    context.font = "600 12px system-ui, sans-serif";
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    const text = own < 0 ? "reference" : String(own + 1);
    context.strokeText(text, x + 7, y + 17);
    context.fillText(text, x + 7, y + 17);
  }

  /** The strongest level of the chosen tile's row. */
  maxLevel() {
    let most = 1;
    for (let key = 0; key < this.tiles; key++) most = Math.max(most, this.level(this.query, key));
    return most;
  }

  drawPicture(context, frame, x, y, width, height) {
    const picture = this.pictures?.[frame - this.unpictured];
    if (picture?.complete && picture.naturalWidth > 0) {
      context.drawImage(picture, x, y, width, height);
    } else {
      context.fillStyle = colour("absent");
      context.fillRect(x, y, width, height);
    }
  }

  drawTile(context, tile, [x, y, width, height], most) {
    if (this.isKept(this.query, tile)) {
      const share = this.level(this.query, tile) / most;
      context.fillStyle = `rgba(255, 176, 32, ${0.04 + 0.3 * share ** 3})`;
      context.fillRect(x, y, width, height);
      context.strokeStyle = "rgba(255, 176, 32, 0.95)";
      context.lineWidth = 1.5;
      context.strokeRect(x + 1, y + 1, width - 2, height - 2);
    } else {
      context.fillStyle = "rgba(10, 14, 20, 0.62)";
      context.fillRect(x, y, width, height);
    }
    if (tile !== this.query) return;
    for (const [style, line] of [["#000", 5], ["#3ad6ff", 3]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      context.strokeRect(x + 2, y + 2, width - 4, height - 4);
    }
  }

  drawMaps() {
    for (const map of this.maps) {
      const side = Math.floor(map.box.clientWidth);
      if (side === 0) return;
      const context = contextOf(map.canvas, side, side);
      context.imageSmoothingEnabled = this.tiles > side;
      context.drawImage(this.imageOf(map.kind), 0, 0, side, side);
      this.drawLines(context, side);
      const { look, layer, head } = this.chosen;
      const { looks, layers, heads } = this.data;
      map.canvas.setAttribute(
        "aria-label",
        `${map.name} of step ${looks[look].step}, layer ${layers[layer]}, head `
          + `${heads[head]}: query tiles down, key tiles across`,
      );
    }
  }

  /** Draws borders of frames, and marks the row of the chosen tile. */
  drawLines(context, side) {
    context.strokeStyle = "rgba(90, 160, 255, 0.45)";
    context.lineWidth = 0.5;
    context.beginPath();
    for (let tile = this.perFrame; tile < this.tiles; tile += this.perFrame) {
      const place = (side * tile) / this.tiles;
      context.moveTo(place, 0);
      context.lineTo(place, side);
      context.moveTo(0, place);
      context.lineTo(side, place);
    }
    context.stroke();
    const height = Math.max(2, side / this.tiles);
    const middle = (side * (this.query + 0.5)) / this.tiles;
    context.strokeStyle = "#3ad6ff";
    context.lineWidth = 1.5;
    context.strokeRect(0.75, middle - height / 2 - 0.75, side - 1.5, height + 1.5);
  }

  /** Returns a canvas with a pixel for each pair of tiles; made once for each map. */
  imageOf(kind) {
    const name = `${kind} ${this.map}`;
    if (this.images[kind]?.name !== name) {
      this.images[kind] = { name, canvas: this.paint(kind === "mask") };
    }
    return this.images[kind].canvas;
  }

  paint(isMask) {
    const canvas = make("canvas", { width: this.tiles, height: this.tiles });
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.tiles, this.tiles);
    const pixels = new Uint32Array(image.data.buffer);
    const packed = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red);
    if (isMask) {
      const kept = packed([255, 176, 32]), skipped = packed([28, 34, 44]);
      for (let query = 0, at = 0; query < this.tiles; query++) {
        for (let key = 0; key < this.tiles; key++, at++) {
          pixels[at] = this.isKept(query, key) ? kept : skipped;
        }
      }
    } else {
      const first = this.map * this.tiles ** 2;
      const levels = this.levels.subarray(first, first + this.tiles ** 2);
      const low = Math.min(254, levels.reduce((least, level) => Math.min(least, level)));
      const colours = Array.from({ length: 256 }, (_, level) =>
        packed(magma(Math.max(0, level - low) / (255 - low))));
      levels.forEach((level, at) => { pixels[at] = colours[level]; });
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }
}
