//! Debian's kernels, to be booted under emulation.
//!
//! They are of other releases than the machine, so apt works here on a state directory of its own, with
//! these releases as its only sources; the machine's apt does not notice.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::step::{Site, Step};
use harness::{Cache, command};

use super::apt;

/// The kernel's version, and the release of Debian that has it.
pub(crate) const KERNELS: [(&str, &str); 2] = [("6.1", "bookworm"), ("6.12", "trixie")];

/// Modules that ftd can use where the kernel itself lacks the thing: the fence on kernels before 6.6 hangs
/// on a classifier (`sch_ingress`, `cls_bpf`), and a card to try it on is a `veth` or `dummy`.
const MODULES: [&str; 4] = ["sch_ingress", "cls_bpf", "veth", "dummy"];

pub(super) struct Kernels;

impl Step for Kernels {
    fn name(&self) -> &'static str {
        "kernels"
    }

    fn output(&self) -> Option<&str> {
        Some("kernels")
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(format!("2 {KERNELS:?} {MODULES:?}"))
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        for (version, release) in KERNELS {
            let scratch = site.dir.join(release);
            fs::create_dir_all(scratch.join("lists/partial"))?;
            fs::create_dir_all(scratch.join("archives/partial"))?;
            fetch(version, release, &scratch, site)
                .with_context(|| format!("Debian's kernel {version} ({release})"))?;
            fs::remove_dir_all(&scratch)?;
        }
        Ok(())
    }
}

fn fetch(version: &str, release: &str, scratch: &Path, site: &Site<'_>) -> Result<()> {
    let sources = scratch.join("sources.list");
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    fs::write(&sources, format!("deb [arch=amd64 signed-by={keyring}] {} {release} main\n", apt::mirror()?))?;
    let options = [
        format!("Dir::State::Lists={}", scratch.join("lists").display()),
        format!("Dir::Cache={}", scratch.display()),
        format!("Dir::Etc::SourceList={}", sources.display()),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        // The private directories belong to whoever runs this: no change of user.
        "APT::Sandbox::User=root".to_owned(),
        "Acquire::Languages=none".to_owned(),
    ];
    let with_options = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(scratch);
        for option in &options {
            command.args(["-o", option]);
        }
        command
    };
    site.log.run(with_options("apt-get").arg("update"))?;
    // linux-image-amd64 is empty and depends on the kernel of the day.
    let text = command::ok(with_options("apt-cache").args(["depends", "linux-image-amd64"]))?;
    let package = image(&text, version)
        .with_context(|| format!("linux-image-amd64 of {release} depends on no kernel {version}: {text}"))?;
    site.log.run(with_options("apt-get").args(["download", package]))?;
    let deb = fs::read_dir(scratch)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some(OsStr::new("deb")))
        .with_context(|| format!("{package} was downloaded but is not there"))?;
    unpack(&deb, scratch)?;
    let modules = site.dir.join(format!("modules-{version}"));
    fs::create_dir(&modules)?;
    for entry in fs::read_dir(scratch)?.flatten() {
        let path = entry.path();
        let extension = path.extension().and_then(OsStr::to_str);
        if entry.file_name().as_encoded_bytes().starts_with(b"vmlinuz-") {
            fs::rename(path, site.dir.join(format!("vmlinuz-{version}")))?;
        } else if extension == Some("ko") {
            fs::rename(path, modules.join(entry.file_name()))?;
        } else if extension == Some("xz") {
            site.log.run(Command::new("xz").arg("--decompress").arg(&path))?;
            let plain = path.with_extension("");
            fs::rename(&plain, modules.join(plain.file_name().unwrap_or_default()))?;
        }
    }
    fs::write(site.dir.join(format!("name-{version}")), package)?;
    Ok(())
}

/// The kernel's package in `apt-cache depends` of the package that depends on it.
fn image<'a>(depends: &'a str, version: &str) -> Option<&'a str> {
    let wanted = format!("linux-image-{version}.");
    let wanted_plus = format!("linux-image-{version}+");
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(&wanted) || name.starts_with(&wanted_plus))
}

/// Takes the few files that are needed out of a package of 100 MB, without their directories.
fn unpack(deb: &Path, into: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb cannot be started")?;
    let stream = archive.stdout.take().context("dpkg-deb has no output")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--wildcards", "--no-anchored", "--transform=s,.*/,,", "--directory"]).arg(into);
    tar.arg("./boot/vmlinuz-*").args(MODULES.map(|module| format!("*/{module}.ko*")));
    let tar = tar.stdin(stream).status().context("tar cannot be started")?;
    let dpkg = archive.wait()?;
    ensure!(tar.success() && dpkg.success(), "the kernel cannot be unpacked from {}", deb.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_of_the_day_is_found() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-40-amd64\n  Conflicts: x\n";
        assert_eq!(image(text, "6.1"), Some("linux-image-6.1.0-40-amd64"));
        assert_eq!(
            image("  Depends: linux-image-6.12.43+deb13-amd64", "6.12"),
            Some("linux-image-6.12.43+deb13-amd64")
        );
        assert_eq!(image("  Depends: linux-image-6.12.43+deb13-amd64", "6.1"), None);
    }
}
