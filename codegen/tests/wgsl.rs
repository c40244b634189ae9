//! WGSL of the library for every data sheet of an adapter: naga parses and validates each module, in the dialect that
//! browsers take too, and what has no WGSL is refused by name.

use einfall_autotune::model_gpu::choose;
use einfall_codegen::backend::wgsl::{Target, print};
use einfall_codegen::pipeline::{Context, Program};
use einfall_codegen::tables;
use einfall_ir::artifact::{Artifact, Code, Slot};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::diag::Diagnostic;
use einfall_ir::target::DataSheet;

/// A cascade as WGSL, by the rules for a sheet.
fn compiled(c: &Cascade, sheet: &DataSheet, target: &Target) -> Result<Artifact, String> {
    let says = |list: Vec<Diagnostic>| list[0].message.clone();
    let arrays = Some(target.storage_buffers as usize);
    let mut context = Context { atoms: target.atoms(), arrays, ..Context::default() };
    let mut program = Program::Cascade(c.clone());
    for pass in tables::TO_TILE {
        program = (pass.step)(program, &context).map_err(says)?;
    }
    let Program::Tile(mut plan) = program else { panic!("no plan") };
    context.mapping = Some(choose(&plan, sheet, None));
    let mut program = Program::Tile(plan.clone());
    for pass in tables::GPU {
        program = (pass.step)(program, &context).map_err(says)?;
        if let Program::Tile(p) = &program {
            plan = p.clone();
        }
    }
    let Program::Kernel(module) = program else { panic!("no kernels") };
    print(&plan, &module, target).map_err(|e| e.diagnostic().message)
}

fn library() -> impl Iterator<Item = (String, Cascade)> {
    einfall_kernels::SOURCES.iter().flat_map(|(file, text)| {
        let of = |c: Cascade| (format!("{file}/{}", c.name), c);
        parse(text).expect("library files parse").cascades.into_iter().map(of).collect::<Vec<_>>()
    })
}

fn validate(text: &str) -> Result<(), String> {
    use naga::valid::{Capabilities, ValidationFlags, Validator};
    let module = naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    validator.subgroup_stages(naga::valid::ShaderStages::all());
    validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    validator.validate(&module).map(|_| ()).map_err(|e| e.emit_to_string(text))
}

#[test]
fn naga_takes_every_module_of_the_library() {
    let sheets: Vec<DataSheet> = DataSheet::all().into_iter().filter(|s| s.webgpu.is_some()).collect();
    assert!(sheets.len() >= 6);
    let mut taken = 0;
    for sheet in &sheets {
        let target = Target::of(sheet).expect("an adapter");
        for (name, c) in library() {
            // The list of what is refused is compared below.
            let Ok(artifact) = compiled(&c, sheet, &target) else { continue };
            let Code::Wgsl { modules } = &artifact.code else { panic!("no WGSL") };
            assert_eq!(modules.len(), artifact.launches.len(), "{name}");
            for (m, launch) in modules.iter().zip(&artifact.launches) {
                validate(&m.text).unwrap_or_else(|e| panic!("{name} for {}:\n{e}\n{}", sheet.name, m.text));
                let bases = launch.slots.iter().filter(|s| matches!(s, Slot::Base(_))).count();
                assert_eq!(m.text.matches("var<storage").count(), bases, "{name}");
                assert!(m.text.contains(&format!("fn {}(", launch.symbol)));
                assert!(m.subgroup == 1 || m.text.contains("subgroupShuffleXor"), "{name}");
                let gpu = launch.gpu.as_ref().expect("a GPU's launch");
                assert!(gpu.shared_bytes <= target.workgroup_bytes && u64::from(gpu.threads) <= target.invocations);
                taken += 1;
            }
        }
    }
    assert!(taken > 500, "{taken}");
}

#[test]
fn what_has_no_wgsl_is_refused_by_name() {
    let mut refused = Vec::new();
    for sheet in DataSheet::all().iter().filter(|s| s.webgpu.is_some()) {
        let target = Target::of(sheet).expect("an adapter");
        let of = |(name, c): (String, Cascade)| Some((name, compiled(&c, sheet, &target).err()?));
        refused.extend(library().filter_map(of).map(|(name, e)| format!("{}: {name}: {e}", sheet.name)));
    }
    as_it_is(&refused);
}

