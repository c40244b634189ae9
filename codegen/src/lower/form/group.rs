//! Which statements share a kernel, and how that kernel walks its axes.
//!
//! Statements are taken in order and join the kernels of what they read as long as the kernel stays one stream: all
//! reductions that depend on each other walk one axis. Nothing here looks at what is computed: contractions differ
//! from other reductions only in that computing one twice is never worth it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use einfall_ir::analysis::derive::Derivation;
use einfall_ir::cascade::{Cascade, IndexId, TensorId};

use super::derived::derive_schedule;
use super::program::{Kind, Node, plain_access};

/// Indices of different statements that walk together.
#[derive(Clone, Debug, Default)]
pub(super) struct Classes {
    parent: HashMap<IndexId, IndexId>,
}

impl Classes {
    /// The representative of `i`'s class.
    pub fn find(&self, i: IndexId) -> IndexId {
        let mut i = i;
        while let Some(&p) = self.parent.get(&i) {
            i = p;
        }
        i
    }

    /// Joins two classes; the earlier index represents.
    pub fn join(&mut self, a: IndexId, b: IndexId) {
        let (a, b) = (self.find(a), self.find(b));
        if a != b {
            self.parent.insert(a.max(b), a.min(b));
        }
    }
}

/// How a statement relates to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Has the streamed axis: computed inside the stream, block by block.
    Inside,
    /// Reduces the streamed axis: carried.
    Carried,
    /// Neither: computed between streams.
    Row,
}

/// How a kernel computes a set of statements.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    /// Positions of its statements, in order.
    pub nodes: Vec<usize>,
    /// Indices that walk together.
    pub classes: Classes,
    /// The streamed class.
    pub stream: Option<IndexId>,
    /// Classes cut over the launch, in order of appearance.
    pub grid: Vec<IndexId>,
    /// Per statement: the stream (counted from 0) it belongs to, and how.
    pub levels: Vec<(usize, Role)>,
    /// Statements whose tensors are stored.
    pub stored: BTreeSet<usize>,
}

/// What grouping knows about the whole program.
pub(super) struct Program<'a> {
    /// The normalised cascade.
    pub cascade: &'a Cascade,
    /// Its statements outside iterations, in order.
    pub nodes: Vec<Node>,
    /// Which statement defines a tensor.
    pub producer: HashMap<TensorId, usize>,
    /// Per statement and dimension: how many reductions consume it.
    pub consumers: Vec<Vec<usize>>,
    /// Tensors that must be stored whatever reads them: outputs, and what iterations read.
    pub pinned: HashSet<TensorId>,
    /// Indices that are one whatever the statements read.
    pub joined: Vec<(IndexId, IndexId)>,
    /// Contractions that must not be computed inside another reduction's stream, found out while grouping.
    pub own_kernel: std::cell::RefCell<HashSet<usize>>,
    /// One-pass forms found, by the statements of the group.
    derivations: std::cell::RefCell<HashMap<Vec<usize>, Option<Rc<Derivation>>>>,
}

