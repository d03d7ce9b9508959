//! Images on their way, while CRIU still writes them.
//!
//! ```text
//! CRIU ─► pages-1.img, … (tmpfs) ─► pieces ─► zstd, or as they are ─► streams ─► files there (tmpfs)
//!              └ holes behind what was sent           └ as the link or the CPU is the slower one
//! ```
//!
//! CRIU only ever appends to its files of pages, so what is there can be sent at once and, once it was sent, be cut out of
//! the file: no full copy waits anywhere on the source. Its other files are small and change until the end: they come
//! last, when the dump is complete.
//!
//! Each stream has a thread that compresses for it. Whether it does is decided piece by piece: when the queue to the link
//! is empty, the link waits for the CPU, and the piece goes as it is; when it is not, the CPU has time, and the link is
//! worth saving. So neither waits for the other, whatever both are like, with nothing to be set.
//!
//! A piece says where it belongs (unit, file, offset), so it does not matter in which order and on which stream it comes.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc as threads,
    },
    time::Duration,
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use tokio::sync::mpsc;

use super::wire::FILES;

/// A piece's bytes, at most.
const PIECE: usize = 1 << 20;
/// Pieces that may wait for a stream.
const QUEUE: usize = 2;
/// zstd's: higher ones gain nothing on memory and cost more than the link is worth (measured).
const LEVEL: i32 = 1;
/// How often files are looked at though nothing was told of them: splice(2), by which CRIU writes pages, tells inotify
/// of what it has written only since Linux 6.8.
const LOOK: Duration = Duration::from_millis(2);
/// Its creation tells who looks at the directory that the dump is complete.
const END: &str = ".ftd-end";

/// Where some bytes of an image belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    unit: u8,
    name: String,
    offset: u64,
    /// Length.
    raw: u32,
    /// Length as it is sent; 0: as it is.
    packed: u32,
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Piece {
    fn write(&self, to: &mut Vec<u8>) {
        to.push(self.unit);
        // Checked where names are found.
        to.push(self.name.len() as u8);
        to.extend_from_slice(&self.offset.to_le_bytes());
        to.extend_from_slice(&self.raw.to_le_bytes());
        to.extend_from_slice(&self.packed.to_le_bytes());
        to.extend_from_slice(self.name.as_bytes());
    }

    /// The next piece, its bytes in `bytes`; `None` at the end.
    pub(super) fn read(from: &mut impl Read, bytes: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let mut head = [0; 18];
        if from.read(&mut head[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[1..])?;
        let number = |at: usize| {
            u32::from_le_bytes(head.get(at..at + 4).and_then(|four| four.try_into().ok()).unwrap_or_default())
        };
        let offset = u64::from(number(2)) | u64::from(number(6)) << 32;
        let (raw, packed) = (number(10), number(14));
        // What zstd makes of bytes that it cannot make smaller is longer by no more than this.
        if raw as usize > PIECE || packed as usize > PIECE + 1024 || raw == 0 {
            return Err(odd("a piece is too long"));
        }
        let mut name = vec![0; usize::from(head[1])];
        from.read_exact(&mut name)?;
        let name = String::from_utf8(name).map_err(|_| odd("a name makes no sense"))?;
        if !is_name(&name) {
            return Err(odd("a name is none of an image"));
        }
        bytes.clear();
        bytes.resize(if packed == 0 { raw } else { packed } as usize, 0);
        from.read_exact(bytes)?;
        Ok(Some(Self { unit: head[0], name, offset, raw, packed }))
    }
}

/// Whether a text can be the name of an image: it becomes part of a path.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && !name.contains(['/', '\0'])
}

// === The source ===

/// How much has gone.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// Bytes of images.
    pub(super) raw: AtomicU64,
    /// Bytes on the wire.
    pub(super) wire: AtomicU64,
}

/// The files that were sent: unit, name, length.
pub(super) type Files = Vec<(u8, String, u64)>;

/// The directories of the units, which are being written, and whether all of it is there.
#[derive(Debug, Clone)]
pub(super) struct Dirs {
    all: Arc<Vec<PathBuf>>,
    complete: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
}

impl Dirs {
    pub(super) fn new(dirs: Vec<PathBuf>) -> Self {
        Self { all: Arc::new(dirs), complete: Arc::default(), broken: Arc::default() }
    }

    /// Nothing changes any more: the rest can be sent.
    pub(super) fn complete(&self) {
        self.complete.store(true, Ordering::Release);
        self.wake();
    }

