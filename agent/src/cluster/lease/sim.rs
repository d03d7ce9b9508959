//! Leases in a world that goes wrong in every way that it can: nodes with clocks that drift, are stopped, hang,
//! reboot, are suspended; a network that loses, delays, doubles, reorders, and works in one direction; leaders that
//! are followed by others without knowing it.
//!
//! What is real here is the code of the lease. What it stands on is modelled, no kinder than it is:
//!
//! - **the log** as one register for one workload's placement, agreed by ballots: a leader has the votes of a
//!   majority, takes over the latest placement that any of them accepted, and a placement is committed when
//!   a majority has accepted it in the leader's term. (A log of one entry, as far as leases can tell.)
//! - **the fence** as a moment in each node's kernel, which user space writes and which its boot clock is compared
//!   with; what passed it may still be under way for [`Faults::tail`].
//!
//! After every step: at most one node's fence is open. After every run, healed: somebody serves. And since a
//! property that cannot fail proves nothing, the same world finds a violation as soon as any one of the rules is
//! broken, or a clock leaves its bounds ([`super::tests`]).

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
};

use super::*;

const MS: u64 = 1_000_000;
const W: WorkloadId = WorkloadId(1);

/// How bad the world is, and which rule its nodes break.
#[derive(Debug, Clone)]
pub(super) struct Faults {
    /// How far clocks really drift, parts per million.
    pub(super) drift_ppm: u32,
    /// How long a packet that passed the fence may be under way, nanoseconds of true time.
    pub(super) tail: u64,
    /// A resumed node finds its boot clock where it was, as a paused virtual machine may.
    pub(super) clock_stands_still: bool,
    /// ftd begins anew all the time, and workloads are given up as often.
    pub(super) restless: bool,
    pub(super) broken: Option<Broken>,
}

/// A rule of the essay that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// 1: the lease is counted from the answer.
    CountedFromAnswer,
    /// 2: the granter counts no longer than the holder.
    NoDriftNoMargin,
    /// 4: placed elsewhere while a lease is held.
    PlacedAtOnce,
    /// 5: granted without asking a majority.
    Unconfirmed,
    /// 5: a majority that confirmed before the renewal arrived will do.
    ConfirmedBefore,
    /// 6: a new leader does not wait for what the old one has granted.
    NoWaitAfterElection,
    /// 7: all lives of ftd have the same number.
    OneLife,
    /// 8: what the granter's mark is does not matter.
    Deaf,
    /// The fence is opened when the holder has given up.
    GivenUpInWords,
}

pub(super) fn terms() -> Terms {
    Terms { lease: Duration::from_millis(500), margin: Duration::from_millis(20), drift_ppm: 20_000 }
}

impl Faults {
    /// As bad as the terms allow.
    pub(super) fn allowed() -> Self {
        // The margin is of the granter's clock, which may be fast.
        let tail = terms().margin.as_nanos() as u64 * 1_000_000 / (1_000_000 + u64::from(terms().drift_ppm));
        Self { drift_ppm: terms().drift_ppm, tail, clock_stands_still: false, restless: false, broken: None }
    }

    pub(super) fn breaking(rule: Broken) -> Self {
        Self { broken: Some(rule), restless: rule == Broken::OneLife, ..Self::allowed() }
    }
}

/// What a run came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) steps: u64,
    pub(super) elections: u64,
    pub(super) grants: u64,
    /// Placements on another node.
    pub(super) moves: u64,
    pub(super) given_up: u64,
    /// Moments at which two nodes were open, with what led there.
    pub(super) violation: Option<String>,
    /// Whether somebody served in the end, when everything worked again.
    pub(super) serves: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placement {
    epoch: Epoch,
    node: usize,
}

#[derive(Debug, Clone)]
enum Message {
    Vote {
        term: u64,
    },
    Voted {
        term: u64,
        accepted: (u64, Placement),
    },
    /// The leader's round: its placement, to be accepted, and a question whether it still leads.
    Lead {
        term: u64,
        round: u64,
        placement: Placement,
        committed: Epoch,
    },
    Follow {
        term: u64,
        round: u64,
    },
    Renew(Renewal),
    Answered(Answer),
}

