//! The node that a service leaves.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{sync::watch, task::JoinSet, time::timeout};

use super::{
    AGAIN, Inner, Leaving, MOVED, MOVING, Mode, Outcome, Progress, Refused, address,
    machine::{self, Side, SourceInput, SourcePhase, SourceStep},
    preflight::{self, Plan},
    record::{Moved, Phase, Record},
    stream::{self, Dirs, Files, Sent},
    wire::{Ask, Confirm, Go, Images, Offer, Word},
};
use crate::{
    control::millis,
    event::{Kind, OpId},
    peer::{Call, CallError, Outgoing},
    snapshot::{
        criu::{Criu, Moment, unit},
        scratch::Scratch,
    },
};

/// How often the person who looks on is told of bytes.
const TELL: Duration = Duration::from_millis(100);

/// A move, on its way.
struct Source {
    inner: Arc<Inner>,
    record: Record,
    phase: SourcePhase,
    op: OpId,
    offer: Option<Offer>,
    progress: watch::Sender<Progress>,
    decided: watch::Receiver<Option<Side>>,
    began: Instant,
    /// Since when the first unit stands still.
    frozen: Arc<Mutex<Option<Instant>>>,
    sent: Option<(Files, usize)>,
    trouble: Option<Refused>,
}

/// Begins a move; it is done in a task of its own.
pub(super) fn begin(
    inner: &Arc<Inner>,
    plan: &Plan,
    mode: Mode,
) -> Result<watch::Receiver<Progress>, Refused> {
    let id = super::new_id().map_err(|error| Refused::new(error, "see that /proc is mounted"))?;
    let moved = plan.units.iter().map(|unit| Moved {
        unit: unit.unit.clone(),
        main_pid: unit.main_pid,
        lock: None,
        held: super::hold_before(inner, &unit.unit),
    });
    let phase = Phase::Source(SourcePhase::Preparing);
    let mut record = Record::new(&id, &plan.workload, moved.collect(), &plan.to, phase);
    record.address.clone_from(&plan.address);
    let offer = plan.offer(&id, false);
    {
        let mut known = inner.moves();
        if record.units.iter().any(|unit| known.units.contains_key(&unit.unit)) {
            let error = format!("{} is on the move already", plan.workload);
            return Err(Refused::new(error, "wait for its end: ftctl events --follow"));
        }
        known.units.extend(record.names().into_iter().map(|unit| (unit, id.clone())));
    }
    Ok(start(inner, record, Some(offer), mode, (SourcePhase::Preparing, SourceStep::Prepare)))
}

/// Goes on with a move that an earlier ftd has begun.
pub(super) fn resume(inner: &Arc<Inner>, record: Record) {
    let Phase::Source(phase) = record.phase else { return };
    if let Some((phase, step)) = machine::source(phase, SourceInput::Resumed) {
        let record = Record { phase: Phase::Source(phase), ..record };
        start(inner, record, None, Mode::Auto, (phase, step));
    }
}

fn start(
    inner: &Arc<Inner>,
    record: Record,
    offer: Option<Offer>,
    mode: Mode,
    (phase, step): (SourcePhase, SourceStep),
) -> watch::Receiver<Progress> {
    let mode = if mode == Mode::Auto { Mode::StopCopy } else { mode };
    let progress = Progress {
        id: record.id.clone(),
        workload: record.workload.clone(),
        units: record.names(),
        from: inner.peers.node().to_owned(),
        to: record.peer.clone(),
        mode,
        phase: name(step).into(),
        phases: Vec::new(),
        expected: offer.as_ref().map_or(0, |offer| offer.bytes),
        bytes: 0,
        wire_bytes: 0,
        blackout_ms: None,
        restore_ms: None,
        took_ms: 0,
        waits: None,
        outcome: None,
    };
    let (progress, seen) = watch::channel(progress);
    let (decide, decided) = watch::channel(None);
    inner.moves().sources.insert(record.id.clone(), Leaving { progress: seen.clone(), decide });
    let detail =
        if offer.is_some() { format!("to {}", record.peer) } else { "an earlier ftd has begun it".into() };
    let op = inner.tell_phase(&record, None, name(step), detail);
    let trouble = offer.is_none().then(|| {
        let mend = "the service runs on; move it again";
        Refused::new("ftd was started again in the middle of it", mend)
    });
    let source = Source {
        inner: Arc::clone(inner),
        record,
        phase,
        op,
        offer,
        progress,
        decided,
        began: Instant::now(),
        frozen: Arc::default(),
        sent: None,
        trouble,
    };
    tokio::spawn(source.run(step));
    seen
}

