//! Rings that a role fills for itself by plain stores: as many stages as the schedule needs, and no fewer, whether all
//! threads meet before they read or arrive at barriers in memory.

mod device;

use device::{agrees, lowered};
use einfall_codegen::lower::gpu;
use einfall_ir::mapping;
use einfall_ir::tile::{self, Plan};

/// Rows times a matrix: `q` hands each row from the threads that load it to all that multiply it.
const PLAN: &str = "plan rows[B, T, D] {
    input x: f32[B, T, D]
    input w: f32[D, D]
    output y: f32[B, T, D]

    kernel rows_0 {
        grid b in B
        stream t in T
        inner d in D
        inner p in D
        tile W: f32[d, p]
        tile v: f32[b, t, d]
        tile q: f32[b, t, p]
        tile r: f32[b, t, d]
        W = load w[d, p]
        for t {
            v = load x[b, t, d]
            q = v{d = p}
            r = reduce sum(p) W * q
            store y[b, t, d] = r over b, t, d
        }
    }
}
";

/// Warps of two columns each; what is read runs `behind` iterations behind what is stored, before it in each trip or after.
fn mapping(persistent: bool, stages: u64, behind: u64, before: bool) -> String {
    let work = if persistent { "        work persistent\n" } else { "" };
    let (stores, reads) = if before { (1, 0) } else { (0, 1) };
    format!(
        "mapping rows on h100 {{
    kernel rows_0 {{
        axis b block 1
        axis t block 1
        axis d block 8 units 4 whole
        axis p block 8 whole
{work}        tile q in shared stages {stages}
        op v slot {stores}
        op q slot {stores}
        op r skew {behind} slot {reads}
        op store.y skew {behind} slot {reads}
    }}
}}
"
    )
}

fn plan() -> Plan {
    tile::parse::parse(PLAN).unwrap_or_else(|d| panic!("{d:?}"))
}

#[test]
fn a_ring_has_the_stages_that_its_schedule_needs() {
    let plan = plan();
    for (persistent, behind, before, enough) in [
        (false, 0, true, &[][..]),
        // Before one stage is stored again all threads meet once more.
        (false, 0, false, &[1, 2, 3]),
        (false, 1, true, &[1, 2, 3]),
        (false, 1, false, &[3, 4]),
        (false, 2, true, &[3, 4]),
        (false, 2, false, &[4, 5]),
        // One stage is given back by a barrier of its own.
        (true, 0, true, &[]),
        (true, 0, false, &[1, 2, 3]),
        (true, 1, true, &[1, 2, 3]),
        (true, 1, false, &[4, 5]),
        (true, 2, true, &[4, 5]),
        (true, 2, false, &[6, 7]),
    ] {
        for stages in 1..=enough.last().copied().unwrap_or(3) {
            let text = mapping(persistent, stages, behind, before);
            if enough.contains(&stages) {
                let module = lowered(&plan, &text);
                for ranks in [[1, 7, 8], [2, 1, 8], [1, 0, 8]] {
                    agrees(&plan, &module, &ranks, 4);
                }
                continue;
            }
            let parsed = mapping::parse::parse(&text).unwrap_or_else(|d| panic!("{d}"));
            let refused = gpu::lower(&plan, &parsed).expect_err(&text);
            assert_eq!(refused[0].constraint, Some("stages"), "{refused:?}");
            assert!(refused[0].help.is_some());
        }
    }
}
