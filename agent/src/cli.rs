//! `ftctl`: how a person looks at ftd, and tells it what to do.
//!
//! Exit codes: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage; 3 ftd cannot
//! be reached; 4 `status`, `doctor` or `check` found something that is not well.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::{
    config::{self, Config},
    control::{EventsQuery, Hold, Recover, Release, Status, doctor, millis},
    event::Event,
    inject::{Fault, Record, Request},
    snapshot::criu::check::Report,
};

mod client;
mod cluster;
mod fence;
mod migrate;
mod show;
mod snapshot;

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
4 status, doctor or check found something that is not well."
)]
pub struct Cli {
    /// Print JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
    /// ftd's API.
    #[arg(long, global = true, value_name = "PATH", default_value = "/run/ftd/ftd.sock", env = "FTD_SOCKET")]
    socket: PathBuf,
    /// How long to wait for ftd's answer.
    #[arg(long, global = true, value_name = "TIME", value_parser = duration, default_value = "2min", env = "FTD_TIMEOUT")]
    timeout: Duration,
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
  ftctl events --since '01-31 13:00:00'     a moment as it stands in the first column
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
  ftctl inject stop nginx --for 10s      down for so long, unless it is healed before
  ftctl inject hang nginx --for 20s      alive but mute, until healed or the time is over
  ftctl inject oom nginx                 killed by the kernel's OOM killer
  ftctl inject list                      faults that have not ended
  ftctl inject recover                   undo them now")]
    Inject(InjectArgs),
    /// Keep workloads, generation by generation: their files, and their processes.
    #[command(after_help = "\
Which files belong to a workload says files = [...] in the configuration; whether its processes are saved
too, by CRIU, says snapshot = { process = true }. As root; ftd need not run.

Examples:
  ftctl snapshot take web --good            the files as they are are good ones
  ftctl snapshot take web --process         with all that its processes have in memory
  ftctl snapshot take web --stop            the same, and stop it: ftctl restore web lets it go on
  ftctl snapshot list
  ftctl snapshot diff web                   what has changed since the last good one; exit code 4 if anything
  ftctl restore web --dry-run               what it would take to have that back
  ftctl snapshot export web --generation 3 /root/web-3.ftd")]
    Snapshot(SnapshotArgs),
    /// Have a workload back as it was in a snapshot: its files and, where the snapshot has them, its processes.
    #[command(after_help = "\
Each file is, at any moment, the old or the new one, whole. What is there besides is left alone.
Processes come back with all that they had in memory, as the systemd unit that they were. A unit that runs
is refused, unless --stop ends what runs now. All that is in the way is said before anything is touched.

Examples:
  ftctl restore nginx                       from the last good snapshot
  ftctl restore nginx --stop                what runs now is given up for it
  ftctl restore nginx --files-only          processes are left as they are
  ftctl restore nginx --generation 3 --exact
  ftctl restore nginx --dry-run")]
    Restore(RestoreCommand),
    /// Say what would keep a running unit's processes from being saved and restored; touches nothing.
    #[command(after_help = "\
Looks at the unit's processes (open files, devices, sockets, mappings, namespaces), at CRIU and at the
kernel. Any service can be checked, under care or not.

Example:
  ftctl check nginx")]
    Check {
        /// The unit.
        unit: String,
    },
    /// Move a running workload to another node, with all that it has in memory.
    #[command(after_help = "\
The workload is under care on both nodes, and its units are stopped on the target. Until the target says that it
runs, it stands still here, whole; whatever fails before lets it go on here.

New: moves were seen to work; that every failure in the middle ends as it should is not proven on hosts yet.

Examples:
  ftctl migrate web --to vm2 --dry-run   what would be in the way; touches nothing
  ftctl migrate web --to vm2
  ftctl migrate web --decide here        vm2 is gone in the middle, and does not run it")]
    Migrate(migrate::MigrateArgs),
    /// Make a cluster of several nodes, join one, and look at the others.
    #[command(after_help = "\
Where this node listens for others says node.listen in the configuration, where they are cluster.peers.

Examples:
  ftctl cluster init                 on the first node
  ftctl cluster token --for 5min     there, for each other node: prints what is to be entered on it
  ftctl cluster join ftd1-…          on the other node
  ftctl cluster peers                who can be reached, and how fast
  ftctl cluster revoke vm3           throw a node out")]
    Cluster(cluster::ClusterArgs),
    /// Look at what keeps this host from answering for an address without a lease. As root; ftd need not run.
    #[command(after_help = "\
Packets of a service address pass only before the end of its lease: the kernel sees to that, even when ftd
is stopped, hung or gone.

Examples:
  ftctl fence status           each address: how long its lease lasts yet, what passed, what was dropped
  ftctl fence remove           when ftd is given up: the addresses off this host, then the fence")]
    Fence(fence::FenceArgs),
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
    /// Since then: how long ago (`10min`), or a moment: as `events` shows it (`01-31 13:00:00`), with the
    /// year, or in UTC (`2026-01-31T12:00:00Z`).
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
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
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
    /// Stop a unit, as an administrator would; it is started again in the end, if nobody else has.
    Stop(Lasting),
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
    /// End by itself after this long [default: inject.default_for of the configuration, 30s]
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    lasting: Option<Duration>,
}

