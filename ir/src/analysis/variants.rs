//! Renamed, reordered and algebraically rewritten forms of one definition derive the same, and every cascade of the
//! library derives what its family should.

use std::collections::BTreeMap;

use super::explain::{Options, report};
use super::samples;
use super::{check, derive};
use crate::cascade::{Module, parse};

fn facts(m: &Module, rank: &str) -> (Option<usize>, Option<usize>, Option<Vec<String>>) {
    let r = report(m, &Options::default(), &BTreeMap::new()).cascades.remove(0);
    let r = r.ranks.get(rank).unwrap_or_else(|| panic!("no rank {rank}")).clone();
    (r.passes_after, r.separation_rank, r.anchors)
}

fn of(text: &str, rank: &str) -> (Option<usize>, Option<usize>, Option<Vec<String>>) {
    facts(&parse(text).unwrap_or_else(|d| panic!("{d:?}\n{text}")), rank)
}

/// Every text derives what the first does, and every derivation passes the checker.
fn all_same(texts: &[String], rank: &str) {
    let want = of(&texts[0], rank);
    for t in texts {
        assert_eq!(of(t, rank), want, "{t}");
        let m = parse(t).unwrap();
        let c = &m.cascades[0];
        let d = derive::derive(c, c.rank(rank).unwrap()).unwrap_or_else(|| panic!("nothing derived: {t}"));
        let derived = crate::cascade::print::print_cascade(&d.cascade);
        assert_eq!(check::check(c, &d), Ok(()), "{t}\n{derived}");
    }
}

#[test]
fn attention() {
    let head = "cascade a[M, N, E, F](Q: f32[M,E], K: f32[N,E], V: f32[N,F]) -> (O: f32[M,F]) {";
    let bodies = [
        // As on paper.
        "S[m,n] = (sum(e) Q[m,e] * K[n,e]) / sqrt(E)
         X[m] = max(n) S[m,n]
         P[m,n] = exp(S[m,n] - X[m])
         L[m] = sum(n) P[m,n]
         O[m,f] = sum(n) P[m,n] / L[m] * V[n,f]",
        // A quotient of exponentials, a reciprocal, operands exchanged.
        "S[m,n] = sum(e) K[n,e] * Q[m,e] * rsqrt(E)
         X[m] = max(n) S[m,n]
         P[m,n] = exp(S[m,n]) / exp(X[m])
         L[m] = recip(sum(n) P[m,n])
         O[m,f] = sum(n) V[n,f] * (L[m] * P[m,n])",
        // The scale distributed into the maximum, statements merged.
        "S[m,n] = sum(e) Q[m,e] * K[n,e]
         X[m] = max(n) S[m,n] / sqrt(E)
         L[m] = sum(n) exp(S[m,n] / sqrt(E) - X[m])
         O[m,f] = (sum(n) exp(S[m,n] / sqrt(E) - X[m]) * V[n,f]) / L[m]",
        // Scaled queries, one statement split in two, base 2.
        "T[m,e] = Q[m,e] / sqrt(E)
         S[m,n] = sum(e) T[m,e] * K[n,e]
         X[m] = max(n) S[m,n]
         D[m,n] = S[m,n] - X[m]
         P[m,n] = exp2(D[m,n] / log(2))
         O[m,f] = (sum(n) P[m,n] * V[n,f]) * (1 / (sum(n) P[m,n]))",
        // Not stabilised.
        "S[m,n] = (sum(e) Q[m,e] * K[n,e]) / sqrt(E)
         W[m,n] = exp(S[m,n])
         O[m,f] = sum(n) W[m,n] * V[n,f] / (sum(j in N) W[m,j])",
        // Through the logarithm of the denominator.
        "S[m,n] = (sum(e) Q[m,e] * K[n,e]) / sqrt(E)
         Z[m] = logsumexp(n) S[m,n]
         O[m,f] = sum(n) exp(S[m,n] - Z[m]) * V[n,f]",
    ];
    let mut texts: Vec<String> = bodies.iter().map(|b| format!("{head}\n{b}\n}}")).collect();
    texts.push(
        "cascade other[I, J, D, H](a: f32[I,D], b: f32[J,D], c: f32[J,H]) -> (y: f32[I,H]) {
            s[i,j] = (sum(d) a[i,d] * b[j,d]) / sqrt(D)
            t[i] = max(j) s[i,j]
            u[i,j] = exp(s[i,j] - t[i])
            w[i] = sum(j) u[i,j]
            y[i,h] = sum(j) u[i,j] / w[i] * c[j,h]
        }"
        .replace("J", "N")
        .replace("[i,j]", "[i,n]")
        .replace("(j)", "(n)")
        .replace("[j,", "[n,"),
    );
    all_same(&texts, "N");
}

