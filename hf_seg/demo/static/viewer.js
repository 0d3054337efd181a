// Two canvases, scene and land cover, that move and zoom together. Runs as Gradio's `js_on_load`: `element` contains
// viewer.html, `props.value` is what hf_seg.demo.view returns, `watch` tells when it changes.

const root = element.querySelector(".hfs-viewer");
const find = (selector) => root.querySelector(selector);
const panes = [...root.querySelectorAll(".hfs-pane")];
const canvases = panes.map((pane) => pane.querySelector("canvas"));
const slider = find(".hfs-fade input");
const MAX_SCALE = 24; // screen pixels per shown pixel
const FADED = 36; // opacity of what is below the confidence, of 255
const NONE = 255; // stored confidence where there is none; 254 is certainty

let value = null; // what is shown
let images = [null, null]; // of the panes, to draw
let classes = null, confidence = null, pixels = null; // one byte a pixel, and the painted map
let hidden = new Set(); // class ids
let view = {x: 0, y: 0, scale: 1}; // pixel in the middle of a pane, and screen pixels per pixel
let pointer = null; // pixel under the pointer
let isFitted = true;
let loads = 0;

// Show

async function show(next) {
  const load = ++loads;
  const before = value;
  const image = next && (before && before.image === next.image ? images[0] : await decodeImage(next.image));
  const layers = next && next.classes ? await Promise.all([inflate(next.classes), inflate(next.confidence)]) : [null, null];
  if (load !== loads) return; // a later value has arrived
  value = next;
  [classes, confidence] = layers;
  images = [image, null];
  root.dataset.state = !value ? "empty" : classes ? "map" : "scene";
  hidden = new Set();
  slider.value = 0;
  pointer = null;
  panes[0].querySelector("figcaption").textContent = value ? value.title : "Scene";
  pixels = classes && new ImageData(value.width, value.height);
  paint();
  writeLegend();
  resize();
  if (!before || !value || before.image !== value.image) fit();
  draw();
}

async function decodeImage(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Paint the classes: transparent where hidden or without class, faint below the confidence

function paint() {
  const percent = Number(slider.value);
  find(".hfs-fade output").textContent = percent + " %";
  if (!classes) { find(".hfs-kept").textContent = ""; return; }
  const threshold = Math.ceil(percent / 100 * 254);
  const colors = new Uint32Array(pixels.data.buffer);
  const opaque = new Uint32Array(256), faint = new Uint32Array(256);
  for (const each of value.legend) {
    if (hidden.has(each.id)) continue;
    const [red, green, blue] = each.color;
    const color = blue << 16 | green << 8 | red;
    opaque[each.id] = (255 << 24 | color) >>> 0;
    faint[each.id] = (FADED << 24 | color) >>> 0;
  }
  let kept = 0, land = 0;
  for (let i = 0; i < classes.length; i++) {
    const id = classes[i];
    const certain = confidence[i] >= threshold;
    colors[i] = certain ? opaque[id] : faint[id];
    if (id !== 0) { land++; if (certain) kept++; }
  }
  find(".hfs-kept").textContent = percent && land ? (100 * kept / land).toFixed(0) + " % of the map is above" : "";
  if (!images[1]) {
    images[1] = document.createElement("canvas");
    [images[1].width, images[1].height] = [value.width, value.height];
  }
  images[1].getContext("2d").putImageData(pixels, 0, 0);
}

function writeLegend() {
  const legend = find(".hfs-legend");
  legend.replaceChildren();
  if (!classes) return;
  const largest = Math.max(...value.legend.map((each) => each.share), 1e-9);
  for (const each of value.legend) {
    const row = document.createElement("button");
    row.type = "button";
    row.title = "Show or hide " + each.name;
    row.setAttribute("aria-pressed", "true");
    row.dataset.id = each.id;
    const swatch = document.createElement("i");
    swatch.style.background = "rgb(" + each.color.join(",") + ")";
    const bar = document.createElement("b");
    bar.style.setProperty("--share", each.share / largest);
    row.append(swatch, text("hfs-name", each.name), bar, text("hfs-share", (100 * each.share).toFixed(1) + " %"),
      text("hfs-area", each.area));
    legend.append(row);
  }
  if (value.no_class > 0) {
    legend.append(text("hfs-no-class", (100 * value.no_class).toFixed(1) + " % of the scene has no class."));
  }
}

function text(name, content) {
  const span = document.createElement("span");
  span.className = name;
  span.textContent = content;
  return span;
}

// Draw

function resize() {
  for (const canvas of canvases) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
  }
}

