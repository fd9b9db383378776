//! A client and servers on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod answers;
mod failover;
mod fake;
mod limits;
mod secure;