/// The list as it is now; a line more is a step back, a line less is to be taken out (`BLESS=1` writes it).
fn as_it_is(refused: &[String]) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/wgsl_refused.txt");
    let found = refused.iter().map(|line| format!("{line}\n")).collect::<String>();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &found).expect("the list is written");
    }
    assert_eq!(found, std::fs::read_to_string(path).expect("the list"), "\n{found}");
}

#[test]
fn tint_is_told_of_subgroups_and_naga_is_not() {
    let sheet = DataSheet::named("webgpu-nvidia").expect("a sheet");
    let (_, c) = library().find(|(n, _)| n.ends_with("/softmax")).expect("softmax");
    let text = |target: &Target| match compiled(&c, &sheet, target).expect("compiles").code {
        Code::Wgsl { modules } => modules.into_iter().map(|m| m.text).collect::<String>(),
        _ => panic!("no WGSL"),
    };
    let target = Target::of(&sheet).expect("an adapter");
    let (naga, tint) = (text(&target), text(&target.clone().tint()));
    assert!(naga.contains("subgroupShuffleXor") && !naga.contains("enable"));
    assert!(tint.contains("enable subgroups;\n"));
    assert_eq!(naga, tint.replace("enable subgroups;\n", ""));
    let without = text(&target.clone().tint().without_subgroups());
    assert!(!without.contains("subgroup") && without.contains("exchange"));
    // What a caller calls his arrays does not count.
    let named = one("cascade c[M](subgroup: f32[M]) -> (y: f32[M]) { y[m] = 2.0 * subgroup[m] }");
    let Code::Wgsl { modules } = compiled(&named, &sheet, &target.tint()).expect("compiles").code else {
        panic!("no WGSL")
    };
    assert!(modules.iter().all(|m| m.subgroup == 1 && m.text.contains("subgroup") && !m.text.contains("enable")));
}

/// In memory of another run time arrays come first, all writable, then the words; every binding is used, so that a layout
/// can be derived; what is computed is the same.
#[test]
fn pooled_bindings_are_arrays_then_words_and_all_are_used() {
    use naga::valid::{Capabilities, GlobalUse, ValidationFlags, Validator};
    let sheet = DataSheet::named("webgpu").expect("a sheet");
    let target = Target::of(&sheet).expect("an adapter");
    let (mut taken, mut wordless) = (0, 0);
    for (name, c) in library() {
        let Ok(own) = compiled(&c, &sheet, &target) else { continue };
        let pooled = compiled(&c, &sheet, &target.clone().pooled()).expect("what has WGSL has it for both");
        let (Code::Wgsl { modules: own }, Code::Wgsl { modules }) = (&own.code, &pooled.code) else {
            panic!("no WGSL")
        };
        for ((m, own), launch) in modules.iter().zip(own).zip(&pooled.launches) {
            let from = |text: &str| text[text.find("@compute").expect("an entry")..].to_owned();
            assert_eq!(from(&m.text), from(&own.text), "{name}");
            let module = naga::front::wgsl::parse_str(&m.text).unwrap_or_else(|e| panic!("{name}: {e:?}"));
            let info = Validator::new(ValidationFlags::all(), Capabilities::all()).validate(&module).expect("valid");
            let bases = launch.slots.iter().filter(|s| matches!(s, Slot::Base(_))).count();
            let mut bound: Vec<(u32, bool)> = Vec::new();
            for (id, variable) in module.global_variables.iter() {
                let Some(place) = &variable.binding else { continue };
                assert_ne!(info.get_entry_point(0)[id], GlobalUse::empty(), "{name}: {variable:?}");
                let writable = naga::StorageAccess::LOAD | naga::StorageAccess::STORE;
                let array = match variable.space {
                    naga::AddressSpace::Storage { access } => access == writable,
                    _ => false,
                };
                bound.push((place.binding, array));
            }
            bound.sort_unstable();
            let words = launch.slots.len() > bases;
            let expected = (0..bases as u32 + u32::from(words)).map(|i| (i, i < bases as u32));
            assert_eq!(bound, expected.collect::<Vec<_>>(), "{name}:\n{}", m.text);
            (taken, wordless) = (taken + 1, wordless + usize::from(!words));
        }
    }
    assert!(taken > 80, "{taken}");
    println!("{taken} modules, {wordless} without words");
}

fn one(text: &str) -> Cascade {
    parse(text).expect("parses").cascades.remove(0)
}

