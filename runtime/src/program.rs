//! What every device makes of an artifact: its check, the sizes its arrays imply, and its binding to sizes.
//!
//! Invariant: everything that a launch needs beyond the caller's arrays is computed and checked when sizes are bound,
//! the same way for every device.

use crate::error::Error;
use einfall_ir::arena::Id;
#[cfg(any(feature = "cpu", feature = "shaders"))]
use einfall_ir::artifact::FormulaError;
use einfall_ir::artifact::{Artifact, Launch, Slot};
use einfall_ir::cascade::{RankId, Size};
use einfall_ir::dtype::DType;
use einfall_ir::tile::{Buffer, BufferId, BufferKind};

/// Workspace buffers start at multiples of this.
pub(crate) const WORKSPACE_ALIGN_BYTES: u64 = 64;

/// A checked artifact. Sizes are bound by [`Program::bind`].
#[derive(Debug)]
pub struct Program {
    pub(crate) artifact: Artifact,
    /// `dense[b][d]`: some kernel takes buffer `b` without its stride in dimension `d`.
    pub(crate) dense: Vec<Vec<bool>>,
}

impl Program {
    /// Finds which strides its kernels take. The artifact was checked by [`check`].
    pub(crate) fn new(artifact: Artifact) -> Program {
        let mut dense: Vec<Vec<bool>> = artifact.buffers.iter().map(|(_, b)| vec![false; b.dims.len()]).collect();
        for launch in &artifact.launches {
            for slot in &launch.slots {
                let Slot::Base(b) = *slot else { continue };
                for (d, dense) in dense[b.index()].iter_mut().enumerate() {
                    *dense |= !launch.slots.contains(&Slot::Stride(b, d));
                }
            }
        }
        Program { artifact, dense }
    }

    /// The cascade's name.
    pub(crate) fn name(&self) -> &str {
        &self.artifact.name
    }

    /// Names of the ranks, in the cascade's order.
    pub(crate) fn ranks(&self) -> impl Iterator<Item = &str> {
        self.artifact.ranks.iter().map(|(_, r)| r.name.as_str())
    }

    /// The sizes of ranks that the shapes of arrays imply, with the ranks that the text fixes. Extents that are sums,
    /// differences or products of ranks are solved where all but one are known.
    ///
    /// # Errors
    /// [`Error::UnknownArray`], [`Error::Dimensions`], and [`Error::RankConflict`] or [`Error::Extent`] for shapes that contradict each other.
    pub(crate) fn infer(&self, shapes: &[(&str, &[u64])]) -> Result<Vec<(String, u64)>, Error> {
        let mut known: Vec<Option<u64>> = self.artifact.ranks.iter().map(|(_, r)| r.fixed).collect();
        let mut open = Vec::new();
        for (name, shape) in shapes {
            let (_, buffer) = self.find(name, "array", |_| true)?;
            if buffer.dims.len() != shape.len() {
                let (expected, found) = (buffer.dims.len(), shape.len());
                return Err(Error::Dimensions { array: name.to_string(), expected, found });
            }
            open.extend(buffer.dims.iter().zip(*shape).enumerate().map(|(d, (s, n))| (*name, d, s, *n)));
        }
        loop {
            let before = known.iter().flatten().count();
            for (name, dim, size, extent) in &open {
                self.solve(size, *extent, &mut known).map_err(|reason| match reason {
                    Unsolvable::Conflict(rank, expected, found) => Error::RankConflict {
                        rank: self.artifact.ranks[rank].name.clone(),
                        expected,
                        found,
                        source_name: format!("dimension {dim} of `{name}`"),
                    },
                    Unsolvable::Extent(reason) => {
                        Error::Extent { array: name.to_string(), dim: *dim, found: *extent, reason }
                    }
                })?;
            }
            if known.iter().flatten().count() == before {
                break;
            }
        }
        let names = self.artifact.ranks.iter().map(|(_, r)| r.name.clone());
        Ok(names.zip(known).filter_map(|(name, n)| Some((name, n?))).collect())
    }

