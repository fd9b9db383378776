//! Counts of what happened, for whoever asks.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident)*) => {
        /// Counts since the start.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub $name: Count,)* }

        impl Stats {
            /// All of them by name.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

stats! {
    /// Connections that were accepted.
    accepted
    /// Connections that were closed at once: there were too many in all.
    crowded
    /// Connections that were closed at once: their client had too many.
    crowded_client
    /// Handshakes that failed, or took too long.
    handshakes_failed
    /// Connections on which nothing was said in time.
    silent
    /// Connections whose client took nothing for too long.
    stalled
    /// Connections with too many frames that carry nothing.
    floods
    /// Connections that took no further request: their client's certificate is not good any more.
    revoked
    /// Requests that were read.
    requests
    /// Requests that reached no worker, or got no answer of one.
    refused
    /// Requests that were sent to a worker once more: the first had taken nothing of them.
    resent
    /// Times that new certificates were taken into use.
    swaps
}
