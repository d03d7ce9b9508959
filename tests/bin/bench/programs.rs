//! What each run of ftd's programs in the kernel costs, by the kernel's own account.
//!
//! The kernel keeps it only while it is asked to (`BPF_ENABLE_STATS`, which ends by itself with the
//! descriptor), since that makes each run dearer. Taking the time is part of it: some 20 ns of each figure.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::Serialize;

use crate::load::Load;
use crate::report::{Goal, Measured, table};
use crate::site::Site;

const SPAWNS: u32 = 1000;

#[derive(Serialize)]
pub(crate) struct Programs {
    programs: Vec<Program>,
}

#[derive(Serialize)]
struct Program {
    load: &'static str,
    name: String,
    runs: u64,
    nanoseconds: u64,
}

pub(crate) fn measure(site: &Site) -> Result<Programs> {
    eprintln!("bench: programs");
    site.start_ftd()?;
    let ours = ids(site)?;
    let _counting = enable_stats(Stats::RunTime).context("the kernel does not keep account of programs")?;
    let mut outside = Load::here(std::thread::available_parallelism()?.get() - 1)?;
    let mut inside = site.load()?;
    let task = format!("spawns {SPAWNS}");
    let mut programs = Vec::new();
    for (load, program) in [("outside of the units", &mut outside), ("in a unit under care", &mut inside)] {
        let before = account(&ours);
        program.run(&task)?;
        for (id, (name, runs, time)) in account(&ours) {
            let (runs_before, time_before) = before.get(&id).map_or((0, Duration::ZERO), |p| (p.1, p.2));
            let nanoseconds = u64::try_from(time.saturating_sub(time_before).as_nanos())?;
            programs.push(Program { load, name, runs: runs - runs_before, nanoseconds });
        }
    }
    programs.retain(|program| program.runs > 0);
    programs.sort_by(|a, b| (b.load, &a.name).cmp(&(a.load, &b.name)));
    ensure!(!programs.is_empty(), "none of ftd's programs ran");
    Ok(Programs { programs })
}

/// The programs that our ftd holds; others may run on this machine.
fn ids(site: &Site) -> Result<HashSet<u32>> {
    let mut ids = HashSet::new();
    for entry in fs::read_dir(site.ftd()?.proc("fdinfo"))? {
        // Descriptors come and go.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
        ids.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    ensure!(!ids.is_empty(), "ftd holds no programs: does it run without eBPF?");
    Ok(ids)
}

type Account = HashMap<u32, (String, u64, Duration)>;

fn account(ours: &HashSet<u32>) -> Account {
    let mut account = Account::new();
    for program in loaded_programs() {
        // One that was unloaded while we looked is not ours.
        let Ok(program) = program else { continue };
        if ours.contains(&program.id()) {
            let name = program.name_as_str().unwrap_or("?").to_owned();
            account.insert(program.id(), (name, program.run_count(), program.run_time()));
        }
    }
    account
}

impl Measured for Programs {
    fn markdown(&self) -> String {
        let rows: Vec<_> = self
            .programs
            .iter()
            .map(|program| {
                let each = program.nanoseconds as f64 / program.runs as f64;
                vec![
                    format!("{}, {}", program.name, program.load),
                    program.runs.to_string(),
                    format!("{each:.0}"),
                    format!("{:.0}", program.nanoseconds as f64 / f64::from(SPAWNS)),
                ]
            })
            .collect();
        format!(
            "## Programs in the kernel\n\n{SPAWNS} spawns of `/bin/true` each; runs by others on this machine \
             are among them.\n\n{}",
            table(&["", "runs", "ns a run", "ns a spawn"], &rows)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        Vec::new()
    }
}
