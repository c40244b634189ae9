//! The library's shaders on a machine that forgives nothing ([`shader`]): results against the float64 evaluator, and every
//! barrier needed.

mod library;
mod shader;

use std::collections::BTreeSet;

use einfall::codegen::backend::wgsl::{Target, print};
use einfall::{autotune::model_gpu, compile_wgsl, wgsl_plan};
use einfall_ir::arena::Id;
use einfall_ir::array::Array;
use einfall_ir::artifact::{Artifact, Code, Condition, Slot};
use einfall_ir::cascade::bind::{Bindings, Given, bind};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{BufferId, BufferKind};
use einfall_ir::tolerance::expect;
use einfall_ir::tolerance::inputs::{Variant, random};
use einfall_runtime::HostArray;
use shader::Machine;

/// Points of a cascade at the sizes tested, at most.
const MOST: u64 = 10_000;
/// Sizes that a barrier is tried at, at most: a ring of one stage needs its second trip, in every variant.
const TRIES: usize = 200;

/// A cascade's artifact by the rules for a sheet; none where something has no WGSL.
fn compiled(c: &Cascade, sheet: &str) -> Option<Artifact> {
    let sheet = DataSheet::named(sheet).expect("a sheet");
    let target = Target::of(&sheet).expect("an adapter");
    let plan = wgsl_plan(c, &target).ok()?;
    let mapping = model_gpu::choose(&plan, &sheet, None);
    compile_wgsl(&plan, &mapping, &target).ok().map(|a| a.with_formulas(c))
}

fn parsed(text: &str) -> naga::Module {
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    validator.subgroup_stages(naga::valid::ShaderStages::all());
    validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    validator.validate(&module).unwrap_or_else(|e| panic!("{}\n{text}", e.emit_to_string(text)));
    module
}

/// What is bound at sizes: where arrays are, and scalars.
struct Launch<'a> {
    artifact: &'a Artifact,
    extents: Vec<u64>,
    shapes: Vec<Vec<u64>>,
    scalars: Vec<f64>,
    /// The words of every array, whole vectors of four.
    arrays: Vec<Vec<u32>>,
}

impl<'a> Launch<'a> {
    fn new(c: &Cascade, b: &Bindings, artifact: &'a Artifact, inputs: &[Array]) -> Launch<'a> {
        let extent = |name: &str| c.ranks.iter().zip(&b.extents).find(|((_, r), _)| r.name == name).map(|(_, n)| *n);
        let extents: Vec<u64> = artifact.ranks.iter().map(|(_, r)| extent(&r.name).expect("a rank")).collect();
        let (mut shapes, mut scalars, mut arrays) = (Vec::new(), Vec::new(), Vec::new());
        for (_, buffer) in artifact.buffers.iter() {
            let shape: Vec<u64> = buffer.dims.iter().map(|d| d.eval(&extents).expect("an extent")).collect();
            let given = c.params.iter().zip(inputs).find(|(p, _)| c.tensors[**p].name == buffer.name).map(|(_, a)| a);
            let mut bytes = match given {
                Some(a) => HostArray::from_values(a).expect("an array").bytes().to_vec(),
                None => vec![0xFF; buffer.dtype.bytes(shape.iter().product()) as usize],
            };
            bytes.resize(bytes.len().next_multiple_of(16).max(16), 0xFF);
            let words = bytes.chunks(4).map(|w| w.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))).collect();
            scalars.push(given.map_or(0.0, |a| a.data[0]));
            shapes.push(shape);
            arrays.push(words);
        }
        Launch { artifact, extents, shapes, scalars, arrays }
    }

    fn stride(&self, b: BufferId, d: usize) -> u64 {
        self.shapes[b.index()][d + 1..].iter().product()
    }

    fn holds(&self, c: &Condition) -> bool {
        match c {
            Condition::AtMost(s, n) => s.eval(&self.extents).expect("a size") <= *n,
            Condition::Multiple(s, n) => s.eval(&self.extents).expect("a size").is_multiple_of(*n),
            Condition::Aligned(b, n) => {
                let (shape, bytes) = (&self.shapes[b.index()], self.artifact.buffers[*b].dtype.bytes(1));
                let whole = |d: usize| shape[d] <= 1 || (self.stride(*b, d) * bytes).is_multiple_of(*n);
                shape.contains(&0) || (1..shape.len()).all(|d| whole(d - 1))
            }
        }
    }

    /// The kernels to run, in order: of variants the first that fits.
    fn chosen(&self) -> Vec<usize> {
        let mut done: Vec<&String> = Vec::new();
        let fits = |(i, l): (usize, &'a einfall_ir::artifact::Launch)| {
            let gpu = l.gpu.as_ref().expect("a GPU's launch");
            if let Some(k) = &gpu.variant_of {
                if done.contains(&k) || !gpu.assumes.iter().all(|c| self.holds(c)) {
                    return None;
                }
                done.push(k);
            }
            Some(i)
        };
        self.artifact.launches.iter().enumerate().filter_map(fits).collect()
    }

    /// Runs kernel `i`, whose code is `module`: `most` of its workgroups in a grid `rows` high, one barrier taken out. The
    /// barriers reached.
    fn run(
        &mut self,
        i: usize,
        module: &naga::Module,
        (most, rows): (u64, u64),
        without: Option<usize>,
    ) -> Result<BTreeSet<usize>, String> {
        let launch = &self.artifact.launches[i];
        let mut words = Vec::new();
        let mut bound: Vec<BufferId> = Vec::new();
        for slot in &launch.slots {
            words.push(match *slot {
                Slot::Base(b) => {
                    bound.push(b);
                    continue;
                }
                Slot::Stride(b, d) => self.stride(b, d) as u32,
                Slot::Extent(r) => self.extents[r.index()] as u32,
                Slot::Scalar(b) => {
                    let (x, dtype) = (self.scalars[b.index()], self.artifact.buffers[b].dtype);
                    if dtype.is_float() { (dtype.round(x) as f32).to_bits() } else { x as i32 as u32 }
                }
            });
        }
        words.resize(words.len().next_multiple_of(4).max(4), 0);
        let arrays = bound.iter().map(|b| self.arrays[b.index()].clone());
        let bindings: Vec<Vec<u32>> = [words].into_iter().chain(arrays).collect();
        let groups: u64 = launch.grid.iter().map(|g| g.eval(&self.extents).expect("a grid")).product();
        let subgroup = modules(self.artifact)[i].subgroup.max(4);
        let mut machine = Machine::new(module, &bindings, subgroup as usize);
        machine.without = without;
        let grid = [groups.div_ceil(rows), rows];
        for group in 0..(grid[0] * grid[1]).min(most) {
            machine.run(group as u32, grid.map(|n| n as u32)).map_err(|e| format!("{}: {e}", launch.symbol))?;
        }
        for (n, b) in bound.iter().enumerate() {
            self.arrays[b.index()] = machine.binding(n as u32 + 1);
        }
        Ok(machine.barriers)
    }

    /// An array's values.
    fn values(&self, name: &str) -> Vec<f64> {
        let of = |(_, b): &(BufferId, &einfall_ir::tile::Buffer)| b.name == name;
        let (id, buffer) = self.artifact.buffers.iter().find(of).expect("an array");
        assert!(buffer.kind != BufferKind::Workspace);
        let shape = &self.shapes[id.index()];
        let bytes: Vec<u8> = self.arrays[id.index()].iter().flat_map(|w| w.to_le_bytes()).collect();
        let (bytes, behind) = bytes.split_at(buffer.dtype.bytes(shape.iter().product()) as usize);
        assert!(behind.iter().all(|b| *b == 0xFF), "{name} is written behind its end");
        HostArray::from_bytes(buffer.dtype, shape, bytes).and_then(|a| a.to_values()).expect("values").data
    }
}

