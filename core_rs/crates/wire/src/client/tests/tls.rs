//! Pools behind mutual TLS.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use helix_tls::{ClientTls, Files, ServerTls};
use rcgen::ExtendedKeyUsagePurpose;

use super::fake::{Answer, Running, drain, fake, quick, request, serve, until};
use crate::client::{PoolSet, State, Transport};
use crate::error::Code;
use crate::testing::Ca;

fn set_at(pool: &Running, files: Files) -> (PoolSet, Arc<ClientTls>) {
    let tls = Arc::new(ClientTls::load(files, "inference-pool".into()).unwrap());
    let set = PoolSet::start(
        &[pool.address()],
        &Transport::Tls(Arc::clone(&tls)),
        &quick(),
    )
    .unwrap();
    (set, tls)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_go_on_while_certificates_change() {
    let ca = Ca::new();
    let pool = serve(
        fake(Answer::Flood),
        "127.0.0.1:0",
        Some(ca.server("inference-pool")),
    )
    .await;
    let (set, tls) = set_at(&pool, ca.client());
    until(&set, |set| set.pools()[0].state == State::Ready).await;
    let mut running = set.generate(request("m"));
    running.next().await.unwrap();

    ca.client();
    tls.reload().unwrap();
    until(&set, |_| pool.fake.watches.load(Ordering::Relaxed) == 2).await;
    for _ in 0..500 {
        assert!(running.next().await.unwrap().is_some());
    }
    *pool.fake.answer.lock() = Answer::Text(3);
    let (_, text, error) = drain(&mut set.generate(request("m"))).await;
    assert_eq!((text.as_str(), error), ("ttt", None));
    assert!(running.next().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_service_is_not_a_pool() {
    let ca = Ca::new();
    let impostor = serve(
        fake(Answer::Text(1)),
        "127.0.0.1:0",
        Some(ca.server("monitoring")),
    )
    .await;
    let (set, _tls) = set_at(&impostor, ca.client());
    until(&set, |set| set.pools()[0].last_error.is_some()).await;
    let reason = set.pools()[0].last_error.clone().unwrap();
    assert!(reason.contains("monitoring"), "{reason}");
    let (_, _, error) = drain(&mut set.generate(request("m"))).await;
    assert_eq!(error.unwrap().code, Code::Unavailable);
    assert_eq!(impostor.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_refuses_us_is_ejected_with_its_reason() {
    let ca = Ca::new();
    let files = ca.issue(
        "inference-pool",
        "inference-pool",
        ExtendedKeyUsagePurpose::ServerAuth,
    );
    let strict = Arc::new(ServerTls::load(files, vec!["monitoring".into()]).unwrap());
    let pool = serve(fake(Answer::Text(1)), "127.0.0.1:0", Some(strict)).await;
    let (set, _tls) = set_at(&pool, ca.client());
    until(&set, |set| set.pools()[0].state == State::Ejected).await;
    assert!(set.pools()[0].last_error.is_some());
    assert_eq!(pool.fake.watches.load(Ordering::Relaxed), 0);
}
