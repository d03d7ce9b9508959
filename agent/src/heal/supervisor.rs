//! All units under care, behind one lock: whoever learns something feeds it here, and the decision is
//! made at once, on the thread that learned it (for a process death: the probe's real-time reader).
//!
//! Outputs leave in order: events to the bus, actions to the [`driver`](super::driver).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::machine::{Clocks, Exit, Held, Input, JobId, Machine, Output, Phase, Policy, Saved};
use crate::{
    config::UnitConfig,
    event::{Cause, Kind, OpId, bus::Bus},
    probe::{BootNs, ProbeEvent, Slot},
    snapshot::schedule::driver::Serving,
    unit::UnitView,
};

/// Something for the driver to do.
#[derive(Debug)]
pub enum Action {
    /// Start a unit and feed back how it went.
    Start(Job),
    /// Restart a unit, killing what does not stop, and feed back how it went.
    Restart(Job),
}

/// A start or restart.
#[derive(Debug)]
pub struct Job {
    /// The machine's number for it.
    pub number: JobId,
    /// The unit.
    pub slot: Slot,
    /// systemd's name for it.
    pub id: String,
    /// The operation it belongs to.
    pub op: Option<OpId>,
    /// How long it may take.
    pub limit: Duration,
    /// When what does not stop is killed.
    pub kill_after: Duration,
}

/// All units under care.
#[derive(Debug)]
pub struct Supervisor {
    bus: Arc<Bus>,
    state: Mutex<State>,
    actions: mpsc::UnboundedSender<Action>,
    wake: watch::Sender<Option<BootNs>>,
    changes: watch::Sender<u64>,
    runs: watch::Sender<u64>,
    decisions: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    units: Vec<Unit>,
    elsewhere: Elsewhere,
}

#[derive(Debug)]
struct Unit {
    config: UnitConfig,
    id: String,
    machine: Machine,
    op: Option<OpId>,
    cause: Option<Cause>,
    last: Option<LastOutage>,
    outages: u64,
    forks: u64,
    deaths: u64,
}

/// The last outage of a unit that is over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LastOutage {
    /// Why.
    pub cause: Cause,
    /// When it was over.
    pub healed: jiff::Timestamp,
    /// From the cause to the end, milliseconds.
    pub took_ms: u64,
}

/// A unit as `ftctl status` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UnitStatus {
    /// systemd's name.
    pub unit: String,
    /// The name in the configuration, where it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Its workload.
    pub workload: String,
    /// `up`, `ending`, `waiting`, `working`, `yielded`, `left`, `failed`, `unknown`.
    pub phase: Phase,
    /// Seconds in this phase.
    pub phase_s: u64,
    /// systemd's ActiveState.
    pub active_state: String,
    /// systemd's SubState.
    pub sub_state: String,
    /// systemd's LoadState.
    pub load_state: String,
    /// Main process; 0 when there is none.
    pub main_pid: u32,
    /// The cause of the outage under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outage: Option<Cause>,
    /// The hold, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
    /// Start attempts inside the window, and how many it may be.
    pub attempts: usize,
    /// See `attempts`.
    pub attempts_max: u32,
    /// Health check, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthStatus>,
    /// Outages seen since ftd started.
    pub outages: u64,
    /// Processes of the unit that died since ftd started.
    pub deaths: u64,
    /// Processes that the unit made since ftd started.
    pub forks: u64,
    /// The last outage that is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<LastOutage>,
}

/// A unit's health check.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HealthStatus {
    /// The check.
    pub check: String,
    /// Failures in a row.
    pub failures: u32,
    /// Whether it has ever succeeded.
    pub proven: bool,
}

/// A request about a unit that cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// Not under care.
    #[error("{unit} is not under ftd's care; under care: {known}")]
    Unknown {
        /// What was asked for.
        unit: String,
        /// What there is.
        known: String,
    },
}

/// CLOCK_BOOTTIME, now.
pub fn boot_now() -> BootNs {
    // Fails only for an unknown clock id.
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    BootNs(now.as_nanos().try_into().unwrap_or(u64::MAX))
}

fn clocks() -> Clocks {
    let monotonic = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Duration::from);
    let boot = boot_now();
    let suspended =
        monotonic.map_or(Duration::ZERO, |behind| Duration::from_nanos(boot.0).saturating_sub(behind));
    Clocks { boot, suspended, wall: jiff::Timestamp::now() }
}

