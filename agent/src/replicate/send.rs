//! Sending generations that were taken here to the other nodes of their workloads.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{Begin, Begun, End, Ended, Good, Have, Inner, Pieces, ReplicaStatus, Sending, There, stored};
use crate::{
    event,
    peer::{CallError, Outgoing},
    snapshot::store::{Chunks, Generation, Kind, Parcel},
};

/// What is read and sent in one piece.
const PIECE: usize = 256 << 10;
/// A stream of its own is worth it for this much.
const PER_STREAM: u64 = 1 << 20;
/// So often is sent again what was removed there meanwhile.
const ROUNDS: usize = 3;
/// Wait after something went wrong, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Sends, for ever.
pub(super) fn run(inner: &Arc<Inner>) {
    let workloads: Vec<_> = inner.nodes.keys().cloned().collect();
    let notices = inner.store.notices(&workloads).unwrap_or_else(|error| {
        // Then new snapshots are sent when connections come and go, which is better than not at all.
        tracing::error!(%error, "new snapshots are not noticed");
        workloads.iter().map(|name| (name.clone(), watch::Sender::new(0).subscribe())).collect()
    });
    let mut paces = std::collections::HashMap::new();
    for (workload, nodes) in &inner.nodes {
        let Some(notice) = notices.get(workload) else { continue };
        for peer in nodes.iter().filter(|node| *node != inner.peers.node()) {
            let pace = paces.entry(peer.clone()).or_insert_with(|| Arc::new(Pace::new(inner.bandwidth())));
            let sender = Sender {
                inner: Arc::clone(inner),
                workload: workload.clone(),
                peer: peer.clone(),
                pace: Arc::clone(pace),
                began: jiff::Timestamp::now(),
                behind: Notify::new(),
            };
            let status = ReplicaStatus {
                workload: workload.clone(),
                peer: peer.clone(),
                newest: None,
                there: None,
                taken: None,
                behind_since: None,
                sending: None,
                problem: None,
            };
            inner.status().insert(sender.key(), status);
            tokio::spawn(sender.run(notice.clone()));
        }
    }
}

impl Inner {
    fn bandwidth(&self) -> Option<u64> {
        self.settings.bandwidth.map(|bandwidth| bandwidth.as_u64())
    }
}

/// How fast may be sent to a peer, over all workloads.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes per second.
    most: Option<u64>,
    next: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(most: Option<u64>) -> Self {
        Self { most, next: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may be sent.
    pub(super) async fn wait(&self, bytes: usize) {
        let Some(most) = self.most else { return };
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = (*next).max(Instant::now());
            *next = turn + Duration::from_secs_f64(bytes as f64 / most.max(1) as f64);
            turn
        };
        sleep_until(turn).await;
    }
}

/// A generation as far as it matters for what is sent.
pub(super) type Brief = (u64, Kind, bool);

fn brief(generation: &Generation) -> Brief {
    (generation.number, generation.about.kind, generation.good)
}

/// What is sent next: of files and of processes the newest generation, and before it the last good one. `here` is what
/// this node has taken, oldest first.
pub(super) fn next(here: &[Brief], there: &[(u64, bool)]) -> Option<u64> {
    let has = |number: u64| there.iter().any(|(other, _)| *other == number);
    let wanted = [Kind::Files, Kind::Process].into_iter().flat_map(|kind| {
        let mut all = here.iter().filter(move |(_, of, _)| *of == kind);
        let newest = all.clone().next_back();
        let good = all.rfind(|(.., good)| *good);
        good.into_iter().chain(newest).map(|(number, ..)| *number)
    });
    wanted.into_iter().find(|number| !has(*number))
}

/// Those that are good here, and there too but nobody knows it there.
pub(super) fn unmarked(here: &[Brief], there: &[(u64, bool)]) -> Vec<u64> {
    let good = |number: u64| here.iter().any(|(other, _, good)| *other == number && *good);
    there.iter().filter(|(number, known)| !known && good(*number)).map(|(number, _)| *number).collect()
}

/// Why a generation was not sent, and what to do about it.
struct Trouble(String, String);

