//! How much a tokeniser's normaliser makes of a text, known before it is asked to.
//!
//! A normalised byte costs 17 bytes of memory (tokenizers keeps its origin), and normalisers grow text: NFKC up to
//! eleven times, a rule of a stranger's file as far as its author likes.

use serde_json::Value;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{NormalizedString, Normalizer};

/// Bytes of normalised text that any text may become; longer ones four times their own length.
const ALLOWED: usize = 16 << 20;
/// Growth by the rules of the file (`Replace`, `Precompiled`) beyond which it is refused. Files in use have 3.
const MOST_BY_RULES: usize = 64;
/// Growth by Unicode's own rules, in UTF-8: NFKC 11 (UAX #15, "Stability and expansion"), a following decomposition or
/// lower case at most 3 more. Applying them again adds nothing.
const BY_UNICODE: usize = 33;
/// Bytes that are normalised at a time to measure a text.
const SLICE: usize = 4096;

/// Bounds of one normaliser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Growth {
    factor: usize,
    /// Longest text that a rule writes: what measuring in slices may miss at each seam.
    longest: usize,
}

impl Growth {
    /// Reads the rules. The error says which one writes too much.
    pub(crate) fn of(normalizer: Option<&NormalizerWrapper>) -> Result<Self, String> {
        let spec = normalizer.map(serde_json::to_value).transpose();
        let spec = spec.map_err(|error| error.to_string())?;
        let mut rules = Rules::default();
        if let Some(spec) = &spec {
            rules.add(spec)?;
        }
        if rules.factor > MOST_BY_RULES {
            return Err(format!(
                "its rules make up to {} bytes of one; at most {MOST_BY_RULES} are supported",
                rules.factor
            ));
        }
        let unicode = if rules.unicode { BY_UNICODE } else { 1 };
        Ok(Self {
            factor: rules.factor * unicode,
            longest: rules.longest,
        })
    }

    /// Whether a text stays within what its length allows. Only one that might not is normalised to know, slice by
    /// slice, until it is too much.
    pub(crate) fn allows(self, normalizer: Option<&NormalizerWrapper>, text: &str) -> bool {
        let allowed = ALLOWED.max(text.len().saturating_mul(4));
        let Some(normalizer) = normalizer else {
            return true;
        };
        if text.len().saturating_mul(self.factor) + self.longest <= allowed {
            return true;
        }
        let (mut rest, mut total) = (text, 0);
        while !rest.is_empty() && total <= allowed {
            let mut cut = SLICE.min(rest.len());
            while !rest.is_char_boundary(cut) {
                cut -= 1;
            }
            let (slice, after) = rest.split_at(cut);
            let mut made = NormalizedString::from(slice);
            if normalizer.normalize(&mut made).is_err() {
                // The tokeniser says it better.
                return true;
            }
            total += made.get().len() + self.longest;
            rest = after;
        }
        total <= allowed
    }
}

#[derive(Debug)]
struct Rules {
    factor: usize,
    longest: usize,
    unicode: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            factor: 1,
            longest: 0,
            unicode: false,
        }
    }
}

impl Rules {
    fn add(&mut self, spec: &Value) -> Result<(), String> {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().len();
        match spec.get("type").and_then(Value::as_str).unwrap_or_default() {
            "Sequence" => {
                let steps = spec.get("normalizers").and_then(Value::as_array);
                for step in steps.into_iter().flatten() {
                    self.add(step)?;
                }
            }
            "Strip" | "StripAccents" | "Nmt" => {}
            "ByteLevel" => self.times(2),
            "Prepend" => self.longest += text(spec.get("prepend")),
            "Replace" => {
                let content = text(spec.get("content"));
                let pattern = spec.get("pattern");
                let matched = text(pattern.and_then(|pattern| pattern.get("String")));
                self.longest = self.longest.max(content);
                // An expression, and an empty string, may match between any two bytes.
                self.times(if matched == 0 {
                    1 + content
                } else {
                    content.div_ceil(matched).max(1)
                });
            }
            "Precompiled" => {
                let longest = longest_entry(spec)?;
                self.longest = self.longest.max(longest);
                // What NFKC writes is counted as Unicode's; what is longer, as the file's.
                self.times(longest.div_ceil(36).max(1));
                self.unicode = true;
            }
            _ => self.unicode = true,
        }
        Ok(())
    }

    fn times(&mut self, factor: usize) {
        self.factor = self.factor.saturating_mul(factor);
    }
}

/// Longest replacement of a `SentencePiece` map: a little-endian length, a trie of that many bytes, then texts that end
/// with NUL (sentencepiece, `src/normalizer.cc`, `DecodePrecompiledCharsMap`).
fn longest_entry(spec: &Value) -> Result<usize, String> {
    let encoded = spec.get("precompiled_charsmap").and_then(Value::as_str);
    let map = decode_base64(encoded.unwrap_or_default());
    let (head, rest) = map
        .split_first_chunk::<4>()
        .ok_or("`precompiled_charsmap` is too short")?;
    let trie = usize::try_from(u32::from_le_bytes(*head)).unwrap_or(usize::MAX);
    let texts = rest
        .get(trie..)
        .ok_or("`precompiled_charsmap` is shorter than its trie")?;
    Ok(texts
        .split(|byte| *byte == 0)
        .map(<[u8]>::len)
        .max()
        .unwrap_or(0))
}

