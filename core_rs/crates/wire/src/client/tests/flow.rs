//! Cancelling, slow readers, silent pools.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::fake::{Answer, LIMIT, Running, drain, quick, request, set_of, until};
use crate::client::{Options, PoolSet, State, Transport};
use crate::error::Code;

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_call_reaches_the_pool() {
    let pool = Running::start(Answer::Hang(1)).await;
    let set = set_of(&[&pool]).await;
    let mut call = set.generate(request("m"));
    call.next().await.unwrap();
    assert_eq!(pool.fake.seen_ids.lock().as_slice(), ["req-1"]);
    drop(call);
    pool.saw_cancel().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_cancelled_calls_leave_the_connection_alive() {
    let pool = Running::start(Answer::Flood).await;
    let set = set_of(&[&pool]).await;
    let mut kept = set.generate(request("m"));
    kept.next().await.unwrap();
    for _ in 0..30 {
        let mut calls: Vec<_> = (0..100).map(|_| set.generate(request("m"))).collect();
        for call in &mut calls {
            call.next().await.unwrap();
        }
    }
    assert!(kept.next().await.unwrap().is_some());
    assert_eq!(set.pools()[0].state, State::Ready);
    assert_eq!(set.pools()[0].outstanding, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_call_is_bounded_and_holds_up_nobody() {
    let pool = Running::start(Answer::Flood).await;
    let set = set_of(&[&pool]).await;
    let mut unread: Vec<_> = (0..20).map(|_| set.generate(request("m"))).collect();
    for call in &mut unread {
        call.next().await.unwrap();
    }
    // Every unread call fills its windows and buffers; then the pool's counter stands still.
    let mut before = usize::MAX;
    let settled = async {
        loop {
            let now = pool.fake.sent.load(Ordering::Relaxed);
            if now == before {
                return now;
            }
            before = now;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let frames = tokio::time::timeout(LIMIT, settled)
        .await
        .expect("the pool never stopped sending");
    // 64 KiB of window and 64 KiB of the server's buffers per call, one KiB a frame.
    assert!(frames < 20 * 200, "{frames} frames were sent to nobody");

    *pool.fake.answer.lock() = Answer::Text(500);
    let (_, text, error) = drain(&mut set.generate(request("m"))).await;
    assert_eq!((text.len(), error), (500, None));
    for call in &mut unread {
        for _ in 0..300 {
            assert!(call.next().await.unwrap().is_some());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_accepts_and_stays_silent_is_never_ready() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let options = Options {
        connect_timeout: Duration::from_millis(50),
        ..quick()
    };
    let set = PoolSet::start(&[address], &Transport::Plain, &options).unwrap();
    let _held = tokio::time::timeout(LIMIT, listener.accept())
        .await
        .unwrap()
        .unwrap();
    until(&set, |set| set.pools()[0].state == State::Ejected).await;
    let (_, _, error) = drain(&mut set.generate(request("m"))).await;
    assert_eq!(error.unwrap().code, Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_freezes_is_noticed_by_ping() {
    let pool = Running::start(Answer::Hang(1)).await;
    let relay = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = relay.local_addr().unwrap().to_string();
    let target = pool.address();
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
    let set = PoolSet::start(&[address], &Transport::Plain, &options).unwrap();
    until(&set, |set| set.pools()[0].state == State::Ready).await;
    let mut call = set.generate(request("m"));
    assert!(call.next().await.unwrap().unwrap().accepted.is_some());
    call.next().await.unwrap();
    freeze.send_replace(true);
    let (_, _, error) = drain(&mut call).await;
    assert_eq!(error.unwrap().code, Code::Unavailable);
    until(&set, |set| set.pools()[0].state == State::Ejected).await;
}
