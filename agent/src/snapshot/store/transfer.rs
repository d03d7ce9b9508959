//! A generation as one stream, for another store or for keeping.
//!
//! ```text
//! ftd-strm, format, good (u32)   lengths of the manifest and of all that follows it   the manifest, as its file is
//! of each chunk, in the order of the manifest, once: head and content as in a pack    blake3 of all that
//! ```
//!
//! A stream is complete: what the other store has already is only not written there. It is checked piece by piece as
//! it arrives, and becomes a generation when the last byte was right; until then it is a draft like any other.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    path::Path,
};

use super::{
    Generation, Store,
    error::{Error, Result},
    manifest::{FORMAT, Id, Manifest},
    pack::{HEAD, Record},
    packing::{Packing, Quota},
    read::Unpacker,
};

const MAGIC: &[u8; 8] = b"ftd-strm";
const START: usize = 8 + 4 + 4 + 8 + 8;
/// A manifest is not larger: one of a terabyte of memory would be a fifth of it.
const MAX_MANIFEST: u64 = 1 << 30;

impl Store {
    /// Writes a generation as one stream. Answers its length.
    pub fn export(&self, workload: &str, number: u64, out: impl Write) -> Result<u64> {
        let snapshot = self.snapshot(workload, number)?;
        let (manifest, index) = (snapshot.manifest(), snapshot.index());
        let mut seen = HashSet::new();
        let distinct: Vec<_> = manifest.data().filter(|(id, _)| seen.insert(*id)).collect();
        let stored = |id| index.find(id).map_or(0, |(_, slot)| HEAD as u64 + u64::from(slot.record.stored));
        let length: u64 = distinct.iter().map(|(id, _)| stored(*id)).sum();
        let encoded = manifest.encode()?;
        let mut out = Hashed::new(out);
        let failed = |source| Error::Source { what: "cannot write the export".into(), source };
        let good = u32::from(self.good_path(workload, number).exists());
        let numbers = [FORMAT.to_le_bytes(), good.to_le_bytes()].concat();
        let lengths = [(encoded.len() as u64).to_le_bytes(), length.to_le_bytes()].concat();
        out.write_all(&[MAGIC, &*numbers, &*lengths, &*encoded].concat()).map_err(failed)?;
        let (mut unpacker, mut content) = (Unpacker::new()?, Vec::new());
        for (id, len) in distinct {
            let slot = unpacker
                .fetch(self, index, (id, len), &mut content)
                .map_err(|cause| snapshot.chunk_error(id, cause))?;
            out.write_all(&slot.record.encode()).map_err(failed)?;
            out.write_all(&unpacker.stored).map_err(failed)?;
        }
        let hash = out.hasher.finalize();
        out.write_all(hash.as_bytes()).and_then(|()| out.inner.flush()).map_err(failed)?;
        Ok(out.count)
    }

    /// Makes a generation of a stream that [`Store::export`] has written, good if it was. Its number is the one that it
    /// had, or the next here if that is higher. If it has come before, it is answered as it is. `progress` is told
    /// how many bytes of how many are done.
    pub fn import(&self, reader: impl Read, mut progress: impl FnMut(u64, u64)) -> Result<Generation> {
        let (mut incoming, mut manifest, good) = Incoming::begin(reader)?;
        let lock = self.lock_writer()?;
        manifest.origin.get_or_insert(manifest.number);
        let known = self.generations(&manifest.about.workload)?.into_iter().find(|generation| {
            generation.about == manifest.about
                && generation.origin.unwrap_or(generation.number) == manifest.origin.unwrap_or(0)
        });
        if let Some(known) = known {
            return self.marked(known, good);
        }
        let index = self.refresh()?;
        let distrusted = self.distrusted().clone();
        let mut packing = Packing::new(self, Quota::of(self)?);
        packing.quota().check(1)?;
        let (mut unpacker, mut content, mut new) = (Unpacker::new()?, Vec::new(), HashSet::new());
        manifest.stats.new = 0;
        while let Some(record) = incoming.next(&mut unpacker.stored)? {
            unpacker.check(&record, &mut content).map_err(Error::stream)?;
            if index.find(record.id).is_none() || distrusted.contains(&record.id) {
                manifest.stats.new += u64::from(record.len);
                new.insert(record.id);
                packing.put(record, &unpacker.stored)?;
            }
            progress(incoming.reader.count, incoming.length);
        }
        incoming.end()?;
        manifest.stats.stored = packing.bytes();
        let generation = self.publish(packing, manifest)?;
        self.distrusted().retain(|id| !new.contains(id));
        drop(lock);
        self.marked(generation, good)
    }

