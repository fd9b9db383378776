//! Which pool a call goes to, and which pools count.

use std::sync::atomic::Ordering;

use super::fake::{
    Answer, Running, drain, fake, model, quick, ready, request, serve, set_of, until,
};
use crate::client::{PoolSet, State, Transport};
use crate::error::Code;
use crate::v1;

#[tokio::test(flavor = "multi_thread")]
async fn the_least_outstanding_pool_is_chosen() {
    let (one, two) = (
        Running::start(Answer::Hang(1)).await,
        Running::start(Answer::Hang(1)).await,
    );
    let set = set_of(&[&one, &two]).await;
    let mut calls = Vec::new();
    for _ in 0..6 {
        let mut call = set.generate(request("m"));
        call.next().await.unwrap();
        calls.push(call);
    }
    assert_eq!((one.calls(), two.calls()), (3, 3));

    // Free the work of one pool: the next calls go there until both are level again.
    let address = set.pools()[0].address.clone();
    calls.retain(|call| call.pool() != Some(address.clone()));
    assert_eq!(
        set.pools()
            .iter()
            .map(|pool| pool.outstanding)
            .collect::<Vec<_>>(),
        [0, 3]
    );
    for _ in 0..3 {
        let mut call = set.generate(request("alias"));
        call.next().await.unwrap();
        assert_eq!(call.pool(), Some(address.clone()));
        calls.push(call);
    }
    drop(calls);
    assert!(set.pools().iter().all(|pool| pool.outstanding == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_count_as_work() {
    let (one, two) = (
        Running::start(Answer::Hang(1)).await,
        Running::start(Answer::Hang(1)).await,
    );
    let set = set_of(&[&one, &two]).await;
    let mut wide = set.generate(v1::GenerateRequest {
        n: 5,
        ..request("m")
    });
    wide.next().await.unwrap();
    let mut calls = Vec::new();
    for _ in 0..5 {
        let mut call = set.generate(request("m"));
        call.next().await.unwrap();
        assert_ne!(call.pool(), wide.pool());
        calls.push(call);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_dies_is_ejected_and_taken_back() {
    let (one, two) = (
        Running::start(Answer::Text(2)).await,
        Running::start(Answer::Text(2)).await,
    );
    let set = set_of(&[&one, &two]).await;
    let address = one.address();
    drop(one);
    until(&set, |set| set.pools()[0].state == State::Ejected).await;
    assert!(set.pools()[0].last_error.is_some());
    for _ in 0..4 {
        let (_, text, error) = drain(&mut set.generate(request("m"))).await;
        assert_eq!((text.as_str(), error), ("tt", None));
    }
    assert_eq!(two.calls(), 4);

    let back = serve(fake(Answer::Text(1)), &address, None).await;
    until(&set, |set| set.pools()[0].state == State::Ready).await;
    assert_eq!(set.pools()[0].last_error, None);
    for _ in 0..2 {
        drain(&mut set.generate(request("m"))).await;
    }
    assert_eq!(back.calls(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn states_are_followed() {
    let pool = Running::start(Answer::Text(1)).await;
    let set = set_of(&[&pool]).await;
    let tell = |state: v1::PoolState| pool.fake.state.send_replace(state);

    tell(v1::PoolState {
        ready: false,
        ..ready(&[])
    });
    until(&set, |set| set.pools()[0].state == State::NotReady).await;
    assert!(set.models().is_empty());
    let (_, _, error) = drain(&mut set.generate(request("m"))).await;
    assert_eq!(error.unwrap().code, Code::Unavailable);

    tell(v1::PoolState {
        draining: true,
        ..ready(&[model("m", "a")])
    });
    until(&set, |set| set.pools()[0].state == State::Draining).await;
    let (_, _, error) = drain(&mut set.generate(request("m"))).await;
    assert_eq!(error.unwrap().code, Code::Draining);

    tell(ready(&[model("m", "a"), model("other", "b")]));
    until(&set, |set| set.pools()[0].state == State::Ready).await;
    assert_eq!(
        set.models()
            .iter()
            .map(|model| model.id.as_str())
            .collect::<Vec<_>>(),
        ["m", "other"]
    );
    let (_, _, error) = drain(&mut set.generate(request("b"))).await;
    assert_eq!(error, None);
    assert_eq!(pool.fake.calls.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_not_an_unreachable_pool() {
    let pool = Running::start(Answer::Text(1)).await;
    let set = set_of(&[&pool]).await;
    let (_, _, error) = drain(&mut set.generate(request("gpt-9"))).await;
    let error = error.unwrap();
    assert_eq!(
        (error.code, error.param.as_deref()),
        (Code::ModelNotFound, Some("model"))
    );
    assert!(error.message.contains("gpt-9"));

    // Port 1 of loopback: nothing listens there.
    let nobody = PoolSet::start(&["127.0.0.1:1".into()], &Transport::Plain, &quick()).unwrap();
    let (_, _, error) = drain(&mut nobody.generate(request("m"))).await;
    let error = error.unwrap();
    assert_eq!(error.code, Code::Unavailable);
    assert!(
        error.message.starts_with("no inference pool is reachable"),
        "{error}"
    );
}

#[tokio::test]
async fn bad_addresses_are_refused_at_the_start() {
    for bad in ["", "host", "host:", "host:0", "host:99999", ":1", "a b:1"] {
        let Err(error) = PoolSet::start(&[bad.to_owned()], &Transport::Plain, &quick()) else {
            panic!("{bad:?} was taken");
        };
        assert_eq!(
            (error.code, error.param.as_deref()),
            (Code::InvalidRequest, Some("addresses")),
            "{bad:?}"
        );
    }
    assert!(PoolSet::start(&[], &Transport::Plain, &quick()).is_err());
}

#[tokio::test]
async fn plain_connections_stay_on_loopback() {
    // TEST-NET-1 (RFC 5737): refused before a packet is sent.
    let set = PoolSet::start(&["192.0.2.1:8501".into()], &Transport::Plain, &quick()).unwrap();
    until(&set, |set| set.pools()[0].last_error.is_some()).await;
    assert!(
        set.pools()[0]
            .last_error
            .as_ref()
            .unwrap()
            .contains("loopback"),
        "{:?}",
        set.pools()
    );
}
