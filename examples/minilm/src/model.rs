//! The model's folder: hyperparameters (config.json), weights (model.safetensors) and the tokenizer (tokenizer.json).
//!
//! Invariant: a loaded [`Model`] has every array of the encoder, with the shape its hyperparameters imply and in f32;
//! a folder that lacks one or contradicts itself is an [`Error`]. The names are those of BERT checkpoints (Devlin et
//! al., arXiv 1810.04805). No number is changed here: query, key and value weights are copied behind each other.

use std::collections::BTreeMap;
use std::path::Path;

use einfall::arrays::{Limits, read};
use einfall::ir::dtype::DType;
use einfall::runtime::HostArray;
use tokenizers::{PaddingParams, PaddingStrategy, Tokenizer, TruncationParams};

use crate::Error;

/// Sentences are cut after this many tokens, as the model was trained (sentence_bert_config.json).
pub const MAX_TOKENS: usize = 256;

/// Hyperparameters, as config.json names them.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub struct Config {
    /// D = H·E: values per token.
    pub hidden_size: u64,
    /// H.
    pub num_attention_heads: u64,
    /// Layers.
    pub num_hidden_layers: u64,
    /// F.
    pub intermediate_size: u64,
    /// P: positions with an embedding.
    pub max_position_embeddings: u64,
    /// G: kinds of segments.
    pub type_vocab_size: u64,
    /// W: tokens with an embedding.
    pub vocab_size: u64,
    /// ε of every normalisation.
    pub layer_norm_eps: f64,
    /// Must be `gelu`, the exact one.
    pub hidden_act: String,
    /// Must be `bert`.
    pub model_type: String,
    /// Must be `absolute`.
    #[serde(default = "absolute")]
    pub position_embedding_type: String,
}

fn absolute() -> String {
    "absolute".to_owned()
}

impl Config {
    /// E: values per head.
    pub fn head_size(&self) -> u64 {
        self.hidden_size / self.num_attention_heads
    }

    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("hidden_size", self.hidden_size, 1 << 16),
            ("num_attention_heads", self.num_attention_heads, 1 << 10),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
            ("type_vocab_size", self.type_vocab_size, 1 << 10),
            ("vocab_size", self.vocab_size, 1 << 24),
        ];
        for (name, n, most) in sizes {
            if n == 0 || n > most {
                return Err(format!("{name} is {n}, outside 1 to {most}"));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let (d, h) = (self.hidden_size, self.num_attention_heads);
            return Err(format!("hidden_size {d} is no multiple of num_attention_heads {h}"));
        }
        if !(self.layer_norm_eps > 0.0 && self.layer_norm_eps < 1.0) {
            return Err(format!("layer_norm_eps is {}, outside 0 to 1", self.layer_norm_eps));
        }
        let words = [
            ("model_type", &self.model_type, "bert"),
            ("hidden_act", &self.hidden_act, "gelu"),
            ("position_embedding_type", &self.position_embedding_type, "absolute"),
        ];
        match words.into_iter().find(|(_, found, expected)| found != expected) {
            Some((name, found, expected)) => {
                Err(format!("{name} is `{found}`, and the encoder's cascades are for `{expected}`"))
            }
            None => Ok(()),
        }
    }
}

/// Arrays by the names of a cascade's parameters.
pub type Weights = Vec<(&'static str, HostArray)>;

/// A model in memory.
#[derive(Debug)]
pub struct Model {
    /// Hyperparameters.
    pub config: Config,
    /// Parameters of cascade `embed`.
    pub embed: Weights,
    /// Parameters of cascade `layer`, layer by layer.
    pub layers: Vec<Weights>,
    tokenizer: Tokenizer,
}

/// Sentences as tokens, padded to the longest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// T.
    pub longest: usize,
    /// `[B,T]`; positions at or after a sentence's length hold the padding token.
    pub ids: Vec<i32>,
    /// `[B]`: real tokens.
    pub lengths: Vec<i32>,
}

impl Model {
    /// Reads a model's folder.
    ///
    /// # Errors
    /// [`Error::Model`] and [`Error::File`].
    pub fn load(folder: &Path) -> Result<Model, Error> {
        let wrong = |file: &Path, reason: String| Error::Model { path: file.to_owned(), reason };
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| wrong(&path, e.to_string()))?;
        let config: Config = serde_json::from_str(&text).map_err(|e| wrong(&path, e.to_string()))?;
        config.check().map_err(|reason| wrong(&path, reason))?;

