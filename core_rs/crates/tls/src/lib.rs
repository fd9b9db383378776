//! Mutual TLS between the services of `HelixFlow`.
//!
//! TLS 1.3 only, both sides authenticated, and the peer must be the *service* that was expected:
//! every certificate carries one SPIFFE URI, `spiffe://helixflow.local/<service>`, and a valid
//! certificate of another service is refused inside the handshake. A revocation list is honoured
//! when there is one, and then fails closed: an expired list refuses everybody.
//!
//! Host names and addresses are not compared. Inside, a peer is found through configuration or DNS
//! and moves between addresses, while its identity stays; the SPIFFE URI names the service that
//! runs behind any of them, and only the private CA can issue it. What a host name would add is
//! covered by the identity, and what it would cost is a certificate per address.
//!
//! Sessions are never resumed: a resumed session would outlive a revoked or replaced certificate.
//!
//! [`ServerTls`] and [`ClientTls`] hold a verified configuration that [`ServerTls::reload`] replaces
//! while connections run: new files are checked completely before anything changes, and a bad set
//! leaves the old one in service.

mod client;
mod error;
mod files;
mod identity;
mod live;
mod material;
mod server;
mod verify;

pub use client::ClientTls;
pub use error::{HandshakeError, TlsError};
pub use files::Files;
pub use identity::{Peer, TRUST_DOMAIN};
pub use server::{HANDSHAKE_TIMEOUT, ServerTls};
