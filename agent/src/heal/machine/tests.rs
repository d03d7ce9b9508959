//! The rules of healing, one by one, and what holds under any sequence of inputs.

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;
const S: u64 = 1_000 * MS;
const CHECK: &str = "tcp://127.0.0.1:80";

/// A machine with a clock of its own, and a unit that starts, dies and is started as systemd has it.
struct Rig {
    machine: Machine,
    now: u64,
    view: UnitView,
}

pub(super) fn clocks(boot: u64) -> Clocks {
    Clocks { boot: BootNs(boot), suspended: Duration::ZERO, wall: jiff::Timestamp::UNIX_EPOCH }
}

fn policy(on_stop: OnStop) -> Policy {
    let health = Some((CHECK.to_owned(), 3, Duration::from_secs(5)));
    Policy { heal: Heal::default(), on_stop, on_exit: OnStop::Restart, health }
}

fn up(main_pid: u32, active_enter: u64) -> UnitView {
    UnitView {
        load_state: "loaded".into(),
        active_state: "active".into(),
        sub_state: "running".into(),
        result: "success".into(),
        main_pid,
        control_group: "/system.slice/web.service".into(),
        active_enter,
        inactive_exit: active_enter,
        restart: "no".into(),
        restart_usec: 100_000,
        memory_max: u64::MAX,
        ..UnitView::default()
    }
}

impl Rig {
    fn new() -> Self {
        Self::with(policy(OnStop::Respect), Saved::default())
    }

    /// A machine whose unit has been up for a minute.
    fn with(policy: Policy, saved: Saved) -> Self {
        let machine = Machine::new(policy, saved, clocks(S));
        let mut rig = Self { machine, now: S, view: up(100, 1) };
        rig.say(|_| {});
        assert_eq!(rig.machine.phase(), Phase::Up);
        rig.now += 60 * S;
        rig
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        let now = BootNs(self.now);
        self.machine.step(now, now, input)
    }

    /// systemd says what has changed.
    fn say(&mut self, change: impl FnOnce(&mut UnitView)) -> Vec<Output> {
        change(&mut self.view);
        self.step(Input::View(self.view.clone()))
    }

    fn state(&mut self, active: &str, sub: &str, result: &str) -> Vec<Output> {
        let main_pid = if active == "active" { self.view.main_pid } else { 0 };
        self.say(|view| {
            (view.active_state, view.sub_state, view.result) = (active.into(), sub.into(), result.into());
            view.main_pid = main_pid;
        })
    }

    fn exit(&mut self, pid: u32, status: ExitStatus) -> Vec<Output> {
        let process = Process { pid, comm: "web".into(), uid: 0 };
        self.step(Input::Exit(Exit { process, ppid: 1, status: Some(status), run_ns: 0, max_rss: 0 }))
    }

    fn killed(&mut self) -> Vec<Output> {
        let pid = self.view.main_pid;
        self.exit(pid, KILLED)
    }

    /// systemd brings up a new run.
    fn started(&mut self) -> Vec<Output> {
        let (pid, run) = (self.view.main_pid.max(100) + 1, self.view.active_enter + 1);
        self.view =
            UnitView { n_restarts: self.view.n_restarts, restart: self.view.restart.clone(), ..up(pid, run) };
        self.say(|_| {})
    }

    fn done(&mut self, result: &str) -> Vec<Output> {
        self.step(Input::JobDone(self.machine.last_job, JobOutcome::Ended(result.into())))
    }

    fn tick_at_wake(&mut self) -> Vec<Output> {
        self.now = self.machine.wake().expect("something is waited for").0;
        self.step(Input::Tick)
    }

    /// Dies, is started by ftd, is up again.
    fn heal_once(&mut self) {
        let outputs = self.killed();
        if starts(&outputs) == 0 {
            assert_eq!(self.machine.phase(), Phase::Waiting, "{outputs:?}");
            assert_eq!(starts(&self.tick_at_wake()), 1);
        }
        self.state("failed", "failed", "signal");
        self.started();
        self.done("done");
        assert_eq!(self.machine.phase(), Phase::Up);
    }
}

const KILLED: ExitStatus = ExitStatus::Signal { signal: libc::SIGKILL, core: false };

fn cause(outputs: &[Output]) -> Option<Cause> {
    outputs.iter().find_map(|output| match output {
        Output::Open(Kind::Down { cause, .. }) => Some(*cause),
        _ => None,
    })
}

fn decision(outputs: &[Output]) -> Option<Decision> {
    outputs.iter().find_map(|output| match output {
        Output::Note(Kind::Decided { action, .. }) => Some(*action),
        _ => None,
    })
}

fn healer(outputs: &[Output]) -> Option<Healer> {
    outputs.iter().find_map(|output| match output {
        Output::Note(Kind::Healed { by, .. }) => Some(*by),
        _ => None,
    })
}

fn starts(outputs: &[Output]) -> usize {
    outputs.iter().filter(|output| matches!(output, Output::Start(_) | Output::Restart(_))).count()
}

fn restarts(outputs: &[Output]) -> bool {
    outputs.iter().any(|output| matches!(output, Output::Restart(_)))
}

