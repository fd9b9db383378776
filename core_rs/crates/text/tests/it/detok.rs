//! Streaming gives the text of decoding at once.

use helix_text::TextModel;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, GOLDEN, golden, words};

/// What is given out token by token; the last entry is what `finish` flushes.
fn pieces(model: &TextModel, prompt: &[u32], answer: &[u32]) -> Vec<String> {
    let mut stream = model.detokenizer();
    stream.prime(prompt);
    let mut pieces = Vec::new();
    for id in answer {
        let mut piece = String::new();
        stream.push(*id, &mut piece);
        pieces.push(piece);
    }
    let mut rest = String::new();
    stream.finish(&mut rest);
    pieces.push(rest);
    pieces
}

fn streamed(model: &TextModel, prompt: &[u32], answer: &[u32]) -> String {
    pieces(model, prompt, answer).concat()
}

fn is_fallback_byte(model: &TextModel, id: u32) -> bool {
    model.vocab_size() == 900 && (3..259).contains(&id)
}

/// Any ids (also special and unknown ones); runs of byte-fallback tokens of at most 16, the
/// length up to which streaming promises the exact text.
fn any_ids(model: &'static TextModel) -> impl Strategy<Value = Vec<u32>> {
    let size = u32::try_from(model.vocab_size()).unwrap();
    let bytes = 3..259_u32;
    let utf8 = "\\PC{1,4}".prop_map(|text| text.bytes().map(|b| u32::from(b) + 3).collect());
    let run = prop_oneof![prop::collection::vec(bytes, 1..16), utf8];
    let other = prop::collection::vec(0..size + 5, 1..6);
    prop::collection::vec(prop_oneof![run, other], 0..12).prop_map(move |parts| {
        let (mut ids, mut run) = (Vec::new(), 0);
        for id in parts.concat() {
            let byte = is_fallback_byte(model, id);
            let text = !byte && !model.is_special(id) && id < size;
            run = if byte {
                run + 1
            } else if text {
                0
            } else {
                run
            };
            if run <= 16 {
                ids.push(id);
            }
        }
        ids
    })
}

