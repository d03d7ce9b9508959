//! A generation that is being taken.
//!
//! The caller's thread reads and cuts; a crew of threads hashes, looks up what is there already, and compresses
//! what is not. Content goes to them in batches of about a mebibyte, in buffers that come back, and no more of them
//! than the crew can take at once: a draft needs the same memory whatever its size.

use std::{
    collections::HashSet,
    io::{self, Read},
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use super::{
    Generation, Lock, Store,
    cut::{ByAddress, ByContent, Cut, MAX_CHUNK, Run},
    error::{Error, Result},
    index::Index,
    locked,
    manifest::{About, Chunk, Entry, Id, Manifest, Metadata, Stats},
    pack::Record,
    packing::{Packing, Quota, joined},
};

/// Size of a batch; not less than the largest chunk, so that each has at least one whole.
const BATCH: usize = MAX_CHUNK as usize;

/// A generation that is being taken. Dropped, it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    about: About,
    crew: Crew,
    /// With the number under which the crew knows each.
    entries: Vec<(u32, Entry)>,
    names: HashSet<String>,
    begun: u32,
    started: Instant,
    // Last, so that it is released last.
    _lock: Lock,
}

impl Draft {
    pub(super) fn begin(store: Store, lock: Lock, about: About) -> Result<Self> {
        let started = Instant::now();
        // Not the packs as they were known: gc of another process may have removed some.
        let index = store.refresh()?;
        let packing = Packing::new(&store, Quota::of(&store)?);
        packing.quota().check(1)?;
        let shared = Shared {
            index,
            distrusted: store.distrusted().clone(),
            level: store.settings().level,
            claimed: Mutex::default(),
            packing: Mutex::new(Some(packing)),
            buffers: Mutex::default(),
            failed: AtomicBool::new(false),
        };
        let crew = Crew::start(shared, store.settings().threads());
        let (entries, names) = (Vec::new(), HashSet::new());
        Ok(Self { store, about, crew, entries, names, begun: 0, started, _lock: lock })
    }

    /// Adds a file's content. If the reader fails, the error says so, and the draft is as it was before.
    pub fn add(&mut self, name: &str, metadata: Metadata, reader: impl Read) -> Result<()> {
        let average = self.store.settings().file_chunk;
        self.add_cut(name, metadata, reader, ByContent { average })
    }

    /// Adds a memory image that consists of these runs of memory, one after the other; like [`Draft::add`] else. The
    /// runs only say where to cut: they need not be right for the content to be stored as it is.
    pub fn add_image(
        &mut self,
        name: &str,
        metadata: Metadata,
        reader: impl Read,
        runs: &[Run],
    ) -> Result<()> {
        let size = self.store.settings().image_chunk;
        self.add_cut(name, metadata, reader, ByAddress::new(size, runs))
    }

    fn add_cut(
        &mut self,
        name: &str,
        metadata: Metadata,
        mut reader: impl Read,
        cut: impl Cut,
    ) -> Result<()> {
        if self.names.contains(name) {
            return Err(Error::Twice { workload: self.about.workload.clone(), entry: name.to_owned() });
        }
        let number = self.begun;
        self.begun += 1;
        let size = self.crew.feed(number, &mut reader, cut, name)?;
        self.names.insert(name.to_owned());
        self.entries.push((number, Entry { name: name.to_owned(), metadata, size, chunks: Vec::new() }));
        Ok(())
    }

    /// Makes it a generation: durable when this returns, and not there at all if it returns an error.
    pub fn commit(mut self) -> Result<Generation> {
        let done = self.crew.finish()?;
        // There is one, for this is the only call.
        let packing = done.packing.unwrap_or_else(|| Packing::new(&self.store, Quota::none(&self.store)));
        let mut chunks = done.chunks.into_iter().peekable();
        for (number, entry) in &mut self.entries {
            while let Some((of, _, chunk)) = chunks.next_if(|(of, ..)| of <= number) {
                // Those of entries that could not be read to their ends are left out.
                if of == *number {
                    push(&mut entry.chunks, chunk);
                }
            }
        }
        let entries: Vec<_> = mem::take(&mut self.entries).into_iter().map(|(_, entry)| entry).collect();
        let stats = Stats {
            total: entries.iter().map(|entry| entry.size).sum(),
            new: done.new,
            stored: packing.bytes(),
            duration: self.started.elapsed(),
        };
        let manifest = Manifest { about: self.about.clone(), number: 0, origin: None, stats, entries };
        let generation = self.store.publish(packing, manifest)?;
        // They have been stored again.
        self.store.distrusted().retain(|id| !done.claimed.contains(id));
        Ok(generation)
    }
}