    /// It will not be complete.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        if let Some(dir) = self.all.first() {
            // Who looks at it looks every now and then all the same.
            let _ = File::create(dir.join(END));
        }
    }
}

/// Sends what is and will be in the directories into as many queues as there are streams; ends when all is sent. For a
/// thread that may wait.
pub(super) fn send(dirs: &Dirs, queues: Vec<mpsc::Sender<Vec<u8>>>, sent: &Sent) -> io::Result<Files> {
    let (jobs, taken) = threads::sync_channel::<Job>(queues.len());
    let taken = Mutex::new(taken);
    std::thread::scope(|scope| {
        let workers: Vec<_> = queues
            .into_iter()
            .map(|queue| {
                let taken = &taken;
                scope.spawn(move || pack(taken, &queue, sent))
            })
            .collect();
        let found = find(dirs, &jobs);
        drop(jobs);
        let packed = workers.into_iter().map(|worker| {
            worker.join().unwrap_or_else(|_| Err(io::Error::other("a thread that compresses has ended")))
        });
        let packed: io::Result<Vec<()>> = packed.collect();
        packed.and(found)
    })
}

struct Job {
    piece: Piece,
    file: Arc<File>,
    /// It can be cut out afterwards.
    hole: bool,
}

/// Finds what is new in the directories.
fn find(dirs: &Dirs, jobs: &threads::SyncSender<Job>) -> io::Result<Files> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    for dir in dirs.all.iter() {
        inotify.add_watch(dir, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)?;
    }
    let mut known: BTreeMap<(u8, String), (Arc<File>, u64)> = BTreeMap::new();
    loop {
        if dirs.broken.load(Ordering::Acquire) {
            return Err(odd("the dump was broken off"));
        }
        // Read before the look: what is found by a look that began after the end is all.
        let complete = dirs.complete.load(Ordering::Acquire);
        for (unit, dir) in dirs.all.iter().enumerate() {
            let unit = u8::try_from(unit).map_err(|_| odd("too many units"))?;
            for entry in fs::read_dir(dir)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                let pages = name.starts_with("pages-");
                let log = Path::new(&name).extension().is_some_and(|extension| extension == "log");
                if !is_name(&name) || log || !(pages || complete) {
                    continue;
                }
                if known.len() > FILES {
                    return Err(odd("too many files"));
                }
                let path = dir.join(&name);
                let key = (unit, name);
                if !known.contains_key(&key) {
                    // One of which nothing was sent may still be replaced by another.
                    let length = match fs::metadata(&path) {
                        Ok(meta) => meta.len(),
                        Err(error) if error.kind() == io::ErrorKind::NotFound && !complete => continue,
                        Err(error) => return Err(error),
                    };
                    if !complete && length < PIECE as u64 {
                        continue;
                    }
                    let file = File::options().read(true).write(pages).open(&path)?;
                    known.insert(key.clone(), (Arc::new(file), 0));
                }
                let Some((file, done)) = known.get_mut(&key) else { continue };
                let length = file.metadata()?.len();
                while length > *done && (complete || length - *done >= PIECE as u64) {
                    let raw = (length - *done).min(PIECE as u64) as u32;
                    let piece = Piece { unit, name: key.1.clone(), offset: *done, raw, packed: 0 };
                    let job = Job { piece, file: Arc::clone(file), hole: pages };
                    jobs.send(job).map_err(|_| odd("no stream is left"))?;
                    *done += u64::from(raw);
                }
            }
        }
        if complete {
            return Ok(known.into_iter().map(|((unit, name), (_, done))| (unit, name, done)).collect());
        }
        let limit = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
        let _ = poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&inotify), PollFlags::POLLIN)], limit);
        // What it tells is looked for anyway.
        while inotify.read_events().is_ok() {}
    }
}

