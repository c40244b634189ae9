//! The discrete skeleton of a GPU mapping: which axes are cut, how contractions are oriented, where tiles live, which
//! roles run, which schedule they follow. What is left are numbers, which [`super::space`] makes variables.
//!
//! Every structure is checked by the lowering's own rules: contractions see one row, one column and one summed axis;
//! who holds what follows from their accumulators through elementwise operations and reductions; register tiles stay
//! in one role; a schedule never reorders the uses of a register tile. Invariant: [`structures`] lists each structure
//! once, simplest first; one that breaks a rule is left out, with the rule's name where none is left.

use einfall_ir::arena::Id;
use einfall_ir::dtype::DType;
use einfall_ir::tile::{AxisId, AxisKind, Expr, ExprId, Op, TileId};

use super::facts::{Facts, Unsupported, renamed, unsupported};
use super::family::Family;

/// Most structures of one kernel.
const MOST: usize = 256;

/// A contraction seen by its instruction.
#[derive(Clone, Debug, PartialEq)]
pub struct Contraction {
    /// Its operation.
    pub op: usize,
    /// Whether its operands are exchanged.
    pub swapped: bool,
    /// The accumulator, the instruction's left operand and the right one.
    pub out: TileId,
    /// Left operand.
    pub a: TileId,
    /// Right operand.
    pub b: TileId,
    /// Row axis.
    pub m: AxisId,
    /// Column axis.
    pub n: AxisId,
    /// Summed axis.
    pub k: AxisId,
    /// Operands' type.
    pub operand: DType,
}

/// Where a tile lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing touches it.
    Unused,
    /// In registers.
    Registers,
    /// In shared memory, filled by a copy engine; the axis that is contiguous there.
    Fetched(AxisId),
    /// In shared memory, filled by the consumers.
    Written(AxisId),
}

impl Place {
    /// The contiguous axis of a shared tile.
    pub fn shared(self) -> Option<AxisId> {
        match self {
            Place::Fetched(a) | Place::Written(a) => Some(a),
            Place::Unused | Place::Registers => None,
        }
    }
}

/// How a register tile is held, relative to an accumulator of rows × columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Rows and columns.
    Whole(AxisId, AxisId),
    /// One value per row.
    Rows(AxisId),
    /// One value per column.
    Columns(AxisId),
    /// One value.
    Scalar,
}

impl Held {
    fn dims(self) -> Vec<AxisId> {
        match self {
            Held::Whole(x, y) => vec![x, y],
            Held::Rows(x) | Held::Columns(x) => vec![x],
            Held::Scalar => Vec::new(),
        }
    }

    /// The part of it over the axes that `own` keeps; none if it lacks one of them.
    fn project(self, own: &[AxisId]) -> Option<Held> {
        let kept: Vec<AxisId> = self.dims().into_iter().filter(|a| own.contains(a)).collect();
        if kept.len() != own.len() {
            return None;
        }
        Some(match (self, kept.as_slice()) {
            (_, []) => Held::Scalar,
            (Held::Whole(x, _), [a]) if *a == x => Held::Rows(x),
            (Held::Whole(_, y), [_]) => Held::Columns(y),
            (held, _) => held,
        })
    }
}

/// When operations of a stream run, relative to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// As written.
    Plain,
    /// Contractions of what the step computes run one trip behind, beside the elementwise work of the next.
    Overlapped,
    /// What a step loads is fetched so many trips ahead by the role that uses it.
    Prefetched(u64),
}

/// A store with how it may leave.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaving {
    /// Its operation.
    pub op: usize,
    /// Whether a copy engine can carry it, through which staging tile's sized axes (outermost first).
    pub staged: Option<[AxisId; 2]>,
    /// A fetched tile whose memory the staging can take over.
    pub reuses: Option<TileId>,
}

/// A structure.
#[derive(Clone, Debug, PartialEq)]
pub struct Structure {
    /// Whether each axis is cut into blocks of several coordinates.
    pub sized: Vec<bool>,
    /// The contractions.
    pub contractions: Vec<Contraction>,
    /// Where tiles live, by position.
    pub places: Vec<Place>,
    /// How register tiles are held, by position.
    pub held: Vec<Option<Held>>,
    /// Whether a warp of its own issues the copies.
    pub producer: bool,
    /// The axis that units of the consumers cut.
    pub cut: Option<AxisId>,
    /// The schedule.
    pub schedule: Schedule,
    /// Iterations each operation runs behind.
    pub skews: Vec<u64>,
    /// Each operation's place in a trip.
    pub slots: Vec<u64>,
    /// Stores.
    pub stores: Vec<Leaving>,
}

