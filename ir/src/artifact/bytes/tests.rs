//! Every artifact survives its bytes; no bytes harm.

use super::*;
use crate::artifact::{Bindings, Code, Condition, GpuLaunch, Launch, Slot, TensorMap, WgslModule};
use crate::cascade::Rank;
use crate::tile::{Buffer, BufferId, BufferKind};
use proptest::prelude::*;

fn size(a: Size, b: Size, make: fn(Box<Size>, Box<Size>) -> Size) -> Size {
    make(Box::new(a), Box::new(b))
}

/// An artifact with every variant of everything.
fn sample() -> Artifact {
    let mut ranks = Arena::new();
    let m: RankId = ranks.push(Rank { name: "M".into(), fixed: None, span: Default::default() });
    let n = ranks.push(Rank { name: "N".into(), fixed: Some(300), span: Default::default() });
    let (m, n) = (Size::Rank(m), Size::Rank(n));
    let mut buffers = Arena::new();
    let kinds = [BufferKind::Input, BufferKind::InOut, BufferKind::Output, BufferKind::Workspace];
    for (k, dtype) in DType::ALL.into_iter().enumerate() {
        let dims = vec![m.clone(), size(n.clone(), Size::Const(k as u64), Size::Add)];
        buffers.push(Buffer { name: format!("b{k}"), dtype, dims, kind: kinds[k % 4], positive: k == 1 });
    }
    let scalar = BufferKind::Input;
    let scale: BufferId =
        buffers.push(Buffer { name: "scale".into(), dtype: DType::F32, dims: vec![], kind: scalar, positive: true });
    let b = |k: usize| BufferId::new(k);
    let launch = Launch {
        symbol: "k".into(),
        slots: vec![Slot::Base(b(0)), Slot::Stride(b(1), 1), Slot::Scalar(scale), Slot::Extent(RankId::new(1))],
        grid: vec![size(m.clone(), Size::Const(128), Size::CeilDiv), size(n.clone(), m.clone(), Size::Div)],
        ordered: false,
        scratch_bytes: size(m.clone(), n.clone(), Size::Min),
        reads: vec![b(0), b(1)],
        writes: vec![b(2)],
        flops: size(size(m.clone(), n.clone(), Size::Mul), Size::Const(1 << 40), Size::Sub),
        bytes: size(m.clone(), n.clone(), Size::Max),
        gpu: None,
    };
    let map = TensorMap { buffer: b(1), dims: vec![1, 0], extents: vec![64, 128], swizzle_bytes: 128 };
    let gpu = GpuLaunch {
        threads: 384,
        cluster: vec![2, 1],
        shared_bytes: 227 << 10,
        cooperative: false,
        dependent: true,
        counters: vec![b(3)],
        maps: vec![map],
        variant_of: Some("k".into()),
        assumes: vec![Condition::AtMost(m.clone(), 64), Condition::Multiple(n, 8), Condition::Aligned(b(0), 16)],
    };
    let launches = vec![launch.clone(), Launch { symbol: "k_0".into(), gpu: Some(gpu), ..launch }];
    let code = Code::Ptx { text: ".version 8.0\n".into(), arch: "sm_90a".into() };
    let (defaults, facts) = (Vec::new(), Vec::new());
    let mut artifact =
        Artifact { name: "sample".into(), target: "h100".into(), ranks, buffers, code, launches, defaults, facts };
    // Every step of a formula.
    let text = "cascade of[M, N](scale: f32 = f16(if M < N then 1.5 else -sqrt(N)) / 2) -> (y: f32[M, N]) {
        require scale > 0
        y[m,n] = scale
    }";
    let c = crate::cascade::parse(text).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0);
    artifact = artifact.with_formulas(&c);
    assert_eq!((artifact.defaults.len(), artifact.facts.len()), (1, 1));
    artifact
}

#[test]
fn artifacts_survive_their_bytes() {
    let ptx = sample();
    let codes =
        [ptx.code.clone(), Code::LlvmIr("define void @k()".into()), Code::Object(vec![0, 255, 7]), Code::Linked];
    for code in codes {
        let artifact = Artifact { code, ..ptx.clone() };
        assert_eq!(Artifact::from_bytes(&artifact.to_bytes().unwrap()), Ok(artifact));
    }
    let matrices = vec!["coop.m16n16k16.f16".to_owned()];
    let (text, written) = ("fn k_0() {}".into(), vec![true]);
    let module = WgslModule { text, bindings: Bindings::Own, written, subgroup: 32, matrices };
    let code = Code::Wgsl { modules: vec![module.clone()] };
    let artifact = Artifact { code, launches: ptx.launches[1..].to_vec(), ..ptx.clone() };
    assert_eq!(Artifact::from_bytes(&artifact.to_bytes().unwrap()), Ok(artifact.clone()));
    for modules in [vec![], vec![WgslModule { written: vec![], ..module }]] {
        let wrong = Artifact { code: Code::Wgsl { modules }, ..artifact.clone() };
        let inconsistent = Artifact::from_bytes(&wrong.to_bytes().unwrap());
        assert!(matches!(inconsistent, Err(BytesError::Inconsistent(_))), "{inconsistent:?}");
    }
}

