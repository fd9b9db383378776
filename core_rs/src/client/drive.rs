//! The tasks behind calls: frames of a pool in, bytes of the API out.

use std::time::Duration;

use helix_text::openai::{
    ErrorObject, FinishReason, Piece, Renderer, TokenLogprob, Usage, detokenize_body, tokenize_body,
};
use helix_wire::client::{Caller, Generation};
use helix_wire::error::{Code, CoreError};
use helix_wire::v1;
use tokio::time::timeout;

use crate::call::{Finish, Running};

/// A call that is cancelled ends within this time, with the pool's counts or without.
const LAST_COUNTS: Duration = Duration::from_secs(1);

/// Reads a generation to its end, or until it is cancelled.
pub(super) async fn generate(
    running: Running,
    mut frames: Generation,
    mut renderer: Renderer,
    wake_accepted: bool,
) {
    let mut out = Vec::new();
    let mut finish = Finish::default();
    loop {
        let next = tokio::select! {
            next = frames.next() => next,
            () = running.cancelled() => {
                cancel(running, frames).await;
                return;
            }
        };
        match next {
            Ok(Some(frame)) => {
                render(&frame, &mut renderer, &mut finish, &mut out);
                if let Some(accepted) = &frame.accepted {
                    running.accepted(frames.pool(), accepted, wake_accepted);
                }
                running.generated(frame.deltas.iter().map(|delta| delta.tokens).sum());
                if frame.usage.is_none() && !out.is_empty() {
                    running.publish(&mut out).await;
                }
            }
            Ok(None) => {
                running.finish(finish, out);
                return;
            }
            Err(error) => {
                running.pool(frames.pool());
                fail(running, error, &mut renderer, finish, out);
                return;
            }
        }
    }
}

/// Ends the work at the pool, and reads on for the counts of what it has generated.
async fn cancel(running: Running, mut frames: Generation) {
    let mut finish = Finish::cancelled();
    let last = async {
        frames.stop().await?;
        while let Some(frame) = frames.next().await? {
            running.generated(frame.deltas.iter().map(|delta| delta.tokens).sum());
            finish.usage = frame.usage.or(finish.usage);
        }
        Ok::<(), CoreError>(())
    };
    // Whatever goes wrong here: the call is over, and its stream is dropped.
    let _ = timeout(LAST_COUNTS, last).await;
    running.finish(finish, Vec::new());
}

fn render(
    frame: &v1::GenerateFrame,
    renderer: &mut Renderer,
    finish: &mut Finish,
    out: &mut Vec<u8>,
) {
    for delta in &frame.deltas {
        let logprobs: Vec<TokenLogprob> = delta.logprobs.iter().map(logprob).collect();
        renderer.piece(
            &Piece {
                choice: delta.choice,
                text: &delta.text,
                logprobs: &logprobs,
            },
            out,
        );
    }
    for finished in &frame.finished {
        let (reason, name) = match finished.reason() {
            v1::FinishReason::Stop => (Some(FinishReason::Stop), "stop"),
            v1::FinishReason::Length => (Some(FinishReason::Length), "length"),
            v1::FinishReason::Cancelled => (None, "cancelled"),
            v1::FinishReason::Error | v1::FinishReason::Unspecified => (None, "error"),
        };
        if finished.choice == 0 {
            finish.reason = Some(name);
        }
        // A choice that failed has no regular end: the error of the call follows.
        if let Some(reason) = reason {
            renderer.finish(finished.choice, reason, out);
        } else {
            finish.failing = true;
        }
    }
    if let Some(usage) = frame.usage {
        finish.usage = Some(usage);
        if !finish.failing {
            let counts = Usage {
                prompt_tokens: usage.prompt_tokens.into(),
                completion_tokens: usage.completion_tokens.into(),
                cached_tokens: usage.cached_tokens.into(),
            };
            renderer.end(&counts, out);
        }
    }
}

fn logprob(token: &v1::TokenLogprob) -> TokenLogprob {
    TokenLogprob {
        id: token.token,
        bytes: token.text.to_vec(),
        logprob: (!token.absent).then_some(token.logprob),
        top: token
            .top
            .iter()
            .map(|top| (top.text.to_vec(), top.logprob))
            .collect(),
    }
}

/// An error before the first byte is the call's; afterwards it travels inside the stream.
fn fail(
    running: Running,
    error: CoreError,
    renderer: &mut Renderer,
    mut finish: Finish,
    mut out: Vec<u8>,
) {
    finish.reason = Some(if error.code == Code::Cancelled {
        "cancelled"
    } else {
        "error"
    });
    finish.code = Some(error.code);
    if renderer.is_started() {
        let object = ErrorObject {
            message: &error.message,
            kind: error.code.row().openai_type,
            param: error.param.as_deref(),
            code: Some(error.code.as_str()),
        };
        renderer.error(&object, &mut out);
    } else {
        finish.failure = Some(error);
    }
    running.finish(finish, out);
}

/// One `Tokenize` call.
pub(super) async fn tokenize(
    running: Running,
    caller: Caller,
    request: v1::TokenizeRequest,
    (request_id, limit): (String, Duration),
) {
    match caller.tokenize(request, &request_id, limit).await {
        Ok((reply, pool)) => {
            let mut body = Vec::new();
            tokenize_body(&mut body, &reply.tokens, reply.max_model_len);
            running.pool(Some(pool));
            running.finish(Finish::stop(), body);
        }
        Err(error) => running.finish(Finish::failed(error), Vec::new()),
    }
}

/// One `Detokenize` call.
pub(super) async fn detokenize(
    running: Running,
    caller: Caller,
    request: v1::DetokenizeRequest,
    (request_id, limit): (String, Duration),
) {
    match caller.detokenize(request, &request_id, limit).await {
        Ok((reply, pool)) => {
            let mut body = Vec::new();
            detokenize_body(&mut body, &reply.text);
            running.pool(Some(pool));
            running.finish(Finish::stop(), body);
        }
        Err(error) => running.finish(Finish::failed(error), Vec::new()),
    }
}
