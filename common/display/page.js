// The page: maps that share one selection, one hovered and one open image, and their lists.

const SHOWN_NEIGHBORS = 8, MOVED = 48, GALLERY = 60, MANY_CLASSES = 20;
const CORRECT = "#8db4d9", WRONG = "#d03a1b", UNKNOWN = "#8a919e";
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779",
  "#6ece58", "#b5de2b"];  // without its brightest end, which is too pale on white

const find = (id) => document.getElementById(id), {names, labels} = data;
const everything = [...labels.keys()];
const spaces = data.maps.map((map) => {
  const x = numbers(map.x), neighbors = numbers(map.neighbors), k = neighbors.length / x.length;
  return {
    title: map.title,
    x: x.map((step) => step / 65535),
    y: numbers(map.y).map((step) => step / 65535),
    nearest: (n) => [...neighbors.subarray(n * k, (n + 1) * k)],
    predictions: map.predictions && numbers(map.predictions),
    confidences: map.confidences && numbers(map.confidences).map((step) => step / 65535),
  };
});
const classified = spaces.filter((space) => space.predictions);
const isWrong = (space, n) => Boolean(space.predictions) && space.predictions[n] !== labels[n];
const least = Math.min(...spaces.map((s) => s.confidences ? Math.min(...s.confidences) : Infinity));
const state = {
  colorBy: "label",
  hidden: new Set(),  // classes
  selected: null,  // images, or null: no selection
  open: null,  // the image whose neighbors are shown
  hovered: null,
  gallery: GALLERY,  // how many pictures of the selection are shown
};

function numbers(base64) {  // 16 bits each, little-endian, as floats
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return Float32Array.from(new Uint16Array(bytes.buffer));
}
function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
const percent = (fraction) => (100 * fraction).toFixed(0) + "%";
const count = (number) => number.toLocaleString("en");

// ---------------------------------------------------------------- What is shown and selected
function isShown(n) {
  return !state.hidden.has(labels[n])
    && (!find("mistakes").checked || classified.some((space) => isWrong(space, n)));
}
const selection = () => (state.selected ?? []).filter(isShown);

function select(images, isAdded = false) {
  const all = isAdded && state.selected ? [...state.selected, ...images] : images;
  state.selected = all.length ? [...new Set(all)].sort((a, b) => a - b) : null;
  state.gallery = GALLERY;
  update();
}
function end() {
  state.open = null;
  hover(null);
  select([]);
  showNeighbors();
}
function open(n) {
  state.open = n;
  mark();
  showNeighbors();
}

// ---------------------------------------------------------------- Colors
function colorOf(space, n) {
  if (state.colorBy === "label") return data.colors[labels[n]];
  if (!space.predictions) return UNKNOWN;
  if (state.colorBy === "prediction") return data.colors[space.predictions[n]];
  if (state.colorBy === "correctness") return isWrong(space, n) ? WRONG : CORRECT;
  if (!space.confidences) return UNKNOWN;
  return sequential((space.confidences[n] - least) / (1 - least || 1));
}
function sequential(fraction) {
  return VIRIDIS[Math.min(VIRIDIS.length - 1, Math.floor(fraction * VIRIDIS.length))];
}
function showKey() {
  const key = find("key"), by = state.colorBy;
  const entry = (color, text) => make("span", {}, make("i", {style: `background:${color}`}), text);
  document.body.classList.toggle("plain-classes", by === "correctness" || by === "confidence");
  key.replaceChildren();
  if (by === "correctness") key.append(entry(CORRECT, "correct"), entry(WRONG, "wrong"));
  if (by === "confidence") {
    const steps = VIRIDIS.map((color) => make("i", {style: `background:${color}`}));
    key.append(percent(least), make("span", {className: "ramp"}, ...steps), "100%");
  }
}

// ---------------------------------------------------------------- Drawing
const plots = [...document.querySelectorAll("figure.map")].map((figure, m) => {
  const {title, x, y} = spaces[m];
  const show = (n) => hover(n, n === null ? null : figure.querySelector(".marks"), plots[m]);
  return new ScatterPlot(figure.appendChild(make("div", {className: "plot"})), title, x, y,
    {hover: show, click: open, select, picture: drawPart});
});
function update() {
  const shown = everything.map(isShown), lit = everything.map(() => state.selected === null);
  for (const n of state.selected ?? []) lit[n] = true;
  plots.forEach((plot, m) => plot.draw({
    shown, lit,
    colors: everything.map((n) => colorOf(spaces[m], n)),
    ringed: everything.map((n) => isWrong(spaces[m], n)),
  }));
  const left = shown.filter(Boolean).length, chosen = selection();
  find("count").textContent = state.selected
    ? `${count(chosen.length)} of ${count(left)} selected`
    : `${count(left)} of ${count(labels.length)} images`;
  for (const id of ["fit", "save"]) find(id).disabled = !chosen.length;
  showSelection(chosen);
  mark();
}
function mark() {
  plots.forEach((plot, m) => {
    const near = state.open === null ? [] : spaces[m].nearest(state.open);
    const opened = state.open === null ? [] : [[state.open, near.slice(0, SHOWN_NEIGHBORS)]];
    plot.mark(state.hovered === null ? opened : [...opened, [state.hovered, []]]);
  });
  find("end").disabled = !state.selected && state.open === null;
}

