//! The host on which services are saved and brought back, by ftd and by hand.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::criu::{self, WORKER};
use harness::{Base, BootOptions, Host, Lab};
use serde_json::Value;

/// Where images go on the host: memory, and seen by every service.
pub(super) const IMAGES: &str = "/run/bench";

/// The lab and its host, on which no ftd runs: what is measured is done by commands.
pub(super) struct Ground {
    lab: Lab,
    pub(super) host: Host,
}

/// A service as it is dumped by hand: what a person would have to find out.
pub(super) struct Subject {
    pub(super) main_pid: u64,
    /// CRIU's words for what is outside of it, and what is put in their place at restore.
    pub(super) external: Vec<String>,
    pub(super) inherited: Vec<String>,
}

impl Ground {
    pub(super) fn up() -> Result<Self> {
        let base = Base::find()?;
        let installed = base.lowers().iter().any(|lower| lower.join("usr/sbin/ftd").exists());
        ensure!(installed, "ftd's package is not installed on the hosts; run this by `cargo xtask bench`");
        let lab = Lab::on(base)?;
        let host = lab.boot("vm1", BootOptions { memory: 12 << 30, ..BootOptions::default() })?;
        host.wait_running()?;
        criu::prepare(&host)?;
        // Room for images of a gibibyte.
        host.sh(&format!("systemctl stop ftd; mount -o remount,size=6g /run; mkdir {IMAGES}"))?;
        Ok(Self { lab, host })
    }

    pub(super) fn down(self) -> Result<()> {
        self.lab.down()
    }

    /// Starts the worker anew with so much memory, all of it written once.
    pub(super) fn worker(&self, mebibytes: u32) -> Result<()> {
        let program = std::env::current_exe()?.with_file_name("worker");
        self.host.run(["systemctl", "stop", WORKER])?;
        // The watchdog would not wait for a long pause on a slow machine, which is what is to be measured.
        criu::start_worker(&self.host, &program, &format!("--memory {mebibytes} --dirty 0"), "WatchdogSec=0")
    }

    /// An empty directory for images, as the host sees it.
    pub(super) fn empty(&self, name: &str) -> Result<String> {
        let dir = format!("{IMAGES}/{name}");
        self.host.sh(&format!("rm -rf {dir}; mkdir {dir}"))?;
        Ok(dir)
    }

    /// A directory of the host, as this machine sees it.
    pub(super) fn outside(&self, dir: &str) -> Result<PathBuf> {
        Ok(self.host.root()?.join(dir.trim_start_matches('/')))
    }

    /// Dumps a unit by ftd, which goes on or stops.
    pub(super) fn dump(&self, unit: &str, dir: &str, stop: bool) -> Result<Value> {
        let mut words = vec!["ftd", "dump-unit", unit, dir];
        words.extend(stop.then_some("--stop"));
        let text = self.host.ok(words)?;
        serde_json::from_str(&text).with_context(|| format!("ftd dump-unit makes no sense: {text}"))
    }

    /// Restores a unit by ftd; what it says of it.
    pub(super) fn restore(&self, unit: &str, dir: &str) -> Result<Value> {
        let text = self.host.ok(["ftd", "restore-unit", unit, dir])?;
        serde_json::from_str(&text).with_context(|| format!("ftd restore-unit makes no sense: {text}"))
    }

    /// Dumps a service by CRIU's own command line, with the options that ftd gives it, from within the service's view
    /// of the file system. The service goes on.
    pub(super) fn bare_dump(&self, subject: &Subject, dir: &str) -> Result<()> {
        let pid = subject.main_pid.to_string();
        let mut words = vec!["nsenter", "-t", &pid, "-m", "--", "criu", "--no-default-config", "dump"];
        words.extend(["-t", &pid, "-D", dir, "-o", "dump.log", "-v4", "--leave-running", "--timeout", "10"]);
        words.extend(COMMON);
        words.extend(["--ghost-limit", "67108864"]);
        words.extend(subject.external.iter().flat_map(|word| ["--external", word]));
        self.host.ok(words).map(drop)
    }

