//! Tries the probe for real: makes processes that end in every way there is, and compares what the
//! probe says of each with what the kernel tells their parent.
//!
//! It runs as `ftd probe-test` on a host that is in doubt, and in the kernel tests, where it is
//! alone with a kernel: there is no shell and nothing in /bin. So its children are forks of itself.
//! A fork of a process with threads may call only what is safe in a signal handler, and what the C
//! library promises beyond that (memory and new threads, in glibc and musl); the children keep to it.
#![allow(unsafe_code, reason = "fork, wait4, prctl and the like, used in ways that nix does not offer")]

use std::{
    cell::RefCell,
    ffi::{CString, OsStr},
    fs,
    io::{self, Write},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    sys::stat::Mode,
    time::{ClockId, clock_gettime},
    unistd::UnlinkatFlags,
};

use super::{Probe, ProbeEvent, ProbeOptions, Slot, WatchError};
use crate::{event::ExitStatus, unit::cgroup};

/// How long an event may take to come. Long, for emulated machines; it does not slow a good run.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long is waited for what must not come.
const SILENCE: Duration = Duration::from_millis(300);
/// A user id that no account has.
const SOMEBODY: u32 = 4321;
const UNIT: Slot = Slot(7);
const OTHER: Slot = Slot(8);

/// The outcome of all checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Checks that held.
    pub passed: u32,
    /// Checks that did not.
    pub failed: u32,
    /// Checks that this host cannot make.
    pub skipped: u32,
}

enum Verdict {
    Fail(String),
    Skip(String),
}

impl From<String> for Verdict {
    fn from(why: String) -> Self {
        Self::Fail(why)
    }
}

impl From<&str> for Verdict {
    fn from(why: &str) -> Self {
        Self::Fail(why.into())
    }
}

impl From<io::Error> for Verdict {
    fn from(error: io::Error) -> Self {
        Self::Fail(error.to_string())
    }
}

impl From<nix::Error> for Verdict {
    fn from(error: nix::Error) -> Self {
        Self::Fail(error.to_string())
    }
}

type Check = Result<(), Verdict>;
type NamedCheck = (&'static str, fn(&Scene) -> Check);

/// Compares one field, and names it when it differs.
macro_rules! same {
    ($what:expr, $seen:expr, $wanted:expr) => {
        match (&$seen, &$wanted) {
            (seen, wanted) if seen == wanted => {}
            (seen, wanted) => {
                return Err(format!("{}: {seen:?} was reported, {wanted:?} is right", $what).into())
            }
        }
    };
}

/// Runs all checks, one line of output for each: `ok NAME`, `FAIL NAME: why` or `skip NAME: why`.
///
/// Needs root, and makes (and removes) control groups named `ftd-probe-test-*`. Fails only when
/// `out` cannot be written to; look at [`Report::failed`] for the rest.
pub fn run(out: &mut impl Write) -> io::Result<Report> {
    let mut report = Report::default();
    let scene = match Scene::new() {
        Ok(scene) => {
            tell(out, &mut report, "start", Ok(()))?;
            scene
        }
        Err(verdict) => {
            tell(out, &mut report, "start", Err(verdict))?;
            return Ok(report);
        }
    };
    let checks: [NamedCheck; 24] = [
        ("kernel-has-everything", kernel_has_everything),
        ("exit-code-and-every-field", exit_code),
        ("kill-by-somebody", kill_by_somebody),
        ("segfault", segfault),
        ("signal-without-handler", signal_without_handler),
        ("signal-in-the-kernels-name", signal_in_the_kernels_name),
        ("threads-killed-are-one-exit", threads_killed),
        ("threads-ending-together-are-one-exit", threads_ending_together),
        ("fork", fork),
        ("exec", exec),
        ("made-again", made_again),
        ("child-cgroup-inherits", child_cgroup_inherits),
        ("watched-while-running", watched_while_running),
        ("nested-watch-is-nearer", nested_watch),
        ("unwatch", unwatch),
        ("unwatch-while-cgroups-are-made", unwatch_while_made),
        ("path-too-long-is-no-error", path_too_long),
        ("full-filter-is-mended", full_filter),
        ("child-pid-namespace", child_pid_namespace),
        ("abnormal-death-elsewhere", abnormal_death_elsewhere),
        ("ordinary-death-elsewhere-is-silent", ordinary_death_elsewhere),
        ("oom", oom),
        ("nothing-lost", nothing_lost),
        ("drops-counted", drops_counted),
    ];
    for (name, check) in checks {
        scene.seen.borrow_mut().clear();
        let verdict = check(&scene);
        tell(out, &mut report, name, verdict)?;
    }
    Ok(report)
}

fn tell(out: &mut impl Write, report: &mut Report, name: &str, verdict: Check) -> io::Result<()> {
    match verdict {
        Ok(()) => {
            report.passed += 1;
            writeln!(out, "ok {name}")
        }
        Err(Verdict::Fail(why)) => {
            report.failed += 1;
            writeln!(out, "FAIL {name}: {why}")
        }
        Err(Verdict::Skip(why)) => {
            report.skipped += 1;
            writeln!(out, "skip {name}: {why}")
        }
    }
}

/// A probe that watches a unit, and the unit's control group.
struct Scene {
    probe: Probe,
    events: Receiver<ProbeEvent>,
    seen: RefCell<Vec<ProbeEvent>>,
    slice: Dir,
}

impl Scene {
    fn new() -> Result<Self, Verdict> {
        static RUNS: AtomicU32 = AtomicU32::new(0);

        let (send, events) = mpsc::channel();
        // the receiver is gone when the scene is
        let sink = move |event| _ = send.send(event);
        let options = ProbeOptions { ring_bytes: 1 << 20, ..ProbeOptions::default() };
        let probe = Probe::start(&options, sink).map_err(|error| error.to_string())?;
        let mount = cgroup::unified_mount()?;
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let name = format!("ftd-probe-test-{}-{run}.slice", std::process::id());
        // nothing of it exists yet, not even the slice
        probe.watch(UNIT, &format!("/{name}/unit.service")).map_err(|error| error.to_string())?;
        let slice = Dir::make(mount.join(name))?;
        let scene = Self { probe, events, seen: RefCell::default(), slice };
        fs::create_dir(scene.unit())?;
        Ok(scene)
    }

    fn unit(&self) -> PathBuf {
        self.slice.0.join("unit.service")
    }

    fn control_group(&self, name: &str) -> String {
        let slice = self.slice.0.file_name().unwrap_or_default().to_string_lossy();
        format!("/{slice}/{name}")
    }

    /// The first event of this check that fits, also if it came before.
    fn expect(&self, what: &str, mut fits: impl FnMut(&ProbeEvent) -> bool) -> Result<ProbeEvent, Verdict> {
        if let Some(event) = self.seen.borrow().iter().find(|event| fits(event)) {
            return Ok(event.clone());
        }
        let end = Instant::now() + PATIENCE;
        while let Ok(event) = self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.seen.borrow_mut().push(event.clone());
            if fits(&event) {
                return Ok(event);
            }
        }
        Err(format!("{what} was not reported within {PATIENCE:?}; there were {:?}", self.seen.borrow())
            .into())
    }

    fn expect_exit(&self, pid: u32) -> Result<Exit, Verdict> {
        let event = self.expect(
            &format!("the exit of {pid}"),
            |event| matches!(event, ProbeEvent::Exit { process, .. } if process.pid == pid),
        )?;
        Exit::of(event).ok_or_else(|| "no exit".into())
    }

    /// How many events fit, after waiting for late ones.
    fn count(&self, mut fits: impl FnMut(&ProbeEvent) -> bool) -> usize {
        while let Ok(event) = self.events.recv_timeout(SILENCE) {
            self.seen.borrow_mut().push(event);
        }
        self.seen.borrow().iter().filter(|event| fits(event)).count()
    }

    /// Of all processes with this name; others may die on the host meanwhile.
    fn exits_named(&self, name: &str) -> usize {
        self.count(|event| matches!(event, ProbeEvent::Exit { process, .. } if process.comm == name))
    }

    fn exits_of(&self, pid: u32) -> usize {
        self.count(|event| matches!(event, ProbeEvent::Exit { process, .. } if process.pid == pid))
    }
}

