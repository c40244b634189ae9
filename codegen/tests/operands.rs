//! Operands packed once a launch: every tile of the library that can be, for every instruction set, against the evaluator,
//! with a workspace full of NaN; what is said of tiles that cannot be.

mod common;

use common::{Split, compile, isas, run};
use einfall_codegen::lower::cpu::{apply, pack_operands};
use einfall_codegen::passes::round_operands::round_operands;
use einfall_codegen::tables;
use einfall_ir::cascade::bind::{Given, bind, check_facts};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::mapping::parse::parse as mapping;
use einfall_ir::tile::{self, AxisKind, Op, Plan};
use einfall_ir::tolerance::{self, inputs};

/// A plan whose blocks are whole panels where `wide` says so, the others 1.
fn blocked(c: &Cascade, block: u64) -> Option<Plan> {
    let mut plan = tables::formed(c.clone()).ok()?;
    for k in &mut plan.kernels {
        let sequential: Vec<_> = streams(&k.body);
        for (id, a) in k.axes.iter_mut().filter(|(_, a)| a.kind != AxisKind::Inner) {
            a.block = Some(if sequential.contains(&id) { 1 } else { block });
        }
    }
    Some(plan)
}

fn streams(nodes: &[tile::Node]) -> Vec<tile::AxisId> {
    let of = |n: &tile::Node| match n {
        tile::Node::Stream(s) => {
            [s.sequential.then_some(s.axis)].into_iter().flatten().chain(streams(&s.body)).collect()
        }
        tile::Node::Op(_) => Vec::new(),
    };
    nodes.iter().flat_map(of).collect()
}

/// Sizes around panels under which the cascade's facts hold.
fn sizes(c: &Cascade) -> Option<einfall_ir::cascade::bind::Bindings> {
    (0..40u64).find_map(|i| {
        let pick = |r: usize| [37, 5, 70, 33, 3, 64, 1, 41][(r as u64 * 3 + i) as usize % 8];
        let named = c.ranks.iter().filter(|(_, r)| r.fixed.is_none()).enumerate();
        let sizes = named.map(|(i, (_, r))| (r.name.clone(), pick(i))).collect();
        let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
        check_facts(c, &b, &[]).is_ok().then_some(b)
    })
}

#[test]
fn packed_tiles_of_the_library_agree_with_the_evaluator() {
    let mut packed = 0;
    for (file, text) in einfall_kernels::SOURCES {
        for c in parse(text).unwrap().cascades {
            let (Some(plan), Some(b)) = (blocked(&c, 32), sizes(&c)) else { continue };
            for isa in isas().into_iter().take(2) {
                let mut plan = round_operands(plan.clone(), &isa.atoms());
                let before = plan.kernels.len();
                for k in plan.kernels.clone() {
                    let mut loads = Vec::new();
                    k.for_each_op(&mut |op, _| {
                        if let Op::Load { out, .. } = op {
                            loads.push(k.tiles[*out].name.clone());
                        }
                    });
                    for tile in loads {
                        let text =
                            format!("mapping m on cpu {{\n kernel {} {{\n tile {tile} in packed\n }}\n}}\n", k.name);
                        if let Ok(more) = pack_operands(&plan, &mapping(&text).unwrap(), &isa) {
                            plan = more;
                        }
                    }
                }
                if plan.kernels.len() == before {
                    continue;
                }
                packed += plan.kernels.len() - before;
                tile::verify::verify(&plan).unwrap_or_else(|e| panic!("{file}: {e:?}\n{plan}"));
                let reparsed = tile::parse::parse(&plan.to_string()).unwrap();
                assert_eq!(reparsed.to_string(), plan.to_string());
                let given = inputs::random(&c, &b, 11, inputs::Variant::Normal).unwrap();
                let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
                let compiled = compile(&plan, &isa).unwrap_or_else(|e| panic!("{file}: {e}\n{plan}"));
                for split in [Split::Whole, Split::Each] {
                    let got = run(&compiled, &b.extents, &given, split);
                    for (w, g) in want.iter().zip(&got) {
                        w.compare(&w.elements(g))
                            .unwrap_or_else(|e| panic!("{file} {isa:?} {:?}: {e}\n{plan}", b.extents));
                    }
                }
            }
        }
    }
    assert!(packed >= 60, "{packed} tiles were packed");
}

