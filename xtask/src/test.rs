//! All tests, from the cheap to the dear.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use harness::{Base, Cache, command};

use crate::setup::{self, Need};
use crate::stage::Stages;
use crate::workspace::Workspace;
use crate::{ensure_root, kernels, package};

/// What of the tests to run.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only the scenarios of this file of tests/scenarios (`heal`), or only tests whose function's name
    /// contains this; `kernels` for the kernels alone.
    #[arg(long, value_name = "FILTER")]
    only: Option<String>,
    /// Leave out what needs root: the scenarios on test hosts, and the kernels.
    #[arg(long)]
    no_hosts: bool,
}

/// What `--only` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Only<'a> {
    Everything,
    Kernels,
    /// One file of scenarios, whole.
    Scenarios(&'a str),
    /// Unit tests and scenarios by their functions' names.
    Named(&'a str),
}

impl<'a> Only<'a> {
    fn of(filter: Option<&'a str>, is_scenario: impl Fn(&str) -> bool) -> Self {
        match filter {
            None => Self::Everything,
            Some("kernels") => Self::Kernels,
            Some(name) if is_scenario(name) => Self::Scenarios(name),
            Some(name) => Self::Named(name),
        }
    }
}

pub(crate) fn run(cache: &Cache, workspace: &Workspace, options: &Options) -> Result<()> {
    let scenarios = workspace.root().join("tests/scenarios");
    let only = Only::of(options.only.as_deref(), |name| scenarios.join(name).with_extension("rs").is_file());
    if options.no_hosts {
        let needs_hosts = matches!(only, Only::Kernels | Only::Scenarios(_));
        ensure!(
            !needs_hosts,
            "all of --only {} is what --no-hosts leaves out",
            options.only.as_deref().unwrap_or("")
        );
    } else {
        ensure_root()?;
    }
    let mut stages = Stages::default();

    let ready = stages.run("setup", || {
        let needs: &[Need] = match only {
            _ if options.no_hosts => &[Need::Build],
            Only::Everything => &[Need::Build, Need::Deb, Need::Hosts, Need::Kernels],
            Only::Kernels => &[Need::Build, Need::Kernels],
            Only::Scenarios(_) | Only::Named(_) => &[Need::Build, Need::Deb, Need::Hosts],
        };
        setup::need(cache, workspace, needs)
    });
    if ready.is_none() {
        return stages.end();
    }

    // Tests that have been run, by the words of the test programs.
    let ran = Cell::new(0);
    if matches!(only, Only::Everything | Only::Named(_)) {
        stages.run("unit tests", || {
            let mut cargo = workspace.cargo();
            cargo.args(["test", "--workspace", "--locked"]);
            if let Only::Named(name) = only {
                cargo.args(["--", name]);
            }
            counted(&mut cargo, &ran)
        });
    }
    match only {
        _ if options.no_hosts => {}
        Only::Kernels => drop(stages.run("release build", || package::build(workspace))),
        _ => on_hosts(cache, workspace, only, &ran, &mut stages),
    }
    if matches!(only, Only::Everything | Only::Kernels) && !options.no_hosts {
        stages.run("kernels", || kernels::run(cache, workspace, &kernels::Options::default()));
    }
    if let Only::Scenarios(name) | Only::Named(name) = only {
        stages.run("selection", || {
            ensure!(
                ran.get() > 0,
                "--only {name} selects nothing that could be run. Mend: name a file of tests/scenarios without \
                 its .rs, or a part of a test function's name"
            );
            Ok(())
        });
    }
    stages.end()
}

/// The package, and the scenarios with it.
fn on_hosts(cache: &Cache, workspace: &Workspace, only: Only<'_>, ran: &Cell<u64>, stages: &mut Stages) {
    let base = stages.run("package", || {
        let deb = package::deb(cache, workspace)?;
        // The helper that makes the layer lies beside this program once it is built.
        package::binary(workspace, "hosts", false)?;
        let base = Base::with_deb(cache, &deb)?;
        Ok((deb, base))
    });
    let Some((deb, base)) = base else {
        stages.cannot("scenarios", "there is no package");
        return;
    };
    stages.run("scenarios", || {
        let mut cargo = workspace.cargo();
        package::environment(&mut cargo, cache, workspace, &deb, &base)?;
        let file = if let Only::Scenarios(name) = only { name } else { "*" };
        cargo.args(["test", "--locked", "--package", "ftd-tests", "--no-fail-fast", "--test", file]);
        cargo.args(["--", "--test-threads=1"]);
        if let Only::Named(name) = only {
            cargo.arg(name);
        }
        counted(&mut cargo, ran)
    });
}

/// Runs `cargo test` on this terminal and counts the tests that it ran.
fn counted(cargo: &mut Command, ran: &Cell<u64>) -> Result<()> {
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cargo cannot be started")?;
    let mut stdout = child.stdout.take().context("cargo has no output")?;
    // Handed on as it comes, not by lines: a scenario's name is there long before its verdict.
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let length = stdout.read(&mut part)?;
        if length == 0 {
            break;
        }
        text.extend_from_slice(&part[..length]);
        std::io::stdout().write_all(&part[..length])?;
        std::io::stdout().flush()?;
    }
    ran.set(ran.get() + tests_in(&String::from_utf8_lossy(&text)));
    let status = child.wait()?;
    if !status.success() {
        bail!("`{}` failed: {status}", command::describe(cargo));
    }
    Ok(())
}

/// The tests that were run, from the summaries: `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
fn tests_in(text: &str) -> u64 {
    let summaries = text.lines().filter_map(|line| line.split_once("test result: "));
    let parts = summaries.flat_map(|(_, summary)| summary.split(['.', ';']));
    let counts = parts.filter_map(|part| match part.trim().split_once(' ') {
        Some((count, "passed" | "failed")) => count.parse::<u64>().ok(),
        _ => None,
    });
    counts.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_file_of_scenarios_or_a_part_of_a_name() {
        let of = |filter| Only::of(filter, |name| ["heal", "mixed"].contains(&name));
        assert_eq!(of(None), Only::Everything);
        assert_eq!(of(Some("kernels")), Only::Kernels);
        assert_eq!(of(Some("heal")), Only::Scenarios("heal"));
        assert_eq!(of(Some("held_unit")), Only::Named("held_unit"));
    }

    #[test]
    fn tests_are_counted_by_the_summaries() {
        let text = "running 2 tests\ntest a ... ok\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 40 filtered out; finished in 0.00s\n\
                    test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s\n";
        assert_eq!(tests_in(text), 6);
        assert_eq!(tests_in("test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured"), 0);
        assert_eq!(tests_in(""), 0);
    }
}
