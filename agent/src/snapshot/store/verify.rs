//! Reading all that the store has, and naming what is damaged.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::PathBuf,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{Sender, channel},
    },
    thread,
};

use super::{
    Store,
    error::{Error, Result},
    index::Index,
    manifest::{Chunk, Id},
    pack::{Pack, Slot},
    read::{Snapshot, Unpacker},
};

/// Chunks that a thread checks before it tells of them.
const STEP: usize = 64;

/// Something in the store that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// Nothing of this generation can be read.
    Generation {
        /// Its workload.
        workload: String,
        /// Its number.
        number: u64,
        /// How that shows.
        cause: String,
    },
    /// A part of this entry cannot be read.
    Entry {
        /// Of this workload.
        workload: String,
        /// In this generation.
        number: u64,
        /// Its name.
        entry: String,
        /// Where in its content the part begins.
        offset: u64,
        /// And how long it is.
        len: u64,
        /// How that shows.
        cause: String,
    },
    /// Damage in a pack by which no generation is hurt.
    Pack {
        /// The file.
        path: PathBuf,
        /// How that shows.
        cause: String,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Generation { workload, number, cause } => {
                write!(f, "generation {number} of {workload} cannot be read: {cause}")
            }
            Self::Entry { workload, number, entry, offset, len, cause } => write!(
                f,
                "generation {number} of {workload}: {len} bytes of {entry:?} from byte {offset} on cannot be \
                 read: {cause}"
            ),
            Self::Pack { path, cause } => {
                write!(f, "{}: {cause}; no generation is hurt by it", path.display())
            }
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Generations that can be read from beginning to end.
    pub whole: usize,
    /// Chunks that were read.
    pub chunks: usize,
    /// Bytes of packs that were read.
    pub bytes: u64,
    /// All that is damaged.
    pub damage: Vec<Damage>,
}

/// What is known of the chunks.
#[derive(Default)]
struct Chunks {
    sound: HashSet<Id>,
    /// With the pack and the cause.
    bad: HashMap<Id, (PathBuf, String)>,
}

impl Store {
    /// Reads everything. `progress` is told how many bytes of how many are done.
    pub fn verify(&self, mut progress: impl FnMut(u64, u64)) -> Result<Verified> {
        let mut verified = Verified::default();
        let mut snapshots = Vec::new();
        for workload in self.workloads()? {
            for (number, manifest) in self.manifests(&workload)? {
                match manifest.and_then(|_| self.snapshot(&workload, number)) {
                    Ok(snapshot) => snapshots.push(snapshot),
                    Err(Error::NoGeneration { .. }) => {}
                    Err(error) => {
                        let cause = error.to_string();
                        verified.damage.push(Damage::Generation {
                            workload: workload.clone(),
                            number,
                            cause,
                        });
                    }
                }
            }
        }
        let index = self.refresh()?;
        let chunks = self.check(&index, &mut verified, &mut progress)?;
        let mut hurt = HashSet::new();
        for snapshot in &snapshots {
            let before = verified.damage.len();
            chunks.damage_to(snapshot, &mut hurt, &mut verified.damage)?;
            verified.whole += usize::from(before == verified.damage.len());
        }
        // A damaged chunk that has a sound copy is not worth a word to those who would use it.
        self.distrusted().extend(chunks.bad.keys().filter(|id| !chunks.sound.contains(*id)));
        for (id, (path, cause)) in chunks.bad {
            if !hurt.contains(&id) {
                verified.damage.push(Damage::Pack { path, cause });
            }
        }
        for pack in &index.packs {
            for cause in pack.frame_flaws().map_err(Error::io("read", &pack.path))? {
                verified.damage.push(Damage::Pack { path: pack.path.clone(), cause: cause.into() });
            }
        }
        Ok(verified)
    }

    /// Reads all chunks, on all cores.
    fn check(
        &self,
        index: &Index,
        verified: &mut Verified,
        progress: &mut impl FnMut(u64, u64),
    ) -> Result<Chunks> {
        let all: Vec<(&Pack, &Slot)> =
            index.packs.iter().flat_map(|pack| pack.slots.iter().map(move |slot| (&**pack, slot))).collect();
        let total = all.iter().map(|(_, slot)| u64::from(slot.record.stored)).sum();
        let (mut chunks, next) = (Chunks::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            let (found, results) = channel();
            let workers: Vec<_> = (0..self.settings().threads())
                .map(|_| {
                    let (all, next, found) = (&all, &next, found.clone());
                    scope.spawn(move || check_some(all, next, found))
                })
                .collect();
            drop(found);
            for step in results {
                for (number, cause) in step {
                    let Some((pack, slot)) = all.get(number) else { continue };
                    verified.chunks += 1;
                    verified.bytes += u64::from(slot.record.stored);
                    match cause {
                        None => _ = chunks.sound.insert(slot.record.id),
                        Some(cause) => _ = chunks.bad.insert(slot.record.id, (pack.path.clone(), cause)),
                    }
                }
                progress(verified.bytes, total);
            }
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        Ok(chunks)
    }
}

/// The number of a chunk, and why it is damaged if it is.
type Finding = (usize, Option<String>);

#[expect(clippy::needless_pass_by_value, reason = "the receiver waits until all senders are gone")]
fn check_some(all: &[(&Pack, &Slot)], next: &AtomicUsize, found: Sender<Vec<Finding>>) -> Result<()> {
    let (mut unpacker, mut content) = (Unpacker::new()?, Vec::new());
    loop {
        let first = next.fetch_add(STEP, Ordering::Relaxed);
        let some = all.iter().enumerate().skip(first).take(STEP);
        let step: Vec<_> = some
            .map(|(number, (pack, slot))| (number, unpacker.unpack(pack, slot, &mut content).err()))
            .collect();
        if step.is_empty() || found.send(step).is_err() {
            return Ok(());
        }
    }
}

impl Chunks {
    /// Names all of a generation that cannot be read, and notes the chunks.
    fn damage_to(&self, snapshot: &Snapshot, hurt: &mut HashSet<Id>, damage: &mut Vec<Damage>) -> Result<()> {
        let (mut unpacker, mut content) = (Unpacker::new()?, Vec::new());
        let manifest = snapshot.manifest();
        for entry in &manifest.entries {
            let mut offset = 0;
            for chunk in &entry.chunks {
                if let Chunk::Data { id, len } = *chunk
                    && !self.sound.contains(&id)
                {
                    let cause = match self.bad.get(&id) {
                        Some((_, cause)) => Some(cause.clone()),
                        // Not in the packs as they are now: gc was there in between.
                        None => {
                            unpacker.fetch(snapshot.store(), snapshot.index(), (id, len), &mut content).err()
                        }
                    };
                    if let Some(cause) = cause {
                        hurt.insert(id);
                        damage.push(Damage::Entry {
                            workload: manifest.about.workload.clone(),
                            number: manifest.number,
                            entry: entry.name.clone(),
                            offset,
                            len: u64::from(len),
                            cause,
                        });
                    }
                }
                offset += chunk.len();
            }
        }
        Ok(())
    }
}
