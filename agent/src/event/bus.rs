//! Where events are made: numbered, shown to followers, kept for a while, handed to the journal.
//!
//! `emit` may be called from any thread, the probe's real-time reader among them, so it never
//! waits: not for a slow follower (he is told how many he missed) and not for the disk (the queue to
//! the journal is bounded, and what does not fit is counted and said in the next event).

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use tokio::sync::broadcast;

use super::{Event, Kind, OpId};

/// Events kept in memory for readers, whatever becomes of the disk.
const RECENT: usize = 4096;
/// Events that may wait for the journal's thread.
const QUEUE: usize = 65_536;
/// Events a follower may lag behind before he misses some.
const FOLLOW: usize = 4096;

/// The node's stream of events.
#[derive(Debug)]
pub struct Bus {
    node: String,
    state: Mutex<State>,
    live: broadcast::Sender<Arc<Event>>,
}

#[derive(Debug)]
struct State {
    next_seq: u64,
    recent: VecDeque<Arc<Event>>,
    /// `None` when the bus is closed.
    journal: Option<SyncSender<Arc<Event>>>,
    unwritten: u64,
    /// Why the journal cannot be written, while it cannot.
    blocked: Option<String>,
}

impl Bus {
    /// A bus whose first event gets the number `next_seq`, and the end of the queue from which the
    /// journal is to be written.
    pub fn new(node: String, next_seq: u64) -> (Arc<Self>, Receiver<Arc<Event>>) {
        let (journal, queue) = sync_channel(QUEUE);
        let recent = VecDeque::with_capacity(RECENT);
        let state = State { next_seq, recent, journal: Some(journal), unwritten: 0, blocked: None };
        let live = broadcast::Sender::new(FOLLOW);
        (Arc::new(Self { node, state: Mutex::new(state), live }), queue)
    }

    /// The node's name, as it stands in every event.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Publishes what happened; answers its number.
    pub fn emit(&self, unit: Option<&str>, op: Option<OpId>, kind: Kind) -> u64 {
        self.publish(unit, |_| op, kind)
    }

    /// Publishes what opens an operation; answers the operation's id.
    pub fn open(&self, unit: Option<&str>, kind: Kind) -> OpId {
        OpId(self.publish(unit, |seq| Some(OpId(seq)), kind))
    }

    fn publish(&self, unit: Option<&str>, op: impl FnOnce(u64) -> Option<OpId>, kind: Kind) -> u64 {
        let mut state = self.state();
        let seq = state.next_seq;
        let queued = state.push(&self.node, &self.live, unit, op(seq), kind);
        if queued && state.unwritten > 0 {
            let count = state.unwritten;
            let kind = Kind::EventsDropped { place: "journal".into(), count };
            if state.push(&self.node, &self.live, None, None, kind) {
                state.unwritten -= count;
            }
        }
        seq
    }

    /// The number of the next event.
    pub fn next_seq(&self) -> u64 {
        self.state().next_seq
    }

    /// Why the journal cannot be written, by the last event that told of it.
    pub fn journal_blocked(&self) -> Option<String> {
        self.state().blocked.clone()
    }

    /// Follows the stream from now on.
    pub fn follow(&self) -> broadcast::Receiver<Arc<Event>> {
        self.live.subscribe()
    }

    /// Lets the journal's thread finish: what is emitted after this is not written.
    pub fn close(&self) {
        self.state().journal = None;
    }

    /// The events still in memory, oldest first, and a follower that goes on exactly after them.
    pub fn recent_and_follow(&self) -> (Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let state = self.state();
        (state.recent.iter().cloned().collect(), self.live.subscribe())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(
        &mut self,
        node: &str,
        live: &broadcast::Sender<Arc<Event>>,
        unit: Option<&str>,
        op: Option<OpId>,
        kind: Kind,
    ) -> bool {
        match &kind {
            Kind::JournalBlocked { cause, .. } => self.blocked = Some(cause.clone()),
            Kind::JournalBack { .. } => self.blocked = None,
            _ => {}
        }
        let event = Arc::new(Event {
            seq: self.next_seq,
            time: jiff::Timestamp::now(),
            node: node.to_owned(),
            unit: unit.map(str::to_owned),
            op,
            kind,
        });
        self.next_seq += 1;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Arc::clone(&event));
        let journal = self.journal.as_ref();
        let queued = journal.is_some_and(|journal| journal.try_send(Arc::clone(&event)).is_ok());
        if !queued {
            self.unwritten += 1;
        }
        // An error only says that nobody follows.
        let _ = live.send(event);
        queued
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stop() -> Kind {
        Kind::AgentStopped {}
    }

    #[test]
    fn numbers_grow_by_one_and_an_operation_is_named_after_its_first_event() {
        let (bus, _queue) = Bus::new("n".into(), 10);
        assert_eq!(bus.emit(None, None, stop()), 10);
        let op = bus.open(Some("a.service"), stop());
        assert_eq!(op, OpId(11));
        bus.emit(Some("a.service"), Some(op), stop());
        let (recent, _) = bus.recent_and_follow();
        assert_eq!(recent.iter().map(|e| e.seq).collect::<Vec<_>>(), [10, 11, 12]);
        assert_eq!(recent[1].op, Some(op));
    }

    #[test]
    fn what_the_journal_cannot_take_is_counted_and_said() {
        let (bus, queue) = Bus::new("n".into(), 0);
        for _ in 0..QUEUE + 7 {
            bus.emit(None, None, stop());
        }
        assert_eq!(queue.try_iter().count(), QUEUE);
        bus.emit(None, None, stop());
        let after: Vec<_> = queue.try_iter().map(|e| e.kind.clone()).collect();
        assert_eq!(after, [stop(), Kind::EventsDropped { place: "journal".into(), count: 7 }]);
    }
}
