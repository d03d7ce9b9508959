//! Where workloads are placed: what the cluster agrees on, and what its leader decides.
//!
//! Two halves, both pure.
//!
//! **[`Placements`] is what all nodes agree on.** It changes by [`Command`]s alone, in the order of the log, and each node
//! comes to the same state by them. A command that came too late (it speaks of an epoch that is not the
//! present one) changes nothing, so a leader may propose on what it knew a moment ago, or propose twice.
//!
//! **[`Decider`] is the leader's mind.** It looks at the placements, at which nodes are in [contact](View::contact), and at
//! what the granter says of the leases, and comes to [`Decision`]s: propose this, grant no more, ask the owner to hand
//! over. What it remembers may be lost: the next leader's begins with nothing.
//!
//! The rules, for each workload:
//!
//! 1. It is placed on the first node of its list that is a member, in contact, not drained, and has not failed with it.
//! 2. It leaves its node when that is lost (its lease ran out), fails with it, is drained, or leaves the cluster; and, by
//!    `failback = "auto"`, when a node that is preferred has been in contact for `settle`. If there is no better
//!    node, it stays.
//! 3. It leaves in good order where it can: the owner is asked, and gives up its lease when it has stopped. If that takes
//!    longer than `handover`, the lease is not renewed any more, and the fence ends it.
//! 4. It is placed anew only when nobody holds a lease of it, in the next epoch. If its owner has given it up and there
//!    is no better node after all, it is placed there again.
//! 5. A node on which it stays failed is not tried again until it has served well elsewhere, or a person says so. So too
//!    one that was lost before the workload had settled on it: what takes one host down shall not take them
//!    all. When no node is left, it is given up: terminal, until a person acts.
//! 6. Held, it stays where it is, whatever happens.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{Epoch, NodeId, WorkloadId};
use crate::probe::BootNs;

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It votes, and may serve.
    Member,
    /// It votes, and serves nothing.
    Witness,
}

/// What happens when a preferred node is back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Failback {
    /// A person moves the workload back, or nobody.
    #[default]
    Manual,
    /// It goes back when the node has settled.
    Auto,
}

/// Why a workload is placed where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// It was nowhere.
    First,
    /// Its node was lost.
    Lost,
    /// It stayed failed on its node.
    Failed,
    /// Its node was drained, or left the cluster.
    Drained,
    /// A preferred node is back.
    Failback,
    /// A person said so.
    Moved,
}

/// A change of what is agreed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A node joins, or changes its role.
    Join(NodeId, Role),
    /// A node leaves for good.
    Leave(NodeId),
    /// A workload comes, or what is said of it changes: its nodes in order of preference.
    Define {
        /// Which.
        workload: WorkloadId,
        /// Where it may be.
        nodes: Vec<NodeId>,
        /// What happens when a preferred node is back.
        failback: Failback,
    },
    /// It is placed, in the epoch after `after`. Nobody may hold a lease of that.
    Place {
        /// Which.
        workload: WorkloadId,
        /// The present epoch, as the proposer knew it.
        after: Epoch,
        /// Where.
        node: NodeId,
        /// Why.
        why: Why,
    },
    /// In this epoch its node could not serve it.
    Failed(WorkloadId, Epoch),
    /// In this epoch it has served well for a while: all nodes may be tried again.
    Settled(WorkloadId, Epoch),
    /// No node is left to try.
    GiveUp(WorkloadId, Epoch),
    /// A person takes it out of the cluster's hands, or puts it back.
    Hold(WorkloadId, bool),
    /// A person wants nothing on a node, or something again.
    Drain(NodeId, bool),
    /// A person wants all nodes to be tried again.
    Reset(WorkloadId),
}

/// What a command means for those who carry it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// This node serves the workload in this epoch, from when it holds a lease.
    Serve(WorkloadId, NodeId, Epoch),
    /// This node does not, any more.
    Leave(WorkloadId, NodeId, Epoch),
    /// Nobody serves it, until a person acts.
    GivenUp(WorkloadId, Epoch),
}

/// What all nodes agree on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placements {
    nodes: BTreeMap<NodeId, Node>,
    workloads: BTreeMap<WorkloadId, Workload>,
}

/// A node, as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// What it is for.
    pub role: Role,
    /// Nothing shall be on it.
    pub drained: bool,
}

/// A workload, as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Where it may be, in order of preference.
    pub nodes: Vec<NodeId>,
    /// What happens when a preferred node is back.
    pub failback: Failback,
    /// Of its last placement; 0: it was never placed.
    pub epoch: Epoch,
    /// Where it is.
    pub node: Option<NodeId>,
    /// Why there.
    pub why: Why,
    /// Nodes that could not serve it.
    pub failed: BTreeSet<NodeId>,
    /// A person has it in hand.
    pub held: bool,
    /// No node was left to try.
    pub given_up: bool,
}

