//! One-hot operands through the printed instructions: for every major-ness, swizzle and step along k the machine, which
//! knows descriptors, swizzles and matrix loads from the PTX ISA alone, gives exactly the expected row or column.

mod machine;

use einfall_codegen::backend::ptx::{Target, print};
use einfall_codegen::lower::gpu;
use einfall_codegen::probes::{Hot, Probe, SHAPE};
use einfall_ir::artifact::{Artifact, Code};
use einfall_ir::kernel::BufSpace;
use einfall_ir::layout::Swizzle;
use einfall_ir::target::DataSheet;
use machine::launch::execute;

fn printed(p: &Probe) -> Artifact {
    let module = gpu::lower(&p.plan, &p.mapping).unwrap_or_else(|e| panic!("{}: {e:?}", p.name));
    let target = Target::of(&DataSheet::named(&p.mapping.target).unwrap()).unwrap();
    print(&p.plan, &module, &target).unwrap_or_else(|e| panic!("{}: {e}", p.name))
}

/// The first element that is not as expected.
fn wrong(artifact: &Artifact, p: &Probe, hot: Hot) -> Option<(usize, f64, f64)> {
    let (inputs, want) = p.case(hot);
    let got = execute(artifact, &SHAPE, &inputs).remove(0);
    got.into_iter().zip(want).enumerate().find(|(_, (x, y))| x != y).map(|(i, (x, y))| (i, x, y))
}

#[test]
fn single_elements_come_out_where_they_belong() {
    for p in Probe::all() {
        let artifact = printed(&p);
        let Code::Ptx { text, .. } = &artifact.code else { panic!("no PTX") };
        let instruction = if p.name.starts_with("wgmma") { "wgmma.mma_async" } else { "ldmatrix" };
        assert!(text.contains(instruction), "{}", p.name);
        // Results in shared memory go there as matrices, with columns contiguous as transposed ones.
        let stores = |what: &str| text.lines().any(|l| l.contains("stmatrix") && l.contains(what));
        assert_eq!(stores("x4"), p.name.contains("staged"), "{}", p.name);
        assert_eq!(stores(".trans"), p.name.contains("flipped"), "{}", p.name);
        let transposed = p.name.contains("left m") || p.name.contains("right n");
        assert!(instruction != "ldmatrix" || text.contains(".trans") == transposed, "{}", p.name);
        for hot in Probe::hots() {
            assert_eq!(wrong(&artifact, &p, hot), None, "{} {hot:?}", p.name);
        }
    }
}

/// Every probe notices another swizzle of what is read than of what is written, and a step along k that is not taken.
#[test]
fn probes_notice_wrong_layouts() {
    for p in Probe::all().iter().filter(|p| p.name.contains("swizzle 128 bf16")) {
        let good = printed(p);
        let Code::Ptx { text, arch } = &good.code else { panic!("no PTX") };
        // The mode of a descriptor; the mask of a swizzled address, in matrix loads of the last trip alone.
        let bad_text = if p.name.starts_with("wgmma") {
            assert!(text.contains("1073741888}"), "{}", p.name);
            text.replace("1073741888}", "2147483712}")
        } else {
            // After the last wait nothing is written to shared memory any more.
            let bend = |l: &str| if l.contains("and.b32") { l.replace(", 112;", ", 48;") } else { l.to_string() };
            let entry = |e: &str| {
                let (before, reads) = e.split_at(e.rfind("cp.async").unwrap_or(e.len()));
                format!("{before}{}", reads.lines().map(|l| bend(l) + "\n").collect::<String>())
            };
            text.split(".visible .entry").map(entry).collect::<Vec<_>>().join(".visible .entry")
        };
        assert_ne!(&bad_text, text, "{}", p.name);
        let mut bad = good.clone();
        bad.code = Code::Ptx { text: bad_text, arch: arch.clone() };
        let caught = Probe::hots().into_iter().any(|hot| wrong(&bad, p, hot).is_some());
        assert!(caught, "{}", p.name);
    }
}

/// Shared tiles have the swizzle that the probe is named after.
#[test]
fn layouts_are_as_named() {
    for p in Probe::all() {
        let module = gpu::lower(&p.plan, &p.mapping).unwrap();
        let span: u64 = p.name.split("swizzle ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        for (_, b) in module.kernels[0].bufs.iter() {
            if let BufSpace::Shared { layout, .. } = &b.space {
                assert_eq!(layout.swizzle, Swizzle::span(span), "{}", p.name);
            }
        }
    }
}
