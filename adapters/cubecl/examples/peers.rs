//! Einfall's kernels and Burn's own on one device in one process, timed in turns.
//!
//! ```text
//! peers [--device default|cpu|discrete:N] [--only PART] [--small] [--blocks N] [--ms N] [--rule]
//! ```
//! One JSON line for each case and peer: medians of both over the blocks, the median of the ratio (the peer's time over
//! ours, block by block) with its span, and how far each result is from float64 in parts of the computed tolerance. Times
//! are cubecl's profile of a batch of launches, the device's own timestamps where it has them, divided by the launches.
//! Everything runs before it is timed, so that cubecl's tuners and compilers are done; the first block, in which an idle
//! device raises its clocks, counts for nothing. `--only` takes the cases whose line has a part; `--rule` takes the model's
//! mapping instead of what cubecl's tuner finds among several; `--small` is for processors that run shaders.
//!
//! Invariant: a case's runs read the same tensors, and none is timed whose result was not compared.

use std::time::Duration;

use burn::nn::{LayerNormConfig, RmsNormConfig};
use burn::prelude::{Device, Tensor};
use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Distribution, FloatDType};
use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuDeviceKind, init_setup};
use einfall::CompileOptions;
use einfall::ir::array::Array as Values;
use einfall::ir::cascade::bind::{Given, bind};
use einfall::ir::cascade::{Cascade, eval, parse};
use einfall::ir::dtype::DType;
use einfall::ir::tolerance::expect_points;
use einfall_cubecl::{Array, Call, Program, Tuned, adapter};

type Failure = Box<dyn std::error::Error>;
type Result<T> = std::result::Result<T, Failure>;

/// The product of two matrices; `T` is the type of the elements.
const MATMUL: &str = "cascade matmul[M, N, K](A: T[M,K], B: T[K,N]) -> (Y: T[M,N]) {
    Y[m,n] = sum(k) A[m,k] * B[k,n]
}";

const ATTENTION: &str =
    "cascade attention[B, H, M, N, E](Q: T[B,H,M,E], K: T[B,H,N,E], V: T[B,H,N,E]) -> (O: T[B,H,M,E]) {
    S[b,h,m,n] = (sum(e) Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E)
    X[b,h,m]   = max(n) S[b,h,m,n]
    P[b,h,m,n] = exp(S[b,h,m,n] - X[b,h,m])
    L[b,h,m]   = sum(n) P[b,h,m,n]
    O[b,h,m,e] = (sum(n) P[b,h,m,n] * V[b,h,n,e]) / L[b,h,m]
}";

/// Attention as three launches that meet in memory.
const SCORES: &str = "cascade scores[B, H, M, N, E](Q: T[B,H,M,E], K: T[B,H,N,E]) -> (S: T[B,H,M,N]) {
    S[b,h,m,n] = (sum(e) Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E)
}";
const ROWS: &str = "cascade rows[B, H, M, N](S: T[B,H,M,N]) -> (P: T[B,H,M,N]) {
    X[b,h,m]   = max(n) S[b,h,m,n]
    Y[b,h,m,n] = exp(S[b,h,m,n] - X[b,h,m])
    L[b,h,m]   = sum(n) Y[b,h,m,n]
    P[b,h,m,n] = Y[b,h,m,n] / L[b,h,m]
}";
const VALUES: &str = "cascade values[B, H, M, N, E](P: T[B,H,M,N], V: T[B,H,N,E]) -> (O: T[B,H,M,E]) {
    O[b,h,m,e] = sum(n) P[b,h,m,n] * V[b,h,n,e]
}";

const SOFTMAX: &str = "cascade softmax[M, N](x: T[M,N]) -> (y: T[M,N]) {
    X[m]   = max(n) x[m,n]
    P[m,n] = exp(x[m,n] - X[m])
    L[m]   = sum(n) P[m,n]
    y[m,n] = P[m,n] / L[m]
}";

const RMSNORM: &str = "cascade rmsnorm[M, N](x: T[M,N], g: f32[N]) -> (y: T[M,N]) {
    R[m]   = sqrt((sum(n) x[m,n] * x[m,n]) / N + 1e-5)
    y[m,n] = x[m,n] / R[m] * g[n]
}";

