//! assign-layouts: swizzled layouts for shared tiles; for register tiles, who holds which element.
//!
//! Contractions seed the distributions: an accumulator is held as its atom says (PTX ISA, "wgmma.mma_async": register
//! fragments), repeated over the tile. Elementwise operations and reductions carry them on: an operand is held like
//! the result, projected to its dimensions. Where the distribution a tile has by its producer is the one an atom asks of
//! an operand, nothing moves (softmax's P from accumulator to A operand). Tiles that no atom reaches are held as
//! [`super::spread`] says. Invariant: after this step every register
//! tile has a distribution that every user agrees with; a disagreement is refused.

use einfall_ir::arena::Id;
use einfall_ir::kernel::AtomName;
use einfall_ir::kernel::atoms::{self, Atom};
use einfall_ir::layout::{DistDigit, Distribution, MemLayout};
use einfall_ir::mapping::Source;
use einfall_ir::tile::{AxisId, Expr, Op, Space, TileId};

use super::apply_mapping::Facts;
use super::spread::Spread;
use super::{Step, refuse};

/// A contraction seen by its instruction.
pub(super) struct Oriented {
    pub atom: Atom,
    /// The tile that is the instruction's left operand, and the right one.
    pub a: TileId,
    pub b: TileId,
    /// Sized axes.
    pub m: AxisId,
    pub n: AxisId,
    pub k: AxisId,
    /// Extents per unit.
    pub extents: [u64; 3],
}

/// The contraction `op` by its atom.
///
/// # Errors
/// No atom, or a shape the atom cannot tile.
pub(super) fn orient(f: &Facts<'_>, at: usize) -> Step<Oriented> {
    let o = &f.ops[at];
    let Op::Contract { out, a, b, over, .. } = o.op else {
        return refuse("atoms", format!("{} is no contraction", o.name), "give atoms to contractions only");
    };
    let Some(name) = &o.mapping.atom else {
        return refuse("atoms", format!("contraction {} has no atom", o.name), "add `atom` to its `op` line");
    };
    let Some(atom) = atoms::find(&AtomName(name.clone())) else {
        return refuse("atoms", format!("there is no atom {name}"), "e.g. wgmma.m64n128k16.bf16");
    };
    let (a, b) = if o.mapping.swapped { (*b, *a) } else { (*a, *b) };
    let kept = f.sized(&f.kernel.tiles[*out].axes);
    let has = |t: TileId, x: &AxisId| f.kernel.tiles[t].axes.contains(x);
    let m: Vec<_> = kept.iter().copied().filter(|x| has(a, x) && !has(b, x)).collect();
    let n: Vec<_> = kept.iter().copied().filter(|x| has(b, x) && !has(a, x)).collect();
    let k = f.sized(over);
    let ([m], [n], [k]) = (m.as_slice(), n.as_slice(), k.as_slice()) else {
        let message = format!("{} has {} row, {} column and {} summed dimensions", o.name, m.len(), n.len(), k.len());
        return refuse("atom shape", message, "block all but one axis of each to 1");
    };
    if kept.len() != 2 {
        return refuse("atom shape", format!("{} has a batch dimension", o.name), "block batch axes to 1");
    }
    let extents = [f.axis(*m).per_unit(), f.axis(*n).per_unit(), f.axis(*k).block];
    for (i, what) in ["m", "n", "k"].into_iter().enumerate() {
        if !extents[i].is_multiple_of(atom.shape[i]) {
            let message = format!("{what} of {} is {} per unit, the atom takes {}", o.name, extents[i], atom.shape[i]);
            return refuse("atom shape", message, "make the block a multiple");
        }
    }
    if f.kernel.tiles[*out].dtype != atom.acc {
        let (have, want) = (f.kernel.tiles[*out].dtype, atom.acc);
        return refuse("atom types", format!("{} is {have}, the atom accumulates in {want}", o.name), "declare it so");
    }
    if f.roles[o.role].scope != atom.scope {
        return refuse("atom scope", format!("{} runs in {} units", o.name, f.roles[o.role].role), "match the atom");
    }
    for t in [a, b] {
        let (have, want) = (f.kernel.tiles[t].dtype, atom.operand);
        // Threads that load their own operands from shared memory widen them on the way.
        let widened =
            atom.threads_alone() && f.tile(t).space == Space::Shared && have.is_float() && have.bits() <= want.bits();
        if have != want && !widened {
            return refuse("atom types", format!("{} is {have}, the atom takes {want}", f.tile(t).name), "convert it");
        }
    }
    Ok(Oriented { atom, a, b, m: *m, n: *n, k: *k, extents })
}

