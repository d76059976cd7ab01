// The picture of the explorer: panels, IoU, curve and the values of one pixel. The widget (numbers from Python) and the page
// without a kernel (numbers from explorer_page.js) draw with this code, and look alike.
"use strict";

const VOID = 255, LIKELY = 0.1; // as in models/imagenet.py

/** Build an empty board in `root`. `on.pixel([row, col] | [])` and `on.image(index)` are called with the reader's choice. */
function createBoard(root, on) {
  root.classList.add("smaf-board");
  root.innerHTML = `
    <div class="smaf-strip" role="group" aria-label="images"></div>
    <div class="smaf-panels" tabindex="0" role="group"
      aria-label="panels; click a pixel, move it with the arrow keys, Shift for larger steps, Escape removes it;
      Page Up and Page Down change the image"></div>
    <p class="smaf-status" role="status" aria-live="polite"></p>
    <div class="smaf-below">
      <section class="smaf-iou" aria-label="IoU against the ground truth"></section>
      <section class="smaf-curve" aria-label="IoU over the background threshold"></section>
      <section class="smaf-reading" aria-label="values of the marked pixel" aria-live="polite"></section>
    </div>`;
  const part = (name) => root.querySelector(`.smaf-${name}`);
  const panels = part("panels");
  const board = { view: null, look: { opacity: 0.75, lut: null }, pixel: [], reading: null, drawn: 0 };

  panels.addEventListener("click", (event) => {
    event.target.closest("button")?.closest("figure").classList.toggle("smaf-large");
    const canvas = event.target.closest("canvas");
    if (!canvas || !board.view) return;
    const box = canvas.getBoundingClientRect(), [height, width] = board.view.size;
    const cell = (at, length, count) => Math.min(count - 1, Math.max(0, Math.floor((at / length) * count)));
    on.pixel([cell(event.clientY - box.top, box.height, height), cell(event.clientX - box.left, box.width, width)]);
  });
  panels.addEventListener("keydown", (event) => {
    if (!board.view) return;
    const step = event.shiftKey ? 8 : 1, [height, width] = board.view.size;
    const [row, col] = board.pixel.length ? board.pixel : [height >> 1, width >> 1];
    const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
    const within = (value, count) => Math.min(count - 1, Math.max(0, value));
    if (moves[event.key]) {
      const [down, right] = board.pixel.length ? moves[event.key] : [0, 0];
      on.pixel([within(row + down, height), within(col + right, width)]);
    } else if (event.key === "Escape") on.pixel([]);
    else if (event.key === "PageDown") on.image(board.index + 1);
    else if (event.key === "PageUp") on.image(board.index - 1);
    else if (on.decide && !event.repeat && event.target === panels && ["Enter", "Delete"].includes(event.key)) on.decide(event.key);
    else return;
    event.preventDefault();
  });

  /** The strip of thumbnails: `images` are {name, thumb}. */
  board.setImages = (images, index) => {
    board.index = index;
    const strip = part("strip");
    if (strip.childElementCount !== images.length || board.images !== images) {
      board.images = images;
      strip.replaceChildren(...images.map(({ name, thumb }, number) => {
        const button = document.createElement("button");
        button.type = "button";
        button.title = name;
        button.style.backgroundImage = `url(${thumb})`;
        button.setAttribute("aria-label", `image ${name}`);
        button.addEventListener("click", () => on.image(number));
        return button;
      }));
    }
    [...strip.children].forEach((button, number) => button.setAttribute("aria-pressed", String(number === index)));
    strip.scrollTop = (strip.children[index]?.offsetTop ?? 0) - strip.clientHeight / 2 + 27; // the middle of a thumbnail
  };
  // Wide enough: the numbers are beside the panels, and everything fits on one screen.
  const arrange = () => {
    root.classList.toggle("smaf-wide", root.clientWidth >= 765);
    // Rows of equal length, of panels that are at least 240 pixels wide.
    const count = Math.max(1, panels.childElementCount);
    const most = Math.max(1, Math.min(6, Math.floor((panels.clientWidth + 10) / 250))), rows = Math.ceil(count / most);
    panels.style.gridTemplateColumns = `repeat(${Math.ceil(count / rows)}, minmax(0, 420px))`;
  };
  new ResizeObserver(arrange).observe(root);
  /**
   * What to draw: size [H, W], image (RGB bytes), truth (labels or null), class_names, colors (RGB), class_number (shown),
   * erased (whether the shown class is absent from the image label), likeliest [[name, probability], ...],
   * scales, weights, rule, denoise, reactivate, crf (a note), a byte per pixel in maps (of each scale), fused, target, mask;
   * iou (by label, with nulls) and curve {scores, ious, at: [score, iou], note}, both null without ground truth.
   */
  board.setView = (view) => { board.view = { ...view, panels: panelsOf(view) }; draw(); };
  /** How to draw: opacity in [0, 1] and a table of 256 RGB colours. */
  board.setLook = (look) => { board.look = look; draw(); };
  /** The marked pixel and, once it is known, what its values are. */
  board.setPixel = (pixel, reading) => {
    board.pixel = pixel;
    board.reading = reading;
    drawMarkers();
    part("reading").innerHTML = readingHtml(reading, board.view);
    root.dataset.drawn = ++board.drawn;
  };
  board.setStatus = (text, kind) => {
    part("status").textContent = text;
    part("status").dataset.kind = kind;
  };

  function draw() {
    const view = board.view;
    if (!view || !board.look.lut) return;
    // JupyterLab would take arrow keys for itself and select the next cell.
    (root.closest(".smaf-explorer") ?? root).setAttribute("data-lm-suppress-shortcuts", "true");
    const count = view.panels.length;
    if (panels.childElementCount !== count) {
      panels.replaceChildren(...view.panels.map(() => {
        const figure = document.createElement("figure");
        figure.innerHTML = "<figcaption><button type='button' title='enlarge' aria-label='enlarge'>⤢</button> <span></span></figcaption><div><canvas></canvas><svg></svg></div>";
        return figure;
      }));
      arrange();
    }
    const edges = view.truth ? outlinePath(view.truth, view.size) : null;
    view.panels.forEach((panel, number) => {
      const figure = panels.children[number];
      figure.dataset.key = panel.key;
      figure.classList.toggle("smaf-off", Boolean(panel.off));
      figure.querySelector("figcaption").title = `${panel.key} ${panel.note}`;
      figure.querySelector("figcaption > span").innerHTML = `<b>${panel.key}</b> <span>${escapeHtml(panel.note)}</span>`;
      paint(figure.querySelector("canvas"), panel, view, board.look);
      if (figure.drawnEdges === edges && figure.drawnSize === String(view.size)) return;
      Object.assign(figure, { drawnEdges: edges, drawnSize: String(view.size) });
      const [height, width] = view.size;
      const svg = figure.querySelector("svg");
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.innerHTML = (edges
        ? `<path class="smaf-halo" d="${edges}"/><path class="smaf-edge" d="${edges}"/>` : "") + `<g></g>`;
    });
    drawMarkers();
    part("iou").innerHTML = iouHtml(view);
    part("curve").innerHTML = curveHtml(view);
    part("reading").innerHTML = readingHtml(board.reading, view);
    root.dataset.drawn = ++board.drawn;
  }

  function drawMarkers() {
    if (!board.view) return;
    const [height, width] = board.view.size, radius = Math.max(height, width) / 28;
    const [row, col] = board.pixel.map((value) => value + 0.5);
    const ring = (kind) => `<circle class="${kind}" cx="${col}" cy="${row}" r="${radius}"/>`;
    const dot = `<circle class="smaf-dot" cx="${col}" cy="${row}" r="${radius / 6}"/>`;
    panels.querySelectorAll("svg g").forEach((group) => {
      group.innerHTML = board.pixel.length ? ring("smaf-halo") + ring("smaf-mark") + dot : "";
    });
  }
  return board;
}

