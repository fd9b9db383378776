//! Servers that go away, come back, and send calls elsewhere.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fake::{
    LIMIT, Served, VERIFY, WATCH, call, call_within, client, code, drain, quick, reading, serve,
    within,
};
use crate::error::{Code, CoreError};
use crate::rpc::{Client, Options, Transport};

#[tokio::test(flavor = "multi_thread")]
async fn the_next_server_takes_over_and_the_first_comes_back() {
    let first = Served::start().await.answer_all("first");
    let second = Served::start().await.answer_all("second");
    let (at, next) = (first.address.clone(), second.address.clone());
    let client = client(&[at.clone(), next]);
    assert_eq!(drain(call(&client, VERIFY)).await.unwrap(), ["first"]);
    drop(first);
    until(&client, VERIFY, "second").await;
    let back = serve(&at, None, 8).await.answer_all("first");
    // The one that works is kept.
    assert_eq!(drain(call(&client, VERIFY)).await.unwrap(), ["second"]);
    drop(second);
    until(&client, VERIFY, "first").await;
    assert_eq!(back.count.load(Ordering::Relaxed), 1);
}

/// Calls until this answer comes; the connection breaks at a moment of its own.
async fn until(client: &Client, path: &'static str, expected: &str) {
    let calls = async {
        loop {
            if let Ok(answer) = drain(call(client, path)).await
                && answer == [expected]
            {
                return;
            }
        }
    };
    within(calls).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_not_there_is_found_by_a_waiting_call() {
    let held = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = held.local_addr().unwrap().to_string();
    drop(held);
    let client = client(std::slice::from_ref(&address));
    let waiting = reading(call(&client, VERIFY));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let _served = serve(&address, None, 8).await.answer_all("here");
    assert_eq!(waiting.await.unwrap().unwrap(), ["here"]);
    assert_eq!(client.last_error(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_unavailable_within_the_time_of_the_call() {
    let client = client(&["127.0.0.1:1".to_owned()]);
    let started = Instant::now();
    let short = call_within(&client, VERIFY, Duration::from_millis(50));
    let refused = drain(short).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(500));
    assert_eq!(refused.code, Code::Unavailable);
    assert!(refused.message.contains("auth-service"), "{refused}");
    let longer = drain(call(&client, VERIFY)).await;
    assert_eq!(code(longer), Code::Unavailable);
    assert!(started.elapsed() < Duration::from_secs(3));
    assert!(client.last_error().unwrap().starts_with("127.0.0.1:1: "));
    assert_eq!(client.server(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_had_begun_is_not_sent_twice() {
    let mut first = Served::start().await;
    let mut second = Served::start().await;
    let client = client(&[first.address(), second.address()]);
    let answer = reading(call(&client, VERIFY));
    let _incoming = first.call().await;
    drop(first);
    assert_eq!(code(answer.await.unwrap()), Code::Unavailable);
    let later = reading(call(&client, VERIFY));
    second.call().await.reply.finish(None);
    later.await.unwrap().unwrap();
    assert!(!second.has_call());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_server_sends_calls_to_the_next() {
    let mut first = Served::start().await;
    let second = Served::start().await.answer_all("second");
    let both = client(&[first.address(), second.address.clone()]);
    let mut stream = call(&both, WATCH);
    let (one, running) = tokio::join!(within(stream.next()), async {
        let running = first.call().await;
        running.reply.send("one".into());
        running
    });
    one.unwrap();
    let answer = reading(call(&both, VERIFY));
    let draining = CoreError::new(Code::Draining, "going");
    first.call().await.reply.fail(draining.clone());
    assert_eq!(answer.await.unwrap().unwrap(), ["second"]);
    // Later calls do not ask again, and the stream goes on.
    assert_eq!(drain(call(&both, VERIFY)).await.unwrap(), ["second"]);
    assert!(!first.has_call());
    running.reply.finish(Some("two".into()));
    assert_eq!(drain(stream).await.unwrap(), ["two"]);

    let alone = client(&[first.address()]);
    let answer = reading(call(&alone, VERIFY));
    first.call().await.reply.fail(draining);
    assert_eq!(code(answer.await.unwrap()), Code::Draining);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_finishes_its_calls_and_gets_no_new_ones() {
    let mut first = Served::start().await;
    let second = Served::start().await.answer_all("second");
    let client = client(&[first.address(), second.address.clone()]);
    let answer = reading(call(&client, VERIFY));
    let incoming = first.call().await;
    let stopping = tokio::spawn(first.server.stop(LIMIT));
    // The server says so at once, and calls that come too early are its last.
    let elsewhere = within(async {
        loop {
            let calls = drain(call_within(&client, VERIFY, Duration::from_millis(100)));
            if let Ok(answer) = calls.await {
                return answer;
            }
        }
    });
    assert_eq!(elsewhere.await, ["second"]);
    incoming.reply.finish(Some("first".into()));
    assert_eq!(answer.await.unwrap().unwrap(), ["first"]);
    within(stopping).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_freezes_is_noticed_by_ping() {
    let mut served = Served::start().await;
    let relay = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = relay.local_addr().unwrap().to_string();
    let target = served.address();
    let (freeze, mut frozen) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        let (mut near, _) = relay.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = frozen.changed() => {}
        }
        // Both ends stay open, and nothing moves any more.
        std::future::pending::<()>().await;
    });
    let options = Options {
        ping_interval: Duration::from_millis(20),
        ping_timeout: Duration::from_millis(200),
        connect_timeout: Duration::from_millis(200),
        ..quick()
    };
    let client = Client::start(&[address], "auth-service", &Transport::Plain, &options).unwrap();
    let mut stream = call(&client, WATCH);
    let (first, _incoming) = tokio::join!(within(stream.next()), async {
        let incoming = served.call().await;
        incoming.reply.send("one".into());
        incoming
    });
    first.unwrap();
    freeze.send_replace(true);
    let cut = within(stream.next()).await.unwrap_err();
    assert_eq!(cut.code, Code::Unavailable);
    assert!(cut.message.contains("auth-service"), "{cut}");
}
