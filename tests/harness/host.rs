//! One test host, and all that can be done to it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use crate::cgroup::Group;
use crate::command::{self, Output};
use crate::container::{Seed, Spec};
use crate::lab::{helper, ip};
use crate::process::Process;
use crate::{mounts, scaled};

/// How long the kernel may take to end or freeze processes.
const KERNEL_LIMIT: Duration = Duration::from_secs(20);

/// How a host is to be.
#[derive(Debug, Clone)]
pub struct BootOptions {
    /// The text of `/etc/ftd/ftd.toml`. Without it the one from the package stays, if there is one.
    pub config: Option<String>,
    /// Other files that are there before the first boot.
    pub files: Vec<(PathBuf, String)>,
    /// Memory limit of the whole host, in bytes. What it writes to its disk counts: that is memory too.
    pub memory: u64,
    /// Size of its disk in bytes. Takes memory only as it fills.
    pub disk: u64,
}

impl Default for BootOptions {
    fn default() -> Self {
        Self { config: None, files: Vec::new(), memory: 2 << 30, disk: 4 << 30 }
    }
}

impl BootOptions {
    /// The defaults, with this text as `/etc/ftd/ftd.toml`.
    pub fn with_config(text: impl Into<String>) -> Self {
        Self { config: Some(text.into()), ..Self::default() }
    }

    /// What to write before the first boot.
    pub(crate) fn seeds(self) -> Vec<Seed> {
        // The memory hierarchy is where ftd's sandbox would not let it write; on a real hybrid host it is
        // below /sys/fs/cgroup. Where there is none, this does nothing.
        let sandbox = "[Service]\nReadWritePaths=-/run/cgroup-v1\n".to_owned();
        let sandbox = ("/etc/systemd/system/ftd.service.d/test-host.conf".into(), sandbox);
        let config = self.config.map(|text| (PathBuf::from("/etc/ftd/ftd.toml"), text));
        let all = config.into_iter().chain(self.files).chain([sandbox]);
        all.map(|(path, text)| Seed { path, text }).collect()
    }
}

/// What systemd says of itself once it has come up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Every unit is well.
    Running,
    /// At least one unit has failed.
    Degraded,
}

/// A handle on a host of a lab. It may be cloned and outlive the lab, but is of no use then: whatever is
/// asked of a host that is gone is an error.
#[derive(Debug, Clone)]
pub struct Host {
    spec: Spec,
}

impl Host {
    pub(crate) fn new(spec: Spec) -> Self {
        Self { spec }
    }

    /// Its name, `vm1`.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its address on the lab's network.
    pub fn address(&self) -> Ipv4Addr {
        self.spec.address
    }

    /// Its network card's end on the lab's bridge, in the lab's network namespace.
    pub fn port(&self) -> String {
        port(&self.spec.name)
    }

    /// What systemd and those who wrote to the console have printed, over all boots.
    pub fn console(&self) -> String {
        fs::read(self.spec.console())
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }

    // === Up and down ===

