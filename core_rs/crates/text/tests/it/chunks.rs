//! Streams and bodies, read back with a JSON parser.

use helix_text::openai::{
    ErrorObject, FinishReason, Head, Kind, Options, Piece, Renderer, Usage, detokenize_body,
    error_body, tokenize_body,
};
use proptest::prelude::*;
use serde_json::{Value, json};

pub(crate) fn head() -> Head {
    Head {
        id: "chatcmpl-\"1\"".into(),
        created: 1_700_000_000,
        model: "demo\\model".into(),
        system_fingerprint: Some("fp_1".into()),
    }
}

pub(crate) fn options(kind: Kind, stream: bool) -> Options {
    Options {
        kind,
        stream,
        choices: 1,
        logprobs: false,
        include_usage: false,
    }
}

/// Payloads of the events of a stream; checks the framing and that `[DONE]` is last, once.
pub(crate) fn events(bytes: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(bytes).unwrap();
    let mut events: Vec<&str> = text.split("\n\n").collect();
    assert_eq!(events.pop(), Some(""));
    assert_eq!(events.pop(), Some("data: [DONE]"));
    events
        .iter()
        .map(|event| {
            let data = event.strip_prefix("data: ").unwrap();
            assert_eq!(data.lines().count(), 1);
            assert!(!data.contains(['\u{85}', '\u{2028}', '\u{2029}', '\r', '\n']));
            serde_json::from_str(data).unwrap()
        })
        .collect()
}

pub(crate) fn text(choice: u32, text: &str) -> Piece<'_> {
    Piece {
        choice,
        text,
        logprobs: &[],
    }
}

const USAGE: Usage = Usage {
    prompt_tokens: 7,
    completion_tokens: 3,
    cached_tokens: 4,
};

fn usage() -> Value {
    json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
           "prompt_tokens_details": {"cached_tokens": 4}})
}

#[test]
fn a_chat_stream_has_role_content_finish_and_done() {
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&head(), options(Kind::Chat, true));
    assert!(!renderer.is_started() && renderer.content_type().starts_with("text/event-stream"));
    for piece in ["Hel", "", "lo"] {
        renderer.piece(&text(0, piece), &mut out);
    }
    assert!(renderer.is_started() && !renderer.is_done());
    renderer.finish(0, FinishReason::Stop, &mut out);
    renderer.end(&USAGE, &mut out);
    assert!(renderer.is_done());
    let written = out.len();
    renderer.piece(&text(0, "late"), &mut out);
    renderer.end(&USAGE, &mut out);
    assert_eq!(out.len(), written);

    let expect = |delta: Value, reason: Value| {
        json!({"id": "chatcmpl-\"1\"", "object": "chat.completion.chunk", "created": 1_700_000_000,
               "model": "demo\\model", "system_fingerprint": "fp_1",
               "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]})
    };
    let expected = [
        expect(json!({"role": "assistant", "content": ""}), Value::Null),
        expect(json!({"content": "Hel"}), Value::Null),
        expect(json!({"content": "lo"}), Value::Null),
        expect(json!({}), json!("stop")),
    ];
    assert_eq!(events(&out), expected);
}

#[test]
fn usage_comes_in_a_last_chunk_and_is_null_before() {
    for kind in [Kind::Chat, Kind::Completion] {
        let mut out = Vec::new();
        let mut renderer = Renderer::new(
            &head(),
            Options {
                include_usage: true,
                ..options(kind, true)
            },
        );
        renderer.piece(&text(0, "x"), &mut out);
        renderer.finish(0, FinishReason::Length, &mut out);
        renderer.end(&USAGE, &mut out);
        let mut events = events(&out);
        let last = events.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage()));
        assert!(events.len() >= 2);
        for event in events {
            assert_eq!(event.get("usage"), Some(&Value::Null));
        }
    }
}

