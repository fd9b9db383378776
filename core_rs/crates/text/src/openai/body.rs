//! The single body of an answer that is not streamed.

use super::json::{comma, integer, optional, raw, string};
use super::logprobs::{Lists, chat_entries};
use super::{FinishReason, Head, Kind, Options, Piece, Usage, simple};

/// Collects text and log probabilities of every choice.
#[derive(Debug)]
pub(super) struct Body {
    kind: Kind,
    head: Head,
    logprobs: bool,
    choices: Vec<Choice>,
}

#[derive(Debug, Default)]
struct Choice {
    text: String,
    /// Entries of a chat's log probabilities, already JSON.
    entries: Vec<u8>,
    lists: Lists,
    reason: Option<FinishReason>,
}

impl Body {
    pub(super) fn new(head: &Head, options: Options) -> Self {
        Self {
            kind: options.kind,
            head: head.clone(),
            logprobs: options.logprobs,
            choices: (0..options.choices).map(|_| Choice::default()).collect(),
        }
    }

    pub(super) fn piece(&mut self, piece: &Piece<'_>) {
        let Some(choice) = self.choices.get_mut(piece.choice as usize) else {
            return;
        };
        if choice.reason.is_some() {
            return;
        }
        choice.text.push_str(piece.text);
        match self.kind {
            _ if !self.logprobs => {}
            Kind::Chat => {
                let mut first = choice.entries.is_empty();
                chat_entries(&mut choice.entries, piece.logprobs, &mut first);
            }
            Kind::Completion => choice.lists.add(piece.logprobs),
        }
    }

    pub(super) fn finish(&mut self, index: u32, reason: FinishReason) {
        if let Some(choice) = self.choices.get_mut(index as usize) {
            choice.reason.get_or_insert(reason);
        }
    }

    pub(super) fn end(&mut self, usage: &Usage, out: &mut Vec<u8>) {
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        };
        head(out, &self.head, object);
        raw(out, ",\"choices\":[");
        let mut first = true;
        let choices = std::mem::take(&mut self.choices);
        for (index, mut choice) in (0..).zip(choices) {
            comma(out, &mut first);
            self.choice(index, &mut choice, out);
        }
        raw(out, "],\"usage\":");
        simple::usage(out, usage);
        raw(out, "}");
    }

    fn choice(&self, index: u64, choice: &mut Choice, out: &mut Vec<u8>) {
        raw(out, "{\"index\":");
        integer(out, index);
        match self.kind {
            Kind::Chat => {
                raw(out, ",\"message\":{\"role\":\"assistant\",\"content\":");
                string(out, &choice.text);
                raw(out, ",\"refusal\":null}");
            }
            Kind::Completion => {
                raw(out, ",\"text\":");
                string(out, &choice.text);
            }
        }
        raw(out, ",\"logprobs\":");
        match self.kind {
            _ if !self.logprobs => raw(out, "null"),
            Kind::Chat => {
                raw(out, "{\"content\":[");
                out.append(&mut choice.entries);
                raw(out, "],\"refusal\":null}");
            }
            Kind::Completion => choice.lists.write(out),
        }
        raw(out, ",\"finish_reason\":");
        optional(out, choice.reason.map(FinishReason::as_str));
        raw(out, "}");
    }
}

/// `{"id":..,"object":..,"created":..,"model":..,"system_fingerprint":..`, left open.
pub(super) fn head(out: &mut Vec<u8>, head: &Head, object: &str) {
    raw(out, "{\"id\":");
    string(out, &head.id);
    raw(out, ",\"object\":\"");
    raw(out, object);
    raw(out, "\",\"created\":");
    integer(out, head.created);
    raw(out, ",\"model\":");
    string(out, &head.model);
    raw(out, ",\"system_fingerprint\":");
    optional(out, head.system_fingerprint.as_deref());
}
