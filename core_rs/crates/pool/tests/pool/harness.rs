//! A checkpoint of single bytes, an engine that goes on with the alphabet, and a client.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use helix_pool::{Batch, Candidates, Capacity, Options, Pool, RunError, StepEngine};
use helix_text::TextModel;
use helix_wire::error::CoreError;
use helix_wire::server::{Listener, Server};
use helix_wire::v1::inference_client::InferenceClient;
use helix_wire::v1::{
    GenerateFrame, GenerateRequest, Input, Owner, Sampling, TokenLogprob, Usage, input::Kind,
};
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

pub(crate) const EOS: u32 = 256;
pub(crate) const VOCAB: usize = 258;

/// The characters that byte-level tokenisers give to the bytes 0..=255 (GPT-2).
fn byte_characters() -> Vec<char> {
    let mut spare = 256_u32..;
    (0..=255_u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => char::from_u32(spare.next().unwrap()).unwrap(),
        })
        .collect()
}

fn special(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    })
}

/// One token per byte; 256 ends the text.
pub(crate) fn model() -> TextModel {
    let vocab: serde_json::Map<_, _> = byte_characters()
        .into_iter()
        .enumerate()
        .map(|(id, c)| (c.to_string(), json!(id)))
        .collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(256, "<eos>"), special(257, "<turn>")],
        "normalizer": null, "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let config = json!({
        "eos_token": "<eos>",
        "chat_template": "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}",
    });
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    write("tokenizer.json", &tokenizer);
    write("tokenizer_config.json", &config);
    TextModel::load(dir.path()).unwrap()
}

/// After `a` comes `b`, after `z` comes `a`, after anything else the end; the other logits depend on
/// everything the slot's cache holds, so that a wrong cache shows.
pub(crate) struct Alphabet {
    pub(crate) slots: usize,
    pub(crate) max_len: usize,
    caches: Vec<Vec<(u32, u64)>>,
    logits: Vec<f32>,
    gate: Option<Receiver<()>>,
    fail_after: usize,
    broken: Arc<AtomicBool>,
    pub(crate) copies: Arc<AtomicUsize>,
}

impl Alphabet {
    pub(crate) fn new(slots: usize, max_len: usize) -> Self {
        Self {
            slots,
            max_len,
            caches: vec![Vec::new(); slots],
            logits: Vec::new(),
            gate: None,
            fail_after: usize::MAX,
            broken: Arc::default(),
            copies: Arc::default(),
        }
    }

    /// Every step waits for one message; a dropped sender lets it run free.
    pub(crate) fn gated(mut self) -> (Self, Sender<()>) {
        let (open, gate) = channel();
        self.gate = Some(gate);
        (self, open)
    }

    pub(crate) fn failing_after(mut self, steps: usize) -> Self {
        self.fail_after = steps;
        self
    }

    /// While the flag is set every logit is NaN.
    pub(crate) fn breaking(mut self, broken: &Arc<AtomicBool>) -> Self {
        self.broken = Arc::clone(broken);
        self
    }
}

fn scramble(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

pub(crate) fn after(token: u32) -> u32 {
    match u8::try_from(token) {
        Ok(b'z') => u32::from(b'a'),
        Ok(b'a'..=b'y') => token + 1,
        _ => EOS,
    }
}

/// Logits after a prefix with that hash and last token.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn row(hash: u64, token: u32) -> Vec<f32> {
    let noise = |id: u64| (scramble(hash ^ id) >> 40) as f32 / 8_388_608.0;
    let mut row: Vec<f32> = (0..VOCAB as u64).map(noise).collect();
    row[after(token) as usize] = 6.0;
    row
}

pub(crate) fn extend(hash: u64, token: u32) -> u64 {
    scramble(hash.wrapping_mul(31).wrapping_add(u64::from(token) + 1))
}

impl StepEngine for Alphabet {
    type Error = String;

    fn capacity(&mut self) -> Result<Capacity, String> {
        Ok(Capacity {
            slots: self.slots,
            max_len: self.max_len,
            vocab_size: VOCAB,
            candidates: 0,
        })
    }

