//! The pool as its owner sees it.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use helix_text::{LoadError, TextModel};
use helix_wire::error::{Code, CoreError};
use helix_wire::server::{Limits, Listener, Server, Services};
use helix_wire::v1::{ModelInfo, PoolState};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use crate::engine::{RunError, StepEngine};
use crate::engine_loop::{EngineLoop, instant, ticks};
use crate::inbox::{Inbox, Leave, Load, Phase};
use crate::options::Options;
use crate::outbox::Outbox;
use crate::owner::SharedPrefixes;
use crate::service::Service;
use crate::watchdog::{Pulse, Stuck, TICK, Watchdog};

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
    /// What a prompt token adds to a step, as learnt from steps (nanoseconds; 0: not yet).
    pub prompt_token_nanos: u64,
    /// Engine steps.
    pub steps: u64,
    /// Prompt tokens that were computed.
    pub prefill_tokens: u64,
    /// Tokens that were computed one at a time.
    pub decode_tokens: u64,
    /// Prompt tokens that some cache already held.
    pub cached_tokens: u64,
    /// How often a sequence gave its slot to somebody with a better claim.
    pub interrupted: u64,
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
    /// Requests whose answer has not been handed over completely, by the name that their callers know.
    live: Mutex<HashMap<u64, Live>>,
    /// Makes these names.
    names: RandomState,
    pub(crate) pulse: Pulse,
    pub(crate) state: watch::Sender<PoolState>,
    /// Ends the streams that would go on for ever.
    pub(crate) closed: watch::Sender<bool>,
    stats: Mutex<Stats>,
    next: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    /// Left before the engine thread had heard of them.
    cancelled: AtomicU64,
    failed: AtomicU64,
    /// What ticks are counted from.
    epoch: Instant,
}

#[derive(Clone)]
struct Live {
    number: u64,
    outbox: Arc<Outbox>,
}

impl Pool {
    /// Loads tokeniser, template and generation config of a checkpoint folder.
    ///
    /// # Errors
    /// The file that is missing or damaged.
    pub fn load(model_dir: &Path, options: Options) -> Result<Self, LoadError> {
        let mut text = TextModel::load(model_dir)?;
        if options.control_in_text {
            text = text.with_control_in_text();
        }
        Ok(Self::new(text, options))
    }

