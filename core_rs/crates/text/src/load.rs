//! The small files of a checkpoint: which tokens are special, which end a text, which template.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};
use thiserror::Error;

/// Largest file that is read. The largest tokenizer.json in use is about 35 MB.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// A checkpoint file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", self.describe())]
pub struct LoadError {
    /// Path of the file.
    pub file: String,
    /// Key inside the file that is at fault; empty when the file as a whole is.
    pub key: String,
    /// What is wrong, and where it helps, what to do.
    pub reason: String,
}

impl LoadError {
    pub(crate) fn new(file: &Path, key: &str, reason: impl Into<String>) -> Self {
        Self {
            file: file.display().to_string(),
            key: key.into(),
            reason: reason.into(),
        }
    }

    fn describe(&self) -> String {
        if self.key.is_empty() {
            format!("{}: {}", self.file, self.reason)
        } else {
            format!("{}: `{}`: {}", self.file, self.key, self.reason)
        }
    }
}

/// Reads a file that may be absent.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, LoadError> {
    let size = match fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::new(path, "", format!("cannot be read: {error}"))),
    };
    if size > MAX_FILE_BYTES {
        let reason = format!("has {size} bytes; at most {MAX_FILE_BYTES} are read");
        return Err(LoadError::new(path, "", reason));
    }
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::InvalidData => Err(LoadError::new(
            path,
            "",
            "is not UTF-8; the file is damaged",
        )),
        Err(error) => Err(LoadError::new(path, "", format!("cannot be read: {error}"))),
    }
}

/// Parses a JSON object; an absent file is an empty one.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, LoadError> {
    let Some(text) = read_optional(path)? else {
        return Ok(Map::new());
    };
    match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(LoadError::new(path, "", "is not a JSON object")),
        Err(error) => Err(LoadError::new(
            path,
            "",
            format!("is not valid JSON: {error}"),
        )),
    }
}

/// A special token of `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn token_text(
    path: &Path,
    config: &Map<String, Value>,
    key: &str,
) -> Result<Option<String>, LoadError> {
    let value = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(token)) => token.get("content"),
        other => other,
    };
    match value {
        Some(Value::String(text)) => Ok(Some(text.clone())),
        _ => Err(LoadError::new(
            path,
            key,
            "must be a string, or an object with a string `content`",
        )),
    }
}

/// Token ids under a key: an integer or a list of integers. Absent and null give none.
pub(crate) fn token_ids(
    path: &Path,
    config: &Map<String, Value>,
    key: &str,
) -> Result<Vec<u32>, LoadError> {
    let one = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| {
                LoadError::new(
                    path,
                    key,
                    format!("must be a token id or a list of token ids, found {value}"),
                )
            })
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

/// The template of `tokenizer_config.json`: a string, or a list of `{name, template}`, of
/// which the one named `default` is taken.
pub(crate) fn inline_template(
    path: &Path,
    config: &Map<String, Value>,
) -> Result<Option<String>, LoadError> {
    const KEY: &str = "chat_template";
    match config.get(KEY) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(list)) => {
            let named =
                |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
            match list
                .iter()
                .find(named)
                .and_then(|entry| entry.get("template"))
            {
                Some(Value::String(text)) => Ok(Some(text.clone())),
                _ => Err(LoadError::new(
                    path,
                    KEY,
                    "is a list without a template named `default`",
                )),
            }
        }
        Some(_) => Err(LoadError::new(
            path,
            KEY,
            "must be a string or a list of {name, template}",
        )),
    }
}