fn modules(artifact: &Artifact) -> &[einfall_ir::artifact::WgslModule] {
    let Code::Wgsl { modules } = &artifact.code else { panic!("no WGSL") };
    modules
}

/// Whether a cascade has WGSL for a sheet; what its shaders compute, in grids `rows` high, is what it means.
fn agrees(name: &str, c: &Cascade, (sheet, rows): (&str, u64)) -> Result<bool, String> {
    let Some(artifact) = compiled(c, sheet) else { return Ok(false) };
    let sizes = library::sizes(c, MOST).next().ok_or("no sizes satisfy its facts")?;
    computes(c, &artifact, sizes, rows)?;
    println!("{name} for {sheet}");
    Ok(true)
}

/// What a cascade's shaders compute at sizes, in grids `rows` high, is what it means.
fn computes(c: &Cascade, artifact: &Artifact, sizes: Vec<(String, u64)>, rows: u64) -> Result<(), String> {
    let b = bind(c, &Given { sizes, ..Given::default() }).map_err(|e| format!("{e:?}"))?;
    computes_of(c, artifact, &b, &random(c, &b, 5, Variant::Small).expect("inputs"), rows)
}

/// The same of these inputs.
fn computes_of(c: &Cascade, artifact: &Artifact, b: &Bindings, inputs: &[Array], rows: u64) -> Result<(), String> {
    let mut launch = Launch::new(c, b, artifact, inputs);
    let expected = expect(c, b, inputs, &eval::Options::default()).expect("evaluates");
    for i in launch.chosen() {
        let m = &modules(artifact)[i];
        launch.run(i, &parsed(&m.text), (u64::MAX, rows), None)?;
    }
    for e in &expected {
        e.compare(&launch.values(&e.name)).map_err(|m| format!("{m}"))?;
    }
    Ok(())
}

