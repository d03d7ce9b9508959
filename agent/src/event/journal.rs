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
//!   events wait in memory, bounded, until the disk takes them again. Once for each such time the oldest
//!   segment is given up, if the disk is full and there are several.
//! - *No journal at the start*: ftd runs all the same, and tries to open it as it tries to write. Its events
//!   get numbers past all that the journal can hold ([`beyond`]), so that no number is used twice.
//! - *Growth*: a write never makes a segment larger than a sixteenth of the bound, and before a new one is
//!   begun, the oldest are deleted so that all together never exceed it.
//! - *A newer ftd's events*: what counts of a line is its checksum, number, time and unit; what happened is
//!   passed on as it is.
//!
//! One thread writes ([`Writer`]); any number of readers read the files ([`Reader`]), without locks.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Instant,
};

use serde::Deserialize;

use super::{Event, Kind, bus::Bus};
use crate::config;

/// A segment ends when it reaches this share of the journal's bound.
const SEGMENTS: u64 = 16;
/// How much of the journal a reader takes in one step.
const STEP: usize = 256 << 10;

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
    /// The end of the last line that was written and synced.
    len: u64,
    /// There may be more in the file than `len`.
    torn: bool,
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
        opened.next_seq = scan.last.map_or(first, |seq| seq + 1) + scan.damaged;
        let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
        let len = file.seek(SeekFrom::End(0))?;
        if scan.whole < len {
            file.set_len(scan.whole)?;
            file.seek(SeekFrom::End(0))?;
            file.sync_data()?;
            opened.repaired = Some((path.clone(), len - scan.whole));
        }
        journal.segment = Some(Segment { file, path, len: scan.whole, torn: false });
        Ok((journal, opened))
    }

    /// Writes the first of `events` durably, as many as the segment takes, at least one; answers how
    /// many. On an error: none.
    pub fn append(&mut self, events: &[Arc<Event>]) -> io::Result<usize> {
        let Some((first, rest)) = events.split_first() else { return Ok(0) };
        self.take_back()?;
        let target = self.max_bytes / SEGMENTS;
        let mut bytes = Vec::new();
        encode(first, &mut bytes);
        let fits = |len: u64, bytes: &[u8]| len + bytes.len() as u64 <= target;
        if self.segment.as_ref().is_none_or(|segment| !fits(segment.len, &bytes)) {
            self.begin_segment(first.seq, target.max(bytes.len() as u64))?;
        }
        // begin_segment has left one open.
        let Some(segment) = self.segment.as_mut() else { return Ok(0) };
        let mut count = 1;
        for event in rest {
            let before = bytes.len();
            encode(event, &mut bytes);
            if !fits(segment.len, &bytes) {
                bytes.truncate(before);
                break;
            }
            count += 1;
        }
        match segment.file.write_all(&bytes).and_then(|()| segment.file.sync_data()) {
            Ok(()) => {
                segment.len += bytes.len() as u64;
                Ok(count)
            }
            Err(error) => {
                segment.torn = true;
                let error = named(&segment.path, &error);
                // What cannot be taken back now is before the next write; until then readers skip it.
                let _ = self.take_back();
                Err(error)
            }
        }
    }

    /// Cuts the segment to what was written whole. By its name: the open file may be what has failed.
    fn take_back(&mut self) -> io::Result<()> {
        let Some(segment) = self.segment.as_mut().filter(|segment| segment.torn) else { return Ok(()) };
        let cut = || -> io::Result<File> {
            let mut file = OpenOptions::new().write(true).open(&segment.path)?;
            file.set_len(segment.len)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        match cut() {
            Ok(file) => (segment.file, segment.torn) = (file, false),
            // Somebody has deleted it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.segment = None,
            Err(error) => return Err(named(&segment.path, &error)),
        }
        Ok(())
    }

    /// Begins a segment that may grow to `room`, and first makes room for it inside the bound.
    fn begin_segment(&mut self, first: u64, room: u64) -> io::Result<()> {
        let path = self.dir.join(format!("{first:020}.log"));
        let begin = || -> io::Result<File> {
            fs::create_dir_all(&self.dir)?;
            keep_within(&self.dir, self.max_bytes.saturating_sub(room))?;
            if path.exists() && Scan::of(&path)?.last.is_some() {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "holds events of these numbers"));
            }
            let file = OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
            File::open(&self.dir)?.sync_all()?;
            Ok(file)
        };
        let file = begin().map_err(|error| named(&path, &error))?;
        self.segment = Some(Segment { file, path, len: 0, torn: false });
        Ok(())
    }

    /// A full disk: what is oldest goes, so that what is new can be kept. Only while there is more
    /// than one old segment: a disk filled by others must not cost the whole journal.
    fn give_up_oldest(&self) -> io::Result<()> {
        let all = segments(&self.dir)?;
        if all.len() > 2
            && let Some((_, oldest)) = all.first()
        {
            tracing::warn!(segment = %oldest.display(), "the disk is full: the journal's oldest part is deleted");
            fs::remove_file(oldest)?;
        }
        Ok(())
    }
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Deletes the oldest segments until all together have at most `bound` bytes.
fn keep_within(dir: &Path, bound: u64) -> io::Result<()> {
    let all = segments(dir)?;
    let sizes: Vec<u64> = all.iter().map(|(_, p)| fs::metadata(p).map_or(0, |m| m.len())).collect();
    let mut total: u64 = sizes.iter().sum();
    for ((_, path), size) in all.iter().zip(sizes) {
        if total <= bound {
            break;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(path, &error)),
            _ => total -= size,
        }
    }
    Ok(())
}

