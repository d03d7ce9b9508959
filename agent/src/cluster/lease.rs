//! The lease: the right to serve a workload, for a time. At most one node has it, and this is why.
//!
//! # What is promised
//!
//! At no moment do two nodes hold leases of the same workload. What a node may do without a lease is
//! settled elsewhere: the fence, in its kernel, lets packets of the workload's address pass only before the
//! lease's end, whatever its user space does. So at most one node answers.
//!
//! # Who says what
//!
//! The log (consensus) says where a workload is placed: a node and an [`Epoch`]. One node leads the log in
//! a [`Term`]; it *grants* leases to the nodes where workloads are placed ([`Granter`]). Each node *holds*
//! what it is granted ([`Holder`]). Every `renew` a node sends a [`Renewal`], and gets an [`Answer`] that
//! grants it the length `lease` for each workload that is placed on it and not about to leave.
//!
//! # The clocks
//!
//! Every moment is of one node's `CLOCK_BOOTTIME`, and no moment of one node is ever compared with one of
//! another. It runs on while the host is suspended, it is not set by anybody, and the BPF programs of the
//! fence read the same. What can be done to it is that it runs slow or fast: crystals by less than 100 ppm,
//! clock daemons that slew it by 500 ppm (ntpd, systemd-timesyncd) or 83 333 ppm (chrony's default), all
//! of them by no more than adjtimex(2) takes, 10 %. The argument needs one bound: in a true second, each
//! clock advances by `1 - drift` to `1 + drift` seconds.
//!
//! # The arithmetic
//!
//! 1. A holder reads its clock **before** it sends a renewal. The lease that it gets by the answer ends
//!    `lease` after *that* moment, however late the answer comes, is looked at, or is written where the
//!    fence reads it. Let the true time of sending be `s`: the lease is over at the true time
//!    `s + lease / (1 - drift)` at the latest.
//! 2. The granter reads its clock when it answers, which is after `s`, and counts the lease as held for
//!    [`Terms::hold`] from then: `hold = lease * (1 + drift) / (1 - drift) + margin`. Of true time this is at
//!    least `lease / (1 - drift) + margin / (1 + drift)`: its count ends after the lease, and by the margin.
//! 3. The `margin` is for what is under way: a packet that passed the fence in the last moment waits in a queue,
//!    on the wire, in a switch.
//! 4. A workload is placed elsewhere (an entry in the log, with the next epoch) only when the leader counts no
//!    lease of the epoch before it: they have run out ([`Granter::is_over`]), or their holder has given up.
//!    It grants none in the meantime ([`Granter::revoke`]). So by the time that any node can hear of the new
//!    epoch, every lease of the old one is over.
//!
//! # When the leader changes
//!
//! A new leader does not know what the old one has granted, and the old one may not know yet that it is not the
//! leader any more.
//!
//! 5. A leader answers a renewal with a grant only when a majority has confirmed that it leads, in a round that
//!    it began **after** the renewal had arrived ([`Granter::answer`]). A majority also elected the next leader,
//!    and somebody is in both: who first confirmed, then voted. So a renewal that an old leader grants was
//!    sent before the new one was elected.
//! 6. A new leader counts every workload as held for `hold` from a moment after its election
//!    ([`Granter::new`]): by 1 and 5, every lease that an old leader ever granted is over by then. It may
//!    *renew* at once, once it has applied all entries of the terms before (an entry of its own term is
//!    committed): the placement is the same, so the holder is.
//!
//! # When the holder gives up
//!
//! A node that hands a workload over closes its fence first, then says so in its renewals, until the workload is
//! placed anew. From the moment of giving up it takes no grant of that epoch, whatever answers are still
//! under way ([`Holder::give_up`]). But ftd may end and begin again and, not having heard that its word was
//! taken, be granted the same epoch once more; and the old word may arrive after that. So
//!
//! 7. each life of ftd has a number ([`Incarnation`]) greater than those before it, and a granter that has heard of
//!    one life takes no word of an earlier one; and a word counts only in renewals that show that the node
//!    has heard *this* leader: then any later life began after the election, and by 5 nobody else can
//!    grant it anything.
//!
//! # When only one direction works
//!
//! A node whose renewals arrive and that does not hear the answers would be renewed for ever, and serve
//! nothing, its fence being closed.
//!
//! 8. A renewal carries the last answer that was heard, by the granter's own mark on it ([`Heard`]). If that is
//!    older than [`Terms::deaf`], nothing is granted; the answer is a mark alone. So a first renewal, too, is
//!    granted nothing: it is the second that shows that both directions work.
//!
//! # Where it ends
//!
//! A virtual machine that is paused and resumed by its hypervisor may find its `CLOCK_BOOTTIME` where it was: a
//! clock that ran slow by more than any drift. Its lease then looks valid for what was left of it, `lease`
//! at the most. Nothing in the guest can know. The new owner repeats its announcements, and takes
//! another's claim to the address for an alarm.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{Epoch, NodeId, WorkloadId};
use crate::probe::BootNs;