/// [`ProbeEvent::Exit`], to be looked into.
struct Exit {
    at: u64,
    slot: Option<Slot>,
    comm: String,
    uid: u32,
    ppid: u32,
    status: Option<ExitStatus>,
    run_ns: u64,
    max_rss: u64,
}

impl Exit {
    fn of(event: ProbeEvent) -> Option<Self> {
        let ProbeEvent::Exit { at, slot, process, ppid, status, run_ns, max_rss } = event else {
            return None;
        };
        Some(Self { at: at.0, slot, comm: process.comm, uid: process.uid, ppid, status, run_ns, max_rss })
    }
}

/// A control group of our own; removed with all below it.
struct Dir(PathBuf);

impl Dir {
    fn make(path: PathBuf) -> io::Result<Self> {
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        remove_below(&self.0);
    }
}

/// A cgroup is removed by rmdir alone, though it seems to hold files. Its processes have been
/// waited for; the kernel may still need a moment.
pub(crate) fn remove_below(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
        }
    }
    for _ in 0..100 {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

/// A child process; killed and waited for at the latest when it is dropped.
struct Child {
    pid: u32,
    ended: bool,
}

/// What the kernel tells a parent.
struct Ended {
    status: ExitStatus,
    max_rss: u64,
}

impl Child {
    /// Forks. The child takes a name, enters the control groups, and ends with what `body` returns.
    fn start(name: &str, groups: &[&Path], body: impl FnOnce() -> u8) -> io::Result<Self> {
        let name = CString::new(name)?;
        let procs: Vec<OwnedFd> = groups
            .iter()
            .map(|dir| Ok(fs::OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?.into()))
            .collect::<io::Result<_>>()?;
        // SAFETY: the child does nothing that the head of this file forbids, and never returns.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: plain system calls; the name is a C string, the buffer has one byte.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::prctl(libc::PR_SET_NAME, name.as_ptr());
                    for fd in &procs {
                        if libc::write(fd.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1 {
                            libc::_exit(99);
                        }
                    }
                }
                let code = body();
                // SAFETY: never returns, and runs no destructor of the parent's things.
                unsafe { libc::_exit(i32::from(code)) }
            }
            pid => Ok(Self { pid: pid.cast_unsigned(), ended: false }),
        }
    }

    fn kill(&self, signal: i32) {
        kill(self.pid, signal);
    }

    fn wait(&mut self) -> io::Result<Ended> {
        let mut status = 0;
        // SAFETY: zero is a value for each of its fields.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to values of our own.
        while unsafe { libc::wait4(self.pid.cast_signed(), &raw mut status, 0, &raw mut usage) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        self.ended = true;
        let status = ExitStatus::from_wait(status);
        Ok(Ended { status, max_rss: (usage.ru_maxrss as u64) << 10 })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            self.kill(libc::SIGKILL);
            let _ = self.wait();
        }
    }
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: plain system call, to a process of our own.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// For children: waits for a signal.
fn pause_forever() -> u8 {
    loop {
        // SAFETY: plain system call.
        unsafe { libc::pause() };
    }
}

