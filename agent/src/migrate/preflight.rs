//! What is looked at before a service is touched, on both nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use super::{
    Inner, Mode, Refused, Request, address,
    wire::{InTheWay, Offer, OfferedUnit},
};
use crate::{
    config::unit_name,
    heal::machine::Phase,
    snapshot::{
        criu::{Criu, images, unit},
        scratch::memory_of,
    },
    unit::cgroup,
};

/// What is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) workload: String,
    pub(super) to: String,
    pub(super) units: Vec<OfferedUnit>,
    /// Bytes of memory, about.
    pub(super) bytes: u64,
    pub(super) address: Option<String>,
    machine: String,
    criu: crate::snapshot::criu::Version,
}

impl Plan {
    pub(super) fn offer(&self, id: &str, dry_run: bool) -> Offer {
        Offer {
            id: id.into(),
            dry_run,
            workload: self.workload.clone(),
            units: self.units.clone(),
            bytes: self.bytes,
            machine: self.machine.clone(),
            criu: self.criu,
            address: self.address.clone(),
        }
    }
}

fn machine() -> String {
    nix::sys::utsname::uname().map(|name| name.machine().to_string_lossy().into_owned()).unwrap_or_default()
}

/// All that can be known ahead; touches nothing, here or there.
pub(super) async fn plan(inner: &Inner, request: &Request) -> Result<Plan, Refused> {
    let Request { what, to, mode, .. } = request;
    let here = inner.peers.node();
    if to == here {
        let mend = "name another node: ftctl cluster peers";
        return Err(Refused::new(format!("{what} cannot be moved to {to}: that is this node"), mend));
    }
    let status = inner.supervisor.status();
    let name = unit_name(what);
    let found = inner.supervisor.find(what).map(|(_, id)| id);
    let of =
        status.iter().find(|unit| unit.workload == *what || found.as_ref().is_ok_and(|id| *id == unit.unit));
    let workload = of.map(|unit| unit.workload.clone()).ok_or_else(|| {
        let known: BTreeSet<_> = status.iter().map(|unit| unit.workload.as_str()).collect();
        let known: Vec<_> = known.into_iter().collect();
        let mend = format!("there are: {}; put it into [[workload]] on both nodes", known.join(", "));
        Refused::new(format!("neither a workload {what} nor a unit {name} is under ftd's care here"), mend)
    })?;
    reachable(inner, what, to)?;
    let members: Vec<_> = status.into_iter().filter(|unit| unit.workload == workload).collect();
    {
        let moves = inner.moves();
        if let Some(id) = members.iter().find_map(|unit| moves.units.get(&unit.unit)) {
            let mend = "wait for its end: ftctl events --follow";
            return Err(Refused::new(format!("{workload} is on the move already ({id})"), mend));
        }
    }
    for unit in &members {
        let id = &unit.unit;
        if let Some(held) = &unit.held {
            let why = held.reason.as_deref().unwrap_or("by hand");
            let mend = format!("ftctl release {id}; where it runs elsewhere, move it from there");
            return Err(Refused::new(format!("{id} is held ({why})"), mend));
        }
        if unit.phase != Phase::Up {
            let phase = format!("{:?}", unit.phase).to_lowercase();
            let mend = "only what runs can be moved; see: ftctl status";
            return Err(Refused::new(format!("{id} is {phase} ({}) here", unit.active_state), mend));
        }
    }
    able(*mode).await?;
    let (mut units, mut bytes) = (Vec::new(), 0);
    for member in &members {
        let id = &member.unit;
        let report =
            unit::check(&inner.systemd, id).await.map_err(|error| Refused::new(error, "see: ftctl check"))?;
        if !report.ready() {
            let mend = format!("see: ftctl check {id}");
            return Err(Refused::new(format!("{id} cannot be moved: {}", report.blockers()), mend));
        }
        let service =
            inner.systemd.service(id).await.map_err(|error| Refused::new(error, "see: systemctl status"))?;
        // Nobody could feed it while it stands still, and systemd would kill what is not to be lost.
        if let Some(limit) = service.watchdog {
            let limit = humantime::format_duration(limit);
            let error =
                format!("{id} cannot be moved: its watchdog ({limit}) cannot wait while it stands still");
            return Err(Refused::new(error, format!("set WatchdogSec=0 for {id} and restart it")));
        }
        let looked =
            tokio::task::spawn_blocking(move || look(&service.control_group, service.main_pid)).await;
        let (unit, memory) = looked.map_err(|error| Refused::new(error, "see: journalctl -u ftd"))?;
        bytes += memory;
        units.push(OfferedUnit { unit: id.clone(), ..unit });
    }
    let criu = tokio::task::spawn_blocking(|| Criu::find().and_then(|criu| criu.version())).await;
    let criu = criu.map_err(|error| Refused::new(error, ""))?;
    let criu = criu.map_err(|error| Refused::new(error, "see: ftctl doctor"))?;
    let address = address::of(&inner.config, &workload).await?;
    let plan = Plan { workload, to: to.clone(), units, bytes, address, machine: machine(), criu };
    let asked = inner.peers.call(to, &plan.offer(&"0".repeat(16), true)).await;
    let in_the_way = asked.map_err(|error| {
        Refused::new(
            format!("{what} is not moved: {error}"),
            "see: ftctl cluster peers, and ftd's state there",
        )
    })?;
    in_the_way_of(what, to, &in_the_way)?;
    Ok(plan)
}

