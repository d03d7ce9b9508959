//! Where the unified cgroup hierarchy is mounted.

use std::{
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// One line of `/proc/self/mountinfo`, see `proc_pid_mountinfo(5)`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// What part of the file system it shows.
    pub(super) root: PathBuf,
    /// Where.
    pub(super) point: PathBuf,
    /// File system type.
    pub(super) kind: String,
    /// Options of the file system, comma-separated.
    pub(super) options: String,
}

/// The mount point of cgroup2: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid hosts.
pub(super) fn mount() -> io::Result<PathBuf> {
    let mounts = mounts()?;
    let found: Vec<&Mount> = mounts.iter().filter(|mount| mount.kind == "cgroup2").collect();
    // One that shows the whole hierarchy goes before bind mounts of parts.
    let whole = found.iter().find(|mount| mount.root == Path::new("/")).or(found.first());
    whole.map(|mount| mount.point.clone()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// All mounts that this process sees.
pub(super) fn mounts() -> io::Result<Vec<Mount>> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mount> {
    let (own, of_the_file_system) = line.split_once(" - ")?;
    let mut own = own.split(' ').skip(3);
    let (root, point) = (own.next()?, own.next()?);
    let mut rest = of_the_file_system.split(' ');
    let (kind, _source, options) = (rest.next()?, rest.next()?, rest.next()?);
    Some(Mount { root: unescape(root), point: unescape(point), kind: kind.into(), options: options.into() })
}

/// Blanks, tabs, line ends and backslashes are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        if let (b'\\', Some(code)) = (first, code) {
            bytes.push(code);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo() {
        let line = r"41 31 0:38 / /sys/fs/cg\040x rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cg x"));
        assert_eq!((mount.kind.as_str(), mount.options.as_str()), ("cgroup2", "rw,nsdelegate"));
        assert_eq!(parse("nonsense"), None);
        assert_eq!(unescape(r"a\04"), Path::new(r"a\04"));
    }
}
