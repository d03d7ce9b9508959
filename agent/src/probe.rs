//! What the kernel tells: processes of watched units that die, are OOM-killed, are signalled.
//!
//! Two sources speak the same [`ProbeEvent`]: BPF programs on tracepoints ([`Probe`]), and, where
//! the kernel or the privileges do not allow these, pidfds ([`PidfdWatch`]), which see less.
//!
//! The BPF programs (package agent-ebpf) filter in the kernel: what happens to processes of watched
//! units is reported, elsewhere only processes that end by a signal which nobody ends a process by
//! in daily life. Each report is one record in a ring buffer; a thread with real-time priority
//! takes it out and calls the **sink**, with nothing in between. What gets lost on this way is
//! counted exactly ([`Drops`]).

mod bpf;
pub mod btf;
mod decode;
mod heap;
mod names;
mod pidfd;
mod reader;
pub mod selftest;
mod source;

use std::{fs, io, path::PathBuf, time::Duration};

pub use bpf::Probe;
pub use pidfd::{PidfdError, PidfdWatch, ended};
use serde::{Deserialize, Serialize};
pub use source::{FILTER_FULL, RING_FULL, Source, UNREADABLE};

use crate::event::{ExitStatus, Process};

/// A number that ftd gives to a watched unit; small, dense, fixed for the life of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// Nanoseconds of `CLOCK_BOOTTIME`, the clock of everything that is measured in ftd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootNs(pub u64);

impl BootNs {
    /// The moment `time` after this one.
    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this moment; none when that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// One thing that the kernel reported. `slot` is `None` for a process outside every watched unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeEvent {
    /// The last thread of a process is gone. Reported once for each process.
    Exit {
        /// When the kernel's exit path was entered.
        at: BootNs,
        /// The unit whose cgroup the process was in.
        slot: Option<Slot>,
        /// Who died; `pid` as seen in ftd's own PID namespace.
        process: Process,
        /// Parent, as seen in ftd's own PID namespace; 0 when it is outside of it.
        ppid: u32,
        /// How it ended; `None` when the source cannot tell (pidfds on kernels before 6.15).
        status: Option<ExitStatus>,
        /// How long the process lived, nanoseconds.
        run_ns: u64,
        /// Largest resident set it ever had, bytes; 0 when unknown.
        max_rss: u64,
    },
    /// The OOM killer chose a victim; its `Exit` follows.
    Oom {
        /// When.
        at: BootNs,
        /// The victim's unit.
        slot: Option<Slot>,
        /// The victim.
        process: Process,
        /// Resident memory when chosen, bytes: anonymous, file, shared.
        rss: [u64; 3],
    },
    /// A signal was sent to a process of a watched unit.
    Signal {
        /// When.
        at: BootNs,
        /// The target's unit.
        slot: Slot,
        /// The target's process id, in ftd's own PID namespace.
        target: u32,
        /// Signal number.
        signal: i32,
        /// Who sent it; `pid` 0 when it is the kernel itself or outside ftd's PID namespace.
        sender: Process,
    },
    /// A process of a watched unit made a child.
    Fork {
        /// When.
        at: BootNs,
        /// The parent's unit.
        slot: Slot,
        /// The parent's process id.
        parent: u32,
        /// The child's process id.
        child: u32,
    },
    /// A process of a watched unit runs another program now.
    Exec {
        /// When.
        at: BootNs,
        /// The unit.
        slot: Slot,
        /// The process, with its new name.
        process: Process,
    },
}

/// A set of signals, 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signals(u64);

impl Signals {
    /// Those that end a process without anything being wrong with it: HUP INT PIPE TERM ALRM.
    pub const ORDINARY_ENDS: Self =
        Self::of(&[libc::SIGHUP, libc::SIGINT, libc::SIGPIPE, libc::SIGTERM, libc::SIGALRM]);

    /// Those whose sender is always worth knowing: all that end or stop a process and that are not
    /// part of its ordinary life.
    pub const TELLING: Self = Self::of(&[
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGILL,
        libc::SIGTRAP,
        libc::SIGABRT,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGKILL,
        libc::SIGSEGV,
        libc::SIGTERM,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGXCPU,
        libc::SIGXFSZ,
        libc::SIGSYS,
    ]);