#[test]
fn a_killed_service_is_started_on_the_kernels_word_alone() {
    let mut rig = Rig::new();
    let outputs = rig.killed();
    assert_eq!((cause(&outputs), decision(&outputs)), (Some(Cause::Killed), Some(Decision::Start)));
    assert_eq!(starts(&outputs), 1);
    // systemd's own words come later, and change nothing.
    assert_eq!(starts(&rig.state("deactivating", "stop-sigterm", "signal")), 0);
    assert_eq!(starts(&rig.state("failed", "failed", "signal")), 0);
    assert_eq!(healer(&rig.started()), Some(Healer::Ftd));
    assert_eq!(rig.done("done"), []);
    assert_eq!(rig.machine.phase(), Phase::Up);
}

#[test]
fn without_the_kernels_word_systemds_is_enough() {
    let mut rig = Rig::new();
    rig.view.exec_main_status = libc::SIGSEGV;
    let outputs = rig.state("failed", "failed", "core-dump");
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::Crashed), 1));
}

#[test]
fn a_start_that_systemd_answers_before_it_noticed_the_death_is_asked_again() {
    let mut rig = Rig::new();
    assert_eq!(starts(&rig.killed()), 1);
    assert_eq!(starts(&rig.done("done")), 0, "the old run is still the one that systemd shows");
    assert_eq!(rig.machine.attempts(), 0, "it was no attempt");
    let outputs = rig.state("failed", "failed", "signal");
    assert_eq!((starts(&outputs), decision(&outputs)), (1, None), "the decision is told already");
}

#[test]
fn such_an_answer_may_also_come_after_systemds_word() {
    let mut rig = Rig::new();
    assert_eq!(starts(&rig.killed()), 1);
    rig.state("failed", "failed", "signal");
    let outputs = rig.done("done");
    assert_eq!((starts(&outputs), rig.machine.attempts()), (1, 1), "{outputs:?}");
}

#[test]
fn a_death_before_the_end_of_the_job_that_healed_the_last_one_is_healed_too() {
    for exit_seen in [true, false] {
        let mut rig = Rig::new();
        rig.killed();
        rig.state("failed", "failed", "signal");
        let job = rig.machine.last_job;
        assert_eq!(healer(&rig.started()), Some(Healer::Ftd));
        // Of the job nothing is known yet, and the service is dead again.
        if exit_seen {
            assert_eq!(cause(&rig.killed()), Some(Cause::Killed));
        }
        rig.state("failed", "failed", "signal");
        assert_eq!(rig.step(Input::JobDone(job, JobOutcome::Ended("done".into()))), []);
        assert_eq!(starts(&rig.tick_at_wake()), 1);
        assert_eq!(healer(&rig.started()), Some(Healer::Ftd));
    }
}

#[test]
fn a_start_that_never_starts_anything_is_not_asked_for_ever() {
    let mut rig = Rig::new();
    rig.killed();
    rig.state("failed", "failed", "signal");
    let mut asked = 1;
    while rig.machine.phase() != Phase::Failed {
        let outputs = rig.done("done");
        asked += starts(&outputs);
        if rig.machine.phase() == Phase::Waiting {
            asked += starts(&rig.tick_at_wake());
        }
        assert!(asked <= 6, "five attempts that count, and one that does not");
    }
}

#[test]
fn a_death_that_systemd_never_notices_ends_in_a_restart() {
    let mut rig = Rig::new();
    rig.killed();
    rig.done("done");
    let outputs = rig.tick_at_wake();
    assert!(restarts(&outputs), "{outputs:?}");
}

#[test]
fn the_sender_of_the_signal_is_named() {
    let mut rig = Rig::new();
    let sender = Process { pid: 77, comm: "bash".into(), uid: 1000 };
    rig.step(Input::Signal { target: 100, signal: libc::SIGKILL, sender: sender.clone() });
    let outputs = rig.killed();
    assert!(
        outputs
            .iter()
            .any(|o| matches!(o, Output::Note(Kind::ProcessDied { sender: Some(s), .. }) if *s == sender))
    );
    assert!(
        matches!(&outputs[0], Output::Open(Kind::Down { detail, .. }) if detail.ends_with("SIGKILL from bash (pid 77, uid 1000)")),
        "{outputs:?}"
    );
}

#[test]
fn a_signal_that_a_process_passes_on_to_itself_is_its_first_senders() {
    let mut rig = Rig::new();
    let (shell, own) =
        (Process { pid: 77, comm: "sh".into(), uid: 0 }, Process { pid: 100, comm: "web".into(), uid: 0 });
    rig.step(Input::Signal { target: 100, signal: libc::SIGBUS, sender: shell });
    rig.now += 10 * MS;
    rig.step(Input::Signal { target: 100, signal: libc::SIGBUS, sender: own.clone() });
    let outputs = rig.exit(100, ExitStatus::Signal { signal: libc::SIGBUS, core: false });
    assert_eq!(cause(&outputs), Some(Cause::Killed), "{outputs:?}");
    // And one of its own making is its own.
    let mut rig = Rig::new();
    rig.step(Input::Signal { target: 100, signal: libc::SIGABRT, sender: own });
    let outputs = rig.exit(100, ExitStatus::Signal { signal: libc::SIGABRT, core: true });
    assert_eq!(cause(&outputs), Some(Cause::Crashed), "{outputs:?}");
}

#[test]
fn a_stop_by_hand_is_respected_or_undone_as_configured() {
    for (on_stop, wanted) in [(OnStop::Respect, 0), (OnStop::Restart, 1)] {
        let mut rig = Rig::with(policy(on_stop), Saved::default());
        rig.view.job = 9;
        assert_eq!(rig.state("deactivating", "stop-sigterm", "success"), []);
        assert_eq!(starts(&rig.exit(100, ExitStatus::Code(0))), 0);
        rig.view.job = 0;
        let outputs = rig.state("inactive", "dead", "success");
        assert_eq!(starts(&outputs), wanted, "{outputs:?}");
        let left = rig.machine.phase() == Phase::Left;
        assert_eq!(left, on_stop == OnStop::Respect);
    }
}

