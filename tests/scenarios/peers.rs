//! Nodes of a cluster on real hosts: made and joined by `ftctl`, cut apart and healed, revoked; snapshots that go from one
//! to the other, over cut links and killed daemons.
//!
//! As root: `cargo xtask test --only peers`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::{Duration, Instant};

use harness::ftctl::{json, refused};
use harness::{BootOptions, Events, Host, Lab};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

fn config(name: &str, more: &str) -> String {
    let (own, others): (Vec<_>, Vec<_>) = (1..=3).partition(|n| name == format!("vm{n}"));
    let peers: Vec<_> = others.iter().map(|n| format!("\"vm{n}=10.77.0.1{n}:7443\"")).collect();
    format!(
        "[node]\nname = \"{name}\"\nlisten = \"10.77.0.1{}:7443\"\n[cluster]\npeers = [{}]\nredial_max = \"1s\"\n{more}\n\
         [[workload]]\nname = \"web\"\nunits = [\"nginx\"]\nfiles = [\"/etc/nginx\", \"/root/big\"]\n\
         on_change = \"ignore\"\nnodes = [\"vm1\", \"vm2\"]\n",
        own[0],
        peers.join(", "),
    )
}

fn boot(lab: &Lab, name: &str, more: &str) -> Host {
    let host = lab.boot(name, BootOptions::with_config(config(name, more))).unwrap();
    host.wait_running().unwrap();
    host
}

fn token(host: &Host, more: &[&str]) -> String {
    json(host, &[&["cluster", "token"], more].concat())["token"].as_str().unwrap().to_owned()
}

/// Two nodes of one cluster.
fn pair(more: &str) -> (Lab, Host, Host) {
    let lab = Lab::new().unwrap();
    let (vm1, vm2) = (boot(&lab, "vm1", more), boot(&lab, "vm2", more));
    vm1.ok(["ftctl", "cluster", "init"]).unwrap();
    vm2.ok(["ftctl", "cluster", "join", &token(&vm1, &[])]).unwrap();
    wait(&vm1, "vm2", "up");
    wait(&vm2, "vm1", "up");
    (lab, vm1, vm2)
}

fn peer(host: &Host, name: &str) -> Value {
    let status = json(host, &["cluster", "peers"]);
    let all = status["peers"].as_array().unwrap();
    all.iter().find(|peer| peer["name"] == name).cloned().unwrap_or(Value::Null)
}

fn wait(host: &Host, name: &str, state: &str) -> Value {
    until(&format!("{name} is {state} for {}", host.name()), || {
        Some(peer(host, name)).filter(|peer| peer["state"] == state)
    })
}

