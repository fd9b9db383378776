//! A desk whose calls a test answers, and what the tests say often.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use helix_tls::ServerTls;
use tokio::sync::mpsc;

use crate::error::{Code, CoreError};
use crate::rpc::{Call, Client, Desk, Incoming, Options, Raw, Transport};
use crate::server::{Health, Limits, Listener, Server, Services};

pub(super) const LIMIT: Duration = Duration::from_secs(10);
pub(super) const VERIFY: &str = "/helixflow.v1.AuthService/Verify";
pub(super) const WATCH: &str = "/helixflow.v1.AuthService/Watch";

struct Queue {
    calls: mpsc::UnboundedSender<Incoming>,
    changed: mpsc::UnboundedSender<u64>,
}

impl Desk for Queue {
    fn call(&self, call: Incoming) {
        let _ = self.calls.send(call);
    }

    fn changed(&self, id: u64) {
        let _ = self.changed.send(id);
    }
}

/// A server of the auth-service. Dropping it cuts every connection, as kill -9 does.
pub(super) struct Served {
    pub(super) server: Server,
    pub(super) health: Health,
    calls: mpsc::UnboundedReceiver<Incoming>,
    changed: mpsc::UnboundedReceiver<u64>,
}

pub(super) async fn serve(listen: &str, tls: Option<Arc<ServerTls>>, max_calls: usize) -> Served {
    let (call, calls) = mpsc::unbounded_channel();
    let (change, changed) = mpsc::unbounded_channel();
    let desk = Arc::new(Queue {
        calls: call,
        changed: change,
    });
    let names = vec!["AuthService".to_owned(), "AdminService".to_owned()];
    let raw = Raw::new(names, desk, max_calls).unwrap();
    let services = Services::default().with_raw(raw);
    let health = services.health();
    let listener = Listener::bind(listen, tls).await.unwrap();
    let server = Server::start(listener, services, Limits::default())
        .await
        .unwrap();
    Served {
        server,
        health,
        calls,
        changed,
    }
}

impl Served {
    pub(super) async fn start() -> Self {
        serve("127.0.0.1:0", None, 64).await
    }

    pub(super) fn address(&self) -> String {
        self.server.address().to_string()
    }

    /// The next call that comes in.
    pub(super) async fn call(&mut self) -> Incoming {
        within(self.calls.recv()).await.unwrap()
    }

    pub(super) fn has_call(&mut self) -> bool {
        self.calls.try_recv().is_ok()
    }

    pub(super) async fn changed(&mut self) -> u64 {
        within(self.changed.recv()).await.unwrap()
    }

    /// Answers everything with one message until it is dropped.
    pub(super) fn answer_all(mut self, message: &'static str) -> Answering {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        tokio::spawn(async move {
            while let Some(call) = self.calls.recv().await {
                counter.fetch_add(1, Ordering::Relaxed);
                call.reply.finish(Some(message.into()));
            }
        });
        Answering {
            address: self.server.address().to_string(),
            count,
            _server: self.server,
        }
    }
}

pub(super) struct Answering {
    pub(super) address: String,
    pub(super) count: Arc<AtomicUsize>,
    _server: Server,
}

pub(super) fn quick() -> Options {
    Options {
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        ..Options::default()
    }
}

pub(super) fn client(addresses: &[String]) -> Client {
    Client::start(addresses, "auth-service", &Transport::Plain, &quick()).unwrap()
}

/// A call that has all the time of the test.
pub(super) fn call(client: &Client, path: &'static str) -> Call {
    call_within(client, path, LIMIT)
}

pub(super) fn call_within(client: &Client, path: &'static str, timeout: Duration) -> Call {
    let path = http::uri::PathAndQuery::from_static(path);
    client.call(path, "question".into(), "req-1".into(), Some(timeout))
}

/// Reads a call to its end.
pub(super) async fn drain(mut call: Call) -> Result<Vec<Bytes>, CoreError> {
    let mut messages = Vec::new();
    while let Some(message) = within(call.next()).await? {
        messages.push(message);
    }
    Ok(messages)
}

/// Starts to read a call, so that it is sent.
pub(super) fn reading(call: Call) -> tokio::task::JoinHandle<Result<Vec<Bytes>, CoreError>> {
    tokio::spawn(drain(call))
}

pub(super) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work)
        .await
        .expect("nothing came")
}

pub(super) fn code<T: std::fmt::Debug>(outcome: Result<T, CoreError>) -> Code {
    outcome.unwrap_err().code
}
