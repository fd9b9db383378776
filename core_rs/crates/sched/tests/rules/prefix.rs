//! Where a sequence begins, and from what.

use std::sync::Arc;

use helix_sched::{CopyPrefix, NewSequence, Scheduler, Scope, SeqId, Started};

use crate::{LIMITS, ids, prompt, run_alone, scheduler, sequence, step};

#[test]
fn a_finished_sequence_leaves_its_computed_tokens_behind() {
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, sequence(1, &[1, 2, 3], 3));
    assert_eq!(
        s.remembered(0),
        [1, 2, 3, 7, 7],
        "the last sampled token was never fed"
    );
    s.submit(vec![sequence(2, &[1, 2, 3, 7, 9], 1)]).unwrap();
    let plan = step(&mut s);
    assert_eq!(
        plan.started,
        [Started {
            id: 2,
            slot: 0,
            cached: 4,
            resumed: false
        }]
    );
    assert_eq!(
        (plan.copies.len(), plan.tokens.as_slice()),
        (0, [9].as_slice())
    );
}

#[test]
fn at_least_one_prompt_token_is_computed() {
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, sequence(1, &[1, 2, 3], 3));
    s.submit(vec![sequence(2, &[1, 2, 3], 1)]).unwrap();
    assert_eq!(step(&mut s).started[0].cached, 2);
}

#[test]
fn a_prefix_in_a_busy_slot_is_copied_to_the_lowest_free_one() {
    let mut s = scheduler(LIMITS);
    s.submit(vec![sequence(1, &prompt(1, 10), 30)]).unwrap();
    step(&mut s);
    let mut shared = prompt(1, 8);
    shared.push(99);
    s.submit(vec![sequence(2, &shared, 30)]).unwrap();
    let plan = step(&mut s);
    assert_eq!(
        plan.copies,
        [CopyPrefix {
            src: 0,
            dst: 1,
            len: 8
        }]
    );
    assert_eq!(plan.items[1].past, 8);
}

#[test]
fn an_idle_prefix_above_the_slots_in_use_is_copied_down() {
    let mut s = scheduler(LIMITS);
    s.submit(vec![
        sequence(1, &prompt(1, 5), 2),
        sequence(2, &prompt(2, 5), 2),
    ])
    .unwrap();
    while !s.is_idle() {
        step(&mut s);
    }
    s.submit(vec![sequence(3, &prompt(2, 5), 2)]).unwrap();
    let plan = step(&mut s);
    assert_eq!(
        plan.copies,
        [CopyPrefix {
            src: 1,
            dst: 0,
            len: 4
        }]
    );
    assert_eq!(
        plan.started,
        [Started {
            id: 3,
            slot: 0,
            cached: 4,
            resumed: false
        }]
    );
}

#[test]
fn an_idle_prefix_below_a_slot_in_use_is_used_in_place() {
    let mut s = scheduler(LIMITS);
    let ends = [(1, 2), (2, 2), (3, 40)];
    s.submit(
        ends.map(|(id, max_new)| sequence(u64::from(id), &prompt(id, 5), max_new))
            .to_vec(),
    )
    .unwrap();
    while s.counts().slots_used != 1 {
        step(&mut s);
    }
    s.submit(vec![sequence(4, &prompt(2, 5), 2)]).unwrap();
    let plan = step(&mut s);
    assert_eq!(
        (plan.copies.len(), plan.started[0]),
        (
            0,
            Started {
                id: 4,
                slot: 1,
                cached: 4,
                resumed: false
            }
        )
    );
}

#[test]
fn copies_of_one_plan_may_overwrite_what_an_earlier_one_has_read() {
    let mut s = scheduler(LIMITS);
    s.submit(vec![
        sequence(1, &prompt(1, 5), 1),
        sequence(2, &prompt(2, 5), 1),
    ])
    .unwrap();
    step(&mut s);
    assert!(s.is_idle());
    s.submit(vec![sequence(3, &prompt(2, 6), 1)]).unwrap();
    s.submit(vec![sequence(4, &prompt(1, 6), 1)]).unwrap();
    let plan = step(&mut s);
    assert_eq!(
        plan.copies,
        [CopyPrefix {
            src: 1,
            dst: 0,
            len: 5
        }]
    );
    let cached: Vec<_> = plan
        .started
        .iter()
        .map(|started| (started.id, started.slot, started.cached))
        .collect();
    assert_eq!(
        cached,
        [(3, 0, 5), (4, 1, 0)],
        "slot 0 no longer holds the prompt that 4 shares"
    );
}

