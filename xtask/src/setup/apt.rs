//! Packages of the system. dpkg is asked first: when all are there, nothing is called, and no root needed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use harness::Cache;
use harness::command::{self, Log};
use harness::step::{Site, Step};

/// How long to wait for another apt or dpkg.
const LOCK: &str = "DPkg::Lock::Timeout=600";

/// A step that installs packages.
pub(super) fn packages(what: &str, names: &[&'static str]) -> Box<dyn Step> {
    Box::new(Packages { name: format!("packages-{what}"), names: names.to_vec() })
}

struct Packages {
    name: String,
    names: Vec<&'static str>,
}

impl Step for Packages {
    fn name(&self) -> &str {
        &self.name
    }

    fn output(&self) -> Option<&str> {
        None
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(self.names.join(" "))
    }

    fn done(&self, _: &Cache) -> Result<bool> {
        Ok(missing(&self.names)?.is_empty())
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        install(&missing(&self.names)?, site.log)
    }
}

/// Those that dpkg does not have installed.
fn missing<'a>(names: &[&'a str]) -> Result<Vec<&'a str>> {
    let path = "/var/lib/dpkg/status";
    let status = fs::read_to_string(path)
        .with_context(|| format!("{path} cannot be read: ftd is developed on Debian 12 or 13"))?;
    Ok(not_installed(&status, names))
}

fn not_installed<'a>(status: &str, names: &[&'a str]) -> Vec<&'a str> {
    let installed: Vec<&str> = status
        .split("\n\n")
        .filter(|entry| {
            entry
                .lines()
                .any(|line| line == "Status: install ok installed" || line == "Status: hold ok installed")
        })
        .filter_map(|entry| entry.lines().find_map(|line| line.strip_prefix("Package: ")))
        .collect();
    names.iter().copied().filter(|name| !installed.contains(name)).collect()
}

/// Installs packages, with the package lists as they are; if that fails, with fresh ones.
fn install(names: &[&str], log: &Log) -> Result<()> {
    let mut install = apt()?;
    install.args(["install", "--yes", "--no-install-recommends"]).args(names);
    if log.run(&mut install).is_ok() {
        return Ok(());
    }
    let mut update = apt()?;
    update.arg("update");
    // One dead source among many makes it fail; whether that matters is for the installation to say.
    let updated = log.run(&mut update);
    let installed = log.run(&mut install);
    match (installed, updated) {
        (Err(error), Err(update)) => {
            Err(error.context(format!("apt's lists could not be updated: {update:#}")))
        }
        (installed, _) => {
            installed.with_context(|| format!("packages cannot be installed: {}", names.join(" ")))
        }
    }
}

/// apt-get as root.
fn apt() -> Result<Command> {
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new("apt-get")
    } else if Path::new("/usr/bin/sudo").exists() {
        let mut sudo = Command::new("sudo");
        sudo.args([
            "--preserve-env=http_proxy,https_proxy,no_proxy",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
        ]);
        sudo
    } else {
        bail!("packages of the system are missing and can only be installed as root, and there is no sudo");
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", LOCK]);
    Ok(command)
}

/// The mirror of Debian that this machine uses (not that of security updates).
pub(super) fn mirror() -> String {
    let directory =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path());
    let files = directory.chain([Path::new("/etc/apt/sources.list").to_owned()]);
    let mut texts = files.filter_map(|path| fs::read_to_string(path).ok());
    texts.find_map(|text| mirror_in(&text)).unwrap_or_else(|| "http://deb.debian.org/debian".to_owned())
}

/// The first address in a file of apt's sources, of either format, that looks like Debian's main archive.
fn mirror_in(text: &str) -> Option<String> {
    let mut words = text
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
        .flat_map(str::split_whitespace);
    words
        .find(|word| word.contains("://") && word.trim_end_matches('/').ends_with("/debian"))
        .map(|word| word.trim_end_matches('/').to_owned())
}

/// The machine's settings of how apt reaches its mirrors (proxies, certificates), as `NAME "VALUE"`.
pub(super) fn network_settings() -> Result<Vec<(String, String)>> {
    let text = command::ok(Command::new("apt-config").args(["dump", "--format", "%F\t%v\n"]))?;
    let settings = text.lines().filter_map(|line| line.split_once('\t')).filter(|(name, value)| {
        let name = name.to_ascii_lowercase();
        !value.is_empty() && (name.starts_with("acquire::http") || name.starts_with("acquire::https"))
    });
    Ok(settings.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_but_configured_is_not_installed() {
        let status = "Package: a\nStatus: install ok installed\n\nPackage: b\nStatus: deinstall ok config-files\n\nPackage: c\nStatus: hold ok installed\n";
        assert_eq!(not_installed(status, &["a", "b", "c", "d"]), ["b", "d"]);
    }

    #[test]
    fn the_mirror_is_found_in_both_formats() {
        let new = "Types: deb\n# http://x/debian\nURIs: http://mirror.test/debian/\nSuites: bookworm\n";
        assert_eq!(mirror_in(new).as_deref(), Some("http://mirror.test/debian"));
        let old = "deb [arch=amd64] https://m.test/debian bookworm main\n";
        assert_eq!(mirror_in(old).as_deref(), Some("https://m.test/debian"));
        assert_eq!(mirror_in("URIs: http://deb.debian.org/debian-security\n"), None);
        assert_eq!(mirror_in("deb https://packages.test/apt sdk main"), None);
    }
}
