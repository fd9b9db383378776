//! The error table: one row per code, and the two conversions of an error into a gRPC status and back.

use std::error::Error as _;
use std::fmt;

use prost::Message as _;
use tonic::Status;
use tonic::metadata::MetadataValue;

use crate::v1::ErrorDetail;

/// The binary trailer that carries an `ErrorDetail`.
pub const TRAILER: &str = "helix-error-bin";

/// A message travels twice in the trailers (percent-encoded and base64); peers refuse trailers over 16 kB.
const MAX_MESSAGE_BYTES: usize = 2048;

/// What went wrong, as a program sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The request is malformed or out of range.
    InvalidRequest,
    /// A parameter that exists in the API is not built here.
    UnsupportedParameter,
    /// The prompt, or prompt plus `max_tokens`, is longer than the model's context.
    ContextLengthExceeded,
    /// The API key is missing, unknown or revoked.
    InvalidApiKey,
    /// An access or refresh token is malformed, expired, used before or revoked.
    InvalidToken,
    /// No user has this e-mail and password.
    InvalidCredentials,
    /// The principal may not do this.
    PermissionDenied,
    /// The password was made for one use; a new one must be set.
    PasswordChangeRequired,
    /// The password is right; a code of the second factor is needed too.
    SecondFactorRequired,
    /// The organisation asks for a second factor, and the user has none yet.
    SecondFactorMissing,
    /// No such model.
    ModelNotFound,
    /// No such resource.
    NotFound,
    /// It exists already, or was changed in the meantime.
    Conflict,
    /// The resource does not support the method.
    MethodNotAllowed,
    /// The body or message is over the limit.
    PayloadTooLarge,
    /// The content type is not one that is understood.
    UnsupportedMediaType,
    /// The queue is full; try again later.
    QueueFull,
    /// A limit per minute, or of requests at a time, is used up.
    RateLimitExceeded,
    /// A budget per day or month is used up.
    InsufficientQuota,
    /// Too many wrong passwords; the user is locked for a while.
    AccountLocked,
    /// The caller went away or asked for an end.
    Cancelled,
    /// A bug.
    Internal,
    /// The engine failed while the request ran.
    EngineFailed,
    /// No pool answers.
    Unavailable,
    /// The service is about to stop and takes nothing new.
    Draining,
    /// What a request uses could not be recorded.
    LedgerFull,
    /// The deadline passed.
    DeadlineExceeded,
    /// A model file is missing, damaged or not supported.
    ModelFileError,
    /// A certificate, key or handshake is wrong.
    TlsError,
}

/// One row of the error table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The variant.
    pub code: Code,
    /// The code as it travels, for example `queue_full`.
    pub name: &'static str,
    /// HTTP status at the gateway.
    pub http: u16,
    /// gRPC status between services.
    pub grpc: tonic::Code,
    /// `error.type` of the `OpenAI` envelope.
    pub openai_type: &'static str,
    /// Whether the same request may succeed when sent again.
    pub retryable: bool,
}

macro_rules! rows {
    ($($code:ident $name:literal $http:literal $grpc:ident $kind:literal $retry:literal;)*) => {
        /// THE error table. Every [`Code`] has exactly one row.
        pub const ROWS: &[Row] = &[$(Row {
            code: Code::$code, name: $name, http: $http, grpc: tonic::Code::$grpc, openai_type: $kind, retryable: $retry,
        }),*];

        impl Code {
            /// The row of this code.
            pub const fn row(self) -> &'static Row {
                match self {
                    $(Code::$code => {
                        const ROW: Row = Row {
                            code: Code::$code,
                            name: $name,
                            http: $http,
                            grpc: tonic::Code::$grpc,
                            openai_type: $kind,
                            retryable: $retry,
                        };
                        &ROW
                    })*
                }
            }
        }
    };
}

