//! Several mappings of one cascade, of which cubecl's tuner keeps the fastest at each sizes.
//!
//! A tunable launches its program on a measured call and answers which program it is; the launch that was asked for is
//! made once, by the program so found. Invariant: what a measured launch writes is nobody's: outputs and arrays updated
//! in place are stand-ins.

use std::sync::Arc;

use cubecl::tune::{AutotuneOutput, LocalTuner, Tunable, TunableSet};
use einfall::CompileOptions;
use einfall::ir::cascade::Cascade;
use einfall::ir::tile::BufferKind;

use crate::program::{Call, Program, adapter};
use crate::{Array, Client, Error};

/// What cubecl found, by device and then by cascade, mappings and sizes.
static TUNER: LocalTuner<String, String> = LocalTuner::new("einfall");

/// A call to be measured, or one that asks which program to take.
#[derive(Clone, Debug)]
struct Trial {
    call: Call,
    measured: bool,
}

/// Which of the programs ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pick(usize);

impl AutotuneOutput for Pick {}

/// A cascade compiled by several mappings, which serve the same sizes.
pub struct Tuned {
    programs: Vec<Arc<Program>>,
    set: Arc<TunableSet<String, Trial, Pick>>,
    device: String,
}

impl std::fmt::Debug for Tuned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tuned").field("programs", &self.programs).field("device", &self.device).finish()
    }
}

impl Tuned {
    /// Compiles a cascade by the `k` mappings that the model finds cheapest at the sizes of `options`.
    ///
    /// # Errors
    /// As [`Program::compile`]; [`Error::Compile`] where a rank has no size.
    pub fn compile(client: &Client, cascade: &Cascade, options: &CompileOptions, k: usize) -> Result<Tuned, Error> {
        let sheet = einfall::shaders::data_sheet(&adapter(client));
        let made = einfall::shaders::candidates(cascade, &sheet, options, k)?;
        // SAFETY: the artifacts were made by code generation a line above.
        let load = |(mapping, artifact)| Ok((format!("{mapping}"), unsafe { Program::load(client, artifact)? }));
        Tuned::new(made.into_iter().map(load).collect::<Result<_, Error>>()?)
    }

    /// Of programs of one cascade on one client, each with a text that no other program of that cascade has.
    ///
    /// # Errors
    /// [`Error::Nothing`] where there is none.
    pub fn new(programs: Vec<(String, Program)>) -> Result<Tuned, Error> {
        let Some((_, first)) = programs.first() else {
            return Err(Error::Nothing);
        };
        let device = adapter(first.client()).name;
        let cascade = first.name().to_owned();
        let (texts, programs): (Vec<String>, Vec<Arc<Program>>) =
            programs.into_iter().map(|(text, p)| (text, Arc::new(p))).unzip();
        let all = texts.join("\n");
        let key = move |trial: &Trial| format!("{cascade} {:016x}{}", digest(&all), sizes(&trial.call));
        let reference = Arc::clone(&programs[0]);
        let stand_ins =
            move |_: &String, trial: &Trial| Trial { call: measured(&reference, &trial.call), measured: true };
        let mut set = TunableSet::new(key, stand_ins);
        for (i, (text, program)) in texts.iter().zip(&programs).enumerate() {
            let program = Arc::clone(program);
            // cubecl forgets what it measured where the names of tunables change.
            set = set.with(Tunable::new(&format!("{i} {:016x}", digest(text)), move |trial: Trial| {
                if trial.measured {
                    program.measure(trial.call).map_err(|e| e.to_string())?;
                }
                Ok::<Pick, String>(Pick(i))
            }));
        }
        Ok(Tuned { programs, set: Arc::new(set), device })
    }

    /// The programs, in the order given.
    pub fn programs(&self) -> &[Arc<Program>] {
        &self.programs
    }

    /// Which program a call takes; measured where cubecl has not measured these sizes before.
    ///
    /// # Errors
    /// As [`Program::launch`].
    pub fn pick(&self, call: &Call) -> Result<usize, Error> {
        let first = &self.programs[0];
        first.check(measured(first, call))?;
        let trial = Trial { call: call.clone(), measured: false };
        let Pick(i) = TUNER.execute::<Trial, Pick, ()>(&self.device, first.client(), Arc::clone(&self.set), trial);
        Ok(i)
    }

    /// Launches the fastest program.
    ///
    /// # Errors
    /// As [`Program::launch`].
    pub fn launch(&self, call: Call) -> Result<Vec<(String, Array)>, Error> {
        self.programs[self.pick(&call)?].launch(call)
    }
}

/// The call with arrays of its own for everything that a launch writes. What does not fit stays, and is refused by the
/// launch.
fn measured(program: &Program, call: &Call) -> Call {
    let mut call = Call { outputs: Vec::new(), ..call.clone() };
    let Ok(bound) = program.bind(&call) else { return call };
    let updated: Vec<&str> = bound.arrays().filter(|s| s.kind == BufferKind::InOut).map(|s| s.name).collect();
    for (name, array) in &mut call.arrays {
        if updated.contains(&name.as_str()) {
            *array = array.stand_in(program.client());
        }
    }
    call
}

/// The shapes, strides and sizes of a call, as text.
fn sizes(call: &Call) -> String {
    let arrays = call.arrays.iter().map(|(n, a)| format!(" {n}{:?}{:?}", a.shape, a.strides));
    let ranks = call.sizes.iter().map(|(n, v)| format!(" {n}={v}"));
    arrays.chain(ranks).collect()
}

/// FNV-1a: the same in every process, since cubecl may keep what it measured in a file.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
