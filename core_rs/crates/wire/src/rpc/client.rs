//! The client's side: calls to one of several equal servers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tonic::{Status, Streaming};

use super::codec::Codec;
use super::keeper;
use crate::connection::{self, Channel, Endpoint, Options, Transport, within};
use crate::error::{Code, CoreError};

/// A call waits no longer than this for a connection.
const CONNECT_WAIT: Duration = Duration::from_secs(1);
/// What did not answer, for messages.
const SERVICE: &str = "the service";

/// One connection to one of several equal servers: the first of the list that works, then the next.
///
/// Dropping it ends the keeper; calls under way go on.
pub struct Client {
    shared: Arc<Shared>,
    _keeper: JoinSet<()>,
}

pub(super) struct Shared {
    /// What the servers are, for messages.
    peer: String,
    servers: usize,
    connection: watch::Sender<Option<Connection>>,
    /// Number of the newest connection that takes no calls.
    refused: watch::Sender<u64>,
    last_error: Mutex<Option<String>>,
}

#[derive(Clone)]
pub(super) struct Connection {
    pub(super) number: u64,
    pub(super) address: Arc<str>,
    pub(super) channel: Channel,
}

impl Client {
    /// Connects in the background. `peer`: the service behind the addresses. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// `invalid_request` for no address, or one that is not `host:port`.
    pub fn start(
        addresses: &[String],
        peer: &str,
        transport: &Transport,
        options: &Options,
    ) -> Result<Self, CoreError> {
        let endpoints = Endpoint::all(addresses, peer, transport, options)?;
        let shared = Arc::new(Shared {
            peer: peer.to_owned(),
            servers: endpoints.len(),
            connection: watch::Sender::new(None),
            refused: watch::Sender::new(0),
            last_error: Mutex::default(),
        });
        let mut keeper = JoinSet::new();
        keeper.spawn(keeper::keep(
            endpoints,
            Arc::clone(&shared),
            options.clone(),
        ));
        Ok(Self {
            shared,
            _keeper: keeper,
        })
    }

    /// A call; nothing is sent before [`Call::next`] is polled. Without `timeout` it may take for ever.
    pub fn call(
        &self,
        path: PathAndQuery,
        message: Bytes,
        request_id: String,
        timeout: Option<Duration>,
    ) -> Call {
        Call {
            shared: Arc::clone(&self.shared),
            path,
            message,
            request_id,
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            attempts: 0,
            stage: Stage::Away,
        }
    }

    /// Address of the server that calls go to now.
    pub fn server(&self) -> Option<Arc<str>> {
        let connection = self.shared.connection.borrow();
        connection.as_ref().map(|found| Arc::clone(&found.address))
    }

    /// Why the last connection was lost or not made; `None` once there is one again.
    pub fn last_error(&self) -> Option<String> {
        self.shared.last_error.lock().clone()
    }
}

impl Shared {
    pub(super) fn publish(&self, connection: Connection) {
        tracing::info!(server = %connection.address, "connected to the {}", self.peer);
        *self.last_error.lock() = None;
        self.connection.send_replace(Some(connection));
    }

    pub(super) fn lost(&self, address: &str, reason: &str) {
        self.connection.send_replace(None);
        let reason = format!("{address}: {reason}");
        let mut last = self.last_error.lock();
        // Once for each cause: attempts go on for as long as the server is away.
        if last.as_ref() != Some(&reason) {
            tracing::warn!(%reason, "no connection to the {}", self.peer);
            *last = Some(reason);
        }
    }

    /// Notes a failure that costs no connection.
    pub(super) fn note(&self, reason: String) {
        *self.last_error.lock() = Some(reason);
    }

    pub(super) fn refusals(&self) -> watch::Receiver<u64> {
        self.refused.subscribe()
    }

    fn refuse(&self, number: u64) {
        self.refused.send_if_modified(|newest| {
            let newer = number > *newest;
            *newest = number.max(*newest);
            newer
        });
    }

    /// A connection newer than the ones that were refused; waits for one, but not long.
    async fn connected(&self, deadline: Option<Instant>) -> Result<Connection, CoreError> {
        let mut changes = self.connection.subscribe();
        let fits = |found: &Option<Connection>| {
            let refused = *self.refused.borrow();
            found.as_ref().is_some_and(|found| found.number > refused)
        };
        let longest = Instant::now() + CONNECT_WAIT;
        let until = deadline.map_or(longest, |deadline| deadline.min(longest));
        let found = timeout_at(until, changes.wait_for(fits)).await;
        if let Ok(Ok(found)) = found
            && let Some(found) = found.as_ref()
        {
            return Ok(found.clone());
        }
        Err(CoreError::new(
            Code::Unavailable,
            format!("no {} is reachable; try again in a moment", self.peer),
        )
        .with_retry_after(1))
    }
}

/// A running call. Dropping it cancels it at the server.
pub struct Call {
    shared: Arc<Shared>,
    path: PathAndQuery,
    message: Bytes,
    request_id: String,
    deadline: Option<Instant>,
    attempts: usize,
    stage: Stage,
}

enum Stage {
    /// At no server: before the first attempt, or between two.
    Away,
    /// Of the connection with this number; `true` once a message has come.
    Running(Box<Streaming<Bytes>>, u64, bool),
    /// Nothing follows.
    Ended,
}

impl Call {
    /// The next message of the answer; `None` behind the last one. An error is final.
    ///
    /// A call that no server has begun with goes to another one by itself.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CoreError> {
        loop {
            let outcome = match &mut self.stage {
                Stage::Ended => return Ok(None),
                Stage::Away => self.open().await,
                Stage::Running(stream, number, begun) => {
                    let number = *number;
                    match within(self.deadline, SERVICE, stream.message()).await {
                        Ok(Ok(Some(message))) => {
                            *begun = true;
                            return Ok(Some(message));
                        }
                        Ok(Ok(None)) => {
                            self.stage = Stage::Ended;
                            return Ok(None);
                        }
                        Ok(Err(status)) if *begun => Err(status.into()),
                        Ok(Err(status)) => self.failed(number, status),
                        Err(error) => Err(error),
                    }
                }
            };
            if let Err(error) = outcome {
                self.stage = Stage::Ended;
                return Err(error);
            }
        }
    }

    async fn open(&mut self) -> Result<(), CoreError> {
        self.attempts += 1;
        let Connection {
            number, channel, ..
        } = self.shared.connected(self.deadline).await?;
        let start = async {
            let mut grpc = channel.grpc();
            grpc.ready().await?;
            let request = connection::request(self.message.clone(), &self.request_id);
            grpc.server_streaming(request, self.path.clone(), Codec)
                .await
        };
        match within(self.deadline, SERVICE, start).await? {
            Ok(response) => {
                self.stage = Stage::Running(Box::new(response.into_inner()), number, false);
                Ok(())
            }
            Err(status) => self.failed(number, status),
        }
    }

    /// `Ok` when the server has not begun with the call, so that another one may.
    fn failed(&mut self, number: u64, status: Status) -> Result<(), CoreError> {
        let untouched = connection::untouched(&status);
        let error = CoreError::from(status);
        if untouched || error.code == Code::Draining {
            self.shared.refuse(number);
            // The same server may be back on a new connection, but it drains for longer than a call can wait.
            if self.attempts < self.shared.servers + usize::from(untouched) {
                self.stage = Stage::Away;
                return Ok(());
            }
        }
        Err(error)
    }
}