/// Reads, compresses and passes on what one stream sends.
fn pack(jobs: &Mutex<threads::Receiver<Job>>, queue: &mpsc::Sender<Vec<u8>>, sent: &Sent) -> io::Result<()> {
    let mut zstd = zstd::bulk::Compressor::new(LEVEL)?;
    let mut raw = Vec::with_capacity(PIECE);
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { mut piece, file, hole }) = job else { return Ok(()) };
        raw.resize(piece.raw as usize, 0);
        file.read_exact_at(&mut raw, piece.offset)?;
        let link_waits = queue.capacity() == QUEUE;
        let packed = if link_waits { None } else { Some(zstd.compress(&raw)?) };
        let packed = packed.filter(|packed| packed.len() < raw.len());
        piece.packed = packed.as_ref().map_or(0, |packed| packed.len() as u32);
        let body = packed.as_deref().unwrap_or(&raw);
        let mut bytes = Vec::with_capacity(body.len() + 300);
        piece.write(&mut bytes);
        bytes.extend_from_slice(body);
        sent.raw.fetch_add(u64::from(piece.raw), Ordering::Relaxed);
        sent.wire.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        queue.blocking_send(bytes).map_err(|_| odd("the stream is broken"))?;
        if hole {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // Without holes there is a full copy for a while, and nothing else is different.
            let _ = fallocate(&*file, flags, piece.offset.cast_signed(), i64::from(piece.raw));
        }
    }
}

/// The queue of a stream.
pub(super) fn queue() -> (mpsc::Sender<Vec<u8>>, mpsc::Receiver<Vec<u8>>) {
    mpsc::channel(QUEUE)
}

// === The target ===

/// Puts what comes on one stream into the directories; not more than `room` bytes on all streams of a move. For a thread
/// that may wait.
pub(super) fn receive(
    mut from: impl Read,
    dirs: &[PathBuf],
    room: u64,
    received: &AtomicU64,
) -> io::Result<()> {
    let mut zstd = zstd::bulk::Decompressor::new()?;
    let (mut bytes, mut raw) = (Vec::new(), Vec::new());
    let mut files: HashMap<(u8, String), File> = HashMap::new();
    while let Some(piece) = Piece::read(&mut from, &mut bytes)? {
        let length = u64::from(piece.raw);
        let end = piece.offset.checked_add(length).filter(|end| *end <= room);
        if end.is_none() || received.fetch_add(length, Ordering::Relaxed) + length > room {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "there is more than was announced"));
        }
        let body = if piece.packed == 0 {
            &bytes
        } else {
            raw.resize(piece.raw as usize, 0);
            if zstd.decompress_to_buffer(&bytes, &mut raw)? != raw.len() {
                return Err(odd("a piece is not as long as it says"));
            }
            &raw
        };
        let key = (piece.unit, piece.name);
        let file = match files.entry(key) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => {
                let (unit, name) = new.key();
                let dir = dirs.get(usize::from(*unit)).ok_or_else(|| odd("there is no such unit"))?;
                let path = dir.join(name);
                new.insert(File::options().write(true).create(true).truncate(false).open(path)?)
            }
        };
        file.write_all_at(body, piece.offset)?;
        // One for each process and thread, and each is done after one piece: not all are kept open.
        if files.len() > 64 {
            files.clear();
        }
    }
    Ok(())
}

/// Whether these files are there, and as long as that; empty ones are made.
pub(super) fn whole(dirs: &[PathBuf], files: &Files) -> io::Result<()> {
    if files.len() > FILES {
        return Err(odd("too many files"));
    }
    for (unit, name, length) in files {
        let dir = dirs.get(usize::from(*unit)).ok_or_else(|| odd("there is no such unit"))?;
        if !is_name(name) {
            return Err(odd("a name is none of an image"));
        }
        let path = dir.join(name);
        if *length == 0 {
            File::options().write(true).create(true).truncate(false).open(&path)?;
        }
        let found = fs::metadata(&path).map_or(0, |meta| meta.len());
        if found != *length {
            return Err(odd(&format!("the image {name} has {found} bytes instead of {length}")));
        }
    }
    Ok(())
}

/// Bytes that come in pieces, to be read on another thread.
#[derive(Debug)]
pub(super) struct Chunks {
    chunks: mpsc::Receiver<io::Result<bytes::Bytes>>,
    chunk: bytes::Bytes,
}

impl Chunks {
    pub(super) fn new(chunks: mpsc::Receiver<io::Result<bytes::Bytes>>) -> Self {
        Self { chunks, chunk: bytes::Bytes::new() }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.chunks.blocking_recv() {
                None => return Ok(0),
                Some(chunk) => self.chunk = chunk?,
            }
        }
        let count = buffer.len().min(self.chunk.len());
        buffer[..count].copy_from_slice(&self.chunk.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        (0..length).map(|n| if n / 4096 % 2 == 0 { next() } else { 7 }).collect()
    }

