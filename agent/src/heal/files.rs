//! Carries out what the [`guard`](super::guard) of a workload's files wants done, and feeds back how it went.
//!
//! One task for each workload that has files. It learns of changes from inotify, of the service from the stream of
//! events, and asks systemd, the store and the file system; what is to be done is decided by the guard alone.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{broadcast, mpsc};

use super::{
    guard::{Change, Found, Guard, Input, Output, Phase, Policy, Service},
    machine,
    saved::boot_id,
    supervisor::{Supervisor, boot_now},
};
use crate::{
    config,
    event::{Cause, Event, FileChange, Kind, OpId, bus::Bus},
    probe::BootNs,
    snapshot::{
        files::{self, Batch, Contents as _, Plan, Selection, Timing, compare, diff, look},
        generation::{Files, take},
        store::{self, About, Retention, Store},
    },
    unit::{
        definition::{self, Definition},
        manager::{Command, Systemd},
    },
};

/// Where the output of checkers goes for the moment: ftd's own directory.
const CHECKS: &str = "/run/ftd";
/// Where programs that are named without a directory are looked for.
const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// What says whether unit files are valid. Mere notes, of settings that have a better name today, are not asked for.
const VERIFY: [&str; 3] = ["systemd-analyze", "verify", "--man=no"];
const VERIFY_ENVIRONMENT: [&str; 1] = ["SYSTEMD_LOG_LEVEL=warning"];
/// Of what a checker says, and of a difference, so much goes into an event.
const WORDS: usize = 4 << 10;
const DIFF_LINES: usize = 30;
const DIFF_BYTES: u64 = 256 << 10;

/// What the watch over a workload's files needs.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The workload.
    pub workload: String,
    /// systemd's names of its units, in order.
    pub units: Vec<String>,
    /// Its files.
    pub selection: Selection,
    /// Where its units are defined, each; part of the selection or not.
    pub definitions: Vec<Definition>,
    /// Its checker; without one every content is valid.
    pub check: Option<Vec<String>>,
    /// Times and limits.
    pub settings: config::Snapshot,
    /// This node, for the generations.
    pub node: String,
}

impl Watch {
    /// Whether a unit's own files are among those that are watched.
    fn selects(&self, definition: &Definition) -> bool {
        definition.paths().any(|path| self.selection.covers(path))
    }
}

/// With what it works.
#[derive(Debug, Clone)]
pub struct Hands {
    /// Events.
    pub bus: Arc<Bus>,
    /// How the units are, where events do not say it.
    pub supervisor: Arc<Supervisor>,
    /// systemd.
    pub systemd: Systemd,
    /// The generations.
    pub store: Store,
}

/// The checker that comes with a service, for those that ftd knows.
pub fn own_checker(unit: &str) -> Option<Vec<String>> {
    let words: &[&str] = match unit {
        "nginx.service" => &["nginx", "-t"],
        "apache2.service" | "httpd.service" => &["apachectl", "configtest"],
        _ => return None,
    };
    Some(words.iter().map(|word| (*word).to_owned()).collect())
}

