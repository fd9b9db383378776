//! What is known of one pool, and how much work it has from here.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::connection::Channel;
use crate::v1;

/// What a pool can do for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not reached yet.
    Connecting,
    /// Takes calls.
    Ready,
    /// Reached, but has no model yet.
    NotReady,
    /// Finishes its calls and takes no new ones.
    Draining,
    /// Failed; tried again after a pause.
    Ejected,
}

impl State {
    /// The name in `core_rs.PoolInfo.state`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::NotReady => "not_ready",
            Self::Draining => "draining",
            Self::Ejected => "ejected",
        }
    }
}

/// What is known of one pool at one moment.
#[derive(Clone, Debug)]
pub struct PoolView {
    /// `host:port` as it was configured.
    pub address: Arc<str>,
    /// What it can do.
    pub state: State,
    /// Sequences of this client that are under way there.
    pub outstanding: usize,
    /// Its models, as it last told.
    pub models: Vec<v1::ModelInfo>,
    /// How full it is, as it last told.
    pub load: Load,
    /// Why the last connection failed.
    pub last_error: Option<String>,
    /// Why it is not ready, as it last told, also behind the end of its connection: `engine_stuck`, for example.
    /// Empty: it told nothing.
    pub reason: String,
}

/// How full a pool is, all its clients together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that it runs at once.
    pub slots: u32,
    /// Sequences that have a slot.
    pub running: u32,
    /// Sequences that wait for one.
    pub queued: u32,
}

pub(super) struct Pool {
    address: Arc<str>,
    outstanding: AtomicUsize,
    known: RwLock<Known>,
}

struct Known {
    state: State,
    models: Arc<[v1::ModelInfo]>,
    load: Load,
    last_error: Option<String>,
    reason: String,
    channel: Option<Channel>,
}

impl Pool {
    pub(super) fn new(address: Arc<str>) -> Self {
        let known = Known {
            state: State::Connecting,
            models: Arc::new([]),
            load: Load::default(),
            last_error: None,
            reason: String::new(),
            channel: None,
        };
        Self {
            address,
            outstanding: AtomicUsize::new(0),
            known: RwLock::new(known),
        }
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Relaxed)
    }

    /// Its state, and whether it has a model of this id or alias.
    pub(super) fn offers(&self, model: &str) -> (State, bool) {
        let known = self.known.read();
        let has = |info: &v1::ModelInfo| {
            info.id == model || info.aliases.iter().any(|alias| alias == model)
        };
        (known.state, known.models.iter().any(has))
    }

    pub(super) fn ready_models(&self) -> Arc<[v1::ModelInfo]> {
        let known = self.known.read();
        if known.state == State::Ready {
            Arc::clone(&known.models)
        } else {
            Arc::new([])
        }
    }

    pub(super) fn view(&self) -> PoolView {
        let known = self.known.read();
        PoolView {
            address: Arc::clone(&self.address),
            state: known.state,
            outstanding: self.outstanding(),
            models: known.models.to_vec(),
            load: known.load,
            last_error: known.last_error.clone(),
            reason: known.reason.clone(),
        }
    }

    /// One line for a log.
    pub(super) fn describe(&self) -> String {
        let known = self.known.read();
        let reason = known
            .last_error
            .as_deref()
            .map(|error| format!(" ({error})"))
            .unwrap_or_default();
        format!("{} {}{reason}", self.address, known.state.as_str())
    }

    /// Takes over what the pool says of itself. Returns the earlier and the new state.
    pub(super) fn told(&self, told: v1::PoolState, channel: &Channel) -> (State, State) {
        let state = match (told.draining, told.ready) {
            (true, _) => State::Draining,
            (false, true) => State::Ready,
            (false, false) => State::NotReady,
        };
        let mut known = self.known.write();
        let before = std::mem::replace(&mut known.state, state);
        if *known.models != *told.models {
            known.models = told.models.into();
        }
        known.load = Load {
            slots: told.slots,
            running: told.running,
            queued: told.queued,
        };
        known.channel = Some(channel.clone());
        known.last_error = None;
        known.reason = told.reason;
        (before, state)
    }

    /// Takes no more calls. Calls under way keep their connection.
    pub(super) fn eject(&self, reason: String) -> State {
        let mut known = self.known.write();
        known.channel = None;
        known.load = Load::default();
        known.last_error = Some(reason);
        std::mem::replace(&mut known.state, State::Ejected)
    }

    /// Notes a failure that does not change the state.
    pub(super) fn note(&self, reason: String) {
        self.known.write().last_error = Some(reason);
    }
}

/// A call's place at a pool; counted as outstanding work until it is dropped.
pub(super) struct Lease {
    pool: Arc<Pool>,
    weight: usize,
    pub(super) index: usize,
    pub(super) channel: Channel,
}

impl Lease {
    /// `None` when the pool was ejected in the meantime.
    pub(super) fn take(pool: &Arc<Pool>, index: usize, weight: usize) -> Option<Self> {
        let channel = pool.known.read().channel.clone()?;
        pool.outstanding.fetch_add(weight, Ordering::Relaxed);
        Some(Self {
            pool: Arc::clone(pool),
            weight,
            index,
            channel,
        })
    }

    pub(super) fn address(&self) -> Arc<str> {
        Arc::clone(&self.pool.address)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool
            .outstanding
            .fetch_sub(self.weight, Ordering::Relaxed);
    }
}
