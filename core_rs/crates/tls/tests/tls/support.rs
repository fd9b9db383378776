//! A CA, certificates of every quality, and peers that check nothing.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use helix_tls::{ClientTls, Files, HandshakeError, Peer, ServerTls};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme, SupportedProtocolVersion,
};
use tempfile::TempDir;
use time::{Duration as Days, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub(crate) const LIMIT: Duration = Duration::from_secs(5);
pub(crate) const SERVER: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ServerAuth;
pub(crate) const CLIENT: ExtendedKeyUsagePurpose = ExtendedKeyUsagePurpose::ClientAuth;

pub(crate) fn days(n: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() + Days::days(n)
}

pub(crate) struct Ca {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, |_| {})
    }

    pub(crate) fn with(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = days(-1);
        params.not_after = days(3650);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate of `service`, with `change` applied to what would be right.
    pub(crate) fn issue(
        &self,
        service: &str,
        purpose: ExtendedKeyUsagePurpose,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, service);
        params.subject_alt_names = vec![uri(&format!("spiffe://helixflow.local/{service}"))];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.not_before = days(-1);
        params.not_after = days(365);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        Identity {
            cert: cert.pem(),
            key: key.serialize_pem(),
        }
    }

    pub(crate) fn server(&self, service: &str) -> Identity {
        self.issue(service, SERVER, |_| {})
    }

    pub(crate) fn client(&self, service: &str) -> Identity {
        self.issue(service, CLIENT, |_| {})
    }

    pub(crate) fn crl(&self, serials: &[u64]) -> String {
        self.crl_until(serials, days(30))
    }

    pub(crate) fn crl_until(&self, serials: &[u64], next_update: OffsetDateTime) -> String {
        CertificateRevocationListParams {
            this_update: days(-1),
            next_update,
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials
                .iter()
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from(*serial),
                    revocation_time: days(-1),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
        .pem()
        .unwrap()
    }
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(crate) fn serial(n: u64) -> impl FnOnce(&mut CertificateParams) {
    move |params| params.serial_number = Some(SerialNumber::from(n))
}

#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Identity {
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(self.cert.as_bytes())
            .map(Result::unwrap)
            .collect()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap()
    }
}

/// A folder that holds one identity.
pub(crate) struct Home {
    pub(crate) dir: TempDir,
    pub(crate) files: Files,
}

impl Home {
    pub(crate) fn new(ca: &Ca, identity: &Identity) -> Self {
        let dir = TempDir::new().unwrap();
        let files = Files {
            ca: dir.path().join("ca.pem"),
            cert: dir.path().join("own.crt"),
            key: dir.path().join("own-key.pem"),
            crl: Some(dir.path().join("crl.pem")),
        };
        let home = Self { dir, files };
        put(&home.files.ca, &ca.pem, 0o644);
        home.put(identity);
        home
    }

    pub(crate) fn put(&self, identity: &Identity) {
        put(&self.files.key, &identity.key, 0o600);
        put(&self.files.cert, &identity.cert, 0o644);
    }

    pub(crate) fn crl(&self) -> PathBuf {
        self.files.crl.clone().unwrap()
    }

    pub(crate) fn put_crl(&self, pem: &str) {
        put(&self.crl(), pem, 0o644);
    }
}

/// Replaces a file as a careful writer does: a new file, renamed into place.
pub(crate) fn put(path: &Path, text: &str, mode: u32) {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text).unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode)).unwrap();
    fs::rename(&fresh, path).unwrap();
}

pub(crate) fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

/// The pool's server, open to the gateway.
pub(crate) fn pool(ca: &Ca) -> (Home, ServerTls) {
    let home = Home::new(ca, &ca.server("inference-pool"));
    let tls = ServerTls::load(home.files.clone(), names(&["api-gateway", "monitoring"])).unwrap();
    (home, tls)
}

/// The gateway's client, which expects the pool.
pub(crate) fn gateway(ca: &Ca) -> (Home, ClientTls) {
    let home = Home::new(ca, &ca.client("api-gateway"));
    let tls = ClientTls::load(home.files.clone(), "inference-pool".into()).unwrap();
    (home, tls)
}

pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

pub(crate) struct Pair {
    pub(crate) client: tokio_rustls::client::TlsStream<TcpStream>,
    pub(crate) server: tokio_rustls::server::TlsStream<TcpStream>,
    pub(crate) peer: Peer,
}

impl Pair {
    /// Bytes go both ways.
    pub(crate) async fn works(&mut self) {
        let mut got = [0_u8; 4];
        self.client.write_all(b"ping").await.unwrap();
        self.server.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"ping");
        self.server.write_all(b"pong").await.unwrap();
        self.client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"pong");
    }
}

/// What each side says when `client` calls `server`.
pub(crate) struct Sides {
    pub(crate) server: Result<(tokio_rustls::server::TlsStream<TcpStream>, Peer), HandshakeError>,
    pub(crate) client: Result<tokio_rustls::client::TlsStream<TcpStream>, HandshakeError>,
}

pub(crate) async fn meet(server: &ServerTls, client: &ClientTls) -> Sides {
    let (listener, addr) = listen().await;
    let (server, client) = tokio::join!(
        async {
            server
                .accept_within(listener.accept().await.unwrap().0, LIMIT)
                .await
        },
        client.connect("127.0.0.1", addr.port(), LIMIT),
    );
    Sides { server, client }
}

pub(crate) async fn pair(server: &ServerTls, client: &ClientTls) -> Pair {
    let sides = meet(server, client).await;
    let (server, peer) = sides.server.unwrap();
    Pair {
        client: sides.client.unwrap(),
        server,
        peer,
    }
}

/// `server`'s verdict on a client that presents `identity` (or nothing) and checks nothing itself,
/// and what that client's first read says.
pub(crate) async fn call_raw(
    server: &ServerTls,
    identity: Option<&Identity>,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &[&[u8]],
) -> (Result<Peer, HandshakeError>, std::io::Result<usize>) {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match identity {
        Some(id) => builder.with_client_auth_cert(id.chain(), id.key()).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let (listener, addr) = listen().await;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    tokio::join!(
        async {
            let tcp = listener.accept().await.unwrap().0;
            server.accept_within(tcp, LIMIT).await.map(|(_, peer)| peer)
        },
        async {
            let tcp = TcpStream::connect(addr).await.unwrap();
            let name = ServerName::try_from("anything.example").unwrap();
            let mut tls = connector.connect(name, tcp).await?;
            tls.read(&mut [0]).await
        },
    )
}

/// `client`'s verdict on a server that presents `identity` and checks nothing itself.
pub(crate) async fn answer_raw(
    client: &ClientTls,
    identity: &Identity,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<(), HandshakeError> {
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.chain(), identity.key())
        .unwrap();
    let (listener, addr) = listen().await;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (_, verdict) = tokio::join!(
        async {
            acceptor
                .accept(listener.accept().await.unwrap().0)
                .await
                .map(drop)
        },
        client.connect("localhost", addr.port(), LIMIT),
    );
    verdict.map(drop)
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
