//! Checkpoints that load, and the errors of those that do not.

use helix_text::{Chat, EncodeError, Message, TemplateError};
use serde_json::json;

use crate::checkpoint::{Checkpoint, words};

const HELLO: [Message<'static>; 1] = [Message {
    role: "user",
    content: "hello",
    name: None,
    reasoning: None,
    tool_calls: &[],
    tool_call_id: None,
}];

#[test]
fn tokenizer_json_is_needed_and_blamed_by_key() {
    let (file, key, reason) = Checkpoint::small().without("tokenizer.json").error();
    assert_eq!((file.as_str(), key.as_str()), ("tokenizer.json", ""));
    assert!(reason.contains("does not exist"));

    let (_, key, reason) = Checkpoint::small()
        .with("tokenizer.json", "{\"model\": ")
        .error();
    assert!(
        key.is_empty() && reason.contains("not valid JSON"),
        "{reason}"
    );
    let (_, _, reason) = Checkpoint::small().with("tokenizer.json", "[]").error();
    assert!(reason.contains("not a JSON object"), "{reason}");

    let good = words(&["<unk>", "a"], &[], &json!({"type": "Fuse"}));
    for (key, bad) in [
        ("model", json!(null)),
        ("model", json!({"type": "Nonsense"})),
        ("normalizer", json!({"type": "Nonsense"})),
        ("pre_tokenizer", json!({"type": "Nonsense"})),
        ("post_processor", json!({"type": "Nonsense"})),
        ("decoder", json!({"type": "Nonsense"})),
        (
            "decoder",
            json!({"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
        ),
    ] {
        let mut tokenizer = good.clone();
        tokenizer[key] = bad;
        let (file, found, _) = Checkpoint::new(&tokenizer).error();
        assert_eq!((file.as_str(), found.as_str()), ("tokenizer.json", key));
    }
    let mut tokenizer = good;
    tokenizer["model"]["vocab"] = json!({"a": 4_000_000_000_u32});
    let (_, key, reason) = Checkpoint::new(&tokenizer).error();
    assert!(
        key == "model.vocab" && reason.contains("4000000001"),
        "{reason}"
    );
}

#[test]
fn other_files_are_blamed_by_key() {
    for (name, text, blamed) in [
        ("tokenizer_config.json", "{", ""),
        ("tokenizer_config.json", "3", ""),
        ("tokenizer_config.json", r#"{"bos_token": 3}"#, "bos_token"),
        (
            "tokenizer_config.json",
            r#"{"eos_token": {"text": "x"}}"#,
            "eos_token",
        ),
        (
            "tokenizer_config.json",
            r#"{"eos_token": "<nowhere>"}"#,
            "eos_token",
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": 3}"#,
            "chat_template",
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "rag", "template": "x"}]}"#,
            "chat_template",
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": "{% if %}"}"#,
            "chat_template",
        ),
        ("chat_template.jinja", "a\n{% for %}", ""),
        (
            "generation_config.json",
            r#"{"eos_token_id": "2"}"#,
            "eos_token_id",
        ),
        (
            "generation_config.json",
            r#"{"eos_token_id": [2, -1]}"#,
            "eos_token_id",
        ),
        (
            "generation_config.json",
            r#"{"eos_token_id": 5}"#,
            "eos_token_id",
        ),
        ("config.json", r#"{"eos_token_id": 2.5}"#, "eos_token_id"),
    ] {
        let (file, key, reason) = Checkpoint::small().with(name, text).error();
        assert_eq!(
            (file.as_str(), key.as_str()),
            (name, blamed),
            "{text}: {reason}"
        );
        assert!(!reason.is_empty());
    }
    let (_, _, reason) = Checkpoint::small()
        .with("chat_template.jinja", "a\n{% for %}")
        .error();
    assert!(reason.starts_with("line 2: "), "{reason}");
}

#[test]
fn ends_of_text_come_from_every_file() {
    let none = Checkpoint::small().load().unwrap();
    assert!(none.eos_ids().is_empty());
    let config = Checkpoint::small().with("config.json", r#"{"eos_token_id": [4, 2, 2]}"#);
    assert_eq!(config.load().unwrap().eos_ids(), [2, 4]);
    let generation = config.with("generation_config.json", r#"{"eos_token_id": 3}"#);
    assert_eq!(generation.load().unwrap().eos_ids(), [3]);
    let null = generation.with("generation_config.json", r#"{"eos_token_id": null}"#);
    assert_eq!(null.load().unwrap().eos_ids(), [2, 4]);
    let token = null.with(
        "tokenizer_config.json",
        r#"{"eos_token": {"content": "hello"}}"#,
    );
    assert_eq!(token.load().unwrap().eos_ids(), [2, 3, 4]);
}

#[test]
fn the_template_file_wins_over_the_inline_one() {
    let model = Checkpoint::small()
        .with("tokenizer_config.json", r#"{"chat_template": "inline"}"#)
        .with("chat_template.jinja", "file");
    assert_eq!(
        model
            .load()
            .unwrap()
            .render_chat(&Chat::new(&HELLO, true))
            .unwrap(),
        "file"
    );
    let model = model.without("chat_template.jinja");
    assert_eq!(
        model
            .load()
            .unwrap()
            .render_chat(&Chat::new(&HELLO, true))
            .unwrap(),
        "inline"
    );
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}!"}],
                   "bos_token": {"content": "<s>", "lstrip": false}}"#;
    let model = model.with("tokenizer_config.json", list).load().unwrap();
    assert_eq!(model.render_chat(&Chat::new(&HELLO, true)).unwrap(), "<s>!");
    assert_eq!(model.bos_id(), Some(1));
}

#[test]
fn without_a_template_chats_are_refused() {
    let model = Checkpoint::small().load().unwrap();
    assert!(!model.has_chat_template());
    let error = model.encode_chat(&Chat::new(&HELLO, true)).unwrap_err();
    assert_eq!(error, EncodeError::Template(TemplateError::Missing));
    assert!(error.to_string().contains("/v1/completions"), "{error}");
}

#[test]
fn truncation_of_the_training_run_is_ignored() {
    let mut tokenizer = words(&["<unk>", "a"], &[], &json!({"type": "Fuse"}));
    tokenizer["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                                  "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    let model = Checkpoint::new(&tokenizer).load().unwrap();
    assert_eq!(model.encode("a a a", true).unwrap(), [1, 1, 1]);
}