/// Zeros after zeros are one piece.
fn push(chunks: &mut Vec<Chunk>, chunk: Chunk) {
    match (chunks.last_mut(), chunk) {
        (Some(Chunk::Zeros { len }), Chunk::Zeros { len: more }) => *len += more,
        _ => chunks.push(chunk),
    }
}

/// Chunks of an entry, one after the other.
struct Batch {
    entry: u32,
    /// The number of the first of them in the entry.
    first: u32,
    bytes: Vec<u8>,
    /// Where in `bytes` each ends.
    ends: Vec<usize>,
}

/// What the crew works on together.
#[derive(Debug)]
struct Shared {
    index: Arc<Index>,
    distrusted: HashSet<Id>,
    level: i32,
    /// New chunks that one of the crew has taken on.
    claimed: Mutex<HashSet<Id>>,
    /// `None` when they are done.
    packing: Mutex<Option<Packing>>,
    /// Buffers that are not in use.
    buffers: Mutex<Vec<Vec<u8>>>,
    /// One of them has failed: what comes now is for nothing.
    failed: AtomicBool,
}

/// The numbers of an entry and of a chunk in it, and the chunk.
type Numbered = (u32, u32, Chunk);

/// What one of the crew has done.
#[derive(Default)]
struct Share {
    chunks: Vec<Numbered>,
    /// Bytes in chunks that the store did not have.
    new: u64,
}

/// What all of them have done.
struct Done {
    /// Sorted by their numbers.
    chunks: Vec<Numbered>,
    new: u64,
    packing: Option<Packing>,
    claimed: HashSet<Id>,
}

#[derive(Debug)]
struct Crew {
    shared: Arc<Shared>,
    batches: Option<SyncSender<Batch>>,
    threads: Vec<JoinHandle<Result<Share>>>,
}

impl Crew {
    fn start(shared: Shared, threads: usize) -> Self {
        let shared = Arc::new(shared);
        let (batches, queue) = sync_channel(threads);
        let queue = Arc::new(Mutex::new(queue));
        let work = |_| {
            let (shared, queue) = (Arc::clone(&shared), Arc::clone(&queue));
            thread::spawn(move || {
                let result = shared.work(&queue);
                shared.failed.fetch_or(result.is_err(), Ordering::Relaxed);
                // The others fill no queue that nobody empties.
                while receive(&queue).is_some() {}
                result
            })
        };
        Self { threads: (0..threads).map(work).collect(), batches: Some(batches), shared }
    }

    /// Cuts what the reader gives, and passes it on. Answers how much it was.
    fn feed(&self, entry: u32, reader: &mut impl Read, mut cut: impl Cut, name: &str) -> Result<u64> {
        let (mut size, mut first, mut filled) = (0, 0, 0);
        let mut bytes = self.shared.buffer();
        loop {
            let last = fill(reader, &mut bytes, &mut filled)
                .map_err(|source| Error::Source { what: format!("cannot read {name:?}"), source })?;
            let (mut ends, mut at) = (Vec::new(), 0);
            while at < filled
                && let Some(len) = cut.next(&bytes[at..filled], last)
            {
                at += len;
                ends.push(at);
            }
            size += at as u64;
            let mut next = self.shared.buffer();
            next[..filled - at].copy_from_slice(&bytes[at..filled]);
            filled -= at;
            let count = ends.len() as u32;
            self.send(Batch { entry, first, bytes: mem::replace(&mut bytes, next), ends });
            first += count;
            if last {
                self.shared.give_back(bytes);
                return Ok(size);
            }
            if self.shared.failed.load(Ordering::Relaxed) {
                // What has failed is told by the commit; there is no use in reading on.
                return Ok(size);
            }
        }
    }

