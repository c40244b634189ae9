/**
 * Runs the page's kernels, compares with float64 and draws.
 *
 * Invariant: `window.report` is set once everything is done or has failed, and says what the page says: `{ state, checks,
 * error }`; a check that is not within its bound makes the state `bad`, whatever else went well.
 */

import { deviceNeeds, EinfallError, Kernel } from "./einfall/index.js";

const element = (id) => document.getElementById(id);
const text = async (file) => {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
  return answer.text();
};
const short = (x) => (x === 0 ? "0" : x.toExponential(1));

function status(state, message) {
  element("status").dataset.state = state;
  element("status").textContent = message;
}

function rows(table, list) {
  element(table).replaceChildren(
    ...list.map((cells, i) => {
      const row = document.createElement("tr");
      cells.forEach((cell, j) => {
        const td = document.createElement(i === 0 && table === "results" ? "th" : "td");
        const { value, style } = typeof cell === "object" ? cell : { value: cell, style: j > 1 && table === "results" ? "number" : "" };
        td.textContent = value;
        td.className = style;
        row.append(td);
      });
      return row;
    }),
  );
}

/** [0, 1) in 24 bits, by the finaliser of MurmurHash3: the inputs of the recurrence, as reference.py has them. */
function hashed(n, seed) {
  const out = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    let h = (i + seed) >>> 0;
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    out[i] = ((h ^ (h >>> 16)) >>> 8) / 2 ** 24;
  }
  return out;
}

/** The largest difference from `expected`, which may be at most `bound`; what is no number differs without end. */
function check(name, got, expected, bound) {
  let most = got.length === expected.length ? 0 : Infinity;
  for (let i = 0; i < expected.length; i++) {
    const off = Math.abs(got[i] - expected[i]);
    if (!(off <= most)) most = Number.isNaN(off) ? Infinity : off;
  }
  return { name, most, bound, good: most <= bound };
}

/** One cascade: compiled, run on `inputs`, timed over several launches. */
async function run(device, name, sizes, inputs) {
  const manifest = JSON.parse(await text(`kernels/${name}.wgsl.json`));
  const bound = Kernel.load(device, manifest, (file) => text(`kernels/${file}`)).bind(sizes);
  const buffers = {};
  for (const { name: array, kind } of manifest.arrays.filter((a) => a.kind !== "workspace")) {
    buffers[array] = bound.buffer(array, kind === "output" ? undefined : inputs[array]);
  }
  let start = performance.now();
  const launches = await bound.prepare(buffers);
  const shader_ms = performance.now() - start;
  const times = [];
  for (let i = 0; i < 7; i++) {
    start = performance.now();
    launches.launch();
    await device.queue.onSubmittedWorkDone();
    times.push(performance.now() - start);
  }
  const outputs = {};
  for (const { name: array } of manifest.arrays.filter((a) => a.kind === "output")) {
    outputs[array] = await bound.read(array, buffers[array]);
  }
  return { outputs, shader_ms, first_ms: times[0], ms: times.slice(1).sort((a, b) => a - b)[3], kernels: launches.names.length };
}

/** A blue that grows brighter; readable without colour, as lightness alone says it. */
function shade(x) {
  const at = Math.sqrt(Math.min(Math.max(x, 0), 1));
  return `rgb(${Math.round(12 + 230 * at ** 1.6)}, ${Math.round(20 + 215 * at)}, ${Math.round(60 + 160 * at ** 0.7)})`;
}

function draw_heat(tokens, weights, head) {
  const canvas = element("heat");
  const g = canvas.getContext("2d");
  const ink = getComputedStyle(document.body).color;
  const n = tokens.length;
  const [left, top] = [100, 84];
  const cell = Math.floor(Math.min((canvas.width - left) / n, (canvas.height - top) / n));
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.font = "13px system-ui, sans-serif";
  g.textBaseline = "middle";
  let strongest = { weight: -1, row: 0, column: 0 };
  for (let row = 0; row < n; row++) {
    for (let column = 0; column < n; column++) {
      const weight = weights[(head * n + row) * n + column];
      if (weight > strongest.weight) strongest = { weight, row, column };
      g.fillStyle = shade(weight);
      g.fillRect(left + column * cell, top + row * cell, cell - 1, cell - 1);
    }
    g.fillStyle = ink;
    g.textAlign = "right";
    g.fillText(tokens[row], left - 6, top + (row + 0.5) * cell);
    g.save();
    g.translate(left + (row + 0.5) * cell, top - 6);
    g.rotate(-Math.PI / 3);
    g.textAlign = "left";
    g.fillText(tokens[row], 0, 0);
    g.restore();
  }
  const { weight, row, column } = strongest;
  element("heat-caption").textContent =
    `Head ${head + 1}. Dark is 0, bright is 1. Strongest: “${tokens[row]}” takes ${Math.round(100 * weight)} % from “${tokens[column]}”.`;
}