/// Parts per million.
const MILLION: u128 = 1_000_000;

/// Renewals whose answers may still come. With a renewal each fifth of a lease this is many leases long, and
/// an answer to an older one would give nothing.
const ASKED: usize = 64;

/// What all nodes of a cluster must agree on; part of what the log holds, never of one node's opinion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// How long a lease is, from the sending of its renewal.
    pub lease: Duration,
    /// How much longer the granter counts it, for what is under way when it ends.
    pub margin: Duration,
    /// How far any clock may be from true time, in parts per million; below a million.
    pub drift_ppm: u32,
}

impl Terms {
    /// How long the granter counts a lease as held, from its answer; see the arithmetic above. Rounded up.
    pub fn hold(&self) -> Duration {
        let drift = u128::from(self.drift_ppm).min(MILLION - 1);
        let nanos = (self.lease.as_nanos() * (MILLION + drift)).div_ceil(MILLION - drift);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).saturating_add(self.margin)
    }

    /// How old the last answer that a node has heard may be. Half a lease: after a whole one it serves nothing
    /// anyway, and the sooner it is not renewed, the sooner another may serve.
    pub fn deaf(&self) -> Duration {
        self.lease / 2
    }
}

/// A leadership in the log; a later one has a greater number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

/// One life of ftd on a node: greater than all before it, so it is kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

/// A granter's mark on its answer, sent back to it in later renewals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Heard {
    /// The granter's term.
    pub term: Term,
    /// Which life of ftd it is of: one that leads on in its term after a restart has forgotten what it granted.
    pub life: Incarnation,
    /// When it answered, by its clock; nobody else's business.
    pub at: BootNs,
}

/// A node asks for leases of all that is placed on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Who.
    pub node: NodeId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Grows by one with each renewal of this life.
    pub number: u64,
    /// The last answer that it has heard.
    pub heard: Option<Heard>,
    /// What it has given up, and in which epoch.
    pub given_up: Vec<(WorkloadId, Epoch)>,
}

/// What a granter says to a renewal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// As in the renewal.
    pub incarnation: Incarnation,
    /// As in the renewal.
    pub number: u64,
    /// To be sent back.
    pub mark: Heard,
    /// How long the leases are, from the moment when the renewal was sent.
    pub lease: Duration,
    /// What the node may serve. What is missing is not taken from it: its lease runs out.
    pub granted: Vec<(WorkloadId, Epoch)>,
}

// === impl Holder ===

/// The right to serve a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The placement that it belongs to.
    pub epoch: Epoch,
    /// Its end, by the holder's clock.
    pub until: BootNs,
}

/// A node's side: what it may serve, and until when.
#[derive(Debug)]
pub struct Holder {
    node: NodeId,
    incarnation: Incarnation,
    next: u64,
    /// Renewals without an answer, and when they were sent.
    asked: VecDeque<(u64, BootNs)>,
    heard: Option<Heard>,
    leases: BTreeMap<WorkloadId, Lease>,
    given_up: BTreeMap<WorkloadId, GivenUp>,
}

#[derive(Debug)]
struct GivenUp {
    epoch: Epoch,
    /// Renewals need not tell of it any more. It is kept all the same: old answers may be under way.
    settled: bool,
}

impl Holder {
    /// A node that holds nothing. The incarnation must be greater than those of its lives before.
    pub fn new(node: NodeId, incarnation: Incarnation) -> Self {
        Self {
            node,
            incarnation,
            next: 1,
            asked: VecDeque::new(),
            heard: None,
            leases: BTreeMap::new(),
            given_up: BTreeMap::new(),
        }
    }

    /// Takes up a lease that an earlier life of ftd has left with the fence.
    pub fn adopt(&mut self, workload: WorkloadId, lease: Lease) {
        self.leases.insert(workload, lease);
    }

    /// The next renewal. `now` must be read before this is called, and the renewal sent after.
    pub fn ask(&mut self, now: BootNs) -> Renewal {
        let number = self.next;
        self.next += 1;
        if self.asked.len() == ASKED {
            self.asked.pop_front();
        }
        self.asked.push_back((number, now));
        Renewal {
            node: self.node,
            incarnation: self.incarnation,
            number,
            heard: self.heard,
            given_up: self
                .given_up
                .iter()
                .filter(|(_, given_up)| !given_up.settled)
                .map(|(workload, given_up)| (*workload, given_up.epoch))
                .collect(),
        }
    }

