//! How the snapshots of all workloads stand: what `ftctl status` and the metrics show.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::snapshot::{
    process,
    store::{Generation, Kind, Store},
};

/// The snapshots of a workload.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// The workload.
    pub workload: String,
    /// Time between snapshots, milliseconds; absent where they are taken by hand, or when files change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_ms: Option<u64>,
    /// The newest one; of processes, where the schedule is one of processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<GenerationStatus>,
    /// The newest good one, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub good: Option<GenerationStatus>,
    /// One is being taken.
    pub running: bool,
    /// One is due, and this is why it is not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<String>,
    /// Why the last one could not be taken, until one can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// By the schedule, since ftd started: taken,
    pub taken: u64,
    /// not taken because one before was not done,
    pub skipped: u64,
    /// and not taken because something went wrong.
    pub failed: u64,
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationStatus {
    /// Its number.
    pub generation: u64,
    /// `files` or `process`.
    pub kind: String,
    /// When it was taken.
    pub time: jiff::Timestamp,
    /// How long processes stood still for it, all together, microseconds.
    pub frozen_us: u64,
    /// How long it took, milliseconds.
    pub took_ms: u64,
    /// Bytes of all that it holds.
    pub bytes: u64,
    /// Of these, in chunks that the store did not have.
    pub new_bytes: u64,
    /// Bytes that were written for those.
    pub stored_bytes: u64,
}

/// `files` or `process`.
fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Files => "files",
        Kind::Process => "process",
    }
}

impl GenerationStatus {
    /// Of a generation; how long its processes stood still, and how long it took if that is known better than by the
    /// store.
    pub(super) fn of(generation: &Generation, frozen_us: u64, took: Option<std::time::Duration>) -> Self {
        let stats = &generation.stats;
        Self {
            generation: generation.number,
            kind: kind_name(generation.about.kind).into(),
            time: generation.about.time,
            frozen_us,
            took_ms: took.unwrap_or(stats.duration).as_millis().try_into().unwrap_or(u64::MAX),
            bytes: stats.total,
            new_bytes: stats.new,
            stored_bytes: stats.stored,
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Board {
    all: Mutex<BTreeMap<String, SnapshotStatus>>,
}

impl Board {
    fn all_mut(&self) -> MutexGuard<'_, BTreeMap<String, SnapshotStatus>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How all stand, by the workloads' names.
    pub fn all(&self) -> Vec<SnapshotStatus> {
        self.all_mut().values().cloned().collect()
    }

    /// Changes how a workload's stand.
    pub fn change(&self, workload: &str, change: impl FnOnce(&mut SnapshotStatus)) {
        let mut all = self.all_mut();
        let fresh = || SnapshotStatus { workload: workload.to_owned(), ..SnapshotStatus::default() };
        change(all.entry(workload.to_owned()).or_insert_with(fresh));
    }

    /// Reads the newest, and the newest good one, from the store: of this kind, if one is given. Waits for disks.
    pub fn refresh(&self, store: &Store, workload: &str, kind: Option<Kind>) {
        let all = match store.generations(workload) {
            Ok(all) => all,
            Err(error) => return tracing::warn!(workload, %error, "the snapshots cannot be read"),
        };
        let of_kind = |generation: &&Generation| kind.is_none_or(|kind| kind == generation.about.kind);
        let status = |generation: &Generation| {
            let manifest = store.manifest(workload, generation.number).ok();
            let cost = manifest.as_ref().and_then(process::cost).unwrap_or_default();
            GenerationStatus::of(generation, cost.frozen_us, None)
        };
        let newest = all.iter().rfind(of_kind).map(status);
        let good = all.iter().filter(|generation| generation.good).rfind(of_kind).map(status);
        self.change(workload, |status| {
            status.newest = newest;
            status.good = good;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::store::{About, Settings};

    #[test]
    fn the_newest_and_the_last_good_one_are_those_of_the_kind_that_counts() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Settings::default()).unwrap();
        for (kind, good) in
            [(Kind::Process, true), (Kind::Process, false), (Kind::Files, true), (Kind::Files, false)]
        {
            let (node, boot_id, time) = ("n".into(), "b".into(), jiff::Timestamp::now());
            let about = About { workload: "w".into(), kind, node, boot_id, time };
            let number = store.begin(about).unwrap().commit().unwrap().number;
            if good {
                store.mark_good("w", number).unwrap();
            }
        }
        let board = Board::default();
        board.change("w", |status| status.taken = 7);
        let numbers = |kind| {
            board.refresh(&store, "w", kind);
            let status = board.all().remove(0);
            assert_eq!((status.workload.as_str(), status.taken), ("w", 7));
            (status.newest.unwrap().generation, status.good.unwrap().generation)
        };
        assert_eq!(numbers(Some(Kind::Process)), (2, 1));
        assert_eq!(numbers(Some(Kind::Files)), (4, 3));
        assert_eq!(numbers(None), (4, 3));
    }
}
