// The explorer without a kernel: the library's steps from maps to mask in JavaScript, on the 8-bit maps of this page.
// tests/browser compares its numbers with the library's. explorer_board.js precedes this code.

const DATA = JSON.parse(document.getElementById("smaf-data").textContent);
const unpack = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));

// ------------------------------------------------------------------------------------------------ one image, decoded

/** Run lengths [value, count, value, count, ...] to one byte per pixel. */
function expandRuns(runs, length) {
  const values = new Uint8Array(length);
  for (let i = 0, at = 0; i < runs.length; i += 2) values.fill(runs[i], at, (at += runs[i + 1]));
  return values;
}

/** RGB bytes of a picture; the appearance depends on them, no number does. */
async function decodePicture(address, [height, width]) {
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0, width, height);
  const rgba = context.getImageData(0, 0, width, height).data, rgb = new Uint8Array(3 * height * width);
  for (let i = 0; i < height * width; i++) for (let c = 0; c < 3; c++) rgb[3 * i + c] = rgba[4 * i + c];
  return rgb;
}

/** Maps in [0, 1], one below the other in a grey picture, one per class. */
async function decodeMaps(address, { classes, size: [height, width] }) {
  const rgb = await decodePicture(address, [classes.length * height, width]), num = height * width;
  return classes.map((_, k) => Float32Array.from({ length: num }, (__, i) => rgb[3 * (k * num + i)] / 255));
}

/** Maps (h, w) to (H, W), bilinear between the centres of cells, as torch does with align_corners=False. */
function enlarge(cells, [h, w], [height, width]) {
  const axis = (small, large) => Array.from({ length: large }, (_, at) => {
    const source = Math.max(0, ((at + 0.5) * small) / large - 0.5), low = Math.min(small - 1, Math.floor(source));
    return [low, Math.min(small - 1, low + 1), source - low];
  });
  const rows = axis(h, height), cols = axis(w, width), large = new Float32Array(height * width);
  rows.forEach(([top, bottom, down], row) => cols.forEach(([left, right, along], col) => {
    const upper = cells[top * w + left] * (1 - along) + cells[top * w + right] * along;
    const lower = cells[bottom * w + left] * (1 - along) + cells[bottom * w + right] * along;
    large[row * width + col] = upper * (1 - down) + lower * down;
  }));
  return large;
}

/** Enlarged maps [scale][class] of one role. */
function enlargeAll(image, { data, peaks }) {
  const levels = unpack(data);
  let at = 0;
  return image.shapes.map(([h, w], scale) => image.classes.map((_, k) => {
    const cells = Float32Array.from(levels.subarray(at, (at += h * w)), (level) => (level / 255) * peaks[scale][k]);
    return enlarge(cells, [h, w], image.size);
  }));
}

const KEPT_IMAGES = 3; // a photo's maps take 20 MB a role
const opened = new Map();
/** Picture, ground truth and `mapsOf(role)` of an image, each made once while the image is among the last ones. */
async function open(index) {
  if (!opened.has(index)) {
    const image = DATA.images[index], num = image.size[0] * image.size[1], made = {};
    const mapsOf = (role) => (made[role] ??= enlargeAll(image, image.maps[role]));
    const picture = await decodePicture(image.picture, image.size);
    const fused = {}; // [role][rule][class]: of rules that only Python knows
    for (const [role, maps] of Object.entries(image.maps)) {
      fused[role] = {};
      for (const [rule, address] of Object.entries(maps.fused ?? {})) fused[role][rule] = await decodeMaps(address, image);
    }
    opened.set(index, { ...image, picture, fused, mapsOf, truth: image.truth && expandRuns(image.truth, num) });
    if (opened.size > KEPT_IMAGES) opened.delete(opened.keys().next().value);
  }
  return opened.get(index);
}

// ----------------------------------------------------------------------------------------- the library's steps, again

