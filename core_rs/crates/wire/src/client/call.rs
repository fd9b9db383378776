//! One `Generate` call: opened at a pool, and again at another one while nothing of its answer was seen.

use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use tokio::time::{Instant, timeout};
use tonic::Streaming;

use super::codec::Codec;
use super::pool::Lease;
use super::{Attempts, Shared};
use crate::connection::{self, within};
use crate::error::{Code, CoreError};
use crate::v1::{FinishReason, GenerateFrame, GenerateRequest, StopReply, StopRequest};

/// What did not answer, for messages.
pub(super) const POOL: &str = "the inference pool";
/// The pool answers a passed deadline itself, and knows more of it; this much later it is passed without its word.
const GRACE: Duration = Duration::from_millis(250);
/// A pool that is asked to stop a call answers within this time, or is not heard any more.
const STOP_WAIT: Duration = Duration::from_millis(500);

/// A running call. Dropping it ends the work at the pool.
pub struct Generation {
    shared: Arc<Shared>,
    request: Arc<GenerateRequest>,
    attempts: Attempts,
    stage: Stage,
    seen: Seen,
    /// The call must have a slot by then; `None` for a request that leaves its deadline to the pool.
    until: Option<Instant>,
}

enum Stage {
    /// At no pool: before the first attempt, or between two.
    Away,
    Running(Box<Attempt>),
    /// Nothing follows.
    Ended,
}

/// The call at one pool.
struct Attempt {
    stream: Streaming<GenerateFrame>,
    lease: Lease,
    /// A choice has failed: the status behind the last frame will say why.
    failing: bool,
    /// The last frame was seen.
    complete: bool,
    /// Its name there, once it has a slot.
    name: Option<u64>,
}

/// What the caller has seen of the answer, whichever pool gave it.
#[derive(Clone, Copy, Default)]
struct Seen {
    accepted: bool,
    /// Text or a regular end was handed out: the call can not start again.
    emitted: bool,
    /// The caller has asked for an end, and takes what there is.
    stopping: bool,
}

impl Generation {
    pub(super) fn new(shared: Arc<Shared>, request: GenerateRequest) -> Self {
        Self {
            shared,
            attempts: Attempts::default(),
            stage: Stage::Away,
            seen: Seen::default(),
            until: deadline(&request),
            request: Arc::new(request),
        }
    }

    /// Address of the pool that serves the call now.
    pub fn pool(&self) -> Option<Arc<str>> {
        match &self.stage {
            Stage::Running(attempt) => Some(attempt.lease.address()),
            Stage::Away | Stage::Ended => None,
        }
    }

