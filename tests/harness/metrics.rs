//! Numbers as Prometheus reads them: a parser that accepts the text format and nothing besides, and says where not.
//!
//! Stricter than Prometheus itself: what its linter (`promtool check metrics`) dislikes is an error here too.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

use crate::Host;

/// A sample's labels.
pub type Labels = BTreeMap<String, String>;

/// All samples: name of the sample, its labels, its value.
#[derive(Debug, Default, Clone)]
pub struct Metrics {
    samples: BTreeMap<(String, Labels), f64>,
    families: BTreeMap<String, String>,
}

impl Metrics {
    /// Those of the ftd that runs on `host`, from its socket.
    pub fn of(host: &Host) -> Result<Self> {
        let words = ["curl", "-sf", "-m", "10", "--unix-socket", "/run/ftd/ftd.sock", "http://ftd/metrics"];
        Self::parse(&host.ok(words)?)
    }

    /// Reads the text.
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with('\n'), "the last line has no end");
        let (mut all, mut family, mut helped) = (Self::default(), String::new(), None);
        for (n, line) in text.lines().enumerate() {
            let at = || format!("line {}: {line}", n + 1);
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').with_context(at)?;
                ensure!(help.ends_with('.'), "no sentence: {}", at());
                helped = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').with_context(at)?;
                ensure!(helped.take().as_deref() == Some(name), "TYPE does not follow its HELP: {}", at());
                check_family(name, kind).with_context(at)?;
                ensure!(all.families.insert(name.into(), kind.into()).is_none(), "twice: {}", at());
                name.clone_into(&mut family);
            } else {
                ensure!(!line.starts_with('#') && helped.is_none(), "unexpected: {}", at());
                let (name, labels, value) = sample(line).with_context(at)?;
                let kind = all.families.get(&family).with_context(at)?;
                let suffix = name.strip_prefix(&family).with_context(at)?;
                let fits = match suffix {
                    "" => kind != "histogram",
                    "_bucket" => kind == "histogram" && labels.contains_key("le"),
                    "_sum" | "_count" => kind == "histogram",
                    _ => false,
                };
                ensure!(fits, "a sample that is not of {family}: {}", at());
                ensure!(all.samples.insert((name, labels), value).is_none(), "twice: {}", at());
            }
        }
        all.check_histograms()?;
        Ok(all)
    }

    /// The one sample with this name that has these labels, among others; 0 if there is none, as for a counter that
    /// has not counted anything yet.
    ///
    /// # Panics
    /// If several have them: the test means one.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has =
            |of: &Labels| labels.iter().all(|(label, value)| of.get(*label).is_some_and(|has| has == value));
        let mut found =
            self.samples.iter().filter(|((of, all), _)| of == name && has(all)).map(|(_, value)| *value);
        let value = found.next().unwrap_or(0.0);
        assert!(found.next().is_none(), "several samples of {name} have {labels:?}");
        value
    }

    /// Names of all families.
    pub fn families(&self) -> BTreeSet<&str> {
        self.families.keys().map(String::as_str).collect()
    }

    fn check_histograms(&self) -> Result<()> {
        for family in self.families.iter().filter(|(_, kind)| *kind == "histogram").map(|(name, _)| name) {
            let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
            for ((_, labels), count) in
                self.samples.iter().filter(|((name, _), _)| *name == format!("{family}_bucket"))
            {
                let mut labels = labels.clone();
                let bound = number(&labels.remove("le").context("a bucket without an end")?)?;
                series.entry(labels).or_default().push((bound, *count));
            }
            for (labels, mut buckets) in series {
                buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                ensure!(
                    buckets.is_sorted_by(|a, b| a.1 <= b.1),
                    "{family} {labels:?} does not grow: {buckets:?}"
                );
                let last = buckets.last().context("no bucket")?;
                let count = self.samples.get(&(format!("{family}_count"), labels.clone()));
                ensure!(
                    last.0.is_infinite() && Some(&last.1) == count,
                    "{family} {labels:?} does not add up"
                );
                ensure!(self.samples.contains_key(&(format!("{family}_sum"), labels)), "{family} has no sum");
            }
        }
        Ok(())
    }
}

