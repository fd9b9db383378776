//! Text is not control: what a client wrote is never one of the tokens that structure a prompt.
//!
//! A template mixes its own text, whose control tokens must be tokens, with texts of clients, in which the same
//! characters are characters. So a *bar*, a character that occurs nowhere in the chat, is put into whatever in a
//! client's text could be a control token or a part of one. It survives what templates do to texts (trimming,
//! joining, cutting), keeps the tokeniser's search for added tokens from matching across it, and is taken out
//! before anything else looks at the text: all other tokens are those of the text without it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::ops::RangeInclusive;

use aho_corasick::{AhoCorasick, BuildError, MatchKind};
use minijinja::Value;
use tokenizers::tokenizer::normalizer::Range;
use tokenizers::tokenizer::{NormalizedString, OffsetType, PreTokenizer};
use tokenizers::{Model, ModelWrapper, Normalizer, Token, Tokenizer};

use crate::EncodeError;
use crate::vocabulary::Vocabulary;

/// Where bars are taken from: noncharacters, private use, hieroglyphs. A normaliser may remove some of them.
const BARS: [RangeInclusive<char>; 3] = [
    '\u{FDD0}'..='\u{FDEF}',
    '\u{E000}'..='\u{F8FF}',
    '\u{13000}'..='\u{1342F}',
];

/// The control tokens of a checkpoint.
pub(crate) struct Control {
    ids: HashSet<u32>,
    /// Finds control tokens, overlapping ones too, in any case of letters: templates may change it.
    finder: AhoCorasick,
    /// Counts them as a tokeniser would.
    counter: AhoCorasick,
    /// Beginnings and ends of control tokens, shorter than these, in lower case.
    beginnings: HashSet<String>,
    ends: HashSet<String>,
    /// All of them in lower case, one a line.
    joined: String,
    /// Bytes of the longest.
    longest: usize,
    /// What they begin with.
    firsts: Vec<char>,
    /// Whether some are found in the normalised text.
    normalised: bool,
    /// Whether the model makes one of them from plain text, without a match.
    spoken: bool,
    bars: Vec<RangeInclusive<char>>,
}

/// How texts go into a template.
pub(crate) enum Guard<'a> {
    /// As they are.
    Open,
    /// With bars in what could be control.
    Barred(&'a Control, &'a Tokenizer, char),
    /// Without the characters that control tokens begin with: one of these stands for each.
    Veiled(&'a Control, &'a [char]),
}

impl Guard<'_> {
    pub(crate) fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self {
            Self::Open => Cow::Borrowed(text),
            Self::Barred(control, tokenizer, bar) => {
                insert(text, &control.places(text, tokenizer), *bar)
            }
            Self::Veiled(control, veils) => Cow::Owned(control.veil(text, veils)),
        }
    }

    pub(crate) fn value(&self, text: &str) -> Value {
        Value::from(self.text(text).as_ref())
    }
}

impl Control {
    /// The special tokens of a vocabulary, and the marks that its template writes into `prompt`, a plain chat: some
    /// checkpoints do not declare what begins a turn as special. None when there are no such tokens.
    pub(crate) fn of(vocabulary: &Vocabulary, prompt: &str) -> Result<Option<Self>, BuildError> {
        let added = vocabulary.tokenizer().get_added_tokens_decoder();
        let mut tokens: Vec<(u32, &str)> = added
            .iter()
            .filter(|(_, token)| {
                let text = token.content.as_str();
                token.special || (is_mark(text) && prompt.contains(text))
            })
            .map(|(id, token)| (*id, token.content.as_str()))
            // Nothing can stand within a single character.
            .filter(|(_, text)| text.chars().nth(1).is_some() && !text.trim().is_empty())
            .collect();
        if tokens.is_empty() {
            return Ok(None);
        }
        tokens.sort_unstable();
        let texts: Vec<&str> = tokens.iter().map(|(_, text)| *text).collect();
        let folded: Vec<String> = texts.iter().map(|text| text.to_ascii_lowercase()).collect();
        let cuts = folded.iter().flat_map(|text| {
            let places = text.char_indices().skip(1);
            places.map(|(at, _)| text.split_at(at))
        });
        let (beginnings, ends) = cuts.map(|(a, b)| (a.to_string(), b.to_string())).unzip();
        let firsts: BTreeSet<char> = texts
            .iter()
            .filter_map(|text| text.chars().next())
            .flat_map(|c| [c, c.to_ascii_lowercase(), c.to_ascii_uppercase()])
            .collect();
        let mut control = Self {
            ids: tokens.iter().map(|(id, _)| *id).collect(),
            finder: AhoCorasick::builder()
                .ascii_case_insensitive(true)
                .build(&texts)?,
            counter: AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(&texts)?,
            beginnings,
            ends,
            joined: folded.join("\n"),
            longest: texts.iter().map(|text| text.len()).max().unwrap_or(0),
            firsts: firsts.into_iter().collect(),
            normalised: tokens.iter().any(|(id, _)| added[id].normalized),
            spoken: false,
            bars: Vec::new(),
        };
        control.try_out(vocabulary.tokenizer(), &texts);
        Ok(Some(control))
    }

