use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const W: WorkloadId = WorkloadId(1);
const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const C: NodeId = NodeId(3);
const SPY: NodeId = NodeId(9);

fn patience() -> Patience {
    Patience {
        contact: Duration::from_millis(500),
        settle: Duration::from_secs(30),
        handover: Duration::from_secs(5),
    }
}

/// Nodes, their leases, and a leader, as far as placement can tell.
struct World {
    agreed: Placements,
    decider: Decider,
    now: BootNs,
    alive: BTreeMap<NodeId, bool>,
    lease: Option<Lease>,
    revoked: bool,
    given_up: bool,
    asked: bool,
    /// Whether the workload comes up, by node.
    broken: BTreeSet<NodeId>,
    actions: Vec<Action>,
    proposed: usize,
}

#[derive(Debug)]
struct Lease {
    node: NodeId,
    epoch: Epoch,
    until: BootNs,
}

const LEASE: Duration = Duration::from_millis(500);

impl View for World {
    fn contact(&self, node: NodeId) -> Option<BootNs> {
        self.alive.get(&node).is_some_and(|alive| *alive).then_some(self.now)
    }
    fn is_lost(&self, _: WorkloadId) -> bool {
        !self.given_up && self.lease.as_ref().is_some_and(|lease| lease.until <= self.now)
    }
    fn is_over(&self, _: WorkloadId) -> bool {
        match &self.lease {
            Some(lease) => self.given_up || (self.revoked && lease.until <= self.now),
            None => true,
        }
    }
}

impl World {
    fn new(nodes: &[NodeId], failback: Failback) -> Self {
        let mut agreed = Placements::default();
        for &node in nodes {
            agreed.apply(&Command::Join(node, Role::Member));
        }
        agreed.apply(&Command::Join(SPY, Role::Witness));
        agreed.apply(&Command::Define { workload: W, nodes: nodes.to_vec(), failback });
        let alive = nodes.iter().chain([&SPY]).map(|node| (*node, true)).collect();
        Self {
            agreed,
            decider: Decider::new(patience()),
            now: BootNs(1_000_000_000),
            alive,
            lease: None,
            revoked: false,
            given_up: false,
            asked: false,
            broken: BTreeSet::new(),
            actions: Vec::new(),
            proposed: 0,
        }
    }

    fn workload(&self) -> &Workload {
        &self.agreed.workloads[&W]
    }

    fn at(&self) -> Option<NodeId> {
        self.workload().node.filter(|_| !self.workload().given_up)
    }

    fn apply(&mut self, command: &Command) {
        let before = self.workload().clone();
        let actions = self.agreed.apply(command);
        let after = self.workload().clone();
        // Whatever is proposed, whenever: what must hold of every change.
        if after.epoch == before.epoch {
            assert_eq!(after.node, before.node);
        } else {
            assert_eq!(after.epoch, before.epoch.next(), "{command:?}");
            let held = self.lease.as_ref().is_some_and(|lease| lease.until > self.now);
            assert!(!held, "placed while {:?} is valid: {command:?}", self.lease);
            let node = after.node.unwrap();
            assert_eq!(self.agreed.nodes[&node].role, Role::Member);
            (self.revoked, self.given_up, self.asked) = (false, false, false);
            // It has as long to ask for a lease.
            self.lease = Some(Lease { node, epoch: after.epoch, until: self.now.after(LEASE) });
        }
        if let Some(Action::GivenUp(..)) = actions.last()
            && self.alive.get(&after.node.unwrap()).is_some_and(|alive| *alive)
        {
            self.give_up();
        }
        self.actions.extend(actions);
    }

    /// The owner stops, closes its fence, and says so.
    fn give_up(&mut self) {
        let now = self.now;
        if let Some(lease) = &mut self.lease {
            lease.until = lease.until.min(now);
            self.given_up = true;
        }
    }

