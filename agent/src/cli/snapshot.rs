//! `ftctl snapshot` and `ftctl restore`: workloads kept in the store, and put back: their files, and their processes.
//!
//! They work on the store, CRIU and systemd themselves, as root, and not through the daemon: what is put back when
//! things are at their worst must not need a running ftd, nor its sandbox opened. The store takes one writer at a time,
//! whoever it is. A running ftd is asked to keep its hands off the units meanwhile ([`holds`]), and told what was done.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use bytesize::ByteSize;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{
    NOT_WELL,
    client::{Client, Failure},
    show,
};
use crate::{
    config::{self, Config, Workload, unit_name},
    event,
    heal::saved::boot_id,
    snapshot::{
        files::{Contents as _, Difference, Entry, Plan, Selection, compare, diff, look},
        generation::{Files, selection, take},
        process::Processes,
        store::{About, Generation, Kind, Retention, Settings, Store},
    },
    unit::definition,
};

mod holds;
mod processes;

/// Lines of a file's difference that are shown.
const DIFF_LINES: usize = 60;
/// A file of which more than this is different is not read to be shown.
const DIFF_BYTES: u64 = 1 << 20;

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// Take a snapshot of a workload.
    Take(TakeArgs),
    /// List what there is.
    List {
        /// Only of this workload.
        workload: Option<String>,
    },
    /// Show what is in a snapshot.
    Show(Which),
    /// Show how the files differ now from a snapshot.
    Diff(Which),
    /// Mark a snapshot good: what `ftctl restore` puts back when it is not told otherwise.
    Good(Which),
    /// Read everything, and say what is damaged.
    Verify,
    /// Write a snapshot into a file, to keep it elsewhere.
    Export {
        #[command(flatten)]
        which: Which,
        /// The file; it must not be there yet.
        file: PathBuf,
    },
    /// Take in a snapshot that was exported.
    Import {
        /// The file.
        file: PathBuf,
    },
    /// Let old snapshots go (`snapshot.keep` of each workload stay, and the last good one), and free their room.
    Gc,
}

#[derive(Debug, Args)]
pub(super) struct TakeArgs {
    /// The workload, or one of its units.
    workload: String,
    /// It serves well as it is: mark the snapshot good.
    #[arg(long)]
    good: bool,
    /// With the memory of its processes [default: as `snapshot = { process = ... }` of the workload says].
    #[arg(long, conflicts_with = "files_only")]
    process: bool,
    /// Its files alone.
    #[arg(long)]
    files_only: bool,
    /// Stop the units by it: they end when the snapshot is there, and not before. Implies --process.
    #[arg(long, conflicts_with = "files_only")]
    stop: bool,
}

#[derive(Debug, Args)]
pub(super) struct Which {
    /// The workload, or one of its units.
    workload: String,
    /// The snapshot's number; the last good one when left out, or the newest where none is good.
    #[arg(long, value_name = "NUMBER")]
    generation: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    which: Which,
    /// Remove files that are not in the snapshot.
    #[arg(long)]
    exact: bool,
    /// Only say what would be done, and all that is in the way of it.
    #[arg(long)]
    dry_run: bool,
    /// Only the files: processes go on, or stay down.
    #[arg(long, conflicts_with_all = ["processes", "stop"])]
    files_only: bool,
    /// The processes too, or nothing; without a number, from the last good snapshot that has them.
    #[arg(long)]
    processes: bool,
    /// Stop units that run. What they hold in memory now is lost.
    #[arg(long)]
    stop: bool,
}

/// The configuration and the store.
struct Place {
    config: Config,
    store: Store,
}

fn local(error: impl std::fmt::Display) -> Failure {
    Failure::Local(error.to_string())
}

impl Place {
    fn open(path: &Path) -> Result<Self, Failure> {
        if !nix::unistd::geteuid().is_root() {
            return Err(local(
                "snapshots hold files of root's, and so only root may use them\n  mend: use sudo",
            ));
        }
        let config = Config::load(path).map_err(local)?;
        let settings = Settings { quota: Some(config.snapshot.quota.as_u64()), ..Settings::default() };
        let store = Store::open(&config.node.state_dir.join("snapshots"), settings).map_err(local)?;
        Ok(Self { config, store })
    }

