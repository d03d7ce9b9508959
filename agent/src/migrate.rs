//! A running service moves to another node, with all that it has in memory.
//!
//! ```text
//! source                                              target
//!   can you take it?  (nothing is touched yet)  ─────▶  checks, makes room, holds its unit
//!   holds the unit, quiets systemd
//!   freezes, dumps; images go as CRIU writes them ───▶  into memory
//!   Go                                          ─────▶  restores it as the unit that it was
//!   ends what stood still here                  ◀─────  it serves
//! ```
//!
//! **The commit point** is the target's record `serving`, on its disk before it says so. Before it, any failure thaws the
//! service where it was, with its connections; after it, the source's copy is ended. [`machine`] has the rules, pure, and
//! says what happens when one of the two does not hear of it; docs/migration.md has the table of what survives what.
//!
//! While it moves, the unit is held on both nodes: neither heals what is frozen or half made on purpose. On the node that
//! it has left it stays held, for as long as it is not moved back or released by a person.
//!
//! **The seam for the cluster.** Nothing here decides where a workload *may* run: a person says `ftctl migrate`, and, where
//! a target cannot be reached after `Go`, a person decides ([`Migrations::decide`]). The epochs of a cluster's placements
//! are to give the same two words.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    config::Config,
    event::{Kind, OpId, bus::Bus},
    heal::{
        machine::Input,
        saved::Saving,
        supervisor::{Supervisor, boot_now},
    },
    peer::Peers,
    snapshot::scratch::Places,
    unit::manager::Systemd,
};

mod address;
pub mod machine;
mod preflight;
mod record;
mod source;
mod stream;
mod target;
mod wire;

pub use machine::Side;
pub use wire::fuzz;

use record::Record;

/// How a service is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// What suits it: today always stop-copy.
    #[default]
    Auto,
    /// Frozen, copied, restored.
    StopCopy,
    /// Copied in rounds while it runs; frozen for the last one.
    PreCopy,
    /// Restored at once; its memory follows.
    PostCopy,
}

/// What is to be moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// A workload, or one of its units: the workload moves as one.
    pub what: String,
    /// The node.
    pub to: String,
    /// How.
    #[serde(default)]
    pub mode: Mode,
    /// Say what would be in the way, and touch nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// How far a move is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Its id, on both nodes.
    pub id: String,
    /// The workload.
    pub workload: String,
    /// Its units.
    pub units: Vec<String>,
    /// From there,
    pub from: String,
    /// to there.
    pub to: String,
    /// How.
    pub mode: Mode,
    /// What is done now.
    pub phase: String,
    /// What was done before, and how long it took, milliseconds.
    pub phases: Vec<(String, u64)>,
    /// Bytes of images that there will be, about.
    pub expected: u64,
    /// Bytes of images that were sent.
    pub bytes: u64,
    /// Bytes that this was on the wire.
    pub wire_bytes: u64,
    /// From the freeze until the target said that it runs, or until it was thawed, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ms: Option<u64>,
    /// Of that, the making of the processes on the target, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_ms: Option<u64>,
    /// Since the beginning, milliseconds.
    pub took_ms: u64,
    /// Why it cannot go on at the moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<(String, String)>,
    /// What has become of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// What has become of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It runs on the target.
    Moved,
    /// It runs where it was.
    Back {
        /// Why.
        error: String,
        /// What a person can do.
        mend: String,
    },
}

/// Why a move is not begun, or a request about one not met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Refused {
    /// Thing and cause.
    pub error: String,
    /// Mend.
    pub mend: String,
}

impl Refused {
    #[expect(clippy::needless_pass_by_value, reason = "every caller has an error or a text to give away")]
    fn new(error: impl ToString, mend: impl Into<String>) -> Self {
        Self { error: error.to_string(), mend: mend.into() }
    }
}

/// Moves from and to this node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Migrations {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    bus: Arc<Bus>,
    peers: Peers,
    supervisor: Arc<Supervisor>,
    saving: Saving,
    systemd: Systemd,
    places: Places,
    /// Where records are.
    dir: PathBuf,
    moves: Mutex<Moves>,
}