impl Structure {
    /// Whether an axis is cut into blocks of several coordinates.
    pub fn is_sized(&self, a: AxisId) -> bool {
        self.sized[a.index()]
    }

    /// The sized axes among `axes`.
    pub fn sized_of(&self, axes: &[AxisId]) -> Vec<AxisId> {
        axes.iter().copied().filter(|a| self.is_sized(*a)).collect()
    }

    /// Fetched tiles.
    pub fn fetched(&self) -> impl Iterator<Item = TileId> + '_ {
        self.places.iter().enumerate().filter(|(_, p)| matches!(p, Place::Fetched(_))).map(|(i, _)| TileId::new(i))
    }

    /// Tiles in shared memory that consumers write.
    pub fn written(&self) -> impl Iterator<Item = TileId> + '_ {
        self.places.iter().enumerate().filter(|(_, p)| matches!(p, Place::Written(_))).map(|(i, _)| TileId::new(i))
    }

    /// Whether the operation is issued by the producer.
    pub fn in_producer(&self, facts: &Facts<'_>, op: usize) -> bool {
        self.producer && self.fetches(facts, op)
    }

    /// Whether the operation is a copy by an engine.
    pub fn fetches(&self, facts: &Facts<'_>, op: usize) -> bool {
        matches!(facts.ops[op].op, Op::Load { out, .. } if matches!(self.places[out.index()], Place::Fetched(_)))
    }

    /// Operations of the consumers in one trip of a stream, in the order they run.
    pub fn trip(&self, facts: &Facts<'_>, stream: usize) -> Vec<usize> {
        let own = |i: &usize| facts.ops[*i].stream == Some(stream) && !self.in_producer(facts, *i);
        let mut ops: Vec<usize> = (0..facts.ops.len()).filter(own).collect();
        ops.sort_by_key(|i| (self.slots[*i], *i));
        ops
    }
}

/// Every structure of a kernel, simplest first.
///
/// # Errors
/// Why there is none.
pub fn structures(facts: &Facts<'_>, family: Family) -> Result<Vec<Structure>, Unsupported> {
    if facts.contractions().next().is_none() {
        return unsupported("contractions", "the kernel has none");
    }
    let mut out: Vec<Structure> = Vec::new();
    let mut why = None;
    for sized in cuts(facts, family)? {
        for swaps in 0..1u32 << facts.contractions().count().min(6) {
            let contractions = match oriented(facts, family, &sized, swaps) {
                Ok(c) => c,
                Err(e) => {
                    why = why.or(Some(e));
                    continue;
                }
            };
            for choice in 0..4 {
                let (computed, loaded) = (choice & 1 == 0, choice & 2 != 0);
                match placed(facts, family, &sized, &contractions, computed, loaded) {
                    Ok(base) => variants(facts, family, base, &mut out, &mut why),
                    Err(e) => why = why.or(Some(e)),
                }
                if out.len() >= MOST {
                    return Ok(out);
                }
            }
        }
    }
    match why {
        Some(e) if out.is_empty() => Err(e),
        _ => Ok(out),
    }
}

/// The simplest structure whose contractions share their rows, with what is computed in registers and what is loaded in
/// shared memory.
///
/// # Errors
/// Why there is none.
pub fn in_registers(facts: &Facts<'_>, family: Family) -> Result<Structure, Unsupported> {
    let mut why = None;
    for sized in cuts(facts, family)? {
        let found = oriented(facts, family, &sized, 0).and_then(|c| placed(facts, family, &sized, &c, true, false));
        match found {
            Ok(s) if s.written().next().is_some() => {}
            Ok(s) if s.contractions.windows(2).any(|c| c[0].m != c[1].m) => {}
            Ok(s) => return Ok(s),
            Err(e) => why = why.or(Some(e)),
        }
    }
    match why {
        Some(e) => Err(e),
        None => unsupported("operand source", "no rows are shared, or a right operand is computed"),
    }
}

