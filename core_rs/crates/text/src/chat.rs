//! A chat as it comes, and as a template sees it.

use minijinja::Value;
use minijinja::value::ValueKind;

use crate::control::Guard;

/// One message of a chat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message<'a> {
    /// `system`, `developer`, `user`, `assistant` or `tool`; the template decides what it takes.
    pub role: &'a str,
    /// Text of the message.
    pub content: &'a str,
    /// Name of the participant.
    pub name: Option<&'a str>,
    /// What an assistant thought before it answered.
    pub reasoning: Option<&'a str>,
    /// Tools that an assistant called.
    pub tool_calls: &'a [ToolCall<'a>],
    /// The call whose result a message of role `tool` is.
    pub tool_call_id: Option<&'a str>,
}

/// One call of a tool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ToolCall<'a> {
    /// Identifies the call within the chat.
    pub id: &'a str,
    /// Name of the tool.
    pub name: &'a str,
    /// Its arguments as the model wrote them: the text of a JSON object, if all went well.
    pub arguments: &'a str,
}

/// A chat to be rendered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chat<'a> {
    /// The messages in their order.
    pub messages: &'a [Message<'a>],
    /// Whether the prompt ends with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends within the last message, for the model to go on with it.
    pub continue_final_message: bool,
    /// Further variables of the template.
    pub variables: &'a [(String, Value)],
}

impl<'a> Chat<'a> {
    /// A chat of messages alone.
    pub fn new(messages: &'a [Message<'a>], add_generation_prompt: bool) -> Self {
        Self {
            messages,
            add_generation_prompt,
            ..Self::default()
        }
    }

    /// How many messages at the start are instructions.
    pub(crate) fn leading(&self) -> usize {
        let instructs = |message: &&Message<'_>| matches!(message.role, "system" | "developer");
        self.messages.iter().take_while(instructs).count()
    }
}

/// A chat whose JSON is read.
pub(crate) struct Parsed<'a> {
    pub(crate) chat: Chat<'a>,
    /// Arguments of each call, in the order of messages and calls; undefined where they are no JSON.
    arguments: Vec<Value>,
}

impl<'a> Parsed<'a> {
    pub(crate) fn new(chat: &Chat<'a>) -> Self {
        let calls = chat
            .messages
            .iter()
            .flat_map(|message| message.tool_calls)
            .map(|call| serde_json::from_str(call.arguments).unwrap_or(Value::UNDEFINED));
        Self {
            chat: *chat,
            arguments: calls.collect(),
        }
    }

    /// Every text that a client wrote.
    pub(crate) fn visit(&self, see: &mut dyn FnMut(&str)) {
        for message in self.chat.messages {
            see(message.content);
            let others = [message.name, message.reasoning, message.tool_call_id];
            others.into_iter().flatten().for_each(&mut *see);
            for call in message.tool_calls {
                [call.id, call.name, call.arguments]
                    .into_iter()
                    .for_each(&mut *see);
            }
        }
        let variables = self.chat.variables.iter().map(|(_, value)| value);
        for value in self.arguments.iter().chain(variables) {
            visit_value(value, see);
        }
    }

    /// Whether it holds nothing but turns of people and assistants.
    pub(crate) fn is_plain(&self) -> bool {
        let results = self
            .chat
            .messages
            .iter()
            .any(|message| message.role == "tool");
        self.arguments.is_empty() && self.chat.variables.is_empty() && !results
    }

    /// The calls of each message as templates take them. `parsed`: arguments as mappings, not as text.
    pub(crate) fn calls(&self, parsed: bool, guard: &Guard<'_>) -> Vec<Vec<Value>> {
        let mut read = self.arguments.iter();
        let messages = self.chat.messages.iter();
        messages
            .map(|message| {
                let calls = message.tool_calls.iter().zip(read.by_ref());
                calls
                    .map(|(call, value)| {
                        let arguments = if parsed && value.kind() == ValueKind::Map {
                            guarded(value, guard)
                        } else {
                            guard.value(call.arguments)
                        };
                        let function = Value::from_pairs([
                            ("name", guard.value(call.name)),
                            ("arguments", arguments),
                        ]);
                        Value::from_pairs([
                            ("id", guard.value(call.id)),
                            ("type", Value::from("function")),
                            ("function", function),
                        ])
                    })
                    .collect()
            })
            .collect()
    }
}

fn visit_value(value: &Value, see: &mut dyn FnMut(&str)) {
    if let Some(text) = value.as_str() {
        see(text);
        return;
    }
    let map = value.kind() == ValueKind::Map;
    if !map && value.kind() != ValueKind::Seq {
        return;
    }
    for item in value.try_iter().into_iter().flatten() {
        visit_value(&item, see);
        if map && let Ok(inner) = value.get_item(&item) {
            visit_value(&inner, see);
        }
    }
}

/// A value whose texts, keys included, went through the guard.
pub(crate) fn guarded(value: &Value, guard: &Guard<'_>) -> Value {
    if let Some(text) = value.as_str() {
        return guard.value(text);
    }
    let items = value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Seq => items
            .map(|item| guarded(&item, guard))
            .collect::<Vec<_>>()
            .into(),
        ValueKind::Map => Value::from_pairs(items.map(|key| {
            let inner = value.get_item(&key).unwrap_or_default();
            (guarded(&key, guard), guarded(&inner, guard))
        })),
        _ => value.clone(),
    }
}
