//! Continuous batching over the slots of one engine: plain data in, plain data out.
//!
//! No I/O, no clock, no tensors. Four nouns, one verb each:
//!
//! | noun | verb | where |
//! | --- | --- | --- |
//! | [`Waiting`] | `submit`: take a request or refuse it at the door | `queue` |
//! | slots | `place`: give a sequence a slot and the longest prefix that any cache holds | `slots` |
//! | [`Plan`] | [`Scheduler::schedule`]: what the engine computes in the next step | `scheduler` |
//! | [`Outcome`] | [`Scheduler::commit`]: what came of it | `scheduler` |
//!
//! A sequence is waiting, then prefilling (its prompt is being computed), then running (one token a
//! step), then gone. `schedule` and `commit` (or [`Scheduler::abort_step`]) alternate; everything else
//! may be called at any time, also while a plan is with the engine.
//!
//! # What a slot remembers
//!
//! A slot keeps the ids of the tokens whose positions its cache holds, also after its sequence has ended.
//! Only computed positions count: a token that was sampled but not fed yet is not in the cache. An idle
//! slot remembers at most `max_len - 1` tokens, because an engine that decodes a contiguous range of
//! slots may write one position just behind what an idle slot inside the range holds.
//!
//! Only sequences of the same [`Scope`] start from each other's tokens: how much of a prompt is found in a
//! cache shows, in counts and in time, and would let strangers guess each other's prompts word by word. The
//! exception are [`NewSequence::shared`] leading tokens, which are no secret: all of them or none.
//!
//! # Shares of a step
//!
//! A plan never holds more than `step_tokens` tokens. Decoding goes first, but while a prompt is to be
//! computed a quarter of the budget (at least one token) is kept for prompts, so that neither starves; a
//! budget of one token alternates. When the decoding sequences do not all fit they take turns.
//!
//! While somebody decodes, a step also has a budget of time ([`Limits::step_micros`]): the caller says what each
//! step took ([`Scheduler::took`]), and no more prompt tokens are planned than have come out to fit.

#![forbid(unsafe_code)]

mod fair;
mod pace;
mod policy;
mod queue;
mod scheduler;
mod slots;
mod types;

pub use fair::{Fair, Prices};
pub use policy::{Fcfs, Holder, Policy, Service};
pub use queue::{Waiting, WaitingRequest};
pub use scheduler::Scheduler;
pub use types::{
    CopyPrefix, Counts, Ended, Finish, Item, Limits, NewSequence, Outcome, Owner, Plan, Refusal,
    Scope, SeqId, Started,
};
