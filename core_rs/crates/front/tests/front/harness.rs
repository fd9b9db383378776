//! A front over workers that the test scripts, and clients that speak raw bytes or hyper.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use helix_front::{Front, Options, Pair, Tls, TlsFiles, Workers};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;
type Script = Arc<dyn Fn(Request<Incoming>) -> BoxedAnswer + Send + Sync>;
type BoxedAnswer = futures_util::future::BoxFuture<'static, Response<Body>>;

/// A worker on a Unix socket.
pub(crate) struct Worker {
    pub(crate) path: PathBuf,
    /// Connections that it has accepted.
    pub(crate) accepted: Arc<AtomicUsize>,
    task: JoinHandle<()>,
    connections: Arc<parking_lot::Mutex<Vec<JoinHandle<()>>>>,
}

impl Worker {
    pub(crate) fn start(path: PathBuf, script: Script) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let connections: Arc<parking_lot::Mutex<Vec<JoinHandle<()>>>> = Arc::default();
        let (count, running) = (Arc::clone(&accepted), Arc::clone(&connections));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let script = Arc::clone(&script);
                let service = service_fn(move |request| {
                    let answer = script(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                running
                    .lock()
                    .push(tokio::spawn(async move { drop(serving.await) }));
            }
        });
        Self {
            path,
            accepted,
            task,
            connections,
        }
    }

    fn cut(&self) {
        for connection in self.connections.lock().drain(..) {
            connection.abort();
        }
    }

    fn kill(&self) {
        self.task.abort();
        self.cut();
        drop(std::fs::remove_file(&self.path));
    }
}

pub(crate) fn script<F, A>(answer: F) -> Script
where
    F: Fn(Request<Incoming>) -> A + Send + Sync + 'static,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    Arc::new(move |request| Box::pin(answer(request)))
}

pub(crate) fn text(text: impl Into<Bytes>) -> Response<Body> {
    Response::new(
        Full::new(text.into())
            .map_err(|never| match never {})
            .boxed_unsync(),
    )
}

/// A body that the test feeds.
pub(crate) fn fed() -> (mpsc::Sender<&'static str>, Body) {
    let (sender, receiver) = mpsc::channel::<&'static str>(1);
    let frames = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let frames = futures_util::StreamExt::map(frames, |text| {
        Ok(Frame::data(Bytes::from_static(text.as_bytes())))
    });
    (sender, StreamBody::new(frames).boxed_unsync())
}

/// A worker whose first answer the test feeds; all others are `then`. Both call themselves `kind`.
pub(crate) fn feeding(
    kind: &'static str,
    then: &'static str,
) -> (mpsc::Sender<&'static str>, Script) {
    let (sender, body) = fed();
    let body = parking_lot::Mutex::new(Some(body));
    let answer = move |_| {
        let first = body.lock().take();
        let mut response = first.map_or_else(|| text(then), Response::new);
        response.headers_mut().insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static(kind),
        );
        std::future::ready(response)
    };
    (sender, script(answer))
}

/// What a worker was sent, as text: first line, headers in order of their names without the request's id, body.
pub(crate) async fn echo(request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let mut lines = vec![format!("{} {}", parts.method, parts.uri)];
    let mut headers: Vec<String> = parts
        .headers
        .iter()
        .filter(|(name, _)| *name != "x-request-id")
        .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap_or("?")))
        .collect();
    headers.sort_by(|left, right| left.split(':').cmp(right.split(':')));
    lines.extend(headers);
    lines.push(String::new());
    match body.collect().await {
        Ok(body) => lines.push(String::from_utf8_lossy(&body.to_bytes()).into_owned()),
        Err(_) => lines.push("BROKEN".into()),
    }
    text(lines.join("\n"))
}

/// A front that listens, and the folder of its workers.
pub(crate) struct Stage {
    pub(crate) front: Front,
    pub(crate) address: SocketAddr,
    pub(crate) workers: Arc<Workers>,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) folder: TempDir,
    running: Vec<Worker>,
}

pub(crate) fn quick() -> Options {
    Options {
        worker_wait: Duration::from_millis(300),
        ..Options::default()
    }
}

