//! Errors in the configuration, as a person needs them: file, line, column, cause, mend.

use std::{fmt, io, ops::Range, path::Path, path::PathBuf};

use toml::de::DeTable;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}\n  mend: {}", path.display(), mend_unreadable(source))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file can be read and makes no sense.
    #[error("{}", render(path, problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<Problem>,
    },
}

fn mend_unreadable(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "write one (an empty file is valid), or name another with --config",
        io::ErrorKind::PermissionDenied => "run as root, or as a user who may read it",
        io::ErrorKind::InvalidData => "it is not UTF-8 text: save it as such",
        _ => "see the cause",
    }
}

fn render(path: &Path, problems: &[Problem]) -> String {
    let lines: Vec<_> = problems.iter().map(|p| format!("{}:{p}", path.display())).collect();
    lines.join("\n")
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Line, from 1; 0 when it belongs to no line.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong, and why.
    pub what: String,
    /// What to do.
    pub mend: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        write!(f, " {}\n  mend: {}", self.what, self.mend)
    }
}

impl Problem {
    /// A problem at byte `at` of `text`.
    pub(super) fn at(text: &str, at: Option<usize>, what: String, mend: String) -> Self {
        let (line, column) = at.map_or((0, 0), |at| (line_of(text, at), column_of(text, at)));
        Self { line, column, what, mend }
    }
}

/// The line of byte `at`, from 1.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|b| *b == b'\n').count() + 1
}

fn column_of(text: &str, at: usize) -> usize {
    let before = text.get(..at).unwrap_or(text);
    before.len() - before.rfind('\n').map_or(0, |newline| newline + 1) + 1
}

/// Where the key at the end of `path` stands in the text, for problems found after parsing; as much of
/// it as there is. Elements of lists are named by their numbers, like `["workload", "0", "units"]`.
pub(super) fn find(text: &str, path: &[&str]) -> Option<usize> {
    (1..=path.len()).rev().find_map(|end| find_exact(text, &path[..end]))
}

/// The same, or nothing where the key is left out.
pub(super) fn find_exact(text: &str, path: &[&str]) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let (name, rest) = path.split_first()?;
    let (mut key, mut value) = root.get_ref().get_key_value(*name)?;
    let mut at = key.span().start;
    for step in rest {
        if let Some(table) = value.get_ref().as_table() {
            (key, value) = table.get_key_value(*step)?;
            at = key.span().start;
        } else {
            value = value.get_ref().as_array()?.get(step.parse::<usize>().ok()?)?;
            at = value.span().start;
        }
    }
    Some(at)
}

impl ConfigError {
    /// All that is wrong, one by one.
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Invalid { problems, .. } => problems.clone(),
            Self::Unreadable { source, .. } => vec![Problem {
                line: 0,
                column: 0,
                what: format!("cannot be read: {source}"),
                mend: mend_unreadable(source).into(),
            }],
        }
    }

    /// Explains what the parser refused.
    pub(super) fn of_toml(error: &toml::de::Error, text: &str, path: &Path) -> Self {
        let (what, mend) = explain(error.message(), error.span(), text);
        let problem = Problem::at(text, error.span().map(|s| s.start), what, mend);
        Self::Invalid { path: path.into(), problems: vec![problem] }
    }
}

fn explain(message: &str, span: Option<Range<usize>>, text: &str) -> (String, String) {
    let found = span.and_then(|span| text.get(span)).unwrap_or_default().trim();
    // serde's own wording: unknown field `x`, expected one of `a`, `b`
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let unknown = message.starts_with("unknown field") || message.starts_with("unknown variant");
    if let (true, Some((wrong, known))) = (unknown, quoted.split_first()) {
        let kind = if message.starts_with("unknown field") { "key" } else { "value" };
        let nearest = known
            .iter()
            .map(|k| (strsim::damerau_levenshtein(wrong, k), *k))
            .min()
            .filter(|(distance, k)| *distance <= k.len().max(wrong.len()) / 2);
        let all = known.join(", ");
        let mend = match nearest {
            Some((_, near)) => format!("did you mean \"{near}\"? Known here: {all}"),
            None => format!("known here: {all}"),
        };
        return (format!("unknown {kind} \"{wrong}\""), mend);
    }
    if let (true, Some(field)) = (message.starts_with("missing field"), quoted.first()) {
        return (format!("the key \"{field}\" is missing"), format!("add {field} = …"));
    }
    let mend = if message.contains("expected a duration") || message.contains("time unit") {
        "durations are text with a unit, like \"500ms\", \"5s\", \"1min\"".to_owned()
    } else if message.contains("byte size") || message.contains("couldn't be parsed into a known SI unit") {
        "sizes are text with a unit, like \"64MiB\"".to_owned()
    } else if message.starts_with("invalid type") {
        "give a value of the type that is expected; see ftd.toml(5)".to_owned()
    } else {
        "see ftd.toml(5), and https://toml.io for the notation".to_owned()
    };
    let what = message.trim().replace('\n', " ");
    (if found.is_empty() || found.len() > 60 { what } else { format!("{what}: {found}") }, mend)
}
