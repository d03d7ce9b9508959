//! How things stand, as numbers: the same that `ftctl status` shows.

use super::{
    text::{Text, Type},
    word,
};
use crate::{
    heal::{machine::Phase, supervisor::UnitStatus},
    inject::Record,
    peer::{PeerState, PeerStatus},
    replicate::ReplicaStatus,
    snapshot::schedule::{GenerationStatus, SnapshotStatus},
};

/// All phases, so that each has a number for each unit.
const PHASES: [Phase; 8] = [
    Phase::Unknown,
    Phase::Up,
    Phase::Ending,
    Phase::Yielded,
    Phase::Waiting,
    Phase::Working,
    Phase::Left,
    Phase::Failed,
];

/// How things stand now.
#[derive(Debug)]
pub struct Now<'a> {
    /// ftd's version.
    pub version: &'a str,
    /// When ftd started.
    pub started: jiff::Timestamp,
    /// Whether all is well, as `/healthz` says.
    pub well: bool,
    /// Whether systemd can be reached.
    pub systemd: bool,
    /// Whether the journal can be written.
    pub journal: bool,
    /// Where deaths are learned from.
    pub source: &'a str,
    /// Events that came from there.
    pub delivered: u64,
    /// Events that were lost on the way, by cause.
    pub drops: &'a [(String, u64)],
    /// Units under care.
    pub units: &'a [UnitStatus],
    /// Snapshots of workloads that have any, or a schedule.
    pub snapshots: &'a [SnapshotStatus],
    /// The present moment.
    pub time: jiff::Timestamp,
    /// Faults that are not undone.
    pub faults: &'a [Record],
    /// Other nodes.
    pub peers: &'a [PeerStatus],
    /// How far snapshots are there.
    pub replicas: &'a [ReplicaStatus],
}

impl Now<'_> {
    pub(super) fn write(&self, text: &mut Text) {
        self.write_agent(text);
        self.write_units(text);
        self.write_peers(text);
        self.write_snapshots(text);
    }

    fn write_agent(&self, text: &mut Text) {
        let build = vec![("version", self.version)];
        text.gauges("ftd_build_info", "ftd's version, as a label.", [(build, 1)]);
        let started = self.started.as_millisecond() as f64 / 1e3;
        text.gauges("ftd_start_time_seconds", "When ftd started, since 1970.", [(vec![], started)]);
        text.gauges("ftd_well", "1 if nothing keeps the host from serving as it should.", one(self.well));
        text.gauges("ftd_systemd_up", "1 if systemd can be reached.", one(self.systemd));
        text.gauges("ftd_journal_up", "1 if the journal can be written.", one(self.journal));
        let source = vec![("source", self.source)];
        text.gauges("ftd_probe_info", "Where deaths are learned from, as a label.", [(source, 1)]);
        text.family("ftd_probe_delivered_total", Type::Counter, "Events that the probe delivered.");
        text.sample("ftd_probe_delivered_total", &[], self.delivered);
        text.family(
            "ftd_probe_dropped_total",
            Type::Counter,
            "Events lost between kernel and ftd, by cause.",
        );
        for (cause, count) in self.drops {
            text.sample("ftd_probe_dropped_total", &[("cause", cause)], count);
        }
    }

    fn write_peers(&self, text: &mut Text) {
        let all = |value: &dyn Fn(&PeerStatus) -> Option<f64>| -> Vec<_> {
            let one = |peer: &PeerStatus| Some((peer.name.clone(), value(peer)?));
            self.peers.iter().filter_map(one).collect()
        };
        let mut gauge = |name: &str, help: &str, value: &dyn Fn(&PeerStatus) -> Option<f64>| {
            text.family(name, Type::Gauge, help);
            for (peer, value) in all(value) {
                text.sample(name, &[("peer", &peer)], value);
            }
        };
        gauge("ftd_peer_up", "1 if the peer is heard.", &|peer| {
            Some(f64::from(u8::from(peer.state == PeerState::Up)))
        });
        gauge("ftd_peer_round_trip_seconds", "Median of the last heartbeats' round trips.", &|peer| {
            peer.round_trip_us.map(|(median, _)| median as f64 / 1e6)
        });
        gauge("ftd_peer_loss_ratio", "Share of the last heartbeats that was lost.", &|peer| Some(peer.loss));
        gauge("ftd_peer_sent_bytes_per_second", "What goes to the peer.", &|peer| {
            Some(peer.sent_per_s as f64)
        });
        gauge("ftd_peer_received_bytes_per_second", "What comes from the peer.", &|peer| {
            Some(peer.received_per_s as f64)
        });
        gauge("ftd_peer_certificate_end_seconds", "When its certificate ends, since 1970.", &|peer| {
            peer.certificate.as_ref().map(|certificate| certificate.until.as_second() as f64)
        });
        let now = jiff::Timestamp::now();
        let help = "How long a snapshot has waited to be on the peer; 0 when all are.";
        text.family("ftd_replica_lag_seconds", Type::Gauge, help);
        for replica in self.replicas {
            let labels = [("workload", &*replica.workload), ("peer", &replica.peer)];
            text.sample("ftd_replica_lag_seconds", &labels, replica.lag(now).as_secs_f64());
        }
        text.family(
            "ftd_replica_taken_seconds",
            Type::Gauge,
            "When the newest snapshot there was taken, since 1970.",
        );
        for replica in self.replicas {
            if let Some(taken) = replica.taken {
                let labels = [("workload", &*replica.workload), ("peer", &replica.peer)];
                text.sample("ftd_replica_taken_seconds", &labels, taken.as_millisecond() as f64 / 1e3);
            }
        }
    }

    fn write_units(&self, text: &mut Text) {
        let mut gauge = |name: &str, help: &str, value: &dyn Fn(&UnitStatus) -> Option<u64>| {
            text.family(name, Type::Gauge, help);
            for unit in self.units {
                if let Some(value) = value(unit) {
                    text.sample(name, &[("unit", &unit.unit), ("workload", &unit.workload)], value);
                }
            }
        };
        let yes = |value: bool| Some(u64::from(value));
        gauge("ftd_unit_serving", "1 if the unit is up and no outage is under way.", &|unit| {
            yes(unit.phase == Phase::Up && unit.outage.is_none())
        });
        gauge("ftd_unit_failed", "1 if ftd has given the unit up.", &|unit| yes(unit.phase == Phase::Failed));
        gauge("ftd_unit_held", "1 if the unit is out of ftd's hands.", &|unit| yes(unit.held.is_some()));
        gauge("ftd_unit_phase_seconds", "How long the unit has been in its phase.", &|unit| {
            Some(unit.phase_s)
        });
        gauge("ftd_unit_attempts", "Start attempts that count now.", &|unit| Some(unit.attempts as u64));
        gauge("ftd_unit_attempts_max", "Start attempts after which ftd gives up.", &|unit| {
            Some(unit.attempts_max.into())
        });
        gauge("ftd_unit_health_failures", "Failures of the health check in a row.", &|unit| {
            unit.health.as_ref().map(|health| health.failures.into())
        });
        gauge("ftd_unit_health_proven", "1 if the health check has ever succeeded.", &|unit| {
            unit.health.as_ref().map(|health| health.proven.into())
        });
        gauge("ftd_faults_active", "Faults injected into the unit that are not undone.", &|unit| {
            Some(self.faults.iter().filter(|fault| fault.unit == unit.unit).count() as u64)
        });
        text.family("ftd_unit_forks_total", Type::Counter, "Processes that the unit made.");
        for unit in self.units {
            text.sample(
                "ftd_unit_forks_total",
                &[("unit", &unit.unit), ("workload", &unit.workload)],
                unit.forks,
            );
        }
        text.family("ftd_unit_phase", Type::Gauge, "1 for the phase that the unit is in, 0 for the others.");
        for unit in self.units {
            for phase in PHASES {
                let labels = [("unit", &*unit.unit), ("workload", &unit.workload), ("phase", &word(&phase))];
                text.sample("ftd_unit_phase", &labels, u8::from(unit.phase == phase));
            }
        }
    }
}

