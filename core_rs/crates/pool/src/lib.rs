//! The inference pool: text in, tokens out, over gRPC.
//!
//! | part | what it does |
//! | --- | --- |
//! | `service` | the gRPC methods: checks, tokenises and admits a request, or refuses it with a status |
//! | `request` | what a checked request is |
//! | `owner` | for whom it runs, and what of its prompts is no secret |
//! | `inbox` | the door to the engine thread: a bounded queue of commands |
//! | `engine_loop` | the engine thread: schedule, step, sample, commit, deliver |
//! | `running`, `sequence` | one request in work, and one of its choices |
//! | `outbox` | the bounded way back: one pending frame a request, merged while nobody reads |
//!
//! The engine is a [`StepEngine`]; nothing here knows Python. [`Pool::run`] blocks the calling thread, which
//! is the only one that touches scheduler, sampler and detokenisers. It shares two short locks with the gRPC
//! side: the inbox, once per step, and the outbox of a request, once per step and request.
//!
//! Every accepted request ends in exactly one final frame (`usage`), whatever happens to client, engine or
//! pool.

#![forbid(unsafe_code)]

mod encode;
mod engine;
mod engine_loop;
mod inbox;
mod options;
mod outbox;
mod owner;
mod pool;
mod request;
mod running;
mod sequence;
mod service;

pub use engine::{Batch, Candidates, Capacity, RunError, Sampling, StepEngine};
pub use options::Options;
pub use pool::{Pool, Stats};
