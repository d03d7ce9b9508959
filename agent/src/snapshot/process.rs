//! A workload with its running processes as a generation in the store, and back.
//!
//! A generation of kind [`Kind::Process`] holds what a generation of files holds, if the workload has files, and for
//! each of its units, in their order, the directory that [`criu::unit`](super::criu::unit) makes of it: CRIU's images
//! and what else the unit has of its own. The entry `processes` lists them.
//!
//! ```text
//! freeze ─► CRIU writes images to a scratch directory ─► thaw ─► the store takes them: only what it does not have
//! ```
//!
//! The service stands still only for the first half, and the store can take its time. Memory is cut by its address
//! (CRIU's pagemaps tell it), so that a page that has not changed is not stored again, wherever in the image it has
//! moved. Units of a workload are frozen one after another, each for its own time; what one has told another between
//! the two moments may be in one image and not in the other, as it is after any crash.
//!
//! **Stopping** is another matter: what is not in the store when a process ends is lost. So all units are kept
//! standing still until the generation is there, durable, and only then they end
//! ([`dump_and_stop`](super::criu::unit::dump_and_stop)).
//!
//! **Back**: everything is read out of the store, and its hashes checked, before anything is touched.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use super::{
    criu::{
        After, Criu, CriuError, images,
        unit::{self, DumpUnit, UnitError, UnitImage},
    },
    files::{Captured, Selection},
    generation,
    scratch::{self, Places, Scratch, ScratchError},
    store::{self, About, Generation, Kind, Manifest, Metadata, Run, Snapshot, Store},
};
use crate::unit::{cgroup, manager::Systemd};

/// The entry that lists the units.
const LIST: &str = "processes";
/// Metadata of the entries.
const KIND_LIST: &str = "processes";
const KIND_IMAGE: &str = "image";
const KIND_MEMORY: &str = "memory";
/// The form of [`List`].
const VERSION: u32 = 1;

/// Why processes were not taken, or could not be had back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// A unit.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// CRIU.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// The files, or the store.
    #[error(transparent)]
    Generation(#[from] generation::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// No room.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// An image cannot be read or written.
    #[error("{what}: {cause}")]
    Image {
        /// What was being done.
        what: String,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The generation has no processes.
    #[error(
        "snapshot {number} of {workload} holds files alone. Choose one of the kind process, see: ftctl snapshot list"
    )]
    FilesAlone {
        /// The workload.
        workload: String,
        /// The generation.
        number: u64,
    },
    /// The list is damaged, or of a newer ftd.
    #[error(
        "snapshot {number} of {workload}: its list of processes makes no sense: {cause}. Choose another snapshot"
    )]
    List {
        /// The workload.
        workload: String,
        /// The generation.
        number: u64,
        /// What is wrong.
        cause: String,
    },
}

fn image_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ProcessError {
    let what = what.into();
    move |cause| ProcessError::Image { what, cause }
}

/// The list, as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct List {
    version: u32,
    /// In the order in which they start.
    units: Vec<ListedUnit>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ListedUnit {
    unit: String,
    /// The names of its files.
    files: Vec<String>,
}

/// What every form of the list has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Metadata of the list: what can be told of a generation without reading it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// How long its units stood still, all together, microseconds. 0 where they were stopped by it.
    pub frozen_us: u64,
}

fn entry_name(unit: usize, file: &str) -> String {
    format!("unit/{unit}/{file}")
}

/// What is to be taken.
#[derive(Debug, Clone)]
pub struct Take {
    /// What the generation is of; its kind is [`Kind::Process`].
    pub about: About,
    /// The workload's files, if it has any.
    pub files: Option<Selection>,
    /// systemd's names of its units, in the order in which they start.
    pub units: Vec<String>,
    /// Stop them by it.
    pub stop: bool,
    /// Time for CRIU, for each unit.
    pub limit: Duration,
}

/// What was taken.
#[derive(Debug)]
pub struct Taken {
    /// The generation.
    pub generation: Generation,
    /// Its files.
    pub captured: Option<Captured>,
    /// How long its units stood still, all together, microseconds. 0 where they were stopped by it.
    pub frozen_us: u64,
    /// From the beginning to the end.
    pub took: Duration,
    /// The packet filters that keep the connections of stopped units silent; a restore from this generation removes
    /// them, and nothing else does.
    pub network_locks: Vec<String>,
}