#[test]
fn choices_wait_for_the_prefill_of_the_first_and_copy_it() {
    let mut s = scheduler(LIMITS);
    let shared: Arc<[u32]> = prompt(1, 40).into();
    let choice = |id| NewSequence {
        prompt: shared.clone(),
        ..sequence(id, &[], 8)
    };
    s.submit(vec![choice(1), choice(2), choice(3)]).unwrap();
    s.submit(vec![sequence(4, &[5], 8)]).unwrap();
    assert_eq!(ids(&step(&mut s)), [1]);
    assert_eq!(ids(&step(&mut s)), [1], "nobody overtakes");
    let plan = step(&mut s);
    let started: Vec<_> = plan
        .started
        .iter()
        .map(|started| (started.id, started.cached))
        .collect();
    assert_eq!(started, [(2, 39), (3, 39), (4, 0)]);
    assert_eq!(
        plan.copies,
        [
            CopyPrefix {
                src: 0,
                dst: 1,
                len: 39
            },
            CopyPrefix {
                src: 0,
                dst: 2,
                len: 39
            }
        ]
    );
}

#[test]
fn chats_that_take_turns_keep_their_prefixes() {
    let mut s = scheduler(LIMITS);
    let mut chats = [prompt(1, 12), prompt(2, 12), prompt(3, 12)];
    for (id, chat) in (1..).zip(&chats) {
        run_alone(&mut s, sequence(id, chat, 1));
    }
    for (id, chat) in (4..).zip(&mut chats) {
        chat.push(99);
        s.submit(vec![sequence(id, chat, 1)]).unwrap();
        let started = step(&mut s).started;
        assert_eq!((started[0].slot, started[0].cached), (0, 12));
    }
}

#[test]
fn what_would_be_overwritten_moves_to_the_least_recently_used_idle_slot() {
    let mut s = scheduler(LIMITS);
    for (id, seed) in (1..=4).zip(1..) {
        run_alone(&mut s, sequence(id, &prompt(seed, 12), 1));
    }
    // Slot 0 holds the fourth; the others hold 1, 2 and 3, and the first is the oldest.
    assert_eq!(s.remembered(0)[0], 4000);
    let oldest = (1..4).find(|slot| s.remembered(*slot)[0] == 1000).unwrap();
    s.submit(vec![sequence(5, &prompt(5, 12), 1)]).unwrap();
    let plan = step(&mut s);
    let save = CopyPrefix {
        src: 0,
        dst: oldest,
        len: 12,
    };
    assert_eq!(plan.copies, [save]);
    assert_eq!(s.remembered(oldest), prompt(4, 12));
}

#[test]
fn a_failed_step_distrusts_the_slots_it_saved_to() {
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, sequence(1, &prompt(1, 12), 1));
    s.submit(vec![sequence(2, &prompt(2, 12), 1)]).unwrap();
    let saved = s.schedule().copies[0].dst;
    s.abort_step();
    assert!(s.remembered(saved).is_empty());
}

fn of(owner: u128, new: NewSequence) -> NewSequence {
    NewSequence {
        scope: Scope::Owner(owner),
        ..new
    }
}

/// What a caller can learn of one request: cached tokens, tokens computed, copies made.
fn probe(s: &mut Scheduler, new: NewSequence) -> (usize, usize, usize) {
    s.submit(vec![new]).unwrap();
    let (mut cached, mut computed, mut copies) = (0, 0, 0);
    while !s.is_idle() {
        let plan = step(s);
        cached += plan
            .started
            .iter()
            .map(|started| started.cached)
            .sum::<usize>();
        computed += plan.tokens.len();
        copies += plan.copies.len();
    }
    (cached, computed, copies)
}