const peakOf = (map) => map.reduce((most, value) => (value > most ? value : most), 0);
const atPeakOne = (map) => { const peak = peakOf(map) + DATA.constants.peak_epsilon; return map.map((value) => value / peak); };

/** fuse_cams for one class: its maps over the scales that take part, their weights. */
function fuse(maps, weights, scales, rule) {
  const parts = maps.map((map, s) => (rule === "mean" ? atPeakOne(map) : map).map((value) => value * weights[s]));
  const sum = (factors) => parts[0].map((_, i) => parts.reduce((total, part, s) => total + factors[s] * part[i], 0));
  const ones = parts.map(() => 1);
  const join = {
    sum: () => sum(ones),
    mean: () => sum(parts.map(() => 1 / parts.length)),
    max: () => parts[0].map((_, i) => parts.reduce((most, part) => Math.max(most, part[i]), 0)),
    size_adaptive: () => sum(sizeWeights(atPeakOne(sum(ones)), scales)),
  }[rule];
  if (!join) throw new Error(`this page cannot compute the fusion rule ${rule}, and holds no maps of it`);
  return atPeakOne(join());
}

/** size_adaptive_weights: the larger the object, the smaller the scale. */
function sizeWeights(guess, scales) {
  const extent = Math.sqrt(guess.reduce((num, value) => num + (value > 0.5), 0) / guess.length);
  const best = Math.log2(DATA.constants.reference_extent / Math.max(extent, 1e-3));
  const powers = scales.map((scale) => Math.exp(-DATA.constants.size_sharpness * (Math.log2(scale) - best) ** 2));
  const total = powers.reduce((sum, power) => sum + power);
  return powers.map((power) => power / total);
}

/** The strongest class of each pixel (class number + 1), and its score. */
function strongest(clean, classes, num) {
  const label = new Uint8Array(num), score = new Float32Array(num).fill(-1);
  clean.forEach((map, k) => map.forEach((value, i) => {
    if (value > score[i]) { score[i] = value; label[i] = classes[k] + 1; }
  }));
  return { label, score };
}

/** IoU by label at each background threshold; null for what is in neither ground truth nor mask. */
function iousAt(thresholds, { label, score }, { truth, class_names }) {
  const table = () => thresholds.map(() => new Uint32Array(class_names.length + 1));
  const limits = Float32Array.from(thresholds), hits = table(), inMask = table(), inTruth = table()[0];
  truth.forEach((real, i) => {
    if (real === VOID) return;
    inTruth[real]++;
    for (let step = 0; step < limits.length; step++) {
      const found = score[i] > limits[step] ? label[i] : 0;
      inMask[step][found]++;
      if (found === real) hits[step][found]++;
    }
  });
  const iou = (hit, all) => (all ? hit / all : null);
  return hits.map((row, step) => Array.from(row, (hit, label) => iou(hit, inMask[step][label] + inTruth[label] - hit)));
}

// ------------------------------------------------------------------------------------------------ state and controls

const state = { ...DATA.start, on: DATA.scales.map(() => true), weights: DATA.scales.map(() => 1), pixel: [] };
const start = { ...state };
const kept = {};
/** Compute once for a key, and again only when the key is another. */
function keep(name, key, make) {
  const text = JSON.stringify(key);
  if (kept[name]?.text !== text) kept[name] = { text, value: make() };
  return kept[name].value;
}

/** Whether the chosen rule's maps came with the page: scales and weights cannot change them. */
const isComputed = () => DATA.computed_rules.includes(state.fusion);

