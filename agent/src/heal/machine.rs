//! The heal state machine of one unit: inputs and time in, outputs out, nothing else touched.
//!
//! ```text
//!            main process died / unit went down            attempt
//!   Up ───────────────────────────────▶ Ending ──▶ Waiting ───────▶ Working
//!   ▲                                     │  (back-off)               │
//!   │◀────────── active, in a new run ────┴───────────────────────────┤
//!   │                                                                 │ too many attempts
//!   └── a person starts or releases it ──────── Failed ◀──────────────┘
//! ```
//!
//! Two reporters tell of the same death, in either order and with different delay: the kernel probe,
//! within microseconds, and systemd, once it has reaped the process. What makes it safe to act on
//! the first one:
//!
//! - A start is asked for in mode `fail`: where a stop job is queued (somebody is stopping the unit on
//!   purpose) systemd refuses, instead of cancelling that stop. A start that reaches systemd while the
//!   unit is still being torn down is queued by systemd until that is over. A start that
//!   reaches it before it has noticed the death does nothing, and says `done`: then the unit is still in
//!   its old run, which `active_enter` tells, and the machine waits for systemd to notice and asks again.
//! - Only a death that cannot be an orderly stop is acted on at once: killed by somebody who is not
//!   PID 1, crashed, ended with an error. An exit with code 0, or a signal from PID 1, may
//!   be the work of `systemctl stop`; the machine waits for systemd's own word, milliseconds later.
//! - While a start or restart is under way (`Working`) no other is asked for, whatever is reported.
//! - The kernel tells of an OOM kill in three reports (the signal, the victim, the death), and the last two may
//!   overtake each other: a death by the kernel's own SIGKILL waits a moment for the second.
//! - A unit with a `Restart=` of its own that covers the death is left to systemd; ftd steps in only
//!   when systemd has not acted in time, or has given up.
//!
//! An **outage** lasts from the cause to the next run; it is one operation, and every event of it
//! carries its id. *Healed* means: active, in another run than the one that ended (for a hung unit
//! also: the health check succeeds).

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Heal, OnStop},
    event::{Cause, Decision, ExitStatus, Healer, Kind, Process},
    probe::BootNs,
    unit::UnitView,
};

/// What the configuration says of one unit.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Limits and times.
    pub heal: Heal,
    /// Stopped by somebody.
    pub on_stop: OnStop,
    /// Ended by itself, without an error.
    pub on_exit: OnStop,
    /// The health check's text, failures that mean `hung`, and the time after a start in which they do
    /// not count.
    pub health: Option<(String, u32, Duration)>,
}

/// What is told to the machine.
#[derive(Debug, Clone)]
pub enum Input {
    /// systemd's current view of the unit.
    View(UnitView),
    /// A process in the unit's cgroup died.
    Exit(Exit),
    /// The OOM killer chose a process in the unit's cgroup.
    Oom {
        /// The victim.
        process: Process,
        /// Its resident memory, bytes.
        rss: u64,
    },
    /// A signal was sent to a process in the unit's cgroup.
    Signal {
        /// Target.
        target: u32,
        /// Signal number.
        signal: i32,
        /// Who.
        sender: Process,
    },
    /// The job that a `Start` or `Restart` asked for is over, or could not be queued.
    JobDone(JobId, JobOutcome),
    /// The health check's verdict.
    Health(Result<(), String>),
    /// A person takes the unit out of ftd's hands, until then or for good.
    Hold {
        /// End, on the machine's clock and on the wall.
        until: Option<(BootNs, jiff::Timestamp)>,
        /// The reason given.
        reason: Option<String>,
    },
    /// A person gives it back; this also ends `Failed`.
    Release,
    /// The time that [`Machine::wake`] asked for has come.
    Tick,
    /// systemd cannot be reached: running jobs are forgotten. A `View` says when it can again.
    BusLost,
}

/// A process death in the unit's cgroup.
#[derive(Debug, Clone)]
pub struct Exit {
    /// Who.
    pub process: Process,
    /// Parent.
    pub ppid: u32,
    /// How, when that is known.
    pub status: Option<ExitStatus>,
    /// Life time, nanoseconds.
    pub run_ns: u64,
    /// Largest resident set, bytes.
    pub max_rss: u64,
}

/// Tells one job that the machine asked for from the next. Its end comes by another way than systemd's word on
/// the unit, and may come after the unit is up, and even dead again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobId(u64);

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobOutcome {
    /// systemd's result: `done`, `failed`, `canceled`, `timeout`, `dependency`, `skipped`, …
    Ended(String),
    /// A stop is queued: systemd refused to cancel it.
    StopPending,
    /// systemd refused it for another reason: its error.
    Refused(String),
    /// systemd could not be asked, or the connection broke before it said how it went.
    Unreachable,
    /// Not over within the deadline.
    TooLate,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Reset the unit's failure and start counters and start it, in mode `fail`; answer `JobDone`.
    Start(JobId),
    /// Restart it, killing what does not stop in time; answer `JobDone`.
    Restart(JobId),
    /// Publish an event of the current operation.
    Note(Kind),
    /// Publish the event that opens the operation to which the following notes belong.
    Open(Kind),
    /// The operation is over.
    Close,
    /// What [`Machine::saved`] returns has changed and must survive a restart of ftd.
    Save,
}

/// What survives a restart of ftd.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Saved {
    /// Held, until the wall clock says so (or for good).
    pub held: Option<Held>,
    /// Gave up.
    pub failed: bool,
    /// Deliberately down.
    pub left: bool,
    /// Start attempts inside the window, nanoseconds of the boot clock.
    pub attempts: Vec<u64>,
    /// The health check that has succeeded at least once.
    pub proven: Option<String>,
    /// The run in which it was last up; of this boot.
    pub run: Option<Run>,
}

