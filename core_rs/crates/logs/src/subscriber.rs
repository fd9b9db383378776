//! Events of [`tracing`] as lines.

use std::fmt;
use std::fmt::Write as _;

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry;

use crate::line::Line;
use crate::repeats::{Kind, Level};

/// Fields that tell the kinds of one event apart. Ports of clients do not.
const TELLING: [&str; 7] = [
    "from", "peer", "pool", "server", "address", "error", "reason",
];

/// Sends events of our crates from `level` on to the log; of others only what went wrong.
///
/// What libraries say for debugging may hold headers and bodies. The first call of a process counts.
pub(crate) fn install(level: LevelFilter) {
    let _ = tracing::subscriber::set_global_default(registry().with(ToLog(level)));
}

struct ToLog(LevelFilter);

impl<S: Subscriber> Layer<S> for ToLog {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let ours =
            metadata.target().starts_with("helix_") || metadata.target().starts_with("core_rs");
        let least = if ours {
            self.0
        } else {
            self.0.min(LevelFilter::WARN)
        };
        *metadata.level() <= least
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let component = metadata.target().split("::").next().unwrap_or_default();
        let level = match *metadata.level() {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warning,
            tracing::Level::INFO => Level::Info,
            _ => Level::Debug,
        };
        let mut fields = Fields {
            line: Line::new(level, component, ""),
            event: String::new(),
            what: String::new(),
            from: false,
        };
        event.record(&mut fields);
        let Fields {
            mut line,
            event,
            what,
            from,
        } = fields;
        // Whoever connects decides how often these come.
        if from || matches!(level, Level::Warning | Level::Error) {
            let component = component.to_owned();
            let kind = Kind {
                level,
                component,
                event: event.clone(),
                what,
            };
            if !crate::first_of(kind) {
                return;
            }
        }
        line.put("message", event);
        let log = crate::LOG.load();
        log.lines.push_line(&line.render(&log.form));
    }
}

struct Fields {
    line: Line,
    event: String,
    what: String,
    from: bool,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.event = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            return;
        }
        if TELLING.contains(&field.name()) {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            self.from |= field.name() == "from";
            let shown = match field.name() {
                "from" => text
                    .rsplit_once(':')
                    .map_or(text.as_str(), |(host, _)| host),
                _ => &text,
            };
            let space = if self.what.is_empty() { "" } else { " " };
            let _ = write!(self.what, "{space}{}={shown}", field.name());
        }
        self.line.put(field.name(), value);
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