#[test]
fn the_library_agrees_and_no_invocation_disturbs_another() {
    // Grids of more workgroups than one dimension takes have a second one, and workgroups without a task.
    for (sheet, rows, least) in [("webgpu", 1, 69), ("webgpu-nvidia", 3, 69)] {
        let mut wrong = Vec::new();
        let mut right = 0;
        for (name, c) in library::all() {
            match agrees(&name, &c, (sheet, rows)) {
                Ok(ran) => right += usize::from(ran),
                Err(e) => wrong.push(format!("{name} for {sheet}: {e}")),
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(right >= least, "{right} cascades for {sheet}");
    }
}

fn sized(sizes: &[(&str, u64)]) -> Vec<(String, u64)> {
    sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect()
}

/// Elements narrower than half a word at positions that only half a word divides, and contractions of integers.
#[test]
fn what_the_library_has_not_agrees() {
    for (text, sizes) in [
        ("cascade pair[M, N](x: i8[M, N]) -> (y: i32[M, N]) { y[m,n] = x[m,n] + x[m,n+2] }", [("M", 5), ("N", 32)]),
        ("cascade pair[M, N](x: u8[M, N]) -> (y: u8[M, N]) { y[m,n] = max(x[m,n], x[m,n+2]) }", [("M", 5), ("N", 48)]),
        (
            "cascade mm[M, N, K = 18](A: f8e4m3[M, K], B: f8e4m3[K, N]) -> (C: f32[M, N]) {
                 C[m,n] = sum(k) A[m,k] * B[k,n] }",
            [("M", 9), ("N", 34)],
        ),
        (
            "cascade mm[M, N, K = 18](A: i32[M, K], B: i32[K, N]) -> (C: i32[M, N]) { C[m,n] = sum(k) A[m,k] * B[k,n] }",
            [("M", 9), ("N", 34)],
        ),
        (
            "cascade mm[M, N, K = 18](A: i8[M, K], B: i8[K, N]) -> (C: i32[M, N]) { C[m,n] = sum(k) A[m,k] * B[k,n] }",
            [("M", 9), ("N", 34)],
        ),
    ] {
        let c = parse(text).expect("parses").cascades.remove(0);
        for sheet in ["webgpu", "webgpu-nvidia"] {
            let artifact = compiled(&c, sheet).unwrap_or_else(|| panic!("{text} has no WGSL for {sheet}"));
            computes(&c, &artifact, sized(&sizes), 1).unwrap_or_else(|e| panic!("{text} for {sheet}: {e}"));
        }
    }
}

/// Experts without a row, one with all rows, rows of no expert, and indices and offsets that point anywhere.
#[test]
fn mixtures_of_experts_agree_however_rows_are_shared_out() {
    const SIZES: [(&str, u64); 6] = [("T", 17), ("K", 3), ("N", 33), ("X", 5), ("D", 24), ("F", 40)];
    let shared_out: [[u64; 6]; 5] = [
        [0, 0, 0, 33, 33, 33],
        [0, 33, 33, 33, 33, 33],
        [0, 0, 0, 0, 0, 33],
        [0, 0, 7, 7, 33, 33],
        [2, 4, 4, 9, 9, 20],
    ];
    for (name, c) in
        library::all().filter(|(name, _)| ["moe_up/", "moe_down/", "moe_mlp/"].iter().any(|m| name.starts_with(m)))
    {
        let sizes = SIZES.iter().filter(|(rank, _)| c.ranks.iter().any(|(_, r)| r.name == *rank));
        let sizes = sizes.map(|(n, v)| ((*n).to_owned(), *v)).collect();
        let b = bind(&c, &Given { sizes, ..Given::default() }).expect("sizes");
        let offsets = c.params.iter().position(|p| ["offs", "begin"].contains(&c.tensors[*p].name.as_str()));
        let offsets = offsets.expect("where experts begin");
        let drawn = |variant| random(&c, &b, 11, variant).expect("inputs");
        let mut all = vec![drawn(Variant::Hostile)];
        for begins in shared_out {
            let mut inputs = drawn(Variant::Normal);
            inputs[offsets].data = begins.iter().map(|n| *n as f64).collect();
            all.push(inputs);
        }
        for sheet in ["webgpu", "webgpu-nvidia"] {
            let artifact = compiled(&c, sheet).unwrap_or_else(|| panic!("{name} has no WGSL for {sheet}"));
            for inputs in &all {
                let begins = &inputs[offsets].data;
                computes_of(&c, &artifact, &b, inputs, 1)
                    .unwrap_or_else(|e| panic!("{name} for {sheet}, {begins:?}: {e}"));
            }
        }
    }
}

/// Products of the same rows are register tiles on adapters with many registers, and on no others.
#[test]
fn products_of_the_same_rows_by_register_tiles_agree() {
    for name in ["attention", "attention_full", "attention_softcap"] {
        let c = parse(einfall_kernels::source(name).expect("a library file")).expect("parses").cascades.remove(0);
        let tiles = |sheet: &str| {
            let sheet = DataSheet::named(sheet).expect("a sheet");
            let plan = wgsl_plan(&c, &Target::of(&sheet).expect("an adapter")).expect("a plan");
            model_gpu::choose(&plan, &sheet, None).to_string().contains("atom fma.m16n")
        };
        assert_eq!(["webgpu-nvidia", "webgpu"].map(tiles), [true, false], "{name}");
        let artifact = compiled(&c, "webgpu-nvidia").expect("WGSL");
        for (m, n, e) in [(67, 70, 32), (1, 33, 20)] {
            let size = |rank: &str| match rank {
                "M" => m,
                "N" => n,
                "E" | "F" => e,
                _ => 1,
            };
            let sizes = c.ranks.iter().map(|(_, r)| (r.name.clone(), size(&r.name))).collect();
            computes(&c, &artifact, sizes, 1).unwrap_or_else(|why| panic!("{name} at {m}, {n}, {e}: {why}"));
        }
    }
}

/// What a step of several products stores and reads has one copy: the meetings of a step are needed, but for one, where what is
/// copied first has arrived by the meeting that frees the next tile, as copies are done when issued.
#[test]
fn meetings_of_register_tiles_are_needed() {
    let c = parse(einfall_kernels::source("attention_full").expect("a library file")).expect("parses");
    let c = &c.cascades[0];
    let artifact = compiled(c, "webgpu-nvidia").expect("WGSL");
    let sizes = c.ranks.iter().map(|(_, r)| {
        let n = match r.name.as_str() {
            "M" => 64,
            "N" => 96,
            "E" | "F" => 16,
            _ => 1,
        };
        (r.name.clone(), n)
    });
    let b = bind(c, &Given { sizes: sizes.collect(), ..Given::default() }).expect("sizes");
    let inputs = random(c, &b, 7, Variant::Small).expect("inputs");
    let mut launch = Launch::new(c, &b, &artifact, &inputs);
    for i in launch.chosen() {
        let code = parsed(&modules(&artifact)[i].text);
        let before = launch.arrays.clone();
        let reached = launch.run(i, &code, (1, 1), None).unwrap_or_else(|e| panic!("{e}"));
        let all = reached.len();
        let needed = reached.into_iter().filter(|barrier| {
            launch.arrays.clone_from(&before);
            launch.run(i, &code, (1, 1), Some(*barrier)).is_err()
        });
        let needed = needed.count();
        assert!(all >= 3 && needed + 1 >= all, "{needed} of {all} meetings are needed");
        launch.arrays = before;
    }
}

/// Products of f16 for adapters with cooperative matrices: batches, transposed operands, what follows a product, tails of every
/// dimension.
const PRODUCTS: [&str; 6] = [
    "cascade mm[M, N, K](A: f16[M, K], B: f16[K, N]) -> (Y: f16[M, N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
    "cascade mm[M, N, K](A: f16[M, K], B: f16[K, N]) -> (Y: f32[M, N]) { Y[m,n] = sum(k) A[m,k] * B[k,n] }",
    "cascade nt[M, N, K](A: f16[M, K], B: f16[N, K]) -> (Y: f32[M, N]) { Y[m,n] = sum(k) A[m,k] * B[n,k] }",
    "cascade tn[M, N, K](A: f16[K, M], B: f16[K, N]) -> (Y: f32[M, N]) { Y[m,n] = sum(k) A[k,m] * B[k,n] }",
    "cascade batch[Z, M, N, K](A: f16[Z, M, K], B: f16[Z, K, N]) -> (Y: f16[Z, M, N]) {
         Y[z,m,n] = sum(k) A[z,m,k] * B[z,k,n] }",
    "cascade gated[M, N, K](A: f16[M, K], B: f16[N, K], c: f32[N], G: f16[M, N]) -> (Y: f16[M, N], S: f32[M]) {
         T[m,n] = (sum(k) A[m,k] * B[n,k]) + c[n]
         Y[m,n] = T[m,n] * sigmoid(T[m,n]) * G[m,n]
         S[m] = max(n) Y[m,n] }",
];