    /// Those that end a process too, but only one that has no handler for them: where there is one
    /// they may be part of its ordinary life, thousands in a second (timers, a profiler, a garbage
    /// collector, one thread waking another), and their senders would hide the one that matters. All
    /// real-time signals are among them.
    pub const UNEXPECTED: Self = Self(
        Self::of(&[
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGPIPE,
            libc::SIGALRM,
            libc::SIGSTKFLT,
            libc::SIGVTALRM,
            libc::SIGPROF,
            libc::SIGIO,
            libc::SIGPWR,
        ])
        .0 | u64::MAX << 31,
    );

    /// The set of these signals. Numbers outside 1 to 64 are left out.
    pub const fn of(signals: &[i32]) -> Self {
        let (mut bits, mut i) = (0, 0);
        while i < signals.len() {
            if signals[i] >= 1 && signals[i] <= 64 {
                bits |= 1 << (signals[i] - 1);
            }
            i += 1;
        }
        Self(bits)
    }

    /// Whether it holds this signal.
    pub const fn contains(self, signal: i32) -> bool {
        signal >= 1 && signal <= 64 && self.0 >> (signal - 1) & 1 == 1
    }

    /// Bit `n - 1` for signal `n`.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }
}

/// How the probe works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeOptions {
    /// Size of the ring buffer; rounded up to a power of two that is a multiple of the page size.
    /// An exit takes 80 bytes of it.
    pub ring_bytes: u32,
    /// How many control groups the filter holds: those of watched units, and all above and below.
    pub cgroups: u32,
    /// `SCHED_FIFO` priority of the reader thread, 1 to 99; `None` leaves it an ordinary thread.
    pub realtime_priority: Option<u8>,
    /// Whether abnormal deaths outside watched units are reported.
    pub elsewhere: bool,
    /// Deaths by these signals are not abnormal.
    pub quiet_deaths: Signals,
    /// Signals to watched processes that are reported.
    pub signals: Signals,
    /// Signals that are reported too, if the process has no handler for them.
    pub unhandled: Signals,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self {
            ring_bytes: 1 << 20,
            cgroups: 16384,
            realtime_priority: Some(10),
            elsewhere: true,
            quiet_deaths: Signals::ORDINARY_ENDS,
            signals: Signals::TELLING,
            unhandled: Signals::UNEXPECTED,
        }
    }
}

impl ProbeOptions {
    fn ring_entries(&self, page_size: u32) -> u32 {
        self.ring_bytes.clamp(page_size, 1 << 30).next_power_of_two()
    }
}

/// What was reported and what was lost, since the probe was started.
///
/// While nothing is under way, `reported == delivered + duplicates + malformed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drops {
    /// Records that the kernel side put into the ring buffer.
    pub reported: u64,
    /// Events that the sink has dealt with.
    pub delivered: u64,
    /// Second reports of one end, not delivered. Before Linux 6.16 two threads of a process may
    /// both look like its last.
    pub duplicates: u64,
    /// Lost: the ring buffer was full.
    pub ring_full: u64,
    /// Lost: all events of a new control group, because the filter was full.
    pub cgroups_full: u64,
    /// Lost: records that could not be read.
    pub malformed: u64,
    /// Runs of a program that the kernel left out because the same program was at work on that CPU
    /// already (a signal sent by an interrupt); most of these would have reported nothing.
    pub skipped: u64,
}

impl Drops {
    /// Events that are known to be lost.
    pub fn lost(&self) -> u64 {
        self.ring_full + self.malformed
    }
}

/// Whether the reader thread has real-time priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Realtime {
    /// It was not asked for.
    Off,
    /// It has this priority.
    Granted(u8),
    /// It has not, for this reason; events may arrive late when the CPUs are busy.
    Refused(String),
}

/// Something that this kernel lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What, and why.
    pub what: String,
    /// What that means for ftd.
    pub effect: &'static str,
}