    fn send(&self, batch: Batch) {
        // The crew receives as long as there is a sender.
        let _ = self.batches.as_ref().map(|batches| batches.send(batch));
    }

    /// Waits until all that was passed on is done.
    fn finish(&mut self) -> Result<Done> {
        self.batches = None;
        let (mut chunks, mut new, mut failure) = (Vec::new(), 0, None);
        for thread in self.threads.drain(..) {
            match joined(thread) {
                Ok(mut share) => {
                    chunks.append(&mut share.chunks);
                    new += share.new;
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        chunks.sort_unstable_by_key(|(entry, number, _)| (*entry, *number));
        let claimed = mem::take(&mut *locked(&self.shared.claimed));
        Ok(Done { chunks, new, packing: locked(&self.shared.packing).take(), claimed })
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.failed.store(true, Ordering::Relaxed);
        self.batches = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn buffer(&self) -> Vec<u8> {
        locked(&self.buffers).pop().unwrap_or_else(|| vec![0; BATCH])
    }

    fn give_back(&self, buffer: Vec<u8>) {
        locked(&self.buffers).push(buffer);
    }

    fn work(&self, queue: &Mutex<Receiver<Batch>>) -> Result<Share> {
        let mut zstd = zstd::bulk::Compressor::new(self.level).map_err(out_of_memory)?;
        let (mut share, mut packed) = (Share::default(), Vec::with_capacity(BATCH));
        while let Some(batch) = receive(queue) {
            if !self.failed.load(Ordering::Relaxed) {
                let mut begin = 0;
                for (number, end) in (batch.first..).zip(&batch.ends) {
                    let content = &batch.bytes[begin..*end];
                    begin = *end;
                    let chunk = self.chunk(content, &mut zstd, &mut packed, &mut share.new)?;
                    share.chunks.push((batch.entry, number, chunk));
                }
            }
            self.give_back(batch.bytes);
        }
        Ok(share)
    }

    /// Finds the chunk of this content, or makes it.
    fn chunk(
        &self,
        content: &[u8],
        zstd: &mut zstd::bulk::Compressor<'static>,
        packed: &mut Vec<u8>,
        new: &mut u64,
    ) -> Result<Chunk> {
        if is_zero(content) {
            return Ok(Chunk::Zeros { len: content.len() as u64 });
        }
        let id = Id::of(content);
        let chunk = Chunk::Data { id, len: content.len() as u32 };
        let there = self.index.find(id).is_some() && !self.distrusted.contains(&id);
        if there || !locked(&self.claimed).insert(id) {
            return Ok(chunk);
        }
        *new += content.len() as u64;
        packed.clear();
        packed.reserve(zstd::zstd_safe::compress_bound(content.len()));
        zstd.compress_to_buffer(content, packed).map_err(out_of_memory)?;
        // What does not get smaller is stored as it is.
        let stored = if packed.len() < content.len() { packed.as_slice() } else { content };
        let record = Record::new(id, content.len(), stored);
        locked(&self.packing).as_mut().map_or(Ok(()), |packing| packing.put(record, stored))?;
        Ok(chunk)
    }
}

/// The next batch. `None` when there will be none.
fn receive(queue: &Mutex<Receiver<Batch>>) -> Option<Batch> {
    locked(queue).recv().ok()
}

fn out_of_memory(source: io::Error) -> Error {
    Error::Source { what: "cannot compress".into(), source }
}

/// Whether all bytes are zero: the first is, and each is as the one before it, which memcmp finds out fastest.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [0, rest @ ..] => rest == &bytes[..rest.len()],
        _ => false,
    }
}

/// Fills the buffer from `filled` on. Whether that was the end.
fn fill(reader: &mut impl Read, buffer: &mut [u8], filled: &mut usize) -> io::Result<bool> {
    while *filled < buffer.len() {
        match reader.read(&mut buffer[*filled..]) {
            Ok(0) => return Ok(true),
            Ok(count) => *filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}
