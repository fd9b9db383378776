//! Counter-based noise: a pure function of (seed, position, rank).

/// Standard Gumbel noise for the candidate of a rank, in about -3.7..=37.5.
///
/// `-ln(-ln u)` of [`uniform`]. `position` is the position in the sequence of the token to be drawn.
pub fn gumbel(seed: u64, position: u64, rank: u32) -> f32 {
    noise(number(stream(seed, position), rank))
}

/// [`gumbel`] of the ranks from 0 on, as many as `out` has entries.
pub fn fill_gumbel(seed: u64, position: u64, out: &mut [f32]) {
    let stream = stream(seed, position);
    for (value, rank) in out.iter_mut().zip(0..) {
        *value = noise(number(stream, rank));
    }
}

/// A number strictly between 0 and 1, from the upper 52 bits of the mixed counter and a half, so that
/// neither end is reached and every value is exact.
pub fn uniform(seed: u64, position: u64, rank: u32) -> f64 {
    number(stream(seed, position), rank)
}

#[allow(clippy::cast_possible_truncation)] // f32 is what samplers on a device add
fn noise(uniform: f64) -> f32 {
    -(-uniform.ln()).ln() as f32
}

fn stream(seed: u64, position: u64) -> u64 {
    mix(seed ^ mix(position.wrapping_add(GOLDEN)))
}

#[allow(clippy::cast_precision_loss)] // 52 bits and a half fit the 53 of an f64
fn number(stream: u64, rank: u32) -> f64 {
    const STEP: f64 = 1.0 / (1_u64 << 52) as f64;
    let bits = mix(stream.wrapping_add(u64::from(rank).wrapping_add(1).wrapping_mul(GOLDEN)));
    ((bits >> 12) as f64 + 0.5) * STEP
}

/// 2^64 divided by the golden ratio, the increment of splitmix64.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014; constants of Stafford's mix 13).
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_pinned() {
        let drawn: Vec<f32> = (0..4).map(|rank| gumbel(7, 42, rank)).collect();
        assert_eq!(
            drawn, PINNED,
            "changing the noise changes every seeded answer"
        );
        let mut filled = vec![0.0; 4];
        fill_gumbel(7, 42, &mut filled);
        assert_eq!(filled, PINNED);
    }

    const PINNED: [f32; 4] = [1.015_024_8, 4.281_480_3, -0.259_452_82, 0.029_631_872];

    #[test]
    #[allow(clippy::cast_precision_loss)]
    fn moments_are_those_of_the_gumbel_distribution() {
        let draws: Vec<f64> = (0..200_u64)
            .flat_map(|seed| {
                (0..20_u64)
                    .flat_map(move |at| (0..25).map(move |rank| f64::from(gumbel(seed, at, rank))))
            })
            .collect();
        let count = draws.len() as f64;
        let mean = draws.iter().sum::<f64>() / count;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        assert!((mean - 0.577_215_66).abs() < 0.02, "mean {mean}");
        assert!(
            (variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.05,
            "variance {variance}"
        );
    }

    #[test]
    fn neighbouring_counters_are_independent() {
        type Pair = fn(u64) -> (f64, f64);
        let pairs: [(&str, Pair); 3] = [
            ("seed", |i| (uniform(i, 3, 0), uniform(i + 1, 3, 0))),
            ("position", |i| (uniform(3, i, 0), uniform(3, i + 1, 0))),
            ("seed against position", |i| {
                (uniform(i, i + 1, 0), uniform(i + 1, i, 0))
            }),
        ];
        for (name, pair) in pairs {
            let sum: f64 = (0..20_000)
                .map(pair)
                .map(|(a, b)| (a - 0.5) * (b - 0.5))
                .sum();
            let correlation = sum / 20_000.0 * 12.0;
            assert!(correlation.abs() < 0.03, "{name}: {correlation}");
        }
    }
}
