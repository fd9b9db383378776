//! Accepts connections, ends TLS, and serves HTTP on them.

use std::convert::Infallible;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use http::HeaderValue;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::address::Group;
use crate::counts::{Cap, Caps, Ids, Known, OwnPlace};
use crate::forward::{self, Client};
use crate::options::Options;
use crate::proxy;
use crate::stats::Stats;
use crate::tls::{Shown, Tls};
use crate::watched::{Ended, State, Watched};
use crate::workers::Workers;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Time for a client to take note that an idle HTTP/2 connection ends.
const GOODBYE: Duration = Duration::from_secs(1);
/// After a failure to accept (no descriptors left): it helps nobody to try at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often a handshake looks whether others of the same client are over.
const OWN_TURN_LOOK: Duration = Duration::from_millis(5);
/// Credentials that are remembered as good.
const KNOWN: usize = 16_384;
/// How often an HTTP/2 client is asked whether it is still there while it is answered.
const PING: Duration = Duration::from_secs(30);
/// What of an HTTP/2 stream that its client does not read is kept here (bytes).
const SEND_BYTES: usize = 16_384;

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) workers: Arc<Workers>,
    pub(crate) known: Known,
    pub(crate) strangers: Arc<Caps>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) ids: Ids,
    tls: Option<Arc<Tls>>,
    connections: Arc<Cap>,
    per_client: Arc<Caps>,
    handshakes: Semaphore,
    handshakes_per_client: Arc<Caps>,
    draining: watch::Sender<bool>,
}

impl Shared {
    fn trusts(&self, address: IpAddr) -> bool {
        let trusted = &self.options.trusted;
        trusted.iter().any(|each| each.contains(address))
    }
}

/// The endpoint.
pub struct Front {
    shared: Arc<Shared>,
}

impl Front {
    /// Serves on `listener` in the tokio runtime that this is called in. Without `tls`: plain HTTP.
    pub fn start(
        listener: std::net::TcpListener,
        options: Options,
        tls: Option<Arc<Tls>>,
        workers: Arc<Workers>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let shared = Arc::new(Shared {
            known: Known::new(KNOWN),
            strangers: Caps::new(options.strangers_per_client),
            stats: Arc::default(),
            ids: Ids::default(),
            connections: Cap::new(options.connections),
            per_client: Caps::new(options.connections_per_client),
            handshakes: Semaphore::new(options.handshakes),
            // One client may not fill the line.
            handshakes_per_client: Caps::new((options.handshakes / 4).max(1)),
            draining: watch::Sender::new(false),
            tls,
            workers,
            options,
        });
        tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { shared })
    }

    /// Counts of what happened.
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.shared.stats)
    }

    /// Connections that are open.
    pub fn connections(&self) -> usize {
        self.shared.connections.now()
    }

    /// Accepts nothing more; connections end when their requests are answered.
    pub fn drain(&self) {
        self.shared.draining.send_replace(true);
    }
}

/// Waits until the front drains, or is gone.
async fn told(draining: &mut watch::Receiver<bool>) {
    draining.wait_for(|draining| *draining).await.map(drop).ok();
}

