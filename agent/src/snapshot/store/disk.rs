//! The few deeds by which the store changes what is on disk.
//!
//! All of them go through here, so that a test can stop the store before any one of them (as `kill -9` does), let
//! any one of them fail (as a full disk does), or take back all that was not yet made durable (as a power cut does).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

use super::error::{Error, Result};

/// The disk, as the store writes to it.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) faults: std::sync::Arc<super::tests::faults::Faults>,
}

/// A deed on a path, named for tests and for error texts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Deed<'a> {
    MakeDir(&'a Path),
    Create(&'a Path),
    Append(&'a Path),
    Sync(&'a Path),
    /// From, to.
    #[cfg_attr(not(test), expect(dead_code, reason = "the path before is for tests"))]
    Rename(&'a Path, &'a Path),
    SyncDir(&'a Path),
    Remove(&'a Path),
    RemoveDir(&'a Path),
}

impl<'a> Deed<'a> {
    pub(super) fn path(self) -> &'a Path {
        match self {
            Self::MakeDir(path)
            | Self::Create(path)
            | Self::Append(path)
            | Self::Sync(path)
            | Self::Rename(_, path)
            | Self::SyncDir(path)
            | Self::Remove(path)
            | Self::RemoveDir(path) => path,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::MakeDir(_) | Self::Create(_) => "create",
            Self::Append(_) => "write",
            Self::Sync(_) | Self::SyncDir(_) => "sync",
            Self::Rename(..) => "rename to",
            Self::Remove(_) | Self::RemoveDir(_) => "remove",
        }
    }
}

impl Disk {
    fn run<T>(&self, deed: Deed<'_>, run: impl FnOnce() -> io::Result<T>) -> Result<T> {
        #[cfg(test)]
        let run = || {
            self.faults.before(deed)?;
            let done = run()?;
            self.faults.after(deed);
            Ok(done)
        };
        // Without it the closure is the same in both builds.
        let _ = self;
        run().map_err(Error::io(deed.words(), deed.path()))
    }

    /// Makes a directory if there is none. The caller syncs what it is in, also when there was one: whoever made it
    /// may have died before.
    pub(super) fn make_dir(&self, path: &Path) -> Result<()> {
        if path.is_dir() { Ok(()) } else { self.run(Deed::MakeDir(path), || fs::create_dir_all(path)) }
    }

    /// A new, empty file; one that is there is replaced.
    pub(super) fn create(&self, path: &Path) -> Result<File> {
        self.run(Deed::Create(path), || {
            OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path)
        })
    }

    pub(super) fn append(&self, path: &Path, mut file: &File, bytes: &[u8]) -> Result<()> {
        self.run(Deed::Append(path), || {
            #[cfg(test)]
            if let (half, true) = self.faults.torn(bytes) {
                file.write_all(half)?;
                return Err(io::ErrorKind::StorageFull.into());
            }
            file.write_all(bytes)
        })
    }

    pub(super) fn sync(&self, path: &Path, file: &File) -> Result<()> {
        self.run(Deed::Sync(path), || file.sync_all())
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.run(Deed::Rename(from, to), || fs::rename(from, to))
    }

    pub(super) fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.run(Deed::SyncDir(dir), || File::open(dir)?.sync_all())
    }

    /// Removes a file; that it is not there is as good.
    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        let result = self.run(Deed::Remove(path), || fs::remove_file(path));
        result.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })
    }

    /// Removes a directory if it is empty.
    pub(super) fn remove_dir_if_empty(&self, path: &Path) -> Result<()> {
        let result = self.run(Deed::RemoveDir(path), || match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => result,
        });
        result.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })
    }
}
