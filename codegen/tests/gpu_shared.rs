//! Streams whose masked trips, the first one included, are one piece of code: whatever trips there are of which kind, they
//! give what the plan means under every adversarial schedule, and every fault planted in them is caught.

mod device;

use device::{agrees, lowered, survivors, text};
use einfall_ir::kernel::{Kernel, Stmt, walk};
use einfall_ir::tile::{self, Plan};

/// Attention with a filter, by the reference mapping, whose two consumers take turns, changed.
fn attention(filter: &str, changes: &[(&str, &str)]) -> (Plan, einfall_ir::kernel::Module) {
    let source = text("plans/attention.tile").replace("n <= m + (N - M)", filter);
    let plan = tile::parse::parse(&source).unwrap();
    let mut mapping = text("mappings/attention.mapping");
    for (from, to) in changes {
        assert!(mapping.contains(from), "{from}");
        mapping = mapping.replace(from, to);
    }
    let module = lowered(&plan, &mapping);
    (plan, module)
}

/// How often the contraction of queries and keys stands in the text: in the masked trips and in the others.
fn copies(k: &Kernel) -> usize {
    let mut n = 0;
    let scores = k.frags.iter().find(|(_, f)| f.name == "s").unwrap().0;
    k.roles.iter().for_each(|r| {
        walk(&r.body, &mut |s| {
            n += usize::from(
                matches!(s, Stmt::Atom { acc, keep: einfall_ir::kernel::Expr::Int(0), .. } if *acc == scores),
            )
        });
    });
    n
}

/// Blocks of 64 keys: three of them straddle the diagonal of a block of 128 queries.
const SMALL: [(&str, &str); 2] =
    [("axis n block 128 ", "axis n block 64 "), ("op s atom wgmma.m64n128k16", "op s atom wgmma.m64n64k16")];

#[test]
fn masked_trips_are_one_piece_of_code() {
    let (ascending, free) = ((" descending", ""), (" ping_pong", ""));
    let causal = "n <= m + (N - M)";
    let window = "n <= m + (N - M) and m + (N - M) < n + 150";
    for (filter, changes) in [
        (causal, &[][..]),
        (causal, &[free]),
        (causal, &[ascending]),
        (causal, &[ascending, free]),
        (window, &SMALL),
        (window, &[ascending, free]),
    ] {
        let (plan, module) = attention(filter, changes);
        assert_eq!(copies(&module.kernels[0]), 2, "{filter} {changes:?}");
        // [B, H, R, M, N, E, F]: one trip, two, several of each kind, tails, rows without keys, no keys.
        for (m, n) in [(40, 50), (128, 128), (130, 330), (200, 420), (300, 130), (8, 0)] {
            agrees(&plan, &module, &[1, 1, 1, m, n, 64, 16], 1);
        }
    }
}

/// What is left is sound: stages of a ring move together, what is given back after the last trips is never filled again,
/// and a unit's threads are one to the evaluator.
#[test]
fn planted_faults_in_shared_trips_are_caught() {
    let (plan, module) = attention("n <= m + (N - M)", &[SMALL[0], SMALL[1], (" descending", ""), (" ping_pong", "")]);
    let (planted, missed) = survivors(&plan, &module, &[&[1, 1, 1, 128, 572, 64, 16], &[1, 1, 1, 128, 100, 64, 16]]);
    assert!(planted > 30, "{planted}");
    let sound = [
        "WrongStage producer.7.0: wait k_empty(stage2_n_producer) phase 1 - parity2_n_producer",
        "WrongStage producer.7.4: wait v_empty(stage2_n_producer) phase 1 - parity2_n_producer",
        "WrongStage consumer.10.2.0.11.7: arrive k_empty(stage2_n_consumer)",
        "Missing consumer.10.15: arrive v_empty(stage2_n_consumer)",
        "WrongStage consumer.10.15: arrive v_empty(stage2_n_consumer)",
        "Missing consumer.14: bar_sync unit_consumer(unit)",
    ];
    assert_eq!(missed, sound);
}
