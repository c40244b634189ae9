//! Plans as text: reading, pairing with mappings, random inputs, comparison with the tile evaluator.

use std::path::{Path, PathBuf};

use einfall::cuda;
use einfall_codegen::lower::gpu::split_streams;
use einfall_ir::arena::Id;
use einfall_ir::array::Array;
use einfall_ir::cascade::Size;
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::eval::{Blocks, Options};
use einfall_ir::tile::{self, AxisId, AxisKind, Kernel, Node, Op, Plan};
use einfall_ir::tolerance::Expected;
use einfall_ir::tolerance::inputs::{Variant, random_for_plan};
use einfall_ir::tolerance::plan::expect_plan;
use einfall_runtime::HostArray;

use super::super::Failure;
use super::super::source::Source;

/// Reads a plan, with some ranks fixed.
pub fn read_plan(path: &Path, statics: &[(String, u64)]) -> Result<Plan, Failure> {
    let source = Source::read(path)?;
    let mut plan = tile::parse::parse(&source.text).map_err(|d| Failure::Wrong(source.render(&[d])))?;
    if let Err(faults) = tile::verify::verify(&plan) {
        let list: Vec<String> = faults.iter().map(|f| f.to_string()).collect();
        return Err(Failure::Wrong(format!("{}: {}", source.name, list.join("; "))));
    }
    for (name, extent) in statics {
        let names = plan.ranks.iter().map(|(_, r)| r.name.clone()).collect::<Vec<_>>().join(", ");
        let Some((_, rank)) = plan.ranks.iter_mut().find(|(_, r)| r.name == *name) else {
            return Err(Failure::Usage(format!("there is no rank `{name}`; the ranks are {names}")));
        };
        rank.fixed = Some(*extent);
    }
    Ok(plan)
}

/// Files with this extension in a folder, sorted; none without the folder.
pub fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut list: Vec<PathBuf> =
        std::fs::read_dir(folder).map(|d| d.filter_map(|e| Some(e.ok()?.path())).collect()).unwrap_or_default();
    list.retain(|p| p.extension().is_some_and(|e| e == extension));
    list.sort();
    list
}

/// Whether a mapping is for a plan: of its name, with the kernels it names, or that its splits make.
pub fn is_for(mapping: &Mapping, plan: &Plan) -> bool {
    let has = |name: &str| plan.kernels.iter().any(|k| k.name == name);
    let merges = |m: &str| {
        mapping.kernels.iter().any(|k| k.split.is_some() && split_streams::merge_name(&k.kernel) == m && has(&k.kernel))
    };
    mapping.plan == plan.name && mapping.kernels.iter().all(|m| has(&m.kernel) || merges(&m.kernel))
}

/// The value of every rank of a plan, in order.
pub fn ranks(plan: &Plan, sizes: &[(String, u64)]) -> Result<Vec<u64>, Failure> {
    let value = |name: &str, fixed: Option<u64>| {
        let given = sizes.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        match (given, fixed) {
            (Some(a), Some(b)) if a != b => Err(Failure::Usage(format!("rank `{name}` is {b}, not {a}"))),
            (a, b) => a.or(b).ok_or_else(|| Failure::Usage(format!("rank `{name}` has no size: --size {name}=N"))),
        }
    };
    plan.ranks.iter().map(|(_, r)| value(&r.name, r.fixed)).collect()
}

/// Points that evaluating a kernel visits: the largest of its operations, streams around them included.
fn work(kernel: &Kernel, ranks: &[u64]) -> f64 {
    let extent = |a: &AxisId| kernel.axes[*a].extent.eval(ranks).unwrap_or(u64::MAX) as f64;
    fn visit(nodes: &[Node], around: &[AxisId], f: &mut impl FnMut(Vec<AxisId>), kernel: &Kernel) {
        for node in nodes {
            let mut axes = around.to_vec();
            match node {
                Node::Stream(s) => {
                    axes.push(s.axis);
                    visit(&s.body, &axes, f, kernel);
                    continue;
                }
                Node::Op(Op::Load { out, .. } | Op::Map { out, .. } | Op::Scan { out, .. }) => {
                    axes.extend(&kernel.tiles[*out].axes);
                }
                Node::Op(Op::Store { axes: a, .. }) => axes.extend(a),
                Node::Op(Op::Reduce { out, over, .. }) => {
                    axes.extend(&kernel.tiles[out[0]].axes);
                    axes.extend(over);
                }
                Node::Op(Op::Contract { out, over, .. }) => {
                    axes.extend(&kernel.tiles[*out].axes);
                    axes.extend(over);
                }
            }
            f(axes);
        }
    }
    let grid: Vec<AxisId> = kernel.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid).map(|(id, _)| id).collect();
    let mut largest = 0f64;
    let mut see = |mut axes: Vec<AxisId>| {
        axes.sort_by_key(|a| a.index());
        axes.dedup();
        largest = largest.max(axes.iter().map(extent).product());
    };
    visit(&kernel.body, &grid, &mut see, kernel);
    largest
}

