//! Keeping images, generation after generation, and getting the last one back.
//!
//! Each keeper begins with nothing. The first generation is new to it; in each one after that a share of
//! the pages has changed since the one before. All keepers are given the same images before the next change is made.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::ground::Ground;
use super::images::Images;
use super::keeper::{Keeper, Kind};
use crate::report::{Goal, Measured, table};
use crate::stats::median;

/// Percent of the pages that have changed since the generation before. `None`: the first.
const GENERATIONS: [Option<usize>; 5] = [None, Some(0), Some(1), Some(10), Some(100)];
/// Memory, for images.
const MEMORY: &str = "/dev/shm";

#[derive(Serialize)]
pub(crate) struct Kept {
    /// Of one generation.
    bytes: u64,
    generations: Vec<Generation>,
    back: Vec<Back>,
}

/// One generation that was kept.
#[derive(Serialize)]
struct Generation {
    keeper: Kind,
    round: u32,
    /// Percent of its pages; none in the first.
    changed: Option<usize>,
    took_ms: f64,
    /// Bytes more than before.
    stored: u64,
}

/// The last one, got back.
#[derive(Serialize)]
struct Back {
    keeper: Kind,
    round: u32,
    took_ms: f64,
}

/// A directory that is gone when this is.
struct Scratch(PathBuf);

impl Scratch {
    fn new(within: &Path) -> Result<Self> {
        let dir = within.join(format!("ftd-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn measure(ground: &Ground, rounds: u32, memory: u32, out: &Path) -> Result<Kept> {
    eprintln!("bench: kept, {rounds} rounds of {} keepers", Kind::ALL.len());
    ground.worker(memory)?;
    let dumped = ground.empty("images")?;
    ground.dump("worker", &dumped, false)?;
    let (disk, scratch) = (Scratch::new(out)?, Scratch::new(Path::new(MEMORY))?);
    let first = ground.outside(&dumped)?;
    let mut kept = Kept { bytes: super::images::bytes(&first)?, generations: Vec::new(), back: Vec::new() };
    for round in 0..rounds {
        let mut images = Images::copy(&first, &scratch.0.join("images"))?;
        let new = |kind: &Kind| Keeper::new(*kind, &disk.0.join(format!("{kind:?}")));
        let mut keepers = Kind::ALL.iter().map(new).collect::<Result<Vec<_>>>()?;
        keepers.rotate_left(round as usize % Kind::ALL.len());
        for (number, changed) in (1..).zip(GENERATIONS) {
            if let Some(percent) = changed {
                images.change(percent)?;
            }
            for keeper in &mut keepers {
                let before = keeper.bytes()?;
                let took_ms = keeper.keep(number, &images.dir)?;
                let stored = keeper.bytes()?.saturating_sub(before);
                kept.generations.push(Generation { keeper: keeper.kind, round, changed, took_ms, stored });
            }
            keepers.rotate_left(1);
        }
        for keeper in &keepers {
            let dir = scratch.0.join("back");
            fs::create_dir(&dir)?;
            let (took_ms, given) = keeper.give(GENERATIONS.len() as u32, &dir)?;
            images.same(&given).with_context(|| keeper.kind.name())?;
            kept.back.push(Back { keeper: keeper.kind, round, took_ms });
            fs::remove_dir_all(&dir)?;
        }
        drop(keepers);
        for dir in [&disk.0, &scratch.0] {
            fs::remove_dir_all(dir)?;
            fs::create_dir(dir)?;
        }
    }
    ground.host.sh(&format!("rm -rf {dumped}"))?;
    Ok(kept)
}

impl Kept {
    fn of(&self, keeper: Kind, changed: Option<usize>, value: impl Fn(&Generation) -> f64) -> Vec<f64> {
        let some = self.generations.iter().filter(|one| one.keeper == keeper && one.changed == changed);
        some.map(value).collect()
    }

    fn took(&self, keeper: Kind, changed: Option<usize>) -> f64 {
        median(&self.of(keeper, changed, |one| one.took_ms))
    }

    fn stored(&self, keeper: Kind, changed: Option<usize>) -> f64 {
        median(&self.of(keeper, changed, |one| one.stored as f64))
    }

    fn back(&self, keeper: Kind) -> f64 {
        let some = self.back.iter().filter(|one| one.keeper == keeper);
        median(&some.map(|one| one.took_ms).collect::<Vec<_>>())
    }

    /// Of each round: the first generation's time by that of the one in which nothing had changed.
    fn gain(&self) -> f64 {
        let [first, second] = [None, Some(0)].map(|changed| self.of(Kind::Ftd, changed, |one| one.took_ms));
        median(&first.iter().zip(&second).map(|(first, second)| first / second).collect::<Vec<_>>())
    }
}

impl Measured for Kept {
    fn markdown(&self) -> String {
        let title = |changed: Option<usize>| match changed {
            None => "first".to_owned(),
            Some(percent) => format!("{percent} % changed"),
        };
        let head: Vec<_> = GENERATIONS.map(title).into();
        let head: Vec<&str> = [""].into_iter().chain(head.iter().map(String::as_str)).collect();
        let rows = |cell: &dyn Fn(Kind, Option<usize>) -> String| -> Vec<Vec<String>> {
            let row = |kind: Kind| {
                let cells = GENERATIONS.map(|changed| cell(kind, changed));
                [kind.name().to_owned()].into_iter().chain(cells).collect()
            };
            Kind::ALL.map(row).into()
        };
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        let whole = self.bytes as f64;
        let mut text = format!(
            "## Keeping images\n\nImages of {} MiB; medians of {} rounds. Seconds for a generation:\n\n{}\n",
            mib(whole),
            self.of(Kind::Ftd, None, |_| 0.0).len(),
            table(&head, &rows(&|kind, changed| format!("{:.2}", self.took(kind, changed) / 1e3)))
        );
        let _ = writeln!(
            text,
            "MiB that it adds to what is on the disk:\n\n{}",
            table(&head, &rows(&|kind, changed| mib(self.stored(kind, changed))))
        );
        let back = Kind::ALL.map(|kind| {
            let seconds = self.back(kind) / 1e3;
            vec![kind.name().to_owned(), format!("{seconds:.2}"), format!("{:.2}", whole / 1e9 / seconds)]
        });
        let _ = writeln!(text, "Getting the last one back:\n\n{}", table(&["", "s", "GB/s"], &back));
        let rate = |changed| format!("{:.2}", whole / 1e6 / self.took(Kind::Ftd, changed));
        let _ = writeln!(
            text,
            "ftd keeps {} GB/s of what is new, {} GB/s of what has not changed.",
            rate(None),
            rate(Some(0))
        );
        text
    }

    fn goals(&self) -> Vec<Goal> {
        let percent = 100.0 * self.stored(Kind::Ftd, Some(0)) / self.stored(Kind::Ftd, None);
        let of_restic = |changed| self.took(Kind::Ftd, changed) / self.took(Kind::Restic, changed);
        vec![
            Goal::at_most("unchanged generation, bytes, of the first one's", percent, 1.0, "%"),
            Goal::at_least("first generation's time / unchanged one's", self.gain(), 5.0, ""),
            Goal::at_most("first generation's time, of restic's", of_restic(None), 1.0, ""),
            Goal::at_most("unchanged generation's time, of restic's", of_restic(Some(0)), 1.0, ""),
            Goal::at_most(
                "getting it back, of restic's",
                self.back(Kind::Ftd) / self.back(Kind::Restic),
                1.0,
                "",
            ),
        ]
    }
}
