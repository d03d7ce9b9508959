//! Events in, lines out.

use super::*;
use crate::{
    event::{Cause, Decision, Healer, Process},
    heal::supervisor::UnitStatus,
    snapshot::schedule::SnapshotStatus,
};

const NOBODY: Now<'_> = Now {
    version: "1.2.3",
    started: jiff::Timestamp::UNIX_EPOCH,
    well: true,
    systemd: true,
    journal: false,
    source: "ebpf",
    delivered: 7,
    drops: &[],
    units: &[],
    snapshots: &[],
    time: jiff::Timestamp::UNIX_EPOCH,
    faults: &[],
    peers: &[],
    replicas: &[],
};

fn text_of(events: &[(Option<&str>, Kind)], now: &Now<'_>) -> String {
    let metrics = Metrics::new("vm1".into());
    for (unit, kind) in events {
        metrics.counted().take(&Event {
            seq: 1,
            time: jiff::Timestamp::UNIX_EPOCH,
            node: "vm1".into(),
            unit: unit.map(str::to_owned),
            op: None,
            kind: kind.clone(),
        });
    }
    metrics.text(now)
}

#[track_caller]
fn assert_line(text: &str, line: &str) {
    assert!(text.lines().any(|one| one == line), "{line} is not in:\n{text}");
}

fn died(signal: i32) -> Kind {
    Kind::ProcessDied {
        process: Process::default(),
        ppid: 1,
        main: true,
        status: Some(ExitStatus::Signal { signal, core: false }),
        sender: None,
        oom: false,
        run_ms: 0,
        max_rss: 0,
    }
}

#[test]
fn an_outage_moves_its_numbers() {
    let decided = |attempt, after_us| Kind::Decided {
        action: Decision::Start,
        why: String::new(),
        attempt,
        delay_ms: 0,
        after_us,
    };
    let unit = Some("a.service");
    let text = text_of(
        &[
            (unit, died(9)),
            (None, died(11)),
            (unit, Kind::Down { cause: Cause::OomKilled, detail: String::new() }),
            (unit, decided(1, 40)),
            (unit, decided(2, 900_000)),
            (unit, Kind::HealFailed { attempt: 1, error: String::new() }),
            (unit, Kind::Healed { by: Healer::Ftd, took_ms: 80, main_pid: 3 }),
        ],
        &NOBODY,
    );
    for line in [
        "# TYPE ftd_outages_total counter",
        "ftd_process_deaths_total{node=\"vm1\",unit=\"a.service\",how=\"signal\"} 1",
        "ftd_process_deaths_total{node=\"vm1\",how=\"signal\"} 1",
        "ftd_outages_total{node=\"vm1\",unit=\"a.service\",cause=\"oom_killed\"} 1",
        "ftd_heal_failures_total{node=\"vm1\",unit=\"a.service\"} 1",
        "ftd_heal_seconds_bucket{node=\"vm1\",unit=\"a.service\",by=\"ftd\",le=\"0.05\"} 0",
        "ftd_heal_seconds_bucket{node=\"vm1\",unit=\"a.service\",by=\"ftd\",le=\"0.1\"} 1",
        "ftd_heal_seconds_sum{node=\"vm1\",unit=\"a.service\",by=\"ftd\"} 0.08",
        // A later attempt is not the decision's latency.
        "ftd_decision_seconds_count{node=\"vm1\",unit=\"a.service\",action=\"start\"} 1",
        "ftd_decision_seconds_bucket{node=\"vm1\",unit=\"a.service\",action=\"start\",le=\"0.00005\"} 1",
    ] {
        assert_line(&text, line);
    }
}

