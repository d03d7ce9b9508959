//! The Debian package on a host: installed, upgraded, removed, purged, with services that must not notice.
//!
//! As root, after `cargo xtask deb`: `cargo test -p ftd-tests --test package -- --test-threads=1`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use harness::{Base, BootOptions, Cache, Host, Lab, base, scaled};

/// nginx hangs for the health check to find; apache2 has none, so it stays as it is made.
const CONFIG: &str = r#"
[inject]
enabled = true
[[workload]]
name = "web"
units = ["nginx"]
health = "http://127.0.0.1/"
health_every = "200ms"
[[workload]]
name = "other"
units = ["httpd"]
"#;

/// Files and units of the host, as far as they do not change by themselves. What is left of a package
/// after a purge shows as a difference.
const INVENTORY: &str = "
    find / -xdev \\( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /var/tmp -o -path /var/log \
        -o -path /var/lib/dpkg -o -path /var/cache -o -path /run/systemd/units -o -path /run/systemd/journal \\) \
        -prune -o -printf 'file %y %m %u %p\\n'
    find /run -mindepth 1 -name '*ftd*' -printf 'file %y %m %u %p\\n'
    find /sys/fs/cgroup -type d -name '*.service' -printf 'cgroup %p\\n'
    systemctl list-unit-files --no-legend --no-pager | sed 's/^/unit file /'
    systemctl list-units --type service --state running,failed --no-legend --no-pager --plain | sed 's/  */ /g; s/^/unit /'
";

fn deb() -> PathBuf {
    base::built_deb().expect("there is no package; `cargo xtask deb` builds it")
}

/// The same package with a higher version.
fn newer(deb: &Path, dir: &Path, version: &str) -> PathBuf {
    let (tree, built) = (dir.join(version), dir.join(format!("{version}.deb")));
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
    };
    run(Command::new("dpkg-deb").arg("-R").args([deb, &tree]));
    let control = tree.join("DEBIAN/control");
    let text = std::fs::read_to_string(&control).unwrap();
    let lines = text.lines().map(|line| match line.strip_prefix("Version: ") {
        Some(_) => format!("Version: {version}\n"),
        None => format!("{line}\n"),
    });
    std::fs::write(&control, lines.collect::<String>()).unwrap();
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "-z1", "-b"]).args([&tree, &built]));
    built
}

fn install(host: &Host, deb: &Path) {
    host.write("/root/ftd.deb", std::fs::read(deb).unwrap()).unwrap();
    host.ok(["dpkg", "--install", "/root/ftd.deb"]).unwrap();
    host.sh("rm /root/ftd.deb").unwrap();
}

fn inventory(host: &Host) -> BTreeSet<String> {
    host.sh(INVENTORY).unwrap().lines().map(str::to_owned).collect()
}

fn main_pid(host: &Host, unit: &str) -> String {
    host.ok(["systemctl", "show", "-p", "MainPID", "--value", unit]).unwrap().trim().to_owned()
}

/// nginx and apache2: the main process of each, which also answers.
fn services(host: &Host) -> [String; 2] {
    for url in ["http://127.0.0.1/", "http://127.0.0.1:8080/"] {
        host.ok(["curl", "-sf", "-m", "2", "-o", "/dev/null", url]).unwrap();
    }
    [main_pid(host, "nginx"), main_pid(host, "apache2")]
}

fn state(host: &Host) -> String {
    let active = host.run(["systemctl", "is-active", "ftd"]).unwrap().stdout;
    let enabled = host.run(["systemctl", "is-enabled", "ftd"]).unwrap().stdout;
    format!("{} {}", active.trim(), enabled.trim())
}

/// What ftd, or systemd about it, has said that is a warning or worse.
fn warnings(host: &Host) -> String {
    host.ok(["journalctl", "--sync"]).unwrap();
    // 1, silently: nothing.
    let said =
        host.run(["journalctl", "--unit=ftd", "--priority=warning", "--output=cat", "--quiet"]).unwrap();
    assert!(said.stderr.is_empty(), "{said:?}");
    said.stdout
}

/// How much systemd finds ftd's sandbox to leave open, from 0 to 10.
fn exposure(host: &Host) -> String {
    let text = host.sh("systemd-analyze security --no-pager ftd.service").unwrap();
    figure(&text, "Overall exposure level for ftd.service: ")
}

/// The same, as docs/security.md has it.
fn documented_exposure() -> String {
    figure(include_str!("../../docs/security.md"), "**exposure level ")
}

/// The number that follows these words.
fn figure(text: &str, words: &str) -> String {
    let rest = text.split_once(words).unwrap_or_else(|| panic!("no \"{words}\" in:\n{text}")).1;
    let number = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect::<String>();
    assert!(!number.is_empty(), "no number after \"{words}\": {rest}");
    number
}

