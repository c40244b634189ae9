//! Arrays as words, and where a fragment's elements lie in them.
//!
//! An array in device memory is an array of 32-bit words, or of vectors of 2 or 4 of them where every access of the
//! kernel moves such vectors whole and aligned; narrow elements are packed, the first in the lowest bits. Where narrow
//! elements are stored one by one the words are atomic, and a store changes its own bits. A tile in workgroup memory has
//! one word per element. In kernels that multiply matrices of f16, arrays and tiles of f16 are what they are, in vectors of 4
//! (a driver of NVIDIA's takes matrices of f16 from nothing but f16). Invariant: one array has one form in a kernel.

use std::collections::HashMap;

use einfall_ir::dtype::DType;
use einfall_ir::kernel::{Assumption, Bound, BufId, BufSpace, Expr, FragId, Stmt, View, walk};
use einfall_ir::layout::Digit;
use einfall_ir::ops::BinaryOp;

use super::Res;
use super::emit::{Emit, plain};
use super::frag::class;
use super::value::{Ty, Val};
use crate::backend::ptx::address::divides;

/// How an array is declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Words of one item: 1, 2 or 4.
    pub(super) words: u64,
    /// Whether items are atomic.
    pub(super) atomic: bool,
    /// Whether the kernel writes it.
    pub(super) written: bool,
    /// Whether the kernel reads it.
    pub(super) read: bool,
}

/// What addresses of one statement have in common.
#[derive(Default)]
pub(super) struct Addresses {
    base: Option<Val>,
    rows: HashMap<Vec<i64>, Val>,
    limits: HashMap<usize, Val>,
}

