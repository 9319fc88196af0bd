// Pictures to detections, off the page's thread. Decoding, resizing and padding are those of querydet_jax/data, so the
// page finds what Python finds. One message is answered at a time: {id, open | run} gives {id, result} or {id, error}.

import * as ort from "./ort/ort.wasm.min.mjs";

let model; // model.json
let shared; // promise of the tensors that all programs share, with ONNX Runtime's program loaded
let picture; // what `open` has made: {pixels, sizes, canvas, net, width, height}
const sessions = new Map(); // promises, by method and canvas
let queue = Promise.resolve();

self.addEventListener("message", ({ data }) => {
  if (data.start) return start(data.start);
  queue = queue.then(async () => {
    try {
      const { result, moved = [] } = data.open ? await open(data.open) : await run(data.run);
      self.postMessage({ id: data.id, result }, moved);
    } catch (error) {
      self.postMessage({ id: data.id, error: error.message || String(error) });
    }
  });
});

function start(given) {
  model = given;
  const folder = new URL("./ort/", import.meta.url).href;
  ort.env.wasm.wasmPaths = folder;
  // Threads share memory, which browsers allow only to pages that are isolated from other origins.
  const threads = self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.numThreads = threads;
  self.postMessage({ threads });
  const runtime = download(folder + model.runtime.wasm, model.runtime.bytes);
  shared = Promise.all([runtime, download(model.weights.file, model.weights.bytes)]).then(([binary, weights]) => {
    ort.env.wasm.wasmBinary = binary.buffer;
    return unpack(weights);
  });
  shared.catch(() => {}); // whoever waits for it reports it, and so below
  session(model.query, model.canvases[0]).catch(() => {});
}

/* Files */

let loaded = 0;
let expected = 0;

