//! Entries and contents -> file system: each file the old or the new one, and nothing touched that cannot be finished.
//!
//! A restore has three steps, and what can fail, fails in the first two:
//! 1. **Plan** ([`Plan::new`]): reads only. Finds what differs, and whether it can be mended: is every directory
//!    there or among the entries, may be written to, not frozen by `chattr +i`; is there room. What it
//!    finds to do is the dry run ([`Plan::steps`]).
//! 2. **Stage** ([`Plan::apply`]): every new file is written beside its place under a temporary name, checked against
//!    its hash, given its owner, mode, attributes and time, and synced. What is below a directory that is missing
//!    waits in the nearest one above that is there. A failure up to here removes the temporary files, and
//!    that is all there was.
//! 3. **Put in place**: renames, parents first. A directory in a file's place (or the reverse) is swapped out in one
//!    go and then removed. In the end the directories get their times back, and are synced.
//!
//! An end in the middle of step 3 leaves some files old and others new, each of them whole; the next restore does
//! the rest. Temporary files that were left over by a crash are removed when a restore comes by their directory; nothing else
//! takes notice of them.

mod put;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fmt, io,
    path::{Path, PathBuf},
};

use rustix::fs::FileType;
use serde::Serialize;

use super::{
    CaptureError, Captured, Change, Entry, Kind,
    capture::look_at,
    compare::changes,
    pin::{self, Pin},
    select::{Found, Selection, Visit, walk},
};

/// Why nothing was restored, or not all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// What is there now cannot be read. Nothing was touched.
    #[error(transparent)]
    Look(#[from] CaptureError),
    /// Nothing was touched.
    #[error(
        "{} cannot be restored: the directory {} is missing and is not part of the snapshot. Make it, or add it to the files of the workload",
        path.display(), parent.display()
    )]
    ParentMissing {
        /// What was to be restored.
        path: PathBuf,
        /// What it would be in.
        parent: PathBuf,
    },
    /// Nothing was touched.
    #[error(
        "{} cannot be written to: {source}. If ftd's sandbox closes it, open it in a drop-in of ftd.service: ReadWritePaths={}",
        dir.display(), dir.display()
    )]
    NotWritable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing was touched.
    #[error("{} is immutable or append-only, even for root: chattr -i -a {}", path.display(), path.display())]
    Immutable {
        /// File or directory.
        path: PathBuf,
    },
    /// Nothing was touched.
    #[error(
        "no room in the file system of {}: {need} bytes and {files} files are needed at once, {free} bytes and {free_files} files are free",
        dir.display()
    )]
    NoSpace {
        /// A directory that would be written to.
        dir: PathBuf,
        /// Bytes.
        need: u64,
        /// Bytes.
        free: u64,
        /// Inodes.
        files: u64,
        /// Inodes.
        free_files: u64,
    },
    /// Nothing was touched.
    #[error("the content of {} cannot be had from the snapshot: {source}. Take an older one", path.display())]
    Content {
        /// Whose content.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing was touched.
    #[error("the snapshot's content of {} is damaged: its hash is another one. Take an older one", path.display())]
    Damaged {
        /// Whose content.
        path: PathBuf,
    },
    /// Nothing was touched.
    #[error("{} cannot be made ready in {}: {source}. Nothing was changed", path.display(), dir.display())]
    Stage {
        /// What was to be restored.
        path: PathBuf,
        /// Where it was being written.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Some are new, the others are what they were.
    #[error(
        "{} cannot be put in place: {source}. {done} of {of} steps were done, each as a whole; restore again for the rest",
        path.display()
    )]
    Put {
        /// What failed.
        path: PathBuf,
        /// Steps before it.
        done: usize,
        /// All steps.
        of: usize,
        /// Why.
        source: io::Error,
    },
}

/// What a restore does at one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Where.
    #[serde(with = "super::entry::path")]
    pub path: PathBuf,
    /// What.
    pub act: Act,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.act {
            Act::MakeDir {} => write!(f, "make directory {path}"),
            Act::Write { bytes } => write!(f, "write {path} ({bytes} bytes)"),
            Act::Link { target } => write!(f, "link {path} -> {}", target.display()),
            Act::Dress { changes } if changes.is_empty() => write!(f, "set the time of {path}"),
            Act::Dress { changes } => {
                write!(f, "set {path}: ")?;
                changes
                    .iter()
                    .enumerate()
                    .try_for_each(|(n, change)| write!(f, "{}{change}", if n == 0 { "" } else { ", " }))
            }
            Act::Remove {} => write!(f, "remove {path}"),
        }
    }
}

/// Kinds of steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// A directory is made.
    MakeDir {},
    /// A file is written, new or over what is there.
    Write {
        /// Its size.
        bytes: u64,
    },
    /// A symlink is made, new or over what is there.
    Link {
        /// Where it leads.
        #[serde(with = "super::entry::path")]
        target: PathBuf,
    },
    /// Owner, mode, attributes or time are set on what is there.
    Dress {
        /// From what there is to what there will be. Empty: only the time.
        changes: Vec<Change>,
    },
    /// Goes, with all that is below it: it is in the place of something else, or not in the snapshot (`exact`).
    Remove {},
}

