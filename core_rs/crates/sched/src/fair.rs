//! Shares of the engine in proportion to weights: among organisations, and within one among its keys.
//!
//! Each account has a virtual time: what it was served, divided by its weight. Who is behind goes next. An
//! account that begins to wait is lifted to about the virtual time of those that wait already, so that nobody saves
//! up a claim while away; who was served more than others before keeps that debt. This is the virtual token
//! counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), in two levels.
//!
//! Tokens alone would let long answers keep every slot: a sequence that has a slot is served in each step.
//! So slots are levelled too. When none is free, whoever is next takes one from the account with the most slots
//! for its weight, as long as that leaves it with no more than it takes. What is interrupted computes its tokens again:
//! where two would only trade places, the claimant must be behind by several times that.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::policy::{Holder, Policy, Service};
use crate::queue::Waiting;
use crate::types::Owner;

/// Least and greatest weight that counts as given.
const WEIGHTS: (f64, f64) = (1e-3, 1e3);

/// How far behind the others (prompt tokens) an account begins at most: as much of it comes before them, so that a few
/// short requests at a time do not wait for each other while others hold all slots.
const BURST: f64 = 1024.0;

/// Where two only trade places, the claimant is behind by so many times what is computed again. Answers end all the time,
/// and whoever is behind gets the next slot anyway.
const TRADE: f64 = 8.0;

/// What tokens count in a share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prices {
    /// A prompt token.
    pub prefill: f64,
    /// A token that is computed by itself.
    pub decode: f64,
}

/// See the module.
#[derive(Debug)]
pub struct Fair {
    prices: Prices,
    organisations: Shares,
    keys: HashMap<u128, Shares>,
}

/// The accounts of one level.
#[derive(Debug, Default)]
struct Shares {
    accounts: HashMap<u128, Account>,
    /// Nobody who begins to wait has a smaller virtual time.
    floor: f64,
    /// Who was the last to leave the queue: while nobody waits, the measure for who comes.
    last: Option<u128>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    virtual_time: f64,
    waiting: usize,
}

/// Where an account stands among others; smaller goes first.
type Rank = (f64, usize, u128);

fn weight(given: f64) -> f64 {
    if given.is_finite() && given > 0.0 {
        given.clamp(WEIGHTS.0, WEIGHTS.1)
    } else {
        1.0
    }
}

#[allow(clippy::cast_precision_loss)] // tokens of a step, slots of an engine
fn float(count: usize) -> f64 {
    count as f64
}

fn by_rank(left: Rank, right: Rank) -> Ordering {
    let (time, waiting, id) = left;
    time.total_cmp(&right.0)
        .then((waiting, id).cmp(&(right.1, right.2)))
}

impl Shares {
    fn joined(&mut self, id: u128) {
        let begins = self
            .accounts
            .get(&id)
            .is_none_or(|account| account.waiting == 0);
        if begins {
            self.raise_floor();
        }
        let floor = self.floor;
        let account = self.accounts.entry(id).or_default();
        if begins {
            account.virtual_time = account.virtual_time.max(floor - BURST);
        }
        account.waiting += 1;
    }

    /// The floor follows those that wait.
    fn raise_floor(&mut self) {
        let waiting = self.accounts.values().filter(|account| account.waiting > 0);
        let least = waiting
            .map(|account| account.virtual_time)
            .min_by(f64::total_cmp);
        let recent = || Some(self.accounts.get(&self.last?)?.virtual_time);
        if let Some(time) = least.or_else(recent) {
            self.floor = self.floor.max(time);
        }
    }

    /// Forgets whom it does not matter to remember: who does not wait, and would be lifted.
    fn left(&mut self, id: u128) {
        let Some(account) = self.accounts.get_mut(&id) else {
            return;
        };
        account.waiting = account.waiting.saturating_sub(1);
        if account.waiting == 0 {
            self.last = Some(id);
            self.raise_floor();
            let floor = self.floor;
            self.accounts
                .retain(|_, account| account.waiting > 0 || account.virtual_time > floor);
        }
    }

    fn served(&mut self, id: u128, amount: f64) {
        let floor = self.floor;
        let account = self.accounts.entry(id).or_insert(Account {
            virtual_time: floor,
            waiting: 0,
        });
        account.virtual_time += amount;
    }

    /// How far the virtual time of `left` is behind that of `right`.
    fn behind(&self, left: u128, right: u128) -> f64 {
        self.rank(right).0 - self.rank(left).0
    }

    fn rank(&self, id: u128) -> Rank {
        self.accounts
            .get(&id)
            .map_or((self.floor, 0, id), |account| {
                (account.virtual_time, account.waiting, id)
            })
    }
}

impl Fair {
    /// An empty policy.
    pub fn new(prices: Prices) -> Self {
        Self {
            prices,
            organisations: Shares::default(),
            keys: HashMap::new(),
        }
    }

    /// Accounts that are known: those that wait, and those with more service behind them than they.
    pub fn accounts(&self) -> usize {
        self.organisations.accounts.len()
    }

    /// Whether an interruption is worth what it costs. Accounts of equal size that hold slots in turn would take them
    /// from each other without end: where they only trade places, the claimant is behind by what is computed twice.
    fn worth(&self, giver: &Giver, chosen: (usize, usize), behind: f64) -> Option<usize> {
        let (index, price) = chosen;
        let cost = float(price) * self.prices.prefill;
        (!giver.trade || behind >= TRADE * cost).then_some(index)
    }

    fn compare(&self, left: &Owner, right: &Owner) -> Ordering {
        if left.organisation != right.organisation {
            let rank = |owner: &Owner| self.organisations.rank(owner.organisation);
            return by_rank(rank(left), rank(right));
        }
        match self.keys.get(&left.organisation) {
            Some(keys) if left.key != right.key => {
                by_rank(keys.rank(left.key), keys.rank(right.key))
            }
            _ => Ordering::Equal,
        }
    }
}