/// Ways to choose which axes are cut.
fn cuts(facts: &Facts<'_>, family: Family) -> Result<Vec<Vec<bool>>, Unsupported> {
    let touched = |t: TileId| facts.ops.iter().any(|o| o.touches(t));
    let used = |a: AxisId| {
        facts.streams.iter().any(|s| s.axis == a)
            || facts.kernel.tiles.ids().any(|t| facts.tile_axes(t).contains(&a) && touched(t))
    };
    let mut must = vec![false; facts.axes.len()];
    let mut may: Vec<usize> = Vec::new();
    for (i, a) in facts.axes.iter().enumerate() {
        match a.kind {
            // An axis that nothing has is left alone.
            AxisKind::Inner | AxisKind::Stream => must[i] = !a.single() && used(AxisId::new(i)),
            AxisKind::Grid if a.single() => {}
            AxisKind::Grid => {
                let touched = facts.contractions().any(|c| {
                    let Op::Contract { a: x, b: y, .. } = facts.ops[c].op else { return false };
                    let id = AxisId::new(i);
                    facts.tile_axes(*x).contains(&id) != facts.tile_axes(*y).contains(&id)
                });
                if touched {
                    may.push(i);
                }
            }
        }
    }
    // The last axes first: what is contiguous, and long, comes last.
    may.reverse();
    may.truncate(6);
    let mut all = Vec::new();
    let mut why = None;
    let mut codes: Vec<u32> = (0..1 << may.len()).collect();
    codes.sort_by_key(|c| (c.count_ones(), *c));
    for code in codes {
        let mut sized = must.clone();
        for (bit, i) in may.iter().enumerate() {
            sized[*i] = code >> bit & 1 == 1;
        }
        match oriented(facts, family, &sized, 0) {
            Ok(_) => all.push(sized),
            // Rules of types say more than those of shapes that another cut may have.
            Err(e) if why.as_ref().is_none_or(|w: &Unsupported| w.constraint == "atom shape") => why = Some(e),
            Err(_) => {}
        }
    }
    if let (true, Some(why)) = (all.is_empty(), why) {
        return Err(why);
    }
    Ok(all)
}

fn oriented(facts: &Facts<'_>, family: Family, sized: &[bool], swaps: u32) -> Result<Vec<Contraction>, Unsupported> {
    let mut out = Vec::new();
    for (i, op) in facts.contractions().enumerate() {
        let Op::Contract { out: o, a, b, over, .. } = facts.ops[op].op else { continue };
        let swapped = swaps >> i.min(5) & 1 == 1;
        let (a, b) = if swapped { (*b, *a) } else { (*a, *b) };
        let has = |t: TileId, x: AxisId| facts.tile_axes(t).contains(&x);
        let cut = |x: &AxisId| sized[x.index()];
        let kept: Vec<AxisId> = facts.tile_axes(*o).iter().copied().filter(cut).collect();
        let m: Vec<AxisId> = kept.iter().copied().filter(|x| has(a, *x) && !has(b, *x)).collect();
        let n: Vec<AxisId> = kept.iter().copied().filter(|x| has(b, *x) && !has(a, *x)).collect();
        let k: Vec<AxisId> = over.iter().copied().filter(cut).collect();
        let name = &facts.ops[op].name;
        let ([m], [n], [k]) = (m.as_slice(), n.as_slice(), k.as_slice()) else {
            let message = format!("{name} has {} row, {} column and {} summed axes", m.len(), n.len(), k.len());
            return unsupported("atom shape", message);
        };
        if kept.len() != 2 {
            return unsupported("atom shape", format!("{name} has a batch axis"));
        }
        let (x, y) = (facts.kernel.tiles[a].dtype, facts.kernel.tiles[b].dtype);
        if !family.takes(x, y) {
            return unsupported(
                "atom types",
                format!("{name} takes {x} and {y}; instructions take two of bf16 or f16"),
            );
        }
        if facts.kernel.tiles[*o].dtype != DType::F32 {
            return unsupported("atom types", format!("{name} accumulates in {}", facts.kernel.tiles[*o].dtype));
        }
        out.push(Contraction { op, swapped, out: *o, a, b, m: *m, n: *n, k: *k, operand: x });
    }
    Ok(out)
}