impl From<CallError> for Trouble {
    fn from(error: CallError) -> Self {
        let mend = match &error {
            CallError::Refused { refusal, .. } => refusal.mend.clone(),
            CallError::Unknown { peer } => {
                format!(
                    "install the same ftd on {peer}, and name both nodes in nodes of the workload there too"
                )
            }
            _ => "ftd tries again by itself; see: ftctl cluster peers".into(),
        };
        Self(error.to_string(), mend)
    }
}

impl From<String> for Trouble {
    fn from(error: String) -> Self {
        Self(error, "see: ftctl snapshot verify".into())
    }
}

/// Sends the generations of one workload to one node.
struct Sender {
    inner: Arc<Inner>,
    workload: String,
    peer: String,
    pace: Arc<Pace>,
    began: jiff::Timestamp,
    /// Told when there is a generation that is not there, after there was none.
    behind: Notify,
}

impl Sender {
    fn key(&self) -> (String, String) {
        (self.workload.clone(), self.peer.clone())
    }

    fn say(&self, change: impl FnOnce(&mut ReplicaStatus)) {
        if let Some(status) = self.inner.status().get_mut(&self.key()) {
            change(status);
        }
    }

    async fn run(self, mut notice: watch::Receiver<u64>) {
        let mut connections = self.inner.peers.changes();
        let (mut wait, mut told) = (AGAIN.0, false);
        loop {
            notice.borrow_and_update();
            let step = self.telling(&mut told, self.step()).await;
            let connected = self.inner.peers.connected(&self.peer);
            match step {
                // There may be more to do.
                Ok(true) => wait = AGAIN.0,
                Ok(false) => {
                    wait = AGAIN.0;
                    let news = async {
                        tokio::select! {
                            changed = notice.changed() => changed.is_ok(),
                            changed = connections.wait_for(|_| self.inner.peers.connected(&self.peer) != connected) =>
                                changed.is_ok(),
                        }
                    };
                    if !self.telling(&mut told, news).await {
                        return;
                    }
                }
                Err(Trouble(cause, mend)) => {
                    tracing::debug!(workload = self.workload, peer = self.peer, cause, "not sent");
                    self.say(|status| status.problem = Some((cause, mend)));
                    // Not before there is a connection.
                    let again = async {
                        if !connected {
                            let _ = connections.wait_for(|_| self.inner.peers.connected(&self.peer)).await;
                        }
                        sleep(wait).await;
                    };
                    self.telling(&mut told, again).await;
                    wait = if connected { (wait * 2).min(AGAIN.1) } else { AGAIN.0 };
                }
            }
        }
    }

