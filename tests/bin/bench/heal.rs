//! From a service's death to its next answer, by several ways.
//!
//! All processes of nginx are killed at once; one client opens new connections until one is answered. The
//! ways: ftd; systemd's own `Restart=always`, with its default pause and with none; a script that asks once
//! a second; and, as the floor under all of them, nothing but the start of an nginx that was stopped and
//! cleaned up before: by `systemctl start`, and by one message to PID 1 on a connection that is open
//! already. The floor is not to be had by anybody who heals: the dead must be buried first.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::report::{Goal, Measured, table};
use crate::site::{Site, kill_whole};
use crate::stats::{median, quantile};
use crate::{client, clock};

/// Where the drop-in for systemd's own restarts goes.
const DROP_IN: &str = "/run/systemd/system/nginx.service.d";
/// Period of the polling script.
const PERIOD: Duration = Duration::from_secs(1);
const SCRIPT: &str = "while :; do
    curl -sf -m 1 -o /dev/null http://127.0.0.1/ || systemctl start nginx
    sleep 1
done";

/// A way to get nginx to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    Ftd,
    RestartAlways,
    RestartAlwaysAtOnce,
    Polling,
    Systemctl,
    Message,
}

impl Way {
    const ALL: [Self; 6] = [
        Self::Ftd,
        Self::RestartAlways,
        Self::RestartAlwaysAtOnce,
        Self::Polling,
        Self::Systemctl,
        Self::Message,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Ftd => "ftd",
            Self::RestartAlways => "systemd, Restart=always (RestartSec=100ms, the default)",
            Self::RestartAlwaysAtOnce => "systemd, Restart=always, RestartSec=0",
            Self::Polling => "a script that polls each second",
            Self::Systemctl => "floor: systemctl start of a stopped nginx",
            Self::Message => "floor: one D-Bus message to PID 1",
        }
    }

    /// What of nginx's unit is changed for it.
    fn drop_in(self) -> Option<&'static str> {
        match self {
            Self::RestartAlways => Some("[Service]\nRestart=always\n"),
            Self::RestartAlwaysAtOnce => Some("[Service]\nRestart=always\nRestartSec=0\n"),
            _ => None,
        }
    }

    /// The task of the load program that starts nginx, where nobody else does.
    fn task(self) -> Option<&'static str> {
        match self {
            Self::Systemctl => Some("systemctl nginx.service"),
            Self::Message => Some("start nginx.service"),
            _ => None,
        }
    }
}

/// All rounds of all ways.
#[derive(Serialize)]
pub(crate) struct Heals {
    rounds: Vec<Round>,
}

#[derive(Serialize)]
struct Round {
    way: Way,
    #[serde(rename = "round")]
    number: u32,
    /// From the kill, or the request to start, to the first answer with status 200.
    answer_ms: f64,
    /// What happened on the way, in milliseconds after its beginning.
    stages: Vec<(String, f64)>,
}

pub(crate) fn measure(site: &Site, rounds: u32) -> Result<Heals> {
    eprintln!("bench: heal, {rounds} rounds of {} ways", Way::ALL.len());
    let mut done = Vec::new();
    for round in 0..rounds {
        for turn in 0..Way::ALL.len() {
            let way = Way::ALL[(turn + round as usize) % Way::ALL.len()];
            let one = one(site, way, round).with_context(|| format!("{}, round {round}", way.name()));
            // What one round leaves behind must not be there in the next.
            let tidied = site.host.sh(&format!(
                "systemctl stop bench-poll 2>/dev/null || true; rm -rf {DROP_IN}; systemctl daemon-reload; systemctl start nginx"
            ));
            done.push(one?);
            tidied?;
        }
    }
    Ok(Heals { rounds: done })
}

fn one(site: &Site, way: Way, round: u32) -> Result<Round> {
    let (host, address) = (&site.host, site.host.address());
    if way != Way::Ftd {
        site.stop_ftd()?;
    }
    if let Some(text) = way.drop_in() {
        host.sh(&format!("mkdir -p {DROP_IN}"))?;
        host.write(format!("{DROP_IN}/restart.conf"), text)?;
        host.ok(["systemctl", "daemon-reload"])?;
    }
    host.ok(["systemctl", "start", "nginx"])?;
    if way == Way::Ftd {
        site.start_ftd()?;
    }
    site.on_network(|| client::answers(address))?;

    let (began, answer) = if let Some(task) = way.task() {
        host.ok(["systemctl", "stop", "nginx"])?;
        let mut load = site.load()?;
        site.on_network(|| {
            load.begin(task)?;
            let answer = client::first_answer(address, &[]);
            // What the load program says of it goes first: it may be why nobody answers.
            Ok((load.end()?.began, answer?))
        })?
    } else {
        if way == Way::Polling {
            let unit = ["systemd-run", "--quiet", "--collect", "--unit", "bench-poll", "sh", "-c", SCRIPT];
            host.ok(unit)?;
            // The kills are spread over the script's period: by the golden ratio, each as far as can be from
            // those before.
            std::thread::sleep(PERIOD.mul_f64(0.3 + (f64::from(round) * 0.618_034).fract()));
        }
        let members = site.members("nginx.service")?;
        ensure!(members.len() > 1, "nginx has no workers");
        let old: Vec<u32> = members.iter().map(|member| member.inner).collect();
        site.on_network(|| {
            let began = kill_whole(&members)?;
            Ok((began, client::first_answer(address, &old)?))
        })?
    };
    let mut stages = systemd_stages(site, began)?;
    if way == Way::Ftd {
        stages.extend(ftd_stages(site, began)?);
    }
    stages.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(Round { way, number: round, answer_ms: clock::ms(began, answer.at), stages })
}

