//! Products of cooperative matrices: naga's WGSL for VK_KHR_cooperative_matrix.
//!
//! An accumulator is a matrix variable for each window of its fragment, which nobody can index. What threads do element by
//! element happens on the fragment's variables, as everywhere: elements come out of the matrices and go back through workgroup
//! memory, a piece of it for each unit, when a statement needs the other form. At loops and branches that change it an
//! accumulator is matrices. Invariants: of both forms one is current, and only a current one is read; a matrix that was loaded
//! is used again only by the products right behind it. Whoever prints these knows that a unit is one subgroup
//! ([`super::Target::matrices`]).
//! Source: SPV_KHR_cooperative_matrix; naga 30, `enable wgpu_cooperative_matrix` (`T`: rows are contiguous; strides count items).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use einfall_ir::kernel::atoms::{self, Atom};
use einfall_ir::kernel::{AtomName, BufSpace, Expr, FragId, Kernel, Operand, Stmt, View, walk};
use einfall_ir::ops::BinaryOp;

use super::emit::Emit;
use super::value::{Ty, Val, float_text};
use super::{Res, Target, Unprintable};

/// Most matrices of a unit that pass through memory at a time, where they do in every trip of a loop; at the end of a kernel
/// they pass one by one, and tasks take less memory.
const AT_ONCE: u64 = 4;

/// An accumulator.
pub(super) struct Accumulator {
    /// The instruction.
    atom: Atom,
    /// The first coordinates of its windows.
    windows: Vec<[u64; 2]>,
    /// Which of its forms are current.
    matrices: bool,
    elements: bool,
    /// Windows whose old values are not what they should hold: the next product must overwrite them.
    stale: BTreeSet<[u64; 2]>,
    /// Whether statements write its elements.
    rewritten: bool,
}

/// What a kernel has of cooperative matrices.
#[derive(Default)]
pub(super) struct Products {
    pub(super) accumulators: BTreeMap<FragId, Accumulator>,
    /// Names of the instructions.
    pub(super) atoms: BTreeSet<String>,
    /// Whether operands are f16, and arrays of f16 are declared as such.
    pub(super) halves: bool,
    /// Matrices loaded by the products just before: the window and its role, and the name.
    pub(super) loaded: Vec<(String, String)>,
    /// Whether elements pass through workgroup memory.
    pub(super) passes: bool,
    /// Whether units may still read there since they last met.
    pub(super) passing: bool,
    /// Whether elements of accumulators are read or written in loops.
    in_loops: bool,
}

/// Whether the value is 0.
fn zero(e: &Expr) -> bool {
    match e {
        Expr::Int(n) => *n == 0,
        Expr::Float(x) => *x == 0.0 && x.is_sign_positive(),
        _ => false,
    }
}

/// The fragments that a statement list's products write, and those whose elements it reads and writes.
#[derive(Default)]
struct Touched {
    products: BTreeSet<FragId>,
    read: BTreeSet<FragId>,
    written: BTreeSet<FragId>,
}

impl Touched {
    fn of(body: &[Stmt]) -> Touched {
        let mut t = Touched::default();
        walk(body, &mut |s| match s {
            Stmt::Atom { acc, .. } => {
                t.products.insert(*acc);
            }
            Stmt::For { .. } | Stmt::If { .. } => {}
            _ => {
                let (reads, writes) = s.frags();
                t.read.extend(reads);
                t.written.extend(writes);
            }
        });
        t
    }
}

