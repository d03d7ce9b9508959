//! File system -> what may have changed, as it happens.
//!
//! inotify by itself watches inodes, and what people mean are names. Hence only directories are watched, and of each
//! only the names that matter: those that lead to what is selected, from the root on, and those that are selected or
//! may be. So it does not matter whether an editor writes into a file or puts a new one over it, whether a
//! file is there already, whether a directory on the way is removed and made again, or a symlink
//! on the way is turned elsewhere. Whenever a name on the way changes, or a directory comes or goes, the
//! selection is walked anew ([`survey`]): directories are watched before they are looked into, so that nothing falls between.
//!
//! Called directly, and not through a crate such as notify: that one watches by path, follows
//! links, and hides that a watch was lost; the walk here needs to watch the very directory it holds. fanotify
//! would need `CAP_SYS_ADMIN`, and tells of whole file systems.
//!
//! What is told is that something *may* have changed; what has, [`super::compare`] finds out. When the kernel's queue
//! overflows, or not all can be watched, then everything may have. Not seen: a file system mounted over
//! a directory, writes through a shared mapping, changes on the server of a network file system.

mod ready;
mod settle;
mod survey;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsStr,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags};
use tokio::{io::unix::AsyncFd, sync::mpsc, task::spawn_blocking, time::sleep_until};

pub use self::settle::{Batch, Timing};
use self::{settle::Settle, survey::Survey};
use super::{Pattern, Selection};

/// Time between attempts to watch what could not be watched.
const RETRY: Duration = Duration::from_secs(5);
/// Of the time at most one part in so many goes into walks, however fast directories come and go.
const SHARE: u32 = 10;
/// Events that are taken at a time before anything else gets its turn.
const ROUND: usize = 4096;

/// Why nothing is watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// No inotify instance to be had.
    #[error("files cannot be watched: {0}. More instances: sysctl fs.inotify.max_user_instances")]
    NoInstance(io::Error),
    /// A directory cannot be watched.
    #[error("not all files can be watched: {0}")]
    Survey(io::Error),
}

/// Watches a selection, from the moment that this returns, until the receiver is dropped. A receiver that is slow
/// finds all that happened meanwhile in one batch.
pub async fn watch(selection: Selection, timing: Timing) -> Result<mpsc::Receiver<Batch>, WatchError> {
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
        .map_err(|error| WatchError::NoInstance(error.into()))?;
    let inotify = Arc::new(inotify);
    let events = ready::events(Arc::clone(&inotify)).map_err(WatchError::NoInstance)?;
    let mut watcher = Watcher {
        inotify,
        selection: Arc::new(selection),
        survey: Survey::default(),
        settle: Settle::new(timing),
        next_survey: None,
        blind: false,
    };
    let (survey, took) = watcher.walk().await;
    // What was there before is no change.
    survey.map_err(WatchError::Survey)?.replace(&mut watcher.survey, &watcher.inotify);
    tracing::debug!(?took, "watching files");
    let (tell, told) = mpsc::channel(1);
    tokio::spawn(watcher.run(events, tell));
    Ok(told)
}

struct Watcher {
    inotify: Arc<OwnedFd>,
    selection: Arc<Selection>,
    survey: Survey,
    settle: Settle,
    /// When to walk anew, if anything calls for it.
    next_survey: Option<Instant>,
    /// The last walk failed.
    blind: bool,
}

impl Watcher {
    async fn run(mut self, events: AsyncFd<Arc<OwnedFd>>, tell: mpsc::Sender<Batch>) {
        let mut rested = Instant::now();
        loop {
            let due = self.settle.deadline();
            let is_due = due.is_some_and(|due| due <= Instant::now());
            tokio::select! {
                () = tell.closed() => return,
                ready = events.readable() => {
                    let Ok(mut ready) = ready else { return };
                    match self.take_events() {
                        Ok(true) => {}
                        Ok(false) => ready.clear_ready(),
                        Err(error) => {
                            tracing::error!(%error, "changes of files cannot be read");
                            self.settle.everything(error.to_string(), Instant::now());
                            ready.clear_ready();
                        }
                    }
                    self.next_survey = self.next_survey.map(|wanted| wanted.max(rested));
                }
                () = sleep_until(self.next_survey.unwrap_or_else(Instant::now).into()), if self.next_survey.is_some() => {
                    let took = self.survey_again().await;
                    rested = Instant::now() + took * SHARE;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() && !is_due => {}
                room = tell.reserve(), if is_due => {
                    let Ok(room) = room else { return };
                    room.send(self.settle.take());
                }
            }
        }
    }

    /// Takes what the kernel has to tell. `true`: there may be more.
    fn take_events(&mut self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&*self.inotify, &mut buffer);
        let now = Instant::now();
        for n in 0.. {
            // Not in the middle of what the reader holds: that would be lost.
            if n >= ROUND && reader.is_buffer_empty() {
                break;
            }
            let event = match reader.next() {
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
                Err(rustix::io::Errno::INTR) => continue,
                event => event?,
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                self.settle.everything("more changes at once than the kernel keeps in mind".into(), now);
                self.next_survey.get_or_insert(now);
                continue;
            }
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
            let meaning = self.survey.meaning(event.wd(), event.events(), name, &self.selection);
            for path in meaning.paths {
                self.settle.path(path, now);
            }
            if meaning.survey {
                self.next_survey.get_or_insert(now);
            }
        }
        Ok(true)
    }

    /// Walks anew; answers how long it took.
    async fn survey_again(&mut self) -> Duration {
        let (survey, took) = self.walk().await;
        let now = Instant::now();
        match survey {
            Ok(survey) => {
                if std::mem::take(&mut self.blind) {
                    self.settle.everything("not all files could be watched for a while".into(), now);
                }
                for path in survey.replace(&mut self.survey, &self.inotify) {
                    self.settle.path(path, now);
                }
                self.next_survey = None;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.blind, true) {
                    tracing::error!(%error, "not all files can be watched");
                    self.settle.everything(format!("not all files can be watched: {error}"), now);
                }
                self.next_survey = Some(now + RETRY);
            }
        }
        took
    }

    async fn walk(&self) -> (io::Result<Survey>, Duration) {
        let (inotify, selection) = (Arc::clone(&self.inotify), Arc::clone(&self.selection));
        let begun = Instant::now();
        let survey = spawn_blocking(move || Survey::new(&inotify, &selection)).await;
        (survey.map_err(io::Error::other).flatten(), begun.elapsed())
    }
}
