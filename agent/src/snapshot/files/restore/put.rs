//! A plan, carried out.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Plan, RestoreError, Todo};
use crate::snapshot::files::{
    Contents, Entry, Kind, TEMPORARY,
    pin::{self, Pin},
};

/// Bytes that are copied, and reported, at a time.
const STEP: usize = 128 << 10;

/// Moments at which a crash is tried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::snapshot::files) enum Point {
    /// A temporary file was made, with nothing in it.
    Begun,
    /// A temporary file is ready.
    Staged,
    /// A thing of another kind was swapped out, and is still there by a temporary name.
    Swapped,
    /// One more is in place.
    Placed,
    /// Owner, mode and so on of one more are set.
    Dressed,
    /// One more is gone.
    Removed,
    /// Directories have their times; nothing that was renamed is synced yet.
    Timed,
}

impl Plan<'_> {
    /// Does it. `progress` is told the bytes written so far, and how many there will be.
    pub fn apply(
        self,
        contents: &dyn Contents,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), RestoreError> {
        self.apply_until(contents, progress, &|_| ())
    }

    /// [`Self::apply`] that calls `at` at each [`Point`] that it passes.
    pub(in crate::snapshot::files) fn apply_until(
        self,
        contents: &dyn Contents,
        progress: &mut dyn FnMut(u64, u64),
        at: &dyn Fn(Point),
    ) -> Result<(), RestoreError> {
        let mut copy = Copy { contents, progress, done: 0, of: self.bytes() };
        let homes = self.todo.iter().map(|todo| &todo.home);
        for dir in homes.chain(self.dirs.iter().map(|entry| &entry.path)).collect::<BTreeSet<_>>() {
            clear_leftovers(dir);
        }
        let mut staged = Vec::new();
        for todo in &self.todo {
            staged.push(if todo.make { Some(stage(todo, &mut copy, at)?) } else { None });
        }
        // From here on things change.
        let of = self.todo.len() + self.remove.len();
        let mut touched = BTreeSet::new();
        for (done, (todo, staged)) in self.todo.iter().zip(staged).enumerate() {
            let path = &todo.entry.path;
            let result = match staged {
                Some(staged) => place(&staged, path, at),
                None => dress(todo.entry, at),
            };
            result.map_err(|source| RestoreError::Put { path: path.clone(), done, of, source })?;
            touched
                .extend([path.parent().map(Path::to_owned), Some(todo.home.clone())].into_iter().flatten());
        }
        for (done, path) in self.remove.iter().enumerate() {
            remove(path).map_err(|source| RestoreError::Put {
                path: path.clone(),
                done: self.todo.len() + done,
                of,
                source,
            })?;
            touched.extend(path.parent().map(Path::to_owned));
            at(Point::Removed);
        }
        let made = self.todo.iter().filter(|todo| todo.make && todo.entry.kind == Kind::Dir);
        let dirs: Vec<_> = made.map(|todo| todo.entry).chain(self.dirs.iter().copied()).collect();
        let failed = |path: &Path, source| RestoreError::Put { path: path.to_owned(), done: of, of, source };
        for entry in dirs {
            set_time(entry).map_err(|source| failed(&entry.path, source))?;
        }
        at(Point::Timed);
        for dir in touched {
            match open(&dir).and_then(|pin| pin.sync_dir()) {
                // Removed in the meantime, perhaps by this very restore.
                Err(error) if pin::leads_nowhere(&error) => {}
                result => result.map_err(|source| failed(&dir, source))?,
            }
        }
        Ok(())
    }
}

fn open(dir: &Path) -> io::Result<Pin> {
    pin::directory(dir, &mut |_, _, _| Ok(()))
}

/// Something that is ready under a temporary name. Dropped before it is in its place, it is removed.
struct Staged {
    home: PathBuf,
    name: OsString,
    is_dir: bool,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Once it is in place there is nothing by this name. What remains for other reasons, the next restore clears.
        let _ = open(&self.home).and_then(|home| home.remove(&self.name, true));
    }
}

/// Makes something ready: with all that belongs to it, on disk, next to its place.
fn stage(todo: &Todo<'_>, copy: &mut Copy<'_>, at: &dyn Fn(Point)) -> Result<Staged, RestoreError> {
    let (entry, home) = (todo.entry, &todo.home);
    let failed = |source| RestoreError::Stage { path: entry.path.clone(), dir: home.clone(), source };
    let dir = open(home).map_err(failed)?;
    let staged = Staged { home: home.clone(), name: temporary_name(), is_dir: entry.kind == Kind::Dir };
    let name = staged.name.as_os_str();
    let file = match &entry.kind {
        Kind::File { .. } => Some(dir.make_file(name)),
        Kind::Dir => dir.make_dir(name).map(|()| None).transpose(),
        Kind::Symlink { target } => dir.make_link(name, target).map(|()| None).transpose(),
    };
    let file = file.transpose().map_err(failed)?;
    at(Point::Begun);
    if let Some(file) = &file {
        copy.content(entry, file, &failed)?;
    }
    dir.child(name).and_then(|pin| pin.dress(entry)).map_err(failed)?;
    if let Some(file) = &file {
        file.sync_all().map_err(failed)?;
    }
    at(Point::Staged);
    Ok(staged)
}

