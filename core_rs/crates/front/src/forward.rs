//! One request's way: checked, sent to a worker, answered.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE,
    EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VARY,
};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::address;
use crate::bodies::{Answer, Coding, Failed, Rated, fold, unfold};
use crate::counts::{Ids, OwnPlace};
use crate::hygiene;
use crate::refusal::{Body, Refusal};
use crate::serve::Shared;
use crate::watched::Active;
use crate::workers::Lease;

/// Tells a worker who its client is; from a client itself it is never taken.
pub const CLIENT: HeaderName = HeaderName::from_static("x-helixflow-client");
/// Tells a worker the SHA-256 of the client's certificate, in hexadecimal digits.
pub const FINGERPRINT: HeaderName = HeaderName::from_static("x-helixflow-client-fingerprint");
/// Tells a worker the SPIFFE URI of the client's certificate.
pub const SPIFFE: HeaderName = HeaderName::from_static("x-helixflow-client-spiffe");
/// Tells a worker which HTTP the client speaks.
pub const PROTOCOL: HeaderName = HeaderName::from_static("x-helixflow-client-http");

/// A worker's word that the credential of the request is good; it goes no further.
pub const KNOWN: HeaderName = HeaderName::from_static("x-helixflow-known");

/// Headers of one connection, not of a request (RFC 9110 §7.6.1).
const HOPS: [HeaderName; 7] = [
    CONNECTION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];
/// Names a request in its answer, the logs and the ledger.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that a client may give (bytes); workers take the same ones.
const MOST_ID: usize = 128;
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Smaller answers are not worth folding (bytes).
const FOLD_FROM: u64 = 1024;
/// Connections that were kept and turn out to be closed, before a new one is made.
const ATTEMPTS: usize = 3;
/// After a worker that cannot be reached.
const WORKER_LOOK: Duration = Duration::from_millis(20);
/// How long strangers wait for each other, and how often they look.
const STRANGERS_WAIT: Duration = Duration::from_secs(1);
const STRANGERS_LOOK: Duration = Duration::from_millis(20);

/// What a connection knows of its client.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) address: IpAddr,
    pub(crate) fingerprint: Option<HeaderValue>,
    pub(crate) spiffe: Option<HeaderValue>,
}

/// Is held until an answer is over.
type Held = (Active, Option<OwnPlace>);

/// Answers one request, whatever happens.
pub(crate) async fn answer(
    shared: Arc<Shared>,
    client: Client,
    active: Active,
    mut request: Request<Incoming>,
) -> Response<Body> {
    let client = Client {
        address: real_address(request.headers(), client.address, &shared),
        ..client
    };
    shared.stats.requests.add();
    let id = name(request.headers_mut(), &shared.ids);
    let refused = active.refusal().map(Refusal::from);
    let outcome = match refused {
        Some(refusal) => Err(refusal),
        None => forward(&shared, &client, active, request).await,
    };
    outcome.unwrap_or_else(|refusal| {
        shared.stats.refused.add();
        let status = refusal.status().as_u16();
        let request_id = id.to_str().unwrap_or_default();
        tracing::info!(
            address = %client.address, request_id, status, reason = %refusal, "request refused at the door"
        );
        refusal.answer(id)
    })
}

/// The request's id: the client's, or one of ours. A worker gets it too, so that an answer of the door stands under the
/// same id as what the worker has noted of the request.
fn name(headers: &mut HeaderMap, ids: &Ids) -> HeaderValue {
    let given = headers.get_all(REQUEST_ID).iter().next_back();
    let given = given.filter(|id| is_request_id(id.as_bytes())).cloned();
    let id = given.unwrap_or_else(|| ids.next());
    headers.insert(REQUEST_ID, id.clone());
    id
}

fn is_request_id(id: &[u8]) -> bool {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    (1..=MOST_ID).contains(&id.len()) && id.iter().all(fits)
}

async fn forward(
    shared: &Arc<Shared>,
    client: &Client,
    active: Active,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let (mut parts, incoming) = request.into_parts();
    let host = hygiene::check(&parts)?;
    let address = client.address;
    let credential = credential(&parts.headers).map(|credential| shared.known.name(&credential));
    let stranger = stranger(shared, address, credential).await?;
    let fold_as = answer_coding(&parts);
    let (asked, body, failed) = request_body(shared, &mut parts, incoming)?;
    let head = prepare(parts, &host, address, client);
    let (response, lease) = send(shared, head, body, asked, &failed).await?;
    if let Some(name) = credential {
        remember(shared, name, &response);
    }
    let until_over = (
        active,
        if is_over_at_once(&response) {
            None
        } else {
            stranger
        },
    );
    Ok(deliver(response, lease, fold_as, until_over))
}

