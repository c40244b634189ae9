//! Sharing a kernel's ranges of tasks between the thread that launches it and the threads of a pool.
//!
//! The launching thread takes ranges itself, so that a launch waits for no thread to wake: threads of the pool take
//! what is left when they come, and then watch for the next launch for [`WATCH`] before the pool has them back, as
//! threads of OpenMP do. (A pool alone, entered for each launch, puts its threads to sleep between launches; on a
//! virtual machine waking one takes longer than most kernels.) Every thread has a seat, and so the same part of the ranges of
//! every launch, whose data may be in its core's cache; then it takes what is left of the others' parts. Rounds of ranges that
//! follow one another ([`Team::rounds`]) are one launch, in which threads stay. Nothing that threads do for a launch takes a
//! lock. Invariants: each range is done once; [`Team::share`] returns when all are, and nothing that it was given is touched
//! afterwards; at most as many threads of the pool help as it has but one, whatever is launched at once.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a thread watches for the next launch.
const WATCH: Duration = Duration::from_micros(100);
/// How long a thread helps at a time: then the pool's other work has its turn.
const LONGEST: Duration = Duration::from_millis(10);
/// How long ranges of a round are left to the thread that had them before.
const ABSENT: Duration = Duration::from_micros(20);
/// Looks in vain before a waiting thread lets others have its core.
const LOOKS: u32 = 64;
/// Launches that are shared at once; others are done by those who launch them.
const SLOTS: usize = 8;

/// A pool of threads and what was launched on it.
#[derive(Clone, Debug)]
pub(crate) struct Team {
    pool: Arc<rayon::ThreadPool>,
    board: Arc<Board>,
}

/// What helpers see.
#[derive(Debug)]
struct Board {
    slots: Vec<Slot>,
    /// Whether a helper has the seat; the first is that of threads that launch.
    seats: Vec<AtomicBool>,
    /// Launches so far.
    posted: Line,
    /// Threads of the pool that were asked to come and have not left.
    helpers: Line,
}

/// What [`Team::share`] calls.
type Work = *const (dyn Fn(&mut Ranges<'_>) + Sync + 'static);

/// The ranges of one launch at a time, on cache lines by who writes them.
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    /// Whether a launch has it.
    taken: AtomicBool,
    /// Whether there is something to do, as far as known.
    open: AtomicBool,
    /// Whether a range panicked.
    failed: AtomicBool,
    /// Borrowed from [`Team::share`], which outlasts every call. Written while nothing can be handed out, read by who was
    /// handed a range.
    work: UnsafeCell<Option<Work>>,
    /// Threads that may be at it: counted before they ask for a range.
    active: Line,
    /// For every seat what is left of its part, every n-th range of n seats, so that ranges beside one another, which may read
    /// the same, are done at about the same time: how many in the upper half, how many were handed out in the lower.
    parts: Vec<Part>,
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Part(AtomicU64);

// SAFETY: what `work` points to is `Sync` and called only while it is borrowed; for the cell itself see there.
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

/// A number on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicUsize);

/// Counts down when it goes, by a panic too.
struct Held<'a>(&'a AtomicUsize);

impl<'a> Held<'a> {
    fn new(count: &'a AtomicUsize) -> Held<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Held(count)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Sets it when it goes, by a panic too.
struct Mark<'a>(&'a AtomicBool, bool);

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::SeqCst);
    }
}

/// Waits without sleeping.
#[derive(Default)]
struct Patience(u32);

impl Patience {
    /// Whether it is time to see how long it has been.
    fn waited(&self) -> bool {
        self.0.is_multiple_of(LOOKS / 4)
    }

    fn wait(&mut self) {
        self.0 += 1;
        match self.0.is_multiple_of(LOOKS) {
            true => std::thread::yield_now(),
            false => std::hint::spin_loop(),
        }
    }
}

impl Part {
    fn set(&self, ranges: usize) {
        // These are few: a handful for each thread.
        self.0.store((ranges as u64) << 32, Ordering::SeqCst);
    }

    fn take(&self) -> Option<usize> {
        let turn = |state: u64| Some(state & 0xffff_ffff).filter(|next| *next < state >> 32).map(|next| next as usize);
        // Looked at before, so that nobody counts on where nothing is left.
        turn(self.0.load(Ordering::SeqCst)).and_then(|_| turn(self.0.fetch_add(1, Ordering::SeqCst)))
    }
}

impl Slot {
    fn new(threads: usize) -> Slot {
        Slot {
            taken: AtomicBool::new(false),
            open: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            work: UnsafeCell::new(None),
            active: Line::default(),
            parts: (0..threads).map(|_| Part::default()).collect(),
        }
    }