#[test]
fn a_start_by_hand_after_a_stop_by_hand_is_told() {
    let mut rig = Rig::new();
    rig.view.job = 9;
    rig.state("deactivating", "stop-sigterm", "success");
    rig.view.job = 0;
    rig.state("inactive", "dead", "success");
    assert!(rig.machine.saved().left);
    assert_eq!(rig.state("activating", "start", "success"), []);
    let outputs = rig.started();
    assert!(matches!(outputs[..], [Output::Note(Kind::Started { .. }), Output::Save]), "{outputs:?}");
    assert!(!rig.machine.saved().left);
}

#[test]
fn a_stop_whose_exit_is_seen_first_is_still_a_stop() {
    let mut rig = Rig::new();
    assert_eq!(starts(&rig.exit(100, ExitStatus::Code(0))), 0);
    rig.view.job = 9;
    rig.state("deactivating", "stop-sigterm", "success");
    rig.view.job = 0;
    let outputs = rig.state("inactive", "dead", "success");
    assert!(matches!(outputs[..], [Output::Note(Kind::Left { .. }), Output::Save]), "{outputs:?}");
}

#[test]
fn who_ends_while_it_reloads_was_not_stopped() {
    let mut rig = Rig::new();
    rig.say(|view| (view.active_state, view.job) = ("reloading".into(), 7));
    rig.exit(100, ExitStatus::Code(7));
    rig.state("deactivating", "stop-sigterm", "exit-code");
    rig.state("failed", "failed", "exit-code");
    let outputs = rig.say(|view| (view.job, view.exec_main_code, view.exec_main_status) = (0, 1, 7));
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::ExitCode), 1), "{outputs:?}");
    // A stop in the middle of a reload is one.
    let mut rig = Rig::new();
    rig.say(|view| (view.active_state, view.job) = ("reloading".into(), 7));
    rig.say(|view| (view.active_state, view.job) = ("deactivating".into(), 8));
    rig.state("inactive", "dead", "success");
    rig.say(|view| view.job = 0);
    assert_eq!(rig.machine.phase(), Phase::Left);
}

#[test]
fn a_start_that_had_failed_before_ftd_could_look_was_no_stop() {
    let failing = |rig: &mut Rig| {
        rig.view.job = 9;
        rig.state("deactivating", "stop-sigterm", "signal");
        rig.view.job = 0;
        starts(&rig.state("failed", "failed", "signal"))
    };
    let machine = Machine::new(policy(OnStop::Respect), Saved::default(), clocks(S));
    let mut rig = Rig { machine, now: S, view: up(1, 1) };
    assert_eq!(failing(&mut rig), 1, "ftd has just begun");
    let mut rig = Rig::new();
    rig.killed();
    rig.step(Input::BusLost);
    failing(&mut rig);
    assert_eq!(rig.machine.phase(), Phase::Waiting, "the next attempt is on its way");
    let mut rig = Rig::new();
    rig.killed();
    rig.step(Input::BusLost);
    rig.view.job = 9;
    rig.state("activating", "start", "success");
    failing(&mut rig);
    assert_eq!(rig.machine.phase(), Phase::Waiting, "the start was seen before it failed");
    // A stop that nobody saw begin is one, as long as the service ends as it should.
    let machine = Machine::new(policy(OnStop::Respect), Saved::default(), clocks(S));
    let mut rig = Rig { machine, now: S, view: UnitView { job: 9, ..up(1, 1) } };
    rig.state("deactivating", "stop-sigterm", "success");
    rig.view.job = 0;
    rig.state("failed", "failed", "exit-code");
    assert_eq!(rig.machine.phase(), Phase::Left);
}

#[test]
fn a_start_that_meets_a_stop_gives_way() {
    let mut rig = Rig::new();
    rig.exit(100, ExitStatus::Code(143));
    assert_eq!(rig.step(Input::JobDone(rig.machine.last_job, JobOutcome::StopPending)), []);
    let outputs = rig.state("inactive", "dead", "success");
    assert_eq!((starts(&outputs), rig.machine.phase()), (0, Phase::Left));
    assert!(outputs.contains(&Output::Close), "its operation is over: {outputs:?}");
}

#[test]
fn a_restart_by_hand_is_nobody_elses_business() {
    let mut rig = Rig::new();
    rig.view.job = 9;
    rig.state("deactivating", "stop-sigterm", "success");
    rig.exit(100, ExitStatus::Code(0));
    assert_eq!(rig.state("inactive", "dead", "success"), []);
    assert_eq!(rig.state("activating", "start", "success"), []);
    assert_eq!(rig.started(), [Output::Save], "it is a new run, and no more");
    assert_eq!(rig.machine.phase(), Phase::Up);
}

#[test]
fn an_exit_without_an_error_and_without_a_stop_is_healed() {
    let mut rig = Rig::new();
    assert_eq!(starts(&rig.exit(100, ExitStatus::Code(0))), 0, "it may be a stop: systemd has the next word");
    let outputs = rig.state("inactive", "dead", "success");
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::Exited), 1));
}