pub(super) fn in_the_way_of(what: &str, to: &str, in_the_way: &InTheWay) -> Result<(), Refused> {
    if in_the_way.is_empty() {
        return Ok(());
    }
    let (errors, mends): (Vec<_>, Vec<_>) = in_the_way.iter().map(|(e, m)| (e.as_str(), m.as_str())).unzip();
    Err(Refused::new(format!("{what} cannot go to {to}: {}", errors.join("; ")), mends.join("; ")))
}

fn reachable(inner: &Inner, what: &str, to: &str) -> Result<(), Refused> {
    if inner.peers.connected(to) {
        return Ok(());
    }
    let status = inner.peers.status();
    match status.peers.iter().find(|peer| peer.name == to) {
        Some(peer) => {
            let (cause, mend) =
                peer.problem.clone().unwrap_or_else(|| ("there is no connection".into(), String::new()));
            Err(Refused::new(format!("{what} cannot go to {to}, which cannot be reached: {cause}"), mend))
        }
        None => {
            let known: Vec<_> = status.peers.iter().map(|peer| peer.name.as_str()).collect();
            let mend = match known.as_slice() {
                [] => "this node has no peers: ftctl cluster".to_owned(),
                known => format!("there are: {}", known.join(", ")),
            };
            Err(Refused::new(format!("{what} cannot go to {to}: there is no such node"), mend))
        }
    }
}

/// Whether this can be done in this way.
async fn able(mode: Mode) -> Result<(), Refused> {
    let mend = "use --mode stop-copy, or leave it to --mode auto";
    match mode {
        Mode::Auto | Mode::StopCopy => Ok(()),
        Mode::PreCopy => {
            let asked = tokio::task::spawn_blocking(|| Criu::find().and_then(|criu| criu.abilities())).await;
            let tracks = matches!(&asked, Ok(Ok(abilities)) if abilities.mem_track);
            let cause = if tracks {
                "this version of ftd does not copy in rounds yet"
            } else {
                "this kernel does not tell which pages were written (CONFIG_MEM_SOFT_DIRTY)"
            };
            Err(Refused::new(format!("pre-copy is not possible: {cause}"), mend))
        }
        Mode::PostCopy => Err(Refused::new(
            "post-copy is not possible: this version of ftd does not bring memory afterwards yet",
            mend,
        )),
    }
}

/// What the target must have for this tree, and how much memory it has.
fn look(control_group: &str, main_pid: u32) -> (OfferedUnit, u64) {
    let pids =
        cgroup::directory(control_group).and_then(|dir| cgroup::processes(&dir).ok()).unwrap_or_default();
    let (mut ids, mut files) = (BTreeSet::new(), BTreeMap::new());
    for pid in &pids {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        ids.extend(tasks.filter_map(|task| task.file_name().to_str()?.parse::<u32>().ok()));
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may have anything in it: state, parent, group, session.
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        ids.extend(rest.split_whitespace().skip(2).take(2).filter_map(|id| id.parse::<u32>().ok()));
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        for line in maps.lines() {
            let mut words = line.splitn(6, ' ');
            let executable = words.nth(1).is_some_and(|rights| rights.contains('x'));
            let path = words.last().map(str::trim).unwrap_or_default();
            if executable && path.starts_with('/') && !path.ends_with(" (deleted)") {
                files.insert(path.to_owned(), *pid);
            }
        }
    }
    ids.remove(&0);
    let files = files.into_iter().map(|(path, pid)| {
        // As the process sees it.
        let seen = PathBuf::from(format!("/proc/{pid}/root")).join(path.trim_start_matches('/'));
        let id = images::build_id(&seen).ok().flatten();
        (path, id)
    });
    let unit =
        OfferedUnit { unit: String::new(), main_pid, ids: ids.into_iter().collect(), files: files.collect() };
    (unit, memory_of(&pids))
}