/// The structure with every tile in its place; roles and schedule are the simplest. `computed`: computed left operands
/// stay in registers; `loaded`: left operands loaded once do.
fn placed(
    facts: &Facts<'_>,
    family: Family,
    sized: &[bool],
    contractions: &[Contraction],
    computed: bool,
    loaded: bool,
) -> Result<Structure, Unsupported> {
    let cut = |a: AxisId| sized[a.index()];
    let mut places = vec![Place::Unused; facts.kernel.tiles.len()];
    let (mut asked_computed, mut asked_loaded) = (false, false);
    for id in facts.kernel.tiles.ids() {
        if !facts.ops.iter().any(|o| o.touches(id)) {
            continue;
        }
        places[id.index()] = Place::Registers;
        let right = contractions.iter().any(|c| c.b == id);
        let left = contractions.iter().any(|c| c.a == id);
        let load = facts.load_of(id);
        let whole = facts.writers(id).len() == 1;
        let once = load.is_some_and(|l| facts.ops[l].stream.is_none());
        let both = left && right;
        let stays = left && !right && if load.is_some() { once && loaded } else { computed };
        asked_computed |= left && !both && load.is_none();
        asked_loaded |= left && !both && once;
        if !right && (stays || !left) {
            continue;
        }
        let name = &facts.kernel.tiles[id].name;
        if !whole {
            return unsupported("channels", format!("tile {name} is written several times, so it has no ring buffer"));
        }
        let own: Vec<AxisId> = facts.tile_axes(id).iter().copied().filter(|a| cut(*a)).collect();
        let [_, last] = own.as_slice() else {
            return unsupported("swizzle", format!("tile {name} does not have two sized axes"));
        };
        places[id.index()] = match load {
            Some(l) => Place::Fetched(boxed(facts, sized, l, &own)?),
            None => match facts.ops[facts.writers(id)[0]].op {
                Op::Map { .. } => Place::Written(*last),
                Op::Load { .. } | Op::Store { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } => {
                    return unsupported("channels", format!("tile {name} cannot be written to shared memory"));
                }
            },
        };
        let writer = facts.writers(id)[0];
        let stream = facts.ops[writer].stream;
        let mut readers = facts.ops.iter().filter(|o| o.reads.contains(&id));
        if stream.is_some() && readers.any(|o| o.stream != stream) {
            return unsupported("channels", format!("tile {name} is read outside its stream"));
        }
    }
    // Each combination once.
    if (!computed && !asked_computed) || (loaded && !asked_loaded) {
        return unsupported("operand source", "no operand can come from there");
    }
    let mut s = Structure {
        sized: sized.to_vec(),
        contractions: contractions.to_vec(),
        places,
        held: vec![None; facts.kernel.tiles.len()],
        producer: false,
        cut: None,
        schedule: Schedule::Plain,
        skews: vec![0; facts.ops.len()],
        slots: vec![0; facts.ops.len()],
        stores: Vec::new(),
    };
    hold(facts, &mut s)?;
    operations(facts, &s)?;
    s.stores = stores(facts, family, &s);
    Ok(s)
}

/// The contiguous axis of a tile that a copy engine fetches.
fn boxed(facts: &Facts<'_>, sized: &[bool], load: usize, own: &[AxisId]) -> Result<AxisId, Unsupported> {
    let Op::Load { at, out, .. } = facts.ops[load].op else {
        return unsupported("copy engine", "only loads are fetched");
    };
    let name = &facts.kernel.tiles[*out].name;
    let place: Vec<Option<Option<AxisId>>> = at.iter().map(|e| facts.linear(*e, &|a| sized[a.index()])).collect();
    let found: Vec<AxisId> = place.iter().flatten().flatten().copied().collect();
    let once = own.iter().all(|a| found.iter().filter(|f| *f == a).count() == 1) && found.len() == own.len();
    if place.iter().any(Option::is_none) || !once {
        return unsupported("copy engine", format!("{name} is not a box of its array"));
    }
    let Op::Load { buffer, .. } = facts.ops[load].op else {
        return unsupported("copy engine", "only loads are fetched");
    };
    // What is summed must be 0 beyond the axis, which an engine makes so at the array's edge only.
    let summed = |a: AxisId| {
        facts.contractions().any(|c| matches!(facts.ops[c].op, Op::Contract { over, .. } if over.contains(&a)))
    };
    for ((e, p), dim) in at.iter().zip(&place).zip(&facts.plan.buffers[*buffer].dims) {
        if let Some(Some(a)) = p
            && summed(*a)
            && (facts.kernel.exprs[*e] != Expr::Coord(*a) || facts.kernel.axes[*a].extent != *dim)
        {
            return unsupported("copy engine", format!("{name} is summed over a part of its array"));
        }
    }
    match place.last() {
        Some(Some(Some(a))) => Ok(*a),
        _ => unsupported("copy engine", format!("{name} does not walk the contiguous dimension of its array")),
    }
}

