//! The rules of healing on a real host: the installed package, real nginx and apache2, one rule a test.
//!
//! As root: `cargo xtask test --only heal`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]
#![allow(clippy::float_cmp, reason = "metrics that count are whole numbers")]

use std::time::{Duration, Instant};

use harness::metrics::Metrics;
use harness::{BootOptions, Events, Host, Lab, own};
use serde_json::Value;

const NGINX: &str = "nginx.service";
const APACHE: &str = "apache2.service";
const LIMIT: Duration = Duration::from_secs(20);

/// nginx comes back whatever happens to it; a stop of apache2 (asked for as `httpd`) is respected.
const CONFIG: &str = r#"
[inject]
enabled = true
[heal]
restarts = 6
within = "20s"
backoff = "50ms"
settle = "1ms"
kill_after = "1s"
[[workload]]
name = "web"
units = ["nginx"]
on_stop = "restart"
health = "http://127.0.0.1/"
health_every = "200ms"
health_deadline = "500ms"
health_failures = 2
health_grace = "500ms"
[[workload]]
name = "site"
units = ["httpd"]
health = "http://127.0.0.1:8080/"
"#;

fn lab(config: &str) -> (Lab, Host, Events) {
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", BootOptions::with_config(config)).unwrap();
    host.wait_running().unwrap();
    let mut events = Events::follow(&host).unwrap();
    // Both are known to be up, and their checks have succeeded, so that a hang will be noticed.
    events.until_proven(&host, 2).unwrap();
    (lab, host, events)
}

fn status(host: &Host) -> Value {
    serde_json::from_str(&host.run(["ftctl", "status", "--json"]).unwrap().stdout).unwrap()
}

fn main_pid(host: &Host, unit: &str) -> u64 {
    host.ok(["systemctl", "show", "-P", "MainPID", unit]).unwrap().trim().parse().unwrap()
}

fn serves(host: &Host, port: u16) -> bool {
    let url = format!("http://127.0.0.1:{port}/");
    host.run(["curl", "-sf", "-m", "2", "-o", "/dev/null", &url]).unwrap().success()
}

/// The events of one operation.
fn operation(events: &mut Events, op: &Value) -> Vec<Value> {
    events.seen().iter().filter(|event| &event["op"] == op).cloned().collect()
}

#[test]
fn killed_by_somebody_who_is_named_and_back_at_once() {
    let (_lab, host, mut events) = lab(CONFIG);
    let before = (main_pid(&host, NGINX), host.starts(NGINX).unwrap());
    host.ok(["bash", "-c", &format!("kill -9 {}", before.0)]).unwrap();
    let healed = events.wait_for("healed", NGINX).unwrap();
    assert_eq!((&healed["by"], &healed["main_pid"]), (&"ftd".into(), &main_pid(&host, NGINX).into()));
    let operation = operation(&mut events, &healed["op"]);
    let kinds: Vec<_> = operation.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["down", "decided", "process_died", "healed"], "{operation:#?}");
    let died = &operation[2];
    assert_eq!(died["status"]["signal"]["signal"], 9);
    assert_eq!((&died["main"], &died["sender"]["comm"]), (&true.into(), &"bash".into()), "{died}");
    assert_eq!(operation[0]["cause"], "killed");
    assert!(serves(&host, 80));
    assert_eq!(host.starts(NGINX).unwrap(), before.1 + 1, "healed once, not twice");
}

#[test]
fn an_exit_code_a_crash_and_a_clean_exit_are_told_apart_and_healed() {
    let (_lab, host, mut events) = lab(&format!("{CONFIG}[[workload]]\nname = \"own\"\nunits = [\"own\"]\n"));
    own::start(&host, None).unwrap();
    events.until_proven(&host, 3).unwrap();
    for (signal, cause, code) in [
        (own::exit_signal(3), "exit_code", Some(3)),
        (own::exit_signal(0), "exited", Some(0)),
        (11, "killed", None),
    ] {
        host.sh(&format!("kill -{signal} {}", main_pid(&host, "own"))).unwrap();
        let down = events.wait_for("down", "own.service").unwrap();
        assert_eq!(down["cause"], cause, "{down}");
        events.wait_for("healed", "own.service").unwrap();
        let pid = main_pid(&host, "own");
        assert_ne!(pid, 0);
        let died =
            events.seen().iter().rev().find(|e| e["event"] == "process_died" && e["main"] == true).unwrap();
        assert_eq!(died["status"]["code"].as_u64(), code, "{died}");
    }
}