/// Panels in positions mean what they say: the plan's own evaluator, which knows nothing of them, gives the same.
#[test]
fn a_packed_plan_evaluates_as_before() {
    let text = "cascade c[M, N, K](A: f32[M,K], B: f32[N,K]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[n,k] }";
    let c = parse(text).unwrap().cascades.remove(0);
    let plan = blocked(&c, 64).unwrap();
    let m = mapping("mapping c on cpu {\n kernel c_0 {\n tile B in packed\n }\n}\n").unwrap();
    let packed = pack_operands(&plan, &m, &isas()[0]).unwrap();
    assert_eq!(packed.kernels.len(), 2);
    assert!(packed.to_string().contains("store B_packed[n / "), "{packed}");
    let sizes = ["M", "N", "K"].map(|n| (n.to_owned(), 67)).to_vec();
    let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
    let given = inputs::random(&c, &b, 5, inputs::Variant::Normal).unwrap();
    let options = tile::eval::Options::default();
    let outs = |p: &Plan| tile::eval::run(p, &b.extents, &given, &options).unwrap();
    assert_eq!(outs(&plan), outs(&packed));
    // A panel's row that is one too narrow is another plan.
    let wrong = packed.to_string().replacen("n % 32]", "n % 31]", 1).replacen("n % 16]", "n % 15]", 1);
    let wrong = tile::parse::parse(&wrong).unwrap();
    assert_ne!(tile::eval::run(&wrong, &b.extents, &given, &options).ok(), Some(outs(&plan)));
}

#[test]
fn what_cannot_be_packed_says_why() {
    let c = parse(
        "cascade c[M, N, K](A: f32[M,K], B: f32[K,N], i: i32[K]) -> (Y: f32[M,N]) { Y[m,n] = sum(k) A[m,k] * B[i[k],n] }",
    )
    .unwrap()
    .cascades
    .remove(0);
    for (block, tile, why) in [
        (32, "Z", "there is no such tile"),
        (32, "A", "along its columns, and nothing else"),
        (24, "B", "blocks of whole panels"),
        (1, "B", "along its columns, and nothing else"),
    ] {
        let m =
            format!("mapping c on cpu {{\n kernel c_0 {{\n axis n block {block}\n tile {tile} in packed\n }}\n}}\n");
        let plan = apply(&blocked(&c, block).unwrap(), &mapping(&m).unwrap());
        let e = pack_operands(&plan, &mapping(&m).unwrap(), &isas()[0]).unwrap_err();
        assert!(e.what.contains(why), "{}: {why}\n{plan}", e.what);
    }
}

/// Operands that a caller has packed are read in place, by the same positions; those of another shape, and positions beyond
/// the array, as any other.
#[test]
fn operands_packed_by_the_caller_agree() {
    for (text, sizes) in [
        (
            "cascade c[M, P, K](A: f32[M,K], B: f32[P,K,32]) -> (Y: f32[M,32*P]) {
                Y[m,n] = sum(k) A[m,k] * B[n/32,k,n%32]
            }",
            [("M", 37), ("P", 3), ("K", 41)],
        ),
        (
            "cascade c[M, P, K](A: f32[M,K], B: f32[P,K,32]) -> (Y: f32[M,32*P+7]) {
                Y[m,n] = sum(k) A[m,k] * (if n < 32 * P then B[n/32,k,n%32] else 1.0)
            }",
            [("M", 37), ("P", 2), ("K", 33)],
        ),
        (
            "cascade c[M, P, K](A: bf16[M,2*K], B: bf16[P,K,32,2]) -> (Y: f32[M,32*P]) {
                Y[m,n] = sum(k) A[m,k] * B[n/32,k/2,n%32,k%2]
            }",
            [("M", 37), ("P", 2), ("K", 37)],
        ),
        (
            "cascade c[M, P, K](A: f32[M,K], B: f32[P,K,40]) -> (Y: f32[M,32*P]) {
                Y[m,n] = sum(k) A[m,k] * B[n/32,k,n%32]
            }",
            [("M", 37), ("P", 3), ("K", 41)],
        ),
        (
            // Rows in panels, beyond whose last row nothing may be read.
            "cascade c[M, P, N](A: bf16[P,M,32], B: bf16[32*P,N]) -> (Y: f32[M,N]) {
                Y[m,n] = sum(k) A[k/32,m,k%32] * B[k,n]
            }",
            [("M", 37), ("P", 3), ("N", 41)],
        ),
    ] {
        let c = parse(text).unwrap_or_else(|e| panic!("{e:?}")).cascades.remove(0);
        let sizes = sizes.map(|(n, v)| (n.to_owned(), v)).to_vec();
        let b = bind(&c, &Given { sizes, ..Given::default() }).unwrap();
        let given = inputs::random(&c, &b, 5, inputs::Variant::Normal).unwrap();
        let want = tolerance::expect(&c, &b, &given, &eval::Options::default()).unwrap();
        for (isa, block) in isas().into_iter().flat_map(|isa| [(isa, 32), (isa, 24)]) {
            let plan = blocked(&c, block).unwrap();
            let compiled = compile(&plan, &isa).unwrap_or_else(|e| panic!("{e}\n{plan}"));
            let got = run(&compiled, &b.extents, &given, Split::Each);
            for (w, g) in want.iter().zip(&got) {
                w.compare(&w.elements(g)).unwrap_or_else(|e| panic!("{isa:?} {block}: {e}\n{plan}"));
            }
        }
    }
}
