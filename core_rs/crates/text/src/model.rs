//! Everything about the text of one checkpoint.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use thiserror::Error;
use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::ModelWrapper;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::processors::PostProcessorWrapper;

use crate::chat::Parsed;
use crate::control::{Control, Guard};
use crate::growth::Growth;
use crate::load::{
    MAX_TEMPLATE_BYTES, MAX_TOKENIZER_BYTES, inline_template, read_object, read_optional,
    token_ids, token_text,
};
use crate::template::{Manner, SpecialTokens, Template};
use crate::vocabulary::Vocabulary;
use crate::{Chat, Detokenizer, LoadError, Message, TemplateError};

/// A prompt that cannot be turned into token ids.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// The chat template refused the messages, or there is none.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokeniser failed; the message is its own.
    #[error("the tokeniser could not encode the text: {0}")]
    Tokenizer(String),
    /// The tokeniser's normaliser makes too much of the text.
    #[error(
        "the text grows too much when it is normalised for this model; send less of the characters that are spelled out, like ligatures"
    )]
    Grows,
}

/// Tokeniser, chat template and end-of-text ids of one checkpoint. Cheap to clone.
#[derive(Clone)]
pub struct TextModel {
    vocabulary: Arc<Vocabulary>,
    template: Option<Arc<Template>>,
    /// None when texts may hold control tokens, or there are none.
    control: Option<Arc<Control>>,
    bos: Option<(String, u32)>,
    eos_ids: Arc<[u32]>,
    growth: Growth,
}

impl fmt::Debug for TextModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextModel")
            .field("vocab_size", &self.vocab_size())
            .field("eos_ids", &self.eos_ids)
            .field("has_chat_template", &self.has_chat_template())
            .finish_non_exhaustive()
    }
}

