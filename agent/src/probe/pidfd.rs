//! The way without BPF: a pidfd for each process, and a thread that waits for all of them.
//!
//! Only processes that were named are seen, and only their end. A pidfd becomes readable when the
//! process has ended; how it ended must be asked then, and is in one of three places: with the
//! kernel's record of reaped processes (`PIDFD_GET_INFO` with `PIDFD_INFO_EXIT`, Linux 6.15), with
//! the zombie in /proc while nobody has reaped it, or nowhere. The zombie cannot tell a good end: its
//! status is shown as 0 to those who may not see it, too.
#![allow(unsafe_code, reason = "pidfd_open and its ioctl have no safe wrappers in nix")]

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};

use super::{BootNs, ProbeEvent, Slot};
use crate::event::{ExitStatus, Process};

/// The key of the stopping event; those of processes count up from 0.
const STOP: u64 = u64::MAX;

/// Why a process cannot be watched by pidfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PidfdError {
    /// It is gone; whoever asked may have to look how.
    #[error(
        "process {pid} cannot be watched: it has ended already. Ask systemd for the unit's main process again"
    )]
    Gone {
        /// The process.
        pid: u32,
    },
    /// The kernel refuses.
    #[error(
        "process {pid} cannot be watched: {error}. ftd needs Linux 5.3 or newer and free file descriptors"
    )]
    Open {
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The thread cannot be started.
    #[error("the thread that waits for processes cannot be started: {0}. Look at the limits of ftd.service")]
    Start(#[source] io::Error),
}

/// A process as it was when it was named; /proc has nothing of it any more when it has been reaped.
#[derive(Debug)]
struct Watched {
    slot: Slot,
    pidfd: OwnedFd,
    stat: Stat,
    uid: u32,
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    stop: EventFd,
    next: AtomicU64,
    watched: Mutex<HashMap<u64, Watched>>,
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, HashMap<u64, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for processes to end. Dropping it ends its thread.
#[derive(Debug)]
pub struct PidfdWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl PidfdWatch {
    /// Starts the thread that calls `sink` with a [`ProbeEvent::Exit`] for each process that ends.
    /// Fails where the kernel, or a filter of system calls, has no pidfds to give.
    pub fn start(sink: impl FnMut(ProbeEvent) + Send + 'static) -> Result<Self, PidfdError> {
        let pid = std::process::id();
        pidfd_open(pid).map_err(|error| PidfdError::Open { pid, error: error.into() })?;
        let start = |error: Errno| PidfdError::Start(error.into());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(start)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(start)?;
        epoll.add(stop.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, STOP)).map_err(start)?;
        let shared = Arc::new(Shared { epoll, stop, next: AtomicU64::new(0), watched: Mutex::default() });
        let thread = thread::Builder::new()
            .name("ftd-pidfd".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || wait(&shared, sink)
            })
            .map_err(PidfdError::Start)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watches a process on behalf of a unit. It is forgotten when it has ended.
    pub fn watch(&self, slot: Slot, pid: u32) -> Result<(), PidfdError> {
        let open = |error: Errno| match error {
            Errno::ESRCH => PidfdError::Gone { pid },
            error => PidfdError::Open { pid, error: error.into() },
        };
        let pidfd = pidfd_open(pid).map_err(open)?;
        let stat = Stat::read(pid).ok_or(PidfdError::Gone { pid })?;
        let uid = uid(pid).ok_or(PidfdError::Gone { pid })?;
        // Not reaped before both were read, so they are of this process and not of a later one with
        // its number.
        is_unreaped(&pidfd).map_err(open)?;
        let key = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let mut watched = self.shared.watched();
        let added = self.shared.epoll.add(pidfd.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key));
        added.map_err(open)?;
        watched.insert(key, Watched { slot, pidfd, stat, uid });
        Ok(())
    }

    /// Forgets all processes of a unit.
    pub fn unwatch(&self, slot: Slot) {
        // closing a pidfd takes it out of the epoll set
        self.shared.watched().retain(|_, watched| watched.slot != slot);
    }
}