/// For children: becomes somebody else.
fn become_somebody() {
    // SAFETY: plain system call. The raw one: the C library's would look for other threads.
    unsafe { libc::syscall(libc::SYS_setresuid, SOMEBODY, SOMEBODY, SOMEBODY) };
}

/// For children: ends the calling thread alone.
fn end_thread(code: i32) -> ! {
    loop {
        // SAFETY: does not return; the thread's stack stays allocated, with nothing on it that
        // somebody waits for.
        unsafe { libc::syscall(libc::SYS_exit, code) };
    }
}

fn boot_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// A pipe through which a child says one byte when it is ready.
struct Signpost {
    read: OwnedFd,
    write: OwnedFd,
}

impl Signpost {
    fn new() -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe()?;
        Ok(Self { read, write })
    }

    fn reached(&self) {
        // SAFETY: one byte of a static string.
        unsafe { libc::write(self.write.as_raw_fd(), c"r".as_ptr().cast(), 1) };
    }

    fn tell(&self, number: u32) {
        let bytes = number.to_ne_bytes();
        // SAFETY: as many bytes as there are.
        unsafe { libc::write(self.write.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    }

    fn wait(self) -> Check {
        let mut byte = [0];
        drop(self.write);
        match nix::unistd::read(&self.read, &mut byte)? {
            1 => Ok(()),
            _ => Err("a child ended before it was ready".into()),
        }
    }

    fn hear(self) -> Result<u32, Verdict> {
        let mut bytes = [0; 4];
        drop(self.write);
        match nix::unistd::read(&self.read, &mut bytes)? {
            4 => Ok(u32::from_ne_bytes(bytes)),
            _ => Err("a child ended before it said its number".into()),
        }
    }
}

fn kernel_has_everything(scene: &Scene) -> Check {
    match scene.probe.missing() {
        [] if scene.probe.follows_in_kernel() => Ok(()),
        missing => {
            let list: Vec<String> =
                missing.iter().map(|item| format!("{} ({})", item.what, item.effect)).collect();
            Err(list.join("; ").into())
        }
    }
}

fn exit_code(scene: &Scene) -> Check {
    const LIVES: Duration = Duration::from_millis(60);
    const TOUCHES: usize = 48 << 20;
    let before = boot_ns();
    let mut child = Child::start("ftd-seven", &[&scene.unit()], || {
        become_somebody();
        let mut memory = vec![1_u8; TOUCHES];
        memory.iter_mut().step_by(1024).for_each(|byte| *byte = 2);
        std::hint::black_box(&memory);
        thread::sleep(LIVES);
        7
    })?;
    let ended = child.wait()?;
    let after = boot_ns();
    let exit = scene.expect_exit(child.pid)?;
    same!("slot", exit.slot, Some(UNIT));
    same!("status", exit.status, Some(ExitStatus::Code(7)));
    same!("comm", exit.comm, "ftd-seven");
    same!("uid", exit.uid, SOMEBODY);
    same!("ppid", exit.ppid, std::process::id());
    same!("max rss", exit.max_rss, ended.max_rss);
    if exit.max_rss < TOUCHES as u64 {
        return Err(format!("max rss: {} bytes, but {TOUCHES} were touched", exit.max_rss).into());
    }
    if !(before..=after).contains(&exit.at) {
        return Err(format!("time: {} is not between {before} and {after}", exit.at).into());
    }
    if !(LIVES.as_nanos() as u64..=after - before).contains(&exit.run_ns) {
        return Err(format!("run time: {} ns, of {} at most", exit.run_ns, after - before).into());
    }
    same!("events of this process", scene.exits_of(child.pid), 1);
    Ok(())
}

fn kill_by_somebody(scene: &Scene) -> Check {
    let ready = Signpost::new()?;
    let mut target = Child::start("ftd-target", &[&scene.unit()], || {
        become_somebody();
        ready.reached();
        pause_forever()
    })?;
    ready.wait()?;
    let pid = target.pid;
    let mut killer = Child::start("ftd-killer", &[], || {
        become_somebody();
        kill(pid, libc::SIGKILL);
        0
    })?;
    killer.wait()?;
    target.wait()?;
    let signal = scene
        .expect("the signal", |event| matches!(event, ProbeEvent::Signal { target, .. } if *target == pid))?;
    let ProbeEvent::Signal { at, slot, signal, sender, .. } = signal else { return Err("no signal".into()) };
    same!("slot", slot, UNIT);
    same!("signal", signal, libc::SIGKILL);
    same!("sender's pid", sender.pid, killer.pid);
    same!("sender's comm", sender.comm, "ftd-killer");
    same!("sender's uid", sender.uid, SOMEBODY);
    let exit = scene.expect_exit(pid)?;
    same!("status", exit.status, Some(ExitStatus::Signal { signal: libc::SIGKILL, core: false }));
    if at.0 > exit.at {
        return Err(format!("the signal's time {} is after the exit's {}", at.0, exit.at).into());
    }
    Ok(())
}

fn segfault(scene: &Scene) -> Check {
    // where a core may lie for a moment
    let place = tempdir()?;
    let path = CString::new(place.0.as_os_str().as_bytes()).map_err(|_| "no path")?;
    let mut child = Child::start("ftd-segv", &[&scene.unit()], || {
        // SAFETY: plain system calls on values of our own; the write is meant to fault, and ends
        // this process.
        unsafe {
            let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
            libc::setrlimit(libc::RLIMIT_CORE, &raw const limit);
            libc::chdir(path.as_ptr());
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            // the first page is never mapped
            std::ptr::without_provenance_mut::<u8>(8).write_volatile(1);
        }
        0
    })?;
    let ended = child.wait()?;
    let exit = scene.expect_exit(child.pid)?;
    same!("status", exit.status, Some(ended.status));
    let ExitStatus::Signal { signal: libc::SIGSEGV, .. } = ended.status else {
        return Err(format!("the child ended by {} instead", ended.status).into());
    };
    let event = scene.expect(
        "the signal",
        |event| matches!(event, ProbeEvent::Signal { target, .. } if *target == child.pid),
    )?;
    let ProbeEvent::Signal { signal, sender, .. } = event else { return Err("no signal".into()) };
    same!("signal", signal, libc::SIGSEGV);
    same!("sender", (sender.pid, sender.comm.as_str(), sender.uid), (0, "kernel", 0));
    Ok(())
}

extern "C" fn do_nothing(_: i32) {}

fn signal_without_handler(scene: &Scene) -> Check {
    for signal in [libc::SIGUSR1, libc::SIGRTMIN() + 3] {
        let ready = Signpost::new()?;
        let mut child = Child::start("ftd-handler", &[&scene.unit()], || {
            let handler: extern "C" fn(i32) = do_nothing;
            // SAFETY: zero is a value for each of its fields.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handler as libc::sighandler_t;
            // once
            action.sa_flags = libc::SA_RESETHAND;
            // SAFETY: the structure is whole, and the handler does nothing.
            unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
            ready.reached();
            pause_forever()
        })?;
        ready.wait()?;
        child.kill(signal);
        let state = format!("/proc/{}/status", child.pid);
        // until it has handled the first; the second ends it
        let caught = |line: &str| {
            let mask = line.strip_prefix("SigCgt:").and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
            mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
        };
        while fs::read_to_string(&state)?.lines().any(caught) {
            thread::sleep(Duration::from_millis(1));
        }
        child.kill(signal);
        let ended = child.wait()?;
        same!("status", ended.status, ExitStatus::Signal { signal, core: false });
        let is_it = |event: &ProbeEvent| {
            matches!(event, ProbeEvent::Signal { target, signal: it, sender, .. }
                if *target == child.pid && *it == signal && sender.pid == std::process::id())
        };
        scene.expect("the signal", is_it)?;
        same!("signals that were not handled", scene.count(is_it), 1);
    }
    Ok(())
}

fn signal_in_the_kernels_name(scene: &Scene) -> Check {
    // include/uapi/asm-generic/siginfo.h
    const SI_TIMER: i32 = -2;
    let ready = Signpost::new()?;
    let mut target = Child::start("ftd-target", &[&scene.unit()], || {
        ready.reached();
        pause_forever()
    })?;
    ready.wait()?;
    let pid = target.pid;
    let mut killer = Child::start("ftd-pretender", &[], || {
        // SAFETY: zero is a value for each of its fields.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        info.si_signo = libc::SIGTERM;
        info.si_code = SI_TIMER;
        // SAFETY: the structure is whole.
        let done = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, libc::SIGTERM, &raw const info) };
        u8::from(done != 0)
    })?;
    same!("status of the sender", killer.wait()?.status, ExitStatus::Code(0));
    target.wait()?;
    let event = scene
        .expect("the signal", |event| matches!(event, ProbeEvent::Signal { target, .. } if *target == pid))?;
    let ProbeEvent::Signal { sender, .. } = event else { return Err("no signal".into()) };
    same!("sender", (sender.pid, sender.comm.as_str()), (killer.pid, "ftd-pretender"));
    Ok(())
}