#[test]
fn a_completion_stream_has_text() {
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&head(), options(Kind::Completion, true));
    renderer.piece(&text(0, "a"), &mut out);
    renderer.finish(0, FinishReason::Length, &mut out);
    renderer.end(&USAGE, &mut out);
    let events = events(&out);
    assert_eq!(events.len(), 2);
    assert_eq!(events[0]["object"], "text_completion");
    let choice = |text: &str, reason: Value| json!([{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]);
    assert_eq!(events[0]["choices"], choice("a", Value::Null));
    assert_eq!(events[1]["choices"], choice("", json!("length")));
    assert!(events[0].get("usage").is_none());
}

#[test]
fn choices_of_a_stream_are_told_apart() {
    let mut out = Vec::new();
    let mut renderer = Renderer::new(
        &head(),
        Options {
            choices: 3,
            ..options(Kind::Chat, true)
        },
    );
    renderer.piece(&text(2, "c"), &mut out);
    renderer.piece(&text(0, "a"), &mut out);
    renderer.piece(&text(2, "C"), &mut out);
    renderer.finish(1, FinishReason::Stop, &mut out);
    renderer.finish(2, FinishReason::Length, &mut out);
    // What comes for a choice that is finished or does not exist is dropped.
    renderer.piece(&text(2, "late"), &mut out);
    renderer.finish(2, FinishReason::Stop, &mut out);
    renderer.piece(&text(3, "nobody"), &mut out);
    renderer.finish(0, FinishReason::Stop, &mut out);
    renderer.end(&USAGE, &mut out);
    let mut seen = [String::new(), String::new(), String::new()];
    let mut roles = [0; 3];
    let mut reasons = [const { Vec::new() }; 3];
    for event in events(&out) {
        let choice = &event["choices"][0];
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        roles[index] += usize::from(choice["delta"]["role"] == "assistant");
        seen[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        reasons[index].extend(choice["finish_reason"].as_str().map(str::to_string));
    }
    assert_eq!(seen, ["a", "", "cC"]);
    assert_eq!(roles, [1, 1, 1]);
    assert_eq!(reasons, [["stop"], ["stop"], ["length"]]);
}

#[test]
fn a_chat_body_sorts_its_choices() {
    let mut out = Vec::new();
    let mut renderer = Renderer::new(
        &head(),
        Options {
            choices: 2,
            ..options(Kind::Chat, false)
        },
    );
    renderer.piece(&text(1, "B"), &mut out);
    renderer.piece(&text(0, "a"), &mut out);
    renderer.piece(&text(0, "\n\"b\""), &mut out);
    renderer.finish(1, FinishReason::Length, &mut out);
    renderer.piece(&text(1, "late"), &mut out);
    renderer.finish(0, FinishReason::Stop, &mut out);
    assert!(out.is_empty() && !renderer.is_started());
    renderer.end(&USAGE, &mut out);
    let choice = |index: u32, content: &str, reason: &str| {
        json!({"index": index, "message": {"role": "assistant", "content": content, "refusal": null},
               "logprobs": null, "finish_reason": reason})
    };
    let expected = json!({
        "id": "chatcmpl-\"1\"", "object": "chat.completion", "created": 1_700_000_000, "model": "demo\\model",
        "system_fingerprint": "fp_1",
        "choices": [choice(0, "a\n\"b\"", "stop"), choice(1, "B", "length")], "usage": usage(),
    });
    assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), expected);
    assert_eq!(renderer.content_type(), "application/json");
}

#[test]
fn a_completion_body_keeps_prompts_and_choices_in_order() {
    let mut out = Vec::new();
    let head = Head {
        system_fingerprint: None,
        ..head()
    };
    let mut renderer = Renderer::new(
        &head,
        Options {
            choices: 4,
            ..options(Kind::Completion, false)
        },
    );
    for index in [3, 1, 0, 2] {
        renderer.piece(&text(index, &format!("t{index}")), &mut out);
        renderer.finish(index, FinishReason::Stop, &mut out);
    }
    renderer.end(&USAGE, &mut out);
    let body: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(
        (&body["object"], &body["system_fingerprint"]),
        (&json!("text_completion"), &Value::Null)
    );
    for (index, choice) in body["choices"].as_array().unwrap().iter().enumerate() {
        let expected = json!({"index": index, "text": format!("t{index}"), "logprobs": null, "finish_reason": "stop"});
        assert_eq!(choice, &expected);
    }
}