impl Drop for PidfdWatch {
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread that waits for processes ended by a panic");
        }
    }
}

fn wait(shared: &Shared, mut sink: impl FnMut(ProbeEvent)) {
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let ready = match shared.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, "processes cannot be waited for any more");
                return;
            }
        };
        let at = BootNs(boot_ns());
        for event in &events[..ready] {
            if event.data() == STOP {
                return;
            }
            // released before the sink, which may watch the successor
            let Some(ended) = shared.watched().remove(&event.data()) else { continue };
            let _ = shared.epoll.delete(ended.pidfd.as_fd());
            sink(ended.exit(at));
        }
    }
}

impl Watched {
    fn exit(self, at: BootNs) -> ProbeEvent {
        let zombie = || {
            let stat = Stat::read(self.stat.pid)?;
            let same = stat.start_ticks == self.stat.start_ticks && stat.state == 'Z';
            same.then_some(stat.exit_code).flatten()
        };
        // Asked again at last: it may have been reaped in between.
        let status = exit_info(&self.pidfd).or_else(zombie).or_else(|| exit_info(&self.pidfd));
        let started = self.stat.start_ticks.saturating_mul(1_000_000_000 / ticks_per_second());
        ProbeEvent::Exit {
            at,
            slot: Some(self.slot),
            process: Process { pid: self.stat.pid, comm: self.stat.comm, uid: self.uid },
            ppid: self.stat.ppid,
            status: status.map(ExitStatus::from_wait),
            run_ns: at.0.saturating_sub(started),
            max_rss: 0,
        }
    }
}

/// The end of a process that is ending, has ended, or is gone; `None` if it lives. For processes of which nobody
/// may have told, because they were already ending when they began to be watched.
pub fn ended(slot: Slot, pid: u32) -> Option<ProbeEvent> {
    let is_ending = |task: fs::DirEntry| {
        let stat = fs::read(task.path().join("stat")).ok();
        stat.and_then(|stat| Stat::parse(&String::from_utf8_lossy(&stat))).is_none_or(|stat| stat.is_ending())
    };
    // Its first thread may have ended and the others go on.
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    if !tasks.map_or(true, |tasks| tasks.flatten().all(is_ending)) {
        return None;
    }
    let at = BootNs(boot_ns());
    let named = pidfd_open(pid).ok().and_then(|pidfd| {
        let (stat, uid) = (Stat::read(pid)?, uid(pid)?);
        Some(Watched { slot, pidfd, stat, uid })
    });
    Some(named.map_or_else(
        || {
            let process = Process { pid, comm: "(gone)".into(), uid: 0 };
            ProbeEvent::Exit { at, slot: Some(slot), process, ppid: 0, status: None, run_ns: 0, max_rss: 0 }
        },
        |watched| watched.exit(at),
    ))
}

fn pidfd_open(pid: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: two integers; the answer is a descriptor of our own, or -1.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above; descriptors fit into an i32.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the process still has its number, alive or as a zombie.
fn is_unreaped(pidfd: &OwnedFd) -> Result<(), Errno> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: signal 0 only asks.
    let asked = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), 0, no_info, 0) };
    Errno::result(asked).map(drop)
}

/// `struct pidfd_info` of Linux 6.15, `include/uapi/linux/pidfd.h`.
#[derive(Debug, Default)]
#[repr(C)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `_IOWR(0xff, 11, struct pidfd_info)`.
const PIDFD_GET_INFO: u64 = 3 << 30 | (size_of::<PidfdInfo>() as u64) << 16 | 0xff << 8 | 0x0b;

