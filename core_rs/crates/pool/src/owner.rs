//! For whom a request runs, and which beginnings of prompts everybody may know.

use helix_sched::{Owner, Scope};
use helix_text::{Chat, Message, TextModel};
use helix_wire::error::CoreError;
use helix_wire::v1;

const LEAST_WEIGHT: f64 = 0.01;
const MOST_WEIGHT: f64 = 100.0;

/// The scope of a request's prefixes. A request without an owner shares with its own choices only.
///
/// # Errors
/// `InvalidRequest` for an identifier that is neither empty nor 16 bytes long.
pub(crate) fn scope(owner: Option<&v1::Owner>, number: u64) -> Result<Scope, CoreError> {
    match owner {
        None => Ok(Scope::Request(number)),
        Some(owner) => identifier(&owner.prefixes, "owner.prefixes").map(Scope::Owner),
    }
}

/// Whose share of the engine a request takes; strangers have one together.
///
/// # Errors
/// `InvalidRequest` for a wrong identifier or weight.
pub(crate) fn share(owner: Option<&v1::Owner>) -> Result<Owner, CoreError> {
    let Some(owner) = owner else {
        return Ok(Owner::default());
    };
    Ok(Owner {
        organisation: identifier(&owner.organisation, "owner.organisation")?,
        key: identifier(&owner.key, "owner.key")?,
        organisation_weight: weight(owner.organisation_weight, "owner.organisation_weight")?,
        key_weight: weight(owner.key_weight, "owner.key_weight")?,
    })
}

fn weight(given: f64, param: &str) -> Result<f64, CoreError> {
    if given == 0.0 {
        return Ok(1.0);
    }
    if !(LEAST_WEIGHT..=MOST_WEIGHT).contains(&given) {
        let message = format!(
            "a weight is {given}; it must be from {LEAST_WEIGHT} to {MOST_WEIGHT}, or 0 for 1"
        );
        return Err(CoreError::invalid(param, message));
    }
    Ok(given)
}

fn identifier(bytes: &[u8], param: &str) -> Result<u128, CoreError> {
    if bytes.is_empty() {
        return Ok(0);
    }
    bytes.try_into().map(u128::from_be_bytes).map_err(|_| {
        let message = format!(
            "an identifier has {} bytes; it must have 16, or none",
            bytes.len()
        );
        CoreError::invalid(param, message)
    })
}

/// Beginnings of prompts that an administrator has declared to be no secret.
#[derive(Debug, Default)]
pub(crate) struct SharedPrefixes(Vec<Vec<u32>>);

impl SharedPrefixes {
    /// Each text counts as the system prompt of a chat, and as the beginning of a raw prompt.
    pub(crate) fn new(text: &TextModel, declared: &[String]) -> Self {
        let mut prefixes = Vec::new();
        for system in declared {
            let chat = |user: &str| {
                let message = |role, content| Message {
                    role,
                    content,
                    ..Message::default()
                };
                text.encode_chat(&Chat::new(
                    &[message("system", system), message("user", user)],
                    true,
                ))
                .ok()
            };
            let raw = |next: &str| text.encode(&format!("{system}{next}"), true).ok();
            // Where two continuations part, the text of a caller begins; the tokens before are the text's own.
            let pairs = [(chat("a"), chat("1")), (raw("\na"), raw("\n1"))];
            for (left, right) in pairs
                .into_iter()
                .filter_map(|(left, right)| left.zip(right))
            {
                let common = left
                    .iter()
                    .zip(&right)
                    .take_while(|(left, right)| left == right);
                let length = common.count();
                prefixes.push(left[..length].to_vec());
            }
        }
        prefixes.sort_by_key(|prefix| std::cmp::Reverse(prefix.len()));
        Self(prefixes)
    }

    /// How many tokens of a prompt are no secret: the longest declared beginning that it has.
    pub(crate) fn of(&self, prompt: &[u32]) -> usize {
        self.0
            .iter()
            .find(|prefix| prompt.starts_with(prefix))
            .map_or(0, Vec::len)
    }
}
