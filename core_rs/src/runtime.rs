//! The tokio runtime of a client or a server.

use helix_wire::error::{Code, CoreError};
use tokio::runtime::{Builder, Runtime};

/// A runtime with `threads` workers (at least one) whose threads carry `name`.
///
/// Start it inside the process that uses it: threads do not survive a fork.
pub(crate) fn build(name: &str, threads: usize) -> Result<Runtime, CoreError> {
    Builder::new_multi_thread()
        .worker_threads(threads.max(1))
        .thread_name(name)
        .enable_all()
        .build()
        .map_err(|error| {
            CoreError::new(
                Code::Internal,
                format!("cannot start the I/O threads of {name}: {error}"),
            )
        })
}
