//! Linking an object into this process.
//!
//! Invariant: a [`Code`] owns its own ORC session, so symbols of two objects never meet, and dropping it frees its
//! memory. Undefined symbols resolve against the table of `symbols.rs` (memory routines and libm).

use crate::api::{Api, EXPORTED_FUNCTION, ErrorValue, LlJit, SymbolPair};
use crate::compile::{Object, c_string, take_error};
use crate::error::LlvmError;
use crate::load::Llvm;
use crate::symbols;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex};

/// Errors that ORC reports beside the one it returns (the names of missing symbols, for instance).
struct Reports {
    api: Arc<Api>,
    texts: Mutex<Vec<String>>,
}

/// Machine code linked into this process. Dropping it unmaps the code: the addresses of [`Code::symbol`] must not
/// outlive it.
pub struct Code {
    api: Arc<Api>,
    session: *mut LlJit,
    /// Boxed, as ORC holds its address.
    reports: Box<Reports>,
}

// SAFETY: ORC's session locks its own state; the reports are behind a mutex.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Code")
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: the session is ours and live; the reporter's place lives until after this call.
        unsafe { take_error(&self.api, (self.api.LLVMOrcDisposeLLJIT)(self.session)) };
    }
}

unsafe extern "C" fn report(reports: *mut c_void, error: *mut ErrorValue) {
    // SAFETY: `reports` is the boxed `Reports` of a live `Code`; the error is ours to consume.
    unsafe {
        let reports = &*reports.cast::<Reports>();
        if let (Some(text), Ok(mut texts)) = (take_error(&reports.api, error), reports.texts.lock()) {
            texts.push(text);
        }
    }
}

impl Llvm {
    /// Links an object into this process.
    ///
    /// # Errors
    /// [`LlvmError::Link`] where LLVM does not take the file. Missing symbols show at [`Code::symbol`].
    pub fn link(&self, object: &Object) -> Result<Code, LlvmError> {
        let api = &self.api;
        let failed = |message| LlvmError::Link { message };
        // SAFETY: LLVM-C calls on live handles; `code` owns the session from the moment it exists.
        unsafe {
            let mut session = ptr::null_mut();
            if let Some(message) = take_error(api, (api.LLVMOrcCreateLLJIT)(&mut session, ptr::null_mut())) {
                return Err(failed(message));
            }
            let reports = Box::new(Reports { api: Arc::clone(api), texts: Mutex::default() });
            let code = Code { api: Arc::clone(api), session, reports };
            let place: *const Reports = &*code.reports;
            (api.LLVMOrcExecutionSessionSetErrorReporter)(
                (api.LLVMOrcLLJITGetExecutionSession)(session),
                Some(report),
                place.cast_mut().cast(),
            );
            let dylib = (api.LLVMOrcLLJITGetMainJITDylib)(session);
            // The unit takes the names over, the library the unit.
            let mut pairs: Vec<SymbolPair> = symbols::table()
                .into_iter()
                .map(|(name, address)| SymbolPair {
                    name: (api.LLVMOrcLLJITMangleAndIntern)(session, name.as_ptr()),
                    address: address as u64,
                    generic_flags: EXPORTED_FUNCTION,
                    target_flags: 0,
                })
                .collect();
            let unit = (api.LLVMOrcAbsoluteSymbols)(pairs.as_mut_ptr(), pairs.len());
            if let Some(message) = take_error(api, (api.LLVMOrcJITDylibDefine)(dylib, unit)) {
                return Err(failed(message));
            }
            let bytes = object.bytes();
            let name = c"object".as_ptr();
            // The session takes the buffer over.
            let buffer = (api.LLVMCreateMemoryBufferWithMemoryRangeCopy)(bytes.as_ptr().cast(), bytes.len(), name);
            match take_error(api, (api.LLVMOrcLLJITAddObjectFile)(session, dylib, buffer)) {
                Some(message) => Err(failed(message)),
                None => Ok(code),
            }
        }
    }
}

impl Code {
    /// The address of a function or datum of the object, by the name it has in the IR. The first call links.
    ///
    /// # Errors
    /// [`LlvmError::Lookup`] where there is no such symbol, or the object refers to one that this process lacks.
    pub fn symbol(&self, name: &str) -> Result<*const c_void, LlvmError> {
        let c_name = c_string(name, "symbol name")?;
        let mut address = 0u64;
        // SAFETY: a live session and a valid place to write.
        let error = unsafe {
            take_error(&self.api, (self.api.LLVMOrcLLJITLookup)(self.session, &mut address, c_name.as_ptr()))
        };
        match error {
            None => Ok(address as usize as *const c_void),
            Some(mut message) => {
                if let Ok(mut texts) = self.reports.texts.lock() {
                    for text in texts.drain(..) {
                        message = format!("{text}; {message}");
                    }
                }
                Err(LlvmError::Lookup { name: name.to_string(), message })
            }
        }
    }
}
