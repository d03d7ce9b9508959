//! What has to be on the machine before anything can be built or tested; see [`harness::step`] for how a
//! step is made whole or not at all.

mod apt;
mod bpf;
mod emulator;
mod kernels;
mod rootfs;
mod tools;

use anyhow::{Result, ensure};
use harness::Cache;
use harness::cache::seconds;
use harness::step::{self, Outcome, Step};

use crate::workspace::Workspace;

pub(crate) use emulator::emulator;
pub(crate) use kernels::KERNELS;

/// What a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A compiler and linker for BPF.
    Build,
    /// cargo-deb.
    Deb,
    /// Test hosts.
    Hosts,
    /// Other kernels, and an emulator to boot them.
    Kernels,
    /// What snapshots are measured against.
    Bench,
    /// cargo-deny and lintian.
    Lint,
}

/// The steps for one need, in order.
fn steps(need: Need) -> Vec<Box<dyn Step>> {
    match need {
        Need::Build => {
            let mut steps: Vec<Box<dyn Step>> =
                vec![apt::packages("build", &["gcc", "libc6-dev", "pkg-config"])];
            steps.extend(bpf::steps());
            steps
        }
        Need::Deb => vec![apt::packages("package", &["dpkg-dev"]), tools::cargo_tool("cargo-deb", "3.8")],
        Need::Hosts => vec![
            apt::packages(
                "hosts",
                &[
                    "mmdebstrap",
                    "iproute2",
                    "util-linux",
                    "curl",
                    "ca-certificates",
                    "debian-archive-keyring",
                ],
            ),
            Box::new(rootfs::RootFs),
        ],
        Need::Kernels => vec![
            apt::packages("kernels", &["debian-archive-keyring", "xz-utils"]),
            Box::new(emulator::Emulator),
            Box::new(kernels::Kernels),
        ],
        Need::Bench => vec![apt::packages("bench", &["borgbackup", "restic", "zstd"])],
        Need::Lint => vec![apt::packages("lint", &["lintian"]), tools::cargo_tool("cargo-deny", "0.20")],
    }
}

/// Makes sure of some needs; silent about what is there.
pub(crate) fn need(cache: &Cache, workspace: &Workspace, needs: &[Need]) -> Result<()> {
    dependencies(workspace)?;
    for need in needs {
        for step in steps(*need) {
            step::ensure(cache, step.as_ref())?;
        }
    }
    Ok(())
}

/// Makes sure of everything, and says of each step that it is there.
pub(crate) fn all(cache: &Cache, workspace: &Workspace) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "ftd is developed on x86_64: the other kernels are emulated for it, and the BPF packages exist for it"
    );
    let start = std::time::Instant::now();
    // All packages of the system in one go: one update, one run of apt.
    let names = [Need::Build, Need::Deb, Need::Hosts, Need::Kernels, Need::Bench, Need::Lint];
    dependencies(workspace)?;
    for need in names {
        for step in steps(need) {
            if step::ensure(cache, step.as_ref())? == Outcome::There {
                eprintln!("setup: {} ... there", step.name());
            }
        }
    }
    eprintln!("setup: all done after {}, in {}", seconds(start.elapsed()), cache.root().display());
    Ok(())
}

/// Fetches the crates of the lock files, so that later builds work offline. Cargo knows itself what is there.
fn dependencies(workspace: &Workspace) -> Result<()> {
    let mut manifests = vec!["Cargo.toml"];
    if !bpf::object_is_given() {
        manifests.push("agent-ebpf/Cargo.toml");
    }
    for manifest in manifests {
        let fetch = || {
            let mut fetch = workspace.cargo();
            fetch.args(["fetch", "--locked", "--manifest-path", manifest]);
            fetch
        };
        if !fetch().args(["--quiet", "--offline"]).output().is_ok_and(|out| out.status.success()) {
            eprintln!("setup: crates of {manifest} ...");
            harness::command::show(&mut fetch())?;
        }
    }
    Ok(())
}