fn golden_and_ids() -> impl Strategy<Value = (&'static TextModel, Vec<u32>)> {
    prop::sample::select(GOLDEN.to_vec()).prop_flat_map(|name| {
        let model = golden(name);
        any_ids(model).prop_map(move |ids| (model, ids))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_tokens_stream_to_the_text_of_decoding_at_once((model, ids) in golden_and_ids()) {
        prop_assert_eq!(streamed(model, &[], &ids), model.decode(&ids));
    }

    #[test]
    fn any_answer_adds_what_decoding_with_its_prompt_adds((model, mut ids) in golden_and_ids(), at in 0..100_usize) {
        let at = if ids.is_empty() { 0 } else { at % ids.len() };
        // A word between them, so that the prompt's own text does not depend on the answer.
        ids.insert(at, 300);
        let (prompt, answer) = ids.split_at(at + 1);
        let both = model.decode(&ids);
        let before = model.decode(prompt);
        let added = streamed(model, prompt, answer);
        prop_assert_eq!(Some(added.as_str()), both.strip_prefix(&before));
    }

    #[test]
    fn any_text_survives_a_round_trip(text in "\\PC{0,40}") {
        for name in ["llama-tiny", "mistral-tiny"] {
            let model = golden(name);
            let ids = model.encode(&text, true).unwrap();
            prop_assert_eq!(&streamed(model, &[], &ids), &model.decode(&ids));
            if name == "llama-tiny" {
                prop_assert_eq!(&streamed(model, &[], &ids), &text);
            }
        }
    }
}

#[test]
fn characters_come_out_whole_and_at_once() {
    let model = golden("llama-tiny");
    let ids = model.encode("🙂", false).unwrap();
    assert_eq!(ids.len(), 4);
    assert_eq!(pieces(model, &[], &ids), ["", "", "", "🙂", ""]);
    // A broken character is given up as soon as it is known to be broken.
    let h = model.encode("h", false).unwrap()[0];
    assert_eq!(
        pieces(model, &[], &[ids[0], h, ids[0]]),
        ["", "\u{FFFD}h", "", "\u{FFFD}"]
    );
}

#[test]
fn a_character_may_begin_in_the_prompt() {
    for name in ["llama-tiny", "mistral-tiny"] {
        let model = golden(name);
        let ids: Vec<u32> = match name {
            "llama-tiny" => model.encode("🙂", false).unwrap(),
            _ => "🙂".bytes().map(|byte| u32::from(byte) + 3).collect(),
        };
        let (prompt, answer) = ids.split_at(2);
        assert_eq!(streamed(model, prompt, answer), "🙂", "{name}");
    }
}

#[test]
fn a_byte_run_is_held_until_it_is_decided() {
    let model = golden("mistral-tiny");
    let byte = |byte: u8| u32::from(byte) + 3;
    let word = 891;
    // Valid so far: undecided until a word follows.
    assert_eq!(
        pieces(model, &[], &[word, byte(b'\n'), word]),
        ["tion ", "", "\ntion ", ""]
    );
    // Invalid: every byte of the run is one replacement, at once.
    let run = [word, byte(b'\n'), byte(0xFF), byte(b'a'), word];
    let expected = ["tion ", "", "\u{FFFD}\u{FFFD}", "\u{FFFD}", "tion ", ""];
    assert_eq!(pieces(model, &[], &run), expected);
    assert_eq!(model.decode(&run), expected.concat());
    // Special tokens do not end a run.
    let split = [word, byte(0xC3), 2, byte(0xBC), word];
    assert_eq!(streamed(model, &[], &split), "tion ütion ");
    assert_eq!(model.decode(&split), "tion ütion ");
}

#[test]
fn a_long_byte_run_flows_and_keeps_its_good_characters() {
    let model = golden("mistral-tiny");
    let text = "ภาษาไทย".repeat(20);
    let mut ids: Vec<u32> = text.bytes().map(|byte| u32::from(byte) + 3).collect();
    let given = pieces(model, &[], &ids);
    assert_eq!(given.concat(), text);
    let mut waiting = 0;
    for (read, piece) in given.iter().enumerate() {
        waiting = if piece.is_empty() { waiting + 1 } else { 0 };
        assert!(
            waiting <= 18,
            "nothing came out for {waiting} tokens before token {read}"
        );
    }
    // Cut inside the last character: only that one is lost.
    ids.pop();
    let cut = streamed(model, &[], &ids);
    assert!(
        cut.starts_with(&text[..text.len() - 18]) && cut.ends_with('\u{FFFD}'),
        "{cut}"
    );
}

#[test]
fn the_first_space_is_cut_only_at_the_start() {
    let model = golden("mistral-tiny");
    let hello = model.encode("Hello", false).unwrap();
    assert_eq!(streamed(model, &[], &hello), "Hello");
    assert_eq!(streamed(model, &[1], &hello), "Hello");
    assert_eq!(streamed(model, &[1, 891], &hello), " Hello");
    // A prompt of one byte token is text, too.
    assert_eq!(streamed(model, &[1, 13], &hello), " Hello");
    assert_eq!(model.decode(&[1]), "");
}

fn check(tokens: &[&str], decoder: &Value, answers: &[&[u32]]) {
    let model = Checkpoint::new(&words(tokens, &tokens[..1], decoder))
        .load()
        .unwrap();
    for answer in answers {
        assert_eq!(
            streamed(&model, &[], answer),
            model.decode(answer),
            "{decoder} {answer:?}"
        );
        for at in 1..answer.len() {
            let (prompt, rest) = answer.split_at(at);
            let (both, before) = (model.decode(answer), model.decode(prompt));
            let added = both.strip_prefix(&before);
            assert_eq!(
                Some(streamed(&model, prompt, rest).as_str()),
                added,
                "{decoder} {answer:?}"
            );
        }
    }
}

#[test]
fn metaspace_decoders() {
    let tokens = ["<unk>", "▁Hel", "lo", "▁▁world", "▁"];
    let answers: [&[u32]; 5] = [&[1, 2, 3], &[0, 3, 1], &[4, 4, 1, 2], &[2, 3, 2], &[]];
    for scheme in ["always", "first", "never"] {
        let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        check(&tokens, &decoder, &answers);
    }
}

#[test]
fn sentencepiece_decoders_without_a_strip() {
    let tokens = ["<unk>", "▁Hel", "lo", "<0xC3>", "<0xBC>", "<0xZZ>", "▁▁"];
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let answers: [&[u32]; 5] = [
        &[1, 2, 1],
        &[1, 3, 4, 2],
        &[6, 5, 1],
        &[2, 3, 1, 0, 3, 4],
        &[2, 4, 2],
    ];
    let chain = json!([replace, {"type": "ByteFallback"}, {"type": "Fuse"}]);
    // Splits inside a character have no common prefix, so they are only checked as a whole.
    let model = Checkpoint::new(&words(
        &tokens,
        &tokens[..1],
        &json!({"type": "Sequence", "decoders": chain}),
    ));
    let model = model.load().unwrap();
    for answer in answers {
        assert_eq!(
            streamed(&model, &[], answer),
            model.decode(answer),
            "{answer:?}"
        );
    }
    let chain = json!([replace, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 3, "stop": 0}]);
    let decoder = json!({"type": "Sequence", "decoders": chain});
    check(
        &tokens,
        &decoder,
        &[&[6, 6, 1], &[6, 2, 6], &[0, 6, 1, 1], &[2, 6]],
    );
}

#[test]
fn other_decoders_go_through_the_tokeniser() {
    let tokens = ["<unk>", "play", "##ing", "chess", ".", "##s"];
    let answers: [&[u32]; 4] = [&[1, 2, 3, 4], &[1, 5, 0, 3], &[3, 3, 3], &[2, 2, 1]];
    check(
        &tokens,
        &json!({"type": "WordPiece", "prefix": "##", "cleanup": false}),
        &answers,
    );
    check(&tokens, &Value::Null, &answers);
    check(
        &["<unk>", "lo</w>", "hel", "wor"],
        &json!({"type": "BPEDecoder", "suffix": "</w>"}),
        &[&[2, 1, 3]],
    );

    // A long answer: the window moves with it.
    let model = Checkpoint::new(&words(
        &tokens,
        &tokens[..1],
        &json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
    ));
    let model = model.load().unwrap();
    let long: Vec<u32> = (0..500).map(|i| [1, 2, 3, 1, 5][i % 5]).collect();
    assert_eq!(streamed(&model, &[], &long), model.decode(&long));
    assert_eq!(model.token_bytes(2), b"ing");
    assert_eq!(model.token_bytes(3), b" chess");
}

#[test]
fn added_tokens_that_are_not_special_are_text() {
    let mut tokenizer = words(
        &["<unk>", "Ġhi", "<tool call>"],
        &[],
        &json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
    );
    tokenizer["added_tokens"] = json!([{"id": 2, "content": "<tool call>", "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": false}]);
    let model = Checkpoint::new(&tokenizer).load().unwrap();
    assert_eq!(model.decode(&[1, 2, 1]), " hi<tool call> hi");
    assert_eq!(streamed(&model, &[], &[1, 2, 1]), " hi<tool call> hi");
    assert_eq!(model.token_bytes(2), b"<tool call>");
    assert!(!model.is_special(2));
}