/// Why the BPF programs cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The kernel does not describe its types.
    #[error(
        "BPF programs cannot be used: the kernel's type information {path} is not usable ({cause}). \
         Boot a kernel with CONFIG_DEBUG_INFO_BTF=y (Debian's have it); in a container, mount /sys"
    )]
    NoBtf {
        /// The file.
        path: &'static str,
        /// What is wrong with it.
        cause: String,
    },
    /// The kernel's structures are not those that the programs know.
    #[error(
        "BPF programs cannot be used: this kernel has no {}. ftd knows Linux 6.1 to 6.18; a newer ftd may know this one",
        missing.join(", ")
    )]
    Fields {
        /// Structures and fields.
        missing: Vec<String>,
    },
    /// No unified hierarchy.
    #[error(
        "the cgroup2 file system is not to be found ({0}). Mount it: mount -t cgroup2 none /sys/fs/cgroup"
    )]
    Cgroup(#[source] io::Error),
    /// Which PID namespace this is cannot be told.
    #[error("/proc/self/ns/pid cannot be read ({0}). Mount /proc")]
    Namespace(#[source] io::Error),
    /// Not privileged.
    #[error("{thing} was refused: ftd has no {}. Give it these capabilities, or run it as root", lacking.join(", "))]
    Privilege {
        /// What was tried.
        thing: String,
        /// Capabilities.
        lacking: Vec<&'static str>,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
    /// The kernel is locked down.
    #[error(
        "{thing} was refused: the kernel is locked down ({mode}). Boot with lockdown=integrity, or switch Secure Boot off"
    )]
    LockedDown {
        /// What was tried.
        thing: String,
        /// The lockdown mode.
        mode: String,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
    /// No memory may be locked for BPF maps.
    #[error(
        "{thing} was refused: {error}. Raise the limit of locked memory (LimitMEMLOCK=infinity in ftd.service)"
    )]
    Memlock {
        /// What was tried.
        thing: String,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
    /// The kernel's verifier does not take a program.
    #[error(
        "the kernel's verifier refused the BPF program on {tracepoint}: {error}. It is a fault of ftd with this kernel; \
         please report it with these lines:\n{last_lines}"
    )]
    Verifier {
        /// The program's tracepoint.
        tracepoint: String,
        /// The kernel's answer.
        #[source]
        error: io::Error,
        /// The end of its log.
        last_lines: String,
    },
    /// The kernel has no such tracepoint, or not this kind of program.
    #[error(
        "the kernel has no tracepoint {tracepoint} for BPF programs ({cause}). Boot a kernel with CONFIG_BPF_EVENTS=y"
    )]
    Tracepoint {
        /// The tracepoint.
        tracepoint: String,
        /// More.
        cause: String,
    },
    /// Any other refusal.
    #[error("{thing} was refused by the kernel: {error}. See `ftctl doctor`")]
    Kernel {
        /// What was tried.
        thing: String,
        /// The kernel's answer.
        #[source]
        error: io::Error,
    },
    /// The embedded object is broken.
    #[error("the BPF object that ftd was built with is not usable: {0}. Build ftd anew")]
    Object(String),
    /// The reader thread.
    #[error(
        "the thread that reads the probe's events cannot be started: {0}. Look at the limits of ftd.service"
    )]
    Reader(#[source] io::Error),
}

impl ProbeError {
    /// Finds the reason behind what bpf(2) answered.
    fn from_kernel(thing: &str, error: io::Error) -> Self {
        let thing = thing.to_owned();
        let code = error.raw_os_error();
        if code == Some(libc::EPERM) || code == Some(libc::EACCES) {
            let lacking = lacking_capabilities();
            if !lacking.is_empty() {
                return Self::Privilege { thing, lacking, error };
            }
            if let Some(mode) = lockdown().filter(|mode| mode == "confidentiality") {
                return Self::LockedDown { thing, mode, error };
            }
            // Before Linux 5.11 maps counted as locked memory; EPERM was the answer.
            if thing.contains("map") {
                return Self::Memlock { thing, error };
            }
        }
        if code == Some(libc::ENOMEM) {
            return Self::Memlock { thing, error };
        }
        Self::Kernel { thing, error }
    }
}

/// Bytes.
fn page_size() -> u64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().map_or(4096, |size| size as u64)
}

