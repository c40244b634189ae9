//! The kernel library of Einfall: cascades as text.
//!
//! Invariant: every file of the folder is listed here and parses; no target code lives in this crate.

/// Every library file: its name without suffix, and its text.
pub const SOURCES: &[(&str, &str)] = &[
    ("argmax", include_str!("../argmax.ein")),
    ("attention", include_str!("../attention.ein")),
    ("attention_alibi", include_str!("../attention_alibi.ein")),
    ("attention_bias", include_str!("../attention_bias.ein")),
    ("attention_block_mask", include_str!("../attention_block_mask.ein")),
    ("attention_deferred", include_str!("../attention_deferred.ein")),
    ("attention_documents", include_str!("../attention_documents.ein")),
    ("attention_full", include_str!("../attention_full.ein")),
    ("attention_gqa", include_str!("../attention_gqa.ein")),
    ("attention_padded", include_str!("../attention_padded.ein")),
    ("attention_relative", include_str!("../attention_relative.ein")),
    ("attention_sink", include_str!("../attention_sink.ein")),
    ("attention_softcap", include_str!("../attention_softcap.ein")),
    ("attention_unstabilised", include_str!("../attention_unstabilised.ein")),
    ("attention_window", include_str!("../attention_window.ein")),
    ("copy", include_str!("../copy.ein")),
    ("cross_entropy", include_str!("../cross_entropy.ein")),
    ("cumsum", include_str!("../cumsum.ein")),
    ("decode_attention", include_str!("../decode_attention.ein")),
    ("delta_rule", include_str!("../delta_rule.ein")),
    ("depthwise_convolution", include_str!("../depthwise_convolution.ein")),
    ("dequantised_matmul", include_str!("../dequantised_matmul.ein")),
    ("dequantised_matmul_int4", include_str!("../dequantised_matmul_int4.ein")),
    ("diagonal_recurrence", include_str!("../diagonal_recurrence.ein")),
    ("dropout", include_str!("../dropout.ein")),
    ("elman", include_str!("../elman.ein")),
    ("embedding", include_str!("../embedding.ein")),
    ("embedding_layernorm", include_str!("../embedding_layernorm.ein")),
    ("entropy", include_str!("../entropy.ein")),
    ("gated_delta_rule", include_str!("../gated_delta_rule.ein")),
    ("gated_linear_attention", include_str!("../gated_linear_attention.ein")),
    ("gathered_attention", include_str!("../gathered_attention.ein")),
    ("gru", include_str!("../gru.ein")),
    ("hgrn", include_str!("../hgrn.ein")),
    ("histogram", include_str!("../histogram.ein")),
    ("kv_append", include_str!("../kv_append.ein")),
    ("layernorm", include_str!("../layernorm.ein")),
    ("layernorm_affine_matmul", include_str!("../layernorm_affine_matmul.ein")),
    ("layernorm_matmul", include_str!("../layernorm_matmul.ein")),
    ("linear", include_str!("../linear.ein")),
    ("linear_attention", include_str!("../linear_attention.ein")),
    ("linear_gelu", include_str!("../linear_gelu.ein")),
    ("linear_relu", include_str!("../linear_relu.ein")),
    ("linear_silu", include_str!("../linear_silu.ein")),
    ("logsumexp", include_str!("../logsumexp.ein")),
    ("lstm", include_str!("../lstm.ein")),
    ("lstm_layer", include_str!("../lstm_layer.ein")),
    ("mamba2", include_str!("../mamba2.ein")),
    ("matmul", include_str!("../matmul.ein")),
    ("mean_pool", include_str!("../mean_pool.ein")),
    ("mean_variance", include_str!("../mean_variance.ein")),
    ("mla", include_str!("../mla.ein")),
    ("moe_down", include_str!("../moe_down.ein")),
    ("moe_mlp", include_str!("../moe_mlp.ein")),
    ("moe_permute", include_str!("../moe_permute.ein")),
    ("moe_up", include_str!("../moe_up.ein")),
    ("paged_attention", include_str!("../paged_attention.ein")),
    ("quantised_kv_attention", include_str!("../quantised_kv_attention.ein")),
    ("quantised_kv_attention_int4", include_str!("../quantised_kv_attention_int4.ein")),
    ("quantised_matmul", include_str!("../quantised_matmul.ein")),
    ("retention", include_str!("../retention.ein")),
    ("rmsnorm", include_str!("../rmsnorm.ein")),
    ("rmsnorm_matmul", include_str!("../rmsnorm_matmul.ein")),
    ("rotary", include_str!("../rotary.ein")),
    ("router", include_str!("../router.ein")),
    ("selective_scan", include_str!("../selective_scan.ein")),
    ("sigmoid_minus_max", include_str!("../sigmoid_minus_max.ein")),
    ("slstm", include_str!("../slstm.ein")),
    ("softmax", include_str!("../softmax.ein")),
    ("swiglu", include_str!("../swiglu.ein")),
    ("third_moment", include_str!("../third_moment.ein")),
    ("topk", include_str!("../topk.ein")),
    ("varlen_attention", include_str!("../varlen_attention.ein")),
    ("welford", include_str!("../welford.ein")),
];

/// The text of a library file.
///
/// ```
/// let text = einfall_kernels::source("softmax").expect("a library file");
/// assert!(einfall_ir::cascade::parse(text).is_ok());
/// assert_eq!(einfall_kernels::source("nothing"), None);
/// ```
pub fn source(name: &str) -> Option<&'static str> {
    SOURCES.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_listed_and_resolves_without_warnings() {
        let mut found = std::fs::read_dir(env!("CARGO_MANIFEST_DIR"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|x| x == "ein"))
            .map(|p| p.file_stem().unwrap().to_str().unwrap().to_string())
            .collect::<Vec<_>>();
        found.sort();
        assert_eq!(found, SOURCES.iter().map(|(n, _)| n.to_string()).collect::<Vec<_>>());
        let wrong: Vec<String> = SOURCES
            .iter()
            .flat_map(|(name, text)| {
                einfall_ir::cascade::check(text).1.into_iter().map(move |d| format!("{name}: {d} {:?}", d.primary))
            })
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn every_file_prints_and_formats_to_a_fixed_point() {
        for (name, text) in SOURCES {
            let parse = |t: &str| einfall_ir::cascade::parse(t).unwrap_or_else(|d| panic!("{}", d.render(name)));
            let once = einfall_ir::cascade::print(&parse(text));
            let twice = einfall_ir::cascade::print(&parse(&once));
            assert_eq!(once, twice, "{name}");
            let formatted = einfall_ir::cascade::format(text).unwrap();
            assert_eq!(formatted, einfall_ir::cascade::format(&formatted).unwrap(), "{name}");
            assert_eq!(einfall_ir::cascade::print(&parse(&formatted)), once, "{name}");
        }
    }
}
