//! A request that was checked, and the checks.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_sample::Params;
use helix_sched::{Owner, Scope, SeqId};
use helix_text::{Detokenizer, StopMatcher};
use helix_wire::error::{Code, CoreError};
use helix_wire::v1::{self, input::Kind};

use crate::engine::Capacity;
use crate::options::Options;
use crate::outbox::Outbox;

/// Choices of one request, all inputs together. Its number must fit [`CHOICE_BITS`].
const MAX_CHOICES: usize = 1024;
const CHOICE_BITS: u32 = 16;
/// Alternatives per token; what `OpenAI` allows.
const MAX_LOGPROBS: u32 = 20;
/// Log-probabilities of an answer that is not streamed: it is held until its end, at some 100 bytes each.
const MAX_HELD_LOGPROBS: u64 = 1 << 22;
/// The gateway allows 4 (`OpenAI`); other callers a few more.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 4096;
const MAX_STOP_TOKENS: usize = 256;
/// Request ids end up in log lines.
pub(crate) const MAX_ID_BYTES: usize = 256;
/// What of a name from outside is repeated in a message.
const MAX_NAME_CHARS: usize = 100;
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// One prompt, tokenised.
#[derive(Clone)]
pub(crate) struct Prompt {
    pub(crate) ids: Arc<[u32]>,
    /// Tokens to generate at most.
    pub(crate) max_new: u32,
    /// Leading tokens that are no secret of the caller.
    pub(crate) shared: usize,
    /// The text to echo.
    pub(crate) echo: Option<String>,
    /// Has read the prompt.
    pub(crate) detokenizer: Detokenizer,
}

/// A request on its way to the engine thread.
pub(crate) struct Job {
    pub(crate) number: u64,
    pub(crate) arrival: Instant,
    /// When waiting stops making sense.
    pub(crate) deadline: Instant,
    pub(crate) owner: Owner,
    /// Who may start from its prompts.
    pub(crate) scope: Scope,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) wishes: Wishes,
    pub(crate) outbox: Arc<Outbox>,
}

/// How the answers are to be made.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)] // switches of the API
pub(crate) struct Wishes {
    /// Choices per prompt.
    pub(crate) n: usize,
    /// `seed` is the request's; [`Wishes::params`] gives a choice its own.
    params: Params,
    seeded: bool,
    pub(crate) stops: Option<StopMatcher>,
    pub(crate) logprobs: Option<usize>,
    pub(crate) echo: bool,
    pub(crate) ignore_eos: bool,
    /// Tokens before which no choice ends but by its limit.
    pub(crate) min_tokens: u32,
    /// Tokens that end a choice, beside the model's own; sorted.
    pub(crate) stop_tokens: Vec<u32>,
    /// Special tokens give their names.
    pub(crate) show_special: bool,
}

impl Job {
    pub(crate) fn choices(&self) -> usize {
        self.prompts.len() * self.wishes.n
    }

    /// Prompt tokens, every choice counted.
    pub(crate) fn tokens(&self) -> usize {
        self.prompts
            .iter()
            .map(|prompt| prompt.ids.len())
            .sum::<usize>()
            * self.wishes.n
    }
}

/// Name of one choice in the scheduler.
pub(crate) fn sequence_id(number: u64, choice: usize) -> SeqId {
    (number << CHOICE_BITS) | choice as u64
}

/// Request and choice of a name.
#[allow(clippy::cast_possible_truncation)] // masked to 16 bits
pub(crate) fn split(id: SeqId) -> (u64, usize) {
    (id >> CHOICE_BITS, (id & ((1 << CHOICE_BITS) - 1)) as usize)
}

impl Wishes {
    /// Checks everything but the prompts.
    pub(crate) fn check(
        request: &v1::GenerateRequest,
        capacity: Capacity,
    ) -> Result<Self, CoreError> {
        let n = request.n.max(1) as usize;
        if request.inputs.is_empty() {
            return Err(CoreError::invalid(
                "prompt",
                "the request has no prompt; send at least one",
            ));
        }
        if request.inputs.len().saturating_mul(n) > MAX_CHOICES {
            let found = request.inputs.len().saturating_mul(n);
            let message = format!(
                "{found} choices are asked for (prompts times n); at most {MAX_CHOICES} are made"
            );
            return Err(CoreError::invalid("n", message));
        }
        if request.request_id.len() > MAX_ID_BYTES {
            let message = format!("the request id is longer than {MAX_ID_BYTES} bytes");
            return Err(CoreError::invalid("request_id", message));
        }
        if let Some(k) = request.logprobs.filter(|k| *k > MAX_LOGPROBS) {
            let message = format!("top_logprobs is {k}; it must be at most {MAX_LOGPROBS}");
            return Err(CoreError::invalid("top_logprobs", message));
        }
        check_stops(&request.stop)?;
        let stop_tokens = stop_tokens(&request.stop_token_ids, capacity.vocab_size)?;
        let (params, seeded) = params(request.sampling.as_ref())?;
        params
            .validate(capacity.vocab_size)
            .map_err(|error| CoreError::invalid(param_of(&error), error.to_string()))?;
        let stops = Some(StopMatcher::new(&request.stop))
            .filter(|_| request.stop.iter().any(|s| !s.is_empty()));
        Ok(Self {
            n,
            params,
            seeded,
            stops,
            logprobs: request.logprobs.map(|k| k as usize),
            echo: request.echo,
            ignore_eos: request.ignore_eos,
            min_tokens: request.min_tokens,
            stop_tokens,
            show_special: request.show_special_tokens,
        })
    }

