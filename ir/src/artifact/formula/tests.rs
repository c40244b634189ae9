//! A formula has the value of the expression it was made of.

use super::*;
use crate::arena::Arena;
use crate::artifact::Code;
use crate::cascade::bind::{Given, bind, check_facts, scalar_value};
use crate::cascade::parse;
use crate::tile::{Buffer, BufferKind};

const TEXT: &str = "cascade of[M, N](
    a: f32, k: i32 = (M + N) / 2, scale: f32 = 1 / sqrt(M), half: f16 = scale / 3, b: f32 = if M < N then a else -half
) -> (y: f32[M, N]) {
    require scale > 0
    require M <= N, k % 2 == 0
    require a < b + 1 or abs(half) > 0.1
    y[m,n] = a * scale * half * b * k
}";

/// The cascade's ranks and parameters, without any kernel.
fn artifact(c: &Cascade) -> Artifact {
    let mut buffers = Arena::new();
    for p in &c.params {
        let t = &c.tensors[*p];
        let (name, kind) = (t.name.clone(), BufferKind::Input);
        buffers.push(Buffer { name, dtype: t.dtype, dims: t.dims.clone(), kind, positive: false });
    }
    let (ranks, code) = (c.ranks.clone(), Code::Linked);
    let (name, target) = (c.name.clone(), String::new());
    Artifact { name, target, ranks, buffers, code, launches: vec![], defaults: vec![], facts: vec![] }.with_formulas(c)
}

#[test]
fn values_are_those_of_the_cascade() {
    let c = parse(TEXT).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0);
    let artifact = artifact(&c);
    assert_eq!((artifact.defaults.len(), artifact.facts.len(), artifact.check()), (4, c.requires.len(), Ok(())));
    let mut broken = 0;
    for (m, n) in [(1, 1), (4, 9), (9, 4), (16, 17), (100, 3), (2, 2)] {
        for a in [None, Some(-0.5), Some(2.0)] {
            let sizes = vec![("M".to_owned(), m), ("N".to_owned(), n)];
            let scalars: Vec<_> = a.iter().map(|v| (c.params[0], *v)).collect();
            let given: Vec<_> = a.iter().map(|v| (BufferId::new(0), *v)).collect();
            let Ok(bindings) = bind(&c, &Given { sizes, ..Given::default() }) else {
                assert!(artifact.broken_fact(&[m, n], &given).unwrap().is_some(), "{m} {n} {a:?}");
                broken += 1;
                continue;
            };
            for (i, p) in c.params.iter().enumerate().skip(1) {
                let default = c.tensors[*p].default.unwrap();
                let (of, formula) = &artifact.defaults[i - 1];
                assert_eq!(of.index(), i);
                let found = formula.eval(&artifact, &bindings.extents, &given);
                assert_eq!(found.ok(), scalar_value(&c, &bindings, &scalars, default).ok(), "{m} {n} {a:?} {i}");
            }
            let fact = artifact.broken_fact(&bindings.extents, &given).unwrap();
            assert_eq!(fact.is_none(), check_facts(&c, &bindings, &scalars).is_ok(), "{m} {n} {a:?}: {fact:?}");
            broken += usize::from(fact.is_some());
        }
    }
    assert!(broken > 3, "{broken} facts broken");
    let facts: Vec<&str> = artifact.facts.iter().map(|f| f.text.as_str()).collect();
    assert_eq!(facts[0], "scale > 0");
}

#[test]
fn formulas_of_hostile_bytes_end() {
    let c = parse(TEXT).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0);
    let mut artifact = artifact(&c);
    // A default that needs itself, steps without operands, values left over.
    let scale = artifact.defaults[1].0;
    artifact.defaults[1].1 = Formula(vec![Step::Scalar(scale)]);
    assert_eq!(artifact.default_scalars(&[4, 4], &[(BufferId::new(0), 0.0)]), Err(FormulaError::Malformed));
    for steps in [vec![], vec![Step::Select], vec![Step::Int(1), Step::Int(2)], vec![Step::Binary(BinaryOp::Add)]] {
        assert_eq!(Formula(steps).eval(&artifact, &[4, 4], &[]), Err(FormulaError::Malformed));
    }
    artifact.facts[0].holds = Formula(vec![Step::Scalar(BufferId::new(77))]);
    assert!(artifact.check().is_err());
}
