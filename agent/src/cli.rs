//! `ftctl`: how a person looks at ftd, and tells it what to do.
//!
//! Exit codes: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage; 3 ftd cannot
//! be reached; 4 `status` or `doctor` found something that is not well.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::{
    config::{self, Config},
    control::{EventsQuery, Hold, Recover, Release, Status, doctor, millis},
    event::Event,
    inject::{Fault, Record, Request},
};

mod client;
mod show;

use client::{Client, Failure};

/// Looks at ftd, the fault-tolerance agent of this host, and tells it what to do.
#[derive(Debug, Parser)]
#[command(
    name = "ftctl",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  ftctl status                    what is under care, and how it is
  ftctl events --since 1h         what happened in the last hour
  ftctl events --follow           what happens now
  ftctl hold nginx --for 30min    maintenance: ftd leaves nginx alone for half an hour
  ftctl doctor                    what this host lacks

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 ftd cannot be reached;
4 status or doctor found something that is not well."
)]
pub struct Cli {
    /// Print JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
    /// ftd's API.
    #[arg(long, global = true, value_name = "PATH", default_value = "/run/ftd/ftd.sock", env = "FTD_SOCKET")]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the units under care and how ftd itself is.
    Status,
    /// Show what happened: deaths, decisions, heals, holds, faults.
    #[command(after_help = "\
Examples:
  ftctl events                              the last 50
  ftctl events --since 10min --unit nginx   what happened to nginx in the last ten minutes
  ftctl events --since 2026-01-31T12:00:00Z
  ftctl events --follow --json | jq .event  for programs: one line of JSON each")]
    Events(EventsArgs),
    /// Take a unit out of ftd's hands, for maintenance.
    #[command(after_help = "\
While held, a unit is watched and its events are recorded, but ftd neither starts nor restarts it.

Examples:
  ftctl hold nginx                               until it is released
  ftctl hold nginx --for 30min --reason upgrade  for half an hour")]
    Hold(HoldArgs),
    /// Give a unit back to ftd: ends a hold, and `failed`.
    #[command(after_help = "\
A unit that ftd had given up is started, and counts from zero again.

Example:
  ftctl release nginx")]
    Release {
        /// The unit.
        unit: String,
    },
    /// Break something on purpose, to see it heal.
    #[command(after_help = "\
Needs `[inject] enabled = true` in the configuration. Every fault that lasts has an end, and an undo
record on disk that survives a crash of ftd.

Examples:
  ftctl inject kill nginx                the main process, by SIGKILL
  ftctl inject kill nginx --whole        every process of the unit
  ftctl inject kill nginx --signal SEGV  a crash
  ftctl inject hang nginx --for 20s      alive but mute, until healed or the time is over
  ftctl inject oom nginx                 killed by the kernel's OOM killer
  ftctl inject list                      faults that have not ended
  ftctl inject recover                   undo them now")]
    Inject(InjectArgs),
    /// Say what this host has and lacks, each with cause and mend.
    Doctor(ConfigFile),
    /// Look at the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print shell completions.
    #[command(after_help = "Example:\n  ftctl completions bash > /etc/bash_completion.d/ftctl")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write ftctl's man pages into a directory.
    #[command(hide = true)]
    Man {
        /// The directory.
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
struct EventsArgs {
    /// Since then: how long ago (`10min`), or a moment (`2026-01-31T12:00:00Z`).
    #[arg(long, value_parser = moment)]
    since: Option<jiff::Timestamp>,
    /// Only of this unit.
    #[arg(long)]
    unit: Option<String>,
    /// Go on with what happens, until interrupted.
    #[arg(long, short)]
    follow: bool,
    /// Only the last so many; 50 when neither this nor --since is given.
    #[arg(long, short = 'n')]
    last: Option<usize>,
}

#[derive(Debug, Args)]
struct HoldArgs {
    /// The unit.
    unit: String,
    /// End by itself after this long, like `30min`.
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration)]
    lasting: Option<Duration>,
    /// Why, for those who wonder later.
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = false)]
struct InjectArgs {
    #[command(subcommand)]
    what: InjectCommand,
}