    /// Does something, and tells in time that the other node is behind, or is not any more.
    async fn telling<T>(&self, told: &mut bool, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => {
                    self.tell(told);
                    return done;
                }
                // From now on there is something to be late with.
                () = self.behind.notified() => {}
                () = sleep_until(self.late(*told)) => self.tell(told),
            }
        }
    }

    /// When it is to be told that the other node is behind.
    fn late(&self, told: bool) -> Instant {
        let far = Instant::now() + Duration::from_hours(24);
        let limit = self.inner.settings.replica_late;
        let status = self.inner.status().get(&self.key()).cloned();
        let behind = status.filter(|status| status.behind_since.is_some());
        match behind.map(|status| status.lag(jiff::Timestamp::now())) {
            Some(lag) if !told => Instant::now() + limit.saturating_sub(lag) + Duration::from_millis(1),
            _ => far,
        }
    }

    fn tell(&self, told: &mut bool) {
        let Some(status) = self.inner.status().get(&self.key()).cloned() else { return };
        let lag = status.lag(jiff::Timestamp::now());
        let (workload, peer) = (self.workload.clone(), self.peer.clone());
        if status.behind_since.is_none() {
            if std::mem::take(told) {
                self.inner.bus.emit(None, None, event::Kind::ReplicaCaughtUp { workload, peer });
            }
        } else if lag >= self.inner.settings.replica_late && !std::mem::replace(told, true) {
            let slow = || {
                ("it is on its way".to_owned(), "see how fast: ftctl status, ftctl cluster peers".to_owned())
            };
            let (cause, mend) = status.problem.unwrap_or_else(slow);
            let behind_ms = lag.as_millis().try_into().unwrap_or(u64::MAX);
            self.inner.bus.emit(
                None,
                None,
                event::Kind::ReplicaBehind { workload, peer, behind_ms, cause, mend },
            );
        }
    }

    /// What this node has taken of the workload, oldest first.
    async fn here(&self) -> Result<Vec<Generation>, Trouble> {
        let (store, workload, node) =
            (self.inner.store.clone(), self.workload.clone(), self.inner.peers.node().to_owned());
        let mut all = stored(move || store.generations(&workload)).await?;
        all.retain(|generation| generation.about.node == node && generation.origin.is_none());
        Ok(all)
    }

    /// Sends one generation, if there is one to be sent. Answers whether it did.
    async fn step(&self) -> Result<bool, Trouble> {
        let all = self.here().await?;
        let here: Vec<_> = all.iter().map(brief).collect();
        self.compare(&all, None);
        if here.is_empty() {
            return Ok(false);
        }
        let ask = Have { workload: self.workload.clone() };
        let there = self.inner.peers.call(&self.peer, &ask).await?;
        self.compare(&all, Some(&there));
        for number in unmarked(&here, &there) {
            let good = Good { workload: self.workload.clone(), number };
            self.inner.peers.call(&self.peer, &good).await?;
        }
        let Some(number) = next(&here, &there) else {
            self.say(|status| status.problem = None);
            return Ok(false);
        };
        let good = here.iter().any(|(one, _, good)| *one == number && *good);
        let began = Instant::now();
        let sent = self.send(number, good).await;
        self.say(|status| status.sending = None);
        let bytes = sent?;
        self.say(|status| status.problem = None);
        let kind = event::Kind::Replicated {
            workload: self.workload.clone(),
            generation: number,
            peer: self.peer.clone(),
            bytes,
            took_ms: began.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
        };
        self.inner.bus.emit(None, None, kind);
        Ok(true)
    }

    /// Puts into the status what is here, and what is there.
    fn compare(&self, here: &[Generation], there: Option<&There>) {
        self.say(|status| {
            status.newest = here.last().map(|one| one.number);
            if let Some(there) = there {
                let common = here.iter().rfind(|one| there.iter().any(|(number, _)| *number == one.number));
                // Those that are let go here are there all the same.
                let last = there.iter().map(|(number, _)| *number).max();
                (status.there, status.taken) = (last, common.map(|one| one.about.time).or(status.taken));
            }
            let last = status.there.unwrap_or(0);
            let waiting = here.iter().find(|one| one.number > last).map(|one| one.about.time);
            // As long as the other node was not asked, it may well be there: the time counts from now on.
            let began = if status.there.is_none() { self.began } else { jiff::Timestamp::MIN };
            if status.behind_since.is_none() && waiting.is_some() {
                self.behind.notify_one();
            }
            status.behind_since = waiting.map(|waiting| waiting.max(began));
        });
    }

    /// Sends a generation. Answers how many bytes went over the wire for its chunks.
    async fn send(&self, number: u64, good: bool) -> Result<u64, Trouble> {
        let (store, workload) = (self.inner.store.clone(), self.workload.clone());
        let parcel = stored(move || store.parcel(&workload, number)).await?;
        let limit = self.inner.settings.transfer_within;
        let begin = Begin { manifest: parcel.manifest().to_vec() };
        let (transfer, mut missing) = match self.inner.peers.call_for(&self.peer, &begin, limit).await? {
            Begun::Known => return Ok(0),
            Begun::Send { transfer, missing } => (transfer, Chunks::from_bytes(missing)),
        };
        drop(begin);
        let mut bytes = 0;
        for _ in 0..ROUNDS {
            let streams = self.pieces(&parcel, transfer, number, &missing, &mut bytes).await?;
            let end = End { transfer, streams, good };
            match self.inner.peers.call_for(&self.peer, &end, limit).await? {
                Ended::Whole => return Ok(bytes),
                Ended::Missing(again) => missing = Chunks::from_bytes(again),
            }
        }
        Err(Trouble(
            format!("chunks of generation {number} are removed on {} as fast as they are sent", self.peer),
            "raise snapshot.quota or snapshot.keep there".into(),
        ))
    }

    /// Sends chunks, on several streams. Answers on how many.
    async fn pieces(
        &self,
        parcel: &Parcel,
        transfer: u64,
        generation: u64,
        missing: &Chunks,
        bytes: &mut u64,
    ) -> Result<usize, Trouble> {
        let numbers: Arc<Vec<_>> = Arc::new(missing.numbers(parcel.count()).collect());
        let total: u64 = numbers.iter().map(|number| parcel.size(*number)).sum();
        let streams = self.inner.settings.streams.min((total / PER_STREAM) as usize).max(1);
        let streams = if numbers.is_empty() { 0 } else { streams };
        self.say(|status| status.sending = Some(Sending { generation, done: 0, total }));
        let (taken, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for _ in 0..streams {
            let (pieces, queue) = mpsc::channel(2);
            let (parcel, numbers, taken) = (parcel.clone(), Arc::clone(&numbers), Arc::clone(&taken));
            tasks.spawn(async move { stored(move || read(&parcel, &numbers, &taken, &pieces)).await });
            let stream = self.inner.peers.bulk(&self.peer, &Pieces { transfer }).await?;
            let (pace, done) = (Arc::clone(&self.pace), Arc::clone(&done));
            let status = Arc::downgrade(&self.inner);
            let (key, limit) = (self.key(), self.inner.settings.transfer_within);
            tasks.spawn(async move {
                write(stream, queue, &pace, limit, |sent| {
                    let all = done.fetch_add(sent, Ordering::Relaxed) + sent;
                    if let Some(inner) = status.upgrade()
                        && let Some(status) = inner.status().get_mut(&key)
                        && let Some(sending) = &mut status.sending
                    {
                        sending.done = all;
                    }
                })
                .await
            });
        }
        while let Some(task) = tasks.join_next().await {
            match task {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(error.into()),
                Err(error) => return Err(error.to_string().into()),
            }
        }
        *bytes += done.load(Ordering::Relaxed);
        Ok(streams)
    }
}