    /// Makes `size == value` hold by fixing the one unknown rank in it, if there is just one way.
    fn solve(&self, size: &Size, value: u64, known: &mut [Option<u64>]) -> Result<(), Unsolvable> {
        let part = |s: &Size| {
            let mut complete = true;
            s.for_each_rank(&mut |r| complete &= known[r.index()].is_some());
            let ranks: Vec<u64> = known.iter().map(|n| n.unwrap_or(0)).collect();
            complete.then(|| s.eval(&ranks))
        };
        let no = |what: &str| Err(Unsolvable::Extent(what.to_string()));
        if let Some(found) = part(size) {
            return match (found, size) {
                (Ok(found), Size::Rank(r)) if found != value => Err(Unsolvable::Conflict(*r, found, value)),
                (Ok(found), _) if found != value => no(&format!("the ranks known make it {found}")),
                (Ok(_), _) => Ok(()),
                (Err(e), _) => no(&format!("{e:?}")),
            };
        }
        match size {
            Size::Rank(r) => known[r.index()] = Some(value),
            Size::Mul(a, b) => {
                let (rest, factor) = match (part(a), part(b)) {
                    (Some(Ok(factor)), None) => (b, factor),
                    (None, Some(Ok(factor))) => (a, factor),
                    _ => return Ok(()),
                };
                match (factor, value) {
                    (0, 0) => {}
                    (0, _) => return no("it is a multiple of 0"),
                    _ if !value.is_multiple_of(factor) => return no(&format!("it is a multiple of {factor}")),
                    _ => return self.solve(rest, value / factor, known),
                }
            }
            Size::Add(a, b) => {
                let (rest, term) = match (part(a), part(b)) {
                    (Some(Ok(term)), None) => (b, term),
                    (None, Some(Ok(term))) => (a, term),
                    _ => return Ok(()),
                };
                match value.checked_sub(term) {
                    None => return no(&format!("it is at least {term}")),
                    Some(value) => return self.solve(rest, value, known),
                }
            }
            Size::Sub(a, b) => match (part(a), part(b)) {
                (None, Some(Ok(term))) => match value.checked_add(term) {
                    None => return no("it overflows"),
                    Some(value) => return self.solve(a, value, known),
                },
                (Some(Ok(from)), None) => match from.checked_sub(value) {
                    None => return no(&format!("it is at most {from}")),
                    Some(value) => return self.solve(b, value, known),
                },
                _ => {}
            },
            // These have many solutions; the shape check at launch sees what the other arrays give.
            Size::Const(_) | Size::Div(..) | Size::CeilDiv(..) | Size::Min(..) | Size::Max(..) => {}
        }
        Ok(())
    }

    /// Fixes the sizes of all ranks.
    ///
    /// # Errors
    /// [`Error::UnknownRank`], [`Error::MissingRank`], [`Error::RankConflict`] (with a size the text fixes, or given
    /// twice) and [`Error::Size`] where an extent has no value.
    pub(crate) fn bind<S: AsRef<str>>(&self, sizes: &[(S, u64)]) -> Result<Sizes, Error> {
        let ranks = &self.artifact.ranks;
        let mut known: Vec<Option<u64>> = ranks.iter().map(|(_, r)| r.fixed).collect();
        for (name, n) in sizes {
            let name = name.as_ref();
            let Some((id, _)) = ranks.iter().find(|(_, r)| r.name == name) else {
                return Err(Error::UnknownRank { rank: name.into(), known: self.ranks().map(String::from).collect() });
            };
            match known[id.index()].replace(*n) {
                Some(expected) if expected != *n => {
                    let source_name = "the sizes given".into();
                    return Err(Error::RankConflict { rank: name.into(), expected, found: *n, source_name });
                }
                Some(_) | None => {}
            }
        }
        let extents = ranks
            .iter()
            .zip(known)
            .map(|((_, rank), n)| n.ok_or_else(|| Error::MissingRank { rank: rank.name.clone() }))
            .collect::<Result<Vec<u64>, Error>>()?;
        Sizes::new(self, extents)
    }