function draw_line(y, steps, channels, channel) {
  const canvas = element("line");
  const g = canvas.getContext("2d");
  let most = 0;
  for (let t = 0; t < steps; t++) most = Math.max(most, Math.abs(y[t * channels + channel]));
  const at = (t) => canvas.height / 2 - (y[t * channels + channel] / most) * (canvas.height / 2 - 4);
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.strokeStyle = "#8886";
  g.strokeRect(0.5, 0.5, canvas.width - 1, canvas.height - 1);
  g.beginPath();
  g.moveTo(0, canvas.height / 2);
  g.lineTo(canvas.width, canvas.height / 2);
  g.stroke();
  g.strokeStyle = "#3b6fd4";
  g.beginPath();
  for (let t = 0; t < steps; t++) g.lineTo((t / (steps - 1)) * canvas.width, at(t));
  g.stroke();
  element("line-caption").textContent =
    `Channel ${channel + 1} of ${channels} over all ${steps.toLocaleString("en")} steps; the frame is ±${most.toFixed(2)}.`;
}

/** What WebGPU, or this adapter, does not have that kernels elsewhere use. */
function lacks(adapter) {
  const list = [
    "64-bit integers and floats: counts beyond 2³¹ and i64 arrays are refused when a kernel is compiled.",
    "Asynchronous copies, tensor-core instructions and clusters: contractions are multiply-adds fed from workgroup memory.",
    "A promised size of subgroups: these kernels assume none and exchange through workgroup memory.",
    "f32 functions as exact as a processor's: exp and division are computed from arithmetic where WGSL promises less.",
  ];
  if (!adapter.features.has("shader-f16")) list.unshift("On this adapter: f16 arithmetic. Half-precision arrays are widened to f32 when they are read.");
  if (!adapter.features.has("timestamp-query")) list.unshift("On this adapter: timestamps, so that times here are the page's, not the GPU's.");
  return list;
}

