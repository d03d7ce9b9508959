//! The root file system of test hosts: Debian 13, from the mirror that this machine uses.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use harness::step::{Site, Step};
use harness::{Cache, lab};

use super::apt;

/// Raise it when what is done to the root file system changes in ways that the key below does not show.
const VERSION: u32 = 1;
const SUITE: &str = "trixie";
/// The release that CRIU is taken from: trixie's (4.1) cannot dump internet sockets on kernels from 6.16 on.
const CRIU_SUITE: &str = "forky";
/// Takes CRIU, and of the libraries that it needs those that trixie has too old, from that release. Nothing else
/// comes from there, and no source is left: hosts have no internet. `$1` is the root, `MIRROR` is put in. That
/// release's lists are good for a week only, and a mirror that is not renewed would be of no use: their age does
/// not matter here, their signature does.
const CRIU: &str = "echo 'deb MIRROR SUITE main' > \"$1/etc/apt/sources.list.d/criu.list\" && \
    printf 'Package: *\\nPin: release n=SUITE\\nPin-Priority: 90\\n' > \"$1/etc/apt/preferences.d/criu\" && \
    chroot \"$1\" apt-get -o Acquire::Check-Valid-Until=false update && \
    chroot \"$1\" apt-get install --yes --no-install-recommends --no-remove criu/SUITE && \
    chroot \"$1\" criu --version && \
    rm \"$1/etc/apt/sources.list.d/criu.list\" \"$1/etc/apt/preferences.d/criu\" && \
    chroot \"$1\" apt-get clean && rm -rf \"$1\"/var/lib/apt/lists/*";
/// What is on every host. The dependencies of ftd's package must be here: hosts have no internet.
const PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "dbus",
    "nginx",
    "apache2",
    "iproute2",
    "procps",
    "curl",
    "python3-minimal",
    "iputils-arping",
    "nftables",
    "kmod",
    "util-linux",
];
/// What a host has no use for, and which would take time at boot or fail in a namespace.
const MASKED: &[&str] = &[
    "console-getty.service",
    "getty.target",
    "systemd-udevd.service",
    "systemd-networkd-wait-online.service",
    "systemd-timesyncd.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "dpkg-db-backup.timer",
];
/// Debian's apache2 wants port 80 like its nginx: here it gets another.
const APACHE_PORT: &str = "sed -i 's/^Listen 80$/Listen 8080/' \"$1/etc/apache2/ports.conf\" && \
    sed -i 's/\\*:80>/*:8080>/' \"$1/etc/apache2/sites-available/000-default.conf\" && \
    echo 'ServerName localhost' > \"$1/etc/apache2/conf-enabled/name.conf\"";

pub(super) struct RootFs;

impl Step for RootFs {
    fn name(&self) -> &'static str {
        "rootfs"
    }

    fn output(&self) -> Option<&str> {
        Some("rootfs")
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(format!(
            "{VERSION} {SUITE} {} masked {} {APACHE_PORT} {CRIU_SUITE} {CRIU}",
            PACKAGES.join(","),
            MASKED.join(",")
        ))
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        let output = site.cache.path("rootfs");
        unused(&output)?;
        let root = site.dir.join("root");
        let mut make = Command::new("mmdebstrap");
        make.args(["--variant=minbase", "--mode=root", "--components=main"])
            .arg(format!("--include={}", PACKAGES.join(",")))
            .args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=APT::Install-Recommends \"false\""]);
        for (name, value) in apt::network_settings()? {
            make.arg(format!("--aptopt={name} \"{value}\""));
        }
        for path in ["man", "doc", "locale", "info"] {
            make.arg(format!("--dpkgopt=path-exclude=/usr/share/{path}/*"));
        }
        make.arg("--dpkgopt=force-unsafe-io");
        let mask = format!(
            "for unit in {}; do ln -sfn /dev/null \"$1/etc/systemd/system/$unit\"; done",
            MASKED.join(" ")
        );
        let mirror = apt::mirror()?;
        let criu = CRIU.replace("MIRROR", &mirror).replace("SUITE", CRIU_SUITE);
        for hook in [
            &criu,
            APACHE_PORT,
            &mask,
            "rm -f \"$1/etc/machine-id\" \"$1/etc/resolv.conf\" \"$1/etc/hostname\"",
        ] {
            make.arg(format!("--customize-hook={hook}"));
        }
        make.arg(SUITE).arg(&root).arg(mirror);
        // A personal TMPDIR may not be one that packages' scripts may write to.
        make.env("TMPDIR", "/tmp");
        site.log.run(&mut make)?;
        // That took half a minute, in which a lab may have been made.
        unused(&output)
    }
}

/// A lab's hosts have this very tree mounted: it is not taken away from under them.
fn unused(output: &Path) -> Result<()> {
    let labs = lab::standing_on(output);
    ensure!(
        labs.is_empty(),
        "test hosts are to get a new root file system, but on the present one stand the labs {}. Mend: let their \
         tests end; end those made by hand with `cargo xtask hosts --lab NAME down`",
        labs.join(", ")
    );
    Ok(())
}
