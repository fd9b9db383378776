//! Services that are handled in Python: messages cross as bytes.

mod client;
mod server;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

pub(crate) use client::{RpcCall, RpcClient};
pub(crate) use server::{RpcIncoming, RpcServer};

/// The protos as an encoded `FileDescriptorSet`.
#[pyfunction]
pub(crate) fn descriptors(py: Python<'_>) -> Bound<'_, PyBytes> {
    PyBytes::new(py, helix_wire::DESCRIPTORS)
}
