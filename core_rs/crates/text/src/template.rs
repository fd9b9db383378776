//! Chat templates, with the environment that transformers gives them.

use std::error::Error as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use thiserror::Error as ThisError;
use time::OffsetDateTime;
use time::format_description::parse_strftime_owned;

use crate::python_json;

/// Work that one rendering may do: instructions plus 64-byte blocks of data. Rendering two
/// thousand messages costs about a twentieth of it; a template that loops stops within a second.
const FUEL: u64 = 4_000_000;
/// Nesting of macros and loops; real templates stay below 10.
const RECURSION: usize = 200;
const NAME: &str = "chat_template";

/// One message of a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// `system`, `developer`, `user` or `assistant`; the template decides what it takes.
    pub role: &'a str,
    /// Text of the message.
    pub content: &'a str,
    /// Name of the participant.
    pub name: Option<&'a str>,
}

/// Why a chat could not be rendered.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum TemplateError {
    /// The checkpoint has no chat template.
    #[error(
        "this model has no chat template; use /v1/completions, or add chat_template.jinja to its folder"
    )]
    Missing,
    /// The template refused the messages (`raise_exception`); the message is the template's own.
    #[error("the model's chat template refused the messages: {0}")]
    Refused(String),
    /// The template needs more work than one request may cause.
    #[error(
        "the model's chat template needs too much work for these messages; send fewer or shorter ones"
    )]
    TooMuchWork,
    /// The template itself is at fault.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
}

impl TemplateError {
    /// Whether the request is at fault (an HTTP 400), not the checkpoint.
    pub fn is_client_fault(&self) -> bool {
        !matches!(self, Self::Failed(_))
    }
}

/// Texts of the special tokens, as templates name them.
#[derive(Debug, Clone, Default)]
pub(crate) struct SpecialTokens {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
    pub(crate) unk: Option<String>,
    pub(crate) pad: Option<String>,
}

/// A compiled template.
pub(crate) struct Template {
    environment: Environment<'static>,
    special: SpecialTokens,
    knows_developer: bool,
}

/// Source of the error that `raise_exception` makes, so that it is told from all others.
#[derive(Debug, ThisError)]
#[error("{0}")]
struct Raised(String);

impl Template {
    /// Compiles a template; the error says what is wrong and where.
    pub(crate) fn new(source: String, special: SpecialTokens) -> Result<Self, String> {
        let knows_developer = source.contains("developer");
        let mut environment = environment().map_err(|error| error.to_string())?;
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| describe(&error))?;
        Ok(Self {
            environment,
            special,
            knows_developer,
        })
    }

    pub(crate) fn render(
        &self,
        messages: &[Message<'_>],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| self.value(*message))
            .collect();
        let token = |text: &Option<String>| text.as_deref().map_or(Value::UNDEFINED, Value::from);
        let values = context! {
            messages,
            add_generation_prompt,
            tools => (),
            documents => (),
            bos_token => token(&self.special.bos),
            eos_token => token(&self.special.eos),
            unk_token => token(&self.special.unk),
            pad_token => token(&self.special.pad),
        };
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| failure(&error))?;
        template.render(values).map_err(|error| failure(&error))
    }

    /// `developer` is the newer name of `system`; only templates that mention it get it.
    fn value(&self, mut message: Message<'_>) -> Value {
        if message.role == "developer" && !self.knows_developer {
            message.role = "system";
        }
        let name = message.name.map(|name| ("name", name));
        Value::from_pairs(
            [("role", message.role), ("content", message.content)]
                .into_iter()
                .chain(name),
        )
    }
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| {
        strftime(format, OffsetDateTime::now_utc())
    });
    environment.add_filter("tojson", tojson);
    Ok(environment)
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.to_string());
    Err(error.with_source(Raised(message.to_string())))
}

/// The date in UTC: a server's local zone is rarely the reader's.
fn strftime(format: &str, now: OffsetDateTime) -> Result<String, Error> {
    let invalid = |reason: String| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}): {reason}"),
        )
    };
    let items = parse_strftime_owned(format).map_err(|error| invalid(error.to_string()))?;
    now.format(&items)
        .map_err(|error| invalid(error.to_string()))
}

/// Python's methods on values: those of minijinja, and the two that newer templates use.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (Some(text), [affix]) = (value.as_str(), args)
        && let Some(affix) = affix.as_str()
    {
        match name {
            "removeprefix" => return Ok(text.strip_prefix(affix).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(affix).unwrap_or(text).into()),
            _ => {}
        }
    }
    unknown_method_callback(state, value, name, args)
}

/// `json.dumps` without ASCII and HTML escapes, as transformers defines the filter.
// minijinja passes filter arguments by value.
#[allow(clippy::needless_pass_by_value)]
fn tojson(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    let indent = match indent {
        Some(indent) if !indent.is_none() => Some(usize::try_from(indent)?),
        _ => None,
    };
    let sort_keys: bool = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    python_json::dumps(value, indent, sort_keys).map_err(|error| {
        Error::new(
            ErrorKind::BadSerialization,
            "tojson cannot write this value",
        )
        .with_source(error)
    })
}

/// `{% generation %}` marks an answer for training; for rendering it is transparent.
fn without_generation_tags(source: String) -> String {
    if !source.contains("generation") {
        return source;
    }
    let mut text = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + length];
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        text.push_str(&rest[..start + 2]);
        match word {
            "generation" => text.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => text.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => text.push_str(tag),
        }
        text.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    text.push_str(rest);
    text
}

fn failure(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(source) = cause {
        if let Some(Raised(message)) = source.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        if source
            .downcast_ref::<Error>()
            .is_some_and(|inner| inner.kind() == ErrorKind::OutOfFuel)
        {
            return TemplateError::TooMuchWork;
        }
        cause = source.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::TooMuchWork;
    }
    TemplateError::Failed(describe(error))
}

fn describe(error: &Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_string);
    match error.line() {
        Some(line) => format!("line {line}: {detail}"),
        None => detail,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn dates_follow_strftime() {
        let day = OffsetDateTime::from_unix_timestamp(1_767_225_599).unwrap();
        assert_eq!(strftime("%d %b %Y", day).unwrap(), "31 Dec 2025");
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %A", day).unwrap(),
            "2025-12-31 23:59:59 Wednesday"
        );
        assert_eq!(strftime("plain", day).unwrap(), "plain");
        assert!(strftime("%!", day).unwrap_err().to_string().contains("%!"));
    }

    #[test]
    fn generation_tags_are_transparent() {
        let source = "a{%- generation -%} b {%+ endgeneration %}c{% set x = 'generation' %}";
        let expected = "a{%- if true -%} b {%+ endif %}c{% set x = 'generation' %}";
        assert_eq!(without_generation_tags(source.into()), expected);
        assert_eq!(
            without_generation_tags("{% generation".into()),
            "{% generation"
        );
    }
}
