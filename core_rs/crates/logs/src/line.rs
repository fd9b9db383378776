//! A log line: one JSON object, or one readable line.

use std::fmt::Write as _;
use std::time::SystemTime;

use serde_json::{Map, Value};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, UtcTime};

use crate::repeats::Level;
use crate::terminal;

/// How lines look.
#[derive(Clone, Debug, Default)]
pub struct Form {
    /// The field `service` of every line.
    pub service: String,
    /// One JSON object a line; else for people.
    pub json: bool,
}

/// The fields of one line.
pub(crate) struct Line {
    level: Level,
    component: String,
    event: String,
    fields: Map<String, Value>,
}

impl Line {
    pub(crate) fn new(level: Level, component: &str, event: &str) -> Self {
        Self {
            level,
            component: component.to_owned(),
            event: event.to_owned(),
            fields: Map::new(),
        }
    }

    /// Adds a field; `message` is the event itself, as [`tracing`] calls it.
    pub(crate) fn put(&mut self, name: &str, value: impl Into<Value>) {
        match (name, value.into()) {
            ("message", Value::String(text)) => self.event = text,
            (name, value) => {
                self.fields.insert(name.to_owned(), value);
            }
        }
    }

    /// The line, without a line feed.
    pub(crate) fn render(mut self, form: &Form) -> String {
        let timestamp = now();
        if form.json {
            for (name, value) in [
                ("timestamp", timestamp),
                ("level", self.level.as_str().to_owned()),
                ("service", form.service.clone()),
                ("component", self.component),
                ("event", self.event),
            ] {
                self.fields.insert(name.to_owned(), Value::from(value));
            }
            return terminal::safe(&Value::Object(self.fields).to_string()).into_owned();
        }
        let mut line = format!(
            "{timestamp} [{:<8}] {} component={} service={}",
            self.level.as_str(),
            terminal::safe(&self.event),
            self.component,
            form.service
        );
        for (name, value) in &self.fields {
            // Writing to a string does not fail; the JSON form of a value has no control characters below 0x80.
            let _ = write!(line, " {name}={}", terminal::safe(&value.to_string()));
        }
        line
    }
}

/// RFC 3339 in UTC, as on the Python side.
pub(crate) fn now() -> String {
    let mut text = String::new();
    if UtcTime::rfc_3339()
        .format_time(&mut Writer::new(&mut text))
        .is_err()
    {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        text = since.map_or(0, |age| age.as_secs()).to_string();
    }
    text
}
