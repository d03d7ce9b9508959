//! What a unit on a host prints, as it reaches that host's journal.

use std::{
    io::{BufRead as _, BufReader},
    process::Child,
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{Host, scaled};

const LIMIT: Duration = Duration::from_secs(20);

/// The lines of one unit from the moment of [`Lines::follow`] on.
#[derive(Debug)]
pub struct Lines {
    child: Child,
    lines: Receiver<String>,
}

impl Lines {
    /// Follows a unit that has printed at least one line. All that it prints after this has returned is seen, as
    /// long as journald takes it for this unit's.
    pub fn follow(host: &Host, unit: &str) -> Result<Self> {
        // One old line comes first: with it, it is certain that the follower is in place.
        let mut child =
            host.spawn(["journalctl", "--follow", "--lines=1", "--output=cat", "--unit", unit])?;
        let stdout = child.stdout.take().context("the follower has no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let lines = Self { child, lines };
        lines.next(LIMIT).with_context(|| format!("{unit} has printed nothing that could be followed"))?;
        Ok(lines)
    }

    fn next(&self, limit: Duration) -> Result<String> {
        self.lines.recv_timeout(limit).context("nothing came")
    }

    /// Waits for this line; what came before it is not given out again.
    pub fn wait_for(&mut self, wanted: &str) -> Result<()> {
        let end = Instant::now() + scaled(LIMIT);
        loop {
            let line = self.next(end.saturating_duration_since(Instant::now()));
            if line.with_context(|| format!("the line '{wanted}' did not come"))? == wanted {
                return Ok(());
            }
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // It may have ended with its host.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
