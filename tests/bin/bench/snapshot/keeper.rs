//! What keeps generations of a directory of images, each by its own command line: one command for each generation, but
//! for ftd, which goes on from one to the next as its daemon does.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::command;
use serde::Serialize;

use super::images;
use crate::clock;

/// The name of the workload in ftd's store.
const WORKLOAD: &str = "bench";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Ftd,
    Tar,
    Restic,
    Borg,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Ftd, Self::Tar, Self::Restic, Self::Borg];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ftd => "ftd",
            Self::Tar => "tar, zstd -1 -T0",
            Self::Restic => "restic",
            Self::Borg => "borg, zstd,1",
        }
    }
}

/// A keeper with nothing kept so far.
pub(super) struct Keeper {
    pub(super) kind: Kind,
    /// Where it keeps what it keeps.
    store: PathBuf,
    /// For all else that it writes.
    cache: PathBuf,
    ftd: Option<Ftd>,
}

/// ftd, which keeps the directories that it is told, and tells of each when it is durable.
struct Ftd {
    child: Child,
    told: Option<ChildStdin>,
    tells: BufReader<ChildStdout>,
}

impl Ftd {
    fn start(store: &Path) -> Result<Self> {
        let mut ftd = program();
        ftd.arg("keep-images").arg(store).arg(WORKLOAD).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = ftd.spawn().with_context(|| command::describe(&ftd))?;
        let tells = child.stdout.take().context("ftd has no output")?;
        Ok(Self { told: child.stdin.take(), tells: BufReader::new(tells), child })
    }

    fn keep(&mut self, images: &Path) -> Result<()> {
        let told = self.told.as_mut().context("ftd has no input")?;
        writeln!(told, "{}", images.display())?;
        let mut line = String::new();
        self.tells.read_line(&mut line)?;
        ensure!(line.contains("generation"), "ftd keep-images has ended: {}", self.child.wait()?);
        Ok(())
    }
}

impl Drop for Ftd {
    fn drop(&mut self) {
        self.told = None;
        let _ = self.child.wait();
    }
}

/// The ftd that the hosts have, on this machine.
fn program() -> Command {
    Command::new(std::env::var_os("FTD_BIN").unwrap_or_else(|| "ftd".into()))
}

impl Keeper {
    /// A new one in the directory `dir`, which it makes.
    pub(super) fn new(kind: Kind, dir: &Path) -> Result<Self> {
        let mut keeper = Self { kind, store: dir.join("store"), cache: dir.join("cache"), ftd: None };
        for dir in [&keeper.store, &keeper.cache] {
            fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        }
        match kind {
            Kind::Ftd => keeper.ftd = Some(Ftd::start(&keeper.store)?),
            Kind::Tar => {}
            Kind::Restic => keeper.run(keeper.program("restic").args(["init", "--quiet"]))?,
            Kind::Borg => keeper
                .run(keeper.program("borg").args(["init", "--encryption", "none"]).arg(&keeper.store))?,
        }
        Ok(keeper)
    }

    /// Keeps `images` as generation `number`; milliseconds.
    pub(super) fn keep(&mut self, number: u32, images: &Path) -> Result<f64> {
        let began = clock::now();
        match self.kind {
            Kind::Ftd => self.ftd.as_mut().context("ftd does not run")?.keep(images)?,
            Kind::Tar => {
                // The others make durable what they have written, too.
                let script =
                    "set -euo pipefail; tar -C \"$1\" -cf - . | zstd -q -1 -T0 -o \"$2\"; sync \"$2\"";
                let mut shell = self.program("bash");
                self.run(shell.args(["-c", script, "-"]).arg(images).arg(self.archive(number)))?;
            }
            Kind::Restic => {
                let mut restic = self.program("restic");
                self.run(restic.args(["backup", "--quiet", "--host", "bench", "."]).current_dir(images))?;
            }
            Kind::Borg => {
                let mut borg = self.program("borg");
                borg.args(["create", "--compression", "zstd,1"]);
                borg.arg(format!("{}::{number}", self.store.display())).arg(".");
                self.run(borg.current_dir(images))?;
            }
        }
        Ok(clock::ms(began, clock::now()))
    }

    /// Gets generation `number`, the newest, back into `dir`, which is there and empty; milliseconds, and where the images
    /// are.
    pub(super) fn give(&self, number: u32, dir: &Path) -> Result<(f64, PathBuf)> {
        let mut command = match self.kind {
            Kind::Ftd => {
                let mut ftd = program();
                ftd.arg("give-images").arg(&self.store).args([WORKLOAD, &number.to_string()]).arg(dir);
                ftd
            }
            Kind::Tar => {
                let mut shell = self.program("bash");
                let script = "set -euo pipefail; zstd -q -dc \"$1\" | tar -C \"$2\" -xf -";
                shell.args(["-c", script, "-"]).arg(self.archive(number)).arg(dir);
                shell
            }
            Kind::Restic => {
                let mut restic = self.program("restic");
                restic.args(["restore", "--quiet", "latest", "--target"]).arg(dir);
                restic
            }
            Kind::Borg => {
                let mut borg = self.program("borg");
                borg.arg("extract").arg(format!("{}::{number}", self.store.display())).current_dir(dir);
                borg
            }
        };
        let began = clock::now();
        self.run(&mut command)?;
        let took = clock::ms(began, clock::now());
        // Of several units of a workload, ftd keeps each in a directory of its own.
        Ok((took, if self.kind == Kind::Ftd { dir.join("0") } else { dir.to_owned() }))
    }

    /// Bytes that it takes on disk.
    pub(super) fn bytes(&self) -> Result<u64> {
        images::bytes(&self.store)
    }

    fn archive(&self, number: u32) -> PathBuf {
        self.store.join(format!("{number}.tar.zst"))
    }

    fn program(&self, name: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut program = Command::new(name);
        program
            .env("RESTIC_REPOSITORY", &self.store)
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", &self.cache)
            .env("BORG_BASE_DIR", &self.cache)
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        program
    }

    fn run(&self, command: &mut Command) -> Result<()> {
        command::ok(command).map(drop).context(self.kind.name())
    }
}
