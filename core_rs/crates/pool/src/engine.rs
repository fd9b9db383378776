//! What computes: the interface between the engine loop and an engine.

use helix_sched::Plan;
use helix_wire::error::{Code, CoreError};

/// What an engine holds and knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Sequences that have a cache at a time.
    pub slots: usize,
    /// Positions of one slot.
    pub max_len: usize,
    /// Length V of a row of logits.
    pub vocab_size: usize,
}

/// One engine step, packed. `slots`, `past`, `counts` and `wanted` have one entry per sequence; a sequence
/// owns the next `counts[b]` of `token_ids`, which go to positions `past[b]..` of slot `slots[b]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all sequences, one after the other.
    pub token_ids: Vec<i32>,
    /// Slot of each sequence.
    pub slots: Vec<i32>,
    /// Positions that its cache already holds.
    pub past: Vec<i32>,
    /// How many of `token_ids` are its own.
    pub counts: Vec<i32>,
    /// How many trailing rows of logits are wanted of it.
    pub wanted: Vec<i32>,
}

impl Batch {
    /// Rows of candidates that the step returns.
    pub fn rows(&self) -> usize {
        self.wanted
            .iter()
            .map(|&rows| usize::try_from(rows).unwrap_or(0))
            .sum()
    }

    pub(crate) fn fill(&mut self, plan: &Plan) {
        let int = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
        for array in [
            &mut self.token_ids,
            &mut self.slots,
            &mut self.past,
            &mut self.counts,
            &mut self.wanted,
        ] {
            array.clear();
        }
        self.token_ids
            .extend(plan.tokens.iter().map(|token| token.cast_signed()));
        for item in &plan.items {
            self.slots.push(int(item.slot));
            self.past.push(int(item.past));
            self.counts.push(int(item.len));
            self.wanted.push(int(item.wanted));
        }
    }
}

/// What a step returns: one row for every wanted one, in the order of the batch.
#[derive(Clone, Copy, Debug)]
pub enum Candidates<'a> {
    /// Logits `[rows, vocab_size]`, row by row.
    Logits(&'a [f32]),
    /// Tokens `[rows]` that the engine has already chosen; their log-probability counts as 0.
    Tokens(&'a [i32]),
}

impl<'a> Candidates<'a> {
    /// Checks lengths and ids against what was asked for.
    pub(crate) fn check(&self, rows: usize, vocab: usize) -> Result<(), CoreError> {
        let failed = |what: String| Err(CoreError::new(Code::EngineFailed, what));
        match self {
            Self::Logits(data) if data.len() != rows * vocab => {
                let found = data.len();
                failed(format!(
                    "the engine returned {found} logits for {rows} rows of {vocab}"
                ))
            }
            Self::Tokens(ids) if ids.len() != rows => {
                let found = ids.len();
                failed(format!(
                    "the engine returned {found} tokens for {rows} rows"
                ))
            }
            Self::Tokens(ids) => match ids
                .iter()
                .find(|id| usize::try_from(**id).map_or(true, |id| id >= vocab))
            {
                Some(id) => failed(format!(
                    "the engine returned token {id}; its vocabulary has {vocab} tokens"
                )),
                None => Ok(()),
            },
            Self::Logits(_) => Ok(()),
        }
    }

    pub(crate) fn row(&self, index: usize, vocab: usize) -> Row<'a> {
        match self {
            Self::Logits(data) => Row::Logits(
                data.get(index * vocab..(index + 1) * vocab)
                    .unwrap_or_default(),
            ),
            Self::Tokens(ids) => Row::Token(ids.get(index).map_or(0, |id| id.cast_unsigned())),
        }
    }
}

/// One row of candidates.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row<'a> {
    Logits(&'a [f32]),
    Token(u32),
}

/// What computes. Called from one thread only.
pub trait StepEngine {
    /// What the engine fails with.
    type Error;

    /// What the engine holds; asked once, before the first step.
    fn capacity(&mut self) -> Result<Capacity, Self::Error>;

    /// Copies the first `len` cached positions of slot `src` to slot `dst`.
    fn copy_prefix(&mut self, src: usize, dst: usize, len: usize) -> Result<(), Self::Error>;

    /// Computes one batch.
    fn step(&mut self, batch: &Batch) -> Result<Candidates<'_>, Self::Error>;
}

/// Why the engine loop ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E> {
    /// The engine failed.
    #[error("the engine failed")]
    Engine(E),
    /// The engine returned something that does not fit what was asked for, or the loop cannot start.
    #[error(transparent)]
    Pool(#[from] CoreError),
}
