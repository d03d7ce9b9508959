//! How long a service stands still while it is saved and goes on: by ftd, and by bare CRIU with the same options.
//!
//! The clock is CRIU's own, in `stats-dump`, for both: from the freeze to the thaw.

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::ground::{Ground, Stats, Subject};
use crate::report::{Goal, Measured, table};
use crate::stats::{median, median_interval, quantile};

/// How often what takes milliseconds is done, for each time that a second is spent on a gibibyte.
const OFTEN: u32 = 5;
/// No more than so much longer than bare CRIU.
const BOUND: f64 = 1.15;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    Ftd,
    Criu,
}

#[derive(Serialize)]
pub(crate) struct Frozen {
    rounds: Vec<Round>,
}

#[derive(Serialize)]
struct Round {
    subject: String,
    way: Way,
    #[serde(rename = "round")]
    number: u32,
    #[serde(flatten)]
    stats: Stats,
}

pub(super) fn measure(ground: &Ground, rounds: u32, large: u32) -> Result<Frozen> {
    eprintln!("bench: frozen, {rounds} rounds and more");
    let mut done = Vec::new();
    for (name, memory, times) in [
        ("nginx".to_owned(), None, rounds * OFTEN),
        ("apache2".to_owned(), None, rounds * OFTEN),
        ("worker, 64 MiB".to_owned(), Some(64), rounds * OFTEN),
        (format!("worker, {large} MiB"), Some(large), rounds),
    ] {
        let unit = name.split(',').next().unwrap_or(&name);
        if let Some(mebibytes) = memory {
            ground.worker(mebibytes)?;
        }
        // The first of each kind is not counted.
        let subject = Subject::of(&ground.dump(unit, &ground.empty("ftd")?, false)?)?;
        ground.bare_dump(&subject, &ground.empty("criu")?)?;
        for number in 0..times {
            let ways = if number % 2 == 0 { [Way::Ftd, Way::Criu] } else { [Way::Criu, Way::Ftd] };
            for way in ways {
                let stats = one(ground, unit, &subject, way);
                let stats = stats.with_context(|| format!("{name}, {way:?}, round {number}"))?;
                done.push(Round { subject: name.clone(), way, number, stats });
            }
        }
        ground.host.sh(&format!("rm -rf {}/*", super::ground::IMAGES))?;
    }
    Ok(Frozen { rounds: done })
}

fn one(ground: &Ground, unit: &str, subject: &Subject, way: Way) -> Result<Stats> {
    let dir = ground.empty("dump")?;
    match way {
        Way::Ftd => drop(ground.dump(unit, &dir, false)?),
        Way::Criu => ground.bare_dump(subject, &dir)?,
    }
    Stats::read(&ground.outside(&dir)?)
}

impl Frozen {
    fn of(&self, subject: &str, way: Way) -> Vec<f64> {
        let rounds = self.rounds.iter().filter(|round| round.subject == subject && round.way == way);
        rounds.map(|round| round.stats.frozen_us as f64 / 1e3).collect()
    }

    /// How much longer by ftd, of each pair of neighbours.
    fn ratios(&self, subject: &str) -> Vec<f64> {
        let pairs = self.of(subject, Way::Ftd).into_iter().zip(self.of(subject, Way::Criu));
        pairs.map(|(ftd, criu)| ftd / criu).collect()
    }

    fn subjects(&self) -> Vec<&str> {
        let mut all: Vec<&str> = self.rounds.iter().map(|round| &*round.subject).collect();
        all.dedup();
        all
    }
}

impl Measured for Frozen {
    fn markdown(&self) -> String {
        let rows: Vec<_> = self
            .subjects()
            .iter()
            .map(|subject| {
                let (ftd, criu) = (self.of(subject, Way::Ftd), self.of(subject, Way::Criu));
                let ratios = self.ratios(subject);
                let (low, high) = median_interval(&ratios);
                let mut cells = vec![(*subject).to_owned(), ratios.len().to_string()];
                for all in [&ftd, &criu] {
                    cells.extend([median(all), quantile(all, 0.9)].map(|ms| format!("{ms:.1}")));
                }
                cells.push(format!("{:.2}", median(&ratios)));
                cells.push(format!("{low:.2} to {high:.2}"));
                cells
            })
            .collect();
        let head = ["", "rounds", "ftd", "p90", "criu", "p90", "ftd / criu", "95 %"];
        format!(
            "## How long a service stands still\n\nSaved while it goes on; milliseconds from freeze to thaw, by CRIU's \
             clock. The ratio is the median of those of neighbours.\n\n{}",
            table(&head, &rows)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        let goal = |subject: &&str| {
            let what = format!("frozen, of bare criu's: {subject}");
            Goal::at_most(&what, median(&self.ratios(subject)), BOUND, "")
        };
        self.subjects().iter().map(goal).collect()
    }
}
