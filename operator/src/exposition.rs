//! Prometheus' text about many services, written part by part: a whole answer about thousands of them never stands in memory,
//! and nothing is kept between two scrapes.

use std::fmt::Write as _;

/// One metric of every service, read from a `T`.
pub(crate) struct Family<T> {
    name: &'static str,
    /// What it says.
    help: &'static str,
    /// In Prometheus' words.
    kind: &'static str,
    write: fn(&T, &mut Lines<'_>),
}

/// Where the lines of one metric and one service go.
pub(crate) struct Lines<'a> {
    text: &'a mut String,
    metric: &'static str,
    of: (&'a str, &'a str),
}

impl Lines<'_> {
    /// A line with only the service's own labels.
    pub(crate) fn add(&mut self, value: f64) {
        self.add_with(&[], value);
    }

    /// A line with more labels, in the order of their names.
    pub(crate) fn add_with(&mut self, more: &[(&str, &str)], value: f64) {
        let (namespace, name) = self.of;
        self.text.push_str(self.metric);
        let mut before = '{';
        let own = [("name", name), ("namespace", namespace)];
        for (label, value) in own.iter().chain(more) {
            self.text.push(before);
            before = ',';
            self.text.push_str(label);
            self.text.push_str("=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "}} {value}");
    }
}

impl<T> Family<T> {
    /// A figure that goes up and down. `write` writes the lines of one service; none where nothing is known.
    pub(crate) const fn gauge(
        name: &'static str,
        help: &'static str,
        write: fn(&T, &mut Lines<'_>),
    ) -> Self {
        Self::of_kind("gauge", name, help, write)
    }

    /// A figure that only grows, likewise.
    pub(crate) const fn counter(
        name: &'static str,
        help: &'static str,
        write: fn(&T, &mut Lines<'_>),
    ) -> Self {
        Self::of_kind("counter", name, help, write)
    }

    const fn of_kind(
        kind: &'static str,
        name: &'static str,
        help: &'static str,
        write: fn(&T, &mut Lines<'_>),
    ) -> Self {
        Self {
            name,
            help,
            kind,
            write,
        }
    }

    /// Appends what this metric says of one service, `of` namespace and name; `headed` is whether something of it was said
    /// before, and true once something was.
    pub(crate) fn append(
        &self,
        subject: &T,
        of: (&str, &str),
        headed: &mut bool,
        text: &mut String,
    ) {
        let begin = text.len();
        let mut lines = Lines {
            text: &mut *text,
            metric: self.name,
            of,
        };
        (self.write)(subject, &mut lines);
        if text.len() > begin && !*headed {
            *headed = true;
            let (name, help, kind) = (self.name, self.help, self.kind);
            text.insert_str(
                begin,
                &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_named_once_and_only_if_it_says_something() {
        let family = Family::<Option<f64>>::counter("m", "Words.", |value, lines| {
            if let Some(value) = value {
                lines.add_with(&[("reason", "a \"b\"\\\n")], *value);
            }
        });
        let (mut headed, mut text) = (false, String::new());
        family.append(&None, ("ns", "x"), &mut headed, &mut text);
        assert_eq!((headed, text.as_str()), (false, ""));
        family.append(&Some(1.5), ("ns", "y"), &mut headed, &mut text);
        family.append(&Some(2.0), ("ns", "z"), &mut headed, &mut text);
        assert_eq!(
            text,
            "# HELP m Words.\n# TYPE m counter\n\
             m{name=\"y\",namespace=\"ns\",reason=\"a \\\"b\\\"\\\\\\n\"} 1.5\n\
             m{name=\"z\",namespace=\"ns\",reason=\"a \\\"b\\\"\\\\\\n\"} 2\n"
        );
    }
}
