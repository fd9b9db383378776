//! Server-sent events of an `OpenAI` stream: counted, and parsed only where a number is needed.

use crate::http::find;
use serde_json::Value;

/// Longest accepted event, in bytes.
const MAX_EVENT: usize = 1 << 20;

/// What a stream has shown so far.
#[derive(Debug, Default)]
pub(crate) struct Events {
    line: Vec<u8>,
    last: Vec<u8>,
    /// Events with data, `[DONE]` not counted.
    pub(crate) count: u64,
    /// Some text has arrived.
    pub(crate) text_seen: bool,
    /// `[DONE]` has arrived.
    pub(crate) done: bool,
    /// Message of an error event.
    pub(crate) error: Option<String>,
    /// The stream breaks the protocol.
    pub(crate) broken: bool,
}

impl Events {
    /// Takes the next bytes of the body.
    pub(crate) fn feed(&mut self, mut input: &[u8]) {
        while let Some(end) = input.iter().position(|&byte| byte == b'\n') {
            if self.line.is_empty() {
                self.take_line(&input[..end]);
            } else {
                self.line.extend_from_slice(&input[..end]);
                let line = std::mem::take(&mut self.line);
                self.take_line(&line);
                self.line = line;
                self.line.clear();
            }
            input = &input[end + 1..];
        }
        self.line.extend_from_slice(input);
        self.broken |= self.line.len() > MAX_EVENT;
    }

    fn take_line(&mut self, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(data) = line.strip_prefix(b"data:") else {
            return;
        };
        let data = data.strip_prefix(b" ").unwrap_or(data);
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        self.broken |= self.done;
        self.count += 1;
        if !self.text_seen {
            self.text_seen = has_text(data);
        }
        if data.starts_with(b"{\"error\"") {
            let value: Value = serde_json::from_slice(data).unwrap_or_default();
            let code = value["error"]["code"].as_str().unwrap_or("unknown");
            self.error = Some(code.to_owned());
        }
        self.last.clear();
        self.last.extend_from_slice(data);
    }

    /// Generated tokens by the usage of the last chunk; `None` without usage.
    pub(crate) fn usage_tokens(&self) -> Option<u64> {
        let value: Value = serde_json::from_slice(&self.last).ok()?;
        value["usage"]["completion_tokens"].as_u64()
    }
}

/// Whether a chunk carries text: a non-empty `content` (chat) or `text` (completions).
fn has_text(data: &[u8]) -> bool {
    [&b"\"content\":\""[..], b"\"text\":\""].iter().any(|key| {
        find(data, key)
            .and_then(|at| data.get(at + key.len()))
            .is_some_and(|&byte| byte != b'"')
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    const STREAM: &str = concat!(
        ": keep-alive\n\n",
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"He\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"llo\"}}]}\r\n\r\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":7}}\n\n",
        "data: [DONE]\n\n",
    );

    #[test]
    fn counts_the_same_in_pieces_of_any_size() {
        for piece in 1..=STREAM.len() {
            let mut events = Events::default();
            for part in STREAM.as_bytes().chunks(piece) {
                events.feed(part);
            }
            assert_eq!(events.count, 4, "piece {piece}");
            assert!(events.done && !events.broken && events.error.is_none());
            assert_eq!(events.usage_tokens(), Some(7));
        }
    }

    #[test]
    fn text_starts_with_the_first_non_empty_content() {
        let mut events = Events::default();
        let cut = STREAM
            .find("data: {\"choices\":[{\"delta\":{\"content\":\"He")
            .unwrap();
        events.feed(&STREAM.as_bytes()[..cut]);
        assert!(!events.text_seen);
        events.feed(&STREAM.as_bytes()[cut..]);
        assert!(events.text_seen);
    }

    #[test]
    fn error_events_and_events_after_the_end_are_seen() {
        let mut events = Events::default();
        events.feed(
            b"data: {\"error\":{\"message\":\"m\",\"code\":\"unavailable\"}}\n\ndata: [DONE]\n\n",
        );
        assert_eq!(events.error.as_deref(), Some("unavailable"));
        assert!(events.done && !events.broken);
        assert_eq!(events.usage_tokens(), None);
        events.feed(b"data: {}\n\n");
        assert!(events.broken);
    }
}