/// What a step is called in events.
fn name(step: SourceStep) -> &'static str {
    match step {
        SourceStep::Prepare => "preparing",
        SourceStep::Freeze => "copying",
        SourceStep::Go => "starting there",
        SourceStep::Ask => "asking",
        SourceStep::End => "ending here",
        SourceStep::Thaw => "going back",
        SourceStep::Forget => "done",
    }
}

impl Source {
    async fn run(mut self, mut step: SourceStep) {
        // Nothing is done that is not in the record before.
        loop {
            let begun = Instant::now();
            let input = match step {
                SourceStep::Forget => break,
                step => match self.save().await {
                    // What could not be written is not begun. The others follow from the phase before as well.
                    Err(error)
                        if matches!(step, SourceStep::Prepare | SourceStep::Freeze | SourceStep::Go) =>
                    {
                        self.unwritten(step, error)
                    }
                    _ => self.perform(step).await,
                },
            };
            let Some((phase, next)) = machine::source(self.phase, input) else {
                tracing::error!(?step, ?input, phase = ?self.phase, "a move has come to where nothing leads on");
                tokio::time::sleep(AGAIN).await;
                continue;
            };
            if next == step {
                tokio::time::sleep(AGAIN).await;
            } else {
                let took = millis(begun.elapsed());
                self.progress.send_modify(|progress| {
                    progress.phases.push((name(step).into(), took));
                    progress.phase = name(next).into();
                    progress.took_ms = millis(self.began.elapsed());
                });
                if next != SourceStep::Forget {
                    self.inner.tell_phase(&self.record, Some(self.op), name(next), String::new());
                }
            }
            (self.phase, self.record.phase, step) = (phase, Phase::Source(phase), next);
        }
        self.inner.forget(&self.record).await;
        self.close();
    }

    /// Says what has become of it.
    fn close(&self) {
        let moved = self.phase == SourcePhase::Leaving;
        let outcome = if moved {
            Outcome::Moved
        } else {
            let Refused { error, mend } =
                self.trouble.clone().unwrap_or_else(|| Refused::new("it was given up", ""));
            Outcome::Back { error, mend }
        };
        self.progress.send_modify(|progress| {
            progress.took_ms = millis(self.began.elapsed());
            progress.outcome = Some(outcome.clone());
            progress.waits = None;
        });
        let progress = self.progress.borrow().clone();
        let (workload, migration, to) = (progress.workload, progress.id, progress.to);
        let kind = match outcome {
            Outcome::Moved => Kind::Migrated {
                workload,
                migration,
                to,
                took_ms: progress.took_ms,
                blackout_ms: progress.blackout_ms.unwrap_or(0),
                bytes: progress.bytes,
                wire_bytes: progress.wire_bytes,
            },
            Outcome::Back { error: cause, mend } => {
                Kind::MigrationFailed { workload, migration, peer: to, cause, mend }
            }
        };
        let unit = progress.units.first().map(String::as_str);
        self.inner.bus.emit(unit, Some(self.op), kind);
    }

    async fn save(&self) -> Result<(), Refused> {
        self.inner.save(&self.record).await
    }

    fn trouble(&mut self, error: Refused) -> SourceInput {
        tracing::warn!(error = error.error, migration = self.record.id, "a move fails");
        self.trouble.get_or_insert(error);
        SourceInput::Failed
    }

