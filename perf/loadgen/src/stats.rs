//! Samples and their percentiles.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// Durations, kept whole: a run is short.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<u32>);

impl Samples {
    /// Adds one duration (kept in microseconds).
    pub(crate) fn push(&mut self, sample: Duration) {
        self.0
            .push(u32::try_from(sample.as_micros()).unwrap_or(u32::MAX));
    }

    /// Moves the samples of `other` here.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.0.append(&mut other.0);
    }

    /// Number of samples.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// `{count, p50, p90, p99, max}` in milliseconds (nearest rank).
    pub(crate) fn summary(mut self) -> Value {
        self.0.sort_unstable();
        json!({
            "count": self.0.len(),
            "p50": self.rank(50),
            "p90": self.rank(90),
            "p99": self.rank(99),
            "max": self.rank(100),
        })
    }

    fn rank(&self, percent: usize) -> Option<f64> {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0
            .get(rank - 1)
            .map(|&micros| f64::from(micros) / 1000.0)
    }
}

/// How often each kind of failure happened.
#[derive(Debug, Default)]
pub(crate) struct Errors(BTreeMap<String, u64>);

impl Errors {
    /// Counts one failure.
    pub(crate) fn add(&mut self, kind: impl Into<String>) {
        *self.0.entry(kind.into()).or_default() += 1;
    }

    /// Moves the counts of `other` here.
    pub(crate) fn append(&mut self, other: Self) {
        for (kind, count) in other.0 {
            *self.0.entry(kind).or_default() += count;
        }
    }

    /// The counts as a JSON object.
    pub(crate) fn summary(&self) -> Value {
        json!(self.0)
    }
}

/// `count` per second over `window`, rounded to a tenth.
pub(crate) fn rate(count: f64, window: Duration) -> f64 {
    let seconds = window.as_secs_f64();
    if seconds <= 0.0 {
        0.0
    } else {
        (count / seconds * 10.0).round() / 10.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::float_cmp
    )]
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut samples = Samples::default();
        for millis in (1..=200).rev() {
            samples.push(Duration::from_millis(millis));
        }
        let summary = samples.summary();
        assert_eq!(
            summary,
            json!({"count": 200, "p50": 100.0, "p90": 180.0, "p99": 198.0, "max": 200.0})
        );
        let nothing = Samples::default().summary();
        assert_eq!(nothing["p50"], Value::Null);
        let mut one = Samples::default();
        one.push(Duration::from_micros(1500));
        assert_eq!(one.summary()["p99"], 1.5);
    }

    #[test]
    fn errors_add_up() {
        let mut errors = Errors::default();
        errors.add("status 503");
        let mut more = Errors::default();
        more.add("status 503");
        more.add("closed");
        errors.append(more);
        assert_eq!(errors.summary(), json!({"status 503": 2, "closed": 1}));
    }

    #[test]
    fn rates() {
        assert_eq!(rate(15.0, Duration::from_secs(2)), 7.5);
        assert_eq!(rate(15.0, Duration::ZERO), 0.0);
    }
}