/** What the board shows of an image: the view, and the reading of the marked pixel. */
function compute(image) {
  const weights = DATA.scales.map((_, s) => (isComputed() ? 1 : state.on[s] ? state.weights[s] : 0));
  const taking = DATA.scales.map((_, s) => s).filter((s) => weights[s]);
  if (!taking.length) throw new Error("no scale takes part in the fusion; switch at least one on");
  const cams = image.mapsOf(state.role), num = image.size[0] * image.size[1], at = image.classes.indexOf(state.cls);
  const how = [state.index, state.role, state.fusion, state.denoise, weights];
  const clean = keep("clean", how, () => image.classes.map((number, k) => {
    if (state.denoise && !image.label.includes(number)) return new Float32Array(num);
    if (isComputed()) return image.fused[state.role][state.fusion][k];
    const chosen = (values) => taking.map((s) => values[s]);
    return fuse(chosen(cams).map((cam) => cam[k]), chosen(weights), chosen(DATA.scales), state.fusion);
  }));
  const winner = keep("winner", how, () => strongest(clean, image.classes, num));
  const maps = keep("maps", [state.index, state.role, state.cls], () => cams.map((scale) => {
    const peak = Math.max(peakOf(scale[at]), 1e-5);
    return scale[at].map((value) => value / peak);
  }));
  const background = Math.fround(state.bg), fused = clean[at];
  const mask = winner.label.map((label, i) => (winner.score[i] > background ? label : 0));
  const target = state.reactivate ? fused.map((value, i) => value / Math.max(background, winner.score[i])) : fused;
  let curve = null, iou = null;
  if (image.truth) {
    const scores = DATA.curve_scores, ious = keep("curve", how, () => iousAt(scores, winner, image));
    [iou] = iousAt([state.bg], winner, image);
    curve = { scores, ious, at: [state.bg, iou] };
  }
  const { scales } = DATA, { denoise, reactivate, cls } = state, { size, picture, truth, class_names, colors, likeliest } = image;
  const erased = denoise && !image.label.includes(cls);
  const view = {
    size, image: picture, truth, class_names, colors, class_number: cls, likeliest, erased, scales, weights, denoise,
    reactivate, crf: "no CRF",
    rule: state.fusion,
    maps: maps.map(toBytes), fused: toBytes(fused), target: toBytes(target), mask, iou, curve,
  };
  const [row, col] = state.pixel, i = row * size[1] + col;
  const values = [...scales.map((scale, s) => [`scale ${scale}`, maps[s][i]]), ["fused", fused[i]], ["target", target[i]]];
  const reading = state.pixel.length ? { row, col, values, label: mask[i], truth: truth ? truth[i] : null } : null;
  return { view, reading };
}

/** A map in [0, 1] as bytes. */
const toBytes = (map) => Uint8Array.from(map, (value) => Math.round(255 * Math.min(1, Math.max(0, value))));

const form = document.getElementById("smaf-controls");
const board = createBoard(document.getElementById("smaf-board"), {
  pixel: (pixel) => { state.pixel = pixel; redraw(); },
  image: (index) => { if (index >= 0 && index < DATA.images.length) choose(index); },
});
const lut = unpack(DATA.lut);

async function choose(index) {
  const image = DATA.images[index];
  Object.assign(state, { index, pixel: [] });
  if (image.likeliest.length || !image.label.includes(state.cls)) state.cls = image.label[0] ?? image.classes[0];
  form.elements.cls.replaceChildren(...image.classes.map((number) => new Option(image.class_names[number], number)));
  form.elements.cls.value = state.cls;
  board.setImages(DATA.images, index);
  await redraw();
}

/** Compute and draw; a later call overtakes an earlier one that still waits for its picture. */
async function redraw() {
  const index = state.index, image = await open(index);
  if (index !== state.index) return;
  try {
    const { view, reading } = compute(image), others = image.class_names.length - image.classes.length;
    board.setStatus([
      image.shrunk && "This image was shrunk for this page, and its numbers are of the shrunk one.",
      others && `${others} further classes, which are not in the image label and respond least, are left out here.`,
      isComputed() && `${state.fusion} is Python: its maps were made with this page, from all scales alike.`,
    ].filter(Boolean).join(" "), "");
    Object.assign(board, { look: { opacity: state.opacity, lut }, pixel: state.pixel, reading });
    board.setView(view);
  } catch (error) {
    board.setStatus(error.message, "error");
  }
}

