//! Same-step cycles of an `iter` block: the strongly connected components of who needs whose value of the same step.

use std::collections::HashMap;

use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};

use crate::cascade::syntax::{self, ExprKind};
use crate::diag::{Diagnostic, Span};
use crate::ops::BinaryOp;

/// Statements of the block that need each other's values of the same step, each component with its diagnostic.
pub(super) fn same_step_cycles(
    i: &syntax::Iter,
    is_init: impl Fn(&syntax::Einsum) -> bool,
) -> Vec<(Vec<usize>, Diagnostic)> {
    let mut states: Vec<&str> = Vec::new();
    let mut writer: HashMap<&str, usize> = HashMap::new();
    for (k, e) in i.body.iter().enumerate() {
        for t in &e.targets {
            if is_init(e) {
                states.push(&t.name.name);
            } else {
                writer.entry(&t.name.name).or_insert(k);
            }
        }
    }
    let mut graph: DiGraph<usize, (String, Span)> = DiGraph::new();
    let nodes: Vec<NodeIndex> = (0..i.body.len()).map(|k| graph.add_node(k)).collect();
    for (k, e) in i.body.iter().enumerate().filter(|(_, e)| !is_init(e)) {
        for root in [Some(&e.value), e.filter.as_ref(), e.otherwise.as_ref()].into_iter().flatten() {
            accesses(root, &mut |name, at, span| {
                let Some(j) = writer.get(name) else { return };
                let produced =
                    !states.contains(&name) || at.first().is_some_and(|a| is_produced(a, &i.index.name, i.rev));
                if produced {
                    graph.add_edge(nodes[k], nodes[*j], (name.to_string(), span));
                }
            });
        }
    }
    let mut out = Vec::new();
    for component in tarjan_scc(&graph) {
        let inside: Vec<_> = graph
            .edge_indices()
            .filter_map(|e| graph.edge_endpoints(e).map(|(a, b)| (a, b, &graph[e])))
            .filter(|(a, b, _)| component.contains(a) && component.contains(b))
            .collect();
        let Some((_, _, (first, span))) = inside.iter().min_by_key(|(_, _, (_, span))| span.start) else { continue };
        let names = |n: &NodeIndex| {
            i.body[graph[*n]].targets.iter().map(|t| t.name.name.clone()).collect::<Vec<_>>().join(", ")
        };
        let mut members: Vec<usize> = component.iter().map(|n| graph[*n]).collect();
        members.sort_unstable();
        let mut d = Diagnostic::error(
            "E0264",
            *span,
            format!("a same-step cycle: `{first}` needs itself before it has a value"),
        );
        for (a, b, (_, place)) in &inside {
            let text = format!("`{}` needs `{}` of this step", names(a), names(b));
            if place == span {
                d = d.label(text);
            } else {
                d = d.also(*place, text);
            }
        }
        let before = if i.rev { format!("{}+1", i.index.name) } else { i.index.name.clone() };
        d = d.help(format!(
            "break the cycle with the value of the step before: `{first}[{before}, ..]`, a state with an initial value"
        ));
        out.push((members, d));
    }
    out
}

/// Whether a state's first position is the point this step produces.
fn is_produced(e: &syntax::Expr, index: &str, rev: bool) -> bool {
    let is = |e: &syntax::Expr, n: i64| matches!(e.kind, ExprKind::Int(m) if m == n);
    match &e.kind {
        ExprKind::Name(n) => rev && n == index,
        ExprKind::Binary(BinaryOp::Add, a, b) => {
            !rev && (a.as_name() == Some(index) && is(b, 1) || b.as_name() == Some(index) && is(a, 1))
        }
        _ => false,
    }
}

fn accesses<'e>(e: &'e syntax::Expr, f: &mut impl FnMut(&'e str, &'e [syntax::Expr], Span)) {
    match &e.kind {
        ExprKind::Access(name, at) => {
            f(&name.name, at, e.span);
            at.iter().for_each(|a| accesses(a, f));
        }
        ExprKind::Call(_, items) | ExprKind::Tuple(items) => items.iter().for_each(|a| accesses(a, f)),
        ExprKind::Unary(_, a) => accesses(a, f),
        ExprKind::Binary(_, a, b) => [a, b].iter().for_each(|x| accesses(x, f)),
        ExprKind::Select(a, b, c) => [a, b, c].iter().for_each(|x| accesses(x, f)),
        ExprKind::Reduce { body, .. } => accesses(body, f),
        ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) | ExprKind::Name(_) | ExprKind::Field(..) => {}
    }
}
