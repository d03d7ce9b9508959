//! File system -> entries, with each file's content on the way to whoever keeps it.
//!
//! A file is read from the descriptor that its metadata came from, and asked again afterwards whether it is still
//! the same: what is captured is one state of the file, not the start of one and the end of another. Between
//! two files there is no such promise; a workload that needs it is frozen meanwhile.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use super::{
    Entry, Kind, Seen, entry,
    pin::{self, Pin, ctime, mtime},
    select::{Found, Selection, Visit, walk},
};

/// How often a file that changes while it is read is read anew, and how long is waited before, growing with each time.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);
/// How old a change must be so that a later one is sure to have another time: more than a tick of any kernel, and than the
/// two seconds of some file systems.
const SETTLED_NS: i64 = 2_100_000_000;

/// Who keeps the contents: is given a file's path, its size, and exactly that many bytes. If the file changes
/// meanwhile, it is called again for the same path, and the last call counts.
pub type Keep<'a> = dyn FnMut(&Path, u64, &mut dyn Read) -> io::Result<()> + 'a;

/// Why there is no capture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Cannot be looked at.
    #[error("{} cannot be read: {source}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Never the same before and after.
    #[error(
        "{} was written to each of the {ATTEMPTS} times that it was read: take it out of the files of the workload if it is no \
         configuration, or stop what writes to it",
        path.display()
    )]
    Changing {
        /// What.
        path: PathBuf,
    },
    /// The keeper gave up.
    #[error("the content of {} cannot be kept: {source}", path.display())]
    Keep {
        /// Whose content.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What was captured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// What is selected, by path: a directory comes before what is in it.
    pub entries: Vec<Entry>,
    /// The directories above, by path. They do not belong to the workload; but where one is missing, a restore must
    /// know what to make.
    pub parents: Vec<Entry>,
    /// Patterns with nothing there.
    pub unmatched: Vec<String>,
    /// What is there but cannot be part of a capture.
    pub skipped: Vec<Skipped>,
}

/// Something left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// What.
    #[serde(with = "entry::path")]
    pub path: PathBuf,
    /// What it is, or where.
    pub why: String,
}

/// Captures all that is selected. Files that `known` holds, unchanged by [`Seen`], are not read again: their content
/// is the one with the same hash.
pub fn capture(
    selection: &Selection,
    known: &[Entry],
    keep: &mut Keep<'_>,
) -> Result<Captured, CaptureError> {
    let mut capture = Capture { captured: Captured::default(), known, keep };
    let matched = walk(selection, &mut capture)?;
    let mut captured = capture.captured;
    captured.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    for (pattern, matched) in selection.patterns().iter().zip(matched) {
        if !matched && pattern.is_expected() {
            captured.unmatched.push(pattern.as_str().to_owned());
        }
        add_parents(&mut captured, &pattern.root())?;
    }
    captured.parents.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    captured.parents.dedup_by(|a, b| a.path == b.path);
    Ok(captured)
}

/// [`capture`] for those who want to know what there is, not to keep it.
pub fn look(selection: &Selection, known: &[Entry]) -> Result<Captured, CaptureError> {
    capture(selection, known, &mut |_, _, _| Ok(()))
}

/// One path as it is now; nothing if there is nothing, or nothing that could be captured.
pub(super) fn look_at(path: &Path, known: &[Entry]) -> Result<Option<Entry>, CaptureError> {
    let (dir, pin) = match pin::lookup(path) {
        Err(error) if pin::leads_nowhere(&error) => return Ok(None),
        found => found.map_err(|source| CaptureError::Read { path: path.to_owned(), source })?,
    };
    let name = path.file_name().unwrap_or_default();
    let mut capture = Capture { captured: Captured::default(), known, keep: &mut |_, _, _| Ok(()) };
    capture.found(&Found { dir: &dir, name, path, pin: &pin })?;
    Ok(capture.captured.entries.pop())
}

/// The directories above `root` that are real ones; links among them are the host's affair.
fn add_parents(captured: &mut Captured, root: &Path) -> Result<(), CaptureError> {
    for path in root.ancestors().skip(1).filter(|path| path.parent().is_some()) {
        let failed = |source| CaptureError::Read { path: path.to_owned(), source };
        if captured.entries.binary_search_by(|entry| entry.path.as_path().cmp(path)).is_ok() {
            continue;
        }
        match pin::lookup(path) {
            Ok((_, pin)) if pin.is_dir() => {
                captured.parents.push(dressed(&pin, path, Kind::Dir).map_err(failed)?);
            }
            Err(error) if !pin::leads_nowhere(&error) => return Err(failed(error)),
            _ => {}
        }
    }
    Ok(())
}

struct Capture<'a> {
    captured: Captured,
    /// Sorted by path.
    known: &'a [Entry],
    keep: &'a mut Keep<'a>,
}

