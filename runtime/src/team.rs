//! Sharing a kernel's ranges of tasks between the thread that launches it and the threads of a pool.
//!
//! The launching thread takes ranges itself, so that a launch waits for no thread to wake: threads of the pool take
//! what is left when they come, and then watch for the next launch for [`WATCH`] before the pool has them back, as
//! threads of OpenMP do. Rounds of ranges that follow one another ([`Team::rounds`]) are one launch: threads stay in it,
//! each with the same range of every round, so that what it reads again is in its own cache. (A pool alone, entered for each launch, puts its threads to sleep between launches; on a
//! virtual machine waking one takes longer than most kernels.) Invariants: each range is done once; [`Team::share`]
//! returns when all are, and nothing that it was given is touched afterwards; at most as many threads of the pool
//! help as it has but one, whatever is launched at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a thread watches for the next launch.
const WATCH: Duration = Duration::from_micros(100);
/// How long a thread helps at a time: then the pool's other work has its turn.
const LONGEST: Duration = Duration::from_millis(10);
/// How long ranges of a round are left to the thread that had them before.
const ABSENT: Duration = Duration::from_micros(20);
/// Looks in vain before a waiting thread lets others have its core.
const LOOKS: u32 = 64;

/// A pool of threads and what was launched on it.
#[derive(Clone, Debug)]
pub(crate) struct Team {
    pool: Arc<rayon::ThreadPool>,
    board: Arc<Board>,
}

/// What helpers see.
#[derive(Debug, Default)]
struct Board {
    open: Mutex<Vec<Arc<Share>>>,
    /// Launches so far.
    posted: AtomicUsize,
    /// Threads of the pool that were asked to come and have not left.
    helpers: AtomicUsize,
}

/// The ranges of one launch.
struct Share {
    /// Borrowed from [`Team::share`], which outlasts every call: a range that is handed out was counted in `active`
    /// before, and it returns when all were handed out and none is active.
    work: *const (dyn Fn(&mut Ranges<'_>) + Sync),
    next: AtomicUsize,
    end: usize,
    active: AtomicUsize,
    /// Whether a range panicked.
    failed: AtomicBool,
}

// SAFETY: `work` is `Sync`, and called only while it is borrowed (see there).
unsafe impl Send for Share {}
// SAFETY: as above.
unsafe impl Sync for Share {}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Share({:?} of {})", self.next, self.end)
    }
}

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

/// Says so when a range unwinds through it.
struct Panicked<'a>(&'a AtomicBool);

impl Drop for Panicked<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
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

impl Share {
    /// Does ranges until none is left.
    fn help(&self) {
        // Counted first: who sees that none is left and none is active knows that no other call follows.
        let _active = Held::new(&self.active);
        let failed = Panicked(&self.failed);
        // Asked before what is called is looked at: this thread may be late.
        let mut ranges = Ranges { share: self, first: None };
        ranges.first = ranges.next();
        if ranges.first.is_some() {
            // SAFETY: a range was handed out that is not done, so `Team::share` has not returned.
            unsafe { (*self.work)(&mut ranges) };
        }
        std::mem::forget(failed);
    }

    fn is_open(&self) -> bool {
        self.next.load(Ordering::SeqCst) < self.end
    }
}

/// The ranges that one thread does of a launch, each done when the next is asked for. Who returns before they end leaves
/// the others to other threads, or to nobody.
pub(crate) struct Ranges<'s> {
    share: &'s Share,
    /// One that was handed out already.
    first: Option<usize>,
}

impl Iterator for Ranges<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let next = || Some(self.share.next.fetch_add(1, Ordering::SeqCst)).filter(|n| *n < self.share.end);
        self.first.take().or_else(next)
    }
}

/// Closes a share and waits for those who are at it, when a range panics too.
struct Closing<'a> {
    share: &'a Arc<Share>,
    board: &'a Board,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.share.next.fetch_max(self.share.end, Ordering::SeqCst);
        self.board.lock().retain(|s| !Arc::ptr_eq(s, self.share));
        let mut patience = Patience::default();
        while self.share.active.load(Ordering::SeqCst) > 0 {
            patience.wait();
        }
    }
}

impl Board {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Share>>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A number on cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicUsize);

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

impl Team {
    pub(crate) fn new(pool: Arc<rayon::ThreadPool>) -> Team {
        Team { pool, board: Arc::default() }
    }

    /// Threads that work on a launch.
    pub(crate) fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Helps with what is launched until nothing was for a while, or for [`LONGEST`].
    fn serve(&self) {
        let (board, begin) = (&*self.board, Instant::now());
        let mut seen = None;
        loop {
            let held = Held(&board.helpers);
            let mut since = Instant::now();
            let mut patience = Patience::default();
            while since.elapsed() < WATCH && begin.elapsed() < LONGEST {
                let posted = board.posted.load(Ordering::SeqCst);
                if seen != Some(posted) {
                    seen = Some(posted);
                    let open = || board.lock().iter().find(|s| s.is_open()).cloned();
                    while let Some(share) = open() {
                        share.help();
                        since = Instant::now();
                    }
                }
                // What this thread was given goes before what may come.
                if self.pool.current_thread_has_pending_tasks() == Some(true) {
                    break;
                }
                patience.wait();
            }
            drop(held);
            // A launch that still counted on this thread is not left alone.
            let late = seen == Some(board.posted.load(Ordering::SeqCst)) || begin.elapsed() > LONGEST;
            let claim = |n: usize| (n + 1 < self.threads()).then_some(n + 1);
            if late || board.helpers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim).is_err() {
                return;
            }
        }
    }

    /// Calls `work` on this thread and those of the pool that come in time, each with its share of the numbers below
    /// `ranges`.
    pub(crate) fn share(&self, ranges: usize, work: &(dyn Fn(&mut Ranges<'_>) + Sync)) {
        let wanted = self.threads().min(ranges).saturating_sub(1);
        // SAFETY: the lifetime alone changes; `Closing` waits until nobody calls it.
        let work = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(&mut Ranges<'_>) + Sync + '_),
                *const (dyn Fn(&mut Ranges<'_>) + Sync + 'static),
            >(work)
        };
        let share = Arc::new(Share {
            work,
            next: AtomicUsize::new(0),
            end: ranges,
            active: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        });
        if wanted == 0 {
            return share.help();
        }
        let board = &*self.board;
        board.lock().push(Arc::clone(&share));
        let closing = Closing { share: &share, board };
        board.posted.fetch_add(1, Ordering::SeqCst);
        let claim = |n: usize| (n < wanted).then_some(n + 1);
        while board.helpers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim).is_ok() {
            let team = self.clone();
            self.pool.spawn(move || team.serve());
        }
        share.help();
        drop(closing);
        // A pool may have been told to go on after a panic of its threads; the range it was at is not done.
        assert!(!share.failed.load(Ordering::SeqCst), "a range of tasks panicked on a thread of the pool");
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
            places.for_each(|own| work(&mut Turns::new(&of, own)));
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
        while team.board.helpers.load(Ordering::SeqCst) > 0 && begin.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(team.board.helpers.load(Ordering::SeqCst), 0, "it watches for ever");
        assert!(team.board.lock().is_empty());
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
