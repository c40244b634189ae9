//! emit PLAN MAPPING -> JSON of the artifact (development only).
use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::pipeline::{Context, Program};
use einfall_codegen::{lower::gpu, tables};
use einfall_ir::arena::Id;
use einfall_ir::artifact::*;
use einfall_ir::cascade::Size;
use std::fmt::Write;
fn sz(s: &Size) -> String {
    match s {
        Size::Const(c) => c.to_string(),
        Size::Rank(r) => format!("R[{}]", r.index()),
        Size::Add(a, b) => format!("({}+{})", sz(a), sz(b)),
        Size::Sub(a, b) => format!("({}-{})", sz(a), sz(b)),
        Size::Mul(a, b) => format!("({}*{})", sz(a), sz(b)),
        Size::Div(a, b) => format!("({}//{})", sz(a), sz(b)),
        Size::CeilDiv(a, b) => format!("(-(-{}//{}))", sz(a), sz(b)),
        Size::Min(a, b) => format!("min({},{})", sz(a), sz(b)),
        Size::Max(a, b) => format!("max({},{})", sz(a), sz(b)),
    }
}
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let text = std::fs::read_to_string(&args[1]).unwrap();
    let mut plan = if args[1].ends_with(".tile") {
        einfall_ir::tile::parse::parse(&text).unwrap()
    } else {
        let mut p =
            Program::Cascade(einfall_ir::cascade::parse(&text).unwrap_or_else(|e| panic!("{e:?}")).cascades.remove(0));
        for pass in tables::TO_TILE {
            p = (pass.step)(p, &Context { atoms: einfall_ir::kernel::atoms::all().collect(), ..Context::default() })
                .unwrap();
        }
        match p {
            Program::Tile(t) => t,
            _ => panic!(),
        }
    };
    let fixed: Vec<&str> = args.get(3).map(|s| s.split(',').collect()).unwrap_or_default();
    for (_, r) in plan.ranks.iter_mut() {
        for f in &fixed {
            let (n, v) = f.split_once('=').unwrap();
            if n == r.name {
                r.fixed = Some(v.parse().unwrap());
            }
        }
    }
    let mapping = if let Some(t) = args[2].strip_prefix("auto:") {
        let sizes: Vec<u64> = t.split(',').filter_map(|x| x.parse().ok()).collect();
        let sheet = einfall_ir::target::DataSheet::named("h100").unwrap();
        let m =
            einfall_autotune::model_gpu::choose(&plan, &sheet, (sizes.len() == plan.ranks.len()).then_some(&sizes[..]));
        eprintln!("{m}");
        m
    } else {
        let m = std::fs::read_to_string(&args[2]).unwrap();
        einfall_ir::mapping::parse::parse(&m).unwrap_or_else(|e| panic!("{e}"))
    };
    let mut p = Program::Tile(plan.clone());
    for pass in tables::GPU {
        let c = Context { mapping: Some(mapping.clone()), ..Context::default() };
        p = (pass.step)(p, &c).unwrap_or_else(|e| panic!("{e:?}"));
        if let Program::Tile(t) = &p {
            plan = t.clone();
        }
    }
    let Program::Kernel(module) = p else { panic!() };
    let _ = gpu::lower;
    let a = print(&plan, &module, &Target::sm_90a()).unwrap_or_else(|e| panic!("{e:?}"));
    let Code::Ptx { text, .. } = &a.code else { panic!() };
    let mut o = String::from("{");
    let list = |v: Vec<String>| format!("[{}]", v.join(","));
    let q = |s: &str| format!("{s:?}");
    write!(o, "\"name\":{},\"ranks\":{},", q(&a.name), list(a.ranks.iter().map(|(_, r)| q(&r.name)).collect()))
        .unwrap();
    write!(
        o,
        "\"buffers\":{},",
        list(
            a.buffers
                .iter()
                .map(|(_, b)| format!(
                    "{{\"name\":{},\"dtype\":{},\"kind\":{},\"dims\":{}}}",
                    q(&b.name),
                    q(b.dtype.name()),
                    q(&format!("{:?}", b.kind)),
                    list(b.dims.iter().map(|d| q(&sz(d))).collect())
                ))
                .collect()
        )
    )
    .unwrap();
    let mut ls = vec![];
    for l in &a.launches {
        let g = l.gpu.as_ref().unwrap();
        let slots = l
            .slots
            .iter()
            .map(|s| match s {
                Slot::Base(b) => format!("[\"base\",{}]", b.index()),
                Slot::Stride(b, d) => format!("[\"stride\",{},{d}]", b.index()),
                Slot::Scalar(b) => format!("[\"scalar\",{}]", b.index()),
                Slot::Extent(r) => format!("[\"extent\",{}]", r.index()),
            })
            .collect();
        let maps = g
            .maps
            .iter()
            .map(|m| {
                format!(
                    "{{\"buffer\":{},\"dims\":{:?},\"extents\":{:?},\"swizzle\":{}}}",
                    m.buffer.index(),
                    m.dims,
                    m.extents,
                    m.swizzle_bytes
                )
            })
            .collect();
        let assumes = g
            .assumes
            .iter()
            .map(|c| match c {
                Condition::AtMost(s, n) => format!("[\"atmost\",{},{n}]", q(&sz(s))),
                Condition::Multiple(s, n) => format!("[\"multiple\",{},{n}]", q(&sz(s))),
                Condition::Aligned(b, n) => format!("[\"aligned\",{},{n}]", b.index()),
            })
            .collect();
        ls.push(format!("{{\"symbol\":{},\"slots\":{},\"grid\":{},\"threads\":{},\"cluster\":{:?},\"shared\":{},\"variant\":{},\"maps\":{},\"assumes\":{},\"flops\":{},\"bytes\":{}}}", q(&l.symbol), list(slots), list(l.grid.iter().map(|s| q(&sz(s))).collect()), g.threads, g.cluster, g.shared_bytes, q(g.variant_of.as_deref().unwrap_or("")), list(maps), list(assumes), q(&sz(&l.flops)), q(&sz(&l.bytes))));
    }
    write!(o, "\"launches\":{},\"ptx\":{:?}}}", list(ls), text).unwrap();
    println!("{o}");
}
