//! Child processes that compile side by side and are timed one at a time.
//!
//! Invariants: at most one child is timed at any moment, and on a processor, whose cores compiling would take, only
//! while no child compiles; a child that ends or is silent beyond its time loses its job, which is reported, and is
//! replaced; every job is reported once.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::super::Failure;
use super::DeviceName;
use super::case::Case;
use super::worker::{Answer, Ask, Timing};

/// How long a child may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To start, read the case and compile.
    pub build: Duration,
    /// To compare and time.
    pub time: Duration,
    /// Launches of one timing.
    pub budget_ms: u64,
}

/// What came of a job.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Right and timed; and the seconds of compiling.
    Timed(Timing, f64),
    /// Cannot be compiled or run.
    Failed(String),
    /// Wrong results.
    Wrong(String),
    /// Took too long.
    Hung(String),
    /// Compiled and then not worth timing.
    Skipped,
}

/// Where jobs come from and go to.
pub trait Jobs {
    /// The next job, if one is left: its number and mapping.
    fn next(&mut self) -> Option<(usize, String)>;
    /// Whether timing it is still worth while.
    fn wanted(&self, job: usize) -> bool;
    /// What came of it.
    fn done(&mut self, job: usize, outcome: Outcome);
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Idle,
    Building { job: usize, since: Instant },
    Ready { job: usize, seconds: f64 },
    Timing { job: usize, seconds: f64, since: Instant },
}

struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    state: State,
    /// Which of the children in this place it is: words of one that was replaced are not heard.
    generation: u64,
}

/// A line of a child's, or its end.
type Word = (usize, u64, Option<String>);

/// The children.
pub struct Pool {
    device: DeviceName,
    limits: Limits,
    workers: Vec<Worker>,
    receive: Receiver<Word>,
    send: Sender<Word>,
    generation: u64,
    /// Children that ended without an answer since the last answer.
    silent: usize,
}

impl Pool {
    /// Starts `n` children.
    pub fn new(device: DeviceName, n: usize, limits: Limits) -> Result<Pool, Failure> {
        let (send, receive) = channel();
        let mut pool = Pool { device, limits, workers: Vec::new(), receive, send, generation: 0, silent: 0 };
        for at in 0..n.max(1) {
            let worker = pool.start(at)?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    fn start(&mut self, at: usize) -> Result<Worker, Failure> {
        self.generation += 1;
        let (generation, send) = (self.generation, self.send.clone());
        let program = std::env::current_exe().map_err(Failure::machine)?;
        let mut child = Command::new(program)
            .args(["tune", "--worker", "--device", &self.device.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Failure::machine)?;
        let input = child.stdin.take();
        let Some(output) = child.stdout.take() else {
            return Err(Failure::Machine("no output of a child".to_owned()));
        };
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send((at, generation, Some(line))).is_err() {
                    return;
                }
            }
            let _ = send.send((at, generation, None));
        });
        Ok(Worker { child, input, state: State::Idle, generation })
    }

