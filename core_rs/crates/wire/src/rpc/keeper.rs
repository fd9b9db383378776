//! The task that keeps one connection to one of several equal servers.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::client::{Connection, Shared};
use crate::connection::{Connected, Endpoint, Options, jitter, pings, swapped};

/// Runs until its task is dropped.
pub(super) async fn keep(endpoints: Vec<Endpoint>, shared: Arc<Shared>, options: Options) {
    let mut keeper = Keeper {
        shared,
        options,
        number: 0,
        older: JoinSet::new(),
    };
    let mut failures = 0;
    for endpoint in endpoints.iter().cycle() {
        let opened = Instant::now();
        let reason = match endpoint.connect().await {
            Ok(connected) => keeper.hold(endpoint, connected).await,
            Err(reason) => reason,
        };
        keeper.shared.lost(&endpoint.address(), &reason);
        // A server that comes and goes is not hammered: only a connection that stayed starts over.
        if opened.elapsed() > keeper.options.backoff_max {
            failures = 0;
        }
        failures += 1;
        // The next server is tried at once; a pause comes when all have failed.
        if failures % endpoints.len() == 0 {
            let rounds = u32::try_from(failures / endpoints.len()).unwrap_or(u32::MAX);
            let doubled = 2_u32.saturating_pow(rounds - 1);
            let pause = keeper.options.backoff_min.saturating_mul(doubled);
            sleep(jitter(pause.min(keeper.options.backoff_max))).await;
        }
    }
}

struct Keeper {
    shared: Arc<Shared>,
    options: Options,
    /// Of the newest connection.
    number: u64,
    /// Connections that were replaced, until their last call has ended.
    older: JoinSet<String>,
}

impl Keeper {
    /// Keeps a connection, and those that replace it when certificates change, until one is lost; returns why.
    async fn hold(&mut self, endpoint: &Endpoint, connected: Connected) -> String {
        let mut swaps = endpoint.swaps();
        let mut refusals = self.shared.refusals();
        let mut answers = connected.answers.clone();
        let mut cut = connected.driver.abort_handle();
        let mut current = self.publish(endpoint, connected);
        loop {
            let number = self.number;
            tokio::select! {
                reason = &mut current => return reason,
                () = refused(&mut refusals, number) => {
                    // Its streams may go on for a while; nothing new goes there.
                    self.retire(current);
                    return "it takes no more calls".to_owned();
                }
                () = swapped(swaps.as_mut()) => match endpoint.connect().await {
                    Ok(fresh) => {
                        answers.clone_from(&fresh.answers);
                        cut = fresh.driver.abort_handle();
                        let fresh = self.publish(endpoint, fresh);
                        self.retire(std::mem::replace(&mut current, fresh));
                    }
                    Err(reason) => {
                        if let Err(reason) = endpoint.recheck(answers.as_ref()) {
                            cut.abort();
                            return reason;
                        }
                        tracing::warn!(peer = %endpoint.address(), %reason, "no connection with the new certificates");
                        self.shared.note(format!("with the new certificates: {reason}"));
                    }
                },
            }
        }
    }

    /// Gives a new connection to the calls; returns what ends with it and says why.
    fn publish(&mut self, endpoint: &Endpoint, connected: Connected) -> Watched {
        self.number += 1;
        self.shared.publish(Connection {
            number: self.number,
            address: endpoint.address(),
            channel: connected.channel,
        });
        let options = self.options.clone();
        let (mut driver, ping) = (connected.driver, connected.ping);
        Box::pin(async move {
            let limit = options.ping_timeout.as_millis();
            tokio::select! {
                _ = &mut driver => "the connection was closed".to_owned(),
                () = pings(ping, options) => {
                    // Its calls would wait for ever: cut them, so that they fail or go elsewhere.
                    driver.abort();
                    format!("no answer to a ping within {limit} ms")
                }
            }
        })
    }

    /// Goes on watching a connection that only old calls use.
    fn retire(&mut self, watched: Watched) {
        while self.older.try_join_next().is_some() {}
        self.older.spawn(watched);
    }
}

type Watched = Pin<Box<dyn Future<Output = String> + Send>>;

/// Completes when the connection of this number takes no more calls.
async fn refused(refusals: &mut watch::Receiver<u64>, number: u64) {
    // An error means that the client is gone, and this task with it.
    let _ = refusals.wait_for(|refused| *refused >= number).await;
}
