//! Probes: contractions with forced layouts, and operands that are one element, or one per row, of ones.
//!
//! A wrong swizzle bit, descriptor field, k-step or transposed load reads other elements and gives a plausible number. A
//! one-hot operand shows which: with a single 1 at (i, k) of the left operand, row i of the result is row k of the right
//! one and all else is 0. There is a probe for each family of instructions, each operand contiguous along k or along its
//! own dimension, and each swizzle; and for results that leave through shared memory (`staged`), their rows or their columns
//! contiguous there. They are lowered and printed as any plan is. Invariant: all values are integers that
//! every type here holds, so results are exact.

use einfall_ir::array::Array;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::{self, Mapping};
use einfall_ir::tile::{self, Plan};

/// A contraction `D[m, n] = Σ_k A·B` with its mapping.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Family, majors and swizzle, e.g. `wgmma left k right n swizzle 128 bf16`.
    pub name: String,
    /// The plan; its ranks are M, N and K.
    pub plan: Plan,
    /// The mapping, for an H100 (wgmma, TMA) or an A100 (mma.sync, ldmatrix, cp.async).
    pub mapping: Mapping,
    /// Operand type.
    pub dtype: DType,
    left_k_major: bool,
    right_k_major: bool,
    /// Whether D is given as `[n, m]`.
    flipped: bool,
}

/// Where the ones are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hot {
    /// One element (i, k) of the left operand.
    Left(u64, u64),
    /// One element (k, j) of the right operand.
    Right(u64, u64),
    /// One element in every row of the left operand, in another column each.
    Rows,
}

/// Extents of M, N and K: two steps of the stream, with four steps of 16 along k in each.
pub const SHAPE: [u64; 3] = [64, 64, 128];

impl Probe {
    fn new(wgmma: bool, left_k_major: bool, right_k_major: bool, swizzle: u64, dtype: DType) -> Probe {
        Probe::stored(wgmma, left_k_major, right_k_major, swizzle, dtype, None)
    }

