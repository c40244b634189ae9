//! From a cascade to WGSL that another framework launches on a device and memory of its own.
//!
//! [`compile`] makes an artifact whose modules are bound as [`Bindings::Pooled`](wgsl::Bindings) says;
//! [`load`](einfall_runtime::shaders::load) checks it against the framework's adapter and says what each launch runs.
//! Invariant: nothing here opens a device; no crate of a device's implementation is needed.
//!
//! ```
//! use einfall::runtime::shaders::{Adapter, Arguments, Held, load};
//! use einfall::{CompileOptions, ir, shaders};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let text = "cascade scale[M, N](x: f32[M, N], k: f32 = 2.0) -> (y: f32[M, N]) { y[m,n] = k * x[m,n] }";
//! let cascade = ir::cascade::parse(text).expect("a correct cascade").cascades.remove(0);
//! // What the framework says of its device.
//! let adapter = Adapter {
//!     name: "a GPU".to_owned(), driver: String::new(), backend: String::new(), software: false, subgroup: (0, 0),
//!     f16: false, timestamps: false, workgroup_bytes: 16 << 10, invocations: 256, binding_bytes: 128 << 20,
//!     buffer_bytes: 256 << 20, storage_buffers: 8, workgroups: 65_535, matrices: Vec::new(),
//! };
//! let artifact = shaders::compile(&cascade, &shaders::data_sheet(&adapter), &CompileOptions::default())?;
//! let bound = load(artifact, &adapter)?.bind(&[("M", 3), ("N", 5)])?;
//! let held = |first| Held {
//!     dtype: ir::dtype::DType::F32, shape: vec![3, 5], strides: vec![5, 1], first, bytes: 60,
//! };
//! let arguments = Arguments::new().input("x", &held(0)).output("y", &held(256));
//! let run = bound.dispatches(&arguments)?;
//! assert_eq!(run.kernels[0].arrays, ["x", "y"]);
//! println!("{} on {:?} workgroups", run.kernels[0].module.text, run.kernels[0].grid);
//! # Ok(())
//! # }
//! ```

use einfall_autotune::table::{Kind, Table};
use einfall_autotune::{model_gpu, tune};
use einfall_codegen::backend::wgsl;
use einfall_ir::artifact::Artifact;
use einfall_ir::cascade::Cascade;
use einfall_ir::dtype::DType;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_runtime::shaders::Adapter;

use crate::lowering::{CompileOptions, Error, compile_wgsl, wgsl_plan, with_statics};

/// The data sheet of an adapter: the built-in one of its maker, with the adapter's own limits.
pub fn data_sheet(adapter: &Adapter) -> DataSheet {
    let name = format!("{} {}", adapter.name, adapter.driver).to_lowercase();
    let kinds: [(&[&str], &str); 5] = [
        (&["llvmpipe", "lavapipe", "swiftshader"], "lavapipe"),
        (&["nvidia", "geforce", "tesla"], "webgpu-nvidia"),
        (&["amd", "radeon", "radv"], "webgpu-amd"),
        (&["intel"], "webgpu-intel"),
        (&["apple"], "webgpu-apple"),
    ];
    let kind = kinds.iter().find(|(words, _)| words.iter().any(|w| name.contains(w))).map_or("webgpu", |k| k.1);
    let mut sheet = DataSheet::named(kind).expect("a built-in sheet");
    if let Some(g) = &mut sheet.gpu {
        g.shared_per_task = adapter.workgroup_bytes;
        g.threads_per_task = adapter.invocations;
    }
    if let Some(w) = &mut sheet.webgpu {
        w.subgroup = if w.subgroup > 1 { u64::from(adapter.subgroup.0).max(1) } else { 1 };
        w.storage_buffers = adapter.storage_buffers;
        w.binding_bytes = adapter.binding_bytes;
        w.matrices = adapter.products();
    }
    // The peak of f16 is that of products of matrices: without them f16 is computed as f32.
    if sheet.webgpu.as_ref().is_some_and(|w| w.matrices.is_empty())
        && let Some(plain) = sheet.peak_of(DType::F32)
    {
        sheet.peak.iter_mut().filter(|(n, _)| n == DType::F16.name()).for_each(|(_, p)| *p = p.min(plain));
    }
    sheet
}

fn target(sheet: &DataSheet) -> wgsl::Target {
    wgsl::Target::of(sheet).unwrap_or_else(wgsl::Target::generic).pooled()
}

/// Compiles a cascade for every size, by the mapping given or the model's for this sheet.
///
/// # Errors
/// [`Error::Refused`] where something has no lowering or no WGSL, [`Error::Size`] for a rank that is not there or is fixed
/// otherwise.
pub fn compile(cascade: &Cascade, sheet: &DataSheet, options: &CompileOptions) -> Result<Artifact, Error> {
    let cascade = with_statics(cascade, &options.statics)?;
    let target = target(sheet);
    let plan = wgsl_plan(&cascade, &target)?;
    let none = Table::new(Kind::Cuda, &sheet.name);
    let mapping = options.choose(&plan, &none, |sizes| model_gpu::choose(&plan, sheet, sizes));
    Ok(compile_wgsl(&plan, &mapping, &target)?.with_formulas(&cascade))
}

/// At most `k` mappings of a cascade to measure, at the sizes of `options`: the model's cheapest for the sheet first, then
/// what it would choose for adapters of other kinds. Each with its artifact; those that do not fit the adapter are left out;
/// all of them serve every size.
///
/// # Errors
/// As [`compile`], where no mapping is left; [`Error::Size`] where a rank has no size.
pub fn candidates(
    cascade: &Cascade,
    sheet: &DataSheet,
    options: &CompileOptions,
    k: usize,
) -> Result<Vec<(Mapping, Artifact)>, Error> {
    let cascade = with_statics(cascade, &options.statics)?;
    let target = target(sheet);
    let plan = wgsl_plan(&cascade, &target)?;
    let size = |name: &str| options.sizes.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
    let sizes = plan.ranks.iter().map(|(_, r)| {
        let missing = || Error::Size(format!("rank `{}` has no size to be fast at", r.name));
        r.fixed.or_else(|| size(&r.name)).ok_or_else(missing)
    });
    let sizes = sizes.collect::<Result<Vec<u64>, Error>>()?;
    let own = tune::candidates(&plan, sheet, &sizes, k).into_iter().map(|c| (c.mapping, sheet.clone()));
    // Register files differ, and WGSL does not say how large one is: what another kind of adapter holds may well do.
    let kinds = DataSheet::all().into_iter().filter(|s| s.webgpu.is_some());
    let others = kinds.map(|s| (model_gpu::choose(&plan, &s, Some(&sizes)), s));
    let (mut made, mut refused): (Vec<(Mapping, Artifact)>, _) = (Vec::new(), None);
    for (mapping, kind) in own.chain(others) {
        let mapping = tune::beside(mapping, model_gpu::choose(&plan, &kind, None));
        if made.len() == k || made.iter().any(|(m, _)| m.kernels == mapping.kernels) {
            continue;
        }
        match compile_wgsl(&plan, &mapping, &target) {
            Ok(artifact) => made.push((mapping, artifact.with_formulas(&cascade))),
            Err(e) => refused = Some(e),
        }
    }
    match refused {
        Some(e) if made.is_empty() => Err(e),
        _ => Ok(made),
    }
}
