//! A run as a row of a table, and as a picture. Pure.

use std::fmt::Write as _;

use super::Played;
use super::fleet::Run;

/// Size of a picture, and of its margins, in pixels.
const WIDTH: f64 = 960.0;
const PANEL: f64 = 180.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 44.0;
const GAP: f64 = 34.0;
/// Points that a line is drawn with at most.
const POINTS: usize = 900;

/// The table's first lines.
#[must_use]
pub fn heading(rivals: bool) -> String {
    let mut text = String::from(
        "| trace | requests | within the SLO | replica-hours | wanted: mean, most | reversals | oracle |",
    );
    let mut rule = String::from("|---|---|---|---|---|---|---|");
    if rivals {
        text += " HPA | KPA | KEDA |";
        rule += "---|---|---|";
    }
    format!("{text}\n{rule}\n")
}

/// One trace's row; a rival's figure is its best at our replica-hours.
#[must_use]
pub fn row(played: &Played) -> String {
    let run = &played.ours;
    let mut text = format!(
        "| {} | {} | {:.2} % | {:.2} | {:.2}, {} | {} | {} |",
        played.trace.name,
        played.total.requests,
        played.total.attainment() * 100.0,
        played.total.replica_hours,
        run.mean_wanted(),
        run.wanted_warm().iter().max().unwrap_or(&0),
        run.reversals(),
        played.oracle,
    );
    for rival in &played.rivals {
        let _ = write!(text, " {:.2} % |", rival.attainment * 100.0);
    }
    text + "\n"
}

/// The picture: load above, replicas below, one line for each scaler.
#[must_use]
pub fn svg(played: &Played) -> String {
    let height = TOP + 3.0 * PANEL + 2.0 * GAP + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">{}: {:.2} % of {} requests within {} s, {:.2} replica-hours</text>\n",
        escape(&played.trace.name),
        played.ours.attainment() * 100.0,
        played.ours.requests,
        played.trace.slo_seconds,
        played.ours.replica_hours,
    );
    let ints = |values: &[i32]| values.iter().copied().map(f64::from).collect::<Vec<f64>>();
    let run = &played.ours;
    let rate: Vec<f64> = (0..run.arrived.len())
        .map(|second| played.trace.rate_at(second as f64))
        .collect();
    panel(
        &mut svg,
        0,
        "requests per second",
        &[
            ("came", "#c8d3e0", smooth(&run.arrived, 5)),
            ("meant", "#33567a", rate),
        ],
    );
    let mut lines = vec![
        ("ready", "#9fd3a8", ints(&run.ready)),
        ("wanted", "#157a3c", ints(&run.wanted)),
    ];
    let colours = ["#c2541b", "#7a3ea8", "#b09000"];
    for (rival, colour) in played.rivals.iter().zip(colours) {
        lines.push((rival.rival, colour, ints(&rival.run.wanted)));
    }
    panel(&mut svg, 1, "replicas", &lines);
    let waiting = |run: &Run| smooth(&run.waiting, 3);
    let mut lines = vec![("ours", "#157a3c", waiting(run))];
    for (rival, colour) in played.rivals.iter().zip(colours) {
        lines.push((rival.rival, colour, waiting(&rival.run)));
    }
    panel(&mut svg, 2, "requests waiting", &lines);
    let _ = write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{}\">seconds 0 to {:.0}; a rival is drawn at its setting nearest to our replica-hours</text>\n</svg>\n",
        height - 12.0,
        played.trace.seconds,
    );
    svg
}

/// A mean over some seconds to both sides.
fn smooth(values: &[f64], side: usize) -> Vec<f64> {
    (0..values.len())
        .map(|i| {
            let near = &values[i.saturating_sub(side)..(i + side + 1).min(values.len())];
            near.iter().sum::<f64>() / near.len() as f64
        })
        .collect()
}

fn panel(svg: &mut String, index: usize, title: &str, lines: &[(&str, &str, Vec<f64>)]) {
    let top = TOP + index as f64 * (PANEL + GAP);
    let bottom = top + PANEL;
    let right = WIDTH - RIGHT;
    let most = lines.iter().flat_map(|(_, _, values)| values).copied();
    let most = most.fold(1.0, f64::max);
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{}\" fill=\"#444\">{title}</text>\n\
         <path d=\"M{LEFT} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>",
        top - 6.0,
    );
    for share in [0.0, 0.5, 1.0] {
        let y = bottom - share * PANEL;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#444\">{:.0}</text>",
            LEFT - 6.0,
            y + 4.0,
            most * share,
        );
    }
    for (at, (name, colour, values)) in lines.iter().enumerate() {
        let stride = values.len().div_ceil(POINTS).max(1);
        let last = values.len().max(2) as f64 - 1.0;
        let mut points = String::new();
        for (second, value) in values.iter().enumerate().step_by(stride) {
            let x = LEFT + second as f64 / last * (right - LEFT);
            let y = bottom - value / most * PANEL;
            let _ = write!(points, "{x:.1},{y:.1} ");
        }
        let y = top + 14.0 + at as f64 * 18.0;
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.4\"/>\n\
             <text x=\"{}\" y=\"{y}\" fill=\"{colour}\">{}</text>",
            points.trim_end(),
            right + 12.0,
            escape(name),
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
