//! A running service into images, and images into the running service: not merely its processes, but the
//! systemd unit that they are.
//!
//! Processes that CRIU makes are nobody's service. For systemd to own them as before (main process, control
//! group, watchdog, reload, stop, journal) systemd itself must start them: so for the time of one start the
//! unit is told, by a drop-in below /run that is gone afterwards, that it is started by `criu restore` and has
//! a PID file. What systemd makes for a start is made as ever (its /tmp, its runtime directory, its view of the
//! file system), and into it CRIU puts the processes, with their old PIDs.
//!
//! ```text
//! dump and stop                                restore
//!   look: blockers? then nothing is touched      look: PIDs free, files as they were? else nothing is touched
//!   drop-in: a SIGKILL is no failure; reload     drop-in: start by criu restore; reload
//!   CRIU dumps; PostDump is the last word        job: start; CRIU makes the processes in the unit's group
//!   job: stop (there is nothing left of it)      drop-in away; reload: the unit is what it was
//!   drop-in away; reload
//!   network lock stays                           (CRIU has taken the network lock away)
//! ```
//!
//! A dump that leaves the service running touches nothing of systemd's at all. Several units that are stopped, or
//! restored, together need the two reloads once. systemd offers no way around them: at run time `SetUnitProperties`
//! changes limits of control groups, and nothing of what the drop-ins say.
//!
//! **What CRIU restores by itself** (user, capabilities, seccomp filters, no_new_privs) must not be imposed on
//! CRIU as well, for it needs its own powers meanwhile: the drop-in lifts those settings for this start. What they
//! say about mounts is given back by settings of another kind, see [`lifted`].
//!
//! **Connections** that were open at the dump are restored. Until then the kernel must not answer for them:
//! CRIU leaves a packet filter behind for that, a table `CRIU-…` of nftables. Where the
//! processes come back, CRIU removes it; where they have moved away with their address, [`release_network`] does.
//!
//! **After a crash of ftd** a drop-in may be left. It does nothing to a running unit, and [`sweep`] removes it. One
//! that is in use is locked (flock) by its maker, which may be another process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{
    After, Criu, CriuError, Dump, Dumped, Moment,
    check::{Report, judge},
    facts::{CriuFacts, Facts},
    images, log,
};
use crate::unit::{
    alias, cgroup,
    manager::{JobError, Service, Systemd},
};

/// Where units have drop-ins that are gone after a reboot.
const RUNTIME: &str = "/run/systemd/system";
/// The names of ours. They come last, so that they override all others.
const STOPPING: &str = "zz-ftd-dump.conf";
const STARTING: &str = "zz-ftd-restore.conf";
/// What is beside CRIU's images.
const MANIFEST: &str = "unit.json";
const PRIVATE_TMP: &str = "private-tmp.tar";
const RUNTIME_FILES: &str = "runtime.tar";
const TAR: &str = "/usr/bin/tar";
const NFT: &str = "/usr/sbin/nft";
/// The form of [`UnitImage`].
const VERSION: u32 = 1;
/// Directories that a unit may see other contents of than the host: images cannot be there.
const HIDDEN: [&str; 6] = ["/tmp", "/var/tmp", "/home", "/root", "/run/user", "/dev"];

/// Why a unit was not dumped or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// Something is in the way; nothing was touched.
    #[error("{} cannot be dumped: {}", .0.unit, .0.blockers())]
    Blocked(Box<Report>),
    /// It is not in the state that it should be in.
    #[error("{unit} is {state}: {mend}")]
    State {
        /// The unit.
        unit: String,
        /// Its state.
        state: String,
        /// What to do.
        mend: &'static str,
    },
    /// A PID that the restored processes need is taken; nothing was touched.
    #[error(
        "{unit} cannot be restored: its PID {pid} belongs to {owner} now. End that, or wait for its end, or start \
         the service without its memory"
    )]
    Taken {
        /// The unit.
        unit: String,
        /// The number.
        pid: u32,
        /// Whose it is.
        owner: String,
    },
    /// A file is not as it was; nothing was touched.
    #[error(
        "{unit} cannot be restored: {} {how}. Put the old file back, or choose a newer snapshot, or start the \
         service without its memory",
        path.display()
    )]
    Changed {
        /// The unit.
        unit: String,
        /// The file.
        path: PathBuf,
        /// How it differs.
        how: String,
    },
    /// The images are not what they should be.
    #[error("{} cannot be restored from: {cause}. Choose another snapshot", dir.display())]
    Images {
        /// Where they are.
        dir: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The images are where the unit cannot see them.
    #[error(
        "{} is no place for images: {unit} sees something else there. Choose one outside of {}",
        dir.display(),
        HIDDEN.join(", ")
    )]
    Hidden {
        /// The unit.
        unit: String,
        /// Where they are.
        dir: PathBuf,
    },
    /// systemd would not.
    #[error("{what} {unit}: {cause}")]
    Systemd {
        /// What was asked for.
        what: &'static str,
        /// The unit.
        unit: String,
        /// Why not.
        #[source]
        cause: JobError,
    },
    /// A file or a program could not be used.
    #[error("{what}: {cause}")]
    File {
        /// What.
        what: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// CRIU would not.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// The images are complete, and whoever was to take them has not: the units go on as before.
    #[error("{} is not stopped: its images were not taken over", .units.join(", "))]
    NotTaken {
        /// The units.
        units: Vec<String>,
    },
    /// Several things are in the way; nothing was touched.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Several(Vec<UnitError>),
    /// Some were restored, and run.
    #[error("{failure}\nrestored before it, and running: {}", .restored.join(", "))]
    Partly {
        /// The units that were.
        restored: Vec<String>,
        /// What stopped it.
        #[source]
        failure: Box<UnitError>,
    },
    /// It was started and did not come up.
    #[error("{unit} was not restored: {words}. {mend}")]
    Failed {
        /// The unit.
        unit: String,
        /// CRIU's first error, or systemd's word.
        words: String,
        /// What to do.
        mend: String,
    },
}

