//! Packed 4-bit tensors against the evaluator, which unpacks by itself: read, written and updated in place, in either
//! order, at odd extents; through LLVM, as PTX and as WGSL. What packs or extends wrongly is caught.

mod assembler;
mod common;
mod machine;

use common::{Split, compile, isas, run};
use einfall_autotune::model_gpu;
use einfall_codegen::backend::{ptx, wgsl};
use einfall_codegen::lower::gpu;
use einfall_codegen::pipeline::{self, Context, Program, Stop};
use einfall_codegen::tables;
use einfall_ir::array::Array;
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::cascade::bind::{Bindings, Given, bind};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::diag::Diagnostic;
use einfall_ir::dtype::DType;
use einfall_ir::kernel::atoms;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{BufferKind, Plan};
use einfall_ir::tolerance::{Expected, expect, inputs};

/// Everything that is done with packed tensors: the rank K is packed.
const TEXTS: &[(&str, &str)] = &[
    ("copied", "(w: i4[N,K] packed(low)) -> (y: i8[N,K]) { y[n,k] = w[n,k] }"),
    ("copied_high", "(w: u4[N,K] packed(high)) -> (y: f32[N,K]) { y[n,k] = f32(w[n,k]) }"),
    ("transposed", "(w: i4[N,K] packed(high)) -> (y: i8[K,N]) { y[k,n] = w[n,k] }"),
    ("row_sums", "(w: u4[N,K] packed(low)) -> (y: i32[N]) { y[n] = sum(k) w[n,k] }"),
    ("column_sums", "(w: i4[N,K] packed(low)) -> (y: i32[K]) { y[k] = sum(n) w[n,k] }"),
    (
        "right",
        "(x: f32[N,K], w: i4[N,K] packed(low), s: f32[N,ceildiv(K,4)]) -> (y: f32[N,N]) {
            y[m,n] = sum(k) x[m,k] * (w[n,k] * s[n,k/4])
        }",
    ),
    ("left", "(x: f32[N,N], w: i4[N,K] packed(high)) -> (y: f32[N,K]) { y[m,k] = sum(n) x[m,n] * w[n,k] }"),
    ("reversed", "(w: i4[N,K] packed(low)) -> (y: i8[N,K]) { y[n,k] = w[n,K-1-k] }"),
    ("gathered", "(w: u4[N,K] packed(low), i: i32[N]) -> (y: i8[N]) { y[n] = w[n,i[n]] }"),
    ("beyond", "(w: i4[N,K] packed(low)) -> (y: i8[N]) { y[n] = w[n,5] }"),
    ("indices", "(w: u4[K] packed(low), x: f32[N,16]) -> (y: f32[N,K]) { y[n,k] = x[n,w[k]] }"),
    (
        "literals",
        "(w: i4[N,K,3] packed(high)) -> (y: i32[N,K]) { y[n,k] = w[n,k,0] + 100 * w[n,k,1] + 10000 * w[n,k,2] }",
    ),
    ("filtered", "(w: i4[N,K] packed(low)) -> (y: i32[N]) { y[n] = max(k) w[n,k]  where w[n,k] % 2 == 1 and k <= n }"),
    ("cast", "(x: f32[N,K]) -> (y: i32[N,K], z: i32[N,K]) { y[n,k] = i4(4.0 * x[n,k]); z[n,k] = u4(8.0 * x[n,k]) }"),
    ("kept", "(x: f32[N,K]) -> (y: i32[N]) { t[n,k]: i4 = i4(6.0 * x[n,k]); y[n] = sum(k) t[n,k] }"),
    ("stored", "(x: f32[N,K]) -> (q: i4[N,K] packed(low)) { q[n,k] = i4(round(4.0 * x[n,k])) }"),
    ("stored_high", "(x: f32[N,K]) -> (q: u4[N,K] packed(high)) { q[n,k] = u4(8.0 + 4.0 * x[n,k]) }"),
    ("repacked", "(w: i4[N,K] packed(low)) -> (q: i4[K,N] packed(high)) { q[k,n] = w[n,k] }"),
    (
        "quantised",
        "(x: f32[N,K]) -> (q: i4[N,K] packed(low), s: f32[N], back: f32[N,K]) {
            s[n] = max((max(k) abs(x[n,k])) / 7.0, 0.001)
            q[n,k] = i4(round(x[n,k] / s[n]))
            back[n,k] = q[n,k] * s[n]
        }",
    ),
    ("partial", "(w: i4[N,K] packed(low)) -> (q: i4[N,K] packed(low)) { q[n,k] = w[n,k]  where k <= n  else -3 }"),
    (
        "stepped",
        "(x: i4[K,N] packed(low)) -> (q: i4[K,N] packed(low), y: i8[N] = h[K]) {
            iter t in K {
                h[0,n] = i8(1)
                q[t,n] = i4(h[t,n] + x[t,n])
                h[t+1,n] = i8(max(min(h[t,n] - x[t,n], 100), -100))
            }
        }",
    ),
    (
        "appended",
        "(inout cache: i4[N,K] packed(low), row: f32[K], at: i32) -> (before: i32[N]) {
            before[n] = sum(k) cache[n,k]
            cache[at,k] = i4(round(3.0 * row[k]))
        }",
    ),
    (
        "negated_in_place",
        "(inout cache: i4[N,K] packed(high)) -> (after: i32[N]) {
            cache[n,k] = i4(0 - cache[n,k])  where n % 2 == 1
            after[n] = sum(k) cache[n,k]
        }",
    ),
];

