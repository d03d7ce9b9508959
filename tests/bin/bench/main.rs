//! What ftd gains and what it costs, in numbers, on a test host with a real systemd.
//!
//! One run measures everything that is to be compared, on one host, the variants taking turns: round by
//! round, each round in another order, so that a machine that is slow for a while is slow for all of
//! them. What is compared with what is read off one clock (`CLOCK_MONOTONIC` is the same inside and outside
//! of a host), by one client. Every single measurement is kept: `heal.json` and `snapshot.json` hold them all,
//! with the machine and the versions; `heal.md` and `snapshot.md` hold the tables made of them.
//!
//! A benchmark is not a test: a goal that is missed is printed as FAIL and the exit code stays 0. It is 1
//! when something could not be measured at all.
//!
//! ```text
//! decision heal slowdown cost flood programs    one file for each thing that is measured
//! snapshot  fence                               the same for snapshots, and for the fence
//! site                                          the host, ftd on it, what they say of themselves
//! client  load                                  who asks nginx / who makes processes
//! report  stats                                 goals, tables, files / medians and their kin
//! ```

mod client;
mod clock;
mod cost;
mod decision;
mod fence;
mod flood;
mod heal;
mod load;
mod programs;
mod report;
mod site;
mod slowdown;
mod snapshot;
mod stats;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::report::Report;
use crate::site::Site;

/// Measure ftd on test hosts.
#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    bin_name = "cargo xtask bench",
    after_help = "Examples:\n  \
        cargo xtask bench heal\n  \
        cargo xtask bench heal --quick\n  \
        cargo xtask bench heal --only flood --only programs\n  \
        cargo xtask bench snapshot\n  \
        cargo xtask bench fence"
)]
struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Seeing deaths and healing units: how fast, at what cost, losing nothing.
    Heal(Options),
    /// Snapshots of running services: how long they stand still, how fast and how small they are kept.
    Snapshot(snapshot::Options),
    /// What the fence of service addresses costs each packet.
    Fence(fence::Options),
    /// The program that makes processes, here or on a host; see the module `load`.
    #[command(hide = true)]
    Load {
        /// Listen here instead of talking over the standard streams.
        #[arg(long)]
        socket: Option<PathBuf>,
        /// Run on this CPU only.
        #[arg(long)]
        cpu: Option<usize>,
    },
}

/// How much is measured.
#[derive(Debug, Args)]
struct Options {
    /// How often each variant is measured; what is cheap, in proportion, more often.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Directory for heal.json and heal.md; target/bench when left out.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A run of a minute that proves that the benchmark works. Its numbers say little.
    #[arg(long)]
    quick: bool,
    /// Only this part; may be given more than once.
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From a process's death to ftd's decision.
    Decision,
    /// From a service's death to its next answer, by several ways.
    Heal,
    /// What ftd costs processes that it does not care for.
    Slowdown,
    /// What ftd itself takes.
    Cost,
    /// Storms of processes.
    Flood,
    /// What each run of ftd's programs in the kernel costs.
    Programs,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Subcommands::Heal(options) => heal(&options),
        Subcommands::Snapshot(options) => snapshot::measure(&options),
        Subcommands::Fence(options) => fence::measure(&options),
        Subcommands::Load { socket, cpu } => load::serve(socket.as_deref(), cpu).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}

fn heal(options: &Options) -> Result<ExitCode> {
    let out = directory(options.out.as_deref())?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let rounds = if options.quick { options.rounds.min(3) } else { options.rounds };

    eprintln!("bench: a host comes up");
    let site = Site::up()?;
    let mut report = Report::new("heal", rounds)?;
    for (program, words) in
        [("ftd", ["ftd", "--version"]), ("systemd", ["systemctl", "--version"]), ("nginx", ["nginx", "-v"])]
    {
        report.version(Some(&site.host), program, &words)?;
    }
    if wanted(Part::Decision) {
        report.take("decision", decision::measure(&site, rounds * 7));
    }
    if wanted(Part::Heal) {
        report.take("heal", heal::measure(&site, rounds));
    }
    if wanted(Part::Slowdown) {
        report.take("slowdown", slowdown::measure(&site, rounds));
    }
    if wanted(Part::Cost) {
        report.take("cost", cost::measure(&site, options.quick));
    }
    if wanted(Part::Flood) {
        report.take("flood", flood::measure(&site, options.quick));
    }
    if wanted(Part::Programs) {
        report.take("programs", programs::measure(&site));
    }
    let whole = report.finish(&out)?;
    site.down()?;
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where the results go; `target/bench` of the work tree when nothing else is asked for. Made if it is not there.
fn directory(asked: Option<&Path>) -> Result<PathBuf> {
    let tree = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| tree.join("../target"), PathBuf::from);
    let out = asked.map_or_else(|| target.canonicalize().unwrap_or(target).join("bench"), Path::to_owned);
    std::fs::create_dir_all(&out).with_context(|| format!("{} cannot be made", out.display()))?;
    Ok(out)
}
