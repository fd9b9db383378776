//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Serialises with `, ` and `: ` between items, or over several lines with `indent` spaces.
pub(crate) fn dumps<T: Serialize>(
    value: &T,
    indent: Option<usize>,
    sort_keys: bool,
) -> serde_json::Result<String> {
    if sort_keys {
        // A JSON value keeps its keys in order of their names.
        return dumps(&serde_json::to_value(value)?, indent, false);
    }
    let mut bytes = Vec::new();
    if let Some(width) = indent {
        let spaces = " ".repeat(width.min(16));
        let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
        value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
    } else {
        value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced))?;
    }
    String::from_utf8(bytes).map_err(|error| serde_json::Error::io(io::Error::other(error)))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
