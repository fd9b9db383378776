//! Prompts to token ids. Long ones are tokenised on a thread of their own.

use std::sync::Arc;

use helix_text::{Chat, EncodeError, Message, TemplateValue, TextModel, ToolCall};
use helix_wire::error::{Code, CoreError};
use helix_wire::v1::{self, Input, input::Kind};
use tokio::sync::Semaphore;

/// About a millisecond of tokenising; more would hold up other calls of the I/O thread.
const INLINE_BYTES: usize = 8 * 1024;

/// Token ids of each input, and the name of the request parameter it came in.
///
/// Ends early with an input of more than `longest` tokens, which is the last one then: the caller refuses it,
/// and the others need no work any more.
pub(crate) async fn encode_all(
    text: &TextModel,
    threads: &Arc<Semaphore>,
    inputs: Vec<Input>,
    add_special: bool,
    longest: usize,
) -> Result<Vec<Encoded>, CoreError> {
    let bytes: usize = inputs.iter().map(size).sum();
    if bytes <= INLINE_BYTES {
        return encode_each(text, inputs, add_special, longest);
    }
    let failed = |error: &dyn std::fmt::Display| {
        CoreError::new(
            Code::Internal,
            format!("the tokeniser thread ended unexpectedly: {error}"),
        )
    };
    let permit = Arc::clone(threads)
        .acquire_owned()
        .await
        .map_err(|error| failed(&error))?;
    let text = text.clone();
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        encode_each(&text, inputs, add_special, longest)
    });
    work.await.map_err(|error| failed(&error))?
}

fn encode_each(
    text: &TextModel,
    inputs: Vec<Input>,
    add_special: bool,
    longest: usize,
) -> Result<Vec<Encoded>, CoreError> {
    let mut all = Vec::with_capacity(inputs.len());
    for input in inputs {
        let encoded = encode(text, input, add_special)?;
        let hopeless = encoded.ids.len() > longest;
        all.push(encoded);
        if hopeless {
            break;
        }
    }
    Ok(all)
}

/// A tokenised input.
pub(crate) struct Encoded {
    pub(crate) ids: Arc<[u32]>,
    /// `messages` or `prompt`.
    pub(crate) param: &'static str,
    /// The text as it was given.
    pub(crate) text: Option<String>,
}

fn size(input: &Input) -> usize {
    match &input.kind {
        Some(Kind::Chat(chat)) => chat
            .messages
            .iter()
            .map(|message| {
                let calls = message.tool_calls.iter();
                let calls: usize = calls.map(|call| call.arguments.len() + 64).sum();
                message.content.len() + calls + 32
            })
            .sum(),
        Some(Kind::Text(text)) => text.len(),
        Some(Kind::Tokens(_)) | None => 0,
    }
}

fn encode(text: &TextModel, input: Input, add_special: bool) -> Result<Encoded, CoreError> {
    match input.kind {
        Some(Kind::Chat(chat)) => {
            let ids = encode_chat(text, chat)?;
            Ok(Encoded {
                ids: ids.into(),
                param: "messages",
                text: None,
            })
        }
        Some(Kind::Text(prompt)) => {
            let ids = text
                .encode(&prompt, add_special)
                .map_err(|error| refused(&error, "prompt"))?;
            Ok(Encoded {
                ids: ids.into(),
                param: "prompt",
                text: Some(prompt),
            })
        }
        Some(Kind::Tokens(tokens)) => Ok(Encoded {
            ids: tokens.ids.into(),
            param: "prompt",
            text: None,
        }),
        None => Err(CoreError::invalid(
            "prompt",
            "a prompt is empty; send a chat, a text or token ids",
        )),
    }
}

fn encode_chat(text: &TextModel, chat: v1::Chat) -> Result<Vec<u32>, CoreError> {
    let calls: Vec<Vec<ToolCall<'_>>> = chat
        .messages
        .iter()
        .map(|message| message.tool_calls.iter().map(tool_call).collect())
        .collect();
    let messages: Vec<Message<'_>> = chat
        .messages
        .iter()
        .zip(&calls)
        .map(|(message, calls)| Message {
            role: &message.role,
            content: &message.content,
            name: message.name.as_deref(),
            reasoning: message.reasoning.as_deref(),
            tool_calls: calls,
            tool_call_id: message.tool_call_id.as_deref(),
        })
        .collect();
    let variables: Vec<(String, TemplateValue)> = chat
        .variables
        .into_iter()
        .map(|variable| (variable.name, value(variable.value)))
        .collect();
    let chat = Chat {
        messages: &messages,
        add_generation_prompt: chat.add_generation_prompt,
        continue_final_message: chat.continue_final_message,
        variables: &variables,
    };
    text.encode_chat(&chat)
        .map_err(|error| refused(&error, "messages"))
}

fn tool_call(call: &v1::ToolCall) -> ToolCall<'_> {
    ToolCall {
        id: &call.id,
        name: &call.name,
        arguments: &call.arguments,
    }
}

fn value(value: Option<v1::Value>) -> TemplateValue {
    use v1::value::Kind;
    match value.and_then(|value| value.kind) {
        None => TemplateValue::from(()),
        Some(Kind::Flag(flag)) => flag.into(),
        Some(Kind::Integer(number)) => number.into(),
        Some(Kind::Number(number)) => number.into(),
        Some(Kind::Text(text)) => text.into(),
        Some(Kind::List(list)) => {
            let values = list.values.into_iter().map(|item| self::value(Some(item)));
            values.collect::<Vec<_>>().into()
        }
        Some(Kind::Map(map)) => {
            let entries = map.entries.into_iter();
            TemplateValue::from_pairs(entries.map(|entry| (entry.name, self::value(entry.value))))
        }
    }
}

fn refused(error: &EncodeError, param: &str) -> CoreError {
    match error {
        EncodeError::Template(error) if error.is_client_fault() => {
            CoreError::invalid(param, error.to_string())
        }
        EncodeError::Grows => CoreError::invalid(param, error.to_string()),
        _ => CoreError::new(Code::Internal, error.to_string()).with_param(param),
    }
}
