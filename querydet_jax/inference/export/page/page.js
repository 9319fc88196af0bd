// The page: pictures in, results drawn, settings. worker.js does the computing. Everything shown follows from `state`.

const $ = (id) => document.getElementById(id);
const RUNS = 5; // per method in a comparison of times

await isolate();
const model = await (await fetch("model.json")).json();
const methods = [...new Set([model.query, "dense"])];
const state = {
  picture: null, // {bitmap, width, height, net, canvas, name}
  result: null, // of the last run on it
  times: {}, // by method: {ms, runs}, on this picture
  method: model.query,
  threshold: model.threshold,
  score: null, // for all classes; null: each class its own
  view: "boxes",
  camera: null, // the running stream
  threads: 1, // that the worker uses
};

/** Load the page again by way of isolate.js, once, where that brings several threads. */
async function isolate() {
  try {
    if (crossOriginIsolated) return sessionStorage.removeItem("isolating");
    if (!navigator.serviceWorker || !(navigator.hardwareConcurrency > 1) || sessionStorage.getItem("isolating")) return;
    sessionStorage.setItem("isolating", "yes"); // a browser in which it fails must not load for ever
    await navigator.serviceWorker.register("isolate.js");
    await navigator.serviceWorker.ready;
  } catch {
    return; // private windows may refuse; the page says that it has one thread
  }
  location.reload();
  await new Promise(() => {});
}

/* The worker */

// From a blob, because a worker from a file would not be under this page's Content-Security-Policy.
const source = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
const waiting = new Map();
let number = 0;

worker.addEventListener("message", ({ data }) => {
  if (data.threads) return showThreads(data.threads);
  if (data.expected) return showProgress(data.loaded / data.expected);
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data.result);
});
worker.addEventListener("error", (event) => {
  showError(`the detector cannot start here (${event.message || "worker.js did not load"}); try a current browser`);
});

function ask(message, moved = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++number, { resolve, reject });
    worker.postMessage({ id: number, ...message }, moved);
  });
}

const run = (method, times = 1) => ask({ run: { method, threshold: state.threshold, times } });

/* What to do */

let turn = 0; // of the last thing asked for: results of earlier ones are dropped
let again = false; // a setting has changed while a run was on
let running = false;
let coming = null; // the camera's next picture: the last one stays until this one has its boxes

/** Show a picture (a Blob, or an ImageBitmap of the camera) and detect on it. */
async function look(picture, name) {
  const mine = ++turn;
  try {
    if (!state.camera) showStatus(`Opening ${name}`);
    const opened = await ask({ open: picture }, picture instanceof ImageBitmap ? [picture] : []);
    if (mine !== turn) return;
    coming = { ...opened, name };
    if (!state.camera) {
      state.times = {};
      showPicture();
      draw();
    }
    await detect();
  } catch (error) {
    if (mine === turn) showError(error.message);
  }
}

function showPicture() {
  if (!coming) return;
  state.picture?.bitmap.close();
  Object.assign(state, { picture: coming, result: null });
  coming = null;
}

async function detect() {
  if (!state.picture && !coming) return;
  again = running;
  if (running) return;
  running = true;
  const mine = turn;
  try {
    if (!state.camera) showStatus("Detecting");
    const result = await run(state.method);
    if (mine === turn) show(result);
  } catch (error) {
    if (mine === turn) showError(error.message);
  } finally {
    running = false;
  }
  if (again) await detect();
}

function show(result) {
  const [ms] = result.durations;
  showPicture();
  state.result = result;
  state.times[result.method] = { ms, runs: 1 };
  draw();
  const found = shown().length;
  showStatus(`${found || "No"} object${found === 1 ? "" : "s"} in ${Math.round(ms)} ms on ${threads()}`, "ready");
}

const threads = () => `${state.threads} thread${state.threads === 1 ? "" : "s"}`;

