//! The bytes of every token, worked out once from the tokeniser's decoder.

use std::path::Path;

use serde_json::Value;
use tokenizers::{Decoder, Tokenizer};

use crate::LoadError;

/// More ids than this are taken for a damaged file: the table would fill the memory.
const MAX_IDS: usize = 1 << 24;

/// How token strings become text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// GPT-2 byte alphabet: every token is bytes; invalid UTF-8 is replaced lossily.
    ByteLevel,
    /// Token strings are text, except `<0xNN>` when `bytes`; `strip` leading characters
    /// are cut from the start of the whole text.
    Plain {
        bytes: bool,
        strip: Option<(char, usize)>,
    },
    /// Like `Plain`, and the first token of a text loses every metaspace.
    Metaspace { mark: char },
    /// Anything else: ask the tokeniser with a window of tokens.
    Window,
}

#[derive(Clone, Copy)]
enum Class {
    Text,
    Byte,
    Special,
    Unknown,
}

/// Token table of one tokeniser.
pub(crate) struct Vocabulary {
    tokenizer: Tokenizer,
    kind: Kind,
    ends: Vec<u32>,
    classes: Vec<Class>,
    bytes: Vec<u8>,
}

/// What a token adds to a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// Text (for byte-level kinds, bytes that may be a part of a character).
    Text(&'a [u8]),
    /// One byte of a byte-fallback run.
    Byte(u8),
    /// Nothing: a special token or an unknown id.
    Nothing,
}

impl Vocabulary {
    pub(crate) fn new(tokenizer: Tokenizer, path: &Path) -> Result<Self, LoadError> {
        let decoder = tokenizer.get_decoder();
        let spec = decoder.map(serde_json::to_value).transpose();
        let spec = spec.map_err(|error| LoadError::new(path, "decoder", error.to_string()))?;
        if spec.as_ref().is_some_and(strips_the_end) {
            let reason = "`Strip` with `stop` above 0 is not supported: it cuts what was streamed";
            return Err(LoadError::new(path, "decoder", reason));
        }
        let Rules { kind, replace } = Rules::of(spec.as_ref());
        let size = tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        if size == 0 || size > MAX_IDS {
            let reason = format!("has {size} token ids; between 1 and {MAX_IDS} are supported");
            return Err(LoadError::new(path, "model.vocab", reason));
        }
        let mut table = Self {
            ends: Vec::with_capacity(size),
            classes: Vec::with_capacity(size),
            bytes: Vec::with_capacity(size * 6),
            tokenizer,
            kind,
        };
        let alphabet = ByteAlphabet::new();
        for id in 0..u32::try_from(size).unwrap_or(u32::MAX) {
            table.add(id, &replace, &alphabet);
        }
        Ok(table)
    }

    fn add(&mut self, id: u32, replace: &[(String, String)], alphabet: &ByteAlphabet) {
        let added = self.tokenizer.get_added_vocabulary();
        let token = added
            .simple_id_to_token(id)
            .or_else(|| tokenizers::Model::id_to_token(self.tokenizer.get_model(), id));
        let class = match token {
            None => Class::Unknown,
            Some(token) if added.is_special_token(&token) => {
                self.bytes.extend_from_slice(token.as_bytes());
                Class::Special
            }
            Some(token) => self.add_text(token, replace, alphabet),
        };
        self.classes.push(class);
        self.ends
            .push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
    }

    fn add_text(
        &mut self,
        mut token: String,
        replace: &[(String, String)],
        alphabet: &ByteAlphabet,
    ) -> Class {
        for (from, to) in replace {
            if token.contains(from.as_str()) {
                token = token.replace(from.as_str(), to);
            }
        }
        match &self.kind {
            Kind::ByteLevel => {
                let start = self.bytes.len();
                for c in token.chars() {
                    let Some(byte) = alphabet.byte(c) else {
                        // Added tokens are written in clear.
                        self.bytes.truncate(start);
                        self.bytes.extend_from_slice(token.as_bytes());
                        break;
                    };
                    self.bytes.push(byte);
                }
            }
            Kind::Plain { bytes: true, .. } => {
                if let Some(byte) = fallback_byte(&token) {
                    self.bytes.push(byte);
                    return Class::Byte;
                }
                self.bytes.extend_from_slice(token.as_bytes());
            }
            Kind::Plain { .. } => self.bytes.extend_from_slice(token.as_bytes()),
            Kind::Metaspace { mark } => {
                let text = token.replace(*mark, " ");
                self.bytes.extend_from_slice(text.as_bytes());
            }
            Kind::Window => {
                // What the token adds after some other token, where a word boundary counts.
                let text = match self.tokenizer.get_decoder() {
                    Some(decoder) => decoder.decode_chain(vec!["a".into(), token.clone()]),
                    None => Ok(vec![token.clone()]),
                };
                let text = text
                    .ok()
                    .and_then(|mut parts| (parts.len() == 2).then(|| parts.pop()));
                let text = text.flatten().unwrap_or(token);
                self.bytes.extend_from_slice(text.as_bytes());
            }
        }
        Class::Text
    }

