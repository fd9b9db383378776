//! Answers of our own: what a client gets when its request reaches no worker.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};

use crate::forward::REQUEST_ID;
use crate::framing::Violation;
use crate::hygiene::Wrong;
use crate::watched::Refused;

/// Anything that a body may fail with.
pub(crate) type Fault = Box<dyn std::error::Error + Send + Sync>;
/// A body of either direction.
pub(crate) type Body = UnsyncBoxBody<Bytes, Fault>;

/// Why a request is not forwarded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It could be read in two ways, or in none.
    #[error("the request is malformed: {0}")]
    Malformed(#[from] Violation),
    /// It is one, but not an acceptable one.
    #[error("the request is refused: {0}")]
    Wrong(#[from] Wrong),
    /// Its head or body came too slowly.
    #[error("the request came too slowly: {0}")]
    Slow(&'static str),
    /// Too many at once from one client without a good credential.
    #[error("too many requests at once from this address without a known credential")]
    Strangers,
    /// The body ended early, or is none.
    #[error("the request body broke off, or its chunks are malformed")]
    Broken,
    /// The body's coding is none of ours.
    #[error("Content-Encoding must be gzip or zstd, once")]
    Coding,
    /// The body is not what its coding says.
    #[error("the body does not unfold: {0}")]
    Unfold(String),
    /// The body unfolds to too much.
    #[error("the body unfolds to more than {0} bytes")]
    TooLarge(u64),
    /// Nobody is there to answer.
    #[error("no worker of the gateway is ready; try again")]
    NoWorker,
    /// The worker died.
    #[error("the worker that answered ended; try again")]
    Lost,
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Violation(violation) => Self::Malformed(violation),
            Refused::Slow => Self::Slow("the head was not complete in time"),
        }
    }
}

impl Refusal {
    /// Status, type and code of the error, as clients of the API know them.
    fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::Malformed(Violation::TooLarge) => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "invalid_request_error",
                "invalid_request",
            ),
            Self::Malformed(_) | Self::Wrong(_) | Self::Broken | Self::Unfold(_) => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_request",
            ),
            Self::Slow(_) => (
                StatusCode::REQUEST_TIMEOUT,
                "timeout_error",
                "deadline_exceeded",
            ),
            Self::Strangers => (
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "rate_limit_exceeded",
            ),
            Self::Coding => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "invalid_request_error",
                "unsupported_media_type",
            ),
            Self::TooLarge(_) => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                "payload_too_large",
            ),
            Self::NoWorker | Self::Lost => (
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "unavailable",
            ),
        }
    }

    /// Of the answer.
    pub(crate) fn status(&self) -> StatusCode {
        self.kind().0
    }

    /// The error as JSON. Its texts are ours; what a client wrote stands in none unescaped.
    pub(crate) fn json(&self) -> String {
        let (_, kind, code) = self.kind();
        let message = self.to_string().replace(|c: char| c.is_control(), " ");
        let message = message.replace('\\', r"\\").replace('"', r#"\""#);
        format!(
            r#"{{"error":{{"message":"{message}","type":"{kind}","param":null,"code":"{code}"}}}}"#
        )
    }

    /// The answer, under the request's id. After some of them the connection cannot go on.
    pub(crate) fn answer(&self, id: HeaderValue) -> Response<Body> {
        let status = self.status();
        let body = Full::new(Bytes::from(self.json())).map_err(|never| match never {});
        let mut response = Response::new(body.boxed_unsync());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("server", HeaderValue::from_static("helixflow"));
        headers.insert(
            "x-content-type-options",
            HeaderValue::from_static("nosniff"),
        );
        headers.insert(REQUEST_ID, id);
        if matches!(self, Self::Malformed(_) | Self::Slow(_) | Self::Broken) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if matches!(self, Self::Strangers | Self::NoWorker | Self::Lost) {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
