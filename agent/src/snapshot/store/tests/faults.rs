//! A disk that stops, fails or forgets at any deed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    sync::Mutex,
};

use crate::snapshot::store::{disk::Deed, locked};

/// What happens when the time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum How {
    /// As `kill -9` before the deed; of a write, in its middle. Nothing can be done after it.
    Kill,
    /// The disk is full: this deed fails, of a write in its middle, and those after it do not.
    Full,
}

/// The plan, and what has happened.
#[derive(Debug, Default)]
pub(in super::super) struct Faults(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Deeds that are still to succeed, and what happens then.
    plan: Option<(usize, How)>,
    dead: bool,
    /// Half of what is now written gets there.
    tear: bool,
    /// All deeds so far.
    deeds: Vec<String>,
    /// Written, and not synced: what of each file is sure to be there after a power cut.
    unsynced: BTreeMap<PathBuf, u64>,
    /// What a power cut may take back: in this directory, by this.
    unsettled: Vec<(PathBuf, Undo)>,
    /// Removed files are kept here for that.
    attic: Option<tempfile::TempDir>,
}

#[derive(Debug)]
enum Undo {
    MakeDir(PathBuf),
    Create(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf, PathBuf),
}

impl Faults {
    /// From now on: so many deeds succeed, then this happens.
    pub(in super::super) fn plan(&self, deeds: usize, how: How) {
        *locked(&self.0) = State { plan: Some((deeds, how)), ..State::default() };
    }

    /// Like [`Faults::plan`], with a kill, and what is removed is kept so that a power cut can bring it back.
    pub(in super::super) fn plan_power_cut(&self, deeds: usize) {
        let attic = Some(super::tempdir());
        *locked(&self.0) = State { plan: Some((deeds, How::Kill)), attic, ..State::default() };
    }

    /// The deeds since the plan was made.
    pub(in super::super) fn deeds(&self) -> Vec<String> {
        locked(&self.0).deeds.clone()
    }

    /// Whether the plan has come about.
    pub(in super::super) fn happened(&self) -> bool {
        locked(&self.0).plan.is_none()
    }

    /// Takes back what was not made durable: which of it, `choose` says.
    pub(in super::super) fn cut_power(&self, mut choose: impl FnMut() -> bool) {
        let mut state = locked(&self.0);
        for (_, undo) in state.unsettled.drain(..).rev().collect::<Vec<_>>() {
            if !choose() {
                continue;
            }
            match undo {
                Undo::MakeDir(path) => _ = fs::remove_dir_all(path),
                Undo::Create(path) => {
                    let _ = fs::remove_file(&path);
                    state.unsynced.remove(&path);
                }
                // What was at the new name is not known here; the store renames to new names only.
                Undo::Rename(from, to) => {
                    let _ = fs::rename(&to, &from);
                    if let Some(durable) = state.unsynced.remove(&to) {
                        state.unsynced.insert(from, durable);
                    }
                }
                Undo::Remove(path, kept) => _ = fs::copy(kept, path),
            }
        }
        for (path, durable) in std::mem::take(&mut state.unsynced) {
            if choose()
                && let Ok(file) = fs::OpenOptions::new().write(true).open(path)
            {
                file.set_len(durable).unwrap();
            }
        }
    }

    pub(in super::super) fn before(&self, deed: Deed<'_>) -> io::Result<()> {
        let mut state = locked(&self.0);
        if state.dead {
            return Err(io::Error::other("killed"));
        }
        state.deeds.push(named(deed));
        if let Deed::Remove(path) = deed
            && let (Some(attic), true) = (&state.attic, path.exists())
        {
            let kept = attic.path().join(state.unsettled.len().to_string());
            fs::copy(path, &kept)?;
            state
                .unsettled
                .push((path.parent().unwrap_or(path).to_owned(), Undo::Remove(path.to_owned(), kept)));
        }
        match &mut state.plan {
            Some((0, how)) => {
                let how = *how;
                state.plan = None;
                state.dead = how == How::Kill;
                if matches!(deed, Deed::Append(_)) {
                    state.tear = true;
                    return Ok(());
                }
                Err(io::Error::from(io::ErrorKind::StorageFull))
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What of these bytes gets to the disk.
    pub(in super::super) fn torn<'a>(&self, bytes: &'a [u8]) -> (&'a [u8], bool) {
        let torn = std::mem::take(&mut locked(&self.0).tear);
        (&bytes[..if torn { bytes.len() / 2 } else { bytes.len() }], torn)
    }

    pub(in super::super) fn after(&self, deed: Deed<'_>) {
        let mut state = locked(&self.0);
        if state.attic.is_none() {
            return;
        }
        match deed {
            Deed::Create(path) => {
                state.unsynced.insert(path.to_owned(), 0);
                let undo = Undo::Create(path.to_owned());
                state.unsettled.push((path.parent().unwrap_or(path).to_owned(), undo));
            }
            Deed::Append(path) => _ = state.unsynced.entry(path.to_owned()).or_insert(0),
            Deed::Sync(path) => _ = state.unsynced.remove(path),
            Deed::Rename(from, to) => {
                if let Some(durable) = state.unsynced.remove(from) {
                    state.unsynced.insert(to.to_owned(), durable);
                }
                let undo = Undo::Rename(from.to_owned(), to.to_owned());
                state.unsettled.push((to.parent().unwrap_or(to).to_owned(), undo));
            }
            Deed::SyncDir(dir) => state.unsettled.retain(|(of, _)| of != dir),
            Deed::MakeDir(path) => {
                let undo = Undo::MakeDir(path.to_owned());
                state.unsettled.push((path.parent().unwrap_or(path).to_owned(), undo));
            }
            Deed::Remove(_) | Deed::RemoveDir(_) => {}
        }
    }
}

/// The deed, without what differs from run to run.
fn named(deed: Deed<'_>) -> String {
    let (kind, path) = match deed {
        Deed::MakeDir(path) => ("make", path),
        Deed::Create(path) => ("create", path),
        Deed::Append(path) => ("append", path),
        Deed::Sync(path) => ("sync", path),
        Deed::Rename(_, path) => ("rename", path),
        Deed::SyncDir(path) => ("sync dir", path),
        Deed::Remove(path) => ("remove", path),
        Deed::RemoveDir(path) => ("remove dir", path),
    };
    let dirs: BTreeSet<_> = ["new", "packs", "generations"].into_iter().collect();
    let within = path.iter().filter_map(|part| part.to_str()).find(|part| dirs.contains(part));
    let extension = path.extension().and_then(|extension| extension.to_str());
    format!("{kind} {} {}", within.unwrap_or("-"), extension.unwrap_or("-"))
}
