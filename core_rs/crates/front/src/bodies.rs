//! Bodies on their way: watched by the clock, unfolded, folded, and ended well when a worker dies.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_compression::tokio::bufread::{GzipDecoder, GzipEncoder, ZstdDecoder, ZstdEncoder};
use async_compression::{Level, zstd::DParameter};
use bytes::{Buf, Bytes};
use futures_util::StreamExt as _;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::io::AsyncRead;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::refusal::{Body, Fault, Refusal};
use crate::workers::Lease;

/// Window of zstd that a body may use: memory of ours (8 MiB).
const WINDOW_LOG: u32 = 23;
/// What is unfolded at a time.
const PIECE: usize = 16_384;

/// Why the body of a request failed, for the answer.
pub(crate) type Failed = Arc<Mutex<Option<Refusal>>>;

/// A body that is given up when it comes too slowly. Only time in which nothing came counts.
#[derive(Debug)]
pub(crate) struct Rated {
    body: Incoming,
    rate: u64,
    grace: Duration,
    /// Time that was spent waiting for the client, and since when it is again.
    waited: Duration,
    since: Option<Instant>,
    come: u64,
    clock: Pin<Box<Sleep>>,
    failed: Failed,
    /// Tells that the worker asks for the body; before that it is not read.
    asked: Option<oneshot::Receiver<()>>,
    /// The worker has answered without it: reading would ask the client for what nobody wants.
    unwanted: bool,
}

impl Rated {
    /// `rate`: least bytes a second after `grace`. `asked`: the client waits for a sign before it sends.
    pub(crate) fn new(
        body: Incoming,
        rate: u64,
        grace: Duration,
        failed: Failed,
        asked: Option<oneshot::Receiver<()>>,
    ) -> Self {
        Self {
            body,
            rate: rate.max(1),
            grace,
            waited: Duration::ZERO,
            since: None,
            come: 0,
            clock: Box::pin(tokio::time::sleep(Duration::ZERO)),
            failed,
            asked,
            unwanted: false,
        }
    }

    fn allowed(&self) -> Duration {
        #[allow(clippy::cast_precision_loss)] // a time
        let earned = self.come as f64 / self.rate as f64;
        self.grace + Duration::try_from_secs_f64(earned).unwrap_or(Duration::MAX / 2)
    }
}

