//! A pool that does what a test tells it to.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::Stream;
use helix_tls::ServerTls;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status};

use crate::client::{Generation, Options, PoolSet, State, Transport};
use crate::error::{Code, CoreError};
use crate::server::{Limits, Listener, Server, Services};
use crate::v1::inference_server::{Inference, InferenceServer};
use crate::v1::{self, FinishReason, GenerateFrame};

pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// How a pool answers `Generate`.
#[derive(Clone)]
pub(super) enum Answer {
    /// This many deltas, a stop, the usage.
    Text(u32),
    /// The call fails at once.
    Refuse(CoreError),
    /// Accepted, this many deltas, then the wire's ending of a failed call.
    Fail(u32, CoreError),
    /// Accepted, this many deltas, then nothing until it is stopped.
    Hang(u32),
    /// Not even accepted.
    Mute,
    /// Deltas of one KiB without end.
    Flood,
}

pub(super) struct Fake {
    pub(super) answer: Mutex<Answer>,
    pub(super) calls: AtomicUsize,
    /// Frames handed to the server.
    pub(super) sent: AtomicUsize,
    /// Calls that the client has dropped before their end.
    pub(super) cancelled: watch::Sender<usize>,
    pub(super) state: watch::Sender<v1::PoolState>,
    pub(super) seen_ids: Mutex<Vec<String>>,
    /// `grpc-timeout` of the calls, empty where there is none.
    pub(super) seen_timeouts: Mutex<Vec<String>>,
    /// `Watch` streams that were opened.
    pub(super) watches: AtomicUsize,
    /// A call is to end.
    stopped: tokio::sync::Notify,
}

type Frames = Pin<Box<dyn Stream<Item = Result<GenerateFrame, Status>> + Send>>;
type States = Pin<Box<dyn Stream<Item = Result<v1::PoolState, Status>> + Send>>;

pub(super) fn model(id: &str, alias: &str) -> v1::ModelInfo {
    v1::ModelInfo {
        id: id.into(),
        aliases: vec![alias.into()],
        created: 1,
        max_model_len: 100,
        vocab_size: 10,
        ..v1::ModelInfo::default()
    }
}

pub(super) fn ready(models: &[v1::ModelInfo]) -> v1::PoolState {
    v1::PoolState {
        ready: true,
        models: models.to_vec(),
        slots: 4,
        ..Default::default()
    }
}

pub(super) fn delta(text: &str) -> GenerateFrame {
    let delta = v1::Delta {
        choice: 0,
        text: text.into(),
        tokens: 1,
        logprobs: Vec::new(),
    };
    GenerateFrame {
        deltas: vec![delta],
        ..Default::default()
    }
}

fn accepted() -> GenerateFrame {
    GenerateFrame {
        accepted: Some(v1::Accepted {
            model: "m".into(),
            prompt_tokens: vec![3],
            call: 7,
        }),
        ..Default::default()
    }
}

fn finished(reason: FinishReason) -> GenerateFrame {
    let mut frame = GenerateFrame {
        usage: Some(v1::Usage::default()),
        ..Default::default()
    };
    frame.finished.push(v1::Finished {
        choice: 0,
        reason: reason.into(),
    });
    frame
}