/// What tells one run of a unit from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// [`UnitView::inactive_exit`]: it is there as soon as the run begins.
    pub inactive_exit: u64,
    /// [`UnitView::n_restarts`].
    pub n_restarts: u32,
}

/// A hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Its end, if it has one.
    pub until: Option<jiff::Timestamp>,
    /// The reason given.
    pub reason: Option<String>,
}

/// Where the machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// systemd has not said anything yet, or the unit cannot be loaded.
    Unknown,
    /// It serves.
    Up,
    /// It is going down or down; systemd has the next word.
    Ending,
    /// Somebody, or systemd itself, is bringing it up.
    Yielded,
    /// Down; the back-off before the next attempt runs.
    Waiting,
    /// Our start or restart is under way.
    Working,
    /// Down on purpose.
    Left,
    /// Given up.
    Failed,
}

#[derive(Debug, Clone)]
struct Outage {
    cause: Cause,
    detail: String,
    began: BootNs,
    /// The end counts as success for systemd (exit code 0, or a signal of orderly stops).
    clean: bool,
    /// The run that ended, as [`UnitView::active_enter`].
    run: u64,
    /// systemd's own restarts before it.
    n_restarts: u32,
    /// The event that opens the operation is out. Before that, systemd has yet to say what it was.
    announced: bool,
    /// Healed only when the health check says so, and mended by a restart, not a start.
    by_health: bool,
    /// The main process is dead and systemd does not notice: mended by a restart.
    unnoticed: bool,
    /// systemd's own restart is no longer waited for.
    impatient: bool,
    /// ftd asked for at least one start.
    acted: bool,
    /// A start did nothing, and was not counted; the next that does nothing is.
    asked_again: bool,
    /// That nothing is done because of a hold is told.
    told_held: bool,
    /// The last attempt of which the decision is told.
    told_attempt: u32,
}

/// A signal that was sent to a process of the unit.
#[derive(Debug, Clone)]
struct Sent {
    at: BootNs,
    target: u32,
    signal: i32,
    sender: Process,
}

/// How a process of the unit ended, by the kernel's word.
#[derive(Debug, Clone)]
struct Death {
    pid: u32,
    cause: Cause,
    detail: String,
    /// See [`Outage::clean`].
    clean: bool,
}

/// Signals by which orderly stops are done; a death by any other is a crash or a kill.
const ORDERLY: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGPIPE, libc::SIGTERM];
/// Signals that a process brings upon itself.
const CRASH: [i32; 8] = [
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGXCPU,
    libc::SIGSYS,
];
/// Last signals remembered, to name who sent the one that ended a process.
const SIGNALS: usize = 64;
/// OOM victims remembered until they are gone.
const VICTIMS: usize = 16;
/// Deaths remembered, to say more of the one that systemd reports than systemd does.
const DEATHS: usize = 16;
/// How long a death by the kernel's SIGKILL waits for the report that the OOM killer chose the process. The
/// killer sends the signal first and names its victim right after (`__oom_kill_process` in mm/oom_kill.c), by
/// when another CPU may have ended the victim; the few instructions between take longer only when it is preempted.
const OOM_WORD: Duration = Duration::from_millis(2);

/// The state machine of one unit.
#[derive(Debug)]
pub struct Machine {
    policy: Policy,
    view: UnitView,
    phase: Phase,
    phase_since: BootNs,
    held: Option<Held>,
    hold_ends: Option<BootNs>,
    outage: Option<Outage>,
    /// A job that is not ours takes, or took, the unit down: the run that it ends, as
    /// [`UnitView::inactive_exit`]. A start that was queued behind a death looks the same until it has begun.
    stopping: Option<u64>,
    /// The last job that is known not to stop it: it had it start or reload, or the unit had failed already when ftd
    /// looked. Should the unit end of that, then not because somebody stops it.
    no_stop: u32,
    /// The job of ours that is under way. There is one only during an outage.
    job: Option<JobId>,
    /// The last one asked for.
    last_job: JobId,
    /// systemd can be asked, as far as is known.
    reachable: bool,
    /// When `Waiting`, `Yielded` or `Ending` end by themselves.
    deadline: Option<BootNs>,
    attempts: VecDeque<BootNs>,
    in_a_row: u32,
    signals: VecDeque<Sent>,
    victims: VecDeque<u32>,
    /// Deaths that may prove to be OOM kills, until [`OOM_WORD`] is over.
    parked: VecDeque<(BootNs, Exit)>,
    deaths: VecDeque<Death>,
    health_failures: u32,
    proven: bool,
    /// Deliberately down, until it is up again.
    left: bool,
    /// The run in which it was last up.
    run: Option<Run>,
    /// The same, as long as nothing is known of what became of it while nobody could look.
    lost_sight: Option<Run>,
    suspended: Duration,
}

/// The clocks that a machine starts with, as they are at that moment.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// The machine's own: CLOCK_BOOTTIME.
    pub boot: BootNs,
    /// How far CLOCK_MONOTONIC, which systemd tells times by, is behind it: it stands still in a suspended host.
    pub suspended: Duration,
    /// The wall's.
    pub wall: jiff::Timestamp,
}

