//! The IR to text.

use super::{Cascade, Size};

/// An extent as text.
pub fn size_text(c: &Cascade, s: &Size) -> String {
    fn go(c: &Cascade, s: &Size, power: u8) -> String {
        let (text, own) = match s {
            Size::Const(n) => (n.to_string(), 9),
            Size::Rank(r) => (c.ranks[*r].name.clone(), 9),
            Size::Add(a, b) => (format!("{} + {}", go(c, a, 5), go(c, b, 6)), 5),
            Size::Sub(a, b) => (format!("{} - {}", go(c, a, 5), go(c, b, 6)), 5),
            Size::Mul(a, b) => (format!("{}*{}", go(c, a, 6), go(c, b, 7)), 6),
            Size::Div(a, b) => (format!("{}/{}", go(c, a, 6), go(c, b, 7)), 6),
            Size::Min(a, b) => (format!("min({}, {})", go(c, a, 0), go(c, b, 0)), 9),
            Size::Max(a, b) => (format!("max({}, {})", go(c, a, 0), go(c, b, 0)), 9),
            Size::CeilDiv(a, b) => (format!("ceildiv({}, {})", go(c, a, 0), go(c, b, 0)), 9),
        };
        if own < power { format!("({text})") } else { text }
    }
    go(c, s, 0)
}
