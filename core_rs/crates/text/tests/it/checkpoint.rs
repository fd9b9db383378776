//! Checkpoint folders for tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use helix_text::{LoadError, TextModel};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The golden checkpoints.
pub(crate) const GOLDEN: [&str; 4] = ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny"];

/// Folder of a golden checkpoint.
pub(crate) fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../tests/fixtures/golden")
        .join(name)
}

/// A golden checkpoint, loaded once.
pub(crate) fn golden(name: &str) -> &'static TextModel {
    static MODELS: OnceLock<Vec<TextModel>> = OnceLock::new();
    let load = || {
        GOLDEN
            .iter()
            .map(|name| TextModel::load(&golden_dir(name)).unwrap())
            .collect()
    };
    let at = GOLDEN.iter().position(|known| *known == name).unwrap();
    &MODELS.get_or_init(load)[at]
}

/// A tokenizer.json with whole words as tokens.
pub(crate) fn words(tokens: &[&str], special: &[&str], decoder: &Value) -> Value {
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_string(), json!(id)))
        .collect();
    let added: Vec<Value> = special
        .iter()
        .map(|token| {
            json!({"id": vocab[*token], "content": token, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]},
    })
}

/// A checkpoint folder under construction.
pub(crate) struct Checkpoint(TempDir);

impl Checkpoint {
    /// A folder with this tokenizer.json.
    pub(crate) fn new(tokenizer: &Value) -> Self {
        let folder = Self(TempDir::new().unwrap());
        folder.with("tokenizer.json", &tokenizer.to_string())
    }

    /// A folder with a small tokeniser: `<unk> <s> </s> hello world`.
    pub(crate) fn small() -> Self {
        let tokens = ["<unk>", "<s>", "</s>", "hello", "world"];
        Self::new(&words(&tokens, &tokens[..3], &json!({"type": "Fuse"})))
    }

    /// Adds a file.
    pub(crate) fn with(self, name: &str, text: &str) -> Self {
        fs::write(self.0.path().join(name), text).unwrap();
        self
    }

    /// Removes a file.
    pub(crate) fn without(self, name: &str) -> Self {
        fs::remove_file(self.0.path().join(name)).unwrap();
        self
    }

    pub(crate) fn load(&self) -> Result<TextModel, LoadError> {
        TextModel::load(self.0.path())
    }

    /// The error of loading it: file name, key, reason.
    pub(crate) fn error(&self) -> (String, String, String) {
        let Err(error) = self.load() else {
            panic!("loading should fail")
        };
        let file = Path::new(&error.file)
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_string();
        assert!(error.to_string().contains(&error.file));
        (file, error.key, error.reason)
    }
}
