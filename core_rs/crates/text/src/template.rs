//! Chat templates, with the environment that transformers gives them.

use std::collections::HashSet;
use std::error::Error as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use thiserror::Error as ThisError;
use time::OffsetDateTime;
use time::format_description::parse_strftime_owned;

use crate::chat::{Chat, Message, Parsed, ToolCall, guarded};
use crate::control::{Control, Guard};
use crate::python_json;

/// Work that one rendering may do: instructions plus 64-byte blocks of data. Rendering two
/// thousand messages costs about a twentieth of it; a template that loops stops within a second.
const FUEL: u64 = 4_000_000;
/// Nesting of macros and loops; real templates stay below 10.
const RECURSION: usize = 200;
const NAME: &str = "chat_template";
/// What a template is given by us, or calls: no variable of a request takes its place.
const RESERVED: [&str; 17] = [
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "debug",
    "loop",
    "self",
];

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
    /// A message calls a tool or brings its result, which the template does not know.
    #[error(
        "messages[{0}]: the model's chat template knows no tools; leave calls and results of tools out"
    )]
    NoTools(usize),
    /// A variable of a request has a name that is taken, or none.
    #[error("chat_template_kwargs.{0}: is not the name of a variable that a request may set")]
    Reserved(String),
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

/// A compiled template, and what it can do.
pub(crate) struct Template {
    environment: Environment<'static>,
    special: SpecialTokens,
    traits: Traits,
    /// Characters of the source that could be taken for bars.
    symbols: HashSet<char>,
}

/// What a template makes of a chat, found out by rendering some.
#[derive(Debug, Clone, Copy, Default)]
struct Traits {
    knows_developer: bool,
    /// Several messages of instructions at the start go in as one: the template refuses or forgets the second.
    merges_instructions: bool,
    tools: Tools,
    /// Messages of role `tool` are in the prompt.
    knows_results: bool,
}

/// How a template takes calls of tools and their results.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Tools {
    /// Not at all.
    #[default]
    Unknown,
    /// With arguments as a mapping.
    Mappings,
    /// With arguments as text.
    Texts,
}

/// What a rendering needs beside the chat.
pub(crate) struct Manner<'a> {
    /// How texts go in.
    pub(crate) guard: Guard<'a>,
    /// Stands behind the message that is to be continued.
    pub(crate) end: char,
}

impl Manner<'_> {
    /// Texts as they are.
    pub(crate) const OPEN: Self = Self {
        guard: Guard::Open,
        end: '\u{FDD0}',
    };
}

/// Source of the error that `raise_exception` makes, so that it is told from all others.
#[derive(Debug, ThisError)]
#[error("{0}")]
struct Raised(String);