    /// Finds out which bars the normaliser keeps, and whether the model itself gives control tokens.
    fn try_out(&mut self, tokenizer: &Tokenizer, texts: &[&str]) {
        let kept = |range: &RangeInclusive<char>| {
            let bar = *range.start();
            let mut text = NormalizedString::from(format!("<{bar}|"));
            let fine = tokenizer
                .get_normalizer()
                .is_none_or(|normaliser| normaliser.normalize(&mut text).is_ok());
            fine && text.get().contains(bar)
        };
        self.bars = BARS.into_iter().filter(kept).collect();
        let Some(bar) = self.bars.first().map(|range| *range.start()) else {
            return;
        };
        // A character that no vocabulary knows gives the token for the unknown, which is special and harmless.
        let strange = tokenizer.encode_fast(bar.to_string(), false);
        for id in strange.iter().flat_map(tokenizers::Encoding::get_ids) {
            self.ids.remove(id);
        }
        self.spoken = texts.iter().any(|text| {
            let barred = insert(text, &self.places(text, tokenizer), bar);
            let ids = self.encode(tokenizer, &barred, bar).unwrap_or_default();
            ids.iter().any(|id| self.ids.contains(id))
        });
    }

    /// Whether a text may need a guard. Most need none, and cost no more than this.
    pub(crate) fn concerns(&self, text: &str) -> bool {
        self.spoken
            || self.normalised
            || text.contains(self.firsts.as_slice())
            || self.is_part(text.trim())
            || self.continues(text.trim())
    }

    /// Characters that stand for nothing in a chat and its template: `count` that are not among `used`.
    pub(crate) fn unused(&self, count: usize, used: &HashSet<char>) -> Option<Vec<char>> {
        pick(&self.bars, count, used)
    }

    /// The same where nothing is tokenised with them.
    pub(crate) fn free(count: usize, used: &HashSet<char>) -> Option<Vec<char>> {
        pick(&BARS, count, used)
    }

    /// Whether a character may become a bar.
    pub(crate) fn is_bar(symbol: char) -> bool {
        BARS.iter().any(|range| range.contains(&symbol))
    }

    pub(crate) fn firsts(&self) -> usize {
        self.firsts.len()
    }

    /// Control tokens in a text.
    pub(crate) fn count(&self, text: &str) -> usize {
        self.counter.find_iter(text).count()
    }

    fn veil(&self, text: &str, veils: &[char]) -> String {
        let veiled = |c| match self.firsts.binary_search(&c) {
            Ok(at) => veils[at],
            Err(_) => c,
        };
        text.chars().map(veiled).collect()
    }

    /// What a veiled text stood for, with a bar in every place where a control token could begin.
    pub(crate) fn unveil(&self, text: &str, veils: &[char], bar: char) -> String {
        let mut out = String::with_capacity(text.len() + text.len() / 8);
        for c in text.chars() {
            match veils.iter().position(|veil| *veil == c) {
                Some(at) => out.extend([self.firsts[at], bar]),
                None => out.push(c),
            }
        }
        out
    }

    /// Where bars go: behind the first character of every control token; and where the beginning or the end of the
    /// text could be a part of one, together with what the template writes beside it.
    fn places(&self, text: &str, tokenizer: &Tokenizer) -> Vec<usize> {
        let mut places: Vec<usize> = self
            .finder
            .find_overlapping_iter(text)
            .map(|found| after_first(text, found.start()))
            .collect();
        if self.normalised {
            self.normalised_places(text, tokenizer, &mut places);
        }
        let inner = text.trim();
        let start = text.len() - text.trim_start().len();
        if self.is_part(inner) || self.continues(inner) {
            places.push(start);
        }
        let mut window = inner.len().saturating_sub(self.longest);
        while !inner.is_char_boundary(window) {
            window += 1;
        }
        let tail = inner[window..].to_ascii_lowercase();
        for (at, _) in tail.char_indices() {
            if self.beginnings.contains(&tail[at..]) {
                let begins = start + inner.len() - tail.len() + at;
                places.push(after_first(text, begins));
            }
        }
        places.sort_unstable();
        places.dedup();
        places
    }

