//! Knows when an inotify descriptor has something to tell.
#![allow(unsafe_code, reason = "tokio trusts that a descriptor it is given stays open and the same")]

use std::{io, os::fd::OwnedFd, sync::Arc};

use tokio::io::unix::AsyncFd;

/// Registers the descriptor with the runtime that this is called in.
pub(super) fn events(inotify: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the descriptor is open, as every OwnedFd; the AsyncFd holds a share in it, behind which nobody can
    // exchange it, and it is closed only after the last share is gone.
    unsafe { AsyncFd::register(inotify) }.map_err(io::Error::from)
}