#[derive(Debug, Args)]
struct SnapshotArgs {
    #[command(flatten)]
    at: snapshot::ConfigAt,
    #[command(subcommand)]
    what: snapshot::SnapshotCommand,
}

#[derive(Debug, Args)]
struct RestoreCommand {
    #[command(flatten)]
    at: snapshot::ConfigAt,
    #[command(flatten)]
    args: snapshot::RestoreArgs,
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

/// A time like `30min`.
fn duration(text: &str) -> Result<Duration, String> {
    no_months(text)?;
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; times are like \"90s\", \"30min\", \"2h\" or \"1d\""))
}

/// Months and years are refused: their units are a slip of the finger away from minutes.
fn no_months(text: &str) -> Result<(), String> {
    let long = ["M", "month", "months", "y", "yr", "yrs", "year", "years"];
    match text.split(|c: char| !c.is_alphabetic()).find(|word| long.contains(word)) {
        Some(unit) => {
            Err(format!("\"{unit}\" means months or years; minutes are \"m\" or \"min\", days are \"d\""))
        }
        None => Ok(()),
    }
}

fn moment(text: &str) -> Result<jiff::Timestamp, String> {
    let now = jiff::ZonedDateTime::now();
    if let Some(moment) = text.parse().ok().or_else(|| local_moment(text, &now)) {
        return Ok(moment);
    }
    no_months(text)?;
    let ago = humantime::parse_duration(text).map_err(|_| {
        "neither a time like \"10min\" nor a moment like \"01-31 13:00:00\", \"2026-01-31 13:00\" or \
         \"2026-01-31T12:00:00Z\""
    })?;
    now.timestamp().checked_sub(ago).map_err(|error| error.to_string())
}

/// A moment of this host's time zone. Without a year, as `events` shows it, the last one that was.
fn local_moment(text: &str, now: &jiff::ZonedDateTime) -> Option<jiff::Timestamp> {
    let read = |text: &str| {
        let formats = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M"];
        let time = formats.iter().find_map(|format| jiff::civil::DateTime::strptime(format, text).ok());
        let day = || jiff::civil::Date::strptime("%Y-%m-%d", text).ok().map(|day| day.at(0, 0, 0, 0));
        let moment = time.or_else(day)?.to_zoned_datetime(now.time_zone().clone()).ok()?;
        Some(moment.timestamp())
    };
    let this_year = |year: i16| read(&format!("{year:04}-{text}"));
    read(text).or_else(|| {
        let moment = this_year(now.year()).filter(|moment| *moment <= now.timestamp());
        moment.or_else(|| this_year(now.year() - 1))
    })
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
        let client = Client::new(&self.socket, self.timeout);
        let json = self.json;
        match self.command {
            Command::Status => {
                let status: Status = client.get("/v1/status").await?;
                let well = status.troubles().is_empty();
                if json {
                    show::json(&status)?;
                } else {
                    show::status(&status)?;
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
            Command::Snapshot(args) => {
                return snapshot::snapshot(&client, args.what, &args.at.config, json).await;
            }
            Command::Restore(args) => {
                return snapshot::restore(&client, &args.args, &args.at.config, json).await;
            }
            Command::Check { unit } => {
                let report: Report =
                    client.get(&format!("/v1/check?unit={}", client::percent(&unit))).await?;
                if json {
                    show::json(&report)?;
                } else {
                    show::report(&report)?;
                }
                let ready = report.ready();
                return Ok(if ready { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) });
            }
            Command::Migrate(args) => migrate::run(&client, args, json).await?,
            Command::Cluster(args) => cluster::run(&client, args, json).await?,
            Command::Fence(args) => fence::run(args, json).await?,
            Command::Doctor(file) => return doctor(&client, &file, json).await,
            Command::Config(ConfigCommand::Check { file }) => {
                let config = match Config::load(&file) {
                    Ok(config) => config,
                    Err(error) if json => {
                        let problems = error.problems();
                        show::json(
                            &serde_json::json!({ "file": file, "valid": false, "problems": problems }),
                        )?;
                        return Ok(ExitCode::FAILURE);
                    }
                    Err(error) => return Err(Failure::Local(error.to_string())),
                };
                let (workloads, units) = (config.workloads.len(), config.units().len());
                if json {
                    show::json(&serde_json::json!({
                        "file": file, "valid": true, "workloads": workloads, "units": units
                    }))?;
                } else {
                    show::line(&format!("{}: valid: {workloads} workloads, {units} units", file.display()));
                }
            }
            Command::Config(ConfigCommand::Show(file)) => {
                let config = match client.get::<serde_json::Value>("/v1/config").await {
                    Err(Failure::Down { .. }) => {
                        let config = Config::load(&file.config);
                        let config = config.map_err(|error| Failure::Local(error.to_string()))?;
                        serde_json::to_value(&config).map_err(|error| Failure::Local(error.to_string()))?
                    }
                    config => config?,
                };
                if json { show::json(&config)? } else { show::config(&config)? }
            }
            Command::Completions { shell } => {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "ftctl", &mut text);
                show::line(String::from_utf8_lossy(&text).trim_end());
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
                Err(_) => show::line(&show::plain(line)),
            }
        })
        .await
}