/// Contents on their way, with how far they have come.
struct Copy<'a> {
    contents: &'a dyn Contents,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    of: u64,
}

impl Copy<'_> {
    fn content(
        &mut self,
        entry: &Entry,
        mut to: &std::fs::File,
        failed: &dyn Fn(io::Error) -> RestoreError,
    ) -> Result<(), RestoreError> {
        let Kind::File { size, hash } = entry.kind else { return Ok(()) };
        let unreadable = |source| RestoreError::Content { path: entry.path.clone(), source };
        // One byte more than there should be would show.
        let mut from = self.contents.open(entry).map_err(unreadable)?.take(size.saturating_add(1));
        let (mut hasher, mut buffer, mut copied) = (blake3::Hasher::new(), vec![0; STEP], 0);
        loop {
            let read = match from.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(unreadable)?,
            };
            hasher.update(&buffer[..read]);
            to.write_all(&buffer[..read]).map_err(failed)?;
            copied += read as u64;
            (self.progress)(self.done + copied.min(size), self.of);
        }
        if copied != size || hasher.finalize() != hash {
            return Err(RestoreError::Damaged { path: entry.path.clone() });
        }
        self.done += size;
        Ok(())
    }
}

fn place(staged: &Staged, path: &Path, at: &dyn Fn(Point)) -> io::Result<()> {
    let (parent, name) = pin::split(path)?;
    let (home, dir) = (open(&staged.home)?, open(parent)?);
    let other_kind = match dir.child(name) {
        Ok(there) => there.is_dir() != staged.is_dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if other_kind {
        home.swap(&staged.name, &dir, name)?;
        at(Point::Swapped);
        home.remove(&staged.name, true)?;
    } else {
        home.rename(&staged.name, &dir, name)?;
    }
    at(Point::Placed);
    Ok(())
}

fn dress(entry: &Entry, at: &dyn Fn(Point)) -> io::Result<()> {
    let (_, pin) = pin::lookup(&entry.path)?;
    pin.dress(entry)?;
    match entry.kind {
        Kind::File { .. } => pin.read()?.sync_all()?,
        Kind::Dir => pin.sync_dir()?,
        // Nothing of a symlink can be opened; its directory's sync comes at the end.
        Kind::Symlink { .. } => {}
    }
    at(Point::Dressed);
    Ok(())
}

/// Removes what is not in the snapshot. A directory with something in it that is no part of snapshots stays.
fn remove(path: &Path) -> io::Result<()> {
    let result = pin::parent(path).and_then(|dir| dir.remove(pin::split(path)?.1, false));
    match result {
        Err(error) if pin::leads_nowhere(&error) || error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            Ok(())
        }
        result => result,
    }
}

fn set_time(entry: &Entry) -> io::Result<()> {
    let (_, pin) = pin::lookup(&entry.path)?;
    if pin.mtime() == entry.mtime { Ok(()) } else { pin.set_mtime(entry.mtime) }
}

/// One that no other restore has, of this process or of one before it.
fn temporary_name() -> OsString {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}{}", own_prefix(), NEXT.fetch_add(1, Ordering::Relaxed)).into()
}

/// What temporary names of this process begin with. A process ID may come again, a moment does not.
fn own_prefix() -> &'static str {
    static PREFIX: OnceLock<String> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        format!("{TEMPORARY}{}-{:x}-", std::process::id(), now.as_nanos())
    })
}

/// Removes what a restore that was killed has left in `dir`, if that is there. Nothing depends on it.
fn clear_leftovers(dir: &Path) {
    let is_leftover = |name: &OsStr| pin::is_temporary(name) && !pin::starts_with(name, own_prefix());
    let cleared = open(dir).and_then(|dir| {
        for name in dir.names()?.iter().filter(|name| is_leftover(name)) {
            dir.remove(name, true)?;
        }
        Ok(())
    });
    if let Err(error) = cleared
        && !pin::leads_nowhere(&error)
    {
        tracing::warn!(dir = %dir.display(), %error, "temporary files of an earlier restore stay");
    }
}
