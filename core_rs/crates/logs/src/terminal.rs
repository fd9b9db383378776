//! Text of others that cannot steer a terminal.

use std::borrow::Cow;
use std::fmt::Write as _;

/// The text with control characters, line ends and marks of direction written as `\u001b`, also inside of JSON.
pub(crate) fn safe(text: &str) -> Cow<'_, str> {
    if !text.chars().any(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers(c) {
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Control characters (C0, DEL, C1), line and paragraph separators, and what changes the direction of text.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::safe;

    #[test]
    fn what_steers_is_written_out() {
        assert_eq!(
            safe("a\u{1b}[2Jb\n\u{9b}\u{202e}"),
            "a\\u001b[2Jb\\u000a\\u009b\\u202e"
        );
        assert_eq!(safe("Grüße 你好 🦀"), "Grüße 你好 🦀");
    }

    proptest! {
        #[test]
        fn nothing_steers_afterwards(text in ".*") {
            prop_assert!(!safe(&text).chars().any(char::is_control));
        }
    }
}
