//! A unit that is brought to a halt here because it is to go on elsewhere, and what becomes of it: it goes on here after
//! all, or it ends.
//!
//! Unlike a dump that stops a unit, this one leaves nothing to CRIU: once the images are complete CRIU is gone, and
//! the processes stand still by SIGSTOP until [`thaw`] or [`end`]. So the end of ftd changes nothing in between. For the
//! whole of that time, which may be long, systemd must take a drop-in's word ([`quiet`]) that it is not to do anything
//! about the unit's end. That drop-in is not locked, and no [`sweep`](super::sweep) takes it: whoever
//! has the move's record removes it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Criu, DumpUnit, Looked, UnitError, UnitImage, blocking,
    drop_in::{RUNTIME, STOP_QUIETLY, reload},
    file, release_network, service,
};
use crate::{
    snapshot::criu::{After, Moment},
    unit::{
        cgroup,
        manager::{Service, Systemd},
    },
};

/// Comes last, as our others do.
const MOVING: &str = "zz-ftd-moving.conf";

fn drop_in(unit: &str) -> PathBuf {
    Path::new(RUNTIME).join(format!("{unit}.d")).join(MOVING)
}

/// Has systemd do nothing about these units, whatever becomes of their processes, until [`loud`].
pub async fn quiet(systemd: &Systemd, units: &[String]) -> Result<(), UnitError> {
    for unit in units {
        let path = drop_in(unit);
        let written = fs::create_dir_all(path.parent().unwrap_or(Path::new(RUNTIME)));
        let written = written.and_then(|()| fs::write(&path, STOP_QUIETLY));
        written.map_err(file(format!("{} cannot be written", path.display())))?;
    }
    reload(systemd).await
}

/// Ends that, where it is so.
pub async fn loud(systemd: &Systemd, units: &[String]) -> Result<(), UnitError> {
    let mut any = false;
    for unit in units {
        let path = drop_in(unit);
        match fs::remove_file(&path) {
            Ok(()) => any = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file(format!("{} cannot be removed", path.display()))(error)),
        }
        if let Some(dir) = path.parent() {
            // It is the unit's, and may hold others.
            let _ = fs::remove_dir(dir);
        }
    }
    if any { reload(systemd).await } else { Ok(()) }
}

/// Dumps a unit and leaves it standing still. `word` is asked at each moment; at [`Moment::PostDump`] the images are
/// complete but for the cost, and a no, an error, or the end of this process before it lets the unit go on.
pub async fn halt(
    systemd: &Systemd,
    criu: &Criu,
    unit: &str,
    dir: &Path,
    limit: Duration,
    word: impl FnMut(Moment) -> bool + Send + 'static,
) -> Result<UnitImage, UnitError> {
    let looked = Looked::at(systemd, unit, dir, After::Stop).await?;
    let (dir, criu) = (dir.to_owned(), criu.clone());
    blocking(move || looked.dump(&criu, &DumpUnit { dir: &dir, after: After::Stop, limit }, word)).await?
}

/// Lets a unit go on that stands still, with its connections: `lock` is the packet filter that CRIU left for them. What
/// runs already is none the worse for it.
pub async fn thaw(systemd: &Systemd, unit: &str, lock: Option<String>) -> Result<(), UnitError> {
    if let Some(lock) = lock {
        release_network(lock).await?;
    }
    let service = service(systemd, unit).await?;
    blocking(move || signal_all(&service, Signal::SIGCONT)).await?
}

/// Ends a unit at once, whether it stands still or runs, and has systemd take notice. It must be [`quiet`].
pub async fn end(systemd: &Systemd, unit: &str, limit: Duration) -> Result<(), UnitError> {
    let service = service(systemd, unit).await?;
    if matches!(service.active_state.as_str(), "inactive" | "failed") {
        return Ok(());
    }
    let (id, of) = (service.id.clone(), service.clone());
    // Before the job, whose SIGCONT would let them run once more.
    blocking(move || signal_all(&of, Signal::SIGKILL)).await??;
    let failed = |cause| UnitError::Systemd { what: "stopping", unit: id.clone(), cause };
    systemd.stop(&id, limit).await.map(drop).map_err(failed)
}

/// Whether a unit runs as it was restored: it is up, and its main process is this one.
pub async fn runs_as(systemd: &Systemd, unit: &str, main_pid: u32) -> Result<bool, UnitError> {
    let service = service(systemd, unit).await?;
    Ok(service.active_state == "active" && service.main_pid == main_pid)
}

/// Sends a signal to each process of the unit; those that one of them makes meanwhile get it, too.
fn signal_all(service: &Service, signal: Signal) -> Result<(), UnitError> {
    let Some(dir) = cgroup::directory(&service.control_group) else { return Ok(()) };
    let mut done = std::collections::BTreeSet::new();
    loop {
        let pids = match cgroup::processes(&dir) {
            Ok(pids) => pids,
            Err(error) if cgroup::is_gone(&error) => return Ok(()),
            Err(error) => return Err(file(format!("the processes of {}", service.id))(error)),
        };
        let new: Vec<_> = pids.into_iter().filter(|pid| done.insert(*pid)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for pid in new {
            match kill(Pid::from_raw(pid.cast_signed()), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    let what = format!("process {pid} of {}", service.id);
                    return Err(file(what)(errno.into()));
                }
            }
        }
    }
}
