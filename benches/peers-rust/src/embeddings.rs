//! all-MiniLM-L6-v2 over 32 sentences: candle's BERT against the example `minilm`, from the same tokens to unit vectors.
//!
//! Invariant: both are off from the model in float64 by no more than that moves where every weight is off by γₖ, k the longest
//! sum of a product: rounding errors of a product are such errors of its factors (Higham, *Accuracy and Stability of Numerical
//! Algorithms*, section 3.5).

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use einfall::Engine;
use minilm::encoder::{Encoder, Stats};
use minilm::model::{Model, Tokens};

use crate::Failure;
use crate::turns::{Case, OURS, Way};

/// As many sentences as the case has, one a line.
pub const SENTENCES: &str = include_str!("../sentences.txt");
/// Sentences that follow one another in the case of long texts.
const JOINED: usize = 8;
/// Draws of weights that are off.
const DRAWS: u64 = 2;

/// candle's model.
pub struct Bert {
    model: BertModel,
}

impl Bert {
    /// Reads a model's folder.
    pub fn load(folder: &Path) -> Result<Bert, Failure> {
        let config: Config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
        let weights = std::fs::read(folder.join("model.safetensors"))?;
        let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
        Ok(Bert { model: BertModel::load(weights, &config)? })
    }

    /// Unit vectors.
    pub fn encode(&self, batch: &Batch) -> Result<Vec<f32>, Failure> {
        let states = self.model.forward(&batch.ids, &batch.kinds, Some(&batch.mask))?;
        Ok(pooled(&states, &batch.mask)?.flatten_all()?.to_vec1()?)
    }
}