/// How far it is: bytes done, of so many.
pub type Progress = Box<dyn FnMut(u64, u64) + Send>;

/// Takes a workload with its processes: a generation that is there, durable, when this returns.
pub async fn take(
    systemd: &Systemd,
    store: &Store,
    places: &Places,
    take: Take,
    progress: Progress,
) -> Result<Taken, ProcessError> {
    let begun = Instant::now();
    let criu = Criu::find()?;
    let scratch = places.make(need(systemd, &take.units).await?)?;
    let mut dirs = Vec::new();
    for (number, unit) in take.units.iter().enumerate() {
        let dir = scratch.path().join(number.to_string());
        fs::create_dir(&dir).map_err(image_error(format!("{} cannot be made", dir.display())))?;
        dirs.push((unit.clone(), dir));
    }
    let stop = take.stop;
    let stored = if stop {
        let limit = take.limit;
        let feed = feed(store.clone(), take, dirs.clone(), Cost::default(), progress);
        let mut stored = None;
        let taking = async {
            let done = feed.await;
            let yes = done.is_ok();
            stored = Some(done);
            yes
        };
        let stopped = unit::dump_and_stop(systemd, &criu, &dirs, limit, taking).await;
        match (stored, stopped) {
            // That is why they were not stopped.
            (Some(Err(error)), _) => return Err(error),
            (Some(Ok(stored)), Ok(_)) => (stored, 0),
            (_, Err(error)) => return Err(error.into()),
            (None, Ok(_)) => return Err(UnitError::NotTaken { units: take_names(&dirs) }.into()),
        }
    } else {
        let mut frozen_us = 0;
        for (unit, dir) in &dirs {
            let dump = DumpUnit { dir, after: After::Run, limit: take.limit };
            let image = unit::dump_unit(systemd, &criu, unit, dump, |_| true).await?;
            frozen_us += image.cost.frozen_us;
        }
        (feed(store.clone(), take, dirs.clone(), Cost { frozen_us }, progress).await?, frozen_us)
    };
    let locks = dirs.iter().filter(|_| stop).map(|(_, dir)| unit::network_lock(dir));
    let network_locks = locks.collect::<Result<_, _>>()?;
    // Off the memory as soon as may be, and not on a thread of the runtime.
    blocking(move || drop(scratch)).await?;
    let ((generation, captured), frozen_us) = stored;
    Ok(Taken { generation, captured, frozen_us, took: begun.elapsed(), network_locks })
}

fn take_names(dirs: &[(String, PathBuf)]) -> Vec<String> {
    dirs.iter().map(|(unit, _)| unit.clone()).collect()
}

/// Bytes that the images of these units will take, about.
async fn need(systemd: &Systemd, units: &[String]) -> Result<u64, ProcessError> {
    let mut need = 0;
    for unit in units {
        let Ok(service) = unit::service(systemd, unit).await else { continue };
        let group = cgroup::directory(&service.control_group);
        let pids = group.and_then(|dir| cgroup::processes(&dir).ok()).unwrap_or_default();
        need += scratch::memory_of(&pids);
    }
    Ok(need)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ProcessError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| image_error("a thread")(io::Error::other(error)))
}

/// A generation, and the files in it.
pub type Stored = (Generation, Option<Captured>);

/// Has the store take what is in the directories.
async fn feed(
    store: Store,
    take: Take,
    dirs: Vec<(String, PathBuf)>,
    cost: Cost,
    progress: Progress,
) -> Result<Stored, ProcessError> {
    blocking(move || store_all(&store, take, &dirs, cost, progress)).await?
}

