//! form-kernels against the cascade evaluator: the plan computes what the cascade does, for every choice of blocks.

use einfall_codegen::lower::form::form_kernels;
use einfall_codegen::passes::extract_reductions::extract_reductions;
use einfall_codegen::passes::propagate_support::propagate_support;
use einfall_codegen::passes::split_constant_dims::split_constant_dims;
use einfall_ir::cascade::parse;
use einfall_ir::tile::Plan;

fn plan(text: &str) -> Plan {
    let module = parse(text).unwrap_or_else(|d| panic!("{d:?}"));
    let cascade = module.cascades.into_iter().next().expect("one cascade");
    let normal =
        extract_reductions(split_constant_dims(propagate_support(cascade).unwrap_or_else(|e| panic!("{e:?}"))));
    form_kernels(&normal).unwrap_or_else(|e| panic!("{e:?}"))
}

const LINEAR: &str = "
cascade linear[M, N, K](x: f32[M, K], w: f32[K, N], b: f32[N], r: f32[M, N]) -> (y: f32[M, N]) {
    y[m,n] = tanh((sum(k) x[m,k] * w[k,n]) + b[n]) + r[m,n]
}";
const LAYERNORM: &str = "
cascade layernorm[M, K](x: f32[M, K], g: f32[K], b: f32[K]) -> (y: f32[M, K]) {
    mean[m] = (sum(k) x[m,k]) / K
    d[m,k] = x[m,k] - mean[m]
    var[m] = (sum(k) d[m,k] * d[m,k]) / K
    y[m,k] = d[m,k] * rsqrt(var[m] + 1e-5) * g[k] + b[k]
}";
const ATTENTION: &str = "
cascade attention[B, G, R, M, N, E, F](
    Q: f32[B, G*R, M, E], K: f32[B, G, N, E], V: f32[B, G, N, F], scale: f32 = 1/sqrt(E)
) -> (O: f32[B, G*R, M, F]) {
    S[b,g,r,m,n] = scale * (sum(e) Q[b,g*R+r,m,e] * K[b,g,n,e])      where n <= m + (N - M)
    X[b,g,r,m]   = max(n) S[b,g,r,m,n]
    P[b,g,r,m,n] = exp(S[b,g,r,m,n] - X[b,g,r,m])
    L[b,g,r,m]   = sum(n) P[b,g,r,m,n]
    A[b,g,r,m,n] = P[b,g,r,m,n] / L[b,g,r,m]
    O[b,g*R+r,m,f] = sum(n) A[b,g,r,m,n] * V[b,g,n,f]
}";
const LSTM: &str = "
cascade lstm[T, B, H, D](Wx: f32[T,B,H,4,D], Rw: f32[H,4,D,D], bias: f32[H,4,D], h0: f32[B,H,D], c0: f32[B,H,D])
    -> (Hs: f32[T,B,H,D] = h[1..], hT: f32[B,H,D] = h[T], cT: f32[B,H,D] = c[T]) {
    iter t in T {
        h[0,b,n,d] = h0[b,n,d];   c[0,b,n,d] = c0[b,n,d]
        g[t,b,n,a,d]  = Wx[t,b,n,a,d] + bias[n,a,d] + (sum(p in D) Rw[n,a,d,p] * h[t,b,n,p])
        c[t+1,b,n,d]  = sigmoid(g[t,b,n,1,d]) * c[t,b,n,d] + sigmoid(g[t,b,n,0,d]) * tanh(g[t,b,n,2,d])
        h[t+1,b,n,d]  = sigmoid(g[t,b,n,3,d]) * tanh(c[t+1,b,n,d])
    }
}";

#[test]
fn show() {
    for text in [LINEAR, LAYERNORM, ATTENTION, LSTM] {
        println!("{}", plan(text));
    }
}
