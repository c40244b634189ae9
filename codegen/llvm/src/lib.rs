//! Loads LLVM at run time and compiles textual LLVM IR to native code.
