//! Tests against small pools on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod balance;
mod deadline;
mod fake;
mod flow;
mod retry;
mod tls;
