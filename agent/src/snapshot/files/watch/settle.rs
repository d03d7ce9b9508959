//! When to tell of changes: once they have settled, but not after too long a time.
//!
//! Pure: time goes in. Nobody who edits several files at once should be met halfway; nor should somebody who writes
//! without end keep ftd from looking.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Paths that are told one by one. When there are more, everything may have changed: a comparison
/// costs less than such a list.
const MOST_PATHS: usize = 4096;

/// How long is waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// So long nothing more must change.
    pub settle: Duration,
    /// But so long after the first change it is told in any case.
    pub at_most: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { settle: Duration::from_millis(500), at_most: Duration::from_secs(5) }
    }
}

/// What may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Selected paths, or directories in which everything may have changed.
    pub paths: BTreeSet<PathBuf>,
    /// Why anything selected may have changed, besides these paths.
    pub everything: Option<String>,
}

/// Collects changes until it is time to tell.
#[derive(Debug)]
pub(super) struct Settle {
    timing: Timing,
    batch: Batch,
    /// Of the changes in the batch; nothing while it is empty.
    first_last: Option<(Instant, Instant)>,
}

impl Settle {
    pub(super) fn new(timing: Timing) -> Self {
        Self { timing, batch: Batch::default(), first_last: None }
    }

    /// This path may have changed.
    pub(super) fn path(&mut self, path: PathBuf, now: Instant) {
        self.touch(now);
        if self.batch.paths.len() < MOST_PATHS || self.batch.paths.contains(&path) {
            self.batch.paths.insert(path);
        } else {
            self.batch
                .everything
                .get_or_insert_with(|| format!("more than {MOST_PATHS} paths changed at once"));
        }
    }

    /// Anything may have changed. The first reason is told.
    pub(super) fn everything(&mut self, why: String, now: Instant) {
        self.touch(now);
        self.batch.everything.get_or_insert(why);
    }

    fn touch(&mut self, now: Instant) {
        let first = self.first_last.map_or(now, |(first, _)| first);
        self.first_last = Some((first, now));
    }

    /// When to tell; never if there is nothing.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let (first, last) = self.first_last?;
        Some((last + self.timing.settle).min(first + self.timing.at_most))
    }

    /// Everything so far.
    pub(super) fn take(&mut self) -> Batch {
        self.first_last = None;
        std::mem::take(&mut self.batch)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIMING: Timing = Timing { settle: Duration::from_millis(500), at_most: Duration::from_secs(5) };

    /// Milliseconds since the change before, and what changed: a path, or everything.
    fn changes() -> impl Strategy<Value = Vec<(u64, Option<u8>)>> {
        proptest::collection::vec((0..800_u64, proptest::option::weighted(0.9, 0..4_u8)), 0..60)
    }

    proptest! {
        #[test]
        fn each_change_is_told_once_settled_or_overdue(changes in changes()) {
            let mut settle = Settle::new(TIMING);
            let mut now = Instant::now();
            // Told nothing of yet: when, and what.
            let mut waiting: Vec<(Instant, Option<PathBuf>)> = Vec::new();
            let tell = |settle: &mut Settle, waiting: &mut Vec<(Instant, Option<PathBuf>)>, until: Option<Instant>| {
                let Some(due) = settle.deadline() else {
                    prop_assert!(waiting.is_empty());
                    return Ok(());
                };
                if until.is_some_and(|until| due > until) {
                    return Ok(());
                }
                let (first, last) = (waiting[0].0, waiting[waiting.len() - 1].0);
                prop_assert!(due == last + TIMING.settle || due == first + TIMING.at_most);
                prop_assert!(due <= first + TIMING.at_most && due <= last + TIMING.settle);
                let batch = settle.take();
                let paths: BTreeSet<_> = waiting.iter().filter_map(|(_, path)| path.clone()).collect();
                prop_assert_eq!(batch.paths, paths);
                prop_assert_eq!(batch.everything.is_some(), waiting.iter().any(|(_, path)| path.is_none()));
                waiting.clear();
                prop_assert_eq!(settle.deadline(), None);
                Ok(())
            };
            for (pause, change) in changes {
                now += Duration::from_millis(pause);
                tell(&mut settle, &mut waiting, Some(now))?;
                let path = change.map(|n| PathBuf::from(format!("/{n}")));
                match path.clone() {
                    Some(path) => settle.path(path, now),
                    None => settle.everything("overflow".into(), now),
                }
                waiting.push((now, path));
            }
            tell(&mut settle, &mut waiting, None)?;
            prop_assert!(waiting.is_empty());
        }
    }

    #[test]
    fn too_many_paths_are_everything() {
        let mut settle = Settle::new(TIMING);
        let now = Instant::now();
        for n in 0..=MOST_PATHS {
            settle.path(format!("/{n}").into(), now);
        }
        let batch = settle.take();
        assert_eq!(batch.paths.len(), MOST_PATHS);
        assert!(batch.everything.unwrap().contains("more than"));
        assert_eq!(settle.deadline(), None);
    }
}
