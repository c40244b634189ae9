//! Reads the text of a mapping.
//!
//! ```text
//! mapping = "mapping" PLAN "on" TARGET "{" {kernel} "}"
//! kernel  = "kernel" NAME "{" {line} "}"
//! line    = "axis" AXIS "block" INT ["cluster" INT] ["units" INT] ["register" INT] ["whole"] ["exact"] ["descending"] ["launches"]
//!         | "work" ["order" AXIS {"," AXIS}] ["persistent"] ["group" INT] ["longest_first"]
//!         | "split" AXIS "parts" INT ["resident" INT] "merge" ("last_arriver" | "cluster" | "second_kernel") ["ordered"]
//!         | "early"
//!         | "dependent"
//!         | "role" NAME ":" INT ("thread" | "warp" | "warpgroup") ["regs" INT] ["ping_pong"]
//!         | "tile" TILE "in" space ["stages" INT] ["swizzle" INT] ["contiguous" AXIS] ["by" engine] ["multicast" AXIS]
//!           ["reuses" TILE]
//!         | "op" OP ["atom" ATOM] ["swapped"] ["a" "registers"] ["role" ROLE] ["skew" INT] ["slot" INT] ["by" engine]
//! ```
//! Names of operations and atoms are words joined by `.` and `@`. [`super::verify`] checks them against a plan.

use super::print::{ENGINES, SCOPES};
use super::{AxisMapping, KernelMapping, Mapping, MergeSite, OpMapping, RoleMapping, Source, Split, TileMapping, Work};
use crate::diag::Diagnostic;
use crate::kernel::Engine;
use crate::text::Tok;
use crate::text::cursor::Cursor;
use crate::tile::Space;

type Parsed<T> = Result<T, Diagnostic>;

/// Reads a mapping.
///
/// ```
/// let text = "mapping softmax on cpu {\n    kernel softmax_0 {\n        axis m block 4\n    }\n}\n";
/// let mapping = einfall_ir::mapping::parse::parse(text)?;
/// assert_eq!((mapping.plan.as_str(), mapping.kernels.len()), ("softmax", 1));
/// assert_eq!(mapping.to_string(), text);
/// # Ok::<(), einfall_ir::diag::Diagnostic>(())
/// ```
///
/// # Errors
/// The first syntax error (M0101) or an axis, tile, operation or role mapped twice (M0102).
pub fn parse(text: &str) -> Parsed<Mapping> {
    let mut c = Cursor::new(text, "M0101")?;
    c.skip_lines();
    c.word("mapping")?;
    let plan = c.ident("a plan name")?.0;
    c.word("on")?;
    let target = dotted(&mut c, "a target")?;
    c.sym("{")?;
    c.skip_lines();
    let mut kernels: Vec<KernelMapping> = Vec::new();
    while !c.eat_sym("}") {
        c.word("kernel")?;
        let (name, _) = c.ident("a kernel name")?;
        c.sym("{")?;
        c.skip_lines();
        let mut k = KernelMapping { kernel: name, ..KernelMapping::default() };
        while !c.eat_sym("}") {
            line(&mut c, &mut k)?;
            c.line_end()?;
        }
        kernels.push(k);
        c.line_end()?;
    }
    c.skip_lines();
    if *c.tok() == Tok::End { Ok(Mapping { plan, target, kernels }) } else { Err(c.expected("the end of the text")) }
}

fn once(seen: bool, kind: &str, name: &str, span: crate::diag::Span) -> Parsed<()> {
    if seen {
        return Err(Diagnostic::error("M0102", span, format!("{kind} `{name}` is mapped twice"))
            .help("join the two lines into one"));
    }
    Ok(())
}

/// Words and integers joined by `.`, `@` and `-`.
fn dotted(c: &mut Cursor, what: &str) -> Parsed<String> {
    let mut name = c.ident(what)?.0;
    while let Some(s) = [".", "@", "-"].into_iter().find(|s| c.is_sym(s)) {
        c.advance();
        name += s;
        name += &match c.tok() {
            Tok::Int(n) => {
                let n = n.to_string();
                c.advance();
                n
            }
            Tok::Ident(_) | Tok::Float(_) | Tok::Sym(_) | Tok::Doc(_) | Tok::ModuleDoc(_) | Tok::Newline | Tok::End => {
                c.ident(what)?.0
            }
        };
    }
    Ok(name)
}

fn choice<T: Copy>(c: &mut Cursor, all: &[(T, &str)], what: &str) -> Parsed<T> {
    let found = all.iter().find(|(_, w)| c.is_word(w)).map(|(t, _)| *t);
    let words: Vec<_> = all.iter().map(|(_, w)| format!("`{w}`")).collect();
    match found {
        Some(t) => {
            c.advance();
            Ok(t)
        }
        None => Err(c.expected(what).help(format!("write one of {}", words.join(", ")))),
    }
}

