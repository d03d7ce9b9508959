//! The store: generations of workloads on disk, each whole or not there.
//!
//! ```text
//! v1/packs/….pack                          chunks, each under the hash of its content   `pack`
//! v1/generations/WORKLOAD/NUMBER.manifest  which chunks a generation consists of        `manifest`
//! v1/generations/WORKLOAD/NUMBER.good      empty: that generation has proved healthy
//! v1/new/…                                 what is being written; rubbish when nobody writes
//! v1/incoming/…                            packs of what arrives from another store             `parcel`
//! v1/writer.lock  v1/catalogue.lock        locked (flock), never read
//! ```
//!
//! Content is cut into chunks (`cut`) that are named by their hash. A chunk that the store has is neither
//! stored nor compressed again, whichever generation of whichever workload it came with.
//!
//! # Why it is safe
//!
//! A generation is there when its manifest has its name, and a rename is the one step that gives it. All that a
//! manifest needs is durable *before* that step, and nothing that any manifest needs is ever changed or removed:
//!
//! 1. New chunks are written to packs in `new/`; each pack is synced.
//! 2. The packs are renamed to `packs/`, and that directory is synced. (Also when there is no new pack: the chunks
//!    that are used again may be in a pack whose writer died between the two.)
//! 3. The manifest is written to `new/` and synced, renamed to its name, and its directory is synced.
//!
//! - *A crash* before the rename of 3 leaves files in `new/`, and perhaps packs that no manifest names: rubbish
//!   that the next writer and [`gc`](Store::gc) remove. After it, the generation is there. There is no between,
//!   no log to replay, and nothing to repair: an old file is never opened for writing.
//! - *A full disk or a quota* stops 1, 2 or 3 in the same way, and what was written is removed at once.
//! - *A generation is good* when its marker is there. The marker is empty: there is nothing in it to be
//!   damaged, and making a file is atomic. It is made after the manifest and removed after it, and numbers do not
//!   come back, for the newest generation is never swept: a marker cannot be taken for another generation's.
//! - *Removing* goes the other way round: first manifests ([`retain`](Store::retain)); their
//!   directories are synced; then packs of which no manifest names a chunk. A pack that is mostly dead is copied, the
//!   living chunks only, by steps 1 and 2, before it is removed.
//! - *A flipped bit* in a chunk is seen by its checksum and its hash, on every read; in a manifest by its
//!   hash; in a pack's index likewise, and then the index is made anew from the heads of the chunks. So it costs what
//!   it is in, and no more. A chunk that was once found damaged is stored again when it next comes along, and that
//!   heals the older generations too.
//! - *A damaged manifest* names no chunk that could be known. It is left where it is until all generations of its
//!   age are gone, the last good generation is then the newest good one that can be read, and chunks that it alone
//!   named are rubbish.
//! - *A newer format* of the store is another directory (`v2`), so that no damage can look like it.
//!
//! One writer at a time, of all processes: it holds `writer.lock` from its first to its last step, and so does gc, so
//! that gc never runs between a draft's finding a chunk and its manifest. `catalogue.lock` is held for
//! moments by who changes the set of manifests and markers, so that a generation can be marked while another is taken.
//!
//! Readers take no lock. A reader has the manifest in memory and every pack open before it gives out the first byte
//! ([`Snapshot`]); what is removed after that is still there for it. If a pack was removed between the two, it
//! looks again: either gc has copied the chunks, and they are in a new pack, or the manifest is gone too.

mod cut;
mod disk;
mod draft;
mod error;
mod extract;
#[doc(hidden)]
pub mod fuzz;
mod index;
mod manifest;
mod notice;
mod pack;
mod packing;
mod parcel;
mod print;
mod read;
mod sweep;
mod transfer;
mod verify;

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

pub use self::{
    cut::Run,
    draft::Draft,
    error::{Error, Result},
    manifest::{About, Entry, Kind, Manifest, Metadata, Stats},
    parcel::{Chunks, Finish, Parcel, ParcelReader, Receive, Reception},
    read::{EntryReader, Snapshot},
    sweep::{Freed, Retention},
    verify::{Damage, Verified},
};
use self::{
    disk::Disk,
    index::Index,
    manifest::FORMAT,
    packing::Packing,
    print::{Known, Printer},
};

