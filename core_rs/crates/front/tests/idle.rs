//! What an idle connection keeps, counted by the allocator: a program of its own, for nothing else may allocate.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(unsafe_code)] // an allocator is

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use helix_front::{Options, TlsFiles};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

#[allow(dead_code)] // the other tests' too
#[path = "front/harness.rs"]
mod harness;

use harness::{Authority, Stage, echo, quick, script, tls, until};

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const CONNECTIONS: usize = 300;

/// Idle connections give their buffers away after this time.
const PARK: Duration = Duration::from_millis(20);

fn soon() -> Options {
    Options {
        park: PARK,
        ..quick()
    }
}

/// Bytes that are allocated now.
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is the system's allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> S {
    stream.write_all(GET).await.unwrap();
    until(&mut stream, "http: 1.1\n").await;
    stream
}

/// Bytes for each of the connections that `connect` makes, once nothing changes any more.
async fn kept<S>(connect: impl AsyncFn() -> S) -> usize {
    // What is made once, and grows in steps, is there before.
    let mut streams = vec![connect().await, connect().await];
    let before = LIVE.load(Ordering::Relaxed);
    for _ in 0..CONNECTIONS {
        streams.push(connect().await);
    }
    let mut last = 0;
    loop {
        // Nobody tells when the last of them is parked.
        tokio::time::sleep(5 * PARK).await;
        let now = LIVE.load(Ordering::Relaxed);
        if now == last {
            return now.saturating_sub(before) / CONNECTIONS;
        }
        last = now;
    }
}

/// One test, for what others allocate would be counted.
#[tokio::test]
async fn an_idle_connection_keeps_little() {
    let mut stage = Stage::plain(soon());
    stage.worker(script(echo));
    let plain = kept(async || ask(stage.connect().await).await).await;
    assert!(plain < 7_000, "{plain} bytes");

    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = TlsFiles {
        pairs: vec![authority.pair(folder.path(), "own", &rcgen::PKCS_ECDSA_P256_SHA256)],
        client_ca: None,
        client_crl: None,
    };
    let mut stage = Stage::with_tls(soon(), folder, files);
    stage.worker(script(echo));
    let config = Arc::new(authority.client(None, &["http/1.1"]));
    let both = kept(async || ask(tls(stage.address, &config).await.unwrap()).await).await;
    // The client's half of the session is among them.
    assert!(both < 22_000, "{both} bytes");
}
