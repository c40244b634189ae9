/**
 * Loads and launches kernels that einfall compiled to WGSL, in a browser or wherever there is a `GPUDevice`.
 *
 * ```ts
 * const adapter = (await navigator.gpu.requestAdapter())!;
 * const device = await adapter.requestDevice(deviceNeeds(manifest, adapter));
 * const softmax = await Kernel.load(device, manifest, (file) => fetch(file).then((r) => r.text()));
 * const { y } = await softmax.bind({ M: 2, N: 3 }).run({ x: new Float32Array(6) });
 * ```
 *
 * Invariant: whatever a caller gives wrong, or a device lacks, is an `EinfallError` before anything is launched.
 */

import { EinfallError, evaluate, extent, rounded, type Scope } from "./expression.js";
import type { ArraySpec, Condition, DType, Manifest, Variant } from "./manifest.js";

export { EinfallError } from "./expression.js";
export type * from "./manifest.js";

/** Elements of an array: numbers, or the bits of types that JavaScript does not have (f16, bf16, f8e4m3, f8e5m2). */
export type Elements = Float32Array | Int32Array | Uint16Array | Int8Array | Uint8Array;

/** Extents, elements and workgroups are below this: kernels count with 31 bits. */
const MOST = 2 ** 31;
/** Bindings are whole vectors of four words. */
const ITEM_BYTES = 16;

interface Storage {
  readonly bytes: number;
  readonly make: (buffer: ArrayBuffer) => Elements;
}

function storage(dtype: DType): Storage {
  switch (dtype) {
    case "f32":
    case "tf32":
      return { bytes: 4, make: (b) => new Float32Array(b) };
    case "i32":
      return { bytes: 4, make: (b) => new Int32Array(b) };
    case "f16":
    case "bf16":
      return { bytes: 2, make: (b) => new Uint16Array(b) };
    case "i8":
      return { bytes: 1, make: (b) => new Int8Array(b) };
    case "f8e4m3":
    case "f8e5m2":
    case "u8":
    case "bool":
      return { bytes: 1, make: (b) => new Uint8Array(b) };
  }
}

const LIMITS = [
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupStorageSize",
  "maxStorageBuffersPerShaderStage",
] as const;

/** What a device offers, or an adapter could. */
export interface Capabilities {
  readonly features: { has(feature: string): boolean };
  readonly limits: GPUSupportedLimits;
  /** `subgroupMinSize` where it is known. */
  readonly info?: GPUAdapterInfo;
}

function checked(manifest: Manifest): Manifest {
  const { format, version } = manifest ?? {};
  if (format !== "einfall.wgsl" || version !== 1) {
    throw new EinfallError(`the manifest is of form ${format} ${version}, not einfall.wgsl 1: compile it again`);
  }
  return manifest;
}

/** What a device or adapter lacks for the kernels, a sentence each; empty where nothing. */
export function missing(manifest: Manifest, device: Capabilities): string[] {
  const found: string[] = [];
  for (const { entry, needs } of checked(manifest).kernels.flat()) {
    for (const limit of LIMITS) {
      const most = device.limits[limit];
      if (needs[limit] > most) found.push(`kernel ${entry} needs ${limit} ${needs[limit]}; the device has ${most}`);
    }
    if (needs.subgroup <= 1) continue;
    const least = device.info?.subgroupMinSize ?? 0;
    if (!device.features.has("subgroups")) found.push(`kernel ${entry} needs the feature subgroups`);
    else if (least < needs.subgroup) {
      found.push(`kernel ${entry} needs subgroups of at least ${needs.subgroup}; the device's least is ${least}`);
    }
  }
  return found;
}

