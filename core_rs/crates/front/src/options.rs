//! What a client may take: times, rates and numbers, each with its reason.

use std::time::Duration;

use crate::address::Network;

/// See the fields.
#[derive(Clone, Debug)]
pub struct Options {
    /// A handshake takes longer only for somebody who does not mean to finish it.
    pub handshake: Duration,
    /// A connection that says nothing is worth nothing to its client.
    pub first_byte: Duration,
    /// From the first byte of a head to its last: slow senders of heads cost a connection each.
    pub head: Duration,
    /// Least bytes a second of a body. No total: a large body over a slow line is no attack.
    pub body_rate: u64,
    /// How long a body may be slower than that.
    pub body_grace: Duration,
    /// Between two requests: longer than the 60 s after which load balancers give a connection up.
    pub idle: Duration,
    /// Idle so long, an HTTP/1.1 connection gives its buffers away.
    pub park: Duration,
    /// A client that takes nothing for so long has gone, or keeps what it is sent in our memory.
    pub write_stall: Duration,
    /// Connections in all: each costs memory and a file descriptor.
    pub connections: usize,
    /// Connections of one client, so that nobody has all of them.
    pub connections_per_client: usize,
    /// Handshakes at once: they cost a signature each, and one client must not fill the line of all others.
    pub handshakes: usize,
    /// Requests at once of one client that has shown no good credential.
    pub strangers_per_client: usize,
    /// Streams of one HTTP/2 connection.
    pub streams: u32,
    /// Streams that an HTTP/2 connection may reset while they wait to be seen.
    pub resets: usize,
    /// The largest head of a request (bytes).
    pub head_bytes: usize,
    /// What a compressed body may unfold to (bytes).
    pub unfolded_bytes: u64,
    /// Proxies whose word on the client's address counts.
    pub trusted: Vec<Network>,
    /// Connections of trusted proxies begin with PROXY protocol v2.
    pub proxy_protocol: bool,
    /// For a worker that starts, a request waits so long.
    pub worker_wait: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            first_byte: Duration::from_secs(10),
            head: Duration::from_secs(20),
            body_rate: 1024,
            body_grace: Duration::from_secs(15),
            idle: Duration::from_secs(75),
            park: Duration::from_secs(1),
            write_stall: Duration::from_secs(60),
            connections: 4096,
            connections_per_client: 1024,
            handshakes: 128,
            strangers_per_client: 512,
            streams: 1000,
            resets: 64,
            head_bytes: 65_536,
            unfolded_bytes: 8 << 20,
            trusted: Vec::new(),
            proxy_protocol: false,
            worker_wait: Duration::from_secs(10),
        }
    }
}
