//! Stop strings, found across token boundaries.

use std::sync::Arc;

/// What a push gives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Out {
    /// Text that can no longer be part of a stop string.
    pub emit: String,
    /// A stop string is complete: the answer ends here, and nothing comes after.
    pub stopped: bool,
}

/// Finds stop strings in a stream of text and never lets one through.
///
/// The string that is complete first wins; of several that are complete at the same character, the
/// longest. So the result does not depend on how the text is cut into pieces. One
/// Knuth-Morris-Pratt automaton per string: O(strings) per byte.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    strings: Arc<[Automaton]>,
    states: Vec<usize>,
    held: String,
    stopped: bool,
}

#[derive(Debug)]
struct Automaton {
    pattern: Box<[u8]>,
    /// `failure[i]`: length of the longest proper border of the first `i + 1` bytes.
    failure: Box<[usize]>,
}

impl StopMatcher {
    /// A matcher of these strings; empty ones are ignored.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let strings: Arc<[Automaton]> = stops
            .iter()
            .map(AsRef::as_ref)
            .filter(|stop| !stop.is_empty())
            .map(|stop| Automaton::new(stop.as_bytes()))
            .collect();
        Self {
            states: vec![0; strings.len()],
            strings,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Out {
        if self.stopped {
            return Out {
                emit: String::new(),
                stopped: true,
            };
        }
        if self.strings.is_empty() {
            return Out {
                emit: text.to_string(),
                stopped: false,
            };
        }
        for (at, byte) in text.bytes().enumerate() {
            if let Some(length) = self.advance(byte) {
                return self.stop_at(text, at + 1, length);
            }
        }
        let pending = self.states.iter().copied().max().unwrap_or(0);
        self.held.push_str(text);
        let rest = self.held.split_off(self.held.len() - pending);
        Out {
            emit: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The answer ended without a stop string: gives what was held back.
    pub fn finish(&mut self) -> String {
        self.states.fill(0);
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Feeds one byte; the length of the longest string that it completes.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut complete = None;
        for (automaton, state) in self.strings.iter().zip(&mut self.states) {
            *state = automaton.next(*state, byte);
            if *state == automaton.pattern.len() {
                complete = complete.max(Some(*state));
            }
        }
        complete
    }

    fn stop_at(&mut self, text: &str, end: usize, length: usize) -> Out {
        self.stopped = true;
        let mut emit = std::mem::take(&mut self.held);
        emit.push_str(&text[..end]);
        emit.truncate(emit.len() - length);
        Out {
            emit,
            stopped: true,
        }
    }
}

impl Automaton {
    fn new(pattern: &[u8]) -> Self {
        let mut failure = vec![0; pattern.len()];
        let mut border = 0;
        for at in 1..pattern.len() {
            while border > 0 && pattern[at] != pattern[border] {
                border = failure[border - 1];
            }
            border += usize::from(pattern[at] == pattern[border]);
            failure[at] = border;
        }
        Self {
            pattern: pattern.into(),
            failure: failure.into(),
        }
    }

    fn next(&self, mut state: usize, byte: u8) -> usize {
        while state > 0 && self.pattern[state] != byte {
            state = self.failure[state - 1];
        }
        state + usize::from(self.pattern[state] == byte)
    }
}
