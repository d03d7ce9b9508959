//! A pack: a file of chunks, written once.
//!
//! ```text
//! ftd-pack, format | of each chunk: head, content (zstd, or as it is) | gap, all heads once more, tail
//! ```
//!
//! A head says which chunk it is and how long, with a checksum of the stored content. The copy of all heads at the
//! end, under one checksum, is the index: opening a pack reads only that. If it is damaged, the pack is opened
//! all the same, by going from head to head: one flipped bit never costs more than one chunk.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::{
    cut::MAX_CHUNK,
    disk::Disk,
    error::{Error, Result},
    manifest::{FORMAT, Id},
};

const START: &[u8; 8] = b"ftd-pack";
const END: &[u8; 8] = b"ftd-pend";
/// `START` and the format.
const FIRST: u64 = 12;
/// Chunk id, its length, stored length, checksum of what is stored, checksum of this head.
pub(super) const HEAD: usize = 32 + 4 + 4 + 4 + 4;
/// Format, length of the index, blake3 of the index and these two, `END`; in all formats to come.
const TAIL: usize = 4 + 4 + 32 + 8;
/// A pack is written in pieces of this size.
const PIECE: usize = 1 << 20;

/// What a head says of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) id: Id,
    /// Bytes of its content.
    pub(super) len: u32,
    /// Bytes that are stored of it; as many as `len` when they are not compressed.
    pub(super) stored: u32,
    /// crc32 of the stored bytes.
    pub(super) crc: u32,
}

impl Record {
    /// The record of a chunk and its stored bytes.
    pub(super) fn new(id: Id, len: usize, stored: &[u8]) -> Self {
        Self { id, len: len as u32, stored: stored.len() as u32, crc: crc32fast::hash(stored) }
    }

    /// What it takes in a pack: two heads and its content.
    pub(super) fn cost(&self) -> u64 {
        2 * HEAD as u64 + u64::from(self.stored)
    }

    pub(super) fn encode(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..32].copy_from_slice(&self.id.0);
        head[32..36].copy_from_slice(&self.len.to_le_bytes());
        head[36..40].copy_from_slice(&self.stored.to_le_bytes());
        head[40..44].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32fast::hash(&head[..44]);
        head[44..].copy_from_slice(&crc.to_le_bytes());
        head
    }

    pub(super) fn decode(head: &[u8]) -> Option<Self> {
        let (id, rest) = head.split_first_chunk::<32>()?;
        let mut numbers = rest.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let (len, stored, crc) = (numbers.next()?, numbers.next()?, numbers.next()?);
        let right = numbers.next()? == crc32fast::hash(head.get(..44)?);
        let sound = right && stored > 0 && stored <= len && len <= MAX_CHUNK;
        sound.then_some(Self { id: Id(*id), len, stored, crc })
    }

    /// Whether `stored` is what was written.
    pub(super) fn check(&self, stored: &[u8]) -> Result<(), &'static str> {
        let right = stored.len() as u64 == u64::from(self.stored) && crc32fast::hash(stored) == self.crc;
        right.then_some(()).ok_or("the checksum of what is stored does not fit")
    }

    /// The chunk's content from what is stored, into `content`; checked.
    pub(super) fn unpack(
        &self,
        stored: &[u8],
        zstd: &mut zstd::bulk::Decompressor<'static>,
        content: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        self.check(stored)?;
        content.clear();
        if self.stored == self.len {
            content.extend_from_slice(stored);
        } else {
            // The capacity bounds what zstd writes.
            content.reserve(self.len as usize);
            zstd.decompress_to_buffer(stored, content).map_err(|_| "it cannot be decompressed")?;
        }
        let right = content.len() as u64 == u64::from(self.len) && Id::of(content) == self.id;
        right.then_some(()).ok_or("its hash does not fit")
    }
}

/// A record, and where in the pack its stored bytes begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) record: Record,
    offset: u64,
}

/// A pack that is open for reading. It can be read as long as this lives, even when it has been removed.
#[derive(Debug)]
pub(super) struct Pack {
    pub(super) path: PathBuf,
    file: File,
    /// The file's length.
    pub(super) len: u64,
    pub(super) slots: Vec<Slot>,
    /// Why the index could not be used, in which case the heads were.
    pub(super) flaw: Option<&'static str>,
}

