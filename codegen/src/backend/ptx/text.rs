//! The text under way, and values: registers or immediates with what is known of them.
//!
//! Invariant: a register is named once and declared by [`Text::declarations`]; integer values lie in `lo ..= hi`.

use std::fmt::Write as _;

/// Register classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ty {
    Pred,
    B16,
    S32,
    S64,
    F32,
    F64,
}

impl Ty {
    fn index(self) -> usize {
        match self {
            Ty::Pred => 0,
            Ty::B16 => 1,
            Ty::S32 => 2,
            Ty::S64 => 3,
            Ty::F32 => 4,
            Ty::F64 => 5,
        }
    }

    /// Letter of its registers.
    fn letter(self) -> &'static str {
        ["p", "h", "r", "rd", "f", "fd"][self.index()]
    }

    /// Type in a `.reg` directive.
    pub(super) fn storage(self) -> &'static str {
        ["pred", "b16", "b32", "b64", "f32", "f64"][self.index()]
    }

    pub(super) fn is_float(self) -> bool {
        matches!(self, Ty::F32 | Ty::F64)
    }
}

/// A scalar value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Val {
    pub(super) ty: Ty,
    /// A register or an immediate.
    pub(super) s: String,
    /// The value, if it is a constant.
    pub(super) k: Option<f64>,
    /// Least value of an integer.
    pub(super) lo: i64,
    /// Largest value of an integer.
    pub(super) hi: i64,
    /// Still to be added to the register of a 32-bit integer: sums that differ by constants share a register, and
    /// comparisons take the constants as immediates. `Emit::to` and `Emit::in_reg` add it.
    pub(super) off: i64,
    /// It may be any integer, as elements of tensors are. Positions, extents and what is computed of them alone are not:
    /// launches check that they fit, and so do their differences.
    pub(super) any: bool,
}

/// Values of 32 bits.
pub(super) const I32: (i64, i64) = (i32::MIN as i64, i32::MAX as i64);

impl Val {
    pub(super) fn reg(ty: Ty, s: String) -> Val {
        let (lo, hi) = match ty {
            Ty::Pred => (0, 1),
            Ty::S32 => I32,
            Ty::B16 | Ty::S64 | Ty::F32 | Ty::F64 => (i64::MIN, i64::MAX),
        };
        Val { ty, s, k: None, lo, hi, off: 0, any: matches!(ty, Ty::S32 | Ty::S64) }
    }

    pub(super) fn ranged(s: String, lo: i64, hi: i64) -> Val {
        Val { ty: Ty::S32, s, k: None, lo: lo.max(I32.0), hi: hi.min(I32.1), off: 0, any: false }
    }

    /// An integer; 32 bits if they hold it.
    pub(super) fn int(v: i64) -> Val {
        let ty = if (I32.0..=I32.1).contains(&v) { Ty::S32 } else { Ty::S64 };
        Val { ty, s: v.to_string(), k: Some(v as f64), lo: v, hi: v, off: 0, any: false }
    }

    pub(super) fn pred(v: bool) -> Val {
        let v = i64::from(v);
        Val { ty: Ty::Pred, s: v.to_string(), k: Some(v as f64), lo: v, hi: v, off: 0, any: false }
    }

    pub(super) fn f32(v: f64) -> Val {
        let s = format!("0f{:08X}", (v as f32).to_bits());
        Val { ty: Ty::F32, s, k: Some(v), lo: i64::MIN, hi: i64::MAX, off: 0, any: false }
    }

    pub(super) fn f64(v: f64) -> Val {
        Val {
            ty: Ty::F64,
            s: format!("0d{:016X}", v.to_bits()),
            k: Some(v),
            lo: i64::MIN,
            hi: i64::MAX,
            off: 0,
            any: false,
        }
    }

    /// The value of a constant integer or predicate.
    pub(super) fn int_const(&self) -> Option<i64> {
        (!self.ty.is_float() && self.lo == self.hi).then_some(self.lo)
    }
}

/// Text under way.
#[derive(Default)]
pub(super) struct Text {
    pub(super) out: String,
    counts: [usize; 6],
    labels: usize,
    /// Ranges of registers with names of their own: prefix, class, how many.
    named: Vec<(String, Ty, usize)>,
}

impl Text {
    pub(super) fn line(&mut self, s: &str) {
        self.out.push('\t');
        self.out.push_str(s);
        self.out.push_str(";\n");
    }

    /// A fresh register.
    pub(super) fn reg(&mut self, ty: Ty) -> String {
        let n = self.counts[ty.index()];
        self.counts[ty.index()] += 1;
        format!("%{}{n}", ty.letter())
    }

    /// Registers `prefix0 ..` of a class.
    pub(super) fn name(&mut self, prefix: &str, ty: Ty, n: usize) {
        self.named.push((prefix.to_string(), ty, n));
    }

    pub(super) fn label(&mut self) -> String {
        self.labels += 1;
        format!("$L{}", self.labels)
    }

    pub(super) fn place(&mut self, label: &str) {
        self.out.push_str(label);
        self.out.push_str(":\n");
    }

    /// `op dst, args` into a fresh register of class `ty`.
    pub(super) fn def(&mut self, ty: Ty, op: &str, args: &[&str]) -> String {
        let d = self.reg(ty);
        let _ = writeln!(self.out, "\t{op} {d}, {};", args.join(", "));
        d
    }

    /// `.reg` directives of every register handed out.
    pub(super) fn declarations(&self) -> String {
        let mut s = String::new();
        for ty in [Ty::Pred, Ty::B16, Ty::S32, Ty::S64, Ty::F32, Ty::F64] {
            let n = self.counts[ty.index()];
            if n > 0 {
                let _ = writeln!(s, "\t.reg .{} %{}<{n}>;", ty.storage(), ty.letter());
            }
        }
        for (prefix, ty, n) in &self.named {
            let _ = writeln!(s, "\t.reg .{} {prefix}<{n}>;", ty.storage());
        }
        s
    }
}
