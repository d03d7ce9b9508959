//! CRIU: a running process and all that it holds, written to files, and made again from them.
//!
//! ftd does not link CRIU and does not parse what it prints. It starts one worker for each operation,
//! `criu swrk FD`: its descriptor FD is a socket on which one request goes in, notices come out while the work is
//! done, and one answer ends it ([`messages`] are CRIU's own, see rpc.proto there). A worker does one thing and
//! ends; nothing is left of it that the next one could stumble over.
//!
//! What a dump does to a service, and when: the order is CRIU's, and [`Moment`] is where ftd sees it.
//!
//! ```text
//! request ─► PreDump ─► freeze ─► memory, files, sockets are written ─► PostDump ─► thaw or kill ─► answer
//!                       └────────────── the service stands still ──────────────────────────┘
//! ```
//!
//! At each moment CRIU waits for ftd's word, and a no takes everything back: the processes go on as if nothing
//! had happened. So `PostDump`, when the images are complete and the processes still live, is the point at
//! which a dump that is to end them is committed: whoever asked for it says yes or no there, and until then no
//! failure, not even the end of ftd itself (CRIU then reads the end of its socket, which is a no), costs the
//! service more than a pause.
//!
//! **Time limits.** CRIU has one of its own for the freeze. ftd's is for the whole: when it is over, the
//! next notice is answered with no; a worker that does not even come to a notice is killed. The processes
//! survive that too: CRIU's code inside of them sees its socket close and goes back to theirs.
//!
//! **Whose namespaces.** A service that systemd has given a view of its own (`PrivateTmp=`, `ProtectSystem=`,
//! `PrivateNetwork=`, …) is dumped from within that view: then it is nothing that would have to be dumped, and
//! systemd makes it anew for the restored service. The worker is started there, see [`worker`].
//!
//! **What went wrong** is in CRIU's log, and its first error is nearly always the cause. [`CriuError`] carries
//! that line, and what to do where it is known.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub mod check;
pub mod facts;
pub mod hand;
pub mod images;
pub mod log;
pub mod unit;
pub mod worker;

use messages::{CgMode, Features, NetworkLockMethod, Opts, Req, ReqType, Resp};
use worker::Worker;

/// CRIU's messages; see proto/criu.proto.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::pedantic,
    reason = "made by prost from proto/criu.proto"
)]
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

/// Where CRIU is looked for.
const PLACES: [&str; 4] = ["/usr/local/sbin/criu", "/usr/sbin/criu", "/usr/local/bin/criu", "/usr/bin/criu"];
/// How long a worker may take to answer what needs no work.
const QUESTION_LIMIT: Duration = Duration::from_secs(10);
/// How long a worker that was told no may take to put everything back.
const UNDO_LIMIT: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(5) };
/// Everything is logged: a log is needed when it is too late to ask for more of it.
const LOG_LEVEL: i32 = 4;
/// A file that was deleted and is still open travels in the images up to this size. CRIU's own limit is 1 MiB.
const GHOST_LIMIT: u32 = 64 << 20;

/// Why an operation with CRIU failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CriuError {
    /// There is no CRIU.
    #[error("CRIU is not installed: looked for {}. Install the package criu, 4.2 or newer", PLACES.join(", "))]
    Missing,
    /// It cannot be started.
    #[error("{} cannot be started: {cause}. See that it is CRIU, whole and for this machine", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Something that it would need cannot be opened.
    #[error("{what} cannot be used: {cause}")]
    Place {
        /// What.
        what: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It says that it cannot.
    #[error("{what}: CRIU says: {words}. {mend}")]
    Refused {
        /// What was being done.
        what: String,
        /// Its first error.
        words: String,
        /// What to do about it.
        mend: String,
        /// Its whole log.
        log: Option<PathBuf>,
    },
    /// The worker ended, or spoke, out of turn.
    #[error("{what}: CRIU broke off: {cause}. {mend}")]
    Broken {
        /// What was being done.
        what: String,
        /// How.
        cause: String,
        /// What to do about it.
        mend: String,
    },
    /// Time is over; everything was put back.
    #[error(
        "{what}: not done after {}. Give it more time, or find out what is slow (the disk, most likely)",
        humantime::format_duration(*.limit)
    )]
    Late {
        /// What was being done.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// Whoever asked for it said no at the last moment; everything was put back.
    #[error("{what}: called off before it was done; the processes go on")]
    CalledOff {
        /// What was being done.
        what: String,
    },
    /// This CRIU lacks something that was asked for.
    #[error("{what} needs CRIU {needed} or newer: this is {found}. Install a newer package criu")]
    TooOld {
        /// What.
        what: &'static str,
        /// From when on.
        needed: Version,
        /// What there is.
        found: Version,
    },
}

