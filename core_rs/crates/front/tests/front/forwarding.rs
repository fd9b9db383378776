//! What arrives at a worker and comes back, and what happens when a worker goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_compression::tokio::bufread::{GzipDecoder, GzipEncoder, ZstdEncoder};
use helix_front::Options;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{Stage, echo, feeding, quick, rest, script, text, until};

const GET: &str = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn close(request: &str) -> String {
    request.replacen("\r\n\r\n", "\r\nconnection: close\r\n\r\n", 1)
}

#[tokio::test]
async fn a_worker_is_told_who_asks_and_nothing_that_a_client_made_up() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(echo));
    let answer = stage
        .raw(
            "POST /v1/x?a=b HTTP/1.1\r\nHost: localhost:1\r\nx-helixflow-client: 6.6.6.6\r\nX-Helixflow-Client-Spiffe: spiffe://evil\r\n\
             connection: close, x-mine\r\nx-mine: 1\r\nkeep-alive: 5\r\nte: trailers\r\naccept-encoding: br\r\n\
             transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        )
        .await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(
        body,
        "POST /v1/x?a=b\nhost: localhost:1\ntransfer-encoding: chunked\nx-helixflow-client: 127.0.0.1\n\
         x-helixflow-client-http: 1.1\n\nabc"
    );
}

#[tokio::test]
async fn an_absolute_target_names_the_host() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(echo));
    let answer = stage
        .raw("GET http://a.example/x HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n")
        .await;
    assert!(answer.contains("GET /x\nhost: a.example\n"), "{answer}");
}

#[tokio::test]
async fn connections_to_a_worker_are_kept() {
    let mut stage = Stage::plain(quick());
    let accepted = Arc::clone(&stage.worker(script(echo)).accepted);
    let mut stream = stage.connect().await;
    for _ in 0..10 {
        stream.write_all(GET.as_bytes()).await.unwrap();
        until(&mut stream, "http: 1.1\n\n").await;
    }
    for _ in 0..10 {
        stage.raw(&close(GET)).await;
    }
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_stream_passes_event_by_event() {
    let mut stage = Stage::plain(quick());
    let (events, answers) = feeding("text/event-stream", "once more");
    stage.worker(answers);
    let mut stream = stage.connect().await;
    stream.write_all(close(GET).as_bytes()).await.unwrap();
    for event in ["data: a\n\n", "data: b\n\n"] {
        events.send(event).await.unwrap();
        until(&mut stream, event).await;
    }
    drop(events);
    assert!(rest(&mut stream).await.ends_with("0\r\n\r\n"));
}

#[tokio::test]
async fn a_client_that_goes_is_seen_by_the_worker() {
    let mut stage = Stage::plain(quick());
    let (events, answers) = feeding("text/plain", "once more");
    stage.worker(answers);
    let mut stream = stage.connect().await;
    stream.write_all(GET.as_bytes()).await.unwrap();
    events.send("a").await.unwrap();
    until(&mut stream, "\r\na\r\n").await;
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), events.closed())
        .await
        .expect("the answer is dropped");
}

#[tokio::test]
async fn a_worker_that_dies_ends_its_streams_with_an_error_and_costs_nobody_else() {
    let mut stage = Stage::plain(Options {
        worker_wait: Duration::from_secs(10),
        ..Options::default()
    });
    let (events, answers) = feeding("text/event-stream", "short");
    stage.worker(answers);
    let mut streaming = stage.connect().await;
    streaming.write_all(close(GET).as_bytes()).await.unwrap();
    events.send("data: {\"half").await.unwrap();
    until(&mut streaming, "half").await;
    let mut idle = stage.connect().await;
    idle.write_all(GET.as_bytes()).await.unwrap();
    until(&mut idle, "short").await;

    stage.workers.set(&[]);
    stage.kill(0);
    let last = rest(&mut streaming).await;
    assert!(
        last.contains(
            "\n\ndata: {\"error\":{\"message\":\"the worker that answered ended; try again\""
        ),
        "{last}"
    );
    // The request waits for the next worker.
    idle.write_all(GET.as_bytes()).await.unwrap();
    stage.worker(script(|_| async { text("from the next one") }));
    until(&mut idle, "from the next one").await;
}

