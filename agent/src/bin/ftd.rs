//! ftd, the daemon: see `ftd::daemon`.

use std::{io, os::fd::AsFd as _, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use ftd::{
    cluster::fence,
    config, daemon,
    inject::{balloon, trial},
    probe::selftest,
    snapshot::criu::{hand, worker},
};
use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, fmt,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// `EX_CONFIG` of sysexits.h: systemd does not restart ftd for it, see ftd.service.
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
    /// Try out the kernel probes and the fence on this kernel, thoroughly, and say what works.
    ProbeTest,
    /// Measure what the fence costs each kind of packet, and print it as JSON.
    #[command(hide = true)]
    FenceCost {
        /// How often each is measured.
        #[arg(long, default_value_t = 30)]
        rounds: u32,
        /// The mean of so many runs is taken.
        #[arg(long, default_value_t = 1_000_000)]
        repeat: u32,
    },
    /// The helper of the fault `oom`.
    #[command(hide = true)]
    Balloon,
    /// Dump a service's processes into a directory, without a running ftd.
    #[command(hide = true)]
    DumpUnit {
        /// The unit.
        unit: String,
        /// The directory; made if it is not there.
        dir: PathBuf,
        /// Stop the unit by it.
        #[arg(long)]
        stop: bool,
    },
    /// Restore a service's processes from such a directory.
    #[command(hide = true)]
    RestoreUnit {
        /// The unit.
        unit: String,
        /// The directory.
        dir: PathBuf,
    },
    /// Keep directories of images in a store, each as a workload's next generation, without a running ftd: one for each
    /// line of the standard input.
    #[command(hide = true)]
    KeepImages {
        /// The store's directory; made if it is not there.
        store: PathBuf,
        /// The workload.
        workload: String,
    },
    /// Get a generation of images back out of such a store.
    #[command(hide = true)]
    GiveImages {
        /// The store's directory.
        store: PathBuf,
        /// The workload.
        workload: String,
        /// The generation.
        number: u64,
        /// The directory below which the images are put.
        dir: PathBuf,
    },
    /// What ftd-criu@.service runs: becomes CRIU for the client on descriptor 3.
    #[command(hide = true)]
    CriuWorker,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Some(Command::Balloon) => balloon::main().map_err(Into::into),
        Some(Command::ProbeTest) => probe_test(),
        Some(Command::FenceCost { rounds, repeat }) => fence_cost(rounds, repeat),
        Some(Command::DumpUnit { unit, dir, stop }) => {
            by_hand(&arguments.log, || hand::dump(&unit, &dir, stop))
        }
        Some(Command::RestoreUnit { unit, dir }) => by_hand(&arguments.log, || hand::restore(&unit, &dir)),
        Some(Command::KeepImages { store, workload }) => {
            by_hand(&arguments.log, || hand::keep(&store, &workload))
        }
        Some(Command::GiveImages { store, workload, number, dir }) => {
            by_hand(&arguments.log, || hand::give(&store, &workload, number, &dir))
        }
        Some(Command::CriuWorker) => worker::become_criu().map(|never| match never {}).map_err(Into::into),
        None => {
            let config = match config::Config::load(&arguments.config) {
                Ok(config) => config,
                Err(error) => {
                    complain(&format!("ftd: {error}"));
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
            complain(&format!("ftd: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn by_hand(log: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    log_to_stderr(log);
    work()
}

fn probe_test() -> anyhow::Result<()> {
    let mut out = io::stdout();
    let report = selftest::run(&mut out)?;
    let failed = report.failed + u32::from(!trial::run(&mut out)?) + u32::from(!fence::trial::run(&mut out)?);
    anyhow::ensure!(failed == 0, "{failed} checks failed");
    Ok(())
}

fn fence_cost(rounds: u32, repeat: u32) -> anyhow::Result<()> {
    let costs = fence::cost::measure(rounds, repeat)?;
    serde_json::to_writer(io::stdout(), &costs)?;
    Ok(())
}

/// The journal adds the time itself, and is told of levels by prefixes, so that `journalctl -p` works.
fn log_to_stderr(filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|error| {
        complain(&format!("ftd: --log {filter}: {error}; logging at info"));
        EnvFilter::new("info")
    });
    let log = fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).with_target(false);
    if in_journal() { log.without_time().map_event_format(Prefixed).init() } else { log.init() }
}

/// Whether standard error leads to systemd's journal. `JOURNAL_STREAM` alone does not say so: children whose
/// output goes elsewhere inherit it. See systemd.exec(5).
fn in_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr().as_fd()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// An error before, or in place of, logging: each line of it is one of the journal's.
fn complain(text: &str) {
    let prefix = if in_journal() { prefix(Level::ERROR) } else { "" };
    for line in text.lines() {
        eprintln!("{prefix}{line}");
    }
}

/// A level as sd-daemon(3) has it.
fn prefix(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// Lines of another format, each with its level in front.
struct Prefixed<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prefixed<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let prefix = prefix(*event.metadata().level());
        let mut text = String::new();
        self.0.format_event(context, Writer::new(&mut text), event)?;
        text.lines().try_for_each(|line| writeln!(writer, "{prefix}{line}"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What is logged, in memory.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_line_for_the_journal_begins_with_its_level() {
        let memory = Memory::default();
        let writer = memory.clone();
        let log = fmt().with_max_level(Level::TRACE).with_writer(move || writer.clone());
        let log = log.with_ansi(false).with_target(false).without_time().map_event_format(Prefixed);
        tracing::subscriber::with_default(log.finish(), || {
            tracing::error!("bad\nand worse");
            tracing::warn!(cause = "x", "odd");
            tracing::info!("well");
            tracing::debug!("small");
        });
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let words = [("<3>", "bad"), ("<3>", "and worse"), ("<4>", "odd"), ("<6>", "well"), ("<7>", "small")];
        assert_eq!(lines.len(), words.len(), "{text}");
        for (line, (level, word)) in lines.iter().zip(words) {
            assert!(line.starts_with(level) && line.contains(word), "{text}");
        }
    }
}
