//! What is mounted where, and removing trees that may hold mounts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// One line of `/proc/self/mountinfo`, as far as it is of use here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// The type of file system, such as `cgroup2`.
    pub kind: String,
    /// Options of the file system itself: for cgroup v1 these name the controllers.
    pub options: String,
}

/// All mounts of this process's mount namespace, in the order in which they were made.
pub fn list() -> Result<Vec<Mount>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo cannot be read")?;
    Ok(text.lines().filter_map(parse).collect())
}

/// proc(5): `36 35 98:0 /root /point options [optional fields] - type source super-options`.
fn parse(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut back = back.split(' ');
    Some(Mount {
        point: PathBuf::from(unescape(front.split(' ').nth(4)?)),
        kind: back.next()?.to_owned(),
        options: back.nth(1)?.to_owned(),
    })
}

/// Space, tab, newline and backslash are written as three octal digits after a backslash.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// Mount points at or below `path`, the last made first (the order to unmount them in).
pub fn under(path: &Path) -> Result<Vec<PathBuf>> {
    let mut points: Vec<_> =
        list()?.into_iter().map(|mount| mount.point).filter(|p| p.starts_with(path)).collect();
    points.reverse();
    Ok(points)
}

/// Unmounts all that is mounted at or below `path`; lazily what is still in use.
pub fn unmount_under(path: &Path) -> Result<()> {
    for point in under(path)? {
        umount2(&point, MntFlags::UMOUNT_NOFOLLOW)
            .or_else(|_| umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW))
            .with_context(|| format!("{} cannot be unmounted", point.display()))?;
    }
    Ok(())
}

/// Mounts a tmpfs of so many bytes, for a host's disk.
pub fn tmpfs(at: &Path, size: u64) -> Result<()> {
    let options = format!("mode=755,size={size}");
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("a tmpfs cannot be mounted at {}", at.display()))
}

/// Removes a tree, if it is there, after unmounting what is mounted in it: a root file system whose making
/// was interrupted may still have the machine's own `/proc` or `/sys` inside.
pub fn remove_tree(path: &Path) -> Result<()> {
    unmount_under(path)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line =
            "37 30 0:33 / /sys/fs/cgroup/a\\040b rw,relatime shared:9 master:1 - cgroup cgroup rw,memory";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup/a b"));
        assert_eq!((mount.kind.as_str(), mount.options.as_str()), ("cgroup", "rw,memory"));
        assert_eq!(parse("rubbish"), None);
    }

    #[test]
    fn this_process_sees_proc() {
        assert!(
            list().unwrap().iter().any(|mount| mount.point == Path::new("/proc") && mount.kind == "proc")
        );
    }
}
