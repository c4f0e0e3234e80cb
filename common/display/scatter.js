// One map: a scatter plot on a canvas with zoom, and with selection by mouse, touch and keys.

const UNLIT = "#dde0e6", DARK = "#111", LARGEST_ZOOM = 60;
const CLICK = 4, REACH = 14;  // pixels
const FEW = 120;  // so many points or fewer are drawn as pictures, when zoomed in

const limited = (half) => Math.min(0.5, Math.max(0.5 / LARGEST_ZOOM, half));

class ScatterPlot {
  // x and y: of the points, in [0,1]. on: what to call with what happens,
  //   hover(point or null), click(point), select(points, whether they are added);
  //   picture(context, point, x, y, side) draws one.
  constructor(parent, title, x, y, on) {
    Object.assign(this, {x, y, on, tool: "lasso", path: [], style: null, marked: []});
    this.view = {x: 0.5, y: 0.5, half: 0.5};  // center, and half the side, of what is seen
    [this.dots, this.marks] = ["dots", "marks"].map((name) => {
      const canvas = parent.appendChild(document.createElement("canvas"));
      canvas.className = name;
      return canvas.getContext("2d");
    });
    const top = this.marks.canvas;
    top.tabIndex = 0;
    top.setAttribute("role", "application");
    top.setAttribute("aria-label", `Map of ${title}: arrows step from image to image, Enter shows `
      + "the neighbors, Space selects, plus and minus zoom, 0 shows everything");
    new ResizeObserver(() => this.resize()).observe(top);
    top.addEventListener("pointerdown", (event) => this.press(event));
    top.addEventListener("pointermove", (event) => this.move(event));
    top.addEventListener("pointerup", (event) => this.release(event));
    top.addEventListener("pointercancel", () => this.end());
    top.addEventListener("pointerleave", () => on.hover(null));
    top.addEventListener("wheel", (event) => this.wheel(event), {passive: false});
    top.addEventListener("keydown", (event) => this.key(event));
  }

  resize() {
    const scale = devicePixelRatio || 1;
    this.size = this.marks.canvas.clientWidth;
    for (const context of [this.dots, this.marks]) {
      context.canvas.width = context.canvas.height = Math.round(this.size * scale);
      context.setTransform(scale, 0, 0, scale, 0, 0);
    }
    this.draw();
  }