impl Emit<'_> {
    /// Finds the form of every array.
    pub(super) fn forms(&mut self) -> Res<()> {
        let start = Form { words: 4, atomic: false, written: false, read: false };
        self.forms = vec![start; self.k.bufs.len()];
        let mut uses: Vec<(BufId, u64, bool, bool)> = Vec::new();
        let k = self.k;
        walk(&k.roles[0].body, &mut |s| {
            let words = |e: &Self, view: &View, f, bounds: &[Bound]| e.scalars(view.buf, e.width(view, f, bounds));
            match s {
                Stmt::Load { out, src, bounds } => uses.push((src.buf, words(self, src, *out, bounds), false, false)),
                Stmt::Store { dst, src, bounds, join } => {
                    let n = if join.is_some() { 1 } else { words(self, dst, *src, bounds) };
                    uses.push((dst.buf, n, true, join.is_some()));
                }
                Stmt::Gather { buf, .. } => uses.push((*buf, self.scalars(*buf, 1), false, false)),
                Stmt::Scatter { buf, join, .. } => {
                    uses.push((*buf, self.scalars(*buf, 1), true, join.is_some()));
                }
                Stmt::Copy { src, dst, extents, .. } => {
                    let piece = self.piece(src, dst, extents);
                    let words = |buf| self.scalars(buf, piece);
                    uses.push((src.buf, words(src.buf), false, false));
                    uses.push((dst.buf, words(dst.buf), true, false));
                }
                _ => {}
            }
            for e in operands(s) {
                fetched(e, &mut |buf| uses.push((buf, 1, false, false)));
            }
        });
        for (buf, words, store, join) in uses {
            let form = Form {
                words: if words >= 4 { 4 } else { words.clamp(1, 2) },
                atomic: join || (store && words == 0),
                written: store,
                read: !store || join,
            };
            for (other, b) in k.bufs.iter() {
                let same = match (&b.space, &k.bufs[buf].space) {
                    (BufSpace::Global { param: a, .. }, BufSpace::Global { param: b, .. }) => a == b,
                    _ => other == buf,
                };
                if same {
                    let f = &mut self.forms[einfall_ir::arena::Id::index(other)];
                    f.words = f.words.min(form.words);
                    f.atomic |= form.atomic;
                    f.written |= form.written;
                    f.read |= form.read;
                }
            }
        }
        for f in self.forms.iter_mut().filter(|f| f.atomic) {
            f.words = 1;
        }
        Ok(())
    }

    pub(super) fn form(&self, buf: BufId) -> Form {
        self.forms[einfall_ir::arena::Id::index(buf)]
    }

    /// Whether elements are f16 where they lie, each by itself.
    pub(super) fn native(&self, buf: BufId) -> bool {
        self.products.halves && self.k.bufs[buf].dtype == DType::F16
    }

    /// The scalars that so many neighbours are: words, or elements of their own type; 0 for a part of a word.
    pub(super) fn scalars(&self, buf: BufId, width: u64) -> u64 {
        if self.native(buf) { width } else { width * u64::from(self.bits(buf)) / 32 }
    }

    /// Most neighbours that one access moves.
    fn widest(&self, buf: BufId) -> u64 {
        if self.native(buf) { 4 } else { 128 / u64::from(self.bits(buf).max(1)) }
    }

    /// Bits of an element where it lies.
    pub(super) fn bits(&self, buf: BufId) -> u32 {
        let b = &self.k.bufs[buf];
        match b.space {
            _ if self.native(buf) => 16,
            BufSpace::Shared { .. } => 32,
            BufSpace::Global { .. } | BufSpace::Scratch { .. } => b.dtype.bits(),
        }
    }

    /// The name of a buffer's variable: the same for all buffers that are one array.
    pub(super) fn variable(&self, buf: BufId) -> String {
        let b = &self.k.bufs[buf];
        let BufSpace::Global { param, .. } = b.space else { return format!("s_{}", plain(&b.name)) };
        let first =
            self.k.bufs.iter().find(|(_, b)| matches!(b.space, BufSpace::Global { param: q, .. } if q == param));
        format!("b_{}", plain(&first.map_or(b, |f| f.1).name))
    }

    /// The type of an item.
    pub(super) fn item(&self, buf: BufId) -> String {
        let (b, form) = (&self.k.bufs[buf], self.form(buf));
        if self.native(buf) {
            return Self::half_item(form.words);
        }
        let shared = matches!(b.space, BufSpace::Shared { .. });
        let scalar = match class(b.dtype) {
            _ if form.atomic && shared => unreachable!("workgroup memory is not joined"),
            _ if form.atomic => return "atomic<u32>".to_string(),
            Ty::Float if shared || b.dtype.bits() == 32 => "f32",
            Ty::Int if shared || b.dtype.bits() == 32 => "i32",
            Ty::Float | Ty::Int | Ty::Bool => "u32",
        };
        if form.words == 1 { scalar.to_string() } else { format!("vec{}<{scalar}>", form.words) }
    }

    /// Refuses what no word holds.
    pub(super) fn storable(&self, buf: BufId) -> Res<()> {
        match self.k.bufs[buf].dtype {
            d @ (DType::F64 | DType::I64) => {
                Err(self.fail(&format!("`{}` of {d}, which WGSL does not have", self.k.bufs[buf].name)))
            }
            DType::I4 | DType::U4 => {
                Err(self.fail(&format!("`{}`, which packs 4-bit integers", self.k.bufs[buf].name)))
            }
            _ => Ok(()),
        }
    }

    /// The dimension of a window's buffer along which elements are neighbours.
    fn contiguous(&self, buf: BufId) -> Option<usize> {
        let b = &self.k.bufs[buf];
        match &b.space {
            BufSpace::Global { .. } => b.dims.len().checked_sub(1),
            BufSpace::Shared { layout, .. } => {
                layout.dims.iter().position(|d| d.first().is_some_and(|g| g.stride == 1 && g.extent > 1))
            }
            BufSpace::Scratch { .. } => None,
        }
    }

    /// Whether every run of `n` neighbours of a window from its origin on is aligned and in one item or several.
    fn runs(&self, view: &View, dim: usize, n: u64) -> bool {
        let b = &self.k.bufs[view.buf];
        let apart = view.walk.iter().filter(|w| w.is_some_and(|w| w.0 == dim)).count() == 1;
        apart
            && view.at.get(dim).is_some_and(|e| divides(self.k, n, e))
            && match &b.space {
                BufSpace::Shared { layout, .. } => {
                    let mut others = layout.dims.iter().flatten().filter(|g| g.stride != 1);
                    others.all(|g| g.stride.is_multiple_of(n))
                        && layout.dims[dim].first().is_some_and(|g| g.extent.is_multiple_of(n))
                }
                BufSpace::Global { .. } => {
                    let bytes = b.dtype.bytes(n);
                    let aligned = |a: &Assumption| match a {
                        Assumption::Aligned(x, m) => self.variable(*x) == self.variable(view.buf) && m % bytes == 0,
                        Assumption::AtMost(..) | Assumption::Multiple(..) => false,
                    };
                    self.k.assumes.iter().any(aligned)
                }
                BufSpace::Scratch { .. } => false,
            }
    }

    /// The most neighbours of a fragment that one access moves between it and a window: 1, or whole words.
    pub(super) fn width(&self, view: &View, f: FragId, bounds: &[Bound]) -> u64 {
        self.groups_of(view, f, bounds)[0].len() as u64
    }

    /// The elements of a fragment in groups that one access moves between it and a window, neighbours in order.
    pub(super) fn groups_of(&self, view: &View, f: FragId, bounds: &[Bound]) -> Vec<Vec<usize>> {
        let h = self.held(f);
        let single = || (0..h.count()).map(|v| vec![v]).collect();
        let Some(last) = self.contiguous(view.buf) else { return single() };
        let Some(d) = view.walk.iter().position(|w| *w == Some((last, 1))) else { return single() };
        let mut order: Vec<usize> = (0..h.count()).collect();
        let key = |v: &usize| {
            let mut c = h.consts[*v].clone();
            let along = c.remove(d);
            (c, along)
        };
        order.sort_by_key(key);
        let bits = u64::from(self.bits(view.buf).max(1));
        let mut n = self.widest(view.buf);
        while n > 1 && n * bits >= 32 {
            let w = n as i64;
            let neighbours = |c: &[usize]| {
                let ((row, first), next) = (key(&c[0]), c.iter().enumerate());
                first % w == 0 && next.skip(1).all(|(i, v)| key(v) == (row.clone(), first + i as i64))
            };
            if h.count().is_multiple_of(n as usize)
                && h.dims[d] % w == 0
                && h.threads[d].iter().all(|g| g.stride.is_multiple_of(n))
                && bounds.iter().all(|x| x.dim != d || divides(self.k, n, &x.limit))
                && self.runs(view, last, n)
                && order.chunks(n as usize).all(neighbours)
            {
                let mut groups: Vec<Vec<usize>> = order.chunks(n as usize).map(<[usize]>::to_vec).collect();
                groups.sort_by_key(|g| g[0]);
                return groups;
            }
            n /= 2;
        }
        single()
    }

    /// The most neighbours that one step of a copy moves: 1, or whole words at both ends.
    pub(super) fn piece(&self, src: &View, dst: &View, extents: &[u64]) -> u64 {
        let (Some(from), Some(to)) = (self.contiguous(src.buf), self.contiguous(dst.buf)) else { return 1 };
        let Some(d) = dst.walk.iter().position(|w| *w == Some((to, 1))) else { return 1 };
        let bits = [src.buf, dst.buf].map(|b| u64::from(self.bits(b).max(1)));
        let mut n = self.widest(src.buf).min(self.widest(dst.buf));
        while n > 1 && n * bits[0].min(bits[1]) >= 32 {
            // Beyond the array a piece is absent as a whole.
            let whole = self.k.bufs[src.buf].dims.get(from).is_some_and(|e| divides(self.k, n, e));
            if src.walk.get(d) == Some(&Some((from, 1)))
                && whole
                && extents[d].is_multiple_of(n)
                && self.runs(src, from, n)
                && self.runs(dst, to, n)
            {
                return n;
            }
            n /= 2;
        }
        1
    }

    /// Elements from one coordinate to the next along a dimension of an array.
    pub(super) fn stride(&mut self, buf: BufId, dim: usize) -> Val {
        let array = self.array(buf).filter(|_| dim + 1 < self.k.bufs[buf].dims.len());
        match array {
            Some(a) => Val::ranged(self.word(einfall_ir::artifact::Slot::Stride(a, dim)), 0, i64::from(i32::MAX)),
            None => Val::int(1),
        }
    }

    /// The element's number from its coordinates.
    pub(super) fn index_of(&mut self, buf: BufId, coords: &[Val]) -> Res<Val> {
        let k = self.k;
        let mut sum = Val::int(0);
        for (d, c) in coords.iter().enumerate() {
            let term = match &k.bufs[buf].space {
                BufSpace::Shared { layout, .. } => self.digits(&layout.dims[d], c)?,
                BufSpace::Global { .. } => {
                    let s = self.stride(buf, d);
                    self.bin(BinaryOp::Mul, c, &s)?
                }
                BufSpace::Scratch { .. } => return Err(self.fail("memory private to a CPU task")),
            };
            sum = self.bin(BinaryOp::Add, &sum, &term)?;
        }
        Ok(sum)
    }

    /// The offset of a coordinate by its digits.
    fn digits(&mut self, digits: &[Digit], c: &Val) -> Res<Val> {
        // Coordinates of tiles are within them.
        let c = Val { lo: c.lo.max(0), ..c.clone() };
        let (mut sum, mut place) = (Val::int(0), 1);
        for (i, g) in digits.iter().enumerate() {
            let mut x = self.bin(BinaryOp::Div, &c, &Val::int(place))?;
            if i + 1 < digits.len() {
                x = self.bin(BinaryOp::Mod, &x, &Val::int(g.extent as i64))?;
            }
            let x = self.bin(BinaryOp::Mul, &x, &Val::int(g.stride as i64))?;
            sum = self.bin(BinaryOp::Add, &sum, &x)?;
            place *= g.extent as i64;
        }
        Ok(sum)
    }

    /// The number, in groups of `width` elements, of the group that starts at element `v` of a fragment.
    pub(super) fn group_index(&mut self, view: &View, f: FragId, v: usize, width: u64, a: &mut Addresses) -> Res<Val> {
        let rank = self.k.bufs[view.buf].dims.len();
        let mut consts = vec![0; rank];
        for (d, w) in view.walk.iter().enumerate() {
            if let Some((to, step)) = *w {
                consts[to] += self.held(f).consts[v][d] * step;
            }
        }
        let carries = match &self.k.bufs[view.buf].space {
            BufSpace::Shared { layout, .. } => layout.dims.iter().enumerate().any(|(d, digits)| {
                let lower = digits.iter().rev().skip(1).map(|g| g.extent).product();
                digits.len() > 1 && !self.begins_at(view, f, d, lower)
            }),
            BufSpace::Global { .. } | BufSpace::Scratch { .. } => false,
        };
        let stage = self.stage_offset(view)?;
        let origin = |e: &mut Self, with: &[i64]| -> Res<Val> {
            let mut coords = Vec::new();
            for (d, c) in with.iter().enumerate() {
                let mut x = e.int(&view.at[d])?;
                for (i, w) in view.walk.iter().enumerate() {
                    if let Some((to, step)) = *w
                        && to == d
                    {
                        let t = e.thread_coord(f, i);
                        let t = e.bin(BinaryOp::Mul, &t, &Val::int(step))?;
                        x = e.bin(BinaryOp::Add, &x, &t)?;
                    }
                }
                coords.push(e.bin(BinaryOp::Add, &x, &Val::int(*c))?);
            }
            let i = e.index_of(view.buf, &coords)?;
            let i = e.bin(BinaryOp::Add, &stage, &i)?;
            Ok(e.named(&i))
        };
        let (row, rest) = if carries {
            (consts.clone(), 0)
        } else if let BufSpace::Shared { layout, .. } = &self.k.bufs[view.buf].space {
            // Nothing carries from what the thread begins at to what is constant: offsets add.
            let at: Vec<u64> = consts.iter().map(|c| *c as u64).collect();
            (Vec::new(), layout.offset(&at) as i64)
        } else {
            let last = consts.pop().unwrap_or(0);
            (consts.clone(), last)
        };
        if let Some(x) = a.rows.get(&row) {
            return shifted(self, x, rest, width);
        }
        let base = match (&a.base, carries) {
            (_, true) => origin(self, &row)?,
            (Some(b), _) => b.clone(),
            (None, _) => {
                let b = origin(self, &vec![0; rank])?;
                a.base = Some(b.clone());
                b
            }
        };
        let mut x = base;
        if !carries {
            for (d, c) in row.iter().enumerate().filter(|c| *c.1 != 0) {
                let s = self.stride(view.buf, d);
                let o = self.bin(BinaryOp::Mul, &s, &Val::int(*c))?;
                x = self.bin(BinaryOp::Add, &x, &o)?;
            }
        }
        if width > 1 {
            // Aligned, so nothing is lost; and arrays are indexed from 0.
            let n = width.trailing_zeros();
            x = match x.known() {
                Some(c) => Val::int(c >> n),
                None => Val::new(Ty::Int, format!("({} >> {n}u)", x.s)),
            };
        }
        let x = self.named(&x);
        a.rows.insert(row, x.clone());
        shifted(self, &x, rest, width)
    }

    /// Whether every thread's elements begin at a multiple of `n` along a dimension of a window's buffer.
    fn begins_at(&self, view: &View, f: FragId, dim: usize, n: u64) -> bool {
        let h = self.held(f);
        let walked = view.walk.iter().enumerate().filter_map(|(i, w)| w.filter(|w| w.0 == dim).map(|w| (i, w.1)));
        view.at.get(dim).is_some_and(|e| divides(self.k, n, e))
            && walked.into_iter().all(|(i, step)| {
                h.threads[i].iter().all(|g| (g.stride * step.unsigned_abs()).is_multiple_of(n)) && step > 0
            })
    }

    /// Elements before the stage of a window.
    pub(super) fn stage_offset(&mut self, view: &View) -> Res<Val> {
        let k = self.k;
        match (&k.bufs[view.buf].space, &view.stage) {
            (BufSpace::Shared { layout, .. }, Some(stage)) => {
                let s = self.int(stage)?;
                self.bin(BinaryOp::Mul, &s, &Val::int(stage_elems(layout) as i64))
            }
            _ => Ok(Val::int(0)),
        }
    }

    /// Whether element `v` is within the bounds and the tile.
    pub(super) fn present(&mut self, f: FragId, v: usize, bounds: &[Bound], a: &mut Addresses) -> Res<Val> {
        let (at, dims) = (self.held(f).consts[v].clone(), self.held(f).dims.clone());
        let mut p = Val::bool(true);
        for (i, b) in bounds.iter().enumerate() {
            let rest = match a.limits.get(&i) {
                Some(rest) => rest.clone(),
                None => {
                    let limit = self.int(&b.limit)?;
                    let t = self.thread_coord(f, b.dim);
                    let rest = self.bin(BinaryOp::Sub, &limit, &t)?;
                    let rest = self.named(&rest);
                    a.limits.insert(i, rest.clone());
                    rest
                }
            };
            let one = self.bin(BinaryOp::Gt, &rest, &Val::int(at[b.dim]))?;
            p = self.bin(BinaryOp::And, &p, &one)?;
        }
        for d in 0..dims.len() {
            if at[d] + self.held(f).thread_max(d) >= dims[d] {
                let t = self.thread_coord(f, d);
                let c = self.bin(BinaryOp::Add, &t, &Val::int(at[d]))?;
                let one = self.bin(BinaryOp::Lt, &c, &Val::int(dims[d]))?;
                p = self.bin(BinaryOp::And, &p, &one)?;
            }
        }
        Ok(p)
    }
}

