//! The draw itself.

use std::ops::Range;

use crate::history::History;
use crate::noise::{gumbel, uniform};
use crate::params::Params;
use crate::scan::{Candidate, Weights, argmax, token_at, top};

/// Candidates that get noise of their own; what a sampler on a device ranks.
pub const CANDIDATES: usize = 64;

/// Rank of the noise of the bucket that holds everything beyond the candidates.
const TAIL_RANK: u32 = 64;
/// Rank of the number that picks a token within that bucket.
const PICK_RANK: u32 = 65;
/// Logits whose weights are summed in f32 before the sum moves to f64.
const BLOCK: usize = 2048;

/// Why no token could be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The row has no entries.
    #[error("the row of logits is empty")]
    Empty,
    /// NaN or plus infinity among the logits: the engine computed nonsense.
    #[error(
        "the logits hold a value that is not a number or infinite; the engine's result is unusable"
    )]
    NotFinite,
    /// Every token is masked (minus infinity).
    #[error("every token is excluded: all logits are minus infinity")]
    NothingAllowed,
    /// The token is not in the row.
    #[error("token {token} is not in a vocabulary of {vocab} tokens")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Length of the row.
        vocab: usize,
    },
}

/// Natural logarithms of probabilities under the unmodified logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token; minus infinity for a token that cannot occur.
    pub chosen: f32,
    /// The most probable tokens, best first, ties by lower id.
    pub top: Vec<(u32, f32)>,
}

/// Draws tokens. Holds scratch memory only: results never depend on earlier calls.
#[derive(Debug, Default)]
pub struct Sampler {
    row: Vec<f32>,
    found: Vec<Candidate>,
    blocks: Vec<Block>,
}

/// Part of the tail and the sum of its weights.
#[derive(Clone, Debug)]
struct Block {
    range: Range<usize>,
    weights: Weights,
    sum: f64,
}

/// Kept tokens beyond the candidates.
enum Tail {
    Nothing,
    /// `found[CANDIDATES..kept]`, in rank order.
    Ranked,
    /// `blocks`, in the order of the row.
    Row,
}

