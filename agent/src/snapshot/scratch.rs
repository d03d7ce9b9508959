//! Where images are on their way between CRIU and the store.
//!
//! CRIU writes them while the service stands still, and the store takes its time: so they go to a directory in
//! between, in memory (a tmpfs below /run) where there is room, on disk where there is not.
//!
//! A directory belongs to its maker as long as that one lives: the kernel holds a lock on it (flock) for him. What is
//! left of a maker that was killed is removed by the next who comes by ([`Places::sweep`]).

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statvfs::statvfs,
    unistd::{Pid, getpid},
};

use crate::config::{self, Config};

/// Beside what was reckoned: the small images.
const MARGIN: u64 = 16 << 20;

/// Why there is no room for images; nothing was touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScratchError {
    /// Neither place has room.
    #[error(
        "no room for the images, {} bytes: {}. Make room below {}, or set snapshot.scratch", .need,
        .places.join("; "), .disk.display()
    )]
    NoRoom {
        /// Bytes.
        need: u64,
        /// What each place has.
        places: Vec<String>,
        /// The place on disk.
        disk: PathBuf,
    },
    /// The directory cannot be made.
    #[error("no directory for the images can be made in {}: {cause}", .dir.display())]
    Make {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// The places where images may be for a while.
#[derive(Debug, Clone)]
pub struct Places {
    /// On a tmpfs.
    memory: PathBuf,
    /// On disk.
    disk: PathBuf,
    choice: config::Scratch,
}

impl Places {
    /// Those of the daemon, whose sandbox opens /run/ftd.
    pub fn of_daemon(config: &Config) -> Self {
        Self::new(config, "/run/ftd/scratch")
    }

    /// Those of commands: /run/ftd goes away with the daemon.
    pub fn by_hand(config: &Config) -> Self {
        Self::new(config, "/run/ftd-scratch")
    }

    fn new(config: &Config, memory: &str) -> Self {
        let disk = config.node.state_dir.join("scratch");
        Self { memory: memory.into(), disk, choice: config.snapshot.scratch }
    }

    /// A directory with room for `need` bytes of images and, where processes are made of them in the end, as much
    /// memory for these.
    pub fn make(&self, need: u64) -> Result<Scratch, ScratchError> {
        let need = need.saturating_add(MARGIN);
        let mut places = Vec::new();
        if self.choice != config::Scratch::Disk {
            match room_in_memory(&self.memory) {
                Ok(room) if need <= room => match Scratch::make(&self.memory) {
                    Ok(scratch) => return Ok(scratch),
                    Err(error) => places.push(error.to_string()),
                },
                Ok(room) => places.push(format!("{} has {room} bytes to spare", self.memory.display())),
                Err(error) => places.push(format!("{}: {error}", self.memory.display())),
            }
        }
        if self.choice != config::Scratch::Memory {
            match room(&self.disk) {
                Ok(room) if need <= room => return Scratch::make(&self.disk),
                Ok(room) => places.push(format!("{} has {room} bytes to spare", self.disk.display())),
                Err(error) => places.push(format!("{}: {error}", self.disk.display())),
            }
        }
        Err(ScratchError::NoRoom { need, places, disk: self.disk.clone() })
    }

    /// Whether [`Self::make`] finds room now.
    pub fn room_for(&self, need: u64) -> Result<(), ScratchError> {
        self.make(need).map(drop)
    }

    /// Removes what makers that are dead have left; says how many directories.
    pub fn sweep(&self) -> usize {
        let dirs = [&self.memory, &self.disk].into_iter().filter_map(|dir| fs::read_dir(dir).ok());
        dirs.flatten().flatten().filter(|entry| sweep_one(&entry.path())).count()
    }
}

fn sweep_one(dir: &Path) -> bool {
    let Ok(Ok(_ours)) = File::open(dir).map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock)) else {
        return false;
    };
    let removed = fs::remove_dir_all(dir);
    if let Err(error) = &removed {
        tracing::warn!(dir = %dir.display(), %error, "images that were left over cannot be removed");
    }
    removed.is_ok()
}

/// Bytes that may go to the tmpfs: as many as fit, and no more than half of the memory that can be had, for at a
/// restore the processes will need as much again.
fn room_in_memory(dir: &Path) -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = available.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(room(dir)?.min(kilobytes.unwrap_or(0) * 1024 / 2))
}

/// Free bytes where `dir` is or will be.
fn room(dir: &Path) -> io::Result<u64> {
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let free = statvfs(there)?;
    Ok(free.blocks_available() * free.fragment_size())
}

/// What images of these processes will take, about: their memory that is no file's, from proc_pid_status(5).
pub fn memory_of(pids: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let fields = ["RssAnon:", "RssShmem:", "VmSwap:"];
        let value = |line: &str| {
            let text = fields.iter().find_map(|field| line.strip_prefix(field))?;
            text.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        };
        status.lines().filter_map(value).sum::<u64>() * 1024
    };
    pids.iter().map(of).sum()
}

/// A directory for images, which goes with this.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Scratch {
    fn make(base: &Path) -> Result<Self, ScratchError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let failed = |cause| ScratchError::Make { dir: base.into(), cause };
        // Root's alone: images are memory.
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700).create(base).map_err(failed)?;
        private.recursive(false);
        loop {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let dir = base.join(format!("{}-{number}", Pid::as_raw(getpid())));
            match private.create(&dir) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed(error)),
            }
            // Between the two a sweep may come by, and take it for left over.
            let Ok(file) = File::open(&dir) else { continue };
            let inode = file.metadata().map_err(failed)?.ino();
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            if fs::metadata(&dir).is_ok_and(|meta| meta.ino() == inode) {
                return Ok(Self { dir, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "images cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(dir: &Path, choice: config::Scratch) -> Places {
        Places { memory: dir.join("memory"), disk: dir.join("disk"), choice }
    }

    #[test]
    fn a_directory_goes_with_its_owner_and_a_sweep_takes_only_what_nobody_has() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path(), config::Scratch::Auto);
        let (first, second) = (places.make(1).unwrap(), places.make(1).unwrap());
        assert_ne!(first.path(), second.path());
        fs::write(first.path().join("pages-1.img"), "x").unwrap();
        let left = dir.path().join("disk/77-0");
        fs::create_dir_all(left.join("0")).unwrap();
        assert_eq!(places.sweep(), 1);
        assert!(!left.exists() && first.path().join("pages-1.img").exists());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists() && second.path().exists());
        assert_eq!(places.sweep(), 0);
    }

    #[test]
    fn images_go_where_they_are_told_to_and_what_fits_nowhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |choice| places(dir.path(), choice).make(1).unwrap().path().parent().unwrap().to_owned();
        assert_eq!(at(config::Scratch::Disk), dir.path().join("disk"));
        assert_eq!(at(config::Scratch::Memory), dir.path().join("memory"));
        let error = places(dir.path(), config::Scratch::Auto).make(u64::MAX).unwrap_err().to_string();
        assert!(error.contains("memory has") && error.contains("disk has"), "{error}");
    }

    #[test]
    fn memory_of_this_process_is_known() {
        let ballast = vec![7_u8; 8 << 20];
        let found = memory_of(&[std::process::id()]);
        assert!(found >= ballast.len() as u64, "{found}");
        assert_eq!(memory_of(&[u32::MAX]), 0);
    }
}