impl Placements {
    /// Takes a command from the log.
    pub fn apply(&mut self, command: &Command) -> Vec<Action> {
        let mut actions = Vec::new();
        match command {
            Command::Join(node, role) => {
                let known = self.nodes.entry(*node).or_insert(Node { role: *role, drained: false });
                known.role = *role;
            }
            Command::Leave(node) => drop(self.nodes.remove(node)),
            Command::Drain(node, drained) => {
                if let Some(node) = self.nodes.get_mut(node) {
                    node.drained = *drained;
                }
            }
            Command::Define { workload, nodes, failback } => {
                let known = self.workloads.entry(*workload).or_insert_with(|| Workload {
                    nodes: Vec::new(),
                    failback: *failback,
                    epoch: Epoch(0),
                    node: None,
                    why: Why::First,
                    failed: BTreeSet::new(),
                    held: false,
                    given_up: false,
                });
                (known.nodes, known.failback) = (nodes.clone(), *failback);
            }
            Command::Place { workload, after, node, why } => {
                let serves = self.nodes.get(node).is_some_and(|node| node.role == Role::Member);
                let Some(known) = self.workloads.get_mut(workload) else { return actions };
                if known.epoch != *after || !serves || (known.given_up && *why != Why::Moved) {
                    return actions;
                }
                if let Some(old) = known.node {
                    actions.push(Action::Leave(*workload, old, known.epoch));
                }
                known.epoch = known.epoch.next();
                (known.node, known.why, known.given_up) = (Some(*node), *why, false);
                actions.push(Action::Serve(*workload, *node, known.epoch));
            }
            Command::Failed(workload, epoch) => {
                if let Some(known) = self.at(*workload, *epoch)
                    && let Some(node) = known.node
                {
                    known.failed.insert(node);
                }
            }
            Command::Settled(workload, epoch) => {
                if let Some(known) = self.at(*workload, *epoch) {
                    known.failed.clear();
                }
            }
            Command::GiveUp(workload, epoch) => {
                if let Some(known) = self.at(*workload, *epoch)
                    && !known.given_up
                {
                    known.given_up = true;
                    if let Some(node) = known.node {
                        actions.push(Action::Leave(*workload, node, *epoch));
                    }
                    actions.push(Action::GivenUp(*workload, *epoch));
                }
            }
            Command::Hold(workload, held) => {
                if let Some(known) = self.workloads.get_mut(workload) {
                    known.held = *held;
                }
            }
            Command::Reset(workload) => {
                if let Some(known) = self.workloads.get_mut(workload) {
                    known.failed.clear();
                    if std::mem::take(&mut known.given_up)
                        && let Some(node) = known.node
                    {
                        actions.push(Action::Serve(*workload, node, known.epoch));
                    }
                }
            }
        }
        actions
    }

    /// The workload, if this is its present epoch.
    fn at(&mut self, workload: WorkloadId, epoch: Epoch) -> Option<&mut Workload> {
        self.workloads.get_mut(&workload).filter(|known| known.epoch == epoch)
    }

    /// All nodes.
    pub fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// All workloads.
    pub fn workloads(&self) -> &BTreeMap<WorkloadId, Workload> {
        &self.workloads
    }

    /// Whether a node could serve the workload, as far as it is agreed on.
    fn may_serve(&self, workload: &Workload, node: NodeId) -> bool {
        let known = self.nodes.get(&node);
        known.is_some_and(|known| known.role == Role::Member && !known.drained)
            && !workload.failed.contains(&node)
    }
}

// === impl Decider ===

/// What the leader sees.
pub trait View {
    /// When a node last showed that it is heard and hears.
    fn contact(&self, node: NodeId) -> Option<BootNs>;
    /// Whether the workload's lease ran out without having been revoked: its node is lost.
    fn is_lost(&self, workload: WorkloadId) -> bool;
    /// Whether the workload may be placed anew, its leases being revoked or given up, and over.
    fn is_over(&self, workload: WorkloadId) -> bool;
}

/// Times of the decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// A node is in contact if it was this lately.
    pub contact: Duration,
    /// A node that is back, and a workload that was placed, have settled after this.
    pub settle: Duration,
    /// How long an owner may take to hand over in good order.
    pub handover: Duration,
}

/// What the leader does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Puts this into the log.
    Propose(Command),
    /// Asks the owner to stop the workload and give up its lease.
    Ask(WorkloadId, NodeId, Epoch),
    /// Grants no more of its lease.
    Revoke(WorkloadId),
    /// Grants it again: it stays.
    Reinstate(WorkloadId),
}

/// The leader's mind, for one term.
#[derive(Debug)]
pub struct Decider {
    patience: Patience,
    /// Since when a node has been in contact without a break.
    since: BTreeMap<NodeId, BootNs>,
    moves: BTreeMap<WorkloadId, Move>,
    /// When each placement was first seen.
    placed: BTreeMap<WorkloadId, (Epoch, BootNs)>,
}

/// A workload on its way.
#[derive(Debug)]
struct Move {
    epoch: Epoch,
    why: Why,
    /// When the lease is revoked; `None`: it is.
    patience: Option<BootNs>,
}

impl Decider {
    /// A leader's that has just been elected.
    pub fn new(patience: Patience) -> Self {
        Self { patience, since: BTreeMap::new(), moves: BTreeMap::new(), placed: BTreeMap::new() }
    }

