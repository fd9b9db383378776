//! From one row of logits to one token.
//!
//! The choice depends on the row, the [`Params`], the [`History`] and the position, and on nothing else:
//! the randomness is counter based ([`gumbel`]), so a request gives the same text alone and in any batch.
//!
//! # How a token is drawn
//!
//! 1. `logit_bias` is added, then the penalties are applied ([`History`]).
//! 2. Temperature 0 takes the largest logit; the lowest id wins ties.
//! 3. Otherwise the [`CANDIDATES`] largest logits are ranked (ties by lower id) and divided by the
//!    temperature. `top_k` keeps the best k; `top_p` keeps the smallest set of best tokens whose share of
//!    the softmax over what `top_k` left reaches it; `min_p` keeps tokens at least `min_p` times as
//!    probable as the best one. The best token always stays. This is the order of Hugging Face's warpers.
//! 4. Each kept candidate gets the noise of its rank, and the largest sum wins: the Gumbel-max trick,
//!    which draws exactly from the softmax. Kept tokens beyond the candidates share one bucket whose
//!    value is the logarithm of the sum of their exponentials, with the noise of rank [`CANDIDATES`]; if
//!    the bucket wins, the inverse of their cumulative distribution picks one at [`uniform`] of the next
//!    rank.
//!
//! A sampler on a device that sees only the candidates therefore picks the same token whenever nothing
//! beyond them is kept.

#![forbid(unsafe_code)]

mod history;
mod noise;
mod params;
mod sampler;
mod scan;

pub use history::History;
pub use noise::{fill_gumbel, gumbel, uniform};
pub use params::{ParamError, Params};
pub use sampler::{CANDIDATES, Logprobs, SampleError, Sampler};
