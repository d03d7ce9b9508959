//! Who may let a moving service run: the two halves of the protocol, pure.
//!
//! A service that moves exists twice for a while, as a tree that stands still on the source and as images, then processes,
//! on the target. At any moment at most one of the two may run, and in the end exactly one does. Either host, either ftd
//! and the link between them may fail between any two steps. Two rules do it:
//!
//! 1. **Until `Go` is sent, the source decides alone.** Nothing on the target may run: whatever fails, the source thaws, and
//!    tells the target, which undoes what it has prepared (and does so by itself when it hears nothing more).
//! 2. **Once `Go` may have been sent, the target decides.** The source keeps its tree frozen and whole, and asks. *Serving*
//!    ends the tree; *not serving* thaws it. Having said *not serving*, the target forgets the move, and a `Go` for a
//!    move that it does not know is refused: one that was late on its way starts nothing.
//!
//! ```text
//! source   Preparing ──▶ Freezing ──▶ Asking ──▶ Leaving ──▶ (forgotten: gone from here)
//!              │             │          │  ▲ no answer: ask again, for ever
//!              └─────────────┴──▶ Returning ──▶ (forgotten: runs here)
//!
//! target   Receiving ──▶ Starting ──▶ Serving ──▶ (forgotten: runs here)
//!              │             │            │ rebooted: Lost
//!              └─────────────┴──▶ Undoing ──▶ (forgotten: not here)
//! ```
//!
//! **The record** of a side is on its disk before the step begins that the phase names. So a side that was killed knows at
//! its next start how far it may have come, and takes up from there: every step can be done again.
//!
//! **What this cannot decide.** While the source is in `Asking` and the target cannot be reached, nobody can tell from
//! here whether the service runs there. It stays frozen until the target answers, or until somebody who knows better
//! decides ([`SourceInput::Decided`]): a person now; the epoch of the workload's placement, where a cluster has one. It is
//! the only input by which the service could run twice, and whoever gives it answers for that.

use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// How far the source is. It is on disk before the step of that phase begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourcePhase {
    /// The target is asked whether it can take the service, and makes room. The service runs.
    Preparing,
    /// The service is brought to a halt, and its images go to the target.
    Freezing,
    /// `Go` is sent, or was: the target decides.
    Asking,
    /// The target serves: what stands still here is ended.
    Leaving,
    /// The service is thawed, and the target undoes what it has done.
    Returning,
}

/// What the source learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceInput {
    /// The step of this phase is done.
    Done,
    /// It is not, and will not be.
    Failed,
    /// The target says that the service runs there.
    Serving,
    /// The target says that it does not run there, and will not by this move.
    NotServing,
    /// ftd was started again and has found the record.
    Resumed,
    /// Somebody who may has decided where it is to run.
    Decided(Side),
}

/// A side of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Target,
}

/// What the source does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceStep {
    /// Have the target make room, and hold the units.
    Prepare,
    /// Bring the units to a halt, and send their images.
    Freeze,
    /// Tell the target to go, and hear what becomes of it.
    Go,
    /// Ask what has become of it; what has not begun there must not begin any more.
    Ask,
    /// End what stands still.
    End,
    /// Let it go on.
    Thaw,
    /// Remove the record.
    Forget,
}

/// The source's next phase and step. `None`: the input says nothing in this phase.
pub fn source(phase: SourcePhase, input: SourceInput) -> Option<(SourcePhase, SourceStep)> {
    use SourceInput as In;
    use SourcePhase as Phase;
    use SourceStep as Step;
    Some(match (phase, input) {
        (Phase::Preparing, In::Done) => (Phase::Freezing, Step::Freeze),
        (Phase::Freezing, In::Done) => (Phase::Asking, Step::Go),
        (Phase::Preparing | Phase::Freezing | Phase::Returning, In::Failed | In::Resumed)
        | (Phase::Asking, In::NotServing | In::Decided(Side::Source)) => (Phase::Returning, Step::Thaw),
        (Phase::Asking, In::Serving | In::Decided(Side::Target))
        | (Phase::Leaving, In::Failed | In::Resumed) => (Phase::Leaving, Step::End),
        (Phase::Asking, In::Failed | In::Resumed) => (Phase::Asking, Step::Ask),
        (Phase::Leaving | Phase::Returning, In::Done) => (phase, Step::Forget),
        _ => return None,
    })
}

/// How far the target is. It is on disk before the step of that phase begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetPhase {
    /// There is room, and images arrive. Nothing runs.
    Receiving,
    /// The processes are made.
    Starting,
    /// They run, and this node serves.
    Serving,
    /// They ran, and this host has been started anew since.
    Lost,
    /// Nothing runs, and what was prepared is removed.
    Undoing,
}

/// What the target learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetInput {
    /// The source says: go. All images are there.
    Go,
    /// The step of this phase is done: the processes run, or nothing is left.
    Done,
    /// It is not: of processes that were made, none runs.
    Failed,
    /// The source asks what has become of it.
    Asked,
    /// The source has ended its tree.
    Confirmed,
    /// Nothing is heard of the source any more.
    Silent,
    /// ftd was started again and has found the record; whether the processes run, all of them, as they were made.
    Resumed {
        /// They do.
        runs: bool,
        /// The host was not started anew since the record was written.
        same_boot: bool,
    },
}

/// What the target does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetStep {
    /// Make the processes.
    Restore,
    /// Say that they run, now and whenever it is asked for.
    Serve,
    /// See that nothing of it runs, and remove what was prepared.
    Undo,
    /// Remove the record.
    Forget,
    /// The service is this node's and does not run: start it as any other.
    Start,
    /// Say so when it is known: the step under way says it.
    Wait,
}

/// The target's next phase and step. `None`: the input says nothing in this phase, and a `Go` is to be refused.
pub fn target(phase: TargetPhase, input: TargetInput) -> Option<(TargetPhase, TargetStep)> {
    use TargetInput as In;
    use TargetPhase as Phase;
    use TargetStep as Step;
    Some(match (phase, input) {
        (Phase::Receiving, In::Go) => (Phase::Starting, Step::Restore),
        (Phase::Starting, In::Done | In::Resumed { runs: true, same_boot: true })
        | (Phase::Serving, In::Asked | In::Resumed { same_boot: true, .. }) => (Phase::Serving, Step::Serve),
        (Phase::Starting, In::Asked | In::Go) | (Phase::Undoing, In::Asked) => (phase, Step::Wait),
        // The source has heard that it was serving here, and nothing is left there.
        (Phase::Lost, In::Confirmed) => (Phase::Lost, Step::Start),
        (Phase::Serving, In::Resumed { same_boot: false, .. }) | (Phase::Lost, In::Resumed { .. }) => {
            (Phase::Lost, Step::Wait)
        }
        (Phase::Receiving, In::Asked | In::Silent | In::Failed | In::Resumed { .. })
        | (Phase::Starting, In::Failed | In::Resumed { .. })
        | (Phase::Lost, In::Asked)
        | (Phase::Undoing, In::Failed | In::Resumed { .. }) => (Phase::Undoing, Step::Undo),
        (Phase::Undoing, In::Done) | (Phase::Serving, In::Confirmed) => (phase, Step::Forget),
        _ => return None,
    })
}
