//! Clients that go away, and clients that do not read.

use std::time::Duration;

use helix_pool::Options;
use helix_wire::error::{Code, CoreError};
use helix_wire::v1::{FinishReason, Finished, GenerateRequest, StopRequest};

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
    assert!(error.message.contains("was not read for"), "{error}");
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

#[tokio::test]
async fn a_stalled_reader_gives_its_slot_up_when_others_wait() {
    let stall_yield = Duration::from_millis(50);
    let patient = Options {
        stream_frames: 4,
        stall_timeout: Duration::from_secs(3600),
        stall_yield,
        ..options()
    };
    let mut pool = start(Alphabet::new(2, 1 << 20), patient).await;
    let first = pool.generate(endless("a")).await.unwrap();
    settled(&pool, 1).await;
    let second = pool.generate(endless("b")).await.unwrap();
    settled(&pool, 2).await;
    tokio::time::sleep(stall_yield * 2).await;
    assert_eq!(pool.pool.stats().parked, 2, "nobody waits");
    assert_eq!(pool.answer(ask("c", 3)).await.texts, ["def"]);
    assert_eq!(pool.pool.stats().parked, 1, "one slot was enough");
    let answer = collect(first).await;
    let error = answer.error.unwrap();
    assert_eq!(error.code, Code::DeadlineExceeded, "the longest wait first");
    let usage = answer.usage.unwrap();
    assert_eq!(usage.completion_tokens, answer.tokens, "all is counted");
    drop(second);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_stopped_ends_with_its_counts() {
    let mut pool = start(Alphabet::new(1, 1 << 20), options()).await;
    let mut stream = pool.generate(ask("a", 1_000_000)).await.unwrap();
    let accepted = stream.message().await.unwrap().unwrap().accepted.unwrap();
    let other = StopRequest {
        call: accepted.call ^ 1,
    };
    pool.client.stop(other).await.unwrap();
    assert!(!stream.message().await.unwrap().unwrap().deltas.is_empty());
    let call = accepted.call;
    pool.client.stop(StopRequest { call }).await.unwrap();
    let (mut reasons, mut usage, mut error) = (Vec::new(), None, None);
    while error.is_none() {
        match stream.message().await {
            Ok(frame) => {
                let frame = frame.expect("no regular end");
                reasons.extend(frame.finished.iter().map(Finished::reason));
                usage = frame.usage.or(usage);
            }
            Err(status) => error = Some(CoreError::from(status).code),
        }
    }
    assert_eq!(reasons, [FinishReason::Cancelled]);
    assert_eq!(error, Some(Code::Cancelled));
    assert!(usage.unwrap().completion_tokens > 0);
    drop(stream);
    until("idle", || pool.pool.is_idle()).await;
    pool.client.stop(StopRequest { call }).await.unwrap();
    assert_eq!(pool.pool.stats().requests_cancelled, 1);
    pool.stop().await.unwrap();
}
