//! Log probabilities in the two shapes of the API.

use std::fmt::Write;

use super::TokenLogprob;
use super::json::{comma, integer, logprob, raw, string};

/// Appends the entries of a chat's `logprobs.content`, without the brackets.
pub(super) fn chat_entries(out: &mut Vec<u8>, tokens: &[TokenLogprob], first: &mut bool) {
    for token in tokens {
        comma(out, first);
        chat_token(out, &token.bytes, token.logprob.unwrap_or(0.0));
        raw(out, ",\"top_logprobs\":[");
        let mut first_top = true;
        for (bytes, value) in &token.top {
            comma(out, &mut first_top);
            chat_token(out, bytes, *value);
            raw(out, "}");
        }
        raw(out, "]}");
    }
}

/// `{"token":..,"logprob":..,"bytes":[..]`, left open.
fn chat_token(out: &mut Vec<u8>, bytes: &[u8], value: f32) {
    raw(out, "{\"token\":");
    string(out, &token_name(bytes, ""));
    raw(out, ",\"logprob\":");
    logprob(out, value);
    raw(out, ",\"bytes\":[");
    let mut first = true;
    for byte in bytes {
        comma(out, &mut first);
        integer(out, (*byte).into());
    }
    raw(out, "]");
}

/// A token as text; one that is a part of a character is spelled `\xNN`, as the API does.
fn token_name(bytes: &[u8], prefix: &str) -> String {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.to_string();
    }
    let mut name = prefix.to_string();
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(name, "\\x{byte:02x}");
    }
    name
}

/// The four parallel lists of a completion's `logprobs`, written as they grow.
#[derive(Debug, Default)]
pub(super) struct Lists {
    tokens: Vec<u8>,
    values: Vec<u8>,
    top: Vec<u8>,
    offsets: Vec<u8>,
    filled: bool,
    /// Characters of the tokens so far.
    characters: u64,
}

impl Lists {
    pub(super) fn add(&mut self, tokens: &[TokenLogprob]) {
        for token in tokens {
            if std::mem::replace(&mut self.filled, true) {
                for list in [
                    &mut self.tokens,
                    &mut self.values,
                    &mut self.top,
                    &mut self.offsets,
                ] {
                    list.push(b',');
                }
            }
            let name = token_name(&token.bytes, "bytes:");
            string(&mut self.tokens, &name);
            let offset = self.offset(&token.bytes);
            integer(&mut self.offsets, offset);
            if let Some(value) = token.logprob {
                logprob(&mut self.values, value);
                top_map(&mut self.top, token, &name, value);
            } else {
                raw(&mut self.values, "null");
                raw(&mut self.top, "null");
            }
        }
    }

    /// Where the token starts, in characters. A token that continues a character starts where
    /// that character does.
    fn offset(&mut self, bytes: &[u8]) -> u64 {
        let continues = |byte: u8| byte & 0xC0 == 0x80;
        let inside = bytes.first().is_some_and(|byte| continues(*byte));
        let start = if inside {
            self.characters.saturating_sub(1)
        } else {
            self.characters
        };
        self.characters += bytes.iter().filter(|byte| !continues(**byte)).count() as u64;
        start
    }

    /// Appends the object and empties the lists (the offsets go on).
    pub(super) fn write(&mut self, out: &mut Vec<u8>) {
        raw(out, "{\"tokens\":[");
        out.append(&mut self.tokens);
        raw(out, "],\"token_logprobs\":[");
        out.append(&mut self.values);
        raw(out, "],\"top_logprobs\":[");
        out.append(&mut self.top);
        raw(out, "],\"text_offset\":[");
        out.append(&mut self.offsets);
        raw(out, "]}");
        self.filled = false;
    }
}

/// Token name to logarithm: the best ones, and always the chosen one. Two ids with the same
/// name keep the better value, since a map has one place for them.
fn top_map(out: &mut Vec<u8>, token: &TokenLogprob, name: &str, value: f32) {
    let mut names: Vec<String> = Vec::with_capacity(token.top.len() + 1);
    raw(out, "{");
    let best = token
        .top
        .iter()
        .map(|(bytes, value)| (token_name(bytes, "bytes:"), *value));
    for (name, value) in best.chain([(name.to_string(), value)]) {
        if names.contains(&name) {
            continue;
        }
        if !names.is_empty() {
            out.push(b',');
        }
        string(out, &name);
        out.push(b':');
        logprob(out, value);
        names.push(name);
    }
    raw(out, "}");
}