    /// What is written while it is sent arrives, whole, on as many streams as there are, and takes no room where it was.
    #[test]
    fn files_arrive_while_they_are_written() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = |dir: &tempfile::TempDir| {
            let dirs: Vec<_> = (0..2).map(|n| dir.path().join(n.to_string())).collect();
            for dir in &dirs {
                fs::create_dir(dir).unwrap();
            }
            dirs
        };
        let (from, to) = (of(&from), of(&to));
        let dirs = Dirs::new(from.clone());
        let (sent, received) = (Sent::default(), AtomicU64::new(0));
        let (first, second) = (noise((9 << 20) + 17, 1), noise(3 << 20, 2));
        let files = std::thread::scope(|scope| {
            let (mut queues, mut takers) = (Vec::new(), Vec::new());
            for _ in 0..2 {
                let (queue, mut pieces) = queue();
                let (chunks, stream) = mpsc::channel(1);
                queues.push(queue);
                scope.spawn(move || {
                    while let Some(piece) = pieces.blocking_recv() {
                        // In two halves, as they may come.
                        let mut piece = bytes::Bytes::from(piece);
                        let half = piece.split_to(piece.len() / 2);
                        chunks.blocking_send(Ok(half)).unwrap();
                        chunks.blocking_send(Ok(piece)).unwrap();
                    }
                });
                let (to, received) = (&to, &received);
                takers.push(scope.spawn(move || receive(Chunks::new(stream), to, 64 << 20, received)));
            }
            let sending = {
                let (dirs, sent) = (dirs.clone(), &sent);
                scope.spawn(move || send(&dirs, queues, sent).unwrap())
            };
            let mut file = File::create(from[0].join("pages-1.img")).unwrap();
            for part in first.chunks(700_000) {
                file.write_all(part).unwrap();
            }
            fs::write(from[1].join("pages-1.img"), &second).unwrap();
            fs::write(from[1].join("core-7.img"), "core").unwrap();
            fs::write(from[1].join("empty.img"), "").unwrap();
            fs::write(from[1].join("dump.log"), "log").unwrap();
            dirs.complete();
            let files = sending.join().unwrap();
            for taker in takers {
                taker.join().unwrap().unwrap();
            }
            files
        });
        whole(&to, &files).unwrap();
        assert_eq!(fs::read(to[0].join("pages-1.img")).unwrap(), first);
        assert_eq!(fs::read(to[1].join("pages-1.img")).unwrap(), second);
        assert_eq!(fs::read(to[1].join("core-7.img")).unwrap(), b"core");
        assert!(to[1].join("empty.img").exists() && !to[1].join("dump.log").exists());
        assert_eq!(sent.raw.load(Ordering::Relaxed), (first.len() + second.len() + 4) as u64);
        let blocks =
            std::os::unix::fs::MetadataExt::blocks(&fs::metadata(from[0].join("pages-1.img")).unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks are left");
        let mut more = files.clone();
        more[0].2 += 1;
        assert!(whole(&to, &more).is_err());
    }

    #[test]
    fn what_leads_elsewhere_or_is_too_much_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().to_owned()];
        let bytes = |unit, name: &str, offset, raw: u32| {
            let mut bytes = Vec::new();
            Piece { unit, name: name.into(), offset, raw, packed: 0 }.write(&mut bytes);
            bytes.resize(bytes.len() + raw as usize, 1);
            bytes
        };
        let take = |bytes: &[u8]| receive(bytes, &dirs, 1 << 20, &AtomicU64::new(0));
        take(&bytes(0, "a.img", 0, 10)).unwrap();
        for bad in [
            bytes(1, "a.img", 0, 10),
            bytes(0, "../a.img", 0, 10),
            bytes(0, ".x", 0, 10),
            bytes(0, "", 0, 10),
            bytes(0, "a.img", u64::MAX - 3, 10),
            bytes(0, "a.img", 1 << 20, 10),
            bytes(0, "a.img", 0, 2 << 20),
            bytes(0, "a.img", 0, 0),
            bytes(0, "a.img", 0, 10)[..25].to_vec(),
        ] {
            assert!(take(&bad).is_err(), "{:?}", &bad[..bad.len().min(30)]);
        }
        let twice = [bytes(0, "a.img", 0, 600_000), bytes(0, "b.img", 0, 600_000)].concat();
        assert_eq!(take(&twice).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_dump_that_is_broken_off_is_not_sent_as_whole() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs::new(vec![dir.path().to_owned()]);
        let (queue, _pieces) = queue();
        dirs.give_up();
        assert!(send(&dirs, vec![queue], &Sent::default()).is_err());
    }
}
