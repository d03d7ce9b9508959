//! What people see.

use std::io::{IsTerminal as _, Write as _};

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::client::Failure;
use crate::{
    control::{
        SnapshotStatus, Status,
        doctor::{Finding, Grade},
    },
    event::{Decision, Event, Healer, Kind, Process},
    heal::{machine::Phase, supervisor::UnitStatus},
    inject::Record,
    replicate::ReplicaStatus,
    snapshot::criu::check::{Report, Severity},
};

#[derive(Clone, Copy)]
enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
    Grey = 90,
}

/// Colours only for a terminal, and not where NO_COLOR is set (see no-color.org).
fn paint(text: &str, colour: Colour) -> String {
    let wanted = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    if wanted { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
}

/// As what is well is shown.
pub(super) fn good(text: &str) -> String {
    paint(text, Colour::Green)
}

/// As what is not.
pub(super) fn bad(text: &str) -> String {
    paint(text, Colour::Red)
}

/// A line on standard output. A reader who has left (`ftctl events | head`) ends the program; a full disk
/// behind it is an error.
pub(super) fn line(text: &str) {
    let Err(error) = writeln!(std::io::stdout(), "{text}") else { return };
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    eprintln!("ftctl: standard output: {error}\n  mend: make room where it goes, or send it elsewhere");
    std::process::exit(1);
}

/// `text` without what a terminal would obey: names of programs and what services say come from anybody.
pub(super) fn plain(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut plain, c| {
        if c.is_control() {
            plain.extend(c.escape_default());
        } else {
            plain.push(c);
        }
        plain
    })
}

/// The same for every text in `value`.
pub(super) fn all_plain<T: Serialize + DeserializeOwned>(value: &T) -> Result<T, Failure> {
    fn walk(value: &mut Value) {
        match value {
            Value::String(text) => *text = plain(text),
            Value::Array(all) => all.iter_mut().for_each(walk),
            Value::Object(all) => all.values_mut().for_each(walk),
            _ => {}
        }
    }
    let strange = |error: serde_json::Error| Failure::Local(error.to_string());
    let mut value = serde_json::to_value(value).map_err(strange)?;
    walk(&mut value);
    serde_json::from_value(value).map_err(strange)
}

pub(super) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::Local(error.to_string()))?;
    line(&text);
    Ok(())
}

pub(super) fn config(value: &Value) -> Result<(), Failure> {
    // What is not set is null in JSON, and absent in TOML.
    fn without_null(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), without_null(v))).collect()
            }
            Value::Array(all) => all.iter().map(without_null).collect(),
            other => other.clone(),
        }
    }
    let text =
        toml::to_string_pretty(&without_null(value)).map_err(|error| Failure::Local(error.to_string()))?;
    line(text.trim_end());
    Ok(())
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().map(|h| paint(h, Colour::Grey)));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

pub(super) fn time(at: jiff::Timestamp) -> String {
    at.to_zoned_datetime(jiff::tz::TimeZone::system()).strftime("%m-%d %H:%M:%S%.3f").to_string()
}

fn seconds(s: u64) -> String {
    humantime::format_duration(std::time::Duration::from_secs(s)).to_string()
}

fn took(ms: u64) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { seconds(ms / 1000) }
}

fn micros(us: u64) -> String {
    if us < 1000 { format!("{us} us") } else { format!("{:.1} ms", us as f64 / 1000.0) }
}