fn until<T>(what: &str, mut is: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + harness::scaled(LIMIT);
    loop {
        if let Some(it) = is() {
            return it;
        }
        assert!(Instant::now() < end, "it does not come to this: {what}");
        // What is asked for is a state on another host, over its own command.
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn event(events: &mut Events, kind: &str, peer: &str) -> Value {
    events
        .wait(&format!("{kind} of {peer}"), LIMIT, |event| event["event"] == kind && event["peer"] == peer)
        .unwrap()
}

#[test]
fn a_cluster_is_made_joined_and_left_by_who_is_revoked() {
    let lab = Lab::new().unwrap();
    let [vm1, vm2, vm3] = ["vm1", "vm2", "vm3"].map(|name| boot(&lab, name, ""));
    assert!(refused(&vm1, &["cluster", "token"]).contains("in no cluster yet"));
    let made = vm1.ok(["ftctl", "cluster", "init", "--name", "shop"]).unwrap();
    assert!(made.contains("vm1 is the first node of the cluster shop"), "{made}");
    assert!(refused(&vm1, &["cluster", "init"]).contains("in the cluster \"shop\" already"));
    let mut events = Events::follow(&vm1).unwrap();

    // The text that people see can be entered as it is.
    let first = vm1.ok(["ftctl", "cluster", "token", "--for", "5min"]).unwrap();
    let first = first.trim();
    assert!(first.starts_with("ftctl cluster join ftd1-"), "{first}");
    let joined = vm2.sh(first).unwrap();
    assert!(joined.contains("joined the cluster shop, taken in by vm1"), "{joined}");
    event(&mut events, "peer_joined", "vm2");
    wait(&vm1, "vm2", "up");
    // Again; by another; too late; mistyped.
    let first = first.rsplit(' ').next().unwrap();
    assert!(refused(&vm2, &["cluster", "join", first]).contains("already, as vm2"));
    assert!(refused(&vm3, &["cluster", "join", first]).contains("used already"));
    let late = token(&vm1, &["--for", "1s"]);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(refused(&vm3, &["cluster", "join", &late]).contains("expired, at"));
    assert!(refused(&vm3, &["cluster", "join", &late[..60]]).contains("cut short or mistyped"));
    assert!(refused(&vm2, &["cluster", "token"]).contains("do it on vm1"));
    assert!(refused(&vm1, &["cluster", "token", "--for", "3d"]).contains("at most 1day"));
    // From standard input.
    let second = token(&vm1, &[]);
    vm3.sh(&format!("echo {second} | ftctl cluster join -")).unwrap();
    for (host, name) in [(&vm1, "vm3"), (&vm2, "vm3"), (&vm3, "vm1"), (&vm3, "vm2")] {
        let peer = wait(host, name, "up");
        assert!(peer["certificate"]["until"].is_string(), "{peer}");
    }
    let text = vm2.ok(["ftctl", "cluster", "peers"]).unwrap();
    assert!(text.contains("in cluster shop") && text.contains("CA on vm1") && text.contains("vm3"), "{text}");
    // Secrets are root's.
    let modes = vm2.sh("stat -c '%a %U %n' /var/lib/ftd/cluster /var/lib/ftd/cluster/*").unwrap();
    assert!(
        modes.lines().all(|line| line.starts_with("700 root") || line.starts_with("600 root")),
        "{modes}"
    );
    assert!(!vm2.sh("ls /var/lib/ftd/cluster").unwrap().contains("authority"));

    // A restart of ftd does not ask for anything.
    vm2.ok(["systemctl", "restart", "ftd"]).unwrap();
    event(&mut events, "peer_down", "vm2");
    event(&mut events, "peer_up", "vm2");
    vm2.ok(["systemctl", "kill", "-s", "KILL", "ftd"]).unwrap();
    until("ftd is back", || vm2.run(["ftctl", "status"]).unwrap().status.code().filter(|code| *code != 3));
    wait(&vm2, "vm1", "up");
    wait(&vm1, "vm2", "up");

    vm1.ok(["ftctl", "cluster", "revoke", "vm3"]).unwrap();
    event(&mut events, "peer_revoked", "vm3");
    let down = wait(&vm1, "vm3", "down");
    assert!(down["problem"][0].as_str().unwrap().contains("revoked"), "{down}");
    wait(&vm2, "vm3", "down");
    until("vm3 knows why", || {
        let text = vm3.ok(["ftctl", "events", "--last", "1000"]).unwrap();
        text.contains("this node's certificate was revoked").then_some(())
    });
    assert!(refused(&vm1, &["cluster", "revoke", "vm9"]).contains("there are: vm1, vm2"));
    assert!(refused(&vm3, &["cluster", "join", &token(&vm1, &[])]).contains("to leave it"));
    vm3.sh("systemctl stop ftd && rm -r /var/lib/ftd/cluster && systemctl start ftd").unwrap();
    vm3.ok(["ftctl", "cluster", "join", &token(&vm1, &[])]).unwrap();
    wait(&vm2, "vm3", "up");
}

#[test]
fn who_is_cut_off_is_down_and_who_is_healed_is_up_again() {
    let (_lab, vm1, vm2) = pair("");
    let mut events = Events::follow(&vm1).unwrap();
    for round in 0..3 {
        match round {
            0 => vm2.cut().unwrap(),
            1 => vm2.freeze().unwrap(),
            _ => vm2.kill().unwrap(),
        }
        let began = Instant::now();
        let down = event(&mut events, "peer_down", "vm2");
        assert!(began.elapsed() < harness::scaled(Duration::from_secs(8)), "{:?}", began.elapsed());
        assert!(
            !down["cause"].as_str().unwrap().is_empty() && !down["mend"].as_str().unwrap().is_empty(),
            "{down}"
        );
        match round {
            0 => vm2.heal().unwrap(),
            1 => vm2.thaw().unwrap(),
            _ => vm2.start().unwrap(),
        }
        let up = event(&mut events, "peer_up", "vm2");
        assert!(up["address"].as_str().unwrap().starts_with("10.77.0.12:"), "{up}");
    }
    let up = wait(&vm1, "vm2", "up");
    assert!(up["round_trip_us"][0].as_u64().is_some_and(|us| us < 100_000), "{up}");
}

#[test]
fn a_second_link_takes_over_before_anybody_is_down() {
    let lab = Lab::new().unwrap();
    let hosts = ["vm1", "vm2"].map(|name| {
        let text = config(name, "")
            .replace(&format!("listen = \"10.77.0.1{}:7443\"", &name[2..]), "listen = \"0.0.0.0:7443\"")
            .replace(", \"vm3=10.77.0.13:7443\"", "")
            .replace("=10.77.0.11:7443", "=10.77.0.11:7443,10.78.0.11:7443")
            .replace("=10.77.0.12:7443", "=10.77.0.12:7443,10.78.0.12:7443");
        let host = lab.boot(name, BootOptions::with_config(text)).unwrap();
        host.wait_running().unwrap();
        let add = format!(
            "ip addr add 10.78.0.1{}/24 dev $(ip -o -4 addr show | awk '/10\\.77\\./ {{print $2; exit}}')",
            &name[2..]
        );
        host.sh(&add).unwrap();
        host
    });
    let [vm1, vm2] = &hosts;
    vm1.ok(["ftctl", "cluster", "init"]).unwrap();
    vm2.ok(["ftctl", "cluster", "join", &token(vm1, &[])]).unwrap();
    let up = wait(vm1, "vm2", "up");
    wait(vm2, "vm1", "up");
    let mut events = Events::follow(vm1).unwrap();
    // Whichever link is in use breaks; then the other, when the first is whole again.
    let mut link = up["address"].as_str().unwrap().starts_with("10.77.");
    for _ in 0..2 {
        let (old, new) = if link { ("10.77.0.12", "10.78.0.12") } else { ("10.78.0.12", "10.77.0.12") };
        vm2.sh(&format!(
            "nft add table inet cut && nft add chain inet cut in '{{ type filter hook input priority 0; }}' && \
             nft add chain inet cut out '{{ type filter hook output priority 0; }}' && \
             nft add rule inet cut in ip daddr {old} udp sport 7443 drop && \
             nft add rule inet cut in ip daddr {old} udp dport 7443 drop && \
             nft add rule inet cut out ip saddr {old} udp dport 7443 drop && \
             nft add rule inet cut out ip saddr {old} udp sport 7443 drop"
        ))
        .unwrap();
        let path = event(&mut events, "peer_path", "vm2");
        assert!(path["address"].as_str().unwrap().starts_with(new), "{path}");
        vm2.ok(["nft", "delete", "table", "inet", "cut"]).unwrap();
        link = !link;
        wait(vm1, "vm2", "up");
    }
    assert!(!events.seen().iter().any(|event| event["event"] == "peer_down"), "{:#?}", events.seen());
}

#[test]
fn nobody_else_gets_in_and_no_service_notices() {
    let (lab, vm1, vm2) = pair("handshakes = 4\n");
    let before = vm1.ok(["systemctl", "show", "-P", "MainPID", "nginx"]).unwrap();
    // Garbage, and packets that look like the beginning of a connection.
    let garbage = "import os, socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nfor n in range(20000):\n\
                   \x20 b = os.urandom(n % 1400)\n  s.sendto(b if n % 2 else b'\\xc3\\0\\0\\0\\1\\x08' + b, ('10.77.0.11', 7443))\n";
    let out = lab.client(["python3", "-c", garbage]).unwrap();
    assert!(out.success(), "{out:?}");
    assert_eq!(peer(&vm1, "vm2")["state"], "up");
    // A node of another cluster that calls itself vm2 and knows the address.
    let false_vm2 = lab
        .boot("vm3", BootOptions::with_config(config("vm2", "").replace("10.77.0.12:", "10.77.0.13:")))
        .unwrap();
    false_vm2.wait_running().unwrap();
    false_vm2.ok(["ftctl", "cluster", "init"]).unwrap();
    until("it is turned away", || {
        let text = vm1.ok(["ftctl", "events", "--last", "1000"]).unwrap();
        text.contains("its certificate is of another cluster").then_some(())
    });
    let told = until("it knows", || Some(peer(&false_vm2, "vm1")).filter(|peer| peer["problem"].is_array()));
    assert_eq!(told["state"], "down", "{told}");
    assert_eq!(peer(&vm2, "vm1")["state"], "up");
    assert_eq!(peer(&vm1, "vm2")["address"], "10.77.0.12:7443");
    assert_eq!(vm1.ok(["systemctl", "show", "-P", "MainPID", "nginx"]).unwrap(), before);
    assert_eq!(vm1.starts("ftd.service").unwrap(), 1, "it did not end by it");
}

/// How far the snapshots of vm1 are on vm2.
fn replica(host: &Host) -> Value {
    json(host, &["status"])["replicas"][0].clone()
}

#[test]
fn snapshots_are_on_the_other_node_whatever_happens_between() {
    let (_lab, vm1, vm2) = pair("bandwidth = \"8MiB\"\nreplica_late = \"2s\"\n");
    let mut events = Events::follow(&vm1).unwrap();
    vm1.ok(["ftctl", "snapshot", "take", "web", "--good"]).unwrap();
    let is =
        |number: u64| move |event: &Value| event["event"] == "replicated" && event["generation"] == number;
    events.wait("the first one", LIMIT, is(1)).unwrap();
    until("it is good there", || {
        let list = json(&vm2, &["snapshot", "list"]);
        (list[0]["generation"] == 1 && list[0]["good"] == true).then_some(())
    });
    // A large one, which goes slowly; on its way the link is cut, then ftd is killed on either side.
    vm1.sh("head -c 64M /dev/urandom > /root/big").unwrap();
    // Not through the sandbox, where /root is empty.
    vm1.ok(["ftctl", "snapshot", "take", "web"]).unwrap();
    let size = 64_u64 << 20;
    let sent = |least: u64| {
        until("it is on its way", || {
            let sending = &replica(&vm1)["sending"];
            let (done, total) = (sending["done"].as_u64()?, sending["total"].as_u64()?);
            (done >= least).then_some((done, total))
        })
    };
    let (done, total) = sent(16 << 20);
    assert!(total > size * 9 / 10, "{done} of {total}");
    vm2.cut().unwrap();
    let behind = events.wait("told", LIMIT, |event| event["event"] == "replica_behind").unwrap();
    assert_eq!(behind["peer"], "vm2", "{behind}");
    event(&mut events, "peer_down", "vm2");
    vm2.heal().unwrap();
    let (_, left) = sent(1);
    assert!(left < size - (10 << 20), "{left} are sent again of {size}");
    sent(8 << 20);
    vm2.ok(["systemctl", "kill", "-s", "KILL", "ftd"]).unwrap();
    until("it goes on", || {
        let total = replica(&vm1)["sending"]["total"].as_u64()?;
        (total < left - (5 << 20)).then_some(())
    });
    vm1.ok(["systemctl", "kill", "-s", "KILL", "ftd"]).unwrap();
    until("all of it is there", || {
        let list = json(&vm2, &["snapshot", "list"]);
        list.as_array()?.iter().any(|one| one["generation"] == 2).then_some(())
    });
    until("vm1 knows", || (replica(&vm1)["there"] == 2).then_some(()));
    assert!(vm2.run(["ftctl", "snapshot", "verify"]).unwrap().success());
    assert_eq!(vm2.sh("ls /var/lib/ftd/snapshots/v1/incoming").unwrap(), "");
    // VM2 can have vm1's files.
    vm1.sh("echo '# of vm1' >> /etc/nginx/nginx.conf").unwrap();
    vm1.ok(["ftctl", "snapshot", "take", "web", "--good"]).unwrap();
    until("the newest is good there", || {
        let list = json(&vm2, &["snapshot", "list"]);
        list.as_array()?.iter().any(|one| one["generation"] == 3 && one["good"] == true).then_some(())
    });
    vm2.ok(["ftctl", "restore", "web"]).unwrap();
    let tail = vm2.sh("tail -n 1 /etc/nginx/nginx.conf; cat /root/big | sha256sum").unwrap();
    assert_eq!(tail, vm1.sh("tail -n 1 /etc/nginx/nginx.conf; cat /root/big | sha256sum").unwrap());
}