/// A restore that has been thought through.
#[derive(Debug)]
pub struct Plan<'a> {
    /// By path: directories come before what is in them.
    todo: Vec<Todo<'a>>,
    /// What is not in the snapshot; what is in a directory comes before it.
    remove: Vec<PathBuf>,
    /// All directories of the snapshot: their times change by what is done in them.
    dirs: Vec<&'a Entry>,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Todo<'a> {
    entry: &'a Entry,
    /// Made anew; else what is there is dressed.
    make: bool,
    /// The nearest directory above that is there now.
    home: PathBuf,
}

impl<'a> Plan<'a> {
    /// What is to be done so that all that was captured is there again. What is there besides is left alone, or, with
    /// `exact`, removed as far as it is selected. Touches nothing.
    pub fn new(captured: &'a Captured, exact: Option<&Selection>) -> Result<Self, RestoreError> {
        let mut planner =
            Planner { known: &captured.entries, gone: None, made: BTreeSet::new(), homes: BTreeSet::new() };
        let mut plan = Self { todo: Vec::new(), remove: Vec::new(), dirs: Vec::new(), steps: Vec::new() };
        let mut all: Vec<_> = captured.parents.iter().map(|entry| (entry, true)).collect();
        all.extend(captured.entries.iter().map(|entry| (entry, false)));
        all.sort_by(|a, b| a.0.path.cmp(&b.0.path));
        for (entry, is_parent) in all {
            planner.entry(entry, is_parent, &mut plan)?;
        }
        if let Some(selection) = exact {
            plan.remove = superfluous(selection, &captured.entries)?;
            planner.homes.extend(plan.remove.iter().filter_map(|path| path.parent()).map(Path::to_owned));
            plan.steps
                .extend(plan.remove.iter().map(|path| Step { path: path.clone(), act: Act::Remove {} }));
        }
        check(&plan, &planner.homes)?;
        Ok(plan)
    }

    /// The dry run: what [`Plan::apply`] does, in its order. Empty: all is as it was captured.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Bytes that will be written.
    pub fn bytes(&self) -> u64 {
        self.todo.iter().filter(|todo| todo.make).map(|todo| size(todo.entry)).sum()
    }
}

fn size(entry: &Entry) -> u64 {
    match entry.kind {
        Kind::File { size, .. } => size,
        Kind::Dir | Kind::Symlink { .. } => 0,
    }
}

/// What is found out on the way through the entries, by path.
struct Planner<'a> {
    known: &'a [Entry],
    /// The last directory that will be made: nothing of what is there now counts below it.
    gone: Option<&'a Path>,
    made: BTreeSet<&'a Path>,
    /// Directories that will be written to.
    homes: BTreeSet<PathBuf>,
}

impl<'a> Planner<'a> {
    fn entry(&mut self, entry: &'a Entry, is_parent: bool, plan: &mut Plan<'a>) -> Result<(), RestoreError> {
        let path = entry.path.as_path();
        let is_dir = entry.kind == Kind::Dir;
        if self.is_gone(path) {
            return self.make(entry, plan);
        }
        if is_parent {
            // What is there is not ours, whatever it is; a symlink may lead to what is not mounted yet.
            let missing = pin::lookup(path).is_err_and(|error| pin::leads_nowhere(&error));
            return if missing { self.make(entry, plan) } else { Ok(()) };
        }
        if is_dir {
            plan.dirs.push(entry);
        }
        let now = match look_at(path, self.known) {
            // Whatever it is going to be, it is not what it was.
            Err(CaptureError::Changing { .. }) => None,
            now => now?,
        };
        let Some(now) = now else { return self.make(entry, plan) };
        let changes = changes(&now, entry, None);
        let other = changes.iter().any(|change| {
            matches!(
                change,
                Change::Kind { .. } | Change::Emptied { .. } | Change::Content { .. } | Change::Target { .. }
            )
        });
        let differs = !changes.is_empty() || (now.mtime != entry.mtime && !is_dir);
        if other || (differs && !is_dir && is_shared(path)) {
            if now.kind == Kind::Dir {
                plan.steps.push(Step { path: path.to_owned(), act: Act::Remove {} });
            }
            return self.make(entry, plan);
        }
        if differs {
            let home = self.home(path)?;
            plan.todo.push(Todo { entry, make: false, home });
            plan.steps.push(Step { path: path.to_owned(), act: Act::Dress { changes } });
        }
        Ok(())
    }

