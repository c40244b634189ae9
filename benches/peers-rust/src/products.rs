//! Products of square f32 matrices, all row-major.
//!
//! Invariant: an element of any way is within γₖ·Σ|a||b| of its sum in float64 (Higham, *Accuracy and Stability of Numerical
//! Algorithms*, section 3.1), at all columns of some rows.

use std::rc::Rc;

use candle_core::{Device, Tensor};
use einfall::ir::cascade;
use einfall::runtime::{Arguments, View, ViewMut};
use einfall::{Bound, CompileOptions, Engine};
use faer::{Accum, MatMut, MatRef, Par};

use crate::Failure;
use crate::turns::{Case, OURS, Way};

/// Rows, columns and terms.
pub const SIZES: [usize; 3] = [512, 1024, 2048];
/// Rows that are compared.
const ROWS: usize = 8;

/// The case of a size.
pub fn name(n: usize) -> String {
    format!("m{n}_n{n}_k{n}_f32")
}

/// Two factors.
pub struct Factors {
    n: usize,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Factors {
    /// Uniform between −1 and 1.
    pub fn random(n: usize) -> Factors {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut draw = || {
            // Marsaglia's xorshift; the upper bits are those of a fraction.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut array = || (0..n * n).map(|_| draw()).collect::<Vec<f32>>();
        Factors { n, a: array(), b: array() }
    }

    /// The largest error of a product relative to its bound: at most 1.
    pub fn error(&self, product: &[f32]) -> f64 {
        let n = self.n;
        let u = f64::from(f32::EPSILON) / 2.0;
        let gamma = n as f64 * u / (1.0 - n as f64 * u);
        let mut worst = 0f64;
        for row in (0..ROWS.min(n)).map(|i| i * n / ROWS.min(n)) {
            let (mut sums, mut sizes) = (vec![0f64; n], vec![0f64; n]);
            for (k, &a) in self.a[row * n..][..n].iter().enumerate() {
                for ((sum, size), &b) in sums.iter_mut().zip(&mut sizes).zip(&self.b[k * n..][..n]) {
                    let term = f64::from(a) * f64::from(b);
                    *sum += term;
                    *size += term.abs();
                }
            }
            for ((sum, size), &found) in sums.iter().zip(&sizes).zip(&product[row * n..][..n]) {
                let error = (f64::from(found) - sum).abs() / (gamma * size);
                // What is no number is no product either.
                worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
            }
        }
        worst
    }
}

struct Einfall {
    factors: Rc<Factors>,
    bound: Bound,
    y: Vec<f32>,
}

impl Way for Einfall {
    fn peer(&self) -> &'static str {
        OURS
    }

    fn run(&mut self) -> Result<(), Failure> {
        let n = self.factors.n as u64;
        let arguments = Arguments::new()
            .input("A", View::dense(&self.factors.a, &[n, n])?)
            .input("B", View::dense(&self.factors.b, &[n, n])?)
            .output("Y", ViewMut::dense(&mut self.y, &[n, n])?);
        self.bound.launch(arguments)?;
        Ok(())
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        Ok(self.y.clone())
    }
}

struct Candle {
    a: Tensor,
    b: Tensor,
    y: Option<Tensor>,
}

impl Way for Candle {
    fn peer(&self) -> &'static str {
        "candle"
    }

    fn run(&mut self) -> Result<(), Failure> {
        // The last result's memory is free for this one.
        self.y = None;
        self.y = Some(self.a.matmul(&self.b)?);
        Ok(())
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        Ok(self.y.as_ref().ok_or("not run")?.flatten_all()?.to_vec1()?)
    }
}

struct Gemm {
    factors: Rc<Factors>,
    threads: usize,
    y: Vec<f32>,
}

impl Way for Gemm {
    fn peer(&self) -> &'static str {
        "gemm"
    }

    fn run(&mut self) -> Result<(), Failure> {
        let (n, rows) = (self.factors.n, self.factors.n as isize);
        let parallel = if self.threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(self.threads) };
        let (y, a, b) = (self.y.as_mut_ptr(), self.factors.a.as_ptr(), self.factors.b.as_ptr());
        // SAFETY: three arrays of n·n elements with rows of n, the first of them this way's own.
        unsafe {
            gemm::gemm(n, n, n, y, 1, rows, false, a, 1, rows, b, 1, rows, 0.0, 1.0, false, false, false, parallel);
        }
        Ok(())
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        Ok(self.y.clone())
    }
}

struct Faer {
    factors: Rc<Factors>,
    threads: usize,
    y: Vec<f32>,
}

impl Way for Faer {
    fn peer(&self) -> &'static str {
        "faer"
    }

    fn run(&mut self) -> Result<(), Failure> {
        let n = self.factors.n;
        let a = MatRef::from_row_major_slice(&self.factors.a, n, n);
        let b = MatRef::from_row_major_slice(&self.factors.b, n, n);
        let y = MatMut::from_row_major_slice_mut(&mut self.y, n, n);
        let par = if self.threads == 1 { Par::Seq } else { Par::rayon(self.threads) };
        faer::linalg::matmul::matmul(y, Accum::Replace, a, b, 1.0, par);
        Ok(())
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        Ok(self.y.clone())
    }
}

/// The ways of a size, compared.
pub fn case(engine: &Engine, n: usize, threads: usize) -> Result<Case, Failure> {
    let factors = Rc::new(Factors::random(n));
    let text = einfall::kernels::source("matmul").ok_or("the library has no matmul")?.replace("bf16", "f32");
    let cascade = cascade::parse(&text).map_err(|found| format!("matmul: {found:?}"))?.cascades.remove(0);
    let sizes: Vec<(String, u64)> = ["M", "N", "K"].map(|rank| (rank.to_owned(), n as u64)).to_vec();
    let kernel =
        engine.compile_with(&cascade, &CompileOptions { sizes: sizes.clone(), ..CompileOptions::default() })?;
    let y = vec![f32::NAN; n * n];
    let tensor = |x: &[f32]| Tensor::from_slice(x, (n, n), &Device::Cpu);
    let mut ways: Vec<Box<dyn Way>> = vec![
        Box::new(Einfall { factors: factors.clone(), bound: kernel.bind(&sizes)?, y: y.clone() }),
        Box::new(Candle { a: tensor(&factors.a)?, b: tensor(&factors.b)?, y: None }),
        Box::new(Gemm { factors: factors.clone(), threads, y: y.clone() }),
        Box::new(Faer { factors: factors.clone(), threads, y }),
    ];
    let mut errors = Vec::new();
    for way in &mut ways {
        way.run()?;
        let error = factors.error(&way.result()?);
        if error > 1.0 {
            return Err(format!("{}: the product of {} is off by {error:.1} of its bound", name(n), way.peer()).into());
        }
        errors.push(format!("{} {error:.3}", way.peer()));
    }
    let compared = format!("largest error over the bound of f32: {}", errors.join(", "));
    Ok(Case { family: "gemm", name: name(n), flops: Some(2.0 * (n as f64).powi(3)), compared, ways })
}