    fn copy_prefix(&mut self, src: usize, dst: usize, len: usize) -> Result<(), String> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        self.caches[dst] = self.caches[src][..len].to_vec();
        Ok(())
    }

    fn step(&mut self, batch: &Batch) -> Result<Candidates<'_>, String> {
        if let Some(gate) = &self.gate
            && gate.recv().is_err()
        {
            self.gate = None;
        }
        if self.fail_after == 0 {
            return Err("out of memory".into());
        }
        self.fail_after -= 1;
        self.logits.clear();
        let mut tokens = batch.token_ids.iter();
        for (index, slot) in batch.slots.iter().enumerate() {
            let cache = &mut self.caches[usize::try_from(*slot).unwrap()];
            let count = usize::try_from(batch.counts[index]).unwrap();
            let wanted = usize::try_from(batch.wanted[index]).unwrap();
            cache.truncate(usize::try_from(batch.past[index]).unwrap());
            for position in 0..count {
                let token = tokens.next().unwrap().cast_unsigned();
                let hash = extend(cache.last().map_or(0, |last| last.1), token);
                cache.push((token, hash));
                if position + wanted >= count {
                    self.logits.extend(row(hash, token));
                }
            }
        }
        if self.broken.load(Ordering::Relaxed) {
            self.logits.fill(f32::NAN);
        }
        Ok(Candidates::Logits(&self.logits))
    }
}

/// Tokens instead of logits, as the scripted engine gives them: `x` for ever.
pub(crate) struct Chosen(pub(crate) Vec<i32>);

impl StepEngine for Chosen {
    type Error = String;

    fn capacity(&mut self) -> Result<Capacity, String> {
        Ok(Capacity {
            slots: 4,
            max_len: 64,
            vocab_size: VOCAB,
            candidates: 0,
        })
    }

    fn copy_prefix(&mut self, _: usize, _: usize, _: usize) -> Result<(), String> {
        Ok(())
    }

    fn step(&mut self, batch: &Batch) -> Result<Candidates<'_>, String> {
        self.0 = vec![i32::from(b'x'); batch.rows()];
        Ok(Candidates::Tokens(&self.0))
    }
}

pub(crate) type Ran = Result<(), RunError<String>>;

/// A pool that serves on a free loopback port.
pub(crate) struct Running {
    pub(crate) pool: Pool,
    pub(crate) server: Option<Server>,
    pub(crate) engine: Option<JoinHandle<Ran>>,
    pub(crate) client: InferenceClient<Channel>,
    pub(crate) channel: Channel,
}

pub(crate) fn options() -> Options {
    Options {
        aliases: vec!["gpt-4".into()],
        step_tokens: 64,
        ..Options::new("alphabet")
    }
}

pub(crate) async fn start(
    engine: impl StepEngine<Error = String> + Send + 'static,
    options: Options,
) -> Running {
    let pool = Pool::new(model(), options);
    let listener = Listener::bind("127.0.0.1:0", None).await.unwrap();
    let server = pool.serve(listener).await.unwrap();
    let uri = format!("http://{}", server.address());
    let channel = Channel::from_shared(uri).unwrap().connect().await.unwrap();
    let client = InferenceClient::new(channel.clone()).max_decoding_message_size(usize::MAX);
    let mut running = Running {
        engine: None,
        server: Some(server),
        client,
        channel,
        pool,
    };
    running.run(engine).await;
    running
}

impl Running {
    /// Starts an engine thread and waits until the pool is ready.
    pub(crate) async fn run(
        &mut self,
        mut engine: impl StepEngine<Error = String> + Send + 'static,
    ) {
        let pool = self.pool.clone();
        self.engine = Some(std::thread::spawn(move || pool.run(&mut engine)));
        self.watched(|state| state.ready).await;
    }

    /// Waits until a watcher sees such a state.
    pub(crate) async fn watched(&mut self, wanted: impl Fn(&helix_wire::v1::PoolState) -> bool) {
        let mut states = self
            .client
            .watch(helix_wire::v1::WatchRequest {})
            .await
            .unwrap()
            .into_inner();
        let seen = async { while !wanted(&states.message().await.unwrap().unwrap()) {} };
        tokio::time::timeout(Duration::from_secs(10), seen)
            .await
            .expect("the pool never got there");
    }

    pub(crate) async fn generate(
        &mut self,
        request: GenerateRequest,
    ) -> Result<Streaming<GenerateFrame>, CoreError> {
        self.client
            .generate(request)
            .await
            .map(tonic::Response::into_inner)
            .map_err(CoreError::from)
    }