    fn make(&mut self, entry: &'a Entry, plan: &mut Plan<'a>) -> Result<(), RestoreError> {
        let path = entry.path.as_path();
        let home = self.home(path)?;
        plan.todo.push(Todo { entry, make: true, home });
        let act = match &entry.kind {
            Kind::File { size, .. } => Act::Write { bytes: *size },
            Kind::Symlink { target } => Act::Link { target: target.clone() },
            Kind::Dir => {
                self.made.insert(path);
                if !self.is_gone(path) {
                    self.gone = Some(path);
                }
                Act::MakeDir {}
            }
        };
        plan.steps.push(Step { path: path.to_owned(), act });
        Ok(())
    }

    fn is_gone(&self, path: &Path) -> bool {
        self.gone.is_some_and(|gone| path.starts_with(gone))
    }

    /// The nearest directory above `path` that is there and stays there. All between must be going to be made.
    fn home(&mut self, path: &Path) -> Result<PathBuf, RestoreError> {
        for dir in path.ancestors().skip(1) {
            if self.made.contains(dir) {
                continue;
            }
            if self.is_gone(dir) || pin::directory(dir, &mut |_, _, _| Ok(())).is_err() {
                return Err(RestoreError::ParentMissing { path: path.to_owned(), parent: dir.to_owned() });
            }
            self.homes.insert(dir.to_owned());
            return Ok(dir.to_owned());
        }
        Ok(PathBuf::from("/"))
    }
}

/// Whether a file has other names, elsewhere: what is done to it is then done to something that is not ours.
fn is_shared(path: &Path) -> bool {
    pin::lookup(path).is_ok_and(|(_, pin)| pin.stat.st_nlink > 1)
}

/// Whether all that is planned can be done, as far as that can be known before.
fn check(plan: &Plan<'_>, homes: &BTreeSet<PathBuf>) -> Result<(), RestoreError> {
    let not_writable = |dir: &Path, source| RestoreError::NotWritable { dir: dir.to_owned(), source };
    // By device: a directory in it, bytes, files.
    let mut needs: BTreeMap<u64, (Pin, &Path, u64, u64)> = BTreeMap::new();
    for dir in homes {
        let pin = pin::directory(dir, &mut |_, _, _| Ok(())).map_err(|source| not_writable(dir, source))?;
        pin.may_write().map_err(|source| not_writable(dir, source))?;
        if pin.is_immutable() {
            return Err(RestoreError::Immutable { path: dir.clone() });
        }
        let block = pin.file_system().map_err(|source| not_writable(dir, source))?.f_frsize.max(1);
        let here = plan.todo.iter().filter(|todo| todo.make && todo.home == *dir);
        let (bytes, files) = here.fold((0, 0), |(bytes, files), todo| {
            (bytes + size(todo.entry).next_multiple_of(block), files + 1)
        });
        let need = needs.entry(pin.stat.st_dev).or_insert((pin, dir, 0, 0));
        (need.2, need.3) = (need.2 + bytes, need.3 + files);
    }
    for (pin, dir, need, files) in needs.into_values() {
        let there = pin.file_system().map_err(|source| not_writable(dir, source))?;
        let free = there.f_bavail.saturating_mul(there.f_frsize);
        // Some file systems make inodes as they need them, and say that they have none.
        let free_files = if there.f_files == 0 { u64::MAX } else { there.f_favail };
        if need > free || files > free_files {
            return Err(RestoreError::NoSpace { dir: dir.to_owned(), need, free, files, free_files });
        }
    }
    let touched = plan.todo.iter().map(|todo| &todo.entry.path).chain(&plan.remove);
    for path in touched {
        if pin::lookup(path).is_ok_and(|(_, pin)| pin.is_immutable()) {
            return Err(RestoreError::Immutable { path: path.clone() });
        }
    }
    Ok(())
}

/// What is selected and there, and not among `entries`. What could not have been captured is left out.
fn superfluous(selection: &Selection, entries: &[Entry]) -> Result<Vec<PathBuf>, RestoreError> {
    struct Paths(Vec<PathBuf>);

    impl Visit for Paths {
        type Error = RestoreError;

        fn lookup(&mut self, _: &Pin, _: &OsStr, _: &Path, _: bool) -> Result<(), RestoreError> {
            Ok(())
        }

        fn list(&mut self, _: &Pin, _: &Path) -> Result<(), RestoreError> {
            Ok(())
        }

        fn found(&mut self, found: &Found<'_>) -> Result<(), RestoreError> {
            if matches!(found.pin.kind(), FileType::RegularFile | FileType::Directory | FileType::Symlink) {
                self.0.push(found.path.to_owned());
            }
            Ok(())
        }

        fn failed(&mut self, path: &Path, source: io::Error) -> Result<(), RestoreError> {
            Err(CaptureError::Read { path: path.to_owned(), source }.into())
        }
    }

    let mut paths = Paths(Vec::new());
    walk(selection, &mut paths)?;
    let mut paths = paths.0;
    paths.retain(|path| entries.binary_search_by(|entry| entry.path.cmp(path)).is_err());
    paths.sort_unstable_by(|a, b| b.cmp(a));
    Ok(paths)
}