impl Products {
    /// The products of a kernel.
    pub(super) fn of(k: &Kernel, target: &Target, fail: impl Fn(&str) -> Unprintable) -> Result<Products, Unprintable> {
        let mut found: Vec<(Atom, FragId)> = Vec::new();
        for role in &k.roles {
            walk(&role.body, &mut |s| {
                if let Stmt::Atom { atom, acc, .. } = s
                    && let Some(atom) = atoms::find(atom).filter(Atom::cooperative)
                {
                    found.push((atom, *acc));
                }
            });
        }
        let mut products = Products::default();
        for (atom, acc) in found {
            let name = atom.name.0.clone();
            if !target.matrices.contains(&name) {
                let [m, n, depth] = atom.shape;
                let what = format!(
                    "{name}, cooperative matrices of {m}×{n}×{depth} from {} into {}: {} reports none of them",
                    atom.operand, atom.acc, target.name
                );
                return Err(Unprintable { help: "map the contraction to `fma` atoms", ..fail(&what) });
            }
            // Only then is a unit one subgroup, and needs no other memory to exchange by.
            if target.subgroup != 32 {
                return Err(fail("cooperative matrices where subgroups are not known to have 32 invocations"));
            }
            products.halves |= atom.operand == einfall_ir::dtype::DType::F16;
            products.atoms.insert(name);
            let dims = &k.frags[acc].dist.dims;
            let whole = dims.len() == 2 && (0..2).all(|d| dims[d].is_multiple_of(atom.shape[d]));
            let same = products.accumulators.get(&acc).is_none_or(|a| a.atom == atom);
            if !whole || !same {
                return Err(fail("an accumulator that is not whole matrices of one instruction"));
            }
            // What elements pass through has one size and one kind of item.
            if products.accumulators.values().any(|a| a.atom.shape != atom.shape || a.atom.acc_dist != atom.acc_dist) {
                return Err(fail("cooperative matrices of several sizes in one kernel"));
            }
            let [m, n] = [atom.shape[0], atom.shape[1]];
            let windows = (0..dims[0] / m).flat_map(|i| (0..dims[1] / n).map(move |j| [i * m, j * n])).collect();
            let new = || Accumulator {
                atom,
                windows,
                matrices: true,
                elements: false,
                stale: BTreeSet::new(),
                rewritten: false,
            };
            products.accumulators.entry(acc).or_insert_with(new);
        }
        for role in &k.roles {
            walk(&role.body, &mut |s| {
                let (Stmt::Atom { .. } | Stmt::For { .. } | Stmt::If { .. }) = s else {
                    let filled = matches!(s, Stmt::Map { value, .. } if zero(value));
                    for f in s.frags().1.iter().filter(|_| !filled) {
                        if let Some(a) = products.accumulators.get_mut(f) {
                            a.rewritten = true;
                        }
                    }
                    return;
                };
            });
        }
        for role in &k.roles {
            walk(&role.body, &mut |s| {
                if let Stmt::For { body, .. } = s {
                    let touched = Touched::of(body);
                    let mut all = touched.read.iter().chain(&touched.written);
                    products.in_loops |= all.any(|f| products.accumulators.contains_key(f));
                }
            });
        }
        Ok(products)
    }
}

impl Accumulator {
    /// The type of its matrices.
    fn ty(&self) -> String {
        format!("coop_mat{0}x{0}<f32, C>", self.atom.shape[0])
    }

    /// Neighbours in an item of the memory that elements pass through.
    fn per(&self) -> u64 {
        self.run().min(4)
    }

    /// Neighbours that a thread has.
    fn run(&self) -> u64 {
        self.atom.acc_dist.regs.first().map_or(1, |g| g.extent)
    }

    /// Items of workgroup memory for one matrix.
    fn items(&self) -> u64 {
        self.atom.shape[0] * self.atom.shape[1] / self.per()
    }
}

