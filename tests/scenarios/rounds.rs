//! Services stopped by a snapshot and brought back from it as the units that they were, again and again: nginx,
//! apache2 and the worker in turns, with a client of the worker's that never lets go of its connection, under the care of
//! an ftd that would start them at once if it did not know better, and every few rounds without one.
//!
//! As root: `cargo xtask test --only rounds`. `FTD_ROUNDS=N` makes it longer or shorter, `FTD_MEMORY=1024` gives the
//! worker so many MiB.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use harness::criu::{self, WORKER, WORKER_PORT};
use harness::journal::Lines;
use harness::{BootOptions, Host, Lab, given, scaled};
use serde_json::Value;

const CONFIG: &str = r#"
[snapshot]
keep = 3
[[workload]]
name = "nginx"
units = ["nginx"]
on_stop = "restart"
[[workload]]
name = "apache2"
units = ["httpd"]
on_stop = "restart"
[[workload]]
name = "worker"
units = ["worker"]
on_stop = "restart"
"#;
/// Every so many rounds there is no ftd, and services are also stopped and started in the ordinary way.
const ORDINARY: u64 = 5;
const LIMIT: Duration = Duration::from_secs(20);

/// A web server, and where it notes what it was asked for.
struct Web {
    unit: &'static str,
    port: u16,
    log: &'static str,
}

const WEB: [Web; 2] = [
    Web { unit: "nginx", port: 80, log: "/var/log/nginx/access.log" },
    Web { unit: "apache2", port: 8080, log: "/var/log/apache2/access.log" },
];

#[test]
fn services_come_back_from_snapshots_round_after_round() {
    let rounds = given("FTD_ROUNDS").unwrap_or(20);
    let memory = given("FTD_MEMORY").unwrap_or(64);
    let lab = Lab::new().unwrap();
    let options = BootOptions {
        memory: (2 << 30) + 3 * (memory << 20),
        disk: (4 << 30) + 2 * (memory << 20),
        ..BootOptions::with_config(CONFIG)
    };
    let host = lab.boot("vm1", options).unwrap();
    host.wait_running().unwrap();
    criu::prepare(&host).unwrap();
    // Ordinary starts come faster than systemd's limit for starts by hand allows.
    let limit = "[Unit]\\nStartLimitIntervalSec=0\\n";
    host.sh(&format!(
        "mkdir -p /etc/systemd/system/service.d && printf '{limit}' > /etc/systemd/system/service.d/limit.conf"
    ))
    .unwrap();
    criu::start_worker(
        &host,
        Path::new(env!("CARGO_BIN_EXE_worker")),
        &format!("--memory {memory} --dirty 8MiB/s"),
        // Shorter than it stands still, where the machine is slow or the memory large.
        "WatchdogSec=2",
    )
    .unwrap();

    let mut rig = Rig {
        giver: Giver::start(&lab, &host),
        lines: Lines::follow(&host, WORKER).unwrap(),
        traces: BTreeSet::new(),
        costs: BTreeMap::new(),
        lab,
        host,
    };
    for web in &WEB {
        rig.web_goes_on(web, "before");
    }
    rig.traces = rig.traces();
    for round in 0..rounds {
        let alone = round % ORDINARY == ORDINARY - 1;
        if alone {
            rig.host.ok(["systemctl", "stop", "ftd", "ftd-criu.socket"]).unwrap();
        }
        for web in &WEB {
            rig.web(web, round, alone);
        }
        rig.worker(alone);
        if alone {
            rig.host.ok(["systemctl", "start", "ftd"]).unwrap();
            rig.host.ok(["ftctl", "snapshot", "gc"]).unwrap();
        }
        if round % 10 == 9 {
            println!("{} rounds", round + 1);
        }
    }
    rig.watchdog_bites();
    for ((unit, what), costs) in &mut rig.costs {
        costs.sort_unstable();
        let ms = |us: u64| us as f64 / 1000.0;
        let (median, most) = (ms(costs[costs.len() / 2]), ms(costs[costs.len() - 1]));
        println!("{unit}: {what}: median {median:.1} ms, most {most:.1} ms of {}", costs.len());
    }
}

