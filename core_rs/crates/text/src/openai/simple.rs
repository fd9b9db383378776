//! Bodies that are written in one piece.

use super::json::{comma, integer, optional, raw, string};
use super::{ErrorObject, Usage};

/// `{"error":{message,type,param,code}}`.
pub fn error_body(out: &mut Vec<u8>, error: &ErrorObject<'_>) {
    raw(out, "{\"error\":{\"message\":");
    string(out, error.message);
    raw(out, ",\"type\":");
    string(out, error.kind);
    raw(out, ",\"param\":");
    optional(out, error.param);
    raw(out, ",\"code\":");
    optional(out, error.code);
    raw(out, "}}");
}

/// Answer of `/tokenize`: `{"count":..,"max_model_len":..,"tokens":[..]}`.
pub fn tokenize_body(out: &mut Vec<u8>, tokens: &[u32], max_model_len: u32) {
    raw(out, "{\"count\":");
    integer(out, tokens.len() as u64);
    raw(out, ",\"max_model_len\":");
    integer(out, max_model_len.into());
    raw(out, ",\"tokens\":[");
    let mut first = true;
    for token in tokens {
        comma(out, &mut first);
        integer(out, (*token).into());
    }
    raw(out, "]}");
}

/// Answer of `/detokenize`: `{"prompt":".."}`.
pub fn detokenize_body(out: &mut Vec<u8>, text: &str) {
    raw(out, "{\"prompt\":");
    string(out, text);
    raw(out, "}");
}

/// The `usage` object.
pub(super) fn usage(out: &mut Vec<u8>, usage: &Usage) {
    raw(out, "{\"prompt_tokens\":");
    integer(out, usage.prompt_tokens);
    raw(out, ",\"completion_tokens\":");
    integer(out, usage.completion_tokens);
    raw(out, ",\"total_tokens\":");
    integer(out, usage.prompt_tokens + usage.completion_tokens);
    raw(out, ",\"prompt_tokens_details\":{\"cached_tokens\":");
    integer(out, usage.cached_tokens);
    raw(out, "}}");
}