    /// Restores a service by CRIU's own command line, as nobody's child.
    pub(super) fn bare_restore(&self, subject: &Subject, dir: &str) -> Result<()> {
        // What it starts keeps its output, and whoever would read that would wait for its end.
        let mut words = vec!["sh", "-c", "exec \"$@\" > /dev/null 2>&1", "sh", "criu", "--no-default-config"];
        words.extend(["restore", "--restore-detached", "-D", dir, "-o", "bare.log", "-v4"]);
        words.extend(COMMON);
        words.extend(subject.inherited.iter().flat_map(|word| ["--inherit-fd", word]));
        self.host.ok(words).map(drop)
    }
}

const COMMON: [&str; 7] = [
    "--tcp-established",
    "--network-lock",
    "nftables",
    "--ext-unix-sk",
    "--file-locks",
    "--link-remap",
    "--manage-cgroups=ignore",
];

impl Subject {
    /// What ftd found out about it when it dumped it.
    pub(super) fn of(image: &Value) -> Result<Self> {
        let list = |name: &str| image[name].as_array().cloned().unwrap_or_default();
        let sockets = list("journal");
        let nulls = list("nulls");
        let nulls = nulls.iter().filter_map(Value::as_str);
        let external = sockets.iter().map(|inode| format!("unix[{inode}]"));
        let inherited = sockets.iter().map(|inode| format!("fd[1]:socket:[{inode}]"));
        Ok(Self {
            main_pid: image["main_pid"].as_u64().context("no main process")?,
            external: external.chain(nulls.clone().map(str::to_owned)).collect(),
            inherited: inherited.chain(nulls.map(|null| format!("fd[0]:{null}"))).collect(),
        })
    }
}

/// What CRIU says of a dump in `stats-dump`, in microseconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(super) struct Stats {
    /// How long the processes stood still.
    pub(super) frozen_us: u64,
    /// Of that, bringing them to a halt.
    freezing_us: u64,
    /// Of that, going through their memory, and writing it.
    memory_us: u64,
    written_us: u64,
    /// Pages written.
    pages: u64,
}

impl Stats {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("stats-dump");
        let bytes = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
        // Two magic numbers and a length; then a message that has one message, whose fields are all numbers
        // (stats.proto of CRIU).
        let fields = bytes.get(12..).map(numbers).unwrap_or_default();
        let field = |number: u64| fields.iter().find(|(n, _)| *n == number).map(|(_, value)| *value);
        let stats = field(2).zip(field(1)).map(|(frozen_us, freezing_us)| Self {
            frozen_us,
            freezing_us,
            memory_us: field(3).unwrap_or(0),
            written_us: field(4).unwrap_or(0),
            pages: field(7).unwrap_or(0),
        });
        stats.with_context(|| format!("{} makes no sense", path.display()))
    }
}

/// The numbered fields of the message within a message, as far as they are numbers.
fn numbers(message: &[u8]) -> Vec<(u64, u64)> {
    let mut rest = message.iter().copied();
    let mut varint = || {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = rest.next()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    // The outer field, 1 of the kind "bytes", and its length.
    let (Some(0x0a), Some(_)) = (varint(), varint()) else { return Vec::new() };
    std::iter::from_fn(|| {
        let key = varint()?;
        let (field, kind) = (key >> 3, key % 8);
        (kind == 0).then_some((field, varint()?))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_a_dump_are_read() {
        let dir = std::env::temp_dir().join(format!("ftd-bench-stats-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        // 1: 300, 2: 16000, 7: 9
        let message = [0x08, 0xac, 0x02, 0x10, 0x80, 0x7d, 0x38, 0x09];
        let bytes = [&[0; 12][..], &[0x0a, 8], &message].concat();
        std::fs::write(dir.join("stats-dump"), bytes).unwrap();
        let stats = Stats::read(&dir).unwrap();
        assert_eq!((stats.frozen_us, stats.freezing_us, stats.pages), (16_000, 300, 9));
        std::fs::write(dir.join("stats-dump"), b"short").unwrap();
        assert!(Stats::read(&dir).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