impl HttpBody for Rated {
    type Data = Bytes;
    type Error = Fault;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        let this = &mut *self;
        if let Some(asked) = &mut this.asked {
            this.unwanted = ready!(Pin::new(asked).poll(context)).is_err();
            this.asked = None;
        }
        if this.unwanted {
            return Poll::Pending;
        }
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(frame) => {
                if let Some(since) = this.since.take() {
                    this.waited += since.elapsed();
                }
                if let Some(Ok(data)) = &frame {
                    this.come += data.data_ref().map_or(0, |data| data.len() as u64);
                }
                if matches!(frame, Some(Err(_))) {
                    *this.failed.lock() = Some(Refusal::Broken);
                }
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending => {
                if this.since.is_none() {
                    let now = Instant::now();
                    this.since = Some(now);
                    let left = this.allowed().saturating_sub(this.waited);
                    this.clock.as_mut().reset(now + left);
                }
                ready!(this.clock.as_mut().poll(context));
                let refusal = Refusal::Slow("the body came too slowly");
                *this.failed.lock() = Some(refusal.clone());
                Poll::Ready(Some(Err(refusal.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How a body is folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coding {
    Gzip,
    Zstd,
}

impl Coding {
    /// As it is called in headers.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    pub(crate) fn of(name: &str) -> Option<Self> {
        match name.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The one that a client likes best (RFC 9110 §12.5.3), of those that we have.
    pub(crate) fn chosen(accept: &str) -> Option<Self> {
        let mut best: Option<(Self, u32)> = None;
        for part in accept.split(',') {
            let (name, quality) = part.split_once(';').unwrap_or((part, "q=1"));
            let quality = quality
                .trim()
                .strip_prefix("q=")
                .and_then(|q| q.trim().parse::<f32>().ok());
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 1000
            let quality = (quality.unwrap_or(0.0).clamp(0.0, 1.0) * 1000.0) as u32;
            let Some(coding) = Self::of(name) else {
                continue;
            };
            let better = best.is_none_or(|(other, most)| {
                quality > most || (quality == most && other == Self::Gzip)
            });
            if quality > 0 && better {
                best = Some((coding, quality));
            }
        }
        best.map(|(coding, _)| coding)
    }
}

/// Unfolds the body of a request, up to `limit` bytes.
pub(crate) fn unfold(body: Rated, coding: Coding, limit: u64, failed: Failed) -> Body {
    let reader = StreamReader::new(data(body));
    let unfolded: Pin<Box<dyn AsyncRead + Send>> = match coding {
        Coding::Gzip => Box::pin(GzipDecoder::new(reader)),
        Coding::Zstd => Box::pin(ZstdDecoder::with_params(
            reader,
            &[DParameter::window_log_max(WINDOW_LOG)],
        )),
    };
    let mut left = limit;
    let pieces =
        ReaderStream::with_capacity(unfolded, PIECE).map(move |piece| -> Result<_, Fault> {
            let mut failed = failed.lock();
            let refusal = match piece {
                Ok(piece) if piece.len() as u64 <= left => {
                    left -= piece.len() as u64;
                    return Ok(Frame::data(piece));
                }
                Ok(_) => Refusal::TooLarge(limit),
                // The client's own silence is the reason already.
                Err(error) => failed
                    .clone()
                    .unwrap_or_else(|| Refusal::Unfold(error.to_string())),
            };
            *failed = Some(refusal.clone());
            Err(refusal.into())
        });
    StreamBody::new(pieces).boxed_unsync()
}

/// Folds an answer.
pub(crate) fn fold(
    body: impl HttpBody<Data = Bytes, Error = Fault> + Send + 'static,
    coding: Coding,
) -> Body {
    let reader = StreamReader::new(data(body));
    let folded: Pin<Box<dyn AsyncRead + Send>> = match coding {
        Coding::Gzip => Box::pin(GzipEncoder::with_quality(reader, Level::Fastest)),
        Coding::Zstd => Box::pin(ZstdEncoder::with_quality(reader, Level::Fastest)),
    };
    let pieces = ReaderStream::with_capacity(folded, PIECE);
    StreamBody::new(pieces.map(|piece| piece.map(Frame::data).map_err(Fault::from))).boxed_unsync()
}

/// The data of a body, without its trailers.
fn data(
    body: impl HttpBody<Data = Bytes, Error = Fault> + Send + 'static,
) -> Pin<Box<dyn futures_util::Stream<Item = io::Result<Bytes>> + Send>> {
    Box::pin(BodyStream::new(body).filter_map(async |frame| match frame {
        Ok(frame) => frame.into_data().ok().map(Ok),
        Err(error) => Some(Err(io::Error::other(error))),
    }))
}

/// The answer of a worker. Holds `with` until it is over.
pub(crate) struct Answer<T> {
    body: Incoming,
    lease: Lease,
    events: bool,
    /// The last bytes that went out end an event.
    between: bool,
    over: bool,
    _with: T,
}

impl<T> Answer<T> {
    /// `events`: it is a stream of server-sent events, which ends with an error event should the worker die.
    pub(crate) fn new(body: Incoming, mut lease: Lease, events: bool, with: T) -> Self {
        let over = body.is_end_stream();
        if over {
            // Nobody will ask for more.
            lease.give_back();
        }
        Self {
            body,
            lease,
            events,
            between: true,
            over,
            _with: with,
        }
    }

    fn last_event(&self) -> Bytes {
        let json = Refusal::Lost.json();
        let before = if self.between { "" } else { "\n\n" };
        Bytes::from(format!("{before}data: {json}\n\ndata: [DONE]\n\n"))
    }
}

impl<T: Unpin> HttpBody for Answer<T> {
    type Data = Bytes;
    type Error = Fault;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Fault>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref().filter(|data| data.has_remaining()) {
                    self.between = data.ends_with(b"\n\n");
                }
                if self.body.is_end_stream() {
                    self.over = true;
                    self.lease.give_back();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.over = true;
                if self.events {
                    tracing::debug!(%error, "a worker ended in the midst of a stream");
                    return Poll::Ready(Some(Ok(Frame::data(self.last_event()))));
                }
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                self.over = true;
                self.lease.give_back();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
