//! systemd's watchdog, fed for a process that stands still.
//!
//! While a unit is dumped, its processes cannot say that they live; and a unit that is to end stands still until its
//! images are stored. One with `WatchdogSec=` could be killed for it: by a signal that waits for the thaw, or goes
//! along in the images. So whoever holds it still speaks for it, for no longer than that, in its name: the kernel lets
//! those do so who may administrate the system (`CAP_SYS_ADMIN`, see unix(7)). Who may not is not heard, and there
//! the watchdog's limit is the dump's as well.

use std::{
    io::IoSlice,
    os::fd::AsRawFd as _,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, UnixAddr, UnixCredentials, sendmsg},
};

use crate::unit::manager::Service;

/// Where systemd listens for what services tell it.
const NOTIFY: &str = "/run/systemd/notify";

/// Feeds the watchdog until it is dropped.
#[derive(Debug)]
pub(super) struct Fed {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Fed {
    /// For a service that has a watchdog.
    pub(super) fn of(service: &Service) -> Option<Self> {
        // As often as systemd advises services to (sd_watchdog_enabled(3)), and once more.
        Some(Self::start(NOTIFY.into(), service.main_pid, service.watchdog? / 3))
    }

    fn start(place: PathBuf, pid: u32, every: Duration) -> Self {
        let (end, ended) = channel();
        let feed = move || {
            loop {
                if let Err(error) = tell(&place, pid) {
                    tracing::debug!(pid, %error, "the watchdog is not fed");
                    return;
                }
                if ended.recv_timeout(every) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        Self { end: Some(end), thread: Some(thread::spawn(feed)) }
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        drop(self.end.take());
        // It ends at once: it waits for nothing else.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Says to whoever listens at `place` what process `pid` would say.
fn tell(place: &Path, pid: u32) -> nix::Result<()> {
    let unknown = Errno::EIO as i32;
    let socket =
        UnixDatagram::unbound().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(unknown)))?;
    let sender = libc::ucred {
        pid: pid.cast_signed(),
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    };
    let sender = UnixCredentials::from(sender);
    let words = [IoSlice::new(b"WATCHDOG=1")];
    let place = UnixAddr::new(place)?;
    sendmsg(
        socket.as_raw_fd(),
        &words,
        &[ControlMessage::ScmCredentials(&sender)],
        MsgFlags::empty(),
        Some(&place),
    )
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_fed_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        let fed = Fed::start(path, std::process::id(), Duration::from_millis(5));
        let mut bytes = [0; 20];
        for _ in 0..3 {
            let length = listener.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], b"WATCHDOG=1");
        }
        drop(fed);
        listener.set_nonblocking(true).unwrap();
        // What was said before the end is still there; then there is nothing more.
        while listener.recv(&mut bytes).is_ok() {}
        thread::sleep(Duration::from_millis(50));
        assert!(listener.recv(&mut bytes).is_err());
    }

    #[test]
    fn nobody_who_listens_is_no_error() {
        drop(Fed::start("/nonexistent/notify".into(), 1, Duration::from_mins(1)));
        assert!(Fed::of(&Service::default()).is_none());
    }
}
