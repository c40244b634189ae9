//! WGSL of the library for every data sheet of an adapter: naga parses and validates each module, in the dialect that
//! browsers take too, and what has no WGSL is refused by name.

use einfall_autotune::model_gpu::choose;
use einfall_codegen::backend::wgsl::{Target, print};
use einfall_codegen::pipeline::{Context, Program};
use einfall_codegen::tables;
use einfall_ir::artifact::{Artifact, Code, Slot};
use einfall_ir::cascade::{Cascade, parse};
use einfall_ir::diag::Diagnostic;
use einfall_ir::kernel::atoms;
use einfall_ir::target::DataSheet;

/// A cascade as WGSL, by the rules for a sheet.
fn compiled(c: &Cascade, sheet: &DataSheet, target: &Target) -> Result<Artifact, String> {
    let says = |list: Vec<Diagnostic>| list[0].message.clone();
    let arrays = Some(target.storage_buffers as usize);
    let mut context = Context { atoms: atoms::multiply_adds().collect(), arrays, ..Context::default() };
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
    let sheet = DataSheet::named("webgpu").expect("a sheet");
    let target = Target::of(&sheet).expect("an adapter");
    let refused: Vec<String> =
        library().filter_map(|(name, c)| compiled(&c, &sheet, &target).err().map(|e| format!("{name}: {e}"))).collect();
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
    let without = text(&target.tint().without_subgroups());
    assert!(!without.contains("subgroup") && without.contains("exchange"));
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
