//! Running services saved to images and brought back as the systemd units that they were: real CRIU, real systemd.
//!
//! As root: `cargo xtask test --only snapshot`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::collections::BTreeSet;
use std::path::Path;

use harness::criu::{self, WORKER, WORKER_PORT};
use harness::{BootOptions, Host, Lab};
use serde_json::Value;

/// For images: a service sees the host's own directory there.
const IMAGES: &str = "/var/lib/ftd-test";

fn lab() -> (Lab, Host) {
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", BootOptions::default()).unwrap();
    host.wait_running().unwrap();
    criu::prepare(&host).unwrap();
    (lab, host)
}

fn worker(host: &Host, arguments: &str, settings: &str) {
    criu::start_worker(host, Path::new(env!("CARGO_BIN_EXE_worker")), arguments, settings).unwrap();
}

fn show(host: &Host, unit: &str, property: &str) -> String {
    host.ok(["systemctl", "show", "-P", property, unit]).unwrap().trim().to_owned()
}

fn get(host: &Host, path: &str) -> Value {
    let url = format!("http://127.0.0.1:{WORKER_PORT}{path}");
    serde_json::from_str(&host.ok(["curl", "-sf", "-m", "5", &url]).unwrap()).unwrap()
}

fn give(host: &Host, tasks: impl IntoIterator<Item = u64>) {
    for task in tasks {
        let url = format!("http://127.0.0.1:{WORKER_PORT}/task/{task}");
        host.ok(["curl", "-sf", "-m", "5", "-X", "POST", &url]).unwrap();
    }
}

fn serves(host: &Host, port: u16) -> bool {
    let url = format!("http://127.0.0.1:{port}/");
    host.run(["curl", "-sf", "-m", "2", "-o", "/dev/null", &url]).unwrap().success()
}

/// What is printed as JSON, or what it says in its error.
fn json(host: &Host, words: &[&str]) -> Result<Value, String> {
    let output = host.run(words).unwrap();
    if output.success() { Ok(serde_json::from_str(&output.stdout).unwrap()) } else { Err(output.stderr) }
}

fn dump(host: &Host, unit: &str, name: &str, stop: bool) -> Result<Value, String> {
    let dir = format!("{IMAGES}/{name}");
    let mut words = vec!["ftd", "dump-unit", unit, &dir];
    words.extend(stop.then_some("--stop"));
    json(host, &words)
}

fn restore(host: &Host, unit: &str, name: &str) -> Result<Value, String> {
    json(host, &["ftd", "restore-unit", unit, &format!("{IMAGES}/{name}")])
}

