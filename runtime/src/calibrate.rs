//! Measuring this processor: peak multiply-add rate and read bandwidth per memory level.
//!
//! Two generated kernels run on all threads at once: independent chains of vector multiply-adds, and sums over a
//! working set that fits the level. Each figure is the best of several runs, as others may use the machine.

use crate::array::HostArray;
use crate::device::Cpu;
use crate::engine::Engine;
use crate::error::Error;
use einfall_ir::arena::Arena;
use einfall_ir::artifact::{Artifact, Code, Launch, Slot};
use einfall_ir::cascade::{Rank, RankId, Size};
use einfall_ir::diag::Span;
use einfall_ir::dtype::DType;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{Buffer, BufferId, BufferKind};
use std::fmt::Write;

/// Independent chains: above latency × throughput of the multiply-add of current cores (4 × 2), within 16 registers.
const CHAINS: usize = 12;
/// Runs of which the best counts.
const RUNS: usize = 8;
/// Multiply-adds of one chain in a run: a millisecond or more, so that waking the threads does not count.
const CHAIN_STEPS: u64 = 1 << 20;
/// Bytes that a thread reads in a run, again and again where the level is smaller.
const READ_BYTES: u64 = 256 << 20;

impl Engine {
    /// This processor's data sheet, measured. Takes some 300 ms on an idle machine.
    ///
    /// # Errors
    /// As [`Engine::load`] and [`crate::Bound::launch`].
    pub fn measure(&self) -> Result<DataSheet, Error> {
        let cpu = Cpu::detect();
        let lanes = u64::from(cpu.vector_bits() / 32);
        let threads = self.threads() as u64;
        // SAFETY: the kernel below reads `x[0 .. CHAINS * lanes]` and task t writes `out[t, 0 .. lanes]`.
        let peak = unsafe { self.load(artifact(&peak_kernel(lanes), "peak", lanes, &[CHAINS as u64 * lanes])) }?;
        let bound = peak.bind(&[("T", threads), ("N", CHAIN_STEPS), ("R", 1)])?;
        // x ← x · 0.5 + 0.5 stays between 0.5 and 1 and never becomes subnormal.
        let x = HostArray::from_slice(&vec![0.5f32; CHAINS * lanes as usize], &[CHAINS as u64 * lanes])?;
        let seconds = best(|| bound.run_timed(&x))?;
        let flops = 2.0 * (CHAINS as u64 * lanes * CHAIN_STEPS * threads) as f64 / seconds;

        let read = |per_thread: u64| -> Result<f64, Error> {
            let step = CHAINS as u64 * lanes;
            let elems = (per_thread / 4 / step).max(1) * step;
            let rounds = (READ_BYTES / (elems * 4)).max(1);
            let dims = [threads * elems];
            // SAFETY: task t reads `x[t * N .. (t + 1) * N]`, N a multiple of the step, and writes `out[t, 0 .. lanes]`.
            let read = unsafe { self.load(artifact(&read_kernel(lanes), "read", lanes, &dims)) }?;
            let bound = read.bind(&[("T", threads), ("N", elems), ("R", rounds)])?;
            let mut x = HostArray::zeros(DType::F32, &dims)?;
            // Untouched pages are all one page of zeros.
            x.bytes_mut().fill(0x3f);
            let seconds = best(|| bound.run_timed(&x))?;
            Ok((elems * 4 * rounds * threads) as f64 / seconds)
        };
        let mut sheet = cpu.data_sheet();
        let last = cpu.caches.last().map_or(32 << 20, |c| c.bytes * (threads / u64::from(c.shared_by)).max(1));
        for level in &mut sheet.levels {
            let total = match level.name.as_str() {
                "registers" => {
                    // Three operands of four bytes a multiply-add.
                    level.bandwidth = flops / 2.0 * 12.0 / level.instances as f64;
                    continue;
                }
                "dram" => (4 * last).clamp(64 << 20, 512 << 20),
                _ => level.bytes * level.instances / 2,
            };
            level.bandwidth = read(total / threads)? / level.instances as f64;
        }
        sheet.peak = vec![("f32".into(), flops), ("f64".into(), flops / 2.0)];
        cpu.add_products(&mut sheet);
        tracing::debug!(?sheet, "the processor is measured");
        Ok(sheet)
    }
}

/// The least of several timings, in seconds.
fn best(mut run: impl FnMut() -> Result<f64, Error>) -> Result<f64, Error> {
    (0..RUNS).try_fold(f64::INFINITY, |least, _| Ok(run()?.min(least)))
}

