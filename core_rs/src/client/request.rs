//! Requests as Python builds them.

use helix_text::openai::Head;
use helix_wire::v1;
use helix_wire::v1::input::Kind;
use pyo3::prelude::*;

use super::variables;
use crate::errors::to_py;

/// Index of a message, reasoning, calls of tools (id, name, arguments), id of the call that it answers.
type Extra = (
    usize,
    Option<String>,
    Vec<(String, String, String)>,
    Option<String>,
);

/// Whether a JSON text has at most so many arrays, objects and members, and elements in them.
#[pyfunction]
pub(crate) fn json_within(py: Python<'_>, body: &[u8], structures: usize, elements: usize) -> bool {
    py.detach(|| helix_text::json_within(body, structures, elements))
}

/// One prompt: a chat, a text, or token ids.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct Prompt(pub(super) v1::Input);

#[pymethods]
impl Prompt {
    /// `messages`: (role, content, name). `extras`: what a few of them have besides: (index, reasoning, calls of
    /// tools as (id, name, arguments), id of the call that it answers). `variables`: a JSON object, or nothing.
    #[staticmethod]
    #[pyo3(signature = (
        messages, add_generation_prompt=true, *, continue_final_message=false, extras=Vec::new(), variables=None
    ))]
    fn chat(
        messages: Vec<(String, String, Option<String>)>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        extras: Vec<Extra>,
        variables: Option<&[u8]>,
    ) -> PyResult<Self> {
        let message = |(role, content, name)| v1::ChatMessage {
            role,
            content,
            name,
            ..v1::ChatMessage::default()
        };
        let mut messages: Vec<_> = messages.into_iter().map(message).collect();
        for (index, reasoning, calls, tool_call_id) in extras {
            if let Some(message) = messages.get_mut(index) {
                let call = |(id, name, arguments)| v1::ToolCall {
                    id,
                    name,
                    arguments,
                };
                message.reasoning = reasoning;
                message.tool_calls = calls.into_iter().map(call).collect();
                message.tool_call_id = tool_call_id;
            }
        }
        let variables = variables.map_or(Ok(Vec::new()), variables::read);
        Ok(Self(v1::Input {
            kind: Some(Kind::Chat(v1::Chat {
                messages,
                add_generation_prompt,
                continue_final_message,
                variables: variables.map_err(to_py)?,
            })),
        }))
    }

    /// Text as it is.
    #[staticmethod]
    fn text(text: String) -> Self {
        Self(v1::Input {
            kind: Some(Kind::Text(text)),
        })
    }

    /// Token ids as they are.
    #[staticmethod]
    fn tokens(ids: Vec<u32>) -> Self {
        Self(v1::Input {
            kind: Some(Kind::Tokens(v1::TokenIds { ids })),
        })
    }
}

/// For whom a request runs. Identifiers have 16 bytes, or none.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct Owner(v1::Owner);

#[pymethods]
impl Owner {
    #[new]
    #[pyo3(signature = (*, prefixes, organisation, key, organisation_weight=1.0, key_weight=1.0))]
    fn new(
        prefixes: Vec<u8>,
        organisation: Vec<u8>,
        key: Vec<u8>,
        organisation_weight: f64,
        key_weight: f64,
    ) -> Self {
        Self(v1::Owner {
            prefixes,
            organisation,
            key,
            organisation_weight,
            key_weight,
        })
    }
}

/// A request as the pool understands it. Values were validated by the caller.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct GenerateRequest(pub(super) v1::GenerateRequest);

#[pymethods]
impl GenerateRequest {
    #[new]
    #[pyo3(signature = (
        *, request_id, model, prompts, n=1, max_tokens=None, stop=Vec::new(), temperature=1.0, top_p=1.0, top_k=0,
        min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, seed=None,
        logit_bias=Vec::new(), logprobs=None, echo=false, ignore_eos=false, timeout_ms=0, owner=None,
        min_tokens=0, stop_token_ids=Vec::new(), skip_special_tokens=true
    ))]
    #[allow(
        clippy::too_many_arguments,
        clippy::fn_params_excessive_bools,
        reason = "keyword arguments of Python"
    )]
    fn new(
        request_id: String,
        model: String,
        prompts: Vec<Bound<'_, Prompt>>,
        n: u32,
        max_tokens: Option<u32>,
        stop: Vec<String>,
        temperature: f32,
        top_p: f32,
        top_k: u32,
        min_p: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        repetition_penalty: f32,
        seed: Option<i128>,
        logit_bias: Vec<(u32, f32)>,
        logprobs: Option<u32>,
        echo: bool,
        ignore_eos: bool,
        timeout_ms: u64,
        owner: Option<&Owner>,
        min_tokens: u32,
        stop_token_ids: Vec<u32>,
        skip_special_tokens: bool,
    ) -> Self {
        let sampling = v1::Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            seed: seed.map(low_bits),
            logit_bias: logit_bias
                .into_iter()
                .map(|(token, bias)| v1::LogitBias { token, bias })
                .collect(),
        };
        Self(v1::GenerateRequest {
            request_id,
            model,
            inputs: prompts
                .into_iter()
                .map(|prompt| prompt.get().0.clone())
                .collect(),
            n,
            max_tokens,
            stop,
            sampling: Some(sampling),
            logprobs,
            echo,
            ignore_eos,
            timeout_ms,
            stream: false,
            owner: owner.map(|owner| owner.0.clone()),
            min_tokens,
            stop_token_ids,
            show_special_tokens: !skip_special_tokens,
        })
    }
}

impl GenerateRequest {
    /// What the answer starts with.
    pub(super) fn head(&self, id: String, created: u64) -> Head {
        Head {
            id,
            created,
            model: self.0.model.clone(),
            system_fingerprint: None,
        }
    }
}

/// Seeds are signed in `OpenAI`'s API: every one counts, none is refused.
fn low_bits(seed: i128) -> u64 {
    u64::try_from(seed & i128::from(u64::MAX)).unwrap_or_default()
}
