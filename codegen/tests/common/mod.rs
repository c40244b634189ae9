//! Runs artifacts in this process: arrays packed to their types, canaries around them, tasks in chosen order.

use std::sync::OnceLock;

use einfall_codegen::backend::llvm::{self, Isa};
use einfall_codegen::lower::cpu::{self, NotLowered};
use einfall_codegen::passes::round_operands::round_operands;
use einfall_codegen::pipeline::{Context, Program};
use einfall_codegen::tables::{self, FORMS};
use einfall_ir::array::Array;
use einfall_ir::artifact::{Artifact, Code, Slot};
use einfall_ir::cascade::Cascade;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::Module;
use einfall_ir::tile::{AxisKind, BufferKind, Plan};
use einfall_ir::tolerance::poison;
use einfall_llvm::{Code as Linked, Host, Llvm, LoadOptions, Passes};

pub fn compiler() -> &'static (Llvm, Host) {
    static LLVM: OnceLock<(Llvm, Host)> = OnceLock::new();
    LLVM.get_or_init(|| {
        let path = std::env::var_os("EINFALL_TEST_LLVM").map(Into::into);
        let llvm = Llvm::load(&LoadOptions { path, ..LoadOptions::default() }).unwrap();
        let host = llvm.host();
        (llvm, host)
    })
}

/// The instruction sets this machine can run.
#[allow(dead_code)]
pub fn isas() -> Vec<Isa> {
    let host = &compiler().1;
    let best = Isa::of(&host.triple, &host.features);
    let mut all = vec![best];
    if best.vector_bytes == 64 {
        let others = [Isa::AMX, Isa::DOTS, Isa::AVX512, Isa::AVX2, Isa::SSE2];
        all.extend(others.into_iter().filter(|isa| *isa != best));
    }
    all
}

/// Tile registers and their instructions in memory, for processors without them. One thread at a time runs such code.
const TILES: &str = include_str!("tiles.ll");

/// Dot products of pairs by their definition, for processors without them.
const DOTS: &str = include_str!("dots.ll");

/// The plan of a cascade with these blocks, and 1 where none is named.
#[allow(dead_code)]
pub fn plan(c: &Cascade, blocks: &[(&str, u64)]) -> Plan {
    let context = Context::default();
    let made = tables::TO_TILE.iter().try_fold(Program::Cascade(c.clone()), |p, pass| (pass.step)(p, &context));
    let Ok(Program::Tile(mut plan)) = made else { panic!("no plan of {}", c.name) };
    for k in &mut plan.kernels {
        for (_, a) in k.axes.iter_mut().filter(|(_, a)| a.kind != AxisKind::Inner && a.block.is_none()) {
            a.block = Some(blocks.iter().find(|b| b.0 == a.name).map_or(1, |b| b.1));
        }
    }
    plan
}

/// A plan compiled and linked.
pub struct Compiled {
    pub artifact: Artifact,
    pub code: Linked,
}

pub fn compile(plan: &Plan, isa: &Isa) -> Result<Compiled, NotLowered> {
    let plan = &round_operands(plan.clone(), &isa.atoms());
    compile_lowered(plan, cpu::lower(plan, isa)?, isa)
}

/// As [`compile`], from what a plan was lowered to.
pub fn compile_lowered(plan: &Plan, module: Module, isa: &Isa) -> Result<Compiled, NotLowered> {
    let faults = (FORMS.verify)(&Program::Kernel(module.clone()));
    assert!(faults.is_empty(), "{faults:#?}\n{plan}");
    let mut artifact = llvm::print(plan, &module, isa, "cpu")?;
    let Code::LlvmIr(text) = &mut artifact.code else { panic!("no text") };
    let (llvm, host) = compiler();
    if text.contains("@llvm.x86.tile") && !Isa::of(&host.triple, &host.features).amx {
        let own = text.lines().filter(|l| !l.starts_with("declare void @llvm.x86.t") && !l.contains("ldtilecfg"));
        *text = own.collect::<Vec<_>>().join("\n").replace("@llvm.x86.t", "@emulated.t") + "\n" + TILES;
    }
    if text.contains("@llvm.x86.avx512bf16") && !host.has("avx512bf16") {
        let own = text.lines().filter(|l| !(l.starts_with("declare") && l.contains("@llvm.x86.avx512bf16")));
        *text = own.collect::<Vec<_>>().join("\n").replace("@llvm.x86.avx512bf16", "@emulated") + "\n" + DOTS;
    }
    let object = llvm.compile(text, &host.options(Passes::Tidy)).unwrap_or_else(|e| panic!("{e}\n{plan}\n{text}"));
    let code = llvm.link(&object).unwrap();
    Ok(Compiled { artifact, code })
}