    /// A workload by its name, or by that of one of its units.
    fn workload(&self, name: &str) -> Result<&Workload, Failure> {
        let named = |workload: &&Workload| workload.name.as_ref() == name;
        let of_unit = |workload: &&Workload| {
            workload.units.iter().any(|unit| unit_name(unit.as_ref()) == unit_name(name))
        };
        let all = &self.config.workloads;
        all.iter().find(named).or_else(|| all.iter().find(of_unit)).ok_or_else(|| {
            let known: Vec<_> = all.iter().map(|workload| workload.name.as_ref().as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            local(format!("there is no workload {name}; there are: {known}\n  mend: see ftctl config show"))
        })
    }

    fn selection(workload: &Workload) -> Result<Selection, Failure> {
        if !workload.has_files() {
            return Err(local(format!(
                "workload {} has no files\n  mend: name them in the configuration, like files = [\"/etc/nginx\"]",
                workload.name.as_ref()
            )));
        }
        let definitions = workload.units.iter().map(|unit| definition::find(&unit_name(unit.as_ref())));
        selection(workload, &definitions.collect::<Vec<_>>()).map_err(local)
    }

    /// The name of the workload that is meant, also of one that is only in the store, and the snapshot's number.
    fn which(&self, which: &Which) -> Result<(String, u64), Failure> {
        let stored = self.store.workloads().map_err(local)?;
        let name = match self.workload(&which.workload) {
            Ok(workload) => workload.name.as_ref().clone(),
            Err(_) if stored.contains(&which.workload) => which.workload.clone(),
            Err(error) => return Err(error),
        };
        if let Some(number) = which.generation {
            return Ok((name, number));
        }
        let number = self.newest(&name, None)?;
        Ok((name, number))
    }

    /// The last good snapshot, or the newest where none is good; of this kind, if one is given.
    fn newest(&self, name: &str, kind: Option<Kind>) -> Result<u64, Failure> {
        let all = self.store.generations(name).map_err(local)?;
        let mut all = all.iter().filter(|one| kind.is_none_or(|kind| kind == one.about.kind));
        let newest = all.clone().next_back();
        let found = all.rfind(|one| one.good).or(newest).map(|one| one.number);
        found.ok_or_else(|| {
            let (what, how) = match kind {
                Some(Kind::Process) => (" that has its processes", " --process"),
                _ => ("", ""),
            };
            local(format!("there is no snapshot of {name}{what}\n  mend: ftctl snapshot take {name}{how}"))
        })
    }

    fn files(&self, which: &Which) -> Result<(String, u64, Files), Failure> {
        let (name, number) = self.which(which)?;
        if !Files::any(&self.store, &name, number).map_err(local)? {
            return Err(local(format!(
                "snapshot {number} of {name} holds processes alone\n  mend: choose another one, see ftctl snapshot list"
            )));
        }
        let files = Files::open(&self.store, &name, number).map_err(local)?;
        Ok((name, number, files))
    }
}

fn bar(json: bool) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{bar:30} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta}",
    );
    // It is drawn on standard error, and only where that is a terminal.
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::no_length() };
    // The template is a constant, and valid.
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}

fn advance(bar: &ProgressBar) -> impl FnMut(u64, u64) + '_ {
    |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    }
}

fn value(workload: &str, generation: &Generation) -> serde_json::Value {
    json!({
        "workload": workload,
        "generation": generation.number,
        "time": generation.about.time,
        "node": generation.about.node,
        "kind": kind_name(generation.about.kind),
        "good": generation.good,
        "origin": generation.origin,
        "bytes": generation.stats.total,
        "new_bytes": generation.stats.new,
        "stored_bytes": generation.stats.stored,
    })
}