    /// The next frame; `None` behind the last one.
    ///
    /// The first frame says `accepted`, once. An error is final: nothing follows it. A deadline that passes before that
    /// frame is kept here too, whatever the pool does.
    pub async fn next(&mut self) -> Result<Option<GenerateFrame>, CoreError> {
        loop {
            let outcome = match &mut self.stage {
                Stage::Ended => return Ok(None),
                Stage::Away => match self.open().await {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
                Stage::Running(attempt) => match attempt.read(&mut self.seen, self.until).await {
                    Ok(Some(frame)) => return Ok(Some(frame)),
                    Ok(None) => Ok(None),
                    Err(error) => match self.go_on(error) {
                        Ok(()) => continue,
                        Err(error) => Err(error),
                    },
                },
            };
            self.stage = Stage::Ended;
            return outcome;
        }
    }

    /// Opens the call at the best pool that was not tried yet.
    async fn open(&mut self) -> Result<(), CoreError> {
        let weight = self.request.inputs.len().max(1) * self.request.n.max(1) as usize;
        let lease = self
            .attempts
            .next(&self.shared, &self.request.model, weight)?;
        if self.seen.accepted {
            // It had its turn once; at the next pool it waits anew.
            self.until = deadline(&self.request);
        }
        let left = self.attempts.tried_any().then_some(self.until).flatten();
        let opened = within(self.until, POOL, start(&lease, &self.request, left)).await?;
        match opened {
            Ok(stream) => {
                let attempt = Attempt {
                    stream,
                    lease,
                    failing: false,
                    complete: false,
                    name: None,
                };
                self.stage = Stage::Running(Box::new(attempt));
                Ok(())
            }
            Err(error) => self.attempts.failed(&lease, error),
        }
    }

    /// Asks the pool to end the call; what it has generated, and the counts, still come from [`Generation::next`].
    ///
    /// # Errors
    /// The pool was not reached, or the call has no slot there: dropping it ends it as well.
    pub async fn stop(&mut self) -> Result<(), CoreError> {
        self.seen.stopping = true;
        let Stage::Running(attempt) = &self.stage else {
            return Err(CoreError::new(Code::Cancelled, "the call is at no pool"));
        };
        let Some(call) = attempt.name else {
            return Err(CoreError::new(Code::Cancelled, "the call still waits"));
        };
        let mut grpc = attempt.lease.channel.grpc();
        let id = &self.request.request_id;
        let asked = async {
            grpc.ready().await?;
            let message = connection::request(Arc::new(StopRequest { call }), id);
            let path = PathAndQuery::from_static("/helixflow.v1.Inference/Stop");
            let codec = Codec::<StopRequest, StopReply>::default();
            grpc.unary(message, path, codec).await
        };
        let late = |_| CoreError::new(Code::DeadlineExceeded, "the pool does not answer");
        timeout(STOP_WAIT, asked).await.map_err(late)??;
        Ok(())
    }

    /// `Ok` when the next round may try another pool.
    fn go_on(&mut self, error: CoreError) -> Result<(), CoreError> {
        match std::mem::replace(&mut self.stage, Stage::Away) {
            Stage::Running(attempt) if !(self.seen.emitted || self.seen.stopping) => {
                self.attempts.failed(&attempt.lease, error)
            }
            _ => Err(error),
        }
    }
}

impl Attempt {
    /// The next frame that the caller may see; `None` at a regular end.
    async fn read(
        &mut self,
        seen: &mut Seen,
        until: Option<Instant>,
    ) -> Result<Option<GenerateFrame>, CoreError> {
        loop {
            let until = until.filter(|_| self.name.is_none());
            match within(until, POOL, self.stream.message()).await?? {
                Some(frame) => {
                    if let Some(frame) = self.admit(frame, seen) {
                        return Ok(Some(frame));
                    }
                }
                None if self.complete && !self.failing => return Ok(None),
                None => {
                    return Err(CoreError::new(
                        Code::Unavailable,
                        "the inference pool ended the answer too early",
                    ));
                }
            }
        }
    }

    /// Notes what a frame says; `None` when the caller must not see it (yet).
    fn admit(&mut self, mut frame: GenerateFrame, seen: &mut Seen) -> Option<GenerateFrame> {
        self.complete |= frame.usage.is_some();
        if let Some(accepted) = &frame.accepted {
            self.name = Some(accepted.call);
        }
        for finished in &frame.finished {
            match finished.reason() {
                FinishReason::Stop | FinishReason::Length => seen.emitted = true,
                _ => self.failing = true,
            }
        }
        seen.emitted |= !frame.deltas.is_empty();
        if self.failing && !(seen.emitted || seen.stopping) {
            return None;
        }
        if frame.accepted.is_some() && std::mem::replace(&mut seen.accepted, true) {
            frame.accepted = None;
            if frame.deltas.is_empty() && frame.finished.is_empty() && frame.usage.is_none() {
                return None;
            }
        }
        Some(frame)
    }
}

/// When a request that is sent now must have a slot.
fn deadline(request: &GenerateRequest) -> Option<Instant> {
    let limit = Duration::from_millis(request.timeout_ms);
    (!limit.is_zero())
        .then(|| Instant::now().checked_add(limit + GRACE))
        .flatten()
}

/// `until`: of a request that has spent a part of its time elsewhere.
async fn start(
    lease: &Lease,
    request: &Arc<GenerateRequest>,
    until: Option<Instant>,
) -> Result<Streaming<GenerateFrame>, CoreError> {
    let mut grpc = lease.channel.grpc();
    grpc.ready().await?;
    let mut message = connection::request(Arc::clone(request), &request.request_id);
    if let Some(until) = until {
        message.set_timeout(until.saturating_duration_since(Instant::now() + GRACE));
    }
    let path = PathAndQuery::from_static("/helixflow.v1.Inference/Generate");
    let response = grpc
        .server_streaming(message, path, Codec::default())
        .await?;
    Ok(response.into_inner())
}