    /// A pool of a model that is loaded already.
    pub fn new(text: TextModel, options: Options) -> Self {
        let ids = 0..u32::try_from(text.vocab_size()).unwrap_or(u32::MAX);
        let longest_token = ids.map(|id| text.token_bytes(id).len()).max().unwrap_or(1);
        let model = ModelInfo {
            id: options.model_id.clone(),
            aliases: options.aliases.clone(),
            created: options.created,
            template_variables: text.template_variables(),
            ..ModelInfo::default()
        };
        let state = PoolState {
            models: vec![model],
            reason: "engine_loading".to_owned(),
            ..PoolState::default()
        };
        let shared = Shared {
            public: SharedPrefixes::new(&text, &options.shared_prefixes),
            text,
            inbox: Inbox::new(options.queue_requests.max(1), options.queue_tokens),
            options,
            longest_token,
            tokenisers: Arc::new(Semaphore::new(TOKENISERS)),
            live: Mutex::default(),
            names: RandomState::new(),
            pulse: Pulse::default(),
            state: watch::Sender::new(state),
            closed: watch::Sender::new(false),
            stats: Mutex::default(),
            next: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
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

    /// Watches the engine thread; blocks the calling thread until the pool is stopped (`None`), or until that thread
    /// stands still: then the pool is not ready any more and every request has ended as `engine_failed`. The process
    /// must be replaced, for nothing can end a thread.
    ///
    /// `ceiling`: what no engine step may take. A step that computes no more than others before it may take ten times
    /// as long as these, and 6 s in any case.
    pub fn watch(&self, ceiling: Duration) -> Option<Stuck> {
        let mut dog = Watchdog::new(ceiling, Instant::now());
        loop {
            std::thread::sleep(TICK);
            if let Some(stuck) = dog.look(&self.shared.pulse, Instant::now())
                && self.shared.inbox.stick()
            {
                self.shared.abandon(stuck);
                return Some(stuck);
            }
            // A step that runs on when the pool is stopped may stand still, too.
            if self.shared.inbox.phase().0 == Phase::Stopped && !self.shared.pulse.beats() {
                return None;
            }
        }
    }

    /// Not ready from now on: new requests are refused, running ones go on.
    pub fn drain(&self) {
        self.shared.inbox.drain();
        self.shared.publish_phase();
    }

    /// Whether no request is in work or on its way to its client.
    pub fn is_idle(&self) -> bool {
        self.shared.live.lock().is_empty()
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
        let shared = &self.shared;
        let stats = shared.engine_stats();
        let waiting = shared.inbox.waiting();
        Stats {
            queued: waiting.sequences,
            queued_tokens: waiting.tokens,
            requests_accepted: shared.accepted.load(Ordering::Relaxed),
            requests_refused: shared.refused.load(Ordering::Relaxed),
            requests_cancelled: stats.requests_cancelled + shared.cancelled.load(Ordering::Relaxed),
            requests_failed: stats.requests_failed + shared.failed.load(Ordering::Relaxed),
            ..stats
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

    /// Enters a request whose answer is about to be made; returns its name.
    pub(crate) fn enter(&self, number: u64, outbox: Arc<Outbox>) -> u64 {
        let name = self.name(number);
        self.live.lock().insert(name, Live { number, outbox });
        name
    }

    /// Nobody reads the answer any more.
    pub(crate) fn forget(&self, name: u64) {
        self.live.lock().remove(&name);
    }

    /// A name that only those know who were told.
    pub(crate) fn name(&self, number: u64) -> u64 {
        self.names.hash_one(number)
    }

    /// The number of a request that has not ended.
    pub(crate) fn named(&self, name: u64) -> Option<u64> {
        self.live.lock().get(&name).map(|live| live.number)
    }

    /// Lets go of a request that nobody waits for, whatever the engine thread does meanwhile.
    pub(crate) fn leave(&self, number: u64, outbox: &Outbox, load: Load, why: Leave) {
        let waiting = outbox.waits().then_some(load);
        if self.inbox.leave(number, waiting, why) {
            let count = match why {
                Leave::Cancelled => &self.cancelled,
                Leave::Late => &self.failed,
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.publish_phase();
    }

    /// What a request hears whose deadline passes before it has a slot.
    pub(crate) fn late(&self) -> CoreError {
        let message =
            "the deadline passed before the request got its turn; the server is busy, try again";
        CoreError::new(Code::DeadlineExceeded, message).with_retry_after(self.inbox.retry_after())
    }

    /// Ends every request in place of the engine thread.
    fn abandon(&self, stuck: Stuck) {
        self.publish_phase();
        let message = format!(
            "the engine stands still for {} s, so the pool is restarted; try again",
            stuck.stood.as_secs()
        );
        let now = Instant::now();
        let live: Vec<Live> = self.live.lock().values().cloned().collect();
        for Live { outbox, .. } in live {
            outbox.abandon(now, CoreError::new(Code::EngineFailed, message.clone()));
        }
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
        let reason = match phase {
            _ if draining => "draining",
            Phase::Loading => "engine_loading",
            Phase::Failed => "engine_failed",
            Phase::Stuck => "engine_stuck",
            Phase::Running(_) | Phase::Stopped => "",
        };
        let queued = int(self.inbox.waiting().sequences);
        let (slots, running) = (int(stats.slots), int(stats.running));
        self.state.send_if_modified(|state| {
            let known = (state.ready, state.draining, state.reason.as_str());
            if known == (ready, draining, reason)
                && (state.slots, state.running, state.queued) == (slots, running, queued)
            {
                return false;
            }
            (state.ready, state.draining) = (ready, draining);
            (state.slots, state.running, state.queued) = (slots, running, queued);
            if state.reason != reason {
                reason.clone_into(&mut state.reason);
            }
            if let (Phase::Running(capacity), [model]) = (phase, state.models.as_mut_slice()) {
                model.max_model_len = int(capacity.max_len);
                model.vocab_size = int(capacity.vocab_size);
            }
            true
        });
    }
}
