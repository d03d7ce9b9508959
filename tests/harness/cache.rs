//! Where things that take long to make are kept: outside the tree, shared by all work trees of a user.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};

/// The directory for what setup makes: `$FTD_CACHE`, else `$XDG_CACHE_HOME/ftd`, else `~/.cache/ftd`.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Held while one thing in the cache is being made; others wait. Let go when dropped, and by the kernel
/// when the process ends in any way *and* the commands that it started have ended too: these inherit the
/// lock, because whatever a killed setup was running may still be filling the directory that the next one
/// would begin by removing.
#[derive(Debug)]
#[must_use]
pub struct CacheLock {
    _lock: Flock<File>,
}

impl Cache {
    /// The user's cache; made if it isn't there.
    pub fn open() -> Result<Self> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = set("FTD_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("ftd")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/ftd")))
            .context(
                "no place for the cache: neither FTD_CACHE nor XDG_CACHE_HOME nor HOME is set; set FTD_CACHE",
            )?;
        Self::at(&root)
    }

    /// A cache in a given directory; made if it isn't there.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root)
            .with_context(|| format!("the cache {} cannot be made; set FTD_CACHE", root.display()))?;
        let root =
            root.canonicalize().with_context(|| format!("the cache {} is not there", root.display()))?;
        Ok(Self { root })
    }

    /// The cache's directory, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in the cache.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// Waits until nobody else makes the thing with this name in this cache. Says so on standard error if it
    /// has to wait.
    pub fn lock(&self, name: &str) -> Result<CacheLock> {
        let dir = self.path("locks");
        fs::create_dir_all(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let path = dir.join(name);
        let open = || File::create(&path).with_context(|| format!("{} cannot be opened", path.display()));
        let lock = match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, _)) => {
                eprintln!("setup: waiting for another setup to end with {name} ({})", path.display());
                Flock::lock(file, FlockArg::LockExclusive)
                    .map_err(|(_, errno)| errno)
                    .with_context(|| format!("{} cannot be locked", path.display()))?
            }
        };
        fcntl(&*lock, FcntlArg::F_SETFD(FdFlag::empty())).context("the lock cannot be handed to commands")?;
        Ok(CacheLock { _lock: lock })
    }
}

/// A short number of seconds for people: `0.8 s`, `32 s`.
pub fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(10) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{:.0} s", time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_exclusive_and_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let first = cache.lock("thing").unwrap();
        let other = File::open(cache.path("locks/thing")).unwrap();
        let (other, _) = Flock::lock(other, FlockArg::LockExclusiveNonblock).unwrap_err();
        drop(first);
        Flock::lock(other, FlockArg::LockExclusiveNonblock).unwrap();
    }

    #[test]
    fn seconds_are_short() {
        assert_eq!(seconds(Duration::from_millis(840)), "0.8 s");
        assert_eq!(seconds(Duration::from_millis(32_400)), "32 s");
    }
}
