//! Server-sent events of a streamed answer.

use super::json::{escape, integer, raw, string};
use super::logprobs::{Lists, chat_entries};
use super::{ErrorObject, FinishReason, Head, Kind, Options, Piece, Usage, error_body, simple};

const DONE: &str = "data: [DONE]\n\n";

/// State of a stream. The part before the choices is the same in every chunk and written once.
#[derive(Debug)]
pub(super) struct Stream {
    kind: Kind,
    prefix: Vec<u8>,
    suffix: &'static str,
    logprobs: bool,
    include_usage: bool,
    choices: Vec<Choice>,
}

#[derive(Debug, Default)]
struct Choice {
    open: bool,
    finished: bool,
    lists: Lists,
}

impl Stream {
    pub(super) fn new(head: &Head, options: Options) -> Self {
        let object = match options.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut prefix = b"data: ".to_vec();
        super::body::head(&mut prefix, head, object);
        raw(&mut prefix, ",\"choices\":[");
        Self {
            kind: options.kind,
            prefix,
            suffix: if options.include_usage {
                "],\"usage\":null}\n\n"
            } else {
                "]}\n\n"
            },
            logprobs: options.logprobs,
            include_usage: options.include_usage,
            choices: (0..options.choices).map(|_| Choice::default()).collect(),
        }
    }

    pub(super) fn piece(&mut self, piece: &Piece<'_>, out: &mut Vec<u8>) {
        let Some(choice) = self.choices.get_mut(piece.choice as usize) else {
            return;
        };
        if choice.finished {
            return;
        }
        let opening = self.kind == Kind::Chat && !std::mem::replace(&mut choice.open, true);
        if opening {
            self.role(piece.choice, out);
        }
        let with_logprobs = self.logprobs && !piece.logprobs.is_empty();
        if piece.text.is_empty() && !with_logprobs {
            return;
        }
        self.begin(piece.choice, out);
        match self.kind {
            Kind::Chat => {
                raw(out, ",\"delta\":{\"content\":\"");
                escape(out, piece.text);
                raw(out, "\"},\"logprobs\":");
            }
            Kind::Completion => {
                raw(out, ",\"text\":");
                string(out, piece.text);
                raw(out, ",\"logprobs\":");
            }
        }
        if with_logprobs {
            self.logprobs(piece, out);
        } else {
            raw(out, "null");
        }
        raw(out, ",\"finish_reason\":null}");
        raw(out, self.suffix);
    }

    pub(super) fn finish(&mut self, index: u32, reason: FinishReason, out: &mut Vec<u8>) {
        let Some(choice) = self.choices.get_mut(index as usize) else {
            return;
        };
        if std::mem::replace(&mut choice.finished, true) {
            return;
        }
        let opening = self.kind == Kind::Chat && !std::mem::replace(&mut choice.open, true);
        if opening {
            self.role(index, out);
        }
        self.begin(index, out);
        match self.kind {
            Kind::Chat => raw(out, ",\"delta\":{}"),
            Kind::Completion => raw(out, ",\"text\":\"\""),
        }
        raw(out, ",\"logprobs\":null,\"finish_reason\":\"");
        raw(out, reason.as_str());
        raw(out, "\"}");
        raw(out, self.suffix);
    }

    pub(super) fn end(&mut self, usage: &Usage, out: &mut Vec<u8>) {
        if self.include_usage {
            out.extend_from_slice(&self.prefix);
            raw(out, "],\"usage\":");
            simple::usage(out, usage);
            raw(out, "}\n\n");
        }
        raw(out, DONE);
    }

    pub(super) fn error(error: &ErrorObject<'_>, out: &mut Vec<u8>) {
        raw(out, "data: ");
        error_body(out, error);
        raw(out, "\n\n");
        raw(out, DONE);
    }

    /// The first chunk of a chat choice.
    fn role(&self, index: u32, out: &mut Vec<u8>) {
        self.begin(index, out);
        raw(
            out,
            ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}",
        );
        raw(out, self.suffix);
    }

    fn begin(&self, index: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        raw(out, "{\"index\":");
        integer(out, index.into());
    }

    fn logprobs(&mut self, piece: &Piece<'_>, out: &mut Vec<u8>) {
        match self.kind {
            Kind::Chat => {
                raw(out, "{\"content\":[");
                chat_entries(out, piece.logprobs, &mut true);
                raw(out, "],\"refusal\":null}");
            }
            Kind::Completion => {
                if let Some(choice) = self.choices.get_mut(piece.choice as usize) {
                    choice.lists.add(piece.logprobs);
                    choice.lists.write(out);
                }
            }
        }
    }
}