// ---------------------------------------------------------------- The card of the hovered image
function hover(n, element, plot) {
  if (n === state.hovered) return;
  state.hovered = n;
  mark();
  const card = find("card");
  card.classList.toggle("on", n !== null);
  if (n === null) return;
  showPart(find("image"), n);
  const row = (head, c, isMistake, note) => make("tr", {}, make("td", {}, head),
    make("td", {className: isMistake ? "wrong" : ""},
      make("i", {style: `background:${data.colors[c]}`}), names[c]), make("td", {}, note));
  find("text").replaceChildren(row("label", labels[n], false, `image ${data.indices[n]}`),
    ...classified.map((space) => row(space.title, space.predictions[n], isWrong(space, n),
      space.confidences ? percent(space.confidences[n]) : "")));
  const place = element.getBoundingClientRect(), box = card.getBoundingClientRect(), gap = 18;
  const [x, y] = plot ? plot.place(n) : [place.width, place.height];
  const [left, top] = [place.left + x, place.top + y];
  const right = left + gap + box.width < innerWidth;
  card.style.left = Math.max(4, right ? left + gap : left - gap - box.width) + "px";
  card.style.top = Math.max(4, Math.min(top + gap, innerHeight - box.height - 4)) + "px";
}
// all images are parts of one, the background of their elements
const atlas = Object.assign(new Image(), {onload: () => update(),
  src: getComputedStyle(find("image")).backgroundImage.slice('url("'.length, -'")'.length)});
function drawPart(context, n, x, y, side) {
  const part = atlas.width / data.columns, row = Math.floor(n / data.columns);
  context.drawImage(atlas, n % data.columns * part, row * part, part, part, x, y, side, side);
}
function showPart(element, n) {
  const {columns} = data, last = columns - 1 || 1;
  element.style.backgroundPosition =
    `${100 * (n % columns) / last}% ${100 * Math.floor(n / columns) / last}%`;
}

// ---------------------------------------------------------------- Lists of pictures
// A picture is a button with lines under it; isMistake marks the picture and the first line.
function picture(n, lines, isMistake) {
  const image = make("span", {className: "image"});
  showPart(image, n);
  const texts = lines.map(([text, isRed]) =>
    make("small", {className: isRed ? "wrong" : "", title: text}, text));
  const className = isMistake ? "picture wrong" : "picture";
  const button = make("button", {className}, image, ...texts);
  button.dataset.image = n;
  button.setAttribute("aria-label", `image ${data.indices[n]}: ${lines.map(([text]) => text)}`);
  return button;
}
function showNeighbors() {
  const n = state.open, box = find("neighbors"), hadFocus = box.contains(document.activeElement);
  if (n === null) return box.replaceChildren(box.dataset.hint);
  const label = names[labels[n]];
  const rows = spaces.map((space) => {
    const near = space.nearest(n).slice(0, SHOWN_NEIGHBORS);
    const same = near.filter((other) => labels[other] === labels[n]).length;
    const pictures = near.map((other) => {
      const isOther = labels[other] !== labels[n];
      return picture(other, [[names[labels[other]], isOther]], isOther);
    });
    return make("div", {className: "row"},
      make("h4", {}, space.title, make("span", {}, `${same} of ${near.length} have its label`)),
      make("div", {className: "pictures"}, ...pictures));
  });
  box.replaceChildren(make("div", {className: "query"}, picture(n, [[label, false]], false),
    `Nearest to image ${data.indices[n]} in each space, by Euclidean distance`), ...rows);
  if (hadFocus) box.querySelector("button").focus();  // the one that had it is gone
}
function showSelection(chosen) {
  const box = find("gallery"), few = chosen.slice(0, state.gallery);
  find("chosen").textContent = state.selected ? `${count(chosen.length)} images` : "";
  if (!state.selected) return box.replaceChildren(box.dataset.hint);
  box.replaceChildren(...few.map((n) => {
    const wrong = classified.filter((space) => isWrong(space, n));
    const guesses = wrong.map(({predictions, title}) =>
      [`${names[predictions[n]]} · ${title}`, true]);
    return picture(n, [[names[labels[n]], false], ...guesses], wrong.length > 0);
  }));
  if (few.length < chosen.length) {
    box.append(make("button", {textContent: "more", onclick: () => {
      state.gallery += GALLERY;
      showSelection(chosen);
    }}));
  }
}

