//! The journal: the stream of events on disk.
//!
//! Segments in one directory, each named after the number of its first event
//! (`00000000000000000042.log`), each a sequence of lines:
//!
//! ```text
//! <crc32 of the JSON, 8 hex digits> <event as JSON>\n
//! ```
//!
//! so that `tail` and `grep` work on it. Why it survives what can happen to it:
//!
//! - *Crash of ftd or the host*: a line counts when it is whole and its checksum fits. What is torn
//!   can only be at the end of the newest segment; it is cut off when the journal is opened, and said.
//! - *A flipped bit*: that line is skipped and counted by readers; its neighbours are not touched.
//! - *Full disk*: a write that fails is taken back (the file is cut to its last whole line) and the
//!   events wait in memory, bounded, until the disk takes them again. The oldest segments are given
//!   up first when that helps.
//! - *Growth*: a new segment is begun at a sixteenth of the bound, and the oldest are deleted so that
//!   all together never exceed it.
//!
//! One thread writes ([`Writer`]); any number of readers read the files ([`read`]), without locks.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use super::{Event, Kind, bus::Bus};

/// Events held in memory while the disk refuses them.
const BACKLOG: usize = 100_000;
/// How long to wait before a refused write is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// A segment ends when it reaches this share of the journal's bound.
const SEGMENTS: u64 = 16;

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    max_bytes: u64,
    segment: Option<Segment>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    path: PathBuf,
    len: u64,
}

/// What opening found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The number that the next event gets.
    pub next_seq: u64,
    /// The newest segment and the bytes cut from its torn end, when there were any.
    pub repaired: Option<(PathBuf, u64)>,
}

impl Journal {
    /// Opens the journal in `dir`, making the directory when there is none, and mends a torn end.
    pub fn open(dir: &Path, max_bytes: u64) -> io::Result<(Self, Opened)> {
        fs::create_dir_all(dir)?;
        let mut journal = Self { dir: dir.to_owned(), max_bytes, segment: None };
        let mut opened = Opened::default();
        let Some((first, path)) = segments(dir)?.pop() else {
            return Ok((journal, opened));
        };
        let scan = Scan::of(&path)?;
        opened.next_seq = scan.last.map_or(first, |seq| seq + 1);
        let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
        let len = file.seek(SeekFrom::End(0))?;
        if scan.whole < len {
            file.set_len(scan.whole)?;
            file.seek(SeekFrom::End(0))?;
            file.sync_data()?;
            opened.repaired = Some((path.clone(), len - scan.whole));
        }
        journal.segment = Some(Segment { file, path, len: scan.whole });
        Ok((journal, opened))
    }

    /// Writes `events` durably: all of them, or, on an error, none.
    pub fn append(&mut self, events: &[Arc<Event>]) -> io::Result<()> {
        let Some(first) = events.first() else { return Ok(()) };
        if self.segment.as_ref().is_none_or(|s| s.len >= self.max_bytes / SEGMENTS) {
            self.begin_segment(first.seq)?;
        }
        let mut bytes = Vec::with_capacity(events.len() * 256);
        for event in events {
            encode(event, &mut bytes);
        }
        // begin_segment has left one open.
        let Some(segment) = self.segment.as_mut() else { return Ok(()) };
        let written = segment.file.write_all(&bytes).and_then(|()| segment.file.sync_data());
        match written {
            Ok(()) => segment.len += bytes.len() as u64,
            Err(error) => {
                let error = io::Error::new(error.kind(), format!("{}: {error}", segment.path.display()));
                let len = segment.len;
                let taken_back =
                    segment.file.set_len(len).and_then(|()| segment.file.seek(SeekFrom::Start(len)));
                if taken_back.is_err() {
                    // The torn line stays where readers skip it; the next write begins a segment.
                    self.segment = None;
                }
                self.give_up_oldest()?;
                return Err(error);
            }
        }
        self.keep_within_bound()
    }

    fn begin_segment(&mut self, first: u64) -> io::Result<()> {
        let path = self.dir.join(format!("{first:020}.log"));
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
        File::open(&self.dir)?.sync_all()?;
        self.segment = Some(Segment { file, path, len: 0 });
        Ok(())
    }

    fn keep_within_bound(&self) -> io::Result<()> {
        let all = segments(&self.dir)?;
        let sizes: Vec<u64> = all.iter().map(|(_, p)| fs::metadata(p).map_or(0, |m| m.len())).collect();
        let mut total: u64 = sizes.iter().sum();
        // The newest is never deleted: it is being written.
        for ((_, path), size) in all.iter().zip(sizes).take(all.len().saturating_sub(1)) {
            if total <= self.max_bytes {
                break;
            }
            fs::remove_file(path)?;
            total -= size;
        }
        Ok(())
    }

