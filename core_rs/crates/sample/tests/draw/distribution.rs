//! Over many seeds the draws follow the softmax that the parameters ask for.

use helix_sample::{History, Params, Sampler};

use crate::reference::{adjusted, probabilities};

/// A row that falls off slowly, in scrambled order, with ties and with excluded tokens.
fn row(vocab: u16) -> Vec<f32> {
    let vocab = u32::from(vocab);
    let place = |token: u32| token * 37 % vocab;
    let logit = |place: u32| -f32::from(u16::try_from(place / 2 * 6000 / vocab).unwrap()) / 1000.0;
    let excluded = |place: u32| place % 29 == 7;
    (0..vocab)
        .map(place)
        .map(|at| {
            if excluded(at) {
                f32::NEG_INFINITY
            } else {
                logit(at)
            }
        })
        .collect()
}

/// Pearson's test over groups of neighbouring tokens that expect five draws or more: the statistic of a
/// right sampler lies within five standard deviations of its mean.
fn check(name: &str, row: &[f32], params: &Params, expected: &[f64], history: &History) {
    let draws: u32 = if row.len() > 1000 { 3_000 } else { 8_000 };
    let mut sampler = Sampler::new();
    let mut counts = vec![0_u32; row.len()];
    let mut params = params.clone();
    for draw in 0..draws {
        params.seed = u64::from(draw / 8);
        let token = sampler
            .sample(row, &params, history, u64::from(draw % 8))
            .unwrap();
        counts[token as usize] += 1;
    }
    let (mut statistic, mut freedom, mut group) = (0.0, -1.0_f64, (0.0, 0.0));
    for (token, (&count, share)) in counts.iter().zip(expected).enumerate() {
        assert!(
            count == 0 || *share > 0.0,
            "{name}: token {token} is excluded and was drawn"
        );
        group = (
            group.0 + f64::from(count),
            group.1 + share * f64::from(draws),
        );
        if group.1 >= 5.0 {
            statistic += (group.0 - group.1).powi(2) / group.1;
            freedom += 1.0;
            group = (0.0, 0.0);
        }
    }
    let limit = freedom + 5.0 * (2.0 * freedom).sqrt().max(1.0);
    assert!(statistic < limit, "{name}: {statistic} for {freedom}");
}

/// (`temperature`, `top_k`, `top_p`, `min_p`)
fn cut((temperature, top_k, top_p, min_p): (f32, u32, f32, f32)) -> Params {
    Params {
        temperature,
        top_k,
        top_p,
        min_p,
        ..Params::default()
    }
}

#[test]
fn draws_follow_the_softmax_whatever_is_cut() {
    let cases = [
        ("few tokens", 5, (1.0, 0, 1.0, 0.0)),
        ("as many as candidates", 64, (1.0, 0, 1.0, 0.0)),
        ("one beyond the candidates", 65, (1.0, 0, 1.0, 0.0)),
        ("a tail", 300, (1.0, 0, 1.0, 0.0)),
        ("a tail over several blocks", 5000, (1.0, 0, 1.0, 0.0)),
        ("cold", 300, (0.3, 0, 1.0, 0.0)),
        ("hot", 300, (3.0, 0, 1.0, 0.0)),
        ("top_k within", 300, (1.0, 10, 1.0, 0.0)),
        ("top_k at the candidates", 300, (1.0, 64, 1.0, 0.0)),
        ("top_k beyond", 300, (1.0, 130, 1.0, 0.0)),
        ("top_k beyond the vocabulary", 300, (1.0, 1000, 1.0, 0.0)),
        ("top_p within", 300, (1.0, 0, 0.2, 0.0)),
        ("top_p beyond", 300, (1.0, 0, 0.93, 0.0)),
        ("top_p far beyond", 1500, (1.0, 0, 0.9, 0.0)),
        ("min_p within", 300, (1.0, 0, 1.0, 0.7)),
        ("min_p beyond", 300, (1.0, 0, 1.0, 0.05)),
        ("top_k and top_p", 300, (1.0, 100, 0.9, 0.0)),
        ("top_p and min_p", 300, (1.0, 0, 0.96, 0.05)),
        ("all of them", 300, (1.3, 150, 0.97, 0.08)),
    ];
    for (name, vocab, params) in cases {
        let (row, params) = (row(vocab), cut(params));
        let expected = probabilities(&row, &params, 1e-6);
        check(name, &row, &params, &expected, &History::default());
    }
}

#[test]
fn penalties_and_bias_shape_the_softmax() {
    let (prompt, generated) = ([3, 4, 5, 5], [5, 6, 6, 6, 80]);
    let params = Params {
        presence: 0.4,
        frequency: 0.3,
        repetition: 1.4,
        logit_bias: vec![(9, 2.5), (0, -100.0)],
        ..Params::default()
    };
    let row: Vec<f32> = row(150).iter().map(|logit| logit + 2.0).collect();
    let mut history = History::new(&params, &prompt);
    for token in generated {
        history.push(token);
    }
    let expected = probabilities(&adjusted(&row, &params, &prompt, &generated), &params, 0.0);
    check("penalties", &row, &params, &expected, &history);
}

#[test]
fn equal_logits_are_equally_likely_on_both_sides_of_the_candidates() {
    let (row, params) = (vec![0.5; 200], Params::default());
    check(
        "equal",
        &row,
        &params,
        &vec![1.0 / 200.0; 200],
        &History::default(),
    );
}