function buildControls() {
  const menu = (name, text, options) => `<label><span>${text}</span><select name="${name}">${options.map(([value, title]) =>
    `<option value="${escapeHtml(String(value))}">${escapeHtml(title)}</option>`).join("")}</select></label>`;
  const slider = (name, text, most, step, least = 0) => `<label><span>${text}</span><input type="range" name="${name}" min="${least}"
    max="${most}" step="${step}"><output for="${name}"></output></label>`;
  const box = (name, text) => `<label class="box"><input type="checkbox" name="${name}">${text}</label>`;
  const roles = Object.keys(DATA.images[0].maps).map((role) => [role, role === "teacher" ? "classifier (teacher)" : role]);
  form.innerHTML = [
    menu("cls", "class", []), menu("role", "stage", roles), "<h3>scales and weights</h3>",
    ...DATA.scales.map((scale, s) => `<div class="scale">${box(`on_${s}`, `scale ${scale}`)}<input type="range" name="weight_${s}"
      min="0" max="2" step="0.1" aria-label="weight of scale ${scale}"><output></output></div>`),
    menu("fusion", "fusion rule", DATA.rules.map((rule) => [rule, rule])),
    slider("bg", "background", 0.98, 0.01, 0.01), `<div class="boxes">${box("denoise", "denoise")}${box("reactivate", "reactivate")}</div>`,
    slider("opacity", "opacity", 1, 0.05),
    `<button type="button" name="reset">reset</button>`,
  ].join("");
  const fields = form.elements;
  form.addEventListener("input", (event) => {
    // The slider has steps of 0.01: a run's threshold between them is kept until the slider is moved.
    if (event.target === fields.bg) state.bg = Number(fields.bg.value);
    Object.assign(state, { cls: Number(fields.cls.value), role: fields.role.value, fusion: fields.fusion.value,
      denoise: fields.denoise.checked, reactivate: fields.reactivate.checked, opacity: Number(fields.opacity.value),
      on: DATA.scales.map((_, s) => fields[`on_${s}`].checked), weights: DATA.scales.map((_, s) => Number(fields[`weight_${s}`].value)) });
    showValues();
    redraw();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  fields.reset.addEventListener("click", () => { Object.assign(state, start, { index: state.index, cls: -1 }); fill(); choose(state.index); });
  fill();
}

function fill() {
  const fields = form.elements;
  for (const name of ["role", "fusion", "bg", "opacity"]) fields[name].value = state[name];
  for (const name of ["denoise", "reactivate"]) fields[name].checked = state[name];
  DATA.scales.forEach((_, s) => { fields[`on_${s}`].checked = state.on[s]; fields[`weight_${s}`].value = state.weights[s]; });
  showValues();
}

function showValues() {
  DATA.scales.forEach((_, s) => { for (const name of [`on_${s}`, `weight_${s}`]) form.elements[name].disabled = isComputed(); });
  form.querySelectorAll("input[type=range]").forEach((input) => {
    input.parentElement.querySelector("output").textContent = input.name === "bg" ? state.bg : input.value;
  });
}

buildControls();
choose(state.index);

// In a frame the page tells how high it is, so that the frame can be made to fit; from a file neither may look into the other.
if (window.parent !== window) {
  const tell = () => window.parent.postMessage({ smafHeight: Math.ceil(document.body.getBoundingClientRect().height) }, "*");
  new ResizeObserver(tell).observe(document.body);
  // JupyterLab's theme can differ from the system's.
  try {
    const light = window.parent.document.body.dataset.jpThemeLight;
    if (light) document.documentElement.dataset.theme = light === "true" ? "light" : "dark";
  } catch { /* a report that was opened as a file: the system's theme is right */ }
}
