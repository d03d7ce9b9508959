//! The faults that ftd's two forerunners knew, hundreds of times in random order on two hosts: httpd and nginx are
//! stopped, their configuration is ruined, or both at once. Each time the service is back, with exactly the files that
//! it had, and the generation that they come from is what it was.
//!
//! As root: `cargo xtask test --only seeds`. The seed is printed, and `FTD_SEED=N` replays it; `FTD_ROUNDS=N` makes it
//! longer or shorter.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics names its line")]

use std::time::Duration;

use fastrand::Rng;
use harness::{BootOptions, Events, Host, Lab, given};
use serde_json::Value;

/// Faults come by the second: no limit is to end that, and nothing waits longer than it must.
const CONFIG: &str = r#"
[heal]
restarts = 10000
within = "1min"
backoff = "1ms"
settle = "1ms"
[snapshot]
settle = "50ms"
good_after = "500ms"
put_backs = 10000
[[workload]]
name = "web"
units = ["nginx"]
files = ["/etc/nginx", "/etc/default/nginx"]
on_stop = "restart"
[[workload]]
name = "site"
units = ["httpd"]
files = ["/etc/apache2"]
on_stop = "restart"
"#;

/// As `snapshot.keep` is by default.
const KEEP: usize = 10;

struct Seed {
    workload: &'static str,
    unit: &'static str,
    port: u16,
    places: &'static str,
    /// Files of which the service's own checker reads every line.
    checked: [&'static str; 3],
}

const SEEDS: [Seed; 2] = [
    Seed {
        workload: "web",
        unit: "nginx.service",
        port: 80,
        places: "/etc/nginx /etc/default/nginx",
        checked: ["/etc/nginx/nginx.conf", "/etc/nginx/mime.types", "/etc/nginx/sites-available/default"],
    },
    Seed {
        workload: "site",
        unit: "apache2.service",
        port: 8080,
        places: "/etc/apache2",
        checked: [
            "/etc/apache2/apache2.conf",
            "/etc/apache2/ports.conf",
            "/etc/apache2/mods-available/dir.conf",
        ],
    },
];

/// Ways to ruin a file; `F` is its path.
const RUIN: [&str; 4] =
    [": > F", "rm F", "truncate -s $(( $(stat -c %s F) / 2 )) F", "rm F && mkdir F && touch F/x"];
/// Ways to make it somebody else's.
const ALIENATE: [&str; 5] =
    ["chmod 0 F", "chmod 4777 F", "chmod 600 F", "chown nobody F", "chown :www-data F && chmod g+w F"];
/// Ways to fill it with nonsense.
const NONSENSE: [&str; 4] = [
    "echo nonsense >> F",
    "sed -i '1i Nonsense on;' F",
    "head -c 3000 /dev/urandom > F",
    "tr a-z z-za-y < F > F.x && cat F.x > F && rm F.x",
];

struct Rig {
    host: Host,
    events: Events,
    /// By seed: the files that ruin falls on, all that is there, the good generation and its hash.
    kept: Vec<Kept>,
}

struct Kept {
    files: Vec<String>,
    tree: String,
    good: u64,
    hash: String,
}

impl Rig {
    fn new(lab: &Lab, name: &str) -> Self {
        let host = lab.boot(name, BootOptions::with_config(CONFIG)).unwrap();
        host.wait_running().unwrap();
        // Faults come faster than systemd's own limit for starts by hand allows.
        host.sh("mkdir -p /etc/systemd/system/service.d && printf '[Unit]\\nStartLimitIntervalSec=0\\n' > /etc/systemd/system/service.d/limit.conf && systemctl daemon-reload").unwrap();
        let mut events = Events::follow(&host).unwrap();
        events.until_proven(&host, SEEDS.len()).unwrap();
        let mut rig = Self { host, events, kept: Vec::new() };
        for seed in &SEEDS {
            let good = rig.good(seed);
            let files = rig.host.sh(&format!("find {} -type f -size +2c", seed.places)).unwrap();
            rig.kept.push(Kept {
                files: files.lines().map(str::to_owned).collect(),
                tree: rig.tree(seed),
                good,
                hash: rig.hash(seed, good),
            });
        }
        rig
    }

    fn list(&self) -> Vec<Value> {
        let list = self.host.ok(["ftctl", "--json", "snapshot", "list"]).unwrap();
        serde_json::from_str(&list).unwrap()
    }

    /// The last good generation, once there is one.
    fn good(&mut self, seed: &Seed) -> u64 {
        loop {
            let good = |one: &&Value| one["workload"] == seed.workload && one["good"] == true;
            if let Some(one) = self.list().iter().rev().find(good) {
                return one["generation"].as_u64().unwrap();
            }
            // It may have been said before anybody could follow.
            self.events.seen_or_next("files_good", seed.unit).unwrap();
        }
    }