#[derive(Debug, Clone)]
enum Event {
    /// Arrives at a node.
    Arrive {
        from: usize,
        to: usize,
        message: Message,
    },
    /// A node's timer, unless another was set since.
    Tick {
        node: usize,
        timer: u64,
    },
    /// Something goes wrong, or right.
    Fate,
    Resume {
        node: usize,
        kind: Stop,
    },
    Heal,
    Campaign {
        node: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// SIGSTOP of ftd: the kernel goes on, and so does the fence.
    Hang,
    /// The whole host: nothing is sent or received.
    Suspend,
    /// The host is off.
    Off,
}

/// A leader's mind.
struct Lead {
    term: u64,
    granter: Granter,
    /// Its placement, and whether a majority has accepted it in this term.
    placement: Placement,
    committed: bool,
    round: u64,
    begun: BootNs,
    confirmed: Option<BootNs>,
    followers: BTreeSet<usize>,
    waiting: Vec<(usize, Received)>,
}

struct Node {
    // The kernel, in true time: what its clock showed at a moment, and how it runs since.
    clock_at: u64,
    clock: u64,
    rate_ppm: i64,
    fence: Lease,
    stopped: Option<Stop>,
    // On disk.
    term: u64,
    accepted: (u64, Placement),
    lives: u64,
    // In ftd's memory.
    timer: u64,
    holder: Holder,
    votes: BTreeSet<usize>,
    best: (u64, Placement),
    lead: Option<Lead>,
    leader: Option<usize>,
    leader_heard: BootNs,
    inbox: Vec<(usize, Message)>,
}

pub(super) struct World {
    faults: Faults,
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: Vec<Option<Event>>,
    free: Vec<u64>,
    order: u64,
    random: u64,
    nodes: Vec<Node>,
    blocked: BTreeSet<(usize, usize)>,
    /// Of a thousand messages.
    lost: u64,
    calm: bool,
    outcome: Outcome,
}

impl World {
    pub(super) fn new(faults: Faults, nodes: usize, seed: u64) -> Self {
        let first = Placement { epoch: Epoch(1), node: 0 };
        let mut world = Self {
            faults,
            now: 0,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            order: 0,
            random: seed,
            nodes: Vec::new(),
            blocked: BTreeSet::new(),
            lost: 0,
            calm: false,
            outcome: Outcome::default(),
        };
        for index in 0..nodes {
            let clock = world.below(3_600_000 * MS);
            world.nodes.push(Node {
                clock_at: 0,
                clock,
                rate_ppm: 0,
                fence: Lease { epoch: Epoch(0), until: BootNs(0) },
                stopped: None,
                term: 0,
                accepted: (0, first),
                lives: 0,
                timer: 0,
                holder: Holder::new(NodeId(index as u64), Incarnation(0)),
                votes: BTreeSet::new(),
                best: (0, first),
                lead: None,
                leader: None,
                leader_heard: BootNs(0),
                inbox: Vec::new(),
            });
            world.drift(index);
            world.begin_life(index);
        }
        world.after(MS, Event::Fate);
        world
    }

    /// A number below `end`: splitmix64, so that a run is replayed by its seed.
    fn below(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }

    fn chance(&mut self, of_a_thousand: u64) -> bool {
        self.below(1000) < of_a_thousand
    }

    fn after(&mut self, delay: u64, event: Event) {
        let slot = self.free.pop().unwrap_or(self.events.len() as u64);
        if slot == self.events.len() as u64 {
            self.events.push(None);
        }
        self.events[slot as usize] = Some(event);
        // The order breaks ties, and its low bits say where the event is.
        self.order += 1;
        self.queue.push(Reverse((self.now + delay, self.order << 24 | slot)));
    }

    // ---- clocks

    fn clock(&self, node: usize) -> BootNs {
        let node = &self.nodes[node];
        let gone = i128::from(self.now - node.clock_at);
        let shown = i128::from(node.clock) + gone + gone * i128::from(node.rate_ppm) / 1_000_000;
        BootNs(shown as u64)
    }

    /// From now on the clock runs at another rate, most often one of the worst.
    fn drift(&mut self, index: usize) {
        let shown = self.clock(index).0;
        let bound = i64::from(self.faults.drift_ppm);
        let rate = match self.below(4) {
            0 => bound,
            1 => -bound,
            _ => self.below(2 * bound.unsigned_abs() + 1).cast_signed() - bound,
        };
        let node = &mut self.nodes[index];
        (node.clock, node.clock_at, node.rate_ppm) = (shown, self.now, rate);
    }

