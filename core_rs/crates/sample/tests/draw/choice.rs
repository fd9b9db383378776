//! Single draws: what is chosen, what never is, and what the choice depends on.

use helix_sample::{CANDIDATES, History, ParamError, Params, SampleError, Sampler, gumbel};
use proptest::prelude::*;

use crate::reference::{adjusted, probabilities, ranked};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

fn sample(logits: &[f32], params: &Params) -> Result<u32, SampleError> {
    Sampler::new().sample(logits, params, &History::default(), 0)
}

fn greedy() -> Params {
    Params {
        temperature: 0.0,
        ..Params::default()
    }
}

/// Logits on a coarse grid (many ties) or anywhere, some excluded.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        4 => (-20..20_i8).prop_map(|step| f32::from(step) * 0.5),
        4 => -12.0..12.0_f32,
        1 => Just(f32::NEG_INFINITY),
        1 => Just(-0.0_f32),
    ];
    (prop::collection::vec(logit, 1..400), 0..400_usize).prop_map(|(mut row, at)| {
        let at = at % row.len();
        row[at] = row[at].max(-12.0);
        row
    })
}

fn params() -> impl Strategy<Value = Params> {
    let top_k = prop_oneof![Just(0_u32), 1..10_u32, 60..140_u32];
    let top_p = prop_oneof![Just(1.0_f32), 0.01..1.0_f32];
    let min_p = prop_oneof![Just(0.0_f32), 0.001..1.0_f32];
    (0.1..4.0_f32, top_k, top_p, min_p, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, seed)| Params {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            ..Params::default()
        },
    )
}

