//! What one step of the scheduler costs at best: 256 running sequences, 1024 waiting requests.
//! Run with `cargo run --release -p helix-sched --example step_cost`.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::Instant;

use helix_sched::{Fair, Limits, NewSequence, Outcome, Owner, Prices, Scheduler, Scope};

fn main() {
    let limits = Limits {
        slots: 256,
        max_len: 8192,
        queue_requests: 1024,
        queue_tokens: 1 << 24,
        step_tokens: 1024,
        step_micros: 0,
        prefix_reuse: true,
    };
    let prices = Prices {
        prefill: 1.0,
        decode: 2.0,
    };
    let mut scheduler = Scheduler::new(limits, Box::new(Fair::new(prices)));
    let request = |id: u64| NewSequence {
        id,
        prompt: (0..100)
            .map(|at| at + u32::from(at > 50) * u32::try_from(id).unwrap())
            .collect(),
        max_new: 8000,
        deadline: Some(u64::MAX),
        prompt_logits: false,
        scope: Scope::Owner(0),
        shared: 0,
        owner: Owner {
            organisation: u128::from(id % 50),
            key: u128::from(id),
            ..Owner::default()
        },
    };
    for id in 0..1024 {
        scheduler.submit(vec![request(id)]).unwrap();
    }
    let step = |scheduler: &mut Scheduler| {
        scheduler.expire(0);
        let plan = scheduler.schedule();
        let sampled = plan
            .items
            .iter()
            .map(|item| (item.id, item.sample.then_some(1)));
        let outcomes: Vec<_> = sampled
            .map(|(id, token)| Outcome {
                id,
                token,
                finished: false,
            })
            .collect();
        scheduler.commit(&outcomes);
    };
    while scheduler.counts().running < limits.slots {
        step(&mut scheduler);
    }
    let time = |_| {
        let start = Instant::now();
        step(&mut scheduler);
        start.elapsed()
    };
    println!(
        "schedule + commit, 256 running: {:?}",
        (0..2000).map(time).min().unwrap()
    );
}
