//! Real kernels through the provider, and everything it refuses.

use einfall_llvm::{Llvm, LlvmError, LoadOptions, Object, Passes, TargetOptions};
use std::path::PathBuf;
use std::sync::OnceLock;

fn llvm() -> &'static Llvm {
    static LLVM: OnceLock<Llvm> = OnceLock::new();
    LLVM.get_or_init(|| {
        // Another library to run every test against.
        let path = std::env::var_os("EINFALL_TEST_LLVM").map(PathBuf::from);
        Llvm::load(&LoadOptions { path, ..LoadOptions::default() }).unwrap()
    })
}

fn options(passes: Passes) -> TargetOptions {
    llvm().host().options(passes)
}

const VECTOR_ADD: &str = "
define void @vector_add(ptr noalias %a, ptr noalias %b, ptr noalias %c, i64 %n) {
entry:
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %body ]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %body, label %done
body:
  %pa = getelementptr float, ptr %a, i64 %i
  %pb = getelementptr float, ptr %b, i64 %i
  %pc = getelementptr float, ptr %c, i64 %i
  %x = load float, ptr %pa, align 4
  %y = load float, ptr %pb, align 4
  %z = fadd float %x, %y
  store float %z, ptr %pc, align 4
  %next = add i64 %i, 1
  br label %head
done:
  ret void
}
";

/// C[4,16] = sum(k) A[k,4] * B[k,16], accumulators in memory that the passes lift into registers.
fn micro_kernel() -> String {
    let mut ir = String::from(
        "declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
define void @micro(ptr noalias %a, ptr noalias %b, ptr noalias %c, i64 %n) {
entry:
",
    );
    for m in 0..4 {
        ir += &format!("  %acc{m} = alloca <16 x float>, align 64\n");
        ir += &format!("  store <16 x float> zeroinitializer, ptr %acc{m}, align 64\n");
    }
    ir += "  br label %loop
loop:
  %k = phi i64 [ 0, %entry ], [ %next, %loop ]
  %ak = mul i64 %k, 4
  %bk = mul i64 %k, 16
  %pb = getelementptr float, ptr %b, i64 %bk
  %vb = load <16 x float>, ptr %pb, align 4
";
    for m in 0..4 {
        ir += &format!(
            "  %i{m} = add i64 %ak, {m}
  %pa{m} = getelementptr float, ptr %a, i64 %i{m}
  %s{m} = load float, ptr %pa{m}, align 4
  %t{m} = insertelement <16 x float> poison, float %s{m}, i64 0
  %va{m} = shufflevector <16 x float> %t{m}, <16 x float> poison, <16 x i32> zeroinitializer
  %old{m} = load <16 x float>, ptr %acc{m}, align 64
  %new{m} = call <16 x float> @llvm.fma.v16f32(<16 x float> %va{m}, <16 x float> %vb, <16 x float> %old{m})
  store <16 x float> %new{m}, ptr %acc{m}, align 64
"
        );
    }
    ir += "  %next = add i64 %k, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
";
    for m in 0..4 {
        ir += &format!(
            "  %r{m} = load <16 x float>, ptr %acc{m}, align 64
  %pc{m} = getelementptr float, ptr %c, i64 {}
  store <16 x float> %r{m}, ptr %pc{m}, align 4
",
            m * 16
        );
    }
    ir + "  ret void\n}\n"
}

type Three = extern "C" fn(*const f32, *const f32, *mut f32, i64);

#[test]
fn vector_add_runs_under_every_pipeline() {
    for passes in [Passes::None, Passes::Tidy, Passes::O2] {
        let object = llvm().compile(VECTOR_ADD, &options(passes)).unwrap();
        let code = llvm().link(&object).unwrap();
        // SAFETY: the IR declares this signature.
        let add: Three = unsafe { std::mem::transmute(code.symbol("vector_add").unwrap()) };
        let a: Vec<f32> = (0..1003).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..1003).map(|i| 0.5 * i as f32).collect();
        let mut c = vec![-1.0f32; 1004];
        add(a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), 1003);
        assert!((0..1003).all(|i| c[i] == 1.5 * i as f32), "{passes:?}");
        assert_eq!(c[1003], -1.0, "{passes:?} writes past the end");
    }
}

