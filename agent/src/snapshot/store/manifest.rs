//! The manifest of a generation: what it is, and of which chunks its entries consist.
//!
//! As a file: `ftd-snap`, format (u32), body, blake3 of all that. The checksum is looked at first: a flipped bit
//! is damage, wherever it is, and only a format that was written so is a newer one.

use std::{collections::HashSet, path::Path, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    cut::MAX_CHUNK,
    error::{Error, Result},
};

const MAGIC: &[u8; 8] = b"ftd-snap";
const HEAD: usize = MAGIC.len() + 4;
const HASH: usize = blake3::OUT_LEN;
/// The newest format of manifests, packs and streams that is known here.
pub(super) const FORMAT: u32 = 1;

/// The name of a chunk: the blake3 hash of its content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Id(pub(super) [u8; HASH]);

impl Id {
    pub(super) fn of(content: &[u8]) -> Self {
        Self(blake3::hash(content).into())
    }
}

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex()[..16])
    }
}

/// What is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Files only.
    Files,
    /// Files, and the images of running processes.
    Process,
}

/// What a generation is of, and when and where it was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The workload's name.
    pub workload: String,
    /// What was taken.
    pub kind: Kind,
    /// The node that took it.
    pub node: String,
    /// That node's boot, see random(4): process images belong to it.
    pub boot_id: String,
    /// When.
    pub time: jiff::Timestamp,
}

/// What it cost to take a generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Bytes of all its entries.
    pub total: u64,
    /// Of these, in chunks that the store did not have.
    pub new: u64,
    /// Bytes that were written for those: compressed, with what is around them.
    pub stored: u64,
    /// From the beginning of the draft until all its chunks were on disk.
    pub duration: Duration,
}

/// What the caller says of an entry; the store only keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// What kind of thing the entry is, such as `file`.
    pub kind: String,
    /// All else, as JSON.
    json: String,
}

impl Metadata {
    /// Metadata of this kind.
    pub fn new(kind: &str, value: &impl Serialize) -> serde_json::Result<Self> {
        Ok(Self { kind: kind.to_owned(), json: serde_json::to_string(value)? })
    }

    /// What was given to [`Metadata::new`].
    pub fn get<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(&self.json)
    }
}

/// A part of an entry's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Chunk {
    /// A chunk of the store.
    Data { id: Id, len: u32 },
    /// Zeros, of which nothing is stored.
    Zeros { len: u64 },
}

impl Chunk {
    pub(super) fn len(self) -> u64 {
        match self {
            Self::Data { len, .. } => u64::from(len),
            Self::Zeros { len } => len,
        }
    }
}

/// A named content in a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name, once in a generation.
    pub name: String,
    /// What the caller said of it.
    pub metadata: Metadata,
    /// Its length in bytes.
    pub size: u64,
    pub(super) chunks: Vec<Chunk>,
}

/// All that is known of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What it is.
    pub about: About,
    /// Its number here: each generation of a workload has a higher one than those before it.
    pub number: u64,
    /// The number that it had where it was taken, when it has come from another store.
    pub origin: Option<u64>,
    /// What it cost to take it.
    pub stats: Stats,
    /// Its entries, in the order in which they were added.
    pub entries: Vec<Entry>,
}

impl Manifest {
    /// The entry of this name.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.position(name).map(|entry| &self.entries[entry])
    }

    /// Where in the list that is.
    pub(super) fn position(&self, name: &str) -> Result<usize> {
        self.entries.iter().position(|entry| entry.name == name).ok_or_else(|| Error::NoEntry {
            workload: self.about.workload.clone(),
            number: self.number,
            entry: name.to_owned(),
        })
    }

    /// All chunks that the store must have for it, with repetitions.
    pub(super) fn data(&self) -> impl Iterator<Item = (Id, u32)> {
        self.entries.iter().flat_map(|entry| &entry.chunks).filter_map(|chunk| match chunk {
            Chunk::Data { id, len } => Some((*id, *len)),
            Chunk::Zeros { .. } => None,
        })
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = [MAGIC.as_slice(), &FORMAT.to_le_bytes()].concat();
        bytes = postcard::to_extend(self, bytes)
            .map_err(|error| Error::stream(format!("its manifest cannot be written: {error}")))?;
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        Ok(bytes)
    }

    /// The manifest in these bytes. `path` is where they are from, for the error's text.
    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Self> {
        let broken = |cause: &str| Error::damaged(path, cause);
        let (sealed, hash) = bytes.split_last_chunk::<HASH>().ok_or_else(|| broken("it is too short"))?;
        if blake3::hash(sealed) != *hash {
            return Err(broken("its checksum does not fit"));
        }
        let (head, body) = sealed.split_at_checked(HEAD).ok_or_else(|| broken("it is too short"))?;
        let format = head
            .strip_prefix(MAGIC)
            .and_then(|format| format.try_into().ok())
            .ok_or_else(|| broken("it is no manifest"))?;
        let format = u32::from_le_bytes(format);
        if format > FORMAT {
            return Err(Error::Newer { path: path.to_owned(), found: format, known: FORMAT });
        }
        let (manifest, rest): (Self, _) =
            postcard::take_from_bytes(body).map_err(|error| broken(&error.to_string()))?;
        match manifest.flaw() {
            None if rest.is_empty() => Ok(manifest),
            None => Err(broken("there is something behind its end")),
            Some(flaw) => Err(broken(flaw)),
        }
    }

    /// What keeps it from being used, though each field for itself could be read.
    fn flaw(&self) -> Option<&'static str> {
        let mut names = HashSet::new();
        for entry in &self.entries {
            let sum = entry.chunks.iter().try_fold(0_u64, |sum, chunk| sum.checked_add(chunk.len()));
            if sum != Some(entry.size) {
                return Some("an entry is not as long as its chunks");
            }
            let sound = |chunk: &Chunk| match chunk {
                Chunk::Data { len, .. } => (1..=MAX_CHUNK).contains(len),
                Chunk::Zeros { len } => *len > 0,
            };
            if !entry.chunks.iter().all(sound) {
                return Some("a chunk is empty or too large");
            }
            if !names.insert(&entry.name) {
                return Some("two entries have the same name");
            }
        }
        // So that there are always numbers after it.
        if self.number.max(self.origin.unwrap_or(0)) > u64::MAX / 2 {
            return Some("its number is too large");
        }
        name_flaw(&self.about.workload)
    }
}

