//! Services whose methods are handled elsewhere, in Python: messages travel as bytes.
//!
//! Which services and methods there are, and which answers are streams, is read from [`crate::DESCRIPTORS`].
//!
//! A refusal as `draining` says that the server has not begun with the call: the client tries the next server. A
//! handler that is cut while it works ends as `unavailable` instead.

mod client;
mod codec;
mod keeper;
mod server;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::LazyLock;

use prost::Message as _;
use prost_types::{FileDescriptorProto, FileDescriptorSet};

pub use crate::connection::{Options, Transport};
pub use client::{Call, Client};
pub use server::{Desk, Incoming, Raw, Reply};

/// One method of a service.
#[derive(Debug)]
pub struct Method {
    /// Its service, for example `helixflow.v1.AuthService`.
    pub service: String,
    /// `AuthService/Verify`.
    pub name: String,
    /// The answer is a stream, not one message.
    pub streaming: bool,
}

/// Every method of the compiled-in protos by its path, for example `/helixflow.v1.AuthService/Verify`.
static METHODS: LazyLock<HashMap<String, Method>> = LazyLock::new(|| {
    // They are made by the build script; damaged ones have no methods, and every call says so.
    let set = FileDescriptorSet::decode(crate::DESCRIPTORS).unwrap_or_default();
    set.file.iter().flat_map(methods_of).collect()
});

fn methods_of(file: &FileDescriptorProto) -> impl Iterator<Item = (String, Method)> {
    file.service.iter().flat_map(|service| {
        service.method.iter().map(|method| {
            let full = format!("{}.{}", file.package(), service.name());
            let path = format!("/{full}/{}", method.name());
            let described = Method {
                service: full,
                name: format!("{}/{}", service.name(), method.name()),
                streaming: method.server_streaming(),
            };
            (path, described)
        })
    })
}

/// The method of a path; `None` when no proto has it.
pub fn method(path: &str) -> Option<&'static Method> {
    METHODS.get(path)
}
