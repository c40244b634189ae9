//! PTX to device code by the driver's own assembler, with its log.
//!
//! Invariant: what is cached under [`key`] is a function of what the key names: the PTX, the architecture, the device's
//! capability, the driver's version and this crate's version. Source: CUDA driver API, `cuLink*`.

use super::driver::{Context, Module, call};
use super::error::CudaError;
use super::gpu::Gpu;
use crate::cache::Key;
use cudarc::driver::sys::{self, CUjit_option as Opt, CUresult};
use einfall_ir::artifact;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

/// Bytes of each of the assembler's logs that are kept.
const LOG_BYTES: usize = 1 << 16;

/// Assembled code and what the assembler said.
#[derive(Clone, Debug)]
pub(super) struct Assembled {
    pub(super) image: Vec<u8>,
    pub(super) log: String,
}

/// Everything that decides the code of a PTX text on a device.
pub(super) fn key(text: &str, arch: &str, gpu: &Gpu) -> Key {
    let versions = format!("{} {}", env!("CARGO_PKG_VERSION"), artifact::VERSION);
    let device = format!("cuda {} sm_{}{}", gpu.driver, gpu.capability.0, gpu.capability.1);
    Key::of(&[versions.as_bytes(), device.as_bytes(), arch.as_bytes(), text.as_bytes()])
}

/// The version a PTX text asks for.
pub(super) fn ptx_version(text: &str) -> &str {
    let line = text.lines().find_map(|l| l.trim_start().strip_prefix(".version"));
    line.map_or("", |l| l.split_whitespace().next().unwrap_or(""))
}

/// The two logs of the assembler as the driver wants them: buffers, and option values that hold their addresses.
struct Logs {
    info: Vec<u8>,
    error: Vec<u8>,
}

impl Logs {
    fn new() -> Logs {
        Logs { info: vec![0; LOG_BYTES], error: vec![0; LOG_BYTES] }
    }

    /// The assembler's options that name the buffers, and their values: the driver takes numbers in the place of
    /// pointers.
    fn options(&mut self) -> (Vec<Opt>, Vec<*mut c_void>) {
        let options = vec![
            Opt::CU_JIT_INFO_LOG_BUFFER,
            Opt::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
            Opt::CU_JIT_ERROR_LOG_BUFFER,
            Opt::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
            Opt::CU_JIT_LOG_VERBOSE,
        ];
        let values = vec![
            self.info.as_mut_ptr().cast(),
            ptr::without_provenance_mut(LOG_BYTES),
            self.error.as_mut_ptr().cast(),
            ptr::without_provenance_mut(LOG_BYTES),
            ptr::without_provenance_mut(1),
        ];
        (options, values)
    }

    fn text(&self) -> String {
        let read = |b: &[u8]| {
            let end = b.iter().position(|b| *b == 0).unwrap_or(b.len());
            String::from_utf8_lossy(&b[..end]).trim().to_owned()
        };
        [read(&self.error), read(&self.info)].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join("\n")
    }
}

/// The driver's number for an architecture with instructions of its own: `sm_90a` is 90 and a bit.
fn accelerated(arch: &str) -> Option<usize> {
    let number: usize = arch.strip_prefix("sm_")?.strip_suffix('a')?.parse().ok()?;
    Some((1 << 16) + number)
}

