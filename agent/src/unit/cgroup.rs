//! Where control groups are, on this host.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// The mount point of the unified hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid hosts.
pub fn unified_mount() -> io::Result<PathBuf> {
    find_mount(&mountinfo()?, is_unified).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The mount point of the memory controller's own hierarchy, on hosts that still have one.
pub fn v1_memory_mount() -> Option<PathBuf> {
    find_mount(&mountinfo().ok()?, is_v1_memory)
}

/// The directory of a unit's cgroup, from systemd's `ControlGroup`.
pub fn directory(control_group: &str) -> Option<PathBuf> {
    Some(unified_mount().ok()?.join(control_group.trim_start_matches('/')))
}

/// Whether a file of a cgroup could not be used because the cgroup is gone.
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The processes in a cgroup and the cgroups below it. A cgroup below that vanishes meanwhile has none.
pub fn processes(dir: &Path) -> io::Result<Vec<u32>> {
    let mut pids: Vec<_> =
        fs::read_to_string(dir.join("cgroup.procs"))?.lines().filter_map(|pid| pid.parse().ok()).collect();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match processes(&entry.path()) {
                Err(error) if is_gone(&error) => {}
                below => pids.extend(below?),
            }
        }
    }
    Ok(pids)
}

/// Bytes, because a mount anywhere on the host may have a name that is no UTF-8.
fn mountinfo() -> io::Result<Vec<u8>> {
    fs::read("/proc/self/mountinfo")
}

fn is_unified(mount: &Mount<'_>) -> bool {
    mount.kind == b"cgroup2"
}

fn is_v1_memory(mount: &Mount<'_>) -> bool {
    mount.kind == b"cgroup" && mount.options.split(|byte| *byte == b',').any(|option| option == b"memory")
}

/// One line of `/proc/self/mountinfo`, see `proc_pid_mountinfo(5)`.
struct Mount<'a> {
    /// What part of the file system it shows.
    root: &'a [u8],
    /// Where, with escapes.
    point: &'a [u8],
    /// File system type.
    kind: &'a [u8],
    /// Options of the file system, comma-separated.
    options: &'a [u8],
}

impl<'a> Mount<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // after the mount's own options and a varying number of tags
        fields.find(|field| *field == b"-")?;
        let (kind, _source, options) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Self { root, point, kind, options })
    }
}

/// One that shows the whole file system goes before bind mounts of parts.
fn find_mount(mountinfo: &[u8], wanted: impl Fn(&Mount<'_>) -> bool) -> Option<PathBuf> {
    let mounts = mountinfo.split(|byte| *byte == b'\n').filter_map(Mount::parse).filter(wanted);
    let found: Vec<_> = mounts.collect();
    let best = found.iter().find(|mount| mount.root == b"/").or(found.first())?;
    Some(PathBuf::from(OsString::from_vec(unescape(best.point))))
}

/// Blanks, tabs, line ends and backslashes are written as a backslash and three octal digits.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    while let Some((&first, rest)) = text.split_first() {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', rest @ ..]) = (first, rest) {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            text = rest;
        } else {
            bytes.push(first);
            text = rest;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_apart_by_type_and_controller() {
        let mounts = b"24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                       30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                       31 24 0:27 / /sys/fs/cgroup/a\\040b rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(mounts, is_v1_memory), Some("/sys/fs/cgroup/memory".into()));
        assert_eq!(find_mount(mounts, is_unified), Some("/sys/fs/cgroup/a b".into()));
        assert_eq!(find_mount(mounts, |mount| mount.kind == b"bpf"), None);
    }

    #[test]
    fn a_line_of_mountinfo() {
        let line = b"41 31 0:38 /a /sys/fs/cg\\040x rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.root, mount.point), (&b"/a"[..], &b"/sys/fs/cg\\040x"[..]));
        assert_eq!((mount.kind, mount.options), (&b"cgroup2"[..], &b"rw,nsdelegate"[..]));
        assert!(Mount::parse(b"nonsense").is_none());
        assert!(Mount::parse(b"").is_none());
    }

    #[test]
    fn escapes_are_three_octal_digits() {
        assert_eq!(unescape(br"a\040b\011c\134d\012"), b"a b\tc\\d\n");
        assert_eq!(unescape(br"a\04"), br"a\04");
        assert_eq!(unescape(br"\089\400\+12"), br"\089\400\+12");
    }

    #[test]
    fn a_mount_of_a_part_comes_after_the_whole() {
        let part = b"31 24 0:27 /part /mnt/part rw - cgroup2 cgroup2 rw\n".as_slice();
        let whole = b"32 24 0:27 / /sys/fs/cgroup rw shared:4 master:1 - cgroup2 cgroup2 rw\n".as_slice();
        assert_eq!(find_mount(&[part, whole].concat(), is_unified), Some("/sys/fs/cgroup".into()));
        assert_eq!(find_mount(part, is_unified), Some("/mnt/part".into()));
    }

    #[test]
    fn names_elsewhere_need_not_be_utf8() {
        let mounts = b"30 24 0:26 / /mnt/\xff\xfe rw - ext4 /dev/\xff rw\n\
                       31 24 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(mounts, is_unified), Some("/sys/fs/cgroup".into()));
    }
}
