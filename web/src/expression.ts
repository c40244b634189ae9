/**
 * Values of a manifest's expressions.
 *
 * Invariant: a value is what einfall computes for the same expression in float64; extents are safe integers and never
 * negative.
 */

import type { DType, Expression } from "./manifest.js";

/** Something that a caller gave, or a device lacks, said in one sentence. */
export class EinfallError extends Error {
  override readonly name = "EinfallError";
}

/** What names stand for. */
export interface Scope {
  /** The extent of a rank. */
  rank(name: string): number;
  /** The value of a parameter. */
  scalar(name: string): number;
}

const ONE: Record<string, (x: number) => number> = {
  neg: (x) => -x,
  abs: Math.abs,
  exp: Math.exp,
  exp2: (x) => 2 ** x,
  log: Math.log,
  log2: Math.log2,
  log1p: Math.log1p,
  sqrt: Math.sqrt,
  rsqrt: (x) => 1 / Math.sqrt(x),
  recip: (x) => 1 / x,
  sin: Math.sin,
  cos: Math.cos,
  tanh: Math.tanh,
  sigmoid: (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x))),
  erf,
  floor: Math.floor,
  ceil: Math.ceil,
  round: ties,
  sign: Math.sign,
  not: (x) => Number(x === 0),
};

const TWO: Record<string, (x: number, y: number) => number> = {
  "+": (x, y) => x + y,
  "-": (x, y) => x - y,
  "*": (x, y) => x * y,
  "/": (x, y) => x / y,
  "%": (x, y) => x - y * Math.floor(x / y),
  floor_div: (x, y) => (y === 0 ? 0 : Math.floor(x / y)),
  floor_mod: (x, y) => (y === 0 ? 0 : x - y * Math.floor(x / y)),
  ceil_div: (x, y) => Math.ceil(x / y),
  pow: (x, y) => x ** y,
  min: Math.min,
  max: Math.max,
  "<": (x, y) => Number(x < y),
  "<=": (x, y) => Number(x <= y),
  ">": (x, y) => Number(x > y),
  ">=": (x, y) => Number(x >= y),
  "==": (x, y) => Number(x === y),
  "!=": (x, y) => Number(x !== y),
  and: (x, y) => Number(x !== 0 && y !== 0),
  or: (x, y) => Number(x !== 0 || y !== 0),
};

/** The Taylor series below 2.5, a continued fraction of erfc above (Abramowitz & Stegun 7.1.6 and 7.1.14). */
function erf(x: number): number {
  const a = Math.abs(x);
  if (Number.isNaN(x)) return x;
  let r = 1;
  if (a < 2.5) {
    let [term, sum] = [a, a];
    for (let n = 1; term > sum * 1e-17; n++) {
      term *= (2 * a * a) / (2 * n + 1);
      sum += term;
    }
    r = (2 / Math.sqrt(Math.PI)) * Math.exp(-a * a) * sum;
  } else if (a <= 6) {
    let f = a;
    for (let k = 60; k > 0; k--) f = a + k / 2 / f;
    r = 1 - Math.exp(-a * a) / (f * Math.sqrt(Math.PI));
  }
  return x < 0 ? -r : r;
}

/** To the nearest integer, ties to even. */
function ties(x: number): number {
  if (x < 0) return -ties(-x);
  const down = Math.floor(x);
  const over = x - down;
  return over > 0.5 || (over === 0.5 && down % 2 !== 0) ? down + 1 : down;
}

/** The nearest number with `mantissa` explicit bits and exponents from `least` on; overflow is infinite. */
function narrowed(x: number, mantissa: number, least: number, most: number): number {
  if (!Number.isFinite(x) || x === 0) return x;
  let exponent = Math.floor(Math.log2(Math.abs(x)));
  // The logarithm may be off by one at powers of two.
  if (2 ** exponent > Math.abs(x)) exponent -= 1;
  if (2 ** (exponent + 1) <= Math.abs(x)) exponent += 1;
  const ulp = 2 ** (Math.max(exponent, least) - mantissa);
  const value = ties(x / ulp) * ulp;
  return Math.abs(value) > most ? Math.sign(x) * Infinity : value;
}

/** A value rounded into a type. */
export function rounded(x: number, dtype: DType | string): number {
  switch (dtype) {
    case "f64":
      return x;
    case "f32":
      return Math.fround(x);
    case "f16":
      return narrowed(x, 10, -14, 65504);
    case "bf16":
      return narrowed(x, 7, -126, (2 - 2 ** -7) * 2 ** 127);
    case "bool":
      return Number(x !== 0);
    default: {
      const range: Record<string, [number, number]> = {
        i64: [-(2 ** 63), 2 ** 63],
        i32: [-(2 ** 31), 2 ** 31 - 1],
        i8: [-128, 127],
        u8: [0, 255],
      };
      const [low, high] = range[dtype] ?? [0, 0];
      if (range[dtype] === undefined) throw new EinfallError(`no value is rounded to ${dtype} here`);
      return Number.isNaN(x) ? 0 : Math.min(Math.max(Math.trunc(x), low), high);
    }
  }
}

/** The value of an expression. */
export function evaluate(e: Expression, scope: Scope): number {
  if (typeof e === "number") return e;
  if (typeof e === "string") return scope.rank(e);
  const [op, ...operands] = e;
  const [first] = operands;
  if (op === "scalar" && typeof first === "string") return scope.scalar(first);
  if (op === "inf") return Infinity;
  if (op === "-inf") return -Infinity;
  if (op === "nan") return NaN;
  const values = operands.map((o) => evaluate(o, scope));
  const [x, y, z] = values as [number, number, number];
  const one = ONE[op];
  const two = TWO[op];
  if (values.length === 2 && two !== undefined) return two(x, y);
  if (values.length === 1) return one !== undefined ? one(x) : rounded(x, op);
  if (values.length === 3 && op === "if") return x !== 0 ? y : z;
  throw new EinfallError(`the manifest has an operator \`${op}\` that this version does not know`);
}

/** The value of an extent; differences below zero and inexact numbers are refused. */
export function extent(e: Expression, scope: Scope): number {
  if (Array.isArray(e)) {
    const [op, ...operands] = e as readonly [string, ...Expression[]];
    const values = operands.map((o) => extent(o, scope));
    const value = evaluate([op, ...values], scope);
    if (!Number.isSafeInteger(value) || value < 0) {
      throw new EinfallError(`an extent is ${value}: ${values.join(` ${op} `)}`);
    }
    return value;
  }
  return evaluate(e, scope);
}