#[test]
fn an_exit_that_is_wanted_is_left() {
    let policy = Policy { on_exit: OnStop::Respect, ..policy(OnStop::Restart) };
    let mut rig = Rig::with(policy, Saved::default());
    rig.exit(100, ExitStatus::Code(0));
    assert_eq!(starts(&rig.state("inactive", "dead", "success")), 0);
    assert_eq!(rig.machine.phase(), Phase::Left);
}

#[test]
fn an_oom_kill_is_called_one() {
    let mut rig = Rig::new();
    rig.view.memory_max = 64 << 20;
    rig.say(|_| {});
    let process = Process { pid: 100, comm: "web".into(), uid: 0 };
    let outputs = rig.step(Input::Oom { process, rss: 60 << 20 });
    assert!(
        matches!(&outputs[..], [Output::Note(Kind::OomKill { limit: Some(limit), .. })] if *limit == 64 << 20)
    );
    let outputs = rig.killed();
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::OomKilled), 1));
}

/// The kernel kills the main process: the signal, then the end, without a word on why yet.
fn killed_by_the_kernel(rig: &mut Rig) -> Vec<Output> {
    let sender = Process { pid: 0, comm: "kernel".into(), uid: 0 };
    rig.step(Input::Signal { target: 100, signal: libc::SIGKILL, sender });
    rig.killed()
}

#[test]
fn a_victim_that_is_named_after_its_end_is_the_ooms_too() {
    let mut rig = Rig::new();
    assert_eq!(killed_by_the_kernel(&mut rig), []);
    let outputs = rig.step(Input::Oom { process: Process { pid: 100, ..Process::default() }, rss: 1 });
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::OomKilled), 1), "{outputs:?}");
    assert!(outputs.iter().any(|o| matches!(o, Output::Note(Kind::ProcessDied { oom: true, .. }))));
}

#[test]
fn the_kernel_may_kill_for_other_reasons_and_that_is_healed_no_later_than_systemd_says_so() {
    let mut rig = Rig::new();
    killed_by_the_kernel(&mut rig);
    assert_eq!(rig.machine.wake(), Some(BootNs(rig.now + 2 * MS)));
    let outputs = rig.tick_at_wake();
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::Killed), 1), "{outputs:?}");

    let mut rig = Rig::new();
    killed_by_the_kernel(&mut rig);
    let outputs = rig.state("failed", "failed", "signal");
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::Killed), 1), "{outputs:?}");
}

#[test]
fn what_systemd_reports_is_told_in_the_kernels_words_where_there_are_any() {
    let mut rig = Rig::new();
    // A reload is under way, so that the end may be its work: systemd's word is awaited.
    rig.say(|view| (view.active_state, view.job) = ("reloading".into(), 9));
    let sender = Process { pid: 7, comm: "bash".into(), uid: 0 };
    rig.step(Input::Signal { target: 100, signal: libc::SIGSEGV, sender });
    assert_eq!(cause(&rig.exit(100, ExitStatus::Signal { signal: libc::SIGSEGV, core: false })), None);
    let outputs = rig.say(|view| {
        (view.active_state, view.result) = ("failed".into(), "signal".into());
        (view.exec_main_pid, view.exec_main_status) = (100, libc::SIGSEGV);
        (view.main_pid, view.job) = (0, 0);
    });
    let detail = "main process web (pid 100) was killed by SIGSEGV from bash (pid 7, uid 0)";
    assert!(
        matches!(&outputs[0], Output::Open(Kind::Down { cause: Cause::Killed, detail: d }) if d == detail),
        "{outputs:?}"
    );
}

#[test]
fn no_attempt_is_spent_on_a_systemd_that_cannot_be_asked() {
    let mut rig = Rig::new();
    let outputs = rig.killed();
    assert_eq!(starts(&outputs), 1);
    let job = rig.machine.last_job;
    assert_eq!(rig.step(Input::JobDone(job, JobOutcome::Unreachable)), []);
    rig.step(Input::BusLost);
    assert_eq!((rig.machine.attempts(), rig.machine.wake()), (0, None));
    assert_eq!(starts(&rig.state("failed", "failed", "signal")), 1, "its first word when it is back");
}

#[test]
fn a_dead_worker_is_recorded_and_the_service_left_alone() {
    let mut rig = Rig::new();
    let outputs = rig.exit(101, KILLED);
    assert!(matches!(outputs[..], [Output::Note(Kind::ProcessDied { main: false, .. })]), "{outputs:?}");
    assert_eq!(rig.exit(102, ExitStatus::Code(0)), [], "orderly ends of others are not worth a word");
    assert_eq!(rig.machine.phase(), Phase::Up);
}

#[test]
fn a_unit_that_restarts_itself_is_left_to_systemd() {
    let mut rig = Rig::new();
    rig.view.restart = "on-failure".into();
    rig.say(|_| {});
    let outputs = rig.killed();
    assert_eq!((decision(&outputs), starts(&outputs)), (Some(Decision::LeaveToSystemd), 0));
    assert_eq!(starts(&rig.state("activating", "auto-restart", "signal")), 0);
    rig.view.n_restarts = 1;
    assert_eq!(healer(&rig.started()), Some(Healer::Systemd));
}

#[test]
fn ftd_steps_in_when_systemd_gives_up_or_takes_too_long() {
    let dies = |rig: &mut Rig| {
        rig.view.restart = "always".into();
        rig.say(|_| {});
        rig.killed();
        rig.state("activating", "auto-restart", "signal");
    };
    let mut gave_up = Rig::new();
    dies(&mut gave_up);
    assert_eq!(starts(&gave_up.state("failed", "failed", "start-limit-hit")), 1);
    let mut slow = Rig::new();
    dies(&mut slow);
    assert_eq!(starts(&slow.tick_at_wake()), 1);
}