async function compare() {
  stopCamera();
  const mine = turn;
  const durations = Object.fromEntries(methods.map((method) => [method, []]));
  $("compare").disabled = true;
  try {
    for (let i = 0; i <= RUNS; i++) {
      for (const method of methods) {
        showStatus(i ? `Run ${i} of ${RUNS}, ${method === "dense" ? "dense" : method.toUpperCase()}` : "Warming up");
        const result = await run(method);
        if (mine !== turn) return;
        if (i) durations[method].push(result.durations[0]);
        if (method === state.method) state.result = result;
      }
    }
    for (const method of methods) {
      const sorted = durations[method].sort((a, b) => a - b);
      state.times[method] = { ms: sorted[RUNS >> 1], runs: RUNS };
    }
    draw();
    showStatus(`Medians of ${RUNS} runs each, in turns, on ${threads()}`, "ready");
  } catch (error) {
    if (mine === turn) showError(error.message);
  } finally {
    $("compare").disabled = false;
  }
}

async function toggleCamera() {
  if (state.camera) return stopCamera();
  try {
    state.camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return showError(`no camera (${error.message}); allow it for this page, or choose a picture`);
  }
  $("camera").textContent = "Stop camera";
  $("camera").setAttribute("aria-pressed", "true");
  const stream = state.camera;
  const video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
  state.times = {};
  try {
    await video.play();
    while (state.camera === stream) {
      if (!stream.active) throw new Error("the camera has stopped");
      await look(await createImageBitmap(video), "camera");
    }
  } catch (error) {
    if (state.camera === stream) showError(error.message);
  }
}

function stopCamera() {
  state.camera?.getTracks().forEach((track) => track.stop());
  state.camera = null;
  $("camera").textContent = "Camera";
  $("camera").setAttribute("aria-pressed", "false");
}

