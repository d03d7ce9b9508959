//! `/init` of the emulated machines of `cargo xtask kernels`: mounts what the kernel offers, loads the modules
//! in `/modules`, runs `ftd probe-test` with its output on the second serial port, says there how it ended,
//! powers off.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

fn main() {
    if std::process::id() != 1 {
        eprintln!("vm-init: this is the first process of an emulated machine, and powers it off at the end");
        std::process::exit(2);
    }
    let code = run().unwrap_or_else(|error| {
        eprintln!("vm-init: {error}");
        255
    });
    // The port may be what failed; then its last line is missing, and that is a failure too.
    let _ = fs::write(RESULTS, format!("\nvm-init: exit {code}\n"));
    // There is nothing to write back: all is in memory. If the machine has no power switch, the end of
    // this process makes the kernel panic, and the emulator ends then.
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

const RESULTS: &str = "/dev/ttyS1";

/// Runs the checks and returns their exit code.
fn run() -> Result<i32, String> {
    let mounts = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tracefs", "/sys/kernel/tracing"),
    ];
    for (kind, place) in mounts {
        fs::create_dir_all(place).ok();
        mount(Some(kind), Path::new(place), Some(kind), MsFlags::empty(), None::<&str>)
            .map_err(|errno| format!("{kind} cannot be mounted at {place}: {errno}"))?;
    }
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +io +memory +pids")
        .map_err(|error| format!("controllers cannot be handed down: {error}"))?;
    load_modules();
    let results = File::options().write(true).open(RESULTS).map_err(|error| format!("{RESULTS}: {error}"))?;
    let status = Command::new("/bin/ftd")
        .arg("probe-test")
        .env("PATH", "/bin")
        .env("RUST_BACKTRACE", "1")
        .stdout(results)
        .status()
        .map_err(|error| format!("/bin/ftd cannot be started: {error}"))?;
    Ok(status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255))
}

/// Loads each module; none of them needs another. One that cannot be loaded is told of on the console, and
/// the checks that need it will say the rest.
fn load_modules() {
    for path in fs::read_dir("/modules").into_iter().flatten().flatten().map(|entry| entry.path()) {
        let loaded = File::open(&path).map_err(|error| error.to_string()).and_then(|file| {
            finit_module(&file, c"", ModuleInitFlags::empty()).map_err(|errno| errno.to_string())
        });
        if let Err(error) = loaded {
            eprintln!("vm-init: {} cannot be loaded: {error}", path.display());
        }
    }
}
