//! Values of the warps of a unit, exchanged through shared memory: what a reduction needs beyond shuffles.
//!
//! Every thread writes its values to a place of its own, the unit meets, and every thread reads those of its lane in
//! the warps that hold other parts, itself included, in order: all warps join the same values in the same order. There
//! are two copies of the places, used by turns: a warp writes a copy again only after the unit has met for the other
//! one, so after every warp's reads. Invariant: all warps of a unit take the same path, so their turns agree.

use einfall_ir::analysis::resources::EXCHANGE_BYTES;

use super::Res;
use super::emit::Emit;
use super::text::{Ty, Val};

/// Digits of the warp's number in its unit: place and extent.
pub(super) type Warps = Vec<(u64, u64)>;

/// The lanes and warps that hold parts of a result.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Lanes {
    /// Masks of a butterfly within a warp.
    pub(super) masks: Vec<u64>,
    /// Across warps.
    pub(super) warps: Warps,
}

impl Lanes {
    pub(super) fn is_empty(&self) -> bool {
        self.masks.is_empty() && self.warps.is_empty()
    }
}

/// Where a role's units exchange values.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    /// Register: the thread's first place in the copy whose turn it is.
    now: String,
    /// Register: the sum of those of both copies.
    both: String,
    /// Registers: how far the first warp of the thread's group is, for each kind of group.
    groups: Vec<(Warps, Val)>,
}

impl Emit<'_> {
    /// For each of `values`, those of all warps that differ in the digits, the lowest first.
    pub(super) fn exchanged(&mut self, values: &[Val], warps: &Warps) -> Res<Vec<Vec<Val>>> {
        let (base, size) = self.shared.exchange[self.role.index];
        let thread = self.role.thread.clone();
        if values.len() as u64 * EXCHANGE_BYTES > size {
            return Err(self.fail("a reduction across warps that was not foreseen"));
        }
        if self.role.exchange.is_none() {
            let (now, both) = (self.t.reg(Ty::S32), self.t.reg(Ty::S32));
            let unit = self.role.unit.clone();
            let names = (now.clone(), both.clone());
            self.hoisted(|e| {
                let own = e.mul(&thread, &Val::int(4));
                let unit = e.mul(&unit, &Val::int(2 * size as i64));
                let at = e.add(&own, &unit);
                let at = e.add(&at, &Val::int(base as i64));
                e.t.line(&format!("add.s32 {}, %smem, {}", names.0, at.s));
                e.t.line(&format!("shl.b32 {}, {}, 1", names.1, names.0));
                e.t.line(&format!("add.s32 {0}, {0}, {size}", names.1));
            });
            self.role.exchange = Some(Exchange { now, both, groups: Vec::new() });
        }
        let Exchange { now, both, groups } = self.role.exchange.clone().expect("set above");
        let first = match groups.into_iter().find(|g| g.0 == *warps) {
            Some((_, first)) => first,
            None => {
                let thread = self.role.thread.clone();
                let mut made = Val::int(0);
                self.hoisted(|e| {
                    use einfall_ir::ops::BinaryOp::{Div, Mod};
                    let warp = e.bin(Div, &thread, &Val::int(32)).expect("integers divide");
                    for (place, extent) in warps {
                        let d = e.bin(Div, &warp, &Val::int(*place as i64)).expect("integers divide");
                        let d = e.bin(Mod, &d, &Val::int(*extent as i64)).expect("integers divide");
                        let d = e.mul(&d, &Val::int(*place as i64 * 128));
                        made = e.add(&made, &d);
                    }
                    made = Val { s: e.t.def(Ty::S32, "mov.b32", &[&made.s]), ..made.clone() };
                });
                let made = Val::reg(Ty::S32, made.s);
                self.role.exchange.as_mut().expect("set above").groups.push((warps.clone(), made.clone()));
                made
            }
        };
        for (v, x) in values.iter().enumerate() {
            let (mov, st) = match x.ty {
                Ty::F32 => ("mov.f32", "f32"),
                Ty::S32 => ("mov.b32", "u32"),
                Ty::Pred | Ty::B16 | Ty::S64 | Ty::F64 => {
                    return Err(self.fail("a reduction of such values across warps"));
                }
            };
            let x = self.t.def(x.ty, mov, &[&x.s]);
            self.t.line(&format!("st.shared::cta.{st} [{now}+{}], {x}", v as u64 * EXCHANGE_BYTES));
        }
        self.unit_sync()?;
        let from = self.t.def(Ty::S32, "sub.s32", &[&now, &first.s]);
        // Offsets of the group's warps, the first digit fastest.
        let mut offsets = vec![0];
        for (place, extent) in warps {
            offsets = (0..*extent).flat_map(|d| offsets.iter().map(move |o| o + d * place * 128)).collect();
        }
        offsets.sort_unstable();
        let mut all = Vec::new();
        for (v, x) in values.iter().enumerate() {
            let ld = if x.ty == Ty::F32 { "f32" } else { "u32" };
            let mut list = Vec::new();
            for o in &offsets {
                let r = self.t.reg(x.ty);
                self.t.line(&format!("ld.shared::cta.{ld} {r}, [{from}+{}]", v as u64 * EXCHANGE_BYTES + o));
                list.push(Val::reg(x.ty, r));
            }
            all.push(list);
        }
        self.t.line(&format!("sub.s32 {now}, {both}, {now}"));
        Ok(all)
    }
}
