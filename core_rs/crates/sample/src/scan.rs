//! Passes over a whole row of logits, written in lanes so that the compiler can use SIMD.
//!
//! A lane loop must not branch and must not depend on its neighbours; everything rare is done per block.

use std::cmp::Ordering;

/// Values that a lane loop holds at once: 64 bytes.
const LANES: usize = 16;
/// Elements that are looked at before anything is decided.
const BLOCK: usize = 1024;

/// Weights that are computed in one loop before they are added up.
const WIDTH: usize = 256;

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) logit: f32,
    pub(crate) token: u32,
}

impl Candidate {
    /// Larger logits first, then lower ids. Never called with a NaN; both zeros are equal, unlike in
    /// `total_cmp`, so that comparing logits gives the same order.
    #[allow(clippy::trivially_copy_pass_by_ref)] // the signature that sorting wants
    fn rank(&self, other: &Self) -> Ordering {
        let logits = other
            .logit
            .partial_cmp(&self.logit)
            .unwrap_or(Ordering::Equal);
        logits.then(self.token.cmp(&other.token))
    }
}

/// The largest value of a block, and whether the block holds a NaN.
fn block_max(block: &[f32]) -> (f32, bool) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut nan = [0_u32; LANES];
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let value = chunk[lane];
            lanes[lane] = if value > lanes[lane] {
                value
            } else {
                lanes[lane]
            };
            nan[lane] |= u32::from(value.is_nan());
        }
    }
    let max =
        lanes.iter().chain(rest).fold(
            f32::NEG_INFINITY,
            |max, &value| if value > max { value } else { max },
        );
    (
        max,
        nan.contains(&1) || rest.iter().any(|value| value.is_nan()),
    )
}

/// The largest logit and its lowest id in one pass. `None` for a row with a NaN.
pub(crate) fn argmax(row: &[f32]) -> Option<Candidate> {
    let (mut best, mut start) = (f32::NEG_INFINITY, 0);
    for (index, block) in row.chunks(BLOCK).enumerate() {
        let (max, nan) = block_max(block);
        if nan {
            return None;
        }
        if max > best {
            (best, start) = (max, index * BLOCK);
        }
    }
    // Equality is what is meant: `best` is a copy of one of the values.
    #[allow(clippy::float_cmp)]
    let within = row.get(start..)?.iter().position(|&value| value == best)?;
    Some(Candidate {
        logit: best,
        token: token_at(start + within),
    })
}

/// The `count` largest logits, best first, in one pass; all of them when the row is shorter. False for a
/// row with a NaN.
pub(crate) fn top(row: &[f32], count: usize, found: &mut Vec<Candidate>) -> bool {
    found.clear();
    let capacity = (count * 4).max(256);
    let mut threshold = f32::NEG_INFINITY;
    let mut full = false;
    for (index, block) in row.chunks(BLOCK).enumerate() {
        let (max, nan) = block_max(block);
        if nan {
            return false;
        }
        // Ids grow, so an equal logit further on ranks behind those already found.
        if full && max <= threshold {
            continue;
        }
        for (at, chunk) in block.chunks(LANES).enumerate() {
            let larger: u32 = chunk
                .iter()
                .map(|&logit| u32::from(logit > threshold))
                .sum();
            if full && larger == 0 {
                continue;
            }
            let start = index * BLOCK + at * LANES;
            let fresh = chunk
                .iter()
                .enumerate()
                .filter(|&(_, &logit)| !full || logit > threshold);
            found.extend(fresh.map(|(lane, &logit)| Candidate {
                logit,
                token: token_at(start + lane),
            }));
            if found.len() >= capacity {
                threshold = shrink(found, count);
                full = true;
            }
        }
        // A tight threshold after every block saves the next blocks.
        if found.len() > count {
            threshold = shrink(found, count);
            full = true;
        }
    }
    if found.len() > count {
        shrink(found, count);
    }
    found.sort_unstable_by(Candidate::rank);
    true
}

/// Keeps the best `count` of more than `count` and returns the worst kept logit.
fn shrink(found: &mut Vec<Candidate>, count: usize) -> f32 {
    let Some(last) = count.checked_sub(1) else {
        found.clear();
        return f32::INFINITY;
    };
    let threshold = found.select_nth_unstable_by(last, Candidate::rank).1.logit;
    found.truncate(count);
    threshold
}

/// Which logits count, and how they become weights: `exp((logit - shift) * scale)` for
/// `low <= logit` and `logit < high`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    pub(crate) shift: f32,
    pub(crate) scale: f32,
    pub(crate) low: f32,
    pub(crate) high: f32,
}

impl Weights {
    /// The sum of all weights of a slice of at most a few thousand logits, in f32 lanes.
    pub(crate) fn sum(&self, logits: &[f32]) -> f64 {
        let mut weights = [0.0_f32; WIDTH];
        let mut lanes = [0.0_f32; LANES];
        for part in logits.chunks(WIDTH) {
            let weights = &mut weights[..part.len()];
            for (weight, &logit) in weights.iter_mut().zip(part) {
                *weight = self.of(logit);
            }
            for chunk in weights.chunks(LANES) {
                for (lane, weight) in lanes.iter_mut().zip(chunk) {
                    *lane += weight;
                }
            }
        }
        lanes.iter().copied().map(f64::from).sum()
    }

    /// The weight of one logit.
    #[inline]
    pub(crate) fn of(&self, logit: f32) -> f32 {
        let weight = exp((logit - self.shift) * self.scale);
        if logit >= self.low && logit < self.high {
            weight
        } else {
            0.0
        }
    }
}

/// `e^x` for x <= 0, to 2 units in the last place; 0 below -87. Branch-free, so that it runs in lanes.
///
/// `2^k * e^r` with `k = round(x / ln 2)` and |r| <= ln 2 / 2: Cody and Waite's two-part `ln 2` and the
/// Taylor polynomial of degree 7 (its remainder is below 1e-8 there).
#[inline]
fn exp(x: f32) -> f32 {
    /// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = clamped - k * LN2_HIGH - k * LN2_LOW;
    let mut e = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        e = e * r + coefficient;
    }
    // The low bits of `shifted` are k; as an exponent they scale by 2^k.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x > -87.0 { e * scale } else { 0.0 }
}

#[allow(clippy::cast_possible_truncation)] // a row is a vocabulary: far below 2^32 entries
pub(crate) fn token_at(index: usize) -> u32 {
    index as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_enough() {
        for step in 0..8_700_u16 {
            let x = -f32::from(step) / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / want - 1.0).abs() < 3e-7,
                "exp({x}) = {got}, not {want}"
            );
        }
        assert_eq!(
            (exp(0.0), exp(f32::NEG_INFINITY), exp(-1e30)),
            (1.0, 0.0, 0.0)
        );
    }
}
