//! Packages of the system. dpkg is asked first: when all are there, nothing is called, and no root needed.
//!
//! The machine is somebody's: packages are added, never removed.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use harness::Cache;
use harness::command::{self, Log};
use harness::step::{Site, Step};

/// How long to wait for another apt or dpkg.
const LOCK: &str = "DPkg::Lock::Timeout=600";

/// A step that installs packages.
pub(super) fn packages(what: &str, names: &[&'static str]) -> Box<dyn Step> {
    packages_beside(what, names, &[], "")
}

/// The same, for packages that cannot be installed beside those of `rivals`: if one of these is there, it
/// stays, and the error says why and how to go on (`mend`).
pub(super) fn packages_beside(
    what: &str,
    names: &[&'static str],
    rivals: &[&'static str],
    mend: &'static str,
) -> Box<dyn Step> {
    let (names, rivals) = (names.to_vec(), rivals.to_vec());
    Box::new(Packages { name: format!("packages-{what}"), names, rivals, mend })
}

struct Packages {
    name: String,
    names: Vec<&'static str>,
    rivals: Vec<&'static str>,
    mend: &'static str,
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
        let missing = missing(&self.names)?;
        let absent = not_installed(&status()?, &self.rivals);
        let present: Vec<_> = self.rivals.iter().copied().filter(|name| !absent.contains(name)).collect();
        ensure!(
            present.is_empty(),
            "{} cannot be installed beside {}, which setup does not remove. {}",
            missing.join(" "),
            present.join(" "),
            self.mend
        );
        install(&missing, site.log)
    }
}

/// Those that dpkg does not have installed.
fn missing<'a>(names: &[&'a str]) -> Result<Vec<&'a str>> {
    Ok(not_installed(&status()?, names))
}

/// What dpkg knows of all packages.
fn status() -> Result<String> {
    let path = "/var/lib/dpkg/status";
    fs::read_to_string(path)
        .with_context(|| format!("{path} cannot be read: ftd is developed on Debian 12 or 13"))
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
    install.args(["install", "--yes", "--no-install-recommends", "--no-remove"]).args(names);
    if log.run(&mut install).is_ok() {
        return Ok(());
    }
    // apt does nothing while what dpkg was doing when it was interrupted is half done.
    if interrupted(Path::new("/var/lib/dpkg/updates"), &status()?) {
        // Where a package's script asks which of two configurations to take, the one that is there stays.
        let mut configure = as_root("dpkg")?;
        configure.args(["--force-confdef", "--force-confold", "--configure", "-a"]);
        log.run(&mut configure)
            .context("dpkg was interrupted, and what it left cannot be brought to an end")?;
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

/// Puts a package, and what it needs that is not installed, into a directory instead of onto the machine: for
/// what cannot be installed there without taking something else away.
pub(super) fn unpack(name: &str, into: &Path, log: &Log) -> Result<()> {
    let archives = into.join("archives");
    fs::create_dir_all(&archives)?;
    let fetch = || -> Result<()> {
        let plan = command::ok(Command::new("apt-get").args(["--simulate", "install", name]).args([
            "--no-install-recommends",
            // Whatever it would remove is not touched: nothing is installed.
            "--yes",
        ]))?;
        let mut download = Command::new("apt-get");
        download.current_dir(&archives).arg("download").args(planned(&plan));
        log.run(&mut download)
    };
    if fetch().is_err() {
        // The lists may be old, or there may be none yet.
        log.run(apt()?.arg("update"))?;
        fetch().with_context(|| format!("{name} cannot be fetched"))?;
    }
    for archive in fs::read_dir(&archives)? {
        log.run(Command::new("dpkg-deb").arg("--extract").arg(archive?.path()).arg(into))?;
    }
    Ok(fs::remove_dir_all(archives)?)
}

/// Name and version of what apt says it would install, as `NAME=VERSION`.
fn planned(simulation: &str) -> Vec<String> {
    let lines = simulation.lines().filter_map(|line| line.strip_prefix("Inst "));
    let named = lines.filter_map(|line| {
        let (name, rest) = line.split_once(' ')?;
        // An older one that is installed stands before it, in square brackets.
        let version = rest.split_once('(')?.1.split_whitespace().next()?;
        Some(format!("{name}={version}"))
    });
    named.collect()
}

/// Whether dpkg was ended in the middle of its work: by its own notes of what it is doing (numbered files),
/// or by a package that is neither here nor there.
fn interrupted(updates: &Path, status: &str) -> bool {
    let numbered = |name: &OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let notes = fs::read_dir(updates).into_iter().flatten().flatten();
    let half = [" unpacked", " half-configured", " half-installed"];
    notes.map(|entry| entry.file_name()).any(|name| numbered(&name))
        || status
            .lines()
            .any(|line| line.starts_with("Status: ") && half.iter().any(|end| line.ends_with(end)))
}

/// apt-get as root.
fn apt() -> Result<Command> {
    let mut command = as_root("apt-get")?;
    command.args(["-o", LOCK]);
    Ok(command)
}

/// A program of Debian's packaging, as root, that asks nothing.
fn as_root(program: &str) -> Result<Command> {
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new(program)
    } else if Path::new("/usr/bin/sudo").exists() {
        let mut sudo = Command::new("sudo");
        sudo.args([
            "--preserve-env=http_proxy,https_proxy,no_proxy",
            "DEBIAN_FRONTEND=noninteractive",
            program,
        ]);
        sudo
    } else {
        bail!("packages of the system are missing and can only be installed as root, and there is no sudo");
    };
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}

/// The mirror of Debian that this machine uses (not that of security updates).
pub(super) fn mirror() -> Result<String> {
    let directory =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path());
    let files = directory.chain([Path::new("/etc/apt/sources.list").to_owned()]);
    let mut texts = files.filter_map(|path| fs::read_to_string(path).ok());
    texts.find_map(|text| mirror_in(&text, |list| fs::read_to_string(list).ok())).context(
        "no mirror of Debian is known: no address in /etc/apt/sources.list or sources.list.d ends in /debian. \
         Mend: add the line `deb ADDRESS RELEASE main` with the address of a mirror",
    )
}

