//! reduce-products: a contraction that no instruction is asked for is a sum of products.
//!
//! ```text
//! r0 = carry contract(n) a, b
//! →  r0 = carry reduce sum(n) a * b
//! ```
//! For entries of a mapping that give blocks alone: small or odd contractions, batches of vectors, types without an
//! instruction. Invariant: the plan computes the same; the products of a block are held in registers, so that blocks
//! are small.

use einfall_ir::ops::{BinaryOp, ReduceOp};
use einfall_ir::tile::{Expr, Kernel, Node, Op};

/// Applies the pass.
pub(super) fn run(kernel: &Kernel) -> Kernel {
    let mut k = kernel.clone();
    let mut body = std::mem::take(&mut k.body);
    nodes(&mut k, &mut body);
    k.body = body;
    k
}

fn nodes(k: &mut Kernel, body: &mut [Node]) {
    for node in body {
        match node {
            Node::Stream(s) => nodes(k, &mut s.body),
            Node::Op(op) => {
                if let Op::Contract { out, a, b, over, carry } = op {
                    let (x, y) = (k.exprs.push(Expr::Tile(*a)), k.exprs.push(Expr::Tile(*b)));
                    let value = k.exprs.push(Expr::Binary(BinaryOp::Mul, x, y));
                    let over = std::mem::take(over);
                    *op = Op::Reduce { out: vec![*out], op: ReduceOp::Sum, value, over, carry: *carry };
                }
            }
        }
    }
}