    // ---- the property

    /// What passed the fence a moment ago is still under way.
    fn is_open(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        if node.stopped == Some(Stop::Suspend) || node.stopped == Some(Stop::Off) {
            return false;
        }
        let (shown, slowest) = (self.clock(index).0, 1_000_000 - u64::from(self.faults.drift_ppm));
        let tail = self.faults.tail * slowest / 1_000_000;
        shown < node.fence.until.0.saturating_add(if node.fence.until.0 == 0 { 0 } else { tail })
    }

    fn check(&mut self) {
        let open: Vec<usize> = (0..self.nodes.len()).filter(|node| self.is_open(*node)).collect();
        if open.len() > 1 && self.outcome.violation.is_none() {
            let told: Vec<String> = open
                .iter()
                .map(|node| format!("node {node}: {:?} at {:?}", self.nodes[*node].fence, self.clock(*node)))
                .collect();
            let at = self.now / MS;
            self.outcome.violation = Some(format!("two nodes are open at {at} ms: {}", told.join(", ")));
        }
    }

    // ---- the network

    fn send(&mut self, from: usize, to: usize, message: Message) {
        if from != to {
            if self.blocked.contains(&(from, to)) || self.chance(self.lost) {
                return;
            }
            if !self.calm && self.chance(20) {
                let delay = self.delay();
                self.after(delay, Event::Arrive { from, to, message: message.clone() });
            }
        }
        let delay = self.delay();
        self.after(delay, Event::Arrive { from, to, message });
    }

    /// Mostly short, sometimes longer than a lease.
    fn delay(&mut self) -> u64 {
        match self.below(if self.calm { 90 } else { 100 }) {
            0..80 => self.below(MS),
            80..90 => self.below(10 * MS),
            90..98 => self.below(200 * MS),
            _ => self.below(1500 * MS),
        }
    }

    fn majority(&self) -> usize {
        self.nodes.len() / 2 + 1
    }

    // ---- a node

    fn begin_life(&mut self, index: usize) {
        let one_life = self.faults.broken == Some(Broken::OneLife);
        let node = &mut self.nodes[index];
        node.lives += 1;
        let incarnation = Incarnation(if one_life { 1 } else { node.lives });
        node.holder = Holder::new(NodeId(index as u64), incarnation);
        if node.fence.until.0 > 0 {
            node.holder.adopt(W, node.fence);
        }
        node.votes.clear();
        (node.lead, node.leader) = (None, None);
        node.inbox.clear();
        self.set_timer(index, MS);
    }

    fn set_timer(&mut self, index: usize, delay: u64) {
        self.nodes[index].timer += 1;
        let timer = self.nodes[index].timer;
        self.after(delay, Event::Tick { node: index, timer });
    }

    fn tick(&mut self, index: usize) {
        let now = self.clock(index);
        let asks_at = match self.faults.broken {
            // It takes the latest moment at which an answer to this can come for the one of sending.
            Some(Broken::CountedFromAnswer) => now.after(Duration::from_millis(100)),
            _ => now,
        };
        let renewal = self.nodes[index].holder.ask(asks_at);
        let stray = self.chance(100);
        let to = match self.nodes[index].leader {
            Some(leader) if !stray => leader,
            _ => self.below(self.nodes.len() as u64) as usize,
        };
        self.send(index, to, Message::Renew(renewal));
        if self.nodes[index].lead.is_some() {
            self.lead(index);
        } else if now.since(self.nodes[index].leader_heard) > Duration::from_millis(400) {
            let delay = self.below(300 * MS);
            self.after(delay, Event::Campaign { node: index });
        }
        let (hands_over, restarts) = if self.faults.restless { (50, 100) } else { (4, 0) };
        if !self.calm && self.chance(hands_over) {
            self.give_up(index);
        }
        if !self.calm && self.chance(restarts) {
            return self.begin_life(index);
        }
        let pause = 80 * MS + self.below(40 * MS);
        self.set_timer(index, pause);
    }