#[test]
fn a_clean_exit_is_respected_where_that_is_configured_and_an_exit_code_is_not() {
    let own = "[[workload]]\nname = \"own\"\nunits = [\"own\"]\non_exit = \"respect\"\n";
    let (_lab, host, mut events) = lab(&format!("{CONFIG}{own}"));
    own::start(&host, None).unwrap();
    events.until_proven(&host, 3).unwrap();
    let end =
        |code| host.sh(&format!("kill -{} {}", own::exit_signal(code), main_pid(&host, "own"))).unwrap();
    end(0);
    let left = events.wait_for("left", own::UNIT).unwrap();
    assert!(left["why"].as_str().unwrap().contains("on_exit"), "{left}");
    assert_eq!(status(&host)["units"][2]["phase"], "left");
    host.ok(["systemctl", "start", "own"]).unwrap();
    events.wait_for("started", own::UNIT).unwrap();
    let starts = host.starts(own::UNIT).unwrap();
    let decided = |e: &Value| e["event"] == "decided" && e["unit"] == own::UNIT;
    assert!(!events.seen().iter().any(decided), "ftd had no part in it: {:?}", events.seen());
    end(3);
    assert_eq!(events.wait_for("down", own::UNIT).unwrap()["cause"], "exit_code");
    events.wait_for("healed", own::UNIT).unwrap();
    assert_eq!(host.starts(own::UNIT).unwrap(), starts + 1);
}

#[test]
fn the_ooms_victim_is_named_and_the_service_back() {
    let (_lab, host, mut events) = lab(CONFIG);
    let victim = main_pid(&host, NGINX);
    host.ok(["ftctl", "inject", "oom", "nginx"]).unwrap();
    let oom = events.wait_for("oom_kill", NGINX).unwrap();
    assert_eq!((&oom["pid"], &oom["comm"]), (&victim.into(), &"nginx".into()));
    assert_eq!(events.wait_for("down", NGINX).unwrap()["cause"], "oom_killed");
    events.wait_for("healed", NGINX).unwrap();
    assert!(serves(&host, 80));
    // Nothing of the fault is left.
    events.until(&host, LIMIT, |status| status["faults"].as_array().unwrap().is_empty()).unwrap();
    assert_eq!(host.sh("ls /var/lib/ftd/faults").unwrap(), "");
    assert_eq!(host.sh("find /run/cgroup-v1 /sys/fs/cgroup -name 'ftd-fault*'").unwrap(), "");
}

#[test]
fn a_service_that_does_not_answer_is_restarted() {
    let (_lab, host, mut events) = lab(CONFIG);
    host.ok(["ftctl", "inject", "hang", "nginx", "--for", "1min"]).unwrap();
    assert_eq!(events.wait_for("down", NGINX).unwrap()["cause"], "hung");
    let healed = events.wait_for("healed", NGINX).unwrap();
    assert_eq!(healed["by"], "ftd");
    assert!(serves(&host, 80));
    // The fault ends with the run that it was made for, long before its minute is over.
    let over = events.seen_or_next("fault_undone", NGINX).unwrap();
    assert_eq!(over["why"], "healed");
}

#[test]
fn a_service_that_takes_no_connections_is_restarted() {
    let own = "[[workload]]\nname = \"own\"\nunits = [\"own\"]\nhealth = \"tcp://127.0.0.1:7777\"\n\
               health_every = \"100ms\"\nhealth_failures = 2\nhealth_grace = \"100ms\"\n";
    let (_lab, host, mut events) = lab(&format!("{CONFIG}{own}"));
    own::start(&host, Some(7777)).unwrap();
    events.until_proven(&host, 3).unwrap();
    let connect = ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/7777"];
    host.ok(connect).unwrap();
    let before = main_pid(&host, "own");
    host.sh(&format!("kill -USR1 {before}")).unwrap();
    assert_eq!(events.wait_for("down", own::UNIT).unwrap()["cause"], "hung");
    let failed = events.wait_for("health_failed", own::UNIT).unwrap();
    assert_eq!(
        (&failed["check"], &failed["failures"]),
        (&"tcp://127.0.0.1:7777".into(), &2.into()),
        "{failed}"
    );
    let healed = events.wait_for("healed", own::UNIT).unwrap();
    assert_eq!((&healed["by"], &healed["main_pid"]), (&"ftd".into(), &main_pid(&host, "own").into()));
    assert_ne!(main_pid(&host, "own"), before);
    host.ok(connect).unwrap();
}