/// The processes of a unit, by its control group.
fn processes(host: &Host, unit: &str) -> BTreeSet<u32> {
    let group = show(host, unit, "ControlGroup");
    let text = host.sh(&format!("cat /sys/fs/cgroup{group}/cgroup.procs")).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// Nothing of ftd's or CRIU's is left but the images.
fn assert_nothing_left(host: &Host) {
    let left =
        host.sh("find /run/systemd/system -name '*ftd*'; find /run -name '*ftd-restore*'; nft list tables");
    assert_eq!(left.unwrap(), "");
    let need = host.sh("systemctl show -P NeedDaemonReload nginx apache2").unwrap();
    assert!(!need.contains("yes"), "{need}");
}

#[test]
fn services_go_on_while_they_are_saved() {
    let (_lab, host) = lab();
    worker(&host, "--memory 16 --dirty 50", "");
    give(&host, 1..=20);
    let before = get(&host, "/total");
    for (unit, name) in [("nginx", "nginx"), ("apache2", "apache2"), ("worker", "worker")] {
        let service = format!("{unit}.service");
        let (main, all) = (show(&host, &service, "MainPID"), processes(&host, &service));
        let image = dump(&host, unit, name, false).unwrap();
        assert_eq!(image["main_pid"].to_string(), main);
        let frozen = image["cost"]["frozen_us"].as_u64().unwrap();
        assert!(frozen > 0 && frozen <= image["cost"]["took_us"].as_u64().unwrap(), "{image}");
        assert_eq!(show(&host, &service, "MainPID"), main);
        assert_eq!(processes(&host, &service), all);
        assert_eq!(show(&host, &service, "ActiveState"), "active");
        println!("{unit}: frozen {frozen} us of {} us", image["cost"]["took_us"]);
    }
    assert!(serves(&host, 80) && serves(&host, 8080));
    assert_eq!(get(&host, "/total"), before);
    assert_eq!(get(&host, "/memory")["bad"], 0);
    assert_nothing_left(&host);
}

#[test]
fn the_worker_comes_back_as_the_unit_that_it_was_and_forgets_nothing() {
    let (_lab, host) = lab();
    worker(&host, "--memory 16 --dirty 50 --task-ms 20", "");
    let main = show(&host, WORKER, "MainPID");
    // Some done, some waiting.
    give(&host, 1..=20);
    dump(&host, "worker", "one", true).unwrap();
    assert_eq!(
        (show(&host, WORKER, "ActiveState").as_str(), show(&host, WORKER, "MainPID").as_str()),
        ("inactive", "0")
    );
    assert_eq!(show(&host, WORKER, "Result"), "success");

    let restored = restore(&host, "worker", "one").unwrap();
    assert_eq!(restored["main_pid"].to_string(), main);
    assert_eq!(show(&host, WORKER, "MainPID"), main);
    assert_eq!(show(&host, WORKER, "ActiveState"), "active");
    assert_eq!(show(&host, WORKER, "ControlGroup"), "/system.slice/worker.service");
    assert_eq!(processes(&host, WORKER), BTreeSet::from([main.parse().unwrap()]));
    assert_eq!(show(&host, WORKER, "Type"), "notify");
    assert_nothing_left(&host);

    // What it prints goes to the journal as before.
    give(&host, 21..=30);
    host.sh(&format!(
        "for i in $(seq 100); do curl -sf http://127.0.0.1:{WORKER_PORT}/total | grep -q '\"done\":30' && break; sleep 0.05; done"
    ))
    .unwrap();
    let total = get(&host, "/total");
    assert_eq!(
        (&total["queued"], &total["done"], &total["sum"]),
        (&0.into(), &30.into(), &465.into()),
        "{total}"
    );
    let check = (1..=30).fold(0_u64, |check, task| check.wrapping_add(criu::result(task)));
    assert_eq!(total["check"], format!("{check:016x}"));
    assert_eq!(get(&host, "/memory")["bad"], 0);
    host.ok(["systemctl", "reload", "worker"]).unwrap();
    // The watchdog's limit is 5 s: it is fed, and it still bites.
    host.sh("sleep 6").unwrap();
    assert_eq!(show(&host, WORKER, "MainPID"), main);
    host.ok(["systemctl", "stop", "worker"]).unwrap();
    assert_eq!(show(&host, WORKER, "Result"), "success");
    host.ok(["journalctl", "--sync"]).unwrap();
    let journal =
        host.ok(["journalctl", "--no-pager", "-o", "cat", "-t", "ftd-test-worker", "-u", "worker"]).unwrap();
    for line in ["task 30 done", "reloaded", "worker ends"] {
        assert!(journal.lines().any(|found| found == line), "{line}: {journal}");
    }

    // And an ordinary start is one again.
    host.ok(["systemctl", "start", "worker"]).unwrap();
    assert_eq!(get(&host, "/total")["done"], 0);
}

/// About as closed as a unit can be.
const HARDENED: &str = "User=www-data\nRuntimeDirectory=worker\nPrivateTmp=yes\nPrivateDevices=yes\nProtectHome=yes\n\
    ProtectSystem=strict\nProtectKernelTunables=yes\nProtectKernelModules=yes\nProtectKernelLogs=yes\n\
    ProtectControlGroups=yes\nProtectClock=yes\nProtectHostname=yes\nNoNewPrivileges=yes\nCapabilityBoundingSet=\n\
    SystemCallFilter=@system-service\nSystemCallArchitectures=native\nRestrictNamespaces=yes\nRestrictRealtime=yes\n\
    RestrictSUIDSGID=yes\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\nMemoryDenyWriteExecute=yes\n\
    LockPersonality=yes";

#[test]
fn a_hardened_service_is_as_closed_as_before_and_has_its_own_files() {
    let (_lab, host) = lab();
    worker(&host, "", HARDENED);
    give(&host, 1..=3);
    let main = show(&host, WORKER, "MainPID");
    let powers = || {
        let fields = "^(Uid|Gid|Cap|NoNewPrivs|Seccomp)";
        host.sh(&format!("grep -E '{fields}' /proc/{main}/status")).unwrap()
    };
    let own = |path: &str| format!("/proc/{main}/root{path}");
    let before = powers();
    assert!(before.contains("Seccomp:\t2") && before.contains("NoNewPrivs:\t1"), "{before}");
    host.sh(&format!("echo private > {}; echo run > /run/worker/x", own("/tmp/x"))).unwrap();
    for round in 0..3 {
        let name = format!("hard-{round}");
        dump(&host, "worker", &name, true).unwrap();
        restore(&host, "worker", &name).unwrap();
        assert_eq!(show(&host, WORKER, "MainPID"), main);
        assert_eq!(powers(), before);
        assert_eq!(host.sh(&format!("cat {} /run/worker/x", own("/tmp/x"))).unwrap(), "private\nrun\n");
        assert_eq!(
            host.sh(&format!("stat -c %U /run/worker {}", own("/run/worker/x"))).unwrap(),
            "www-data\nroot\n"
        );
        // Read-only, as it was.
        for path in ["/usr/x", "/proc/sys/kernel/x"] {
            assert!(!host.run(["nsenter", "-t", &main, "-m", "touch", path]).unwrap().success(), "{path}");
        }
        assert_nothing_left(&host);
    }
    assert_eq!(get(&host, "/total")["sum"], 6);
    host.sh("sleep 6").unwrap();
    assert_eq!(show(&host, WORKER, "MainPID"), main);
    host.ok(["systemctl", "restart", "worker"]).unwrap();
    assert_eq!(get(&host, "/total")["sum"], 0);
}

#[test]
fn web_servers_come_back_as_the_units_that_they_were() {
    let (_lab, host) = lab();
    for (unit, port) in [("nginx", 80), ("apache2", 8080)] {
        let service = format!("{unit}.service");
        let (main, all) = (show(&host, &service, "MainPID"), processes(&host, &service));
        for round in 0..3 {
            let name = format!("{unit}-{round}");
            dump(&host, unit, &name, true).unwrap();
            assert!(!serves(&host, port));
            assert_eq!(show(&host, &service, "ActiveState"), "inactive");
            restore(&host, unit, &name).unwrap();
            assert_eq!(
                (show(&host, &service, "MainPID"), processes(&host, &service)),
                (main.clone(), all.clone())
            );
            assert!(serves(&host, port));
            assert_nothing_left(&host);
        }
        host.ok(["systemctl", "reload", unit]).unwrap();
        assert!(serves(&host, port));
        assert_eq!(show(&host, &service, "MainPID"), main);
        host.ok(["systemctl", "stop", unit]).unwrap();
        assert!(!serves(&host, port));
        assert_eq!(processes_left(&host, &service), "");
        host.ok(["systemctl", "start", unit]).unwrap();
        assert!(serves(&host, port));
    }
}

fn processes_left(host: &Host, unit: &str) -> String {
    host.sh(&format!("cat /sys/fs/cgroup/system.slice/{unit}/cgroup.procs 2>/dev/null || true")).unwrap()
}

#[test]
fn what_cannot_be_restored_is_refused_before_anything_is_touched() {
    let (_lab, host) = lab();
    worker(&host, "", "");
    // It runs.
    dump(&host, "worker", "one", false).unwrap();
    let refused = restore(&host, "worker", "one").unwrap_err();
    assert!(refused.contains("worker.service is active"), "{refused}");
    // Images of another unit.
    let refused = restore(&host, "nginx", "one").unwrap_err();
    assert!(refused.contains("not of nginx.service"), "{refused}");
    // Its PID is taken.
    let main: u32 = show(&host, WORKER, "MainPID").parse().unwrap();
    host.ok(["systemctl", "stop", "worker"]).unwrap();
    let image: Value = serde_json::from_str(&host.read(format!("{IMAGES}/one/unit.json")).unwrap()).unwrap();
    host.sh(&format!(
        "systemd-cat criu restore -D {IMAGES}/one --restore-detached --manage-cgroups=ignore --tcp-established \
         --file-locks --ext-unix-sk --inherit-fd 'fd[1]:socket:[{}]'",
        image["journal"][0]
    ))
    .unwrap();
    let refused = restore(&host, "worker", "one").unwrap_err();
    assert!(refused.contains(&format!("PID {main} belongs to ftd-test-worker")), "{refused}");
    host.sh(&format!("kill -9 {main}; while [ -e /proc/{main} ]; do sleep 0.01; done")).unwrap();
    // Another program.
    host.sh("mv /usr/local/sbin/ftd-test-worker /root/ && cp /bin/true /usr/local/sbin/ftd-test-worker")
        .unwrap();
    let refused = restore(&host, "worker", "one").unwrap_err();
    assert!(refused.contains("/usr/local/sbin/ftd-test-worker has"), "{refused}");
    host.sh("mv /root/ftd-test-worker /usr/local/sbin/").unwrap();
    assert_eq!(show(&host, WORKER, "ActiveState"), "inactive");
    assert_nothing_left(&host);
    restore(&host, "worker", "one").unwrap();
    assert_eq!(show(&host, WORKER, "MainPID"), main.to_string());
}

#[test]
fn check_names_what_is_in_the_way_and_touches_nothing() {
    let (_lab, host) = lab();
    worker(&host, "", "");
    for unit in ["nginx", "httpd", "worker"] {
        let output = host.run(["ftctl", "check", unit, "--json"]).unwrap();
        let report: Value = serde_json::from_str(&output.stdout).unwrap();
        assert!(output.success(), "{report:#}");
        assert_eq!(report["criu"]["version"]["major"], 4, "{report:#}");
    }
    let text = host.ok(["ftctl", "check", "nginx"]).unwrap();
    assert!(text.contains("ready"), "{text}");

    // A device; and a stopped unit.
    let program = "import os, time\nos.open('/dev/fuse', os.O_RDWR)\ntime.sleep(1000)\n";
    host.write("/root/odd.py", program).unwrap();
    host.write("/etc/systemd/system/odd.service", "[Service]\nExecStart=/usr/bin/python3 /root/odd.py\n")
        .unwrap();
    host.sh("systemctl daemon-reload && systemctl start odd && sleep 1").unwrap();
    let main = show(&host, "odd.service", "MainPID");
    let output = host.run(["ftctl", "check", "odd"]).unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", output.stdout);
    assert!(output.stdout.contains("/dev/fuse (10:229) is open"), "{}", output.stdout);
    let refused = dump(&host, "odd", "odd", true).unwrap_err();
    assert!(refused.contains("odd.service cannot be dumped") && refused.contains("/dev/fuse"), "{refused}");
    assert_eq!(show(&host, "odd.service", "MainPID"), main);
    host.ok(["systemctl", "stop", "odd"]).unwrap();
    let refused = dump(&host, "odd", "odd", true).unwrap_err();
    assert!(refused.contains("no process to dump"), "{refused}");
    let unknown = host.run(["ftctl", "check", "no-such"]).unwrap();
    assert!(unknown.status.code() == Some(1) && unknown.stderr.contains("not-found"), "{unknown:?}");
    let doctor = host.run(["ftctl", "doctor"]).unwrap();
    assert!(doctor.stdout.contains("CRIU: "), "{}", doctor.stdout);
}
