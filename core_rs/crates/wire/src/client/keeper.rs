//! The task that keeps one pool: connects, watches its state, ejects it, takes it back.

use std::error::Error as _;
use std::sync::Arc;

use http::uri::PathAndQuery;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::codec::Codec;
use super::pool::{Pool, State};
use crate::connection::{Channel, Connected, Endpoint, Options, jitter, pings, request, swapped};
use crate::error::CoreError;
use crate::v1;

type Watch = Streaming<v1::PoolState>;

/// A connection whose `Watch` stream is open.
struct Session {
    connected: Connected,
    watch: Watch,
}

/// Runs until its task is dropped.
pub(super) async fn keep(
    pool: Arc<Pool>,
    endpoint: Endpoint,
    options: Options,
    changes: watch::Sender<u64>,
) {
    let keeper = Keeper {
        pool,
        endpoint,
        options,
        changes,
    };
    let mut pause = keeper.options.backoff_min;
    loop {
        let opened = Instant::now();
        let reason = match keeper.open().await {
            Ok(session) => keeper.follow(session).await,
            Err(reason) => reason,
        };
        keeper.eject(reason);
        // A pool that comes and goes is not hammered: only one that stayed starts over.
        if opened.elapsed() > keeper.options.backoff_max {
            pause = keeper.options.backoff_min;
        }
        sleep(jitter(pause)).await;
        pause = (pause * 2).min(keeper.options.backoff_max);
    }
}

struct Keeper {
    pool: Arc<Pool>,
    endpoint: Endpoint,
    options: Options,
    changes: watch::Sender<u64>,
}

impl Keeper {
    async fn open(&self) -> Result<Session, String> {
        let connected = self.endpoint.connect().await?;
        let opening = timeout(self.options.connect_timeout, open_watch(&connected.channel));
        let watch = opening
            .await
            .map_err(|_| "the pool does not answer".to_owned())??;
        Ok(Session { connected, watch })
    }

    /// Follows the state of the pool until the connection fails; returns why it did.
    async fn follow(&self, mut session: Session) -> String {
        let mut swaps = self.endpoint.swaps();
        let mut silence = Box::pin(pings(session.connected.ping.take(), self.options.clone()));
        loop {
            let renewed = tokio::select! {
                message = session.watch.message() => {
                    match message {
                        Ok(Some(told)) => self.told(told, &session.connected.channel),
                        Ok(None) => return "the pool closed the connection".to_owned(),
                        Err(status) => return reason(status),
                    }
                    continue;
                }
                () = &mut silence => {
                    // Its calls would wait for ever: cut them, so that they fail or go elsewhere.
                    session.connected.driver.abort();
                    return format!("no answer to a ping within {} ms", self.options.ping_timeout.as_millis());
                }
                () = swapped(swaps.as_mut()) => self.open().await,
            };
            // The old connection closes with the last of its calls.
            match renewed {
                Ok(fresh) => {
                    session = fresh;
                    silence = Box::pin(pings(session.connected.ping.take(), self.options.clone()));
                }
                Err(reason) => {
                    if let Err(reason) = self.endpoint.recheck(session.connected.answers.as_ref()) {
                        // What was revoked gets no prompt any more, and its answers count no more.
                        session.connected.driver.abort();
                        return reason;
                    }
                    tracing::warn!(pool = %self.endpoint.address(), %reason, "no connection with the new certificates");
                    self.pool
                        .note(format!("with the new certificates: {reason}"));
                }
            }
        }
    }

    fn told(&self, told: v1::PoolState, channel: &Channel) {
        let (before, state) = self.pool.told(told, channel);
        if before != state {
            tracing::info!(pool = %self.endpoint.address(), state = state.as_str(), "inference pool");
        }
        self.changes.send_modify(|count| *count += 1);
    }

    fn eject(&self, reason: String) {
        let text = reason.clone();
        let before = self.pool.eject(reason);
        if before != State::Ejected {
            tracing::warn!(pool = %self.endpoint.address(), reason = %text, "inference pool ejected");
        }
        self.changes.send_modify(|count| *count += 1);
    }
}

/// Why a connection failed, for operators.
fn reason(status: tonic::Status) -> String {
    match status.source() {
        Some(cause) => cause.to_string(),
        None => CoreError::from(status).message,
    }
}

async fn open_watch(channel: &Channel) -> Result<Watch, String> {
    let mut grpc = channel.grpc();
    grpc.ready().await.map_err(reason)?;
    let request = request(Arc::new(v1::WatchRequest {}), "");
    let path = PathAndQuery::from_static("/helixflow.v1.Inference/Watch");
    let response = grpc
        .server_streaming(request, path, Codec::default())
        .await
        .map_err(reason)?;
    Ok(response.into_inner())
}