/// The mean over real tokens at length 1, as candle's example has it.
fn pooled(states: &Tensor, mask: &Tensor) -> Result<Tensor, Failure> {
    let mask = mask.to_dtype(states.dtype())?.unsqueeze(2)?;
    let mean = states.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
    Ok(mean.broadcast_div(&mean.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}

/// The model in float64, as its paper has it: candle's has no norms of that type.
pub struct Exact {
    weights: BTreeMap<String, Tensor>,
    config: Config,
}

impl Exact {
    /// Reads a model's folder.
    pub fn load(folder: &Path) -> Result<Exact, Failure> {
        let config: Config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
        let mut weights = BTreeMap::new();
        for (name, tensor) in candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)? {
            if tensor.dtype().is_float() {
                weights.insert(name, tensor.to_dtype(DType::F64)?);
            }
        }
        Ok(Exact { weights, config })
    }

    /// The model with each weight off by a factor of 1 + `by` or 1 − `by`.
    fn off(&self, by: f64, seed: u64) -> Result<Exact, Failure> {
        let mut state = seed;
        let mut sign = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if state >> 63 == 0 { 1.0 } else { -1.0 }
        };
        let mut weights = BTreeMap::new();
        for (name, tensor) in &self.weights {
            let values: Vec<f64> = tensor.flatten_all()?.to_vec1()?;
            let values: Vec<f64> = values.into_iter().map(|x| x * (1.0 + by * sign())).collect();
            weights.insert(name.clone(), Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?);
        }
        Ok(Exact { weights, config: self.config.clone() })
    }

    fn weight(&self, name: &str) -> Result<&Tensor, Failure> {
        self.weights.get(name).ok_or_else(|| format!("the model has no `{name}`").into())
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor, Failure> {
        let y = x.broadcast_matmul(&self.weight(&format!("{name}.weight"))?.t()?)?;
        Ok(y.broadcast_add(self.weight(&format!("{name}.bias"))?)?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor, Failure> {
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(variance + self.config.layer_norm_eps)?.sqrt()?)?;
        let x = x.broadcast_mul(self.weight(&format!("{name}.weight"))?)?;
        Ok(x.broadcast_add(self.weight(&format!("{name}.bias"))?)?)
    }

    /// Unit vectors.
    fn encode(&self, batch: &Batch) -> Result<Vec<f64>, Failure> {
        let (b, t) = batch.ids.dims2()?;
        let (heads, d) = (self.config.num_attention_heads, self.config.hidden_size);
        let rows = |name: &str, ids: &Tensor| -> Result<Tensor, Failure> {
            Ok(self.weight(&format!("embeddings.{name}_embeddings.weight"))?.index_select(ids, 0)?)
        };
        let places = Tensor::arange(0, t as u32, &Device::Cpu)?;
        let words = rows("word", &batch.ids.flatten_all()?)?.reshape((b, t, d))?;
        let kinds = rows("token_type", &batch.kinds.flatten_all()?)?.reshape((b, t, d))?;
        let x = (words + kinds)?.broadcast_add(&rows("position", &places)?)?;
        let mut x = self.norm(&x, "embeddings.LayerNorm")?;
        // Of padding nothing is left: exp(−∞).
        let real = batch.mask.to_dtype(DType::F64)?.reshape((b, 1, 1, t))?;
        let hidden = real.log()?;
        for layer in 0..self.config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            let split = |part: &str| -> Result<Tensor, Failure> {
                let y = self.linear(&x, &name(&format!("attention.self.{part}")))?;
                Ok(y.reshape((b, t, heads, d / heads))?.transpose(1, 2)?.contiguous()?)
            };
            let scores = (split("query")?.matmul(&split("key")?.t()?)? / ((d / heads) as f64).sqrt())?;
            let scores = scores.broadcast_add(&hidden)?;
            let shares = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
            let shares = shares.broadcast_div(&shares.sum_keepdim(D::Minus1)?)?;
            let mixed = shares.matmul(&split("value")?)?.transpose(1, 2)?.reshape((b, t, d))?;
            let mixed = (self.linear(&mixed, &name("attention.output.dense"))? + &x)?;
            let y = self.norm(&mixed, &name("attention.output.LayerNorm"))?;
            let up = self.linear(&y, &name("intermediate.dense"))?.gelu_erf()?;
            let down = (self.linear(&up, &name("output.dense"))? + y)?;
            x = self.norm(&down, &name("output.LayerNorm"))?;
        }
        Ok(pooled(&x, &batch.mask)?.flatten_all()?.to_vec1()?)
    }
}

/// Tokens as candle takes them, `[B,T]` each.
pub struct Batch {
    ids: Tensor,
    kinds: Tensor,
    mask: Tensor,
}

impl Batch {
    /// The same tokens.
    pub fn new(tokens: &Tokens) -> Result<Batch, Failure> {
        let shape = (tokens.lengths.len(), tokens.longest);
        let ids: Vec<u32> = tokens.ids.iter().map(|id| *id as u32).collect();
        let of = |length: &i32| (0..tokens.longest).map(|t| u32::from((t as i32) < *length)).collect::<Vec<u32>>();
        let mask: Vec<u32> = tokens.lengths.iter().flat_map(of).collect();
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        Ok(Batch { kinds: ids.zeros_like()?, mask: Tensor::from_vec(mask, shape, &Device::Cpu)?, ids })
    }
}

struct Einfall {
    encoder: Rc<Encoder>,
    model: Rc<Model>,
    tokens: Tokens,
    mapping: &'static str,
    vectors: Vec<f32>,
}

impl Way for Einfall {
    fn peer(&self) -> &'static str {
        OURS
    }

    fn mapping(&self) -> &'static str {
        self.mapping
    }

    fn run(&mut self) -> Result<(), Failure> {
        let vectors = self.encoder.encode(&self.model, &self.tokens, &mut Stats::default())?;
        self.vectors = vectors.as_slice::<f32>().ok_or("the vectors are not f32")?.to_vec();
        Ok(())
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        Ok(self.vectors.clone())
    }
}

struct Candle {
    model: Rc<Bert>,
    batch: Batch,
    vectors: Vec<f32>,
}

impl Way for Candle {
    fn peer(&self) -> &'static str {
        "candle"
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.vectors = self.model.encode(&self.batch)?;
        Ok(())
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        Ok(self.vectors.clone())
    }
}

/// Vectors in float64, and how far a result may be from them.
pub struct Expected {
    vectors: Vec<f64>,
    bound: f64,
}

impl Expected {
    /// By the model, and by the model with its weights off.
    pub fn new(model: &Exact, batch: &Batch) -> Result<Expected, Failure> {
        let vectors = model.encode(batch)?;
        let (k, u) = (model.config.intermediate_size as f64, f64::from(f32::EPSILON) / 2.0);
        let mut bound = 0f64;
        for seed in 1..=DRAWS {
            bound = bound.max(furthest(&vectors, &model.off(k * u / (1.0 - k * u), seed)?.encode(batch)?));
        }
        Ok(Expected { vectors, bound })
    }