/// Watches over the files, for ever.
pub async fn run(watch: Watch, hands: Hands) {
    let timing = Timing { settle: watch.settings.settle, at_most: watch.settings.settle_at_most };
    let unit = watch.units.first().map(String::as_str);
    let mut trouble = Trouble::new("watching the files", unit, &hands.bus, watch.settings.retry);
    let mut batches = loop {
        match files::watch(watch.selection.clone(), timing).await {
            Ok(batches) => break batches,
            Err(error) => trouble.wait(&error.to_string()).await,
        }
    };
    let mut trouble = Trouble::new("reading the snapshots", unit, &hands.bus, watch.settings.retry);
    let good = loop {
        match hands.last_good(&watch).await {
            Ok(good) => break good,
            Err(error) => trouble.wait(&error).await,
        }
    };
    let settings = &watch.settings;
    let policy = Policy {
        good_after: settings.good_after,
        put_backs: settings.put_backs,
        within: settings.within,
        retry: settings.retry,
    };
    let (answer, mut answers) = mpsc::unbounded_channel();
    let mut follower = hands.bus.follow();
    let mut task = Task {
        guard: Guard::new(policy, good),
        watch: Arc::new(watch),
        hands,
        answer,
        op: None,
        held: BTreeSet::new(),
        down: BTreeMap::new(),
        looking: false,
        again: false,
    };
    task.ask_supervisor(true);
    task.look();
    loop {
        let wake = task.guard.wake();
        let due = async {
            match wake {
                Some(at) => tokio::time::sleep(at.since(boot_now())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            batch = batches.recv() => match batch {
                Some(Batch { everything, .. }) => {
                    if let Some(why) = everything {
                        tracing::info!(workload = task.watch.workload, why, "all files are looked at");
                    }
                    task.look();
                }
                None => return,
            },
            input = answers.recv() => if let Some(input) = input { task.answered(input) },
            event = follower.recv() => match event {
                Ok(event) => task.heed(&event),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(workload = task.watch.workload, missed, "events came too fast");
                    task.ask_supervisor(false);
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
            () = due => task.feed(Input::Tick),
        }
    }
}

/// Something that must work before anything can be watched, and does not: told once for each cause, and tried again
/// after a while that grows. Nothing announces that a disk has recovered, or that there is room for one more watch.
pub struct Trouble<'a> {
    what: &'a str,
    unit: Option<&'a str>,
    bus: &'a Bus,
    told: Option<String>,
    wait: Duration,
    longest: Duration,
}

impl<'a> Trouble<'a> {
    /// With doing `what`; the first attempt after `retry`, the later ones with up to sixteen times that between them.
    pub fn new(what: &'a str, unit: Option<&'a str>, bus: &'a Bus, retry: Duration) -> Self {
        Self { what, unit, bus, told: None, wait: retry, longest: retry * 16 }
    }

    /// It does not work for this reason: returns when it is to be tried again.
    pub async fn wait(&mut self, error: &str) {
        if self.told.as_deref() != Some(error) {
            let kind = Kind::FilesTrouble { what: self.what.into(), error: error.into() };
            self.bus.emit(self.unit, None, kind);
            self.told = Some(error.into());
        }
        tokio::time::sleep(self.wait).await;
        self.wait = (self.wait * 2).min(self.longest);
    }
}

/// An outage of a unit.
#[derive(Debug, Clone, Copy)]
struct Outage {
    began: BootNs,
    /// The unit went down by itself, or does not come up: that may be its files' fault.
    by_itself: bool,
}

struct Task {
    guard: Guard,
    watch: Arc<Watch>,
    hands: Hands,
    answer: mpsc::UnboundedSender<Input>,
    /// The operation that is under way: from a change to its end.
    op: Option<OpId>,
    /// The units that are held.
    held: BTreeSet<String>,
    /// The units that do not serve.
    down: BTreeMap<String, Outage>,
    /// It is being found out what differs; and whether that has to be found out once more afterwards.
    looking: bool,
    again: bool,
}

impl Task {
    /// Has it found out what differs from the last good generation: one look at a time, so that none overtakes
    /// a newer one.
    fn look(&mut self) {
        if self.looking {
            self.again = true;
            return;
        }
        self.looking = true;
        let (watch, store, good) = (Arc::clone(&self.watch), self.hands.store.clone(), self.guard.good());
        self.beside(async move {
            let found = tokio::task::spawn_blocking(move || differences(&watch, &store, good)).await;
            match found.map_err(|error| error.to_string()).flatten() {
                Ok(found) => Input::Changed(found),
                // What cannot be looked at is for the checker to say something about.
                Err(error) => {
                    let told = FileChange { path: "the files".into(), what: error };
                    Input::Changed(Found {
                        changes: vec![Change { told, damage: false }],
                        good,
                        newest: None,
                    })
                }
            }
        });
    }

    /// Does something, and feeds its answer to the guard.
    fn beside(&self, deed: impl Future<Output = Input> + Send + 'static) {
        let answer = self.answer.clone();
        tokio::spawn(async move {
            // He who no longer listens has ended.
            let _ = answer.send(deed.await);
        });
    }

    fn answered(&mut self, input: Input) {
        if matches!(input, Input::Changed(_)) {
            self.looking = false;
            if std::mem::take(&mut self.again) {
                // What was found is out of date.
                return self.look();
            }
        }
        self.feed(input);
    }

    /// Learns how the units are from the supervisor: at first, and when events were missed.
    fn ask_supervisor(&mut self, first: bool) {
        let status = self.hands.supervisor.status();
        let ours: Vec<_> = status.iter().filter(|unit| self.watch.units.contains(&unit.unit)).collect();
        let known = std::mem::take(&mut self.down);
        for unit in ours.iter().filter(|unit| unit.outage.is_some() || unit.phase != machine::Phase::Up) {
            // Of what was down before ftd looked, nobody can say which came first, the outage or the change.
            let by_itself = !first && unit.outage.is_some_and(by_itself);
            let outage = Outage { began: boot_now(), by_itself };
            let outage = known.get(&unit.unit).copied().unwrap_or(outage);
            self.down.insert(unit.unit.clone(), outage);
        }
        self.tell_service();
        let held: BTreeSet<_> =
            ours.iter().filter(|unit| unit.held.is_some()).map(|unit| unit.unit.clone()).collect();
        self.hold(held);
    }

    fn hold(&mut self, held: BTreeSet<String>) {
        let before = !std::mem::replace(&mut self.held, held).is_empty();
        let now = !self.held.is_empty();
        if now != before {
            self.feed(Input::Held(now));
        }
    }

    /// The units that ftd has given up for files that are put back: what kept them from serving is gone.
    fn given_up(&self) -> Vec<String> {
        if self.guard.phase() != Phase::Reverting {
            return Vec::new();
        }
        let status = self.hands.supervisor.status().into_iter();
        let given_up = status.filter(|unit| unit.phase == machine::Phase::Failed && unit.held.is_none());
        let by_itself = |name: &String| self.down.get(name).is_some_and(|outage| outage.by_itself);
        given_up.map(|unit| unit.unit).filter(by_itself).collect()
    }

    fn heed(&mut self, event: &Event) {
        let Some(unit) = event.unit.as_ref().filter(|unit| self.watch.units.contains(unit)) else { return };
        match &event.kind {
            Kind::Down { cause, .. } => {
                let outage = Outage { began: boot_now(), by_itself: by_itself(*cause) };
                self.down.insert(unit.clone(), outage);
                self.tell_service();
            }
            // Whatever ended it: it does not come up.
            Kind::HealFailed { .. } => {
                if let Some(outage) = self.down.get_mut(unit) {
                    outage.by_itself = true;
                    self.tell_service();
                }
            }
            Kind::Healed { .. } | Kind::Started { .. } => {
                self.down.remove(unit);
                self.tell_service();
            }
            Kind::Held { .. } => self.hold(self.held.iter().chain([unit]).cloned().collect()),
            Kind::Released { .. } => {
                self.hold(self.held.iter().filter(|held| *held != unit).cloned().collect());
            }
            _ => {}
        }
    }

    fn tell_service(&mut self) {
        let by_itself = self.down.values().filter(|outage| outage.by_itself);
        let service = match by_itself.map(|outage| outage.began).max() {
            Some(began) => Service::Down(began),
            None if self.down.is_empty() => Service::Serves,
            None => Service::Away,
        };
        self.feed(Input::Service(service));
    }

    fn feed(&mut self, input: Input) {
        for output in self.guard.step(boot_now(), input) {
            self.carry_out(output);
        }
        if matches!(self.guard.phase(), Phase::Good | Phase::Unguarded | Phase::GivenUp) {
            self.op = None;
        }
    }

    fn carry_out(&mut self, output: Output) {
        let (watch, hands) = (Arc::clone(&self.watch), self.hands.clone());
        match output {
            Output::Note(kind) => self.note(kind),
            Output::Look => self.look(),
            Output::Check => {
                let changed = Changed::new(&self.guard);
                self.beside(async move { Input::Checked(check(&watch, &hands, &changed).await) });
            }
            Output::Apply => {
                let changed = Changed::new(&self.guard);
                let given_up = self.given_up();
                self.beside(async move { Input::Applied(apply(&watch, &hands, &changed, &given_up).await) });
            }
            Output::Store => {
                let (unit, op, bus) = (watch.units.first().cloned(), self.op, Arc::clone(&hands.bus));
                self.beside(async move {
                    let stored = tokio::task::spawn_blocking(move || store_files(&watch, &hands.store)).await;
                    let stored = stored.map_err(|error| error.to_string()).flatten();
                    Input::Stored(stored.map(|(number, kind)| {
                        bus.emit(unit.as_deref(), op, kind);
                        number
                    }))
                });
            }
            Output::PutBack(number) => self.beside(async move {
                let (watching, store) = (Arc::clone(&watch), hands.store.clone());
                let done = tokio::task::spawn_blocking(move || put_back(&watching, &store, number)).await;
                let mut done = done.map_err(|error| error.to_string()).flatten();
                if done.is_ok()
                    && let Err(error) = reload_definitions(&watch, &hands).await
                {
                    done = Err(format!("systemd does not read its unit files anew: {error}"));
                }
                Input::PutBack(done)
            }),
            Output::MarkGood(number) => {
                // A look that is under way compares with what was good before.
                self.again = self.looking;
                tokio::spawn(async move {
                    let (store, name) = (hands.store.clone(), watch.workload.clone());
                    let marked = tokio::task::spawn_blocking(move || store.mark_good(&name, number)).await;
                    let error = match marked {
                        Ok(Ok(())) => return,
                        Ok(Err(error)) => error.to_string(),
                        Err(error) => error.to_string(),
                    };
                    let unit = watch.units.first().map(String::as_str);
                    let what = format!("marking snapshot {number} good: a new ftd will not know that it is");
                    hands.bus.emit(unit, None, Kind::FilesTrouble { what, error });
                });
            }
        }
    }

    fn note(&mut self, kind: Kind) {
        let unit = self.watch.units.first().map(String::as_str);
        match self.op {
            None if matches!(kind, Kind::FilesChanged { .. }) => {
                self.op = Some(self.hands.bus.open(unit, kind));
            }
            op => drop(self.hands.bus.emit(unit, op, kind)),
        }
    }
}

impl Hands {
    /// Of those that this node has taken: what another one sent is for the day when this one takes over.
    async fn last_good(&self, watch: &Watch) -> Result<Option<u64>, String> {
        let (store, workload, node) = (self.store.clone(), watch.workload.clone(), watch.node.clone());
        let good = tokio::task::spawn_blocking(move || {
            let own = |one: &store::Generation| {
                one.good && one.about.kind == store::Kind::Files && one.about.node == node
            };
            store.generations(&workload).map(|all| all.into_iter().rfind(own))
        })
        .await;
        let good = good.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        Ok(good.map(|generation| generation.number))
    }
}

/// Whether a unit that is down for this went down by itself: who is stopped, or killed from outside, has not been
/// brought down by its files.
fn by_itself(cause: Cause) -> bool {
    !matches!(cause, Cause::Killed | Cause::OomKilled | Cause::Stopped)
}

// ---- what waits for disks

/// How the files differ from the last good generation: `ours`, unless a person has called a newer one good.
fn differences(watch: &Watch, store: &Store, ours: Option<u64>) -> Result<Found, String> {
    let theirs =
        store.last_good_of(&watch.workload, store::Kind::Files).map_err(|error| error.to_string())?;
    let good = ours.max(theirs.map(|generation| generation.number));
    let Some(number) = good else { return Ok(Found::default()) };
    let then = Files::open(store, &watch.workload, number).map_err(|error| error.to_string())?;
    let now = look(&watch.selection, &then.captured().entries).map_err(|error| error.to_string())?;
    let different = compare(&then.captured().entries, &now.entries, Some(&then));
    // A person who masks a unit does not want it to be started, and says so to systemd.
    let different: Vec<_> = different
        .into_iter()
        .filter(|one| !(is_fragment(watch, &one.path) && definition::is_mask(&one.path)))
        .collect();
    let changes = different.iter().map(|one| change(one, &then)).collect();
    Ok(Found { good, changes, newest: different.iter().filter_map(|one| changed_at(&one.path)).max() })
}

/// When anything of what is there was last changed, by the kernel's own time stamp.
fn changed_at(path: &Path) -> Option<BootNs> {
    let metadata = fs::symlink_metadata(path).ok()?;
    let nanoseconds = u32::try_from(metadata.ctime_nsec()).ok()?;
    let at = UNIX_EPOCH + Duration::new(u64::try_from(metadata.ctime()).ok()?, nanoseconds);
    let age = SystemTime::now().duration_since(at).unwrap_or_default();
    Some(BootNs(boot_now().0.saturating_sub(age.as_nanos().try_into().unwrap_or(u64::MAX))))
}

fn is_fragment(watch: &Watch, path: &Path) -> bool {
    watch.definitions.iter().flat_map(|one| &one.fragments).any(|fragment| fragment == path)
}

fn change(different: &files::Difference, then: &Files) -> Change {
    // Packages come with other files of another owner, and without some that they had: it is systemd that says
    // whether the unit can do without.
    let packaged = definition::is_unit_file(&different.path) && definition::is_packaged(&different.path);
    let harmless = |change: &files::Change| {
        if packaged {
            return !matches!(change, files::Change::Emptied { .. } | files::Change::Truncated { .. });
        }
        matches!(
            change,
            files::Change::Created {}
                | files::Change::Content { .. }
                | files::Change::Target { .. }
                | files::Change::Xattrs { .. }
        )
    };
    let mut what: Vec<_> = different.changes.iter().map(ToString::to_string).collect();
    what.extend(text(&different.path, then));
    let path = different.path.display().to_string();
    let told = FileChange { path, what: what.join(", ") };
    Change { told, damage: !different.changes.iter().all(harmless) }
}

/// What differs inside a short file that was and is there.
fn text(path: &Path, then: &Files) -> Option<String> {
    let old = then.captured().entries.iter().find(|entry| entry.path == path)?;
    let files::Kind::File { size, .. } = old.kind else { return None };
    let new = fs::File::open(path).ok()?;
    let short = new.metadata().ok().filter(fs::Metadata::is_file)?.len().max(size) <= DIFF_BYTES;
    let (mut before, mut after) = (Vec::new(), Vec::new());
    if short {
        then.open(old).ok()?.read_to_end(&mut before).ok()?;
        new.take(DIFF_BYTES).read_to_end(&mut after).ok()?;
    }
    Some(diff::diff(path, &before, &after, DIFF_LINES)).filter(|text| !text.is_empty())
}

fn about(watch: &Watch) -> About {
    About {
        workload: watch.workload.clone(),
        kind: store::Kind::Files,
        node: watch.node.clone(),
        boot_id: boot_id(),
        time: jiff::Timestamp::now(),
    }
}

/// Stores the files as they are; answers the generation's number, and what is to be told of it.
fn store_files(watch: &Watch, store: &Store) -> Result<(u64, Kind), String> {
    let (generation, _) = take(store, about(watch), &watch.selection).map_err(|error| error.to_string())?;
    let kind = Some(store::Kind::Files);
    let retention = Retention { count: Some(watch.settings.keep), kind, ..Retention::default() };
    if let Err(error) = store.retain(&watch.workload, &retention, jiff::Timestamp::now()) {
        tracing::warn!(%error, "old snapshots are not let go");
    }
    let stats = &generation.stats;
    let taken = Kind::SnapshotTaken {
        workload: watch.workload.clone(),
        generation: generation.number,
        kind: "files".into(),
        frozen_us: 0,
        took_ms: stats.duration.as_millis().try_into().unwrap_or(u64::MAX),
        bytes: stats.total,
        new_bytes: stats.new,
        stored_bytes: stats.stored,
    };
    Ok((generation.number, taken))
}

/// All of a generation is put in its place, and nothing else is left there. What is there now is stored before: an
/// administrator may have put work into it.
fn put_back(watch: &Watch, store: &Store, number: u64) -> Result<usize, String> {
    if let Err(error) = store_files(watch, store) {
        tracing::warn!(%error, "what is about to be replaced could not be stored");
    }
    let files = Files::open(store, &watch.workload, number).map_err(|error| error.to_string())?;
    let masked: Vec<_> =
        watch.definitions.iter().flat_map(|one| &one.fragments).map(PathBuf::as_path).collect();
    let masked: Vec<_> = masked.into_iter().filter(|path| definition::is_mask(path)).collect();
    let selection = watch.selection.without(&masked);
    let plan = Plan::new(files.captured(), Some(&selection)).map_err(|error| error.to_string())?;
    let steps = plan.steps().len();
    plan.apply(&files, &mut |_, _| {}).map_err(|error| error.to_string())?;
    Ok(steps)
}

// ---- what waits for systemd

/// What has been changed, by path.
struct Changed {
    paths: Vec<PathBuf>,
    /// There is nothing to compare with: all is looked at for the first time.
    first: bool,
}

impl Changed {
    fn new(guard: &Guard) -> Self {
        Self { paths: guard.current().map(PathBuf::from).collect(), first: guard.good().is_none() }
    }

    /// Whether any of this unit's own files is among it.
    fn defines(&self, definition: &Definition) -> bool {
        self.paths.iter().any(|path| definition.covers(path))
    }
}

async fn check(watch: &Watch, hands: &Hands, changed: &Changed) -> Result<(), String> {
    verify(watch, hands, changed).await?;
    let Some(words) = &watch.check else { return Ok(()) };
    let words = with_program(words)?;
    let said = say(watch, hands, "check", &words, &[]).await?;
    match said {
        (true, _) => Ok(()),
        (false, said) if said.is_empty() => Err(format!("{} says no, without a word", words.join(" "))),
        (false, said) => Err(said),
    }
}

/// Asks systemd what it thinks of the unit files, where there are new ones.
async fn verify(watch: &Watch, hands: &Hands, changed: &Changed) -> Result<(), String> {
    let concerned = watch.units.iter().zip(&watch.definitions).filter(|(_, definition)| {
        if changed.first {
            watch.selects(definition) && definition.is_there()
        } else {
            changed.defines(definition)
        }
    });
    let units: Vec<_> = concerned.map(|(unit, _)| unit.clone()).collect();
    if units.is_empty() {
        return Ok(());
    }
    let words: Vec<_> = VERIFY.into_iter().map(str::to_owned).chain(units).collect();
    let words = match with_program(&words) {
        Ok(words) => words,
        Err(error) => {
            let unit = watch.units.first().map(String::as_str);
            let error = format!("{error}: they are taken as they are");
            hands.bus.emit(unit, None, Kind::FilesTrouble { what: "verifying unit files".into(), error });
            return Ok(());
        }
    };
    let (good, said) = say(watch, hands, "verify", &words, &VERIFY_ENVIRONMENT).await?;
    if !good {
        return Err(if said.is_empty() { format!("{} says no", words.join(" ")) } else { said });
    }
    let wrong = complaints(&said, &changed.paths);
    if wrong.is_empty() || changed.first { Ok(()) } else { Err(wrong.join("\n")) }
}

/// What systemd says of lines in changed files that it does not understand, and ignores. A unit that can be
/// loaded all the same is what a package may come with, for another systemd; a person means each line.
fn complaints<'a>(said: &'a str, changed: &[PathBuf]) -> Vec<&'a str> {
    let ours = changed
        .iter()
        .filter(|path| !definition::is_packaged(path))
        .map(|path| format!("{}:", path.display()));
    let ours: Vec<_> = ours.collect();
    said.lines().filter(|line| ours.iter().any(|path| line.starts_with(path.as_str()))).collect()
}

