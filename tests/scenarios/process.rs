//! Services under ftd's care whose memory is kept: snapshots on time, by hand, and back, with ftd alive, dying and dead.
//! The worker's totals tell whether anything of it was lost.
//!
//! As root: `cargo xtask test --only process`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::path::Path;
use std::time::Duration;

use harness::criu::{self, WORKER, WORKER_PORT};
use harness::{BootOptions, Events, Host, Lab};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

/// The worker under care, with this in its workload's section.
fn boot(arguments: &str, settings: &str, section: &str) -> (Lab, Host, Events) {
    let config = format!(
        "[snapshot]\ngood_after = \"500ms\"\nretry = \"1s\"\n[[workload]]\nname = \"jobs\"\nunits = [\"worker\"]\n\
         health = \"http://127.0.0.1:{WORKER_PORT}/total\"\nhealth_every = \"200ms\"\n{section}"
    );
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", BootOptions::with_config(config)).unwrap();
    host.wait_running().unwrap();
    criu::prepare(&host).unwrap();
    let events = Events::follow(&host).unwrap();
    criu::start_worker(&host, Path::new(env!("CARGO_BIN_EXE_worker")), arguments, settings).unwrap();
    (lab, host, events)
}

fn show(host: &Host, property: &str) -> String {
    host.ok(["systemctl", "show", "-P", property, WORKER]).unwrap().trim().to_owned()
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

/// What a command prints as JSON, and its exit code; or what it says in its error.
fn ftctl(host: &Host, words: &[&str]) -> Result<(i32, Value), String> {
    let out = host.run([&["ftctl", "--json"], words].concat()).unwrap();
    let value = serde_json::from_str(&out.stdout).map_err(|_| out.stderr.clone())?;
    Ok((out.status.code().unwrap(), value))
}

/// The workload in ftd's status.
fn snapshots(status: &Value) -> &Value {
    &status["snapshots"][0]
}

/// Waits until a snapshot is good that was begun after this was called.
fn wait_good(host: &Host, events: &mut Events) -> u64 {
    let newest =
        events.until(host, LIMIT, |status| snapshots(status)["newest"]["generation"].is_u64()).unwrap();
    // One that is being taken now may be of before.
    let after = snapshots(&newest)["newest"]["generation"].as_u64().unwrap() + 1;
    let good = |status: &Value| snapshots(status)["good"]["generation"].as_u64() > Some(after);
    let status = events.until(host, LIMIT, good).unwrap();
    snapshots(&status)["good"]["generation"].as_u64().unwrap()
}

/// Nothing is left of any operation, but snapshots.
fn assert_nothing_left(host: &Host) {
    let left = host.sh("find /run/systemd/system -name '*ftd-dump*' -o -name '*ftd-restore*'; \
         find /run -maxdepth 1 -name '*ftd-restore*'; nft list tables; \
         for dir in /run/ftd-scratch /var/lib/ftd/scratch; do ls -A $dir 2>/dev/null || true; done");
    assert_eq!(left.unwrap(), "");
    assert_eq!(show(host, "NeedDaemonReload"), "no");
}

#[test]
fn a_killed_service_goes_back_to_its_last_snapshot_with_all_that_it_knew() {
    let schedule = "on_stop = \"restart\"\nsnapshot = { every = \"1s\", process = true, keep = 100 }\n";
    // Closed, and with files of its own: ftd takes these from within its sandbox.
    let closed = "User=www-data\nPrivateTmp=yes\nRuntimeDirectory=worker\nProtectSystem=strict\nNoNewPrivileges=yes\n\
                  ProtectKernelTunables=yes\nPrivateDevices=yes\nCapabilityBoundingSet=";
    let (_lab, host, mut events) = boot("--memory 64", closed, schedule);
    give(&host, 1..=10);
    let (total, main) = (get(&host, "/total"), show(&host, "MainPID"));
    assert_eq!(total["done"], 10);
    host.sh(&format!("echo own > /proc/{main}/root/tmp/x; echo run > /run/worker/x")).unwrap();
    let good = wait_good(&host, &mut events);
    let status = events.until(&host, LIMIT, |_| true).unwrap();
    let newest = &snapshots(&status)["newest"];
    assert_eq!((&newest["kind"], &snapshots(&status)["every_ms"]), (&"process".into(), &1000.into()));
    assert!(newest["frozen_us"].as_u64() > Some(0) && newest["bytes"].as_u64() > Some(64 << 20), "{newest}");
    assert!(snapshots(&status)["taken"].as_u64() >= Some(good), "{status:#}");
    let text = host.ok(["ftctl", "status"]).unwrap();
    assert!(text.contains("LAST GOOD") && text.contains("process"), "{text}");
    let (_, shown) =
        ftctl(&host, &["snapshot", "show", "worker", "--generation", &good.to_string()]).unwrap();
    assert_eq!(shown["units"][0]["main_pid"].to_string(), main, "{shown}");
    // An idle worker costs next to nothing.
    let taken = |one: &&Value| one["event"] == "snapshot_taken" && one["generation"].as_u64() >= Some(2);
    let later: Vec<_> = events.seen().iter().filter(taken).cloned().collect();
    assert!(!later.is_empty());
    for one in &later {
        let (new, all) = (one["new_bytes"].as_u64().unwrap(), one["bytes"].as_u64().unwrap());
        assert!(new * 50 < all, "{one}");
        println!(
            "generation {}: {new} of {all} bytes new, frozen {} us, {} ms",
            one["generation"], one["frozen_us"], one["took_ms"]
        );
    }

    // Killed and healed, it has forgotten everything.
    host.ok(["systemctl", "kill", "-s", "KILL", WORKER]).unwrap();
    events.wait_for("healed", WORKER).unwrap();
    assert_eq!(get(&host, "/total")["done"], 0);

    // What runs is not thrown away unasked.
    let number = good.to_string();
    let refused = ftctl(&host, &["restore", "worker", "--generation", &number]).unwrap_err();
    assert!(
        refused.contains("worker.service is active") && refused.contains("nothing was touched"),
        "{refused}"
    );
    let (code, dry) = ftctl(&host, &["restore", "worker", "--generation", &number, "--dry-run"]).unwrap();
    assert_eq!((code, dry["blockers"].as_array().unwrap().len()), (4, 1), "{dry}");
    let (code, dry) =
        ftctl(&host, &["restore", "jobs", "--generation", &number, "--dry-run", "--stop"]).unwrap();
    assert_eq!((code, &dry["blockers"]), (0, &serde_json::json!([])), "{dry}");
    assert_eq!(get(&host, "/total")["done"], 0);

    let (code, done) = ftctl(&host, &["restore", "worker", "--generation", &number, "--stop"]).unwrap();
    assert_eq!((code, &done["generation"]), (0, &good.into()), "{done}");
    println!("restored: {done}");
    assert_eq!(get(&host, "/total"), total);
    assert_eq!(get(&host, "/memory")["bad"], 0);
    assert_eq!(host.sh(&format!("cat /proc/{main}/root/tmp/x /run/worker/x")).unwrap(), "own\nrun\n");
    let restored = events.seen_or_next("restored", WORKER).unwrap();
    assert_eq!((&restored["generation"], &restored["units"]), (&good.into(), &serde_json::json!([WORKER])));
    // ftd has left it alone, and cares for it again.
    let ours = |status: &Value| status["units"][0]["held"].is_null() && status["units"][0]["phase"] == "up";
    events.until(&host, LIMIT, ours).unwrap();
    assert_eq!(show(&host, "MainPID"), main);
    events.wait_for("snapshot_taken", WORKER).unwrap();
    assert_nothing_left(&host);
    give(&host, [11]);
    host.ok(["systemctl", "kill", "-s", "KILL", WORKER]).unwrap();
    events.wait_for("healed", WORKER).unwrap();
}

#[test]
fn stopped_by_a_snapshot_it_stays_so_until_it_is_restored() {
    let (_lab, host, mut events) = boot("--memory 8", "PrivateTmp=yes", "on_stop = \"restart\"\n");
    events.until_proven(&host, 1).unwrap();
    give(&host, 1..=5);
    let (total, main) = (get(&host, "/total"), show(&host, "MainPID"));
    let (_, taken) = ftctl(&host, &["snapshot", "take", "worker", "--stop"]).unwrap();
    assert_eq!((&taken["kind"], &taken["generation"]), (&"process".into(), &1.into()), "{taken}");
    assert_eq!((show(&host, "ActiveState"), show(&host, "Result")), ("inactive".into(), "success".into()));
    let held = |status: &Value| {
        status["units"][0]["held"]["reason"].as_str().is_some_and(|why| why.contains("snapshot 1"))
    };
    events.until(&host, LIMIT, held).unwrap();
    // A restart of ftd does not forget that.
    host.ok(["systemctl", "restart", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    events.until(&host, LIMIT, held).unwrap();
    assert_eq!(show(&host, "ActiveState"), "inactive");
    // A stopped unit has no processes.
    let refused = ftctl(&host, &["snapshot", "take", "worker", "--process"]).unwrap_err();
    assert!(refused.contains("no process to dump"), "{refused}");

    // Its number is taken; by clone3, which can choose one.
    let taker = "my $tid = pack('i', shift); my $at = unpack('Q', pack('P', $tid));\n\
        my $words = pack('Q11', 0, 0, 0, 0, 17, 0, 0, 0, $at, 1, 0);\n\
        if (syscall(435, $words, 88) == 0) { close(STDOUT); sleep 1000 }\n";
    host.write("/root/taker.pl", taker).unwrap();
    host.sh(&format!("perl /root/taker.pl {main} > /dev/null 2>&1; test -e /proc/{main}")).unwrap();
    let refused = ftctl(&host, &["restore", "worker"]).unwrap_err();
    let cause = format!("its PID {main} belongs to perl now");
    assert!(refused.contains(&cause) && refused.contains("nothing was touched"), "{refused}");
    events.until(&host, LIMIT, held).unwrap();
    host.sh(&format!("kill -9 {main}; while [ -e /proc/{main} ]; do sleep 0.01; done")).unwrap();

    let (code, done) = ftctl(&host, &["restore", "worker"]).unwrap();
    assert_eq!(code, 0, "{done}");
    assert_eq!((get(&host, "/total"), show(&host, "MainPID")), (total, main));
    events.until(&host, LIMIT, |status| status["units"][0]["held"].is_null()).unwrap();
    assert_nothing_left(&host);

    // Without ftd it goes as well.
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    give(&host, 6..=9);
    let total = get(&host, "/total");
    ftctl(&host, &["snapshot", "take", "jobs", "--stop"]).unwrap();
    assert_eq!(show(&host, "ActiveState"), "inactive");
    ftctl(&host, &["restore", "jobs"]).unwrap();
    assert_eq!(get(&host, "/total"), total);
    assert_nothing_left(&host);
}

#[test]
fn several_units_are_stopped_all_or_none_and_come_back_together() {
    let lab = Lab::new().unwrap();
    let config =
        "[[workload]]\nname = \"all\"\nunits = [\"worker\", \"nginx\", \"apache2\"]\non_stop = \"restart\"\n";
    let host = lab.boot("vm1", BootOptions::with_config(config)).unwrap();
    host.wait_running().unwrap();
    criu::prepare(&host).unwrap();
    criu::start_worker(&host, Path::new(env!("CARGO_BIN_EXE_worker")), "--memory 8", "").unwrap();
    give(&host, 1..=5);
    let mains = || host.ok(["systemctl", "show", "-P", "MainPID", "worker", "nginx", "apache2"]).unwrap();
    let states =
        || host.ok(["systemctl", "show", "-P", "ActiveState", "worker", "nginx", "apache2"]).unwrap();
    let (total, before) = (get(&host, "/total"), mains());
    for _ in 0..3 {
        ftctl(&host, &["snapshot", "take", "all", "--stop"]).unwrap();
        assert_eq!(states(), "inactive\n\ninactive\n\ninactive\n");
        let (code, done) = ftctl(&host, &["restore", "all"]).unwrap();
        assert_eq!((code, done["restored"].as_array().unwrap().len()), (0, 3), "{done}");
        println!("{done}");
        assert_eq!((get(&host, "/total"), mains()), (total.clone(), before.clone()));
        for port in ["80", "8080"] {
            host.ok(["curl", "-sf", "-m", "2", "-o", "/dev/null", &format!("http://127.0.0.1:{port}/")])
                .unwrap();
        }
        assert_nothing_left(&host);
    }
    // One that cannot be dumped keeps all of them running.
    host.sh("ftctl hold apache2 && systemctl stop apache2").unwrap();
    let refused = ftctl(&host, &["snapshot", "take", "all", "--stop"]).unwrap_err();
    assert!(refused.contains("apache2.service cannot be dumped"), "{refused}");
    assert_eq!((get(&host, "/total"), states()), (total, "active\n\nactive\n\ninactive\n".to_owned()));
    assert_nothing_left(&host);
}

#[test]
fn what_cannot_be_stored_does_not_end_and_is_told() {
    let (_lab, host, mut events) = boot("--memory 64", "", "on_stop = \"restart\"\n");
    events.until_proven(&host, 1).unwrap();
    give(&host, 1..=5);
    let (total, main) = (get(&host, "/total"), show(&host, "MainPID"));
    // The worker's memory does not fit.
    host.sh("sed -i 's/^good_after/quota = \"16MiB\"\\n&/' /etc/ftd/ftd.toml").unwrap();
    let refused = ftctl(&host, &["snapshot", "take", "worker", "--stop"]).unwrap_err();
    assert!(refused.contains("quota"), "{refused}");
    assert_eq!((show(&host, "ActiveState"), show(&host, "MainPID")), ("active".into(), main.clone()));
    assert_eq!((get(&host, "/total"), &get(&host, "/memory")["bad"]), (total.clone(), &0.into()));
    events.until(&host, LIMIT, |status| status["units"][0]["held"].is_null()).unwrap();
    assert_nothing_left(&host);
    assert_eq!(ftctl(&host, &["snapshot", "list"]).unwrap().1, serde_json::json!([]));

    // The same by the schedule: an event, and the service is none the worse.
    host.sh(
        "echo 'snapshot = { every = \"1s\", process = true }' >> /etc/ftd/ftd.toml; systemctl restart ftd",
    )
    .unwrap();
    let mut events = Events::follow(&host).unwrap();
    let failed = events.seen_or_next("snapshot_failed", WORKER).unwrap();
    assert!(failed["cause"].as_str().unwrap().contains("quota"), "{failed}");
    assert_eq!((get(&host, "/total"), show(&host, "MainPID")), (total, main));
}

#[test]
fn an_ftd_that_dies_in_the_middle_of_a_dump_leaves_the_service_running_and_nothing_else() {
    let schedule = "snapshot = { every = \"200ms\", process = true, keep = 3 }\n";
    let (_lab, host, mut events) = boot("--memory 256 --dirty 20", "", schedule);
    give(&host, 1..=10);
    let (total, main) = (get(&host, "/total"), show(&host, "MainPID"));
    events.wait_for("snapshot_taken", WORKER).unwrap();
    let mut caught = 0;
    for _ in 0..8 {
        // As soon as there are pages, CRIU is at it.
        host.sh(
            "for n in $(seq 2000); do ls /run/ftd/scratch/*/0/pages-1.img >/dev/null 2>&1 && break; sleep 0.005; done; \
             systemctl kill -s KILL --kill-whom=main ftd; \
             while pgrep -x criu >/dev/null; do sleep 0.01; done; \
             grep -E '^(State|TracerPid)' /proc/$(systemctl show -P MainPID worker)/status",
        )
        .unwrap();
        let state = host.sh(&format!("grep -E '^(State|TracerPid)' /proc/{main}/status")).unwrap();
        assert!(!state.contains("stopped") && state.contains("TracerPid:\t0"), "{state}");
        assert_eq!(show(&host, "MainPID"), main);
        assert_eq!(get(&host, "/total"), total);
        // systemd does so anyway; this waits for it.
        host.ok(["systemctl", "start", "ftd"]).unwrap();
        events = Events::follow(&host).unwrap();
        events.wait_for("snapshot_taken", WORKER).unwrap();
        caught += 1;
    }
    assert_eq!(get(&host, "/memory")["bad"], 0);
    println!("killed {caught} times");
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    host.sh("while pgrep -x criu >/dev/null; do sleep 0.01; done").unwrap();
    assert_nothing_left(&host);
    assert_eq!(host.sh("ls -A /run/ftd/scratch 2>/dev/null || true").unwrap(), "");
    // And all that is in the store is whole.
    host.ok(["ftctl", "snapshot", "verify"]).unwrap();
}

#[test]
fn what_criu_cannot_save_is_named_and_goes_on() {
    let (_lab, host, mut events) = boot("", "", "[[workload]]\nname = \"odd\"\nunits = [\"odd\"]\n");
    let program = "my $about = \"\\0\" x 120; exit 9 if syscall(425, 8, $about) < 0;\n\
        open(my $sign, '>', '/root/odd.holds-it'); close($sign); sleep 1000;\n";
    host.write("/root/odd.pl", program).unwrap();
    host.write("/etc/systemd/system/odd.service", "[Service]\nExecStart=/usr/bin/perl /root/odd.pl\n")
        .unwrap();
    let begun = "systemctl daemon-reload && systemctl start odd && \
                 while systemctl is-active -q odd && [ ! -e /root/odd.holds-it ]; do sleep 0.05; done";
    host.sh(begun).unwrap();
    if !host.run(["test", "-e", "/root/odd.holds-it"]).unwrap().success() {
        println!("this kernel lets nobody use io_uring: nothing to see");
        return;
    }
    events.until_proven(&host, 2).unwrap();
    let main = || host.ok(["systemctl", "show", "-P", "MainPID", "odd"]).unwrap();
    let before = main();
    for words in [["snapshot", "take", "odd", "--process"], ["snapshot", "take", "odd", "--stop"]] {
        let refused = ftctl(&host, &words).unwrap_err();
        assert!(
            refused.contains("odd.service cannot be dumped") && refused.contains("io_uring"),
            "{refused}"
        );
        assert_eq!(main(), before);
    }
    assert_nothing_left(&host);
}

#[test]
fn what_is_not_the_same_program_any_more_is_refused_before_anything_is_touched() {
    let (_lab, host, mut events) = boot(
        "",
        "",
        "[[workload]]\nname = \"web\"\nunits = [\"nginx\"]\nfiles = [\"/etc/nginx\"]\n\
         on_change = \"ignore\"\n",
    );
    events.until_proven(&host, 2).unwrap();
    let serves =
        || host.run(["curl", "-sf", "-m", "2", "-o", "/dev/null", "http://127.0.0.1/"]).unwrap().success();
    assert!(serves());
    // One byte of its build-id is another one; the size is the same.
    let other = "import os\np='/usr/sbin/nginx'\nd=bytearray(open(p,'rb').read())\n\
                 i=d.find(b'\\x04\\0\\0\\0\\x14\\0\\0\\0\\x03\\0\\0\\0GNU\\0')\nassert i > 0\nd[i+20]^=1\n\
                 open(p+'.new','wb').write(d)\nos.chmod(p+'.new',0o755)\n";
    host.write("/root/other.py", other).unwrap();
    host.sh("cp -p /usr/sbin/nginx /root/nginx && python3 /root/other.py").unwrap();
    ftctl(&host, &["snapshot", "take", "nginx", "--stop"]).unwrap();
    assert!(!serves());
    host.sh("mv /usr/sbin/nginx.new /usr/sbin/nginx && echo '# longer' >> /etc/nginx/nginx.conf").unwrap();
    let (code, dry) = ftctl(&host, &["restore", "web", "--dry-run"]).unwrap();
    let blockers = dry["blockers"].to_string();
    assert!(code == 4 && blockers.contains("/usr/sbin/nginx is another build now"), "{dry}");
    // The configuration is put back first, and so is in nobody's way.
    assert!(!blockers.contains("nginx.conf") && dry["steps"].to_string().contains("nginx.conf"), "{dry}");
    let refused = ftctl(&host, &["restore", "web"]).unwrap_err();
    assert!(refused.contains("build-id") && refused.contains("nothing was touched"), "{refused}");
    assert!(host.read("/etc/nginx/nginx.conf").unwrap().contains("# longer"));
    host.sh("cp -p /root/nginx /usr/sbin/nginx.new && mv /usr/sbin/nginx.new /usr/sbin/nginx").unwrap();
    let (code, done) = ftctl(&host, &["restore", "web"]).unwrap();
    assert_eq!(code, 0, "{done}");
    assert!(serves() && !host.read("/etc/nginx/nginx.conf").unwrap().contains("# longer"));
    assert_nothing_left(&host);
}

/// Who has connected and is not accepted yet hinders no dump, and is served by the process that runs on.
#[test]
fn who_is_not_accepted_yet_is_no_obstacle_and_is_served_after() {
    let (_lab, host, mut events) = boot("", "", "");
    events.until_proven(&host, 1).unwrap();
    give(&host, 1..=3);
    // A stopped process accepts nobody; that it does not answer is not to be healed.
    ftctl(&host, &["hold", "worker"]).unwrap();
    let client = format!(
        "import socket\ns = socket.create_connection(('127.0.0.1', {WORKER_PORT}))\n\
         s.sendall(b'GET /total HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n')\n\
         print('connected', flush=True)\ntext = b''\n\
         while more := s.recv(4096):\n    text += more\nprint(text.split(b'\\r\\n')[-1].decode())\n"
    );
    host.write("/root/client.py", client).unwrap();
    let said = host
        .sh("mkfifo /root/said && systemctl kill -s STOP worker && \
             { python3 /root/client.py > /root/said & } && exec 3< /root/said && read -r word <&3 && echo $word && \
             ftctl snapshot take jobs --process > /root/taken; echo $?; systemctl kill -s CONT worker; cat <&3")
        .unwrap();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines[..2], ["connected", "0"], "{said}");
    let total: Value = serde_json::from_str(lines[2]).unwrap();
    assert_eq!(total["done"], 3, "{said}");
    assert_nothing_left(&host);
}
