//! Where the chunks are: the packs of a store as they were at one moment, all open.
//!
//! An index never changes. Who holds one can read all that it names, whatever gc removes meanwhile: an open file
//! stays until it is closed.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    error::{Error, Result},
    manifest::Id,
    pack::{Pack, Slot},
};

/// The packs, and where each chunk is.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) packs: Vec<Arc<Pack>>,
    /// Of each chunk the newest copy: number of the pack, and of the slot.
    places: HashMap<Id, (u32, u32)>,
}

impl Index {
    /// The packs in `dir`; those that `old` has are not opened again. `None`: they are the same as there.
    pub(super) fn load(dir: &Path, old: &Self) -> Result<Option<Self>> {
        let paths = files(dir, "pack")?;
        if paths.iter().eq(old.packs.iter().map(|pack| &pack.path)) {
            return Ok(None);
        }
        let known: HashMap<_, _> = old.packs.iter().map(|pack| (&pack.path, pack)).collect();
        let mut packs = Vec::with_capacity(paths.len());
        for path in &paths {
            match known.get(path) {
                Some(pack) => packs.push(Arc::clone(pack)),
                None => match Pack::open(path) {
                    Ok(pack) => packs.push(Arc::new(pack)),
                    // Somebody's gc was faster.
                    Err(error) if error.is_gone() => {}
                    Err(error) => return Err(error),
                },
            }
        }
        Ok(Some(Self::of(packs)))
    }

    fn of(packs: Vec<Arc<Pack>>) -> Self {
        let mut places = HashMap::with_capacity(packs.iter().map(|pack| pack.slots.len()).sum());
        for (p, pack) in packs.iter().enumerate() {
            for (s, slot) in pack.slots.iter().enumerate() {
                places.insert(slot.record.id, (p as u32, s as u32));
            }
        }
        Self { packs, places }
    }

    /// One copy of a chunk.
    pub(super) fn find(&self, id: Id) -> Option<(&Pack, &Slot)> {
        let (p, s) = *self.places.get(&id)?;
        let pack = self.packs.get(p as usize)?;
        Some((pack, pack.slots.get(s as usize)?))
    }

    /// All copies of a chunk; there is more than one only when one of them was damaged, or after a crash. Slow.
    pub(super) fn copies(&self, id: Id) -> impl Iterator<Item = (&Pack, &Slot)> {
        self.packs.iter().flat_map(move |pack| {
            pack.slots.iter().filter(move |slot| slot.record.id == id).map(move |slot| (&**pack, slot))
        })
    }

    /// The chunks of which there is more than one copy.
    pub(super) fn doubles(&self) -> HashSet<Id> {
        let mut seen = HashSet::with_capacity(self.places.len());
        let all = self.packs.iter().flat_map(|pack| &pack.slots);
        all.map(|slot| slot.record.id).filter(|id| !seen.insert(*id)).collect()
    }
}

/// The files in `dir` with this extension, sorted.
pub(super) fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut paths = list(dir)?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    Ok(paths)
}

/// All that is in `dir`, sorted; nothing when there is no such directory.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort_unstable();
        Ok(paths)
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(Error::io("list", dir)),
    }
}
