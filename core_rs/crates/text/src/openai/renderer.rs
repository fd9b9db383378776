//! One interface over the four shapes of an answer.

use super::body::Body;
use super::stream::Stream;
use super::{ErrorObject, FinishReason, Piece, Usage};

/// What every chunk and body starts with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// `chatcmpl-..` or `cmpl-..`.
    pub id: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// Model name, as the client gave it.
    pub model: String,
    /// Identifies the configuration behind the answer.
    pub system_fingerprint: Option<String>,
}

/// Which endpoint is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What the client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Endpoint.
    pub kind: Kind,
    /// Server-sent events, or one body.
    pub stream: bool,
    /// Number of choices: prompts times `n`.
    pub choices: u32,
    /// Whether log probabilities were asked for.
    pub logprobs: bool,
    /// `stream_options.include_usage`.
    pub include_usage: bool,
}

/// Turns the events of one request into the bytes of its answer.
///
/// Order of calls: any number of `piece` and `finish` (one per choice), then `end`; or `error` at
/// any time. After `end` or `error` nothing more is written.
#[derive(Debug)]
pub struct Renderer {
    shape: Shape,
    started: bool,
    done: bool,
}

#[derive(Debug)]
enum Shape {
    Stream(Box<Stream>),
    Body(Box<Body>),
}

impl Renderer {
    /// A renderer of one answer.
    pub fn new(head: &Head, options: Options) -> Self {
        let shape = if options.stream {
            Shape::Stream(Box::new(Stream::new(head, options)))
        } else {
            Shape::Body(Box::new(Body::new(head, options)))
        };
        Self {
            shape,
            started: false,
            done: false,
        }
    }

    /// Some text of a choice. Ignored for a choice that does not exist.
    pub fn piece(&mut self, piece: &Piece<'_>, out: &mut Vec<u8>) {
        self.write(out, |shape, out| match shape {
            Shape::Stream(stream) => stream.piece(piece, out),
            Shape::Body(body) => body.piece(piece),
        });
    }

    /// A choice is complete.
    pub fn finish(&mut self, choice: u32, reason: FinishReason, out: &mut Vec<u8>) {
        self.write(out, |shape, out| match shape {
            Shape::Stream(stream) => stream.finish(choice, reason, out),
            Shape::Body(body) => body.finish(choice, reason),
        });
    }

    /// Everything is complete: the usage chunk when asked for and `[DONE]`, or the body.
    pub fn end(&mut self, usage: &Usage, out: &mut Vec<u8>) {
        self.write(out, |shape, out| match shape {
            Shape::Stream(stream) => stream.end(usage, out),
            Shape::Body(body) => body.end(usage, out),
        });
        self.done = true;
    }

    /// The request failed: an error event and `[DONE]`, or the error envelope instead of a body.
    pub fn error(&mut self, error: &ErrorObject<'_>, out: &mut Vec<u8>) {
        self.write(out, |shape, out| match shape {
            Shape::Stream(_) => Stream::error(error, out),
            Shape::Body(_) => super::error_body(out, error),
        });
        self.done = true;
    }

    /// Whether any byte was written: from then on an error must travel inside the answer.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// Whether the answer is complete.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// MIME type of the answer.
    pub fn content_type(&self) -> &'static str {
        match self.shape {
            Shape::Stream(_) => "text/event-stream; charset=utf-8",
            Shape::Body(_) => "application/json",
        }
    }

    fn write(&mut self, out: &mut Vec<u8>, act: impl FnOnce(&mut Shape, &mut Vec<u8>)) {
        if self.done {
            return;
        }
        let before = out.len();
        act(&mut self.shape, out);
        self.started |= out.len() > before;
    }
}
