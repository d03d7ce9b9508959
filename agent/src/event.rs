//! The one `Event`: everything that happens on a node is one of these, with a time, a node, a unit,
//! an operation id and a cause.
//!
//! `ftctl events`, the API, the metrics and the tests all read the same stream; nothing is reported
//! from anywhere else. Events are made by [`Bus::emit`](bus::Bus::emit), which numbers them, hands
//! them to followers and to the [`journal`] on disk.
//!
//! An **operation** is what belongs together: a death, the decision, the start, the health that
//! follows. Its id is the number of the event that opened it, so an operator who sees `#4711` can
//! ask for all of it.

use std::fmt;

use serde::{Deserialize, Serialize};

pub mod bus;
pub mod journal;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Position in the node's stream; grows by one with each event, across restarts of ftd.
    pub seq: u64,
    /// Wall clock.
    pub time: jiff::Timestamp,
    /// The node it happened on.
    pub node: String,
    /// The systemd unit it is about, by the name systemd itself gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The operation it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<OpId>,
    /// What happened.
    #[serde(flatten)]
    pub kind: Kind,
}

/// An operation's id: the number of the event that opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpId(pub u64);

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// What happened: one variant per thing that ftd can see or do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// ftd runs.
    AgentStarted {
        /// ftd's version.
        version: String,
        /// ftd's process id.
        pid: u32,
        /// Whether the state of an earlier run was taken up.
        resumed: bool,
    },
    /// ftd's start is over, as `systemctl start ftd` sees it. Every fault from the time before is in an event
    /// with a lower number, and acted upon; what comes after this the kernel's probe sees.
    AgentReady {
        /// How long the start took, milliseconds.
        took_ms: u64,
        /// Units of which that does not hold: systemd had not said what is with them when `node.ready_within` was over.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        undecided: Vec<String>,
    },
    /// ftd was told to stop; services go on without it.
    AgentStopped {},
    /// The kernel probes are attached.
    ProbeReady {
        /// `ebpf` or `pidfd`.
        source: String,
        /// Real-time priority of the reader thread, or why it has none.
        realtime: String,
        /// What this kernel lacks, each with its consequence.
        missing: Vec<String>,
    },
    /// eBPF cannot be used: ftd goes on with pidfds and D-Bus, slower.
    ProbeUnavailable {
        /// Why.
        cause: String,
    },
    /// Events were lost at some place; never silently.
    EventsDropped {
        /// Where: `ring` (kernel to ftd), `journal` (memory to disk), `elsewhere` (rate limit),
        /// `damaged in the journal` and `this follower` (told to who reads, numbered 0, not recorded).
        place: String,
        /// How many since the last such event.
        count: u64,
    },
    /// The connection to systemd is gone; ftd keeps trying.
    BusLost {
        /// Why.
        cause: String,
        /// What a person can do.
        #[serde(default)]
        mend: String,
    },
    /// systemd answers again.
    BusBack {
        /// How long it was away, milliseconds.
        away_ms: u64,
    },
    /// The journal cannot be written; events wait in memory.
    JournalBlocked {
        /// Why, with the file.
        cause: String,
        /// What a person can do.
        #[serde(default)]
        mend: String,
    },
    /// The journal is written again.
    JournalBack {
        /// Events written late.
        late: u64,
        /// Events that no longer fitted in memory.
        lost: u64,
    },
    /// A damaged journal was mended when it was opened.
    JournalRepaired {
        /// The file.
        file: String,
        /// Bytes that held no whole event and were cut off or skipped.
        bytes: u64,
    },
    /// Holds, attempts and units given up cannot be saved: they are lost if ftd ends now. It keeps trying.
    StateUnsaved {
        /// Why, with the file.
        cause: String,
    },
    /// They are saved again.
    StateSaved {},
    /// A state file makes no sense; ftd goes on without what it held.
    StateDamaged {
        /// The file.
        file: String,
        /// What is wrong with it.
        cause: String,
        /// What is lost, where the file is kept, what a person can do.
        mend: String,
    },
    /// The status on TCP cannot be offered: nobody can listen at its address. ftd keeps trying.
    StatusBlocked {
        /// The address.
        address: String,
        /// Why.
        cause: String,
        /// What a person can do.
        mend: String,
    },
    /// The status on TCP is offered now.
    StatusBack {
        /// The address.
        address: String,
    },
    /// A unit under care cannot be cared for as it is.
    UnitProblem {
        /// What is wrong: systemd's load state, or its error.
        problem: String,
        /// What to do about it.
        mend: String,
    },
    /// The problem is over.
    UnitFound {
        /// The name that was asked for, when systemd knows the unit by another.
        alias: Option<String>,
    },
    /// The kernel cannot watch a unit, or watches it again. What systemd says of it is known all the time.
    UnitWatch {
        /// Why not, and what to do about it; absent when it is watched again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A process of a watched unit died, or one elsewhere died abnormally.
    ProcessDied {
        /// Who.
        #[serde(flatten)]
        process: Process,
        /// Parent's process id.
        ppid: u32,
        /// Whether it was the unit's main process.
        main: bool,
        /// How it ended; absent when the source cannot tell.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<ExitStatus>,
        /// Who sent the signal that ended it, when somebody did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sender: Option<Process>,
        /// Whether the OOM killer chose it.
        oom: bool,
        /// Life time, milliseconds.
        run_ms: u64,
        /// Largest resident set, bytes; 0 when unknown.
        max_rss: u64,
    },
    /// The kernel's OOM killer chose a process of the unit.
    OomKill {
        /// The victim.
        #[serde(flatten)]
        process: Process,
        /// The unit's cgroup.
        cgroup: String,
        /// The unit's memory limit, bytes; absent when it has none of its own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u64>,
        /// The victim's resident memory, bytes.
        rss: u64,
    },
    /// The service does not serve. Opens an operation.
    Down {
        /// Why.
        cause: Cause,
        /// The same for people, with the particulars.
        detail: String,
    },
    /// What ftd does about it.
    Decided {
        /// What.
        action: Decision,
        /// Why this.
        why: String,
        /// Which start attempt in this run of failures, from 1; 0 when nothing is started.
        attempt: u32,
        /// Back-off before it, milliseconds.
        delay_ms: u64,
        /// From the kernel's (or systemd's) time of the cause to the decision, microseconds.
        after_us: u64,
    },
    /// The service serves again. Closes the operation.
    Healed {
        /// Who brought it back.
        by: Healer,
        /// From the cause to now, milliseconds.
        took_ms: u64,
        /// The new main process; 0 when the unit has none.
        main_pid: u32,
    },
    /// An attempt did not bring it back.
    HealFailed {
        /// Which attempt.
        attempt: u32,
        /// What systemd said.
        error: String,
    },
    /// Terminal: ftd gave up and does nothing more until a person acts.
    Failed {
        /// Attempts made.
        attempts: u32,
        /// In this time, milliseconds.
        within_ms: u64,
        /// What a person can do.
        mend: String,
    },
    /// The service is down and stays down, on purpose.
    Left {
        /// Why.
        why: String,
    },
    /// Somebody else than ftd started it, and nothing was wrong before.
    Started {
        /// The main process; 0 when the unit has none.
        main_pid: u32,
    },
    /// It is in another run than the one that ftd last saw: it ended, and was started again, while ftd was away or
    /// could not reach systemd.
    RestartedUnseen {
        /// Who started it.
        by: Healer,
        /// The main process; 0 when the unit has none, or not yet.
        main_pid: u32,
    },
    /// Taken out of ftd's hands.
    Held {
        /// Until when; for ever when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<jiff::Timestamp>,
        /// The reason given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Back in ftd's hands.
    Released {
        /// `person`, `time` or `started by hand`.
        by: String,
    },
    /// The health check failed as often as it takes.
    HealthFailed {
        /// The check.
        check: String,
        /// The last error.
        error: String,
        /// Failures in a row.
        failures: u32,
        /// Whether the check had ever succeeded; before that, ftd only tells.
        proven: bool,
    },
    /// The health check succeeds again.
    HealthBack {
        /// The check.
        check: String,
    },
    /// ftd lacks something of its own to ask for the service's health. Says nothing of the service, and
    /// nothing is done for it; told once until a question can be asked again.
    HealthNotAsked {
        /// The check.
        check: String,
        /// What ftd lacks.
        error: String,
        /// What a person can do.
        mend: String,
    },
    /// Files of a workload are not those of its last good generation.
    FilesChanged {
        /// Each path, and in what way.
        changes: Vec<FileChange>,
    },
    /// They must not stay as they are: the last good ones are put back, if there are any.
    FilesBad {
        /// What is wrong with them: the checker's words, or what was done to them.
        why: String,
        /// What is put back.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        generation: Option<u64>,
    },
    /// The last good files are in their place again.
    FilesPutBack {
        /// The generation.
        generation: u64,
        /// How many files were not as they should be.
        files: usize,
    },
    /// The service has served well with its files: these are what is put back from now on.
    FilesGood {
        /// The generation.
        generation: u64,
    },
    /// Something could not be done about the files.
    FilesTrouble {
        /// What.
        what: String,
        /// Why not.
        error: String,
    },
    /// A snapshot of a workload is there.
    SnapshotTaken {
        /// The workload.
        workload: String,
        /// The generation.
        generation: u64,
        /// `files` or `process`.
        kind: String,
        /// How long its processes stood still, all together, microseconds.
        frozen_us: u64,
        /// From the beginning until it was durable, milliseconds.
        took_ms: u64,
        /// Bytes of all that it holds.
        bytes: u64,
        /// Of these, in chunks that the store did not have.
        new_bytes: u64,
        /// Bytes that were written for those.
        stored_bytes: u64,
    },
    /// Snapshots that were due were not taken, because one before them was not done. Told once at the beginning of a
    /// run of such, and once at its end if there were more.
    SnapshotSkipped {
        /// The workload.
        workload: String,
        /// How many, since it was last told.
        count: u64,
        /// Why.
        why: String,
    },
    /// A snapshot that was due could not be taken.
    SnapshotFailed {
        /// The workload.
        workload: String,
        /// What could not be taken.
        thing: String,
        /// Why.
        cause: String,
        /// What a person can do.
        mend: String,
        /// When it is tried again, milliseconds from now.
        again_ms: u64,
    },
    /// A workload is what it was in a snapshot.
    Restored {
        /// The workload.
        workload: String,
        /// The generation.
        generation: u64,
        /// How many files were not as they should be.
        files: usize,
        /// The units whose processes were restored.
        units: Vec<String>,
        /// From the beginning to the end, milliseconds.
        took_ms: u64,
    },
    /// Other nodes of the cluster can reach this one.
    PeersReady {
        /// This node's name in the cluster.
        name: String,
        /// Where it listens.
        address: String,
        /// Until when its certificate is valid.
        until: jiff::Timestamp,
    },
    /// Other nodes cannot reach this one.
    PeersBlocked {
        /// Why.
        cause: String,
        /// What a person can do.
        mend: String,
    },
    /// There is a connection with a peer.
    PeerUp {
        /// Its name.
        peer: String,
        /// Where it is reached.
        address: String,
        /// Its ftd's version.
        version: String,
    },
    /// A peer that is up is reached over another address now.
    PeerPath {
        /// Its name.
        peer: String,
        /// Where it is reached now.
        address: String,
        /// What was the matter with the address before.
        cause: String,
    },
    /// Nothing was heard of a peer for too long, or it said good-bye.
    PeerDown {
        /// Its name.
        peer: String,
        /// Why, as far as can be told.
        cause: String,
        /// What a person can do.
        #[serde(default)]
        mend: String,
        /// How long it was up, milliseconds; absent when it never was in this run of ftd.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        up_ms: Option<u64>,
    },
    /// Somebody was turned away at the port for peers, or a peer turns this node away.
    PeerRefused {
        /// The address, or the peer's name; `many` for all that are too many to be named.
        from: String,
        /// Why.
        cause: String,
        /// What a person can do.
        #[serde(default)]
        mend: String,
        /// How often since this was last told.
        times: u64,
    },
    /// A node has joined the cluster, by a token of this node.
    PeerJoined {
        /// Its name.
        peer: String,
        /// From where.
        address: String,
    },
    /// The certificates of a node were revoked by a person.
    PeerRevoked {
        /// Its name.
        peer: String,
    },
    /// This node has a new certificate.
    CertificateRenewed {
        /// Until when it is valid.
        until: jiff::Timestamp,
    },
    /// This node's certificate cannot be renewed. ftd keeps trying.
    CertificateTrouble {
        /// Why.
        cause: String,
        /// What a person can do.
        mend: String,
        /// Until when the one that there is is valid.
        until: jiff::Timestamp,
    },
    /// A snapshot is on another node now, durable.
    Replicated {
        /// The workload.
        workload: String,
        /// The generation's number here.
        generation: u64,
        /// The other node.
        peer: String,
        /// Bytes that went over the wire: what was missing there.
        bytes: u64,
        /// How long it took, milliseconds.
        took_ms: u64,
    },
    /// A snapshot of another node is here now, durable.
    ReplicaTaken {
        /// The workload.
        workload: String,
        /// The generation's number here.
        generation: u64,
        /// The node that has taken it.
        peer: String,
        /// Bytes that came over the wire.
        bytes: u64,
        /// How long it took, milliseconds.
        took_ms: u64,
    },
    /// Another node still has not what it should have of a workload's snapshots. ftd keeps trying.
    ReplicaBehind {
        /// The workload.
        workload: String,
        /// The other node.
        peer: String,
        /// For how long, milliseconds.
        behind_ms: u64,
        /// Why, as far as is known.
        cause: String,
        /// What a person can do.
        #[serde(default)]
        mend: String,
    },
    /// It has all of it now.
    ReplicaCaughtUp {
        /// The workload.
        workload: String,
        /// The other node.
        peer: String,
    },
    /// A workload that moves to or from another node has come to a new phase. The first opens an operation.
    MigrationPhase {
        /// The workload.
        workload: String,
        /// The move's id, the same on both nodes.
        migration: String,
        /// The other node.
        peer: String,
        /// It leaves this node; else it comes.
        leaves: bool,
        /// What is done now.
        phase: String,
        /// Particulars.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        detail: String,
    },
    /// A workload has moved away from this node and runs on another. Closes the operation.
    Migrated {
        /// The workload.
        workload: String,
        /// The move's id.
        migration: String,
        /// The node that it runs on.
        to: String,
        /// From the request to the end, milliseconds.
        took_ms: u64,
        /// From the freeze until the other node said that it serves, milliseconds.
        blackout_ms: u64,
        /// Bytes of its images.
        bytes: u64,
        /// Bytes that they were on the wire.
        wire_bytes: u64,
    },
    /// A workload was to move and runs where it was. Closes the operation.
    MigrationFailed {
        /// The workload.
        workload: String,
        /// The move's id.
        migration: String,
        /// The node that it was to move to.
        peer: String,
        /// Why.
        cause: String,
        /// What a person can do.
        mend: String,
    },
    /// A fault is injected now. Opens an operation.
    FaultInjected {
        /// Its id, for `ftctl inject recover`.
        id: String,
        /// What: `stop`, `kill`, `hang`, `oom`.
        fault: String,
        /// Particulars.
        detail: String,
        /// When it ends by itself, milliseconds from now; 0 for a deed without duration.
        for_ms: u64,
    },
    /// A fault is undone; nothing of it is left.
    FaultUndone {
        /// Its id.
        id: String,
        /// `time`, `person`, `done`, or `ftd started again`.
        why: String,
    },
    /// A fault could not be injected or undone.
    FaultTrouble {
        /// Its id.
        id: String,
        /// What went wrong.
        error: String,
    },
}

impl Kind {
    /// systemd cannot be reached for this cause.
    pub fn bus_lost(cause: String) -> Self {
        let mend = "ftd tries again by itself; if it does not end, see that PID 1 is systemd and answers: \
                    systemctl is-system-running";
        Self::BusLost { cause, mend: mend.into() }
    }
}

/// A file that is not as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Where.
    pub path: String,
    /// In what way.
    pub what: String,
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// Why a service does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Cause {
    /// A person, or another program, killed it.
    Killed,
    /// It crashed: a signal of its own making (SEGV, ABRT, …).
    Crashed,
    /// It ended with an error code.
    ExitCode,
    /// It ended without an error and without being told to.
    Exited,
    /// The OOM killer took it.
    OomKilled,
    /// It lives and does not answer.
    Hung,
    /// Somebody stopped it.
    Stopped,
    /// systemd's watchdog or a time limit of its unit ended it.
    Watchdog,
    /// It could not be started.
    StartFailed,
    /// systemd says so and nothing says why.
    Unknown,
}