    /// Boots it: returns when systemd has been started; see [`wait_running`](Self::wait_running). Its disk
    /// is as it was left. An error if it runs.
    pub fn start(&self) -> Result<()> {
        let name = &self.spec.name;
        ensure!(self.leader().is_err(), "{name} is up already");
        let limit = self.spec.memory_limit.to_string();
        // Either file is missing where the other is: version 2, version 1, or no memory controller at all.
        for (group, file) in self.groups().zip(["memory.max", "memory.limit_in_bytes"]) {
            group.create()?;
            if group.path().join(file).exists() {
                group.write(file, &limit)?;
            }
        }
        let errors = File::options().create(true).append(true).open(self.spec.console())?;
        let mut child = Command::new(helper()?)
            .args(["supervise", "--lab", &self.spec.lab])
            .arg(&self.spec.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("the helper program `hosts` cannot be started")?;
        let streams = child.stdin.take().zip(child.stdout.take());
        // Somebody must take the supervisor's exit code when the host ends; this process may be long gone.
        std::thread::spawn(move || child.wait());
        let (mut input, output) = streams.context("the helper program has no streams")?;
        let mut lines = BufReader::new(output).lines();
        let mut expect = |word: &str| match lines.next() {
            Some(Ok(line)) if line == word => Ok(()),
            Some(Ok(line)) => Err(anyhow!("{name} does not boot: {}", line.trim_start_matches("error: "))),
            _ => Err(anyhow!("{name} does not boot: {}", command::tail(&self.console(), 10))),
        };
        let mut boot = || {
            expect("ready")?;
            self.plug()?;
            writeln!(input, "go")?;
            expect("started")
        };
        boot().inspect_err(|_| {
            // What is half up is of no use to anybody; the first error is the one to tell.
            let _ = self.kill();
        })
    }

    /// Puts `eth0` into its network namespace, with the other end on the bridge.
    fn plug(&self) -> Result<()> {
        self.unplug();
        let (port, lab) = (self.port(), &self.spec.lab);
        let namespace = self.leader()?.pid.to_string();
        ip(
            lab,
            &[
                "link",
                "add",
                &port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "address",
                &self.spec.mac,
                "netns",
                &namespace,
            ],
        )?;
        ip(lab, &["link", "set", &port, "master", "br0", "up"])
    }

    /// Removes its end on the bridge; there is none if the host has ended and its namespace with it.
    fn unplug(&self) {
        let _ = ip(&self.spec.lab, &["link", "del", &self.port()]);
    }

    /// Waits until systemd has started all that it is to start. Degraded is an answer, not an error: see
    /// [`State`].
    pub fn wait_running(&self) -> Result<State> {
        self.wait_running_for(scaled(Duration::from_secs(90)))
    }

    fn wait_running_for(&self, limit: Duration) -> Result<State> {
        let end = Instant::now() + limit;
        loop {
            // systemctl can wait for systemd, but only once that listens: until then, and that is a fraction
            // of a second, this asks every 10 ms. It can also miss the moment if it asks just then: so it is
            // made to ask again after a second.
            let said = self.run(["timeout", "1", "systemctl", "is-system-running", "--wait"])?;
            match said.stdout.trim() {
                "running" => return Ok(State::Running),
                "degraded" => return Ok(State::Degraded),
                other if Instant::now() >= end => bail!(
                    "{} did not come up within {limit:?}: systemd says '{other}' {}\nconsole:\n{}",
                    self.name(),
                    said.stderr.trim(),
                    command::tail(&self.console(), 20)
                ),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// As if its power were cut: first the network falls silent (a namespace whose processes are dead still
    /// answers for a moment), then all its processes die at once. Its disk stays.
    pub fn kill(&self) -> Result<()> {
        let _ = ip(&self.spec.lab, &["link", "set", &self.port(), "down"]);
        if let Ok(leader) = self.leader() {
            leader.kill();
            leader.wait_end(scaled(KERNEL_LIMIT))?;
        }
        let group = Group::at(&self.spec.unified);
        group.kill(scaled(KERNEL_LIMIT))?;
        self.unplug();
        // A group that was killed once is not to be used again: what is cloned straight into it
        // (CLONE_INTO_CGROUP, as systemd does) dies by SIGKILL, since the kernel (6.18 at least) compares the
        // count of kills of the new group with that of the parent's.
        group.remove(scaled(KERNEL_LIMIT))
    }

    /// Kills it and boots it again, on the same disk.
    pub fn reboot(&self) -> Result<()> {
        self.kill()?;
        self.start()
    }

    /// Kills it and removes its disk and its groups: nothing of it is left.
    pub fn down(&self) -> Result<()> {
        self.kill()?;
        for group in self.groups() {
            group.remove(scaled(KERNEL_LIMIT))?;
        }
        mounts::remove_tree(&self.spec.dir)
    }

    /// Freezes every process in it: nothing in user space moves, while its kernel still answers ARP and
    /// accepts connections, as on a host whose user space hangs.
    pub fn freeze(&self) -> Result<()> {
        self.leader()?;
        Group::at(&self.spec.unified).freeze(true, scaled(KERNEL_LIMIT))
    }

    /// Lets a frozen host go on.
    pub fn thaw(&self) -> Result<()> {
        self.leader()?;
        Group::at(&self.spec.unified).freeze(false, scaled(KERNEL_LIMIT))
    }

    /// Whether it is frozen.
    pub fn is_frozen(&self) -> bool {
        Group::at(&self.spec.unified).is_frozen()
    }

    /// Pulls its network cable: the host sees its link go down.
    pub fn cut(&self) -> Result<()> {
        self.leader()?;
        ip(&self.spec.lab, &["link", "set", &self.port(), "down"])
    }

    /// Puts its network cable back.
    pub fn heal(&self) -> Result<()> {
        self.leader()?;
        ip(&self.spec.lab, &["link", "set", &self.port(), "up"])
    }

    fn groups(&self) -> impl Iterator<Item = Group> + use<> {
        std::iter::once(self.spec.unified.clone())
            .chain(self.spec.memory.clone())
            .map(|path| Group::at(&path))
    }

    // === Inside ===

    fn leader(&self) -> Result<Process> {
        let leader =
            fs::read_to_string(self.spec.leader()).ok().and_then(|text| text.parse::<Process>().ok());
        leader
            .filter(Process::alive)
            .with_context(|| format!("{} is not up (`cargo xtask hosts list` shows what is)", self.spec.name))
    }

    /// Whether its PID 1 lives.
    pub fn is_up(&self) -> bool {
        self.leader().is_ok()
    }

    /// The PID of its PID 1, as this machine sees it.
    pub fn pid(&self) -> Result<i32> {
        Ok(self.leader()?.pid)
    }

    /// Its file system, seen from this machine. Absolute symbolic links in it lead to *this machine's*
    /// files: use [`read`](Self::read) and [`write`](Self::write) where there may be any.
    pub fn root(&self) -> Result<PathBuf> {
        Ok(self.leader()?.path("root"))
    }

    /// The file of its network namespace.
    pub fn netns(&self) -> Result<PathBuf> {
        Ok(self.leader()?.path("ns/net"))
    }

    /// Its group in the unified hierarchy, as this machine sees it: the root that the host sees.
    pub fn cgroup(&self) -> &Path {
        &self.spec.unified
    }

    /// Its group in the memory hierarchy where that is of version 1; in it as `/run/cgroup-v1/memory`.
    pub fn memory_cgroup(&self) -> Option<&Path> {
        self.spec.memory.as_deref()
    }

    /// The socket of its D-Bus system bus.
    pub fn bus(&self) -> Result<PathBuf> {
        Ok(self.root()?.join("run/dbus/system_bus_socket"))
    }

    /// The command that runs a command in the host, to be given streams and started by the caller: in all
    /// its namespaces and its cgroup, as root, with a fresh environment, in `/`. When the process that this
    /// starts is killed, so is the command in the host.
    pub fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Command> {
        let pid = self.pid()?;
        let mut command = Command::new(helper()?);
        command.args(["enter", "--lab", &self.spec.lab, "--pid", &pid.to_string()]);
        command.arg("--group").arg(self.spec.unified.join("harness"));
        if let Some(group) = &self.spec.memory {
            command.arg("--group").arg(group);
        }
        command.arg("--").args(words);
        Ok(command)
    }

    /// Runs a command in the host (see [`command`](Self::command)) and returns all of its outcome. An exit
    /// code other than 0 is no error.
    pub fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut command = self.command(words)?;
        let mut output = command::output(&mut command)?;
        output.command = shorter(&self.spec.name, &output.command);
        Ok(output)
    }

    /// Runs a command in the host and returns its standard output; an exit code other than 0 is an error
    /// with all that it printed.
    pub fn ok<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<String> {
        self.run(words)?.ok()
    }

    /// Runs a shell script in the host; like [`ok`](Self::ok).
    pub fn sh(&self, script: &str) -> Result<String> {
        self.ok(["sh", "-euc", script])
    }

    /// Starts a command in the host and goes on, with pipes for all three streams. Killing the child kills
    /// the command.
    pub fn spawn<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Child> {
        let mut command = self.command(words)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().with_context(|| format!("no command can be started in {}", self.spec.name))
    }

    /// How often systemd has started the unit since the host was made: an entry of its own in the journal each
    /// time.
    pub fn starts(&self, unit: &str) -> Result<usize> {
        // "A start job has finished", with its result; see systemd.journal-fields(7).
        let finished = self.entries("39f53479d3a045ac8e11786248231fbf", unit)?;
        Ok(finished.lines().filter(|line| line.contains("\"done\"")).count())
    }

    /// How often systemd has begun to start the unit, whatever became of it.
    pub fn attempts(&self, unit: &str) -> Result<usize> {
        self.entries("7d4958e842da4a758f6c1cdc7b36dcc5", unit).map(|begun| begun.lines().count())
    }

    /// systemd's entries in the host's journal with this `MESSAGE_ID` about this unit, as JSON, one a line.
    fn entries(&self, message: &str, unit: &str) -> Result<String> {
        // What has been said must be in it before anything is counted.
        self.ok(["journalctl", "--sync"])?;
        let (message, about) = (format!("MESSAGE_ID={message}"), format!("UNIT={unit}"));
        let fields = "--output-fields=JOB_RESULT";
        let found = self.run(["journalctl", "--quiet", "--output=json", fields, &message, &about])?;
        // 1, silently: there is no such entry.
        if found.status.code() == Some(1) && found.stdout.is_empty() && found.stderr.is_empty() {
            return Ok(String::new());
        }
        found.ok()
    }

    /// Opens a file of the host, following its links within the host.
    fn open(&self, path: &Path, flags: OFlag) -> Result<File> {
        let root = File::open(self.root()?)?;
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(if flags.contains(OFlag::O_CREAT) {
                Mode::from_bits_truncate(0o644)
            } else {
                Mode::empty()
            })
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let fd = openat2(root.as_fd(), path, how)
            .with_context(|| format!("{} on {} cannot be opened", path.display(), self.spec.name))?;
        Ok(File::from(fd))
    }

    /// The contents of a file of the host.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        let mut text = String::new();
        self.open(path.as_ref(), OFlag::O_RDONLY)?
            .read_to_string(&mut text)
            .with_context(|| format!("{} on {} cannot be read", path.as_ref().display(), self.spec.name))?;
        Ok(text)
    }

    /// Writes a file of the host, in place, as `cat > file` would. Its directory must exist.
    pub fn write(&self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<()> {
        self.open(path.as_ref(), OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC)?
            .write_all(bytes.as_ref())
            .with_context(|| format!("{} on {} cannot be written", path.as_ref().display(), self.spec.name))
    }
}

/// The name of a host's end on the bridge.
fn port(name: &str) -> String {
    format!("v-{name}")
}

/// A command line of the helper as a person would write it: `vm1: systemctl ...`.
fn shorter(place: &str, line: &str) -> String {
    let command = line.split_once(" -- ").map_or(line, |(_, command)| command);
    format!("{place}: {command}")
}
