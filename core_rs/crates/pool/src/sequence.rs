//! One choice in work: from rows of candidates to text.

use std::collections::VecDeque;

use bytes::Bytes;
use helix_sample::{History, Params, SampleError, Sampler};
use helix_sched::Item;
use helix_text::{Detokenizer, Out, StopMatcher, TextModel};
use helix_wire::v1::{Delta, TokenLogprob};

use crate::engine::{Candidates, Capacity, Row, Sampling};
use crate::outbox::Staged;
use crate::request::{Prompt, Wishes};

/// Prompt tokens in one piece of an echo with log-probabilities.
const ECHO_PIECE: usize = 512;

/// What all sequences share on the engine thread.
pub(crate) struct Tools<'a> {
    pub(crate) text: &'a TextModel,
    pub(crate) sampler: &'a mut Sampler,
}

/// The rows of one item.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) own: Candidates<'a>,
    pub(crate) vocab: usize,
}

impl<'a> Rows<'a> {
    fn get(&self, index: usize) -> Row<'a> {
        self.own.row(index, self.vocab)
    }
}

/// What a step gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sampled {
    pub(crate) token: u32,
    /// End of text, or a stop string.
    pub(crate) stopped: bool,
}

/// What ends a choice.
struct Ends {
    /// Sorted.
    tokens: Vec<u32>,
    /// Nothing does before so many tokens.
    min_tokens: u32,
}

impl Ends {
    fn new(wishes: &Wishes, text: &TextModel) -> Self {
        let mut tokens = wishes.stop_tokens.clone();
        if !wishes.ignore_eos {
            tokens.extend_from_slice(text.eos_ids());
        }
        tokens.sort_unstable();
        Self {
            tokens,
            min_tokens: wishes.min_tokens,
        }
    }

    /// Whether a token that follows `generated` others ends the choice.
    fn at(&self, token: u32, generated: u32) -> bool {
        generated >= self.min_tokens && self.tokens.binary_search(&token).is_ok()
    }
}

pub(crate) struct Sequence {
    choice: u32,
    params: Params,
    history: History,
    detokenizer: Detokenizer,
    stops: Option<StopMatcher>,
    /// Position of the next token, prompt included.
    position: u64,
    logprobs: Option<usize>,
    ends: Ends,
    /// Tokens of the answer.
    generated: u32,
    /// Bytes that the detokeniser gave, and bytes that were sent; the stop strings hold the difference.
    decided: usize,
    sent: usize,
    /// Tokens that no delta has counted yet.
    unsent: u32,
    /// Log-probabilities of tokens whose text may still turn out to be a stop string, each with the byte at
    /// which its text begins.
    held: VecDeque<(usize, TokenLogprob)>,
    /// Text and log-probabilities of a prompt that is to be echoed once it is computed.
    echo: Option<(String, Vec<TokenLogprob>)>,
}

impl Sequence {
    /// A choice whose prompt is about to be computed. An echo without log-probabilities is staged at once.
    pub(crate) fn new(
        choice: usize,
        prompt: &Prompt,
        wishes: &Wishes,
        text: &TextModel,
        out: &mut Staged,
    ) -> Self {
        let mut params = wishes.params(choice);
        let choice = u32::try_from(choice).unwrap_or(u32::MAX);
        let ends = Ends::new(wishes, text);
        if ends.min_tokens > 0 {
            params.banned.clone_from(&ends.tokens);
        }
        let mut echo = prompt.echo.clone().map(|text| (text, Vec::new()));
        if wishes.logprobs.is_none()
            && let Some((text, _)) = echo.take()
        {
            out.deltas.push(Delta {
                choice,
                text,
                tokens: 0,
                logprobs: Vec::new(),
            });
        }
        Self {
            choice,
            history: History::new(&params, &prompt.ids),
            params,
            detokenizer: prompt.detokenizer.clone(),
            stops: wishes.stops.clone(),
            position: prompt.ids.len() as u64,
            logprobs: wishes.logprobs,
            ends,
            generated: 0,
            decided: 0,
            sent: 0,
            unsent: 0,
            held: VecDeque::new(),
            echo,
        }
    }

    /// Adds the row of the next token to a batch, for an engine that may choose it.
    pub(crate) fn ask(&self, sampling: &mut Sampling, capacity: &Capacity) {
        sampling.push(
            &self.params,
            self.position,
            self.logprobs.is_some(),
            capacity,
        );
    }

