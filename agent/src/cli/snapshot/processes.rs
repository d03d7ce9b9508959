//! Snapshots that have processes: taken, and restored, by hand.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::fcntl::Flock;
use serde_json::json;

use super::{Place, RestoreArgs, about, advance, bar, holds::Holds, local, plan, tell};
use crate::{
    cli::{
        NOT_WELL,
        client::{Client, Failure},
        show,
    },
    config::{Workload, unit_name},
    event,
    snapshot::{
        criu::{
            Criu,
            unit::{self, Granted, UnitError},
        },
        files,
        generation::Files,
        process::{self, Extracted, Processes, Progress, Take, Taken},
        schedule::driver::busy,
        scratch::Places,
        store::Kind,
    },
    unit::manager::Systemd,
};

/// What all else may take, beside CRIU.
const MARGIN: Duration = Duration::from_mins(10);

/// Takes a workload with its processes, and stops it if wanted.
pub(super) async fn take(
    place: &Place,
    client: &Client,
    workload: &Workload,
    stop: bool,
    json: bool,
) -> Result<Taken, Failure> {
    let name = workload.name.as_ref();
    let units: Vec<_> = workload.units.iter().map(|unit| unit_name(unit.as_ref())).collect();
    let files = if workload.has_files() { Some(Place::selection(workload)?) } else { None };
    let settings = &place.config.snapshot;
    let limit = settings.process_deadline;
    let take =
        Take { about: about(place, workload, Kind::Process), files, units: units.clone(), stop, limit };
    let (places, mut busy) = alone(place, name)?;
    let holds = if stop {
        let why = "snapshot take --stop";
        Some(Holds::take(client, &units, why, limit * units.len() as u32 + MARGIN).await?)
    } else {
        None
    };
    let bar = bar(json);
    let progress: Progress = {
        let bar = bar.clone();
        Box::new(move |done, of| advance(&bar)(done, of))
    };
    let work = async |systemd: &Systemd| {
        unit::sweep(systemd).await.map_err(local)?;
        process::take(systemd, &place.store, &places, take, progress).await.map_err(local)
    };
    let taken = Systemd::alone(work).await.map_err(local).flatten();
    bar.finish_and_clear();
    if let Ok(taken) = &taken {
        // It ran: what kept the connections of an earlier life silent has had its time.
        forget_locks(&mut busy).await;
        remember_locks(&mut busy, &taken.network_locks);
    }
    if let Some(holds) = holds {
        match &taken {
            // Else ftd, which has seen its processes die, would start it again.
            Ok(taken) => {
                let number = taken.generation.number;
                let why = format!("snapshot take --stop: stopped by snapshot {number}");
                if let Err(failure) = holds.keep(&why).await {
                    eprintln!("ftctl: it is stopped, but ftd may start it again: {failure}");
                }
            }
            Err(_) => holds.release().await?,
        }
    }
    taken
}

/// Where images may be, when what the dead have left there is gone; and a lock that keeps others from this workload's
/// processes.
fn alone(place: &Place, name: &str) -> Result<(Places, Flock<File>), Failure> {
    let places = Places::by_hand(&place.config);
    places.sweep();
    let busy = busy(&place.config.node.state_dir, name).map_err(|error| {
        local(format!("{}: {error}", place.config.node.state_dir.join("busy").join(name).display()))
    })?;
    Ok((places, busy))
}

/// Notes which packet filters keep the connections of stopped units silent, for [`forget_locks`].
fn remember_locks(busy: &mut Flock<File>, locks: &[String]) {
    let text: String = locks.iter().map(|lock| format!("{lock}\n")).collect();
    if let Err(error) = busy.write_all(text.as_bytes()) {
        eprintln!("ftctl: not noted, to be removed by hand (nft delete table inet NAME): {locks:?}: {error}");
    }
}

/// Removes packet filters of units that were stopped by an earlier snapshot, and run again: by a restore from another
/// one, or a plain start.
async fn forget_locks(busy: &mut Flock<File>) {
    let mut text = String::new();
    // What cannot be read was not noted.
    let _ = busy.seek(SeekFrom::Start(0)).and_then(|_| busy.read_to_string(&mut text));
    let mut left = false;
    for lock in text.lines() {
        if let Err(error) = unit::release_network(lock.to_owned()).await {
            eprintln!("ftctl: {error}");
            left = true;
        }
    }
    if !left {
        let _ = busy.set_len(0);
    }
}

