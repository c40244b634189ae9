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
