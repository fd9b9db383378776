//! A connection that is read strictly and watched by the clock: everything that comes in and goes out passes here.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

use crate::frames::Frames;
use crate::framing::{Framing, Phase, Violation};
use crate::options::Options;

/// Bytes that are read at a time.
const READ: usize = 16_384;
/// Takes the place of a head that is refused; what is wrong with it says [`State::refusal`].
const REFUSED: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// No part of a body in chunks, wherever in it this stands.
const BROKEN: &[u8] = b"\r?";

/// Why a head was refused before it was a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It is malformed.
    Violation(Violation),
    /// It took too long.
    Slow,
}

/// What a connection and the requests on it know of each other.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Requests that are being answered.
    active: AtomicUsize,
    /// Requests that have come here, and which of them is none, but stands for a head that was refused.
    requests: AtomicU64,
    refused: Mutex<Option<(u64, Refused)>>,
    /// Of the connection's task, while it waits for the end of an answer.
    waker: AtomicWaker,
    /// All that was asked was answered and sent a while ago, and nothing has come since. HTTP/1.1 only.
    parked: AtomicBool,
    /// Nothing was asked for too long: the connection is to be ended politely.
    pub(crate) idle: Notify,
    ended: AtomicU8,
}

/// Why a connection was ended by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Ended {
    /// It was not.
    No = 0,
    /// It never said anything.
    Silent = 1,
    /// It did not take what was sent.
    Stalled = 2,
    /// It sent too many frames that carry nothing.
    Flood = 3,
}

/// A request that is being answered.
#[derive(Debug)]
pub(crate) struct Active(Arc<State>);

impl State {
    /// A request begins: said as soon as it is read, before anything of its answer is done.
    pub(crate) fn begin(self: &Arc<Self>) -> Active {
        self.active.fetch_add(1, Ordering::AcqRel);
        self.parked.store(false, Ordering::Release);
        Active(Arc::clone(self))
    }

    /// Whether a request is being answered.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// The next request has come: why its head was refused, if it was. HTTP/1.1 serves them in their order.
    fn refusal(&self) -> Option<Refused> {
        let number = self.requests.fetch_add(1, Ordering::AcqRel);
        self.refused
            .lock()
            .take_if(|(refused, _)| *refused == number)
            .map(|(_, why)| why)
    }

    /// Why we ended the connection.
    pub(crate) fn ended(&self) -> Ended {
        match self.ended.load(Ordering::Acquire) {
            1 => Ended::Silent,
            2 => Ended::Stalled,
            3 => Ended::Flood,
            _ => Ended::No,
        }
    }

    /// Whether whoever serves the connection keeps nothing of it: the stream is all there is.
    pub(crate) fn is_parked(&self) -> bool {
        self.parked.load(Ordering::Acquire)
    }

    fn end(&self, why: Ended) {
        self.ended.store(why as u8, Ordering::Release);
    }
}

impl Active {
    /// Why the head of this request was refused, if it was.
    pub(crate) fn refusal(&self) -> Option<Refused> {
        self.0.refusal()
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::AcqRel);
        // From now on it is idle, and its clock runs.
        self.0.waker.wake();
    }
}

#[derive(Debug)]
enum Protocol {
    One(Box<Framing>),
    Two(Box<Frames>),
}

/// What is read any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Open,
    /// Nothing: for the server it has ended.
    Over,
    /// Nothing: what came was refused, and the answer to that is the last.
    Refused,
}

/// Times of one connection.
#[derive(Clone, Copy, Debug)]
struct Times {
    first_byte: Duration,
    head: Duration,
    idle: Duration,
    park: Duration,
    write_stall: Duration,
}

/// How far an answer has come on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    /// Nothing of it has been written.
    Nothing,
    /// Some of it may still wait.
    Some,
    /// Everything that was written was sent.
    Sent,
}

