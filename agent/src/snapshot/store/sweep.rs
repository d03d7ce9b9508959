//! Letting go: which generations are no longer kept, and what nobody needs then.
//!
//! Two steps that are apart on purpose. [`Store::retain`] removes manifests, takes a moment, and can run while a
//! draft is taken. [`Store::gc`] looks at all manifests that are left, and removes what none of them names; it
//! excludes writers for as long as it runs.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    Store,
    error::{Error, Result},
    index::{self, Index},
    manifest::{Id, Kind, Manifest},
    number_of,
    pack::{Pack, Slot},
    packing::{Packing, Quota},
};

/// So many packs may be smaller than [`SMALL`] before they are made into one.
const MANY: usize = 32;
const SMALL: u64 = 1 << 20;

/// What is kept of a workload's generations. Whatever it says: the newest, and the last good one of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// So many, the newest ones.
    pub count: Option<usize>,
    /// Those that are not older than this.
    pub age: Option<Duration>,
    /// As many, from the newest back, as take no more than these bytes on disk together.
    pub bytes: Option<u64>,
    /// Only generations of this kind are looked at, and let go.
    pub kind: Option<Kind>,
}

/// What was let go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freed {
    /// Workload and number of each generation.
    pub generations: Vec<(String, u64)>,
    /// Bytes of packs that are not there any more, less those of new ones.
    pub bytes: u64,
}

/// What retention looks at.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    number: u64,
    time: jiff::Timestamp,
    good: bool,
    kind: Kind,
}

impl Retention {
    /// The numbers that are kept of these generations, which are sorted, oldest first. `added` tells how many bytes
    /// one more takes on disk, beside those it was asked for before.
    fn kept(
        &self,
        all: &[Candidate],
        now: jiff::Timestamp,
        mut added: impl FnMut(u64) -> u64,
    ) -> HashSet<u64> {
        let last_good = |kind| all.iter().rfind(|candidate| candidate.good && candidate.kind == kind);
        let always = [all.last(), last_good(Kind::Files), last_good(Kind::Process)];
        let mut kept: HashSet<u64> = always.into_iter().flatten().map(|candidate| candidate.number).collect();
        let mut bytes: u64 = kept.iter().map(|number| added(*number)).sum();
        let young = |candidate: &Candidate| {
            let age = Duration::try_from(now.duration_since(candidate.time)).unwrap_or_default();
            self.age.is_none_or(|limit| age <= limit)
        };
        for candidate in all.iter().rev().filter(|candidate| young(candidate)) {
            if kept.contains(&candidate.number) {
                continue;
            }
            bytes += added(candidate.number);
            if self.count.is_some_and(|count| kept.len() >= count)
                || self.bytes.is_some_and(|max| bytes > max)
            {
                break;
            }
            kept.insert(candidate.number);
        }
        kept
    }
}

impl Store {
    /// Removes the generations of a workload that are not to be kept, and answers their numbers. Their room is free
    /// after [`Store::gc`].
    pub fn retain(&self, workload: &str, retention: &Retention, now: jiff::Timestamp) -> Result<Vec<u64>> {
        let _lock = self.lock_catalogue()?;
        let all = self.manifests(workload)?;
        let whole: HashMap<u64, &Manifest> =
            all.iter().filter_map(|(number, manifest)| Some((*number, manifest.as_ref().ok()?))).collect();
        let candidate = |(number, _): &(u64, _)| {
            let about = &whole.get(number)?.about;
            let (time, kind) = (about.time, about.kind);
            if retention.kind.is_some_and(|wanted| wanted != kind) {
                return None;
            }
            let good = self.good_path(workload, *number).exists();
            Some(Candidate { number: *number, time, good, kind })
        };
        let candidates: Vec<_> = all.iter().filter_map(candidate).collect();
        let index = if retention.bytes.is_some() { self.refresh()? } else { Arc::default() };
        let mut counted = HashSet::new();
        let kept = retention.kept(&candidates, now, |number| {
            let data = whole.get(&number).into_iter().flat_map(|manifest| manifest.data());
            let new = data.filter(|(id, _)| counted.insert(*id)).filter_map(|(id, _)| index.find(id));
            new.map(|(_, slot)| slot.record.cost()).sum()
        });
        // A damaged one is of no use, but tells what has happened, as long as there are others of its age. The newest
        // stays, so that its number is not given again.
        let Some(oldest) = kept.iter().min() else { return Ok(Vec::new()) };
        let looked_at: HashSet<u64> = candidates.iter().map(|one| one.number).collect();
        let goes = |number: &u64| {
            if whole.contains_key(number) {
                looked_at.contains(number) && !kept.contains(number)
            } else {
                number < oldest
            }
        };
        let gone: Vec<_> = all.iter().map(|(number, _)| *number).filter(goes).collect();
        for number in &gone {
            self.disk().remove(&self.manifest_path(workload, *number))?;
        }
        // Also those that an earlier run did not come to.
        for marker in index::files(&self.workload_dir(workload), "good")? {
            if number_of(&marker).is_none_or(|number| !self.manifest_path(workload, number).exists()) {
                self.disk().remove(&marker)?;
            }
        }
        Ok(gone)
    }

