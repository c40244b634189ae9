//! What cargo-fuzz's programs call: a target by its name, and the corpus that it begins with.

mod targets;

/// Runs a target on bytes.
///
/// # Panics
/// Where its reader is wrong.
pub fn run(name: &str, bytes: &[u8]) {
    (targets::named(name).run)(bytes);
}

/// Writes a target's seeds and what was found once into `corpus/`, where cargo-fuzz begins.
///
/// # Panics
/// Where the folder cannot be written.
pub fn plant(name: &str) {
    let target = targets::named(name);
    let corpus = targets::root().join("fuzz/corpus").join(name);
    std::fs::create_dir_all(&corpus).expect("a folder for the corpus");
    let seeds = (target.seeds)().into_iter().enumerate().map(|(i, seed)| (format!("seed-{i:03}"), seed));
    for (file, bytes) in seeds.chain(target.regressions()) {
        std::fs::write(corpus.join(file), bytes).expect("a file of the corpus");
    }
}