    /// Checks that the longest answer to these prompts can be held until it is complete.
    pub(crate) fn check_held(&self, prompts: &[Prompt]) -> Result<(), CoreError> {
        let Some(alternatives) = self.logprobs else {
            return Ok(());
        };
        let echoed = |prompt: &Prompt| if self.echo { prompt.ids.len() } else { 0 };
        let tokens: u64 = prompts
            .iter()
            .map(|prompt| u64::from(prompt.max_new) + echoed(prompt) as u64)
            .sum();
        let entries = tokens
            .saturating_mul(self.n as u64)
            .saturating_mul(alternatives as u64 + 1);
        if entries <= MAX_HELD_LOGPROBS {
            return Ok(());
        }
        let message = format!(
            "the answer could hold {entries} log-probabilities; one that is not streamed holds at most \
             {MAX_HELD_LOGPROBS}: stream it, or lower max_tokens, n or the number of alternatives"
        );
        Err(CoreError::invalid("logprobs", message))
    }

    /// The parameters of one choice. With a seed, equal prompts of one request give equal answers, and the
    /// first choice is what a request for a single one gives; without, every choice is on its own.
    pub(crate) fn params(&self, choice: usize) -> Params {
        let index = if self.seeded { choice % self.n } else { choice };
        Params {
            seed: mix(self.params.seed, index as u64),
            ..self.params.clone()
        }
    }

    /// Whether every row of a prompt's logits is needed.
    pub(crate) fn prompt_logits(&self) -> bool {
        self.echo && self.logprobs.is_some()
    }
}

/// Leaves the seed of choice 0 alone; the others get splitmix64's next outputs.
fn mix(seed: u64, index: u64) -> u64 {
    if index == 0 {
        return seed;
    }
    let mut bits = seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    // The standard library's hash keys come from the operating system and differ with every call.
    std::hash::RandomState::new().build_hasher().finish()
}

fn params(sampling: Option<&v1::Sampling>) -> Result<(Params, bool), CoreError> {
    let Some(wanted) = sampling else {
        return Ok((
            Params {
                seed: random_seed(),
                ..Params::default()
            },
            false,
        ));
    };
    if wanted
        .logit_bias
        .iter()
        .any(|entry| !(-100.0..=100.0).contains(&entry.bias))
    {
        return Err(CoreError::invalid(
            "logit_bias",
            "a bias must be a number between -100 and 100",
        ));
    }
    let params = Params {
        temperature: wanted.temperature,
        // OpenAI allows 0: only the best token stays.
        top_p: if wanted.top_p == 0.0 {
            f32::MIN_POSITIVE
        } else {
            wanted.top_p
        },
        top_k: wanted.top_k,
        min_p: wanted.min_p,
        presence: wanted.presence_penalty,
        frequency: wanted.frequency_penalty,
        repetition: wanted.repetition_penalty,
        seed: wanted.seed.unwrap_or_else(random_seed),
        logit_bias: wanted
            .logit_bias
            .iter()
            .map(|entry| (entry.token, entry.bias))
            .collect(),
        banned: Vec::new(),
    };
    Ok((params, wanted.seed.is_some()))
}

fn param_of(error: &helix_sample::ParamError) -> &'static str {
    match error {
        helix_sample::ParamError::OutOfRange { name, .. } => name,
        helix_sample::ParamError::UnknownToken { .. } => "logit_bias",
    }
}

fn check_stops(stops: &[String]) -> Result<(), CoreError> {
    if stops.len() > MAX_STOPS {
        let message = format!(
            "{} stop strings are given; at most {MAX_STOPS} are looked for",
            stops.len()
        );
        return Err(CoreError::invalid("stop", message));
    }
    if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
        return Err(CoreError::invalid(
            "stop",
            format!("a stop string is longer than {MAX_STOP_BYTES} bytes"),
        ));
    }
    Ok(())
}

fn stop_tokens(ids: &[u32], vocab: usize) -> Result<Vec<u32>, CoreError> {
    if ids.len() > MAX_STOP_TOKENS {
        let message = format!(
            "{} stop tokens are given; at most {MAX_STOP_TOKENS} are looked for",
            ids.len()
        );
        return Err(CoreError::invalid("stop_token_ids", message));
    }
    known(ids, vocab, "stop_token_ids")?;
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    Ok(sorted)
}

