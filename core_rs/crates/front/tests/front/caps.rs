//! Timers and caps: who exceeds one is refused, nobody else notices.

use std::time::{Duration, Instant};

use bytes::Bytes;
use helix_front::Options;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use crate::harness::{Stage, echo, fed, feeding, quick, rest, script, text, until};

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

async fn from(stage: &Stage, address: &str) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(format!("{address}:0").parse().unwrap())
        .unwrap();
    socket.connect(stage.address).await.unwrap()
}

/// How long it takes until the other side ends the connection.
async fn ended_after(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> (Duration, String) {
    let began = Instant::now();
    let said = tokio::time::timeout(Duration::from_secs(20), rest(stream))
        .await
        .expect("it is ended");
    (began.elapsed(), said)
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let stage = Stage::plain(Options {
        first_byte: ms(100),
        ..quick()
    });
    let mut stream = stage.connect().await;
    let (time, said) = ended_after(&mut stream).await;
    assert!(time >= ms(90) && said.is_empty(), "{time:?} {said}");
    assert_eq!(stage.count("silent"), 1);
}

#[tokio::test]
async fn a_head_that_dribbles_in_gets_a_timeout() {
    let mut stage = Stage::plain(Options {
        head: ms(200),
        ..quick()
    });
    stage.worker(script(echo));
    let mut stream = stage.connect().await;
    let (mut reader, mut writer) = stream.split();
    let dribble = async {
        for byte in GET.bytes().cycle() {
            if byte != b'\n' && writer.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(ms(20)).await;
        }
    };
    tokio::select! {
        () = dribble => panic!("it was cut off"),
        (time, said) = ended_after(&mut reader) => {
            assert!(time >= ms(190), "{time:?}");
            assert!(said.starts_with("HTTP/1.1 408"), "{said}");
        }
    }
}

#[tokio::test]
async fn a_body_must_keep_a_speed_and_may_take_its_time() {
    let mut stage = Stage::plain(Options {
        body_grace: ms(200),
        body_rate: 100,
        ..quick()
    });
    stage.worker(script(echo));
    let head = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 100\r\n\r\n";
    let mut slow = stage.connect().await;
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut steady = stage.connect().await;
    steady.write_all(head.as_bytes()).await.unwrap();
    let sending = async {
        // A second in all, at the least speed and a bit.
        for _ in 0..10 {
            steady.write_all(&[b'a'; 10]).await.unwrap();
            tokio::time::sleep(ms(80)).await;
        }
        rest(&mut steady).await
    };
    let (steady, (time, said)) = tokio::join!(sending, ended_after(&mut slow));
    assert!(steady.ends_with(&"a".repeat(100)), "{steady}");
    assert!(
        time >= ms(190) && said.starts_with("HTTP/1.1 408"),
        "{time:?} {said}"
    );
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_one_that_is_answered_is_not() {
    let mut stage = Stage::plain(Options {
        idle: ms(150),
        ..quick()
    });
    let (events, answers) = feeding("text/plain", "short");
    stage.worker(answers);
    let mut streaming = stage.connect().await;
    streaming.write_all(GET.as_bytes()).await.unwrap();
    events.send("first").await.unwrap();
    until(&mut streaming, "first").await;
    let mut idle = stage.connect().await;
    idle.write_all(GET.as_bytes()).await.unwrap();
    until(&mut idle, "short").await;
    let (time, said) = ended_after(&mut idle).await;
    assert!(time >= ms(140) && said.is_empty(), "{time:?} {said}");
    events.send("last").await.unwrap();
    until(&mut streaming, "last").await;
    drop(events);
    let (time, _) = ended_after(&mut streaming).await;
    assert!(time >= ms(140), "from its end on it is idle: {time:?}");
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let mut stage = Stage::plain(Options {
        write_stall: ms(200),
        ..quick()
    });
    stage.worker(script(|_| async { text(vec![b'a'; 50_000_000]) }));
    let mut stream = stage.connect().await;
    stream.write_all(GET.as_bytes()).await.unwrap();
    while stage.count("stalled") == 0 {
        tokio::time::sleep(ms(10)).await;
    }
    while stage.front.connections() > 0 {
        tokio::time::sleep(ms(10)).await;
    }
}

#[tokio::test]
async fn one_client_has_its_connections_and_others_theirs() {
    let mut stage = Stage::plain(Options {
        connections_per_client: 2,
        ..quick()
    });
    stage.worker(script(echo));
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = from(&stage, "127.0.0.2").await;
        stream.write_all(GET.as_bytes()).await.unwrap();
        until(&mut stream, "\n\n").await;
        held.push(stream);
    }
    let mut third = from(&stage, "127.0.0.2").await;
    assert_eq!(ended_after(&mut third).await.1, "");
    assert!(
        stage
            .raw(&GET.replace("a\r\n", "a\r\nconnection: close\r\n"))
            .await
            .contains("200 OK")
    );
    held.pop();
    // Once the place is free again.
    loop {
        let mut stream = from(&stage, "127.0.0.2").await;
        if stream.write_all(GET.as_bytes()).await.is_ok() {
            let mut space = [0; 15];
            if stream.read_exact(&mut space).await.is_ok() {
                break;
            }
        }
    }
    assert!(stage.count("crowded_client") >= 1);
}

#[tokio::test]
async fn strangers_have_few_requests_at_once_and_who_is_known_many() {
    let mut stage = Stage::plain(Options {
        strangers_per_client: 1,
        ..quick()
    });
    stage.worker(script(|request: http::Request<_>| async move {
        let key = request
            .headers()
            .get("authorization")
            .map(|value| value.as_bytes().to_vec());
        let good = key.is_some_and(|key| key == b"good");
        if good && request.uri().path() == "/hang" {
            let (sender, body) = fed();
            tokio::spawn(async move {
                sender.send("begun").await.unwrap();
                sender.closed().await;
            });
            return http::Response::new(body);
        }
        if request.uri().path() == "/hang" {
            std::future::pending::<()>().await;
        }
        let mut response = text(if good { "good" } else { "who?" });
        if good {
            response
                .headers_mut()
                .insert("x-helixflow-known", http::HeaderValue::from_static("1"));
        }
        *response.status_mut() = if good || request.uri().path() == "/open" {
            http::StatusCode::OK
        } else {
            http::StatusCode::UNAUTHORIZED
        };
        response
    }));
    let request = |path: &str, key: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\nauthorization: {key}\r\nconnection: close\r\n\r\n"
        )
    };
    assert!(
        stage.raw(&request("/", "good")).await.contains("good"),
        "now it is known"
    );
    let mut hanging = Vec::new();
    for _ in 0..3 {
        let mut stream = stage.connect().await;
        stream
            .write_all(request("/hang", "good").as_bytes())
            .await
            .unwrap();
        until(&mut stream, "begun").await;
        hanging.push(stream);
    }
    let open = stage.raw(&request("/open", "worse")).await;
    assert!(
        open.contains("200 OK") && !open.contains("x-helixflow-known"),
        "an open route answers anybody, and makes nobody known: {open}"
    );
    let mut stranger = stage.connect().await;
    stranger
        .write_all(request("/hang", "bad").as_bytes())
        .await
        .unwrap();
    while stage.count("requests") < 6 {
        tokio::task::yield_now().await;
    }
    let refused = stage.raw(&request("/", "worse")).await;
    assert!(
        refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after"),
        "{refused}"
    );
    assert!(stage.raw(&request("/", "good")).await.contains("good"));
    let mut elsewhere = from(&stage, "127.0.0.3").await;
    elsewhere
        .write_all(request("/", "worse").as_bytes())
        .await
        .unwrap();
    assert!(rest(&mut elsewhere).await.starts_with("HTTP/1.1 401"));
}

