//! A generation for another store that has a part of it already.
//!
//! ```text
//! here                                                     there
//!   parcel: the manifest                    ─────────────▶   receive: which of its chunks are missing
//!   missing chunks, in any order, each      ─────────────▶   take: checked, into packs beside the store;
//!   with its head, as in a pack                              a full one is synced and becomes part of it
//!   all is sent                             ─────────────▶   finish: all chunks are there, so the manifest gets its name
//! ```
//!
//! An import is one stream from beginning to end; this can be broken off anywhere. What has arrived stays: packs that no
//! manifest needs yet are rubbish for [`gc`](Store::gc), but a [`receive`](Store::receive) before that finds their chunks
//! and asks for the others only. Even what a killed process has left in a pack that was not full is taken up again
//! ([`Store::salvage`]): its chunks carry heads with checksums, and those that are whole are as good as any.
//!
//! No lock is held while chunks arrive, so that others can take snapshots meanwhile. Only `finish` takes that of the
//! writer, and looks under it whether all chunks are there: gc may have removed some since they were counted as there.
//! Then it is said which ones, and they are sent again.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use nix::fcntl::{Flock, FlockArg};

use super::{
    About, Generation, Lock, Store,
    error::{Error, Result},
    index::{self, Index},
    lock_file, locked,
    manifest::{Id, Manifest},
    pack::{HEAD, Pack, Record, Writer},
    packing::{Packing, Quota},
    read::{Snapshot, Unpacker},
};

/// A pack of what arrives is full with this many bytes: what a power cut can cost of a transfer.
const FULL: u64 = 32 << 20;

/// A set of a manifest's chunks, by their numbers: the order in which they come first in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunks(Vec<u8>);

impl Chunks {
    /// What was got by [`Chunks::as_bytes`].
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// As bytes: a bit for each chunk.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn of(count: usize, has: impl Fn(usize) -> bool) -> Self {
        let mut bytes = vec![0; count.div_ceil(8)];
        for number in (0..count).filter(|number| has(*number)) {
            bytes[number / 8] |= 1 << (number % 8);
        }
        Self(bytes)
    }

    /// Their numbers, ascending, below `count`.
    pub fn numbers(&self, count: usize) -> impl Iterator<Item = usize> {
        let has = |number: &usize| self.0.get(number / 8).is_some_and(|byte| byte >> (number % 8) & 1 == 1);
        (0..count).filter(has)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }
}

/// A generation that is to be sent.
#[derive(Debug, Clone)]
pub struct Parcel {
    snapshot: Snapshot,
    manifest: Arc<Vec<u8>>,
    chunks: Arc<Vec<(Id, u32)>>,
}

/// Each chunk of a manifest once, in the order in which they come first.
fn distinct(manifest: &Manifest) -> Vec<(Id, u32)> {
    let mut seen = HashSet::new();
    manifest.data().filter(|(id, _)| seen.insert(*id)).collect()
}

impl Store {
    /// Opens a generation for sending.
    pub fn parcel(&self, workload: &str, number: u64) -> Result<Parcel> {
        let snapshot = self.snapshot(workload, number)?;
        let manifest = snapshot.manifest().encode()?;
        let chunks = distinct(snapshot.manifest());
        Ok(Parcel { snapshot, manifest: Arc::new(manifest), chunks: Arc::new(chunks) })
    }
}

impl Parcel {
    /// The manifest, as the other store takes it.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// How many chunks there are.
    pub fn count(&self) -> usize {
        self.chunks.len()
    }

    /// How many bytes go over the wire for this chunk.
    pub fn size(&self, number: usize) -> u64 {
        let stored =
            |(id, _): &(Id, u32)| self.snapshot.index().find(*id).map(|(_, slot)| slot.record.stored);
        HEAD as u64 + self.chunks.get(number).and_then(stored).map_or(0, u64::from)
    }

    /// What reads its chunks; one for each thread that does.
    pub fn reader(&self) -> Result<ParcelReader> {
        Ok(ParcelReader { parcel: self.clone(), unpacker: Unpacker::new()?, content: Vec::new() })
    }
}

/// Reads chunks that are to be sent.
#[derive(Debug)]
pub struct ParcelReader {
    parcel: Parcel,
    unpacker: Unpacker,
    content: Vec<u8>,
}

