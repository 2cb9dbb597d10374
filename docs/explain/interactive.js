"use strict";

// ---- Arithmetic: models/retinanet.py in JavaScript ------------------------------------------
// A test compares it with the Python. Anchors and IoU are rounded to 32 bits after every
// operation, as there, so that equal overlaps are equal here too.

const BACKGROUND = -1, IGNORED = -2;
const f32 = Math.fround;

/** Return all anchors, xyxy one after the other, level by level, row by row. */
function makeAnchors(levels) {
  const values = [];
  for (const {rows, columns, spacing: [across, down], base} of levels)
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++)
        for (const [x1, y1, x2, y2] of base)
          values.push(x1 + column * across, y1 + row * down,
                      x2 + column * across, y2 + row * down);
  return Float32Array.from(values);
}

/** Return the IoU of a box with every anchor. */
function pairwiseIou(box, anchors) {
  const [x1, y1, x2, y2] = box.map(f32);
  const area = f32(f32(x2 - x1) * f32(y2 - y1));
  const iou = new Float32Array(anchors.length / 4);
  for (let i = 0, k = 0; i < iou.length; i++, k += 4) {
    const width = f32(Math.min(x2, anchors[k + 2]) - Math.max(x1, anchors[k]));
    const height = f32(Math.min(y2, anchors[k + 3]) - Math.max(y1, anchors[k + 1]));
    if (width <= 0 || height <= 0) continue;
    const other = f32(f32(anchors[k + 2] - anchors[k]) * f32(anchors[k + 3] - anchors[k + 1]));
    const overlap = f32(width * height);
    iou[i] = overlap / f32(f32(area + other) - overlap);
  }
  return iou;
}

/** Assign each anchor to a box by the four rules: the index of a box, -1 or -2. */
function assign(anchors, boxes, assigner, fg = DATA.fg, bg = DATA.bg) {
  const count = anchors.length / 4;
  const best = new Float32Array(count);
  const box = new Int32Array(count);
  const claimedBy = new Int32Array(count).fill(-1);
  boxes.forEach((one, number) => {
    const iou = pairwiseIou(one, anchors);
    const peak = iou.reduce((a, b) => Math.max(a, b), 0);
    for (let i = 0; i < count; i++) {
      if (iou[i] > best[i]) { best[i] = iou[i]; box[i] = number; }
      if (iou[i] === peak) claimedBy[i] = number;
    }
  });
  const matched = new Int32Array(count).fill(IGNORED);                      // rule 1
  for (let i = 0; i < count; i++) {
    if (best[i] < f32(bg)) matched[i] = BACKGROUND;                         // rule 2
    if (best[i] >= f32(fg)) matched[i] = box[i];                            // rule 3
    if (claimedBy[i] >= 0)                                                  // rule 4
      matched[i] = assigner === "max-iou" ? claimedBy[i] : box[i];
  }
  return matched;
}

/** Return the code (dx, dy, dw, dh) that turns an anchor into a box. */
function encode(box, anchor) {
  const size = [box[2] - box[0], box[3] - box[1]];
  const anchorSize = [anchor[2] - anchor[0], anchor[3] - anchor[1]];
  const shift = [0, 1].map(
    (k) => (box[k] + size[k] / 2 - anchor[k] - anchorSize[k] / 2) / anchorSize[k]);
  return [...shift, ...[0, 1].map((k) => Math.log(size[k] / anchorSize[k]))];
}

/** Return the focal loss of a logit and its derivative. */
function focal(logit, isThere, alpha, gamma) {
  const sign = isThere ? -1 : 1, weight = isThere ? alpha : 1 - alpha;
  const wrong = 1 / (1 + Math.exp(-sign * logit));  // the probability of the wrong answer
  const entropy = Math.log1p(Math.exp(sign * logit));  // -log of that of the right one
  const scale = weight * wrong ** gamma;
  return {loss: scale * entropy, slope: sign * scale * (wrong + gamma * (1 - wrong) * entropy)};
}