#[test]
fn products_of_cooperative_matrices_agree() {
    for text in PRODUCTS {
        let c = parse(text).expect("parses").cascades.remove(0);
        let artifact = compiled(&c, "webgpu-nvidia").expect("WGSL");
        let taken = modules(&artifact).iter().filter(|m| !m.matrices.is_empty());
        assert!(taken.clone().count() > 0, "{text}");
        assert!(taken.clone().all(|m| m.matrices == ["coop.m16n16k16.f16"] && m.text.contains("coopMultiplyAdd")));
        for (m, n, k) in [(129, 131, 70), (16, 136, 32), (140, 24, 1), (1, 1, 65)] {
            let sizes = [("M", m), ("N", n), ("K", k), ("Z", 2)];
            let sizes = sizes.iter().filter(|(rank, _)| c.ranks.iter().any(|(_, r)| r.name == *rank));
            let sizes = sizes.map(|(n, v)| ((*n).to_owned(), *v)).collect();
            computes(&c, &artifact, sizes, 1).unwrap_or_else(|e| panic!("{text} at {m}, {n}, {k}: {e}"));
        }
    }
}

/// Attention of f16: scores and probabilities through workgroup memory, sums so far out of the matrices and back.
#[test]
fn attention_by_cooperative_matrices_agrees() {
    for name in ["attention", "attention_full"] {
        let text = einfall_kernels::source(name).expect("a library file").replace("bf16", "f16");
        let c = parse(&text).expect("parses").cascades.remove(0);
        let artifact = compiled(&c, "webgpu-nvidia").expect("WGSL");
        assert!(modules(&artifact).iter().all(|m| !m.matrices.is_empty() && m.text.contains("coopMultiplyAdd")));
        for (m, n, e) in [(65, 70, 32), (3, 33, 20)] {
            let size = |rank: &str| match rank {
                "M" => m,
                "N" => n,
                "E" | "F" => e,
                _ => 1,
            };
            let sizes = c.ranks.iter().map(|(_, r)| (r.name.clone(), size(&r.name))).collect();
            computes(&c, &artifact, sizes, 1).unwrap_or_else(|why| panic!("{name} at {m}, {n}, {e}: {why}"));
        }
    }
}

