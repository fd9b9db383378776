//! Mutual TLS, and what happens to connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helix_pool::Pool;
use helix_tls::{ClientTls, Files, ServerTls};
use helix_wire::error::{Code, CoreError};
use helix_wire::server::{Listener, Server};
use helix_wire::service::{AUTH, GATEWAY, MONITORING, POOL};
use helix_wire::v1::WatchRequest;
use helix_wire::v1::inference_client::InferenceClient;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::harness::{Alphabet, ask, collect, model, options, refusal, write};

/// A CA whose certificates lie in one folder.
struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            "ca.pem",
            &params.self_signed(&key).unwrap().pem(),
        );
        Self {
            dir,
            issuer: Issuer::new(params, key),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn issue(&self, service: &str, purpose: ExtendedKeyUsagePurpose, serial: u64) -> Files {
        let mut params = CertificateParams::default();
        let identity = format!("spiffe://helixflow.local/{service}");
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        Files {
            ca: self.path("ca.pem"),
            cert: write(self.dir.path(), &format!("{serial}.crt"), &cert.pem()),
            key: write(
                self.dir.path(),
                &format!("{serial}-key.pem"),
                &key.serialize_pem(),
            ),
            crl: Some(self.path("crl.pem")),
        }
    }

    fn client(&self, service: &str, serial: u64) -> Arc<ClientTls> {
        let files = Files {
            crl: None,
            ..self.issue(service, ExtendedKeyUsagePurpose::ClientAuth, serial)
        };
        Arc::new(ClientTls::load(files, POOL.into()).unwrap())
    }

    fn revoke(&self, serial: u64) {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: date_time_ymd(2020, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        write(
            self.dir.path(),
            "crl.pem",
            &list.signed_by(&self.issuer).unwrap().pem().unwrap(),
        );
    }
}

struct Secured {
    authority: Authority,
    tls: Arc<ServerTls>,
    pool: Pool,
    server: Server,
}

async fn secured() -> Secured {
    let authority = Authority::new();
    let files = authority.issue(POOL, ExtendedKeyUsagePurpose::ServerAuth, 1);
    let tls = Arc::new(ServerTls::load(files, vec![GATEWAY.into(), MONITORING.into()]).unwrap());
    let pool = Pool::new(model(), options());
    let listener = Listener::bind("127.0.0.1:0", Some(Arc::clone(&tls)))
        .await
        .unwrap();
    let server = pool.serve(listener).await.unwrap();
    let engine = pool.clone();
    std::thread::spawn(move || engine.run(&mut Alphabet::new(2, 1 << 20)));
    Secured {
        authority,
        tls,
        pool,
        server,
    }
}

impl Secured {
    fn client(&self, tls: Arc<ClientTls>) -> InferenceClient<Channel> {
        let port = self.server.address().port();
        let connector = tower::service_fn(move |_: Uri| {
            let tls = Arc::clone(&tls);
            async move {
                let stream = tls.connect("127.0.0.1", port, Duration::from_secs(5)).await;
                stream.map(TokioIo::new).map_err(std::io::Error::other)
            }
        });
        InferenceClient::new(
            Endpoint::from_static("http://pool").connect_with_connector_lazy(connector),
        )
    }
}

async fn ready(client: &mut InferenceClient<Channel>) {
    let mut states = client.watch(WatchRequest {}).await.unwrap().into_inner();
    while !states.message().await.unwrap().unwrap().ready {}
}

#[tokio::test]
async fn the_gateway_may_call_and_others_may_not() {
    let pool = secured().await;
    // Connected and silent: its handshake must not hold up the next one.
    let mut silent = TcpStream::connect(pool.server.address()).await.unwrap();
    let mut client = pool.client(pool.authority.client(GATEWAY, 2));
    ready(&mut client).await;
    assert_eq!(
        collect(client.generate(ask("a", 3)).await.unwrap().into_inner())
            .await
            .texts,
        ["bcd"]
    );

    let mut stranger = pool.client(pool.authority.client(AUTH, 3));
    assert_eq!(
        refusal(stranger.generate(ask("a", 3)).await).code,
        Code::Unavailable
    );
    let plain = format!("http://{}", pool.server.address());
    let mut plain = InferenceClient::new(Channel::from_shared(plain).unwrap().connect_lazy());
    assert_eq!(
        refusal(plain.generate(ask("a", 3)).await).code,
        Code::Unavailable
    );

    pool.pool.stop();
    drop(pool.server);
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), silent.read_to_end(&mut rest))
        .await
        .expect("still open")
        .unwrap();
}

#[tokio::test]
async fn a_revoked_peer_is_cut_and_the_others_stay() {
    let pool = secured().await;
    let mut good = pool.client(pool.authority.client(GATEWAY, 2));
    let mut bad = pool.client(pool.authority.client(MONITORING, 7));
    ready(&mut good).await;
    let mut kept = good
        .generate(ask("a", 1_000_000))
        .await
        .unwrap()
        .into_inner();
    let mut cut = bad
        .generate(ask("b", 1_000_000))
        .await
        .unwrap()
        .into_inner();
    pool.authority.revoke(7);
    pool.tls.reload().unwrap();
    let ended = async {
        loop {
            if let Err(status) = cut.message().await {
                return CoreError::from(status);
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(5), ended)
        .await
        .expect("the revoked peer reads on");
    assert_eq!(error.code, Code::Unavailable);
    assert_eq!(
        refusal(bad.generate(ask("b", 1)).await).code,
        Code::Unavailable
    );
    for _ in 0..10 {
        assert!(kept.message().await.unwrap().is_some());
    }
    pool.pool.stop();
    pool.server.stop(Duration::from_millis(100)).await;
}

#[tokio::test]
async fn plain_tcp_is_for_loopback_only() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8501"] {
        let error = Listener::bind(address, None)
            .await
            .err()
            .expect("was bound");
        assert_eq!(error.code, Code::TlsError);
        assert!(error.message.contains(address), "{error}");
    }
    let error = Listener::bind("no such host:1", None).await.err().unwrap();
    assert_eq!(
        (error.code, error.param.as_deref()),
        (Code::InvalidRequest, Some("listen"))
    );
    let taken = Listener::bind("127.0.0.1:0", None).await.unwrap();
    let again = Listener::bind(&taken.address().to_string(), None)
        .await
        .err()
        .unwrap();
    assert_eq!(again.code, Code::Unavailable);
}
