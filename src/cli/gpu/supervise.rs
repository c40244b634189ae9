//! Work items in a process that may fail or hang: a kernel that does takes its process, not the rest of the list.
//!
//! The parent runs this program again with its arguments and `--worker N`; the child does items from N on, says before
//! and after each on a line of its own, and says that it lives whenever a part of one is done. A child that ends early
//! or says nothing for too long loses its item; the next one starts after it. Invariant: every item is counted once.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::super::Failure;

/// What came of some work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Comparisons that agreed.
    pub passed: u64,
    /// That did not.
    pub failed: u64,
    /// Left out, with a reason printed.
    pub skipped: u64,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// First characters of the lines between child and parent.
const BEGIN: &str = "@begin ";
const END: &str = "@end ";
const ALIVE: &str = "@alive";

/// Does items from `first` on, every `step`-th of `n`, as the child.
pub fn work<'a>(
    first: usize,
    step: usize,
    n: usize,
    name: impl Fn(usize) -> &'a str,
    mut item: impl FnMut(usize) -> Tally,
) {
    for i in (first..n).step_by(step.max(1)) {
        println!("{BEGIN}{i} {}", name(i));
        let t = item(i);
        println!("{END}{i} {} {} {}", t.passed, t.failed, t.skipped);
        let _ = std::io::stdout().flush();
    }
}

/// Says, as the child, that a part of an item is done: a long one is not taken for one that hangs.
pub fn alive() {
    println!("{ALIVE}");
}

/// Has `n` items done by `jobs` children of this program at a time, given `arguments`, `--worker N` and `--step JOBS`;
/// prints what they print. `silence`: how long a child may say nothing.
pub fn supervise(arguments: &[String], n: usize, jobs: usize, silence: Duration) -> Result<Tally, Failure> {
    let jobs = jobs.clamp(1, n.max(1));
    let parts: Vec<Result<Tally, Failure>> = std::thread::scope(|scope| {
        let start = |job| scope.spawn(move || share(arguments, n, job, jobs, silence));
        let threads: Vec<_> = (0..jobs).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut tally = Tally::default();
    for part in parts {
        tally.add(part?);
    }
    Ok(tally)
}

/// Items `first`, `first + step`, … below `n`.
fn share(arguments: &[String], n: usize, first: usize, step: usize, silence: Duration) -> Result<Tally, Failure> {
    let program = std::env::current_exe().map_err(Failure::machine)?;
    let (mut tally, mut next, mut mute) = (Tally::default(), first, 0);
    while next < n {
        let mut child = Command::new(&program)
            .args(arguments)
            .args(["--worker", &next.to_string(), "--step", &step.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Failure::machine)?;
        let (send, receive) = channel();
        let stdout = child.stdout.take().ok_or_else(|| Failure::Machine("no output of a child".to_owned()))?;
        let reader = std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).all(|line| send.send(line).is_ok());
        });
        let (mut said, mut name) = (false, String::new());
        let lost = loop {
            match receive.recv_timeout(silence) {
                Ok(line) if line == ALIVE => {}
                Ok(line) => match (line.strip_prefix(BEGIN).and_then(begun), line.strip_prefix(END).and_then(parse)) {
                    (Some((i, what)), _) => {
                        said = true;
                        next = i;
                        name = what.to_owned();
                    }
                    (None, Some((i, t))) => {
                        tally.add(t);
                        next = i + step;
                        name.clear();
                    }
                    (None, None) => println!("{line}"),
                },
                Err(RecvTimeoutError::Disconnected) => break None,
                Err(RecvTimeoutError::Timeout) => break Some(format!("nothing for {} s", silence.as_secs())),
            }
        };
        if lost.is_some() {
            // One that has just ended cannot be killed, which is as good.
            let _ = child.kill();
        }
        let status = child.wait().map_err(Failure::machine)?;
        drop(receive);
        let _ = reader.join();
        if next < n {
            let why = lost.unwrap_or_else(|| format!("its process ended ({status})"));
            let item = if name.is_empty() { format!("item {next}") } else { name };
            println!("FAIL {item}: {why}");
            tally.add(Tally { failed: 1, ..Tally::default() });
            next += step;
        }
        if !said {
            mute += 1;
            if mute == 3 {
                let why = "three processes in a row ended or hung before their first item; what they said is above";
                return Err(Failure::Machine(why.to_owned()));
            }
        } else {
            mute = 0;
        }
    }
    Ok(tally)
}

/// `I NAME`.
fn begun(text: &str) -> Option<(usize, &str)> {
    let (i, name) = text.split_once(' ')?;
    Some((i.parse().ok()?, name))
}

/// `I PASSED FAILED SKIPPED`.
fn parse(text: &str) -> Option<(usize, Tally)> {
    let mut fields = text.split_whitespace();
    let i = fields.next()?.parse().ok()?;
    let mut number = || fields.next()?.parse().ok();
    Some((i, Tally { passed: number()?, failed: number()?, skipped: number()? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read_back() {
        assert_eq!(parse("7 3 1 2"), Some((7, Tally { passed: 3, failed: 1, skipped: 2 })));
        assert_eq!(parse("7 3 1"), None);
        assert_eq!(begun("7 a plan by a mapping"), Some((7, "a plan by a mapping")));
        assert_eq!(begun("a line of somebody's"), None);
    }

    #[test]
    fn shares_are_every_item_once() {
        for (n, jobs) in [(10, 3), (3, 3), (1, 1), (7, 1)] {
            let mut seen = vec![0; n];
            for job in 0..jobs {
                work(
                    job,
                    jobs,
                    n,
                    |_| "item",
                    |i| {
                        seen[i] += 1;
                        Tally::default()
                    },
                );
            }
            assert_eq!(seen, vec![1; n]);
        }
    }
}
