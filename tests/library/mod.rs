//! The library's cascades at sizes for tests.

use einfall_ir::cascade::bind::{Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, parse};

/// Every cascade with `file/name`.
pub fn all() -> impl Iterator<Item = (String, Cascade)> {
    einfall_kernels::SOURCES.iter().flat_map(|(file, text)| {
        let of = |c: Cascade| (format!("{file}/{}", c.name), c);
        parse(text).expect("library files parse").cascades.into_iter().map(of).collect::<Vec<_>>()
    })
}

/// Drawn sizes around blocks' edges under which the facts of a cascade hold, of fewer points than `most`.
pub fn sizes(c: &Cascade, most: u64) -> impl Iterator<Item = Vec<(String, u64)>> {
    const EXTENTS: [u64; 9] = [17, 3, 33, 8, 65, 5, 16, 1, 48];
    let open: Vec<&str> = c.ranks.iter().filter(|(_, r)| r.fixed.is_none()).map(|(_, r)| r.name.as_str()).collect();
    let mut state = 1u64;
    (0..1000).filter_map(move |_| {
        let mut extent = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            EXTENTS[(state >> 33) as usize % EXTENTS.len()]
        };
        let sizes: Vec<_> = open.iter().map(|name| ((*name).to_owned(), extent())).collect();
        let b = bind(c, &Given { sizes: sizes.clone(), ..Given::default() }).ok()?;
        let points = b.extents.iter().fold(1u64, |n, e| n.saturating_mul(*e));
        (points < most && check_facts(c, &b, &[]).is_ok()).then_some(sizes)
    })
}