/// The place of a caller who has shown nothing good yet; none for others. A burst of them waits a moment: the first
/// answer may show that the credential of all of them is good.
async fn stranger(
    shared: &Shared,
    address: IpAddr,
    credential: Option<u64>,
) -> Result<Option<OwnPlace>, Refusal> {
    let until = Instant::now() + STRANGERS_WAIT;
    loop {
        if credential.is_some_and(|name| shared.known.contains(name)) {
            return Ok(None);
        }
        let place = shared.strangers.take(address::Group::of(address));
        if place.is_some() {
            return Ok(place);
        }
        if Instant::now() >= until {
            return Err(Refusal::Strangers);
        }
        tokio::time::sleep(STRANGERS_LOOK).await;
    }
}

/// An answer of a known size is written at once: the place of its client is free again.
fn is_over_at_once(response: &Response<Incoming>) -> bool {
    response.body().size_hint().exact().is_some()
}

/// Workers say whether they know who called: an open route answers anybody, whatever credential comes with it.
fn remember(shared: &Shared, name: u64, response: &Response<Incoming>) {
    if response.headers().contains_key(KNOWN) {
        shared.known.insert(name);
    } else if response.status() == StatusCode::UNAUTHORIZED {
        shared.known.remove(name);
    }
}

fn real_address(headers: &HeaderMap, peer: IpAddr, shared: &Shared) -> IpAddr {
    let trusted = &shared.options.trusted;
    if trusted.is_empty() {
        return peer;
    }
    let values = headers.get_all(FORWARDED_FOR).iter();
    // A value that is no text is an entry that is no address.
    let values: Vec<&str> = values.map(|value| value.to_str().unwrap_or("-")).collect();
    address::client(peer, values.into_iter(), trusted)
}

/// What the client shows: the header as it is.
fn credential(headers: &HeaderMap) -> Option<&[u8]> {
    let names = [
        AUTHORIZATION,
        HeaderName::from_static("x-api-key"),
        HeaderName::from_static("api-key"),
    ];
    names
        .iter()
        .find_map(|name| headers.get(name))
        .map(HeaderValue::as_bytes)
}

/// How the answer may be folded.
fn answer_coding(parts: &Parts) -> Option<Coding> {
    if parts.method == Method::HEAD {
        return None;
    }
    let accept = parts.headers.get(ACCEPT_ENCODING)?.to_str().ok()?;
    Coding::chosen(accept)
}

type Sign = Option<oneshot::Sender<()>>;

