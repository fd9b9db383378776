//! Calls to a set of inference pools.
//!
//! Every pool has one HTTP/2 connection and one keeper task that watches it: a pool that fails is ejected at
//! once and taken back with the first state that says it is ready. A call goes to the ready pool with the least
//! outstanding work, and to another one when it fails before anything of its answer was seen.

mod call;
mod codec;
mod keeper;
mod pool;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::uri::PathAndQuery;
use prost::Message;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::connection::{self, Endpoint, within};
use crate::error::{Code, CoreError};
use crate::v1;

pub use crate::connection::{Options, Transport};
pub use call::Generation;
pub use pool::{PoolView, State};

use pool::{Lease, Pool};

/// What the servers are, for messages.
const PEER: &str = "inference pool";

/// A set of inference pools. Dropping it ends the keepers; calls under way go on.
pub struct PoolSet {
    shared: Arc<Shared>,
    _keepers: JoinSet<()>,
}

pub(crate) struct Shared {
    pools: Vec<Arc<Pool>>,
    turn: AtomicUsize,
    changes: watch::Sender<u64>,
}

impl PoolSet {
    /// Starts one keeper for each address (`host:port`). Must be called inside a tokio runtime.
    pub fn start(
        addresses: &[String],
        transport: &Transport,
        options: &Options,
    ) -> Result<Self, CoreError> {
        let endpoints = Endpoint::all(addresses, PEER, transport, options)?;
        let changes = watch::Sender::new(0);
        let mut keepers = JoinSet::new();
        let mut pools = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let pool = Arc::new(Pool::new(endpoint.address()));
            keepers.spawn(keeper::keep(
                Arc::clone(&pool),
                endpoint,
                options.clone(),
                changes.clone(),
            ));
            pools.push(pool);
        }
        let turn = AtomicUsize::new(0);
        Ok(Self {
            shared: Arc::new(Shared {
                pools,
                turn,
                changes,
            }),
            _keepers: keepers,
        })
    }

    /// Starts a call. Nothing is sent before [`Generation::next`] is polled.
    pub fn generate(&self, request: v1::GenerateRequest) -> Generation {
        Generation::new(Arc::clone(&self.shared), request)
    }

    /// What is known of every pool, in the order of the addresses.
    pub fn pools(&self) -> Vec<PoolView> {
        self.shared.pools.iter().map(|pool| pool.view()).collect()
    }

    /// Models of the pools that are ready, each once.
    pub fn models(&self) -> Vec<v1::ModelInfo> {
        let mut models: Vec<v1::ModelInfo> = Vec::new();
        for pool in &self.shared.pools {
            for model in pool.ready_models().iter() {
                if models.iter().all(|known| known.id != model.id) {
                    models.push(model.clone());
                }
            }
        }
        models
    }

    /// Changes whenever the state of a pool does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// A handle for single calls that outlives a borrow of the set.
    pub fn caller(&self) -> Caller {
        Caller(Arc::clone(&self.shared))
    }
}

/// Calls that have one answer.
#[derive(Clone)]
pub struct Caller(Arc<Shared>);

impl Caller {
    /// Text or chat to token ids. Returns the answer and the address of the pool that gave it; `deadline_exceeded` when
    /// there is none within `limit`, whichever pools were asked.
    pub async fn tokenize(
        &self,
        request: v1::TokenizeRequest,
        request_id: &str,
        limit: Duration,
    ) -> Result<(v1::TokenizeReply, Arc<str>), CoreError> {
        let model = request.model.clone();
        self.unary(
            &model,
            Arc::new(request),
            (request_id, limit),
            "/helixflow.v1.Inference/Tokenize",
        )
        .await
    }

