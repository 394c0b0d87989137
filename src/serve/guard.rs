//! Who may call, and what is counted of every call.
//!
//! With a token, every path but health and readiness wants it. Without one, the server listens to this machine alone; then
//! it answers under local names only, so that a page that a browser shows cannot reach it under its own.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::app::App;
use super::refusal::Refusal;
use super::routes::keeping;

/// Is the server alive?
pub(super) const HEALTH: &str = "/health";
/// Does it take requests?
pub(super) const READY: &str = "/ready";

/// Puts the guards in front of routes: counting, then CORS where it is asked for, then token and name.
pub(super) fn guarded(router: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    let mut router = router.layer(from_fn_with_state(Arc::clone(app), admit));
    if !app.config.cors_origins.is_empty() {
        router = router.layer(cors(&app.config.cors_origins));
    }
    router.layer(from_fn_with_state(Arc::clone(app), count))
}

fn cors(origins: &[String]) -> CorsLayer {
    let origins = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE])
}

async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let mut in_flight = app.metrics.arrived(route);
    let response = next.run(request).await;
    in_flight.status = response.status().as_u16();
    response.map(|body| keeping(body, in_flight))
}

async fn admit(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let is_open = [HEALTH, READY].contains(&request.uri().path());
    if !is_open && !shows_token(&app, request.headers()) {
        return Refusal::token().into_response();
    }
    match request.headers().get(header::HOST).map(|host| host.to_str().unwrap_or("?")) {
        Some(host) if app.token.is_none() && !is_local(host) => Refusal::host(host).into_response(),
        _ => next.run(request).await,
    }
}

/// Whether a request shows the token; yes, if there is none.
pub(super) fn shows_token(app: &App, headers: &HeaderMap) -> bool {
    let Some(expected) = &app.token else { return true };
    let shown = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
    let token = match shown.split_at_checked(b"Bearer ".len()) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"Bearer ") => token,
        _ => return false,
    };
    // Hashes are compared in constant time, and tell nothing of how much of a token was right.
    blake3::hash(token) == *expected
}

/// Whether a host, with or without a port, is this machine.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_names_are_those_of_this_machine() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8377", "127.8.9.1:1", "[::1]", "[::1]:8377"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "example.org", "localhost.example.org:80", "10.0.0.1:80", "[::2]:80", "127.0.0.1.example.org"]
        {
            assert!(!is_local(host), "{host}");
        }
    }
}