impl Sampler {
    /// A sampler with empty scratch memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the token at `position` (of the sequence, prompt included) from one row of logits `[V]`.
    ///
    /// Minus infinity excludes a token. Entries of `logit_bias` and `history` beyond the row are ignored;
    /// [`Params::validate`] refuses them at the door.
    ///
    /// # Errors
    /// [`SampleError`] for rows that allow no choice.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &Params,
        history: &History,
        position: u64,
    ) -> Result<u32, SampleError> {
        let mut row = std::mem::take(&mut self.row);
        let untouched = params.logit_bias.is_empty() && params.banned.is_empty();
        let token = if untouched && history.is_empty() {
            self.draw(logits, params, position)
        } else {
            row.clear();
            row.extend_from_slice(logits);
            for &(token, bias) in &params.logit_bias {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit += bias;
                }
            }
            history.penalise(&mut row, params);
            for &token in &params.banned {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            self.draw(&row, params, position)
        };
        self.row = row;
        token
    }

    /// The log-softmax of the unmodified logits `[V]`: of one token, and of the `count` best.
    ///
    /// # Errors
    /// [`SampleError`], also for a token that is not in the row.
    pub fn logprobs(
        &mut self,
        logits: &[f32],
        token: u32,
        count: usize,
    ) -> Result<Logprobs, SampleError> {
        let Some(&chosen) = logits.get(token as usize) else {
            return Err(SampleError::UnknownToken {
                token,
                vocab: logits.len(),
            });
        };
        let best = self.rank(logits, count.max(1))?;
        let weights = Weights {
            shift: best,
            scale: 1.0,
            low: f32::NEG_INFINITY,
            high: f32::INFINITY,
        };
        let sum: f64 = logits.chunks(BLOCK).map(|block| weights.sum(block)).sum();
        let log = |logit: f32| to_f32(f64::from(logit) - f64::from(best) - sum.ln());
        let top = self
            .found
            .iter()
            .take(count)
            .map(|candidate| (candidate.token, log(candidate.logit)))
            .collect();
        Ok(Logprobs {
            chosen: log(chosen),
            top,
        })
    }

    fn draw(&mut self, row: &[f32], params: &Params, position: u64) -> Result<u32, SampleError> {
        if params.is_greedy() {
            let best = argmax(row).ok_or(if row.is_empty() {
                SampleError::Empty
            } else {
                SampleError::NotFinite
            })?;
            check_best(best.logit)?;
            return Ok(best.token);
        }
        let best = self.rank(row, CANDIDATES)?;
        let scale = 1.0 / params.temperature;
        let (kept, tail) = self.keep(row, params, best, scale);
        let noise = |rank| f64::from(gumbel(params.seed, position, rank));
        let head = self.found[..kept.min(CANDIDATES)].iter().zip(0_u32..);
        let winner = head
            .map(|(candidate, rank)| {
                (
                    scaled(candidate.logit, best, scale) + noise(rank),
                    candidate.token,
                )
            })
            .reduce(|best, other| if other.0 > best.0 { other } else { best });
        let (score, token) = winner.ok_or(SampleError::Empty)?;
        let mass = match tail {
            Tail::Nothing => return Ok(token),
            Tail::Ranked => self.found[CANDIDATES..kept]
                .iter()
                .map(|c| scaled(c.logit, best, scale).exp())
                .sum(),
            Tail::Row => self.blocks.iter().map(|block| block.sum).sum::<f64>(),
        };
        if mass.ln() + noise(TAIL_RANK) <= score {
            return Ok(token);
        }
        let target = uniform(params.seed, position, PICK_RANK) * mass;
        let picked = match tail {
            Tail::Row => self.pick_from_row(row, target),
            _ => pick(
                self.found[CANDIDATES..kept]
                    .iter()
                    .map(|c| (c.token, scaled(c.logit, best, scale).exp())),
                target,
            ),
        };
        Ok(picked.unwrap_or(token))
    }

    /// Ranks the best `count` logits of a row into `found` and returns the best one.
    fn rank(&mut self, row: &[f32], count: usize) -> Result<f32, SampleError> {
        if !top(row, count, &mut self.found) {
            return Err(SampleError::NotFinite);
        }
        let best = self.found.first().ok_or(SampleError::Empty)?.logit;
        check_best(best)?;
        Ok(best)
    }

    /// How many of the ranked tokens are kept, and which part of the row beyond the candidates. Ranks
    /// more tokens than the candidates only when `top_k` or `top_p` cut somewhere behind them.
    fn keep(&mut self, row: &[f32], params: &Params, best: f32, scale: f32) -> (usize, Tail) {
        let low = lowest_kept(params, best, scale);
        let limit = match params.top_k as usize {
            0 => row.len(),
            k => k.min(row.len()),
        };
        let ranked = limit <= CANDIDATES || limit < row.len();
        if limit > CANDIDATES && ranked {
            top(row, limit, &mut self.found);
        }
        self.found.truncate(limit);
        self.blocks.clear();
        if params.top_p < 1.0 {
            self.cut_nucleus(row, params.top_p, best, scale, ranked);
        } else if !ranked && self.found.last().is_some_and(|last| last.logit >= low) {
            self.sum_tail(row, best, scale, low);
            return (self.found.len(), Tail::Row);
        }
        let kept = self
            .found
            .partition_point(|candidate| candidate.logit >= low)
            .max(1);
        (
            kept,
            if kept > CANDIDATES {
                Tail::Ranked
            } else {
                Tail::Nothing
            },
        )
    }

    /// Cuts `found` to the smallest set of best tokens that holds `top_p` of the weight of `found` (when
    /// `ranked`) or of the row; ranks more of the row until the set is complete.
    fn cut_nucleus(&mut self, row: &[f32], top_p: f32, best: f32, scale: f32, ranked: bool) {
        let weight = |candidate: &Candidate| scaled(candidate.logit, best, scale).exp();
        let mut mass: f64 = self.found.iter().map(weight).sum();
        if !ranked {
            self.sum_tail(row, best, scale, f32::NEG_INFINITY);
            mass += self.blocks.iter().map(|block| block.sum).sum::<f64>();
        }
        let goal = f64::from(top_p) * mass;
        loop {
            let mut sum = 0.0;
            let cut = self.found.iter().position(|candidate| {
                sum += weight(candidate);
                sum >= goal
            });
            if let Some(last) = cut {
                self.found.truncate(last + 1);
                return;
            }
            if ranked || self.found.len() >= row.len() {
                return;
            }
            let more = self.found.len() * 16;
            top(row, more, &mut self.found);
        }
    }

    /// Sums the weights of everything in the row that ranks behind `found` and is at least `low`.
    fn sum_tail(&mut self, row: &[f32], best: f32, scale: f32, low: f32) {
        let Some(last) = self.found.last() else {
            return;
        };
        // Behind the last candidate's id its equals belong to the tail, before it they are in `found`.
        let border = last.token as usize + 1;
        for (part, high) in [
            (0..border, last.logit),
            (border..row.len(), last.logit.next_up()),
        ] {
            let weights = Weights {
                shift: best,
                scale,
                low,
                high,
            };
            for start in part.clone().step_by(BLOCK) {
                let range = start..part.end.min(start + BLOCK);
                let sum = weights.sum(&row[range.clone()]);
                self.blocks.push(Block {
                    range,
                    weights,
                    sum,
                });
            }
        }
    }

    fn pick_from_row(&self, row: &[f32], mut target: f64) -> Option<u32> {
        let mut chosen = None;
        for block in self.blocks.iter().filter(|block| block.sum > 0.0) {
            chosen = Some(block);
            if target < block.sum {
                break;
            }
            target -= block.sum;
        }
        let Block { range, weights, .. } = chosen?;
        let tokens = range
            .clone()
            .map(|at| (token_at(at), f64::from(weights.of(row[at]))));
        pick(tokens, target)
    }
}

/// The token at which the running sum of weights exceeds `target`; rounding at the end falls to the last
/// token that weighs anything.
fn pick(tokens: impl Iterator<Item = (u32, f64)>, mut target: f64) -> Option<u32> {
    let mut last = None;
    for (token, weight) in tokens.filter(|&(_, weight)| weight > 0.0) {
        last = Some(token);
        if target < weight {
            break;
        }
        target -= weight;
    }
    last
}

/// The smallest logit that `min_p` keeps.
fn lowest_kept(params: &Params, best: f32, scale: f32) -> f32 {
    if params.min_p > 0.0 {
        best + params.min_p.ln() / scale
    } else {
        f32::NEG_INFINITY
    }
}

/// A logit relative to the best one, divided by the temperature. Never overflows: it is at most 0.
fn scaled(logit: f32, best: f32, scale: f32) -> f64 {
    f64::from((logit - best) * scale)
}

fn check_best(best: f32) -> Result<(), SampleError> {
    match best {
        f32::NEG_INFINITY => Err(SampleError::NothingAllowed),
        f32::INFINITY => Err(SampleError::NotFinite),
        _ => Ok(()),
    }
}

#[allow(clippy::cast_possible_truncation)]
fn to_f32(value: f64) -> f32 {
    value as f32
}
