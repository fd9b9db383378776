//! What requests of different owners learn of each other.

use helix_pool::Options;
use helix_wire::error::Code;
use helix_wire::v1::{Chat, ChatMessage, GenerateRequest, Input, Owner, input::Kind};

use crate::harness::{Alphabet, Answer, Running, ask, collect, options, owner, refusal, start};

async fn cached(pool: &mut Running, prompt: &str, owner: Option<Owner>) -> u32 {
    let request = GenerateRequest {
        owner,
        ..ask(prompt, 1)
    };
    pool.answer(request).await.usage.unwrap().cached_tokens
}

#[tokio::test]
async fn prefixes_belong_to_an_owner() {
    let mut pool = start(Alphabet::new(4, 64), options()).await;
    assert_eq!(cached(&mut pool, "secret word", Some(owner(1))).await, 0);
    assert_eq!(cached(&mut pool, "secret word", Some(owner(2))).await, 0);
    assert_eq!(cached(&mut pool, "secret word", Some(owner(1))).await, 10);
    assert_eq!(cached(&mut pool, "secret word", Some(owner(2))).await, 10);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_stranger_shares_nothing_but_with_its_own_choices() {
    let mut pool = start(Alphabet::new(4, 64), options()).await;
    for _ in 0..2 {
        assert_eq!(cached(&mut pool, "nobody's", None).await, 0);
    }
    let two = GenerateRequest {
        owner: None,
        n: 2,
        ..ask("abc", 3)
    };
    let before = pool.pool.stats();
    assert_eq!(pool.answer(two).await.texts, ["def", "def"]);
    let stats = pool.pool.stats();
    assert_eq!(
        stats.cached_tokens - before.cached_tokens,
        2,
        "the second choice copies the first one's prompt"
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn an_identifier_has_sixteen_bytes_or_none() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    for length in [1, 15, 17, 4096] {
        let request = GenerateRequest {
            owner: Some(Owner {
                prefixes: vec![1; length],
                ..Owner::default()
            }),
            ..ask("a", 1)
        };
        let error = refusal(pool.generate(request).await.map_err(tonic::Status::from));
        assert_eq!(error.code, Code::InvalidRequest);
        assert_eq!(error.param.as_deref(), Some("owner.prefixes"));
    }
    pool.stop().await.unwrap();
}

fn chat(system: &str, user: &str, owner: Owner) -> GenerateRequest {
    let message = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: content.into(),
        ..ChatMessage::default()
    };
    GenerateRequest {
        inputs: vec![Input {
            kind: Some(Kind::Chat(Chat {
                messages: vec![message("system", system), message("user", user)],
                add_generation_prompt: true,
                ..Chat::default()
            })),
        }],
        owner: Some(owner),
        ..ask("", 1)
    }
}

#[tokio::test]
async fn a_declared_system_prompt_is_shared_and_what_follows_is_not() {
    let system = "be kind";
    let shared = Options {
        shared_prefixes: vec![system.into()],
        ..options()
    };
    let mut pool = start(Alphabet::new(4, 128), shared).await;
    let mut usage = async |request| pool.answer(request).await.usage.unwrap();
    let first = usage(chat(system, "my secret", owner(1))).await;
    assert_eq!(first.cached_tokens, 0);
    let other = usage(chat(system, "my secret", owner(2))).await;
    let user = u32::try_from("my secret".len()).unwrap();
    assert_eq!(
        other.cached_tokens,
        other.prompt_tokens - user,
        "up to where the caller's own text begins"
    );
    let longer = usage(chat("be kind and tell nobody", "x", owner(1))).await;
    assert_eq!(longer.cached_tokens, 8, "the turn's mark and seven letters");
    let guess = usage(chat("be kind and tell nobody", "x", owner(3))).await;
    assert_eq!(
        guess.cached_tokens, 0,
        "the whole declared beginning or nothing"
    );
    let raw = GenerateRequest {
        owner: Some(owner(1)),
        ..ask("be kind\nto A", 1)
    };
    usage(raw.clone()).await;
    let raw = GenerateRequest {
        owner: Some(owner(2)),
        ..raw
    };
    assert_eq!(usage(raw).await.cached_tokens, 8);
    pool.stop().await.unwrap();
}

fn by(number: u128, prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        owner: Some(owner(number)),
        ..ask(prompt, max_tokens)
    }
}

#[tokio::test]
async fn a_queue_that_one_fills_still_takes_others() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let limited = Options {
        queue_requests: 2,
        queue_tokens: 20,
        ..options()
    };
    let mut pool = start(engine, limited).await;
    let mut accepted = vec![pool.generate(by(1, "a", 3)).await.unwrap()];
    pool.watched(|state| state.running == 1).await;
    for (number, prompt) in [(1, "b"), (1, "c"), (2, "d"), (3, "e")] {
        accepted.push(pool.generate(by(number, prompt, 3)).await.unwrap());
    }
    for number in [1, 2, 4] {
        let refused = pool.generate(by(number, "f", 3)).await;
        let error = refusal(refused.map_err(tonic::Status::from));
        assert_eq!(
            error.code,
            Code::QueueFull,
            "twice the limit is the end for everybody"
        );
    }
    drop(open);
    for stream in accepted {
        assert_eq!(collect(stream).await.tokens, 3);
    }
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_flood_gives_slots_up_and_loses_nothing() {
    let (engine, open) = Alphabet::new(4, 1 << 12).gated();
    let mut pool = start(engine, options()).await;
    let mut flood = Vec::new();
    for prompt in ["a", "b", "c", "d", "e", "f"] {
        flood.push(pool.generate(by(1, prompt, 500)).await.unwrap());
    }
    for _ in 0..50 {
        open.send(()).unwrap();
    }
    pool.watched(|state| state.running == 4).await;
    let mut other = pool.generate(by(2, "xyz", 3)).await.unwrap();
    drop(open);
    let mut answer = Answer::default();
    while let Some(frame) = other.message().await.unwrap() {
        answer.take(frame);
    }
    assert_eq!(answer.texts, ["abc"]);
    let alphabet: String = ('a'..='z').collect();
    for (stream, first) in flood.into_iter().zip(1..) {
        let answer = collect(stream).await;
        let text: String = alphabet.chars().cycle().skip(first).take(500).collect();
        assert_eq!(answer.texts, [text], "as if it had never been interrupted");
        assert_eq!(answer.usage.unwrap().completion_tokens, 500);
    }
    assert_eq!(pool.pool.stats().interrupted, 1);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_wrong_weight_is_refused() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    for weight in [-1.0, f64::NAN, f64::INFINITY, 1e9, 1e-9] {
        let request = GenerateRequest {
            owner: Some(Owner {
                organisation_weight: weight,
                ..owner(1)
            }),
            ..ask("a", 1)
        };
        let error = refusal(pool.generate(request).await.map_err(tonic::Status::from));
        assert_eq!(error.param.as_deref(), Some("owner.organisation_weight"));
    }
    pool.stop().await.unwrap();
}
