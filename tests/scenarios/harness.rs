//! The test hosts themselves: what every other scenario relies on.
//!
//! As root, after `cargo xtask setup`: `cargo test -p ftd-tests --test harness -- --test-threads=1`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use harness::host::State;
use harness::{Base, BootOptions, Cache, Host, Lab, lab, leftovers, scaled};

/// Whether `from` gets nginx's page from `to` within a second.
fn reaches(from: &Host, to: &Host) -> bool {
    from.run(["curl", "-sf", "-m", "1", "-o", "/dev/null", &format!("http://{}/", to.address())])
        .unwrap()
        .success()
}

/// Waits for something that no event tells of: a switch of the bridge that has to pass packets again.
fn eventually(what: &str, check: impl Fn() -> bool) {
    let end = Instant::now() + scaled(Duration::from_secs(10));
    while !check() {
        assert!(Instant::now() < end, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn boot_two(lab: &Lab) -> (Host, Host) {
    let one = lab.boot("vm1", BootOptions::default()).unwrap();
    let two = lab.boot("vm2", BootOptions::default()).unwrap();
    for host in [&one, &two] {
        let state = host.wait_running().unwrap();
        let failed = host.ok(["systemctl", "--failed", "--no-legend", "--plain"]).unwrap();
        assert_eq!(state, State::Running, "{} has failed units:\n{failed}", host.name());
    }
    (one, two)
}

fn all_that_can_be_done_to_a_host() {
    let lab = Lab::new().unwrap();
    let id = lab.id().to_owned();
    let (one, two) = boot_two(&lab);

    // Inside: names, addresses, processes, cgroups, files.
    assert_eq!(one.sh("hostname").unwrap(), "vm1\n");
    assert_eq!(one.sh("cat /proc/self/cgroup").unwrap(), expected_cgroups(&one));
    let pid: u32 = one.sh("systemctl show -p MainPID --value nginx").unwrap().trim().parse().unwrap();
    assert!((9000..18000).contains(&pid), "nginx on vm1 has PID {pid}");
    assert_ne!(one.read("/etc/machine-id").unwrap(), two.read("/etc/machine-id").unwrap());
    assert_eq!(one.run(["sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap().status.code(), Some(3));
    assert_eq!(one.run(["no-such-program"]).unwrap().status.code(), Some(127));
    one.write("/root/here", "data").unwrap();
    assert_eq!(one.sh("cat /root/here").unwrap(), "data");
    // What leads out of the host by a link does not lead out of it.
    one.sh("ln -s /etc/hostname /root/link").unwrap();
    assert_eq!(one.read("/root/link").unwrap(), "vm1\n");
    assert!(one.bus().unwrap().exists());

    // The machine's own settings cannot be reached, the host's can.
    assert!(!one.run(["sh", "-c", "echo 1 > /proc/sys/kernel/panic"]).unwrap().success());
    one.sh("echo 1 > /proc/sys/net/ipv4/ip_forward").unwrap();
    one.sh("test -d /sys/kernel/tracing/events && mkdir /sys/fs/bpf/x && rmdir /sys/fs/bpf/x").unwrap();
    if let Some(group) = one.memory_cgroup() {
        let limit = std::fs::read_to_string(group.join("memory.limit_in_bytes")).unwrap();
        assert_eq!(limit.trim(), (2u64 << 30).to_string());
        assert_eq!(one.sh("cat /run/cgroup-v1/memory/memory.limit_in_bytes").unwrap(), limit);
        one.sh("mkdir /run/cgroup-v1/memory/x && rmdir /run/cgroup-v1/memory/x").unwrap();
    }

    // The network: between hosts, from the client as a program and as a closure.
    assert!(reaches(&one, &two) && reaches(&two, &one));
    let url = format!("http://{}:8080/", one.address());
    assert!(lab.client(["curl", "-sf", "-o", "/dev/null", &url]).unwrap().success(), "apache2");
    let peer =
        lab.on_network(|| TcpStream::connect((two.address(), 80)).unwrap().peer_addr()).unwrap().unwrap();
    assert_eq!(peer.ip(), two.address());

    // A command that is killed here ends there.
    let mut child = one.spawn(["sleep", "1234"]).unwrap();
    eventually("sleep runs", || one.run(["pgrep", "-f", "^sleep 1234"]).unwrap().success());
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("sleep is gone", || !one.run(["pgrep", "-f", "^sleep 1234"]).unwrap().success());

    // The cable.
    two.cut().unwrap();
    assert!(!reaches(&one, &two));
    two.heal().unwrap();
    eventually("a healed host is reached", || reaches(&one, &two));

    // Hanging: the kernel still accepts the connection, and nobody answers.
    two.freeze().unwrap();
    assert!(two.is_frozen() && !one.is_frozen());
    assert!(!reaches(&one, &two));
    two.thaw().unwrap();
    assert!(reaches(&one, &two));

    // Power, and the disk that outlives it.
    two.sh("echo kept > /root/kept").unwrap();
    let machine_id = two.read("/etc/machine-id").unwrap();
    two.kill().unwrap();
    assert!(!two.is_up() && two.run(["true"]).is_err());
    assert!(!reaches(&one, &two));
    two.start().unwrap();
    assert_eq!(two.wait_running().unwrap(), State::Running);
    assert_eq!(two.read("/root/kept").unwrap(), "kept\n");
    assert_eq!(two.read("/etc/machine-id").unwrap(), machine_id);
    two.reboot().unwrap();
    assert_eq!(two.wait_running().unwrap(), State::Running);
    eventually("a rebooted host is reached", || reaches(&one, &two));

    // A frozen host can be killed too; one host ends without the other.
    two.freeze().unwrap();
    two.down().unwrap();
    assert!(one.is_up() && lab.host("vm2").is_err());

    assert!(!lab.leftovers().unwrap().is_empty());
    drop(lab);
    assert_eq!(leftovers(&id).unwrap(), Vec::<String>::new());
}

fn expected_cgroups(host: &Host) -> String {
    // Only hierarchies that the host has groups in are shown from its own root.
    let text = host.sh("cat /proc/1/cgroup").unwrap();
    text.replace("0::/init.scope", "0::/harness")
}

#[test]
fn hosts_live_and_leave_nothing_behind() {
    all_that_can_be_done_to_a_host();
}

#[test]
fn and_once_more() {
    all_that_can_be_done_to_a_host();
}

#[test]
fn labs_do_not_see_each_other() {
    let (a, b) = (Lab::new().unwrap(), Lab::new().unwrap());
    let in_a = a.boot("vm1", BootOptions::with_config("# of a\n")).unwrap();
    let in_b = b.boot("vm1", BootOptions::with_config("# of b\n")).unwrap();
    in_a.wait_running().unwrap();
    in_b.wait_running().unwrap();
    assert_eq!(in_a.read("/etc/ftd/ftd.toml").unwrap(), "# of a\n");
    assert_eq!(in_b.read("/etc/ftd/ftd.toml").unwrap(), "# of b\n");
    let (id, other) = (a.id().to_owned(), b.id().to_owned());
    a.down().unwrap();
    assert_eq!(leftovers(&id).unwrap(), Vec::<String>::new());
    assert!(in_b.is_up());
    b.down().unwrap();
    assert_eq!(leftovers(&other).unwrap(), Vec::<String>::new());
}

#[test]
fn a_panic_leaves_nothing_behind() {
    let id = Mutex::new(String::new());
    let outcome = std::panic::catch_unwind(|| {
        let lab = Lab::new().unwrap();
        lab.id().clone_into(&mut id.lock().unwrap());
        lab.boot("vm1", BootOptions::default()).unwrap();
        panic!("as a failed assertion would");
    });
    assert!(outcome.is_err());
    assert_eq!(leftovers(&id.lock().unwrap()).unwrap(), Vec::<String>::new());
}

/// Not a test: the victim of the next one.
#[test]
#[ignore = "only for `a_killed_owner_leaves_nothing_behind`"]
fn owner() {
    let lab = Lab::new().unwrap();
    lab.boot("vm1", BootOptions::default()).unwrap();
    println!("lab={}", lab.id());
    // Until it is killed, or the test that it is for has ended.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_killed_owner_leaves_nothing_behind() {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "owner", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let id = lines
        .map(Result::unwrap)
        .find_map(|line| line.split_once("lab=").map(|(_, id)| id.to_owned()))
        .unwrap();
    assert!(!leftovers(&id).unwrap().is_empty());
    owner.kill().unwrap();
    owner.wait().unwrap();
    eventually("the keeper has torn the lab down", || leftovers(&id).unwrap().is_empty());
}

#[test]
fn what_is_left_after_a_show_stays_until_the_next_one() {
    let id = format!("show-{}", std::process::id());
    let base = || Base::find().unwrap();
    let lab = Lab::for_a_show(&id, base()).unwrap();
    let error = Lab::for_a_show(&id, base()).unwrap_err().to_string();
    assert!(error.contains("belongs to process"), "{error}");
    lab.boot("vm1", BootOptions::default()).unwrap();
    lab.leave().unwrap();
    Lab::open(&id).unwrap().host("vm1").unwrap().wait_running().unwrap();

    // The next makes room for itself, and leaves nothing behind when it is cut short.
    let lab = Lab::for_a_show(&id, base()).unwrap();
    lab.boot("vm1", BootOptions::default()).unwrap();
    drop(lab);
    assert_eq!(leftovers(&id).unwrap(), Vec::<String>::new());

    // What was made by hand is nobody's to end.
    drop(Lab::by_hand(&id, base()).unwrap());
    let error = Lab::for_a_show(&id, base()).unwrap_err().to_string();
    assert!(error.contains("hosts down"), "{error}");
    lab::teardown(&id).unwrap();
    assert_eq!(leftovers(&id).unwrap(), Vec::<String>::new());
}

#[test]
fn what_was_not_finished_is_swept_away_or_mended() {
    let id = format!("half-{}", std::process::id());
    let unfinished = Path::new("/run/ftd-lab").join(format!(".new-{id}"));
    std::fs::create_dir_all(unfinished.join("hosts")).unwrap();
    let lab = Lab::by_hand(&id, Base::find().unwrap()).unwrap();
    assert!(!unfinished.exists());
    // As if whoever made it had been killed before the network was there.
    assert!(Command::new("ip").args(["netns", "del", &format!("ftd-{id}")]).status().unwrap().success());
    drop(lab);
    let lab = Lab::by_hand(&id, Base::find().unwrap()).unwrap();
    let host = lab.boot("vm1", BootOptions::default()).unwrap();
    host.wait_running().unwrap();
    let url = format!("http://{}/", host.address());
    assert!(lab.client(["curl", "-sf", "-m", "5", "-o", "/dev/null", &url]).unwrap().success());
    lab::teardown(&id).unwrap();
    assert_eq!(leftovers(&id).unwrap(), Vec::<String>::new());
}

#[test]
fn what_cannot_be_is_said() {
    let lab = Lab::new().unwrap();
    let error = lab.boot("web", BootOptions::default()).unwrap_err().to_string();
    assert!(error.contains("vm1 to vm99"), "{error}");
    let error = lab.host("vm5").unwrap_err().to_string();
    assert!(error.contains("there is no host vm5"), "{error}");
    let host = lab.boot("vm1", BootOptions::default()).unwrap();
    assert!(lab.boot("vm1", BootOptions::default()).is_err());
    host.kill().unwrap();
    host.kill().unwrap();
    let error = host.ok(["true"]).unwrap_err().to_string();
    assert!(error.contains("vm1 is not up"), "{error}");
}

#[test]
fn a_package_becomes_a_layer() {
    let cache = Cache::open().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    std::fs::create_dir_all(tree.join("etc/stand-in")).unwrap();
    let unique = dir.path().file_name().unwrap().to_str().unwrap();
    std::fs::write(tree.join("etc/stand-in/name"), unique).unwrap();
    let control = "Package: stand-in\nVersion: 1\nArchitecture: all\nMaintainer: T <t@example.invalid>\nDescription: x\n";
    std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
    let deb = dir.path().join("stand-in.deb");
    let build =
        Command::new("dpkg-deb").args(["--root-owner-group", "-b"]).args([&tree, &deb]).output().unwrap();
    assert!(build.status.success(), "{build:?}");

    let base = harness::Base::with_deb(&cache, &deb).unwrap();
    let again = harness::Base::with_deb(&cache, &deb).unwrap();
    assert_eq!(base.lowers(), again.lowers(), "made once");
    let lab = Lab::on(base).unwrap();
    let host = lab.boot("vm1", BootOptions::default()).unwrap();
    host.wait_running().unwrap();
    assert_eq!(host.read("/etc/stand-in/name").unwrap(), unique);
    assert!(host.sh("dpkg -s stand-in").unwrap().contains("Status: install ok installed"));
    // It can be taken off again on a host: the layer below stays as it was.
    host.sh("dpkg --purge stand-in").unwrap();
    assert!(host.read("/etc/stand-in/name").is_err());
}
