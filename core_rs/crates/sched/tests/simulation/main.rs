//! Random lives of a scheduler against a simulated engine that checks every cached position.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod checks;
mod world;

use helix_sched::Limits;
use proptest::prelude::*;
use world::{Op, World};

fn limits() -> impl Strategy<Value = Limits> {
    (
        1..6_usize,
        2..24_usize,
        1..8_usize,
        1..120_usize,
        1..12_usize,
        prop::bool::weighted(0.8),
        prop::sample::select(vec![0, 1, 2000]),
    )
        .prop_map(
            |(
                slots,
                max_len,
                queue_requests,
                queue_tokens,
                step_tokens,
                prefix_reuse,
                step_micros,
            )| Limits {
                slots,
                max_len,
                queue_requests,
                queue_tokens,
                step_tokens,
                step_micros,
                prefix_reuse,
            },
        )
}

fn op() -> impl Strategy<Value = Op> {
    let prompt = prop::collection::vec(0..2_u32, 1..20);
    let submit = (
        prop::collection::vec(prompt, 1..3),
        1..4_usize,
        0..9_u32,
        prop::option::weighted(0.3, 0..20_u64),
        prop::bool::weighted(0.15),
        0..6_u8,
    )
        .prop_map(
            |(prompts, copies, max_new, patience, logits, owner)| Op::Submit {
                prompts,
                copies,
                max_new,
                patience,
                logits,
                owner,
            },
        );
    let some = |weight| prop::option::weighted(weight, 0..64_usize);
    let step = (
        some(0.1),
        prop::option::weighted(0.1, 0..6_usize),
        prop::option::weighted(0.05, 0..6_usize),
        any::<bool>(),
    )
        .prop_map(|(cancel, finish, withhold, shuffle)| Op::Step {
            cancel,
            finish,
            withhold,
            shuffle,
        });
    prop_oneof![
        6 => submit,
        1 => (0..64_usize).prop_map(Op::Cancel),
        1 => (0..64_usize).prop_map(Op::Park),
        1 => (0..64_usize).prop_map(Op::Unpark),
        1 => (0..6_u64).prop_map(Op::Expire),
        14 => step,
        1 => Just(Op::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_promise_holds(
        limits in limits(), fair in any::<bool>(), ops in prop::collection::vec(op(), 1..120), reset_at in 0..400_usize
    ) {
        let mut world = World::new(limits, fair);
        for (index, op) in ops.iter().enumerate() {
            world.apply(op);
            if index == reset_at {
                world.apply(&Op::Reset);
            }
        }
        world.drain();
        prop_assert_eq!(world.ended.len(), world.accepted);
    }
}
