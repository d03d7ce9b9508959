//! What can go wrong with a store: the thing, the cause, and what to do.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why the store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused.
    #[error("cannot {deed} {}: {source}; {}", path.display(), mend(source))]
    Io {
        /// What was being tried.
        deed: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Written by an ftd that is newer than this one.
    #[error(
        "{} is of format {found}, and this ftd knows formats up to {known}: install the ftd that wrote it (or a \
         newer one), or set snapshots to another directory",
        path.display()
    )]
    Newer {
        /// The store's directory, or the file in it.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known here.
        known: u32,
    },
    /// Somebody else writes: another snapshot, an import, or gc, perhaps of another process.
    #[error("the snapshot store {} is being written by somebody else: wait for the end of that snapshot, import or gc", path.display())]
    Busy {
        /// The store's directory.
        path: PathBuf,
    },
    /// A file of the store is not what was written.
    #[error("{} is damaged ({cause}): use another generation; ftctl snapshot verify names all that is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How that shows.
        cause: String,
    },
    /// A part of a generation cannot be read back.
    #[error(
        "generation {number} of {workload} cannot be read: {entry:?} is damaged at byte {offset} ({cause}): use \
         another generation; ftctl snapshot verify names all that is damaged"
    )]
    Chunk {
        /// Whose generation.
        workload: String,
        /// Which one.
        number: u64,
        /// The entry's name.
        entry: String,
        /// Where in the entry's content the damaged chunk begins.
        offset: u64,
        /// How that shows.
        cause: String,
    },
    /// There is no such generation.
    #[error(
        "{workload} has no generation {number}: ftctl snapshot list {workload} shows those that there are"
    )]
    NoGeneration {
        /// Of this workload.
        workload: String,
        /// The number asked for.
        number: u64,
    },
    /// There is no such entry.
    #[error(
        "generation {number} of {workload} has no entry {entry:?}: ftctl snapshot show lists its entries"
    )]
    NoEntry {
        /// Of this workload.
        workload: String,
        /// In this generation.
        number: u64,
        /// The name asked for.
        entry: String,
    },
    /// An entry of this name is in the draft already.
    #[error("entry {entry:?} is given twice in a snapshot of {workload}: give each entry a name of its own")]
    Twice {
        /// Whose snapshot.
        workload: String,
        /// The name.
        entry: String,
    },
    /// More than the store may take.
    #[error(
        "the snapshot store {} may take {quota} bytes, has {used}, and needs {needed} more: raise snapshot.quota, \
         keep fewer generations, or free what is no longer used by: ftctl snapshot gc",
        path.display()
    )]
    Quota {
        /// The store's directory.
        path: PathBuf,
        /// Its bound in bytes.
        quota: u64,
        /// What it has.
        used: u64,
        /// What was to be written next.
        needed: u64,
    },
    /// Not a name that a workload can have.
    #[error("{name:?} cannot be the name of a workload: {cause}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        cause: &'static str,
    },
    /// A setting that the store cannot work with.
    #[error("{setting} = {value} cannot be: set it to {allowed}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// What was to be stored, or to be exported to, failed.
    #[error("{what}: {source}")]
    Source {
        /// The entry or stream.
        what: String,
        /// The system's word.
        source: io::Error,
    },
    /// The stream of an import is cut short, damaged, or something else.
    #[error("the import was refused, and nothing of it is kept: {cause}; export and send it once more")]
    Stream {
        /// What is wrong with it.
        cause: String,
    },
}

/// What the store's functions answer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Gives an I/O error its thing and deed.
    pub(super) fn io(deed: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { deed, path: path.to_owned(), source }
    }

    pub(super) fn damaged(path: &Path, cause: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), cause: cause.into() }
    }

    pub(super) fn stream(cause: impl Into<String>) -> Self {
        Self::Stream { cause: cause.into() }
    }

    /// The file is not there (any more).
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn mend(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room on its file system, or keep fewer generations; what was stored before is untouched"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "let ftd write there (ReadWritePaths= in a drop-in of ftd.service; mount options)"
        }
        io::ErrorKind::NotFound => "somebody else has removed it",
        _ => "check the disk; see: journalctl -k",
    }
}
