//! Snapshots of files on a real host: nginx's configuration is taken, ruined in every way there is, and put back,
//! by the installed package, with ftd running and without.
//!
//! As root: `cargo xtask test --only files`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::{Duration, Instant};

use harness::ftctl::json;
use harness::{BootOptions, Events, Host, Lab};
use serde_json::Value;

const CONFIG: &str = "[[workload]]\nname = \"web\"\nunits = [\"nginx\"]\n\
    files = [\"/etc/nginx\", \"/etc/default/nginx\", \"/etc/nothing/*.conf\"]\n";

/// Each ruins the configuration in its own way.
const RUIN: [&str; 8] = [
    "echo nonsense >> /etc/nginx/nginx.conf",
    ": > /etc/nginx/nginx.conf",
    "truncate -s 100 /etc/nginx/nginx.conf",
    "rm /etc/nginx/nginx.conf",
    "rm -r /etc/nginx/sites-enabled /etc/nginx/modules-available",
    "chmod 0 /etc/nginx/mime.types && chown nobody /etc/nginx/fastcgi_params",
    "ln -sfn /nonexistent /etc/nginx/sites-enabled/default",
    "rm /etc/nginx/nginx.conf && mkdir -p /etc/nginx/nginx.conf/x && touch /etc/nginx/nginx.conf/x/y",
];

fn boot() -> (Lab, Host) {
    boot_with(&format!("{CONFIG}on_change = \"ignore\"\n"))
}

fn boot_with(config: &str) -> (Lab, Host) {
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", BootOptions::with_config(config)).unwrap();
    host.wait_running().unwrap();
    (lab, host)
}

const QUICK: &str = "[snapshot]\nsettle = \"100ms\"\ngood_after = \"500ms\"\nput_backs = 100\n";

/// A host on which ftd watches over the files, and has found them good.
fn guarded() -> (Lab, Host, Events, String) {
    let (lab, host) = boot_with(&format!("{QUICK}{CONFIG}"));
    let events = until_good(&host);
    let before = tree(&host);
    (lab, host, events, before)
}

/// Waits until ftd has found the files good, and follows what it says.
fn until_good(host: &Host) -> Events {
    let mut events = Events::follow(host).unwrap();
    let list = || json(host, &["snapshot", "list"]);
    let end = Instant::now() + harness::scaled(LIMIT);
    while !list().as_array().unwrap().iter().any(|one| one["good"] == true) {
        assert!(Instant::now() < end, "the files are not found good: {:#?}", events.seen());
        // It may have been said before anybody could follow.
        std::thread::sleep(Duration::from_millis(50));
    }
    events
}

const NGINX: &str = "nginx.service";
const LIMIT: Duration = Duration::from_secs(20);

/// What there is, with all that a snapshot promises to keep.
fn tree(host: &Host) -> String {
    host.sh("cd /etc && find nginx default/nginx -printf '%p %y %m %U:%G %T@ %l\\n' | sort && \
             find nginx default/nginx -type f -print0 | sort -z | xargs -0 sha256sum")
        .unwrap()
}

#[test]
fn what_was_ruined_comes_back_as_it_was_and_the_service_takes_it() {
    let (_lab, host) = boot();
    let before = tree(&host);
    let taken = json(&host, &["snapshot", "take", "nginx", "--good"]);
    assert_eq!((&taken["workload"], &taken["generation"]), (&"web".into(), &1.into()));
    assert_eq!(taken["unmatched"], serde_json::json!(["/etc/nothing/*.conf"]));
    assert!(host.run(["ftctl", "snapshot", "diff", "web"]).unwrap().success());

    // The way back must not need ftd.
    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    for ruin in RUIN {
        host.sh(ruin).unwrap();
        let different = host.run(["ftctl", "snapshot", "diff", "web"]).unwrap();
        assert_eq!(different.status.code(), Some(4), "{ruin}: {different:?}");
        let planned = json(&host, &["restore", "web", "--dry-run"]);
        assert!(!planned["steps"].as_array().unwrap().is_empty(), "{ruin}: {planned}");
        assert_ne!(tree(&host), before, "{ruin}: a dry run touches nothing");
        let done = json(&host, &["restore", "nginx"]);
        assert_eq!(done["steps"], planned["steps"], "{ruin}");
        assert_eq!(tree(&host), before, "{ruin}");
        host.sh("nginx -t && systemctl reload nginx").unwrap();
    }
    // What has come besides is left, or, when that is asked for, removed.
    host.sh("touch /etc/nginx/conf.d/new.conf").unwrap();
    assert_eq!(json(&host, &["restore", "web"])["steps"], serde_json::json!([]));
    host.ok(["ftctl", "restore", "web", "--exact"]).unwrap();
    assert_eq!(host.sh("ls /etc/nginx/conf.d").unwrap(), "");
}

