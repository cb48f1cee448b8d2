//! How much arrives, how much of that is chance, and where it is going. Pure.
//!
//! The rate is the mean of a minute, or of the time since it last jumped: a crowd that comes or goes at once begins the
//! count anew, so that neither the mean nor the trend mixes two loads. The trend is a straight line through the last
//! minutes, less what chance could make of it. Chance is what the counts of ten seconds really differ by, which is more
//! than Poisson's where clients come in bunches.
//!
//! A jump is looked for in every recent span at once, by the likelihood ratio of two Poisson rates against one (Lorden,
//! "Procedures for reacting to a change in distribution", 1971): the bigger it is, the shorter the span that shows it.

use std::collections::VecDeque;

/// The rate is the mean of so many seconds at most.
const STEADY_SECONDS: f64 = 60.0;
/// Trend and chance are looked for in so many seconds at most.
const MEMORY_SECONDS: f64 = 300.0;
/// A jump up shows in the last so many seconds, at least and at most.
const JUMP_SECONDS: (f64, f64) = (0.7, 5.2);
/// A crowd takes so long to be there, in seconds: as soon as as much more is seen, that is left out of the rate.
const GATHER_SECONDS: f64 = 1.0;
/// Nobody waits because of a crowd that has gone: it may take this long to be sure.
const DROP_SECONDS: f64 = 10.0;
/// A jump is more than this many times the rate before, and by so much (a natural logarithm) likelier than just that many
/// times: less is noise.
const JUMP_RATIO: f64 = 1.25;
const BEYOND_CHANCE: f64 = 8.0;
/// Counts are compared by pieces of so many seconds; fewer pieces tell nothing.
const PIECE_SECONDS: f64 = 10.0;
const MIN_PIECES: usize = 6;
/// A trend is looked for in the last so many pieces, and in all: the short look sees a rise begin, the long one a slow rise.
const TREND_PIECES: usize = 15;
/// Fewer pieces show no trend.
const MIN_TREND_PIECES: usize = 12;
/// A slope of so many standard errors is a trend; of that, one standard error may be chance.
const TREND_ERRORS: f64 = 2.5;
/// Moments are remembered at least so far apart, in seconds: those that a jump is looked for in, and older ones.
const MOMENT_SECONDS: f64 = 0.2;
const OLD_MOMENT_SECONDS: f64 = 0.9;
/// Most remembered moments.
const MAX_MOMENTS: usize = 400;

/// Requests that came: by the gateways' count, and by the replicas'.
type Counts = [f64; 2];

/// What is known of the arrivals of one service.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Requests per second, now.
    pub now: f64,
    /// Seconds that it was seen over.
    pub seen: f64,
    /// When it last jumped; nothing of before is in it.
    pub since: f64,
    /// By how much it grows each second; below zero when it falls.
    pub trend: f64,
    /// Standard deviation of the rate over ten seconds, if every request comes by itself.
    pub poisson: f64,
    /// The same as it was seen: more, where clients come in bunches.
    pub chance: f64,
}

impl Rate {
    /// The rate so many seconds ahead, if the trend goes on.
    #[must_use]
    pub fn ahead(&self, seconds: f64) -> f64 {
        // The mean of the time that was seen stands for its middle.
        (self.now + self.trend * (seconds + self.seen / 2.0)).max(0.0)
    }

    /// The rate less so many standard errors of its mean: what chance alone may have brought is left out.
    #[must_use]
    pub fn certain(&self, errors: f64) -> f64 {
        let error = self.chance * (PIECE_SECONDS / self.seen).sqrt();
        (self.now - errors * error).max(0.0)
    }
}

/// Arrivals over time.
#[derive(Debug, Clone, Default)]
pub struct Arrivals {
    count: Counts,
    moments: VecDeque<(f64, Counts)>,
    gateway: Option<f64>,
    /// When the rate last jumped.
    since: f64,
}

