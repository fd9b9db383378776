//! The gRPC methods.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::{Stream, stream};
use helix_sched::{Owner, Scope};
use helix_wire::error::{Code, CoreError};
use helix_wire::v1::inference_server::{Inference, InferenceServer};
use helix_wire::v1::{
    Accepted, DetokenizeReply, DetokenizeRequest, GenerateFrame, GenerateRequest, PoolState,
    StopReply, StopRequest, TokenizeReply, TokenizeRequest, Usage, WatchRequest,
};
use tokio::sync::watch;
use tokio::time::{Sleep, sleep_until, timeout_at};
use tonic::{Request, Response, Status};
use tracing::info;

use crate::encode::{Encoded, encode_all};
use crate::inbox::{Command, Leave, Load};
use crate::outbox::Outbox;
use crate::owner::{scope, share};
use crate::pool::Shared;
use crate::request::{
    Job, MAX_ID_BYTES, Prompt, Wishes, check_input, check_model, grpc_timeout, known, room, timeout,
};

/// Least time between two states of one watcher: counts change with every step.
const WATCH_PAUSE: Duration = Duration::from_millis(20);
/// A watcher hears at least this often while requests run.
const WATCH_BEAT: Duration = Duration::from_secs(1);
/// Tokens of one detokenise call.
const MAX_DETOKENIZE: usize = 1 << 20;

pub(crate) struct Service {
    shared: Arc<Shared>,
}

impl Service {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(crate) fn into_server(self) -> InferenceServer<Self> {
        let limit = self.shared.options.max_message_bytes;
        InferenceServer::new(self).max_decoding_message_size(limit)
    }

    /// Checks, tokenises and queues a request.
    async fn admit(
        &self,
        request: GenerateRequest,
        arrival: Instant,
        grpc: Option<Duration>,
    ) -> Result<Answer, CoreError> {
        let shared = &self.shared;
        let capacity = shared.inbox.capacity()?;
        check_model(&request.model, &shared.options)?;
        let wishes = Wishes::check(&request, capacity)?;
        let number = shared.next_number();
        let scope = scope(request.owner.as_ref(), number)?;
        let owner = share(request.owner.as_ref())?;
        let count = request.inputs.len();
        for (index, input) in request.inputs.iter().enumerate() {
            check_input(input, capacity, shared.longest_token)
                .map_err(|error| of_prompt(error, index, count))?;
        }
        let limit = timeout(request.timeout_ms, grpc, shared.options.default_timeout);
        let deadline = arrival + limit;
        let encoding = encode_all(
            &shared.text,
            &shared.tokenisers,
            request.inputs,
            true,
            capacity.max_len,
        );
        let encoded = timeout_at(deadline.into(), encoding)
            .await
            .map_err(|_| shared.late())??;
        let mut prompts = Vec::with_capacity(count);
        for (index, input) in encoded.into_iter().enumerate() {
            let prompt = known(&input.ids, capacity.vocab_size, input.param)
                .and_then(|()| self.prompt(input, request.max_tokens, capacity.max_len, &wishes));
            prompts.push(prompt.map_err(|error| of_prompt(error, index, count))?);
        }
        if !request.stream {
            wishes.check_held(&prompts)?;
        }
        let prepared = Prepared {
            number,
            owner,
            scope,
            request_id: request.request_id,
            stream: request.stream,
            arrival,
            deadline,
            prompts,
            wishes,
        };
        self.submit(prepared)
    }

    /// Queues a request that was checked.
    fn submit(&self, prepared: Prepared) -> Result<Answer, CoreError> {
        let shared = &self.shared;
        let Prepared {
            number,
            arrival,
            deadline,
            ..
        } = prepared;
        let accepted = Accepted {
            model: shared.options.model_id.clone(),
            prompt_tokens: prepared
                .prompts
                .iter()
                .map(|prompt| u32::try_from(prompt.ids.len()).unwrap_or(u32::MAX))
                .collect(),
            call: shared.name(number),
        };
        let outbox = Arc::new(Outbox::new(
            accepted,
            prepared.prompts.len() * prepared.wishes.n,
            shared.options.stream_frames,
            prepared.stream,
            arrival,
        ));
        let job = Job {
            number,
            arrival,
            deadline,
            owner: prepared.owner,
            scope: prepared.scope,
            prompts: prepared.prompts,
            wishes: prepared.wishes,
            outbox: Arc::clone(&outbox),
        };
        let load = Load::of(&job);
        // Before the job is queued, so that the pool never looks idle while it holds one.
        let name = shared.enter(number, Arc::clone(&outbox));
        if let Err(refused) = shared.inbox.submit(job) {
            shared.forget(name);
            return Err(refused);
        }
        shared.count_accepted();
        Ok(Answer {
            number,
            name,
            request_id: prepared.request_id,
            outbox,
            load,
            deadline: Some(Box::pin(sleep_until(deadline.into()))),
            shared: Arc::clone(shared),
            usage: None,
            error: None,
        })
    }

