//! The table that the benchmark prints.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Result;

/// Measures in the order they were taken.
#[derive(Default)]
pub(crate) struct Report(Vec<Line>);

struct Line {
    what: String,
    figure: String,
    bar: String,
    met: Option<bool>,
}

impl Report {
    fn add(&mut self, what: &str, figure: String, bar: String, met: Option<bool>) {
        let line = Line {
            what: what.to_owned(),
            figure,
            bar,
            met,
        };
        // Told at once, for whoever watches; nothing can be done about a closed standard error.
        let _ = writeln!(std::io::stderr(), "    {}: {}", line.what, line.figure);
        self.0.push(line);
    }

    /// A time and its bar.
    pub(crate) fn time(&mut self, what: &str, took: Duration, bar: Duration) {
        let met = Some(took <= bar);
        self.add(
            what,
            format!("{:.0} ms", took.as_secs_f64().mul_add(1e3, 0.5).floor()),
            format!("≤ {} ms", bar.as_millis()),
            met,
        );
    }

    /// A count and the most that is allowed.
    pub(crate) fn count(&mut self, what: &str, count: usize, most: usize) {
        self.add(
            what,
            count.to_string(),
            format!("≤ {most}"),
            Some(count <= most),
        );
    }

    /// Bytes and the most MiB that are allowed.
    pub(crate) fn mib(&mut self, what: &str, bytes: u64, most: u64) {
        let mib = bytes as f64 / 1_048_576.0;
        self.add(
            what,
            format!("{mib:.1} MiB"),
            format!("≤ {most} MiB"),
            Some(bytes <= most << 20),
        );
    }

    /// A figure without a bar.
    pub(crate) fn note(&mut self, what: &str, figure: String) {
        self.add(what, figure, String::new(), None);
    }

    /// True when no bar was missed.
    pub(crate) fn all_met(&self) -> bool {
        self.0.iter().all(|line| line.met != Some(false))
    }

    /// Prints the table.
    pub(crate) fn print(&self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        for line in &self.0 {
            let verdict = match line.met {
                Some(true) => "ok",
                Some(false) => "NOT MET",
                None => "",
            };
            writeln!(
                out,
                "{:<58} {:>14}  {:<12} {verdict}",
                line.what, line.figure, line.bar
            )?;
        }
        Ok(())
    }
}
