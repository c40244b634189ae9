//! The encoder: four cascades compiled once, launched on batches of any size.
//!
//! Invariant: an [`Encoder`] may be used for every batch of its model; extents that the model fixes are fixed at
//! compile time, batch size and length are bound per batch.

use std::time::{Duration, Instant};

use einfall::ir::cascade;
use einfall::ir::dtype::DType;
use einfall::runtime::{Arguments, ArrayError, HostArray, View, ViewMut};
use einfall::{Bound, CompileOptions, Engine, Kernel};

use crate::Error;
use crate::model::{Config, Model, Tokens, Weights};

/// The cascades.
pub const TEXT: &str = include_str!("../encoder.ein");
/// A layer is at most this many kernels.
pub const MAX_LAYER_KERNELS: usize = 8;
/// Sentences encoded together.
pub const BATCH: usize = 32;

/// The compiled encoder of one model.
#[derive(Debug)]
pub struct Encoder {
    eps: f64,
    /// Values per token.
    hidden: u64,
    /// Embeddings of tokens.
    pub embed: Kernel,
    /// One layer; launched with each layer's weights.
    pub layer: Kernel,
    /// From tokens to a unit vector per sentence.
    pub pool: Kernel,
    /// Cosines.
    pub similarity: Kernel,
    /// Time of compiling.
    pub compile_time: Duration,
}

/// What one kernel did, summed over its launches.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelStats {
    /// The cascade.
    pub cascade: &'static str,
    /// Its number in the cascade's plan.
    pub index: usize,
    /// Launches.
    pub launches: u64,
    /// Time of all launches.
    pub time: Duration,
    /// Floating-point operations of all launches.
    pub flops: f64,
    /// Bytes that a perfect cache would move for this kernel, over all launches.
    pub bytes: f64,
}

/// Times and counts of kernels, in the order of first launch, and of whole cascades.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// By cascade and kernel.
    pub kernels: Vec<KernelStats>,
    /// Lower bound of a cascade's traffic by name, over all its launches, in bytes: each array that it is given or
    /// returns, once.
    pub lower_bound_bytes: Vec<(&'static str, f64)>,
}

impl Encoder {
    /// Compiles the encoder for a model's hyperparameters.
    ///
    /// # Errors
    /// [`Error::Einfall`], and [`Error::Kernels`] where a layer is too many kernels.
    pub fn new(engine: &Engine, config: &Config) -> Result<Encoder, Error> {
        Encoder::compile(engine, config, &[])
    }

    /// As [`Encoder::new`], to be fast at batches of so many sentences and tokens; others are encoded all the same.
    ///
    /// # Errors
    /// As [`Encoder::new`].
    pub fn fast_at(engine: &Engine, config: &Config, tokens: &Tokens) -> Result<Encoder, Error> {
        Encoder::compile(engine, config, &[("B", tokens.lengths.len() as u64), ("T", tokens.longest as u64)])
    }

    fn compile(engine: &Engine, config: &Config, sizes: &[(&str, u64)]) -> Result<Encoder, Error> {
        let start = Instant::now();
        let module = cascade::parse(TEXT)
            .map_err(|d| Error::Text(d.iter().map(ToString::to_string).collect::<Vec<String>>().join("; ")))?;
        let compile = |name: &str, statics: &[(&str, u64)]| -> Result<Kernel, Error> {
            let cascade = module.cascades.iter().find(|c| c.name == name);
            let cascade = cascade.ok_or_else(|| Error::Text(format!("there is no cascade `{name}`")))?;
            let owned = |list: &[(&str, u64)]| list.iter().map(|(rank, n)| ((*rank).to_owned(), *n)).collect();
            let options = CompileOptions { statics: owned(statics), sizes: owned(sizes), ..CompileOptions::default() };
            Ok(engine.compile_with(cascade, &options)?)
        };
        let d = ("D", config.hidden_size);
        let heads = [("H", config.num_attention_heads), ("E", config.head_size()), ("F", config.intermediate_size)];
        let tables =
            [d, ("W", config.vocab_size), ("P", config.max_position_embeddings), ("G", config.type_vocab_size)];
        let layer = compile("layer", &heads)?;
        let found = layer.plan().kernels.len();
        if found > MAX_LAYER_KERNELS {
            return Err(Error::Kernels { found, most: MAX_LAYER_KERNELS });
        }
        Ok(Encoder {
            eps: config.layer_norm_eps,
            hidden: config.hidden_size,
            embed: compile("embed", &tables)?,
            layer,
            pool: compile("pool", &[d])?,
            similarity: compile("similarity", &[d])?,
            compile_time: start.elapsed(),
        })
    }