impl Now<'_> {
    fn write_snapshots(&self, text: &mut Text) {
        let mut gauge = |name: &str, help: &str, value: &dyn Fn(&SnapshotStatus) -> Option<f64>| {
            text.family(name, Type::Gauge, help);
            for snapshots in self.snapshots {
                if let Some(value) = value(snapshots) {
                    text.sample(name, &[("workload", &snapshots.workload)], value);
                }
            }
        };
        let age = |generation: &Option<GenerationStatus>| {
            let taken = generation.as_ref()?.time.as_millisecond();
            Some((self.time.as_millisecond() - taken).max(0) as f64 / 1e3)
        };
        gauge("ftd_snapshot_newest_age_seconds", "Age of the newest snapshot.", &|one| age(&one.newest));
        gauge("ftd_snapshot_good_age_seconds", "Age of the newest good snapshot.", &|one| age(&one.good));
        gauge("ftd_snapshot_newest_bytes", "Bytes of all that the newest snapshot holds.", &|one| {
            Some(one.newest.as_ref()?.bytes as f64)
        });
        gauge("ftd_snapshot_newest_new_bytes", "Of these, bytes that the store did not have.", &|one| {
            Some(one.newest.as_ref()?.new_bytes as f64)
        });
        gauge("ftd_snapshot_interval_seconds", "Time between snapshots by the schedule.", &|one| {
            Some(one.every_ms? as f64 / 1e3)
        });
        gauge("ftd_snapshot_running", "1 while one is being taken.", &|one| {
            Some(u8::from(one.running).into())
        });
        gauge("ftd_snapshot_waiting", "1 while one is due and the workload does not serve.", &|one| {
            Some(u8::from(one.waits.is_some()).into())
        });
        gauge("ftd_snapshot_failing", "1 if the last one that was due could not be taken.", &|one| {
            Some(u8::from(one.failure.is_some()).into())
        });
    }
}

fn one(value: bool) -> [(Vec<(&'static str, &'static str)>, u8); 1] {
    [(vec![], value.into())]
}