/** The panels of a view, in the order of the method: {key, note, kind, data, off}. */
function panelsOf(view) {
  const scales = view.scales.map((scale, s) => {
    const weight = view.weights[s], note = !weight ? "off" : weight === 1 ? "" : `x ${Number(weight.toPrecision(6))}`;
    return { key: `scale ${scale}`, note, kind: "map", data: view.maps[s], off: !weight || view.erased };
  });
  return [
    { key: "image", note: view.truth ? "+ ground truth" : "", kind: "image" },
    ...scales,
    { key: "fused", note: view.erased ? "not in the image label" : view.rule + (view.denoise ? "" : ", not denoised"), kind: "map", data: view.fused },
    { key: "target", note: view.reactivate ? "reactivated" : "not reactivated", kind: "map", data: view.target },
    { key: "mask", note: view.crf, kind: "labels", data: view.mask },
  ];
}

function paint(canvas, { kind, data }, { size: [height, width], image, colors }, { lut, opacity }) {
  const pixels = new ImageData(width, height), out = pixels.data;
  for (let i = 0; i < height * width; i++) {
    const grey = (image[3 * i] + image[3 * i + 1] + image[3 * i + 2]) / 3, value = data ? data[i] : 0;
    const color = kind === "labels" && value > 0 && value !== VOID ? colors[value - 1] : null;
    for (let c = 0; c < 3; c++) {
      const under = kind === "map" ? grey : image[3 * i + c], over = kind === "map" ? lut[3 * value + c] : color ? color[c] : under;
      out[4 * i + c] = (1 - opacity) * under + opacity * over;
    }
    out[4 * i + 3] = 255;
  }
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The border between the labels of a mask as an SVG path along the edges of pixels; void counts as background. */
function outlinePath(mask, [height, width]) {
  const label = (row, col) => { const value = mask[row * width + col]; return value === VOID ? 0 : value; };
  const steps = [];
  for (let row = 0; row < height; row++) {
    for (let col = 0; col < width; col++) {
      if (col && label(row, col) !== label(row, col - 1)) steps.push(`M${col} ${row}v1`);
      if (row && label(row, col) !== label(row - 1, col)) steps.push(`M${col} ${row}h1`);
    }
  }
  return steps.join("");
}

/** The IoU of each label; without ground truth, what the network takes the image for. */
function iouHtml(view) {
  const head = `<h3>IoU of the mask</h3>`;
  if (!view.iou) {
    const present = [...new Set(view.mask)].filter((label) => label > 0 && label !== VOID).sort((one, other) => one - other);
    const legend = present.map((label) => `<span class="smaf-class"><i style="background:rgb(${view.colors[label - 1].join(",")})"></i>` +
      `${escapeHtml(view.class_names[label - 1])}</span>`).join(" ");
    const inMask = `<p>No ground truth for this image. In the mask: ${legend || "background alone"}.</p>`;
    if (!view.likeliest.length) return head + inMask;
    const rows = view.likeliest.map(([name, share], k) =>
      barRow(name, share, `${(100 * share).toFixed(1)} %`, `rgb(${view.colors[k].join(",")})`, `data-likely="${escapeHtml(name)}"`));
    const doubt = view.likeliest[0][1] < LIKELY ? "<p><b>Nothing is likely here.</b></p>" : "";
    return `<h3>Likeliest of 1000 classes <span>probability</span></h3>${doubt}<table>${rows.join("")}</table>${inMask}`;
  }
  const rows = view.iou.map((value, number) => {
    if (value === null) return "";
    const name = number ? view.class_names[number - 1] : "background";
    const color = number ? `rgb(${view.colors[number - 1].join(",")})` : "transparent";
    return barRow(name, value, `${(100 * value).toFixed(1)} %`, color, `data-label="${escapeHtml(name)}"`);
  });
  const mean = meanOf(view.iou);
  const last = barRow("mean", mean, `${(100 * mean).toFixed(1)} %`, null, 'data-label="mean" class="smaf-mean"');
  return `${head}<table>${rows.join("")}${last}</table>`;
}

function barRow(name, share, text, color, attributes) {
  const swatch = color === null ? "" : `<i style="background:${color}"></i>`;
  return `<tr ${attributes}><th scope="row">${swatch}${escapeHtml(name)}</th>
    <td class="smaf-bar"><span style="width:${(100 * Math.min(1, share)).toFixed(1)}%"></span></td><td>${text}</td></tr>`;
}

function meanOf(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function curveHtml({ curve, class_number, class_names }) {
  if (!curve) return "";
  const box = { left: 40, top: 12, width: 252, height: 130 };
  const x = (score) => box.left + score * box.width, y = (iou) => box.top + (1 - iou) * box.height;
  const line = (values, kind) => {
    let pen = "M";
    const steps = values.map((value, i) => {
      if (value === null) { pen = "M"; return ""; }
      const step = `${pen}${x(curve.scores[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
      return step;
    });
    return `<path class="${kind}" d="${steps.join("")}"/>`;
  };
  const [at, here] = curve.at, label = class_number + 1, shown = here[label], mean = meanOf(here);
  const dot = (value, kind) => (value === null ? "" : `<circle class="${kind}" cx="${x(at)}" cy="${y(value)}" r="6"/>`);
  const ticks = [0, 0.5, 1].map((tick) => `<path class="smaf-grid" d="M${x(0)} ${y(tick)}H${x(1)}"/>
    <text x="${box.left - 8}" y="${y(tick) + 5}" text-anchor="end">${100 * tick}</text>
    <text x="${x(tick)}" y="${box.top + box.height + 20}" text-anchor="middle">${tick}</text>`);
  const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
  return `<h3>IoU by background threshold${curve.note ? ` <span>${escapeHtml(curve.note)}</span>` : ""}</h3>
    <svg viewBox="0 0 306 186" role="img" aria-label="IoU over the background threshold, before the CRF">${ticks.join("")}
      <path class="smaf-now" d="M${x(at)} ${y(0)}V${y(1)}"/>${line(curve.ious.map(meanOf), "smaf-line-mean")}
      ${line(curve.ious.map((iou) => iou[label]), "smaf-line")}
      ${dot(mean, "smaf-dot-mean")}${dot(shown, "smaf-dot-shown")}
      <text x="${x(0.5)}" y="${box.top + box.height + 38}" text-anchor="middle">background threshold (IoU in %)</text></svg>
    <p class="smaf-key" data-at="${at}"><span class="smaf-key-shown">${escapeHtml(class_names[class_number])} ${percent(shown)}</span>
      <span class="smaf-key-mean">mean ${percent(mean)}</span></p>`;
}

/** reading: {row, col, values: [[name, value in [0, 1]]], label, truth}, the scales' values first. */
function readingHtml(reading, view) {
  const head = `<h3>One pixel</h3>`;
  if (!reading || !view) return `${head}<p>Click into a panel: what does each scale say there?</p>`;
  const rows = reading.values.map(([name, value], s) =>
    barRow(name, value, value.toFixed(3), null, `data-value="${name}"${view.weights[s] === 0 ? ' class="smaf-off"' : ""}`));
  const name = (label) => (label === VOID ? "void" : label ? view.class_names[label - 1] : "background");
  const truth = reading.truth === null ? "" : `, ground truth <b data-truth>${escapeHtml(name(reading.truth))}</b>`;
  return `${head}<p>row ${reading.row}, column ${reading.col}: mask <b data-mask>${escapeHtml(name(reading.label))}</b>${truth}.
    Scores of <b>${escapeHtml(view.class_names[view.class_number])}</b>:</p><table>${rows.join("")}</table>`;
}

function escapeHtml(text) {
  return String(text).replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
}
