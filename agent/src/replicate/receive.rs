//! Taking generations from the nodes that have taken them.

use std::{
    io::{self, Read},
    sync::{Arc, PoisonError, Weak, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{Begin, Begun, End, Ended, Good, Have, Inner, Pieces, There, stored};
use crate::{
    event::Kind,
    peer::{Caller, Incoming, Refusal},
    snapshot::store::{self, About, Finish, Receive, Reception, Retention},
};

/// Pieces of a stream that may wait for the disk.
const QUEUE: usize = 4;
/// Of this size at most.
const PIECE: usize = 256 << 10;
/// Room is made in the store when so many generations were let go.
const LET_GO: usize = 8;

/// A generation that is arriving.
#[derive(Debug)]
pub(super) struct Transfer {
    from: String,
    reception: Arc<Reception>,
    /// How many streams have ended, and what went wrong with one of them.
    ended: watch::Sender<(usize, Option<String>)>,
    bytes: watch::Sender<u64>,
    began: std::time::Instant,
}

/// Answers other nodes.
pub(super) async fn serve(inner: &Arc<Inner>) {
    let store = inner.store.clone();
    // Before anything new arrives.
    match stored(move || store.salvage()).await {
        Ok(0) => {}
        Ok(chunks) => tracing::info!(chunks, "taken up from a transfer that an earlier ftd had begun"),
        Err(error) => tracing::warn!(error, "what an earlier ftd had received cannot be taken up"),
    }
    let peers = inner.peers.clone();
    let with = |inner: &Arc<Inner>| Arc::downgrade(inner);
    let weak = with(inner);
    peers.serve(move |caller, ask: Have| {
        answer(weak.clone(), async move |inner| inner.have(&caller, ask).await)
    });
    let weak = with(inner);
    peers.serve(move |caller, ask: Begin| {
        answer(weak.clone(), async move |inner| inner.begin(&caller, ask).await)
    });
    let weak = with(inner);
    peers.serve(move |caller, ask: End| {
        answer(weak.clone(), async move |inner| inner.end(&caller, ask).await)
    });
    let weak = with(inner);
    peers.serve(move |caller, ask: Good| {
        answer(weak.clone(), async move |inner| inner.good(&caller, ask).await)
    });
    let weak = with(inner);
    peers.serve_bulk(move |caller, Pieces { transfer }, stream| {
        let weak = weak.clone();
        async move {
            if let Some(inner) = weak.upgrade() {
                inner.take(&caller, transfer, stream).await;
            }
        }
    });
}

async fn answer<T, F: Future<Output = Result<T, Refusal>>>(
    inner: Weak<Inner>,
    work: impl FnOnce(Arc<Inner>) -> F,
) -> Result<T, Refusal> {
    match inner.upgrade() {
        Some(inner) => work(inner).await,
        None => Err(Refusal::new("ftd is ending there", "")),
    }
}

fn refuse(error: String) -> Refusal {
    Refusal::new(error, "see the snapshots there: ftctl snapshot list, ftctl snapshot verify, ftctl events")
}

impl Inner {
    /// Whether this node takes that workload's generations from that node.
    fn allow(&self, caller: &Caller, workload: &str) -> Result<(), Refusal> {
        match self.nodes.get(workload) {
            Some(nodes) if nodes.contains(&caller.node) => Ok(()),
            _ => Err(Refusal::new(
                format!("{} takes no snapshots of {workload} from {}", self.peers.node(), caller.node),
                format!("name both nodes in nodes = [...] of that workload, on {} too", self.peers.node()),
            )),
        }
    }

    async fn have(&self, caller: &Caller, Have { workload }: Have) -> Result<There, Refusal> {
        self.allow(caller, &workload)?;
        let (store, from) = (self.store.clone(), caller.node.clone());
        let all = stored(move || store.generations(&workload)).await.map_err(refuse)?;
        let theirs = all.into_iter().filter(|generation| generation.about.node == from);
        Ok(theirs.map(|one| (one.origin.unwrap_or(one.number), one.good)).collect())
    }

    async fn begin(&self, caller: &Caller, Begin { manifest }: Begin) -> Result<Begun, Refusal> {
        // What came for a transfer that broke off counts.
        let old: Vec<_> = {
            let mut transfers = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
            let numbers: Vec<_> =
                transfers.iter().filter(|(_, one)| one.from == caller.node).map(|(n, _)| *n).collect();
            numbers.into_iter().filter_map(|number| transfers.remove(&number)).collect()
        };
        let store = self.store.clone();
        let received = stored(move || {
            old.iter().try_for_each(|transfer| transfer.reception.flush())?;
            store.receive(&manifest)
        });
        let reception = match received.await.map_err(refuse)? {
            Receive::Known(known) => {
                self.allow_about(caller, &known.about)?;
                return Ok(Begun::Known);
            }
            Receive::New(reception) => reception,
        };
        self.allow_about(caller, reception.about())?;
        let missing = reception.missing().as_bytes().to_vec();
        let transfer = Arc::new(Transfer {
            from: caller.node.clone(),
            reception: Arc::new(reception),
            ended: watch::Sender::new((0, None)),
            bytes: watch::Sender::new(0),
            began: std::time::Instant::now(),
        });
        let mut transfers = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        transfers.insert(number, transfer);
        Ok(Begun::Send { transfer: number, missing })
    }

    fn allow_about(&self, caller: &Caller, about: &About) -> Result<(), Refusal> {
        self.allow(caller, &about.workload)?;
        if about.node == caller.node {
            return Ok(());
        }
        let error = format!("{} sends a snapshot that {} has taken", caller.node, about.node);
        Err(Refusal::new(error, "each node sends its own"))
    }

    fn transfer(&self, caller: &Caller, number: u64) -> Result<Arc<Transfer>, Refusal> {
        let transfers = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
        let transfer = transfers.get(&number).filter(|transfer| transfer.from == caller.node);
        transfer.cloned().ok_or_else(|| Refusal::new("there is no such transfer", "it is begun anew"))
    }

    /// Takes the chunks of one stream.
    async fn take(&self, caller: &Caller, number: u64, mut stream: Incoming) {
        let Ok(transfer) = self.transfer(caller, number) else { return };
        let (pieces, queue) = mpsc::channel(QUEUE);
        let reception = Arc::clone(&transfer.reception);
        let taking = stored(move || {
            let taken = reception.take(Queue { pieces: queue, piece: Vec::new(), at: 0 });
            // Whatever happened: what was right is kept, and not sent again.
            taken.inspect_err(|_| {
                let _ = reception.flush();
            })
        });
        let reading = async move {
            loop {
                let piece = match stream.read_chunk(PIECE, true).await {
                    Ok(Some(chunk)) => Ok(chunk.bytes.to_vec()),
                    Ok(None) => return,
                    Err(error) => Err(io::Error::other(error)),
                };
                let broken = piece.is_err();
                if pieces.send(piece).await.is_err() || broken {
                    return;
                }
            }
        };
        let ((), taken) = tokio::join!(reading, taking);
        let trouble = match taken {
            Ok(bytes) => {
                transfer.bytes.send_modify(|all| *all += bytes);
                None
            }
            Err(error) => Some(error),
        };
        transfer.ended.send_modify(|(count, first)| {
            *count += 1;
            *first = first.take().or(trouble);
        });
    }

    async fn end(
        &self,
        caller: &Caller,
        End { transfer: number, streams, good }: End,
    ) -> Result<Ended, Refusal> {
        let transfer = self.transfer(caller, number)?;
        let mut ended = transfer.ended.subscribe();
        // Not longer than the other side waits for the answer.
        let limit = self.settings.transfer_within.saturating_sub(Duration::from_millis(500));
        let all = async {
            let all = ended.wait_for(|(count, trouble)| *count >= streams || trouble.is_some()).await;
            all.ok().map(|state| state.1.clone())
        };
        let all = timeout(limit, all).await.ok().flatten();
        let trouble = all.unwrap_or_else(|| Some("not all of it arrives".into()));
        if let Some(error) = trouble {
            return Err(refuse(error));
        }
        transfer.ended.send_replace((0, None));
        let reception = Arc::clone(&transfer.reception);
        match stored(move || reception.finish(good)).await.map_err(refuse)? {
            Finish::Missing(missing) => Ok(Ended::Missing(missing.as_bytes().to_vec())),
            Finish::Whole(generation) => {
                self.transfers.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
                let kind = Kind::ReplicaTaken {
                    workload: generation.about.workload.clone(),
                    generation: generation.number,
                    peer: caller.node.clone(),
                    bytes: *transfer.bytes.borrow(),
                    took_ms: transfer.began.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
                };
                self.bus.emit(None, None, kind);
                self.let_go(generation.about.workload).await;
                Ok(Ended::Whole)
            }
        }
    }

    /// Keeps as many generations as are to be kept.
    async fn let_go(&self, workload: String) {
        let (store, keep) = (self.store.clone(), self.keep.get(&workload).copied());
        let gone = stored(move || {
            let mut gone = 0;
            for kind in [store::Kind::Files, store::Kind::Process] {
                let retention = Retention { count: keep, kind: Some(kind), ..Retention::default() };
                gone += store.retain(&workload, &retention, jiff::Timestamp::now())?.len();
            }
            Ok(gone)
        });
        let gone = match gone.await {
            Ok(gone) => self.gone.fetch_add(gone, Ordering::Relaxed) + gone,
            Err(error) => return tracing::warn!(error, "old generations stay for now"),
        };
        // Now and then: it looks at all there is.
        if gone >= LET_GO {
            let store = self.store.clone();
            match stored(move || store.gc()).await {
                Ok(_) => self.gone.store(0, Ordering::Relaxed),
                Err(error) => tracing::debug!(error, "their room is not made free yet"),
            }
        }
    }

    async fn good(&self, caller: &Caller, Good { workload, number }: Good) -> Result<(), Refusal> {
        self.allow(caller, &workload)?;
        let (store, from) = (self.store.clone(), caller.node.clone());
        let marked = stored(move || {
            let all = store.generations(&workload)?;
            let it = all.iter().find(|one| {
                one.about.node == from && one.origin.unwrap_or(one.number) == number && !one.good
            });
            it.map_or(Ok(()), |one| store.mark_good(&workload, one.number))
        });
        marked.await.map_err(refuse)
    }
}

/// Pieces that come from a stream, to be read on another thread.
struct Queue {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Queue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(piece) => (self.piece, self.at) = (piece?, 0),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