const LAYERNORM: &str = "cascade layernorm[M, N](x: T[M,N], g: f32[N], b: f32[N]) -> (y: T[M,N]) {
    U[m]   = (sum(n) x[m,n]) / N
    V[m]   = (sum(n) (x[m,n] - U[m]) * (x[m,n] - U[m])) / N
    y[m,n] = (x[m,n] - U[m]) / sqrt(V[m] + 1e-5) * g[n] + b[n]
}";

const COPY: &str = "cascade copy[M, N](x: T[M,N]) -> (y: T[M,N]) {
    y[m,n] = x[m,n]
}";

/// What the command line asks for.
struct Asked {
    kind: WgpuDeviceKind,
    only: Option<String>,
    small: bool,
    blocks: usize,
    block: Duration,
    rule: bool,
}

impl Asked {
    fn read() -> Result<Asked> {
        let mut asked = Asked {
            kind: WgpuDeviceKind::DefaultDevice,
            only: None,
            small: false,
            blocks: 9,
            block: Duration::from_millis(40),
            rule: false,
        };
        let mut all = std::env::args().skip(1);
        while let Some(flag) = all.next() {
            let mut value = || all.next().ok_or(format!("{flag} takes a value"));
            match flag.as_str() {
                "--device" => asked.kind = kind(&value()?)?,
                "--only" => asked.only = Some(value()?),
                "--small" => asked.small = true,
                "--blocks" => asked.blocks = value()?.parse()?,
                "--ms" => asked.block = Duration::from_millis(value()?.parse()?),
                "--rule" => asked.rule = true,
                _ => return Err(format!("`{flag}` is no option: see the first lines of peers.rs").into()),
            }
        }
        if asked.blocks < 2 {
            return Err("--blocks: two or more, since the first does not count".into());
        }
        Ok(asked)
    }
}

fn kind(name: &str) -> Result<WgpuDeviceKind> {
    Ok(match name.split_once(':') {
        None if name == "default" => WgpuDeviceKind::DefaultDevice,
        None if name == "cpu" => WgpuDeviceKind::Cpu,
        Some(("discrete", n)) => WgpuDeviceKind::DiscreteGpu(n.parse()?),
        _ => return Err(format!("`{name}` is no device: default, cpu or discrete:N").into()),
    })
}

/// Everything that cases share.
struct Bench {
    asked: Asked,
    place: cubecl::Device,
    device: Device,
    adapter: String,
    driver: String,
    wrong: usize,
    left: usize,
}

/// Something that makes a case's result.
type Run<'a, const D: usize> = (&'static str, Box<dyn Fn() -> Result<Tensor<D>> + 'a>);

/// What a case is about: its name, the extents on its line, the type, bytes that must move and operations that must be done.
struct What<'a> {
    name: &'a str,
    shape: String,
    dtype: DType,
    bytes: f64,
    flops: f64,
}

/// The program whose cascade says what is right, with its inputs.
struct Truth<'a> {
    ours: &'a Ours,
    inputs: Vec<Values>,
}

impl Bench {
    fn wants(&self, name: &str, dtype: DType) -> bool {
        self.asked.only.as_ref().is_none_or(|part| format!("{name} {dtype}").contains(part.as_str()))
    }

