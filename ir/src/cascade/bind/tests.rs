//! Extents solved from shapes, and the message of every way that fails.

use super::*;
use crate::cascade::parse;

fn cascade(text: &str) -> Cascade {
    let module = parse(text).unwrap_or_else(|d| panic!("{}", d[0]));
    module.cascades.into_iter().next().expect("one cascade")
}

/// Binds by parameter shapes in order and sizes; the solved extents, or the message.
fn solved(text: &str, shapes: &[&[u64]], sizes: &[(&str, u64)]) -> Result<Vec<u64>, String> {
    let c = cascade(text);
    let given = Given {
        shapes: c.params.iter().copied().zip(shapes.iter().map(|s| s.to_vec())).collect(),
        sizes: sizes.iter().map(|(n, e)| (n.to_string(), *e)).collect(),
        scalars: Vec::new(),
    };
    bind(&c, &given).map(|b| b.extents).map_err(|e| e.to_string())
}

const GROUPED: &str = "cascade t[G, R, N](Q: f32[G*R, N], K: f32[G, N + 1]) -> (Y: f32[G, R, N]) {
    Y[g,r,n] for n in N = Q[g*R+r,n] * K[g,n]
}";

#[test]
fn products_and_sums_are_solved() {
    assert_eq!(solved(GROUPED, &[&[12, 5], &[4, 6]], &[]), Ok(vec![4, 3, 5]));
    // A second equation is not needed when a size is given.
    assert_eq!(solved(GROUPED, &[&[12, 5]], &[("R", 3)]), Ok(vec![4, 3, 5]));
    assert_eq!(solved(GROUPED, &[&[0, 5], &[4, 6]], &[]), Ok(vec![4, 0, 5]));
}

#[test]
fn a_zero_factor_leaves_its_partner_open() {
    let e = solved(GROUPED, &[&[0, 5], &[0, 6]], &[]).unwrap_err();
    assert_eq!(e, "no input or size fixes R; give sizes, e.g. R=64");
    assert_eq!(solved(GROUPED, &[&[0, 5], &[0, 6]], &[("R", 7)]), Ok(vec![0, 7, 5]));
}

#[test]
fn messages_name_the_place() {
    type Case<'a> = (&'a [&'a [u64]], &'a [(&'a str, u64)], &'a str);
    let cases: [Case<'_>; 7] = [
        (
            &[&[12, 5], &[4, 7]],
            &[],
            "K: dimension 1 is N+1 = 6 but is given 7; pass 6, or change the other inputs or sizes that fix N+1",
        ),
        (
            &[&[13, 5], &[4, 6]],
            &[],
            "Q: dimension 0 is G*R, given 13, which leaves no extent for R; pass an extent that G*R can take",
        ),
        (
            &[&[12, 5], &[4, 6, 1]],
            &[],
            "K is declared K[G, N+1] but is given 3 dimensions [4, 6, 1]; pass an array of the declared rank",
        ),
        (
            &[&[12, 5], &[4, 0]],
            &[("R", 3)],
            "K: dimension 1 is N+1 = 6 but is given 0; pass 6, or change the other inputs or sizes that fix N+1",
        ),
        (&[], &[("G", 2), ("Z", 3)], "there is no rank Z; the ranks are G, R, N"),
        (&[], &[("G", 2), ("G", 3)], "G is given as 3 but is already 2; give one value"),
        (&[], &[("G", 1 << 40), ("R", 1 << 40), ("N", 1)], "Q: the extent G*R exceeds 2^63-1; choose other sizes"),
    ];
    for (shapes, sizes, message) in cases {
        assert_eq!(solved(GROUPED, shapes, sizes), Err(message.to_owned()));
    }
}

#[test]
fn sums_that_leave_no_extent() {
    let e = solved(GROUPED, &[&[12, 5], &[4, 0]], &[]).unwrap_err();
    assert!(e.starts_with("K: dimension 1 is N+1"), "{e}");
    let text = "cascade t[N](K: f32[N + 1]) -> (Y: f32[N]) { Y[n] for n in N = K[n] }";
    let e = solved(text, &[&[0]], &[]).unwrap_err();
    assert_eq!(e, "K: dimension 0 is N+1, given 0, which leaves no extent for N; pass an extent that N+1 can take");
}

#[test]
fn facts_and_fixed_extents() {
    let text = "cascade t[N, E = 4](x: f32[N, E], s: f32 = 2.0) -> (y: f32[N, E]) {
        require N % 2 == 0, s > 1
        y[n,e] = x[n,e] * s
    }";
    assert_eq!(solved(text, &[&[6, 4]], &[]), Ok(vec![6, 4]));
    assert_eq!(
        solved(text, &[&[5, 4]], &[]),
        Err("a required fact does not hold for N = 5; choose sizes and scalars that keep it".to_owned())
    );
    assert!(solved(text, &[&[6, 5]], &[]).unwrap_err().starts_with("x: dimension 1 is E = 4 but is given 5"));
    let c = cascade(text);
    let given = Given { sizes: vec![("N".into(), 2)], scalars: vec![(c.params[1], 0.5)], ..Given::default() };
    assert_eq!(
        bind(&c, &given).map_err(|e| e.to_string()),
        Err("a required fact does not hold for s = 0.5; choose sizes and scalars that keep it".to_owned())
    );
}

#[test]
fn tensors_of_2_63_elements_are_refused() {
    let text = "cascade t[N, M](x: f32[N], y: f32[M]) -> (z: f32[N, M]) { z[n,m] = x[n] * y[m] }";
    let e = solved(text, &[&[1 << 32], &[1 << 32]], &[]).unwrap_err();
    assert_eq!(e, "z with extents [4294967296, 4294967296] has 2^63 elements or more; choose smaller sizes");
}

#[test]
fn defaults_are_evaluated() {
    let c = cascade("cascade t[E](x: f32[E], s: f32 = 1/sqrt(E), u: f32 = 2*s) -> (y: f32[E]) { y[e] = x[e] * s * u }");
    let b = bind(&c, &Given { sizes: vec![("E".into(), 64)], ..Given::default() }).expect("it binds");
    let x = Array::from_fn(crate::dtype::DType::F32, &[64], |i| i as f64);
    let filled = fill_defaults(&c, &b, &[Some(x), None, None]).expect("defaults");
    assert_eq!((filled[1].data[0], filled[2].data[0]), (0.125, 0.25));
    assert_eq!(
        fill_defaults(&c, &b, &[]).map_err(|e| e.to_string()),
        Err("the scalar x has no value and no default; give one".to_owned())
    );
}