#[test]
fn scalars_and_numbers_that_no_word_holds_are_refused_by_name() {
    let sheet = DataSheet::named("webgpu").expect("a sheet");
    let target = Target::of(&sheet).expect("an adapter");
    for (text, what) in [
        ("cascade c[M](x: f32[M], k: f64) -> (y: f32[M]) { y[m] = k * x[m] }", "`k` of f64, which WGSL does not have"),
        ("cascade c[M](x: i32[M], k: i64) -> (y: i32[M]) { y[m] = k + x[m] }", "`k` of i64, which WGSL does not have"),
        ("cascade c[M](x: i32[M]) -> (y: i32[M]) { y[m] = x[m] + 3000000000 }", "an integer constant beyond 32 bits"),
    ] {
        let e = compiled(&one(text), &sheet, &target).expect_err(text);
        assert!(e.contains(what), "{text}: {e}");
    }
}

/// Rows of a known extent take no more threads than a task may have.
#[test]
fn rows_of_known_extents_keep_within_a_task() {
    for sheet in DataSheet::all().iter().filter(|s| s.webgpu.is_some()) {
        let target = Target::of(sheet).expect("an adapter");
        for n in [512, 4096, 8192, 65536] {
            for dtype in ["f32", "bf16", "i8"] {
                let c = one(&format!(
                    "cascade norm[M, N = {n}](x: {dtype}[M, N]) -> (y: {dtype}[M, N]) {{
                         s[m] = sum(n) x[m,n] * x[m,n]
                         y[m,n] = {dtype}(x[m,n] * rsqrt(s[m] / N + 0.5)) }}"
                ));
                let artifact = compiled(&c, sheet, &target).unwrap_or_else(|e| panic!("{n} {dtype}: {e}"));
                let threads = artifact.launches.iter().filter_map(|l| l.gpu.as_ref()).map(|g| u64::from(g.threads));
                assert!(threads.max().is_some_and(|t| t <= target.invocations), "{n} {dtype} for {}", sheet.name);
            }
        }
    }
}

/// What a fragment's type has rounded is stored as it is, and rows of whole blocks have no masks; rows of other extents do.
#[test]
fn narrow_rows_are_rounded_once_and_masked_where_they_end() {
    let sheet = DataSheet::named("webgpu-nvidia").expect("a sheet");
    let target = Target::of(&sheet).expect("an adapter");
    for (dtype, n, masks) in [("bf16", 4096, false), ("f16", 4096, false), ("bf16", 4000, true)] {
        let c = one(&format!(
            "cascade norm[M, N = {n}](x: {dtype}[M, N]) -> (y: {dtype}[M, N]) {{
                 s[m] = sum(n) x[m,n] * x[m,n]
                 y[m,n] = x[m,n] * rsqrt(s[m] / N + 0.5) }}"
        ));
        let artifact = compiled(&c, &sheet, &target).unwrap_or_else(|e| panic!("{n} {dtype}: {e}"));
        let Code::Wgsl { modules } = &artifact.code else { panic!("no WGSL") };
        let main = modules[0].text.split("@compute").nth(1).expect("an entry point");
        let (round, bits) = if dtype == "bf16" { ("round_bf16(", "bf16_bits(") } else { ("as_f16(", "f16_bits(") };
        assert_eq!((main.matches(round).count(), main.matches(bits).count()), (32, 0), "{n} {dtype}:\n{main}");
        assert_eq!(main.contains("select("), masks, "{n} {dtype}:\n{main}");
    }
}

#[test]
fn limits_are_named() {
    let sheet = DataSheet::named("webgpu-nvidia").expect("a sheet");
    let (_, c) = library().find(|(n, _)| n.ends_with("/matmul")).expect("matmul");
    let target = Target::of(&sheet).expect("an adapter");
    let says = |target: Target| compiled(&c, &sheet, &target).expect_err("refused");
    let e = says(Target { workgroup_bytes: 1024, ..target.clone() });
    assert!(e.contains("bytes of workgroup memory: `maxComputeWorkgroupStorageSize` of webgpu-nvidia is 1024"), "{e}");
    let e = says(Target { invocations: 64, ..target.clone() });
    assert!(e.contains("`maxComputeInvocationsPerWorkgroup` of webgpu-nvidia is 64"), "{e}");
    let e = says(Target { storage_buffers: 2, ..target });
    assert!(e.contains("3 storage buffers: `maxStorageBuffersPerShaderStage` of webgpu-nvidia is 2"), "{e}");
}
