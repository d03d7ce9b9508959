//! Carries out what the [`guard`](super::guard) of a workload's files wants done, and feeds back how it went.
//!
//! One task for each workload that has files. It learns of changes from inotify, of the service from the stream of
//! events, and asks systemd, the store and the file system; what is to be done is decided by the guard alone.

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::{broadcast, mpsc};

use super::{
    guard::{Change, Guard, Input, Output, Phase, Policy},
    saved::boot_id,
    supervisor::boot_now,
};
use crate::{
    config,
    event::{Cause, Event, FileChange, Kind, OpId, bus::Bus},
    snapshot::{
        files::{self, Batch, Contents as _, Plan, Selection, Timing, compare, diff, look},
        generation::{Files, take},
        store::{self, About, Retention, Store},
    },
    unit::manager::Systemd,
};

/// Where the output of checkers goes for the moment: ftd's own directory.
const CHECKS: &str = "/run/ftd";
/// Where programs that are named without a directory are looked for.
const PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// Files here are systemd's: it has to read them anew.
const UNIT_FILES: &str = "/etc/systemd/system/";
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
    /// Its checker; without one every content is valid.
    pub check: Option<Vec<String>>,
    /// Times and limits.
    pub settings: config::Snapshot,
    /// This node, for the generations.
    pub node: String,
}

