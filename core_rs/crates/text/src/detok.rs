//! Token ids to text, one token at a time.

use std::sync::Arc;

use crate::bytes::{ByteRun, Lossy};
use crate::vocabulary::{Kind, Piece, Vocabulary};

/// How many prompt tokens decide what the answer starts with: more than a held byte run.
const PRIME_TOKENS: usize = 64;
/// A window decoder gives up waiting for a character after this many tokens.
const WINDOW_HOLD: usize = 16;
/// Tokens of context that a window decoder keeps from the prompt.
const WINDOW_CONTEXT: usize = 8;

/// Incremental detokeniser of one answer.
///
/// Amortised O(1) per token. What it gives out, concatenated, is the text that decoding prompt
/// and answer together adds to the prompt's; it never ends inside a character. Special tokens and
/// unknown ids give nothing.
#[derive(Clone)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    state: State,
    special: bool,
}

#[derive(Clone)]
enum State {
    ByteLevel(Lossy),
    Plain {
        run: ByteRun,
        strip: Option<(char, usize)>,
        scratch: String,
    },
    Metaspace {
        first: bool,
    },
    Window(Window),
}

impl Detokenizer {
    pub(crate) fn new(vocabulary: Arc<Vocabulary>) -> Self {
        let state = match vocabulary.kind() {
            Kind::ByteLevel => State::ByteLevel(Lossy::default()),
            Kind::Plain { strip, .. } => State::Plain {
                run: ByteRun::default(),
                strip: *strip,
                scratch: String::new(),
            },
            Kind::Metaspace { .. } => State::Metaspace { first: true },
            Kind::Window => State::Window(Window::default()),
        };
        Self {
            vocabulary,
            state,
            special: false,
        }
    }

    /// Special tokens give their names from now on.
    #[must_use]
    pub fn with_special(mut self) -> Self {
        self.special = true;
        self
    }

    /// Takes a prompt as [`Detokenizer::prime`] does and appends its text: what is left of a character at its end
    /// comes with the answer.
    pub fn echo(&mut self, prompt: &[u32], out: &mut String) {
        for id in prompt {
            self.push(*id, out);
        }
        if let State::Plain {
            run,
            strip,
            scratch,
        } = &mut self.state
        {
            run.commit(scratch);
            strip_start(strip, scratch, out);
        }
    }

    /// Tells what comes before the answer, so that its first word keeps its space and a
    /// character begun by the prompt is finished. Gives out nothing.
    pub fn prime(&mut self, prompt: &[u32]) {
        let mut unused = String::new();
        // The start of the text decides whether something is still to be cut from it.
        let mut rest = prompt;
        while let ([id, tail @ ..], true) = (rest, self.at_start()) {
            self.push(*id, &mut unused);
            unused.clear();
            rest = tail;
        }
        let tail = &rest[rest.len().saturating_sub(PRIME_TOKENS)..];
        for id in tail {
            self.push(*id, &mut unused);
        }
        match &mut self.state {
            State::Plain {
                run,
                strip,
                scratch,
            } => {
                run.commit(scratch);
                strip_start(strip, scratch, &mut unused);
            }
            State::Window(window) => window.mark_read(),
            State::ByteLevel(_) | State::Metaspace { .. } => {}
        }
    }