pub(super) fn status(status: &Status) -> Result<(), Failure> {
    let status = &all_plain(status)?;
    let probe = match &status.probe.cause {
        None => format!("eBPF, reader {}", status.probe.realtime),
        Some(cause) => paint(&format!("{} (no eBPF: {cause})", status.probe.source), Colour::Yellow),
    };
    let systemd =
        if status.systemd { "connected".to_owned() } else { paint("cannot be reached", Colour::Red) };
    line(&format!(
        "{}  ftd {} (pid {}) since {}\nprobe: {probe}; systemd: {systemd}\n",
        status.node,
        status.version,
        status.pid,
        time(status.started)
    ));
    let mut rows = table(&["UNIT", "STATE", "SINCE", "MAIN", "HEALTH", "STARTS", "OUTAGES", "LAST OUTAGE"]);
    for unit in &status.units {
        rows.add_row(row(unit));
    }
    if status.units.is_empty() {
        line("nothing is under care: add a [[workload]] to /etc/ftd/ftd.toml, see ftd.toml(5)");
    } else {
        line(&rows.trim_fmt());
    }
    if !status.snapshots.is_empty() {
        line("");
        line(&snapshots(&status.snapshots).trim_fmt());
    }
    if !status.faults.is_empty() {
        line("");
        faults(&status.faults)?;
    }
    if !status.replicas.is_empty() {
        line("");
        replicas(&status.replicas);
    }
    if let Some(cause) = &status.journal {
        line(&paint(&format!("the journal cannot be written: {cause}"), Colour::Red));
    }
    for (unit, why) in &status.probe.unwatched {
        line(&paint(&format!("not watched by the kernel: {unit}: {why}"), Colour::Yellow));
    }
    for (place, count) in status.probe.drops.iter().filter(|(_, count)| *count > 0) {
        line(&paint(&format!("lost: {count} events ({place})"), Colour::Yellow));
    }
    Ok(())
}

fn snapshots(all: &[SnapshotStatus]) -> Table {
    let header =
        ["WORKLOAD", "SNAPSHOT", "KIND", "TAKEN", "FROZEN", "TOOK", "BYTES", "NEW", "LAST GOOD", "STATE"];
    let mut rows = table(&header);
    let ago = |time: jiff::Timestamp| {
        let age = jiff::Timestamp::now().duration_since(time).as_secs();
        format!("{} ago", seconds(u64::try_from(age).unwrap_or(0)))
    };
    for status in all {
        let state = match (&status.failure, &status.waits, status.every_ms) {
            (Some(cause), ..) => paint(&format!("failing: {cause}"), Colour::Red),
            (None, Some(why), _) => paint(&format!("waits: {why}"), Colour::Yellow),
            (None, None, Some(_)) if status.running => "being taken".to_owned(),
            (None, None, Some(every)) => format!("every {}", took(every)),
            (None, None, None) => String::new(),
        };
        let good = status.good.as_ref();
        let good = good.map_or_else(|| "-".into(), |good| format!("{}, {}", good.generation, ago(good.time)));
        let row = match &status.newest {
            Some(newest) => [
                newest.generation.to_string(),
                newest.kind.clone(),
                ago(newest.time),
                if newest.frozen_us > 0 { micros(newest.frozen_us) } else { "-".into() },
                took(newest.took_ms),
                ByteSize::b(newest.bytes).to_string(),
                ByteSize::b(newest.new_bytes).to_string(),
            ],
            None => ["-"; 7].map(str::to_owned),
        };
        rows.add_row([status.workload.clone()].into_iter().chain(row).chain([good, state]));
    }
    rows
}

