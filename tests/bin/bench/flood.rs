//! Storms of processes in a unit under care: does ftd see every one, and when it cannot, does it know how
//! many it has missed?
//!
//! Each process of the flood is made by a fork that ftd reports, and ends by an exit that ftd reports: twice
//! as many events as processes. First at full speed, with ftd reading. Then with ftd stopped by force
//! (SIGSTOP) for longer than the buffer between it and the kernel lasts: after it goes on, what it was
//! given and what it counts as lost must make up the whole, to the last event.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::report::{Goal, Measured, table};
use crate::site::{Probe, Site, eventually};

#[derive(Serialize)]
pub(crate) struct Floods {
    source: String,
    floods: Vec<Flood>,
}

#[derive(Serialize)]
struct Flood {
    stopped: bool,
    threads: u32,
    processes: u32,
    /// Processes made and ended, a second.
    rate: f64,
    /// Forks and exits.
    expected: u64,
    delivered: u64,
    dropped: u64,
}

pub(crate) fn measure(site: &Site, quick: bool) -> Result<Floods> {
    let count = if quick { 20_000 } else { 100_000 };
    eprintln!("bench: floods of {count} processes");
    let source = site.start_ftd()?.probe.source;
    let mut floods = Vec::new();
    for threads in [1, 2, 4] {
        floods.push(flood(site, count, threads, false)?);
    }
    // The default buffer of 4 MiB has room for 37 thousand pairs of fork and exit.
    floods.push(flood(site, if quick { 50_000 } else { 100_000 }, 2, true)?);
    Ok(Floods { source, floods })
}

fn flood(site: &Site, processes: u32, threads: u32, stopped: bool) -> Result<Flood> {
    let mut load = site.load()?;
    let ftd = site.ftd()?;
    let before = site.status()?.probe;
    if stopped {
        ftd.signal(Signal::SIGSTOP)?;
        eventually("ftd is stopped", || Ok(all_threads_stopped(&ftd.proc("task"))?.then_some(())))?;
    }
    let done = load.run(&format!("exits {processes} {threads}"));
    if stopped {
        // Whatever became of the flood, ftd must not stay as it is.
        ftd.signal(Signal::SIGCONT)?;
    }
    let done = done?;
    let expected = u64::from(processes) * 2;
    let told = |probe: &Probe| (probe.delivered - before.delivered, probe.dropped() - before.dropped());
    // Events are read after they have happened: until all are accounted for, or no more of them come.
    let last = std::cell::Cell::new((u64::MAX, u64::MAX));
    let (delivered, dropped) = eventually("all events are read", || {
        let now = told(&site.status()?.probe);
        let all = now.0 + now.1 >= expected;
        Ok((all || last.replace(now) == now).then_some(now))
    })?;
    Ok(Flood {
        stopped,
        threads,
        processes,
        rate: f64::from(processes) / (done.took as f64 / 1e9),
        expected,
        delivered,
        dropped,
    })
}

fn all_threads_stopped(tasks: &Path) -> Result<bool> {
    for task in fs::read_dir(tasks).with_context(|| format!("{}", tasks.display()))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        if stat.rsplit_once(") ").is_none_or(|(_, rest)| !rest.starts_with('T')) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Measured for Floods {
    fn markdown(&self) -> String {
        let rows: Vec<_> = self
            .floods
            .iter()
            .map(|flood| {
                let name = if flood.stopped { "ftd stopped by force" } else { "ftd reading" };
                let mut cells = vec![format!("{name}, {} threads", flood.threads)];
                cells.push(format!("{:.0}", flood.rate));
                let sum = flood.delivered + flood.dropped;
                cells.extend([flood.expected, flood.delivered, flood.dropped, sum].map(|n| n.to_string()));
                cells
            })
            .collect();
        format!(
            "## Storms of processes in a unit under care\n\nThreads that make processes which end at once; \
             one fork and one exit each are reported (source: {}).\n\n{}",
            self.source,
            table(&["", "exits/s", "events", "delivered", "dropped", "sum"], &rows)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        let reading = || self.floods.iter().filter(|flood| !flood.stopped);
        let fastest = reading().map(|flood| flood.rate).fold(0.0, f64::max);
        let dropped: u64 = reading().map(|flood| flood.dropped).sum();
        let wrong: u64 = self.floods.iter().map(|f| f.expected.abs_diff(f.delivered + f.dropped)).sum();
        vec![
            Goal::at_least("rate of the fastest flood", fastest, 20_000.0, "exits/s"),
            Goal::at_most("events dropped in floods", dropped as f64, 0.0, ""),
            Goal::at_most("events unaccounted for, ftd stopped by force too", wrong as f64, 0.0, ""),
        ]
    }
}