impl TextModel {
    /// Loads a checkpoint folder in the Hugging Face layout.
    ///
    /// Needs `tokenizer.json`. Takes, when present, `tokenizer_config.json` (special tokens,
    /// template), `chat_template.jinja` (wins over the inline template),
    /// `generation_config.json` and `config.json` (ids that end a text).
    ///
    /// # Errors
    /// A missing or damaged file, with the key at fault.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?;
        let tokenizer_path = dir.join("tokenizer.json");
        let tokenizer = load_tokenizer(&tokenizer_path)?;
        let growth = Growth::of(tokenizer.get_normalizer())
            .map_err(|reason| LoadError::new(&tokenizer_path, "normalizer", reason))?;
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, &tokenizer_path)?);

        let special = SpecialTokens {
            bos: token_text(&config_path, &config, "bos_token")?,
            eos: token_text(&config_path, &config, "eos_token")?,
            unk: token_text(&config_path, &config, "unk_token")?,
            pad: token_text(&config_path, &config, "pad_token")?,
        };
        let known = |text: &str| vocabulary.tokenizer().token_to_id(text);
        let bos = special
            .bos
            .clone()
            .and_then(|text| known(&text).map(|id| (text, id)));
        let eos_ids = eos_ids(dir, &config_path, special.eos.as_deref(), &vocabulary)?;
        let template = load_template(dir, &config_path, &config, special)?;
        let plain = template.as_ref().map(plain_chat).unwrap_or_default();
        let control = Control::of(&vocabulary, &plain)
            .map_err(|error| LoadError::new(&tokenizer_path, "added_tokens", error.to_string()))?;
        Ok(Self {
            vocabulary,
            template: template.map(Arc::new),
            control: control.map(Arc::new),
            bos,
            eos_ids,
            growth,
        })
    }

    /// Token ids of a text. `add_special` adds what the tokeniser's post-processor adds
    /// (usually BOS); a text that already starts with BOS gets no second one.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        self.check_growth(text)?;
        let encoding = self
            .vocabulary
            .tokenizer()
            .encode_fast(text, add_special)
            .map_err(|error| EncodeError::Tokenizer(error.to_string()))?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some((bos, id)) = &self.bos
            && add_special
            && text.starts_with(bos.as_str())
            && ids.starts_with(&[*id, *id])
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Text of clients may hold control tokens: they are tokens then, as in the template's own text.
    #[must_use]
    pub fn with_control_in_text(mut self) -> Self {
        self.control = None;
        self
    }

    /// The prompt text of a chat.
    pub fn render_chat(&self, chat: &Chat<'_>) -> Result<String, TemplateError> {
        let template = self.template.as_ref().ok_or(TemplateError::Missing)?;
        let parsed = Parsed::new(chat);
        let manner = Manner {
            end: unused(None, &parsed, template, 1)?[0],
            ..Manner::OPEN
        };
        template.render(&parsed, &manner)
    }

    /// Variables of the chat template that a request may set, sorted.
    pub fn template_variables(&self) -> Vec<String> {
        let template = self.template.as_ref();
        template.map_or_else(Vec::new, |template| template.variables())
    }

    /// Token ids of a chat.
    ///
    /// The template writes every special token that belongs into the prompt, so none is added
    /// after it (as `apply_chat_template` of transformers does): BOS is never doubled. Text of the
    /// messages is text: what only looks like a control token is encoded as the characters it has.
    pub fn encode_chat(&self, chat: &Chat<'_>) -> Result<Vec<u32>, EncodeError> {
        let template = self.template.as_ref().ok_or(TemplateError::Missing)?;
        let parsed = Parsed::new(chat);
        let tokenizer = self.vocabulary.tokenizer();
        // Looking for control tokens normalises each text by itself.
        let mut grown = Ok(());
        parsed.visit(&mut |text| {
            if grown.is_ok() {
                grown = self.check_growth(text);
            }
        });
        grown?;
        let guarded = self.control.as_deref().filter(|control| {
            let mut needed = !parsed.is_plain();
            parsed.visit(&mut |text| needed = needed || control.concerns(text));
            needed
        });
        let Some(control) = guarded else {
            return self.encode(&self.render_chat(chat)?, false);
        };
        let free = unused(Some(control), &parsed, template, control.firsts() + 2)?;
        let (end, bar, veils) = (free[0], free[1], &free[2..]);
        let render = |guard| template.render(&parsed, &Manner { guard, end });
        let mut prompt = render(Guard::Barred(control, tokenizer, bar))?;
        // A template that takes texts apart may put a control token together. Where the characters that they begin
        // with are veiled in texts, all that are left are the template's.
        if let Ok(veiled) = render(Guard::Veiled(control, veils))
            && control.count(&prompt) > control.count(&veiled)
        {
            prompt = control.unveil(&veiled, veils, bar);
        }
        self.check_growth(&prompt)?;
        control.encode(tokenizer, &prompt, bar)
    }

    fn check_growth(&self, text: &str) -> Result<(), EncodeError> {
        let normalizer = self.vocabulary.tokenizer().get_normalizer();
        if self.growth.allows(normalizer, text) {
            Ok(())
        } else {
            Err(EncodeError::Grows)
        }
    }

    /// Text of token ids decoded at once; special tokens and unknown ids give no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.vocabulary.decode(ids)
    }

    /// A fresh incremental detokeniser.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.vocabulary))
    }

    /// Bytes that a token stands for (for a special token, its name); empty for an unknown id.
    /// They may be a part of a character.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// Whether the token is special: it is part of a prompt's structure and gives no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// Ids that end a text, sorted, each once. May be empty.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Id of the beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|(_, id)| *id)
    }

    /// One more than the largest token id. An engine may have more logits (padding).
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// Whether the checkpoint has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }
}

/// What a template makes of two turns; empty when it does not take them.
fn plain_chat(template: &Template) -> String {
    let message = |role| Message {
        role,
        content: "hello",
        ..Message::default()
    };
    let turns = [message("user"), message("assistant"), message("user")];
    template.try_out(&turns, false).unwrap_or_default()
}

/// Characters that occur nowhere in a chat and its template.
fn unused(
    control: Option<&Control>,
    parsed: &Parsed<'_>,
    template: &Template,
    count: usize,
) -> Result<Vec<char>, TemplateError> {
    let mut used = template.symbols().clone();
    parsed.visit(&mut |text| used.extend(text.chars().filter(|c| Control::is_bar(*c))));
    let free = match control {
        Some(control) => control.unused(count, &used),
        None => Control::free(count, &used),
    };
    free.ok_or(TemplateError::TooMuchWork)
}