/// For children: more threads.
fn threads(count: u32, body: impl Fn() + Send + Sync + Copy + 'static) {
    for _ in 0..count {
        if thread::Builder::new().spawn(body).is_err() {
            // SAFETY: never returns.
            unsafe { libc::_exit(98) };
        }
    }
}

fn threads_killed(scene: &Scene) -> Check {
    for _ in 0..10 {
        let ready = Signpost::new()?;
        let mut child = Child::start("ftd-threads", &[&scene.unit()], || {
            threads(8, || _ = pause_forever());
            ready.reached();
            pause_forever()
        })?;
        ready.wait()?;
        child.kill(libc::SIGKILL);
        child.wait()?;
        let exit = scene.expect_exit(child.pid)?;
        same!("comm", exit.comm, "ftd-threads");
        same!("status", exit.status, Some(ExitStatus::Signal { signal: libc::SIGKILL, core: false }));
    }
    same!("exits", scene.exits_named("ftd-threads"), 10);
    same!("forks", scene.count(|event| matches!(event, ProbeEvent::Fork { .. })), 0);
    Ok(())
}

fn threads_ending_together(scene: &Scene) -> Check {
    static READY: AtomicU32 = AtomicU32::new(0);
    static GO: AtomicBool = AtomicBool::new(false);
    const COUNT: u32 = 8;

    fn wait_and_end() {
        READY.fetch_add(1, Ordering::SeqCst);
        while !GO.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        end_thread(0)
    }

    for _ in 0..20 {
        let mut child = Child::start("ftd-together", &[&scene.unit()], || {
            threads(COUNT, wait_and_end);
            while READY.load(Ordering::SeqCst) < COUNT {
                thread::yield_now();
            }
            GO.store(true, Ordering::SeqCst);
            // the code of the last one is the process's
            end_thread(3)
        })?;
        let ended = child.wait()?;
        let exit = scene.expect_exit(child.pid)?;
        same!("status", exit.status, Some(ended.status));
        same!("comm", exit.comm, "ftd-together");
    }
    same!("exits", scene.exits_named("ftd-together"), 20);
    Ok(())
}

