//! What ftd on a host says, as it says it: the lines of `ftctl events --json --follow`.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{Host, scaled};

/// All events in the journal of the ftd that runs on `host`, oldest first.
pub fn all(host: &Host) -> Result<Vec<Value>> {
    let text = host.ok(["ftctl", "events", "--json", "--last", "1000000"])?;
    let event = |line| serde_json::from_str(line).with_context(|| format!("an event is no JSON: {line}"));
    text.lines().map(event).collect()
}

/// A host's events from the moment of [`Events::follow`] on.
#[derive(Debug)]
pub struct Events {
    child: Child,
    lines: Receiver<Value>,
    seen: Vec<Value>,
}

impl Events {
    /// Follows the events of the ftd that runs on `host`. All that happens after this has returned is seen.
    pub fn follow(host: &Host) -> Result<Self> {
        // One old event comes first: with it, it is certain that the follower is in place.
        Self::start(host, &["ftctl", "events", "--json", "--follow", "--last", "1"])
    }

    fn start(host: &Host, words: &[&str]) -> Result<Self> {
        let mut child = host.spawn(words)?;
        let stdout = child.stdout.take().context("the follower has no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || forward(stdout, &sender));
        let mut events = Self { child, lines, seen: Vec::new() };
        events.next(Duration::from_secs(10)).context("ftd's events cannot be followed: is it running?")?;
        Ok(events)
    }

    /// All events seen so far, oldest first.
    pub fn seen(&mut self) -> &[Value] {
        self.seen.extend(self.lines.try_iter());
        &self.seen
    }

    /// The next event, or `None` when ftd ended.
    pub fn next(&mut self, limit: Duration) -> Result<Value> {
        match self.lines.recv_timeout(scaled(limit)) {
            Ok(event) => {
                self.seen.push(event.clone());
                Ok(event)
            }
            Err(RecvTimeoutError::Timeout) => bail!("no event within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("ftd's events have ended"),
        }
    }

    /// The next event that `wanted` likes; the error lists what came instead.
    pub fn wait(&mut self, what: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let (from, end) = (self.seen.len(), Instant::now() + scaled(limit));
        loop {
            let event = self.next(end.saturating_duration_since(Instant::now()));
            match event {
                Ok(event) if wanted(&event) => return Ok(event),
                Ok(_) => {}
                Err(error) => {
                    let came: Vec<_> = self.seen[from..].iter().map(Value::to_string).collect();
                    return Err(error.context(format!("waiting for {what}; what came:\n{}", came.join("\n"))));
                }
            }
        }
    }

    /// The last event of this kind about this unit that was seen, else the next one: for what may come before or
    /// after something else that was waited for.
    pub fn seen_or_next(&mut self, kind: &str, unit: &str) -> Result<Value> {
        let wanted = |event: &&Value| event["event"] == kind && event["unit"] == unit;
        match self.seen().iter().rev().find(wanted).cloned() {
            Some(event) => Ok(event),
            None => self.wait_for(kind, unit),
        }
    }

    /// The next event of this kind about this unit.
    pub fn wait_for(&mut self, kind: &str, unit: &str) -> Result<Value> {
        let what = format!("{kind} of {unit}");
        self.wait(&what, Duration::from_secs(20), |event| event["event"] == kind && event["unit"] == unit)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It may have ended with its host.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(stdout: ChildStdout, sender: &std::sync::mpsc::Sender<Value>) {
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        let Ok(event) = serde_json::from_str(&line) else { continue };
        if sender.send(event).is_err() {
            return;
        }
    }
}

/// What ftd said of one operation.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Said {
    /// Why the service was down.
    pub cause: Option<String>,
    /// From the cause to the first decision, microseconds.
    pub decided_us: Option<u64>,
    /// From the cause to the heal, milliseconds.
    pub healed_ms: Option<u64>,
    /// Who healed it.
    pub by: Option<String>,
}

impl Events {
    /// What was said of the operation that `end` belongs to.
    pub fn about(&mut self, end: &Value) -> Said {
        let mut said = Said::default();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let op = end["op"].clone();
        for event in self.seen().iter().filter(|event| !op.is_null() && event["op"] == op) {
            match event["event"].as_str() {
                Some("down") => said.cause = text(&event["cause"]),
                Some("decided") if said.decided_us.is_none() => said.decided_us = event["after_us"].as_u64(),
                Some("healed") => {
                    said.healed_ms = event["took_ms"].as_u64();
                    said.by = text(&event["by"]);
                }
                _ => {}
            }
        }
        said
    }

    /// Waits until ftd's status is as `wanted`: for what no event tells of.
    pub fn until(&mut self, host: &Host, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        const AGAIN: Duration = Duration::from_millis(20);
        let end = Instant::now() + scaled(limit);
        loop {
            // Status 4: something is not well. That may be what is waited for.
            let status = host.run(["ftctl", "status", "--json"])?;
            let status: Value = serde_json::from_str(&status.stdout).unwrap_or_default();
            if wanted(&status) {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("ftd's status did not become what was waited for: {status:#}\n{:#?}", self.seen());
            }
            thread::sleep(AGAIN);
        }
    }

    /// Waits until the first `count` units are up and their health checks, where they have one, have
    /// succeeded.
    pub fn until_proven(&mut self, host: &Host, count: usize) -> Result<()> {
        let good = |unit: &Value| {
            unit["phase"] == "up"
                && unit["outage"].is_null()
                && (unit["health"].is_null() || unit["health"]["proven"] == true)
        };
        let all = |status: &Value| {
            let units = status["units"].as_array().map(Vec::as_slice).unwrap_or_default();
            units.len() >= count && units[..count].iter().all(good)
        };
        self.until(host, Duration::from_secs(20), all).map(drop)
    }

    /// Waits until no outage and no fault is under way, and every unit that is up has been so for `calm`.
    pub fn until_settled(&mut self, host: &Host, calm: Duration) -> Result<()> {
        let calm = calm.as_secs();
        let settled = |unit: &Value| {
            unit["outage"].is_null() && (unit["phase"] != "up" || unit["phase_s"].as_u64() >= Some(calm))
        };
        let all = |status: &Value| {
            status["units"].as_array().is_some_and(|units| units.iter().all(settled))
                && status["faults"].as_array().is_some_and(Vec::is_empty)
        };
        self.until(host, Duration::from_secs(20), all).map(drop)
    }
}
