//! ftd's eBPF programs on other kernels than this machine's: Debian's, each booted under plain emulation.
//!
//! The machine has no disk: an initramfs holds `vm-init` (a program of package ftd-tests) as `/init`, the
//! release build of `ftd`, the shared libraries of both, and a few of the kernel's modules. `vm-init` mounts
//! what the kernel offers, loads the modules, runs `ftd probe-test`, and powers the machine off. The kernel and everybody's errors write to the first serial
//! port, the checks' results alone to the second, so that no kernel message can cut a line of them.
//!
//! Results are lines `ok NAME`, `skip NAME: why`, `FAIL NAME: why`, and at the end `vm-init: exit CODE`. A
//! kernel passes if the last line is there with code 0, at least one check was made, none failed, none was
//! skipped but those of [`MAY_SKIP`], and the emulator ended in good order.

mod initramfs;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use harness::cache::seconds;
use harness::{Cache, command, scaled};
use nix::fcntl::{Flock, FlockArg};

use crate::package;
use crate::setup::{self, KERNELS, Need, emulator};
use crate::workspace::Workspace;

/// An emulated kernel is up in 30 s; a machine that does other things too needs more.
const LIMIT: Duration = Duration::from_secs(280);

/// Checks that need not be made, by kernel: a version, and the beginning of the check's name.
///
/// 6.1 has no TCX (it came with 6.6).
const MAY_SKIP: &[(&str, &str)] = &[("6.1", "tcx")];

/// Which kernels.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Only the kernel of this version: 6.1 or 6.12.
    #[arg(long, value_name = "VERSION", value_parser = KERNELS.map(|kernel| kernel.0))]
    only: Option<String>,
    /// This program instead of target/release/ftd. It must know `probe-test`.
    #[arg(long, value_name = "PROGRAM")]
    ftd: Option<PathBuf>,
}

impl Options {
    /// Whether the build is not what is to be tried.
    pub(crate) fn has_own_ftd(&self) -> bool {
        self.ftd.is_some()
    }
}

/// Boots them side by side and prints what each said. `ftd` must be built.
pub(crate) fn run(cache: &Cache, workspace: &Workspace, options: &Options) -> Result<()> {
    setup::need(cache, workspace, &[Need::Kernels])?;
    let ftd = options.ftd.clone().unwrap_or_else(|| workspace.target("release/ftd"));
    ensure!(ftd.is_file(), "{} is not there: `cargo xtask build` builds it", ftd.display());
    let init = package::binary(workspace, "vm-init", false)?;
    let scratch = workspace.target("kernels");
    fs::create_dir_all(&scratch).with_context(|| format!("{} cannot be made", scratch.display()))?;
    // Two at once would write to the same files.
    let lock = fs::File::create(scratch.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("{} cannot be locked", scratch.display()))?;

    for (version, _) in KERNELS {
        for path in outputs(&scratch, version) {
            // What an earlier run left would be taken for this one's, however early this one fails.
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("{} cannot be removed", path.display()));
                }
                _ => {}
            }
        }
    }

    let chosen =
        KERNELS.iter().filter(|(version, _)| options.only.as_deref().is_none_or(|only| only == *version));
    let mut machines = Vec::new();
    for (version, suite) in chosen {
        let initramfs = scratch.join(format!("{version}.cpio"));
        initramfs::write(&initramfs, &init, &ftd, &cache.path(format!("kernels/modules-{version}")))?;
        machines.push(Machine::boot(version, suite, cache, &scratch, &initramfs)?);
    }
    let mut failed = Vec::new();
    for machine in &mut machines {
        let version = machine.version;
        match machine.verdict() {
            Ok(summary) => println!(
                "kernel {version} ({}): {summary}, {}",
                machine.suite,
                seconds(machine.start.elapsed())
            ),
            Err(error) => {
                println!(
                    "kernel {version} ({}): FAILED\n  {}",
                    machine.suite,
                    format!("{error:#}").replace('\n', "\n  ")
                );
                failed.push(version);
            }
        }
    }
    ensure!(
        failed.is_empty(),
        "kernels on which ftd's probes do not do what they must: {}",
        failed.join(", ")
    );
    Ok(())
}

/// What the kernel and everybody's errors are written to, and what the checks' results are.
fn outputs(scratch: &Path, version: &str) -> [PathBuf; 2] {
    ["console", "results"].map(|what| scratch.join(format!("{version}.{what}")))
}

/// A kernel under emulation. Killed when dropped.
struct Machine {
    version: &'static str,
    suite: &'static str,
    emulator: std::process::Child,
    start: Instant,
    console: PathBuf,
    results: PathBuf,
}

