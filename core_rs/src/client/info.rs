//! Frozen values that the client hands to Python.

use helix_wire::client::PoolView;
use helix_wire::v1;
use pyo3::prelude::*;

/// A model that a pool serves.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
#[derive(Clone)]
pub(crate) struct ModelInfo {
    id: String,
    aliases: Vec<String>,
    created: u64,
    max_model_len: u32,
    template_variables: Vec<String>,
}

impl From<v1::ModelInfo> for ModelInfo {
    fn from(model: v1::ModelInfo) -> Self {
        Self {
            id: model.id,
            aliases: model.aliases,
            created: model.created,
            max_model_len: model.max_model_len,
            template_variables: model.template_variables,
        }
    }
}

/// What the client knows of one pool.
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct PoolInfo {
    address: String,
    state: &'static str,
    outstanding: usize,
    models: Vec<ModelInfo>,
    slots: u32,
    running: u32,
    queued: u32,
    last_error: Option<String>,
    reason: String,
}

impl From<PoolView> for PoolInfo {
    fn from(pool: PoolView) -> Self {
        Self {
            address: pool.address.to_string(),
            state: pool.state.as_str(),
            outstanding: pool.outstanding,
            models: pool.models.into_iter().map(ModelInfo::from).collect(),
            slots: pool.load.slots,
            running: pool.load.running,
            queued: pool.load.queued,
            last_error: pool.last_error,
            reason: pool.reason,
        }
    }
}

/// Final counts of a call (tokens) and its times (microseconds since arrival at the pool).
#[pyclass(frozen, get_all, module = "helixflow.core_rs")]
pub(crate) struct Usage {
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
    queue_us: u64,
    first_token_us: u64,
    total_us: u64,
}

impl From<v1::Usage> for Usage {
    fn from(usage: v1::Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            queue_us: usage.queue_us,
            first_token_us: usage.first_token_us,
            total_us: usage.total_us,
        }
    }
}