fn request_body(
    shared: &Shared,
    parts: &mut Parts,
    incoming: Incoming,
) -> Result<(Sign, Body, Failed), Refusal> {
    let failed: Failed = Arc::new(Mutex::new(None));
    // A client that waits for a sign gets it when the worker asks for the body, not before its head was looked at.
    let waits = parts
        .headers
        .get(EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let (sign, asked) = if waits {
        let (sign, asked) = oneshot::channel();
        (Some(sign), Some(asked))
    } else {
        parts.headers.remove(EXPECT);
        (None, None)
    };
    let options = &shared.options;
    let body = Rated::new(
        incoming,
        options.body_rate,
        options.body_grace,
        Arc::clone(&failed),
        asked,
    );
    let Some(value) = parts.headers.get(CONTENT_ENCODING) else {
        return Ok((sign, body.boxed_unsync(), failed));
    };
    let name = value.to_str().map_err(|_| Refusal::Coding)?;
    if name.eq_ignore_ascii_case("identity") {
        return Ok((sign, body.boxed_unsync(), failed));
    }
    let coding = Coding::of(name).ok_or(Refusal::Coding)?;
    parts.headers.remove(CONTENT_ENCODING);
    parts.headers.remove(CONTENT_LENGTH);
    let body = unfold(body, coding, options.unfolded_bytes, Arc::clone(&failed));
    Ok((sign, body, failed))
}

/// The head that the worker gets.
fn prepare(mut parts: Parts, host: &Authority, address: IpAddr, client: &Client) -> Parts {
    let path = parts
        .uri
        .path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    let version = parts.version;
    parts.version = Version::HTTP_11;
    let headers = &mut parts.headers;
    for name in connection_names(headers).iter().chain(&HOPS) {
        headers.remove(name);
    }
    // What we tell a worker nobody else tells it.
    let ours = |name: &&HeaderName| name.as_str().starts_with("x-helixflow-");
    for name in headers.keys().filter(ours).cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
    headers.remove(ACCEPT_ENCODING);
    let text = |text: &str| HeaderValue::from_str(text).ok();
    let told = [
        (HOST, text(host.as_str())),
        (CLIENT, text(&address.to_string())),
        (
            PROTOCOL,
            Some(HeaderValue::from_static(if version >= Version::HTTP_2 {
                "2"
            } else {
                "1.1"
            })),
        ),
        (FINGERPRINT, client.fingerprint.clone()),
        (SPIFFE, client.spiffe.clone()),
    ];
    for (name, value) in told {
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
    parts
}

/// Headers that `Connection` names as those of the connection.
fn connection_names(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect()
}

/// Sends a request to a worker; one that has taken nothing of it costs another attempt.
async fn send(
    shared: &Shared,
    head: Parts,
    body: Body,
    sign: Sign,
    failed: &Failed,
) -> Result<(Response<Incoming>, Lease), Refusal> {
    // What asks only may be asked twice, also of a worker that may have heard it.
    let again = (head.method.is_safe() && body.is_end_stream()).then(|| head.clone());
    let mut request = Request::from_parts(head, body);
    if let Some(sign) = sign {
        let sign = Mutex::new(Some(sign));
        hyper::ext::on_informational(&mut request, move |answer| {
            if answer.status() == StatusCode::CONTINUE
                && let Some(sign) = sign.lock().take()
            {
                // A body that was given up needs no sign.
                sign.send(()).ok();
            }
        });
    }
    let until = Instant::now() + shared.options.worker_wait;
    let mut sent = 0;
    while sent <= ATTEMPTS {
        let worker = shared
            .workers
            .pick(shared.options.worker_wait)
            .await
            .ok_or(Refusal::NoWorker)?;
        let lease = if sent == 0 {
            worker.lease().await
        } else {
            worker.fresh().await
        };
        let Ok(mut lease) = lease else {
            // It is going, and soon another takes its place.
            if Instant::now() >= until {
                break;
            }
            tokio::time::sleep(WORKER_LOOK).await;
            continue;
        };
        sent += 1;
        let Ok(sender) = lease.sender() else { continue };
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, lease)),
            Err(mut error) => {
                let unsent = error.take_message();
                let error = error.into_error();
                request = match (unsent, &again) {
                    (Some(unsent), _) => unsent,
                    (None, Some(head)) => Request::from_parts(head.clone(), empty()),
                    (None, None) => {
                        tracing::debug!(%error, "a worker gave no answer");
                        return Err(failed.lock().take().unwrap_or(Refusal::Lost));
                    }
                };
                shared.stats.resent.add();
            }
        }
    }
    Err(Refusal::NoWorker)
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// The answer as the client gets it.
fn deliver(
    response: Response<Incoming>,
    lease: Lease,
    coding: Option<Coding>,
    held: Held,
) -> Response<Body> {
    let (mut parts, body) = response.into_parts();
    for name in connection_names(&parts.headers).iter().chain(&HOPS) {
        parts.headers.remove(name);
    }
    parts.headers.remove(KNOWN);
    let kind = parts
        .headers
        .get(CONTENT_TYPE)
        .map_or(&b""[..], HeaderValue::as_bytes);
    let events = kind.starts_with(b"text/event-stream");
    let json = kind.starts_with(b"application/json");
    let large = body
        .size_hint()
        .exact()
        .is_some_and(|size| size >= FOLD_FROM);
    let answer = Answer::new(body, lease, events, held);
    if json {
        parts
            .headers
            .append(VARY, HeaderValue::from_static("accept-encoding"));
    }
    match coding.filter(|_| json && large && !parts.headers.contains_key(CONTENT_ENCODING)) {
        None => Response::from_parts(parts, answer.boxed_unsync()),
        Some(coding) => {
            parts.headers.remove(CONTENT_LENGTH);
            parts
                .headers
                .insert(CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
            Response::from_parts(parts, fold(answer, coding))
        }
    }
}

/// The fingerprint of a certificate as its header.
pub(crate) fn fingerprint(digest: &[u8]) -> Option<HeaderValue> {
    let text = digest.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    });
    HeaderValue::from_maybe_shared(Bytes::from(text)).ok()
}
