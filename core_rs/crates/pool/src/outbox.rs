//! The way back of one request: a single pending frame that grows while nobody reads it.
//!
//! The engine thread pushes once per step; the gRPC stream takes everything at once. Merging on push means
//! that a reader who is behind costs fewer and larger messages, not more memory: after `limit` unread steps
//! the request counts as full and its sequences are parked until the reader has taken the frame.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use helix_wire::error::CoreError;
use helix_wire::v1::{Accepted, Delta, FinishReason, Finished, GenerateFrame, Usage};
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
    arrival: Instant,
}

#[derive(Debug, Default)]
struct State {
    /// Taken when the first sequence has got a slot; nothing is sent before that.
    accepted: Option<Accepted>,
    started: bool,
    /// Choices that have ended.
    over: Vec<bool>,
    /// As of the last push.
    counts: Usage,
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
    /// `limit`: unread steps that are kept. `stream`: whether every step is worth a message. `arrival`: of the
    /// request.
    pub(crate) fn new(
        accepted: Accepted,
        choices: usize,
        limit: u32,
        stream: bool,
        arrival: Instant,
    ) -> Self {
        let limit = limit.max(1);
        let state = State {
            accepted: Some(accepted),
            over: vec![false; choices],
            ..State::default()
        };
        let wake_at = if stream { 1 } else { limit.min(LAZY_STEPS) };
        Self {
            state: Mutex::new(state),
            limit,
            wake_at,
            arrival,
        }
    }

