//! A bounded queue of lines and the thread that writes them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::line::{Form, Line};
use crate::repeats::{Level, Repeats};
use crate::target::Target;

/// What waits to be read at most (bytes): some 7,000 lines.
const MOST_BYTES: usize = 2 << 20;
/// Written at once at most (bytes), but for a longer line: what a pipe takes whole, so that lines of several processes
/// do not mix (`PIPE_BUF`).
const AT_ONCE: usize = 4096;
/// Lines come in bursts: the thread that was woken waits for more of them (a wake-up costs more than a line).
const GATHER: Duration = Duration::from_millis(2);

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    /// Of `lines`, and of what is being written.
    bytes: usize,
    /// Lines that did not fit and were not told of yet.
    untold: u64,
    /// All of them.
    lost: u64,
    running: bool,
    /// The thread waits for a line.
    idle: bool,
    /// A write that has not returned yet.
    writing_since: Option<Instant>,
}

struct Shared {
    form: Form,
    repeats: Option<Arc<Repeats>>,
    state: Mutex<State>,
    filled: Condvar,
    emptied: Condvar,
}

/// Takes lines from everybody, without ever waiting for who reads them.
pub(crate) struct Sink {
    shared: Arc<Shared>,
    /// Until the thread runs, which begins with the first line: a process that forks first has none.
    target: Mutex<Option<Target>>,
}

impl Sink {
    /// `repeats`: told of in this queue.
    pub(crate) fn new(target: Target, form: Form, repeats: Option<Arc<Repeats>>) -> Self {
        let shared = Arc::new(Shared {
            form,
            repeats,
            state: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
        });
        Self {
            shared,
            target: Mutex::new(Some(target)),
        }
    }

    pub(crate) fn push_line(&self, text: &str) {
        let mut line = Vec::with_capacity(text.len() + 1);
        line.extend_from_slice(text.as_bytes());
        line.push(b'\n');
        self.push(line);
    }

    pub(crate) fn push(&self, line: Vec<u8>) {
        let mut state = self.shared.state.lock();
        if state.bytes + line.len() > MOST_BYTES {
            state.untold += 1;
            state.lost += 1;
            return;
        }
        if state.untold > 0 {
            self.shared.tell_lost(&mut state);
        }
        state.bytes += line.len();
        state.lines.push_back(line);
        if !state.running {
            state.running = self.run();
        }
        if state.idle {
            state.idle = false;
            drop(state);
            self.shared.filled.notify_one();
        }
    }

    /// Something is to be told of at a certain time.
    pub(crate) fn nudge(&self) {
        let mut state = self.shared.state.lock();
        if state.idle {
            state.idle = false;
            drop(state);
            self.shared.filled.notify_one();
        }
    }

    /// Waits until everything is written or `until` has come. A write that lasts for `patience` already is a lost cause.
    pub(crate) fn flush(&self, until: Instant, patience: Duration) -> bool {
        let mut state = self.shared.state.lock();
        while state.bytes > 0 {
            let stuck = state
                .writing_since
                .is_some_and(|since| since.elapsed() >= patience);
            if stuck
                || !state.running
                || self
                    .shared
                    .emptied
                    .wait_until(&mut state, until)
                    .timed_out()
            {
                return state.bytes == 0;
            }
        }
        true
    }

    /// Lines that were lost, bytes that wait.
    pub(crate) fn counts(&self) -> (u64, usize) {
        let state = self.shared.state.lock();
        (state.lost, state.bytes)
    }

    /// Starts the thread; false when there can be none, and the next line tries again.
    fn run(&self) -> bool {
        let Some(mut target) = self.target.lock().take() else {
            return true;
        };
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || shared.write_lines(&mut target))
            .is_ok()
    }
}

impl Shared {
    fn tell_lost(&self, state: &mut State) {
        let mut line = Line::new(
            Level::Warning,
            "log",
            "log lines were lost: nobody read them in time",
        );
        line.put("lines", state.untold);
        let mut line = line.render(&self.form).into_bytes();
        line.push(b'\n');
        state.untold = 0;
        state.bytes += line.len();
        state.lines.push_back(line);
    }

    fn write_lines(&self, target: &mut Target) {
        loop {
            let batch = self.next();
            let written = target.write(&batch).is_ok();
            let mut state = self.state.lock();
            state.writing_since = None;
            state.bytes -= batch.len();
            if !written {
                // A closed pipe, a lost terminal, a full disk: nobody could be told.
                state.lost += batch.split_inclusive(|byte| *byte == b'\n').count() as u64;
            }
            if state.bytes == 0 {
                if state.untold > 0 && written {
                    self.tell_lost(&mut state);
                } else {
                    self.emptied.notify_all();
                }
            }
        }
    }

    /// Waits for lines; as many as are written at once.
    fn next(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        if state.lines.is_empty() {
            self.wait(&mut state);
            parking_lot::MutexGuard::unlocked(&mut state, || std::thread::sleep(GATHER));
        }
        let mut batch = state.lines.pop_front().unwrap_or_default();
        while let Some(line) = state.lines.front() {
            if batch.len() + line.len() > AT_ONCE {
                break;
            }
            batch.extend_from_slice(line);
            state.lines.pop_front();
        }
        state.writing_since = Some(Instant::now());
        batch
    }

    fn wait(&self, state: &mut parking_lot::MutexGuard<'_, State>) {
        while state.lines.is_empty() {
            let mut next = None;
            if let Some(repeats) = &self.repeats {
                let (sums, due) = repeats.due(Instant::now());
                next = due;
                for sum in sums {
                    let mut line = sum.line(repeats.window()).render(&self.form).into_bytes();
                    line.push(b'\n');
                    state.bytes += line.len();
                    state.lines.push_back(line);
                }
                if !state.lines.is_empty() {
                    return;
                }
            }
            state.idle = true;
            match next {
                Some(at) => drop(self.filled.wait_until(state, at)),
                None => self.filled.wait(state),
            }
            state.idle = false;
        }
    }
}
