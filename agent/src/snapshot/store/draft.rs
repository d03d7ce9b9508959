//! A generation that is being taken.
//!
//! The caller's thread cuts; a crew of threads hashes, looks up what is there already, and compresses what is not.
//!
//! Where a file is cut depends on its content, so that the caller's thread must read it. What it has read goes to the
//! crew in batches of about a mebibyte, in buffers that come back, and no more of them than the crew can take at once.
//!
//! Where a memory image is cut does not, and of one that has not changed nearly all that is to be done is reading
//! and hashing. So the crew gets the image and the list of its chunks as a whole, and each of them takes, and
//! reads by itself, the next few of these, until there are none: nobody waits for anybody, and what is hashed
//! was read just before by the same processor, into a buffer that its cache holds.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read},
    mem,
    os::unix::fs::FileExt as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use super::{
    Generation, Lock, Store,
    cut::{ByAddress, MAX_CHUNK, Run, by_content},
    error::{Error, Result},
    index::Index,
    locked,
    manifest::{About, Chunk, Entry, Id, Manifest, Metadata, Stats},
    pack::Record,
    packing::{Packing, Quota, joined},
    print::{Known, Print, Printer},
};

/// Size of a batch of a file; not less than the largest chunk, so that each has at least one whole.
const BATCH: usize = MAX_CHUNK as usize;
/// As much of an image as one of the crew takes at a time, unless one chunk is larger. With what it becomes it is
/// in a second-level cache of 512 KiB.
const SPAN: u64 = 256 << 10;
/// When one of the crew has done so much of an image, it tells: not so often that it would be woken and wake for it.
const TELL: u64 = 16 << 20;

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
            printer: Arc::clone(&store.inner.printer),
            known: locked(&store.inner.known).get(&about.workload).map(Arc::clone).unwrap_or_default(),
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
    pub fn add(&mut self, name: &str, metadata: Metadata, mut reader: impl Read) -> Result<()> {
        let number = self.number(name)?;
        let average = self.store.settings().file_chunk;
        let size = self.crew.feed(number, &mut reader, average).map_err(unreadable(name))?;
        self.list(number, name, metadata, size);
        Ok(())
    }

    /// Adds a memory image: all of this file, which consists of these runs of memory, one after the other; like
    /// [`Draft::add`] else. The runs only say where to cut: they need not be right for the content to be stored as it
    /// is. `progress` is told, now and then, how many bytes more are done.
    pub fn add_image(
        &mut self,
        name: &str,
        metadata: Metadata,
        file: File,
        runs: &[Run],
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let number = self.number(name)?;
        let size = file.metadata().map_err(unreadable(name))?.len();
        let cut = ByAddress::new(self.store.settings().image_chunk, runs, size);
        self.crew.feed_image(number, file, cut, progress).map_err(unreadable(name))?;
        self.list(number, name, metadata, size);
        Ok(())
    }

    /// A number for the next entry, under which the crew will know it.
    fn number(&mut self, name: &str) -> Result<u32> {
        if self.names.contains(name) {
            return Err(Error::Twice { workload: self.about.workload.clone(), entry: name.to_owned() });
        }
        self.begun += 1;
        Ok(self.begun)
    }

    fn list(&mut self, number: u32, name: &str, metadata: Metadata, size: u64) {
        self.names.insert(name.to_owned());
        self.entries.push((number, Entry { name: name.to_owned(), metadata, size, chunks: Vec::new() }));
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
        locked(&self.store.inner.known).insert(self.about.workload.clone(), Arc::new(done.known));
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

/// What one of the crew does next.
enum Task {
    Batch(Batch),
    /// As much of it as the others leave.
    Image(Arc<Image>),
}

/// Chunks of a file that have been read, one after the other.
struct Batch {
    entry: u32,
    /// The number of the first of them in the entry.
    first: u32,
    bytes: Vec<u8>,
    /// Where in `bytes` each ends.
    ends: Vec<usize>,
}

/// A memory image, which the crew reads.
struct Image {
    entry: u32,
    file: File,
    /// Where its chunks end.
    ends: Vec<u64>,
    /// Where in that list each part begins that is taken at a time.
    parts: Vec<usize>,
    /// The first part that nobody has taken yet.
    next: AtomicUsize,
    /// Bytes that are done, or why the image cannot be read.
    tell: Sender<io::Result<u64>>,
}

/// Some chunks of an image, one after the other.
struct Part<'a> {
    /// The number of the first.
    first: usize,
    /// Where in the image it begins.
    offset: u64,
    /// Where each ends.
    ends: &'a [u64],
}