/** Return which detections stay: NMS within each class, of what scores more than `threshold`. */
function nonMaximumSuppression(candidates, threshold, maxIou) {
  const {boxes, scores, labels} = candidates;
  const order = [...scores.keys()].filter((i) => scores[i] > threshold);
  order.sort((a, b) => scores[b] - scores[a] || a - b);
  const kept = [];
  for (const i of order) {
    const rivals = kept.filter((j) => labels[j] === labels[i]).flatMap((j) => boxes[j]);
    if (pairwiseIou(boxes[i], Float32Array.from(rivals)).every((v) => v <= f32(maxIou))) kept.push(i);
  }
  return {above: order.length, kept};
}

// ---- Page -------------------------------------------------------------------------------------

const COLOURS = ["#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7"];
const TEXT = {
  en: {
    cell: (level, row, column, sizes) =>
      `${level}, row ${row}, column ${column}. Nine anchors, width × height: ${sizes}.`,
    best: (level, size, iou) => `Best anchor: ${level}, ${size} px, IoU ${iou}.`,
    rule3: (n) => `Rule 3 decides: ${n} anchors have an IoU from 0.5 and are foreground.`,
    rule4: (n) => `Rule 4 decides: no anchor reaches 0.5, so the box claims its best, ${n} anchors.`,
    both: (n) => `The box has ${n} anchors; another box has the anchors that it overlaps most.`,
    lost: "The box has no anchor: it claims one that another box overlaps more.",
    between: (n) => `${n} anchors lie between 0.4 and 0.5 for this box alone: ignored.`,
    code: (code) => `Code of the best anchor (dx, dy, dw, dh): ${code}.`,
    focal: (absent, present, less) => `At p = 0.01: gradient ${absent} for an absent class, ` +
      `${present} for a present one; cross entropy has 0.01 and −0.99. ` +
      `The absent class is pushed ${less} times less.`,
    detections: (above, kept) => `${above} candidates score more; ${kept} are left after NMS.`,
    lossAxes: ["loss", "probability of the right answer"],
    slopeAxes: ["gradient: absent class (blue), present (orange)", "logit"],
  },
  zh: {
    cell: (level, row, column, sizes) =>
      `${level}，第 ${row} 行，第 ${column} 列。九个锚框（宽 × 高）：${sizes}。`,
    best: (level, size, iou) => `最佳锚框：${level}，${size} 像素，交并比 ${iou}。`,
    rule3: (n) => `由规则 3 决定：${n} 个锚框的交并比达到 0.5，成为前景。`,
    rule4: (n) => `由规则 4 决定：没有锚框达到 0.5，这个框认领最佳的 ${n} 个锚框。`,
    both: (n) => `这个框有 ${n} 个锚框；与它重叠最多的锚框归了另一个框。`,
    lost: "这个框没有锚框：它认领的锚框与另一个框重叠更多。",
    between: (n) => `只看这个框，${n} 个锚框介于 0.4 与 0.5 之间，被忽略。`,
    code: (code) => `最佳锚框的编码 (dx, dy, dw, dh)：${code}。`,
    focal: (absent, present, less) => `p = 0.01 时：不存在的类梯度为 ${absent}，存在的类为 ` +
      `${present}；交叉熵为 0.01 和 −0.99。不存在的类受到的梯度只有后者的 ${less} 分之一。`,
    detections: (above, kept) => `${above} 个候选超过阈值；NMS 之后剩 ${kept} 个。`,
    lossAxes: ["损失", "正确答案的概率"],
    slopeAxes: ["梯度：不存在的类（蓝）、存在的类（橙）", "logit"],
  },
};

const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const signed = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(4);
const plain = (v) => (v < 0 ? "−" : "") + Number(Math.abs(v).toPrecision(3)).toString();
const anchors = makeAnchors(DATA.levels);
const state = {
  language: navigator.language.startsWith("zh") ? "zh" : "en",
  point: [DATA.width / 2, DATA.height / 2],
  box: [420, 300, 640, 480],
};
const say = (name, ...values) => {
  const text = TEXT[state.language][name];
  return typeof text === "function" ? text(...values) : text;
};

