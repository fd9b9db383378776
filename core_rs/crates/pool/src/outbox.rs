//! The way back of one request: a single pending frame that grows while nobody reads it.
//!
//! The engine thread pushes once per step; the gRPC stream takes everything at once. Merging on push means
//! that a reader who is behind costs fewer and larger messages, not more memory: after `limit` unread steps
//! the request counts as full and its sequences are parked until the reader has taken the frame.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use helix_wire::error::CoreError;
use helix_wire::v1::{Accepted, Delta, Finished, GenerateFrame, Usage};
use parking_lot::Mutex;

/// Steps after which a request that does not stream is sent what there is.
const LAZY_STEPS: u32 = 64;
/// Log-probabilities in one frame: about half a megabyte encoded.
const FRAME_LOGPROBS: usize = 16 * 1024;
/// How many of the latest pending deltas are searched for one of the same choice.
const MERGE_WITHIN: usize = 64;

/// Output of one step of one request.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    pub(crate) deltas: Vec<Delta>,
    pub(crate) finished: Vec<Finished>,
}

impl Staged {
    pub(crate) fn is_empty(&self) -> bool {
        self.deltas.is_empty() && self.finished.is_empty()
    }
}

/// What a push found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Left,
    /// The reader is too far behind. It will ask for the request to go on once it has read.
    Full,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    limit: u32,
    /// Unread steps after which the reader is woken.
    wake_at: u32,
}

#[derive(Debug, Default)]
struct State {
    accepted: Option<Accepted>,
    deltas: VecDeque<Delta>,
    finished: Vec<Finished>,
    usage: Option<Usage>,
    /// Set once; nothing is pushed afterwards.
    end: Option<Result<(), CoreError>>,
    steps: u32,
    waker: Option<Waker>,
    reader: Reader,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reader {
    #[default]
    Reading,
    /// Found full by the engine thread.
    Behind,
    Gone,
}

/// What the reader gets.
pub(crate) struct Taken {
    pub(crate) poll: Poll<Option<Result<GenerateFrame, CoreError>>>,
    /// The engine thread is to be told that there is room again.
    pub(crate) resume: bool,
}

impl Outbox {
    /// `limit`: unread steps that are kept. `stream`: whether every step is worth a message.
    pub(crate) fn new(accepted: Accepted, limit: u32, stream: bool) -> Self {
        let limit = limit.max(1);
        let state = State {
            accepted: Some(accepted),
            ..State::default()
        };
        let wake_at = if stream { 1 } else { limit.min(LAZY_STEPS) };
        Self {
            state: Mutex::new(state),
            limit,
            wake_at,
        }
    }

    /// Adds the output of one step and leaves `staged` empty.
    pub(crate) fn push(&self, staged: &mut Staged) -> Room {
        let mut state = self.state.lock();
        state.merge(staged);
        let waker = if state.steps >= self.wake_at {
            state.waker.take()
        } else {
            None
        };
        let full = state.steps >= self.limit && state.reader == Reader::Reading;
        if full {
            state.reader = Reader::Behind;
        }
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        if full { Room::Full } else { Room::Left }
    }