impl Machine {
    /// A machine that takes up what an earlier ftd left.
    pub fn new(policy: Policy, saved: Saved, clocks: Clocks) -> Self {
        let Clocks { boot: now, suspended, wall } = clocks;
        let hold_ends = saved.held.as_ref().and_then(|held| held.until).map(|until| {
            let left = until.duration_since(wall);
            now.after(Duration::try_from(left).unwrap_or_default())
        });
        let proven = policy.health.as_ref().is_some_and(|(check, ..)| saved.proven.as_ref() == Some(check));
        let attempts = saved.attempts.into_iter().map(BootNs).filter(|at| *at <= now).collect();
        Self {
            policy,
            view: UnitView::default(),
            phase: if saved.failed { Phase::Failed } else { Phase::Unknown },
            phase_since: now,
            held: saved.held,
            hold_ends,
            outage: None,
            stopping: None,
            no_stop: 0,
            job: None,
            last_job: JobId::default(),
            reachable: true,
            deadline: None,
            attempts,
            in_a_row: 0,
            signals: VecDeque::new(),
            victims: VecDeque::new(),
            parked: VecDeque::new(),
            deaths: VecDeque::new(),
            health_failures: 0,
            proven,
            left: saved.left,
            run: saved.run,
            lost_sight: saved.run.filter(|_| !saved.left && !saved.failed),
            suspended,
        }
    }

    /// What must survive a restart of ftd.
    pub fn saved(&self) -> Saved {
        Saved {
            held: self.held.clone(),
            failed: self.phase == Phase::Failed,
            left: self.left,
            attempts: self.attempts.iter().map(|at| at.0).collect(),
            proven: self.policy.health.as_ref().filter(|_| self.proven).map(|(check, ..)| check.clone()),
            run: self.run,
        }
    }

