//! A small Burn model whose attention is Einfall's: a transformer block with and without the swap.
//!
//! `cargo run --example attention [TOKENS]` prints how far both are from the float64 evaluator, whether both are within the
//! computed tolerance, and the times of both on this machine's first device; `cpu` as a second argument takes the processor that runs shaders.

use std::time::{Duration, Instant};

use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::{Device, Module, Tensor};
use burn::tensor::Distribution;
use burn::tensor::activation::{gelu, softmax};
use cubecl::wgpu::WgpuDeviceKind;
use einfall::CompileOptions;
use einfall::ir::array::Array as Values;
use einfall::ir::cascade::bind::{Given, bind};
use einfall::ir::cascade::{eval, parse};
use einfall::ir::dtype::DType;
use einfall::ir::tolerance::{Expected, expect, expect_points};
use einfall_cubecl::{Array, Call, Tuned, adapter};

/// What the model computes between its projections, as on paper.
const ATTENTION: &str = "cascade attention[B, H, M, N, E](Q: f32[B,H,M,E], K: f32[B,H,N,E], V: f32[B,H,N,E])
    -> (O: f32[B,H,M,E]) {
    S[b,h,m,n] = (sum(e) Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E)
    X[b,h,m]   = max(n) S[b,h,m,n]
    P[b,h,m,n] = exp(S[b,h,m,n] - X[b,h,m])
    L[b,h,m]   = sum(n) P[b,h,m,n]
    O[b,h,m,e] = (sum(n) P[b,h,m,n] * V[b,h,n,e]) / L[b,h,m]
}";

type Failure = Box<dyn std::error::Error>;

/// One block: attention and a feed-forward network, each behind a norm.
#[derive(Module, Debug)]
struct Block {
    before: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    between: LayerNorm,
    up: Linear,
    down: Linear,
    heads: usize,
}

/// Attention of [B,H,T,E] queries, keys and values.
type Attention<'a> = dyn Fn(Tensor<4>, Tensor<4>, Tensor<4>) -> Result<Tensor<4>, Failure> + 'a;

impl Block {
    fn new(width: usize, heads: usize, device: &Device) -> Block {
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        let norm = || LayerNormConfig::new(width).init(device);
        Block {
            before: norm(),
            query: linear(width, width),
            key: linear(width, width),
            value: linear(width, width),
            output: linear(width, width),
            between: norm(),
            up: linear(width, 4 * width),
            down: linear(4 * width, width),
            heads,
        }
    }

    /// Queries, keys and values of [B,T,D] tokens, as [B,H,T,E].
    fn projected(&self, x: Tensor<3>) -> [Tensor<4>; 3] {
        let [b, t, d] = x.dims();
        let x = self.before.forward(x);
        let split =
            |linear: &Linear| linear.forward(x.clone()).reshape([b, t, self.heads, d / self.heads]).swap_dims(1, 2);
        [split(&self.query), split(&self.key), split(&self.value)]
    }

    /// [B,T,D] tokens to tokens, by a given attention.
    fn forward(&self, x: Tensor<3>, attention: &Attention) -> Result<Tensor<3>, Failure> {
        let [b, t, d] = x.dims();
        let [q, k, v] = self.projected(x.clone());
        let a = attention(q, k, v)?.swap_dims(1, 2).reshape([b, t, d]);
        let x = x + self.output.forward(a);
        let h = self.down.forward(gelu(self.up.forward(self.between.forward(x.clone()))));
        Ok(x + h)
    }
}