fn row(unit: &UnitStatus) -> [String; 8] {
    let phase = format!("{:?}", unit.phase).to_lowercase();
    let state = match (unit.phase, &unit.outage) {
        _ if unit.load_state != "loaded" && !unit.load_state.is_empty() => {
            paint(&unit.load_state, Colour::Red)
        }
        (Phase::Up, None) => paint("up", Colour::Green),
        (Phase::Up, Some(cause)) => paint(&format!("up, {cause:?} not over"), Colour::Yellow),
        (Phase::Failed, _) => paint("failed", Colour::Red),
        (Phase::Left, _) => paint("stopped", Colour::Grey),
        (_, Some(cause)) => paint(&format!("{phase} ({cause:?})"), Colour::Yellow),
        (_, None) => paint(&format!("{phase} ({})", unit.active_state), Colour::Yellow),
    };
    let state = match &unit.held {
        Some(held) => {
            let until = held.until.map(|until| format!(" until {}", time(until))).unwrap_or_default();
            format!("{state}, {}", paint(&format!("held{until}"), Colour::Yellow))
        }
        None => state,
    };
    let health = match &unit.health {
        None => "-".to_owned(),
        Some(health) if health.failures > 0 => paint(&format!("{} failed", health.failures), Colour::Red),
        Some(health) if !health.proven => paint("never yet", Colour::Yellow),
        Some(_) => paint("ok", Colour::Green),
    };
    let last = match &unit.last {
        None => "-".to_owned(),
        Some(last) => {
            let cause = format!("{:?}", last.cause);
            format!("{cause}, {} at {}", took(last.took_ms), time(last.healed))
        }
    };
    let name = match &unit.alias {
        Some(alias) => format!("{} ({alias})", unit.unit),
        None => unit.unit.clone(),
    };
    [
        name,
        state,
        seconds(unit.phase_s),
        if unit.main_pid == 0 { "-".into() } else { unit.main_pid.to_string() },
        health,
        format!("{}/{}", unit.attempts, unit.attempts_max),
        unit.outages.to_string(),
        last,
    ]
}

fn replicas(replicas: &[ReplicaStatus]) {
    let now = jiff::Timestamp::now();
    let mut rows = table(&["SNAPSHOTS OF", "ON", "NEWEST", "THERE", "BEHIND", ""]);
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    for replica in replicas {
        let lag = replica.lag(now).as_millis().try_into().unwrap_or(u64::MAX);
        let behind = match replica.behind_since {
            None => paint("no", Colour::Green),
            Some(_) => paint(&took(lag), Colour::Yellow),
        };
        let what = match (&replica.sending, &replica.problem) {
            (Some(sending), _) => {
                let bytes = |bytes: u64| ByteSize(bytes).to_string();
                format!("sending {}: {} of {}", sending.generation, bytes(sending.done), bytes(sending.total))
            }
            (None, Some((cause, _))) if replica.behind_since.is_some() => cause.clone(),
            _ => String::new(),
        };
        rows.add_row([
            replica.workload.clone(),
            replica.peer.clone(),
            number(replica.newest),
            number(replica.there),
            behind,
            what,
        ]);
    }
    line(&rows.trim_fmt());
}

pub(super) fn faults(faults: &Vec<Record>) -> Result<(), Failure> {
    if faults.is_empty() {
        line("no fault is under way");
        return Ok(());
    }
    let faults = all_plain(faults)?;
    let mut rows = table(&["FAULT", "UNIT", "WHAT", "BEGAN", "ENDS"]);
    for fault in &faults {
        let ends = fault.ends.map_or("-".into(), time);
        rows.add_row([&fault.id, &fault.unit, &fault.detail, &time(fault.begun), &ends]);
    }
    line(&rows.trim_fmt());
    Ok(())
}

pub(super) fn findings(findings: &Vec<Finding>) -> Result<(), Failure> {
    for finding in all_plain(findings)? {
        let grade = match finding.grade {
            Grade::Ok => paint("ok  ", Colour::Green),
            Grade::Warn => paint("warn", Colour::Yellow),
            Grade::Fail => paint("FAIL", Colour::Red),
        };
        line(&format!("{grade}  {}: {}", finding.thing, finding.found));
        if !finding.mend.is_empty() {
            line(&format!("      mend: {}", finding.mend));
        }
    }
    Ok(())
}