    /// Text of tokens decoded at once. Some decoders do not take an empty list.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        if ids.iter().all(|id| self.piece(*id) == Piece::Nothing) {
            return String::new();
        }
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    pub(crate) fn len(&self) -> usize {
        self.classes.len()
    }

    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..*end as usize]
    }

    pub(crate) fn piece(&self, id: u32) -> Piece<'_> {
        match self.classes.get(id as usize) {
            Some(Class::Text) => Piece::Text(self.bytes(id)),
            Some(Class::Byte) => self
                .bytes(id)
                .first()
                .map_or(Piece::Nothing, |b| Piece::Byte(*b)),
            _ => Piece::Nothing,
        }
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        matches!(self.classes.get(id as usize), Some(Class::Special))
    }
}

/// `<0xNN>` as the byte-fallback decoder reads it.
fn fallback_byte(token: &str) -> Option<u8> {
    if token.len() != 6 {
        return None;
    }
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok()
}

/// Rules read from the decoder's own description.
struct Rules {
    kind: Kind,
    replace: Vec<(String, String)>,
}

impl Rules {
    fn of(spec: Option<&Value>) -> Self {
        let window = Self {
            kind: Kind::Window,
            replace: Vec::new(),
        };
        let Some(spec) = spec else { return window };
        let steps = match (kind_of(spec), spec.get("decoders")) {
            ("Sequence", Some(Value::Array(steps))) => steps.as_slice(),
            _ => std::slice::from_ref(spec),
        };
        match steps {
            [one] if kind_of(one) == "ByteLevel" => Self {
                kind: Kind::ByteLevel,
                ..window
            },
            [one] if kind_of(one) == "Metaspace" => metaspace(one).unwrap_or(window),
            _ => plain(steps).unwrap_or(window),
        }
    }
}

fn kind_of(spec: &Value) -> &str {
    spec.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn strips_the_end(spec: &Value) -> bool {
    let inner = spec.get("decoders").and_then(Value::as_array);
    spec.get("stop")
        .and_then(Value::as_u64)
        .is_some_and(|stop| stop > 0)
        || inner.is_some_and(|steps| steps.iter().any(strips_the_end))
}

fn metaspace(spec: &Value) -> Option<Rules> {
    let mark = spec.get("replacement")?.as_str()?.chars().next()?;
    if spec.get("prepend_scheme").and_then(Value::as_str) == Some("never") {
        let replace = vec![(mark.to_string(), " ".to_string())];
        return Some(Rules {
            kind: Kind::Plain {
                bytes: false,
                strip: None,
            },
            replace,
        });
    }
    Some(Rules {
        kind: Kind::Metaspace { mark },
        replace: Vec::new(),
    })
}

/// `Replace* ByteFallback? Fuse? Strip(start)?`, the `SentencePiece` family. None for any other
/// order, whose meaning differs.
fn plain(steps: &[Value]) -> Option<Rules> {
    let mut replace = Vec::new();
    let (mut bytes, mut fused, mut strip) = (false, false, None);
    for step in steps {
        match kind_of(step) {
            "Replace" if !bytes && !fused && strip.is_none() => {
                let from = step.get("pattern")?.get("String")?.as_str()?;
                if from.is_empty() {
                    return None;
                }
                replace.push((from.to_string(), step.get("content")?.as_str()?.to_string()));
            }
            "ByteFallback" if !bytes && !fused && strip.is_none() => bytes = true,
            "Fuse" if strip.is_none() => fused = true,
            "Strip" if fused && strip.is_none() && step.get("stop")?.as_u64()? == 0 => {
                let content = step.get("content")?.as_str()?.chars().next()?;
                strip = Some((content, usize::try_from(step.get("start")?.as_u64()?).ok()?));
            }
            _ => return None,
        }
    }
    Some(Rules {
        kind: Kind::Plain { bytes, strip },
        replace,
    })
}

/// GPT-2's reversible alphabet: printable bytes stand for themselves, the others for the
/// characters from U+0100 on, in byte order
/// (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>, `bytes_to_unicode`).
struct ByteAlphabet([Option<u8>; 0x144]);

impl ByteAlphabet {
    fn new() -> Self {
        let mut table = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=255_u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let slot = if printable { usize::from(byte) } else { next };
            next += usize::from(!printable);
            table[slot] = Some(byte);
        }
        Self(table)
    }

    fn byte(&self, c: char) -> Option<u8> {
        self.0.get(c as usize).copied().flatten()
    }
}