impl ParcelReader {
    /// Appends a chunk, with its head, to `out`. Its checksum is looked at; its hash is, over there.
    pub fn read(&mut self, number: usize, out: &mut Vec<u8>) -> Result<()> {
        let snapshot = &self.parcel.snapshot;
        let Some((id, len)) = self.parcel.chunks.get(number).copied() else {
            return Err(Error::stream("the other side wants a chunk that is not in the manifest"));
        };
        let stored = &mut self.unpacker.stored;
        let found = snapshot.index().find(id);
        let whole = found.filter(|(pack, slot)| {
            slot.record.len == len && pack.read(slot, stored).is_ok() && slot.record.check(stored).is_ok()
        });
        let record = match whole {
            Some((_, slot)) => slot.record,
            // From any other copy.
            None => {
                let fetched =
                    self.unpacker.fetch(snapshot.store(), snapshot.index(), (id, len), &mut self.content);
                fetched.map_err(|cause| snapshot.chunk_error(id, cause))?.record
            }
        };
        out.extend(record.encode());
        out.extend_from_slice(&self.unpacker.stored);
        Ok(())
    }
}

/// What becomes of a manifest that has arrived.
#[derive(Debug)]
pub enum Receive {
    /// That generation is here already.
    Known(Generation),
    /// Its chunks are to come.
    New(Reception),
}

/// What becomes of a generation whose chunks have arrived.
#[derive(Debug)]
pub enum Finish {
    /// It is here, and durable.
    Whole(Generation),
    /// These chunks are missing (again).
    Missing(Chunks),
}

/// A generation that is arriving. Many threads may [`take`](Reception::take) what comes at once.
#[derive(Debug)]
pub struct Reception {
    store: Store,
    manifest: Manifest,
    chunks: Vec<(Id, u32)>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Chunks that are to come, and their lengths.
    awaited: HashMap<Id, u32>,
    pack: Option<(PathBuf, Writer)>,
    quota: Quota,
    /// Bytes that are in packs of this reception.
    bytes: u64,
    new: u64,
}

impl Store {
    pub(super) fn incoming_dir(&self) -> PathBuf {
        self.dir().join("incoming")
    }

    /// Takes up what an earlier process had received when it ended; to be called before anything is received. Answers how
    /// many chunks that were.
    pub fn salvage(&self) -> Result<usize> {
        let mut count = 0;
        for path in index::list(&self.incoming_dir())? {
            if let Ok(pack) = Pack::open(&path) {
                let (name, mut writer) = self.staged()?;
                let (mut unpacker, mut content) = (Unpacker::new()?, Vec::new());
                for slot in &pack.slots {
                    if unpacker.unpack(&pack, slot, &mut content).is_ok() {
                        writer.append(slot.record, &unpacker.stored)?;
                        count += 1;
                    }
                }
                self.seal(&name, writer)?;
            }
            self.disk().remove(&path)?;
        }
        Ok(count)
    }

    /// A new pack beside the store.
    fn staged(&self) -> Result<(PathBuf, Writer)> {
        let dir = self.incoming_dir();
        self.disk().make_dir(&dir)?;
        // Another kind of name than packs of snapshots have: they never meet.
        let names =
            (jiff::Timestamp::now().as_nanosecond()..).map(|now| dir.join(format!("{now:020}-in.pack")));
        let free = |path: &PathBuf| {
            !path.exists() && path.file_name().is_none_or(|name| !self.packs_dir().join(name).exists())
        };
        let path = names.into_iter().find(free).unwrap_or_else(|| dir.join("in.pack"));
        let writer = Writer::create(self.disk(), &path)?;
        Ok((path, writer))
    }

    /// Makes a pack part of the store, durably. Nothing needs it yet, so no lock has to be held.
    fn seal(&self, path: &Path, writer: Writer) -> Result<()> {
        if writer.len == Writer::EMPTY {
            drop(writer);
            return self.disk().remove(path);
        }
        writer.finish()?;
        let to = self.packs_dir().join(path.file_name().unwrap_or_default());
        self.disk().rename(path, &to)?;
        self.disk().sync_dir(&self.packs_dir())
    }

    /// Begins to receive the generation of a manifest that [`Parcel::manifest`] has given elsewhere.
    pub fn receive(&self, manifest: &[u8]) -> Result<Receive> {
        let mut manifest = Manifest::decode(manifest, "the manifest that was sent".as_ref())?;
        manifest.origin.get_or_insert(manifest.number);
        if let Some(known) = self.known(&manifest)? {
            return Ok(Receive::Known(known));
        }
        let quota = Quota::of(self)?;
        let chunks = distinct(&manifest);
        let index = self.refresh()?;
        let awaited = self.lacking(&index, &chunks);
        let state = State { awaited, pack: None, quota, bytes: 0, new: 0 };
        Ok(Receive::New(Reception { store: self.clone(), manifest, chunks, state: Mutex::new(state) }))
    }

    /// The generation that has come before.
    fn known(&self, manifest: &Manifest) -> Result<Option<Generation>> {
        let same = |generation: &Generation| {
            generation.about == manifest.about
                && generation.origin.unwrap_or(generation.number) == manifest.origin.unwrap_or(0)
        };
        Ok(self.generations(&manifest.about.workload)?.into_iter().find(same))
    }