impl Pack {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len = file.metadata().map_err(Error::io("read", path))?.len();
        let (slots, flaw) = match index(&file, len).map_err(Error::io("read", path))? {
            Ok((format, _)) if format > FORMAT => {
                return Err(Error::Newer { path: path.to_owned(), found: format, known: FORMAT });
            }
            Ok((_, records)) => (slots(records), None),
            Err(flaw) => (scan(&file, len).map_err(Error::io("read", path))?, Some(flaw)),
        };
        Ok(Self { path: path.to_owned(), file, len, slots, flaw })
    }

    /// Reads what is stored of a chunk, unchecked.
    pub(super) fn read(&self, slot: &Slot, stored: &mut Vec<u8>) -> io::Result<()> {
        stored.resize(slot.record.stored as usize, 0);
        self.file.read_exact_at(stored, slot.offset)
    }

    /// What is damaged outside of the chunks' content.
    pub(super) fn frame_flaws(&self) -> io::Result<Vec<&'static str>> {
        let mut flaws = Vec::from_iter(self.flaw);
        let mut first = [0; FIRST as usize];
        if self.len < FIRST || self.file.read_exact_at(&mut first, 0).is_err() || first != start() {
            flaws.push("its beginning is not that of a pack");
        }
        let mut head = [0; HEAD];
        for slot in &self.slots {
            self.file.read_exact_at(&mut head, slot.offset - HEAD as u64)?;
            if Record::decode(&head) != Some(slot.record) {
                flaws.push("the head of a chunk is not that of the index");
            }
        }
        Ok(flaws)
    }
}

fn start() -> [u8; FIRST as usize] {
    let mut bytes = [0; FIRST as usize];
    bytes[..8].copy_from_slice(START);
    bytes[8..].copy_from_slice(&FORMAT.to_le_bytes());
    bytes
}

/// The format and the records of a pack by its index, or what is wrong with that.
fn index(file: &File, len: u64) -> io::Result<Result<(u32, Vec<Record>), &'static str>> {
    let Some(end) = len.checked_sub(FIRST + TAIL as u64) else { return Ok(Err("it is too short")) };
    let mut tail = [0; TAIL];
    file.read_exact_at(&mut tail, len - TAIL as u64)?;
    let size = index_len(&tail);
    if size > end {
        return Ok(Err("its index is damaged"));
    }
    let mut bytes = vec![0; size as usize + TAIL];
    file.read_exact_at(&mut bytes, FIRST + end - size)?;
    Ok(decode_index(&bytes, len))
}

/// How long the index is, by the pack's tail.
fn index_len(tail: &[u8; TAIL]) -> u64 {
    tail[4..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes).into())
}

/// The format and the records in the index of a pack of this length.
pub(super) fn decode_index(bytes: &[u8], len: u64) -> Result<(u32, Vec<Record>), &'static str> {
    let (heads, tail) = bytes.split_last_chunk::<TAIL>().ok_or("it is too short")?;
    let (sealed, end) = bytes.split_at(bytes.len() - 40);
    if &end[32..] != END || *blake3::hash(sealed).as_bytes() != end[..32] {
        return Err("its index is damaged");
    }
    let format = tail.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if format > FORMAT {
        return Ok((format, Vec::new()));
    }
    // The gap is what ends a scan: where there should be a head, there is none.
    let Some((gap, heads)) = heads.split_first_chunk::<HEAD>() else { return Err("it is too short") };
    let (heads, rest) = heads.as_chunks::<HEAD>();
    let records: Vec<_> = heads.iter().map_while(|head| Record::decode(head)).collect();
    let total = records.iter().map(Record::cost).sum::<u64>() + Writer::EMPTY;
    let whole = *gap == [0; HEAD] && rest.is_empty() && records.len() == heads.len() && total == len;
    whole.then_some((format, records)).ok_or("its index does not fit its length")
}

fn slots(records: Vec<Record>) -> Vec<Slot> {
    let mut at = FIRST;
    records
        .into_iter()
        .map(|record| {
            let offset = at + HEAD as u64;
            at = offset + u64::from(record.stored);
            Slot { record, offset }
        })
        .collect()
}

/// The chunks of a pack whose index is damaged, by their heads, up to the first that is damaged too, or the gap.
fn scan(file: &File, len: u64) -> io::Result<Vec<Slot>> {
    let (mut at, mut found, mut head) = (FIRST, Vec::new(), [0; HEAD]);
    while at + HEAD as u64 <= len {
        file.read_exact_at(&mut head, at)?;
        let offset = at + HEAD as u64;
        let Some(record) = Record::decode(&head) else { break };
        at = offset + u64::from(record.stored);
        if at > len {
            break;
        }
        found.push(Slot { record, offset });
    }
    Ok(found)
}

/// A pack that is being written, under a name that no reader looks at.
#[derive(Debug)]
pub(super) struct Writer {
    disk: Disk,
    path: PathBuf,
    file: File,
    records: Vec<Record>,
    pending: Vec<u8>,
    /// What the pack will take when it is finished as it is.
    pub(super) len: u64,
}

impl Writer {
    /// What a pack without chunks takes.
    pub(super) const EMPTY: u64 = FIRST + (HEAD + TAIL) as u64;

    pub(super) fn create(disk: &Disk, path: &Path) -> Result<Self> {
        let file = disk.create(path)?;
        Ok(Self {
            disk: disk.clone(),
            path: path.to_owned(),
            file,
            records: Vec::new(),
            pending: start().to_vec(),
            len: Self::EMPTY,
        })
    }

