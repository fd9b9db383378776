//! The pool over real gRPC, with an engine whose answers can be computed by hand.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod answers;
mod device;
mod door;
mod ends;
mod failures;
mod harness;
mod owners;
mod readers;
mod secure;
