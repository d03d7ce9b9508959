//! New packs on their way to the store: steps 1 and 2 of a commit, and of copying what is alive.

use std::{
    mem,
    path::PathBuf,
    thread::{self, JoinHandle},
};

use super::{
    Store,
    disk::Disk,
    error::{Error, Result},
    pack::{Record, Writer},
};

/// The bound of the store, and what it has already.
#[derive(Debug, Clone)]
pub(super) struct Quota {
    /// Of the store.
    dir: PathBuf,
    max: Option<u64>,
    used: u64,
}

impl Quota {
    /// Of the store as it is now.
    pub(super) fn of(store: &Store) -> Result<Self> {
        let max = store.settings().quota;
        // It takes a look at every file: not where there is no bound.
        let used = if max.is_some() { store.used()? } else { 0 };
        Ok(Self { dir: store.dir().to_owned(), max, used })
    }

    /// No bound, for what makes the store smaller in the end.
    pub(super) fn none(store: &Store) -> Self {
        Self { dir: store.dir().to_owned(), max: None, used: 0 }
    }

    /// Whether there may be this many bytes more.
    pub(super) fn check(&self, needed: u64) -> Result<()> {
        match self.max {
            Some(quota) if self.used.saturating_add(needed) > quota => {
                Err(Error::Quota { path: self.dir.clone(), quota, used: self.used, needed })
            }
            _ => Ok(()),
        }
    }
}

/// Packs that are being written. What is not published is removed with it.
#[derive(Debug)]
pub(super) struct Packing {
    disk: Disk,
    new_dir: PathBuf,
    packs_dir: PathBuf,
    pack_bytes: u64,
    quota: Quota,
    writer: Option<Writer>,
    /// Full ones, each being synced while the next is filled.
    finishing: Vec<JoinHandle<Result<PathBuf>>>,
    /// All that were begun and are not in the store yet.
    paths: Vec<PathBuf>,
    /// What all but the one that is being filled take.
    full: u64,
}

impl Packing {
    pub(super) fn new(store: &Store, quota: Quota) -> Self {
        Self {
            disk: store.disk().clone(),
            new_dir: store.new_dir(),
            packs_dir: store.packs_dir(),
            pack_bytes: store.settings().pack_bytes,
            quota,
            writer: None,
            finishing: Vec::new(),
            paths: Vec::new(),
            full: 0,
        }
    }

    pub(super) fn quota(&self) -> Quota {
        self.quota.clone()
    }

    /// What the packs take.
    pub(super) fn bytes(&self) -> u64 {
        self.full + self.writer.as_ref().map_or(0, |writer| writer.len)
    }

    /// Adds a chunk as it is stored, unless that would be too much for the quota.
    pub(super) fn put(&mut self, record: Record, stored: &[u8]) -> Result<()> {
        let begun = if self.writer.is_some() { 0 } else { Writer::EMPTY };
        self.quota.check(self.bytes() + begun + record.cost())?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                let path = self.new_dir.join(self.name());
                self.paths.push(path.clone());
                self.writer.insert(Writer::create(&self.disk, &path)?)
            }
        };
        writer.append(record, stored)?;
        if writer.len >= self.pack_bytes {
            self.full += writer.len;
            let full = self.writer.take();
            self.finishing.extend(full.map(|writer| thread::spawn(|| writer.finish())));
        }
        Ok(())
    }

    /// A name that no pack has had: the time, and in case that the clock was set back, one that is free.
    fn name(&self) -> String {
        let now = jiff::Timestamp::now().as_nanosecond();
        let names = (now..).map(|now| format!("{now:020}.pack"));
        let free = |name: &String| {
            !self.packs_dir.join(name).exists() && !self.paths.contains(&self.new_dir.join(name))
        };
        names.into_iter().find(free).unwrap_or_default()
    }

    /// Makes the packs part of the store, durably; it has them from now on, and so it had any others.
    pub(super) fn publish(mut self) -> Result<Published> {
        let mut packs =
            Published { disk: self.disk.clone(), paths: Vec::new(), bytes: self.bytes(), kept: false };
        for full in mem::take(&mut self.finishing) {
            joined(full)?;
        }
        if let Some(last) = self.writer.take() {
            last.finish()?;
        }
        while let Some(path) = self.paths.last() {
            let to = self.packs_dir.join(path.file_name().unwrap_or_default());
            self.disk.rename(path, &to)?;
            packs.paths.push(to);
            self.paths.pop();
        }
        self.disk.sync_dir(&self.packs_dir)?;
        Ok(packs)
    }
}

/// What a thread has answered.
pub(super) fn joined<T>(thread: JoinHandle<T>) -> T {
    // A panic is a bug; it goes on in the thread that waits.
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl Drop for Packing {
    fn drop(&mut self) {
        for full in self.finishing.drain(..) {
            let _ = full.join();
        }
        // What cannot be removed now is removed by the next writer.
        for path in &self.paths {
            let _ = self.disk.remove(path);
        }
    }
}

/// New packs in the store. As long as no manifest needs them, they are removed with this.
#[derive(Debug)]
#[must_use]
pub(super) struct Published {
    disk: Disk,
    paths: Vec<PathBuf>,
    bytes: u64,
    kept: bool,
}

impl Published {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if !self.kept {
            for path in &self.paths {
                let _ = self.disk.remove(path);
            }
        }
    }
}