/// Reductions of scores by cooperative matrices: whatever sums them, its terms are what the products left.
#[test]
fn sums_of_what_matrices_hold_agree() {
    const SUMS: [&str; 2] = [
        "cascade squares[M, N, E, F](Q: f16[M, E], K: f16[N, E], V: f16[N, F]) -> (Y: f32[M, F]) {
             S[m,n] = sum(e) Q[m,e] * K[n,e]
             L[m] = sum(n) S[m,n] * S[m,n]
             Y[m,f] = (sum(n) sigmoid(S[m,n]) * V[n,f]) / L[m] }",
        "cascade largest[M, N, E, F](Q: f16[M, E], K: f16[N, E], V: f16[N, F]) -> (Y: f32[M, F]) {
             S[m,n] = sum(e) Q[m,e] * K[n,e]
             L[m] = max(n) abs(S[m,n])
             Y[m,f] = (sum(n) sigmoid(S[m,n]) * V[n,f]) / (1.0 + L[m]) }",
    ];
    for text in SUMS {
        let c = parse(text).expect("parses").cascades.remove(0);
        let artifact = compiled(&c, "webgpu-nvidia").expect("WGSL");
        assert!(modules(&artifact).iter().any(|m| m.text.contains("coopMultiplyAdd")), "{text}");
        for (m, n, e) in [(65, 70, 32), (3, 33, 20)] {
            let sizes = sized(&[("M", m), ("N", n), ("E", e), ("F", e)]);
            computes(&c, &artifact, sizes, 1).unwrap_or_else(|why| panic!("{text} at {m}, {n}, {e}: {why}"));
        }
    }
}

/// Attention whose products have operands of different types: the adapter's matrices have one of them, or both.
#[test]
fn attention_of_mixed_types_agrees() {
    for (scores, values, matrices) in
        [("f16", "f16", true), ("f16", "bf16", false), ("f16", "f32", false), ("f32", "f16", false)]
    {
        let text = format!(
            "cascade mixed[M, N, E, F](Q: {scores}[M, E], K: {scores}[N, E], V: {values}[N, F]) -> (Y: f32[M, F]) {{
                 S[m,n] = sum(e) Q[m,e] * K[n,e]
                 X[m] = max(n) S[m,n]
                 P[m,n] = exp(S[m,n] - X[m])
                 L[m] = sum(n) P[m,n]
                 Y[m,f] = (sum(n) P[m,n] * V[n,f]) / L[m] }}"
        );
        let c = parse(&text).expect("parses").cascades.remove(0);
        let artifact = compiled(&c, "webgpu-nvidia").unwrap_or_else(|| panic!("{text} has no WGSL"));
        let taken = modules(&artifact).iter().any(|m| m.text.contains("coopMultiplyAdd"));
        assert_eq!(taken, matrices, "{text}");
        for (m, n, e) in [(65, 70, 32), (3, 33, 20)] {
            let sizes = sized(&[("M", m), ("N", n), ("E", e), ("F", e)]);
            computes(&c, &artifact, sizes, 1).unwrap_or_else(|why| panic!("{text} at {m}, {n}, {e}: {why}"));
        }
    }
}

/// A ring of two stages is loaded a trip ahead: what is loaded stays with its threads until the trip that reads it.
#[test]
fn products_a_trip_ahead_agree() {
    for (text, product, stages) in [(PRODUCTS[0], "r0@1", 2), (PRODUCTS[2], "Y@1", 2), (PRODUCTS[0], "r0@1", 3)] {
        let c = parse(text).expect("parses").cascades.remove(0);
        let sheet = DataSheet::named("webgpu-nvidia").expect("a sheet");
        let target = Target::of(&sheet).expect("an adapter");
        let plan = wgsl_plan(&c, &target).expect("a plan");
        let mapping = format!(
            "mapping {0} on webgpu-nvidia {{ kernel {0}_0 {{
                 axis m block 64 units 2
                 axis n block 32
                 axis k block 16
                 role main: 2 warp
                 tile A in shared stages {stages} by cp_async
                 tile B in shared stages {stages} by cp_async
                 op A slot 0
                 op B slot 0
                 op {product} atom coop.m16n16k16.f16 skew {1} slot 1 }} }}",
            c.name,
            stages - 1
        );
        let mapping = einfall_ir::mapping::parse::parse(&mapping).expect("a mapping");
        let artifact = compile_wgsl(&plan, &mapping, &target).unwrap_or_else(|e| panic!("{e}")).with_formulas(&c);
        // Two trips ahead a tile would be under way twice: its copies are done when they are issued.
        let ahead = |m: &einfall_ir::artifact::WgslModule| m.text.contains("h_s_A_s_stage");
        assert!(modules(&artifact).iter().all(|m| ahead(m) == (stages == 2)), "{stages}");
        for (m, n, k) in [(65, 40, 81), (16, 8, 16), (33, 32, 8), (7, 9, 3)] {
            let sizes = sized(&[("M", m), ("N", n), ("K", k)]);
            computes(&c, &artifact, sizes, 1).unwrap_or_else(|e| panic!("{text} at {m}, {n}, {k}: {e}"));
        }
        if stages > 2 {
            // What is stored two trips early has a barrier to spare.
            continue;
        }
        let codes: Vec<naga::Module> = modules(&artifact).iter().map(|m| parsed(&m.text)).collect();
        let b = bind(&c, &Given { sizes: sized(&[("M", 64), ("N", 32), ("K", 80)]), ..Given::default() });
        let b = b.expect("sizes");
        let inputs = random(&c, &b, 7, Variant::Small).expect("inputs");
        let mut launch = Launch::new(&c, &b, &artifact, &inputs);
        for i in launch.chosen() {
            let reached = launch.run(i, &codes[i], (1, 1), None).expect("runs");
            for barrier in reached {
                assert!(launch.run(i, &codes[i], (1, 1), Some(barrier)).is_err(), "a barrier that orders nothing");
            }
        }
    }
}

