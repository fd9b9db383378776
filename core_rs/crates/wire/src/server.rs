//! The gRPC server of every service: mutual TLS (or plain TCP on a loopback address), health and
//! reflection, limits on everything, and a stop that lets running streams end.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use helix_tls::{Peer, ServerTls};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tonic_reflection::server::Builder;
use tower::Service;
use tracing::{debug, info, warn};

use crate::DESCRIPTORS;
use crate::error::{Code, CoreError};
use crate::rpc::Raw;

/// A dead peer is noticed after at most twice this time.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// After a failing `accept` (no file descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Calls carry a few hundred bytes of headers.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// What one unread stream may hold in the send buffer.
const MAX_SEND_BUFFER: usize = 64 * 1024;
/// Requests are small; what a client may send ahead per stream and per connection.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// What one server carries at a time; more is refused at the door.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open connections. A gateway worker needs one or a few.
    pub connections: usize,
    /// Connections whose TLS handshake is not done.
    pub handshakes: usize,
    /// Calls that run at a time on one connection.
    pub streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            handshakes: 1024,
            streams: 4096,
        }
    }
}

/// Who calls; in the extensions of every request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Service of the client certificate; `None` over plain TCP.
    pub service: Option<Arc<str>>,
    /// Where the connection comes from.
    pub address: SocketAddr,
}

/// A bound address.
pub struct Listener {
    tcp: TcpListener,
    tls: Option<Arc<ServerTls>>,
    address: SocketAddr,
}

impl Listener {
    /// Binds `host:port` (port 0 picks a free one). Without `tls` only a loopback address is accepted.
    ///
    /// # Errors
    /// `tls_error` for plain TCP on any other address; `invalid_request` for an address that does not
    /// resolve; `unavailable` when it cannot be bound.
    pub async fn bind(address: &str, tls: Option<Arc<ServerTls>>) -> Result<Self, CoreError> {
        let resolved: Vec<SocketAddr> = lookup_host(address)
            .await
            .map_err(|error| {
                CoreError::invalid("listen", format!("{address} is not an address: {error}"))
            })?
            .collect();
        if tls.is_none() && !resolved.iter().all(|found| found.ip().is_loopback()) {
            return Err(CoreError::new(
                Code::TlsError,
                format!(
                    "gRPC without TLS is served on a loopback address only, not on {address}; \
                     give the certificate files of the service"
                ),
            ));
        }
        let failed = |error| {
            CoreError::new(
                Code::Unavailable,
                format!("cannot listen on {address}: {error}"),
            )
        };
        let tcp = TcpListener::bind(resolved.as_slice())
            .await
            .map_err(failed)?;
        let address = tcp.local_addr().map_err(failed)?;
        Ok(Self { tcp, tls, address })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The services of one server: the caller's own, health and reflection.
pub struct Services {
    routes: Routes,
    raw: Option<Arc<Raw>>,
    health: Health,
}

/// Tells the health service how things stand. Everything starts as not serving.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    names: Vec<String>,
}

impl Health {
    /// Sets the status of the server as a whole and of each of its services.
    pub async fn set(&self, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        self.reporter.set_service_status("", status).await;
        for name in &self.names {
            self.reporter.set_service_status(name, status).await;
        }
    }
}

impl Default for Services {
    /// Health and reflection only.
    fn default() -> Self {
        let (reporter, service) = tonic_health::server::health_reporter();
        let health = Health {
            reporter,
            names: Vec::new(),
        };
        Self {
            routes: Routes::new(service),
            raw: None,
            health,
        }
    }
}

impl Services {
    /// Adds a generated service.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<
                http::Request<tonic::body::Body>,
                Response = http::Response<tonic::body::Body>,
                Error = Infallible,
            > + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes = self.routes.add_service(service);
        self.health.names.push(S::NAME.to_owned());
        self
    }

    /// Adds the services that are served as bytes, once.
    #[must_use]
    pub fn with_raw(mut self, raw: Raw) -> Self {
        self.health.names.extend_from_slice(raw.services());
        self.raw = Some(Arc::new(raw));
        self
    }

    /// The routes of everything but the raw services; reflection lists what is served here.
    fn routes(&self) -> Result<Routes, CoreError> {
        let reflection = || {
            let builder = Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.health.v1.Health");
            let names = self.health.names.iter();
            names.fold(builder, Builder::with_service_name)
        };
        let damaged = |error| {
            CoreError::new(
                Code::Internal,
                format!("gRPC reflection cannot be built: {error}"),
            )
        };
        Ok(self
            .routes
            .clone()
            .add_service(reflection().build_v1().map_err(damaged)?)
            .add_service(reflection().build_v1alpha().map_err(damaged)?)
            .prepare())
    }

    /// The switch of the health service.
    pub fn health(&self) -> Health {
        self.health.clone()
    }
}