/// A number past all that the journal in `dir` holds, for when it cannot be opened. No line is shorter
/// than a byte, so the newest segment's size bounds what it holds. If not even the directory can be
/// read, only time is sure to have gone on: microseconds grow faster than events.
pub fn beyond(dir: &Path) -> u64 {
    match segments(dir) {
        Ok(mut all) => all.pop().map_or(0, |(first, path)| {
            first.saturating_add(fs::metadata(&path).map_or(u64::from(u32::MAX), |meta| meta.len()))
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(_) => jiff::Timestamp::now().as_microsecond().max(0).cast_unsigned(),
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

/// What the journal itself needs to know of an event, whatever has happened.
#[derive(Debug, Deserialize)]
struct Envelope {
    seq: u64,
    time: jiff::Timestamp,
    #[serde(default)]
    unit: Option<String>,
}

/// The JSON of a line that is whole, and what is on its envelope.
fn decode(line: &[u8]) -> Option<(Envelope, &[u8])> {
    let line = line.strip_suffix(b"\n")?;
    let (crc, json) = (line.get(..8)?, line.get(8..)?.strip_prefix(b" ")?);
    let crc = u32::from_str_radix(std::str::from_utf8(crc).ok()?, 16).ok()?;
    (crc32fast::hash(json) == crc).then(|| Some((serde_json::from_slice(json).ok()?, json)))?
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

/// One pass over a segment: where its last whole line ends, that line's number, and how many damaged
/// lines follow it: their events had numbers too.
struct Scan {
    whole: u64,
    last: Option<u64>,
    damaged: u64,
}

impl Scan {
    fn of(path: &Path) -> io::Result<Self> {
        let mut reader = BufReader::new(File::open(path)?);
        let (mut at, mut line) = (0, Vec::new());
        let mut scan = Self { whole: 0, last: None, damaged: 0 };
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line)?;
            if n == 0 {
                return Ok(scan);
            }
            at += n as u64;
            match decode(&line) {
                Some((envelope, _)) => scan = Self { whole: at, last: Some(envelope.seq), damaged: 0 },
                None => scan.damaged += u64::from(line.ends_with(b"\n")),
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
        self.admits(event.seq, event.time, event.unit.as_ref())
    }

    fn admits(&self, seq: u64, time: jiff::Timestamp, unit: Option<&String>) -> bool {
        self.since.is_none_or(|since| time >= since)
            && self.unit.as_ref().is_none_or(|wanted| unit == Some(wanted))
            && self.before.is_none_or(|before| seq < before)
    }
}

/// Reads what is wanted from the journal, oldest first, in steps that take little memory each.
#[derive(Debug)]
pub struct Reader {
    query: Query,
    /// Those not begun yet: path, and the first number that is in the next one.
    segments: VecDeque<(PathBuf, Option<u64>)>,
    open: Option<Lines>,
    /// How many wanted lines of the first segment come before those that are asked for.
    skip: u64,
    damaged: u64,
}

impl Reader {
    /// A reader of all that `query` wants of the journal in `dir`.
    pub fn new(dir: &Path, query: Query) -> io::Result<Self> {
        let all = match segments(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            all => all?,
        };
        let nexts: Vec<_> = all.iter().skip(1).map(|(first, path)| (*first, path.as_path())).collect();
        let mut wanted = VecDeque::new();
        for (i, (first, path)) in all.iter().enumerate() {
            if query.before.is_some_and(|before| *first >= before) {
                break;
            }
            let next = nexts.get(i);
            if let (Some(since), Some((_, next))) = (query.since, next)
                && first_time(next).is_some_and(|time| time < since)
            {
                continue;
            }
            wanted.push_back((path.clone(), next.map(|(first, _)| *first)));
        }
        Ok(Self { query, segments: wanted, open: None, skip: 0, damaged: 0 })
    }

    /// A reader of only the last `count` of them. Segments are counted from the newest back, and no
    /// further than needed.
    pub fn last(dir: &Path, query: Query, count: u64) -> io::Result<Self> {
        let mut reader = Self::new(dir, query)?;
        let (mut found, mut begin, mut line) = (0, reader.segments.len(), Vec::new());
        while found < count && begin > 0 {
            begin -= 1;
            let Some(mut lines) = Lines::open(&reader.segments[begin])? else { continue };
            while let Some(next) = lines.next(&reader.query, &mut line)? {
                found += u64::from(next == Next::Wanted);
            }
        }
        reader.segments.drain(..begin);
        reader.skip = found.saturating_sub(count);
        Ok(reader)
    }

    /// The next events, a line of JSON each, as they stand in the journal; perhaps none of them in this
    /// step. `None` at the end. A segment that is deleted meanwhile is one that the bound has overtaken.
    pub fn step(&mut self) -> io::Result<Option<Vec<u8>>> {
        let (mut out, mut taken, mut line) = (Vec::new(), 0, Vec::new());
        while taken < STEP {
            let Some(lines) = &mut self.open else {
                let Some(segment) = self.segments.pop_front() else { break };
                self.open = Lines::open(&segment)?;
                if self.open.is_none() {
                    self.skip = 0;
                }
                continue;
            };
            match lines.next(&self.query, &mut line)? {
                None => (self.open, self.skip) = (None, 0),
                Some(Next::Wanted) if self.skip > 0 => self.skip -= 1,
                Some(Next::Wanted) => out.extend_from_slice(json_of(&line)),
                Some(Next::Damaged) if self.skip == 0 => self.damaged += 1,
                Some(_) => {}
            }
            taken += line.len();
        }
        let more = self.open.is_some() || !self.segments.is_empty();
        Ok((more || !out.is_empty()).then_some(out))
    }

    /// How many damaged lines there were so far, in what was read.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }
}

/// What is behind the checksum, the line's end included.
fn json_of(line: &[u8]) -> &[u8] {
    line.get(9..).unwrap_or_default()
}

#[derive(Debug)]
struct Lines {
    reader: BufReader<File>,
    next_begins: Option<u64>,
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    Wanted,
    Unwanted,
    Damaged,
}

impl Lines {
    /// `None` when there is no such segment any more.
    fn open((path, next_begins): &(PathBuf, Option<u64>)) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Ok(Some(Self { reader: BufReader::new(file), next_begins: *next_begins })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(named(path, &error)),
        }
    }

    fn next(&mut self, query: &Query, line: &mut Vec<u8>) -> io::Result<Option<Next>> {
        line.clear();
        if self.reader.read_until(b'\n', line)? == 0 {
            return Ok(None);
        }
        Ok(match decode(line) {
            Some((Envelope { seq, time, unit }, _)) if query.admits(seq, time, unit.as_ref()) => {
                Some(Next::Wanted)
            }
            Some(_) => Some(Next::Unwanted),
            // The newest segment's last line is being written.
            None if self.next_begins.is_none() && !line.ends_with(b"\n") => None,
            None => Some(Next::Damaged),
        })
    }
}

fn first_time(path: &Path) -> Option<jiff::Timestamp> {
    let mut line = Vec::new();
    BufReader::new(File::open(path).ok()?).read_until(b'\n', &mut line).ok()?;
    decode(&line).map(|(envelope, _)| envelope.time)
}

/// The journal's thread: takes events from the bus's queue, writes all that wait at once, one sync
/// for all that go into one segment.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    settings: config::Journal,
    /// `None` as long as it could not be opened.
    journal: Option<Journal>,
    /// The number of the first event of this run.
    first_seq: u64,
    waiting: VecDeque<Arc<Event>>,
    /// While the disk refuses: when it is tried again.
    blocked: Option<Instant>,
    late: u64,
    lost: u64,
    written: Arc<AtomicU64>,
}

/// What a new [`Writer`] found.
#[derive(Debug, Default)]
pub struct Start {
    /// See [`Opened`]; a number past all others when the journal could not be opened.
    pub opened: Opened,
    /// Why it could not be opened, as an event; it is tried again.
    pub blocked: Option<Kind>,
}

impl Writer {
    /// A writer to the journal in `dir`, which is opened now or, when that fails, later.
    pub fn open(dir: &Path, settings: &config::Journal) -> (Self, Start) {
        let mut writer = Self {
            dir: dir.to_owned(),
            settings: settings.clone(),
            journal: None,
            first_seq: 0,
            waiting: VecDeque::new(),
            blocked: None,
            late: 0,
            lost: 0,
            written: Arc::default(),
        };
        let start = match Journal::open(dir, settings.max_size.as_u64()) {
            Ok((journal, opened)) => {
                writer.journal = Some(journal);
                Start { opened, blocked: None }
            }
            Err(error) => {
                writer.blocked = Some(Instant::now() + settings.retry);
                let opened = Opened { next_seq: beyond(dir), repaired: None };
                Start { opened, blocked: Some(blocked(dir, &named(dir, &error))) }
            }
        };
        writer.first_seq = start.opened.next_seq;
        writer.written.store(writer.first_seq, Ordering::Relaxed);
        (writer, start)
    }

    /// The number after the last event that is on the disk, as it grows.
    pub fn written(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.written)
    }

    /// Writes until the bus is gone. Tells the bus when the disk refuses and when it is back.
    pub fn run(mut self, queue: &Receiver<Arc<Event>>, bus: &Weak<Bus>) {
        loop {
            let first = match self.blocked {
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(retry) => queue.recv_timeout(retry.saturating_duration_since(Instant::now())),
            };
            match first {
                Ok(event) => self.take(event, queue),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.blocked.is_none_or(|retry| retry <= Instant::now()) {
                self.flush(bus);
            }
        }
        self.flush(bus);
    }

    /// Takes what waits in the queue. While the disk refuses, all of it, and gives up the oldest that are
    /// too many; else only what may wait here, the rest is safe where it is.
    fn take(&mut self, first: Arc<Event>, queue: &Receiver<Arc<Event>>) {
        self.waiting.push_back(first);
        while self.blocked.is_some() || self.waiting.len() < self.settings.backlog {
            let Ok(event) = queue.try_recv() else { break };
            self.waiting.push_back(event);
        }
        while self.waiting.len() > self.settings.backlog {
            self.waiting.pop_front();
            self.lost += 1;
        }
    }

    fn flush(&mut self, bus: &Weak<Bus>) {
        while !self.waiting.is_empty() {
            match self.write_some(bus) {
                Ok(count) => {
                    if let Some(last) = self.waiting.drain(..count).next_back() {
                        self.written.store(last.seq + 1, Ordering::Relaxed);
                    }
                    self.late += count as u64;
                }
                Err(error) => return self.refused(&error, bus),
            }
        }
        let (late, lost) = (std::mem::take(&mut self.late), self.lost);
        if self.blocked.take().is_some() {
            self.lost = 0;
            say(bus, Kind::JournalBack { late, lost });
        }
    }

    fn write_some(&mut self, bus: &Weak<Bus>) -> io::Result<usize> {
        if self.journal.is_none() {
            self.journal = Some(self.open_late(bus).map_err(|error| named(&self.dir, &error))?);
        }
        let Some(journal) = &mut self.journal else { return Ok(0) };
        journal.append(self.waiting.make_contiguous())
    }

    fn open_late(&self, bus: &Weak<Bus>) -> io::Result<Journal> {
        let (journal, opened) = Journal::open(&self.dir, self.settings.max_size.as_u64())?;
        if opened.next_seq > self.first_seq {
            let cause = "it holds numbers that this run of ftd has used; restart ftd";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, cause));
        }
        if let Some(kind) = opened.mended() {
            say(bus, kind);
        }
        Ok(journal)
    }

    fn refused(&mut self, error: &io::Error, bus: &Weak<Bus>) {
        if self.blocked.replace(Instant::now() + self.settings.retry).is_some() {
            return;
        }
        tracing::error!(%error, "the journal cannot be written; events wait in memory");
        self.late = 0;
        say(bus, blocked(&self.dir, error));
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            && let Some(Err(error)) = self.journal.as_ref().map(Journal::give_up_oldest)
        {
            tracing::error!(%error, "the journal's oldest part cannot be deleted");
        }
    }
}

impl Opened {
    /// The event that tells of a repair, when there was one.
    pub fn mended(&self) -> Option<Kind> {
        let (file, bytes) = self.repaired.as_ref()?;
        Some(Kind::JournalRepaired { file: file.display().to_string(), bytes: *bytes })
    }
}

fn say(bus: &Weak<Bus>, kind: Kind) {
    if let Some(bus) = bus.upgrade() {
        bus.emit(None, None, kind);
    }
}

fn blocked(dir: &Path, error: &io::Error) -> Kind {
    let dir = dir.display();
    let mend = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("make room on the file system of {dir}, or lower journal.max_size")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("let ftd write to {dir} (ReadWritePaths= in a drop-in of ftd.service; mount options)")
        }
        io::ErrorKind::AlreadyExists => "systemctl restart ftd".into(),
        _ => format!("check the disk and {dir}; see: journalctl -k"),
    };
    Kind::JournalBlocked { cause: error.to_string(), mend: format!("{mend}; ftd tries again by itself") }
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
            assert_eq!(journal.append(&[event(seq)]).unwrap(), 1);
        }
        segments(dir).unwrap().pop().unwrap().1
    }

    fn read_all(mut reader: Reader) -> (Vec<Event>, u64) {
        let mut bytes = Vec::new();
        while let Some(some) = reader.step().unwrap() {
            bytes.extend(some);
        }
        let lines = bytes.split_inclusive(|byte| *byte == b'\n');
        (lines.map(|line| serde_json::from_slice(line).unwrap()).collect(), reader.damaged())
    }

    fn read(dir: &Path, query: &Query) -> io::Result<(Vec<Event>, u64)> {
        Ok(read_all(Reader::new(dir, query.clone())?))
    }

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.seq).collect()
    }

    fn size(dir: &Path) -> u64 {
        segments(dir).unwrap().iter().map(|(_, p)| fs::metadata(p).unwrap().len()).sum()
    }

    fn settings(max_size: u64) -> config::Journal {
        config::Journal { max_size: bytesize::ByteSize(max_size), ..config::Journal::default() }
    }

    /// A writer whose next write fails, as on a full disk: its file is open for reading only.
    fn refused(dir: &Path, max_size: u64) -> Writer {
        let (mut writer, _) = Writer::open(dir, &settings(max_size));
        let segment = writer.journal.as_mut().unwrap().segment.as_mut().unwrap();
        segment.file = File::open(&segment.path).unwrap();
        writer
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
        filled(dir.path(), 2);
        let mut writer = refused(dir.path(), 1 << 20);
        writer.waiting.push_back(event(2));
        let nobody = Weak::new();
        writer.flush(&nobody);
        assert!(writer.blocked.is_some() && writer.waiting.len() == 1);
        writer.flush(&nobody);
        assert!(writer.blocked.is_none() && writer.waiting.is_empty());
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert_eq!((events.len(), damaged), (3, 0));
    }

    #[test]
    fn only_the_last_are_read_and_no_more_segments_than_needed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 64 << 10).unwrap();
        for seq in 0..200 {
            journal.append(&[event(seq)]).unwrap();
        }
        let all = segments(dir.path()).unwrap();
        assert!(all.len() > 3);
        let query = Query { before: Some(198), ..Query::default() };
        for count in [0, 1, 5, 50, 198, 1000] {
            let reader = Reader::last(dir.path(), query.clone(), count).unwrap();
            let (events, _) = read_all(reader);
            assert_eq!(numbers(&events), (198_u64.saturating_sub(count)..198).collect::<Vec<_>>());
        }
        // The oldest is not even looked at.
        fs::remove_file(&all[0].1).unwrap();
        fs::create_dir(&all[0].1).unwrap();
        assert_eq!(read_all(Reader::last(dir.path(), query, 5).unwrap()).0.len(), 5);
    }

    #[test]
    fn an_event_of_a_newer_ftd_is_kept_and_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = filled(dir.path(), 2);
        let json = r#"{"seq":2,"time":"2026-01-01T00:00:00Z","node":"n","event":"unheard_of","x":1}"#;
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        writeln!(file, "{:08x} {json}", crc32fast::hash(json.as_bytes())).unwrap();
        let (_, opened) = Journal::open(dir.path(), 1 << 20).unwrap();
        assert_eq!(opened, Opened { next_seq: 3, repaired: None });
        let mut reader = Reader::last(dir.path(), Query::default(), 1).unwrap();
        assert_eq!(reader.step().unwrap().unwrap(), format!("{json}\n").into_bytes());
        assert_eq!((reader.step().unwrap(), reader.damaged()), (None, 0));
    }

    #[test]
    fn a_line_that_is_being_written_is_no_damage_and_a_damaged_one_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = filled(dir.path(), 3);
        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        bytes.extend(b"0123abcd {\"seq\"");
        fs::write(&path, bytes).unwrap();
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert_eq!((numbers(&events), damaged), (vec![1, 2], 1));
    }

    #[test]
    fn the_number_of_a_damaged_last_event_is_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = filled(dir.path(), 3);
        let mut bytes = fs::read(&path).unwrap();
        let end = bytes.len() - 5;
        bytes[end] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(Journal::open(dir.path(), 1 << 20).unwrap().1.next_seq, 3);
    }

    #[test]
    fn a_backlog_is_written_in_parts_inside_the_bound_and_parts_count() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 1);
        let bound = 32 << 10;
        let mut writer = refused(dir.path(), bound);
        writer.waiting.extend((1..1000).map(event));
        writer.flush(&Weak::new());
        assert_eq!(writer.waiting.len(), 999);
        let part = writer.write_some(&Weak::new()).unwrap();
        assert!(0 < part && part < 30, "{part}");
        writer.waiting.drain(..part);
        writer.flush(&Weak::new());
        assert!(size(dir.path()) <= bound, "{}", size(dir.path()));
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert_eq!((events.last().unwrap().seq, damaged), (999, 0));
        assert!(events.windows(2).all(|w| w[0].seq + 1 == w[1].seq));
        assert_eq!(writer.written().load(Ordering::Relaxed), 1000);
    }

    #[test]
    fn an_error_that_is_no_full_disk_costs_no_old_segment_however_often_it_is_tried() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 16 << 10).unwrap();
        for seq in 0..45 {
            journal.append(&[event(seq)]).unwrap();
        }
        let before = segments(dir.path()).unwrap();
        assert!(before.len() > 3);
        let mut writer = refused(dir.path(), 16 << 10);
        let (path, full) = (dir.path().join("x"), io::Error::from(io::ErrorKind::StorageFull));
        writer.waiting.push_back(event(45));
        writer.flush(&Weak::new());
        for _ in 0..5 {
            writer.refused(&named(&path, &full), &Weak::new());
        }
        assert_eq!(segments(dir.path()).unwrap(), before);
        // A full disk: one, for all of the time that it is full.
        writer.blocked = None;
        for _ in 0..5 {
            writer.refused(&named(&path, &full), &Weak::new());
        }
        assert_eq!(segments(dir.path()).unwrap(), before[1..]);
    }

    #[test]
    fn a_refusing_disk_is_left_alone_until_its_time_though_events_arrive() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 1);
        let mut writer = refused(dir.path(), 1 << 20);
        writer.settings.retry = std::time::Duration::from_hours(1);
        let (bus, queue) = Bus::new("n".into(), 1);
        let weak = Arc::downgrade(&bus);
        let path = segments(dir.path()).unwrap().pop().unwrap().1;
        let thread = std::thread::spawn(move || writer.run(&queue, &weak));
        let mut follower = bus.follow();
        bus.emit(None, None, Kind::AgentStopped {});
        while !matches!(follower.blocking_recv().unwrap().kind, Kind::JournalBlocked { .. }) {}
        assert!(bus.journal_blocked().is_some());
        let len = fs::metadata(&path).unwrap().len();
        for _ in 0..100 {
            bus.emit(None, None, Kind::AgentStopped {});
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(fs::metadata(&path).unwrap().len(), len);
        bus.close();
        thread.join().unwrap();
        assert_eq!(read(dir.path(), &Query::default()).unwrap().0.len(), 103);
        assert!(bus.journal_blocked().is_none());
    }

    #[test]
    fn a_backlog_that_is_too_long_loses_the_oldest_and_counts_them() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, _) = Writer::open(dir.path(), &settings(1 << 20));
        writer.settings.backlog = 10;
        let (sender, queue) = std::sync::mpsc::sync_channel(100);
        for seq in 1..40 {
            sender.send(event(seq)).unwrap();
        }
        // Well: what does not fit stays in the queue.
        writer.take(event(0), &queue);
        assert_eq!((writer.waiting.len(), writer.lost), (10, 0));
        writer.blocked = Some(Instant::now());
        writer.take(queue.recv().unwrap(), &queue);
        assert_eq!((writer.waiting.len(), writer.lost), (10, 30));
    }

    #[test]
    fn a_journal_that_cannot_be_opened_at_the_start_is_opened_later_and_no_number_repeats() {
        let dir = tempfile::tempdir().unwrap();
        let journal = dir.path().join("journal");
        let path = filled(&journal, 5);
        // Its newest segment cannot be read.
        let away = dir.path().join("away");
        fs::rename(&path, &away).unwrap();
        fs::create_dir(&path).unwrap();
        let (mut writer, start) = Writer::open(&journal, &settings(1 << 20));
        assert!(matches!(start.blocked, Some(Kind::JournalBlocked { .. })));
        let next = start.opened.next_seq;
        assert!(next >= 5, "{next}");
        writer.waiting.push_back(event(next));
        writer.flush(&Weak::new());
        assert_eq!(writer.waiting.len(), 1);
        fs::remove_dir(&path).unwrap();
        fs::rename(&away, &path).unwrap();
        writer.flush(&Weak::new());
        assert!(writer.waiting.is_empty() && writer.blocked.is_none());
        let (events, damaged) = read(&journal, &Query::default()).unwrap();
        assert_eq!((numbers(&events), damaged), (vec![0, 1, 2, 3, 4, next], 0));
    }

    #[test]
    fn where_nothing_can_be_read_numbers_begin_past_all_others() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(beyond(&dir.path().join("none")), 0);
        let path = filled(dir.path(), 5);
        assert!(beyond(dir.path()) >= 5);
        assert!(beyond(&path) > 1 << 50);
    }

    #[test]
    fn an_old_segment_that_cannot_be_deleted_refuses_the_write_and_doubles_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 16 << 10).unwrap();
        // Directories cannot be removed as files are.
        let stuck = dir.path().join("00000000000000000000.log");
        fs::create_dir(&stuck).unwrap();
        fs::write(stuck.join("x"), b"x").unwrap();
        let mut seq = 1;
        while journal.append(&[event(seq)]).is_ok() {
            seq += 1;
            assert!(seq < 1000);
        }
        fs::remove_dir_all(&stuck).unwrap();
        journal.append(&[event(seq)]).unwrap();
        let (events, damaged) = read(dir.path(), &Query::default()).unwrap();
        assert!(damaged == 0 && events.windows(2).all(|w| w[0].seq + 1 == w[1].seq));
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
