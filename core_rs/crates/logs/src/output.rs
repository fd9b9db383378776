//! Standard output and standard error that nobody can block.
//!
//! Everything in a process writes there: libraries in C++, the interpreter's last words, commands that it starts. So the
//! descriptors themselves must not block. `O_NONBLOCK` belongs to the open file description, which the shell and whoever
//! else writes to the same terminal or pipe share: a pipe or a terminal is opened once more, for us alone. Where that is
//! not allowed (a pipe that another account has made), a pipe of our own takes its place, and a thread empties it.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::{event, fs, net, pipe, stdio, termios};

/// A write to a socket that nobody reads fails after this time. It concerns whoever writes past the queue.
const SOCKET_WAIT: Duration = Duration::from_millis(100);

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

/// What the descriptors were before a pipe of ours took their place.
static ORIGINALS: [OnceLock<OwnedFd>; 2] = [OnceLock::new(), OnceLock::new()];

impl Stream {
    fn number(self) -> BorrowedFd<'static> {
        match self {
            Self::Output => stdio::stdout(),
            Self::Error => stdio::stderr(),
        }
    }

    fn original(self) -> &'static OnceLock<OwnedFd> {
        &ORIGINALS[usize::from(self == Self::Error)]
    }

    /// Where the queue's thread writes.
    fn descriptor(self) -> BorrowedFd<'static> {
        self.original()
            .get()
            .map_or_else(|| self.number(), |fd| fd.as_fd())
    }

    fn replace(self, with: &OwnedFd) -> io::Result<()> {
        match self {
            Self::Output => stdio::dup2_stdout(with)?,
            Self::Error => stdio::dup2_stderr(with)?,
        }
        Ok(())
    }

    /// Writes everything, however long it takes: for the queue's thread only.
    pub(crate) fn write(self, mut data: &[u8]) -> io::Result<()> {
        let descriptor = self.descriptor();
        while !data.is_empty() {
            match rustix::io::write(descriptor, data) {
                Ok(written) => data = &data[written..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => wait(descriptor)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn wait(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let mut watched = [event::PollFd::new(&descriptor, event::PollFlags::OUT)];
    match event::poll(&mut watched, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether both lead to the same place.
pub(crate) fn same() -> bool {
    let place = |stream: Stream| {
        let stat = fs::fstat(stream.descriptor()).ok()?;
        Some((stat.st_dev, stat.st_ino, stat.st_rdev))
    };
    place(Stream::Output).is_some_and(|found| place(Stream::Error) == Some(found))
}

/// From now on no write to either of them waits. What cannot be changed (a closed descriptor) stays as it is.
pub(crate) fn unblock() {
    for stream in [Stream::Output, Stream::Error] {
        let _ = unblock_one(stream);
    }
}

fn unblock_one(stream: Stream) -> io::Result<()> {
    let descriptor = stream.number();
    // It is ours already: of the process that has started us, for example.
    if fs::fcntl_getfl(descriptor)?.contains(OFlags::NONBLOCK) {
        return Ok(());
    }
    let changed = match FileType::from_raw_mode(fs::fstat(descriptor)?.st_mode) {
        FileType::Fifo => open_again(stream),
        FileType::CharacterDevice if termios::isatty(descriptor) => open_again(stream),
        FileType::Socket => net::sockopt::set_socket_timeout(
            descriptor,
            net::sockopt::Timeout::Send,
            Some(SOCKET_WAIT),
        )
        .map_err(io::Error::from),
        _ => Ok(()),
    };
    changed.or_else(|_| stand_in(stream))
}

fn open_again(stream: Stream) -> io::Result<()> {
    let path = match stream {
        Stream::Output => "/proc/self/fd/1",
        Stream::Error => "/proc/self/fd/2",
    };
    // NOCTTY: a service in a session of its own would get the terminal as its controlling one.
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    stream.replace(&fs::open(path, flags, Mode::empty())?)
}

/// A pipe in the place of the descriptor, emptied into the queue by a thread of its own.
fn stand_in(stream: Stream) -> io::Result<()> {
    let (reader, writer) = pipe::pipe_with(pipe::PipeFlags::CLOEXEC)?;
    let original = rustix::io::fcntl_dupfd_cloexec(stream.number(), 3)?;
    let _ = stream.original().set(original);
    std::thread::Builder::new()
        .name(format!("log-{stream:?}"))
        .spawn(move || empty(stream, reader))?;
    stream.replace(&writer)
}

fn empty(stream: Stream, reader: OwnedFd) {
    let mut reader = std::fs::File::from(reader);
    let mut chunk = vec![0; 4096];
    while let Ok(read @ 1..) = reader.read(&mut chunk) {
        crate::LOG.load().sink(stream).push(chunk[..read].to_vec());
    }
}
