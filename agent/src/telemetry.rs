//! The outside: what has happened, and how things stand, as numbers.
//!
//! Two sources, and no other: the stream of events, which is counted here as it goes by ([`Metrics::run`]), and the
//! status, which is asked when somebody wants the numbers ([`gauges`]). So a number can always be explained by
//! `ftctl events` or `ftctl status`. Counters begin at zero with each start of ftd, as Prometheus expects of them;
//! events that came too fast to be counted are counted themselves.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::event::{Event, ExitStatus, Kind};

pub mod gauges;
#[cfg(test)]
mod tests;
pub mod text;

use gauges::Now;
use text::{Histogram, Labels, Text, Type};

/// Counters: name, and what it says of itself. In the order in which they are shown.
const COUNTERS: [(&str, &str); 31] = [
    (DEATHS, "Processes of a unit that ended, or crashed elsewhere (no unit), by how."),
    (OOM_KILLS, "Processes that the OOM killer chose."),
    (OUTAGES, "Outages of a unit, by cause."),
    (HEAL_FAILURES, "Attempts that did not bring a unit back."),
    (GIVEN_UP, "Times that ftd gave a unit up."),
    (LEFT, "Outages that were left as they were, on purpose."),
    (HELD, "Times that a unit was taken out of ftd's hands."),
    (HEALTH_FAILURES, "Times that a health check failed as often as it takes."),
    (HEALTH_NOT_ASKED, "Times that ftd lacked something of its own to ask for health."),
    (FILES_CHANGED, "Changes of watched files, by the first unit of their workload."),
    (FILES_BAD, "Changes of watched files that must not stay."),
    (FILES_PUT_BACK, "Times that the last good files were put back."),
    (FILES_GOOD, "Times that changed files became good."),
    (FILES_TROUBLE, "Things that could not be done about files."),
    (SNAPSHOTS, "Snapshots that were taken, by kind."),
    (SNAPSHOT_BYTES, "Bytes of all that was in them."),
    (SNAPSHOT_NEW_BYTES, "Bytes of that which the store did not have."),
    (SNAPSHOT_STORED_BYTES, "Bytes that were written for it."),
    (SNAPSHOTS_SKIPPED, "Snapshots that were due when the one before was not done."),
    (SNAPSHOTS_FAILED, "Snapshots that were due and could not be taken."),
    (RESTORES, "Times that a workload was made what it was in a snapshot."),
    (FAULTS_INJECTED, "Faults that were injected on purpose."),
    (FAULTS_UNDONE, "Faults that were undone."),
    (FAULT_TROUBLE, "Faults that could not be injected or undone."),
    (UNIT_PROBLEMS, "Times that a unit could not be cared for as it is."),
    (DROPPED, "Events that were lost, by place."),
    (JOURNAL_LOST, "Events that did not get into the journal on disk."),
    (JOURNAL_BLOCKED, "Times that the journal could not be written any more."),
    (STATE_UNSAVED, "Times that holds and attempts could not be saved any more."),
    (BUS_LOST, "Times that systemd could not be reached any more."),
    (UNCOUNTED, "Events that came too fast to be counted here."),
];

const DEATHS: &str = "ftd_process_deaths_total";
const OOM_KILLS: &str = "ftd_oom_kills_total";
const OUTAGES: &str = "ftd_outages_total";
const HEAL_FAILURES: &str = "ftd_heal_failures_total";
const GIVEN_UP: &str = "ftd_given_up_total";
const LEFT: &str = "ftd_outages_left_total";
const HELD: &str = "ftd_holds_total";
const HEALTH_FAILURES: &str = "ftd_health_failures_total";
const HEALTH_NOT_ASKED: &str = "ftd_health_not_asked_total";
const FILES_CHANGED: &str = "ftd_files_changed_total";
const FILES_BAD: &str = "ftd_files_bad_total";
const FILES_PUT_BACK: &str = "ftd_files_put_back_total";
const FILES_GOOD: &str = "ftd_files_good_total";
const FILES_TROUBLE: &str = "ftd_files_trouble_total";
const SNAPSHOTS: &str = "ftd_snapshots_total";
const SNAPSHOT_BYTES: &str = "ftd_snapshot_bytes_total";
const SNAPSHOT_NEW_BYTES: &str = "ftd_snapshot_new_bytes_total";
const SNAPSHOT_STORED_BYTES: &str = "ftd_snapshot_stored_bytes_total";
const SNAPSHOTS_SKIPPED: &str = "ftd_snapshots_skipped_total";
const SNAPSHOTS_FAILED: &str = "ftd_snapshots_failed_total";
const RESTORES: &str = "ftd_restores_total";
const FAULTS_INJECTED: &str = "ftd_faults_injected_total";
const FAULTS_UNDONE: &str = "ftd_faults_undone_total";
const FAULT_TROUBLE: &str = "ftd_fault_trouble_total";
const UNIT_PROBLEMS: &str = "ftd_unit_problems_total";
const DROPPED: &str = "ftd_events_dropped_total";
const JOURNAL_LOST: &str = "ftd_journal_lost_total";
const JOURNAL_BLOCKED: &str = "ftd_journal_blocked_total";
const STATE_UNSAVED: &str = "ftd_state_unsaved_total";
const BUS_LOST: &str = "ftd_systemd_lost_total";
const UNCOUNTED: &str = "ftd_events_uncounted_total";

