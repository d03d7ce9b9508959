//! Carries out a workload's [`Scheduler`]: takes what is due, says what has come of it, finds out what is good, and
//! lets old ones go.
//!
//! **Good** is a snapshot of a service that was well before it and after it: it had served for `snapshot.good_after`
//! (with a health check that has succeeded, if it has one), and went on serving, in the same run, until the next
//! was due or as long again. That a running process is well says nothing of the files that it has read: where the
//! files of a workload are watched, what is good among them is found out by that watch alone, and a snapshot with other files
//! than its last good ones is not good.
//!
//! It works within ftd's sandbox: CRIU is had by the door, and all else that it needs (a look at the processes, tar of
//! a unit's own /tmp, the store) is what ftd may do anyway.

use std::{
    fs::File,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use tokio::{
    sync::{broadcast::error::RecvError, watch},
    task::{JoinError, JoinHandle},
};

use super::{Board, GenerationStatus, Scheduler};
use crate::{
    config,
    event::{self, bus::Bus},
    probe::BootNs,
    snapshot::{
        criu::{check::Severity, unit::UnitError},
        files::{Selection, compare},
        generation::{self, Files},
        process::{self, ProcessError, Take},
        scratch::Places,
        store::{About, Generation, Kind, Retention, Store},
    },
    unit::manager::Systemd,
};

/// A workload with a schedule.
#[derive(Debug, Clone)]
pub struct Scheduled {
    /// Its name.
    pub workload: String,
    /// systemd's names of its units, in order.
    pub units: Vec<String>,
    /// Its files, if it has any.
    pub files: Option<Selection>,
    /// These are watched, and what is good among them is not for this one to say.
    pub watched: bool,
    /// Time between snapshots.
    pub every: Duration,
    /// With its processes.
    pub process: bool,
    /// So many are kept.
    pub keep: usize,
    /// Times and limits.
    pub settings: config::Snapshot,
    /// This node, for the generations, and its boot.
    pub node: String,
    /// See `node`.
    pub boot_id: String,
    /// Where ftd's state is.
    pub state_dir: PathBuf,
    /// Where images are in between.
    pub places: Places,
}

/// That a workload serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serving {
    /// Since when all its units do: another moment is another run.
    pub since: BootNs,
    /// How long that is.
    pub lasting: Duration,
    /// Its health check has succeeded last time, or it has none.
    pub proven: bool,
}

/// Whether a workload serves, or why it does not.
pub type AskServing = Arc<dyn Fn(&str) -> Result<Serving, String> + Send + Sync>;

/// With what it works.
#[derive(Clone)]
pub struct Hands {
    /// Events.
    pub bus: Arc<Bus>,
    /// systemd.
    pub systemd: Systemd,
    /// The generations.
    pub store: Store,
    /// What others see.
    pub board: Arc<Board>,
    /// Whether it serves.
    pub serving: AskServing,
    /// Changes when that may have changed and no event tells of it: a unit was started for the first time.
    pub runs: watch::Receiver<u64>,
}

/// One that may turn out good.
#[derive(Debug)]
struct Candidate {
    status: GenerationStatus,
    /// When that is known.
    due: Instant,
    /// In which run it was taken.
    since: BootNs,
}