/// The sized axes an operation ranges over, under the names its register tiles have them.
fn domain(facts: &Facts<'_>, s: &Structure, at: usize) -> Vec<AxisId> {
    let op = facts.ops[at].op;
    let axes: Vec<AxisId> = match op {
        Op::Load { out, .. } | Op::Map { out, .. } | Op::Scan { out, .. } | Op::Contract { out, .. } => {
            facts.tile_axes(*out).to_vec()
        }
        Op::Reduce { out, over, .. } => facts.tile_axes(out[0]).iter().chain(over).copied().collect(),
        Op::Store { axes, .. } => axes.clone(),
    };
    let renames = renamed(facts.kernel, op);
    let own = axes.into_iter().map(|a| renames.iter().find(|(to, _)| *to == a).map_or(a, |(_, own)| *own));
    s.sized_of(&own.collect::<Vec<_>>())
}

/// Register tiles that a non-contraction ties together.
fn operands(facts: &Facts<'_>, s: &Structure, at: usize) -> Vec<TileId> {
    let o = &facts.ops[at];
    let mut tiles = match o.op {
        Op::Contract { .. } => return Vec::new(),
        Op::Load { .. } => Vec::new(),
        Op::Store { .. } | Op::Map { .. } | Op::Reduce { .. } | Op::Scan { .. } => o.reads.clone(),
    };
    tiles.extend(o.op.outs());
    tiles.retain(|t| s.places[t.index()] == Place::Registers);
    tiles.sort();
    tiles.dedup();
    tiles
}

/// Who holds what: from accumulators and loaded register operands through the other operations.
fn hold(facts: &Facts<'_>, s: &mut Structure) -> Result<(), Unsupported> {
    let assign = |held: &mut Vec<Option<Held>>, t: TileId, h: Held| match held[t.index()] {
        Some(other) if other != h => {
            let name = &facts.kernel.tiles[t].name;
            unsupported("distribution", format!("two operations hold tile {name} in different ways"))
        }
        Some(_) => Ok(()),
        None => {
            held[t.index()] = Some(h);
            Ok(())
        }
    };
    for c in s.contractions.clone() {
        assign(&mut s.held, c.out, Held::Whole(c.m, c.n))?;
        if s.places[c.a.index()] == Place::Registers && facts.load_of(c.a).is_some() {
            assign(&mut s.held, c.a, Held::Whole(c.m, c.k))?;
        }
    }
    loop {
        let before = s.held.iter().flatten().count();
        for at in 0..facts.ops.len() {
            let tiles = operands(facts, s, at);
            let Some(whole) = frame(facts, s, at, &tiles) else { continue };
            for t in tiles {
                let own = s.sized_of(facts.tile_axes(t));
                if let Some(h) = whole.project(&own) {
                    assign(&mut s.held, t, h)?;
                }
            }
        }
        if s.held.iter().flatten().count() == before {
            break;
        }
    }
    for (i, place) in s.places.iter().enumerate() {
        if *place == Place::Registers && s.held[i].is_none() {
            let name = &facts.kernel.tiles[TileId::new(i)].name;
            return unsupported("distribution", format!("nothing says how tile {name} is distributed"));
        }
    }
    for c in &s.contractions {
        if s.places[c.a.index()] == Place::Registers && s.held[c.a.index()] != Some(Held::Whole(c.m, c.k)) {
            let name = &facts.kernel.tiles[c.a].name;
            return unsupported("operand distribution", format!("{name} is not held as an operand must be"));
        }
    }
    Ok(())
}

/// How the elements that an operation ranges over are held: as one of its register tiles that has them all.
pub(super) fn frame(facts: &Facts<'_>, s: &Structure, at: usize, tiles: &[TileId]) -> Option<Held> {
    let domain = domain(facts, s, at);
    let covers = |h: &Held| {
        let dims = h.dims();
        dims.len() == domain.len() && domain.iter().all(|a| dims.contains(a))
    };
    tiles.iter().filter_map(|t| s.held[t.index()]).find(covers)
}

