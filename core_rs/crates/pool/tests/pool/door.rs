//! What is refused, and how.

use std::time::Duration;

use helix_pool::Options;
use helix_wire::error::{Code, CoreError};
use helix_wire::v1::{
    Chat, ChatMessage, GenerateRequest, Input, TokenIds, WatchRequest, input::Kind,
};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use crate::harness::{Alphabet, Running, ask, collect, options, refusal, start, until};

async fn refused(pool: &mut Running, request: GenerateRequest) -> CoreError {
    refusal(pool.client.generate(request).await)
}

#[tokio::test]
async fn wrong_requests_are_refused_with_a_reason() {
    let mut pool = start(Alphabet::new(1, 16), options()).await;
    let error = refused(
        &mut pool,
        GenerateRequest {
            model: "gpt-9".into(),
            ..ask("a", 1)
        },
    )
    .await;
    assert_eq!(
        (error.code, error.param.as_deref()),
        (Code::ModelNotFound, Some("model"))
    );
    assert!(
        ["`gpt-9`", "`alphabet`", "`gpt-4`"]
            .iter()
            .all(|name| error.message.contains(name)),
        "{error}"
    );

    for (prompt, max_tokens) in [
        ("abcdefghijklmnop", Some(14)),
        ("abcdefghijklmnop", None),
        ("abcdefghijklmnopq", Some(0)),
    ] {
        let error = refused(
            &mut pool,
            GenerateRequest {
                max_tokens,
                ..ask(prompt, 0)
            },
        )
        .await;
        assert_eq!(error.code, Code::ContextLengthExceeded);
        assert!(
            error
                .message
                .starts_with("This model's maximum context length is 16 tokens. However, "),
            "{error}"
        );
    }
    let error = refused(&mut pool, ask(&"a".repeat(1_000_000), 1)).await;
    assert_eq!(error.code, Code::ContextLengthExceeded);

    let role = ChatMessage {
        role: "robot".into(),
        ..ChatMessage::default()
    };
    let chat = |messages| {
        Some(Kind::Chat(Chat {
            messages,
            add_generation_prompt: true,
            ..Chat::default()
        }))
    };
    let cases = [
        (None, "prompt"),
        (Some(Kind::Text(String::new())), "prompt"),
        (Some(Kind::Tokens(TokenIds { ids: vec![258] })), "prompt"),
        (chat(vec![]), "messages"),
        (chat(vec![role]), "messages[0].role"),
    ];
    for (kind, param) in cases {
        let error = refused(
            &mut pool,
            GenerateRequest {
                inputs: vec![Input { kind }],
                ..ask("", 1)
            },
        )
        .await;
        assert_eq!(
            (error.code, error.param.as_deref()),
            (Code::InvalidRequest, Some(param))
        );
    }
    let error = refused(&mut pool, ask(&"a".repeat(17 << 20), 1)).await;
    assert_eq!(error.code, Code::PayloadTooLarge);
    assert_eq!(pool.pool.stats().requests_accepted, 0);
    assert!(pool.pool.is_idle());
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let limited = Options {
        queue_requests: 2,
        queue_tokens: 20,
        ..options()
    };
    let mut pool = start(engine, limited).await;
    let running = pool.generate(ask("a", 3)).await.unwrap();
    pool.watched(|state| state.running == 1).await;
    let waiting = [
        pool.generate(ask("b", 3)).await.unwrap(),
        pool.generate(ask("c", 3)).await.unwrap(),
    ];
    let error = refused(&mut pool, ask("d", 3)).await;
    assert_eq!(
        (error.code, error.retry_after_s),
        (Code::QueueFull, Some(1))
    );
    let error = refused(&mut pool, ask(&"e".repeat(21), 3)).await;
    assert_eq!(
        error.code,
        Code::PayloadTooLarge,
        "no queue will ever hold it"
    );
    drop(open);
    assert_eq!(collect(running).await.texts, ["bcd"]);
    for (stream, text) in waiting.into_iter().zip(["cde", "def"]) {
        assert_eq!(collect(stream).await.texts, [text]);
    }
    let stats = pool.pool.stats();
    assert_eq!((stats.requests_accepted, stats.requests_refused), (3, 2));
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_deadline_ends_the_wait_and_not_the_work() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let mut pool = start(engine, options()).await;
    let running = pool
        .generate(GenerateRequest {
            timeout_ms: 40,
            ..ask("a", 3)
        })
        .await
        .unwrap();
    pool.watched(|state| state.running == 1).await;
    let by_field = pool
        .generate(GenerateRequest {
            timeout_ms: 30,
            ..ask("b", 3)
        })
        .await
        .unwrap();
    let mut by_header = tonic::Request::new(ask("c", 3));
    by_header
        .metadata_mut()
        .insert("grpc-timeout", "30m".parse().unwrap());
    let by_header = pool.client.generate(by_header).await.unwrap().into_inner();
    // The engine thread stands in a step all the time.
    for stream in [by_field, by_header] {
        let answer = collect(stream).await;
        assert_eq!(answer.error.unwrap().code, Code::DeadlineExceeded);
        assert_eq!(answer.frames, 0, "nothing was sent before");
    }
    assert_eq!(pool.pool.stats().queued, 0);
    drop(open);
    assert_eq!(
        collect(running).await.texts,
        ["bcd"],
        "what has begun goes on"
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_request_is_accepted_when_it_has_a_slot() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let mut pool = start(engine, options()).await;
    let mut running = pool.generate(ask("a", 2)).await.unwrap();
    let first = running.message().await.unwrap().unwrap();
    assert!(first.accepted.is_some() && first.deltas.is_empty());
    let mut waiting = pool.generate(ask("b", 1)).await.unwrap();
    open.send(()).unwrap();
    assert_eq!(running.message().await.unwrap().unwrap().deltas.len(), 1);
    tokio::select! {
        biased;
        early = waiting.message() => panic!("{early:?}"),
        () = tokio::task::yield_now() => {}
    }
    open.send(()).unwrap();
    let accepted = waiting.message().await.unwrap().unwrap().accepted.unwrap();
    assert_eq!(accepted.prompt_tokens, [1]);
    drop(open);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn who_leaves_the_queue_counts_no_more_at_once() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let limited = Options {
        queue_requests: 1,
        ..options()
    };
    let mut pool = start(engine, limited).await;
    let running = pool.generate(ask("a", 3)).await.unwrap();
    pool.watched(|state| state.running == 1).await;
    for _ in 0..3 {
        let waiting = pool.generate(ask("bb", 3)).await.unwrap();
        let stats = pool.pool.stats();
        assert_eq!((stats.queued, stats.queued_tokens), (1, 2));
        assert_eq!(refused(&mut pool, ask("c", 3)).await.code, Code::QueueFull);
        drop(waiting);
        // No step ends meanwhile.
        until("it has left", || pool.pool.stats().queued == 0).await;
        pool.watched(|state| state.queued == 0).await;
    }
    assert_eq!(pool.pool.stats().queued_tokens, 0);
    drop(open);
    assert_eq!(collect(running).await.texts, ["bcd"]);
    assert_eq!(pool.pool.stats().requests_cancelled, 3);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn who_leaves_the_scheduler_s_queue_counts_no_more_either() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let mut pool = start(engine, options()).await;
    let running = pool.generate(ask("a", 3)).await.unwrap();
    pool.watched(|state| state.running == 1).await;
    let waiting = pool.generate(ask("b", 3)).await.unwrap();
    open.send(()).unwrap(); // the engine thread takes it over, and stands in the next step
    pool.watched(|state| state.queued == 1).await;
    drop(waiting);
    pool.watched(|state| state.queued == 0).await;
    assert_eq!(pool.pool.stats().queued, 0);
    drop(open);
    assert_eq!(collect(running).await.texts, ["bcd"]);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn the_time_to_come_back_grows_with_the_queue() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let limited = Options {
        queue_requests: 40,
        ..options()
    };
    let mut pool = start(engine, limited).await;
    let mut all = vec![pool.generate(ask("a", 1)).await.unwrap()];
    pool.watched(|state| state.running == 1).await;
    for _ in 0..40 {
        all.push(pool.generate(ask("b", 1)).await.unwrap());
    }
    // Each step ends one request; a tenth of a second goes by for each.
    for left in (35..40).rev() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        open.send(()).unwrap();
        pool.watched(|state| state.queued == left).await;
    }
    while pool.pool.stats().queued < 40 {
        all.push(pool.generate(ask("b", 1)).await.unwrap());
    }
    let error = refused(&mut pool, ask("c", 1)).await;
    let seconds = error.retry_after_s.unwrap();
    assert!(
        (3..=60).contains(&seconds),
        "40 requests, at most 10 a second: {error:?}"
    );
    drop(open);
    for stream in all {
        assert_eq!(collect(stream).await.error, None);
    }
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn an_idle_pool_notices_a_deadline() {
    let mut pool = start(
        Alphabet::new(1, 1 << 20),
        Options {
            stream_frames: 1,
            ..options()
        },
    )
    .await;
    let mut unread = pool
        .generate(GenerateRequest {
            logprobs: Some(20),
            ..ask("a", 1_000_000)
        })
        .await
        .unwrap();
    until("parked", || pool.pool.stats().parked == 1).await;
    let waiting = pool
        .generate(GenerateRequest {
            timeout_ms: 20,
            ..ask("b", 3)
        })
        .await
        .unwrap();
    assert_eq!(
        collect(waiting).await.error.unwrap().code,
        Code::DeadlineExceeded
    );
    assert!(unread.message().await.unwrap().is_some());
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn draining_refuses_the_new_and_finishes_the_old() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let mut pool = start(engine, options()).await;
    let running = pool.generate(ask("a", 3)).await.unwrap();
    pool.watched(|state| state.running == 1 && state.ready)
        .await;
    pool.pool.drain();
    pool.watched(|state| state.draining && !state.ready).await;
    assert_eq!(refused(&mut pool, ask("b", 3)).await.code, Code::Draining);
    assert!(!pool.pool.is_idle());
    drop(open);
    assert_eq!(collect(running).await.texts, ["bcd"]);
    until("idle", || pool.pool.is_idle()).await;
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn health_and_reflection_answer() {
    let pool = start(Alphabet::new(1, 64), options()).await;
    let mut health = HealthClient::new(pool.channel.clone());
    let mut statuses = health
        .watch(HealthCheckRequest {
            service: "helixflow.v1.Inference".into(),
        })
        .await
        .unwrap();
    let wait_for = async |wanted: i32,
                          statuses: &mut tonic::Streaming<
        tonic_health::pb::HealthCheckResponse,
    >| { while statuses.message().await.unwrap().unwrap().status != wanted {} };
    wait_for(1, statuses.get_mut()).await;
    pool.pool.drain();
    wait_for(2, statuses.get_mut()).await;

    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let requests = futures_util::stream::iter([request]);
    let mut replies = ServerReflectionClient::new(pool.channel.clone())
        .server_reflection_info(requests)
        .await
        .unwrap()
        .into_inner();
    let reply: ServerReflectionResponse = replies.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = reply.message_response else {
        panic!("{reply:?}")
    };
    let names: Vec<_> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    assert!(
        names.contains(&"helixflow.v1.Inference".to_owned()),
        "{names:?}"
    );
    assert!(
        names.contains(&"grpc.health.v1.Health".to_owned()),
        "{names:?}"
    );
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_watcher_learns_the_model_and_the_end() {
    let mut pool = start(Alphabet::new(3, 64), options()).await;
    let mut states = pool
        .client
        .watch(WatchRequest {})
        .await
        .unwrap()
        .into_inner();
    let state = states.message().await.unwrap().unwrap();
    assert!(state.ready && !state.draining);
    assert_eq!(state.slots, 3);
    let model = &state.models[0];
    assert_eq!(
        (model.id.as_str(), model.aliases.as_slice()),
        ("alphabet", ["gpt-4".to_owned()].as_slice())
    );
    assert_eq!((model.max_model_len, model.vocab_size), (64, 258));
    pool.stop().await.unwrap();
    let ended = async { while states.message().await.unwrap().is_some() {} };
    tokio::time::timeout(Duration::from_secs(5), ended)
        .await
        .expect("the watch goes on");
}
