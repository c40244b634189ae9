//! `csp`: integer constraint systems from a file.

use std::path::PathBuf;

use einfall_autotune::csp::text::{parse, parse_expr, parse_order};
use einfall_autotune::csp::{Report, Solver, Status};
use einfall_ir::diag::Diagnostics;

use super::Failure;
use super::source::Source;

/// Arguments of `csp`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("query"))]
pub struct CspArgs {
    /// The file of constraints (ConstrINT's text and more), or - for standard input
    file: PathBuf,
    /// Print one assignment (the default)
    #[arg(long, group = "query")]
    first: bool,
    /// Print every assignment
    #[arg(long, group = "query")]
    all: bool,
    /// Print how many assignments there are
    #[arg(long, group = "query")]
    count: bool,
    /// Print the lexicographic optimum in this order
    #[arg(long, group = "query", value_name = "A:max,B:min")]
    lex: Option<String>,
    /// Print the assignment that makes an expression least
    #[arg(long, group = "query", value_name = "EXPR")]
    minimize: Option<String>,
    /// Name a minimal set of constraints that cannot hold together
    #[arg(long, group = "query")]
    explain: bool,
    /// Print the versioned JSON report
    #[arg(long)]
    json: bool,
}

/// Solves and prints. A system without an assignment is an answer, not an error, except to --first and optima.
pub fn csp(args: &CspArgs) -> Result<(), Failure> {
    let source = Source::read(&args.file)?;
    let model = parse(&source.text).map_err(|d| Failure::Wrong(source.render(&d)))?;
    let option = |d: Diagnostics| Failure::Usage(d.render("command line"));
    let solver = Solver::new(&model);
    let solved = if args.all {
        solver.all(&[], usize::MAX).map(|found| Report::of_assignments(&model, &found))
    } else if args.count {
        solver.count(&[]).map(Report::of_count)
    } else if let Some(order) = &args.lex {
        let order = parse_order(order, &model).map_err(option)?;
        solver.lexicographic(&order).map(|found| Report::of_assignments(&model, found.as_slice()))
    } else if let Some(cost) = &args.minimize {
        let cost = parse_expr(cost, &model).map_err(option)?;
        solver.minimize(&cost).map(|found| Report::of_costed(&model, found.as_slice()))
    } else if args.explain {
        solver.explain().map(|e| Report::of_explanation(&model, &source.text, &e))
    } else {
        solver.first().map(|found| Report::of_assignments(&model, found.as_slice()))
    };
    let report = solved.map_err(|e| Failure::Wrong(format!("{}: {e}", source.name)))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Failure::wrong)?);
    } else {
        print(&report);
    }
    let wanted = !(args.all || args.count || args.explain);
    if wanted && report.status == Status::Infeasible {
        let help = format!("{}: no assignment satisfies it; --explain names the constraints in conflict", source.name);
        return Err(Failure::Wrong(help));
    }
    Ok(())
}

fn print(report: &Report) {
    if let Some(count) = &report.count {
        println!("{count}");
    }
    for s in &report.solutions {
        let values: Vec<String> = s.values.iter().map(|v| format!("{}={}", v.name, v.value)).collect();
        match s.cost {
            Some(cost) => println!("{}  (cost {cost})", values.join(" ")),
            None => println!("{}", values.join(" ")),
        }
    }
    for c in &report.conflict {
        println!("{}:{}: {}: {}", c.line, c.column, c.name, c.text);
    }
    match report.minimal {
        Some(true) => println!("these constraints conflict, and no fewer of them do"),
        Some(false) => println!("these constraints conflict; fewer of them may"),
        None => {}
    }
}