fn fork(scene: &Scene) -> Check {
    let mut child = Child::start("ftd-parent", &[&scene.unit()], || {
        // SAFETY: nothing but system calls in both.
        unsafe {
            match libc::fork() {
                0 => libc::_exit(5),
                pid => libc::waitpid(pid, std::ptr::null_mut(), 0),
            };
        }
        0
    })?;
    child.wait()?;
    let parent_pid = child.pid;
    let event = scene.expect(
        "the fork",
        |event| matches!(event, ProbeEvent::Fork { parent, .. } if *parent == parent_pid),
    )?;
    let ProbeEvent::Fork { slot, child: grandchild, .. } = event else { return Err("no fork".into()) };
    same!("slot", slot, UNIT);
    let exit = scene.expect_exit(grandchild)?;
    same!("slot of the grandchild", exit.slot, Some(UNIT));
    same!("ppid of the grandchild", exit.ppid, parent_pid);
    same!("status of the grandchild", exit.status, Some(ExitStatus::Code(5)));
    Ok(())
}

fn exec(scene: &Scene) -> Check {
    let program = fs::read_link("/proc/self/exe")?;
    let path = CString::new(program.as_os_str().as_bytes()).map_err(|_| "no path")?;
    let output = Signpost::new()?;
    let mut child = Child::start("ftd-before", &[&scene.unit()], || {
        let arguments = [path.as_ptr(), c"--help".as_ptr(), std::ptr::null()];
        // SAFETY: descriptors of our own; the array ends with a null pointer.
        unsafe {
            libc::dup2(output.read.as_raw_fd(), 0);
            libc::dup2(output.write.as_raw_fd(), 1);
            libc::dup2(output.write.as_raw_fd(), 2);
            libc::execv(path.as_ptr(), arguments.as_ptr());
        }
        97
    })?;
    let event = scene.expect(
        "the exec",
        |event| matches!(event, ProbeEvent::Exec { process, .. } if process.pid == child.pid),
    )?;
    let ProbeEvent::Exec { slot, process, .. } = event else { return Err("no exec".into()) };
    // nobody reads what it prints
    drop(output);
    child.wait()?;
    same!("slot", slot, UNIT);
    same!("uid", process.uid, 0);
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    // TASK_COMM_LEN, include/linux/sched.h
    same!("comm", process.comm, name.chars().take(15).collect::<String>());
    Ok(())
}

/// One process in a control group that ends with this code, and its slot.
fn slot_of_one(scene: &Scene, dir: &Path, code: u8) -> Result<Option<Slot>, Verdict> {
    let mut child = Child::start("ftd-one", &[dir], || code)?;
    child.wait()?;
    let exit = scene.expect_exit(child.pid)?;
    same!("status", exit.status, Some(ExitStatus::Code(code)));
    Ok(exit.slot)
}

fn made_again(scene: &Scene) -> Check {
    for code in 0..20 {
        fs::remove_dir(scene.unit())?;
        // a slice goes when it has become empty
        fs::remove_dir(&scene.slice.0)?;
        fs::create_dir(&scene.slice.0)?;
        fs::create_dir(scene.unit())?;
        same!("slot", slot_of_one(scene, &scene.unit(), code)?, Some(UNIT));
    }
    Ok(())
}

fn child_cgroup_inherits(scene: &Scene) -> Check {
    let sub = Dir::make(scene.unit().join("payload"))?;
    let deeper = Dir::make(sub.0.join("deeper"))?;
    same!("slot", slot_of_one(scene, &sub.0, 1)?, Some(UNIT));
    same!("slot", slot_of_one(scene, &deeper.0, 2)?, Some(UNIT));
    drop(deeper);
    drop(sub);
    let made_again = Dir::make(scene.unit().join("payload"))?;
    same!("slot", slot_of_one(scene, &made_again.0, 3)?, Some(UNIT));
    Ok(())
}