    /// The largest error of an element relative to the bound: at most 1.
    pub fn error(&self, vectors: &[f32]) -> f64 {
        let vectors: Vec<f64> = vectors.iter().map(|x| f64::from(*x)).collect();
        furthest(&self.vectors, &vectors) / self.bound
    }
}

/// The largest difference of two elements; arrays of different lengths, and what is no number, are infinitely apart.
fn furthest(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |most, d| if d.is_nan() { f64::INFINITY } else { most.max(d) })
}

/// The texts of both cases: sentences, and so many of them in a row.
pub fn texts() -> [Vec<String>; 2] {
    let sentences: Vec<&str> = SENTENCES.lines().collect();
    let joined = |i: usize| (0..JOINED).map(|j| sentences[(i + j) % sentences.len()]).collect::<Vec<_>>().join(" ");
    [sentences.iter().map(|s| (*s).to_owned()).collect(), (0..sentences.len()).map(joined).collect()]
}

/// The model: ours, candle's and in float64.
pub struct Subject<'a> {
    engine: &'a Engine,
    model: Rc<Model>,
    encoder: Rc<Encoder>,
    bert: Rc<Bert>,
    exact: Exact,
}

impl<'a> Subject<'a> {
    /// Reads a model's folder and compiles for any size.
    pub fn load(engine: &'a Engine, folder: &Path) -> Result<Subject<'a>, Failure> {
        let model = Rc::new(Model::load(folder)?);
        let encoder = Rc::new(Encoder::new(engine, &model.config)?);
        Ok(Subject { engine, model, encoder, bert: Rc::new(Bert::load(folder)?), exact: Exact::load(folder)? })
    }

    /// Tokens of texts.
    pub fn tokenize(&self, texts: &[String]) -> Result<Tokens, Failure> {
        Ok(self.model.tokenize(&texts.iter().map(String::as_str).collect::<Vec<&str>>())?)
    }

    /// All ways over the same tokens, compared: ours compiled for any size and for these, candle's.
    pub fn case(&self, tokens: &Tokens) -> Result<Case, Failure> {
        let name = format!("b{}_t{}_f32", tokens.lengths.len(), tokens.longest);
        let expected = Expected::new(&self.exact, &Batch::new(tokens)?)?;
        let ours = |encoder: Rc<Encoder>, mapping| {
            let (model, tokens) = (self.model.clone(), tokens.clone());
            Box::new(Einfall { encoder, model, tokens, mapping, vectors: Vec::new() })
        };
        let candle = Candle { model: self.bert.clone(), batch: Batch::new(tokens)?, vectors: Vec::new() };
        let mut ways: Vec<Box<dyn Way>> = vec![
            ours(self.encoder.clone(), "for any size"),
            ours(Rc::new(self.fast_at(tokens)?), "for these sizes"),
            Box::new(candle),
        ];
        let mut errors = Vec::new();
        for way in &mut ways {
            way.run()?;
            let error = expected.error(&way.result()?);
            if error > 1.0 {
                return Err(format!("{name}: the vectors of {} are off by {error:.1} of the bound", way.peer()).into());
            }
            errors.push(format!("{} {error:.3}", [way.peer(), way.mapping()].join(" ").trim()));
        }
        let compared = format!("largest error over the bound, {:.1e}: {}", expected.bound, errors.join(", "));
        Ok(Case { family: "minilm", name, flops: None, compared, ways })
    }

    fn fast_at(&self, tokens: &Tokens) -> Result<Encoder, Failure> {
        Ok(Encoder::fast_at(self.engine, &self.model.config, tokens)?)
    }

    /// The times of our kernels over so many runs, compiled for any size and for these.
    pub fn kernels(&self, tokens: &Tokens, runs: usize) -> Result<String, Failure> {
        let mut text = String::new();
        for (mapping, encoder) in [("any size", &self.encoder), ("these sizes", &Rc::new(self.fast_at(tokens)?))] {
            let mut stats = Stats::default();
            for _ in 0..runs {
                encoder.encode(&self.model, tokens, &mut stats)?;
            }
            text += &format!("\nFor {mapping}:\n{}", minilm::report::kernels(encoder, &stats));
        }
        Ok(text)
    }
}
