//! Deadlines that are kept here, and calls that are stopped.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::fake::{Answer, LIMIT, Running, drain, error, request, set_of};
use crate::error::Code;
use crate::v1;

fn short(model: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        timeout_ms: 50,
        ..request(model)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_says_nothing_does_not_hold_a_deadline() {
    let mute = Running::start(Answer::Mute).await;
    let set = set_of(&[&mute]).await;
    let mut call = set.generate(short("m"));
    let (accepted, _, failure) = drain(&mut call).await;
    assert_eq!(accepted, 0);
    assert_eq!(failure.unwrap().code, Code::DeadlineExceeded);
    drop(call);
    mute.saw_cancel().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_a_slot_has_no_deadline_any_more() {
    let hanging = Running::start(Answer::Hang(1)).await;
    let set = set_of(&[&hanging]).await;
    let mut call = set.generate(short("m"));
    assert!(call.next().await.unwrap().unwrap().accepted.is_some());
    assert!(call.next().await.unwrap().is_some());
    let silent = timeout(Duration::from_millis(400), call.next()).await;
    assert!(silent.is_err(), "{silent:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_pool_is_told_what_is_left() {
    let full = Answer::Refuse(error(Code::QueueFull));
    let (one, two) = (
        Running::start(full.clone()).await,
        Running::start(full).await,
    );
    let set = set_of(&[&one, &two]).await;
    let asked = v1::GenerateRequest {
        timeout_ms: 60_000,
        ..request("m")
    };
    drain(&mut set.generate(asked)).await;
    let mut told = [&one, &two].map(|pool| pool.fake.seen_timeouts.lock().clone());
    told.sort();
    assert_eq!(told[0], [""], "the first one has it in the request");
    assert_eq!(told[1].len(), 1);
    assert!(!told[1][0].is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn short_calls_are_bounded_too() {
    let mute = Running::start(Answer::Mute).await;
    let set = set_of(&[&mute]).await;
    let asked = v1::TokenizeRequest {
        model: "m".into(),
        ..Default::default()
    };
    let caller = set.caller();
    let asking = caller.tokenize(asked, "", Duration::from_millis(50));
    let failure = timeout(LIMIT, asking).await.unwrap().unwrap_err();
    assert_eq!(failure.code, Code::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_stopped_still_brings_its_counts() {
    let hanging = Running::start(Answer::Hang(0)).await;
    let set = set_of(&[&hanging]).await;
    let mut call = set.generate(request("m"));
    assert!(call.stop().await.is_err(), "it is at no pool yet");
    let mut call = set.generate(request("m"));
    call.next().await.unwrap();
    let asked = Instant::now();
    call.stop().await.unwrap();
    let (mut usage, mut end) = (None, None);
    while end.is_none() {
        match timeout(LIMIT, call.next()).await.unwrap() {
            Ok(Some(frame)) => usage = frame.usage.or(usage),
            Ok(None) => panic!("a regular end"),
            Err(error) => end = Some(error.code),
        }
    }
    assert!(usage.is_some());
    assert_eq!(end, Some(Code::Cancelled), "after {:?}", asked.elapsed());
}