#[test]
fn layernorm() {
    let head = "cascade l[M, K, F](x: f32[M,K], g: f32[K], W: f32[K,F]) -> (y: f32[M,F]) {\n";
    let bodies = [
        "mu[m] = (sum(k) x[m,k]) / K
         v[m] = (sum(k) (x[m,k] - mu[m]) * (x[m,k] - mu[m])) / K
         h[m,k] = (x[m,k] - mu[m]) / sqrt(v[m] + 1e-5) * g[k]
         y[m,f] = sum(k) h[m,k] * W[k,f]",
        "mu[m] = sum(k) x[m,k] / K
         v[m] = (sum(k) x[m,k] * x[m,k]) / K - mu[m] * mu[m]
         y[m,f] = sum(k) g[k] * W[k,f] * (x[m,k] - mu[m]) * rsqrt(v[m] + 1e-5)",
        "s[m] = sum(k) x[m,k]
         c[m,k] = x[m,k] - s[m] * (1.0 / K)
         v[m] = sum(k) pow(c[m,k], 2) * recip(K)
         r[m] = pow(v[m] + 1e-5, -0.5)
         y[m,f] = r[m] * (sum(k) c[m,k] * (g[k] * W[k,f]))",
    ];
    all_same(&bodies.map(|b| format!("{head}{b}\n}}")), "K");
}

#[test]
fn rmsnorm() {
    let head = "cascade l[M, K, F](x: f32[M,K], g: f32[K], W: f32[K,F]) -> (y: f32[M,F]) {\n";
    let bodies = [
        "q[m] = (sum(k) x[m,k] * x[m,k]) / K
         h[m,k] = x[m,k] / sqrt(q[m] + 1e-5) * g[k]
         y[m,f] = sum(k) h[m,k] * W[k,f]",
        "r[m] = rsqrt((sum(k) pow(x[m,k], 2)) * (1.0 / K) + 1e-5)
         y[m,f] = sum(k) W[k,f] * (g[k] * (r[m] * x[m,k]))",
        "q[m] = sum(k) x[m,k] * x[m,k] / K
         y[m,f] = sum(k) x[m,k] * pow(q[m] + 1e-5, -0.5) * g[k] * W[k,f]",
    ];
    all_same(&bodies.map(|b| format!("{head}{b}\n}}")), "K");
}

#[test]
fn entropy() {
    let head = "cascade h[M, N](S: f32[M,N]) -> (H: f32[M]) {\n";
    let bodies = [
        "X[m] = max(n) S[m,n]
         P[m,n] = exp(S[m,n] - X[m])
         L[m] = sum(n) P[m,n]
         A[m,n] = P[m,n] / L[m]
         H[m] = -(sum(n) A[m,n] * log(A[m,n]))",
        "L[m] = sum(n) exp(S[m,n])
         A[m,n] = exp(S[m,n]) / L[m]
         H[m] = sum(n) A[m,n] * (log(L[m]) - S[m,n])",
        "Z[m] = logsumexp(n) S[m,n]
         H[m] = sum(n) (Z[m] - S[m,n]) * exp(S[m,n] - Z[m])",
    ];
    all_same(&bodies.map(|b| format!("{head}{b}\n}}")), "N");
}