/// Takes snapshots of a workload, for ever.
pub async fn run(scheduled: Scheduled, hands: Hands) {
    let (mut follower, mut runs) = (hands.bus.follow(), hands.runs.clone());
    let pause = (scheduled.settings.retry, scheduled.settings.retry_at_most);
    let times = Scheduler::new(scheduled.every, pause, Instant::now());
    let every_ms = scheduled.every.as_millis().try_into().unwrap_or(u64::MAX);
    hands.board.change(&scheduled.workload, |status| status.every_ms = Some(every_ms));
    let scheduled = Arc::new(scheduled);
    let mut task = Task { scheduled, hands, times, taking: None, candidate: None, gone: 0 };
    loop {
        let wake = task.times.wake().into_iter().chain(task.candidate.as_ref().map(|one| one.due)).min();
        let due = async {
            match wake {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let taken = async {
            match &mut task.taking {
                Some(taking) => (&mut taking.handle).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            taken = taken => {
                let of_thread = |error: JoinError| {
                    Trouble::new(&task.scheduled.workload, &error, "see the log: journalctl -u ftd")
                };
                let taken = taken.map_err(of_thread).flatten();
                task.taken(taken).await;
            }
            () = due => task.on_time().await,
            // Whoever tells of runs lives as long as the daemon.
            Ok(()) = runs.changed(), if task.times.waits() => task.on_time().await,
            event = follower.recv() => match event {
                // What it waits for is told by an event of one of its units.
                Ok(event) if !task.times.waits() || !task.is_ours(&event) => {}
                Ok(_) | Err(RecvError::Lagged(_)) => task.on_time().await,
                Err(RecvError::Closed) => return,
            },
        }
    }
}

struct Task {
    scheduled: Arc<Scheduled>,
    hands: Hands,
    times: Scheduler,
    taking: Option<Taking>,
    candidate: Option<Candidate>,
    /// Generations that were let go since their room was last made free.
    gone: usize,
}

/// A snapshot that is being taken.
struct Taking {
    handle: JoinHandle<Result<Fresh, Trouble>>,
    begun: Instant,
    /// How the workload served then.
    serving: Serving,
}

/// A snapshot that was just taken.
struct Fresh {
    generation: Generation,
    frozen_us: u64,
    took: Duration,
}

/// Why there is none, for people.
#[derive(Debug, Clone)]
struct Trouble {
    thing: String,
    cause: String,
    mend: String,
}

impl Trouble {
    fn new(workload: &str, cause: &impl ToString, mend: &str) -> Self {
        Self { thing: workload.into(), cause: cause.to_string(), mend: mend.into() }
    }

    fn of_process(scheduled: &Scheduled, error: &ProcessError) -> Self {
        let workload = &scheduled.workload;
        match error {
            ProcessError::Unit(UnitError::Blocked(report)) => {
                let blockers = || report.findings.iter().filter(|one| one.severity == Severity::Blocker);
                let join = |texts: Vec<String>| texts.join("; ");
                Self {
                    thing: report.unit.clone(),
                    cause: join(blockers().map(|one| format!("{}: {}", one.thing, one.cause)).collect()),
                    mend: join(blockers().map(|one| one.mend.clone()).collect()),
                }
            }
            ProcessError::Unit(_) | ProcessError::Criu(_) => {
                let each: Vec<_> = scheduled.units.iter().map(|unit| format!("ftctl check {unit}")).collect();
                Self::new(workload, error, &format!("find out what is in the way: {}", each.join(", ")))
            }
            _ => Self::new(workload, error, "mend the cause; ftd tries again by itself"),
        }
    }
}

impl Task {
    fn is_ours(&self, event: &event::Event) -> bool {
        event.unit.as_ref().is_some_and(|unit| self.scheduled.units.contains(unit))
    }

    async fn on_time(&mut self) {
        let serving = (self.hands.serving)(&self.scheduled.workload);
        self.prove(serving.as_ref().ok()).await;
        let now = Instant::now();
        let begin = self.times.tick(now, serving.is_ok());
        let waits = serving.as_ref().err().filter(|_| self.times.waits()).cloned();
        self.hands.board.change(&self.scheduled.workload, |status| {
            status.waits = waits;
            status.running |= begin;
        });
        if begin && let Ok(serving) = serving {
            let handle = tokio::spawn(take(Arc::clone(&self.scheduled), self.hands.clone()));
            self.taking = Some(Taking { handle, begun: now, serving });
        }
    }

    async fn taken(&mut self, taken: Result<Fresh, Trouble>) {
        let Some(Taking { begun, serving, .. }) = self.taking.take() else { return };
        let now = Instant::now();
        let (workload, bus) = (&self.scheduled.workload, &self.hands.bus);
        let unit = self.scheduled.units.first().map(String::as_str);
        let still = (self.hands.serving)(workload).is_ok_and(|now| now.since == serving.since);
        if taken.is_err() && !still {
            self.times.called_off(now);
            return self.hands.board.change(workload, |status| status.running = false);
        }
        let done = self.times.done(now, taken.is_ok());
        if let Some(count) = done.tell {
            let every = humantime::format_duration(self.scheduled.every);
            let why = format!("one took longer than {every}");
            bus.emit(unit, None, event::Kind::SnapshotSkipped { workload: workload.clone(), count, why });
        }
        let failure = taken.as_ref().err().map(|trouble| trouble.cause.clone());
        self.hands.board.change(workload, |status| {
            status.running = false;
            status.skipped += done.skipped;
            status.taken += u64::from(taken.is_ok());
            status.failed += u64::from(taken.is_err());
            status.failure = failure;
        });
        match taken {
            Ok(fresh) => self.keep(&fresh, begun, serving).await,
            Err(Trouble { thing, cause, mend }) => {
                let again = done.again.unwrap_or_default();
                let again_ms = again.as_millis().try_into().unwrap_or(u64::MAX);
                let workload = workload.clone();
                bus.emit(unit, None, event::Kind::SnapshotFailed { workload, thing, cause, mend, again_ms });
                // It may be room that is missing.
                self.make_room().await;
            }
        }
    }

    async fn keep(&mut self, fresh: &Fresh, begun: Instant, serving: Serving) {
        let scheduled = &self.scheduled;
        let status = GenerationStatus::of(&fresh.generation, fresh.frozen_us, Some(fresh.took));
        let kind = event::Kind::SnapshotTaken {
            workload: scheduled.workload.clone(),
            generation: status.generation,
            kind: status.kind.clone(),
            frozen_us: status.frozen_us,
            took_ms: status.took_ms,
            bytes: status.bytes,
            new_bytes: status.new_bytes,
            stored_bytes: status.stored_bytes,
        };
        let good_after = scheduled.settings.good_after;
        self.hands.board.change(&scheduled.workload, |all| all.newest = Some(status.clone()));
        self.hands.bus.emit(scheduled.units.first().map(String::as_str), None, kind);
        if scheduled.process || !scheduled.watched {
            let wait = good_after.min(scheduled.every).max(good_after.saturating_sub(serving.lasting));
            self.candidate = Some(Candidate { status, due: begun + wait, since: serving.since });
        }
        let (store, name, kind) = (self.hands.store.clone(), scheduled.workload.clone(), scheduled.kind());
        let retention = Retention { count: Some(scheduled.keep), kind: Some(kind), ..Retention::default() };
        let gone =
            blocking(move || store.retain(&name, &retention, jiff::Timestamp::now()).map(|gone| gone.len()));
        match gone.await {
            Ok(gone) => self.gone += gone,
            Err(error) => tracing::warn!(error, "old snapshots are not let go"),
        }
        // To look for what nobody needs takes a while, with many generations.
        if self.gone > scheduled.keep / 2 {
            self.make_room().await;
        }
    }

    async fn make_room(&mut self) {
        let store = self.hands.store.clone();
        match blocking(move || store.gc()).await {
            Ok(freed) => tracing::debug!(freed.bytes, "room made"),
            Err(error) => tracing::warn!(error, "what no snapshot needs cannot be removed"),
        }
        self.gone = 0;
    }

    /// The candidate's time has come: is it good?
    async fn prove(&mut self, serving: Option<&Serving>) {
        let Some(candidate) = self.candidate.take_if(|one| Instant::now() >= one.due) else { return };
        let well = serving.is_some_and(|now| now.since == candidate.since && now.proven);
        if !well {
            return;
        }
        let (store, scheduled) = (self.hands.store.clone(), Arc::clone(&self.scheduled));
        let number = candidate.status.generation;
        match blocking(move || mark(&store, &scheduled, number)).await {
            Ok(true) => self
                .hands
                .board
                .change(&self.scheduled.workload, |status| status.good = Some(candidate.status)),
            Ok(false) => {}
            Err(error) => tracing::warn!(number, error, "a snapshot is not marked good"),
        }
    }
}

impl Scheduled {
    fn kind(&self) -> Kind {
        if self.process { Kind::Process } else { Kind::Files }
    }

    fn about(&self) -> About {
        About {
            workload: self.workload.clone(),
            kind: self.kind(),
            node: self.node.clone(),
            boot_id: self.boot_id.clone(),
            time: jiff::Timestamp::now(),
        }
    }
}

async fn blocking<T: Send + 'static, E: ToString + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

async fn take(scheduled: Arc<Scheduled>, hands: Hands) -> Result<Fresh, Trouble> {
    let name = scheduled.workload.clone();
    let dir = scheduled.state_dir.clone();
    let _busy = {
        let own = name.clone();
        let busy = blocking(move || busy(&dir, &own)).await;
        busy.map_err(|error| Trouble::new(&name, &error, "see that the state directory can be written to"))?
    };
    if !scheduled.process {
        let begun = Instant::now();
        let (store, about) = (hands.store.clone(), scheduled.about());
        let files = scheduled.files.clone().unwrap_or_else(|| Selection::new([]));
        let taken = blocking(move || generation::take(&store, about, &files)).await;
        let mend = "mend the cause; ftd tries again by itself";
        let (generation, _) = taken.map_err(|error| Trouble::new(&name, &error, mend))?;
        return Ok(Fresh { generation, frozen_us: 0, took: begun.elapsed() });
    }
    let take = Take {
        about: scheduled.about(),
        files: scheduled.files.clone(),
        units: scheduled.units.clone(),
        stop: false,
        limit: scheduled.settings.process_deadline,
    };
    let silent = Box::new(|_, _| {});
    let taken = process::take(&hands.systemd, &hands.store, &scheduled.places, take, silent).await;
    let taken = taken.map_err(|error| Trouble::of_process(&scheduled, &error))?;
    Ok(Fresh { generation: taken.generation, frozen_us: taken.frozen_us, took: taken.took })
}

/// Waits until nobody else, of all processes, takes or restores this workload's processes, and keeps others from it as
/// long as the answer lives. What is in the file belongs to who has it.
pub fn busy(state_dir: &std::path::Path, workload: &str) -> std::io::Result<Flock<File>> {
    let dir = state_dir.join("busy");
    std::fs::create_dir_all(&dir)?;
    // Names of workloads that the store takes are names of files.
    let file = File::options().read(true).append(true).create(true).open(dir.join(workload))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// Marks a generation good, unless its files speak against it. Whether it did.
fn mark(store: &Store, scheduled: &Scheduled, number: u64) -> Result<bool, generation::Error> {
    if scheduled.watched && scheduled.files.is_some() {
        let all = store.generations(&scheduled.workload)?;
        let of_files = |one: &&Generation| one.good && one.about.kind == Kind::Files;
        let Some(good) = all.iter().rfind(of_files) else { return Ok(false) };
        let good = Files::open(store, &scheduled.workload, good.number)?;
        let files = Files::open(store, &scheduled.workload, number)?;
        if !compare(&good.captured().entries, &files.captured().entries, None).is_empty() {
            return Ok(false);
        }
    }
    store.mark_good(&scheduled.workload, number)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{config::Config, snapshot::store::Settings};

    fn scheduled(dir: &Path, files: &str, watched: bool, process: bool) -> Scheduled {
        let mut config = Config::default();
        config.node.state_dir = dir.into();
        Scheduled {
            workload: "w".into(),
            units: vec!["w.service".into()],
            files: Some(Selection::parse([files]).unwrap()),
            watched,
            every: Duration::from_secs(1),
            process,
            keep: 3,
            settings: config.snapshot.clone(),
            node: "n".into(),
            boot_id: "b".into(),
            state_dir: dir.into(),
            places: Places::of_daemon(&config),
        }
    }

    #[test]
    fn with_watched_files_only_a_snapshot_of_the_good_ones_is_good() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.conf");
        let store = Store::open(&dir.path().join("store"), Settings::default()).unwrap();
        let files = file.to_str().unwrap();
        let watched = scheduled(dir.path(), files, true, true);
        // What the watch stores; and, as far as this matters, what a schedule does.
        let put = |kind, text: &str| {
            fs::write(&file, text).unwrap();
            let about = About { kind, ..watched.about() };
            let selection = Selection::parse([files]).unwrap();
            generation::take(&store, about, &selection).unwrap().0.number
        };
        let first = put(Kind::Process, "a");
        assert!(!mark(&store, &watched, first).unwrap(), "nothing is known to be good yet");
        let good = put(Kind::Files, "a");
        store.mark_good("w", good).unwrap();
        assert!(mark(&store, &watched, first).unwrap());
        let bad = put(Kind::Process, "b");
        assert!(!mark(&store, &watched, bad).unwrap());
        assert!(mark(&store, &scheduled(dir.path(), files, false, true), bad).unwrap());
        // The files that are put back are those that the watch has found good, whatever a schedule says.
        assert_eq!(store.last_good_of("w", Kind::Files).unwrap().unwrap().number, good);
    }

    #[test]
    fn who_is_busy_with_a_workload_keeps_others_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = busy(dir.path(), "w").unwrap();
        let (sender, done) = std::sync::mpsc::channel();
        let other = {
            let dir = dir.path().to_owned();
            std::thread::spawn(move || {
                let _second = busy(&dir, "w").unwrap();
                sender.send(()).unwrap();
            })
        };
        drop(busy(dir.path(), "v").unwrap());
        assert!(done.recv_timeout(Duration::from_millis(100)).is_err());
        drop(first);
        done.recv().unwrap();
        other.join().unwrap();
    }
}