#[test]
fn a_restart_that_only_systemd_reports_is_told_once() {
    let mut rig = Rig::new();
    rig.view.restart = "always".into();
    let outputs = rig.state("activating", "auto-restart", "exit-code");
    assert_eq!(
        (cause(&outputs), decision(&outputs)),
        (Some(Cause::ExitCode), Some(Decision::LeaveToSystemd))
    );
    assert_eq!(rig.say(|view| view.n_restarts = 1), []);
    assert_eq!(healer(&rig.started()), Some(Healer::Systemd));
}

#[test]
fn a_crash_loop_backs_off_and_ends_in_failed_until_a_person_acts() {
    let mut rig = Rig::new();
    let mut delays = Vec::new();
    let outputs = loop {
        let before = rig.now;
        let outputs = rig.killed();
        if rig.machine.phase() == Phase::Failed {
            break outputs;
        }
        if rig.machine.phase() == Phase::Waiting {
            rig.tick_at_wake();
        }
        delays.push((rig.now - before) / MS);
        rig.state("failed", "failed", "signal");
        rig.started();
        rig.done("done");
    };
    assert_eq!(delays, [0, 100, 200, 400, 800]);
    assert!(
        outputs.iter().any(|o| matches!(o, Output::Note(Kind::Failed { attempts: 5, .. }))),
        "{outputs:?}"
    );
    rig.state("failed", "failed", "signal");
    rig.now += 3600 * S;
    assert_eq!(starts(&rig.step(Input::Tick)), 0);
    assert_eq!(starts(&rig.step(Input::Release)), 1, "a person's release starts it again");
}

#[test]
fn a_start_by_hand_ends_failed_too() {
    let saved = Saved { failed: true, ..Saved::default() };
    let mut rig =
        Rig { machine: Machine::new(policy(OnStop::Respect), saved, clocks(S)), now: S, view: up(1, 1) };
    assert_eq!(rig.state("failed", "failed", "signal"), []);
    let outputs = rig.started();
    assert!(matches!(outputs[..], [Output::Note(Kind::Released { .. }), Output::Save]), "{outputs:?}");
    assert!(!rig.machine.saved().failed);
}

#[test]
fn a_service_that_has_settled_begins_its_back_off_anew() {
    let mut rig = Rig::new();
    rig.heal_once();
    rig.now += 11 * S;
    assert_eq!(starts(&rig.killed()), 1, "no back-off");
}

#[test]
fn however_it_goes_down_after_it_has_settled_the_back_off_begins_anew() {
    let down = |rig: &mut Rig, way: u8| {
        match way {
            0 => {
                rig.view.job = 9;
                rig.state("deactivating", "stop-sigterm", "success");
                rig.exit(rig.view.main_pid, ExitStatus::Code(0));
                rig.view.job = 0;
            }
            1 => drop(rig.state("deactivating", "final-sigterm", "signal")),
            _ => drop(rig.step(Input::BusLost)),
        }
        rig.state("failed", "failed", "signal")
    };
    for way in 0..3 {
        for (up, wanted) in [(11 * S, 1), (S, 0)] {
            let mut rig = Rig::with(policy(OnStop::Restart), Saved::default());
            rig.heal_once();
            rig.now += up;
            let outputs = down(&mut rig, way);
            assert_eq!(starts(&outputs), wanted, "way {way}, up for {up} ns: {outputs:?}");
        }
    }
}

#[test]
fn a_start_that_fails_is_tried_again_later() {
    let mut rig = Rig::new();
    rig.killed();
    rig.state("failed", "failed", "signal");
    let outputs = rig.done("failed");
    assert!(outputs.iter().any(|o| matches!(o, Output::Note(Kind::HealFailed { attempt: 1, .. }))));
    assert_eq!((starts(&outputs), rig.machine.phase()), (0, Phase::Waiting));
    assert_eq!(starts(&rig.tick_at_wake()), 1);
}

#[test]
fn a_hung_service_is_restarted_and_healed_when_it_answers() {
    let mut rig = Rig::new();
    rig.step(Input::Health(Ok(())));
    for _ in 0..2 {
        assert_eq!(rig.step(Input::Health(Err("no answer".into()))), []);
    }
    let outputs = rig.step(Input::Health(Err("no answer".into())));
    assert_eq!((cause(&outputs), decision(&outputs)), (Some(Cause::Hung), Some(Decision::Restart)));
    assert!(restarts(&outputs), "{outputs:?}");
    rig.state("deactivating", "stop-sigkill", "timeout");
    rig.exit(100, KILLED);
    assert_eq!(healer(&rig.started()), None, "running is not answering");
    rig.done("done");
    assert_eq!(healer(&rig.step(Input::Health(Ok(())))), Some(Healer::Ftd));
}

#[test]
fn a_hung_service_is_asked_again_after_systemd_was_out_of_reach() {
    for well in [true, false] {
        let mut rig = Rig::new();
        rig.step(Input::Health(Ok(())));
        for _ in 0..3 {
            rig.step(Input::Health(Err("no answer".into())));
        }
        rig.step(Input::BusLost);
        assert_eq!(rig.say(|_| {}), []);
        assert_eq!(rig.machine.phase(), Phase::Up, "only then is it asked");
        if well {
            assert_eq!(healer(&rig.step(Input::Health(Ok(())))), Some(Healer::Ftd));
        } else {
            rig.now += 10 * S;
            let outputs: Vec<_> = (0..3).flat_map(|_| rig.step(Input::Health(Err("no".into())))).collect();
            assert_eq!(decision(&outputs), Some(Decision::Restart), "{outputs:?}");
        }
    }
}

