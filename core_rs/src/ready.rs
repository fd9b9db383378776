//! Wake-ups from tokio to an event loop: one list, one eventfd.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use helix_wire::error::{Code, CoreError};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// What is ready, and the eventfd that says so.
pub(crate) struct Ready<T> {
    items: Mutex<Vec<T>>,
    event: File,
    filled: Notify,
    closed: AtomicBool,
}

/// A call's place on the list: it is there at most once.
pub(crate) struct Ticket {
    pub(crate) id: u64,
    listed: AtomicBool,
}

impl Ticket {
    pub(crate) fn new(id: u64) -> Self {
        Self {
            id,
            listed: AtomicBool::new(false),
        }
    }
}

impl<T: AsRef<Ticket>> Ready<Arc<T>> {
    /// Puts a call on the list, once until the list is drained.
    pub(crate) fn mark(&self, call: &Arc<T>) {
        let ticket: &Ticket = (**call).as_ref();
        if !ticket.listed.swap(true, Ordering::AcqRel) {
            self.push(Arc::clone(call));
        }
    }

    /// Takes the calls off the list and resets the eventfd.
    pub(crate) fn drain_ids(&self) -> Vec<u64> {
        let unlist = |call: Arc<T>| {
            let ticket: &Ticket = (*call).as_ref();
            ticket.listed.store(false, Ordering::Release);
            ticket.id
        };
        self.drain().into_iter().map(unlist).collect()
    }
}

impl<T> Ready<T> {
    pub(crate) fn new() -> Result<Self, CoreError> {
        Ok(Self {
            items: Mutex::default(),
            event: eventfd()?,
            filled: Notify::new(),
            closed: AtomicBool::new(false),
        })
    }

    pub(crate) fn fileno(&self) -> i32 {
        self.event.as_raw_fd()
    }

    /// Puts something on the list.
    pub(crate) fn push(&self, item: T) {
        let first = {
            let mut items = self.items.lock();
            items.push(item);
            items.len() == 1
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
    pub(crate) fn drain(&self) -> Vec<T> {
        // Before the list is taken: what comes in between leaves a needless wake-up, never a lost one.
        let _ = (&self.event).read(&mut [0; 8]);
        std::mem::take(&mut *self.items.lock())
    }

    /// From here on nobody but the marking thread signals.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.signal();
    }

    fn signal(&self) {
        // It can only fail when the counter is at its limit, and then the eventfd is readable anyway.
        let _ = (&self.event).write(&1_u64.to_ne_bytes());
    }
}

/// Signals the event loop once per round of ready tasks, not once per call.
pub(crate) async fn flush<T>(ready: Arc<Ready<T>>) {
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