/// A change of these bytes needs a new [`VERSION`].
#[test]
fn the_form_of_this_version_is_fixed() {
    let bytes = sample().to_bytes().unwrap();
    let lines = bytes.chunks(40).map(|c| c.iter().map(|b| format!("{b:02x}")).collect::<String>());
    insta::assert_snapshot!(format!("version_{VERSION}"), lines.collect::<Vec<_>>().join("\n"));
}

#[test]
fn cut_off_or_prolonged_bytes_are_refused() {
    let bytes = sample().to_bytes().unwrap();
    for len in 0..bytes.len() {
        assert!(Artifact::from_bytes(&bytes[..len]).is_err(), "{len} bytes of {} were taken", bytes.len());
    }
    assert!(matches!(Artifact::from_bytes(&[&bytes[..], &[0]].concat()), Err(BytesError::Form(_))));
}

#[test]
fn every_flipped_bit_gives_an_error_or_a_consistent_artifact() {
    let bytes = sample().to_bytes().unwrap();
    let mut refused = 0;
    for at in 0..8 * bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at / 8] ^= 1 << (at % 8);
        match Artifact::from_bytes(&flipped) {
            Ok(artifact) => assert_eq!(artifact.check(), Ok(())),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 8 * 12, "the header counts, and more than it: {refused}");
}

#[test]
fn foreign_versions_and_files_are_named() {
    let mut bytes = sample().to_bytes().unwrap();
    bytes[8] ^= 0x40;
    assert_eq!(Artifact::from_bytes(&bytes), Err(BytesError::Version { found: VERSION ^ 0x40 }));
    assert_eq!(Artifact::from_bytes(b"\x7fELF and so on"), Err(BytesError::Foreign));
    assert_eq!(Artifact::from_bytes(b""), Err(BytesError::Foreign));
}

#[test]
fn references_to_what_is_not_there_are_refused() {
    let far: BufferId = BufferId::new(99);
    let faults: [fn(&mut Artifact, BufferId); 8] = [
        |a, far| a.launches[0].reads.push(far),
        |a, far| a.launches[0].slots.push(Slot::Base(far)),
        |a, _| a.launches[0].slots.push(Slot::Stride(BufferId::new(0), 2)),
        |a, _| a.launches[0].slots.push(Slot::Scalar(BufferId::new(0))),
        |a, _| a.launches[0].grid.push(Size::Rank(RankId::new(2))),
        |a, far| a.launches[1].gpu.as_mut().unwrap().counters.push(far),
        |a, far| a.launches[1].gpu.as_mut().unwrap().assumes.push(Condition::Aligned(far, 16)),
        |a, _| a.launches[1].gpu.as_mut().unwrap().maps[0].dims[0] = 2,
    ];
    for (i, fault) in faults.into_iter().enumerate() {
        let mut artifact = sample();
        fault(&mut artifact, far);
        let bytes = artifact.to_bytes().unwrap();
        assert!(matches!(Artifact::from_bytes(&bytes), Err(BytesError::Inconsistent(_))), "fault {i} was taken");
    }
}

#[test]
fn deep_extents_are_refused_on_both_sides() {
    let deep = |n: usize| (0..n).fold(Size::Const(1), |s, _| size(s, Size::Const(1), Size::Add));
    let with = |n| Artifact { launches: vec![], ..sample() }.with_dim(deep(n));
    let fits = with(MAX_DEPTH);
    assert_eq!(Artifact::from_bytes(&fits.to_bytes().unwrap()), Ok(fits));
    assert!(with(MAX_DEPTH + 1).to_bytes().is_err());
    // What no writer writes: a million sums, and operators without operands.
    let terms = |n: usize| (0..n).flat_map(|_| [Term::Const(1), Term::Add]);
    assert!(nest([Term::Const(1)].into_iter().chain(terms(1_000_000)).collect()).is_none());
    assert!(nest(vec![Term::Mul]).is_none() && nest(vec![]).is_none());
    assert!(nest(vec![Term::Const(1), Term::Const(2)]).is_none());
}

impl Artifact {
    fn with_dim(mut self, dim: Size) -> Artifact {
        self.buffers[BufferId::new(0)].dims.push(dim);
        self
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(&tail);
        if let Ok(artifact) = Artifact::from_bytes(&bytes) {
            prop_assert_eq!(artifact.check(), Ok(()));
        }
    }
}
