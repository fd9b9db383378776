//! What one row costs at best at a vocabulary of 152,000 tokens.
//! Run with `cargo run --release -p helix-sample --example row_cost`.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Instant;

use helix_sample::{History, Params, Sampler, uniform};

fn main() {
    #[allow(clippy::cast_possible_truncation)]
    let row: Vec<f32> = (0..152_000)
        .map(|token| (uniform(1, token, 0).ln() * -1.3) as f32)
        .collect();
    let plain = Params::default();
    let cases = [
        (
            "greedy",
            Params {
                temperature: 0.0,
                ..plain.clone()
            },
        ),
        ("temperature 1", plain.clone()),
        (
            "top_k 40",
            Params {
                top_k: 40,
                ..plain.clone()
            },
        ),
        (
            "top_k 40, top_p 0.9",
            Params {
                top_k: 40,
                top_p: 0.9,
                ..plain.clone()
            },
        ),
        (
            "top_p 0.9 of a flat row",
            Params {
                top_p: 0.9,
                ..plain.clone()
            },
        ),
        (
            "top_p 0.9 of a steep row",
            Params {
                top_p: 0.9,
                temperature: 0.2,
                ..plain.clone()
            },
        ),
        (
            "greedy, penalties",
            Params {
                temperature: 0.0,
                presence: 0.5,
                ..plain
            },
        ),
    ];
    let mut sampler = Sampler::new();
    for (name, params) in cases {
        let mut history = History::new(&params, &[]);
        for token in 0..500 {
            history.push(token);
        }
        report(name, |position| {
            black_box(sampler.sample(&row, &params, &history, position).unwrap());
        });
    }
    report("logprobs, top 20", |_| {
        black_box(sampler.logprobs(&row, 5, 20).unwrap());
    });
}

/// The fastest of many runs: what else the machine does must not count.
fn report(name: &str, mut run: impl FnMut(u64)) {
    let time = |position| {
        let start = Instant::now();
        run(position);
        start.elapsed()
    };
    println!("{name:26} {:>10.1?}", (0..300).map(time).min().unwrap());
}
