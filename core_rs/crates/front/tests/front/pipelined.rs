//! Requests on one connection, cut up in any way: a server comes and goes between them, and loses nothing.

use std::time::Duration;

use bytes::Bytes;
use helix_front::Options;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Request, Response};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;

use crate::harness::{Stage, quick, rest, script, text};

/// Connections are parked as soon as they are idle.
fn at_once() -> Options {
    Options {
        park: Duration::ZERO,
        ..quick()
    }
}

/// One request: what it sends, and what its answer must hold.
#[derive(Clone, Debug)]
enum Kind {
    Get,
    Post(usize),
    Chunks(Vec<usize>),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => Just(Kind::Get),
        2 => (0_usize..40_000).prop_map(Kind::Post),
        1 => prop::collection::vec(1_usize..3000, 0..4).prop_map(Kind::Chunks),
    ]
}

fn bytes_of(kind: &Kind, number: usize, last: bool) -> Vec<u8> {
    let (method, body) = match kind {
        Kind::Get => ("GET", String::new()),
        Kind::Post(size) => (
            "POST",
            format!("content-length: {size}\r\n\r\n{}", "x".repeat(*size)),
        ),
        Kind::Chunks(sizes) => {
            let chunk = |size: &usize| format!("{size:x}\r\n{}\r\n", "x".repeat(*size));
            let chunks: String = sizes.iter().map(chunk).collect();
            (
                "POST",
                format!("transfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"),
            )
        }
    };
    let body = if body.is_empty() {
        "\r\n".to_owned()
    } else {
        body
    };
    let end = if last { "connection: close\r\n" } else { "" };
    format!("{method} /{number} HTTP/1.1\r\nhost: a\r\n{end}{body}").into_bytes()
}

fn answer_of(kind: &Kind, number: usize) -> String {
    let size = match kind {
        Kind::Get => 0,
        Kind::Post(size) => *size,
        Kind::Chunks(sizes) => sizes.iter().sum(),
    };
    format!("<{number}: {size}>")
}

async fn counts(request: Request<Incoming>) -> Response<crate::harness::Body> {
    let path = request.uri().path().to_owned();
    let number = path.strip_prefix('/').unwrap_or_default().to_owned();
    let body = request.into_body().collect().await;
    let size = body.map_or(0, |body| body.to_bytes().len());
    text(Bytes::from(format!("<{number}: {size}>")))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn each_request_is_answered_once_and_in_order(
        kinds in prop::collection::vec(kind(), 1..8),
        cuts in prop::collection::vec((1_usize..5000, any::<bool>()), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let text = runtime.block_on(async {
            let mut stage = Stage::plain(at_once());
            stage.worker(script(counts));
            let stream = stage.connect().await;
            let (mut reading, mut writing) = stream.into_split();
            let all: Vec<u8> = kinds.iter().enumerate()
                .flat_map(|(number, kind)| bytes_of(kind, number, number + 1 == kinds.len()))
                .collect();
            let sends = async move {
                let mut at = 0;
                for (size, pause) in cuts.into_iter().cycle() {
                    if at == all.len() {
                        break;
                    }
                    let end = (at + size).min(all.len());
                    writing.write_all(&all[at..end]).await.unwrap();
                    at = end;
                    if pause {
                        // Long enough for what came to be answered, and for the connection to be idle.
                        tokio::time::sleep(Duration::from_millis(3)).await;
                    }
                }
                writing
            };
            let (text, _writing) = tokio::join!(rest(&mut reading), sends);
            text
        });
        let found: Vec<&str> = text.match_indices('<')
            .map(|(at, _)| &text[at..=at + text[at..].find('>').unwrap()])
            .collect();
        let wanted: Vec<String> = kinds.iter().enumerate().map(|(number, kind)| answer_of(kind, number)).collect();
        prop_assert_eq!(found, wanted);
    }
}

#[tokio::test]
async fn an_answer_whose_end_waits_for_its_reader_is_sent_to_its_end() {
    const SIZE: usize = 8 << 20;
    let mut stage = Stage::plain(at_once());
    stage.worker(script(|_| async { text("x".repeat(SIZE)) }));
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16_384).unwrap();
    let mut stream = socket.connect(stage.address).await.unwrap();
    let head = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut piece = vec![0; 65_536];
    let mut read = 0;
    while read < SIZE {
        // Slower than it is sent: the last piece, too, finds no room.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let count = tokio::io::AsyncReadExt::read(&mut stream, &mut piece).await;
        match count.unwrap() {
            0 => panic!("it ended after {read} bytes"),
            count => read += count,
        }
    }
}