/// What is wrong with the name of a workload, which becomes that of a directory.
pub(super) fn name_flaw(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.len() > 200 {
        return Some("it is longer than 200 bytes");
    }
    if name.starts_with('.') {
        return Some("it begins with a dot");
    }
    name.contains(['/', '\0']).then_some("it has a slash or a NUL in it")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::store::tests::about;

    fn manifest() -> Manifest {
        let chunk = Chunk::Data { id: Id::of(b"abc"), len: 3 };
        let metadata = Metadata::new("file", &(0o644, "root")).unwrap();
        let entry =
            Entry { name: "a".into(), metadata, size: 8, chunks: vec![chunk, Chunk::Zeros { len: 5 }] };
        Manifest {
            about: about("w"),
            number: 3,
            origin: Some(7),
            stats: Stats::default(),
            entries: vec![entry],
        }
    }

    /// The bytes of a manifest with this body and a right checksum.
    fn sealed(format: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = [MAGIC.as_slice(), &format.to_le_bytes(), body].concat();
        bytes.extend(blake3::hash(&bytes).as_bytes());
        bytes
    }

    #[test]
    fn what_is_written_is_read_and_any_flipped_bit_is_seen() {
        let bytes = manifest().encode().unwrap();
        let path = Path::new("m");
        let read = Manifest::decode(&bytes, path).unwrap();
        assert_eq!(read, manifest());
        assert_eq!(read.entries[0].metadata.get::<(u32, String)>().unwrap(), (0o644, "root".into()));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Manifest::decode(&flipped, path), Err(Error::Damaged { .. })), "{bit}");
        }
    }

    #[test]
    fn a_newer_format_is_refused_as_such() {
        let error = Manifest::decode(&sealed(FORMAT + 1, b"whatever"), Path::new("m")).unwrap_err();
        assert!(matches!(error, Error::Newer { found: 2, known: 1, .. }));
        assert!(error.to_string().contains("install the ftd that wrote it"), "{error}");
    }

    #[test]
    fn a_manifest_that_does_not_add_up_is_refused() {
        let refused = |change: fn(&mut Manifest)| {
            let mut manifest = manifest();
            change(&mut manifest);
            Manifest::decode(&manifest.encode().unwrap(), Path::new("m")).unwrap_err().to_string()
        };
        assert!(refused(|m| m.entries[0].size = 9).contains("not as long"));
        assert!(refused(|m| m.entries[0].chunks[1] = Chunk::Zeros { len: u64::MAX }).contains("not as long"));
        assert!(refused(|m| m.about.workload = "../x".into()).contains("dot"));
        assert!(refused(|m| m.about.workload = "a/x".into()).contains("slash"));
        assert!(refused(|m| m.entries.push(m.entries[0].clone())).contains("same name"));
        let large = Chunk::Data { id: Id::of(b""), len: MAX_CHUNK + 1 };
        let error = {
            let mut manifest = manifest();
            manifest.entries[0].chunks = vec![large];
            manifest.entries[0].size = large.len();
            Manifest::decode(&manifest.encode().unwrap(), Path::new("m")).unwrap_err().to_string()
        };
        assert!(error.contains("too large"), "{error}");
    }

    proptest! {
        #[test]
        fn noise_is_refused_and_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(Manifest::decode(&bytes, Path::new("m")).is_err());
            // And as if somebody had made a checksum for it.
            let _ = Manifest::decode(&sealed(FORMAT, &bytes), Path::new("m"));
        }
    }
}
