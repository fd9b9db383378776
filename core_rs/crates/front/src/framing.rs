//! Where heads and bodies of HTTP/1.1 requests begin and end, read more strictly than any server after us reads it.
//!
//! A head is let through once it is whole and sound, so that nobody behind us sees half of one. What two servers could
//! read in two ways is refused (RFC 9112 §2.2, §5, §6.3, §11.2): a line that ends without CR, folded lines, spaces around
//! names, two lengths, codings other than `chunked`.

use bytes::BytesMut;

/// Longest line that gives the size of a chunk, with its extensions.
const CHUNK_LINE: usize = 256;
/// Longest trailers.
const TRAILER_BYTES: usize = 8192;

/// What is wrong with the bytes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    /// A line feed without its carriage return, or the other way round.
    #[error("a line does not end with CR LF")]
    LineEnd,
    /// A control character in the head.
    #[error("the head holds a control character")]
    Control,
    /// The head is larger than it may be.
    #[error("the head is too large")]
    TooLarge,
    /// The first line is no request.
    #[error("the first line is not `METHOD TARGET HTTP/1.1`")]
    RequestLine,
    /// A header is none.
    #[error("a header is not `name: value` on one line")]
    Header,
    /// `Content-Length` is no number, or there are several.
    #[error("Content-Length must be given once, in digits")]
    Length,
    /// Both ways to say where the body ends.
    #[error("Content-Length and Transfer-Encoding exclude each other")]
    BothLengths,
    /// A coding of the body that is not `chunked`, or from a client that knows none.
    #[error("Transfer-Encoding must be `chunked` alone, in HTTP/1.1")]
    Coding,
    /// A body in chunks that is none.
    #[error("a chunk of the body is malformed")]
    Chunk,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The next request, of which nothing has come.
    Between,
    /// A head that has begun.
    Head,
    /// A body, or what ends it.
    Body,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    Fixed(u64),
    /// In the line with a chunk's size.
    Size,
    Data(u64),
    /// The two bytes behind a chunk; how many have come.
    DataEnd(u8),
    Trailers,
}

/// Follows the bytes of one connection.
#[derive(Debug)]
pub(crate) struct Framing {
    state: State,
    /// The head, the line of a chunk's size, or the trailers, as far as they have come.
    held: BytesMut,
    head_bytes: usize,
    heads: u64,
}

impl Framing {
    /// Before the first request. `head_bytes`: the largest head.
    pub(crate) fn new(head_bytes: usize) -> Self {
        Self {
            state: State::Head,
            held: BytesMut::new(),
            head_bytes,
            heads: 0,
        }
    }

    /// Heads that were let through.
    pub(crate) fn heads(&self) -> u64 {
        self.heads
    }

    /// What the next byte belongs to.
    pub(crate) fn phase(&self) -> Phase {
        match self.state {
            State::Head if self.held.is_empty() => Phase::Between,
            State::Head => Phase::Head,
            _ => Phase::Body,
        }
    }

    /// Takes the next bytes; what of them may go on is added to `passed`. After a violation nothing more may.
    pub(crate) fn feed(
        &mut self,
        mut input: &[u8],
        passed: &mut BytesMut,
    ) -> Result<(), Violation> {
        while !input.is_empty() {
            let used = match self.state {
                State::Head => self.head(input, passed)?,
                State::Fixed(left) => {
                    let take = as_far(left, input.len());
                    let left = left - take as u64;
                    self.state = if left == 0 {
                        State::Head
                    } else {
                        State::Fixed(left)
                    };
                    take.into()
                }
                State::Data(left) => {
                    let take = as_far(left, input.len());
                    let left = left - take as u64;
                    self.state = if left == 0 {
                        State::DataEnd(0)
                    } else {
                        State::Data(left)
                    };
                    take.into()
                }
                State::DataEnd(come) => {
                    if input[0] != b"\r\n"[usize::from(come)] {
                        return Err(Violation::Chunk);
                    }
                    self.state = if come == 0 {
                        State::DataEnd(1)
                    } else {
                        State::Size
                    };
                    1.into()
                }
                State::Size => self.size(input)?,
                State::Trailers => self.trailers(input)?,
            };
            // A head goes on as a whole; all else as it comes.
            if used.passes {
                passed.extend_from_slice(&input[..used.bytes]);
            }
            input = &input[used.bytes..];
        }
        Ok(())
    }

