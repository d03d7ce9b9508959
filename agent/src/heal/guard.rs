//! The watch over a workload's files: inputs in, outputs out, nothing else touched.
//!
//! ```text
//!             a change          valid            applied           served for a while
//!   Good ───────────────▶ Checking ───▶ Applying ───────▶ Proving ───────────────────▶ Good
//!     ▲                       │ invalid     │ refused         │ the service goes down
//!     │                       ▼             ▼                 ▼
//!     └──────────────────── PuttingBack (all of the last good generation) ◀── deleted, emptied, cut, mode, owner
//! ```
//!
//! What a generation must have done to become *good*: it was accepted by the service's own checker, the service
//! took it over, and served with it for a while. Only good generations are ever put back, so a bad change
//! cannot become what is put back, however often it is stored. What is damaged in a way that no editor leaves
//! behind on purpose (a file gone, emptied, cut short, given to somebody else) is put back without asking the
//! checker, which may well accept an empty file.
//!
//! Changes reach the machine in batches, when they have come to rest for a moment, so that an administrator who
//! edits several files at once is not fought halfway; `ftctl hold` keeps it out for longer. What was changed
//! while held, or while ftd was away, is looked at afterwards like any other change; and a generation that a
//! person has called good meanwhile is good.
//!
//! A service that goes down is not always brought down by its files. They are to blame if it went down by
//! itself after the last of them was changed: whether ftd had it take them over, or somebody restarted it before
//! ftd had looked. Who mends the files of a service that is down already is left in peace.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    event::{FileChange, Kind},
    probe::BootNs,
};

#[cfg(test)]
mod tests;

/// What is told to the machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// What was found when the files were looked at.
    Changed(Found),
    /// What the checker says of the files as they are: `Err` carries its words.
    Checked(Result<(), String>),
    /// The files as they are, are stored as this generation.
    Stored(Result<u64, String>),
    /// The service has taken the files over, or refuses to.
    Applied(Result<(), String>),
    /// All of the last good generation is in its place again: how many files that took.
    PutBack(Result<usize, String>),
    /// How the units of the workload are.
    Service(Service),
    /// Somebody takes the workload out of ftd's hands, or gives it back.
    Held(bool),
    /// The time that [`Guard::wake`] asked for has come.
    Tick,
}

/// What differs from the last good generation, after changes have come to rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The last good generation: the machine's, or a newer one that a person has called good.
    pub good: Option<u64>,
    /// What differs from that; nothing, when all is as it was.
    pub changes: Vec<Change>,
    /// When the last of that was changed, as far as can be told.
    pub newest: Option<BootNs>,
}

/// How the units of a workload are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Service {
    /// All serve.
    #[default]
    Serves,
    /// Not all serve, for reasons that have nothing to do with the files: stopped, killed from outside.
    Away,
    /// One went down by itself, the last at this moment.
    Down(BootNs),
}

/// One path that differs from the last good generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Where, and in what way, for people.
    pub told: FileChange,
    /// Damage, as opposed to an edit: nobody wants it, whatever the checker says.
    pub damage: bool,
}

/// What is to be done. One of `Check`, `Store`, `Apply`, `PutBack` at a time; each is answered by its input.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Run the service's own checker on the files as they are; answer `Checked`.
    Check,
    /// Store the files as they are; answer `Stored`.
    Store,
    /// Let the service take the files over: reload, or restart it; answer `Applied`.
    Apply,
    /// Put all of this generation in its place; answer `PutBack`.
    PutBack(u64),
    /// This generation is good now.
    MarkGood(u64),
    /// Look at the files anew; answer `Changed`. Goes on beside everything else.
    Look,
    /// Publish an event.
    Note(Kind),
}

/// Times and limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// A generation is good once the service has served with it for this long.
    pub good_after: Duration,
    /// At most so many times are files put back `within`; then somebody else insists, and a person is asked.
    pub put_backs: u32,
    /// See `put_backs`.
    pub within: Duration,
    /// How long it waits before it tries again what did not work.
    pub retry: Duration,
}

