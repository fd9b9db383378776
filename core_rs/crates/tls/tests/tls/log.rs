//! Catches what the code under test logs, from whatever thread.

use std::fmt::{Debug, Write as _};
use std::path::Path;
use std::sync::{LazyLock, Mutex};

use tokio::sync::watch;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

static LINES: LazyLock<Mutex<Vec<String>>> = LazyLock::new(Mutex::default);
static COUNT: LazyLock<watch::Sender<usize>> = LazyLock::new(|| {
    // Threads of the runtime log, so the subscriber has to be everybody's.
    tracing::subscriber::set_global_default(Catch).unwrap();
    watch::Sender::new(0)
});

/// Starts catching.
pub(crate) fn start() {
    LazyLock::force(&COUNT);
}

/// The lines so far that mention a file in `folder`.
pub(crate) fn about(folder: &Path) -> Vec<String> {
    let name = folder.to_str().unwrap();
    LINES
        .lock()
        .unwrap()
        .iter()
        .filter(|line| line.contains(name))
        .cloned()
        .collect()
}

/// Waits until `folder` has been mentioned `n` times.
pub(crate) async fn wait(folder: &Path, n: usize) {
    let mut seen = COUNT.subscribe();
    tokio::time::timeout(
        crate::support::LIMIT,
        seen.wait_for(|_| about(folder).len() >= n),
    )
    .await
    .unwrap()
    .unwrap();
}

struct Catch;

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, "{}={value:?} ", field.name()).unwrap();
    }
}

impl Subscriber for Catch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("helix_tls")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(format!("{} ", event.metadata().level()));
        event.record(&mut text);
        LINES.lock().unwrap().push(text.0);
        COUNT.send_modify(|n| *n += 1);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