    /// Takes an answer; returns the leases that are longer or newer by it, to be written to the fence.
    ///
    /// They may be over already. Answers to another life, to renewals that were answered before, and to those of
    /// long ago are nothing.
    pub fn hear(&mut self, answer: &Answer) -> Vec<(WorkloadId, Lease)> {
        if answer.incarnation != self.incarnation {
            return Vec::new();
        }
        let Some(index) = self.asked.iter().position(|(number, _)| *number == answer.number) else {
            return Vec::new();
        };
        let Some((_, sent)) = self.asked.remove(index) else { return Vec::new() };
        self.heard = self.heard.max(Some(answer.mark));
        let until = sent.after(answer.lease);
        let mut changed = Vec::new();
        for &(workload, epoch) in &answer.granted {
            if self.given_up.get(&workload).is_some_and(|given_up| epoch <= given_up.epoch) {
                continue;
            }
            let lease = Lease { epoch, until };
            if self.leases.get(&workload).is_none_or(|held| (epoch, until) > (held.epoch, held.until)) {
                self.given_up.remove(&workload);
                self.leases.insert(workload, lease);
                changed.push((workload, lease));
            }
        }
        changed
    }

    /// Gives a workload up, for good in the epoch that is held; `None` when it holds no lease of it.
    ///
    /// The fence must be closed before the next renewal is made: that tells of it.
    pub fn give_up(&mut self, workload: WorkloadId) -> Option<Epoch> {
        let lease = self.leases.remove(&workload)?;
        self.given_up.insert(workload, GivenUp { epoch: lease.epoch, settled: false });
        Some(lease.epoch)
    }

    /// Says no more that a workload was given up, if a later epoch of it is committed in the log. (Not before: an
    /// entry that was only proposed may be lost, and who leads then has to be told again.)
    pub fn settled(&mut self, workload: WorkloadId, placed: Epoch) {
        if let Some(given_up) = self.given_up.get_mut(&workload) {
            given_up.settled |= given_up.epoch < placed;
        }
    }

    /// The lease of a workload, over or not.
    pub fn lease(&self, workload: WorkloadId) -> Option<Lease> {
        self.leases.get(&workload).copied()
    }

    /// Whether the node may serve the workload now.
    pub fn holds(&self, workload: WorkloadId, now: BootNs) -> bool {
        self.lease(workload).is_some_and(|lease| now < lease.until)
    }

    /// The last mark that was heard.
    pub fn heard(&self) -> Option<Heard> {
        self.heard
    }
}

// === impl Granter ===

/// A renewal that has arrived, and when.
#[derive(Debug, Clone)]
pub struct Received {
    renewal: Renewal,
    at: BootNs,
}

/// The leader's side: who holds what, and until when at the latest.
///
/// Lives as long as a term; the next leader makes its own.
#[derive(Debug)]
pub struct Granter {
    term: Term,
    life: Incarnation,
    terms: Terms,
    /// When everything that older leaders have granted is over.
    inherited: BootNs,
    placed: BTreeMap<WorkloadId, Placed>,
    lives: BTreeMap<NodeId, Life>,
}

/// The latest life of a node that renewals have come from.
#[derive(Debug)]
struct Life {
    incarnation: Incarnation,
    /// When the last one came that showed that it hears.
    contact: Option<BootNs>,
}

#[derive(Debug)]
struct Placed {
    node: NodeId,
    epoch: Epoch,
    revoked: bool,
    given_up: bool,
    /// When this granter heard of it.
    since: BootNs,
    /// The last grant in this epoch and term.
    last: Option<Grant>,
}

/// Of the node's latest life.
#[derive(Debug)]
struct Grant {
    incarnation: Incarnation,
    number: u64,
    until: BootNs,
}

impl Grant {
    /// Whether the renewal was made after the one that this was granted to. If it was not, it cannot speak of it.
    fn is_before(&self, renewal: &Renewal) -> bool {
        (self.incarnation, self.number) < (renewal.incarnation, renewal.number)
    }
}

impl Granter {
    /// The granter of a term, in this life of ftd. `since` is a moment after the election was won, by this node's
    /// clock; after a restart, any moment of the new life.
    pub fn new(term: Term, life: Incarnation, terms: Terms, since: BootNs) -> Self {
        Self {
            term,
            life,
            terms,
            inherited: since.after(terms.hold()),
            placed: BTreeMap::new(),
            lives: BTreeMap::new(),
        }
    }