    /// A full disk: what is oldest goes, so that what is new can be kept. Only while there is more
    /// than one old segment: a disk filled by others must not cost the whole journal.
    fn give_up_oldest(&self) -> io::Result<()> {
        let all = segments(&self.dir)?;
        if all.len() > 2
            && let Some((_, oldest)) = all.first()
        {
            fs::remove_file(oldest)?;
        }
        Ok(())
    }
}

fn encode(event: &Event, out: &mut Vec<u8>) {
    match serde_json::to_string(event) {
        Ok(json) => {
            // Writing to a Vec cannot fail.
            let _ = writeln!(out, "{:08x} {json}", crc32fast::hash(json.as_bytes()));
        }
        // Events are plain structs with string keys: there is nothing in them that JSON lacks.
        Err(error) => tracing::error!(seq = event.seq, %error, "event cannot be written as JSON"),
    }
}

fn decode(line: &[u8]) -> Option<Event> {
    let line = line.strip_suffix(b"\n")?;
    let (crc, rest) = (line.get(..8)?, line.get(8..)?.strip_prefix(b" ")?);
    let crc = u32::from_str_radix(std::str::from_utf8(crc).ok()?, 16).ok()?;
    (crc32fast::hash(rest) == crc).then(|| serde_json::from_slice(rest).ok())?
}

/// The journal's segments, oldest first, with the number of each one's first event.
fn segments(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut all: Vec<_> = fs::read_dir(dir)?
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let path = entry.path();
            let first = path.file_name()?.to_str()?.strip_suffix(".log")?.parse().ok()?;
            Some((first, path))
        })
        .collect();
    all.sort_unstable();
    Ok(all)
}

/// One pass over a segment: where its last whole line ends, and that line's number.
struct Scan {
    whole: u64,
    last: Option<u64>,
}

impl Scan {
    fn of(path: &Path) -> io::Result<Self> {
        let mut reader = BufReader::new(File::open(path)?);
        let (mut at, mut scan, mut line) = (0, Self { whole: 0, last: None }, Vec::new());
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line)?;
            if n == 0 {
                return Ok(scan);
            }
            at += n as u64;
            if let Some(event) = decode(&line) {
                scan = Self { whole: at, last: Some(event.seq) };
            }
        }
    }
}

/// Which events a reader wants.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Not before this moment.
    pub since: Option<jiff::Timestamp>,
    /// Only events of this unit.
    pub unit: Option<String>,
    /// Only events with smaller numbers.
    pub before: Option<u64>,
}

impl Query {
    /// Whether `event` is wanted.
    pub fn wants(&self, event: &Event) -> bool {
        self.since.is_none_or(|since| event.time >= since)
            && self.unit.as_ref().is_none_or(|unit| event.unit.as_ref() == Some(unit))
            && self.before.is_none_or(|before| event.seq < before)
    }
}

/// Reads what is wanted from the journal in `dir`, oldest first; answers the events and how many
/// lines were damaged. A segment that is deleted meanwhile is one that the bound has overtaken.
pub fn read(dir: &Path, query: &Query) -> io::Result<(Vec<Event>, u64)> {
    let (mut events, mut damaged) = (Vec::new(), 0);
    let all = match segments(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((events, 0)),
        all => all?,
    };
    for (i, (first, path)) in all.iter().enumerate() {
        if query.before.is_some_and(|before| *first >= before) {
            break;
        }
        let next_begins = all.get(i + 1).and_then(|(_, next)| first_event(next)).map(|e| e.time);
        if let (Some(since), Some(next)) = (query.since, next_begins)
            && next < since
        {
            continue;
        }
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        let (mut reader, mut line) = (BufReader::new(file), Vec::new());
        while reader.read_until(b'\n', &mut line)? > 0 {
            match decode(&line) {
                Some(event) if query.wants(&event) => events.push(event),
                Some(_) => {}
                None => damaged += 1,
            }
            line.clear();
        }
    }
    Ok((events, damaged))
}

fn first_event(path: &Path) -> Option<Event> {
    let mut line = Vec::new();
    BufReader::new(File::open(path).ok()?).read_until(b'\n', &mut line).ok()?;
    decode(&line)
}

/// The journal's thread: takes events from the bus's queue, writes all that wait at once, one sync
/// for all of them.
#[derive(Debug)]
pub struct Writer {
    journal: Journal,
    waiting: VecDeque<Arc<Event>>,
    blocked: bool,
    lost: u64,
}

impl Writer {
    /// A writer to `journal`.
    pub fn new(journal: Journal) -> Self {
        Self { journal, waiting: VecDeque::new(), blocked: false, lost: 0 }
    }

