//! Several processes share one cache folder.

use einfall_runtime::cache::{Cache, Key};
use std::process::Command;

/// Set in the processes that the test starts: the folder.
const FOLDER: &str = "EINFALL_TEST_CACHE_FOLDER";

#[test]
fn processes_share_a_folder() {
    let payload = |seed: u8, key: u8| vec![seed; 1000 + 700 * seed as usize + key as usize];
    if let Some(folder) = std::env::var_os(FOLDER) {
        let cache = Cache::open(folder.as_ref()).unwrap();
        let seed = (std::process::id() % 200) as u8;
        for round in 0..60u8 {
            let key = round % 5;
            cache.put(&Key::of(&[&[key]]), &payload(seed, key)).unwrap();
            let found = cache.get(&Key::of(&[&[key]])).expect("an entry is replaced, never absent");
            assert_eq!(found, payload(found[0], key), "a mixture of two writers");
        }
        return;
    }
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("shared");
    let children: Vec<_> = (0..3)
        .map(|_| {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "processes_share_a_folder"]).env(FOLDER, &folder);
            child.spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let usage = Cache::open(&folder).unwrap().usage().unwrap();
    assert_eq!(usage.entries, 5);
    let files = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(files, 5, "files left behind");
}