function size() {
  return {width: canvases[0].clientWidth || 1, height: canvases[0].clientHeight || 1};
}

let isScheduled = false;
function draw() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    canvases.forEach(drawPane);
    if (value) writeScale();
    writeReadout();
  });
}

function drawPane(canvas, index) {
  const context = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!value) return;
  const {width, height} = size();
  const left = width / 2 - view.x * view.scale, top = height / 2 - view.y * view.scale;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = view.scale * ratio < 1;
  if (images[index]) context.drawImage(images[index], left, top, value.width * view.scale, value.height * view.scale);
  context.strokeStyle = "rgba(128,128,128,.6)";
  context.strokeRect(left, top, value.width * view.scale, value.height * view.scale);
  if (pointer) {
    const x = left + (pointer.x + .5) * view.scale, y = top + (pointer.y + .5) * view.scale;
    for (const [color, thickness] of [["rgba(0,0,0,.7)", 3], ["#fff", 1]]) {
      context.strokeStyle = color;
      context.lineWidth = thickness;
      context.beginPath();
      context.moveTo(x - 9, y); context.lineTo(x + 9, y);
      context.moveTo(x, y - 9); context.lineTo(x, y + 9);
      context.stroke();
    }
    context.lineWidth = 1;
  }
}

function writeScale() {
  const bar = find(".hfs-scale");
  bar.hidden = !value.metres;
  if (bar.hidden) return;
  const metresOfScreenPixel = value.metres / view.scale, widest = Math.min(140, size().width / 3) * metresOfScreenPixel;
  const power = 10 ** Math.floor(Math.log10(widest));
  const metres = [5, 2, 1].map((step) => step * power).find((length) => length <= widest);
  bar.querySelector("i").style.width = metres / metresOfScreenPixel + "px";
  bar.querySelector("span").textContent = metres >= 1000 ? metres / 1000 + " km" : metres >= 1 ? metres + " m" : 100 * metres + " cm";
}

function writeReadout() {
  const parts = [];
  if (value && pointer) {
    if (classes) {
      const index = pointer.y * value.width + pointer.x;
      const found = value.legend.find((each) => each.id === classes[index]);
      parts.push(found ? found.name : "no class");
      if (confidence[index] !== NONE) parts.push((100 * confidence[index] / 254).toFixed(0) + " % confident");
    }
    if (value.transform) {
      const [a, b, c, d, e, f] = value.transform, x = pointer.x + .5, y = pointer.y + .5;
      const numbers = [a * x + b * y + c, d * x + e * y + f].map((number) => number.toFixed(value.decimals));
      parts.push(numbers.join(", ") + (value.crs ? " (" + value.crs + ")" : ""));
    } else {
      parts.push("column " + pointer.x + ", row " + pointer.y);
    }
  }
  find(".hfs-readout").textContent = parts.join("  ·  ") || (value ? "Point at the map, or tap it." : "\u00a0");
}

// Move and zoom

function fitScale() {
  const {width, height} = size();
  return value ? Math.min(width / value.width, height / value.height) : 1;
}

function fit() {
  if (!value) return;
  view = {x: value.width / 2, y: value.height / 2, scale: fitScale()};
  moved();
}

