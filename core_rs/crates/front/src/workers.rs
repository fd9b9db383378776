//! The workers behind the front, each on a Unix socket, and connections to them that are kept.

use std::future::{Future as _, poll_fn};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
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
    kept: Mutex<Vec<Box<Link>>>,
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
    link: Option<Box<Link>>,
}

/// A connection to a worker. It goes on while its holder waits for it: a task of its own would cost every piece of an
/// answer a channel and a change of tasks.
pub(crate) struct Link {
    sender: SendRequest<Body>,
    /// `None` once it has ended.
    driver: Option<http1::Connection<TokioIo<UnixStream>, Body>>,
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
        while let Some(mut link) = self.pop() {
            if link.ready().await {
                lease.link = Some(link);
                return Ok(lease);
            }
        }
        lease.link = Some(Link::open(&self.path).await?);
        Ok(lease)
    }

    /// A new connection: one that was kept may have been closed meanwhile.
    pub(crate) async fn fresh(self: &Arc<Self>) -> io::Result<Lease> {
        let mut lease = self.empty();
        lease.link = Some(Link::open(&self.path).await?);
        Ok(lease)
    }

    fn empty(self: &Arc<Self>) -> Lease {
        self.active.fetch_add(1, Ordering::Relaxed);
        Lease {
            worker: Arc::clone(self),
            link: None,
        }
    }

    fn pop(&self) -> Option<Box<Link>> {
        self.kept.lock().pop()
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ended = self.driver.is_none();
        formatter
            .debug_struct("Link")
            .field("ended", &ended)
            .finish_non_exhaustive()
    }
}

impl Link {
    async fn open(path: &Path) -> io::Result<Box<Self>> {
        let stream = UnixStream::connect(path).await?;
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        Ok(Box::new(Self {
            sender,
            driver: Some(driver),
        }))
    }

    /// Reads and writes what there is; the task of `context` is woken when there is more.
    fn drive(&mut self, context: &mut Context<'_>) {
        let Some(driver) = &mut self.driver else {
            return;
        };
        if let Poll::Ready(outcome) = Pin::new(driver).poll(context) {
            self.driver = None;
            if let Err(error) = outcome {
                tracing::debug!(%error, "connection to a worker ended");
            }
        }
    }

    /// Whether it takes a request; waits for the end of the one before.
    async fn ready(&mut self) -> bool {
        poll_fn(|context| {
            self.drive(context);
            if self.driver.is_none() {
                return Poll::Ready(false);
            }
            self.sender.poll_ready(context).map(|ready| ready.is_ok())
        })
        .await
    }

    /// Sends a request; returns the head of the answer, whose body comes as long as the lease is driven.
    ///
    /// The error holds the request when nothing of it was sent.
    pub(crate) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Box<TrySendError<Request<Body>>>> {
        let mut answer = pin!(self.sender.try_send_request(request));
        poll_fn(|context| {
            self.drive(context);
            answer.as_mut().poll(context).map_err(Box::new)
        })
        .await
    }
}

impl Lease {
    /// The connection; `None` once it was given back.
    pub(crate) fn link(&mut self) -> Option<&mut Link> {
        self.link.as_deref_mut()
    }

    /// Lets the answer go on.
    pub(crate) fn drive(&mut self, context: &mut Context<'_>) {
        if let Some(link) = &mut self.link {
            link.drive(context);
        }
    }

    /// The answer was read to its end: the connection takes another request.
    pub(crate) fn give_back(&mut self) {
        if let Some(link) = self.link.take() {
            let mut kept = self.worker.kept.lock();
            if kept.len() < KEPT {
                kept.push(link);
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.worker.active.fetch_sub(1, Ordering::Relaxed);
    }
}
