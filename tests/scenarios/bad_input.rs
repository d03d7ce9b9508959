//! What a real host throws at ftd besides dying services: nonsense in the configuration, a full disk, an
//! unreadable file, a kernel without BTF. Each is said with thing, cause and mend; nothing is lost; ftd goes
//! on.
//!
//! As root: `cargo xtask test --only bad_input`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::{Duration, Instant};

use harness::{BootOptions, Events, Host, Lab};
use serde_json::Value;

const NGINX: &str = "nginx.service";
const LIMIT: Duration = Duration::from_secs(20);
const CONFIG: &str = "[[workload]]\nname = \"web\"\nunits = [\"nginx\"]\n";

fn boot(config: &str) -> (Lab, Host) {
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", BootOptions::with_config(config)).unwrap();
    host.wait_running().unwrap();
    (lab, host)
}

fn kill_nginx(host: &Host) {
    host.sh("kill -9 $(systemctl show -P MainPID nginx)").unwrap();
}

fn all_events(host: &Host) -> Vec<Value> {
    harness::events::all(host).unwrap()
}

/// The first of all events that `wanted` likes, when it has come: it may have come before anybody could follow.
fn said(host: &Host, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + harness::scaled(LIMIT);
    loop {
        let all = all_events(host);
        if let Some(event) = all.iter().find(|event| wanted(event)) {
            return event.clone();
        }
        assert!(Instant::now() < end, "{what} was not said: {all:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn nonsense_in_the_configuration_is_explained_and_ftd_does_not_start_over_and_over() {
    let (_lab, host) = boot(CONFIG);
    host.write("/etc/ftd/ftd.toml", "[heal]\nrestart = 3\n").unwrap();
    let checked = host.run(["ftctl", "config", "check"]).unwrap();
    assert_eq!(checked.status.code(), Some(1));
    let text = &checked.stderr;
    assert!(text.contains("/etc/ftd/ftd.toml:2:1: unknown key \"restart\""), "{text}");
    assert!(text.contains("did you mean \"restarts\""), "{text}");

    assert!(!host.run(["systemctl", "restart", "ftd"]).unwrap().success());
    assert_eq!(host.ok(["systemctl", "show", "-P", "ExecMainStatus", "ftd"]).unwrap().trim(), "78");
    assert_eq!(host.ok(["systemctl", "show", "-P", "SubState", "ftd"]).unwrap().trim(), "failed");
    assert!(host.ok(["journalctl", "-u", "ftd", "-o", "cat"]).unwrap().contains("did you mean \"restarts\""));

    let without = host.run(["ftctl", "status"]).unwrap();
    assert_eq!(without.status.code(), Some(3));
    assert!(without.stderr.contains("systemctl start ftd"), "{}", without.stderr);
    // An unreadable file: said as such.
    let unreadable = host.run(["ftctl", "config", "check", "/etc/ftd"]).unwrap();
    assert!(unreadable.stderr.contains("/etc/ftd: cannot be read"), "{}", unreadable.stderr);

    host.write("/etc/ftd/ftd.toml", CONFIG).unwrap();
    host.ok(["systemctl", "reset-failed", "ftd"]).unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    Events::follow(&host).unwrap().until_proven(&host, 1).unwrap();
    assert!(host.run(["ftctl", "status"]).unwrap().success());
}

#[test]
fn units_that_are_missing_masked_or_broken_are_said_and_taken_up_when_mended() {
    let units = "[[workload]]\nname = \"odd\"\nunits = [\"ghost\", \"masked\", \"broken\"]\n";
    let (_lab, host) = boot(&format!("{CONFIG}{units}"));
    host.write("/etc/systemd/system/broken.service", "[Service]\nType=nonsense\n").unwrap();
    host.sh("systemctl mask masked && systemctl daemon-reload").unwrap();
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    let problem = |unit: &str, word: &str| {
        said(&host, &format!("{unit}: {word}"), |event| {
            event["event"] == "unit_problem"
                && event["unit"] == unit
                && event["problem"].as_str().unwrap().contains(word)
        });
    };
    problem("ghost.service", "no such unit");
    problem("masked.service", "masked");
    problem("broken.service", "bad-setting");
    let doctor = host.run(["ftctl", "doctor"]).unwrap();
    assert_eq!(doctor.status.code(), Some(4), "{}", doctor.stdout);

    // To look for what is not there costs next to nothing: once systemd's announcements of such looks were
    // followed by looks, for ever, which took a whole CPU.
    let ticks =
        "awk '{ n += $14 + $15 } END { print n }' /proc/1/stat /proc/$(systemctl show -P MainPID ftd)/stat";
    let used = host.sh(&format!("a=$({ticks}); sleep 1; b=$({ticks}); echo $((b - a))")).unwrap();
    assert!(used.trim().parse::<u32>().unwrap() < 30, "{used} hundredths of a second of CPU in one second");

    // Mended: it is under care from then on.
    host.write("/etc/systemd/system/ghost.service", "[Service]\nExecStart=/bin/sleep infinity\n").unwrap();
    host.sh("systemctl daemon-reload && systemctl start ghost").unwrap();
    events.wait_for("unit_found", "ghost.service").unwrap();
    host.sh("kill -9 $(systemctl show -P MainPID ghost)").unwrap();
    events.wait_for("healed", "ghost.service").unwrap();
}

#[test]
fn a_health_check_that_never_succeeded_restarts_nothing() {
    let check = "health = \"http://127.0.0.1:9/\"\nhealth_every = \"100ms\"\nhealth_grace = \"100ms\"\n";
    let (_lab, host) = boot(&format!("{CONFIG}{check}"));
    let before = host.ok(["systemctl", "show", "-P", "MainPID", NGINX]).unwrap();
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let failed = said(&host, "health_failed", |e| e["event"] == "health_failed" && e["unit"] == NGINX);
    assert_eq!(failed["proven"], false);
    assert!(host.ok(["ftctl", "doctor"]).unwrap().contains("has never succeeded"));
    assert_eq!(host.ok(["systemctl", "show", "-P", "MainPID", NGINX]).unwrap(), before);
}

#[test]
fn a_full_disk_under_the_journal_loses_nothing_and_stops_nothing() {
    let heal = "[heal]\nrestarts = 1000\nbackoff = \"1ms\"\nsettle = \"1ms\"\n";
    let (_lab, host) = boot(&format!("{heal}{CONFIG}"));
    // A small file system of its own for ftd's state, filled by somebody else.
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    host.sh("mount -t tmpfs -o size=2m,mode=750 tmpfs /var/lib/ftd").unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    host.sh("dd if=/dev/zero of=/var/lib/ftd/hog bs=4k 2>/dev/null || true").unwrap();
    // A few events still fit into the journal's last page.
    let blocked = |events: &mut Events| events.seen().iter().any(|event| event["event"] == "journal_blocked");
    let mut kills = 0;
    while !blocked(&mut events) {
        kill_nginx(&host);
        events.wait_for("healed", NGINX).unwrap();
        kills += 1;
        assert!(kills < 50, "the disk is not full");
    }
    for _ in 0..3 {
        kill_nginx(&host);
        events.wait_for("healed", NGINX).unwrap();
        kills += 1;
    }
    host.sh("rm /var/lib/ftd/hog").unwrap();
    let back = events.wait("journal_back", LIMIT, |event| event["event"] == "journal_back").unwrap();
    assert_eq!(back["lost"], 0);
    // All of it is on the disk now: a new ftd reads it back without a gap.
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let all = all_events(&host);
    let healed = all.iter().filter(|event| event["event"] == "healed").count();
    assert_eq!(healed, kills);
    let numbers: Vec<u64> = all.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

#[test]
fn a_damaged_journal_and_a_damaged_state_file_are_said_and_survived() {
    let (_lab, host) = boot(CONFIG);
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    host.sh(
        "printf torn >> $(ls /var/lib/ftd/journal/*.log | tail -n 1); printf '{' > /var/lib/ftd/heal.json",
    )
    .unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    let all = all_events(&host);
    let repaired: Vec<_> = all.iter().filter(|event| event["event"] == "journal_repaired").collect();
    assert_eq!(repaired.len(), 1, "{all:#?}");
    assert_eq!(repaired[0]["bytes"], 4);
    let damaged: Vec<_> = all.iter().filter(|event| event["event"] == "state_damaged").collect();
    assert_eq!(damaged.len(), 1, "{all:#?}");
    assert_eq!(host.sh("cat /var/lib/ftd/heal.json.damaged").unwrap(), "{");
    kill_nginx(&host);
    events.wait_for("healed", NGINX).unwrap();
}

#[test]
fn without_ebpf_ftd_says_so_and_heals_all_the_same() {
    let (_lab, host) = boot(CONFIG);
    // A kernel that does not describe its types, as ftd sees it.
    host.sh("mkdir -p /etc/systemd/system/ftd.service.d && printf '[Service]\\nInaccessiblePaths=/sys/kernel/btf\\n' > /etc/systemd/system/ftd.service.d/nobtf.conf && systemctl daemon-reload").unwrap();
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    let said =
        all_events(&host).into_iter().rev().find(|event| event["event"] == "probe_unavailable").unwrap();
    assert!(said["cause"].as_str().unwrap().contains("/sys/kernel/btf/vmlinux"), "{said}");
    let doctor = host.run(["ftctl", "doctor"]).unwrap().stdout;
    assert!(doctor.contains("watching through pidfd and D-Bus"), "{doctor}");
    for how in ["kill -9", "kill -SEGV", "kill -TERM"] {
        host.sh(&format!("{how} $(systemctl show -P MainPID nginx)")).unwrap();
        events.wait_for("healed", NGINX).unwrap();
    }
    // Switched off by hand: the same.
    host.write("/etc/ftd/ftd.toml", format!("[probe]\nebpf = false\n{CONFIG}")).unwrap();
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    kill_nginx(&host);
    events.wait_for("healed", NGINX).unwrap();
}

#[test]
fn requests_that_make_no_sense_are_refused_with_a_mend() {
    let (_lab, host) = boot(CONFIG);
    let refused = |words: &[&str], code: i32, text: &str| {
        let output = host.run(words).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        assert!(output.stderr.contains(text), "{words:?}: {}", output.stderr);
    };
    refused(
        &["ftctl", "hold", "apache2"],
        1,
        "apache2.service is not under ftd's care; under care: nginx.service",
    );
    refused(&["ftctl", "inject", "kill", "nginx"], 1, "set enabled = true under [inject]");
    refused(&["ftctl", "hold", "nginx", "--for", "soon"], 2, "soon");
    refused(&["ftctl", "events", "--since", "yore"], 2, "neither a time like");
    refused(&["ftctl", "dance"], 2, "unrecognized subcommand");
    // Who is not in the group may not even look.
    refused(&["setpriv", "--reuid=33", "--clear-groups", "ftctl", "status"], 3, "member of the group ftd");
    Events::follow(&host).unwrap().until_proven(&host, 1).unwrap();
    let member =
        ["sh", "-c", "setpriv --reuid=33 --regid=33 --groups $(getent group ftd | cut -d: -f3) ftctl status"];
    assert!(host.run(member).unwrap().success());
}

#[test]
fn the_status_on_tcp_only_reads() {
    let (_lab, host) = boot(&format!("[status]\nlisten = \"127.0.0.1:7480\"\n{CONFIG}"));
    Events::follow(&host).unwrap().until_proven(&host, 1).unwrap();
    // Nothing tells when the port is open.
    host.sh(
        "curl -sf -o /dev/null --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:7480/healthz",
    )
    .unwrap();
    let curl = |words: &str| {
        host.run(["sh", "-c", &format!("curl -s -o /dev/null -w '%{{http_code}}' {words}")]).unwrap().stdout
    };
    assert_eq!(curl("http://127.0.0.1:7480/healthz"), "200");
    assert_eq!(curl("http://127.0.0.1:7480/v1/status"), "200");
    let hold =
        "-X POST -H 'content-type: application/json' -d '{\"unit\":\"nginx\"}' http://127.0.0.1:7480/v1/hold";
    assert_eq!(curl(hold), "404");
    // Not well: a unit that cannot be brought back.
    host.sh("mv /usr/sbin/nginx /usr/sbin/nginx.away; kill -9 $(systemctl show -P MainPID nginx)").unwrap();
    let mut events = Events::follow(&host).unwrap();
    if !all_events(&host).iter().any(|event| event["event"] == "heal_failed") {
        events.wait_for("heal_failed", NGINX).unwrap();
    }
    assert_eq!(curl("http://127.0.0.1:7480/healthz"), "503");
}
