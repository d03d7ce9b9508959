//! Running a command so that a failure says which command, for what, and what it printed.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, bail};

/// What a finished command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for error texts.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error; bytes that are not UTF-8 are replaced.
    pub stderr: String,
}

impl Output {
    /// Whether it exited with 0.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Its standard output if it exited with 0; else an error with all that it printed.
    pub fn ok(self) -> Result<String> {
        if self.success() {
            return Ok(self.stdout);
        }
        let mut text = format!("`{}` failed: {}", self.command, self.status);
        for (name, stream) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let stream = tail(stream, 30);
            if !stream.is_empty() {
                let _ = write!(text, "\n{name}: {stream}");
            }
        }
        bail!(text)
    }
}

/// The command line as a person would type it, without its environment.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| {
        let word = word.to_string_lossy();
        let plain = |c: char| {
            c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '=' | ':' | ',' | '+' | '@')
        };
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// The last `lines` lines of `text`, trimmed.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn cannot_start(command: &Command) -> String {
    let program = command.get_program().to_string_lossy().into_owned();
    format!("{program} cannot be started (is it installed and in PATH?)")
}

/// Runs it with no input and captures what it prints. An exit code other than 0 is no error here: see
/// [`Output::ok`].
pub fn output(command: &mut Command) -> Result<Output> {
    let out = command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    Ok(Output {
        command: describe(command),
        status: out.status,
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    })
}

/// Runs it quietly: its standard output, or an error with all that it printed.
pub fn ok(command: &mut Command) -> Result<String> {
    output(command)?.ok()
}

/// Runs it on this terminal; an exit code other than 0 is an error.
pub fn show(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("`{}` failed: {status}", describe(command));
    }
    Ok(())
}

/// A file that takes the output of long commands, so that a terminal shows one line and a failure shows
/// the end of it.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Starts an empty log at `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("the log {} cannot be written", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Runs a command with both its streams in the log. On failure the error holds the log's last lines.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        use std::io::Write as _;
        writeln!(&self.file, "+ {}", describe(command))?;
        command.stdin(Stdio::null()).stdout(self.file.try_clone()?).stderr(self.file.try_clone()?);
        let status = command.status().with_context(|| cannot_start(command))?;
        if !status.success() {
            let text = std::fs::read(&self.path).unwrap_or_default();
            bail!(
                "`{}` failed: {status}\n{}\n(all of it: {})",
                describe(command),
                tail(&String::from_utf8_lossy(&text), 25),
                self.path.display()
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_its_last_words() {
        let error = ok(Command::new("sh").args(["-c", "echo oh no >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c 'echo oh no >&2; exit 3'"), "{error}");
        assert!(error.contains("exit status: 3") && error.contains("oh no"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = ok(&mut Command::new("no-such-program")).unwrap_err().to_string();
        assert!(error.contains("no-such-program cannot be started"), "{error}");
    }

    #[test]
    fn the_tail_is_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }
}