    /// A step is not done because its record cannot be written. Of a Go the record on disk says less than this side
    /// knows: it was not sent, and the source still decides alone.
    fn unwritten(&mut self, step: SourceStep, error: Refused) -> SourceInput {
        if step == SourceStep::Go {
            self.phase = SourcePhase::Freezing;
        }
        self.trouble(error)
    }

    async fn perform(&mut self, step: SourceStep) -> SourceInput {
        let done = match step {
            SourceStep::Prepare => self.prepare().await,
            SourceStep::Freeze => self.freeze().await,
            SourceStep::Go => return self.go().await,
            SourceStep::Ask => return self.ask().await,
            SourceStep::End => self.end().await,
            SourceStep::Thaw => self.thaw().await,
            SourceStep::Forget => Ok(()),
        };
        match done {
            Ok(()) => SourceInput::Done,
            Err(error) => self.trouble(error),
        }
    }

    async fn prepare(&mut self) -> Result<(), Refused> {
        let Some(offer) = &self.offer else { return Err(Refused::new("there is no offer", "")) };
        for unit in self.record.names() {
            self.inner.hold(&unit, format!("{MOVING} to {}", self.record.peer)).await?;
        }
        let asked = self.inner.peers.call(&self.record.peer, offer).await;
        preflight::in_the_way_of(&self.record.workload, &self.record.peer, &asked.map_err(call_failed)?)?;
        let systemd = &self.inner.systemd;
        unit::quiet(systemd, &self.record.names()).await.map_err(|error| unit_failed(&error))
    }

    /// Freezes the units one after another, and has their images be there. Nothing of them stays here.
    async fn freeze(&mut self) -> Result<(), Refused> {
        let bytes = self.offer.as_ref().map_or(0, |offer| offer.bytes);
        let scratch = self.inner.places.make(bytes).map_err(|error| Refused::new(error, "make room"))?;
        let mut dirs = Vec::new();
        for number in 0..self.record.units.len() {
            let dir = scratch.path().join(number.to_string());
            fs::create_dir(&dir).map_err(|error| disk_failed(&error))?;
            dirs.push(dir);
        }
        let sending = self.send(Dirs::new(dirs.clone())).await?;
        let mut dumped = self.dump(&dirs, &sending.sent).await;
        if dumped.is_ok() {
            dumped = address::give_up(self.record.address.as_deref()).await;
        }
        if dumped.is_ok() {
            sending.dirs.complete();
        } else {
            sending.dirs.give_up();
        }
        let sent = self.sent_all(sending).await;
        // Off the memory as soon as may be, and not on a thread of the runtime.
        let _ = tokio::task::spawn_blocking(move || drop::<Scratch>(scratch)).await;
        dumped?;
        self.sent = Some(sent?);
        Ok(())
    }