/// Which limit the clock is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    None,
    FirstByte,
    Head,
    Idle,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Watched<S> {
    stream: S,
    protocol: Protocol,
    state: Arc<State>,
    times: Times,
    /// Checked, and not read by the server yet.
    passed: BytesMut,
    input: Input,
    heard: bool,
    limit: Limit,
    /// Requests that the clock knows of.
    seen: u64,
    /// What was written since the last bytes came.
    written: Written,
    /// The clock is at the first part of the idle time, behind which the connection is parked.
    parks: bool,
    clock: Pin<Box<Sleep>>,
    stalled: bool,
    stall: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Watched<S> {
    /// Watches `stream`, of which `first` was read already. `two`: it speaks HTTP/2.
    ///
    /// Fails when the first bytes are not acceptable; for HTTP/1.1 that is answered like any other head.
    pub(crate) fn new(
        stream: S,
        two: bool,
        first: &[u8],
        state: Arc<State>,
        options: &Options,
    ) -> io::Result<Self> {
        let now = Instant::now();
        let far = || Box::pin(tokio::time::sleep_until(now));
        let mut watched = Self {
            stream,
            protocol: if two {
                Protocol::Two(Box::new(Frames::new(now.into_std())))
            } else {
                Protocol::One(Box::new(Framing::new(options.head_bytes)))
            },
            state,
            times: Times {
                first_byte: options.first_byte,
                head: options.head,
                idle: options.idle,
                park: options.park.min(options.idle),
                write_stall: options.write_stall,
            },
            passed: BytesMut::new(),
            input: Input::Open,
            heard: false,
            limit: Limit::None,
            seen: 0,
            written: Written::Nothing,
            parks: false,
            clock: far(),
            stalled: false,
            stall: far(),
        };
        if !first.is_empty() {
            watched.take(first)?;
        }
        Ok(watched)
    }

    /// Bytes that have come.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.heard = true;
        self.written = Written::Nothing;
        self.state.parked.store(false, Ordering::Release);
        match &mut self.protocol {
            Protocol::One(framing) => {
                if let Err(violation) = framing.feed(bytes, &mut self.passed) {
                    if framing.phase() == Phase::Body {
                        // The request is under way; whoever reads its body hears of it, and may still answer.
                        self.input = Input::Refused;
                        self.passed.extend_from_slice(BROKEN);
                    } else {
                        self.refuse(Refused::Violation(violation));
                    }
                }
                Ok(())
            }
            Protocol::Two(frames) => {
                if let Err(flood) = frames.feed(bytes, Instant::now().into_std()) {
                    self.state.end(Ended::Flood);
                    return Err(io::Error::other(flood));
                }
                self.passed.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn refuse(&mut self, why: Refused) {
        let number = match &self.protocol {
            Protocol::One(framing) => framing.heads(),
            Protocol::Two(_) => u64::MAX,
        };
        *self.state.refused.lock() = Some((number, why));
        self.input = Input::Refused;
        self.passed.extend_from_slice(REFUSED);
    }

    /// Which limit holds while nothing comes.
    fn waiting_for(&self) -> Limit {
        if !self.heard {
            return Limit::FirstByte;
        }
        let answering = self.state.is_active();
        match &self.protocol {
            Protocol::One(framing) => match framing.phase() {
                Phase::Head => Limit::Head,
                Phase::Between if !answering => Limit::Idle,
                _ => Limit::None,
            },
            Protocol::Two(_) if !answering => Limit::Idle,
            Protocol::Two(_) => Limit::None,
        }
    }

    /// Nothing came: has somebody waited too long? Ready when the read is over.
    fn poll_clock(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state.waker.register(context.waker());
        let seen = self.state.requests.load(Ordering::Acquire);
        if seen != self.seen {
            // However short it was, after a request the clock begins anew. Bytes alone are none.
            self.seen = seen;
            self.limit = Limit::None;
        }
        let limit = self.waiting_for();
        if limit != self.limit {
            self.limit = limit;
            let time = match limit {
                Limit::None => return Poll::Pending,
                Limit::FirstByte => self.times.first_byte,
                Limit::Head => self.times.head,
                Limit::Idle if matches!(self.protocol, Protocol::One(_)) => self.times.park,
                Limit::Idle => self.times.idle,
            };
            self.parks = limit == Limit::Idle && time < self.times.idle;
            self.clock.as_mut().reset(Instant::now() + time);
        }
        if limit == Limit::None {
            return Poll::Pending;
        }
        ready!(self.clock.as_mut().poll(context));
        if self.parks {
            self.parks = false;
            // What an answer has not sent is not to be lost.
            let parked = self.written == Written::Sent;
            self.state.parked.store(parked, Ordering::Release);
            let left = self.times.idle.saturating_sub(self.times.park);
            self.clock.as_mut().reset(Instant::now() + left);
            ready!(self.clock.as_mut().poll(context));
        }
        match limit {
            Limit::Head if matches!(self.protocol, Protocol::One(_)) => self.refuse(Refused::Slow),
            Limit::Idle if matches!(self.protocol, Protocol::Two(_)) => {
                // Its driver says goodbye; should the client not listen, the next round ends it.
                self.state.idle.notify_one();
                if self.input == Input::Over {
                    return Poll::Ready(Ok(()));
                }
                self.input = Input::Over;
                self.limit = Limit::None;
                return Poll::Pending;
            }
            Limit::FirstByte => {
                self.state.end(Ended::Silent);
                self.input = Input::Over;
            }
            _ => self.input = Input::Over,
        }
        Poll::Ready(Ok(()))
    }

    /// Reads until something can be handed on, or the stream has ended: then `passed` is empty.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let two = matches!(self.protocol, Protocol::Two(_));
        loop {
            if !self.passed.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.input == Input::Refused {
                // The end of the stream would make the server drop its answer, which ends the connection anyway.
                return Poll::Pending;
            }
            if self.input == Input::Over && !two {
                return Poll::Ready(Ok(()));
            }
            let mut space = [std::mem::MaybeUninit::uninit(); READ];
            let mut read = ReadBuf::uninit(&mut space);
            match Pin::new(&mut self.stream).poll_read(context, &mut read) {
                Poll::Ready(Ok(())) if read.filled().is_empty() => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(())) => self.take(read.filled())?,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    ready!(self.poll_clock(context))?;
                    if self.passed.is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }

    /// Waits for bytes; whether there are any. Needs no buffer meanwhile.
    pub(crate) async fn more(&mut self) -> io::Result<bool> {
        std::future::poll_fn(|context| self.poll_fill(context)).await?;
        Ok(!self.passed.is_empty())
    }

    /// Hands on what was checked. The end of the stream when there is nothing, and nothing comes any more.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.passed.len().min(buffer.remaining());
        buffer.put_slice(&self.passed[..count]);
        self.passed.advance(count);
        if self.passed.is_empty() {
            // An idle connection keeps no buffer.
            self.passed = BytesMut::new();
        }
    }

    fn poll_stall<T>(
        &mut self,
        context: &mut Context<'_>,
        poll: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = false;
            return poll;
        }
        if !self.stalled {
            self.stalled = true;
            self.stall
                .as_mut()
                .reset(Instant::now() + self.times.write_stall);
        }
        ready!(self.stall.as_mut().poll(context));
        self.state.end(Ended::Stalled);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.poll_fill(context))?;
        this.give(buffer);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.written = Written::Some;
        let poll = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.poll_stall(context, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.written = Written::Some;
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.poll_stall(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        if self.written == Written::Some && matches!(poll, Poll::Ready(Ok(()))) {
            self.written = Written::Sent;
        }
        self.poll_stall(context, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_shutdown(context);
        self.poll_stall(context, poll)
    }
}
