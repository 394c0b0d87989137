//! What a client is told when it does not get what it asked for, in OpenAI's form.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Seconds after which a client may try again.
const RETRY_SECONDS: u16 = 2;

/// Why a request is refused or failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    status: StatusCode,
    code: Option<&'static str>,
    /// The field that is to blame.
    param: Option<&'static str>,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into() }
    }

    /// A field that does not do.
    pub(super) fn field(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, None, message) }
    }

    /// A body that is no request.
    pub(super) fn body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, None, message)
    }

    /// More tokens than there is room for.
    pub(super) fn too_long(param: &'static str, message: String) -> Self {
        let code = Some("context_length_exceeded");
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// A body of too many bytes.
    pub(super) fn too_large(most: u64) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, None, format!("more than {most} bytes; send less"))
    }

    /// A body that is not declared as JSON.
    pub(super) fn not_json() -> Self {
        let message = "the body must be JSON: send it with content-type: application/json";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, message)
    }

    /// A body that does not arrive.
    pub(super) fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, None, "the body did not arrive in time")
    }

    /// No token, or another.
    pub(super) fn token() -> Self {
        let message = "send the server's token: authorization: Bearer TOKEN";
        Self::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    /// A name under which this server is not known.
    pub(super) fn host(host: &str) -> Self {
        let message =
            format!("{host:?}: without a token only local names are served; use localhost, or give the server a token");
        Self::new(StatusCode::FORBIDDEN, None, message)
    }

    /// Another model than the one that is served.
    pub(super) fn model(asked: &str, served: &str) -> Self {
        let message = format!("the model {asked:?} does not exist; this server has {served:?}");
        Self { param: Some("model"), ..Self::new(StatusCode::NOT_FOUND, Some("model_not_found"), message) }
    }

    /// A path that there is not.
    pub(super) fn path(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, None, format!("{path}: no such path; see docs/serving.md"))
    }

    /// A method that a path does not take.
    pub(super) fn method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, None, "this path takes another method; see docs/serving.md")
    }

    /// Too many wait already.
    pub(super) fn busy() -> Self {
        let message = "as many requests wait as may wait; try again later";
        Self::new(StatusCode::TOO_MANY_REQUESTS, Some("queue_full"), message)
    }

    /// Waited in vain.
    pub(super) fn no_turn() -> Self {
        let message = "the server did not get to this request in time; try again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Some("queue_timeout"), message)
    }

    /// The server is about to stop.
    pub(super) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Some("stopping"), "the server is stopping; try again later")
    }

    /// Took too long.
    pub(super) fn too_slow(seconds: u64) -> Self {
        let message = format!("not done after {seconds} seconds; ask for fewer tokens");
        Self::new(StatusCode::GATEWAY_TIMEOUT, Some("timeout"), message)
    }

    /// The server's own fault.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, None, message)
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The object that a client gets.
    pub(super) fn to_json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/json")], self.to_json().to_string()).into_response();
        let headers = response.headers_mut();
        if [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&self.status) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_SECONDS));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