impl Policy for Fair {
    fn next(&mut self, waiting: &Waiting) -> Option<usize> {
        let open = waiting
            .iter()
            .enumerate()
            .filter(|(_, request)| !request.held);
        let best = open.min_by(|(_, left), (_, right)| {
            // Within a key requests take turns, sequence by sequence: a large one is many claims.
            self.compare(&left.first.owner, &right.first.owner)
                .then(left.turn.cmp(&right.turn))
                .then(left.arrival.cmp(&right.arrival))
        });
        best.map(|(index, _)| index)
    }

    fn precedes(&self, left: &Owner, right: &Owner) -> bool {
        self.compare(left, right) == Ordering::Less
    }

    fn yields(&self, claimant: &Owner, holders: &[Holder]) -> Option<usize> {
        let organisation = |owner: &Owner| (owner.organisation, weight(owner.organisation_weight));
        let key = |owner: &Owner| (owner.key, weight(owner.key_weight));
        let mine = |holder: &&(usize, Holder)| holder.1.owner.organisation == claimant.organisation;
        let all: Vec<(usize, Holder)> = holders.iter().copied().enumerate().collect();
        let (own, others): (Vec<_>, Vec<_>) = all.iter().partition(mine);
        let from_others = most_held(claimant, &own, &others, organisation).and_then(|giver| {
            // The richest key of the richest organisation gives.
            let theirs: Vec<_> = others
                .into_iter()
                .filter(|(_, h)| h.owner.organisation == giver.id)
                .collect();
            let rich = held_by(&theirs, key)
                .into_iter()
                .max_by(|l, r| by_held(*l, *r))?
                .0;
            let chosen = cheapest(theirs.iter().filter(|(_, holder)| holder.owner.key == rich))?;
            let behind = self.organisations.behind(claimant.organisation, giver.id);
            self.worth(&giver, chosen, behind)
        });
        from_others.or_else(|| {
            let (mine, others): (Vec<_>, Vec<_>) = own
                .into_iter()
                .partition(|(_, h)| h.owner.key == claimant.key);
            let giver = most_held(claimant, &mine, &others, key)?;
            let theirs = others
                .iter()
                .filter(|(_, holder)| holder.owner.key == giver.id);
            let chosen = cheapest(theirs)?;
            let keys = self.keys.get(&claimant.organisation)?;
            self.worth(&giver, chosen, keys.behind(claimant.key, giver.id))
        })
    }

    fn joined(&mut self, owner: &Owner) {
        self.organisations.joined(owner.organisation);
        self.keys
            .entry(owner.organisation)
            .or_default()
            .joined(owner.key);
    }

    fn left(&mut self, owner: &Owner) {
        self.organisations.left(owner.organisation);
        if let Some(keys) = self.keys.get_mut(&owner.organisation) {
            keys.left(owner.key);
        }
        let organisations = &self.organisations.accounts;
        if !organisations.contains_key(&owner.organisation) {
            self.keys.retain(|id, _| organisations.contains_key(id));
        }
    }

    fn served(&mut self, owner: &Owner, service: Service) {
        let amount = float(service.prefill) * self.prices.prefill
            + float(service.decode) * self.prices.decode;
        self.organisations.served(
            owner.organisation,
            amount / weight(owner.organisation_weight),
        );
        self.keys
            .entry(owner.organisation)
            .or_default()
            .served(owner.key, amount / weight(owner.key_weight));
    }
}

/// Slots by account, each for its weight.
fn held_by(
    holders: &[(usize, Holder)],
    of: impl Fn(&Owner) -> (u128, f64),
) -> HashMap<u128, (usize, f64)> {
    let mut held: HashMap<u128, (usize, f64)> = HashMap::new();
    for (_, holder) in holders {
        let (id, weight) = of(&holder.owner);
        let account = held.entry(id).or_insert((0, weight));
        account.0 += 1;
    }
    held
}

fn by_held(left: (u128, (usize, f64)), right: (u128, (usize, f64))) -> Ordering {
    let share = |(slots, weight): (usize, f64)| float(slots) / weight;
    share(left.1)
        .total_cmp(&share(right.1))
        .then(left.0.cmp(&right.0))
}

/// An account that can give a slot.
#[derive(Clone, Copy, Debug)]
struct Giver {
    id: u128,
    /// It has then no more than the claimant: they trade places.
    trade: bool,
}

/// The account with the most slots for its weight, when one slot less leaves it no poorer than the claimant
/// with one more.
fn most_held(
    claimant: &Owner,
    own: &[(usize, Holder)],
    others: &[(usize, Holder)],
    of: impl Fn(&Owner) -> (u128, f64),
) -> Option<Giver> {
    let able = others.iter().filter(|(_, holder)| holder.price.is_some());
    let able: Vec<u128> = able.map(|(_, holder)| of(&holder.owner).0).collect();
    let rich = held_by(others, &of)
        .into_iter()
        .filter(|(id, _)| able.contains(id));
    let (id, (slots, weight)) = rich.max_by(|left, right| by_held(*left, *right))?;
    let mine = float(own.len() + 1) / of(claimant).1;
    let left = float(slots - 1) / weight;
    (mine <= left).then_some(Giver {
        id,
        trade: mine >= left,
    })
}

/// What costs least to compute again, then what was interrupted least often: index and price.
fn cheapest<'a>(holders: impl Iterator<Item = &'a (usize, Holder)>) -> Option<(usize, usize)> {
    holders
        .filter_map(|(index, holder)| Some((holder.price?, holder.interruptions, *index)))
        .min()
        .map(|(price, _, index)| (index, price))
}
