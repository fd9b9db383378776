//! The front door: accepts connections, ends TLS, speaks HTTP/1.1 and HTTP/2, and forwards requests to workers on Unix
//! sockets. It is strict in what it reads, and whoever exceeds a limit is refused without others noticing.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `serve` | the life of a connection |
//! | `tls` | certificates, tickets, clients' certificates; replaced while connections run |
//! | `watched` | the clock of a connection, over `framing` (HTTP/1.1) and `frames` (HTTP/2), which only look at bytes |
//! | `forward` | one request: `hygiene`, client, worker, answer |
//! | `bodies` | what flows: least speed, unfolding, folding, the end of a stream whose worker died |
//! | `workers` | who answers, and kept connections to them |
//! | `counts` | caps in all and for each client; credentials that were good |
//! | `address`, `proxy` | who the client is |
//! | `refusal` | answers of our own |
//! | `options`, `stats` | limits and counts |

mod address;
mod bodies;
mod counts;
mod forward;
mod frames;
mod framing;
mod hygiene;
mod options;
mod proxy;
mod refusal;
mod serve;
mod stats;
mod tls;
mod watched;
mod workers;

pub use address::{Network, NetworkError};
pub use forward::{CLIENT, FINGERPRINT, KNOWN, PROTOCOL, SPIFFE};
pub use options::Options;
pub use serve::Front;
pub use stats::{Count, Stats};
pub use tls::{FileError, Pair, Tls, TlsFiles};
pub use workers::Workers;
