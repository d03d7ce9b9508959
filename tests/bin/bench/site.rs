//! The host that everything is measured on: nginx and apache2 under ftd's care, and the program that makes
//! processes as a third service.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use harness::host::State;
use harness::{Base, BootOptions, Host, Lab, scaled};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::load::Load;
use crate::{client, clock};

/// No back-off: each death of a long row is to be healed as the first one is.
const CONFIG: &str = r#"
[heal]
restarts = 100000
settle = "1ms"
backoff = "1ms"
backoff_max = "1ms"

[[workload]]
name = "web"
units = ["nginx"]
health = "http://127.0.0.1/"

[[workload]]
name = "other"
units = ["apache2"]
health = "http://127.0.0.1:8080/"

[[workload]]
name = "load"
units = ["bench-load"]
"#;

const LOAD_PROGRAM: &str = "/usr/local/bin/bench";
const LOAD_SOCKET: &str = "/run/bench-load.sock";
const LOAD_UNIT: &str = "\
[Unit]
Description=Makes processes
[Service]
ExecStart=/usr/local/bin/bench load --socket /run/bench-load.sock
";

/// How long the host's parts may take to get where they are told.
const LIMIT: Duration = Duration::from_secs(30);
/// Nothing announces what is waited for with this pause; it is never in a measured time.
const PAUSE: Duration = Duration::from_millis(10);

/// The lab and its host.
pub(crate) struct Site {
    lab: Lab,
    pub(crate) host: Host,
}

/// What of `ftctl status` is of interest here.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Status {
    pub(crate) probe: Probe,
    pub(crate) units: Vec<Unit>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Probe {
    pub(crate) source: String,
    pub(crate) realtime: String,
    pub(crate) delivered: u64,
    drops: Vec<(String, u64)>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Unit {
    pub(crate) phase: String,
}

impl Probe {
    /// Events lost, by whatever cause.
    pub(crate) fn dropped(&self) -> u64 {
        self.drops.iter().map(|(_, count)| count).sum()
    }
}

/// A line of `ftctl events --json`, as far as it is of interest here.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Event {
    pub(crate) time: jiff::Timestamp,
    pub(crate) unit: Option<String>,
    pub(crate) op: Option<u64>,
    #[serde(rename = "event")]
    pub(crate) kind: String,
    pub(crate) after_us: Option<u64>,
    pub(crate) main_pid: Option<u32>,
    pub(crate) error: Option<String>,
}

/// A process of the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    /// Its id on this machine.
    pub(crate) outer: Pid,
    /// Its id on the host.
    pub(crate) inner: u32,
}

impl Site {
    /// Boots the host; ftd runs on it if its package starts it.
    pub(crate) fn up() -> Result<Self> {
        let base = Base::find()?;
        let installed = base.lowers().iter().any(|lower| lower.join("usr/sbin/ftd").exists());
        ensure!(installed, "ftd's package is not installed on the hosts; run this by `cargo xtask bench`");
        let lab = Lab::on(base)?;
        let mut options = BootOptions::with_config(CONFIG);
        options.files = [
            ("/etc/nginx/conf.d/bench.conf", format!("add_header {} $pid;\n", client::WORKER)),
            // Started far more often than systemd puts up with by itself.
            ("/etc/systemd/system/nginx.service.d/bench.conf", "[Unit]\nStartLimitIntervalSec=0\n".into()),
            ("/etc/systemd/system/bench-load.service", LOAD_UNIT.into()),
        ]
        .map(|(path, text)| (PathBuf::from(path), text))
        .into();
        let host = lab.boot("vm1", options)?;
        if host.wait_running()? == State::Degraded {
            let failed = host.ok(["systemctl", "--failed", "--no-legend", "--plain"])?;
            eprintln!("bench: failed units on the host: {}", failed.trim());
        }
        let place = host.root()?.join(LOAD_PROGRAM.trim_start_matches('/'));
        fs::copy(std::env::current_exe()?, &place)
            .with_context(|| format!("{} cannot be copied", place.display()))?;
        host.ok(["systemctl", "start", "bench-load"])?;
        Ok(Self { lab, host })
    }

    pub(crate) fn down(self) -> Result<()> {
        self.lab.down()
    }