function moved() {
  const smallest = fitScale();
  view.scale = Math.min(Math.max(view.scale, smallest), Math.max(MAX_SCALE, smallest));
  isFitted = view.scale <= smallest * 1.001;
  if (isFitted) {
    [view.x, view.y] = [value.width / 2, value.height / 2];
  } else {
    view.x = Math.min(Math.max(view.x, 0), value.width);
    view.y = Math.min(Math.max(view.y, 0), value.height);
  }
  // a finger scrolls the page over a map that shows all, and moves a map that does not
  for (const canvas of canvases) canvas.style.touchAction = isFitted ? "pan-y" : "none";
  draw();
}

function zoom(factor, at) {
  if (!value) return;
  const {width, height} = size();
  const offset = at ? {x: at.x - width / 2, y: at.y - height / 2} : {x: 0, y: 0};
  const fixed = {x: view.x + offset.x / view.scale, y: view.y + offset.y / view.scale};
  view.scale = Math.min(Math.max(view.scale * factor, fitScale()), MAX_SCALE);
  view.x = fixed.x - offset.x / view.scale;
  view.y = fixed.y - offset.y / view.scale;
  moved();
}

function pan(x, y) {
  if (!value || isFitted) return;
  view.x -= x / view.scale;
  view.y -= y / view.scale;
  moved();
}

function position(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return {x: event.clientX - box.left, y: event.clientY - box.top};
}

function point(at) {
  const {width, height} = size();
  const x = Math.floor(view.x + (at.x - width / 2) / view.scale), y = Math.floor(view.y + (at.y - height / 2) / view.scale);
  pointer = value && x >= 0 && y >= 0 && x < value.width && y < value.height ? {x, y} : null;
  draw();
}

canvases.forEach((canvas) => {
  const fingers = new Map(); // of pointers that are down: where they are
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    fingers.set(event.pointerId, position(event, canvas));
    canvas.setPointerCapture(event.pointerId);
    if (fingers.size === 1) point(position(event, canvas));
  });
  canvas.addEventListener("pointermove", (event) => {
    const at = position(event, canvas), last = fingers.get(event.pointerId);
    if (!last) { if (event.pointerType === "mouse") point(at); return; }
    const other = [...fingers].find(([id]) => id !== event.pointerId);
    fingers.set(event.pointerId, at);
    if (!other) { pan(at.x - last.x, at.y - last.y); return; }
    const distance = (one, two) => Math.hypot(one.x - two.x, one.y - two.y) || 1;
    const middle = {x: (at.x + other[1].x) / 2, y: (at.y + other[1].y) / 2};
    pan((at.x - last.x) / 2, (at.y - last.y) / 2);
    zoom(distance(at, other[1]) / distance(last, other[1]), middle);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !fingers.size) { pointer = null; draw(); }
  });
  canvas.addEventListener("wheel", (event) => {
    if (!value) return;
    event.preventDefault();
    zoom(2 ** (-event.deltaY / (event.deltaMode ? 8 : 240)), position(event, canvas));
  }, {passive: false});
  canvas.addEventListener("dblclick", (event) => zoom(2, position(event, canvas)));
  canvas.addEventListener("keydown", (event) => {
    const keys = {ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60),
      ArrowDown: () => pan(0, -60), "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": fit};
    if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
});

find(".hfs-zoom").addEventListener("click", (event) => {
  const actions = {in: () => zoom(1.5), out: () => zoom(1 / 1.5), fit};
  (actions[event.target.dataset.zoom] || (() => {}))();
});
slider.addEventListener("input", () => { paint(); draw(); });
find(".hfs-legend").addEventListener("click", (event) => {
  const row = event.target.closest("button");
  if (!row) return;
  const id = Number(row.dataset.id);
  if (!hidden.delete(id)) hidden.add(id);
  row.setAttribute("aria-pressed", String(!hidden.has(id)));
  paint();
  draw();
});
new ResizeObserver(() => {
  const wasFitted = isFitted;
  resize();
  if (value) wasFitted ? fit() : moved();
}).observe(canvases[0]);

watch("value", () => show(props.value));
show(props.value);
