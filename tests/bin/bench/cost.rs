//! What ftd itself takes: memory, and processor time of its control group.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::clock;
use crate::load::Load;
use crate::report::{Goal, Measured, table};
use crate::site::{Member, Site};

#[derive(Serialize)]
pub(crate) struct Cost {
    slices: Vec<Slice>,
    /// After all of them, KiB: resident, its share of it where pages are shared, and the most ever.
    rss_kib: u64,
    pss_kib: u64,
    peak_kib: u64,
    /// Resident right after the idle time.
    idle_rss_kib: u64,
}

#[derive(Serialize)]
struct Slice {
    name: String,
    wall_ms: f64,
    cpu_ms: f64,
}

impl Slice {
    fn percent(&self) -> f64 {
        self.cpu_ms / self.wall_ms * 100.0
    }
}

pub(crate) fn measure(site: &Site, quick: bool) -> Result<Cost> {
    let idle = Duration::from_secs(if quick { 4 } else { 24 });
    eprintln!("bench: cost, {idle:?} of idling and some load");
    site.stop_ftd()?;
    site.start_ftd()?;
    let ftd = site.ftd()?;
    let mut slices = Vec::new();
    let mut slice = |name: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let (cpu, began) = (cpu_us(site)?, clock::now());
        work()?;
        let (wall_ms, cpu_us) = (clock::ms(began, clock::now()), cpu_us(site)? - cpu);
        slices.push(Slice { name: name.to_owned(), wall_ms, cpu_ms: cpu_us as f64 / 1e3 });
        Ok(())
    };
    slice("idle, two health checks each 2 s", &mut || {
        std::thread::sleep(idle);
        Ok(())
    })?;
    let idle_rss_kib = of_proc(ftd, "status", "VmRSS")?;
    let spawns = if quick { 500 } else { 4000 };
    let mut outside = Load::here(std::thread::available_parallelism()?.get() - 1)?;
    let mut inside = site.load()?;
    let task = format!("spawns {spawns}");
    slice(&format!("{spawns} spawns outside of the units"), &mut || outside.run(&task).map(drop))?;
    slice(&format!("{spawns} spawns in a unit under care"), &mut || inside.run(&task).map(drop))?;
    Ok(Cost {
        slices,
        idle_rss_kib,
        rss_kib: of_proc(ftd, "status", "VmRSS")?,
        pss_kib: of_proc(ftd, "smaps_rollup", "Pss")?,
        peak_kib: of_proc(ftd, "status", "VmHWM")?,
    })
}

/// Processor time of ftd and its helpers since it started, threads that have ended among them.
fn cpu_us(site: &Site) -> Result<u64> {
    let path = site.group("ftd.service").join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    line.and_then(|value| value.trim().parse().ok()).context("cpu.stat has no usage_usec")
}

/// A value in KiB of a file in `/proc/PID`.
fn of_proc(process: Member, file: &str, name: &str) -> Result<u64> {
    let path = process.proc(file);
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
    value.with_context(|| format!("{} has no {name}", path.display()))
}

impl Measured for Cost {
    fn markdown(&self) -> String {
        let rows: Vec<_> = self
            .slices
            .iter()
            .map(|slice| {
                let (cpu, wall) = (format!("{:.1}", slice.cpu_ms), format!("{:.0}", slice.wall_ms));
                vec![slice.name.clone(), cpu, wall, format!("{:.3}", slice.percent())]
            })
            .collect();
        let mib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
        format!(
            "## ftd's own cost\n\n{}\nMemory: resident {} idle, {} after the load, {} at most; proportional \
             share {}.\n",
            table(&["", "CPU, ms", "of ms", "% of a core"], &rows),
            mib(self.idle_rss_kib),
            mib(self.rss_kib),
            mib(self.peak_kib),
            mib(self.pss_kib)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        vec![
            Goal::at_most("resident memory", self.rss_kib as f64 / 1024.0, 30.0, "MiB"),
            Goal::at_most("idle, of a core", self.slices[0].percent(), 0.3, "%"),
        ]
    }
}
