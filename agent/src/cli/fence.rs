//! `ftctl fence`: what keeps a node without a lease from answering. Read from the kernel, as root: ftd need not run.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::{client::Failure, show};
use crate::{
    cluster::{
        fence::{self, Counters, DEFAULT_DIR, Fence, FenceError},
        vip::Network,
    },
    probe::BootNs,
};

#[derive(Debug, Args)]
pub(super) struct FenceArgs {
    #[command(subcommand)]
    what: FenceCommand,
    /// Where the fence is pinned: a directory of a BPF file system.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_DIR)]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum FenceCommand {
    /// Show each service address: until when it may be answered for here, what passed, and what was dropped.
    Status,
    /// Take the fenced addresses off this host, and then the fence. For when ftd is removed.
    Remove {
        /// Also while this host has a lease: clients lose the service here.
        #[arg(long)]
        force: bool,
    },
}

/// A line of `ftctl fence status`.
#[derive(Debug, Serialize)]
struct Line {
    address: IpAddr,
    /// How long its lease lasts yet, milliseconds; absent when it is over or was closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    lease_left_ms: Option<u64>,
    counters: Counters,
}

pub(super) async fn run(args: FenceArgs, json: bool) -> Result<(), Failure> {
    match args.what {
        FenceCommand::Status => status(&args.dir, json),
        FenceCommand::Remove { force } => remove(&args.dir, force, json).await,
    }
}

fn lines(dir: &Path) -> Result<Vec<Line>, Failure> {
    let now = now()?;
    let all = match fence::look(dir) {
        // Where nothing is mounted, nothing is fenced.
        Ok(None) | Err(FenceError::NoBpffs { .. }) => Vec::new(),
        Ok(Some(all)) => all,
        Err(error) => return Err(Failure::Local(error.to_string())),
    };
    let line = |one: fence::Status| {
        let left = one.until.since(now);
        let lease_left_ms =
            (left > Duration::ZERO).then(|| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
        Line { address: one.address, lease_left_ms, counters: one.counters }
    };
    Ok(all.into_iter().map(line).collect())
}

fn now() -> Result<BootNs, Failure> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_err(|errno| Failure::Local(format!("the boot clock cannot be read: {errno}")))?;
    Ok(BootNs::default().after(Duration::from(time)))
}

fn status(dir: &Path, json: bool) -> Result<(), Failure> {
    let all = lines(dir)?;
    if json {
        return show::json(&all);
    }
    if all.is_empty() {
        show::line("no address is fenced on this host");
        return Ok(());
    }
    let mut rows = show::table(&["ADDRESS", "LEASE", "IN", "OUT", "DROPPED IN", "DROPPED OUT", "CONFLICTS"]);
    for line in all {
        let lease = match line.lease_left_ms {
            Some(left) => show::good(&format!("{left} ms left")),
            None => "closed".to_owned(),
        };
        let counters = line.counters;
        let conflicts = counters.conflicts.to_string();
        rows.add_row([
            line.address.to_string(),
            lease,
            counters.passed_in.to_string(),
            counters.passed_out.to_string(),
            counters.dropped_in.to_string(),
            counters.dropped_out.to_string(),
            if counters.conflicts > 0 { show::bad(&conflicts) } else { conflicts },
        ]);
    }
    show::line(&rows.trim_fmt());
    Ok(())
}

async fn remove(dir: &Path, force: bool, json: bool) -> Result<(), Failure> {
    let local = |error: &dyn std::error::Error| Failure::Local(error.to_string());
    let all = lines(dir)?;
    if let Some(held) = all.iter().find(|line| line.lease_left_ms.is_some())
        && !force
    {
        return Err(Failure::Local(format!(
            "{} is served by this host: it has a lease. Stop ftd, or move the workload away; or use --force",
            held.address
        )));
    }
    let network = Network::open().map_err(|error| local(&error))?;
    for line in &all {
        network.delete(line.address).await.map_err(|error| local(&error))?;
    }
    match Fence::remove(dir) {
        Ok(()) | Err(FenceError::NoBpffs { .. }) => {}
        Err(error) => return Err(local(&error)),
    }
    let addresses: Vec<IpAddr> = all.iter().map(|line| line.address).collect();
    if json {
        return show::json(&serde_json::json!({ "removed": addresses }));
    }
    show::line(&format!("the fence is gone, and with it the addresses on this host: {}", addresses.len()));
    Ok(())
}