fn engine(c: &mut Cursor) -> Parsed<Option<Engine>> {
    if c.eat_word("by") { choice(c, &ENGINES, "an engine").map(Some) } else { Ok(None) }
}

fn number(c: &mut Cursor, word: &str, default: u64) -> Parsed<u64> {
    if c.eat_word(word) { c.count("an integer") } else { Ok(default) }
}

fn line(c: &mut Cursor, k: &mut KernelMapping) -> Parsed<()> {
    if c.eat_word("axis") {
        let (axis, span) = c.ident("an axis")?;
        once(k.axis(&axis).is_some(), "axis", &axis, span)?;
        c.word("block")?;
        let block = c.count("a block size")?;
        let (cluster, units) = (number(c, "cluster", 1)?, number(c, "units", 1)?);
        k.axes.push(AxisMapping {
            axis,
            block,
            cluster,
            units,
            register: number(c, "register", 0)?,
            whole: c.eat_word("whole"),
            exact: c.eat_word("exact"),
            descending: c.eat_word("descending"),
            launches: c.eat_word("launches"),
        });
    } else if c.eat_word("work") {
        let mut order = Vec::new();
        if c.eat_word("order") {
            order.push(c.ident("an axis")?.0);
            while c.eat_sym(",") {
                order.push(c.ident("an axis")?.0);
            }
        }
        let persistent = c.eat_word("persistent");
        let group = number(c, "group", 0)?;
        k.work = Work { order, persistent, group, longest_first: c.eat_word("longest_first") };
    } else if c.eat_word("split") {
        let axis = c.ident("an axis")?.0;
        c.word("parts")?;
        let parts = c.count("how many parts")?;
        let resident = number(c, "resident", 1)?;
        c.word("merge")?;
        let merge = choice(c, &MergeSite::ALL.map(|m| (m, m.name())), "where parts meet")?;
        k.split = Some(Split { axis, parts, resident, merge, ordered: c.eat_word("ordered") });
    } else if c.eat_word("early") {
        k.early = true;
    } else if c.eat_word("dependent") {
        k.dependent = true;
    } else if c.eat_word("role") {
        let (role, span) = c.ident("a role name")?;
        once(k.roles.iter().any(|r| r.role == role), "role", &role, span)?;
        c.sym(":")?;
        let units = c.count("how many units")?;
        let scope = choice(c, &SCOPES, "a scope")?;
        let regs = if c.eat_word("regs") { Some(c.count("registers per thread")?) } else { None };
        k.roles.push(RoleMapping { role, scope, units, regs, ping_pong: c.eat_word("ping_pong") });
    } else if c.eat_word("tile") {
        let (tile, span) = c.ident("a tile")?;
        once(k.tile(&tile).is_some(), "tile", &tile, span)?;
        c.word("in")?;
        let space = choice(c, &Space::ALL.map(|s| (s, s.name())), "a memory space")?;
        let (stages, swizzle) = (number(c, "stages", 1)?, number(c, "swizzle", 0)?);
        let contiguous = if c.eat_word("contiguous") { Some(c.ident("an axis")?.0) } else { None };
        let engine = engine(c)?;
        let multicast = if c.eat_word("multicast") { Some(c.ident("an axis")?.0) } else { None };
        let reuses = if c.eat_word("reuses") { Some(c.ident("a tile")?.0) } else { None };
        k.tiles.push(TileMapping { tile, space, stages, swizzle, contiguous, engine, multicast, reuses });
    } else if c.eat_word("op") {
        let span = c.span();
        let op = dotted(c, "an operation")?;
        once(k.op(&op).is_some(), "operation", &op, span)?;
        let atom = if c.eat_word("atom") { Some(dotted(c, "an instruction")?) } else { None };
        let swapped = c.eat_word("swapped");
        let mut a = Source::Memory;
        if c.eat_word("a") {
            c.word("registers")?;
            a = Source::Registers;
        }
        let role = if c.eat_word("role") { Some(c.ident("a role")?.0) } else { None };
        let (skew, slot) = (number(c, "skew", 0)?, number(c, "slot", 0)?);
        k.ops.push(OpMapping { op, atom, swapped, a, role, skew, slot, engine: engine(c)? });
    } else {
        return Err(c
            .expected("a line of a mapping")
            .help("write `axis`, `work`, `split`, `early`, `dependent`, `role`, `tile` or `op`"));
    }
    Ok(())
}