/// Bytes of canary before and after every array.
const GUARD: usize = 256;
const CANARY: u8 = 0xa5;

/// An array in memory with canaries around it.
struct Memory {
    bytes: Vec<u8>,
    dtype: DType,
    start: usize,
    len: usize,
}

/// The number that an 8-bit float's code stands for, by the definition of the type.
fn small(dtype: DType, code: u8) -> f64 {
    let (mantissa, bias) = if dtype == DType::F8E4M3 { (3, 7) } else { (2, 15) };
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (e, m) = (i32::from((code & 0x7f) >> mantissa), f64::from(code & ((1 << mantissa) - 1)));
    let m = m / f64::from(1 << mantissa);
    match (dtype, e) {
        (DType::F8E4M3, 15) if m == 0.875 => f64::NAN,
        (DType::F8E5M2, 31) if m == 0.0 => sign * f64::INFINITY,
        (DType::F8E5M2, 31) => f64::NAN,
        (_, 0) => sign * m * 2f64.powi(1 - bias),
        _ => sign * (1.0 + m) * 2f64.powi(e - bias),
    }
}

fn put(dtype: DType, x: f64, to: &mut [u8]) {
    match dtype {
        DType::F64 => to.copy_from_slice(&x.to_le_bytes()),
        DType::F32 | DType::Tf32 => to.copy_from_slice(&(x as f32).to_le_bytes()),
        DType::BF16 => to.copy_from_slice(&half::bf16::from_f64(x).to_bits().to_le_bytes()),
        DType::F16 => to.copy_from_slice(&half::f16::from_f64(x).to_bits().to_le_bytes()),
        DType::I64 => to.copy_from_slice(&(x as i64).to_le_bytes()),
        DType::I32 => to.copy_from_slice(&(x as i32).to_le_bytes()),
        DType::I8 => to.copy_from_slice(&(x as i8).to_le_bytes()),
        DType::U8 | DType::Bool => to.copy_from_slice(&(x as u8).to_le_bytes()),
        DType::F8E4M3 | DType::F8E5M2 => {
            let same = |y: f64| y == x && y.is_sign_negative() == x.is_sign_negative() || y.is_nan() && x.is_nan();
            to[0] = (0..=255).find(|code| same(small(dtype, *code))).unwrap_or_else(|| panic!("{x} is no {dtype}"));
        }
        DType::I4 | DType::U4 => panic!("{dtype} in memory"),
    }
}

fn get(dtype: DType, b: &[u8]) -> f64 {
    match dtype {
        DType::F64 => f64::from_le_bytes(b.try_into().unwrap()),
        DType::F32 | DType::Tf32 => f32::from_le_bytes(b.try_into().unwrap()) as f64,
        DType::BF16 => half::bf16::from_bits(u16::from_le_bytes(b.try_into().unwrap())).to_f64(),
        DType::F16 => half::f16::from_bits(u16::from_le_bytes(b.try_into().unwrap())).to_f64(),
        DType::I64 => i64::from_le_bytes(b.try_into().unwrap()) as f64,
        DType::I32 => f64::from(i32::from_le_bytes(b.try_into().unwrap())),
        DType::I8 => f64::from(b[0] as i8),
        DType::U8 | DType::Bool => f64::from(b[0]),
        DType::F8E4M3 | DType::F8E5M2 => small(dtype, b[0]),
        DType::I4 | DType::U4 => panic!("{dtype} in memory"),
    }
}

impl Memory {
    fn new(dtype: DType, len: usize, value: impl Fn(usize) -> f64) -> Memory {
        let size = dtype.bits() as usize / 8;
        let mut bytes = vec![CANARY; len * size + 2 * GUARD + 64];
        // An odd element offset: nothing may rely on more than element alignment.
        let start = GUARD + (64 - (bytes.as_ptr() as usize + GUARD) % 64) + size;
        for i in 0..len {
            put(dtype, value(i), &mut bytes[start + i * size..start + (i + 1) * size]);
        }
        Memory { bytes, dtype, start, len }
    }