    /// Checks the declared facts with the scalars given; the values of those that are not given and have a default.
    ///
    /// # Errors
    /// [`Error::Fact`] for one that does not hold; [`Error::Artifact`] and [`Error::Size`] for a formula without a value.
    #[cfg(any(feature = "cpu", feature = "shaders"))]
    pub(crate) fn scalars(&self, extents: &[u64], given: &[(&str, f64)]) -> Result<Vec<(&str, f64)>, Error> {
        let artifact = &self.artifact;
        let id = |name: &str| artifact.buffers.iter().find(|(_, b)| b.name == name).map(|(id, _)| id);
        let given: Vec<(BufferId, f64)> = given.iter().filter_map(|(n, v)| Some((id(n)?, *v))).collect();
        let failed = |e| match e {
            FormulaError::Missing(b) => {
                let buffer = &artifact.buffers[b];
                Error::MissingArray { array: buffer.name.clone(), dtype: buffer.dtype, shape: Vec::new() }
            }
            FormulaError::Size(error) => Error::Size { what: format!("a fact of `{}`", artifact.name), error },
            e => Error::Artifact { name: artifact.name.clone(), reason: format!("a formula: {e:?}") },
        };
        if let Some(fact) = artifact.broken_fact(extents, &given).map_err(failed)? {
            return Err(Error::Fact { name: artifact.name.clone(), fact: fact.text.clone() });
        }
        let defaults = artifact.default_scalars(extents, &given).map_err(failed)?;
        Ok(defaults.into_iter().map(|(id, value)| (artifact.buffers[id].name.as_str(), value)).collect())
    }

    /// The buffer of this name among those that `kind` admits.
    pub(crate) fn find(
        &self,
        name: &str,
        role: &'static str,
        admits: impl Fn(&Buffer) -> bool,
    ) -> Result<(BufferId, &Buffer), Error> {
        let public = |b: &Buffer| b.kind != BufferKind::Workspace && admits(b);
        let all = || self.artifact.buffers.iter().filter(|(_, b)| public(b));
        all().find(|(_, b)| b.name == name).ok_or_else(|| {
            let known = all().map(|(_, b)| format!("`{}`", b.name)).collect();
            Error::UnknownArray { array: name.to_string(), role, known }
        })
    }
}

/// Why an extent has no solution.
enum Unsolvable {
    /// A rank, the size it has, the size it would need.
    Conflict(RankId, u64, u64),
    /// In words.
    Extent(String),
}

/// Checks that an artifact refers only to what it has.
pub(crate) fn check(artifact: &Artifact) -> Result<(), Error> {
    artifact.check().map_err(|reason| Error::Artifact { name: artifact.name.clone(), reason })
}

/// What an array must be at the bound sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArraySpec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Extents; none for a scalar.
    pub shape: &'a [u64],
    /// Input, output or both.
    pub kind: BufferKind,
}

/// What one kernel of a bound plan does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSpec<'a> {
    /// The symbol.
    pub symbol: &'a str,
    /// Tasks of its grid.
    pub tasks: u64,
    /// Private memory of a task, in bytes.
    pub scratch_bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes that a perfect cache would move.
    pub bytes: u64,
}

/// A kernel at the bound sizes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    pub(crate) tasks: u64,
    /// Rounds of as many tasks each, one after the other.
    pub(crate) rounds: u64,
    pub(crate) scratch_bytes: u64,
    pub(crate) flops: u64,
    pub(crate) bytes: u64,
}

/// A program at fixed sizes.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub(crate) extents: Vec<u64>,
    /// By buffer.
    pub(crate) shapes: Vec<Vec<u64>>,
    pub(crate) steps: Vec<Step>,
    /// By buffer: where it starts in the workspace.
    pub(crate) offsets: Vec<Option<u64>>,
    pub(crate) workspace_bytes: u64,
}

