//! Who gets in, and what the others are told.

use std::time::Duration;

use helix_tls::{ClientTls, HandshakeError, ServerTls};
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, ProtocolVersion};
use tokio::net::TcpStream;

use crate::support::{
    CLIENT, Ca, Home, Identity, LIMIT, SERVER, answer_raw, call_raw, days, gateway, listen, meet,
    names, pair, pool, serial, uri,
};

const H2: &[&[u8]] = &[b"h2"];

fn refusal<T: std::fmt::Debug>(result: Result<T, HandshakeError>) -> String {
    match result {
        Err(HandshakeError::Refused { reason }) => reason,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn a_good_pair_talks_tls13_over_h2_and_knows_who_called() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let mut pair = pair(&server, &client).await;
    pair.works().await;
    assert_eq!(pair.peer.service, "api-gateway");
    assert_eq!(pair.peer, client.own());
    assert_eq!(pair.peer.fingerprint.len(), 64);
    assert!(!pair.peer.serial.is_empty());
    let session = pair.client.get_ref().1;
    assert_eq!(session.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
    assert!(pair.client.get_ref().0.nodelay().unwrap());
    assert!(pair.server.get_ref().0.nodelay().unwrap());
}

#[tokio::test]
async fn sessions_are_never_resumed() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    for _ in 0..3 {
        let mut pair = pair(&server, &client).await;
        pair.works().await;
        assert_eq!(
            pair.client.get_ref().1.handshake_kind(),
            Some(HandshakeKind::Full)
        );
        assert_eq!(pair.client.get_ref().1.tls13_tickets_received(), 0);
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (verdict, told) = call_raw(&server, None, &[&TLS13], H2).await;
    assert_eq!(refusal(verdict), "it sent no certificate");
    assert!(
        told.unwrap_err()
            .to_string()
            .contains("CertificateRequired")
    );
}

#[tokio::test]
async fn the_ca_must_be_ours_even_when_it_has_the_same_name() {
    let (ca, other) = (Ca::new("ca"), Ca::new("ca"));
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let (verdict, _) = call_raw(&server, Some(&other.client("api-gateway")), &[&TLS13], H2).await;
    refusal(verdict);
    refusal(answer_raw(&client, &other.server("inference-pool"), &[&TLS13]).await);

    let stranger = Ca::new("stranger");
    let (verdict, told) = call_raw(
        &server,
        Some(&stranger.client("api-gateway")),
        &[&TLS13],
        H2,
    )
    .await;
    assert_eq!(refusal(verdict), "its certificate was not issued by our CA");
    assert!(told.unwrap_err().to_string().contains("UnknownCA"));
    let verdict = answer_raw(&client, &stranger.server("inference-pool"), &[&TLS13]).await;
    assert_eq!(refusal(verdict), "its certificate was not issued by our CA");
}

#[tokio::test]
async fn a_valid_certificate_of_another_service_is_refused_both_ways() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let (verdict, told) = call_raw(&server, Some(&ca.client("auth-service")), &[&TLS13], H2).await;
    assert_eq!(
        refusal(verdict),
        "it is `auth-service`, and only `api-gateway`, `monitoring` may be here"
    );
    assert!(told.is_err());
    let verdict = answer_raw(&client, &ca.server("auth-service"), &[&TLS13]).await;
    assert_eq!(
        refusal(verdict),
        "it is `auth-service`, and only `inference-pool` may be here"
    );
}

#[tokio::test]
async fn nobody_is_allowed_by_an_empty_list() {
    let ca = Ca::new("ca");
    let home = Home::new(&ca, &ca.server("inference-pool"));
    let server = ServerTls::load(home.files.clone(), Vec::new()).unwrap();
    let (verdict, _) = call_raw(&server, Some(&ca.client("api-gateway")), &[&TLS13], H2).await;
    refusal(verdict);
}

#[tokio::test]
async fn tls12_is_refused_both_ways() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let (verdict, told) = call_raw(&server, Some(&ca.client("api-gateway")), &[&TLS12], H2).await;
    assert!(
        matches!(verdict, Err(HandshakeError::Failed { .. })),
        "{verdict:?}"
    );
    assert!(told.unwrap_err().to_string().contains("ProtocolVersion"));
    let verdict = answer_raw(&client, &ca.server("inference-pool"), &[&TLS12]).await;
    assert!(
        matches!(verdict, Err(HandshakeError::Failed { .. })),
        "{verdict:?}"
    );
}

#[tokio::test]
async fn another_application_protocol_is_refused() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let identity = ca.client("api-gateway");
    let (verdict, told) = call_raw(&server, Some(&identity), &[&TLS13], &[b"http/1.1"]).await;
    assert!(
        matches!(verdict, Err(HandshakeError::Failed { .. })),
        "{verdict:?}"
    );
    assert!(
        told.unwrap_err()
            .to_string()
            .contains("NoApplicationProtocol")
    );
}