fn watched_while_running(scene: &Scene) -> Check {
    let other = Dir::make(scene.slice.0.join("other.service"))?;
    let sub = Dir::make(other.0.join("sub"))?;
    let ready = Signpost::new()?;
    let mut child = Child::start("ftd-running", &[&sub.0], || {
        ready.reached();
        pause_forever()
    })?;
    ready.wait()?;
    watch(scene, OTHER, "other.service")?;
    child.kill(libc::SIGTERM);
    child.wait()?;
    let exit = scene.expect_exit(child.pid)?;
    same!("slot", exit.slot, Some(OTHER));
    scene.probe.unwatch(OTHER).map_err(|error| error.to_string())?;
    Ok(())
}

fn watch(scene: &Scene, slot: Slot, name: &str) -> Check {
    scene.probe.watch(slot, &scene.control_group(name)).map_err(|error| error.to_string().into())
}

fn nested_watch(scene: &Scene) -> Check {
    watch(scene, OTHER, "unit.service/inner")?;
    let inner = Dir::make(scene.unit().join("inner"))?;
    same!("slot of the inner one", slot_of_one(scene, &inner.0, 1)?, Some(OTHER));
    same!("slot of the outer one", slot_of_one(scene, &scene.unit(), 2)?, Some(UNIT));
    scene.probe.unwatch(OTHER).map_err(|error| error.to_string())?;
    same!("slot of the inner one, unwatched", slot_of_one(scene, &inner.0, 3)?, Some(UNIT));
    Ok(())
}

fn unwatch(scene: &Scene) -> Check {
    let other = Dir::make(scene.slice.0.join("other.service"))?;
    watch(scene, OTHER, "other.service")?;
    same!("slot", slot_of_one(scene, &other.0, 1)?, Some(OTHER));
    scene.probe.unwatch(OTHER).map_err(|error| error.to_string())?;
    let mut child = Child::start("ftd-unseen", &[&other.0], || 1)?;
    child.wait()?;
    drop(other);
    let again = Dir::make(scene.slice.0.join("other.service"))?;
    let mut late = Child::start("ftd-unseen", &[&again.0], || 1)?;
    late.wait()?;
    same!("exits after unwatch", scene.exits_of(child.pid) + scene.exits_of(late.pid), 0);
    Ok(())
}

fn unwatch_while_made(scene: &Scene) -> Check {
    let other = Dir::make(scene.slice.0.join("other.service"))?;
    for round in 0..20 {
        watch(scene, OTHER, "other.service")?;
        let (made, done) = (AtomicU32::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let making = scope.spawn(|| {
                let mut dir = other.0.join(format!("{round}"));
                while !done.load(Ordering::SeqCst) && made.load(Ordering::SeqCst) < 10 {
                    fs::create_dir(&dir)?;
                    made.fetch_add(1, Ordering::SeqCst);
                    dir.push("d");
                }
                Ok::<_, io::Error>(())
            });
            while made.load(Ordering::SeqCst) == 0 && !making.is_finished() {
                thread::yield_now();
            }
            let unwatched = scene.probe.unwatch(OTHER).map_err(|error| error.to_string());
            done.store(true, Ordering::SeqCst);
            making.join().map_err(|_| "a thread panicked")??;
            Ok::<_, Verdict>(unwatched?)
        })?;
        let mut dir = other.0.join(format!("{round}"));
        for _ in 0..made.load(Ordering::SeqCst) {
            Child::start("ftd-unseen", &[&dir], || 1)?.wait()?;
            dir.push("d");
        }
        remove_below(&other.0.join(format!("{round}")));
    }
    let ends = scene.count(|event| matches!(event, ProbeEvent::Exit { slot: Some(OTHER), .. }));
    same!("exits after unwatch", ends, 0);
    Ok(())
}

/// Directories each in the one before, made and removed by descriptors: together their names are
/// longer than any path may be.
struct Chain {
    dirs: Vec<OwnedFd>,
    name: String,
}

impl Chain {
    fn make(top: &Path) -> Result<Self, Verdict> {
        // PATH_MAX and NAME_MAX, include/uapi/linux/limits.h
        const LINKS: usize = 4096 / 250 + 1;
        let mut chain = Self { dirs: vec![fs::File::open(top)?.into()], name: "d".repeat(250) };
        for _ in 0..LINKS {
            let last = &chain.dirs[chain.dirs.len() - 1];
            nix::sys::stat::mkdirat(last, chain.name.as_str(), Mode::S_IRWXU)?;
            let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let next = nix::fcntl::openat(last, chain.name.as_str(), flags, Mode::empty())?;
            chain.dirs.push(next);
        }
        Ok(chain)
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        while let Some(dir) = self.dirs.pop() {
            let _ = nix::unistd::unlinkat(dir, self.name.as_str(), UnlinkatFlags::RemoveDir);
        }
    }
}

fn path_too_long(scene: &Scene) -> Check {
    let other = Dir::make(scene.slice.0.join("other.service"))?;
    let beside = Dir::make(other.0.join("beside"))?;
    let chain = Chain::make(&other.0)?;
    watch(scene, OTHER, "other.service")?;
    same!("slot", slot_of_one(scene, &other.0, 1)?, Some(OTHER));
    same!("slot beside the chain", slot_of_one(scene, &beside.0, 2)?, Some(OTHER));
    scene.probe.refresh().map_err(|error| error.to_string())?;
    same!("slot after a refresh", slot_of_one(scene, &beside.0, 3)?, Some(OTHER));
    same!("slot of another unit", slot_of_one(scene, &scene.unit(), 4)?, Some(UNIT));
    scene.probe.unwatch(OTHER).map_err(|error| error.to_string())?;
    drop(chain);
    Ok(())
}