impl Sizes {
    fn new(program: &Program, extents: Vec<u64>) -> Result<Sizes, Error> {
        let artifact = &program.artifact;
        let eval = |size: &Size, what: &str| {
            size.eval(&extents).map_err(|error| Error::Size { what: format!("`{what}`"), error })
        };
        let mut shapes = Vec::new();
        let mut bytes = Vec::new();
        for (_, buffer) in artifact.buffers.iter() {
            let shape = buffer.dims.iter().map(|d| eval(d, &buffer.name)).collect::<Result<Vec<u64>, Error>>()?;
            bytes.push(crate::array::dense_bytes(buffer.dtype, &shape)? as u64);
            shapes.push(shape);
        }
        let mut steps = Vec::new();
        for launch in &artifact.launches {
            let overflow = || Error::Size {
                what: format!("`{}`", launch.symbol),
                error: einfall_ir::cascade::SizeError::Overflow,
            };
            let mut tasks = 1u64;
            for extent in &launch.grid {
                let n = eval(extent, &launch.symbol)?;
                tasks = tasks.checked_mul(n).filter(|t| *t <= i64::MAX as u64).ok_or_else(overflow)?;
            }
            let scratch_bytes = eval(&launch.scratch_bytes, &launch.symbol)?;
            // Operation counts only inform; one that overflows is as large as can be said.
            let count = |s: &Size| s.eval(&extents).unwrap_or(u64::MAX);
            let rounds = match (launch.ordered, launch.grid.first()) {
                (true, Some(first)) => eval(first, &launch.symbol)?,
                _ => 1,
            };
            let (flops, bytes) = (count(&launch.flops), count(&launch.bytes));
            steps.push(Step { tasks, rounds, scratch_bytes, flops, bytes });
        }
        let (offsets, workspace_bytes) = place(artifact, &bytes)?;
        Ok(Sizes { extents, shapes, steps, offsets, workspace_bytes })
    }

    /// Arrays and scalars to give, outputs included, in the cascade's order.
    pub(crate) fn arrays<'a>(&'a self, program: &'a Program) -> impl Iterator<Item = ArraySpec<'a>> {
        let public = |((_, b), _): &((BufferId, &Buffer), &Vec<u64>)| b.kind != BufferKind::Workspace;
        program.artifact.buffers.iter().zip(&self.shapes).filter(public).map(|((_, b), shape)| ArraySpec {
            name: &b.name,
            dtype: b.dtype,
            shape,
            kind: b.kind,
        })
    }

    /// The kernels, in launch order.
    pub(crate) fn kernels<'a>(&'a self, program: &'a Program) -> impl Iterator<Item = KernelSpec<'a>> {
        program.artifact.launches.iter().zip(&self.steps).map(|(launch, step)| KernelSpec {
            symbol: &launch.symbol,
            tasks: step.tasks,
            scratch_bytes: step.scratch_bytes,
            flops: step.flops,
            bytes: step.bytes,
        })
    }
}

