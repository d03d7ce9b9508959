//! One thing in the file system, held: whatever its name comes to mean later, this is still it.
//!
//! It is held by a descriptor of the kind `O_PATH`, which opens nothing: no device is woken, no FIFO is waited for. What
//! needs more goes by `/proc/self/fd/N`, which leads to the thing itself, even if it is a symlink. rustix
//! has all of this as safe calls; nix lacks extended attributes.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Component, Path, PathBuf},
};

use rustix::fs::{
    self, Access, AtFlags, Dir, FileType, Mode, OFlags, Stat, StatVfs, StatxAttributes, StatxFlags, Timespec,
    Timestamps, UTIME_OMIT, XattrFlags,
};

use super::{Bytes, Entry, Kind, Xattr};

/// As many symlinks the kernel follows in one path, see path_resolution(7).
const MAX_LINKS: usize = 40;
/// In nanoseconds.
const SECOND: i64 = 1_000_000_000;

/// A file, a directory, a symlink or anything else, held.
#[derive(Debug)]
pub(super) struct Pin {
    fd: OwnedFd,
    /// What it was like when it was found.
    pub(super) stat: Stat,
}

impl Pin {
    /// The root directory.
    pub(super) fn root() -> io::Result<Self> {
        Self::open(fs::CWD, OsStr::new("/"))
    }

    /// What is called `name` in this directory. A symlink is the symlink.
    pub(super) fn child(&self, name: &OsStr) -> io::Result<Self> {
        Self::open(self.fd.as_fd(), name)
    }

    fn open(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Self> {
        let fd = fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = fs::fstat(&fd)?;
        Ok(Self { fd, stat })
    }

    /// What kind of thing it is.
    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind() == FileType::Directory
    }

    /// Time of the last change of content when it was found, nanoseconds since 1970.
    pub(super) fn mtime(&self) -> i64 {
        mtime(&self.stat)
    }

    /// Its name while it is held: of the thing itself, also where that is a symlink.
    pub(super) fn proc_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// Opens this file, and no other, for reading. Only for regular files.
    pub(super) fn read(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(fs::open(self.proc_path(), flags, Mode::empty())?.into())
    }

    /// What it is like now.
    pub(super) fn stat_now(&self) -> io::Result<Stat> {
        Ok(fs::fstat(&self.fd)?)
    }

