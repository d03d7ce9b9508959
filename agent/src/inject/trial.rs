//! Tries the OOM fault for real: this process is ftd, less systemd, to a victim of its own.
//!
//! Part of `ftd probe-test`, which is also run alone with other kernels: there control groups are of version 2 and
//! have real limits of memory. Probe, state machine and fault are those of the daemon; what systemd would say of
//! the unit is made up, and nobody starts it again.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{Fault, Faults, Request, balloon::Balloon};
use crate::{
    config::Config,
    event::{Cause, Event, Kind, bus::Bus},
    heal::supervisor::Supervisor,
    probe::{ProbeOptions, Slot, Source, selftest},
    unit::{UnitView, cgroup, manager::Systemd},
};

const CONFIG: &str = "[inject]\nenabled = true\n[[workload]]\nname = \"trial\"\nunits = [\"victim\"]\n";
const UNIT: &str = "victim.service";
const SLOT: Slot = Slot(0);
/// Long, for emulated machines; it does not slow a good run.
const PATIENCE: Duration = Duration::from_secs(30);
/// What systemd would have as the unit's limit.
const LIMIT: u64 = 1 << 30;

/// Runs it, with one line of output: `ok injected-oom` or `FAIL injected-oom: why`. Answers whether it held; fails
/// only when `out` cannot be written to. Needs root.
pub fn run(out: &mut impl Write) -> io::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let name = format!("ftd-trial-{}", std::process::id());
    let state_dir = Path::new("/run").join(&name);
    let held = Group::new(&name).and_then(|group| runtime.block_on(oom(&group, &name, &state_dir)));
    // Nothing is there if it came to nothing early.
    let _ = fs::remove_dir_all(state_dir);
    match &held {
        Ok(()) => writeln!(out, "ok injected-oom")?,
        Err(why) => writeln!(out, "FAIL injected-oom: {why}")?,
    }
    Ok(held.is_ok())
}

/// A control group that is removed at the end.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Result<Self, String> {
        let dir =
            cgroup::unified_mount().map_err(|error| format!("no unified hierarchy: {error}"))?.join(name);
        fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Nothing is in it any more if all went well.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        selftest::remove_below(&self.0);
    }
}

async fn oom(group: &Group, name: &str, state_dir: &Path) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let config = Config::parse(CONFIG, Path::new("trial")).map_err(|error| error.to_string())?;
    let (bus, _queue) = Bus::new("trial".into(), 1);
    let mut events = bus.follow();
    let (supervisor, _actions) = Supervisor::new(Arc::clone(&bus), config.units(), BTreeMap::new(), 0);
    let options = ProbeOptions { elsewhere: false, realtime_priority: None, ..ProbeOptions::default() };
    let told = Arc::clone(&supervisor);
    let source = Source::start(Some(&options), move |event| told.on_probe(event));
    if let Some(cause) = source.cause() {
        return Err(format!("no probe: {cause}"));
    }

    // It waits for a word that never comes.
    let mut victim = Balloon::start().map_err(text)?;
    let main_pid = victim.pid;
    fs::write(group.0.join("cgroup.procs"), main_pid.to_string()).map_err(text)?;
    let view = UnitView {
        load_state: "loaded".into(),
        active_state: "active".into(),
        sub_state: "running".into(),
        main_pid,
        control_group: format!("/{name}"),
        active_enter: 1,
        inactive_exit: 1,
        restart: "no".into(),
        memory_max: LIMIT,
        ..UnitView::default()
    };
    if let Some(Kind::UnitWatch { error: Some(error) }) = source.follow(SLOT, UNIT, &view) {
        return Err(error);
    }
    supervisor.on_view(SLOT, UNIT, view);
    // systemd would reap it; a dead one that is not counts as alive.
    let reaping = tokio::spawn(async move { victim.ended().await });

    let limits = Limits::of(&group.0);
    let faults = Faults::new(config.inject.clone(), state_dir, bus, supervisor, Systemd::default());
    let request = Request { unit: UNIT.into(), fault: Fault::Oom, signal: None, whole: false, for_ms: None };
    faults.inject(&request).await.map_err(|error| error.to_string())?;

    let mut came = Vec::new();
    let all = async {
        while !came.iter().any(|event: &Arc<Event>| matches!(event.kind, Kind::FaultUndone { .. })) {
            came.push(events.recv().await.map_err(|error| error.to_string())?);
        }
        Ok::<_, String>(())
    };
    let in_time = tokio::time::timeout(PATIENCE, all).await;
    reaping.abort();
    match in_time {
        Ok(done) => done?,
        Err(_) => return Err(format!("the fault does not end: {came:?}")),
    }
    let wanted = |what: &str, like: &dyn Fn(&Kind) -> bool| {
        came.iter()
            .any(|event| event.unit.as_deref() == Some(UNIT) && like(&event.kind))
            .then_some(())
            .ok_or_else(|| format!("{what} is missing or says something else: {came:#?}"))
    };
    wanted("the OOM kill, with victim, control group and limit,", &|kind| {
        matches!(kind, Kind::OomKill { process, cgroup, limit: Some(LIMIT), rss }
            if process.pid == main_pid && cgroup.trim_start_matches('/') == name && *rss > 0)
    })?;
    wanted(
        "the death",
        &|kind| matches!(kind, Kind::ProcessDied { process, main: true, oom: true, .. } if process.pid == main_pid),
    )?;
    wanted("the outage", &|kind| matches!(kind, Kind::Down { cause: Cause::OomKilled, .. }))?;
    wanted("the end of the fault", &|kind| matches!(kind, Kind::FaultUndone { why, .. } if why == "done"))?;
    let after = Limits::of(&group.0);
    if after != limits {
        return Err(format!("the limits were {limits:?} and are {after:?}"));
    }
    Ok(())
}

/// What the fault changes of a group; nothing where its memory controller is of version 1.
#[derive(Debug, PartialEq, Eq)]
struct Limits(Vec<Option<String>>);

impl Limits {
    fn of(group: &Path) -> Self {
        Self(super::LIMITS.iter().map(|name| fs::read_to_string(group.join(name)).ok()).collect())
    }
}