impl Machine {
    fn boot(
        version: &'static str,
        suite: &'static str,
        cache: &Cache,
        scratch: &Path,
        initramfs: &Path,
    ) -> Result<Self> {
        let [console, results] = outputs(scratch, version);
        let kernel = cache.path(format!("kernels/vmlinuz-{version}"));
        ensure!(kernel.is_file(), "{} is not there; remove the directory and run it again", kernel.display());
        let mut qemu = emulator(cache);
        qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "768M", "-smp", "1"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-serial", &format!("file:{}", results.display())])
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::null());
        let limit = scaled(LIMIT).as_secs().to_string();
        // timeout(1) ends it after its time, in the foreground so that Ctrl-C reaches both; setpriv(1) has
        // the kernel end them when this process ends in any way.
        let mut timed = Command::new("setpriv");
        timed
            .args(["--pdeathsig", "TERM", "timeout", "--foreground", "--kill-after=5", &limit])
            .arg(qemu.get_program())
            .args(qemu.get_args())
            .envs(qemu.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .stdin(Stdio::null());
        let emulator = timed.spawn().context("setpriv, of util-linux, cannot be started")?;
        Ok(Self { version, suite, emulator, start: Instant::now(), console, results })
    }

    /// Waits for its end and judges it.
    fn verdict(&mut self) -> Result<String> {
        let status = self.emulator.wait()?;
        let results = fs::read(&self.results).unwrap_or_default();
        let verdict = judge(self.version, &String::from_utf8_lossy(&results)).and_then(|summary| {
            ensure!(status.success(), "its checks passed, but it did not end in good order ({summary})");
            Ok(summary)
        });
        verdict.with_context(|| {
            let console = fs::read(&self.console).unwrap_or_default();
            let ended = match status.code() {
                Some(0) => String::new(),
                Some(124) => {
                    format!("it was still running after {} and was killed; ", seconds(scaled(LIMIT)))
                }
                _ => format!("the emulator ended with {status}; "),
            };
            format!(
                "{ended}results in {}, console in {}, which ends with:\n{}\n",
                self.results.display(),
                self.console.display(),
                command::tail(&String::from_utf8_lossy(&console), 15)
            )
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // No harm if it has ended; timeout hands the signal on.
        let pid = nix::unistd::Pid::from_raw(self.emulator.id().cast_signed());
        if matches!(self.emulator.try_wait(), Ok(None)) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = self.emulator.wait();
        }
    }
}

/// What a kernel's results amount to.
fn judge(kernel: &str, results: &str) -> Result<String> {
    let (mut passed, mut skipped, mut bad) = (0, 0, Vec::new());
    let mut exit = None;
    for line in results.lines().map(str::trim) {
        if line.starts_with("ok ") {
            passed += 1;
        } else if line.starts_with("FAIL ") {
            bad.push(line);
        } else if let Some(check) = line.strip_prefix("skip ") {
            if MAY_SKIP.iter().any(|(version, name)| *version == kernel && check.starts_with(name)) {
                skipped += 1;
            } else {
                bad.push(line);
            }
        } else if let Some(code) = line.strip_prefix("vm-init: exit ") {
            exit = code.parse::<i32>().ok();
        }
    }
    let complaints = bad.join("\n");
    match exit {
        None => bail!("it did not come to the end of its checks ({passed} passed)\n{complaints}"),
        Some(_) if !bad.is_empty() => bail!("{complaints}"),
        Some(0) if passed == 0 => bail!("not one check was made: does this ftd know `probe-test`?"),
        Some(0) => Ok(format!("{passed} checks passed, {skipped} skipped")),
        Some(code) => bail!("`ftd probe-test` ended with {code} ({passed} checks passed)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_well() {
        assert_eq!(
            judge("6.12", "ok exit\r\nok exec\r\nvm-init: exit 0\r\n").unwrap(),
            "2 checks passed, 0 skipped"
        );
        assert_eq!(
            judge("6.1", "ok exit\nskip tcx: 6.6\nvm-init: exit 0\n").unwrap(),
            "1 checks passed, 1 skipped"
        );
    }

    #[test]
    fn anything_amiss_fails() {
        for (results, why) in [
            ("ok exit\nok exec\n", "did not come to the end"),
            ("", "did not come to the end"),
            ("ok exit\nvm-init: exit \n", "did not come to the end"),
            ("vm-init: exit 0\n", "not one check"),
            ("ok exit\nFAIL oom: no event\nvm-init: exit 1\n", "FAIL oom: no event"),
            ("ok exit\nFAIL oom: no event\nvm-init: exit 0\n", "FAIL oom: no event"),
            ("ok exit\nskip oom: no memory controller\nvm-init: exit 0\n", "skip oom"),
            ("ok exit\nvm-init: exit 101\n", "ended with 101"),
        ] {
            let error = judge("6.12", results).unwrap_err().to_string();
            assert!(error.contains(why), "{results:?} gave {error:?}");
        }
        assert!(judge("6.12", "ok exit\nskip tcx: no\nvm-init: exit 0\n").is_err(), "6.12 has TCX");
    }
}