/// Coordinates of a block of the evaluator's tasks.
const BLOCK: u64 = 8;

/// How the evaluator runs a plan: whole where `budget` points suffice, else some tasks of the last kernel.
fn options(plan: &Plan, ranks: &[u64], budget: f64, seed: u64) -> Options {
    let options = Options { blocks: Blocks::Uniform(BLOCK), ..Options::default() };
    let Some((count, _)) = chosen(plan, ranks, budget) else { return options };
    Options { tasks: Some((count as u64, seed)), ..options }
}

/// Tasks of the last kernel that are evaluated and how many it has; none: all of them.
fn chosen(plan: &Plan, ranks: &[u64], budget: f64) -> Option<(f64, f64)> {
    let all: f64 = plan.kernels.iter().map(|k| work(k, ranks)).sum();
    let last = plan.kernels.last().filter(|_| all > budget)?;
    let grid = last.axes.iter().filter(|(_, a)| a.kind == AxisKind::Grid);
    let tasks: f64 = grid.map(|(_, a)| a.extent.eval(ranks).unwrap_or(0).div_ceil(BLOCK) as f64).product();
    Some(((tasks * budget / all).max(2.0).min(tasks).floor(), tasks))
}

/// Points that the evaluator visits within a budget: kernels before the last whole, of the last two tasks at least.
pub fn visits(plan: &Plan, ranks: &[u64], budget: f64) -> f64 {
    let all: f64 = plan.kernels.iter().map(|k| work(k, ranks)).sum();
    let last = plan.kernels.last().map_or(0.0, |k| work(k, ranks));
    chosen(plan, ranks, budget).map_or(all, |(count, tasks)| all - last * (1.0 - count / tasks.max(1.0)))
}

/// Random inputs of a plan by name, and what its outputs must be.
pub struct Case {
    pub inputs: Vec<(String, Array)>,
    pub expected: Vec<Expected>,
}

/// Draws inputs and evaluates the plan within `budget` points.
pub fn case(plan: &Plan, ranks: &[u64], seed: u64, variant: Variant, budget: f64) -> Result<Case, String> {
    let values = random_for_plan(plan, ranks, seed, variant).map_err(|e| format!("{e:?}"))?;
    let expected = expect_plan(plan, ranks, &values, &options(plan, ranks, budget, seed)).map_err(|e| e.to_string())?;
    let names = cuda::plan_inputs(plan).map(|(n, _)| n.to_owned());
    Ok(Case { inputs: names.zip(values).collect(), expected })
}

/// Compares every output; a line for each. Elements that were not evaluated must at least have been written.
///
/// # Errors
/// The first output that is out of tolerance or has an element that was not written.
pub fn compare(expected: &[Expected], outputs: &[(String, HostArray)]) -> Result<Vec<String>, String> {
    let mut lines = Vec::new();
    for e in expected {
        let Some((_, got)) = outputs.iter().find(|(n, _)| *n == e.name) else {
            return Err(format!("output `{}` is missing", e.name));
        };
        let elem_bytes = (e.dtype.bits() as usize).div_ceil(8);
        let unwritten = |w: &[u8]| e.dtype.is_float() && w.iter().all(|b| *b == 0xff);
        if let Some(i) = got.bytes().chunks(elem_bytes).position(unwritten) {
            return Err(format!("{}{:?} is not written", e.name, einfall_ir::array::coordinates(&e.dims, i as u64)));
        }
        let values = got.to_values().map_err(|e| e.to_string())?;
        let report = e.compare(&values.data).map_err(|m| m.to_string())?;
        lines.push(format!(
            "{}: {} of {} elements agree; largest error {:.2e}, {:.0}% of its tolerance",
            e.name,
            report.elements,
            e.values.len(),
            report.worst_error,
            100.0 * report.worst_ratio
        ));
    }
    Ok(lines)
}