    /// Decides and does it, until there is nothing to do at this moment.
    fn settle(&mut self) {
        for round in 0.. {
            let mut decider = std::mem::replace(&mut self.decider, Decider::new(patience()));
            let decisions = decider.decide(&self.agreed, self, self.now);
            self.decider = decider;
            if decisions.is_empty() {
                return;
            }
            assert!(round < 20, "it never comes to rest: {decisions:?}, {:?}", self.workload());
            for decision in decisions {
                match decision {
                    Decision::Propose(command) => {
                        self.proposed += 1;
                        self.apply(&command);
                        // A proposal that is made twice changes nothing.
                        let once = self.agreed.clone();
                        self.agreed.apply(&command);
                        assert_eq!(self.agreed, once, "{command:?}");
                    }
                    Decision::Ask(_, node, epoch) => {
                        assert_eq!((Some(node), epoch), (self.workload().node, self.workload().epoch));
                        self.asked = true;
                    }
                    Decision::Revoke(_) => self.revoked = true,
                    Decision::Reinstate(_) => self.revoked = false,
                }
            }
        }
    }

    /// Time passes: leases are renewed by who lives, services fail where they are broken.
    fn pass(&mut self, time: Duration) {
        let end = self.now.after(time);
        while self.now < end {
            self.now = self.now.after(Duration::from_millis(250));
            let alive = |node| self.alive.get(&node).is_some_and(|alive| *alive);
            let lives = self.lease.as_ref().is_some_and(|lease| alive(lease.node));
            let epoch = self.workload().epoch;
            if lives && !self.given_up && self.asked {
                self.give_up();
            } else if let Some(lease) = &mut self.lease
                && lives
                && !self.given_up
                && !self.revoked
                && lease.epoch == epoch
            {
                lease.until = self.now.after(LEASE);
            }
            let alive = |node| self.alive.get(&node).is_some_and(|alive| *alive);
            if let Some(node) = self.at()
                && alive(node)
                && self.broken.contains(&node)
            {
                let command = Command::Failed(W, self.workload().epoch);
                self.apply(&command);
            }
            self.settle();
        }
    }
}

fn placed(nodes: &[NodeId], failback: Failback) -> World {
    let mut world = World::new(nodes, failback);
    world.settle();
    assert_eq!(world.at(), Some(nodes[0]));
    world.pass(Duration::from_mins(1));
    assert_eq!((world.at(), world.workload().epoch), (Some(nodes[0]), Epoch(1)));
    world
}

#[test]
fn a_lost_node_is_followed_by_the_next_and_not_gone_back_to() {
    let mut world = placed(&[A, B, C], Failback::Manual);
    world.alive.insert(A, false);
    world.pass(Duration::from_secs(2));
    assert_eq!((world.at(), world.workload().why, world.workload().epoch), (Some(B), Why::Lost, Epoch(2)));
    world.alive.insert(A, true);
    world.pass(Duration::from_mins(10));
    assert_eq!(world.at(), Some(B));
    let placements: Vec<_> =
        world.actions.iter().filter(|action| matches!(action, Action::Serve(..))).collect();
    assert_eq!(placements, [&Action::Serve(W, A, Epoch(1)), &Action::Serve(W, B, Epoch(2))]);
}

#[test]
fn with_failback_it_goes_back_when_the_node_has_settled() {
    let mut world = placed(&[A, B], Failback::Auto);
    world.alive.insert(A, false);
    world.pass(Duration::from_secs(2));
    world.alive.insert(A, true);
    world.pass(Duration::from_secs(20));
    assert_eq!(world.at(), Some(B));
    // Away again for a moment: it begins anew.
    world.alive.insert(A, false);
    world.pass(Duration::from_secs(1));
    world.alive.insert(A, true);
    world.pass(Duration::from_secs(29));
    assert_eq!(world.at(), Some(B));
    world.pass(Duration::from_secs(3));
    assert_eq!((world.at(), world.workload().why), (Some(A), Why::Failback));
}

#[test]
fn a_drained_node_is_left_in_good_order_and_nothing_comes_to_it() {
    let mut world = placed(&[A, B], Failback::Auto);
    world.apply(&Command::Drain(A, true));
    world.settle();
    assert!(world.asked && !world.revoked);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.at(), world.workload().why), (Some(B), Why::Drained));
    world.pass(Duration::from_mins(5));
    assert_eq!(world.at(), Some(B));
    // The other one, too: it stays where it is.
    world.apply(&Command::Drain(B, true));
    world.pass(Duration::from_mins(5));
    assert_eq!(world.at(), Some(B));
    world.apply(&Command::Drain(A, false));
    world.pass(Duration::from_secs(2));
    assert_eq!(world.at(), Some(A));
}