#[test]
fn micro_kernel_is_exact_on_small_integers_and_stays_in_registers() {
    let ir = micro_kernel();
    let n = 37;
    let a: Vec<f32> = (0..n * 4).map(|i| (i % 7) as f32 - 3.0).collect();
    let b: Vec<f32> = (0..n * 16).map(|i| (i % 5) as f32 - 2.0).collect();
    let mut c = [0f32; 64];
    let code = llvm().link(&llvm().compile(&ir, &options(Passes::Tidy)).unwrap()).unwrap();
    // SAFETY: the IR declares this signature.
    let micro: Three = unsafe { std::mem::transmute(code.symbol("micro").unwrap()) };
    micro(a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), n as i64);
    for m in 0..4 {
        for j in 0..16 {
            let want: f32 = (0..n).map(|k| a[k * 4 + m] * b[k * 16 + j]).sum();
            assert_eq!(c[m * 16 + j], want, "C[{m},{j}]");
        }
    }
    let optimized = llvm().optimize(&ir, &options(Passes::Tidy)).unwrap();
    assert!(!optimized.contains("alloca"), "accumulators stay in memory:\n{optimized}");
    assert!(llvm().optimize(&ir, &options(Passes::None)).unwrap().contains("alloca"));
}

#[test]
fn host_is_described_and_assembly_shows_its_vectors() {
    let host = llvm().host();
    assert!(!host.cpu.is_empty() && !host.triple.is_empty());
    assert!(!host.has("no-such-feature"));
    #[cfg(target_arch = "x86_64")]
    {
        assert_eq!(host.has("avx512f"), std::is_x86_feature_detected!("avx512f"));
        assert_eq!(host.has("avx2"), std::is_x86_feature_detected!("avx2"));
        let mut narrow = options(Passes::Tidy);
        (narrow.cpu, narrow.features) = ("haswell".into(), String::new());
        let avx2 = llvm().assembly(&micro_kernel(), &narrow).unwrap();
        assert!(avx2.contains("%ymm") && !avx2.contains("%zmm"), "{avx2}");
        narrow.cpu = "skylake-avx512".into();
        let ir = micro_kernel().replace("i64 %n) {", "i64 %n) \"prefer-vector-width\"=\"512\" {");
        assert!(llvm().assembly(&ir, &narrow).unwrap().contains("%zmm"));
    }
}

#[test]
fn the_object_is_a_function_of_its_inputs() {
    let one = llvm().compile(&micro_kernel(), &options(Passes::Tidy)).unwrap();
    assert_eq!(one, llvm().compile(&micro_kernel(), &options(Passes::Tidy)).unwrap());
    // SAFETY: bytes that `compile` made.
    let again = unsafe { Object::from_bytes(one.bytes().to_vec()) };
    assert!(llvm().link(&again).unwrap().symbol("micro").is_ok());
}