/// The frame of an operation, found among the tiles it ties together.
pub(super) fn frame_of(facts: &Facts<'_>, s: &Structure, at: usize) -> Option<Held> {
    frame(facts, s, at, &operands(facts, s, at))
}

/// Whether `e` is the same for all elements of a task's tile.
pub(super) fn uniform(facts: &Facts<'_>, s: &Structure, e: ExprId) -> bool {
    let mut same = true;
    facts.kernel.walk(e, &mut |_, x| {
        same &= !matches!(x, Expr::Tile(_) | Expr::TileAt { .. }) && !matches!(x, Expr::Coord(a) if s.is_sized(*a));
    });
    same
}

/// Rules of single operations.
fn operations(facts: &Facts<'_>, s: &Structure) -> Result<(), Unsupported> {
    for (at, o) in facts.ops.iter().enumerate() {
        let name = &o.name;
        let fixed = |root: ExprId| {
            let mut found = false;
            facts.kernel.walk(root, &mut |_, e| {
                found |= matches!(e, Expr::TileAt { at, .. } if at.iter().any(|p| matches!(p, einfall_ir::tile::Place::At(_))));
            });
            found
        };
        if o.op.roots().into_iter().any(fixed) {
            return unsupported("fixed coordinates", format!("{name} reads one coordinate of a tile"));
        }
        match o.op {
            Op::Contract { .. } | Op::Map { .. } => {}
            Op::Load { out, .. } => {
                if s.places[out.index()] == Place::Registers && s.held[out.index()].is_none() {
                    return unsupported("distribution", format!("nothing says how {name} is distributed"));
                }
            }
            Op::Reduce { out, op, .. } => {
                if out.len() != 1 || op.selects_argument() {
                    return unsupported("reductions", format!("{name} selects arguments"));
                }
            }
            Op::Store { when, .. } => {
                if when.is_some_and(|w| !uniform(facts, s, w)) {
                    return unsupported("stores", format!("{name} has a condition that differs between elements"));
                }
            }
            Op::Scan { .. } => return unsupported("scans", format!("{name} is a scan")),
        }
        let shared_map = matches!(o.op, Op::Map { out, .. } if s.places[out.index()].shared().is_some());
        let needs = shared_map || matches!(o.op, Op::Reduce { .. } | Op::Store { .. });
        let whole = match o.op {
            Op::Map { out, .. } if !shared_map => s.held[out.index()],
            Op::Map { .. } | Op::Reduce { .. } | Op::Store { .. } => frame_of(facts, s, at),
            Op::Load { .. } | Op::Contract { .. } | Op::Scan { .. } => continue,
        };
        let Some(whole) = whole.or(if needs { None } else { Some(Held::Scalar) }) else {
            return unsupported("distribution", format!("nothing says how the elements of {name} are distributed"));
        };
        let dims = whole.dims();
        for t in &o.reads {
            let own = s.sized_of(facts.tile_axes(*t));
            if !own.iter().all(|a| dims.contains(a)) {
                let tile = &facts.kernel.tiles[*t].name;
                return unsupported("distribution", format!("{name} uses {tile} over axes it does not range over"));
            }
        }
    }
    Ok(())
}

/// How each store may leave.
fn stores(facts: &Facts<'_>, family: Family, s: &Structure) -> Vec<Leaving> {
    let mut out = Vec::new();
    for (op, o) in facts.ops.iter().enumerate() {
        let Op::Store { buffer, at, axes, join, when, .. } = o.op else { continue };
        let own = s.sized_of(axes);
        let place: Vec<Option<Option<AxisId>>> = at.iter().map(|e| facts.linear(*e, &|a| s.is_sized(a))).collect();
        let found: Vec<AxisId> = place.iter().flatten().flatten().copied().collect();
        // An engine clips at the array's edge, so that must be where the axes end.
        let ends = at.iter().zip(&place).zip(&facts.plan.buffers[*buffer].dims).all(|((e, p), dim)| match p {
            Some(Some(a)) => facts.kernel.exprs[*e] == Expr::Coord(*a) && facts.kernel.axes[*a].extent == *dim,
            Some(None) | None => true,
        });
        let simple = ends && join.is_none() && when.is_none() && place.iter().all(Option::is_some);
        let staged = match own.as_slice() {
            &[x, y]
                if family.asynchronous()
                    && simple
                    && found.len() == 2
                    && found.contains(&x)
                    && place.last() == Some(&Some(Some(y))) =>
            {
                Some([x, y])
            }
            _ => None,
        };
        // A tile fetched once whose axes are cut alike lends its memory, once it is no longer needed.
        let dtype = facts.plan.buffers[*buffer].dtype;
        let reuses = staged.and_then(|[x, _]| {
            s.fetched().find(|t| {
                let own = s.sized_of(facts.tile_axes(*t));
                let once = facts.load_of(*t).is_some_and(|l| facts.ops[l].stream.is_none());
                let last = s.places[t.index()].shared();
                once && o.stream.is_none()
                    && facts.kernel.tiles[*t].dtype == dtype
                    && own.len() == 2
                    && own[0] == x
                    && last == own.last().copied()
            })
        });
        out.push(Leaving { op, staged, reuses });
    }
    out
}

