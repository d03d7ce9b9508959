//! The thread that takes records out of the ring buffer and hands events to the sink.
//!
//! The sink is called on this thread, without a queue in between: what heals a unit is decided
//! within microseconds of the death. A slow sink delays later events, and fills the ring buffer in
//! the end; that is counted by the kernel side.
#![allow(unsafe_code, reason = "sched_setscheduler has no safe wrapper in nix")]

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use aya::maps::{MapData, RingBuf};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::{ProbeEvent, Realtime, decode::Decoder};

/// What the reader has done so far.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Events given to the sink.
    pub(super) delivered: AtomicU64,
    /// Second reports of one end, which the sink did not get.
    pub(super) duplicates: AtomicU64,
    /// Records that could not be read.
    pub(super) malformed: AtomicU64,
}

/// The running thread; dropping it ends the thread, after the event that is in the sink's hands.
#[derive(Debug)]
pub(super) struct Reader {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    pub(super) progress: Arc<Progress>,
    pub(super) realtime: Realtime,
}

impl Reader {
    pub(super) fn start(
        ring: RingBuf<MapData>,
        priority: Option<u8>,
        page_size: u64,
        sink: impl FnMut(ProbeEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let progress = Arc::new(Progress::default());
        let (say, said) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("ftd-probe".into()).spawn({
            let (stop, progress) = (Arc::clone(&stop), Arc::clone(&progress));
            move || {
                // the receiver waits for exactly this
                let _ = say.send(priority.map_or(Realtime::Off, set_realtime));
                read(ring, &stop, &progress, page_size, sink);
            }
        })?;
        let realtime = said.recv().unwrap_or(Realtime::Off);
        Ok(Self { stop, thread: Some(thread), progress, realtime })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // The sink may own what owns this reader, and let it go from inside.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!("the probe's reader thread ended by a panic");
            }
        }
    }
}

fn read(
    mut ring: RingBuf<MapData>,
    stop: &EventFd,
    progress: &Progress,
    page_size: u64,
    mut sink: impl FnMut(ProbeEvent),
) {
    let mut decoder = Decoder::new(page_size);
    loop {
        while let Some(record) = ring.next() {
            let event = decoder.decode(&record);
            // gives the room back before the sink may take its time
            drop(record);
            match event {
                Ok(Some(event)) => {
                    sink(event);
                    progress.delivered.fetch_add(1, Ordering::Release);
                }
                Ok(None) => _ = progress.duplicates.fetch_add(1, Ordering::Release),
                Err(_) => _ = progress.malformed.fetch_add(1, Ordering::Release),
            }
            if stopped(stop) {
                return;
            }
        }
        let mut fds =
            [PollFd::new(ring.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "the probe's reader cannot wait for events and ends");
                return;
            }
        }
        if stopped(stop) {
            return;
        }
    }
}

/// The counter stays as it is only when nobody has written.
fn stopped(stop: &EventFd) -> bool {
    stop.read().is_ok()
}

/// Gives the calling thread real-time priority, without passing it on to children.
fn set_realtime(priority: u8) -> Realtime {
    let param = libc::sched_param { sched_priority: i32::from(priority) };
    // SAFETY: the structure is whole; 0 is the calling thread.
    let done = unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const param)
    };
    if done == 0 {
        return Realtime::Granted(priority);
    }
    let cause = match Errno::last() {
        Errno::EPERM => {
            "no CAP_SYS_NICE, or the cgroup has no real-time budget (cpu.rt_runtime_us)".to_owned()
        }
        Errno::EINVAL => format!("{priority} is not a priority from 1 to 99"),
        other => other.desc().to_owned(),
    };
    Realtime::Refused(cause)
}
