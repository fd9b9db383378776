//! What a request must be, whichever protocol brought it, before anybody acts on it.

use http::header::{AUTHORIZATION, CONTENT_ENCODING, HOST};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, Method, Version};

/// Headers whose value decides something: with two of them, one server would take the first, another the last.
const ONCE: [HeaderName; 4] = [
    AUTHORIZATION,
    CONTENT_ENCODING,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
];

/// What is wrong with a request, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Wrong {
    /// Who is meant is not said, or said in two ways.
    #[error("the request must name its host once (Host, or :authority in HTTP/2)")]
    Host,
    /// One of [`ONCE`] comes twice.
    #[error(
        "a header that may come once came several times: Authorization, Content-Encoding, X-Api-Key, Api-Key"
    )]
    Twice,
    /// See [`path`].
    #[error(
        "the path must begin with `/` and hold no dot segments, backslashes, control characters or broken %-escapes"
    )]
    Path,
    /// Not for a server.
    #[error("CONNECT is for proxies, and this is none")]
    Connect,
}

/// The host that a request names, once it is sound.
pub(crate) fn check(parts: &Parts) -> Result<Authority, Wrong> {
    if parts.method == Method::CONNECT {
        return Err(Wrong::Connect);
    }
    for name in &ONCE {
        if parts.headers.get_all(name).iter().nth(1).is_some() {
            return Err(Wrong::Twice);
        }
    }
    match parts.uri.path_and_query().map(PathAndQuery::path) {
        Some("*") if parts.method == Method::OPTIONS => {}
        Some(text) if path(text) => {}
        _ => return Err(Wrong::Path),
    }
    host(parts)
}

fn host(parts: &Parts) -> Result<Authority, Wrong> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    let named = first.map(|value| {
        value
            .to_str()
            .ok()
            .and_then(|text| text.parse::<Authority>().ok())
    });
    let sound = match (named, parts.uri.authority(), second) {
        (Some(Some(host)), None, None) => Some(host),
        // In HTTP/1.1 the target's authority goes before Host, which must be there all the same (RFC 9112 §3.2.2).
        (Some(Some(_)), Some(authority), None) if parts.version < Version::HTTP_2 => {
            Some(authority.clone())
        }
        (Some(Some(host)), Some(authority), None) if host == *authority => Some(host),
        (None, Some(authority), None) if parts.version >= Version::HTTP_2 => {
            Some(authority.clone())
        }
        _ => None,
    };
    sound
        .filter(|host| !host.as_str().contains('@') && !host.host().is_empty())
        .ok_or(Wrong::Host)
}

/// Whether a path is one that every server reads alike.
fn path(path: &str) -> bool {
    let Some(decoded) = unescaped(path.as_bytes()) else {
        return false;
    };
    let odd = |byte: &u8| byte.is_ascii_control() || *byte == b'\\';
    let dots = |segment: &[u8]| segment == b"." || segment == b"..";
    // A slash that is written as %2F separates nothing, and may be part of a model's name.
    path.starts_with('/')
        && path.bytes().all(|byte| byte.is_ascii_graphic())
        && !decoded.iter().any(odd)
        && !decoded.split(|byte| *byte == b'/').any(dots)
}

/// The bytes of %-escapes; `None` when one is broken.
fn unescaped(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            let digit = |byte: u8| char::from(byte).to_digit(16);
            let value = digit(digits[0])? * 16 + digit(digits[1])?;
            bytes.push(u8::try_from(value).ok()?);
            rest = after;
        } else {
            bytes.push(first);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    fn parts(version: Version, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut builder = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    #[test]
    fn hosts() {
        let one = |uri: &str, hosts: &[&str]| {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            check(&parts(Version::HTTP_11, uri, &headers)).map(|host| host.to_string())
        };
        assert_eq!(one("/", &["a:8443"]).unwrap(), "a:8443");
        assert_eq!(one("https://b/x", &["a"]).unwrap(), "b");
        for wrong in [
            &[][..],
            &["a", "a"],
            &["a", "b"],
            &["a b"],
            &[""],
            &["u@a"],
            &["a/b"],
        ] {
            assert_eq!(one("/", wrong), Err(Wrong::Host), "{wrong:?}");
        }
        assert_eq!(one("https://b/x", &[]), Err(Wrong::Host));
        let two = |uri: &str, hosts: &[&str]| {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            check(&parts(Version::HTTP_2, uri, &headers)).map(|host| host.to_string())
        };
        assert_eq!(two("https://a/", &[]).unwrap(), "a");
        assert_eq!(two("https://a/", &["a"]).unwrap(), "a");
        assert_eq!(two("https://a/", &["b"]), Err(Wrong::Host));
        assert_eq!(two("/", &[]), Err(Wrong::Host));
    }

    #[test]
    fn headers_that_decide_come_once() {
        for name in ["authorization", "content-encoding", "x-api-key", "api-key"] {
            let found = parts(
                Version::HTTP_11,
                "/",
                &[("host", "a"), (name, "x"), (name, "x")],
            );
            assert_eq!(check(&found), Err(Wrong::Twice), "{name}");
        }
        let found = parts(
            Version::HTTP_11,
            "/",
            &[("host", "a"), ("accept", "x"), ("accept", "y")],
        );
        assert!(check(&found).is_ok());
    }

    #[test]
    fn paths() {
        for right in [
            "/",
            "/v1/models",
            "//v1//models/",
            "/v1/models/org%2Fname",
            "/a%20b",
            "/a..b/...",
            "/%25",
        ] {
            assert!(path(right), "{right}");
        }
        for wrong in [
            "",
            "*",
            "v1",
            "/a/../b",
            "/a/./b",
            "/..",
            "/%2e%2e/a",
            "/.%2E",
            "/a%2f..%2fb",
            "/a\\b",
            "/a%5Cb",
            "/a%00",
            "/a%0d%0a",
            "/a%",
            "/a%4",
            "/a%zz",
            "/a%7f",
            "/\u{e4}",
        ] {
            assert!(!path(wrong), "{wrong}");
        }
    }

    proptest! {
        /// What passes has nothing that a second look at its escapes would turn into another path of ours.
        #[test]
        fn no_path_climbs(text in "/[a-z./%2eEfF0-9\\\\]{0,20}") {
            if path(&text) {
                let decoded = unescaped(text.as_bytes()).unwrap();
                prop_assert!(!decoded.split(|b| *b == b'/').any(|part| part == b"." || part == b".."));
            }
        }
    }
}