/// The wait status of a process that has been reaped. `None` before that, and on older kernels.
fn exit_info(pidfd: &OwnedFd) -> Option<i32> {
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the request says how large info is.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as _, &raw mut info) };
    (done == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

fn boot_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

fn ticks_per_second() -> u64 {
    sysconf(SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .and_then(|ticks| u64::try_from(ticks).ok())
        .unwrap_or(100)
        .max(1)
}

fn uid(pid: u32) -> Option<u32> {
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    parse_uid(&String::from_utf8_lossy(&status))
}

/// The real user id; the name above it may be no UTF-8.
fn parse_uid(status: &str) -> Option<u32> {
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    uids.split_whitespace().next()?.parse().ok()
}

/// What is used of `/proc/PID/stat`, see `proc_pid_stat(5)`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stat {
    pid: u32,
    comm: String,
    state: char,
    ppid: u32,
    /// `PF_` flags of the kernel.
    flags: u32,
    /// Since boot.
    start_ticks: u64,
    /// Wait status of a zombie. `None` when it is shown as 0: that is a good end, or one that the
    /// reader may not see (`ptrace_may_access` in `fs/proc/array.c`), and nobody can tell which.
    exit_code: Option<i32>,
}

impl Stat {
    /// Dead, or on its way there: it executes nothing of its program any more.
    fn is_ending(&self) -> bool {
        /// include/linux/sched.h.
        const PF_EXITING: u32 = 0x4;
        matches!(self.state, 'Z' | 'X') || self.flags & PF_EXITING != 0
    }

    fn read(pid: u32) -> Option<Self> {
        let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    fn parse(text: &str) -> Option<Self> {
        // the name may hold anything, closing parentheses too
        let (pid, rest) = text.split_once(" (")?;
        let (comm, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // fields[0] is field 3 of the manual page
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Self {
            pid: pid.parse().ok()?,
            comm: comm.to_owned(),
            state: field(3)?.chars().next()?,
            ppid: field(4)?.parse().ok()?,
            flags: field(9)?.parse().ok()?,
            start_ticks: field(22)?.parse().ok()?,
            exit_code: field(52).and_then(|code| code.parse().ok()).filter(|code| *code != 0),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use std::{
        process::{Command, Stdio},
        sync::mpsc,
        time::Duration,
    };

    use super::*;

    #[test]
    fn a_name_may_hold_parentheses() {
        let stat = Stat::parse(&format!("12 (a) b (c) S 1 {}", fields_to(51) + " 52")).unwrap();
        assert_eq!((stat.pid, stat.comm.as_str(), stat.state, stat.ppid), (12, "a) b (c", 'S', 1));
        assert_eq!((stat.start_ticks, stat.exit_code), (22, Some(52)));
        assert_eq!(Stat::parse("12 (a"), None);
        assert_eq!(Stat::parse("12 (a) S"), None);
    }

    /// From the fifth field on, each its own number.
    fn fields_to(last: usize) -> String {
        (5..=last).map(|number| number.to_string()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_status_of_zero_is_none() {
        let of = |status: &str| Stat::parse(&format!("12 (a) Z 1 {} {status}", fields_to(51))).unwrap();
        assert_eq!(of("11").exit_code, Some(11));
        assert_eq!(of("256").exit_code, Some(256));
        assert_eq!(of("0").exit_code, None, "what may not be seen is shown as 0");
        assert_eq!(of("").exit_code, None);
    }

    #[test]
    fn a_user_is_found_below_any_name() {
        let status = b"Name:\t\xff\xfe\nUmask:\t0022\nUid:\t33\t0\t0\t0\nGid:\t1\n";
        assert_eq!(parse_uid(&String::from_utf8_lossy(status)), Some(33));
        assert_eq!(parse_uid("Name:\ta\n"), None);
        assert_eq!(uid(std::process::id()), Some(nix::unistd::getuid().as_raw()));
    }

    fn child() -> std::process::Child {
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_good_end_is_told_by_the_kernels_record_alone() {
        let mut child = child();
        let pidfd = pidfd_open(child.id()).unwrap();
        let stat = Stat::read(child.id()).unwrap();
        let watched = |pidfd| Watched { slot: Slot(0), pidfd, stat: stat.clone(), uid: 0 };
        let status = |watched: Watched| {
            let ProbeEvent::Exit { status, .. } = watched.exit(BootNs(boot_ns())) else { panic!() };
            status
        };
        drop(child.stdin.take());
        while Stat::read(child.id()).unwrap().state != 'Z' {
            thread::yield_now();
        }
        assert_eq!(status(watched(pidfd.try_clone().unwrap())), None, "a zombie cannot tell");
        child.wait().unwrap();
        // before Linux 6.15 nobody can
        let told = status(watched(pidfd));
        assert!(matches!(told, None | Some(ExitStatus::Code(0))), "{told:?}");
    }

    fn next(events: &mpsc::Receiver<ProbeEvent>) -> ProbeEvent {
        events.recv_timeout(Duration::from_secs(10)).expect("no event came")
    }

    #[test]
    fn a_zombie_tells_its_status() {
        let (send, events) = mpsc::channel();
        let watch = PidfdWatch::start(move |event| send.send(event).unwrap()).unwrap();
        let mut child = child();
        watch.watch(Slot(3), child.id()).unwrap();
        child.kill().unwrap();
        // not reaped until the event has come
        let ProbeEvent::Exit { slot, process, ppid, status, .. } = next(&events) else { panic!() };
        assert_eq!((slot, process.pid, ppid), (Some(Slot(3)), child.id(), std::process::id()));
        assert_eq!(status, Some(ExitStatus::Signal { signal: 9, core: false }));
        child.wait().unwrap();
        assert!(matches!(watch.watch(Slot(3), child.id()), Err(PidfdError::Gone { .. })));
    }

    #[test]
    fn an_end_that_nobody_told_of_is_seen_until_it_is_reaped_and_after() {
        let mut child = child();
        let pid = child.id();
        assert!(ended(Slot(1), pid).is_none(), "it lives");
        child.kill().unwrap();
        while !Stat::read(pid).unwrap().is_ending() {
            thread::yield_now();
        }
        let Some(ProbeEvent::Exit { slot, process, .. }) = ended(Slot(1), pid) else { panic!() };
        assert_eq!((slot, process.pid, process.comm.as_str()), (Some(Slot(1)), pid, "cat"));
        while Stat::read(pid).unwrap().state != 'Z' {
            thread::yield_now();
        }
        let Some(ProbeEvent::Exit { status, .. }) = ended(Slot(1), pid) else { panic!() };
        assert_eq!(status, Some(ExitStatus::Signal { signal: 9, core: false }));
        child.wait().unwrap();
        let Some(ProbeEvent::Exit { process, status, .. }) = ended(Slot(1), pid) else { panic!() };
        assert_eq!((process.pid, status), (pid, None));
    }

    #[test]
    fn a_process_lives_on_without_its_first_thread() {
        // A program whose first thread ends and whose second waits for the end of input.
        let program = "import ctypes, sys, threading; threading.Thread(target=sys.stdin.read).start(); \
                       print(flush=True); ctypes.CDLL(None).pthread_exit(None)";
        let python = Command::new("python3")
            .args(["-c", program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = python else {
            eprintln!("skipped: it needs python3");
            return;
        };
        while !Stat::read(child.id()).unwrap().is_ending() {
            thread::yield_now();
        }
        assert!(ended(Slot(1), child.id()).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_unwatched_process_is_forgotten() {
        let (send, events) = mpsc::channel();
        let watch = PidfdWatch::start(move |event| send.send(event).unwrap()).unwrap();
        let mut first = child();
        let mut second =
            Command::new("sh").args(["-c", "read _; exit 7"]).stdin(Stdio::piped()).spawn().unwrap();
        watch.watch(Slot(0), first.id()).unwrap();
        watch.watch(Slot(1), second.id()).unwrap();
        watch.unwatch(Slot(0));
        first.kill().unwrap();
        first.wait().unwrap();
        drop(second.stdin.take());
        let ProbeEvent::Exit { slot, status, .. } = next(&events) else { panic!() };
        assert_eq!((slot, status), (Some(Slot(1)), Some(ExitStatus::Code(7))));
        second.wait().unwrap();
        drop(watch);
        assert!(events.recv().is_err(), "the thread has ended, and the sink with it");
    }
}