/// Roles, cuts and schedules of a placed structure.
fn variants(
    facts: &Facts<'_>,
    family: Family,
    base: Structure,
    out: &mut Vec<Structure>,
    why: &mut Option<Unsupported>,
) {
    let fetches = base.fetched().next().is_some();
    let mut cuts: Vec<Option<AxisId>> = vec![None];
    for axis in facts.kernel.axes.ids().filter(|a| base.is_sized(*a)) {
        let all = base.contractions.iter().all(|c| c.m == axis || c.n == axis);
        if all && divisible(facts, &base, axis) {
            cuts.push(Some(axis));
        }
    }
    for cut in cuts {
        for producer in [true, false] {
            // Copies by an engine are issued by a role of one unit, the others by the threads that read them.
            let apart = family.asynchronous();
            if (producer && !(fetches && apart)) || (!producer && fetches && apart && cut.is_some()) {
                continue;
            }
            let schedules = [
                Schedule::Plain,
                Schedule::Overlapped,
                Schedule::Prefetched(1),
                Schedule::Prefetched(2),
                Schedule::Prefetched(3),
            ];
            for schedule in schedules {
                // A role that fetches for itself would wait for copies it has not issued yet; what is done when it is
                // issued overlaps nothing.
                if schedule == Schedule::Overlapped && ((fetches && !producer) || !apart) {
                    continue;
                }
                let mut s = Structure { producer, cut, schedule, ..base.clone() };
                match scheduled(facts, family, &mut s) {
                    Ok(true) => out.push(s),
                    Ok(false) => {}
                    Err(e) => *why = why.take().or(Some(e)),
                }
            }
        }
    }
}

/// Whether units can share blocks along the axis: nothing sums over it, and what is written has it.
fn divisible(facts: &Facts<'_>, s: &Structure, axis: AxisId) -> bool {
    facts.ops.iter().enumerate().all(|(at, o)| match o.op {
        Op::Reduce { over, .. } | Op::Contract { over, .. } => !over.contains(&axis),
        Op::Store { join, .. } => join.is_none() || domain(facts, s, at).contains(&axis),
        Op::Map { out, .. } if s.places[out.index()].shared().is_some() => domain(facts, s, at).contains(&axis),
        Op::Map { .. } | Op::Load { .. } | Op::Scan { .. } => true,
    })
}

/// Fills skews and slots; false where the schedule is another one's.
fn scheduled(facts: &Facts<'_>, family: Family, s: &mut Structure) -> Result<bool, Unsupported> {
    let n = facts.ops.len();
    match s.schedule {
        Schedule::Plain => {}
        Schedule::Overlapped => {
            let late = late(facts, s);
            if !late.contains(&true) {
                return Ok(false);
            }
            for i in 0..n {
                if facts.ops[i].stream.is_none() || s.in_producer(facts, i) {
                    continue;
                }
                let contract = matches!(facts.ops[i].op, Op::Contract { .. });
                (s.skews[i], s.slots[i]) = match (late[i], contract) {
                    (true, _) => (1, 1),
                    (false, true) => (0, 0),
                    (false, false) => (0, 2),
                };
                // What the late contractions still read is only written after them.
                if !contract && (i + 1..n).any(|l| late[l] && conflict(facts, s, i, l)) {
                    s.slots[i] = 3;
                }
            }
            for (b, late) in late.iter().enumerate() {
                for a in 0..b {
                    let same = facts.ops[a].stream.is_some() && facts.ops[a].stream == facts.ops[b].stream;
                    if same && s.skews[a] == s.skews[b] && !late && conflict(facts, s, a, b) {
                        s.slots[b] = s.slots[b].max(s.slots[a]);
                    }
                }
            }
        }
        Schedule::Prefetched(ahead) => {
            let mut any = false;
            let (mut own, mut fetched) = (false, false);
            for i in 0..n {
                if facts.ops[i].stream.is_none() || s.in_producer(facts, i) {
                    continue;
                }
                let load = matches!(facts.ops[i].op, Op::Load { .. });
                any |= load;
                own |= load && !s.fetches(facts, i);
                fetched |= s.fetches(facts, i);
                (s.skews[i], s.slots[i]) = if load { (0, 1) } else { (ahead, 0) };
            }
            if fetched && !family.asynchronous() {
                copied_first(facts, s, ahead);
            }
            // Register loads have one copy: one trip ahead at most.
            if !any || (own && ahead > 1) {
                return Ok(false);
            }
        }
    }
    keeps_order(facts, s)?;
    Ok(true)
}