async fn inject(client: &Client, what: InjectCommand, json: bool) -> Result<(), Failure> {
    let request = |unit, fault| Request { unit, fault, signal: None, whole: false, for_ms: None };
    let lasting =
        |args: Lasting, fault| Request { for_ms: args.lasting.map(millis), ..request(args.unit, fault) };
    let request = match what {
        InjectCommand::Stop(args) => lasting(args, Fault::Stop),
        InjectCommand::Kill { unit, signal, whole } => {
            Request { signal: Some(signal), whole, ..request(unit, Fault::Kill) }
        }
        InjectCommand::Hang(args) => lasting(args, Fault::Hang),
        InjectCommand::Oom(args) => lasting(args, Fault::Oom),
        InjectCommand::List => {
            let status: Status = client.get("/v1/status").await?;
            if json {
                return show::json(&status.faults);
            }
            return show::faults(&status.faults);
        }
        InjectCommand::Recover { id } => {
            let answer = client.post("/v1/recover", &Recover { id }).await?;
            if json {
                show::json(&answer)?;
            } else {
                show::recovered(&answer);
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
        Err(failure @ (Failure::Down { .. } | Failure::Forbidden { .. } | Failure::Broken { .. })) => {
            let config = Config::load(&file.config).map_err(|error| Failure::Local(error.to_string()))?;
            (doctor::of_host(&config), Some(failure))
        }
        findings => (findings?, None),
    };
    if json {
        show::json(&findings)?;
    } else {
        show::findings(&findings)?;
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
    fn since_takes_the_moment_that_events_shows_and_local_dates() {
        let now: jiff::ZonedDateTime = "2026-03-01T12:00:00[Europe/Berlin]".parse().unwrap();
        for (text, moment) in [
            ("02-28 13:00:00.250", "2026-02-28T12:00:00.25Z"),
            ("03-01 11:59:59", "2026-03-01T10:59:59Z"),
            // It has not come yet this year.
            ("12-31 23:00:00", "2025-12-31T22:00:00Z"),
            ("2026-01-31 13:00", "2026-01-31T12:00:00Z"),
            ("2025-07-01 13:00:01.5", "2025-07-01T11:00:01.5Z"),
            ("2026-01-31", "2026-01-30T23:00:00Z"),
        ] {
            assert_eq!(local_moment(text, &now), Some(moment.parse().unwrap()), "{text}");
        }
        assert_eq!(local_moment("02-30 00:00:00", &now), None);
        // What is shown can be asked for.
        let at = jiff::Timestamp::from_millisecond(jiff::Timestamp::now().as_millisecond() - 1000).unwrap();
        assert_eq!(moment(&show::time(at)).unwrap(), at);
    }

    #[test]
    fn months_and_years_are_refused_where_minutes_are_meant() {
        for text in ["30M", "1y", "2months", "1h 5M"] {
            let error = duration(text).unwrap_err();
            assert!(error.contains("minutes are \"m\" or \"min\""), "{text}: {error}");
            assert!(moment(text).unwrap_err().contains("minutes are"), "{text}");
        }
        assert_eq!(duration("1h 30min").unwrap(), Duration::from_mins(90));
        assert!(duration("soon").unwrap_err().contains("like \"90s\""));
    }

    #[test]
    fn every_man_page_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Cli::command(), dir.path()).unwrap();
        assert!(dir.path().join("ftctl.1").exists() && dir.path().join("ftctl-events.1").exists());
    }
}