impl Visit for Capture<'_> {
    type Error = CaptureError;

    fn lookup(&mut self, _: &Pin, _: &OsStr, _: &Path, _: bool) -> Result<(), CaptureError> {
        Ok(())
    }

    fn list(&mut self, _: &Pin, _: &Path) -> Result<(), CaptureError> {
        Ok(())
    }

    fn found(&mut self, found: &Found<'_>) -> Result<(), CaptureError> {
        let path = found.path;
        let failed = |source| CaptureError::Read { path: path.to_owned(), source };
        let entry = match found.pin.kind() {
            FileType::RegularFile => match self.file(found)? {
                Some(entry) => entry,
                None => return Ok(()),
            },
            FileType::Directory => dressed(found.pin, path, Kind::Dir).map_err(failed)?,
            FileType::Symlink => {
                let target = found.pin.target().map_err(failed)?;
                dressed(found.pin, path, Kind::Symlink { target }).map_err(failed)?
            }
            other => {
                let why = match other {
                    FileType::Socket => "a socket",
                    FileType::Fifo => "a FIFO",
                    FileType::CharacterDevice | FileType::BlockDevice => "a device",
                    _ => "of an unknown kind",
                };
                self.captured.skipped.push(Skipped { path: path.to_owned(), why: why.to_owned() });
                return Ok(());
            }
        };
        self.captured.entries.push(entry);
        Ok(())
    }

    fn failed(&mut self, path: &Path, source: io::Error) -> Result<(), CaptureError> {
        Err(CaptureError::Read { path: path.to_owned(), source })
    }

    fn astray(&mut self, path: &Path) {
        let why = "behind a symlink that others than root may have made".to_owned();
        self.captured.skipped.push(Skipped { path: path.to_owned(), why });
    }
}

impl Capture<'_> {
    /// One state of a file. Nothing if it has vanished.
    fn file(&mut self, found: &Found<'_>) -> Result<Option<Entry>, CaptureError> {
        let path = found.path;
        let failed = |source| CaptureError::Read { path: path.to_owned(), source };
        if let Some(entry) = self.attempt(found.pin, path)? {
            return Ok(Some(entry));
        }
        for attempt in 1..ATTEMPTS {
            thread::sleep(PAUSE * attempt);
            // By its name again: an editor may have put a new file there.
            match found.dir.child(found.name) {
                Ok(pin) if pin.kind() == FileType::RegularFile => {
                    if let Some(entry) = self.attempt(&pin, path)? {
                        return Ok(Some(entry));
                    }
                }
                Err(error) if pin::leads_nowhere(&error) => return Ok(None),
                Err(error) => return Err(failed(error)),
                Ok(_) => {}
            }
        }
        Err(CaptureError::Changing { path: path.to_owned() })
    }

    /// Nothing if the file has changed meanwhile.
    fn attempt(&mut self, pin: &Pin, path: &Path) -> Result<Option<Entry>, CaptureError> {
        let failed = |source| CaptureError::Read { path: path.to_owned(), source };
        let before = pin.stat_now().map_err(failed)?;
        let size = before.st_size.unsigned_abs();
        let seen = Seen { dev: before.st_dev, ino: before.st_ino, ctime: ctime(&before) };
        let hash = match self.known_hash(path, size, seen) {
            Some(hash) => hash,
            None => {
                let mut content = Content {
                    file: pin.read().map_err(failed)?,
                    left: size,
                    hash: blake3::Hasher::new(),
                    failed: None,
                };
                let kept = (self.keep)(path, size, &mut content);
                let rest = io::copy(&mut content, &mut io::sink());
                match (content.failed, kept) {
                    (Some(error), _) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                    (Some(error), _) => return Err(failed(error)),
                    (None, Err(source)) => return Err(CaptureError::Keep { path: path.to_owned(), source }),
                    (None, Ok(())) => rest.map_err(failed)?,
                };
                content.hash.finalize()
            }
        };
        let mut entry = dressed(pin, path, Kind::File { size, hash }).map_err(failed)?;
        let after = pin.stat_now().map_err(failed)?;
        // The change time tells of a change of anything else, too: names, owner, mode, attributes.
        if (before.st_size, mtime(&before), ctime(&before)) != (after.st_size, mtime(&after), ctime(&after)) {
            return Ok(None);
        }
        entry.seen = is_settled(seen.ctime).then_some(seen);
        Ok(Some(entry))
    }

    fn known_hash(&self, path: &Path, now: u64, seen: Seen) -> Option<blake3::Hash> {
        let index = self.known.binary_search_by(|entry| entry.path.as_path().cmp(path)).ok()?;
        match self.known[index] {
            Entry { kind: Kind::File { size, hash }, seen: Some(then), .. }
                if then == seen && size == now =>
            {
                Some(hash)
            }
            _ => None,
        }
    }
}

/// An entry, but for what only a file has.
fn dressed(pin: &Pin, path: &Path, kind: Kind) -> io::Result<Entry> {
    let stat = pin.stat_now()?;
    Ok(Entry {
        path: path.to_owned(),
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: mtime(&stat),
        xattrs: pin.xattrs()?,
        seen: None,
    })
}

fn is_settled(ctime: i64) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).is_ok_and(|now| ctime < now - SETTLED_NS)
}

/// A file's content on its way to the keeper: hashed, and exactly as long as the file was said to be.
struct Content {
    file: File,
    left: u64,
    hash: blake3::Hasher,
    /// Ours, not the keeper's. `UnexpectedEof`: the file has become shorter.
    failed: Option<io::Error>,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 || self.failed.is_some() {
            return Ok(0);
        }
        let result = match self.file.read(&mut buffer[..most]) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            result => result,
        };
        match result {
            Ok(read) => {
                self.hash.update(&buffer[..read]);
                self.left -= read as u64;
                Ok(read)
            }
            Err(error) => {
                let told = io::Error::new(error.kind(), error.to_string());
                self.failed = Some(error);
                Err(told)
            }
        }
    }
}
