//! A machine for WGSL on naga's IR: the invocations of a workgroup in lockstep, each operation for all of them.
//!
//! What devices may do differently is an error: an access outside an array, a barrier that not all invocations reach, and
//! two invocations that touch the same word between two meetings while one of them writes it. Invariant: where a shader
//! runs without an error, its result does not depend on the order of invocations. A value of f16 is kept as the f32 it is, and
//! in memory as a word of its own. Source: W3C, "WebGPU Shading Language",
//! "Memory model", "Uniformity".

mod matrix;
mod ops;

use std::collections::BTreeSet;
use std::rc::Rc;

use naga::{
    AddressSpace, ArraySize, AtomicFunction, Barrier, Binding, Block, BuiltIn, Expression, Function, GatherMode,
    Handle, Module, ScalarKind, Statement, Type, TypeInner,
};

/// The same value for every invocation's own: bits by invocation, then component.
#[derive(Clone)]
pub struct Data {
    pub kind: ScalarKind,
    /// Components.
    pub n: usize,
    pub bits: Vec<u32>,
}

/// A place for every invocation.
#[derive(Clone)]
struct Pointer {
    /// A global variable, or else a local one.
    global: bool,
    variable: usize,
    /// Words from the variable's start.
    at: Vec<usize>,
    /// What is there; none: one component of a vector.
    ty: Option<Handle<Type>>,
    kind: ScalarKind,
}

#[derive(Clone)]
enum Value {
    Data(Rc<Data>),
    Pointer(Rc<Pointer>),
}

/// Who touched a word last, and when: workgroup, meetings passed.
#[derive(Clone, Copy, Default, PartialEq)]
struct Stamp {
    group: u32,
    meeting: u32,
    /// Plus one; 0: nobody, `u32::MAX`: several.
    who: u32,
    atomic: bool,
}

/// One global variable.
#[derive(Clone)]
struct Memory {
    name: String,
    space: AddressSpace,
    words: Vec<u32>,
    written: Vec<Stamp>,
    read: Vec<Stamp>,
}

struct Frame<'f> {
    function: &'f Function,
    arguments: Vec<Value>,
    locals: Vec<Vec<u32>>,
    cache: Vec<Option<Value>>,
    /// Why an invocation runs no further: 0 it does, else one of `RETURNED`, `BROKE`, `CONTINUED`.
    left: Vec<u8>,
    result: Option<Data>,
}

const RETURNED: u8 = 1;
const BROKE: u8 = 2;
const CONTINUED: u8 = 3;

/// What went wrong, a sentence.
type Res<T> = Result<T, String>;

/// One workgroup.
pub struct Machine<'m> {
    module: &'m Module,
    lanes: usize,
    /// Invocations of a subgroup.
    subgroup: usize,
    group: u32,
    meetings: [u32; 2],
    memory: Vec<Memory>,
    /// Barriers of workgroup memory that were reached, each by its place in the module.
    pub barriers: BTreeSet<usize>,
    /// One that is taken out, with the barrier of storage that stands behind it.
    pub without: Option<usize>,
}