/// How a store works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes that the store may take on disk; no bound if `None`.
    pub quota: Option<u64>,
    /// Size of the chunks of memory images: a power of two from 16 KiB to 256 KiB. Smaller ones find more that is
    /// unchanged: with one page in a hundred changed here and there, a generation stored 0.8, 1.6, 3.1, 5.9 and 9.9 %
    /// of the image's size at 16, 32, 64, 128 and 256 KiB. Larger ones need less room in manifests.
    pub image_chunk: u32,
    /// Average size of the chunks of files, from 4 KiB to 256 KiB; single ones are a quarter of it to four times as large.
    pub file_chunk: u32,
    /// Level of zstd, from 1 to 19.
    pub level: i32,
    /// Threads that hash and compress; as many as the machine has cores if 0.
    pub threads: usize,
    /// When a pack has this many bytes, another one is begun.
    pub pack_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            quota: None,
            image_chunk: 32 << 10,
            file_chunk: 32 << 10,
            level: 1,
            threads: 0,
            pack_bytes: 64 << 20,
        }
    }
}

impl Settings {
    fn check(&self) -> Result<()> {
        let refused = |setting, value: &dyn ToString, allowed| {
            Err(Error::Setting { setting, value: value.to_string(), allowed })
        };
        if !self.image_chunk.is_power_of_two() || !(16 << 10..=256 << 10).contains(&self.image_chunk) {
            return refused("image_chunk", &self.image_chunk, "a power of two from 16 KiB to 256 KiB");
        }
        if !(4 << 10..=256 << 10).contains(&self.file_chunk) {
            return refused("file_chunk", &self.file_chunk, "4 KiB to 256 KiB");
        }
        if !(1..=19).contains(&self.level) {
            return refused("level", &self.level, "1 to 19");
        }
        if !(1 << 10..=4 << 30).contains(&self.pack_bytes) {
            return refused("pack_bytes", &self.pack_bytes, "1 KiB to 4 GiB");
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        }
    }
}

/// What a generation is, without its entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Its number: higher than that of all generations of this workload before it.
    pub number: u64,
    /// Of what, when, where.
    pub about: About,
    /// The number that it had where it was taken, when it has come from another store.
    pub origin: Option<u64>,
    /// What it cost to take it.
    pub stats: Stats,
    /// It has proved healthy.
    pub good: bool,
}

/// A store of snapshots. Cheap to clone; all clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    settings: Settings,
    disk: Disk,
    /// The packs as they were when they were last looked at.
    index: Mutex<Arc<Index>>,
    /// Chunks of which a damaged copy was seen: these are stored again when they come along.
    distrusted: Mutex<HashSet<manifest::Id>>,
    printer: Arc<Printer>,
    /// Of each workload: the chunks of the images of the newest generation that was taken here.
    known: Mutex<HashMap<String, Arc<Known>>>,
}

/// As long as this lives, nobody else writes.
type Lock = Flock<File>;

impl Store {
    /// The store in `dir`, which is made if there is none.
    pub fn open(dir: &Path, settings: Settings) -> Result<Self> {
        Self::open_on(dir, settings, Disk::default())
    }

    fn open_on(dir: &Path, settings: Settings, disk: Disk) -> Result<Self> {
        settings.check()?;
        let version = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix('v')?.parse().ok();
        if let Some(found) =
            index::list(dir)?.iter().filter_map(version).max().filter(|found| *found > FORMAT)
        {
            return Err(Error::Newer { path: dir.to_owned(), found, known: FORMAT });
        }
        let inner = Inner {
            dir: dir.join(format!("v{FORMAT}")),
            settings,
            disk,
            index: Mutex::default(),
            distrusted: Mutex::default(),
            printer: Arc::new(Printer::new()),
            known: Mutex::default(),
        };
        let store = Self { inner: Arc::new(inner) };
        for dir in [store.dir().to_owned(), store.new_dir(), store.packs_dir(), store.generations_dir()] {
            store.disk().make_dir(&dir)?;
        }
        for dir in [store.dir(), dir] {
            store.disk().sync_dir(dir)?;
        }
        Ok(store)
    }