/// What ftd decided to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Start it.
    Start,
    /// Stop what is left of it, start it.
    Restart,
    /// Wait for systemd, which is at it by itself.
    LeaveToSystemd,
    /// Do nothing: that is what was wanted.
    Leave,
    /// Do nothing: it is held.
    Held,
    /// Give up.
    Fail,
}

/// Who brought a service back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Healer {
    /// ftd.
    Ftd,
    /// systemd, by the unit's own Restart=.
    Systemd,
    /// A person, or another program.
    Other,
}

/// A process, as people name it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in ftd's PID namespace; 0 when it has none there.
    pub pid: u32,
    /// The kernel's 15-character name.
    pub comm: String,
    /// Real user id.
    pub uid: u32,
}

/// How a process ended: decoded wait status, see wait(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called exit with this code, 0 to 255.
    Code(u8),
    /// A signal ended it.
    Signal {
        /// Signal number.
        signal: i32,
        /// Whether a core was dumped.
        core: bool,
    },
}

impl ExitStatus {
    /// Decodes the kernel's wait status (`task->exit_code`): low seven bits the signal, bit 7 the
    /// core flag, next byte the exit code.
    pub fn from_wait(status: i32) -> Self {
        match status & 0x7f {
            0 => Self::Code(((status >> 8) & 0xff) as u8),
            signal => Self::Signal { signal, core: status & 0x80 != 0 },
        }
    }

    /// Exit code 0.
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal { signal, core } => {
                match nix::sys::signal::Signal::try_from(signal) {
                    Ok(known) => f.write_str(known.as_str())?,
                    Err(_) => write!(f, "signal {signal}")?,
                }
                f.write_str(if core { " (core dumped)" } else { "" })
            }
        }
    }
}
