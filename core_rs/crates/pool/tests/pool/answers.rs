//! What a request gets.

use std::sync::atomic::Ordering;

use helix_wire::v1::{
    Chat, ChatMessage, DetokenizeRequest, FinishReason, GenerateRequest, Input, Sampling, TokenIds,
    TokenizeRequest, input::Kind,
};

use crate::harness::{Alphabet, Chosen, EOS, ask, extend, greedy, options, row, start};

const STOP: i32 = FinishReason::Stop as i32;
const LENGTH: i32 = FinishReason::Length as i32;

fn sampled(seed: Option<u64>) -> Sampling {
    Sampling {
        temperature: 3.0,
        seed,
        ..greedy()
    }
}

#[tokio::test]
async fn a_text_is_continued_and_counted() {
    let mut pool = start(Alphabet::new(2, 64), options()).await;
    let answer = pool.answer(ask("ab", 5)).await;
    assert_eq!(answer.texts, ["cdefg"]);
    assert_eq!(answer.reasons, [LENGTH]);
    assert_eq!(answer.prompt_tokens, [2]);
    assert_eq!(answer.tokens, 5);
    let usage = answer.usage.unwrap();
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens
        ),
        (2, 5, 0)
    );
    assert!(usage.queue_us <= usage.first_token_us && usage.first_token_us <= usage.total_us);
    assert_eq!(answer.error, None);

    let again = pool
        .answer(GenerateRequest {
            model: "gpt-4".into(),
            ..ask("abc", 5)
        })
        .await;
    assert_eq!(
        again.usage.unwrap().cached_tokens,
        2,
        "the prefix is reused"
    );
    assert_eq!(again.texts, ["defgh"]);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn the_end_of_text_ends_and_counts() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    let answer = pool.answer(ask("?", 5)).await;
    assert_eq!(
        (answer.texts, answer.reasons),
        (vec![String::new()], vec![STOP])
    );
    assert_eq!(answer.usage.unwrap().completion_tokens, 1);

    let mut ignoring = ask("?", 3);
    ignoring.ignore_eos = true;
    let answer = pool.answer(ignoring).await;
    assert_eq!(answer.reasons, [LENGTH]);
    assert_eq!(answer.usage.unwrap().completion_tokens, 3);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_stop_string_across_tokens_is_never_sent() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    let stopping = GenerateRequest {
        stop: vec!["fgh".into(), "xyz".into()],
        logprobs: Some(0),
        ..ask("b", 20)
    };
    let answer = pool.answer(stopping).await;
    assert_eq!(
        (answer.texts, answer.reasons),
        (vec!["cde".to_owned()], vec![STOP])
    );
    assert_eq!(
        answer.logprobs[0].len(),
        3,
        "the stop string's tokens are not reported"
    );
    assert_eq!(answer.usage.unwrap().completion_tokens, 6);

    let held = GenerateRequest {
        stop: vec!["fgX".into()],
        ..ask("b", 5)
    };
    assert_eq!(
        pool.answer(held).await.texts,
        ["cdefg"],
        "what was held back comes with the end"
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn without_streaming_the_answer_comes_in_few_pieces() {
    let mut pool = start(Alphabet::new(1, 256), options()).await;
    let answer = pool
        .answer(GenerateRequest {
            stream: false,
            ..ask("a", 100)
        })
        .await;
    assert_eq!(answer.texts[0].len(), 100);
    assert!(answer.frames <= 3, "{} frames", answer.frames);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn choices_and_prompts_are_numbered() {
    let engine = Alphabet::new(8, 64);
    let copies = engine.copies.clone();
    let mut pool = start(engine, options()).await;
    let inputs = ["aaaa", "mmmm"].map(|text| Input {
        kind: Some(Kind::Text(text.into())),
    });
    let request = GenerateRequest {
        inputs: inputs.into(),
        n: 2,
        ..ask("", 3)
    };
    let answer = pool.answer(request).await;
    assert_eq!(answer.texts, ["bcd", "bcd", "nop", "nop"]);
    assert_eq!(answer.prompt_tokens, [4, 4]);
    let usage = answer.usage.unwrap();
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens
        ),
        (8, 12, 0)
    );
    assert!(
        copies.load(Ordering::Relaxed) >= 2,
        "the second choices copy the first ones' cache"
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_chat_goes_through_the_template() {
    let mut pool = start(Alphabet::new(2, 64), options()).await;
    let message = ChatMessage {
        role: "user".into(),
        content: "hij".into(),
        ..ChatMessage::default()
    };
    let chat = Chat {
        messages: vec![message.clone()],
        add_generation_prompt: true,
        ..Chat::default()
    };
    let input = Input {
        kind: Some(Kind::Chat(chat)),
    };
    let answer = pool
        .answer(GenerateRequest {
            inputs: vec![input.clone()],
            ..ask("", 2)
        })
        .await;
    assert_eq!(
        (answer.texts, answer.prompt_tokens),
        (vec!["kl".to_owned()], vec![4])
    );

    let tokenize = TokenizeRequest {
        model: "gpt-4".into(),
        input: Some(input),
        add_special_tokens: true,
    };
    let reply = pool.client.tokenize(tokenize).await.unwrap().into_inner();
    assert_eq!(
        (reply.tokens, reply.max_model_len),
        (vec![257, 104, 105, 106], 64)
    );
    let detokenize = DetokenizeRequest {
        model: "alphabet".into(),
        tokens: vec![257, 104, 105, EOS],
    };
    assert_eq!(
        pool.client
            .detokenize(detokenize)
            .await
            .unwrap()
            .into_inner()
            .text,
        "hi"
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_seed_decides_whatever_else_runs() {
    let mut pool = start(Alphabet::new(17, 128), options()).await;
    let seeded = |seed| GenerateRequest {
        sampling: Some(sampled(Some(seed))),
        ignore_eos: true,
        ..ask("abc", 40)
    };
    let alone = pool.answer(seeded(11)).await.texts;
    let pair = pool
        .answer(GenerateRequest { n: 2, ..seeded(11) })
        .await
        .texts;
    assert_eq!(
        pair[0], alone[0],
        "the first of several choices is the one of a single request"
    );
    assert_ne!(pair[1], alone[0]);

    let mut streams = Vec::new();
    for seed in 0..17 {
        streams.push(
            pool.generate(seeded(if seed == 8 { 11 } else { 100 + seed }))
                .await
                .unwrap(),
        );
    }
    let answers =
        futures_util::future::join_all(streams.into_iter().map(crate::harness::collect)).await;
    assert_eq!(answers[8].texts, alone);
    assert!(
        answers
            .iter()
            .filter(|answer| answer.texts == alone)
            .count()
            == 1
    );

    let unseeded = || GenerateRequest {
        sampling: Some(sampled(None)),
        ignore_eos: true,
        ..ask("abc", 40)
    };
    assert_ne!(
        pool.answer(unseeded()).await.texts,
        pool.answer(unseeded()).await.texts
    );
    pool.stop().await.unwrap();
}

#[allow(clippy::cast_possible_truncation)]
fn log_softmax(row: &[f32], token: u32) -> f32 {
    let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    (f64::from(row[token as usize]) - sum.ln()) as f32
}

#[tokio::test]
async fn an_echo_reports_the_prompt() {
    let mut small = options();
    small.step_tokens = 3;
    let mut pool = start(Alphabet::new(2, 64), small).await;
    let tokens: Vec<u32> = b"hellos".iter().map(|byte| u32::from(*byte)).collect();
    let input = Input {
        kind: Some(Kind::Tokens(TokenIds {
            ids: tokens.clone(),
        })),
    };
    let request = GenerateRequest {
        inputs: vec![input],
        echo: true,
        logprobs: Some(2),
        ..ask("", 2)
    };
    for _ in 0..2 {
        let answer = pool.answer(request.clone()).await;
        assert_eq!(answer.texts, ["hellostu"]);
        assert_eq!(
            (answer.tokens, answer.usage.unwrap().completion_tokens),
            (2, 2)
        );
        let entries = &answer.logprobs[0];
        assert_eq!(entries.len(), 8);
        assert!(entries[0].absent && entries[0].top.is_empty());
        let (mut hash, mut previous) = (0, 0);
        let all: Vec<u32> = tokens
            .iter()
            .copied()
            .chain(b"tu".iter().map(|byte| u32::from(*byte)))
            .collect();
        for (index, token) in all.iter().enumerate() {
            let entry = &entries[index];
            assert_eq!(
                (entry.token, entry.text.as_ref()),
                (*token, [u8::try_from(*token).unwrap()].as_slice())
            );
            if index > 0 {
                let expected = log_softmax(&row(hash, previous), *token);
                assert!(
                    (entry.logprob - expected).abs() < 1e-4,
                    "{index}: {} {expected}",
                    entry.logprob
                );
                assert_eq!(entry.top.len(), 2);
            }
            (hash, previous) = (extend(hash, *token), *token);
        }
    }
    let plain = GenerateRequest {
        echo: true,
        max_tokens: Some(0),
        ..ask("hello", 0)
    };
    let answer = pool.answer(plain).await;
    assert_eq!(
        (answer.texts, answer.reasons),
        (vec!["hello".to_owned()], vec![LENGTH])
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn an_engine_may_choose_the_tokens() {
    let mut pool = start(Chosen(Vec::new()), options()).await;
    let answer = pool
        .answer(GenerateRequest {
            logprobs: Some(1),
            ..ask("abc", 4)
        })
        .await;
    assert_eq!(answer.texts, ["xxxx"]);
    assert!(
        answer.logprobs[0]
            .iter()
            .all(|entry| entry.logprob == 0.0 && entry.top.len() == 1)
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn several_bytes_make_one_character() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    let bias = |token, bias| helix_wire::v1::LogitBias { token, bias };
    let sampling = Sampling {
        logit_bias: vec![bias(0xC3, 100.0)],
        ..greedy()
    };
    let answer = pool
        .answer(GenerateRequest {
            sampling: Some(sampling),
            ..ask("a", 3)
        })
        .await;
    assert_eq!(
        answer.texts,
        ["\u{fffd}\u{fffd}\u{fffd}"],
        "an unfinished character is replaced, never sent in half"
    );
    pool.stop().await.unwrap();
}
