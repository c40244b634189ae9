//! Steps of recurrences as launches: cells over a whole state, cut into columns, against the evaluator; what is said of
//! streams whose steps cannot be launched.

mod common;

use common::{Split, compile, isas, run};
use einfall_codegen::backend::llvm::Isa;
use einfall_codegen::lower::cpu::{apply, launch_steps, pack_operands};
use einfall_codegen::passes::round_operands::round_operands;
use einfall_codegen::tables;
use einfall_ir::cascade::bind::{Given, bind};
use einfall_ir::cascade::{Cascade, eval, parse};
use einfall_ir::mapping::parse::parse as mapping;
use einfall_ir::tile::{self, Plan};
use einfall_ir::tolerance::{self, inputs};

/// Two states, one read whole; a state stored after the last step; rows that are one, few and many.
const CELL: &str =
    "cascade cell[T, B, D](x: f32[T,B,D], R: f32[D,D], h0: f32[B,D]) -> (H: f32[T,B,D] = h[1..], s: f32[B,D] = c[T]) {
    iter t in T {
        h[0,b,d] = h0[b,d];  c[0,b,d] = 0.5
        c[t+1,b,d] = 0.5 * c[t,b,d] + x[t,b,d]
        h[t+1,b,d] = tanh(c[t+1,b,d] + (sum(p in D) R[d,p] * h[t,b,p]))
    }
}";

fn only(text: &str) -> Cascade {
    parse(text).unwrap_or_else(|e| panic!("{e:?}")).cascades.remove(0)
}

fn agree(c: &Cascade, lines: &str, kernel: &str, sizes: &[(&str, u64)]) {
    let plan = tables::formed(c.clone()).unwrap();
    let m = mapping(&format!("mapping {} on cpu {{\n kernel {kernel} {{\n{lines}\n }}\n}}\n", c.name)).unwrap();
    let sizes = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
    let b = bind(c, &Given { sizes, ..Given::default() }).unwrap();
    let given = inputs::random(c, &b, 3, inputs::Variant::Normal).unwrap();
    let want = tolerance::expect(c, &b, &given, &eval::Options::default()).unwrap();
    for isa in isas() {
        let plan = round_operands(plan.clone(), &isa.atoms());
        let plan = launch_steps(&plan, &m).unwrap_or_else(|e| panic!("{e}\n{plan}"));
        tile::verify::verify(&plan).unwrap_or_else(|e| panic!("{e:?}\n{plan}"));
        assert_eq!(tile::parse::parse(&plan.to_string()).unwrap().to_string(), plan.to_string());
        let plan = pack_operands(&apply(&plan, &m), &m, &isa).unwrap_or_else(|e| panic!("{e}\n{plan}"));
        let compiled = compile(&plan, &isa).unwrap_or_else(|e| panic!("{e}\n{plan}"));
        assert_eq!(compiled.artifact.launches.iter().filter(|l| l.ordered).count(), 1);
        let [whole, each] = [Split::Whole, Split::Each].map(|s| run(&compiled, &b.extents, &given, s));
        assert_eq!(whole, each);
        for (w, g) in want.iter().zip(&whole) {
            w.compare(&w.elements(g)).unwrap_or_else(|e| panic!("{isa:?} {:?}: {e}\n{plan}", b.extents));
        }
    }
}

#[test]
fn launched_steps_agree_with_the_evaluator() {
    let cell = only(CELL);
    for sizes in [[("T", 4), ("B", 5), ("D", 70)], [("T", 1), ("B", 40), ("D", 33)], [("T", 0), ("B", 3), ("D", 7)]] {
        agree(
            &cell,
            "axis b block 16\n axis t block 1 launches\n axis d block 32\n tile R in packed",
            "cell_0",
            &sizes,
        );
        agree(&cell, "axis b block 1\n axis t block 1 launches\n axis d block 5", "cell_0", &sizes);
    }
    // An array of the name that the carried one would get.
    let named = only(&CELL.replace("h0", "cell_0_h"));
    agree(
        &named,
        "axis b block 1\n axis t block 1 launches\n axis d block 5",
        "cell_0",
        &[("T", 2), ("B", 2), ("D", 7)],
    );
    let text = einfall_kernels::SOURCES.iter().find(|s| s.0 == "lstm_layer").unwrap().1;
    let lines = "axis b block 16\n axis t block 1 launches\n axis d block 32\n tile Rw in packed";
    agree(&only(text), lines, "lstm_layer_1", &[("T", 3), ("B", 19), ("I", 9), ("D", 65)]);
}

