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
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{
    After, Criu, Dump, Dumped, Moment,
    check::{Report, judge},
    facts::{CriuFacts, Facts},
    images, log,
};
use crate::unit::{
    alias,
    manager::{JobError, Service, Systemd},
};

mod drop_in;
mod error;
mod halt;
mod look;
mod record;
mod watchdog;

pub use drop_in::sweep;
use drop_in::{Placed, STARTING, STOP_QUIETLY, STOPPING, pid_file_of, start_by_criu};
pub use error::UnitError;
use error::file;
pub use halt::{end, halt, loud, quiet, runs_as, thaw};
pub use look::{Granted, in_the_way};
use look::{look, visible};
pub(in crate::snapshot) use record::MANIFEST;
pub use record::UnitImage;
use record::{VERSION, machine};

/// What is beside CRIU's images.
const PRIVATE_TMP: &str = "private-tmp.tar";
const RUNTIME_FILES: &str = "runtime.tar";
const TAR: &str = "/usr/bin/tar";
const NFT: &str = "/usr/sbin/nft";

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
            stopped: after != After::Run,
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
        let _fed = watchdog::Fed::of(&self.service);
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

/// What becomes of connections that were established at the dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connections {
    /// They go on. The addresses that they have on this side must be there.
    Keep,
    /// They are closed.
    Close,
}

/// Restores units that are down, one after another. Nothing is touched unless nothing is in the way of any.
pub async fn restore_units(
    systemd: &Systemd,
    criu: &Criu,
    units: &[(String, PathBuf)],
    limit: Duration,
) -> Result<Vec<Restored>, UnitError> {
    restore_units_with(systemd, criu, units, limit, Connections::Keep).await
}

/// The same, with this to become of their connections.
pub async fn restore_units_with(
    systemd: &Systemd,
    criu: &Criu,
    units: &[(String, PathBuf)],
    limit: Duration,
    connections: Connections,
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
        let text = start_by_criu(service, image, criu.program(), dir, &pid_file, (limit, connections));
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
        // An empty one is as systemd makes it, and everything stands still meanwhile. What cannot be read is tar's to tell.
        let filled =
            |path: &String| fs::read_dir(root.join(path)).map_or(true, |mut all| all.next().is_some());
        let mut paths = vec!["tmp".to_owned(), "var/tmp".to_owned()];
        paths.retain(filled);
        if !paths.is_empty() {
            archive(PRIVATE_TMP, &paths)?;
        }
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
