//! The plain data that crosses the scheduler's border.

use std::sync::Arc;

/// Names one sequence; the caller chooses it and never reuses it while the sequence lives.
pub type SeqId = u64;

/// For whom a sequence runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Owner {
    /// Name of the organisation.
    pub organisation: u128,
    /// Name of the key within it.
    pub key: u128,
    /// Share of the organisation, beside others' shares.
    pub organisation_weight: f64,
    /// Share of the key, beside those of the organisation's other keys.
    pub key_weight: f64,
}

impl Default for Owner {
    fn default() -> Self {
        Self {
            organisation: 0,
            key: 0,
            organisation_weight: 1.0,
            key_weight: 1.0,
        }
    }
}

/// Names those who may learn from each other's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Everything of an owner; who that is (an organisation, a user, a key) is the caller's choice.
    Owner(u128),
    /// One request; the caller numbers them.
    Request(u64),
}

/// What the scheduler may use. Zeros in `slots`, `max_len`, `step_tokens` or `queue_requests` count as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that the engine holds at a time.
    pub slots: usize,
    /// Positions of one sequence: prompt and generated tokens together.
    pub max_len: usize,
    /// Requests that may wait.
    pub queue_requests: usize,
    /// Prompt tokens that may wait, all requests together.
    pub queue_tokens: usize,
    /// Tokens of one plan.
    pub step_tokens: usize,
    /// How long a step may take while somebody decodes (microseconds), or two and a half times as long as one without
    /// prompts if that is more; 0: no end.
    pub step_micros: u64,
    /// Whether a sequence may start from a prefix that some slot already holds.
    pub prefix_reuse: bool,
}

/// One sequence of a request.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Its name.
    pub id: SeqId,
    /// Token ids, at least one. Sequences of one request with equal prompts best share the allocation.
    pub prompt: Arc<[u32]>,
    /// Tokens to generate at most; 0 ends the sequence once its prompt is computed.
    pub max_new: u32,
    /// When waiting stops making sense, in the ticks that [`crate::Scheduler::expire`] is called with.
    pub deadline: Option<u64>,
    /// Whether the logits of every prompt position are wanted. Such a sequence reuses no prefix.
    pub prompt_logits: bool,
    /// Whose prefixes it may start from, and who may start from its own: sequences of the same scope.
    pub scope: Scope,
    /// Leading prompt tokens that everybody may know. They may come from any slot that holds all of them.
    pub shared: usize,
    /// For whom it runs, in the eyes of a [`crate::Policy`]; the scheduler itself ignores it.
    pub owner: Owner,
}

/// Why a request was not taken. Nothing of it was queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No room in the queue; worth a retry.
    #[error(
        "the queue is full: {requests} requests with {tokens} prompt tokens are waiting; retry later"
    )]
    QueueFull {
        /// Requests waiting now.
        requests: usize,
        /// Their prompt tokens.
        tokens: usize,
    },
    /// The prompt leaves no room for an answer (or, with `max_new` 0, does not fit at all).
    #[error(
        "the prompt has {prompt} tokens, the context holds {max_len} with the answer; shorten the prompt"
    )]
    TooLong {
        /// Sequence that does not fit.
        id: SeqId,
        /// Tokens of its prompt.
        prompt: usize,
        /// Positions of a sequence.
        max_len: usize,
    },
    /// The request alone is larger than the whole queue; a retry cannot help.
    #[error("the request has {tokens} prompt tokens in all, at most {limit} may wait; split it")]
    TooLarge {
        /// Prompt tokens of the request, every sequence counted.
        tokens: usize,
        /// `Limits::queue_tokens`.
        limit: usize,
    },
    /// A prompt without tokens: there is nothing to predict from.
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt {
        /// Sequence with the empty prompt.
        id: SeqId,
    },
    /// The id names a sequence that is still alive, or stands twice in the request.
    #[error("sequence id {id} is already in use")]
    DuplicateId {
        /// The id.
        id: SeqId,
    },
}

/// Copy the first `len` cached positions of slot `src` to slot `dst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyPrefix {
    /// Slot to read.
    pub src: usize,
    /// Slot to overwrite.
    pub dst: usize,
    /// Positions.
    pub len: usize,
}

/// A sequence that got its slot in this plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// The sequence.
    pub id: SeqId,
    /// Its slot until it ends.
    pub slot: usize,
    /// Prompt tokens that need no computing because a cache already held them.
    pub cached: usize,
    /// Whether it had a slot before, and goes on where it was interrupted.
    pub resumed: bool,
}

/// One sequence's part of a plan: `len` tokens that go to positions `past..past + len` of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// The sequence.
    pub id: SeqId,
    /// Its slot.
    pub slot: usize,
    /// Positions that the cache already holds.
    pub past: usize,
    /// Tokens to compute, at least one; they lie in [`Plan::tokens`] in the order of the items.
    pub len: usize,
    /// Trailing rows of logits that are needed: 1 where a token is to be sampled, every row of a prompt
    /// with `prompt_logits`, else 0.
    pub wanted: usize,
    /// Whether the last row decides a token: [`Scheduler::commit`](crate::Scheduler::commit) expects one.
    pub sample: bool,
}

/// What the engine is to compute: first the copies, in order, then all items in one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Prefix copies. One at a time, in order: a later copy may overwrite what an earlier one has read.
    pub copies: Vec<CopyPrefix>,
    /// Sequences that lose their slot to one of `started` and are back in the queue. What they have generated is kept,
    /// and is part of what is computed when they get a slot again.
    pub interrupted: Vec<SeqId>,
    /// Sequences that leave the queue with this plan, in the order of placement.
    pub started: Vec<Started>,
    /// Decoding sequences by slot, then prompt chunks in the order in which their sequences were placed.
    pub items: Vec<Item>,
    /// Token ids of all items, one after the other.
    pub tokens: Vec<u32>,
}

impl Plan {
    /// Whether there is nothing to do. Such a plan needs no commit.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The items, each with its token ids.
    pub fn iter(&self) -> impl Iterator<Item = (&Item, &[u32])> {
        let mut rest = self.tokens.as_slice();
        self.items.iter().map(move |item| {
            let (own, after) = rest.split_at(item.len.min(rest.len()));
            rest = after;
            (item, own)
        })
    }
}

/// What came of one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The sequence.
    pub id: SeqId,
    /// The sampled token, for items with [`Item::sample`].
    pub token: Option<u32>,
    /// The caller ends the sequence (end of text, stop string, an error of its own).
    pub finished: bool,
}

/// Why a sequence ended by itself. A client sees `length` for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `max_new` tokens were generated.
    Length,
    /// Prompt and generated tokens fill the context.
    Context,
}

/// A sequence that the scheduler ended. It is gone and its slot is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The sequence.
    pub id: SeqId,
    /// Why.
    pub finish: Finish,
}

/// How full the scheduler is at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests of which at least one sequence waits.
    pub waiting_requests: usize,
    /// Waiting sequences.
    pub waiting: usize,
    /// Their prompt tokens.
    pub waiting_tokens: usize,
    /// Sequences whose prompt is being computed, parked ones included.
    pub prefilling: usize,
    /// Sequences that decode, parked ones included.
    pub running: usize,
    /// Parked sequences; they count in `prefilling` or `running` too.
    pub parked: usize,
    /// Slots in use: `prefilling + running`.
    pub slots_used: usize,
    /// Tokens that slots in use hold.
    pub cached_tokens: usize,
}
