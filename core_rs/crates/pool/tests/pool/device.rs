//! Engines that choose tokens themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use helix_pool::{Batch, Candidates, Capacity, RunError, StepEngine};
use helix_sample::{CANDIDATES, History, Params, Sampler};
use helix_wire::error::Code;
use helix_wire::v1::{GenerateRequest, Input, LogitBias, Sampling, input::Kind};
use proptest::prelude::*;

use crate::harness::{Alphabet, Answer, Running, VOCAB, ask, collect, greedy, options, start};

/// What came of the rows that a [`Device`] was asked for.
#[derive(Default)]
struct Rows {
    chosen: AtomicUsize,
    undecided: AtomicUsize,
    on_host: AtomicUsize,
}

/// Chooses by the sampling part of the batch. Every `open`th row that it could choose from it leaves open.
struct Device {
    model: Alphabet,
    sampler: Sampler,
    open: usize,
    tokens: Vec<i32>,
    logits: Vec<f32>,
    rows: Arc<Rows>,
}

impl Device {
    fn new(model: Alphabet, open: usize, rows: &Arc<Rows>) -> Self {
        Self {
            model,
            sampler: Sampler::new(),
            open,
            tokens: Vec::new(),
            logits: Vec::new(),
            rows: Arc::clone(rows),
        }
    }

    /// The token of a row, or -1.
    fn choose(&mut self, batch: &Batch, row: usize, logits: &[f32]) -> i32 {
        let sampling = batch.sampling.as_ref().unwrap();
        if sampling.on_host[row] {
            self.rows.on_host.fetch_add(1, Ordering::Relaxed);
            return -1;
        }
        let chosen = self.rows.chosen.fetch_add(1, Ordering::Relaxed);
        if chosen % self.open == self.open - 1 {
            self.rows.undecided.fetch_add(1, Ordering::Relaxed);
            return -1;
        }
        let inverse = sampling.inverse_temperature[row];
        let params = Params {
            temperature: if inverse > 0.0 { 1.0 / inverse } else { 0.0 },
            top_p: sampling.top_p[row],
            top_k: u32::try_from(sampling.top_k[row]).unwrap(),
            min_p: sampling.min_p[row],
            seed: sampling.seed[row],
            ..Params::default()
        };
        assert!(params.top_k as usize <= CANDIDATES);
        let position = sampling.position[row].cast_unsigned();
        self.sampler
            .sample(logits, &params, &History::default(), position)
            .unwrap()
            .cast_signed()
    }
}

impl StepEngine for Device {
    type Error = String;

    fn capacity(&mut self) -> Result<Capacity, String> {
        Ok(Capacity {
            candidates: CANDIDATES,
            ..self.model.capacity()?
        })
    }

    fn copy_prefix(&mut self, src: usize, dst: usize, len: usize) -> Result<(), String> {
        self.model.copy_prefix(src, dst, len)
    }

    fn step(&mut self, batch: &Batch) -> Result<Candidates<'_>, String> {
        let Candidates::Logits(all) = self.model.step(batch)? else {
            panic!("the model gives logits")
        };
        let all = all.to_vec();
        self.tokens.clear();
        self.logits.clear();
        for (index, logits) in all.chunks(VOCAB).enumerate() {
            let token = self.choose(batch, index, logits);
            self.tokens.push(token);
            if token < 0 {
                self.logits.extend(logits);
            }
        }
        // All three forms.
        Ok(if self.logits.is_empty() {
            Candidates::Tokens(&self.tokens)
        } else if self.logits.len() == all.len() {
            Candidates::Logits(&self.logits)
        } else {
            Candidates::Mixed {
                tokens: &self.tokens,
                logits: &self.logits,
            }
        })
    }
}

fn sampling() -> impl Strategy<Value = Sampling> {
    // Reciprocals that survive being inverted twice, so that rounding decides nothing.
    let stable = |t: &f32| (1.0 / (1.0 / (1.0 / t))).to_bits() == (1.0 / t).to_bits();
    let temperature = prop_oneof![
        1 => Just(0.0),
        2 => (0.25_f32..4.0).prop_filter("unstable reciprocal", stable)
    ];
    let mostly =
        |neutral: f32, other: std::ops::Range<f32>| prop_oneof![3 => Just(neutral), 1 => other];
    (
        temperature,
        prop_oneof![2 => Just(1.0_f32), 2 => 0.05_f32..1.0, 1 => Just(0.0)],
        prop::sample::select(vec![0_u32, 0, 1, 5, 40, 64, 65, 200, 258, 1000]),
        mostly(0.0, 0.0..0.5),
        mostly(0.0, -2.0..2.0),
        mostly(0.0, -2.0..2.0),
        mostly(1.0, 0.5..2.0),
        any::<u64>(),
        prop_oneof![3 => Just(None), 1 => (0..257_u32, -9.0_f32..9.0).prop_map(Some)],
    )
        .prop_map(|drawn| {
            let (temperature, top_p, top_k, min_p, presence, frequency, repetition, seed, bias) =
                drawn;
            Sampling {
                temperature,
                top_p,
                top_k,
                min_p,
                presence_penalty: presence,
                frequency_penalty: frequency,
                repetition_penalty: repetition,
                seed: Some(seed),
                logit_bias: bias
                    .into_iter()
                    .map(|(token, bias)| LogitBias { token, bias })
                    .collect(),
            }
        })
}