impl Supervisor {
    /// A supervisor of `units`, which takes up what was `saved`; and the actions that it wants done.
    pub fn new(
        bus: Arc<Bus>,
        units: Vec<UnitConfig>,
        mut saved: BTreeMap<String, Saved>,
        elsewhere_per_minute: u32,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Action>) {
        let clocks = clocks();
        let units = units.into_iter().map(|config| {
            let policy = Policy {
                heal: config.heal.clone(),
                on_stop: config.on_stop,
                on_exit: config.on_exit,
                health: config.health.as_ref().map(|h| (h.check.to_string(), h.failures, h.grace)),
            };
            let machine = Machine::new(policy, saved.remove(&config.name).unwrap_or_default(), clocks);
            let id = config.name.clone();
            Unit { config, id, machine, op: None, cause: None, last: None, outages: 0, forks: 0, deaths: 0 }
        });
        let (actions, wanted) = mpsc::unbounded_channel();
        let elsewhere = Elsewhere { per_minute: elsewhere_per_minute, ..Elsewhere::default() };
        let state = Mutex::new(State { units: units.collect(), elsewhere });
        let supervisor = Self {
            bus,
            state,
            actions,
            wake: watch::Sender::new(None),
            changes: watch::Sender::new(0),
            runs: watch::Sender::new(0),
            decisions: watch::Sender::new(0),
        };
        supervisor.plan_wake(&supervisor.state());
        (Arc::new(supervisor), wanted)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When `tick` must be called next; changes are announced.
    pub fn wake(&self) -> watch::Receiver<Option<BootNs>> {
        self.wake.subscribe()
    }

    /// The number of the last change that must survive a restart of ftd; changes are announced.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Feeds one input that happened at `at`.
    pub fn feed(&self, slot: Slot, at: BootNs, input: Input) {
        let mut state = self.state();
        self.feed_locked(&mut state, slot, at, input);
        self.plan_wake(&state);
    }

    fn feed_locked(&self, state: &mut State, slot: Slot, at: BootNs, input: Input) {
        let Some(unit) = state.units.get_mut(slot.0 as usize) else { return };
        let now = boot_now();
        let undecided = !unit.machine.is_decided();
        let outputs = unit.machine.step(at.min(now), now, input);
        for output in outputs {
            self.put_out(unit, slot, now, output);
        }
        if undecided && unit.machine.is_decided() {
            self.decisions.send_modify(|number| *number += 1);
        }
    }

    fn put_out(&self, unit: &mut Unit, slot: Slot, stepped: BootNs, output: Output) {
        let id = Some(unit.id.as_str());
        let job = |unit: &Unit, number: JobId| Job {
            number,
            slot,
            id: unit.id.clone(),
            op: unit.op,
            limit: unit.config.heal.start_deadline,
            kill_after: unit.config.heal.kill_after,
        };
        // The driver lives as long as the daemon; without it nothing can be done anyway.
        let act = |action| drop(self.actions.send(action));
        match output {
            Output::Start(number) => act(Action::Start(job(unit, number))),
            Output::Restart(number) => act(Action::Restart(job(unit, number))),
            Output::Save => self.changes.send_modify(|number| *number += 1),
            Output::Open(kind) => {
                unit.outages += 1;
                if let Kind::Down { cause, .. } = &kind {
                    unit.cause = Some(*cause);
                }
                unit.op = Some(self.bus.open(id, kind));
            }
            Output::Close => unit.op = None,
            Output::Note(mut kind) => {
                match &mut kind {
                    // The decision is made now, not when the machine was asked.
                    Kind::Decided { after_us, .. } => {
                        *after_us += boot_now().0.saturating_sub(stepped.0) / 1000;
                    }
                    Kind::Healed { took_ms, .. } => {
                        if let Some(cause) = unit.cause.take() {
                            let healed = jiff::Timestamp::now();
                            unit.last = Some(LastOutage { cause, healed, took_ms: *took_ms });
                        }
                    }
                    Kind::UnitFound { alias } if unit.id != unit.config.name => {
                        *alias = Some(unit.config.name.clone());
                    }
                    _ => {}
                }
                self.bus.emit(id, unit.op, kind);
            }
        }
    }

    fn plan_wake(&self, state: &State) {
        let wake = state.units.iter().filter_map(|unit| unit.machine.wake()).min();
        self.wake.send_if_modified(|planned| std::mem::replace(planned, wake) != wake);
    }

    /// Lets every machine whose time has come go on.
    pub fn tick(&self) {
        let mut state = self.state();
        let now = boot_now();
        for slot in 0..state.units.len() {
            if state.units[slot].machine.wake().is_some_and(|wake| wake <= now) {
                self.feed_locked(&mut state, Slot(slot as u32), now, Input::Tick);
            }
        }
        self.plan_wake(&state);
    }

    /// Takes what the kernel reported.
    pub fn on_probe(&self, event: ProbeEvent) {
        let mut state = self.state();
        let (slot, at, input) = match event {
            ProbeEvent::Exit { at, slot: Some(slot), process, ppid, status, run_ns, max_rss } => {
                if let Some(unit) = state.units.get_mut(slot.0 as usize) {
                    unit.deaths += 1;
                }
                (slot, at, Input::Exit(Exit { process, ppid, status, run_ns, max_rss }))
            }
            ProbeEvent::Oom { at, slot: Some(slot), process, rss } => {
                (slot, at, Input::Oom { process, rss: rss.iter().sum() })
            }
            ProbeEvent::Signal { at, slot, target, signal, sender } => {
                (slot, at, Input::Signal { target, signal, sender })
            }
            ProbeEvent::Fork { slot, .. } => {
                if let Some(unit) = state.units.get_mut(slot.0 as usize) {
                    unit.forks += 1;
                }
                return;
            }
            ProbeEvent::Exec { .. } => return,
            ProbeEvent::Exit { slot: None, process, ppid, status, run_ns, max_rss, .. } => {
                let run_ms = run_ns / 1_000_000;
                let (main, sender, oom) = (false, None, false);
                let kind = Kind::ProcessDied { process, ppid, main, status, sender, oom, run_ms, max_rss };
                self.elsewhere(&mut state.elsewhere, kind);
                return;
            }
            ProbeEvent::Oom { slot: None, process, rss, .. } => {
                let kind =
                    Kind::OomKill { process, cgroup: String::new(), limit: None, rss: rss.iter().sum() };
                self.elsewhere(&mut state.elsewhere, kind);
                return;
            }
        };
        self.feed_locked(&mut state, slot, at, input);
        self.plan_wake(&state);
    }

    fn elsewhere(&self, limit: &mut Elsewhere, kind: Kind) {
        let (admitted, dropped) = limit.admit(boot_now());
        if dropped > 0 {
            self.bus.emit(None, None, Kind::EventsDropped { place: "elsewhere".into(), count: dropped });
        }
        if admitted {
            self.bus.emit(None, None, kind);
        }
    }

    /// systemd's word on a unit, under the name that systemd itself uses.
    pub fn on_view(&self, slot: Slot, id: &str, view: UnitView) {
        let mut state = self.state();
        if let Some(unit) = state.units.get_mut(slot.0 as usize)
            && unit.id != id
        {
            id.clone_into(&mut unit.id);
            let alias = Some(unit.config.name.clone());
            self.bus.emit(Some(id), None, Kind::UnitFound { alias });
        }
        let run = |state: &State| state.units.get(slot.0 as usize).map(|u| u.machine.view().active_enter);
        let before = run(&state);
        self.feed_locked(&mut state, slot, boot_now(), Input::View(view));
        self.plan_wake(&state);
        if run(&state) != before {
            self.runs.send_modify(|number| *number += 1);
        }
    }

    /// A number that changes whenever a unit is up in another run; changes are announced.
    pub fn runs(&self) -> watch::Receiver<u64> {
        self.runs.subscribe()
    }

    /// Waits until a unit is up in another run than the one with this [`UnitView::active_enter`].
    pub async fn another_run(&self, slot: Slot, old: u64) {
        let mut runs = self.runs.subscribe();
        loop {
            if self.view(slot).is_some_and(|(view, ..)| view.is_active() && view.active_enter != old) {
                return;
            }
            // The sender lives as long as this.
            if runs.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until of every unit it is known what to do: what happened before this was called, and that somebody
    /// has told of, is told in events and acted upon when it returns.
    pub async fn decided(&self) {
        let mut decisions = self.decisions.subscribe();
        // The sender lives as long as this.
        while !self.undecided().is_empty() && decisions.changed().await.is_ok() {}
    }

    /// Units of which systemd has yet to say what is, or was, the matter with them.
    pub fn undecided(&self) -> Vec<String> {
        let state = self.state();
        let undecided = state.units.iter().filter(|unit| !unit.machine.is_decided());
        undecided.map(|unit| unit.id.clone()).collect()
    }

    /// The units that are up, with their main processes.
    pub fn running(&self) -> Vec<(Slot, u32)> {
        let state = self.state();
        let units = state.units.iter().enumerate();
        let up =
            units.filter(|(_, unit)| unit.machine.phase() == Phase::Up && unit.machine.view().main_pid != 0);
        up.map(|(slot, unit)| (Slot(slot as u32), unit.machine.view().main_pid)).collect()
    }

    /// systemd cannot be reached.
    pub fn on_bus_lost(&self) {
        let mut state = self.state();
        for slot in 0..state.units.len() {
            self.feed_locked(&mut state, Slot(slot as u32), boot_now(), Input::BusLost);
        }
        self.plan_wake(&state);
    }

    /// Whether a unit serves, as far as is known: then its health is worth asking for.
    pub fn is_up(&self, slot: Slot) -> bool {
        self.state().units.get(slot.0 as usize).is_some_and(|unit| unit.machine.phase() == Phase::Up)
    }

    /// What must survive a restart of ftd, by the names of the configuration.
    pub fn saved(&self) -> BTreeMap<String, Saved> {
        self.state().units.iter().map(|unit| (unit.config.name.clone(), unit.machine.saved())).collect()
    }

    /// Finds a unit by systemd's name, its name in the configuration, or either without suffix.
    pub fn find(&self, name: &str) -> Result<(Slot, String), UnitError> {
        let state = self.state();
        let full = crate::config::unit_name(name);
        let ours = |unit: &Unit| {
            unit.id == full
                || unit.config.name == full
                || crate::unit::alias::others(&full).any(|other| other == unit.id)
        };
        match state.units.iter().position(ours) {
            Some(at) => Ok((Slot(at as u32), state.units[at].id.clone())),
            None => {
                let known: Vec<_> = state.units.iter().map(|unit| unit.id.as_str()).collect();
                let known = if known.is_empty() { "nothing".into() } else { known.join(", ") };
                Err(UnitError::Unknown { unit: full, known })
            }
        }
    }

    /// systemd's last word on a unit, and the operation under way for it.
    pub fn view(&self, slot: Slot) -> Option<(UnitView, Phase, bool)> {
        let state = self.state();
        let machine = &state.units.get(slot.0 as usize)?.machine;
        Some((machine.view().clone(), machine.phase(), machine.held().is_some()))
    }

    /// Since when all units of a workload serve, as far as is known; or which one does not, and why.
    pub fn serving(&self, workload: &str) -> Result<Serving, String> {
        let state = self.state();
        let (mut since, mut proven) = (BootNs(0), true);
        for unit in state.units.iter().filter(|unit| unit.config.workload == workload) {
            let (id, machine) = (&unit.id, &unit.machine);
            if machine.held().is_some() {
                return Err(format!("{id} is held"));
            }
            match (machine.phase(), machine.outage()) {
                (Phase::Up, None) => {}
                (Phase::Up, Some(cause)) => return Err(format!("{id} is up and does not serve ({cause:?})")),
                (phase, _) => return Err(format!("{id} is {}", format!("{phase:?}").to_lowercase())),
            }
            let (failures, once) = machine.health();
            proven &= unit.config.health.is_none() || once && failures == 0;
            since = since.max(machine.phase_since());
        }
        Ok(Serving { since, lasting: boot_now().since(since), proven })
    }

    /// All units, in the order of the configuration.
    pub fn status(&self) -> Vec<UnitStatus> {
        let now = boot_now();
        self.state().units.iter().map(|unit| unit.status(now)).collect()
    }
}

impl Unit {
    fn status(&self, now: BootNs) -> UnitStatus {
        let (machine, view) = (&self.machine, self.machine.view());
        let (failures, proven) = machine.health();
        let health = self.config.health.as_ref();
        UnitStatus {
            unit: self.id.clone(),
            alias: (self.id != self.config.name).then(|| self.config.name.clone()),
            workload: self.config.workload.clone(),
            phase: machine.phase(),
            phase_s: now.0.saturating_sub(machine.phase_since().0) / 1_000_000_000,
            active_state: view.active_state.clone(),
            sub_state: view.sub_state.clone(),
            load_state: view.load_state.clone(),
            main_pid: view.main_pid,
            outage: machine.outage(),
            held: machine.held().cloned(),
            attempts: machine.attempts(),
            attempts_max: self.config.heal.restarts,
            health: health.map(|h| HealthStatus { check: h.check.to_string(), failures, proven }),
            outages: self.outages,
            deaths: self.deaths,
            forks: self.forks,
            last: self.last.clone(),
        }
    }
}

/// Deaths outside the units under care become events at a bounded rate; the rest is counted.
#[derive(Debug, Default)]
struct Elsewhere {
    per_minute: u32,
    minute: u64,
    admitted: u32,
    dropped: u64,
}

impl Elsewhere {
    /// Whether one more may become an event, and how many of an earlier minute did not.
    fn admit(&mut self, now: BootNs) -> (bool, u64) {
        let minute = now.0 / 60_000_000_000;
        let mut dropped = 0;
        if minute != self.minute {
            dropped = std::mem::take(&mut self.dropped);
            self.minute = minute;
            self.admitted = 0;
        }
        let admit = self.admitted < self.per_minute;
        if admit {
            self.admitted += 1;
        } else {
            self.dropped += 1;
        }
        (admit, dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_elsewhere_are_bounded_per_minute_and_the_rest_is_counted() {
        let mut limit = Elsewhere { per_minute: 2, ..Elsewhere::default() };
        let at = |s: u64| BootNs(s * 1_000_000_000);
        let admitted = (0..5).filter(|s| limit.admit(at(*s)).0).count();
        assert_eq!(admitted, 2);
        assert_eq!(limit.admit(at(61)), (true, 3));
        assert_eq!(limit.admit(at(62)), (true, 0));
    }
}