/// A passphrase of four words of four tokens, each word one of eight, behind a public beginning.
fn passphrase(words: [u32; 4]) -> Vec<u32> {
    let mut tokens = prompt(9, 8);
    for word in words {
        tokens.extend((0..4).map(|at| 500 + 10 * word + at));
    }
    tokens
}

/// Guesses a passphrase word by word, as far as `cached` tells; somebody else's junk flushes in between.
fn guess(victim: u128, attacker: u128, secret: [u32; 4]) -> ([u32; 4], bool) {
    let mut s = scheduler(LIMITS);
    let (mut known, mut told) = ([0; 4], false);
    let mut id: SeqId = 0;
    for position in 0..4 {
        let mut seen = Vec::new();
        for word in 0..8 {
            for junk in 0..8 {
                id += 1;
                run_alone(
                    &mut s,
                    of(attacker, sequence(id, &prompt(100 + junk, 30), 1)),
                );
            }
            run_alone(&mut s, of(victim, sequence(id + 1, &passphrase(secret), 2)));
            id += 2;
            let mut words = known;
            words[position] = word;
            let end = 8 + 4 * (position + 1);
            let tried = &passphrase(words)[..end];
            seen.push((probe(&mut s, of(attacker, sequence(id, tried, 1))), word));
        }
        told |= seen.iter().any(|(what, _)| *what != seen[0].0);
        known[position] = seen.iter().max_by_key(|(what, _)| what.0).unwrap().1;
    }
    (known, told)
}

#[test]
fn nobody_recovers_the_prompt_of_another_owner() {
    let secrets = (0..10).map(|n| [n % 8, (3 * n + 1) % 8, (5 * n + 2) % 8, (n + 6) % 8]);
    for secret in secrets {
        assert_eq!(
            guess(1, 1, secret),
            (secret, true),
            "the attack itself works: within an owner it finds every word"
        );
        let (_, told) = guess(1, 2, secret);
        assert!(!told, "a right guess looks like a wrong one");
    }
}

#[test]
fn choices_of_one_request_share_whoever_they_belong_to() {
    let mut s = scheduler(LIMITS);
    let choice = |id| NewSequence {
        scope: Scope::Request(5),
        ..sequence(id, &prompt(1, 20), 8)
    };
    s.submit(vec![choice(1), choice(2)]).unwrap();
    step(&mut s);
    assert_eq!(step(&mut s).started[0].cached, 19);
    let other = NewSequence {
        scope: Scope::Request(6),
        ..choice(3)
    };
    s.submit(vec![other]).unwrap();
    assert_eq!(step(&mut s).started[0].cached, 0);
}

#[test]
fn what_is_shared_comes_from_anybody_and_nothing_behind_it() {
    let shared = |owner, id, tokens: &[u32]| NewSequence {
        shared: 8,
        ..of(owner, sequence(id, tokens, 1))
    };
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, of(1, sequence(1, &prompt(1, 20), 1)));
    let (cached, computed, _) = probe(&mut s, shared(2, 2, &prompt(1, 20)));
    assert_eq!((cached, computed), (8, 12));
    let mut own = prompt(1, 7);
    own.extend([77, 78, 79]);
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, of(1, sequence(1, &own, 1)));
    let (cached, ..) = probe(&mut s, shared(2, 2, &prompt(1, 20)));
    assert_eq!(cached, 0, "a part of what is shared tells what follows it");
}

#[test]
fn what_was_saved_stays_its_owners() {
    let mut s = scheduler(LIMITS);
    run_alone(&mut s, of(1, sequence(1, &prompt(1, 20), 1)));
    run_alone(&mut s, of(2, sequence(2, &prompt(2, 20), 1)));
    let saved = (1..4).find(|slot| s.remembered(*slot) == prompt(1, 20));
    assert!(
        saved.is_some(),
        "the first prompt has moved to an idle slot"
    );
    assert_eq!(probe(&mut s, of(2, sequence(3, &prompt(1, 20), 1))).0, 0);
    assert_eq!(probe(&mut s, of(1, sequence(4, &prompt(1, 20), 1))).0, 19);
}