async function main() {
  const [reference, derivation, source] = await Promise.all([
    text("reference.json").then(JSON.parse),
    text("derivation.txt"),
    text("page.ein"),
  ]);
  element("derivation").textContent = derivation.trim();
  element("source").textContent = source.trim();
  element("sentence").textContent = reference.sentence;
  const { attention, recurrence, tokens } = reference;
  element("recurrence-size").textContent =
    `${recurrence.steps.toLocaleString("en")} steps for ${recurrence.channels} channels`;
  if (!("gpu" in navigator)) {
    throw new EinfallError(
      window.isSecureContext
        ? "This browser has no WebGPU. Chrome and Edge have it since version 113, Safari since 26, Firefox since 141 on Windows."
        : "WebGPU needs a secure page: open this one from https:// or from localhost.",
    );
  }
  const adapter = await navigator.gpu.requestAdapter();
  if (adapter === null) {
    throw new EinfallError("WebGPU is there, but it offers no adapter: no GPU, or its driver is blocked (see chrome://gpu).");
  }
  const { info, limits } = adapter;
  const software = /swiftshader|llvmpipe|lavapipe/i.test(`${info.architecture} ${info.device} ${info.description}`);
  const slow = software ? ": no GPU but this machine's processor, so that times say nothing of one" : "";
  rows("device", [
    ["Adapter", [info.vendor, info.architecture, info.device, info.description].filter(Boolean).join(" · ") + slow || "not named"],
    ["Workgroups", `up to ${limits.maxComputeInvocationsPerWorkgroup} invocations with ${limits.maxComputeWorkgroupStorageSize / 1024} KiB of shared memory`],
    ["Arrays", `up to ${limits.maxStorageBuffersPerShaderStage} a kernel, of ${Math.floor(limits.maxStorageBufferBindingSize / 2 ** 20)} MiB`],
  ]);
  element("lacks").replaceChildren(
    ...lacks(adapter).map((what) => Object.assign(document.createElement("li"), { textContent: what })),
  );
  const manifests = await Promise.all(
    ["attention", "recurrence"].map((n) => text(`kernels/${n}.wgsl.json`).then(JSON.parse)),
  );
  const needs = manifests.map((m) => deviceNeeds(m, adapter));
  const requiredLimits = {};
  for (const [name, n] of needs.flatMap((d) => Object.entries(d.requiredLimits))) {
    requiredLimits[name] = Math.max(requiredLimits[name] ?? 0, n);
  }
  const requiredFeatures = [...new Set(needs.flatMap((d) => [...d.requiredFeatures]))];
  const device = await adapter.requestDevice({ requiredLimits, requiredFeatures });
  let fault = null;
  device.onuncapturederror = (e) => (fault ??= e.error.message);

  const checks = [];
  const results = [["Kernel", "Largest difference (allowed)", "Shader", "First launch", "Launch", "Kernels"]];
  const report = (what, done, of) => {
    checks.push(...of);
    const good = of.every((c) => c.good);
    const said = of.map((c) => `${short(c.most)} (${short(c.bound)})`).join(", ");
    const verdict = { value: `${said} ${good ? "agrees" : "DIFFERS"}`, style: good ? "good" : "bad" };
    const ms = (x) => `${x.toFixed(x < 10 ? 2 : 0)} ms`;
    results.push([what, verdict, ms(done.shader_ms), ms(done.first_ms), ms(done.ms), String(done.kernels)]);
    rows("results", results);
  };

  status("busy", "Recurrence: compiling and running …");
  const { steps, channels, every } = recurrence;
  const keep = Float32Array.from(hashed(steps * channels, 1), (u) => 0.9 + 0.0999 * u);
  const x = Float32Array.from(hashed(steps * channels, 7_000_003), (u) => 2 * u - 1);
  const rnn = await run(device, "recurrence", { T: steps, D: channels }, { keep, x, h0: new Float32Array(channels) });
  const kept = recurrence.y.map((_, i) => rnn.outputs.y[((Math.floor(i / channels) + 1) * every - 1) * channels + (i % channels)]);
  report("Recurrence", rnn, [check("recurrence", kept, recurrence.y, recurrence.bound.y)]);
  draw_line(rnn.outputs.y, steps, channels, 0);

  const arrays = Object.fromEntries(["Q", "K", "V"].map((n) => [n, Float32Array.from(attention[n])]));
  const sizes = { H: attention.heads, M: tokens.length, N: tokens.length, E: attention.width };
  status("busy", "Attention: compiling and running … (a software GPU takes its time here)");
  const one = await run(device, "attention", sizes, arrays);
  report("Attention, in one pass", one, [check("attention", one.outputs.O, attention.O, attention.bound.O)]);
  // Attention never stores its weights. Where the value of token n is the n-th unit vector, they are what comes out.
  const n = tokens.length;
  const { heads: count, width } = attention;
  const V = Float32Array.from({ length: count * n * width }, (_, i) => (i % width === Math.floor(i / width) % n ? 1 : 0));
  const two = await run(device, "attention", sizes, { ...arrays, V });
  const weights = Float32Array.from({ length: count * n * n }, (_, i) => two.outputs.O[Math.floor(i / n) * width + (i % n)]);
  report("The same on unit vectors: weights", two, [check("weights", weights, attention.A, attention.bound.A)]);

  const heads = Array.from({ length: attention.heads }, (_, i) => new Option(String(i + 1), String(i)));
  element("head").replaceChildren(...heads);
  element("head").onchange = (e) => draw_heat(tokens, weights, Number(e.target.value));
  // Most heads rest on the marks at the ends of a sentence; the one to begin with is sharpest among words.
  const words = Array.from({ length: count }, (_, h) => {
    let sum = 0;
    for (let row = 1; row < n - 1; row++) for (let column = 1; column < n - 2; column++) sum += weights[(h * n + row) * n + column] ** 2;
    return sum;
  });
  const first = words.indexOf(Math.max(...words));
  element("head").value = String(first);
  draw_heat(tokens, weights, first);
  if (fault !== null) throw new Error(fault);
  const wrong = checks.filter((c) => !c.good);
  if (wrong.length > 0) status("bad", `${wrong.map((c) => c.name).join(" and ")} differ from float64 by more than float32 may.`);
  else status("good", "All results agree with float64.");
  return { state: wrong.length > 0 ? "bad" : "good", checks, adapter: `${info.vendor} ${info.architecture}` };
}

main().then(
  (report) => (window.report = report),
  (e) => {
    status("bad", e instanceof EinfallError ? e.message : `It did not work: ${e.message}`);
    window.report = { state: "bad", checks: [], error: e.message };
  },
);