    /// Has every job of a case done.
    pub fn run(&mut self, case: &Case, jobs: &mut impl Jobs) -> Result<(), Failure> {
        let mut more = true;
        loop {
            let timing = self.workers.iter().any(|w| matches!(w.state, State::Timing { .. }));
            let ready = self.workers.iter().any(|w| matches!(w.state, State::Ready { .. }));
            // Where compiling takes the cores that are timed, the two take turns.
            let alone = self.device == DeviceName::Cpu && (timing || ready);
            for at in 0..self.workers.len() {
                if more && !alone && self.workers[at].state == State::Idle {
                    match jobs.next() {
                        Some((job, mapping)) => self.build(at, job, case, mapping)?,
                        None => more = false,
                    }
                }
            }
            let building = self.workers.iter().any(|w| matches!(w.state, State::Building { .. }));
            let busy = timing || self.device == DeviceName::Cpu && building;
            if !busy {
                let ready = |w: &Worker| if let State::Ready { job, .. } = w.state { Some(job) } else { None };
                let first = (0..self.workers.len()).filter_map(|i| Some((ready(&self.workers[i])?, i))).min();
                if let Some((job, at)) = first {
                    if !jobs.wanted(job) {
                        self.workers[at].state = State::Idle;
                        jobs.done(job, Outcome::Skipped);
                        continue;
                    }
                    self.time(at)?;
                }
            }
            if !more && self.workers.iter().all(|w| w.state == State::Idle) {
                return Ok(());
            }
            match self.receive.recv_timeout(Duration::from_millis(100)) {
                Ok((at, generation, word)) => {
                    if self.workers[at].generation == generation {
                        self.hear(at, word, jobs)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Machine("no children".to_owned())),
            }
            for at in 0..self.workers.len() {
                let (job, since, limit, what) = match self.workers[at].state {
                    State::Building { job, since } => (job, since, self.limits.build, "compiling"),
                    State::Timing { job, since, .. } => (job, since, self.limits.time, "running"),
                    State::Idle | State::Ready { .. } => continue,
                };
                if since.elapsed() > limit {
                    self.replace(at)?;
                    jobs.done(job, Outcome::Hung(format!("{what} took more than {} s", limit.as_secs_f64())));
                }
            }
        }
    }

    fn ask(&mut self, at: usize, ask: &Ask) -> Result<(), Failure> {
        let text = serde_json::to_string(ask).map_err(Failure::wrong)?;
        if let Some(input) = &mut self.workers[at].input {
            // A child that is gone is heard of by the end of its output.
            let _ = writeln!(input, "{text}").and_then(|()| input.flush());
        }
        Ok(())
    }

    fn build(&mut self, at: usize, job: usize, case: &Case, mapping: String) -> Result<(), Failure> {
        self.workers[at].state = State::Building { job, since: Instant::now() };
        self.ask(at, &Ask::Build { case: case.clone(), mapping })
    }

    fn time(&mut self, at: usize) -> Result<(), Failure> {
        if let State::Ready { job, seconds } = self.workers[at].state {
            self.workers[at].state = State::Timing { job, seconds, since: Instant::now() };
        }
        self.ask(at, &Ask::Time { budget_ms: self.limits.budget_ms })
    }

    fn hear(&mut self, at: usize, word: Option<String>, jobs: &mut impl Jobs) -> Result<(), Failure> {
        let state = self.workers[at].state;
        let Some(line) = word else {
            let ended = self.workers[at].child.wait().map(|s| s.to_string()).unwrap_or_default();
            self.silent += 1;
            if self.silent > 2 * self.workers.len() {
                return Err(Failure::Machine(format!("children end before they do anything ({ended})")));
            }
            self.replace(at)?;
            if let State::Building { job, .. } | State::Timing { job, .. } | State::Ready { job, .. } = state {
                jobs.done(job, Outcome::Failed(format!("its process ended ({ended})")));
            }
            return Ok(());
        };
        // Anything else is some library's.
        let Ok(answer) = serde_json::from_str::<Answer>(&line) else { return Ok(()) };
        self.silent = 0;
        let (job, seconds) = match state {
            State::Building { job, .. } => (job, 0.0),
            State::Timing { job, seconds, .. } => (job, seconds),
            State::Idle | State::Ready { .. } => return Ok(()),
        };
        self.workers[at].state = match (&answer, state) {
            (Answer::Built { seconds }, State::Building { .. }) => State::Ready { job, seconds: *seconds },
            _ => State::Idle,
        };
        match answer {
            Answer::Built { .. } => {}
            Answer::Timed(t) => jobs.done(job, Outcome::Timed(t, seconds)),
            Answer::Failed(e) => jobs.done(job, Outcome::Failed(e)),
            Answer::Wrong(e) => jobs.done(job, Outcome::Wrong(e)),
        }
        Ok(())
    }

    fn replace(&mut self, at: usize) -> Result<(), Failure> {
        // One that has just ended cannot be killed, which is as good.
        let _ = self.workers[at].child.kill();
        let _ = self.workers[at].child.wait();
        self.workers[at] = self.start(at)?;
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for w in &mut self.workers {
            w.input = None;
            let _ = w.child.kill();
            let _ = w.child.wait();
        }
    }
}
