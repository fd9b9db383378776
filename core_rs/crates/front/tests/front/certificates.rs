//! TLS: two kinds of keys, swaps under load, tickets, clients with certificates.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helix_front::{Options, TlsFiles};
use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256};
use rustls::{HandshakeKind, NamedGroup, SignatureScheme};
use tokio::io::AsyncWriteExt as _;

use crate::harness::{Authority, Stage, echo, quick, rest, script, tls, until};

const GET: &str = "GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
const HTTP1: &[&str] = &["http/1.1"];

struct Site {
    stage: Stage,
    authority: Authority,
}

/// With a pair of each kind, and clients of `client_ca` if one is given.
fn site(client_ca: Option<&Authority>, options: Options) -> Site {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let pairs = vec![
        authority.pair(folder.path(), "ecdsa", &PKCS_ECDSA_P256_SHA256),
        authority.pair(folder.path(), "rsa", &PKCS_RSA_SHA256),
    ];
    let ca = client_ca.map(|ca| {
        let path = folder.path().join("clients.pem");
        std::fs::write(&path, &ca.pem).unwrap();
        path
    });
    let files = TlsFiles {
        pairs,
        client_ca: ca,
        client_crl: None,
    };
    let mut stage = Stage::with_tls(options, folder, files);
    stage.worker(script(echo));
    Site { stage, authority }
}

#[tokio::test]
async fn the_clients_signature_algorithms_choose_the_key() {
    let site = site(None, quick());
    let serial = async |only: Option<SignatureScheme>| {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        if let Some(only) = only {
            provider.signature_verification_algorithms.mapping = Box::leak(Box::new(
                provider
                    .signature_verification_algorithms
                    .mapping
                    .iter()
                    .filter(|(scheme, _)| *scheme == only)
                    .copied()
                    .collect::<Vec<_>>()
                    .into_boxed_slice(),
            ));
        }
        let config = Arc::new(site.authority.client_of(provider, None, HTTP1));
        let stream = tls(site.stage.address, &config).await.unwrap();
        let connection = stream.get_ref().1;
        assert_eq!(
            connection.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        let group = connection.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768);
        connection.peer_certificates().unwrap()[0].as_ref().len()
    };
    let (ecdsa, rsa) = (
        serial(None).await,
        serial(Some(SignatureScheme::RSA_PSS_SHA256)).await,
    );
    assert!(
        rsa > ecdsa + 100,
        "an RSA certificate is larger: {ecdsa} {rsa}"
    );
}

#[tokio::test]
async fn connections_are_resumed_by_tickets_also_after_a_swap() {
    let site = site(None, quick());
    let config = Arc::new(site.authority.client(None, HTTP1));
    let ask = async || {
        let mut stream = tls(site.stage.address, &config).await.unwrap();
        stream.write_all(GET.as_bytes()).await.unwrap();
        assert!(rest(&mut stream).await.contains("200 OK"));
        stream.get_ref().1.handshake_kind().unwrap()
    };
    assert_eq!(ask().await, HandshakeKind::Full);
    assert_eq!(ask().await, HandshakeKind::Resumed);
    site.stage.tls.as_ref().unwrap().reload().unwrap();
    assert_eq!(ask().await, HandshakeKind::Resumed);
}

