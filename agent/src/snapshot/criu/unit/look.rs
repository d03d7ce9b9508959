//! Looking whether units can be restored, before anything is touched.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use super::{super::images, UnitError, UnitImage, blocking, service};
use crate::unit::{
    cgroup,
    manager::{Service, Systemd},
};

/// Directories that a unit may see other contents of than the host: images cannot be there.
pub(super) const HIDDEN: [&str; 6] = ["/tmp", "/var/tmp", "/home", "/root", "/run/user", "/dev"];

/// What a restore may take for granted when it looks at what is in the way.
#[derive(Debug, Clone, Default)]
pub struct Granted {
    /// Units that run are stopped before: their processes, and that they run, are in nobody's way.
    pub stopped: bool,
    /// Files that are put back before, and their sizes then.
    pub files: BTreeMap<PathBuf, u64>,
}

/// All that is in the way of restoring units, each from its directory. Empty: nothing, as far as can be seen.
pub async fn in_the_way(systemd: &Systemd, units: &[(String, PathBuf)], granted: &Granted) -> Vec<UnitError> {
    let mut errors = Vec::new();
    for (unit, dir) in units {
        match look(systemd, unit, dir, granted).await {
            Ok((_, _, found)) => errors.extend(found),
            Err(error) => errors.push(error),
        }
    }
    errors
}

/// Looks whether a unit can be restored: what systemd says of it, the record, and what is in the way.
pub(super) async fn look(
    systemd: &Systemd,
    unit: &str,
    dir: &Path,
    granted: &Granted,
) -> Result<(Service, UnitImage, Vec<UnitError>), UnitError> {
    let service = service(systemd, unit).await?;
    let image = UnitImage::read(dir)?;
    image.fits(dir, &service.id)?;
    let mut errors = Vec::new();
    let down = matches!(service.active_state.as_str(), "inactive" | "failed");
    if !down && !granted.stopped {
        let mend = "stop it first (--stop): what it holds in memory now would be lost";
        let (unit, state) = (service.id.clone(), service.active_state.clone());
        errors.push(UnitError::State { unit, state, mend });
    }
    errors.extend(visible(&service.id, dir, image.own_mounts).err());
    let own = if down { BTreeSet::new() } else { ids_of(&service) };
    let (unit, dir, mounts) = (service.id.clone(), dir.to_owned(), image.own_mounts);
    let files = granted.files.clone();
    errors.extend(blocking(move || misfits(&unit, &dir, mounts, &own, &files)).await??);
    Ok((service, image, errors))
}

/// The numbers of a running unit's processes and threads.
fn ids_of(service: &Service) -> BTreeSet<u32> {
    let dir = cgroup::directory(&service.control_group);
    let pids = dir.and_then(|dir| cgroup::processes(&dir).ok()).unwrap_or_default();
    let tasks = pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok());
    let tasks = tasks.flatten().flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
    tasks.chain(pids.iter().copied()).collect()
}

pub(super) fn visible(unit: &str, dir: &Path, own_mounts: bool) -> Result<(), UnitError> {
    if own_mounts && HIDDEN.iter().any(|hidden| dir.starts_with(hidden)) {
        return Err(UnitError::Hidden { unit: unit.into(), dir: dir.into() });
    }
    Ok(())
}

/// Which PIDs are not free, but for the unit's `own`, and which files are not as they were, nor will be so when
/// `put_back`.
fn misfits(
    unit: &str,
    dir: &Path,
    own_mounts: bool,
    own: &BTreeSet<u32>,
    put_back: &BTreeMap<PathBuf, u64>,
) -> Result<Vec<UnitError>, UnitError> {
    let damaged = |error: io::Error| UnitError::Images { dir: dir.into(), cause: error.to_string() };
    let mut errors = Vec::new();
    for pid in images::tree(dir).map_err(damaged)?.ids {
        // Threads too can be asked for by their number, though they are not listed.
        if !own.contains(&pid)
            && let Ok(comm) = fs::read_to_string(format!("/proc/{pid}/comm"))
        {
            errors.push(UnitError::Taken { unit: unit.into(), pid, owner: comm.trim().to_owned() });
        }
    }
    for needed in images::needed_files(dir).map_err(damaged)? {
        // What systemd makes anew for this start, or what only the unit sees.
        let below = |places: &[&str]| places.iter().any(|place| needed.path.starts_with(place));
        if below(&["/proc", "/sys", "/run"]) || own_mounts && below(&HIDDEN) {
            continue;
        }
        if let Some(how) = difference(&needed, put_back.get(&needed.path).copied()) {
            errors.push(UnitError::Changed { unit: unit.into(), path: needed.path, how });
        }
    }
    Ok(errors)
}

/// How a file is not what CRIU will want.
fn difference(needed: &images::NeededFile, put_back: Option<u64>) -> Option<String> {
    let other_size = |found: u64| {
        let size = needed.size.filter(|size| *size != found)?;
        Some(format!("has {found} bytes now, and had {size}"))
    };
    if let Some(size) = put_back {
        return other_size(size).map(|how| how.replace(" now", " in the snapshot"));
    }
    let meta = match fs::metadata(&needed.path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some("is missing".into()),
        Err(error) => return Some(format!("cannot be looked at: {error}")),
    };
    if !meta.is_file() {
        return None;
    }
    if let Some(how) = other_size(meta.len()) {
        return Some(how);
    }
    match (needed.build_id.is_empty(), images::build_id(&needed.path)) {
        (false, Ok(found)) if !needed.has_build_id(found.as_deref()) => {
            Some("is another build now (its build-id differs)".into())
        }
        (false, Err(error)) => Some(format!("cannot be read: {error}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_the_unit_does_not_see_is_refused() {
        assert!(visible("x", Path::new("/tmp/images"), true).is_err());
        visible("x", Path::new("/tmp/images"), false).unwrap();
        visible("x", Path::new("/var/lib/ftd/x"), true).unwrap();
    }
}
