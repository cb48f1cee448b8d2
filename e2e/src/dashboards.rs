//! What the chart's dashboards ask Prometheus.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::prometheus::{CHART, Prometheus};

/// Panels that have nothing to show when nothing is wrong, by dashboard and title.
pub const OF_FAULTS: [(&str, &str); 7] = [
    // Models in an image are not downloaded.
    ("Ashlar / Fleet", "Models on their way"),
    ("Ashlar / Service", "Model on disk"),
    // Only faults fill these.
    ("Ashlar / Fleet", "Conditions that are not True"),
    ("Ashlar / Fleet", "Alerts that fire"),
    ("Ashlar / Operator", "Rollouts"),
    ("Ashlar / Gateway", "Tried again"),
    ("Ashlar / Gateway", "Replicas left out"),
];

/// A query of a panel, with where it is from.
#[derive(Debug)]
pub struct Query {
    /// Title of the dashboard.
    pub dashboard: String,
    /// Title of the panel.
    pub panel: String,
    /// What it asks, for one choice of the dashboard's variables.
    pub expression: String,
}

impl Query {
    /// Whether the panel is one of [`OF_FAULTS`].
    #[must_use]
    pub fn is_of_faults(&self) -> bool {
        OF_FAULTS.contains(&(self.dashboard.as_str(), self.panel.as_str()))
    }

    /// Whether it yields a figure now.
    ///
    /// # Errors
    /// When Prometheus refuses it.
    pub async fn has_data(&self, prometheus: &Prometheus) -> Result<bool> {
        let found = prometheus.query(&self.expression).await;
        let found = found
            .with_context(|| format!("{}: {}: {}", self.dashboard, self.panel, self.expression))?;
        Ok(found.iter().any(|sample| sample.value.is_finite()))
    }
}

/// All queries of all dashboards, with the variables set to services by regular expressions.
///
/// # Errors
/// When a dashboard is not what Grafana reads, or some are missing.
pub fn queries(namespace: &str, service: &str) -> Result<Vec<Query>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(Path::new(CHART).join("dashboards"))? {
        let board: Value = serde_json::from_str(&std::fs::read_to_string(entry?.path())?)?;
        let title = board["title"].as_str().context("a dashboard has a title")?;
        for panel in board["panels"]
            .as_array()
            .context("a dashboard has panels")?
        {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expression = target["expr"].as_str().context("a target has a query")?;
                all.push(Query {
                    dashboard: title.to_owned(),
                    panel: panel["title"].as_str().unwrap_or_default().to_owned(),
                    expression: expression
                        .replace("$namespace", namespace)
                        .replace("$service", service)
                        .replace("$__rate_interval", "20s")
                        .replace("[5m]", "[1m]"),
                });
            }
        }
    }
    ensure!(all.len() > 80, "only {} queries", all.len());
    Ok(all)
}
