//! How much a JSON text holds, without building any of it.

/// Whether a JSON text has at most so many structures (arrays, objects, members of objects), and at most so many
/// elements beside the first of each array or object.
///
/// One pass that ends at the first limit. A decoder's time goes into the values it makes, so a body of a few
/// megabytes can cost it a second or a millisecond; this tells which. Text that is no JSON may pass: the decoder
/// says what is wrong with it.
pub fn json_within(body: &[u8], structures: usize, elements: usize) -> bool {
    let (mut built, mut commas) = (0, 0);
    let mut rest = body;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        match byte {
            b'"' => rest = after_string(rest),
            b'[' | b'{' | b':' => built += 1,
            b',' => commas += 1,
            _ => {}
        }
        if built > structures || commas > elements {
            return false;
        }
    }
    true
}

/// What follows the string whose opening quote was read.
fn after_string(mut rest: &[u8]) -> &[u8] {
    while let Some(at) = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
        if rest[at] == b'"' {
            return &rest[at + 1..];
        }
        rest = rest.get(at + 2..).unwrap_or_default();
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_are_the_last_number_that_passes() {
        assert!(json_within(b"[1,2,3]", 1, 2));
        assert!(!json_within(b"[1,2,3]", 1, 1));
        assert!(json_within(b"[[1],{}]", 3, 1));
        assert!(!json_within(b"[[1],{}]", 2, 1));
    }

    #[test]
    fn text_counts_as_one_value_whatever_it_holds() {
        let body = br#"{"a,[{:": "\",[{\\", "b": ",:,"}"#;
        assert!(json_within(body, 3, 1));
        assert!(!json_within(body, 3, 0));
        assert!(!json_within(body, 2, 1));
    }

    #[test]
    fn broken_text_is_left_to_the_decoder() {
        for body in [&b""[..], b"\"", b"\"\\", b"[\"a,,,", b"\xff\xfe"] {
            assert!(json_within(body, 1, 0));
        }
    }
}