#[tokio::test]
async fn proxies_that_are_trusted_name_the_client() {
    let mut stage = Stage::plain(Options {
        trusted: vec!["127.0.0.2".parse().unwrap()],
        proxy_protocol: true,
        ..quick()
    });
    stage.worker(script(echo));
    let request =
        "GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 9.9.9.9\r\nconnection: close\r\n\r\n";
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend([203, 0, 113, 7, 10, 0, 0, 1, 0, 80, 1, 187]);
    let mut proxied = from(&stage, "127.0.0.2").await;
    proxied
        .write_all(&[&header, request.as_bytes()].concat())
        .await
        .unwrap();
    let answer = rest(&mut proxied).await;
    assert!(
        answer.contains("x-helixflow-client: 203.0.113.7\n"),
        "{answer}"
    );
    let answer = stage.raw(request).await;
    assert!(
        answer.contains("x-helixflow-client: 127.0.0.1\n"),
        "anybody may write the header: {answer}"
    );
    let mut without = from(&stage, "127.0.0.2").await;
    without.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(rest(&mut without).await, "", "a proxy must say it");
}

/// A client of HTTP/2 without TLS.
async fn two(
    stage: &Stage,
) -> (
    http2::SendRequest<Empty<Bytes>>,
    tokio::task::JoinHandle<()>,
) {
    let stream = stage.connect().await;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    (sender, tokio::spawn(async move { drop(connection.await) }))
}

#[tokio::test]
async fn http2_is_served_and_ends_politely_when_idle() {
    let mut stage = Stage::plain(Options {
        idle: ms(150),
        ..quick()
    });
    stage.worker(script(echo));
    let (mut sender, connection) = two(&stage).await;
    for _ in 0..3 {
        let request = http::Request::get("http://a.example/x")
            .body(Empty::new())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body).into_owned();
        assert!(
            body.starts_with("GET /x\nhost: a.example\n") && body.contains("client-http: 2"),
            "{body}"
        );
    }
    tokio::time::timeout(Duration::from_secs(5), connection)
        .await
        .expect("it is ended")
        .unwrap();
    while stage.front.connections() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_flood_of_priority_frames_ends_its_connection() {
    let mut stage = Stage::plain(quick());
    stage.worker(script(echo));
    let mut stream = stage.connect().await;
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    let frame = [0, 0, 5, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 16];
    let flood = frame.repeat(1000);
    for _ in 0..10 {
        if stream.write_all(&flood).await.is_err() {
            break;
        }
    }
    drop(ended_after(&mut stream).await);
    while stage.count("floods") == 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_connection_that_is_used_is_never_idle() {
    let mut stage = Stage::plain(Options {
        idle: ms(400),
        ..quick()
    });
    stage.worker(script(echo));
    let mut one = stage.connect().await;
    let (mut other, _connection) = two(&stage).await;
    for _ in 0..8 {
        tokio::time::sleep(ms(100)).await;
        one.write_all(GET.as_bytes()).await.unwrap();
        until(&mut one, "http: 1.1\n\n").await;
        let request = http::Request::get("http://a.example/x")
            .body(Empty::new())
            .unwrap();
        let response = other.send_request(request).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
}