    /// With results of the operands' type that leave through shared memory, where `staged` says whether flipped.
    fn stored(
        wgmma: bool,
        left_k_major: bool,
        right_k_major: bool,
        swizzle: u64,
        dtype: DType,
        staged: Option<bool>,
    ) -> Probe {
        let flipped = staged == Some(true);
        let (a, b) = (if left_k_major { "m, k" } else { "k, m" }, if right_k_major { "n, k" } else { "k, n" });
        let dims = |s: &str| s.to_uppercase();
        let order = if flipped { "n, m" } else { "m, n" };
        let result = if staged.is_some() { dtype } else { DType::F32 };
        let plan = format!(
            "plan probe[M, N, K] {{
                input A: {dtype}[{}]
                input B: {dtype}[{}]
                output D: {result}[{}]
                kernel probe {{
                    grid m in M
                    grid n in N
                    stream k in K
                    tile a: {dtype}[{a}]
                    tile b: {dtype}[{b}]
                    tile d: f32[m, n]
                    d = 0.0
                    for k {{
                        a = load A[{a}]
                        b = load B[{b}]
                        d = carry contract(k) a, b
                    }}
                    store D[{order}] = d over {order}
                }}
            }}",
            dims(a),
            dims(b),
            dims(order)
        );
        let swizzled = if swizzle == 0 { String::new() } else { format!("swizzle {swizzle} ") };
        let (sheet, units, roles, stages, engine, atom, skew) = match wgmma {
            true => {
                let roles = "role producer: 1 warp\nrole consumer: 1 warpgroup\nop a role producer\nop b role producer";
                let roles = match staged {
                    Some(_) => format!("{roles}\ntile D_out in shared {swizzled}\nop store.D role consumer by tma"),
                    None => roles.to_string(),
                };
                ("h100", 1, roles, 2, "tma", format!("wgmma.m64n64k16.{dtype}"), "")
            }
            false => {
                ("a100", 2, "role main: 2 warp".to_string(), 2, "cp_async", format!("mma.m16n8k16.{dtype}"), "skew 1")
            }
        };
        let mapping = format!(
            "mapping probe on {sheet} {{
                kernel probe {{
                    axis m block 64 units {units}
                    axis n block 64
                    axis k block 64
                    {roles}
                    tile a in shared stages {stages} {swizzled}by {engine}
                    tile b in shared stages {stages} {swizzled}by {engine}
                    op d@1 atom {atom} {skew}
                }}
            }}"
        );
        let major = |k: bool, own| if k { "k" } else { own };
        let (family, left) = (if wgmma { "wgmma" } else { "mma" }, major(left_k_major, "m"));
        let right = major(right_k_major, "n");
        let kind = match staged {
            None => "",
            Some(false) => " staged",
            Some(true) => " staged flipped",
        };
        Probe {
            name: format!("{family} left {left} right {right} swizzle {swizzle} {dtype}{kind}"),
            plan: tile::parse::parse(&plan).expect("probes are tested"),
            mapping: mapping::parse::parse(&mapping).expect("probes are tested"),
            dtype,
            left_k_major,
            right_k_major,
            flipped,
        }
    }

    /// Every probe. Staged results are swizzled as operands are. Unswizzled operands of wgmma are contiguous along k.
    pub fn all() -> Vec<Probe> {
        let mut list = Vec::new();
        for wgmma in [true, false] {
            for (left, right) in [(true, true), (true, false), (false, true), (false, false)] {
                for swizzle in [0, 32, 64, 128] {
                    if wgmma && swizzle == 0 && !(left && right) {
                        continue;
                    }
                    list.push(Probe::new(wgmma, left, right, swizzle, DType::BF16));
                    if swizzle == 128 {
                        list.push(Probe::new(wgmma, left, right, swizzle, DType::F16));
                    }
                }
            }
        }
        for swizzle in [32, 64, 128] {
            list.extend([false, true].map(|f| Probe::stored(true, true, true, swizzle, DType::BF16, Some(f))));
        }
        list
    }

    /// Single elements in every step of 16 along k, of both operands, and a permutation.
    pub fn hots() -> Vec<Hot> {
        let [m, n, k] = SHAPE;
        let steps = (0..k / 16).flat_map(|s| {
            let l = 16 * s + (11 * s + 3) % 16;
            [Hot::Left((7 * s + 5) % m, l), Hot::Right(l, (13 * s + 2) % n)]
        });
        steps.chain([Hot::Rows]).collect()
    }

    /// A single element at every place along k, of both operands, and a permutation: for devices.
    pub fn sweep() -> Vec<Hot> {
        let [m, n, k] = SHAPE;
        let places = (0..k).flat_map(|l| [Hot::Left((7 * l + 5) % m, l), Hot::Right(l, (13 * l + 2) % n)]);
        places.chain([Hot::Rows]).collect()
    }

    /// A and B, and the D they give.
    pub fn case(&self, hot: Hot) -> ([Array; 2], Vec<f64>) {
        let [m, n, k] = SHAPE;
        let column = |i: u64| (37 * i + 11) % k;
        let left = |i: u64, l: u64| match hot {
            Hot::Left(hi, hl) => f64::from(u8::from((i, l) == (hi, hl))),
            Hot::Rows => f64::from(u8::from(l == column(i))),
            Hot::Right(..) => (1 + (5 * i + 3 * l) % 127) as f64,
        };
        let right = |l: u64, j: u64| match hot {
            Hot::Right(hl, hj) => f64::from(u8::from((l, j) == (hl, hj))),
            Hot::Left(..) | Hot::Rows => (1 + (3 * l + 5 * j) % 127) as f64,
        };
        let array = |own: u64, k_major: bool, of: &dyn Fn(u64, u64) -> f64| {
            let dims = if k_major { [own, k] } else { [k, own] };
            Array::from_fn(self.dtype, &dims, |at| {
                let (x, y) = (at as u64 / dims[1], at as u64 % dims[1]);
                if k_major { of(x, y) } else { of(y, x) }
            })
        };
        let a = array(m, self.left_k_major, &left);
        let b = array(n, self.right_k_major, &|j, l| right(l, j));
        let element = |i: u64, j: u64| match hot {
            Hot::Left(hi, hl) => f64::from(u8::from(i == hi)) * right(hl, j),
            Hot::Right(hl, hj) => f64::from(u8::from(j == hj)) * left(i, hl),
            Hot::Rows => right(column(i), j),
        };
        let d = match self.flipped {
            false => (0..m * n).map(|at| element(at / n, at % n)).collect(),
            true => (0..m * n).map(|at| element(at % m, at / m)).collect(),
        };
        ([a, b], d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a probe expects is what its plan means.
    #[test]
    fn cases_are_what_the_plan_means() {
        for p in Probe::all().iter().step_by(5) {
            for hot in [Hot::Rows, Hot::Left(3, 70), Hot::Right(40, 9)] {
                let (inputs, want) = p.case(hot);
                let got = tile::eval::run(&p.plan, &SHAPE, &inputs, &tile::eval::Options::default()).unwrap();
                assert_eq!(got[0].data, want, "{} {hot:?}", p.name);
            }
        }
    }

    #[test]
    fn every_layout_and_step_is_there() {
        let all = Probe::all();
        assert_eq!(all.len(), 4 * 5 * 2 - 3 + 3 * 2);
        let steps: std::collections::BTreeSet<u64> = Probe::hots()
            .iter()
            .filter_map(|h| match h {
                Hot::Left(_, k) | Hot::Right(k, _) => Some(k / 16),
                Hot::Rows => None,
            })
            .collect();
        assert_eq!(steps.len() as u64, SHAPE[2] / 16);
    }
}