impl Emit<'_> {
    /// Declarations of matrix variables.
    pub(super) fn declare_matrices(&self) -> String {
        let mut text = String::new();
        for (f, a) in &self.products.accumulators {
            for w in &a.windows {
                let _ = writeln!(text, "    var {}: {};", self.matrix_name(*f, *w), a.ty());
            }
        }
        text
    }

    fn matrix_name(&self, f: FragId, [i, j]: [u64; 2]) -> String {
        format!("m_{}_{i}_{j}", super::emit::plain(&self.held(f).name))
    }

    /// Matrices of a unit that pass through workgroup memory at a time: as many as it has room for.
    fn at_once(&self) -> u64 {
        if !self.products.in_loops {
            return 1;
        }
        let bytes = self.products.accumulators.values().map(|a| 4 * a.atom.shape[0] * a.atom.shape[1]).max();
        let left = self.target.workgroup_bytes.saturating_sub(self.tile_bytes() + self.exchange_bytes());
        (left / (bytes.unwrap_or(1) * self.units)).clamp(1, AT_ONCE)
    }

    /// Workgroup memory that elements pass through: its declaration and its bytes.
    pub(super) fn passage(&self) -> Option<(String, u64)> {
        let of = |a: &Accumulator| (a.per(), a.items());
        let (per, items) = self.products.accumulators.values().map(of).max().filter(|_| self.products.passes)?;
        let items = items * self.at_once() * self.units;
        let text = format!("var<workgroup> passage: array<vec{per}<f32>, {items}>;\n");
        Some((text, 4 * per * items))
    }

    /// Before a statement that is no product: what it reads of accumulators is in their elements.
    pub(super) fn before_elements(&mut self, s: &Stmt) -> Res<()> {
        self.products.loaded.clear();
        if !matches!(s, Stmt::For { .. } | Stmt::If { .. }) {
            for f in s.frags().0 {
                self.as_elements(f)?;
            }
        }
        Ok(())
    }

    /// After a statement that is no product: what it wrote is current in the elements alone.
    pub(super) fn after_elements(&mut self, s: &Stmt) {
        if matches!(s, Stmt::For { .. } | Stmt::If { .. }) {
            return;
        }
        for f in s.frags().1 {
            if let Some(a) = self.products.accumulators.get_mut(&f) {
                (a.matrices, a.elements) = (false, true);
                a.stale.clear();
            }
        }
    }

    /// Fills an accumulator with zeros; false if the statement does something else.
    pub(super) fn cleared(&mut self, s: &Stmt) -> bool {
        let Stmt::Map { out, value } = s else { return false };
        let Some(a) = self.products.accumulators.get_mut(out).filter(|_| zero(value)) else { return false };
        (a.matrices, a.elements) = (true, false);
        a.stale.clear();
        let (ty, windows) = (a.ty(), a.windows.clone());
        for w in windows {
            let name = self.matrix_name(*out, w);
            self.line(&format!("{name} = {ty}();"));
        }
        true
    }

    /// Whether invocations meet in statements because elements pass through memory.
    pub(super) fn passes_elements(&self, body: &[Stmt]) -> bool {
        let touched = Touched::of(body);
        let of = |f: &FragId| self.products.accumulators.get(f);
        let out = |f: &FragId| of(f).is_some_and(|a| !a.elements || touched.products.contains(f));
        let back = |f: &FragId| of(f).is_some_and(|a| a.rewritten);
        touched.read.iter().any(out) || touched.products.union(&touched.written).any(back)
    }

    /// Whether statements hold operations on matrices.
    pub(super) fn multiplies(&self, body: &[Stmt]) -> bool {
        let touched = Touched::of(body);
        let mut all = touched.products.iter().chain(&touched.read).chain(&touched.written);
        all.any(|f| self.products.accumulators.contains_key(f))
    }

    /// Before a loop or branches: accumulators that they write are matrices, what they only read is in elements. Those that
    /// are written.
    pub(super) fn settle(&mut self, body: &[Stmt]) -> Res<Vec<FragId>> {
        self.products.loaded.clear();
        let touched = Touched::of(body);
        let mut written = Vec::new();
        for f in self.products.accumulators.keys().copied().collect::<Vec<_>>() {
            if touched.products.contains(&f) || touched.written.contains(&f) {
                written.push(f);
            } else if touched.read.contains(&f) {
                self.as_elements(f)?;
            }
        }
        self.settled_as(&written)?;
        // What holds where control flow meets again.
        self.products.passing |= self.passes_elements(body);
        Ok(written)
    }

    /// These accumulators are matrices, and nothing else.
    pub(super) fn settled_as(&mut self, written: &[FragId]) -> Res<()> {
        self.products.loaded.clear();
        for f in written {
            self.as_matrices(*f)?;
            if let Some(a) = self.products.accumulators.get_mut(f) {
                a.elements = false;
            }
        }
        Ok(())
    }

    /// Items of the passage, from this unit's matrix number `slot` on.
    fn passage_item(&self, slot: u64, items: u64) -> String {
        let unit = items * self.at_once();
        match (self.units, slot) {
            (1, _) => format!("{}", slot * items),
            (_, 0) => format!("unit * {unit}"),
            _ => format!("unit * {unit} + {}", slot * items),
        }
    }

    /// The elements of a window: in the order of the registers of the instruction's distribution.
    fn elements_of(&self, f: FragId, window: [u64; 2], shape: [u64; 3]) -> Vec<usize> {
        let inside = |c: &[i64]| (0..2).all(|d| (0..shape[d] as i64).contains(&(c[d] - window[d] as i64)));
        let held = self.held(f);
        (0..held.count()).filter(|v| inside(&held.consts[*v])).collect()
    }

    /// Moves all windows of an accumulator through workgroup memory: out of the matrices, or into them.
    fn pass(&mut self, f: FragId, out: bool) -> Res<()> {
        let Some(a) = self.products.accumulators.get(&f) else { return Ok(()) };
        let (windows, shape, per, items, ty) = (a.windows.clone(), a.atom.shape, a.per(), a.items(), a.ty());
        self.products.passes = true;
        // A thread's items of a run, runs of the unit's threads one after another.
        let (threads, each) = (self.unit_threads, a.run() / per);
        let thread = if each == 1 { "thread".to_owned() } else { format!("thread * {each}") };
        let stride = shape[1] / per;
        for chunk in windows.chunks(self.at_once() as usize) {
            if self.products.passing {
                self.barrier();
            }
            let matrices = |e: &mut Self| {
                for (slot, w) in chunk.iter().enumerate() {
                    let (name, at) = (e.matrix_name(f, *w), e.passage_item(slot as u64, items));
                    e.line(&match out {
                        true => format!("coopStoreT({name}, &passage[{at}], {stride}u);"),
                        false => format!("{name} = coopLoadT<{ty}>(&passage[{at}], {stride}u);"),
                    });
                }
            };
            let elements = |e: &mut Self| {
                for (slot, w) in chunk.iter().enumerate() {
                    let at = e.passage_item(slot as u64, items);
                    let list = e.elements_of(f, *w, shape);
                    for (group, list) in list.chunks(per as usize).enumerate() {
                        let group = group as u64;
                        let first = group / each * each * threads + group % each;
                        let more = if first == 0 { String::new() } else { format!(" + {first}") };
                        let item = format!("passage[{at}{more} + {thread}]");
                        let names: Vec<String> = list.iter().map(|v| e.held(f).variable(*v)).collect();
                        if !out {
                            e.line(&format!("{item} = vec{per}<f32>({});", names.join(", ")));
                            continue;
                        }
                        let x = e.fresh("p");
                        e.line(&format!("let {x} = {item};"));
                        for (name, c) in names.iter().zip(["x", "y", "z", "w"]) {
                            e.line(&format!("{name} = {x}.{c};"));
                        }
                    }
                }
            };
            if out {
                matrices(self)
            } else {
                elements(self)
            }
            self.barrier();
            if out {
                elements(self)
            } else {
                matrices(self)
            }
            self.products.passing = true;
        }
        Ok(())
    }

    /// Makes the elements of an accumulator current.
    fn as_elements(&mut self, f: FragId) -> Res<()> {
        let Some(a) = self.products.accumulators.get(&f).filter(|a| !a.elements) else { return Ok(()) };
        if !a.stale.is_empty() {
            return Err(self.fail("an accumulator of which a part is kept and a part is not"));
        }
        self.pass(f, true)?;
        if let Some(a) = self.products.accumulators.get_mut(&f) {
            a.elements = true;
        }
        Ok(())
    }

    /// Makes the matrices of an accumulator current.
    fn as_matrices(&mut self, f: FragId) -> Res<()> {
        let Some(a) = self.products.accumulators.get(&f) else { return Ok(()) };
        if !a.stale.is_empty() {
            return Err(self.fail("an accumulator of which a part is kept and a part is not"));
        }
        if !a.matrices {
            self.pass(f, false)?;
        }
        if let Some(a) = self.products.accumulators.get_mut(&f) {
            a.matrices = true;
        }
        Ok(())
    }

    /// A matrix from shared memory, where it has not just been loaded.
    fn matrix(&mut self, view: &View, atom: &Atom, role: &str) -> Res<String> {
        let key = format!("{role} {view:?}");
        if let Some((_, name)) = self.products.loaded.iter().find(|(k, _)| *k == key) {
            return Ok(name.clone());
        }
        let k = self.k;
        let BufSpace::Shared { layout, .. } = &k.bufs[view.buf].space else {
            return Err(self.fail("a cooperative matrix outside workgroup memory"));
        };
        let walked = |d: usize| view.walk[d].map(|(dim, _)| layout.dims[dim].as_slice());
        let (Some([rows]), Some([columns])) = (walked(0), walked(1)) else {
            return Err(self.fail("a cooperative matrix whose rows are in pieces"));
        };
        let (suffix, stride) = match (rows.stride, columns.stride) {
            (s, 1) => ("T", s),
            (1, s) => ("", s),
            _ => return Err(self.fail("a cooperative matrix of which nothing is contiguous")),
        };
        let per = self.form(view.buf).words;
        if !stride.is_multiple_of(per) {
            return Err(self.fail("a cooperative matrix whose rows begin within a vector"));
        }
        let stride = stride / per;
        let coords = self.window(view, &[Val::int(0), Val::int(0)])?;
        let at = self.index_of(view.buf, &coords)?;
        let stage = self.stage_offset(view)?;
        let at = self.bin(BinaryOp::Add, &stage, &at)?;
        let at = self.item_of(&at, per);
        let (name, variable, n) = (self.fresh("a"), self.variable(view.buf), atom.shape[0]);
        let scalar = atom.operand;
        self.line(&format!(
            "let {name} = coopLoad{suffix}<coop_mat{n}x{n}<{scalar}, {role}>>(&{variable}[{}], {stride}u);",
            at.s
        ));
        self.products.loaded.push((key, name.clone()));
        Ok(name)
    }

    /// `acc += a·b` of cooperative matrices.
    pub(super) fn product(
        &mut self,
        name: &AtomName,
        acc: FragId,
        from: &[u64],
        (a, b): (&Operand, &Operand),
        keep: &Expr,
    ) -> Res<()> {
        let keep = self.int(keep)?;
        let (Some(atom), Operand::Mem(a), Operand::Mem(b)) = (atoms::find(name), a, b) else {
            return Err(self.fail(&format!("the instruction {} of what threads hold", name.0)));
        };
        let Some(keep) = keep.known() else {
            return Err(self.fail("an accumulator that is kept or not as a value says"));
        };
        let window = [from[0], from[1]];
        let Some(of) = self.products.accumulators.get_mut(&acc).filter(|a| a.windows.contains(&window)) else {
            return Err(self.fail("a product into a part of a matrix"));
        };
        if keep == 0 && !of.matrices {
            // Every window is overwritten before anything is read.
            (of.stale, of.matrices) = (of.windows.iter().copied().collect(), true);
        }
        if keep == 0 {
            of.stale.remove(&window);
        } else if of.stale.contains(&window) {
            return Err(self.fail("an accumulator of which a part is kept and a part is not"));
        } else if !of.matrices {
            self.as_matrices(acc)?;
        }
        let x = self.matrix(a, &atom, "A")?;
        let y = self.matrix(b, &atom, "B")?;
        let sum = self.matrix_name(acc, window);
        let before = if keep == 0 { format!("coop_mat{0}x{0}<f32, C>()", atom.shape[0]) } else { sum.clone() };
        self.line(&format!("{sum} = coopMultiplyAdd({x}, {y}, {before});"));
        if let Some(a) = self.products.accumulators.get_mut(&acc) {
            a.elements = false;
        }
        Ok(())
    }

    /// Items of `per` f16 as text.
    pub(super) fn half_item(per: u64) -> String {
        if per == 1 { "f16".to_owned() } else { format!("vec{per}<f16>") }
    }

    /// Values, each of which f16 has, as one item.
    pub(super) fn halves(&self, values: &[Val]) -> String {
        let one = |v: &Val| match v.k {
            Some(k) => format!("f16({})", float_text(k as f32)),
            None => format!("f16({})", self.to(v, Ty::Float).s),
        };
        match values {
            [v] => one(v),
            list => {
                let list: Vec<String> = list.iter().map(one).collect();
                format!("vec{}<f16>({})", list.len(), list.join(", "))
            }
        }
    }
}