#[test]
fn a_service_that_a_command_finds_hung_is_restarted() {
    let command = "exec:/usr/bin/curl -sf -m 1 -o /dev/null http://127.0.0.1/";
    let config = CONFIG.replace("health = \"http://127.0.0.1/\"", &format!("health = \"{command}\""));
    let (_lab, host, mut events) = lab(&config);
    host.ok(["ftctl", "inject", "hang", "nginx", "--for", "1min"]).unwrap();
    assert_eq!(events.wait_for("down", NGINX).unwrap()["cause"], "hung");
    assert_eq!(events.wait_for("health_failed", NGINX).unwrap()["check"], command);
    assert_eq!(events.wait_for("healed", NGINX).unwrap()["by"], "ftd");
    assert!(serves(&host, 80));
}

#[test]
fn a_frozen_service_is_restarted_and_pid_1_does_not_hang_on_it() {
    let (_lab, host, mut events) = lab(CONFIG);
    host.sh("echo 1 > /sys/fs/cgroup/system.slice/nginx.service/cgroup.freeze").unwrap();
    assert_eq!(events.wait_for("down", NGINX).unwrap()["cause"], "hung");
    events.wait_for("healed", NGINX).unwrap();
    assert!(serves(&host, 80));
}

#[test]
fn a_dead_worker_is_recorded_and_the_service_not_restarted() {
    let (_lab, host, mut events) = lab(CONFIG);
    let (main, started) = (main_pid(&host, NGINX), host.starts(NGINX).unwrap());
    let worker: u64 = host.sh(&format!("pgrep -P {main} | head -n 1")).unwrap().trim().parse().unwrap();
    host.sh(&format!("kill -9 {worker}")).unwrap();
    let died = events.wait_for("process_died", NGINX).unwrap();
    assert_eq!((&died["pid"], &died["main"]), (&worker.into(), &false.into()));
    let unit = &status(&host)["units"][0];
    assert_eq!((&unit["phase"], &unit["outage"]), (&"up".into(), &Value::Null), "{unit}");
    assert_eq!((main_pid(&host, NGINX), host.starts(NGINX).unwrap()), (main, started));
    // Then the main process, for which something is decided: it is the first thing that is.
    host.sh(&format!("kill -9 {main}")).unwrap();
    let healed = events.wait_for("healed", NGINX).unwrap();
    let nginx = |event: &&Value| event["unit"] == NGINX;
    let acts = |event: &&Value| matches!(event["event"].as_str(), Some("down" | "decided"));
    let acts: Vec<_> = events.seen().iter().filter(nginx).filter(acts).collect();
    assert_eq!(acts.len(), 2, "{acts:#?}");
    assert!(acts.iter().all(|event| event["op"] == healed["op"]), "{acts:#?}");
    assert_eq!(host.starts(NGINX).unwrap(), started + 1);
}

#[test]
fn a_stop_is_respected_or_undone_as_configured() {
    let (_lab, host, mut events) = lab(CONFIG);
    host.ok(["systemctl", "stop", "nginx"]).unwrap();
    assert_eq!(events.wait_for("down", NGINX).unwrap()["cause"], "stopped");
    events.wait_for("healed", NGINX).unwrap();
    assert!(serves(&host, 80));

    host.ok(["systemctl", "stop", "apache2"]).unwrap();
    events.wait_for("left", APACHE).unwrap();
    assert!(!serves(&host, 8080));
    host.ok(["systemctl", "start", "apache2"]).unwrap();
    events.wait_for("started", APACHE).unwrap();
    let healed = events.seen().iter().any(|event| event["unit"] == APACHE && event["event"] == "decided");
    assert!(!healed, "ftd had no part in it: {:?}", events.seen());
}