#[test]
fn a_check_that_never_succeeded_is_told_and_heals_nothing() {
    let mut rig = Rig::new();
    let outputs: Vec<_> = (0..10).flat_map(|_| rig.step(Input::Health(Err("refused".into())))).collect();
    assert!(
        matches!(outputs[..], [Output::Note(Kind::HealthFailed { proven: false, failures: 3, .. })]),
        "{outputs:?}"
    );
}

#[test]
fn failures_right_after_a_start_do_not_count() {
    let mut rig = Rig::new();
    rig.step(Input::Health(Ok(())));
    rig.heal_once();
    for _ in 0..5 {
        assert_eq!(rig.step(Input::Health(Err("refused".into()))), []);
    }
}

#[test]
fn a_held_unit_is_watched_and_not_touched_and_healed_after() {
    let mut rig = Rig::new();
    let until = Some((BootNs(rig.now + 10 * S), jiff::Timestamp::UNIX_EPOCH));
    rig.step(Input::Hold { until, reason: None });
    let outputs = rig.killed();
    assert_eq!((cause(&outputs), decision(&outputs)), (Some(Cause::Killed), Some(Decision::Held)));
    assert_eq!(starts(&rig.state("failed", "failed", "signal")), 0);
    let outputs = rig.tick_at_wake();
    assert!(matches!(&outputs[0], Output::Note(Kind::Released { by }) if by == "time"), "{outputs:?}");
    assert_eq!(starts(&outputs), 1);
}

#[test]
fn a_hold_outlives_ftd() {
    let mut rig = Rig::new();
    let wall = jiff::Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(100);
    rig.step(Input::Hold { until: Some((BootNs(rig.now + 100 * S), wall)), reason: Some("upgrade".into()) });
    let saved = rig.machine.saved();
    let mut next = Rig::with(policy(OnStop::Respect), saved);
    assert_eq!(starts(&next.killed()), 0);
    assert_eq!(next.machine.wake(), Some(BootNs(101 * S)), "the wall clock's end on the new boot clock");
}

#[test]
fn what_happened_while_ftd_was_away_is_taken_up() {
    let look = |on_stop, saved, active: &str, result: &str| {
        let machine = Machine::new(policy(on_stop), saved, clocks(S));
        let mut rig = Rig { machine, now: S, view: up(1, 1) };
        starts(&rig.state(active, "dead", result))
    };
    assert_eq!(look(OnStop::Respect, Saved::default(), "failed", "signal"), 1, "it died: heal");
    assert_eq!(look(OnStop::Restart, Saved::default(), "inactive", "success"), 1);
    assert_eq!(look(OnStop::Respect, Saved::default(), "inactive", "success"), 0, "it may have been stopped");
    assert_eq!(look(OnStop::Restart, Saved { left: true, ..Saved::default() }, "inactive", "success"), 0);
    assert_eq!(look(OnStop::Restart, Saved { failed: true, ..Saved::default() }, "failed", "signal"), 0);
}

#[test]
fn the_first_look_decides_unless_systemd_is_in_the_middle_of_an_end() {
    let look = |active: &str, sub: &str, job| {
        let machine = Machine::new(policy(OnStop::Respect), Saved::default(), clocks(S));
        let mut rig = Rig { machine, now: S, view: UnitView { job, ..up(1, 1) } };
        assert!(!rig.machine.is_decided(), "systemd has said nothing yet");
        rig.state(active, sub, "signal");
        rig
    };
    for (active, sub, job) in [
        ("active", "running", 0),
        ("failed", "failed", 0),
        ("inactive", "dead", 0),
        ("inactive", "dead", 7),
        ("activating", "start", 7),
        ("activating", "auto-restart", 0),
    ] {
        assert!(look(active, sub, job).machine.is_decided(), "{active} {sub} {job}");
    }
    let mut rig = look("deactivating", "stop-sigterm", 0);
    assert!(!rig.machine.is_decided());
    assert_eq!(starts(&rig.state("failed", "failed", "signal")), 1);
    assert!(rig.machine.is_decided());
    rig.step(Input::BusLost);
    assert!(!rig.machine.is_decided());
    rig.say(|view| view.load_state = "masked".into());
    assert!(rig.machine.is_decided(), "there is nothing to decide");
}

#[test]
fn an_end_of_which_nothing_is_known_is_undecided_until_systemd_says_what_it_was() {
    let mut rig = Rig::new();
    let process = Process { pid: 100, comm: "web".into(), uid: 0 };
    rig.step(Input::Exit(Exit { process, ppid: 1, status: None, run_ns: 0, max_rss: 0 }));
    assert!(!rig.machine.is_decided());
    let outputs = rig.say(|view| {
        (view.active_state, view.result, view.exec_main_pid) = ("failed".into(), "signal".into(), 100);
        view.exec_main_status = libc::SIGKILL;
    });
    assert_eq!((cause(&outputs), starts(&outputs)), (Some(Cause::Killed), 1), "{outputs:?}");
    assert!(rig.machine.is_decided());
}