/// Places workspace buffers: two share bytes only if no launch comes between the first use and the last use of both.
/// First fit in order of first use, which is deterministic; temporaries form short chains, where it is tight.
fn place(artifact: &Artifact, bytes: &[u64]) -> Result<(Vec<Option<u64>>, u64), Error> {
    let overflow = || Error::Size {
        what: format!("the workspace of `{}`", artifact.name),
        error: einfall_ir::cascade::SizeError::Overflow,
    };
    let uses = |launch: &Launch, id: BufferId| {
        let passed = |s: &Slot| matches!(s, Slot::Base(b) if *b == id);
        launch.reads.contains(&id) || launch.writes.contains(&id) || launch.slots.iter().any(passed)
    };
    struct Placed {
        first: usize,
        last: usize,
        start: u64,
        end: u64,
    }
    let mut live: Vec<(usize, usize, BufferId)> = artifact
        .buffers
        .iter()
        .filter(|(_, b)| b.kind == BufferKind::Workspace)
        .filter_map(|(id, _)| {
            // Counters keep their zeros from launch to launch.
            let counts = |l: &Launch| l.gpu.as_ref().is_some_and(|g| g.counters.contains(&id));
            if artifact.launches.iter().any(counts) {
                return Some((0, artifact.launches.len() - 1, id));
            }
            let first = artifact.launches.iter().position(|l| uses(l, id))?;
            let last = artifact.launches.iter().rposition(|l| uses(l, id))?;
            Some((first, last, id))
        })
        .collect();
    live.sort();
    let mut placed: Vec<Placed> = Vec::new();
    let mut offsets = vec![None; bytes.len()];
    for (first, last, id) in live {
        let size = bytes[id.index()].checked_next_multiple_of(WORKSPACE_ALIGN_BYTES).ok_or_else(overflow)?;
        let mut taken: Vec<(u64, u64)> =
            placed.iter().filter(|p| p.first <= last && first <= p.last).map(|p| (p.start, p.end)).collect();
        taken.sort_unstable();
        let mut start = 0u64;
        for (from, to) in taken {
            if from.saturating_sub(start) >= size && from >= start {
                break;
            }
            start = start.max(to);
        }
        let end = start.checked_add(size).filter(|e| *e <= isize::MAX as u64).ok_or_else(overflow)?;
        offsets[id.index()] = Some(start);
        placed.push(Placed { first, last, start, end });
    }
    Ok((offsets, placed.iter().map(|p| p.end).max().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use einfall_ir::arena::Arena;
    use einfall_ir::artifact::Code;

    /// A chain of launches, each reading and writing workspaces by number.
    fn chain(n_workspaces: usize, launches: &[(&[usize], &[usize])]) -> Artifact {
        let mut buffers: Arena<BufferId, Buffer> = Arena::new();
        for i in 0..n_workspaces {
            let name = format!("t{i}");
            buffers.push(Buffer { name, dtype: DType::U8, dims: vec![], kind: BufferKind::Workspace, positive: false });
        }
        let ids = |list: &[usize]| list.iter().map(|i| BufferId::new(*i)).collect();
        let zero = || Size::Const(0);
        let launches = launches
            .iter()
            .map(|(reads, writes)| Launch {
                symbol: "k".into(),
                slots: vec![],
                grid: vec![],
                ordered: false,
                scratch_bytes: zero(),
                reads: ids(reads),
                writes: ids(writes),
                flops: zero(),
                bytes: zero(),
                gpu: None,
            })
            .collect();
        let code = Code::Object(vec![]);
        Artifact {
            name: "chain".into(),
            target: "cpu".into(),
            ranks: Arena::new(),
            buffers,
            code,
            launches,
            defaults: vec![],
            facts: vec![],
        }
    }

    #[test]
    fn temporaries_that_never_meet_share_bytes() {
        // t0 → t1 → t2 → t3: two live at a time; t4 is never used.
        let a = chain(5, &[(&[], &[0]), (&[0], &[1]), (&[1], &[2]), (&[2], &[3]), (&[3], &[])]);
        let (offsets, total) = place(&a, &[100, 100, 100, 100, 7]).unwrap();
        assert_eq!(offsets, [Some(0), Some(128), Some(0), Some(128), None]);
        assert_eq!(total, 256);
    }

    #[test]
    fn temporaries_that_meet_do_not_overlap() {
        let launches: &[(&[usize], &[usize])] =
            &[(&[], &[0, 1]), (&[1], &[2]), (&[0, 2], &[3]), (&[3], &[4, 5]), (&[0, 4], &[5])];
        let a = chain(6, launches);
        let bytes = [64, 1000, 65, 1, 0, 300];
        let (offsets, total) = place(&a, &bytes).unwrap();
        let used = |i: usize| {
            let at: Vec<usize> =
                (0..launches.len()).filter(|l| launches[*l].0.contains(&i) || launches[*l].1.contains(&i)).collect();
            at[0]..at[at.len() - 1] + 1
        };
        for i in 0..6 {
            let (a, x) = (offsets[i].unwrap(), used(i));
            assert!(a % 64 == 0 && a + bytes[i] <= total);
            for j in 0..i {
                let (b, y) = (offsets[j].unwrap(), used(j));
                let apart = a + bytes[i] <= b || b + bytes[j] <= a;
                let never_meet = x.end <= y.start || y.end <= x.start;
                assert!(apart || never_meet || bytes[i] == 0 || bytes[j] == 0, "t{i} and t{j}: {offsets:?}");
            }
        }
        assert!(place(&chain(2, &[(&[0, 1], &[])]), &[1 << 62, 1 << 62]).is_err());
    }
}