    fn lacking(&self, index: &Index, chunks: &[(Id, u32)]) -> HashMap<Id, u32> {
        let distrusted = self.distrusted().clone();
        let lacks = |(id, _): &&(Id, u32)| index.find(*id).is_none() || distrusted.contains(id);
        chunks.iter().filter(lacks).copied().collect()
    }

    /// Waits until nobody else writes.
    fn wait_writer(&self) -> Result<Lock> {
        let path = self.dir().join("writer.lock");
        Flock::lock(lock_file(&path)?, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::io("lock", &path)(errno.into()))
    }
}

impl Reception {
    /// What is arriving.
    pub fn about(&self) -> &About {
        &self.manifest.about
    }

    /// The number that it has where it comes from.
    pub fn origin(&self) -> u64 {
        self.manifest.origin.unwrap_or(self.manifest.number)
    }

    /// The chunks that are missing here.
    pub fn missing(&self) -> Chunks {
        let state = locked(&self.state);
        Chunks::of(self.chunks.len(), |number| state.awaited.contains_key(&self.chunks[number].0))
    }

    /// Takes chunks, each with its head, until there are no more. Answers how many bytes they were. What was right before
    /// something was wrong is kept.
    pub fn take(&self, mut reader: impl Read) -> Result<u64> {
        let (mut unpacker, mut content, mut head) = (Unpacker::new()?, Vec::new(), Vec::new());
        let mut bytes = 0;
        loop {
            head.clear();
            let failed = |source| Error::Source { what: "cannot read what arrives".into(), source };
            if reader.by_ref().take(HEAD as u64).read_to_end(&mut head).map_err(failed)? == 0 {
                return Ok(bytes);
            }
            let record =
                Record::decode(&head).ok_or_else(|| Error::stream("the head of a chunk is damaged"))?;
            unpacker.stored.clear();
            let stored = u64::from(record.stored);
            reader.by_ref().take(stored).read_to_end(&mut unpacker.stored).map_err(failed)?;
            unpacker.check(&record, &mut content).map_err(Error::stream)?;
            bytes += HEAD as u64 + stored;
            if let Some((path, full)) = self.put(record, &unpacker.stored)? {
                self.store.seal(&path, full)?;
            }
        }
    }

    /// Puts a chunk into the pack; answers the pack when it is full.
    fn put(&self, record: Record, stored: &[u8]) -> Result<Option<(PathBuf, Writer)>> {
        let mut state = locked(&self.state);
        match state.awaited.get(&record.id) {
            Some(len) if *len == record.len => {}
            // It may have come twice; but nothing comes that nobody asked for.
            _ if self.chunks.contains(&(record.id, record.len)) => return Ok(None),
            _ => return Err(Error::stream("there is a chunk that was not asked for")),
        }
        state.quota.check(state.bytes + record.cost())?;
        if state.pack.is_none() {
            state.pack = Some(self.store.staged()?);
        }
        let Some((_, writer)) = &mut state.pack else { return Ok(None) };
        writer.append(record, stored)?;
        let full = writer.len >= FULL;
        state.bytes += record.cost();
        state.new += u64::from(record.len);
        state.awaited.remove(&record.id);
        Ok(if full { state.pack.take() } else { None })
    }

    /// Makes durable what has arrived.
    pub fn flush(&self) -> Result<()> {
        let pack = locked(&self.state).pack.take();
        pack.map_or(Ok(()), |(path, writer)| self.store.seal(&path, writer))
    }

    /// Makes it a generation, if all is there; good, if it is that where it comes from.
    pub fn finish(&self, good: bool) -> Result<Finish> {
        self.flush()?;
        let _lock = self.store.wait_writer()?;
        let mut generation = match self.store.known(&self.manifest)? {
            Some(known) => known,
            None => {
                let index = self.store.refresh()?;
                let mut state = locked(&self.state);
                let gone = self.chunks.iter().filter(|(id, _)| index.find(*id).is_none());
                state.awaited.extend(gone.copied());
                if !state.awaited.is_empty() {
                    drop(state);
                    return Ok(Finish::Missing(self.missing()));
                }
                let mut manifest = self.manifest.clone();
                (manifest.stats.new, manifest.stats.stored) = (state.new, state.bytes);
                drop(state);
                let generation =
                    self.store.publish(Packing::new(&self.store, Quota::none(&self.store)), manifest)?;
                let chunks: HashSet<_> = self.chunks.iter().map(|(id, _)| *id).collect();
                self.store.distrusted().retain(|id| !chunks.contains(id));
                generation
            }
        };
        if good && !generation.good {
            self.store.mark_good(&generation.about.workload, generation.number)?;
            generation.good = true;
        }
        Ok(Finish::Whole(generation))
    }
}

impl Drop for Reception {
    fn drop(&mut self) {
        // What cannot be kept now is salvaged by the next process, or sent again.
        let _ = self.flush();
    }
}
