//! Tests of the public interface, in one binary.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod checkpoint;
mod chunks;
mod control;
mod detok;
mod golden;
mod load;
mod logprobs;
mod stop;
mod template;