    fn values(&self) -> Vec<f64> {
        let size = self.dtype.bits() as usize / 8;
        (0..self.len)
            .map(|i| get(self.dtype, &self.bytes[self.start + i * size..self.start + (i + 1) * size]))
            .collect()
    }

    fn intact(&self) -> bool {
        let end = self.start + self.len * self.dtype.bits() as usize / 8;
        self.bytes[..self.start].iter().chain(&self.bytes[end..]).all(|b| *b == CANARY)
    }
}

type Kernel = unsafe extern "C" fn(*const u64, i64, i64, *mut u8);

/// How the tasks of a launch are given out.
#[derive(Clone, Copy)]
#[allow(dead_code)]
pub enum Split {
    /// One call.
    Whole,
    /// One call per task, last task first (of a round, where tasks are ordered), each with scratch full of NaN.
    Each,
}

/// Runs the launches and returns outputs and inouts in order.
pub fn run(c: &Compiled, ranks: &[u64], inputs: &[Array], split: Split) -> Vec<Array> {
    let mut given = inputs.iter();
    let mut memory = Vec::new();
    for (_, b) in c.artifact.buffers.iter() {
        let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
        let n = dims.iter().product::<u64>() as usize;
        let input = matches!(b.kind, BufferKind::Input | BufferKind::InOut).then(|| given.next().unwrap());
        let m = match input {
            Some(a) => {
                assert_eq!(a.dims, dims, "{}", b.name);
                Memory::new(b.dtype, n, |i| a.data[i])
            }
            None => Memory::new(b.dtype, n, |_| poison(b.dtype)),
        };
        memory.push((m, dims));
    }
    use einfall_ir::arena::Id;
    for l in &c.artifact.launches {
        let slots: Vec<u64> = l
            .slots
            .iter()
            .map(|s| match s {
                Slot::Base(b) => {
                    let m = &mut memory[b.index()].0;
                    m.bytes[m.start..].as_mut_ptr() as u64
                }
                Slot::Stride(b, d) => memory[b.index()].1[d + 1..].iter().product(),
                Slot::Scalar(b) => Slot::scalar_bits(memory[b.index()].0.dtype, memory[b.index()].0.values()[0]),
                Slot::Extent(r) => ranks[r.index()],
            })
            .collect();
        let grid: Vec<u64> = l.grid.iter().map(|g| g.eval(ranks).unwrap()).collect();
        let tasks: u64 = grid.iter().product();
        let round = if l.ordered { grid[1..].iter().product() } else { tasks }.max(1);
        let bytes = l.scratch_bytes.eval(ranks).unwrap() as usize;
        // SAFETY: the symbol has the CPU convention's signature.
        let f: Kernel = unsafe { std::mem::transmute(c.code.symbol(&l.symbol).unwrap()) };
        let mut scratch = vec![f32::NAN; bytes / 4 + 64];
        let calls: Vec<(i64, i64)> = match split {
            Split::Whole => vec![(0, tasks as i64)],
            Split::Each => {
                let rounds = (0..tasks).step_by(round as usize);
                rounds.flat_map(|r| (r..r + round).rev()).map(|t| (t as i64, t as i64 + 1)).collect()
            }
        };
        for (first, end) in calls {
            scratch.fill(f32::NAN);
            let place = scratch.as_mut_ptr() as usize;
            let place = (place + 63) & !63;
            let after = (place - scratch.as_ptr() as usize) / 4 + bytes.div_ceil(4);
            // SAFETY: slots as the artifact asks for, and scratch of the size it names.
            unsafe { f(slots.as_ptr(), first, end, place as *mut u8) };
            assert!(scratch[after..].iter().all(|x| x.is_nan()), "{} writes past its scratch", l.symbol);
        }
    }
    let mut outs = Vec::new();
    for ((_, b), (m, dims)) in c.artifact.buffers.iter().zip(memory) {
        assert!(m.intact(), "{}: bytes around {} changed", c.artifact.name, b.name);
        if matches!(b.kind, BufferKind::Output | BufferKind::InOut) {
            outs.push(Array { dtype: b.dtype, dims, data: m.values() });
        }
    }
    outs
}