    /// Looks at everything, and says what is to be done now. To be called when something has changed, and when time
    /// has passed; it never says the same thing twice unless it still waits to be done.
    pub fn decide(&mut self, agreed: &Placements, view: &impl View, now: BootNs) -> Vec<Decision> {
        for &node in agreed.nodes.keys() {
            if view.contact(node).is_some_and(|at| now.since(at) <= self.patience.contact) {
                self.since.entry(node).or_insert(now);
            } else {
                self.since.remove(&node);
            }
        }
        let mut decisions = Vec::new();
        for (&id, workload) in &agreed.workloads {
            let placed = self.placed.entry(id).or_insert((workload.epoch, now));
            if placed.0 != workload.epoch {
                *placed = (workload.epoch, now);
            }
            let age = now.since(placed.1);
            self.of_workload(agreed, view, now, (id, workload, age), &mut decisions);
        }
        decisions
    }

    fn of_workload(
        &mut self,
        agreed: &Placements,
        view: &impl View,
        now: BootNs,
        (id, workload, age): (WorkloadId, &Workload, Duration),
        decisions: &mut Vec<Decision>,
    ) {
        let propose = |decisions: &mut Vec<Decision>, command| decisions.push(Decision::Propose(command));
        let place = |node, why| Command::Place { workload: id, after: workload.epoch, node, why };
        if self.moves.get(&id).is_some_and(|under_way| under_way.epoch != workload.epoch) {
            self.moves.remove(&id);
        }
        // Who has given up an epoch does not serve in it again: if it is to stay, it is placed there once more.
        let anew = workload.node.filter(|node| view.is_over(id) && self.since.contains_key(node));
        if workload.held || workload.given_up {
            if self.moves.remove(&id).is_some_and(|under_way| under_way.patience.is_none()) {
                decisions.push(Decision::Reinstate(id));
            } else if let Some(owner) = anew
                && !workload.given_up
            {
                propose(decisions, place(owner, workload.why));
            }
            return;
        }
        let Some(owner) = workload.node else {
            if let Some(node) = self.choose(agreed, workload, None) {
                propose(decisions, place(node, Why::First));
            }
            return;
        };
        let lost = view.is_lost(id);
        let unsettled = age < self.patience.settle;
        if lost && unsettled && !workload.failed.contains(&owner) && workload.epoch > Epoch(1) {
            propose(decisions, Command::Failed(id, workload.epoch));
            return;
        }
        if !lost && !unsettled && !workload.failed.is_empty() && !workload.failed.contains(&owner) {
            propose(decisions, Command::Settled(id, workload.epoch));
        }
        let why = if lost {
            Some(Why::Lost)
        } else if workload.failed.contains(&owner) {
            Some(Why::Failed)
        } else if !agreed.may_serve(workload, owner) || !workload.nodes.contains(&owner) {
            Some(Why::Drained)
        } else {
            None
        };
        let target = match why {
            Some(_) => self.choose(agreed, workload, Some(owner)),
            None if workload.failback == Failback::Auto => {
                let settled = |node: &NodeId| {
                    agreed.may_serve(workload, *node)
                        && self.since.get(node).is_some_and(|since| now.since(*since) >= self.patience.settle)
                };
                workload.nodes.iter().copied().take_while(|node| *node != owner).find(settled)
            }
            None => None,
        };
        let Some(target) = target else {
            // Nobody can take it.
            let all_failed = !workload.nodes.is_empty()
                && workload.nodes.iter().all(|node| workload.failed.contains(node));
            if all_failed {
                propose(decisions, Command::GiveUp(id, workload.epoch));
            } else if let Some(owner) = anew {
                propose(decisions, place(owner, workload.why));
            } else if self.moves.remove(&id).is_some_and(|under_way| under_way.patience.is_none()) {
                decisions.push(Decision::Reinstate(id));
            }
            return;
        };
        if view.is_over(id) {
            let why = why.or_else(|| self.moves.get(&id).map(|under_way| under_way.why));
            propose(decisions, place(target, why.unwrap_or(Why::Failback)));
            return;
        }
        let epoch = workload.epoch;
        let (why, patience) = (why.unwrap_or(Why::Failback), now.after(self.patience.handover));
        match self.moves.get_mut(&id) {
            None if lost => {
                self.moves.insert(id, Move { epoch, why, patience: None });
                decisions.push(Decision::Revoke(id));
            }
            None => {
                self.moves.insert(id, Move { epoch, why, patience: Some(patience) });
                decisions.push(Decision::Ask(id, owner, epoch));
            }
            Some(under_way) => {
                if under_way.patience.is_some_and(|end| lost || end <= now) {
                    (under_way.patience, under_way.why) = (None, why);
                    decisions.push(Decision::Revoke(id));
                }
            }
        }
    }

    /// The best node for a workload but this one.
    fn choose(&self, agreed: &Placements, workload: &Workload, but: Option<NodeId>) -> Option<NodeId> {
        let fits = |node: &&NodeId| {
            Some(**node) != but && self.since.contains_key(node) && agreed.may_serve(workload, **node)
        };
        workload.nodes.iter().find(fits).copied()
    }
}

#[cfg(test)]
mod tests;