impl<'a> Program<'a> {
    /// A program with nothing found out yet.
    pub fn new(
        cascade: &'a Cascade,
        nodes: Vec<Node>,
        producer: HashMap<TensorId, usize>,
        consumers: Vec<Vec<usize>>,
        pinned: HashSet<TensorId>,
    ) -> Program<'a> {
        Program {
            cascade,
            nodes,
            producer,
            consumers,
            pinned,
            joined: Vec::new(),
            own_kernel: Default::default(),
            derivations: Default::default(),
        }
    }

    /// The one-pass form of a schedule, if there is one.
    pub fn derivation(&self, s: &Schedule) -> Option<Rc<Derivation>> {
        // What is stored decides what must come out, so it is part of the question.
        let mut key = s.nodes.clone();
        key.push(usize::MAX);
        key.extend(&s.stored);
        if let Some(known) = self.derivations.borrow().get(&key) {
            return known.clone();
        }
        let found = derive_schedule(self, s).map(Rc::new);
        self.derivations.borrow_mut().insert(key, found.clone());
        found
    }

    /// The schedule of these statements as one kernel, if they can share one.
    pub fn schedule(&self, members: &[usize]) -> Option<Schedule> {
        let c = self.cascade;
        if members.len() > 1 && members.iter().any(|&k| self.nodes[k].is_fold()) {
            return None;
        }
        let inside: HashSet<usize> = members.iter().copied().collect();
        let mut classes = self.unify(members, &inside)?;
        let stream = self.pick_stream(members, &mut classes)?;
        let in_group = |t: &TensorId| self.producer.get(t).filter(|p| inside.contains(p)).copied();

        let mut levels: HashMap<usize, (usize, Role)> = HashMap::new();
        for &k in members {
            let node = &self.nodes[k];
            let has = |list: &[IndexId]| stream.is_some_and(|s| list.iter().any(|&i| classes.find(i) == s));
            let level = node
                .reads
                .iter()
                .filter_map(|(t, _)| in_group(t))
                // An update in place reads what it writes.
                .filter(|p| *p != k)
                .map(|p| match levels[&p] {
                    (level, Role::Carried) => level + 1,
                    (level, Role::Inside | Role::Row) => level,
                })
                .max()
                .unwrap_or(0);
            let role = if has(node.over()) {
                Role::Carried
            } else if has(&node.einsum.free) {
                Role::Inside
            } else {
                Role::Row
            };
            levels.insert(k, (level, role));
        }

        let stored: BTreeSet<usize> = members.iter().copied().filter(|k| self.is_stored(*k, &inside)).collect();
        let mut schedule = Schedule {
            nodes: members.to_vec(),
            classes,
            stream,
            grid: Vec::new(),
            levels: members.iter().map(|k| levels[k]).collect(),
            stored,
        };
        let contractions: HashSet<usize> = members.iter().copied().filter(|&k| self.nodes[k].is_heavy(c)).collect();
        // A contraction beside the stream of others would keep the axis it sums whole; alone it streams along it.
        let beside = |k: &usize| levels[k].1 == Role::Row && self.nodes[*k].contraction(c).is_some();
        if stream.is_some() && members.iter().any(beside) {
            return None;
        }
        self.place_axes(&mut schedule, &contractions)?;
        self.no_recomputed_contractions(&schedule, &contractions, &in_group)?;
        Some(schedule)
    }

    fn is_stored(&self, k: usize, inside: &HashSet<usize>) -> bool {
        self.nodes[k].einsum.targets.iter().any(|t| {
            self.pinned.contains(&t.tensor)
                || self
                    .nodes
                    .iter()
                    .enumerate()
                    .any(|(r, n)| !inside.contains(&r) && n.reads.iter().any(|(u, _)| *u == t.tensor))
        })
    }

    /// Joins the indices along which members read each other; none if they do not line up.
    fn unify(&self, members: &[usize], inside: &HashSet<usize>) -> Option<Classes> {
        let mut classes = Classes::default();
        self.joined.iter().for_each(|(i, j)| classes.join(*i, *j));
        for &k in members {
            for (t, at) in &self.nodes[k].reads {
                let Some(p) = self.producer.get(t).filter(|p| inside.contains(p)) else { continue };
                let producer = &self.nodes[*p];
                let own = if producer.target() == *t {
                    producer.dims.clone()?
                } else {
                    let target = producer.einsum.targets.iter().find(|x| x.tensor == *t)?;
                    plain_access(self.cascade, &target.at)?
                };
                for (a, b) in own.into_iter().zip(plain_access(self.cascade, at)?) {
                    if self.cascade.indices[a].extent != self.cascade.indices[b].extent {
                        return None;
                    }
                    classes.join(a, b);
                }
            }
        }
        for &k in members {
            let mut seen = HashSet::new();
            if !self.nodes[k].indices().all(|i| seen.insert(classes.find(i))) {
                return None;
            }
        }
        Some(classes)
    }

    /// The class to stream: the one that is reduced by one member and free in another, else one that all reductions
    /// share; other reductions over an equal extent join it. `None`: there is no single one. `Some(None)`: nothing is
    /// reduced.
    #[allow(clippy::option_option)]
    fn pick_stream(&self, members: &[usize], classes: &mut Classes) -> Option<Option<IndexId>> {
        let reducing: Vec<usize> = members.iter().copied().filter(|&k| !self.nodes[k].over().is_empty()).collect();
        let linked: BTreeSet<IndexId> = {
            let set = |list: &[IndexId]| list.iter().map(|&i| classes.find(i)).collect::<BTreeSet<_>>();
            let free: BTreeSet<IndexId> = members.iter().flat_map(|&k| set(&self.nodes[k].einsum.free)).collect();
            let scans = members.iter().filter_map(|&k| match self.nodes[k].kind {
                Kind::Scan { over, .. } => Some(classes.find(over)),
                Kind::Map | Kind::Reduce { .. } | Kind::Fold { .. } => None,
            });
            let reduced = reducing.iter().flat_map(|&k| set(self.nodes[k].over()));
            reduced.filter(|i| free.contains(i)).chain(scans).collect()
        };
        let mut stream = match linked.len() {
            0 => {
                let Some((&first, rest)) = reducing.split_first() else { return Some(None) };
                // The last reduced index that every other reduction has an equal of: the innermost as written.
                let candidates = self.nodes[first].over().iter().rev();
                *candidates.into_iter().find(|&&i| rest.iter().all(|&k| self.joinable(k, i, classes).is_some()))?
            }
            1 => linked.into_iter().next()?,
            _ => return None,
        };
        for k in reducing {
            if let Some(i) = self.joinable(k, stream, classes) {
                classes.join(i, stream);
            }
        }
        stream = classes.find(stream);
        Some(Some(stream))
    }

    /// A reduced index of statement `k` that is, or may walk together with, `stream`.
    fn joinable(&self, k: usize, stream: IndexId, classes: &Classes) -> Option<IndexId> {
        let node = &self.nodes[k];
        let s = classes.find(stream);
        if let Some(i) = node.indices().find(|&i| classes.find(i) == s) {
            return node.over().contains(&i).then_some(i);
        }
        let extent = &self.cascade.indices[s].extent;
        node.over().iter().copied().find(|&i| self.cascade.indices[i].extent == *extent)
    }

    /// Cuts over the launch every class that all stored statements have and whose absence elsewhere only repeats
    /// cheap work.
    fn place_axes(&self, s: &mut Schedule, contractions: &HashSet<usize>) -> Option<()> {
        let classes = &s.classes;
        let set = |list: &[IndexId]| list.iter().map(|&i| classes.find(i)).collect::<HashSet<_>>();
        let free: HashMap<usize, HashSet<IndexId>> =
            s.nodes.iter().map(|&k| (k, set(&self.nodes[k].einsum.free))).collect();
        let reduced: HashSet<IndexId> = s.nodes.iter().flat_map(|&k| set(self.nodes[k].over())).collect();
        let mut candidates: Vec<IndexId> = Vec::new();
        // Order: as the last stored statement writes it, then what else appears.
        let last_stored = s.stored.iter().next_back().copied();
        for k in last_stored.into_iter().chain(s.nodes.iter().copied()) {
            for &i in &self.nodes[k].einsum.free {
                let i = classes.find(i);
                if !candidates.contains(&i) {
                    candidates.push(i);
                }
            }
        }
        let streamed = |k: usize| s.levels[s.nodes.iter().position(|&n| n == k).expect("a member")].1;
        for i in candidates {
            if Some(i) == s.stream || reduced.contains(&i) || !s.stored.iter().all(|k| free[k].contains(&i)) {
                continue;
            }
            let lacking: Vec<usize> = s.nodes.iter().copied().filter(|k| !free[k].contains(&i)).collect();
            let repeats_contraction = lacking.iter().any(|k| contractions.contains(k));
            let repeats_stream = lacking.iter().any(|&k| streamed(k) == Role::Carried);
            // Repeating a carried reduction is free where a contraction walks the same stream per block anyway.
            let walked_anyway = s
                .nodes
                .iter()
                .any(|k| contractions.contains(k) && free[k].contains(&i) && streamed(*k) == Role::Carried);
            if !repeats_contraction && (!repeats_stream || walked_anyway) {
                s.grid.push(i);
            }
        }
        // A carried contraction whose own axes had to stay whole is only right where another contraction inside the
        // stream lacks them (the output features of attention).
        for &k in &s.nodes {
            if !contractions.contains(&k) || streamed(k) != Role::Carried {
                continue;
            }
            let whole: Vec<IndexId> =
                free[&k].iter().copied().filter(|i| !s.grid.contains(i) && Some(*i) != s.stream).collect();
            let nested = s.nodes.iter().any(|n| contractions.contains(n) && streamed(*n) == Role::Inside);
            if !whole.is_empty() && !nested {
                return None;
            }
        }
        Some(())
    }

    /// A contraction inside the stream may be computed in one stream only, and only where several reductions
    /// consume it.
    fn no_recomputed_contractions(
        &self,
        s: &Schedule,
        contractions: &HashSet<usize>,
        in_group: &dyn Fn(&TensorId) -> Option<usize>,
    ) -> Option<()> {
        let mut levels_used: HashMap<usize, BTreeSet<usize>> = HashMap::new();
        for (p, &k) in s.nodes.iter().enumerate().rev() {
            let (level, role) = s.levels[p];
            let mut at: BTreeSet<usize> = levels_used.get(&k).cloned().unwrap_or_default();
            if role != Role::Inside || s.stored.contains(&k) || at.is_empty() {
                at.insert(level);
            }
            if role == Role::Inside {
                for (t, _) in &self.nodes[k].reads {
                    if let Some(dep) = in_group(t) {
                        levels_used.entry(dep).or_default().extend(at.iter().copied());
                    }
                }
            } else {
                for (t, _) in &self.nodes[k].reads {
                    if let Some(dep) = in_group(t) {
                        levels_used.entry(dep).or_default().insert(level);
                    }
                }
            }
        }
        let mut recomputed = false;
        for (p, &k) in s.nodes.iter().enumerate() {
            if s.levels[p].1 != Role::Inside {
                continue;
            }
            let reduces = matches!(self.nodes[k].kind, Kind::Reduce { .. });
            if contractions.contains(&k) {
                let stream = s.stream.expect("inside a stream");
                let dims = self.nodes[k].dims.as_ref()?;
                let consumed =
                    dims.iter().zip(&self.consumers[k]).any(|(&i, &n)| s.classes.find(i) == stream && n >= 2);
                if self.own_kernel.borrow().contains(&k) || s.nodes.len() > 1 && !consumed {
                    return None;
                }
            }
            if reduces && levels_used.get(&k).is_some_and(|l| l.len() > 1) {
                recomputed = true;
            }
        }
        if recomputed && self.derivation(s).is_none() { None } else { Some(()) }
    }

    /// Groups all statements into kernels, in launch order.
    pub fn groups(&self) -> Vec<Schedule> {
        loop {
            let groups = self.grouping();
            let wasted: Vec<usize> = groups.iter().flat_map(|s| self.stored_contractions(s)).collect();
            if wasted.is_empty() {
                return groups;
            }
            self.own_kernel.borrow_mut().extend(wasted);
        }
    }

    /// Contractions inside a stream whose values are stored after all, themselves or behind elementwise statements:
    /// computing them there saves nothing.
    fn stored_contractions(&self, s: &Schedule) -> Vec<usize> {
        let inside = |p: usize| s.levels[p].1 == Role::Inside;
        let mut from: HashMap<TensorId, HashSet<usize>> = HashMap::new();
        let mut wasted = HashSet::new();
        for (_, &k) in s.nodes.iter().enumerate().filter(|(p, _)| inside(*p)) {
            let node = &self.nodes[k];
            let mut sources: HashSet<usize> =
                node.reads.iter().filter_map(|(t, _)| from.get(t)).flatten().copied().collect();
            if node.is_heavy(self.cascade) {
                sources.insert(k);
            }
            if s.stored.contains(&k) && s.levels.iter().any(|(_, role)| *role == Role::Carried) {
                wasted.extend(sources.iter().copied());
            }
            from.insert(node.target(), sources);
        }
        wasted.into_iter().collect()
    }

    /// Groups around a product of matrices that several reductions consume along one dimension: it, those
    /// reductions, and all between and after them. They are tried whole, since parts of them are no kernel.
    fn seeds(&self) -> Vec<Vec<usize>> {
        let mut seeds: Vec<Vec<usize>> = Vec::new();
        let mut taken: HashSet<usize> = HashSet::new();
        for k in 0..self.nodes.len() {
            if taken.contains(&k) || self.own_kernel.borrow().contains(&k) || !self.nodes[k].is_heavy(self.cascade) {
                continue;
            }
            for (dim, _) in self.consumers[k].iter().enumerate().filter(|(_, n)| **n >= 2) {
                let members = self.along(k, dim);
                let mut all = seeds.clone();
                all.push(members.clone());
                let mut seen: HashSet<usize> = HashSet::new();
                if !all.iter().flatten().all(|n| seen.insert(*n)) {
                    continue;
                }
                all.extend((0..self.nodes.len()).filter(|n| !seen.contains(n)).map(|n| vec![n]));
                if self.launch_order(&all).is_some() && self.schedule(&members).is_some() {
                    taken.extend(&members);
                    seeds.push(members);
                    break;
                }
            }
        }
        seeds
    }

    /// Statement `k` and all that follow from it along its dimension `dim`: elementwise statements and reductions
    /// with that index, and elementwise ones of the reductions' results.
    fn along(&self, k: usize, dim: usize) -> Vec<usize> {
        // Per member tensor: the position of the index followed, none once it is reduced.
        let mut followed: HashMap<TensorId, Option<usize>> = HashMap::from([(self.nodes[k].target(), Some(dim))]);
        let mut members = vec![k];
        for (n, node) in self.nodes.iter().enumerate().skip(k + 1) {
            let mut index: Option<IndexId> = None;
            let (mut reads, mut plain) = (false, true);
            for (t, at) in &node.reads {
                match followed.get(t) {
                    None => {}
                    Some(None) => reads = true,
                    Some(Some(d)) => {
                        reads = true;
                        match self.cascade.exprs[at[*d]] {
                            einfall_ir::cascade::Expr::Index(i) => {
                                plain &= index.is_none_or(|j| i == j);
                                index = Some(i);
                            }
                            _ => plain = false,
                        }
                    }
                }
            }
            if !reads || !plain {
                continue;
            }
            let place = match (index, &node.dims) {
                (Some(i), _) if node.over().contains(&i) => None,
                (Some(i), Some(dims)) => match dims.iter().position(|j| *j == i) {
                    Some(p) => Some(p),
                    None => continue,
                },
                (Some(_), None) => continue,
                (None, _) if matches!(node.kind, Kind::Map) => None,
                (None, _) => continue,
            };
            followed.insert(node.target(), place);
            members.push(n);
        }
        members
    }

    fn grouping(&self) -> Vec<Schedule> {
        let mut groups: Vec<Vec<usize>> = self.seeds();
        let mut of: HashMap<usize, usize> =
            groups.iter().enumerate().flat_map(|(g, list)| list.iter().map(move |&k| (k, g))).collect();
        for k in 0..self.nodes.len() {
            if of.contains_key(&k) {
                continue;
            }
            let mut deps: BTreeSet<usize> = BTreeSet::new();
            for (t, _) in &self.nodes[k].reads {
                if let Some(g) = self.producer.get(t).filter(|p| **p != k).and_then(|p| of.get(p)) {
                    deps.insert(*g);
                }
            }
            let mut choices: Vec<Vec<usize>> = Vec::new();
            if deps.len() > 1 {
                choices.push(deps.iter().copied().collect());
            }
            choices.extend(deps.iter().rev().map(|&d| vec![d]));
            // A fold walks its points by itself.
            let alone = |g: usize| groups[g].iter().any(|&n| self.nodes[n].is_fold());
            choices.retain(|choice| !self.nodes[k].is_fold() && !choice.iter().any(|&g| alone(g)));
            let merged = choices.into_iter().find_map(|choice| {
                let mut members: Vec<usize> = choice.iter().flat_map(|&g| groups[g].iter().copied()).collect();
                members.push(k);
                members.sort_unstable();
                let mut merged: Vec<Vec<usize>> =
                    groups.iter().enumerate().filter(|(g, _)| !choice.contains(g)).map(|(_, l)| l.clone()).collect();
                merged.push(members.clone());
                merged.extend((0..self.nodes.len()).filter(|n| *n != k && !of.contains_key(n)).map(|n| vec![n]));
                (self.launch_order(&merged).is_some() && self.schedule(&members).is_some()).then_some((choice, members))
            });
            match merged {
                Some((choice, members)) => {
                    let home = choice[0];
                    for &g in &choice[1..] {
                        groups[g].clear();
                    }
                    for &m in &members {
                        of.insert(m, home);
                    }
                    groups[home] = members;
                }
                None => {
                    of.insert(k, groups.len());
                    groups.push(vec![k]);
                }
            }
        }
        groups.retain(|g| !g.is_empty());
        let order = self.launch_order(&groups).expect("kept free of circles");
        order
            .into_iter()
            .map(|g| self.schedule(&groups[g]).expect("a group that was accepted, or a single statement"))
            .collect()
    }

    /// Kernels in dependency order, earliest statements first; none if they depend on each other in a circle.
    fn launch_order(&self, groups: &[Vec<usize>]) -> Option<Vec<usize>> {
        let of: HashMap<usize, usize> =
            groups.iter().enumerate().flat_map(|(g, list)| list.iter().map(move |&k| (k, g))).collect();
        let mut done: HashSet<usize> = HashSet::new();
        let mut order = Vec::new();
        while order.len() < groups.len() {
            let next = (0..groups.len()).filter(|g| !done.contains(g)).find(|&g| {
                groups[g].iter().all(|&k| {
                    self.nodes[k]
                        .reads
                        .iter()
                        .filter_map(|(t, _)| self.producer.get(t))
                        .all(|p| of[p] == g || done.contains(&of[p]))
                })
            })?;
            done.insert(next);
            order.push(next);
        }
        Some(order)
    }
}
