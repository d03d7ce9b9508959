//! ftd, the daemon: see `ftd::daemon`.

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use ftd::{config, daemon, inject::balloon, probe::selftest};
use tracing_subscriber::{EnvFilter, fmt};

/// EX_CONFIG of sysexits.h: systemd does not restart ftd for it, see ftd.service.
const BAD_CONFIGURATION: u8 = 78;

/// The fault-tolerance agent: watches services of this host through eBPF, heals them through systemd.
#[derive(Debug, Parser)]
#[command(
    name = "ftd",
    version,
    after_help = "\
systemd runs it: systemctl start ftd. To look at it and tell it what to do: ftctl --help.
To check a configuration without running it: ftctl config check FILE."
)]
struct Arguments {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    /// What to log, like `debug` or `ftd::heal=debug`.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "FTD_LOG")]
    log: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Try out the kernel probes on this kernel, thoroughly, and say what works.
    ProbeTest,
    /// The helper of the fault `oom`.
    #[command(hide = true)]
    Balloon,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Some(Command::Balloon) => balloon::main().map_err(Into::into),
        Some(Command::ProbeTest) => probe_test(),
        None => {
            let config = match config::Config::load(&arguments.config) {
                Ok(config) => config,
                Err(error) => {
                    eprintln!("ftd: {error}");
                    return ExitCode::from(BAD_CONFIGURATION);
                }
            };
            log_to_stderr(&arguments.log);
            daemon::run(config)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ftd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn probe_test() -> anyhow::Result<()> {
    let report = selftest::run(&mut io::stdout())?;
    anyhow::ensure!(report.failed == 0, "{} checks failed", report.failed);
    Ok(())
}

/// The journal adds the time itself.
fn log_to_stderr(filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|error| {
        eprintln!("ftd: --log {filter}: {error}; logging at info");
        EnvFilter::new("info")
    });
    let in_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let log = fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).with_target(false);
    if in_journal { log.without_time().init() } else { log.init() }
}
