//! The on-disk cache of compiled objects.
//!
//! An entry is a file named by its key (a hash of everything that decides the object) that holds the key again, the
//! payload's length and a BLAKE3 hash over both. Invariants: (1) the folder belongs to this user and nobody else may
//! write to it, or it is refused, because what is loaded is run; (2) an entry that is truncated, damaged, of another
//! version, of another key, or of another owner is a miss and is removed, never loaded; (3) entries appear whole
//! (written beside, synced, renamed), so processes may share a folder without locks.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// First bytes of an entry; the digit is the format's version.
const MAGIC: &[u8; 8] = b"EINFALL1";
/// Magic, key, payload length, hash.
const HEADER_BYTES: usize = 8 + 32 + 8 + 32;
/// Entries above this are neither written nor read.
const MAX_PAYLOAD_BYTES: u64 = 1 << 28;
/// Suffix of an entry's file name.
const SUFFIX: &str = ".entry";
/// Prefix of files being written.
const PENDING: &str = ".pending-";

/// Why a cache folder or entry cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The folder cannot be made, read or written.
    #[error("cache folder {}: {source}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Another user owns the folder.
    #[error("cache folder {} belongs to user {owner}, not to this one: code in it is not to be trusted", path.display())]
    Owner {
        /// The folder.
        path: PathBuf,
        /// The owner's user id.
        owner: u32,
    },
    /// Others may write to the folder.
    #[error("cache folder {} can be written by others (mode {mode:o}): run `chmod 700` on it", path.display())]
    Writable {
        /// The folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// An object larger than an entry may be.
    #[error("an object of {bytes} bytes is larger than a cache entry may be")]
    Size {
        /// Its size.
        bytes: u64,
    },
}

/// What an entry is found by: a hash of everything that decides its payload.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of an ordered list of parts. Part boundaries count: `["ab", "c"]` and `["a", "bc"]` differ.
    pub fn of(parts: &[&[u8]]) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("einfall object cache 1");
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Key(*hasher.finalize().as_bytes())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({self})")
    }
}

/// How much a cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Entries.
    pub entries: u64,
    /// Bytes of all entries, headers included.
    pub bytes: u64,
}