#[derive(Debug, Subcommand)]
enum InjectCommand {
    /// Stop a unit, as an administrator would.
    Stop {
        /// The unit.
        unit: String,
    },
    /// Send a signal to a unit's main process, or to all its processes.
    Kill {
        /// The unit.
        unit: String,
        /// The signal, by name or number.
        #[arg(long, default_value = "KILL")]
        signal: String,
        /// All processes of the unit.
        #[arg(long)]
        whole: bool,
    },
    /// Stop all processes of a unit in their tracks (SIGSTOP).
    Hang(Lasting),
    /// Let the kernel's OOM killer take a unit's main process.
    Oom(Lasting),
    /// List the faults that have not ended.
    List,
    /// Undo faults now.
    Recover {
        /// The fault's id; all when left out.
        id: Option<String>,
    },
}

#[derive(Debug, Args)]
struct Lasting {
    /// The unit.
    unit: String,
    /// End by itself after this long.
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration, default_value = "30s")]
    lasting: Duration,
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a configuration file without using it; says all that is wrong, with line and mend.
    Check {
        /// The configuration file.
        #[arg(default_value = config::DEFAULT_PATH)]
        file: PathBuf,
    },
    /// Print the configuration in force, defaults included; that of the file when ftd does not run.
    Show(ConfigFile),
}

fn moment(text: &str) -> Result<jiff::Timestamp, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        return jiff::Timestamp::now().checked_sub(ago).map_err(|error| error.to_string());
    }
    text.parse()
        .map_err(|_| "neither a time like \"10min\" nor a moment like \"2026-01-31T12:00:00Z\"".into())
}

/// `ftctl`'s main function.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Failure::Local(format!("starting: {error}"))),
    };
    match runtime.block_on(cli.run()) {
        Ok(code) => code,
        Err(failure) => fail(&failure),
    }
}

fn fail(failure: &Failure) -> ExitCode {
    eprintln!("ftctl: {failure}");
    ExitCode::from(failure.exit_code())
}

const NOT_WELL: u8 = 4;

