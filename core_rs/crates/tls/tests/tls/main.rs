//! Mutual TLS over real sockets, with certificates made on the spot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod handshake;
mod load;
mod log;
mod rotation;
mod support;
