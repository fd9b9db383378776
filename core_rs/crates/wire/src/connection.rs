//! One HTTP/2 connection to another service, as a service that tonic can call.
//!
//! Built on `h2` without a layer between: a call costs no task and no channel hop, dropping it resets its stream
//! at once, and the limits of the connection are ours to set. The peer is authenticated by mutual TLS, so limits
//! that guard against hostile peers give way to those that keep calls apart.

use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, RandomState};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use helix_tls::{ClientTls, Peer};
use http::{HeaderMap, Uri};
use http_body::{Body, Frame};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::client::Grpc;
use tonic::{Request, Status};

use crate::error::{Code, CoreError};

/// Slow readers may hold a whole stream window each; the connection must not run out because of them.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Calls that were cancelled while the peer still sent: remembered for a while, so that late frames are ignored.
const RESET_STREAMS: usize = 8192;
/// An echo with log probabilities of a long prompt is one large message.
const MAX_MESSAGE: usize = 64 << 20;

/// Limits and times of the connections to one kind of service.
#[derive(Clone, Debug)]
pub struct Options {
    /// For TCP, TLS and HTTP/2 set-up of one attempt.
    pub connect_timeout: Duration,
    /// First pause behind a failure; each further one is twice as long (with jitter).
    pub backoff_min: Duration,
    /// Longest pause behind a failure.
    pub backoff_max: Duration,
    /// Time between two pings of a connection.
    pub ping_interval: Duration,
    /// A peer that does not answer a ping for this long is given up and its calls fail.
    pub ping_timeout: Duration,
    /// Unread bytes of one call that the peer may send (HTTP/2 flow control).
    pub stream_window: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            // A peer that stands still is noticed within 7 s, and its calls fail or go elsewhere.
            ping_interval: Duration::from_secs(2),
            ping_timeout: Duration::from_secs(5),
            stream_window: 64 * 1024,
        }
    }
}

/// How a service is reached.
#[derive(Clone)]
pub enum Transport {
    /// Without TLS: loopback addresses only.
    Plain,
    /// Mutual TLS.
    Tls(Arc<ClientTls>),
}

/// Where one server is, and how to connect to it.
pub(crate) struct Endpoint {
    address: Arc<str>,
    /// What it is, for messages.
    peer: Arc<str>,
    host: String,
    port: u16,
    transport: Transport,
    origin: Uri,
    connect_timeout: Duration,
    stream_window: u32,
}

/// A fresh connection.
pub(crate) struct Connected {
    pub(crate) channel: Channel,
    pub(crate) ping: Option<PingPong>,
    /// Aborting it cuts every call of the connection; otherwise it ends with the last of them.
    pub(crate) driver: JoinHandle<()>,
    /// Who answers on it; `None` without TLS.
    pub(crate) answers: Option<Peer>,
}

impl Endpoint {
    /// One for each address (`host:port`), of which there must be one at least.
    pub(crate) fn all(
        addresses: &[String],
        peer: &str,
        transport: &Transport,
        options: &Options,
    ) -> Result<Vec<Self>, CoreError> {
        if addresses.is_empty() {
            let empty = format!("the list of {peer} addresses is empty; name at least one");
            return Err(CoreError::invalid("addresses", empty));
        }
        let endpoint = |address: &String| Self::new(address, peer, transport, options);
        addresses.iter().map(endpoint).collect()
    }

