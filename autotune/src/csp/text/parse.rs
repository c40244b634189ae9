//! Parser of the text form, by recursive descent.
//!
//! Invariant: the nesting depth is bounded, so no input exhausts the stack; after an error in a constraint the parser
//! goes on behind the next `;`.

use super::super::model::{Cmp, Domain, Expr, Model, Pred, VarId};
use super::super::number::FACTOR_LIMIT;
use super::super::search::Direction;
use super::lex::{Token, lex};
use einfall_ir::diag::{Diagnostic, Diagnostics, Span};

/// Deepest nesting of brackets and connectives.
const DEPTH: u32 = 100;

/// Longest power.
const EXPONENT: i64 = 1 << 16;

/// Most comparisons one comparison with value lists may stand for.
const ALTERNATIVES: usize = 4096;

/// Lists inside terms are parsed as variables from here on and replaced afterwards.
const FIRST_LIST: u32 = 1 << 31;

/// What a name that is not declared means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// A new variable with the default domain.
    Declare,
    /// An error.
    Known,
}

struct Parser<'s, 'm> {
    tokens: Vec<(Token<'s>, Span)>,
    at: usize,
    depth: u32,
    model: &'m mut Model,
    names: Names,
    lists: Vec<Vec<i64>>,
}

type Parse<T> = Result<T, Box<Diagnostic>>;

/// Reads a model.
///
/// # Errors
/// One diagnostic per constraint that could not be read: E0801 and E0802 for characters and numbers, E0803 for syntax,
/// E0804 for a meaningless declaration, E0805 for nesting beyond 100.
pub fn parse(source: &str) -> Result<Model, Diagnostics> {
    let wrong = |list| Diagnostics::new(list, source);
    let tokens = lex(source).map_err(wrong)?;
    let mut model = Model::new();
    let mut errors = Vec::new();
    let mut p = Parser { tokens, at: 0, depth: 0, model: &mut model, names: Names::Declare, lists: Vec::new() };
    loop {
        while p.eat(";") {}
        if p.peek() == Token::End {
            break;
        }
        if let Err(d) = p.statement() {
            errors.push(*d);
            while !matches!(p.peek(), Token::End | Token::Sign(";")) {
                p.at += 1;
            }
        }
    }
    if errors.is_empty() { Ok(model) } else { Err(wrong(errors)) }
}

/// Reads a term over a model's variables, for a cost.
///
/// # Errors
/// As [`parse`]; E0806 for an unknown variable.
pub fn parse_expr(source: &str, model: &Model) -> Result<Expr, Diagnostics> {
    let wrong = |list| Diagnostics::new(list, source);
    let mut model = model.clone();
    let tokens = lex(source).map_err(wrong)?;
    let mut p = Parser { tokens, at: 0, depth: 0, model: &mut model, names: Names::Known, lists: Vec::new() };
    let e = p.term().map_err(|d| wrong(vec![*d]))?;
    if p.peek() != Token::End {
        return Err(wrong(vec![*p.unexpected("an operator or the end")]));
    }
    if !p.lists.is_empty() {
        let span = Span::new(0, source.len());
        let list = Diagnostic::error("E0803", span, "a cost has no value lists").help("name a variable for it");
        return Err(wrong(vec![list]));
    }
    Ok(e)
}

/// Reads a lexicographic order such as `A:max, B:min, C`; a bare name is minimised.
///
/// # Errors
/// E0803 for syntax, E0806 for an unknown variable.
pub fn parse_order(source: &str, model: &Model) -> Result<Vec<(VarId, Direction)>, Diagnostics> {
    let wrong = |list| Diagnostics::new(list, source);
    let mut out = Vec::new();
    let mut start = 0;
    for item in source.split(',') {
        let span = Span::new(start, start + item.len());
        start += item.len() + 1;
        let (name, way) = item.split_once(':').unwrap_or((item, "min"));
        let direction = match way.trim() {
            "min" => Direction::Min,
            "max" => Direction::Max,
            other => {
                let what = Diagnostic::error("E0803", span, format!("`{other}` is no direction"));
                return Err(wrong(vec![what.help("min or max")]));
            }
        };
        match model.find(name.trim()) {
            Some(v) => out.push((v, direction)),
            None => return Err(wrong(vec![unknown(name.trim(), span)])),
        }
    }
    Ok(out)
}

/// Reads a list of variables such as `A, B`.
///
/// # Errors
/// E0806 for an unknown variable.
pub fn parse_names(source: &str, model: &Model) -> Result<Vec<VarId>, Diagnostics> {
    let wrong = |list| Diagnostics::new(list, source);
    let mut start = 0;
    let mut out = Vec::new();
    for item in source.split(',') {
        let span = Span::new(start, start + item.len());
        start += item.len() + 1;
        out.push(model.find(item.trim()).ok_or_else(|| wrong(vec![unknown(item.trim(), span)]))?);
    }
    Ok(out)
}

fn unknown(name: &str, span: Span) -> Diagnostic {
    Diagnostic::error("E0806", span, format!("there is no variable `{name}`")).help("use a variable of the constraints")
}

impl<'s> Parser<'s, '_> {
    fn peek(&self) -> Token<'s> {
        self.tokens[self.at].0
    }

    fn peek_after(&self, n: usize) -> Token<'s> {
        self.tokens.get(self.at + n).map_or(Token::End, |t| t.0)
    }

    fn span(&self) -> Span {
        self.tokens[self.at].1
    }

    /// The span of the last token taken.
    fn last(&self) -> Span {
        self.tokens[self.at.saturating_sub(1)].1
    }

    fn eat(&mut self, sign: &str) -> bool {
        let found = self.peek() == Token::Sign(sign_of(sign));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: &'static str) -> Parse<()> {
        if self.eat(sign) { Ok(()) } else { Err(self.unexpected(&format!("`{sign}`"))) }
    }

    fn word(&mut self, word: &str) -> bool {
        let found = self.peek() == Token::Name(word);
        self.at += usize::from(found);
        found
    }

    fn unexpected(&self, wanted: &str) -> Box<Diagnostic> {
        let found = match self.peek() {
            Token::Name(n) => format!("`{n}`"),
            Token::Number(n) => format!("`{n}`"),
            Token::Sign(s) => format!("`{s}`"),
            Token::End => "the end".to_owned(),
        };
        let mut d = Diagnostic::error("E0803", self.span(), format!("expected {wanted}, found {found}"));
        if self.at > 0 && matches!(self.peek(), Token::Name(_) | Token::Number(_) | Token::End) {
            d = d.help("constraints are separated by `;`");
        }
        Box::new(d)
    }

    fn deeper<T>(&mut self, f: impl FnOnce(&mut Self) -> Parse<T>) -> Parse<T> {
        self.depth += 1;
        let out = if self.depth > DEPTH {
            Err(Box::new(
                Diagnostic::error("E0805", self.span(), format!("nested more than {DEPTH} deep"))
                    .help("name parts of it as variables"),
            ))
        } else {
            f(self)
        };
        self.depth -= 1;
        out
    }

    fn statement(&mut self) -> Parse<()> {
        if self.peek() == Token::Name("var") && matches!(self.peek_after(1), Token::Name(_)) {
            return self.declaration();
        }
        let mut name = format!("c{}", self.model.constraints().len() + 1);
        if let (Token::Name(n), Token::Sign(":")) = (self.peek(), self.peek_after(1)) {
            if self.model.constraints().iter().any(|c| c.name == n) {
                let message = format!("a constraint `{n}` exists already");
                return Err(Box::new(Diagnostic::error("E0804", self.span(), message).help("choose another name")));
            }
            name = n.to_owned();
            self.at += 2;
        }
        let start = self.span();
        let pred = self.pred()?;
        let span = start.to(self.last());
        if !matches!(self.peek(), Token::End | Token::Sign(";")) {
            return Err(self.unexpected("`;`, `|`, `&` or an operator"));
        }
        self.model.constrain_at(name, pred, span);
        Ok(())
    }

    fn declaration(&mut self) -> Parse<()> {
        self.at += 1;
        let mut names = Vec::new();
        loop {
            match self.peek() {
                Token::Name(n) => names.push(n),
                _ => return Err(self.unexpected("a variable's name")),
            }
            self.at += 1;
            if !self.eat(",") {
                break;
            }
        }
        if !self.word("in") {
            return Err(self.unexpected("`in` and a domain"));
        }
        let start = self.span();
        let domain = self.domain()?;
        let meaningless = match &domain {
            Domain::Range { lo, hi, step } if *step < 1 || lo > hi => Some("the range is empty"),
            Domain::Values(v) if v.is_empty() => Some("the domain is empty"),
            Domain::Divisors(n) if !(1..=FACTOR_LIMIT).contains(n) => Some("divisors are listed for 1 to 2^40"),
            Domain::Range { .. } | Domain::Values(_) | Domain::Divisors(_) => None,
        };
        if let Some(message) = meaningless {
            let span = start.to(self.last());
            return Err(Box::new(Diagnostic::error("E0804", span, message).help("write lo..hi with lo <= hi")));
        }
        for n in names {
            self.model.var(n, domain.clone());
        }
        if !matches!(self.peek(), Token::End | Token::Sign(";")) {
            return Err(self.unexpected("`;`"));
        }
        Ok(())
    }

    fn domain(&mut self) -> Parse<Domain> {
        if self.word("divisors") {
            self.expect("(")?;
            let n = self.integer()?;
            self.expect(")")?;
            return Ok(Domain::Divisors(n));
        }
        if matches!(self.peek(), Token::Sign("{") | Token::Sign("[")) {
            return Ok(Domain::Values(self.list()?));
        }
        let lo = self.integer()?;
        self.expect("..")?;
        let hi = self.integer()?;
        let step = if self.word("step") { self.integer()? } else { 1 };
        Ok(Domain::Range { lo, hi, step })
    }

    /// `n`, `-n` or `n^m`.
    fn integer(&mut self) -> Parse<i64> {
        let negative = self.eat("-");
        let Token::Number(n) = self.peek() else { return Err(self.unexpected("a number")) };
        let start = self.span();
        self.at += 1;
        let mut value = i128::from(n);
        if self.eat("^") {
            let Token::Number(m) = self.peek() else { return Err(self.unexpected("a number")) };
            self.at += 1;
            value = super::super::number::pow(value, m.min(EXPONENT) as u32);
        }
        match i64::try_from(value) {
            Ok(v) if v < super::super::number::LIMIT => Ok(if negative { -v } else { v }),
            _ => Err(Box::new(Diagnostic::error("E0802", start.to(self.last()), "the number is too large"))),
        }
    }

    /// `[1, 2]` or `{1, 2}`.
    fn list(&mut self) -> Parse<Vec<i64>> {
        let close = if self.eat("[") {
            "]"
        } else {
            self.expect("{")?;
            "}"
        };
        let mut out = vec![self.integer()?];
        while self.eat(",") {
            out.push(self.integer()?);
        }
        self.expect(close)?;
        Ok(out)
    }

    // Conditions, loosest first.

    fn pred(&mut self) -> Parse<Pred> {
        self.deeper(|p| {
            let left = p.or()?;
            if p.eat("->") || p.eat("=>") {
                let right = p.pred()?;
                return Ok(Pred::Implies(Box::new(left), Box::new(right)));
            }
            if p.eat("<->") || p.eat("<=>") {
                let right = p.pred()?;
                return Ok(Pred::Iff(Box::new(left), Box::new(right)));
            }
            Ok(left)
        })
    }

    fn or(&mut self) -> Parse<Pred> {
        let first = self.and()?;
        let mut all = vec![first];
        while self.eat("|") || self.eat("||") {
            // A bar may end the alternatives, as in ConstrINT.
            if matches!(self.peek(), Token::Sign(";" | ")") | Token::End) {
                break;
            }
            all.push(self.and()?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Pred::Or(all) })
    }

    fn and(&mut self) -> Parse<Pred> {
        let mut all = vec![self.unary()?];
        while self.eat("&") || self.eat("&&") {
            all.push(self.unary()?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Pred::And(all) })
    }

    fn unary(&mut self) -> Parse<Pred> {
        if self.eat("!") || self.word("not") {
            return self.deeper(|p| Ok(Pred::Not(Box::new(p.unary()?))));
        }
        for (word, value) in [("true", true), ("false", false)] {
            if self.word(word) {
                return Ok(Pred::Bool(value));
            }
        }
        if self.peek() == Token::Sign("(") {
            // A bracket opens a condition or a term: what follows its end decides.
            let (at, lists) = (self.at, self.lists.len());
            self.at += 1;
            let inner = self.pred();
            let closed = inner.is_ok() && self.eat(")");
            if let (Ok(p), true, false) = (&inner, closed, self.at_operator()) {
                return Ok(p.clone());
            }
            let reached = self.at;
            self.at = at;
            self.lists.truncate(lists);
            return self.relation().map_err(|d| match inner {
                Err(other) if other.primary.0.start > d.primary.0.start && reached > at => other,
                _ => d,
            });
        }
        self.relation()
    }

    /// Whether the next token continues a term or comparison.
    fn at_operator(&self) -> bool {
        matches!(
            self.peek(),
            Token::Sign("+" | "-" | "*" | "/" | "%" | "^" | "==" | "!=" | "<=" | ">=" | "<" | ">") | Token::Name("in")
        )
    }

    fn relation(&mut self) -> Parse<Pred> {
        let first_list = self.lists.len();
        let start = self.span();
        let pred = self.bare_relation()?;
        let lists = self.lists.split_off(first_list);
        if lists.is_empty() {
            return Ok(pred);
        }
        // `x == [values]` is membership; any other list stands for a choice of its values.
        let is_list = |e: &Expr| matches!(e, Expr::Var(v) if v.0 >= FIRST_LIST);
        if let Pred::Compare(Cmp::Eq, a, b) = &pred
            && lists.len() == 1
            && (is_list(a) || is_list(b))
        {
            let other = if is_list(a) { b } else { a };
            return Ok(other.clone().one_of(&lists[0]));
        }
        if lists.iter().map(Vec::len).fold(1usize, usize::saturating_mul) > ALTERNATIVES {
            let span = start.to(self.last());
            let message = format!("the lists stand for more than {ALTERNATIVES} alternatives");
            return Err(Box::new(Diagnostic::error("E0804", span, message).help("declare a variable for each list")));
        }
        let mut out = vec![pred];
        for (i, list) in lists.iter().enumerate() {
            let id = FIRST_LIST + (first_list + i) as u32;
            out = out.iter().flat_map(|p| list.iter().map(move |v| replace_pred(p, VarId(id), *v))).collect();
        }
        Ok(if out.len() == 1 { out.remove(0) } else { Pred::Or(out) })
    }

    fn bare_relation(&mut self) -> Parse<Pred> {
        if self.peek() == Token::Name("table") && self.peek_after(1) == Token::Sign("(") {
            return self.table();
        }
        let a = self.term()?;
        if self.word("in") {
            return Ok(a.one_of(&self.list()?));
        }
        if self.eat("%") {
            let b = self.term()?;
            let negated = if self.eat("!=") {
                true
            } else {
                self.expect("==")?;
                false
            };
            if self.peek() != Token::Number(0) {
                return Err(Box::new(
                    Diagnostic::error("E0803", self.span(), "`%` compares with 0 only")
                        .help("write `A % B == 0` or `A % B != 0`"),
                ));
            }
            self.at += 1;
            let divides = a.multiple_of(b);
            // A remainder that does not exist is neither zero nor not zero; `!=` asks for a divisor.
            return Ok(if negated { divides.negate() } else { divides });
        }
        let (cmp, swap) = match self.peek() {
            Token::Sign("==") => (Cmp::Eq, false),
            Token::Sign("!=") => (Cmp::Ne, false),
            Token::Sign("<=") => (Cmp::Le, false),
            Token::Sign("<") => (Cmp::Lt, false),
            Token::Sign(">=") => (Cmp::Le, true),
            Token::Sign(">") => (Cmp::Lt, true),
            _ => return Err(self.unexpected("a comparison")),
        };
        self.at += 1;
        let b = self.term()?;
        if matches!(self.peek(), Token::Sign("==" | "!=" | "<=" | "<" | ">=" | ">" | "%")) {
            return Err(Box::new(
                Diagnostic::error("E0803", self.span(), "comparisons do not chain").help("join two of them by `&`"),
            ));
        }
        Ok(if swap { Pred::Compare(cmp, b, a) } else { Pred::Compare(cmp, a, b) })
    }

    fn table(&mut self) -> Parse<Pred> {
        self.at += 1;
        let columns = self.arguments()?;
        if !self.word("in") {
            return Err(self.unexpected("`in` and rows"));
        }
        self.expect("{")?;
        let mut rows = Vec::new();
        loop {
            let start = self.span();
            self.expect("(")?;
            let mut row = vec![self.integer()?];
            while self.eat(",") {
                row.push(self.integer()?);
            }
            self.expect(")")?;
            if row.len() != columns.len() {
                let message = format!("the row has {} values for {} columns", row.len(), columns.len());
                return Err(Box::new(Diagnostic::error("E0804", start.to(self.last()), message)));
            }
            rows.push(row);
            if !self.eat(",") {
                break;
            }
        }
        self.expect("}")?;
        Ok(Pred::Table(columns, rows))
    }

    // Terms, loosest first.

    fn arguments(&mut self) -> Parse<Vec<Expr>> {
        self.expect("(")?;
        let mut out = vec![self.term()?];
        while self.eat(",") {
            out.push(self.term()?);
        }
        self.expect(")")?;
        Ok(out)
    }

    fn term(&mut self) -> Parse<Expr> {
        self.deeper(|p| {
            let mut all = vec![p.product()?];
            loop {
                if p.eat("+") {
                    all.push(p.product()?);
                } else if p.eat("-") {
                    all.push(Expr::Neg(Box::new(p.product()?)));
                } else {
                    return Ok(if all.len() == 1 { all.remove(0) } else { Expr::Sum(all) });
                }
            }
        })
    }

    fn product(&mut self) -> Parse<Expr> {
        let mut all = vec![self.signed()?];
        loop {
            if self.eat("*") {
                all.push(self.signed()?);
            } else if self.eat("/") {
                let dividend = if all.len() == 1 { all.remove(0) } else { Expr::Product(std::mem::take(&mut all)) };
                let divisor = self.signed()?;
                all = vec![dividend / divisor];
            } else {
                return Ok(if all.len() == 1 { all.remove(0) } else { Expr::Product(all) });
            }
        }
    }

    fn signed(&mut self) -> Parse<Expr> {
        if self.eat("-") {
            return self.deeper(|p| {
                Ok(match p.signed()? {
                    Expr::Const(c) => Expr::Const(-c),
                    e => Expr::Neg(Box::new(e)),
                })
            });
        }
        let base = self.atom()?;
        if self.eat("^") {
            return match self.peek() {
                Token::Number(n) if n <= EXPONENT => {
                    self.at += 1;
                    Ok(base.pow(n as u32))
                }
                _ => Err(self.unexpected("a number up to 65536 as the exponent")),
            };
        }
        Ok(base)
    }

    fn atom(&mut self) -> Parse<Expr> {
        let span = self.span();
        match self.peek() {
            Token::Number(n) => {
                self.at += 1;
                Ok(Expr::Const(n))
            }
            Token::Sign("(") => {
                self.at += 1;
                let e = self.term()?;
                self.expect(")")?;
                Ok(e)
            }
            Token::Sign("[") => {
                let list = self.list()?;
                self.lists.push(list);
                Ok(Expr::Var(VarId(FIRST_LIST + self.lists.len() as u32 - 1)))
            }
            Token::Name(name) => {
                self.at += 1;
                if self.peek() == Token::Sign("(") {
                    return self.call(name, span);
                }
                match (self.model.find(name), self.names) {
                    (Some(v), _) => Ok(Expr::Var(v)),
                    (None, Names::Declare) => Ok(Expr::Var(self.model.var(name, Domain::DEFAULT))),
                    (None, Names::Known) => Err(Box::new(unknown(name, span))),
                }
            }
            Token::Sign(_) | Token::End => Err(self.unexpected("a variable, a number or a list")),
        }
    }

    fn call(&mut self, name: &str, span: Span) -> Parse<Expr> {
        let args = self.arguments()?;
        let wrong = |n: &str| Box::new(Diagnostic::error("E0803", span, format!("`{name}` takes {n}")));
        match name {
            "min" => Ok(Expr::Min(args)),
            "max" => Ok(Expr::Max(args)),
            "ceildiv" | "floordiv" => match <[Expr; 2]>::try_from(args) {
                Ok([a, b]) if name == "ceildiv" => Ok(a.ceil_div(b)),
                Ok([a, b]) => Ok(a / b),
                Err(_) => Err(wrong("two terms")),
            },
            _ => Err(Box::new(
                Diagnostic::error("E0803", span, format!("there is no function `{name}`"))
                    .help("min, max, ceildiv, floordiv; products need a `*`"),
            )),
        }
    }
}

