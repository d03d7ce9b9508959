//! Goals, tables, and the two files that a run leaves behind.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use harness::{Host, command};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// One thing that has been measured.
pub(crate) trait Measured: Serialize {
    /// Its section of the report.
    fn markdown(&self) -> String;
    /// What was hoped for.
    fn goals(&self) -> Vec<Goal>;
}

/// A bound, and the figure that is to keep it.
#[derive(Debug, Serialize)]
pub(crate) struct Goal {
    what: String,
    value: f64,
    bound: f64,
    unit: String,
    /// Whether more is better.
    at_least: bool,
    met: bool,
}

impl Goal {
    pub(crate) fn at_most(what: &str, value: f64, bound: f64, unit: &str) -> Self {
        let (what, unit) = (what.to_owned(), unit.to_owned());
        Self { what, value, bound, unit, at_least: false, met: value <= bound }
    }

    pub(crate) fn at_least(what: &str, value: f64, bound: f64, unit: &str) -> Self {
        Self { at_least: true, met: value >= bound, ..Self::at_most(what, value, bound, unit) }
    }

    fn row(&self) -> Vec<String> {
        let sign = if self.at_least { ">=" } else { "<=" };
        vec![
            self.what.clone(),
            format!("{} {}", figure(self.value), self.unit),
            format!("{sign} {} {}", figure(self.bound), self.unit),
            if self.met { "PASS" } else { "FAIL" }.to_owned(),
        ]
    }
}

/// A number with as many digits as it deserves.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

/// A Markdown table whose columns are aligned for those who read it as it is; figures to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].chars().count(), 3]).max().unwrap_or(3)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut line = String::from("|");
        for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let _ = if column == 0 {
                write!(line, " {cell:<width$} |")
            } else {
                write!(line, " {cell:>width$} |")
            };
        }
        line + "\n"
    };
    let rule: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(column, width)| if column == 0 { "-".repeat(*width) } else { "-".repeat(width - 1) + ":" })
        .collect();
    let mut text = line(head.to_vec());
    text += &line(rule.iter().map(String::as_str).collect());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

/// What has been measured so far.
pub(crate) struct Report {
    name: &'static str,
    about: Map<String, Value>,
    sections: Vec<(String, Value, String)>,
    goals: Vec<Goal>,
    failures: Vec<String>,
}

impl Report {
    /// An empty report about this machine. The files that it becomes have this name.
    pub(crate) fn new(name: &'static str, rounds: u32) -> Result<Self> {
        let kernel = nix::sys::utsname::uname()?;
        let about = json!({
            "date": jiff::Timestamp::now().round(jiff::Unit::Second)?.to_string(),
            "processor": of_file("/proc/cpuinfo", "model name"),
            "processors": std::thread::available_parallelism()?.get(),
            "memory": of_file("/proc/meminfo", "MemTotal"),
            "kernel": kernel.release().to_string_lossy(),
            "load_before": load(),
            "rounds": rounds,
        });
        let Value::Object(about) = about else { unreachable!("it is written as an object above") };
        Ok(Self { name, about, sections: Vec::new(), goals: Vec::new(), failures: Vec::new() })
    }

    /// Notes the version of a program, which is what these words print in their first line, on a host or here.
    pub(crate) fn version(&mut self, host: Option<&Host>, program: &str, words: &[&str]) -> Result<()> {
        let out = match host {
            Some(host) => host.run(words)?,
            None => command::output(std::process::Command::new(words[0]).args(&words[1..]))?,
        };
        let text = if out.stdout.is_empty() { out.stderr } else { out.stdout };
        let first = text.lines().next().unwrap_or_default().trim();
        self.about.insert(program.to_owned(), first.into());
        Ok(())
    }

    /// Takes a measurement in, or why there is none, and prints it.
    pub(crate) fn take(&mut self, name: &str, measured: Result<impl Measured>) {
        let section = measured.and_then(|measured| {
            let raw = serde_json::to_value(&measured)?;
            Ok((raw, measured.markdown(), measured.goals()))
        });
        match section {
            Ok((raw, text, goals)) => {
                println!("{text}");
                self.sections.push((name.to_owned(), raw, text));
                self.goals.extend(goals);
            }
            Err(error) => {
                eprintln!("bench: {name} could not be measured: {error:#}");
                self.failures.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// Writes both files, prints the goals; answers whether everything could be measured.
    pub(crate) fn finish(mut self, out: &Path) -> Result<bool> {
        self.about.insert("load_after".into(), load());
        let goals: Vec<_> = self.goals.iter().map(Goal::row).collect();
        let mut goals = format!("## Goals\n\n{}", table(&["", "measured", "bound", ""], &goals));
        for failure in &self.failures {
            let _ = writeln!(goals, "\nNot measured: {failure}");
        }
        println!("{goals}");

        let about: Vec<_> = self
            .about
            .iter()
            .map(|(name, value)| {
                vec![name.replace('_', " "), value.as_str().map_or(value.to_string(), Into::into)]
            })
            .collect();
        let mut text =
            format!("# ftd, measured: {}\n\n{}\n{goals}\n", self.name, table(&["", "value"], &about));
        let mut raw = Map::new();
        for (name, value, section) in self.sections {
            let _ = writeln!(text, "{section}");
            raw.insert(name, value);
        }
        let raw = json!({
            "about": self.about, "goals": self.goals, "failures": self.failures, "measurements": raw
        });
        for (kind, content) in [("json", serde_json::to_string_pretty(&raw)?), ("md", text)] {
            let path = out.join(self.name).with_extension(kind);
            fs::write(&path, content).with_context(|| format!("{} cannot be written", path.display()))?;
            println!("{}", path.display());
        }
        Ok(self.failures.is_empty())
    }
}

/// The value of the first line with this name in one of the kernel's tables.
fn of_file(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// How busy the machine has been in the last minute: figures of a busy one say little.
fn load() -> Value {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = vec![vec!["one".into(), "1.5".into()], vec!["twenty".into(), "1000.0".into()]];
        let wanted = "|        |  value |\n| ------ | -----: |\n| one    |    1.5 |\n| twenty | 1000.0 |\n";
        assert_eq!(table(&["", "value"], &rows), wanted);
    }

    #[test]
    fn goals_are_met_on_their_side_of_the_bound() {
        assert!(Goal::at_most("", 1.0, 1.0, "").met && !Goal::at_most("", 1.1, 1.0, "").met);
        assert!(Goal::at_least("", 1.0, 1.0, "").met && !Goal::at_least("", 0.9, 1.0, "").met);
        assert_eq!(
            [figure(0.0), figure(1.234), figure(12.34), figure(1234.5)],
            ["0", "1.23", "12.3", "1234"]
        );
    }
}