impl UnitError {
    /// One error of them all; `None` where there is none.
    fn of(mut errors: Vec<Self>) -> Option<Self> {
        if errors.len() > 1 { Some(Self::Several(errors)) } else { errors.pop() }
    }
}

fn file(what: impl Into<String>) -> impl FnOnce(io::Error) -> UnitError {
    let what = what.into();
    move |cause| UnitError::File { what, cause }
}

/// A dumped unit; kept beside CRIU's images as `unit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitImage {
    /// The form of this record.
    pub version: u32,
    /// The unit.
    pub unit: String,
    /// Its main process.
    pub main_pid: u32,
    /// The sockets through which it printed to the journal.
    pub journal: Vec<u64>,
    /// /dev/null as systemd had opened it, in CRIU's words.
    pub nulls: Vec<String>,
    /// Whether it saw other mounts than the host.
    pub own_mounts: bool,
    /// Whether the unit was stopped by the dump.
    pub stopped: bool,
    /// The machine's kind.
    pub machine: String,
    /// The kernel's release.
    pub kernel: String,
    /// CRIU's version.
    pub criu: super::Version,
    /// When.
    pub taken: jiff::Timestamp,
    /// What it cost.
    pub cost: Dumped,
}

/// How a unit is to be dumped.
#[derive(Debug, Clone, Copy)]
pub struct DumpUnit<'a> {
    /// An empty directory for the images.
    pub dir: &'a Path,
    /// Whether it goes on afterwards: [`After::Run`], or [`After::End`], which stops the unit.
    pub after: After,
    /// Time for the dump itself.
    pub limit: Duration,
}

/// A restored unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Its main process.
    pub main_pid: u32,
    /// From the request to the end, microseconds.
    pub took_us: u64,
    /// Of that, the start job: systemd's preparation and CRIU's work.
    pub start_us: u64,
}

/// What is in the way of dumping a unit.
pub async fn check(systemd: &Systemd, unit: &str) -> Result<Report, UnitError> {
    let service = service(systemd, unit).await?;
    blocking(move || judge(&Facts::read(&service))).await
}

/// The service with this name, or with the name that it has on this distribution.
pub(in crate::snapshot) async fn service(systemd: &Systemd, unit: &str) -> Result<Service, UnitError> {
    let asked = systemd.service(unit).await;
    if let Err(JobError::Refused(_)) = &asked {
        for other in alias::others(unit) {
            if let Ok(service) = systemd.service(other).await {
                return Ok(service);
            }
        }
    }
    asked.map_err(|cause| UnitError::Systemd { what: "asking about", unit: unit.into(), cause })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, UnitError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| file("a thread")(io::Error::other(error)))
}

/// A unit that was looked at, and that nothing keeps from being dumped.
#[derive(Debug, Clone)]
struct Looked {
    service: Service,
    /// What is not part of the tree, in CRIU's words.
    external: Vec<String>,
    /// The record, still without the cost.
    image: UnitImage,
}

impl Looked {
    async fn at(systemd: &Systemd, unit: &str, dir: &Path, after: After) -> Result<Self, UnitError> {
        let service = service(systemd, unit).await?;
        let facts = {
            let service = service.clone();
            blocking(move || Facts::read(&service)).await?
        };
        let report = judge(&facts);
        if !report.ready() {
            return Err(UnitError::Blocked(Box::new(report)));
        }
        let own_mounts = facts.own_mounts();
        visible(&service.id, dir, own_mounts)?;
        let journal: Vec<u64> = facts.journal_sockets().into_iter().collect();
        let nulls: Vec<String> = facts.unseen_nulls().into_iter().collect();
        let external = journal.iter().map(|inode| format!("unix[{inode}]"));
        let external = external.chain(nulls.iter().cloned()).collect();
        let criu = match facts.criu {
            CriuFacts::Found(abilities) => abilities.version,
            CriuFacts::Missing | CriuFacts::Broken { .. } => super::Version::default(),
        };
        let (machine, kernel) = machine();
        let image = UnitImage {
            version: VERSION,
            unit: service.id.clone(),
            main_pid: service.main_pid,
            journal,
            nulls,
            own_mounts,
            stopped: after == After::End,
            machine,
            kernel,
            criu,
            taken: jiff::Timestamp::now(),
            cost: Dumped::default(),
        };
        Ok(Self { service, external, image })
    }

