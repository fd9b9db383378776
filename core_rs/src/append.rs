//! A write that keeps the GIL.

use std::io;

use pyo3::prelude::*;

/// Writes to a descriptor of a file without letting go of the GIL; returns how much was written.
///
/// `os.write` lets go of it, and whoever takes it meanwhile keeps the event loop waiting: two changes of the thread for
/// a copy into the page cache, which takes a microsecond.
#[pyfunction]
#[allow(
    unsafe_code,
    reason = "the standard library wants to own the descriptor"
)]
pub(crate) fn append(descriptor: i32, data: &[u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the pointer and the length are those of a slice that lives longer than the call.
        let written = unsafe { libc::write(descriptor, data.as_ptr().cast(), data.len()) };
        if let Ok(written) = usize::try_from(written) {
            return Ok(written);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