    /// Adds the last output: what is staged, then the counts, then the end.
    pub(crate) fn finish(&self, staged: &mut Staged, usage: Usage, end: Result<(), CoreError>) {
        let mut state = self.state.lock();
        state.merge(staged);
        state.usage = Some(usage);
        state.end = Some(end);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes what there is, or leaves the waker.
    pub(crate) fn poll(&self, cx: &Context<'_>) -> Taken {
        let mut state = self.state.lock();
        if state.is_ready(self.wake_at) {
            let frame = state.take();
            let resume = state.steps == 0 && state.reader == Reader::Behind;
            if resume {
                state.reader = Reader::Reading;
            }
            return Taken {
                poll: Poll::Ready(Some(Ok(frame))),
                resume,
            };
        }
        let poll = match state.end.take() {
            Some(Err(error)) => {
                state.end = Some(Ok(()));
                Poll::Ready(Some(Err(error)))
            }
            Some(Ok(())) => {
                state.end = Some(Ok(()));
                Poll::Ready(None)
            }
            None => {
                if !state
                    .waker
                    .as_ref()
                    .is_some_and(|waker| waker.will_wake(cx.waker()))
                {
                    state.waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        };
        Taken {
            poll,
            resume: false,
        }
    }

    /// The reader is gone. True when the request had already ended.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.state.lock();
        state.reader = Reader::Gone;
        state.deltas.clear();
        state.end.is_some()
    }
}

impl State {
    fn merge(&mut self, staged: &mut Staged) {
        if self.reader == Reader::Gone {
            staged.deltas.clear();
            staged.finished.clear();
            return;
        }
        self.steps += 1;
        for delta in staged.deltas.drain(..) {
            let earlier = self.deltas.iter_mut().rev().take(MERGE_WITHIN);
            // An echoed prompt (no tokens of its own) stays apart: it comes in pieces of limited size.
            let same = earlier
                .into_iter()
                .find(|pending| pending.choice == delta.choice && pending.tokens > 0);
            match same {
                Some(pending) => {
                    pending.text.push_str(&delta.text);
                    pending.tokens += delta.tokens;
                    pending.logprobs.extend(delta.logprobs);
                }
                None => self.deltas.push_back(delta),
            }
        }
        self.finished.append(&mut staged.finished);
    }

    fn is_ready(&self, wake_at: u32) -> bool {
        self.accepted.is_some()
            || self.usage.is_some()
            || (self.steps >= wake_at && !(self.deltas.is_empty() && self.finished.is_empty()))
    }

    /// Everything that is pending, or a part of it when it is large.
    fn take(&mut self) -> GenerateFrame {
        let mut frame = GenerateFrame {
            accepted: self.accepted.take(),
            ..GenerateFrame::default()
        };
        let mut logprobs = 0;
        while logprobs < FRAME_LOGPROBS
            && let Some(delta) = self.deltas.pop_front()
        {
            logprobs += delta
                .logprobs
                .iter()
                .map(|entry| 1 + entry.top.len())
                .sum::<usize>();
            frame.deltas.push(delta);
        }
        if self.deltas.is_empty() {
            frame.finished = std::mem::take(&mut self.finished);
            frame.usage = self.usage.take();
            self.steps = 0;
        }
        frame
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use helix_wire::error::Code;
    use helix_wire::v1::TokenLogprob;

    use super::*;

    fn delta(choice: u32, text: &str) -> Staged {
        let delta = Delta {
            choice,
            text: text.into(),
            tokens: 1,
            logprobs: Vec::new(),
        };
        Staged {
            deltas: vec![delta],
            finished: Vec::new(),
        }
    }

    fn poll(outbox: &Outbox) -> Taken {
        outbox.poll(&Context::from_waker(Waker::noop()))
    }

    fn frame(outbox: &Outbox) -> GenerateFrame {
        match poll(outbox).poll {
            Poll::Ready(Some(Ok(frame))) => frame,
            other => panic!("no frame: {other:?}"),
        }
    }

    #[test]
    fn unread_steps_become_one_frame() {
        let outbox = Outbox::new(Accepted::default(), 8, true);
        outbox.push(&mut delta(0, "a"));
        outbox.push(&mut delta(1, "x"));
        outbox.push(&mut delta(0, "b"));
        let all = frame(&outbox);
        assert!(all.accepted.is_some());
        let texts: Vec<_> = all
            .deltas
            .iter()
            .map(|d| (d.choice, d.text.as_str(), d.tokens))
            .collect();
        assert_eq!(texts, [(0, "ab", 2), (1, "x", 1)]);
        assert!(poll(&outbox).poll.is_pending());
    }

    #[test]
    fn a_full_outbox_says_so_once_and_resumes_after_reading() {
        let outbox = Outbox::new(Accepted::default(), 2, true);
        assert_eq!(outbox.push(&mut delta(0, "a")), Room::Left);
        assert_eq!(outbox.push(&mut delta(0, "b")), Room::Full);
        assert_eq!(outbox.push(&mut delta(0, "c")), Room::Left);
        let taken = poll(&outbox);
        assert!(taken.resume);
        outbox.push(&mut delta(0, "d"));
        assert!(!poll(&outbox).resume);
    }

    #[test]
    fn without_streaming_only_larger_pieces_are_sent() {
        let outbox = Outbox::new(Accepted::default(), 3, false);
        frame(&outbox);
        outbox.push(&mut delta(0, "a"));
        assert!(poll(&outbox).poll.is_pending());
        outbox.push(&mut delta(0, "b"));
        outbox.push(&mut delta(0, "c"));
        assert_eq!(frame(&outbox).deltas[0].text, "abc");
        outbox.finish(&mut Staged::default(), Usage::default(), Ok(()));
        assert!(frame(&outbox).usage.is_some());
        assert!(matches!(poll(&outbox).poll, Poll::Ready(None)));
    }

    #[test]
    fn an_error_comes_after_the_last_frame() {
        let outbox = Outbox::new(Accepted::default(), 3, false);
        let error = CoreError::new(Code::EngineFailed, "broken");
        outbox.finish(&mut delta(0, "a"), Usage::default(), Err(error.clone()));
        assert_eq!(frame(&outbox).deltas.len(), 1);
        assert!(matches!(poll(&outbox).poll, Poll::Ready(Some(Err(found))) if found == error));
        assert!(matches!(poll(&outbox).poll, Poll::Ready(None)));
        assert!(outbox.close());
    }

    #[test]
    fn a_huge_echo_travels_in_several_frames() {
        let outbox = Outbox::new(Accepted::default(), 3, true);
        let piece = || Delta {
            logprobs: vec![TokenLogprob::default(); FRAME_LOGPROBS],
            ..Delta::default()
        };
        let mut staged = Staged {
            deltas: vec![piece(), piece()],
            finished: vec![Finished::default()],
        };
        outbox.push(&mut staged);
        let first = frame(&outbox);
        assert_eq!((first.deltas.len(), first.finished.len()), (1, 0));
        let second = frame(&outbox);
        assert_eq!((second.deltas.len(), second.finished.len()), (1, 1));
    }
}