    /// Begins a generation. Nobody else can write until the draft is committed or dropped.
    pub fn begin(&self, about: About) -> Result<Draft> {
        if let Some(cause) = manifest::name_flaw(&about.workload) {
            return Err(Error::Name { name: about.workload, cause });
        }
        let lock = self.lock_writer()?;
        Draft::begin(self.clone(), lock, about)
    }

    /// The workloads that have generations, sorted.
    pub fn workloads(&self) -> Result<Vec<String>> {
        let dirs = index::list(&self.generations_dir())?;
        Ok(dirs.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    /// The generations of a workload that can be read, oldest first. [`Store::verify`] names the others.
    pub fn generations(&self, workload: &str) -> Result<Vec<Generation>> {
        let all = self.manifests(workload)?.into_iter().filter_map(|(number, manifest)| match manifest {
            Ok(manifest) => Some(self.generation(&manifest)),
            Err(error) => {
                tracing::warn!(workload, number, %error, "a generation cannot be read");
                None
            }
        });
        Ok(all.collect())
    }

    /// A generation's manifest.
    pub fn manifest(&self, workload: &str, number: u64) -> Result<Manifest> {
        let path = self.manifest_path(workload, number);
        let no_generation = || Error::NoGeneration { workload: workload.to_owned(), number };
        if manifest::name_flaw(workload).is_some() {
            return Err(no_generation());
        }
        let bytes = fs::read(&path)
            .map_err(Error::io("read", &path))
            .map_err(|error| if error.is_gone() { no_generation() } else { error })?;
        let manifest = Manifest::decode(&bytes, &path)?;
        // Somebody has moved it, or the directory's block is another one's.
        if manifest.about.workload != workload || manifest.number != number {
            return Err(Error::damaged(&path, "it is that of another generation"));
        }
        Ok(manifest)
    }

    /// Opens a generation for reading. It can be read from then on as long as the answer lives.
    pub fn snapshot(&self, workload: &str, number: u64) -> Result<Snapshot> {
        Snapshot::open(self.clone(), workload, number)
    }

    /// Says that a generation has proved healthy. This is durable when it returns.
    pub fn mark_good(&self, workload: &str, number: u64) -> Result<()> {
        let _lock = self.lock_catalogue()?;
        self.manifest(workload, number)?;
        let path = self.good_path(workload, number);
        self.disk().create(&path)?;
        self.disk().sync_dir(&self.workload_dir(workload))
    }

    /// The newest good generation of a workload that can be read.
    pub fn last_good(&self, workload: &str) -> Result<Option<Generation>> {
        Ok(self.generations(workload)?.into_iter().rfind(|generation| generation.good))
    }

    /// The newest good generation of a kind, likewise.
    pub fn last_good_of(&self, workload: &str, kind: Kind) -> Result<Option<Generation>> {
        let of_kind = |generation: &Generation| generation.good && generation.about.kind == kind;
        Ok(self.generations(workload)?.into_iter().rfind(of_kind))
    }

    /// Bytes that the store takes on disk.
    pub fn used(&self) -> Result<u64> {
        let mut dirs = vec![self.new_dir(), self.packs_dir()];
        dirs.extend(index::list(&self.generations_dir())?);
        let mut bytes = 0;
        for dir in dirs {
            // What vanishes meanwhile takes nothing.
            bytes += index::list(&dir)?
                .iter()
                .filter_map(|path| fs::metadata(path).ok())
                .map(|meta| meta.len())
                .sum::<u64>();
        }
        Ok(bytes)
    }

    // What the parts of the store share.

    fn generation(&self, manifest: &Manifest) -> Generation {
        Generation {
            number: manifest.number,
            about: manifest.about.clone(),
            origin: manifest.origin,
            stats: manifest.stats,
            good: self.good_path(&manifest.about.workload, manifest.number).exists(),
        }
    }

    /// All manifests of a workload by their numbers, oldest first, also those that cannot be decoded. Those of a
    /// newer format and those that the disk does not give are an error: one must not act as if they were not there.
    fn manifests(&self, workload: &str) -> Result<Vec<(u64, Result<Manifest>)>> {
        let mut all = Vec::new();
        for path in index::files(&self.workload_dir(workload), "manifest")? {
            let Some(number) = number_of(&path) else { continue };
            match self.manifest(workload, number) {
                // Removed since it was listed.
                Err(Error::NoGeneration { .. }) => {}
                Err(error) if !matches!(error, Error::Damaged { .. }) => return Err(error),
                manifest => all.push((number, manifest)),
            }
        }
        Ok(all)
    }

    /// Makes a generation of what is in the packs; the last three steps of the essay above. The caller holds the
    /// writer's lock.
    fn publish(&self, packing: Packing, mut manifest: Manifest) -> Result<Generation> {
        let quota = packing.quota();
        let packs = packing.publish()?;
        let _lock = self.lock_catalogue()?;
        let dir = self.workload_dir(&manifest.about.workload);
        let newest = index::list(&dir)?.iter().filter_map(|path| number_of(path)).max();
        manifest.number = newest.map_or(1, |newest| newest + 1).max(manifest.origin.unwrap_or(0));
        let bytes = manifest.encode()?;
        quota.check(packs.bytes() + bytes.len() as u64)?;
        let path = self.manifest_path(&manifest.about.workload, manifest.number);
        let new = self.new_dir().join("manifest");
        let written = || -> Result<()> {
            let file = self.disk().create(&new)?;
            self.disk().append(&new, &file, &bytes)?;
            self.disk().sync(&new, &file)?;
            self.disk().make_dir(&dir)?;
            self.disk().rename(&new, &path)
        };
        if let Err(error) = written() {
            let _ = self.disk().remove(&new);
            let _ = self.disk().remove_dir_if_empty(&dir);
            return Err(error);
        }
        // Whatever happens now: there is a manifest that needs them.
        packs.keep();
        self.disk().sync_dir(&dir)?;
        self.disk().sync_dir(&self.generations_dir())?;
        self.refresh()?;
        Ok(self.generation(&manifest))
    }

    /// The packs as they are now.
    fn refresh(&self) -> Result<Arc<Index>> {
        let mut index = locked(&self.inner.index);
        if let Some(new) = Index::load(&self.packs_dir(), &index)? {
            *index = Arc::new(new);
        }
        Ok(Arc::clone(&index))
    }

    /// The packs as they were when they were last looked at.
    fn index(&self) -> Arc<Index> {
        Arc::clone(&locked(&self.inner.index))
    }

    fn distrusted(&self) -> MutexGuard<'_, HashSet<manifest::Id>> {
        locked(&self.inner.distrusted)
    }

    /// Makes this the only writer, and removes what another has left unfinished.
    fn lock_writer(&self) -> Result<Lock> {
        let path = self.dir().join("writer.lock");
        let lock =
            Flock::lock(lock_file(&path)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
                if errno == Errno::EWOULDBLOCK {
                    Error::Busy { path: self.dir().to_owned() }
                } else {
                    Error::io("lock", &path)(errno.into())
                }
            })?;
        for left in index::list(&self.new_dir())? {
            self.disk().remove(&left)?;
        }
        Ok(lock)
    }