#[test]
fn a_restart_and_a_reload_by_hand_are_nobody_elses_business() {
    let (_lab, host, mut events) = lab(CONFIG);
    let started = host.starts(NGINX).unwrap();
    host.ok(["systemctl", "restart", "nginx"]).unwrap();
    host.ok(["systemctl", "reload", "nginx"]).unwrap();
    host.ok(["ftctl", "hold", "nginx"]).unwrap();
    events.wait_for("held", NGINX).unwrap();
    let acted = events.seen().iter().any(|event| matches!(event["event"].as_str(), Some("down" | "decided")));
    assert!(!acted, "{:?}", events.seen());
    assert_eq!(host.starts(NGINX).unwrap(), started + 1);
}

#[test]
fn what_systemd_restarts_by_itself_is_not_restarted_twice() {
    let (_lab, host, mut events) = lab(CONFIG);
    // Debian's apache2 has Restart=on-abort.
    let started = host.starts(APACHE).unwrap();
    host.sh(&format!("kill -9 {}", main_pid(&host, APACHE))).unwrap();
    let decided = events.wait_for("decided", APACHE).unwrap();
    assert_eq!(decided["action"], "leave_to_systemd");
    assert_eq!(events.wait_for("healed", APACHE).unwrap()["by"], "systemd");
    assert_eq!(host.starts(APACHE).unwrap(), started + 1);

    // And when systemd gives up at its own limit, ftd goes on.
    let drop_in =
        "[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=2\n[Service]\nRestart=always\nRestartSec=0\n";
    host.sh("mkdir -p /etc/systemd/system/nginx.service.d").unwrap();
    host.write("/etc/systemd/system/nginx.service.d/limit.conf", drop_in).unwrap();
    host.ok(["systemctl", "daemon-reload"]).unwrap();
    let mut healers = Vec::new();
    for _ in 0..3 {
        host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
        healers.push(events.wait_for("healed", NGINX).unwrap()["by"].as_str().unwrap().to_owned());
    }
    assert!(healers.contains(&"systemd".into()) && healers.contains(&"ftd".into()), "{healers:?}");
    assert!(serves(&host, 80));
}

#[test]
fn a_crash_loop_backs_off_ends_in_failed_and_waits_for_a_person() {
    let (_lab, host, mut events) = lab(CONFIG);
    host.sh("cp /etc/nginx/nginx.conf /root/ && echo nonsense >> /etc/nginx/nginx.conf").unwrap();
    let (started, attempts) = (host.starts(NGINX).unwrap(), host.attempts(NGINX).unwrap());
    host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
    let failed = events.wait_for("failed", NGINX).unwrap();
    assert_eq!(failed["attempts"], 6);
    let decided: Vec<_> =
        operation(&mut events, &failed["op"]).into_iter().filter(|e| e["event"] == "decided").collect();
    let delays: Vec<_> = decided.iter().map(|event| event["delay_ms"].as_u64().unwrap()).collect();
    assert_eq!(delays, [0, 50, 100, 200, 400, 800, 0], "the last one is the end");
    assert_eq!(host.run(["ftctl", "status"]).unwrap().status.code(), Some(4));

    // Terminal, for a new ftd too.
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    events.until(&host, LIMIT, |status| status["units"][0]["phase"] == "failed").unwrap();
    host.sh("mv /root/nginx.conf /etc/nginx/nginx.conf").unwrap();
    // It would come up now. This ftd heals, and not that one.
    host.sh(&format!("kill -9 {}", main_pid(&host, APACHE))).unwrap();
    events.wait_for("healed", APACHE).unwrap();
    assert_eq!(status(&host)["units"][0]["phase"], "failed");
    assert_eq!((host.starts(NGINX).unwrap(), host.attempts(NGINX).unwrap()), (started, attempts + 6));
    host.ok(["ftctl", "release", "nginx"]).unwrap();
    events.wait_for("healed", NGINX).unwrap();
    assert!(serves(&host, 80));
    assert_eq!((host.starts(NGINX).unwrap(), host.attempts(NGINX).unwrap()), (started + 1, attempts + 7));
}