impl Stage {
    pub(crate) fn plain(options: Options) -> Self {
        Self::new(options, tempfile::tempdir().unwrap(), None)
    }

    pub(crate) fn with_tls(options: Options, folder: TempDir, files: TlsFiles) -> Self {
        let tls = Tls::load(files).unwrap();
        Self::new(options, folder, Some(Arc::new(tls)))
    }

    fn new(options: Options, folder: TempDir, tls: Option<Arc<Tls>>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let workers = Arc::new(Workers::default());
        let front = Front::start(listener, options, tls.clone(), Arc::clone(&workers)).unwrap();
        Self {
            front,
            address,
            workers,
            tls,
            folder,
            running: Vec::new(),
        }
    }

    /// One more worker.
    pub(crate) fn worker(&mut self, script: Script) -> &Worker {
        let path = self
            .folder
            .path()
            .join(format!("{}.sock", self.running.len()));
        self.running.push(Worker::start(path, script));
        let paths: Vec<_> = self
            .running
            .iter()
            .map(|worker| worker.path.clone())
            .collect();
        self.workers.set(&paths);
        self.running.last().unwrap()
    }

    /// As if the process of a worker had been killed.
    pub(crate) fn kill(&self, number: usize) {
        self.running[number].kill();
    }

    /// A worker closes its connections.
    pub(crate) fn cut(&self, number: usize) {
        self.running[number].cut();
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes on a connection of its own and reads all that comes back.
    pub(crate) async fn raw(&self, bytes: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        rest(&mut stream).await
    }

    pub(crate) fn count(&self, name: &str) -> u64 {
        let all = self.front.stats().all();
        all.into_iter().find(|(each, _)| *each == name).unwrap().1
    }
}

/// All until the other side ends.
pub(crate) async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    drop(stream.read_to_end(&mut bytes).await);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads until `end` has come.
pub(crate) async fn until(stream: &mut (impl tokio::io::AsyncRead + Unpin), end: &str) -> String {
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains(end) {
        let mut space = [0; 4096];
        let count = stream.read(&mut space).await.unwrap();
        assert!(
            count > 0,
            "the end came before {end:?}: {}",
            String::from_utf8_lossy(&bytes)
        );
        bytes.extend_from_slice(&space[..count]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A certificate authority and what it has issued, in a folder.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
    der: rustls::pki_types::CertificateDer<'static>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Certificate and key, PEM.
    pub(crate) fn issue(
        &self,
        algorithm: &'static rcgen::SignatureAlgorithm,
        spiffe: Option<&str>,
    ) -> (String, String) {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        if let Some(uri) = spiffe {
            params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Writes a pair.
    pub(crate) fn pair(
        &self,
        folder: &std::path::Path,
        name: &str,
        algorithm: &'static rcgen::SignatureAlgorithm,
    ) -> Pair {
        let (cert, key) = self.issue(algorithm, None);
        let pair = Pair {
            cert: folder.join(format!("{name}.crt")),
            key: folder.join(format!("{name}.key")),
        };
        std::fs::write(&pair.cert, cert).unwrap();
        std::fs::write(&pair.key, key).unwrap();
        pair
    }

    /// A client that trusts it.
    pub(crate) fn client(&self, own: Option<&(String, String)>, alpn: &[&str]) -> ClientConfig {
        self.client_of(rustls::crypto::aws_lc_rs::default_provider(), own, alpn)
    }

    pub(crate) fn client_of(
        &self,
        provider: rustls::crypto::CryptoProvider,
        own: Option<&(String, String)>,
        alpn: &[&str],
    ) -> ClientConfig {
        use rustls::pki_types::pem::PemObject as _;
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => builder
                .with_client_auth_cert(
                    vec![
                        rustls::pki_types::CertificateDer::from_pem_slice(cert.as_bytes()).unwrap(),
                    ],
                    rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }
}

/// Connects with TLS.
pub(crate) async fn tls(
    address: SocketAddr,
    config: &Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::clone(config))
        .connect(name, stream)
        .await
}
