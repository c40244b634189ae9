//! Running reductions along an axis: sequential along it, lanes along another axis where there is one.

use std::collections::BTreeMap;

use einfall_ir::arena::Id;
use einfall_ir::kernel::{Expr as E, Stmt};
use einfall_ir::ops::ReduceOp;
use einfall_ir::tile::{AxisId, Op};

use super::access::Sink;
use super::build::*;
use super::nest::monoid;
use super::place::Place;
use super::{Lower, Out};

impl Lower<'_> {
    /// A scan.
    pub(super) fn scan(&mut self, op: &Op) -> Out<Vec<Stmt>> {
        let Op::Scan { out, op, value, along, carry } = op else { return Ok(Vec::new()) };
        if matches!(op, ReduceOp::LogSumExp | ReduceOp::ArgMin | ReduceOp::ArgMax) {
            return Err(self.unsupported(format!("a running {}", op.name())));
        }
        let axes = self.wide(&self.k.tiles[*out].axes);
        let rest: Vec<AxisId> = axes.iter().copied().filter(|a| a != along).collect();
        let map = Op::Map { out: *out, value: *value };
        let lane = self.choose_lane(&[&map], &rest);
        let outer: Vec<AxisId> = rest.iter().copied().filter(|a| Some(*a) != lane).collect();
        let dtype = Self::register_type(self.k.tiles[*out].dtype);
        let (out, value, along, carry, op) = (*out, *value, *along, *carry, *op);
        let width = self.isa.lanes();
        let mut local = BTreeMap::new();
        self.loops(&outer, &mut local, &mut |s, local| {
            s.along_lane(lane, width, local, &mut |s, p| {
                let mut stmts = Vec::new();
                let w = if p.lane.is_some() { p.width } else { 0 };
                let dims: Vec<usize> = if w > 0 { vec![0] } else { vec![] };
                let acc = s.frag("running", dtype, w);
                let read = E::Frag { frag: acc, dims: dims.clone() };
                let mut start = Sink::default();
                let first = match carry {
                    Some(c) => {
                        let names = s.own_places(c);
                        s.tile_value(c, &names, p, &mut start)?
                    }
                    None if dtype.is_float() => E::Float(op.identity()),
                    None => int(match op {
                        ReduceOp::Max => i64::MIN,
                        ReduceOp::Min => i64::MAX,
                        _ => op.identity() as i64,
                    }),
                };
                stmts.extend(start.inner);
                stmts.push(Stmt::Map { out: acc, value: first });
                let mut q = p.clone();
                let body = s.loops(&[along], &mut q.local.clone(), &mut |s, local| {
                    q.local = local.clone();
                    let mut sink = Sink::default();
                    let v = s.expr(value, &q, &mut sink)?;
                    let v = E::Binary(monoid(op), Box::new(v), Box::new(read.clone()));
                    sink.inner.push(Stmt::Map { out: acc, value: v });
                    let Place::Scratch(place) = s.places[out.index()].clone() else {
                        return Err(s.unsupported("a scan into an array"));
                    };
                    let stmt = s.scratch_store(&place, acc, w > 0, &q)?;
                    sink.inner.push(stmt);
                    Ok(sink.inner)
                })?;
                stmts.extend(body);
                if let Some(c) = carry {
                    let Place::Scratch(place) = s.places[c.index()].clone() else {
                        return Err(s.unsupported("a scan into an array"));
                    };
                    let stmt = s.scratch_store(&place, acc, w > 0, p)?;
                    stmts.push(stmt);
                }
                Ok(stmts)
            })
        })
    }
}