#[tokio::test]
async fn older_tls_and_other_protocols_are_refused() {
    let site = site(None, quick());
    let mut config = site.authority.client(None, HTTP1);
    config.alpn_protocols = vec![b"ftp".to_vec()];
    assert!(tls(site.stage.address, &Arc::new(config)).await.is_err());
    let answer = site.stage.raw(GET).await;
    assert!(
        !answer.contains("HTTP"),
        "plain HTTP on the TLS port is no request: {answer:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_fails_while_certificates_are_swapped() {
    let site = site(None, quick());
    let done = Arc::new(AtomicBool::new(false));
    let (swapper, stop) = (
        Arc::clone(site.stage.tls.as_ref().unwrap()),
        Arc::clone(&done),
    );
    let folder = site.stage.folder.path().to_owned();
    let pem = (
        site.authority.issue(&PKCS_ECDSA_P256_SHA256, None),
        site.authority.issue(&PKCS_ECDSA_P256_SHA256, None),
    );
    let swaps = tokio::spawn(async move {
        for pair in [&pem.0, &pem.1].into_iter().cycle().take(20) {
            std::fs::write(folder.join("ecdsa.crt"), &pair.0).unwrap();
            std::fs::write(folder.join("ecdsa.key"), &pair.1).unwrap();
            swapper.reload().unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        stop.store(true, Ordering::SeqCst);
    });
    let config = Arc::new(site.authority.client(None, HTTP1));
    let mut open = tls(site.stage.address, &config).await.unwrap();
    let mut asked = 0;
    while !done.load(Ordering::SeqCst) || asked < 1000 {
        let requests = (0..20).map(|_| async {
            let mut stream = tls(site.stage.address, &config).await?;
            stream.write_all(GET.as_bytes()).await?;
            std::io::Result::Ok(rest(&mut stream).await)
        });
        for answer in futures_util::future::join_all(requests).await {
            assert!(answer.unwrap().contains("200 OK"));
            asked += 1;
        }
    }
    swaps.await.unwrap();
    open.write_all(GET.as_bytes()).await.unwrap();
    assert!(
        rest(&mut open).await.contains("200 OK"),
        "one from before goes on"
    );
}

#[tokio::test]
async fn bad_files_are_refused_and_the_old_ones_stay() {
    let site = site(None, quick());
    let live = site.stage.tls.as_ref().unwrap();
    let folder = site.stage.folder.path();
    let (cert, _) = site.authority.issue(&PKCS_ECDSA_P256_SHA256, None);
    for (content, said) in [
        (cert.as_str(), "does not belong"),
        ("nonsense", "holds no PEM"),
        ("", "holds no PEM"),
    ] {
        std::fs::write(folder.join("ecdsa.crt"), content).unwrap();
        let error = live.reload().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    std::fs::remove_file(folder.join("ecdsa.crt")).unwrap();
    assert!(
        live.reload()
            .unwrap_err()
            .to_string()
            .contains("cannot be read")
    );
    let config = Arc::new(site.authority.client(None, HTTP1));
    let mut stream = tls(site.stage.address, &config).await.unwrap();
    stream.write_all(GET.as_bytes()).await.unwrap();
    assert!(rest(&mut stream).await.contains("200 OK"));
}

#[tokio::test]
async fn clients_may_show_a_certificate_and_workers_hear_whose() {
    let clients = Authority::new();
    let site = site(Some(&clients), quick());
    let ask = async |own: Option<&(String, String)>| {
        let config = Arc::new(site.authority.client(own, HTTP1));
        let mut stream = tls(site.stage.address, &config).await?;
        stream.write_all(GET.as_bytes()).await?;
        std::io::Result::Ok(rest(&mut stream).await)
    };
    let without = ask(None).await.unwrap();
    assert!(
        without.contains("200 OK") && !without.contains("spiffe"),
        "{without}"
    );
    let own = clients.issue(&PKCS_ECDSA_P256_SHA256, Some("spiffe://example.org/batch"));
    for _ in 0..2 {
        let with = ask(Some(&own)).await.unwrap();
        assert!(
            with.contains("x-helixflow-client-spiffe: spiffe://example.org/batch\n"),
            "{with}"
        );
        let at = with.find("x-helixflow-client-fingerprint: ").unwrap() + 32;
        assert!(
            with[at..at + 64]
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit()),
            "{with}"
        );
    }
    let stranger =
        Authority::new().issue(&PKCS_ECDSA_P256_SHA256, Some("spiffe://example.org/batch"));
    let refused = ask(Some(&stranger)).await;
    assert!(
        refused.is_err()
            || refused
                .as_ref()
                .is_ok_and(|answer| !answer.contains("200 OK")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn authorities_that_change_make_tickets_void() {
    let (clients, others) = (Authority::new(), Authority::new());
    let site = site(Some(&clients), quick());
    let own = clients.issue(&PKCS_ECDSA_P256_SHA256, Some("spiffe://example.org/batch"));
    let config = Arc::new(site.authority.client(Some(&own), HTTP1));
    let mut stream = tls(site.stage.address, &config).await.unwrap();
    stream.write_all(GET.as_bytes()).await.unwrap();
    assert!(rest(&mut stream).await.contains("spiffe"));
    std::fs::write(site.stage.folder.path().join("clients.pem"), &others.pem).unwrap();
    site.stage.tls.as_ref().unwrap().reload().unwrap();
    let again = async {
        let mut stream = tls(site.stage.address, &config).await?;
        stream.write_all(GET.as_bytes()).await?;
        std::io::Result::Ok(rest(&mut stream).await)
    };
    let answer = again.await;
    assert!(
        answer.is_err()
            || answer
                .as_ref()
                .is_ok_and(|answer| !answer.contains("200 OK")),
        "{answer:?}"
    );
}

#[tokio::test]
async fn a_certificate_that_is_good_no_more_ends_its_connections() {
    let (clients, others) = (Authority::new(), Authority::new());
    let site = site(Some(&clients), quick());
    let own = clients.issue(&PKCS_ECDSA_P256_SHA256, Some("spiffe://example.org/batch"));
    let trust = |pem: &str| {
        std::fs::write(site.stage.folder.path().join("clients.pem"), pem).unwrap();
        site.stage.tls.as_ref().unwrap().reload().unwrap();
    };
    let ask = "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".as_bytes();
    let connect = async |own: Option<&(String, String)>| {
        let config = Arc::new(site.authority.client(own, HTTP1));
        let mut stream = tls(site.stage.address, &config).await.unwrap();
        stream.write_all(ask).await.unwrap();
        until(&mut stream, "http: 1.1\n").await;
        stream
    };
    let mut shown = connect(Some(&own)).await;
    let mut none = connect(None).await;
    // Another authority beside it changes nothing for those that are here.
    trust(&format!("{}{}", clients.pem, others.pem));
    shown.write_all(ask).await.unwrap();
    until(&mut shown, "http: 1.1\n").await;
    trust(&others.pem);
    assert_eq!(rest(&mut shown).await.trim(), "");
    none.write_all(ask).await.unwrap();
    until(&mut none, "http: 1.1\n").await;
    assert_eq!(site.stage.count("revoked"), 1);
}

#[tokio::test]
async fn silence_after_the_handshake_costs_a_connection_its_place() {
    let site = site(
        None,
        Options {
            first_byte: Duration::from_millis(100),
            handshake: Duration::from_millis(200),
            ..quick()
        },
    );
    let config = Arc::new(site.authority.client(None, &["h2", "http/1.1"]));
    let mut silent = tls(site.stage.address, &config).await.unwrap();
    let said = rest(&mut silent).await;
    assert!(!said.contains("HTTP"), "frames of HTTP/2 at most: {said}");
    let mut no_hello = site.stage.connect().await;
    assert_eq!(rest(&mut no_hello).await, "");
    assert_eq!(
        (
            site.stage.count("silent"),
            site.stage.count("handshakes_failed")
        ),
        (1, 1)
    );
    let http1 = Arc::new(site.authority.client(None, HTTP1));
    let mut heard = tls(site.stage.address, &http1).await.unwrap();
    heard.write_all(GET.as_bytes()).await.unwrap();
    until(&mut heard, "200 OK").await;
}

#[tokio::test]
async fn handshakes_that_their_clients_leave_hold_up_nobody() {
    let site = site(
        None,
        Options {
            handshakes: 4,
            ..quick()
        },
    );
    let config = Arc::new(site.authority.client(None, HTTP1));
    let mut left = Vec::new();
    for host in 2..10 {
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let mut client = rustls::ClientConnection::new(Arc::clone(&config), name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket
            .bind(format!("127.0.0.{host}:0").parse().unwrap())
            .unwrap();
        let mut stream = socket.connect(site.stage.address).await.unwrap();
        stream.write_all(&hello).await.unwrap();
        // The server has answered, and waits for the rest.
        let answered = tokio::io::AsyncReadExt::read_u8(&mut stream);
        tokio::time::timeout(Duration::from_secs(3), answered)
            .await
            .expect("nobody waits for those who left")
            .unwrap();
        left.push(stream);
    }
    let ask = async {
        let mut stream = tls(site.stage.address, &config).await.unwrap();
        stream.write_all(GET.as_bytes()).await.unwrap();
        rest(&mut stream).await
    };
    let answer = tokio::time::timeout(Duration::from_secs(3), ask).await;
    assert!(answer.expect("nobody waits").contains("200 OK"));
}
