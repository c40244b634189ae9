//! Cascades to code for given targets, ahead of time: what build scripts and `einfall compile` share.
//!
//! Invariant: the result is a function of the cascade, the targets and the [`Settings`]; this machine's processor and its
//! devices have no say.

use einfall_autotune::table::{Kind, Table};
use einfall_autotune::{model_cpu, model_gpu, tune};
use einfall_codegen::backend::llvm::{self, Isa};
use einfall_codegen::backend::{ptx, wgsl};
use einfall_codegen::pipeline::Context;
use einfall_codegen::tables;
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::cascade::Cascade;
use einfall_ir::target::DataSheet;
use einfall_runtime::Level;
use einfall_runtime::llvm::{Llvm, Passes, TargetOptions};

use super::assembler::Assembler;
use crate::lowering::{
    CompileOptions, Error, compile_ptx, compile_wgsl, gpu_plan, lower, plan, unmapped, unprintable, wgsl_plan,
    with_statics,
};

/// What code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Processors of a level.
    Cpu(Level),
    /// NVIDIA GPUs: PTX for `sm_80` (and every card since), or for `sm_90a` (Hopper alone).
    Cuda(&'static str),
    /// Any GPU behind WebGPU, browsers included: WGSL within the limits that every implementation has.
    Wgsl,
}

impl Target {
    /// Every target.
    pub const ALL: [Target; 8] = [
        Target::Cpu(Level::X86_64V3),
        Target::Cpu(Level::X86_64V4),
        Target::Cpu(Level::X86_64V4Bf16),
        Target::Cpu(Level::X86_64V4Amx),
        Target::Cpu(Level::Aarch64),
        Target::Cuda("sm_80"),
        Target::Cuda("sm_90a"),
        Target::Wgsl,
    ];

    /// Its name: `x86-64-v3`, `x86-64-v4`, `x86-64-v4-bf16`, `x86-64-v4-amx`, `aarch64`, `sm_80`, `sm_90a`, `wgsl`.
    pub fn name(self) -> &'static str {
        match self {
            Target::Cpu(level) => level.name(),
            Target::Cuda(arch) => arch,
            Target::Wgsl => "wgsl",
        }
    }

    /// Whether its code is made by LLVM.
    pub fn needs_llvm(self) -> bool {
        matches!(self, Target::Cpu(_))
    }

    /// The target of this name.
    pub fn from_name(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|t| t.name() == name)
    }
}

/// What is compiled besides the cascade.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Extents fixed at compile time, sizes to be fast at, a mapping.
    pub options: CompileOptions,
    /// Tables of measured mappings, whatever device of their kind they are of.
    pub tables: Vec<Table>,
    /// The triple that objects are made for; none: Linux with the GNU C library.
    pub triple: Option<String>,
    /// What the symbols of kernels begin with, so that crates of one program differ.
    pub prefix: String,
    /// What makes machine code of PTX; none: the driver does when a program loads it.
    pub assembler: Option<Assembler>,
}

/// The code of a cascade for one target.
#[derive(Clone, Debug)]
pub struct Piece {
    /// What it is for.
    pub target: Target,
    /// How to launch it: [`Code::Linked`] for processors, [`Code::Ptx`] and [`Code::Wgsl`] for GPUs.
    pub artifact: Artifact,
    /// The relocatable object with its functions, for processors.
    pub object: Option<Vec<u8>>,
    /// Machine code of its PTX, where there is an assembler.
    pub cubin: Option<Vec<u8>>,
}

/// A compiled cascade.
#[derive(Clone, Debug)]
pub struct Product {
    /// With the fixed extents.
    pub cascade: Cascade,
    /// One for each target.
    pub pieces: Vec<Piece>,
}

/// Compiles a cascade for every target; without LLVM for those that need none ([`Target::needs_llvm`]).
///
/// # Errors
/// [`Error::Refused`] where something has no lowering, [`Error::Size`] for a rank that is not there, [`Error::Runtime`]
/// where LLVM refuses, [`Error::Assembler`] where NVIDIA's assembler does, [`Error::Internal`] where a target needs LLVM and
/// none is given.
pub fn compile(
    cascade: &Cascade,
    targets: &[Target],
    settings: &Settings,
    llvm: Option<&Llvm>,
) -> Result<Product, Error> {
    let cascade = with_statics(cascade, &settings.options.statics)?;
    let pieces = targets.iter().map(|target| {
        let (artifact, object) = match target {
            Target::Cpu(level) => {
                let llvm = llvm.ok_or_else(|| Error::Internal(format!("{} needs LLVM", target.name())))?;
                let (artifact, object) = for_level(&cascade, *level, settings, llvm)?;
                (artifact, Some(object))
            }
            Target::Cuda(arch) => (for_gpu(&cascade, arch, settings)?, None),
            Target::Wgsl => (for_webgpu(&cascade, settings)?, None),
        };
        let cubin = match (&artifact.code, &settings.assembler) {
            (Code::Ptx { text, arch }, Some(a)) => Some(a.assemble(text, arch).map_err(Error::Assembler)?),
            (Code::Ptx { .. } | Code::LlvmIr(_) | Code::Object(_) | Code::Linked | Code::Wgsl { .. }, _) => None,
        };
        Ok(Piece { target: *target, artifact: artifact.with_formulas(&cascade), object, cubin })
    });
    let pieces = pieces.collect::<Result<_, Error>>()?;
    Ok(Product { pieces, cascade })
}

