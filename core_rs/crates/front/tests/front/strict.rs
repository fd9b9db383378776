//! Requests that could be read in two ways are refused, and their connections end.

use std::time::Duration;

use helix_front::Options;
use tokio::io::AsyncWriteExt as _;

use crate::harness::{Stage, echo, quick, rest, script, until};

fn stage() -> Stage {
    let mut stage = Stage::plain(Options {
        idle: Duration::from_millis(300),
        ..quick()
    });
    stage.worker(script(echo));
    stage
}

#[tokio::test]
async fn malformed_requests_get_an_error_and_no_worker_sees_them() {
    let stage = stage();
    for (request, status, said) in [
        ("GET / HTTP/1.1\nhost: a\n\n", "400", "CR LF"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nx:\0\r\n\r\n",
            "400",
            "control character",
        ),
        ("GET / HTTP/1.1\r\n\r\n", "400", "host once"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
            "400",
            "host once",
        ),
        ("GET / HTTP/1.1\r\nhost: u:p@a\r\n\r\n", "400", "host once"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nauthorization: b\r\nauthorization: c\r\n\r\n",
            "400",
            "Authorization",
        ),
        ("GET /a/../b HTTP/1.1\r\nhost: a\r\n\r\n", "400", "path"),
        ("GET /%zz HTTP/1.1\r\nhost: a\r\n\r\n", "400", "path"),
        ("GET /a\\b HTTP/1.1\r\nhost: a\r\n\r\n", "400", "path"),
        ("CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n", "400", ""),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            "400",
            "exclude each other",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            "400",
            "once, in digits",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n",
            "400",
            "`chunked` alone",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n",
            "400",
            "name: value",
        ),
        (
            "POST / HTTP/1.1\r\nhost: a\r\n folded\r\n\r\n",
            "400",
            "name: value",
        ),
        ("\x16\x03\x01\x02\r\n", "400", "control character"),
        ("hello\r\n\r\n", "400", "METHOD TARGET"),
    ] {
        let answer = stage.raw(request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request:?}: {answer}"
        );
        assert!(answer.contains(said), "{request:?}: {answer}");
        assert!(
            answer.contains("\"type\":\"invalid_request_error\"") || said.is_empty(),
            "{answer}"
        );
    }
    let large = format!("GET /?{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(70_000));
    assert!(stage.raw(&large).await.starts_with("HTTP/1.1 431"));
}

#[tokio::test]
async fn what_comes_before_a_malformed_request_is_answered() {
    let stage = stage();
    let answer = stage
        .raw("GET /one HTTP/1.1\r\nhost: a\r\n\r\nGET /two HTTP/1.1\nhost: a\n\n")
        .await;
    assert!(answer.contains("GET /one"), "{answer}");
    assert!(answer.contains("HTTP/1.1 400"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_whose_chunks_are_malformed_reaches_nobody_as_a_whole() {
    let stage = stage();
    let mut stream = stage.connect().await;
    stream
        .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        .await
        .unwrap();
    stream.write_all(b"zz\r\n").await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("chunks are malformed"),
        "{answer}"
    );
    for rest in ["zz\r\n", "3\r\nabcd", "0\r\nx: y\n\r\n", "0\r\nx y\r\n\r\n"] {
        let answer = stage
            .raw(&format!(
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{rest}"
            ))
            .await;
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.contains("x-request-id: req-"),
            "{rest:?}: {answer}"
        );
    }
}

#[tokio::test]
async fn requests_behind_each_other_are_answered_in_order() {
    let stage = stage();
    let mut stream = stage.connect().await;
    for number in 0..5 {
        let body = "x".repeat(number);
        let request =
            format!("POST /{number} HTTP/1.1\r\nhost: a\r\ncontent-length: {number}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
    }
    let mut all = String::new();
    for number in 0..5 {
        let body = "x".repeat(number);
        let end = format!("http: 1.1\n\n{body}");
        if !all.contains(&format!("POST /{number}\n")) || number == 4 {
            all += &until(&mut stream, &end).await;
        }
    }
    let places: Vec<_> = (0..5)
        .map(|number| all.find(&format!("POST /{number}\n")).unwrap())
        .collect();
    assert!(places.is_sorted(), "{places:?}");
}