    fn marked(&self, mut generation: Generation, good: bool) -> Result<Generation> {
        if good && !generation.good {
            self.mark_good(&generation.about.workload, generation.number)?;
            generation.good = true;
        }
        Ok(generation)
    }
}

/// A stream that is being read.
pub(super) struct Incoming<R> {
    reader: Hashed<R>,
    /// Chunks that are still to come.
    awaited: std::vec::IntoIter<(Id, u32)>,
    /// Of the whole stream, as its beginning says.
    length: u64,
}

impl<R: Read> Incoming<R> {
    /// Reads what is before the chunks: the manifest, and whether the generation is good.
    pub(super) fn begin(reader: R) -> Result<(Self, Manifest, bool)> {
        let mut reader = Hashed::new(reader);
        let mut bytes = Vec::new();
        reader.take_exactly(START as u64, &mut bytes)?;
        let mut numbers = bytes.get(8..).unwrap_or_default();
        if !bytes.starts_with(MAGIC) {
            return Err(Error::stream("it is not an exported snapshot"));
        }
        let (format, good) = (number::<4>(&mut numbers), number::<4>(&mut numbers));
        let (size, length) = (number::<8>(&mut numbers), number::<8>(&mut numbers));
        if format > u64::from(FORMAT) {
            let found = format as u32;
            return Err(Error::Newer { path: Path::new("the import").to_owned(), found, known: FORMAT });
        }
        if size > MAX_MANIFEST {
            return Err(Error::stream("its manifest is too large"));
        }
        reader.take_exactly(size, &mut bytes)?;
        let manifest = Manifest::decode(&bytes, Path::new("the manifest in the import"))?;
        let mut seen = HashSet::new();
        let awaited: Vec<_> = manifest.data().filter(|(id, _)| seen.insert(*id)).collect();
        let length = reader.count.saturating_add(length).saturating_add(blake3::OUT_LEN as u64);
        Ok((Self { reader, awaited: awaited.into_iter(), length }, manifest, good == 1))
    }

    /// The next chunk, its stored bytes into `stored`; they are those that its head tells of.
    pub(super) fn next(&mut self, stored: &mut Vec<u8>) -> Result<Option<Record>> {
        let Some((id, len)) = self.awaited.next() else { return Ok(None) };
        self.reader.take_exactly(HEAD as u64, stored)?;
        let record = Record::decode(stored)
            .filter(|record| record.id == id && record.len == len)
            .ok_or_else(|| Error::stream("the head of a chunk is not the one that should be there"))?;
        self.reader.take_exactly(u64::from(record.stored), stored)?;
        Ok(Some(record))
    }

    /// Reads what is behind the chunks.
    pub(super) fn end(mut self) -> Result<()> {
        let hash = self.reader.hasher.finalize();
        let mut bytes = Vec::new();
        self.reader.take_exactly(blake3::OUT_LEN as u64, &mut bytes)?;
        if bytes != hash.as_bytes() {
            return Err(Error::stream("its checksum does not fit"));
        }
        if self.reader.count != self.length {
            return Err(Error::stream("it is not as long as its beginning says"));
        }
        Ok(())
    }
}

/// The number in the next `N` bytes, at most eight.
fn number<const N: usize>(bytes: &mut &[u8]) -> u64 {
    let mut number = [0; 8];
    if let Some((first, rest)) = bytes.split_first_chunk::<N>() {
        number[..N].copy_from_slice(first);
        *bytes = rest;
    }
    u64::from_le_bytes(number)
}

/// Passes bytes on, and hashes and counts them.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
    count: u64,
}

impl<T> Hashed<T> {
    fn new(inner: T) -> Self {
        Self { inner, hasher: blake3::Hasher::new(), count: 0 }
    }
}

impl<T: Write> Hashed<T> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.count += bytes.len() as u64;
        self.inner.write_all(bytes)
    }
}

impl<T: Read> Hashed<T> {
    /// Reads so many bytes, not one less. Memory is taken as they come: a wrong length costs nothing.
    fn take_exactly(&mut self, count: u64, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        let read = self.inner.by_ref().take(count).read_to_end(bytes);
        let read = read.map_err(|source| Error::Source { what: "cannot read the import".into(), source })?;
        self.hasher.update(bytes);
        self.count += read as u64;
        if (read as u64) < count {
            return Err(Error::stream(format!("it is cut short: it ends after {} bytes", self.count)));
        }
        Ok(())
    }
}