    /// Where this symlink leads.
    pub(super) fn target(&self) -> io::Result<PathBuf> {
        let target = fs::readlinkat(&self.fd, "", Vec::new())?;
        Ok(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }

    fn open_dir(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(fs::openat(&self.fd, ".", flags, Mode::empty())?)
    }

    /// The names in this directory, in order.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::new(self.open_dir()?)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name.to_vec()));
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Puts what has happened to this directory's names on disk.
    pub(super) fn sync_dir(&self) -> io::Result<()> {
        Ok(fs::fsync(self.open_dir()?)?)
    }

    /// The extended attributes that may be read, by name. Those that vanish meanwhile are not there.
    pub(super) fn xattrs(&self) -> io::Result<Vec<Xattr>> {
        let path = self.proc_path();
        let names = match growing(|| fs::listxattr_query(&*path), |buffer| fs::listxattr(&*path, buffer)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Vec::new()),
            names => names?,
        };
        let mut xattrs = Vec::new();
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let value =
                growing(|| fs::getxattr_query(&*path, name), |buffer| fs::getxattr(&*path, name, buffer));
            match value {
                Ok(value) => xattrs.push(Xattr { name: Bytes(name.to_vec()), value: Bytes(value) }),
                Err(error) if unreadable(&error) => {}
                Err(error) => return Err(error),
            }
        }
        xattrs.sort_unstable();
        Ok(xattrs)
    }

    /// Gives it the entry's owner, extended attributes, mode and time, in an order in which none undoes another: a
    /// new owner takes away capabilities and setuid; an access control list sets bits of the mode. (systemd refuses a
    /// setuid mode under `RestrictSUIDSGID=`.)
    pub(super) fn dress(&self, entry: &Entry) -> io::Result<()> {
        let (path, now) = (self.proc_path(), self.stat_now()?);
        if (now.st_uid, now.st_gid) != (entry.uid, entry.gid) {
            let (uid, gid) = (fs::Uid::from_raw(entry.uid), fs::Gid::from_raw(entry.gid));
            fs::chownat(&self.fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        let present = self.xattrs()?;
        for Xattr { name, .. } in &present {
            if !entry.xattrs.iter().any(|wanted| wanted.name == *name) {
                match fs::removexattr(&*path, &*name.0) {
                    // A label that a security module gives to each file by itself cannot be taken off.
                    Err(_) if name.0.starts_with(b"security.") => {}
                    result => result?,
                }
            }
        }
        for wanted in &entry.xattrs {
            if !present.contains(wanted) {
                fs::setxattr(&*path, &*wanted.name.0, &wanted.value.0, XattrFlags::empty())?;
            }
        }
        // A symlink's mode is the same for all and cannot be set.
        if !matches!(entry.kind, Kind::Symlink { .. }) {
            fs::chmod(&*path, Mode::from_raw_mode(entry.mode))?;
        }
        self.set_mtime(entry.mtime)
    }

    /// Sets the time of the last change, in nanoseconds since 1970.
    pub(super) fn set_mtime(&self, mtime: i64) -> io::Result<()> {
        let keep = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let mtime = Timespec { tv_sec: mtime.div_euclid(SECOND), tv_nsec: mtime.rem_euclid(SECOND) };
        let times = Timestamps { last_access: keep, last_modification: mtime };
        Ok(fs::utimensat(fs::CWD, self.proc_path(), &times, AtFlags::empty())?)
    }

    /// Whether names in this directory may be made and removed, as far as that can be told beforehand.
    pub(super) fn may_write(&self) -> io::Result<()> {
        Ok(fs::access(self.proc_path(), Access::WRITE_OK | Access::EXEC_OK)?)
    }

    /// Whether `chattr +i` or `+a` keeps root itself from changing it.
    pub(super) fn is_immutable(&self) -> bool {
        fs::statx(&self.fd, "", AtFlags::EMPTY_PATH, StatxFlags::empty()).is_ok_and(|statx| {
            statx.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND)
        })
    }

    /// The file system that it is on.
    pub(super) fn file_system(&self) -> io::Result<StatVfs> {
        Ok(fs::fstatvfs(&self.fd)?)
    }

    /// Makes an empty file in this directory that only root may read, open for writing.
    pub(super) fn make_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Makes a directory in this directory that only root may read.
    pub(super) fn make_dir(&self, name: &OsStr) -> io::Result<()> {
        Ok(fs::mkdirat(&self.fd, name, Mode::RWXU)?)
    }

    /// Makes a symlink in this directory.
    pub(super) fn make_link(&self, name: &OsStr, target: &Path) -> io::Result<()> {
        Ok(fs::symlinkat(target, &self.fd, name)?)
    }

    /// Moves `from` in this directory to `to` in `dir`, over what is there.
    pub(super) fn rename(&self, from: &OsStr, dir: &Self, to: &OsStr) -> io::Result<()> {
        Ok(fs::renameat(&self.fd, from, &dir.fd, to)?)
    }

    /// Swaps `from` in this directory with `to` in `dir`, in one go where the file system can.
    pub(super) fn swap(&self, from: &OsStr, dir: &Self, to: &OsStr) -> io::Result<()> {
        use rustix::io::Errno;
        match fs::renameat_with(&self.fd, from, &dir.fd, to, fs::RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                let mut aside = from.to_owned();
                aside.push(".old");
                dir.rename(to, self, &aside)?;
                self.rename(from, dir, to)?;
                self.rename(&aside, self, from)
            }
            result => Ok(result?),
        }
    }

    /// Removes a name of this directory, with all that is below it if `all`; else a directory must be empty.
    pub(super) fn remove(&self, name: &OsStr, all: bool) -> io::Result<()> {
        let child = self.child(name)?;
        if !child.is_dir() {
            return Ok(fs::unlinkat(&self.fd, name, AtFlags::empty())?);
        }
        if all {
            for below in child.names()? {
                child.remove(&below, true)?;
            }
        }
        Ok(fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR)?)
    }
}

