/**
 * The manifest that `einfall compile --target wgsl` writes beside its shaders.
 *
 * Invariant: version 1 of the form is these types; a manifest of any other is refused.
 */

/** A number, a rank's name, or an operator with its operands; `["scalar", name]` is a parameter's value. */
export type Expression = number | string | readonly [string, ...Expression[]];

/** Types of elements. Narrow ones are packed, the first element in the lowest bits. */
export type DType = "f32" | "tf32" | "f16" | "bf16" | "f8e4m3" | "f8e5m2" | "i32" | "i8" | "u8" | "bool";

/** A rank, whose extent is given when sizes are bound unless it is fixed. */
export interface Rank {
  readonly name: string;
  readonly extent?: number;
}

/** A dense array, last dimension fastest. */
export interface ArraySpec {
  readonly name: string;
  readonly kind: "input" | "inout" | "output" | "workspace";
  readonly dtype: DType;
  readonly shape: readonly Expression[];
}

/** A parameter that travels by value; one with a default may be left out. */
export interface ScalarSpec {
  readonly name: string;
  readonly dtype: DType;
  readonly default?: Expression;
}

/** What must hold of sizes for a variant of a kernel to be launched. */
export type Condition =
  | { readonly at_most: readonly [Expression, number] }
  | { readonly multiple: readonly [Expression, number] }
  /** All strides of the array but the last dimension's are multiples of so many bytes. */
  | { readonly aligned: readonly [string, number] };

/** What a variant asks of a device: limits by their names in WebGPU, and the least size of its subgroups (1: any). */
export interface Needs {
  readonly subgroup: number;
  readonly maxComputeInvocationsPerWorkgroup: number;
  readonly maxComputeWorkgroupStorageSize: number;
  readonly maxStorageBuffersPerShaderStage: number;
}

/** One shader. Binding 0 is the uniform buffer of its words, binding i + 1 its i-th array. */
export interface Variant {
  readonly entry: string;
  /** The shader's file. */
  readonly shader: string;
  /** How many; they may be spread over x and y in any way that covers them. */
  readonly workgroups: Expression;
  readonly bindings: readonly { readonly array: string; readonly access: "read" | "read_write" }[];
  /** Words of 32 bits, in order. */
  readonly words: readonly ({ readonly i32: Expression } | { readonly f32: Expression })[];
  readonly assumes: readonly Condition[];
  readonly needs: Needs;
}

/** A compiled cascade. */
export interface Manifest {
  readonly format: "einfall.wgsl";
  readonly version: 1;
  readonly name: string;
  readonly target: string;
  readonly ranks: readonly Rank[];
  readonly arrays: readonly ArraySpec[];
  readonly scalars: readonly ScalarSpec[];
  /** What a caller must keep; checked before a launch. */
  readonly facts: readonly { readonly text: string; readonly holds: Expression }[];
  /** Kernels in launch order, each with its variants: the first whose assumptions all hold is launched. */
  readonly kernels: readonly (readonly Variant[])[];
}
