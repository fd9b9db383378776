//! The inference pool: text in, tokens out, over gRPC.
//!
//! | part | what it does |
//! | --- | --- |
//! | `service` | the gRPC methods: checks, tokenises and admits a request, or refuses it with a status |
//! | `request` | what a checked request is |
//! | `owner` | for whom it runs, and what of its prompts is no secret |
//! | `backlog` | who fills how much of the queue |
//! | `inbox` | the door to the engine thread: a bounded queue of commands |
//! | `engine_loop` | the engine thread: schedule, step, sample, commit, deliver |
//! | `running`, `sequence` | one request in work, and one of its choices |
//! | `outbox` | the bounded way back: one pending frame a request, merged while nobody reads |
//! | `rate` | how fast the queue empties, for whoever is told to come back |
//! | `watchdog` | notices from outside that the engine thread stands still |
//!
//! The engine is a [`StepEngine`]; nothing here knows Python. [`Pool::run`] blocks the calling thread, which
//! is the only one that touches scheduler, sampler and detokenisers. It shares two short locks with the gRPC
//! side: the inbox, once per step, and the outbox of a request, once per step and request.
//!
//! A request is accepted when the first of its sequences gets a slot. Every accepted one ends in exactly one final
//! frame (`usage`), whatever happens to client, engine or pool; the others end in a status. Deadlines are kept by the
//! gRPC side too, which does not wait for the engine thread.

#![forbid(unsafe_code)]

mod backlog;
mod encode;
mod engine;
mod engine_loop;
mod inbox;
mod options;
mod outbox;
mod owner;
mod pool;
mod rate;
mod request;
mod running;
mod sequence;
mod service;
mod watchdog;

pub use engine::{Batch, Candidates, Capacity, RunError, Sampling, StepEngine};
pub use options::Options;
pub use pool::{Pool, Stats};
pub use watchdog::Stuck;
