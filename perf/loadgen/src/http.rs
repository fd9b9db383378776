//! As much of an HTTP/1.1 client as a load generator needs: response heads and body framing.

/// Longest accepted response head, in bytes: a server under test never needs more.
const MAX_HEAD: usize = 64 * 1024;

/// How the body of a response is delimited (RFC 9112 §6.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// `content-length`: this many bytes are left.
    Length(u64),
    /// `transfer-encoding: chunked`.
    Chunked(Chunk),
    /// Until the server closes the connection.
    UntilClose,
}

/// Where a chunked body stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// In a size line; the line so far.
    Size(Vec<u8>),
    /// In chunk data; this many bytes are left.
    Data(u64),
    /// In the CRLF behind chunk data; this many bytes are left.
    DataEnd(u8),
    /// In the trailer section; the line so far.
    Trailer(Vec<u8>),
}

/// The head of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// Status code.
    pub(crate) status: u16,
    /// Framing of the body.
    pub(crate) body: Body,
    /// Whether the connection can carry another request.
    pub(crate) keep_alive: bool,
    /// Length of the head in bytes, with its blank line.
    pub(crate) len: usize,
}

/// Parses a response head from the start of `input`; `None` until it is complete.
pub(crate) fn parse_head(input: &[u8]) -> Result<Option<Head>, String> {
    let Some(end) = find(input, b"\r\n\r\n") else {
        if input.len() > MAX_HEAD {
            return Err(format!("response head longer than {MAX_HEAD} bytes"));
        }
        return Ok(None);
    };
    let text =
        std::str::from_utf8(&input[..end]).map_err(|_| "response head is not UTF-8".to_owned())?;
    let mut lines = text.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let mut words = status_line.splitn(3, ' ');
    let version = words.next().unwrap_or_default();
    let status = words.next().and_then(|word| word.parse::<u16>().ok());
    let (true, Some(status)) = (version.starts_with("HTTP/1."), status) else {
        return Err(format!("not an HTTP/1.1 status line: {status_line:?}"));
    };
    let mut keep_alive = version == "HTTP/1.1";
    let mut body = Body::UntilClose;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return Err(format!("header line without a colon: {line:?}"));
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            let length = value
                .parse()
                .map_err(|_| format!("bad content-length: {value:?}"))?;
            if body == Body::UntilClose {
                body = Body::Length(length);
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding")
            && value.eq_ignore_ascii_case("chunked")
        {
            body = Body::Chunked(Chunk::Size(Vec::new()));
        } else if name.eq_ignore_ascii_case("connection") {
            keep_alive = !value.eq_ignore_ascii_case("close");
        }
    }
    if matches!(status, 100..=199 | 204 | 304) {
        body = Body::Length(0);
    }
    keep_alive &= body != Body::UntilClose;
    Ok(Some(Head {
        status,
        body,
        keep_alive,
        len: end + 4,
    }))
}

impl Body {
    /// Consumes body bytes from `input` and hands the payload to `sink`.
    ///
    /// Returns how many bytes were consumed and whether the body is complete.
    pub(crate) fn feed(
        &mut self,
        input: &[u8],
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(usize, bool), String> {
        match self {
            Self::UntilClose => {
                sink(input);
                Ok((input.len(), false))
            }
            Self::Length(left) => {
                let take = clamp(*left, input.len());
                sink(&input[..take]);
                *left -= take as u64;
                Ok((take, *left == 0))
            }
            Self::Chunked(chunk) => chunk.feed(input, sink),
        }
    }
}

impl Chunk {
    fn feed(&mut self, input: &[u8], mut sink: impl FnMut(&[u8])) -> Result<(usize, bool), String> {
        let mut at = 0;
        while at < input.len() {
            match self {
                Self::Size(line) => {
                    let complete = read_line(line, input, &mut at)?;
                    if complete {
                        let size = parse_size(line)?;
                        *self = if size == 0 {
                            Self::Trailer(Vec::new())
                        } else {
                            Self::Data(size)
                        };
                    }
                }
                Self::Data(left) => {
                    let take = clamp(*left, input.len() - at);
                    sink(&input[at..at + take]);
                    at += take;
                    *left -= take as u64;
                    if *left == 0 {
                        *self = Self::DataEnd(2);
                    }
                }
                Self::DataEnd(left) => {
                    let expected = if *left == 2 { b'\r' } else { b'\n' };
                    if input[at] != expected {
                        return Err("chunk data is not followed by CRLF".to_owned());
                    }
                    at += 1;
                    *left -= 1;
                    if *left == 0 {
                        *self = Self::Size(Vec::new());
                    }
                }
                Self::Trailer(line) => {
                    let complete = read_line(line, input, &mut at)?;
                    if complete {
                        if line.is_empty() {
                            return Ok((at, true));
                        }
                        line.clear();
                    }
                }
            }
        }
        Ok((at, false))
    }
}

/// Appends to `line` up to the next LF; true when the line is complete (its CRLF removed).
fn read_line(line: &mut Vec<u8>, input: &[u8], at: &mut usize) -> Result<bool, String> {
    let rest = &input[*at..];
    let end = rest.iter().position(|&byte| byte == b'\n');
    line.extend_from_slice(&rest[..end.unwrap_or(rest.len())]);
    *at += end.map_or(rest.len(), |end| end + 1);
    if line.len() > MAX_HEAD {
        return Err(format!(
            "line of a chunked body longer than {MAX_HEAD} bytes"
        ));
    }
    if end.is_some() && line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(end.is_some())
}

fn parse_size(line: &[u8]) -> Result<u64, String> {
    let digits = line.split(|&byte| byte == b';').next().unwrap_or_default();
    std::str::from_utf8(digits)
        .ok()
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .ok_or_else(|| format!("bad chunk size: {:?}", String::from_utf8_lossy(line)))
}

fn clamp(left: u64, available: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(available)
}

/// First position of `needle` in `haystack`.
pub(crate) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn decode(body: Body, input: &[u8], piece: usize) -> (Vec<u8>, bool, usize) {
        let mut body = body;
        let mut out = Vec::new();
        let mut used = 0;
        for part in input.chunks(piece) {
            let (consumed, done) = body
                .feed(part, |bytes| out.extend_from_slice(bytes))
                .unwrap();
            used += consumed;
            if done {
                return (out, true, used);
            }
            assert_eq!(consumed, part.len());
        }
        (out, false, used)
    }

