//! The engine breaks, or everything stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use helix_pool::{Options, Pool, RunError};
use helix_wire::error::{Code, CoreError};
use helix_wire::server::Listener;
use helix_wire::v1::inference_client::InferenceClient;
use helix_wire::v1::{FinishReason, GenerateRequest};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{Alphabet, ask, collect, model, options, refusal, start};

const ERROR: i32 = FinishReason::Error as i32;

#[tokio::test]
async fn a_failing_engine_ends_every_request_and_the_loop() {
    let (engine, open) = Alphabet::new(1, 64).failing_after(3).gated();
    let mut pool = start(engine, options()).await;
    let running = pool
        .generate(GenerateRequest {
            n: 2,
            ..ask("a", 10)
        })
        .await
        .unwrap();
    pool.watched(|state| state.running == 1).await;
    let waiting = pool.generate(ask("b", 10)).await.unwrap();
    drop(open);
    let answer = collect(running).await;
    assert_eq!(answer.texts[0], "bcd", "what was computed is delivered");
    assert_eq!(answer.reasons, [ERROR, ERROR]);
    assert_eq!(answer.error.unwrap().code, Code::EngineFailed);
    assert_eq!(
        collect(waiting).await.error.unwrap().code,
        Code::Unavailable
    );
    let ran = pool.engine.take().unwrap().join().unwrap();
    assert!(matches!(ran, Err(RunError::Engine(reason)) if reason == "out of memory"));
    pool.watched(|state| !state.ready && !state.draining).await;
    assert_eq!(
        refusal(pool.client.generate(ask("c", 1)).await).code,
        Code::Unavailable
    );

    pool.run(Alphabet::new(1, 64)).await;
    assert_eq!(
        pool.answer(ask("c", 3)).await.texts,
        ["def"],
        "another engine takes over"
    );
    assert_eq!(pool.pool.stats().requests_failed, 2);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_failing_engine_shows_in_the_health_service() {
    const NAME: &str = "helixflow.v1.Inference";
    let (engine, open) = Alphabet::new(1, 64).failing_after(1).gated();
    let mut pool = start(engine, options()).await;
    let mut health = HealthClient::new(pool.channel.clone());
    let request = HealthCheckRequest {
        service: NAME.into(),
    };
    let mut statuses = health.watch(request.clone()).await.unwrap().into_inner();
    let mut until = async |wanted: ServingStatus| {
        while statuses.message().await.unwrap().unwrap().status() != wanted {}
    };
    until(ServingStatus::Serving).await;
    let running = pool.generate(ask("a", 10)).await.unwrap();
    drop(open);
    assert_eq!(
        collect(running).await.error.unwrap().code,
        Code::EngineFailed
    );
    until(ServingStatus::NotServing).await;
    let reply = health.check(request).await.unwrap().into_inner();
    assert_eq!(reply.status(), ServingStatus::NotServing);
    pool.engine.take().unwrap().join().unwrap().unwrap_err();
    pool.run(Alphabet::new(1, 64)).await;
    until(ServingStatus::Serving).await;
    drop(statuses); // The server would wait for its end.
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn nonsense_logits_fail_the_request_and_not_the_engine() {
    let broken = Arc::new(AtomicBool::new(true));
    let mut pool = start(Alphabet::new(2, 64).breaking(&broken), options()).await;
    let answer = pool.answer(ask("a", 3)).await;
    assert_eq!(answer.error.unwrap().code, Code::EngineFailed);
    broken.store(false, Ordering::Relaxed);
    assert_eq!(pool.answer(ask("a", 3)).await.texts, ["bcd"]);
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_stands_still_is_noticed_from_outside() {
    let (engine, open) = Alphabet::new(1, 64).gated();
    let mut pool = start(engine, options()).await;
    let watching = pool.pool.clone();
    let watchdog = std::thread::spawn(move || watching.watch(Duration::from_millis(200)));
    let running = pool.generate(ask("a", 9)).await.unwrap();
    open.send(()).unwrap(); // one step, then none
    pool.watched(|state| state.running == 1).await;
    let waiting = pool.generate(ask("bcd", 9)).await.unwrap();
    let answer = collect(running).await;
    assert_eq!(answer.error.unwrap().code, Code::EngineFailed);
    assert_eq!(answer.reasons, [ERROR]);
    let usage = answer.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (1, 1));
    let answer = collect(waiting).await;
    assert_eq!(answer.error.unwrap().code, Code::EngineFailed);
    pool.watched(|state| !state.ready && state.reason == "engine_stuck")
        .await;
    assert_eq!(
        refusal(pool.client.generate(ask("c", 1)).await).code,
        Code::Unavailable
    );
    assert!(pool.pool.is_idle());
    let stuck = watchdog.join().unwrap().unwrap();
    assert_eq!((stuck.tokens, stuck.limit), (1, Duration::from_millis(200)));
    drop(open); // it comes back too late
    pool.engine.take().unwrap().join().unwrap().unwrap();
}

#[tokio::test]
async fn a_watchdog_ends_with_the_pool() {
    let mut pool = start(Alphabet::new(1, 64), options()).await;
    let watching = pool.pool.clone();
    let watchdog = std::thread::spawn(move || watching.watch(Duration::from_secs(60)));
    assert_eq!(pool.answer(ask("a", 3)).await.texts, ["bcd"]);
    pool.stop().await.unwrap();
    assert_eq!(watchdog.join().unwrap(), None);
}

struct Short;

impl helix_pool::StepEngine for Short {
    type Error = String;

    fn capacity(&mut self) -> Result<helix_pool::Capacity, String> {
        Ok(helix_pool::Capacity {
            slots: 1,
            max_len: 64,
            vocab_size: 300,
            candidates: 0,
        })
    }

    fn copy_prefix(&mut self, _: usize, _: usize, _: usize) -> Result<(), String> {
        Ok(())
    }

    fn step(&mut self, _: &helix_pool::Batch) -> Result<helix_pool::Candidates<'_>, String> {
        Ok(helix_pool::Candidates::Logits(&[0.0; 299]))
    }
}

#[tokio::test]
async fn an_engine_that_returns_too_little_is_found_out() {
    let mut pool = start(Short, options()).await;
    assert_eq!(
        pool.answer(ask("a", 3)).await.error.unwrap().code,
        Code::EngineFailed
    );
    let ran = pool.engine.take().unwrap().join().unwrap();
    let Err(RunError::Pool(error)) = ran else {
        panic!("{ran:?}")
    };
    assert_eq!(
        error.message,
        "the engine returned 299 logits for 1 rows of 300"
    );
}

#[tokio::test]
async fn stopping_cuts_with_a_final_frame() {
    let (engine, open) = Alphabet::new(1, 1 << 20).gated();
    let mut pool = start(engine, options()).await;
    let running = pool.generate(ask("a", 1_000_000)).await.unwrap();
    let waiting = pool.generate(ask("b", 3)).await.unwrap();
    pool.watched(|state| state.running == 1).await;
    pool.pool.stop();
    assert_eq!(
        refusal(pool.client.generate(ask("c", 1)).await).code,
        Code::Draining
    );
    drop(open);
    for (stream, reasons) in [(running, vec![ERROR]), (waiting, vec![])] {
        let answer = collect(stream).await;
        assert_eq!(
            (answer.reasons, answer.error.unwrap().code),
            (reasons, Code::Draining)
        );
    }
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_pool_without_an_engine_says_so() {
    let pool = Pool::new(model(), options());
    let server = pool
        .serve(Listener::bind("localhost:0", None).await.unwrap())
        .await
        .unwrap();
    let uri = format!("http://{}", server.address());
    let mut client = InferenceClient::new(Channel::from_shared(uri).unwrap().connect_lazy());
    let error: CoreError = refusal(client.generate(ask("a", 1)).await);
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("loaded"), "{error}");
}

#[tokio::test]
async fn one_engine_at_a_time() {
    let pool = start(Alphabet::new(1, 64), Options::new("alphabet")).await;
    let second = pool.pool.run(&mut Alphabet::new(1, 64));
    assert!(matches!(second, Err(RunError::Pool(error)) if error.code == Code::Internal));
    pool.stop().await.unwrap();
}
