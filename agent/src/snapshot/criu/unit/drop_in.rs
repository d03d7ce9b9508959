//! Drop-ins that tell systemd, for the time of one stop or start, what becomes of a unit.
//!
//! They lie below /run, come last, and are locked (flock) by their maker as long as they are in use.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};

use super::{
    Connections, PRIVATE_TMP, RUNTIME_FILES, TAR, UnitImage,
    error::{UnitError, file},
};
use crate::unit::manager::{Service, Systemd};

/// Where units have drop-ins that are gone after a reboot.
pub(super) const RUNTIME: &str = "/run/systemd/system";
/// The names of ours. They come last, so that they override all others.
pub(super) const STOPPING: &str = "zz-ftd-dump.conf";
pub(super) const STARTING: &str = "zz-ftd-restore.conf";

/// systemd must take the end of the main process for a stop, do nothing about it, and keep what the unit has in
/// /run.
pub(super) const STOP_QUIETLY: &str = "[Service]\nRestart=no\nSuccessExitStatus=SIGKILL\nRuntimeDirectoryPreserve=yes\n\
                            ExecStop=\nExecStopPost=\n";

/// Drop-ins that hold while something is done.
#[derive(Debug)]
pub(super) struct Placed(Vec<DropIn>);

impl Placed {
    /// Puts drop-ins in place, each a unit, a name and a text, and has systemd read them.
    pub(super) async fn new(
        systemd: &Systemd,
        wanted: Vec<(String, &str, String)>,
    ) -> Result<Self, UnitError> {
        let mut placed = Vec::new();
        for (unit, name, text) in wanted {
            let path = Path::new(RUNTIME).join(format!("{unit}.d")).join(name);
            let what = format!("{} cannot be written", path.display());
            // From here on an error removes it.
            placed.push(DropIn::write(path, &text).map_err(file(what))?);
        }
        reload(systemd).await?;
        Ok(Self(placed))
    }

    pub(super) async fn remove(self, systemd: &Systemd) -> Result<(), UnitError> {
        let Self(drop_ins) = self;
        drop(drop_ins);
        reload(systemd).await
    }
}

pub(super) async fn reload(systemd: &Systemd) -> Result<(), UnitError> {
    let failed = |cause| UnitError::Systemd { what: "reloading", unit: "unit files".into(), cause };
    systemd.reload_files().await.map_err(failed)
}

#[derive(Debug)]
struct DropIn {
    path: PathBuf,
    /// Tells a [`sweep`] that it is in use.
    _lock: Flock<fs::File>,
}

impl DropIn {
    fn write(path: PathBuf, text: &str) -> io::Result<Self> {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(RUNTIME)))?;
        loop {
            let file = fs::File::create(&path)?;
            let inode = file.metadata()?.ino();
            let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
            // Between the two a sweep may have taken it for left over.
            if fs::metadata(&path).is_ok_and(|meta| meta.ino() == inode) {
                let drop_in = Self { path, _lock: lock };
                fs::write(&drop_in.path, text)?;
                return Ok(drop_in);
            }
        }
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a drop-in cannot be removed");
        }
        if let Some(dir) = self.path.parent() {
            // It is the unit's, and may hold others.
            let _ = fs::remove_dir(dir);
        }
    }
}

/// The drop-in for a start by `criu restore`.
pub(super) fn start_by_criu(
    service: &Service,
    image: &UnitImage,
    criu: &Path,
    dir: &Path,
    pid_file: &Path,
    (limit, connections): (Duration, Connections),
) -> String {
    let connections = match connections {
        Connections::Keep => "--tcp-established",
        Connections::Close => "--tcp-close",
    };
    let path = |path: &Path| quoted(&path.display().to_string());
    let mut text = String::from("[Service]\n");
    let mut line = |args: std::fmt::Arguments<'_>| {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{args}");
    };
    line(format_args!("Type=forking\nNotifyAccess=main\nRestart=no\nGuessMainPID=no"));
    line(format_args!("PIDFile={}", escaped(&pid_file.display().to_string())));
    line(format_args!("TimeoutStartSec={}", limit.as_secs().max(1)));
    line(format_args!("ExecCondition=\nExecStartPre=\nExecStartPost=\nExecStart="));
    // As root and outside of the unit's view: /run may be closed to it.
    if let Some(parent) = pid_file.parent() {
        line(format_args!("ExecStartPre=-+/usr/bin/mkdir -p {}", path(parent)));
    }
    line(format_args!("ExecStartPre=-+/usr/bin/rm -f {}", path(pid_file)));
    for name in [PRIVATE_TMP, RUNTIME_FILES] {
        let archive = dir.join(name);
        if archive.exists() {
            // As root, within the unit's view: that is where its /tmp is.
            line(format_args!("ExecStartPre=!{TAR} -C / -xpf {}", path(&archive)));
        }
    }
    let mut start = format!(
        "ExecStart=!{} --no-default-config restore --restore-detached --pidfile {} -D {} -v4 -o restore.log \
         --manage-cgroups=ignore --network-lock nftables {connections} --file-locks --link-remap --ext-unix-sk",
        path(criu),
        path(pid_file),
        path(dir)
    );
    for inode in &image.journal {
        // CRIU's standard output is the journal's new end of the unit.
        let _ = write!(start, " --inherit-fd fd[1]:socket:[{inode}]");
    }
    for null in &image.nulls {
        let _ = write!(start, " --inherit-fd fd[0]:{null}");
    }
    line(format_args!("{start}"));
    line(format_args!("StandardInput=null"));
    if image.journal.is_empty() && !image.nulls.is_empty() {
        // One for reading and writing: it may have been the standard output, too.
        line(format_args!("StandardInput=file:/dev/null\nStandardOutput=file:/dev/null"));
    }
    let program = service.program.as_deref().and_then(|program| program.rsplit('/').next());
    if let Some(identifier) = service.syslog_identifier.as_deref().or(program) {
        line(format_args!("SyslogIdentifier={}", escaped(identifier)));
    }
    if image.own_mounts {
        line(format_args!("ReadWritePaths={} /run", path(dir)));
    }
    text.push_str(LIFTED);
    text.push_str(&lifted(service));
    text
}

