//! Two hundred mixed faults in a row on two hosts: each one seen, named right, healed or deliberately left,
//! none healed twice; with ftd itself killed, restarted and reinstalled in between.
//!
//! What happens while ftd is away is not missed for longer than its restart takes. That is a statement of order,
//! not of time: by the event `agent_ready` ftd has decided about all that it finds, and what comes after, its
//! probe sees.
//!
//! As root: `cargo xtask test --only mixed`. How often each fault comes is fixed, their order is random; the
//! seed is printed, and `FTD_SEED=N` replays it. `FTD_FAULTS=N` makes it longer or shorter.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::{Duration, Instant};

use harness::{BootOptions, Events, Host, Lab, base, events, own};
use serde_json::Value;

const CONFIG: &str = r#"
[inject]
enabled = true
[heal]
restarts = 10000
within = "1min"
backoff = "1ms"
settle = "1ms"
kill_after = "500ms"
[[workload]]
name = "web"
units = ["nginx"]
on_stop = "restart"
health = "http://127.0.0.1/"
health_every = "100ms"
health_deadline = "1s"
health_failures = 2
health_grace = "1s"
[[workload]]
name = "site"
units = ["httpd"]
[[workload]]
name = "own"
units = ["own"]
"#;

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// A signal from a process that is then named.
    Kill(&'static str, i32),
    /// SIGTERM: the service ends in good order, at somebody's wish.
    Term,
    /// All processes at once, by systemd's hand.
    KillWhole,
    Worker,
    Stop,
    Oom,
    Hang,
    ExitCode(u8),
    /// Something happens while ftd is dead, restarting, or being reinstalled.
    WithoutFtd(Away, Unseen),
}

/// What happens to a service while ftd is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unseen {
    /// nginx is killed: ftd is to start it.
    Killed,
    /// nginx is stopped: `on_stop = "restart"`.
    Stopped,
    /// `own` is stopped: it is to stay so.
    StoppedForGood,
    /// apache2 crashes, and its own `Restart=` brings it back.
    HealedBySystemd,
    /// nginx goes on living and answers no more.
    Hung,
}

#[derive(Debug, Clone, Copy)]
enum Away {
    Killed,
    Restarted,
    Reinstalled,
}

/// Fifty faults, with every kind of them as often as it is to come in fifty.
fn fifty() -> Vec<Fault> {
    let mut cards = vec![
        Fault::WithoutFtd(Away::Killed, Unseen::Killed),
        Fault::WithoutFtd(Away::Restarted, Unseen::Killed),
        Fault::WithoutFtd(Away::Reinstalled, Unseen::Killed),
        Fault::WithoutFtd(Away::Killed, Unseen::Stopped),
        Fault::WithoutFtd(Away::Restarted, Unseen::StoppedForGood),
        Fault::WithoutFtd(Away::Killed, Unseen::HealedBySystemd),
        Fault::WithoutFtd(Away::Killed, Unseen::Hung),
    ];
    let signals =
        [("KILL", 9, 3), ("SEGV", 11, 3), ("ABRT", 6, 2), ("BUS", 7, 2), ("ILL", 4, 2), ("QUIT", 3, 2)];
    for (name, number, times) in signals {
        cards.extend([Fault::Kill(name, number)].repeat(times));
    }
    let others = [
        (Fault::Term, 4),
        (Fault::KillWhole, 5),
        (Fault::Worker, 3),
        (Fault::Stop, 5),
        (Fault::Oom, 4),
        (Fault::Hang, 2),
        (Fault::ExitCode(11), 2),
        (Fault::ExitCode(12), 2),
        (Fault::ExitCode(13), 2),
    ];
    for (fault, times) in others {
        cards.extend([fault].repeat(times));
    }
    assert_eq!(cards.len(), 50);
    cards
}

/// So many faults, in random order.
fn deck(faults: u64, random: &mut fastrand::Rng) -> Vec<Fault> {
    let mut deck: Vec<_> = fifty().into_iter().cycle().take(usize::try_from(faults).unwrap()).collect();
    random.shuffle(&mut deck);
    deck
}

struct Rig {
    host: Host,
    events: Events,
    /// Starts of each unit that faults should have led to.
    expected: [usize; 3],
}