    /// Does ranges from this seat on until none is left.
    fn help(&self, seat: usize) {
        // Counted first: who sees that none is left and none is active knows that no other call follows.
        let _active = Held::new(&self.active.0);
        let failed = Mark(&self.failed, true);
        // Asked before what is called is looked at: this thread may be late.
        let mut ranges = Ranges { slot: self, seat, at: seat, first: None };
        ranges.first = ranges.next();
        if ranges.first.is_some() {
            // SAFETY: a range was handed out that is not done, so `Team::share` has not returned and the cell is only read.
            if let Some(work) = unsafe { *self.work.get() } {
                // SAFETY: as above.
                unsafe { (*work)(&mut ranges) };
            }
        }
        std::mem::forget(failed);
    }
}

/// The ranges that one thread does of a launch, each done when the next is asked for. Who returns before they end leaves
/// the others to other threads, or to nobody.
pub(crate) struct Ranges<'s> {
    slot: &'s Slot,
    seat: usize,
    /// The seat whose part it is at.
    at: usize,
    /// One that was handed out already.
    first: Option<usize>,
}

impl Iterator for Ranges<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if let Some(range) = self.first.take() {
            return Some(range);
        }
        let n = self.slot.parts.len();
        while self.at < self.seat + n {
            let part = self.at % n;
            if let Some(turn) = self.slot.parts[part].take() {
                return Some(turn * n + part);
            }
            self.at += 1;
        }
        None
    }
}

/// Closes a slot and waits for those who are at it, when a range panics too.
struct Closing<'a>(&'a Slot);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.open.store(false, Ordering::SeqCst);
        self.0.parts.iter().for_each(|p| p.set(0));
        let mut patience = Patience::default();
        while self.0.active.0.load(Ordering::SeqCst) > 0 {
            patience.wait();
        }
    }
}

/// Rounds of ranges, each round after the one before.
struct Rounds {
    rounds: usize,
    /// For every range, in how many rounds it was handed out.
    handed: Vec<Line>,
    /// For every range, how many rounds of it are done. Each has its own line that one thread writes and the others watch: of a
    /// common count the line would go to every thread in turn before anyone could go on.
    done: Vec<Line>,
    failed: AtomicBool,
}

impl Rounds {
    fn claim(&self, round: usize, range: usize) -> bool {
        let handed = &self.handed[range].0;
        // Looked at before: what fails to exchange takes the line away, too.
        handed.load(Ordering::Relaxed) == round
            && handed.compare_exchange(round, round + 1, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }
}

/// What one thread does of rounds of ranges: pairs of a round and a range, which is done when the next pair is asked for.
pub(crate) struct Turns<'r> {
    of: &'r Rounds,
    round: usize,
    /// The range that is this thread's in every round, then those that nobody came for: they are in this thread's cache now.
    own: Vec<usize>,
    /// Those of `own` that were looked for in this round.
    asked: usize,
    /// Ranges whose part of this round was seen to be done.
    seen: usize,
    /// What was handed out and is not done.
    busy: Option<usize>,
}

impl Turns<'_> {
    fn new(of: &Rounds, own: usize) -> Turns<'_> {
        Turns { of, round: 0, own: vec![own], asked: 0, seen: 0, busy: None }
    }

    /// A range of this round that this thread had before, unless another has come for it.
    fn own(&mut self) -> Option<usize> {
        while let Some(range) = self.own.get(self.asked).copied() {
            if self.of.claim(self.round, range) {
                self.asked += 1;
                return Some(range);
            }
            match self.asked {
                0 => self.asked = 1,
                i => drop(self.own.remove(i)),
            }
        }
        None
    }

    /// Goes on to the next round, if this one is done.
    fn advance(&mut self) -> bool {
        let done = |l: &Line| l.0.load(Ordering::Acquire);
        let rest = &self.of.done[self.seen..];
        self.seen += rest.iter().take_while(|l| done(l) > self.round).count();
        if self.seen < self.of.done.len() {
            return false;
        }
        // Who comes late finds several done.
        self.round = self.of.done.iter().map(done).min().unwrap_or(self.of.rounds);
        (self.asked, self.seen) = (0, 0);
        true
    }
}

