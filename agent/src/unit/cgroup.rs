//! Where control groups are, on this host.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The mount point of the unified hierarchy: `/sys/fs/cgroup`, or another on hybrid hosts.
pub fn unified_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    find_mount(&mounts, |fstype, _| fstype == "cgroup2")
}

/// The mount point of the memory controller's own hierarchy, on hosts that still have one.
pub fn v1_memory_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    find_mount(&mounts, |fstype, options| fstype == "cgroup" && options.split(',').any(|o| o == "memory"))
}

/// The directory of a unit's cgroup, from systemd's `ControlGroup`.
pub fn directory(control_group: &str) -> Option<PathBuf> {
    Some(unified_mount()?.join(control_group.trim_start_matches('/')))
}

/// The processes in a cgroup and the cgroups below it.
pub fn processes(dir: &Path) -> io::Result<Vec<u32>> {
    let mut pids: Vec<_> =
        fs::read_to_string(dir.join("cgroup.procs"))?.lines().filter_map(|pid| pid.parse().ok()).collect();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pids.extend(processes(&entry.path())?);
        }
    }
    Ok(pids)
}

/// Fields of a line of mountinfo, see proc(5): mount point is the fifth; after the lone dash come the
/// type, the source and the super block's options.
fn find_mount(mounts: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut filesystem = filesystem.split(' ');
        let (fstype, options) = (filesystem.next()?, filesystem.nth(1)?);
        let point = mount.split(' ').nth(4)?;
        wanted(fstype, options).then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_apart_by_type_and_controller() {
        let mounts = "24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 24 0:27 / /sys/fs/cgroup/a\\040b rw - cgroup2 cgroup2 rw\n";
        let memory = find_mount(mounts, |t, o| t == "cgroup" && o.split(',').any(|o| o == "memory"));
        assert_eq!(memory, Some("/sys/fs/cgroup/memory".into()));
        assert_eq!(find_mount(mounts, |t, _| t == "cgroup2"), Some("/sys/fs/cgroup/a b".into()));
        assert_eq!(find_mount(mounts, |t, _| t == "bpf"), None);
    }
}
