//! What the queue's thread writes to.

use std::io;

use crate::file::File;
use crate::output::Stream;

pub(crate) enum Target {
    Stream(Stream),
    File(File),
}

impl Target {
    /// Writes whole lines. What a file does not take (a full disk) goes to standard error.
    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream(stream) => stream.write(data),
            Self::File(file) => file.write(data).or_else(|_| Stream::Error.write(data)),
        }
    }
}