#[test]
fn who_does_not_hand_over_is_not_renewed_any_more() {
    let mut world = placed(&[A, B], Failback::Manual);
    world.apply(&Command::Drain(A, true));
    world.settle();
    // It does not hear that.
    world.asked = false;
    world.pass(Duration::from_secs(4));
    assert!(!world.revoked && world.at() == Some(A));
    world.pass(Duration::from_secs(3));
    assert_eq!(world.at(), Some(B));
}

#[test]
fn a_service_that_fails_everywhere_is_given_up_until_a_person_acts() {
    let mut world = placed(&[A, B, C], Failback::Manual);
    world.broken = BTreeSet::from([A, B, C]);
    world.pass(Duration::from_mins(1));
    assert!(world.workload().given_up && world.workload().epoch == Epoch(3));
    assert_eq!(world.actions.last(), Some(&Action::GivenUp(W, Epoch(3))));
    let proposed = world.proposed;
    world.pass(Duration::from_mins(30));
    assert_eq!(world.proposed, proposed, "terminal");
    world.broken.clear();
    world.apply(&Command::Reset(W));
    world.pass(Duration::from_mins(1));
    assert_eq!(world.at(), Some(C));
}

#[test]
fn what_takes_hosts_down_does_not_take_them_all() {
    let mut world = placed(&[A, B, C], Failback::Manual);
    // Each dies a second after it took the workload, and comes back.
    for _ in 0..10 {
        let Some(node) = world.at() else { break };
        world.pass(Duration::from_secs(1));
        world.alive.insert(node, false);
        world.pass(Duration::from_secs(2));
        world.alive.insert(node, true);
    }
    // A, where it had settled, was lost like any node; then B, C and A once more.
    assert!(world.workload().given_up, "{:?}", world.workload());
    assert!(world.workload().epoch <= Epoch(4), "{:?}", world.workload());
}

#[test]
fn a_node_that_failed_is_tried_again_after_it_served_well_elsewhere() {
    let mut world = placed(&[A, B], Failback::Manual);
    world.broken.insert(A);
    world.pass(Duration::from_secs(2));
    assert_eq!((world.at(), world.workload().why), (Some(B), Why::Failed));
    world.broken.clear();
    world.alive.insert(B, false);
    world.pass(Duration::from_secs(10));
    assert!(world.workload().failed.contains(&A), "B had not settled");
    world.apply(&Command::Reset(W));
    world.alive.insert(B, true);
    world.pass(Duration::from_mins(1));
    assert_eq!(world.workload().failed, BTreeSet::new());
    let node = world.at().unwrap();
    world.alive.insert(node, false);
    world.pass(Duration::from_secs(2));
    assert_ne!(world.at(), Some(node));
}

#[test]
fn held_it_stays_and_a_witness_serves_nothing() {
    let mut world = placed(&[A, B], Failback::Auto);
    world.apply(&Command::Hold(W, true));
    world.alive.insert(A, false);
    world.pass(Duration::from_mins(2));
    assert_eq!(world.at(), Some(A));
    world.apply(&Command::Hold(W, false));
    world.pass(Duration::from_secs(2));
    assert_eq!(world.at(), Some(B));
    world.apply(&Command::Place { workload: W, after: Epoch(2), node: SPY, why: Why::Moved });
    assert_eq!(world.at(), Some(B));
}

#[test]
fn what_was_given_up_for_a_leader_that_is_gone_is_served_again() {
    let mut world = placed(&[A, B], Failback::Manual);
    world.apply(&Command::Drain(A, true));
    world.settle();
    world.give_up();
    // The person thinks better of it, and the next leader knows nothing of all that.
    world.apply(&Command::Drain(A, false));
    world.decider = Decider::new(patience());
    world.pass(Duration::from_secs(2));
    assert_eq!((world.at(), world.workload().epoch), (Some(A), Epoch(2)));
}