impl crate::linked::Bound {
    /// Runs a calibration plan on `x` and returns its seconds.
    fn run_timed(&self, x: &HostArray) -> Result<f64, Error> {
        let shape = self.arrays().find(|a| a.name == "out").map(|a| a.shape.to_vec()).unwrap_or_default();
        let mut out = HostArray::zeros(DType::F32, &shape)?;
        let arguments = crate::Arguments::new().input("x", x.view()).output("out", out.view_mut());
        Ok(self.launch(arguments)?.iter().map(|t| t.as_secs_f64()).sum())
    }
}

/// A plan of one kernel over T tasks that reads `x` and writes `out[T, lanes]`; slots x, out, N, R.
fn artifact(code: &str, symbol: &str, lanes: u64, x_dims: &[u64]) -> Artifact {
    let mut ranks: Arena<RankId, Rank> = Arena::new();
    let mut rank = |name: &str| ranks.push(Rank { name: name.into(), fixed: None, span: Span::default() });
    let (t, n, r) = (rank("T"), rank("N"), rank("R"));
    let mut buffers: Arena<BufferId, Buffer> = Arena::new();
    let mut buffer = |name: &str, dims, kind| {
        buffers.push(Buffer { name: name.into(), dtype: DType::F32, dims, kind, positive: false })
    };
    let x = buffer("x", x_dims.iter().map(|d| Size::Const(*d)).collect(), BufferKind::Input);
    let out = buffer("out", vec![Size::Rank(t), Size::Const(lanes)], BufferKind::Output);
    let launch = Launch {
        symbol: symbol.into(),
        slots: vec![Slot::Base(x), Slot::Base(out), Slot::Extent(n), Slot::Extent(r)],
        grid: vec![Size::Rank(t)],
        ordered: false,
        scratch_bytes: Size::Const(0),
        reads: vec![x],
        writes: vec![out],
        // Never too small for all threads.
        flops: Size::Const(i64::MAX as u64),
        bytes: Size::Const(0),
        gpu: None,
    };
    let (name, target) = (format!("calibrate {symbol}"), "cpu".to_string());
    Artifact {
        name,
        target,
        ranks,
        buffers,
        code: Code::LlvmIr(code.into()),
        launches: vec![launch],
        defaults: vec![],
        facts: vec![],
    }
}

/// The head of both kernels: slots loaded, `%out.t` the task's output. A range is one task, as tasks are threads.
fn head(symbol: &str) -> String {
    let mut ir = format!(
        "define void @{symbol}(ptr %slots, i64 %first, i64 %end, ptr %scratch) {{\nentry:\n  %x = load ptr, ptr %slots\n"
    );
    for (i, (name, ty)) in [("out", "ptr"), ("n", "i64"), ("r", "i64")].into_iter().enumerate() {
        let _ = write!(
            ir,
            "  %p{name} = getelementptr i64, ptr %slots, i64 {}\n  %{name} = load {ty}, ptr %p{name}\n",
            i + 1
        );
    }
    ir + "  br label %task\ntask:\n  %t = phi i64 [ %first, %entry ], [ %t.next, %store ]\n"
}

/// The end of both kernels: the chains' sum stored, next task.
fn tail(lanes: u64) -> String {
    let mut ir = format!("store:\n  %sum0 = fadd <{lanes} x float> %b0, zeroinitializer\n");
    for j in 1..CHAINS {
        let _ = writeln!(ir, "  %sum{j} = fadd <{lanes} x float> %sum{}, %b{j}", j - 1);
    }
    let last = CHAINS - 1;
    ir + &format!(
        "  %t.lanes = mul i64 %t, {lanes}
  %out.t = getelementptr float, ptr %out, i64 %t.lanes
  store <{lanes} x float> %sum{last}, ptr %out.t, align 4
  %t.next = add i64 %t, 1
  %t.more = icmp slt i64 %t.next, %end
  br i1 %t.more, label %task, label %done
done:
  ret void
}}
declare <{lanes} x float> @llvm.fma.v{lanes}f32(<{lanes} x float>, <{lanes} x float>, <{lanes} x float>)
"
    )
}

