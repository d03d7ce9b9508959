//! The API: what people and programs may ask of a running ftd.
//!
//! All of it on a unix socket, for root and the group `ftd`; the part that only reads also on TCP, where
//! the configuration names an address. Bodies are JSON; events are a line of JSON each
//! (`application/x-ndjson`), the same lines that the journal holds.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

pub use crate::snapshot::schedule::{GenerationStatus, SnapshotStatus};
use crate::{
    config::Config,
    event::bus::Bus,
    heal::{
        saved::Saving,
        supervisor::{Supervisor, UnitStatus},
    },
    inject::{Faults, Record},
    migrate::{Migrations, Progress},
    peer::Peers,
    probe::Source,
    replicate::{ReplicaStatus, Replicas},
    snapshot::schedule::Board,
    telemetry::{Metrics, gauges::Now},
    unit::manager::Systemd,
};

pub mod doctor;
pub mod migrate;
pub mod peers;
pub mod server;

/// All that the API can reach.
#[derive(Debug)]
pub struct App {
    /// The configuration in force.
    pub config: Config,
    /// Events.
    pub bus: Arc<Bus>,
    /// Units under care.
    pub supervisor: Arc<Supervisor>,
    /// How far their state is on disk.
    pub saving: Saving,
    /// systemd.
    pub systemd: Systemd,
    /// Faults.
    pub faults: Arc<Faults>,
    /// Where deaths are learned from.
    pub source: Arc<Source>,
    /// How snapshots stand.
    pub snapshots: Arc<Board>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Other nodes.
    pub peers: Peers,
    /// Snapshots on their way to them.
    pub replicas: Replicas,
    /// Services on their way from and to other nodes.
    pub migrations: Migrations,
    /// When ftd started.
    pub started: jiff::Timestamp,
}

/// What `ftctl status` shows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// This node.
    pub node: String,
    /// ftd's version.
    pub version: String,
    /// ftd's process id.
    pub pid: u32,
    /// When ftd started.
    pub started: jiff::Timestamp,
    /// Whether systemd can be reached.
    pub systemd: bool,
    /// Why the journal cannot be written, while it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
    /// Where deaths are learned from.
    pub probe: ProbeStatus,
    /// Units under care.
    pub units: Vec<UnitStatus>,
    /// Snapshots, of each workload that has files or a schedule.
    #[serde(default)]
    pub snapshots: Vec<SnapshotStatus>,
    /// Faults that are not undone yet.
    pub faults: Vec<Record>,
    /// How far snapshots are on other nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<ReplicaStatus>,
    /// Services on their way to other nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub migrations: Vec<Progress>,
}

/// The probe, as `ftctl status` shows it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ProbeStatus {
    /// `ebpf`, `pidfd` or `none`.
    pub source: String,
    /// Why not `ebpf`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Real-time priority of the reader, or why it has none.
    pub realtime: String,
    /// What this kernel lacks.
    pub missing: Vec<String>,
    /// Events delivered since ftd started.
    pub delivered: u64,
    /// Events lost, by cause, since ftd started.
    pub drops: Vec<(String, u64)>,
    /// Runs of the kernel's programs that were left out because an interrupt came while the same program was at
    /// work; most would have reported nothing.
    #[serde(default)]
    pub skipped: u64,
    /// Units that the kernel does not watch, each with the reason. systemd's word on them remains.
    #[serde(default)]
    pub unwatched: Vec<(String, String)>,
}

/// `POST /v1/hold`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// The unit.
    pub unit: String,
    /// End after this long, milliseconds; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
    /// Why, for those who wonder later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `POST /v1/release`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The unit.
    pub unit: String,
}

/// `POST /v1/recover`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recover {
    /// The fault; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// The answer when a request cannot be met.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    /// The thing and the cause.
    pub error: String,
    /// The mend.
    pub mend: String,
}

/// `GET /v1/check`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckQuery {
    /// The unit; it need not be under care.
    pub unit: String,
}

/// `GET /v1/events`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Not before this moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<jiff::Timestamp>,
    /// Only of this unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Go on with what happens from now on.
    #[serde(default)]
    pub follow: bool,
    /// Only the last so many of what has happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<usize>,
}

impl App {
    /// The status, now.
    pub fn status(&self) -> Status {
        Status {
            node: self.bus.node().to_owned(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            started: self.started,
            systemd: self.systemd.connected(),
            journal: self.bus.journal_blocked(),
            probe: self.source.status(),
            units: self.supervisor.status(),
            snapshots: self.snapshots.all(),
            faults: self.faults.list(),
            replicas: self.replicas.status(),
            migrations: self.migrations.all(),
        }
    }

    /// All numbers, for Prometheus, now.
    pub fn metrics(&self) -> String {
        let status = self.status();
        self.metrics.text(&Now {
            version: &status.version,
            started: status.started,
            well: status.troubles().is_empty(),
            systemd: status.systemd,
            journal: status.journal.is_none(),
            source: &status.probe.source,
            delivered: status.probe.delivered,
            drops: &status.probe.drops,
            units: &status.units,
            snapshots: &status.snapshots,
            time: jiff::Timestamp::now(),
            faults: &status.faults,
            peers: &self.peers.status().peers,
            replicas: &status.replicas,
        })
    }
}

impl Status {
    /// What keeps this host from serving as it should; nothing when all is well. A unit that is held or
    /// was stopped on purpose is as it should be.
    pub fn troubles(&self) -> Vec<String> {
        use crate::heal::machine::Phase;
        let mut troubles = Vec::new();
        if !self.systemd {
            troubles.push("systemd cannot be reached".to_owned());
        }
        if let Some(cause) = &self.journal {
            troubles.push(format!("the journal cannot be written: {cause}"));
        }
        for unit in self.units.iter().filter(|unit| unit.held.is_none()) {
            if !matches!(unit.phase, Phase::Up | Phase::Left) {
                let phase = format!("{:?}", unit.phase).to_lowercase();
                troubles.push(format!("{} is {phase} ({})", unit.unit, unit.active_state));
            } else if let (Phase::Up, Some(cause)) = (unit.phase, unit.outage) {
                troubles.push(format!("{} is up and does not serve ({cause:?})", unit.unit));
            }
        }
        troubles
    }
}

/// Milliseconds of a duration, for the API.
pub fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(unit: &serde_json::Value, journal: Option<&str>) -> Status {
        let mut all = json!({
            "unit": "a.service", "workload": "w", "phase": "up", "phase_s": 1, "active_state": "active",
            "sub_state": "running", "load_state": "loaded", "main_pid": 7, "attempts": 0,
            "attempts_max": 5, "outages": 0, "deaths": 0, "forks": 0,
        });
        all.as_object_mut().unwrap().extend(unit.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "node": "n", "version": "1", "pid": 1, "started": "2026-01-01T00:00:00Z", "systemd": true,
            "journal": journal, "probe": ProbeStatus::default(), "units": [all], "faults": [],
        }))
        .unwrap()
    }

    #[test]
    fn a_unit_that_hangs_and_a_journal_that_is_blocked_are_troubles() {
        assert!(status(&json!({}), None).troubles().is_empty());
        assert_eq!(
            status(&json!({"outage": "hung"}), None).troubles(),
            ["a.service is up and does not serve (Hung)"]
        );
        assert_eq!(status(&json!({}), Some("full")).troubles(), ["the journal cannot be written: full"]);
        // Stopped on purpose.
        assert!(status(&json!({"outage": "stopped", "phase": "left"}), None).troubles().is_empty());
    }
}
