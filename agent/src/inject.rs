//! Breaking things on purpose, with a durable way back.
//!
//! A fault is: a record of how to undo it, written durably; the deed; the undo, when its time is over,
//! when a person asks for it, or when ftd starts and finds the record of one that it did not see the end
//! of. Undoing is idempotent and tolerates that the unit has meanwhile been restarted: what belonged to the
//! old run went with it. An undo that fails is tried again until it succeeds; only then the record is removed
//! and the fault no longer listed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{broadcast, oneshot},
    task::JoinHandle,
};

use crate::{
    config,
    event::{Kind, OpId, bus::Bus},
    heal::{
        machine::Phase,
        saved::{boot_id, write_durably},
        supervisor::Supervisor,
    },
    unit::{
        UnitView, cgroup,
        manager::{JobError, Systemd},
    },
};

pub mod balloon;
pub mod trial;

/// First and longest wait between attempts to undo.
const UNDO_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// The shortest time for which a fault can be asked.
const SHORTEST: Duration = Duration::from_millis(100);

/// The limits of a cgroup that the OOM fault lowers, see cgroup-v2.rst of the kernel's documentation.
const LIMITS: [&str; 2] = ["memory.swap.max", "memory.max"];

/// What can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// Stop the unit, as an administrator would.
    Stop,
    /// Send a signal to its main process, or to all.
    Kill,
    /// Stop all of its processes in their tracks (SIGSTOP).
    Hang,
    /// Let the kernel's OOM killer take its main process.
    Oom,
}

/// What is asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The unit.
    pub unit: String,
    /// What to do to it.
    pub fault: Fault,
    /// For `kill`: the signal, by name or number; KILL when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// For `kill`: every process of the unit, not the main process only.
    #[serde(default)]
    pub whole: bool,
    /// For all but `kill`: end after this long, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
}

/// A fault that was injected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// The unit.
    pub unit: String,
    /// What it is.
    pub fault: Fault,
    /// Particulars, for people.
    pub detail: String,
    /// When it began.
    pub begun: jiff::Timestamp,
    /// When it ends by itself.
    pub ends: Option<jiff::Timestamp>,
    /// The kernel's name for the boot in which it was made: process ids and cgroups mean nothing in another.
    #[serde(default)]
    pub boot: String,
    /// The operation it opened; events of the undo carry it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<OpId>,
    /// How to undo it.
    pub undo: Vec<Undo>,
}

/// One thing to undo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Undo {
    /// Let the stopped processes of a cgroup go on.
    Continue(PathBuf),
    /// Start a unit that was stopped.
    Start(String),
    /// Give a file of a cgroup its old content back.
    CgroupFile {
        /// The file.
        file: PathBuf,
        /// The inode of the cgroup's directory: one that was removed and made anew has its own limits.
        inode: u64,
        /// The content.
        content: String,
    },
    /// End a helper process: its id, and its start time so that no other with the same id is hit.
    EndProcess {
        /// Process id.
        pid: u32,
        /// Start time, clock ticks since boot; see proc(5), field 22 of stat.
        start: u64,
    },
    /// Give a process back its old badness for the OOM killer.
    OomScore {
        /// Process id.
        pid: u32,
        /// Start time, as above.
        start: u64,
        /// The old value.
        adjust: i32,
    },
    /// Move everything out of a memory cgroup made for the fault, and remove it.
    RemoveGroup {
        /// The group.
        group: PathBuf,
        /// Where its processes came from.
        back_to: PathBuf,
    },
}

/// Why a fault was refused or failed. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// Switched off.
    #[error("faults are switched off on this host")]
    Disabled,
    /// No such unit, or not now.
    #[error("{unit} {cause}")]
    Unfit {
        /// The unit.
        unit: String,
        /// Why.
        cause: String,
        /// What to do.
        mend: String,
    },
    /// A parameter makes no sense.
    #[error("{0}")]
    Parameter(String),
    /// It was tried and did not work.
    #[error("{what}: {source}")]
    Failed {
        /// What was being done.
        what: String,
        /// Why it did not work.
        source: io::Error,
    },
}

