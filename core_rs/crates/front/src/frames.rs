//! Frames of HTTP/2 that cost us work and bring nothing: counted, so that nobody sends them without end.
//!
//! `h2` bounds streams, resets, SETTINGS and PINGs that wait for an answer. It does not bound PRIORITY frames, empty DATA
//! or unknown frames: millions of them in a second keep a core busy.

use std::time::Instant;

/// Frames that may come at once.
const BURST: f64 = 2000.0;
/// Frames a second beyond that.
const RATE: f64 = 200.0;
/// Frames that each stream allows in addition.
const PER_STREAM: f64 = 20.0;
const PREFACE: usize = 24;
const HEADER: usize = 9;
const ACK: u8 = 1;

/// There were too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many frames of HTTP/2 that carry nothing")]
pub(crate) struct Flood;

/// Follows the bytes of one connection, from its preface on.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Bytes to be skipped: of the preface, of a payload.
    skip: u64,
    header: [u8; HEADER],
    come: usize,
    allowed: f64,
    at: Instant,
}

impl Frames {
    /// Before the first byte.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            skip: PREFACE as u64,
            header: [0; HEADER],
            come: 0,
            allowed: BURST,
            at: now,
        }
    }

    /// Looks at the next bytes, which came at `now`.
    pub(crate) fn feed(&mut self, mut input: &[u8], now: Instant) -> Result<(), Flood> {
        while !input.is_empty() {
            if self.skip > 0 {
                let take =
                    usize::try_from(self.skip).map_or(input.len(), |skip| skip.min(input.len()));
                self.skip -= take as u64;
                input = &input[take..];
                continue;
            }
            let take = (HEADER - self.come).min(input.len());
            self.header[self.come..self.come + take].copy_from_slice(&input[..take]);
            self.come += take;
            input = &input[take..];
            if self.come == HEADER {
                self.come = 0;
                self.frame(now)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, now: Instant) -> Result<(), Flood> {
        let [a, b, c, kind, flags, ..] = self.header;
        let length = u32::from_be_bytes([0, a, b, c]);
        self.skip = u64::from(length);
        match kind {
            // DATA and CONTINUATION carry something, unless they are empty.
            0 | 9 if length > 0 => return Ok(()),
            // The end of a body may be an empty DATA frame.
            0 if flags & 1 != 0 => return Ok(()),
            1 => {
                self.allowed = (self.allowed + PER_STREAM).min(BURST);
                return Ok(());
            }
            // Answers to SETTINGS and PING, windows: one for something that we have sent.
            4 | 6 if flags & ACK != 0 => return Ok(()),
            8 => return Ok(()),
            _ => {}
        }
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.allowed = (self.allowed + passed * RATE).min(BURST) - 1.0;
        if self.allowed < 0.0 {
            Err(Flood)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        bytes.extend(payload);
        bytes
    }

    fn opened() -> Frames {
        let mut frames = Frames::new(Instant::now());
        frames
            .feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Instant::now())
            .unwrap();
        frames
    }

    #[test]
    fn what_carries_nothing_is_bounded() {
        for (kind, flags, payload) in [
            (2, 0, &[0; 5][..]),
            (6, 0, &[0; 8]),
            (0, 0, &[]),
            (99, 0, &[1, 2, 3]),
            (4, 0, &[]),
            (9, 0, &[]),
        ] {
            let (mut frames, now) = (opened(), Instant::now());
            let flood = frame(kind, flags, payload);
            let sent = (0..5000)
                .take_while(|_| frames.feed(&flood, now).is_ok())
                .count();
            assert_eq!(sent, 2000, "kind {kind}");
        }
    }

    #[test]
    fn what_carries_something_is_not() {
        let (mut frames, now) = (opened(), Instant::now());
        for (kind, flags, payload) in [
            (1, 5, &[0; 40][..]),
            (0, 0, &[0; 100]),
            (0, 1, &[]),
            (8, 0, &[0; 4]),
            (6, 1, &[0; 8]),
            (4, 1, &[]),
        ] {
            for _ in 0..10_000 {
                frames.feed(&frame(kind, flags, payload), now).unwrap();
            }
        }
    }

    #[test]
    fn a_few_each_second_are_fine() {
        let (mut frames, begin) = (opened(), Instant::now());
        for second in 0..1000 {
            for _ in 0..100 {
                frames
                    .feed(&frame(6, 0, &[0; 8]), begin + Duration::from_secs(second))
                    .unwrap();
            }
        }
    }

    proptest! {
        #[test]
        fn the_same_however_it_is_cut(kinds in prop::collection::vec((0_u8..12, 0_u8..2, 0_usize..30), 0..50), cut in 1_usize..20) {
            let bytes: Vec<u8> = kinds.iter().flat_map(|(kind, flags, length)| frame(*kind, *flags, &vec![7; *length])).collect();
            let now = Instant::now();
            let (mut whole, mut cut_up) = (opened(), opened());
            whole.feed(&bytes, now).unwrap();
            for piece in bytes.chunks(cut) {
                cut_up.feed(piece, now).unwrap();
            }
            prop_assert_eq!((whole.skip, whole.come), (0, 0));
            prop_assert_eq!((cut_up.skip, cut_up.come), (0, 0));
            prop_assert!((whole.allowed - cut_up.allowed).abs() < 1.0);
        }
    }
}