fn full_filter(scene: &Scene) -> Check {
    let (send, events) = mpsc::channel();
    // room for the root, the slice, the unit and two more
    let options = ProbeOptions { cgroups: 5, elsewhere: false, ..ProbeOptions::default() };
    let probe =
        Probe::start(&options, move |event| _ = send.send(event)).map_err(|error| error.to_string())?;
    probe.watch(UNIT, &scene.control_group("unit.service")).map_err(|error| error.to_string())?;
    let sub = |name: &str| Dir::make(scene.unit().join(name));
    let (first, _second, last) = (sub("1")?, sub("2")?, sub("3")?);
    let saw_last = |patience| {
        let mut child = Child::start("ftd-last", &[&last.0], || 1)?;
        child.wait()?;
        let is_it = |event| matches!(event, ProbeEvent::Exit { process, .. } if process.pid == child.pid);
        let end: Instant = Instant::now() + patience;
        let left = || end.saturating_duration_since(Instant::now());
        Ok::<_, io::Error>(std::iter::from_fn(|| events.recv_timeout(left()).ok()).any(is_it))
    };
    same!("cgroups that did not fit", probe.drops().cgroups_full, 1);
    same!("whether one that did not fit is seen", saw_last(SILENCE)?, false);
    match probe.refresh() {
        Err(WatchError::Full) => {}
        other => return Err(format!("refresh of a full filter: {other:?}").into()),
    }
    drop(first);
    probe.refresh().map_err(|error| error.to_string())?;
    same!("whether it is seen when there is room", saw_last(PATIENCE)?, true);
    Ok(())
}

fn child_pid_namespace(scene: &Scene) -> Check {
    let numbers = Signpost::new()?;
    let mut child = Child::start("ftd-outer", &[&scene.unit()], || {
        // SAFETY: nothing but system calls in both. The raw fork: the C library's caches numbers.
        unsafe {
            if libc::unshare(libc::CLONE_NEWPID) != 0 {
                return 1;
            }
            match libc::fork() {
                0 => libc::_exit(6),
                pid => {
                    numbers.tell(pid.cast_unsigned());
                    libc::waitpid(pid, std::ptr::null_mut(), 0);
                }
            }
        }
        0
    })?;
    let inner = numbers.hear()?;
    child.wait()?;
    let exit = scene.expect_exit(inner)?;
    same!("status", exit.status, Some(ExitStatus::Code(6)));
    same!("ppid", exit.ppid, child.pid);
    Ok(())
}

fn abnormal_death_elsewhere(scene: &Scene) -> Check {
    let mut child = Child::start("ftd-elsewhere", &[], pause_forever)?;
    child.kill(libc::SIGKILL);
    child.wait()?;
    let exit = scene.expect_exit(child.pid)?;
    same!("slot", exit.slot, None);
    same!("status", exit.status, Some(ExitStatus::Signal { signal: libc::SIGKILL, core: false }));
    Ok(())
}

fn ordinary_death_elsewhere(scene: &Scene) -> Check {
    let mut killed = Child::start("ftd-elsewhere", &[], pause_forever)?;
    killed.kill(libc::SIGTERM);
    killed.wait()?;
    let mut ended = Child::start("ftd-elsewhere", &[], || 1)?;
    ended.wait()?;
    same!("exits", scene.exits_of(killed.pid) + scene.exits_of(ended.pid), 0);
    Ok(())
}

/// A memory limit for a process of the unit. On hybrid hosts memory belongs to a hierarchy of its
/// own, and the process must be in both.
fn limit_memory(scene: &Scene, bytes: u64) -> Result<Option<Dir>, Verdict> {
    let limit = bytes.to_string();
    if let Some(mount) = cgroup::v1_memory_mount() {
        let name = scene.slice.0.file_name().unwrap_or_else(|| OsStr::new("ftd-probe-test"));
        let dir = Dir::make(mount.join(name))
            .map_err(|error| Verdict::Skip(format!("no memory cgroup can be made: {error}")))?;
        fs::write(dir.0.join("memory.limit_in_bytes"), &limit)?;
        // where swap is accounted for
        let _ = fs::write(dir.0.join("memory.memsw.limit_in_bytes"), &limit);
        return Ok(Some(dir));
    }
    let mount = cgroup::unified_mount()?;
    let has_memory = |dir: &Path| {
        fs::read_to_string(dir.join("cgroup.controllers"))
            .is_ok_and(|controllers| controllers.split_whitespace().any(|controller| controller == "memory"))
    };
    if !has_memory(&mount) {
        return Err(Verdict::Skip("this kernel has no memory controller, or not here".into()));
    }
    if !has_memory(&scene.slice.0) {
        fs::write(mount.join("cgroup.subtree_control"), "+memory").map_err(|error| {
            Verdict::Skip(format!("the memory controller cannot be handed down: {error}"))
        })?;
    }
    fs::write(scene.slice.0.join("cgroup.subtree_control"), "+memory")?;
    fs::write(scene.unit().join("memory.max"), &limit)?;
    // without swap accounting there is no such file
    let _ = fs::write(scene.unit().join("memory.swap.max"), "0");
    Ok(None)
}