/// Reads chunks that nobody else has taken on, and passes them on in pieces.
fn read(
    parcel: &Parcel,
    numbers: &[usize],
    taken: &AtomicUsize,
    pieces: &mpsc::Sender<Vec<u8>>,
) -> crate::snapshot::store::Result<()> {
    let (mut reader, mut piece) = (parcel.reader()?, Vec::with_capacity(PIECE + PIECE / 2));
    while let Some(number) = numbers.get(taken.fetch_add(1, Ordering::Relaxed)) {
        reader.read(*number, &mut piece)?;
        if piece.len() >= PIECE {
            let full = std::mem::replace(&mut piece, Vec::with_capacity(PIECE + PIECE / 2));
            // Nobody takes it: the stream is broken, and says so itself.
            if pieces.blocking_send(full).is_err() {
                return Ok(());
            }
        }
    }
    if !piece.is_empty() {
        let _ = pieces.blocking_send(piece);
    }
    Ok(())
}

/// Writes pieces to a stream, not faster than may be; an end of them is the end of the stream.
async fn write(
    mut stream: Outgoing,
    mut queue: mpsc::Receiver<Vec<u8>>,
    pace: &Pace,
    limit: Duration,
    mut sent: impl FnMut(u64),
) -> Result<(), String> {
    while let Some(piece) = queue.recv().await {
        let length = piece.len();
        pace.wait(length).await;
        // A piece that is not taken for so long is not taken at all.
        match timeout(limit, stream.write(piece)).await {
            Ok(written) => written.map_err(|error| format!("the transfer broke off: {error}"))?,
            Err(_) => return Err("the other side takes nothing any more".into()),
        }
        sent(length as u64);
    }
    match timeout(limit, stream.finish()).await {
        Ok(finished) => finished.map_err(|error| format!("the transfer broke off: {error}")),
        Err(_) => Err("the other side takes nothing any more".into()),
    }
}
