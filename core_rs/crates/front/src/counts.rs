//! Caps: how many of something there may be at once, in all and for each client.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use http::HeaderValue;
use parking_lot::Mutex;

use crate::address::Group;

/// A count with a limit.
#[derive(Debug)]
pub(crate) struct Cap {
    limit: usize,
    now: AtomicUsize,
}

/// A place under a [`Cap`], given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Cap>);

impl Cap {
    /// Nothing counted yet.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            now: AtomicUsize::new(0),
        })
    }

    /// A place, unless all are taken.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Place> {
        self.now
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                (now < self.limit).then_some(now + 1)
            })
            .ok()?;
        Some(Place(Arc::clone(self)))
    }

    /// Places that are taken.
    pub(crate) fn now(&self) -> usize {
        self.now.load(Ordering::Acquire)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A count with a limit for each client.
#[derive(Debug)]
pub(crate) struct Caps {
    limit: usize,
    now: Mutex<HashMap<Group, usize>>,
}

/// A place of one client, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct OwnPlace {
    caps: Arc<Caps>,
    group: Group,
}

impl Caps {
    /// Nothing counted yet.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            now: Mutex::new(HashMap::new()),
        })
    }

    /// A place for the client, unless it has all that it may.
    pub(crate) fn take(self: &Arc<Self>, group: Group) -> Option<OwnPlace> {
        let mut now = self.now.lock();
        let count = now.entry(group).or_insert(0);
        if *count >= self.limit {
            if self.limit == 0 {
                now.remove(&group);
            }
            return None;
        }
        *count += 1;
        Some(OwnPlace {
            caps: Arc::clone(self),
            group,
        })
    }

    /// Clients that have a place.
    #[cfg(test)]
    pub(crate) fn clients(&self) -> usize {
        self.now.lock().len()
    }
}

impl Drop for OwnPlace {
    fn drop(&mut self) {
        let mut now = self.caps.now.lock();
        if let Some(count) = now.get_mut(&self.group) {
            *count -= 1;
            if *count == 0 {
                now.remove(&self.group);
            }
        }
    }
}

/// Names of requests that their clients have not named.
#[derive(Debug, Default)]
pub(crate) struct Ids {
    hasher: RandomState,
    last: AtomicU64,
}

impl Ids {
    /// One that no other request has. No secret.
    pub(crate) fn next(&self) -> HeaderValue {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let name = format!("req-{:016x}{number:08x}", self.hasher.hash_one(number));
        // Letters, digits and a hyphen: always a value.
        HeaderValue::from_maybe_shared(Bytes::from(name))
            .unwrap_or(const { HeaderValue::from_static("req-unnamed") })
    }
}

/// Credentials that were good a while ago, as keyed hashes: two generations of bounded size.
#[derive(Debug)]
pub(crate) struct Known {
    hasher: RandomState,
    generations: Mutex<[std::collections::HashSet<u64>; 2]>,
    size: usize,
}

impl Known {
    /// Remembers at least the last `size` credentials.
    pub(crate) fn new(size: usize) -> Self {
        Self {
            hasher: RandomState::new(),
            generations: Mutex::default(),
            size: size.max(1),
        }
    }

    /// What it is called here.
    pub(crate) fn name(&self, credential: &impl Hash) -> u64 {
        self.hasher.hash_one(credential)
    }

    /// Whether it was good a while ago.
    pub(crate) fn contains(&self, name: u64) -> bool {
        self.generations
            .lock()
            .iter()
            .any(|each| each.contains(&name))
    }

    /// It is good.
    pub(crate) fn insert(&self, name: u64) {
        let mut generations = self.generations.lock();
        if generations[0].contains(&name) {
            return;
        }
        if generations[0].len() >= self.size {
            generations.swap(0, 1);
            generations[0].clear();
        }
        generations[0].insert(name);
    }

    /// It is not good any more.
    pub(crate) fn remove(&self, name: u64) {
        for each in self.generations.lock().iter_mut() {
            each.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_more_than_the_limit_and_none_is_lost(limit in 0_usize..5, steps in prop::collection::vec(any::<(bool, u8)>(), 0..80)) {
            let (cap, caps) = (Cap::new(limit), Caps::new(limit));
            let mut held: Vec<(Option<Place>, u8, Option<OwnPlace>)> = Vec::new();
            for (take, who) in steps {
                let who = who % 3;
                if take {
                    let mine = held.iter().filter(|(_, other, place)| *other == who && place.is_some()).count();
                    let all = held.iter().filter(|(place, ..)| place.is_some()).count();
                    let (place, own) = (cap.take(), caps.take(Group::V6(u64::from(who))));
                    prop_assert_eq!(place.is_some(), all < limit);
                    prop_assert_eq!(own.is_some(), mine < limit);
                    held.push((place, who, own));
                } else if !held.is_empty() {
                    held.remove(usize::from(who) % held.len());
                }
            }
            drop(held);
            prop_assert_eq!((cap.now(), caps.clients()), (0, 0));
        }
    }

    #[test]
    fn known_credentials_are_bounded() {
        let known = Known::new(10);
        for number in 0..100_u64 {
            known.insert(number);
        }
        assert!((90..100).all(|number| known.contains(number)));
        assert!(
            known
                .generations
                .lock()
                .iter()
                .map(std::collections::HashSet::len)
                .sum::<usize>()
                <= 20
        );
        known.remove(95);
        assert!(!known.contains(95));
        assert_eq!(known.name(&"a"), known.name(&"a"));
        assert_ne!(known.name(&"a"), known.name(&"b"));
    }
}
