//! The tokens so far, as far as the penalties need them.

use crate::params::Params;

/// What one sequence has seen: how often each token was generated, and which ones its prompt holds.
///
/// Stays empty, and costs nothing, while its parameters ask for no penalty.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Sorted by token. Tokens of the prompt that were not generated count 0.
    counts: Vec<(u32, u32)>,
    active: bool,
}

impl History {
    /// The history of a sequence that has generated nothing yet. The prompt matters to the repetition
    /// penalty only.
    pub fn new(params: &Params, prompt: &[u32]) -> Self {
        let mut counts = Vec::new();
        if params.penalises_repetition() {
            counts.extend(prompt.iter().map(|&token| (token, 0)));
            counts.sort_unstable();
            counts.dedup();
        }
        Self {
            counts,
            active: params.has_penalties(),
        }
    }

    /// Records a generated token.
    pub fn push(&mut self, token: u32) {
        if !self.active {
            return;
        }
        match self.counts.binary_search_by_key(&token, |entry| entry.0) {
            Ok(at) => self.counts[at].1 += 1,
            Err(at) => self.counts.insert(at, (token, 1)),
        }
    }

    /// Whether [`History::penalise`] would change nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Applies the penalties to a row of logits, as vLLM does: repetition first (positive logits are
    /// divided, negative ones multiplied; prompt and generated tokens), then frequency times the count
    /// and presence (generated tokens; the formula of the `OpenAI` API reference).
    pub(crate) fn penalise(&self, row: &mut [f32], params: &Params) {
        for &(token, count) in &self.counts {
            let Some(logit) = row.get_mut(token as usize) else {
                continue;
            };
            *logit = if *logit > 0.0 {
                *logit / params.repetition
            } else {
                *logit * params.repetition
            };
            if count > 0 {
                #[allow(clippy::cast_precision_loss)] // counts stay far below 2^24
                let times = count as f32;
                *logit -= params.frequency * times + params.presence;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)] // every value is exact in binary
    use super::*;

    #[test]
    fn each_penalty_touches_its_tokens_only() {
        let params = Params {
            presence: 0.5,
            frequency: 0.25,
            repetition: 2.0,
            ..Params::default()
        };
        let mut history = History::new(&params, &[1, 2, 9]);
        for token in [2, 3, 3] {
            history.push(token);
        }
        let mut row = [0.5, 0.5, -0.5, 1.0, -1.0];
        history.penalise(&mut row, &params);
        assert_eq!(row, [0.5, 0.25, -1.75, -0.5, -1.0]);
    }

    #[test]
    fn nothing_is_kept_without_penalties() {
        let mut history = History::new(&Params::default(), &[1, 2]);
        history.push(3);
        assert!(history.is_empty());
    }

    #[test]
    fn the_prompt_counts_for_repetition_only() {
        let params = Params {
            presence: 0.5,
            ..Params::default()
        };
        let mut history = History::new(&params, &[0]);
        history.push(1);
        let mut row = [1.0, 1.0];
        history.penalise(&mut row, &params);
        assert_eq!(row, [1.0, 0.5]);
    }
}
