//! Who runs when, and how sequences end.

use helix_sched::{
    Ended, Finish, Limits, NewSequence, Policy, Refusal, Scheduler, Started, Waiting,
};

use crate::{LIMITS, finish_step, ids, prompt, run_alone, scheduler, sequence, step};

#[test]
fn decoding_and_chunked_prefill_share_a_step() {
    let mut s = scheduler(LIMITS);
    s.submit(vec![sequence(1, &prompt(1, 4), 9)]).unwrap();
    step(&mut s);
    s.submit(vec![sequence(2, &prompt(2, 50), 9)]).unwrap();
    let plan = step(&mut s);
    let shape: Vec<_> = plan
        .items
        .iter()
        .map(|i| (i.id, i.past, i.len, i.wanted, i.sample))
        .collect();
    assert_eq!(shape, [(1, 4, 1, 1, true), (2, 0, 31, 0, false)]);
    assert_eq!((plan.tokens[0], plan.tokens.len()), (7, 32));
    let plan = step(&mut s);
    let shape: Vec<_> = plan
        .items
        .iter()
        .map(|i| (i.id, i.past, i.len, i.wanted, i.sample))
        .collect();
    assert_eq!(shape, [(1, 5, 1, 1, true), (2, 31, 19, 1, true)]);
}

#[test]
fn a_budget_of_one_token_alternates() {
    let mut s = scheduler(Limits {
        step_tokens: 1,
        ..LIMITS
    });
    s.submit(vec![sequence(1, &[5], 9)]).unwrap();
    step(&mut s);
    s.submit(vec![sequence(2, &prompt(2, 9), 9)]).unwrap();
    let order: Vec<_> = (0..6).map(|_| ids(&step(&mut s))[0]).collect();
    assert_eq!(order, [1, 2, 1, 2, 1, 2]);
}

#[test]
fn decoding_sequences_take_turns_when_the_budget_is_short() {
    let mut s = scheduler(Limits {
        step_tokens: 3,
        prefix_reuse: false,
        ..LIMITS
    });
    for id in 1..=4 {
        s.submit(vec![sequence(id, &[5], 60)]).unwrap();
    }
    while s.counts().running < 4 {
        step(&mut s);
    }
    let mut served = [0; 5];
    for _ in 0..8 {
        for id in ids(&step(&mut s)) {
            served[usize::try_from(id).unwrap()] += 1;
        }
    }
    assert_eq!(served, [0, 6, 6, 6, 6]);
}

#[test]
fn choices_do_not_wait_for_a_parked_or_cancelled_first_one() {
    for cancel in [true, false] {
        let mut s = scheduler(LIMITS);
        s.submit(vec![
            sequence(1, &prompt(1, 40), 8),
            sequence(2, &prompt(1, 40), 8),
        ])
        .unwrap();
        step(&mut s);
        assert!(if cancel { s.cancel(1) } else { s.park(1) });
        assert_eq!(
            step(&mut s).started[0].cached,
            32,
            "what the first one has computed is used"
        );
    }
}

#[test]
fn echo_without_generation_ends_with_its_prefill() {
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, sequence(1, &prompt(1, 64), 0));
    assert_eq!(
        s.remembered(0).len(),
        63,
        "an idle slot leaves room for a stray position"
    );
    s.submit(vec![NewSequence {
        prompt_logits: true,
        ..sequence(2, &prompt(1, 64), 0)
    }])
    .unwrap();
    let plan = s.schedule();
    assert_eq!(
        (
            plan.items[0].past,
            plan.items[0].wanted,
            plan.items[0].sample
        ),
        (0, 32, false)
    );
    assert_eq!(finish_step(&mut s, &plan), []);
    let plan = s.schedule();
    assert_eq!(
        (
            plan.items[0].past,
            plan.items[0].wanted,
            plan.items[0].sample
        ),
        (32, 32, false)
    );
    assert_eq!(
        finish_step(&mut s, &plan),
        [Ended {
            id: 2,
            finish: Finish::Length
        }]
    );
}

#[test]
fn the_context_ends_a_sequence() {
    let mut s = scheduler(LIMITS);
    s.submit(vec![sequence(1, &prompt(1, 30), 1000)]).unwrap();
    let mut steps = 0;
    let ended = loop {
        let plan = s.schedule();
        steps += 1;
        let ended = finish_step(&mut s, &plan);
        if !ended.is_empty() {
            break ended;
        }
    };
    assert_eq!(
        (steps, ended),
        (
            34,
            vec![Ended {
                id: 1,
                finish: Finish::Context
            }]
        )
    );
}