/// With what it works.
#[derive(Debug, Clone)]
pub struct Hands {
    /// Events.
    pub bus: Arc<Bus>,
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
pub async fn run(watch: Watch, hands: Hands, mut held_at_first: Vec<String>) {
    let mut follower = hands.bus.follow();
    let timing = Timing { settle: watch.settings.settle, at_most: watch.settings.settle_at_most };
    let trouble = |what: &str, error: String| {
        let unit = watch.units.first().map(String::as_str);
        hands.bus.emit(unit, None, Kind::FilesTrouble { what: what.into(), error });
    };
    let mut batches = loop {
        match files::watch(watch.selection.clone(), timing).await {
            Ok(batches) => break batches,
            Err(error) => trouble("watching the files", error.to_string()),
        }
        // Nothing tells when there is room for one more.
        tokio::time::sleep(watch.settings.retry).await;
    };
    let good = match hands.last_good(&watch.workload).await {
        Ok(good) => good,
        Err(error) => return trouble("reading the snapshots", error),
    };
    let settings = &watch.settings;
    let policy = Policy {
        good_after: settings.good_after,
        put_backs: settings.put_backs,
        within: settings.within,
        retry: settings.retry,
    };
    let (answer, mut answers) = mpsc::unbounded_channel();
    let (guard, watch) = (Guard::new(policy, good), Arc::new(watch));
    let held = BTreeSet::new();
    let mut task = Task { guard, watch, hands, answer, op: None, held, looking: false, again: false };
    for unit in std::mem::take(&mut held_at_first) {
        task.hold(unit, true);
    }
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
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
            () = due => task.feed(Input::Tick),
        }
    }
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
                Ok(changes) => Input::Changed(changes),
                // What cannot be looked at is for the checker to say something about.
                Err(error) => Input::Changed(vec![Change {
                    told: FileChange { path: "the files".into(), what: error },
                    damage: false,
                }]),
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

    fn hold(&mut self, unit: String, held: bool) {
        if held {
            self.held.insert(unit);
        } else {
            self.held.remove(&unit);
        }
        self.feed(Input::Held(!self.held.is_empty()));
    }

    fn heed(&mut self, event: &Event) {
        let Some(unit) = event.unit.as_ref().filter(|unit| self.watch.units.contains(unit)) else { return };
        match &event.kind {
            // Who is killed from outside has not been brought down by its files.
            Kind::Down { cause: Cause::Killed | Cause::OomKilled | Cause::Stopped, .. } => {}
            Kind::Down { .. } => self.feed(Input::Serving(false)),
            Kind::Healed { .. } | Kind::Started { .. } => self.feed(Input::Serving(true)),
            Kind::Held { .. } => self.hold(unit.clone(), true),
            Kind::Released { .. } => self.hold(unit.clone(), false),
            _ => {}
        }
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
            Output::Check => self.beside(async move { Input::Checked(check(&watch, &hands).await) }),
            Output::Apply => self.beside(async move { Input::Applied(apply(&watch, &hands).await) }),
            Output::Store => self.beside(async move {
                let stored = tokio::task::spawn_blocking(move || store_files(&watch, &hands.store)).await;
                Input::Stored(stored.map_err(|error| error.to_string()).flatten())
            }),
            Output::PutBack(number) => self.beside(async move {
                let done = tokio::task::spawn_blocking(move || put_back(&watch, &hands.store, number)).await;
                Input::PutBack(done.map_err(|error| error.to_string()).flatten())
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
    async fn last_good(&self, workload: &str) -> Result<Option<u64>, String> {
        let (store, workload) = (self.store.clone(), workload.to_owned());
        let good =
            tokio::task::spawn_blocking(move || store.last_good_of(&workload, store::Kind::Files)).await;
        let good = good.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        Ok(good.map(|generation| generation.number))
    }
}

// ---- what waits for disks

fn differences(watch: &Watch, store: &Store, good: Option<u64>) -> Result<Vec<Change>, String> {
    let Some(number) = good else { return Ok(Vec::new()) };
    let then = Files::open(store, &watch.workload, number).map_err(|error| error.to_string())?;
    let now = look(&watch.selection, &then.captured().entries).map_err(|error| error.to_string())?;
    let different = compare(&then.captured().entries, &now.entries, Some(&then));
    Ok(different.iter().map(|one| change(one, &then)).collect())
}

fn change(different: &files::Difference, then: &Files) -> Change {
    let harmless = |change: &files::Change| {
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

fn store_files(watch: &Watch, store: &Store) -> Result<u64, String> {
    let (generation, _) = take(store, about(watch), &watch.selection).map_err(|error| error.to_string())?;
    let kind = Some(store::Kind::Files);
    let retention = Retention { count: Some(watch.settings.keep), kind, ..Retention::default() };
    if let Err(error) = store.retain(&watch.workload, &retention, jiff::Timestamp::now()) {
        tracing::warn!(%error, "old snapshots are not let go");
    }
    Ok(generation.number)
}

/// All of a generation is put in its place, and nothing else is left there. What is there now is stored before: an
/// administrator may have put work into it.
fn put_back(watch: &Watch, store: &Store, number: u64) -> Result<usize, String> {
    if let Err(error) = take(store, about(watch), &watch.selection) {
        tracing::warn!(%error, "what is about to be replaced could not be stored");
    }
    let files = Files::open(store, &watch.workload, number).map_err(|error| error.to_string())?;
    let plan = Plan::new(files.captured(), Some(&watch.selection)).map_err(|error| error.to_string())?;
    let steps = plan.steps().len();
    plan.apply(&files, &mut |_, _| {}).map_err(|error| error.to_string())?;
    Ok(steps)
}

// ---- what waits for systemd

async fn check(watch: &Watch, hands: &Hands) -> Result<(), String> {
    let Some(words) = &watch.check else { return Ok(()) };
    let words = with_program(words)?;
    let name = format!("ftd-check-{}", watch.workload);
    let says = PathBuf::from(CHECKS).join(format!("{name}.out"));
    let limit = watch.settings.check_deadline;
    let verdict =
        hands.systemd.run_once(&format!("{name}.service"), &words, &says.display().to_string(), limit).await;
    let said = fs::read(&says).unwrap_or_default();
    // It is made anew by the next.
    let _ = fs::remove_file(&says);
    let said = String::from_utf8_lossy(&said[..said.len().min(WORDS)]).trim().to_owned();
    match verdict {
        Ok(true) => Ok(()),
        Ok(false) if said.is_empty() => Err(format!("{} says no, without a word", words.join(" "))),
        Ok(false) => Err(said),
        Err(error) => Err(format!("{} cannot be run: {error}", words.join(" "))),
    }
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

async fn apply(watch: &Watch, hands: &Hands) -> Result<(), String> {
    let unit_files =
        watch.selection.patterns().iter().any(|pattern| pattern.as_str().starts_with(UNIT_FILES));
    if unit_files {
        hands.systemd.reload_files().await.map_err(|error| error.to_string())?;
    }
    for unit in &watch.units {
        let result = hands.systemd.reload_or_restart(unit, watch.settings.apply_deadline).await;
        match result.map_err(|error| format!("{unit}: {error}"))?.as_str() {
            "done" => {}
            other => return Err(format!("{unit} does not take them over: systemd's job ended with {other}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checker_without_a_directory_is_found_or_said_to_be_missing() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(with_program(&words("sh -c true")).unwrap()[0].ends_with("/sh"));
        assert_eq!(with_program(&words("/opt/check -x")).unwrap(), words("/opt/check -x"));
        assert!(with_program(&words("no-such-program")).unwrap_err().contains("no-such-program"));
    }
}