/// What tasks read of each other as an operand in pairs or tiles is stored as narrow as that, in two places as well.
#[test]
fn what_others_read_in_a_narrower_type_is_stored_so() {
    let layer = only(einfall_kernels::source("lstm_layer").unwrap());
    let m = mapping(
        "mapping lstm_layer on cpu {\n kernel lstm_layer_1 {\n axis t block 1 launches\n axis d block 2\n }\n}\n",
    )
    .unwrap();
    let formed = tables::formed(layer.clone()).unwrap();
    let sizes = [("T", 3), ("B", 2), ("I", 3), ("D", 4)].map(|(n, v)| (n.to_owned(), v)).to_vec();
    let b = bind(&layer, &Given { sizes, ..Given::default() }).unwrap();
    let given = inputs::random(&layer, &b, 3, inputs::Variant::Normal).unwrap();
    let outs = |p: &Plan| tile::eval::run(p, &b.extents, &given, &tile::eval::Options::default());
    for (isa, narrow) in [(Isa::AMX, true), (Isa::DOTS, true), (Isa::AVX512, false)] {
        let plan = round_operands(formed.clone(), &isa.atoms());
        let launched = apply(&launch_steps(&plan, &m).unwrap(), &m);
        let text = launched.to_string();
        assert_eq!(text.contains("workspace lstm_layer_1_h_bf16: bf16[2, B, D]"), narrow, "{text}");
        assert_eq!(outs(&launched).unwrap(), outs(&plan).unwrap());
        if narrow {
            let (from, to) = ("store lstm_layer_1_h_bf16[(t + 1) % 2", "store lstm_layer_1_h_bf16[t % 2");
            assert!(text.contains(from) && !text.contains("lstm_layer_1_h[t % 2, b, p]"), "{text}");
            let seen = outs(&tile::parse::parse(&text.replace(from, to)).unwrap()).expect_err(from);
            assert!(matches!(seen, tile::eval::TileError::Race { .. }), "{seen:?}");
        }
    }
}

/// The plan's evaluator runs rounds one after the other, and sees a state that is replaced while others read it.
#[test]
fn a_state_with_one_place_is_a_race() {
    let cell = only(CELL);
    let plan = tables::formed(cell.clone()).unwrap();
    let m =
        mapping("mapping cell on cpu {\n kernel cell_0 {\n axis t block 1 launches\n axis d block 2\n }\n}\n").unwrap();
    let launched = apply(&launch_steps(&plan, &m).unwrap(), &m);
    let sizes = [("T", 3), ("B", 2), ("D", 4)].map(|(n, v)| (n.to_owned(), v)).to_vec();
    let b = bind(&cell, &Given { sizes, ..Given::default() }).unwrap();
    let given = inputs::random(&cell, &b, 3, inputs::Variant::Normal).unwrap();
    let outs = |p: &Plan| tile::eval::run(p, &b.extents, &given, &tile::eval::Options::default());
    assert_eq!(outs(&launched).unwrap(), outs(&plan).unwrap());
    let text = launched.to_string();
    for (from, to) in [("store cell_0_h[(t + 1) % 2", "store cell_0_h[t % 2"), (" ordered\n", "\n")] {
        assert!(text.contains(from), "{text}");
        let wrong = tile::parse::parse(&text.replace(from, to)).unwrap();
        let seen = outs(&wrong).expect_err(from);
        assert!(matches!(seen, tile::eval::TileError::Race { .. }), "{from} → {to}: {seen:?}");
    }
}

#[test]
fn what_cannot_be_launched_says_why() {
    let cell = only(CELL);
    let elsewhere = CELL.replace("R[d,p] * h[t,b,p]", "R[d,p] * c[t+1,b,p]");
    let narrow = CELL.replace("h[0,b,d] = h0", "h[0,b,d]: bf16 = h0").replace("h[t+1,b,d] = ", "h[t+1,b,d]: bf16 = ");
    let narrow = narrow.replace("H: f32", "H: bf16");
    let same = CELL.replace("s: f32[B,D] = c[T]", "s: f32[B] = g[T]").replace(
        "c[0,b,d] = 0.5",
        "c[0,b,d] = 0.5
        g[0,b] = 0.0
        g[t+1,b] = 0.5 * g[t,b] + (max(p in D) h[t,b,p])",
    );
    let cut = "axis t block 1 launches\n axis d block 2";
    for (c, lines, why) in [
        (cell.clone(), "axis b block 1 launches", "no outermost stream is over b"),
        (only(&elsewhere), cut, "of the same step is read elsewhere"),
        (only(&narrow), cut, "is carried in a narrow type"),
        (only(&same), cut, "is carried and the same along d"),
    ] {
        let m = mapping(&format!("mapping cell on cpu {{\n kernel cell_0 {{\n{lines}\n }}\n}}\n")).unwrap();
        let plan = tables::formed(c).unwrap();
        let e = launch_steps(&plan, &m).expect_err(why);
        assert!(e.what.contains(why), "{}\n{plan}", e.what);
    }
    // What stands before the stream is computed by each task of a step, of the columns that are its own.
    let text = tables::formed(cell).unwrap().to_string();
    let edits = [
        ("tile R: ", "tile w: f32[b, d]\n tile v: f32[b, p]\n tile R: "),
        ("R = load R[d, p]", "w = h0[b, d]\n v = w{d = p}\n R = load R[d, p]"),
        ("contract(p) r0_a, R", "contract(p) v, R"),
    ];
    let text = edits.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{from}: {text}");
        text.replace(from, to)
    });
    let m = mapping(&format!("mapping cell on cpu {{\n kernel cell_0 {{\n{cut}\n }}\n}}\n")).unwrap();
    let e = launch_steps(&tile::parse::parse(&text).unwrap(), &m).expect_err("read elsewhere");
    assert!(e.what.contains("w of the same step is read elsewhere"), "{}", e.what);
}
