//! The command line.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Printed for `--help` and behind a usage error.
pub(crate) const USAGE: &str = "\
helix-loadgen MODE --url URL [options]     load for a server on this machine; prints one JSON object

modes
  requests     keep-alive connections, one request after another on each
  stream       concurrent SSE streams of an OpenAI endpoint, each read to [DONE]
  handshake    full, then resumed TLS 1.3 handshakes, one after another

options
  --url URL            https://host:port/path or http://...; the host must be a loopback address
  --header 'N: V'      a request header; may be repeated
  --body TEXT          request body (then the method is POST)
  --body-file FILE     request body from a file
  --ca FILE            CA certificate (PEM) that signed the server's
  --insecure           accept any certificate
  --connections N      connections or streams (default 32)
  --duration S         measured seconds (default 10)
  --warmup S           seconds before the measurement (default 2)
  --requests R         stop after R measured requests; handshakes of each kind (default 200)";

/// What to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Requests,
    Stream,
    Handshake,
}

/// Where to send requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) addr: SocketAddr,
    pub(crate) path: String,
}

/// The parsed command line.
#[derive(Debug, Clone)]
pub(crate) struct Args {
    pub(crate) mode: Mode,
    pub(crate) url: Url,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) insecure: bool,
    pub(crate) connections: usize,
    pub(crate) duration: Duration,
    pub(crate) warmup: Duration,
    pub(crate) requests: Option<u64>,
}

/// Parses the arguments behind the program name. `Err` is a message for the user.
pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Args, String> {
    let mut args = args.into_iter();
    let mode = match args.next().as_deref() {
        Some("requests") => Mode::Requests,
        Some("stream") => Mode::Stream,
        Some("handshake") => Mode::Handshake,
        Some(other) => {
            return Err(format!(
                "unknown mode {other:?}: requests, stream or handshake"
            ));
        }
        None => return Err("a mode is missing: requests, stream or handshake".to_owned()),
    };
    let mut url = None;
    let mut parsed = Args {
        mode,
        url: Url {
            tls: false,
            host: String::new(),
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            path: String::new(),
        },
        headers: Vec::new(),
        body: None,
        ca: None,
        insecure: false,
        connections: 32,
        duration: Duration::from_secs(10),
        warmup: Duration::from_secs(2),
        requests: None,
    };
    while let Some(option) = args.next() {
        if option == "--insecure" {
            parsed.insecure = true;
            continue;
        }
        let value = args
            .next()
            .ok_or_else(|| format!("{option} needs a value"))?;
        match option.as_str() {
            "--url" => url = Some(parse_url(&value)?),
            "--header" => parsed.headers.push(parse_header(&value)?),
            "--body" => parsed.body = Some(value.into_bytes()),
            "--body-file" => {
                parsed.body = Some(
                    std::fs::read(&value)
                        .map_err(|error| format!("cannot read {value}: {error}"))?,
                );
            }
            "--ca" => parsed.ca = Some(PathBuf::from(value)),
            "--connections" => parsed.connections = number(&option, &value, 1.0, 100_000.0)?,
            "--duration" => parsed.duration = seconds(&option, &value)?,
            "--warmup" => parsed.warmup = seconds(&option, &value)?,
            "--requests" => parsed.requests = Some(number(&option, &value, 1.0, 1e9)?),
            _ => return Err(format!("unknown option {option}")),
        }
    }
    parsed.url = url.ok_or("--url is missing")?;
    if parsed.url.tls && parsed.ca.is_none() && !parsed.insecure {
        return Err("an https URL needs --ca FILE or --insecure".to_owned());
    }
    if mode == Mode::Handshake && !parsed.url.tls {
        return Err("handshake needs an https URL".to_owned());
    }
    Ok(parsed)
}

fn number<T: std::str::FromStr + Copy + TryInto<u64>>(
    option: &str,
    value: &str,
    low: f64,
    high: f64,
) -> Result<T, String> {
    let parsed: Option<T> = value.parse().ok();
    let inside = value
        .parse::<f64>()
        .is_ok_and(|number| (low..=high).contains(&number));
    parsed.filter(|_| inside).ok_or_else(|| {
        format!("{option} must be a whole number from {low} to {high}, not {value:?}")
    })
}