    #[test]
    fn heads() {
        let text = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx: y\r\n\r\nhello";
        for cut in 0..text.len() - 5 {
            assert_eq!(parse_head(&text[..cut]).unwrap(), None);
        }
        let head = parse_head(text).unwrap().unwrap();
        assert_eq!(
            head,
            Head {
                status: 200,
                body: Body::Length(5),
                keep_alive: true,
                len: text.len() - 5
            }
        );

        let chunked = parse_head(
            b"HTTP/1.1 429 x\r\ntransfer-encoding: Chunked\r\nContent-Length: 9\r\n\r\n",
        )
        .unwrap()
        .unwrap();
        assert_eq!(
            (chunked.status, chunked.body),
            (429, Body::Chunked(Chunk::Size(Vec::new())))
        );
        let closing =
            parse_head(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\n")
                .unwrap()
                .unwrap();
        assert!(!closing.keep_alive);
        let until_close = parse_head(b"HTTP/1.1 200 OK\r\n\r\n").unwrap().unwrap();
        assert_eq!(
            (until_close.body, until_close.keep_alive),
            (Body::UntilClose, false)
        );
        let empty = parse_head(b"HTTP/1.1 204 No Content\r\n\r\n")
            .unwrap()
            .unwrap();
        assert_eq!((empty.body, empty.keep_alive), (Body::Length(0), true));
    }

    #[test]
    fn damaged_heads_are_errors() {
        for text in [
            &b"SSH-2.0-x\r\n\r\n"[..],
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
        ] {
            assert!(
                parse_head(text).is_err(),
                "{:?}",
                String::from_utf8_lossy(text)
            );
        }
        assert!(parse_head(&vec![b'a'; MAX_HEAD + 1]).is_err());
    }

    #[test]
    fn chunked_bodies_in_pieces_of_any_size() {
        let input = b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\ntrailer: x\r\n\r\nHTTP/1.1";
        for piece in 1..=input.len() {
            let (out, done, used) = decode(Body::Chunked(Chunk::Size(Vec::new())), input, piece);
            assert!(done, "piece {piece}");
            assert_eq!(out, b"hello world");
            assert_eq!(used, input.len() - "HTTP/1.1".len());
        }
    }

    #[test]
    fn damaged_chunks_are_errors() {
        for text in [&b"zz\r\nhello"[..], b"5\r\nhelloXY", b"\r\n"] {
            let mut body = Body::Chunked(Chunk::Size(Vec::new()));
            assert!(body.feed(text, |_| ()).is_err());
        }
    }

    #[test]
    fn lengths() {
        assert_eq!(
            decode(Body::Length(5), b"helloHTTP", 9),
            (b"hello".to_vec(), true, 5)
        );
        assert_eq!(
            decode(Body::Length(5), b"hel", 1),
            (b"hel".to_vec(), false, 3)
        );
        assert_eq!(
            decode(Body::UntilClose, b"hel", 2),
            (b"hel".to_vec(), false, 3)
        );
    }
}