fn request() -> impl Strategy<Value = GenerateRequest> {
    (
        prop::collection::vec("[a-z?]{1,40}", 1..3),
        0_u32..20,
        1_u32..4,
        sampling(),
        prop_oneof![3 => Just(None), 1 => (0_u32..4).prop_map(Some)],
        prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec("[a-z]{1,3}", 1..3)],
        any::<[bool; 3]>(),
    )
        .prop_map(|drawn| {
            let (prompts, max_tokens, n, sampling, logprobs, stop, [echo, ignore_eos, stream]) =
                drawn;
            let input = |text| Input {
                kind: Some(Kind::Text(text)),
            };
            GenerateRequest {
                inputs: prompts.into_iter().map(input).collect(),
                n,
                sampling: Some(sampling),
                logprobs,
                stop,
                echo,
                ignore_eos,
                stream,
                ..ask("", max_tokens)
            }
        })
}

/// Answers to requests that run at the same time.
async fn answers(pool: &Running, requests: &[GenerateRequest]) -> Vec<Answer> {
    let all = requests.iter().map(|request| {
        let mut client = pool.client.clone();
        let request = request.clone();
        tokio::spawn(async move {
            let stream = client.generate(request).await.unwrap().into_inner();
            collect(stream).await
        })
    });
    let mut answers = Vec::new();
    for task in all.collect::<Vec<_>>() {
        answers.push(task.await.unwrap());
    }
    answers
}

#[test]
fn an_engine_that_chooses_gives_the_answers_of_one_that_does_not() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let rows = Arc::new(Rows::default());
    let (plain, device) = runtime.block_on(async {
        (
            start(Alphabet::new(6, 64), options()).await,
            start(Device::new(Alphabet::new(6, 64), 5, &rows), options()).await,
        )
    });
    let config = ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(requests in prop::collection::vec(request(), 1..5))| {
        let (expected, given) = runtime.block_on(async {
            (answers(&plain, &requests).await, answers(&device, &requests).await)
        });
        for (expected, given) in expected.iter().zip(&given) {
            prop_assert_eq!(&given.error, &None);
            prop_assert_eq!(&given.texts, &expected.texts);
            prop_assert_eq!(&given.reasons, &expected.reasons);
            prop_assert_eq!(&given.logprobs, &expected.logprobs);
            prop_assert_eq!(given.tokens, expected.tokens);
            let counted = |answer: &Answer| answer.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
            prop_assert_eq!(counted(given), counted(expected));
        }
    });
    for (count, what) in [
        (&rows.chosen, "chosen"),
        (&rows.undecided, "undecided"),
        (&rows.on_host, "on the host"),
    ] {
        let count = count.load(Ordering::Relaxed);
        assert!(count > 100, "{count} rows were {what}");
    }
    runtime.block_on(async {
        plain.stop().await.unwrap();
        device.stop().await.unwrap();
    });
}

/// Eight candidates; every step gives the same result, and the batches can be looked at.
struct Fixed {
    model: Alphabet,
    result: Option<Candidates<'static>>,
    batches: Sender<Batch>,
}

impl Fixed {
    fn new(result: Option<Candidates<'static>>) -> (Self, Receiver<Batch>) {
        let (batches, seen) = channel();
        let model = Alphabet::new(2, 64);
        let engine = Self {
            model,
            result,
            batches,
        };
        (engine, seen)
    }
}

impl StepEngine for Fixed {
    type Error = String;

    fn capacity(&mut self) -> Result<Capacity, String> {
        Ok(Capacity {
            candidates: 8,
            ..self.model.capacity()?
        })
    }

    fn copy_prefix(&mut self, src: usize, dst: usize, len: usize) -> Result<(), String> {
        self.model.copy_prefix(src, dst, len)
    }

    fn step(&mut self, batch: &Batch) -> Result<Candidates<'_>, String> {
        self.batches.send(batch.clone()).unwrap();
        match self.result {
            Some(result) => Ok(result),
            None => self.model.step(batch),
        }
    }
}

