//! Long commands in stages: each with its time, and a summary at the end.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use harness::cache::seconds;

/// The stages run so far.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    done: Vec<(String, Duration, Option<String>)>,
}

impl Stages {
    /// Runs a stage. A failure is printed and kept for the end: the stages after it still run.
    pub(crate) fn run<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        eprintln!("=== {name}");
        let start = Instant::now();
        let outcome = work();
        let (value, error) = match outcome {
            Ok(value) => (Some(value), None),
            Err(error) => {
                eprintln!("{name}: {error:#}");
                (None, Some(format!("{error:#}")))
            }
        };
        self.done.push((name.to_owned(), start.elapsed(), error));
        value
    }

    /// Notes a stage that cannot run because one before it failed.
    pub(crate) fn cannot(&mut self, name: &str, why: &str) {
        self.done.push((name.to_owned(), Duration::ZERO, Some(why.to_owned())));
    }

    /// Prints what was done, with times; an error if any stage failed.
    pub(crate) fn end(self) -> Result<()> {
        let total: Duration = self.done.iter().map(|(_, time, _)| *time).sum();
        eprintln!("=== summary");
        for (name, time, error) in &self.done {
            let verdict = if error.is_some() { "FAILED" } else { "ok" };
            eprintln!("{verdict:>8}  {:>7}  {name}", seconds(*time));
        }
        eprintln!("{:>8}  {:>7}", "all", seconds(total));
        let failed: Vec<_> =
            self.done.iter().filter(|stage| stage.2.is_some()).map(|stage| stage.0.as_str()).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_fails_the_whole_but_stops_nothing() {
        let mut stages = Stages::default();
        assert_eq!(stages.run("first", || -> Result<()> { bail!("no") }), None);
        assert_eq!(stages.run("second", || Ok(2)), Some(2));
        assert_eq!(stages.end().unwrap_err().to_string(), "failed: first");
        let mut stages = Stages::default();
        stages.run("only", || Ok(()));
        stages.end().unwrap();
    }
}