impl Image {
    fn new(entry: u32, file: File, cut: ByAddress<'_>, tell: Sender<io::Result<u64>>) -> Self {
        let ends = cut.scan(0, |end, len| {
            *end += len;
            Some(*end)
        });
        let ends: Vec<u64> = ends.collect();
        let (mut parts, mut begin, mut last) = (Vec::new(), 0, 0);
        for (number, end) in ends.iter().enumerate() {
            if number == 0 || end - begin > SPAN {
                parts.push(number);
                begin = last;
            }
            last = *end;
        }
        Self { entry, file, ends, parts, next: AtomicUsize::new(0), tell }
    }

    /// Takes the next part. `None`: all are taken.
    fn take(&self) -> Option<Part<'_>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let first = *self.parts.get(number)?;
        let after = self.parts.get(number + 1).copied().unwrap_or(self.ends.len());
        let offset = first.checked_sub(1).map_or(0, |last| self.ends[last]);
        Some(Part { first, offset, ends: &self.ends[first..after] })
    }

    /// Nobody takes any more of it.
    fn give_up(&self) {
        self.next.store(self.parts.len(), Ordering::Relaxed);
    }

    fn tell(&self, what: io::Result<u64>) {
        // Who gave the image listens until it is done.
        let _ = self.tell.send(what);
    }
}

/// What the crew works on together.
#[derive(Debug)]
struct Shared {
    index: Arc<Index>,
    distrusted: HashSet<Id>,
    printer: Arc<Printer>,
    /// The chunks of the images of the generation before.
    known: Arc<Known>,
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
    /// The chunks of images.
    known: Vec<(Print, Id)>,
}

/// What all of them have done.
struct Done {
    /// Sorted by their numbers.
    chunks: Vec<Numbered>,
    new: u64,
    known: Known,
    packing: Option<Packing>,
    claimed: HashSet<Id>,
}

#[derive(Debug)]
struct Crew {
    shared: Arc<Shared>,
    tasks: Option<SyncSender<Task>>,
    threads: Vec<JoinHandle<Result<Share>>>,
}

impl Crew {
    fn start(shared: Shared, threads: usize) -> Self {
        let shared = Arc::new(shared);
        let (tasks, queue) = sync_channel(threads);
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
        Self { threads: (0..threads).map(work).collect(), tasks: Some(tasks), shared }
    }

    /// Cuts what the reader gives by its content, and passes it on. Answers how much it was.
    fn feed(&self, entry: u32, reader: &mut impl Read, average: u32) -> io::Result<u64> {
        let (mut size, mut first, mut filled) = (0, 0, 0);
        let mut bytes = self.shared.buffer();
        loop {
            let last = fill(reader, &mut bytes, &mut filled)?;
            let (mut ends, mut at) = (Vec::new(), 0);
            while at < filled
                && let Some(len) = by_content(average, &bytes[at..filled], last)
            {
                at += len;
                ends.push(at);
            }
            size += at as u64;
            let mut next = self.shared.buffer();
            next[..filled - at].copy_from_slice(&bytes[at..filled]);
            filled -= at;
            let count = ends.len() as u32;
            self.send(Task::Batch(Batch { entry, first, bytes: mem::replace(&mut bytes, next), ends }));
            first += count;
            // What has failed is told by the commit; there is no use in reading on.
            if last || self.shared.failed.load(Ordering::Relaxed) {
                self.shared.give_back(bytes);
                return Ok(size);
            }
        }
    }

