//! Bytes to text as they arrive, never half a character.

const REPLACEMENT: char = '\u{FFFD}';

/// Streaming equivalent of [`String::from_utf8_lossy`]: the concatenated output is the same for
/// every split of the input. Holds at most three bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lossy {
    held: Vec<u8>,
}

impl Lossy {
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.held.is_empty() {
            let tail = decode_available(bytes, out);
            self.held.extend_from_slice(tail);
        } else {
            self.held.extend_from_slice(bytes);
            let tail = decode_available(&self.held, out).len();
            self.held.drain(..self.held.len() - tail);
        }
    }

    pub(crate) fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            // An incomplete character is one maximal subpart, hence one replacement.
            out.push(REPLACEMENT);
            self.held.clear();
        }
    }
}

/// Decodes all that is decided; returns the incomplete character at the end.
fn decode_available<'a>(mut bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                // Validated just above: the lossy conversion borrows and replaces nothing.
                out.push_str(&String::from_utf8_lossy(valid));
                let Some(bad) = error.error_len() else {
                    return rest;
                };
                out.push(REPLACEMENT);
                bytes = &rest[bad..];
            }
        }
    }
}

/// A run of byte-fallback tokens, with the rule of the `ByteFallback` decoder: a run that is
/// valid UTF-8 is its text; in a run that is not, every byte is one U+FFFD.
///
/// So a valid prefix is undecided until the run ends. It is held for at most [`MAX_HELD`] bytes;
/// then its complete characters are given out, because a reader of a script that the
/// vocabulary lacks must not wait for the end of the answer. Only a run that turns invalid
/// after that many valid bytes differs from decoding at once: it keeps its good characters.
#[derive(Debug, Clone, Default)]
pub(crate) struct ByteRun {
    held: Vec<u8>,
    invalid: bool,
}

/// Held bytes of an undecided run: four emoji, or five characters of most scripts.
pub(crate) const MAX_HELD: usize = 16;

impl ByteRun {
    pub(crate) fn push(&mut self, byte: u8, out: &mut String) {
        if self.invalid {
            out.push(REPLACEMENT);
            return;
        }
        self.held.push(byte);
        let decided = match std::str::from_utf8(&self.held) {
            Ok(_) => self.held.len(),
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => {
                self.invalid = true;
                self.replace_held(out);
                return;
            }
        };
        if decided >= MAX_HELD {
            self.release(decided, out);
        }
    }

    /// The run is over: the next token is text, or the answer ends.
    pub(crate) fn end(&mut self, out: &mut String) {
        self.invalid = false;
        if self.held.is_empty() {
            return;
        }
        if std::str::from_utf8(&self.held).is_ok() {
            self.release(self.held.len(), out);
        } else {
            self.replace_held(out);
        }
    }

    /// Gives out the complete characters and keeps an incomplete one, which the next bytes may
    /// complete.
    pub(crate) fn commit(&mut self, out: &mut String) {
        let whole = match std::str::from_utf8(&self.held) {
            Ok(_) => self.held.len(),
            Err(error) => error.valid_up_to(),
        };
        self.release(whole, out);
    }

    fn release(&mut self, count: usize, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.held[..count]));
        self.held.drain(..count);
    }

    fn replace_held(&mut self, out: &mut String) {
        out.extend(std::iter::repeat_n(REPLACEMENT, self.held.len()));
        self.held.clear();
    }
}
