//! What Python sets, and what it reads.

use std::time::Duration;

use helix_pool::{Options, Stats};
use pyo3::prelude::*;

/// Options of a pool.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct PoolOptions(Options);

#[pymethods]
impl PoolOptions {
    #[new]
    #[pyo3(signature = (
        *, model_id, aliases=Vec::new(), created=0, queue_requests=1024, queue_tokens=1_048_576, step_tokens=512,
        stream_frames=64, stall_timeout_ms=60_000, stall_yield_ms=2000, default_timeout_ms=120_000, prefix_reuse=true,
        shared_prefixes=Vec::new(), control_in_text=false, decode_price=2.0, step_budget_ms=100
    ))]
    #[allow(clippy::too_many_arguments)] // keyword arguments in Python
    fn new(
        model_id: String,
        aliases: Vec<String>,
        created: u64,
        queue_requests: usize,
        queue_tokens: usize,
        step_tokens: usize,
        stream_frames: u32,
        stall_timeout_ms: u64,
        stall_yield_ms: u64,
        default_timeout_ms: u64,
        prefix_reuse: bool,
        shared_prefixes: Vec<String>,
        control_in_text: bool,
        decode_price: f64,
        step_budget_ms: u64,
    ) -> Self {
        Self(Options {
            aliases,
            created,
            queue_requests,
            queue_tokens,
            step_tokens,
            stream_frames,
            stall_timeout: Duration::from_millis(stall_timeout_ms),
            stall_yield: Duration::from_millis(stall_yield_ms),
            default_timeout: Duration::from_millis(default_timeout_ms),
            prefix_reuse,
            shared_prefixes,
            control_in_text,
            decode_price,
            step_budget: Duration::from_millis(step_budget_ms),
            ..Options::new(model_id)
        })
    }
}

impl PoolOptions {
    pub(crate) fn options(&self) -> Options {
        self.0.clone()
    }
}

/// Counts since the start, and how full the pool is now.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct PoolStats {
    slots: usize,
    running: usize,
    parked: usize,
    queued: usize,
    queued_tokens: usize,
    prompt_token_nanos: u64,
    steps: u64,
    prefill_tokens: u64,
    decode_tokens: u64,
    cached_tokens: u64,
    interrupted: u64,
    requests_accepted: u64,
    requests_refused: u64,
    requests_finished: u64,
    requests_cancelled: u64,
    requests_failed: u64,
}

impl From<Stats> for PoolStats {
    fn from(stats: Stats) -> Self {
        Self {
            slots: stats.slots,
            running: stats.running,
            parked: stats.parked,
            queued: stats.queued,
            queued_tokens: stats.queued_tokens,
            prompt_token_nanos: stats.prompt_token_nanos,
            steps: stats.steps,
            prefill_tokens: stats.prefill_tokens,
            decode_tokens: stats.decode_tokens,
            cached_tokens: stats.cached_tokens,
            interrupted: stats.interrupted,
            requests_accepted: stats.requests_accepted,
            requests_refused: stats.requests_refused,
            requests_finished: stats.requests_finished,
            requests_cancelled: stats.requests_cancelled,
            requests_failed: stats.requests_failed,
        }
    }
}

/// An engine thread that stands still.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct Stuck {
    stood_s: f64,
    limit_s: f64,
    tokens: usize,
}

impl From<helix_pool::Stuck> for Stuck {
    fn from(stuck: helix_pool::Stuck) -> Self {
        Self {
            stood_s: stuck.stood.as_secs_f64(),
            limit_s: stuck.limit.as_secs_f64(),
            tokens: stuck.tokens,
        }
    }
}
