//! How long steps take, learnt from those that were made: how many prompt tokens fit beside others' decoding.
//!
//! The time of a step is taken for a constant, a part for each sequence that decodes and a part for each prompt
//! token: a least-squares fit in which each step weighs less than the one after it, so that it follows longer
//! contexts and busier machines.

/// What is left of a step's weight after the next one.
const MEMORY: f64 = 0.97;
/// Steps with prompts before a fit is trusted.
const ENOUGH: u32 = 8;
/// A step beside decoding may last so many times as long as one without prompts, whatever the budget: otherwise
/// large batches, which are slow by themselves, would leave prompts no time.
const STRETCH: f64 = 2.5;
/// Prompt tokens that every step may hold: fewer would cost more in calls than they spare.
const LEAST_TOKENS: usize = 16;
/// A step that took so many times as long as expected was held up by something else.
const OUTLIER: f64 = 4.0;
/// Keeps the fit solvable while all steps look alike.
const RIDGE: f64 = 1e-6;
/// Sequences and prompt tokens in units in which both are about 1.
const UNITS: [f64; 2] = [16.0, 128.0];

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Sums over steps of products of what they held (1, sequences, tokens).
    products: [[f64; 3]; 3],
    /// The same with the time.
    times: [f64; 3],
    /// Microseconds: constant, a unit of sequences, a unit of prompt tokens.
    fit: [f64; 3],
    /// Steps with part of a prompt.
    prompts: u32,
}

#[allow(clippy::cast_precision_loss)] // tokens of a step
fn features(decoding: usize, prompt_tokens: usize) -> [f64; 3] {
    [
        1.0,
        decoding as f64 / UNITS[0],
        prompt_tokens as f64 / UNITS[1],
    ]
}

fn dot(left: &[f64; 3], right: &[f64; 3]) -> f64 {
    left.iter().zip(right).map(|(l, r)| l * r).sum()
}

impl Pace {
    /// Learns from a step that took `micros`.
    pub(crate) fn observe(&mut self, decoding: usize, prompt_tokens: usize, micros: f64) {
        let held = features(decoding, prompt_tokens);
        let time = if self.known() {
            micros.min(OUTLIER * dot(&held, &self.fit).max(1.0))
        } else {
            micros
        };
        for (row, left) in self.products.iter_mut().zip(held) {
            for (sum, right) in row.iter_mut().zip(held) {
                *sum = *sum * MEMORY + left * right;
            }
        }
        for (sum, left) in self.times.iter_mut().zip(held) {
            *sum = *sum * MEMORY + left * time;
        }
        self.fit = solve(self.products, self.times);
        if prompt_tokens >= LEAST_TOKENS {
            self.prompts = self.prompts.saturating_add(1);
        }
    }

    fn known(&self) -> bool {
        self.prompts >= ENOUGH
    }

    /// Microseconds that a prompt token adds to a step; 0 while that is not known.
    pub(crate) fn token_micros(&self) -> f64 {
        if self.known() {
            self.fit[2] / UNITS[1]
        } else {
            0.0
        }
    }

    /// Prompt tokens that fit into a step of `budget` microseconds (0: no end) in which `decoding` sequences take part.
    pub(crate) fn prompt_tokens(&self, decoding: usize, budget: f64) -> usize {
        if budget <= 0.0 || decoding == 0 {
            return usize::MAX;
        }
        let token = self.token_micros();
        if token <= 0.0 {
            return if self.known() {
                usize::MAX
            } else {
                4 * LEAST_TOKENS
            };
        }
        let without = dot(&features(decoding, 0), &self.fit);
        let spare = budget.max(STRETCH * without) - without;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // saturates, and is not negative
        let tokens = (spare / token) as usize;
        // Odd pieces cost an engine one token more.
        (tokens & !1).max(LEAST_TOKENS)
    }
}

/// Solves the normal equations by elimination; no part of a step takes negative time.
fn solve(mut matrix: [[f64; 3]; 3], mut right: [f64; 3]) -> [f64; 3] {
    for (at, row) in matrix.iter_mut().enumerate() {
        row[at] += RIDGE;
    }
    for column in 0..3 {
        let (pivot, value) = (matrix[column], right[column]);
        for row in column + 1..3 {
            let factor = matrix[row][column] / pivot[column];
            for at in column..3 {
                matrix[row][at] -= factor * pivot[at];
            }
            right[row] -= factor * value;
        }
    }
    let mut found = [0.0; 3];
    for row in (0..3).rev() {
        let known: f64 = (row + 1..3).map(|at| matrix[row][at] * found[at]).sum();
        found[row] = ((right[row] - known) / matrix[row][row]).max(0.0);
    }
    found
}