#[test]
fn a_held_unit_is_left_alone_until_the_hold_ends() {
    let (_lab, host, mut events) = lab(CONFIG);
    host.ok(["ftctl", "hold", "nginx", "--reason", "upgrade"]).unwrap();
    host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
    assert_eq!(events.wait_for("decided", NGINX).unwrap()["action"], "held");
    let refused = host.run(["ftctl", "inject", "kill", "nginx"]).unwrap();
    assert!(!refused.success() && refused.stderr.contains("is held"), "{refused:?}");

    // The hold outlives ftd.
    host.ok(["systemctl", "kill", "-s", "KILL", "ftd"]).unwrap();
    let mut events = follow_again(&host);
    assert!(!serves(&host, 80));
    assert!(status(&host)["units"][0]["held"].is_object());
    // Held again, now with an end: at that it is healed, with nobody's help.
    host.ok(["ftctl", "hold", "nginx", "--for", "500ms"]).unwrap();
    assert_eq!(events.wait_for("released", NGINX).unwrap()["by"], "time");
    events.wait_for("healed", NGINX).unwrap();
    assert!(serves(&host, 80));
}

/// A follower of the ftd that systemd starts after one was killed.
fn follow_again(host: &Host) -> Events {
    let end = Instant::now() + harness::scaled(LIMIT);
    loop {
        match Events::follow(host) {
            Ok(events) => return events,
            Err(error) => assert!(Instant::now() < end, "{error:#}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_happens_while_ftd_is_away_is_healed_when_it_is_back() {
    let (_lab, host, _events) = lab(CONFIG);
    let apache = main_pid(&host, APACHE);
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    events.until(&host, LIMIT, |status| status["units"][0]["phase"] == "up").unwrap();
    assert!(serves(&host, 80));
    assert_eq!(main_pid(&host, APACHE), apache, "the other was not touched");
}

#[test]
fn a_bus_that_is_gone_and_a_systemd_that_executes_itself_anew_do_not_stop_healing() {
    let (_lab, host, mut events) = lab(CONFIG);
    // The message bus: ftd does not need it.
    host.ok(["systemctl", "stop", "dbus.socket", "dbus.service"]).unwrap();
    host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
    events.wait_for("healed", NGINX).unwrap();
    host.ok(["systemctl", "start", "dbus.socket"]).unwrap();
    // systemd itself.
    host.ok(["systemctl", "daemon-reexec"]).unwrap();
    events.wait("bus_back", LIMIT, |event| event["event"] == "bus_back").unwrap();
    host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
    events.wait_for("healed", NGINX).unwrap();
    assert!(serves(&host, 80));
}

#[test]
fn a_fault_does_not_outlive_the_ftd_that_injected_it() {
    let (_lab, host, mut events) = lab(&CONFIG.replace("health = \"http://127.0.0.1/\"", ""));
    host.ok(["ftctl", "inject", "hang", "nginx", "--for", "1h"]).unwrap();
    let id = events.wait_for("fault_injected", NGINX).unwrap()["id"].clone();
    assert!(!serves(&host, 80));
    host.ok(["systemctl", "kill", "-s", "KILL", "ftd"]).unwrap();
    let mut events = follow_again(&host);
    events.until(&host, LIMIT, |status| status["faults"].as_array().unwrap().is_empty()).unwrap();
    assert!(serves(&host, 80), "it goes on, never having been restarted");
    let undone: Vec<_> = harness::events::all(&host)
        .unwrap()
        .into_iter()
        .filter(|e| e["event"] == "fault_undone" && e["id"] == id)
        .collect();
    assert_eq!(undone.len(), 1);
    assert_eq!(undone[0]["why"], "ftd started again");
}

/// The numbers, once this one is there: they follow events, and are not waited for by them.
fn numbers_once(host: &Host, name: &str, labels: &[(&str, &str)], value: f64) -> Metrics {
    let end = Instant::now() + harness::scaled(LIMIT);
    loop {
        let metrics = Metrics::of(host).unwrap();
        if metrics.value(name, labels) == value {
            return metrics;
        }
        assert!(Instant::now() < end, "{name} {labels:?} did not become {value}: {metrics:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn numbers_for_prometheus_move_with_what_happens() {
    let listen = "[status]\nlisten = \"127.0.0.1:7480\"\n";
    let (_lab, host, mut events) = lab(&format!("{listen}{CONFIG}"));
    let nginx = [("unit", NGINX), ("node", "vm1")];
    let before = Metrics::of(&host).unwrap();
    assert_eq!(before.value("ftd_unit_serving", &nginx), 1.0);
    assert_eq!(before.value("ftd_systemd_up", &[]), 1.0);
    assert_eq!(before.value("ftd_heal_seconds_count", &nginx), 0.0);

    host.sh(&format!("kill -9 {}", main_pid(&host, NGINX))).unwrap();
    let healed = events.wait_for("healed", NGINX).unwrap();
    let after = numbers_once(&host, "ftd_heal_seconds_count", &[nginx[0], ("by", "ftd")], 1.0);
    assert_eq!(after.value("ftd_heal_seconds_sum", &nginx), healed["took_ms"].as_f64().unwrap() / 1e3);
    assert_eq!(after.value("ftd_outages_total", &[nginx[0], ("cause", "killed")]), 1.0);
    assert!(after.value("ftd_process_deaths_total", &[nginx[0], ("how", "signal")]) >= 1.0);
    assert_eq!(after.value("ftd_decision_seconds_count", &[nginx[0], ("action", "start")]), 1.0);
    assert!(after.value("ftd_probe_delivered_total", &[]) > before.value("ftd_probe_delivered_total", &[]));

    host.ok(["ftctl", "hold", "nginx"]).unwrap();
    host.ok(["ftctl", "inject", "hang", "httpd", "--for", "1min"]).unwrap();
    let held = numbers_once(&host, "ftd_unit_held", &nginx, 1.0);
    assert_eq!(held.value("ftd_unit_held", &[("unit", APACHE)]), 0.0);
    numbers_once(&host, "ftd_faults_injected_total", &[("unit", APACHE), ("fault", "hang")], 1.0);
    host.ok(["ftctl", "inject", "recover"]).unwrap();
    numbers_once(&host, "ftd_faults_active", &[("unit", APACHE)], 0.0);

    // For everybody, where a status is offered on TCP: the same families, as Prometheus wants them.
    let text = host.ok(["curl", "-sf", "-i", "http://127.0.0.1:7480/metrics"]).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert_eq!(Metrics::parse(body).unwrap().families(), held.families());
    // What is counted is told to operators, each by its name.
    let guide = include_str!("../../docs/operations.md");
    for family in held.families() {
        assert!(guide.contains(&format!("`{family}`")), "{family} is not in operations.md");
    }
}

/// A check that notes each question, and says no once somebody has made a file.
const ASKED: &str = r#"
[[workload]]
name = "own"
units = ["own"]
health = "exec:/usr/local/bin/asked"
health_every = "100ms"
health_failures = 4
health_grace = "5s"
"#;

#[test]
fn a_hang_while_ftd_is_away_is_found_with_as_many_questions_as_any_other() {
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", BootOptions::with_config(ASKED)).unwrap();
    host.wait_running().unwrap();
    let mut check = "#!/bin/sh\necho >> /run/asked\n".to_owned();
    check.push_str(
        "! [ -e /run/hangs ] || [ \"$(systemctl show -P MainPID own)\" != \"$(cat /run/hangs)\" ]\n",
    );
    host.write("/usr/local/bin/asked", check).unwrap();
    host.sh("chmod +x /usr/local/bin/asked").unwrap();
    own::start(&host, None).unwrap();
    let mut events = Events::follow(&host).unwrap();
    events.until_proven(&host, 1).unwrap();
    // Long after the time in which failures do not count, which must not begin again with the new ftd.
    events.until_settled(&host, Duration::from_secs(5)).unwrap();
    let old = main_pid(&host, own::UNIT);
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    host.sh(&format!("echo {old} > /run/hangs; rm -f /run/asked")).unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    let hung = |e: &Value| e["event"] == "down" && e["unit"] == own::UNIT;
    let said = harness::events::all(&host).unwrap();
    let ready = said.iter().rposition(|e| e["event"] == "agent_ready").unwrap();
    if !said[ready..].iter().any(hung) {
        events.wait("the hang", LIMIT, hung).unwrap();
    }
    // At most one more question was asked before the unit was seen to be on its way down.
    let asked: u32 = host.sh("wc -l < /run/asked").unwrap().trim().parse().unwrap();
    assert!((4..=5).contains(&asked), "{asked} questions were asked until the hang was found");
    events.until_proven(&host, 1).unwrap();
    assert_ne!(main_pid(&host, own::UNIT), old);
}
