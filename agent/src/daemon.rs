//! The daemon: puts the parts together and keeps them running.
//!
//! What may fail at the start, before anything is under care, is an error (a configuration that makes no
//! sense, a state directory that cannot be made, a second ftd). After that nothing ends ftd but a signal:
//! a bus that is gone, a full disk, a kernel without BTF are events, and ftd goes on with what it has.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::fcntl::{Flock, FlockArg};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::broadcast::error::RecvError,
};

use crate::{
    config::{self, Config},
    control::{App, server},
    event::{Kind, bus::Bus, journal::Writer},
    heal::{
        driver, files, health,
        saved::{self, Store},
        supervisor::Supervisor,
    },
    inject::Faults,
    migrate::Migrations,
    peer::Peers,
    probe::{self, ProbeOptions, Slot, Source},
    replicate,
    snapshot::{
        self,
        criu::unit,
        generation::selection,
        schedule::{self, Board},
        scratch::Places,
        store::Settings,
    },
    telemetry::Metrics,
    unit::{
        alias,
        definition::definition,
        manager::{Report, Systemd},
    },
};

/// Runs ftd until it is told to stop.
pub fn run(config: Config) -> Result<()> {
    let state_dir = config.node.state_dir.clone();
    fs::create_dir_all(&state_dir)
        .with_context(|| format!("{}: cannot be made; set node.state_dir", state_dir.display()))?;
    let _only_one = lock(&state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the async runtime")?;
    let stop_within = config.node.stop_within;
    let done = runtime.block_on(serve(config));
    // A thread that the disk or a name server holds must not hold ftd's end.
    runtime.shutdown_timeout(stop_within);
    done
}

/// One ftd at a time: the kernel lets go of the lock when its holder dies.
fn lock(state_dir: &Path) -> Result<Flock<fs::File>> {
    let path = state_dir.join("lock");
    let file = fs::File::create(&path).with_context(|| format!("{}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .with_context(|| format!("{}: another ftd is running on this state directory", path.display()))
}

async fn serve(config: Config) -> Result<()> {
    let begun = Instant::now();
    let state_dir = config.node.state_dir.clone();
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;

    // Events: from here on everything is told.
    let (writer, start) = Writer::open(&state_dir.join("journal"), &config.journal);
    let (bus, queue) = Bus::new(config.node_name(), start.opened.next_seq);
    let metrics = Metrics::new(config.node_name());
    tokio::spawn(Arc::clone(&metrics).run(bus.follow()));
    if let Some(kind) = start.opened.mended() {
        bus.emit(None, None, kind);
    }
    if let Some(kind) = start.blocked {
        tracing::error!(?kind, "there is no journal yet; events wait in memory");
        bus.emit(None, None, kind);
    }
    let written = writer.written();
    let told: Weak<Bus> = Arc::downgrade(&bus);
    let thread = std::thread::Builder::new().name("ftd-journal".into());
    let writer = thread.spawn(move || writer.run(&queue, &told)).context("journal thread")?;

    // Decisions.
    let store = Arc::new(Store::new(&state_dir));
    let saved = store.load().unwrap_or_else(|error| {
        let kind = set_aside(store.path(), &error);
        tracing::error!(?kind, "holds and attempts are lost");
        bus.emit(None, None, kind);
        BTreeMap::new()
    });
    let resumed = !saved.is_empty();
    bus.emit(
        None,
        None,
        Kind::AgentStarted { version: env!("CARGO_PKG_VERSION").into(), pid: std::process::id(), resumed },
    );
    let units = config.units();
    let names: Vec<String> = units.iter().map(|unit| unit.name.clone()).collect();
    let checks: Vec<_> = units.iter().map(|unit| unit.health.clone()).collect();
    let (supervisor, wanted) =
        Supervisor::new(Arc::clone(&bus), units, saved, config.probe.elsewhere_per_minute);
    let systemd = Systemd::default();
    let saving = saved::keep(Arc::clone(&supervisor), store, Arc::clone(&bus));
    tokio::spawn(driver::run(Arc::clone(&supervisor), systemd.clone(), wanted));
    tokio::spawn(driver::keep_time(Arc::clone(&supervisor)));

    // The kernel's word.
    let source = Arc::new(start_source(&config, &supervisor));
    tell_of_source(&bus, &source);
    tokio::spawn(count_drops(Arc::clone(&bus), Arc::clone(&source), config.probe.drops_every));

    // systemd's word.
    let conversation = {
        let (systemd, supervisor, bus, source) =
            (systemd.clone(), Arc::clone(&supervisor), Arc::clone(&bus), Arc::clone(&source));
        async move {
            let sink = |report| take_report(&supervisor, &bus, &source, report);
            systemd.converse(names, sink).await;
        }
    };
    tokio::spawn(conversation);
    tokio::spawn({
        let systemd = systemd.clone();
        async move {
            systemd.looked().await;
            // Of an ftd that was killed in the middle of a snapshot.
            match unit::sweep(&systemd).await {
                Ok(0) => {}
                Ok(count) => tracing::warn!(count, "drop-ins of an earlier ftd were left, and are removed"),
                Err(error) => tracing::warn!(%error, "drop-ins of an earlier ftd may be left"),
            }
        }
    });
    let board = Arc::new(Board::default());
    tokio::spawn(keep_snapshots(
        config.clone(),
        Arc::clone(&supervisor),
        systemd.clone(),
        Arc::clone(&bus),
        Arc::clone(&board),
    ));
    for (slot, check) in checks.into_iter().enumerate() {
        if let Some(check) = check {
            let (systemd, supervisor, bus) = (systemd.clone(), Arc::clone(&supervisor), Arc::clone(&bus));
            tokio::spawn(async move {
                // So that the first question is asked at once, and not in vain.
                systemd.looked().await;
                health::watch(supervisor, bus, Slot(slot as u32), check).await;
            });
        }
    }

    // Other nodes.
    let peers = Peers::start(&config, Arc::clone(&bus)).await;
    let replicas = replicate::start(&config, &peers, &bus);
    let migrations = Migrations::start(&config, &bus, &peers, &supervisor, &saving, &systemd);

    // People.
    let faults = Faults::new(
        config.inject.clone(),
        &state_dir,
        Arc::clone(&bus),
        Arc::clone(&supervisor),
        systemd.clone(),
    );
    let listener = server::bind(&config.api)
        .with_context(|| format!("{}: the API's socket", config.api.socket.display()))?;
    let (tcp, ready_within, stop_within) =
        (config.status.listen, config.node.ready_within, config.node.stop_within);
    let started = jiff::Timestamp::now();
    let app = Arc::new(App {
        config,
        bus: Arc::clone(&bus),
        supervisor,
        saving,
        systemd,
        faults: Arc::clone(&faults),
        source,
        snapshots: board,
        metrics,
        peers,
        replicas,
        migrations,
        started,
    });
    faults.recover_left_over();
    tokio::spawn(server::serve_unix(Arc::clone(&app), listener));
    if let Some(address) = tcp {
        // Whoever waited for READY finds the status there, if it can be.
        let first = TcpListener::bind(address).await;
        let app = Arc::clone(&app);
        tokio::spawn(async move {
            let listener = server::listen(&app.bus, address, first).await;
            server::serve_tcp(app, listener).await;
        });
    }

    let life = async {
        // Who waited for ftd can rely on it that nothing is missed: what happened before is decided, what comes is seen.
        let decided = async {
            app.systemd.looked().await;
            look_for_ends(&app.supervisor);
            app.supervisor.decided().await;
        };
        let in_time = tokio::time::timeout(ready_within, decided).await.is_ok();
        let undecided = if in_time { Vec::new() } else { app.supervisor.undecided() };
        if !undecided.is_empty() {
            tracing::warn!(?undecided, "ready, though systemd has not said yet what is with every unit");
        }
        let took_ms = begun.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
        bus.emit(None, None, Kind::AgentReady { took_ms, undecided });
        notify(&[sd_notify::NotifyState::Ready]);
        pat_watchdog().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = life => {}
    }
    notify(&[sd_notify::NotifyState::Stopping]);
    let last_deeds = async {
        tokio::join!(app.faults.end_all(), app.peers.stop());
        let change = *app.supervisor.changes().borrow();
        app.saving.settled(change).await
    };
    match tokio::time::timeout(stop_within, last_deeds).await {
        Ok(Ok(())) => {}
        Ok(Err(cause)) => tracing::error!(cause, "the last holds and attempts are not saved"),
        Err(_) => tracing::error!("not all faults are undone: the next start of ftd goes on with it"),
    }
    bus.emit(None, None, Kind::AgentStopped {});
    drop(app);
    finish(&bus, writer, &written, stop_within).await;
    Ok(())
}

/// Puts a state file that makes no sense where it is kept for who wants to know why, and says so.
fn set_aside(path: &Path, error: &std::io::Error) -> Kind {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    let (file, mut cause) = (path.display().to_string(), error.to_string());
    let kept = match fs::rename(path, &aside) {
        Ok(()) => format!("it is kept as {}", Path::new(&aside).display()),
        Err(error) => {
            cause = format!("{cause}; and it cannot be renamed: {error}");
            "copy it now if you want to look at it: it is about to be replaced".into()
        }
    };
    let mend =
        format!("holds, units given up and attempts are forgotten: hold again what is to be held; {kept}");
    Kind::StateDamaged { file, cause, mend }
}

/// Waits until the journal has all events; not for long. Says how many it has not.
async fn finish(bus: &Bus, writer: JoinHandle<()>, written: &AtomicU64, limit: Duration) {
    bus.close();
    let joined = tokio::task::spawn_blocking(move || writer.join());
    let late = tokio::time::timeout(limit, joined).await.is_err();
    let events = bus.next_seq().saturating_sub(written.load(Ordering::Relaxed));
    if late || events > 0 {
        tracing::error!(events, late, "the journal has not taken the last events: they are lost");
    }
}

/// Begins what is done with snapshots: the watch over the files of all workloads that have any, and the schedules;
/// when it is known how systemd calls the units.
async fn keep_snapshots(
    config: Config,
    supervisor: Arc<Supervisor>,
    systemd: Systemd,
    bus: Arc<Bus>,
    board: Arc<Board>,
) {
    let any = |workload: &config::Workload| workload.has_files() || workload.snapshot.is_some();
    if !config.workloads.iter().any(any) {
        return;
    }
    let places = Places::of_daemon(&config);
    {
        // Of an ftd that was killed in the middle of a snapshot.
        let places = places.clone();
        tokio::task::spawn_blocking(move || places.sweep());
    }
    systemd.looked().await;
    let settings = Settings { quota: Some(config.snapshot.quota.as_u64()), ..Settings::default() };
    let mut trouble = files::Trouble::new("opening the snapshots", None, &bus, config.snapshot.retry);
    let store = loop {
        let (dir, settings) = (config.node.state_dir.join("snapshots"), settings.clone());
        let opened = tokio::task::spawn_blocking(move || snapshot::store::Store::open(&dir, settings)).await;
        match opened {
            Ok(Ok(store)) => break store,
            Ok(Err(error)) => trouble.wait(&error.to_string()).await,
            Err(error) => trouble.wait(&error.to_string()).await,
        }
    };
    tokio::spawn(follow_files(config.clone(), Arc::clone(&bus), store.clone(), Arc::clone(&board)));
    let status = supervisor.status();
    for workload in config.workloads.iter().filter(|workload| any(workload)) {
        let name = workload.name.as_ref();
        refresh(&config, &board, &store, name).await;
        let ours = status.iter().filter(|unit| unit.workload == *name);
        let units: Vec<_> = ours.map(|unit| unit.unit.clone()).collect();
        let definitions: Vec<_> = units.iter().map(|unit| definition(unit)).collect();
        let selection = match selection(workload, &definitions) {
            Ok(selection) => selection,
            Err(error) => {
                let what = format!("watching the files of {name}");
                bus.emit(None, None, Kind::FilesTrouble { what, error: error.to_string() });
                continue;
            }
        };
        let watched = workload.has_files() && workload.on_change == config::OnChange::Heal;
        if watched {
            let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
            let check = workload.check.as_ref().map(|check| words(check.as_ref()));
            let watch = files::Watch {
                workload: name.clone(),
                check: check.or_else(|| files::own_checker(units.first()?)),
                units: units.clone(),
                selection: selection.clone(),
                definitions,
                settings: config.snapshot.clone(),
                node: config.node_name(),
            };
            let hands = files::Hands {
                bus: Arc::clone(&bus),
                supervisor: Arc::clone(&supervisor),
                systemd: systemd.clone(),
                store: store.clone(),
            };
            tokio::spawn(files::run(watch, hands));
        }
        let schedule = workload.snapshot.clone().unwrap_or_default();
        if let Some(every) = schedule.every {
            let scheduled = schedule::driver::Scheduled {
                workload: name.clone(),
                units,
                files: workload.has_files().then_some(selection),
                watched,
                every,
                process: schedule.process,
                keep: schedule.keep.unwrap_or(config.snapshot.keep),
                settings: config.snapshot.clone(),
                node: config.node_name(),
                boot_id: saved::boot_id(),
                state_dir: config.node.state_dir.clone(),
                places: places.clone(),
            };
            let (supervisor, runs) = (Arc::clone(&supervisor), supervisor.runs());
            let hands = schedule::driver::Hands {
                bus: Arc::clone(&bus),
                systemd: systemd.clone(),
                store: store.clone(),
                board: Arc::clone(&board),
                serving: Arc::new(move |workload: &str| supervisor.serving(workload)),
                runs,
            };
            tokio::spawn(schedule::driver::run(scheduled, hands));
        }
    }
}

/// Has the board say what the store holds of a workload.
async fn refresh(config: &Config, board: &Arc<Board>, store: &snapshot::store::Store, workload: &str) {
    let of_this = |one: &&config::Workload| one.name.as_ref() == workload;
    let schedule = config.workloads.iter().find(of_this).and_then(|one| one.snapshot.as_ref());
    let kind = schedule.filter(|schedule| schedule.process).map(|_| snapshot::store::Kind::Process);
    let (board, store, workload) = (Arc::clone(board), store.clone(), workload.to_owned());
    let done = tokio::task::spawn_blocking(move || board.refresh(&store, &workload, kind)).await;
    if let Err(error) = done {
        tracing::warn!(%error, "how snapshots stand is not known");
    }
}

/// Keeps the board right about what is taken when files change, or by hand.
async fn follow_files(config: Config, bus: Arc<Bus>, store: snapshot::store::Store, board: Arc<Board>) {
    let mut follower = bus.follow();
    let of_unit = |unit: &str| {
        let has = |workload: &&config::Workload| {
            let names = workload.units.iter().map(|name| config::unit_name(name.as_ref()));
            names.into_iter().any(|name| name == unit || alias::others(&name).any(|other| other == unit))
        };
        Some(config.workloads.iter().find(has)?.name.as_ref().clone())
    };
    loop {
        let stale: Vec<String> = match follower.recv().await {
            Ok(event) => match (&event.kind, &event.unit) {
                (Kind::FilesGood { .. } | Kind::FilesPutBack { .. }, Some(unit)) => {
                    of_unit(unit).into_iter().collect()
                }
                // Taken by hand: those of the schedule are on the board before they are told.
                (Kind::SnapshotTaken { workload, generation, .. }, _)
                    if !board.all().iter().any(|one| {
                        one.workload == *workload
                            && one.newest.as_ref().is_some_and(|newest| newest.generation >= *generation)
                    }) =>
                {
                    vec![workload.clone()]
                }
                _ => continue,
            },
            Err(RecvError::Lagged(_)) => board.all().into_iter().map(|status| status.workload).collect(),
            Err(RecvError::Closed) => return,
        };
        for workload in stale {
            refresh(&config, &board, &store, &workload).await;
        }
    }
}

fn start_source(config: &Config, supervisor: &Arc<Supervisor>) -> Source {
    let options = config.probe.ebpf.then(|| ProbeOptions {
        ring_bytes: config.probe.ring.as_u64().try_into().unwrap_or(u32::MAX),
        realtime_priority: Some(config.probe.realtime).filter(|priority| *priority > 0),
        elsewhere: config.probe.elsewhere,
        ..ProbeOptions::default()
    });
    let supervisor = Arc::clone(supervisor);
    Source::start(options.as_ref(), move |event| supervisor.on_probe(event))
}

/// Main processes that began to end before the kernel's watch on them did, and that systemd still took for alive when
/// it was asked.
fn look_for_ends(supervisor: &Supervisor) {
    for (slot, pid) in supervisor.running() {
        if let Some(end) = probe::ended(slot, pid) {
            supervisor.on_probe(end);
        }
    }
}

fn tell_of_source(bus: &Bus, source: &Source) {
    let status = source.status();
    if let Some(cause) = source.cause() {
        tracing::warn!(cause, source = status.source, "no eBPF");
        bus.emit(None, None, Kind::ProbeUnavailable { cause: cause.to_owned() });
    }
    let (realtime, missing) = (status.realtime, status.missing);
    bus.emit(None, None, Kind::ProbeReady { source: status.source, realtime, missing });
}

fn take_report(supervisor: &Supervisor, bus: &Bus, source: &Source, report: Report) {
    match report {
        Report::View { unit, id, view } => {
            let slot = Slot(unit as u32);
            if let Some(news) = source.follow(slot, &id, &view) {
                tell_of_watch(bus, &id, news);
            }
            supervisor.on_view(slot, &id, view);
        }
        Report::Lost(cause) => {
            tracing::warn!(cause, "systemd cannot be reached");
            bus.emit(None, None, Kind::bus_lost(cause));
            supervisor.on_bus_lost();
        }
        Report::Back(away) => {
            let away_ms = away.as_millis().try_into().unwrap_or(u64::MAX);
            bus.emit(None, None, Kind::BusBack { away_ms });
        }
    }
}

fn tell_of_watch(bus: &Bus, unit: &str, news: Kind) {
    if let Kind::UnitWatch { error: Some(cause) } = &news {
        tracing::warn!(unit, cause, "the kernel cannot watch the unit; systemd's word remains");
    }
    bus.emit(Some(unit), None, news);
}

/// Tells of events that were lost between kernel and ftd, and tries again what could not be watched.
async fn count_drops(bus: Arc<Bus>, source: Arc<Source>, every: Duration) {
    let mut turns = tokio::time::interval(every);
    let mut known: BTreeMap<String, u64> = BTreeMap::new();
    loop {
        turns.tick().await;
        for (unit, news) in source.retry() {
            tell_of_watch(&bus, &unit, news);
        }
        for (place, count) in source.status().drops {
            let before = known.insert(place.clone(), count).unwrap_or(0);
            if count > before {
                bus.emit(None, None, Kind::EventsDropped { place, count: count - before });
            }
        }
    }
}

/// Tells systemd's watchdog that ftd lives, as often as it wants to hear it; for ever.
async fn pat_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut turns = tokio::time::interval(limit / 3);
    loop {
        turns.tick().await;
        notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

fn notify(state: &[sd_notify::NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "nobody to notify");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_state_file_is_kept_and_told_with_its_mend() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        fs::write(store.path(), "{").unwrap();
        let error = store.load().unwrap_err();
        let Kind::StateDamaged { file, cause, mend } = set_aside(store.path(), &error) else { panic!() };
        assert_eq!(file, store.path().display().to_string());
        assert!(cause.contains("EOF") && mend.contains("heal.json.damaged"), "{cause}; {mend}");
        assert_eq!(fs::read_to_string(dir.path().join("heal.json.damaged")).unwrap(), "{");
        assert!(store.load().unwrap().is_empty());
    }
}