    pub(crate) async fn answer(&mut self, request: GenerateRequest) -> Answer {
        let stream = self.generate(request).await.unwrap();
        collect(stream).await
    }

    /// Stops everything and returns how the engine loop ended.
    pub(crate) async fn stop(mut self) -> Ran {
        self.pool.stop();
        let engine = self.engine.take().unwrap();
        let ran = tokio::task::spawn_blocking(move || engine.join().unwrap())
            .await
            .unwrap();
        self.server
            .take()
            .unwrap()
            .stop(Duration::from_secs(2))
            .await;
        ran
    }
}

/// Everything one call gave.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) texts: Vec<String>,
    pub(crate) reasons: Vec<i32>,
    pub(crate) logprobs: Vec<Vec<TokenLogprob>>,
    pub(crate) frames: usize,
    pub(crate) tokens: u32,
    pub(crate) usage: Option<Usage>,
    pub(crate) error: Option<CoreError>,
}

impl Answer {
    fn room(&mut self, choice: u32) -> usize {
        let index = choice as usize;
        while self.texts.len() <= index {
            self.texts.push(String::new());
            self.reasons.push(0);
            self.logprobs.push(Vec::new());
        }
        index
    }

    pub(crate) fn take(&mut self, frame: GenerateFrame) {
        assert_eq!(
            frame.accepted.is_some(),
            self.frames == 0,
            "the first frame is the accepting one"
        );
        assert!(self.usage.is_none(), "nothing comes after the usage");
        self.frames += 1;
        if let Some(accepted) = frame.accepted {
            assert_eq!(accepted.model, "alphabet");
            self.prompt_tokens = accepted.prompt_tokens;
        }
        for delta in frame.deltas {
            let index = self.room(delta.choice);
            assert_eq!(self.reasons[index], 0, "text after the end");
            self.texts[index].push_str(&delta.text);
            self.logprobs[index].extend(delta.logprobs);
            self.tokens += delta.tokens;
        }
        for finished in frame.finished {
            let index = self.room(finished.choice);
            assert_eq!(self.reasons[index], 0, "a choice ended twice");
            self.reasons[index] = finished.reason;
        }
        self.usage = frame.usage;
    }
}

pub(crate) async fn collect(mut stream: Streaming<GenerateFrame>) -> Answer {
    let mut answer = Answer::default();
    loop {
        match tokio::time::timeout(Duration::from_secs(10), stream.message())
            .await
            .expect("the stream hangs")
        {
            Ok(Some(frame)) => answer.take(frame),
            Ok(None) => break,
            Err(status) => {
                answer.error = Some(CoreError::from(status));
                break;
            }
        }
    }
    assert_eq!(
        answer.usage.is_some(),
        answer.frames > 0,
        "what was accepted has a final frame: {answer:?}"
    );
    assert!(answer.frames > 0 || answer.error.is_some());
    assert!(
        answer.reasons.iter().all(|reason| *reason != 0),
        "a choice never ended"
    );
    answer
}

/// An organisation, by a number.
pub(crate) fn owner(number: u128) -> Owner {
    Owner {
        prefixes: number.to_be_bytes().to_vec(),
        organisation: number.to_be_bytes().to_vec(),
        ..Owner::default()
    }
}

/// Greedy, streaming, one choice.
pub(crate) fn ask(prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "test".into(),
        model: "alphabet".into(),
        inputs: vec![Input {
            kind: Some(Kind::Text(prompt.into())),
        }],
        n: 1,
        max_tokens: Some(max_tokens),
        sampling: Some(greedy()),
        stream: true,
        owner: Some(owner(1)),
        ..GenerateRequest::default()
    }
}

pub(crate) fn greedy() -> Sampling {
    Sampling {
        top_p: 1.0,
        repetition_penalty: 1.0,
        ..Sampling::default()
    }
}

/// Polls a condition that no event announces.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reached)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

pub(crate) fn refusal<T>(outcome: Result<T, Status>) -> CoreError {
    outcome.map(|_| ()).expect_err("was not refused").into()
}

/// Where test certificates are written.
pub(crate) fn write(dir: &Path, name: &str, pem: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join(name);
    std::fs::write(&path, pem).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}