/// Contractions of what their stream computes, by operation.
fn late(facts: &Facts<'_>, s: &Structure) -> Vec<bool> {
    let computed = |t: TileId, stream: usize| {
        let writers = facts.writers(t);
        writers.iter().any(|w| facts.ops[*w].stream == Some(stream) && !matches!(facts.ops[*w].op, Op::Load { .. }))
    };
    let mut late = vec![false; facts.ops.len()];
    for c in &s.contractions {
        if let Some(stream) = facts.ops[c.op].stream {
            late[c.op] = computed(c.a, stream) || computed(c.b, stream);
        }
    }
    late
}

/// The slots of a stream whose threads copy for themselves, `ahead` trips before: copies, then contractions of what is
/// loaded with what follows from them, then contractions of what is computed with what they read, then loads.
fn copied_first(facts: &Facts<'_>, s: &mut Structure, ahead: u64) {
    let late = late(facts, s);
    let n = facts.ops.len();
    for i in (0..n).filter(|i| facts.ops[*i].stream.is_some()) {
        let contract = matches!(facts.ops[i].op, Op::Contract { .. });
        let before_late = !contract && (i + 1..n).any(|l| late[l] && conflict(facts, s, i, l));
        (s.skews[i], s.slots[i]) = match facts.ops[i].op {
            Op::Load { .. } if s.fetches(facts, i) => (0, 0),
            Op::Load { .. } => (0, 3),
            Op::Map { .. } | Op::Reduce { .. } | Op::Contract { .. } | Op::Scan { .. } | Op::Store { .. } => {
                (ahead, if late[i] || before_late { 2 } else { 1 })
            }
        };
    }
    // What stands behind such an operation and shares a tile with it stays behind it.
    for b in 0..n {
        for a in 0..b {
            let same = facts.ops[a].stream.is_some() && facts.ops[a].stream == facts.ops[b].stream;
            if same && s.skews[a] == s.skews[b] && conflict(facts, s, a, b) {
                s.slots[b] = s.slots[b].max(s.slots[a]);
            }
        }
    }
}

/// Whether two operations touch a register tile that one of them writes.
fn conflict(facts: &Facts<'_>, s: &Structure, a: usize, b: usize) -> bool {
    let (a, b) = (&facts.ops[a], &facts.ops[b]);
    let writes = |x: &super::facts::OpFacts<'_>, y: &super::facts::OpFacts<'_>| {
        x.op.outs().iter().any(|t| s.places[t.index()] == Place::Registers && y.touches(*t))
    };
    writes(a, b) || writes(b, a)
}

/// Within an iteration and against the next one, uses of a register tile keep their order.
fn keeps_order(facts: &Facts<'_>, s: &Structure) -> Result<(), Unsupported> {
    for stream in 0..facts.streams.len() {
        let trip = s.trip(facts, stream);
        let time = |i: usize, later: u64| (s.skews[i] + later, trip.iter().position(|x| *x == i));
        for &a in &trip {
            for &b in trip.iter().filter(|b| a < **b) {
                if conflict(facts, s, a, b) && (time(a, 0) > time(b, 0) || time(b, 0) > time(a, 1)) {
                    let (a, b) = (&facts.ops[a].name, &facts.ops[b].name);
                    return unsupported("schedule", format!("{a} and {b} would use a tile out of order"));
                }
            }
        }
    }
    Ok(())
}
