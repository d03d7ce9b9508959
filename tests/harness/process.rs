//! Processes named so that a reused PID is never taken for the old process.

use std::fmt;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::PidfdFlags;

/// A process: its PID and the time of its start, which together are never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its PID, as this process sees it.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    start: u64,
}

impl Process {
    /// The process that has this PID now.
    pub fn of(pid: i32) -> Result<Self> {
        let start = start_time(pid).with_context(|| format!("process {pid} does not exist"))?;
        Ok(Self { pid, start })
    }

    /// This process.
    pub fn own() -> Result<Self> {
        Self::of(Pid::this().as_raw())
    }

    /// Whether it still runs; a zombie does not.
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start)
    }

    /// Waits until it has ended: a zombie has. An error if it hasn't within `limit`.
    pub fn wait_end(&self, limit: Duration) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid).context("there is no process 0")?;
        let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        let end = Instant::now() + limit;
        // Asked after the descriptor is there: from here on the PID cannot become another process unseen.
        while self.alive() {
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "process {} has not ended within {limit:?}", self.pid);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("a process cannot be waited for"),
            }
        }
        Ok(())
    }

    /// Sends SIGKILL if it still runs.
    pub fn kill(&self) {
        if self.alive() {
            // It may have ended just now: there is nothing left to do then.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }

    /// A path in its directory of `/proc`.
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.start)
    }
}

impl FromStr for Process {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let parsed = text
            .trim()
            .split_once(' ')
            .and_then(|(pid, start)| Some(Self { pid: pid.parse().ok()?, start: start.parse().ok()? }));
        parsed.ok_or_else(|| anyhow!("'{}' is not a PID and a start time", text.trim()))
    }
}

/// The start time of a process that is not a zombie. The name, in brackets, may hold anything.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?; // field 3
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Processes with `words` one after another in their command lines, other than this one.
pub fn with_arguments(words: &[&str]) -> Vec<i32> {
    let own = Pid::this().as_raw();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            line.windows(words.len()).any(|window| window.iter().zip(words).all(|(a, b)| *a == b.as_bytes()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_known_by_pid_and_start() {
        let own = Process::own().unwrap();
        assert!(own.alive());
        assert_eq!(own.to_string().parse::<Process>().unwrap(), own);
        assert!(!Process { start: own.start + 1, ..own }.alive(), "another process with the same PID");
    }

    #[test]
    fn the_dead_are_not_alive() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id().cast_signed()).unwrap();
        // For a moment after exec a process has no command line.
        let end = Instant::now() + Duration::from_secs(10);
        while !with_arguments(&["sleep", "60"]).contains(&process.pid) {
            assert!(Instant::now() < end, "it is not found by its arguments");
        }
        process.wait_end(Duration::from_millis(10)).unwrap_err();
        process.kill();
        process.wait_end(Duration::from_secs(10)).unwrap();
        child.wait().unwrap();
        assert!(!process.alive());
    }
}
