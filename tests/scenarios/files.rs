//! Snapshots of files on a real host: nginx's configuration is taken, ruined in every way there is, and put back,
//! by the installed package, with ftd running and without.
//!
//! As root: `cargo xtask test --only files`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::{Duration, Instant};

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

/// A host on which ftd watches over the files, and has found them good.
fn guarded() -> (Lab, Host, Events, String) {
    let quick = "[snapshot]\nsettle = \"100ms\"\ngood_after = \"500ms\"\nput_backs = 100\n";
    let (lab, host) = boot_with(&format!("{quick}{CONFIG}"));
    let mut events = Events::follow(&host).unwrap();
    let list = || json(&host, &["snapshot", "list"]);
    let end = Instant::now() + harness::scaled(LIMIT);
    while !list().as_array().unwrap().iter().any(|one| one["good"] == true) {
        assert!(Instant::now() < end, "the files are not found good: {:#?}", events.seen());
        // It may have been said before anybody could follow.
        std::thread::sleep(Duration::from_millis(50));
    }
    let before = tree(&host);
    (lab, host, events, before)
}

const NGINX: &str = "nginx.service";
const LIMIT: Duration = Duration::from_secs(20);

/// What there is, with all that a snapshot promises to keep.
fn tree(host: &Host) -> String {
    host.sh("cd /etc && find nginx default/nginx -printf '%p %y %m %U:%G %T@ %l\\n' | sort && \
             find nginx default/nginx -type f -print0 | sort -z | xargs -0 sha256sum")
        .unwrap()
}

fn json(host: &Host, words: &[&str]) -> Value {
    let out = host.run([&["ftctl", "--json"], words].concat()).unwrap();
    serde_json::from_str(&out.stdout).unwrap_or_else(|error| panic!("{words:?}: {error}: {out:?}"))
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