/// Where the machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// There is no good generation, and the files as they are cannot become one.
    Unguarded,
    /// The files are those of the last good generation.
    Good,
    /// The checker runs.
    Checking,
    /// The files are being stored.
    Storing,
    /// The service takes the files over.
    Applying,
    /// The service serves with them; not for long enough yet.
    Proving,
    /// The last good files are being put in their place.
    PuttingBack,
    /// The service takes over the files that were put back.
    Reverting,
    /// It did not work, and is tried again.
    Stuck,
    /// Somebody else changes them again and again: a person is asked.
    GivenUp,
}

/// The machine of one workload's files.
#[derive(Debug)]
pub struct Guard {
    policy: Policy,
    phase: Phase,
    good: Option<u64>,
    /// The generation that is being proven.
    candidate: Option<u64>,
    /// The files have proven themselves, and are only now stored: that did not work before.
    late: bool,
    /// The service may run with other files than the good ones.
    taken_over: bool,
    /// Changes that came while something else was being done, or while held.
    waiting: Option<Found>,
    /// The changes that are being dealt with.
    current: Vec<Change>,
    /// When the last of them was made.
    newest: BootNs,
    held: bool,
    service: Service,
    deadline: Option<BootNs>,
    put_back_at: Vec<BootNs>,
}

impl Guard {
    /// A machine for files of which `good` is the last good generation. Its first input is what differs from that.
    pub fn new(policy: Policy, good: Option<u64>) -> Self {
        Self {
            policy,
            phase: if good.is_some() { Phase::Good } else { Phase::Unguarded },
            good,
            candidate: None,
            late: false,
            taken_over: false,
            waiting: None,
            current: Vec::new(),
            newest: BootNs(0),
            held: false,
            service: Service::Serves,
            deadline: None,
            put_back_at: Vec::new(),
        }
    }

    /// When to feed the next `Tick`, at the latest.
    pub fn wake(&self) -> Option<BootNs> {
        self.deadline
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The paths that are being dealt with, or were the last.
    pub fn current(&self) -> impl Iterator<Item = &str> {
        self.current.iter().map(|change| change.told.path.as_str())
    }

    /// The last good generation.
    pub fn good(&self) -> Option<u64> {
        self.good
    }

    /// Takes one input; answers what is to be done, in order.
    pub fn step(&mut self, now: BootNs, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Changed(found) => {
                self.adopt(found.good, &mut out);
                self.waiting = Some(found);
                self.look(now, &mut out);
            }
            Input::Checked(verdict) if self.phase == Phase::Checking => {
                self.on_checked(verdict, now, &mut out);
            }
            Input::Stored(result) => self.on_stored(result, now, &mut out),
            Input::Applied(result) => self.on_applied(result, now, &mut out),
            Input::PutBack(result) if self.phase == Phase::PuttingBack => {
                self.on_put_back(result, now, &mut out);
            }
            Input::Service(service) => self.on_service(service, now, &mut out),
            Input::Held(held) => self.on_held(held, now, &mut out),
            Input::Tick => self.on_tick(now, &mut out),
            // The answer to something that is no longer waited for.
            Input::Checked(_) | Input::PutBack(_) => {}
        }
        out
    }

    /// Takes up the changes that wait, when nothing else is being done.
    fn look(&mut self, now: BootNs, out: &mut Vec<Output>) {
        let at_rest = matches!(
            self.phase,
            Phase::Good | Phase::Proving | Phase::Unguarded | Phase::Stuck | Phase::GivenUp
        );
        if !at_rest || self.held {
            return;
        }
        let Some(Found { changes, newest, .. }) = self.waiting.take() else { return };
        if changes.is_empty() && self.good.is_some() {
            return self.on_as_good(now, out);
        }
        if !changes.is_empty() {
            let told = changes.iter().map(|change| change.told.clone()).collect();
            out.push(Output::Note(Kind::FilesChanged { changes: told }));
        }
        if self.phase == Phase::GivenUp {
            return;
        }
        self.candidate = None;
        self.current.clone_from(&changes);
        self.newest = newest.unwrap_or(now);
        let damaged = changes.iter().filter(|change| change.damage).map(|change| change.told.to_string());
        let damaged: Vec<_> = damaged.collect();
        if self.good.is_some() && !damaged.is_empty() {
            self.put_back(&damaged.join("; "), now, out);
        } else {
            self.enter(Phase::Checking, None);
            out.push(Output::Check);
        }
    }

