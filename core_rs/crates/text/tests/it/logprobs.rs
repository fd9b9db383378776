//! Log probabilities in both shapes.

use helix_text::openai::{FinishReason, Kind, Options, Piece, Renderer, TokenLogprob, Usage};
use serde_json::{Value, json};

use crate::chunks::{events, head, options};

fn token(id: u32, bytes: &[u8], logprob: Option<f32>, top: &[(&[u8], f32)]) -> TokenLogprob {
    let top = top
        .iter()
        .map(|(bytes, value)| (bytes.to_vec(), *value))
        .collect();
    TokenLogprob {
        id,
        bytes: bytes.to_vec(),
        logprob,
        top,
    }
}

/// Renders pieces of choice 0.
fn render(options: Options, pieces: &[(&str, Vec<TokenLogprob>)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&head(), options);
    for (text, logprobs) in pieces {
        renderer.piece(
            &Piece {
                choice: 0,
                text,
                logprobs,
            },
            &mut out,
        );
    }
    renderer.finish(0, FinishReason::Stop, &mut out);
    renderer.end(&Usage::default(), &mut out);
    out
}

fn with_logprobs(kind: Kind, stream: bool) -> Options {
    Options {
        logprobs: true,
        ..options(kind, stream)
    }
}

fn pieces() -> Vec<(&'static str, Vec<TokenLogprob>)> {
    vec![
        (
            "a",
            vec![token(5, b"a", Some(-0.5), &[(b"a", -0.5), (b"\"", -1.25)])],
        ),
        // Half of an u with umlaut: no text yet, but its probability is known.
        ("", vec![token(6, &[0xC3], Some(f32::NEG_INFINITY), &[])]),
        (
            "ü!",
            vec![
                token(7, &[0xBC], Some(-2.0), &[]),
                token(8, b"!", Some(-0.1), &[(b"?", -0.05)]),
            ],
        ),
    ]
}

fn entry(token: &str, logprob: f64, bytes: &[u8]) -> Value {
    json!({"token": token, "logprob": logprob, "bytes": bytes, "top_logprobs": []})
}

fn chat_entries() -> Vec<Value> {
    let mut first = entry("a", -0.5, b"a");
    first["top_logprobs"] = json!([{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "\"", "logprob": -1.25, "bytes": [34]}]);
    let mut last = entry("!", -0.1, b"!");
    last["top_logprobs"] = json!([{"token": "?", "logprob": -0.05, "bytes": [63]}]);
    vec![
        first,
        entry("\\xc3", -9999.0, &[0xC3]),
        entry("\\xbc", -2.0, &[0xBC]),
        last,
    ]
}

#[test]
fn of_a_chat_stream_and_body() {
    let events = events(&render(with_logprobs(Kind::Chat, true), &pieces()));
    let mut found = Vec::new();
    let mut content = String::new();
    for event in &events {
        let choice = &event["choices"][0];
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        if let Some(entries) = choice["logprobs"]["content"].as_array() {
            assert_eq!(choice["logprobs"]["refusal"], Value::Null);
            found.extend(entries.clone());
        }
    }
    assert_eq!((content.as_str(), events.len()), ("aü!", 5));
    assert_eq!(found, chat_entries());

    let body: Value =
        serde_json::from_slice(&render(with_logprobs(Kind::Chat, false), &pieces())).unwrap();
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({"content": chat_entries(), "refusal": null})
    );
    assert_eq!(body["choices"][0]["message"]["content"], "aü!");
}

#[test]
fn of_a_completion_stream_and_body() {
    let expected = json!({
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xbc", "!"],
        "token_logprobs": [-0.5, -9999.0, -2.0, -0.1],
        "top_logprobs": [{"a": -0.5, "\"": -1.25}, {"bytes:\\xc3": -9999.0}, {"bytes:\\xbc": -2.0}, {"?": -0.05, "!": -0.1}],
        "text_offset": [0, 1, 1, 2],
    });
    let body: Value =
        serde_json::from_slice(&render(with_logprobs(Kind::Completion, false), &pieces())).unwrap();
    assert_eq!(body["choices"][0]["logprobs"], expected);

    let mut joined =
        json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
    for event in events(&render(with_logprobs(Kind::Completion, true), &pieces())) {
        for (key, list) in joined.as_object_mut().unwrap() {
            let part = event["choices"][0]["logprobs"][key]
                .as_array()
                .cloned()
                .unwrap_or_default();
            list.as_array_mut().unwrap().extend(part);
        }
    }
    assert_eq!(joined, expected);
}

#[test]
fn of_an_echoed_prompt_begin_with_null() {
    let pieces = vec![
        (
            "to be",
            vec![
                token(1, b"to", None, &[]),
                token(2, b" be", Some(-3.0), &[(b" do", -1.0)]),
            ],
        ),
        (
            " or",
            vec![token(3, b" or", Some(-0.25), &[(b" or", -0.25)])],
        ),
    ];
    let body: Value =
        serde_json::from_slice(&render(with_logprobs(Kind::Completion, false), &pieces)).unwrap();
    let expected = json!({
        "tokens": ["to", " be", " or"],
        "token_logprobs": [null, -3.0, -0.25],
        "top_logprobs": [null, {" do": -1.0, " be": -3.0}, {" or": -0.25}],
        "text_offset": [0, 2, 5],
    });
    assert_eq!(body["choices"][0]["logprobs"], expected);
    assert_eq!(body["choices"][0]["text"], "to be or");
}

#[test]
fn are_left_out_when_not_asked_for() {
    for (kind, stream) in [
        (Kind::Chat, true),
        (Kind::Completion, true),
        (Kind::Chat, false),
        (Kind::Completion, false),
    ] {
        let out = render(options(kind, stream), &pieces());
        let values = if stream {
            events(&out)
        } else {
            vec![serde_json::from_slice(&out).unwrap()]
        };
        assert!(
            values
                .iter()
                .all(|value| value["choices"][0]["logprobs"].is_null())
        );
    }
}

#[test]
fn keep_one_value_per_name_in_a_map() {
    let tokens = vec![token(1, b"x", Some(-4.0), &[(b"x", -1.0), (b"y", -2.0)])];
    let out = render(with_logprobs(Kind::Completion, false), &[("x", tokens)]);
    let text = String::from_utf8(out).unwrap();
    assert!(
        text.contains(r#""top_logprobs":[{"x":-1.0,"y":-2.0}]"#),
        "{text}"
    );
}

#[test]
fn an_empty_answer_has_empty_lists() {
    let body: Value =
        serde_json::from_slice(&render(with_logprobs(Kind::Chat, false), &[])).unwrap();
    assert_eq!(body["choices"][0]["logprobs"]["content"], json!([]));
    let body: Value =
        serde_json::from_slice(&render(with_logprobs(Kind::Completion, false), &[])).unwrap();
    assert_eq!(body["choices"][0]["logprobs"]["tokens"], json!([]));
}