#[tokio::test]
async fn a_worker_that_dies_before_it_answers_is_an_error_that_may_be_tried_again() {
    let mut stage = Stage::plain(quick());
    let (told, mut hears) = tokio::sync::mpsc::channel(1);
    stage.worker(script(move |request| {
        let told = told.clone();
        async move {
            let id = request.headers()["x-request-id"].to_str().unwrap();
            told.send(id.to_owned()).await.unwrap();
            std::future::pending().await
        }
    }));
    let mut stream = stage.connect().await;
    stream.write_all(close(GET).as_bytes()).await.unwrap();
    let id = hears.recv().await.unwrap();
    stage.kill(0);
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("retry-after: 1"), "{answer}");
    // Under this id the worker has noted what it took.
    assert!(
        answer.contains(&format!("x-request-id: {id}\r\n")),
        "{answer}"
    );
    let none = stage.raw(&close(GET)).await;
    assert!(
        none.starts_with("HTTP/1.1 503") && none.contains("no worker"),
        "{none}"
    );
}

#[tokio::test]
async fn a_body_that_was_waited_for_and_is_not_wanted_breaks_no_connection() {
    let mut stage = Stage::plain(quick());
    let (ended, mut ends) = tokio::sync::mpsc::channel(1);
    stage.worker(script(move |request| {
        let ended = ended.clone();
        async move {
            tokio::spawn(async move {
                request.into_body().collect().await.ok();
                ended.send(()).await
            });
            text("early")
        }
    }));
    let mut stream = stage.connect().await;
    let head =
        "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 300000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until(&mut stream, "early").await;
    assert!(!answer.contains("100 Continue"), "{answer}");
    // The worker still waits for it: its connection is as it was.
    let over = tokio::time::timeout(Duration::from_millis(300), ends.recv()).await;
    assert!(over.is_err(), "the connection to the worker broke");
}

#[tokio::test]
async fn an_id_is_the_clients_where_it_is_one() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(|request| async move {
        let ids = request.headers().get_all("x-request-id").iter();
        text(ids.map(|id| id.to_str().unwrap_or("?")).collect::<String>())
    }));
    let long = "x".repeat(128);
    let longer = "x".repeat(129);
    for (given, kept) in [
        ("a.B_9-", true),
        (&*long, true),
        (&longer, false),
        ("", false),
        ("two words", false),
        ("\"quoted\"", false),
    ] {
        let head = format!(
            "GET / HTTP/1.1\r\nhost: a\r\nx-request-id: {given}\r\nconnection: close\r\n\r\n"
        );
        let answer = stage.raw(&head).await;
        let (_, told) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(told == given, kept, "{given:?}: {told:?}");
        assert!(kept || told.starts_with("req-"), "{given:?}: {told:?}");
    }
}

#[tokio::test]
async fn a_kept_connection_that_its_worker_closed_costs_no_request() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(echo));
    for _ in 0..20 {
        assert!(stage.raw(&close(GET)).await.starts_with("HTTP/1.1 200"));
        stage.cut(0);
    }
}

#[tokio::test]
async fn requests_go_where_least_is_done() {
    let mut stage = Stage::plain(quick());
    let (keep, answers) = feeding("text/plain", "first");
    stage.worker(answers);
    let mut busy = stage.connect().await;
    busy.write_all(GET.as_bytes()).await.unwrap();
    keep.send("busy").await.unwrap();
    until(&mut busy, "busy").await;
    stage.worker(script(|_| async { text("second") }));
    for _ in 0..5 {
        assert!(stage.raw(&close(GET)).await.contains("second"));
    }
}

async fn folded(encoder: impl tokio::io::AsyncRead) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::pin::pin!(encoder)
        .read_to_end(&mut bytes)
        .await
        .unwrap();
    bytes
}

