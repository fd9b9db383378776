//! The bytes of `OpenAI`'s API: server-sent events and JSON bodies.
//!
//! Events of a running request go in, bytes come out, appended to a buffer that the caller
//! reuses. A [`Renderer`] is made once per request.

mod body;
mod json;
mod logprobs;
mod renderer;
mod simple;
mod stream;

pub use renderer::{Head, Kind, Options, Renderer};
pub use simple::{detokenize_body, error_body, tokenize_body};

/// Some text of one choice.
#[derive(Debug, Clone, Copy, Default)]
pub struct Piece<'a> {
    /// Index of the choice.
    pub choice: u32,
    /// New text; may be empty when only log probabilities are new.
    pub text: &'a str,
    /// Log probabilities of the tokens behind it; empty when not asked for.
    pub logprobs: &'a [TokenLogprob],
}

/// A token and how likely it was.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Its bytes; they may be a part of a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability; none for the first token of an echoed prompt.
    pub logprob: Option<f32>,
    /// The most likely tokens at this place, best first: bytes and logarithm.
    pub top: Vec<(Vec<u8>, f32)>,
}

/// Why a choice ended regularly. A cancelled or failed request ends in an error instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token or a stop string.
    Stop,
    /// The token limit.
    Length,
}

impl FinishReason {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Final counts of a request, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all choices.
    pub completion_tokens: u64,
    /// Prompt tokens that were taken from a cache.
    pub cached_tokens: u64,
}

/// The error object of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorObject<'a> {
    /// For people.
    pub message: &'a str,
    /// `OpenAI`'s error type.
    pub kind: &'a str,
    /// Request parameter at fault.
    pub param: Option<&'a str>,
    /// Machine-readable code.
    pub code: Option<&'a str>,
}
