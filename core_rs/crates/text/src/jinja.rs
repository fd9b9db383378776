//! The environment that transformers gives chat templates: syntax, limits, functions, filters, Python's methods.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
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

/// Source of the error that `raise_exception` makes, so that it is told from all others.
#[derive(Debug, ThisError)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// An environment without templates.
pub(crate) fn environment() -> Result<Environment<'static>, Error> {
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
pub(crate) fn without_generation_tags(source: String) -> String {
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
