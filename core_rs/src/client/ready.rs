//! Wake-ups from tokio to an event loop: one list of calls, one eventfd.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use helix_wire::error::{Code, CoreError};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::call::Shared;

/// Calls that changed, and the eventfd that says so.
pub(crate) struct Ready {
    calls: Mutex<Vec<Arc<Shared>>>,
    event: File,
    filled: Notify,
    closed: AtomicBool,
}

impl Ready {
    pub(super) fn new() -> Result<Self, CoreError> {
        Ok(Self {
            calls: Mutex::default(),
            event: eventfd()?,
            filled: Notify::new(),
            closed: AtomicBool::new(false),
        })
    }

    pub(super) fn fileno(&self) -> i32 {
        self.event.as_raw_fd()
    }

    /// Puts a call on the list, once until the list is drained.
    pub(crate) fn mark(&self, call: &Arc<Shared>) {
        if call.listed.swap(true, Ordering::AcqRel) {
            return;
        }
        let first = {
            let mut calls = self.calls.lock();
            calls.push(Arc::clone(call));
            calls.len() == 1
        };
        if !first {
            return;
        }
        if self.closed.load(Ordering::Acquire) {
            self.signal();
        } else {
            self.filled.notify_one();
        }
    }

    /// Takes the list and resets the eventfd.
    pub(super) fn drain(&self) -> Vec<u64> {
        // Before the list is taken: a call that comes in between leaves a needless wake-up, never a lost one.
        let _ = (&self.event).read(&mut [0; 8]);
        let calls = std::mem::take(&mut *self.calls.lock());
        let unlist = |call: &Arc<Shared>| {
            call.listed.store(false, Ordering::Release);
            call.id
        };
        calls.iter().map(unlist).collect()
    }

    /// From here on nobody but the marking thread signals.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.signal();
    }

    fn signal(&self) {
        // It can only fail when the counter is at its limit, and then the eventfd is readable anyway.
        let _ = (&self.event).write(&1_u64.to_ne_bytes());
    }
}

/// Signals the event loop once per round of ready tasks, not once per call.
pub(super) async fn flush(ready: Arc<Ready>) {
    loop {
        ready.filled.notified().await;
        // Comes back when the other tasks that can run have run: their calls travel with this signal.
        tokio::task::yield_now().await;
        ready.signal();
    }
}

#[allow(unsafe_code, reason = "the standard library has no eventfd")]
fn eventfd() -> Result<File, CoreError> {
    // SAFETY: eventfd takes no pointers.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if descriptor < 0 {
        let reason = std::io::Error::last_os_error();
        return Err(CoreError::new(
            Code::Internal,
            format!("cannot create an eventfd: {reason}"),
        ));
    }
    // SAFETY: the descriptor was just created and nobody else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}