    /// Runs a closure on the lab's network.
    pub(crate) fn on_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.lab.on_network(work)?
    }

    /// The control group of a service, as this machine sees it.
    pub(crate) fn group(&self, service: &str) -> PathBuf {
        self.host.cgroup().join("system.slice").join(service)
    }

    /// The processes of a service.
    pub(crate) fn members(&self, service: &str) -> Result<Vec<Member>> {
        let path = self.group(service).join("cgroup.procs");
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        text.lines().map(|line| Member::of(line.parse()?)).collect()
    }

    /// A property of a unit, from systemd.
    pub(crate) fn properties(&self, unit: &str, names: &[&str]) -> Result<HashMap<String, String>> {
        let text = self.host.ok(["systemctl", "show", unit, "--property", &names.join(",")])?;
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Ok(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// The program that makes processes, in its service on the host.
    pub(crate) fn load(&self) -> Result<Load> {
        let socket = self.host.root()?.join(LOAD_SOCKET.trim_start_matches('/'));
        eventually("the load program listens", || Ok(socket.exists().then_some(())))?;
        Load::at(&socket)
    }

    // === ftd ===

    /// Starts ftd, if it does not run, and waits until it has all units in view.
    pub(crate) fn start_ftd(&self) -> Result<Status> {
        self.host.ok(["systemctl", "start", "ftd"])?;
        eventually("ftd has all units in view", || {
            let Ok(status) = self.status() else { return Ok(None) };
            let up = status.units.len() == 3 && status.units.iter().all(|unit| unit.phase == "up");
            Ok(up.then_some(status))
        })
        .with_context(|| {
            let state = self.host.run(["ftctl", "status"]).map(|out| out.stdout + &out.stderr);
            format!("ftd: {}", state.unwrap_or_default())
        })
    }

    /// Stops ftd.
    pub(crate) fn stop_ftd(&self) -> Result<()> {
        self.host.ok(["systemctl", "stop", "ftd"]).map(drop)
    }

    /// What ftd says of itself.
    pub(crate) fn status(&self) -> Result<Status> {
        let out = self.host.run(["ftctl", "--json", "status"])?;
        // Exit code 4: it answers, and not all is well.
        ensure!(matches!(out.status.code(), Some(0 | 4)), "ftctl status: {}", out.stderr.trim());
        serde_json::from_str(&out.stdout).context("ftctl status makes no sense")
    }

    /// ftd's main process.
    pub(crate) fn ftd(&self) -> Result<Member> {
        self.members("ftd.service")?.into_iter().next().context("ftd does not run")
    }

    /// The last events of nginx.
    pub(crate) fn last_events(&self, count: u32) -> Result<Vec<Event>> {
        let count = count.to_string();
        let text = self.host.ok(["ftctl", "--json", "events", "--unit", "nginx", "--last", &count])?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// ftd's events from now on.
    pub(crate) fn follow(&self) -> Result<Events> {
        let mut child = self.host.spawn(["ftctl", "--json", "events", "--follow", "--last", "1"])?;
        let output = child.stdout.take().context("ftctl has no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let events = Events { child, lines };
        // The last one of the past: the ones to come follow without a gap.
        events.next(scaled(LIMIT))?;
        Ok(events)
    }
}

impl Member {
    fn of(outer: i32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{outer}/status"))
            .with_context(|| format!("process {outer} is gone"))?;
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let inner = ids.and_then(|ids| ids.split_whitespace().last()?.parse().ok());
        Ok(Self { outer: Pid::from_raw(outer), inner: inner.context("a process without an id of its own")? })
    }

    /// Sends it a signal.
    pub(crate) fn signal(self, signal: Signal) -> Result<()> {
        kill(self.outer, signal).with_context(|| format!("process {} cannot be sent {signal}", self.outer))
    }

    /// A file of it in `/proc`.
    pub(crate) fn proc(self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.outer.to_string()).join(name)
    }
}

/// A stream of events.
pub(crate) struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Events {
    /// The next event.
    pub(crate) fn next(&self, limit: Duration) -> Result<Event> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("no event: {line}")),
            Err(RecvTimeoutError::Timeout) => Err(anyhow!("ftd tells nothing for {limit:?}")),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("the stream of ftd's events has ended")),
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for something that nothing announces.
pub(crate) fn eventually<T>(what: &str, check: impl Fn() -> Result<Option<T>>) -> Result<T> {
    let (limit, start) = (scaled(LIMIT), Instant::now());
    loop {
        if let Some(value) = check()? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Kills all of a service's processes at once: main process first, as `systemctl kill` does. Answers when
/// it began.
pub(crate) fn kill_whole(members: &[Member]) -> Result<u64> {
    let began = clock::now();
    for member in members {
        // The main process may have taken its children along.
        match kill(member.outer, Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error).context("nginx cannot be killed"),
        }
    }
    Ok(began)
}
