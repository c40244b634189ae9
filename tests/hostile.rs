//! Readers of bytes under damage: the targets of `fuzz/` on their seeds, on what fuzzing found once, and on seeds damaged
//! by a fixed sequence of random numbers.
//!
//! Invariants: nothing panics, and no reader holds more memory at once than its input justifies; the allocator of this
//! program counts. Longer runs, with coverage, are `make fuzz`.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use einfall::codegen::random::Rng;
use targets::{TARGETS, Target};

/// Damaged inputs of each target.
const CASES: usize = 400;
/// Bytes that a reader may hold at once for any input.
const BASE_BYTES: usize = 4 << 20;
/// Bytes more for each byte of the input.
const BYTES_PER_BYTE: usize = 1 << 10;

/// The system's allocator, which counts what this thread holds.
struct Counting;

thread_local! {
    /// Bytes held, and the most since they were last counted from.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // A thread that ends has nothing more to count.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        held.set((now + bytes, most.max(now + bytes)));
    });
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes held at once while `f` runs, above those held before.
fn most_held(f: impl FnOnce()) -> usize {
    let before = HELD.with(Cell::get).0;
    HELD.with(|held| held.set((before, before)));
    f();
    (HELD.with(Cell::get).1 - before) as usize
}

/// Numbers at the edges of types, and pieces that open and close.
const PIECES: &[&str] = &[
    "0",
    "-1",
    "4294967296",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551616",
    "1e309",
    "nan",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    ";",
    ":",
    " ",
    "=",
    "\"",
    "\u{fffd}",
    "\0",
];

/// A seed with a few places changed, in bytes and in pieces of text.
fn damaged(seeds: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = rng.pick(seeds).clone();
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        let end = (at + rng.below(12) as usize).min(bytes.len());
        match rng.below(6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..end)),
            2 => bytes[at..end].iter_mut().for_each(|b| *b ^= 1 << rng.below(8)),
            3 => drop(bytes.splice(at..end, rng.pick(PIECES).bytes())),
            4 => {
                // A part of another seed.
                let other = rng.pick(seeds);
                let from = rng.below(other.len() as u64 + 1) as usize;
                let part = other[from..(from + rng.below(64) as usize).min(other.len())].to_vec();
                drop(bytes.splice(at..end, part));
            }
            _ => {
                let part = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, part.repeat(1 + rng.below(4) as usize)));
            }
        }
    }
    bytes
}

/// Runs a target; what is wrong names the input.
fn held_bounded(target: &Target, bytes: &[u8], which: &str) {
    let outcome = std::panic::catch_unwind(|| most_held(|| (target.run)(bytes)));
    let shown = || String::from_utf8_lossy(bytes).into_owned();
    let Ok(held) = outcome else { panic!("{}, {which}: it panics on\n{}", target.name, shown()) };
    let allowed = BASE_BYTES + BYTES_PER_BYTE * bytes.len();
    assert!(held <= allowed, "{}, {which}: {held} bytes held for {} given:\n{}", target.name, bytes.len(), shown());
}

/// A target's seeds, regressions and damaged seeds.
fn exercise(name: &str) {
    let target = targets::named(name);
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{name} begins from nothing");
    for (i, seed) in seeds.iter().enumerate() {
        held_bounded(target, seed, &format!("seed {i}"));
    }
    for (file, bytes) in target.regressions() {
        held_bounded(target, &bytes, &file);
    }
    let mut rng = Rng::new(1);
    for case in 0..CASES {
        let bytes = damaged(&seeds, &mut rng);
        held_bounded(target, &bytes, &format!("case {case}"));
    }
}

/// A test for each target.
macro_rules! tests {
    ($($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                exercise(stringify!($name));
            }
        )*

        #[test]
        fn every_target_has_a_test_a_program_and_no_foreign_regressions() {
            let tested = [$(stringify!($name)),*];
            let named: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
            assert_eq!(tested.as_slice(), named);
            let manifest = std::fs::read_to_string(targets::root().join("fuzz/Cargo.toml")).expect("the manifest");
            for name in named {
                assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name} has no program");
                let program = targets::root().join(format!("fuzz/fuzz_targets/{name}.rs"));
                let text = std::fs::read_to_string(program).expect("the program");
                assert!(text.contains(&format!("init: plant(\"{name}\")")) && text.contains(&format!("run(\"{name}\"")), "the program of {name} runs another");
            }
            let Ok(regressions) = std::fs::read_dir(targets::root().join("fuzz/regressions")) else { return };
            for entry in regressions {
                let folder = entry.expect("an entry").file_name();
                assert!(TARGETS.iter().any(|t| folder == t.name), "{folder:?} is no target");
            }
        }
    };
}

tests!(artifact, cache, cascade, compile, csp, kernel, mapping, npy, npz, safetensors, sheet, table, tile);

#[test]
fn planted_faults_are_found() {
    fn greedy(bytes: &[u8]) {
        drop(std::hint::black_box(vec![1u8; 1 << bytes.len()]));
    }
    fn panics(bytes: &[u8]) {
        assert!(bytes.is_empty());
    }
    let of = |run: fn(&[u8])| Target { name: "planted", run, seeds: Vec::new };
    let complains = |run, bytes: &[u8]| {
        let said = std::panic::catch_unwind(|| held_bounded(&of(run), bytes, "planted")).expect_err("it complains");
        said.downcast_ref::<String>().expect("a message").clone()
    };
    held_bounded(&of(greedy), &[0; 8], "planted");
    assert!(complains(greedy, &[0; 24]).contains("16777216 bytes held for 24 given"));
    assert!(complains(panics, b"x").contains("it panics on\nx"));
}
