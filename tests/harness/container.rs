//! A host's way up: from an ordinary process to systemd as PID 1 of namespaces of its own.
//!
//! Namespaces belong to processes, and a test binary has threads, which may not change most of them. So
//! the `hosts` helper program does it, in two processes:
//!
//! - the **supervisor** (`hosts supervise`) makes the PID namespace, starts the first process in it, and
//!   waits for its end. It stays outside of the host's cgroup, so that systemd finds its root empty.
//! - the **init** (`hosts init`) enters the host's cgroup, makes the other namespaces, says `ready`, waits
//!   for `go` (meanwhile whoever boots the host puts `eth0` into the new network namespace), mounts the
//!   host's file systems, says `started`, and becomes `/sbin/init`. If anything fails it says
//!   `error: WHY` instead.
//!
//! Both get all they need from the host's `spec.json`. What of the kernel is not in namespaces is made
//! read-only, so that no host changes the machine: `/sys`, and `/proc/sys` but for `net`. Below `/sys`,
//! cgroup2, bpffs and tracefs are mounted afresh and can be written: ftd needs them.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::{chdir, pivot_root, sethostname, setsid};
use serde::{Deserialize, Serialize};

use crate::cgroup::Group;
use crate::command;
use crate::process::Process;

/// All that a host is made of; kept in its directory as `spec.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// The lab's id.
    pub lab: String,
    /// The host's name.
    pub name: String,
    /// Its address on the lab's bridge.
    pub address: Ipv4Addr,
    /// The network's prefix length.
    pub prefix: u8,
    /// Its network card's address, the same after a reboot.
    pub mac: String,
    /// Read-only file systems, topmost first.
    pub lowers: Vec<PathBuf>,
    /// The lab's directory of this host.
    pub dir: PathBuf,
    /// PIDs in the host start here, so that a process moved to another host finds its PID free.
    pub first_pid: u32,
    /// Its group in the unified hierarchy.
    pub unified: PathBuf,
    /// Its group in the memory hierarchy, where that is of version 1.
    pub memory: Option<PathBuf>,
    /// Memory limit in bytes.
    pub memory_limit: u64,
    /// Files to write before its first boot.
    pub seed: Vec<Seed>,
}

/// A file that a host has before its first boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Seed {
    /// Where, absolute.
    pub path: PathBuf,
    /// What.
    pub text: String,
}

impl Spec {
    /// Reads the spec in a host's directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("spec.json");
        let text = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        serde_json::from_slice(&text).with_context(|| {
            format!("{} is not a host of this version; `cargo xtask hosts down` removes it", path.display())
        })
    }

    /// Writes it into the host's directory.
    pub fn write(&self) -> Result<()> {
        let path = self.dir.join("spec.json");
        fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("{} cannot be written", path.display()))
    }

    /// The file that takes what systemd prints, appended to at each boot.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// The file that names the host's PID 1, as a [`Process`].
    pub fn leader(&self) -> PathBuf {
        self.dir.join("leader")
    }

    /// The tmpfs with the host's own data: the overlay's upper and work directories.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }
}

