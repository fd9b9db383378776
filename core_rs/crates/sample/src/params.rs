//! What a request asks of the sampler.

/// Sampling parameters of one sequence. The default samples the plain softmax.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Divides the logits; 0 is greedy, as is anything below [`Params::GREEDY_BELOW`].
    pub temperature: f32,
    /// Share of the probability that is kept, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Number of tokens that are kept; 0 keeps all.
    pub top_k: u32,
    /// Smallest kept probability, as a share of the best token's, in [0, 1]; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of every generated token.
    pub presence: f32,
    /// Subtracted from the logit of every generated token, once for each time it was generated.
    pub frequency: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or generated; 1 is off.
    pub repetition: f32,
    /// Seed of the noise.
    pub seed: u64,
    /// Added to the logits of these tokens, before the penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that are not drawn, whatever their logits.
    pub banned: Vec<u32>,
}

/// A parameter that cannot be used, and why.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ParamError {
    /// Outside its range, or not a number.
    #[error("{name} is {value}; it must be {allowed}")]
    OutOfRange {
        /// Name of the parameter as the API spells it.
        name: &'static str,
        /// What was given.
        value: f32,
        /// What is allowed, in words.
        allowed: &'static str,
    },
    /// `logit_bias` names a token that the model does not have.
    #[error("logit_bias names token {token}; the vocabulary has {vocab} tokens")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
}

impl Default for Params {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence: 0.0,
            frequency: 0.0,
            repetition: 1.0,
            seed: 0,
            logit_bias: Vec::new(),
            banned: Vec::new(),
        }
    }
}

impl Params {
    /// Temperatures below this are greedy: the softmax is one-hot to f32 precision long before.
    pub const GREEDY_BELOW: f32 = 1e-5;

    /// Checks every value once, at the door.
    ///
    /// # Errors
    /// The first parameter that is not usable.
    pub fn validate(&self, vocab: usize) -> Result<(), ParamError> {
        let ranges = [
            (
                "temperature",
                self.temperature,
                (0.0..=100.0).contains(&self.temperature),
                "between 0 and 100",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "between 0 and 1",
            ),
            (
                "presence_penalty",
                self.presence,
                self.presence.abs() <= 100.0,
                "between -100 and 100",
            ),
            (
                "frequency_penalty",
                self.frequency,
                self.frequency.abs() <= 100.0,
                "between -100 and 100",
            ),
            (
                "repetition_penalty",
                self.repetition,
                self.repetition > 0.0 && self.repetition <= 100.0,
                "above 0 and at most 100",
            ),
        ];
        for (name, value, fits, allowed) in ranges {
            if !fits {
                return Err(ParamError::OutOfRange {
                    name,
                    value,
                    allowed,
                });
            }
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab {
                return Err(ParamError::UnknownToken { token, vocab });
            }
            if !bias.is_finite() {
                return Err(ParamError::OutOfRange {
                    name: "logit_bias",
                    value: bias,
                    allowed: "finite",
                });
            }
        }
        Ok(())
    }

    /// Whether the next token is the one with the largest logit.
    pub fn is_greedy(&self) -> bool {
        self.temperature < Self::GREEDY_BELOW
    }

    /// Whether some penalty depends on the tokens so far.
    pub fn has_penalties(&self) -> bool {
        self.presence != 0.0 || self.frequency != 0.0 || self.penalises_repetition()
    }

    /// Whether logits may change before the draw: by a bias, a penalty or a ban.
    pub fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty() || !self.banned.is_empty() || self.has_penalties()
    }

    /// Whether tokens of the prompt are penalised too.
    #[allow(clippy::float_cmp)] // exactly 1 is the neutral element
    pub(crate) fn penalises_repetition(&self) -> bool {
        self.repetition != 1.0
    }
}