/// Runs a checker; answers whether it is content, and what it says.
async fn say(
    watch: &Watch,
    hands: &Hands,
    what: &str,
    words: &[String],
    environment: &[&str],
) -> Result<(bool, String), String> {
    let name = format!("ftd-{what}-{}", watch.workload);
    let says = PathBuf::from(CHECKS).join(format!("{name}.out"));
    let command = Command { words, environment, says: &says, limit: watch.settings.check_deadline };
    let verdict = hands.systemd.run_once(&format!("{name}.service"), command).await;
    let said = fs::read(&says).unwrap_or_default();
    // It is made anew by the next.
    let _ = fs::remove_file(&says);
    let said = String::from_utf8_lossy(&said[..said.len().min(WORDS)]).trim().to_owned();
    let good = verdict.map_err(|error| format!("{} cannot be run: {error}", words.join(" ")))?;
    Ok((good, said))
}

/// systemd wants the program with its directory.
fn with_program(words: &[String]) -> Result<Vec<String>, String> {
    let mut words = words.to_vec();
    if let Some(program) = words.first_mut()
        && !program.starts_with('/')
    {
        let found = PATH.iter().map(|dir| format!("{dir}/{program}")).find(|path| Path::new(path).is_file());
        *program = found.ok_or_else(|| format!("the checker {program} is not in {}", PATH.join(":")))?;
    }
    Ok(words)
}