    /// A person may have called a newer generation good.
    fn adopt(&mut self, good: Option<u64>, out: &mut Vec<Output>) {
        let Some(generation) = good.filter(|good| self.good.is_none_or(|ours| ours < *good)) else { return };
        self.good = Some(generation);
        // An older one does not come after it.
        self.candidate = None;
        out.push(Output::Note(Kind::FilesGood { generation }));
        if self.phase == Phase::Unguarded {
            self.enter(Phase::Good, None);
        }
    }

    fn on_held(&mut self, held: bool, now: BootNs, out: &mut Vec<Output>) {
        self.held = held;
        if held {
            return;
        }
        // Out of date: much may have been done meanwhile.
        self.waiting = None;
        if self.phase == Phase::GivenUp {
            self.put_back_at.clear();
            self.rest(now, out);
        }
        if self.phase == Phase::Proving && self.is_to_blame() {
            self.put_back(WENT_DOWN, now, out);
        }
        out.push(Output::Look);
    }

    /// Whether the service is down, and went down after the files were changed.
    fn is_to_blame(&self) -> bool {
        self.good.is_some() && matches!(self.service, Service::Down(at) if at > self.newest)
    }

    /// The files are those of the last good generation, by whoever's hand.
    fn on_as_good(&mut self, now: BootNs, out: &mut Vec<Output>) {
        self.candidate = None;
        if std::mem::take(&mut self.taken_over) {
            self.enter(Phase::Reverting, None);
            out.push(Output::Apply);
        } else if self.phase != Phase::GivenUp {
            self.rest(now, out);
        }
    }

    fn on_checked(&mut self, verdict: Result<(), String>, now: BootNs, out: &mut Vec<Output>) {
        match verdict {
            Ok(()) => {
                self.enter(Phase::Storing, None);
                out.push(Output::Store);
            }
            Err(words) => self.put_back(&words, now, out),
        }
    }

    fn on_stored(&mut self, result: Result<u64, String>, now: BootNs, out: &mut Vec<Output>) {
        match result {
            Ok(generation) => self.candidate = Some(generation),
            // The change is valid all the same; it is stored when it has proven itself.
            Err(error) => trouble("storing the files", error, out),
        }
        match self.phase {
            Phase::Storing if std::mem::take(&mut self.late) => {
                if self.waiting.is_none() && self.candidate.is_some() {
                    self.proven(now, out);
                } else {
                    self.prove(now);
                    self.look(now, out);
                }
            }
            Phase::Storing if self.good.is_none() => {
                self.prove(now);
                self.look(now, out);
            }
            Phase::Storing => {
                self.taken_over = true;
                self.enter(Phase::Applying, None);
                out.push(Output::Apply);
            }
            _ => {}
        }
    }

    fn on_applied(&mut self, result: Result<(), String>, now: BootNs, out: &mut Vec<Output>) {
        match (self.phase, result) {
            (Phase::Applying, Ok(())) if self.is_to_blame() && !self.held => {
                self.put_back(WENT_DOWN, now, out);
            }
            (Phase::Applying, Ok(())) => {
                self.prove(now);
                self.look(now, out);
            }
            (Phase::Applying, Err(words)) => self.put_back(&words, now, out),
            (Phase::Reverting, result) => {
                if let Err(error) = result {
                    trouble("letting the service take over the files that were put back", error, out);
                }
                self.rest(now, out);
            }
            _ => {}
        }
    }

