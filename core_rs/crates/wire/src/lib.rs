//! gRPC between the services: the generated messages, the one error table, the server.
//!
//! How an error of [`v1::inference_client`] calls travels: before the first frame the call fails with a
//! status; afterwards every unfinished choice gets a `finished` frame (`cancelled` or `error`), then comes the
//! `usage` frame, and then the stream ends with the status. A status carries the exact [`error::CoreError`]
//! in the binary trailer `helix-error-bin`.

pub mod client;
mod connection;
pub mod error;
pub mod rpc;
pub mod server;
#[cfg(test)]
mod testing;

/// Messages, clients and services generated from `core_rs/proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("helixflow.v1");
}

/// The encoded `FileDescriptorSet` of [`v1`], for the reflection service.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("helixflow.v1");

/// Service names in certificates (`spiffe://helixflow.local/<name>`).
pub mod service {
    /// The `OpenAI` endpoint.
    pub const GATEWAY: &str = "api-gateway";
    /// Keys, tokens and limits.
    pub const AUTH: &str = "auth-service";
    /// Text in, tokens out.
    pub const POOL: &str = "inference-pool";
    /// Metrics, health and console.
    pub const MONITORING: &str = "monitoring";
}