/// The tables of a kind, joined.
fn joined(tables: &[Table], kind: Kind) -> Result<Table, Error> {
    let mut all = Table::new(kind, "any");
    for table in tables.iter().filter(|t| t.kind == kind) {
        let table = Table { device: all.device.clone(), ..table.clone() };
        all.merge(table).map_err(|e| Error::Table(e.to_string()))?;
    }
    Ok(all)
}

fn for_level(cascade: &Cascade, level: Level, settings: &Settings, llvm: &Llvm) -> Result<(Artifact, Vec<u8>), Error> {
    let (isa, cpu, features) = match level {
        Level::X86_64V3 => (Isa::AVX2, level.name(), ""),
        Level::X86_64V4 => (Isa::AVX512, level.name(), "-prefer-256-bit"),
        Level::X86_64V4Bf16 => (Isa::DOTS, Level::X86_64V4.name(), "-prefer-256-bit,+avx512bf16"),
        Level::X86_64V4Amx => (Isa::AMX, Level::X86_64V4.name(), "-prefer-256-bit,+amx-tile,+amx-bf16"),
        Level::Aarch64 => (Isa::NEON, "generic", ""),
    };
    let plan = plan(cascade)?;
    let table = joined(&settings.tables, Kind::Cpu)?;
    let sheet = DataSheet::named(level.name()).filter(|s| !s.atoms.is_empty()).unwrap_or_else(DataSheet::cpu);
    // How many cores there will be is not known, so known sizes choose nothing.
    let mapping = settings.options.choose(&plan, &table, |_| model_cpu::choose(&plan, &sheet));
    let context = Context { mapping: Some(mapping), isa: Some(isa), ..Context::default() };
    let (mapped, mut module) = lower(tables::CPU, &plan, &context)?;
    // Symbols begin with the module's name.
    module.name = format!("{}_{}_{}", settings.prefix, cascade.name, level.name());
    let mut artifact = llvm::print(&mapped, &module, &isa, level.name()).map_err(unprintable)?;
    let Code::LlvmIr(text) = std::mem::replace(&mut artifact.code, Code::Linked) else {
        return Err(Error::Internal("the printer made no LLVM IR".to_owned()));
    };
    let triple = settings.triple.clone().unwrap_or_else(|| format!("{}-unknown-linux-gnu", level.arch()));
    let (cpu, features) = (cpu.to_owned(), features.to_owned());
    let object = llvm
        .compile(&text, &TargetOptions { triple, cpu, features, passes: Passes::Tidy })
        .map_err(einfall_runtime::Error::from)?;
    Ok((artifact, object.bytes().to_vec()))
}

fn for_gpu(cascade: &Cascade, arch: &str, settings: &Settings) -> Result<Artifact, Error> {
    let sheet = if arch == "sm_90a" { DataSheet::h100() } else { DataSheet::a100() };
    let Some(target) = ptx::Target::of(&sheet) else {
        return Err(Error::Internal(format!("`{}` is no GPU", sheet.name)));
    };
    let plan = gpu_plan(cascade)?;
    let table = joined(&settings.tables, Kind::Cuda)?;
    let model = |sizes: Option<&[u64]>| {
        let any = model_gpu::choose(&plan, &sheet, None);
        match sizes {
            Some(sizes) => tune::beside(model_gpu::choose(&plan, &sheet, Some(sizes)), any),
            None => any,
        }
    };
    let mapping = settings.options.choose(&plan, &table, model);
    let mut made = compile_ptx(&plan, &mapping, &target);
    if let (Err(Error::Refused { diagnostics, .. }), None) = (&mut made, &settings.options.mapping)
        && let Some(why) = unmapped(&plan, &sheet, None)
    {
        *diagnostics = vec![why];
    }
    made
}

fn for_webgpu(cascade: &Cascade, settings: &Settings) -> Result<Artifact, Error> {
    let sheet = DataSheet::named("webgpu").ok_or_else(|| Error::Internal("there is no sheet `webgpu`".to_owned()))?;
    let target = wgsl::Target::generic().tint();
    let plan = wgsl_plan(cascade, &target)?;
    // No table is of such a device.
    let none = Table::new(Kind::Cuda, &sheet.name);
    let mapping = settings.options.choose(&plan, &none, |sizes| model_gpu::choose(&plan, &sheet, sizes));
    compile_wgsl(&plan, &mapping, &target)
}