/// What cooperative matrices may not do is an error of the machine.
#[test]
fn the_machine_finds_wrong_uses_of_matrices() {
    let run = |body: &str| {
        let text = format!(
            "enable f16;\nenable wgpu_cooperative_matrix;\n\
             @group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>;\n\
             var<workgroup> a: array<vec4<f16>, 128>;\nvar<workgroup> c: array<vec4<f32>, 64>;\n\
             @compute @workgroup_size(64)\nfn f(@builtin(local_invocation_index) i: u32) {{\n\
             a[i] = vec4<f16>(vec4<f32>(f32(i)));\na[i + 64u] = vec4<f16>();\n{body}\n}}"
        );
        // Not validated: naga finds the branch itself.
        let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&text)));
        let mut machine = Machine::new(&module, &[Vec::new(), vec![7; 256]], 32);
        machine.run(0, [1, 1]).map(|()| machine.binding(1))
    };
    let product = "var m: coop_mat16x16<f32, C>;
         let x = coopLoadT<coop_mat16x16<f16, A>>(&a[0], 4u);
         let z = coopLoad<coop_mat16x16<f16, B>>(&a[0], 4u);
         m = coopMultiplyAdd(x, z, m);";
    let out = "if (i < 32u) { coopStoreT(m, &c[0], 4u); } workgroupBarrier(); y[i] = c[i];";
    let agreed = run(&format!("workgroupBarrier(); {product} {out}")).expect("runs");
    // Row r of `a` has numbers 4r to 4r + 3, four times each.
    let dot = |r: u32, s: u32| (0..4).map(|q| 4.0 * (4 * r + q) as f32 * (4 * s + q) as f32).sum::<f32>();
    let expected: Vec<u32> = (0..256).map(|e| dot(e / 16, e % 16).to_bits()).collect();
    assert_eq!(agreed, expected);
    for (body, what) in [
        (format!("{product} {out}"), "of `a` while another touches it"),
        (
            format!("workgroupBarrier(); {product} coopStoreT(m, &c[0], 4u); y[i] = c[i];"),
            "of `c` while another touches it",
        ),
        (format!("workgroupBarrier(); if (i < 40u) {{ {product} }}"), "a part of the subgroup takes no part"),
        (
            "workgroupBarrier(); let x = coopLoadT<coop_mat16x16<f16, A>>(&a[i % 2u], 4u);".to_owned(),
            "at different places",
        ),
        (
            "workgroupBarrier(); let x = coopLoadT<coop_mat16x16<f16, A>>(&a[0], 5u);".to_owned(),
            "multiples of 16 bytes",
        ),
        (
            "workgroupBarrier(); let x = coopLoadT<coop_mat16x16<f16, A>>(&a[80], 4u);".to_owned(),
            "of `a`, which has 512",
        ),
        ("a[i] = vec4<f16>(vec4<f32>(f32(i) * 0.1));".to_owned(), "a value as f16 that f16 does not have"),
    ] {
        let error = run(&body).expect_err(&body);
        assert!(error.contains(what), "{body}: {error}");
    }
}

/// An adapter with more than what the sheet of its kind says is given what it has.
#[test]
fn an_adapters_own_limits_count() {
    let mut sheet = DataSheet::named("webgpu").expect("a sheet");
    sheet.gpu.as_mut().expect("a GPU").threads_per_task = 1024;
    let text = "cascade norm[M, N = 4096](x: bf16[M, N]) -> (y: bf16[M, N]) {
         s[m] = sum(n) x[m,n] * x[m,n]
         y[m,n] = x[m,n] * rsqrt(s[m] / N + 0.5) }";
    let c = parse(text).expect("parses").cascades.remove(0);
    let target = Target::of(&sheet).expect("an adapter");
    let plan = wgsl_plan(&c, &target).expect("a plan");
    let mapping = model_gpu::choose(&plan, &sheet, None);
    let artifact = compile_wgsl(&plan, &mapping, &target).unwrap_or_else(|e| panic!("{e}"));
    let threads = artifact.launches.iter().filter_map(|l| l.gpu.as_ref()).map(|g| g.threads);
    assert!(threads.max().is_some_and(|t| t > 256), "more than the built-in sheet allows");
}

/// Products of few rows and of few columns at known sizes, by both layouts of the matrix, on an adapter of few
/// multiprocessors: sums meet once, in every variant.
#[test]
fn products_of_few_rows_agree() {
    let mut sheet = DataSheet::named("webgpu-nvidia").expect("a sheet");
    sheet.gpu.as_mut().expect("a GPU").multiprocessors = 2;
    let target = Target::of(&sheet).expect("an adapter");
    let text = |dtype: &str, right: &str, at: &str| {
        format!(
            "cascade mm[M, N, K](A: {dtype}[M, K], B: {dtype}{right}) -> (C: f32[M, N]) {{
                 C[m,n] = sum(k) A[m,k] * B{at} }}"
        )
    };
    for (dtype, right, at) in [("f32", "[K, N]", "[k,n]"), ("f16", "[K, N]", "[k,n]"), ("f16", "[N, K]", "[n,k]")] {
        let c = parse(&text(dtype, right, at)).expect("parses").cascades.remove(0);
        let plan = wgsl_plan(&c, &target).expect("a plan");
        for (m, n, k) in [(1, 128, 1024), (3, 64, 512), (3, 66, 515), (40, 2, 512)] {
            let mapping = model_gpu::choose(&plan, &sheet, Some(&[m, n, k]));
            assert!(!mapping.to_string().contains("atom "), "{mapping}");
            let artifact = compile_wgsl(&plan, &mapping, &target).unwrap_or_else(|e| panic!("{e}\n{mapping}"));
            let artifact = artifact.with_formulas(&c);
            // Sizes that the blocks divide, and others, which the last entry takes.
            for (m, n, k) in [(m, n, k), (m + 1, n + 1, k - 3)] {
                computes(&c, &artifact, sized(&[("M", m), ("N", n), ("K", k)]), 1)
                    .unwrap_or_else(|e| panic!("{dtype}{right} at {m}, {n}, {k}: {e}\n{mapping}"));
            }
        }
    }
}