impl Arrivals {
    /// Takes in what the gateways have ever been given, and what came to the replicas since the last look.
    pub fn look(&mut self, now: f64, gateways: Option<f64>, at_replicas: f64) {
        if let (Some(before), Some(total)) =
            (std::mem::replace(&mut self.gateway, gateways), gateways)
        {
            // Less than before: a gateway has ended and took its count along.
            self.count[0] += (total - before).max(0.0);
        }
        self.count[1] += at_replicas;
        let spaced = self.moments.len() < 2
            || self
                .moments
                .get(self.moments.len() - 2)
                .is_some_and(|(at, _)| now - at >= MOMENT_SECONDS);
        if spaced {
            self.moments.push_back((now, self.count));
        } else if let Some(last) = self.moments.back_mut() {
            *last = (now, self.count);
        }
        self.thin_out(now);
        while self.moments.len() > MAX_MOMENTS
            || self
                .moments
                .get(1)
                .is_some_and(|(at, _)| now - at >= MEMORY_SECONDS)
        {
            self.moments.pop_front();
        }
        self.watch_for_jumps(now);
    }

    /// Drops the moment that has just become old, if the one before is near, and the one before where nothing came on either
    /// side of it: hours without a request are two moments.
    fn thin_out(&mut self, now: f64) {
        let old = self
            .moments
            .partition_point(|(at, _)| now - at > JUMP_SECONDS.1);
        let Some(before) = old.checked_sub(2) else {
            return;
        };
        if self.moments[old - 1].0 - self.moments[before].0 < OLD_MOMENT_SECONDS {
            self.moments.remove(old - 1);
            return;
        }
        let Some(first) = before.checked_sub(1) else {
            return;
        };
        let counts = |index: usize| self.moments[index].1;
        if counts(first) == counts(before) && counts(before) == counts(old - 1) {
            self.moments.remove(before);
        }
    }

    /// What had come by a time in between two moments, where none are missing but those at which nothing came.
    fn quiet_at(&self, after: usize, time: f64) -> Option<(f64, Counts)> {
        let (later, before) = (
            self.moments.get(after)?,
            self.moments.get(after.checked_sub(1)?)?,
        );
        let quiet = later.1 == before.1 && later.0 - before.0 >= 2.0 * OLD_MOMENT_SECONDS;
        quiet.then_some((time, later.1))
    }

    /// Requests per second between two times, and the seconds that were really seen.
    fn between(&self, source: usize, from: f64, to: f64) -> Option<(f64, f64)> {
        let end = self.moments.partition_point(|(at, _)| *at <= to);
        let begin = self.moments.partition_point(|(at, _)| *at < from);
        let first = self.quiet_at(begin, from);
        let first = first.or_else(|| self.moments.get(begin).copied())?;
        let last = self.quiet_at(end, to);
        let last = last.or_else(|| self.moments.get(end.checked_sub(1)?).copied())?;
        let span = last.0 - first.0;
        (span > 0.0).then(|| ((last.1[source] - first.1[source]) / span, span))
    }

    /// Clients that reach replicas directly are in their count alone; it jitters, because replicas are not all read at
    /// the same moment, so the gateways' is taken where both tell the same.
    fn source(&self, now: f64) -> usize {
        let of = |source| self.between(source, now - STEADY_SECONDS, now);
        let more = |(gateway, _): (f64, f64), (direct, _): (f64, f64)| direct > gateway * 1.1;
        usize::from(
            of(0)
                .zip(of(1))
                .is_some_and(|(gateway, direct)| more(gateway, direct)),
        )
    }