/// Runs the driver's linker on a PTX text in the current context; the code, if it succeeds, and its logs.
fn link(text: &str, target: Option<usize>) -> (CUresult, Vec<u8>, Logs) {
    let mut logs = Logs::new();
    let (mut options, mut values) = logs.options();
    if let Some(target) = target {
        options.push(Opt::CU_JIT_TARGET);
        values.push(ptr::without_provenance_mut(target));
    }
    let mut source = text.as_bytes().to_vec();
    source.push(0);
    let mut state = ptr::null_mut();
    let mut image = Vec::new();
    // SAFETY: the logs, options and values outlive the linker's state, which is destroyed below; the source ends with a
    // zero byte, which its length counts; the image belongs to the state and is copied before that goes.
    let result = unsafe {
        let n = options.len() as u32;
        let mut result = sys::cuLinkCreate_v2(n, options.as_mut_ptr(), values.as_mut_ptr(), &mut state);
        if result == CUresult::CUDA_SUCCESS {
            result = sys::cuLinkAddData_v2(
                state,
                sys::CUjitInputType::CU_JIT_INPUT_PTX,
                source.as_mut_ptr().cast(),
                source.len(),
                c"kernels.ptx".as_ptr(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
            );
        }
        let (mut data, mut bytes) = (ptr::null_mut(), 0);
        if result == CUresult::CUDA_SUCCESS {
            result = sys::cuLinkComplete(state, &mut data, &mut bytes);
        }
        if result == CUresult::CUDA_SUCCESS {
            image = std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec();
        }
        if !state.is_null() {
            let _ = sys::cuLinkDestroy(state);
        }
        result
    };
    (result, image, logs)
}

/// Assembles PTX for the context's device.
pub(super) fn assemble(
    context: &Context,
    gpu: &Gpu,
    name: &str,
    text: &str,
    arch: &str,
) -> Result<Assembled, CudaError> {
    if !gpu.runs(arch) {
        let (arch, device) = (arch.to_owned(), gpu.name.clone());
        return Err(CudaError::Arch { arch, device, capability: gpu.capability });
    }
    context.enter()?;
    // The driver takes the device's own architecture; one that must be told of the variant is told.
    let (mut result, mut image, mut logs) = link(text, None);
    if result != CUresult::CUDA_SUCCESS
        && let Some(target) = accelerated(arch)
    {
        let again = link(text, Some(target));
        if again.0 == CUresult::CUDA_SUCCESS {
            (result, image, logs) = again;
        }
    }
    let log = logs.text();
    match result {
        CUresult::CUDA_SUCCESS => Ok(Assembled { image, log }),
        result => Err(refused(result, gpu, name, text, log)),
    }
}

/// Whether the code must be made of the whole program at once. The linker's input is relocatable, for which the
/// assembler ignores `setmaxnreg` (its message C7504), spills, and serialises wgmma.
pub(super) fn wants_whole(text: &str) -> bool {
    text.contains("setmaxnreg") || text.contains("wgmma.")
}

/// Has the driver's loader assemble PTX and load it; its code stays in the driver's own cache.
pub(super) fn load(
    context: &Arc<Context>,
    gpu: &Gpu,
    name: &str,
    text: &str,
    arch: &str,
) -> Result<(Module, String), CudaError> {
    if !gpu.runs(arch) {
        let (arch, device) = (arch.to_owned(), gpu.name.clone());
        return Err(CudaError::Arch { arch, device, capability: gpu.capability });
    }
    context.enter()?;
    let mut logs = Logs::new();
    let (mut options, mut values) = logs.options();
    let mut source = text.as_bytes().to_vec();
    source.push(0);
    // SAFETY: the text ends with a zero byte, and the logs live.
    let (result, module) = unsafe { Module::load_text(context, &source, &mut options, &mut values) };
    let log = logs.text();
    module.map(|m| (m, log.clone())).ok_or_else(|| refused(result, gpu, name, text, log))
}

/// Why a text is not assembled.
fn refused(result: CUresult, gpu: &Gpu, name: &str, text: &str, log: String) -> CudaError {
    // An old assembler says so in its log where the code does not.
    if result == CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION || log.contains("Unsupported .version") {
        return CudaError::OldAssembler { driver: gpu.driver, ptx: ptx_version(text).to_owned() };
    }
    match call(result, || format!("assembling `{name}`")) {
        Err(CudaError::Call { name: error, text, .. }) => {
            CudaError::Assemble { name: name.to_owned(), error: format!("{error} ({text})"), log }
        }
        Err(other) => other,
        Ok(()) => CudaError::Assemble { name: name.to_owned(), error: "no code came out".to_owned(), log },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::gpu::tests::h200;

    #[test]
    fn the_key_depends_on_everything_that_decides_the_code() {
        let gpu = h200();
        let of = |text: &str, arch: &str, gpu: &Gpu| key(text, arch, gpu);
        let base = of("text", "sm_90a", &gpu);
        assert_eq!(base, of("text", "sm_90a", &gpu));
        assert_ne!(base, of("texu", "sm_90a", &gpu));
        assert_ne!(base, of("text", "sm_90", &gpu));
        assert_ne!(base, of("text", "sm_90a", &Gpu { driver: 12080, ..gpu.clone() }));
        assert_ne!(base, of("text", "sm_90a", &Gpu { capability: (10, 0), ..gpu.clone() }));
        assert_eq!(base, of("text", "sm_90a", &Gpu { index: 1, ..gpu }), "two cards of one kind share");
    }

    #[test]
    fn architectures_with_their_own_instructions_have_numbers() {
        assert_eq!(accelerated("sm_90a"), Some(65_626));
        assert_eq!(accelerated("sm_80"), None);
    }

    #[test]
    fn register_budgets_want_the_whole_program() {
        assert!(wants_whole("setmaxnreg.inc.sync.aligned.u32 240;") && wants_whole("wgmma.fence.sync.aligned;"));
        assert!(!wants_whole("fma.rn.f32 %f0, %f1, %f2, %f3;"));
    }

    #[test]
    fn the_version_is_read_from_the_text() {
        assert_eq!(ptx_version("// a comment\n.version 8.0\n.target sm_90a\n"), "8.0");
        assert_eq!(ptx_version("nothing"), "");
    }
}
