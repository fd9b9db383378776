//! Log lines of the Rust side in the form of the Python side: one JSON object, or one readable line, on stderr.

use std::fmt;
use std::fmt::Write as _;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, UtcTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

struct Line {
    service: String,
    json: bool,
}

/// Collects the fields of an event; the message becomes `event`, as structlog calls it.
struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        let name = if field.name() == "message" {
            "event"
        } else {
            field.name()
        };
        self.0.insert(name.to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::String(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::from(value));
    }
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        UtcTime::rfc_3339().format_time(&mut Writer::new(&mut timestamp))?;
        let level = match *event.metadata().level() {
            tracing::Level::WARN => "warning".to_owned(),
            other => other.as_str().to_lowercase(),
        };
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let component = event
            .metadata()
            .target()
            .split("::")
            .next()
            .unwrap_or_default();
        if self.json {
            for (name, value) in [
                ("timestamp", timestamp.as_str()),
                ("level", level.as_str()),
                ("service", self.service.as_str()),
                ("component", component),
            ] {
                fields.0.insert(name.to_owned(), Value::from(value));
            }
            return writeln!(out, "{}", Value::Object(fields.0));
        }
        let text = fields.0.remove("event").unwrap_or_default();
        let mut rest = String::new();
        for (name, value) in &fields.0 {
            write!(rest, " {name}={value}")?;
        }
        let text = text.as_str().unwrap_or_default();
        writeln!(
            out,
            "{timestamp} [{level:<8}] {text} component={component} service={}{rest}",
            self.service
        )
    }
}

/// Sends the log lines of this extension to stderr, in the form of the Python side. The first call counts.
///
/// `level`: debug, info, warning or error. Raises `ValueError` for another word.
#[pyfunction]
pub(crate) fn init_logging(service: String, level: &str, json: bool) -> PyResult<()> {
    let level = match level {
        "debug" => LevelFilter::DEBUG,
        "info" => LevelFilter::INFO,
        "warning" => LevelFilter::WARN,
        "error" => LevelFilter::ERROR,
        other => {
            return Err(PyValueError::new_err(format!(
                "unknown log level {other:?}"
            )));
        }
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        // It would be reported on stderr, and panic there, when stderr is what nobody reads any more.
        .log_internal_errors(false)
        .event_format(Line { service, json })
        .finish();
    // A second call in one process (tests, a reloaded worker) keeps the first subscriber.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}