#[derive(Debug, Default)]
struct Moves {
    /// Units that take part in a move, and in which.
    units: BTreeMap<String, String>,
    sources: HashMap<String, Leaving>,
    targets: HashMap<String, Arc<target::Coming>>,
    /// What was said of moves to this node that are over, the newest last.
    over: Vec<(String, wire::Word)>,
}

/// A move from here, as others see it.
#[derive(Debug, Clone)]
struct Leaving {
    progress: watch::Receiver<Progress>,
    decide: watch::Sender<Option<Side>>,
}

impl Migrations {
    /// Answers other nodes from now on, and takes up what an earlier ftd has left.
    pub fn start(
        config: &Config,
        bus: &Arc<Bus>,
        peers: &Peers,
        supervisor: &Arc<Supervisor>,
        saving: &Saving,
        systemd: &Systemd,
    ) -> Self {
        let inner = Arc::new(Inner {
            config: config.clone(),
            bus: Arc::clone(bus),
            peers: peers.clone(),
            supervisor: Arc::clone(supervisor),
            saving: saving.clone(),
            systemd: systemd.clone(),
            places: Places::of_daemon(config),
            dir: config.node.state_dir.join("moves"),
            moves: Mutex::default(),
        });
        let (records, bad) = Record::all(&inner.dir);
        for (path, cause) in bad {
            let file = path.display().to_string();
            tracing::error!(file, cause, "the record of a move makes no sense");
            let mend = "see which node serves the workload, and `ftctl release` the unit there; then remove the file";
            bus.emit(None, None, Kind::StateDamaged { file, cause, mend: mend.into() });
        }
        // Known before anybody can ask for them.
        {
            let mut moves = inner.moves();
            for record in &records {
                moves.units.extend(record.names().into_iter().map(|unit| (unit, record.id.clone())));
            }
        }
        let (sources, targets): (Vec<_>, Vec<_>) =
            records.into_iter().partition(|record| record.side() == Side::Source);
        let targets = targets.into_iter().map(|record| inner.keep_target(record, None)).collect();
        target::serve(&inner);
        tokio::spawn(take_up(Arc::clone(&inner), sources, targets));
        Self { inner }
    }

    /// What is in the way of a move; nothing: it can be begun.
    pub async fn check(&self, request: &Request) -> Result<(String, Vec<String>), Refused> {
        let plan = preflight::plan(&self.inner, request).await?;
        Ok((plan.workload, plan.units.into_iter().map(|unit| unit.unit).collect()))
    }

    /// Begins a move. It goes on whatever becomes of who has asked for it.
    pub async fn begin(&self, request: &Request) -> Result<watch::Receiver<Progress>, Refused> {
        let plan = preflight::plan(&self.inner, request).await?;
        source::begin(&self.inner, &plan, request.mode)
    }

    /// How far all moves from here are.
    pub fn all(&self) -> Vec<Progress> {
        self.inner.moves().sources.values().map(|leaving| leaving.progress.borrow().clone()).collect()
    }

    /// A person, or the cluster, says where a service is to run of which nobody here can know whether it runs on the
    /// target: it stands still until this, or the target's word.
    pub fn decide(&self, what: &str, side: Side) -> Result<(), Refused> {
        let none = || {
            let mend =
                "only a move whose target is gone after it was told to go can be decided: see ftctl status";
            Refused::new(format!("no move of {what} waits for a decision"), mend)
        };
        let name = crate::config::unit_name(what);
        let moves = self.inner.moves();
        let waits = |leaving: &&Leaving| {
            let progress = leaving.progress.borrow();
            let it = progress.workload == what || progress.units.contains(&name);
            it && progress.waits.is_some()
        };
        moves.sources.values().find(waits).ok_or_else(none)?.decide.send_replace(Some(side));
        Ok(())
    }
}

/// Goes on with what an earlier ftd has begun.
async fn take_up(inner: Arc<Inner>, sources: Vec<Record>, targets: Vec<Arc<target::Coming>>) {
    inner.systemd.looked().await;
    for coming in targets {
        tokio::spawn({
            let inner = Arc::clone(&inner);
            async move { coming.resume(&inner).await }
        });
    }
    for record in sources {
        source::resume(&inner, record);
    }
}