/// Waits until a connection should take no further request.
async fn farewell(shared: &Shared, shown: Option<Shown>) {
    let mut draining = shared.draining.subscribe();
    let refused = async {
        match shown {
            Some(mut shown) => shown.refused().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = told(&mut draining) => {}
        () = refused => shared.stats.revoked.add(),
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut draining = shared.draining.subscribe();
    loop {
        let accepted = tokio::select! {
            () = told(&mut draining) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let shared = Arc::clone(&shared);
                // Before a task is made for it: whoever has too many costs as little as can be.
                let Some(place) = shared.connections.take() else {
                    shared.stats.crowded.add();
                    tracing::warn!(address = %peer.ip(), "too many connections in all: one was closed");
                    continue;
                };
                tokio::spawn(async move {
                    connection(&shared, stream, peer).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(shared: &Arc<Shared>, mut stream: TcpStream, peer: SocketAddr) {
    let mut address = peer.ip().to_canonical();
    let proxied = shared.options.proxy_protocol && shared.trusts(address);
    if proxied {
        match timeout(shared.options.first_byte, proxy::read(&mut stream)).await {
            Ok(Ok(client)) => address = client.unwrap_or(address),
            Ok(Err(error)) => {
                tracing::warn!(%address, %error, "a trusted proxy says nobody's address");
                return;
            }
            Err(_) => return shared.stats.silent.add(),
        }
    }
    // A trusted proxy that says nothing of its clients is no client.
    let many = !proxied && shared.trusts(address);
    let place = shared.per_client.take(Group::of(address));
    if place.is_none() && !many {
        shared.stats.crowded_client.add();
        tracing::warn!(%address, "too many connections of one client: one was closed");
        return;
    }
    shared.stats.accepted.add();
    let client = Client {
        address,
        fingerprint: None,
        spiffe: None,
    };
    match &shared.tls {
        None => begin(shared, stream, client, None, None).await,
        Some(tls) => {
            let verifier = tls.watch();
            // Boxes, so that an idle connection keeps neither room for a handshake nor for the other protocol.
            let done = Box::pin(handshake(shared, tls, stream, address)).await;
            let Some(stream) = done.map(Box::new) else {
                return;
            };
            let client = identified(client, &stream);
            let session = stream.get_ref().1;
            let shown = Shown::new(session.peer_certificates(), verifier);
            let two = session.alpn_protocol().map(|name| name == b"h2");
            begin(shared, stream, client, two, shown).await;
        }
    }
}

/// The client's certificate, as far as it has shown one.
fn identified(mut client: Client, stream: &TlsStream<TcpStream>) -> Client {
    let Some(certificate) = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first)
    else {
        return client;
    };
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    client.fingerprint = forward::fingerprint(digest.as_ref());
    if let Ok((_, parsed)) = X509Certificate::from_der(certificate) {
        let names = parsed.subject_alternative_name().ok().flatten();
        let mut uris = names
            .into_iter()
            .flat_map(|names| &names.value.general_names);
        client.spiffe = uris.find_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with("spiffe://") => {
                HeaderValue::from_str(uri).ok()
            }
            _ => None,
        });
    }
    client
}

/// One client has a part of the line only, and waits for its own handshakes. A trusted proxy is many clients.
async fn own_turn(shared: &Shared, address: IpAddr) -> Option<OwnPlace> {
    if shared.trusts(address) {
        return None;
    }
    loop {
        let place = shared.handshakes_per_client.take(Group::of(address));
        if place.is_some() {
            return place;
        }
        tokio::time::sleep(OWN_TURN_LOOK).await;
    }
}

/// Ends TLS. What a handshake computes waits in a line, once the client has said something.
async fn handshake(
    shared: &Shared,
    tls: &Tls,
    stream: TcpStream,
    address: IpAddr,
) -> Option<TlsStream<TcpStream>> {
    let steps = async {
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
        let _own = own_turn(shared, address).await;
        let mut rest = std::pin::pin!(hello.into_stream(tls.current()));
        {
            // What costs a processor is done in the first step; then it is the client's turn, and whoever lets us wait
            // for that holds up nobody.
            let _turn = shared
                .handshakes
                .acquire()
                .await
                .map_err(io::Error::other)?;
            let first = poll_fn(|context| Poll::Ready(rest.as_mut().poll(context))).await;
            if let Poll::Ready(outcome) = first {
                return outcome;
            }
        }
        rest.await
    };
    match timeout(shared.options.handshake, steps).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            shared.stats.handshakes_failed.add();
            tracing::debug!(%address, %error, "TLS handshake failed");
            None
        }
        Err(_) => {
            shared.stats.handshakes_failed.add();
            tracing::debug!(%address, "TLS handshake took too long");
            None
        }
    }
}

/// Finds out which HTTP it is, then serves. `two`: what was agreed on; `None`: nothing.
async fn begin<S>(
    shared: &Arc<Shared>,
    mut stream: S,
    client: Client,
    two: Option<bool>,
    shown: Option<Shown>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let first = if two.is_some() {
        Ok(Vec::new())
    } else {
        sniff(&mut stream, shared).await
    };
    let Ok(first) = first else {
        return shared.stats.silent.add();
    };
    let two = two.unwrap_or(first == PREFACE);
    let state = Arc::new(State::default());
    let Ok(stream) = Watched::new(stream, two, &first, Arc::clone(&state), &shared.options) else {
        return;
    };
    if two {
        Box::pin(serve_two(shared, stream, client, &state, shown)).await;
    } else {
        Box::pin(serve_one(shared, stream, client, &state, shown)).await;
    }
    match state.ended() {
        Ended::No => {}
        Ended::Silent => shared.stats.silent.add(),
        Ended::Stalled => shared.stats.stalled.add(),
        Ended::Flood => shared.stats.floods.add(),
    }
}

/// The first bytes, until they are the preface of HTTP/2 or differ from it.
async fn sniff(stream: &mut (impl AsyncRead + Unpin), shared: &Shared) -> io::Result<Vec<u8>> {
    let mut first = Vec::new();
    let mut limit = shared.options.first_byte;
    while first.len() < PREFACE.len() && PREFACE.starts_with(&first) {
        let mut space = [0; PREFACE.len()];
        let wanted = PREFACE.len() - first.len();
        let count = timeout(limit, stream.read(&mut space[..wanted])).await??;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        first.extend_from_slice(&space[..count]);
        limit = shared.options.head;
    }
    Ok(first)
}

/// A connection that has been idle for a while has no HTTP server, whose buffers are most of what a connection costs: it
/// gets one with the next bytes.
async fn serve_one<S>(
    shared: &Arc<Shared>,
    mut stream: Watched<S>,
    client: Client,
    state: &Arc<State>,
    shown: Option<Shown>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(|request| {
        let (shared, client, active) = (Arc::clone(shared), client.clone(), state.begin());
        // hyper keeps the room of an answer while there is none.
        Box::pin(async move {
            Ok::<_, Infallible>(forward::answer(shared, client, active, request).await)
        })
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_header_size(shared.options.head_bytes)
        .max_buf_size(shared.options.head_bytes.max(8192));
    let mut leave = std::pin::pin!(farewell(shared, shown).fuse());
    loop {
        let more = tokio::select! {
            biased; // what has come is answered, also in the moment of a farewell
            more = stream.more() => more,
            () = leave.as_mut() => Ok(false),
        };
        if !matches!(more, Ok(true)) {
            // Who has gone hears nothing of it.
            stream.shutdown().await.ok();
            return;
        }
        let mut connection = builder.serve_connection(TokioIo::new(stream), &service);
        let outcome = poll_fn(|context| {
            if leave.as_mut().poll(context).is_ready() {
                Pin::new(&mut connection).graceful_shutdown();
            }
            match Pin::new(&mut connection).poll(context) {
                Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
                Poll::Pending if state.is_parked() => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
        match outcome {
            None => stream = connection.into_parts().io.into_inner(),
            Some(Ok(())) => return,
            Some(Err(error)) => {
                return tracing::debug!(address = %client.address, %error, "connection ended");
            }
        }
    }
}

async fn serve_two<S>(
    shared: &Arc<Shared>,
    stream: Watched<S>,
    client: Client,
    state: &Arc<State>,
    shown: Option<Shown>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let address = client.address;
    let service = {
        let (shared, state) = (Arc::clone(shared), Arc::clone(state));
        service_fn(move |request| {
            let (shared, client, active) = (Arc::clone(&shared), client.clone(), state.begin());
            async move { Ok::<_, Infallible>(forward::answer(shared, client, active, request).await) }
        })
    };
    let options = &shared.options;
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .max_concurrent_streams(options.streams)
        .max_pending_accept_reset_streams(options.resets)
        .max_header_list_size(u32::try_from(options.head_bytes).unwrap_or(u32::MAX))
        .max_send_buf_size(SEND_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = farewell(shared, shown) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = state.idle.notified() => {
            connection.as_mut().graceful_shutdown();
            // Should a request have come in this moment, it is answered.
            match timeout(GOODBYE, connection.as_mut()).await {
                Ok(outcome) => outcome,
                Err(_) if state.is_active() => connection.await,
                Err(_) => Ok(()),
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%address, %error, "connection ended");
    }
}
