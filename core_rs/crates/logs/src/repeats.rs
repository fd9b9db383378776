//! Lines that repeat: the first of a kind are written, the others counted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::line::Line;

/// Lines of a kind that are written before the others of its window are only counted.
const FIRST: u64 = 5;
/// Kinds that are told apart at a time; what is beyond is one kind for each event. Some 300 bytes each.
const MOST: usize = 2048;

/// Level of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// For whoever looks for a mistake.
    Debug,
    /// What happened.
    Info,
    /// What somebody should look at.
    Warning,
    /// What went wrong.
    Error,
}

impl Level {
    /// As structlog calls it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What makes two lines the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    /// Of the line.
    pub level: Level,
    /// Of the line.
    pub component: String,
    /// Of the line.
    pub event: String,
    /// What tells kinds of one event apart, as `name=value`.
    pub what: String,
}

/// Kinds and how often they were seen since their window began.
pub(crate) struct Repeats {
    window: Duration,
    seen: Mutex<HashMap<Kind, Seen>>,
}

#[derive(Clone, Copy)]
struct Seen {
    since: Instant,
    count: u64,
}

/// Lines of one kind that were not written.
pub(crate) struct Sum {
    kind: Kind,
    lines: u64,
}

impl Sum {
    pub(crate) fn line(&self, window: Duration) -> Line {
        let mut line = Line::new(self.kind.level, &self.kind.component, "more of the same");
        line.put("of", self.kind.event.clone());
        line.put("what", self.kind.what.clone());
        line.put("lines", self.lines);
        line.put("window_s", window.as_secs_f64());
        line
    }
}

impl Repeats {
    pub(crate) fn new(window: Duration) -> Self {
        Self {
            window,
            seen: Mutex::new(HashMap::new()),
        }
    }

    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// Counts a line; whether it is to be written, and sums that are due before it.
    pub(crate) fn look(&self, mut kind: Kind, now: Instant) -> (bool, Vec<Sum>) {
        let mut seen = self.seen.lock();
        let mut sums = Vec::new();
        if seen.len() >= MOST && !seen.contains_key(&kind) {
            sums = due(&mut seen, self.window, now);
            if seen.len() >= MOST {
                "many others".clone_into(&mut kind.what);
            }
        }
        let entry = seen.entry(kind.clone()).or_insert(Seen {
            since: now,
            count: 0,
        });
        if now.duration_since(entry.since) >= self.window {
            if entry.count > FIRST {
                let lines = entry.count - FIRST;
                sums.push(Sum { kind, lines });
            }
            *entry = Seen {
                since: now,
                count: 0,
            };
        }
        entry.count += 1;
        (entry.count <= FIRST, sums)
    }

    /// Sums of the windows that are over, and when the next one with a sum will be.
    pub(crate) fn due(&self, now: Instant) -> (Vec<Sum>, Option<Instant>) {
        let mut seen = self.seen.lock();
        let sums = due(&mut seen, self.window, now);
        let counted = seen.values().filter(|entry| entry.count > FIRST);
        let next = counted.map(|entry| entry.since + self.window).min();
        (sums, next)
    }

    /// All sums, whether their windows are over or not.
    pub(crate) fn end(&self) -> Vec<Sum> {
        due(&mut self.seen.lock(), Duration::ZERO, Instant::now())
    }
}

fn due(seen: &mut HashMap<Kind, Seen>, window: Duration, now: Instant) -> Vec<Sum> {
    let over = seen.extract_if(|_, entry| now.duration_since(entry.since) >= window);
    over.filter(|(_, entry)| entry.count > FIRST)
        .map(|(kind, entry)| Sum {
            kind,
            lines: entry.count - FIRST,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::{FIRST, Kind, Level, MOST, Repeats};

    const WINDOW: Duration = Duration::from_secs(60);

    fn kind(what: u32) -> Kind {
        Kind {
            level: Level::Info,
            component: "gateway".to_owned(),
            event: "request".to_owned(),
            what: format!("address={what}"),
        }
    }

    proptest! {
        /// Written and summed up together are what came, however it came.
        #[test]
        fn no_line_is_forgotten(steps in prop::collection::vec((0u32..4, 0u64..40), 1..300)) {
            let repeats = Repeats::new(WINDOW);
            let mut now = Instant::now();
            let (mut written, mut summed) = (0u64, 0u64);
            for (what, seconds) in &steps {
                now += Duration::from_secs(*seconds);
                let (sums, _) = repeats.due(now);
                summed += sums.iter().map(|sum| sum.lines).sum::<u64>();
                let (write, sums) = repeats.look(kind(*what), now);
                summed += sums.iter().map(|sum| sum.lines).sum::<u64>();
                written += u64::from(write);
            }
            summed += repeats.end().iter().map(|sum| sum.lines).sum::<u64>();
            prop_assert_eq!(written + summed, steps.len() as u64);
        }
    }

    #[test]
    fn a_flood_of_one_kind_is_a_few_lines_and_a_sum() {
        let repeats = Repeats::new(WINDOW);
        let now = Instant::now();
        let written = (0..1000).filter(|_| repeats.look(kind(1), now).0).count();
        assert_eq!(written as u64, FIRST);
        assert_eq!(repeats.due(now).1, Some(now + WINDOW));
        let (sums, next) = repeats.due(now + WINDOW);
        assert_eq!(sums[0].lines, 1000 - FIRST);
        assert_eq!(next, None);
    }

    #[test]
    fn memory_is_bounded_whoever_sends() {
        let repeats = Repeats::new(WINDOW);
        let now = Instant::now();
        let sent: u32 = 10_000;
        let written = (0..sent)
            .filter(|each| repeats.look(kind(*each), now).0)
            .count();
        assert!(repeats.seen.lock().len() <= MOST + 1);
        let summed: u64 = repeats.end().iter().map(|sum| sum.lines).sum();
        assert_eq!(written as u64 + summed, u64::from(sent));
    }
}
