//! Where to watch, and what an event there means.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::inotify::{self, ReadFlags, WatchFlags};

use crate::snapshot::files::{
    pin::{self, Pin},
    select::{Found, Selection, Visit, walk},
};

/// Names that come and go.
const NAMES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);
/// And what happens to what they name. truncate(2) closes nothing, and a file may be kept open for long: each
/// write counts.
const CONTENT: WatchFlags =
    NAMES.union(WatchFlags::MODIFY).union(WatchFlags::CLOSE_WRITE).union(WatchFlags::ATTRIB);

/// All watches of a selection, as it was at one moment.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// By watch descriptor. One directory may be there on behalf of several paths.
    spots: HashMap<i32, Spot>,
    /// All that was selected and there.
    found: BTreeSet<PathBuf>,
}

#[derive(Debug, Default)]
struct Spot {
    /// Paths that the directory itself stands for; all its names matter, so far as they are selected.
    whole: BTreeSet<PathBuf>,
    /// Single names that matter, and the paths that each stands for.
    names: HashMap<OsString, BTreeSet<PathBuf>>,
}

/// What an event means.
#[derive(Debug, Default)]
pub(super) struct Meaning {
    /// These may have changed.
    pub(super) paths: Vec<PathBuf>,
    /// There may be other directories to watch now.
    pub(super) survey: bool,
}

impl Survey {
    /// Walks over the selection and watches as it goes: each directory before it is looked into, so that a
    /// change is either seen by the walk or told by the kernel.
    pub(super) fn new(inotify: &OwnedFd, selection: &Selection) -> io::Result<Self> {
        let mut surveyor = Surveyor { inotify, survey: Self::default() };
        walk(selection, &mut surveyor)?;
        Ok(surveyor.survey)
    }

    /// Takes the place of `old`: what is not watched any more is let go. Answers what has come or gone in between, for
    /// part of it may never have been watched.
    pub(super) fn replace(self, old: &mut Self, inotify: &OwnedFd) -> Vec<PathBuf> {
        for wd in old.spots.keys().filter(|wd| !self.spots.contains_key(wd)) {
            // It is gone by itself if its directory is.
            let _ = inotify::remove_watch(inotify, *wd);
        }
        let differs = self.found.symmetric_difference(&old.found).cloned().collect();
        *old = self;
        differs
    }

    /// What an event means; nothing if it is about what nobody asked for, or comes from a watch let go.
    pub(super) fn meaning(
        &mut self,
        wd: i32,
        flags: ReadFlags,
        name: Option<&OsStr>,
        selection: &Selection,
    ) -> Meaning {
        let names_changed = flags
            .intersects(ReadFlags::CREATE | ReadFlags::DELETE | ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO);
        let mut meaning = Meaning::default();
        let Some(spot) = self.spots.get(&wd) else { return meaning };
        let Some(name) = name else {
            // About the directory itself. Its owner and mode are told by the directory that it is in.
            meaning.survey = flags.intersects(
                ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT | ReadFlags::IGNORED,
            );
            return meaning;
        };
        if pin::is_temporary(name) {
            return meaning;
        }
        for path in spot.names.get(name).into_iter().flatten() {
            meaning.survey |= names_changed;
            if selection.covers(path) {
                note(&mut self.found, path, flags);
                meaning.paths.push(path.clone());
            } else if names_changed {
                // On the way to something.
                let roots = selection.patterns().iter().map(super::Pattern::root);
                meaning.paths.extend(roots.filter(|root| root.starts_with(path)));
            }
        }
        for dir in &spot.whole {
            let path = dir.join(name);
            meaning.survey |= names_changed && flags.contains(ReadFlags::ISDIR);
            if selection.covers(&path) {
                note(&mut self.found, &path, flags);
                meaning.paths.push(path);
            }
        }
        meaning
    }
}

/// Keeps what is known to be there up to date, so that the next walk does not tell it once more.
fn note(found: &mut BTreeSet<PathBuf>, path: &Path, flags: ReadFlags) {
    if flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
        found.remove(path);
    } else if !found.contains(path) {
        found.insert(path.to_owned());
    }
}

struct Surveyor<'a> {
    inotify: &'a OwnedFd,
    survey: Survey,
}

impl Surveyor<'_> {
    fn spot(&mut self, dir: &Pin, flags: WatchFlags) -> io::Result<&mut Spot> {
        // Never fewer than are asked for elsewhere: the same directory may be met again.
        let flags = flags | WatchFlags::ONLYDIR | WatchFlags::MASK_ADD;
        let wd = match inotify::add_watch(self.inotify, dir.proc_path(), flags) {
            Err(rustix::io::Errno::NOSPC) => {
                let most = "more directories than this user may watch; sysctl fs.inotify.max_user_watches";
                return Err(io::Error::other(most));
            }
            wd => wd?,
        };
        Ok(self.survey.spots.entry(wd).or_default())
    }
}

impl Visit for Surveyor<'_> {
    type Error = io::Error;

    fn lookup(&mut self, dir: &Pin, name: &OsStr, path: &Path, last: bool) -> io::Result<()> {
        let spot = self.spot(dir, if last { CONTENT } else { NAMES })?;
        spot.names.entry(name.to_owned()).or_default().insert(path.to_owned());
        Ok(())
    }

    fn list(&mut self, dir: &Pin, path: &Path) -> io::Result<()> {
        self.spot(dir, CONTENT)?.whole.insert(path.to_owned());
        Ok(())
    }

    fn found(&mut self, found: &Found<'_>) -> io::Result<()> {
        self.survey.found.insert(found.path.to_owned());
        Ok(())
    }

    fn failed(&mut self, path: &Path, error: io::Error) -> io::Result<()> {
        Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }
}
