//! The workers behind the front, each on a Unix socket, and connections to them that are kept.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::refusal::Body;

/// Connections to a worker that wait for a request; more are closed.
const KEPT: usize = 64;
/// What is read ahead of the client from a worker (bytes).
const BUFFER: usize = 16_384;

/// One worker.
#[derive(Debug)]
pub(crate) struct Worker {
    path: PathBuf,
    active: AtomicUsize,
    kept: Mutex<Vec<SendRequest<Body>>>,
}

/// Those that take requests now.
#[derive(Debug)]
pub struct Workers {
    list: ArcSwap<Vec<Arc<Worker>>>,
    changed: watch::Sender<()>,
    turn: AtomicUsize,
}

/// A connection to a worker, for one request. Comes back when the answer has been read to its end.
#[derive(Debug)]
pub(crate) struct Lease {
    worker: Arc<Worker>,
    sender: Option<SendRequest<Body>>,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            list: ArcSwap::default(),
            changed: watch::Sender::new(()),
            turn: AtomicUsize::new(0),
        }
    }
}

impl Workers {
    /// From now on requests go to these; what runs in others goes on.
    pub fn set(&self, paths: &[PathBuf]) {
        let old = self.list.load();
        let known = |path: &Path| old.iter().find(|worker| worker.path == path).cloned();
        let list = paths
            .iter()
            .map(|path| known(path).unwrap_or_else(|| Worker::new(path)));
        let list: Vec<_> = list.collect();
        for worker in old.iter().filter(|worker| !paths.contains(&worker.path)) {
            worker.kept.lock().clear();
        }
        self.list.store(Arc::new(list));
        self.changed.send_replace(());
    }

    /// Workers that take requests.
    pub fn len(&self) -> usize {
        self.list.load().len()
    }

    /// Whether nobody takes requests.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The one with the least to do; waits up to `patience` for the first.
    pub(crate) async fn pick(&self, patience: Duration) -> Option<Arc<Worker>> {
        let mut changed = self.changed.subscribe();
        if let Some(worker) = self.least() {
            return Some(worker);
        }
        tokio::time::timeout(patience, async {
            loop {
                changed.changed().await.ok()?;
                if let Some(worker) = self.least() {
                    return Some(worker);
                }
            }
        })
        .await
        .ok()
        .flatten()
    }

    fn least(&self) -> Option<Arc<Worker>> {
        let list = self.list.load();
        // Among equals they take turns.
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..list.len())
            .map(|at| &list[(first + at) % list.len()])
            .min_by_key(|worker| worker.active.load(Ordering::Relaxed))
            .cloned()
    }
}

impl Worker {
    fn new(path: &Path) -> Arc<Self> {
        Arc::new(Self {
            path: path.to_owned(),
            active: AtomicUsize::new(0),
            kept: Mutex::default(),
        })
    }

    /// A connection that is kept, or a new one.
    pub(crate) async fn lease(self: &Arc<Self>) -> io::Result<Lease> {
        let mut lease = self.empty();
        while let Some(mut sender) = self.pop() {
            if sender.ready().await.is_ok() {
                lease.sender = Some(sender);
                return Ok(lease);
            }
        }
        lease.sender = Some(self.connect().await?);
        Ok(lease)
    }

    /// A new connection: one that was kept may have been closed meanwhile.
    pub(crate) async fn fresh(self: &Arc<Self>) -> io::Result<Lease> {
        let mut lease = self.empty();
        lease.sender = Some(self.connect().await?);
        Ok(lease)
    }

    fn empty(self: &Arc<Self>) -> Lease {
        self.active.fetch_add(1, Ordering::Relaxed);
        Lease {
            worker: Arc::clone(self),
            sender: None,
        }
    }

    fn pop(&self) -> Option<SendRequest<Body>> {
        let mut kept = self.kept.lock();
        while let Some(sender) = kept.pop() {
            if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }

    async fn connect(&self) -> io::Result<SendRequest<Body>> {
        let stream = UnixStream::connect(&self.path).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to a worker ended");
            }
        });
        Ok(sender)
    }
}

impl Lease {
    /// What sends.
    pub(crate) fn sender(&mut self) -> io::Result<&mut SendRequest<Body>> {
        self.sender
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// The answer was read to its end: the connection takes another request.
    pub(crate) fn give_back(&mut self) {
        if let Some(sender) = self.sender.take() {
            let mut kept = self.worker.kept.lock();
            if kept.len() < KEPT {
                kept.push(sender);
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.worker.active.fetch_sub(1, Ordering::Relaxed);
    }
}
