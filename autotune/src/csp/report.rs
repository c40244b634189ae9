//! The answer to a query as data: what `einfall csp --json` prints.
//!
//! Invariant: the schema is versioned by [`SCHEMA`]; variables and constraints appear by name, in the model's order.

use super::explain::Explanation;
use super::model::{Assignment, Model};
use super::solve::Costed;
use super::text::{line_column, print_pred};
use serde::Serialize;

/// Version of the report's schema.
pub const SCHEMA: u32 = 1;

/// Whether there is an assignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// There is.
    Feasible,
    /// There is none.
    Infeasible,
}

/// One variable's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// The variable's name.
    pub name: String,
    /// Its value.
    pub value: i64,
}

/// One assignment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Solution {
    /// The values in the model's order.
    pub values: Vec<Value>,
    /// The cost, where the query has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<i64>,
}

/// A constraint that takes part in a conflict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Conflicting {
    /// The constraint's name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Its 1-based line in the source.
    pub line: usize,
    /// Its 1-based column in the source.
    pub column: usize,
}

/// The answer to a query.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Whether there is an assignment.
    pub status: Status,
    /// The number of assignments, as decimal text since it may exceed 2^53, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<String>,
    /// The assignments found, in order.
    pub solutions: Vec<Solution>,
    /// The conflicting constraints, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conflict: Vec<Conflicting>,
    /// Whether the conflict was shown to be minimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimal: Option<bool>,
}

fn solution(model: &Model, assignment: &[i64], cost: Option<i64>) -> Solution {
    let values = model.vars().iter().zip(assignment).map(|(v, x)| Value { name: v.name.clone(), value: *x });
    Solution { values: values.collect(), cost }
}

fn status(feasible: bool) -> Status {
    if feasible { Status::Feasible } else { Status::Infeasible }
}

impl Report {
    fn empty(feasible: bool) -> Report {
        let status = status(feasible);
        Report { schema: SCHEMA, status, count: None, solutions: Vec::new(), conflict: Vec::new(), minimal: None }
    }

    /// The report of assignments, none of which means that there is none.
    pub fn of_assignments(model: &Model, found: &[Assignment]) -> Report {
        let solutions = found.iter().map(|a| solution(model, a, None)).collect();
        Report { solutions, ..Report::empty(!found.is_empty()) }
    }

    /// The report of assignments with their costs.
    pub fn of_costed(model: &Model, found: &[Costed]) -> Report {
        let solutions = found.iter().map(|c| solution(model, &c.assignment, Some(c.cost))).collect();
        Report { solutions, ..Report::empty(!found.is_empty()) }
    }

    /// The report of a count.
    pub fn of_count(count: u128) -> Report {
        Report { count: Some(count.to_string()), ..Report::empty(count > 0) }
    }

    /// The report of an explanation; `source` is the text the model was read from.
    pub fn of_explanation(model: &Model, source: &str, explanation: &Explanation) -> Report {
        match explanation {
            Explanation::Feasible(a) => Report::of_assignments(model, std::slice::from_ref(a)),
            Explanation::EmptyDomain(v) => {
                let name = model.vars()[*v].name.clone();
                let text = format!("the domain of {name} is empty");
                let conflict = vec![Conflicting { name, text, line: 1, column: 1 }];
                Report { conflict, minimal: Some(true), ..Report::empty(false) }
            }
            Explanation::Conflict(c) => {
                let named = |i: &usize| {
                    let c = &model.constraints()[*i];
                    let (line, column) = line_column(source, c.span.start);
                    Conflicting { name: c.name.clone(), text: print_pred(model, &c.pred), line, column }
                };
                let conflict = c.constraints.iter().map(named).collect();
                Report { conflict, minimal: Some(c.minimal), ..Report::empty(false) }
            }
        }
    }
}
