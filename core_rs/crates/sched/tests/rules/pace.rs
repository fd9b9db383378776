//! Prompts beside decoding: a step has a budget of time, learnt from steps.

use helix_sched::{Limits, Outcome, Plan, Scheduler};
use proptest::prelude::*;

use crate::{prompt, scheduler, sequence};

/// Microseconds that an engine takes.
#[derive(Clone, Copy, Debug)]
struct Cost {
    call: u64,
    decode: u64,
    token: u64,
}

impl Cost {
    fn of(&self, plan: &Plan) -> u64 {
        let decoding = plan
            .items
            .iter()
            .filter(|item| item.past > 0 && item.len == 1 && item.sample);
        let decoding = decoding.count() as u64;
        self.call + self.decode * decoding + self.token * (plan.tokens.len() as u64 - decoding)
    }
}

/// One step of an engine of that speed: sequences that decode, prompt tokens, microseconds.
fn timed(s: &mut Scheduler, cost: Cost) -> (usize, usize, u64) {
    let plan = s.schedule();
    let took = cost.of(&plan);
    s.took(took);
    let outcome = |item: &helix_sched::Item| Outcome {
        id: item.id,
        token: item.sample.then_some(7),
        finished: false,
    };
    let outcomes: Vec<_> = plan.items.iter().map(outcome).collect();
    s.commit(&outcomes);
    let decoding = plan
        .items
        .iter()
        .filter(|item| item.len == 1 && item.sample)
        .count();
    (decoding, plan.tokens.len() - decoding, took)
}

fn limits(step_micros: u64) -> Limits {
    Limits {
        slots: 32,
        queue_requests: 64,
        max_len: 8192,
        step_tokens: 512,
        queue_tokens: usize::MAX / 4,
        step_micros,
        prefix_reuse: false,
    }
}

/// `streams` sequences decode while long prompts arrive; the steps after the first fifty.
fn beside(streams: u64, step_micros: u64, cost: Cost) -> Vec<(usize, usize, u64)> {
    let mut s = scheduler(limits(step_micros));
    for id in 0..streams {
        s.submit(vec![sequence(id, &prompt(1, 8), 8000)]).unwrap();
    }
    let mut next = 1000;
    let mut steps = Vec::new();
    for at in 0..250 {
        if at % 20 == 10 && s.waiting().is_empty() {
            s.submit(vec![sequence(next, &prompt(2, 600), 1)]).unwrap();
            next += 1;
        }
        let step = timed(&mut s, cost);
        if at >= 50 {
            steps.push(step);
        }
    }
    steps
}

const COST: Cost = Cost {
    call: 5_000,
    decode: 2_000,
    token: 1_200,
};

#[test]
fn a_prompt_does_not_stall_those_that_decode() {
    let longest = |budget| {
        beside(16, budget, COST)
            .into_iter()
            .map(|step| step.2)
            .max()
            .unwrap()
    };
    assert!(
        longest(0) > 550_000,
        "without a budget the whole prompt goes in one step"
    );
    assert!(longest(100_000) < 105_000, "{}", longest(100_000));
}

#[test]
fn slow_batches_leave_prompts_some_time() {
    let steps = beside(16, 20_000, COST);
    let (alone, longest) = (37_000, steps.iter().map(|step| step.2).max().unwrap());
    assert!(
        longest > 2 * alone && longest < 26 * alone / 10,
        "{longest}"
    );
}

#[test]
fn prompts_alone_have_no_budget() {
    let mut s = scheduler(limits(1000));
    s.submit(vec![sequence(1, &prompt(1, 2000), 1)]).unwrap();
    for _ in 0..3 {
        assert_eq!(timed(&mut s, COST).1, 512);
    }
}

#[test]
fn an_engine_for_which_prompts_cost_nothing_gets_them_whole() {
    let free = Cost { token: 0, ..COST };
    assert!(beside(4, 100_000, free).iter().any(|step| step.1 > 500));
}

#[test]
fn one_slow_step_does_not_starve_prompts() {
    let mut s = scheduler(limits(100_000));
    s.submit(vec![sequence(1, &prompt(1, 8), 8000)]).unwrap();
    s.submit(vec![sequence(2, &prompt(2, 8000), 1)]).unwrap();
    let usual = (0..40).map(|_| timed(&mut s, COST).1).last().unwrap();
    timed(
        &mut s,
        Cost {
            call: 10_000_000,
            ..COST
        },
    );
    let after = (0..20).map(|_| timed(&mut s, COST).1).last().unwrap();
    assert!(usual > 60 && after > usual / 2, "{usual} {after}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever an engine's speed, what is learnt keeps steps within the budget, and uses it.
    #[test]
    fn steps_keep_their_budget(call in 100..20_000_u64, decode in 10..4_000_u64, token in 20..3_000_u64, streams in 1..30_u64) {
        let cost = Cost { call, decode, token };
        let steps = beside(streams, 100_000, cost);
        for (decoding, prompt_tokens, took) in steps {
            let without = call + decode * decoding as u64;
            // The least piece goes into every step.
            let allowed = (5 * without / 2).max(100_000).max(without + 16 * token);
            prop_assert!(took <= allowed + allowed / 10, "{took} of {allowed}: {decoding} decode, {prompt_tokens} tokens");
        }
    }
}