async function download(url, bytes) {
  expected += bytes;
  const response = await fetch(new URL(url, import.meta.url));
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}; export the page again`);
  const data = new Uint8Array(bytes);
  const reader = response.body.getReader();
  for (let at = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) {
      if (at !== bytes) throw new Error(`${url}: cut short or of another export; export the page again`);
      return data;
    }
    if (at + value.length > bytes) throw new Error(`${url}: of another export; export the page again`);
    data.set(value, at);
    at += value.length;
    loaded += value.length;
    self.postMessage({ loaded, expected });
  }
}

/** Return the weights as float32: first those that are stored as float16 without loss, then the others. */
function unpack(stored) {
  const { float16, float32 } = model.weights;
  const halves = new Uint16Array(stored.buffer, 0, float16);
  const all = new Float32Array(float16 + float32);
  const values = new Float32Array(65536).map((_, bits) => ofHalf(bits));
  for (let i = 0; i < float16; i++) all[i] = values[halves[i]];
  new Uint8Array(all.buffer, 4 * float16).set(stored.subarray(2 * float16));
  return new Uint8Array(all.buffer);
}

function ofHalf(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits & 0x8000 ? -size : size;
}

function session(method, [height, width]) {
  const name = `${method}_${height}x${width}`;
  if (!sessions.has(name)) {
    const { file, bytes } = model.programs[name];
    const opened = Promise.all([download(file, bytes), shared]).then(([program, data]) =>
      ort.InferenceSession.create(program, {
        executionProviders: ["wasm"],
        externalData: [{ path: model.weights.file, data }],
        logSeverityLevel: 3,
      }),
    );
    sessions.set(name, opened);
    opened.catch(() => sessions.delete(name)); // the next try starts anew
  }
  return sessions.get(name);
}

/* Pictures */

async function open(source) {
  const bitmap = source instanceof Blob ? await decode(source) : source;
  const { width, height } = bitmap;
  const { test_short, test_max, max_pixels } = model.preprocessing;
  if (max_pixels && width * height > max_pixels)
    throw new Error(`${width} x ${height} px are more than the ${max_pixels.toLocaleString("en")} that are allowed`);
  const net = resizeShape(height, width, test_short, test_max);
  const canvas = chooseCanvas(net, model.canvases);
  if (!canvas)
    throw new Error(`${width} x ${height} px would be resized to ${net[1]} x ${net[0]}, which fits no canvas`);
  const rgb = resize(pixelsOf(bitmap), height, width, ...net);
  const pixels = new Uint8Array(canvas[0] * canvas[1] * 3);
  for (let y = 0; y < net[0]; y++)
    pixels.set(rgb.subarray(y * net[1] * 3, (y + 1) * net[1] * 3), y * canvas[1] * 3);
  picture = { pixels, net, canvas, width, height };
  return { result: { bitmap, width, height, net, canvas }, moved: [bitmap] };
}

async function decode(blob) {
  try {
    return await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    if (blob.size === 0) throw new Error("the file is empty; give a JPEG, PNG or WebP");
    const usual = /^image\/(jpeg|png|webp|gif|bmp)$/.test(blob.type);
    const kind = usual ? "it is damaged, or not what its name says" : blob.type || "it does not look like one";
    throw new Error(`this browser cannot read the file as a picture (${kind}); give a JPEG, PNG or WebP`);
  }
}

function pixelsOf(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("the picture is too large for this browser");
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const rgb = new Uint8Array(bitmap.width * bitmap.height * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    rgb[j++] = rgba[i];
    rgb[j++] = rgba[i + 1];
    rgb[j++] = rgba[i + 2];
  }
  return rgb;
}

/** As `resize_shape` in data/transforms.py, operation by operation. */
export function resizeShape(h, w, short, maximum) {
  let scale = short / Math.min(h, w);
  let [nh, nw] = h < w ? [short, scale * w] : [scale * h, short];
  if (Math.max(nh, nw) > maximum) {
    scale = maximum / Math.max(nh, nw);
    [nh, nw] = [nh * scale, nw * scale];
  }
  return [Math.max(Math.trunc(nh + 0.5), 1), Math.max(Math.trunc(nw + 0.5), 1)];
}

/** The smallest canvas that holds the picture, the first of equal ones. */
export function chooseCanvas([height, width], canvases) {
  const fits = canvases.filter(([h, w]) => height <= h && width <= w);
  return fits.sort((a, b) => a[0] * a[1] - b[0] * b[1])[0];
}

/** Resize RGB [h, w, 3] to [nh, nw, 3] as Pillow's BILINEAR does: first along rows, then columns, both rounded. */
export function resize(rgb, h, w, nh, nw) {
  const wide = nw === w ? rgb : alongAxis(rgb, h, w, nw, 3);
  return nh === h ? wide : alongAxis(wide, 1, h, nh, nw * 3);
}

const BITS = 22; // of the weights' fractions, as in Pillow

/** Resize the middle axis of [outer, size, inner] to `count`: a triangle as wide as the step, at least 1. */
function alongAxis(from, outer, size, count, inner) {
  const step = size / count;
  const reach = Math.max(step, 1);
  const out = new Uint8Array(outer * count * inner);
  const sums = new Int32Array(inner);
  for (let i = 0; i < count; i++) {
    const center = (i + 0.5) * step;
    const first = Math.max(Math.trunc(center - reach + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach + 0.5), size);
    const shares = [];
    for (let x = first; x < end; x++) shares.push(Math.max(1 - Math.abs((x - center + 0.5) / reach), 0));
    const whole = shares.reduce((sum, share) => sum + share, 0);
    const fixed = shares.map((share) => Math.trunc(0.5 + (share / whole) * 2 ** BITS));
    for (let o = 0; o < outer; o++) {
      sums.fill(1 << (BITS - 1));
      for (let k = 0; k < fixed.length; k++) {
        const at = (o * size + first + k) * inner;
        for (let c = 0; c < inner; c++) sums[c] += from[at + c] * fixed[k];
      }
      const to = (o * count + i) * inner;
      for (let c = 0; c < inner; c++) out[to + c] = Math.min(sums[c] >> BITS, 255);
    }
  }
  return out;
}

/* Detection */

async function run({ method, threshold, times }) {
  const { pixels, net, canvas } = picture;
  const detect = await session(method, canvas);
  const inputs = {
    images: new ort.Tensor("uint8", pixels, [1, ...canvas, 3]),
    sizes: new ort.Tensor("int32", Int32Array.from(net), [1, 2]),
  };
  if (detect.inputNames.includes("threshold"))
    inputs.threshold = new ort.Tensor("float32", Float32Array.of(threshold), []);
  const durations = [];
  let found;
  for (let i = 0; i < times; i++) {
    const begun = performance.now();
    found = await detect.run(inputs);
    durations.push(performance.now() - begun);
  }
  return { result: { method, threshold, durations, detections: inOriginal(found), levels: levelsOf(found) } };
}

/** Boxes in px of the picture, clipped to it, without empty ones: as `rescale_to_original` in data/transforms.py. */
function inOriginal({ boxes, scores, classes, valid }) {
  const { net, width, height } = picture;
  const scale = [Math.fround(width / net[1]), Math.fround(height / net[0])];
  const list = [];
  for (let i = 0; i < valid.data.length; i++) {
    if (!valid.data[i]) continue;
    const box = [0, 1, 2, 3].map((k) => {
      const value = Math.fround(boxes.data[4 * i + k] * scale[k % 2]);
      return Math.min(Math.max(value, 0), k % 2 ? height : width);
    });
    if (box[2] > box[0] && box[3] > box[1]) list.push({ box, score: scores.data[i], label: classes.data[i] });
  }
  return list;
}

/** {level: {h, w, probability, keys, active, stats}} from outputs `maps.4.probability`, `stats.3.active` and so on. */
function levelsOf(found) {
  const levels = {};
  for (const [name, tensor] of Object.entries(found)) {
    const [kind, number, field] = name.split(".");
    if (kind !== "maps" && kind !== "stats") continue;
    const level = (levels[number] ??= { stats: {} });
    if (kind === "stats") level.stats[field] = Number(tensor.data[0]);
    else {
      [, level.h, level.w] = tensor.dims;
      level[field] = tensor.data.slice();
    }
  }
  return levels;
}