/// What a device does with the best 64 logits of a row and the noise of their ranks, in f32.
fn device(row: &[f32], params: &Params, position: u64) -> u32 {
    let order = ranked(row);
    let head = &order[..order.len().min(CANDIDATES)];
    let limit = if params.top_k == 0 {
        row.len()
    } else {
        params.top_k as usize
    };
    let z = |token: usize| (row[token] - row[head[0]]) / params.temperature;
    let mass: f32 = order.iter().take(limit).map(|&token| z(token).exp()).sum();
    let (mut before, mut best) = (0.0, (f32::NEG_INFINITY, 0));
    for (rank, &token) in (0..).zip(head) {
        let inside = rank == 0 || (params.top_p >= 1.0 || before < params.top_p * mass);
        let likely = rank == 0 || z(token) >= params.min_p.ln();
        let score = z(token) + gumbel(params.seed, position, rank);
        if inside && likely && (rank as usize) < limit && score > best.0 {
            best = (score, token);
        }
        before += z(token).exp();
    }
    u32::try_from(best.1).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_excluded_token_is_never_drawn(row in logits(), params in params(), position in 0..1000_u64) {
        let shares = probabilities(&row, &params, 1e-5);
        let mut sampler = Sampler::new();
        for position in position..position + 20 {
            let token = sampler.sample(&row, &params, &History::default(), position).unwrap();
            prop_assert!(shares[token as usize] > 0.0, "token {} is cut off", token);
        }
    }

    #[test]
    fn a_draw_depends_on_nothing_before_it(
        rows in prop::collection::vec((logits(), params(), any::<u64>()), 1..8),
    ) {
        let mut used = Sampler::new();
        let mut first = Vec::new();
        for (row, params, position) in rows.iter().chain(rows.iter().rev()) {
            let token = used.sample(row, params, &History::default(), *position).unwrap();
            used.logprobs(row, token, 5).unwrap();
            let fresh = Sampler::new().sample(row, params, &History::default(), *position).unwrap();
            prop_assert_eq!(token, fresh);
            first.push(token);
        }
        let (there, back) = first.split_at(rows.len());
        prop_assert!(there.iter().eq(back.iter().rev()));
    }

    #[test]
    fn greedy_takes_the_lowest_of_the_largest(row in logits(), seed in any::<u64>(), position in any::<u64>()) {
        let params = Params { seed, ..greedy() };
        let token = Sampler::new().sample(&row, &params, &History::default(), position).unwrap();
        prop_assert_eq!(token as usize, ranked(&row)[0]);
        let alone = Params { seed, top_k: 1, ..Params::default() };
        prop_assert_eq!(Sampler::new().sample(&row, &alone, &History::default(), position).unwrap(), token);
    }

    #[test]
    fn penalties_are_the_documented_formula(
        row in logits(),
        prompt in prop::collection::vec(0..400_u32, 0..30),
        generated in prop::collection::vec(0..400_u32, 0..30),
        (presence, frequency) in (-2.0..2.0_f32, -2.0..2.0_f32),
        repetition in prop_oneof![Just(1.0_f32), 0.5..2.0_f32],
        bias in prop::collection::vec((0..400_u32, -10.0..10.0_f32), 0..4),
    ) {
        let known = |token: &u32| (*token as usize) < row.len();
        let logit_bias = bias.into_iter().filter(|(token, _)| known(token)).collect();
        let params = Params { presence, frequency, repetition, logit_bias, ..greedy() };
        let generated: Vec<u32> = generated.into_iter().filter(known).collect();
        let mut history = History::new(&params, &prompt);
        for &token in &generated {
            history.push(token);
        }
        let expected = ranked(&adjusted(&row, &params, &prompt, &generated))[0];
        prop_assert_eq!(Sampler::new().sample(&row, &params, &history, 0).unwrap() as usize, expected);
    }

    #[test]
    fn a_device_that_sees_the_candidates_draws_the_same(row in logits(), params in params(), position in 0..99_u64) {
        let kept = probabilities(&row, &params, 1e-5).iter().filter(|&&share| share > 0.0).count();
        let settled = probabilities(&row, &params, -1e-5).iter().filter(|&&share| share > 0.0).count();
        prop_assume!(kept <= CANDIDATES && kept == settled);
        let host = Sampler::new().sample(&row, &params, &History::default(), position).unwrap();
        prop_assert_eq!(host, device(&row, &params, position));
    }

    #[test]
    fn logprobs_are_the_log_softmax_of_the_raw_row(row in logits(), at in 0..400_usize, count in 0..30_usize) {
        let at = at % row.len();
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&logit| f64::from(logit - best).exp()).sum();
        let log = |token: usize| f64::from(row[token]) - f64::from(best) - sum.ln();
        let near = |got: f32, token: usize| f64::from(got).eq(&log(token)) || (f64::from(got) - log(token)).abs() < 1e-5;
        let logprobs = Sampler::new().logprobs(&row, u32::try_from(at).unwrap(), count).unwrap();
        prop_assert!(near(logprobs.chosen, at));
        let order = ranked(&row);
        prop_assert_eq!(logprobs.top.len(), count.min(row.len()));
        for (&(token, value), &expected) in logprobs.top.iter().zip(&order) {
            prop_assert_eq!(token as usize, expected);
            prop_assert!(near(value, expected));
        }
    }
}

#[test]
fn a_full_vocabulary_is_handled_like_a_small_one() {
    let row: Vec<f32> = (0..152_000_u32)
        .map(|token| f32::from(u16::try_from(token * 7919 % 60_013).unwrap()) / 4e3)
        .collect();
    for seed in 0..40 {
        let cut = Params {
            seed,
            top_k: 40,
            top_p: 0.95,
            ..Params::default()
        };
        assert_eq!(sample(&row, &cut).unwrap(), device(&row, &cut, 0));
        let wide = Params {
            seed,
            top_p: 0.5,
            ..Params::default()
        };
        assert!(probabilities(&row, &wide, 1e-5)[sample(&row, &wide).unwrap() as usize] > 0.0);
    }
    assert_eq!(sample(&row, &greedy()).unwrap() as usize, ranked(&row)[0]);
    let ascending: Vec<f32> = (0..152_000_u32)
        .map(|token| f32::from(u16::try_from(token / 3).unwrap()))
        .collect();
    assert_eq!(
        sample(
            &ascending,
            &Params {
                top_k: 1,
                ..Params::default()
            }
        ),
        Ok(151_998)
    );
}

