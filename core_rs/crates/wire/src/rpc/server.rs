//! The server's side: calls wait for a desk, and answers for their reader, both within bounds.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_util::Stream;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService};
use tonic::{Request, Response, Status};

use super::codec::Codec;
use super::{METHODS, Method};
use crate::error::{Code, CoreError};
use crate::server::Caller;

/// Largest request: a batch of the ledger's rows.
const MAX_REQUEST: usize = 16 << 20;
/// Messages, and bytes, that wait for the reader of one stream. One message always fits.
const MAX_WAITING: usize = 1024;
const MAX_WAITING_BYTES: usize = 4 << 20;
/// Longer request ids are not handed on.
const MAX_ID: usize = 128;

/// Who answers the calls. Neither method may block.
pub trait Desk: Send + Sync + 'static {
    /// A new call.
    fn call(&self, call: Incoming);
    /// A call that `call` was given was cancelled, or takes messages again after it took none.
    fn changed(&self, id: u64);
}

/// The raw services of one server.
pub struct Raw {
    services: Vec<String>,
    desk: Arc<dyn Desk>,
    open: Arc<Semaphore>,
    next: AtomicU64,
}

impl Raw {
    /// Serves these services (`AuthService`); at most `max_calls` calls are open at a time.
    ///
    /// # Errors
    /// `invalid_request` for a service that no proto has.
    pub fn new(
        names: Vec<String>,
        desk: Arc<dyn Desk>,
        max_calls: usize,
    ) -> Result<Self, CoreError> {
        let full = |name: String| {
            let suffix = format!(".{name}");
            let mut known = METHODS.values().map(|method| &method.service);
            let found = known.find(|service| service.ends_with(&suffix));
            found.cloned().ok_or_else(|| {
                CoreError::invalid("services", format!("no proto has a service {name:?}"))
            })
        };
        Ok(Self {
            services: names.into_iter().map(full).collect::<Result<_, _>>()?,
            desk,
            open: Arc::new(Semaphore::new(max_calls.min(Semaphore::MAX_PERMITS))),
            next: AtomicU64::new(1),
        })
    }

    /// Full names of the services.
    pub(crate) fn services(&self) -> &[String] {
        &self.services
    }

    /// The method of a path, when it is one of these services.
    pub(crate) fn find(&self, path: &str) -> Option<&'static Method> {
        super::method(path).filter(|method| self.services.contains(&method.service))
    }

    /// Answers one call.
    pub(crate) async fn serve<B>(
        &self,
        method: &'static Method,
        request: http::Request<B>,
    ) -> http::Response<Body>
    where
        B: http_body::Body + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        // Before the message is read: what waits is bounded in bytes too.
        let Ok(permit) = Arc::clone(&self.open).try_acquire_owned() else {
            let busy = CoreError::new(Code::Unavailable, "the service is busy; try again later")
                .with_retry_after(1);
            return Status::from(busy).into_http();
        };
        let opening = Opening {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            method,
            desk: Arc::clone(&self.desk),
            permit: Some(permit),
        };
        Grpc::new(Codec)
            .max_decoding_message_size(MAX_REQUEST)
            .server_streaming(opening, request)
            .await
    }
}

/// A call whose message is being read.
struct Opening {
    id: u64,
    method: &'static Method,
    desk: Arc<dyn Desk>,
    permit: Option<OwnedSemaphorePermit>,
}

impl ServerStreamingService<Bytes> for Opening {
    type Response = Bytes;
    type ResponseStream = Answers;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answers>, Status>> + Send>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let request_id = request
            .metadata()
            .get("x-request-id")
            .and_then(|id| id.to_str().ok())
            .filter(|id| id.len() <= MAX_ID)
            .unwrap_or_default()
            .to_owned();
        let caller = request.extensions().get::<Caller>().cloned();
        let exchange = Arc::new(Exchange {
            id: self.id,
            state: Mutex::default(),
            desk: Arc::clone(&self.desk),
            _permit: self.permit.take(),
        });
        let mut answers = Answers(Arc::clone(&exchange));
        self.desk.call(Incoming {
            id: self.id,
            method: self.method,
            message: request.into_inner(),
            caller,
            request_id,
            reply: Reply(exchange),
        });
        Box::pin(async move {
            // An error before the first message is the call's whole answer, and no frame leaves before there is one.
            poll_fn(|context| answers.poll_first(context)).await?;
            Ok(Response::new(answers))
        })
    }
}