impl Template {
    /// Compiles a template; the error says what is wrong and where.
    pub(crate) fn new(source: String, special: SpecialTokens) -> Result<Self, String> {
        let traits = Traits {
            knows_developer: source.contains("developer"),
            knows_results: true,
            ..Traits::default()
        };
        let symbols = source.chars().filter(|c| Control::is_bar(*c)).collect();
        let mut environment = environment().map_err(|error| error.to_string())?;
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| describe(&error))?;
        let mut template = Self {
            environment,
            special,
            traits,
            symbols,
        };
        template.traits.merges_instructions = template.loses_instructions();
        template.traits.tools = template.tool_form();
        Ok(template)
    }

    /// Variables of the template that a request may set, sorted.
    pub(crate) fn variables(&self) -> Vec<String> {
        let Ok(template) = self.environment.get_template(NAME) else {
            return Vec::new();
        };
        let mut names: Vec<String> = template
            .undeclared_variables(false)
            .into_iter()
            .filter(|name| is_free(name))
            .collect();
        names.sort_unstable();
        names
    }

    pub(crate) fn symbols(&self) -> &HashSet<char> {
        &self.symbols
    }

    /// The prompt text of a chat.
    pub(crate) fn render(
        &self,
        parsed: &Parsed<'_>,
        manner: &Manner<'_>,
    ) -> Result<String, TemplateError> {
        let chat = &parsed.chat;
        let unknown = |message: &Message<'_>| {
            let calls = !message.tool_calls.is_empty() && self.traits.tools == Tools::Unknown;
            calls || (message.role == "tool" && !self.traits.knows_results)
        };
        if let Some(index) = chat.messages.iter().position(unknown) {
            return Err(TemplateError::NoTools(index));
        }
        if let Some((name, _)) = chat.variables.iter().find(|(name, _)| !is_free(name)) {
            return Err(TemplateError::Reserved(name.chars().take(100).collect()));
        }
        let token = |text: &Option<String>| text.as_deref().map_or(Value::UNDEFINED, Value::from);
        let own = [
            ("messages", Value::from(self.messages(parsed, manner))),
            (
                "add_generation_prompt",
                Value::from(chat.add_generation_prompt),
            ),
            (
                "continue_final_message",
                Value::from(chat.continue_final_message),
            ),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("bos_token", token(&self.special.bos)),
            ("eos_token", token(&self.special.eos)),
            ("unk_token", token(&self.special.unk)),
            ("pad_token", token(&self.special.pad)),
        ];
        let further = chat.variables.iter();
        let further = further.map(|(name, value)| (name.as_str(), guarded(value, &manner.guard)));
        let values = Value::from_pairs(further.chain(own));
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| failure(&error))?;
        let text = template.render(values).map_err(|error| {
            let ours = parsed.is_plain();
            match failure(&error) {
                // A plain chat cannot make a template fail; values of a request can.
                TemplateError::Failed(reason) if !ours => TemplateError::Refused(reason),
                other => other,
            }
        })?;
        if chat.continue_final_message {
            return cut(text, manner.end);
        }
        Ok(text)
    }

    fn messages(&self, parsed: &Parsed<'_>, manner: &Manner<'_>) -> Vec<Value> {
        let messages = parsed.chat.messages;
        let guard = &manner.guard;
        let calls = parsed.calls(self.traits.tools == Tools::Mappings, guard);
        let last = messages.len().wrapping_sub(1);
        let mut values: Vec<Value> = Vec::with_capacity(messages.len());
        let mut merged = match parsed.chat.leading() {
            count if self.traits.merges_instructions && count > 1 => count,
            _ => 0,
        };
        if merged > 0 {
            let texts: Vec<_> = messages[..merged]
                .iter()
                .map(|message| guard.text(message.content))
                .collect();
            values.push(Value::from_pairs([
                ("role", Value::from("system")),
                ("content", Value::from(texts.join("\n\n"))),
            ]));
            // The message that is to be continued stays one of its own.
            merged = merged.min(messages.len());
        }
        for (index, (message, calls)) in messages.iter().zip(calls).enumerate().skip(merged) {
            let mut content = guard.text(message.content);
            if parsed.chat.continue_final_message && index == last {
                // White space behind the mark tells whether the template trims.
                content.to_mut().extend([manner.end, ' ']);
            }
            values.push(self.value(message, content.as_ref(), calls, guard));
        }
        values
    }

    /// `developer` is the newer name of `system`; only templates that mention it get it.
    fn value(
        &self,
        message: &Message<'_>,
        content: &str,
        calls: Vec<Value>,
        guard: &Guard<'_>,
    ) -> Value {
        let role = if message.role == "developer" && !self.traits.knows_developer {
            "system"
        } else {
            message.role
        };
        let further = [
            ("name", message.name),
            ("reasoning_content", message.reasoning),
            ("tool_call_id", message.tool_call_id),
        ];
        let further = further
            .into_iter()
            .filter_map(|(key, text)| Some((key, guard.value(text?))));
        let calls = (!calls.is_empty()).then(|| ("tool_calls", Value::from(calls)));
        let own = [("role", Value::from(role)), ("content", content.into())];
        Value::from_pairs(own.into_iter().chain(further).chain(calls))
    }

    /// Renders a chat as it is.
    pub(crate) fn try_out(
        &self,
        messages: &[Message<'_>],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let parsed = Parsed::new(&Chat::new(messages, add_generation_prompt));
        self.render(&parsed, &Manner::OPEN)
    }

    /// Whether a template takes one message of instructions at the start, but not two.
    fn loses_instructions(&self) -> bool {
        let [first, second] = ["helixprobefirst", "helixprobesecond"];
        let message = |role, content| Message {
            role,
            content,
            ..Message::default()
        };
        let user = message("user", "hello");
        let two = [message("system", first), message("developer", second), user];
        !self.shows(&two, &[first, second]) && self.shows(&[two[0], user], &[first])
    }

    /// How calls of tools and their results are taken: the first form in which all of them are in the prompt.
    fn tool_form(&mut self) -> Tools {
        let parts = ["helixprobetool", "helixprobevalue", "helixproberesult"];
        let arguments = format!("{{\"x\": \"{}\"}}", parts[1]);
        // Some templates want ids of nine letters or digits.
        let id = "helixprob";
        let calls = [ToolCall {
            id,
            name: parts[0],
            arguments: &arguments,
        }];
        let user = Message {
            role: "user",
            content: "hello",
            ..Message::default()
        };
        let call = Message {
            role: "assistant",
            tool_calls: &calls,
            ..Message::default()
        };
        let result = Message {
            role: "tool",
            content: parts[2],
            name: Some(parts[0]),
            tool_call_id: Some(id),
            ..Message::default()
        };
        for form in [Tools::Mappings, Tools::Texts] {
            self.traits.tools = form;
            if self.shows(&[user, call, result], &parts) {
                return form;
            }
        }
        // A template that fails here says itself what it refuses; one that is silent would forget results.
        let results = [user, result];
        self.traits.knows_results =
            self.try_out(&results, true).is_err() || self.shows(&results, &parts[2..]);
        Tools::Unknown
    }

    /// Whether these texts are in the prompt of a chat, in whatever case of letters.
    fn shows(&self, messages: &[Message<'_>], texts: &[&str]) -> bool {
        self.try_out(messages, true).is_ok_and(|prompt| {
            let prompt = prompt.to_ascii_lowercase();
            texts.iter().all(|text| prompt.contains(text))
        })
    }
}

/// Whether a request may give a variable of this name to a template.
fn is_free(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !RESERVED.contains(&name)
        && !name.is_empty()
        && name.len() <= 64
        && name.chars().all(plain)
        && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// The prompt up to the end of the message that is to be continued, as `apply_chat_template` of transformers cuts it.
fn cut(mut text: String, end: char) -> Result<String, TemplateError> {
    let Some(at) = text.rfind(end) else {
        return Err(TemplateError::Refused(
            "continue_final_message: the template does not write the last message at the end of the prompt".into(),
        ));
    };
    let trimmed = !text[at..].starts_with(&format!("{end} "));
    text.truncate(at);
    if trimmed {
        text.truncate(text.trim_end().len());
    }
    Ok(text.replace(end, ""))
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