/// A running server. Dropping it cuts every connection.
pub struct Server {
    address: SocketAddr,
    stopping: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Starts to accept connections. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// `internal` when the compiled-in descriptors are damaged.
    pub async fn start(
        listener: Listener,
        services: Services,
        limits: Limits,
    ) -> Result<Self, CoreError> {
        services.health.set(false).await;
        let stopping = watch::Sender::new(false);
        let address = listener.address;
        let front = Arc::new(Front {
            routes: services.routes()?,
            raw: services.raw,
            limits,
            stopping: stopping.subscribe(),
            tls: listener.tls,
        });
        let accepting = tokio::spawn(accept(listener.tcp, front));
        Ok(Self {
            address,
            stopping,
            accepting,
        })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting, tells every client to go elsewhere, waits up to `grace` for the running calls
    /// and cuts what is left.
    pub async fn stop(mut self, grace: Duration) {
        self.stopping.send_replace(true);
        if tokio::time::timeout(grace, &mut self.accepting)
            .await
            .is_err()
        {
            warn!(address = %self.address, "calls still ran when the time to stop was over; cut");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The set of connections lives inside this task and aborts them when it goes.
        self.accepting.abort();
    }
}

/// What every connection of a server shares.
struct Front {
    routes: Routes,
    raw: Option<Arc<Raw>>,
    limits: Limits,
    stopping: watch::Receiver<bool>,
    tls: Option<Arc<ServerTls>>,
}

async fn accept(listener: TcpListener, front: Arc<Front>) {
    let open = Arc::new(Semaphore::new(front.limits.connections));
    let shaking = Arc::new(Semaphore::new(front.limits.handshakes));
    let mut stopping = front.stopping.clone();
    let mut connections = JoinSet::new();
    loop {
        let (tcp, from) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
            () = raised(&mut stopping) => break,
        };
        // Waiting for a permit would let one slow peer hold up everybody, so what is too much is closed.
        let permits = Arc::clone(&open).try_acquire_owned().and_then(|open| {
            Arc::clone(&shaking)
                .try_acquire_owned()
                .map(|shaking| (open, shaking))
        });
        if let Ok((open, shaking)) = permits {
            connections.spawn(connect(tcp, from, Arc::clone(&front), open, shaking));
        } else {
            warn!(%from, "too many connections or handshakes; closed");
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connect(
    tcp: TcpStream,
    from: SocketAddr,
    front: Arc<Front>,
    _open: OwnedSemaphorePermit,
    shaking: OwnedSemaphorePermit,
) {
    let Some(tls) = front.tls.clone() else {
        drop(shaking);
        if let Err(error) = tcp.set_nodelay(true) {
            debug!(%from, %error, "connection broke");
            return;
        }
        serve(
            tcp,
            Caller {
                service: None,
                address: from,
            },
            &front,
            None,
        )
        .await;
        return;
    };
    // Subscribed before the handshake: a swap during it is not missed.
    let swaps = tls.swaps();
    match tls.accept(tcp).await {
        Ok((stream, peer)) => {
            drop(shaking);
            let caller = Caller {
                service: Some(peer.service.as_str().into()),
                address: from,
            };
            serve(stream, caller, &front, Some((tls, peer, swaps))).await;
        }
        Err(error) => info!(%from, %error, "connection refused"),
    }
}

type Identity = (Arc<ServerTls>, Peer, watch::Receiver<u64>);

async fn serve<S>(stream: S, caller: Caller, front: &Front, mut identity: Option<Identity>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let from = caller.address;
    let (routes, raw) = (front.routes.clone(), front.raw.clone());
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        let (mut routes, raw) = (routes.clone(), raw.clone());
        async move {
            if let Some(raw) = raw
                && let Some(method) = raw.find(request.uri().path())
            {
                return Ok(raw.serve(method, request).await);
            }
            poll_fn(|cx| Service::<http::Request<Incoming>>::poll_ready(&mut routes, cx)).await?;
            routes.call(request).await
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(front.limits.streams)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut stopping = front.stopping.clone();
    let mut told = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    debug!(%from, %error, "connection ended");
                }
                return;
            }
            () = raised(&mut stopping), if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
            refused = revoked(&mut identity) => {
                warn!(%from, reason = %refused, "peer is no longer accepted; its connection is cut");
                return;
            }
        }
    }
}

/// Completes when the peer, accepted earlier, is refused by certificates or a revocation list that were
/// swapped in since.
async fn revoked(identity: &mut Option<Identity>) -> helix_tls::HandshakeError {
    if let Some((tls, peer, swaps)) = identity {
        while swaps.changed().await.is_ok() {
            if let Err(refused) = tls.recheck(peer) {
                return refused;
            }
        }
    }
    std::future::pending().await
}

/// Completes when the server stops.
async fn raised(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server is gone, which is a stop as well.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}