#[test]
fn errors_travel_as_an_event_or_as_the_body() {
    let error = ErrorObject {
        message: "the \"engine\" failed\n",
        kind: "server_error",
        param: None,
        code: Some("engine_failed"),
    };
    let expected = json!({"error": {"message": "the \"engine\" failed\n", "type": "server_error", "param": null, "code": "engine_failed"}});
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&head(), options(Kind::Chat, true));
    renderer.piece(&text(0, "half"), &mut out);
    renderer.error(&error, &mut out);
    renderer.finish(0, FinishReason::Stop, &mut out);
    renderer.end(&USAGE, &mut out);
    let events = events(&out);
    assert_eq!(events.last(), Some(&expected));
    assert!(
        events
            .iter()
            .all(|event| event["choices"][0]["finish_reason"].is_null())
    );

    let mut out = Vec::new();
    let mut renderer = Renderer::new(&head(), options(Kind::Chat, false));
    renderer.piece(&text(0, "half"), &mut out);
    renderer.error(&error, &mut out);
    renderer.end(&USAGE, &mut out);
    assert!(renderer.is_done());
    assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), expected);

    let mut out = Vec::new();
    let error = ErrorObject {
        message: "m",
        kind: "invalid_request_error",
        param: Some("stop"),
        code: None,
    };
    error_body(&mut out, &error);
    let expected = json!({"error": {"message": "m", "type": "invalid_request_error", "param": "stop", "code": null}});
    assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), expected);
}

#[test]
fn tokenize_and_detokenize_bodies() {
    let mut out = Vec::new();
    tokenize_body(&mut out, &[1, 22, u32::MAX], 512);
    assert_eq!(
        out,
        br#"{"count":3,"max_model_len":512,"tokens":[1,22,4294967295]}"#
    );
    out.clear();
    tokenize_body(&mut out, &[], 8);
    assert_eq!(out, br#"{"count":0,"max_model_len":8,"tokens":[]}"#);
    out.clear();
    detokenize_body(&mut out, "a\tü\u{2028}");
    assert_eq!(out, "{\"prompt\":\"a\\tü\\u2028\"}".as_bytes());
}

#[test]
fn all_controls_and_separators_are_escaped() {
    let mut nasty: String = (0..=0x9F_u8).map(char::from).collect();
    nasty.push_str("\u{2028}\u{2029}\u{2030}\u{E9}\u{C2}â€\u{FFFD}\u{10FFFF}\"\\/");
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&head(), options(Kind::Chat, true));
    renderer.piece(&text(0, &nasty), &mut out);
    renderer.end(&USAGE, &mut out);
    assert_eq!(events(&out)[1]["choices"][0]["delta"]["content"], nasty);
}

proptest! {
    #[test]
    fn any_text_is_read_back(content in any::<String>(), extra in "[\u{0}-\u{1f}\"\\\\\u{80}-\u{a0}\u{2020}-\u{2030}]{0,20}") {
        let content = content + &extra;
        let mut out = Vec::new();
        let mut renderer = Renderer::new(&head(), options(Kind::Completion, true));
        renderer.piece(&text(0, &content), &mut out);
        renderer.finish(0, FinishReason::Stop, &mut out);
        renderer.end(&USAGE, &mut out);
        let events = events(&out);
        let found: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
        prop_assert_eq!(&found, &content);

        out.clear();
        detokenize_body(&mut out, &content);
        prop_assert_eq!(&serde_json::from_slice::<Value>(&out).unwrap()["prompt"], &content);
    }
}
