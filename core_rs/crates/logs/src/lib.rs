//! Where log lines go: into a bounded queue, and from there, by a thread of its own, to whoever reads them or not.
//!
//! Nobody who writes a line ever waits. What does not fit is dropped and counted, and the count is a line of the log once
//! it flows again. Python's lines take the same way, so that one process has one queue and one order.

mod file;
mod line;
mod output;
mod repeats;
mod sink;
mod subscriber;
mod target;
mod terminal;

use std::fmt::Arguments;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tracing::level_filters::LevelFilter;

pub use file::Rotation;
pub use line::Form;
pub use output::Stream;
pub use repeats::{Kind, Level};

use file::File;
use line::Line;
use repeats::Repeats;
use sink::Sink;
use target::Target;

/// What the log of a process needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Form of the lines and name of the service.
    pub form: Form,
    /// Lowest level of this extension's own lines. Other crates report warnings and errors only.
    pub level: LevelFilter,
    /// A file instead of standard error.
    pub file: Option<(PathBuf, Rotation)>,
    /// Whether standard output and standard error are to block nobody from now on: not where they are what is asked for.
    pub unblock: bool,
    /// How long repetitions are counted before the sum is told.
    pub window: Duration,
}

/// Everything of one process; a fork gets a new one.
struct Log {
    form: Form,
    file: Option<(PathBuf, Rotation)>,
    window: Duration,
    lines: Sink,
    /// Standard output, when it leads elsewhere than standard error does.
    output: Option<Sink>,
    repeats: Arc<Repeats>,
}

impl Log {
    fn new(form: Form, file: Option<(PathBuf, Rotation)>, window: Duration) -> io::Result<Self> {
        let target = match &file {
            None => Target::Stream(Stream::Error),
            Some((path, rotation)) => Target::File(File::open(path, *rotation)?),
        };
        let repeats = Arc::new(Repeats::new(window));
        Ok(Self {
            lines: Sink::new(target, form.clone(), Some(Arc::clone(&repeats))),
            output: (file.is_some() || !output::same())
                .then(|| Sink::new(Target::Stream(Stream::Output), form.clone(), None)),
            form,
            file,
            window,
            repeats,
        })
    }

    fn sink(&self, stream: Stream) -> &Sink {
        match (stream, &self.output) {
            (Stream::Output, Some(output)) => output,
            _ => &self.lines,
        }
    }
}

/// Until [`start`] lines go to standard error, readable.
static LOG: LazyLock<ArcSwap<Log>> = LazyLock::new(|| {
    let form = Form::default();
    let repeats = Arc::new(Repeats::new(Duration::from_secs(60)));
    ArcSwap::from_pointee(Log {
        lines: Sink::new(
            Target::Stream(Stream::Error),
            form.clone(),
            Some(Arc::clone(&repeats)),
        ),
        output: None,
        form,
        file: None,
        window: Duration::from_secs(60),
        repeats,
    })
});

/// Sends the lines of this process where `options` says.
///
/// Events of [`tracing`] and panics become lines. The first call of a process decides about the level.
pub fn start(options: Options) -> io::Result<()> {
    if options.unblock {
        output::unblock();
    }
    let level = options.level;
    LOG.store(Arc::new(Log::new(
        options.form,
        options.file,
        options.window,
    )?));
    subscriber::install(level);
    std::panic::set_hook(Box::new(panicked));
    Ok(())
}

/// In a process that was forked: threads have stayed behind, and with them whatever they held.
pub fn forked() -> io::Result<()> {
    let old = LOG.load_full();
    LOG.store(Arc::new(Log::new(
        old.form.clone(),
        old.file.clone(),
        old.window,
    )?));
    // Its locks may be held by threads that do not exist here: it must never be dropped.
    std::mem::forget(old);
    Ok(())
}

/// Writes one line, which ends without a line feed.
pub fn line(text: &str) {
    LOG.load().lines.push_line(text);
}

/// Writes text as it is, for people: what a program prints.
pub fn text(stream: Stream, text: &str) {
    LOG.load().sink(stream).push(text.as_bytes().to_vec());
}

/// Whether this line is to be written: the first of a kind are, the others are summed up at the end of the window.
pub fn first_of(kind: Kind) -> bool {
    let log = LOG.load();
    let (write, sums) = log.repeats.look(kind, Instant::now());
    for sum in sums {
        log.lines.push_line(&sum.line(log.window).render(&log.form));
    }
    if !write {
        log.lines.nudge();
    }
    write
}

/// Waits until everything is written, but not longer than `limit`; false when something is not.
///
/// Sums of repetitions are told first. A reader who has not taken anything for that long already is not waited for.
pub fn flush(limit: Duration) -> bool {
    let log = LOG.load_full();
    for sum in log.repeats.end() {
        log.lines.push_line(&sum.line(log.window).render(&log.form));
    }
    let until = Instant::now() + limit;
    let lines = log.lines.flush(until, limit);
    log.output
        .as_ref()
        .is_none_or(|out| out.flush(until, limit))
        && lines
}

/// How many lines of this process were lost, and how many bytes wait to be read.
pub fn lost() -> (u64, usize) {
    let log = LOG.load();
    let (lost, waiting) = log.output.as_ref().map_or((0, 0), Sink::counts);
    let (lines, bytes) = log.lines.counts();
    (lost + lines, waiting + bytes)
}

fn event(
    form: &Form,
    level: Level,
    component: &str,
    event: &str,
    fields: &[(&str, Arguments<'_>)],
) -> String {
    let mut line = Line::new(level, component, event);
    for (name, value) in fields {
        line.put(name, value.to_string());
    }
    line.render(form)
}

/// A panic as a line. Its message only when it is a literal: a formatted one may hold what somebody sent.
fn panicked(info: &std::panic::PanicHookInfo<'_>) {
    let message = info
        .payload()
        .downcast_ref::<&'static str>()
        .copied()
        .unwrap_or("not shown: it may hold data");
    let place = info
        .location()
        .map_or_else(|| "unknown".to_owned(), ToString::to_string);
    let fields = [
        ("place", format_args!("{place}")),
        ("message", format_args!("{message}")),
    ];
    let log = LOG.load();
    log.lines
        .push_line(&event(&log.form, Level::Error, "core", "a panic", &fields));
}