function anchorAt(index) { return [...anchors.subarray(4 * index, 4 * index + 4)]; }

function levelOf(index) {
  for (const level of DATA.levels) {
    const count = level.rows * level.columns * level.base.length;
    if (index < count) return level;
    index -= count;
  }
}

const sizeOf = ([x1, y1, x2, y2]) => `${Math.round(x2 - x1)} × ${Math.round(y2 - y1)}`;

/** Clear a canvas, draw its picture, and return what draws boxes of the picture's pixels. */
function start(canvas, image, width, height) {
  const pen = canvas.getContext("2d");
  const zoom = canvas.width / width;
  const unit = canvas.width / (canvas.clientWidth || canvas.width);  // a pixel of the page
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (image.complete) pen.drawImage(image, 0, 0, width * zoom, height * zoom);
  return (box, colour, thickness = 1.5, dashes = []) => {
    pen.strokeStyle = colour;
    pen.lineWidth = thickness * unit;
    pen.setLineDash(dashes.map((length) => length * unit));
    const [x1, y1, x2, y2] = box.map((v) => v * zoom);
    pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
  };
}

function pictureOf(source) {
  const image = new Image();
  image.onload = drawAll;
  image.src = source;
  return image;
}

function drawAnchors() {
  const number = Number(document.querySelector("input[name=level]:checked").value);
  const level = DATA.levels[number];
  const [across, down] = level.spacing;
  const column = clamp(Math.round(state.point[0] / across), 0, level.columns - 1);
  const row = clamp(Math.round(state.point[1] / down), 0, level.rows - 1);
  const outline = start(byId("anchors"), scene, DATA.width, DATA.height);
  const shift = [column * across, row * down, column * across, row * down];
  level.base.forEach((base, kind) =>
    outline(base.map((v, k) => v + shift[k]), COLOURS[Math.floor(kind / 3)]));
  byId("anchors-text").textContent =
    say("cell", level.name, row, column, level.base.map(sizeOf).join(", "));
}

function drawBox() {
  const others = byId("others").checked ? DATA.boxes : [];
  const boxes = [...others, state.box], own = boxes.length - 1;
  const matched = assign(anchors, boxes, document.querySelector("[name=assigner]:checked").value);
  const iou = pairwiseIou(state.box, anchors);
  const best = iou.indexOf(iou.reduce((a, b) => Math.max(a, b), 0));
  const outline = start(byId("box"), scene, DATA.width, DATA.height);
  others.forEach((box) => outline(box, "#ffffff"));
  let mine = 0, fits = 0, between = 0;
  matched.forEach((value, i) => {
    between += iou[i] >= f32(DATA.bg) && iou[i] < f32(DATA.fg);
    if (value !== own) return;
    mine++;
    fits += iou[i] >= f32(DATA.fg);
    if (mine <= 60) outline(anchorAt(i), COLOURS[0], 0.7);
  });
  outline(anchorAt(best), "#000000", 2.5, [6, 4]);
  outline(state.box, "#ffffff", 6);
  outline(state.box, COLOURS[2], 3);
  const handle = state.box.slice(2), r = 9;
  outline([handle[0] - r, handle[1] - r, handle[0] + r, handle[1] + r], COLOURS[2], 3);
  const rule = mine === 0 ? "lost" : matched[best] !== own ? "both" : fits ? "rule3" : "rule4";
  byId("box-text").textContent = [
    say("best", levelOf(best).name, sizeOf(anchorAt(best)), iou[best].toFixed(3)),
    say(rule, mine),
    say("between", between),
    say("code", encode(state.box, anchorAt(best)).map(signed).join(", ")),
  ].join(" ");
}

