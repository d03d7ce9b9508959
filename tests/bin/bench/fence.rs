//! What the fence costs a packet, by `BPF_PROG_TEST_RUN`: `ftd fence-cost` loads the programs and has the kernel run
//! them, the kinds of packets taking turns.

use anyhow::{Context as _, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::report::{Goal, Measured, Report, table};
use crate::site::Site;
use crate::stats::{median, quantile};

/// How much is measured.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often each kind of packet is measured.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Directory for fence.json and fence.md; target/bench when left out.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Serialize)]
struct Fence {
    costs: Vec<Cost>,
}

/// As `ftd fence-cost` prints it.
#[derive(Serialize, Deserialize)]
struct Cost {
    program: String,
    packet: String,
    of_service: bool,
    ns: Vec<f64>,
}

pub(crate) fn measure(options: &Options) -> Result<ExitCode> {
    let out = crate::directory(options.out.as_deref())?;
    let site = Site::up()?;
    let mut report = Report::new("fence", options.rounds)?;
    report.version(Some(&site.host), "ftd", &["ftd", "--version"])?;
    report.take("fence", costs(&site, options.rounds));
    let whole = report.finish(&out)?;
    site.down()?;
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn costs(site: &Site, rounds: u32) -> Result<Fence> {
    eprintln!("bench: fence");
    let rounds = rounds.to_string();
    let text = site.host.ok(["ftd", "fence-cost", "--rounds", &rounds])?;
    Ok(Fence { costs: serde_json::from_str(&text).context("what ftd fence-cost prints makes no sense")? })
}

impl Measured for Fence {
    fn markdown(&self) -> String {
        let figure = |value: f64| format!("{value:.0}");
        let row = |cost: &Cost| {
            let (middle, high) = (median(&cost.ns), quantile(&cost.ns, 1.0));
            vec![format!("{}, {}", cost.packet, cost.program), figure(middle), figure(high)]
        };
        let rows: Vec<_> = self.costs.iter().map(row).collect();
        format!(
            "## Fence\n\nEach figure is the mean of a million runs; 31 addresses of each family are in the maps.\n\n{}",
            table(&["packet", "median ns", "max ns"], &rows)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        let worst = |of_service: bool| {
            let medians = self.costs.iter().filter(|cost| cost.of_service == of_service);
            medians.map(|cost| median(&cost.ns)).fold(0.0, f64::max)
        };
        vec![
            Goal::at_most("packet of a service address, dearest kind", worst(true), 120.0, "ns"),
            Goal::at_most("other packet, dearest kind", worst(false), 60.0, "ns"),
        ]
    }
}
