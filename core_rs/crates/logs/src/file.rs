//! A log file that several processes append to, and that any of them may set aside when it is full or old.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::OFlags;

use crate::line::now;

/// When a file is set aside, and how many are kept.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// Largest size (bytes).
    pub max_bytes: u64,
    /// Greatest age; zero: any.
    pub max_age: Duration,
    /// Files kept beside the one that is written; zero: none.
    pub keep: usize,
}

/// The file as this process has it open.
///
/// Whoever writes holds a shared lock, whoever sets the file aside an exclusive one: nothing is written to a file that
/// is being compressed. Whether the path still names the open file is looked up before each write, so that any other
/// process, logrotate included, may move it away.
pub(crate) struct File {
    path: PathBuf,
    rotation: Rotation,
    open: fs::File,
}

impl File {
    pub(crate) fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            rotation,
            open: create(path)?,
        })
    }

    pub(crate) fn write(&mut self, data: &[u8]) -> io::Result<()> {
        loop {
            self.open.lock_shared()?;
            let Some(found) = self.current()? else {
                self.open = create(&self.path)?;
                continue;
            };
            if self.is_done(&found, data.len() as u64) {
                self.open.unlock()?;
                if self.set_aside()? {
                    continue;
                }
                self.open.lock_shared()?;
            }
            let written = self.open.write_all(data);
            self.open.unlock()?;
            return written;
        }
    }

    /// What the path names, when that is the open file.
    fn current(&self) -> io::Result<Option<fs::Metadata>> {
        let ours = self.open.metadata()?;
        match fs::metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == (ours.dev(), ours.ino()) => Ok(Some(found)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn is_done(&self, found: &fs::Metadata, more: u64) -> bool {
        let old = || {
            let born = found.created().ok();
            born.and_then(|born| born.elapsed().ok())
                .is_some_and(|age| age >= self.rotation.max_age)
        };
        found.len() > 0
            && (found.len() + more > self.rotation.max_bytes
                || (!self.rotation.max_age.is_zero() && old()))
    }

    /// Gives the file another name and opens a new one; false when another process is at it, or still writes.
    fn set_aside(&mut self) -> io::Result<bool> {
        if self.open.try_lock().is_err() {
            return Ok(false);
        }
        if self.current()?.is_some() {
            let name = format!("{}.{}", self.path.display(), now().replace(':', "-"));
            fs::rename(&self.path, name)?;
        }
        self.open = create(&self.path)?;
        let (path, keep) = (self.path.clone(), self.rotation.keep);
        // Compressing takes seconds; a failure leaves the file as it is, and the next turn tries again.
        let _ = std::thread::Builder::new()
            .name("log-gzip".to_owned())
            .spawn(move || {
                let _ = tidy(&path, keep);
            });
        Ok(true)
    }
}

fn create(path: &Path) -> io::Result<fs::File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// Compresses what was set aside, and removes the oldest beyond `keep`.
fn tidy(path: &Path, keep: usize) -> io::Result<()> {
    let mut aside = set_aside_before(path)?;
    for file in &aside {
        if file.extension().is_none_or(|end| end != "gz") {
            compress(file)?;
        }
    }
    aside = set_aside_before(path)?;
    let spare = aside.len().saturating_sub(keep);
    for file in aside.iter().take(spare) {
        fs::remove_file(file)?;
    }
    Ok(())
}

/// Files that were set aside, the oldest first: their names hold the time.
fn set_aside_before(path: &Path) -> io::Result<Vec<PathBuf>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut found = Vec::new();
    for entry in fs::read_dir(folder.unwrap_or_else(|| Path::new(".")))? {
        let entry = entry?;
        let file = entry.file_name();
        let file = file.to_string_lossy();
        let rest = file
            .strip_prefix(&*name)
            .and_then(|rest| rest.strip_prefix('.'));
        if rest.is_some_and(|rest| rest.starts_with("20") && rest.strip_suffix(".part").is_none()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn compress(file: &Path) -> io::Result<()> {
    let mut plain = fs::File::open(file)?;
    if plain.try_lock().is_err() {
        return Ok(()); // another process is at it
    }
    let part = PathBuf::from(format!("{}.gz.part", file.display()));
    let target = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)?;
    let mut encoder = GzEncoder::new(target, Compression::default());
    io::copy(&mut plain, &mut encoder)?;
    encoder.finish()?.sync_all()?;
    fs::rename(&part, format!("{}.gz", file.display()))?;
    fs::remove_file(file)
}