/// Has the store take the images of units, each by its name and the directory that it was dumped into, and the files
/// of the workload.
pub fn store_all(
    store: &Store,
    take: Take,
    dirs: &[(String, PathBuf)],
    cost: Cost,
    mut progress: Progress,
) -> Result<Stored, ProcessError> {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| u64::try_from(size).ok());
    let odd = |what: String| image_error(what)(io::ErrorKind::InvalidData.into());
    let json = |error: serde_json::Error| odd(format!("the list of processes: {error}"));
    let mut units = Vec::new();
    for (unit, dir) in dirs {
        units.push((unit, dir, files_in(dir)?));
    }
    let total = units.iter().flat_map(|(.., files)| files).map(|(_, size)| size).sum();
    let mut done = 0;
    let workload = take.about.workload.clone();
    let mut draft = store.begin(take.about)?;
    let captured = take.files.map(|files| generation::add(&mut draft, &workload, &files)).transpose()?;
    let mut listed = Vec::new();
    for (number, (unit, dir, files)) in units.into_iter().enumerate() {
        let what = format!("{}: the pagemaps", dir.display());
        let regions = images::pages(dir, page.unwrap_or(4096)).map_err(image_error(what))?;
        let mut names = Vec::new();
        for (file, size) in files {
            let path = dir.join(&file);
            let reader = File::open(&path).map_err(image_error(path.display().to_string()))?;
            let mut advance = |bytes| {
                done += bytes;
                progress(done, total);
            };
            let name = entry_name(number, &file);
            match regions.get(&file) {
                Some(regions) => {
                    let run = |region: &images::Region| Run { address: region.address, len: region.len };
                    let runs: Vec<_> = regions.iter().map(run).collect();
                    let metadata = Metadata::new(KIND_MEMORY, &size).map_err(json)?;
                    draft.add_image(&name, metadata, reader, &runs, &mut advance)?;
                }
                None => {
                    draft.add(&name, Metadata::new(KIND_IMAGE, &size).map_err(json)?, reader)?;
                    advance(size);
                }
            }
            names.push(file);
        }
        listed.push(ListedUnit { unit: unit.clone(), files: names });
    }
    let list = serde_json::to_vec(&List { version: VERSION, units: listed }).map_err(json)?;
    draft.add(LIST, Metadata::new(KIND_LIST, &cost).map_err(json)?, list.as_slice())?;
    Ok((draft.commit()?, captured))
}

/// The files in a directory of images and their sizes, but for CRIU's logs, which nobody needs for a restore.
fn files_in(dir: &Path) -> Result<Vec<(String, u64)>, ProcessError> {
    let failed = |cause| image_error(dir.display().to_string())(cause);
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let meta = entry.metadata().map_err(failed)?;
        let log = Path::new(&name).extension().is_some_and(|extension| extension == "log");
        if meta.is_file() && !log {
            files.push((name, meta.len()));
        }
    }
    files.sort();
    Ok(files)
}

// === And back ===

/// The processes of a generation.
#[derive(Debug)]
pub struct Processes {
    snapshot: Snapshot,
    units: Vec<ListedUnit>,
    bytes: u64,
}

impl Processes {
    /// Opens a generation; what is removed from the store meanwhile can be read all the same.
    pub fn open(store: &Store, workload: &str, number: u64) -> Result<Self, ProcessError> {
        let snapshot = store.snapshot(workload, number)?;
        let manifest = snapshot.manifest();
        if manifest.about.kind != Kind::Process {
            return Err(ProcessError::FilesAlone { workload: workload.into(), number });
        }
        let odd = |cause: String| ProcessError::List { workload: workload.into(), number, cause };
        let mut json = Vec::new();
        snapshot.open_entry(LIST)?.read_to_end(&mut json).map_err(|error| odd(error.to_string()))?;
        let read = |error: serde_json::Error| odd(error.to_string());
        let units = match serde_json::from_slice(&json).map_err(read)? {
            Versioned { version: VERSION } => serde_json::from_slice::<List>(&json).map_err(read)?.units,
            Versioned { version } => {
                return Err(odd(format!("it was made by a newer ftd ({version}; this one knows {VERSION})")));
            }
        };
        let sizes: BTreeMap<_, _> =
            manifest.entries.iter().map(|entry| (entry.name.as_str(), entry.size)).collect();
        let mut bytes = 0;
        for (index, unit) in units.iter().enumerate() {
            for file in &unit.files {
                // It may come from elsewhere, and becomes a path.
                if file.is_empty() || file.contains(['/', '\0']) || matches!(file.as_str(), "." | "..") {
                    return Err(odd(format!("{file:?} is no name of an image")));
                }
                let size = sizes.get(entry_name(index, file).as_str());
                bytes += size.ok_or_else(|| odd(format!("the image {file} of {} is missing", unit.unit)))?;
            }
        }
        Ok(Self { snapshot, units, bytes })
    }

