//! Launches: arrays placed in memory as a driver would, kernels one after another, variants by what they assume.

use einfall_ir::arena::Id;
use einfall_ir::array::Array;
use einfall_ir::artifact::{Artifact, Code, Condition, Launch, Slot};
use einfall_ir::dtype::DType;
use einfall_ir::tile::{self, BufferKind};
use half::{bf16, f16};

use super::{Machine, Map, parse};

fn encode(dtype: DType, x: f64) -> u64 {
    match dtype {
        DType::F64 => x.to_bits(),
        DType::F32 | DType::Tf32 => u64::from((x as f32).to_bits()),
        DType::F16 => u64::from(f16::from_f64(x).to_bits()),
        DType::BF16 => u64::from(bf16::from_f64(x).to_bits()),
        _ => x as i64 as u64,
    }
}

fn decode(dtype: DType, b: u64) -> f64 {
    match dtype {
        DType::F64 => f64::from_bits(b),
        DType::F32 | DType::Tf32 => f64::from(f32::from_bits(b as u32)),
        DType::F16 => f16::from_bits(b as u16).to_f64(),
        DType::BF16 => bf16::from_bits(b as u16).to_f64(),
        DType::I64 => b as i64 as f64,
        DType::I32 => f64::from(b as u32 as i32),
        DType::I8 => f64::from(b as u8 as i8),
        DType::U8 | DType::Bool => f64::from(b as u8),
        DType::F8E4M3 | DType::F8E5M2 | DType::I4 | DType::U4 => panic!("{dtype} arrays"),
    }
}

/// An array: its address, extents, strides in elements, values given.
type Place = (u64, Vec<u64>, Vec<u64>, Vec<f64>);

/// Whether a launch gives an array back.
pub fn written(kind: BufferKind) -> bool {
    matches!(kind, BufferKind::Output | BufferKind::InOut)
}

/// Runs an artifact on inputs; the outputs and what is updated in place.
pub fn execute(a: &Artifact, ranks: &[u64], inputs: &[Array]) -> Vec<Vec<f64>> {
    launched(a, ranks, inputs, 1, false)
}

/// Runs an artifact so many times, with tasks and their warps from the first to the last or the other way round; the
/// outputs and what is updated in place.
pub fn launched(a: &Artifact, ranks: &[u64], inputs: &[Array], times: usize, backwards: bool) -> Vec<Vec<f64>> {
    let Code::Ptx { text, .. } = &a.code else { panic!("no PTX") };
    let mut given = inputs.iter();
    // Arrays stand apart, aligned; what is not written is not a number.
    let mut global: Vec<u8> = vec![0xFF; 4096];
    let mut places: Vec<Place> = Vec::new();
    for (id, b) in a.buffers.iter() {
        let dims: Vec<u64> = b.dims.iter().map(|d| d.eval(ranks).unwrap()).collect();
        let mut strides = vec![1; dims.len()];
        for d in (1..dims.len()).rev() {
            strides[d - 1] = strides[d] * dims[d];
        }
        let at = global.len() as u64;
        let bytes = b.dtype.bytes(1) as usize;
        let values = match b.kind {
            BufferKind::Input | BufferKind::InOut => given.next().unwrap().data.clone(),
            BufferKind::Output | BufferKind::Workspace => Vec::new(),
        };
        let n = dims.iter().product::<u64>() as usize;
        global.resize((global.len() + n * bytes + 256).next_multiple_of(256), 0xFF);
        let counts = |l: &Launch| l.gpu.as_ref().is_some_and(|g| g.counters.contains(&id));
        if a.launches.iter().any(counts) {
            global[at as usize..][..n * bytes].fill(0);
        }
        for (i, x) in values.iter().enumerate() {
            Machine::write(&mut global, at + (i * bytes) as u64, bytes, encode(b.dtype, *x));
        }
        places.push((at, dims, strides, values));
    }
    let holds = |c: &Condition| match c {
        Condition::AtMost(s, n) => s.eval(ranks).unwrap() <= *n,
        Condition::Multiple(s, n) => s.eval(ranks).unwrap() % n == 0,
        Condition::Aligned(b, n) => {
            let strides = &places[b.index()].2;
            let bytes = a.buffers[*b].dtype.bytes(1);
            256 % n == 0 && strides.split_last().is_none_or(|(_, s)| s.iter().all(|s| (s * bytes).is_multiple_of(*n)))
        }
    };
    let mut done: Vec<(usize, &String)> = Vec::new();
    for (time, l) in (0..times).flat_map(|time| a.launches.iter().map(move |l| (time, l))) {
        let gpu = l.gpu.as_ref().unwrap();
        if let Some(k) = &gpu.variant_of {
            if done.contains(&(time, k)) || !gpu.assumes.iter().all(holds) {
                continue;
            }
            done.push((time, k));
        }
        let params = l.slots.iter().map(|s| match s {
            Slot::Base(b) => places[b.index()].0,
            Slot::Stride(b, d) => places[b.index()].2[*d],
            Slot::Scalar(b) => Slot::scalar_bits(a.buffers[*b].dtype, places[b.index()].3[0]),
            Slot::Extent(r) => ranks[r.index()],
        });
        let params: Vec<u64> = params.collect();
        let entry = parse(text, &l.symbol);
        let tasks: u64 = l.grid.iter().map(|g| g.eval(ranks).unwrap()).product();
        let size: u64 = gpu.cluster.iter().product::<u64>().max(1);
        let mut order: Vec<u64> = (0..tasks).step_by(size as usize).collect();
        if backwards {
            order.reverse();
        }
        for first in order {
            let maps = gpu.maps.iter().map(|m| {
                let (at, dims, strides, _) = &places[m.buffer.index()];
                let bytes = a.buffers[m.buffer].dtype.bytes(1);
                Map {
                    base: *at,
                    extents: m.dims.iter().map(|d| dims[*d]).collect(),
                    strides: m.dims.iter().map(|d| strides[*d] * bytes).collect(),
                    boxed: m.extents.iter().map(|e| u64::from(*e)).collect(),
                    swizzle: u64::from(m.swizzle_bytes),
                    bytes,
                }
            });
            let maps = maps.collect();
            let threads = u64::from(gpu.threads);
            let mut machine = Machine::new(&entry, params.clone(), maps, &mut global, first, size as usize, threads);
            machine.backwards = backwards;
            machine.run();
        }
    }
    let outs = a.buffers.iter().zip(&places).filter(|((_, b), _)| written(b.kind));
    let read = |((_, b), (at, dims, ..)): ((_, &tile::Buffer), &(u64, Vec<u64>, _, _))| {
        let bytes = b.dtype.bytes(1);
        let n = dims.iter().product::<u64>();
        (0..n).map(|i| decode(b.dtype, Machine::read(&global, at + i * bytes, bytes as usize))).collect()
    };
    outs.map(read).collect()
}