/// Checks that this pool serves the model of that name.
pub(crate) fn check_model(name: &str, options: &Options) -> Result<(), CoreError> {
    if name == options.model_id || options.aliases.iter().any(|alias| alias == name) {
        return Ok(());
    }
    let asked: String = name.chars().take(MAX_NAME_CHARS).collect();
    let mut known = format!("`{}`", options.model_id);
    if !options.aliases.is_empty() {
        known = format!("{known} (also named `{}`)", options.aliases.join("`, `"));
    }
    let message = format!("The model `{asked}` does not exist. This server has {known}.");
    Err(CoreError::new(Code::ModelNotFound, message).with_param("model"))
}

/// Checks the shape of a prompt before anything expensive is done with it. `longest`: bytes of the longest
/// token.
pub(crate) fn check_input(
    input: &v1::Input,
    capacity: Capacity,
    longest: usize,
) -> Result<(), CoreError> {
    let max_len = capacity.max_len;
    // No token stands for more than `longest` bytes; twice that leaves room for normalisers that shorten.
    let hopeless = |bytes: usize| bytes / longest.max(1) / 2 > max_len;
    match &input.kind {
        None => Err(CoreError::invalid(
            "prompt",
            "a prompt is empty; send a chat, a text or token ids",
        )),
        Some(Kind::Chat(chat)) => {
            if chat.messages.is_empty() {
                return Err(CoreError::invalid(
                    "messages",
                    "messages is empty; send at least one message",
                ));
            }
            for (index, message) in chat.messages.iter().enumerate() {
                if !ROLES.contains(&message.role.as_str()) {
                    let role: String = message.role.chars().take(MAX_NAME_CHARS).collect();
                    let reason = format!(
                        "unknown role `{role}`; it must be one of {}",
                        ROLES.join(", ")
                    );
                    return Err(CoreError::invalid(
                        format!("messages[{index}].role"),
                        reason,
                    ));
                }
            }
            let bytes = chat
                .messages
                .iter()
                .map(|message| message.content.len())
                .sum::<usize>();
            if hopeless(bytes) {
                Err(too_long(max_len, "more", "messages"))
            } else {
                Ok(())
            }
        }
        Some(Kind::Text(text)) if hopeless(text.len()) => Err(too_long(max_len, "more", "prompt")),
        Some(Kind::Text(_)) => Ok(()),
        Some(Kind::Tokens(tokens)) => known(&tokens.ids, capacity.vocab_size, "prompt"),
    }
}

/// Refuses tokens that the model has no embedding for. A tokeniser may know some too: tokens that were
/// added to it without resizing the model.
pub(crate) fn known(ids: &[u32], vocab: usize, param: &str) -> Result<(), CoreError> {
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(id) => {
            let message =
                format!("token id {id} is not in the model's vocabulary of {vocab} tokens");
            Err(CoreError::invalid(param, message))
        }
        None => Ok(()),
    }
}

/// How many tokens may be generated after this prompt: what is wanted, as far as there is room.
pub(crate) fn room(
    prompt: usize,
    wanted: Option<u32>,
    max_len: usize,
    param: &str,
) -> Result<u32, CoreError> {
    if prompt == 0 {
        return Err(CoreError::invalid(
            param,
            "the prompt is empty: it has no tokens to go on from",
        ));
    }
    let left = max_len.saturating_sub(prompt);
    // An echo needs no room beside its prompt.
    if prompt > max_len || (left == 0 && wanted != Some(0)) {
        return Err(too_long(max_len, prompt, param));
    }
    let left = u32::try_from(left).unwrap_or(u32::MAX);
    Ok(wanted.map_or(left, |wanted| wanted.min(left)))
}

/// In the words of `OpenAI`, which clients look for.
fn too_long(max_len: usize, prompt: impl Display, param: &str) -> CoreError {
    let message = format!(
        "This model's maximum context length is {max_len} tokens. However, your {param} resulted in {prompt} tokens. \
         Please reduce the length of the {param}."
    );
    CoreError::new(Code::ContextLengthExceeded, message).with_param(param)
}

/// The earlier of the two deadlines that a call can bring, or the default.
pub(crate) fn timeout(timeout_ms: u64, grpc: Option<Duration>, default: Duration) -> Duration {
    let own = if timeout_ms == 0 {
        default
    } else {
        Duration::from_millis(timeout_ms)
    };
    // An Instant cannot be moved by centuries.
    grpc.map_or(own, |grpc| grpc.min(own))
        .min(Duration::from_secs(365 * 24 * 3600))
}

/// The `grpc-timeout` header (`PROTOCOL-HTTP2.md` of gRPC): at most eight digits and a unit.
pub(crate) fn grpc_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
