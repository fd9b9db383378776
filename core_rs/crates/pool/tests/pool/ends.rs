//! What ends an answer, and what of its end is shown.

use helix_pool::{Batch, Candidates, Capacity, StepEngine};
use helix_wire::error::Code;
use helix_wire::v1::{
    Chat, ChatMessage, FinishReason, GenerateRequest, Input, TokenIds, Value, Variable,
    input::Kind, value,
};

use crate::harness::{Alphabet, EOS, VOCAB, ask, options, start};

const STOP: i32 = FinishReason::Stop as i32;
const LENGTH: i32 = FinishReason::Length as i32;

/// Chooses these tokens after a prompt of so many.
struct Script(usize, Vec<i32>, Vec<i32>);

impl StepEngine for Script {
    type Error = String;

    fn capacity(&mut self) -> Result<Capacity, String> {
        Ok(Capacity {
            slots: 1,
            max_len: 64,
            vocab_size: VOCAB,
            candidates: 0,
        })
    }

    fn copy_prefix(&mut self, _: usize, _: usize, _: usize) -> Result<(), String> {
        Ok(())
    }

    fn step(&mut self, batch: &Batch) -> Result<Candidates<'_>, String> {
        let at = usize::try_from(batch.past[0] + batch.counts[0]).unwrap() - self.0;
        self.2 = vec![97; batch.rows()];
        if let (Some(row), Some(token)) = (self.2.last_mut(), self.1.get(at)) {
            *row = *token;
        }
        Ok(Candidates::Tokens(&self.2))
    }
}

/// After `!` the engine wants the end of the text.
fn ended() -> GenerateRequest {
    ask("!", 8)
}

#[tokio::test]
async fn nothing_ends_an_answer_before_its_least_length() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    let answer = pool.answer(ended()).await;
    assert_eq!((answer.tokens, answer.reasons), (0, vec![STOP]));
    for min_tokens in [1, 3, 8] {
        let answer = pool
            .answer(GenerateRequest {
                min_tokens,
                ..ended()
            })
            .await;
        assert!(
            answer.tokens >= min_tokens,
            "{min_tokens}: {}",
            answer.tokens
        );
    }
    // A stop string or a stop token does not end it either.
    let letters = GenerateRequest {
        min_tokens: 4,
        stop: vec!["d".into(), "fg".into()],
        stop_token_ids: vec![u32::from(b'c')],
        ..ask("a", 8)
    };
    let answer = pool.answer(letters).await;
    assert!(answer.tokens >= 4);
    assert!(!answer.texts[0].contains('c'), "{:?}", answer.texts);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_chooses_by_itself_goes_on_too() {
    let eos = EOS.cast_signed();
    let mut pool = start(
        Script(1, vec![eos, 97, eos, 98, eos], Vec::new()),
        options(),
    )
    .await;
    let answer = pool
        .answer(GenerateRequest {
            min_tokens: 3,
            ..ask("x", 8)
        })
        .await;
    assert_eq!(answer.reasons, [STOP]);
    assert!(answer.tokens >= 3, "{}", answer.tokens);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_stop_token_ends_an_answer_and_is_no_part_of_it() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    for ignore_eos in [false, true] {
        let answer = pool
            .answer(GenerateRequest {
                stop_token_ids: vec![u32::from(b'e'), u32::from(b'd')],
                ignore_eos,
                ..ask("a", 8)
            })
            .await;
        assert_eq!(
            (answer.texts, answer.reasons),
            (vec!["bc".to_owned()], vec![STOP])
        );
    }
    let refused = |stop_token_ids| GenerateRequest {
        stop_token_ids,
        ..ended()
    };
    for ids in [vec![258], vec![1; 257]] {
        let error = pool.generate(refused(ids)).await.unwrap_err();
        assert_eq!(error.param.as_deref(), Some("stop_token_ids"));
    }
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn special_tokens_are_shown_when_asked_for() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    for (show_special_tokens, expected) in [(false, ""), (true, "<eos>")] {
        let answer = pool
            .answer(GenerateRequest {
                ignore_eos: true,
                show_special_tokens,
                ..ask("!", 1)
            })
            .await;
        assert_eq!(
            (answer.texts, answer.reasons),
            (vec![expected.to_owned()], vec![LENGTH])
        );
    }
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn more_than_there_is_room_for_is_cut() {
    let mut pool = start(Alphabet::new(1, 16), options()).await;
    for wanted in [13, 14, 1000, u32::MAX] {
        let answer = pool.answer(ask("abc", wanted)).await;
        assert_eq!((answer.tokens, answer.reasons), (13, vec![LENGTH]));
    }
    let error = pool.generate(ask("abcdefghijklmnop", 5)).await.unwrap_err();
    assert_eq!(error.code, Code::ContextLengthExceeded);
    assert_eq!(error.param.as_deref(), Some("prompt"));
    pool.stop().await.unwrap();
}

/// `€` has three bytes; the prompt has two of them.
#[tokio::test]
async fn an_echo_does_not_repeat_the_character_in_which_the_prompt_ends() {
    let euro = "\u{20AC}".as_bytes();
    for logprobs in [None, Some(0)] {
        let mut pool = start(
            Script(3, vec![i32::from(euro[2]), 97], Vec::new()),
            options(),
        )
        .await;
        let ids = [b'x', euro[0], euro[1]].map(u32::from).to_vec();
        let request = |max_tokens| GenerateRequest {
            inputs: vec![Input {
                kind: Some(Kind::Tokens(TokenIds { ids: ids.clone() })),
            }],
            echo: true,
            logprobs,
            ignore_eos: true,
            ..ask("", max_tokens)
        };
        let whole = pool.answer(request(2)).await.texts;
        assert_eq!(whole[0].matches('\u{FFFD}').count(), 0, "{whole:?}");
        assert!(whole[0].starts_with("x\u{20AC}"), "{whole:?}");
        let only = pool.answer(request(0)).await.texts;
        assert_eq!(only, ["x\u{FFFD}"]);
        pool.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_chat_is_text_and_variables_replace_nothing() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    let chat = |content: &str, variables| {
        let message = ChatMessage {
            role: "user".into(),
            content: content.into(),
            ..ChatMessage::default()
        };
        let chat = Chat {
            messages: vec![message],
            add_generation_prompt: true,
            variables,
            ..Chat::default()
        };
        GenerateRequest {
            inputs: vec![Input {
                kind: Some(Kind::Chat(chat)),
            }],
            ..ask("", 2)
        }
    };
    let typed = pool.answer(chat("<turn>a", Vec::new())).await;
    assert_eq!(typed.prompt_tokens, [1 + 7]);
    let variable = |name: &str| Variable {
        name: name.into(),
        value: Some(Value {
            kind: Some(value::Kind::Flag(true)),
        }),
    };
    let fine = pool
        .answer(chat("a", vec![variable("enable_thinking")]))
        .await;
    assert_eq!(fine.prompt_tokens, [2]);
    let error = pool
        .generate(chat("a", vec![variable("messages")]))
        .await
        .unwrap_err();
    assert_eq!(
        (error.code, error.param.as_deref()),
        (Code::InvalidRequest, Some("messages"))
    );
    pool.stop().await.unwrap();
}
