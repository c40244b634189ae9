// What a device lacks is said by the names that WebGPU has for it.

import assert from "node:assert/strict";
import test from "node:test";
import { deviceNeeds, EinfallError, Kernel, missing } from "../dist/index.js";

const manifest = {
  format: "einfall.wgsl",
  version: 1,
  name: "k",
  target: "wgsl",
  ranks: [{ name: "M" }],
  arrays: [{ name: "x", kind: "input", dtype: "f32", shape: ["M"] }],
  scalars: [],
  facts: [],
  kernels: [
    [
      {
        entry: "k_0",
        shader: "k.wgsl.k_0.wgsl",
        workgroups: "M",
        bindings: [{ array: "x", access: "read_write" }],
        words: [{ i32: "M" }],
        assumes: [],
        needs: {
          subgroup: 16,
          maxComputeInvocationsPerWorkgroup: 256,
          maxComputeWorkgroupStorageSize: 16384,
          maxStorageBuffersPerShaderStage: 1,
        },
      },
    ],
  ],
};
const limits = {
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupStorageSize: 16384,
  maxStorageBuffersPerShaderStage: 8,
  maxStorageBufferBindingSize: 1 << 27,
  maxBufferSize: 1 << 28,
};
const device = (change) => ({ features: new Set(["subgroups"]), limits, info: { subgroupMinSize: 32 }, ...change });

test("a device that has everything lacks nothing", () => {
  assert.deepEqual(missing(manifest, device()), []);
  const needs = deviceNeeds(manifest, device());
  assert.deepEqual(needs.requiredFeatures, ["subgroups"]);
  assert.equal(needs.requiredLimits.maxComputeWorkgroupStorageSize, 16384);
});

test("what is lacking is named", () => {
  const says = (change) => missing(manifest, device(change)).join();
  assert.match(says({ features: new Set() }), /k_0 needs the feature subgroups/);
  assert.match(says({ info: { subgroupMinSize: 8 } }), /subgroups of at least 16; the device's least is 8/);
  assert.match(
    says({ limits: { ...limits, maxComputeWorkgroupStorageSize: 8192 } }),
    /maxComputeWorkgroupStorageSize 16384; the device has 8192/,
  );
  assert.throws(() => deviceNeeds(manifest, device({ features: new Set() })), EinfallError);
});

test("manifests of other versions are refused", () => {
  assert.throws(() => missing({ ...manifest, version: 2 }, device()), /compile it again/);
  assert.throws(() => missing(null, device()), /undefined undefined, not einfall.wgsl 1/);
});

test("sizes are checked before anything is launched", () => {
  const kernel = Kernel.load({ ...device(), adapterInfo: { subgroupMinSize: 32 } }, manifest, () => "");
  assert.throws(() => kernel.bind({ Q: 1 }), /no rank Q; its ranks are M/);
  assert.throws(() => kernel.bind({}), /the rank M of k has no size/);
  assert.throws(() => kernel.bind({ M: 1.5 }), /an integer from 0/);
  assert.throws(() => kernel.bind({ M: 1 << 30 }), /maxStorageBufferBindingSize of the device is 134217728/);
  assert.deepEqual(kernel.bind({ M: 5 }).shape("x"), [5]);
});

/** A device of which `shader` and what is made of it are the test's. */
const working = (made) => ({
  ...device(),
  adapterInfo: { subgroupMinSize: 32 },
  queue: { writeBuffer() {} },
  createBuffer: ({ size }) => ({ size }),
  createShaderModule: () => ({ getCompilationInfo: async () => ({ messages: [] }) }),
  createBindGroupLayout: () => ({}),
  createPipelineLayout: () => ({}),
  createComputePipelineAsync: made,
  createBindGroup: () => ({}),
});
const pipeline = async () => ({ getBindGroupLayout: () => ({}) });

test("a pipeline that failed is made again", async () => {
  let tries = 0;
  const file = () => (++tries === 1 ? Promise.reject(new Error("no such file")) : "text");
  const bound = Kernel.load({ ...working(pipeline), limits: { ...limits, maxComputeWorkgroupsPerDimension: 8 } }, manifest, file).bind({ M: 5 });
  await assert.rejects(bound.prepare({ x: { size: 32 } }), /no such file/);
  assert.deepEqual((await bound.prepare({ x: { size: 32 } })).names, ["k_0"]);
});

test("one buffer is not read and written at once", async () => {
  const arrays = [...manifest.arrays, { name: "y", kind: "output", dtype: "f32", shape: ["M"] }];
  const kernel = Kernel.load(working(pipeline), { ...manifest, arrays }, () => "text");
  const buffer = { size: 32 };
  await assert.rejects(kernel.bind({ M: 5 }).prepare({ x: buffer, y: buffer }), /x and y are one buffer/);
});

test("words that 32 bits do not hold are refused", async () => {
  const words = [{ i32: ["*", "M", 1 << 30] }];
  const kernels = [[{ ...manifest.kernels[0][0], words }]];
  const most = { ...limits, maxComputeWorkgroupsPerDimension: 8 };
  const kernel = Kernel.load({ ...working(pipeline), limits: most }, { ...manifest, kernels }, () => "text");
  await assert.rejects(kernel.bind({ M: 5 }).prepare({ x: { size: 32 } }), /5368709120, which is no integer of 32 bits/);
});
