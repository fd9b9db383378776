//! Chat templates of checkpoints.

use std::collections::HashSet;
use std::error::Error as _;

use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use thiserror::Error as ThisError;

use crate::chat::{Chat, Message, Parsed, ToolCall, guarded};
use crate::control::{Control, Guard};
use crate::jinja::{Raised, environment, without_generation_tags};

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
