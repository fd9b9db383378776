//! Shares of an engine under load: who gets how much, and who waits how long, in steps.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_precision_loss)]

mod load;

use helix_sched::{Fcfs, Owner};
use proptest::prelude::*;

use crate::load::{Run, Shape, Tenant, fair, jain};

const INTERACTIVE: Shape = Shape {
    prompt: 24,
    answer: 12,
    choices: 1,
};
const LONG_ANSWERS: Shape = Shape {
    prompt: 8,
    answer: 400,
    choices: 1,
};
const LONG_PROMPTS: Shape = Shape {
    prompt: 600,
    answer: 4,
    choices: 1,
};
const WIDE: Shape = Shape {
    prompt: 16,
    answer: 60,
    choices: 1024,
};

fn organisation(number: u128, weight: f64) -> Owner {
    Owner {
        organisation: number,
        organisation_weight: weight,
        ..Owner::default()
    }
}

fn key(organisation: u128, key: u128) -> Owner {
    Owner {
        organisation,
        key,
        ..Owner::default()
    }
}

/// Steps from arrival to the first token of one more client beside `others`: the longest, and of how many.
fn longest_wait(policy: Box<dyn helix_sched::Policy>, others: &[Tenant]) -> (usize, usize) {
    let mut run = Run::new(16, policy);
    run.tenants = others.to_vec();
    run.tenants
        .push(Tenant::closed(organisation(99, 1.0), INTERACTIVE, 1));
    run.steps(1500);
    let waits = &run.waits[others.len()];
    (*waits.iter().max().unwrap(), waits.len())
}

/// The client is served as if it were alone.
fn is_not_delayed(others: &[Tenant]) {
    let (wait, requests) = longest_wait(fair(), others);
    assert_eq!(wait, 1, "{others:?}");
    assert!(requests > 100, "{requests} {others:?}");
}

#[test]
fn a_flood_does_not_delay_another_organisation() {
    let floods = [
        Tenant::closed(organisation(1, 1.0), INTERACTIVE, 100),
        Tenant::closed(organisation(1, 1.0), LONG_ANSWERS, 100),
        Tenant::closed(organisation(1, 1.0), LONG_PROMPTS, 100),
        Tenant::closed(organisation(1, 1.0), WIDE, 1),
    ];
    is_not_delayed(&[]);
    for flood in floods {
        is_not_delayed(&[flood]);
    }
    let (wait, _) = longest_wait(Box::new(Fcfs), &[floods[0]]);
    assert!(wait > 50, "the flood is one: {wait}");
}

#[test]
fn a_flood_of_one_key_does_not_delay_another_key_of_its_organisation() {
    let flood = Tenant::closed(key(99, 7), LONG_ANSWERS, 100);
    is_not_delayed(&[flood]);
}

#[test]
fn weights_are_kept() {
    for (first, second) in [
        (INTERACTIVE, INTERACTIVE),
        (LONG_ANSWERS, LONG_ANSWERS),
        (LONG_ANSWERS, INTERACTIVE),
        (LONG_PROMPTS, LONG_ANSWERS),
    ] {
        for weights in [(3.0, 1.0), (1.0, 3.0)] {
            let mut run = Run::new(16, fair());
            run.tenants = vec![
                Tenant::closed(organisation(1, weights.0), first, 50),
                Tenant::closed(organisation(2, weights.1), second, 50),
            ];
            run.steps(6000);
            let ratio = run.service[0] / run.service[1] / (weights.0 / weights.1);
            assert!(
                (0.95..1.05).contains(&ratio),
                "{first:?} {second:?} {weights:?}: {ratio}"
            );
        }
    }
}

#[test]
fn equal_organisations_get_equal_shares_whatever_they_send() {
    let shapes = [INTERACTIVE, LONG_ANSWERS, LONG_PROMPTS, WIDE];
    for count in [2, 5, 10, 40] {
        let mut run = Run::new(16, fair());
        run.tenants = (0..count)
            .map(|number| {
                let shape = shapes[number % shapes.len()];
                let clients = if shape.choices > 1 { 1 } else { 20 };
                Tenant::closed(organisation(number as u128, 1.0), shape, clients)
            })
            .collect();
        run.steps(8000);
        let fairness = jain(&run.service);
        assert!(
            fairness >= 0.95,
            "{count} organisations: {fairness} {:?}",
            run.service
        );
    }
}