/** What to ask `requestDevice` for: the features and limits of the kernels, and arrays as large as the adapter allows. */
export function deviceNeeds(manifest: Manifest, adapter: Capabilities): GPUDeviceDescriptor {
  const lacking = missing(manifest, adapter);
  if (lacking.length > 0) throw new EinfallError(lacking.join("; "));
  const variants = manifest.kernels.flat();
  const requiredLimits: Record<string, number> = {};
  for (const limit of LIMITS) requiredLimits[limit] = Math.max(...variants.map((v) => v.needs[limit]), 1);
  for (const limit of ["maxStorageBufferBindingSize", "maxBufferSize"] as const) {
    requiredLimits[limit] = adapter.limits[limit];
  }
  const subgroups = variants.some((v) => v.needs.subgroup > 1);
  return { requiredLimits, requiredFeatures: subgroups ? ["subgroups" as GPUFeatureName] : [] };
}

/** A compiled cascade on a device. Pipelines are made when sizes first choose them. */
export class Kernel {
  readonly #pipelines = new Map<Variant, Promise<GPUComputePipeline>>();

  private constructor(
    readonly device: GPUDevice,
    readonly manifest: Manifest,
    private readonly shader: (file: string) => Promise<string> | string,
  ) {}

  /** Checks what the device offers. `shader` gives the text of a file that the manifest names. */
  static load(device: GPUDevice, manifest: Manifest, shader: (file: string) => Promise<string> | string): Kernel {
    const info = (device as { adapterInfo?: GPUAdapterInfo }).adapterInfo;
    const lacking = missing(manifest, { features: device.features, limits: device.limits, ...(info && { info }) });
    if (lacking.length > 0) throw new EinfallError(lacking.join("; "));
    return new Kernel(device, manifest, shader);
  }

  /** Fixes the extents of all ranks that the text leaves open. */
  bind(sizes: Readonly<Record<string, number>>): Bound {
    return new Bound(this, sizes);
  }

  /** @internal */
  pipeline(variant: Variant): Promise<GPUComputePipeline> {
    let made = this.#pipelines.get(variant);
    if (made === undefined) {
      made = this.#make(variant);
      this.#pipelines.set(variant, made);
      // What failed may be asked for again: a file that was not there, a device that was busy.
      made.catch(() => this.#pipelines.delete(variant));
    }
    return made;
  }

  async #make(variant: Variant): Promise<GPUComputePipeline> {
    const { device } = this;
    const label = variant.entry;
    const module = device.createShaderModule({ label, code: await this.shader(variant.shader) });
    const wrong = (await module.getCompilationInfo()).messages.filter((m) => m.type === "error");
    if (wrong.length > 0) {
      throw new EinfallError(`${variant.shader}: ${wrong.map((m) => `${m.lineNum}: ${m.message}`).join("; ")}`);
    }
    const visibility = 4; // GPUShaderStage.COMPUTE
    const entries: GPUBindGroupLayoutEntry[] = [{ binding: 0, visibility, buffer: { type: "uniform" } }];
    variant.bindings.forEach((b, i) => {
      const type = b.access === "read" ? "read-only-storage" : "storage";
      entries.push({ binding: i + 1, visibility, buffer: { type } });
    });
    const group = device.createBindGroupLayout({ label, entries });
    const layout = device.createPipelineLayout({ label, bindGroupLayouts: [group] });
    return device.createComputePipelineAsync({ label, layout, compute: { module, entryPoint: variant.entry } });
  }
}

/** A cascade at fixed sizes. */
export class Bound {
  readonly #sizes = new Map<string, number>();
  readonly #shapes = new Map<string, readonly number[]>();