    fn campaign(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.term += 1;
        node.lead = None;
        node.votes = BTreeSet::from([index]);
        node.best = node.accepted;
        let term = node.term;
        for to in (0..self.nodes.len()).filter(|to| *to != index) {
            self.send(index, to, Message::Vote { term });
        }
    }

    fn elected(&mut self, index: usize) {
        self.outcome.elections += 1;
        let now = self.clock(index);
        let since = match self.faults.broken {
            Some(Broken::NoWaitAfterElection) => BootNs(0),
            _ => now,
        };
        let mut terms = terms();
        if self.faults.broken == Some(Broken::NoDriftNoMargin) {
            (terms.margin, terms.drift_ppm) = (Duration::ZERO, 0);
        }
        let node = &mut self.nodes[index];
        let (term, life) = (Term(node.term), Incarnation(node.lives));
        node.lead = Some(Lead {
            term: node.term,
            granter: Granter::new(term, life, terms, since),
            placement: node.best.1,
            committed: false,
            round: 0,
            begun: now,
            confirmed: None,
            followers: BTreeSet::new(),
            waiting: Vec::new(),
        });
        self.round(index);
    }

    /// Begins a round: the placement is accepted, and leadership confirmed, by who answers.
    fn round(&mut self, index: usize) {
        let now = self.clock(index);
        let Some(lead) = &mut self.nodes[index].lead else { return };
        lead.round += 1;
        lead.begun = now;
        lead.followers = BTreeSet::from([index]);
        let (term, round, placement) = (lead.term, lead.round, lead.placement);
        let committed = lead.granter.placement(W).map_or(Epoch(0), |(_, epoch)| epoch);
        self.nodes[index].accepted = (term, placement);
        for to in (0..self.nodes.len()).filter(|to| *to != index) {
            self.send(index, to, Message::Lead { term, round, placement, committed });
        }
    }

    /// A leader looks around.
    fn lead(&mut self, index: usize) {
        let now = self.clock(index);
        let nodes = self.nodes.len();
        let whim = !self.calm && self.chance(5);
        let hasty = self.faults.broken == Some(Broken::PlacedAtOnce);
        let start = self.below(nodes as u64) as usize;
        let Some(lead) = &mut self.nodes[index].lead else { return };
        if lead.committed {
            let Placement { epoch, node: owner } = lead.placement;
            // Which it also is if it speaks and does not hear.
            let lost = lead.granter.is_lost(W, now);
            if lost || whim {
                lead.granter.revoke(W);
            }
            let given_up = lead.granter.over_at(W).is_none();
            if lost || whim || given_up || lead.granter.is_over(W, now) {
                let fresh = |node: usize| {
                    let contact = lead.granter.contact(NodeId(node as u64));
                    contact.is_some_and(|at| now.since(at) <= terms().lease)
                };
                let target = (start..start + nodes)
                    .map(|node| node % nodes)
                    .find(|node| *node != owner && fresh(*node));
                let may = lead.granter.is_over(W, now) || (hasty && (lost || whim));
                if may && let Some(target) = target.or(given_up.then_some(owner)) {
                    lead.placement = Placement { epoch: epoch.next(), node: target };
                    lead.committed = false;
                }
            }
        }
        self.round(index);
    }

    fn give_up(&mut self, index: usize) {
        let breaks = self.faults.broken == Some(Broken::GivenUpInWords);
        let node = &mut self.nodes[index];
        if node.holder.give_up(W).is_some() {
            self.outcome.given_up += 1;
            if !breaks {
                node.fence.until = BootNs(0);
            }
        }
    }