// Images by the number of nearest neighbors that two spaces share, the fewest first; of equal ones
// those first that gain or lose most neighbors of their own label.
function moved(first, second) {
  return everything.map((n) => {
    const [a, b] = [first.nearest(n), second.nearest(n)], inFirst = new Set(a);
    const own = (near) => near.filter((other) => labels[other] === labels[n]).length;
    const shared = b.filter((other) => inFirst.has(other)).length;
    return {n, shared, k: a.length, change: Math.abs(own(a) - own(b))};
  }).sort((a, b) => a.shared - b.shared || b.change - a.change || a.n - b.n);
}
function showMoved() {
  const [first, second] = ["first", "second"].map((id) => spaces[find(id).value]);
  find("moved").replaceChildren(...moved(first, second).slice(0, MOVED).map(({n, shared, k}) =>
    picture(n, [[names[labels[n]], false], [`${shared} of ${k}`, false]], false)));
}

// ---------------------------------------------------------------- CSV
function asCSV(images) {
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const columns = classified.flatMap(({title}) => [`${title} prediction`, `${title} confidence`]);
  const rows = images.map((n) => {
    const cells = classified.flatMap(({predictions, confidences}) =>
      [quoted(names[predictions[n]]), confidences?.[n].toFixed(4) ?? ""]);
    return [data.indices[n], quoted(names[labels[n]]), ...cells];
  });
  return [["index", "label", ...columns.map(quoted)], ...rows].map((row) => row + "\r\n").join("");
}
function save() {
  const file = new Blob([asCSV(selection())], {type: "text/csv"}), url = URL.createObjectURL(file);
  make("a", {href: url, download: "selection.csv"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---------------------------------------------------------------- Controls
const chips = names.map((name, c) => {
  const box = make("input", {type: "checkbox", checked: true, ariaLabel: `show ${name}`});
  const button = make("button", {title: `select ${name}`},
    make("i", {style: `background:${data.colors[c]}`}), name);
  box.addEventListener("change", () => show([c], box.checked));
  button.addEventListener("click", (event) =>
    select(everything.filter((n) => labels[n] === c && isShown(n)), event.shiftKey));
  return find("classes").appendChild(make("span", {className: "chip"}, box, button));
});
function show(classes, isOn) {
  for (const c of classes) {
    state.hidden[isOn ? "delete" : "add"](c);
    chips[c].firstChild.checked = isOn;
    chips[c].classList.toggle("off", !isOn);
  }
  update();
}
const listed = () => [...chips.keys()].filter((c) => !chips[c].hidden);  // what the search leaves
find("search").hidden = names.length <= MANY_CLASSES;
find("search").addEventListener("input", () => chips.forEach((chip, c) => {
  chip.hidden = !names[c].toLowerCase().includes(find("search").value.trim().toLowerCase());
}));
find("all").addEventListener("click", () => show(listed(), true));
find("none").addEventListener("click", () => show(listed(), false));
find("mistakes").addEventListener("change", update);
find("end").addEventListener("click", end);
find("fit").addEventListener("click", () => plots.forEach((plot) => plot.fit(selection())));
find("reset").addEventListener("click", () => plots.forEach((plot) => plot.fit(null)));
find("save").addEventListener("click", save);
for (const input of document.getElementsByName("tool")) input.addEventListener("change", () => {
  for (const plot of plots) plot.tool = input.value;
  document.body.dataset.tool = input.value;
});
for (const option of find("color").options) {
  option.disabled = option.value !== "label" && !classified.length
    || option.value === "confidence" && !Number.isFinite(least);
}
find("color").addEventListener("change", () => {
  state.colorBy = find("color").value;
  showKey();
  update();
});
for (const [id, m] of [["first", 0], ["second", spaces.length - 1]]) {
  find(id).append(...spaces.map(({title}, value) => make("option", {value}, title)));
  find(id).value = m;
  find(id).addEventListener("change", showMoved);
}
document.querySelector("label:has([value=most-moved])").hidden = spaces.length < 2;
for (const tab of document.getElementsByName("tab")) tab.addEventListener("change", () => {
  for (const name of ["selection", "most-moved"]) find(name).hidden = name !== tab.value;
});
document.addEventListener("keydown", (event) => event.key === "Escape" && end());
document.addEventListener("click", (event) => {
  const clicked = event.target.closest("[data-image]");
  if (!clicked) return;
  const n = Number(clicked.dataset.image);
  hover(null);
  if (clicked.closest("#moved")) select([n]);
  open(n);
});
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, (event) => {
  const over = event.target.closest("[data-image]");
  if (over) hover(Number(over.dataset.image), over);
  else if (!event.target.closest(".plot")) hover(null);
});
// the panel starts below the bar, which sticks to the top
const bar = document.querySelector(".bar");
new ResizeObserver(() => document.body.style.setProperty("--bar", `${bar.offsetHeight + 8}px`))
  .observe(bar);
showNeighbors();
showMoved();
update();