impl Cli {
    async fn run(self) -> Result<ExitCode, Failure> {
        let client = Client::new(&self.socket);
        let json = self.json;
        match self.command {
            Command::Status => {
                let status: Status = client.get("/v1/status").await?;
                let well = status.troubles().is_empty();
                if json {
                    show::json(&status)?
                } else {
                    show::status(&status)
                }
                return Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) });
            }
            Command::Events(args) => events(&client, args, json).await?,
            Command::Hold(args) => {
                let (for_ms, unit) = (args.lasting.map(millis), args.unit);
                let answer = client.post("/v1/hold", &Hold { unit, for_ms, reason: args.reason }).await?;
                if json { show::json(&answer)? } else { show::held(&answer) }
            }
            Command::Release { unit } => {
                let answer = client.post("/v1/release", &Release { unit }).await?;
                if json { show::json(&answer)? } else { show::released(&answer) }
            }
            Command::Inject(InjectArgs { what }) => inject(&client, what, json).await?,
            Command::Doctor(file) => return doctor(&client, &file, json).await,
            Command::Config(ConfigCommand::Check { file }) => {
                let config = Config::load(&file).map_err(|error| Failure::Local(error.to_string()))?;
                let (workloads, units) = (config.workloads.len(), config.units().len());
                if json {
                    show::json(&serde_json::json!({ "file": file, "workloads": workloads, "units": units }))?;
                } else {
                    show::line(&format!("{}: valid: {workloads} workloads, {units} units", file.display()));
                }
            }
            Command::Config(ConfigCommand::Show(file)) => {
                let config = match client.get::<serde_json::Value>("/v1/config").await {
                    Err(Failure::Unreachable { .. }) => {
                        let config = Config::load(&file.config);
                        let config = config.map_err(|error| Failure::Local(error.to_string()))?;
                        serde_json::to_value(&config).map_err(|error| Failure::Local(error.to_string()))?
                    }
                    config => config?,
                };
                if json { show::json(&config)? } else { show::config(&config)? }
            }
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Self::command(), "ftctl", &mut std::io::stdout());
            }
            Command::Man { dir } => {
                clap_mangen::generate_to(Self::command(), &dir)
                    .map_err(|error| Failure::Local(format!("{}: {error}", dir.display())))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn events(client: &Client, args: EventsArgs, json: bool) -> Result<(), Failure> {
    const LAST: usize = 50;
    let last = args.last.or((args.since.is_none() && !args.follow).then_some(LAST));
    let last = if args.follow && args.since.is_none() { Some(last.unwrap_or(0)) } else { last };
    let query = EventsQuery { since: args.since, unit: args.unit, follow: args.follow, last };
    client
        .lines("/v1/events", &query, |line| {
            if json {
                show::line(line);
                return;
            }
            match serde_json::from_str::<Event>(line) {
                Ok(event) => show::event(&event),
                // An event of a newer ftd.
                Err(_) => show::line(line),
            }
        })
        .await
}

async fn inject(client: &Client, what: InjectCommand, json: bool) -> Result<(), Failure> {
    let request = |unit, fault| Request { unit, fault, signal: None, whole: false, for_ms: None };
    let request = match what {
        InjectCommand::Stop { unit } => request(unit, Fault::Stop),
        InjectCommand::Kill { unit, signal, whole } => {
            Request { signal: Some(signal), whole, ..request(unit, Fault::Kill) }
        }
        InjectCommand::Hang(args) => {
            Request { for_ms: Some(millis(args.lasting)), ..request(args.unit, Fault::Hang) }
        }
        InjectCommand::Oom(args) => {
            Request { for_ms: Some(millis(args.lasting)), ..request(args.unit, Fault::Oom) }
        }
        InjectCommand::List => {
            let status: Status = client.get("/v1/status").await?;
            if json {
                show::json(&status.faults)?
            } else {
                show::faults(&status.faults)
            }
            return Ok(());
        }
        InjectCommand::Recover { id } => {
            let answer = client.post("/v1/recover", &Recover { id }).await?;
            if json {
                show::json(&answer)?
            } else {
                show::recovered(&answer)
            }
            return Ok(());
        }
    };
    let record = client.post("/v1/inject", &request).await?;
    if json {
        return show::json(&record);
    }
    let record: Record = serde_json::from_value(record).map_err(|error| Failure::Local(error.to_string()))?;
    show::injected(&record);
    Ok(())
}

async fn doctor(client: &Client, file: &ConfigFile, json: bool) -> Result<ExitCode, Failure> {
    let (findings, alone) = match client.get::<Vec<doctor::Finding>>("/v1/doctor").await {
        Err(failure @ Failure::Unreachable { .. }) => {
            let config = Config::load(&file.config).map_err(|error| Failure::Local(error.to_string()))?;
            (doctor::of_host(&config), Some(failure))
        }
        findings => (findings?, None),
    };
    if json {
        show::json(&findings)?
    } else {
        show::findings(&findings)
    }
    if let Some(failure) = alone {
        return Err(failure);
    }
    let fails = findings.iter().any(|finding| finding.grade == doctor::Grade::Fail);
    Ok(if fails { ExitCode::from(NOT_WELL) } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn since_takes_a_duration_or_a_moment() {
        let ago = moment("1h").unwrap();
        let away = jiff::Timestamp::now().duration_since(ago).as_secs();
        assert!((3600..3602).contains(&away), "{away}");
        assert_eq!(moment("2026-01-31T12:00:00Z").unwrap().to_string(), "2026-01-31T12:00:00Z");
        assert!(moment("yesterday-ish").unwrap_err().contains("neither a time"));
    }

    #[test]
    fn every_man_page_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Cli::command(), dir.path()).unwrap();
        assert!(dir.path().join("ftctl.1").exists() && dir.path().join("ftctl-events.1").exists());
    }
}