/// The supervisor. Returns when the host is gone.
pub fn supervise(dir: &Path) -> Result<ExitCode> {
    // Of no terminal, so that Ctrl-C and hang-ups reach whoever owns the lab and not its hosts.
    setsid().context("a session of its own cannot be had")?;
    let spec = Spec::read(dir)?;
    unshare(CloneFlags::CLONE_NEWPID).context("no PID namespace can be made (as root?)")?;
    let mut init = Command::new("/proc/self/exe");
    init.arg0("hosts").args(["init", "--lab", &spec.lab]).arg(dir);
    let status = init.status().context("the first process of the host cannot be started")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The init: does not return if all goes well.
pub fn init(dir: &Path) -> Result<ExitCode> {
    let error = match become_init(dir) {
        Ok(never) => match never {},
        Err(error) => format!("{error:#}").replace('\n', " "),
    };
    println!("error: {error}");
    bail!(error)
}

fn become_init(dir: &Path) -> Result<std::convert::Infallible> {
    let spec = Spec::read(dir)?;
    // This /proc is still the machine's: it says which PID this process has there.
    let pid = fs::read_link("/proc/self").context("/proc is not mounted")?;
    let pid: i32 = pid.to_string_lossy().parse().context("/proc/self is not a PID")?;
    fs::write(spec.leader(), Process::of(pid)?.to_string())?;

    for group in std::iter::once(&spec.unified).chain(&spec.memory) {
        Group::at(group).enter()?;
    }
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(all).context("namespaces cannot be made (`cargo xtask hosts doctor` says which are missing)")?;
    println!("ready");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    ensure!(line.trim() == "go", "whoever boots this host has gone away");

    sethostname(&spec.name)?;
    network(&spec)?;
    let console = OpenOptions::new()
        .create(true)
        .append(true)
        .open(spec.console())
        .with_context(|| format!("{} cannot be written", spec.console().display()))?;
    let first_boot = !spec.disk().join("booted").exists();
    file_systems(&spec)?;
    if first_boot {
        seed(&spec.seed)?;
    }

    println!("started");
    let error = Command::new("/sbin/init")
        .env_clear()
        .envs([("container", "ftd-lab"), ("TERM", "dumb"), ("PATH", crate::enter::PATH)])
        .stdin(File::open("/dev/null")?)
        .stdout(console.try_clone()?)
        .stderr(console)
        .exec();
    Err(error).context("/sbin/init of the root file system cannot be run")
}

/// Loopback, and the card that is already here.
fn network(spec: &Spec) -> Result<()> {
    let address = format!("{}/{}", spec.address, spec.prefix);
    for words in ["link set lo up", &format!("addr add {address} dev eth0"), "link set eth0 up"] {
        command::ok(Command::new("ip").args(words.split(' ')))?;
    }
    Ok(())
}

fn mounted(kind: &str, at: &Path, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(Some(kind), at, Some(kind), flags, data)
        .with_context(|| format!("{kind} cannot be mounted at {}", at.display()))
}

/// Mounts a directory over itself with other flags.
fn bound(path: &Path, flags: MsFlags) -> Result<()> {
    let none = None::<&str>;
    mount(Some(path), path, none, MsFlags::MS_BIND, none)
        .and_then(|()| mount(none, path, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, none))
        .with_context(|| format!("{} cannot be mounted over itself", path.display()))
}

/// Mounts the host's tree and makes it the root.
fn file_systems(spec: &Spec) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("mounts cannot be made private")?;

    let disk = spec.disk();
    let root = disk.join("root");
    overlay(&spec.lowers, &disk.join("upper"), &disk.join("work"), &root)?;

    let usual = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let at = |path: &str| root.join(path);
    mounted("proc", &at("proc"), usual, None)?;
    let last_pid = at("proc/sys/kernel/ns_last_pid");
    fs::write(&last_pid, spec.first_pid.to_string()).with_context(|| {
        let most = fs::read_to_string(at("proc/sys/kernel/pid_max")).unwrap_or_default();
        format!(
            "PIDs of {} cannot begin at {} (the machine's limit is {}). Mend: sysctl kernel.pid_max=4194304",
            spec.name,
            spec.first_pid,
            most.trim()
        )
    })?;
    let sys = at("sys");
    mounted("sysfs", &sys, usual, None)?;
    let none = None::<&str>;
    mount(none, &sys, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | usual, none)
        .context("/sys cannot be made read-only")?;
    mounted("cgroup2", &at("sys/fs/cgroup"), usual, None)?;
    mounted("bpf", &at("sys/fs/bpf"), usual, Some("mode=700"))?;
    mounted("tracefs", &at("sys/kernel/tracing"), usual, None)?;
    bound(&at("proc/sys"), MsFlags::MS_RDONLY | usual)?;
    bound(&at("proc/sys/net"), usual)?;
    // Not every kernel has it.
    let sysrq = at("proc/sysrq-trigger");
    if sysrq.exists() {
        bound(&sysrq, MsFlags::MS_RDONLY | usual)?;
    }

    devices(&at("dev"), &spec.console())?;
    mounted("tmpfs", &at("run"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755,size=256m"))?;
    if spec.memory.is_some() {
        let memory = at("run/cgroup-v1/memory");
        fs::create_dir_all(&memory)?;
        mounted("cgroup", &memory, usual, Some("memory"))?;
    }
    fs::write(disk.join("booted"), "")?;

    chdir(&root)?;
    pivot_root(".", ".").context("the host's root cannot be made the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("the machine's root cannot be left")?;
    chdir("/")?;
    Ok(())
}

/// Mounts an overlay of `lowers` (topmost first) with its writable part in `upper`.
pub(crate) fn overlay(lowers: &[PathBuf], upper: &Path, work: &Path, at: &Path) -> Result<()> {
    for dir in [upper, work, at] {
        fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let lowers: Vec<_> = lowers.iter().map(|path| path.display().to_string()).collect();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lowers.join(":"), upper.display(), work.display());
    mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options.as_str())).with_context(|| {
        format!(
            "no overlay can be mounted with {options} (the upper directory may not itself be on an overlay)"
        )
    })
}

/// `/dev` as systemd's container interface asks for it, with FUSE and TUN besides.
fn devices(dev: &Path, console: &Path) -> Result<()> {
    mounted("tmpfs", dev, MsFlags::MS_NOSUID, Some("mode=755,size=16m"))?;
    let old = umask(Mode::empty());
    fs::create_dir(dev.join("net"))?;
    let nodes = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
        ("fuse", 10, 229),
        ("net/tun", 10, 200),
    ];
    for (name, major, minor) in nodes {
        mknod(&dev.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
            .with_context(|| format!("/dev/{name} cannot be made"))?;
    }
    umask(old);
    for dir in ["pts", "shm", "mqueue"] {
        fs::create_dir(dev.join(dir))?;
    }
    let no_exec = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mounted("devpts", &dev.join("pts"), no_exec, Some("newinstance,ptmxmode=0666,mode=620,gid=5"))?;
    mounted("tmpfs", &dev.join("shm"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777"))?;
    for (target, link) in [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        symlink(target, dev.join(link))?;
    }
    // Whoever opens the console by name writes to the log too.
    let place = dev.join("console");
    File::create(&place)?;
    mount(Some(console), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context("the console's log cannot be mounted")
}

/// Writes the first boot's files. Called with the host's tree as the root, so that no path leads out of it.
fn seed(files: &[Seed]) -> Result<()> {
    for Seed { path, text } in files {
        let place = || format!("{} cannot be written in the host", path.display());
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(place)?;
        }
        File::create(path).and_then(|mut file| file.write_all(text.as_bytes())).with_context(place)?;
    }
    Ok(())
}