    /// When to feed the next `Tick`, at the latest.
    pub fn wake(&self) -> Option<BootNs> {
        let parked = self.parked.front().map(|(at, _)| at.after(OOM_WORD));
        self.hold_ends.into_iter().chain(self.deadline).chain(parked).min()
    }
    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }
    /// Since when.
    pub fn phase_since(&self) -> BootNs {
        self.phase_since
    }
    /// Whether it is known what to do: not before systemd's first word, and not while the unit ends and systemd
    /// has yet to say how.
    pub fn is_decided(&self) -> bool {
        match self.phase {
            Phase::Unknown => self.reachable && !self.view.load_state.is_empty(),
            Phase::Ending => self.outage.as_ref().is_some_and(|outage| outage.announced),
            _ => true,
        }
    }
    /// The hold, if there is one.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
    /// systemd's last word.
    pub fn view(&self) -> &UnitView {
        &self.view
    }
    /// Attempts inside the window.
    pub fn attempts(&self) -> usize {
        self.attempts.len()
    }
    /// The cause of the outage that is under way.
    pub fn outage(&self) -> Option<Cause> {
        self.outage.as_ref().filter(|o| o.announced).map(|o| o.cause)
    }
    /// Health: failures in a row, and whether the check has ever succeeded.
    pub fn health(&self) -> (u32, bool) {
        (self.health_failures, self.proven)
    }

    /// Takes one input that happened at `at` (never later than `now`); answers what is to be done, in order.
    pub fn step(&mut self, at: BootNs, now: BootNs, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        let run = self.run;
        match input {
            Input::View(view) => {
                self.unpark(|_, _| true, now, &mut out);
                self.on_view(view, now, &mut out);
            }
            Input::Exit(exit) if self.may_be_oom(&exit, at) => self.parked.push_back((at, exit)),
            Input::Exit(exit) => self.on_exit(exit, at, now, &mut out),
            Input::Oom { process, rss } => {
                let pid = process.pid;
                remember(&mut self.victims, pid, VICTIMS);
                let limit = Some(self.view.memory_max).filter(|max| (1..u64::MAX).contains(max));
                let cgroup = self.view.control_group.clone();
                out.push(Output::Note(Kind::OomKill { process, cgroup, limit, rss }));
                self.unpark(|_, exit| exit.process.pid == pid, now, &mut out);
            }
            Input::Signal { target, signal, sender } => {
                remember(&mut self.signals, Sent { at, target, signal, sender }, SIGNALS);
            }
            Input::JobDone(job, outcome) => self.on_job(job, outcome, now, &mut out),
            Input::Health(verdict) => self.on_health(verdict, now, &mut out),
            Input::Hold { until, reason } => {
                self.hold_ends = until.map(|(boot, _)| boot);
                let until = until.map(|(_, wall)| wall);
                self.held = Some(Held { until, reason: reason.clone() });
                if self.phase == Phase::Waiting {
                    self.enter(Phase::Ending, now, None);
                }
                out.push(Output::Note(Kind::Held { until, reason }));
                out.push(Output::Save);
            }
            Input::Release => self.release("person", now, &mut out),
            Input::Tick => self.on_tick(now, &mut out),
            Input::BusLost => {
                // What became of a running job is told by the next view.
                self.job = None;
                self.out_of_reach(now);
            }
        }
        if self.run != run && !out.contains(&Output::Save) {
            out.push(Output::Save);
        }
        out
    }

    // ---- inputs

    /// The kernel itself killed it, and has not said yet that this was the OOM killer.
    fn may_be_oom(&self, exit: &Exit, at: BootNs) -> bool {
        matches!(exit.status, Some(ExitStatus::Signal { signal: libc::SIGKILL, .. }))
            && !self.victims.contains(&exit.process.pid)
            && self.sender(exit, at).is_some_and(|sender| is_kernel(&sender))
    }

    /// Takes those of the parked deaths that are `due`.
    fn unpark(&mut self, due: impl Fn(BootNs, &Exit) -> bool, now: BootNs, out: &mut Vec<Output>) {
        for (at, exit) in std::mem::take(&mut self.parked) {
            if due(at, &exit) {
                self.on_exit(exit, at, now, out);
            } else {
                self.parked.push_back((at, exit));
            }
        }
    }

    fn on_exit(&mut self, exit: Exit, at: BootNs, now: BootNs, out: &mut Vec<Output>) {
        let pid = exit.process.pid;
        let main = pid != 0 && pid == self.view.main_pid;
        let oom = self.victims.contains(&pid);
        let sender = self.sender(&exit, at);
        self.victims.retain(|victim| *victim != pid);
        self.signals.retain(|sent| sent.target != pid);

        let (cause, detail) = describe(&exit, sender.as_ref(), oom);
        let clean = match exit.status {
            None => false,
            Some(ExitStatus::Code(code)) => code == 0,
            Some(ExitStatus::Signal { signal, .. }) => ORDERLY.contains(&signal) && !oom,
        };
        remember(&mut self.deaths, Death { pid, cause, detail: detail.clone(), clean }, DEATHS);
        let status = exit.status;
        let by_systemd = sender.as_ref().is_some_and(|s| s.pid == 1);
        let died = Kind::ProcessDied {
            process: exit.process,
            ppid: exit.ppid,
            main,
            status,
            sender,
            oom,
            run_ms: exit.run_ns / 1_000_000,
            max_rss: exit.max_rss,
        };
        // The unit's other processes come and go; only a violent end is worth telling.
        let telling = main || oom || !(clean || by_systemd || status.is_none());
        let under_way = self.outage.as_ref().is_some_and(|outage| outage.announced);
        let expected = self.view.job != 0 || self.stopping.is_some() || self.job.is_some() || under_way;
        if !main || expected || !matches!(self.phase, Phase::Up | Phase::Unknown) {
            if telling {
                out.push(Output::Note(died));
            }
            return;
        }
        self.end_row_if_settled(at);
        self.begin(cause, detail, at, clean);
        self.enter(Phase::Ending, now, Some(self.policy.heal.systemd_grace));
        if clean || by_systemd || status.is_none() {
            // It may be the work of an orderly stop: systemd's word is awaited.
            out.push(Output::Note(died));
        } else {
            self.announce(out);
            self.decide(now, out);
            out.push(Output::Note(died));
        }
    }

    /// Who sent the signal that ended a process, or that made it exit. A process may catch a signal, tidy
    /// up and send it to itself: then the one who sent it first is meant.
    fn sender(&self, exit: &Exit, at: BootNs) -> Option<Process> {
        const ENDING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGABRT];
        const TIDYING: Duration = Duration::from_secs(1);
        let pid = exit.process.pid;
        let ended_by = |signal: i32| match exit.status {
            Some(ExitStatus::Signal { signal: by, .. }) => by == signal,
            Some(ExitStatus::Code(_)) => ENDING.contains(&signal),
            None => ENDING.contains(&signal) || signal == libc::SIGKILL,
        };
        let mut newest_first = self.signals.iter().rev().filter(|s| s.target == pid && ended_by(s.signal));
        let last = newest_first.next()?;
        let first = newest_first.find(|s| s.sender.pid != pid && at.since(s.at) < TIDYING);
        let meant = if last.sender.pid == pid { first.unwrap_or(last) } else { last };
        Some(meant.sender.clone())
    }

    fn on_view(&mut self, view: UnitView, now: BootNs, out: &mut Vec<Output>) {
        let before = std::mem::replace(&mut self.view, view);
        self.reachable = true;
        if !self.view.is_loaded() {
            if before.load_state != self.view.load_state {
                out.push(Output::Note(load_problem(&self.view)));
            }
            if !matches!(self.phase, Phase::Failed | Phase::Left) {
                self.enter(Phase::Unknown, now, None);
            }
            return;
        }
        if !before.load_state.is_empty() && !before.is_loaded() {
            out.push(Output::Note(Kind::UnitFound { alias: None }));
        }
        if matches!(self.view.active_state.as_str(), "activating" | "reloading") {
            // systemd keeps the job of a start that failed until all processes are gone.
            self.no_stop = self.view.job;
        }
        if !self.view.is_active() {
            self.end_row_if_settled(now);
        }
        match self.view.active_state.as_str() {
            _ if self.view.is_active() => self.on_active(now, out),
            _ if self.view.is_down() => self.on_down(now, out),
            "deactivating" => {
                if self.phase == Phase::Unknown && self.view.result != "success" {
                    // What made it fail came before the first look, and the job may well be the start that failed.
                    self.no_stop = self.view.job;
                }
                if self.view.job != 0 && self.view.job != self.no_stop && self.job.is_none() {
                    self.stopping = Some(self.view.inactive_exit);
                }
                if matches!(self.phase, Phase::Up | Phase::Unknown) {
                    self.enter(Phase::Ending, now, None);
                }
            }
            "activating" if self.job.is_some() || self.phase == Phase::Failed => {}
            "activating" => self.on_activating(now, out),
            // maintenance and what later systemds add: no word of life or death.
            _ => {}
        }
    }

    fn on_active(&mut self, now: BootNs, out: &mut Vec<Output>) {
        if self.view.job == 0 {
            self.stopping = None;
        }
        if let Some(outage) = &self.outage {
            if self.view.active_enter != outage.run {
                // It is up in a new run: whatever our job still has to say is of no interest any more, and
                // the new run may die before it is said.
                self.job = None;
            }
            if self.view.active_enter == outage.run && !outage.by_health {
                // systemd has yet to notice the death.
                if self.phase == Phase::Unknown {
                    self.enter(Phase::Ending, now, Some(self.policy.heal.systemd_grace));
                }
            } else if !outage.announced {
                // It ended and was started again before systemd said a word: a restart by hand.
                self.outage = None;
                self.enter_up(now);
            } else if !outage.by_health {
                self.healed(now, out);
            } else if self.phase == Phase::Unknown
                || self.view.active_enter != outage.run && self.phase != Phase::Up
            {
                // A new run, or one of which it is not known what has become meanwhile: it is asked.
                self.health_failures = 0;
                self.enter_up(now);
            }
            return;
        }
        let main_pid = self.view.main_pid;
        match self.phase {
            Phase::Up => {}
            Phase::Failed => {
                self.attempts.clear();
                self.in_a_row = 0;
                self.enter_up(now);
                out.push(Output::Note(Kind::Released { by: "started by hand".into() }));
                out.push(Output::Save);
            }
            _ => {
                self.health_failures = 0;
                self.note_unseen(out);
                self.enter_up(now);
                if std::mem::take(&mut self.left) {
                    out.push(Output::Note(Kind::Started { main_pid }));
                    out.push(Output::Save);
                }
            }
        }
    }

    fn on_activating(&mut self, now: BootNs, out: &mut Vec<Output>) {
        let heal = &self.policy.heal;
        if self.view.sub_state.starts_with("auto-restart") {
            let patience = Duration::from_micros(self.view.restart_usec) + heal.systemd_grace;
            if self.outage.is_none() {
                let (cause, detail, clean) = self.cause();
                self.begin(cause, detail, now, clean);
            }
            let told = self.phase == Phase::Yielded;
            self.announce(out);
            self.enter(Phase::Yielded, now, Some(patience));
            if !told {
                self.note_left_to_systemd(now, out);
            }
        } else if self.phase != Phase::Yielded {
            self.note_unseen(out);
            // Somebody starts it. Without an outage there is nothing to be impatient about.
            let patience = self.outage.as_ref().map(|_| self.policy.heal.start_deadline);
            self.enter(Phase::Yielded, now, patience);
        }
    }

    fn on_down(&mut self, now: BootNs, out: &mut Vec<Output>) {
        // systemd 254 and newer passes through `failed-before-auto-restart` and its like.
        let passing = self.view.sub_state.ends_with("before-auto-restart");
        if passing || self.job.is_some() || matches!(self.phase, Phase::Failed | Phase::Left | Phase::Waiting)
        {
            return;
        }
        if self.view.job != 0 {
            self.note_unseen(out);
            if self.phase != Phase::Yielded {
                self.enter(Phase::Yielded, now, Some(self.policy.heal.start_deadline));
            }
            return;
        }
        let first_look = self.phase == Phase::Unknown && self.outage.is_none();
        if first_look && self.left {
            self.enter(Phase::Left, now, None);
            return;
        }
        let (cause, detail, clean) = self.cause();
        let stopped = self.stopping.take() == Some(self.view.inactive_exit);
        if stopped || first_look && cause == Cause::Exited {
            let why = if stopped { "somebody stopped it" } else { "it was not running when ftd looked" };
            if self.policy.on_stop == OnStop::Respect {
                self.leave(&format!("{why}, and on_stop = \"respect\""), now, out);
                return;
            }
            if self.outage.as_ref().is_none_or(|outage| !outage.announced) {
                self.begin(Cause::Stopped, why.into(), now, true);
            }
        } else if self.outage.is_none() {
            self.begin(cause, detail, now, clean);
        } else if let Some(outage) = &mut self.outage
            && !outage.announced
            && outage.cause == Cause::Unknown
        {
            // Seen to be gone, and no more: systemd knows how it ended.
            (outage.cause, outage.detail, outage.clean) = (cause, detail, clean);
        }
        let exited = self.outage.as_ref().is_some_and(|o| o.cause == Cause::Exited && !o.announced);
        if exited && self.policy.on_exit == OnStop::Respect {
            self.leave("it ended without an error, and on_exit = \"respect\"", now, out);
            return;
        }
        self.announce(out);
        if let Some(outage) = &mut self.outage {
            // At rest: systemd does not restart it, or has given up.
            outage.impatient = true;
        }
        self.decide(now, out);
    }

    fn on_job(&mut self, job: JobId, outcome: JobOutcome, now: BootNs, out: &mut Vec<Output>) {
        if self.job != Some(job) {
            return;
        }
        self.job = None;
        let Some(outage) = &self.outage else { return };
        let error = match outcome {
            JobOutcome::Ended(result) if result == "done" => {
                let nothing_began = self.view.active_enter == outage.run && !outage.by_health;
                if nothing_began && !outage.asked_again {
                    // It reached systemd before systemd had noticed the death, and did nothing.
                    self.ask_again(now, out);
                    return;
                }
                if self.view.is_active() && !nothing_began {
                    return;
                }
                if !self.view.is_down() && !nothing_began {
                    self.enter(Phase::Ending, now, None);
                    return;
                }
                if nothing_began {
                    "systemd says done and has started nothing: does a Condition of the unit not hold?".into()
                } else {
                    format!("it started and ended at once ({})", self.view.result)
                }
            }
            JobOutcome::StopPending => {
                self.take_back_attempt();
                self.give_way(now, out);
                return;
            }
            JobOutcome::Unreachable => {
                self.take_back_attempt();
                self.out_of_reach(now);
                return;
            }
            JobOutcome::Ended(result) if result == "canceled" => {
                self.give_way(now, out);
                return;
            }
            JobOutcome::Ended(result) => format!("systemd's job ended with {result} ({})", self.view.result),
            JobOutcome::Refused(error) => error,
            JobOutcome::TooLate => {
                let limit = humantime::format_duration(self.policy.heal.start_deadline);
                format!("it is not up after start_deadline = \"{limit}\"")
            }
        };
        out.push(Output::Note(Kind::HealFailed { attempt: self.in_a_row, error }));
        self.decide(now, out);
    }

    /// The attempt that did nothing does not count; the next is made when systemd has noticed the death.
    fn ask_again(&mut self, now: BootNs, out: &mut Vec<Output>) {
        self.take_back_attempt();
        if let Some(outage) = &mut self.outage {
            outage.asked_again = true;
        }
        self.enter(Phase::Ending, now, Some(self.policy.heal.systemd_grace));
        if self.view.is_down() {
            self.on_down(now, out);
        }
    }

    /// systemd cannot be asked. Its first word when it can again decides how to go on.
    fn out_of_reach(&mut self, now: BootNs) {
        self.reachable = false;
        self.end_row_if_settled(now);
        if self.phase == Phase::Up {
            self.lost_sight = self.run;
        }
        if !matches!(self.phase, Phase::Failed | Phase::Left) {
            self.enter(Phase::Unknown, now, None);
        }
    }

    /// Somebody stops it. That may be over by now, and systemd's word on it have come first.
    fn give_way(&mut self, now: BootNs, out: &mut Vec<Output>) {
        self.stopping = Some(self.view.inactive_exit);
        self.enter(Phase::Ending, now, None);
        if self.view.is_down() {
            self.on_down(now, out);
        }
    }

    fn on_health(&mut self, verdict: Result<(), String>, now: BootNs, out: &mut Vec<Output>) {
        let Some((check, limit, grace)) = self.policy.health.clone() else { return };
        if self.phase != Phase::Up {
            return;
        }
        let error = match verdict {
            Ok(()) => {
                if self.health_failures >= limit {
                    out.push(Output::Note(Kind::HealthBack { check }));
                }
                self.health_failures = 0;
                if !std::mem::replace(&mut self.proven, true) {
                    out.push(Output::Save);
                }
                if self.outage.as_ref().is_some_and(|o| o.by_health) {
                    self.healed(now, out);
                }
                return;
            }
            Err(error) => error,
        };
        if now.since(self.phase_since) < grace {
            return;
        }
        self.health_failures += 1;
        if self.health_failures != limit {
            return;
        }
        let (failures, proven) = (self.health_failures, self.proven);
        let failed = Kind::HealthFailed { check: check.clone(), error: error.clone(), failures, proven };
        if !proven {
            out.push(Output::Note(failed));
            return;
        }
        if self.outage.is_some() {
            let error = format!("it runs again, but {check}: {error}");
            out.push(Output::Note(Kind::HealFailed { attempt: self.in_a_row, error }));
        } else {
            self.end_row_if_settled(now);
            let detail = format!("it runs and does not answer: {check}: {error} ({failures} times)");
            self.begin(Cause::Hung, detail, now, false);
            self.announce(out);
            out.push(Output::Note(failed));
        }
        if let Some(outage) = &mut self.outage {
            outage.by_health = true;
            outage.run = self.view.active_enter;
        }
        self.decide(now, out);
    }

    fn on_tick(&mut self, now: BootNs, out: &mut Vec<Output>) {
        self.unpark(|at, _| at.after(OOM_WORD) <= now, now, out);
        if self.hold_ends.is_some_and(|end| now >= end) {
            self.release("time", now, out);
        }
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        let Some(outage) = &mut self.outage else { return };
        match self.phase {
            Phase::Waiting if self.held.is_none() => self.attempt(now, out),
            Phase::Yielded => {
                outage.impatient = true;
                self.announce(out);
                self.decide(now, out);
            }
            Phase::Ending => {
                // Dead for the kernel, alive for systemd: only a restart gets out of that.
                outage.unnoticed = self.view.is_active();
                outage.impatient = true;
                self.announce(out);
                self.decide(now, out);
            }
            _ => {}
        }
    }

    // ---- decisions

    /// An outage is under way: what now?
    fn decide(&mut self, now: BootNs, out: &mut Vec<Output>) {
        let held = self.held.is_some();
        let Some(outage) = &mut self.outage else { return };
        let after_us = now.since(outage.began).as_micros().try_into().unwrap_or(u64::MAX);
        let decided = |action, why: String, attempt, delay: Duration| {
            let delay_ms = delay.as_millis().try_into().unwrap_or(u64::MAX);
            Output::Note(Kind::Decided { action, why, attempt, delay_ms, after_us })
        };
        if held {
            if !std::mem::replace(&mut outage.told_held, true) {
                out.push(decided(Decision::Held, "it is held".into(), 0, Duration::ZERO));
            }
            self.enter(Phase::Ending, now, None);
            return;
        }
        if !self.reachable {
            self.enter(Phase::Unknown, now, None);
            return;
        }
        if !outage.impatient && !outage.by_health && restarts_itself(&self.view.restart, outage) {
            let patience = Duration::from_micros(self.view.restart_usec) + self.policy.heal.systemd_grace;
            self.enter(Phase::Yielded, now, Some(patience));
            self.note_left_to_systemd(now, out);
            return;
        }
        let heal = &self.policy.heal;
        while self.attempts.front().is_some_and(|at| now.since(*at) >= heal.within) {
            self.attempts.pop_front();
        }
        if self.attempts.len() >= heal.restarts as usize {
            let (attempts, within) = (self.attempts.len() as u32, heal.within);
            let why = format!("{attempts} attempts within {}", humantime::format_duration(within));
            out.push(decided(Decision::Fail, why, self.in_a_row, Duration::ZERO));
            self.outage = None;
            self.enter(Phase::Failed, now, None);
            out.push(Output::Note(Kind::Failed {
                attempts,
                within_ms: within.as_millis().try_into().unwrap_or(u64::MAX),
                mend: "find the reason (journalctl -u UNIT), mend it, then: ftctl release UNIT".into(),
            }));
            out.push(Output::Close);
            out.push(Output::Save);
            return;
        }
        let action = if outage.by_health || outage.unnoticed { Decision::Restart } else { Decision::Start };
        let delay = backoff(heal, self.in_a_row);
        self.in_a_row = self.in_a_row.saturating_add(1);
        let attempt = self.in_a_row;
        let told = std::mem::replace(&mut outage.told_attempt, attempt) == attempt;
        let why = if delay.is_zero() {
            "first attempt: at once".to_owned()
        } else {
            format!("back-off before attempt {attempt} in a row")
        };
        if delay.is_zero() {
            self.attempt(now, out);
        } else {
            self.enter(Phase::Waiting, now, Some(delay));
        }
        if !told {
            out.push(decided(action, why, attempt, delay));
        }
    }

    fn attempt(&mut self, now: BootNs, out: &mut Vec<Output>) {
        let Some(outage) = &mut self.outage else { return };
        if self.job.is_some() {
            return;
        }
        outage.acted = true;
        let restart = (outage.by_health || outage.unnoticed) && self.view.is_active();
        self.last_job.0 += 1;
        let job = self.last_job;
        out.push(if restart { Output::Restart(job) } else { Output::Start(job) });
        self.attempts.push_back(now);
        self.job = Some(job);
        self.enter(Phase::Working, now, None);
        out.push(Output::Save);
    }

    /// Called before it is up no more: if it was for long enough, the next attempt is the first in a row.
    fn end_row_if_settled(&mut self, now: BootNs) {
        // One that runs and still does not answer is up, and not healed.
        let up = self.phase == Phase::Up && self.outage.is_none();
        if up && now.since(self.phase_since) >= self.policy.heal.settle {
            self.in_a_row = 0;
        }
    }

    fn take_back_attempt(&mut self) {
        self.attempts.pop_back();
        self.in_a_row = self.in_a_row.saturating_sub(1);
    }

    fn release(&mut self, by: &str, now: BootNs, out: &mut Vec<Output>) {
        let failed = self.phase == Phase::Failed;
        let held = self.held.take().is_some();
        self.hold_ends = None;
        if failed {
            self.attempts.clear();
            self.in_a_row = 0;
            self.enter(Phase::Unknown, now, None);
        }
        if failed || held {
            out.push(Output::Note(Kind::Released { by: by.into() }));
            out.push(Output::Save);
        }
        if !self.view.is_loaded() || !self.view.is_down() || self.job.is_some() || self.view.job != 0 {
            return;
        }
        if failed && self.outage.is_none() {
            let (cause, detail, clean) = self.cause();
            self.begin(cause, detail, now, clean);
        }
        if self.outage.is_some() {
            self.announce(out);
            if let Some(outage) = &mut self.outage {
                outage.impatient = true;
            }
            self.decide(now, out);
        }
    }

    // ---- small steps

    /// What the end that systemd reports means: cause, text, and whether it counts as success. Where the kernel
    /// has told of the same death, it knows more.
    fn cause(&self) -> (Cause, String, bool) {
        let word = cause_of(&self.view);
        let main = self.view.exec_main_pid;
        let told = self.deaths.iter().rev().find(|death| main != 0 && death.pid == main);
        let told = told.filter(|death| death.cause != Cause::Unknown);
        match told {
            Some(death)
                if matches!(word.0, Cause::Killed | Cause::Crashed | Cause::ExitCode | Cause::Exited) =>
            {
                (death.cause, death.detail.clone(), death.clean)
            }
            _ => word,
        }
    }

    fn begin(&mut self, cause: Cause, detail: String, began: BootNs, clean: bool) {
        self.lost_sight = None;
        self.outage = Some(Outage {
            cause,
            detail,
            began,
            clean,
            run: self.view.active_enter,
            n_restarts: self.view.n_restarts,
            announced: false,
            by_health: false,
            unnoticed: false,
            impatient: false,
            acted: false,
            asked_again: false,
            told_held: false,
            told_attempt: 0,
        });
    }

    /// Tells, once, that it was started in another run than the one that it was last seen in, if nothing else tells.
    fn note_unseen(&mut self, out: &mut Vec<Output>) {
        let Some(run) = self.lost_sight.take() else { return };
        let UnitView { inactive_exit, n_restarts, main_pid, .. } = self.view;
        if self.outage.is_none() && (inactive_exit != run.inactive_exit || self.view.is_down()) {
            let by = if n_restarts > run.n_restarts { Healer::Systemd } else { Healer::Other };
            out.push(Output::Note(Kind::RestartedUnseen { by, main_pid }));
        }
    }

    fn announce(&mut self, out: &mut Vec<Output>) {
        if let Some(outage) = &mut self.outage
            && !std::mem::replace(&mut outage.announced, true)
        {
            out.push(Output::Open(Kind::Down { cause: outage.cause, detail: outage.detail.clone() }));
        }
    }

    fn note_left_to_systemd(&self, now: BootNs, out: &mut Vec<Output>) {
        let began = self.outage.as_ref().map_or(now, |o| o.began);
        out.push(Output::Note(Kind::Decided {
            action: Decision::LeaveToSystemd,
            why: format!("the unit has Restart={}", self.view.restart),
            attempt: 0,
            delay_ms: self.view.restart_usec / 1000,
            after_us: now.since(began).as_micros().try_into().unwrap_or(u64::MAX),
        }));
    }

    fn healed(&mut self, now: BootNs, out: &mut Vec<Output>) {
        let Some(outage) = self.outage.take() else { return };
        let by = if outage.acted {
            Healer::Ftd
        } else if self.view.n_restarts > outage.n_restarts {
            Healer::Systemd
        } else {
            Healer::Other
        };
        self.health_failures = 0;
        self.enter_up(now);
        out.push(Output::Note(Kind::Healed {
            by,
            took_ms: now.since(outage.began).as_millis().try_into().unwrap_or(u64::MAX),
            main_pid: self.view.main_pid,
        }));
        out.push(Output::Close);
    }

    fn leave(&mut self, why: &str, now: BootNs, out: &mut Vec<Output>) {
        let announced = self.outage.take().is_some_and(|o| o.announced);
        self.stopping = None;
        self.lost_sight = None;
        self.left = true;
        self.enter(Phase::Left, now, None);
        out.push(Output::Note(Kind::Left { why: why.into() }));
        if announced {
            out.push(Output::Close);
        }
        out.push(Output::Save);
    }

    /// It is up: from now on; or, where nobody looked when that began, since systemd says.
    fn enter_up(&mut self, now: BootNs) {
        let UnitView { active_enter, inactive_exit, n_restarts, .. } = self.view;
        let late = self.phase == Phase::Unknown;
        self.enter(Phase::Up, now, None);
        if late && active_enter != 0 {
            let since = BootNs(active_enter.saturating_mul(1000)).after(self.suspended);
            self.phase_since = since.min(now);
        }
        self.run = Some(Run { inactive_exit, n_restarts });
    }

    fn enter(&mut self, phase: Phase, now: BootNs, limit: Option<Duration>) {
        if self.phase != phase {
            self.phase = phase;
            self.phase_since = now;
        }
        self.deadline = limit.map(|limit| now.after(limit));
    }
}