/// Kernels as text, for what no mapping chosen asks for yet, with a cascade of what they compute.
#[test]
fn kernels_by_hand_agree() {
    // A variable bound in a block of a guarded run, before units meet.
    let nested = (
        "cascade c[M, N](x: f32[M, N]) -> (y: f32[M], z: f32[M]) {
             y[m] = sum(n) x[m,n]
             z[m] = sum(n) 2.0 * n }",
        "vars i, j
        global x: f32[M, N] = 0
        global y: f32[M] = 1 written
        global z: f32[M] = 2 written
        frag s: f32[] T[32@0.0]V[]L[]
        frag t: f32[] T[32@0.0]V[]L[]
        frag r: f32[32] T[32@0.1]V[]L[]
        role main: 4 warp {
            if unit < M {
                map t = 0.0
                map s = 0.0
                for i in 0..N {
                    let j = i * 2
                    map t = t[] + j
                }
                load r = x[unit, 0] walk [1] bounds [0 < N]
                reduce s = sum r over [0] bounds [0 < N] carry
                store y[unit] walk [] = s
                store z[unit] walk [] = t
            }
        }",
        [("M", 3), ("N", 9)],
    );
    // Two rows that one subgroup selects from, in a guarded run.
    let selected = (
        "cascade c[M, N](x: f32[M, N]) -> (value: f32[M], place: i32[M]) {
             (value[m], place[m]) = argmax(n) x[m,n] }",
        "global x: f32[M, N] = 0
        global value: f32[M] = 1 written
        global place: i32[M] = 2 written
        frag v: f32[2] T[32@0.0]V[2@0.1]L[]
        frag p: i32[2] T[32@0.0]V[2@0.1]L[]
        frag r: f32[2, 32] T[32@1.1]V[2@0.1]L[]
        role main: 4 warp {
            if 2 * unit < M {
                map v = -inf
                map p = -1
                load r = x[2 * unit, 0] walk [0, 1] bounds [0 < M - 2 * unit, 1 < N]
                reduce v, p = argmax r over [1] base 0 bounds [1 < N] carry
                store value[2 * unit] walk [0] = v bounds [0 < M - 2 * unit]
                store place[2 * unit] walk [0] = p bounds [0 < M - 2 * unit]
            }
        }",
        [("M", 7), ("N", 29)],
    );
    // Elements that change places.
    let turned = (
        "cascade c[M, N](x: f32[M, N]) -> (y: f32[N, M]) { y[n,m] = x[m,n] }",
        "global x: f32[M, N] = 0
        global y: f32[N, M] = 1 written
        frag r: f32[4, 4] T[32@0.0]V[4@0.1,4@1.1]L[]
        role main: 1 warp {
            load r = x[0, 0] walk [0, 1] bounds [0 < M, 1 < N]
            map r = r[1, 0]
            store y[0, 0] walk [0, 1] = r bounds [0 < N, 1 < M]
        }",
        [("M", 4), ("N", 3)],
    );
    for (cascade, kernel, sizes) in [nested, selected, turned] {
        let c = parse(cascade).expect("parses").cascades.remove(0);
        let plan = wgsl_plan(&c, &Target::generic()).expect("a plan");
        let text = format!(
            "module c {{\n    ranks M, N\n    kernel {} {{\n        grid [1]\n        {kernel}\n    }}\n}}\n",
            plan.kernels[0].name
        );
        let module = einfall_ir::kernel::parse::parse(&text).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
        for sheet in ["webgpu", "webgpu-nvidia"] {
            let target = Target::of(&DataSheet::named(sheet).expect("a sheet")).expect("an adapter");
            let artifact = print(&plan, &module, &target).unwrap_or_else(|e| panic!("{text}: {e}"));
            let shader = &modules(&artifact)[0].text;
            computes(&c, &artifact, sized(&sizes), 1).unwrap_or_else(|e| panic!("{sheet}: {e}\n{shader}"));
        }
    }
}

/// Rows, running sums, selections, contractions, joined writes and states that threads exchange in every step: every form of
/// kernel that meets, but streams of several operands.
const MEETING: [&str; 13] = [
    "argmax",
    "cumsum",
    "elman",
    "entropy",
    "gru",
    "histogram",
    "layernorm",
    "linear_gelu",
    "logsumexp",
    "lstm",
    "matmul",
    "rmsnorm",
    "softmax",
];