fn cascade(name: &str, text: &str) -> Cascade {
    let text = format!("cascade {name}[N, K]{text}");
    parse(&text).unwrap_or_else(|d| panic!("{}", d.render(name))).cascades.remove(0)
}

fn planned(c: &Cascade, context: &Context) -> Result<Plan, Vec<Diagnostic>> {
    match pipeline::run(tables::TO_TILE, tables::FORMS, Program::Cascade(c.clone()), context, None) {
        Ok(records) => match records.into_iter().next_back().map(|r| r.program) {
            Some(Program::Tile(plan)) => Ok(plan),
            other => panic!("{other:?}"),
        },
        Err((_, Stop::Refused { diagnostics, .. })) => Err(diagnostics),
        Err((_, stop)) => panic!("{}: {stop}", c.name),
    }
}

fn formed(c: &Cascade) -> Plan {
    planned(c, &Context::default()).unwrap_or_else(|d| panic!("{}: {d:?}", c.name))
}

/// What a cascade gives, in float64, of inputs as they are stored.
struct Case {
    b: Bindings,
    given: Vec<Array>,
    want: Vec<Expected>,
}

fn case(c: &Cascade, n: u64, k: u64, seed: u64) -> Case {
    let sizes = vec![("N".to_string(), n), ("K".to_string(), k)];
    let b = bind(c, &Given { sizes, ..Given::default() }).unwrap_or_else(|e| panic!("{}: {e}", c.name));
    let given = inputs::random(c, &b, seed, inputs::Variant::Normal).unwrap();
    let want = expect(c, &b, &given, &eval::Options::default()).unwrap_or_else(|e| panic!("{}: {e}", c.name));
    Case { b, given, want }
}

/// Extents around bytes, vectors and rows.
const SIZES: [(u64, u64); 7] = [(1, 1), (3, 2), (2, 3), (5, 7), (4, 16), (7, 33), (33, 65)];

/// Whether a plan's compiled code gives what the case wants; the first difference.
fn differs(plan: &Plan, case: &Case, isa: &einfall_codegen::backend::llvm::Isa) -> Option<String> {
    let compiled = compile(plan, isa).unwrap_or_else(|e| panic!("{}\n{plan}", e.what));
    for split in [Split::Whole, Split::Each] {
        let got = run(&compiled, &case.b.extents, &case.given, split);
        let written = |k: BufferKind| matches!(k, BufferKind::Output | BufferKind::InOut);
        let names = compiled.artifact.buffers.iter().filter(|(_, b)| written(b.kind)).map(|(_, b)| &b.name);
        assert_eq!(got.len(), case.want.len());
        for (name, g) in names.zip(&got) {
            let w = case.want.iter().find(|w| w.name == *name).expect("a result");
            if let Err(e) = w.compare(&w.elements(g)) {
                return Some(e.to_string());
            }
        }
    }
    None
}

#[test]
fn processors_agree_with_the_evaluator() {
    for (name, text) in TEXTS {
        let c = cascade(name, text);
        let plan = formed(&c);
        for (seed, (n, k)) in SIZES.into_iter().enumerate() {
            let case = case(&c, n, k, seed as u64);
            for isa in if seed == 3 { isas() } else { isas()[..1].to_vec() } {
                let wrong = differs(&plan, &case, &isa);
                assert!(wrong.is_none(), "{name} [{n}, {k}]: {}\n{plan}", wrong.unwrap_or_default());
            }
        }
    }
}

/// Extents that the text fixes, odd and even.
#[test]
fn fixed_extents_agree_with_the_evaluator() {
    for (name, text) in TEXTS {
        for k in [7, 8] {
            let mut c = cascade(name, text);
            let rank = c.rank("K").expect("a rank");
            c.ranks[rank].fixed = Some(k);
            let case = case(&c, 3, k, k);
            let wrong = differs(&formed(&c), &case, &isas()[0]);
            assert!(wrong.is_none(), "{name} [3, {k}]: {}", wrong.unwrap_or_default());
        }
    }
}