/// The wait before the next attempt, when `in_a_row` were made before it: none, then `backoff`
/// doubling up to `backoff_max`.
fn backoff(heal: &Heal, in_a_row: u32) -> Duration {
    match in_a_row {
        0 => Duration::ZERO,
        n => heal.backoff.saturating_mul(1 << (n - 1).min(30)).min(heal.backoff_max),
    }
}

/// Whether systemd restarts the unit by itself after this end: the table in systemd.service(5), Restart=.
fn restarts_itself(restart: &str, outage: &Outage) -> bool {
    let signal = matches!(outage.cause, Cause::Killed | Cause::Crashed | Cause::OomKilled) && !outage.clean;
    match restart {
        "always" => true,
        "on-success" => outage.clean,
        "on-failure" => !outage.clean,
        "on-abnormal" => signal || outage.cause == Cause::Watchdog,
        "on-abort" => signal,
        "on-watchdog" => outage.cause == Cause::Watchdog,
        _ => false,
    }
}

/// Whether a signal came from the kernel itself; so the probe names it.
fn is_kernel(sender: &Process) -> bool {
    sender.pid == 0 && sender.comm == "kernel"
}

fn remember<T>(ring: &mut VecDeque<T>, item: T, size: usize) {
    if ring.len() == size {
        ring.pop_front();
    }
    ring.push_back(item);
}