    fn random<const D: usize>(&self, shape: [usize; D], dtype: DType) -> Tensor<D> {
        let x = Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &self.device);
        if dtype == DType::F16 { x.cast(FloatDType::F16) } else { x }
    }

    /// A cascade of elements of `dtype`, compiled to be fast at sizes.
    fn ours(&self, text: &str, dtype: DType, sizes: &[(&str, usize)]) -> Result<Ours> {
        let text = text.replace(": T[", &format!(": {dtype}["));
        let cascade = parse(&text).map_err(|d| format!("{d:?}"))?.cascades.remove(0);
        let sizes: Vec<(String, u64)> = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v as u64)).collect();
        let options = CompileOptions { sizes: sizes.clone(), ..CompileOptions::default() };
        let client = self.place.client();
        let tuned = if self.asked.rule {
            let program = Program::compile(&client, &cascade, &options)?;
            Tuned::new(vec![("the rule's".to_owned(), program)])?
        } else {
            Tuned::compile(&client, &cascade, &options, 4)?
        };
        Ok(Ours { cascade, sizes, tuned, place: self.place.clone() })
    }

    /// Times `runs` in turns, the first being ours, after comparing each result with float64 at some elements.
    fn case<const D: usize>(&mut self, what: &What<'_>, truth: &Truth<'_>, runs: &[Run<'_, D>]) -> Result<()> {
        let (mut parts, mut first): (Vec<f64>, Option<Tensor<D>>) = (Vec::new(), None);
        let mut far = Vec::new();
        for (name, run) in runs {
            let result = run()?;
            let ratio = truth.ratio(&result)?;
            // An error of the tolerance's size is a wrong result of ours; a peer may have other types inside.
            if ratio.is_nan() || (ratio > 1.0 && parts.is_empty()) {
                eprintln!("{} {}: {name} is wrong, {ratio:.2} of the tolerance", what.name, what.shape);
                self.wrong += 1;
            }
            parts.push(ratio);
            let result = result.cast(FloatDType::F32);
            far.push(first.as_ref().map_or(0.0, |f| (f.clone() - result.clone()).abs().max().into_scalar::<f32>()));
            first = first.or(Some(result));
        }
        drop(first);
        // How many launches make a block, by the third run.
        let mut launches = Vec::new();
        for (_, run) in runs {
            self.time(run, 2)?;
            let one = self.time(run, 1)?.0.max(1e-6);
            launches.push(((self.asked.block.as_secs_f64() / one) as usize).clamp(1, 200));
        }
        let (mut times, mut clock) = (vec![Vec::new(); runs.len()], "");
        for block in 0..self.asked.blocks {
            for (i, (_, run)) in runs.iter().enumerate() {
                let (time, method) = self.time(run, launches[i])?;
                clock = method;
                if block > 0 {
                    times[i].push(time);
                }
            }
        }
        let Some((ours, peers)) = times.split_first() else { return Ok(()) };
        for (i, peer) in peers.iter().enumerate() {
            let mut ratios: Vec<f64> = peer.iter().zip(ours).map(|(p, o)| p / o).collect();
            let (o, p, r) = (median(&mut ours.clone()), median(&mut peer.clone()), median(&mut ratios));
            let rate = |t: f64| (what.bytes / t / 1e9, what.flops / t / 1e12);
            let ((og, of), (pg, pf)) = (rate(o), rate(p));
            println!(
                "{{\"name\":\"{}\",\"shape\":\"{}\",\"dtype\":\"{}\",\"ours\":\"{}\",\"peer\":\"{}\",\"ours_ms\":{:.5},\
                 \"peer_ms\":{:.5},\"ratio\":{r:.3},\"low\":{:.3},\"high\":{:.3},\"ours_gbs\":{og:.1},\"peer_gbs\":{pg:.1},\
                 \"ours_tflops\":{of:.3},\"peer_tflops\":{pf:.3},\"ours_tolerance\":{:.3},\"peer_tolerance\":{:.3},\
                 \"difference\":{:.1e},\"launches\":[{},{}],\"blocks\":{},\"clock\":\"{clock}\",\"adapter\":\"{}\",\
                 \"driver\":\"{}\"}}",
                what.name,
                what.shape,
                what.dtype,
                runs[0].0,
                runs[i + 1].0,
                o * 1e3,
                p * 1e3,
                ratios[0],
                ratios[ratios.len() - 1],
                parts[0],
                parts[i + 1],
                far[i + 1],
                launches[0],
                launches[i + 1],
                self.asked.blocks - 1,
                self.adapter,
                self.driver,
            );
        }
        Ok(())
    }

    /// Seconds of one run, of `n` one after the other, and whose clock that is.
    fn time<const D: usize>(
        &self,
        run: &(dyn Fn() -> Result<Tensor<D>> + '_),
        n: usize,
    ) -> Result<(f64, &'static str)> {
        let client = self.place.client();
        self.device.sync().map_err(|e| format!("{e:?}"))?;
        let window = client.profile_start()?;
        for _ in 0..n {
            match run() {
                Ok(result) => drop(result),
                Err(e) => {
                    client.profile_abandon(window);
                    return Err(e);
                }
            }
        }
        let profile = client.profile_end(window)?;
        let clock = match profile.timing_method() {
            cubecl::profile::TimingMethod::Device => "device",
            cubecl::profile::TimingMethod::System => "wall",
        };
        let ticks = cubecl::future::block_on(profile.resolve()).ok_or("a batch without a time")?;
        Ok((ticks.duration().as_secs_f64() / n as f64, clock))
    }

    /// Runs a case's function where it is asked for; one that cannot run says why and leaves the others alone.
    fn run(&mut self, name: &str, dtype: DType, case: impl FnOnce(&mut Bench) -> Result<()>) {
        if !self.wants(name, dtype) {
            return;
        }
        if let Err(e) = case(self) {
            eprintln!("{name} {dtype}: left out: {e}");
            self.left += 1;
        }
    }

    fn sized(&self, large: usize, small: usize) -> usize {
        if self.asked.small { small } else { large }
    }

    fn product(&mut self, name: &str, dtype: DType, [m, n, k]: [usize; 3]) -> Result<()> {
        let (a, b) = (self.random([m, k], dtype), self.random([k, n], dtype));
        let ours = self.ours(MATMUL, dtype, &[("M", m), ("N", n), ("K", k)])?;
        let call = || Ok(ours.call(&[("A", &a), ("B", &b)])?.remove(0).1.into_tensor::<2>(&ours.place)?);
        let what = What {
            name,
            shape: format!("{m}x{n}x{k}"),
            dtype,
            bytes: bytes(dtype, m * k + k * n + m * n),
            flops: 2.0 * (m * n) as f64 * k as f64,
        };
        let truth = Truth { ours: &ours, inputs: vec![values(&a)?, values(&b)?] };
        let burn = || Ok(a.clone().matmul(b.clone()));
        self.case(&what, &truth, &[("einfall", Box::new(call)), ("burn matmul", Box::new(burn))])
    }

    fn attention(&mut self, name: &str, dtype: DType, [b, h, n, e]: [usize; 4]) -> Result<()> {
        let [q, k, v] = [(); 3].map(|()| self.random([b, h, n, e], dtype));
        let sizes = [("B", b), ("H", h), ("M", n), ("N", n), ("E", e)];
        let ours = self.ours(ATTENTION, dtype, &sizes)?;
        let [scores, rows, sums] = [SCORES, ROWS, VALUES].map(|text| self.ours(text, dtype, &sizes));
        let (scores, rows, sums) = (scores?, rows?, sums?);
        let call = || Ok(ours.call(&[("Q", &q), ("K", &k), ("V", &v)])?.remove(0).1.into_tensor(&ours.place)?);
        let unfused = || {
            let s = scores.call(&[("Q", &q), ("K", &k)])?.remove(0).1;
            let p = rows.tuned.launch(Call::new().array("S", s))?.remove(0).1;
            let call = Call::new().array("P", p).array("V", Array::from_tensor(v.clone())?);
            Ok(sums.tuned.launch(call)?.remove(0).1.into_tensor(&sums.place)?)
        };
        let what = What {
            name,
            shape: format!("{b}x{h}x{n}x{e}"),
            dtype,
            bytes: bytes(dtype, 4 * b * h * n * e),
            flops: 4.0 * (b * h * e) as f64 * (n as f64).powi(2),
        };
        let truth = Truth { ours: &ours, inputs: vec![values(&q)?, values(&k)?, values(&v)?] };
        let module = || Ok(attention(q.clone(), k.clone(), v.clone(), None, None, AttentionModuleOptions::default()));
        let sequence = || Ok(steps(q.clone(), k.clone(), v.clone()));
        let runs: [Run<'_, 4>; 4] = [
            ("einfall", Box::new(call)),
            ("einfall, three launches", Box::new(unfused)),
            ("burn attention", Box::new(module)),
            ("burn softmax(QK)V", Box::new(sequence)),
        ];
        self.case(&what, &truth, &runs)
    }

    fn decode(&mut self, name: &str, dtype: DType, [b, h, n, e]: [usize; 4]) -> Result<()> {
        let q = self.random([b, h, 1, e], dtype);
        let [k, v] = [(); 2].map(|()| self.random([b, h, n, e], dtype));
        // Attention of one query.
        let ours = self.ours(ATTENTION, dtype, &[("B", b), ("H", h), ("M", 1), ("N", n), ("E", e)])?;
        let call = || Ok(ours.call(&[("Q", &q), ("K", &k), ("V", &v)])?.remove(0).1.into_tensor(&ours.place)?);
        let what = What {
            name,
            shape: format!("{b}x{h}x{n}x{e}"),
            dtype,
            bytes: bytes(dtype, 2 * b * h * n * e),
            flops: 4.0 * (b * h * e) as f64 * n as f64,
        };
        let truth = Truth { ours: &ours, inputs: vec![values(&q)?, values(&k)?, values(&v)?] };
        let module = || Ok(attention(q.clone(), k.clone(), v.clone(), None, None, AttentionModuleOptions::default()));
        let sequence = || Ok(steps(q.clone(), k.clone(), v.clone()));
        let runs: [Run<'_, 4>; 3] = [
            ("einfall", Box::new(call)),
            ("burn attention", Box::new(module)),
            ("burn softmax(QK)V", Box::new(sequence)),
        ];
        self.case(&what, &truth, &runs)
    }

    /// Kernels of rows: what Burn has for each.
    fn rows(&mut self, name: &str, dtype: DType, [m, n]: [usize; 2]) -> Result<()> {
        let x = self.random([m, n], dtype);
        let rms = RmsNormConfig::new(n).with_epsilon(1e-5).init(&self.device);
        let layer = LayerNormConfig::new(n).with_epsilon(1e-5).init(&self.device);
        let g = rms.gamma.val();
        let zero = Tensor::<1>::zeros([n], &self.device);
        let (text, label) = match name {
            "softmax" => (SOFTMAX, "burn softmax"),
            "rmsnorm" => (RMSNORM, "burn RmsNorm"),
            "layernorm" => (LAYERNORM, "burn LayerNorm"),
            _ => (COPY, "burn x + 0"),
        };
        let ours = self.ours(text, dtype, &[("M", m), ("N", n)])?;
        let more: &[(&str, &Tensor<1>)] = match name {
            "rmsnorm" => &[("g", &g)],
            "layernorm" => &[("g", &g), ("b", &zero)],
            _ => &[],
        };
        let call = || {
            let mut call = Call::new().array("x", Array::from_tensor(x.clone())?);
            for (name, w) in more {
                call = call.array(name, Array::from_tensor((*w).clone())?);
            }
            Ok(ours.tuned.launch(call)?.remove(0).1.into_tensor::<2>(&ours.place)?)
        };
        let what = What { name, shape: format!("{m}x{n}"), dtype, bytes: bytes(dtype, 2 * m * n), flops: 0.0 };
        let mut inputs = vec![values(&x)?];
        for (_, w) in more {
            inputs.push(values(w)?);
        }
        let truth = Truth { ours: &ours, inputs };
        let burn = || {
            let x = x.clone();
            Ok(match name {
                "softmax" => softmax(x, 1),
                "rmsnorm" => rms.forward(x),
                "layernorm" => layer.forward(x),
                _ => x.add_scalar(0.0),
            })
        };
        self.case(&what, &truth, &[("einfall", Box::new(call)), (label, Box::new(burn))])
    }
}

/// A cascade of ours on the device.
struct Ours {
    cascade: Cascade,
    sizes: Vec<(String, u64)>,
    tuned: Tuned,
    place: cubecl::Device,
}

impl Ours {
    fn call<const D: usize>(&self, tensors: &[(&str, &Tensor<D>)]) -> Result<Vec<(String, Array)>> {
        let mut call = Call::new();
        for (name, x) in tensors {
            call = call.array(name, Array::from_tensor((*x).clone())?);
        }
        Ok(self.tuned.launch(call)?)
    }
}

impl Truth<'_> {
    /// The largest error of a result at some elements, in parts of the tolerance there.
    fn ratio<const D: usize>(&self, result: &Tensor<D>) -> Result<f64> {
        let c = &self.ours.cascade;
        // Ranks that only another launch of the same case has are left out.
        let named = |n: &String| c.ranks.iter().any(|(_, r)| r.name == *n);
        let sizes = self.ours.sizes.iter().filter(|(n, _)| named(n)).cloned().collect();
        let b = bind(c, &Given { sizes, ..Given::default() })?;
        let all = values(result)?;
        // Elements of four rows; the cascade's output may lack dimensions of one element.
        let row = *all.dims.last().ok_or("a result without dimensions")?;
        let rows = all.data.len() as u64 / row;
        let step = |n: u64, of: u64| (0..of.min(n)).map(move |i| if of >= n { i } else { i * (n - 1) / (of - 1) });
        let elements: Vec<u64> = step(rows, 4).flat_map(|r| step(row, 12).map(move |i| r * row + i)).collect();
        let dims = c.outputs[0].dims.iter().map(|d| d.eval(&b.extents)).collect::<std::result::Result<Vec<u64>, _>>();
        let dims = dims.map_err(|e| format!("{e:?}"))?;
        let points: Vec<Vec<u64>> = elements.iter().map(|e| coordinates(*e, &dims)).collect();
        let expected = expect_points(c, &b, &self.inputs, &eval::Options::default(), 0, &points)?;
        let found: Vec<f64> = elements.iter().map(|e| all.data[*e as usize]).collect();
        Ok(match expected.compare(&found) {
            Ok(report) => report.worst_ratio,
            Err(far) => (far.actual - far.expected).abs() / far.tolerance,
        })
    }
}

