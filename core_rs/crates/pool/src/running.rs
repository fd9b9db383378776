//! One request in work: its choices, its counts, its way back.

use std::sync::Arc;
use std::time::Instant;

use helix_sample::SampleError;
use helix_sched::{Item, NewSequence, Owner, Scope, Started};
use helix_text::TextModel;
use helix_wire::error::{Code, CoreError};
use helix_wire::v1::{FinishReason, Finished, Usage};

use crate::outbox::{Outbox, Room, Staged, micros};
use crate::request::{Job, Prompt, Wishes, sequence_id, split};
use crate::sequence::{Rows, Sampled, Sequence, Tools};

enum Choice {
    Waiting,
    Working(Box<Sequence>),
    Done,
}

pub(crate) struct Running {
    number: u64,
    arrival: Instant,
    owner: Owner,
    scope: Scope,
    prompts: Vec<Prompt>,
    wishes: Wishes,
    outbox: Arc<Outbox>,
    choices: Vec<Choice>,
    alive: usize,
    started: bool,
    usage: Usage,
    staged: Staged,
    /// Since when the reader is too far behind.
    parked: Option<Instant>,
    /// Whether this step has touched the request.
    pub(crate) touched: bool,
}

fn int(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Running {
    pub(crate) fn new(job: Job) -> Self {
        let choices = job.choices();
        let prompt_tokens = int(job.prompts.iter().map(|prompt| prompt.ids.len()).sum());
        Self {
            number: job.number,
            arrival: job.arrival,
            owner: job.owner,
            scope: job.scope,
            prompts: job.prompts,
            wishes: job.wishes,
            outbox: job.outbox,
            choices: (0..choices).map(|_| Choice::Waiting).collect(),
            alive: choices,
            started: false,
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            staged: Staged::default(),
            parked: None,
            touched: false,
        }
    }

    /// The choices as the scheduler takes them.
    pub(crate) fn sequences(&self, deadline: u64) -> Vec<NewSequence> {
        let sequence = |choice: usize| {
            let prompt = &self.prompts[choice / self.wishes.n];
            NewSequence {
                id: sequence_id(self.number, choice),
                prompt: Arc::clone(&prompt.ids),
                max_new: prompt.max_new,
                deadline: Some(deadline),
                prompt_logits: self.wishes.prompt_logits(),
                scope: self.scope,
                shared: prompt.shared,
                owner: self.owner,
            }
        };
        (0..self.choices.len()).map(sequence).collect()
    }

    /// A choice got its slot.
    pub(crate) fn start(&mut self, started: &Started, text: &TextModel, now: Instant) {
        let (_, choice) = split(started.id);
        // The choices of one prompt copy from each other; that saves the caller nothing.
        if choice % self.wishes.n == 0 {
            self.usage.cached_tokens += int(started.cached);
        }
        if !self.started {
            self.started = true;
            self.usage.queue_us = micros(now - self.arrival);
            self.outbox.start(self.usage);
        }
        let prompt = &self.prompts[choice / self.wishes.n];
        let sequence = Sequence::new(choice, prompt, &self.wishes, text, &mut self.staged);
        self.choices[choice] = Choice::Working(Box::new(sequence));
    }

    /// A choice that has a slot.
    pub(crate) fn working(&self, choice: usize) -> Option<&Sequence> {
        match self.choices.get(choice) {
            Some(Choice::Working(sequence)) => Some(sequence),
            _ => None,
        }
    }

    /// Takes the rows of one item.
    pub(crate) fn take(
        &mut self,
        item: &Item,
        rows: Rows<'_>,
        tools: &mut Tools<'_>,
        now: Instant,
    ) -> Result<Option<Sampled>, SampleError> {
        let (_, choice) = split(item.id);
        let Choice::Working(sequence) = &mut self.choices[choice] else {
            return Ok(None);
        };
        let prompt = &self.prompts[choice / self.wishes.n];
        let sampled = sequence.take(item, &prompt.ids, rows, tools, &mut self.staged)?;
        if let Some(sampled) = sampled {
            if self.usage.completion_tokens == 0 {
                self.usage.first_token_us = micros(now - self.arrival);
            }
            self.usage.completion_tokens += 1;
            if sampled.stopped {
                self.end(choice, FinishReason::Stop);
            }
        }
        Ok(sampled)
    }

    /// A choice has reached a limit.
    pub(crate) fn finish(&mut self, choice: usize) {
        let Choice::Working(sequence) = &mut self.choices[choice] else {
            return;
        };
        let stopped = sequence.finish(&mut self.staged);
        self.end(
            choice,
            if stopped {
                FinishReason::Stop
            } else {
                FinishReason::Length
            },
        );
    }

    fn end(&mut self, choice: usize, reason: FinishReason) {
        self.choices[choice] = Choice::Done;
        self.alive -= 1;
        self.staged.finished.push(Finished {
            choice: int(choice),
            reason: reason.into(),
        });
    }

    /// Names of the choices that have not ended.
    pub(crate) fn alive(&self) -> impl Iterator<Item = u64> {
        let alive = self
            .choices
            .iter()
            .enumerate()
            .filter(|(_, choice)| !matches!(choice, Choice::Done));
        alive.map(|(choice, _)| sequence_id(self.number, choice))
    }

    /// Tokens of a choice's prompt.
    pub(crate) fn prompt_tokens(&self, choice: usize) -> usize {
        let prompt = self.prompts.get(choice / self.wishes.n);
        prompt.map_or(0, |prompt| prompt.ids.len())
    }

    /// Choices that have a slot.
    pub(crate) fn slots(&self) -> usize {
        let working = |choice: &&Choice| matches!(choice, Choice::Working(_));
        self.choices.iter().filter(working).count()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.alive == 0
    }

    /// Sends what is staged. True when the reader is too far behind now.
    pub(crate) fn deliver(&mut self, now: Instant) -> bool {
        if self.staged.is_empty() || self.outbox.push(&mut self.staged, self.usage) == Room::Left {
            return false;
        }
        self.parked = Some(now);
        true
    }

    pub(crate) fn parked(&self) -> Option<Instant> {
        self.parked
    }

    /// The reader has caught up.
    pub(crate) fn resume(&mut self) {
        self.parked = None;
    }

    /// Sends the final frame of a request whose choices have all ended.
    pub(crate) fn complete(mut self, now: Instant) {
        self.close(now, Ok(()));
    }

    /// Ends every choice that still runs with an error.
    pub(crate) fn fail(mut self, now: Instant, error: CoreError) {
        let reason = if error.code == Code::Cancelled {
            FinishReason::Cancelled
        } else {
            FinishReason::Error
        };
        for choice in 0..self.choices.len() {
            if !matches!(self.choices[choice], Choice::Done) {
                self.end(choice, reason);
            }
        }
        self.close(now, Err(error));
    }

    fn close(&mut self, now: Instant, end: Result<(), CoreError>) {
        self.usage.total_us = micros(now - self.arrival);
        self.outbox.finish(&mut self.staged, self.usage, end);
    }
}