    /// Has CRIU dump it. What stands in `dir` when the last word is asked for is complete, but for the cost.
    fn dump(
        mut self,
        criu: &Criu,
        dump: &DumpUnit<'_>,
        mut word: impl FnMut(Moment) -> bool,
    ) -> Result<UnitImage, UnitError> {
        let mut saved = Ok(());
        let request = Dump {
            external: self.external,
            limit: dump.limit,
            ..Dump::new(self.service.main_pid, dump.dir, dump.after)
        };
        let done = criu.dump(&request, |moment| {
            // Everything stands still: what is saved here fits what is in memory.
            if moment == Moment::PostDump {
                saved = save_files(dump.dir, &self.service).and_then(|()| self.image.write(dump.dir));
            }
            saved.is_ok() && word(moment)
        });
        saved?;
        self.image.cost = done?;
        self.image.write(dump.dir)?;
        Ok(self.image)
    }
}

/// Dumps a unit. `word` has the last word at each moment, see [`Criu::dump`].
pub async fn dump_unit(
    systemd: &Systemd,
    criu: &Criu,
    unit: &str,
    dump: DumpUnit<'_>,
    word: impl FnMut(Moment) -> bool + Send + 'static,
) -> Result<UnitImage, UnitError> {
    let looked = Looked::at(systemd, unit, dump.dir, dump.after).await?;
    let unit = looked.service.id.clone();
    let stopping = match dump.after {
        After::End => Some(Placed::new(systemd, vec![(unit.clone(), STOPPING, STOP_QUIETLY.into())]).await?),
        After::Run | After::Stop => None,
    };
    let image = {
        let (dir, criu) = (dump.dir.to_owned(), criu.clone());
        let (after, limit) = (dump.after, dump.limit);
        blocking(move || looked.dump(&criu, &DumpUnit { dir: &dir, after, limit }, word)).await?
    };
    if let Some(stopping) = stopping {
        // The processes are dead. The job ends when systemd knows that too, whichever comes first.
        let stopped = match &image {
            Ok(_) => systemd.stop(&unit, dump.limit).await.map(drop),
            Err(_) => Ok(()),
        };
        stopping.remove(systemd).await?;
        stopped.map_err(|cause| UnitError::Systemd { what: "stopping", unit, cause })?;
    }
    image
}

/// Dumps units, each into its directory, and stops them: all of them or none. They are frozen one after another;
/// when all images are complete, and every process stands still, `take` takes them over. Only after its yes
/// do processes end. Until then any failure, and the end of this process too, lets all of them go on.
pub async fn dump_and_stop(
    systemd: &Systemd,
    criu: &Criu,
    units: &[(String, PathBuf)],
    limit: Duration,
    take: impl Future<Output = bool>,
) -> Result<Vec<UnitImage>, UnitError> {
    let mut looked = Vec::new();
    for (unit, dir) in units {
        looked.push((Looked::at(systemd, unit, dir, After::End).await?, dir.clone()));
    }
    let ids: Vec<String> = looked.iter().map(|(looked, _)| looked.service.id.clone()).collect();
    let drop_ins = ids.iter().map(|unit| (unit.clone(), STOPPING, STOP_QUIETLY.into())).collect();
    let stopping = Placed::new(systemd, drop_ins).await?;
    let ended = dump_all(criu, looked, limit, take, &ids).await;
    let mut stopped = Ok(());
    if ended.is_ok() {
        for unit in ids.iter().rev() {
            // The processes are dead: there is nothing to wait for but systemd's taking notice.
            let job = systemd.stop(unit, limit).await.map(drop);
            let failed = |cause| UnitError::Systemd { what: "stopping", unit: unit.clone(), cause };
            stopped = stopped.and(job.map_err(failed));
        }
    }
    stopping.remove(systemd).await?;
    let images = ended?;
    stopped.map(|()| images)
}

async fn dump_all(
    criu: &Criu,
    looked: Vec<(Looked, PathBuf)>,
    limit: Duration,
    take: impl Future<Output = bool>,
    ids: &[String],
) -> Result<Vec<UnitImage>, UnitError> {
    let (mut frozen, mut failure, mut all) = (Vec::new(), None, true);
    for (looked, dir) in looked {
        let (reached, complete) = oneshot::channel();
        // Dropped, it says no.
        let (verdict, word) = mpsc::channel();
        let (criu, mut reached) = (criu.clone(), Some(reached));
        let mut dump = tokio::task::spawn_blocking(move || {
            let dump = DumpUnit { dir: &dir, after: After::End, limit };
            looked.dump(&criu, &dump, |moment| {
                if moment != Moment::PostDump {
                    return true;
                }
                // Nobody waits for it any more if that fails, and then nobody says yes.
                let _ = reached.take().map(|reached| reached.send(()));
                word.recv().unwrap_or(false)
            })
        });
        tokio::select! {
            biased;
            Ok(()) = complete => frozen.push((dump, verdict)),
            done = &mut dump => {
                (failure, all) = (joined(done).err(), false);
                break;
            }
        }
    }
    let yes = all && take.await;
    let mut images = Vec::new();
    for (_, verdict) in &frozen {
        let _ = verdict.send(yes);
    }
    for (dump, verdict) in frozen {
        drop(verdict);
        match joined(dump.await) {
            Ok(image) => images.push(image),
            Err(error) if yes => failure = failure.or(Some(error)),
            // It was called off, as it was told to.
            Err(_) => {}
        }
    }
    match failure {
        Some(error) => Err(error),
        None if yes => Ok(images),
        None => Err(UnitError::NotTaken { units: ids.to_vec() }),
    }
}