    /// Writes until the bus is gone. Tells the bus when the disk refuses and when it is back.
    pub fn run(mut self, queue: &Receiver<Arc<Event>>, bus: &std::sync::Weak<Bus>) {
        loop {
            let first = if self.blocked {
                match queue.recv_timeout(RETRY) {
                    Ok(event) => Some(event),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            } else {
                match queue.recv() {
                    Ok(event) => Some(event),
                    Err(_) => break,
                }
            };
            self.waiting.extend(first);
            self.waiting.extend(queue.try_iter());
            while self.waiting.len() > BACKLOG {
                self.waiting.pop_front();
                self.lost += 1;
            }
            self.flush(bus);
        }
        self.flush(bus);
    }

    fn flush(&mut self, bus: &std::sync::Weak<Bus>) {
        let result = self.journal.append(self.waiting.make_contiguous());
        let say = |kind| {
            if let Some(bus) = bus.upgrade() {
                bus.emit(None, None, kind);
            }
        };
        match result {
            Ok(()) => {
                let late = self.waiting.len() as u64;
                self.waiting.clear();
                if std::mem::take(&mut self.blocked) {
                    let lost = std::mem::take(&mut self.lost);
                    say(Kind::JournalBack { late, lost });
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.blocked, true) {
                    tracing::error!(%error, "the journal cannot be written; events wait in memory");
                    say(Kind::JournalBlocked { cause: error.to_string() });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(seq: u64) -> Arc<Event> {
        let kind = Kind::Left { why: format!("event {seq} \u{e4}\n") };
        let time = jiff::Timestamp::from_second(1_000_000 + seq.cast_signed()).unwrap();
        Arc::new(Event { seq, time, node: "n".into(), unit: None, op: None, kind })
    }

    fn filled(dir: &Path, n: u64) -> PathBuf {
        let (mut journal, opened) = Journal::open(dir, 1 << 20).unwrap();
        for seq in opened.next_seq..opened.next_seq + n {
            journal.append(&[event(seq)]).unwrap();
        }
        segments(dir).unwrap().pop().unwrap().1
    }

    #[test]
    fn what_was_written_is_read_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 5);
        filled(dir.path(), 3);
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert_eq!(events.iter().map(|e| e.seq).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        assert_eq!((damaged, &events[3]), (0, &*event(3)));
    }

    #[test]
    fn since_and_before_bound_what_is_read() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 10);
        let query = Query { since: Some(event(4).time), before: Some(8), unit: None };
        let (events, _) = read(dir.path(), &query).unwrap();
        assert_eq!(events.iter().map(|e| e.seq).collect::<Vec<_>>(), [4, 5, 6, 7]);
    }

    #[test]
    fn the_bound_holds_and_the_newest_survive() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 16 << 10).unwrap();
        for seq in 0..2000 {
            journal.append(&[event(seq)]).unwrap();
        }
        let size: u64 =
            segments(dir.path()).unwrap().iter().map(|(_, p)| fs::metadata(p).unwrap().len()).sum();
        assert!(size <= 17 << 10, "{size}");
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert_eq!((events.last().unwrap().seq, damaged), (1999, 0));
        assert!(events.windows(2).all(|w| w[0].seq + 1 == w[1].seq));
    }

    #[test]
    fn a_refused_write_leaves_no_torn_line_and_the_events_come_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = filled(dir.path(), 2);
        let (journal, _) = Journal::open(dir.path(), 1 << 20).unwrap();
        let mut writer = Writer::new(journal);
        // A file that is open for reading only refuses every write, as a full disk does.
        writer.journal.segment.as_mut().unwrap().file = File::open(&path).unwrap();
        writer.waiting.push_back(event(2));
        let nobody = std::sync::Weak::new();
        writer.flush(&nobody);
        assert!(writer.blocked && writer.waiting.len() == 1);
        writer.flush(&nobody);
        assert!(!writer.blocked && writer.waiting.is_empty());
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert_eq!((events.len(), damaged), (3, 0));
    }

    proptest! {
        /// Cut anywhere: the whole lines before the cut are there, the rest is gone, writing goes on.
        #[test]
        fn a_torn_end_costs_only_what_is_torn(cut in 0_u64..2000) {
            let dir = tempfile::tempdir().unwrap();
            let path = filled(dir.path(), 10);
            let len = fs::metadata(&path).unwrap().len();
            let cut = cut.min(len);
            OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            let (mut journal, opened) = Journal::open(dir.path(), 1 << 20).unwrap();
            let next = opened.next_seq;
            journal.append(&[event(next)]).unwrap();
            let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
            prop_assert_eq!(damaged, 0);
            prop_assert_eq!(events.iter().map(|e| e.seq).collect::<Vec<_>>(), (0..=next).collect::<Vec<_>>());
        }

        /// A flipped bit: at most the lines that it touches are lost, no wrong event is read.
        #[test]
        fn a_flipped_bit_costs_only_its_line(at in 0_usize..1500, bit in 0_u8..8) {
            let dir = tempfile::tempdir().unwrap();
            let path = filled(dir.path(), 10);
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            fs::write(&path, &bytes).unwrap();
            let (events, _) = read(dir.path(), &Query::default()).unwrap();
            prop_assert!(events.len() >= 8, "{}", events.len());
            for e in &events {
                prop_assert_eq!(e, &*event(e.seq));
            }
        }
    }
}