#[test]
fn a_run_that_began_while_ftd_was_away_is_told() {
    let look = |saved: Saved, n_restarts| {
        let machine = Machine::new(policy(OnStop::Respect), saved, clocks(S));
        let mut rig = Rig { machine, now: S, view: UnitView { n_restarts, ..up(2, 20) } };
        let outputs = rig.say(|_| {});
        assert_eq!(rig.machine.saved().run, Some(Run { inactive_exit: 20, n_restarts }));
        outputs.into_iter().find_map(|output| match output {
            Output::Note(Kind::RestartedUnseen { by, main_pid: 2 }) => Some(by),
            _ => None,
        })
    };
    let saved = |inactive_exit| {
        let run = Some(Run { inactive_exit, n_restarts: 3 });
        Saved { run, ..Saved::default() }
    };
    assert_eq!(look(saved(20), 3), None, "the same run");
    assert_eq!(look(saved(10), 4), Some(Healer::Systemd));
    assert_eq!(look(saved(10), 0), Some(Healer::Other));
    assert_eq!(look(Saved::default(), 0), None, "never seen before");
    assert_eq!(look(Saved { left: true, ..saved(10) }, 0), None, "that is `started`");
    // It is told at once, and once, when it is seen on its way up.
    let machine = Machine::new(policy(OnStop::Respect), saved(10), clocks(S));
    let mut rig = Rig { machine, now: S, view: up(2, 20) };
    let unseen = |o: &Output| matches!(o, Output::Note(Kind::RestartedUnseen { by: Healer::Other, .. }));
    assert!(rig.state("activating", "start", "success").iter().any(unseen));
    assert!(!rig.state("active", "running", "success").iter().any(unseen));
    // What ftd has seen is told in other ways, or not worth telling.
    rig.state("deactivating", "stop-sigterm", "success");
    rig.view.job = 5;
    rig.state("inactive", "dead", "success");
    rig.view.job = 0;
    assert!(!rig.started().iter().any(unseen));
    rig.step(Input::BusLost);
    assert!(rig.started().iter().any(unseen));
}

#[test]
fn the_time_in_which_failures_do_not_count_begins_with_the_service_and_not_with_ftd() {
    let saved = Saved { proven: Some(CHECK.into()), ..Saved::default() };
    for (since, counts) in [(50 * S, true), (58 * S, false)] {
        let machine = Machine::new(policy(OnStop::Respect), saved.clone(), clocks(60 * S));
        let mut rig = Rig { machine, now: 60 * S, view: up(100, since / 1_000) };
        rig.say(|_| {});
        let outputs: Vec<_> = (0..3).flat_map(|_| rig.step(Input::Health(Err("no".into())))).collect();
        assert_eq!(cause(&outputs) == Some(Cause::Hung), counts, "{outputs:?}");
    }
}

#[test]
fn a_bus_that_breaks_while_a_start_runs_does_not_start_twice() {
    let mut rig = Rig::new();
    rig.killed();
    rig.step(Input::BusLost);
    assert_eq!(rig.done("done"), [], "an answer from before");
    rig.view.job = 5;
    assert_eq!(starts(&rig.state("activating", "start", "success")), 0);
    assert_eq!(healer(&rig.started()), Some(Healer::Ftd));
}

#[test]
fn a_unit_that_cannot_be_loaded_is_said_once_and_so_is_its_return() {
    let mut rig = Rig::new();
    let outputs = rig.say(|view| view.load_state = "masked".into());
    assert!(matches!(&outputs[..], [Output::Note(Kind::UnitProblem { .. })]), "{outputs:?}");
    assert_eq!(rig.say(|view| view.sub_state = "dead".into()), []);
    let outputs = rig.say(|view| view.load_state = "loaded".into());
    assert!(matches!(&outputs[..], [Output::Note(Kind::UnitFound { .. })]), "{outputs:?}");
}

/// One step of a random life.
#[derive(Debug, Clone)]
enum Move {
    View { active: u8, job: bool, run: bool, result: u8, restart: u8 },
    Exit { main: bool, status: u8 },
    Oom,
    Signal(u8),
    Job { outcome: u8, stale: bool },
    Health(bool),
    Hold(Option<u16>),
    Release,
    Tick,
    BusLost,
}

fn moves() -> impl Strategy<Value = (Move, u32)> {
    let one = prop_oneof![
        6 => (0..7_u8, any::<bool>(), any::<bool>(), 0..6_u8, 0..3_u8)
            .prop_map(|(active, job, run, result, restart)| Move::View { active, job, run, result, restart }),
        3 => (any::<bool>(), 0..5_u8).prop_map(|(main, status)| Move::Exit { main, status }),
        1 => Just(Move::Oom),
        1 => (0..3_u8).prop_map(Move::Signal),
        4 => (0..6_u8, proptest::bool::weighted(0.2)).prop_map(|(outcome, stale)| Move::Job { outcome, stale }),
        2 => any::<bool>().prop_map(Move::Health),
        1 => proptest::option::of(0..20_000_u16).prop_map(Move::Hold),
        1 => Just(Move::Release),
        4 => Just(Move::Tick),
        1 => Just(Move::BusLost),
    ];
    (one, prop_oneof![0..50_u32, 0..5_000_u32, 0..70_000_u32])
}