async fn refused(request: GenerateRequest, result: Candidates<'static>) -> String {
    let (engine, _seen) = Fixed::new(Some(result));
    let mut pool = start(engine, options()).await;
    let answer = pool.answer(request).await;
    assert_eq!(answer.error.unwrap().code, Code::EngineFailed);
    match pool.engine.take().unwrap().join().unwrap() {
        Err(RunError::Pool(error)) => error.message,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn wrong_results_are_found_out() {
    let mixed = |tokens, logits| Candidates::Mixed { tokens, logits };
    for (result, words) in [
        (
            mixed(&[98, 98], &[]),
            "the engine returned 2 tokens for 1 rows",
        ),
        (
            mixed(&[-1], &[0.0; 257]),
            "the engine returned 257 logits for 1 rows of 258",
        ),
        (
            mixed(&[98], &[0.0; VOCAB]),
            "the engine returned 258 logits for 0 rows of 258",
        ),
        (
            mixed(&[-2], &[]),
            "the engine returned token -2; its vocabulary has 258 tokens",
        ),
        (
            Candidates::Tokens(&[-1]),
            "the engine returned token -1; its vocabulary has 258 tokens",
        ),
    ] {
        assert_eq!(refused(ask("a", 3), result).await, words);
    }
}

fn with(change: impl FnOnce(&mut Sampling)) -> GenerateRequest {
    let mut sampling = Sampling {
        temperature: 0.5,
        seed: Some(7),
        ..greedy()
    };
    change(&mut sampling);
    GenerateRequest {
        sampling: Some(sampling),
        ..ask("a", 1)
    }
}

#[tokio::test]
async fn rows_that_need_the_host_sampler_are_marked() {
    let bias = LogitBias {
        token: 97,
        bias: 1.0,
    };
    for request in [
        with(|sampling| sampling.logit_bias.push(bias)),
        with(|sampling| sampling.presence_penalty = 0.5),
        with(|sampling| sampling.frequency_penalty = 0.5),
        with(|sampling| sampling.repetition_penalty = 0.5),
        with(|sampling| sampling.top_k = 9),
        with(|sampling| sampling.top_k = 257),
        GenerateRequest {
            logprobs: Some(0),
            ..with(|_| ())
        },
    ] {
        for result in [
            Candidates::Tokens(&[98]),
            Candidates::Mixed {
                tokens: &[98],
                logits: &[],
            },
        ] {
            assert_eq!(
                refused(request.clone(), result).await,
                "the engine chose token 98 for row 0, of which it was to give the logits"
            );
        }
    }
    let (engine, seen) = Fixed::new(None);
    let mut pool = start(engine, options()).await;
    for request in [
        with(|_| ()),
        with(|sampling| sampling.top_k = 8),
        with(|sampling| sampling.top_k = 258),
        with(|sampling| (sampling.temperature, sampling.top_k) = (0.0, 9)),
        GenerateRequest {
            stop: vec!["x".into()],
            echo: true,
            ..with(|_| ())
        },
    ] {
        assert_eq!(pool.answer(request).await.error, None);
        assert_eq!(seen.recv().unwrap().sampling.unwrap().on_host, [false]);
    }
    pool.stop().await.unwrap();
}

#[tokio::test]
async fn a_batch_says_how_each_row_is_drawn() {
    let (engine, seen) = Fixed::new(None);
    let mut pool = start(engine, options()).await;
    let request = with(|sampling| {
        (sampling.top_p, sampling.top_k, sampling.min_p) = (0.0, 3, 0.25);
    });
    let request = GenerateRequest {
        max_tokens: Some(2),
        ..request
    };
    pool.answer(request.clone()).await;
    let expected = helix_pool::Sampling {
        inverse_temperature: vec![2.0],
        top_p: vec![f32::MIN_POSITIVE],
        top_k: vec![3],
        min_p: vec![0.25],
        seed: vec![7],
        position: vec![1],
        on_host: vec![false],
    };
    assert_eq!(seen.recv().unwrap().sampling.as_ref(), Some(&expected));
    let after = helix_pool::Sampling {
        position: vec![2],
        ..expected
    };
    assert_eq!(seen.recv().unwrap().sampling, Some(after));

    // A prompt whose rows are all wanted: three are looked at, the last one is drawn from as well.
    let mut echoed = GenerateRequest {
        inputs: ask("abcd", 1).inputs,
        echo: true,
        logprobs: Some(0),
        ..request
    };
    echoed.max_tokens = Some(1);
    pool.answer(echoed).await;
    let expected = helix_pool::Sampling {
        inverse_temperature: vec![0.0, 0.0, 0.0, 2.0],
        top_p: vec![1.0, 1.0, 1.0, f32::MIN_POSITIVE],
        top_k: vec![0, 0, 0, 3],
        min_p: vec![0.0, 0.0, 0.0, 0.25],
        seed: vec![0, 0, 0, 7],
        position: vec![1, 2, 3, 4],
        on_host: vec![true; 4],
    };
    assert_eq!(seen.recv().unwrap().sampling, Some(expected));
    pool.stop().await.unwrap();
}
