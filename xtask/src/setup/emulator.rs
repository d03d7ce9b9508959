//! The emulator for other kernels: the machine's own, or else one of ftd's in the cache.
//!
//! It is not installed: on Debian 12 its package excludes newer ones of qemu's tools (from backports, say), which
//! may be somebody's and stay. Unpacked beside them it needs no more than to be told where its files are.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use harness::Cache;
use harness::step::{Site, Step};

use super::apt;

const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// What it loads into the machine that it emulates.
const FIRMWARE: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

pub(super) struct Emulator;

impl Step for Emulator {
    fn name(&self) -> &'static str {
        "emulator"
    }

    fn output(&self) -> Option<&str> {
        Some("emulator")
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(PACKAGE.into())
    }

    fn done(&self, cache: &Cache) -> Result<bool> {
        let stamp = harness::step::stamp(&cache.path("emulator"));
        Ok(installed() || stamp.as_deref() == Some(PACKAGE))
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        apt::unpack(PACKAGE, site.dir, site.log)?;
        site.log.run(at(site.dir).arg("--version"))
    }
}

fn installed() -> bool {
    Path::new("/").join(PROGRAM).is_file()
}

/// The emulator, with its firmware and the libraries that it brings.
pub(crate) fn emulator(cache: &Cache) -> Command {
    if installed() { Command::new(Path::new("/").join(PROGRAM)) } else { at(&cache.path("emulator")) }
}

fn at(root: &Path) -> Command {
    let mut command = Command::new(root.join(PROGRAM));
    command.env("LD_LIBRARY_PATH", LIBRARIES.map(|dir| root.join(dir).display().to_string()).join(":"));
    for dir in FIRMWARE {
        command.arg("-L").arg(root.join(dir));
    }
    command
}
