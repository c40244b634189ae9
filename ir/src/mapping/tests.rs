//! Tests of the mapping's text and checks.

use super::parse::parse;
use super::verify::verify;

const TEXT: &str = "mapping gemm on h100 {
    kernel gemm {
        axis m block 128 cluster 2 units 2
        axis n block 256 exact
        axis k block 64 whole exact descending
        work order m, n persistent group 8 longest_first
        split k parts 4 resident 2 merge last_arriver ordered
        role producer: 1 warp regs 40
        role consumer: 2 warpgroup regs 232 ping_pong
        tile a in shared stages 4 swizzle 128 by tma
        tile b in shared stages 4 swizzle 128 contiguous n by tma multicast m reuses a
        tile c in registers
        op c@1 atom wgmma.m64n256k16.bf16 swapped a registers role consumer skew 1 slot 2
        op store.C role consumer by tma
    }
}
";

#[test]
fn round_trips_and_fits() {
    let m = parse(TEXT).unwrap();
    assert_eq!(m.to_string(), TEXT);
    let plan = crate::tile::parse::parse(include_str!("../../../tests/plans/gemm.tile")).unwrap();
    assert_eq!(verify(&m, &plan), Ok(()));
}

#[test]
fn names_and_numbers_are_checked() {
    let plan = crate::tile::parse::parse(include_str!("../../../tests/plans/gemm.tile")).unwrap();
    for (from, to, code, part) in [
        ("axis n", "axis q", "M0201", "`axis q` names axis `q`"),
        ("op c@1", "op c@2", "M0201", "`op c@2` names operation `c@2`"),
        ("tile c ", "tile d ", "M0201", "names tile `d`"),
        ("role consumer by", "role store by", "M0201", "names role `store`"),
        ("kernel gemm", "kernel mm", "M0201", "names kernel `mm`"),
        ("block 256 exact", "block 256 whole", "M0202", "whole but cut over tasks"),
        ("block 256 exact", "block 256 descending", "M0202", "descends but is not a stream axis"),
        ("units 2", "units 3", "M0202", "not cut evenly"),
        ("cluster 2 ", "", "M0202", "multicast along `m`, which has no cluster"),
        ("multicast m", "multicast n", "M0202", "along which it differs"),
        ("contiguous n", "contiguous m", "M0202", "an axis it lacks"),
        ("swizzle 128 by", "swizzle 96 by", "M0202", "a swizzle of 96 bytes"),
        ("split k", "split m", "M0202", "not over a stream axis"),
        ("order m, n", "order m, k", "M0202", "not a grid axis"),
        ("regs 40", "regs 41", "M0202", "setmaxnreg"),
        ("tile c in registers", "tile c in registers stages 2", "M0202", "not in shared memory"),
    ] {
        let m = parse(&TEXT.replacen(from, to, 1)).unwrap_or_else(|e| panic!("{from}: {e}"));
        let found = verify(&m, &plan).expect_err(from);
        assert!(found.iter().any(|d| d.code == code && d.message.contains(part)), "{from}: {found:?}");
        assert!(found.iter().all(|d| d.help.is_some()));
    }
}

#[test]
fn syntax_errors_say_what_to_write() {
    for (from, to, code) in [
        ("block 128", "blok 128", "M0101"),
        ("in registers", "in register", "M0101"),
        ("by tma\n", "by dma\n", "M0101"),
        ("axis k", "axis n", "M0102"),
        ("        split k", "        anchor lazy\n        split k", "M0101"),
        ("mapping gemm", "map gemm", "M0101"),
    ] {
        let text = TEXT.replacen(from, to, 1);
        let d = parse(&text).expect_err(from);
        assert_eq!(d.code, code, "{from}: {d}");
    }
}