/// Histograms: name, upper ends of the buckets, and what it says of itself.
const HISTOGRAMS: [(&str, &[f64], &str); 4] = [
    (
        HEAL,
        &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0],
        "From the cause of an outage to its end, by who ended it.",
    ),
    (
        DECISION,
        &[1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 0.1, 1.0, 10.0],
        "From the cause of an outage to the first decision, by what was decided.",
    ),
    (
        FROZEN,
        &[1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
        "How long processes stood still for a snapshot of them.",
    ),
    (
        DURATION,
        &[1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0],
        "From the beginning of a snapshot until it was durable.",
    ),
];

const FROZEN: &str = "ftd_snapshot_frozen_seconds";
const DURATION: &str = "ftd_snapshot_duration_seconds";
const HEAL: &str = "ftd_heal_seconds";
const DECISION: &str = "ftd_decision_seconds";

/// All that is counted.
#[derive(Debug)]
pub struct Metrics {
    node: String,
    counted: Mutex<Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    counters: BTreeMap<(&'static str, Labels), u64>,
    histograms: BTreeMap<(&'static str, Labels), Histogram>,
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new(node: String) -> Arc<Self> {
        Arc::new(Self { node, counted: Mutex::default() })
    }

    /// Counts what comes, until the stream ends.
    pub async fn run(self: Arc<Self>, mut events: Receiver<Arc<Event>>) {
        loop {
            match events.recv().await {
                Ok(event) => self.counted().take(&event),
                Err(RecvError::Lagged(missed)) => self.counted().add(UNCOUNTED, Vec::new(), missed),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// All numbers, for Prometheus.
    pub fn text(&self, now: &Now<'_>) -> String {
        let mut text = Text::new(vec![("node", self.node.clone())]);
        now.write(&mut text);
        self.counted().write(&mut text);
        text.finish()
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    fn take(&mut self, event: &Event) {
        let unit: Labels = event.unit.iter().map(|unit| ("unit", unit.clone())).collect();
        let with = |label: &'static str, value: String| [unit.clone(), vec![(label, value)]].concat();
        match &event.kind {
            Kind::ProcessDied { status, oom, .. } => self.count(DEATHS, with("how", how(*status, *oom))),
            Kind::OomKill { .. } => self.count(OOM_KILLS, unit),
            Kind::Down { cause, .. } => self.count(OUTAGES, with("cause", word(cause))),
            // A later one is of a later attempt, and its time that of the attempts before.
            Kind::Decided { action, attempt: 0 | 1, after_us, .. } => {
                self.observe(DECISION, with("action", word(action)), *after_us as f64 / 1e6);
            }
            Kind::Healed { by, took_ms, .. } => {
                self.observe(HEAL, with("by", word(by)), *took_ms as f64 / 1e3);
            }
            Kind::HealFailed { .. } => self.count(HEAL_FAILURES, unit),
            Kind::Failed { .. } => self.count(GIVEN_UP, unit),
            Kind::Left { .. } => self.count(LEFT, unit),
            Kind::Held { .. } => self.count(HELD, unit),
            Kind::HealthFailed { .. } => self.count(HEALTH_FAILURES, unit),
            Kind::HealthNotAsked { .. } => self.count(HEALTH_NOT_ASKED, unit),
            Kind::FilesChanged { .. } => self.count(FILES_CHANGED, unit),
            Kind::FilesBad { .. } => self.count(FILES_BAD, unit),
            Kind::FilesPutBack { .. } => self.count(FILES_PUT_BACK, unit),
            Kind::FilesGood { .. } => self.count(FILES_GOOD, unit),
            Kind::FilesTrouble { .. } => self.count(FILES_TROUBLE, unit),
            Kind::SnapshotTaken {
                workload,
                kind,
                frozen_us,
                took_ms,
                bytes,
                new_bytes,
                stored_bytes,
                ..
            } => {
                let labels = vec![("workload", workload.clone()), ("kind", kind.clone())];
                self.count(SNAPSHOTS, labels.clone());
                self.add(SNAPSHOT_BYTES, labels.clone(), *bytes);
                self.add(SNAPSHOT_NEW_BYTES, labels.clone(), *new_bytes);
                self.add(SNAPSHOT_STORED_BYTES, labels.clone(), *stored_bytes);
                self.observe(DURATION, labels.clone(), *took_ms as f64 / 1e3);
                // Files are captured while the service runs.
                if kind == "process" {
                    self.observe(FROZEN, vec![("workload", workload.clone())], *frozen_us as f64 / 1e6);
                }
            }
            Kind::SnapshotSkipped { workload, count, .. } => {
                self.add(SNAPSHOTS_SKIPPED, vec![("workload", workload.clone())], *count);
            }
            Kind::SnapshotFailed { workload, .. } => {
                self.count(SNAPSHOTS_FAILED, vec![("workload", workload.clone())]);
            }
            Kind::Restored { workload, .. } => self.count(RESTORES, vec![("workload", workload.clone())]),
            Kind::FaultInjected { fault, .. } => self.count(FAULTS_INJECTED, with("fault", fault.clone())),
            Kind::FaultUndone { .. } => self.count(FAULTS_UNDONE, unit),
            Kind::FaultTrouble { .. } => self.count(FAULT_TROUBLE, unit),
            Kind::UnitProblem { .. } => self.count(UNIT_PROBLEMS, unit),
            Kind::EventsDropped { place, count } => {
                self.add(DROPPED, vec![("place", place.clone())], *count);
            }
            Kind::JournalBack { lost, .. } => self.add(JOURNAL_LOST, Vec::new(), *lost),
            Kind::JournalBlocked { .. } => self.count(JOURNAL_BLOCKED, Vec::new()),
            Kind::StateUnsaved { .. } => self.count(STATE_UNSAVED, Vec::new()),
            Kind::BusLost { .. } => self.count(BUS_LOST, Vec::new()),
            // How things stand is asked when it is wanted.
            _ => {}
        }
    }

    fn count(&mut self, name: &'static str, labels: Labels) {
        self.add(name, labels, 1);
    }

    fn add(&mut self, name: &'static str, labels: Labels, by: u64) {
        *self.counters.entry((name, labels)).or_default() += by;
    }

    fn observe(&mut self, name: &'static str, labels: Labels, value: f64) {
        let bounds = || HISTOGRAMS.iter().find(|one| one.0 == name).map_or(&[][..], |one| one.1);
        self.histograms.entry((name, labels)).or_insert_with(|| Histogram::new(bounds())).observe(value);
    }

    fn write(&self, text: &mut Text) {
        for (name, help) in COUNTERS {
            text.family(name, Type::Counter, help);
            for ((_, labels), value) in self.counters.iter().filter(|((of, _), _)| *of == name) {
                text.sample(name, &borrowed(labels), value);
            }
        }
        for (name, _, help) in HISTOGRAMS {
            text.family(name, Type::Histogram, help);
            for ((_, labels), histogram) in self.histograms.iter().filter(|((of, _), _)| *of == name) {
                text.histogram(name, &borrowed(labels), histogram);
            }
        }
    }
}

fn borrowed(labels: &Labels) -> Vec<(&str, &str)> {
    labels.iter().map(|(label, value)| (*label, value.as_str())).collect()
}

/// An enum's name, as it stands in events.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        // Of none that is passed here.
        _ => String::new(),
    }
}

fn how(status: Option<ExitStatus>, oom: bool) -> String {
    match status {
        _ if oom => "oom".to_owned(),
        Some(ExitStatus::Code(0)) => "success".to_owned(),
        Some(ExitStatus::Code(_)) => "exit_code".to_owned(),
        Some(ExitStatus::Signal { core: true, .. }) => "core_dump".to_owned(),
        Some(ExitStatus::Signal { .. }) => "signal".to_owned(),
        None => "unknown".to_owned(),
    }
}
