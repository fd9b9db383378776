//! What transformers computes from the golden checkpoints.

use std::fs;

use helix_text::{Chat, Message};
use serde_json::Value;

use crate::checkpoint::{GOLDEN, golden, golden_dir};

fn truth(name: &str) -> Value {
    let text = fs::read_to_string(golden_dir(name).join("golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn prompts_encode_to_the_same_ids() {
    for name in GOLDEN {
        let cases = truth(name)["cases"].as_array().unwrap().clone();
        assert_eq!(cases.len(), 5);
        for case in cases {
            let prompt = case["prompt"].as_str().unwrap();
            let found = golden(name).encode(prompt, true).unwrap();
            assert_eq!(found, ids(&case["input_ids"]), "{name}: {prompt:?}");
        }
    }
}

#[test]
fn chats_render_and_encode_the_same() {
    for name in GOLDEN {
        let chats = truth(name)["chats"].as_array().unwrap().clone();
        assert_eq!(chats.len(), 2);
        for chat in chats {
            let messages: Vec<Message<'_>> = chat["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|message| Message {
                    role: message["role"].as_str().unwrap(),
                    content: message["content"].as_str().unwrap(),
                    name: None,
                    ..Message::default()
                })
                .collect();
            let model = golden(name);
            assert_eq!(
                model.render_chat(&Chat::new(&messages, true)).unwrap(),
                chat["rendered"],
                "{name}"
            );
            assert_eq!(
                model.encode_chat(&Chat::new(&messages, true)).unwrap(),
                ids(&chat["input_ids"]),
                "{name}"
            );
        }
    }
}

#[test]
fn streamed_answers_are_the_text_they_add() {
    for name in GOLDEN {
        let model = golden(name);
        for case in truth(name)["cases"].as_array().unwrap() {
            let (prompt, answer) = (ids(&case["input_ids"]), ids(&case["greedy_24"]));
            assert_eq!(answer.len(), 24);
            let mut stream = model.detokenizer();
            stream.prime(&prompt);
            let mut text = String::new();
            for id in &answer {
                stream.push(*id, &mut text);
            }
            stream.finish(&mut text);
            assert_eq!(text, case["greedy_text"], "{name}");

            let together = model.decode(&[prompt.clone(), answer].concat());
            let before = model.decode(&prompt);
            assert_eq!(
                together.strip_prefix(&before),
                Some(text.as_str()),
                "{name}"
            );
        }
    }
}

#[test]
fn bos_is_never_doubled() {
    let model = golden("mistral-tiny");
    assert_eq!(model.bos_id(), Some(1));
    let plain = model.encode("Hello", true).unwrap();
    assert_eq!(plain[0], 1);
    let written_out = model.encode("<s>Hello", true).unwrap();
    assert_eq!(written_out.iter().filter(|id| **id == 1).count(), 1);
    assert_eq!(written_out, model.encode("<s>Hello", false).unwrap());
    // A second one that the writer put there is theirs.
    let twice = model.encode("<s><s>Hello", true).unwrap();
    assert_eq!(twice.iter().filter(|id| **id == 1).count(), 2);
}

#[test]
fn special_ids_are_known() {
    for name in GOLDEN {
        let model = golden(name);
        assert_eq!(model.eos_ids(), [2], "{name}");
        assert!(model.is_special(2) && model.is_special(0) && !model.is_special(5));
        assert_eq!(
            model.vocab_size(),
            if name == "mistral-tiny" { 900 } else { 640 }
        );
        assert!(model.has_chat_template());
    }
    assert_eq!(golden("llama-tiny").token_bytes(2), b"<|im_end|>");
    assert_eq!(golden("llama-tiny").token_bytes(630), b" sub");
    assert_eq!(golden("mistral-tiny").token_bytes(13), b"\n");
    assert_eq!(golden("mistral-tiny").token_bytes(891), b"tion ");
    assert_eq!(golden("mistral-tiny").token_bytes(900), b"");
}
