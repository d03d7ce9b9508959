//! The machine in a world that moves by itself: a systemd, a kernel and a person, each of which speaks with a
//! delay of its own.
//!
//! The properties in [`super::tests`] say what the machine must never do, whatever it is told. This one says
//! what it must always do: once nobody breaks anything any more, the service is up, however the reports of
//! what happened overtook each other. What matters here:
//!
//! - the kernel's word on a death and systemd's come by different ways, in either order, and the
//!   kernel's may be missing;
//! - systemd's signals keep their order among themselves; the end of a job goes through one task more;
//! - a request reaches systemd later than it was made, when the unit may be in another state;
//! - a process may die at any moment: before systemd has said that it is up, and before the end of the job
//!   that started it is known;
//! - ftd itself may be killed at any moment, and come back with no more than was saved by then.
//!
//! A failing case prints the life and the seed of its delays; proptest keeps it in proptest-regressions.

use std::{cmp::Reverse, collections::BinaryHeap};

use proptest::prelude::*;

use super::*;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;
const S: u64 = 1_000 * MS;

/// Time between two questions whether it answers, and how long after the last deed it is still asked.
const ASK_EVERY: u64 = 500 * MS;
const ASK_AFTER: u64 = 60 * S;
/// A job that an earlier ftd asked for; the machine's own count from 1.
const NOBODYS: JobId = JobId(0);

/// What the world may do to the service.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// Its main process ends like this.
    Die(End),
    /// `systemctl stop`, `start`, `restart`.
    Stop,
    Start,
    Restart,
    /// It goes on living, and answers no more.
    Hang,
    /// The connection to systemd breaks; all that is under way on it is lost.
    BusLost,
    /// ftd is killed, and started again.
    KillFtd,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Killed,
    Crashed,
    Code(u8),
    /// The OOM killer's; the kernel names the victim a moment before or after the end.
    Oom,
}

/// What happens at some moment.
#[derive(Debug, Clone)]
enum Event {
    Do(Deed),
    /// The machine learns something from the kernel.
    Kernel(Input),
    /// The machine learns something from systemd, unless the connection on which it was said has broken.
    Systemd {
        session: u32,
        input: Input,
    },
    /// A request of the machine's reaches systemd.
    Request {
        session: u32,
        job: JobId,
        restart: bool,
    },
    /// systemd has reaped the process.
    Reaped(u32, End),
    /// systemd's wait before its own restart is over.
    AutoRestart,
    /// The start that brings up this process is through.
    Through(u32),
    /// The machine learns that the connection to systemd is gone.
    BusGone(u32),
    /// The connection to systemd is back, after this one.
    BusBack(u32),
    /// What the machine wanted saved, in this life of ftd's, is on disk.
    Saved(u32, Box<Saved>),
    FtdBack,
    /// The service is asked whether it answers, until the last question.
    Ask,
    Tick,
}

/// systemd's mind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mind {
    Up,
    Starting,
    Stopping,
    AutoRestart,
    Down,
}

struct World {
    machine: Machine,
    policy: Policy,
    /// How often ftd was killed.
    life: u32,
    /// ftd does not run.
    away: bool,
    /// The machine has yet to hear systemd's first word.
    looking: bool,
    saved: Saved,
    /// When the last that was to be saved is: none overtakes it.
    disk: u64,
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: Vec<Option<Event>>,
    random: u64,
    /// Whether the kernel's word reaches the machine at all.
    seeing: bool,

    mind: Mind,
    alive: Option<u32>,
    last_pid: u32,
    answering: bool,
    /// When it is no longer asked whether it answers, so that the world can come to rest.
    last_question: u64,
    run: u64,
    result: &'static str,
    n_restarts: u32,
    restart: &'static str,
    /// A start waits for the stop that is under way.
    start_after_stop: bool,
    /// A stop by hand is queued or running.
    stop_job: bool,
    /// The machine's jobs that wait for the unit to be up.
    jobs: Vec<JobId>,
    /// systemd's own number of its last job.
    last_job: u32,

    session: u32,
    /// The first connection of this ftd's.
    life_began: u32,
    connected: bool,
    /// When the last signal on the connection arrives: none overtakes it.
    line: u64,
    wake: Option<u64>,

    deaths: u32,
    stops: u32,
    hangs: u32,
    asked: u32,
    opened: u32,
    closed: u32,
}

