//! The pipeline as data: named passes in order, and the runner that verifies, times and records each.
//!
//! A pass is a pure function from a program to a program at its level, or to the next level. The runner verifies what
//! every pass made (a refusal names the pass: it is our fault, not the user's), keeps the text after it for
//! `--stop-after` and traces, and says "(unchanged)" where the text did not move. [`bisect`] evaluates every recorded
//! program and names the first whose results leave the bound. Invariant: nothing here knows what a pass does; the
//! tables do ([`Pass::why`] says why each stands where it does).

use std::fmt;
use std::time::{Duration, Instant};

use einfall_ir::analysis::resources::Limits;
use einfall_ir::cascade::Cascade;
use einfall_ir::diag::Diagnostic;
use einfall_ir::kernel::atoms::Atom;
use einfall_ir::mapping::Mapping;
use einfall_ir::{kernel, tile};

use crate::backend::llvm::Isa;

/// The three levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What is computed.
    Cascade,
    /// Streams over tiles.
    Tile,
    /// Structured code near the target.
    Kernel,
}

impl Level {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Level::Cascade => "cascade",
            Level::Tile => "tile",
            Level::Kernel => "kernel",
        }
    }
}

/// A program on its way down.
#[derive(Clone, Debug, PartialEq)]
pub enum Program {
    /// At the cascade level.
    Cascade(Cascade),
    /// At the tile level.
    Tile(tile::Plan),
    /// At the kernel level.
    Kernel(kernel::Module),
}

impl Program {
    /// The level it is at.
    pub fn level(&self) -> Level {
        match self {
            Program::Cascade(_) => Level::Cascade,
            Program::Tile(_) => Level::Tile,
            Program::Kernel(_) => Level::Kernel,
        }
    }
}

/// What passes may read besides the program.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context {
    /// The contraction instructions of the device that the program is lowered for; none where contractions are made of
    /// scalar operations.
    pub atoms: Vec<Atom>,
    /// Arrays that a kernel of the device may have; none: as many as it likes.
    pub arrays: Option<usize>,
    /// The mapping, once there is one.
    pub mapping: Option<Mapping>,
    /// Vector facts of the core, when lowering to a CPU.
    pub isa: Option<Isa>,
    /// What a task on the GPU that is lowered for may take; none: what the built-in sheet that the mapping names says.
    pub limits: Option<Limits>,
}

/// One pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// `verb-noun`, the name of its module.
    pub name: &'static str,
    /// The level it reads.
    pub level: Level,
    /// What it does.
    pub step: fn(Program, &Context) -> Result<Program, Vec<Diagnostic>>,
    /// Why it stands where it does.
    pub why: &'static str,
}

impl Pass {
    /// Runs it, and tells the log how long it took.
    ///
    /// # Errors
    /// What it refuses.
    pub fn apply(&self, program: Program, context: &Context) -> Result<Program, Vec<Diagnostic>> {
        let start = Instant::now();
        let made = (self.step)(program, context);
        tracing::debug!(pass = self.name, time = ?start.elapsed(), refuses = made.is_err(), "pass");
        made
    }
}

/// How programs print and are verified: one function per task, so that the runner needs no level of its own.
#[derive(Clone, Copy, Debug)]
pub struct Forms {
    /// Its text.
    pub print: fn(&Program) -> String,
    /// Its faults, one line each.
    pub verify: fn(&Program) -> Vec<String>,
}

/// What one pass did.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The pass.
    pub name: &'static str,
    /// The level it left the program at.
    pub level: Level,
    /// The program after it.
    pub program: Program,
    /// Its text.
    pub text: String,
    /// Whether the text is as before.
    pub unchanged: bool,
    /// How long it took.
    pub time: Duration,
}

