//! The CPU mapping model against the lowering: the rule's mapping is a solution of its CSP, and what the model proposes
//! or draws lowers.

use einfall_autotune::model_cpu::{candidates, choose, drawn, price};
use einfall_codegen::backend::llvm::Isa;
use einfall_codegen::{pipeline, tables};
use einfall_ir::cascade::parse;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::Plan;

/// Plans of the library that the CPU path takes.
fn plans() -> Vec<Plan> {
    let mut out = Vec::new();
    for (_, text) in einfall_kernels::SOURCES {
        for c in parse(text).expect("a library file").cascades {
            let program = pipeline::Program::Cascade(c);
            let context = pipeline::Context::default();
            let Ok(records) = pipeline::run(tables::TO_TILE, tables::FORMS, program, &context, None) else { continue };
            if let Some(pipeline::Program::Tile(plan)) = records.into_iter().last().map(|r| r.program) {
                let rule = choose(&plan, &DataSheet::cpu());
                if lowers(&plan, &rule).is_ok() {
                    out.push(plan);
                }
            }
        }
    }
    out
}

fn lowers(plan: &Plan, mapping: &Mapping) -> Result<(), String> {
    let context =
        pipeline::Context { mapping: Some(mapping.clone()), isa: Some(Isa::AVX2), ..pipeline::Context::default() };
    let mut program = pipeline::Program::Tile(plan.clone());
    for pass in tables::CPU {
        program = (pass.step)(program, &context).map_err(|d| format!("{}: {d:?}", pass.name))?;
    }
    Ok(())
}

#[test]
fn the_rule_is_admitted_and_candidates_lower() {
    let sheet = DataSheet::cpu();
    let all = plans();
    assert!(all.len() > 20, "{} plans", all.len());
    for plan in &all {
        let sizes: Vec<u64> = plan.ranks.iter().map(|(_, r)| r.fixed.unwrap_or(256)).collect();
        let rule = choose(plan, &sheet);
        let cost = price(plan, &sheet, Some(&sizes), &rule);
        assert!(cost.is_some_and(|s| s.is_finite() && s > 0.0), "{}: the rule is not admitted", plan.name);
        let found = candidates(plan, &sheet, Some(&sizes), 4);
        assert!(found.iter().any(|f| f.0 == rule), "{}: the rule is no candidate", plan.name);
        assert!(found.windows(2).all(|w| w[0].1 <= w[1].1), "{}: cheapest first", plan.name);
        assert_eq!(found, candidates(plan, &sheet, Some(&sizes), 4));
        for m in found.iter().map(|f| &f.0).chain(&drawn(plan, &sheet, Some(&sizes), 3, 4)) {
            lowers(plan, m).unwrap_or_else(|e| panic!("{}: {e}\n{m}", plan.name));
            assert!(price(plan, &sheet, Some(&sizes), m).is_some(), "{}: not admitted\n{m}", plan.name);
        }
    }
}