/// Base64 that the tokeniser has accepted already.
fn decode_base64(text: &str) -> Vec<u8> {
    let (mut bytes, mut bits, mut count) = (Vec::with_capacity(text.len() / 4 * 3), 0_u32, 0);
    for byte in text.bytes() {
        let digit = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => continue,
        };
        bits = bits << 6 | u32::from(digit);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xFF).unwrap_or_default());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn normalizer(spec: &Value) -> NormalizerWrapper {
        serde_json::from_value(spec.clone()).unwrap()
    }

    fn growth(spec: &Value) -> Result<Growth, String> {
        Growth::of(Some(&normalizer(spec)))
    }

    fn replace(pattern: &Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn rules_that_explode_are_refused() {
        for spec in [
            replace(&json!({"String": "a"}), &"b".repeat(65)),
            replace(&json!({"Regex": "x?"}), &"b".repeat(64)),
            replace(&json!({"String": ""}), &"b".repeat(64)),
            json!({"type": "Sequence", "normalizers": [
                replace(&json!({"String": "a"}), &"a".repeat(9)),
                replace(&json!({"String": "a"}), &"a".repeat(9)),
            ]}),
        ] {
            assert!(
                growth(&spec).unwrap_err().contains("bytes of one"),
                "{spec}"
            );
        }
    }

    #[test]
    fn those_in_use_pass() {
        for spec in [
            replace(&json!({"String": " "}), "\u{2581}"),
            json!({"type": "NFC"}),
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true}),
            json!({"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                replace(&json!({"String": " "}), "\u{2581}"),
            ]}),
            json!({"type": "Sequence", "normalizers": [
                replace(&json!({"String": "``"}), "\""),
                {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
                replace(&json!({"Regex": " {2,}"}), " "),
            ]}),
        ] {
            growth(&spec).unwrap();
        }
    }

    #[test]
    fn a_text_that_explodes_is_found_and_a_long_one_that_does_not_is_fine() {
        let spec = json!({"type": "NFKC"});
        let (rules, bounds) = (normalizer(&spec), growth(&spec).unwrap());
        // U+FDFA: 3 bytes become 33.
        assert!(!bounds.allows(Some(&rules), &"\u{fdfa}".repeat(ALLOWED / 33 + 100_000)));
        assert!(bounds.allows(Some(&rules), &"\u{fdfa}".repeat(ALLOWED / 66)));
        assert!(bounds.allows(Some(&rules), &"plain ".repeat(1 << 20)));
    }

    #[test]
    fn the_longest_entry_of_a_map_is_read() {
        // A trie of four bytes, then "ab\0abcde\0": AQ.. is base64 of 04 00 00 00 | 00 00 00 00 | ab 0 abcde 0.
        let spec = json!({"precompiled_charsmap": "BAAAAAAAAABhYgBhYmNkZQA="});
        assert_eq!(longest_entry(&spec), Ok(5));
        assert!(longest_entry(&json!({"precompiled_charsmap": "BAAAAA=="})).is_err());
        assert!(longest_entry(&json!({})).is_err());
    }

    proptest! {
        #[test]
        fn base64_is_read_back(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            let mut text = String::new();
            for chunk in bytes.chunks(3) {
                let mut word = [0; 3];
                word[..chunk.len()].copy_from_slice(chunk);
                let word = u32::from_be_bytes([0, word[0], word[1], word[2]]);
                for place in 0..4 {
                    let digit = DIGITS[(word >> (18 - 6 * place) & 63) as usize];
                    text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
                }
            }
            prop_assert_eq!(decode_base64(&text), bytes);
        }

        #[test]
        fn no_text_grows_beyond_the_bound(
            text in "[ a-cA-CéİȺ\u{fdfa}\u{1d160}\u{2581}`]{0,40}",
            pattern in "[a-c ]{1,2}",
            content in "[a-cé]{0,6}",
            forms in proptest::collection::vec(
                prop_oneof![Just("NFC"), Just("NFD"), Just("NFKC"), Just("NFKD"), Just("Lowercase"), Just("ByteLevel")],
                0..3,
            ),
        ) {
            let mut steps: Vec<Value> = forms.iter().map(|form| json!({"type": form})).collect();
            steps.push(replace(&json!({"String": pattern}), &content));
            steps.push(json!({"type": "Prepend", "prepend": "\u{2581}"}));
            let spec = json!({"type": "Sequence", "normalizers": steps});
            let (rules, bounds) = (normalizer(&spec), growth(&spec).unwrap());
            let mut normalized = NormalizedString::from(text.as_str());
            rules.normalize(&mut normalized).unwrap();
            prop_assert!(normalized.get().len() <= text.len() * bounds.factor + bounds.longest);
        }
    }
}
