//! Slow readers, too many calls, too long ones, cancelled ones.

use std::time::Duration;

use super::fake::{
    LIMIT, Served, VERIFY, WATCH, call, call_within, client, code, drain, reading, serve, within,
};
use crate::error::Code;

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_stream_is_bounded_and_goes_on() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let mut stream = call(&client, WATCH);
    let (first, incoming) = tokio::join!(within(stream.next()), async {
        let incoming = served.call().await;
        assert!(incoming.reply.send(vec![0; 1024].into()));
        incoming
    });
    first.unwrap().unwrap();
    let mut sent = 1;
    let mut rounds = 0;
    // Refused again and again, until the windows of the connection are full as well.
    while tokio::time::timeout(Duration::from_millis(200), async {
        while incoming.reply.send(vec![0; 1024].into()) {
            sent += 1;
        }
        served.changed().await
    })
    .await
    .is_ok()
    {
        rounds += 1;
        assert!(rounds < 10, "{sent} messages were taken for nobody");
    }
    assert!(sent >= 1024);
    let finished = async {
        assert_eq!(served.changed().await, incoming.id);
        assert!(incoming.reply.send("last".into()));
        incoming.reply.finish(None);
    };
    let (rest, ()) = tokio::join!(drain(stream), finished);
    let rest = rest.unwrap();
    assert_eq!(rest.len(), sent);
    assert_eq!(rest.last().unwrap(), "last");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_open_calls_are_refused() {
    let mut served = serve("127.0.0.1:0", None, 2).await;
    let client = client(&[served.address()]);
    let first = reading(call(&client, VERIFY));
    let held = served.call().await;
    let stream = reading(call(&client, WATCH));
    let other = served.call().await;
    let refused = drain(call(&client, VERIFY)).await.unwrap_err();
    assert_eq!(
        (refused.code, refused.retry_after_s),
        (Code::Unavailable, Some(1))
    );
    assert!(refused.message.contains("busy"), "{refused}");
    held.reply.finish(None);
    drop(held);
    first.await.unwrap().unwrap();
    let again = reading(call(&client, VERIFY));
    served.call().await.reply.finish(None);
    again.await.unwrap().unwrap();
    drop(other);
    stream.await.unwrap().unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_request_is_carried_and_a_larger_one_refused() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let path = || VERIFY.parse().unwrap();
    let large = client.call(path(), vec![7; 8 << 20].into(), String::new(), Some(LIMIT));
    let answer = reading(large);
    let incoming = served.call().await;
    assert_eq!(incoming.message.len(), 8 << 20);
    incoming.reply.finish(Some(incoming.message.clone()));
    assert_eq!(answer.await.unwrap().unwrap()[0].len(), 8 << 20);
    let larger = client.call(
        path(),
        vec![7; (16 << 20) + 1].into(),
        String::new(),
        Some(LIMIT),
    );
    assert_eq!(code(drain(larger).await), Code::PayloadTooLarge);
    assert!(!served.has_call());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_call_on_both_sides() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let answer = reading(call_within(&client, VERIFY, Duration::from_millis(100)));
    let incoming = served.call().await;
    assert_eq!(code(answer.await.unwrap()), Code::DeadlineExceeded);
    assert_eq!(served.changed().await, incoming.id);
    assert!(incoming.reply.is_cancelled());
    assert!(!incoming.reply.send("nobody".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_stream_reaches_the_handler() {
    let mut served = Served::start().await;
    let client = client(&[served.address()]);
    let mut stream = call(&client, WATCH);
    let (first, incoming) = tokio::join!(within(stream.next()), async {
        let incoming = served.call().await;
        incoming.reply.send("one".into());
        incoming
    });
    first.unwrap();
    assert!(!incoming.reply.is_cancelled());
    drop(stream);
    assert_eq!(served.changed().await, incoming.id);
    assert!(incoming.reply.is_cancelled());
}
