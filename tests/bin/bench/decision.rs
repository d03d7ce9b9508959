//! From a process's death to ftd's decision.
//!
//! nginx's main process is killed, again and again. ftd itself says how long it was from the kernel's
//! entry into the exit path to its decision (`after_us` of the event `decided`, both read off the kernel's
//! boot clock). Some decisions are made twice: a start that reaches systemd before systemd has noticed the
//! death does nothing, and is asked for again. The first one counts here, and the second ones are
//! counted.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::scaled;
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::report::{Goal, Measured, table};
use crate::site::Site;
use crate::stats::{median, quantile};
use crate::{client, clock};

const LIMIT: Duration = Duration::from_secs(30);

/// All rounds.
#[derive(Serialize)]
pub(crate) struct Decisions {
    /// Whether the reader thread has real-time priority.
    realtime: String,
    rounds: Vec<Round>,
}

#[derive(Serialize)]
struct Round {
    /// From the kernel's exit path to the first decision, as ftd says.
    after_us: u64,
    /// From before kill(2) to the first decision, measured from outside.
    from_kill_us: f64,
    /// How many times a start was decided until it was up again.
    decisions: u32,
    /// From before kill(2) until ftd said that it was healed.
    healed_ms: f64,
}

pub(crate) fn measure(site: &Site, rounds: u32) -> Result<Decisions> {
    eprintln!("bench: decision, {rounds} rounds");
    let realtime = site.start_ftd()?.probe.realtime;
    let events = site.follow()?;
    let address = site.host.address();
    let main = site.properties("nginx", &["MainPID"])?;
    let mut main: u32 = main.get("MainPID").and_then(|pid| pid.parse().ok()).context("nginx is not up")?;
    let mut done = Vec::new();
    for _ in 0..rounds {
        let members = site.members("nginx.service")?;
        let victim = members.iter().find(|member| member.inner == main);
        let victim = victim.with_context(|| format!("nginx's main process {main} is gone"))?;
        let killed = clock::now();
        victim.signal(Signal::SIGKILL)?;
        let (mut first, mut decisions) = (None, 0);
        let healed = loop {
            let event = events.next(scaled(LIMIT)).context("waiting for nginx to be healed")?;
            if event.unit.as_deref() != Some("nginx.service") || event.op.is_none() {
                continue;
            }
            match (event.kind.as_str(), event.after_us) {
                ("decided", Some(after_us)) => {
                    decisions += 1;
                    first.get_or_insert((after_us, clock::from_wall(event.time)));
                }
                ("heal_failed", _) => eprintln!("bench: {}", event.error.unwrap_or_default()),
                ("healed", _) => break event,
                _ => {}
            }
        };
        let (after_us, decided) = first.context("it was healed and nothing was decided")?;
        main = healed.main_pid.context("it was healed and has no main process")?;
        done.push(Round {
            after_us,
            from_kill_us: clock::ms(killed, decided) * 1e3,
            decisions,
            healed_ms: clock::ms(killed, clock::from_wall(healed.time)),
        });
        let old: Vec<u32> = members.iter().map(|member| member.inner).collect();
        site.on_network(|| client::first_answer(address, &old))?;
    }
    ensure!(!done.is_empty(), "there were no rounds");
    Ok(Decisions { realtime, rounds: done })
}

impl Measured for Decisions {
    fn markdown(&self) -> String {
        let row = |name: &str, value: &dyn Fn(&Round) -> f64| {
            let all: Vec<f64> = self.rounds.iter().map(value).collect();
            let mut cells = vec![name.to_owned()];
            cells.extend([0.5, 0.9, 0.99, 1.0].map(|q| format!("{:.0}", quantile(&all, q))));
            cells
        };
        let rows = vec![
            row("kernel's exit path -> decision", &|round| round.after_us as f64),
            row("kill(2) -> decision", &|round| round.from_kill_us),
        ];
        let twice = self.rounds.iter().filter(|round| round.decisions > 1).count();
        let healed: Vec<f64> = self.rounds.iter().map(|round| round.healed_ms).collect();
        format!(
            "## Death to decision\n\nnginx's main process killed by SIGKILL, {} times; microseconds. Reader \
             thread: {}.\n\n{}\nDecided again because systemd had not noticed the death yet: {twice} of {}. \
             Until `healed`: median {:.1} ms.\n",
            self.rounds.len(),
            self.realtime,
            table(&["", "p50", "p90", "p99", "max"], &rows),
            self.rounds.len(),
            median(&healed)
        )
    }

    fn goals(&self) -> Vec<Goal> {
        let all: Vec<f64> = self.rounds.iter().map(|round| round.after_us as f64).collect();
        let at = |q| quantile(&all, q);
        vec![
            Goal::at_most("death to decision, p50", at(0.5), 50.0, "us"),
            Goal::at_most("death to decision, p99", at(0.99), 500.0, "us"),
        ]
    }
}