pub(super) fn report(report: &Report) -> Result<(), Failure> {
    let report = all_plain(report)?;
    let processes = match report.processes {
        1 => "1 process".to_owned(),
        many => format!("{many} processes"),
    };
    let criu = report.criu.map_or_else(|| "no CRIU".into(), |criu| format!("CRIU {}", criu.version));
    line(&format!("{}: main process {}, {processes}, {criu}", report.unit, report.main_pid));
    if !report.findings.is_empty() {
        let mut rows = table(&["", "WHAT", "WHY, AND WHAT TO DO"]);
        for finding in &report.findings {
            let severity = match finding.severity {
                Severity::Blocker => paint("BLOCKER", Colour::Red),
                Severity::Warning => paint("warning", Colour::Yellow),
                Severity::Note => paint("note", Colour::Grey),
            };
            let mend =
                if finding.mend.is_empty() { String::new() } else { format!("\nmend: {}", finding.mend) };
            rows.add_row([&severity, &finding.thing, &format!("{}{mend}", finding.cause)]);
        }
        line("");
        line(&rows.trim_fmt());
        line("");
    }
    line(&if report.ready() {
        paint("ready: nothing that can be seen is in the way", Colour::Green)
    } else {
        paint("not ready: its files can be saved, its processes cannot", Colour::Red)
    });
    Ok(())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("?")
}

pub(super) fn held(answer: &Value) {
    let until = answer.get("until").and_then(Value::as_str).and_then(|t| t.parse().ok());
    let until = until.map_or_else(|| format!("it is released: ftctl release {}", text(answer, "unit")), time);
    line(&format!("{} is held until {until}", text(answer, "unit")));
}

pub(super) fn released(answer: &Value) {
    line(&format!("{} is in ftd's hands", text(answer, "unit")));
}

pub(super) fn recovered(answer: &Value) {
    line(&format!("{} faults are being undone", answer.get("ended").unwrap_or(&Value::Null)));
}

pub(super) fn injected(record: &Record) {
    let until = record.ends.map(|ends| format!(", ends by {}", time(ends))).unwrap_or_default();
    line(&format!("{}: {}{until}  (fault {})", record.unit, record.detail, record.id));
    line("see: ftctl events --follow");
}

pub(super) fn event(event: &Event) {
    // What was read as an event is one still.
    let Ok(event) = all_plain(event) else { return };
    let op = event.op.map(|op| op.to_string()).unwrap_or_default();
    let unit = event.unit.as_deref().unwrap_or("-");
    let (what, colour) = describe(&event.kind);
    let what = colour.map_or_else(|| what.clone(), |colour| paint(&what, colour));
    line(&format!("{}  {op:>7}  {unit:<20}  {what}", time(event.time)));
}

fn who(process: &Process) -> String {
    format!("{} (pid {}, uid {})", process.comm, process.pid, process.uid)
}

fn healer(by: Healer) -> &'static str {
    match by {
        Healer::Ftd => "ftd",
        Healer::Systemd => "systemd",
        Healer::Other => "somebody else",
    }
}

/// The mend below the event; events of an older ftd have none.
fn mend_line(mend: &str) -> String {
    if mend.is_empty() { String::new() } else { format!("\n      mend: {mend}") }
}