    fn normalised_places(&self, text: &str, tokenizer: &Tokenizer, places: &mut Vec<usize>) {
        let mut normal = NormalizedString::from(text);
        let Some(normaliser) = tokenizer.get_normalizer() else {
            return;
        };
        if normaliser.normalize(&mut normal).is_err() {
            return;
        }
        let found = self.finder.find_overlapping_iter(normal.get());
        places.extend(found.filter_map(|found| {
            let range = normal.convert_offsets(Range::Normalized(found.start()..found.end()))?;
            Some(after_first(text, range.start))
        }));
    }

    /// Whether a text is a piece of some control token.
    fn is_part(&self, text: &str) -> bool {
        !text.is_empty()
            && text.len() < self.longest
            && !text.contains('\n')
            && self.joined.contains(&text.to_ascii_lowercase())
    }

    /// Whether a text begins with what ends some control token.
    fn continues(&self, text: &str) -> bool {
        let mut longest = self.longest.min(text.len());
        while !text.is_char_boundary(longest) {
            longest -= 1;
        }
        let head = text[..longest].to_ascii_lowercase();
        let ends = head.char_indices().map(|(at, c)| at + c.len_utf8());
        ends.into_iter().any(|end| self.ends.contains(&head[..end]))
    }

    /// Token ids of a text with bars.
    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        bar: char,
    ) -> Result<Vec<u32>, EncodeError> {
        let encode = || {
            let added = tokenizer.get_added_vocabulary();
            let mut parts = added.extract_and_normalize(tokenizer.get_normalizer(), text);
            parts.normalize(|part| {
                part.filter(|c| c != bar);
                Ok(())
            })?;
            if let Some(cutter) = tokenizer.get_pre_tokenizer() {
                cutter.pre_tokenize(&mut parts)?;
            }
            parts.tokenize(|part| self.spell(tokenizer.get_model(), part.get()))?;
            let encoding = parts.into_encoding(None, 0, OffsetType::None)?;
            Ok(encoding.get_ids().to_vec())
        };
        encode().map_err(|error: tokenizers::Error| EncodeError::Tokenizer(error.to_string()))
    }

    /// Tokens of a piece of plain text. A model that takes a control token from it is given the token's text in two.
    fn spell(&self, model: &ModelWrapper, text: &str) -> tokenizers::Result<Vec<Token>> {
        let tokens = model.tokenize(text)?;
        let controls = |tokens: &[Token]| tokens.iter().any(|token| self.ids.contains(&token.id));
        if !controls(&tokens) {
            return Ok(tokens);
        }
        let caught = tokens.iter().filter(|token| self.ids.contains(&token.id));
        let cuts: Vec<usize> = caught
            .map(|token| after_first(text, token.offsets.0))
            .collect();
        let apart = spell_pieces(model, text, &cuts)?;
        if !controls(&apart) {
            return Ok(apart);
        }
        let every: Vec<usize> = text.char_indices().map(|(at, _)| at).skip(1).collect();
        spell_pieces(model, text, &every)
    }
}

fn pick(bars: &[RangeInclusive<char>], count: usize, used: &HashSet<char>) -> Option<Vec<char>> {
    let free = bars.iter().cloned().flatten();
    let found: Vec<char> = free.filter(|bar| !used.contains(bar)).take(count).collect();
    (found.len() == count).then_some(found)
}

/// Tokens of the pieces between cuts.
fn spell_pieces(
    model: &ModelWrapper,
    text: &str,
    cuts: &[usize],
) -> tokenizers::Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([text.len()]) {
        if let Some(piece) = text.get(from..to).filter(|piece| !piece.is_empty()) {
            tokens.extend(model.tokenize(piece)?);
            from = to;
        }
    }
    Ok(tokens)
}

/// Whether a token looks like a mark, and not like text or white space that is a token for being frequent.
fn is_mark(text: &str) -> bool {
    text.chars().nth(2).is_some()
        && text.starts_with(['<', '[', '\u{FF5C}'])
        && text.ends_with(['>', ']', '\u{FF5C}'])
}

/// The place behind the character that begins there.
fn after_first(text: &str, start: usize) -> usize {
    let first = text.get(start..).and_then(|rest| rest.chars().next());
    start + first.map_or(0, char::len_utf8)
}

fn insert<'t>(text: &'t str, places: &[usize], bar: char) -> Cow<'t, str> {
    if places.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + places.len() * bar.len_utf8());
    let mut from = 0;
    for place in places {
        out.push_str(&text[from..*place]);
        out.push(bar);
        from = *place;
    }
    out.push_str(&text[from..]);
    Cow::Owned(out)
}