        let path = folder.join("tokenizer.json");
        let text = std::fs::read(&path).map_err(|e| wrong(&path, e.to_string()))?;
        let mut tokenizer = Tokenizer::from_bytes(text).map_err(|e| wrong(&path, e.to_string()))?;
        let max_length = MAX_TOKENS.min(config.max_position_embeddings as usize);
        let truncation = TruncationParams { max_length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| wrong(&path, e.to_string()))?;
        let padding = tokenizer.get_padding().cloned().unwrap_or_default();
        tokenizer.with_padding(Some(PaddingParams { strategy: PaddingStrategy::BatchLongest, ..padding }));

        let path = folder.join("model.safetensors");
        let mut arrays: BTreeMap<String, HostArray> = read(&path, &Limits::default())?.into_iter().collect();
        let mut take = |name: &str, shape: &[u64]| -> Result<HostArray, Error> {
            let Some(array) = arrays.remove(name) else {
                return Err(wrong(&path, format!("there is no array `{name}`")));
            };
            if array.dtype() != DType::F32 || array.shape() != shape {
                let (dtype, found) = (array.dtype(), array.shape());
                return Err(wrong(&path, format!("`{name}` is {dtype}{found:?}, and the model needs f32{shape:?}")));
            }
            Ok(array)
        };

        let (d, h, e, f) =
            (config.hidden_size, config.num_attention_heads, config.head_size(), config.intermediate_size);
        let embed = vec![
            ("word", take("embeddings.word_embeddings.weight", &[config.vocab_size, d])?),
            ("position", take("embeddings.position_embeddings.weight", &[config.max_position_embeddings, d])?),
            ("kind", take("embeddings.token_type_embeddings.weight", &[config.type_vocab_size, d])?),
            ("gamma", take("embeddings.LayerNorm.weight", &[d])?),
            ("beta", take("embeddings.LayerNorm.bias", &[d])?),
        ];
        let mut layers = Vec::new();
        for l in 0..config.num_hidden_layers {
            let mut part = |name: &str, shape: &[u64]| take(&format!("encoder.layer.{l}.{name}"), shape);
            let mut stacked = |kind: &str, shape: &[u64], stacked: &[u64]| -> Result<HostArray, Error> {
                let mut bytes = Vec::new();
                for which in ["query", "key", "value"] {
                    bytes.extend_from_slice(part(&format!("attention.self.{which}.{kind}"), shape)?.bytes());
                }
                Ok(HostArray::from_bytes(DType::F32, stacked, &bytes).map_err(einfall::runtime::Error::from)?)
            };
            let (wqkv, bqkv) = (stacked("weight", &[d, d], &[3, h, e, d])?, stacked("bias", &[d], &[3, h, e])?);
            layers.push(vec![
                ("Wqkv", wqkv),
                ("bqkv", bqkv),
                ("Wo", part("attention.output.dense.weight", &[d, d])?),
                ("bo", part("attention.output.dense.bias", &[d])?),
                ("g1", part("attention.output.LayerNorm.weight", &[d])?),
                ("b1", part("attention.output.LayerNorm.bias", &[d])?),
                ("W1", part("intermediate.dense.weight", &[f, d])?),
                ("c1", part("intermediate.dense.bias", &[f])?),
                ("W2", part("output.dense.weight", &[d, f])?),
                ("c2", part("output.dense.bias", &[d])?),
                ("g2", part("output.LayerNorm.weight", &[d])?),
                ("b2", part("output.LayerNorm.bias", &[d])?),
            ]);
        }
        Ok(Model { config, embed, layers, tokenizer })
    }

    /// The tokens of a batch of sentences.
    ///
    /// # Errors
    /// [`Error::Tokens`] where the tokenizer fails or gives a token without an embedding.
    pub fn tokenize(&self, sentences: &[&str]) -> Result<Tokens, Error> {
        let encoded =
            self.tokenizer.encode_batch(sentences.to_vec(), true).map_err(|e| Error::Tokens(e.to_string()))?;
        let longest = encoded.iter().map(|e| e.len()).max().unwrap_or(0);
        let mut tokens = Tokens { longest, ids: Vec::new(), lengths: Vec::new() };
        for sentence in &encoded {
            let real = sentence.get_attention_mask().iter().filter(|m| **m == 1).count();
            let prefix = sentence.get_attention_mask()[..real].iter().all(|m| *m == 1);
            if sentence.len() != longest || real == 0 || !prefix {
                return Err(Error::Tokens("padding is not at the end of each sentence".to_owned()));
            }
            tokens.lengths.push(real as i32);
            for &id in sentence.get_ids() {
                if u64::from(id) >= self.config.vocab_size {
                    let w = self.config.vocab_size;
                    return Err(Error::Tokens(format!("token {id} has no embedding; there are {w}")));
                }
                tokens.ids.push(id as i32);
            }
        }
        Ok(tokens)
    }
}