pub(super) async fn snapshot(
    client: &Client,
    command: SnapshotCommand,
    config: &Path,
    json: bool,
) -> Result<ExitCode, Failure> {
    let place = Place::open(config)?;
    match command {
        SnapshotCommand::Take(args) => take_one(&place, client, &args, json).await?,
        SnapshotCommand::List { workload } => list(&place, workload.as_deref(), json)?,
        SnapshotCommand::Show(which) => contents(&place, &which, json)?,
        SnapshotCommand::Diff(which) => return differences(&place, &which, json),
        SnapshotCommand::Good(which) => {
            let (name, number) = place.which(&which)?;
            place.store.mark_good(&name, number).map_err(local)?;
            tell(json, &json!({ "workload": name, "generation": number, "good": true }), || {
                format!("snapshot {number} of {name} is good")
            })?;
        }
        SnapshotCommand::Verify => return verify(&place, json),
        SnapshotCommand::Export { which, file } => {
            let (name, number) = place.which(&which)?;
            let bytes = export(&place.store, &name, number, &file)?;
            tell(
                json,
                &json!({ "workload": name, "generation": number, "file": file, "bytes": bytes }),
                || format!("snapshot {number} of {name} is in {} ({})", file.display(), ByteSize::b(bytes)),
            )?;
        }
        SnapshotCommand::Import { file } => {
            let source = File::open(&file).map_err(|error| local(format!("{}: {error}", file.display())))?;
            let bar = bar(json);
            let generation = place.store.import(BufReader::new(source), advance(&bar)).map_err(local)?;
            bar.finish_and_clear();
            let name = &generation.about.workload;
            tell(json, &value(name, &generation), || {
                format!("snapshot {} of {name}, taken on {}", generation.number, generation.about.node)
            })?;
        }
        SnapshotCommand::Gc => {
            let (mut generations, mut bytes) = (Vec::new(), 0);
            for kind in [Kind::Files, Kind::Process] {
                let count = Some(place.config.snapshot.keep);
                let retention = Retention { count, kind: Some(kind), ..Retention::default() };
                let freed = place.store.sweep(&retention, jiff::Timestamp::now()).map_err(local)?;
                generations.extend(freed.generations);
                bytes += freed.bytes;
            }
            tell(json, &json!({ "generations": generations, "bytes": bytes }), || {
                format!("{} snapshots gone, {} free again", generations.len(), ByteSize::b(bytes))
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(json: bool, value: &serde_json::Value, text: impl FnOnce() -> String) -> Result<(), Failure> {
    if json {
        return show::json(value);
    }
    show::line(&text());
    Ok(())
}

/// What is taken, and of what.
fn about(place: &Place, workload: &Workload, kind: Kind) -> About {
    About {
        workload: workload.name.as_ref().clone(),
        kind,
        node: place.config.node_name(),
        boot_id: boot_id(),
        time: jiff::Timestamp::now(),
    }
}

async fn take_one(place: &Place, client: &Client, args: &TakeArgs, json: bool) -> Result<(), Failure> {
    let workload = place.workload(&args.workload)?;
    let by_itself = workload.snapshot.as_ref().is_some_and(|schedule| schedule.process);
    let name = workload.name.as_ref();
    let with_processes = args.process || args.stop || by_itself && !args.files_only;
    let (mut generation, captured, frozen_us, took) = if with_processes {
        let taken = processes::take(place, client, workload, args.stop, json).await?;
        (taken.generation, taken.captured, taken.frozen_us, taken.took)
    } else {
        let (about, begun) = (about(place, workload, Kind::Files), std::time::Instant::now());
        let (generation, captured) =
            take(&place.store, about, &Place::selection(workload)?).map_err(local)?;
        (generation, Some(captured), 0, begun.elapsed())
    };
    if args.good {
        place.store.mark_good(name, generation.number).map_err(local)?;
        generation.good = true;
    }
    let stats = generation.stats;
    let told = event::Kind::SnapshotTaken {
        workload: name.clone(),
        generation: generation.number,
        kind: kind_name(generation.about.kind).into(),
        frozen_us,
        took_ms: crate::control::millis(took),
        bytes: stats.total,
        new_bytes: stats.new,
        stored_bytes: stats.stored,
    };
    holds::tell(client, &told).await;
    let mut all = value(name, &generation);
    all["frozen_us"] = frozen_us.into();
    all["took_ms"] = crate::control::millis(took).into();
    let captured = captured.unwrap_or_default();
    all["files"] = captured.entries.len().into();
    all["unmatched"] = json!(captured.unmatched);
    all["skipped"] = json!(captured.skipped);
    tell(json, &all, || {
        let unmatched = captured.unmatched.iter().map(|pattern| format!("nothing there: {pattern}"));
        let skipped = captured.skipped.iter();
        let skipped = skipped.map(|one| format!("left out: {}: {}", one.path.display(), one.why));
        let notes: String =
            unmatched.chain(skipped).map(|note| format!("\n  {}", show::plain(&note))).collect();
        let stopped = format!("\n  its units are stopped; to have them back: ftctl restore {name}");
        let (good, stopped) = (if args.good { "; good" } else { "" }, if args.stop { &*stopped } else { "" });
        format!(
            "snapshot {} of {name}: {} files{}, {}, of which {} are new{good}{notes}{stopped}",
            generation.number,
            captured.entries.len(),
            match frozen_us {
                _ if !with_processes => String::new(),
                0 => " and its processes".to_owned(),
                frozen => format!(" and its processes, which stood still for {frozen} us"),
            },
            ByteSize::b(stats.total),
            ByteSize::b(stats.new),
        )
    })
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Files => "files",
        Kind::Process => "process",
    }
}

fn list(place: &Place, only: Option<&str>, json: bool) -> Result<(), Failure> {
    let only = only.map(|name| match place.workload(name) {
        Ok(workload) => workload.name.as_ref().clone(),
        // It may be in the store alone.
        Err(_) => name.to_owned(),
    });
    let mut all = Vec::new();
    for name in place.store.workloads().map_err(local)? {
        if only.as_ref().is_none_or(|only| *only == name) {
            let generations = place.store.generations(&name).map_err(local)?;
            all.extend(generations.into_iter().map(|generation| (name.clone(), generation)));
        }
    }
    if json {
        return show::json(&all.iter().map(|(name, one)| value(name, one)).collect::<Vec<_>>());
    }
    let mut table = show::table(&["WORKLOAD", "NUMBER", "KIND", "TAKEN", "ON", "BYTES", "STORED", "GOOD"]);
    for (name, generation) in &all {
        table.add_row([
            name.clone(),
            generation.number.to_string(),
            kind_name(generation.about.kind).to_owned(),
            generation.about.time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
            generation.about.node.clone(),
            ByteSize::b(generation.stats.total).to_string(),
            ByteSize::b(generation.stats.stored).to_string(),
            if generation.good { "good" } else { "" }.to_owned(),
        ]);
    }
    let used = ByteSize::b(place.store.used().map_err(local)?);
    show::line(&table.to_string());
    show::line(&format!("{} snapshots, {used} of {} used", all.len(), place.config.snapshot.quota));
    Ok(())
}

fn contents(place: &Place, which: &Which, json: bool) -> Result<(), Failure> {
    let (name, number) = place.which(which)?;
    let units = match place.store.manifest(&name, number).map_err(local)?.about.kind {
        Kind::Process => Processes::open(&place.store, &name, number).and_then(|all| all.records()),
        Kind::Files => Ok(Vec::new()),
    };
    let units = units.map_err(local)?;
    let files = Files::any(&place.store, &name, number).map_err(local)?;
    let files = files.then(|| Files::open(&place.store, &name, number)).transpose().map_err(local)?;
    let captured = files.map(|files| files.captured().clone()).unwrap_or_default();
    if json {
        return show::json(
            &json!({ "workload": name, "generation": number, "files": captured, "units": units }),
        );
    }
    show::line(&format!("snapshot {number} of {name}"));
    if !units.is_empty() {
        let mut table = show::table(&["UNIT", "MAIN", "TAKEN", "FROZEN", "CRIU", "KERNEL"]);
        for unit in &units {
            table.add_row([
                show::plain(&unit.unit),
                unit.main_pid.to_string(),
                unit.taken.strftime("%Y-%m-%d %H:%M:%S").to_string(),
                if unit.stopped { "stopped".into() } else { format!("{} us", unit.cost.frozen_us) },
                unit.criu.to_string(),
                show::plain(&unit.kernel),
            ]);
        }
        show::line(&table.to_string());
    }
    if !captured.entries.is_empty() {
        let mut table = show::table(&["MODE", "OWNER", "BYTES", "PATH"]);
        for entry in &captured.entries {
            let (size, path) = described(entry);
            let (mode, owner) = (format!("{:04o}", entry.mode), format!("{}:{}", entry.uid, entry.gid));
            table.add_row([mode, owner, size, path]);
        }
        show::line(&table.to_string());
    }
    Ok(())
}

fn described(entry: &Entry) -> (String, String) {
    use crate::snapshot::files::Kind;
    let path = show::plain(&entry.path.to_string_lossy());
    match &entry.kind {
        Kind::File { size, .. } => (size.to_string(), path),
        Kind::Dir => (String::new(), format!("{path}/")),
        Kind::Symlink { target } => {
            (String::new(), format!("{path} -> {}", show::plain(&target.to_string_lossy())))
        }
    }
}

fn differences(place: &Place, which: &Which, json: bool) -> Result<ExitCode, Failure> {
    let (name, number, files) = place.files(which)?;
    let workload = place.workload(&name)?;
    let then = files.captured();
    let now = look(&Place::selection(workload)?, &then.entries).map_err(local)?;
    let different = compare(&then.entries, &now.entries, Some(&files));
    if json {
        show::json(&json!({ "workload": name, "generation": number, "differences": different }))?;
    } else if different.is_empty() {
        show::line(&format!("the files of {name} are those of snapshot {number}"));
    } else {
        for one in &different {
            show::line(&show::plain(&one.to_string()));
            if let Some(text) = text_of(one, &then.entries, &files) {
                show::line(text.trim_end());
            }
        }
    }
    Ok(if different.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) })
}

/// What is different inside a file that was and is there, if it is not too long.
fn text_of(different: &Difference, then: &[Entry], files: &Files) -> Option<String> {
    let old = then.iter().find(|entry| entry.path == different.path)?;
    let short = |size: u64| size <= DIFF_BYTES;
    let crate::snapshot::files::Kind::File { size, .. } = old.kind else { return None };
    let new = File::open(&different.path).ok().filter(|file| file.metadata().is_ok_and(|m| m.is_file()))?;
    if !short(size) || !new.metadata().is_ok_and(|metadata| short(metadata.len())) {
        return None;
    }
    let (mut before, mut after) = (Vec::new(), Vec::new());
    files.open(old).ok()?.read_to_end(&mut before).ok()?;
    new.take(DIFF_BYTES).read_to_end(&mut after).ok()?;
    Some(diff::diff(&different.path, &before, &after, DIFF_LINES)).filter(|text| !text.is_empty())
}

fn verify(place: &Place, json: bool) -> Result<ExitCode, Failure> {
    let bar = bar(json);
    let verified = place.store.verify(advance(&bar)).map_err(local)?;
    bar.finish_and_clear();
    let damage: Vec<_> = verified.damage.iter().map(ToString::to_string).collect();
    let sound = damage.is_empty();
    tell(
        json,
        &json!({
            "whole": verified.whole, "chunks": verified.chunks, "bytes": verified.bytes, "damage": damage
        }),
        || {
            let read = format!("{} read", ByteSize::b(verified.bytes));
            let lines: String = damage.iter().map(|one| format!("\n  {}", show::plain(one))).collect();
            format!("{} snapshots are whole, {} damages; {read}{lines}", verified.whole, damage.len())
        },
    )?;
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) })
}