/// Where one barrier is taken out, invocations disturb each other at some sizes: each is needed.
#[test]
fn every_barrier_is_needed() {
    let (mut needed, mut kernels, mut idle) = (0, 0, Vec::new());
    for (name, c) in library::all().filter(|(name, _)| MEETING.iter().any(|m| name.starts_with(&format!("{m}/")))) {
        let Some(artifact) = compiled(&c, "webgpu") else { continue };
        let codes: Vec<naga::Module> = modules(&artifact).iter().map(|m| parsed(&m.text)).collect();
        // Barriers by kernel: those that nothing has shown to be needed, those that something has.
        let (mut open, mut shown) = (BTreeSet::new(), BTreeSet::new());
        let mut ran = false;
        for sizes in library::sizes(&c, MOST).take(TRIES) {
            ran = true;
            let b = bind(&c, &Given { sizes, ..Given::default() }).expect("sizes");
            let inputs = random(&c, &b, 7, Variant::Small).expect("inputs");
            let mut launch = Launch::new(&c, &b, &artifact, &inputs);
            for i in launch.chosen() {
                let before = launch.arrays.clone();
                let reached = launch.run(i, &codes[i], (1, 1), None).unwrap_or_else(|e| panic!("{name}: {e}"));
                for barrier in reached {
                    if shown.contains(&(i, barrier)) {
                        continue;
                    }
                    launch.arrays.clone_from(&before);
                    match launch.run(i, &codes[i], (1, 1), Some(barrier)) {
                        Err(_) => {
                            shown.insert((i, barrier));
                            open.remove(&(i, barrier));
                        }
                        Ok(_) => {
                            open.insert((i, barrier));
                        }
                    }
                }
                // What follows reads what this one leaves behind.
                launch.arrays = before;
                if artifact.launches.len() > 1 {
                    launch.run(i, &codes[i], (u64::MAX, 1), None).unwrap_or_else(|e| panic!("{name}: {e}"));
                }
            }
            if open.is_empty() {
                break;
            }
        }
        assert!(ran, "{name}: no sizes satisfy its facts");
        let of = |i: usize| open.iter().filter(|o| o.0 == i).count();
        idle.extend(
            (0..codes.len()).filter(|i| of(*i) > 0).map(|i| format!("{}: {}", artifact.launches[i].symbol, of(i))),
        );
        kernels += usize::from(!shown.is_empty());
        needed += shown.len();
    }
    println!("{needed} barriers of {kernels} cascades are needed");
    assert!(idle.is_empty(), "barriers that order nothing:\n{}", idle.join("\n"));
    assert!(needed > 20 && kernels == MEETING.len(), "{needed} barriers of {kernels} cascades");
}

#[test]
fn the_machine_finds_what_devices_may_do_differently() {
    let run = |body: &str| {
        let text = format!(
            "@group(0) @binding(1) var<storage, read_write> y: array<u32>;\nvar<workgroup> s: array<u32, 8>;\nvar<workgroup> a: atomic<u32>;\n\
             @compute @workgroup_size(8)\nfn f(@builtin(local_invocation_index) i: u32) {{\n{body}\n}}"
        );
        let module = parsed(&text);
        let mut machine = Machine::new(&module, &[Vec::new(), vec![7; 8]], 4);
        machine.run(0, [1, 1]).map(|()| machine.binding(1))
    };
    assert_eq!(run("s[i] = i * i; workgroupBarrier(); y[i] = s[7u - i];"), Ok(vec![49, 36, 25, 16, 9, 4, 1, 0]));
    assert_eq!(run("if (i > 3u) { y[i] = 1u; } else { y[i] = 2u; }"), Ok(vec![2, 2, 2, 2, 1, 1, 1, 1]));
    assert_eq!(
        run("for (var k = 0u; k < i; k++) { if (k == 2u) { break; } y[i] += k; }"),
        Ok(vec![7, 7, 8, 8, 8, 8, 8, 8])
    );
    assert_eq!(run("y[i] = subgroupShuffleXor(i, 1u);"), Ok(vec![1, 0, 3, 2, 5, 4, 7, 6]));
    let exchange = "loop { let o = atomicLoad(&a); if (atomicCompareExchangeWeak(&a, o, o + i).exchanged) { break; } }";
    let alone =
        format!("if (i == 3u) {{ atomicStore(&a, 2u); {exchange} }} workgroupBarrier(); y[i] = atomicLoad(&a);");
    assert_eq!(run(&alone), Ok(vec![5; 8]));
    for (body, what) in [
        (exchange, "of `a` while another touches it"),
        ("s[i] = i; y[i] = s[7u - i];", "reads word 7 of `s` while another touches it"),
        ("s[0] = i;", "writes word 0 of `s` while another touches it"),
        ("s[i] = i; storageBarrier(); y[i] = s[7u - i];", "reads word 7 of `s` while another touches it"),
        ("y[i] = 1u; workgroupBarrier(); y[7u - i] = 2u;", "of `y` while another touches it"),
        ("y[i + 1u] = i;", "word 8 of `y`, which has 8"),
        ("if (i > 3u) { workgroupBarrier(); }", "a barrier that not all invocations reach"),
        ("if (i > 0u) { y[i] = subgroupShuffleXor(i, 1u); }", "one that does not take part"),
    ] {
        let error = run(body).expect_err(body);
        assert!(error.contains(what), "{body}: {error}");
    }
}
