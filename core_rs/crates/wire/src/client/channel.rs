//! One HTTP/2 connection to a pool, as a service that tonic can call.
//!
//! Built on `h2` without a layer between: a call costs no task and no channel hop, dropping it resets its stream
//! at once, and the limits of the connection are ours to set. The pool is authenticated by mutual TLS, so limits
//! that guard against hostile peers give way to those that keep calls apart.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{PingPong, RecvStream, SendStream};
use helix_tls::ClientTls;
use http::{HeaderMap, Uri};
use http_body::{Body, Frame};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tonic::Status;
use tonic::client::Grpc;

use super::Options;
use crate::error::CoreError;

/// Slow readers may hold a whole stream window each; the connection must not run out because of them.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Calls that were cancelled while the pool still sent: remembered for a while, so that late frames are ignored.
const RESET_STREAMS: usize = 8192;
/// An echo with log probabilities of a long prompt is one large message.
const MAX_MESSAGE: usize = 64 << 20;

/// How pools are reached.
#[derive(Clone)]
pub enum Transport {
    /// Without TLS: loopback addresses only.
    Plain,
    /// Mutual TLS.
    Tls(Arc<ClientTls>),
}

/// Where one pool is, and how to connect to it.
pub(super) struct Endpoint {
    address: Arc<str>,
    host: String,
    port: u16,
    transport: Transport,
    origin: Uri,
    connect_timeout: Duration,
    stream_window: u32,
}

/// A fresh connection.
pub(super) struct Connected {
    pub(super) channel: Channel,
    pub(super) ping: Option<PingPong>,
    /// Aborting it cuts every call of the connection; otherwise it ends with the last of them.
    pub(super) driver: AbortHandle,
}

impl Endpoint {
    pub(super) fn new(
        address: &str,
        transport: &Transport,
        options: &Options,
    ) -> Result<Self, CoreError> {
        let wrong = |what: &str| {
            CoreError::invalid("addresses", format!("pool address {address:?} {what}"))
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
            host: host.to_owned(),
            port,
            transport: transport.clone(),
            origin,
            connect_timeout: options.connect_timeout,
            stream_window: options.stream_window,
        })
    }

    pub(super) fn address(&self) -> Arc<str> {
        Arc::clone(&self.address)
    }

    /// Counts the swaps of our certificates; `None` without TLS.
    pub(super) fn swaps(&self) -> Option<tokio::sync::watch::Receiver<u64>> {
        match &self.transport {
            Transport::Plain => None,
            Transport::Tls(tls) => Some(tls.swaps()),
        }
    }

    /// TCP, TLS and HTTP/2, all within the connect timeout. The error is for people.
    pub(super) async fn connect(&self) -> Result<Connected, String> {
        let limit = self.connect_timeout;
        let attempt = async {
            match &self.transport {
                Transport::Plain => self.handshake(self.plain().await?).await,
                Transport::Tls(tls) => {
                    let stream = tls
                        .connect(&self.host, self.port, limit)
                        .await
                        .map_err(|error| error.to_string())?;
                    self.handshake(stream).await
                }
            }
        };
        let limit_text = || format!("no connection within {} ms", limit.as_millis());
        tokio::time::timeout(limit, attempt)
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

    async fn handshake<T>(&self, io: T) -> Result<Connected, String>
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
                tracing::debug!(pool = %address, %error, "connection ended");
            }
        });
        let channel = Channel {
            sender,
            address: Arc::clone(&self.address),
            origin: self.origin.clone(),
        };
        Ok(Connected {
            channel,
            ping,
            driver: driver.abort_handle(),
        })
    }
}

/// A connection that can be cloned for every call. It closes when the last clone and the last call are gone.
#[derive(Clone)]
pub(super) struct Channel {
    sender: SendRequest<Bytes>,
    address: Arc<str>,
    origin: Uri,
}

impl Channel {
    /// A client for one call.
    pub(super) fn grpc(&self) -> Grpc<Self> {
        Grpc::with_origin(self.clone(), self.origin.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// The message may reach the platform's clients, so the address and the cause stay in the source.
fn broken(address: &str, error: &h2::Error) -> Status {
    let mut status =
        Status::unavailable("the connection to the inference pool broke; send the request again");
    let cause = format!("the connection to {address} broke: {error}");
    status.set_source(Arc::new(std::io::Error::other(cause)));
    status
}

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<Answer>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.sender
            .poll_ready(context)
            .map_err(|error| broken(&self.address, &error))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let (parts, body) = request.into_parts();
        let sent = self
            .sender
            .send_request(http::Request::from_parts(parts, ()), false);
        let address = Arc::clone(&self.address);
        Box::pin(async move {
            let (response, stream) = sent.map_err(|error| broken(&address, &error))?;
            send(body, stream).await?;
            let response = response.await.map_err(|error| broken(&address, &error))?;
            Ok(response.map(|stream| Answer {
                stream,
                address,
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
pub(super) struct Answer {
    stream: RecvStream,
    address: Arc<str>,
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
                    return Poll::Ready(Some(frame.map_err(|error| broken(&this.address, &error))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(broken(&this.address, &error)))),
                None => this.data_done = true,
            }
        }
        let trailers: Option<HeaderMap> = ready!(this.stream.poll_trailers(context))
            .map_err(|error| broken(&this.address, &error))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}