function take(files) {
  const file = [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
  if (!file) return showError("that was no picture; drop a file, or copy a picture and paste it");
  stopCamera();
  look(file, file.name);
}

/* Showing */

function showStatus(text, kind = "busy") {
  document.body.dataset.state = kind;
  $("status").setAttribute("aria-live", state.camera ? "off" : "polite"); // several times a second are too often
  $("status").textContent = text;
}

function showError(text) {
  stopCamera(); // whose next picture would end alike
  showStatus(text[0].toUpperCase() + text.slice(1), "error");
  $("progress").hidden = true;
}

function showThreads(count) {
  state.threads = count;
  const more = isSecureContext ? "this browser gives no more here" : "browsers give more over https or on localhost";
  $("about-Threads").textContent = count > 1 ? `${count}` : `1 (${more})`;
}

function showProgress(share) {
  $("progress").value = share;
  $("progress").hidden = share >= 1;
}

const minScore = (label) => Math.fround(state.score ?? model.min_scores[label]);
const shown = () => (state.result?.detections ?? []).filter(({ score, label }) => score >= minScore(label));
const colour = (label, alpha = 1) => `rgb(${model.colours[label].join(" ")} / ${alpha})`;

function draw() {
  drawStage();
  drawViews();
  fillTables();
  fillTimes();
}

function drawStage() {
  const { picture } = state;
  const canvas = $("picture");
  $("stage").classList.toggle("empty", !picture);
  if (!picture) return;
  const density = window.devicePixelRatio || 1;
  // The pictures to choose from, below, stay in sight.
  const tallest = Math.max(0.62 * window.innerHeight, 240);
  const width = Math.max(Math.min($("stage").clientWidth || 640, (tallest * picture.width) / picture.height), 1);
  canvas.style.width = `${width}px`;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round((canvas.width * picture.height) / picture.width);
  paint(canvas, state.view, density);
  const caption = views().find(({ key }) => key === state.view);
  $("caption").textContent = `${picture.name}, ${picture.width} x ${picture.height} px. ${caption?.long ?? ""}`;
  canvas.setAttribute("aria-label", `${picture.name}: ${summary() || "no objects"}`);
}

const summary = () =>
  model.classes
    .map((name, k) => [shown().filter(({ label }) => label === k).length, name])
    .filter(([count]) => count)
    .map(([count, name]) => `${count} ${name}`)
    .join(", ");

/** The pictures to choose from: boxes, and of the cascade the queries and cells of each level. */
function views() {
  const out = [{ key: "boxes", title: "Boxes", note: state.result ? `${shown().length} found` : "", long: "" }];
  const levels = state.result?.levels ?? {};
  for (const level of Object.keys(levels).map(Number).sort((a, b) => b - a)) {
    const { h, w, active, probability, stats } = levels[level];
    if (active) {
      const share = `${((100 * stats.active) / (h * w)).toFixed(1)} %`;
      const all = `${stats.active.toLocaleString("en")} of ${(h * w).toLocaleString("en")}`;
      const dense = stats.capacity === 0 && stats.active ? "; more than its buffers hold, so all were" : "";
      out.push({ key: `cells ${level}`, title: `P${level} cells`, note: `${share} computed`,
        long: `${all} cells of P${level} computed${dense}: orange where boxes are read, blue around them.` });
    }
    if (probability) {
      const count = probability.reduce((sum, p) => sum + (p > Math.fround(state.result.threshold)), 0);
      out.push({ key: `queries ${level}`, title: `P${level} queries`, note: `${count} above ${state.result.threshold}`,
        long: `How likely each cell of P${level} holds a small object; framed above the threshold.` });
    }
  }
  return out;
}

function drawViews() {
  const all = views();
  if (!all.some(({ key }) => key === state.view) && state.result) {
    state.view = "boxes";
    drawStage();
  }
  const group = $("views");
  while (group.children.length > all.length) group.lastChild.remove();
  all.forEach(({ key, title, note }, i) => {
    const button = group.children[i] ?? group.appendChild(newView());
    const [canvas, label] = button.children;
    button.dataset.view = key;
    button.setAttribute("aria-pressed", String(key === state.view));
    label.replaceChildren(title, document.createElement("br"), element("small", note));
    if (!state.picture) return;
    canvas.width = 200;
    canvas.height = Math.round((200 * state.picture.height) / state.picture.width);
    paint(canvas, key, 1, false);
  });
  group.hidden = all.length < 2 && !state.result;
}

function newView() {
  const button = element("button", document.createElement("canvas"), document.createElement("span"));
  button.type = "button";
  button.addEventListener("click", () => {
    state.view = button.dataset.view;
    draw();
  });
  return button;
}

function paint(canvas, view, density, labelled = true) {
  const context = canvas.getContext("2d");
  const [kind, level] = view.split(" ");
  context.imageSmoothingQuality = "high";
  context.drawImage(state.picture.bitmap, 0, 0, canvas.width, canvas.height);
  const maps = state.result?.levels[level];
  if (kind === "boxes") paintBoxes(context, density, labelled);
  else if (kind === "queries" && maps) paintQueries(context, maps, level, labelled ? density : 0);
  else if (maps) paintCells(context, maps, level);
}

/** Width and height of a level's cells in px of the drawing. Maps start at the upper left corner, as the picture does. */
function cellSize({ canvas }, level) {
  const { net } = state.picture;
  return [(canvas.width / net[1]) * 2 ** level, (canvas.height / net[0]) * 2 ** level];
}

function paintMap(context, { h, w }, level, colours, smooth) {
  const small = new OffscreenCanvas(w, h);
  small.getContext("2d").putImageData(new ImageData(colours, w, h), 0, 0);
  const [x, y] = cellSize(context, level);
  context.imageSmoothingEnabled = smooth;
  context.drawImage(small, 0, 0, w * x, h * y);
  context.imageSmoothingEnabled = true;
}

function paintQueries(context, maps, level, density) {
  const { h, w, probability } = maps;
  context.fillStyle = "rgb(0 0 0 / 0.45)";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  const colours = new Uint8ClampedArray(4 * h * w);
  probability.forEach((p, i) => {
    colours.set(model.heat[Math.round(p * (model.heat.length - 1))], 4 * i);
    colours[4 * i + 3] = 255 * 0.8 * Math.min(p / 0.4, 1) ** 0.7;
  });
  paintMap(context, maps, level, colours, true);
  if (!density) return; // too small for frames
  const [x, y] = cellSize(context, level);
  context.strokeStyle = "#fff";
  context.lineWidth = density;
  context.beginPath();
  probability.forEach((p, i) => {
    if (p > Math.fround(state.result.threshold)) context.rect((i % w) * x, Math.floor(i / w) * y, x, y);
  });
  context.stroke();
}

function paintCells(context, maps, level) {
  const colours = new Uint8ClampedArray(4 * maps.h * maps.w);
  maps.active.forEach((active, i) => {
    const is = maps.keys[i] ? [255, 176, 0, 110] : active ? [64, 156, 255, 80] : [0, 0, 0, 185];
    colours.set(is, 4 * i);
  });
  paintMap(context, maps, level, colours, false);
}

function paintBoxes(context, density, labelled) {
  const { canvas } = context;
  const scale = canvas.width / state.picture.width;
  const line = (labelled ? 2 : 1) * density;
  const boxes = shown().map((found) => ({ ...found, at: found.box.map((x) => x * scale) }));
  for (const { at: [x0, y0, x1, y1], label } of [...boxes].reverse()) {
    // Around the object, on a dark edge, so that small ones stay visible.
    for (const [style, wide] of [["rgb(0 0 0 / 0.5)", line + 2 * density], [colour(label), line]]) {
      context.strokeStyle = style;
      context.lineWidth = wide;
      context.strokeRect(x0 - line / 2, y0 - line / 2, x1 - x0 + line, y1 - y0 + line);
    }
  }
  if (labelled) paintLabels(context, boxes, density);
}

/** Write labels, best first, where they hide neither an object nor another label. */
function paintLabels(context, boxes, density) {
  const height = 15 * density;
  const taken = boxes.map(({ at }) => at);
  context.font = `600 ${11 * density}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  for (const { at, label, score } of boxes) {
    const text = `${model.classes[label]} ${score.toFixed(2)}`;
    const width = context.measureText(text).width + 6 * density;
    const left = Math.max(0, Math.min(at[0] - 2 * density, context.canvas.width - width));
    const places = [at[1] - 3 * density - height, at[3] + 3 * density];
    const top = places.find((y) => {
      const inside = y >= 0 && y + height <= context.canvas.height;
      return inside && !taken.some(([x0, y0, x1, y1]) => x0 < left + width && x1 > left && y0 < y + height && y1 > y);
    });
    if (top === undefined) continue;
    taken.push([left, top, left + width, top + height]);
    context.fillStyle = colour(label);
    context.fillRect(left, top, width, height);
    context.fillStyle = brightness(label) > 140 ? "#000" : "#fff";
    context.fillText(text, left + 3 * density, top + height / 2 + density / 2);
  }
}

const brightness = (label) => model.colours[label].reduce((sum, part, i) => sum + part * [0.3, 0.59, 0.11][i], 0);

function fillTables() {
  const found = shown();
  $("count").textContent = state.result ? `Found: ${found.length}` : "Found";
  $("classes").tBodies[0].replaceChildren(
    ...model.classes
      .map((name, k) => ({ name, k, count: found.filter(({ label }) => label === k).length }))
      .filter(({ count }) => count || model.classes.length <= 12)
      .map(({ name, k, count }) => row([swatch(k), name], state.result ? count : "", minScore(k).toFixed(2))),
  );
  $("boxes").tBodies[0].replaceChildren(
    ...found.map(({ box, score, label }) =>
      row([swatch(label), model.classes[label]], score.toFixed(3), ...box.map((x) => x.toFixed(1))),
    ),
  );
  $("score").value = state.score ?? Math.min(...model.min_scores);
  $("score-value").textContent = state.score === null ? "each class its own" : state.score.toFixed(2);
  $("threshold").value = state.threshold;
  $("threshold-value").textContent = state.threshold.toFixed(2);
  $("score-reset").disabled = state.score === null;
  $("threshold-reset").disabled = state.threshold === model.threshold;
}

function fillTimes() {
  for (const method of methods) {
    const time = state.times[method];
    $(`time-${method}`).textContent = time ? `${Math.round(time.ms)} ms` : "not run yet";
  }
  $("threshold-field").disabled = state.method === "dense";
  $("compare").hidden = methods.length < 2;
  const [fast, dense] = methods.map((method) => state.times[method]);
  $("ratio").textContent =
    fast && dense
      ? `${(dense.ms / fast.ms).toFixed(2)} times as fast as dense` +
        (fast.runs > 1 && dense.runs > 1 ? ` (medians of ${RUNS} runs)` : "; single runs, the first one is slow")
      : "";
}

function swatch(label) {
  const box = element("span");
  box.className = "swatch";
  box.style.background = colour(label);
  return box;
}

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function row(...cells) {
  return element("tr", ...cells.map((cell) => element("td", ...(Array.isArray(cell) ? cell : [cell]))));
}

/** Text with its addresses as links. */
function linked(text) {
  return text.split(/(https:\/\/[^\s<>()]*[^\s<>().,])/).map((part, i) => {
    if (i % 2 === 0) return part;
    const link = element("a", part);
    Object.assign(link, { href: part, rel: "noreferrer" });
    return link;
  });
}

/* The start */

function fill() {
  document.title = `QueryDet: ${model.name}`;
  $("name").textContent = `QueryDet: ${model.name}`;
  $("title").textContent = model.card?.title ?? `Detects ${model.classes.slice(0, 12).join(", ")}`;
  const says = {
    csq: ["CSQ", "looks closely only where small objects are likely"],
    cq: ["CQ", "looks closely at crops around likely places"],
    ccq: ["CCQ", "looks closely everywhere, counts likely places"],
    dense: ["Dense", "looks closely everywhere"],
  };
  for (const method of methods) {
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "method", value: method });
    input.checked = method === state.method;
    input.addEventListener("change", () => {
      state.method = method;
      fillTimes();
      detect();
    });
    const time = Object.assign(element("span"), { id: `time-${method}`, className: "time" });
    const note = Object.assign(element("span", says[method][1]), { className: "note" });
    $("choices").append(element("label", input, element("span", says[method][0]), time, note));
  }
  const { card, runtime } = model;
  const facts = card ? { Limits: card.limits, Licence: card.licence, Source: card.attribution } : {};
  facts["Runs on"] = `${runtime.name} ${runtime.version} (MIT licence, ort/LICENSE.txt)`;
  facts.Threads = "1";
  for (const [name, text] of Object.entries(facts)) {
    $("about").append(element("dt", name), Object.assign(element("dd", ...linked(text)), { id: `about-${name.replace(" ", "-")}` }));
  }
  for (const [i, file] of model.examples.entries()) {
    const image = Object.assign(new Image(), { src: file, alt: `Example ${i + 1}` });
    const button = Object.assign(element("button", image), { type: "button" });
    button.addEventListener("click", () => example(file));
    $("examples").append(button);
  }
  $("credits").hidden = !model.attribution;
  const plain = model.attribution.replace(/\[([^\]]*)\]\(([^)]*)\)/g, "$1 ($2)").replace(/[`>#]/g, "");
  $("attribution").append(...plain.split(/\n\s*\n/).map((text) => element("p", ...linked(text))));
}

async function example(file) {
  stopCamera();
  look(await (await fetch(file)).blob(), file.split("/").pop());
}

function listen() {
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files.length) take($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  });
  $("camera").addEventListener("click", toggleCamera);
  if (!navigator.mediaDevices) {
    $("camera").disabled = true;
    $("camera").title = "Browsers give pages a camera over https or on localhost only";
  }
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
  document.addEventListener("dragleave", () => $("stage").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("stage").classList.remove("over");
    take(event.dataTransfer.files);
  });
  $("compare").addEventListener("click", compare);
  $("threshold").addEventListener("input", () => setThreshold(Number($("threshold").value)));
  $("threshold-reset").addEventListener("click", () => setThreshold(model.threshold));
  $("score").addEventListener("input", () => setScore(Number($("score").value)));
  $("score-reset").addEventListener("click", () => setScore(null));
  new ResizeObserver(drawStage).observe($("stage"));
}

function setThreshold(value) {
  state.threshold = value;
  fillTables();
  detect();
}

function setScore(value) {
  state.score = value;
  draw();
}

fill();
listen();
worker.postMessage({ start: model });
draw();
if (model.examples.length) example(model.examples[0]);
else showStatus("Choose, drop or paste a picture", "ready");