/// Sizes around the edges of a mapping's blocks: one per rank at a time, others at a base that has tails everywhere.
/// Axes that a block must hold whole (inner ones) stay within it.
pub fn edge_sizes(plan: &Plan, mapping: &Mapping) -> Vec<Vec<u64>> {
    let mut blocks: Vec<Option<(u64, bool)>> = vec![None; plan.ranks.len()];
    for m in &mapping.kernels {
        let Some(kernel) = plan.kernels.iter().find(|k| k.name == m.kernel) else { continue };
        for a in &m.axes {
            let Some((_, axis)) = kernel.axes.iter().find(|(_, x)| x.name == a.axis) else { continue };
            if let Size::Rank(r) = &axis.extent {
                let whole = axis.kind == AxisKind::Inner || a.whole;
                let slot = &mut blocks[r.index()];
                *slot = match *slot {
                    Some((b, w)) if w || whole => Some((
                        if w && whole {
                            b.min(a.block)
                        } else if w {
                            b
                        } else {
                            a.block
                        },
                        true,
                    )),
                    Some((b, w)) => Some((b.max(a.block), w)),
                    None => Some((a.block, whole)),
                };
            }
        }
    }
    let fixed: Vec<Option<u64>> = plan.ranks.iter().map(|(_, r)| r.fixed).collect();
    let choices: Vec<Vec<u64>> = blocks
        .iter()
        .zip(&fixed)
        .map(|(b, f)| match (*f, *b) {
            (Some(n), _) => vec![n],
            (None, None | Some((0 | 1, _))) => vec![2, 1, 3, 0],
            (None, Some((b, true))) => vec![b, b - 1, (b / 2).max(1), b - 8.min(b - 1)],
            (None, Some((b, false))) => vec![b + 1, 1, b - 1, b, 2 * b, 2 * b + 3, 0],
        })
        .collect();
    let base: Vec<u64> = choices.iter().map(|c| c[0]).collect();
    let mut list = vec![base.clone()];
    for (r, c) in choices.iter().enumerate() {
        for n in &c[1..] {
            let mut sizes = base.clone();
            sizes[r] = *n;
            list.push(sizes);
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &str) -> String {
        std::fs::read_to_string(format!("{}/tests/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn edges_of_every_block_are_visited() {
        let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
        let mapping = einfall_ir::mapping::parse::parse(&text("mappings/gemm.mapping")).unwrap();
        assert!(is_for(&mapping, &plan));
        let list = edge_sizes(&plan, &mapping);
        assert_eq!(list[0], [129, 257, 65]);
        for (r, block) in [128, 256, 64].into_iter().enumerate() {
            for n in [0, 1, block - 1, block, block + 1, 2 * block] {
                assert!(list.iter().any(|s| s[r] == n), "{n} along rank {r}");
            }
        }
        let plan = tile::parse::parse(&text("plans/attention.tile")).unwrap();
        let mapping = einfall_ir::mapping::parse::parse(&text("mappings/attention.mapping")).unwrap();
        assert!(edge_sizes(&plan, &mapping).iter().all(|s| s[5] <= 128 && s[6] <= 128), "whole axes stay within");
    }

    #[test]
    fn large_plans_are_sampled() {
        let plan = tile::parse::parse(&text("plans/gemm.tile")).unwrap();
        assert!(options(&plan, &[64, 64, 64], 1e6, 1).tasks.is_none());
        let (count, _) = options(&plan, &[4096, 4096, 4096], 1e6, 1).tasks.unwrap();
        assert_eq!(count, 3);
        let case = case(&plan, &[40, 24, 33], 5, Variant::Normal, 1e3).unwrap();
        let values = case.expected[0].values.iter().map(|v| if v.is_nan() { 1.0 } else { *v }).collect();
        let got = Array { dtype: case.expected[0].dtype, dims: vec![40, 24], data: values };
        let outputs = [("C".to_owned(), HostArray::from_values(&got).unwrap())];
        assert!(compare(&case.expected, &outputs).is_ok());
        let mut poisoned = outputs.clone();
        poisoned[0].1.bytes_mut()[200..202].fill(0xff);
        assert_eq!(compare(&case.expected, &poisoned).unwrap_err(), "C[4, 4] is not written");
    }
}
