//! What healing must not forget when ftd restarts: holds, units given up, attempts, proven checks, the run that
//! each unit was last seen in.
//!
//! One small JSON file, replaced as a whole (write, sync, rename, sync the directory), so that it is
//! always the old or the new one. Attempts and runs are told by the clocks of a boot and count only in the same boot.
//!
//! Saving is a task of its own ([`keep`]): a slow disk delays no heal. Many changes in a row are saved once. He
//! who must know that a change is on disk, such as a person who holds a unit, waits for its number
//! ([`Saving::settled`]).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{machine::Saved, supervisor::Supervisor};
use crate::event::{Kind, bus::Bus};

/// Time between attempts to save while it does not work.
const RETRY: Duration = Duration::from_secs(1);

/// The file in ftd's state directory.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    boot_id: String,
    units: BTreeMap<String, Saved>,
}

impl Store {
    /// The store in `state_dir`.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("heal.json") }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was saved; nothing when there is no file. An unreadable file is an error: the caller says
    /// so and goes on with nothing.
    pub fn load(&self) -> io::Result<BTreeMap<String, Saved>> {
        let text = match fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            text => text?,
        };
        let mut content: Content = serde_json::from_slice(&text)?;
        if content.boot_id != boot_id() {
            for unit in content.units.values_mut() {
                unit.attempts.clear();
                unit.run = None;
            }
        }
        Ok(content.units)
    }

    /// Replaces what was saved, durably.
    pub fn save(&self, units: BTreeMap<String, Saved>) -> io::Result<()> {
        write_durably(&self.path, &serde_json::to_vec_pretty(&Content { boot_id: boot_id(), units })?)
    }
}

/// How far saving has come; cheap to clone.
#[derive(Debug, Clone)]
pub struct Saving {
    /// The number of the last change that is on disk or could not be written, and then why.
    tried: watch::Receiver<(u64, Option<String>)>,
}

impl Saving {
    /// Waits until the change with this number ([`Supervisor::changes`]) is on disk. `Err` says why it is not;
    /// it is tried again all the same.
    pub async fn settled(&self, change: u64) -> Result<(), String> {
        let mut tried = self.tried.clone();
        match tried.wait_for(|(number, _)| *number >= change).await.map(|tried| tried.1.clone()) {
            Ok(None) => Ok(()),
            Ok(Some(cause)) => Err(cause),
            Err(_) => Err("ftd is ending".into()),
        }
    }
}

/// Saves what changes, for ever, in a task of its own.
pub fn keep(supervisor: Arc<Supervisor>, store: Arc<Store>, bus: Arc<Bus>) -> Saving {
    let (tell, tried) = watch::channel((0, None));
    let mut changes = supervisor.changes();
    tokio::spawn(async move {
        let mut failing = false;
        while changes.changed().await.is_ok() {
            loop {
                let number = *changes.borrow_and_update();
                let (saved, store) = (supervisor.saved(), Arc::clone(&store));
                let path = store.path().display().to_string();
                let result = tokio::task::spawn_blocking(move || store.save(saved)).await;
                let Err(error) = result.map_err(io::Error::other).flatten() else {
                    if std::mem::take(&mut failing) {
                        bus.emit(None, None, Kind::StateSaved {});
                    }
                    tell.send_replace((number, None));
                    break;
                };
                let cause = format!("{path}: {error}");
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(cause, "holds and attempts cannot be saved");
                    bus.emit(None, None, Kind::StateUnsaved { cause: cause.clone() });
                }
                tell.send_replace((number, Some(cause)));
                tokio::time::sleep(RETRY).await;
            }
        }
    });
    Saving { tried }
}

/// Replaces a file as a whole: after this, or after a crash at any moment of it, the file is the new
/// one or the old one.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// The kernel's name for this boot, see random(4).
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heal::machine::Run;

    #[test]
    fn what_is_saved_is_loaded_and_what_is_of_another_boot_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert!(store.load().unwrap().is_empty());
        let run = Some(Run { inactive_exit: 7, n_restarts: 1 });
        let saved = Saved { failed: true, attempts: vec![1, 2], run, ..Saved::default() };
        store.save(BTreeMap::from([("a.service".into(), saved.clone())])).unwrap();
        assert_eq!(store.load().unwrap()["a.service"], saved);
        let other = fs::read_to_string(store.path()).unwrap().replace(&boot_id(), "another boot");
        fs::write(store.path(), other).unwrap();
        let loaded = &store.load().unwrap()["a.service"];
        assert!(loaded.failed && loaded.attempts.is_empty() && loaded.run.is_none());
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_an_empty_state() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        fs::write(store.path(), b"{\"units\": {").unwrap();
        assert!(store.load().is_err());
    }
}
