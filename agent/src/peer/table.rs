//! All peers, and for each the one connection that counts.
//!
//! # One connection per pair
//!
//! Both sides may dial, at the same moment. Whoever is dialled decides whether the new connection takes the place of
//! the one that there is, and says so in its answer to the greeting; whoever dials goes by that, and by the same rule
//! ([`wins`]). The rule is one that both sides come to the same answer by:
//!
//! - a connection of which nothing is heard counts for nothing, nor does one of a run of ftd that is over;
//! - one that is made on purpose to take another's place (with a renewed certificate) takes it;
//! - else the one wins that the node with the smaller name has dialled, and of two by the same node the newer.
//!
//! The one that loses is not cut off: what is under way on it is done, and then it is closed.
//!
//! # Up and down
//!
//! A peer is up from its first connection until nothing was heard of it for `cluster.down_after`, or it said good-bye. A
//! connection that breaks and comes back before that is not an event; that it came back over another address is.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Core,
    connection::Live,
    refused::{self, Why, code},
};
use crate::{config::cluster::Peer, event::Kind};

/// A connection that lost its place is closed when nothing went over it for this long,
const QUIET: Duration = Duration::from_millis(500);
/// and at the latest after this.
const RETIRED_AT_MOST: Duration = Duration::from_secs(30);

/// What is known of all peers.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) slots: BTreeMap<String, Slot>,
}

/// What is known of one peer.
#[derive(Debug)]
pub(super) struct Slot {
    /// Where it can be dialled; nowhere, for one that is not configured here and dials by itself.
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) current: Option<Arc<Live>>,
    pub(super) up: bool,
    /// Since when it is up or down.
    pub(super) since: jiff::Timestamp,
    /// Why it is down, or could not be dialled.
    pub(super) why: Option<Why>,
    /// When something was last heard of it on a connection that is gone.
    heard: Instant,
    /// The last address that worked.
    pub(super) last: Option<SocketAddr>,
    /// Told that it is down, or was never up.
    told: bool,
    /// Wants another connection in place of the one that there is.
    pub(super) renew: bool,
    /// Grows with each connection: who waits for a peer's end must not take a later one's for it.
    turn: u64,
}

impl Slot {
    pub(super) fn new(addresses: Vec<SocketAddr>) -> Self {
        Self {
            addresses,
            current: None,
            up: false,
            since: jiff::Timestamp::now(),
            why: None,
            heard: Instant::now(),
            last: None,
            told: false,
            renew: false,
            turn: 0,
        }
    }
}

/// What decides between two connections with the same peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claim {
    /// This node has dialled it.
    pub(super) ours: bool,
    /// It was made to take the other's place.
    pub(super) replaces: bool,
    /// The peer's run of ftd.
    pub(super) run: u64,
    /// Nothing was heard on it for too long.
    pub(super) silent: bool,
}

/// Whether `new` takes the place of `old`; `first`: this node's name is the smaller one.
pub(super) fn wins(new: Claim, old: Claim, first: bool) -> bool {
    if old.silent || new.run != old.run || new.replaces {
        return true;
    }
    new.ours == old.ours || new.ours == first
}