    /// Removes the generations of all workloads that are not to be kept, and all that nobody needs then.
    pub fn sweep(&self, retention: &Retention, now: jiff::Timestamp) -> Result<Freed> {
        let mut generations = Vec::new();
        for workload in self.workloads()? {
            let gone = self.retain(&workload, retention, now)?;
            generations.extend(gone.into_iter().map(|number| (workload.clone(), number)));
        }
        Ok(Freed { generations, ..self.gc()? })
    }

    /// Removes all that no generation needs. What is needed of a pack that is mostly dead is copied to a new one.
    pub fn gc(&self) -> Result<Freed> {
        let _lock = self.lock_writer()?;
        let index = self.refresh()?;
        let live = self.mark()?;
        let mut plan = Plan::of(&index, &live);
        for pack in plan.dead.drain(..) {
            self.disk().remove(&pack.path)?;
        }
        self.copy(&plan.thin)?;
        let size = |index: &Index| index.packs.iter().map(|pack| pack.len).sum::<u64>();
        let after = size(&*self.refresh()?);
        Ok(Freed { generations: Vec::new(), bytes: size(&index).saturating_sub(after) })
    }

    /// All chunks that a generation needs. That what is not there is gone for good, is sure after this.
    fn mark(&self) -> Result<HashSet<Id>> {
        let mut live = HashSet::new();
        for workload in self.workloads()? {
            for (number, manifest) in self.manifests(&workload)? {
                match manifest {
                    Ok(manifest) => live.extend(manifest.data().map(|(id, _)| id)),
                    Err(error) => tracing::warn!(workload, number, %error, "a generation cannot be read"),
                }
            }
            let dir = self.workload_dir(&workload);
            // If a power cut brought a manifest back after its chunks are gone, it would be one that is damaged.
            self.disk().sync_dir(&dir)?;
            let _lock = self.lock_catalogue()?;
            if index::list(&dir)?.is_empty() {
                self.disk().remove_dir_if_empty(&dir)?;
            }
        }
        self.disk().sync_dir(&self.generations_dir())?;
        Ok(live)
    }

    /// Copies what is alive in these packs to new ones, and removes them.
    fn copy(&self, thin: &[(&Pack, Vec<&Slot>)]) -> Result<()> {
        let mut packing = Packing::new(self, Quota::none(self));
        let (mut stored, mut copied) = (Vec::new(), Vec::new());
        for (pack, slots) in thin {
            let mut whole = true;
            for slot in slots {
                match pack.read(slot, &mut stored) {
                    Ok(()) if slot.record.check(&stored).is_ok() => packing.put(slot.record, &stored)?,
                    Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                        return Err(Error::io("read", &pack.path)(error));
                    }
                    _ => whole = false,
                }
            }
            // One with a damaged chunk stays: to tell of it, and who knows what can still be got out of it.
            if whole {
                copied.push(pack);
            }
        }
        if copied.is_empty() {
            return Ok(());
        }
        packing.publish()?.keep();
        copied.iter().try_for_each(|pack| self.disk().remove(&pack.path))
    }
}

/// What gc does with the packs.
struct Plan<'a> {
    /// Nobody needs anything of them.
    dead: Vec<&'a Pack>,
    /// To be copied, with the chunks that are alive.
    thin: Vec<(&'a Pack, Vec<&'a Slot>)>,
}

impl<'a> Plan<'a> {
    fn of(index: &'a Index, live: &HashSet<Id>) -> Self {
        let chosen = chosen(index, live);
        let alive = |pack: &'a Pack| -> Vec<&'a Slot> {
            let needed = |slot: &&Slot| {
                let id = slot.record.id;
                live.contains(&id) && chosen.get(&id).is_none_or(|path| *path == pack.path)
            };
            pack.slots.iter().filter(needed).collect()
        };
        let many = index.packs.iter().filter(|pack| pack.len < SMALL).count() > MANY;
        // A pack of which not all chunks are known may be the one that has what is missed.
        let missed = live.iter().any(|id| index.find(*id).is_none());
        let mut plan = Self { dead: Vec::new(), thin: Vec::new() };
        for pack in &index.packs {
            let slots = alive(pack);
            let bytes: u64 = slots.iter().map(|slot| slot.record.cost()).sum();
            if missed && pack.flaw.is_some() {
                continue;
            }
            if slots.is_empty() {
                plan.dead.push(pack);
            } else if bytes < pack.len / 2 || (many && pack.len < SMALL) {
                plan.thin.push((pack, slots));
            }
        }
        plan
    }
}

