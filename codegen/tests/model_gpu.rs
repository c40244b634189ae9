//! The GPU mapping model against the lowering: what the model admits lowers, verifies and computes what the plan means;
//! the reference mappings are among it.

use einfall_autotune::model_gpu::{admitted, candidates, choose, count, sample, why_not};
use einfall_codegen::lower::gpu;
use einfall_ir::mapping::Mapping;
use einfall_ir::target::DataSheet;
use einfall_ir::tile::{self, Plan};

fn text(path: &str) -> String {
    let path = format!("{}/../tests/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn plan(name: &str) -> Plan {
    tile::parse::parse(&text(&format!("plans/{name}.tile"))).unwrap()
}

fn mapping(name: &str) -> Mapping {
    einfall_ir::mapping::parse::parse(&text(&format!("mappings/{name}.mapping"))).unwrap()
}

/// Plans written by hand with their reference mappings, and sizes of benchmarks.
const REFERENCES: [(&str, &str, &[u64]); 4] = [
    ("gemm", "gemm", &[4096, 4096, 4096]),
    ("attention", "attention", &[4, 16, 1, 4096, 4096, 128, 128]),
    ("attention_full", "attention_full", &[4, 16, 1, 4096, 4096, 128, 128]),
    ("lstm_gates", "lstm", &[1024, 16, 12, 128]),
];

#[test]
fn reference_mappings_are_admitted() {
    let sheet = DataSheet::h100();
    for (p, m, sizes) in REFERENCES {
        let (plan, mapping) = (plan(p), mapping(m));
        let why = why_not(&plan, &sheet, Some(sizes), &mapping);
        assert!(why.is_none(), "{m}: {}", why.unwrap());
        let cost = admitted(&plan, &plan.kernels[0], &sheet, Some(sizes), &mapping.kernels[0]).unwrap();
        println!("{m}: {:.1} us, {} binds", cost.seconds * 1e6, cost.binding);
    }
}

#[test]
fn choices_lower() {
    let sheet = DataSheet::h100();
    for (p, _, sizes) in REFERENCES {
        let plan = plan(p);
        for sizes in [Some(sizes), None] {
            let start = std::time::Instant::now();
            let m = choose(&plan, &sheet, sizes);
            println!("{p}: {:?}\n{m}", start.elapsed());
            let again = einfall_ir::mapping::parse::parse(&m.to_string()).unwrap();
            assert_eq!(again, m);
            gpu::lower(&plan, &m).unwrap_or_else(|e| panic!("{p}: {e:?}\n{m}"));
            for (c, cost) in candidates(&plan, &sheet, sizes, 4) {
                println!("{:.1} us, {} binds", cost.seconds * 1e6, cost.binding);
                gpu::lower(&plan, &c).unwrap_or_else(|e| panic!("{p}: {e:?}\n{c}"));
            }
        }
    }
}

#[test]
fn drawn_mappings_lower() {
    let sheet = DataSheet::h100();
    for (p, _, sizes) in REFERENCES {
        let plan = plan(p);
        let n = count(&plan, &plan.kernels[0], &sheet, Some(sizes), 2000).unwrap();
        println!("{p}: {n} admitted");
        assert!(n >= 500, "{p}: {n}");
        let mut bad = 0;
        let drawn = sample(&plan, &plan.kernels[0], &sheet, Some(sizes), 1, 30).unwrap();
        assert_eq!(drawn.len(), 30);
        for k in drawn {
            let m = Mapping { plan: plan.name.clone(), target: "h100".into(), kernels: vec![k] };
            if let Err(e) = gpu::lower(&plan, &m) {
                bad += 1;
                println!("{p}: {}\n{m}", e[0].message);
            }
        }
        assert_eq!(bad, 0, "{p}");
    }
}