/// The half byte behind a row of odd extent: whatever it holds is not read, and what is written there is 0.
#[test]
fn the_unused_half_byte_is_not_read() {
    for (name, text) in TEXTS.iter().filter(|(_, t)| t.contains("w: i4[N,K]") || t.contains("w: u4[N,K]")) {
        let c = cascade(name, text);
        let mut case = case(&c, 3, 5, 11);
        let low = text.contains("w: i4[N,K] packed(low)") || text.contains("w: u4[N,K] packed(low)");
        let at = c.params.iter().position(|p| c.tensors[*p].name == "w").expect("a parameter");
        for (i, byte) in case.given[at].data.iter_mut().enumerate().filter(|(i, _)| i % 3 == 2) {
            let filled = *byte as u64 | if low { 0xf0 } else { 0x0f };
            assert_ne!(filled as f64, *byte, "{name}: byte {i} was full");
            *byte = filled as f64;
        }
        let wrong = differs(&formed(&c), &case, &isas()[0]);
        assert!(wrong.is_none(), "{name}: {}", wrong.unwrap_or_default());
    }
    let c = cascade("stored", "(x: f32[N,K]) -> (q: i4[N,K] packed(low)) { q[n,k] = i4(-1) + i4(0.0 * x[n,k]) }");
    let case = case(&c, 2, 3, 1);
    let compiled = compile(&formed(&c), &isas()[0]).unwrap_or_else(|e| panic!("{}", e.what));
    let bytes = &run(&compiled, &case.b.extents, &case.given, Split::Whole)[0];
    assert_eq!(bytes.data, [255.0, 15.0, 255.0, 15.0]);
}

/// Code of a text that means something else does not pass for this one: the other order, the other sign, a neighbour.
#[test]
fn planted_faults_are_caught() {
    let isa = &isas()[0];
    let mut planted = 0;
    for (name, text) in TEXTS {
        let c = cascade(name, text);
        let case = case(&c, 5, 7, 3);
        for (from, to) in [
            ("packed(low)", "packed(high)"),
            ("packed(high)", "packed(low)"),
            ("w: i4", "w: u4"),
            ("w: u4", "w: i4"),
            ("w[n,k]", "w[n,k-1]"),
            ("q[n,k] = i4(", "q[n,k] = i4(1.0 + "),
            ("i4(", "i8("),
        ] {
            if !text.contains(from) || (from == "i4(" && *name != "cast") {
                continue;
            }
            let bad = formed(&cascade(name, &text.replace(from, to)));
            planted += 1;
            // A byte turned round both where it is read and where it is written is the same byte.
            assert!(differs(&bad, &case, isa).is_some(), "{name}: `{from}` → `{to}` is not noticed");
        }
    }
    assert!(planted > 25, "{planted}");
}

/// What is packed where bytes are not whole, or scaled by blocks, is refused with what to write instead.
#[test]
fn what_is_refused_says_what_to_write() {
    for (text, what, help) in [
        (
            "(inout cache: i4[N,K] packed(low), at: i32[N], v: i4[N] packed(low)) -> () { cache[n,at[n]] = v[n] }",
            "writing `cache`, packed along its last axis K, at part of that axis",
            "let an index over all of K stand alone there, or declare `cache` i8",
        ),
        (
            "(inout cache: i4[N,K] packed(low)) -> () { cache[n,k] = i4(1)  where k <= n }",
            "writing `cache`, packed along its last axis K, at part of that axis",
            "let an index over all of K stand alone there, or declare `cache` i8",
        ),
        (
            "(x: i4[N,K] packed(low)) -> (y: i4[N] packed(low)) { y[n / 2] += x[n,0] }",
            "joined writes to i4 elements of `y`",
            "write an i8 tensor there, and assign the packed one from it in a statement of its own",
        ),
        (
            "(x: i8[N,K] scaled(f32, 32)) -> (y: f32[N,K]) { y[n,k] = f32(x[n,k]) }",
            "block-scaled storage of `x`",
            "give the scales as an input of their own and multiply: `w[n,k] * scale[n,k/32]`",
        ),
        (
            "(x: f32[N,K]) -> (y: f8e4m3[N,K] scaled(f32, 32)) { y[n,k] = x[n,k] }",
            "block-scaled storage of `y`",
            "give the scales as an input of their own and multiply: `w[n,k] * scale[n,k/32]`",
        ),
    ] {
        let said = planned(&cascade("refused", text), &Context::default()).expect_err(text).remove(0);
        assert!(said.message.contains(what), "{text}: {said:?}");
        assert!(said.help.iter().any(|h| h == help), "{text}: {said:?}");
    }
}

