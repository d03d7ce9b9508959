//! Numbers as text, in the format that Prometheus reads (text format 0.0.4).
//!
//! ```text
//! # HELP ftd_heals_total Outages that ended.
//! # TYPE ftd_heals_total counter
//! ftd_heals_total{node="vm1",unit="nginx.service"} 3
//! ```

use std::fmt::{Display, Write as _};

/// Its media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of a sample: name and value, in an order that is always the same for a family.
pub type Labels = Vec<(&'static str, String)>;

/// What a family's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Grows, and begins anew when ftd starts.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations, counted by size.
    Histogram,
}

impl Type {
    fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Text that grows, family by family.
#[derive(Debug)]
pub struct Text {
    out: String,
    /// Labels that every sample has.
    common: Labels,
}

impl Text {
    /// Nothing yet; each sample will have these labels besides its own.
    pub fn new(common: Labels) -> Self {
        Self { out: String::new(), common }
    }

    /// Begins a family. What it says of itself stands there once, before its samples.
    pub fn family(&mut self, name: &str, kind: Type, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.push(format_args!("# HELP {name} {help}\n# TYPE {name} {}\n", kind.word()));
    }

    /// One number of the family that was begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.out.push_str(name);
        let common = std::mem::take(&mut self.common);
        let all = common.iter().map(|(label, value)| (*label, value.as_str())).chain(labels.iter().copied());
        for (n, (label, value)) in all.enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            self.push(format_args!("{}{label}=\"{value}\"", if n == 0 { '{' } else { ',' }));
        }
        if !(common.is_empty() && labels.is_empty()) {
            self.out.push('}');
        }
        self.common = common;
        self.push(format_args!(" {value}\n"));
    }

    /// A family that has one number for each of these.
    pub fn gauges<'a, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'a str, &'a str)>, V)>,
    ) {
        self.family(name, Type::Gauge, help);
        for (labels, value) in samples {
            self.sample(name, &labels, value);
        }
    }

    /// The samples of a histogram.
    pub fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut sum = 0;
        for (bound, count) in histogram.bounds.iter().map(ToString::to_string).zip(&histogram.counts) {
            sum += count;
            self.sample(&bucket, &[labels, &[("le", bound.as_str())]].concat(), sum);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), histogram.count);
        self.sample(&format!("{name}_sum"), labels, histogram.sum);
        self.sample(&format!("{name}_count"), labels, histogram.count);
    }

    /// All of it.
    pub fn finish(self) -> String {
        self.out
    }

    fn push(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Text that is written to a String is always taken.
        let _ = self.out.write_fmt(arguments);
    }
}

/// Observations, counted by size.
#[derive(Debug, Clone)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    /// No observation; `bounds` are the upper ends of the buckets, growing, and included in them.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], count: 0, sum: 0.0 }
    }

    /// One more.
    pub fn observe(&mut self, value: f64) {
        if let Some(at) = self.bounds.iter().position(|bound| value <= *bound) {
            self.counts[at] += 1;
        }
        self.count += 1;
        self.sum += value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_break_a_line_is_escaped() {
        let mut text = Text::new(vec![("node", "a\"b".into())]);
        text.family("x_total", Type::Counter, "Two\nlines, and a \\.");
        text.sample("x_total", &[("what", "c:\\d\n")], 1);
        assert_eq!(
            text.finish(),
            "# HELP x_total Two\\nlines, and a \\\\.\n# TYPE x_total counter\n\
             x_total{node=\"a\\\"b\",what=\"c:\\\\d\\n\"} 1\n"
        );
    }

    #[test]
    fn buckets_add_up() {
        let mut histogram = Histogram::new(&[0.1, 1.0, 10.0]);
        for value in [0.05, 0.1, 0.5, 100.0] {
            histogram.observe(value);
        }
        let mut text = Text::new(Vec::new());
        text.histogram("x_seconds", &[("unit", "a")], &histogram);
        assert_eq!(
            text.finish(),
            "x_seconds_bucket{unit=\"a\",le=\"0.1\"} 2\nx_seconds_bucket{unit=\"a\",le=\"1\"} 3\n\
             x_seconds_bucket{unit=\"a\",le=\"10\"} 3\nx_seconds_bucket{unit=\"a\",le=\"+Inf\"} 4\n\
             x_seconds_sum{unit=\"a\"} 100.65\nx_seconds_count{unit=\"a\"} 4\n"
        );
    }
}