    fn on_put_back(&mut self, result: Result<usize, String>, now: BootNs, out: &mut Vec<Output>) {
        match result {
            Ok(files) => {
                out.push(Output::Note(Kind::FilesPutBack { generation: self.good.unwrap_or(0), files }));
                // What was found meanwhile is out of date.
                self.waiting = None;
                out.push(Output::Look);
                if std::mem::take(&mut self.taken_over) || self.is_to_blame() {
                    self.enter(Phase::Reverting, None);
                    out.push(Output::Apply);
                } else {
                    self.rest(now, out);
                }
            }
            Err(error) => {
                trouble("putting the last good files back", error, out);
                self.enter(Phase::Stuck, Some(now.after(self.policy.retry)));
            }
        }
    }

    fn on_service(&mut self, service: Service, now: BootNs, out: &mut Vec<Output>) {
        let before = std::mem::replace(&mut self.service, service);
        if self.phase != Phase::Proving {
            return;
        }
        if self.is_to_blame() && !self.held {
            self.put_back(WENT_DOWN, now, out);
        } else if service == Service::Serves && before != service {
            self.prove(now);
        }
    }

    fn on_tick(&mut self, now: BootNs, out: &mut Vec<Output>) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match self.phase {
            Phase::Proving if self.service != Service::Serves || self.held => self.prove(now),
            Phase::Proving if self.candidate.is_some() => self.proven(now, out),
            Phase::Proving => {
                self.late = true;
                self.enter(Phase::Storing, None);
                out.push(Output::Store);
            }
            Phase::Stuck if self.held => self.enter(Phase::Stuck, Some(now.after(self.policy.retry))),
            Phase::Stuck => self.try_put_back(out),
            _ => {}
        }
    }

    fn prove(&mut self, now: BootNs) {
        self.enter(Phase::Proving, Some(now.after(self.policy.good_after)));
    }

    fn proven(&mut self, now: BootNs, out: &mut Vec<Output>) {
        if let Some(generation) = self.candidate.take() {
            self.good = Some(generation);
            self.taken_over = false;
            out.push(Output::MarkGood(generation));
            out.push(Output::Note(Kind::FilesGood { generation }));
        }
        self.rest(now, out);
    }

    /// The files as they are must not stay: `why`.
    fn put_back(&mut self, why: &str, now: BootNs, out: &mut Vec<Output>) {
        self.candidate = None;
        if self.held {
            // Looked at again when the hold is over.
            return self.rest(now, out);
        }
        out.push(Output::Note(Kind::FilesBad { why: why.to_owned(), generation: self.good }));
        if self.good.is_none() {
            self.enter(Phase::Unguarded, None);
            return self.look(now, out);
        }
        let policy = self.policy;
        self.put_back_at.retain(|at| now.since(*at) < policy.within);
        if self.put_back_at.len() >= policy.put_backs as usize {
            let error = format!(
                "they were put back {} times within {}, and somebody changes them again",
                policy.put_backs,
                humantime::format_duration(policy.within)
            );
            trouble("keeping the good files", error, out);
            return self.enter(Phase::GivenUp, None);
        }
        self.put_back_at.push(now);
        self.try_put_back(out);
    }

    fn try_put_back(&mut self, out: &mut Vec<Output>) {
        let Some(good) = self.good else { return };
        self.enter(Phase::PuttingBack, None);
        out.push(Output::PutBack(good));
    }

    fn rest(&mut self, now: BootNs, out: &mut Vec<Output>) {
        self.enter(if self.good.is_some() { Phase::Good } else { Phase::Unguarded }, None);
        self.look(now, out);
    }

    fn enter(&mut self, phase: Phase, deadline: Option<BootNs>) {
        self.phase = phase;
        self.deadline = deadline;
    }
}

const WENT_DOWN: &str = "the service went down after they were changed";

fn trouble(what: &str, error: String, out: &mut Vec<Output>) {
    out.push(Output::Note(Kind::FilesTrouble { what: what.into(), error }));
}