/// One call, as the desk gets it.
pub struct Incoming {
    /// Of the call; counts up.
    pub id: u64,
    /// What was called.
    pub method: &'static Method,
    /// The encoded request.
    pub message: Bytes,
    /// Who calls.
    pub caller: Option<Caller>,
    /// `x-request-id`, or empty.
    pub request_id: String,
    /// Where the answer goes.
    pub reply: Reply,
}

/// What both ends of an answer share. The lock is held for moves only.
struct Exchange {
    id: u64,
    state: Mutex<State>,
    desk: Arc<dyn Desk>,
    /// The place among the open calls is given back when both ends have gone.
    _permit: Option<OwnedSemaphorePermit>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Bytes>,
    bytes: usize,
    end: Option<Result<(), CoreError>>,
    /// The error at the end was read.
    failed: bool,
    /// The reader has gone.
    gone: bool,
    /// `send` was told that there is no room.
    blocked: bool,
    reader: Option<Waker>,
}

impl State {
    fn push(&mut self, message: Bytes) {
        self.bytes += message.len();
        self.waiting.push_back(message);
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING || self.bytes >= MAX_WAITING_BYTES
    }
}

impl Exchange {
    fn end(&self, last: Option<Bytes>, end: Result<(), CoreError>) {
        let reader = {
            let mut state = self.state.lock();
            if state.end.is_some() {
                return;
            }
            if let Some(last) = last {
                state.push(last);
            }
            state.end = Some(end);
            state.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

/// The writing end of an answer. Dropping it unfinished fails the call as `internal`.
pub struct Reply(Arc<Exchange>);

impl Reply {
    /// Queues one message; false, and nothing done, when too many wait or the reader has gone.
    ///
    /// In the first case [`Desk::changed`] tells when there is room again.
    pub fn send(&self, message: Bytes) -> bool {
        let reader = {
            let mut state = self.0.state.lock();
            if state.gone || state.end.is_some() {
                return false;
            }
            if state.is_full() {
                state.blocked = true;
                return false;
            }
            state.push(message);
            state.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
        true
    }

    /// A regular end, behind one more message if there is one.
    pub fn finish(&self, last: Option<Bytes>) {
        self.0.end(last, Ok(()));
    }

    /// An end with an error, behind what was sent.
    pub fn fail(&self, error: CoreError) {
        self.0.end(None, Err(error));
    }

    /// The caller has gone, or has cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.state.lock().gone
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let lost = CoreError::new(Code::Internal, "the service gave no answer");
        self.0.end(None, Err(lost));
    }
}

/// The reading end: the body of the response.
pub(super) struct Answers(Arc<Exchange>);

impl Answers {
    /// Ready when there is a message or a regular end.
    fn poll_first(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let mut state = self.0.state.lock();
        if state.waiting.is_empty() {
            match &state.end {
                None => {
                    state.reader = Some(context.waker().clone());
                    return Poll::Pending;
                }
                Some(Err(error)) => {
                    let status = error.clone().into();
                    state.failed = true;
                    return Poll::Ready(Err(status));
                }
                Some(Ok(())) => {}
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Stream for Answers {
    type Item = Result<Bytes, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.state.lock();
        let Some(message) = state.waiting.pop_front() else {
            let Some(end) = &state.end else {
                state.reader = Some(context.waker().clone());
                return Poll::Pending;
            };
            let end = end.clone();
            return Poll::Ready(match end {
                Err(error) if !std::mem::replace(&mut state.failed, true) => {
                    Some(Err(error.into()))
                }
                _ => None,
            });
        };
        state.bytes -= message.len();
        // Half empty: not one wake-up for each message.
        let room = state.waiting.len() * 2 <= MAX_WAITING && state.bytes * 2 <= MAX_WAITING_BYTES;
        let told = room && std::mem::take(&mut state.blocked);
        drop(state);
        if told {
            self.0.desk.changed(self.0.id);
        }
        Poll::Ready(Some(Ok(message)))
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.gone = true;
        state.waiting.clear();
        state.bytes = 0;
        let cut = state.end.is_none();
        drop(state);
        if cut {
            self.0.desk.changed(self.0.id);
        }
    }
}
