//! An artifact as bytes: for caches, and for programs that carry compiled kernels.
//!
//! The form is [`MAGIC`], [`VERSION`] as four little-endian bytes, then the fields of [`Artifact`] in postcard's wire
//! format (<https://postcard.jamesmunns.com/wire-format>): integers as variable-length numbers, enums by position, lists
//! and texts with their length in front. Places in source texts are left out. A [`Size`] is written in postfix order, so
//! that reading it needs no recursion. Invariants: (1) equal artifacts have equal bytes; (2) whatever the bytes are,
//! reading gives an artifact that [`Artifact::check`] accepts, or an error; (3) the form of a version never changes: a
//! test holds the bytes of one artifact.

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Error as _, Serialize, Serializer};

use super::{Artifact, VERSION};
use crate::arena::{Arena, Id};
use crate::cascade::{RankId, Size};
use crate::dtype::DType;
use crate::ops::{BinaryOp, UnaryOp};

/// What the bytes begin with.
const MAGIC: &[u8; 8] = b"einfall\0";
/// Operators above one another in an extent, at most; those of the library have fewer than ten.
const MAX_DEPTH: usize = 256;

/// Why bytes are no artifact, or an artifact has no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BytesError {
    /// They do not begin as an artifact does.
    Foreign,
    /// Another version of the contract.
    Version {
        /// The version they have; this one is [`VERSION`].
        found: u32,
    },
    /// They end early, go on, or hold what no artifact holds.
    Form(String),
    /// What they hold refers to what is not there.
    Inconsistent(String),
}

impl std::fmt::Display for BytesError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BytesError::Foreign => f.write_str("the bytes are no compiled artifact"),
            BytesError::Version { found } => {
                write!(f, "the artifact is of version {found}, this is version {VERSION}: compile it again")
            }
            BytesError::Form(what) => write!(f, "the bytes of the artifact are damaged: {what}"),
            BytesError::Inconsistent(what) => write!(f, "the artifact contradicts itself: {what}"),
        }
    }
}

impl std::error::Error for BytesError {}

impl Artifact {
    /// The artifact as bytes.
    ///
    /// # Errors
    /// [`BytesError::Form`] for an extent of more than 256 operators above one another.
    pub fn to_bytes(&self) -> Result<Vec<u8>, BytesError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        postcard::to_extend(self, bytes).map_err(form)
    }

    /// Reads an artifact from all of `bytes`.
    ///
    /// # Errors
    /// [`BytesError`]; never a panic, and memory in proportion to the bytes given.
    pub fn from_bytes(bytes: &[u8]) -> Result<Artifact, BytesError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(BytesError::Foreign)?;
        let (version, body) = rest.split_first_chunk::<4>().ok_or(BytesError::Foreign)?;
        let found = u32::from_le_bytes(*version);
        if found != VERSION {
            return Err(BytesError::Version { found });
        }
        let (artifact, left) = postcard::take_from_bytes::<Artifact>(body).map_err(form)?;
        if !left.is_empty() {
            return Err(BytesError::Form(format!("{} bytes are left over", left.len())));
        }
        artifact.check().map_err(BytesError::Inconsistent)?;
        Ok(artifact)
    }
}

fn form(e: postcard::Error) -> BytesError {
    BytesError::Form(e.to_string())
}

impl<I: Id, T: Serialize> Serialize for Arena<I, T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.iter().map(|(_, item)| item))
    }
}

impl<'de, I: Id, T: Deserialize<'de>> Deserialize<'de> for Arena<I, T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut arena = Arena::new();
        for item in Vec::<T>::deserialize(d)? {
            arena.push(item);
        }
        Ok(arena)
    }
}

/// What has names is written by name, so that a table may grow and be sorted.
macro_rules! by_name {
    ($($named:ty: $what:literal),*) => { $(
        impl Serialize for $named {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(self.name())
            }
        }

        impl<'de> Deserialize<'de> for $named {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let name = <&str>::deserialize(d)?;
                <$named>::from_name(name).ok_or_else(|| D::Error::custom(concat!($what, " that is not known")))
            }
        }
    )* };
}
by_name!(DType: "a data type", UnaryOp: "a scalar function", BinaryOp: "a scalar function of two arguments");

/// One step of an extent in postfix order.
#[derive(serde::Serialize, serde::Deserialize)]
enum Term {
    Const(u64),
    Rank(RankId),
    Add,
    Sub,
    Mul,
    Div,
    CeilDiv,
    Min,
    Max,
}

/// Appends a size's terms; false where it is too deep.
fn flatten(size: &Size, depth: usize, terms: &mut Vec<Term>) -> bool {
    let mut two = |a: &Size, b: &Size, term: Term| {
        let fits = depth < MAX_DEPTH && flatten(a, depth + 1, terms) && flatten(b, depth + 1, terms);
        terms.push(term);
        fits
    };
    match size {
        Size::Const(n) => {
            terms.push(Term::Const(*n));
            true
        }
        Size::Rank(r) => {
            terms.push(Term::Rank(*r));
            true
        }
        Size::Add(a, b) => two(a, b, Term::Add),
        Size::Sub(a, b) => two(a, b, Term::Sub),
        Size::Mul(a, b) => two(a, b, Term::Mul),
        Size::Div(a, b) => two(a, b, Term::Div),
        Size::CeilDiv(a, b) => two(a, b, Term::CeilDiv),
        Size::Min(a, b) => two(a, b, Term::Min),
        Size::Max(a, b) => two(a, b, Term::Max),
    }
}

/// The size of terms in postfix order, if they are one.
fn nest(terms: Vec<Term>) -> Option<Size> {
    let mut stack: Vec<(Size, usize)> = Vec::new();
    for term in terms {
        let make: fn(Box<Size>, Box<Size>) -> Size = match term {
            Term::Const(n) => {
                stack.push((Size::Const(n), 0));
                continue;
            }
            Term::Rank(r) => {
                stack.push((Size::Rank(r), 0));
                continue;
            }
            Term::Add => Size::Add,
            Term::Sub => Size::Sub,
            Term::Mul => Size::Mul,
            Term::Div => Size::Div,
            Term::CeilDiv => Size::CeilDiv,
            Term::Min => Size::Min,
            Term::Max => Size::Max,
        };
        let ((b, y), (a, x)) = (stack.pop()?, stack.pop()?);
        let depth = x.max(y) + 1;
        if depth > MAX_DEPTH {
            return None;
        }
        stack.push((make(Box::new(a), Box::new(b)), depth));
    }
    let (size, _) = stack.pop()?;
    stack.is_empty().then_some(size)
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut terms = Vec::new();
        if !flatten(self, 0, &mut terms) {
            return Err(S::Error::custom("an extent is too deep"));
        }
        terms.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        nest(Vec::deserialize(d)?).ok_or_else(|| D::Error::custom("an extent that is no expression"))
    }
}

#[cfg(test)]
mod tests;
