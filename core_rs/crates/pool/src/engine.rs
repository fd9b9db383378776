//! What computes: the interface between the engine loop and an engine.

use helix_sample::{CANDIDATES, Params};
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
    /// How many of the best tokens the engine itself chooses among; 0: it gives logits, or tokens of its own.
    pub candidates: usize,
}

/// One engine step, packed. `slots`, `past`, `counts` and `wanted` have one entry per sequence; a sequence
/// owns the next `counts[b]` of `token_ids`, which go to positions `past[b]..` of slot `slots[b]`.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// How to choose tokens, for engines that do ([`Capacity::candidates`]).
    pub sampling: Option<Sampling>,
}

/// How the wanted rows of a step become tokens; one entry per row, in the order of the batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Factor of the logits. 0 is greedy, and the next three are neutral then.
    pub inverse_temperature: Vec<f32>,
    /// Share of the probability that is kept; 1 keeps all.
    pub top_p: Vec<f32>,
    /// Number of tokens that are kept; 0 keeps all.
    pub top_k: Vec<i32>,
    /// Smallest kept probability, as a share of the best token's; 0 keeps all.
    pub min_p: Vec<f32>,
    /// Seed of the noise.
    pub seed: Vec<u64>,
    /// Position in its sequence of the token to be drawn.
    pub position: Vec<i64>,
    /// Rows whose logits are wanted, because the choice needs more than the above.
    pub on_host: Vec<bool>,
}

impl Sampling {
    fn clear(&mut self) {
        let Self {
            inverse_temperature,
            top_p,
            top_k,
            min_p,
            seed,
            position,
            on_host,
        } = self;
        for array in [inverse_temperature, top_p, min_p] {
            array.clear();
        }
        top_k.clear();
        seed.clear();
        position.clear();
        on_host.clear();
    }

    /// Adds a row from which the token at `position` is drawn. `on_host`: for reasons that these parameters do not
    /// show.
    pub(crate) fn push(
        &mut self,
        params: &Params,
        position: u64,
        on_host: bool,
        capacity: &Capacity,
    ) {
        let neutral = Params::default();
        let (inverse, drawn) = if params.is_greedy() {
            (0.0, &neutral)
        } else {
            (1.0 / params.temperature, params)
        };
        let top_k = match drawn.top_k as usize {
            k if k >= capacity.vocab_size => 0,
            k => k,
        };
        self.inverse_temperature.push(inverse);
        self.top_p.push(drawn.top_p);
        self.top_k.push(i32::try_from(top_k).unwrap_or(i32::MAX));
        self.min_p.push(drawn.min_p);
        self.seed.push(params.seed);
        self.position.push(position.cast_signed());
        // More candidates than have noise of their own would be drawn otherwise than here.
        let ranked = capacity.candidates.min(CANDIDATES);
        self.on_host
            .push(on_host || top_k > ranked || params.changes_logits());
    }

    /// Adds a row that is only looked at: `position` is that of the token that follows.
    pub(crate) fn push_seen(&mut self, position: usize, capacity: &Capacity) {
        let greedy = Params {
            temperature: 0.0,
            ..Params::default()
        };
        self.push(&greedy, position as u64, true, capacity);
    }
}

impl Batch {
    /// A batch to be filled for an engine again and again.
    pub(crate) fn for_engine(capacity: &Capacity) -> Self {
        Self {
            sampling: (capacity.candidates > 0).then(Sampling::default),
            ..Self::default()
        }
    }

    /// Rows of candidates that the step returns.
    pub fn rows(&self) -> usize {
        self.wanted
            .iter()
            .map(|&rows| usize::try_from(rows).unwrap_or(0))
            .sum()
    }

    /// Takes over a plan; how its rows become tokens is left for the caller to add.
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
        if let Some(sampling) = &mut self.sampling {
            sampling.clear();
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
    /// Tokens where the engine has chosen, logits where it has not.
    Mixed {
        /// Tokens `[rows]`; -1 stands for the next row of `logits`.
        tokens: &'a [i32],
        /// Logits `[number of -1, vocab_size]`.
        logits: &'a [f32],
    },
}

/// Stands for a row of logits among the tokens of [`Candidates::Mixed`].
const OPEN: i32 = -1;

impl<'a> Candidates<'a> {
    /// Checks lengths and ids against what was asked for.
    pub(crate) fn check(&self, batch: &Batch, vocab: usize) -> Result<(), CoreError> {
        let failed = |what: String| Err(CoreError::new(Code::EngineFailed, what));
        let rows = batch.rows();
        let (tokens, logits, open) = match *self {
            Self::Logits(logits) => (None, logits, rows),
            Self::Tokens(tokens) => (Some(tokens), [].as_slice(), 0),
            Self::Mixed { tokens, logits } => (Some(tokens), logits, open_rows(tokens)),
        };
        if let Some(tokens) = tokens.filter(|tokens| tokens.len() != rows) {
            let found = tokens.len();
            return failed(format!(
                "the engine returned {found} tokens for {rows} rows"
            ));
        }
        if logits.len() != open * vocab {
            let found = logits.len();
            return failed(format!(
                "the engine returned {found} logits for {open} rows of {vocab}"
            ));
        }
        let on_host = batch.sampling.as_ref().map(|sampling| &sampling.on_host);
        for (row, &id) in tokens.unwrap_or_default().iter().enumerate() {
            if id == OPEN && matches!(self, Self::Mixed { .. }) {
                continue;
            }
            if usize::try_from(id).map_or(true, |id| id >= vocab) {
                return failed(format!(
                    "the engine returned token {id}; its vocabulary has {vocab} tokens"
                ));
            }
            if on_host.and_then(|rows| rows.get(row)) == Some(&true) {
                return failed(format!(
                    "the engine chose token {id} for row {row}, of which it was to give the logits"
                ));
            }
        }
        Ok(())
    }

    /// Takes the first `count` rows off.
    pub(crate) fn split_off(&mut self, count: usize, vocab: usize) -> Self {
        match self {
            Self::Logits(logits) => Self::Logits(first(logits, count * vocab)),
            Self::Tokens(tokens) => Self::Tokens(first(tokens, count)),
            Self::Mixed { tokens, logits } => {
                let tokens = first(tokens, count);
                let logits = first(logits, open_rows(tokens) * vocab);
                Self::Mixed { tokens, logits }
            }
        }
    }

    pub(crate) fn row(&self, index: usize, vocab: usize) -> Row<'a> {
        let row = |logits: &'a [f32], index: usize| {
            Row::Logits(
                logits
                    .get(index * vocab..(index + 1) * vocab)
                    .unwrap_or_default(),
            )
        };
        match *self {
            Self::Logits(logits) => row(logits, index),
            Self::Tokens(tokens) => {
                Row::Token(tokens.get(index).map_or(0, |id| id.cast_unsigned()))
            }
            Self::Mixed { tokens, logits } => match tokens.get(index) {
                Some(&OPEN) => row(logits, open_rows(&tokens[..index])),
                id => Row::Token(id.map_or(0, |id| id.cast_unsigned())),
            },
        }
    }
}

fn open_rows(tokens: &[i32]) -> usize {
    tokens.iter().filter(|token| **token == OPEN).count()
}

/// Takes the first `count` entries off; nothing when there are fewer.
fn first<'a, T>(all: &mut &'a [T], count: usize) -> &'a [T] {
    all.split_off(..count).unwrap_or_default()
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