fn shifted(e: &Emit<'_>, x: &Val, rest: i64, width: u64) -> Res<Val> {
    e.bin(BinaryOp::Add, x, &Val::int(rest / width as i64))
}

/// Elements of one stage: a multiple of the widest vector.
pub(super) fn stage_elems(layout: &einfall_ir::layout::MemLayout) -> u64 {
    layout.span_elems().next_multiple_of(4)
}

/// Expressions of a statement itself.
fn operands(s: &Stmt) -> Vec<&Expr> {
    fn window(v: &View) -> impl Iterator<Item = &Expr> {
        v.at.iter().chain(&v.stage)
    }
    match s {
        Stmt::For { lo, hi, .. } => vec![lo, hi],
        Stmt::If { cond, .. } => vec![cond],
        Stmt::Let { value, .. } | Stmt::Map { value, .. } => vec![value],
        Stmt::Reduce { base, bounds, .. } => base.iter().chain(bounds.iter().map(|b| &b.limit)).collect(),
        Stmt::Scan { bounds, .. } => bounds.iter().map(|b| &b.limit).collect(),
        Stmt::Load { src: v, bounds, .. } | Stmt::Store { dst: v, bounds, .. } => {
            window(v).chain(bounds.iter().map(|b| &b.limit)).collect()
        }
        Stmt::Gather { at, bounds, .. } | Stmt::Scatter { at, bounds, .. } => {
            at.iter().chain(bounds.iter().map(|b| &b.limit)).collect()
        }
        Stmt::Atom { keep, .. } => vec![keep],
        Stmt::Copy { src, dst, .. } => window(src).chain(window(dst)).collect(),
        _ => Vec::new(),
    }
}

fn fetched(e: &Expr, f: &mut impl FnMut(BufId)) {
    if let Expr::Fetch { buf, .. } = e {
        f(*buf);
    }
    e.for_each_operand(|o| fetched(o, f));
}