    fn watch_for_jumps(&mut self, now: f64) {
        let source = self.source(now);
        let jumped = |begin: f64, up: bool| {
            let (rate, span) = self.between(source, begin, now)?;
            let from = (begin - STEADY_SECONDS).max(self.since);
            let (steady, seen) = self.between(source, from, begin)?;
            if seen < span {
                return None;
            }
            let (bound, jumped) = if up {
                (JUMP_RATIO * steady, rate > JUMP_RATIO * steady)
            } else {
                (steady / JUMP_RATIO, rate < steady / JUMP_RATIO)
            };
            let surprise = likelier((rate, span), (bound, seen));
            (jumped && surprise > BEYOND_CHANCE).then_some((surprise, begin))
        };
        let (least, most) = JUMP_SECONDS;
        let begins = self.moments.iter().rev().map(|(at, _)| *at);
        let up = begins
            .skip_while(|at| now - at < least)
            .take_while(|at| now - at <= most)
            .filter_map(|at| jumped(at, true))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, since)) = up.or_else(|| jumped(now - DROP_SECONDS, false)) {
            self.since = since;
        }
    }

    /// From when on the rate is that of after the last jump.
    fn settled(&self, now: f64) -> f64 {
        let gathered = self.since + GATHER_SECONDS;
        if self.since > 0.0 && now - gathered > GATHER_SECONDS - MOMENT_SECONDS {
            gathered
        } else {
            self.since
        }
    }

    /// Rates of pieces of ten seconds since the last jump, the newest last.
    fn pieces(&self, source: usize, now: f64) -> Vec<f64> {
        let begin = (now - MEMORY_SECONDS).max(self.settled(now));
        let count = ((now - begin) / PIECE_SECONDS).floor() as usize;
        let piece = |back: usize| {
            let to = now - back as f64 * PIECE_SECONDS;
            Some(self.between(source, to - PIECE_SECONDS, to)?.0)
        };
        (0..count).rev().filter_map(piece).collect()
    }

    /// The rate; none before it was seen for a moment.
    #[must_use]
    pub fn rate(&self) -> Option<Rate> {
        let now = self.moments.back()?.0;
        let source = self.source(now);
        let from = (now - STEADY_SECONDS).max(self.settled(now));
        let (mean, seen) = self.between(source, from, now)?;
        if seen < JUMP_SECONDS.0 {
            return None;
        }
        let pieces = self.pieces(source, now);
        let poisson = (mean / PIECE_SECONDS).sqrt();
        let mut rate = Rate {
            now: mean,
            seen,
            since: self.since,
            trend: 0.0,
            poisson,
            chance: poisson,
        };
        if pieces.len() >= MIN_PIECES {
            // Pieces near each other differ by chance alone, whatever the trend; neighbours may share a bunch.
            let squares = pieces
                .windows(3)
                .map(|near| (near[2] - near[0]).powi(2) / 2.0);
            let variance = squares.sum::<f64>() / (pieces.len() - 2) as f64;
            rate.chance = variance.sqrt().max(poisson);
        }
        if pieces.len() >= MIN_TREND_PIECES {
            let recent = &pieces[pieces.len().saturating_sub(TREND_PIECES)..];
            let slopes = [slope(&pieces, rate.chance), slope(recent, rate.chance)];
            let steeper = slopes[1].abs() > slopes[0].abs();
            rate.trend = slopes[usize::from(steeper)];
        }
        Some(rate)
    }
}

/// By how much two rates are likelier than one, as the logarithm of the ratio of their likelihoods: each is the mean of
/// some seconds of a Poisson process.
fn likelier(one: (f64, f64), other: (f64, f64)) -> f64 {
    let pooled = (one.0 * one.1 + other.0 * other.1) / (one.1 + other.1);
    let part = |(rate, seconds): (f64, f64)| {
        if rate > 0.0 {
            rate * seconds * (rate / pooled).ln()
        } else {
            0.0
        }
    };
    part(one) + part(other)
}

/// Slope of the straight line through pieces, per second, as far as it is more than chance.
fn slope(pieces: &[f64], chance: f64) -> f64 {
    let count = pieces.len() as f64;
    let middle = (count - 1.0) / 2.0;
    let mean = pieces.iter().sum::<f64>() / count;
    let (mut covariance, mut variance) = (0.0, 0.0);
    for (index, rate) in pieces.iter().enumerate() {
        let off = (index as f64 - middle) * PIECE_SECONDS;
        covariance += off * (rate - mean);
        variance += off * off;
    }
    let (slope, error) = (covariance / variance, chance / variance.sqrt());
    if slope.abs() < TREND_ERRORS * error {
        return 0.0;
    }
    slope.signum() * (slope.abs() - error)
}

#[cfg(test)]
#[path = "tests/arrivals.rs"]
mod tests;
