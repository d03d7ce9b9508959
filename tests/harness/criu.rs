//! CRIU on a host, and the worker: a service with state in its memory, to see that nothing of it is lost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache::Cache;
use crate::{Host, command};

/// The worker's unit.
pub const WORKER: &str = "worker.service";
/// Where the worker answers.
pub const WORKER_PORT: u16 = 7070;
const WORKER_PROGRAM: &str = "/usr/local/sbin/ftd-test-worker";

const SHIM_SOURCE: &str = include_str!("rlimit.c");
const SHIM: &str = "/usr/local/lib/ftd-test-rlimit.so";
/// Before /usr/sbin in every search, also in ftd's own.
const WRAPPER: &str = "/usr/local/sbin/criu";

/// Lets CRIU work on a host, where the machine lacks a capability for it. Nothing is done where it does not.
pub fn prepare(host: &Host) -> Result<()> {
    if has_sys_resource() {
        return Ok(());
    }
    put(host, SHIM, &fs::read(shim()?)?, 0o644)?;
    let wrapper = format!("#!/bin/sh\nexec env LD_PRELOAD={SHIM} /usr/sbin/criu \"$@\"\n");
    put(host, WRAPPER, wrapper.as_bytes(), 0o755)
}

/// Whether this machine's root may raise limits.
fn has_sys_resource() -> bool {
    const CAP_SYS_RESOURCE: u64 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> CAP_SYS_RESOURCE & 1 == 1)
}

/// The library that makes up for it, built once.
fn shim() -> Result<PathBuf> {
    let cache = Cache::open()?;
    let hash = blake3::hash(SHIM_SOURCE.as_bytes()).to_hex();
    let path = cache.path(format!("rlimit-{}.so", &hash[..16]));
    if path.exists() {
        return Ok(path);
    }
    let _lock = cache.lock("rlimit")?;
    let (source, new) = (path.with_extension("c"), path.with_extension("new"));
    fs::write(&source, SHIM_SOURCE)?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-Wall", "-shared", "-fPIC", "-o"]).args([&new, &source]).arg("-ldl");
    command::ok(&mut gcc).context("the library that CRIU needs on this machine cannot be built")?;
    fs::rename(new, &path)?;
    Ok(path)
}

/// Puts a file on a host.
pub fn put(host: &Host, path: impl AsRef<Path>, bytes: &[u8], mode: u32) -> Result<()> {
    let path = path.as_ref();
    if let Some(dir) = path.parent() {
        host.ok(["mkdir", "-p", &dir.display().to_string()])?;
    }
    host.write(path, bytes)?;
    host.ok(["chmod", &format!("{mode:o}"), &path.display().to_string()]).map(drop)
}

/// Puts the worker on a host and starts it. `program` is the built one, `arguments` those of its command line,
/// `settings` more lines for the `[Service]` of its unit.
pub fn start_worker(host: &Host, program: &Path, arguments: &str, settings: &str) -> Result<()> {
    let bytes =
        fs::read(program).with_context(|| format!("the worker {} cannot be read", program.display()))?;
    put(host, WORKER_PROGRAM, &bytes, 0o755)?;
    let unit = format!(
        "[Service]\nType=notify\nExecStart={WORKER_PROGRAM} --port {WORKER_PORT} {arguments}\n\
         ExecReload=/bin/kill -HUP $MAINPID\nWatchdogSec=5\n{settings}\n"
    );
    host.write(format!("/etc/systemd/system/{WORKER}"), unit)?;
    host.sh(&format!("systemctl daemon-reload && systemctl start {WORKER}")).map(drop)
}

/// What the worker makes of a task (SplitMix64).
pub fn result(task: u64) -> u64 {
    let mut z = task.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
