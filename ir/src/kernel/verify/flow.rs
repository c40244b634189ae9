//! Registers owned by wgmma: nothing may touch an accumulator or a register operand between issue and wait, and a
//! fence must stand between ordinary use of registers and the wgmma that takes them.
//!
//! A forward analysis over statement lists; a loop's body is run twice, so that what the first iteration leaves in
//! flight meets the second. Invariant: branches are joined by union, so a report holds on some path.
//! Source: PTX ISA, "wgmma.fence", "wgmma.wait_group".

use super::*;

/// Fragments of one group.
#[derive(Clone, Debug, Default, PartialEq)]
struct Group {
    writes: HashSet<FragId>,
    reads: HashSet<FragId>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct State {
    /// Committed groups, newest last.
    groups: Vec<Group>,
    open: Group,
    /// Fragments used by ordinary statements since the last fence.
    touched: HashSet<FragId>,
}

impl State {
    fn in_flight(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().chain([&self.open])
    }

    fn join(&mut self, other: State) {
        // Groups are counted from the newest.
        while self.groups.len() < other.groups.len() {
            self.groups.insert(0, Group::default());
        }
        let skip = self.groups.len() - other.groups.len();
        for (mine, theirs) in self.groups[skip..].iter_mut().zip(other.groups) {
            mine.writes.extend(theirs.writes);
            mine.reads.extend(theirs.reads);
        }
        self.open.writes.extend(other.open.writes);
        self.open.reads.extend(other.open.reads);
        self.touched.extend(other.touched);
    }
}

pub(super) fn check(v: &mut Verifier<'_>) {
    let role = &v.kernel.roles[v.role];
    let mut state = State { touched: v.kernel.frags.ids().collect(), ..State::default() };
    walk(v, &role.body, &role.name, &mut state);
    if let Some(f) = state.in_flight().flat_map(|g| &g.writes).next() {
        let text = format!("`{}` is still being written by a wgmma when the role ends", v.kernel.frags[*f].name);
        v.line = None;
        v.wrong(text);
    }
}

fn walk<'a>(v: &mut Verifier<'a>, body: &'a [Stmt], path: &str, state: &mut State) {
    for (i, s) in body.iter().enumerate() {
        let path = format!("{path}.{i}");
        match s {
            Stmt::For { body, .. } => {
                let before = state.clone();
                let errors = v.out.len();
                walk(v, body, &path, state);
                if v.out.len() == errors {
                    state.join(before.clone());
                    walk(v, body, &path, state);
                }
                // The loop may also not run.
                state.join(before);
            }
            Stmt::If { then, otherwise, .. } => {
                let mut other = state.clone();
                walk(v, then, &path, state);
                walk(v, otherwise, &path, &mut other);
                state.join(other);
            }
            Stmt::Atom { atom, acc, a, b, .. } if atoms::find(atom).is_some_and(|a| a.asynchronous) => {
                (v.path, v.line) = (path, Some(s));
                for o in [a, b] {
                    if let Operand::Frag { frag, .. } = o {
                        touched(v, state, *frag);
                        if state.in_flight().any(|g| g.writes.contains(frag)) {
                            owned(v, *frag, "read by a wgmma");
                        }
                        state.open.reads.insert(*frag);
                    }
                }
                touched(v, state, *acc);
                if state.in_flight().any(|g| g.reads.contains(acc)) {
                    owned(v, *acc, "written by a wgmma");
                }
                state.open.writes.insert(*acc);
            }
            Stmt::Fence(FenceKind::Wgmma) => state.touched.clear(),
            Stmt::Commit(GroupKind::Wgmma) => {
                let group = std::mem::take(&mut state.open);
                state.groups.push(group);
            }
            Stmt::WaitGroup { kind: GroupKind::Wgmma, pending } => {
                let done = state.groups.len().saturating_sub(*pending as usize);
                state.groups.drain(..done);
            }
            _ => {
                (v.path, v.line) = (path, Some(s));
                let (reads, writes) = s.frags();
                for f in reads {
                    state.touched.insert(f);
                    if state.in_flight().any(|g| g.writes.contains(&f)) {
                        owned(v, f, "read");
                    }
                }
                for f in writes {
                    state.touched.insert(f);
                    if state.in_flight().any(|g| g.writes.contains(&f) || g.reads.contains(&f)) {
                        owned(v, f, "written");
                    }
                }
            }
        }
    }
}

fn owned(v: &mut Verifier<'_>, frag: FragId, verb: &str) {
    let name = v.kernel.frags[frag].name.clone();
    v.wrong(format!("`{name}` is {verb} while a wgmma in flight owns it: wait_group is missing"));
}

fn touched(v: &mut Verifier<'_>, state: &State, frag: FragId) {
    if state.touched.contains(&frag) {
        let name = v.kernel.frags[frag].name.clone();
        v.wrong(format!("`{name}` was used by ordinary statements since the last `fence wgmma`"));
    }
}