/** Plot lines: each has a colour, dashes and points (x, y); `y` is on a log scale if `isLog`. */
function plot(canvas, lines, [x0, x1], [y0, y1], isLog, [title, below]) {
  const pen = canvas.getContext("2d"), {width, height} = canvas;
  const ink = getComputedStyle(document.body).color;
  const left = 70, bottom = 60, top = 40;
  const scale = isLog ? Math.log10 : (v) => v;
  const toX = (x) => left + (x - x0) / (x1 - x0) * (width - left - 10);
  const toY = (y) => height - bottom
    - (scale(clamp(y, y0, y1)) - scale(y0)) / (scale(y1) - scale(y0)) * (height - bottom - top);
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = pen.strokeStyle = ink;
  pen.font = "20px system-ui, sans-serif";
  pen.setLineDash([]);
  pen.lineWidth = 1;
  pen.strokeRect(left, top, width - left - 10, height - bottom - top);
  pen.fillText(title, left, 26);
  pen.textAlign = "center";
  pen.fillText(below, (left + width) / 2, height - 8);
  for (let k = 0; k <= 4; k++) pen.fillText(plain(x0 + (x1 - x0) * k / 4), toX(x0 + (x1 - x0) * k / 4), height - 34);
  pen.textAlign = "right";
  const ticks = isLog ? [1e-6, 1e-4, 1e-2, 1] : [0, 1, 2, 3, 4, 5];
  for (const y of ticks) pen.fillText(isLog ? y.toExponential(0).replace("-", "−") : y, left - 8, toY(y) + 7);
  pen.textAlign = "left";
  for (const {colour, dashes, points} of lines) {
    pen.strokeStyle = colour;
    pen.lineWidth = 3;
    pen.setLineDash(dashes);
    pen.beginPath();
    points.forEach(([x, y], k) => pen[k ? "lineTo" : "moveTo"](toX(x), toY(y)));
    pen.stroke();
  }
}

function drawFocal() {
  const gamma = Number(byId("gamma").value), alpha = Number(byId("alpha").value);
  byId("gamma-value").textContent = gamma.toFixed(1);
  byId("alpha-value").textContent = alpha.toFixed(2);
  const steps = [...Array(201).keys()];
  const p = steps.map((k) => 0.001 + 0.998 * k / 200);
  plot(byId("loss"), [
    {colour: COLOURS[0], dashes: [8, 6], points: p.map((v) => [v, -Math.log(v)])},
    {colour: COLOURS[1], dashes: [], points: p.map((v) => [v, -((1 - v) ** gamma) * Math.log(v)])},
  ], [0, 1], [0, 5], false, say("lossAxes"));
  const logits = steps.map((k) => -8 + 16 * k / 200);
  const lines = [false, true].flatMap((isThere) => {
    const colour = COLOURS[isThere ? 0 : 1];
    const slope = (x) => Math.abs(focal(x, isThere, alpha, gamma).slope);
    const entropy = (x) => 1 / (1 + Math.exp(isThere ? x : -x));
    return [
      {colour, dashes: [], points: logits.map((x) => [x, slope(x)])},
      {colour, dashes: [8, 6], points: logits.map((x) => [x, entropy(x)])},
    ];
  });
  plot(byId("slope"), lines, [-8, 8], [1e-7, 1], true, say("slopeAxes"));
  const prior = Math.log(DATA.prior / (1 - DATA.prior));
  const absent = focal(prior, false, alpha, gamma).slope;
  const present = focal(prior, true, alpha, gamma).slope;
  const less = absent ? Math.round(DATA.prior / absent).toLocaleString("en") : "∞";
  byId("focal-text").textContent = say("focal", plain(absent), plain(present), less);
}