fn eventually(host: &Host, what: &str, check: impl Fn() -> bool) {
    let end = Instant::now() + scaled(Duration::from_mins(1));
    while !check() {
        if Instant::now() > end {
            let events = host.run(["ftctl", "events", "--last", "60"]).map(|out| out.stdout + &out.stderr);
            panic!("{what} did not come true; ftd says:\n{}", events.unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Injects a fault and waits until the outage that follows is over.
fn heals(host: &Host, fault: &[&str]) {
    let healed = || {
        let events = host.sh("ftctl --json events -n 100000").unwrap();
        events.lines().filter(|line| line.contains(r#""event":"healed""#)).count()
    };
    let before = healed();
    host.ok(["ftctl", "inject"].iter().chain(fault)).unwrap();
    eventually(host, &format!("{fault:?} is healed"), || healed() > before);
    undone(host, &format!("{fault:?}"));
    services(host);
}

fn undone(host: &Host, what: &str) {
    eventually(host, &format!("{what} is undone"), || {
        host.sh("ftctl --json inject list").unwrap().trim() == "[]"
    });
}

#[test]
fn services_do_not_notice_the_package() {
    let dir = tempfile::tempdir().unwrap();
    let first = deb();
    let lab = Lab::on(Base::bare(&Cache::open().unwrap()).unwrap()).unwrap();
    let host = lab.boot("vm1", BootOptions::default()).unwrap();
    host.wait_running().unwrap();
    let pids = services(&host);
    let before = inventory(&host);

    // Installed: it runs, with nothing under care, and says nothing bad.
    install(&host, &first);
    assert_eq!(state(&host), "active enabled");
    let socket = host.sh("stat -c '%A %U %G' /run/ftd/ftd.sock").unwrap();
    assert_eq!(socket.trim(), "srw-rw---- root ftd");
    host.ok(["ftctl", "config", "check"]).unwrap();
    host.ok(["ftctl", "status"]).unwrap();
    let doctor = host.sh("ftctl doctor").unwrap();
    assert!(doctor.contains("eBPF programs are attached"), "{doctor}");
    assert_eq!(warnings(&host), "");
    assert_eq!(exposure(&host), documented_exposure());
    assert_eq!(services(&host), pids);

    // And it would say something bad at that level: a group that is not there, a configuration that is wrong.
    host.write("/etc/ftd/ftd.toml", "[api]\ngroup = \"nobodys\"\n").unwrap();
    host.sh("systemctl restart ftd").unwrap();
    eventually(&host, "a warning is in the journal as one", || warnings(&host).contains("nobodys"));
    host.write("/etc/ftd/ftd.toml", "[heal]\nrestart = 3\n").unwrap();
    assert!(!host.run(["systemctl", "restart", "ftd"]).unwrap().success());
    eventually(&host, "an error is in the journal as one", || {
        warnings(&host).contains("did you mean \"restarts\"")
    });

    // In its sandbox it heals, and breaks.
    host.write("/etc/ftd/ftd.toml", CONFIG).unwrap();
    host.sh("systemctl restart ftd").unwrap();
    assert_eq!(services(&host), pids);
    eventually(&host, "both are under care", || host.run(["ftctl", "status"]).unwrap().success());
    heals(&host, &["kill", "nginx"]);
    // A stop is respected, and over when its time is, or when somebody starts the unit before.
    let up = || host.sh("ftctl --json status").unwrap().matches(r#""up""#).count() == 2;
    host.ok(["ftctl", "inject", "stop", "nginx", "--for", "300ms"]).unwrap();
    undone(&host, "a stop with an end");
    eventually(&host, "nginx is up again by itself", up);
    host.ok(["ftctl", "inject", "stop", "nginx", "--for", "1h"]).unwrap();
    host.sh("systemctl start nginx").unwrap();
    undone(&host, "a stop that somebody ends");
    eventually(&host, "nginx is up again by hand", up);
    // A check that has never succeeded restarts nothing.
    let proven = || host.sh("ftctl --json status").unwrap().matches(r#""proven": true"#).count();
    eventually(&host, "nginx's check has succeeded", || proven() > 0);
    heals(&host, &["hang", "nginx", "--for", "1min"]);
    heals(&host, &["oom", "nginx"]);
    heals(&host, &["oom", "apache2"]);

    // Upgraded while nginx serves: another ftd, the same services, the same hold.
    let pids = services(&host);
    host.sh("ftctl hold nginx --reason upgrade").unwrap();
    let client = "n=0; while [ ! -e /tmp/enough ]; do n=$((n + 1)); \
        curl -sf -m 2 -o /dev/null http://127.0.0.1/ || echo lost; done; echo $n requests";
    let client = host.spawn(["sh", "-c", client]).unwrap();
    let ftd = main_pid(&host, "ftd");
    install(&host, &newer(&first, dir.path(), "9.0-1"));
    assert_eq!(state(&host), "active enabled");
    assert_ne!(main_pid(&host, "ftd"), ftd);
    assert!(host.sh("dpkg-query -W ftd").unwrap().contains("9.0-1"));
    assert!(host.sh("ftctl --json status").unwrap().contains("upgrade"), "the hold is kept");
    assert_eq!(host.read("/etc/ftd/ftd.toml").unwrap(), CONFIG, "the configuration is kept");
    host.sh("touch /tmp/enough").unwrap();
    let answers = client.wait_with_output().unwrap();
    let answers = String::from_utf8_lossy(&answers.stdout).into_owned();
    assert!(answers.contains(" requests") && !answers.contains("lost"), "{answers}");
    assert_eq!(services(&host), pids);

    // One that an administrator has switched off stays so.
    host.sh("systemctl disable --quiet --now ftd").unwrap();
    install(&host, &newer(&first, dir.path(), "9.1-1"));
    assert_eq!(state(&host), "inactive disabled");
    host.sh("systemctl enable --quiet --now ftd").unwrap();

    // So does one that is stopped, whether the upgrade comes about or not; one that dpkg has stopped for a
    // removal that then does not come about goes on.
    let script = |words: &str| {
        host.sh(&format!("DPKG_MAINTSCRIPT_PACKAGE=ftd /var/lib/dpkg/info/ftd.{words}")).unwrap();
    };
    host.sh("systemctl stop ftd").unwrap();
    install(&host, &newer(&first, dir.path(), "9.2-1"));
    script("postinst abort-upgrade 9.3-1");
    script("prerm remove");
    script("postinst abort-remove");
    assert_eq!(state(&host), "inactive enabled");
    host.sh("systemctl start ftd").unwrap();
    script("prerm remove");
    assert_eq!(state(&host), "inactive enabled");
    script("postinst abort-remove");
    assert_eq!(state(&host), "active enabled");

    // An upgrade to one that refuses the configuration leaves the old one at work, and says so.
    let ftd = main_pid(&host, "ftd");
    host.write("/etc/ftd/ftd.toml", format!("{CONFIG}[nonsense]\n")).unwrap();
    host.write("/root/ftd.deb", std::fs::read(newer(&first, dir.path(), "9.3-1")).unwrap()).unwrap();
    let upgraded = host.run(["dpkg", "--install", "/root/ftd.deb"]).unwrap();
    host.sh("rm /root/ftd.deb").unwrap();
    assert!(upgraded.success(), "{upgraded:?}");
    let words = &upgraded.stderr;
    assert!(words.contains("nonsense") && words.contains("systemctl restart ftd"), "{words}");
    assert_eq!((state(&host).as_str(), main_pid(&host, "ftd")), ("active enabled", ftd));
    host.write("/etc/ftd/ftd.toml", CONFIG).unwrap();

    // Removed and installed again: it runs again.
    host.ok(["dpkg", "--remove", "ftd"]).unwrap();
    assert_eq!(services(&host), pids);
    install(&host, &newer(&first, dir.path(), "9.4-1"));
    assert_eq!(state(&host), "active enabled");
    assert_eq!(services(&host), pids);
    let notes = host.sh("find /run -maxdepth 1 -name 'ftd-*' ! -name ftd-criu.sock").unwrap();
    assert_eq!(notes, "", "no note of dpkg's work is left");

    // Removed in the middle of a fault: what was injected is undone, the state is kept.
    eventually(&host, "both are up again", || host.run(["ftctl", "status"]).unwrap().success());
    host.sh("ftctl inject hang httpd --for 1h").unwrap();
    host.ok(["dpkg", "--remove", "ftd"]).unwrap();
    assert_eq!(services(&host), pids);
    assert!(host.run(["test", "-e", "/run/ftd"]).unwrap().status.code() == Some(1));
    host.sh("test -e /var/lib/ftd/heal.json && test -e /etc/ftd/ftd.toml").unwrap();

    // Purged: nothing is left but the group.
    host.sh("rm /tmp/enough").unwrap();
    host.ok(["dpkg", "--purge", "ftd"]).unwrap();
    assert_eq!(services(&host), pids);
    host.sh("getent group ftd").unwrap();
    let changed = |line: &&String| {
        let path = line.rsplit(' ').next().unwrap_or_default();
        // The group's name is kept, with the copies that its making left; times of a timer; curl's client.
        !["/etc/group-", "/etc/gshadow-", "/etc/.pwd.lock"].contains(&path)
    };
    let after = inventory(&host);
    let left: Vec<_> = after.difference(&before).filter(changed).collect();
    let gone: Vec<_> = before.difference(&after).filter(changed).collect();
    assert!(left.is_empty() && gone.is_empty(), "left behind: {left:#?}\ngone: {gone:#?}");
    assert_eq!(
        host.sh("findmnt --raw --noheadings --types bpf --output TARGET | grep ftd || true").unwrap(),
        ""
    );
    assert!(!host.run(["test", "-e", "/run/ftd.bpf"]).unwrap().success(), "the fence's place is gone");
}