    fn arrive(&mut self, from: usize, to: usize, message: Message) {
        match self.nodes[to].stopped {
            Some(Stop::Hang) => {
                self.nodes[to].inbox.push((from, message));
                return;
            }
            Some(_) => return,
            None => {}
        }
        let now = self.clock(to);
        let majority = self.majority();
        let node = &mut self.nodes[to];
        match message {
            Message::Vote { term } => {
                // In peace, who hears a leader elects no other: one who is deaf would disturb for ever.
                let content = self.calm && now.since(node.leader_heard) < Duration::from_millis(300);
                if term > node.term && !content {
                    node.term = term;
                    node.lead = None;
                    let accepted = node.accepted;
                    self.send(to, from, Message::Voted { term, accepted });
                }
            }
            Message::Voted { term, accepted } => {
                if term == node.term && node.lead.is_none() && !node.votes.is_empty() {
                    if (accepted.0, accepted.1.epoch) > (node.best.0, node.best.1.epoch) {
                        node.best = accepted;
                    }
                    node.votes.insert(from);
                    if node.votes.len() >= majority {
                        self.elected(to);
                    }
                }
            }
            Message::Lead { term, round, placement, committed } => {
                if term < node.term {
                    return;
                }
                if term > node.term {
                    (node.term, node.lead) = (term, None);
                }
                node.votes.clear();
                // Rounds of one term may overtake each other; epochs only grow within it.
                if (term, placement.epoch) >= (node.accepted.0, node.accepted.1.epoch) {
                    node.accepted = (term, placement);
                } else if term == node.accepted.0 {
                    return;
                }
                (node.leader, node.leader_heard) = (Some(from), now);
                node.holder.settled(W, committed);
                self.send(to, from, Message::Follow { term, round });
            }
            Message::Follow { term, round } => self.followed(from, to, term, round),
            Message::Renew(renewal) => {
                let broken = self.faults.broken;
                let Some(lead) = &mut node.lead else { return };
                let mut renewal = renewal;
                if broken == Some(Broken::Deaf) {
                    renewal.heard =
                        Some(Heard { term: Term(lead.term), life: Incarnation(node.lives), at: now });
                }
                let received = lead.granter.receive(now, renewal);
                match broken {
                    Some(Broken::Unconfirmed) if lead.committed => self.answer(to, from, received, now),
                    Some(Broken::ConfirmedBefore) if lead.committed => {
                        // What a majority said within the last lease will do.
                        let lately = lead.confirmed.is_some_and(|at| now.since(at) < terms().lease);
                        self.answer(to, from, received, if lately { now } else { BootNs(0) });
                    }
                    _ => {
                        lead.waiting.push((from, received));
                        self.round(to);
                    }
                }
            }
            Message::Answered(answer) => {
                for (workload, lease) in node.holder.hear(&answer) {
                    assert_eq!(workload, W);
                    node.fence = lease;
                    self.outcome.grants += 1;
                }
            }
        }
    }

    fn followed(&mut self, from: usize, to: usize, term: u64, round: u64) {
        let (majority, now) = (self.majority(), self.clock(to));
        let Some(lead) = &mut self.nodes[to].lead else { return };
        if term != lead.term || round != lead.round || !lead.followers.insert(from) {
            return;
        }
        if lead.followers.len() != majority {
            return;
        }
        let confirmed = lead.begun;
        lead.confirmed = Some(confirmed);
        if !lead.committed {
            lead.committed = true;
            let Placement { epoch, node } = lead.placement;
            if lead.granter.placement(W).is_some_and(|(before, _)| before != NodeId(node as u64)) {
                self.outcome.moves += 1;
            }
            lead.granter.place(now, W, NodeId(node as u64), epoch);
        }
        let waiting = std::mem::take(&mut lead.waiting);
        self.nodes[to].leader_heard = confirmed;
        for (node, received) in waiting {
            self.answer(to, node, received, confirmed);
        }
    }

    fn answer(&mut self, index: usize, to: usize, received: Received, confirmed: BootNs) {
        let now = self.clock(index);
        let Some(lead) = &mut self.nodes[index].lead else { return };
        let answer = lead.granter.answer(now, received, confirmed);
        self.send(index, to, Message::Answered(answer));
    }

    // ---- what goes wrong

    fn fate(&mut self) {
        let pause = self.below(400 * MS);
        self.after(pause, Event::Fate);
        let nodes = self.nodes.len() as u64;
        let node = self.below(nodes) as usize;
        let other = self.below(nodes) as usize;
        let long = if self.chance(300) { self.below(3000 * MS) } else { self.below(800 * MS) };
        match self.below(15) {
            0 | 1 => self.stop(node, Stop::Hang, long),
            2 => self.stop(node, Stop::Suspend, long),
            3 => self.stop(node, Stop::Off, long),
            4 | 5 if self.nodes[node].stopped.is_none() => self.begin_life(node),
            6 => drop(self.blocked.insert((node, other))),
            7 => {
                self.blocked.insert((node, other));
                self.blocked.insert((other, node));
            }
            8 => {
                // Cut off, in one direction or both.
                let (hears, speaks) = (self.chance(300), self.chance(300));
                for peer in (0..self.nodes.len()).filter(|peer| *peer != node) {
                    if !hears {
                        self.blocked.insert((peer, node));
                    }
                    if !speaks {
                        self.blocked.insert((node, peer));
                    }
                }
            }
            9..=11 => self.blocked.clear(),
            12 => self.lost = self.below(400),
            13 => self.lost = 0,
            14 if self.nodes[node].stopped.is_none() => self.campaign(node),
            _ => {}
        }
        self.drift(other);
    }

