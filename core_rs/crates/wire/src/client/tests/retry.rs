//! When a call goes to another pool, and when it must not.

use super::fake::{Answer, LIMIT, Running, drain, error, request, set_of, until};
use crate::client::{Generation, PoolSet, State};
use crate::error::{Code, CoreError};
use crate::v1;

/// One pool with `answer`, one that answers; calls until the first one was asked.
async fn first_asks(answer: Answer) -> (Running, Running, PoolSet) {
    let (bad, good) = (
        Running::start(answer).await,
        Running::start(Answer::Text(2)).await,
    );
    let set = set_of(&[&bad, &good]).await;
    (bad, good, set)
}

async fn ask_until_called(set: &PoolSet, bad: &Running) -> (usize, String, Option<CoreError>) {
    for _ in 0..4 {
        let before = bad.calls();
        let outcome = drain(&mut set.generate(request("m"))).await;
        if bad.calls() > before {
            return outcome;
        }
    }
    panic!("the first pool was never asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_call_goes_elsewhere() {
    for code in [
        Code::QueueFull,
        Code::Unavailable,
        Code::Draining,
        Code::EngineFailed,
    ] {
        let (bad, good, set) = first_asks(Answer::Refuse(error(code))).await;
        let (accepted, text, failure) = ask_until_called(&set, &bad).await;
        assert_eq!(
            (accepted, text.as_str(), failure),
            (1, "tt", None),
            "{code}"
        );
        assert!(good.calls() >= 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_fails_before_any_text_goes_elsewhere_unseen() {
    let (bad, _good, set) = first_asks(Answer::Fail(0, error(Code::EngineFailed))).await;
    let (accepted, text, failure) = ask_until_called(&set, &bad).await;
    assert_eq!((accepted, text.as_str(), failure), (1, "tt", None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_has_shown_text_never_starts_again() {
    let (bad, good, set) = first_asks(Answer::Fail(1, error(Code::EngineFailed))).await;
    let before = good.calls();
    let mut outcome = (0, String::new(), None);
    for _ in 0..4 {
        outcome = drain(&mut set.generate(request("m"))).await;
        if outcome.2.is_some() {
            break;
        }
    }
    assert_eq!((outcome.0, outcome.1.as_str()), (1, "t"));
    assert_eq!(outcome.2.unwrap(), error(Code::EngineFailed));
    assert_eq!(bad.calls(), 1);
    assert!(good.calls() <= before + 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_that_every_pool_would_repeat_are_final() {
    for code in [
        Code::InvalidRequest,
        Code::ContextLengthExceeded,
        Code::DeadlineExceeded,
        Code::Internal,
    ] {
        let (one, two) = (
            Running::start(Answer::Refuse(error(code))).await,
            Running::start(Answer::Refuse(error(code))).await,
        );
        let set = set_of(&[&one, &two]).await;
        let (accepted, _, failure) = drain(&mut set.generate(request("m"))).await;
        assert_eq!((accepted, failure), (0, Some(error(code))));
        assert_eq!(one.calls() + two.calls(), 1, "{code}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_everywhere_is_told_with_a_time_to_wait() {
    let full = error(Code::QueueFull).with_retry_after(7);
    let (one, two) = (
        Running::start(Answer::Refuse(full.clone())).await,
        Running::start(Answer::Refuse(error(Code::Unavailable))).await,
    );
    let set = set_of(&[&one, &two]).await;
    for _ in 0..2 {
        let (_, _, failure) = drain(&mut set.generate(request("m"))).await;
        assert_eq!(failure, Some(full.clone()));
    }
    assert_eq!((one.calls(), two.calls()), (2, 2));

    *one.fake.answer.lock() = Answer::Refuse(error(Code::QueueFull));
    let (_, _, failure) = drain(&mut set.generate(request("m"))).await;
    assert_eq!(failure.unwrap().retry_after_s, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_a_pool_that_dies() {
    let (dying, good) = (
        Running::start(Answer::Hang(1)).await,
        Running::start(Answer::Hang(1)).await,
    );
    let set = set_of(&[&dying, &good]).await;
    // Two calls to each pool: with level pools, the second of a pair goes where the first one is not.
    let mut shown = Vec::new();
    for _ in 0..2 {
        let mut call = set.generate(request("m"));
        call.next().await.unwrap();
        call.next().await.unwrap();
        shown.push(call);
    }
    *dying.fake.answer.lock() = Answer::Hang(0);
    *good.fake.answer.lock() = Answer::Text(2);
    let mut hidden = Vec::new();
    for _ in 0..2 {
        let mut call = set.generate(request("m"));
        call.next().await.unwrap();
        hidden.push(call);
    }
    let there = |call: &Generation| call.pool() == Some(dying.address().into());
    let mut shown = shown.into_iter().find(there).unwrap();
    let mut hidden = hidden.into_iter().find(there).unwrap();

    drop(dying);
    let (_, _, failure) = drain(&mut shown).await;
    assert_eq!(failure.unwrap().code, Code::Unavailable);
    let (accepted, text, failure) = drain(&mut hidden).await;
    assert_eq!((accepted, text.as_str(), failure), (0, "tt", None));

    drop(good);
    until(&set, |set| {
        set.pools().iter().all(|pool| pool.state == State::Ejected)
    })
    .await;
    let (_, _, failure) = drain(&mut set.generate(request("m"))).await;
    assert_eq!(failure.unwrap().code, Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokenize_and_detokenize_retry_too() {
    let (bad, good) = (
        Running::start(Answer::Refuse(error(Code::Unavailable))).await,
        Running::start(Answer::Text(1)).await,
    );
    let set = set_of(&[&bad, &good]).await;
    let caller = set.caller();
    for _ in 0..2 {
        let request = v1::TokenizeRequest {
            model: "alias".into(),
            input: None,
            add_special_tokens: true,
        };
        let work = caller.tokenize(request, "req-2", LIMIT);
        let (reply, pool) = tokio::time::timeout(LIMIT, work).await.unwrap().unwrap();
        assert_eq!(
            (reply.tokens, &*pool),
            (vec![1, 7], good.address().as_str())
        );
    }
    assert!(bad.calls() >= 1);
    let request = v1::DetokenizeRequest {
        model: "m".into(),
        tokens: vec![4, 5],
    };
    assert_eq!(
        caller
            .detokenize(request, "req-3", LIMIT)
            .await
            .unwrap()
            .0
            .text,
        "[4, 5]"
    );
    let request = v1::DetokenizeRequest {
        model: "nope".into(),
        tokens: vec![],
    };
    assert_eq!(
        caller
            .detokenize(request, "req-4", LIMIT)
            .await
            .unwrap_err()
            .code,
        Code::ModelNotFound
    );
}
