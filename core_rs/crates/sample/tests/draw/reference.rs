//! Sampling written for clarity: sort everything, cut, normalise.

use std::collections::HashMap;

use helix_sample::Params;

/// Logits after bias and penalties, word for word as the API documents them.
pub(crate) fn adjusted(
    logits: &[f32],
    params: &Params,
    prompt: &[u32],
    generated: &[u32],
) -> Vec<f32> {
    let mut row = logits.to_vec();
    for &(token, bias) in &params.logit_bias {
        row[token as usize] += bias;
    }
    let mut counts: HashMap<u32, f32> = HashMap::new();
    for &token in generated {
        *counts.entry(token).or_default() += 1.0;
    }
    for (token, logit) in (0..).zip(&mut row) {
        if prompt.contains(&token) || counts.contains_key(&token) {
            *logit = if *logit > 0.0 {
                *logit / params.repetition
            } else {
                *logit * params.repetition
            };
        }
        if let Some(&count) = counts.get(&token) {
            *logit -= params.frequency * count + params.presence;
        }
    }
    row
}

/// Tokens from the best to the worst; ties by lower id.
pub(crate) fn ranked(row: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
    order
}

/// The probability with which each token is to be drawn. `slack` widens (or, negative, narrows) the cuts
/// of `top_p` and `min_p`, for callers that want no argument about rounding at the edge.
pub(crate) fn probabilities(row: &[f32], params: &Params, slack: f64) -> Vec<f64> {
    let order = ranked(row);
    let best = f64::from(row[order[0]]);
    let weight =
        |&token: &usize| ((f64::from(row[token]) - best) / f64::from(params.temperature)).exp();
    let limit = if params.top_k == 0 {
        row.len()
    } else {
        (params.top_k as usize).min(row.len())
    };
    let mass: f64 = order[..limit].iter().map(weight).sum();
    let (mut before, mut kept) = (0.0, Vec::new());
    for token in &order[..limit] {
        let inside = params.top_p >= 1.0 || before < (f64::from(params.top_p) + slack) * mass;
        let likely = weight(token) >= f64::from(params.min_p) * (1.0 - slack);
        if kept.is_empty() || (inside && likely) {
            kept.push(*token);
        }
        before += weight(token);
    }
    let mass: f64 = kept.iter().map(weight).sum();
    let mut shares = vec![0.0; row.len()];
    for token in kept {
        shares[token] = weight(&token) / mass;
    }
    shares
}
