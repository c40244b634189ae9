//! Attention and normalisation from a program without a compiler.
//!
//! Arrays come and go as little-endian f32, one after another:
//!
//! ```text
//! aot attend 128 1000 < q_k_v > o      # Q[128,64] K[1000,64] V[1000,64] -> O[128,64]
//! aot normalise 128 384 < x_w > y      # x[128,384] w[384] -> y[128,384]
//! aot attend 128 1000 --cuda < q_k_v   # on the first NVIDIA GPU, where there is a driver
//! ```

use std::error::Error;
use std::io::{Read, Write};

use einfall::aot::{Input, Output};
use einfall::runtime::HostArray;
use einfall::runtime::cuda::{Engine, EngineOptions};

mod kernels {
    einfall::include_kernels!();
}

/// Columns of queries, keys and values: fixed when the cascade was compiled, so part of its function's type.
const E: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (name, m, n, cuda) = match args[..] {
        [name, m, n] => (name, m.parse::<usize>()?, n.parse::<usize>()?, false),
        [name, m, n, "--cuda"] => (name, m.parse()?, n.parse()?, true),
        _ => return Err("usage: aot attend|normalise M N [--cuda]".into()),
    };
    let out = match (name, cuda) {
        ("attend", false) => {
            let [q, k, v] = read([m * E, n * E, n * E])?;
            let mut o = vec![[0.0; E]; m];
            kernels::attend(rows(&q), rows(&k), rows(&v), None, &mut o[..])?;
            o.into_flattened()
        }
        ("attend", true) => {
            let [q, k, v] = read([m * E, n * E, n * E])?;
            attend_on_gpu(&q, &k, &v)?
        }
        ("normalise", false) => {
            let [x, w] = read([m * n, n])?;
            let mut y = vec![0.0; m * n];
            kernels::normalise(Input::new(&x, [m, n])?, &w[..], None, Output::new(&mut y, [m, n])?)?;
            y
        }
        _ => return Err(format!("there is no `{name}` (on this device)").into()),
    };
    let bytes: Vec<u8> = out.iter().flat_map(|v| v.to_le_bytes()).collect();
    Ok(std::io::stdout().write_all(&bytes)?)
}

/// Arrays of so many elements from standard input.
fn read<const N: usize>(sizes: [usize; N]) -> Result<[Vec<f32>; N], Box<dyn Error>> {
    let mut arrays = [const { Vec::new() }; N];
    for (array, size) in arrays.iter_mut().zip(sizes) {
        let mut bytes = vec![0; 4 * size];
        std::io::stdin().read_exact(&mut bytes)?;
        *array = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    }
    Ok(arrays)
}

fn rows(flat: &[f32]) -> &[[f32; E]] {
    flat.as_chunks().0
}

/// The same cascade through the driver, from the PTX in this program.
fn attend_on_gpu(q: &[f32], k: &[f32], v: &[f32]) -> Result<Vec<f32>, Box<dyn Error>> {
    let engine = Engine::new(&EngineOptions::default())?;
    let executable = kernels::ATTEND.load_on(&engine)?;
    let array = |x: &[f32]| HostArray::from_slice(x, &[(x.len() / E) as u64, E as u64]);
    let (q, k, v) = (array(q)?, array(k)?, array(v)?);
    let sizes = executable.infer(&[("Q", q.shape()), ("K", k.shape()), ("V", v.shape())])?;
    let scale = 1.0 / (E as f64).sqrt();
    let inputs = [("Q", &q), ("K", &k), ("V", &v)];
    let outputs = executable.bind(&sizes)?.run_to_arrays(&engine.stream()?, &inputs, &[("scale", scale)])?;
    let (_, o) = outputs.into_iter().next().ok_or("the cascade has an output")?;
    Ok(o.as_slice::<f32>().ok_or("the output is f32")?.to_vec())
}
