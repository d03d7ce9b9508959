//! `cargo xtask`: the one entry for people who work on ftd. Every command first prepares what it needs.

mod kernels;
mod lint;
mod package;
mod setup;
mod stage;
mod test;
mod workspace;

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use harness::{Base, Cache};

use crate::setup::Need;
use crate::workspace::Workspace;

/// Set up, build, package, try out and test ftd.
///
/// Every command first does those steps of `setup` that it needs. What they make is kept in
/// ${FTD_CACHE:-$XDG_CACHE_HOME/ftd or ~/.cache/ftd}. Test hosts and packages of the system need root.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    after_help = "Examples:\n  \
        cargo xtask test             # all tests, from a bare machine on\n  \
        cargo xtask hosts up 3       # three hosts with ftd to play with\n  \
        cargo xtask deb              # the package for Debian"
)]
struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Make everything ready that any command needs (they do it themselves; this does it ahead, say before
    /// going offline).
    #[command(after_help = "Examples:\n  cargo xtask setup\n  FTD_CACHE=/var/tmp/ftd cargo xtask setup")]
    Setup,
    /// Build ftd and ftctl for release.
    #[command(after_help = "Example:\n  cargo xtask build && target/release/ftctl --help")]
    Build,
    /// Build the .deb and print its path.
    #[command(after_help = "Example:\n  sudo dpkg -i \"$(cargo xtask deb)\"")]
    Deb,
    /// Test hosts by hand: `cargo xtask hosts --help`.
    #[command(disable_help_flag = true)]
    Hosts {
        /// Passed on to the program `hosts`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Show ftd healing hosts, from the built package.
    #[command(disable_help_flag = true, after_help = "Example:\n  cargo xtask demo")]
    Demo {
        /// Passed on to the program `demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run all tests: units, scenarios on test hosts, and other kernels.
    #[command(
        after_help = "Examples:\n  cargo xtask test\n  cargo xtask test --only heal\n  cargo xtask test --only a_held_unit\n  cargo xtask test --only kernels\n  cargo xtask test --no-hosts"
    )]
    Test(test::Options),
    /// Boot Debian's kernels under emulation and try ftd's eBPF programs on each.
    #[command(after_help = "Example:\n  cargo xtask kernels --only 6.1")]
    Kernels(kernels::Options),
    /// Measure ftd on test hosts.
    #[command(
        disable_help_flag = true,
        after_help = "Examples:\n  cargo xtask bench heal\n  cargo xtask bench snapshot\n  cargo xtask bench fence"
    )]
    Bench {
        /// Passed on to the program `bench`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Check format, lints, licences and the package.
    #[command(after_help = "Example:\n  cargo xtask lint")]
    Lint,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Subcommands) -> Result<()> {
    let cache = Cache::open()?;
    let workspace = Workspace::find()?;
    match command {
        Subcommands::Setup => setup::all(&cache, &workspace),
        Subcommands::Build => {
            setup::need(&cache, &workspace, &[Need::Build])?;
            package::build(&workspace)
        }
        Subcommands::Deb => {
            let deb = package::deb(&cache, &workspace)?;
            println!("{}", deb.display());
            Ok(())
        }
        Subcommands::Hosts { arguments } => hosts(&cache, &workspace, &arguments),
        Subcommands::Demo { arguments } => on_hosts(&cache, &workspace, "demo", &arguments),
        Subcommands::Bench { arguments } => {
            if subcommand(&arguments) == Some("snapshot") {
                setup::need(&cache, &workspace, &[Need::Bench])?;
                package::binary(&workspace, "worker", true)?;
            }
            on_hosts(&cache, &workspace, "bench", &arguments)
        }
        Subcommands::Test(options) => test::run(&cache, &workspace, &options),
        Subcommands::Kernels(options) => {
            if !options.has_own_ftd() {
                setup::need(&cache, &workspace, &[Need::Build])?;
                package::build(&workspace)?;
            }
            kernels::run(&cache, &workspace, &options)
        }
        Subcommands::Lint => lint::run(&cache, &workspace),
    }
}

/// Becomes the program `hosts`, with all that it needs made ready.
fn hosts(cache: &Cache, workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    let mut program = Command::new(package::binary(workspace, "hosts", false)?);
    program.args(arguments);
    let is = |word: &str| arguments.iter().any(|argument| argument == word);
    if subcommand(arguments) == Some("up") && !is("--help") && !is("-h") {
        ensure_root()?;
        setup::need(cache, workspace, &[Need::Hosts])?;
        let given = ["FTD_BASE", "FTD_DEB"].into_iter().any(|name| std::env::var_os(name).is_some());
        if !is("--no-deb") && !given {
            program.env("FTD_DEB", package::deb(cache, workspace)?);
        }
    }
    Err(program.exec()).context("the program `hosts` cannot be run")
}

/// The subcommand in the arguments of `hosts` or `bench`: the first word that is no option and no option's value.
fn subcommand(arguments: &[OsString]) -> Option<&str> {
    let mut words = arguments.iter().map(|word| word.to_str().unwrap_or_default());
    while let Some(word) = words.next() {
        match word {
            "--lab" => drop(words.next()),
            option if option.starts_with('-') => {}
            word => return Some(word),
        }
    }
    None
}

/// Becomes a program of package ftd-tests that works on hosts with the built package: `demo`, `bench`.
fn on_hosts(cache: &Cache, workspace: &Workspace, name: &str, arguments: &[OsString]) -> Result<()> {
    ensure_root()?;
    setup::need(cache, workspace, &[Need::Hosts])?;
    let deb = package::deb(cache, workspace)?;
    package::binary(workspace, "hosts", true)?;
    let mut program = Command::new(package::binary(workspace, name, true)?);
    package::environment(&mut program, cache, workspace, &deb, &Base::with_deb(cache, &deb)?)?;
    Err(program.args(arguments).exec()).with_context(|| format!("the program `{name}` cannot be run"))
}

fn ensure_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "test hosts are made of namespaces, mounts and cgroups, and that needs root: sudo -E env PATH=\"$PATH\" cargo xtask ..."
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subcommand_of_hosts_is_found_among_options_and_commands() {
        let of = |line: &str| {
            let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            subcommand(&words).map(str::to_owned)
        };
        assert_eq!(of("up 3").as_deref(), Some("up"));
        assert_eq!(of("--lab two up --no-deb").as_deref(), Some("up"));
        assert_eq!(of("--lab=up list").as_deref(), Some("list"));
        assert_eq!(of("sh vm1 -- ip link set eth0 up").as_deref(), Some("sh"));
        assert_eq!(of("--help"), None);
    }
}