#[test]
fn what_came_too_late_changes_nothing() {
    let mut world = placed(&[A, B], Failback::Manual);
    let agreed = world.agreed.clone();
    for command in [
        Command::Place { workload: W, after: Epoch(0), node: B, why: Why::Lost },
        Command::Place { workload: W, after: Epoch(2), node: B, why: Why::Lost },
        Command::Place { workload: WorkloadId(7), after: Epoch(0), node: B, why: Why::First },
        Command::Failed(W, Epoch(0)),
        Command::GiveUp(W, Epoch(2)),
        Command::Leave(NodeId(77)),
        Command::Drain(NodeId(77), true),
    ] {
        assert_eq!(world.agreed.apply(&command), [], "{command:?}");
        assert_eq!(world.agreed, agreed, "{command:?}");
    }
}

// === Random lives ===

#[derive(Debug, Clone)]
enum Deed {
    Pass(u64),
    Alive(usize, bool),
    Broken(usize, bool),
    Drain(usize, bool),
    Hold(bool),
    Reset,
    /// Another leader, who remembers nothing.
    Leader,
    /// A proposal out of the blue, as an old leader's may be.
    Stray(u64, usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        6 => (1_u64..40_000).prop_map(Deed::Pass),
        4 => (0_usize..3, any::<bool>()).prop_map(|(node, alive)| Deed::Alive(node, alive)),
        2 => (0_usize..3, any::<bool>()).prop_map(|(node, broken)| Deed::Broken(node, broken)),
        2 => (0_usize..3, any::<bool>()).prop_map(|(node, drain)| Deed::Drain(node, drain)),
        1 => any::<bool>().prop_map(Deed::Hold),
        1 => Just(Deed::Reset),
        2 => Just(Deed::Leader),
        1 => (0_u64..3, 0_usize..3).prop_map(|(back, node)| Deed::Stray(back, node)),
    ]
}

proptest! {
    /// Through any life: placed only when nobody holds a lease, one epoch after the other, on members. And when all is
    /// well again it comes to rest, on a node that may serve, and stays there.
    #[test]
    fn it_is_placed_safely_and_in_the_end_well(
        deeds in prop::collection::vec(deed(), 1..60),
        auto in any::<bool>(),
    ) {
        let nodes = [A, B, C];
        let failback = if auto { Failback::Auto } else { Failback::Manual };
        let mut world = World::new(&nodes, failback);
        world.settle();
        for deed in deeds {
            match deed {
                Deed::Pass(ms) => world.pass(Duration::from_millis(ms)),
                Deed::Alive(node, alive) => drop(world.alive.insert(nodes[node], alive)),
                Deed::Broken(node, true) => drop(world.broken.insert(nodes[node])),
                Deed::Broken(node, false) => drop(world.broken.remove(&nodes[node])),
                Deed::Drain(node, drained) => world.apply(&Command::Drain(nodes[node], drained)),
                Deed::Hold(held) => world.apply(&Command::Hold(W, held)),
                Deed::Reset => world.apply(&Command::Reset(W)),
                Deed::Leader => {
                    world.decider = Decider::new(patience());
                    world.revoked = false;
                }
                Deed::Stray(back, node) => {
                    // Of an epoch that is over: an old leader proposes nothing of the present one, see the lease.
                    let after = Epoch(world.workload().epoch.0.saturating_sub(back + 1));
                    if after < world.workload().epoch {
                        let node = nodes[node];
                        world.apply(&Command::Place { workload: W, after, node, why: Why::Lost });
                    }
                }
            }
            world.settle();
        }
        world.broken.clear();
        for node in nodes {
            world.alive.insert(node, true);
            world.apply(&Command::Drain(node, false));
        }
        world.apply(&Command::Hold(W, false));
        world.apply(&Command::Reset(W));
        world.pass(Duration::from_mins(5));
        let (node, epoch) = (world.at(), world.workload().epoch);
        prop_assert!(node.is_some(), "{:?}", world.workload());
        if auto {
            prop_assert_eq!(node, Some(A));
        }
        let proposed = world.proposed;
        world.pass(Duration::from_mins(30));
        prop_assert_eq!((world.at(), world.workload().epoch, world.proposed), (node, epoch, proposed));
    }
}
