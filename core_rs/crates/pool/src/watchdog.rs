//! Notices from outside that the engine thread stands still.
//!
//! The engine thread says when it begins and ends a round; a thread of its own looks at that. What is too long is
//! learnt from the rounds before, apart for each size, since a piece of a prompt may take a hundred times as long
//! as a token.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A round may take this much longer than the longest one of its size so far.
const FACTOR: u32 = 10;
/// No round that was shorter is taken for a hang: pauses of a busy machine are not the engine's fault.
const LEAST: Duration = Duration::from_secs(6);
/// How often the watchdog looks.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// Sizes of rounds that are told apart: their tokens, by powers of two.
const SIZES: usize = 24;

/// An engine thread that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// How long the round has taken so far.
    pub stood: Duration,
    /// How long it might have taken.
    pub limit: Duration,
    /// Its tokens.
    pub tokens: usize,
}

/// What the engine thread does now.
#[derive(Debug, Default)]
pub(crate) struct Pulse(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Counts the rounds.
    number: u64,
    began: Option<Instant>,
    tokens: usize,
    /// The longest round of each size; `None` where there was none yet.
    longest: [Option<Duration>; SIZES],
}

impl Pulse {
    /// A round has begun.
    pub(crate) fn begin(&self, now: Instant) {
        let mut state = self.0.lock();
        state.number += 1;
        state.began = Some(now);
        state.tokens = 0;
    }

    /// The round will compute so many tokens.
    pub(crate) fn plan(&self, tokens: usize) {
        self.0.lock().tokens = tokens;
    }

    /// The round is over.
    pub(crate) fn end(&self) {
        let mut state = self.0.lock();
        if let Some(began) = state.began.take() {
            let took = began.elapsed();
            let size = size(state.tokens);
            let longest = state.longest[size].get_or_insert(took);
            *longest = took.max(*longest);
        }
    }

    /// Whether a round runs.
    pub(crate) fn beats(&self) -> bool {
        self.0.lock().began.is_some()
    }

    fn state(&self, ceiling: Duration) -> Option<(u64, Duration, usize)> {
        let state = self.0.lock();
        state.began?;
        // What computes more takes no less. What is larger than all that was seen may load, compile or allocate
        // what the others did not need.
        let known = state.longest[size(state.tokens)..]
            .iter()
            .find_map(|longest| *longest);
        let limit = known.map_or(ceiling, |longest| longest.saturating_mul(FACTOR).max(LEAST));
        Some((state.number, limit.min(ceiling), state.tokens))
    }
}

fn size(tokens: usize) -> usize {
    let bits = usize::BITS - tokens.leading_zeros();
    (bits as usize).min(SIZES - 1)
}

/// Looks at a pulse again and again.
#[derive(Debug)]
pub(crate) struct Watchdog {
    ceiling: Duration,
    round: u64,
    stood: Duration,
    looked: Instant,
}

impl Watchdog {
    /// `ceiling`: what no round may take, known or not.
    pub(crate) fn new(ceiling: Duration, now: Instant) -> Self {
        Self {
            ceiling,
            round: 0,
            stood: Duration::ZERO,
            looked: now,
        }
    }

    /// To be called every [`TICK`].
    ///
    /// Time counts only as far as this thread has seen it pass: when the whole process, or the machine, was
    /// stopped for a while, the engine is not to blame.
    pub(crate) fn look(&mut self, pulse: &Pulse, now: Instant) -> Option<Stuck> {
        let passed = now.saturating_duration_since(self.looked).min(TICK * 5);
        self.looked = now;
        let (round, limit, tokens) = pulse.state(self.ceiling)?;
        self.stood = if round == self.round {
            self.stood + passed
        } else {
            Duration::ZERO
        };
        self.round = round;
        (self.stood >= limit).then_some(Stuck {
            stood: self.stood,
            limit,
            tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CEILING: Duration = Duration::from_secs(300);

    /// When the watchdog calls a round of that many tokens a hang, in whole seconds.
    fn hangs_after(pulse: &Pulse, tokens: usize) -> u64 {
        let mut now = Instant::now();
        let mut dog = Watchdog::new(CEILING, now);
        pulse.begin(now);
        pulse.plan(tokens);
        loop {
            now += TICK;
            if let Some(stuck) = dog.look(pulse, now) {
                assert_eq!(stuck.tokens, tokens);
                return stuck.stood.as_secs();
            }
        }
    }

    fn seen(tokens: usize, took: Duration) -> Pulse {
        let pulse = Pulse::default();
        pulse.begin(
            Instant::now()
                .checked_sub(took)
                .unwrap_or_else(Instant::now),
        );
        pulse.plan(tokens);
        pulse.end();
        pulse
    }

    #[test]
    fn a_size_that_was_seen_is_found_within_seconds() {
        let pulse = seen(4, Duration::from_millis(25));
        assert_eq!(hangs_after(&pulse, 5), 6);
    }

    #[test]
    fn what_is_larger_than_all_that_was_seen_has_time() {
        let pulse = seen(4, Duration::from_millis(25));
        assert_eq!(hangs_after(&pulse, 512), 300);
        assert_eq!(hangs_after(&pulse, 1), 6);
    }

    #[test]
    fn slow_machines_are_learnt() {
        let pulse = seen(512, Duration::from_secs(8));
        assert_eq!(hangs_after(&pulse, 512), 80);
    }

    #[test]
    fn a_process_that_was_stopped_is_not_stuck() {
        let pulse = seen(1, Duration::from_millis(1));
        let mut now = Instant::now();
        let mut dog = Watchdog::new(CEILING, now);
        pulse.begin(now);
        pulse.plan(1);
        assert_eq!(dog.look(&pulse, now + TICK), None);
        now += Duration::from_secs(3600);
        assert_eq!(dog.look(&pulse, now), None);
        assert_eq!(dog.look(&pulse, now + TICK), None);
    }

    #[test]
    fn nothing_is_stuck_between_rounds() {
        let pulse = seen(1, Duration::from_millis(1));
        let now = Instant::now();
        let mut dog = Watchdog::new(CEILING, now);
        for second in 1..100 {
            assert_eq!(dog.look(&pulse, now + Duration::from_secs(second)), None);
        }
    }
}