    /// Takes one token and appends the text that is decided.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let piece = match self.vocabulary.piece(id) {
            Piece::Nothing if self.special && self.vocabulary.is_special(id) => {
                Piece::Text(self.vocabulary.bytes(id))
            }
            Piece::Nothing => return,
            piece => piece,
        };
        match (&mut self.state, piece) {
            (State::ByteLevel(lossy), Piece::Text(bytes)) => lossy.push(bytes, out),
            (
                State::Plain {
                    run,
                    strip,
                    scratch,
                },
                piece,
            ) => {
                if strip.is_none() {
                    push_plain(run, piece, out);
                } else {
                    push_plain(run, piece, scratch);
                    strip_start(strip, scratch, out);
                }
            }
            (State::Metaspace { first }, Piece::Text(bytes)) => {
                if std::mem::take(first) {
                    out.push_str(&first_word(&self.vocabulary, id));
                } else {
                    push_text(bytes, out);
                }
            }
            (State::Window(window), _) => window.push(&self.vocabulary, id, out),
            (_, Piece::Byte(_) | Piece::Nothing) => {}
        }
    }

    /// The answer is over: appends what is still held (an unfinished character as U+FFFD).
    pub fn finish(&mut self, out: &mut String) {
        match &mut self.state {
            State::ByteLevel(lossy) => lossy.finish(out),
            State::Plain {
                run,
                strip,
                scratch,
            } => {
                run.end(scratch);
                strip_start(strip, scratch, out);
            }
            State::Metaspace { .. } => {}
            State::Window(window) => window.finish(&self.vocabulary, out),
        }
    }

    fn at_start(&self) -> bool {
        match &self.state {
            State::Plain { strip, .. } => strip.is_some(),
            State::Metaspace { first } => *first,
            State::ByteLevel(_) | State::Window(_) => false,
        }
    }
}

fn push_plain(run: &mut ByteRun, piece: Piece<'_>, out: &mut String) {
    match piece {
        Piece::Byte(byte) => run.push(byte, out),
        Piece::Text(bytes) => {
            run.end(out);
            push_text(bytes, out);
        }
        Piece::Nothing => {}
    }
}

/// The bytes are those of a token string: valid UTF-8, so that nothing is replaced.
fn push_text(bytes: &[u8], out: &mut String) {
    match std::str::from_utf8(bytes) {
        Ok(text) => out.push_str(text),
        Err(_) => out.push_str(&String::from_utf8_lossy(bytes)),
    }
}

/// Moves `text` to `out` without the leading characters that are still to be cut.
fn strip_start(strip: &mut Option<(char, usize)>, text: &mut String, out: &mut String) {
    let mut rest = text.as_str();
    while let Some((cut, left)) = strip {
        let Some(first) = rest.chars().next() else {
            break;
        };
        if first != *cut || *left == 0 {
            *strip = None;
        } else {
            rest = &rest[first.len_utf8()..];
            *left -= 1;
        }
    }
    out.push_str(rest);
    text.clear();
}

/// The metaspace decoder drops every mark of the first token.
fn first_word(vocabulary: &Vocabulary, id: u32) -> String {
    let token = vocabulary.tokenizer().id_to_token(id).unwrap_or_default();
    match vocabulary.kind() {
        Kind::Metaspace { mark } => token.replace(*mark, ""),
        _ => token,
    }
}

/// Decodes a sliding window twice and gives out the difference, for decoders whose pieces depend
/// on their neighbours.
#[derive(Clone, Default)]
struct Window {
    ids: Vec<u32>,
    read: usize,
}

impl Window {
    fn push(&mut self, vocabulary: &Vocabulary, id: u32, out: &mut String) {
        self.ids.push(id);
        let unfinished = self.ids.len() - self.read < WINDOW_HOLD;
        self.flush(vocabulary, out, unfinished);
    }

    fn flush(&mut self, vocabulary: &Vocabulary, out: &mut String, may_hold: bool) {
        let all = vocabulary.decode(&self.ids);
        if may_hold && all.ends_with('\u{FFFD}') {
            return;
        }
        let known = vocabulary.decode(&self.ids[..self.read]);
        if let Some(new) = all.strip_prefix(known.as_str()) {
            out.push_str(new);
        } else {
            // The new token changed text that is already out: keep to what comes after it.
            out.push_str(all.get(known.len()..).unwrap_or_default());
        }
        self.mark_read();
    }

    /// Everything so far is out; only a context is kept.
    fn mark_read(&mut self) {
        let excess = self.ids.len().saturating_sub(WINDOW_CONTEXT);
        self.ids.drain(..excess);
        self.read = self.ids.len();
    }

    fn finish(&mut self, vocabulary: &Vocabulary, out: &mut String) {
        if self.read < self.ids.len() {
            self.flush(vocabulary, out, false);
        }
    }
}