fn joined<T>(done: Result<Result<T, UnitError>, tokio::task::JoinError>) -> Result<T, UnitError> {
    done.map_err(|error| file("a thread")(io::Error::other(error)))?
}

/// What a restore may take for granted when it looks at what is in the way.
#[derive(Debug, Clone, Default)]
pub struct Granted {
    /// Units that run are stopped before: their processes, and that they run, are in nobody's way.
    pub stopped: bool,
    /// Files that are put back before, and their sizes then.
    pub files: BTreeMap<PathBuf, u64>,
}

/// All that is in the way of restoring units, each from its directory. Empty: nothing, as far as can be seen.
pub async fn in_the_way(systemd: &Systemd, units: &[(String, PathBuf)], granted: &Granted) -> Vec<UnitError> {
    let mut errors = Vec::new();
    for (unit, dir) in units {
        match look(systemd, unit, dir, granted).await {
            Ok((_, _, found)) => errors.extend(found),
            Err(error) => errors.push(error),
        }
    }
    errors
}

/// Looks whether a unit can be restored: what systemd says of it, the record, and what is in the way.
async fn look(
    systemd: &Systemd,
    unit: &str,
    dir: &Path,
    granted: &Granted,
) -> Result<(Service, UnitImage, Vec<UnitError>), UnitError> {
    let service = service(systemd, unit).await?;
    let image = UnitImage::read(dir)?;
    image.fits(dir, &service.id)?;
    let mut errors = Vec::new();
    let down = matches!(service.active_state.as_str(), "inactive" | "failed");
    if !down && !granted.stopped {
        let mend = "stop it first (--stop): what it holds in memory now would be lost";
        let (unit, state) = (service.id.clone(), service.active_state.clone());
        errors.push(UnitError::State { unit, state, mend });
    }
    errors.extend(visible(&service.id, dir, image.own_mounts).err());
    let own = if down { BTreeSet::new() } else { ids_of(&service) };
    let (unit, dir, mounts) = (service.id.clone(), dir.to_owned(), image.own_mounts);
    let files = granted.files.clone();
    errors.extend(blocking(move || misfits(&unit, &dir, mounts, &own, &files)).await??);
    Ok((service, image, errors))
}

/// The numbers of a running unit's processes and threads.
fn ids_of(service: &Service) -> BTreeSet<u32> {
    let dir = cgroup::directory(&service.control_group);
    let pids = dir.and_then(|dir| cgroup::processes(&dir).ok()).unwrap_or_default();
    let tasks = pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok());
    let tasks = tasks.flatten().flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
    tasks.chain(pids.iter().copied()).collect()
}

/// Restores a unit that is down, from images that [`dump_unit`] made.
pub async fn restore_unit(
    systemd: &Systemd,
    criu: &Criu,
    unit: &str,
    dir: &Path,
    limit: Duration,
) -> Result<Restored, UnitError> {
    let mut restored = restore_units(systemd, criu, &[(unit.to_owned(), dir.to_owned())], limit).await?;
    // One goes in, and one comes out.
    restored.pop().ok_or_else(|| UnitError::Several(Vec::new()))
}