const UNITS: [&str; 3] = ["nginx.service", "apache2.service", "own.service"];
const LIMIT: Duration = Duration::from_secs(20);

impl Rig {
    fn new(lab: &Lab, name: &str) -> Self {
        let host = lab.boot(name, BootOptions::with_config(CONFIG)).unwrap();
        host.wait_running().unwrap();
        // Faults come faster than systemd's own limit for starts by hand allows.
        host.sh("mkdir -p /etc/systemd/system/service.d && printf '[Unit]\\nStartLimitIntervalSec=0\\n' > /etc/systemd/system/service.d/limit.conf").unwrap();
        own::start(&host, None).unwrap();
        let deb = std::fs::read(base::built_deb().expect("the package is built")).unwrap();
        host.write("/root/ftd.deb", deb).unwrap();
        let events = Events::follow(&host).unwrap();
        let expected = UNITS.map(|unit| host.starts(unit).unwrap());
        let mut rig = Self { host, events, expected };
        rig.all_up();
        rig
    }

    fn pid(&self, unit: &str) -> u64 {
        self.host.ok(["systemctl", "show", "-P", "MainPID", unit]).unwrap().trim().parse().unwrap()
    }

    /// Waits until ftd holds every unit for up, with nothing under way, and the checks have succeeded.
    fn all_up(&mut self) {
        self.events.until_proven(&self.host, UNITS.len()).unwrap();
        self.events.until_settled(&self.host, Duration::ZERO).unwrap();
    }

    /// Waits for the heal of `unit` (index into [`UNITS`]); checks cause and who; answers the death of the
    /// main process in that operation.
    fn healed(&mut self, unit: usize, cause: &str) -> Value {
        let down = self.events.wait_for("down", UNITS[unit]).unwrap();
        assert_eq!(down["cause"], cause, "{down}");
        let healed = self.events.wait_for("healed", UNITS[unit]).unwrap();
        assert_eq!(healed["op"], down["op"]);
        self.expected[unit] += 1;
        let pid = healed["main_pid"].clone();
        assert_eq!(pid, self.pid(UNITS[unit]), "one start, and that one runs");
        let death =
            |e: &&Value| e["event"] == "process_died" && e["main"] == true && e["unit"] == UNITS[unit];
        self.events.seen().iter().rev().find(death).cloned().unwrap_or_default()
    }

    fn inject(&mut self, fault: Fault, random: &mut fastrand::Rng) {
        // nginx is started by ftd; apache2 has a Restart= of its own; `own` is ours. QUIT is nginx's own word
        // for an orderly end, so it is for the others.
        let first = usize::from(matches!(fault, Fault::Kill("QUIT", _)));
        let target = random.usize(first..UNITS.len());
        let main = self.pid(UNITS[target]);
        match fault {
            Fault::Kill(name, number) => {
                self.host.ok(["bash", "-c", &format!("kill -{name} {main}")]).unwrap();
                let died = self.healed(target, "killed");
                assert_eq!(died["status"]["signal"]["signal"], number, "{died}");
                assert_eq!((&died["pid"], &died["sender"]["comm"]), (&main.into(), &"bash".into()), "{died}");
            }
            Fault::Term => {
                let main = self.pid(UNITS[0]);
                self.host.ok(["bash", "-c", &format!("kill -TERM {main}")]).unwrap();
                let died = self.healed(0, "killed");
                assert_eq!(
                    (&died["status"]["code"], &died["sender"]["comm"]),
                    (&0.into(), &"bash".into()),
                    "{died}"
                );
            }
            Fault::KillWhole => {
                self.host.ok(["systemctl", "kill", "-s", "KILL", UNITS[target]]).unwrap();
                let died = self.healed(target, "killed");
                assert_eq!(died["sender"]["pid"], 1, "{died}");
            }
            Fault::Worker => {
                let main = self.pid(UNITS[0]);
                let worker = self.host.sh(&format!("pgrep -P {main} | head -n 1")).unwrap();
                let worker: u64 = worker.trim().parse().unwrap();
                self.host.sh(&format!("kill -9 {worker}")).unwrap();
                let dead = |e: &Value| e["event"] == "process_died" && e["pid"] == worker;
                let died = self.events.wait("the worker's death", LIMIT, dead).unwrap();
                assert_eq!(died["main"], false);
                assert_eq!(self.pid(UNITS[0]), main, "the service was left alone");
            }
            Fault::Stop if target == 0 => {
                self.host.ok(["systemctl", "stop", UNITS[0]]).unwrap();
                self.healed(0, "stopped");
            }
            Fault::Stop => {
                self.host.ok(["systemctl", "stop", UNITS[target]]).unwrap();
                self.events.wait_for("left", UNITS[target]).unwrap();
                self.host.ok(["systemctl", "start", UNITS[target]]).unwrap();
                self.events.wait_for("started", UNITS[target]).unwrap();
                self.expected[target] += 1;
            }
            Fault::Oom => {
                self.host.ok(["ftctl", "inject", "oom", UNITS[target]]).unwrap();
                let oom = self.events.wait_for("oom_kill", UNITS[target]).unwrap();
                assert_eq!(oom["pid"], main, "{oom}");
                let died = self.healed(target, "oom_killed");
                assert_eq!(died["oom"], true, "{died}");
            }
            Fault::Hang => {
                self.host.ok(["ftctl", "inject", "hang", UNITS[0], "--for", "1min"]).unwrap();
                self.healed(0, "hung");
            }
            Fault::ExitCode(code) => {
                let main = self.pid(UNITS[2]);
                self.host.ok(["bash", "-c", &format!("kill -{} {main}", own::exit_signal(code))]).unwrap();
                let died = self.healed(2, "exit_code");
                assert_eq!(died["status"]["code"], code, "{died}");
            }
            Fault::WithoutFtd(away, unseen) => self.without_ftd(away, unseen),
        }
        self.all_up();
    }