/// Of chunks of which there are several copies: the pack with the one to keep, the newest that is not damaged.
fn chosen<'a>(index: &'a Index, live: &HashSet<Id>) -> HashMap<Id, &'a Path> {
    let mut stored = Vec::new();
    let mut chosen: HashMap<Id, &PathBuf> = HashMap::new();
    for id in index.doubles().intersection(live) {
        let mut sound = |(pack, slot): &(&Pack, &Slot)| {
            pack.read(slot, &mut stored).is_ok() && slot.record.check(&stored).is_ok()
        };
        let copies = || index.copies(*id);
        if let Some((pack, _)) = copies().filter(|copy| sound(copy)).last().or_else(|| copies().next()) {
            chosen.insert(*id, &pack.path);
        }
    }
    chosen.into_iter().map(|(id, path)| (id, path.as_path())).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidates(goods: &[bool]) -> Vec<Candidate> {
        let time = |second| jiff::Timestamp::from_second(second).unwrap();
        (1..)
            .zip(goods)
            .map(|(number, good)| Candidate {
                number,
                time: time(number.cast_signed()),
                good: *good,
                kind: Kind::Files,
            })
            .collect()
    }

    fn kept(retention: Retention, goods: &[bool], added: u64) -> Vec<u64> {
        let now = jiff::Timestamp::from_second(goods.len().try_into().unwrap()).unwrap();
        let mut kept: Vec<_> = retention.kept(&candidates(goods), now, |_| added).into_iter().collect();
        kept.sort_unstable();
        kept
    }

    #[test]
    fn count_age_and_bytes_each_bound_what_is_kept() {
        let goods = [false; 6];
        let all = Retention::default();
        assert_eq!(kept(all, &goods, 1), [1, 2, 3, 4, 5, 6]);
        assert_eq!(kept(Retention { count: Some(2), ..all }, &goods, 1), [5, 6]);
        assert_eq!(kept(Retention { age: Some(Duration::from_secs(3)), ..all }, &goods, 1), [3, 4, 5, 6]);
        assert_eq!(kept(Retention { bytes: Some(30), ..all }, &goods, 10), [4, 5, 6]);
        assert_eq!(kept(Retention { count: Some(0), bytes: Some(0), ..all }, &goods, 10), [6]);
    }

    #[test]
    fn the_last_good_one_counts_first() {
        let goods = [true, true, false, false, false];
        let all = Retention::default();
        assert_eq!(kept(Retention { count: Some(3), ..all }, &goods, 1), [2, 4, 5]);
        assert_eq!(kept(Retention { bytes: Some(20), ..all }, &goods, 10), [2, 5]);
        assert_eq!(kept(Retention { age: Some(Duration::ZERO), ..all }, &goods, 10), [2, 5]);
    }

    #[test]
    fn the_last_good_one_of_each_kind_is_kept() {
        let mut all = candidates(&[true, true, false, true, false]);
        all[1].kind = Kind::Process;
        all[4].kind = Kind::Process;
        let one = Retention { count: Some(1), ..Retention::default() };
        let mut kept: Vec<_> = one.kept(&all, all[4].time, |_| 1).into_iter().collect();
        kept.sort_unstable();
        assert_eq!(kept, [2, 4, 5]);
    }

    proptest! {
        #[test]
        fn the_newest_and_the_last_good_one_are_always_kept(
            goods in prop::collection::vec(any::<bool>(), 1..20),
            count in prop::option::of(0usize..10), age in prop::option::of(0u64..20), bytes in prop::option::of(0u64..99),
        ) {
            let retention = Retention { count, age: age.map(Duration::from_secs), bytes, kind: None };
            let kept = kept(retention, &goods, 10);
            prop_assert!(kept.contains(&(goods.len() as u64)));
            if let Some(good) = goods.iter().rposition(|good| *good) {
                prop_assert!(kept.contains(&(good as u64 + 1)));
            }
            prop_assert!(count.is_none_or(|count| kept.len() <= count.max(2)));
        }
    }
}