/// A cache folder that was checked.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Opens a cache folder, making it (mode 0700) and its parents where they are missing.
    ///
    /// # Errors
    /// [`CacheError::Io`] where it cannot be made, [`CacheError::Owner`] and [`CacheError::Writable`] where its
    /// content could be another user's.
    pub fn open(folder: &Path) -> Result<Cache, CacheError> {
        let io = |source| CacheError::Io { path: folder.into(), source };
        if let Some(parent) = folder.parent() {
            fs::create_dir_all(parent).map_err(io)?;
        }
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        match builder.create(folder) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io(e)),
            Ok(()) | Err(_) => {}
        }
        let metadata = fs::metadata(folder).map_err(io)?;
        if !metadata.is_dir() {
            return Err(io(io::ErrorKind::NotADirectory.into()));
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            if metadata.uid() != rustix::process::geteuid().as_raw() {
                return Err(CacheError::Owner { path: folder.into(), owner: metadata.uid() });
            }
            if metadata.mode() & 0o022 != 0 {
                return Err(CacheError::Writable { path: folder.into(), mode: metadata.mode() & 0o7777 });
            }
        }
        Ok(Cache { folder: folder.into() })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    fn entry_path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{key}{SUFFIX}"))
    }

    /// The payload stored under `key`, if it is there and whole. An entry that is not is removed.
    pub fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let path = self.entry_path(key);
        match read_entry(&path, key) {
            Ok(payload) => Some(payload),
            Err(reason) => {
                if let Some(reason) = reason {
                    tracing::warn!(entry = %path.display(), reason, "cache entry is refused and will be rebuilt");
                    // What cannot be removed stays a miss.
                    let _ = fs::remove_file(&path);
                }
                None
            }
        }
    }

    /// Stores a payload under `key`, replacing what was there.
    ///
    /// # Errors
    /// [`CacheError::Io`] where the folder cannot be written, [`CacheError::Size`] for a payload above 256 MiB.
    pub fn put(&self, key: &Key, payload: &[u8]) -> Result<(), CacheError> {
        let path = self.entry_path(key);
        let io = |source| CacheError::Io { path: path.clone(), source };
        if payload.len() as u64 > MAX_PAYLOAD_BYTES {
            return Err(CacheError::Size { bytes: payload.len() as u64 });
        }
        // Mode 0600 by construction.
        let mut file = tempfile::Builder::new().prefix(PENDING).tempfile_in(&self.folder).map_err(io)?;
        file.write_all(&header(key, payload)).map_err(io)?;
        file.write_all(payload).map_err(io)?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(&path).map_err(|e| io(e.error))?;
        Ok(())
    }

    /// Counts the entries.
    ///
    /// # Errors
    /// [`CacheError::Io`] where the folder cannot be read.
    pub fn usage(&self) -> Result<Usage, CacheError> {
        let mut usage = Usage::default();
        for (path, bytes) in self.files()? {
            if path.extension().is_some() {
                usage.entries += 1;
                usage.bytes += bytes;
            }
        }
        Ok(usage)
    }

    /// Removes every entry (and what interrupted writers left) and returns what was removed. Files that are not the
    /// cache's stay.
    ///
    /// # Errors
    /// [`CacheError::Io`] at the first file that cannot be removed.
    pub fn clear(&self) -> Result<Usage, CacheError> {
        let mut removed = Usage::default();
        for (path, bytes) in self.files()? {
            match fs::remove_file(&path) {
                Ok(()) => {
                    removed.entries += 1;
                    removed.bytes += bytes;
                }
                // Another process cleared it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(CacheError::Io { path, source }),
            }
        }
        Ok(removed)
    }

    /// The cache's files and their sizes.
    fn files(&self) -> Result<Vec<(PathBuf, u64)>, CacheError> {
        let io = |source| CacheError::Io { path: self.folder.clone(), source };
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let is_entry = name
                .strip_suffix(SUFFIX)
                .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
            if is_entry || name.starts_with(PENDING) {
                // One that vanishes meanwhile counts nothing.
                let bytes = entry.metadata().map_or(0, |m| m.len());
                files.push((entry.path(), bytes));
            }
        }
        Ok(files)
    }
}

/// The header of an entry.
fn header(key: &Key, payload: &[u8]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..40].copy_from_slice(&key.0);
    bytes[40..48].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..48]);
    hasher.update(payload);
    bytes[48..].copy_from_slice(hasher.finalize().as_bytes());
    bytes
}