fn lock(core: &Core) -> MutexGuard<'_, Table> {
    core.table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// Takes a look at what is known, or changes it. Nobody waits in there.
    pub(super) fn table<T>(&self, look: impl FnOnce(&mut Table) -> T) -> T {
        look(&mut lock(self))
    }

    /// Those who wait for a change look again.
    pub(super) fn touch(&self) {
        self.changes.send_modify(|number| *number += 1);
    }

    /// A peer that is to be reached.
    pub(super) fn expect(self: &Arc<Self>, peer: &Peer) {
        self.table(|table| table.slots.insert(peer.name.clone(), Slot::new(peer.addresses.clone())));
        self.judge_later(&peer.name, 0);
    }

    /// Whether a peer has to be dialled: there is no connection, or none that is of use. `true` in the answer: to take
    /// the place of one that is.
    pub(super) fn wants(&self, peer: &str) -> Option<bool> {
        self.table(|table| {
            let slot = table.slots.get(peer)?;
            match &slot.current {
                None => Some(false),
                Some(_) if slot.renew => Some(true),
                Some(live) => (live.silence() > self.settings.silent_after).then_some(false),
            }
        })
    }

    /// The connection with a peer.
    pub(super) fn current(&self, peer: &str) -> Option<Arc<Live>> {
        self.table(|table| table.slots.get(peer)?.current.clone())
    }

    /// A connection with a peer that has shown who it is. Answers whether it is the one that counts from now on.
    pub(super) fn adopt(self: &Arc<Self>, live: &Arc<Live>) -> bool {
        enum News {
            Up,
            Path(Why),
            None,
        }
        let (loser, news) = self.table(|table| {
            let slot = table.slots.entry(live.peer.clone()).or_insert_with(|| Slot::new(Vec::new()));
            if let Some(old) = &slot.current
                && !wins(live.claim(self), old.claim(self), self.node < live.peer)
            {
                return (Arc::clone(live), News::None);
            }
            let news = match (slot.up, slot.last) {
                (false, _) => News::Up,
                (true, Some(last)) if last.ip() != live.address.ip() => {
                    News::Path(slot.why.clone().unwrap_or_else(|| Why::new("nothing was heard there", "")))
                }
                _ => News::None,
            };
            if !slot.up {
                (slot.up, slot.since, slot.told) = (true, jiff::Timestamp::now(), false);
            }
            slot.last = Some(live.address);
            slot.why = None;
            slot.turn += 1;
            let old = slot.current.replace(Arc::clone(live));
            (old.unwrap_or_else(|| Arc::clone(live)), news)
        });
        let peer = live.peer.clone();
        match news {
            News::Up => {
                let (address, version) = (live.address.to_string(), live.hello.version.clone());
                tracing::info!(peer, address, "up");
                self.bus.emit(None, None, Kind::PeerUp { peer, address, version });
            }
            News::Path(why) => {
                let address = live.address.to_string();
                self.bus.emit(None, None, Kind::PeerPath { peer, address, cause: why.cause });
            }
            News::None => {}
        }
        let won = self.current(&live.peer).is_some_and(|current| Arc::ptr_eq(&current, live));
        if !won || !Arc::ptr_eq(&loser, live) {
            retire(loser);
        }
        self.touch();
        won
    }

    /// A connection is over.
    pub(super) fn lost(self: &Arc<Self>, live: &Arc<Live>, why: Why, farewell: bool) {
        let turn = self.table(|table| {
            let slot = table.slots.get_mut(&live.peer)?;
            let current = slot.current.as_ref()?;
            if !Arc::ptr_eq(current, live) {
                return None;
            }
            slot.current = None;
            slot.heard = Instant::now().checked_sub(live.silence()).unwrap_or(slot.heard);
            if farewell {
                slot.heard = Instant::now().checked_sub(self.settings.down_after).unwrap_or(slot.heard);
            }
            slot.why = Some(why);
            Some(slot.turn)
        });
        self.touch();
        if let Some(turn) = turn {
            self.judge_later(&live.peer, turn);
        }
    }

    /// A dial begins or has failed that is to replace what there is.
    pub(super) fn renewing(&self, peer: &str, still: bool) {
        self.table(|table| {
            if let Some(slot) = table.slots.get_mut(peer) {
                slot.renew = still && slot.current.is_some();
            }
        });
    }

    /// A peer could not be dialled.
    pub(super) fn failed(&self, peer: &str, why: Why) {
        self.table(|table| {
            if let Some(slot) = table.slots.get_mut(peer)
                && slot.current.is_none()
            {
                slot.why = Some(why);
            }
        });
    }

    /// Tells that a peer is down when nothing was heard of it for long enough since this turn.
    fn judge_later(self: &Arc<Self>, peer: &str, turn: u64) {
        let (core, peer) = (Arc::clone(self), peer.to_owned());
        tokio::spawn(async move {
            let heard = core.table(|table| table.slots.get(&peer).map(|slot| slot.heard));
            let Some(heard) = heard else { return };
            tokio::time::sleep_until(heard + core.settings.down_after).await;
            core.judge(&peer, turn);
        });
    }

    fn judge(&self, peer: &str, turn: u64) {
        let down = self.table(|table| {
            let slot = table.slots.get_mut(peer)?;
            if slot.current.is_some() || slot.turn != turn || slot.told {
                return None;
            }
            let up = slot.up.then(|| jiff::Timestamp::now().duration_since(slot.since).as_millis());
            (slot.up, slot.told) = (false, true);
            if up.is_some() {
                slot.since = jiff::Timestamp::now();
            }
            let why = slot.why.clone().unwrap_or_else(|| Why::new("nothing is heard of it", ""));
            Some((why, up))
        });
        if let Some((Why { cause, mend, .. }, up)) = down {
            tracing::warn!(peer, cause, "down");
            let up_ms = up.and_then(|ms| ms.try_into().ok());
            self.bus.emit(None, None, Kind::PeerDown { peer: peer.to_owned(), cause, mend, up_ms });
            self.touch();
        }
    }
}

/// Lets a connection do what is under way, and ends it.
fn retire(live: Arc<Live>) {
    tokio::spawn(async move {
        let quiet = async {
            let mut busy = live.busy();
            loop {
                if busy.wait_for(|busy| *busy == 0).await.is_err() {
                    return;
                }
                if tokio::time::timeout(QUIET, busy.wait_for(|busy| *busy > 0)).await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(RETIRED_AT_MOST, quiet).await;
        refused::close(&live.connection, code::DOUBLE, "another connection is used");
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(ours: bool) -> Claim {
        Claim { ours, replaces: false, run: 1, silent: false }
    }

    #[test]
    fn what_is_heard_of_goes_before_who_dialled_and_that_before_when() {
        let (ours, theirs) = (claim(true), claim(false));
        assert!(wins(ours, theirs, true) && !wins(theirs, ours, true));
        assert!(!wins(ours, theirs, false) && wins(theirs, ours, false));
        assert!(wins(ours, ours, false) && wins(theirs, theirs, true), "the newer one of the same");
        assert!(wins(theirs, Claim { silent: true, ..ours }, true));
        assert!(wins(theirs, Claim { run: 2, ..ours }, true));
        assert!(wins(Claim { replaces: true, ..theirs }, ours, true));
    }

    proptest! {
        /// Two connections, one dialled by each side, both alive: whatever the order in which the two sides come to know
        /// of them, they keep the same one.
        #[test]
        fn both_sides_keep_the_same_one(a_first: bool, b_first: bool) {
            // Connection 0 is dialled by A, whose name is the smaller one; connection 1 by B.
            let kept = |order: [usize; 2], is_a: bool| {
                let claim = |n: usize| claim((n == 0) == is_a);
                let mut current = order[0];
                if wins(claim(order[1]), claim(current), is_a) {
                    current = order[1];
                }
                current
            };
            let order = |first: bool| if first { [0, 1] } else { [1, 0] };
            prop_assert_eq!(kept(order(a_first), true), kept(order(b_first), false));
        }
    }
}