    /// The units, in the order in which they start.
    pub fn units(&self) -> impl Iterator<Item = &str> {
        self.units.iter().map(|unit| unit.unit.as_str())
    }

    /// Bytes of all images.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The record of each unit; its images are not read.
    pub fn records(&self) -> Result<Vec<UnitImage>, ProcessError> {
        let read = |index: usize| {
            let name = entry_name(index, unit::MANIFEST);
            let mut text = Vec::new();
            self.snapshot.open_entry(&name)?.read_to_end(&mut text).map_err(image_error(&name))?;
            Ok(UnitImage::parse(&text, Path::new(&name))?)
        };
        (0..self.units.len()).map(read).collect()
    }

    /// Reads all images into a directory for as long as the answer lives. Every byte was checked when this returns.
    pub fn extract(&self, places: &Places, progress: &mut Progress) -> Result<Extracted, ProcessError> {
        let scratch = places.make(self.bytes)?;
        let mut units = Vec::new();
        for dir in self.extract_to(scratch.path(), progress)? {
            units.push((UnitImage::read(&dir)?.unit, dir));
        }
        Ok(Extracted { units, _scratch: scratch })
    }

    /// The same, into directories of this one: that of each unit, in their order.
    pub fn extract_to(&self, dir: &Path, progress: &mut Progress) -> Result<Vec<PathBuf>, ProcessError> {
        let (mut dirs, mut done) = (Vec::new(), 0);
        for (index, unit) in self.units.iter().enumerate() {
            let dir = dir.join(index.to_string());
            fs::create_dir(&dir).map_err(image_error(format!("{} cannot be made", dir.display())))?;
            for file in &unit.files {
                let path = dir.join(file);
                let writer = File::create_new(&path);
                let writer = writer.map_err(image_error(format!("the image {}", path.display())))?;
                self.snapshot.extract(&entry_name(index, file), &writer, &mut |bytes| {
                    done += bytes;
                    progress(done, self.bytes);
                })?;
            }
            dirs.push(dir);
        }
        Ok(dirs)
    }
}

/// Images that were read out of the store.
#[derive(Debug)]
pub struct Extracted {
    /// Each unit, by the name that it had, and its directory.
    pub units: Vec<(String, PathBuf)>,
    _scratch: Scratch,
}