    fn stop(&mut self, index: usize, kind: Stop, long: u64) {
        if self.nodes[index].stopped.is_some() {
            return;
        }
        // At what it was: a clock that stands still goes on from here.
        let shown = self.clock(index).0;
        let node = &mut self.nodes[index];
        (node.clock, node.clock_at) = (shown, self.now);
        node.stopped = Some(kind);
        self.after(long, Event::Resume { node: index, kind });
    }

    fn resume(&mut self, index: usize, kind: Stop) {
        if self.nodes[index].stopped != Some(kind) {
            return;
        }
        let stands_still = self.faults.clock_stands_still;
        let now = self.now;
        let node = &mut self.nodes[index];
        node.stopped = None;
        match kind {
            Stop::Suspend if stands_still => node.clock_at = now,
            Stop::Hang | Stop::Suspend => {}
            Stop::Off => {
                (node.clock, node.clock_at) = (MS, now);
                node.fence = Lease { epoch: Epoch(0), until: BootNs(0) };
                node.leader_heard = BootNs(0);
                self.begin_life(index);
                return;
            }
        }
        for (from, message) in std::mem::take(&mut self.nodes[index].inbox) {
            self.arrive(from, index, message);
        }
        self.set_timer(index, MS);
    }

    // ---- the world turns

    fn step(&mut self) -> bool {
        let Some(Reverse((time, key))) = self.queue.pop() else { return false };
        let slot = key & 0xff_ffff;
        self.free.push(slot);
        let Some(event) = self.events[slot as usize].take() else { return true };
        self.now = time;
        self.outcome.steps += 1;
        match event {
            Event::Arrive { from, to, message } => self.arrive(from, to, message),
            Event::Tick { node, timer } => {
                let there = &self.nodes[node];
                // One that comes while ftd is stopped is made up for when it goes on.
                if there.timer == timer && there.stopped.is_none() {
                    self.tick(node);
                }
            }
            Event::Fate if !self.calm => self.fate(),
            Event::Campaign { node } => {
                let late = self.clock(node).since(self.nodes[node].leader_heard) > Duration::from_millis(400);
                if late && self.nodes[node].stopped.is_none() {
                    self.campaign(node);
                }
            }
            Event::Resume { node, kind } => self.resume(node, kind),
            Event::Heal => {
                self.calm = true;
                self.blocked.clear();
                self.lost = 0;
            }
            Event::Fate => {}
        }
        self.check();
        true
    }

    /// So many steps of trouble, then peace; ends early at a violation.
    pub(super) fn run(mut self, steps: u64) -> Outcome {
        while self.outcome.steps < steps && self.outcome.violation.is_none() && self.step() {}
        self.after(0, Event::Heal);
        let end = self.now + 20_000 * MS;
        while self.now < end && self.outcome.violation.is_none() && self.step() {}
        self.outcome.serves = (0..self.nodes.len()).any(|node| self.is_open(node));
        self.outcome
    }

    /// As `run`, with renewals of all nodes heard and no answer heard by the one that serves, from some moment on.
    pub(super) fn run_deaf(mut self, steps: u64) -> Outcome {
        self.calm = true;
        while self.outcome.steps < steps && self.outcome.grants < 20 && self.step() {}
        let deaf: Vec<usize> = (0..self.nodes.len()).filter(|node| self.is_open(*node)).collect();
        for &node in &deaf {
            self.blocked.extend((0..self.nodes.len()).map(|from| (from, node)));
        }
        let end = self.now + 20_000 * MS;
        while self.now < end && self.outcome.violation.is_none() && self.step() {}
        self.outcome.serves = (0..self.nodes.len()).any(|node| !deaf.contains(&node) && self.is_open(node));
        self.outcome
    }
}