/// What a death means, from the kernel's report.
fn describe(exit: &Exit, sender: Option<&Process>, oom: bool) -> (Cause, String) {
    let Process { pid, comm, .. } = &exit.process;
    let who = format!("main process {comm} (pid {pid})");
    let by = match sender {
        Some(s) if is_kernel(s) => " from the kernel".to_owned(),
        Some(s) if s.pid == *pid => " of its own".to_owned(),
        Some(s) if s.pid == 0 => format!(" from {} (outside this PID namespace)", s.comm),
        Some(s) => format!(" from {} (pid {}, uid {})", s.comm, s.pid, s.uid),
        None => String::new(),
    };
    let foreign = sender.is_some_and(|s| s.pid != *pid && s.comm != "kernel");
    match exit.status {
        _ if oom => (Cause::OomKilled, format!("{who} was killed by the OOM killer")),
        Some(status @ ExitStatus::Signal { signal, .. }) if CRASH.contains(&signal) && !foreign => {
            (Cause::Crashed, format!("{who} crashed with {status}{by}"))
        }
        Some(status @ ExitStatus::Signal { .. }) => {
            (Cause::Killed, format!("{who} was killed by {status}{by}"))
        }
        Some(ExitStatus::Code(0)) if foreign => {
            (Cause::Killed, format!("{who} ended, told so by a signal{by}"))
        }
        Some(ExitStatus::Code(0)) => (Cause::Exited, format!("{who} ended without an error")),
        Some(status) => (Cause::ExitCode, format!("{who} ended with {status}")),
        None => (Cause::Unknown, format!("{who} is gone")),
    }
}

