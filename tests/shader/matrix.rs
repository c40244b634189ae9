//! Cooperative matrices on the machine: every invocation of a subgroup of 32 holds elements that are nobody's business.
//!
//! Element `e` of a row-major matrix is held by invocation `(7·e + 3) % 32` of its subgroup, so that a shader which counts on
//! any order is wrong here. Invariant: all of a subgroup take part, at one place, or it is an error; what is loaded and stored
//! is touched by the invocation that holds it.

use naga::{CooperativeSize, Expression, Handle};

use super::{Data, Frame, Machine, Res};

/// By subgroup that takes part: words by element.
type Places = Vec<(usize, Vec<usize>)>;

/// Invocations that hold a matrix.
pub const HOLDERS: usize = 32;

/// The invocation of the subgroup that holds element `e`, and which of its values it is. 7 and 32 have no common factor.
fn holder(e: usize) -> (usize, usize) {
    ((7 * e + 3) % HOLDERS, e / HOLDERS)
}

/// Values of an invocation.
pub fn held(columns: CooperativeSize, rows: CooperativeSize) -> usize {
    columns as usize * rows as usize / HOLDERS
}

/// The matrix that a subgroup holds, row-major.
fn gathered(d: &Data, group: usize) -> Vec<f32> {
    let of = |e: usize| {
        let (lane, v) = holder(e);
        f32::from_bits(d.bits[(group * HOLDERS + lane) * d.n + v])
    };
    (0..d.n * HOLDERS).map(of).collect()
}

/// The subgroups that take part.
fn whole(on: &[bool]) -> Res<Vec<usize>> {
    let groups = on.chunks(HOLDERS).enumerate().filter(|(_, g)| g.contains(&true));
    let cut = |g: &[bool]| g.len() < HOLDERS || g.contains(&false);
    if groups.clone().any(|(_, g)| cut(g)) {
        return Err("a cooperative matrix of which a part of the subgroup takes no part".into());
    }
    Ok(groups.map(|(i, _)| i).collect())
}

impl<'m> Machine<'m> {
    /// Where the elements of a matrix of `side` rows and columns lie, and in which variable.
    fn places(
        &mut self,
        f: &mut Frame<'m>,
        data: &naga::CooperativeData,
        side: usize,
        on: &[bool],
    ) -> Res<(usize, Places)> {
        let (p, stride) = (self.pointer(f, data.pointer, on)?, self.data(f, data.stride, on)?);
        // Items are vectors or scalars; a stride counts items.
        let per = p.ty.map_or(1, |ty| super::words(self.module, ty));
        let mut all = Vec::new();
        for g in whole(on)? {
            let lanes = g * HOLDERS..(g + 1) * HOLDERS;
            let one = |list: &[usize]| list[lanes.clone()].iter().all(|x| *x == list[lanes.start]);
            let strides: Vec<usize> = stride.bits.iter().map(|s| *s as usize).collect();
            if !p.global || !one(&p.at) || !one(&strides) {
                return Err("a cooperative matrix at different places for invocations of a subgroup".into());
            }
            let (first, step) = (p.at[lanes.start], strides[lanes.start] * per);
            let bytes = self.bytes(p.variable);
            if [first, step].iter().any(|n| !(n * bytes).is_multiple_of(16)) {
                return Err("a cooperative matrix whose rows do not begin at multiples of 16 bytes".into());
            }
            let at = |e: usize| match data.row_major {
                true => first + e / side * step + e % side,
                false => first + e % side * step + e / side,
            };
            all.push((g, (0..side * side).map(at).collect()));
        }
        Ok((p.variable, all))
    }

    pub(super) fn load_matrix(
        &mut self,
        f: &mut Frame<'m>,
        size: (CooperativeSize, CooperativeSize),
        data: &naga::CooperativeData,
        on: &[bool],
    ) -> Res<Data> {
        let n = held(size.0, size.1);
        let mut bits = vec![0; n * on.len()];
        let (variable, places) = self.places(f, data, size.0 as usize, on)?;
        for (group, at) in places {
            for (e, at) in at.into_iter().enumerate() {
                let (lane, v) = holder(e);
                let lane = group * HOLDERS + lane;
                bits[lane * n + v] = *self.touch(variable, at, lane, false, false)?;
            }
        }
        Ok(Data { kind: naga::ScalarKind::Float, n, bits })
    }

    pub(super) fn store_matrix(
        &mut self,
        f: &mut Frame<'m>,
        target: Handle<Expression>,
        data: &naga::CooperativeData,
        on: &[bool],
    ) -> Res<()> {
        let matrix = self.data(f, target, on)?;
        let side = (matrix.n * HOLDERS).isqrt();
        let (variable, places) = self.places(f, data, side, on)?;
        for (group, at) in places {
            for (e, at) in at.into_iter().enumerate() {
                let (lane, v) = holder(e);
                let lane = group * HOLDERS + lane;
                *self.touch(variable, at, lane, true, false)? = matrix.bits[lane * matrix.n + v];
            }
        }
        Ok(())
    }
}

/// `c + a·b`.
pub fn multiply_add(a: &Data, b: &Data, c: &Data, on: &[bool]) -> Res<Data> {
    let mut out = c.clone();
    let side = (c.n * HOLDERS).isqrt();
    for group in whole(on)? {
        let (x, y, mut z) = (gathered(a, group), gathered(b, group), gathered(c, group));
        for (e, z) in z.iter_mut().enumerate() {
            let (i, j) = (e / side, e % side);
            *z = (0..side).fold(*z, |sum, k| x[i * side + k].mul_add(y[k * side + j], sum));
            let (lane, v) = holder(e);
            out.bits[(group * HOLDERS + lane) * c.n + v] = z.to_bits();
        }
    }
    Ok(out)
}