struct Rig {
    lab: Lab,
    host: Host,
    giver: Giver,
    /// What the worker prints.
    lines: Lines,
    /// What there is beside the services themselves, before the first round.
    traces: BTreeSet<String>,
    /// Microseconds, by unit and what for.
    costs: BTreeMap<(String, &'static str), Vec<u64>>,
}

/// What of a service a round must not change.
#[derive(Debug, PartialEq, Eq)]
struct Form {
    processes: BTreeSet<u32>,
    /// As `systemctl show` prints them.
    properties: String,
}

impl Rig {
    fn show(&self, unit: &str, property: &str) -> String {
        self.host.ok(["systemctl", "show", "-P", property, unit]).unwrap().trim().to_owned()
    }

    fn number(&self, unit: &str, property: &str) -> u64 {
        self.show(unit, property).parse().unwrap()
    }

    fn processes(&self, unit: &str) -> BTreeSet<u32> {
        let list = format!("/sys/fs/cgroup/system.slice/{unit}.service/cgroup.procs");
        let text = self.host.sh(&format!("cat {list} 2>/dev/null || true")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    fn form(&self, unit: &str) -> Form {
        let properties = "-p MainPID,ControlGroup,Type,ActiveState,SubState,Result,NRestarts,FragmentPath,DropInPaths,\
                          NeedDaemonReload,Restart,PIDFile,WatchdogUSec,NotifyAccess,ExecStart,ExecStop";
        let properties = self.host.sh(&format!("systemctl show {properties} {unit}")).unwrap();
        // When the unit was last started is part of `ExecStart`, and may well change.
        let properties = properties.lines().map(|line| line.split(" ; start_time=").next().unwrap_or(line));
        Form { processes: self.processes(unit), properties: properties.collect::<Vec<_>>().join("\n") }
    }

    /// Stopped by a snapshot and restored from it.
    fn round(&mut self, unit: &str) {
        let before = self.form(unit);
        let json = |host: &Host, words: &[&str]| -> Value {
            serde_json::from_str(&host.ok([&["ftctl", "--json"], words].concat()).unwrap()).unwrap()
        };
        let begun = Instant::now();
        let taken = json(&self.host, &["snapshot", "take", unit, "--stop"]);
        self.note(unit, "stop by snapshot, whole", begun.elapsed().as_micros() as u64);
        self.note(unit, "stop by snapshot, frozen", taken["frozen_us"].as_u64().unwrap());
        assert_eq!(
            (self.show(unit, "ActiveState").as_str(), self.processes(unit)),
            ("inactive", BTreeSet::new())
        );
        assert_eq!(self.show(unit, "Result"), "success");
        let (begun, generation) = (Instant::now(), taken["generation"].to_string());
        let back = json(&self.host, &["restore", unit, "--generation", &generation]);
        self.note(unit, "restore, whole", begun.elapsed().as_micros() as u64);
        self.note(unit, "restore, start job", back["restored"][0]["start_us"].as_u64().unwrap());
        assert_eq!(self.form(unit), before);
        let (traces, nothing) = (self.traces(), BTreeSet::new());
        assert_eq!(traces.difference(&self.traces).cloned().collect::<BTreeSet<_>>(), nothing, "left behind");
        assert_eq!(self.traces.difference(&traces).cloned().collect::<BTreeSet<_>>(), nothing, "taken away");
    }

    fn note(&mut self, unit: &str, what: &'static str, us: u64) {
        self.costs.entry((unit.to_owned(), what)).or_default().push(us);
    }

    /// All that a snapshot or a restore could leave behind, with what is random in names left out: files that are not
    /// on a disk (but what CRIU notes of the kernel), packet filters, mounts, CRIU's processes, units that failed.
    fn traces(&self) -> BTreeSet<String> {
        let script = "find /run /tmp /var/tmp -xdev -not -path '/run/systemd/units/*' \
                          -not -path '/run/log/*' -not -path '/run/udev/*' -not -path '/run/systemd/journal/streams/*' \
                          -not -path '/run/systemd/propagate*' -not -name criu.kdat -not -path /run/ftd-scratch -not -path '/run/ftd' \
                          -not -path '/run/ftd/*' -not -name ftd-criu.sock -not -path '*-ftd.service-*'; \
                      nft list tables; findmnt --raw --noheadings --output TARGET; \
                      pgrep -a criu || true; systemctl list-units --failed --no-legend --plain; \
                      systemctl list-units --all --no-legend --plain 'ftd-criu@*'";
        let all = self.host.sh(script).unwrap();
        // `systemd-private-BOOT-UNIT-RANDOM`
        let private = |line: &str| match line.split_once(".service-") {
            Some((unit, rest)) => format!("{unit}/{}", rest.get(6..).unwrap_or_default()),
            None => line.to_owned(),
        };
        let simple = |line: String| line.replace(|c: char| c.is_ascii_digit(), "");
        all.lines().map(private).map(simple).collect()
    }

    // === Web servers ===

    fn web(&mut self, web: &Web, round: u64, alone: bool) {
        self.round(web.unit);
        self.web_goes_on(web, &format!("round-{round}"));
        if alone {
            self.host.ok(["systemctl", "stop", web.unit]).unwrap();
            assert_eq!(
                (self.processes(web.unit), self.show(web.unit, "Result")),
                (BTreeSet::new(), "success".into())
            );
            assert!(
                !self.host.run(["curl", "-s", &format!("http://127.0.0.1:{}/", web.port)]).unwrap().success()
            );
            self.host.ok(["systemctl", "start", web.unit]).unwrap();
            self.web_goes_on(web, &format!("started-{round}"));
        }
    }

    /// It serves, writes its log, and takes its configuration over when it is told to.
    fn web_goes_on(&self, web: &Web, word: &str) {
        let ask = |word: &str| {
            let url = format!("http://127.0.0.1:{}/?{word}", web.port);
            self.host.ok(["curl", "-sf", "-m", "5", "-o", "/dev/null", &url]).unwrap();
            until("its log's line", || self.host.run(["grep", "-qwF", word, web.log]).unwrap().success());
        };
        ask(word);
        let (main, before) = (self.number(web.unit, "MainPID") as u32, self.processes(web.unit));
        self.host.ok(["systemctl", "reload", web.unit]).unwrap();
        until("other workers", || {
            let now = self.processes(web.unit);
            now.len() > 1 && now.intersection(&before).eq([&main])
        });
        ask(&format!("{word}-reloaded"));
    }

    // === The worker ===

    fn worker(&mut self, alone: bool) {
        // Since it was last started or restored it has fed its watchdog.
        let since = self.number(WORKER, "ActiveEnterTimestampMonotonic");
        until("the watchdog's food", || self.number(WORKER, "WatchdogTimestampMonotonic") > since);
        let writes = self.memory();
        self.round("worker");
        assert!(self.memory() >= writes);
        self.giver.wait_for_more(5);
        self.totals();
        self.host.ok(["systemctl", "reload", "worker"]).unwrap();
        self.lines.wait_for("reloaded").unwrap();
        if alone {
            self.giver.end();
            self.totals();
            self.host.ok(["systemctl", "stop", "worker"]).unwrap();
            self.lines.wait_for("worker ends").unwrap();
            assert_eq!(
                (self.processes("worker"), self.show("worker", "Result")),
                (BTreeSet::new(), "success".into())
            );
            self.host.ok(["systemctl", "start", "worker"]).unwrap();
            self.note("worker", "longest wait for an answer", self.giver.longest());
            self.giver = Giver::start(&self.lab, &self.host);
        }
    }

    fn get(&self, path: &str) -> Value {
        let url = format!("http://127.0.0.1:{WORKER_PORT}{path}");
        serde_json::from_str(&self.host.ok(["curl", "-sf", "-m", "20", &url]).unwrap()).unwrap()
    }

    /// Every byte is right; answers how often pages were written.
    fn memory(&self) -> u64 {
        let memory = self.get("/memory");
        assert_eq!(memory["bad"], 0, "{memory}");
        memory["writes"].as_u64().unwrap()
    }

    /// Every task that the worker took is counted, once; none that it was not given.
    fn totals(&self) {
        let acknowledged = self.giver.acknowledged.load(Ordering::SeqCst);
        let total = self.get("/total");
        let given = self.giver.given.load(Ordering::SeqCst);
        let number = |key: &str| total[key].as_u64().unwrap();
        let (done, taken) = (number("done"), number("done") + number("queued"));
        assert!((acknowledged..=given).contains(&taken), "{acknowledged} to {given}: {total}");
        assert_eq!(number("sum"), done * (done + 1) / 2, "{total}");
        let check = (1..=done).fold(0_u64, |check, task| check.wrapping_add(criu::result(task)));
        assert_eq!(total["check"], format!("{check:016x}"));
    }

    /// After all that, systemd still watches over it.
    fn watchdog_bites(&mut self) {
        self.giver.end();
        self.totals();
        self.note("worker", "longest wait for an answer", self.giver.longest());
        // ftd would start it again.
        self.host.ok(["systemctl", "stop", "ftd"]).unwrap();
        let main = self.show("worker", "MainPID");
        self.host.ok(["kill", "-STOP", &main]).unwrap();
        until("the watchdog's verdict", || self.show("worker", "Result") == "watchdog");
    }
}

/// Looks until it is so; for what nobody tells of.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + scaled(LIMIT);
    while !so() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

// === The client ===

/// A client on the lab's network that gives the worker tasks 1, 2, 3, ... on one connection, each when the one before is
/// acknowledged: whatever happens to the worker, this connection does not end, and no answer stays away.
struct Giver {
    given: Arc<AtomicU64>,
    acknowledged: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    /// Ends with the longest time that it has waited for an answer.
    thread: Option<JoinHandle<Duration>>,
    waited: Duration,
}

impl Giver {
    /// Between two tasks: more of them would be more than journald takes of the worker's lines.
    const PAUSE: Duration = Duration::from_millis(20);

    fn start(lab: &Lab, host: &Host) -> Self {
        let stream = lab.on_network(|| TcpStream::connect((host.address(), WORKER_PORT))).unwrap().unwrap();
        stream.set_read_timeout(Some(scaled(Duration::from_secs(60)))).unwrap();
        stream.set_nodelay(true).unwrap();
        let counts = || Arc::new(AtomicU64::new(0));
        let (given, acknowledged, ended) = (counts(), counts(), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (given, acknowledged, ended) =
                (Arc::clone(&given), Arc::clone(&acknowledged), Arc::clone(&ended));
            std::thread::spawn(move || {
                let mut longest = Duration::ZERO;
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while !ended.load(Ordering::SeqCst) {
                    let (task, begun) = (given.fetch_add(1, Ordering::SeqCst) + 1, Instant::now());
                    (&stream).write_all(format!("POST /task/{task} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
                    let answer = answer(&mut reader);
                    assert_eq!(answer, format!("{{\"task\":{task}}}\n"));
                    acknowledged.store(task, Ordering::SeqCst);
                    longest = longest.max(begun.elapsed());
                    std::thread::sleep(Self::PAUSE);
                }
                longest
            })
        };
        Self { given, acknowledged, ended, thread: Some(thread), waited: Duration::ZERO }
    }

    fn wait_for_more(&self, tasks: u64) {
        let goal = self.acknowledged.load(Ordering::SeqCst) + tasks;
        until("more acknowledged tasks", || self.acknowledged.load(Ordering::SeqCst) >= goal);
    }

    /// Gives no more; all that was given is acknowledged.
    fn end(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            self.waited = thread.join().unwrap();
        }
    }

    /// Microseconds, once it has ended.
    fn longest(&self) -> u64 {
        self.waited.as_micros() as u64
    }
}

/// The body of the next answer.
fn answer(reader: &mut BufReader<TcpStream>) -> String {
    let mut length = 0;
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the connection has ended");
        if let Some(text) = line.strip_prefix("Content-Length: ") {
            length = text.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    String::from_utf8(body).unwrap()
}