#[test]
fn refusals_name_the_reason_and_change_nothing() {
    let mut s = scheduler(LIMITS);
    let refused = |s: &mut Scheduler, request| s.submit(request).unwrap_err();
    assert_eq!(
        refused(&mut s, vec![sequence(1, &[], 1)]),
        Refusal::EmptyPrompt { id: 1 }
    );
    let long = Refusal::TooLong {
        id: 2,
        prompt: 64,
        max_len: 64,
    };
    assert_eq!(
        refused(
            &mut s,
            vec![sequence(1, &[1], 1), sequence(2, &prompt(1, 64), 1)]
        ),
        long
    );
    let many: Vec<_> = (0..5).map(|id| sequence(id, &prompt(1, 60), 1)).collect();
    assert_eq!(
        refused(&mut s, many),
        Refusal::TooLarge {
            tokens: 300,
            limit: 256
        }
    );
    assert_eq!(
        refused(&mut s, vec![sequence(1, &[1], 1), sequence(1, &[1], 1)]),
        Refusal::DuplicateId { id: 1 }
    );
    assert!(s.is_idle() && s.waiting().is_empty());
    s.submit(vec![sequence(1, &[1], 1)]).unwrap();
    assert_eq!(
        refused(&mut s, vec![sequence(1, &[1], 1)]),
        Refusal::DuplicateId { id: 1 }
    );
    let wide: Vec<_> = (10..14).map(|id| sequence(id, &prompt(1, 60), 1)).collect();
    s.submit(wide).unwrap();
    let full = Refusal::QueueFull {
        requests: 2,
        tokens: 241,
    };
    assert_eq!(refused(&mut s, vec![sequence(20, &prompt(1, 16), 1)]), full);
    assert!(full.to_string().contains("retry later"));
}

#[test]
fn deadlines_count_only_while_waiting() {
    let mut s = scheduler(Limits { slots: 1, ..LIMITS });
    let due = |id, deadline| NewSequence {
        deadline: Some(deadline),
        ..sequence(id, &[1, 2], 9)
    };
    s.submit(vec![due(1, 5)]).unwrap();
    s.submit(vec![due(2, 9), due(3, 7)]).unwrap();
    step(&mut s);
    assert_eq!(s.next_deadline(), Some(5));
    assert_eq!(s.expire(6), [], "1 has its slot");
    assert_eq!(s.next_deadline(), Some(7));
    assert_eq!((s.expire(7), s.expire(100)), (vec![3], vec![2]));
    assert_eq!((s.next_deadline(), s.counts().running), (None, 1));
}

#[test]
fn parked_sequences_keep_their_slot() {
    let mut s = scheduler(Limits { slots: 2, ..LIMITS });
    s.submit(vec![sequence(1, &[1], 9)]).unwrap();
    s.submit(vec![sequence(2, &[2], 9)]).unwrap();
    step(&mut s);
    s.submit(vec![sequence(3, &[3], 9)]).unwrap();
    assert!(s.park(1));
    assert!(!s.park(3), "a waiting sequence has nothing to park");
    assert_eq!(ids(&step(&mut s)), [2]);
    assert!(s.unpark(1));
    assert_eq!(ids(&step(&mut s)), [1, 2]);
}

#[test]
fn a_sequence_cancelled_under_way_frees_its_slot_and_nothing_else() {
    let mut s = scheduler(Limits { slots: 1, ..LIMITS });
    s.submit(vec![sequence(1, &[1, 2, 3], 9)]).unwrap();
    s.submit(vec![sequence(2, &[1, 2, 4], 9)]).unwrap();
    let plan = s.schedule();
    assert!(s.cancel(1));
    assert_eq!(finish_step(&mut s, &plan), []);
    assert_eq!(
        step(&mut s).started,
        [Started {
            id: 2,
            slot: 0,
            cached: 0,
            resumed: false
        }],
        "the step was not recorded"
    );
}

#[test]
fn a_failed_step_ends_its_sequences_and_distrusts_their_slots() {
    let mut s = scheduler(LIMITS);
    s.submit(vec![sequence(1, &prompt(1, 5), 9)]).unwrap();
    step(&mut s);
    s.submit(vec![sequence(2, &prompt(1, 5), 9)]).unwrap();
    assert!(s.park(1));
    assert_eq!(ids(&s.schedule()), [2]);
    assert_eq!(s.abort_step(), [2]);
    assert_eq!(
        (
            s.remembered(0).len(),
            s.remembered(1).len(),
            s.counts().running
        ),
        (5, 0, 1)
    );
    assert_eq!(s.reset(), [1]);
    assert!(s.is_idle() && s.remembered(0).is_empty());
}

#[test]
fn a_policy_decides_who_is_next() {
    struct Cheapest;
    impl Policy for Cheapest {
        fn next(&mut self, waiting: &Waiting) -> Option<usize> {
            let costs = waiting.iter().map(|request| request.first.max_new);
            costs
                .enumerate()
                .min_by_key(|&(_, cost)| cost)
                .map(|(index, _)| index)
        }
    }
    let mut s = Scheduler::new(Limits { slots: 1, ..LIMITS }, Box::new(Cheapest));
    for (id, max_new) in [(1, 3), (2, 1), (3, 2)] {
        s.submit(vec![sequence(id, &[5], max_new)]).unwrap();
    }
    let order: Vec<_> = (0..6).map(|_| ids(&step(&mut s))[0]).collect();
    assert_eq!(order, [2, 3, 3, 1, 1, 1]);
}