    fn head(&mut self, input: &[u8], passed: &mut BytesMut) -> Result<Used, Violation> {
        // Empty lines before a request are skipped, as RFC 9112 §2.2 asks, and not passed on.
        let (used, whole) = self.until_empty_line(input, self.head_bytes, Violation::TooLarge)?;
        if whole {
            if self.held.as_ref() != b"\r\n" {
                self.state = after(&self.held)?;
                passed.extend_from_slice(&self.held);
                self.heads += 1;
            }
            self.held.clear();
        }
        Ok(Used {
            bytes: used,
            passes: false,
        })
    }

    fn trailers(&mut self, input: &[u8]) -> Result<Used, Violation> {
        let (used, whole) = self.until_empty_line(input, TRAILER_BYTES, Violation::Chunk)?;
        if whole {
            for line in lines(&self.held) {
                header(line)?;
            }
            self.held.clear();
            self.state = State::Head;
        }
        Ok(used.into())
    }

    /// Holds bytes up to the end of an empty line. How many were taken, and whether it came.
    fn until_empty_line(
        &mut self,
        input: &[u8],
        limit: usize,
        too_large: Violation,
    ) -> Result<(usize, bool), Violation> {
        for (at, &byte) in input.iter().enumerate() {
            let after_return = self.held.last() == Some(&b'\r');
            if (byte == b'\n') != after_return {
                return Err(Violation::LineEnd);
            }
            if byte == 0x7f || (byte < 0x20 && !matches!(byte, b'\r' | b'\n' | b'\t')) {
                return Err(Violation::Control);
            }
            if self.held.len() >= limit {
                return Err(too_large);
            }
            self.held.extend_from_slice(&[byte]);
            if byte == b'\n' && (self.held.len() == 2 || self.held.ends_with(b"\r\n\r\n")) {
                return Ok((at + 1, true));
            }
        }
        Ok((input.len(), false))
    }

    fn size(&mut self, input: &[u8]) -> Result<Used, Violation> {
        for (at, &byte) in input.iter().enumerate() {
            let after_return = self.held.last() == Some(&b'\r');
            if (byte == b'\n') != after_return || self.held.len() >= CHUNK_LINE {
                return Err(Violation::Chunk);
            }
            self.held.extend_from_slice(&[byte]);
            if byte == b'\n' {
                let size = chunk_size(&self.held[..self.held.len() - 2])?;
                self.held.clear();
                self.state = if size == 0 {
                    State::Trailers
                } else {
                    State::Data(size)
                };
                return Ok((at + 1).into());
            }
        }
        Ok(input.len().into())
    }
}

/// How many bytes of the input were taken, and whether they go on as they are.
struct Used {
    bytes: usize,
    passes: bool,
}

impl From<usize> for Used {
    fn from(bytes: usize) -> Self {
        Self {
            bytes,
            passes: true,
        }
    }
}

fn as_far(left: u64, len: usize) -> usize {
    usize::try_from(left).map_or(len, |left| left.min(len))
}

/// The lines of a head without its end.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .take_while(|line| !line.is_empty())
}

/// What follows a head.
fn after(head: &[u8]) -> Result<State, Violation> {
    let mut lines = lines(head);
    let version = request_line(lines.next().unwrap_or_default())?;
    let (mut length, mut chunked) = (None, false);
    for line in lines {
        let (name, value) = header(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            if length.replace(content_length(value)?).is_some() {
                return Err(Violation::Length);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if chunked || version == 0 || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Violation::Coding);
            }
            chunked = true;
        }
    }
    match (length, chunked) {
        (Some(_), true) => Err(Violation::BothLengths),
        (None, true) => Ok(State::Size),
        (Some(length), false) if length > 0 => Ok(State::Fixed(length)),
        _ => Ok(State::Head),
    }
}

/// The minor version.
fn request_line(line: &[u8]) -> Result<u8, Violation> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (method, target, version) = (parts.next(), parts.next(), parts.next());
    let sound = method
        .is_some_and(|method| !method.is_empty() && method.iter().copied().all(is_token))
        && target
            .is_some_and(|target| !target.is_empty() && target.iter().all(u8::is_ascii_graphic))
        && parts.next().is_none();
    match version {
        Some(b"HTTP/1.1") if sound => Ok(1),
        Some(b"HTTP/1.0") if sound => Ok(0),
        _ => Err(Violation::RequestLine),
    }
}

