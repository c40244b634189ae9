//! What TMA can copy: the box of a tensor map, and where its elements land in shared memory.
//!
//! A box is dense in shared memory: its innermost dimension contiguous, the others following, then the swizzle of the
//! buffer's layout on the byte address. Invariant: a box that passes [`TmaBox::of`] writes exactly where the layout
//! says. Source: PTX ISA, "Tensor copy", "Swizzling modes"; CUDA driver API, `cuTensorMapEncodeTiled`.

use super::View;
use crate::layout::{MemLayout, Swizzle};

/// Alignment in bytes of a box in shared memory.
pub const BOX_ALIGN: u64 = 128;

/// The shared-memory side of a tensor copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TmaBox {
    /// Dimensions of the copied tile, innermost (contiguous) first.
    pub order: Vec<usize>,
    /// Element stride of each tile dimension in the dense box.
    pub strides: Vec<u64>,
    /// The swizzle mode.
    pub swizzle: Option<Swizzle>,
    /// Bytes of the whole box.
    pub bytes: u64,
}

impl TmaBox {
    /// The box that copies a tile of `extents` to or from the window `shared` of a buffer laid out as `layout`.
    /// Errors name the rule that is broken.
    pub fn of(extents: &[u64], shared: &View, layout: &MemLayout, elem_bytes: u64) -> Result<TmaBox, String> {
        if extents.is_empty() || extents.len() > 5 {
            return Err(format!("a tensor map has 1 to 5 dimensions, not {}", extents.len()));
        }
        if shared.walk.len() != extents.len() {
            return Err("the tile and its window differ in rank".to_string());
        }
        let mut order: Vec<(u64, usize)> = Vec::new();
        for (d, w) in shared.walk.iter().enumerate() {
            let Some((dim, step)) = *w else { return Err("a tensor copy cannot broadcast".to_string()) };
            if step != 1 {
                return Err("a tensor copy walks by steps of 1".to_string());
            }
            let first = layout.dims.get(dim).and_then(|g| g.iter().find(|g| g.extent > 1));
            // Dimensions of extent 1 may stand anywhere; outermost is simplest.
            let stride = if extents[d] == 1 { u64::MAX } else { first.map_or(u64::MAX, |g| g.stride) };
            order.push((stride, d));
        }
        order.sort();
        let order: Vec<usize> = order.into_iter().map(|(_, d)| d).collect();
        let mut strides = vec![0; extents.len()];
        let mut dense = 1;
        for &d in &order {
            strides[d] = dense;
            dense *= extents[d];
        }
        if let Some(d) = extents.iter().position(|e| *e == 0 || *e > 256) {
            return Err(format!("a box has 1 to 256 elements per dimension, not {}", extents[d]));
        }
        let inner = extents[order[0]] * elem_bytes;
        if !inner.is_multiple_of(16) {
            return Err(format!("the innermost dimension of a box is a multiple of 16 bytes, not {inner}"));
        }
        let swizzle = match layout.swizzle {
            None => None,
            Some(s) if Swizzle::span(s.span_bytes()) == Some(s) => Some(s),
            Some(s) => return Err(format!("swizzle({}, {}, {}) is no mode of the hardware", s.bits, s.base, s.shift)),
        };
        if let Some(s) = swizzle
            && inner > s.span_bytes()
        {
            return Err(format!(
                "the innermost dimension ({inner} bytes) exceeds the swizzle span ({} bytes)",
                s.span_bytes()
            ));
        }
        Ok(TmaBox { order, strides, swizzle, bytes: dense * elem_bytes })
    }

    /// The byte of the box's element `coords` when the box starts at byte `start`.
    pub fn address(&self, start: u64, elem_bytes: u64, coords: &[u64]) -> u64 {
        let linear = start + coords.iter().zip(&self.strides).map(|(c, s)| c * s).sum::<u64>() * elem_bytes;
        self.swizzle.map_or(linear, |s| s.apply(linear))
    }

    /// Whether the dense box is where the layout has the elements: `window` is the tile's window in `layout`.
    pub fn agrees(&self, extents: &[u64], window: &[usize], layout: &MemLayout) -> bool {
        // Offsets are sums over dimensions, so it is enough to walk each dimension alone.
        (0..extents.len()).all(|d| {
            let mut coords = vec![0; layout.dims.len()];
            (0..extents[d]).all(|c| {
                coords[window[d]] = c;
                layout.offset(&coords) == c * self.strides[d]
            })
        })
    }
}
