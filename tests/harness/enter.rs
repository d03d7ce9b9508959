//! A command's way into a host, or into a lab's network.
//!
//! Like a host's way up (see [`container`](crate::container)) this needs a process without threads: the
//! helper `hosts enter`. It first moves into the host's cgroup (what it starts must be *in* the host for
//! ftd, which knows processes by their cgroup; joining the cgroup namespace alone only changes how paths
//! look), then into the namespaces, and starts the command. When the helper is killed, so is the command.
#![allow(unsafe_code, reason = "one line: the parent-death signal can only be set between fork and exec")]

use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::cgroup::Group;

/// The search path in a host.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where to go.
#[derive(Debug, Clone)]
pub enum Place {
    /// Into the host whose PID 1 this is.
    Host(i32),
    /// Only into a network namespace, keeping the machine's files and this process's environment.
    Network(PathBuf),
}

/// Runs a command there, on this process's standard streams, and returns its exit code: 127 if it can't be
/// started, 128 and the signal's number if it was killed. To be called by a process without threads.
pub fn enter(place: &Place, groups: &[PathBuf], command: &[String]) -> Result<ExitCode> {
    let Some((program, arguments)) = command.split_first() else { bail!("no command was given") };
    for group in groups {
        let group = Group::at(group);
        group.create()?;
        group.enter()?;
    }
    let mut child = Command::new(program);
    child.args(arguments);
    match place {
        Place::Host(pid) => {
            join_all(*pid)?;
            child.env_clear().envs([("PATH", PATH), ("HOME", "/root"), ("LANG", "C.UTF-8")]);
            child.env("TERM", std::env::var_os("TERM").unwrap_or_else(|| "dumb".into()));
            child.current_dir("/");
        }
        Place::Network(path) => join(path, CloneFlags::CLONE_NEWNET)?,
    }
    // SAFETY: between fork and exec only async-signal-safe calls are allowed, and prctl is one.
    unsafe { child.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(Into::into)) };
    let status = match child.status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("{program}: {error}");
            return Ok(ExitCode::from(127));
        }
    };
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
}

/// Joins one namespace by its file.
pub(crate) fn join(path: &Path, kind: CloneFlags) -> Result<()> {
    let file = File::open(path).with_context(|| format!("the namespace {} is gone", path.display()))?;
    setns(&file, kind).with_context(|| format!("the namespace {} cannot be joined", path.display()))
}

/// Joins all namespaces of a host. All are opened before the first is joined: in the host's mount namespace
/// `/proc` is another.
fn join_all(pid: i32) -> Result<()> {
    let kinds = [
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("net", CloneFlags::CLONE_NEWNET),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let mut files = Vec::new();
    for (name, kind) in kinds {
        let path = format!("/proc/{pid}/ns/{name}");
        files.push((File::open(&path).with_context(|| format!("the host is gone: no {path}"))?, name, kind));
    }
    for (file, name, kind) in files {
        setns(&file, kind).with_context(|| format!("the host's {name} namespace cannot be joined"))?;
    }
    Ok(())
}