/// The payload of the entry at `path`; `Err(None)` where there is none, `Err(Some(reason))` where it is refused.
fn read_entry(path: &Path, key: &Key) -> Result<Vec<u8>, Option<&'static str>> {
    let unreadable = |e: io::Error| (e.kind() != io::ErrorKind::NotFound).then_some("it cannot be read");
    let link = fs::symlink_metadata(path).map_err(unreadable)?;
    if !link.is_file() {
        return Err(Some("it is not a regular file"));
    }
    let file = fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(Some("others could have written it"));
        }
    }
    if metadata.len() < HEADER_BYTES as u64 || metadata.len() > HEADER_BYTES as u64 + MAX_PAYLOAD_BYTES {
        return Err(Some("its size is wrong"));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    // A file that grows meanwhile is cut off here, and then its hash is wrong.
    file.take(metadata.len()).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() < HEADER_BYTES {
        return Err(Some("it is truncated"));
    }
    let payload = bytes.split_off(HEADER_BYTES);
    if bytes[..8] != MAGIC[..] {
        return Err(Some("its format is another"));
    }
    if bytes[..] != header(key, &payload)[..] {
        return Err(Some("it is damaged or not what its name says"));
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("parents").join("objects")).unwrap();
        (folder, cache)
    }

    #[test]
    fn what_is_put_comes_back_and_is_counted() {
        let (_folder, cache) = cache();
        let key = Key::of(&[b"text", b"target"]);
        assert_eq!(cache.get(&key), None);
        cache.put(&key, b"payload").unwrap();
        assert_eq!(cache.get(&key).unwrap(), b"payload");
        cache.put(&key, b"").unwrap();
        assert_eq!(cache.get(&key).unwrap(), b"");
        cache.put(&Key::of(&[b"other"]), &[7; 1000]).unwrap();
        assert_eq!(cache.usage().unwrap(), Usage { entries: 2, bytes: 1000 + 2 * HEADER_BYTES as u64 });
        fs::write(cache.path().join("notes.txt"), "mine").unwrap();
        fs::write(cache.path().join(format!("{PENDING}left")), "half").unwrap();
        assert_eq!(cache.clear().unwrap().entries, 3);
        assert_eq!(cache.usage().unwrap(), Usage::default());
        assert_eq!(cache.get(&key), None);
        assert!(cache.path().join("notes.txt").exists(), "a foreign file was removed");
    }

    #[test]
    fn part_boundaries_count() {
        assert_ne!(Key::of(&[b"ab", b"c"]), Key::of(&[b"a", b"bc"]));
        assert_ne!(Key::of(&[b"a"]), Key::of(&[b"a", b""]));
    }

    #[test]
    fn every_damage_is_a_miss_and_is_removed() {
        let (_folder, cache) = cache();
        let key = Key::of(&[b"k"]);
        let path = cache.entry_path(&key);
        cache.put(&key, b"some machine code").unwrap();
        let whole = fs::read(&path).unwrap();
        let refused = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.get(&key), None, "{what} was loaded");
            assert!(!path.exists(), "{what} was left");
        };
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            refused(&flipped, &format!("byte {at} flipped"));
        }
        for len in 0..whole.len() {
            refused(&whole[..len], &format!("truncated to {len}"));
        }
        refused(&[&whole[..], b"!"].concat(), "grown");
        // A whole entry of another key under this name.
        let other = Key::of(&[b"other"]);
        cache.put(&other, b"foreign").unwrap();
        refused(&fs::read(cache.entry_path(&other)).unwrap(), "foreign entry");
        cache.put(&key, b"some machine code").unwrap();
        assert_eq!(cache.get(&key).unwrap(), b"some machine code", "not rebuilt");
    }

    #[cfg(unix)]
    #[test]
    fn what_others_could_have_written_is_refused() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let (folder, cache) = cache();
        assert_eq!(fs::metadata(cache.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let key = Key::of(&[b"k"]);
        cache.put(&key, b"code").unwrap();
        let path = cache.entry_path(&key);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(cache.get(&key), None, "a group-writable entry was loaded");
        // A symbolic link to a whole entry.
        cache.put(&key, b"code").unwrap();
        let elsewhere = folder.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert_eq!(cache.get(&key), None, "a link was followed");

        for mode in [0o770, 0o707, 0o777] {
            fs::set_permissions(cache.path(), fs::Permissions::from_mode(mode)).unwrap();
            let error = Cache::open(cache.path()).unwrap_err();
            assert!(matches!(error, CacheError::Writable { mode: m, .. } if m == mode), "{error}");
        }
        // Only root may hand a folder to another user.
        let foreign = folder.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        if std::os::unix::fs::chown(&foreign, Some(12345), None).is_ok() {
            assert!(matches!(Cache::open(&foreign), Err(CacheError::Owner { owner: 12345, .. })));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Cache::open(&file.path().join("cache")), Err(CacheError::Io { .. })));
        assert!(matches!(Cache::open(file.path()), Err(CacheError::Io { .. })));
        let (folder, cache) = cache();
        drop(folder);
        assert!(matches!(cache.put(&Key::of(&[]), b"x"), Err(CacheError::Io { .. })));
        assert_eq!(cache.get(&Key::of(&[])), None);
    }

    #[test]
    fn readers_never_see_a_part() {
        let (_folder, cache) = cache();
        let key = Key::of(&[b"shared"]);
        let payload = |seed: u8| vec![seed; 4096 + seed as usize];
        std::thread::scope(|scope| {
            for seed in 0..3 {
                let cache = Cache::open(cache.path()).unwrap();
                scope.spawn(move || (0..40).for_each(|_| cache.put(&key, &payload(seed)).unwrap()));
            }
            let cache = &cache;
            scope.spawn(move || {
                for _ in 0..400 {
                    if let Some(bytes) = cache.get(&key) {
                        assert_eq!(bytes, payload(bytes[0]));
                    }
                }
            });
        });
        assert_eq!(cache.usage().unwrap().entries, 1);
    }
}