    /// Token ids to text, as `tokenize`.
    pub async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
        request_id: &str,
        limit: Duration,
    ) -> Result<(v1::DetokenizeReply, Arc<str>), CoreError> {
        let model = request.model.clone();
        self.unary(
            &model,
            Arc::new(request),
            (request_id, limit),
            "/helixflow.v1.Inference/Detokenize",
        )
        .await
    }

    async fn unary<T, U>(
        &self,
        model: &str,
        message: Arc<T>,
        (request_id, limit): (&str, Duration),
        path: &'static str,
    ) -> Result<(U, Arc<str>), CoreError>
    where
        T: Message + 'static,
        U: Message + Default + 'static,
    {
        let mut attempts = Attempts::default();
        let until = Instant::now().checked_add(limit);
        loop {
            let lease = attempts.next(&self.0, model, 1)?;
            let mut grpc = lease.channel.grpc();
            let mut request = connection::request(Arc::clone(&message), request_id);
            request.set_timeout(limit);
            let asked = async {
                grpc.ready().await?;
                let path = PathAndQuery::from_static(path);
                grpc.unary(request, path, codec::Codec::default()).await
            };
            match within(until, call::POOL, asked).await? {
                Ok(response) => return Ok((response.into_inner(), lease.address())),
                Err(status) => attempts.failed(&lease, status.into())?,
            }
        }
    }
}

impl Shared {
    /// The ready pool that has the model and the least outstanding work; equals take turns.
    fn pick(&self, model: &str, weight: usize, tried: &[usize]) -> Result<Lease, CoreError> {
        let count = self.pools.len();
        let start = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut best: Option<(usize, usize)> = None;
        let (mut ready, mut draining) = (false, false);
        for offset in 0..count {
            let index = start.wrapping_add(offset) % count;
            let pool = &self.pools[index];
            let (state, has_model) = pool.offers(model);
            draining |= state == State::Draining;
            ready |= state == State::Ready;
            if state != State::Ready || !has_model || tried.contains(&index) {
                continue;
            }
            let outstanding = pool.outstanding();
            if best.is_none_or(|(_, least)| outstanding < least) {
                best = Some((index, outstanding));
            }
        }
        if let Some(lease) =
            best.and_then(|(index, _)| Lease::take(&self.pools[index], index, weight))
        {
            return Ok(lease);
        }
        Err(if ready && tried.is_empty() {
            unknown_model(model)
        } else if draining && !ready {
            CoreError::new(
                Code::Draining,
                "the inference pool is shutting down and takes no new requests; try again",
            )
            .with_retry_after(1)
        } else {
            self.unavailable()
        })
    }

    fn unavailable(&self) -> CoreError {
        let pools = self
            .pools
            .iter()
            .map(|pool| pool.describe())
            .collect::<Vec<_>>()
            .join("; ");
        tracing::debug!(%pools, "no inference pool can take a call");
        CoreError::new(
            Code::Unavailable,
            "no inference pool is reachable and ready; try again in a moment",
        )
        .with_retry_after(1)
    }
}

fn unknown_model(model: &str) -> CoreError {
    CoreError::new(
        Code::ModelNotFound,
        format!("The model `{model}` does not exist; GET /v1/models lists the ones that do"),
    )
    .with_param("model")
}

/// The pools that one call has tried, and why it is not there any more.
#[derive(Default)]
struct Attempts {
    tried: Vec<usize>,
    refusal: Option<CoreError>,
}

impl Attempts {
    /// Whether a pool has failed the call.
    fn tried_any(&self) -> bool {
        !self.tried.is_empty()
    }

    /// A pool that was not tried yet; when there is none, the reason of the failed attempts.
    fn next(&mut self, shared: &Shared, model: &str, weight: usize) -> Result<Lease, CoreError> {
        shared
            .pick(model, weight, &self.tried)
            .map_err(|error| self.refusal.take().unwrap_or(error))
    }

    /// Notes a failed attempt. `Err` when another pool would answer the same.
    fn failed(&mut self, lease: &Lease, mut error: CoreError) -> Result<(), CoreError> {
        let elsewhere = matches!(
            error.code,
            Code::QueueFull
                | Code::EngineFailed
                | Code::Unavailable
                | Code::Draining
                | Code::Cancelled
        );
        if !elsewhere {
            return Err(error);
        }
        tracing::debug!(pool = %lease.address(), %error, "call failed, trying another pool");
        // The pool cancels nothing by itself: this is a connection that went away.
        if error.code == Code::Cancelled {
            error.code = Code::Unavailable;
        }
        if error.code == Code::QueueFull {
            error.retry_after_s.get_or_insert(1);
        }
        self.tried.push(lease.index);
        // A full queue tells the client more than the failure of another pool.
        if self
            .refusal
            .as_ref()
            .is_none_or(|known| known.code != Code::QueueFull)
        {
            self.refusal = Some(error);
        }
        Ok(())
    }
}