/// Which of the capabilities for tracing programs this process lacks.
fn lacking_capabilities() -> Vec<&'static str> {
    // include/uapi/linux/capability.h
    const CAP_SYS_ADMIN: u32 = 21;
    const CAP_PERFMON: u32 = 38;
    const CAP_BPF: u32 = 39;

    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    let has = |capability: u32| effective >> capability & 1 == 1;
    if has(CAP_SYS_ADMIN) {
        return Vec::new();
    }
    [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON")]
        .into_iter()
        .filter_map(|(capability, name)| (!has(capability)).then_some(name))
        .collect()
}

/// The lockdown mode in force, see `kernel_lockdown(7)`.
fn lockdown() -> Option<String> {
    let modes = fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    let (_, rest) = modes.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Why a unit cannot be watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The path is none that a control group can have.
    #[error(
        "control group {path:?} cannot be watched: {cause}. Give it as systemd does: /system.slice/NAME.service"
    )]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        cause: &'static str,
    },
    /// Another slot watches it.
    #[error("control group {path} is already watched as slot {}. Name the unit once only", by.0)]
    Taken {
        /// The path.
        path: String,
        /// The other.
        by: Slot,
    },
    /// The slot watches another path.
    #[error("slot {} already watches another control group than {path}. Unwatch it first", slot.0)]
    Busy {
        /// The slot.
        slot: Slot,
        /// The new path.
        path: String,
    },
    /// The kernel side's tables are full.
    #[error("too many control groups are watched (16384, or 4096 names). Watch fewer units")]
    Full,
    /// A table cannot be written.
    #[error("the filter of the BPF programs cannot be changed: {0}. Restart ftd")]
    Map(String),
    /// A directory cannot be looked at.
    #[error("control group {} cannot be looked at: {error}. Is the cgroup2 file system mounted for ftd?", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sources_are_used_from_any_thread() {
        fn any_thread<T: Send + Sync>() {}
        any_thread::<Probe>();
        any_thread::<PidfdWatch>();
    }

    #[test]
    fn sets_of_signals() {
        assert!(Signals::TELLING.contains(libc::SIGKILL) && Signals::TELLING.contains(libc::SIGSYS));
        assert!(!Signals::TELLING.contains(libc::SIGCHLD) && !Signals::TELLING.contains(libc::SIGUSR1));
        assert!(Signals::of(&[64, 65, 0, -1]).contains(64));
        assert_eq!(Signals::of(&[1, 64, 65, 0, -1]).bits(), 1 | 1 << 63);
        assert!(!Signals::of(&[]).contains(0));
    }

    #[test]
    fn every_signal_that_ends_a_process_is_reported() {
        // signal(7): what these do by default is nothing, or to stop and continue for the terminal's sake
        let harmless =
            [libc::SIGCHLD, libc::SIGCONT, libc::SIGTTIN, libc::SIGTTOU, libc::SIGURG, libc::SIGWINCH];
        for signal in 1..=64 {
            let sets = [Signals::TELLING, Signals::UNEXPECTED, Signals::of(&harmless)];
            let times = sets.iter().filter(|set| set.contains(signal)).count();
            assert_eq!(times, 1, "signal {signal}");
        }
    }

    #[test]
    fn ring_sizes_are_powers_of_two_and_at_least_a_page() {
        let entries = |ring_bytes| ProbeOptions { ring_bytes, ..ProbeOptions::default() }.ring_entries(4096);
        assert_eq!(
            [entries(0), entries(4096), entries(4097), entries(u32::MAX)],
            [4096, 4096, 8192, 1 << 30]
        );
    }

    #[test]
    fn errors_name_thing_cause_and_mend() {
        let error = ProbeError::from_kernel("BPF map EVENTS", io::Error::from_raw_os_error(libc::ENOMEM));
        assert!(matches!(error, ProbeError::Memlock { .. }), "{error}");
        let error = ProbeError::from_kernel("BPF map EVENTS", io::Error::from_raw_os_error(libc::EINVAL));
        assert_eq!(
            error.to_string(),
            "BPF map EVENTS was refused by the kernel: Invalid argument (os error 22). See `ftctl doctor`"
        );
    }
}