rows! {
    InvalidRequest "invalid_request" 400 InvalidArgument "invalid_request_error" false;
    UnsupportedParameter "unsupported_parameter" 400 InvalidArgument "invalid_request_error" false;
    ContextLengthExceeded "context_length_exceeded" 400 InvalidArgument "invalid_request_error" false;
    InvalidApiKey "invalid_api_key" 401 Unauthenticated "authentication_error" false;
    InvalidToken "invalid_token" 401 Unauthenticated "authentication_error" false;
    InvalidCredentials "invalid_credentials" 401 Unauthenticated "authentication_error" false;
    PermissionDenied "permission_denied" 403 PermissionDenied "permission_error" false;
    PasswordChangeRequired "password_change_required" 403 PermissionDenied "permission_error" false;
    SecondFactorRequired "second_factor_required" 403 PermissionDenied "permission_error" false;
    SecondFactorMissing "second_factor_missing" 403 PermissionDenied "permission_error" false;
    ModelNotFound "model_not_found" 404 NotFound "invalid_request_error" false;
    NotFound "not_found" 404 NotFound "invalid_request_error" false;
    Conflict "conflict" 409 AlreadyExists "invalid_request_error" false;
    MethodNotAllowed "method_not_allowed" 405 Unimplemented "invalid_request_error" false;
    PayloadTooLarge "payload_too_large" 413 OutOfRange "invalid_request_error" false;
    UnsupportedMediaType "unsupported_media_type" 415 InvalidArgument "invalid_request_error" false;
    QueueFull "queue_full" 429 ResourceExhausted "rate_limit_error" true;
    RateLimitExceeded "rate_limit_exceeded" 429 ResourceExhausted "rate_limit_error" true;
    InsufficientQuota "insufficient_quota" 429 ResourceExhausted "insufficient_quota" false;
    AccountLocked "account_locked" 429 ResourceExhausted "authentication_error" true;
    Cancelled "cancelled" 499 Cancelled "cancelled" false;
    Internal "internal" 500 Internal "server_error" false;
    EngineFailed "engine_failed" 503 Aborted "server_error" true;
    Unavailable "unavailable" 503 Unavailable "server_error" true;
    Draining "draining" 503 Unavailable "server_error" true;
    LedgerFull "ledger_full" 503 Unavailable "server_error" true;
    DeadlineExceeded "deadline_exceeded" 504 DeadlineExceeded "timeout_error" true;
    ModelFileError "model_file_error" 500 FailedPrecondition "server_error" false;
    TlsError "tls_error" 500 FailedPrecondition "server_error" false;
}

impl Code {
    /// The code as it travels, for example `queue_full`.
    pub const fn as_str(self) -> &'static str {
        self.row().name
    }

    /// The code of this name; `None` for a name that this version does not know.
    pub fn from_name(name: &str) -> Option<Self> {
        ROWS.iter().find(|row| row.name == name).map(|row| row.code)
    }

    /// The nearest code of a status that came without the trailer.
    fn from_grpc(code: tonic::Code) -> Self {
        match code {
            tonic::Code::InvalidArgument => Self::InvalidRequest,
            tonic::Code::Unauthenticated => Self::InvalidApiKey,
            tonic::Code::PermissionDenied => Self::PermissionDenied,
            tonic::Code::NotFound => Self::NotFound,
            tonic::Code::AlreadyExists => Self::Conflict,
            tonic::Code::Unimplemented => Self::MethodNotAllowed,
            tonic::Code::OutOfRange => Self::PayloadTooLarge,
            tonic::Code::ResourceExhausted => Self::QueueFull,
            tonic::Code::Cancelled => Self::Cancelled,
            tonic::Code::Aborted => Self::EngineFailed,
            tonic::Code::Unavailable => Self::Unavailable,
            tonic::Code::DeadlineExceeded => Self::DeadlineExceeded,
            _ => Self::Internal,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error with its code. The message is for people: what was wrong, where, what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct CoreError {
    /// The row of the table.
    pub code: Code,
    /// For people.
    pub message: String,
    /// The request parameter at fault.
    pub param: Option<String>,
    /// Seconds after which another try makes sense.
    pub retry_after_s: Option<u32>,
}

impl CoreError {
    /// An error without parameter and without a time to retry.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after_s: None,
        }
    }

    /// An invalid value of the request parameter `param`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message).with_param(param)
    }

    /// Names the request parameter at fault.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says after how many seconds another try makes sense.
    #[must_use]
    pub fn with_retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }
}