/// Into a new file, which is whole when this returns and not there when it fails.
fn export(store: &Store, workload: &str, number: u64, file: &Path) -> Result<u64, Failure> {
    let at = |error: io::Error| local(format!("{}: {error}", file.display()));
    let out = File::create_new(file).map_err(at)?;
    let written = (|| {
        let mut out = BufWriter::new(out);
        let bytes = store.export(workload, number, &mut out).map_err(local)?;
        out.flush().map_err(at)?;
        out.get_ref().sync_all().map_err(at)?;
        Ok(bytes)
    })();
    if written.is_err() {
        // It is ours, and of no use.
        let _ = std::fs::remove_file(file);
    }
    written
}

pub(super) async fn restore(
    client: &Client,
    args: &RestoreArgs,
    config: &Path,
    json: bool,
) -> Result<ExitCode, Failure> {
    let place = Place::open(config)?;
    let (name, mut number) = place.which(&args.which)?;
    if args.processes && args.which.generation.is_none() {
        number = place.newest(&name, Some(Kind::Process))?;
    }
    let kind = place.store.manifest(&name, number).map_err(local)?.about.kind;
    if args.processes || kind == Kind::Process && !args.files_only {
        return processes::restore(&place, client, args, &name, number, json).await;
    }
    let begun = std::time::Instant::now();
    let (name, number, files) = place.files(&Which { workload: name, generation: Some(number) })?;
    let plan = plan(&place, args, &name, &files)?;
    let steps: Vec<_> = plan.steps().iter().map(ToString::to_string).collect();
    if !args.dry_run {
        let bar = bar(json);
        plan.apply(&files, &mut advance(&bar)).map_err(local)?;
        bar.finish_and_clear();
        let took_ms = crate::control::millis(begun.elapsed());
        let (workload, files) = (name.clone(), steps.len());
        let told = event::Kind::Restored { workload, generation: number, files, units: Vec::new(), took_ms };
        holds::tell(client, &told).await;
    }
    let done = json!({ "workload": name, "generation": number, "dry_run": args.dry_run, "steps": steps });
    tell(json, &done, || {
        let lines: String = steps.iter().map(|step| format!("\n  {}", show::plain(step))).collect();
        match (steps.is_empty(), args.dry_run) {
            (true, _) => format!("the files of {name} are those of snapshot {number}: nothing to do"),
            (_, true) => format!("this would be done to have snapshot {number} of {name} back:{lines}"),
            _ => format!(
                "snapshot {number} of {name} is back:{lines}\n  the service reads it when it is reloaded"
            ),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What it takes to have the files back.
fn plan<'a>(place: &Place, args: &RestoreArgs, name: &str, files: &'a Files) -> Result<Plan<'a>, Failure> {
    let selection = if args.exact { Some(Place::selection(place.workload(name)?)?) } else { None };
    Plan::new(files.captured(), selection.as_ref()).map_err(local)
}

/// Where the configuration is.
#[derive(Debug, Args)]
pub(super) struct ConfigAt {
    /// The configuration file.
    #[arg(long, global = true, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub(super) config: PathBuf,
}