    async fn dump(&mut self, dirs: &[PathBuf], sent: &Sent) -> Result<(), Refused> {
        let criu = Criu::find().map_err(|error| Refused::new(error, "see: ftctl doctor"))?;
        let limit = self.inner.config.migrate.dump_within;
        for (number, dir) in dirs.iter().enumerate() {
            let mut attempts = 1;
            while let Err(error) = self.halt(&criu, number, dir, limit).await {
                let failed = unit_failed(&error);
                // A client has connected and was not taken in yet when everything stood still: a moment later it is.
                let passing = failed.error.contains("In-flight connection");
                if !passing || attempts == ATTEMPTS || sent.raw.load(Ordering::Relaxed) > 0 {
                    return Err(failed);
                }
                attempts += 1;
                for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                    fs::remove_file(entry.path()).map_err(|error| disk_failed(&error))?;
                }
            }
        }
        Ok(())
    }

    async fn halt(
        &mut self,
        criu: &Criu,
        number: usize,
        dir: &Path,
        limit: Duration,
    ) -> Result<(), unit::UnitError> {
        let id = self.record.units[number].unit.clone();
        // The name of the packet filter is in the record before the filter is all that there is.
        let (shared, to, at) =
            (Arc::new(Mutex::new(self.record.clone())), self.inner.dir.clone(), dir.to_owned());
        let (record, frozen) = (Arc::clone(&shared), Arc::clone(&self.frozen));
        let word = move |moment| match moment {
            Moment::PreDump => {
                let mut frozen = frozen.lock().unwrap_or_else(PoisonError::into_inner);
                // Of several units, the first.
                if number == 0 || frozen.is_none() {
                    *frozen = Some(Instant::now());
                }
                true
            }
            Moment::PostDump => {
                let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
                record.units[number].lock = unit::network_lock(&at).ok();
                record.units[number].lock.is_some() && record.save(&to).is_ok()
            }
            _ => true,
        };
        let halted = unit::halt(&self.inner.systemd, criu, &id, dir, limit, word).await;
        self.record = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
        halted.map(drop)
    }

    /// Waits until the target is not connected any more, or by another run of its ftd: a killed ftd says no good-bye, and
    /// what goes over the connection that there was does not end by that.
    async fn parted(&self, run: Option<u64>) {
        let mut changes = self.inner.peers.changes();
        loop {
            changes.borrow_and_update();
            if self.inner.peers.run_of(&self.record.peer) != run {
                return;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Asks the target, for as long as there is the connection on which it was asked.
    async fn call<C: Call>(&self, request: &C, limit: Duration) -> Result<C::Answer, String> {
        let (peer, run) = (&self.record.peer, self.inner.peers.run_of(&self.record.peer));
        tokio::select! {
            answer = self.inner.peers.call_for(peer, request, limit) => answer.map_err(|error| error.to_string()),
            () = self.parted(run) => Err(format!("the connection with {peer} broke")),
        }
    }

    async fn send(&self, dirs: Dirs) -> Result<Sending, Refused> {
        let streams = self.inner.config.cluster.streams.min(STREAMS);
        let run = self.inner.peers.run_of(&self.record.peer);
        let (mut tasks, mut queues) = (JoinSet::new(), Vec::new());
        let limit = self.inner.config.cluster.transfer_within;
        for _ in 0..streams {
            let head = Images { id: self.record.id.clone() };
            let mut outgoing: Outgoing =
                self.inner.peers.bulk(&self.record.peer, &head).await.map_err(call_failed)?;
            let (queue, mut pieces) = stream::queue();
            queues.push(queue);
            tasks.spawn(async move {
                let late = || "the other side takes nothing any more".to_owned();
                while let Some(piece) = pieces.recv().await {
                    let written = timeout(limit, outgoing.write(piece)).await.map_err(|_| late())?;
                    written.map_err(|error| error.to_string())?;
                }
                timeout(limit, outgoing.finish())
                    .await
                    .map_err(|_| late())?
                    .map_err(|error| error.to_string())
            });
        }
        let sent = Arc::new(Sent::default());
        let reader = {
            let (dirs, sent) = (dirs.clone(), Arc::clone(&sent));
            tokio::task::spawn_blocking(move || stream::send(&dirs, queues, &sent))
        };
        Ok(Sending { dirs, sent, reader, tasks, streams, run })
    }

    async fn sent_all(&self, sending: Sending) -> Result<(Files, usize), Refused> {
        let Sending { dirs, sent, mut reader, mut tasks, streams, run } = sending;
        let tell = || {
            self.progress.send_modify(|progress| {
                progress.bytes = sent.raw.load(Ordering::Relaxed);
                progress.wire_bytes = sent.wire.load(Ordering::Relaxed);
                progress.took_ms = millis(self.began.elapsed());
            });
        };
        let mut broken = None;
        let parted = self.parted(run);
        tokio::pin!(parted);
        let files = loop {
            tokio::select! {
                done = &mut reader => break done.map_err(io::Error::other).flatten(),
                () = &mut parted, if broken.is_none() => {
                    broken = Some("the connection broke".to_owned());
                    dirs.give_up();
                    tasks.abort_all();
                }
                () = tokio::time::sleep(TELL) => tell(),
            }
        };
        loop {
            let task = tokio::select! {
                task = tasks.join_next() => task,
                () = &mut parted, if broken.is_none() => {
                    broken = Some("the connection broke".to_owned());
                    tasks.abort_all();
                    continue;
                }
            };
            let error = match task {
                None => break,
                Some(Ok(Ok(()))) => continue,
                Some(Ok(Err(error))) => error,
                Some(Err(error)) => error.to_string(),
            };
            broken.get_or_insert(error);
        }
        tell();
        let mend = "see that both nodes reach each other: ftctl cluster peers; then move it again";
        let failed = |error: String| {
            Refused::new(format!("the images did not reach {}: {error}", self.record.peer), mend)
        };
        match (broken, files) {
            (Some(error), _) => Err(failed(error)),
            (None, files) => Ok((files.map_err(|error| failed(error.to_string()))?, streams)),
        }
    }

    fn heard(&mut self, word: Word) -> SourceInput {
        let frozen =
            self.frozen.lock().unwrap_or_else(PoisonError::into_inner).map(|since| millis(since.elapsed()));
        match word {
            Word::Serving { restore_us } => {
                self.progress.send_modify(|progress| {
                    progress.blackout_ms = frozen;
                    progress.restore_ms = Some(restore_us / 1000);
                    progress.waits = None;
                });
                SourceInput::Serving
            }
            Word::NotServing { why } => {
                self.progress.send_modify(|progress| progress.waits = None);
                let (error, mend) = why.unwrap_or_else(|| {
                    (format!("{} was not told in time to start it", self.record.peer), "move it again".into())
                });
                self.trouble(Refused::new(format!("{}: {error}", self.record.peer), mend));
                SourceInput::NotServing
            }
        }
    }

    async fn go(&mut self) -> SourceInput {
        let Some((files, streams)) = self.sent.take() else { return SourceInput::Failed };
        let connections = self.record.address.is_some();
        let go = Go { id: self.record.id.clone(), streams, files, connections };
        let limit = self.inner.config.migrate.restore_within * self.record.units.len() as u32 + MARGIN;
        match self.call(&go, limit).await {
            Ok(word) => self.heard(word),
            Err(error) => {
                tracing::warn!(error, "what has become of a move is not known: the target is asked");
                SourceInput::Failed
            }
        }
    }

    /// Asks until the target answers, or somebody decides.
    async fn ask(&mut self) -> SourceInput {
        let mut changes = self.inner.peers.changes();
        loop {
            changes.borrow_and_update();
            let ask = Ask { id: self.record.id.clone() };
            let limit = self.inner.config.migrate.restore_within + MARGIN;
            match self.call(&ask, limit).await {
                Ok(word) => return self.heard(word),
                Err(error) => self.wait(&error),
            }
            if let Some(side) = *self.decided.borrow() {
                let error = format!("a person has decided: {side:?}").to_lowercase();
                self.trouble.get_or_insert(Refused::new(error, "see that it runs on one node alone"));
                return SourceInput::Decided(side);
            }
            let mut decided = self.decided.clone();
            // A connection that comes back, a decision, or, in case there is a connection that does not answer, a while.
            let news = async {
                tokio::select! {
                    _ = changes.changed() => {}
                    _ = decided.changed() => {}
                }
            };
            let _ = timeout(ASK_AGAIN, news).await;
        }
    }

    fn wait(&self, error: &str) {
        let already = self.progress.borrow().waits.is_some();
        let error =
            format!("whether {} runs on {} is not known: {error}", self.record.workload, self.record.peer);
        let mend = format!(
            "it stands still here until that node answers. Where it will not: `ftctl migrate {} --decide here` lets it go \
             on here, `--decide there` ends it here; it must not run there and here",
            self.record.workload
        );
        if !already {
            self.inner.tell_phase(&self.record, Some(self.op), "waiting", format!("{error}; {mend}"));
        }
        self.progress.send_modify(|progress| progress.waits = Some((error, mend)));
    }

    /// Ends what stands still here, the last unit first; then the target is told.
    async fn end(&mut self) -> Result<(), Refused> {
        let systemd = &self.inner.systemd;
        let names = self.record.names();
        address::give_up(self.record.address.as_deref()).await?;
        unit::quiet(systemd, &names).await.map_err(|error| unit_failed(&error))?;
        for moved in self.record.units.iter().rev() {
            unit::end(systemd, &moved.unit, MARGIN).await.map_err(|error| unit_failed(&error))?;
            if let Some(lock) = &moved.lock {
                unit::release_network(lock.clone()).await.map_err(|error| unit_failed(&error))?;
            }
        }
        for moved in &self.record.units {
            self.inner.hold(&moved.unit, format!("{MOVED}{}", self.record.peer)).await?;
        }
        unit::loud(systemd, &names).await.map_err(|error| unit_failed(&error))?;
        let mut changes = self.inner.peers.changes();
        let confirm = Confirm { id: self.record.id.clone() };
        loop {
            changes.borrow_and_update();
            match self.inner.peers.call(&self.record.peer, &confirm).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(%error, "the target does not know yet that nothing is left here");
                }
            }
            // It was ended because somebody said so: there may be nobody to be told.
            if self.decided.borrow().is_some() {
                return Ok(());
            }
            let _ = timeout(ASK_AGAIN, changes.changed()).await;
        }
    }

    /// Lets it go on here. The target is told once; if it does not hear that, it finds out by itself.
    async fn thaw(&mut self) -> Result<(), Refused> {
        let systemd = &self.inner.systemd;
        address::take(self.record.address.as_deref(), &self.inner.config.cluster).await?;
        for moved in &self.record.units {
            unit::thaw(systemd, &moved.unit, moved.lock.clone())
                .await
                .map_err(|error| unit_failed(&error))?;
        }
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.progress.send_modify(|progress| {
            progress.blackout_ms = frozen.map(|since| millis(since.elapsed())).or(progress.blackout_ms);
        });
        unit::loud(systemd, &self.record.names()).await.map_err(|error| unit_failed(&error))?;
        for moved in &self.record.units {
            self.inner.unhold(&moved.unit, moved.held.clone()).await?;
        }
        let ask = Ask { id: self.record.id.clone() };
        if let Err(error) = self.inner.peers.call(&self.record.peer, &ask).await {
            tracing::debug!(%error, "the target is not told that the move is off");
        }
        Ok(())
    }
}