/// The kernels of a GPU by the model's mapping; none where it has none.
fn on_gpu(c: &Cascade, context: Context, sheet: &DataSheet) -> Result<(Plan, einfall_ir::kernel::Module), String> {
    let says = |d: Vec<Diagnostic>| d[0].message.clone();
    let plan = planned(c, &context).map_err(says)?;
    let mapping = model_gpu::choose(&plan, sheet, None);
    let split = gpu::split_streams::run(&plan, &mapping, 132).map_err(|d| d.message)?;
    let module = gpu::lower(&split, &mapping).map_err(says)?;
    Ok((split, module))
}

/// PTX goes through NVIDIA's assembler, and what it computes in the tests' machine is what the text means.
#[test]
fn ptx_agrees_with_the_evaluator() {
    let mut taken = 0;
    for (name, text) in TEXTS {
        let c = cascade(name, text);
        let context = Context { atoms: atoms::all().collect(), ..Context::default() };
        let (plan, module) = match on_gpu(&c, context, &DataSheet::h100()) {
            Ok(made) => made,
            Err(e) => {
                println!("{name}: {e}");
                continue;
            }
        };
        let artifact: Artifact =
            ptx::print(&plan, &module, &ptx::Target::sm_90a()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let Code::Ptx { text, .. } = &artifact.code else { panic!("no PTX") };
        // How many elements a thread holds is the mapping's; what they cost in registers is measured elsewhere.
        let spills =
            |log: &str| log.lines().filter(|l| l.contains("error")).all(|l| l.contains("Registers are spilled"));
        if let Err(log) = assembler::assemble(text, "sm_90a") {
            assert!(spills(&log), "{name}:\n{log}\n{text}");
        }
        for (n, k) in [(5, 7), (3, 16)] {
            let case = case(&c, n, k, 5);
            let got = machine::launch::execute(&artifact, &case.b.extents, &case.given);
            let outputs: Vec<_> = plan.buffers.iter().filter(|(_, b)| machine::launch::written(b.kind)).collect();
            assert!(!got.is_empty() && outputs.len() == got.len(), "{name}");
            for ((_, b), data) in outputs.into_iter().zip(got) {
                let dims = b.dims.iter().map(|d| d.eval(&case.b.extents).expect("an extent")).collect();
                let w = case.want.iter().find(|w| w.name == b.name).expect("an output");
                let got = w.elements(&Array { dtype: b.dtype, dims, data });
                w.compare(&got).unwrap_or_else(|e| panic!("{name} [{n}, {k}]: {e}\n{plan}"));
            }
        }
        taken += 1;
    }
    assert!(taken > 15, "{taken}");
}

/// WGSL is what naga takes.
#[test]
fn wgsl_is_valid() {
    let sheet = DataSheet::named("webgpu-nvidia").expect("a sheet");
    let target = wgsl::Target::of(&sheet).expect("an adapter");
    let mut taken = 0;
    for (name, text) in TEXTS {
        let c = cascade(name, text);
        let arrays = Some(target.storage_buffers as usize);
        let context = Context { atoms: atoms::multiply_adds().collect(), arrays, ..Context::default() };
        let made = on_gpu(&c, context, &sheet);
        let printed = made.and_then(|(plan, m)| wgsl::print(&plan, &m, &target).map_err(|e| e.to_string()));
        let artifact = match printed {
            Ok(a) => a,
            Err(e) => {
                println!("{name}: {e}");
                continue;
            }
        };
        let Code::Wgsl { modules } = &artifact.code else { panic!("no WGSL") };
        for m in modules {
            let parsed =
                naga::front::wgsl::parse_str(&m.text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&m.text)));
            let mut validator =
                naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
            validator.subgroup_stages(naga::valid::ShaderStages::all());
            validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
            validator.validate(&parsed).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&m.text)));
        }
        taken += 1;
    }
    assert!(taken > 15, "{taken}");
}

/// Nothing is of a 4-bit type once storage is unpacked.
#[test]
fn plans_have_no_packed_types() {
    for (name, text) in TEXTS {
        let plan = formed(&cascade(name, text));
        let narrow = |d: DType| d.is_packed();
        assert!(!plan.buffers.iter().any(|(_, b)| narrow(b.dtype)), "{name}\n{plan}");
        let tiles = plan.kernels.iter().flat_map(|k| k.tiles.iter().map(|(_, t)| t.dtype));
        assert!(!tiles.into_iter().any(narrow), "{name}\n{plan}");
        assert!(!plan.to_string().contains("i4(") && !plan.to_string().contains("u4("), "{name}\n{plan}");
    }
}