/// What is in the way of an offer, on the target.
pub(super) async fn in_the_way(inner: &Inner, from: &str, offer: &Offer) -> InTheWay {
    let mut all = InTheWay::new();
    let mut say = |error: String, mend: &str| all.push((error, mend.to_owned()));
    let here = inner.peers.node();
    let workload = inner.config.workloads.iter().find(|one| *one.name.as_ref() == offer.workload);
    match workload {
        None => say(
            format!("{here} has no workload {}", offer.workload),
            &format!(
                "put it into [[workload]] of ftd.toml on {here} as it is on {from}, and restart ftd there"
            ),
        ),
        Some(workload) => {
            let nodes = &workload.nodes;
            let may = |node: &str| nodes.is_empty() || nodes.iter().any(|one| *one.as_ref() == *node);
            if !may(here) || !may(from) {
                say(
                    format!("{} is not to be on {here} (nodes)", offer.workload),
                    &format!("name both nodes in nodes = [...] of that workload on {here}"),
                );
            }
        }
    }
    let own = machine();
    if own != offer.machine {
        say(format!("{here} is a machine of the kind {own}, not {}", offer.machine), "choose another node");
    }
    let criu = tokio::task::spawn_blocking(|| Criu::find().and_then(|criu| criu.version())).await;
    match criu {
        Ok(Ok(version)) if version.major < offer.criu.major => say(
            format!("CRIU is {version} on {here} and {} on {from}", offer.criu),
            &format!("install a newer package criu on {here}"),
        ),
        Ok(Ok(_)) => {}
        Ok(Err(error)) => say(format!("{here}: {error}"), &format!("see `ftctl doctor` on {here}")),
        Err(error) => say(error.to_string(), ""),
    }
    let taken = {
        let moves = inner.moves();
        offer.units.iter().find(|unit| moves.units.contains_key(&unit.unit)).map(|unit| unit.unit.clone())
    };
    if let Some(unit) = taken {
        say(format!("{unit} is on the move on {here} already"), "wait for its end: ftctl events --follow");
    }
    for unit in &offer.units {
        let id = &unit.unit;
        match inner.systemd.service(id).await {
            Ok(service) if service.load_state != "loaded" => say(
                format!("{id} is {} on {here}", service.load_state),
                &format!("install the service on {here}: systemctl status {id}"),
            ),
            Ok(service) if !matches!(service.active_state.as_str(), "inactive" | "failed") => say(
                format!("{id} is {} on {here}", service.active_state),
                &format!(
                    "stop it there: ftctl hold {id}, systemctl stop {id}; what it holds in memory is lost by that"
                ),
            ),
            Ok(_) => {}
            Err(error) => say(format!("{id} on {here}: {error}"), &format!("install the service on {here}")),
        }
        if inner.supervisor.find(id).is_err() {
            say(
                format!("{id} is not under ftd's care on {here}"),
                "restart ftd there if its configuration has changed",
            );
        }
    }
    let (units, name) = (offer.units.clone(), here.to_owned());
    let looked = tokio::task::spawn_blocking(move || misfits(&units, &name)).await;
    match looked {
        Ok(misfits) => all.extend(misfits),
        // What could not be looked at is not known to fit.
        Err(error) => all.push((format!("{here}: {error}"), format!("see `journalctl -u ftd` on {here}"))),
    }
    if let Err(error) = address::fits(offer.address.as_deref()).await {
        all.push((format!("{here}: {}", error.error), error.mend));
    }
    if let Err(error) = inner.places.room_for(offer.bytes) {
        all.push((format!("{here}: {error}"), String::new()));
    }
    all
}

fn misfits(units: &[OfferedUnit], here: &str) -> InTheWay {
    let mut all = InTheWay::new();
    for unit in units {
        let id = &unit.unit;
        for pid in &unit.ids {
            // Threads too can be asked for by their number, though they are not listed.
            if let Ok(comm) = fs::read_to_string(format!("/proc/{pid}/comm")) {
                let error = format!("PID {pid} of {id} belongs to {} on {here}", comm.trim());
                all.push((error, "wait for its end, or end it".into()));
            }
        }
        for (path, build_id) in &unit.files {
            match (images::build_id(Path::new(path)), build_id) {
                (Err(error), _) if error.kind() == std::io::ErrorKind::NotFound => {
                    all.push((
                        format!("{path} of {id} is missing on {here}"),
                        format!("install it on {here}"),
                    ));
                }
                (Ok(found), Some(wanted)) if found.as_ref() != Some(wanted) => {
                    let mend = "install the same version of the package on both nodes".to_owned();
                    all.push((format!("{path} of {id} is another build on {here}"), mend));
                }
                _ => {}
            }
        }
    }
    all
}
