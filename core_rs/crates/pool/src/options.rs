//! What an operator may set.

use std::time::Duration;

/// Options of one pool.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the model in the API.
    pub model_id: String,
    /// Further names that mean the same model.
    pub aliases: Vec<String>,
    /// When the model was made, seconds since 1970.
    pub created: u64,
    /// Requests that may wait for a slot.
    pub queue_requests: usize,
    /// Prompt tokens that may wait, all requests together.
    pub queue_tokens: usize,
    /// Tokens of one engine step.
    pub step_tokens: usize,
    /// How long a step may take while somebody decodes; zero: no end. See `helix_sched::Limits::step_micros`.
    pub step_budget: Duration,
    /// Engine steps whose output a request may hold unread before its sequences are parked.
    pub stream_frames: u32,
    /// How long a request may stay parked before it is cut.
    pub stall_timeout: Duration,
    /// How long a parked request keeps its slots while others wait for one.
    pub stall_yield: Duration,
    /// Time from arrival to prefill of a request that names none.
    pub default_timeout: Duration,
    /// Whether a sequence may start from a prefix that some slot already holds.
    pub prefix_reuse: bool,
    /// What a generated token counts in the share of its owner, beside 1 for a prompt token.
    pub decode_price: f64,
    /// Texts that requests of different owners may share as beginnings of their prompts; others they do not.
    pub shared_prefixes: Vec<String>,
    /// Whether what looks like a control token in the text of a message is one.
    pub control_in_text: bool,
    /// Largest request message, encoded.
    pub max_message_bytes: usize,
}

impl Options {
    /// The defaults for a model of this name.
    pub fn new(model_id: impl Into<String>) -> Self {
        Self {
            model_id: model_id.into(),
            aliases: Vec::new(),
            created: 0,
            queue_requests: 1024,
            queue_tokens: 1 << 20,
            step_tokens: 512,
            step_budget: Duration::from_millis(100),
            stream_frames: 64,
            stall_timeout: Duration::from_secs(60),
            stall_yield: Duration::from_secs(2),
            default_timeout: Duration::from_secs(120),
            prefix_reuse: true,
            decode_price: 2.0,
            shared_prefixes: Vec::new(),
            control_in_text: false,
            max_message_bytes: 16 << 20,
        }
    }
}