impl Rig {
    fn input(&mut self, what: &Move) -> Input {
        match *what {
            Move::View { active, job, run, result, restart } => {
                let (active, sub) = [
                    ("active", "running"),
                    ("active", "running"),
                    ("inactive", "dead"),
                    ("failed", "failed"),
                    ("deactivating", "stop-sigterm"),
                    ("activating", "auto-restart"),
                    ("activating", "start"),
                ][active as usize];
                let results = ["success", "signal", "exit-code", "start-limit-hit", "oom-kill", "timeout"];
                self.view.active_state = active.into();
                self.view.sub_state = sub.into();
                self.view.result = results[result as usize].into();
                self.view.restart = ["no", "always", "on-failure"][restart as usize].into();
                self.view.job = job.into();
                self.view.active_enter += u64::from(run);
                Input::View(self.view.clone())
            }
            Move::Exit { main, status } => {
                let status = [
                    Some(ExitStatus::Code(0)),
                    Some(ExitStatus::Code(3)),
                    Some(KILLED),
                    Some(ExitStatus::Signal { signal: libc::SIGSEGV, core: true }),
                    None,
                ][status as usize];
                let process = Process { pid: if main { 100 } else { 101 }, comm: "web".into(), uid: 0 };
                Input::Exit(Exit { process, ppid: 1, status, run_ns: 0, max_rss: 0 })
            }
            Move::Oom => Input::Oom { process: Process { pid: 100, comm: "web".into(), uid: 0 }, rss: 1 },
            Move::Signal(sender) => Input::Signal {
                target: 100,
                signal: libc::SIGKILL,
                sender: Process { pid: sender.into(), comm: "sh".into(), uid: 0 },
            },
            Move::Job { outcome, stale } => {
                let job = JobId(self.machine.last_job.0.saturating_sub(stale.into()));
                let outcome = match outcome {
                    0 | 1 => JobOutcome::Ended("done".into()),
                    2 => JobOutcome::Ended("failed".into()),
                    3 => JobOutcome::Ended("canceled".into()),
                    4 => JobOutcome::StopPending,
                    _ => JobOutcome::TooLate,
                };
                Input::JobDone(job, outcome)
            }
            Move::Health(well) => Input::Health(if well { Ok(()) } else { Err("no".into()) }),
            Move::Hold(ms) => {
                let until = ms.map(|ms| (BootNs(self.now + u64::from(ms) * MS), jiff::Timestamp::UNIX_EPOCH));
                Input::Hold { until, reason: None }
            }
            Move::Release => Input::Release,
            Move::Tick => Input::Tick,
            Move::BusLost => Input::BusLost,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever is reported, in whatever order: never two starts at once, none while held, none when
    /// failed, never more than the limit within the window, waits that do not shrink within a row of
    /// failures, every operation closed before the next is opened, and nothing waited for in the past.
    #[test]
    fn invariants(life in proptest::collection::vec(moves(), 1..200)) {
        let mut rig = Rig {
            machine: Machine::new(policy(OnStop::Restart), Saved::default(), clocks(S)),
            now: S,
            view: up(100, 1),
        };
        let (mut running, mut open, mut held) = (false, false, false);
        let (mut started, mut last_wait) = (Vec::<u64>::new(), (0_u32, 0_u64));
        for (what, ms) in &life {
            rig.now += u64::from(*ms) * MS;
            let failed_before = rig.machine.phase() == Phase::Failed;
            let input = rig.input(what);
            let mut freed = false;
            match &input {
                Input::JobDone(job, outcome) if running && *job == rig.machine.last_job => {
                    running = false;
                    // A start that did nothing is taken back and does not count.
                    if matches!(outcome, JobOutcome::StopPending) { started.pop(); }
                    freed = matches!(outcome, JobOutcome::Ended(r) if r == "done");
                }
                Input::BusLost => running = false,
                Input::Hold { .. } => held = true,
                _ => {}
            }
            let before = rig.machine.attempts();
            let outputs = rig.step(input.clone());
            if freed && rig.machine.attempts() < before { started.pop(); }
            let released = outputs.iter().any(|o| matches!(o, Output::Note(Kind::Released { .. })));
            if rig.machine.held().is_none() { held = false; }
            if released && failed_before { started.clear(); }
            for output in &outputs {
                match output {
                    Output::Start(_) | Output::Restart(_) => {
                        prop_assert!(!running, "two starts at once after {what:?}");
                        prop_assert!(!held, "a start while held after {what:?}");
                        prop_assert!(!failed_before || released, "a start of a failed unit after {what:?}");
                        running = true;
                        started.push(rig.now);
                        let window = started.iter().filter(|at| rig.now - **at < 60 * S).count();
                        prop_assert!(window <= 5, "{window} attempts within the window");
                    }
                    Output::Open(_) => {
                        prop_assert!(!open, "an operation inside another after {what:?}");
                        open = true;
                    }
                    Output::Close => {
                        prop_assert!(open, "closed twice after {what:?}");
                        open = false;
                    }
                    Output::Note(Kind::Decided { action: Decision::Start | Decision::Restart, attempt, delay_ms, .. }) => {
                        if *attempt > last_wait.0 {
                            prop_assert!(*delay_ms >= last_wait.1, "{delay_ms} after {last_wait:?}");
                        }
                        prop_assert!(*delay_ms <= 10_000);
                        last_wait = (*attempt, *delay_ms);
                    }
                    _ => {}
                }
            }
            // Up in a new run: the job that was asked for is over, whether it has said so or not.
            running &= rig.machine.phase() != Phase::Up;
            if matches!(input, Input::Tick) {
                prop_assert!(rig.machine.wake().is_none_or(|at| at.0 > rig.now), "waits for the past after {what:?}");
            }
            // What is saved brings back the same holds and the same end.
            let saved = rig.machine.saved();
            prop_assert_eq!(saved.failed, rig.machine.phase() == Phase::Failed);
            prop_assert_eq!(saved.held.is_some(), rig.machine.held().is_some());
        }
    }
}