/// What an end means, from systemd's word alone: cause, text, and whether it counts as success.
fn cause_of(view: &UnitView) -> (Cause, String, bool) {
    let status = view.exec_main_status;
    let signal = || ExitStatus::Signal { signal: status, core: view.exec_main_code == libc::CLD_DUMPED };
    match view.result.as_str() {
        "success" => (Cause::Exited, "it ended without an error".into(), true),
        "exit-code" => (Cause::ExitCode, format!("it ended with exit code {status}"), false),
        "signal" | "core-dump" if CRASH.contains(&status) => {
            (Cause::Crashed, format!("it crashed with {}", signal()), false)
        }
        "signal" | "core-dump" => (Cause::Killed, format!("it was killed by {}", signal()), false),
        "oom-kill" => (Cause::OomKilled, "the OOM killer took it".into(), false),
        "watchdog" => (Cause::Watchdog, "systemd's watchdog for it ran out".into(), false),
        "timeout" => (Cause::Watchdog, "a time limit of its unit ran out".into(), false),
        other @ ("start-limit-hit" | "resources" | "protocol" | "exec-condition") => {
            (Cause::StartFailed, format!("systemd says {other}"), false)
        }
        "" => (Cause::Unknown, format!("systemd says {}", view.active_state), false),
        other => (Cause::Unknown, format!("systemd says {other}"), false),
    }
}

fn load_problem(view: &UnitView) -> Kind {
    let (problem, mend) = match view.load_state.as_str() {
        "not-found" => (
            "systemd knows no such unit".to_owned(),
            "check the name (systemctl list-unit-files), or install the service; ftd takes it up as soon as it is there",
        ),
        "masked" => ("the unit is masked: systemd refuses to start it".to_owned(), "systemctl unmask UNIT"),
        state => (
            format!("systemd could not load it ({state}): {}", view.load_error),
            "mend the unit file (systemd-analyze verify UNIT), then: systemctl daemon-reload",
        ),
    };
    Kind::UnitProblem { problem, mend: mend.into() }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
