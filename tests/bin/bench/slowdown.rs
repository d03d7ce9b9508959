//! What ftd costs processes that it does not care for, and those that it does.
//!
//! A loop that runs `/bin/true` over and over makes a fork, an exec and an exit of each turn, and hardly
//! anything else: no real program passes ftd's programs in the kernel as often. It runs in short slices,
//! in pairs with and without ftd, which of the two is first changing from pair to pair, always on the
//! same processor. What is told is the median of the ratios within the pairs, with its confidence
//! interval: a machine with neighbours is slow for minutes, but seldom for one slice of a pair only. The
//! ratio of processor time, which waiting for one's turn does not count in, is told beside it.

use anyhow::Result;
use serde::Serialize;

use crate::load::{Done, Load};
use crate::report::{Goal, Measured, table};
use crate::site::Site;
use crate::stats::{median, median_interval};

/// Turns of the loop in a slice.
const SPAWNS: u32 = 1500;

#[derive(Serialize)]
pub(crate) struct Slowdown {
    spawns: u32,
    pairs: Vec<Pair>,
}

/// One slice of each kind.
#[derive(Serialize)]
struct Pair {
    outside_with: Done,
    outside_without: Done,
    inside_with: Done,
    inside_without: Done,
}

pub(crate) fn measure(site: &Site, pairs: u32) -> Result<Slowdown> {
    eprintln!("bench: slowdown, {pairs} pairs");
    let processors = std::thread::available_parallelism()?.get();
    let mut outside = Load::here(processors - 1)?;
    let mut inside = site.load()?;
    let task = format!("spawns {SPAWNS}");
    let mut slices = |with: bool| -> Result<[Done; 2]> {
        if with {
            site.start_ftd()?;
        } else {
            site.stop_ftd()?;
        }
        Ok([outside.run(&task)?, inside.run(&task)?])
    };
    // The first turns of the loop bring its files into memory.
    slices(false)?;
    let mut done = Vec::new();
    for pair in 0..pairs {
        let first_with = pair % 2 == 0;
        let (first, second) = (slices(first_with)?, slices(!first_with)?);
        let (with, without) = if first_with { (first, second) } else { (second, first) };
        done.push(Pair {
            outside_with: with[0],
            outside_without: without[0],
            inside_with: with[1],
            inside_without: without[1],
        });
    }
    Ok(Slowdown { spawns: SPAWNS, pairs: done })
}

impl Slowdown {
    /// In percent, for each pair: how much more `of` is with ftd.
    fn more(&self, with: fn(&Pair) -> Done, without: fn(&Pair) -> Done, of: fn(Done) -> u64) -> Vec<f64> {
        let more = |pair| (of(with(pair)) as f64 / of(without(pair)) as f64 - 1.0) * 100.0;
        self.pairs.iter().map(more).collect()
    }

    fn outside(&self, of: fn(Done) -> u64) -> Vec<f64> {
        self.more(|pair| pair.outside_with, |pair| pair.outside_without, of)
    }

    fn inside(&self, of: fn(Done) -> u64) -> Vec<f64> {
        self.more(|pair| pair.inside_with, |pair| pair.inside_without, of)
    }
}

impl Measured for Slowdown {
    fn markdown(&self) -> String {
        let each = |of: fn(&Pair) -> Done| {
            let all = self.pairs.iter().map(|pair| of(pair).took as f64 / 1e3 / f64::from(self.spawns));
            format!("{:.0}", median(&all.collect::<Vec<_>>()))
        };
        let row = |name: &str, without: String, with: String, time: &[f64], cpu: &[f64]| {
            let interval = |values: &[f64]| {
                let (low, high) = median_interval(values);
                format!("{:+.2} % ({low:+.2} to {high:+.2})", median(values))
            };
            vec![name.to_owned(), without, with, interval(time), interval(cpu)]
        };
        let rows = vec![
            row(
                "outside of the units under care",
                each(|pair| pair.outside_without),
                each(|pair| pair.outside_with),
                &self.outside(|done| done.took),
                &self.outside(|done| done.cpu),
            ),
            row(
                "in a unit under care",
                each(|pair| pair.inside_without),
                each(|pair| pair.inside_with),
                &self.inside(|done| done.took),
                &self.inside(|done| done.cpu),
            ),
        ];
        format!(
            "## Slowdown\n\nA loop that runs `/bin/true`: microseconds for each turn, and how much more with \
             ftd (median of {} pairs of slices of {} turns, 95 % confidence interval).\n\n{}",
            self.pairs.len(),
            self.spawns,
            table(&["", "without, us", "with, us", "time", "processor time"], &rows)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        vec![Goal::at_most("slowdown of unrelated spawns", median(&self.outside(|done| done.took)), 3.0, "%")]
    }
}