  // --------------------------------------------------------------- Places, in pixels of the canvas
  place(n) {
    const {x, y, half} = this.view, pixels = this.size / (2 * half);
    return [(this.x[n] - x + half) * pixels, (y - this.y[n] + half) * pixels];
  }
  radius() {
    const base = Math.min(5, Math.max(2.2, 0.33 * this.size / Math.sqrt(this.x.length)));
    return Math.min(8, base * (0.5 / this.view.half) ** 0.4);
  }
  nearest(x, y) {  // point in reach, or null
    let best = null, shortest = REACH ** 2;
    for (let n = 0; n < this.x.length; n++) {
      if (!this.style.shown[n]) continue;
      const [a, b] = this.place(n), distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < shortest) [best, shortest] = [n, distance];
    }
    return best;
  }
  inside() {  // points in the polygon that was drawn; in a box, if that is the tool
    const polygon = this.polygon(), found = [];
    for (let n = 0; n < this.x.length; n++) {
      if (!this.style.shown[n]) continue;
      const [x, y] = this.place(n);
      let is = false;
      for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
        const [a, b] = polygon[i], [c, d] = polygon[j];
        if (b > y !== d > y && x < a + (c - a) * (y - b) / (d - b)) is = !is;
      }
      if (is) found.push(n);
    }
    return found;
  }
  polygon() {
    if (this.tool === "lasso") return this.path;
    const [[a, b], [c, d]] = [this.path[0], this.path.at(-1)];
    return [[a, b], [c, b], [c, d], [a, d]];
  }

  // ---------------------------------------------------------------- Drawing
  // style: color of each point, and for each whether it is shown, lit, ringed
  draw(style = this.style) {
    this.style = style;
    if (!style || !this.size) return;
    const {shown, lit, ringed} = style;
    const isNear = (x) => x > -20 && x < this.size + 20;
    const isSeen = (n) => shown[n] && this.place(n).every(isNear);
    const seen = [...this.x.keys()].filter(isSeen);
    const isFew = this.view.half < 0.5 && seen.length <= FEW;
    this.side = isFew ? Math.min(40, Math.max(18, 0.5 * this.size / Math.sqrt(seen.length))) : 0;
    this.dots.clearRect(0, 0, this.size, this.size);
    // what matters most is drawn last
    for (const n of seen.filter((n) => !lit[n])) this.point(n);
    for (const n of seen.filter((n) => lit[n] && !ringed[n])) this.point(n);
    for (const n of seen.filter((n) => lit[n] && ringed[n])) this.point(n);
    this.mark();
  }
  point(n) {  // a ring is a larger dark dot below: to stroke circles takes four times as long
    const isLit = this.style.lit[n], color = isLit ? this.style.colors[n] : UNLIT;
    const isRinged = isLit && this.style.ringed[n], radius = this.radius() * (isLit ? 1 : 0.8);
    if (this.side) return this.picture(n, isLit, color, isRinged);
    if (isRinged) this.dot(this.dots, n, radius + 1.3, DARK);
    this.dots.globalAlpha = isLit && !isRinged ? 0.8 : 1;
    this.dot(this.dots, n, radius, color);
    this.dots.globalAlpha = 1;
  }
  picture(n, isLit, color, isRinged) {
    const context = this.dots, [x, y] = this.place(n).map((center) => center - this.side / 2);
    const frames = isRinged ? [[3.5, DARK], [2, color]] : [[2, color]];
    for (const [width, fill] of frames) {
      context.fillStyle = fill;
      context.fillRect(x - width, y - width, this.side + 2 * width, this.side + 2 * width);
    }
    context.globalAlpha = isLit ? 1 : 0.25;
    this.on.picture(context, n, x, y, this.side);
    context.globalAlpha = 1;
  }
  dot(context, n, radius, color) {
    const [x, y] = this.place(n);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fillStyle = color;
    context.fill();
  }
  // marked: [point, the points that a line joins it to], on top of the dots
  mark(marked = this.marked) {
    this.marked = marked;
    const context = this.marks, fill = (n) => this.side ? "#0000" : this.style.colors[n];
    context.clearRect(0, 0, this.size, this.size);
    for (const [n, joined] of marked) {
      context.lineWidth = 1;
      context.strokeStyle = DARK;
      for (const other of joined) {
        context.beginPath();
        context.moveTo(...this.place(n));
        context.lineTo(...this.place(other));
        context.stroke();
        this.dot(context, other, this.radius() + 1, fill(other));
        context.stroke();
      }
      for (const [width, color] of [[6, "#fff"], [2.5, DARK]]) {
        [context.lineWidth, context.strokeStyle] = [width, color];
        this.dot(context, n, Math.max(10, 0.8 * this.side), "#0000");
        context.stroke();
      }
      this.dot(context, n, 5, fill(n));
    }
    if (this.path.length < 2 || this.tool === "move") return;
    context.beginPath();
    for (const point of this.polygon()) context.lineTo(...point);
    context.closePath();
    context.fillStyle = "#1f5fbf22";
    context.fill();
    [context.lineWidth, context.strokeStyle] = [1.5, "#1f5fbf"];
    context.stroke();
  }

  // ---------------------------------------------------------------- Zoom
  look(x, y, half) {
    half = limited(half);
    const within = (center) => Math.min(1 - half, Math.max(half, center));
    this.view = {x: within(x), y: within(y), half};
    this.draw();
  }
  fit(points) {  // all that is there, if null
    if (!points?.length) return this.look(0.5, 0.5, 0.5);
    const ends = [this.x, this.y].map((values) => {
      const chosen = points.map((n) => values[n]);
      return [Math.min(...chosen), Math.max(...chosen)];
    });
    const [x, y] = ends.map(([low, high]) => (low + high) / 2);
    const [width, height] = ends.map(([low, high]) => high - low);
    this.look(x, y, Math.max(0.6 * Math.max(width, height), 0.02));
  }
  zoom(factor, x = this.size / 2, y = this.size / 2) {  // what lies at (x, y) stays there
    const {view, size} = this, half = limited(view.half / factor);
    const shift = (pixels) => (2 * pixels / size - 1) * (view.half - half);
    this.look(view.x + shift(x), view.y - shift(y), half);
  }

  // ---------------------------------------------------------------- Mouse, touch and keys
  press(event) {
    if (event.button) return;
    this.marks.canvas.setPointerCapture(event.pointerId);
    this.path = [[event.offsetX, event.offsetY]];
    this.start = {...this.view};
  }
  move(event) {
    const [x, y] = [event.offsetX, event.offsetY];
    if (!this.path.length) return this.on.hover(this.nearest(x, y));
    const [a, b] = this.path.at(-1), [c, d] = this.path[0];
    if (Math.hypot(x - a, y - b) < CLICK) return;
    this.on.hover(null);
    this.path.push([x, y]);
    if (this.tool !== "move") return this.mark();
    const units = 2 * this.view.half / this.size;
    this.look(this.start.x - (x - c) * units, this.start.y + (y - d) * units, this.view.half);
  }
  release(event) {
    const length = this.path.length, [x, y] = [event.offsetX, event.offsetY];
    if (length === 1) {
      const point = this.nearest(x, y);
      if (point !== null) this.on.click(point);
    } else if (length && this.tool !== "move") {
      this.path.push([x, y]);
      this.on.select(this.inside(), event.shiftKey);
    }
    this.end();
  }
  end() {
    this.path = [];
    this.mark();
  }
  wheel(event) {  // a page that is scrolled should not zoom; a pinch comes as Ctrl + wheel
    if (this.tool !== "move" && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 300)), event.offsetX, event.offsetY);
  }
  key(event) {
    const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const zooms = {"+": 1.5, "=": 1.5, "-": 1 / 1.5}, at = this.at ?? null;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) this.on.hover(this.at = this.step(at, ...steps[event.key]));
    else if (event.key in zooms && at === null) this.zoom(zooms[event.key]);
    else if (event.key in zooms) this.zoom(zooms[event.key], ...this.place(at));
    else if (event.key === "0") this.fit(null);
    else if (event.key === "Enter" && at !== null) this.on.click(at);
    else if (event.key === " " && at !== null) this.on.select([at], true);
    else return;
    event.preventDefault();
  }
  step(from, right, down) {  // the next point in a direction: near, and not far to the side
    const [x, y] = from === null ? [this.size / 2, this.size / 2] : this.place(from);
    let best = from, shortest = Infinity;
    for (let n = 0; n < this.x.length; n++) {
      const [a, b] = this.place(n).map((value, axis) => value - [x, y][axis]);
      const ahead = a * right + b * down, aside = Math.abs(a * down) + Math.abs(b * right);
      if (!this.style.shown[n] || n === from || ahead <= 0) continue;
      if (ahead + 3 * aside < shortest) [best, shortest] = [n, ahead + 3 * aside];
    }
    return best;
  }
}