/// Name and value, without the spaces around the latter.
fn header(line: &[u8]) -> Result<(&[u8], &[u8]), Violation> {
    let colon = line
        .iter()
        .position(|byte| *byte == b':')
        .ok_or(Violation::Header)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    // A folded line begins with a space, and a space before the colon is a name for some.
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err(Violation::Header);
    }
    Ok((name, value.trim_ascii()))
}

fn content_length(value: &[u8]) -> Result<u64, Violation> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Violation::Length);
    }
    let digits = value.iter().map(|byte| u64::from(byte - b'0'));
    Ok(digits.fold(0, |number, digit| number * 10 + digit))
}

fn chunk_size(line: &[u8]) -> Result<u64, Violation> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
    let extension = &line[digits.len()..];
    let sound = (1..=15).contains(&digits.len())
        && extension
            .iter()
            .all(|byte| byte.is_ascii_graphic() || *byte == b' ' || *byte == b'\t');
    if !sound {
        return Err(Violation::Chunk);
    }
    digits.iter().try_fold(0, |size, byte| {
        let digit = char::from(*byte).to_digit(16).ok_or(Violation::Chunk)?;
        Ok(size * 16 + u64::from(digit))
    })
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const HOST: &str = "POST /v1 HTTP/1.1\r\nhost: a\r\n";

    fn read(input: &[u8]) -> Result<(Vec<u8>, Phase), Violation> {
        let (mut framing, mut passed) = (Framing::new(1000), BytesMut::new());
        framing.feed(input, &mut passed)?;
        Ok((passed.to_vec(), framing.phase()))
    }

    #[test]
    fn sound_requests_pass_unchanged() {
        for text in [
            format!("{HOST}\r\n"),
            format!("{HOST}content-length: 5\r\n\r\nhello"),
            format!("{HOST}content-length: 0\r\n\r\n{HOST}\r\n"),
            format!(
                "{HOST}Transfer-Encoding: Chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n{HOST}\r\n"
            ),
            "GET / HTTP/1.0\r\n\r\n".to_owned(),
        ] {
            assert_eq!(
                read(text.as_bytes()),
                Ok((text.clone().into_bytes(), Phase::Between)),
                "{text:?}"
            );
        }
    }

    #[test]
    fn phases() {
        let at = |text: &str| read(text.as_bytes()).unwrap().1;
        assert_eq!(at(""), Phase::Between);
        assert_eq!(
            at("\r\n"),
            Phase::Between,
            "an empty line before a request is nothing"
        );
        assert_eq!(at("G"), Phase::Head);
        assert_eq!(at(&format!("{HOST}content-length: 2\r\n\r\n")), Phase::Body);
        assert_eq!(
            at(&format!("{HOST}content-length: 2\r\n\r\nab")),
            Phase::Between
        );
        assert_eq!(
            read(b"GET / HTTP/1.1\r\nhost: a").unwrap().0,
            b"",
            "half a head stays here"
        );
    }

    #[test]
    fn violations() {
        use Violation as V;
        let cases: [(&str, Violation); 28] = [
            ("GET / HTTP/1.1\nhost: a\n\n", V::LineEnd),
            ("GET / HTTP/1.1\r\nhost: a\n\r\n", V::LineEnd),
            ("GET / HTTP/1.1\r\nhost: a\rb\r\n\r\n", V::LineEnd),
            ("GET / HTTP/1.1\r\nhost: a\0\r\n\r\n", V::Control),
            ("GET / HTTP/1.1\r\nhost: a\x1b\r\n\r\n", V::Control),
            ("GET  / HTTP/1.1\r\n\r\n", V::RequestLine),
            ("GET / HTTP/1.1 \r\n\r\n", V::RequestLine),
            ("GET /\r\n\r\n", V::RequestLine),
            (" GET / HTTP/1.1\r\n\r\n", V::RequestLine),
            ("GET /\u{e4} HTTP/1.1\r\n\r\n", V::RequestLine),
            ("GET / HTTP/1.2\r\n\r\n", V::RequestLine),
            ("GET / http/1.1\r\n\r\n", V::RequestLine),
            ("G(T / HTTP/1.1\r\n\r\n", V::RequestLine),
            ("GET / HTTP/1.1\r\n host: a\r\n\r\n", V::Header),
            ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", V::Header),
            ("GET / HTTP/1.1\r\nhost\r\n\r\n", V::Header),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", V::Header),
            ("GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n", V::Header),
            (
                "GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n",
                V::Length,
            ),
            ("GET / HTTP/1.1\r\ncontent-length: +1\r\n\r\n", V::Length),
            ("GET / HTTP/1.1\r\ncontent-length: 1, 1\r\n\r\n", V::Length),
            ("GET / HTTP/1.1\r\ncontent-length:\r\n\r\n", V::Length),
            (
                "GET / HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
                V::Length,
            ),
            (
                "GET / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
                V::BothLengths,
            ),
            (
                "GET / HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
                V::Coding,
            ),
            (
                "GET / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n",
                V::Coding,
            ),
            (
                "GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
                V::Coding,
            ),
            (
                "GET / HTTP/1.1\r\ntransfer-encoding: \u{b}chunked\r\n\r\n",
                V::Control,
            ),
        ];
        for (text, violation) in cases {
            assert_eq!(read(text.as_bytes()), Err(violation), "{text:?}");
        }
        for chunk in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "1\nx\r\n",
            "1\r\nxy",
            "1\r\nx\n",
            "0x1\r\n",
            "ffffffffffffffff\r\n",
        ] {
            let text = format!("{HOST}transfer-encoding: chunked\r\n\r\n{chunk}");
            assert_eq!(read(text.as_bytes()), Err(Violation::Chunk), "{chunk:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(1000));
        assert_eq!(read(long.as_bytes()), Err(Violation::TooLarge));
    }

    fn request() -> impl Strategy<Value = Vec<u8>> {
        let fixed = prop::collection::vec(any::<u8>(), 0..50).prop_map(|body| {
            let mut text = format!("{HOST}content-length: {}\r\n\r\n", body.len()).into_bytes();
            text.extend(body);
            text
        });
        let chunk = prop::collection::vec(any::<u8>(), 1..20);
        let chunked = prop::collection::vec(chunk, 0..4).prop_map(|chunks| {
            let mut text = format!("{HOST}transfer-encoding: chunked\r\n\r\n").into_bytes();
            for chunk in chunks {
                text.extend(format!("{:x}\r\n", chunk.len()).bytes());
                text.extend(chunk);
                text.extend(b"\r\n");
            }
            text.extend(b"0\r\n\r\n");
            text
        });
        prop_oneof![fixed, chunked]
    }

    proptest! {
        /// Requests behind each other pass byte by byte as they are, however they are cut.
        #[test]
        fn the_same_however_it_is_cut(requests in prop::collection::vec(request(), 0..4), cuts in prop::collection::vec(1_usize..30, 1..10)) {
            let text = requests.concat();
            let (mut framing, mut passed) = (Framing::new(1000), BytesMut::new());
            let (mut rest, mut cuts) = (text.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                framing.feed(piece, &mut passed).unwrap();
                rest = after;
            }
            prop_assert_eq!(passed.as_ref(), text.as_slice());
            prop_assert_eq!(framing.phase(), Phase::Between);
        }

        /// Whatever comes: no panic, nothing invented, and a head that passes is one for httparse as well.
        #[test]
        fn any_bytes(input in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b':')], 0..200)) {
            if let Ok((passed, _)) = read(&input) {
                prop_assert!(passed.len() <= input.len());
            }
        }

        #[test]
        fn heads_that_pass_are_heads_for_the_server(name in "[ -~]{0,6}", value in "[ -~\t\r\n]{0,12}", target in "[ -~]{1,8}") {
            let text = format!("GET {target} HTTP/1.1\r\n{name}:{value}\r\n\r\n");
            let (mut framing, mut passed) = (Framing::new(1000), BytesMut::new());
            if framing.feed(text.as_bytes(), &mut passed).is_ok() && !passed.is_empty() {
                let mut headers = [httparse::EMPTY_HEADER; 8];
                prop_assert!(httparse::Request::new(&mut headers).parse(&passed).is_ok_and(|status| status.is_complete()));
            }
        }
    }
}