  /** @internal */
  constructor(
    readonly kernel: Kernel,
    sizes: Readonly<Record<string, number>>,
  ) {
    const { manifest, device } = kernel;
    for (const name of Object.keys(sizes)) {
      if (!manifest.ranks.some((r) => r.name === name)) {
        throw new EinfallError(`${manifest.name} has no rank ${name}; its ranks are ${manifest.ranks.map((r) => r.name).join(", ")}`);
      }
    }
    for (const { name, extent: fixed } of manifest.ranks) {
      const n = sizes[name] ?? fixed;
      if (n === undefined) throw new EinfallError(`the rank ${name} of ${manifest.name} has no size`);
      if (fixed !== undefined && n !== fixed) throw new EinfallError(`the rank ${name} is ${fixed} in the kernels, not ${n}`);
      if (!Number.isInteger(n) || n < 0 || n >= MOST) throw new EinfallError(`the rank ${name} is ${n}; it is an integer from 0 to 2^31 - 1`);
      this.#sizes.set(name, n);
    }
    for (const a of manifest.arrays) {
      const shape = a.shape.map((e) => extent(e, this.#scope({})));
      const elements = shape.reduce((x, y) => x * y, 1);
      if (elements >= MOST) throw new EinfallError(`${a.name} has ${elements} elements; kernels count to 2^31 - 1`);
      const bytes = buffer_bytes(a, elements);
      for (const limit of ["maxStorageBufferBindingSize", "maxBufferSize"] as const) {
        const most = device.limits[limit];
        if (bytes > most) throw new EinfallError(`${a.name} has ${bytes} bytes: ${limit} of the device is ${most}`);
      }
      this.#shapes.set(a.name, shape);
    }
  }

  #scope(scalars: Readonly<Record<string, number>>, depth = 0): Scope {
    const { manifest } = this.kernel;
    const scalar = (name: string): number => {
      const spec = manifest.scalars.find((s) => s.name === name);
      const given = scalars[name];
      if (given !== undefined) return rounded(given, spec?.dtype ?? "f32");
      if (spec?.default === undefined || depth > 64) throw new EinfallError(`the scalar ${name} of ${manifest.name} has no value`);
      return rounded(evaluate(spec.default, this.#scope(scalars, depth + 1)), spec.dtype);
    };
    return { rank: (name) => this.#sizes.get(name) ?? NaN, scalar };
  }

  #spec(name: string): ArraySpec {
    const spec = this.kernel.manifest.arrays.find((a) => a.name === name && a.kind !== "workspace");
    if (spec === undefined) throw new EinfallError(`${this.kernel.manifest.name} has no array ${name}`);
    return spec;
  }

  /** The extents of an array. */
  shape(name: string): readonly number[] {
    return this.#shapes.get(this.#spec(name).name) ?? [];
  }

  /** A buffer on the device for an array, of zeros or of `elements`. */
  buffer(name: string, elements?: Elements): GPUBuffer {
    return this.#buffer(this.#spec(name), elements);
  }

  #buffer(spec: ArraySpec, elements?: Elements): GPUBuffer {
    const { device } = this.kernel;
    const shape = this.#shapes.get(spec.name) ?? [];
    const n = shape.reduce((x, y) => x * y, 1);
    const { bytes, make } = storage(spec.dtype);
    // GPUBufferUsage: STORAGE, COPY_SRC, COPY_DST.
    const buffer = device.createBuffer({ label: spec.name, size: buffer_bytes(spec, n), usage: 0x80 | 0x4 | 0x8 });
    if (elements === undefined) return buffer;
    const wanted = make(new ArrayBuffer(0)).constructor;
    if (elements.constructor !== wanted) {
      throw new EinfallError(`${spec.name} is ${spec.dtype}: give a ${wanted.name}, not a ${elements.constructor.name}`);
    }
    if (elements.length !== n) {
      throw new EinfallError(`${spec.name} has ${n} elements ([${shape.join(", ")}]), not ${elements.length}`);
    }
    // Writes are whole words.
    const padded = new Uint8Array(Math.ceil((n * bytes) / 4) * 4);
    padded.set(new Uint8Array(elements.buffer, elements.byteOffset, elements.byteLength));
    if (padded.length > 0) device.queue.writeBuffer(buffer, 0, padded);
    return buffer;
  }

  #holds(c: Condition, scope: Scope): boolean {
    if ("at_most" in c) return extent(c.at_most[0], scope) <= c.at_most[1];
    if ("multiple" in c) return extent(c.multiple[0], scope) % c.multiple[1] === 0;
    const [name, bytes] = c.aligned;
    const spec = this.kernel.manifest.arrays.find((a) => a.name === name);
    const shape = this.#shapes.get(name) ?? [];
    if (spec === undefined) return false;
    let stride = storage(spec.dtype).bytes;
    // An array without elements is not read; dense arrays begin where bindings do.
    if (shape.includes(0)) return true;
    for (let d = shape.length - 1; d > 0; d--) {
      stride *= shape[d] ?? 1;
      if ((shape[d - 1] ?? 1) > 1 && stride % bytes !== 0) return false;
    }
    return true;
  }

  /** Makes everything that launches on these buffers need. Every array of the caller has one; workspace is made here. */
  async prepare(
    buffers: Readonly<Record<string, GPUBuffer>>,
    scalars: Readonly<Record<string, number>> = {},
  ): Promise<Launches> {
    const { device, manifest } = this.kernel;
    for (const name of Object.keys(buffers)) this.#spec(name);
    for (const name of Object.keys(scalars)) {
      if (!manifest.scalars.some((s) => s.name === name)) throw new EinfallError(`${manifest.name} has no scalar ${name}`);
    }
    const scope = this.#scope(scalars);
    for (const fact of manifest.facts) {
      if (evaluate(fact.holds, scope) === 0) throw new EinfallError(`${manifest.name} requires ${fact.text}`);
    }
    const all = new Map<string, GPUBuffer>();
    const own: GPUBuffer[] = [];
    for (const spec of manifest.arrays) {
      const given = buffers[spec.name];
      if (given === undefined && spec.kind !== "workspace") throw new EinfallError(`the array ${spec.name} of ${manifest.name} is missing`);
      const buffer = given ?? this.#buffer(spec);
      if (given === undefined) own.push(buffer);
      const n = (this.#shapes.get(spec.name) ?? []).reduce((x, y) => x * y, 1);
      if (buffer.size < buffer_bytes(spec, n)) {
        throw new EinfallError(`the buffer of ${spec.name} has ${buffer.size} bytes, not ${buffer_bytes(spec, n)}`);
      }
      const other = manifest.arrays.find((a) => all.get(a.name) === buffer);
      if (other !== undefined && (spec.kind !== "input" || other.kind !== "input")) {
        throw new EinfallError(`${other.name} and ${spec.name} are one buffer, and one of them is written: give each its own`);
      }
      all.set(spec.name, buffer);
    }
    const steps: Step[] = [];
    for (const variants of manifest.kernels) {
      const variant = variants.find((v) => v.assumes.every((c) => this.#holds(c, scope)));
      if (variant === undefined) throw new EinfallError(`no variant of ${variants[0]?.entry} fits these sizes`);
      const workgroups = extent(variant.workgroups, scope);
      if (workgroups === 0) continue;
      const most = device.limits.maxComputeWorkgroupsPerDimension;
      const x = Math.min(workgroups, most);
      const y = Math.ceil(workgroups / x);
      if (y > most || x * y >= MOST) {
        throw new EinfallError(`kernel ${variant.entry} has ${workgroups} workgroups: maxComputeWorkgroupsPerDimension of the device is ${most}`);
      }
      const words = new DataView(new ArrayBuffer(Math.max(Math.ceil(variant.words.length / 4), 1) * 16));
      variant.words.forEach((w, i) => {
        if ("f32" in w) return words.setFloat32(4 * i, evaluate(w.f32, scope), true);
        const value = evaluate(w.i32, scope);
        if (!Number.isInteger(value) || value < -MOST || value >= MOST) {
          throw new EinfallError(`kernel ${variant.entry} takes ${value}, which is no integer of 32 bits`);
        }
        words.setInt32(4 * i, value, true);
      });
      // GPUBufferUsage: UNIFORM, COPY_DST.
      const uniform = device.createBuffer({ label: variant.entry, size: words.byteLength, usage: 0x40 | 0x8 });
      device.queue.writeBuffer(uniform, 0, words.buffer);
      own.push(uniform);
      const pipeline = await this.kernel.pipeline(variant);
      const entries: GPUBindGroupEntry[] = [{ binding: 0, resource: { buffer: uniform } }];
      variant.bindings.forEach((b, i) => {
        const buffer = all.get(b.array);
        if (buffer !== undefined) entries.push({ binding: i + 1, resource: { buffer } });
      });
      const group = device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries });
      steps.push({ name: variant.entry, pipeline, group, workgroups: [x, y] });
    }
    return new Launches(device, steps, own);
  }

  /** Runs on arrays of the host and returns the outputs, and arrays updated in place. */
  async run(
    inputs: Readonly<Record<string, Elements>>,
    scalars: Readonly<Record<string, number>> = {},
  ): Promise<Record<string, Elements>> {
    const { device, manifest } = this.kernel;
    for (const name of Object.keys(inputs)) {
      if (this.#spec(name).kind === "output") throw new EinfallError(`${name} is an output`);
    }
    const buffers: Record<string, GPUBuffer> = {};
    let launches: Launches | undefined;
    try {
      for (const spec of manifest.arrays.filter((a) => a.kind !== "workspace")) {
        const given = inputs[spec.name];
        if (given === undefined && spec.kind !== "output") throw new EinfallError(`the array ${spec.name} of ${manifest.name} is missing`);
        buffers[spec.name] = this.#buffer(spec, given);
      }
      launches = await this.prepare(buffers, scalars);
      launches.launch();
      const outputs: Record<string, Elements> = {};
      for (const spec of manifest.arrays.filter((a) => a.kind === "output" || a.kind === "inout")) {
        outputs[spec.name] = await this.read(spec.name, buffers[spec.name]!);
      }
      return outputs;
    } finally {
      launches?.destroy();
      for (const b of Object.values(buffers)) b.destroy();
    }
  }

  /** The elements of an array once everything submitted before is done. */
  async read(name: string, buffer: GPUBuffer): Promise<Elements> {
    const { device } = this.kernel;
    const spec = this.#spec(name);
    const n = this.shape(name).reduce((x, y) => x * y, 1);
    const { bytes, make } = storage(spec.dtype);
    // GPUBufferUsage: MAP_READ, COPY_DST.
    const host = device.createBuffer({ size: buffer_bytes(spec, n), usage: 0x1 | 0x8 });
    const encoder = device.createCommandEncoder();
    encoder.copyBufferToBuffer(buffer, 0, host, 0, host.size);
    device.queue.submit([encoder.finish()]);
    try {
      await host.mapAsync(1); // GPUMapMode.READ
    } catch (e) {
      throw new EinfallError(`${name} could not be read: ${e instanceof Error ? e.message : String(e)}`);
    }
    const all = host.getMappedRange().slice(0, n * bytes);
    host.destroy();
    return make(all);
  }
}

/** Bytes of an array's buffer. */
function buffer_bytes(spec: ArraySpec, elements: number): number {
  return Math.max(Math.ceil((elements * storage(spec.dtype).bytes) / ITEM_BYTES), 1) * ITEM_BYTES;
}

interface Step {
  readonly name: string;
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly workgroups: readonly [number, number];
}

/** Launches with everything they need. */
export class Launches {
  /** @internal */
  constructor(
    readonly device: GPUDevice,
    private readonly steps: readonly Step[],
    private readonly own: readonly GPUBuffer[],
  ) {}

  /** The kernels, in order. */
  get names(): string[] {
    return this.steps.map((s) => s.name);
  }

  /** Adds the launches to a pass. */
  encode(pass: GPUComputePassEncoder): void {
    for (const s of this.steps) {
      pass.setPipeline(s.pipeline);
      pass.setBindGroup(0, s.group);
      pass.dispatchWorkgroups(...s.workgroups);
    }
  }

  /** Puts the launches on the device's queue. */
  launch(): void {
    if (this.steps.length === 0) return;
    const encoder = this.device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    this.encode(pass);
    pass.end();
    this.device.queue.submit([encoder.finish()]);
  }

  /** Frees words and workspace. Launches may not be used afterwards. */
  destroy(): void {
    for (const b of this.own) b.destroy();
  }
}