/// Random compositions: each reduction uses what the ones before it found.
#[test]
fn random_compositions_stay_exact() {
    let mut random = super::precise::Stream(42);
    let mut derived = 0;
    for _ in 0..24 {
        let mut pick = |n: usize| (random.unit() * n as f64) as usize;
        let mut body = String::new();
        let mut known: Vec<String> = Vec::new();
        for k in 0..2 + pick(2) {
            let scalar = known.get(pick(known.len().max(1))).cloned();
            let element = match (pick(5), &scalar) {
                (0, Some(r)) => format!("exp(x[m,n] - {r})"),
                (1, Some(r)) => format!("(x[m,n] - {r}) * w[n]"),
                (2, Some(r)) => format!("x[m,n] * w[n] / (1.0 + {r} * {r})"),
                (3, Some(r)) => format!("w[n] * exp(0.5 * x[m,n] + {r})"),
                (_, _) => ["x[m,n]", "x[m,n] * x[m,n]", "exp(x[m,n])", "w[n] * x[m,n]"][pick(4)].to_string(),
            };
            let op = if pick(4) == 0 { "max" } else { "sum" };
            body += &format!("r{k}[m] = {op}(n) {element}\n");
            known.push(format!("r{k}[m]"));
        }
        let last = known.join(" + ");
        let text = format!("cascade c[M, N](x: f32[M,N], w: f32[N]) -> (y: f32[M]) {{\n{body}y[m] = {last}\n}}");
        let m = parse(&text).unwrap_or_else(|d| panic!("{d:?}\n{text}"));
        let c = &m.cascades[0];
        if let Some(d) = derive::derive(c, c.rank("N").unwrap()) {
            derived += 1;
            assert_eq!(check::check(c, &d), Ok(()), "{text}");
        }
    }
    assert!(derived >= 8, "only {derived} compositions derived anything");
}

#[test]
fn the_library() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels");
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("{dir}/{name}.ein")).unwrap_or_else(|e| panic!("{name}: {e}"));
        parse(&text).unwrap_or_else(|d| panic!("{name}: {d:?}"))
    };
    for (name, rank, passes, j) in [
        ("attention", "N", 1, Some(1)),
        ("attention_alibi", "N", 1, Some(1)),
        ("attention_bias", "N", 1, Some(1)),
        ("attention_block_mask", "N", 1, Some(1)),
        ("attention_deferred", "N", 1, Some(1)),
        ("attention_documents", "N", 1, Some(1)),
        ("attention_full", "N", 1, Some(1)),
        ("attention_gqa", "N", 1, Some(1)),
        ("attention_sink", "N", 1, Some(1)),
        ("attention_softcap", "N", 1, Some(1)),
        ("attention_unstabilised", "N", 1, Some(1)),
        ("attention_window", "N", 1, Some(1)),
        ("cross_entropy", "N", 1, Some(1)),
        ("entropy", "N", 1, Some(2)),
        ("logsumexp", "N", 1, Some(1)),
        ("layernorm_matmul", "K", 1, Some(2)),
        ("layernorm_affine_matmul", "K", 1, Some(3)),
        ("rmsnorm_matmul", "K", 1, Some(1)),
        ("mean_variance", "K", 1, Some(3)),
        ("third_moment", "K", 1, Some(4)),
        ("sigmoid_minus_max", "N", 2, None),
        ("quantised_matmul", "K", 2, None),
    ] {
        let m = read(name);
        let f = facts(&m, rank);
        assert_eq!((f.0, f.1), (Some(passes), j), "{name}");
        let c = &m.cascades[0];
        if j.is_some() {
            let d = derive::derive(c, c.rank(rank).unwrap()).unwrap_or_else(|| panic!("{name}: nothing derived"));
            assert_eq!(check::check(c, &d), Ok(()), "{name}");
        }
    }
    for name in ["softmax", "layernorm"] {
        let r = report(&read(name), &Options::default(), &BTreeMap::new()).cascades.remove(0);
        assert!(r.refusals.iter().any(|r| r.reason.contains("keeps rank")), "{name}: {r:?}");
        assert!(r.ranks.values().any(|r| r.passes_after >= Some(2)), "{name}");
    }
    // Every cascade of the library has a report.
    for f in std::fs::read_dir(dir).expect("kernels").flatten() {
        if f.path().extension().is_some_and(|e| e == "ein") {
            let text = std::fs::read_to_string(f.path()).expect("a readable file");
            if let Ok(m) = parse(&text) {
                report(&m, &Options::default(), &BTreeMap::new());
            }
        }
    }
}

#[test]
fn a_table_row_is_not_the_name() {
    // The same text under another name and rank letters derives the same.
    let text = samples::attention();
    let renamed = text.replace("cascade attention", "cascade zzz").replace("S[", "score[").replace("P[", "prob[");
    assert_eq!(of(&text, "N"), of(&renamed, "N"));
}