#[test]
fn snapshots_share_what_is_the_same_and_damage_is_named() {
    let (_lab, host) = boot();
    host.ok(["ftctl", "snapshot", "take", "web", "--good"]).unwrap();
    host.sh("echo '# edited' >> /etc/nginx/nginx.conf").unwrap();
    let second = json(&host, &["snapshot", "take", "web"]);
    let size = |key: &str| second[key].as_u64().unwrap();
    assert!(size("new_bytes") * 2 < size("bytes"), "only what is new is stored: {second}");
    // The last good one is the one that comes back, not the newest.
    assert_eq!(json(&host, &["restore", "web", "--dry-run"])["generation"], 1);

    // Elsewhere, and back: the same snapshot, not another one.
    host.ok(["ftctl", "snapshot", "export", "web", "--generation", "2", "/root/web.ftd"]).unwrap();
    let again = host.run(["ftctl", "snapshot", "export", "web", "/root/web.ftd"]).unwrap();
    assert!(!again.success() && again.stderr.contains("/root/web.ftd"), "{again:?}");
    host.sh("mv /var/lib/ftd/snapshots /root/lost").unwrap();
    host.sh("head -c 3000 /root/web.ftd > /root/short.ftd").unwrap();
    let short = host.run(["ftctl", "snapshot", "import", "/root/short.ftd"]).unwrap();
    assert!(!short.success(), "{short:?}");
    assert_eq!(json(&host, &["snapshot", "list"]), serde_json::json!([]), "of it nothing is left");
    assert_eq!(json(&host, &["snapshot", "import", "/root/web.ftd"])["generation"], 2);
    assert!(host.run(["ftctl", "snapshot", "verify"]).unwrap().success());

    // A bit flips on the disk.
    host.sh("p=$(ls /var/lib/ftd/snapshots/v1/packs/* | head -n 1); s=$(stat -c %s $p); \
             printf '\\377' | dd of=$p bs=1 seek=$((s / 2)) conv=notrunc 2>/dev/null")
        .unwrap();
    let damaged = host.run(["ftctl", "snapshot", "verify"]).unwrap();
    assert_eq!(damaged.status.code(), Some(4), "{damaged:?}");
    assert!(damaged.stdout.contains("of web"), "{damaged:?}");
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_touched() {
    let (_lab, host) = boot();
    let refused = |words: &[&str], needles: &[&str]| {
        let out = host.run([&["ftctl"], words].concat()).unwrap();
        assert_eq!(out.status.code(), Some(1), "{words:?}: {out:?}");
        for needle in needles {
            assert!(out.stderr.contains(needle), "{words:?}: {}", out.stderr);
        }
    };
    refused(&["restore", "web"], &["there is no snapshot of web", "ftctl snapshot take web"]);
    refused(&["snapshot", "take", "wbe"], &["there is no workload wbe", "there are: web"]);
    let as_nobody = host.run(["setpriv", "--reuid=nobody", "--", "ftctl", "snapshot", "list"]).unwrap();
    assert!(as_nobody.stderr.contains("use sudo"), "{as_nobody:?}");
    host.ok(["ftctl", "snapshot", "take", "web", "--good"]).unwrap();
    refused(&["restore", "web", "--generation", "9"], &["9"]);
    // A store of a newer ftd.
    host.sh("mkdir /var/lib/ftd/snapshots/v99").unwrap();
    refused(&["restore", "web"], &["99"]);
    host.sh("rmdir /var/lib/ftd/snapshots/v99").unwrap();
    // A disk that takes nothing: nothing is touched.
    let before = tree(&host);
    host.sh("echo nonsense > /etc/nginx/nginx.conf && mount --bind /etc/nginx /etc/nginx && mount -o remount,ro,bind /etc/nginx").unwrap();
    refused(&["restore", "web"], &["/etc/nginx"]);
    host.sh("umount /etc/nginx").unwrap();
    host.ok(["ftctl", "restore", "web"]).unwrap();
    assert_eq!(tree(&host), before);
}

#[test]
fn what_is_damaged_or_invalid_is_put_back_and_the_service_never_sees_it() {
    let (_lab, host, mut events, before) = guarded();
    let pid = host.ok(["systemctl", "show", "-P", "MainPID", "nginx"]).unwrap();
    for ruin in RUIN {
        host.sh(ruin).unwrap();
        events.wait_for("files_put_back", NGINX).unwrap();
        assert_eq!(tree(&host), before, "{ruin}");
    }
    // The checker's own words, and what differs.
    host.sh("sed -i '1i nonsense;' /etc/nginx/nginx.conf").unwrap();
    let changed = events.wait_for("files_changed", NGINX).unwrap();
    assert!(changed["changes"][0]["what"].as_str().unwrap().contains("+nonsense;"), "{changed}");
    let bad = events.wait_for("files_bad", NGINX).unwrap();
    assert!(bad["why"].as_str().unwrap().contains("unknown directive \"nonsense\""), "{bad}");
    assert_eq!(events.wait_for("files_put_back", NGINX).unwrap()["op"], bad["op"]);
    // A new file that is not valid goes, and can be had again: it may be somebody's work.
    host.sh("echo nonsense > /etc/nginx/conf.d/mine.conf").unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(tree(&host), before);
    let newest = json(&host, &["snapshot", "list"]).as_array().unwrap().last().unwrap()["generation"].clone();
    let newest = newest.to_string();
    let kept = json(&host, &["restore", "web", "--generation", &newest, "--dry-run"]);
    assert!(kept.to_string().contains("mine.conf"), "{kept}");
    assert_eq!(host.ok(["systemctl", "show", "-P", "MainPID", "nginx"]).unwrap(), pid);
    assert!(host.run(["curl", "-sf", "-o", "/dev/null", "http://127.0.0.1/"]).unwrap().success());
}

#[test]
fn a_valid_edit_is_taken_over_becomes_good_and_is_what_comes_back() {
    let (_lab, host, mut events, before) = guarded();
    host.sh("printf 'server { listen 8123; return 204; }\n' > /etc/nginx/conf.d/new.conf").unwrap();
    let changed = events.wait_for("files_changed", NGINX).unwrap();
    assert_eq!(events.wait_for("files_good", NGINX).unwrap()["op"], changed["op"]);
    assert!(host.run(["curl", "-sf", "-o", "/dev/null", "http://127.0.0.1:8123/"]).unwrap().success());
    let edited = tree(&host);
    assert_ne!(edited, before);
    host.sh("rm /etc/nginx/conf.d/new.conf; : > /etc/nginx/nginx.conf").unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(tree(&host), edited);
}

#[test]
fn nobody_is_fought_while_a_unit_is_held_or_ftd_is_away() {
    let (_lab, host, mut events, before) = guarded();
    host.ok(["ftctl", "hold", "nginx"]).unwrap();
    events.wait_for("held", NGINX).unwrap();
    host.sh(": > /etc/nginx/nginx.conf; rm /etc/nginx/mime.types").unwrap();
    let ruined = tree(&host);
    // Nothing tells that nothing will happen: ten times the settling time.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(tree(&host), ruined);
    host.ok(["ftctl", "release", "nginx"]).unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(tree(&host), before);

    host.ok(["systemctl", "stop", "ftd"]).unwrap();
    host.sh("rm -r /etc/nginx/sites-available").unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    let end = Instant::now() + harness::scaled(LIMIT);
    while tree(&host) != before {
        assert!(Instant::now() < end, "what was damaged while ftd was away is not put back");
        std::thread::sleep(Duration::from_millis(50));
    }
}

const DROP_IN: &str = "/etc/systemd/system/nginx.service.d";
const FRAGMENT: &str = "/usr/lib/systemd/system/nginx.service";

fn show(host: &Host, unit: &str, property: &str) -> String {
    host.ok(["systemctl", "show", "-P", property, unit]).unwrap().trim().to_owned()
}

fn why(event: &Value) -> &str {
    event["why"].as_str().unwrap()
}

#[test]
fn unit_files_are_verified_by_systemd_put_back_or_taken_over() {
    let (_lab, host) = boot_with(&format!("{QUICK}{CONFIG}unit_files = true\n"));
    let mut events = until_good(&host);
    let contents = json(&host, &["snapshot", "show", "web"]).to_string();
    assert_eq!(show(&host, NGINX, "FragmentPath"), FRAGMENT);
    assert!(contents.contains(FRAGMENT), "{contents}");
    assert_eq!(
        json(&host, &["snapshot", "take", "web"])["unmatched"],
        serde_json::json!(["/etc/nothing/*.conf"])
    );
    let pid = show(&host, NGINX, "MainPID");

    // Broken drop-ins go, whether somebody has had systemd read them or not, in systemd's own words.
    for (text, says) in [
        ("[Service]\\nRestrat=always\\n", ["/bad.conf:2: ", "'Restrat'"]),
        (
            "[Service]\\nExecStart=\\nExecStart=/nonexistent/nginx\\n",
            ["/nonexistent/nginx", "not executable"],
        ),
        ("[Service]\\nExecStart=/bin/true\\n", ["more than one ExecStart", NGINX]),
        ("nonsense\\n", ["/bad.conf:1: ", "outside of section"]),
    ] {
        host.sh(&format!(
            "mkdir -p {DROP_IN} && printf '{text}' > {DROP_IN}/bad.conf && systemctl daemon-reload"
        ))
        .unwrap();
        let bad = events.wait_for("files_bad", NGINX).unwrap();
        assert!(says.iter().all(|words| why(&bad).contains(words)), "{bad}");
        assert_eq!(events.wait_for("files_put_back", NGINX).unwrap()["op"], bad["op"]);
        assert!(!host.run(["test", "-e", DROP_IN]).unwrap().success(), "{text}");
        assert_eq!(show(&host, NGINX, "NeedDaemonReload"), "no", "{text}");
        assert_eq!(show(&host, NGINX, "DropInPaths"), "", "{text}");
        assert_eq!(show(&host, NGINX, "MainPID"), pid, "{text}");
    }

    // A valid one stays and takes effect, also where nobody has had systemd read it.
    host.sh(&format!(
        "mkdir -p {DROP_IN} && printf '[Service]\\nEnvironment=FTD_TEST=1\\nLimitNOFILE=4567\\n' \
         > {DROP_IN}/env.conf"
    ))
    .unwrap();
    let changed = events.wait_for("files_changed", NGINX).unwrap();
    assert_eq!(events.wait_for("files_good", NGINX).unwrap()["op"], changed["op"]);
    let new = show(&host, NGINX, "MainPID");
    assert_ne!(new, pid);
    assert_eq!(show(&host, NGINX, "Environment"), "FTD_TEST=1");
    // nginx writes its title over its environment.
    assert!(host.ok(["cat", &format!("/proc/{new}/limits")]).unwrap().contains("4567"));
    assert!(host.run(["curl", "-sf", "-o", "/dev/null", "http://127.0.0.1/"]).unwrap().success());
    // From now on it is what is put back.
    host.sh(&format!(": > {DROP_IN}/env.conf")).unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    host.sh(&format!("rm -r {DROP_IN}")).unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert!(host.ok(["cat", &format!("{DROP_IN}/env.conf")]).unwrap().contains("FTD_TEST=1"));
    assert_eq!(show(&host, NGINX, "MainPID"), new);
}

#[test]
fn what_packages_do_to_unit_files_is_as_good_as_what_systemd_says_of_it() {
    let (_lab, host) = boot_with(&format!("{QUICK}{CONFIG}unit_files = true\n"));
    let mut events = until_good(&host);
    // As an upgrade does it: another file, with a line for a newer systemd, and a drop-in; the restart is the package's own.
    let upgrade = format!(
        "mkdir -p {FRAGMENT}.d && printf '[Service]\\nEnvironment=VENDOR=1\\n' > {FRAGMENT}.d/vendor.conf && \
         sed '/^\\[Service\\]/a Environment=VERSION=2\\nFromTheFuture=yes' {FRAGMENT} > {FRAGMENT}.dpkg-new && \
         mv {FRAGMENT}.dpkg-new {FRAGMENT} && systemctl daemon-reload && systemctl restart nginx"
    );
    host.sh(&upgrade).unwrap();
    let pid = show(&host, NGINX, "MainPID");
    events.wait_for("files_good", NGINX).unwrap();
    assert_eq!(show(&host, NGINX, "MainPID"), pid, "it runs with them already");
    // The next version has no drop-in any more.
    host.sh(&format!("rm -r {FRAGMENT}.d && systemctl daemon-reload")).unwrap();
    events.wait_for("files_good", NGINX).unwrap();
    assert!(!host.run(["test", "-e", &format!("{FRAGMENT}.d")]).unwrap().success());
    // Without its fragment there is no unit.
    host.sh(&format!("rm {FRAGMENT} && systemctl daemon-reload")).unwrap();
    let bad = events.wait_for("files_bad", NGINX).unwrap();
    assert!(why(&bad).contains("not found"), "{bad}");
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(
        (&*show(&host, NGINX, "LoadState"), &*show(&host, NGINX, "NeedDaemonReload")),
        ("loaded", "no")
    );
    // Who masks a unit means it, whatever else is put back.
    host.ok(["systemctl", "mask", "nginx"]).unwrap();
    host.sh(": > /etc/nginx/nginx.conf").unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(show(&host, NGINX, "LoadState"), "masked");
}

const PATIENT: &str = "[heal]\nrestarts = 20\nbackoff = \"50ms\"\nbackoff_max = \"100ms\"\n";

/// Two units with a file each, which they take over in different ways; with `CRASH=yes` in it they exit with 7. Their
/// checker accepts all that a shell can read.
fn pair(config: &str) -> (Lab, Host, Events) {
    const PROGRAM: &str = "#!/bin/sh\nload() { . /etc/app/$1.conf; echo \"$VALUE\" > /run/app-$1; \
        [ \"$CRASH\" = yes ] && exit 7; }\nload $1\ntrap \"load $1\" HUP\nwhile :; do sleep 1 & wait $!; done\n";
    let unit = |name: &str, reload: &str| {
        // They are restarted more often than systemd would like.
        let text = format!(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=exec\nExecStart=/bin/sh /opt/app.sh {name}\n{reload}"
        );
        (format!("/etc/systemd/system/app-{name}.service").into(), text)
    };
    let config = format!(
        "{config}[[workload]]\nname = \"app\"\nunits = [\"app-a\", \"app-b\"]\nfiles = [\"/etc/app\"]\n\
         check = \"sh -n /etc/app/a.conf /etc/app/b.conf\"\n"
    );
    let mut options = BootOptions::with_config(config);
    options.files = vec![
        ("/opt/app.sh".into(), PROGRAM.into()),
        ("/etc/app/a.conf".into(), "VALUE=1\n".into()),
        ("/etc/app/b.conf".into(), "VALUE=1\n".into()),
        unit("a", "ExecReload=kill -HUP $MAINPID\n"),
        unit("b", ""),
    ];
    let lab = Lab::new().unwrap();
    let host = lab.boot("vm1", options).unwrap();
    host.wait_running().unwrap();
    host.ok(["systemctl", "start", "app-a", "app-b"]).unwrap();
    let events = until_good(&host);
    (lab, host, events)
}

#[test]
fn a_valid_edit_that_brings_the_service_down_is_put_back_and_the_service_comes_up() {
    let (_lab, host, mut events) = pair(&format!("{PATIENT}{QUICK}"));
    // Of the unit that reloads, of the one that is restarted, and where a person is faster than ftd.
    for (unit, then) in
        [("a", ""), ("b", ""), ("a", "systemctl restart app-a"), ("b", "systemctl restart app-b")]
    {
        let full = format!("app-{unit}.service");
        host.sh(&format!("echo CRASH=yes >> /etc/app/{unit}.conf; {then}")).unwrap();
        let bad = events.wait("files_bad", LIMIT, |event| event["event"] == "files_bad").unwrap();
        assert!(why(&bad).contains("went down") || why(&bad).contains("does not take them over"), "{bad}");
        events.wait("files_put_back", LIMIT, |event| event["event"] == "files_put_back").unwrap();
        assert_eq!(host.ok(["cat", &format!("/etc/app/{unit}.conf")]).unwrap(), "VALUE=1\n");
        events.seen_or_next("healed", &full).unwrap();
        events.until_proven(&host, 2).unwrap();
        events.until_settled(&host, Duration::from_secs(1)).unwrap();
        both_active(&host);
    }
    let good = json(&host, &["snapshot", "list"]);
    let good: Vec<_> = good.as_array().unwrap().iter().filter(|one| one["good"] == true).collect();
    assert_eq!(good.len(), 1, "no bad one has become good");
}

#[test]
fn a_unit_that_was_given_up_for_its_files_is_started_when_they_are_put_back() {
    let slow = QUICK.replace("100ms", "4s").replace("500ms", "5s");
    let (_lab, host, mut events) = pair(&format!("[heal]\nrestarts = 2\n{slow}"));
    host.sh("echo CRASH=yes >> /etc/app/b.conf; systemctl restart app-b").unwrap();
    events.wait_for("failed", "app-b.service").unwrap();
    events.wait("files_put_back", LIMIT, |event| event["event"] == "files_put_back").unwrap();
    events.until_proven(&host, 2).unwrap();
    events.until_settled(&host, Duration::from_secs(1)).unwrap();
    both_active(&host);
}

/// Both units come to run: systemd may be about to start one when ftd has told of the other.
fn both_active(host: &Host) {
    let wait = "timeout 20 sh -c 'until [ \"$(systemctl is-active app-a app-b | sort -u)\" = active ]; do sleep 0.05; done'";
    host.sh(wait).unwrap();
}

#[test]
fn several_files_and_units_change_together_and_nobody_is_fought_halfway() {
    let slow = "[snapshot]\nsettle = \"1s\"\nsettle_at_most = \"10s\"\ngood_after = \"500ms\"\n";
    let (_lab, host, mut events) = pair(slow);
    let from = events.seen().len();
    // Halfway it makes no sense.
    host.sh("echo 'if' > /etc/app/a.conf; sleep 0.4; echo VALUE=2 > /etc/app/b.conf; sleep 0.4; \
         echo VALUE=2 > /etc/app/a.conf; sleep 0.4; echo VALUE=3 > /etc/app/b.conf")
        .unwrap();
    events.wait("files_good", LIMIT, |event| event["event"] == "files_good").unwrap();
    let kinds: Vec<_> = events.seen()[from..].iter().filter_map(|event| event["event"].as_str()).collect();
    assert!(!kinds.contains(&"files_bad"), "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| **kind == "files_changed").count(), 1, "{kinds:?}");
    assert_eq!(host.sh("cat /run/app-a /run/app-b").unwrap(), "2\n3\n", "both units have taken them over");
}

#[test]
fn what_is_to_go_for_good_goes_when_a_person_says_so() {
    let (_lab, host, mut events, _) = guarded();
    host.ok(["ftctl", "hold", "nginx"]).unwrap();
    events.wait_for("held", NGINX).unwrap();
    host.sh("rm /etc/nginx/koi-win && chmod 600 /etc/nginx/koi-utf").unwrap();
    let edited = tree(&host);
    let number = json(&host, &["snapshot", "take", "web", "--good"])["generation"].clone();
    host.ok(["ftctl", "release", "nginx"]).unwrap();
    assert_eq!(events.wait_for("files_good", NGINX).unwrap()["generation"], number);
    assert_eq!(tree(&host), edited);
    host.sh(": > /etc/nginx/nginx.conf").unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(tree(&host), edited);
}

#[test]
fn the_watch_begins_once_the_snapshots_can_be_read() {
    let quick = QUICK.replace("put_backs", "retry = \"200ms\"\nput_backs");
    let (_lab, host) = boot_with(&format!("{quick}{CONFIG}"));
    until_good(&host);
    let before = tree(&host);
    host.sh("systemctl stop ftd && mkdir /var/lib/ftd/snapshots/v99 && rm /etc/nginx/mime.types").unwrap();
    host.ok(["systemctl", "start", "ftd"]).unwrap();
    let mut events = Events::follow(&host).unwrap();
    let trouble =
        |event: &Value| event["event"] == "files_trouble" && event["error"].as_str().unwrap().contains("99");
    if !harness::events::all(&host).unwrap().iter().any(trouble) {
        events.wait("files_trouble", LIMIT, trouble).unwrap();
    }
    assert_ne!(tree(&host), before);
    host.sh("rmdir /var/lib/ftd/snapshots/v99").unwrap();
    events.wait_for("files_put_back", NGINX).unwrap();
    assert_eq!(tree(&host), before);
    let told = harness::events::all(&host).unwrap().iter().filter(|event| trouble(event)).count();
    assert_eq!(told, 1, "it is told once");
}

/// Edits `/etc/app/a.conf` to hold this, in the ways of those who edit.
fn editors(value: u32) -> [(&'static str, String); 5] {
    let file = "/etc/app/a.conf";
    [
        ("sed", format!("sed -i 's/VALUE=.*/VALUE={value}/' {file}")),
        ("a new file over it", format!("echo VALUE={value} > {file}.tmp && mv {file}.tmp {file}")),
        // The swap file is there for as long as somebody thinks.
        (
            "vim",
            format!(
                "cd /etc/app && : > .a.conf.swp && sleep 1 && : > 4913 && rm 4913 && mv a.conf a.conf~ && \
                 echo VALUE={value} > a.conf && rm a.conf~ && sleep 1 && rm .a.conf.swp"
            ),
        ),
        (
            "emacs",
            format!(
                "cd /etc/app && ln -s root@vm1.1:1 .#a.conf && sleep 1 && : > '#a.conf#' && sleep 1 && \
                 cp -p a.conf a.conf~ && echo VALUE={value} > a.conf && rm '#a.conf#' .#a.conf"
            ),
        ),
        (
            "dpkg",
            format!(
                "mkdir -p /tmp/p/DEBIAN /tmp/p/etc/app && cd /tmp/p && echo VALUE={value} > etc/app/a.conf && \
                 echo /etc/app/a.conf > DEBIAN/conffiles && printf 'Package: app\\nVersion: {value}\\nArchitecture: all\\n\
                 Maintainer: nobody <n@example.org>\\nDescription: a test\\n' > DEBIAN/control && \
                 printf '#!/bin/sh\\nsleep 1\\n' > DEBIAN/preinst && chmod 755 DEBIAN/preinst && \
                 dpkg-deb --build . /tmp/app.deb && dpkg --unpack /tmp/app.deb && sleep 1 && \
                 dpkg --force-confnew --configure app"
            ),
        ),
    ]
}

#[test]
fn whatever_tool_edits_a_file_it_is_one_change_and_nothing_is_put_back() {
    let (_lab, host, mut events) = pair(&format!("{PATIENT}{}", QUICK.replace("100ms", "400ms")));
    for value in 10..20 {
        let [.., (tool, edit)] = &editors(value)[..=value as usize % 5] else { unreachable!() };
        let from = events.seen().len();
        host.sh(edit).unwrap_or_else(|error| panic!("{tool}: {error:#}"));
        events.wait("files_good", LIMIT, |event| event["event"] == "files_good").unwrap();
        let told: Vec<_> = events.seen()[from..].to_vec();
        let count = |kind: &str| told.iter().filter(|event| event["event"] == kind).count();
        assert_eq!((count("files_changed"), count("files_bad")), (1, 0), "{tool}: {told:#?}");
        assert_eq!(host.sh("cat /run/app-a").unwrap(), format!("{value}\n"), "{tool}");
    }
    // And none of what they left is in the way of what is good.
    host.sh(": > /etc/app/a.conf").unwrap();
    events.wait("files_put_back", LIMIT, |event| event["event"] == "files_put_back").unwrap();
    assert_eq!(host.sh("cat /etc/app/a.conf").unwrap(), "VALUE=19\n");
}
