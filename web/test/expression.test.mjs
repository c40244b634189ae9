// Values of expressions are those of einfall's operators.

import assert from "node:assert/strict";
import test from "node:test";
import { EinfallError, evaluate, extent, rounded } from "../dist/expression.js";

const scope = { rank: (n) => ({ M: 7, N: 3 })[n], scalar: () => 0.5 };
const value = (e) => evaluate(e, scope);

test("operators", () => {
  assert.equal(value(["/", 1, ["sqrt", ["*", "M", 7]]]), 1 / 7);
  assert.equal(value(["floor_div", ["neg", "M"], 2]), -4);
  assert.equal(value(["floor_mod", ["neg", "M"], 2]), 1);
  assert.equal(value(["floor_div", "M", 0]), 0);
  assert.equal(value(["ceil_div", "M", "N"]), 3);
  assert.equal(value(["if", ["<", "N", "M"], ["scalar", "s"], 9]), 0.5);
  assert.equal(value(["max", ["nan"], 1]), NaN);
  assert.deepEqual([0.5, 1.5, 2.5, -0.5, -1.5, 2.4].map((x) => value(["round", x])), [0, 2, 2, -0, -2, 2]);
  assert.throws(() => value(["frobnicate", 1, 2]), EinfallError);
  for (const [x, y] of [[0.5, 0.5204998778130465], [-2, -0.9953222650189527], [3, 0.9999779095030014], [7, 1]]) {
    assert.ok(Math.abs(value(["erf", x]) - y) < 4e-16, `erf ${x}`);
  }
});

test("types", () => {
  assert.equal(rounded(1 + 2 ** -11, "f16"), 1);
  assert.equal(rounded(1 + 3 * 2 ** -11, "f16"), 1 + 2 ** -9);
  assert.equal(rounded(2 ** -25, "f16"), 0);
  assert.equal(rounded(65519, "f16"), 65504);
  assert.equal(rounded(65520, "f16"), Infinity);
  assert.equal(rounded(1 + 2 ** -8, "bf16"), 1);
  assert.equal(rounded(0.1, "f32"), Math.fround(0.1));
  assert.equal(rounded(1e300, "f32"), Infinity);
  assert.deepEqual([NaN, -3.9, 300].map((x) => rounded(x, "u8")), [0, 0, 255]);
  assert.equal(rounded(-3.9, "i32"), -3);
});

test("extents are never negative", () => {
  assert.equal(extent(["-", "M", "N"], scope), 4);
  assert.throws(() => extent(["-", "N", "M"], scope), /an extent is -4/);
  assert.throws(() => extent(["ceil_div", "M", 0], scope), EinfallError);
});