/// The atom's window distribution repeated over a tile of `extents`, first along `first`.
pub(super) fn repeated(window: &Distribution, extents: [u64; 2], first: usize) -> Distribution {
    let mut d = Distribution { dims: extents.to_vec(), ..window.clone() };
    for dim in [first, 1 - first] {
        let extent = extents[dim] / window.dims[dim];
        if extent > 1 {
            d.regs.push(DistDigit { extent, dim, stride: window.dims[dim] });
        }
    }
    d
}

/// Assigns every layout and distribution.
///
/// # Errors
/// A layout the engines cannot use, or users that disagree about a distribution.
pub(super) fn run(mut f: Facts<'_>) -> Step<Facts<'_>> {
    for (id, t) in f.kernel.tiles.iter() {
        let dims = f.sized(&t.axes);
        if f.tile(id).space == Space::Shared {
            if t.axes.iter().any(|a| f.axis(*a).block > 1 && !f.axis(*a).sized()) {
                let message = format!("shared tile {} has one coordinate per unit", t.name);
                return refuse("units", message, "cut the axis over fewer units");
            }
            let layout = shared(&f, id, &dims)?;
            f.tiles[id.index()].layout = Some(layout);
        }
        f.tiles[id.index()].dims = dims;
    }
    let mut known: Vec<Option<(Vec<AxisId>, Distribution)>> = vec![None; f.tiles.len()];
    for at in 0..f.ops.len() {
        let Op::Contract { out, .. } = f.ops[at].op else { continue };
        let o = orient(&f, at)?;
        let [m, n, k] = o.extents;
        let acc = (vec![o.m, o.n], repeated(&o.atom.acc_dist, [m, n], 1));
        assign(&f, &mut known, *out, acc)?;
        if f.tile(*out).space != Space::Registers {
            return refuse("accumulators", format!("{} is not in registers", f.tile(*out).name), "put it there");
        }
        let registers = f.tile(o.a).space == Space::Registers;
        if registers != (f.ops[at].mapping.a == Source::Registers) {
            return refuse(
                "operand source",
                format!("{} and its tile disagree", f.ops[at].name),
                "write `a registers`",
            );
        }
        if f.tile(o.b).space != Space::Shared || (!registers && !o.atom.a_memory && o.atom.a_dist.is_none()) {
            return refuse("operand source", format!("{} is not in shared memory", f.tile(o.b).name), "put it there");
        }
        if registers && known[o.a.index()].is_none() && is_loaded(&f, o.a) {
            let Some(window) = &o.atom.a_dist else {
                return refuse("operand source", "this atom reads no register operand", "use shared memory");
            };
            assign(&f, &mut known, o.a, (vec![o.m, o.k], repeated(window, [m, k], 1)))?;
        }
    }
    propagate(&f, &mut known)?;
    // An operand made of what no contraction constrains is held as its instruction reads it.
    for at in 0..f.ops.len() {
        if matches!(f.ops[at].op, Op::Contract { .. }) && f.ops[at].mapping.a == Source::Registers {
            let o = orient(&f, at)?;
            if let (None, Some(window)) = (&known[o.a.index()], &o.atom.a_dist) {
                let [m, _, k] = o.extents;
                assign(&f, &mut known, o.a, (vec![o.m, o.k], repeated(window, [m, k], 1)))?;
                propagate(&f, &mut known)?;
            }
        }
    }
    f.spreads = (0..f.roles.len()).map(|role| Spread::of(&f, role)).collect();
    for (i, k) in known.into_iter().enumerate() {
        let id = TileId::new(i);
        if f.tile(id).space != Space::Registers {
            continue;
        }
        match k {
            Some((dims, dist)) => {
                f.tiles[i].dims = dims;
                f.tiles[i].dist = Some(dist);
            }
            None => {
                let Some(writer) = f.ops.iter().find(|o| o.op.outs().contains(&id)) else { continue };
                let dims = f.tiles[i].dims.clone();
                let Some(dist) = f.spreads[writer.role].over(&dims) else {
                    let message = format!("nothing says how tile {} is distributed", f.tiles[i].name);
                    return refuse("distribution", message, "block all but a few of its axes to 1");
                };
                f.tiles[i].dist = Some(dist);
            }
        }
    }
    for at in 0..f.ops.len() {
        if !matches!(f.ops[at].op, Op::Contract { .. }) || f.ops[at].mapping.a != Source::Registers {
            continue;
        }
        let o = orient(&f, at)?;
        let (dims, dist) = (&f.tile(o.a).dims, f.tile(o.a).dist.as_ref());
        let steps = o.extents[2] / o.atom.shape[2];
        let agrees = dims[..] == [o.m, o.k]
            && dist
                .zip(o.atom.a_dist.as_ref())
                .is_some_and(|(d, window)| (0..steps).all(|s| Atom::holds(d, &[0, s * o.atom.shape[2]], window)));
        if !agrees {
            let message = format!("{} is not held as the operand of {} must be", f.tile(o.a).name, f.ops[at].name);
            return refuse("operand distribution", message, "pass it through shared memory");
        }
    }
    Ok(f)
}

fn is_loaded(f: &Facts<'_>, t: TileId) -> bool {
    f.ops.iter().any(|o| matches!(o.op, Op::Load { out, .. } if *out == t))
}

/// The layout of a shared tile: hardware-swizzled panels, or row-major.
fn shared(f: &Facts<'_>, id: TileId, dims: &[AxisId]) -> Step<MemLayout> {
    let t = f.tile(id);
    let extents: Vec<u64> = dims.iter().map(|a| f.axis(*a).block).collect();
    let read = |how: fn(&Atom) -> bool| is_read(f, id, how);
    if t.mapping.swizzle == 0 && read(Atom::cooperative) {
        // Rows 16 bytes apart, so that those which are read together lie in different banks.
        return Ok(MemLayout::padded(&extents, 16 / f.kernel.tiles[id].dtype.bytes(1)));
    }
    if let (&[x, y], true) = (extents.as_slice(), t.mapping.swizzle == 0 && read_along(f, id, dims)) {
        // A word an element, whatever is loaded.
        if let Some(l) = MemLayout::staggered([x, y], 4) {
            return Ok(l);
        }
    }
    if t.mapping.swizzle == 0 && !read(|a| a.asynchronous) {
        return Ok(MemLayout::row_major(&extents));
    }
    let bytes = f.kernel.tiles[id].dtype.bytes(1);
    let inner = match &t.mapping.contiguous {
        None => extents.len().checked_sub(1),
        Some(name) => dims.iter().position(|a| f.axis_name(*a) == name),
    };
    let layout = match (extents.as_slice(), inner) {
        (&[x, y], Some(inner)) if t.mapping.swizzle == 0 => MemLayout::core_matrices([x, y], inner, bytes),
        (&[x, y], Some(inner)) => MemLayout::swizzled_panels([x, y], inner, bytes, t.mapping.swizzle),
        _ => None,
    };
    match layout {
        Some(l) => Ok(l),
        None => {
            let message = format!("tile {} of {extents:?} has no {}-byte swizzle", t.name, t.mapping.swizzle);
            refuse("swizzle", message, "the contiguous extent must be a multiple of the span")
        }
    }
}

/// Whether threads that load their own operands read the tile along what they sum, neighbours in rows of their own: those of
/// a right operand are its columns. Neighbours share the rows of a left operand.
fn read_along(f: &Facts<'_>, id: TileId, dims: &[AxisId]) -> bool {
    f.ops.iter().any(|o| {
        let atom = o.mapping.atom.as_ref().and_then(|a| atoms::find(&AtomName(a.clone())));
        let Op::Contract { a, b, over, .. } = o.op else { return false };
        let right = if o.mapping.swapped { a } else { b };
        *right == id && atom.is_some_and(|a| a.threads_alone()) && dims.last().is_some_and(|last| over.contains(last))
    })
}

/// Whether an instruction that is such a one reads the tile itself: through a matrix descriptor, or as a cooperative matrix.
fn is_read(f: &Facts<'_>, id: TileId, how: fn(&Atom) -> bool) -> bool {
    f.ops.iter().any(|o| {
        let atom = o.mapping.atom.as_ref().and_then(|a| atoms::find(&AtomName(a.clone())));
        matches!(o.op, Op::Contract { a, b, .. } if *a == id || *b == id) && atom.is_some_and(|a| how(&a))
    })
}

type Held = (Vec<AxisId>, Distribution);

fn assign(f: &Facts<'_>, known: &mut [Option<Held>], t: TileId, held: Held) -> Step<()> {
    if f.tile(t).space != Space::Registers {
        return Ok(());
    }
    match &known[t.index()] {
        None => {
            known[t.index()] = Some(held);
            Ok(())
        }
        Some(h) if same(h, &held) => Ok(()),
        Some(_) => refuse(
            "distribution",
            format!("two operations hold tile {} in different ways", f.tile(t).name),
            "pass it through shared memory",
        ),
    }
}

/// Whether both hold the same elements in the same registers of the same threads.
fn same(x: &Held, y: &Held) -> bool {
    if x.0 != y.0 || x.1.dims != y.1.dims || x.1.counts() != y.1.counts() {
        return false;
    }
    let (threads, regs, _) = x.1.counts();
    // Digits that are cut otherwise may still agree.
    if x.1 == y.1 {
        return true;
    }
    let (a, b) = (x.1.terms(), y.1.terms());
    (0..threads).all(|t| (0..regs).all(|v| a.at(t, v, 0).eq(b.at(t, v, 0))))
}

/// Carries distributions through elementwise operations, reductions, loads and stores.
fn propagate(f: &Facts<'_>, known: &mut [Option<Held>]) -> Step<()> {
    loop {
        let before = known.iter().flatten().count();
        for at in 0..f.ops.len() {
            let tiles = operands(f, at);
            let Some((dims, dist)) = anchor(f, known, &tiles, &domain(f, at)) else { continue };
            for t in tiles {
                let own = f.sized(&f.kernel.tiles[t].axes);
                let kept: Vec<usize> = (0..dims.len()).filter(|d| own.contains(&dims[*d])).collect();
                if kept.len() == own.len() {
                    let axes = kept.iter().map(|d| dims[*d]).collect();
                    assign(f, known, t, (axes, dist.project(&kept)))?;
                }
            }
        }
        if known.iter().flatten().count() == before {
            return Ok(());
        }
    }
}

/// The register tiles that an elementwise operation, reduction or store ties together.
pub(super) fn operands(f: &Facts<'_>, at: usize) -> Vec<TileId> {
    let op = f.ops[at].op;
    let mut tiles = match op {
        Op::Contract { .. } => return Vec::new(),
        Op::Load { out, .. } => vec![*out],
        Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Scan { .. } => f.reads(op),
    };
    tiles.extend(op.outs());
    tiles.retain(|t| f.tile(*t).space == Space::Registers);
    tiles.sort();
    tiles.dedup();
    tiles
}

/// The sized axes an operation ranges over, under the names its register tiles have them (see [`renamed`]).
pub(super) fn domain(f: &Facts<'_>, at: usize) -> Vec<AxisId> {
    let op = f.ops[at].op;
    let axes: Vec<AxisId> = match op {
        Op::Load { out, .. } | Op::Map { out, .. } | Op::Scan { out, .. } | Op::Contract { out, .. } => {
            f.kernel.tiles[*out].axes.clone()
        }
        Op::Reduce { out, over, .. } => f.kernel.tiles[out[0]].axes.iter().chain(over).copied().collect(),
        Op::Store { axes, .. } => axes.clone(),
    };
    let renames = renamed(f, at);
    let axes = axes.into_iter().map(|a| renames.iter().find(|(to, _)| *to == a).map_or(a, |(_, own)| *own));
    f.sized(&axes.collect::<Vec<_>>())
}

/// Pairs (axis of the operation, axis of the tile read in its place).
pub(super) fn renamed(f: &Facts<'_>, at: usize) -> Vec<(AxisId, AxisId)> {
    let mut pairs = Vec::new();
    for root in f.ops[at].op.roots() {
        f.kernel.walk(root, &mut |_, e| {
            if let Expr::TileAt { tile, at } = e {
                for (own, place) in f.kernel.tiles[*tile].axes.iter().zip(at) {
                    if let einfall_ir::tile::Place::Axis(a) = place
                        && a != own
                        && !pairs.contains(&(*a, *own))
                    {
                        pairs.push((*a, *own));
                    }
                }
            }
        });
    }
    pairs
}

/// A known distribution over the whole domain.
pub(super) fn anchor(f: &Facts<'_>, known: &[Option<Held>], tiles: &[TileId], domain: &[AxisId]) -> Option<Held> {
    let covers = |h: &&Held| domain.iter().all(|a| h.0.contains(a)) && h.0.len() == domain.len();
    let _ = f;
    tiles.iter().filter_map(|t| known[t.index()].as_ref()).find(covers).cloned()
}