/// Why a pipeline stopped.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Stop {
    /// A pass refuses the program or the mapping: an expected rejection.
    Refused {
        /// The pass.
        pass: &'static str,
        /// What it says.
        diagnostics: Vec<Diagnostic>,
    },
    /// What a pass made does not verify: a fault of the pass.
    Invalid {
        /// The pass; `input` for the program given.
        pass: &'static str,
        /// The verifier's messages.
        faults: Vec<String>,
        /// The program's text.
        text: String,
    },
    /// The passes do not fit together: one reads another level than the one before it left.
    Level {
        /// The pass.
        pass: &'static str,
        /// The level of the program.
        found: Level,
    },
    /// There is no pass of this name.
    NoSuchPass {
        /// The name asked for.
        name: String,
    },
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Refused { pass, diagnostics } => {
                write!(f, "{pass} refuses:")?;
                diagnostics.iter().try_for_each(|d| write!(f, "\n  {d}"))
            }
            Stop::Invalid { pass, faults, .. } => {
                write!(f, "{pass} made a program that does not verify (a fault of the compiler):")?;
                faults.iter().try_for_each(|m| write!(f, "\n  {m}"))
            }
            Stop::Level { pass, found } => write!(f, "{pass} does not read the {} level", found.name()),
            Stop::NoSuchPass { name } => write!(f, "there is no pass named {name}"),
        }
    }
}

impl std::error::Error for Stop {}

/// Runs `passes` on `program`, up to and including `stop_after` if given.
///
/// ```
/// use einfall_codegen::pipeline::{Context, Program, run};
/// use einfall_codegen::tables::{FORMS, TO_TILE};
///
/// let text = "cascade c[M](x: f32[M]) -> (y: f32[M]) { y[m] = 2.0 * x[m] }";
/// let c = einfall_ir::cascade::parse(text).expect("it is right").cascades.remove(0);
/// let records = run(TO_TILE, FORMS, Program::Cascade(c), &Context::default(), None).map_err(|(_, stop)| stop)?;
/// assert!(records.last().is_some_and(|r| r.text.starts_with("plan c[M]")));
/// # Ok::<(), einfall_codegen::pipeline::Stop>(())
/// ```
///
/// # Errors
/// See [`Stop`]; the records up to there come along.
pub fn run(
    passes: &[Pass],
    forms: Forms,
    program: Program,
    context: &Context,
    stop_after: Option<&str>,
) -> Result<Vec<Record>, (Vec<Record>, Stop)> {
    let mut records: Vec<Record> = Vec::new();
    if let Some(name) = stop_after
        && !passes.iter().any(|p| p.name == name)
    {
        return Err((records, Stop::NoSuchPass { name: name.to_string() }));
    }
    let mut text = (forms.print)(&program);
    let faults = (forms.verify)(&program);
    if !faults.is_empty() {
        return Err((records, Stop::Invalid { pass: "input", faults, text }));
    }
    let mut present = program;
    for pass in passes {
        if pass.level != present.level() {
            let found = present.level();
            return Err((records, Stop::Level { pass: pass.name, found }));
        }
        let start = Instant::now();
        present = match pass.apply(present, context) {
            Ok(p) => p,
            Err(diagnostics) => return Err((records, Stop::Refused { pass: pass.name, diagnostics })),
        };
        let time = start.elapsed();
        let after = (forms.print)(&present);
        let unchanged = after == text;
        text = after;
        let faults = (forms.verify)(&present);
        if !faults.is_empty() {
            return Err((records, Stop::Invalid { pass: pass.name, faults, text }));
        }
        let program = present.clone();
        records.push(Record { name: pass.name, level: present.level(), program, text: text.clone(), unchanged, time });
        if stop_after == Some(pass.name) {
            break;
        }
    }
    Ok(records)
}

/// The table `einfall passes` prints: name, level and reason of each pass, in order.
pub fn table(passes: &[Pass]) -> String {
    let width = passes.iter().map(|p| p.name.len()).max().unwrap_or(0);
    passes.iter().map(|p| format!("{:width$}  {:7}  {}\n", p.name, p.level.name(), p.why)).collect()
}

/// The records as a trace: the text after each pass, or that it is unchanged, with its time.
pub fn trace(records: &[Record]) -> String {
    records
        .iter()
        .map(|r| {
            let head = format!("==== {} ({}, {:.1?})", r.name, r.level.name(), r.time);
            if r.unchanged { format!("{head} (unchanged)\n") } else { format!("{head}\n{}", r.text) }
        })
        .collect()
}

/// What evaluation says about one recorded program.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Its results stay within the bound.
    Within,
    /// They leave it, or evaluation fails: what is known.
    Outside(String),
}