impl World {
    fn new(policy: Policy, restart: &'static str, seeing: bool, seed: u64) -> Self {
        let machine = Machine::new(policy.clone(), Saved::default(), tests::clocks(S));
        let mut world = Self {
            machine,
            policy,
            life: 0,
            away: false,
            looking: true,
            saved: Saved::default(),
            disk: 0,
            now: S,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            random: seed,
            seeing,
            mind: Mind::Up,
            alive: Some(100),
            last_pid: 100,
            answering: true,
            last_question: 0,
            run: 1,
            result: "success",
            n_restarts: 0,
            restart,
            start_after_stop: false,
            stop_job: false,
            jobs: Vec::new(),
            last_job: 0,
            session: 0,
            life_began: 0,
            connected: true,
            line: 0,
            wake: None,
            deaths: 0,
            stops: 0,
            hangs: 0,
            asked: 0,
            opened: 0,
            closed: 0,
        };
        world.tell();
        world
    }

    /// A number below `end`: splitmix64, so that a case is replayed by its seed.
    fn below(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    /// Mostly short, sometimes long.
    fn delay(&mut self, short: u64, long: u64) -> u64 {
        if self.below(8) == 0 { self.below(long) } else { self.below(short) }
    }

    fn at(&mut self, time: u64, event: Event) {
        self.queue.push(Reverse((time, self.events.len() as u64)));
        self.events.push(Some(event));
    }

    fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    // ---- systemd speaks

    fn view(&self) -> UnitView {
        let (active, sub) = match self.mind {
            Mind::Up => ("active", "running"),
            Mind::Starting => ("activating", "start"),
            Mind::Stopping => ("deactivating", "stop-sigterm"),
            Mind::AutoRestart => ("activating", "auto-restart"),
            Mind::Down if self.result == "success" => ("inactive", "dead"),
            Mind::Down => ("failed", "failed"),
        };
        UnitView {
            load_state: "loaded".into(),
            active_state: active.into(),
            sub_state: sub.into(),
            result: self.result.into(),
            main_pid: if matches!(self.mind, Mind::Up | Mind::Starting) { self.last_pid } else { 0 },
            job: if self.has_job() { self.last_job } else { 0 },
            active_enter: self.run,
            inactive_exit: self.last_pid.into(),
            n_restarts: self.n_restarts,
            restart: self.restart.into(),
            restart_usec: 20_000,
            exec_main_pid: self.last_pid,
            exec_main_status: if self.result == "signal" { libc::SIGKILL } else { 3 },
            memory_max: u64::MAX,
            ..UnitView::default()
        }
    }

    fn has_job(&self) -> bool {
        self.stop_job || self.start_after_stop || !self.jobs.is_empty()
    }

    fn tell(&mut self) {
        let view = self.view();
        self.say(Input::View(view), 0);
    }

    /// Something goes out on the connection, in order; `later` is on top of that.
    fn say(&mut self, input: Input, later: u64) {
        if self.connected {
            self.line = self.line.max(self.now + self.delay(300 * US, 20 * MS));
            self.at(self.line + later, Event::Systemd { session: self.session, input });
        }
    }

    fn job_over(&mut self, job: JobId, outcome: JobOutcome) {
        let later = self.delay(200 * US, 60 * MS);
        self.say(Input::JobDone(job, outcome), later);
    }

    fn jobs_over(&mut self, jobs: Vec<JobId>, result: &str) {
        for job in jobs {
            self.job_over(job, JobOutcome::Ended(result.into()));
        }
    }

    /// The unit is up, or at rest, and with that its jobs are over. One signal tells both, as in systemd
    /// (`job_uninstall` puts the unit into the same queue as `unit_notify`); the jobs' own ends follow.
    fn settled(&mut self, result: &str) {
        let jobs = std::mem::take(&mut self.jobs);
        self.tell();
        self.jobs_over(jobs, result);
    }

    // ---- systemd acts

    fn spawn(&mut self) {
        self.last_pid += 1;
        self.alive = Some(self.last_pid);
        self.answering = true;
        self.mind = Mind::Starting;
        self.result = "success";
        self.tell();
        let through = self.delay(5 * MS, 300 * MS);
        self.after(through, Event::Through(self.last_pid));
    }

    fn stop(&mut self) {
        match self.mind {
            Mind::Up | Mind::Starting => {
                self.mind = Mind::Stopping;
                self.tell();
                if self.alive.is_some() {
                    self.die(End::Code(0), 1);
                }
                // Without a process its end is being reaped already.
            }
            Mind::AutoRestart | Mind::Down => {
                self.mind = Mind::Down;
                self.stopped();
            }
            Mind::Stopping => {}
        }
    }

    /// Nothing runs any more.
    fn stopped(&mut self) {
        self.mind = Mind::Down;
        let asked = std::mem::take(&mut self.stop_job);
        if std::mem::take(&mut self.start_after_stop) {
            self.spawn();
        } else {
            self.settled(if asked { "canceled" } else { "failed" });
        }
    }

    fn request(&mut self, job: JobId, restart: bool) {
        // What it asks for becomes one with a job of the same kind that is there.
        self.last_job += u32::from(!self.has_job());
        if self.stop_job {
            self.job_over(job, JobOutcome::StopPending);
            return;
        }
        match self.mind {
            Mind::Up if restart => {
                self.jobs.push(job);
                self.start_after_stop = true;
                self.stop();
            }
            Mind::Up => self.job_over(job, JobOutcome::Ended("done".into())),
            Mind::Down => {
                self.jobs.push(job);
                self.spawn();
            }
            Mind::Stopping => {
                self.jobs.push(job);
                self.start_after_stop = true;
            }
            Mind::Starting | Mind::AutoRestart => self.jobs.push(job),
        }
    }

    fn reaped(&mut self, pid: u32, end: End) {
        if pid != self.last_pid {
            return;
        }
        let by_stop = self.mind == Mind::Stopping;
        self.result = match end {
            End::Code(0) => "success",
            End::Code(_) => "exit-code",
            End::Killed | End::Crashed | End::Oom => "signal",
        };
        if by_stop {
            self.stopped();
            return;
        }
        let itself = match self.restart {
            "always" => true,
            "on-failure" => self.result != "success",
            _ => false,
        };
        self.mind = Mind::Down;
        if itself {
            self.mind = Mind::AutoRestart;
            self.tell();
            self.after(20 * MS, Event::AutoRestart);
        } else if self.below(4) == 0 {
            // Others of its processes are still there.
            self.mind = Mind::Stopping;
            self.tell();
            let gone = self.delay(MS, 100 * MS);
            self.after(gone, Event::Reaped(pid, end));
        } else {
            self.settled("failed");
        }
    }

    // ---- the kernel

    /// The main process ends, sent to it by `sender` (1 is systemd).
    fn die(&mut self, end: End, sender: u32) {
        let Some(pid) = self.alive.take() else { return };
        let signal = |signal| ExitStatus::Signal { signal, core: false };
        let (status, sent) = match end {
            End::Killed | End::Oom => (signal(libc::SIGKILL), Some(libc::SIGKILL)),
            End::Crashed => (signal(libc::SIGSEGV), None),
            End::Code(code) => (ExitStatus::Code(code), (sender == 1).then_some(libc::SIGTERM)),
        };
        if self.seeing {
            let at = self.now + self.delay(100 * US, 30 * MS);
            if let Some(signal) = sent {
                let oom = matches!(end, End::Oom);
                let (pid_of, comm) = if oom { (0, "kernel") } else { (sender, "somebody") };
                let sender = Process { pid: pid_of, comm: comm.into(), uid: 0 };
                if oom {
                    let named = at + self.below(1_900 * US);
                    let process = Process { pid, comm: "web".into(), uid: 33 };
                    self.at(named, Event::Kernel(Input::Oom { process, rss: 1 }));
                }
                self.at(at, Event::Kernel(Input::Signal { target: pid, signal, sender }));
            }
            let process = Process { pid, comm: "web".into(), uid: 33 };
            let at = if matches!(end, End::Oom) { at + self.below(1_900 * US) } else { at };
            let exit = Exit { process, ppid: 1, status: Some(status), run_ns: 0, max_rss: 0 };
            self.at(at, Event::Kernel(Input::Exit(exit)));
        }
        let reaped = self.delay(2 * MS, 50 * MS);
        self.after(reaped, Event::Reaped(pid, end));
    }

    // ---- the world turns

    fn run_deed(&mut self, deed: Deed) {
        match deed {
            Deed::Die(end) => {
                self.deaths += u32::from(self.alive.is_some());
                self.die(end, 4711);
            }
            Deed::Stop => {
                self.stops += 1;
                self.last_job += 1;
                // It replaces what is queued.
                self.start_after_stop = false;
                let jobs = std::mem::take(&mut self.jobs);
                self.jobs_over(jobs, "canceled");
                self.stop_job = true;
                self.stop();
            }
            Deed::Start if self.stop_job => {
                self.last_job += 1;
                self.stop_job = false;
                self.start_after_stop = true;
            }
            Deed::Start if self.mind == Mind::Down => self.spawn(),
            Deed::Restart => {
                self.stops += 1;
                self.last_job += 1;
                self.start_after_stop = true;
                self.stop();
            }
            Deed::Hang => {
                self.hangs += u32::from(self.answering);
                self.answering = false;
            }
            Deed::BusLost if self.connected => {
                self.connected = false;
                self.session += 1;
                let lost = self.delay(MS, 10 * MS);
                self.after(lost, Event::BusGone(self.session));
                let away = lost + MS + self.delay(30 * MS, 2 * S);
                self.after(away, Event::BusBack(self.session));
            }
            Deed::KillFtd if !self.away => {
                self.away = true;
                self.life += 1;
                self.connected = false;
                self.session += 1;
                // Whatever operation was open: nobody is left to close it.
                self.opened = self.closed;
                let away = 20 * MS + self.delay(300 * MS, 3 * S);
                self.after(away, Event::FtdBack);
            }
            Deed::Start | Deed::BusLost | Deed::KillFtd => {}
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Do(deed) => self.run_deed(deed),
            Event::Kernel(input) => self.feed(input),
            Event::Systemd { session, input } => {
                if session == self.session {
                    self.feed(input);
                }
            }
            Event::Request { session, job, restart } => {
                if session == self.session && self.connected {
                    self.request(job, restart);
                } else if session < self.life_began {
                    // Of an ftd that is no more. It may have been on its way already.
                    if self.below(2) == 0 {
                        self.request(NOBODYS, restart);
                    }
                } else {
                    self.feed(Input::JobDone(job, JobOutcome::Unreachable));
                }
            }
            Event::Reaped(pid, end) => self.reaped(pid, end),
            Event::AutoRestart if self.mind == Mind::AutoRestart => {
                self.n_restarts += 1;
                self.spawn();
            }
            Event::Through(pid) if self.mind == Mind::Starting && pid == self.last_pid => {
                self.mind = Mind::Up;
                // As systemd does, by the time.
                self.run = (self.run + 1).max(self.now / US);
                self.settled("done");
            }
            Event::BusGone(session) if session == self.session => self.feed(Input::BusLost),
            Event::BusBack(session) if session == self.session => {
                // The machine's jobs of the old connection are nobody's now.
                self.jobs.iter_mut().for_each(|job| *job = NOBODYS);
                self.connect();
            }
            Event::AutoRestart | Event::Through(_) | Event::BusGone(_) | Event::BusBack(_) => {}
            Event::Saved(life, saved) => {
                if life == self.life {
                    self.saved = *saved;
                }
            }
            Event::FtdBack => {
                self.session += 1;
                self.life_began = self.session;
                (self.away, self.looking, self.wake) = (false, true, None);
                let clocks = tests::clocks(self.now);
                self.machine = Machine::new(self.policy.clone(), self.saved.clone(), clocks);
                self.jobs.iter_mut().for_each(|job| *job = NOBODYS);
                self.connect();
            }
            Event::Ask => {
                if !self.away && self.machine.phase() == Phase::Up {
                    let well = self.alive.is_some() && self.answering && self.mind == Mind::Up;
                    self.feed(Input::Health(if well { Ok(()) } else { Err("no answer".into()) }));
                }
                if self.now < self.last_question {
                    self.after(ASK_EVERY, Event::Ask);
                }
            }
            Event::Tick => {
                if !self.away && self.machine.wake().is_some_and(|wake| wake.0 <= self.now) {
                    self.feed(Input::Tick);
                }
            }
        }
    }

    fn connect(&mut self) {
        self.connected = true;
        self.line = self.now;
        self.tell();
    }

    fn feed(&mut self, input: Input) {
        if self.away {
            return;
        }
        let word = matches!(input, Input::View(_));
        for output in self.machine.step(BootNs(self.now), BootNs(self.now), input) {
            let request = match output {
                Output::Start(job) => Some((job, false)),
                Output::Restart(job) => Some((job, true)),
                Output::Open(_) => {
                    self.opened += 1;
                    None
                }
                Output::Close => {
                    self.closed += 1;
                    None
                }
                Output::Save => {
                    self.disk = self.disk.max(self.now + self.delay(2 * MS, 50 * MS));
                    self.at(self.disk, Event::Saved(self.life, Box::new(self.machine.saved())));
                    None
                }
                Output::Note(_) => None,
            };
            if let Some((job, restart)) = request {
                self.asked += 1;
                let reaches = self.delay(300 * US, 20 * MS);
                self.after(reaches, Event::Request { session: self.session, job, restart });
            }
        }
        if word && std::mem::take(&mut self.looking) {
            let ending = self.machine.view().active_state == "deactivating";
            assert!(self.machine.is_decided() || ending, "seen and not decided: {:?}", self.machine);
        }
        let wake = self.machine.wake().map(|at| at.0);
        if std::mem::replace(&mut self.wake, wake) != wake
            && let Some(at) = wake
        {
            let late = self.delay(100 * US, 10 * MS);
            self.at(at.max(self.now) + late, Event::Tick);
        }
    }

    /// Until nothing is left to happen; false when that does not come.
    fn until_calm(&mut self) -> bool {
        for _ in 0..100_000 {
            let Some(Reverse((time, index))) = self.queue.pop() else { return true };
            self.now = time;
            if let Some(event) = self.events[index as usize].take() {
                self.handle(event);
            }
        }
        false
    }
}

fn deeds() -> impl Strategy<Value = Vec<(u64, Deed)>> {
    let deed = prop_oneof![
        3 => Just(Deed::Die(End::Killed)),
        2 => Just(Deed::Die(End::Crashed)),
        2 => (0..4_u8).prop_map(|code| Deed::Die(End::Code(code))),
        1 => Just(Deed::Die(End::Oom)),
        1 => Just(Deed::Stop),
        1 => Just(Deed::Start),
        1 => Just(Deed::Restart),
        1 => Just(Deed::Hang),
        1 => Just(Deed::BusLost),
        1 => Just(Deed::KillFtd),
    ];
    let gap = prop_oneof![0..MS, 0..30 * MS, 0..500 * MS, 0..20 * S];
    proptest::collection::vec((gap, deed), 1..25)
}

fn live(
    on_stop: OnStop,
    restart: &'static str,
    seeing: bool,
    seed: u64,
    life: &[(u64, Deed)],
) -> (World, bool) {
    let heal = Heal { restarts: u32::MAX, ..Heal::default() };
    let health = Some(("tcp://127.0.0.1:80".to_owned(), 3, Duration::from_secs(1)));
    let policy = Policy { heal, on_stop, on_exit: OnStop::Restart, health };
    let mut world = World::new(policy, restart, seeing, seed);
    let mut at = world.now + S;
    for (gap, deed) in life {
        at += gap;
        world.at(at, Event::Do(*deed));
    }
    world.last_question = at + ASK_AFTER;
    world.after(MS, Event::Ask);
    let calm = world.until_calm();
    (world, calm)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Whatever died or was stopped, in whatever order it was told: in the end the service is up, the machine
    /// knows it, every outage that was opened is closed, and no more starts were asked for than
    /// the outages account for.
    #[test]
    fn in_the_end_the_service_is_up(
        life in deeds(),
        seed in any::<u64>(),
        seeing in proptest::bool::weighted(0.8),
        restart in prop_oneof![3 => Just("no"), 1 => Just("on-failure"), 1 => Just("always")],
    ) {
        let (world, calm) = live(OnStop::Restart, restart, seeing, seed, &life);
        prop_assert!(calm, "it never comes to rest: {:?}", world.machine);
        prop_assert!(world.mind == Mind::Up && world.alive.is_some(), "{:?} in {:?}", world.mind, world.machine);
        prop_assert!(world.answering, "it hangs: {:?}", world.machine);
        prop_assert_eq!(world.machine.phase(), Phase::Up);
        prop_assert!(world.machine.outage.is_none() && world.machine.job.is_none(), "{:?}", world.machine);
        prop_assert_eq!(world.opened, world.closed);
        // One start for each, one more where the first met a systemd that had not noticed.
        let most = 2 * (world.deaths + world.stops + world.hangs);
        prop_assert!(world.asked <= most + life.len() as u32, "{} starts for {} deaths", world.asked, world.deaths);
        prop_assert!(world.now < S + 25 * 20 * S + 60 * S, "too late: {}", world.now);
    }

    /// With `on_stop = "respect"` it may be down in the end, but only when somebody stopped it, and then the machine
    /// knows that it is down on purpose.
    #[test]
    fn what_is_down_in_the_end_was_stopped(life in deeds(), seed in any::<u64>()) {
        let (world, calm) = live(OnStop::Respect, "no", true, seed, &life);
        prop_assert!(calm, "it never comes to rest: {:?}", world.machine);
        prop_assert_eq!(world.opened, world.closed);
        if world.mind == Mind::Up {
            prop_assert!(world.alive.is_some() && world.answering);
            prop_assert_eq!(world.machine.phase(), Phase::Up);
        } else {
            prop_assert_eq!(world.machine.phase(), Phase::Left, "{:?}", world.machine);
            // A clean end while ftd, or what it hears of systemd, is away looks like a stop afterwards.
            let clean = |deed: Deed| matches!(deed, Deed::Die(End::Code(0)));
            let looked_like_one = life.iter().any(|(_, deed)| clean(*deed))
                && life.iter().any(|(_, deed)| matches!(deed, Deed::BusLost | Deed::KillFtd));
            prop_assert!(world.stops > 0 || looked_like_one);
        }
    }
}
