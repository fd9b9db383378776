//! The sampler against a plain f64 reference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod choice;
mod distribution;
mod reference;