    /// Unit vectors `[B,D]` of a batch.
    ///
    /// # Errors
    /// [`Error::Einfall`] and [`Error::Runtime`].
    pub fn encode(&self, model: &Model, tokens: &Tokens, stats: &mut Stats) -> Result<HostArray, Error> {
        let (b, t, d) = (tokens.lengths.len() as u64, tokens.longest as u64, self.hidden);
        let mut x = zeros(&[b, t, d])?;
        let mut y = zeros(&[b, t, d])?;
        let mut out = zeros(&[b, d])?;
        let ids = View::dense(&tokens.ids, &[b, t]).map_err(array)?;
        let lengths = View::dense(&tokens.lengths, &[b]).map_err(array)?;
        let sizes = [("B", b), ("T", t)];

        let bound = self.embed.bind(&sizes)?;
        let arguments = weights(&model.embed).input("token", ids).output("Y", x.view_mut()).scalar("eps", self.eps);
        stats.launch("embed", &self.embed, &bound, arguments)?;

        let bound = self.layer.bind(&sizes)?;
        for layer in &model.layers {
            let arguments = weights(layer).input("X", x.view()).input("len", lengths.clone());
            let arguments = arguments.output("Y", y.view_mut()).scalar("eps", self.eps);
            stats.launch("layer", &self.layer, &bound, arguments)?;
            std::mem::swap(&mut x, &mut y);
        }

        let bound = self.pool.bind(&sizes)?;
        let arguments = Arguments::new().input("X", x.view()).input("len", lengths).output("Y", out.view_mut());
        stats.launch("pool", &self.pool, &bound, arguments)?;
        Ok(out)
    }

    /// Unit vectors of sentences, row after row, in batches of [`BATCH`].
    ///
    /// # Errors
    /// As [`Encoder::encode`], and [`Error::Tokens`].
    pub fn encode_all(&self, model: &Model, sentences: &[&str], stats: &mut Stats) -> Result<Vec<f32>, Error> {
        let mut all = Vec::new();
        for batch in sentences.chunks(BATCH) {
            let vectors = self.encode(model, &model.tokenize(batch)?, stats)?;
            all.extend_from_slice(vectors.as_slice::<f32>().unwrap_or_default());
        }
        Ok(all)
    }

    /// Cosines `[N,N]` of unit vectors `[N,D]`.
    ///
    /// # Errors
    /// [`Error::Einfall`] and [`Error::Runtime`].
    pub fn similarities(&self, vectors: &[f32], stats: &mut Stats) -> Result<Vec<f32>, Error> {
        let (n, d) = (vectors.len() as u64 / self.hidden, self.hidden);
        let mut cosines = vec![0f32; (n * n) as usize];
        let bound = self.similarity.bind(&[("I", n), ("J", n)])?;
        let view = View::dense(vectors, &[n, d]).map_err(array)?;
        let out = ViewMut::dense(&mut cosines, &[n, n]).map_err(array)?;
        let arguments = Arguments::new().input("X", view.clone()).input("Y", view).output("C", out);
        stats.launch("similarity", &self.similarity, &bound, arguments)?;
        Ok(cosines)
    }
}

impl Stats {
    fn launch<'a>(
        &mut self,
        cascade: &'static str,
        kernel: &Kernel,
        bound: &'a Bound,
        arguments: Arguments<'a>,
    ) -> Result<(), Error> {
        let times = bound.launch(arguments)?;
        for (index, (spec, time)) in bound.runtime().kernels().zip(times).enumerate() {
            let place = self.kernels.iter().position(|k| (k.cascade, k.index) == (cascade, index));
            let place = place.unwrap_or_else(|| {
                let (time, flops, bytes) = (Duration::ZERO, 0.0, 0.0);
                self.kernels.push(KernelStats { cascade, index, launches: 0, time, flops, bytes });
                self.kernels.len() - 1
            });
            let k = &mut self.kernels[place];
            k.launches += 1;
            k.time += time;
            k.flops += spec.flops as f64;
            k.bytes += spec.bytes as f64;
        }
        let bytes = einfall::ir::analysis::io::compulsory_bytes(kernel.cascade(), &bound.bindings().extents);
        match self.lower_bound_bytes.iter_mut().find(|(name, _)| *name == cascade) {
            Some((_, sum)) => *sum += bytes,
            None => self.lower_bound_bytes.push((cascade, bytes)),
        }
        Ok(())
    }
}

fn weights(arrays: &Weights) -> Arguments<'_> {
    arrays.iter().fold(Arguments::new(), |arguments, (name, array)| arguments.input(name, array.view()))
}

fn zeros(shape: &[u64]) -> Result<HostArray, Error> {
    HostArray::zeros(DType::F32, shape).map_err(array)
}

fn array(e: ArrayError) -> Error {
    Error::Runtime(e.into())
}