/// Each certificate is wrong in one way; the words are what the refusal must mention.
#[tokio::test]
async fn wrong_certificates_are_refused_with_their_reason() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let make = |service: &str,
                purpose: &rcgen::ExtendedKeyUsagePurpose,
                opposite: &rcgen::ExtendedKeyUsagePurpose| {
        let with = |change: &dyn Fn(&mut rcgen::CertificateParams)| {
            ca.issue(service, purpose.clone(), |p| change(p))
        };
        let spiffe = |name: &str| uri(&format!("spiffe://helixflow.local/{name}"));
        vec![
            (
                "its certificate expired on",
                with(&|p| p.not_after = days(-1) + time::Duration::hours(1)),
            ),
            (
                "its certificate is not valid before",
                with(&|p| p.not_before = days(1)),
            ),
            (
                "not for this side",
                ca.issue(service, opposite.clone(), |_| {}),
            ),
            (
                "not for this side",
                with(&|p| p.extended_key_usages.clear()),
            ),
            (
                "no subject alternative names",
                with(&|p| p.subject_alt_names.clear()),
            ),
            (
                "no SPIFFE identity",
                with(&|p| {
                    p.subject_alt_names =
                        vec![rcgen::SanType::DnsName("localhost".try_into().unwrap())];
                }),
            ),
            (
                "more than one URI",
                with(&|p| p.subject_alt_names = vec![spiffe(service), spiffe("auth-service")]),
            ),
            (
                "not an identity of the form",
                with(&|p| {
                    p.subject_alt_names = vec![uri(&format!("spiffe://elsewhere.local/{service}"))];
                }),
            ),
            (
                "is a CA's",
                with(&|p| p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained)),
            ),
        ]
    };
    for (words, identity) in make("api-gateway", &CLIENT, &SERVER) {
        let (verdict, told) = call_raw(&server, Some(&identity), &[&TLS13], H2).await;
        let reason = refusal(verdict);
        assert!(reason.contains(words), "{reason}");
        assert!(told.is_err());
    }
    for (words, identity) in make("inference-pool", &SERVER, &CLIENT) {
        let reason = refusal(answer_raw(&client, &identity, &[&TLS13]).await);
        assert!(reason.contains(words), "{reason}");
    }
}

#[tokio::test]
async fn a_certificate_issued_by_a_leaf_is_refused() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    // A leaf of our CA that signs another certificate: path length 0 and no CA bit must stop it.
    let leaf = Ca::with("api-gateway", |p| p.is_ca = rcgen::IsCa::NoCa);
    let forged = leaf.client("monitoring");
    let chained = Identity {
        cert: format!("{}{}", forged.cert, ca.client("api-gateway").cert),
        key: forged.key,
    };
    let (verdict, _) = call_raw(&server, Some(&chained), &[&TLS13], H2).await;
    refusal(verdict);
}

#[tokio::test]
async fn a_revoked_peer_is_refused_both_ways_and_others_are_not() {
    let ca = Ca::new("ca");
    let home = Home::new(&ca, &ca.server("inference-pool"));
    home.put_crl(&ca.crl(&[7, 8]));
    let server = ServerTls::load(home.files.clone(), names(&["api-gateway"])).unwrap();
    let (verdict, told) = call_raw(
        &server,
        Some(&ca.issue("api-gateway", CLIENT, serial(7))),
        &[&TLS13],
        H2,
    )
    .await;
    assert_eq!(refusal(verdict), "its certificate is revoked");
    assert!(told.unwrap_err().to_string().contains("CertificateRevoked"));

    let home = Home::new(&ca, &ca.issue("api-gateway", CLIENT, serial(9)));
    home.put_crl(&ca.crl(&[7, 8]));
    let client = ClientTls::load(home.files.clone(), "inference-pool".into()).unwrap();
    let verdict = answer_raw(
        &client,
        &ca.issue("inference-pool", SERVER, serial(8)),
        &[&TLS13],
    )
    .await;
    assert_eq!(refusal(verdict), "its certificate is revoked");
    pair(&server, &client).await.works().await;
}

#[tokio::test]
async fn a_silent_client_is_dropped_and_a_silent_server_is_given_up() {
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (_b, client) = gateway(&ca);
    let short = Duration::from_millis(50);
    let (listener, addr) = listen().await;
    let silent = TcpStream::connect(addr).await.unwrap();
    let verdict = server
        .accept_within(listener.accept().await.unwrap().0, short)
        .await
        .map(drop);
    assert!(matches!(verdict, Err(HandshakeError::Timeout { after }) if after == short));
    drop(silent);
    let verdict = client
        .connect("127.0.0.1", addr.port(), short)
        .await
        .map(drop);
    assert!(
        matches!(verdict, Err(HandshakeError::Timeout { .. })),
        "{verdict:?}"
    );
}

#[tokio::test]
async fn what_is_not_tls_is_an_error_and_not_a_hang() {
    use tokio::io::AsyncWriteExt;
    let ca = Ca::new("ca");
    let (_a, server) = pool(&ca);
    let (listener, addr) = listen().await;
    let mut plain = TcpStream::connect(addr).await.unwrap();
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let verdict = server
        .accept(listener.accept().await.unwrap().0)
        .await
        .map(drop);
    assert!(
        matches!(verdict, Err(HandshakeError::Failed { .. })),
        "{verdict:?}"
    );
}

#[tokio::test]
async fn nobody_listening_names_the_address() {
    let ca = Ca::new("ca");
    let (_b, client) = gateway(&ca);
    let (listener, addr) = listen().await;
    drop(listener);
    let error = client
        .connect("127.0.0.1", addr.port(), LIMIT)
        .await
        .unwrap_err();
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
}

#[tokio::test]
async fn one_service_on_both_sides_works() {
    let ca = Ca::new("ca");
    let home = Home::new(&ca, &ca.server("inference-pool"));
    let server = ServerTls::load(home.files.clone(), names(&["inference-pool"])).unwrap();
    let home = Home::new(&ca, &ca.client("inference-pool"));
    let client = ClientTls::load(home.files.clone(), "inference-pool".into()).unwrap();
    assert!(meet(&server, &client).await.server.is_ok());
}