impl InjectError {
    /// What a person can do about it.
    pub fn mend(&self) -> String {
        match self {
            Self::Disabled => {
                "set enabled = true under [inject] in the configuration and restart ftd; not in production"
                    .into()
            }
            Self::Unfit { mend, .. } => mend.clone(),
            Self::Parameter(_) => "see: ftctl inject --help".into(),
            Self::Failed { .. } => "see the cause; ftctl doctor tells what this host lacks".into(),
        }
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> InjectError {
    let what = what.into();
    move |source| InjectError::Failed { what, source }
}

/// All faults of this node.
#[derive(Debug)]
pub struct Faults {
    options: config::Inject,
    dir: PathBuf,
    bus: Arc<Bus>,
    supervisor: Arc<Supervisor>,
    systemd: Systemd,
    active: Mutex<BTreeMap<String, Active>>,
    /// Held while a fault is checked and prepared: two at once would each find the unit without the other.
    preparing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Active {
    record: Record,
    /// Dropped or used, it ends the fault.
    end: Option<oneshot::Sender<&'static str>>,
}

impl Faults {
    /// The faults of this node; their records live below `state_dir`.
    pub fn new(
        options: config::Inject,
        state_dir: &Path,
        bus: Arc<Bus>,
        supervisor: Arc<Supervisor>,
        systemd: Systemd,
    ) -> Arc<Self> {
        let dir = state_dir.join("faults");
        let (active, preparing) = (Mutex::default(), tokio::sync::Mutex::default());
        Arc::new(Self { options, dir, bus, supervisor, systemd, active, preparing })
    }

    fn active(&self) -> MutexGuard<'_, BTreeMap<String, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Faults that are not undone yet.
    pub fn list(&self) -> Vec<Record> {
        self.active().values().map(|active| active.record.clone()).collect()
    }

    /// Undoes what an earlier ftd left behind: lists it at once, so that it is seen and no new fault is
    /// taken for an old one, and goes on with the work in the background.
    pub fn recover_left_over(self: &Arc<Self>) {
        let trouble = |path: &Path, error: String| {
            let id = path.display().to_string();
            self.bus.emit(None, None, Kind::FaultTrouble { id, error });
        };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return trouble(&self.dir, format!("undo records cannot be read: {error}")),
        };
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let read = fs::read(&path).map_err(|error| error.to_string());
            match read.and_then(|bytes| serde_json::from_slice::<Record>(&bytes).map_err(|e| e.to_string())) {
                Ok(record) => {
                    self.active().insert(record.id.clone(), Active { record: record.clone(), end: None });
                    self.finish_beside(record, "ftd started again");
                }
                Err(error) => trouble(&path, format!("this undo record cannot be read: {error}")),
            }
        }
    }

    fn finish_beside(self: &Arc<Self>, record: Record, why: &'static str) -> JoinHandle<()> {
        let faults = Arc::clone(self);
        tokio::spawn(async move { faults.finish(record, why).await })
    }

    /// Undoes all faults and returns when that is done: ftd is about to end, and nobody would undo them.
    pub async fn end_all(&self) {
        let mut follower = self.bus.follow();
        let ended = |kind: &Kind| matches!(kind, Kind::FaultUndone { .. } | Kind::FaultTrouble { .. });
        let mut open = self.recover_because(None, "ftd stops").unwrap_or(0);
        while open > 0 {
            match follower.recv().await {
                Ok(event) if ended(&event.kind) => open -= 1,
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    /// Undoes one fault, or all; answers how many.
    pub fn recover(&self, id: Option<&str>) -> Result<usize, InjectError> {
        self.recover_because(id, "person")
    }

    fn recover_because(&self, id: Option<&str>, why: &'static str) -> Result<usize, InjectError> {
        let mut active = self.active();
        if let Some(id) = id
            && !active.contains_key(id)
        {
            return Err(InjectError::Parameter(format!("there is no fault {id}")));
        }
        let wanted = active.values_mut().filter(|a| id.is_none_or(|id| a.record.id == id));
        let ends = wanted.filter_map(|a| a.end.take());
        Ok(ends.filter_map(|end| end.send(why).ok()).count())
    }

    /// Injects a fault; answers its record once the deed is done.
    pub async fn inject(self: &Arc<Self>, request: &Request) -> Result<Record, InjectError> {
        if !self.options.enabled {
            return Err(InjectError::Disabled);
        }
        let signal = parse_signal(request)?;
        let asked = request.for_ms.map(Duration::from_millis);
        let longest = self.options.longest;
        if asked.is_some_and(|asked| request.fault == Fault::Kill || !(SHORTEST..=longest).contains(&asked)) {
            return Err(InjectError::Parameter(format!(
                "--for goes with stop, hang and oom, from {} to {} (inject.longest)",
                humantime::format_duration(SHORTEST),
                humantime::format_duration(longest)
            )));
        }
        let preparing = self.preparing.lock().await;
        let (slot, unit) = self.supervisor.find(&request.unit).map_err(|error| InjectError::Unfit {
            unit: request.unit.clone(),
            cause: error.to_string(),
            mend: "faults are for units in the configuration; see: ftctl status".into(),
        })?;
        let (view, phase, held) =
            self.supervisor.view(slot).unwrap_or((UnitView::default(), Phase::Unknown, false));
        let refuse = |cause: &str, mend: &str| {
            Err(InjectError::Unfit { unit: unit.clone(), cause: cause.into(), mend: mend.into() })
        };
        if held {
            return refuse("is held: a fault would not be healed", "ftctl release it first");
        }
        if phase != Phase::Up {
            return refuse("is not up", "wait until ftctl status shows it up");
        }
        if self.active().values().any(|a| a.record.unit == unit) {
            return refuse("has a fault already", "wait for its end, or: ftctl inject recover");
        }
        let deed = match request.fault {
            Fault::Stop => Deed::stop(&unit),
            Fault::Kill => Deed::kill(&view, signal, request.whole)?,
            Fault::Hang => Deed::hang(&view)?,
            Fault::Oom => Deed::oom(&unit, &view, self.options.oom_room.as_u64())?,
        };
        let lasting = (!deed.undo.is_empty()).then(|| asked.unwrap_or(self.options.default_for));
        let (record, act, ended) = self.prepare(unit, request.fault, deed, lasting).await?;
        drop(preparing);
        // What a fault did to a run of the unit goes with that run.
        let (supervisor, run) = (Arc::clone(&self.supervisor), view.active_enter);
        let another_run = async move { supervisor.another_run(slot, run).await };
        self.carry_out(record, act, ended, another_run, lasting).await
    }

    /// Announces a fault, lists it, and writes its way back. Answers also where its end will be asked for.
    async fn prepare(
        &self,
        unit: String,
        fault: Fault,
        mut deed: Deed,
        lasting: Option<Duration>,
    ) -> Result<(Record, Act, oneshot::Receiver<&'static str>), InjectError> {
        let begun = jiff::Timestamp::now();
        let id = format!("{:x}", begun.as_microsecond());
        let for_ms = lasting.map_or(0, |d| d.as_millis().try_into().unwrap_or(u64::MAX));
        if let Act::Oom { helper, .. } = &mut deed.act {
            let balloon = balloon::Balloon::start().map_err(failed("starting the helper process"))?;
            deed.undo
                .push(Undo::EndProcess { pid: balloon.pid, start: start_time(balloon.pid).unwrap_or(0) });
            *helper = Some(balloon);
        }
        let ends = lasting.map(|lasting| begun.saturating_add(lasting).unwrap_or(jiff::Timestamp::MAX));
        let kind = Kind::FaultInjected {
            id: id.clone(),
            fault: format!("{fault:?}").to_lowercase(),
            detail: deed.detail.clone(),
            for_ms,
        };
        let op = Some(self.bus.open(Some(&unit), kind));
        let Deed { detail, undo, act } = deed;
        let record = Record { id, unit, fault, detail, begun, ends, boot: boot_id(), op, undo };
        // The way back is on disk before the deed.
        if lasting.is_some()
            && let Err(error) = self.write(&record).await
        {
            self.trouble(&record, format!("nothing was done: {error}"));
            return Err(error);
        }
        let (end, ended) = oneshot::channel();
        self.active().insert(record.id.clone(), Active { record: record.clone(), end: Some(end) });
        Ok((record, act, ended))
    }

    fn trouble(&self, record: &Record, error: String) {
        let kind = Kind::FaultTrouble { id: record.id.clone(), error };
        self.bus.emit(Some(&record.unit), record.op, kind);
    }

    async fn carry_out(
        self: &Arc<Self>,
        record: Record,
        act: Act,
        ended: oneshot::Receiver<&'static str>,
        another_run: impl Future<Output = ()> + Send + 'static,
        lasting: Option<Duration>,
    ) -> Result<Record, InjectError> {
        let watch = match act.perform(&record, &self.systemd, self.options.job_deadline).await {
            Ok(watch) => watch,
            Err(error) => {
                self.trouble(&record, error.to_string());
                // It may take its time; what the person is told does not depend on it.
                self.finish_beside(record, "it could not be done");
                return Err(error);
            }
        };
        let Some(lasting) = lasting else {
            self.finish(record.clone(), "done").await;
            return Ok(record);
        };
        let (faults, ending) = (Arc::clone(self), record.clone());
        tokio::spawn(async move {
            let why = tokio::select! {
                () = tokio::time::sleep(lasting) => "time",
                asked = ended => asked.unwrap_or("person"),
                gone = watch.gone() => match gone {
                    Ok(()) => "done",
                    Err(error) => {
                        faults.trouble(&ending, error);
                        "it had no effect"
                    }
                },
                () = another_run => "healed",
            };
            faults.finish(ending, why).await;
        });
        Ok(record)
    }

    async fn write(&self, record: &Record) -> Result<(), InjectError> {
        let (dir, path, record) = (self.dir.clone(), self.path(&record.id), record.clone());
        let what = format!("{}: writing the undo record", path.display());
        let write = move || {
            fs::create_dir_all(&dir)?;
            write_durably(&path, &serde_json::to_vec_pretty(&record)?)
        };
        // A disk that takes its time must not hold up the others.
        let written = tokio::task::spawn_blocking(write).await;
        written.map_err(io::Error::other).flatten().map_err(failed(what))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// Undoes a fault, however often it takes, and takes it off the list.
    async fn finish(&self, record: Record, why: &str) {
        let mut wait = UNDO_AGAIN.0;
        let mut told = String::new();
        while let Err(error) = self.undo(&record).await {
            if error != told {
                self.trouble(&record, format!("it is not undone yet: {error}"));
                told = error;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(UNDO_AGAIN.1);
        }
        self.active().remove(&record.id);
        let kind = Kind::FaultUndone { id: record.id.clone(), why: why.into() };
        self.bus.emit(Some(&record.unit), record.op, kind);
    }

    async fn undo(&self, record: &Record) -> Result<(), String> {
        let same_boot = record.boot == boot_id();
        let mut errors = Vec::new();
        for undo in record.undo.iter().rev().filter(|undo| same_boot || undo.outlives_the_boot()) {
            if let Err(error) = undo.run(&self.systemd, self.options.job_deadline).await {
                errors.push(error);
            }
        }
        if !errors.is_empty() {
            return Err(errors.join("; "));
        }
        let path = self.path(&record.id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(format!("{}: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// A fault that is about to be injected: everything is checked, nothing is touched yet.
struct Deed {
    detail: String,
    undo: Vec<Undo>,
    act: Act,
}

enum Act {
    Stop,
    Signal(Signal, Vec<u32>),
    /// Not `cgroup.freeze`: systemd starts a unit's control processes inside the unit's cgroup and waits
    /// for them to execute; in a frozen one that wait, and with it PID 1, would not end.
    Halt(PathBuf),
    Oom {
        /// The victim.
        main: u32,
        /// Where the limit goes.
        place: OomPlace,
        helper: Option<balloon::Balloon>,
    },
}

enum OomPlace {
    /// The unit's own cgroup, which the helper joins, with a lower limit. systemd is not asked to set it: it
    /// would leave drop-ins behind, and its own idea of the limit is what a new run of the unit gets.
    Unit { limit: u64, cgroup: PathBuf },
    /// A group of its own in the memory controller's hierarchy, on hybrid hosts.
    Group { limit: u64, group: PathBuf },
}

/// Something whose end also ends the fault.
struct Watched(Option<(balloon::Balloon, u32)>);

impl Watched {
    /// Returns when the helper has ended; an error when the OOM killer took the helper and not the victim.
    async fn gone(self) -> Result<(), String> {
        let Some((mut balloon, victim)) = self.0 else { return std::future::pending().await };
        let start = start_time(victim);
        balloon.ended().await;
        if start.is_some() && start_time(victim) == start {
            return Err(format!("the OOM killer spared process {victim} and took the helper"));
        }
        Ok(())
    }
}

impl Deed {
    fn stop(unit: &str) -> Self {
        Self { detail: format!("stop {unit}"), undo: vec![Undo::Start(unit.to_owned())], act: Act::Stop }
    }

    fn kill(view: &UnitView, signal: Signal, whole: bool) -> Result<Self, InjectError> {
        // They end nothing and have no end of their own.
        if matches!(signal, Signal::SIGSTOP | Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU) {
            let text = format!("{signal} would stop the unit for ever: use hang, which has an end");
            return Err(InjectError::Parameter(text));
        }
        let pids = if whole {
            cgroup::processes(&directory(view)?).map_err(failed("listing the processes"))?
        } else {
            vec![view.main_pid]
        };
        if pids.is_empty() || pids.contains(&0) {
            return Err(InjectError::Parameter("the unit has no main process".into()));
        }
        let whom =
            if whole { format!("all {} processes", pids.len()) } else { format!("main process {}", pids[0]) };
        Ok(Self { detail: format!("{signal} to {whom}"), undo: Vec::new(), act: Act::Signal(signal, pids) })
    }

    fn hang(view: &UnitView) -> Result<Self, InjectError> {
        let dir = directory(view)?;
        let detail = format!("SIGSTOP to all of {}", view.control_group);
        Ok(Self { detail, undo: vec![Undo::Continue(dir.clone())], act: Act::Halt(dir) })
    }

    fn oom(unit: &str, view: &UnitView, room: u64) -> Result<Self, InjectError> {
        let main = view.main_pid;
        if main == 0 {
            return Err(InjectError::Parameter("the unit has no main process".into()));
        }
        let cgroup = directory(view)?;
        let mut undo = Vec::new();
        let place = if let Ok(used) = fs::read_to_string(cgroup.join("memory.current")) {
            let inode = fs::metadata(&cgroup).map_err(failed("looking at the unit's cgroup"))?.ino();
            for name in LIMITS {
                let file = cgroup.join(name);
                // There is no limit of swap on a kernel without swap accounting.
                if let Ok(content) = fs::read_to_string(&file) {
                    undo.push(Undo::CgroupFile { file, inode, content });
                }
            }
            let limit = used.trim().parse::<u64>().unwrap_or(0) + room;
            OomPlace::Unit { limit, cgroup }
        } else if let Some(mount) = cgroup::v1_memory_mount() {
            let own = fs::read_to_string(format!("/proc/{main}/cgroup")).unwrap_or_default();
            let own = own.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                let controllers = fields.next()?;
                controllers.split(',').any(|c| c == "memory").then(|| fields.next())?
            });
            let back_to = mount.join(own.unwrap_or("/").trim_start_matches('/'));
            let group = mount.join(format!("ftd-fault-{main}"));
            undo.push(Undo::RemoveGroup { group: group.clone(), back_to });
            OomPlace::Group { limit: room, group }
        } else {
            return Err(InjectError::Unfit {
                unit: unit.to_owned(),
                cause: "has no memory controller: its memory cannot be limited".into(),
                mend:
                    "boot with systemd.unified_cgroup_hierarchy=1, and set MemoryAccounting=yes on the unit"
                        .into(),
            });
        };
        let adjust = fs::read_to_string(format!("/proc/{main}/oom_score_adj"))
            .map_err(failed(format!("reading the OOM score of process {main}")))?;
        undo.push(Undo::OomScore {
            pid: main,
            start: start_time(main).unwrap_or(0),
            adjust: adjust.trim().parse().unwrap_or(0),
        });
        let (OomPlace::Unit { limit, .. } | OomPlace::Group { limit, .. }) = &place;
        let detail = format!("memory limit of {} MiB around main process {main}, filled", limit >> 20);
        Ok(Self { detail, undo, act: Act::Oom { main, place, helper: None } })
    }
}

impl Act {
    async fn perform(
        self,
        record: &Record,
        systemd: &Systemd,
        limit: Duration,
    ) -> Result<Watched, InjectError> {
        match self {
            Self::Stop => {
                let result = systemd.stop(&record.unit, limit).await;
                let result = result.map_err(|e| failed("stopping")(io::Error::other(e)))?;
                if result != "done" {
                    return Err(failed("stopping")(io::Error::other(format!("systemd says {result}"))));
                }
            }
            Self::Signal(signal, pids) => {
                for pid in pids {
                    match kill(Pid::from_raw(pid.cast_signed()), signal) {
                        // Gone before its turn: its parent took it along.
                        Ok(()) | Err(nix::Error::ESRCH) => {}
                        Err(error) => return Err(failed(format!("{signal} to {pid}"))(error.into())),
                    }
                }
            }
            Self::Halt(dir) => halt(&dir).map_err(failed("stopping the processes"))?,
            Self::Oom { main, place, helper } => {
                let mut helper = helper.ok_or_else(|| InjectError::Parameter("no helper process".into()))?;
                match &place {
                    OomPlace::Unit { limit, cgroup } => {
                        fs::write(cgroup.join("cgroup.procs"), helper.pid.to_string())
                            .map_err(failed("moving the helper into the unit's cgroup"))?;
                        for (name, value) in LIMITS.into_iter().zip(["0".to_owned(), limit.to_string()]) {
                            let file = cgroup.join(name);
                            if file.exists() {
                                fs::write(&file, value).map_err(failed(format!("{}", file.display())))?;
                            }
                        }
                    }
                    OomPlace::Group { limit, group } => {
                        let fill = || {
                            fs::create_dir(group)?;
                            fs::write(group.join("memory.limit_in_bytes"), limit.to_string())?;
                            fs::write(group.join("memory.swappiness"), "0")?;
                            fs::write(group.join("cgroup.procs"), main.to_string())?;
                            fs::write(group.join("cgroup.procs"), helper.pid.to_string())
                        };
                        fill().map_err(failed(format!("{}: making a memory cgroup", group.display())))?;
                    }
                }
                fs::write(format!("/proc/{main}/oom_score_adj"), "1000")
                    .map_err(failed(format!("making process {main} the preferred victim")))?;
                helper.inflate(main).await.map_err(failed("the helper process"))?;
                return Ok(Watched(Some((helper, main))));
            }
        }
        Ok(Watched(None))
    }
}

impl Undo {
    /// Whether it is still to be done after a restart of the host.
    fn outlives_the_boot(&self) -> bool {
        matches!(self, Self::Start(_))
    }

    async fn run(&self, systemd: &Systemd, limit: Duration) -> Result<(), String> {
        let text = |what: String| move |error: io::Error| format!("{what}: {error}");
        match self {
            Self::Continue(dir) => {
                let pids = match cgroup::processes(dir) {
                    Err(error) if cgroup::is_gone(&error) => return Ok(()),
                    pids => pids.map_err(text(format!("{}", dir.display())))?,
                };
                for pid in pids {
                    // ESRCH: it has ended meanwhile.
                    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGCONT);
                }
                Ok(())
            }
            Self::Start(unit) => match systemd.start(unit, limit).await {
                Ok(result) if result == "done" => Ok(()),
                Ok(result) => Err(format!("starting {unit}: systemd says {result}")),
                // Somebody is stopping it on purpose, and it is his now.
                Err(JobError::Contradicts(_)) => Ok(()),
                Err(error) => Err(format!("starting {unit}: {error}")),
            },
            Self::CgroupFile { file, inode, content } => {
                let dir = file.parent().unwrap_or(file);
                if fs::metadata(dir).map_or(true, |dir| dir.ino() != *inode) {
                    return Ok(());
                }
                match fs::write(file, content) {
                    Err(error) if cgroup::is_gone(&error) => Ok(()),
                    written => written.map_err(text(format!("{}", file.display()))),
                }
            }
            Self::EndProcess { pid, start } => {
                if start_time(*pid) == Some(*start) {
                    // ESRCH: it has ended meanwhile.
                    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
                }
                Ok(())
            }
            Self::OomScore { pid, start, adjust } => {
                if start_time(*pid) != Some(*start) {
                    return Ok(());
                }
                match fs::write(format!("/proc/{pid}/oom_score_adj"), adjust.to_string()) {
                    Err(error) if !cgroup::is_gone(&error) && error.raw_os_error() != Some(libc::ESRCH) => {
                        Err(text(format!("OOM score of {pid}"))(error))
                    }
                    _ => Ok(()),
                }
            }
            Self::RemoveGroup { group, back_to } => remove_group(group, back_to).await,
        }
    }
}

/// Stops every process of a cgroup. One that was about to fork when it was looked at leaves a child that
/// runs on: so it looks until there is nobody new.
fn halt(dir: &Path) -> io::Result<()> {
    let mut halted = BTreeSet::new();
    loop {
        let new: Vec<u32> = cgroup::processes(dir)?.into_iter().filter(|pid| halted.insert(*pid)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for pid in new {
            match kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP) {
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Empties and removes a memory cgroup. Processes that die leave it by themselves, but not at once.
async fn remove_group(group: &Path, back_to: &Path) -> Result<(), String> {
    const TRIES: u32 = 100;
    for _ in 0..TRIES {
        let Ok(pids) = cgroup::processes(group) else { return Ok(()) };
        for pid in pids {
            // One that is dying cannot be moved, and need not be.
            let _ = fs::write(back_to.join("cgroup.procs"), pid.to_string());
        }
        match fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // No event tells that the last dying process has left a v1 group.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    Err(format!("{} cannot be removed: something in it does not end", group.display()))
}

fn directory(view: &UnitView) -> Result<PathBuf, InjectError> {
    let dir = cgroup::directory(&view.control_group).filter(|dir| dir.is_dir());
    dir.ok_or_else(|| InjectError::Parameter(format!("there is no cgroup {}", view.control_group)))
}

fn parse_signal(request: &Request) -> Result<Signal, InjectError> {
    let Some(text) = &request.signal else { return Ok(Signal::SIGKILL) };
    let bad = || InjectError::Parameter(format!("\"{text}\" is no signal; use a name like TERM or a number"));
    if request.fault != Fault::Kill {
        return Err(InjectError::Parameter("--signal goes with kill".into()));
    }
    match text.parse::<i32>() {
        Ok(number) => Signal::try_from(number).map_err(|_| bad()),
        Err(_) => {
            let name = text.to_uppercase();
            let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
            name.parse().map_err(|_| bad())
        }
    }
}

/// When a process started, clock ticks since boot: field 22 of /proc/PID/stat, counted after the name,
/// which may itself contain blanks and parentheses.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    fn request(fault: Fault, signal: Option<&str>) -> Request {
        let signal = signal.map(str::to_owned);
        Request { unit: "a".into(), fault, signal, whole: false, for_ms: None }
    }

    #[test]
    fn signals_are_names_or_numbers_and_go_with_kill_only() {
        let parse = |text| parse_signal(&request(Fault::Kill, text));
        assert_eq!(parse(None).unwrap(), Signal::SIGKILL);
        assert_eq!(parse(Some("term")).unwrap(), Signal::SIGTERM);
        assert_eq!(parse(Some("SIGSEGV")).unwrap(), Signal::SIGSEGV);
        assert_eq!(parse(Some("9")).unwrap(), Signal::SIGKILL);
        assert!(parse(Some("SIGNOTHING")).is_err() && parse(Some("999")).is_err());
        assert!(parse_signal(&request(Fault::Hang, Some("TERM"))).is_err());
    }

    #[test]
    fn a_start_time_tells_a_process_from_another_with_its_id() {
        let own = start_time(std::process::id()).unwrap();
        assert!(own > 0);
        assert_eq!(start_time(std::process::id()), Some(own));
        assert_eq!(start_time(0), None);
    }

    #[tokio::test]
    async fn a_cgroup_file_gets_its_old_content_unless_the_cgroup_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.max");
        fs::write(&file, "100").unwrap();
        let inode = fs::metadata(dir.path()).unwrap().ino();
        let undo = |inode| Undo::CgroupFile { file: file.clone(), inode, content: "max".into() };
        assert_eq!(undo(inode + 1).run(&Systemd::default(), LIMIT).await, Ok(()));
        assert_eq!(fs::read_to_string(&file).unwrap(), "100");
        assert_eq!(undo(inode).run(&Systemd::default(), LIMIT).await, Ok(()));
        assert_eq!(fs::read_to_string(&file).unwrap(), "max");
    }

    #[test]
    fn signals_that_stop_a_process_are_refused() {
        let view = UnitView { main_pid: 1, ..UnitView::default() };
        for signal in ["STOP", "TSTP", "20"] {
            let signal = parse_signal(&request(Fault::Kill, Some(signal))).unwrap();
            let error = Deed::kill(&view, signal, false).err().unwrap().to_string();
            assert!(error.contains("use hang"), "{error}");
        }
    }

    #[tokio::test]
    async fn undoing_what_is_already_gone_succeeds() {
        let systemd = Systemd::default();
        for undo in [
            Undo::Continue("/nonexistent/cgroup".into()),
            Undo::EndProcess { pid: std::process::id(), start: 1 },
            Undo::OomScore { pid: 0, start: 1, adjust: 0 },
            Undo::CgroupFile { file: "/nonexistent/memory.max".into(), inode: 1, content: "max".into() },
            Undo::RemoveGroup { group: "/nonexistent/g".into(), back_to: "/nonexistent".into() },
        ] {
            assert_eq!(undo.run(&systemd, LIMIT).await, Ok(()), "{undo:?}");
        }
        let start = Undo::Start("a.service".into());
        assert!(start.run(&systemd, LIMIT).await.unwrap_err().contains("not connected"));
    }
}