#[test]
fn many_keys_are_no_larger_claim_than_one() {
    let mut run = Run::new(16, fair());
    run.tenants = (0..9)
        .map(|n| Tenant::closed(key(1, n), INTERACTIVE, 10))
        .collect();
    run.tenants.push(Tenant::closed(key(2, 0), INTERACTIVE, 20));
    run.steps(6000);
    let nine: f64 = run.service[..9].iter().sum();
    let ratio = nine / run.service[9];
    assert!((0.95..1.05).contains(&ratio), "{ratio}");
    assert!(jain(&run.service[..9]) >= 0.95, "{:?}", run.service);
}

#[test]
fn requests_of_one_key_take_turns() {
    let mut run = Run::new(16, fair());
    run.tenants = vec![
        Tenant::closed(key(1, 1), WIDE, 1),
        Tenant::closed(key(1, 1), INTERACTIVE, 1),
    ];
    run.steps(2000);
    let worst = run.waits[1].iter().max().unwrap();
    // A slot has to become free, and the request before it has its turn too: 1,024 sequences would take 4,000 steps.
    assert!(*worst <= 70, "{worst}");
}

/// More organisations than get two slots each: who has none would take one from whoever has two, and so on in a circle.
#[test]
fn organisations_of_equal_size_do_not_take_slots_from_each_other_in_turn() {
    let mut run = Run::new(16, fair());
    run.tenants = (1..=11)
        .map(|number| {
            let shape = Shape {
                prompt: 64,
                answer: 100,
                choices: 1,
            };
            Tenant::closed(organisation(number, 1.0), shape, 4)
        })
        .collect();
    run.steps(4000);
    let lost = run.again as f64 / run.computed as f64;
    assert!(lost < 0.03, "{lost} of all tokens computed again");
    assert!(jain(&run.service) > 0.99, "{:?}", run.service);
}

#[test]
fn a_lone_organisation_loses_nothing() {
    for shape in [INTERACTIVE, LONG_ANSWERS, LONG_PROMPTS, WIDE] {
        let served = |policy| {
            let mut run = Run::new(16, policy);
            let clients = if shape.choices > 1 { 1 } else { 40 };
            run.tenants = vec![Tenant::closed(organisation(1, 1.0), shape, clients)];
            run.steps(1500);
            assert_eq!(run.interruptions, 0, "there is nobody to give a slot to");
            run.service[0]
        };
        let (ours, theirs) = (served(fair()), served(Box::new(Fcfs)));
        assert!(
            (ours / theirs - 1.0).abs() < 0.005,
            "{shape:?}: {ours} {theirs}"
        );
    }
}

#[test]
fn who_is_interrupted_has_little_to_compute_again() {
    let mut run = Run::new(16, fair());
    let visitors = Tenant::closed(organisation(2, 1.0), INTERACTIVE, 4);
    run.tenants = vec![
        Tenant::closed(organisation(1, 1.0), LONG_ANSWERS, 100),
        visitors.pausing(30),
    ];
    run.steps(3000);
    assert!(run.interruptions > 100, "{}", run.interruptions);
    // Contexts are 200 tokens long on average.
    assert!(
        run.again < 200 * run.interruptions,
        "{} in {}",
        run.again,
        run.interruptions
    );
    assert_eq!(*run.waits[1].iter().max().unwrap(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Organisations that always have work waiting are served in proportion to their weights, and everything ends.
    #[test]
    fn whoever_always_waits_gets_their_share(
        slots in 4..24_usize,
        tenants in prop::collection::vec((1..5_u8, 1..60_usize, 1..40_usize, 1..6_usize), 2..6),
    ) {
        let mut run = Run::new(slots, fair());
        run.tenants = tenants
            .iter()
            .enumerate()
            .map(|(number, &(weight, prompt, answer, choices))| {
                let shape = Shape { prompt, answer, choices };
                let owner = organisation(number as u128, f64::from(weight));
                Tenant::closed(owner, shape, slots + 2)
            })
            .collect();
        run.steps(2000);
        let shares: Vec<f64> = run
            .service
            .iter()
            .zip(&tenants)
            .map(|(service, (weight, ..))| service / f64::from(*weight))
            .collect();
        let (least, most) = shares.iter().fold((f64::MAX, 0.0_f64), |(l, m), s| (l.min(*s), m.max(*s)));
        // No more apart than all slots can run ahead before a policy is asked again.
        let bound = 3.0 * slots as f64 * (60.0 + 2.0 * 40.0);
        prop_assert!(most - least <= bound.max(0.1 * most), "{shares:?}");
        run.drain();
        prop_assert!(run.scheduler.is_idle());
    }
}