/// Restores units that are down, one after another. Nothing is touched unless nothing is in the way of any.
pub async fn restore_units(
    systemd: &Systemd,
    criu: &Criu,
    units: &[(String, PathBuf)],
    limit: Duration,
) -> Result<Vec<Restored>, UnitError> {
    let begun = Instant::now();
    let (mut ready, mut errors) = (Vec::new(), Vec::new());
    for (unit, dir) in units {
        match look(systemd, unit, dir, &Granted::default()).await {
            Ok((service, image, found)) => {
                errors.extend(found);
                ready.push((service, image, dir.as_path()));
            }
            Err(error) => errors.push(error),
        }
    }
    if let Some(error) = UnitError::of(errors) {
        return Err(error);
    }
    let mut drop_ins = Vec::new();
    for (service, image, dir) in &ready {
        let pid_file = pid_file_of(service);
        let text = start_by_criu(service, image, criu.program(), dir, &pid_file, limit);
        let _ = fs::remove_file(dir.join("restore.log"));
        drop_ins.push((service.id.clone(), STARTING, text));
    }
    let starting = Placed::new(systemd, drop_ins).await?;
    let (mut restored, mut failure) = (Vec::new(), None);
    for (service, image, dir) in &ready {
        let start = Instant::now();
        let job = systemd.start(&service.id, limit + JOB_MARGIN).await;
        let start_us = start.elapsed().as_micros() as u64;
        if service.pid_file.is_none() {
            // systemd has read it. Only ours: the unit's own belongs to the unit.
            let _ = fs::remove_file(pid_file_of(service));
        }
        match is_back(systemd, service, image, dir, job).await {
            Ok(main_pid) => {
                let took_us = begun.elapsed().as_micros() as u64;
                restored.push(Restored { main_pid, took_us, start_us });
            }
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    starting.remove(systemd).await?;
    match failure {
        None => Ok(restored),
        Some(failure) if restored.is_empty() => Err(failure),
        Some(failure) => {
            let names = ready.iter().zip(&restored).map(|((service, ..), _)| service.id.clone());
            Err(UnitError::Partly { restored: names.collect(), failure: Box::new(failure) })
        }
    }
}

fn pid_file_of(service: &Service) -> PathBuf {
    let own = || format!("/run/{}.ftd-restore.pid", service.id);
    service.pid_file.clone().unwrap_or_else(own).into()
}

/// Whether a start job has made the unit what it was; its main process.
async fn is_back(
    systemd: &Systemd,
    service: &Service,
    image: &UnitImage,
    dir: &Path,
    job: Result<String, JobError>,
) -> Result<u32, UnitError> {
    let unit = &service.id;
    let result = job.map_err(|cause| UnitError::Systemd { what: "restoring", unit: unit.clone(), cause })?;
    if result != "done" {
        return Err(why_not(unit, dir, &result));
    }
    let now = self::service(systemd, unit).await?;
    if now.main_pid != image.main_pid {
        let words = format!("systemd takes {} for its main process, not {}", now.main_pid, image.main_pid);
        let mend = "See: systemctl status".to_owned();
        return Err(UnitError::Failed { unit: unit.clone(), words, mend });
    }
    Ok(now.main_pid)
}

/// What systemd may take on top of CRIU's own limit.
const JOB_MARGIN: Duration = Duration::from_secs(10);

/// The packet filter that CRIU left to keep a dumped unit's connections silent.
pub fn network_lock(dir: &Path) -> Result<String, UnitError> {
    images::network_lock(dir).map_err(|error| UnitError::Images {
        dir: dir.to_owned(),
        cause: format!("the name of CRIU's network lock cannot be read: {error}"),
    })
}

/// Removes that packet filter. Nothing to remove is no error: CRIU makes none where there is no connection.
pub async fn release_network(table: String) -> Result<(), UnitError> {
    blocking(move || {
        let mut nft = Command::new(NFT);
        // `destroy` would take a missing one for done, but needs Linux 6.3.
        nft.args(["delete", "table", "inet", &table]);
        match run(nft, "nft (package nftables), which removes CRIU's network lock") {
            Err(UnitError::File { cause, .. }) if cause.to_string().contains("No such file") => Ok(()),
            removed => removed,
        }
    })
    .await?
}

/// Removes what a crashed ftd has left below /run/systemd/system; says how many.
pub async fn sweep(systemd: &Systemd) -> Result<usize, UnitError> {
    let mut swept = 0;
    for entry in fs::read_dir(RUNTIME).into_iter().flatten().flatten() {
        for name in [STOPPING, STARTING] {
            let path = entry.path().join(name);
            let Ok(file) = fs::File::open(&path) else { continue };
            let Ok(_ours) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            if fs::remove_file(&path).is_ok() {
                swept += 1;
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
    if swept > 0 {
        reload(systemd).await?;
    }
    Ok(swept)
}

// === Drop-ins ===

/// systemd must take the end of the main process for a stop, do nothing about it, and keep what the unit has in
/// /run.
const STOP_QUIETLY: &str = "[Service]\nRestart=no\nSuccessExitStatus=SIGKILL\nRuntimeDirectoryPreserve=yes\n\
                            ExecStop=\nExecStopPost=\n";

/// Drop-ins that hold while something is done.
#[derive(Debug)]
struct Placed(Vec<DropIn>);

impl Placed {
    /// Puts drop-ins in place, each a unit, a name and a text, and has systemd read them.
    async fn new(systemd: &Systemd, wanted: Vec<(String, &str, String)>) -> Result<Self, UnitError> {
        let mut placed = Vec::new();
        for (unit, name, text) in wanted {
            let path = Path::new(RUNTIME).join(format!("{unit}.d")).join(name);
            let what = format!("{} cannot be written", path.display());
            // From here on an error removes it.
            placed.push(DropIn::write(path, &text).map_err(file(what))?);
        }
        reload(systemd).await?;
        Ok(Self(placed))
    }

    async fn remove(self, systemd: &Systemd) -> Result<(), UnitError> {
        let Self(drop_ins) = self;
        drop(drop_ins);
        reload(systemd).await
    }
}

async fn reload(systemd: &Systemd) -> Result<(), UnitError> {
    let failed = |cause| UnitError::Systemd { what: "reloading", unit: "unit files".into(), cause };
    systemd.reload_files().await.map_err(failed)
}

#[derive(Debug)]
struct DropIn {
    path: PathBuf,
    /// Tells a [`sweep`] that it is in use.
    _lock: Flock<fs::File>,
}

impl DropIn {
    fn write(path: PathBuf, text: &str) -> io::Result<Self> {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(RUNTIME)))?;
        loop {
            let file = fs::File::create(&path)?;
            let inode = file.metadata()?.ino();
            let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
            // Between the two a sweep may have taken it for left over.
            if fs::metadata(&path).is_ok_and(|meta| meta.ino() == inode) {
                let drop_in = Self { path, _lock: lock };
                fs::write(&drop_in.path, text)?;
                return Ok(drop_in);
            }
        }
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a drop-in cannot be removed");
        }
        if let Some(dir) = self.path.parent() {
            // It is the unit's, and may hold others.
            let _ = fs::remove_dir(dir);
        }
    }
}

/// The drop-in for a start by `criu restore`.
fn start_by_criu(
    service: &Service,
    image: &UnitImage,
    criu: &Path,
    dir: &Path,
    pid_file: &Path,
    limit: Duration,
) -> String {
    let path = |path: &Path| quoted(&path.display().to_string());
    let mut text = String::from("[Service]\n");
    let mut line = |args: std::fmt::Arguments<'_>| {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{args}");
    };
    line(format_args!("Type=forking\nNotifyAccess=main\nRestart=no\nGuessMainPID=no"));
    line(format_args!("PIDFile={}", escaped(&pid_file.display().to_string())));
    line(format_args!("TimeoutStartSec={}", limit.as_secs().max(1)));
    line(format_args!("ExecCondition=\nExecStartPre=\nExecStartPost=\nExecStart="));
    // As root and outside of the unit's view: /run may be closed to it.
    if let Some(parent) = pid_file.parent() {
        line(format_args!("ExecStartPre=-+/usr/bin/mkdir -p {}", path(parent)));
    }
    line(format_args!("ExecStartPre=-+/usr/bin/rm -f {}", path(pid_file)));
    for name in [PRIVATE_TMP, RUNTIME_FILES] {
        let archive = dir.join(name);
        if archive.exists() {
            // As root, within the unit's view: that is where its /tmp is.
            line(format_args!("ExecStartPre=!{TAR} -C / -xpf {}", path(&archive)));
        }
    }
    let mut start = format!(
        "ExecStart=!{} --no-default-config restore --restore-detached --pidfile {} -D {} -v4 -o restore.log \
         --manage-cgroups=ignore --network-lock nftables --tcp-established --file-locks --link-remap --ext-unix-sk",
        path(criu),
        path(pid_file),
        path(dir)
    );
    for inode in &image.journal {
        // CRIU's standard output is the journal's new end of the unit.
        let _ = write!(start, " --inherit-fd fd[1]:socket:[{inode}]");
    }
    for null in &image.nulls {
        let _ = write!(start, " --inherit-fd fd[0]:{null}");
    }
    line(format_args!("{start}"));
    line(format_args!("StandardInput=null"));
    if image.journal.is_empty() && !image.nulls.is_empty() {
        // One for reading and writing: it may have been the standard output, too.
        line(format_args!("StandardInput=file:/dev/null\nStandardOutput=file:/dev/null"));
    }
    let program = service.program.as_deref().and_then(|program| program.rsplit('/').next());
    if let Some(identifier) = service.syslog_identifier.as_deref().or(program) {
        line(format_args!("SyslogIdentifier={}", escaped(identifier)));
    }
    if image.own_mounts {
        line(format_args!("ReadWritePaths={} /run", path(dir)));
    }
    text.push_str(LIFTED);
    text.push_str(&lifted(service));
    text
}

/// What CRIU restores by itself, and would be kept from by.
const LIFTED: &str = "CapabilityBoundingSet=\nCapabilityBoundingSet=~\nNoNewPrivileges=no\nSystemCallFilter=\n\
                      SystemCallArchitectures=\nRestrictNamespaces=no\nRestrictAddressFamilies=\n\
                      RestrictSUIDSGID=no\nRestrictRealtime=no\nMemoryDenyWriteExecute=no\nLockPersonality=no\n\
                      ProtectClock=no\nProtectHostname=no\nProtectKernelModules=no\nProtectKernelTunables=no\n\
                      ProtectKernelLogs=no\nProtectControlGroups=no\nPrivateDevices=no\nProtectProc=default\n\
                      ProcSubset=all\nRootDirectory=\n";

/// These come with filters of system calls too, which would stay with the processes on top of their own. What they
/// do to mounts is done here by settings that have none, as systemd's own manual describes them
/// (systemd.exec(5)).
fn lifted(service: &Service) -> String {
    let mut text = String::new();
    if service.protect_tunables {
        text.push_str("ReadOnlyPaths=-/proc/sys -/sys -/proc/sysrq-trigger -/proc/irq -/proc/bus\n");
        text.push_str("InaccessiblePaths=-/proc/kallsyms -/proc/kcore\n");
    }
    if service.protect_control_groups {
        text.push_str("ReadOnlyPaths=-/sys/fs/cgroup\n");
    }
    if service.protect_logs {
        text.push_str("InaccessiblePaths=-/proc/kmsg -/dev/kmsg\n");
    }
    if service.private_devices {
        text.push_str("DevicePolicy=closed\n");
    }
    text
}

/// A word as systemd reads it in a command line, see systemd.service(5), "Command lines".
fn quoted(word: &str) -> String {
    let word = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{word}\"")
}

