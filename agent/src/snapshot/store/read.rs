//! Reading a generation.

use std::{
    io::{self, BufRead, Read},
    sync::Arc,
};

use super::{
    Store,
    error::{Error, Result},
    index::Index,
    manifest::{Chunk, Entry, Id, Manifest},
    pack::{Pack, Record, Slot},
};

/// How often is looked for chunks that gc may just have put elsewhere. It moves a chunk once in its run, which
/// takes longer than looking.
const LOOKS: u32 = 5;

/// A generation that is open: it can be read to its end, whatever is removed meanwhile.
#[derive(Debug, Clone)]
pub struct Snapshot {
    store: Store,
    manifest: Arc<Manifest>,
    index: Arc<Index>,
}

impl Snapshot {
    pub(super) fn open(store: Store, workload: &str, number: u64) -> Result<Self> {
        let manifest = store.manifest(workload, number)?;
        let mut index = store.index();
        for _ in 0..LOOKS {
            if manifest.data().all(|(id, _)| index.find(id).is_some()) {
                break;
            }
            index = store.refresh()?;
            // Its chunks may be gone because it is.
            store.manifest(workload, number)?;
        }
        // What is missing now is damage: who reads there is told, and all else can be read.
        Ok(Self { store, manifest: Arc::new(manifest), index })
    }

    /// What the generation consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The content of the entry of this name. A damaged chunk is an error of kind
    /// [`InvalidData`](io::ErrorKind::InvalidData) that names it; not one byte of such a chunk is given out.
    pub fn open_entry(&self, name: &str) -> Result<EntryReader> {
        let entry = self.manifest.position(name)?;
        let unpacker = Unpacker::new()?;
        let (content, at) = (Vec::new(), 0);
        Ok(EntryReader { snapshot: self.clone(), entry, next: 0, offset: 0, unpacker, content, at, zeros: 0 })
    }

    /// The error of this chunk, where it first stands.
    pub(super) fn chunk_error(&self, id: Id, cause: String) -> Error {
        for entry in &self.manifest.entries {
            let mut offset = 0;
            for chunk in &entry.chunks {
                if matches!(chunk, Chunk::Data { id: of, .. } if *of == id) {
                    return self.error(entry, offset, cause);
                }
                offset += chunk.len();
            }
        }
        Error::stream(cause)
    }

    pub(super) fn error(&self, entry: &Entry, offset: u64, cause: String) -> Error {
        Error::Chunk {
            workload: self.manifest.about.workload.clone(),
            number: self.manifest.number,
            entry: entry.name.clone(),
            offset,
            cause,
        }
    }

    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }
}

/// Gets chunks out of packs.
pub(super) struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    pub(super) stored: Vec<u8>,
}

impl Unpacker {
    pub(super) fn new() -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new()
            .map_err(|source| Error::Source { what: "cannot decompress".into(), source })?;
        Ok(Self { zstd, stored: Vec::new() })
    }

    /// One copy of a chunk, checked; its stored bytes are in `stored` after this.
    pub(super) fn unpack(&mut self, pack: &Pack, slot: &Slot, content: &mut Vec<u8>) -> Result<(), String> {
        let path = pack.path.display();
        pack.read(slot, &mut self.stored).map_err(|error| format!("cannot read {path}: {error}"))?;
        let unpacked = slot.record.unpack(&self.stored, &mut self.zstd, content);
        unpacked.map_err(|cause| format!("{cause}, in {path}"))
    }

    /// The chunk that is stored as these bytes by somebody else, checked.
    pub(super) fn check(&mut self, record: &Record, content: &mut Vec<u8>) -> Result<(), &'static str> {
        record.unpack(&self.stored, &mut self.zstd, content)
    }

    /// A chunk, from any copy that is as it should be. Answers the one that it was.
    pub(super) fn fetch<'a>(
        &mut self,
        store: &Store,
        index: &'a Index,
        (id, len): (Id, u32),
        content: &mut Vec<u8>,
    ) -> Result<&'a Slot, String> {
        let (pack, slot) = index.find(id).ok_or("its chunk is in no pack")?;
        let mut result = self.unpack(pack, slot, content).map(|()| slot);
        if result.is_err() {
            for (pack, slot) in index.copies(id) {
                if self.unpack(pack, slot, content).is_ok() {
                    result = Ok(slot);
                    break;
                }
            }
        }
        if result.is_err() {
            store.distrusted().insert(id);
        } else if content.len() as u64 != u64::from(len) {
            return Err("its chunk is not as long as the manifest says".into());
        }
        result
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

/// Reads an entry's content; each chunk is checked before any of it is given out.
#[derive(Debug)]
pub struct EntryReader {
    snapshot: Snapshot,
    entry: usize,
    /// The next chunk, and where in the entry it begins.
    next: usize,
    offset: u64,
    unpacker: Unpacker,
    content: Vec<u8>,
    at: usize,
    /// Zeros that are to be given out after `content`.
    zeros: u64,
}

/// What zeros are given out from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl EntryReader {
    /// Gets the next chunk; at the end there is none.
    fn advance(&mut self) -> Result<()> {
        let Snapshot { store, manifest, index } = &self.snapshot;
        let Some(entry) = manifest.entries.get(self.entry) else { return Ok(()) };
        let Some(chunk) = entry.chunks.get(self.next) else { return Ok(()) };
        (self.at, self.zeros) = (0, 0);
        self.content.clear();
        match *chunk {
            Chunk::Zeros { len } => self.zeros = len,
            Chunk::Data { id, len } => {
                let fetched = self.unpacker.fetch(store, index, (id, len), &mut self.content);
                if let Err(cause) = fetched {
                    self.content.clear();
                    return Err(self.snapshot.error(entry, self.offset, cause));
                }
            }
        }
        self.next += 1;
        self.offset += chunk.len();
        Ok(())
    }
}

impl BufRead for EntryReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.content.len() && self.zeros == 0 {
            self.advance().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        if self.at < self.content.len() {
            return Ok(&self.content[self.at..]);
        }
        let zeros = usize::try_from(self.zeros).unwrap_or(usize::MAX);
        Ok(&ZEROS[..zeros.min(ZEROS.len())])
    }

    fn consume(&mut self, count: usize) {
        if self.at < self.content.len() {
            self.at += count;
        } else {
            self.zeros -= count as u64;
        }
    }
}

impl Read for EntryReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        self.consume(count);
        Ok(count)
    }
}