    /// Takes a placement from the log, where it is committed. Not before an entry of this term is, too: what comes
    /// before that may be old.
    pub fn place(&mut self, now: BootNs, workload: WorkloadId, node: NodeId, epoch: Epoch) {
        if self.placed.get(&workload).is_some_and(|placed| placed.epoch >= epoch) {
            return;
        }
        let placed = Placed { node, epoch, revoked: false, given_up: false, since: now, last: None };
        self.placed.insert(workload, placed);
    }

    /// Notes that a renewal has arrived, before a majority is asked who leads.
    pub fn receive(&self, now: BootNs, renewal: Renewal) -> Received {
        Received { renewal, at: now }
    }

    /// Answers it. `confirmed` is the moment when the last round *began* in which a majority confirmed that
    /// this node leads, in this term; nothing is granted if that was before the renewal arrived.
    pub fn answer(&mut self, now: BootNs, received: Received, confirmed: BootNs) -> Answer {
        let Received { renewal, at } = received;
        let incarnation = renewal.incarnation;
        let life = self.lives.entry(renewal.node).or_insert(Life { incarnation, contact: None });
        if incarnation > life.incarnation {
            *life = Life { incarnation, contact: None };
        }
        let hears = incarnation == life.incarnation
            && renewal.heard.is_some_and(|heard| {
                (heard.term, heard.life) == (self.term, self.life) && at.since(heard.at) <= self.terms.deaf()
            });
        if hears {
            life.contact = life.contact.max(Some(at));
        }
        let until = now.after(self.terms.hold());
        let mut granted = Vec::new();
        for (&workload, placed) in &mut self.placed {
            if !hears || placed.node != renewal.node {
                continue;
            }
            if renewal.given_up.contains(&(workload, placed.epoch)) {
                placed.given_up |= placed.last.as_ref().is_none_or(|last| last.is_before(&renewal));
                continue;
            }
            if placed.revoked || placed.given_up || confirmed < at {
                continue;
            }
            let number = renewal.number;
            let last = placed.last.get_or_insert(Grant { incarnation, number, until });
            (last.incarnation, last.number) = (last.incarnation, last.number).max((incarnation, number));
            last.until = last.until.max(until);
            granted.push((workload, placed.epoch));
        }
        Answer {
            incarnation,
            number: renewal.number,
            mark: Heard { term: self.term, life: self.life, at: now },
            lease: self.terms.lease,
            granted,
        }
    }

    /// Grants no more of a workload in its epoch: the first step of placing it elsewhere.
    pub fn revoke(&mut self, workload: WorkloadId) {
        if let Some(placed) = self.placed.get_mut(&workload) {
            placed.revoked = true;
        }
    }

    /// It stays where it is after all.
    pub fn reinstate(&mut self, workload: WorkloadId) {
        if let Some(placed) = self.placed.get_mut(&workload) {
            placed.revoked = false;
        }
    }

    /// Where it is placed.
    pub fn placement(&self, workload: WorkloadId) -> Option<(NodeId, Epoch)> {
        self.placed.get(&workload).map(|placed| (placed.node, placed.epoch))
    }

    /// When a node last showed that it is heard and hears. One that it is long ago for cannot serve.
    pub fn contact(&self, node: NodeId) -> Option<BootNs> {
        self.lives.get(&node)?.contact
    }

    /// When every lease of the workload's epoch is over, if nothing more is granted; `None`: now.
    pub fn over_at(&self, workload: WorkloadId) -> Option<BootNs> {
        let placed = self.placed.get(&workload)?;
        if placed.given_up {
            return None;
        }
        let last = placed.last.as_ref().map_or(self.inherited, |last| last.until);
        Some(last.max(self.inherited))
    }

    /// Whether its node is lost: every lease has run out without having been given up, and there was time to ask for
    /// one since it was placed.
    pub fn is_lost(&self, workload: WorkloadId, now: BootNs) -> bool {
        let Some(placed) = self.placed.get(&workload) else { return false };
        let over = self.over_at(workload);
        over.is_some_and(|over| over.max(placed.since.after(self.terms.hold())) <= now)
    }

    /// Whether it may be placed anew: it is revoked or given up, and nobody holds a lease of it. Of a workload
    /// that was never placed nobody does.
    pub fn is_over(&self, workload: WorkloadId, now: BootNs) -> bool {
        let Some(placed) = self.placed.get(&workload) else { return true };
        placed.given_up || (placed.revoked && self.over_at(workload).is_none_or(|over| over <= now))
    }
}

#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