fn coordinates(mut element: u64, dims: &[u64]) -> Vec<u64> {
    let mut at = vec![0; dims.len()];
    for (x, n) in at.iter_mut().zip(dims).rev() {
        *x = element % n;
        element /= n;
    }
    at
}

fn steps(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let [_, _, _, e] = q.dims();
    softmax(q.matmul(k.transpose()).div_scalar((e as f32).sqrt()), 3).matmul(v)
}

fn bytes(dtype: DType, elements: usize) -> f64 {
    elements as f64 * f64::from(dtype.bits()) / 8.0
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Result<Values> {
    let dims: Vec<u64> = tensor.dims().iter().map(|n| *n as u64).collect();
    let data = tensor.clone().into_data();
    let dtype = if data.dtype() == burn::tensor::DType::F16 { DType::F16 } else { DType::F32 };
    let numbers = data.iter::<f32>().map(f64::from).collect();
    Ok(Values::new(dtype, &dims, numbers).ok_or("a tensor without elements")?)
}

/// The median; the list is sorted afterwards.
fn median(list: &mut [f64]) -> f64 {
    list.sort_by(f64::total_cmp);
    list.get(list.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    let asked = Asked::read()?;
    // A block is submitted whole, so that the device does not wait for the processor within it.
    let options = RuntimeOptions { tasks_max: 4096, ..RuntimeOptions::default() };
    let setup = init_setup::<AutoGraphicsApi>(&WgpuDevice::from(asked.kind.clone()), options);
    let info = setup.adapter.get_info();
    let place = cubecl::Device::wgpu(asked.kind.clone())?;
    let name = adapter(&place.client()).name;
    let driver = format!("{} {}", info.driver, info.driver_info);
    eprintln!("{name}, {driver}, {:?}: {}", info.backend, place.client().name());
    let device = Device::new(place.clone());
    let mut bench = Bench { asked, place, device, adapter: name, driver, wrong: 0, left: 0 };
    for dtype in [DType::F32, DType::F16] {
        for (large, small) in [(2048, 128), (4096, 192)] {
            let n = bench.sized(large, small);
            bench.run("gemm", dtype, |b| b.product("gemm", dtype, [n, n, n]));
        }
        for m in [1, 4, 16] {
            let n = bench.sized(4096, 256);
            bench.run("skinny", dtype, |b| b.product("skinny", dtype, [m, n, n]));
        }
        for e in [64, 128] {
            let n = bench.sized(4096, 128);
            let h = bench.sized(16, 2);
            bench.run("attention", dtype, |b| b.attention("attention", dtype, [1, h, n, e]));
        }
        for (batch, keys) in [(4, 4096), (1, 32768)] {
            let (h, keys) = (bench.sized(16, 2), bench.sized(keys, keys / 32));
            bench.run("decode", dtype, |b| b.decode("decode", dtype, [batch, h, keys, 128]));
        }
        for name in ["softmax", "rmsnorm", "layernorm", "copy"] {
            let (m, n) = (bench.sized(16384, 64), bench.sized(4096, 512));
            bench.run(name, dtype, |b| b.rows(name, dtype, [m, n]));
        }
    }
    match (bench.wrong, bench.left) {
        (0, 0) => Ok(()),
        (wrong, left) => Err(format!("{wrong} results are wrong, {left} cases were left out").into()),
    }
}
