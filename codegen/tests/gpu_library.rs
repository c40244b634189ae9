//! Formed plans of cascades with contractions, lowered for a GPU by derived mappings: kernel after kernel, under every
//! adversarial schedule, they give what the cascades mean, tails and every choice of mapping included.

mod device;

use device::formed_cascade;
use einfall_codegen::lower::gpu;
use einfall_codegen::random::{Choices, Rng, mapping};
use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::kernel::Module;
use einfall_ir::kernel::eval::{GlobalBuffer, Options, Schedule, run};
use einfall_ir::kernel::verify::{Limits, verify};
use einfall_ir::tile::{BufferKind, Plan};
use einfall_ir::tolerance::inputs;

/// Extents under which the facts hold: multiples of 8, around a block of 64.
fn draw(c: &Cascade, rng: &mut Rng) -> Bindings {
    let drawn = (0..500).find_map(|_| {
        let size = |name: &str, rng: &mut Rng| match name {
            "B" | "H" | "G" | "R" => 1 + rng.below(2),
            "T" => rng.below(4),
            "M" | "N" => 8 * (1 + rng.below(17)),
            _ => 8 * (1 + rng.below(8)),
        };
        let free = c.ranks.iter().filter(|(_, r)| r.fixed.is_none());
        let sizes = free.map(|(_, r)| (r.name.clone(), size(&r.name, rng))).collect();
        let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
        check_facts(c, &b, &[]).is_ok().then_some(b)
    });
    drawn.unwrap_or_else(|| panic!("{}: no extents satisfy its facts", c.name))
}

fn lowered(plan: &Plan, choices: &Choices) -> Result<Module, String> {
    let m = mapping(plan, choices).map_err(|e| format!("{e}\n{plan}"))?;
    let module = gpu::lower(plan, &m).map_err(|e| format!("{e:?}\n{plan}\n{m}"))?;
    let faults = verify(&module, &Limits::SM90);
    assert!(faults.is_empty(), "{}\n{plan}", faults.iter().map(|v| format!("{v}\n")).collect::<String>());
    Ok(module)
}

/// The module's kernels one after another, against the cascade's float64 values.
fn agrees(c: &Cascade, plan: &Plan, module: &Module, rng: &mut Rng) {
    let b = draw(c, rng);
    let given = inputs::random(c, &b, rng.below(1 << 30), inputs::Variant::Normal).unwrap();
    let want = eval::evaluate(c, &b, &given).unwrap();
    for schedule in Schedule::ALL {
        let mut next = given.iter();
        let mut buffers: Vec<GlobalBuffer> = plan
            .buffers
            .iter()
            .map(|(_, x)| {
                let dims: Vec<u64> = x.dims.iter().map(|d| d.eval(&b.extents).unwrap()).collect();
                match x.kind {
                    BufferKind::Input | BufferKind::InOut => {
                        GlobalBuffer::new(&dims, x.dtype, next.next().unwrap().data.clone())
                    }
                    BufferKind::Output | BufferKind::Workspace => GlobalBuffer::undefined(&dims, x.dtype),
                }
            })
            .collect();
        for k in &module.kernels {
            let options = Options { schedule, ..Options::default() };
            run(k, &plan.ranks, &b.extents, &mut buffers, &options)
                .unwrap_or_else(|e| panic!("{} {schedule:?} at {:?}: {e}\n{plan}", k.name, b.extents));
        }
        let outs = plan.buffers.iter().zip(&buffers).filter(|((_, b), _)| b.kind == BufferKind::Output);
        for (((_, x), got), want) in outs.zip(&want) {
            assert!(got.defined.iter().all(|d| *d), "{} is not written whole at {:?}\n{plan}", x.name, b.extents);
            for (i, (x1, y)) in got.data.iter().zip(&want.data).enumerate() {
                // A derived form agrees where the cascade as written is finite.
                let near = (x1 - y).abs() <= 1e-9 * (1.0 + y.abs()) || x1 == y || y.is_nan();
                assert!(near, "{}[{i}] {x1} {y} at {:?}\n{plan}", x.name, b.extents);
            }
        }
    }
}

fn check(c: &Cascade) {
    let plan = formed_cascade(c.clone());
    let mut rng = Rng::new(c.name.bytes().fold(7, |h, b| h.wrapping_mul(31) ^ u64::from(b)));
    let plain = lowered(&plan, &Choices::plain()).unwrap_or_else(|e| panic!("{}: {e}", c.name));
    agrees(c, &plan, &plain, &mut rng);
    for _ in 0..2 {
        // A drawn mapping may be refused with its constraint, which is an expected answer.
        if let Ok(module) = lowered(&plan, &Choices { block: 64, ..Choices::draw(&mut rng) }) {
            agrees(c, &plan, &module, &mut rng);
        }
    }
}

fn library(names: &[&str]) {
    for name in names {
        let source = einfall_kernels::source(name).unwrap_or_else(|| panic!("there is no cascade {name}"));
        check(&parse(source).unwrap().cascades[0]);
    }
}

fn text(source: &str) {
    check(&parse(source).unwrap_or_else(|d| panic!("{d:?}\n{source}")).cascades[0]);
}

