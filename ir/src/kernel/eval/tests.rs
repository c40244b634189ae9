//! Kernels with known results, and planted faults that must be caught.

use super::*;
use crate::kernel::*;
use crate::layout::Distribution;
use crate::ops::BinaryOp;

fn global(name: &str, dims: &[i64], param: usize, written: bool) -> Buf {
    Buf {
        name: name.to_string(),
        dtype: DType::F32,
        dims: dims.iter().map(|d| Expr::Int(*d)).collect(),
        space: BufSpace::Global { param, written },
    }
}

/// c = a + b in blocks of 16; every task adds one block, the last one bounded.
fn vector_add(n: i64) -> Kernel {
    let mut k = Kernel {
        name: "add".to_string(),
        grid: vec![Expr::Int((n + 15) / 16)],
        cluster: Vec::new(),
        bufs: Arena::new(),
        frags: Arena::new(),
        barriers: Arena::new(),
        vars: Arena::new(),
        roles: Vec::new(),
    };
    let bufs = [("a", false), ("b", false), ("c", true)].map(|(s, w)| {
        let param = k.bufs.len();
        k.bufs.push(global(s, &[n], param, w))
    });
    let frags = ["x", "y", "z"].map(|s| {
        let dist = Distribution::vectors(&[16], Some(0), 8);
        k.frags.push(Frag { name: s.to_string(), dtype: DType::F32, dist })
    });
    let at = Expr::Grid(0).bin(BinaryOp::Mul, Expr::Int(16));
    let view = |buf| View { buf, stage: None, at: vec![at.clone()], walk: vec![Some((0, 1))] };
    let bounds = vec![Bound { dim: 0, limit: Expr::Int(n).bin(BinaryOp::Sub, at.clone()) }];
    let x = |f| Expr::Frag { frag: f, dims: vec![0] };
    k.roles.push(Role {
        name: "main".to_string(),
        scope: Scope::Thread,
        units: 1,
        regs: None,
        body: vec![
            Stmt::Load { out: frags[0], src: view(bufs[0]), bounds: bounds.clone() },
            Stmt::Load { out: frags[1], src: view(bufs[1]), bounds: bounds.clone() },
            Stmt::Map { out: frags[2], value: x(frags[0]).bin(BinaryOp::Add, x(frags[1])) },
            Stmt::Store { dst: view(bufs[2]), src: frags[2], bounds, join: None },
        ],
    });
    k
}

#[test]
fn vector_add_with_a_tail() {
    let k = vector_add(37);
    let data = |s: f64| (0..37).map(|i| f64::from(i) * s).collect::<Vec<_>>();
    let mut buffers = vec![
        GlobalBuffer::new(&[37], DType::F32, data(1.0)),
        GlobalBuffer::new(&[37], DType::F32, data(100.0)),
        GlobalBuffer::undefined(&[37], DType::F32),
    ];
    let stats = run(&k, &Arena::new(), &[], &mut buffers, &Options::default()).unwrap();
    assert_eq!(stats.tasks, 3);
    assert_eq!(buffers[2].data, data(101.0));
    assert!(buffers[2].defined.iter().all(|d| *d));
}

#[test]
fn overlapping_stores_of_tasks_race() {
    let mut k = vector_add(37);
    k.grid = vec![Expr::Int(2)];
    let Stmt::Store { dst, bounds, .. } = &mut k.roles[0].body[3] else { panic!() };
    (dst.at, *bounds) = (vec![Expr::Int(0)], Vec::new());
    let zeros = || GlobalBuffer::new(&[37], DType::F32, vec![0.0; 37]);
    let e = run(&k, &Arena::new(), &[], &mut [zeros(), zeros(), zeros()], &Options::default()).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Race, "{e}");
    assert!(e.to_string().contains("`c`[0]"), "{e}");
}