impl Fake {
    async fn play(
        self: Arc<Self>,
        answer: Answer,
        out: mpsc::Sender<Result<GenerateFrame, Status>>,
    ) {
        let deltas = match &answer {
            Answer::Text(count) | Answer::Hang(count) | Answer::Fail(count, _) => *count,
            Answer::Flood => u32::MAX,
            Answer::Refuse(_) | Answer::Mute => 0,
        };
        let text = if matches!(answer, Answer::Flood) {
            "x".repeat(1024)
        } else {
            "t".into()
        };
        let first = (!matches!(answer, Answer::Mute)).then(accepted);
        let frames = first.into_iter().chain((0..deltas).map(|_| delta(&text)));
        for frame in frames {
            if out.send(Ok(frame)).await.is_err() {
                self.cancelled.send_modify(|count| *count += 1);
                return;
            }
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
        match answer {
            Answer::Fail(_, error) => {
                let _ = out.send(Ok(finished(FinishReason::Error))).await;
                let _ = out.send(Err(error.into())).await;
            }
            Answer::Hang(_) | Answer::Mute => {
                tokio::select! {
                    () = out.closed() => {}
                    () = self.stopped.notified() => {
                        let stopped = CoreError::new(Code::Cancelled, "stopped");
                        let _ = out.send(Ok(finished(FinishReason::Cancelled))).await;
                        let _ = out.send(Err(stopped.into())).await;
                        return;
                    }
                }
                self.cancelled.send_modify(|count| *count += 1);
            }
            _ => {
                let _ = out.send(Ok(finished(FinishReason::Stop))).await;
            }
        }
    }
}

#[tonic::async_trait]
impl Inference for Arc<Fake> {
    type GenerateStream = Frames;
    type WatchStream = States;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Frames>, Status> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let header = |name: &str| {
            let value = request.metadata().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let (id, timeout) = (header("x-request-id"), header("grpc-timeout"));
        self.seen_ids.lock().push(id.unwrap_or_default());
        self.seen_timeouts.lock().push(timeout.unwrap_or_default());
        let answer = self.answer.lock().clone();
        if let Answer::Refuse(error) = answer {
            return Err(error.into());
        }
        let (out, frames) = mpsc::channel(4);
        tokio::spawn(Arc::clone(self).play(answer, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }

    async fn stop(
        &self,
        request: Request<v1::StopRequest>,
    ) -> Result<Response<v1::StopReply>, Status> {
        assert_eq!(request.get_ref().call, 7, "the call that was accepted");
        self.stopped.notify_one();
        Ok(Response::new(v1::StopReply {}))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeReply>, Status> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if matches!(*self.answer.lock(), Answer::Mute) {
            std::future::pending::<()>().await;
        }
        if let Answer::Refuse(error) = self.answer.lock().clone() {
            return Err(error.into());
        }
        let special = u32::from(request.get_ref().add_special_tokens);
        Ok(Response::new(v1::TokenizeReply {
            tokens: vec![special, 7],
            max_model_len: 100,
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeReply>, Status> {
        Ok(Response::new(v1::DetokenizeReply {
            text: format!("{:?}", request.get_ref().tokens),
        }))
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<States>, Status> {
        self.watches.fetch_add(1, Ordering::Relaxed);
        Ok(Response::new(Box::pin(
            WatchStream::new(self.state.subscribe()).map(Ok),
        )))
    }
}

/// A fake pool and its server. Dropping it cuts every connection, as kill -9 does.
pub(super) struct Running {
    pub(super) fake: Arc<Fake>,
    pub(super) server: Server,
}

pub(super) fn fake(answer: Answer) -> Arc<Fake> {
    Arc::new(Fake {
        answer: Mutex::new(answer),
        calls: AtomicUsize::new(0),
        sent: AtomicUsize::new(0),
        cancelled: watch::Sender::new(0),
        state: watch::Sender::new(ready(&[model("m", "alias")])),
        seen_ids: Mutex::new(Vec::new()),
        seen_timeouts: Mutex::default(),
        watches: AtomicUsize::new(0),
        stopped: tokio::sync::Notify::new(),
    })
}

pub(super) async fn serve(fake: Arc<Fake>, listen: &str, tls: Option<Arc<ServerTls>>) -> Running {
    let listener = Listener::bind(listen, tls).await.unwrap();
    let services = Services::default().with(InferenceServer::new(Arc::clone(&fake)));
    let server = Server::start(listener, services, Limits::default())
        .await
        .unwrap();
    Running { fake, server }
}

impl Running {
    pub(super) async fn start(answer: Answer) -> Self {
        serve(fake(answer), "127.0.0.1:0", None).await
    }

    pub(super) fn address(&self) -> String {
        self.server.address().to_string()
    }

    pub(super) fn calls(&self) -> usize {
        self.fake.calls.load(Ordering::Relaxed)
    }

    pub(super) async fn saw_cancel(&self) {
        let mut cancelled = self.fake.cancelled.subscribe();
        tokio::time::timeout(LIMIT, cancelled.wait_for(|count| *count > 0))
            .await
            .expect("no cancel")
            .unwrap();
    }
}

pub(super) fn quick() -> Options {
    Options {
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        ..Options::default()
    }
}

/// A set over these pools, once each has the state that is given.
pub(super) async fn set_of(pools: &[&Running]) -> PoolSet {
    let addresses: Vec<String> = pools.iter().map(|pool| pool.address()).collect();
    let set = PoolSet::start(&addresses, &Transport::Plain, &quick()).unwrap();
    until(&set, |set| {
        set.pools().iter().all(|pool| pool.state == State::Ready)
    })
    .await;
    set
}

pub(super) async fn until(set: &PoolSet, done: impl Fn(&PoolSet) -> bool) {
    let mut changes = set.changes();
    let wait = async {
        while !done(set) {
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(LIMIT, wait)
        .await
        .unwrap_or_else(|_| panic!("never came: {:?}", set.pools()));
}

pub(super) fn request(model: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        request_id: "req-1".into(),
        model: model.into(),
        n: 1,
        ..Default::default()
    }
}

/// Reads a call to its end: how many `accepted`, the text, and the error.
pub(super) async fn drain(call: &mut Generation) -> (usize, String, Option<CoreError>) {
    let (mut accepted, mut text) = (0, String::new());
    let read = async {
        loop {
            match call.next().await {
                Ok(Some(frame)) => {
                    accepted += usize::from(frame.accepted.is_some());
                    frame
                        .deltas
                        .iter()
                        .for_each(|delta| text.push_str(&delta.text));
                }
                Ok(None) => return None,
                Err(error) => return Some(error),
            }
        }
    };
    let error = tokio::time::timeout(LIMIT, read)
        .await
        .expect("the call never ended");
    (accepted, text, error)
}

pub(super) fn error(code: Code) -> CoreError {
    CoreError::new(code, format!("scripted {code}"))
}