/// Has a workload back with its processes.
pub(super) async fn restore(
    place: &Place,
    client: &Client,
    args: &RestoreArgs,
    name: &str,
    number: u64,
    json: bool,
) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let processes = Processes::open(&place.store, name, number).map_err(local)?;
    let has_files = Files::any(&place.store, name, number).map_err(local)?;
    let files = has_files.then(|| Files::open(&place.store, name, number)).transpose().map_err(local)?;
    let plan = files.as_ref().map(|files| plan(place, args, name, files)).transpose()?;
    let steps: Vec<_> = plan.iter().flat_map(|plan| plan.steps().iter().map(ToString::to_string)).collect();
    let (places, mut busy) = alone(place, name)?;
    let bar = bar(json);
    let extracted = {
        let bar = bar.clone();
        let mut progress: Progress = Box::new(move |done, of| advance(&bar)(done, of));
        processes.extract(&places, &mut progress).map_err(local)?
    };
    bar.finish_and_clear();
    let granted = Granted { stopped: args.stop, files: sizes(files.as_ref()) };
    let work = async |systemd: &Systemd| {
        unit::sweep(systemd).await.map_err(local)?;
        let blockers = unit::in_the_way(systemd, &extracted.units, &granted).await;
        if args.dry_run || !blockers.is_empty() {
            return Ok((blockers, Vec::new()));
        }
        let names: Vec<_> = extracted.units.iter().map(|(unit, _)| unit.clone()).collect();
        let limit = place.config.snapshot.process_deadline;
        let most = limit * names.len() as u32 * 2 + MARGIN;
        let holds = Holds::take(client, &names, "restore", most).await?;
        let put_back = || match (plan, &files) {
            (Some(plan), Some(files)) => plan.apply(files, &mut |_, _| {}).map_err(local),
            _ => Ok(()),
        };
        let restored = go(systemd, &extracted, args.stop, limit, put_back).await;
        if restored.is_ok() {
            forget_locks(&mut busy).await;
        }
        // Also where it failed: then ftd does what it is there for.
        let released = holds.release().await;
        let restored = restored?;
        released.map(|()| (Vec::new(), restored))
    };
    let (blockers, restored) = Systemd::alone(work).await.map_err(local).flatten()?;
    let blockers: Vec<_> = blockers.iter().map(ToString::to_string).collect();
    if !args.dry_run && !blockers.is_empty() {
        let lines = blockers.join("\n  ");
        return Err(local(format!(
            "snapshot {number} of {name} is not restored; nothing was touched:\n  {lines}"
        )));
    }
    let units: Vec<_> = processes.units().map(str::to_owned).collect();
    if !args.dry_run {
        let took_ms = crate::control::millis(begun.elapsed());
        let (workload, units, files) = (name.to_owned(), units.clone(), steps.len());
        let told = event::Kind::Restored { workload, generation: number, files, units, took_ms };
        super::holds::tell(client, &told).await;
    }
    let done = json!({
        "workload": name, "generation": number, "dry_run": args.dry_run, "steps": steps, "units": units,
        "restored": restored, "blockers": blockers, "bytes": processes.bytes(),
        "took_ms": crate::control::millis(begun.elapsed()),
    });
    tell(json, &done, || {
        let line = |text: &String| format!("\n  {}", show::plain(text));
        let mut lines: String = steps.iter().map(line).collect();
        let verb = if args.dry_run { "would be restored" } else { "is what it was" };
        lines.extend(units.iter().map(|unit| line(&format!("{unit} {verb}, with its memory"))));
        if !blockers.is_empty() {
            lines.push_str("\nin the way:");
            lines.extend(blockers.iter().map(line));
        }
        if args.dry_run {
            format!("this would be done to have snapshot {number} of {name} back:{lines}")
        } else {
            format!("snapshot {number} of {name} is back:{lines}")
        }
    })?;
    Ok(if blockers.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) })
}

/// Files that are put back, and their sizes then.
fn sizes(files: Option<&Files>) -> BTreeMap<PathBuf, u64> {
    let entries = files.into_iter().flat_map(|files| &files.captured().entries);
    let sizes = entries.filter_map(|entry| match &entry.kind {
        files::Kind::File { size, .. } => Some((entry.path.clone(), *size)),
        _ => None,
    });
    sizes.collect()
}

/// Stops what runs, puts the files back, restores the units; nothing is known to be in the way.
async fn go(
    systemd: &Systemd,
    extracted: &Extracted,
    stop: bool,
    limit: Duration,
    put_back: impl FnOnce() -> Result<(), Failure>,
) -> Result<Vec<unit::Restored>, Failure> {
    let criu = Criu::find().map_err(local)?;
    for (unit, _) in extracted.units.iter().rev().filter(|_| stop) {
        let stopped = systemd.stop(unit, limit).await;
        stopped.map_err(|cause| local(UnitError::Systemd { what: "stopping", unit: unit.clone(), cause }))?;
    }
    put_back()?;
    unit::restore_units(systemd, &criu, &extracted.units, limit).await.map_err(|error| {
        let units: Vec<_> = extracted.units.iter().map(|(unit, _)| unit.as_str()).collect();
        local(format!("{error}\n  without their memory: systemctl start {}", units.join(" ")))
    })
}