fn shorten(message: &str) -> String {
    if message.len() <= MAX_MESSAGE_BYTES {
        return message.to_owned();
    }
    let mut end = MAX_MESSAGE_BYTES;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &message[..end])
}

impl From<CoreError> for Status {
    fn from(error: CoreError) -> Self {
        let message = shorten(&error.message);
        let detail = ErrorDetail {
            code: error.code.as_str().to_owned(),
            message: message.clone(),
            param: error.param.as_deref().map(shorten).unwrap_or_default(),
            retry_after_s: error.retry_after_s.unwrap_or(0),
        };
        let mut status = Status::new(error.code.row().grpc, message);
        status
            .metadata_mut()
            .insert_bin(TRAILER, MetadataValue::from_bytes(&detail.encode_to_vec()));
        status
    }
}

fn detail_of(status: &Status) -> Option<CoreError> {
    let bytes = status.metadata().get_bin(TRAILER)?.to_bytes().ok()?;
    let detail = ErrorDetail::decode(bytes).ok()?;
    let code = Code::from_name(&detail.code).unwrap_or_else(|| Code::from_grpc(status.code()));
    Some(CoreError {
        code,
        message: detail.message,
        param: Some(detail.param).filter(|param| !param.is_empty()),
        retry_after_s: Some(detail.retry_after_s).filter(|seconds| *seconds > 0),
    })
}

impl From<Status> for CoreError {
    fn from(status: Status) -> Self {
        if let Some(error) = detail_of(&status) {
            return error;
        }
        // A status that wraps another error was made here, not by the peer: the connection broke.
        let code = match status.code() {
            code @ (tonic::Code::DeadlineExceeded | tonic::Code::OutOfRange) => {
                Code::from_grpc(code)
            }
            _ if status.source().is_some() => Code::Unavailable,
            code => Code::from_grpc(code),
        };
        Self::new(code, shorten(status.message()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn every_code_has_one_row_and_one_name() {
        for row in ROWS {
            assert_eq!(
                ROWS.iter().filter(|other| other.code == row.code).count(),
                1
            );
            assert_eq!(
                ROWS.iter().filter(|other| other.name == row.name).count(),
                1
            );
            assert_eq!(row.code.row(), row);
            assert_eq!(Code::from_name(row.name), Some(row.code));
            assert!((400..600).contains(&row.http));
        }
        assert_eq!(ROWS.len(), 29);
    }

    #[test]
    fn every_code_survives_the_wire() {
        for row in ROWS {
            let error = CoreError::new(row.code, "what was wrong — und wo")
                .with_param("messages[0]")
                .with_retry_after(3);
            let status = Status::from(error.clone());
            assert_eq!(status.code(), row.grpc);
            let headers = status.into_http::<()>().into_parts().0.headers;
            let back = Status::from_header_map(&headers).unwrap();
            assert_eq!(CoreError::from(back), error);
        }
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let status = Status::from(CoreError::new(Code::Internal, "ü".repeat(5000)));
        let back = CoreError::from(status);
        assert!(back.message.len() < MAX_MESSAGE_BYTES + 8);
        assert!(back.message.ends_with("ü…"));
    }

    #[test]
    fn a_foreign_status_gets_the_nearest_code() {
        let error = CoreError::from(Status::unauthenticated("no"));
        assert_eq!(
            (error.code, error.message.as_str()),
            (Code::InvalidApiKey, "no")
        );
        let broken = Status::from_error(Box::new(std::io::Error::from(
            std::io::ErrorKind::ConnectionReset,
        )));
        assert_eq!(CoreError::from(broken).code, Code::Unavailable);
    }
}