#[test]
fn rows_without_a_choice_are_errors() {
    let long = |special: f32, at: usize| {
        let mut row = vec![0.5; 3000];
        row[at] = special;
        row
    };
    let masked = vec![f32::NEG_INFINITY; 70];
    for params in [
        greedy(),
        Params::default(),
        Params {
            top_p: 0.5,
            ..Params::default()
        },
    ] {
        assert_eq!(sample(&[], &params), Err(SampleError::Empty));
        assert_eq!(sample(&masked, &params), Err(SampleError::NothingAllowed));
        for at in [0, 17, 1024, 2999] {
            assert_eq!(sample(&long(NAN, at), &params), Err(SampleError::NotFinite));
            assert_eq!(sample(&long(INF, at), &params), Err(SampleError::NotFinite));
        }
        assert_eq!(
            sample(&[f32::NEG_INFINITY, -3.0, f32::NEG_INFINITY], &params),
            Ok(1)
        );
    }
    let logprobs = |row: &[f32], token| Sampler::new().logprobs(row, token, 2);
    assert_eq!(
        logprobs(&[0.0, 1.0], 2),
        Err(SampleError::UnknownToken { token: 2, vocab: 2 })
    );
    assert_eq!(logprobs(&[0.0, NAN], 0), Err(SampleError::NotFinite));
    assert_eq!(logprobs(&masked, 0), Err(SampleError::NothingAllowed));
    let sure = logprobs(&[f32::NEG_INFINITY, 3.0], 0).unwrap();
    assert_eq!(
        (sure.chosen, sure.top),
        (f32::NEG_INFINITY, vec![(1, 0.0), (0, f32::NEG_INFINITY)])
    );
}

#[test]
fn extreme_values_overflow_nowhere() {
    let row = [f32::MAX, f32::MIN, 0.0, 3e38];
    for temperature in [1e-5, 1.0, 100.0] {
        for min_p in [0.0, 0.5] {
            let params = Params {
                temperature,
                min_p,
                top_p: 0.999,
                ..Params::default()
            };
            assert_eq!(sample(&row, &params), Ok(0));
        }
    }
}

#[test]
fn parameters_are_checked_at_the_door() {
    let good = Params {
        logit_bias: vec![(9, 1.0)],
        ..Params::default()
    };
    assert_eq!(good.validate(10), Ok(()));
    assert_eq!(
        good.validate(9),
        Err(ParamError::UnknownToken { token: 9, vocab: 9 })
    );
    let plain = Params::default();
    let bad = [
        (
            "temperature",
            Params {
                temperature: NAN,
                ..plain.clone()
            },
        ),
        (
            "temperature",
            Params {
                temperature: -0.1,
                ..plain.clone()
            },
        ),
        (
            "top_p",
            Params {
                top_p: 0.0,
                ..plain.clone()
            },
        ),
        (
            "top_p",
            Params {
                top_p: 1.5,
                ..plain.clone()
            },
        ),
        (
            "min_p",
            Params {
                min_p: NAN,
                ..plain.clone()
            },
        ),
        (
            "presence_penalty",
            Params {
                presence: INF,
                ..plain.clone()
            },
        ),
        (
            "frequency_penalty",
            Params {
                frequency: NAN,
                ..plain.clone()
            },
        ),
        (
            "repetition_penalty",
            Params {
                repetition: 0.0,
                ..plain.clone()
            },
        ),
        (
            "logit_bias",
            Params {
                logit_bias: vec![(1, INF)],
                ..plain
            },
        ),
    ];
    for (expected, params) in bad {
        let Err(ParamError::OutOfRange { name, .. }) = params.validate(10) else {
            panic!("{expected} passes")
        };
        assert_eq!(name, expected);
    }
}
