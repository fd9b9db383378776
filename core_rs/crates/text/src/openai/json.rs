//! Writing JSON by hand: a chunk is a few fixed strings around one escaped text.

use std::io::Write;

/// Bytes that start something to escape: quotes, backslash, controls, and the lead bytes of
/// U+0085, U+2028 and U+2029, which are legal in JSON but end a line for some SSE readers.
const SUSPECT: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table[0xC2] = true;
    table[0xE2] = true;
    table
};

/// Appends a quoted JSON string.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    escape(out, text);
    out.push(b'"');
}

/// Appends the inside of a JSON string.
pub(super) fn escape(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let (mut done, mut at) = (0, 0);
    while at < bytes.len() {
        let byte = bytes[at];
        if !SUSPECT[usize::from(byte)] {
            at += 1;
            continue;
        }
        let (short, length): (&[u8], usize) = match (byte, &bytes[at + 1..]) {
            (b'"', _) => (b"\\\"", 1),
            (b'\\', _) => (b"\\\\", 1),
            (b'\n', _) => (b"\\n", 1),
            (b'\r', _) => (b"\\r", 1),
            (b'\t', _) => (b"\\t", 1),
            (0xC2, [0x85, ..]) => (b"\\u0085", 2),
            (0xE2, [0x80, 0xA8, ..]) => (b"\\u2028", 3),
            (0xE2, [0x80, 0xA9, ..]) => (b"\\u2029", 3),
            (0..0x20, _) => (b"", 1),
            _ => {
                at += 1;
                continue;
            }
        };
        out.extend_from_slice(&bytes[done..at]);
        if short.is_empty() {
            const HEX: &[u8; 16] = b"0123456789abcdef";
            let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&digits);
        } else {
            out.extend_from_slice(short);
        }
        at += length;
        done = at;
    }
    out.extend_from_slice(&bytes[done..]);
}

/// Appends a string or `null`.
pub(super) fn optional(out: &mut Vec<u8>, text: Option<&str>) {
    match text {
        Some(text) => string(out, text),
        None => raw(out, "null"),
    }
}

/// Appends text that is JSON already.
pub(super) fn raw(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
}

/// Appends an integer.
pub(super) fn integer(out: &mut Vec<u8>, value: u64) {
    // Writing to a Vec cannot fail.
    let _ = write!(out, "{value}");
}

/// Appends a log probability. JSON has no infinities; -9999 is what the API gives for
/// a token that cannot be.
pub(super) fn logprob(out: &mut Vec<u8>, value: f32) {
    if value.is_finite() {
        let _ = write!(out, "{value:?}");
    } else {
        raw(out, "-9999.0");
    }
}

/// Appends a comma unless `first`; clears it.
pub(super) fn comma(out: &mut Vec<u8>, first: &mut bool) {
    if !std::mem::take(first) {
        out.push(b',');
    }
}
