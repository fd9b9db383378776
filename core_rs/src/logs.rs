//! The log of this process, for Python: its lines and the extension's own take one way.

use std::path::PathBuf;
use std::time::Duration;

use helix_logs::{Form, Kind, Level, Options, Rotation, Stream};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tracing::level_filters::LevelFilter;

fn level_of(level: &str) -> PyResult<Level> {
    match level {
        "debug" => Ok(Level::Debug),
        "info" => Ok(Level::Info),
        "warning" => Ok(Level::Warning),
        "error" => Ok(Level::Error),
        other => Err(PyValueError::new_err(format!(
            "unknown log level {other:?}"
        ))),
    }
}

/// Sends the log lines of this process to standard error, or to `file`, from a queue that nobody waits for.
///
/// `level`: of the extension's own lines. `unblock`: no other write to standard output and standard error waits either. `window_s`: repetitions are summed up this often (seconds). `max_bytes`,
/// `max_age_s` (0: any), `keep`: when the file is set aside, and how many are kept. Raises `ValueError` for an unknown
/// level, `OSError` for a file that cannot be opened.
#[pyfunction]
#[pyo3(signature = (service, level, *, json, unblock=false, window_s=60.0, file=None, max_bytes=0, max_age_s=0, keep=0))]
#[allow(
    clippy::too_many_arguments,
    reason = "each is named where it is called"
)]
pub(crate) fn init_logging(
    service: String,
    level: &str,
    json: bool,
    unblock: bool,
    window_s: f64,
    file: Option<PathBuf>,
    max_bytes: u64,
    max_age_s: u64,
    keep: usize,
) -> PyResult<()> {
    let level = match level_of(level)? {
        Level::Debug => LevelFilter::DEBUG,
        Level::Info => LevelFilter::INFO,
        Level::Warning => LevelFilter::WARN,
        Level::Error => LevelFilter::ERROR,
    };
    let max_age = Duration::from_secs(max_age_s);
    let rotation = Rotation {
        max_bytes,
        max_age,
        keep,
    };
    let window = Duration::try_from_secs_f64(window_s)
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    helix_logs::start(Options {
        form: Form { service, json },
        level,
        unblock,
        file: file.map(|path| (path, rotation)),
        window,
    })?;
    Ok(())
}

/// Queues one line; `text` has no line feed. Never waits: what does not fit is dropped and counted.
#[pyfunction]
pub(crate) fn log_line(text: &str) {
    helix_logs::line(text);
}

/// Queues what a program prints to standard output (1) or standard error (2), as it is. Never waits.
#[pyfunction]
pub(crate) fn log_text(descriptor: i32, text: &str) {
    let stream = if descriptor == 1 {
        Stream::Output
    } else {
        Stream::Error
    };
    helix_logs::text(stream, text);
}

/// Whether a line of this kind is to be written: the first of a window are, the sum of the others is told at its end.
///
/// `what` tells the kinds of one event apart. Raises `ValueError` for an unknown level.
#[pyfunction]
pub(crate) fn log_first(
    level: &str,
    component: String,
    event: String,
    what: String,
) -> PyResult<bool> {
    let level = level_of(level)?;
    Ok(helix_logs::first_of(Kind {
        level,
        component,
        event,
        what,
    }))
}

/// Waits until every line is written, at most `timeout_ms`; false when some are not. Tells the sums of repetitions.
#[pyfunction]
pub(crate) fn flush_logs(py: Python<'_>, timeout_ms: u64) -> bool {
    py.detach(|| helix_logs::flush(Duration::from_millis(timeout_ms)))
}

/// Lines of this process that were lost because nobody read them, and bytes that wait to be read.
#[pyfunction]
pub(crate) fn log_counts() -> (u64, usize) {
    helix_logs::lost()
}

/// Starts the log of a forked process, in it: the thread that writes has stayed behind. Raises `OSError`.
#[pyfunction]
pub(crate) fn log_forked() -> PyResult<()> {
    Ok(helix_logs::forked()?)
}