impl Inner {
    fn moves(&self) -> MutexGuard<'_, Moves> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_target(&self, record: Record, scratch: Option<target::Room>) -> Arc<target::Coming> {
        let coming = Arc::new(target::Coming::new(record, scratch));
        self.moves().targets.insert(coming.id.clone(), Arc::clone(&coming));
        coming
    }

    /// Writes a record, on a thread that may wait for the disk.
    async fn save(&self, record: &Record) -> Result<(), Refused> {
        let (record, dir) = (record.clone(), self.dir.clone());
        let saved = tokio::task::spawn_blocking(move || record.save(&dir)).await;
        let mend = "make room, or mend the disk, under node.state_dir";
        let failed =
            |error: String| Refused::new(format!("the move's record cannot be written: {error}"), mend);
        saved.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
    }

    /// Removes a record, however long it takes, and with it the move.
    async fn forget(&self, record: &Record) {
        loop {
            let (gone, dir) = (record.clone(), self.dir.clone());
            match tokio::task::spawn_blocking(move || gone.forget(&dir)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => tracing::warn!(%error, "the record of a move cannot be removed"),
                Err(error) => tracing::warn!(%error, "the record of a move cannot be removed"),
            }
            tokio::time::sleep(AGAIN).await;
        }
        let mut moves = self.moves();
        moves.units.retain(|_, id| *id != record.id);
        match record.side() {
            Side::Source => drop(moves.sources.remove(&record.id)),
            Side::Target => drop(moves.targets.remove(&record.id)),
        }
    }

    /// Holds a unit, durably.
    async fn hold(&self, unit: &str, reason: String) -> Result<(), Refused> {
        let (slot, _) =
            self.supervisor.find(unit).map_err(|error| Refused::new(error, "see: ftctl status"))?;
        self.supervisor.feed(slot, boot_now(), Input::Hold { until: None, reason: Some(reason) });
        self.settled().await
    }

    /// Has a unit be held as it was before, or not at all.
    async fn unhold(&self, unit: &str, held: Option<String>) -> Result<(), Refused> {
        if let Some(reason) = held {
            return self.hold(unit, reason).await;
        }
        // One that is under care no more needs no release.
        let Ok((slot, _)) = self.supervisor.find(unit) else { return Ok(()) };
        self.supervisor.feed(slot, boot_now(), Input::Release);
        self.settled().await
    }

    async fn settled(&self) -> Result<(), Refused> {
        let change = *self.supervisor.changes().borrow();
        self.saving.settled(change).await.map_err(|cause| {
            Refused::new(
                format!("a hold cannot be saved: {cause}"),
                "make room, or mend the disk, under node.state_dir",
            )
        })
    }

    fn tell_phase(&self, record: &Record, op: Option<OpId>, phase: &str, detail: String) -> OpId {
        let kind = Kind::MigrationPhase {
            workload: record.workload.clone(),
            migration: record.id.clone(),
            peer: record.peer.clone(),
            leaves: record.side() == Side::Source,
            phase: phase.into(),
            detail,
        };
        let unit = record.units.first().map(|unit| unit.unit.as_str());
        match op {
            Some(op) => {
                self.bus.emit(unit, Some(op), kind);
                op
            }
            None => self.bus.open(unit, kind),
        }
    }
}

/// What cannot be done is tried again after this long.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

fn with<T>(weak: &Weak<T>) -> Result<Arc<T>, crate::peer::Refusal> {
    weak.upgrade().ok_or_else(|| crate::peer::Refusal::new("ftd is ending there", ""))
}

/// A reason of ours for a hold begins so.
const MOVING: &str = "moves";
const MOVED: &str = "moved to ";

/// The hold that a unit has, if it is not one of a move under way.
fn hold_before(inner: &Inner, unit: &str) -> Option<String> {
    let status = inner.supervisor.status().into_iter().find(|one| one.unit == unit)?;
    Some(status.held?.reason.unwrap_or_default()).filter(|reason| !reason.starts_with(MOVING))
}

/// A new move's id: of random(4), which the kernel gives as a text there.
fn new_id() -> std::io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    if wire::is_id(&digits) { Ok(digits) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}