    /// Something happens while ftd is away: it is decided when ftd says that it is ready, and nothing else was
    /// disturbed.
    fn without_ftd(&mut self, away: Away, unseen: Unseen) {
        let target = match unseen {
            Unseen::Killed | Unseen::Stopped | Unseen::Hung => 0,
            Unseen::HealedBySystemd => 1,
            Unseen::StoppedForGood => 2,
        };
        let unit = UNITS[target];
        let mains = UNITS.map(|unit| self.pid(unit));
        let main = mains[target];
        let agent = self.pid("ftd");
        let away = match away {
            Away::Killed => format!("kill -9 {agent} & gone=$!"),
            Away::Restarted => "systemctl restart ftd & gone=$!".to_owned(),
            Away::Reinstalled => "dpkg -i /root/ftd.deb >/dev/null 2>&1 & gone=$!".to_owned(),
        };
        let deed = match unseen {
            Unseen::Killed => format!("kill -9 {main}"),
            // Without waiting: systemd may be busy with ftd first.
            Unseen::Stopped | Unseen::StoppedForGood => format!("systemctl --no-block stop {unit}"),
            Unseen::HealedBySystemd => format!("kill -SEGV {main}"),
            Unseen::Hung => format!("kill -STOP {main} $(pgrep -P {main})"),
        };
        // As soon as systemd has taken the old ftd's exit code, and long before a new one sees anything.
        let script =
            format!("{away}; while kill -0 {agent} 2>/dev/null; do :; done; {deed}; wait $gone; echo done");
        self.host.ok(["bash", "-c", &script]).unwrap();
        let end = Instant::now() + harness::scaled(LIMIT);
        self.events = loop {
            let back = !matches!(self.pid("ftd"), 0) && self.pid("ftd") != agent;
            match back.then(|| Events::follow(&self.host)) {
                Some(Ok(events)) => break events,
                Some(Err(error)) => assert!(Instant::now() < end, "{error:#}"),
                None => assert!(Instant::now() < end, "ftd does not come back"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        if unseen == Unseen::StoppedForGood {
            let left = |status: &Value| status["units"][target]["phase"] == "left";
            self.events.until(&self.host, LIMIT, left).unwrap();
            self.not_missed(unit, main, |e| e["event"] == "left");
            self.host.ok(["systemctl", "start", unit]).unwrap();
            self.events.wait_for("started", unit).unwrap();
        }
        if unseen == Unseen::Hung {
            // It looks well until it is asked, and it is asked as often as ever.
            let hung = |e: &Value| e["event"] == "down" && e["unit"] == unit && e["cause"] == "hung";
            let since = self.since_start();
            if !since.iter().any(hung) {
                self.events.wait("the hang", LIMIT, hung).unwrap();
            }
        }
        self.all_up();
        match unseen {
            Unseen::Killed | Unseen::Stopped => self.not_missed(unit, main, |e| e["event"] == "decided"),
            // It may still be at it when ftd looks, or be done.
            Unseen::HealedBySystemd => self.not_missed(unit, main, |e| {
                e["event"] == "restarted_unseen" && e["by"] == "systemd"
                    || e["event"] == "decided" && e["action"] == "leave_to_systemd"
            }),
            Unseen::Hung | Unseen::StoppedForGood => {}
        }
        // Without what was said of this heal, which would be taken for the next one's.
        self.events = Events::follow(&self.host).unwrap();
        self.expected[target] += 1;
        for (index, main) in mains.into_iter().enumerate() {
            assert_eq!(self.pid(UNITS[index]) == main, index != target, "{} was disturbed", UNITS[index]);
        }
    }

    /// What the ftd that runs now has said.
    fn since_start(&self) -> Vec<Value> {
        let mut all = events::all(&self.host).unwrap();
        let agent = self.pid("ftd");
        let started = all.iter().rposition(|e| e["event"] == "agent_started" && e["pid"] == agent);
        all.split_off(started.expect("the new ftd tells of its start"))
    }

    /// What happened while ftd was away was decided before ftd was ready. Or it happened so late that the probe of the
    /// new ftd saw it.
    fn not_missed(&self, unit: &str, main: u64, decision: impl Fn(&Value) -> bool) {
        let said = self.since_start();
        let ready = said.iter().position(|e| e["event"] == "agent_ready").expect("ftd is ready");
        assert!(said[ready]["undecided"].is_null(), "{}", said[ready]);
        let decided = said.iter().position(|e| e["unit"] == unit && decision(e));
        let decided = decided.unwrap_or_else(|| panic!("nothing was decided about {unit}: {said:#?}"));
        let by_probe = |e: &Value| e["event"] == "process_died" && e["pid"] == main && !e["status"].is_null();
        assert!(decided < ready || said.iter().any(by_probe), "missed until after the start: {said:#?}");
    }
}

#[test]
fn two_hundred_mixed_faults_in_a_row() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("FTD_SEED").unwrap_or_else(|| fastrand::u64(..));
    let faults = number("FTD_FAULTS").unwrap_or(200);
    println!("FTD_SEED={seed}");
    let lab = Lab::new().unwrap();
    let lab = &lab;
    std::thread::scope(|scope| {
        for (host, share) in [("vm1", faults.div_ceil(2)), ("vm2", faults / 2)] {
            scope.spawn(move || {
                let mut random =
                    fastrand::Rng::with_seed(seed ^ host.len() as u64 ^ u64::from(host.as_bytes()[2]));
                let mut rig = Rig::new(lab, host);
                for (n, fault) in deck(share, &mut random).into_iter().enumerate() {
                    println!("{host} {n}: {fault:?}");
                    rig.inject(fault, &mut random);
                }
                for (unit, expected) in UNITS.iter().zip(rig.expected) {
                    assert_eq!(
                        rig.host.starts(unit).unwrap(),
                        expected,
                        "{unit} was started as often as it was down"
                    );
                }
                // By every ftd that there was: what one of them lost, its journal tells. That crashes elsewhere
                // on the machine are told only so often a minute is no loss.
                let lost = |e: &&Value| e["event"] == "events_dropped" && e["place"] != "elsewhere";
                let all = events::all(&rig.host).unwrap();
                let lost: Vec<_> = all.iter().filter(lost).collect();
                assert!(lost.is_empty(), "{lost:#?}");
                let status = rig.host.ok(["ftctl", "status", "--json"]).unwrap();
                let status: Value = serde_json::from_str(&status).unwrap();
                for place in status["probe"]["drops"].as_array().unwrap() {
                    assert_eq!(place[1], 0, "nothing was lost: {place}");
                }
            });
        }
    });
}