fn burns(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let [_, _, _, e] = q.dims();
    softmax(q.matmul(k.transpose()).div_scalar((e as f32).sqrt()), 3).matmul(v)
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Result<Values, Failure> {
    let dims: Vec<u64> = tensor.dims().iter().map(|n| *n as u64).collect();
    let numbers = tensor.clone().into_data().iter::<f32>().map(f64::from).collect();
    Ok(Values::new(DType::F32, &dims, numbers).ok_or("a tensor without elements")?)
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let tokens: usize = arguments.next().map_or(Ok(256), |n| n.parse())?;
    let cpu = arguments.next().as_deref() == Some("cpu");
    let place = cubecl::Device::wgpu(if cpu { WgpuDeviceKind::Cpu } else { WgpuDeviceKind::DefaultDevice })?;
    let (batch, heads, width) = (1, 4, 128);
    let (client, device) = (place.client(), Device::new(place.clone()));
    println!("{}, [{batch},{tokens},{width}] in {heads} heads, f32", adapter(&client).name);

    let c = parse(ATTENTION).map_err(|d| format!("{d:?}"))?.cascades.remove(0);
    let e = width / heads;
    let sizes: Vec<(String, u64)> = [("B", batch), ("H", heads), ("M", tokens), ("N", tokens), ("E", e)]
        .map(|(n, v)| (n.to_owned(), v as u64))
        .to_vec();
    let tuned = Tuned::compile(&client, &c, &CompileOptions { sizes: sizes.clone(), ..CompileOptions::default() }, 4)?;
    let call = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| -> Result<Call, Failure> {
        let call = Call::new().array("Q", Array::from_tensor(q)?).array("K", Array::from_tensor(k)?);
        Ok(call.array("V", Array::from_tensor(v)?))
    };
    let ours = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| -> Result<Tensor<4>, Failure> {
        let mut results = tuned.launch(call(q, k, v)?)?;
        Ok(results.remove(0).1.into_tensor(&place)?)
    };

    let block = Block::new(width, heads, &device);
    let x = Tensor::<3>::random([batch, tokens, width], Distribution::Normal(0.0, 1.0), &device);
    let [q, k, v] = block.projected(x.clone());
    let taken = tuned.pick(&call(q.clone(), k.clone(), v.clone())?)?;
    println!("{} mappings, cubecl's tuner takes number {taken}", tuned.programs().len());

    let b = bind(&c, &Given { sizes, ..Given::default() })?;
    let inputs = [values(&q)?, values(&k)?, values(&v)?];
    let options = eval::Options::default();
    // All of a small result, rows spread over a large one.
    let step = tokens.div_ceil(32);
    let points: Vec<Vec<u64>> = (0..heads * tokens * e)
        .filter(|i| (i / e) % step == 0)
        .map(|i| vec![0, (i / e / tokens) as u64, (i / e % tokens) as u64, (i % e) as u64])
        .collect();
    let expected: Expected = match step {
        1 => expect(&c, &b, &inputs, &options)?.remove(0),
        _ => expect_points(&c, &b, &inputs, &options, 0, &points)?,
    };
    let mut wrong = false;
    for (name, result) in [("einfall", ours(q.clone(), k.clone(), v.clone())?), ("burn", burns(q, k, v))] {
        let all = values(&result)?.data;
        let at = |p: &Vec<u64>| all[(p[1] as usize * tokens + p[2] as usize) * e + p[3] as usize];
        let some: Vec<f64> = if expected.points.is_some() { points.iter().map(at).collect() } else { all.clone() };
        match expected.compare(&some) {
            Ok(r) => println!(
                "attention, {name}: error {:.1e}, {:.0} % of the tolerance",
                r.worst_error,
                100.0 * r.worst_ratio
            ),
            Err(e) => {
                println!("attention, {name}: {e}");
                wrong = true;
            }
        }
    }

    let by_burn = |q, k, v| Ok(burns(q, k, v));
    let models: [(&str, &Attention); 2] = [("einfall", &ours), ("burn", &by_burn)];
    for (name, attention) in models {
        let run = || block.forward(x.clone(), attention);
        println!("block, {name}: {:.2} ms", median(&device, run)?.as_secs_f64() * 1e3);
    }
    let [q, k, v] = block.projected(x.clone());
    for (name, attention) in models {
        let run = || attention(q.clone(), k.clone(), v.clone());
        println!("attention, {name}: {:.2} ms", median(&device, run)?.as_secs_f64() * 1e3);
    }
    let far = (block.forward(x.clone(), &ours)? - block.forward(x, &by_burn)?).abs().max().into_scalar::<f32>();
    println!("block: the two differ by {far:.1e} at most");
    if wrong { Err("a result is out of tolerance".into()) } else { Ok(()) }
}

/// The median of eleven runs by the wall clock, after two to warm up.
fn median<const D: usize>(
    device: &Device,
    mut run: impl FnMut() -> Result<Tensor<D>, Failure>,
) -> Result<Duration, Failure> {
    let mut times = Vec::new();
    for i in 0..13 {
        let start = Instant::now();
        let result = run()?;
        device.sync().map_err(|e| format!("{e:?}"))?;
        drop(result);
        if i >= 2 {
            times.push(start.elapsed());
        }
    }
    times.sort();
    Ok(times[times.len() / 2])
}