    /// When the caller of a short call has waited long enough.
    fn deadline<T>(&self, request: &Request<T>) -> Instant {
        Instant::now() + timeout(0, grpc_limit(request), self.shared.options.default_timeout)
    }

    fn prompt(
        &self,
        input: Encoded,
        max_tokens: Option<u32>,
        max_len: usize,
        wishes: &Wishes,
    ) -> Result<Prompt, CoreError> {
        let max_new = room(input.ids.len(), max_tokens, max_len, input.param)?;
        let mut detokenizer = self.shared.text.detokenizer();
        if wishes.show_special {
            detokenizer = detokenizer.with_special();
        }
        let mut echo = input.text.filter(|_| wishes.echo);
        if wishes.echo && echo.is_none() {
            // What a prompt's last tokens leave of a character comes with the answer, not twice.
            detokenizer.echo(&input.ids, echo.get_or_insert_default());
        } else {
            detokenizer.prime(&input.ids);
        }
        Ok(Prompt {
            shared: self.shared.public.of(&input.ids),
            ids: input.ids,
            max_new,
            echo,
            detokenizer,
        })
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Answer;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<PoolState, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Answer>, Status> {
        let arrival = Instant::now();
        let grpc = grpc_limit(&request);
        let request = request.into_inner();
        let request_id = request.request_id.clone();
        match self.admit(request, arrival, grpc).await {
            Ok(answer) => Ok(Response::new(answer)),
            Err(error) => {
                self.shared.count_refused();
                info!(
                    request_id = shown(&request_id),
                    outcome = error.code.as_str(),
                    "request refused"
                );
                Err(error.into())
            }
        }
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopReply>, Status> {
        // One that has ended meanwhile needs no end.
        if let Some(number) = self.shared.named(request.get_ref().call) {
            self.shared.inbox.send(Command::Stop(number));
        }
        Ok(Response::new(StopReply {}))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeReply>, Status> {
        let shared = &self.shared;
        let deadline = self.deadline(&request);
        let request = request.into_inner();
        let capacity = shared.inbox.capacity()?;
        check_model(&request.model, &shared.options)?;
        let inputs: Vec<_> = request.input.into_iter().collect();
        for input in &inputs {
            check_input(input, capacity, shared.longest_token)?;
        }
        let encoding = encode_all(
            &shared.text,
            &shared.tokenisers,
            inputs,
            request.add_special_tokens,
            usize::MAX,
        );
        let encoded = timeout_at(deadline.into(), encoding)
            .await
            .map_err(|_| shared.late())??;
        let Some(input) = encoded.into_iter().next() else {
            return Err(CoreError::invalid(
                "prompt",
                "there is nothing to tokenize; send a prompt or messages",
            )
            .into());
        };
        let max_model_len = u32::try_from(capacity.max_len).unwrap_or(u32::MAX);
        Ok(Response::new(TokenizeReply {
            tokens: input.ids.to_vec(),
            max_model_len,
        }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeReply>, Status> {
        let deadline = self.deadline(&request);
        let request = request.into_inner();
        let vocab = self.shared.inbox.capacity()?.vocab_size;
        check_model(&request.model, &self.shared.options)?;
        if request.tokens.len() > MAX_DETOKENIZE {
            let message = format!(
                "{} tokens are given; at most {MAX_DETOKENIZE} are decoded",
                request.tokens.len()
            );
            return Err(CoreError::invalid("tokens", message).into());
        }
        known(&request.tokens, vocab, "tokens")?;
        let text = self.shared.text.clone();
        let work = tokio::task::spawn_blocking(move || text.decode(&request.tokens));
        let text = timeout_at(deadline.into(), work)
            .await
            .map_err(|_| self.shared.late())?
            .map_err(|error| CoreError::new(Code::Internal, error.to_string()))?;
        Ok(Response::new(DetokenizeReply { text }))
    }

    async fn watch(
        &self,
        _request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let watcher = (
            self.shared.state.subscribe(),
            self.shared.closed.subscribe(),
            true,
        );
        let states = stream::unfold(watcher, |(mut state, mut closed, first)| async move {
            if !first {
                tokio::select! {
                    () = next_state(&mut state) => {}
                    _ = closed.wait_for(|closed| *closed) => return None,
                }
            }
            let now = state.borrow_and_update().clone();
            Some((Ok(now), (state, closed, false)))
        });
        Ok(Response::new(Box::pin(states)))
    }
}

/// A request that was checked and tokenised.
struct Prepared {
    number: u64,
    owner: Owner,
    scope: Scope,
    request_id: String,
    stream: bool,
    arrival: Instant,
    deadline: Instant,
    prompts: Vec<Prompt>,
    wishes: Wishes,
}

/// The time that the header `grpc-timeout` gives.
fn grpc_limit<T>(request: &Request<T>) -> Option<Duration> {
    let value = request.metadata().get("grpc-timeout")?;
    grpc_timeout(value.to_str().ok()?)
}

/// Says which of several prompts is at fault.
fn of_prompt(error: CoreError, index: usize, count: usize) -> CoreError {
    if count > 1 {
        error.with_param(format!("prompt[{index}]"))
    } else {
        error
    }
}

/// Waits for a change, or for the next beat while requests run.
async fn next_state(state: &mut watch::Receiver<PoolState>) {
    tokio::time::sleep(WATCH_PAUSE).await;
    let busy = state.borrow().running > 0;
    if busy {
        // No change within the beat: the state is sent again as it is.
        let _ = tokio::time::timeout(WATCH_BEAT, state.changed()).await;
    } else if state.changed().await.is_err() {
        // The pool is gone; its closing ends the stream.
        std::future::pending::<()>().await;
    }
}

/// A request id that was not checked, as far as it fits into a log line.
fn shown(request_id: &str) -> &str {
    if request_id.len() <= MAX_ID_BYTES {
        request_id
    } else {
        "(too long)"
    }
}

/// One request's frames. Dropping it cancels whatever still runs.
pub(crate) struct Answer {
    number: u64,
    name: u64,
    request_id: String,
    outbox: Arc<Outbox>,
    /// What the request has in the queue while it waits.
    load: Load,
    /// Until the request has a slot: kept here, so that it passes even while the engine thread stands still.
    deadline: Option<Pin<Box<Sleep>>>,
    shared: Arc<Shared>,
    usage: Option<Usage>,
    error: Option<Code>,
}

impl Stream for Answer {
    type Item = Result<GenerateFrame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut taken = self.outbox.poll(cx);
        if taken.poll.is_pending() && self.is_late(cx) {
            taken = self.outbox.poll(cx);
        }
        if taken.resume {
            self.shared.inbox.send(Command::Unpark(self.number));
        }
        match &taken.poll {
            Poll::Ready(Some(Ok(frame))) => {
                self.deadline = None;
                self.usage = frame.usage.or(self.usage);
            }
            Poll::Ready(Some(Err(error))) => self.error = Some(error.code),
            _ => {}
        }
        taken
            .poll
            .map(|item| item.map(|frame| frame.map_err(Status::from)))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.outbox.close() {
            self.shared
                .leave(self.number, &self.outbox, self.load, Leave::Cancelled);
        }
        self.shared.forget(self.name);
        self.log();
    }
}

impl Answer {
    /// Ends a request whose deadline has passed while it waits.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(deadline) = &mut self.deadline else {
            return false;
        };
        if deadline.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.deadline = None;
        let late = self.outbox.expire(self.shared.late());
        if late {
            self.shared
                .leave(self.number, &self.outbox, self.load, Leave::Late);
        }
        late
    }

    /// One line per request, written here and not on the engine thread, which must not wait for a pipe.
    fn log(&self) {
        let usage = self.usage.unwrap_or_default();
        let outcome = match (self.error, self.usage) {
            (Some(code), _) => code.as_str(),
            (None, Some(_)) => "finished",
            (None, None) => Code::Cancelled.as_str(),
        };
        info!(
            request_id = self.request_id,
            outcome,
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens,
            completion_tokens = usage.completion_tokens,
            queue_us = usage.queue_us,
            first_token_us = usage.first_token_us,
            total_us = usage.total_us,
            "request"
        );
    }
}