/// The static spelling of a sign.
fn sign_of(sign: &str) -> &'static str {
    const ALL: [&str; 31] = [
        "<->", "<=>", "..", "==", "!=", "<=", ">=", "->", "=>", "||", "&&", "<", ">", "|", "&", "!", "+", "-", "*",
        "/", "%", "^", "(", ")", "[", "]", "{", "}", ",", ";", ":",
    ];
    ALL.iter().find(|s| **s == sign).copied().unwrap_or("")
}

fn replace(e: &Expr, var: VarId, value: i64) -> Expr {
    let all = |es: &[Expr]| es.iter().map(|e| replace(e, var, value)).collect();
    let one = |e: &Expr| Box::new(replace(e, var, value));
    match e {
        Expr::Const(c) => Expr::Const(*c),
        Expr::Var(v) if *v == var => Expr::Const(value),
        Expr::Var(v) => Expr::Var(*v),
        Expr::Sum(es) => Expr::Sum(all(es)),
        Expr::Neg(e) => Expr::Neg(one(e)),
        Expr::Product(es) => Expr::Product(all(es)),
        Expr::Quotient(a, b) => Expr::Quotient(one(a), one(b)),
        Expr::CeilDiv(a, b) => Expr::CeilDiv(one(a), one(b)),
        Expr::Power(e, n) => Expr::Power(one(e), *n),
        Expr::Min(es) => Expr::Min(all(es)),
        Expr::Max(es) => Expr::Max(all(es)),
    }
}

/// Replaces a variable in a relation; relations are all a list occurs in.
fn replace_pred(p: &Pred, var: VarId, value: i64) -> Pred {
    let one = |p: &Pred| Box::new(replace_pred(p, var, value));
    match p {
        Pred::Bool(b) => Pred::Bool(*b),
        Pred::Compare(cmp, a, b) => Pred::Compare(*cmp, replace(a, var, value), replace(b, var, value)),
        Pred::Divides { dividend, divisor } => {
            Pred::Divides { dividend: replace(dividend, var, value), divisor: replace(divisor, var, value) }
        }
        Pred::Table(es, rows) => Pred::Table(es.iter().map(|e| replace(e, var, value)).collect(), rows.clone()),
        Pred::Not(p) => Pred::Not(one(p)),
        Pred::And(ps) => Pred::And(ps.iter().map(|p| replace_pred(p, var, value)).collect()),
        Pred::Or(ps) => Pred::Or(ps.iter().map(|p| replace_pred(p, var, value)).collect()),
        Pred::Implies(p, q) => Pred::Implies(one(p), one(q)),
        Pred::Iff(p, q) => Pred::Iff(one(p), one(q)),
    }
}
