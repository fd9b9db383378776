//! One `Generate` call: opened at a pool, and again at another one while nothing of its answer was seen.

use std::sync::Arc;

use http::uri::PathAndQuery;
use tonic::Streaming;

use super::codec::Codec;
use super::pool::Lease;
use super::{Attempts, Shared};
use crate::connection;
use crate::error::{Code, CoreError};
use crate::v1::{FinishReason, GenerateFrame, GenerateRequest};

/// A running call. Dropping it ends the work at the pool.
pub struct Generation {
    shared: Arc<Shared>,
    request: Arc<GenerateRequest>,
    attempts: Attempts,
    stage: Stage,
    seen: Seen,
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
}

/// What the caller has seen of the answer, whichever pool gave it.
#[derive(Clone, Copy, Default)]
struct Seen {
    accepted: bool,
    /// Text or a regular end was handed out: the call can not start again.
    emitted: bool,
}

impl Generation {
    pub(super) fn new(shared: Arc<Shared>, request: GenerateRequest) -> Self {
        Self {
            shared,
            request: Arc::new(request),
            attempts: Attempts::default(),
            stage: Stage::Away,
            seen: Seen::default(),
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
    /// The first frame says `accepted`, once. An error is final: nothing follows it.
    pub async fn next(&mut self) -> Result<Option<GenerateFrame>, CoreError> {
        loop {
            let outcome = match &mut self.stage {
                Stage::Ended => return Ok(None),
                Stage::Away => match self.open().await {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
                Stage::Running(attempt) => match attempt.read(&mut self.seen).await {
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
        match start(&lease, &self.request).await {
            Ok(stream) => {
                let attempt = Attempt {
                    stream,
                    lease,
                    failing: false,
                    complete: false,
                };
                self.stage = Stage::Running(Box::new(attempt));
                Ok(())
            }
            Err(error) => self.attempts.failed(&lease, error),
        }
    }

    /// `Ok` when the next round may try another pool.
    fn go_on(&mut self, error: CoreError) -> Result<(), CoreError> {
        match std::mem::replace(&mut self.stage, Stage::Away) {
            Stage::Running(attempt) if !self.seen.emitted => {
                self.attempts.failed(&attempt.lease, error)
            }
            _ => Err(error),
        }
    }
}

impl Attempt {
    /// The next frame that the caller may see; `None` at a regular end.
    async fn read(&mut self, seen: &mut Seen) -> Result<Option<GenerateFrame>, CoreError> {
        loop {
            match self.stream.message().await? {
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
        for finished in &frame.finished {
            match finished.reason() {
                FinishReason::Stop | FinishReason::Length => seen.emitted = true,
                _ => self.failing = true,
            }
        }
        seen.emitted |= !frame.deltas.is_empty();
        if self.failing && !seen.emitted {
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

async fn start(
    lease: &Lease,
    request: &Arc<GenerateRequest>,
) -> Result<Streaming<GenerateFrame>, CoreError> {
    let mut grpc = lease.channel.grpc();
    grpc.ready().await?;
    let message = connection::request(Arc::clone(request), &request.request_id);
    let path = PathAndQuery::from_static("/helixflow.v1.Inference/Generate");
    let response = grpc
        .server_streaming(message, path, Codec::default())
        .await?;
    Ok(response.into_inner())
}