/// Chains of `b ← b · m + m`, N steps.
fn peak_kernel(lanes: u64) -> String {
    let vector = format!("<{lanes} x float>");
    let mut ir = head("peak");
    for j in 0..CHAINS as u64 {
        let _ = writeln!(ir, "  %px{j} = getelementptr float, ptr %x, i64 {}", j * lanes);
        let _ = writeln!(ir, "  %m{j} = load {vector}, ptr %px{j}, align 4");
    }
    ir += "  br label %loop\nloop:\n  %i = phi i64 [ 0, %task ], [ %i.next, %loop ]\n";
    for j in 0..CHAINS {
        let _ = writeln!(ir, "  %a{j} = phi {vector} [ %m{j}, %task ], [ %b{j}, %loop ]");
    }
    for j in 0..CHAINS {
        let call = format!("call {vector} @llvm.fma.v{lanes}f32({vector} %a{j}, {vector} %m0, {vector} %m0)");
        let _ = writeln!(ir, "  %b{j} = {call}");
    }
    ir +=
        "  %i.next = add i64 %i, 1\n  %i.more = icmp slt i64 %i.next, %n\n  br i1 %i.more, label %loop, label %store\n";
    ir + &tail(lanes)
}

/// Sums of the task's N elements, R times.
fn read_kernel(lanes: u64) -> String {
    let vector = format!("<{lanes} x float>");
    let mut ir = head("read");
    ir += "  %t.n = mul i64 %t, %n\n  %x.t = getelementptr float, ptr %x, i64 %t.n\n  br label %round\nround:\n";
    ir += "  %k = phi i64 [ 0, %task ], [ %k.next, %round.end ]\n";
    for j in 0..CHAINS {
        let _ = writeln!(ir, "  %c{j} = phi {vector} [ zeroinitializer, %task ], [ %b{j}, %round.end ]");
    }
    ir += "  br label %loop\nloop:\n  %i = phi i64 [ 0, %round ], [ %i.next, %loop ]\n";
    for j in 0..CHAINS {
        let _ = writeln!(ir, "  %a{j} = phi {vector} [ %c{j}, %round ], [ %b{j}, %loop ]");
    }
    ir += "  %px = getelementptr float, ptr %x.t, i64 %i\n";
    for j in 0..CHAINS as u64 {
        let _ = writeln!(ir, "  %px{j} = getelementptr float, ptr %px, i64 {}", j * lanes);
        let _ = writeln!(ir, "  %v{j} = load {vector}, ptr %px{j}, align 4");
        let _ = writeln!(ir, "  %b{j} = fadd {vector} %a{j}, %v{j}");
    }
    let step = CHAINS as u64 * lanes;
    let _ = write!(
        ir,
        "  %i.next = add i64 %i, {step}
  %i.more = icmp slt i64 %i.next, %n
  br i1 %i.more, label %loop, label %round.end
round.end:
  %k.next = add i64 %k, 1
  %k.more = icmp slt i64 %k.next, %r
  br i1 %k.more, label %round, label %store
"
    );
    ir + &tail(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineOptions;

    #[test]
    fn a_measured_sheet_is_plausible() {
        let engine = Engine::new(&EngineOptions::default()).unwrap();
        let sheet = engine.measure().unwrap();
        let peak = sheet.peak_of(DType::F32).unwrap();
        assert!((1e9..1e15).contains(&peak), "{peak} operations per second");
        assert!(sheet.levels.iter().all(|l| (1e8..1e15).contains(&l.bandwidth)), "{sheet:?}");
        // Registers feed the multiply-adds; memory cannot.
        let of = |name: &str| sheet.levels.iter().find(|l| l.name == name).map(|l| l.bandwidth * l.instances as f64);
        assert!(of("registers") > of("dram"), "{sheet:?}");
    }

    #[test]
    fn the_kernels_compute_what_they_say() {
        let engine = Engine::new(&EngineOptions { threads: Some(1), ..EngineOptions::default() }).unwrap();
        let (lanes, n) = (8u64, 8 * CHAINS as u64 * 3);
        // SAFETY: as in `measure`.
        let read = unsafe { engine.load(artifact(&read_kernel(lanes), "read", lanes, &[2 * n])) }.unwrap();
        let x: Vec<f32> = (0..2 * n).map(|i| (i % 11) as f32).collect();
        let array = HostArray::from_slice(&x, &[2 * n]).unwrap();
        let bound = read.bind(&[("T", 2), ("N", n), ("R", 5)]).unwrap();
        let out = bound.run_to_arrays(&[("x", &array)], &[]).unwrap();
        let got: f32 = out[0].1.as_slice::<f32>().unwrap().iter().sum();
        assert_eq!(got, 5.0 * x.iter().sum::<f32>());
    }
}
