//! The files of a workload: taken, compared, put back, watched.
//!
//! ```text
//! Selection   what belongs to a workload: paths, directories, patterns
//!    |
//! capture     file system -> entries, and the contents to whoever keeps them
//! compare     entries, entries -> what differs, in words; diff: for people
//! restore     entries, contents -> file system
//! watch       file system -> "these paths may have changed", at once
//! ```
//!
//! **Whose names these are.** ftd is root, and directories that services own lie among what it reads and writes.
//! Whoever owns a directory can put a symlink where a file was, at any moment: a root that follows it reads
//! /etc/shadow into a snapshot, or writes a web server's page over it. Hence no path is ever handed to the kernel
//! as a whole. Each name is looked up in its directory, which is held open, without following links; all that comes
//! after is done to the very thing that was found ([`pin`]). Links on the way to what was selected (`/lib` ->
//! `usr/lib`) are followed only where nobody but root could have put them.
//!
//! **What makes a file unchanged.** A file is hashed when it is captured, while its content goes to the keeper. With
//! the hash its inode and its change time are remembered: the kernel sets that time, and nobody can set it back, so
//! a file with the same ones need not be read again. A change time so young that a write could fall into the same
//! tick of the clock is not trusted ([`Seen`]). What this cannot see, nor inotify: a page of a file that
//! somebody has mapped writable and goes on writing to; the kernel dates such writes once, until the page is on disk.
//!
//! **What can be put back at once** is one name: rename(2). So each file is, at any moment, the old or the new one,
//! whole; and all new ones lie ready, synced and checked against their hashes, before the first is put in place
//! ([`restore`]).
//!
//! All but [`watch()`] waits for disks: call it where that may be. ftd is sandboxed: what must be opened for it is in docs/security.md.

pub mod capture;
pub mod compare;
pub mod diff;
pub mod entry;
mod pin;
pub mod restore;
pub mod select;
#[cfg(test)]
mod tests;
pub mod watch;

pub use capture::{CaptureError, Captured, capture, look};
pub use compare::{Change, Difference, compare};
pub use entry::{Bytes, Entry, Kind, Seen, Xattr};
pub use restore::{Plan, RestoreError};
pub use select::{Pattern, PatternError, Selection};
pub use watch::{Batch, Timing, watch};

use std::io::{self, Read};

/// Where the contents of captured files are kept.
pub trait Contents {
    /// The content of a captured file. Whoever asks checks it against the entry's hash.
    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Read + '_>>;
}

/// How ftd's files are called while they are not in place yet. Neither captured nor watched.
const TEMPORARY: &str = ".ftd-restore-";