/// What taking a generation of processes has cost, where it was of processes and says so.
pub fn cost(manifest: &Manifest) -> Option<Cost> {
    manifest.entries.iter().find(|entry| entry.name == LIST)?.metadata.get().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Config,
        snapshot::{criu::messages, store::Settings},
    };

    fn about(kind: Kind) -> About {
        let (node, boot_id) = ("vm1".into(), "boot".into());
        About { workload: "web".into(), kind, node, boot_id, time: jiff::Timestamp::now() }
    }

    fn places(dir: &Path) -> Places {
        let mut config = Config::default();
        config.node.state_dir = dir.into();
        config.snapshot.scratch = crate::config::Scratch::Disk;
        Places::by_hand(&config)
    }

    /// A directory as CRIU makes it: 4 MiB of memory from `address` on.
    fn images(dir: &Path, address: u64) {
        use prost::Message as _;
        fs::create_dir_all(dir).unwrap();
        let memory: Vec<u8> =
            (0..1_048_576_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(dir.join("pages-1.img"), memory).unwrap();
        let mut bytes: Vec<u8> =
            [0x5456_4319_u32, 0x5608_4025].iter().flat_map(|n| n.to_le_bytes()).collect();
        let head = messages::PagemapHead { pages_id: 1 }.encode_to_vec();
        let run = messages::PagemapEntry {
            vaddr: address,
            compat_nr_pages: 1024,
            in_parent: None,
            flags: Some(4),
            nr_pages: None,
        };
        for record in [head, run.encode_to_vec()] {
            bytes.extend((record.len() as u32).to_le_bytes());
            bytes.extend(record);
        }
        fs::write(dir.join("pagemap-71.img"), bytes).unwrap();
        fs::write(dir.join("dump.log"), "much").unwrap();
        let record = serde_json::json!({
            "version": 1, "unit": "x.service", "main_pid": 71, "journal": [], "nulls": [], "own_mounts": false,
            "stopped": false, "machine": "x86_64", "kernel": "6", "criu": {"major": 4, "minor": 2, "sublevel": 0},
            "taken": "2026-01-01T00:00:00Z", "cost": { "frozen_us": 1, "freezing_us": 1, "took_us": 1,
            "pages_scanned": 1, "pages_skipped": 1, "pages_written": 1 },
        });
        fs::write(dir.join("unit.json"), record.to_string()).unwrap();
    }

    fn put(store: &Store, dir: &Path, files: Option<Selection>) -> Generation {
        let take = Take {
            about: about(Kind::Process),
            files,
            units: vec!["x".into()],
            stop: false,
            limit: Duration::from_secs(1),
        };
        let dirs = [("x.service".to_owned(), dir.to_owned())];
        store_all(store, take, &dirs, Cost { frozen_us: 5 }, Box::new(|_, _| {})).unwrap().0
    }

    #[test]
    fn images_come_back_as_they_were_and_unchanged_memory_is_stored_once() {
        let dir = tempfile::tempdir().unwrap();
        let (dump, config) = (dir.path().join("dump"), dir.path().join("x.conf"));
        images(&dump, 0x7000_0000);
        fs::write(&config, "a\n").unwrap();
        let store = Store::open(&dir.path().join("store"), Settings::default()).unwrap();
        let selection = Selection::parse([config.to_str().unwrap()]).unwrap();
        let first = put(&store, &dump, Some(selection));
        assert_eq!((first.number, first.about.kind), (1, Kind::Process));
        let second = put(&store, &dump, None);
        assert!(first.stats.new > 4 << 20 && second.stats.new < 10_000, "{first:?} {second:?}");
        assert_eq!(cost(&store.manifest("web", 1).unwrap()), Some(Cost { frozen_us: 5 }));

        let processes = Processes::open(&store, "web", 2).unwrap();
        assert_eq!(processes.units().collect::<Vec<_>>(), ["x.service"]);
        assert_eq!(processes.records().unwrap()[0].main_pid, 71);
        let (sender, told) = std::sync::mpsc::channel();
        let mut progress: Progress = Box::new(move |done, of| sender.send((done, of)).unwrap());
        let extracted = processes.extract(&places(dir.path()), &mut progress).unwrap();
        let (unit, back) = &extracted.units[0];
        assert_eq!(unit, "x.service");
        for file in ["pages-1.img", "pagemap-71.img", "unit.json"] {
            assert_eq!(fs::read(back.join(file)).unwrap(), fs::read(dump.join(file)).unwrap(), "{file}");
        }
        assert!(!back.join("dump.log").exists());
        assert_eq!(told.try_iter().last(), Some((processes.bytes(), processes.bytes())));
        let back = back.clone();
        drop(extracted);
        assert!(!back.exists());
        // The first has the files too.
        assert!(generation::Files::any(&store, "web", 1).unwrap());
        assert!(!generation::Files::any(&store, "web", 2).unwrap());
    }

    #[test]
    fn files_alone_and_a_list_that_leads_elsewhere_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Settings::default()).unwrap();
        store.begin(about(Kind::Files)).unwrap().commit().unwrap();
        let error = Processes::open(&store, "web", 1).unwrap_err();
        assert!(error.to_string().contains("files alone"), "{error}");
        for (list, word) in [
            (r#"{"version":1,"units":[{"unit":"x","files":["../../etc/passwd"]}]}"#, "no name of an image"),
            (r#"{"version":1,"units":[{"unit":"x","files":["pages-1.img"]}]}"#, "is missing"),
            (r#"{"version":2,"units":{}}"#, "newer ftd"),
            ("[", "makes no sense"),
        ] {
            let mut draft = store.begin(about(Kind::Process)).unwrap();
            draft.add(LIST, Metadata::new(KIND_LIST, &()).unwrap(), list.as_bytes()).unwrap();
            let number = draft.commit().unwrap().number;
            let error = Processes::open(&store, "web", number).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