/// An event in one line, and the colour of its mood.
fn describe(kind: &Kind) -> (String, Option<Colour>) {
    use Colour::{Green, Grey, Red, Yellow};
    match kind {
        Kind::AgentStarted { version, pid, resumed } => {
            let resumed = if *resumed { ", taking up where the last one was" } else { "" };
            (format!("ftd {version} started (pid {pid}){resumed}"), None)
        }
        Kind::AgentReady { took_ms, undecided } => {
            let but = if undecided.is_empty() {
                String::new()
            } else {
                format!(", though systemd has not said yet what is with {}", undecided.join(", "))
            };
            (format!("ready after {}{but}", took(*took_ms)), (!undecided.is_empty()).then_some(Yellow))
        }
        Kind::AgentStopped {} => ("ftd stopped".into(), None),
        Kind::ProbeReady { source, realtime, missing } => {
            let missing: String = missing.iter().map(|m| format!("\n      missing: {m}")).collect();
            (format!("watching through {source}, reader {realtime}{missing}"), None)
        }
        Kind::ProbeUnavailable { cause } => (format!("no eBPF: {cause}"), Some(Yellow)),
        Kind::EventsDropped { place, count } => (format!("{count} events lost ({place})"), Some(Yellow)),
        Kind::BusLost { cause, mend } => {
            (format!("systemd cannot be reached: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::BusBack { away_ms } => (format!("systemd answers again after {}", took(*away_ms)), Some(Green)),
        Kind::JournalBlocked { cause, mend } => {
            (format!("the journal cannot be written: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::JournalBack { late, lost } => {
            (format!("the journal is written again: {late} late, {lost} lost"), Some(Green))
        }
        Kind::JournalRepaired { file, bytes } => {
            (format!("{file}: damaged, {bytes} bytes cut"), Some(Yellow))
        }
        Kind::StateUnsaved { cause } => {
            let mend = "make room, or mend the disk; until then a restart of ftd forgets holds";
            (format!("holds and attempts cannot be saved: {cause}\n      mend: {mend}"), Some(Red))
        }
        Kind::StateSaved {} => ("holds and attempts are saved again".into(), Some(Green)),
        Kind::StateDamaged { file, cause, mend } => {
            (format!("{file}: damaged: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::StatusBlocked { address, cause, mend } => {
            (format!("no status on {address}: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::StatusBack { address } => (format!("status is on {address}"), Some(Green)),
        Kind::UnitProblem { problem, mend } => (format!("{problem}\n      mend: {mend}"), Some(Red)),
        Kind::UnitFound { alias: Some(alias) } => (format!("found: systemd's name for {alias}"), None),
        Kind::UnitFound { alias: None } => ("found".into(), Some(Green)),
        Kind::UnitWatch { error: Some(error) } => {
            (format!("not watched by the kernel: {error}"), Some(Yellow))
        }
        Kind::UnitWatch { error: None } => ("watched by the kernel again".into(), Some(Green)),
        Kind::ProcessDied { process, main, status, sender, oom, max_rss, .. } => {
            let how = status.map_or("ended".into(), |status| format!("ended with {status}"));
            let by = sender.as_ref().map(|s| format!(", sent by {}", who(s))).unwrap_or_default();
            let oom = if *oom { ", chosen by the OOM killer" } else { "" };
            let main = if *main { "main process " } else { "" };
            let rss = if *max_rss > 0 { format!(", {} MiB at most", max_rss >> 20) } else { String::new() };
            (format!("{main}{} {how}{by}{oom}{rss}", who(process)), Some(Grey))
        }
        Kind::OomKill { process, limit, rss, .. } => {
            let limit = limit.map(|limit| format!(", limit {} MiB", limit >> 20)).unwrap_or_default();
            (format!("OOM killer chose {} ({} MiB{limit})", who(process), rss >> 20), Some(Red))
        }
        Kind::Down { cause, detail } => (format!("DOWN {cause:?}: {detail}"), Some(Red)),
        Kind::Decided { action, why, attempt, delay_ms, after_us } => {
            let action = match action {
                Decision::Start | Decision::Restart if *delay_ms > 0 => {
                    format!("{action:?} in {} (attempt {attempt})", took(*delay_ms))
                }
                Decision::Start | Decision::Restart => format!("{action:?} (attempt {attempt})"),
                other => format!("{other:?}"),
            };
            (format!("decided after {after_us} us: {action}: {why}"), None)
        }
        Kind::Healed { by, took_ms, main_pid } => {
            let by = healer(*by);
            (format!("HEALED by {by} in {} (pid {main_pid})", took(*took_ms)), Some(Green))
        }
        Kind::HealFailed { attempt, error } => (format!("attempt {attempt} failed: {error}"), Some(Red)),
        Kind::Failed { attempts, within_ms, mend } => {
            let text = format!("GIVEN UP after {attempts} attempts within {}", took(*within_ms));
            (format!("{text}\n      mend: {mend}"), Some(Red))
        }
        Kind::Left { why } => (format!("left down: {why}"), Some(Yellow)),
        Kind::Started { main_pid } => (format!("started by somebody (pid {main_pid})"), Some(Green)),
        Kind::RestartedUnseen { by, main_pid } => {
            let by = healer(*by);
            (format!("it ended unseen by ftd, and was started by {by} (pid {main_pid})"), Some(Yellow))
        }
        Kind::Held { until, reason } => {
            let until = until.map(|until| format!(" until {}", time(until))).unwrap_or_default();
            let reason = reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default();
            (format!("held{until}{reason}"), Some(Yellow))
        }
        Kind::Released { by } => (format!("released ({by})"), None),
        Kind::HealthFailed { check, error, failures, proven } => {
            let consequence = if *proven {
                ""
            } else {
                "\n      it has never succeeded, so nothing is restarted for it: check the address"
            };
            (format!("health check failed {failures} times: {check}: {error}{consequence}"), Some(Red))
        }
        Kind::HealthBack { check } => (format!("health check succeeds again: {check}"), Some(Green)),
        Kind::HealthNotAsked { check, error, mend } => {
            (format!("health cannot be asked for: {check}: {error}{}", mend_line(mend)), Some(Red))
        }
        Kind::FilesChanged { changes } => {
            let lines: String =
                changes.iter().map(|change| format!("\n      {}", plain(&change.to_string()))).collect();
            (format!("files changed:{lines}"), Some(Yellow))
        }
        Kind::FilesBad { why, generation } => {
            let then = generation.map_or_else(
                || "there is no good generation to put back".to_owned(),
                |number| format!("generation {number} is put back"),
            );
            (format!("the files must not stay like that: {}; {then}", plain(why)), Some(Red))
        }
        Kind::FilesPutBack { generation, files } => {
            (format!("{files} files are those of generation {generation} again"), Some(Green))
        }
        Kind::FilesGood { generation } => {
            (format!("generation {generation} of the files is good"), Some(Green))
        }
        Kind::FilesTrouble { what, error } => (format!("{what}: {}", plain(error)), Some(Red)),
        Kind::SnapshotTaken { generation, kind, frozen_us, took_ms, bytes, new_bytes, .. } => {
            let frozen =
                if *frozen_us > 0 { format!(", frozen for {}", micros(*frozen_us)) } else { String::new() };
            let (bytes, new) = (ByteSize::b(*bytes), ByteSize::b(*new_bytes));
            (
                format!("snapshot {generation} ({kind}) in {}{frozen}: {bytes}, {new} new", took(*took_ms)),
                None,
            )
        }
        Kind::SnapshotSkipped { count, why, .. } => {
            (format!("{count} snapshots skipped: {why}"), Some(Yellow))
        }
        Kind::SnapshotFailed { thing, cause, mend, again_ms, .. } => {
            let text = format!("no snapshot of {thing}: {cause}; tried again in {}", took(*again_ms));
            (format!("{text}{}", mend_line(mend)), Some(Red))
        }
        Kind::Restored { workload, generation, files, units, took_ms } => {
            let processes =
                if units.is_empty() { String::new() } else { format!(", processes of {}", units.join(", ")) };
            let took = took(*took_ms);
            (
                format!("RESTORED {workload} from snapshot {generation} in {took}: {files} files{processes}"),
                Some(Green),
            )
        }
        Kind::PeersReady { name, address, until } => {
            (format!("{name} is in the cluster, on {address}, certificate until {}", time(*until)), None)
        }
        Kind::PeersBlocked { cause, mend } => {
            (format!("peers cannot reach this node: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::PeerUp { peer, address, version } => {
            (format!("peer {peer} is UP at {address} (ftd {version})"), Some(Green))
        }
        Kind::PeerPath { peer, address, cause } => {
            (format!("peer {peer} is reached at {address} now: {cause}"), Some(Yellow))
        }
        Kind::PeerDown { peer, cause, mend, .. } => {
            (format!("peer {peer} is DOWN: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::PeerRefused { from, cause, mend, times } => {
            let times = if *times > 1 { format!(" ({times} times)") } else { String::new() };
            (format!("refused: {from}: {cause}{times}{}", mend_line(mend)), Some(Yellow))
        }
        Kind::PeerJoined { peer, address } => {
            (format!("{peer} has joined the cluster, from {address}"), Some(Green))
        }
        Kind::PeerRevoked { peer } => (format!("{peer} is no longer in the cluster: revoked"), Some(Yellow)),
        Kind::CertificateRenewed { until } => {
            (format!("the certificate is renewed, until {}", time(*until)), None)
        }
        Kind::CertificateTrouble { cause, mend, until } => {
            let until = time(*until);
            (
                format!("the certificate ends {until} and is not renewed: {cause}{}", mend_line(mend)),
                Some(Red),
            )
        }
        Kind::Replicated { workload, generation, peer, bytes, took_ms } => {
            let (bytes, took) = (ByteSize(*bytes), took(*took_ms));
            (format!("{workload}: generation {generation} is on {peer} ({bytes} in {took})"), Some(Grey))
        }
        Kind::ReplicaTaken { workload, generation, peer, bytes, took_ms } => {
            let (bytes, took) = (ByteSize(*bytes), took(*took_ms));
            (format!("{workload}: generation {generation} of {peer} is here ({bytes} in {took})"), Some(Grey))
        }
        Kind::ReplicaBehind { workload, peer, behind_ms, cause, mend } => {
            let behind = took(*behind_ms);
            (format!("{workload}: {peer} is {behind} behind: {cause}{}", mend_line(mend)), Some(Red))
        }
        Kind::ReplicaCaughtUp { workload, peer } => {
            (format!("{workload}: {peer} has all snapshots again"), Some(Green))
        }
        Kind::MigrationPhase { workload, peer, leaves, phase, detail, .. } => {
            let way = if *leaves { "to" } else { "from" };
            let detail = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
            (format!("{workload}, on the move {way} {peer}: {phase}{detail}"), Some(Yellow))
        }
        Kind::Migrated { workload, to, took_ms, blackout_ms, bytes, .. } => {
            let (bytes, all, still) = (ByteSize(*bytes), took(*took_ms), took(*blackout_ms));
            (format!("{workload} runs on {to} ({bytes} in {all}, stood still for {still})"), Some(Green))
        }
        Kind::MigrationFailed { workload, peer, cause, mend, .. } => (
            format!("{workload} is not moved to {peer} and runs here: {cause}{}", mend_line(mend)),
            Some(Red),
        ),
        Kind::FaultInjected { id, detail, .. } => (format!("FAULT {id}: {detail}"), Some(Yellow)),
        Kind::FaultUndone { id, why } => (format!("fault {id} is over ({why})"), None),
        Kind::FaultTrouble { id, error } => (format!("fault {id}: {error}"), Some(Red)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_not_sent() {
        assert_eq!(plain("evil\u{1b}[2J\u{9b}31m\u{7}\n \u{e4}"), "evil\\u{1b}[2J\\u{9b}31m\\u{7}\\n \u{e4}");
        let kind = Kind::HealthFailed {
            check: "exec:/x".into(),
            error: "\u{1b}]0;title\u{7}".into(),
            failures: 3,
            proven: true,
        };
        let event = Event {
            seq: 1,
            time: jiff::Timestamp::UNIX_EPOCH,
            node: "n".into(),
            unit: Some("a\r.service".into()),
            op: None,
            kind,
        };
        let event = all_plain(&event).unwrap();
        assert!(!describe(&event.kind).0.contains(char::is_control));
        assert_eq!(event.unit.as_deref(), Some("a\\r.service"));
    }
}