/// In nanoseconds since 1970; times beyond the year 2262 are that year's.
pub(super) fn mtime(stat: &Stat) -> i64 {
    nanoseconds(stat.st_mtime, stat.st_mtime_nsec.try_into().unwrap_or(0))
}

/// Likewise of the last change of anything.
pub(super) fn ctime(stat: &Stat) -> i64 {
    nanoseconds(stat.st_ctime, stat.st_ctime_nsec.try_into().unwrap_or(0))
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(SECOND).saturating_add(rest)
}

/// Reads what may grow between the question for its size and the answer.
fn growing(
    size: impl Fn() -> rustix::io::Result<usize>,
    get: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<Vec<u8>> {
    loop {
        let mut buffer = vec![0; size()?];
        match get(&mut buffer) {
            Err(rustix::io::Errno::RANGE) => {}
            len => {
                buffer.truncate(len?);
                return Ok(buffer);
            }
        }
    }
}

/// Attributes that are gone, or that this process must not see.
fn unreadable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EPERM | libc::EACCES | libc::EOPNOTSUPP))
}

/// Whether a path leads nowhere: a name is missing, or something on the way is not a directory, or a link that is not followed.
pub(super) fn leads_nowhere(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
}

/// The directory `path`, which must be absolute. Links on the way are followed where only root (or who runs this)
/// can have put them: both the link and the directory that it is in are root's.
///
/// `before` is told each name before it is looked up: the directory, the name, and the part of `path` that it
/// stands for; after a link that is the link's own path.
pub(super) fn directory(
    path: &Path,
    before: &mut dyn FnMut(&Pin, &OsStr, &Path) -> io::Result<()>,
) -> io::Result<Pin> {
    let mut at = Pin::root()?;
    let mut todo: VecDeque<(OsString, PathBuf)> = VecDeque::new();
    let mut so_far = PathBuf::from("/");
    for name in names_of(path) {
        so_far.push(&name);
        todo.push_back((name, so_far.clone()));
    }
    let mut links = 0;
    while let Some((name, stands_for)) = todo.pop_front() {
        before(&at, &name, &stands_for)?;
        let next = at.child(&name)?;
        if next.kind() != FileType::Symlink {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS || !(is_roots(&at.stat) && is_roots(&next.stat)) {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = next.target()?;
        if target.is_absolute() {
            at = Pin::root()?;
        }
        for name in names_of(&target).into_iter().rev() {
            todo.push_front((name, stands_for.clone()));
        }
    }
    if at.is_dir() { Ok(at) } else { Err(io::Error::from_raw_os_error(libc::ENOTDIR)) }
}

/// What is at `path`, with the directory that it is in.
pub(super) fn lookup(path: &Path) -> io::Result<(Pin, Pin)> {
    let (parent, name) = split(path)?;
    let dir = directory(parent, &mut |_, _, _| Ok(()))?;
    let pin = dir.child(name)?;
    Ok((dir, pin))
}

/// The directory that `path` is in.
pub(super) fn parent(path: &Path) -> io::Result<Pin> {
    directory(split(path)?.0, &mut |_, _, _| Ok(()))
}

/// A path's directory and name.
pub(super) fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    path.parent().zip(path.file_name()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn names_of(path: &Path) -> Vec<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

fn is_roots(stat: &Stat) -> bool {
    stat.st_uid == 0 || stat.st_uid == nix::unistd::geteuid().as_raw()
}

/// Whether this is one of ftd's own files that are not in place yet.
pub(super) fn is_temporary(name: &OsStr) -> bool {
    starts_with(name, super::TEMPORARY)
}

/// Whether a name, which need not be UTF-8, starts with this.
pub(super) fn starts_with(name: &OsStr, start: &str) -> bool {
    name.as_bytes().starts_with(start.as_bytes())
}