fn seconds(option: &str, value: &str) -> Result<Duration, String> {
    value
        .parse::<f64>()
        .ok()
        .filter(|seconds| (0.0..=3600.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("{option} must be seconds from 0 to 3600, not {value:?}"))
}

fn parse_header(value: &str) -> Result<String, String> {
    let clean = !value.chars().any(char::is_control);
    match value.split_once(':') {
        Some((name, text)) if clean && !name.trim().is_empty() => {
            Ok(format!("{}: {}", name.trim(), text.trim()))
        }
        _ => Err(format!("--header must be 'Name: value', not {value:?}")),
    }
}

/// `scheme://host[:port][/path]`, loopback hosts only: this is a bench for one machine.
fn parse_url(text: &str) -> Result<Url, String> {
    let (tls, rest) = match text.split_once("://") {
        Some(("https", rest)) => (true, rest),
        Some(("http", rest)) => (false, rest),
        _ => {
            return Err(format!(
                "--url must start with https:// or http://, not {text:?}"
            ));
        }
    };
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    if path.chars().any(|c| c.is_control() || c == ' ') {
        return Err(format!(
            "--url has a path with spaces or control characters: {text:?}"
        ));
    }
    let default_port = if tls { 443 } else { 80 };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (
            host,
            port.parse()
                .map_err(|_| format!("--url has a bad port: {text:?}"))?,
        ),
        _ => (authority, default_port),
    };
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let ip: Option<IpAddr> = if host == "localhost" {
        Some(Ipv4Addr::LOCALHOST.into())
    } else {
        host.parse().ok()
    };
    match ip {
        Some(ip) if ip.is_loopback() => Ok(Url {
            tls,
            host,
            addr: SocketAddr::new(ip, port),
            path: path.to_owned(),
        }),
        _ => Err(format!(
            "--url must name localhost or a loopback address, not {host:?}"
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn args(line: &str) -> Result<Args, String> {
        parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn urls() {
        let url = parse_url("https://localhost:8443/v1/models").unwrap();
        assert_eq!(
            (url.tls, url.host.as_str(), url.path.as_str()),
            (true, "localhost", "/v1/models")
        );
        assert_eq!(url.addr, "127.0.0.1:8443".parse().unwrap());
        assert_eq!(
            parse_url("http://127.0.0.2").unwrap().addr,
            "127.0.0.2:80".parse().unwrap()
        );
        assert_eq!(
            parse_url("https://[::1]:9/x").unwrap().addr,
            "[::1]:9".parse().unwrap()
        );
        assert_eq!(
            parse_url("https://[::1]/x").unwrap().addr,
            "[::1]:443".parse().unwrap()
        );
        for bad in [
            "https://example.com/",
            "http://10.0.0.1:80/",
            "https://0.0.0.0:1/",
            "ftp://localhost/",
            "https://localhost:x/",
            "http://localhost/a b",
        ] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_full_line() {
        let parsed = args("stream --url https://localhost:1/x --insecure --connections 200 --duration 1.5 --requests 9 --body {}").unwrap();
        assert_eq!(
            (parsed.mode, parsed.connections, parsed.requests),
            (Mode::Stream, 200, Some(9))
        );
        assert_eq!(parsed.duration, Duration::from_millis(1500));
        assert_eq!(parsed.body.as_deref(), Some(&b"{}"[..]));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("run --url http://localhost/", "mode"),
            ("requests", "--url"),
            ("requests --url https://localhost/", "--ca"),
            ("handshake --url http://localhost/", "https"),
            (
                "requests --url http://localhost/ --connections 0",
                "--connections",
            ),
            (
                "requests --url http://localhost/ --connections 1.5",
                "--connections",
            ),
            (
                "requests --url http://localhost/ --duration -1",
                "--duration",
            ),
            ("requests --url http://localhost/ --header x", "--header"),
            ("requests --url http://localhost/ --what 1", "--what"),
            ("requests --url", "--url"),
        ] {
            assert!(args(line).unwrap_err().contains(word), "{line}");
        }
    }
}
