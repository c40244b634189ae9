//! Emission of instructions: text, names, and values that stay scalar until a vector needs them.
//!
//! Invariant: output depends on the order of calls alone, so equal kernels print equal text.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// The type arithmetic is done in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ty {
    F32,
    F64,
    /// i64.
    Int,
    /// i1.
    Bool,
}

impl Ty {
    pub(super) fn llvm(self) -> &'static str {
        match self {
            Ty::F32 => "float",
            Ty::F64 => "double",
            Ty::Int => "i64",
            Ty::Bool => "i1",
        }
    }
}

/// A value over the lanes of a register.
#[derive(Clone, Debug)]
pub(super) enum Val {
    /// The same in every lane: a scalar.
    Uniform(Ty, String),
    /// Integers `base + coef · lane`.
    Affine(String, i64),
    /// One element per lane.
    Vector(Ty, String),
}

impl Val {
    pub(super) fn ty(&self) -> Ty {
        match self {
            Val::Uniform(t, _) | Val::Vector(t, _) => *t,
            Val::Affine(..) => Ty::Int,
        }
    }

    pub(super) fn int(v: i64) -> Val {
        Val::Uniform(Ty::Int, v.to_string())
    }
}

/// A float literal of type float or double as LLVM reads it.
pub(super) fn float_text(ty: Ty, v: f64) -> String {
    let v = if ty == Ty::F32 { v as f32 as f64 } else { v };
    let bits = if v.is_nan() { 0x7ff8_0000_0000_0000 } else { v.to_bits() };
    format!("0x{bits:016X}")
}

/// The text of one function, being written.
pub(super) struct Text {
    /// Instructions so far.
    pub(super) body: String,
    /// Stack slots, placed in the entry block.
    pub(super) allocas: String,
    /// Declarations of intrinsics used.
    pub(super) decls: BTreeSet<String>,
    next: usize,
    /// Lanes of vectors.
    pub(super) lanes: u64,
}

impl Text {
    pub(super) fn new(lanes: u64) -> Text {
        Text { body: String::new(), allocas: String::new(), decls: BTreeSet::new(), next: 0, lanes }
    }

    pub(super) fn name(&mut self) -> String {
        self.next += 1;
        format!("%t{}", self.next)
    }

    pub(super) fn label(&mut self, what: &str) -> String {
        self.next += 1;
        format!("{what}{}", self.next)
    }

    pub(super) fn line(&mut self, text: &str) {
        let _ = writeln!(self.body, "  {text}");
    }

    /// Emits `name = text` and returns the name.
    pub(super) fn def(&mut self, text: &str) -> String {
        let name = self.name();
        let _ = writeln!(self.body, "  {name} = {text}");
        name
    }

    pub(super) fn start(&mut self, label: &str) {
        let _ = writeln!(self.body, "{label}:");
    }

    pub(super) fn vec(&self, elem: &str) -> String {
        format!("<{} x {elem}>", self.lanes)
    }

    /// A call of an intrinsic, declared on the side.
    pub(super) fn call(&mut self, ret: &str, name: &str, args: &[(&str, &str)]) -> String {
        let types: Vec<&str> = args.iter().map(|a| a.0).collect();
        self.decls.insert(format!("declare {ret} @{name}({})", types.join(", ")));
        let list: Vec<String> = args.iter().map(|(t, v)| format!("{t} {v}")).collect();
        let call = format!("call {ret} @{name}({})", list.join(", "));
        if ret == "void" {
            self.line(&call);
            String::new()
        } else {
            self.def(&call)
        }
    }

    /// A vector constant of equal elements.
    pub(super) fn splat_const(&self, elem: &str, v: &str) -> String {
        let item = format!("{elem} {v}");
        format!("<{}>", vec![item; self.lanes as usize].join(", "))
    }

    /// A scalar in every lane.
    pub(super) fn splat(&mut self, elem: &str, v: &str) -> String {
        if !v.starts_with('%') {
            return self.splat_const(elem, v);
        }
        let ty = self.vec(elem);
        let one = self.def(&format!("insertelement {ty} poison, {elem} {v}, i64 0"));
        self.def(&format!("shufflevector {ty} {one}, {ty} poison, <{} x i32> zeroinitializer", self.lanes))
    }

    /// `0, step, 2·step, …` as a constant.
    pub(super) fn iota(&self, elem: &str, step: i64) -> String {
        let items: Vec<String> = (0..self.lanes as i64).map(|i| format!("{elem} {}", i * step)).collect();
        format!("<{}>", items.join(", "))
    }

    /// The value as a vector operand.
    pub(super) fn vector(&mut self, v: &Val) -> String {
        match v {
            Val::Vector(_, s) => s.clone(),
            Val::Uniform(t, s) => self.splat(t.llvm(), s),
            Val::Affine(base, coef) => {
                let base = self.splat("i64", base);
                let iota = self.iota("i64", *coef);
                let ty = self.vec("i64");
                self.def(&format!("add {ty} {base}, {iota}"))
            }
        }
    }

    // Scalar i64 arithmetic with constant folding.

    pub(super) fn add(&mut self, a: &str, b: &str) -> String {
        match (a.parse::<i64>(), b.parse::<i64>()) {
            (Ok(0), _) => b.to_string(),
            (_, Ok(0)) => a.to_string(),
            (Ok(x), Ok(y)) => (x + y).to_string(),
            _ => self.def(&format!("add i64 {a}, {b}")),
        }
    }

    pub(super) fn sub(&mut self, a: &str, b: &str) -> String {
        match (a.parse::<i64>(), b.parse::<i64>()) {
            (_, Ok(0)) => a.to_string(),
            (Ok(x), Ok(y)) => (x - y).to_string(),
            _ => self.def(&format!("sub i64 {a}, {b}")),
        }
    }

    pub(super) fn mul(&mut self, a: &str, b: &str) -> String {
        match (a.parse::<i64>(), b.parse::<i64>()) {
            (Ok(0), _) | (_, Ok(0)) => "0".into(),
            (Ok(1), _) => b.to_string(),
            (_, Ok(1)) => a.to_string(),
            (Ok(x), Ok(y)) => (x * y).to_string(),
            _ => self.def(&format!("mul i64 {a}, {b}")),
        }
    }
}
