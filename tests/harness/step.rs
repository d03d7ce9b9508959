//! One thing that setup makes, made once, whole or not at all.
//!
//! A step with an output owns one directory of the cache. It is filled under another name beside it
//! (`NAME.new`), gets a file `stamp` with the step's key as its last file, and only then takes its
//! place by one rename: a directory with a stamp is therefore complete, and one without never existed.
//! Whatever an interrupted run left under the other name is thrown away by the next. The key is a text
//! of everything that the outcome depends on (versions, package lists); when it differs from the stamp,
//! the step is made again.
//!
//! A step without an output changes the machine itself (packages), and asks the machine whether it is done.
//!
//! A lock of the step's own is taken only when there is something to do, and then it is asked again: two
//! setups at once make each thing once.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::cache::{Cache, seconds};
use crate::command::Log;
use crate::mounts;

/// One unit of setup. See the module's text.
pub trait Step {
    /// A short name for progress lines and the log's file name.
    fn name(&self) -> &str;

    /// The directory of the cache that it fills, or `None` if it changes the machine.
    fn output(&self) -> Option<&str>;

    /// Everything that the outcome depends on.
    fn key(&self, cache: &Cache) -> Result<String>;

    /// Whether nothing is to be done.
    fn done(&self, cache: &Cache) -> Result<bool> {
        match self.output() {
            Some(output) => Ok(stamp(&cache.path(output)).as_deref() == Some(self.key(cache)?.trim())),
            None => Ok(false),
        }
    }

    /// Does it.
    fn make(&self, site: &Site<'_>) -> Result<()>;
}

/// What a step has to work with.
#[derive(Debug)]
pub struct Site<'a> {
    /// The cache, with the outputs of the steps before.
    pub cache: &'a Cache,
    /// The new, empty directory to fill (for a step without an output: a scratch directory).
    pub dir: &'a Path,
    /// Where commands' output goes.
    pub log: &'a Log,
}

/// How long it took, if there was anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was there.
    There,
    /// It has been made, in so much time.
    Made(Duration),
}

/// The key that a finished output was made with; `None` if it is not there or not finished.
pub fn stamp(output: &Path) -> Option<String> {
    fs::read_to_string(output.join("stamp")).ok().map(|text| text.trim().to_owned())
}

/// Makes sure that a step's outcome is there, with one progress line on standard error if it wasn't.
pub fn ensure(cache: &Cache, step: &dyn Step) -> Result<Outcome> {
    let name = step.name();
    let asking = || format!("setup: {name}: it cannot be told whether it is done");
    if step.done(cache).with_context(asking)? {
        return Ok(Outcome::There);
    }
    let _lock = cache.lock(name)?;
    if step.done(cache).with_context(asking)? {
        return Ok(Outcome::There);
    }
    eprint!("setup: {name} ... ");
    let _ = std::io::stderr().flush();
    let start = Instant::now();
    match make(cache, step) {
        Ok(()) => {
            eprintln!("{}", seconds(start.elapsed()));
            Ok(Outcome::Made(start.elapsed()))
        }
        Err(error) => {
            eprintln!("failed");
            Err(error.context(format!(
                "setup: {name} failed; mend the cause and run it again: what is done stays done"
            )))
        }
    }
}

fn make(cache: &Cache, step: &dyn Step) -> Result<()> {
    let logs = cache.path("log");
    fs::create_dir_all(&logs).with_context(|| format!("{} cannot be made", logs.display()))?;
    let log = Log::create(&logs.join(format!("{}.log", step.name())))?;
    let new = cache.path(format!("{}.new", step.output().unwrap_or(step.name())));
    mounts::remove_tree(&new)?;
    fs::create_dir(&new).with_context(|| format!("{} cannot be made", new.display()))?;
    step.make(&Site { cache, dir: &new, log: &log })?;
    match step.output() {
        None => mounts::remove_tree(&new),
        Some(output) => {
            // Asked only now: what the step has just installed may be part of the key.
            let key = step.key(cache)?;
            fs::write(new.join("stamp"), format!("{}\n", key.trim()))?;
            commit(&new, &cache.path(output))
        }
    }
}

/// Puts a finished directory in its place. An older one is moved aside first and removed after.
///
/// The data need not be on disk yet: after a power cut the worst case is a stamp without its data, and
/// the person deletes the cache, as one does with a cache.
fn commit(new: &Path, place: &Path) -> Result<()> {
    let old = place.with_extension("old");
    mounts::remove_tree(&old)?;
    if place.exists() {
        fs::rename(place, &old).with_context(|| format!("{} cannot be moved aside", place.display()))?;
    }
    fs::rename(new, place).with_context(|| format!("{} cannot be put in its place", place.display()))?;
    mounts::remove_tree(&old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Counting {
        key: String,
        fails: bool,
        made: Cell<u32>,
    }

    impl Step for Counting {
        fn name(&self) -> &'static str {
            "counting"
        }
        fn output(&self) -> Option<&str> {
            Some("counted")
        }
        fn key(&self, _: &Cache) -> Result<String> {
            Ok(self.key.clone())
        }
        fn make(&self, site: &Site<'_>) -> Result<()> {
            self.made.set(self.made.get() + 1);
            assert!(fs::read_dir(site.dir)?.next().is_none(), "nothing of an earlier run is left");
            fs::write(site.dir.join("half"), "1")?;
            anyhow::ensure!(!self.fails, "interrupted");
            fs::write(site.dir.join("whole"), &self.key)?;
            Ok(())
        }
    }

    fn step(key: &str) -> Counting {
        Counting { key: key.to_owned(), fails: false, made: Cell::new(0) }
    }

    #[test]
    fn it_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        let one = step("1");
        assert!(matches!(ensure(&cache, &one).unwrap(), Outcome::Made(_)));
        assert_eq!(ensure(&cache, &one).unwrap(), Outcome::There);
        assert_eq!(one.made.get(), 1);
        assert_eq!(stamp(&cache.path("counted")).as_deref(), Some("1"));
    }

    #[test]
    fn an_interrupted_step_is_made_again_and_the_old_outcome_stays_until_then() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        ensure(&cache, &step("1")).unwrap();
        let broken = Counting { fails: true, ..step("2") };
        let error = format!("{:#}", ensure(&cache, &broken).unwrap_err());
        assert!(error.contains("counting") && error.contains("interrupted"), "{error}");
        assert_eq!(fs::read_to_string(cache.path("counted/whole")).unwrap(), "1", "the old one is untouched");
        let mended = step("2");
        assert!(matches!(ensure(&cache, &mended).unwrap(), Outcome::Made(_)));
        assert_eq!(fs::read_to_string(cache.path("counted/whole")).unwrap(), "2");
        assert!(!cache.path("counted.new").exists() && !cache.path("counted.old").exists());
    }

    #[test]
    fn a_directory_without_a_stamp_is_not_taken_for_done() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).unwrap();
        fs::create_dir(cache.path("counted")).unwrap();
        fs::create_dir(cache.path("counted.new")).unwrap();
        fs::write(cache.path("counted.new/rubbish"), "of a killed run").unwrap();
        assert!(matches!(ensure(&cache, &step("1")).unwrap(), Outcome::Made(_)));
        assert!(!cache.path("counted/rubbish").exists());
    }
}