/// What CRIU restores by itself, and would be kept from by.
const LIFTED: &str = "CapabilityBoundingSet=\nCapabilityBoundingSet=~\nNoNewPrivileges=no\nSystemCallFilter=\n\
                      SystemCallArchitectures=\nRestrictNamespaces=no\nRestrictAddressFamilies=\n\
                      RestrictSUIDSGID=no\nRestrictRealtime=no\nMemoryDenyWriteExecute=no\nLockPersonality=no\n\
                      ProtectClock=no\nProtectHostname=no\nProtectKernelModules=no\nProtectKernelTunables=no\n\
                      ProtectKernelLogs=no\nProtectControlGroups=no\nPrivateDevices=no\nProtectProc=default\n\
                      ProcSubset=all\nRootDirectory=\n";

/// These come with filters of system calls too, which would stay with the processes on top of their own. What they
/// do to mounts is done here by settings that have none, as systemd's own manual describes them
/// (systemd.exec(5)).
fn lifted(service: &Service) -> String {
    let mut text = String::new();
    if service.protect_tunables {
        text.push_str("ReadOnlyPaths=-/proc/sys -/sys -/proc/sysrq-trigger -/proc/irq -/proc/bus\n");
        text.push_str("InaccessiblePaths=-/proc/kallsyms -/proc/kcore\n");
    }
    if service.protect_control_groups {
        text.push_str("ReadOnlyPaths=-/sys/fs/cgroup\n");
    }
    if service.protect_logs {
        text.push_str("InaccessiblePaths=-/proc/kmsg -/dev/kmsg\n");
    }
    if service.private_devices {
        text.push_str("DevicePolicy=closed\n");
    }
    text
}

/// A word as systemd reads it in a command line, see systemd.service(5), "Command lines".
fn quoted(word: &str) -> String {
    let word = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{word}\"")
}

/// A value as systemd reads it, see systemd.unit(5), "Specifiers".
fn escaped(value: &str) -> String {
    value.replace('%', "%%")
}

/// Removes what a crashed ftd has left below /run/systemd/system; says how many.
pub async fn sweep(systemd: &Systemd) -> Result<usize, UnitError> {
    let mut swept = 0;
    for entry in fs::read_dir(RUNTIME).into_iter().flatten().flatten() {
        for name in [STOPPING, STARTING] {
            let path = entry.path().join(name);
            let Ok(file) = fs::File::open(&path) else { continue };
            let Ok(_ours) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            if fs::remove_file(&path).is_ok() {
                swept += 1;
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
    if swept > 0 {
        reload(systemd).await?;
    }
    Ok(swept)
}

pub(super) fn pid_file_of(service: &Service) -> PathBuf {
    let own = || format!("/run/{}.ftd-restore.pid", service.id);
    service.pid_file.clone().unwrap_or_else(own).into()
}

#[cfg(test)]
mod tests {
    use super::{super::record::tests::image, *};

    #[test]
    fn words_reach_the_program_as_they_are() {
        assert_eq!(quoted("/a b/$x%y\"z\\"), r#""/a b/$$x%%y\"z\\""#);
    }

    #[test]
    fn the_drop_in_starts_criu_and_gives_back_what_it_lifts() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(PRIVATE_TMP), "").unwrap();
        let service = Service {
            id: "x.service".into(),
            program: Some("/usr/sbin/nginx".into()),
            protect_tunables: true,
            private_devices: true,
            ..Service::default()
        };
        let pid_file = Path::new("/run/x.pid");
        let with = (Duration::from_secs(30), Connections::Keep);
        let text = start_by_criu(&service, &image(), Path::new("/usr/sbin/criu"), dir.path(), pid_file, with);
        for line in [
            "Type=forking",
            "PIDFile=/run/x.pid",
            "TimeoutStartSec=30",
            "SyslogIdentifier=nginx",
            "ExecStart=",
            "ProtectKernelTunables=no",
            "DevicePolicy=closed",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        let inherited =
            "--inherit-fd fd[1]:socket:[5] --inherit-fd fd[1]:socket:[9] --inherit-fd fd[0]:file[51:4]\n";
        assert!(text.contains(inherited), "{text}");
        assert!(text.contains(&format!("-xpf \"{}/private-tmp.tar\"", dir.path().display())), "{text}");
        assert!(text.contains("ReadOnlyPaths=-/proc/sys") && !text.contains("runtime.tar"), "{text}");
        // A unit without a view of its own gets none by us.
        let plain = UnitImage { own_mounts: false, journal: Vec::new(), nulls: Vec::new(), ..image() };
        let service = Service { protect_tunables: false, private_devices: false, ..service };
        let text = start_by_criu(&service, &plain, Path::new("/c"), dir.path(), pid_file, with);
        assert!(!text.contains("Paths=") && !text.contains("--inherit-fd"), "{text}");
    }
}
