//! Mutual TLS: names of callers, servers that are not who they should be, new certificates.

use std::sync::Arc;

use helix_tls::ClientTls;

use super::fake::{LIMIT, VERIFY, WATCH, call, code, drain, quick, reading, serve, within};
use crate::error::Code;
use crate::rpc::{Client, Transport};
use crate::testing::Ca;

fn connect(address: String, ca: &Ca) -> (Client, Arc<ClientTls>) {
    let tls = Arc::new(ClientTls::load(ca.client(), "auth-service".into()).unwrap());
    let transport = Transport::Tls(Arc::clone(&tls));
    let client = Client::start(&[address], "auth-service", &transport, &quick()).unwrap();
    (client, tls)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_is_known_by_its_certificate_and_may_renew_it() {
    let ca = Ca::new();
    let mut served = serve("127.0.0.1:0", Some(ca.server("auth-service")), 8).await;
    let (client, tls) = connect(served.address(), &ca);
    let mut stream = call(&client, WATCH);
    let (first, watching) = tokio::join!(within(stream.next()), async {
        let watching = served.call().await;
        watching.reply.send("one".into());
        watching
    });
    first.unwrap();
    let before = watching.caller.as_ref().unwrap().address;

    ca.client();
    tls.reload().unwrap();
    let after = tokio::time::timeout(LIMIT, async {
        loop {
            let answer = reading(call(&client, VERIFY));
            let incoming = served.call().await;
            incoming.reply.finish(None);
            answer.await.unwrap().unwrap();
            let caller = incoming.caller.clone().unwrap();
            assert_eq!(caller.service.as_deref(), Some("api-gateway"));
            if caller.address != before {
                return caller.address;
            }
        }
    })
    .await
    .expect("calls stayed on the old connection");
    assert_ne!(after, before);
    // The stream of the old connection goes on.
    watching.reply.finish(Some("two".into()));
    assert_eq!(drain(stream).await.unwrap(), ["two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_service_is_not_called() {
    let ca = Ca::new();
    let mut impostor = serve("127.0.0.1:0", Some(ca.server("monitoring")), 8).await;
    let (client, _tls) = connect(impostor.address(), &ca);
    assert_eq!(code(drain(call(&client, VERIFY)).await), Code::Unavailable);
    let reason = client.last_error().unwrap();
    assert!(reason.contains("monitoring"), "{reason}");
    assert!(!impostor.has_call());
}