#[test]
fn other_architectures_compile_where_the_library_has_them() {
    let (triple, cpu) = ("aarch64-unknown-linux-gnu".to_string(), "neoverse-v1".to_string());
    let options = TargetOptions { triple, cpu, features: String::new(), passes: Passes::O2 };
    match llvm().assembly(VECTOR_ADD, &options) {
        Ok(text) => assert!(text.contains("fadd") && text.contains("ret"), "{text}"),
        Err(LlvmError::Target { .. }) => {}
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn wrong_ir_keeps_llvms_message() {
    let compile = |ir: &str| llvm().compile(ir, &options(Passes::O2)).unwrap_err();
    let LlvmError::Parse { message } = compile("define void @f() {\n  %x = fadd float 1.0, %y\n  ret void\n}\n") else {
        panic!("parsed")
    };
    assert!(message.contains("undefined value '%y'") && message.contains("2:"), "{message}");
    // A definition that does not dominate its use parses, and the verifier refuses it.
    let ir = "define i32 @f(i1 %c) {\nentry:\n  br i1 %c, label %a, label %b\na:\n  %x = add i32 1, 2\n  br label %b\n\
              b:\n  ret i32 %x\n}\n";
    let LlvmError::Verify { message } = compile(ir) else { panic!("verified") };
    assert!(message.contains("dominate"), "{message}");
    assert!(matches!(compile("define void @f("), LlvmError::Parse { .. }));
    assert!(matches!(compile("not IR at all \0 \u{1f980}"), LlvmError::Parse { .. }));
}

#[test]
fn inline_assembly_that_does_not_assemble_is_an_error_and_not_the_end() {
    let ir = "define void @f() {\n  call void asm sideeffect \"no_such_instruction\", \"\"()\n  ret void\n}\n";
    let LlvmError::Emit { message } = llvm().compile(ir, &options(Passes::None)).unwrap_err() else {
        panic!("emitted")
    };
    assert!(message.contains("instruction"), "{message}");
}

#[test]
fn missing_symbols_are_named() {
    let code = llvm().link(&llvm().compile(VECTOR_ADD, &options(Passes::Tidy)).unwrap()).unwrap();
    let error = code.symbol("vector_sub").unwrap_err();
    assert!(error.to_string().contains("vector_sub"), "{error}");
    assert!(code.symbol("vector_add").is_ok(), "a failed lookup spoils the session");
    assert!(matches!(code.symbol("a\0b"), Err(LlvmError::Nul { .. })));

    let ir = "declare void @no_such_function_anywhere()\ndefine void @f() {\n  call void @no_such_function_anywhere()\n  \
              ret void\n}\n";
    let code = llvm().link(&llvm().compile(ir, &options(Passes::None)).unwrap()).unwrap();
    let error = code.symbol("f").unwrap_err();
    assert!(error.to_string().contains("no_such_function_anywhere"), "{error}");
}

#[test]
fn libc_resolves() {
    let ir = "declare float @expf(float)\ndefine float @f(float %x) {\n  %y = call float @expf(float %x)\n  ret float %y\n}\n";
    let code = llvm().link(&llvm().compile(ir, &options(Passes::None)).unwrap()).unwrap();
    // SAFETY: the IR declares this signature.
    let f: extern "C" fn(f32) -> f32 = unsafe { std::mem::transmute(code.symbol("f").unwrap()) };
    assert_eq!(f(1.0), 1f32.exp());
}

#[test]
fn bytes_that_are_no_object_are_refused() {
    // SAFETY: nothing is run; the linker must refuse them.
    let object = unsafe { Object::from_bytes(b"\x7fELF and then nothing".to_vec()) };
    let refused = match llvm().link(&object) {
        Err(e) => e,
        Ok(code) => code.symbol("f").unwrap_err(),
    };
    assert!(matches!(refused, LlvmError::Link { .. } | LlvmError::Lookup { .. }), "{refused}");
}

#[test]
fn unknown_targets_are_errors() {
    let mut o = options(Passes::None);
    o.triple = "pdp11-unknown-unix".into();
    assert!(matches!(llvm().compile(VECTOR_ADD, &o), Err(LlvmError::Target { .. })));
    o.triple = "x86_64\0".into();
    assert!(matches!(llvm().compile(VECTOR_ADD, &o), Err(LlvmError::Nul { what: "target triple" })));
}

#[test]
fn a_missing_library_says_what_to_install() {
    let nowhere = LoadOptions { rustc: false, system: false, ..LoadOptions::default() };
    let error = Llvm::load(&nowhere).unwrap_err();
    assert!(matches!(&error, LlvmError::NotFound { tried, .. } if tried.is_empty()));
    let text = error.to_string();
    assert!(text.contains("19 to 22") && text.contains("install"), "{text}");
    #[cfg(target_os = "linux")]
    assert!(text.contains("libllvm19"), "{text}");

    let path = PathBuf::from("/no/such/libLLVM.so");
    let error = Llvm::load(&LoadOptions { path: Some(path.clone()), ..LoadOptions::default() }).unwrap_err();
    assert!(matches!(&error, LlvmError::Open { path: p, .. } if *p == path), "{error}");
}

#[test]
fn another_library_or_version_is_refused() {
    #[cfg(target_os = "linux")]
    {
        let libc = LoadOptions { path: Some("libc.so.6".into()), ..LoadOptions::default() };
        let error = Llvm::load(&libc).unwrap_err();
        assert!(matches!(error, LlvmError::Symbol { symbol: "LLVMGetVersion", .. }), "{error}");
    }
    let found = llvm().version();
    assert!((19..=22).contains(&found.0));
    let old = LoadOptions { path: Some(llvm().path().into()), versions: 3..=4, ..LoadOptions::default() };
    let error = Llvm::load(&old).unwrap_err();
    assert!(matches!(&error, LlvmError::Version { found: f, .. } if *f == found), "{error}");
    assert!(error.to_string().contains("3 to 4"), "{error}");
    // Searching goes on past a wrong version, and its refusal is in the list.
    let error = Llvm::load(&LoadOptions { versions: 3..=3, ..LoadOptions::default() }).unwrap_err();
    let LlvmError::NotFound { tried, .. } = &error else { panic!("{error}") };
    assert!(!tried.is_empty());
}

#[test]
fn threads_compile_at_once() {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let ir = format!("define i32 @f(i32 %x) {{\n  %y = add i32 %x, {seed}\n  ret i32 %y\n}}\n");
                for _ in 0..8 {
                    let code = llvm().link(&llvm().compile(&ir, &options(Passes::O2)).unwrap()).unwrap();
                    // SAFETY: the IR declares this signature.
                    let f: extern "C" fn(i32) -> i32 = unsafe { std::mem::transmute(code.symbol("f").unwrap()) };
                    assert_eq!(f(10), 10 + seed);
                }
            });
        }
    });
}