/// What goes to the target while CRIU writes it.
struct Sending {
    dirs: Dirs,
    sent: Arc<Sent>,
    reader: tokio::task::JoinHandle<io::Result<Files>>,
    tasks: JoinSet<Result<(), String>>,
    streams: usize,
    /// The run of the target's ftd that takes it.
    run: Option<u64>,
}

/// More streams than this gain nothing: the connection is bound by one CPU, and compression by the others.
const STREAMS: usize = 4;
/// A dump is begun so often, when connections are on their way at each.
const ATTEMPTS: u32 = 20;
/// What systemd and the way may take on top of a limit.
const MARGIN: Duration = Duration::from_secs(15);
/// How often a target that is connected and does not answer is asked.
const ASK_AGAIN: Duration = Duration::from_secs(2);

fn unit_failed(error: &unit::UnitError) -> Refused {
    Refused::new(error, "see: ftctl check, and ftctl events")
}

fn call_failed(error: CallError) -> Refused {
    match error {
        CallError::Refused { peer, refusal } => {
            Refused::new(format!("{peer}: {}", refusal.error), refusal.mend)
        }
        error => Refused::new(error, "see: ftctl cluster peers"),
    }
}

fn disk_failed(error: &io::Error) -> Refused {
    Refused::new(
        format!("a directory for images cannot be made: {error}"),
        "make room, or set snapshot.scratch",
    )
}