    fn lock_catalogue(&self) -> Result<Lock> {
        let path = self.dir().join("catalogue.lock");
        Flock::lock(lock_file(&path)?, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::io("lock", &path)(errno.into()))
    }

    fn disk(&self) -> &Disk {
        &self.inner.disk
    }

    fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    fn dir(&self) -> &Path {
        &self.inner.dir
    }

    fn new_dir(&self) -> PathBuf {
        self.dir().join("new")
    }

    fn packs_dir(&self) -> PathBuf {
        self.dir().join("packs")
    }

    fn generations_dir(&self) -> PathBuf {
        self.dir().join("generations")
    }

    fn workload_dir(&self, workload: &str) -> PathBuf {
        self.generations_dir().join(workload)
    }

    fn manifest_path(&self, workload: &str, number: u64) -> PathBuf {
        self.workload_dir(workload).join(format!("{number:020}.manifest"))
    }

    fn good_path(&self, workload: &str, number: u64) -> PathBuf {
        self.workload_dir(workload).join(format!("{number:020}.good"))
    }
}

/// The generation that a manifest or a marker is of.
fn number_of(path: &Path) -> Option<u64> {
    path.file_stem()?.to_str()?.parse().ok()
}

fn lock_file(path: &Path) -> Result<File> {
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    open.map_err(Error::io("open", path))
}

/// A thread that panicked has left nothing half done under these locks: each change is one assignment or insertion.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
