//! Two hundred mixed faults in a row on two hosts: each one seen, named right, healed or deliberately left,
//! none healed twice; with ftd itself killed, restarted and reinstalled in between.
//!
//! As root: `cargo xtask test --only mixed`. The order is random; the seed is printed, and `FTD_SEED=N`
//! replays it. `FTD_FAULTS=N` makes it longer or shorter.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::{Duration, Instant};

use harness::{BootOptions, Events, Host, Lab};
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

/// A service that ends as it is told to: with 40 + N on the N-th real-time signal.
const OWN: &str = "[Service]\nExecStart=/usr/bin/python3 -c \"\
import os, signal\\n\
for n in range(3): signal.signal(signal.SIGRTMIN + n, lambda s, f: os._exit(40 + s - signal.SIGRTMIN))\\n\
while True: signal.pause()\"\n";

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
    /// nginx dies while ftd is dead, restarting, or being reinstalled.
    WithoutFtd(Away),
}

#[derive(Debug, Clone, Copy)]
enum Away {
    Killed,
    Restarted,
    Reinstalled,
}

fn draw(random: &mut fastrand::Rng) -> Fault {
    match random.u32(0..100) {
        0..30 => {
            let signals = [("KILL", 9), ("SEGV", 11), ("ABRT", 6), ("BUS", 7), ("ILL", 4), ("QUIT", 3)];
            // QUIT is nginx's own word for an orderly end, so it is not drawn for nginx.
            let (name, number) = signals[random.usize(0..5)];
            Fault::Kill(name, number)
        }
        30..38 => Fault::Term,
        38..50 => Fault::KillWhole,
        50..58 => Fault::Worker,
        58..68 => Fault::Stop,
        68..76 => Fault::Oom,
        76..80 => Fault::Hang,
        80..92 => Fault::ExitCode(random.u8(0..3)),
        92..97 => Fault::WithoutFtd(Away::Killed),
        97..99 => Fault::WithoutFtd(Away::Restarted),
        _ => Fault::WithoutFtd(Away::Reinstalled),
    }
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
        host.write("/etc/systemd/system/own.service", OWN).unwrap();
        // Faults come faster than systemd's own limit for starts by hand allows.
        host.sh("mkdir -p /etc/systemd/system/service.d && printf '[Unit]\\nStartLimitIntervalSec=0\\n' > /etc/systemd/system/service.d/limit.conf").unwrap();
        host.sh("systemctl daemon-reload && systemctl start own").unwrap();
        let deb = std::fs::read(harness::base::newest_deb().expect("the package is built")).unwrap();
        host.write("/root/ftd.deb", deb).unwrap();
        let events = Events::follow(&host).unwrap();
        let expected = UNITS.map(|unit| starts(&host, unit));
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
        // nginx is started by ftd; apache2 has a Restart= of its own; `own` is ours.
        let target = random.usize(0..3);
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
            Fault::ExitCode(n) => {
                let main = self.pid(UNITS[2]);
                self.host.ok(["bash", "-c", &format!("kill -{} {main}", 34 + n)]).unwrap();
                let died = self.healed(2, "exit_code");
                assert_eq!(died["status"]["code"], 40 + n, "{died}");
            }
            Fault::WithoutFtd(away) => self.without_ftd(away),
        }
        self.all_up();
    }

    /// nginx dies while ftd is away: it is up again soon after ftd is, and the others never noticed.
    fn without_ftd(&mut self, away: Away) {
        let others = [self.pid(UNITS[1]), self.pid(UNITS[2])];
        let main = self.pid(UNITS[0]);
        let agent = self.pid("ftd");
        let away = match away {
            Away::Killed => format!("kill -9 {agent}"),
            Away::Restarted => "systemctl --no-block restart ftd".to_owned(),
            Away::Reinstalled => "dpkg -i /root/ftd.deb >/dev/null 2>&1 &".to_owned(),
        };
        self.host.ok(["bash", "-c", &format!("{away}\nkill -9 {main}\nwait")]).unwrap();
        let end = Instant::now() + harness::scaled(LIMIT);
        while matches!(self.pid("ftd"), 0) || self.pid("ftd") == agent {
            assert!(Instant::now() < end, "ftd does not come back");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.events = loop {
            match Events::follow(&self.host) {
                Ok(events) => break events,
                Err(error) => assert!(Instant::now() < end, "{error:#}"),
            }
        };
        self.all_up();
        // Without what was said of this heal, which would be taken for the next one's.
        self.events = Events::follow(&self.host).unwrap();
        self.expected[0] += 1;
        assert_eq!([self.pid(UNITS[1]), self.pid(UNITS[2])], others, "no other service was disturbed");
    }
}

/// How often systemd has started the unit: an entry of its own in the journal each time.
fn starts(host: &Host, unit: &str) -> usize {
    // MESSAGE_ID of "a start job has finished", with its result; see systemd.journal-fields(7).
    let finished = "MESSAGE_ID=39f53479d3a045ac8e11786248231fbf";
    let all = host.ok([
        "journalctl",
        "-o",
        "json",
        "--output-fields=JOB_RESULT",
        finished,
        &format!("UNIT={unit}"),
    ]);
    all.unwrap_or_default().lines().filter(|line| line.contains("\"done\"")).count()
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
                for n in 0..share {
                    let fault = draw(&mut random);
                    println!("{host} {n}: {fault:?}");
                    rig.inject(fault, &mut random);
                }
                for (unit, expected) in UNITS.iter().zip(rig.expected) {
                    assert_eq!(
                        starts(&rig.host, unit),
                        expected,
                        "{unit} was started as often as it was down"
                    );
                }
                let status = rig.host.ok(["ftctl", "status", "--json"]).unwrap();
                let status: Value = serde_json::from_str(&status).unwrap();
                for place in status["probe"]["drops"].as_array().unwrap() {
                    assert_eq!(place[1], 0, "nothing was lost: {place}");
                }
            });
        }
    });
}
