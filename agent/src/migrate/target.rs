//! The node that a service comes to.

use std::{
    collections::BTreeSet,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use super::{
    AGAIN, Inner, MOVING, Refused, address,
    machine::{self, TargetInput, TargetPhase, TargetStep},
    preflight,
    record::{Moved, Phase, Record},
    stream::{self, Chunks},
    wire::{Ask, Confirm, Go, Images, InTheWay, Offer, Word, is_id},
    with,
};
use crate::{
    event::OpId,
    heal::saved::boot_id,
    peer::{Caller, Incoming, Refusal},
    snapshot::{
        criu::{Criu, unit},
        scratch::Scratch,
    },
};

/// Of a stream, what waits for the disk, and how large it is.
const QUEUE: usize = 4;
const CHUNK: usize = 256 << 10;
/// What was said of so many moves that are over is remembered.
const OVER: usize = 32;
/// What systemd may take on top of a limit.
const MARGIN: Duration = Duration::from_secs(10);

/// Where images arrive.
#[derive(Debug)]
pub(super) struct Room {
    scratch: Scratch,
    dirs: Vec<PathBuf>,
    bytes: u64,
}

/// A move to here.
#[derive(Debug)]
pub(super) struct Coming {
    pub(super) id: String,
    from: String,
    /// Held by who takes a step: steps come one after another.
    state: tokio::sync::Mutex<State>,
    /// The directories, and how much may come.
    room: Mutex<Option<(Vec<PathBuf>, u64)>>,
    received: Arc<AtomicU64>,
    /// How many streams have ended, and what went wrong with one of them.
    ended: watch::Sender<(usize, Option<String>)>,
    /// When something was last heard of the source.
    heard: Mutex<Instant>,
}

#[derive(Debug)]
struct State {
    record: Record,
    room: Option<Room>,
    op: Option<OpId>,
    restore_us: u64,
    why: Option<(String, String)>,
    over: bool,
}

/// Answers other nodes.
pub(super) fn serve(inner: &Arc<Inner>) {
    let weak = Arc::downgrade(inner);
    inner.peers.serve(move |caller, offer: Offer| {
        let weak = weak.clone();
        async move { with(&weak)?.offered(caller, offer).await }
    });
    let weak = Arc::downgrade(inner);
    inner.peers.serve_bulk(move |caller, Images { id }, stream| {
        let weak = weak.clone();
        async move {
            let Some(inner) = weak.upgrade() else { return };
            if let Ok(Some(coming)) = inner.coming(&caller, &id) {
                coming.take(stream).await;
            }
        }
    });
    let weak = Arc::downgrade(inner);
    inner.peers.serve(move |caller, go: Go| {
        let weak = weak.clone();
        async move {
            let inner = with(&weak)?;
            let coming = inner.coming(&caller, &go.id)?;
            // A task of its own: a connection that ends must not end this.
            on_its_own(async move {
                match coming {
                    Some(coming) => coming.go(&inner, go).await,
                    None => inner.said(&go.id),
                }
            })
            .await
        }
    });
    let weak = Arc::downgrade(inner);
    inner.peers.serve(move |caller, Ask { id }: Ask| {
        let weak = weak.clone();
        async move {
            let inner = with(&weak)?;
            let coming = inner.coming(&caller, &id)?;
            on_its_own(async move {
                match coming {
                    Some(coming) => coming.asked(&inner).await,
                    None => inner.said(&id),
                }
            })
            .await
        }
    });
    let weak = Arc::downgrade(inner);
    inner.peers.serve(move |caller, Confirm { id }: Confirm| {
        let weak = weak.clone();
        async move {
            let inner = with(&weak)?;
            let coming = inner.coming(&caller, &id)?;
            on_its_own(async move {
                if let Some(coming) = coming {
                    coming.confirmed(&inner).await;
                }
            })
            .await
        }
    });
}

async fn on_its_own<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Refusal> {
    let done = tokio::spawn(work).await;
    done.map_err(|error| Refusal::new(format!("it was broken off: {error}"), "see: journalctl -u ftd"))
}

fn bad_id() -> Refusal {
    Refusal::new("the move's id makes no sense", "are the two nodes' ftd of one version?")
}

impl Inner {
    /// The move with this id, if it is one of the caller's.
    fn coming(&self, caller: &Caller, id: &str) -> Result<Option<Arc<Coming>>, Refusal> {
        if !is_id(id) {
            return Err(bad_id());
        }
        match self.moves().targets.get(id) {
            Some(coming) if coming.from != caller.node => {
                let error = format!("that move is of {}, not of {}", coming.from, caller.node);
                Err(Refusal::new(error, "each node speaks for its own"))
            }
            Some(coming) => {
                coming.hear();
                Ok(Some(Arc::clone(coming)))
            }
            None => Ok(None),
        }
    }

    /// What was said of a move that is over. Of one that is not known nothing runs.
    fn said(&self, id: &str) -> Word {
        let moves = self.moves();
        let known = moves.over.iter().rev().find(|(over, _)| over == id);
        known.map_or(Word::NotServing { why: None }, |(_, word)| word.clone())
    }

    async fn offered(self: Arc<Self>, caller: Caller, offer: Offer) -> Result<InTheWay, Refusal> {
        if !is_id(&offer.id) || offer.units.is_empty() || offer.units.len() > usize::from(u8::MAX) {
            return Err(bad_id());
        }
        let in_the_way = preflight::in_the_way(&self, &caller.node, &offer).await;
        if offer.dry_run || !in_the_way.is_empty() {
            return Ok(in_the_way);
        }
        on_its_own(async move { self.accept(&caller.node, offer).await }).await?.map_err(|error| {
            let Refused { error, mend } = error;
            Refusal { error, mend }
        })?;
        Ok(Vec::new())
    }

    /// Makes room, and holds the units.
    async fn accept(self: &Arc<Self>, from: &str, offer: Offer) -> Result<(), Refused> {
        // What CRIU writes beside memory, and what memory grows by until then.
        let bytes = offer.bytes + offer.bytes / 4 + (64 << 20);
        let scratch = self.places.make(offer.bytes).map_err(|error| Refused::new(error, ""))?;
        let failed = |error: io::Error| Refused::new(format!("no room for images: {error}"), "make room");
        let mut dirs = Vec::new();
        for number in 0..offer.units.len() {
            let dir = scratch.path().join(number.to_string());
            fs::create_dir(&dir).map_err(failed)?;
            dirs.push(dir);
        }
        let moved = offer.units.iter().map(|unit| Moved {
            unit: unit.unit.clone(),
            main_pid: unit.main_pid,
            lock: None,
            held: super::hold_before(self, &unit.unit),
        });
        let phase = Phase::Target(TargetPhase::Receiving);
        let mut record = Record::new(&offer.id, &offer.workload, moved.collect(), from, phase);
        record.address.clone_from(&offer.address);
        {
            let mut known = self.moves();
            if record.units.iter().any(|unit| known.units.contains_key(&unit.unit)) {
                let error = format!("{} is on the move already", record.workload);
                return Err(Refused::new(error, "wait for its end: ftctl events --follow"));
            }
            known.units.extend(record.names().into_iter().map(|unit| (unit, record.id.clone())));
        }
        let coming = self.keep_target(record.clone(), Some(Room { scratch, dirs, bytes }));
        let op = self.tell_phase(&record, None, "receiving", format!("from {from}"));
        let mut state = coming.state.lock().await;
        state.op = Some(op);
        let begun = async {
            self.save(&record).await?;
            for unit in record.names() {
                self.hold(&unit, format!("{MOVING} here from {from}")).await?;
            }
            Ok(())
        };
        let begun = begun.await;
        if begun.is_err() {
            coming.step(self, &mut state, TargetInput::Failed).await;
        }
        drop(state);
        tokio::spawn({
            let (inner, coming) = (Arc::clone(self), Arc::clone(&coming));
            async move { coming.listen(&inner).await }
        });
        begun
    }
}

impl Coming {
    pub(super) fn new(record: Record, room: Option<Room>) -> Self {
        Self {
            id: record.id.clone(),
            from: record.peer.clone(),
            room: Mutex::new(room.as_ref().map(|room| (room.dirs.clone(), room.bytes))),
            state: tokio::sync::Mutex::new(State {
                record,
                room,
                op: None,
                restore_us: 0,
                why: None,
                over: false,
            }),
            received: Arc::default(),
            ended: watch::Sender::new((0, None)),
            heard: Mutex::new(Instant::now()),
        }
    }

    fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Gives up when nothing is heard of the source before it has said go.
    async fn listen(&self, inner: &Arc<Inner>) {
        let limit = inner.config.migrate.silent_for;
        loop {
            let last = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            if last.elapsed() < limit {
                tokio::time::sleep_until(last + limit).await;
                continue;
            }
            let mut state = self.state.lock().await;
            if !state.over && state.record.phase == Phase::Target(TargetPhase::Receiving) {
                state.why =
                    Some(("nothing was heard of the source for too long".into(), "move it again".into()));
                self.step(inner, &mut state, TargetInput::Silent).await;
            }
            return;
        }
    }

    /// Takes the images of one stream.
    async fn take(&self, mut stream: Incoming) {
        let Some((dirs, bytes)) = self.room.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
            return;
        };
        let (pieces, queue) = mpsc::channel(QUEUE);
        let reading = async move {
            loop {
                let piece = match stream.read_chunk(CHUNK, true).await {
                    Ok(Some(chunk)) => Ok(chunk.bytes),
                    Ok(None) => return,
                    Err(error) => Err(io::Error::other(error)),
                };
                self.hear();
                let broken = piece.is_err();
                if pieces.send(piece).await.is_err() || broken {
                    return;
                }
            }
        };
        let count = Arc::clone(&self.received);
        let writing =
            tokio::task::spawn_blocking(move || stream::receive(Chunks::new(queue), &dirs, bytes, &count));
        let ((), written) = tokio::join!(reading, writing);
        let trouble = match written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        self.ended.send_modify(|(count, first)| {
            *count += 1;
            *first = first.take().or(trouble);
        });
    }

    async fn go(&self, inner: &Arc<Inner>, go: Go) -> Word {
        let whole = self.whole(inner, &go).await;
        let mut state = self.state.lock().await;
        if state.over {
            return inner.said(&self.id);
        }
        let input = match whole {
            Ok(()) => TargetInput::Go,
            Err(error) => {
                let mend = "see that both nodes reach each other, and that there is room; then move it again";
                state.why = Some((format!("the images are not whole: {error}"), mend.into()));
                TargetInput::Failed
            }
        };
        let again = state.record.phase != Phase::Target(TargetPhase::Receiving);
        // A Go that comes twice starts nothing twice.
        let input = if again { TargetInput::Asked } else { input };
        state.record.address = state.record.address.take().filter(|_| go.connections);
        self.step(inner, &mut state, input).await;
        self.word(inner, &state)
    }

    /// Waits until all streams have ended, and looks whether everything is there.
    async fn whole(&self, inner: &Inner, go: &Go) -> Result<(), String> {
        let mut ended = self.ended.subscribe();
        let all = ended.wait_for(|(count, trouble)| *count >= go.streams || trouble.is_some());
        let all = timeout(inner.config.cluster.transfer_within, all).await;
        match all.map(|all| all.map(|ended| ended.1.clone())) {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(trouble))) => return Err(trouble),
            Ok(Err(_)) | Err(_) => return Err("not all of them arrive".into()),
        }
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (dirs, _) = room.ok_or("there is no room for them any more")?;
        let files = go.files.clone();
        let looked = tokio::task::spawn_blocking(move || stream::whole(&dirs, &files)).await;
        looked.map_err(io::Error::other).flatten().map_err(|error| error.to_string())
    }

    async fn asked(&self, inner: &Arc<Inner>) -> Word {
        let mut state = self.state.lock().await;
        if !state.over {
            self.step(inner, &mut state, TargetInput::Asked).await;
        }
        self.word(inner, &state)
    }

    async fn confirmed(&self, inner: &Arc<Inner>) {
        let mut state = self.state.lock().await;
        if !state.over {
            self.step(inner, &mut state, TargetInput::Confirmed).await;
        }
    }

    pub(super) async fn resume(&self, inner: &Arc<Inner>) {
        let mut state = self.state.lock().await;
        let same_boot = state.record.boot_id == boot_id();
        let mut runs = same_boot;
        for moved in &state.record.units {
            runs &= unit::runs_as(&inner.systemd, &moved.unit, moved.main_pid).await.unwrap_or(false);
        }
        let detail =
            format!("an earlier ftd has begun it; it {} here", if runs { "runs" } else { "does not run" });
        state.op = Some(inner.tell_phase(&state.record, None, "taken up", detail));
        state.why = Some(("ftd was started again there in the middle of it".into(), "move it again".into()));
        self.step(inner, &mut state, TargetInput::Resumed { runs, same_boot }).await;
    }

    fn word(&self, inner: &Inner, state: &State) -> Word {
        match (state.over, state.record.phase) {
            (true, _) => inner.said(&self.id),
            (false, Phase::Target(TargetPhase::Serving)) => Word::Serving { restore_us: state.restore_us },
            (false, _) => Word::NotServing { why: state.why.clone() },
        }
    }

    /// Feeds the machine, and does what it says until it says nothing more.
    async fn step(&self, inner: &Arc<Inner>, state: &mut State, input: TargetInput) {
        let mut input = input;
        loop {
            let Phase::Target(phase) = state.record.phase else { return };
            let Some((phase, step)) = machine::target(phase, input) else { return };
            let changed = state.record.phase != Phase::Target(phase);
            state.record.phase = Phase::Target(phase);
            if changed {
                state.record.boot_id = boot_id();
                if let Err(error) = inner.save(&state.record).await {
                    tracing::error!(%error, "a move's record");
                    // Without it nothing may begin, and nothing may be said to run.
                    if matches!(phase, TargetPhase::Starting | TargetPhase::Serving) {
                        state.why = Some((error.error, error.mend));
                        state.record.phase = Phase::Target(TargetPhase::Starting);
                        input = TargetInput::Failed;
                        continue;
                    }
                }
            }
            input = match step {
                TargetStep::Restore => {
                    inner.tell_phase(&state.record, state.op, "starting", String::new());
                    match self.restore(inner, state).await {
                        Ok(()) => TargetInput::Done,
                        Err(error) => {
                            state.why = Some((error.error, error.mend));
                            TargetInput::Failed
                        }
                    }
                }
                TargetStep::Serve => {
                    if changed {
                        self.serve(inner, state).await;
                    }
                    return;
                }
                TargetStep::Undo => {
                    let detail = state.why.as_ref().map_or_else(String::new, |(error, _)| error.clone());
                    inner.tell_phase(&state.record, state.op, "undoing", detail);
                    while let Err(error) = self.undo(inner, state).await {
                        tracing::error!(error = error.error, "what a move has begun cannot be undone yet");
                        tokio::time::sleep(AGAIN).await;
                    }
                    TargetInput::Done
                }
                TargetStep::Forget => {
                    let word = match phase {
                        TargetPhase::Serving => Word::Serving { restore_us: state.restore_us },
                        _ => Word::NotServing { why: state.why.clone() },
                    };
                    self.end(inner, state, word).await;
                    return;
                }
                TargetStep::Start => {
                    for moved in &state.record.units {
                        if let Err(error) = inner.unhold(&moved.unit, None).await {
                            tracing::warn!(%error, unit = moved.unit, "a unit stays held");
                        }
                    }
                    self.end(inner, state, Word::Serving { restore_us: 0 }).await;
                    return;
                }
                TargetStep::Wait => return,
            };
        }
    }

    async fn end(&self, inner: &Arc<Inner>, state: &mut State, word: Word) {
        let serves = matches!(word, Word::Serving { .. });
        {
            let mut moves = inner.moves();
            moves.over.push((self.id.clone(), word));
            let more = moves.over.len().saturating_sub(OVER);
            moves.over.drain(..more);
        }
        inner.forget(&state.record).await;
        state.over = true;
        self.drop_room(state).await;
        inner.tell_phase(&state.record, state.op, if serves { "done" } else { "undone" }, String::new());
    }

    async fn drop_room(&self, state: &mut State) {
        self.room.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(room) = state.room.take() {
            let _ = tokio::task::spawn_blocking(move || drop(room.scratch)).await;
        }
    }

    async fn restore(&self, inner: &Arc<Inner>, state: &mut State) -> Result<(), Refused> {
        let begun = std::time::Instant::now();
        let room = state.room.as_ref().ok_or_else(|| Refused::new("the images are gone", "move it again"))?;
        let units: Vec<_> = state.record.names().into_iter().zip(room.dirs.iter().cloned()).collect();
        let criu = Criu::find().map_err(|error| Refused::new(error, "see: ftctl doctor"))?;
        let connections = match &state.record.address {
            Some(_) => unit::Connections::Keep,
            None => unit::Connections::Close,
        };
        // Sockets are bound to it when they are made.
        address::take(state.record.address.as_deref(), &inner.config.cluster).await?;
        let limit = inner.config.migrate.restore_within;
        let restored = unit::restore_units_with(&inner.systemd, &criu, &units, limit, connections).await;
        restored
            .map_err(|error| Refused::new(error, "see: ftctl events, and journalctl -u ftd, on that node"))?;
        state.restore_us = begun.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        Ok(())
    }

    /// It is this node's now, and ftd cares for it as for any other.
    async fn serve(&self, inner: &Arc<Inner>, state: &mut State) {
        for moved in &state.record.units {
            if let Err(error) = inner.unhold(&moved.unit, None).await {
                tracing::warn!(%error, unit = moved.unit, "a unit stays held");
            }
        }
        self.drop_room(state).await;
        inner.tell_phase(&state.record, state.op, "serving", String::new());
    }

    /// Nothing of it runs, and nothing is left, when this is done.
    async fn undo(&self, inner: &Arc<Inner>, state: &mut State) -> Result<(), Refused> {
        let failed = |error: unit::UnitError| Refused::new(error, "see: systemctl status");
        let names = state.record.names();
        // Of an earlier ftd, in the middle of a restore.
        unit::sweep(&inner.systemd).await.map_err(failed)?;
        // Before the processes end: what their connections say then must not reach anybody.
        address::give_up(state.record.address.as_deref()).await?;
        let mut up = BTreeSet::new();
        for name in &names {
            let state = inner.systemd.state(name).await.unwrap_or_default();
            if !matches!(state.as_str(), "inactive" | "failed") {
                up.insert(name.clone());
            }
        }
        if !up.is_empty() {
            unit::quiet(&inner.systemd, &names).await.map_err(failed)?;
            for name in names.iter().rev() {
                unit::end(&inner.systemd, name, MARGIN).await.map_err(failed)?;
            }
        }
        unit::loud(&inner.systemd, &names).await.map_err(failed)?;
        for name in &names {
            inner.systemd.reset_failed(name).await;
        }
        for moved in &state.record.units {
            inner.unhold(&moved.unit, moved.held.clone()).await?;
        }
        self.drop_room(state).await;
        Ok(())
    }
}
