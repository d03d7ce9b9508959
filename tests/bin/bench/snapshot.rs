//! Snapshots of running services, against the tools that one would take instead.
//!
//! Four questions, each with its own file:
//!
//! ```text
//! frozen     how long a service stands still while it is saved: ftd, and bare `criu dump`
//! kept       how long it takes to keep images, and how small they get, when nothing, little or all of the memory has
//!            changed since the generation before: ftd, `tar | zstd`, restic, borg
//! back       how long it takes to get a directory of images back: the same four
//! restored   how long it takes until the service runs again: ftd, and bare `criu restore`
//! ```
//!
//! The images are those of the worker (tests/bin/worker.rs), dumped by CRIU. They are handed to all keepers in the same
//! directory in memory, which is where ftd has CRIU write them; the keepers' own files are on the disk. Each
//! keeper is one command, and its time is that from its start to its end, when what it wrote is durable.

mod frozen;
mod ground;
mod images;
mod keeper;
mod kept;
mod restored;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

use self::ground::Ground;
use crate::report::Report;

/// How much is measured.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often each variant is measured; what is short, in proportion, more often.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Directory for snapshot.json and snapshot.md; target/bench when left out. What the keepers write is there
    /// too, meanwhile.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A run of two minutes with a small worker that proves that the benchmark works. Its numbers say little.
    #[arg(long)]
    quick: bool,
    /// Only this part; may be given more than once.
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// How long services stand still.
    Frozen,
    /// Keeping images and getting them back.
    Kept,
    /// From a snapshot to the running service.
    Restored,
}

pub(crate) fn measure(options: &Options) -> Result<ExitCode> {
    let out = crate::directory(options.out.as_deref())?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let rounds = if options.quick { options.rounds.min(2) } else { options.rounds };
    let large = if options.quick { 64 } else { 1024 };

    eprintln!("bench: a host comes up");
    let ground = Ground::up()?;
    let mut report = Report::new("snapshot", rounds)?;
    for (program, words) in [
        ("ftd", ["ftd", "--version"]),
        ("systemd", ["systemctl", "--version"]),
        ("criu", ["criu", "--version"]),
        ("nginx", ["nginx", "-v"]),
        ("apache2", ["apache2", "-v"]),
    ] {
        report.version(Some(&ground.host), program, &words)?;
    }
    for (program, words) in
        [("zstd", ["zstd", "--version"]), ("restic", ["restic", "version"]), ("borg", ["borg", "--version"])]
    {
        report.version(None, program, &words)?;
    }
    if wanted(Part::Frozen) {
        report.take("frozen", frozen::measure(&ground, rounds, large));
    }
    if wanted(Part::Kept) {
        report.take("kept", kept::measure(&ground, rounds, large, &out));
    }
    if wanted(Part::Restored) {
        report.take("restored", restored::measure(&ground, rounds, large));
    }
    let whole = report.finish(&out)?;
    ground.down()?;
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