impl<'m> Machine<'m> {
    /// A module with the words of its bindings, 0 the uniform buffer.
    pub fn new(module: &'m Module, bindings: &[Vec<u32>], subgroup: usize) -> Machine<'m> {
        let memory = module.global_variables.iter().map(|(_, g)| {
            let words = match &g.binding {
                Some(b) if halves(module, g.ty) => unpacked(&bindings[b.binding as usize]),
                Some(b) => bindings[b.binding as usize].clone(),
                None => match g.init.map(|h| &module.global_expressions[h]) {
                    Some(Expression::Literal(l)) => vec![ops::literal(l).expect("a literal of 32 bits").1],
                    _ => vec![0; words(module, g.ty)],
                },
            };
            let stamps = vec![Stamp::default(); words.len()];
            let name = g.name.clone().unwrap_or_default();
            Memory { name, space: g.space, words, written: stamps.clone(), read: stamps }
        });
        let lanes = module.entry_points[0].workgroup_size.iter().product::<u32>() as usize;
        let memory = memory.collect();
        Machine {
            module,
            lanes,
            subgroup,
            group: 0,
            meetings: [0; 2],
            memory,
            barriers: BTreeSet::new(),
            without: None,
        }
    }

    /// The words of a binding.
    pub fn binding(&self, n: u32) -> Vec<u32> {
        let of = self.module.global_variables.iter().zip(&self.memory);
        let mut found = of.filter(|((_, g), _)| g.binding.is_some_and(|b| b.binding == n));
        match found.next() {
            Some(((_, g), m)) if halves(self.module, g.ty) => packed(&m.words),
            Some((_, m)) => m.words.clone(),
            None => Vec::new(),
        }
    }

    /// Bytes of a word of a global variable.
    fn bytes(&self, variable: usize) -> usize {
        let ty = self.module.global_variables.iter().nth(variable).map(|(_, g)| g.ty);
        if ty.is_some_and(|ty| halves(self.module, ty)) { 2 } else { 4 }
    }

    /// Runs the entry for workgroup number `group` of a grid of `groups` along x and y, x fastest.
    pub fn run(&mut self, group: u32, groups: [u32; 2]) -> Res<()> {
        let module = self.module;
        let entry = &module.entry_points[0].function;
        self.group = group + 1;
        for m in self.memory.iter_mut().filter(|m| m.space == AddressSpace::WorkGroup) {
            // Kernels write what they read: what was there before is not a number.
            m.words.fill(0xFFFF_FFFF);
        }
        let mut arguments = Vec::new();
        for a in &entry.arguments {
            let Some(Binding::BuiltIn(built_in)) = a.binding else {
                return Err("an argument that is no built-in".into());
            };
            let of = |f: &dyn Fn(usize) -> Vec<u32>, n| {
                let bits = (0..self.lanes).flat_map(f).collect();
                Value::Data(Rc::new(Data { kind: ScalarKind::Uint, n, bits }))
            };
            arguments.push(match built_in {
                BuiltIn::WorkGroupId => of(&|_| vec![group % groups[0], group / groups[0], 0], 3),
                BuiltIn::NumWorkGroups => of(&|_| vec![groups[0], groups[1], 1], 3),
                BuiltIn::LocalInvocationIndex => of(&|i| vec![i as u32], 1),
                other => return Err(format!("the built-in {other:?}")),
            });
        }
        let all = vec![true; self.lanes];
        self.call(entry, arguments, &all).map(|_| ())
    }

    fn call(&mut self, function: &'m Function, arguments: Vec<Value>, mask: &[bool]) -> Res<Option<Data>> {
        let of = |ty: Handle<Type>| vec![0; self.lanes * words(self.module, ty)];
        let mut frame = Frame {
            function,
            arguments,
            locals: function.local_variables.iter().map(|(_, l)| of(l.ty)).collect(),
            cache: vec![None; function.expressions.len()],
            left: vec![0; self.lanes],
            result: None,
        };
        for (h, l) in function.local_variables.iter() {
            if let Some(init) = l.init {
                frame.locals[h.index()] = self.data(&mut frame, init, mask)?.bits.clone();
            }
        }
        self.block(&mut frame, &function.body, mask)?;
        Ok(frame.result)
    }

    fn block(&mut self, f: &mut Frame<'m>, block: &'m Block, mask: &[bool]) -> Res<()> {
        let mut out = false;
        for s in block {
            let on: Vec<bool> = mask.iter().zip(&f.left).map(|(m, l)| *m && *l == 0).collect();
            if !on.contains(&true) {
                return Ok(());
            }
            if let Statement::ControlBarrier(flags) = s {
                let place = std::ptr::from_ref(s) as usize;
                let workgroup = flags.contains(Barrier::WORK_GROUP);
                out = if workgroup { self.without == Some(place) } else { out };
                if out {
                    continue;
                }
                if workgroup {
                    self.barriers.insert(place);
                }
            }
            out = false;
            self.statement(f, s, &on)?;
        }
        Ok(())
    }

    fn statement(&mut self, f: &mut Frame<'m>, s: &'m Statement, on: &[bool]) -> Res<()> {
        let leave = |f: &mut Frame, why: u8| (0..on.len()).filter(|i| on[*i]).for_each(|i| f.left[i] = why);
        match s {
            Statement::Emit(range) => {
                for h in range.clone() {
                    let v = self.compute(f, h, on)?;
                    f.cache[h.index()] = Some(v);
                }
            }
            Statement::Block(b) => self.block(f, b, on)?,
            Statement::If { condition, accept, reject } => {
                let c = self.data(f, *condition, on)?;
                for (block, wanted) in [(accept, true), (reject, false)] {
                    let taken: Vec<bool> = on.iter().zip(&c.bits).map(|(o, c)| *o && (*c != 0) == wanted).collect();
                    self.block(f, block, &taken)?;
                }
            }
            Statement::Loop { body, continuing, break_if } => {
                let mut live = on.to_vec();
                while live.contains(&true) {
                    self.block(f, body, &live)?;
                    resume(f, &live, CONTINUED);
                    self.block(f, continuing, &live)?;
                    if let Some(h) = break_if {
                        let c = self.data(f, *h, &live)?;
                        let done = |i: &usize| live[*i] && f.left[*i] == 0 && c.bits[*i] != 0;
                        for i in (0..live.len()).filter(done).collect::<Vec<_>>() {
                            f.left[i] = BROKE;
                        }
                    }
                    (0..live.len()).for_each(|i| live[i] &= f.left[i] == 0);
                }
                resume(f, on, BROKE);
            }
            Statement::Break => leave(f, BROKE),
            Statement::Continue => leave(f, CONTINUED),
            Statement::Return { value } => {
                if let Some(h) = value {
                    let v = self.data(f, *h, on)?;
                    let result = f.result.get_or_insert_with(|| Data::clone(&v));
                    for i in (0..on.len()).filter(|i| on[*i]) {
                        result.bits[i * v.n..][..v.n].copy_from_slice(&v.bits[i * v.n..][..v.n]);
                    }
                }
                leave(f, RETURNED);
            }
            Statement::ControlBarrier(flags) => {
                if on.contains(&false) {
                    return Err("a barrier that not all invocations reach".into());
                }
                self.meetings[0] += u32::from(flags.contains(Barrier::WORK_GROUP));
                self.meetings[1] += u32::from(flags.contains(Barrier::STORAGE));
            }
            Statement::Store { pointer, value } => {
                let v = self.data(f, *value, on)?;
                let p = self.pointer(f, *pointer, on)?;
                for i in (0..on.len()).filter(|i| on[*i]) {
                    for c in 0..v.n {
                        self.write(f, &p, i, c, v.bits[i * v.n + c])?;
                    }
                }
            }
            Statement::Atomic { pointer, fun, value, result } => {
                let (p, v) = (self.pointer(f, *pointer, on)?, self.data(f, *value, on)?);
                let compared = match fun {
                    AtomicFunction::Exchange { compare: Some(c) } => Some(self.data(f, *c, on)?),
                    _ => None,
                };
                // What was there, and of what is compared whether it is exchanged.
                let n = 1 + usize::from(compared.is_some());
                let mut before = Data { kind: p.kind, n, bits: vec![0; n * self.lanes] };
                for i in (0..on.len()).filter(|i| on[*i]) {
                    // The order of additions and of bits does not count; that of exchanges does.
                    let old = self.touch(p.variable, p.at[i], i, true, compared.is_none())?;
                    before.bits[i * n] = *old;
                    *old = match (fun, &compared) {
                        (_, Some(c)) if *old == c.bits[i] => v.bits[i],
                        (_, Some(_)) => *old,
                        (AtomicFunction::And, None) => *old & v.bits[i],
                        (AtomicFunction::InclusiveOr, None) => *old | v.bits[i],
                        (AtomicFunction::Add, None) => old.wrapping_add(v.bits[i]),
                        (other, None) => return Err(format!("the atomic {other:?}")),
                    };
                    if let Some(c) = &compared {
                        before.bits[i * n + 1] = u32::from(before.bits[i * n] == c.bits[i]);
                    }
                }
                if let Some(h) = result {
                    f.cache[h.index()] = Some(Value::Data(Rc::new(before)));
                }
            }
            Statement::Call { function, arguments, result } => {
                let mut values = Vec::new();
                for a in arguments {
                    values.push(self.value(f, *a, on)?);
                }
                let module = self.module;
                let made = self.call(&module.functions[*function], values, on)?;
                if let (Some(h), Some(v)) = (result, made) {
                    f.cache[h.index()] = Some(Value::Data(Rc::new(v)));
                }
            }
            Statement::CooperativeStore { target, data } => self.store_matrix(f, *target, data, on)?,
            Statement::SubgroupGather { mode: GatherMode::ShuffleXor(by), argument, result } => {
                let (by, x) = (self.data(f, *by, on)?, self.data(f, *argument, on)?);
                let mut bits = x.bits.clone();
                for i in (0..on.len()).filter(|i| on[*i]) {
                    let other = i ^ by.bits[i] as usize;
                    if other / self.subgroup != i / self.subgroup || !on[other] {
                        return Err(
                            "a shuffle with an invocation outside the subgroup, or one that does not take part".into(),
                        );
                    }
                    bits[i] = x.bits[other];
                }
                f.cache[result.index()] = Some(Value::Data(Rc::new(Data { kind: x.kind, n: x.n, bits })));
            }
            other => return Err(format!("the statement {other:?}")),
        }
        Ok(())
    }

    fn data(&mut self, f: &mut Frame<'m>, h: Handle<Expression>, on: &[bool]) -> Res<Rc<Data>> {
        match self.value(f, h, on)? {
            Value::Data(d) => Ok(d),
            Value::Pointer(_) => Err("a pointer as a value".into()),
        }
    }

    fn pointer(&mut self, f: &mut Frame<'m>, h: Handle<Expression>, on: &[bool]) -> Res<Rc<Pointer>> {
        match self.value(f, h, on)? {
            Value::Pointer(p) => Ok(p),
            Value::Data(_) => Err("a value as a pointer".into()),
        }
    }

    fn value(&mut self, f: &mut Frame<'m>, h: Handle<Expression>, on: &[bool]) -> Res<Value> {
        if let Some(v) = &f.cache[h.index()] {
            return Ok(v.clone());
        }
        // Constants, arguments and variables: nothing that changes.
        let v = self.compute(f, h, on)?;
        f.cache[h.index()] = Some(v.clone());
        Ok(v)
    }

    fn compute(&mut self, f: &mut Frame<'m>, h: Handle<Expression>, on: &[bool]) -> Res<Value> {
        let all = |kind, bits: u32| Data { kind, n: 1, bits: vec![bits; on.len()] };
        let function = f.function;
        Ok(Value::Data(Rc::new(match &function.expressions[h] {
            Expression::Literal(l) => {
                let (kind, bits) = ops::literal(l)?;
                all(kind, bits)
            }
            Expression::Constant(c) => {
                let init = self.module.constants[*c].init;
                let Expression::Literal(l) = &self.module.global_expressions[init] else {
                    return Err("a constant that is no literal".into());
                };
                let (kind, bits) = ops::literal(l)?;
                all(kind, bits)
            }
            Expression::ZeroValue(ty) => {
                let (kind, n) = shape(self.module, *ty)?;
                Data { kind, n, bits: vec![0; n * on.len()] }
            }
            Expression::FunctionArgument(i) => return Ok(f.arguments[*i as usize].clone()),
            Expression::GlobalVariable(g) => {
                let ty = self.module.global_variables[*g].ty;
                return Ok(self.place(true, g.index(), ty));
            }
            Expression::LocalVariable(l) => {
                let ty = function.local_variables[*l].ty;
                return Ok(self.place(false, l.index(), ty));
            }
            Expression::Access { base, index } => {
                let index = self.data(f, *index, on)?;
                match &self.value(f, *base, on)? {
                    Value::Pointer(p) => return self.inside(p, |i| index.bits[i] as i32 as i64, on),
                    Value::Data(d) => {
                        let at = |i: usize| if on[i] { i * d.n + index.bits[i] as usize } else { 0 };
                        Data { kind: d.kind, n: 1, bits: (0..on.len()).map(|i| d.bits[at(i)]).collect() }
                    }
                }
            }
            Expression::AccessIndex { base, index } => match &self.value(f, *base, on)? {
                Value::Pointer(p) => return self.inside(p, |_| i64::from(*index), on),
                Value::Data(d) => {
                    let at = |i: usize| d.bits[i * d.n + *index as usize];
                    Data { kind: d.kind, n: 1, bits: (0..on.len()).map(at).collect() }
                }
            },
            Expression::Compose { components, .. } => {
                let parts = components.iter().map(|c| self.data(f, *c, on)).collect::<Res<Vec<_>>>()?;
                let bits =
                    (0..on.len()).flat_map(|i| parts.iter().flat_map(move |p| p.bits[i * p.n..][..p.n].to_vec()));
                Data { kind: parts[0].kind, n: parts.iter().map(|p| p.n).sum(), bits: bits.collect() }
            }
            Expression::Splat { size, value } => {
                let (v, n) = (self.data(f, *value, on)?, *size as usize);
                Data { kind: v.kind, n, bits: v.bits.iter().flat_map(|x| vec![*x; n]).collect() }
            }
            Expression::Load { pointer } => {
                let p = self.pointer(f, *pointer, on)?;
                let (kind, n) = match p.ty {
                    Some(ty) => shape(self.module, ty)?,
                    None => (p.kind, 1),
                };
                let mut bits = vec![0; n * on.len()];
                for i in (0..on.len()).filter(|i| on[*i]) {
                    for c in 0..n {
                        bits[i * n + c] = self.read(f, &p, i, c)?;
                    }
                }
                Data { kind, n, bits }
            }
            Expression::Unary { op, expr } => ops::unary(*op, &*self.data(f, *expr, on)?)?,
            Expression::Binary { op, left, right } => {
                ops::binary(*op, &*self.data(f, *left, on)?, &*self.data(f, *right, on)?)?
            }
            Expression::Select { condition, accept, reject } => {
                let (c, a, b) = (self.data(f, *condition, on)?, self.data(f, *accept, on)?, self.data(f, *reject, on)?);
                let pick = |i: usize| if c.bits[i / a.n * c.n] != 0 { a.bits[i] } else { b.bits[i] };
                Data { kind: a.kind, n: a.n, bits: (0..a.bits.len()).map(pick).collect() }
            }
            Expression::Math { fun, arg, arg1, arg2, .. } => {
                let mut list = vec![self.data(f, *arg, on)?];
                for h in [arg1, arg2].into_iter().flatten() {
                    list.push(self.data(f, *h, on)?);
                }
                ops::math(*fun, &list)?
            }
            Expression::As { expr, kind, convert } => ops::cast(*kind, *convert, &*self.data(f, *expr, on)?)?,
            Expression::CooperativeLoad { columns, rows, data, .. } => {
                self.load_matrix(f, (*columns, *rows), data, on)?
            }
            Expression::CooperativeMultiplyAdd { a, b, c } => {
                let [a, b, c] = [a, b, c].map(|h| self.data(f, *h, on));
                matrix::multiply_add(&*a?, &*b?, &*c?, on)?
            }
            other => return Err(format!("the expression {other:?}")),
        })))
    }

    fn place(&self, global: bool, variable: usize, ty: Handle<Type>) -> Value {
        let kind = shape(self.module, ty).map_or(ScalarKind::Uint, |s| s.0);
        Value::Pointer(Rc::new(Pointer { global, variable, at: vec![0; self.lanes], ty: Some(ty), kind }))
    }

    /// The place of an element, member or component.
    fn inside(&self, p: &Pointer, index: impl Fn(usize) -> i64, on: &[bool]) -> Res<Value> {
        let ty = p.ty.ok_or("an element of a component")?;
        let (step, ty, most) = match &self.module.types[ty].inner {
            TypeInner::Array { base, stride, size } => {
                let most = match size {
                    ArraySize::Constant(n) => i64::from(n.get()),
                    _ => i64::MAX,
                };
                (
                    if halves(self.module, *base) { words(self.module, *base) } else { *stride as usize / 4 },
                    Some(*base),
                    most,
                )
            }
            TypeInner::Struct { members, .. } => {
                let m = members.get(index(0) as usize).ok_or("a member that is not there")?;
                let kind = shape(self.module, m.ty)?.0;
                let at = p.at.iter().map(|a| a + m.offset as usize / 4).collect();
                return Ok(Value::Pointer(Rc::new(Pointer { at, ty: Some(m.ty), kind, ..*p })));
            }
            TypeInner::Vector { size, .. } => (1, None, *size as i64),
            other => return Err(format!("an element of {other:?}")),
        };
        let mut at = p.at.clone();
        for i in (0..on.len()).filter(|i| on[*i]) {
            let n = index(i);
            if n < 0 || n >= most {
                let name = if p.global { self.memory[p.variable].name.as_str() } else { "a local variable" };
                return Err(format!("element {n} of `{name}`, which has {most}"));
            }
            at[i] += n as usize * step;
        }
        let kind = ty.map_or(Ok((p.kind, 1)), |t| shape(self.module, t)).map_or(p.kind, |s| s.0);
        Ok(Value::Pointer(Rc::new(Pointer { at, ty, kind, ..*p })))
    }

    fn read(&mut self, f: &Frame, p: &Pointer, lane: usize, c: usize) -> Res<u32> {
        if p.global {
            return Ok(*self.touch(p.variable, p.at[lane] + c, lane, false, false)?);
        }
        let local = &f.locals[p.variable];
        Ok(local[lane * (local.len() / self.lanes) + p.at[lane] + c])
    }

    fn write(&mut self, f: &mut Frame, p: &Pointer, lane: usize, c: usize, bits: u32) -> Res<()> {
        if p.global {
            *self.touch(p.variable, p.at[lane] + c, lane, true, false)? = bits;
            return Ok(());
        }
        let local = &mut f.locals[p.variable];
        let words = local.len() / self.lanes;
        local[lane * words + p.at[lane] + c] = bits;
        Ok(())
    }

    /// A word of a global variable, where no other invocation may touch it at the same time in another way.
    fn touch(&mut self, variable: usize, at: usize, lane: usize, write: bool, atomic: bool) -> Res<&mut u32> {
        let m = &mut self.memory[variable];
        if at >= m.words.len() {
            return Err(format!("word {at} of `{}`, which has {}", m.name, m.words.len()));
        }
        let storage = matches!(m.space, AddressSpace::Storage { .. });
        if storage || m.space == AddressSpace::WorkGroup {
            let meeting = self.meetings[usize::from(storage)];
            let (group, who) = (self.group, lane as u32 + 1);
            // Workgroups never meet.
            let now =
                |s: &Stamp| s.who != 0 && (s.group != group && storage || s.group == group && s.meeting == meeting);
            let other = |s: &Stamp| now(s) && (s.group != group || s.who != who) && !(s.atomic && atomic);
            if other(&m.written[at]) || write && other(&m.read[at]) {
                let what = if write { "writes" } else { "reads" };
                return Err(format!("invocation {lane} {what} word {at} of `{}` while another touches it", m.name));
            }
            if write {
                m.written[at] = Stamp { group, meeting, who, atomic };
            }
            if !write || atomic {
                let several = now(&m.read[at]) && m.read[at].who != who;
                m.read[at] = Stamp { group, meeting, who: if several { u32::MAX } else { who }, atomic };
            }
        }
        Ok(&mut m.words[at])
    }
}

/// Lets invocations that left for one reason go on.
fn resume(f: &mut Frame, on: &[bool], why: u8) {
    for (left, _) in f.left.iter_mut().zip(on).filter(|(_, on)| **on) {
        if *left == why {
            *left = 0;
        }
    }
}

/// Words of a value of a type.
fn words(module: &Module, ty: Handle<Type>) -> usize {
    match &module.types[ty].inner {
        TypeInner::Vector { size, .. } => *size as usize,
        TypeInner::CooperativeMatrix { columns, rows, .. } => matrix::held(*columns, *rows),
        TypeInner::Array { size: ArraySize::Constant(n), base, .. } if halves(module, *base) => {
            n.get() as usize * words(module, *base)
        }
        TypeInner::Array { size: ArraySize::Constant(n), stride, .. } => n.get() as usize * *stride as usize / 4,
        TypeInner::Struct { span, .. } => *span as usize / 4,
        _ => 1,
    }
}

/// Kind and number of components of a value of a type.
fn shape(module: &Module, ty: Handle<Type>) -> Res<(ScalarKind, usize)> {
    match &module.types[ty].inner {
        TypeInner::Scalar(s) | TypeInner::Atomic(s) => Ok((s.kind, 1)),
        TypeInner::Vector { size, scalar } => Ok((scalar.kind, *size as usize)),
        TypeInner::CooperativeMatrix { columns, rows, scalar, .. } => Ok((scalar.kind, matrix::held(*columns, *rows))),
        other => Err(format!("a value of type {other:?}")),
    }
}

/// Whether what is there is f16.
fn halves(module: &Module, ty: Handle<Type>) -> bool {
    match &module.types[ty].inner {
        TypeInner::Scalar(s) | TypeInner::Vector { scalar: s, .. } => s.width == 2,
        TypeInner::Array { base, .. } => halves(module, *base),
        _ => false,
    }
}

/// Words of two f16 each, as words of one.
fn unpacked(words: &[u32]) -> Vec<u32> {
    let one = |h: u32| half::f16::from_bits(h as u16).to_f32().to_bits();
    words.iter().flat_map(|w| [one(w & 0xFFFF), one(w >> 16)]).collect()
}

/// And back.
fn packed(words: &[u32]) -> Vec<u32> {
    let one = |w: u32| u32::from(half::f16::from_f32(f32::from_bits(w)).to_bits());
    words.chunks(2).map(|p| one(p[0]) | one(p[1]) << 16).collect()
}
