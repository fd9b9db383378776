//! The pool as its owner sees it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use helix_text::{LoadError, TextModel};
use helix_wire::error::CoreError;
use helix_wire::server::{Limits, Listener, Server, Services};
use helix_wire::v1::{ModelInfo, PoolState};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use crate::engine::{RunError, StepEngine};
use crate::engine_loop::{EngineLoop, instant, ticks};
use crate::inbox::{Inbox, Phase};
use crate::options::Options;
use crate::owner::SharedPrefixes;
use crate::service::Service;

/// Threads that may tokenise long prompts at a time.
const TOKENISERS: usize = 4;

/// Counts since the start, and how full the pool is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Slots of the engine; 0 before it runs.
    pub slots: usize,
    /// Sequences that have a slot.
    pub running: usize,
    /// Of these, sequences that pause because their reader is behind.
    pub parked: usize,
    /// Sequences that wait for one.
    pub queued: usize,
    /// Their prompt tokens.
    pub queued_tokens: usize,
    /// Engine steps.
    pub steps: u64,
    /// Prompt tokens that were computed.
    pub prefill_tokens: u64,
    /// Tokens that were computed one at a time.
    pub decode_tokens: u64,
    /// Prompt tokens that some cache already held.
    pub cached_tokens: u64,
    /// Requests that were queued.
    pub requests_accepted: u64,
    /// Requests that were refused with a status.
    pub requests_refused: u64,
    /// Requests that ended by themselves.
    pub requests_finished: u64,
    /// Requests whose client went away.
    pub requests_cancelled: u64,
    /// Requests that ended with an error.
    pub requests_failed: u64,
}

/// Text, scheduler and gRPC service of one model. Cheap to clone.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// What the gRPC side and the engine thread share.
pub(crate) struct Shared {
    pub(crate) text: TextModel,
    pub(crate) options: Options,
    pub(crate) inbox: Inbox,
    pub(crate) public: SharedPrefixes,
    /// Bytes of the longest token.
    pub(crate) longest_token: usize,
    pub(crate) tokenisers: Arc<Semaphore>,
    /// Requests whose answer has not been handed over completely.
    pub(crate) live: AtomicUsize,
    pub(crate) state: watch::Sender<PoolState>,
    /// Ends the streams that would go on for ever.
    pub(crate) closed: watch::Sender<bool>,
    stats: Mutex<Stats>,
    next: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    /// What ticks are counted from.
    epoch: Instant,
}

impl Pool {
    /// Loads tokeniser, template and generation config of a checkpoint folder.
    ///
    /// # Errors
    /// The file that is missing or damaged.
    pub fn load(model_dir: &Path, options: Options) -> Result<Self, LoadError> {
        Ok(Self::new(TextModel::load(model_dir)?, options))
    }

    /// A pool of a model that is loaded already.
    pub fn new(text: TextModel, options: Options) -> Self {
        let ids = 0..u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
        let longest_token = ids.map(|id| text.token_bytes(id).len()).max().unwrap_or(1);
        let model = ModelInfo {
            id: options.model_id.clone(),
            aliases: options.aliases.clone(),
            created: options.created,
            ..ModelInfo::default()
        };
        let state = PoolState {
            models: vec![model],
            ..PoolState::default()
        };
        let shared = Shared {
            public: SharedPrefixes::new(&text, &options.shared_prefixes),
            text,
            inbox: Inbox::new(options.queue_requests.max(1), options.queue_tokens),
            options,
            longest_token,
            tokenisers: Arc::new(Semaphore::new(TOKENISERS)),
            live: AtomicUsize::new(0),
            state: watch::Sender::new(state),
            closed: watch::Sender::new(false),
            stats: Mutex::default(),
            next: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            epoch: Instant::now(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Starts the gRPC server: inference, health, reflection. It answers before an engine runs, as not ready.
    ///
    /// # Errors
    /// See [`Server::start`].
    pub async fn serve(&self, listener: Listener) -> Result<Server, CoreError> {
        let services =
            Services::default().with(Service::new(Arc::clone(&self.shared)).into_server());
        let health = services.health();
        let mut state = self.shared.state.subscribe();
        state.mark_changed();
        let server = Server::start(listener, services, Limits::default()).await?;
        tokio::spawn(async move {
            while state.changed().await.is_ok() {
                let ready = state.borrow_and_update().ready;
                health.set(ready).await;
            }
        });
        Ok(server)
    }

    /// The engine loop: blocks the calling thread until [`Pool::stop`].
    ///
    /// # Errors
    /// What the engine failed with. The requests of that step have ended as `engine_failed`, all others as
    /// `unavailable`; the pool is not ready until another engine runs.
    pub fn run<E: StepEngine>(&self, engine: &mut E) -> Result<(), RunError<E::Error>> {
        let capacity = engine.capacity().map_err(RunError::Engine)?;
        EngineLoop::new(&self.shared, capacity)?.run(engine)
    }

    /// Not ready from now on: new requests are refused, running ones go on.
    pub fn drain(&self) {
        self.shared.inbox.drain();
        self.shared.publish_phase();
    }

    /// Whether no request is in work or on its way to its client.
    pub fn is_idle(&self) -> bool {
        self.shared.live.load(Ordering::Acquire) == 0
    }

    /// Cuts what still runs with an error frame, ends [`Pool::run`] and the streams of watchers. The server
    /// is stopped by its owner.
    pub fn stop(&self) {
        self.shared.inbox.stop();
        self.shared.publish_phase();
        self.shared.closed.send_replace(true);
    }

    /// Counts up to the latest step.
    pub fn stats(&self) -> Stats {
        Stats {
            requests_accepted: self.shared.accepted.load(Ordering::Relaxed),
            requests_refused: self.shared.refused.load(Ordering::Relaxed),
            ..*self.shared.stats.lock()
        }
    }
}

impl Shared {
    pub(crate) fn ticks(&self, at: Instant) -> u64 {
        ticks(self.epoch, at)
    }

    pub(crate) fn instant(&self, ticks: u64) -> Instant {
        instant(self.epoch, ticks)
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn count_accepted(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// The counts that a new engine loop goes on from.
    pub(crate) fn engine_stats(&self) -> Stats {
        *self.stats.lock()
    }

    /// Publishes the engine thread's counts and what follows from them.
    pub(crate) fn publish(&self, stats: &Stats) {
        *self.stats.lock() = *stats;
        self.publish_phase();
    }

    /// Tells watchers and the health service when something has changed.
    pub(crate) fn publish_phase(&self) {
        let (phase, draining) = self.inbox.phase();
        let stats = self.engine_stats();
        let int = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let ready = matches!(phase, Phase::Running(_)) && !draining;
        let draining = draining || phase == Phase::Stopped;
        let now = (
            ready,
            draining,
            int(stats.slots),
            int(stats.running),
            int(stats.queued),
        );
        self.state.send_if_modified(|state| {
            if now
                == (
                    state.ready,
                    state.draining,
                    state.slots,
                    state.running,
                    state.queued,
                )
            {
                return false;
            }
            (
                state.ready,
                state.draining,
                state.slots,
                state.running,
                state.queued,
            ) = now;
            if let (Phase::Running(capacity), [model]) = (phase, state.models.as_mut_slice()) {
                model.max_model_len = int(capacity.max_len);
                model.vocab_size = int(capacity.vocab_size);
            }
            true
        });
    }
}