#[test]
fn matrix_products() {
    library(&["matmul", "linear", "linear_gelu", "linear_relu", "linear_silu"]);
    for (name, arrays, body) in [
        ("transposed_right", "A: bf16[M, K], B: bf16[N, K]", "sum(k) A[m,k] * B[n,k]"),
        ("transposed_left", "A: bf16[K, M], B: bf16[K, N]", "sum(k) A[k,m] * B[k,n]"),
        ("both_transposed", "A: bf16[K, M], B: bf16[N, K]", "sum(k) A[k,m] * B[n,k]"),
        ("scaled", "A: bf16[M, K], B: bf16[K, N], s: f32", "s * (sum(k) A[m,k] * B[k,n])"),
        ("residual", "A: bf16[M, K], B: bf16[K, N], C: bf16[M, N]", "C[m,n] + (sum(k) A[m,k] * B[k,n])"),
    ] {
        text(&format!("cascade {name}[M, N, K]({arrays}) -> (Y: bf16[M, N]) {{ Y[m,n] = {body} }}"));
    }
    text(
        "cascade batched[B, M, N, K](A: bf16[B, M, K], W: bf16[B, K, N]) -> (Y: bf16[B, M, N]) {
            Y[b,m,n] = sum(k) A[b,m,k] * W[b,k,n]
        }",
    );
    text(
        "cascade swiglu[M, N, K](x: bf16[M, K], w: bf16[K, N], v: bf16[K, N]) -> (y: bf16[M, N]) {
            g[m,n] = sum(k) x[m,k] * w[k,n]
            u[m,n] = sum(k) x[m,k] * v[k,n]
            y[m,n] = g[m,n] * sigmoid(g[m,n]) * u[m,n]
        }",
    );
}

#[test]
fn attention_variants() {
    library(&["attention", "attention_full", "attention_gqa", "attention_window", "attention_softcap"]);
}

#[test]
fn attention_with_biases_and_masks() {
    library(&["attention_alibi", "attention_sink", "attention_documents", "attention_bias", "attention_block_mask"]);
}

#[test]
fn attention_as_others_write_it() {
    library(&["attention_padded", "attention_deferred", "attention_unstabilised"]);
    // The log-sum-exp beside the result, an additive mask, and no division by a scale that is known to be positive.
    text(
        "cascade with_lse[B, H, M, N, E, F](Q: bf16[B,H,M,E], K: bf16[B,H,N,E], V: bf16[B,H,N,F], scale: f32 = 1/sqrt(E))
            -> (O: bf16[B,H,M,F], lse: f32[B,H,M]) {
            S[b,h,m,n] = scale * (sum(e) Q[b,h,m,e] * K[b,h,n,e])
            X[b,h,m]   = max(n) S[b,h,m,n]
            P[b,h,m,n] = exp(S[b,h,m,n] - X[b,h,m])
            L[b,h,m]   = sum(n) P[b,h,m,n]
            O[b,h,m,f] = (sum(n) P[b,h,m,n] * V[b,h,n,f]) / L[b,h,m]
            lse[b,h,m] = X[b,h,m] + log(L[b,h,m])
        }",
    );
    text(
        "cascade additive[B, H, M, N, E, F](Q: bf16[B,H,M,E], K: bf16[B,H,N,E], V: bf16[B,H,N,F], mask: f32[M, N])
            -> (O: bf16[B,H,M,F]) {
            S[b,h,m,n] = (sum(e) Q[b,h,m,e] * K[b,h,n,e]) / sqrt(64.0) + mask[m,n]
            X[b,h,m]   = max(n) S[b,h,m,n]
            P[b,h,m,n] = exp(S[b,h,m,n] - X[b,h,m])
            L[b,h,m]   = sum(n) P[b,h,m,n]
            O[b,h,m,f] = sum(n) P[b,h,m,n] / L[b,h,m] * V[b,h,n,f]
        }",
    );
}

#[test]
fn recurrent_cells() {
    library(&["lstm", "gru", "elman", "slstm"]);
}

#[test]
fn normalisation_before_a_projection() {
    library(&["rmsnorm_matmul"]);
}

/// `@exact` reaches the plan, whose operands then stay as they are; without instructions nothing is rounded either.
#[test]
fn operands_are_rounded_only_where_it_is_allowed_and_asked() {
    let source = einfall_kernels::source("attention").unwrap();
    let cascade = |source: &str| parse(source).unwrap().cascades.remove(0);
    let rounded = formed_cascade(cascade(source));
    assert!(!rounded.exact && rounded.to_string().contains("tile sum_n_2_a_bf16: bf16[b, g, r, m, n]"));
    let exact = formed_cascade(cascade(&source.replace("cascade attention[", "@exact\ncascade attention[")));
    let text = exact.to_string();
    assert!(text.starts_with("@exact\nplan attention[") && !text.contains("_bf16"), "{text}");
    assert_eq!(einfall_ir::tile::parse::parse(&text).unwrap().to_string(), text);
    assert!(mapping(&exact, &Choices::plain()).unwrap_err().contains("has operands of f32"));
    let none = einfall_codegen::passes::round_operands::round_operands(rounded.clone(), &[]);
    assert_eq!(none, rounded);
}

/// A box that reaches past the end of a group would overwrite the next one: stores by an engine are refused there.
#[test]
fn stores_never_touch_the_next_group() {
    let c = &parse(einfall_kernels::source("attention").unwrap()).unwrap().cascades[0];
    let plan = formed_cascade(c.clone());
    let mut m = mapping(&plan, &Choices { stores_by_engine: true, ..Choices::plain() }).unwrap();
    for a in &mut m.kernels[0].axes {
        let (block, units) = if a.axis == "r" {
            (64, 1)
        } else if a.axis == "m" {
            (1, 1)
        } else {
            (a.block, a.units)
        };
        (a.block, a.units) = (block, units);
    }
    let refused = gpu::lower(&plan, &m).unwrap_err();
    assert!(refused[0].message.contains("ends within the array along r"), "{refused:?}");
}
