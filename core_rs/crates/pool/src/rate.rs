//! How fast the queue empties, and what that means for whoever comes too late.

use std::time::Instant;

use crate::inbox::Load;

/// What happened this long ago (seconds, those in which something waited) counts half.
const HALF_LIFE_S: f64 = 10.0;
/// Bounds of an estimate, seconds.
const LEAST_S: f64 = 1.0;
const MOST_S: f64 = 60.0;

/// Sequences and prompt tokens that got a slot, over the time in which others waited for one: while nobody
/// waits, arrivals say nothing of what the engine could do.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    waited_s: f64,
    sequences: f64,
    tokens: f64,
    /// Since when something waits, as far as that is not counted yet.
    since: Option<Instant>,
}

impl Rate {
    /// Notes what got a slot since the last call, and whether something waits now.
    pub(crate) fn note(&mut self, now: Instant, started: Load, waits: bool) {
        if let Some(since) = self.since {
            let passed = now.saturating_duration_since(since).as_secs_f64();
            let kept = (-passed / HALF_LIFE_S).exp2();
            self.waited_s = self.waited_s * kept + passed;
            self.sequences = self.sequences * kept + float(started.sequences);
            self.tokens = self.tokens * kept + float(started.tokens);
        }
        self.since = waits.then_some(now);
    }

    /// Seconds after which that much has left the queue, at the rate of the recent past.
    pub(crate) fn seconds(&self, now: Instant, waiting: Load) -> u32 {
        let open = self.since.map_or(0.0, |since| {
            now.saturating_duration_since(since).as_secs_f64()
        });
        let waited_s = self.waited_s + open;
        let estimate = if self.sequences < f64::EPSILON {
            // Nothing has left yet: it takes no less than it has taken so far.
            waited_s
        } else {
            let each = |waiting: usize, left: f64| float(waiting) * waited_s / left.max(1.0);
            each(waiting.sequences, self.sequences).max(each(waiting.tokens, self.tokens))
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // bounded
        let seconds = estimate.ceil().clamp(LEAST_S, MOST_S) as u32;
        seconds
    }
}

#[allow(clippy::cast_precision_loss)] // far below 2^52
fn float(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn load(sequences: usize, tokens: usize) -> Load {
        Load {
            requests: sequences,
            sequences,
            tokens,
        }
    }

    /// `seconds` of a queue from which each second so much gets a slot.
    fn after(seconds: u64, each: Load) -> (Rate, Instant) {
        let mut rate = Rate::default();
        let start = Instant::now();
        for second in 0..=seconds {
            rate.note(start + Duration::from_secs(second), each, true);
        }
        (rate, start + Duration::from_secs(seconds))
    }

    #[test]
    fn the_estimate_is_the_queue_over_its_rate() {
        let (rate, now) = after(30, load(5, 500));
        assert_eq!(rate.seconds(now, load(99, 1000)), 20);
        assert_eq!(rate.seconds(now, load(5, 14_900)), 30, "long prompts count");
        assert_eq!(rate.seconds(now, load(1, 10)), 1, "at least a second");
        assert_eq!(rate.seconds(now, load(10_000, 10)), 60, "at most a minute");
    }

    #[test]
    fn a_queue_that_stands_is_not_promised_anything_soon() {
        let (rate, now) = after(0, load(0, 0));
        let later = now + Duration::from_secs(7);
        assert_eq!(rate.seconds(later, load(1, 1)), 7);
        let (rate, now) = after(4, load(1, 1));
        let later = now + Duration::from_secs(20);
        assert!(rate.seconds(later, load(4, 4)) > 20);
    }

    #[test]
    fn what_starts_while_nobody_waits_says_nothing() {
        let mut rate = Rate::default();
        let now = Instant::now();
        rate.note(now, load(1000, 1000), false);
        rate.note(now + Duration::from_secs(100), load(1000, 1000), false);
        assert_eq!(rate.seconds(now, load(10, 10)), 1);
    }
}