/// The first record whose program `judge` puts outside the bound, with what it says; none when all are within.
pub fn bisect(records: &[Record], mut judge: impl FnMut(&Program) -> Verdict) -> Option<(&Record, String)> {
    records.iter().find_map(|r| match if r.unchanged { Verdict::Within } else { judge(&r.program) } {
        Verdict::Within => None,
        Verdict::Outside(what) => Some((r, what)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEMM: &str = include_str!("../../tests/plans/gemm.tile");

    fn plan(p: Program) -> tile::Plan {
        match p {
            Program::Tile(plan) => plan,
            Program::Cascade(_) | Program::Kernel(_) => panic!("a tile program"),
        }
    }

    fn nothing(p: Program, _: &Context) -> Result<Program, Vec<Diagnostic>> {
        Ok(p)
    }

    fn rename(p: Program, _: &Context) -> Result<Program, Vec<Diagnostic>> {
        let mut plan = plan(p);
        plan.name.push('2');
        Ok(Program::Tile(plan))
    }

    fn double(p: Program, _: &Context) -> Result<Program, Vec<Diagnostic>> {
        let text = plan(p).to_string().replace("= c over", "= c + c over");
        Ok(Program::Tile(tile::parse::parse(&text).unwrap()))
    }

    fn forget(p: Program, _: &Context) -> Result<Program, Vec<Diagnostic>> {
        let mut plan = plan(p);
        plan.kernels[0].body.remove(0);
        Ok(Program::Tile(plan))
    }

    fn print(p: &Program) -> String {
        plan(p.clone()).to_string()
    }

    fn verify(p: &Program) -> Vec<String> {
        tile::verify::verify(&plan(p.clone())).err().into_iter().flatten().map(|f| f.to_string()).collect()
    }

    const FORMS: Forms = Forms { print, verify };

    fn pass(name: &'static str, step: fn(Program, &Context) -> Result<Program, Vec<Diagnostic>>) -> Pass {
        Pass { name, level: Level::Tile, step, why: "a test" }
    }

    fn gemm() -> Program {
        Program::Tile(tile::parse::parse(GEMM).unwrap())
    }

    #[test]
    fn records_texts_and_stops_where_asked() {
        let passes = [pass("do-nothing", nothing), pass("rename-plan", rename), pass("double-result", double)];
        let records = run(&passes, FORMS, gemm(), &Context::default(), Some("rename-plan")).unwrap();
        let seen: Vec<_> = records.iter().map(|r| (r.name, r.unchanged)).collect();
        assert_eq!(seen, [("do-nothing", true), ("rename-plan", false)]);
        let trace = trace(&records);
        assert!(trace.contains("(unchanged)") && trace.contains("plan gemm2["), "{trace}");
        assert!(table(&passes).starts_with("do-nothing     tile     a test\n"));
        let (_, stop) = run(&passes, FORMS, gemm(), &Context::default(), Some("x")).unwrap_err();
        assert_eq!(stop, Stop::NoSuchPass { name: "x".into() });
    }

    #[test]
    fn an_invalid_result_names_the_pass() {
        let passes = [pass("do-nothing", nothing), pass("forget-start", forget)];
        let (records, stop) = run(&passes, FORMS, gemm(), &Context::default(), None).unwrap_err();
        assert_eq!(records.len(), 1);
        assert!(stop.to_string().contains("forget-start") && stop.to_string().contains("tile c is read before"));
        let mut wrong = passes[0];
        wrong.level = Level::Kernel;
        let (_, stop) = run(&[wrong], FORMS, gemm(), &Context::default(), None).unwrap_err();
        assert_eq!(stop, Stop::Level { pass: "do-nothing", found: Level::Tile });
    }

    #[test]
    fn bisection_names_the_first_wrong_pass() {
        use einfall_ir::array::Array;
        use einfall_ir::dtype::DType;
        let passes = [pass("rename-plan", rename), pass("double-result", double), pass("do-nothing", nothing)];
        let records = run(&passes, FORMS, gemm(), &Context::default(), None).unwrap();
        let inputs = [[4, 3], [3, 5]].map(|d| Array::from_fn(DType::BF16, &d, |i| i as f64));
        let result = |p: &tile::Plan| tile::eval::run(p, &[4, 5, 3], &inputs, &Default::default()).unwrap();
        let want = result(&plan(gemm()));
        let judge = |p: &Program| {
            if result(&plan(p.clone())) == want { Verdict::Within } else { Verdict::Outside("differs".into()) }
        };
        let (record, what) = bisect(&records, judge).unwrap();
        assert_eq!((record.name, what.as_str()), ("double-result", "differs"));
        assert!(bisect(&records[..1], judge).is_none());
    }
}