async fn post(stage: &Stage, coding: &str, body: &[u8]) -> String {
    let mut stream = stage.connect().await;
    let head = format!(
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-encoding: {coding}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all(&[head.as_bytes(), body].concat())
        .await
        .unwrap();
    rest(&mut stream).await
}

#[tokio::test]
async fn folded_bodies_are_unfolded_up_to_a_limit() {
    let mut stage = Stage::plain(Options {
        unfolded_bytes: 1000,
        ..quick()
    });
    stage.worker(script(echo));
    let plain = "hello ".repeat(100);
    let gzip = folded(GzipEncoder::new(plain.as_bytes())).await;
    let zstd = folded(ZstdEncoder::new(plain.as_bytes())).await;
    for (coding, body) in [("gzip", &gzip), ("zstd", &zstd), ("GZIP", &gzip)] {
        let answer = post(&stage, coding, body).await;
        assert!(answer.ends_with(&plain), "{coding}: {answer}");
        assert!(!answer.contains("content-encoding"), "{answer}");
    }
    let bomb = folded(GzipEncoder::new(vec![b'a'; 1_000_000].as_slice())).await;
    assert!(
        post(&stage, "gzip", &bomb)
            .await
            .starts_with("HTTP/1.1 413")
    );
    assert!(
        post(&stage, "gzip", b"no gzip")
            .await
            .starts_with("HTTP/1.1 400")
    );
    assert!(
        post(&stage, "gzip", &gzip[..gzip.len() - 9])
            .await
            .starts_with("HTTP/1.1 400"),
        "cut off"
    );
    for coding in ["br", "gzip, zstd", "deflate"] {
        assert!(
            post(&stage, coding, b"x").await.starts_with("HTTP/1.1 415"),
            "{coding}"
        );
    }
    assert!(post(&stage, "identity", b"plain").await.ends_with("plain"));
}

#[tokio::test]
async fn json_is_folded_when_asked_for_and_streams_never() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(|request: http::Request<_>| async move {
        let mut response = text("{\"a\":1}".repeat(if request.uri().path() == "/small" {
            1
        } else {
            500
        }));
        let kind = if request.uri().path() == "/events" {
            "text/event-stream"
        } else {
            "application/json"
        };
        response
            .headers_mut()
            .insert(CONTENT_TYPE, kind.parse().unwrap());
        response
    }));
    let ask = async |path: &str, accept: &str| {
        let mut stream = stage.connect().await;
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\naccept-encoding: {accept}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        let at = bytes
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap();
        (
            String::from_utf8_lossy(&bytes[..at]).into_owned(),
            bytes.split_off(at + 4),
        )
    };
    let (head, body) = ask("/", "br, gzip").await;
    assert!(
        head.contains("content-encoding: gzip") && head.contains("vary: accept-encoding"),
        "{head}"
    );
    let chunk = body.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let mut plain = Vec::new();
    GzipDecoder::new(&body[chunk..])
        .read_to_end(&mut plain)
        .await
        .unwrap();
    assert_eq!(plain, "{\"a\":1}".repeat(500).into_bytes());
    assert!(
        ask("/", "gzip, zstd")
            .await
            .0
            .contains("content-encoding: zstd")
    );
    assert!(
        ask("/", "zstd;q=0.1, gzip;q=0.9")
            .await
            .0
            .contains("content-encoding: gzip")
    );
    for (path, accept) in [
        ("/", "identity"),
        ("/", "gzip;q=0"),
        ("/small", "gzip"),
        ("/events", "gzip"),
    ] {
        assert!(
            !ask(path, accept).await.0.contains("content-encoding"),
            "{path} {accept}"
        );
    }
}

#[tokio::test]
async fn a_client_that_waits_for_a_sign_gets_it_from_the_worker() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(
        |request: http::Request<hyper::body::Incoming>| async move {
            if request.uri().path() == "/refused" {
                let mut response = text("no");
                *response.status_mut() = http::StatusCode::UNAUTHORIZED;
                return response;
            }
            echo(request).await
        },
    ));
    let head = |path: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\nconnection: close\r\n\r\n"
        )
    };
    let mut stream = stage.connect().await;
    stream.write_all(head("/").as_bytes()).await.unwrap();
    until(&mut stream, "100 Continue").await;
    stream.write_all(b"hello").await.unwrap();
    assert!(rest(&mut stream).await.ends_with("hello"));
    let mut stream = stage.connect().await;
    stream.write_all(head("/refused").as_bytes()).await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}

#[tokio::test]
async fn draining_ends_idle_connections_and_lets_streams_finish() {
    let mut stage = Stage::plain(quick());
    let (events, answers) = feeding("text/plain", "x");
    stage.worker(answers);
    let mut streaming = stage.connect().await;
    streaming.write_all(GET.as_bytes()).await.unwrap();
    events.send("first").await.unwrap();
    until(&mut streaming, "first").await;
    let mut idle = stage.connect().await;
    idle.write_all(GET.as_bytes()).await.unwrap();
    until(&mut idle, "x").await;
    stage.front.drain();
    assert_eq!(rest(&mut idle).await, "");
    assert!(
        tokio::net::TcpStream::connect(stage.address).await.is_err(),
        "nothing is accepted"
    );
    events.send("last").await.unwrap();
    drop(events);
    assert!(rest(&mut streaming).await.contains("last"));
    while stage.front.connections() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_worker_that_cannot_be_reached_is_waited_for() {
    let mut stage = Stage::plain(Options {
        worker_wait: Duration::from_secs(10),
        ..Options::default()
    });
    stage.worker(script(echo));
    stage.kill(0);
    let mut stream = stage.connect().await;
    stream.write_all(close(GET).as_bytes()).await.unwrap();
    // Longer than a few attempts take, and nobody has said yet that the first one is gone.
    tokio::time::sleep(Duration::from_millis(300)).await;
    stage.worker(script(|_| async { text("from the next one") }));
    let answer = rest(&mut stream).await;
    assert!(answer.contains("from the next one"), "{answer}");
}