/// CRIU's version.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize,
)]
pub struct Version {
    /// 4 of 4.2.1.
    pub major: i32,
    /// 2 of 4.2.1.
    pub minor: i32,
    /// 1 of 4.2.1.
    pub sublevel: i32,
}

impl Version {
    /// A version without a third number.
    pub const fn new(major: i32, minor: i32) -> Self {
        Self { major, minor, sublevel: 0 }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.sublevel > 0 { write!(f, ".{}", self.sublevel) } else { Ok(()) }
    }
}

/// What this CRIU can do on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Abilities {
    /// Its version.
    pub version: Version,
    /// The kernel tells which pages were written: copy rounds while a process runs are possible.
    pub mem_track: bool,
    /// Pages can be brought after a process has been started again.
    pub lazy_pages: bool,
    /// Processes can be told apart across dumps although PIDs are used again.
    pub pidfd_store: bool,
}

/// A moment of an operation at which CRIU waits for a yes or a no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Moment {
    /// About to freeze the processes.
    PreDump,
    /// The images are complete. After a yes the processes are thawed, or ended if that was asked for.
    PostDump,
    /// About to make the processes.
    PreRestore,
    /// They are there, and stand still.
    PostRestore,
    /// About to let them go.
    PreResume,
    /// They run.
    PostResume,
    /// Another one of CRIU's.
    Other,
}

impl Moment {
    /// The name is CRIU's (criu(8), `--action-script`).
    fn of(script: &str) -> Self {
        match script {
            "pre-dump" => Self::PreDump,
            "post-dump" => Self::PostDump,
            "pre-restore" => Self::PreRestore,
            "post-restore" => Self::PostRestore,
            "pre-resume" => Self::PreResume,
            "post-resume" => Self::PostResume,
            _ => Self::Other,
        }
    }
}

/// What becomes of the processes once they have been dumped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// They go on.
    Run,
    /// They stand still, until SIGCONT or SIGKILL.
    Stop,
    /// They end.
    End,
}

/// A process tree that is to be dumped.
#[derive(Debug, Clone)]
pub struct Dump<'a> {
    /// The root of the tree: a unit's main process.
    pub pid: u32,
    /// An empty directory for the images and the log, `dump.log`.
    pub images: &'a Path,
    /// What becomes of the processes.
    pub after: After,
    /// What is not part of the tree and will be there for the restored one, in CRIU's words
    /// (`unix[INODE]`).
    pub external: Vec<String>,
    /// Record which pages are written from now on, for a next round; see [`Abilities::mem_track`].
    pub track_mem: bool,
    /// The images of the round before, relative to these: what has not changed since is left out.
    pub parent: Option<&'a Path>,
    /// Time for the freeze alone.
    pub freeze_limit: Duration,
    /// Time for the whole.
    pub limit: Duration,
}

impl<'a> Dump<'a> {
    /// A dump with the limits that suit a service of up to some GiB.
    pub fn new(pid: u32, images: &'a Path, after: After) -> Self {
        Self {
            pid,
            images,
            after,
            external: Vec::new(),
            track_mem: false,
            parent: None,
            freeze_limit: Duration::from_secs(10),
            limit: Duration::from_mins(2),
        }
    }
}

/// What a dump cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Dumped {
    /// How long the processes stood still, by CRIU's clock, microseconds.
    pub frozen_us: u64,
    /// How long it took to bring them to a halt, microseconds.
    pub freezing_us: u64,
    /// From the request to the answer, microseconds.
    pub took_us: u64,
    /// Memory pages looked at.
    pub pages_scanned: u64,
    /// Of these, left out because the round before has them.
    pub pages_skipped: u64,
    /// Of these, written.
    pub pages_written: u64,
}

