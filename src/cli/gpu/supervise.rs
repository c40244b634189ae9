//! Work items in a process that may fail or hang: a kernel that does takes its process, not the rest of the list.
//!
//! The parent runs this program again with its arguments and `--worker N`; the child does items from
//! N on and says before and after each on a line of its own. A child that ends early or says nothing for too long loses
//! its item; the next one starts after it. Invariant: every item is counted once.

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

/// Does items from `first` on, every `step`-th of `n`, as the child.
pub fn work(first: usize, step: usize, n: usize, mut item: impl FnMut(usize) -> Tally) {
    for i in (first..n).step_by(step.max(1)) {
        println!("{BEGIN}{i}");
        let t = item(i);
        println!("{END}{i} {} {} {}", t.passed, t.failed, t.skipped);
        let _ = std::io::stdout().flush();
    }
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
        let mut said = false;
        let lost = loop {
            match receive.recv_timeout(silence) {
                Ok(line) => match (line.strip_prefix(BEGIN), line.strip_prefix(END).and_then(parse)) {
                    (Some(i), _) => {
                        said = true;
                        next = i.trim().parse().unwrap_or(next);
                    }
                    (None, Some((i, t))) => {
                        tally.add(t);
                        next = i + step;
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
            println!("FAIL item {next}: {why}");
            tally.add(Tally { failed: 1, ..Tally::default() });
            next += step;
        }
        if !said {
            mute += 1;
            if mute == 3 {
                return Err(Failure::Machine("three children in a row did nothing".to_owned()));
            }
        } else {
            mute = 0;
        }
    }
    Ok(tally)
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
    }
}