fn load_tokenizer(path: &Path) -> Result<Tokenizer, LoadError> {
    let Some(text) = read_optional(path, MAX_TOKENIZER_BYTES)? else {
        let reason = "does not exist; a checkpoint needs the tokeniser in this format";
        return Err(LoadError::new(path, "", reason));
    };
    let mut tokenizer: Tokenizer = text
        .parse()
        .map_err(|error: tokenizers::Error| blame(path, &text, &error.to_string()))?;
    // Some files keep the truncation and padding of their training run.
    tokenizer.with_padding(None);
    let _ = tokenizer.with_truncation(None);
    Ok(tokenizer)
}

/// Finds the section of a tokenizer.json that does not parse.
fn blame(path: &Path, text: &str, error: &str) -> LoadError {
    let file = match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(file)) => file,
        Ok(_) => return LoadError::new(path, "", "is not a JSON object"),
        Err(error) => return LoadError::new(path, "", format!("is not valid JSON: {error}")),
    };
    let present = |key: &str| file.get(key).filter(|value| !value.is_null()).cloned();
    let Some(model) = present("model") else {
        return LoadError::new(path, "model", "is missing");
    };
    let fault = serde_json::from_value::<ModelWrapper>(model)
        .err()
        .map(|e| ("model", e));
    let fault =
        fault.or_else(|| fault_in::<NormalizerWrapper>("normalizer", present("normalizer")));
    let fault = fault
        .or_else(|| fault_in::<PreTokenizerWrapper>("pre_tokenizer", present("pre_tokenizer")));
    let fault = fault
        .or_else(|| fault_in::<PostProcessorWrapper>("post_processor", present("post_processor")));
    let fault = fault.or_else(|| fault_in::<DecoderWrapper>("decoder", present("decoder")));
    match fault {
        Some((key, error)) => LoadError::new(path, key, error.to_string()),
        None => LoadError::new(path, "", error),
    }
}

fn fault_in<T: serde::de::DeserializeOwned>(
    key: &'static str,
    value: Option<Value>,
) -> Option<(&'static str, serde_json::Error)> {
    serde_json::from_value::<T>(value?)
        .err()
        .map(|error| (key, error))
}

fn load_template(
    dir: &Path,
    config_path: &Path,
    config: &Map<String, Value>,
    special: SpecialTokens,
) -> Result<Option<Template>, LoadError> {
    let path = dir.join("chat_template.jinja");
    let file = read_optional(&path, MAX_TEMPLATE_BYTES)?;
    let (file, key, source) = if let Some(source) = file {
        (path.as_path(), "", source)
    } else if let Some(source) = inline_template(config_path, config)? {
        (config_path, "chat_template", source)
    } else {
        return Ok(None);
    };
    if source.len() as u64 > MAX_TEMPLATE_BYTES {
        let reason = format!(
            "has {} bytes; at most {MAX_TEMPLATE_BYTES} are taken",
            source.len()
        );
        return Err(LoadError::new(file, key, reason));
    }
    Template::new(source, special)
        .map(Some)
        .map_err(|reason| LoadError::new(file, key, reason))
}

/// Ids of `generation_config.json`, or without them of `config.json`, and the tokeniser's own
/// `eos_token`: fine-tuned checkpoints often change only one of them.
fn eos_ids(
    dir: &Path,
    config_path: &Path,
    eos_token: Option<&str>,
    vocabulary: &Vocabulary,
) -> Result<Arc<[u32]>, LoadError> {
    const KEY: &str = "eos_token_id";
    let mut ids = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        ids = token_ids(&path, &read_object(&path)?, KEY)?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary.len()) {
            let reason = format!(
                "token {id} is not in the vocabulary of {}",
                vocabulary.len()
            );
            return Err(LoadError::new(&path, KEY, reason));
        }
        if !ids.is_empty() {
            break;
        }
    }
    if let Some(token) = eos_token {
        let id = vocabulary.tokenizer().token_to_id(token).ok_or_else(|| {
            LoadError::new(
                config_path,
                "eos_token",
                format!("{token:?} is not in the vocabulary"),
            )
        })?;
        ids.push(id);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids.into())
}
