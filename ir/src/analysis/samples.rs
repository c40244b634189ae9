//! Cascades the analyses are tested on, as papers write them.

use crate::cascade::{Cascade, parse};

/// The only cascade of a text.
pub fn one(source: &str) -> Cascade {
    match parse(source) {
        Ok(m) => m.cascades.into_iter().next().expect("a cascade"),
        Err(d) => panic!("{d:?}\n{source}"),
    }
}

/// Attention with a score expression, a filter and extra parameters.
pub fn attention_with(params: &str, score: &str, filter: &str) -> String {
    format!(
        "cascade attention[B, G, R, M, N, E, F](Q: bf16[B, G*R, M, E], K: bf16[B, G, N, E], V: bf16[B, G, N, F]{params}) \
         -> (O: bf16[B, G*R, M, F]) {{
            S[b,g,r,m,n] = {score} {filter}
            X[b,g,r,m] = max(n) S[b,g,r,m,n]
            P[b,g,r,m,n] = exp(S[b,g,r,m,n] - X[b,g,r,m])
            L[b,g,r,m] = sum(n) P[b,g,r,m,n]
            A[b,g,r,m,n] = P[b,g,r,m,n] / L[b,g,r,m]
            O[b,g*R+r,m,f] = sum(n) A[b,g,r,m,n] * V[b,g,n,f]
        }}"
    )
}

pub const QK: &str = "(sum(e) Q[b,g*R+r,m,e] * K[b,g,n,e]) / sqrt(E)";

pub fn attention() -> String {
    attention_with("", QK, "where n <= m + (N - M)")
}

pub const DEFERRED: &str = "cascade deferred[M, N, E, F](Q: f32[M,E], K: f32[N,E], V: f32[N,F]) -> (O: f32[M,F]) {
    S[m,n] = sum(e) Q[m,e] * K[n,e]
    X[m] = max(n) S[m,n]
    P[m,n] = exp(S[m,n] - X[m])
    L[m] = sum(n) P[m,n]
    O[m,f] = (sum(n) P[m,n] * V[n,f]) / L[m]
}";

pub const UNSTABILISED: &str = "cascade plain[M, N, E, F](Q: f32[M,E], K: f32[N,E], V: f32[N,F]) -> (O: f32[M,F]) {
    S[m,n] = sum(e) Q[m,e] * K[n,e]
    L[m] = sum(n) exp(S[m,n])
    O[m,f] = sum(n) exp(S[m,n]) / L[m] * V[n,f]
}";

pub const UNSTABILISED_DEFERRED: &str =
    "cascade plain[M, N, E, F](Q: f32[M,E], K: f32[N,E], V: f32[N,F]) -> (O: f32[M,F]) {
    S[m,n] = sum(e) Q[m,e] * K[n,e]
    O[m,f] = (sum(n) exp(S[m,n]) * V[n,f]) / (sum(n) exp(S[m,n]))
}";

pub const LSE: &str = "cascade lse[M, N](S: f32[M,N]) -> (Z: f32[M]) {
    X[m] = max(n) S[m,n]
    L[m] = sum(n) exp(S[m,n] - X[m])
    Z[m] = X[m] + log(L[m])
}";

pub const CROSS_ENTROPY: &str = "cascade ce[M, N](S: f32[M,N], target: i32[M]) -> (loss: f32[M]) {
    X[m] = max(n) S[m,n]
    L[m] = sum(n) exp(S[m,n] - X[m])
    loss[m] = X[m] + log(L[m]) - S[m,target[m]]
}";

pub const RMS_MATMUL: &str = "cascade rms[M, K, F](x: f32[M,K], g: f32[K], W: f32[K,F]) -> (y: f32[M,F]) {
    q[m] = (sum(k) x[m,k] * x[m,k]) / K
    r[m] = 1 / sqrt(q[m] + 1e-5)
    h[m,k] = x[m,k] * r[m] * g[k]
    y[m,f] = sum(k) h[m,k] * W[k,f]
}";

/// LayerNorm and matmul; `beta` says whether there is a shift.
pub fn layernorm(beta: bool) -> String {
    let (p, t) = if beta { (", beta: f32[K]", " + beta[k]") } else { ("", "") };
    format!(
        "cascade ln[M, K, F](x: f32[M,K], gamma: f32[K]{p}, W: f32[K,F]) -> (y: f32[M,F]) {{
            mu[m] = (sum(k) x[m,k]) / K
            d[m,k] = x[m,k] - mu[m]
            v[m] = (sum(k) d[m,k] * d[m,k]) / K
            h[m,k] = d[m,k] * rsqrt(v[m] + 1e-5) * gamma[k]{t}
            y[m,f] = sum(k) h[m,k] * W[k,f]
        }}"
    )
}

pub const VARIANCE: &str = "cascade var[M, N](x: f32[M,N]) -> (mu: f32[M], v: f32[M]) {
    mu[m] = (sum(n) x[m,n]) / N
    v[m] = (sum(n) (x[m,n] - mu[m]) * (x[m,n] - mu[m])) / N
}";

pub const THIRD: &str = "cascade third[M, N](x: f32[M,N]) -> (t: f32[M]) {
    mu[m] = (sum(n) x[m,n]) / N
    t[m] = (sum(n) pow(x[m,n] - mu[m], 3)) / N
}";

pub const ENTROPY: &str = "cascade entropy[M, N](S: f32[M,N]) -> (H: f32[M]) {
    X[m] = max(n) S[m,n]
    P[m,n] = exp(S[m,n] - X[m])
    L[m] = sum(n) P[m,n]
    A[m,n] = P[m,n] / L[m]
    H[m] = -(sum(n) A[m,n] * log(A[m,n]))
}";

pub const SOFTMAX: &str = "cascade softmax[M, N](S: f32[M,N]) -> (A: f32[M,N]) {
    X[m] = max(n) S[m,n]
    P[m,n] = exp(S[m,n] - X[m])
    L[m] = sum(n) P[m,n]
    A[m,n] = P[m,n] / L[m]
}";

pub const LAYERNORM: &str = "cascade layernorm[M, K](x: f32[M,K]) -> (y: f32[M,K]) {
    mu[m] = (sum(k) x[m,k]) / K
    v[m] = (sum(k) (x[m,k] - mu[m]) * (x[m,k] - mu[m])) / K
    y[m,k] = (x[m,k] - mu[m]) / sqrt(v[m] + 1e-5)
}";

pub const SIGMOID: &str = "cascade gate[M, N, F](S: f32[M,N], V: f32[N,F]) -> (O: f32[M,F]) {
    X[m] = max(n) S[m,n]
    O[m,f] = sum(n) sigmoid(S[m,n] - X[m]) * V[n,f]
}";

pub const FP8: &str = "cascade quantised[M, K, F](x: f32[M,K], W: f32[K,F]) -> (y: f32[M,F]) {
    a[m] = max(k) abs(x[m,k])
    q[m,k] = f8e4m3(x[m,k] / a[m] * 448.0)
    y[m,f] = (sum(k) f32(q[m,k]) * W[k,f]) * a[m] / 448.0
}";

pub const AMAX: &str = "cascade scaled[M, K, F](x: f32[M,K], W: f32[K,F]) -> (y: f32[M,F]) {
    a[m] = max(k) abs(x[m,k])
    q[m,k] = x[m,k] / a[m] * 448.0
    y[m,f] = (sum(k) q[m,k] * W[k,f]) * a[m] / 448.0
}";
