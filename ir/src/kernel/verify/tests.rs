//! The reference kernels verify; each broken rule is named.

use super::*;

const PIPELINE: &str = include_str!("../testdata/pipeline.kernel");

fn violations(source: &str) -> Vec<String> {
    let module = parse::parse(source).unwrap_or_else(|e| panic!("{}", crate::diag::render(&e, "kernel", source)));
    verify(&module, &Limits::SM90).iter().map(Violation::to_string).collect()
}

#[test]
fn reference_kernels_verify() {
    for source in [
        PIPELINE,
        include_str!("../testdata/matmul.kernel"),
        include_str!("../testdata/ping_pong.kernel"),
        include_str!("../testdata/multicast.kernel"),
        include_str!("../testdata/online_softmax.kernel"),
        include_str!("../testdata/warp_mma.kernel"),
    ] {
        assert_eq!(violations(source), [""; 0]);
    }
}

fn broken(from: &str, to: &str, says: &str) {
    assert!(PIPELINE.contains(from), "`{from}` must stand in the kernel");
    let found = violations(&PIPELINE.replacen(from, to, 1));
    assert!(found.iter().any(|v| v.contains(says)), "`{from}` -> `{to}`: {found:#?}");
}

#[test]
fn broken_rules_are_named() {
    let cs = "shared Cs: f32[128, 64]";
    for (from, to, says) in [
        ("stages 3 layout (128:64, 64:1)", "stages 13 layout (128:64, 64:1)", "bytes of shared memory"),
        ("regs 232", "regs 236", "multiples of 8"),
        ("regs 232", "regs 240", "registers are asked for"),
        ("2 warpgroup regs 232", "9 warpgroup", "threads are used"),
        ("named stored[1] threads 256", "named stored[1] threads 250", "multiple of 32"),
        ("mbarrier full[3] count 1", "mbarrier full[3] count 0", "arrivals"),
        ("expect 24576", "expect 24592", "24576"),
        ("wait_group wgmma 0", "", "wait_group is missing"),
        ("fence wgmma", "", "fence wgmma"),
        ("k16.bf16: acc", "k16.f16: acc", "is bf16, not f16"),
        ("k16.bf16: acc", "k8.tf32: acc", "not tf32"),
        ("wgmma.m64n64k16", "wgmma.m64n60k16", "no atom is called"),
        ("V[2@1.1,2@0.8,8@1.8]", "V[2@0.8,2@1.1,8@1.8]", "not distributed"),
        ("V[2@1.1,2@0.8,8@1.8]", "V[2@1.1,2@0.8,4@1.8]", "held by no register"),
        ("mem As(s)[unit * 64", "mem As(s)[unit * 68", "multiple of 8"),
        ("mem As(s)[unit * 64", "mem As(s)[unit * 72", "reaches"),
        ("j * 16] * mem", "j * 8] * mem", "along k must be a multiple of 16"),
        ("* mem Bs(s)[j * 16, 0]", "* mem Bs(s)[j * 16, 8]", "reaches 71"),
        ("(128:64, 64:1) swizzle 128", "(128:64, 64:1) swizzle 64", "swizzle span"),
        ("(64:64, 64:1) swizzle 128", "(64:65, 64:1) swizzle 128", "elsewhere"),
        ("(64:64, 64:1) swizzle 128", "(64:32, 64:1) swizzle 128", "two elements at one place"),
        (cs, "shared Cs: f32[128, 64] layout (128:1, 64:128)", "must be the last"),
        (cs, "shared Cs: bf16[128, 64]", "does not convert"),
        ("= 2 written", "= 2", "not declared as written"),
        ("bar_sync stored(0)", "bar_sync stored(1)", "has 1 stages"),
        ("bar_sync stored(0)", "bar_sync full(0)", "not a named barrier"),
        ("store Cs[unit * 64, 0]", "store Cs[unit * 64]", "needs 2 coordinates"),
        ("store Cs[unit * 64, 0]", "store Cs[unit * 65, 0]", "reaches"),
        ("signal full(s)", "signal full(s) multicast 3", "cluster"),
        ("wait_group bulk 0", "cluster_sync", "no clusters"),
        ("wait_group bulk 0", "map acc = fetch(A[0, 0]) + @2", "no dimension"),
        ("wait_group bulk 0", "let k = scalar(A)", "no scalar parameter"),
        ("for j in 0..4 unroll", "for j in 0..K / 16 unroll", "constant bounds"),
        ("let s = k % 3", "if k > 0 { let s = k % 3 }", "no value on some path"),
        ("1 warp regs 40", "1 warp regs 16", "setmaxnreg"),
        ("copy tma [128, 64] Cs", "copy tma [128, 512] Cs", "not 512"),
        ("arrive empty((k - 1) % 3)", "", "nothing arrives"),
    ] {
        broken(from, to, says);
    }
}

#[test]
fn violations_name_the_statement() {
    let found = violations(&PIPELINE.replace("fence wgmma", ""));
    assert!(found[0].contains("gemm, consumer.0.2.0: atom wgmma.m64n64k16.bf16"), "{found:?}");
}

#[test]
fn operands_must_be_held_where_the_result_is() {
    let source = "module m { ranks N
        kernel k {
            grid [N]
            frag a: f32[16, 8] T[4@1.2,8@0.1]V[2@1.1,2@0.8]L[]
            frag row: f32[16] T[4@0.0,8@0.1]V[2@0.8]L[]
            frag col: f32[8] T[4@0.2,8@0.0]V[2@0.1]L[]
            role r: 1 warp {
                map a = 0.0
                reduce row = max a over [1]
                map a = a[0,1] - row[0]
                map col = 1.0
                map a = a[0,1] * col[1]
                BAD
            }
        }
    }";
    assert_eq!(violations(&source.replace("BAD", "")), [""; 0]);
    for bad in ["map a = row[1]", "reduce col = max a over [1]", "reduce row = max a over [0]", "map col = row[0]"] {
        let found = violations(&source.replace("BAD", bad));
        assert!(found.iter().any(|v| v.contains("not distributed")), "{bad}: {found:?}");
    }
}

/// Whatever stands in the text, reading and verifying it does not panic.
#[test]
fn mangled_texts_do_not_panic() {
    let mut n = 0;
    for (i, _) in PIPELINE.char_indices().step_by(7) {
        for junk in ["", "(", "9999999", " walk [7] ", "@", "}"] {
            let cut = PIPELINE[i..].char_indices().nth(5).map_or(PIPELINE.len(), |(j, _)| i + j);
            let text = format!("{}{junk}{}", &PIPELINE[..i], &PIPELINE[cut..]);
            if let Ok(module) = parse::parse(&text) {
                verify(&module, &Limits::SM90);
                assert_eq!(parse::parse(&print::print(&module)), Ok(module));
                n += 1;
            }
        }
    }
    assert!(n > 20, "{n} mangled texts parsed");
}
