//! From images to the running service: by ftd, as the unit that it was, and by bare CRIU, as nobody's child.
//!
//! Both begin with the same images in memory, of a unit that was dumped and stopped; what comes before that, getting
//! them out of a store, is in `kept`.

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::ground::{Ground, Subject};
use crate::clock;
use crate::report::{Goal, Measured, table};
use crate::stats::{median, quantile};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    Ftd,
    Criu,
}

#[derive(Serialize)]
pub(crate) struct Restored {
    rounds: Vec<Round>,
}

#[derive(Serialize)]
struct Round {
    subject: String,
    way: Way,
    #[serde(rename = "round")]
    number: u32,
    took_ms: f64,
}

pub(super) fn measure(ground: &Ground, rounds: u32, large: u32) -> Result<Restored> {
    eprintln!("bench: restored, {rounds} rounds");
    let mut done = Vec::new();
    for (name, memory) in [("nginx".to_owned(), None), (format!("worker, {large} MiB"), Some(large))] {
        let unit = name.split(',').next().unwrap_or(&name);
        if let Some(mebibytes) = memory {
            ground.worker(mebibytes)?;
        }
        let dir = ground.empty("images")?;
        let subject = Subject::of(&ground.dump(unit, &dir, true)?)?;
        for number in 0..rounds {
            let ways = if number % 2 == 0 { [Way::Ftd, Way::Criu] } else { [Way::Criu, Way::Ftd] };
            for way in ways {
                let took_ms = one(ground, unit, &subject, &dir, way);
                let took_ms = took_ms.with_context(|| format!("{name}, {way:?}, round {number}"))?;
                done.push(Round { subject: name.clone(), way, number, took_ms });
            }
        }
        ground.host.sh(&format!("rm -rf {dir}; systemctl start {unit}"))?;
    }
    Ok(Restored { rounds: done })
}

fn one(ground: &Ground, unit: &str, subject: &Subject, dir: &str, way: Way) -> Result<f64> {
    let began = clock::now();
    match way {
        Way::Ftd => drop(ground.restore(unit, dir)?),
        Way::Criu => ground.bare_restore(subject, dir)?,
    }
    let took = clock::ms(began, clock::now());
    // Down again, and all its PIDs free.
    let pid = subject.main_pid;
    ground.host.sh(&match way {
        Way::Ftd => format!("systemctl stop {unit}"),
        Way::Criu => format!(
            "pids=\"{pid} $(pgrep -P {pid} || true)\"; kill -9 $pids; \
             for pid in $pids; do while [ -e /proc/$pid ]; do sleep 0.01; done; done"
        ),
    })?;
    Ok(took)
}

impl Restored {
    fn of(&self, subject: &str, way: Way) -> Vec<f64> {
        let rounds = self.rounds.iter().filter(|round| round.subject == subject && round.way == way);
        rounds.map(|round| round.took_ms).collect()
    }
}

impl Measured for Restored {
    fn markdown(&self) -> String {
        let mut subjects: Vec<&str> = self.rounds.iter().map(|round| &*round.subject).collect();
        subjects.dedup();
        let rows: Vec<_> = subjects
            .iter()
            .map(|subject| {
                let mut cells = vec![(*subject).to_owned()];
                for way in [Way::Ftd, Way::Criu] {
                    let all = self.of(subject, way);
                    cells.extend([median(&all), quantile(&all, 1.0)].map(|ms| format!("{ms:.0}")));
                }
                cells
            })
            .collect();
        format!(
            "## From images to the running service\n\nMilliseconds, medians and longest of {} rounds; ftd's is the \
             unit's, with two reloads of systemd and its own start, criu's a process of nobody.\n\n{}",
            self.of(subjects.first().unwrap_or(&""), Way::Ftd).len(),
            table(&["", "ftd", "max", "criu", "max"], &rows)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        Vec::new()
    }
}