/// Images that are to become processes, as children of nobody: where systemd is to own them, see [`unit`].
#[derive(Debug, Clone)]
pub struct Restore<'a> {
    /// The images; the log, `restore.log`, goes there too.
    pub images: &'a Path,
    /// What takes the place of things that were external at the dump: CRIU's words for it, and the file.
    pub inherit: Vec<(String, &'a File)>,
    /// The process in whose namespaces they are to live.
    pub beside: Option<u32>,
    /// Time for the whole.
    pub limit: Duration,
}

/// CRIU on this host; cheap to clone. Its operations block: call them where that is allowed
/// (`spawn_blocking`).
#[derive(Debug, Clone)]
pub struct Criu {
    program: PathBuf,
}

impl Criu {
    /// The installed one.
    pub fn find() -> Result<Self, CriuError> {
        let place = PLACES.iter().map(Path::new).find(|path| path.is_file());
        place.map(Self::at).ok_or(CriuError::Missing)
    }

    /// This program.
    pub fn at(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Where it is.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Its version, which it tells without looking at the kernel.
    pub fn version(&self) -> Result<Version, CriuError> {
        let what = "asking for its version";
        let answer = self.ask(what, &Req { r#type: ReqType::Version.into(), ..Req::default() })?;
        let version = answer.version.ok_or_else(|| odd(what, "an answer without a version"))?;
        Ok(Version {
            major: version.major_number,
            minor: version.minor_number,
            sublevel: version.sublevel.unwrap_or(0),
        })
    }

    /// What it can do on this kernel.
    pub fn abilities(&self) -> Result<Abilities, CriuError> {
        let version = self.version()?;
        let what = "asking what this kernel lets it do";
        let wanted = Features { mem_track: Some(true), lazy_pages: Some(true), pidfd_store: Some(true) };
        let question = Req { r#type: ReqType::FeatureCheck.into(), features: Some(wanted), ..Req::default() };
        let found = self.ask(what, &question)?.features.unwrap_or_default();
        let (mem_track, lazy_pages) = (found.mem_track(), found.lazy_pages());
        Ok(Abilities { version, mem_track, lazy_pages, pidfd_store: found.pidfd_store() })
    }

    /// Dumps a tree. `word` is asked at each [`Moment`] and says whether to go on.
    pub fn dump(&self, dump: &Dump<'_>, mut word: impl FnMut(Moment) -> bool) -> Result<Dumped, CriuError> {
        const LOG: &str = "dump.log";
        /// `leave_stopped` is in rpc.proto since then; older ones would take no notice of it, and kill.
        const CAN_STOP: Version = Version::new(3, 19);
        let what = format!("dumping process {}", dump.pid);
        if dump.after == After::Stop {
            let found = self.version()?;
            if found < CAN_STOP {
                return Err(CriuError::TooOld { what: "leaving processes stopped", needed: CAN_STOP, found });
            }
        }
        let images = directory(dump.images)?;
        let opts = Opts {
            images_dir_fd: images.as_raw_fd(),
            pid: Some(dump.pid.cast_signed()),
            leave_running: Some(dump.after == After::Run),
            leave_stopped: Some(dump.after == After::Stop),
            timeout: Some(dump.freeze_limit.as_secs().max(1) as u32),
            tcp_established: Some(true),
            // Who is not accepted yet has not been served anything, and stays with the process that runs on; on a
            // service that is busy there is always one, and CRIU would refuse.
            tcp_skip_in_flight: Some(true),
            network_lock: Some(NetworkLockMethod::Nftables.into()),
            external: dump.external.clone(),
            // Datagram sockets to one with a name (syslog, systemd) are connected again by that name.
            ext_unix_sk: Some(true),
            shell_job: Some(false),
            file_locks: Some(true),
            link_remap: Some(true),
            ghost_limit: Some(GHOST_LIMIT),
            // Saved for nobody: the unit's group is systemd's, and it will be there.
            manage_cgroups_mode: Some(CgMode::Ignore.into()),
            track_mem: Some(dump.track_mem),
            parent_img: dump.parent.map(|parent| parent.display().to_string()),
            log_level: Some(LOG_LEVEL),
            log_file: Some(LOG.into()),
            notify_scripts: Some(true),
            ..Opts::default()
        };
        let begun = Instant::now();
        let mut talk = Talk {
            what,
            log: Some(dump.images.join(LOG)),
            worker: Worker::start(&self.program, Some(dump.pid))?,
            begun,
            limit: dump.limit,
        };
        talk.send(&Req { r#type: ReqType::Dump.into(), opts: Some(opts), ..Req::default() })?;
        talk.answer(ReqType::Dump, &mut word)?;
        let took_us = begun.elapsed().as_micros() as u64;
        let stats = images::dump_stats(dump.images).unwrap_or_default();
        Ok(Dumped {
            frozen_us: stats.frozen_time.into(),
            freezing_us: stats.freezing_time.into(),
            took_us,
            pages_scanned: stats.pages_scanned,
            pages_skipped: stats.pages_skipped_parent,
            pages_written: stats.pages_written,
        })
    }

    /// Makes processes from images; answers the PID of the first.
    pub fn restore(
        &self,
        restore: &Restore<'_>,
        mut word: impl FnMut(Moment) -> bool,
    ) -> Result<u32, CriuError> {
        const LOG: &str = "restore.log";
        let images = directory(restore.images)?;
        let worker = Worker::start_with(
            &self.program,
            restore.beside,
            &restore.inherit.iter().map(|(_, file)| *file).collect::<Vec<_>>(),
        )?;
        let inherit_fd = restore.inherit.iter().zip(worker.inherited());
        let inherit_fd = inherit_fd.map(|((key, _), fd)| messages::InheritFd { key: key.clone(), fd });
        let opts = Opts {
            images_dir_fd: images.as_raw_fd(),
            tcp_established: Some(true),
            network_lock: Some(NetworkLockMethod::Nftables.into()),
            inherit_fd: inherit_fd.collect(),
            shell_job: Some(false),
            file_locks: Some(true),
            link_remap: Some(true),
            manage_cgroups_mode: Some(CgMode::Ignore.into()),
            log_level: Some(LOG_LEVEL),
            log_file: Some(LOG.into()),
            notify_scripts: Some(true),
            ..Opts::default()
        };
        let mut talk = Talk {
            what: format!("restoring {}", restore.images.display()),
            log: Some(restore.images.join(LOG)),
            worker,
            begun: Instant::now(),
            limit: restore.limit,
        };
        talk.send(&Req { r#type: ReqType::Restore.into(), opts: Some(opts), ..Req::default() })?;
        let answer = talk.answer(ReqType::Restore, &mut word)?;
        let pid = answer.restore.map(|restore| restore.pid).and_then(|pid| u32::try_from(pid).ok());
        pid.ok_or_else(|| odd(&talk.what, "an answer without a process"))
    }

    fn ask(&self, what: &str, question: &Req) -> Result<Resp, CriuError> {
        let kind = question.r#type();
        let mut talk = Talk {
            what: what.into(),
            log: None,
            worker: Worker::start(&self.program, None)?,
            begun: Instant::now(),
            limit: QUESTION_LIMIT,
        };
        talk.send(question)?;
        talk.answer(kind, &mut |_| true)
    }
}

fn odd(what: &str, cause: &str) -> CriuError {
    let mend = "Is it a version of CRIU that ftd does not know? Supported are 3.19 to 4.2".into();
    CriuError::Broken { what: what.into(), cause: cause.into(), mend }
}

fn directory(path: &Path) -> Result<File, CriuError> {
    let what = || format!("the images' directory {}", path.display());
    let dir = File::open(path).map_err(|cause| CriuError::Place { what: what(), cause })?;
    match dir.metadata() {
        Ok(meta) if meta.is_dir() => Ok(dir),
        Ok(_) => Err(CriuError::Place { what: what(), cause: io::ErrorKind::NotADirectory.into() }),
        Err(cause) => Err(CriuError::Place { what: what(), cause }),
    }
}

/// One operation's conversation with its worker.
#[derive(Debug)]
struct Talk {
    what: String,
    log: Option<PathBuf>,
    worker: Worker,
    begun: Instant,
    limit: Duration,
}

impl Talk {
    fn send(&mut self, message: &Req) -> Result<(), CriuError> {
        self.worker.send(message).map_err(|error| self.broken(&error))
    }

    /// Reads until the answer, and answers notices meanwhile.
    fn answer(&mut self, kind: ReqType, word: &mut impl FnMut(Moment) -> bool) -> Result<Resp, CriuError> {
        let mut end = self.begun + self.limit;
        // What the operation fails with once it has been put back.
        let mut verdict = None;
        loop {
            let message = match self.worker.receive(end) {
                Ok(message) => message,
                Err(error) if error.kind() == io::ErrorKind::TimedOut && verdict.is_none() => {
                    // It reads that at its next notice, takes it for a no, and puts everything back.
                    self.worker.hang_up();
                    verdict = Some(CriuError::Late { what: self.what.clone(), limit: self.limit });
                    end = Instant::now() + UNDO_LIMIT;
                    continue;
                }
                // Dropping the worker ends it.
                Err(error) => return Err(verdict.unwrap_or_else(|| self.broken(&error))),
            };
            if message.r#type() != ReqType::Notify {
                return match verdict {
                    Some(verdict) => Err(verdict),
                    None if message.success && message.r#type() == kind => Ok(message),
                    None => Err(self.refused(&message)),
                };
            }
            let notice = message.notify.unwrap_or_default();
            let asked = Instant::now();
            let go_on = verdict.is_none() && word(Moment::of(notice.script()));
            // The limit is CRIU's: who is asked for his word may take his time.
            end += asked.elapsed();
            if !go_on && verdict.is_none() {
                verdict = Some(CriuError::CalledOff { what: self.what.clone() });
                end = Instant::now() + UNDO_LIMIT;
            }
            let reply = Req { r#type: ReqType::Notify.into(), notify_success: Some(go_on), ..Req::default() };
            self.send(&reply)?;
        }
    }

    /// The log's first error says more than the answer's, which is the first of all, harmless ones included.
    fn refused(&mut self, message: &Resp) -> CriuError {
        let log = self.log.as_ref().and_then(|log| std::fs::read(log).ok());
        let text = log.map(|text| String::from_utf8_lossy(&text).into_owned());
        let early = self.worker.last_words();
        let known = text
            .as_deref()
            .and_then(log::first_error)
            .or_else(|| message.cr_errmsg.as_deref().and_then(log::first_error))
            .or_else(|| log::first_error(&early));
        let words = match (known, message.cr_errno) {
            (Some(words), _) => words.to_owned(),
            (None, Some(errno)) => io::Error::from_raw_os_error(errno).to_string(),
            (None, None) => "no, without a reason".into(),
        };
        let mend = log::mend(&words).map_or_else(|| self.look(), str::to_owned);
        CriuError::Refused { what: self.what.clone(), words, mend, log: self.log.clone() }
    }

    fn broken(&mut self, error: &io::Error) -> CriuError {
        let words = self.worker.last_words();
        let said = log::first_error(&words).unwrap_or(words.lines().last().unwrap_or_default().trim());
        let cause = if said.is_empty() { error.to_string() } else { format!("{error} ({said})") };
        let mend = log::mend(said).map_or_else(|| self.look(), str::to_owned);
        CriuError::Broken { what: self.what.clone(), cause, mend }
    }

    fn look(&self) -> String {
        match &self.log {
            Some(log) => format!("Its log is {}; `ftctl check` says more", log.display()),
            None => "See `ftctl doctor`".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    /// Every number in our file is CRIU's own. Without CRIU's file there is nothing to compare with.
    #[test]
    fn our_numbers_are_those_of_the_installed_criu() {
        let named = std::env::var_os("FTD_CRIU_PROTO").map(PathBuf::from);
        let path = named.unwrap_or_else(|| "/usr/include/criu/rpc.proto".into());
        if !path.exists() {
            eprintln!("{} is not there (package libcriu-dev): nothing compared", path.display());
            return;
        }
        let theirs = protox::compile([&path], [path.parent().unwrap()]).unwrap().file.remove(0);
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proto/criu.proto");
        let ours = protox::compile([file], [Path::new(file).parent().unwrap()]).unwrap().file.remove(0);
        // InheritFd -> inherit_fd; there some have criu_ in front.
        let snake = |name: &str| {
            name.chars().enumerate().fold(String::new(), |mut snake, (at, c)| {
                if c.is_uppercase() && at > 0 {
                    snake.push('_');
                }
                snake.extend(c.to_lowercase());
                snake
            })
        };
        let same = |ours: &str, theirs: &str| {
            let ours = snake(ours);
            theirs == ours || theirs == format!("criu_{ours}")
        };
        let images = [
            "StatsEntry",
            "DumpStatsEntry",
            "PstreeEntry",
            "InventoryEntry",
            "FileEntry",
            "RegFileEntry",
            "RemapFilePathEntry",
        ];
        for message in ours.message_type.iter().filter(|message| !images.contains(&message.name())) {
            let their = theirs.message_type.iter().find(|their| same(message.name(), their.name()));
            let their = their.unwrap_or_else(|| panic!("CRIU has no message {}", message.name()));
            for field in &message.field {
                let place = format!("{}.{}", message.name(), field.name());
                // One of an older CRIU may lack the newest.
                let Some(other) = their.field.iter().find(|other| other.name() == field.name()) else {
                    eprintln!("{place} is not in {}", path.display());
                    continue;
                };
                assert_eq!(field.number, other.number, "{place}");
                assert_eq!((field.r#type, field.label), (other.r#type, other.label), "{place}");
            }
        }
        for kind in &ours.enum_type {
            let their = theirs.enum_type.iter().find(|their| same(kind.name(), their.name())).unwrap();
            let their: Vec<_> = their.value.iter().map(|value| (value.name(), value.number())).collect();
            for value in &kind.value {
                assert!(their.contains(&(value.name(), value.number())), "{}", value.name());
            }
        }
    }

    #[test]
    fn versions_are_ordered_and_shown_as_criu_does() {
        let version = |major, minor, sublevel| Version { major, minor, sublevel };
        assert!(version(4, 1, 1) < Version::new(4, 2) && Version::new(4, 2) < version(4, 2, 1));
        assert!(version(3, 17, 1) < Version::new(3, 19));
        assert_eq!(
            (version(4, 2, 1).to_string(), Version::new(4, 2).to_string()),
            ("4.2.1".into(), "4.2".into())
        );
    }

    /// A program in the place of CRIU.
    fn fake(script: &str) -> (tempfile::TempDir, Criu) {
        let dir = tempfile::tempdir().unwrap();
        let (source, path) = (dir.path().join("source"), dir.path().join("criu"));
        fs::write(&source, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o755)).unwrap();
        // By another process: while this one has it open for writing, a child that another test starts has so
        // too, and then it cannot be run.
        assert!(
            std::process::Command::new("cp").arg("-p").args([&source, &path]).status().unwrap().success()
        );
        (dir, Criu::at(path))
    }

    #[test]
    fn what_a_broken_criu_prints_is_in_the_error() {
        let (_dir, criu) =
            fake("echo 'Error (criu/vdso.c:320): vdso: Not all dynamic entries are present' >&2; exit 1");
        let error = criu.version().unwrap_err();
        assert!(matches!(error, CriuError::Broken { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("Not all dynamic entries") && text.contains("newer package criu"), "{text}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Criu::at("/no/such/criu").version().unwrap_err();
        assert!(error.to_string().starts_with("/no/such/criu cannot be started"), "{error}");
    }

    #[test]
    fn one_that_never_answers_is_ended_at_the_limit() {
        let (dir, criu) = fake("exec sleep 60");
        let mut dump = Dump::new(1, dir.path(), After::Run);
        dump.limit = Duration::from_millis(50);
        let begun = Instant::now();
        let mut talk = Talk {
            what: "x".into(),
            log: None,
            worker: Worker::start(criu.program(), None).unwrap(),
            begun,
            limit: dump.limit,
        };
        talk.send(&Req { r#type: ReqType::Version.into(), ..Req::default() }).unwrap();
        let error = talk.answer(ReqType::Version, &mut |_| true).unwrap_err();
        assert!(matches!(error, CriuError::Late { .. }), "{error:?}");
        drop(talk);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[test]
    fn images_need_a_directory() {
        let (dir, criu) = fake("exit 1");
        let missing = dir.path().join("none");
        let error = criu.dump(&Dump::new(1, &missing, After::Run), |_| true).unwrap_err();
        assert!(matches!(error, CriuError::Place { .. }) && error.to_string().contains("none"), "{error}");
        let file = dir.path().join("criu");
        assert!(criu.dump(&Dump::new(1, &file, After::Run), |_| true).is_err());
    }
}
