//! The small files of a checkpoint: which tokens are special, which end a text, which template.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::{Map, Value};
use thiserror::Error;

/// Largest tokenizer.json that is read. The largest one in use has about 35 MB, and loading takes ten times as much.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Largest chat template. Those in use stay below 100 KB; compiling takes a hundred times as much.
pub(crate) const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Largest file of settings. A `tokenizer_config.json` with thousands of added tokens has 2 MB.
const MAX_SETTINGS_BYTES: u64 = 16 << 20;

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

/// Reads a file that may be absent: a regular one, in its own folder, of at most `limit` bytes.
///
/// A checkpoint may come from a stranger: a link to a file elsewhere would hand out what this account may read, and a
/// device or a pipe has no end.
pub(crate) fn read_optional(path: &Path, limit: u64) -> Result<Option<String>, LoadError> {
    let failed =
        |error: &std::io::Error| LoadError::new(path, "", format!("cannot be read: {error}"));
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => return Ok(None),
        Err(error) => return Err(failed(&error)),
    };
    if !meta.is_file() {
        return Err(LoadError::new(path, "", "is not a regular file"));
    }
    if !is_contained(path).map_err(|error| failed(&error))? {
        let reason =
            "is a link that leads out of the model's folder; put a copy of the file in its place";
        return Err(LoadError::new(path, "", reason));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| failed(&error))?;
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| failed(&error))?;
    if bytes.len() as u64 > limit {
        let reason = format!("is larger than {limit} bytes, more than a file of this kind has");
        return Err(LoadError::new(path, "", reason));
    }
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| LoadError::new(path, "", "is not UTF-8; the file is damaged"))
}

/// Whether a file lies in its folder, or, in a snapshot of a Hugging Face cache, in the `blobs` of the repository.
fn is_contained(path: &Path) -> std::io::Result<bool> {
    let target = path.canonicalize()?;
    let Some(folder) = path.parent() else {
        return Ok(false);
    };
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    }
    .canonicalize()?;
    let blobs = folder
        .parent()
        .filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))
        .and_then(|snapshots| snapshots.parent())
        .map(|repository| repository.join("blobs"));
    Ok(target.starts_with(&folder)
        || blobs.is_some_and(|blobs| target.parent() == Some(blobs.as_path())))
}

/// Parses a JSON object; an absent file is an empty one.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, LoadError> {
    let Some(text) = read_optional(path, MAX_SETTINGS_BYTES)? else {
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