    /// Adds a chunk, as it is stored.
    pub(super) fn append(&mut self, record: Record, stored: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(&record.encode());
        self.pending.extend_from_slice(stored);
        self.records.push(record);
        self.len += record.cost();
        if self.pending.len() >= PIECE { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<()> {
        self.disk.append(&self.path, &self.file, &self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// Completes the pack and makes its content durable; the file still has to get its name.
    pub(super) fn finish(mut self) -> Result<PathBuf> {
        self.pending.extend_from_slice(&encode_index(&self.records));
        self.write()?;
        self.disk.sync(&self.path, &self.file)?;
        Ok(self.path)
    }
}

fn encode_index(records: &[Record]) -> Vec<u8> {
    let mut bytes = vec![0; HEAD];
    bytes.extend(records.iter().flat_map(Record::encode));
    let len = bytes.len() as u32;
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    bytes.extend(END);
    bytes
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use proptest::prelude::*;

    use super::*;

    fn records(count: u8) -> (Vec<Record>, Vec<Vec<u8>>) {
        let contents: Vec<_> = (0..count).map(|i| vec![i; 10 + usize::from(i)]).collect();
        (contents.iter().map(|c| Record::new(Id::of(c), c.len(), c)).collect(), contents)
    }

    fn written(path: &Path, count: u8) -> Vec<Record> {
        let (records, contents) = records(count);
        let mut writer = Writer::create(&Disk::default(), path).unwrap();
        for (record, content) in records.iter().zip(&contents) {
            writer.append(*record, content).unwrap();
        }
        let len = writer.len;
        writer.finish().unwrap();
        assert_eq!(fs::metadata(path).unwrap().len(), len);
        records
    }

    /// The chunks of a pack that are as they were written.
    fn sound(pack: &Pack) -> Vec<Record> {
        let (mut stored, mut content) = (Vec::new(), Vec::new());
        let mut zstd = zstd::bulk::Decompressor::new().unwrap();
        let mut sound = |slot: &Slot| {
            pack.read(slot, &mut stored).unwrap();
            slot.record.unpack(&stored, &mut zstd, &mut content).is_ok()
        };
        pack.slots.iter().filter(|slot| sound(slot)).map(|slot| slot.record).collect()
    }

    #[test]
    fn one_flipped_bit_is_seen_and_costs_at_most_one_chunk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.pack");
        let records = written(&path, 5);
        let pack = Pack::open(&path).unwrap();
        assert_eq!((sound(&pack), pack.frame_flaws().unwrap()), (records.clone(), vec![]));
        let bytes = fs::read(&path).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            File::create(&path).unwrap().write_all(&flipped).unwrap();
            let pack = Pack::open(&path).unwrap();
            let sound = sound(&pack);
            assert!(sound.len() + 1 >= records.len(), "{bit}: {sound:?}");
            assert!(sound.len() < records.len() || !pack.frame_flaws().unwrap().is_empty(), "{bit}");
        }
    }

    #[test]
    fn a_pack_of_a_newer_format_is_refused_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.pack");
        let index = [b"another kind of index".as_slice(), &(FORMAT + 1).to_le_bytes(), &21_u32.to_le_bytes()];
        let index = index.concat();
        let hash = blake3::hash(&index);
        fs::write(&path, [b"another kind of pack", &*index, hash.as_bytes(), END].concat()).unwrap();
        assert!(matches!(Pack::open(&path), Err(Error::Newer { found: 2, known: 1, .. })));
    }

    proptest! {
        #[test]
        fn noise_is_no_pack_and_does_no_harm(
            mut bytes in prop::collection::vec(any::<u8>(), 0..2000), count: u32, ended: bool, len: u64,
        ) {
            if ended && bytes.len() > TAIL {
                // As near to a right tail as it can come.
                let end = bytes.len() - TAIL;
                bytes[end + 4..end + 8].copy_from_slice(&(count % 2048).to_le_bytes());
                let hash = blake3::hash(&bytes[..end + 8]);
                bytes[end + 8..end + 40].copy_from_slice(hash.as_bytes());
                bytes[end + 40..].copy_from_slice(END);
            }
            let _ = decode_index(&bytes, len);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("p.pack");
            fs::write(&path, &bytes).unwrap();
            if let Ok(pack) = Pack::open(&path) {
                let _ = (sound(&pack), pack.frame_flaws());
            }
        }

        #[test]
        fn a_head_is_read_as_it_was_written(id: [u8; 32], len in 1..=MAX_CHUNK, part in 0.0..1.0, crc: u32) {
            let record = Record { id: Id(id), len, stored: ((f64::from(len) * part) as u32).max(1), crc };
            prop_assert_eq!(Record::decode(&record.encode()), Some(record));
        }
    }
}
