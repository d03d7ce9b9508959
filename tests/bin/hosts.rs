//! Test hosts by hand, and the helper processes of those that tests make. Meant to be called through
//! `cargo xtask hosts`, which prepares what it needs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use harness::cache::seconds;
use harness::enter::{self, Place};
use harness::host::State;
use harness::lab::{self, BY_HAND};
use harness::{Base, BootOptions, Cache, Host, Lab, base, container, doctor};

/// Test hosts: Debian with a real systemd, in namespaces, on a network of their own.
///
/// Hosts made by hand stay until `hosts down`. vmN has the address 10.77.0.(10+N).
#[derive(Parser)]
#[command(
    name = "cargo xtask hosts",
    bin_name = "cargo xtask hosts",
    after_help = "Examples:\n  \
        cargo xtask hosts up 3\n  \
        cargo xtask hosts sh vm1 -- systemctl status nginx\n  \
        cargo xtask hosts sh vm1\n  \
        cargo xtask hosts cut vm1\n  \
        cargo xtask hosts kill vm1 && cargo xtask hosts reboot vm1\n  \
        cargo xtask hosts down"
)]
struct Arguments {
    /// The lab: several can be up side by side.
    #[arg(long, global = true, default_value = BY_HAND)]
    lab: String,
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Boot hosts vm1 to vmN, with ftd installed from its package, which `cargo xtask` builds.
    Up {
        /// How many.
        #[arg(default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=99))]
        count: u8,
        /// Without ftd.
        #[arg(long)]
        no_deb: bool,
        /// This file as /etc/ftd/ftd.toml on each.
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Run a command in a host, or a shell.
    Sh {
        /// The host.
        host: String,
        /// The command; a login shell when there is none.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Run a command of this machine on the hosts' network, as 10.77.0.254.
    Client {
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Cut a host's power. Its disk stays.
    Kill {
        /// The host.
        host: String,
    },
    /// Freeze all processes of a host.
    Freeze {
        /// The host.
        host: String,
    },
    /// Let a frozen host go on.
    Thaw {
        /// The host.
        host: String,
    },
    /// Pull a host's network cable.
    Cut {
        /// The host.
        host: String,
    },
    /// Put a host's network cable back.
    Heal {
        /// The host.
        host: String,
    },
    /// Boot a host again on the same disk; cuts its power first if it is up.
    Reboot {
        /// The host.
        host: String,
    },
    /// Print what a host's systemd said on its console.
    Console {
        /// The host.
        host: String,
    },
    /// List the hosts.
    List,
    /// End the hosts, and remove all that is left of them.
    Down,
    /// Say what this machine lacks for test hosts.
    Doctor,

    // Helper processes; see the modules `container`, `enter`, `lab` and `base` of the harness.
    #[command(hide = true)]
    Supervise { dir: PathBuf },
    #[command(hide = true)]
    Init { dir: PathBuf },
    #[command(hide = true)]
    Keep,
    #[command(hide = true)]
    Enter {
        #[arg(long, required_unless_present = "netns")]
        pid: Option<i32>,
        #[arg(long)]
        netns: Option<PathBuf>,
        #[arg(long)]
        group: Vec<PathBuf>,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    #[command(hide = true)]
    Install { dir: PathBuf, deb: PathBuf, lowers: Vec<PathBuf> },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hosts: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    let id = arguments.lab;
    let host = |name: &str| Lab::open(&id)?.host(name);
    match arguments.command {
        Subcommands::Up { count, no_deb, config } => up(&id, count, no_deb, config)?,
        Subcommands::Sh { host: name, command } => {
            let command = if command.is_empty() { vec!["bash".to_owned(), "-l".to_owned()] } else { command };
            return status(&mut host(&name)?.command(command)?);
        }
        Subcommands::Client { command } => return status(&mut Lab::open(&id)?.client_command(command)?),
        Subcommands::Kill { host: name } => host(&name)?.kill()?,
        Subcommands::Freeze { host: name } => host(&name)?.freeze()?,
        Subcommands::Thaw { host: name } => host(&name)?.thaw()?,
        Subcommands::Cut { host: name } => host(&name)?.cut()?,
        Subcommands::Heal { host: name } => host(&name)?.heal()?,
        Subcommands::Reboot { host: name } => {
            let host = host(&name)?;
            let start = Instant::now();
            host.reboot()?;
            report(&host, start)?;
        }
        Subcommands::Console { host: name } => print!("{}", host(&name)?.console()),
        Subcommands::List => list(),
        Subcommands::Down => {
            lab::teardown(&id)?;
            let left = harness::leftovers(&id)?;
            if !left.is_empty() {
                bail!("something of the lab '{id}' is left:\n  {}", left.join("\n  "));
            }
        }
        Subcommands::Doctor => return Ok(examine()),
        Subcommands::Supervise { dir } => return container::supervise(&dir),
        Subcommands::Init { dir } => return container::init(&dir),
        Subcommands::Keep => return lab::keep(&id),
        Subcommands::Enter { pid, netns, group, command } => {
            let place = match (pid, netns) {
                (Some(pid), _) => Place::Host(pid),
                (None, Some(path)) => Place::Network(path),
                (None, None) => bail!("neither a host nor a network to enter"),
            };
            return enter::enter(&place, &group, &command);
        }
        Subcommands::Install { dir, deb, lowers } => return base::install(&dir, &deb, &lowers),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a command on this terminal and passes its exit code on.
fn status(command: &mut std::process::Command) -> Result<ExitCode> {
    let status = command.status().context("the command cannot be started")?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255)))
}

fn up(id: &str, count: u8, no_deb: bool, config: Option<PathBuf>) -> Result<()> {
    let base = if no_deb { Base::bare(&Cache::open()?)? } else { Base::find()? };
    let config = config
        .map(|path| {
            std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))
        })
        .transpose()?;
    let lab = Lab::by_hand(id, base)?;
    let mut booted = Vec::new();
    for number in 1..=count {
        let name = format!("vm{number}");
        let start = Instant::now();
        match lab.host(&name) {
            Ok(host) if host.is_up() => {
                println!("{name}  {}  is up already", host.address());
            }
            Ok(host) => {
                host.start()?;
                booted.push((host, start));
            }
            Err(_) => {
                let options = BootOptions { config: config.clone(), ..BootOptions::default() };
                booted.push((lab.boot(&name, options)?, start));
            }
        }
    }
    booted.iter().try_for_each(|(host, start)| report(host, *start))
}

/// Waits for a host and says how it is.
fn report(host: &Host, start: Instant) -> Result<()> {
    let state = host.wait_running()?;
    println!("{}  {}  up after {}", host.name(), host.address(), seconds(start.elapsed()));
    if state == State::Degraded {
        print!("{}", host.ok(["systemctl", "--failed", "--no-legend", "--plain"])?);
    }
    Ok(())
}

fn list() {
    for id in lab::all() {
        let hosts = Lab::open(&id).and_then(|lab| lab.hosts());
        match hosts {
            Ok(hosts) if hosts.is_empty() => println!("{id}  no hosts"),
            Ok(hosts) => {
                for host in hosts {
                    let state = match host.pid() {
                        Ok(pid) if host.is_frozen() => format!("frozen, PID {pid}"),
                        Ok(pid) => format!("up, PID {pid}"),
                        Err(_) => "down".to_owned(),
                    };
                    println!("{id}  {}  {}  {state}", host.name(), host.address());
                }
            }
            Err(error) => println!("{id}  {error:#}"),
        }
    }
}

fn examine() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for finding in doctor::examine() {
        match (&finding.verdict, finding.needed) {
            (Ok(how), _) => println!("ok       {}: {how}", finding.thing),
            (Err(why), false) => println!("limited  {}: {why}", finding.thing),
            (Err(why), true) => {
                println!("missing  {}: {why}", finding.thing);
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