/// The first address in a file of apt's sources, of either format, that looks like Debian's main archive. It
/// may be in a list of mirrors (`mirror+file:`), which `read` reads.
fn mirror_in(text: &str, read: impl Fn(&str) -> Option<String>) -> Option<String> {
    let words = text
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
        .flat_map(str::split_whitespace);
    let mut addresses = words.flat_map(|word| match word.strip_prefix("mirror+file:") {
        // An address a line; what may follow it is parted from it by a tab.
        Some(list) => {
            let lines = read(list).unwrap_or_default();
            lines.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
        }
        None => vec![word.to_owned()],
    });
    let main = |word: &String| word.contains("://") && word.trim_end_matches('/').ends_with("/debian");
    addresses.find(main).map(|word| word.trim_end_matches('/').to_owned())
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
    fn what_apt_would_install_is_read_with_its_version() {
        let plan = "Remv utils [1:10.0]\nInst seabios (1.16.2-1 Debian:12.15/oldstable [all])\n\
                    Inst libc6 [2.36-9] (2.36-10 Debian:12.15/oldstable [amd64]) []\nConf seabios (1.16.2-1 x)\n";
        assert_eq!(planned(plan), ["seabios=1.16.2-1", "libc6=2.36-10"]);
    }

    #[test]
    fn an_interrupted_dpkg_is_known_by_its_notes_and_by_half_done_packages() {
        let dir = tempfile::tempdir().unwrap();
        let well = "Package: a\nStatus: install ok installed\n";
        fs::create_dir(dir.path().join("tmp.i")).unwrap();
        assert!(!interrupted(dir.path(), well));
        assert!(interrupted(dir.path(), "Package: a\nStatus: install ok half-configured\n"));
        assert!(interrupted(dir.path(), "Package: a\nStatus: install ok unpacked\n"));
        fs::write(dir.path().join("0001"), "").unwrap();
        assert!(interrupted(dir.path(), well));
    }

    #[test]
    fn the_mirror_is_found_in_all_formats() {
        let found = |text: &str| mirror_in(text, |_| None);
        let new = "Types: deb\n# http://old.example.org/debian\nURIs: http://example.org/debian/\nSuites: bookworm\n";
        assert_eq!(found(new).as_deref(), Some("http://example.org/debian"));
        let old = "deb [arch=amd64] https://example.org/debian bookworm main\n";
        assert_eq!(found(old).as_deref(), Some("https://example.org/debian"));
        assert_eq!(found("URIs: http://example.org/debian-security\n"), None);
        assert_eq!(found("deb https://example.org/apt sdk main"), None);
        let list = |path: &str| {
            let mirrors = "https://example.org/debian/\tpriority:1\nhttps://far.example.org/debian\n";
            (path == "/etc/apt/mirrors/debian.list").then(|| mirrors.to_owned())
        };
        let by_list = mirror_in("URIs: mirror+file:/etc/apt/mirrors/debian.list\n", list);
        assert_eq!(by_list.as_deref(), Some("https://example.org/debian"));
    }
}