impl Iterator for Turns<'_> {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<(usize, usize)> {
        let of = self.of;
        let adopted = self.busy.take().is_some_and(|range| {
            of.done[range].0.store(self.round + 1, Ordering::Release);
            self.asked > 1
        });
        // Who took what nobody came for takes more of it at once.
        let mut give = if adopted { Duration::ZERO } else { ABSENT };
        let (mut patience, mut since) = (Patience::default(), None);
        loop {
            if of.failed.load(Ordering::Relaxed) || self.round >= of.rounds {
                return None;
            }
            self.busy = self.own();
            if self.busy.is_none() && self.advance() {
                (patience, since, give) = (Patience::default(), None, ABSENT);
                continue;
            }
            if self.busy.is_none() && patience.waited() && since.get_or_insert_with(Instant::now).elapsed() >= give {
                self.busy = (0..of.handed.len()).find(|i| of.claim(self.round, *i));
                self.own.extend(self.busy);
                self.asked = self.own.len();
            }
            if let Some(range) = self.busy {
                return Some((self.round, range));
            }
            patience.wait();
        }
    }
}

impl Drop for Turns<'_> {
    fn drop(&mut self) {
        // A range that was handed out and not done, by a panic: no later round follows.
        if self.busy.is_some() {
            self.of.failed.store(true, Ordering::SeqCst);
        }
    }
}

/// The seat of a thread that launches.
const LAUNCHER: usize = 0;

impl Team {
    pub(crate) fn new(pool: Arc<rayon::ThreadPool>) -> Team {
        let n = pool.current_num_threads();
        let slots = (0..SLOTS).map(|_| Slot::new(n)).collect();
        let seats = (0..n).map(|i| AtomicBool::new(i == LAUNCHER)).collect();
        Team { pool, board: Arc::new(Board { slots, seats, posted: Line::default(), helpers: Line::default() }) }
    }