fn check_family(name: &str, kind: &str) -> Result<()> {
    ensure!(is_name(name), "no name of a metric");
    ensure!(name.starts_with("ftd_"), "not ours");
    match kind {
        "counter" => ensure!(name.ends_with("_total"), "a counter's name ends with _total"),
        "gauge" => ensure!(!name.ends_with("_total"), "a gauge's name does not end with _total"),
        "histogram" => ensure!(name.ends_with("_seconds") || name.ends_with("_bytes"), "no unit"),
        _ => bail!("no known type"),
    }
    for (wrong, right) in
        [("_ms", "_seconds"), ("_us", "_seconds"), ("_milliseconds", "_seconds"), ("_mib", "_bytes")]
    {
        ensure!(!name.contains(wrong), "{right} is the unit to use");
    }
    Ok(())
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn number(text: &str) -> Result<f64> {
    match text {
        "+Inf" => Ok(f64::INFINITY),
        _ if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') => Ok(text.parse()?),
        _ => bail!("no number: {text}"),
    }
}

fn sample(line: &str) -> Result<(String, Labels, f64)> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    ensure!(is_name(name), "no name");
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").context("no label")?;
            ensure!(is_name(label), "no name of a label: {label}");
            let (value, after) = quoted(after)?;
            ensure!(labels.insert(label.into(), value).is_none(), "{label} is there twice");
            rest = after;
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            rest = rest.strip_prefix(',').context("labels are parted by commas")?;
        }
    }
    let value = rest.strip_prefix(' ').context("one blank before the value")?;
    Ok((name.into(), labels, number(value)?))
}

/// What is before the closing quote, without its escapes, and what is after it.
fn quoted(text: &str) -> Result<(String, &str)> {
    let (mut value, mut characters) = (String::new(), text.char_indices());
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                _ => bail!("an unknown escape"),
            },
            other => value.push(other),
        }
    }
    bail!("a label's value has no end")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that panics names its line")]
#[allow(clippy::float_cmp, reason = "what was written is read")]
mod tests {
    use super::*;

    const HEAD: &str = "# HELP ftd_a_seconds A.\n# TYPE ftd_a_seconds histogram\n";

    #[test]
    fn what_is_right_is_read() {
        let text = format!(
            "# HELP ftd_x_total X.\n# TYPE ftd_x_total counter\nftd_x_total 1\nftd_x_total{{a=\"b\\\\\\\"c\\n\",d=\"\"}} 2.5\n\
             {HEAD}ftd_a_seconds_bucket{{le=\"0.5\"}} 1\nftd_a_seconds_bucket{{le=\"+Inf\"}} 2\n\
             ftd_a_seconds_sum 0.25\nftd_a_seconds_count 2\n"
        );
        let metrics = Metrics::parse(&text).unwrap();
        assert_eq!(metrics.value("ftd_x_total", &[("a", "b\\\"c\n")]), 2.5);
        assert_eq!(metrics.value("ftd_a_seconds_count", &[]), 2.0);
        assert_eq!(metrics.value("ftd_x_total", &[("a", "other")]), 0.0);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let counter = "# HELP ftd_x_total X.\n# TYPE ftd_x_total counter\n";
        for (text, why) in [
            ("ftd_x 1\n".to_owned(), "no family"),
            ("# TYPE ftd_x gauge\nftd_x 1\n".to_owned(), "no help"),
            ("# HELP ftd_x X.\n# TYPE ftd_x counter\n".to_owned(), "a counter without _total"),
            (format!("{counter}ftd_x_total 1"), "no end of line"),
            (format!("{counter}ftd_x_total{{a=\"b\"}}  1\n"), "two blanks"),
            (format!("{counter}ftd_x_total{{a=\"b}} 1\n"), "an open quote"),
            (format!("{counter}ftd_x_total{{a=\"1\",a=\"2\"}} 1\n"), "a label twice"),
            (format!("{counter}ftd_x_total 1\nftd_x_total 1\n"), "a sample twice"),
            (format!("{counter}{counter}"), "a family twice"),
            (format!("{counter}ftd_y_total 1\n"), "a sample of another family"),
            (format!("{counter}ftd_x_total one\n"), "no number"),
            (format!("{HEAD}ftd_a_seconds_bucket{{le=\"+Inf\"}} 2\nftd_a_seconds_count 2\n"), "no sum"),
            (
                format!(
                    "{HEAD}ftd_a_seconds_bucket{{le=\"1\"}} 3\nftd_a_seconds_bucket{{le=\"+Inf\"}} 2\n\
                         ftd_a_seconds_sum 1\nftd_a_seconds_count 2\n"
                ),
                "buckets that do not grow",
            ),
            (
                format!(
                    "{HEAD}ftd_a_seconds_bucket{{le=\"+Inf\"}} 2\nftd_a_seconds_sum 1\nftd_a_seconds_count 3\n"
                ),
                "a count of its own",
            ),
        ] {
            assert!(Metrics::parse(&text).is_err(), "{why}");
        }
    }
}
