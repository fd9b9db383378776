//! Clients that go away, and clients that do not read.

use std::time::Duration;

use helix_pool::Options;
use helix_wire::error::Code;
use helix_wire::v1::{FinishReason, GenerateRequest};

use crate::harness::{Alphabet, Answer, Running, ask, collect, options, start, until};

/// Waits until every buffer on the way is full: the sequences stay parked and no step is made any more.
async fn settled(pool: &Running, parked: usize) {
    let mut last = u64::MAX;
    let mut same = 0;
    let quiet = async {
        while same < 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let stats = pool.pool.stats();
            same = if stats.parked == parked && stats.steps == last {
                same + 1
            } else {
                0
            };
            last = stats.steps;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), quiet)
        .await
        .expect("the reader is never behind");
}

/// An answer that never ends by itself and fills every buffer soon.
fn endless(prompt: &str) -> GenerateRequest {
    GenerateRequest {
        logprobs: Some(20),
        ..ask(prompt, 1_000_000)
    }
}

#[tokio::test]
async fn a_dropped_stream_frees_its_slots_at_once() {
    let mut pool = start(Alphabet::new(2, 1 << 20), options()).await;
    let mut running = pool
        .generate(GenerateRequest {
            n: 2,
            ..ask("a", 1_000_000)
        })
        .await
        .unwrap();
    running.message().await.unwrap();
    let waiting = pool.generate(ask("b", 3)).await.unwrap();
    let other = pool.generate(ask("c", 3)).await.unwrap();
    drop(waiting);
    until("the waiting one is gone", || {
        pool.pool.stats().requests_cancelled == 1
    })
    .await;
    drop(running);
    assert_eq!(collect(other).await.texts, ["def"]);
    until("all ended", || {
        pool.pool.stats().requests_finished == 1 && pool.pool.stats().running == 0
    })
    .await;
    assert!(pool.pool.is_idle());
    assert_eq!(pool.pool.stats().requests_cancelled, 2);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn an_unread_stream_is_parked_and_goes_on_when_read() {
    let mut pool = start(
        Alphabet::new(2, 1 << 20),
        Options {
            stream_frames: 8,
            ..options()
        },
    )
    .await;
    let mut unread = pool.generate(endless("a")).await.unwrap();
    settled(&pool, 1).await;
    let steps = pool.pool.stats().steps;
    assert_eq!(
        pool.answer(ask("b", 50)).await.texts[0].len(),
        50,
        "the others go on"
    );
    until("the other is done", || pool.pool.stats().running == 1).await;
    let stats = pool.pool.stats();
    assert_eq!(stats.parked, 1);
    assert!(
        stats.steps <= steps + 51,
        "a parked sequence takes no part in steps"
    );

    let mut answer = Answer::default();
    while u64::from(answer.tokens) < 2 * steps {
        answer.take(unread.message().await.unwrap().unwrap());
    }
    let alphabet: String = ('b'..='z').chain('a'..='a').collect();
    assert!(
        answer.texts[0].starts_with(&alphabet.repeat(20)),
        "nothing is lost or doubled"
    );
    drop(unread);
    until("idle", || pool.pool.is_idle()).await;
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_reader_that_stalls_for_too_long_is_cut() {
    let stall_timeout = Duration::from_millis(50);
    let mut pool = start(
        Alphabet::new(1, 1 << 20),
        Options {
            stream_frames: 4,
            stall_timeout,
            ..options()
        },
    )
    .await;
    let unread = pool.generate(endless("a")).await.unwrap();
    let next = pool.answer(ask("b", 3)).await;
    assert_eq!(next.texts, ["cde"], "the slot is free again");
    let answer = collect(unread).await;
    assert_eq!(answer.reasons, [FinishReason::Error as i32]);
    let error = answer.error.unwrap();
    assert_eq!(error.code, Code::DeadlineExceeded);
    assert!(error.message.contains("not read for 50 ms"), "{error}");
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn all_choices_of_an_unread_request_are_parked() {
    let mut pool = start(
        Alphabet::new(2, 1 << 20),
        Options {
            stream_frames: 2,
            ..options()
        },
    )
    .await;
    let unread = pool
        .generate(GenerateRequest {
            n: 3,
            ..endless("a")
        })
        .await
        .unwrap();
    settled(&pool, 2).await;
    drop(unread);
    until("idle", || pool.pool.is_idle()).await;
    assert_eq!(pool.answer(ask("b", 3)).await.texts, ["cde"]);
    pool.stop().await.unwrap();
}