    /// Passes an image on, to each of the crew, and waits until it is done.
    fn feed_image(
        &self,
        entry: u32,
        file: File,
        cut: ByAddress<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> io::Result<()> {
        let (tell, told) = channel();
        let image = Arc::new(Image::new(entry, file, cut, tell));
        // No more of them than there are parts: most images are small.
        for _ in 0..self.threads.len().min(image.parts.len()) {
            self.send(Task::Image(Arc::clone(&image)));
        }
        drop(image);
        // Nobody tells any more when the last of them has let go of it.
        let mut failure = None;
        for what in told {
            match what {
                Ok(bytes) => progress(bytes),
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn send(&self, task: Task) {
        // The crew receives as long as there is a sender.
        let _ = self.tasks.as_ref().map(|tasks| tasks.send(task));
    }

    /// Waits until all that was passed on is done.
    fn finish(&mut self) -> Result<Done> {
        self.tasks = None;
        let (mut chunks, mut new, mut known, mut failure) = (Vec::new(), 0, Known::new(), None);
        for thread in self.threads.drain(..) {
            match joined(thread) {
                Ok(mut share) => {
                    chunks.append(&mut share.chunks);
                    new += share.new;
                    known.extend(share.known);
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        chunks.sort_unstable_by_key(|(entry, number, _)| (*entry, *number));
        let claimed = mem::take(&mut *locked(&self.shared.claimed));
        Ok(Done { chunks, new, known, packing: locked(&self.shared.packing).take(), claimed })
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.failed.store(true, Ordering::Relaxed);
        self.tasks = None;
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

    /// Whether the store has a chunk.
    fn has(&self, id: Id) -> bool {
        self.index.find(id).is_some() && !self.distrusted.contains(&id)
    }

    fn work(&self, queue: &Mutex<Receiver<Task>>) -> Result<Share> {
        let mut hand = Hand::new(self)?;
        while let Some(task) = receive(queue) {
            match task {
                Task::Batch(Batch { entry, first, bytes, ends }) => {
                    if !self.failed.load(Ordering::Relaxed) {
                        hand.chunks(entry, first, &bytes, ends.into_iter(), |_, content| Id::of(content))?;
                    }
                    self.give_back(bytes);
                }
                Task::Image(image) => hand.image(&image)?,
            }
        }
        Ok(hand.share)
    }
}

/// One of the crew.
struct Hand<'a> {
    shared: &'a Shared,
    zstd: zstd::bulk::Compressor<'static>,
    /// For what a chunk becomes.
    packed: Vec<u8>,
    /// For a part of an image.
    part: Vec<u8>,
    share: Share,
}

impl<'a> Hand<'a> {
    fn new(shared: &'a Shared) -> Result<Self> {
        let zstd = zstd::bulk::Compressor::new(shared.level).map_err(out_of_memory)?;
        Ok(Self { shared, zstd, packed: Vec::new(), part: Vec::new(), share: Share::default() })
    }

    /// Does as much of an image as the others leave.
    fn image(&mut self, image: &Image) -> Result<()> {
        let (mut bytes, mut done) = (mem::take(&mut self.part), 0);
        while !self.shared.failed.load(Ordering::Relaxed)
            && let Some(Part { first, offset, ends }) = image.take()
        {
            let len = ends.last().map_or(0, |end| end - offset);
            bytes.resize(len as usize, 0);
            if let Err(error) = image.file.read_exact_at(&mut bytes, offset) {
                image.give_up();
                image.tell(Err(error));
                break;
            }
            let ends = ends.iter().map(|end| (end - offset) as usize);
            self.chunks(image.entry, first as u32, &bytes, ends, Self::image_id)?;
            done += len;
            if done >= TELL {
                image.tell(Ok(mem::take(&mut done)));
            }
        }
        image.tell(Ok(done));
        self.part = bytes;
        Ok(())
    }

    /// Finds or makes chunks of an entry that end there in `bytes`, the first of them with this number.
    fn chunks(
        &mut self,
        entry: u32,
        first: u32,
        bytes: &[u8],
        ends: impl Iterator<Item = usize>,
        id: impl Fn(&mut Self, &[u8]) -> Id,
    ) -> Result<()> {
        let mut begin = 0;
        for (number, end) in (first..).zip(ends) {
            let content = &bytes[begin..end];
            let chunk = if is_zero(content) {
                Chunk::Zeros { len: content.len() as u64 }
            } else {
                let id = id(self, content);
                self.keep(id, content)?;
                Chunk::Data { id, len: content.len() as u32 }
            };
            self.share.chunks.push((entry, number, chunk));
            begin = end;
        }
        Ok(())
    }

    /// The name of a chunk of an image, which is likely to be known.
    fn image_id(&mut self, content: &[u8]) -> Id {
        let print = self.shared.printer.print(content);
        let known = self.shared.known.get(&print).copied().filter(|id| self.shared.has(*id));
        let id = known.unwrap_or_else(|| Id::of(content));
        self.share.known.push((print, id));
        id
    }

    /// Stores a chunk that is not in the store.
    fn keep(&mut self, id: Id, content: &[u8]) -> Result<()> {
        if self.shared.has(id) || !locked(&self.shared.claimed).insert(id) {
            return Ok(());
        }
        self.share.new += content.len() as u64;
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(content.len()));
        self.zstd.compress_to_buffer(content, &mut self.packed).map_err(out_of_memory)?;
        // What does not get smaller is stored as it is.
        let stored = if self.packed.len() < content.len() { &self.packed } else { content };
        let record = Record::new(id, content.len(), stored);
        locked(&self.shared.packing).as_mut().map_or(Ok(()), |packing| packing.put(record, stored))
    }
}

/// The next task. `None` when there will be none.
fn receive(queue: &Mutex<Receiver<Task>>) -> Option<Task> {
    locked(queue).recv().ok()
}

fn unreadable(name: &str) -> impl FnOnce(io::Error) -> Error {
    let what = format!("cannot read {name:?}");
    move |source| Error::Source { what, source }
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