    /// Threads that work on a launch.
    pub(crate) fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Helps with what is launched until nothing was for a while, or for [`LONGEST`].
    fn serve(&self) {
        let (board, begin) = (&*self.board, Instant::now());
        // The same as the last time, if it is free. There is one: as many come at most as there are.
        let (n, own) = (board.seats.len(), self.pool.current_thread_index().unwrap_or(0));
        let seat = (0..n).map(|i| (own + i) % n).find(|i| !board.seats[*i].swap(true, Ordering::SeqCst));
        let _taken = seat.map(|i| Mark(&board.seats[i], false));
        let seat = seat.unwrap_or(own);
        let mut seen = None;
        loop {
            let held = Held(&board.helpers.0);
            let mut since = Instant::now();
            let mut patience = Patience::default();
            while since.elapsed() < WATCH && begin.elapsed() < LONGEST {
                let posted = board.posted.0.load(Ordering::SeqCst);
                if seen != Some(posted) {
                    seen = Some(posted);
                    for slot in board.slots.iter().filter(|s| s.open.load(Ordering::SeqCst)) {
                        slot.help(seat);
                    }
                    since = Instant::now();
                    continue;
                }
                // What this thread was given goes before what may come.
                if self.pool.current_thread_has_pending_tasks() == Some(true) {
                    break;
                }
                patience.wait();
            }
            drop(held);
            // A launch that still counted on this thread is not left alone.
            let late = seen == Some(board.posted.0.load(Ordering::SeqCst)) || begin.elapsed() > LONGEST;
            let claim = |n: usize| (n + 1 < self.threads()).then_some(n + 1);
            if late || board.helpers.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim).is_err() {
                return;
            }
        }
    }

    /// Calls `work` on this thread and those of the pool that come in time, each with its share of the numbers below
    /// `ranges`.
    pub(crate) fn share(&self, ranges: usize, work: &(dyn Fn(&mut Ranges<'_>) + Sync)) {
        let (board, n) = (&*self.board, self.threads());
        let wanted = n.min(ranges).saturating_sub(1);
        let free = |s: &&Slot| !s.taken.swap(true, Ordering::SeqCst);
        let found = if wanted > 0 { board.slots.iter().find(free) } else { None };
        let alone;
        let slot = match found {
            Some(slot) => slot,
            None => {
                alone = Slot::new(1);
                &alone
            }
        };
        let _taken = Mark(&slot.taken, false);
        // SAFETY: the lifetime alone changes; `Closing` waits until nobody calls it. Nothing of this slot can be handed out, so
        // nobody reads the cell.
        unsafe {
            let work: *const (dyn Fn(&mut Ranges<'_>) + Sync + '_) = work;
            *slot.work.get() = Some(std::mem::transmute::<*const (dyn Fn(&mut Ranges<'_>) + Sync + '_), Work>(work));
        }
        slot.failed.store(false, Ordering::SeqCst);
        let closing = Closing(slot);
        let parts = slot.parts.len();
        slot.parts.iter().enumerate().for_each(|(i, p)| p.set((ranges + parts - 1 - i) / parts));
        if found.is_some() {
            slot.open.store(true, Ordering::SeqCst);
            board.posted.0.fetch_add(1, Ordering::SeqCst);
            let claim = |n: usize| (n < wanted).then_some(n + 1);
            while board.helpers.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim).is_ok() {
                let team = self.clone();
                self.pool.spawn(move || team.serve());
            }
        }
        slot.help(LAUNCHER);
        drop(closing);
        // A pool may have been told to go on after a panic of its threads; the range it was at is not done.
        assert!(!slot.failed.load(Ordering::SeqCst), "a range of tasks panicked on a thread of the pool");
    }
}

impl Team {
    /// Calls `work` on this thread and those of the pool that come in time, each with its share of `rounds` times every
    /// number below `ranges`: a round begins when the one before is done. Who returns before its turns end leaves them to
    /// the others, who must not all do so.
    pub(crate) fn rounds(&self, rounds: usize, ranges: usize, work: &(dyn Fn(&mut Turns<'_>) + Sync)) {
        if ranges == 0 {
            return;
        }
        let lines = || (0..ranges).map(|_| Line::default()).collect();
        let of = Rounds { rounds, handed: lines(), done: lines(), failed: AtomicBool::new(false) };
        self.share(self.threads().min(ranges), &|places| {
            // One for each thread, so that the thread that launches has one whatever others do.
            places.take(1).for_each(|own| work(&mut Turns::new(&of, own)));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    fn team(n: usize) -> Team {
        Team::new(Arc::new(rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads")))
    }

    fn each(team: &Team, ranges: usize, work: &(dyn Fn(usize) + Sync)) {
        team.share(ranges, &|list| list.for_each(work));
    }

    /// Shares `ranges` and says how often each was done.
    fn counts(team: &Team, ranges: usize) -> Vec<usize> {
        let done: Vec<AtomicUsize> = (0..ranges).map(|_| AtomicUsize::new(0)).collect();
        each(team, ranges, &|i| {
            done[i].fetch_add(1, Ordering::Relaxed);
        });
        done.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_range_is_done_once() {
        for threads in [1, 2, 5] {
            let team = team(threads);
            for ranges in (0..40).cycle().take(2000) {
                assert_eq!(counts(&team, ranges), vec![1; ranges]);
            }
        }
    }

    #[test]
    fn many_launch_at_once_from_outside_and_inside() {
        let team = team(3);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..500).for_each(|i| assert_eq!(counts(&team, i % 37), vec![1; i % 37])));
            }
        });
        let inside = || (0..300usize).into_par_iter().for_each(|i| assert_eq!(counts(&team, i % 29), vec![1; i % 29]));
        team.pool.install(inside);
        // Within a range, too.
        each(&team, 6, &|i| assert_eq!(counts(&team, i), vec![1; i]));
    }

    #[test]
    fn other_threads_take_part_and_leave() {
        let team = team(2);
        let here = std::thread::current().id();
        let elsewhere = AtomicUsize::new(0);
        let begin = Instant::now();
        while elsewhere.load(Ordering::Relaxed) == 0 && begin.elapsed() < Duration::from_secs(20) {
            each(&team, 8, &|_| {
                if std::thread::current().id() != here {
                    elsewhere.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(1));
            });
        }
        assert!(elsewhere.into_inner() > 0, "the pool's thread never came");
        let begin = Instant::now();
        while team.board.helpers.0.load(Ordering::SeqCst) > 0 && begin.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(team.board.helpers.0.load(Ordering::SeqCst), 0, "it watches for ever");
        assert!(team.board.slots.iter().all(|s| !s.taken.load(Ordering::SeqCst)));
        assert!(team.board.seats[1..].iter().all(|s| !s.load(Ordering::SeqCst)));
    }

    #[test]
    fn rounds_follow_one_another() {
        for (threads, ranges) in [(1, 3), (2, 2), (3, 7), (5, 5), (5, 2), (4, 0)] {
            let team = team(threads);
            for rounds in [0, 1, 2, 400] {
                let done: Vec<AtomicUsize> = (0..ranges).map(|_| AtomicUsize::new(0)).collect();
                team.rounds(rounds, ranges, &|turns| {
                    for (round, range) in turns {
                        // Nothing of this round was done before all of the one before.
                        assert!(done.iter().all(|d| (round..=round + 1).contains(&d.load(Ordering::SeqCst))));
                        assert_eq!(done[range].fetch_add(1, Ordering::SeqCst), round);
                    }
                });
                assert!(done.into_iter().all(|d| d.into_inner() == rounds), "{rounds} of {ranges} on {threads}");
            }
        }
    }

    #[test]
    fn a_range_that_nobody_came_for_is_kept_until_its_thread_comes() {
        let lines = || (0..2).map(|_| Line::default()).collect();
        let of = Rounds { rounds: 3, handed: lines(), done: lines(), failed: AtomicBool::new(false) };
        let (mut first, begin) = (Turns::new(&of, 0), Instant::now());
        assert_eq!(first.next(), Some((0, 0)));
        assert_eq!((first.next(), begin.elapsed() >= ABSENT), (Some((0, 1)), true), "the other has its time to come");
        assert_eq!((first.next(), &first.own[..]), (Some((1, 0)), &[0, 1][..]));
        let mut late = Turns::new(&of, 1);
        assert_eq!(late.next(), Some((1, 1)));
        let other = std::thread::scope(|s| {
            let next = s.spawn(|| first.next());
            assert_eq!(late.next(), Some((2, 1)));
            next.join().expect("a thread")
        });
        assert_eq!((other, &first.own[..]), (Some((2, 0)), &[0][..]));
    }

    #[test]
    fn more_launches_at_once_than_are_shared() {
        let team = team(3);
        fn deep(team: &Team, left: usize, done: &AtomicUsize) {
            each(team, 2, &|_| {
                done.fetch_add(1, Ordering::SeqCst);
                if left > 0 {
                    deep(team, left - 1, done);
                }
            });
        }
        let done = AtomicUsize::new(0);
        deep(&team, SLOTS + 2, &done);
        // 2 + 4 + 8 ..
        assert_eq!(done.into_inner(), (1 << (SLOTS + 4)) - 2);
        assert!(team.board.slots.iter().all(|s| !s.taken.load(Ordering::SeqCst)));
    }

    #[test]
    fn every_thread_begins_with_its_own_part() {
        let slot = Slot::new(3);
        slot.parts.iter().enumerate().for_each(|(i, p)| p.set([3, 2, 2][i]));
        let mut own = Ranges { slot: &slot, seat: 1, at: 1, first: None };
        assert_eq!(own.next(), Some(1));
        let others: Vec<usize> = Ranges { slot: &slot, seat: 0, at: 0, first: None }.take(4).collect();
        assert_eq!(others, [0, 3, 6, 4]);
        assert_eq!(own.collect::<Vec<_>>(), [2, 5]);
    }

    #[test]
    fn rounds_go_on_without_those_who_leave() {
        let team = team(3);
        let here = std::thread::current().id();
        let done = AtomicUsize::new(0);
        team.rounds(50, 6, &|turns| {
            for _ in turns {
                done.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        assert_eq!(done.swap(0, Ordering::SeqCst), 300);
        team.rounds(50, 6, &|turns| {
            if std::thread::current().id() == here {
                turns.for_each(|_| {
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(done.into_inner(), 300, "one thread does what the others left");
    }

    #[test]
    fn a_panic_in_a_round_ends_the_rounds() {
        let team = team(3);
        let here = std::thread::current().id();
        let last = AtomicUsize::new(0);
        let work = |turns: &mut Turns<'_>| {
            for (round, _) in turns {
                last.fetch_max(round, Ordering::SeqCst);
                assert!(std::thread::current().id() != here || round < 5, "planted");
            }
        };
        // The others may do all of it before this thread has a turn.
        let caught = (0..100).any(|_| {
            last.store(0, Ordering::SeqCst);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| team.rounds(1000, 3, &work))).is_err()
        });
        assert!(caught);
        assert!(last.into_inner() < 1000 - 1);
        assert_eq!(counts(&team, 9), vec![1; 9]);
    }

    #[test]
    fn a_panic_waits_for_the_others() {
        let team = team(3);
        let active = AtomicUsize::new(0);
        let here = std::thread::current().id();
        let work = |_| {
            let _active = Held::new(&active);
            std::thread::sleep(Duration::from_millis(2));
            // Threads of the pool that panic would end the process.
            assert_ne!(std::thread::current().id(), here, "planted");
        };
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| each(&team, 64, &work)));
        assert!(caught.is_err());
        assert_eq!(active.load(Ordering::SeqCst), 0, "a range outlives the launch");
        assert_eq!(counts(&team, 9), vec![1; 9]);
    }
}