    /// Takes the rows of one item: echoes the prompt, samples the next token, or both.
    pub(crate) fn take(
        &mut self,
        item: &Item,
        prompt: &[u32],
        rows: Rows<'_>,
        tools: &mut Tools<'_>,
        out: &mut Staged,
    ) -> Result<Option<Sampled>, SampleError> {
        if self.echo.is_some() {
            self.take_echo(item, prompt, rows, tools, out)?;
        }
        if !item.sample {
            return Ok(None);
        }
        let row = rows.get(item.wanted.saturating_sub(1));
        let token = match row {
            Row::Logits(logits) => {
                tools
                    .sampler
                    .sample(logits, &self.params, &self.history, self.position)?
            }
            Row::Token(token) => token,
        };
        self.position += 1;
        if self.ends.at(token, self.generated) {
            self.finish(out);
            return Ok(Some(Sampled {
                token,
                stopped: true,
            }));
        }
        self.generated += 1;
        if self.generated >= self.ends.min_tokens {
            self.params.banned.clear();
        }
        self.history.push(token);
        if let Some(count) = self.logprobs {
            self.held
                .push_back((self.decided, logprob(tools, row, token, count)?));
        }
        let stopped = self.push(token, out);
        Ok(Some(Sampled { token, stopped }))
    }

    /// The answer is over: stages what is still held. True when that completes a stop string.
    pub(crate) fn finish(&mut self, out: &mut Staged) -> bool {
        let mut text = String::new();
        self.detokenizer.finish(&mut text);
        self.decided += text.len();
        let mut stopped = false;
        if let Some(stops) = &mut self.stops {
            let found = if self.generated >= self.ends.min_tokens {
                stops.push(&text)
            } else {
                Out {
                    emit: text,
                    stopped: false,
                }
            };
            text = found.emit;
            stopped = found.stopped;
            if !stopped {
                text.push_str(&stops.finish());
            }
        }
        self.stage(text, stopped, out);
        stopped
    }

    fn push(&mut self, token: u32, out: &mut Staged) -> bool {
        self.unsent += 1;
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        self.decided += text.len();
        let mut stopped = false;
        let heard = !text.is_empty() && self.generated > self.ends.min_tokens;
        if let Some(stops) = self.stops.as_mut().filter(|_| heard) {
            let found = stops.push(&text);
            text = found.emit;
            stopped = found.stopped;
        }
        self.stage(text, stopped, out);
        stopped
    }

    fn stage(&mut self, text: String, stopped: bool, out: &mut Staged) {
        self.sent += text.len();
        let all = !stopped && self.sent == self.decided;
        let mut logprobs = Vec::new();
        while let Some((start, _)) = self.held.front()
            && (all || *start < self.sent)
        {
            logprobs.extend(self.held.pop_front().map(|(_, entry)| entry));
        }
        if text.is_empty() && logprobs.is_empty() {
            return;
        }
        let tokens = std::mem::take(&mut self.unsent);
        out.deltas.push(Delta {
            choice: self.choice,
            text,
            tokens,
            logprobs,
        });
    }

    /// Row `i` of a chunk tells how probable the prompt token after it was.
    fn take_echo(
        &mut self,
        item: &Item,
        prompt: &[u32],
        rows: Rows<'_>,
        tools: &mut Tools<'_>,
        out: &mut Staged,
    ) -> Result<(), SampleError> {
        let Some((_, entries)) = &mut self.echo else {
            return Ok(());
        };
        let count = self.logprobs.unwrap_or(0);
        if item.past == 0
            && let Some(first) = prompt.first()
        {
            let text = Bytes::copy_from_slice(tools.text.token_bytes(*first));
            entries.push(TokenLogprob {
                token: *first,
                text,
                absent: true,
                ..TokenLogprob::default()
            });
        }
        for index in 0..item.wanted.min(item.len) {
            if let Some(next) = prompt.get(item.past + index + 1) {
                entries.push(logprob(tools, rows.get(index), *next, count)?);
            }
        }
        if item.past + item.len < prompt.len() {
            return Ok(());
        }
        let Some((mut text, entries)) = self.echo.take() else {
            return Ok(());
        };
        let mut entries = entries.into_iter().peekable();
        while entries.peek().is_some() {
            let logprobs = entries.by_ref().take(ECHO_PIECE).collect();
            let text = std::mem::take(&mut text);
            out.deltas.push(Delta {
                choice: self.choice,
                text,
                tokens: 0,
                logprobs,
            });
        }
        Ok(())
    }
}

fn logprob(
    tools: &mut Tools<'_>,
    row: Row<'_>,
    token: u32,
    count: usize,
) -> Result<TokenLogprob, SampleError> {
    let text = tools.text;
    let entry = |token, logprob| TokenLogprob {
        token,
        text: Bytes::copy_from_slice(text.token_bytes(token)),
        logprob,
        ..TokenLogprob::default()
    };
    match row {
        Row::Logits(logits) => {
            let found = tools.sampler.logprobs(logits, token, count)?;
            let top = found
                .top
                .into_iter()
                .map(|(token, logprob)| entry(token, logprob))
                .collect();
            Ok(TokenLogprob {
                top,
                ..entry(token, found.chosen)
            })
        }
        Row::Token(_) => {
            let top = if count > 0 {
                vec![entry(token, 0.0)]
            } else {
                Vec::new()
            };
            Ok(TokenLogprob {
                top,
                ..entry(token, 0.0)
            })
        }
    }
}