#[test]
fn how_things_stand_is_the_status() {
    let unit: UnitStatus = serde_json::from_value(serde_json::json!({
        "unit": "a.service", "workload": "w", "phase": "up", "phase_s": 3, "active_state": "active",
        "sub_state": "running", "load_state": "loaded", "main_pid": 7, "attempts": 2, "attempts_max": 5,
        "outages": 0, "deaths": 0, "forks": 9, "outage": "hung",
    }))
    .unwrap();
    let drops = [("ring buffer full".to_owned(), 4)];
    let text = text_of(&[], &Now { units: &[unit], drops: &drops, ..NOBODY });
    for line in [
        "ftd_build_info{node=\"vm1\",version=\"1.2.3\"} 1",
        "ftd_journal_up{node=\"vm1\"} 0",
        "ftd_probe_delivered_total{node=\"vm1\"} 7",
        "ftd_probe_dropped_total{node=\"vm1\",cause=\"ring buffer full\"} 4",
        "ftd_unit_serving{node=\"vm1\",unit=\"a.service\",workload=\"w\"} 0",
        "ftd_unit_attempts{node=\"vm1\",unit=\"a.service\",workload=\"w\"} 2",
        "ftd_unit_phase{node=\"vm1\",unit=\"a.service\",workload=\"w\",phase=\"up\"} 1",
        "ftd_unit_phase{node=\"vm1\",unit=\"a.service\",workload=\"w\",phase=\"failed\"} 0",
        "ftd_faults_active{node=\"vm1\",unit=\"a.service\",workload=\"w\"} 0",
    ] {
        assert_line(&text, line);
    }
    // It has no health check.
    assert!(!text.contains("ftd_unit_health_proven{"), "{text}");
}

#[test]
fn snapshots_have_ages_sizes_and_times() {
    let taken = |kind: &str, frozen_us, new_bytes| {
        let (workload, generation, kind) = ("w".to_owned(), 1, kind.to_owned());
        let (took_ms, bytes, stored_bytes) = (300, 4096, 100);
        Kind::SnapshotTaken { workload, generation, kind, frozen_us, took_ms, bytes, new_bytes, stored_bytes }
    };
    let skipped = Kind::SnapshotSkipped { workload: "w".into(), count: 3, why: String::new() };
    let status: SnapshotStatus = serde_json::from_value(serde_json::json!({
        "workload": "w", "every_ms": 5000, "running": false, "taken": 2, "skipped": 3, "failed": 0,
        "newest": {
            "generation": 2, "kind": "process", "time": "1970-01-01T00:00:10Z", "frozen_us": 20_000, "took_ms": 300,
            "bytes": 4096, "new_bytes": 7, "stored_bytes": 100,
        },
    }))
    .unwrap();
    let now = Now { snapshots: &[status], time: jiff::Timestamp::from_second(12).unwrap(), ..NOBODY };
    let events = [
        (None, taken("process", 20_000, 4096)),
        (None, taken("process", 30_000, 7)),
        (None, taken("files", 0, 1)),
        (None, skipped),
    ];
    let text = text_of(&events, &now);
    for line in [
        "ftd_snapshots_total{node=\"vm1\",workload=\"w\",kind=\"process\"} 2",
        "ftd_snapshot_new_bytes_total{node=\"vm1\",workload=\"w\",kind=\"process\"} 4103",
        "ftd_snapshot_frozen_seconds_sum{node=\"vm1\",workload=\"w\"} 0.05",
        "ftd_snapshot_frozen_seconds_count{node=\"vm1\",workload=\"w\"} 2",
        "ftd_snapshots_skipped_total{node=\"vm1\",workload=\"w\"} 3",
        "ftd_snapshot_newest_age_seconds{node=\"vm1\",workload=\"w\"} 2",
        "ftd_snapshot_newest_new_bytes{node=\"vm1\",workload=\"w\"} 7",
        "ftd_snapshot_interval_seconds{node=\"vm1\",workload=\"w\"} 5",
    ] {
        assert_line(&text, line);
    }
    // There is no good one, and so it has no age.
    assert!(!text.contains("ftd_snapshot_good_age_seconds{"), "{text}");
}

#[tokio::test]
async fn what_comes_too_fast_is_counted_as_such() {
    let (sender, events) = tokio::sync::broadcast::channel(2);
    for seq in 0..5 {
        let (time, node) = (jiff::Timestamp::UNIX_EPOCH, "vm1".to_owned());
        let kind = Kind::StateUnsaved { cause: String::new() };
        sender.send(Arc::new(Event { seq, time, node, unit: None, op: None, kind })).unwrap();
    }
    drop(sender);
    let metrics = Metrics::new("vm1".into());
    Arc::clone(&metrics).run(events).await;
    let text = metrics.text(&NOBODY);
    assert_line(&text, "ftd_events_uncounted_total{node=\"vm1\"} 3");
    assert_line(&text, "ftd_state_unsaved_total{node=\"vm1\"} 2");
}