    fn new(
        address: &str,
        peer: &str,
        transport: &Transport,
        options: &Options,
    ) -> Result<Self, CoreError> {
        let wrong = |what: &str| {
            CoreError::invalid("addresses", format!("{peer} address {address:?} {what}"))
        };
        let (host, port) = address
            .rsplit_once(':')
            .ok_or_else(|| wrong("has no port; write host:port"))?;
        let port = port
            .parse::<u16>()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| wrong("has a bad port"))?;
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        if host.is_empty() {
            return Err(wrong("has no host; write host:port"));
        }
        let origin = Uri::builder()
            .scheme("http")
            .authority(address)
            .path_and_query("/")
            .build()
            .map_err(|_| wrong("is not host:port"))?;
        Ok(Self {
            address: address.into(),
            peer: peer.into(),
            host: host.to_owned(),
            port,
            transport: transport.clone(),
            origin,
            connect_timeout: options.connect_timeout,
            stream_window: options.stream_window,
        })
    }

    pub(crate) fn address(&self) -> Arc<str> {
        Arc::clone(&self.address)
    }

    /// Counts the swaps of our certificates; `None` without TLS.
    pub(crate) fn swaps(&self) -> Option<watch::Receiver<u64>> {
        match &self.transport {
            Transport::Plain => None,
            Transport::Tls(tls) => Some(tls.swaps()),
        }
    }

    /// TCP, TLS and HTTP/2, all within the connect timeout. The error is for people.
    pub(crate) async fn connect(&self) -> Result<Connected, String> {
        let limit = self.connect_timeout;
        let attempt = async {
            match &self.transport {
                Transport::Plain => self.handshake(self.plain().await?, None).await,
                Transport::Tls(tls) => {
                    let stream = tls
                        .connect(&self.host, self.port, limit)
                        .await
                        .map_err(|error| error.to_string())?;
                    let answers = ClientTls::peer(&stream).map_err(|error| error.to_string())?;
                    self.handshake(stream, Some(answers)).await
                }
            }
        };
        let limit_text = || format!("no connection within {} ms", limit.as_millis());
        timeout(limit, attempt)
            .await
            .unwrap_or_else(|_| Err(limit_text()))
    }

    async fn plain(&self) -> Result<TcpStream, String> {
        let failed = |error: std::io::Error| format!("cannot connect: {error}");
        let found = tokio::net::lookup_host((self.host.as_str(), self.port))
            .await
            .map_err(failed)?;
        let loopback: Vec<_> = found.filter(|address| address.ip().is_loopback()).collect();
        if loopback.is_empty() {
            return Err(
                "connections without TLS are for loopback addresses only; configure certificates"
                    .to_owned(),
            );
        }
        let tcp = TcpStream::connect(loopback.as_slice())
            .await
            .map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        Ok(tcp)
    }

    /// Whether who answers on an older connection would be accepted now. The error is for people.
    pub(crate) fn recheck(&self, answers: Option<&Peer>) -> Result<(), String> {
        match (&self.transport, answers) {
            (Transport::Tls(tls), Some(peer)) => {
                tls.recheck(peer).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }

    async fn handshake<T>(&self, io: T, answers: Option<Peer>) -> Result<Connected, String>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_reset_streams(RESET_STREAMS)
            .max_local_error_reset_streams(None)
            // A token is a small frame, and an unread stream holds many: the stream window bounds them.
            .data_frame_budget(usize::MAX)
            .handshake(io)
            .await
            .map_err(|error| format!("HTTP/2 set-up failed: {error}"))?;
        let ping = connection.ping_pong();
        let address = Arc::clone(&self.address);
        let driver = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(peer = %address, %error, "connection ended");
            }
        });
        let channel = Channel {
            sender,
            name: Name {
                address: Arc::clone(&self.address),
                peer: Arc::clone(&self.peer),
            },
            origin: self.origin.clone(),
        };
        Ok(Connected {
            channel,
            ping,
            driver,
            answers,
        })
    }
}

/// A connection that can be cloned for every call. It closes when the last clone and the last call are gone.
#[derive(Clone)]
pub(crate) struct Channel {
    sender: SendRequest<Bytes>,
    name: Name,
    origin: Uri,
}

#[derive(Clone)]
struct Name {
    address: Arc<str>,
    peer: Arc<str>,
}