/// A value as systemd reads it, see systemd.unit(5), "Specifiers".
fn escaped(value: &str) -> String {
    value.replace('%', "%%")
}

// === Looking, before anything is touched ===

fn visible(unit: &str, dir: &Path, own_mounts: bool) -> Result<(), UnitError> {
    if own_mounts && HIDDEN.iter().any(|hidden| dir.starts_with(hidden)) {
        return Err(UnitError::Hidden { unit: unit.into(), dir: dir.into() });
    }
    Ok(())
}

/// Which PIDs are not free, but for the unit's `own`, and which files are not as they were, nor will be so when
/// `put_back`.
fn misfits(
    unit: &str,
    dir: &Path,
    own_mounts: bool,
    own: &BTreeSet<u32>,
    put_back: &BTreeMap<PathBuf, u64>,
) -> Result<Vec<UnitError>, UnitError> {
    let damaged = |error: io::Error| UnitError::Images { dir: dir.into(), cause: error.to_string() };
    let mut errors = Vec::new();
    for pid in images::tree(dir).map_err(damaged)?.ids {
        // Threads too can be asked for by their number, though they are not listed.
        if !own.contains(&pid)
            && let Ok(comm) = fs::read_to_string(format!("/proc/{pid}/comm"))
        {
            errors.push(UnitError::Taken { unit: unit.into(), pid, owner: comm.trim().to_owned() });
        }
    }
    for needed in images::needed_files(dir).map_err(damaged)? {
        // What systemd makes anew for this start, or what only the unit sees.
        let below = |places: &[&str]| places.iter().any(|place| needed.path.starts_with(place));
        if below(&["/proc", "/sys", "/run"]) || own_mounts && below(&HIDDEN) {
            continue;
        }
        if let Some(how) = difference(&needed, put_back.get(&needed.path).copied()) {
            errors.push(UnitError::Changed { unit: unit.into(), path: needed.path, how });
        }
    }
    Ok(errors)
}