/// What systemd says of when it did what.
fn systemd_stages(site: &Site, began: u64) -> Result<Vec<(String, f64)>> {
    const STAMPS: [(&str, &str); 3] = [
        ("InactiveEnterTimestampMonotonic", "systemd: the dead run is over"),
        ("InactiveExitTimestampMonotonic", "systemd: the start begins"),
        ("ActiveEnterTimestampMonotonic", "systemd: active"),
    ];
    // It answers before systemd calls it active; a second start waits for the first.
    site.host.ok(["systemctl", "start", "nginx"])?;
    let values: HashMap<_, _> = site.properties("nginx", &STAMPS.map(|(property, _)| property))?;
    let stages = STAMPS.iter().filter_map(|(property, stage)| {
        let at = values.get(*property)?.parse::<u64>().ok()? * 1000;
        (at > began).then(|| ((*stage).to_owned(), clock::ms(began, at)))
    });
    Ok(stages.collect())
}

/// What ftd says of when it did what.
fn ftd_stages(site: &Site, began: u64) -> Result<Vec<(String, f64)>> {
    let events = site.last_events(30)?;
    let op = events.iter().rev().find_map(|event| event.op);
    let mut decisions = 0;
    let mut stages = Vec::new();
    for event in events.iter().filter(|event| event.op == op) {
        let stage = match event.kind.as_str() {
            "decided" => {
                decisions += 1;
                if decisions == 1 { "ftd: decided".to_owned() } else { format!("ftd: decided, {decisions}.") }
            }
            "healed" => "ftd: healed".to_owned(),
            _ => continue,
        };
        stages.push((stage, clock::ms(began, clock::from_wall(event.time))));
    }
    Ok(stages)
}

impl Heals {
    fn of(&self, way: Way) -> Vec<f64> {
        self.rounds.iter().filter(|round| round.way == way).map(|round| round.answer_ms).collect()
    }

    /// The median moment of each stage of a way, in order, and in how many rounds there was one.
    fn stages(&self, way: Way) -> Vec<(&str, f64, usize)> {
        let mut all: HashMap<&str, Vec<f64>> = HashMap::new();
        for (stage, at) in self.rounds.iter().filter(|round| round.way == way).flat_map(|r| &r.stages) {
            all.entry(stage).or_default().push(*at);
        }
        let mut stages: Vec<_> = all.iter().map(|(stage, at)| (*stage, median(at), at.len())).collect();
        stages.sort_by(|a, b| a.1.total_cmp(&b.1));
        stages
    }
}

impl Measured for Heals {
    fn markdown(&self) -> String {
        let floors = [Way::Systemctl, Way::Message].map(|way| median(&self.of(way)));
        let rows: Vec<_> = Way::ALL
            .iter()
            .map(|way| {
                let all = self.of(*way);
                let middle = median(&all);
                let mut cells = vec![way.name().to_owned()];
                cells.extend([middle, quantile(&all, 0.9), quantile(&all, 1.0)].map(|ms| format!("{ms:.1}")));
                cells.extend(floors.map(|floor| format!("{:.2}", middle / floor)));
                cells
            })
            .collect();
        let mut text = format!(
            "## Killed whole to HTTP 200\n\nAll processes of nginx killed by SIGKILL; milliseconds until a new \
             connection is answered with 200; {} rounds each.\n\n{}\n",
            self.of(Way::Ftd).len(),
            table(&["", "median", "p90", "max", "/ systemctl floor", "/ message floor"], &rows)
        );
        for way in [Way::Ftd, Way::RestartAlwaysAtOnce, Way::Systemctl, Way::Message] {
            let count = self.of(way).len();
            let stages = self.stages(way).into_iter().map(|(stage, at, rounds)| {
                let some = if rounds == count { String::new() } else { format!(" ({rounds} of {count})") };
                format!("{stage} {at:.1}{some}")
            });
            let stages: Vec<_> = stages.chain([format!("answer {:.1}", median(&self.of(way)))]).collect();
            let _ = writeln!(text, "- {}: {}", way.name(), stages.join(", "));
        }
        text
    }

    fn goals(&self) -> Vec<Goal> {
        let middle = |way| median(&self.of(way));
        vec![
            Goal::at_most("kill to 200 / floor", middle(Way::Ftd) / middle(Way::Systemctl), 1.25, ""),
            Goal::at_most(
                "kill to 200 / Restart=always",
                middle(Way::Ftd) / middle(Way::RestartAlways),
                1.0,
                "",
            ),
        ]
    }
}