impl Channel {
    /// A client for one call.
    pub(crate) fn grpc(&self) -> Grpc<Self> {
        Grpc::with_origin(self.clone(), self.origin.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// Why a call found its connection broken. It names addresses, so it stays behind the message, which may reach
/// the platform's clients.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
struct Broken {
    cause: String,
    untouched: bool,
}

impl Name {
    /// `sent`: the request had left.
    fn broken(&self, error: &h2::Error, sent: bool) -> Status {
        // RFC 9113, 6.8 and 8.7: what the peer refuses with these it has not looked at.
        let refused = error.is_remote()
            && match error.reason() {
                Some(Reason::REFUSED_STREAM) => error.is_reset(),
                Some(Reason::NO_ERROR) => error.is_go_away(),
                _ => false,
            };
        let mut status = Status::unavailable(format!(
            "the connection to the {} broke; send the request again",
            self.peer
        ));
        status.set_source(Arc::new(Broken {
            cause: format!("the connection to {} broke: {error}", self.address),
            untouched: !sent || refused,
        }));
        status
    }
}

/// Whether the peer has not looked at the request that failed with this status.
pub(crate) fn untouched(status: &Status) -> bool {
    let broken = status.source().and_then(|source| source.downcast_ref());
    broken.is_some_and(|broken: &Broken| broken.untouched)
}

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<Answer>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.sender
            .poll_ready(context)
            .map_err(|error| self.name.broken(&error, false))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let (parts, body) = request.into_parts();
        let sent = self
            .sender
            .send_request(http::Request::from_parts(parts, ()), false);
        let name = self.name.clone();
        Box::pin(async move {
            let (response, stream) = sent.map_err(|error| name.broken(&error, false))?;
            send(body, stream).await?;
            let response = response.await.map_err(|error| name.broken(&error, true))?;
            Ok(response.map(|stream| Answer {
                stream,
                name,
                data_done: false,
            }))
        })
    }
}

/// Sends a request body of few frames. A stream that the peer has closed is no error here: its answer tells why.
async fn send(body: tonic::body::Body, mut stream: SendStream<Bytes>) -> Result<(), Status> {
    let mut body = pin!(body);
    let mut held: Option<Bytes> = None;
    while let Some(frame) = poll_fn(|context| body.as_mut().poll_frame(context)).await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if let Some(earlier) = held.replace(data)
            && stream.send_data(earlier, false).is_err()
        {
            return Ok(());
        }
    }
    // The last frame carries the end of the stream: one frame for nearly every request.
    let _ = stream.send_data(held.unwrap_or_default(), true);
    Ok(())
}

/// Body of an answer. Dropping it before its end resets the stream.
pub(crate) struct Answer {
    stream: RecvStream,
    name: Name,
    data_done: bool,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if !this.data_done {
            match ready!(this.stream.poll_data(context)) {
                Some(Ok(data)) => {
                    // Only what is consumed is given back: an unread stream fills its window and no more.
                    let released = this.stream.flow_control().release_capacity(data.len());
                    let frame = released.map(|()| Frame::data(data));
                    return Poll::Ready(Some(
                        frame.map_err(|error| this.name.broken(&error, true)),
                    ));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(this.name.broken(&error, true)))),
                None => this.data_done = true,
            }
        }
        let trailers: Option<HeaderMap> = ready!(this.stream.poll_trailers(context))
            .map_err(|error| this.name.broken(&error, true))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}

/// A request that carries its id, for the peer's log lines.
pub(crate) fn request<T>(message: T, request_id: &str) -> Request<T> {
    let mut request = Request::new(message);
    if !request_id.is_empty()
        && let Ok(id) = request_id.parse()
    {
        request.metadata_mut().insert("x-request-id", id);
    }
    request
}

/// What comes before the deadline; the error says that `whose` answer did not.
pub(crate) async fn within<T>(
    deadline: Option<Instant>,
    whose: &str,
    work: impl Future<Output = T>,
) -> Result<T, CoreError> {
    let Some(deadline) = deadline else {
        return Ok(work.await);
    };
    let late = |_| {
        let message = format!("{whose} did not answer in time; try again");
        CoreError::new(Code::DeadlineExceeded, message)
    };
    timeout_at(deadline, work).await.map_err(late)
}

/// Ends when a ping was not answered in time.
pub(crate) async fn pings(ping: Option<PingPong>, options: Options) {
    let Some(mut ping) = ping else {
        return std::future::pending().await;
    };
    loop {
        sleep(options.ping_interval).await;
        match timeout(options.ping_timeout, ping.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // A broken connection: its driver and its streams tell more.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// Completes when our certificates were swapped.
pub(crate) async fn swapped(swaps: Option<&mut watch::Receiver<u64>>) {
    let changed = match swaps {
        Some(swaps) => swaps.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending::<()>().await;
    }
}

/// Between half of `pause` and all of it: clients that lost a server together come back apart.
pub(crate) fn jitter(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) % 1000;
    pause / 2 + (pause / 2000) * u32::try_from(random).unwrap_or_default()
}