/// This process's resident memory, see `proc_pid_statm(5)`.
fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * super::page_size()
}

fn oom(scene: &Scene) -> Check {
    const LIMIT: u64 = 32 << 20;
    let v1 = limit_memory(scene, LIMIT)?;
    let unit = scene.unit();
    let mut groups = vec![unit.as_path()];
    groups.extend(v1.as_ref().map(|dir| dir.0.as_path()));
    let mut child = Child::start("ftd-hog", &groups, || {
        become_somebody();
        let mut memory = vec![1_u8; 4 * LIMIT as usize];
        memory.iter_mut().step_by(1024).for_each(|byte| *byte = 2);
        std::hint::black_box(&memory);
        0
    })?;
    let ended = child.wait()?;
    let killed = ExitStatus::Signal { signal: libc::SIGKILL, core: false };
    if ended.status != killed {
        return Err(format!("the limit did not hold: {}", ended.status).into());
    }
    let event = scene.expect(
        "the OOM kill",
        |event| matches!(event, ProbeEvent::Oom { process, .. } if process.pid == child.pid),
    )?;
    let ProbeEvent::Oom { at, slot, process, rss } = event else { return Err("no OOM kill".into()) };
    same!("slot", slot, Some(UNIT));
    same!("comm", process.comm, "ftd-hog");
    same!("uid", process.uid, SOMEBODY);
    // Each CPU may keep a few pages uncounted; what the child shares with us since the fork is in
    // its resident memory, but not in its control group.
    let most = LIMIT + resident_bytes();
    if !(LIMIT / 2..=most).contains(&rss[0]) {
        return Err(
            format!("anonymous memory: {} bytes is not between {} and {most}", rss[0], LIMIT / 2).into()
        );
    }
    let exit = scene.expect_exit(child.pid)?;
    same!("status", exit.status, Some(killed));
    if at.0 > exit.at {
        return Err("the victim's exit was before the choice".into());
    }
    let event = scene.expect(
        "the signal",
        |event| matches!(event, ProbeEvent::Signal { target, .. } if *target == child.pid),
    )?;
    let ProbeEvent::Signal { sender, .. } = event else { return Err("no signal".into()) };
    same!("sender", (sender.pid, sender.comm.as_str()), (0, "kernel"));
    Ok(())
}

fn nothing_lost(scene: &Scene) -> Check {
    scene.count(|_| false);
    let drops = scene.probe.drops();
    same!("events lost", drops.lost(), 0);
    same!("cgroups lost", drops.cgroups_full, 0);
    same!("accounted for", drops.delivered + drops.duplicates, drops.reported);
    if drops.delivered == 0 {
        return Err("nothing was ever delivered".into());
    }
    Ok(())
}

/// A sink that waits until it is let go.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self.opened.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }
}

/// Opens a gate whatever happens, or the probe behind it could not be stopped.
struct OpenAtLast(Arc<Gate>);

impl Drop for OpenAtLast {
    fn drop(&mut self) {
        self.0.open();
    }
}

fn drops_counted(scene: &Scene) -> Check {
    const EXITS: u64 = 300;
    let gate = Arc::new(Gate::default());
    let received = Arc::new(AtomicU32::new(0));
    // a page of ring buffer, and nobody who reads it
    let options = ProbeOptions { ring_bytes: 1, elsewhere: false, ..ProbeOptions::default() };
    let sink = {
        let (gate, received) = (Arc::clone(&gate), Arc::clone(&received));
        move |_| {
            gate.pass();
            received.fetch_add(1, Ordering::SeqCst);
        }
    };
    let probe = Probe::start(&options, sink).map_err(|error| error.to_string())?;
    // dropped before the probe
    let last = OpenAtLast(gate);
    let unit = scene.control_group("unit.service");
    probe.watch(UNIT, &unit).map_err(|error| error.to_string())?;
    for _ in 0..EXITS {
        Child::start("ftd-flood", &[&scene.unit()], || 0)?.wait()?;
    }
    let blocked = probe.drops();
    same!("delivered while the sink is blocked", blocked.delivered, 0);
    same!("in the ring and lost", blocked.reported + blocked.ring_full, EXITS);
    if blocked.ring_full == 0 {
        return Err("the ring did not overflow".into());
    }
    last.0.open();
    let end = Instant::now() + PATIENCE;
    while probe.drops().delivered < blocked.reported && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    same!("received and lost", u64::from(received.load(Ordering::SeqCst)) + probe.drops().ring_full, EXITS);
    // and it goes on
    Child::start("ftd-after", &[&scene.unit()], || 0)?.wait()?;
    while probe.drops().delivered < blocked.reported + 1 && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    same!("received after the flood", u64::from(received.load(Ordering::SeqCst)), blocked.reported + 1);
    same!("lost after the flood", probe.drops().ring_full, blocked.ring_full);
    Ok(())
}

/// A directory of ordinary files; removed with them.
struct Files(PathBuf);

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tempdir() -> io::Result<Files> {
    let temp = std::env::temp_dir();
    // an initramfs may have none
    let parent = if temp.is_dir() { temp.as_path() } else { Path::new("/") };
    let path = parent.join(format!("ftd-probe-test-{}", std::process::id()));
    fs::create_dir(&path)?;
    Ok(Files(path))
}