    /// The first sequence has got its slot: the reader is told that the request is accepted.
    pub(crate) fn start(&self, counts: Usage) {
        let mut state = self.state.lock();
        state.started = true;
        state.counts = counts;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether nothing has a slot yet.
    pub(crate) fn waits(&self) -> bool {
        !self.state.lock().started
    }

    /// Adds the output of one step and leaves `staged` empty. `counts`: so far.
    pub(crate) fn push(&self, staged: &mut Staged, counts: Usage) -> Room {
        let mut state = self.state.lock();
        state.counts = counts;
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

    /// Adds the last output: what is staged, then the counts, then the end. A request that fails before it has a slot
    /// ends with its error alone.
    pub(crate) fn finish(&self, staged: &mut Staged, usage: Usage, end: Result<(), CoreError>) {
        let mut state = self.state.lock();
        if state.end.is_some() {
            return; // ended from outside
        }
        if state.started {
            state.merge(staged);
            state.usage = Some(usage);
        }
        state.end = Some(end);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends a request that still waits for a slot. False when it has one, or has ended.
    pub(crate) fn expire(&self, error: CoreError) -> bool {
        let mut state = self.state.lock();
        let waits = !state.started && state.end.is_none();
        if waits {
            state.end = Some(Err(error));
        }
        waits
    }

    /// Ends a request in place of an engine thread that will not. What that thread pushes later is ignored.
    pub(crate) fn abandon(&self, now: Instant, error: CoreError) {
        let open = |(choice, over): (usize, &bool)| {
            (!over).then_some(Finished {
                choice: u32::try_from(choice).unwrap_or(u32::MAX),
                reason: FinishReason::Error.into(),
            })
        };
        let (mut staged, counts) = {
            let state = self.state.lock();
            let finished = state.over.iter().enumerate().filter_map(open).collect();
            let deltas = Vec::new();
            (Staged { deltas, finished }, state.counts)
        };
        let total_us = micros(now.saturating_duration_since(self.arrival));
        let usage = Usage { total_us, ..counts };
        self.finish(&mut staged, usage, Err(error));
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
        for finished in &staged.finished {
            if let Some(over) = self.over.get_mut(finished.choice as usize) {
                *over = true;
            }
        }
        if self.reader == Reader::Gone || self.end.is_some() {
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
        (self.started && self.accepted.is_some())
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

/// Microseconds.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
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

    /// Of a request of two choices that has a slot.
    fn outbox(limit: u32, stream: bool) -> Outbox {
        let outbox = Outbox::new(Accepted::default(), 2, limit, stream, Instant::now());
        outbox.start(Usage::default());
        outbox
    }

    fn push(outbox: &Outbox, mut staged: Staged) -> Room {
        outbox.push(&mut staged, Usage::default())
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
        let outbox = outbox(8, true);
        push(&outbox, delta(0, "a"));
        push(&outbox, delta(1, "x"));
        push(&outbox, delta(0, "b"));
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
        let outbox = outbox(2, true);
        assert_eq!(push(&outbox, delta(0, "a")), Room::Left);
        assert_eq!(push(&outbox, delta(0, "b")), Room::Full);
        assert_eq!(push(&outbox, delta(0, "c")), Room::Left);
        let taken = poll(&outbox);
        assert!(taken.resume);
        push(&outbox, delta(0, "d"));
        assert!(!poll(&outbox).resume);
    }

    #[test]
    fn without_streaming_only_larger_pieces_are_sent() {
        let outbox = outbox(3, false);
        frame(&outbox);
        push(&outbox, delta(0, "a"));
        assert!(poll(&outbox).poll.is_pending());
        push(&outbox, delta(0, "b"));
        push(&outbox, delta(0, "c"));
        assert_eq!(frame(&outbox).deltas[0].text, "abc");
        outbox.finish(&mut Staged::default(), Usage::default(), Ok(()));
        assert!(frame(&outbox).usage.is_some());
        assert!(matches!(poll(&outbox).poll, Poll::Ready(None)));
    }

    #[test]
    fn an_error_comes_after_the_last_frame() {
        let outbox = outbox(3, false);
        let error = CoreError::new(Code::EngineFailed, "broken");
        outbox.finish(&mut delta(0, "a"), Usage::default(), Err(error.clone()));
        assert_eq!(frame(&outbox).deltas.len(), 1);
        assert!(matches!(poll(&outbox).poll, Poll::Ready(Some(Err(found))) if found == error));
        assert!(matches!(poll(&outbox).poll, Poll::Ready(None)));
        assert!(outbox.close());
    }

    #[test]
    fn nothing_is_sent_before_there_is_a_slot() {
        let outbox = Outbox::new(Accepted::default(), 1, 8, true, Instant::now());
        assert!(outbox.waits() && poll(&outbox).poll.is_pending());
        outbox.start(Usage::default());
        assert!(!outbox.waits());
        assert!(frame(&outbox).accepted.is_some());
        assert!(!outbox.expire(CoreError::new(Code::DeadlineExceeded, "late")));
        assert!(poll(&outbox).poll.is_pending());
    }

    #[test]
    fn what_ends_before_its_slot_ends_with_a_status_alone() {
        let late = CoreError::new(Code::DeadlineExceeded, "late");
        for outside in [true, false] {
            let outbox = Outbox::new(Accepted::default(), 1, 8, true, Instant::now());
            if outside {
                assert!(outbox.expire(late.clone()));
            }
            outbox.finish(&mut delta(0, "x"), Usage::default(), Err(late.clone()));
            assert!(matches!(poll(&outbox).poll, Poll::Ready(Some(Err(found))) if found == late));
            assert!(matches!(poll(&outbox).poll, Poll::Ready(None)));
        }
    }

    #[test]
    fn an_abandoned_request_ends_whole_with_what_was_counted() {
        let outbox = outbox(8, true);
        let mut staged = delta(1, "a");
        staged.finished.push(Finished {
            choice: 1,
            reason: FinishReason::Stop.into(),
        });
        let counts = Usage {
            completion_tokens: 1,
            ..Usage::default()
        };
        outbox.push(&mut staged, counts);
        outbox.abandon(Instant::now(), CoreError::new(Code::EngineFailed, "stuck"));
        push(&outbox, delta(0, "too late"));
        outbox.finish(&mut Staged::default(), Usage::default(), Ok(()));
        let last = frame(&outbox);
        let reasons: Vec<_> = last
            .finished
            .iter()
            .map(|f| (f.choice, f.reason()))
            .collect();
        assert_eq!(reasons, [(1, FinishReason::Stop), (0, FinishReason::Error)]);
        assert_eq!(last.deltas.len(), 1);
        assert_eq!(last.usage.unwrap().completion_tokens, 1);
        assert!(matches!(poll(&outbox).poll, Poll::Ready(Some(Err(_)))));
    }

    #[test]
    fn a_huge_echo_travels_in_several_frames() {
        let outbox = outbox(3, true);
        let piece = || Delta {
            logprobs: vec![TokenLogprob::default(); FRAME_LOGPROBS],
            ..Delta::default()
        };
        let staged = Staged {
            deltas: vec![piece(), piece()],
            finished: vec![Finished::default()],
        };
        push(&outbox, staged);
        let first = frame(&outbox);
        assert_eq!((first.deltas.len(), first.finished.len()), (1, 0));
        let second = frame(&outbox);
        assert_eq!((second.deltas.len(), second.finished.len()), (1, 1));
    }
}