/// Has systemd read unit files anew, once, if any of the workload's is not what it has read.
async fn reload_definitions(watch: &Watch, hands: &Hands) -> Result<(), String> {
    if !watch.definitions.iter().any(|definition| watch.selects(definition)) {
        return Ok(());
    }
    for unit in &watch.units {
        let run = hands.systemd.run_of(unit).await.map_err(|error| format!("{unit}: {error}"))?;
        if run.needs_reload {
            return hands.systemd.reload_files().await.map_err(|error| error.to_string());
        }
    }
    Ok(())
}

async fn apply(watch: &Watch, hands: &Hands, changed: &Changed, given_up: &[String]) -> Result<(), String> {
    reload_definitions(watch, hands).await?;
    let (systemd, limit) = (&hands.systemd, watch.settings.apply_deadline);
    let content = changed.paths.iter().any(|path| !definition::is_unit_file(path));
    for (unit, definition) in watch.units.iter().zip(&watch.definitions) {
        let began = systemd.run_of(unit).await.map_err(|error| format!("{unit}: {error}"))?.began;
        let result = if given_up.contains(unit) {
            systemd.start(unit, limit).await
        } else if changed.paths.iter().any(|path| definition.needs_start(path) && is_newer(path, began)) {
            systemd.try_restart(unit, limit).await
        } else if content || changed.paths.is_empty() {
            systemd.reload_or_restart(unit, limit).await
        } else {
            continue;
        };
        match result.map_err(|error| format!("{unit}: {error}"))?.as_str() {
            "done" => {}
            other => return Err(format!("{unit} does not take them over: systemd's job ended with {other}")),
        }
    }
    Ok(())
}

/// Whether a file was changed, or has gone, after this moment.
fn is_newer(path: &Path, moment: SystemTime) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else { return true };
    let seconds = u64::try_from(metadata.ctime()).unwrap_or(0);
    UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_nanos(metadata.ctime_nsec().unsigned_abs())
        > moment
}
