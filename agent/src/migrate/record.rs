//! Moves on disk: one file for each, replaced as a whole, written before the step begins that it names.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::machine::{Side, SourcePhase, TargetPhase};
use crate::heal::saved::write_durably;

/// The form of [`Record`].
const VERSION: u32 = 1;

/// A unit on the move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Moved {
    /// systemd's name.
    pub(super) unit: String,
    /// Its main process.
    pub(super) main_pid: u32,
    /// The packet filter that keeps its connections silent on the source.
    pub(super) lock: Option<String>,
    /// The hold that it had before, by its reason.
    pub(super) held: Option<String>,
}

/// How far a side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    Source(SourcePhase),
    Target(TargetPhase),
}

/// One side of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    /// The move's id, the same on both sides.
    pub(super) id: String,
    pub(super) workload: String,
    pub(super) units: Vec<Moved>,
    /// The other node.
    pub(super) peer: String,
    pub(super) phase: Phase,
    /// The boot in which it was written.
    pub(super) boot_id: String,
    /// The address that moves along, and whether it was taken, or given up, here.
    pub(super) address: Option<String>,
    pub(super) began: jiff::Timestamp,
}

impl Record {
    pub(super) fn new(id: &str, workload: &str, units: Vec<Moved>, peer: &str, phase: Phase) -> Self {
        Self {
            version: VERSION,
            id: id.into(),
            workload: workload.into(),
            units,
            peer: peer.into(),
            phase,
            boot_id: crate::heal::saved::boot_id(),
            address: None,
            began: jiff::Timestamp::now(),
        }
    }

    pub(super) fn side(&self) -> Side {
        match self.phase {
            Phase::Source(_) => Side::Source,
            Phase::Target(_) => Side::Target,
        }
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.units.iter().map(|unit| unit.unit.clone()).collect()
    }

    fn path(&self, dir: &Path) -> PathBuf {
        let side = match self.side() {
            Side::Source => "source",
            Side::Target => "target",
        };
        dir.join(format!("{}-{side}.json", self.id))
    }

    /// Writes it, durably.
    pub(super) fn save(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        write_durably(&self.path(dir), &serde_json::to_vec_pretty(self)?)
    }

    /// Removes it; one that is not there is removed already.
    pub(super) fn forget(&self, dir: &Path) -> io::Result<()> {
        match fs::remove_file(self.path(dir)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::File::open(dir)?.sync_all(),
        }
    }

    /// All that there are, and what cannot be read.
    pub(super) fn all(dir: &Path) -> (Vec<Self>, Vec<(PathBuf, String)>) {
        let (mut records, mut bad) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let read = fs::read(&path).map_err(|error| error.to_string());
            let read = read.and_then(|text| {
                let record: Self = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
                if record.version == VERSION && super::wire::is_id(&record.id) {
                    Ok(record)
                } else {
                    Err(format!("it is of version {}", record.version))
                }
            });
            match read {
                Ok(record) => records.push(record),
                Err(error) => bad.push((path, error)),
            }
        }
        (records, bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_of_a_move_are_kept_apart_and_a_damaged_record_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("moves");
        let of = |phase| Record::new("0123456789abcdef", "web", Vec::new(), "vm2", phase);
        let mut source = of(Phase::Source(SourcePhase::Preparing));
        let target = of(Phase::Target(TargetPhase::Serving));
        assert!(Record::all(&path).0.is_empty());
        source.save(&path).unwrap();
        target.save(&path).unwrap();
        source.phase = Phase::Source(SourcePhase::Asking);
        source.save(&path).unwrap();
        let (all, bad) = Record::all(&path);
        assert!(all.len() == 2 && all.contains(&source) && all.contains(&target) && bad.is_empty());
        source.forget(&path).unwrap();
        source.forget(&path).unwrap();
        fs::write(path.join("x.json"), "{").unwrap();
        let (all, bad) = Record::all(&path);
        assert_eq!((all, bad.len()), (vec![target], 1));
    }
}
