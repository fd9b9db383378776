//! The front between real sockets: raw clients before it, scripted workers behind it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod caps;
mod certificates;
mod forwarding;
mod harness;
mod pipelined;
mod strict;
