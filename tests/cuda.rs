//! What the GPU half of the facade and the command line do on any machine: PTX without LLVM or a device, data sheets
//! by what a device says, and one sentence where there is no driver. Kernels themselves are tested on a device by
//! `einfall selftest --device cuda`.

use std::path::PathBuf;
use std::process::{Command, Output};

use einfall::codegen::backend::ptx::Target;
use einfall::cuda::{compile_ptx, data_sheet, target, target_of};
use einfall::ir::artifact::Code;
use einfall::ir::{cascade, mapping, tile};
use einfall::runtime::cuda::{CudaError, Gpu, gpus};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap()
}

/// The program, where no LLVM can be found.
fn einfall(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_einfall"));
    command.args(arguments).env("EINFALL_LLVM", "/nonexistent/libLLVM.so").env("EINFALL_CACHE", "off");
    command.output().unwrap()
}

#[test]
fn ptx_needs_neither_llvm_nor_a_device() {
    let (plan, map) = (path("plans/gemm.tile"), path("mappings/gemm.mapping"));
    let arguments = ["lower", plan.to_str().unwrap(), "--target", "gpu", "--mapping", map.to_str().unwrap()];
    let out = einfall(&[&arguments[..], &["--emit", "ptx"]].concat());
    let ptx = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(ptx.contains(".target sm_90a") && ptx.contains("wgmma.mma_async"));
    // Ahead of time likewise: only what runs on processors is made by LLVM.
    let folder = tempfile::tempdir().unwrap();
    let softmax = folder.path().join("softmax.ein");
    std::fs::write(&softmax, einfall::kernels::source("softmax").unwrap()).unwrap();
    let files = [softmax.to_str().unwrap(), "--out", folder.path().to_str().unwrap()];
    let out = einfall(&[&["compile", "--target", "sm_80"], &files[..]].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = einfall(&[&["compile", "--target", "sm_80,x86-64-v3"], &files[..]].concat());
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("/nonexistent/libLLVM.so"));
    // Nor is any in the program itself.
    let program = std::fs::read(env!("CARGO_BIN_EXE_einfall")).unwrap();
    let program = String::from_utf8_lossy(&program);
    assert!(program.contains("no usable LLVM") && !program.contains("LLVM ERROR: "), "as LLVM says where it gives up");
    // The same in this process, which then has no LLVM in it.
    let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
    let mapping = mapping::parse::parse(&text("mappings/gemm.mapping")).unwrap();
    let artifact = compile_ptx(&plan, &mapping, &Target::sm_90a()).unwrap();
    assert!(matches!(&artifact.code, Code::Ptx { text, .. } if *text == ptx));
    if let Ok(maps) = std::fs::read_to_string("/proc/self/maps") {
        assert!(!maps.contains("libLLVM"));
    }
}

#[test]
fn a_cascade_compiles_by_the_models_mapping() {
    let text = einfall::kernels::source("matmul").unwrap();
    let cascade = cascade::parse(text).unwrap().cascades.remove(0);
    let plan = einfall::cuda::plan(&cascade).unwrap();
    let sheet = einfall::ir::target::DataSheet::h100();
    let mapping = einfall::autotune::model_gpu::choose(&plan, &sheet, Some(&[4096, 4096, 4096]));
    let artifact = compile_ptx(&plan, &mapping, &Target::sm_90a()).unwrap();
    assert!(artifact.launches.iter().all(|l| l.gpu.is_some()));
}

#[test]
fn devices_find_their_sheets() {
    let gpu = |name: &str, capability, sms, shared_bytes| Gpu {
        index: 0,
        name: name.to_owned(),
        capability,
        sms,
        memory_bytes: 100 << 30,
        l2_bytes: 50 << 20,
        shared_bytes,
        registers: 65_536,
        clock_khz: 1_980_000,
        memory_clock_khz: 2_600_000,
        bus_bits: 5120,
        pci: (0, 0, 0),
        driver: 13000,
    };
    let h200 = gpu("NVIDIA H200", (9, 0), 132, 232_448);
    let sheet = data_sheet(&h200);
    assert_eq!(sheet.name, "h200");
    assert_eq!((sheet.gpu.as_ref().unwrap().multiprocessors, sheet.levels[0].bytes), (132, 100 << 30));
    assert_eq!(target(&h200).arch, "sm_90a");
    assert_eq!(data_sheet(&gpu("NVIDIA H100 PCIe", (9, 0), 114, 232_448)).name, "h100");
    // Older than every sheet: the oldest card's, whose architecture the driver then refuses by name.
    assert_eq!(data_sheet(&gpu("Tesla T4", (7, 5), 40, 65_536)).name, "a100");
    let a40 = gpu("NVIDIA A40", (8, 6), 84, 101_376);
    assert_eq!(target(&a40).arch, "sm_80");
    // A mapping for an older device keeps to what that has; one for a later device cannot.
    let on = |name: &str| einfall_ir::mapping::Mapping { plan: "p".into(), target: name.into(), kernels: Vec::new() };
    assert_eq!(target_of(&on("a100"), &h200).arch, "sm_80");
    assert_eq!(target_of(&on("h100"), &h200).arch, "sm_90a");
    assert_eq!(target_of(&on("h100"), &a40).arch, "sm_80");
    let sheet = data_sheet(&a40);
    assert_eq!((sheet.gpu.unwrap().shared_per_task, sheet.name.as_str()), (101_376, "a100"));
}

#[test]
fn without_a_driver_there_is_one_sentence() {
    if !matches!(gpus(), Err(CudaError::NoDriver)) {
        return;
    }
    let (plan, map) = (path("plans/gemm.tile"), path("mappings/gemm.mapping"));
    let sized = ["--size", "M=8,N=8,K=8", "--random", "1", "--mapping", map.to_str().unwrap()];
    let run = [&["run", plan.to_str().unwrap(), "--device", "cuda"], &sized[..]].concat();
    for arguments in [&run[..], &["selftest", "--device", "cuda"], &["bench", "--device", "cuda", "--family", "gemm"]] {
        let out = einfall(arguments);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{arguments:?}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
        assert!(said.contains("there is no CUDA driver on this machine"), "{said}");
    }
    let out = einfall(&["devices"]);
    assert!(out.status.success(), "a machine without devices is described all the same");
}