    /// All that is kept in a generation, as one number.
    fn hash(&self, seed: &Seed, generation: u64) -> String {
        let (workload, file) = (seed.workload, "/root/generation");
        self.host
            .sh(&format!(
                "rm -f {file}; ftctl snapshot export {workload} --generation {generation} {file} >/dev/null && sha256sum < {file}"
            ))
            .unwrap()
    }

    /// What there is, with all that a snapshot promises to keep.
    fn tree(&self, seed: &Seed) -> String {
        let places = seed.places;
        self.host
            .sh(&format!(
                "find {places} -printf '%p %y %m %U:%G %T@ %l\\n' | sort && \
                 find {places} -type f -print0 | sort -z | xargs -0 sha256sum"
            ))
            .unwrap()
    }

    fn differs(&self, seed: usize) -> Vec<String> {
        let tree = self.tree(&SEEDS[seed]);
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
        lines(&tree).symmetric_difference(&lines(&self.kept[seed].tree)).cloned().collect()
    }

    /// One to three files, each ruined in some way: the shell's words for it.
    fn ruin(&self, seed: usize, random: &mut Rng) -> String {
        let mut files = self.kept[seed].files.clone();
        random.shuffle(&mut files);
        let number = random.usize(1..4);
        let mut words = Vec::new();
        for file in &files[..number] {
            let (way, file) = match random.u8(..3) {
                // It must be one that the checker reads: elsewhere nonsense is an edit like any other.
                0 => (random.choice(NONSENSE).unwrap(), *random.choice(&SEEDS[seed].checked).unwrap()),
                1 => (random.choice(RUIN).unwrap(), file.as_str()),
                _ => (random.choice(ALIENATE).unwrap(), file.as_str()),
            };
            words.push(way.replace('F', file));
        }
        // The second may find what the first has left, and may not work on that.
        words.join(" || true; ") + " || true"
    }

    fn round(&mut self, seed: usize, random: &mut Rng) -> String {
        let Seed { unit, port, .. } = SEEDS[seed];
        let stop = format!("systemctl stop {unit}");
        let (script, awaited) = match random.u8(..4) {
            0 => (stop, vec!["healed"]),
            1 => (format!("{}; {stop}", self.ruin(seed, random)), vec!["healed", "files_put_back"]),
            _ => (self.ruin(seed, random), vec!["files_put_back"]),
        };
        self.host.sh(&script).unwrap();
        let mut awaited = awaited;
        while !awaited.is_empty() {
            let wanted =
                |event: &Value| event["unit"] == unit && awaited.iter().any(|kind| event["event"] == *kind);
            let event = self.events.wait(&script, Duration::from_secs(30), wanted).unwrap();
            awaited.retain(|kind| event["event"] != *kind);
        }
        // What was ruined while the first was being put back takes a second time.
        while self.tree(&SEEDS[seed]) != self.kept[seed].tree {
            let again = self.events.wait_for("files_put_back", unit);
            again.unwrap_or_else(|error| panic!("{error:#}: {script}: {:#?}", self.differs(seed)));
        }
        let url = format!("http://127.0.0.1:{port}/");
        let code =
            self.host.ok(["curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", &url]).unwrap();
        assert_eq!(code, "200", "{script}");
        script
    }

    /// The good generations are what they were, byte for byte, and no other has become good.
    fn good_is_untouched(&self) {
        for (seed, kept) in SEEDS.iter().zip(&self.kept) {
            let list = self.list();
            let good = list.iter().filter(|one| one["workload"] == seed.workload && one["good"] == true);
            let good: Vec<_> = good.map(|one| one["generation"].as_u64().unwrap()).collect();
            assert_eq!(good, [kept.good], "{}", seed.workload);
            // What was replaced is kept too, but not for ever.
            let all = list.iter().filter(|one| one["workload"] == seed.workload).count();
            assert!(all <= KEEP + 1, "{all} generations of {}", seed.workload);
            assert_eq!(self.hash(seed, kept.good), kept.hash, "{}", seed.workload);
        }
        self.host.ok(["ftctl", "snapshot", "verify"]).unwrap();
    }
}

#[test]
fn what_is_stopped_and_ruined_comes_back_as_it_was_hundreds_of_times() {
    const LOOK_EVERY: u64 = 50;
    let seed = given("FTD_SEED").unwrap_or_else(|| fastrand::u64(..));
    let rounds = given("FTD_ROUNDS").unwrap_or(500);
    println!("FTD_SEED={seed}");
    let lab = Lab::new().unwrap();
    std::thread::scope(|scope| {
        for (host, share) in [("vm1", rounds.div_ceil(2)), ("vm2", rounds / 2)] {
            let lab = &lab;
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed ^ u64::from(host.as_bytes()[2]));
                let mut rig = Rig::new(lab, host);
                for n in 0..share {
                    let which = random.usize(..SEEDS.len());
                    let script = rig.round(which, &mut random);
                    println!("{host} {n}: {script}");
                    if n % LOOK_EVERY == LOOK_EVERY - 1 {
                        rig.good_is_untouched();
                    }
                }
                rig.good_is_untouched();
            });
        }
    });
}
