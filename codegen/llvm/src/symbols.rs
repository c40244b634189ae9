//! The functions that compiled code may call by name: memory routines that LLVM's code generation inserts, and libm.
//!
//! Invariant: they resolve to this crate's own references, so what links does not depend on which libraries the host
//! program happened to load.

use std::ffi::c_void;

macro_rules! externs {
    ($($name:ident)*) => {
        mod c {
            // The addresses alone are taken; compiled code calls them by their C signatures.
            unsafe extern "C" { $(pub(super) fn $name();)* }
        }

        /// Name and address of each function.
        pub(crate) fn table() -> Vec<(&'static std::ffi::CStr, *const c_void)> {
            vec![$((
                const { match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => unreachable!(),
                } },
                c::$name as unsafe extern "C" fn() as *const c_void,
            )),*]
        }
    };
}

#[allow(clashing_extern_declarations)]
mod names {
    use super::c_void;
    externs! {
        memcpy memmove memset memcmp
        exp expf exp2 exp2f expm1 expm1f log logf log2 log2f log10 log10f log1p log1pf
        pow powf fmod fmodf fma fmaf cbrt cbrtf hypot hypotf
        sin sinf cos cosf tan tanf asin asinf acos acosf atan atanf atan2 atan2f
        sinh sinhf cosh coshf tanh tanhf asinh asinhf acosh acoshf atanh atanhf
        erf erff erfc erfcf floor floorf ceil ceilf trunc truncf rint rintf nearbyint nearbyintf round roundf
    }
}

pub(crate) use names::table;
