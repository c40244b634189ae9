// Runs compiled cascades through the loader on Dawn and whatever Vulkan driver the environment names.
//
//   node launch.mjs JOBS.json
//
// JOBS.json is a list of { manifest, sizes, scalars, inputs: { name: file }, outputs: { name: file } or null }; files hold
// the bytes of arrays. Every variant of every kernel goes through the front end, whether the sizes choose it or not;
// without outputs, nothing is run. Prints the adapter, then one line of JSON per job: { "error": text or null, "ms": time }.

import { readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { create, globals } from "webgpu";
import { deviceNeeds, Kernel } from "../dist/index.js";

Object.assign(globalThis, globals);
const TYPES = { f32: Float32Array, tf32: Float32Array, i32: Int32Array, f16: Uint16Array, bf16: Uint16Array, i8: Int8Array };

// Dawn's objects end when nothing refers to them, in use or not.
globalThis.gpu = create([]);
const first = await globalThis.gpu.requestAdapter();
if (first === null) {
  console.log("no adapter");
  process.exit(0);
}
console.log(`${first.info.device} ${first.info.description}`);

async function run(job) {
  const manifest = JSON.parse(await readFile(job.manifest, "utf8"));
  // An adapter makes one device.
  const adapter = (globalThis.adapter = await globalThis.gpu.requestAdapter());
  const device = (globalThis.device = await adapter.requestDevice(deviceNeeds(manifest, adapter)));
  try {
    let uncaptured = null;
    device.onuncapturederror = (e) => (uncaptured ??= e.error.message);
    const text = (file) => readFile(join(dirname(job.manifest), file), "utf8");
    for (const { shader } of manifest.kernels.flat()) {
      const module = device.createShaderModule({ code: await text(shader) });
      const [wrong] = (await module.getCompilationInfo()).messages.filter((m) => m.type === "error");
      if (wrong) throw new Error(`${shader}:${wrong.lineNum}: ${wrong.message}`);
    }
    if (job.outputs === null) return;
    const bound = Kernel.load(device, manifest, text).bind(job.sizes);
    const buffers = {};
    for (const { name, kind, dtype } of manifest.arrays.filter((a) => a.kind !== "workspace")) {
      if (kind === "output") {
        // Outputs are full of NaNs before.
        buffers[name] = bound.buffer(name);
        device.queue.writeBuffer(buffers[name], 0, new Uint8Array(buffers[name].size).fill(0xff));
        continue;
      }
      const bytes = new Uint8Array(await readFile(job.inputs[name]));
      const Type = TYPES[dtype] ?? Uint8Array;
      buffers[name] = bound.buffer(name, new Type(bytes.buffer, 0, bytes.byteLength / Type.BYTES_PER_ELEMENT));
    }
    (await bound.prepare(buffers, job.scalars)).launch();
    for (const [name, file] of Object.entries(job.outputs)) {
      const a = await bound.read(name, buffers[name]);
      await writeFile(file, new Uint8Array(a.buffer, a.byteOffset, a.byteLength));
    }
    if (uncaptured !== null) throw new Error(uncaptured);
  } finally {
    device.destroy();
  }
}

for (const job of JSON.parse(await readFile(process.argv[2], "utf8"))) {
  const start = performance.now();
  const error = await run(job).then(() => null, (e) => String(e?.message ?? e));
  console.log(JSON.stringify({ error, ms: Math.round(performance.now() - start) }));
}
process.exit(0);