function drawDetections() {
  const score = Number(byId("score").value), maxIou = Number(byId("nms").value);
  byId("score-value").textContent = score.toFixed(2);
  byId("nms-value").textContent = maxIou.toFixed(2);
  const {above, kept} = nonMaximumSuppression(DATA.candidates, score, maxIou);
  const canvas = byId("detections"), pen = canvas.getContext("2d");
  const {width, height, boxes, scores, labels, names} = DATA.candidates;
  const outline = start(canvas, photo, width, height);
  pen.font = "22px system-ui, sans-serif";
  for (const i of kept.slice(0, DATA.detections).reverse()) {
    const colour = COLOURS[labels[i] % COLOURS.length];
    outline(boxes[i], colour, 2);
    if (kept.length > 12) continue;
    const text = `${names[labels[i]]} ${scores[i].toFixed(2)}`;
    const zoom = canvas.width / width;
    const x = boxes[i][0] * zoom, y = Math.max(boxes[i][1] * zoom, 26);
    pen.fillStyle = "#ffffff";
    pen.fillRect(x, y - 26, pen.measureText(text).width + 8, 26);
    pen.fillStyle = "#000000";
    pen.fillText(text, x + 4, y - 6);
  }
  byId("detections-text").textContent = say("detections", above, kept.length);
}

function drawAll() {
  drawAnchors();
  drawBox();
  drawFocal();
  drawDetections();
}

function setLanguage(language) {
  state.language = language;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-zh]")) {
    element.dataset.en ??= element.innerHTML;
    element.innerHTML = element.dataset[language];
  }
  drawAll();
}

/** Return where a pointer is, in pixels of the scene. */
function pointOf(event) {
  const area = event.currentTarget.getBoundingClientRect();
  return [(event.clientX - area.left) / area.width * DATA.width,
          (event.clientY - area.top) / area.height * DATA.height];
}

const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

function moveCell(event) {
  if (!ARROWS[event.key]) return;
  event.preventDefault();
  const {spacing} = DATA.levels[document.querySelector("input[name=level]:checked").value];
  const limits = [DATA.width, DATA.height];
  state.point = state.point.map((v, k) => clamp(v + spacing[k] * ARROWS[event.key][k], 0, limits[k]));
  drawAnchors();
}

/** Move the box, or its lower right corner, and keep it in the image and at least 6 px large. */
function moveBox(dx, dy, isResizing) {
  const [x1, y1, x2, y2] = state.box;
  if (isResizing)
    state.box = [x1, y1, clamp(x2 + dx, x1 + 6, DATA.width), clamp(y2 + dy, y1 + 6, DATA.height)];
  else {
    dx = clamp(dx, -x1, DATA.width - x2);
    dy = clamp(dy, -y1, DATA.height - y2);
    state.box = [x1 + dx, y1 + dy, x2 + dx, y2 + dy];
  }
  requestAnimationFrame(drawBox);
}

function listen() {
  const cells = byId("anchors"), canvas = byId("box");
  cells.addEventListener("pointermove", (event) => { state.point = pointOf(event); drawAnchors(); });
  cells.addEventListener("pointerdown", (event) => { state.point = pointOf(event); drawAnchors(); });
  cells.addEventListener("keydown", moveCell);
  let last = null, isResizing = false;
  canvas.addEventListener("pointerdown", (event) => {
    last = pointOf(event);
    // A finger is thicker than a pointer: 24 pixels of the page around the corner.
    const reach = 24 * DATA.width / canvas.clientWidth;
    isResizing = Math.hypot(last[0] - state.box[2], last[1] - state.box[3]) < reach;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const point = pointOf(event);
    moveBox(point[0] - last[0], point[1] - last[1], isResizing);
    last = point;
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => { last = null; });
  canvas.addEventListener("keydown", (event) => {
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    moveBox(...ARROWS[event.key].map((v) => 4 * v), event.shiftKey);
  });
  for (const input of document.querySelectorAll("input[name=level]"))
    input.addEventListener("input", drawAnchors);
  for (const input of document.querySelectorAll("input[name=assigner], #others"))
    input.addEventListener("input", drawBox);
  for (const id of ["gamma", "alpha"]) byId(id).addEventListener("input", drawFocal);
  for (const id of ["score", "nms"]) byId(id).addEventListener("input", drawDetections);
  byId("language").addEventListener("click",
    () => setLanguage(state.language === "en" ? "zh" : "en"));
  addEventListener("resize", drawAll);
}

const scene = pictureOf(DATA.image), photo = pictureOf(DATA.candidates.image);
listen();
setLanguage(state.language);