/// How a file is not what CRIU will want.
fn difference(needed: &images::NeededFile, put_back: Option<u64>) -> Option<String> {
    let other_size = |found: u64| {
        let size = needed.size.filter(|size| *size != found)?;
        Some(format!("has {found} bytes now, and had {size}"))
    };
    if let Some(size) = put_back {
        return other_size(size).map(|how| how.replace(" now", " in the snapshot"));
    }
    let meta = match fs::metadata(&needed.path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some("is missing".into()),
        Err(error) => return Some(format!("cannot be looked at: {error}")),
    };
    if !meta.is_file() {
        return None;
    }
    if let Some(how) = other_size(meta.len()) {
        return Some(how);
    }
    match (needed.build_id.is_empty(), images::build_id(&needed.path)) {
        (false, Ok(found)) if !needed.has_build_id(found.as_deref()) => {
            Some("is another build now (its build-id differs)".into())
        }
        (false, Err(error)) => Some(format!("cannot be read: {error}")),
        _ => None,
    }
}

fn why_not(unit: &str, dir: &Path, result: &str) -> UnitError {
    let log = fs::read(dir.join("restore.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let (words, known) = match log::first_error(&log) {
        Some(words) => (format!("CRIU says: {words}"), log::mend(words)),
        None => (format!("systemd says: {result}"), None),
    };
    let look = || format!("See {}, and journalctl -u {unit}", dir.join("restore.log").display());
    UnitError::Failed { unit: unit.into(), words, mend: known.map_or_else(look, str::to_owned) }
}

// === Files that go with the memory ===

/// Saves what only this unit has in the file system and loses when it stops.
fn save_files(dir: &Path, service: &Service) -> Result<(), UnitError> {
    let root = PathBuf::from(format!("/proc/{}/root", service.main_pid));
    let archive = |name: &str, paths: &[String]| {
        let mut tar = Command::new(TAR);
        tar.arg("-C").arg(&root).args(["--warning=no-file-ignored", "--numeric-owner", "--xattrs", "-cpf"]);
        tar.arg(dir.join(name)).arg("--").args(paths);
        run(tar, &format!("{TAR}, which saves {}", paths.join(" and ")))
    };
    if service.private_tmp {
        archive(PRIVATE_TMP, &["tmp".into(), "var/tmp".into()])?;
    }
    // `NAME` or `NAME:LINK`
    let own = service.runtime_directories.iter().filter_map(|entry| entry.split(':').next());
    let own: Vec<_> = own.map(|name| format!("run/{name}")).filter(|path| root.join(path).exists()).collect();
    if own.is_empty() { Ok(()) } else { archive(RUNTIME_FILES, &own) }
}

fn run(mut command: Command, what: &str) -> Result<(), UnitError> {
    command.stdin(Stdio::null()).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    let output = command.output().map_err(file(format!("{what}, cannot be started")))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(file(format!("{what}, failed"))(io::Error::other(words.trim().to_owned())))
}

// === The record ===

/// The machine's kind, and the kernel's release.
fn machine() -> (String, String) {
    let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
    nix::sys::utsname::uname().map(|name| (text(name.machine()), text(name.release()))).unwrap_or_default()
}

/// What every form of the record has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl UnitImage {
    /// Reads the record beside the images in `dir`.
    pub fn read(dir: &Path) -> Result<Self, UnitError> {
        let damaged = |cause: String| UnitError::Images { dir: dir.into(), cause };
        let text = fs::read(dir.join(MANIFEST)).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let read = |error: serde_json::Error| damaged(format!("{MANIFEST}: {error}"));
        match serde_json::from_slice(&text).map_err(read)? {
            Versioned { version: VERSION } => serde_json::from_slice(&text).map_err(read),
            Versioned { version } => Err(damaged(format!(
                "it was made by a newer ftd (version {version}; this one reads {VERSION})"
            ))),
        }
    }

    fn write(&self, dir: &Path) -> Result<(), UnitError> {
        let path = dir.join(MANIFEST);
        let what = format!("{} cannot be written", path.display());
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other);
        text.and_then(|text| fs::write(&path, text)).map_err(file(what))
    }

    /// Whether it is of this unit and this kind of machine.
    fn fits(&self, dir: &Path, unit: &str) -> Result<(), UnitError> {
        let (machine, _) = machine();
        let cause = if self.unit != unit {
            format!("it is of {}, not of {unit}", self.unit)
        } else if self.machine != machine {
            format!("it is of a machine of the kind {}; this is {machine}", self.machine)
        } else {
            return Ok(());
        };
        Err(UnitError::Images { dir: dir.into(), cause })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> UnitImage {
        UnitImage {
            version: VERSION,
            unit: "x.service".into(),
            main_pid: 71,
            journal: vec![5, 9],
            nulls: vec!["file[51:4]".into()],
            own_mounts: true,
            stopped: true,
            machine: machine().0,
            kernel: String::new(),
            criu: super::super::Version::new(4, 2),
            taken: jiff::Timestamp::UNIX_EPOCH,
            cost: Dumped::default(),
        }
    }

    #[test]
    fn the_record_is_kept_and_a_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(UnitImage::read(dir.path()).unwrap_err().to_string().contains(MANIFEST));
        image().write(dir.path()).unwrap();
        assert_eq!(UnitImage::read(dir.path()).unwrap(), image());
        let text = fs::read_to_string(dir.path().join(MANIFEST)).unwrap();
        fs::write(dir.path().join(MANIFEST), text.replace("\"version\": 1,", "\"version\": 2,")).unwrap();
        let error = UnitImage::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("newer ftd"), "{error}");
        fs::write(dir.path().join(MANIFEST), &text[..text.len() / 2]).unwrap();
        assert!(UnitImage::read(dir.path()).is_err());
    }

    #[test]
    fn images_of_another_unit_or_machine_are_refused() {
        let dir = Path::new("/d");
        image().fits(dir, "x.service").unwrap();
        assert!(
            image()
                .fits(dir, "y.service")
                .unwrap_err()
                .to_string()
                .contains("of x.service, not of y.service")
        );
        let other = UnitImage { machine: "s390x".into(), ..image() };
        assert!(other.fits(dir, "x.service").unwrap_err().to_string().contains("s390x"));
    }

    #[test]
    fn words_reach_the_program_as_they_are() {
        assert_eq!(quoted("/a b/$x%y\"z\\"), r#""/a b/$$x%%y\"z\\""#);
    }

    #[test]
    fn the_drop_in_starts_criu_and_gives_back_what_it_lifts() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(PRIVATE_TMP), "").unwrap();
        let service = Service {
            id: "x.service".into(),
            program: Some("/usr/sbin/nginx".into()),
            protect_tunables: true,
            private_devices: true,
            ..Service::default()
        };
        let pid_file = Path::new("/run/x.pid");
        let limit = Duration::from_secs(30);
        let text =
            start_by_criu(&service, &image(), Path::new("/usr/sbin/criu"), dir.path(), pid_file, limit);
        for line in [
            "Type=forking",
            "PIDFile=/run/x.pid",
            "TimeoutStartSec=30",
            "SyslogIdentifier=nginx",
            "ExecStart=",
            "ProtectKernelTunables=no",
            "DevicePolicy=closed",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        let inherited =
            "--inherit-fd fd[1]:socket:[5] --inherit-fd fd[1]:socket:[9] --inherit-fd fd[0]:file[51:4]\n";
        assert!(text.contains(inherited), "{text}");
        assert!(text.contains(&format!("-xpf \"{}/private-tmp.tar\"", dir.path().display())), "{text}");
        assert!(text.contains("ReadOnlyPaths=-/proc/sys") && !text.contains("runtime.tar"), "{text}");
        // A unit without a view of its own gets none by us.
        let plain = UnitImage { own_mounts: false, journal: Vec::new(), nulls: Vec::new(), ..image() };
        let service = Service { protect_tunables: false, private_devices: false, ..service };
        let text = start_by_criu(&service, &plain, Path::new("/c"), dir.path(), pid_file, limit);
        assert!(!text.contains("Paths=") && !text.contains("--inherit-fd"), "{text}");
    }

    #[test]
    fn a_place_that_the_unit_does_not_see_is_refused() {
        assert!(visible("x", Path::new("/tmp/images"), true).is_err());
        visible("x", Path::new("/tmp/images"), false).unwrap();
        visible("x", Path::new("/var/lib/ftd/x"), true).unwrap();
    }
}
