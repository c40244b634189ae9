//! Loads and stores of fragments, gathers and scatters.
//!
//! Invariant: an absent element is neither read nor written; a copy held by several threads is stored by one.

use std::collections::{BTreeSet, HashMap};

use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Bound, BufId, BufSpace, Expr, FragId, View};
use einfall_ir::ops::{BinaryOp, ReduceOp};

use super::Res;
use super::access::Addresses;
use super::emit::Emit;
use super::expr::Memo;
use super::frag::class;
use super::value::{Ty, Val};
use crate::backend::gpu::memo::Element;

/// The accessor of a narrow type: `get_X(word, number)`, `X_bits(value)`.
fn narrow(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::BF16 => Some("bf16"),
        DType::F16 => Some("f16"),
        DType::F8E4M3 => Some("e4m3"),
        DType::F8E5M2 => Some("e5m2"),
        DType::I8 => Some("i8"),
        DType::U8 | DType::Bool => Some("u8"),
        DType::F64 | DType::F32 | DType::Tf32 | DType::I64 | DType::I32 | DType::I4 | DType::U4 => None,
    }
}

impl Emit<'_> {
    /// Whether elements of a buffer are packed several to a word.
    fn packed(&self, buf: BufId) -> Option<&'static str> {
        match self.k.bufs[buf].space {
            BufSpace::Global { .. } if self.native(buf) => None,
            BufSpace::Global { .. } => narrow(self.k.bufs[buf].dtype),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => None,
        }
    }

    /// The item of a buffer as a value.
    fn item_at(&self, buf: BufId, index: &str) -> String {
        let name = self.variable(buf);
        if self.form(buf).atomic { format!("atomicLoad(&{name}[{index}])") } else { format!("{name}[{index}]") }
    }

    /// One element, which is there.
    pub(super) fn load_call(&self, buf: BufId, index: &str) -> Res<Val> {
        self.storable(buf)?;
        let ty = class(self.k.bufs[buf].dtype);
        if let Some(name) = self.packed(buf) {
            let shift = 5 - self.k.bufs[buf].dtype.bits().trailing_zeros();
            let word = self.item_at(buf, &format!("{index} >> {shift}u"));
            if name == "f16" && self.target.exact_halves {
                return Ok(Val::new(ty, format!("unpack2x16float({word})[{index} & 1]")));
            }
            return Ok(Val::new(ty, format!("get_{name}({word}, {index})")));
        }
        let (words, item) = (self.form(buf).words, self.item_at(buf, index));
        if words > 1 {
            return Err(self.fail("an element of a vector of words"));
        }
        if self.native(buf) {
            return Ok(Val::new(ty, format!("f32({item})")));
        }
        Ok(Val::new(ty, if self.form(buf).atomic { format!("bitcast<{}>({item})", ty.name()) } else { item }))
    }

    /// `width` neighbours, which are there, from their group's number.
    pub(super) fn load_group(&mut self, buf: BufId, group: &Val, width: u64) -> Res<Vec<Val>> {
        self.storable(buf)?;
        if width == 1 {
            return Ok(vec![self.load_call(buf, &group.s)?]);
        }
        let (dtype, words, atomic) = (self.k.bufs[buf].dtype, self.form(buf).words, self.form(buf).atomic);
        let packed = self.packed(buf);
        let (all, native) = (self.scalars(buf, width), self.native(buf));
        let mut values = Vec::new();
        for i in 0..all / words {
            let index = self.item_index(group, all / words, i)?;
            let name = self.fresh("w");
            let item = self.item_at(buf, &index);
            self.line(&format!("let {name} = {item};"));
            for c in 0..words as usize {
                let word = if words == 1 { name.clone() } else { format!("{name}.{}", ["x", "y", "z", "w"][c]) };
                match packed {
                    Some("f16") if self.target.exact_halves => {
                        let pair = self.fresh("h");
                        self.line(&format!("let {pair} = unpack2x16float({word});"));
                        values.extend(["x", "y"].map(|c| Val::new(class(dtype), format!("{pair}.{c}"))));
                    }
                    Some(kind) => {
                        let per = 32 / dtype.bits();
                        let of = |j: u32| Val::new(class(dtype), format!("get_{kind}({word}, {j})"));
                        values.extend((0..per).map(of));
                    }
                    None if native => values.push(Val::new(class(dtype), format!("f32({word})"))),
                    None if atomic => {
                        values.push(Val::new(class(dtype), format!("bitcast<{}>({word})", class(dtype).name())))
                    }
                    None => values.push(Val::new(class(dtype), word)),
                }
            }
        }
        Ok(values)
    }

    /// The index of item `i` of a group of `n`.
    fn item_index(&self, group: &Val, n: u64, i: u64) -> Res<String> {
        let first = self.bin(BinaryOp::Mul, group, &Val::int(n as i64))?;
        Ok(self.bin(BinaryOp::Add, &first, &Val::int(i as i64))?.s)
    }

    /// Stores one element or a group of a type.
    pub(super) fn store_group(&mut self, buf: BufId, group: &Val, values: &[Val], of: DType) -> Res<()> {
        self.storable(buf)?;
        let (dtype, form, name) = (self.k.bufs[buf].dtype, self.form(buf), self.variable(buf));
        let (ty, packed) = (class(dtype), self.packed(buf));
        // Values of its type are as they are to be.
        let rounded = |v: &Val| if of == dtype { Ok(v.clone()) } else { self.rounded(v, dtype) };
        let values = values.iter().map(rounded).collect::<Res<Vec<Val>>>()?;
        let values: Vec<Val> = values.iter().map(|v| self.to(v, ty)).collect();
        if self.native(buf) {
            let n = values.len() as u64 / form.words;
            for (i, list) in values.chunks(form.words as usize).enumerate() {
                let index = if n == 1 { group.s.clone() } else { self.item_index(group, n, i as u64)? };
                let item = self.halves(list);
                self.line(&format!("{name}[{index}] = {item};"));
            }
            return Ok(());
        }
        let bits = values.len() as u64 * u64::from(self.bits(buf));
        if bits < 32 {
            // Its bits alone: others may store their neighbours at the same time.
            let kind = packed.ok_or_else(|| self.fail("elements of less than a word"))?;
            let (shift, mask) = (5 - dtype.bits().trailing_zeros(), (1u64 << dtype.bits()) - 1);
            let at = self.fresh("x");
            self.line(&format!("let {at} = u32({} & {}) * {}u;", group.s, (1 << shift) - 1, dtype.bits()));
            let word = format!("&{name}[{} >> {shift}u]", group.s);
            self.line(&format!("atomicAnd({word}, ~({mask}u << {at}));"));
            self.line(&format!("atomicOr({word}, {kind}_bits({}) << {at});", values[0].s));
            return Ok(());
        }
        let words: Vec<String> = match packed {
            None if form.atomic => values.iter().map(|v| format!("bitcast<u32>({})", v.s)).collect(),
            None => values.iter().map(|v| v.s.clone()).collect(),
            Some(kind) => values.chunks(32 / dtype.bits() as usize).map(|c| self.word_of(kind, c)).collect(),
        };
        let scalar = match (packed, ty) {
            (Some(_), _) => "u32",
            (None, _) => ty.name(),
        };
        let n = words.len() as u64 / form.words;
        for (i, list) in words.chunks(form.words as usize).enumerate() {
            let index = if n == 1 { group.s.clone() } else { self.item_index(group, n, i as u64)? };
            let value = if list.len() == 1 {
                list[0].clone()
            } else {
                format!("vec{}<{scalar}>({})", list.len(), list.join(", "))
            };
            match form.atomic {
                true => self.line(&format!("atomicStore(&{name}[{index}], {value});")),
                false => self.line(&format!("{name}[{index}] = {value};")),
            }
        }
        Ok(())
    }

    /// Elements that their type has, as one word: nothing is left to round.
    fn word_of(&self, kind: &str, values: &[Val]) -> String {
        let bits = 32 / values.len();
        let part = |(j, v): (usize, &Val)| match (kind, j) {
            ("bf16", 0) => format!("(bitcast<u32>({}) >> 16u)", v.s),
            ("bf16", _) => format!("(bitcast<u32>({}) & 0xffff0000u)", v.s),
            (_, 0) => format!("{kind}_bits({})", v.s),
            _ => format!("({kind}_bits({}) << {}u)", v.s, j * bits),
        };
        match values {
            [x, y] if kind == "f16" && self.target.exact_halves => {
                format!("pack2x16float(vec2<f32>({}, {}))", x.s, y.s)
            }
            _ => values.iter().enumerate().map(part).collect::<Vec<_>>().join(" | "),
        }
    }

    /// Prints what is done with every group of elements that is there, once per condition under which it is, after
    /// what is done with those that may be absent.
    fn in_groups(
        &mut self,
        view: &View,
        frag: FragId,
        bounds: &[Bound],
        all: Option<String>,
        absent: impl Fn(&mut Self, &[usize]) -> Res<()>,
        present: impl Fn(&mut Self, &[usize], &Val) -> Res<()>,
    ) -> Res<()> {
        let mut a = Addresses::default();
        type Accesses = Vec<(Vec<usize>, Val)>;
        let mut conditions: Vec<(Val, Accesses)> = Vec::new();
        for group in self.groups_of(view, frag, bounds) {
            let p = self.present(frag, group[0], bounds, &mut a)?;
            if p.known() == Some(0) {
                absent(self, &group)?;
                continue;
            }
            let index = self.group_index(view, frag, group[0], group.len() as u64, &mut a)?;
            match conditions.iter_mut().find(|g| g.0 == p) {
                Some(g) => g.1.push((group, index)),
                None => conditions.push((p, vec![(group, index)])),
            }
        }
        for (p, list) in conditions {
            let mut of: Vec<String> = all.iter().cloned().collect();
            if p.known().is_none() {
                for (group, _) in &list {
                    absent(self, group)?;
                }
                of.push(p.s);
            }
            if !of.is_empty() {
                self.enter(&format!("if ({}) {{", of.join(" && ")));
            }
            for (group, index) in &list {
                present(self, group, index)?;
            }
            if !of.is_empty() {
                self.leave();
            }
        }
        Ok(())
    }

    pub(super) fn load(&mut self, out: FragId, src: &View, bounds: &[Bound]) -> Res<()> {
        let same = self.k.bufs[src.buf].dtype == self.held(out).dtype;
        let zero = |e: &mut Self, group: &[usize]| group.iter().try_for_each(|v| e.set_exact(out, *v, &Val::int(0)));
        let read = |e: &mut Self, group: &[usize], index: &Val| -> Res<()> {
            for (v, x) in group.iter().zip(e.load_group(src.buf, index, group.len() as u64)?) {
                if same { e.set_exact(out, *v, &x)? } else { e.set(out, *v, &x)? }
            }
            Ok(())
        };
        self.in_groups(src, out, bounds, None, zero, read)
    }

    /// Writes an element of a fragment whose value its type has.
    fn set_exact(&mut self, f: FragId, v: usize, x: &Val) -> Res<()> {
        let (name, x) = (self.held(f).variable(v), self.to(x, class(self.held(f).dtype)));
        self.line(&format!("{name} = {};", x.s));
        Ok(())
    }

    pub(super) fn store(&mut self, dst: &View, src: FragId, bounds: &[Bound], join: Option<ReduceOp>) -> Res<()> {
        let replica = self.first_replica(src);
        self.in_groups(
            dst,
            src,
            bounds,
            replica,
            |_, _| Ok(()),
            |e, group, index| {
                let values: Vec<Val> = group.iter().map(|v| e.element(src, *v)).collect();
                match join {
                    Some(op) => values.iter().enumerate().try_for_each(|(i, x)| {
                        let index = e.item_index(index, values.len() as u64, i as u64)?;
                        e.join_in_memory(dst.buf, &index, x, op)
                    }),
                    None => e.store_group(dst.buf, index, &values, e.held(src).dtype),
                }
            },
        )
    }

    /// `[index] = [index] ⊕ x`, atomically: sums of integers at once, else compared and exchanged until nobody came between.
    fn join_in_memory(&mut self, buf: BufId, index: &str, x: &Val, op: ReduceOp) -> Res<()> {
        let dtype = self.k.bufs[buf].dtype;
        let global = matches!(self.k.bufs[buf].space, BufSpace::Global { .. });
        if !matches!(dtype, DType::F32 | DType::I32) || op.selects_argument() || !global {
            return Err(self.fail(&format!("an atomic {} of {dtype}", op.name())));
        }
        let (ty, name) = (class(dtype), self.variable(buf));
        if (op, ty) == (ReduceOp::Sum, Ty::Int) {
            let x = self.to(x, ty);
            self.line(&format!("atomicAdd(&{name}[{index}], bitcast<u32>({}));", x.s));
            return Ok(());
        }
        let (old, new) = (self.fresh("x"), self.fresh("x"));
        self.enter("loop {");
        self.line(&format!("let {old} = atomicLoad(&{name}[{index}]);"));
        let before = Val::new(ty, format!("bitcast<{}>({old})", ty.name()));
        let after = self.combine(op, &before, &self.to(x, ty))?;
        let after = self.to(&after, ty);
        self.line(&format!("let {new} = bitcast<u32>({});", after.s));
        self.line(&format!("if (atomicCompareExchangeWeak(&{name}[{index}], {old}, {new}).exchanged) {{ break; }}"));
        self.leave();
        Ok(())
    }

    /// The coordinates of an indexed element, its number, and whether it is inside the buffer.
    fn indexed(&mut self, buf: BufId, at: &[Expr], el: &Element, memo: &mut Memo) -> Res<(Val, Val)> {
        let mut coords = Vec::new();
        for e in at {
            let c = self.value(e, Some(el), memo)?;
            let c = self.to(&c, Ty::Int);
            coords.push(self.named(&c));
        }
        let inside = self.inside(buf, &coords)?;
        let index = self.index_of(buf, &coords)?;
        Ok((self.named(&index), inside))
    }

    fn only_arrays(&self, buf: BufId, what: &str) -> Res<()> {
        match self.k.bufs[buf].space {
            BufSpace::Global { .. } => self.storable(buf),
            BufSpace::Shared { .. } | BufSpace::Scratch { .. } => Err(self.fail(&format!("{what} workgroup memory"))),
        }
    }

    pub(super) fn gather(&mut self, out: FragId, buf: BufId, at: &[Expr], bounds: &[Bound]) -> Res<()> {
        self.only_arrays(buf, "a gather from")?;
        let (mut memo, mut a) = (Memo::default(), Addresses::default());
        let mut loaded: HashMap<Vec<i64>, usize> = HashMap::new();
        let mut dims: BTreeSet<usize> = bounds.iter().map(|b| b.dim).collect();
        at.iter().for_each(|e| dims.extend(memo.dims(e)));
        for v in 0..self.held(out).count() {
            let el = Element { of: out, v, at: self.held(out).consts[v].clone() };
            let key: Vec<i64> = dims.iter().map(|d| el.at[*d]).collect();
            if let Some(first) = loaded.get(&key) {
                let x = self.element(out, *first);
                self.set_exact(out, v, &x)?;
                continue;
            }
            let (index, inside) = self.indexed(buf, at, &el, &mut memo)?;
            let p = self.present(out, v, bounds, &mut a)?;
            let p = self.bin(BinaryOp::And, &p, &inside)?;
            self.set_exact(out, v, &Val::int(0))?;
            self.enter(&format!("if ({}) {{", p.s));
            let x = self.load_call(buf, &index.s)?;
            self.set(out, v, &x)?;
            self.leave();
            loaded.insert(key, v);
        }
        Ok(())
    }

    pub(super) fn scatter(
        &mut self,
        buf: BufId,
        at: &[Expr],
        src: FragId,
        bounds: &[Bound],
        join: Option<ReduceOp>,
    ) -> Res<()> {
        self.only_arrays(buf, "a scatter to")?;
        let (mut memo, mut a) = (Memo::default(), Addresses::default());
        let replica = self.first_replica(src);
        for v in 0..self.held(src).count() {
            let el = Element { of: src, v, at: self.held(src).consts[v].clone() };
            let (index, inside) = self.indexed(buf, at, &el, &mut memo)?;
            let p = self.present(src, v, bounds, &mut a)?;
            let p = self.bin(BinaryOp::And, &p, &inside)?;
            let all: Vec<String> = replica.iter().cloned().chain([p.s]).collect();
            self.enter(&format!("if ({}) {{", all.join(" && ")));
            let x = self.element(src, v);
            match join {
                Some(op) => self.join_in_memory(buf, &index.s, &x, op)?,
                None => self.store_group(buf, &index, &[x], self.held(src).dtype)?,
            }
            self.leave();
        }
        Ok(())
    }
}
