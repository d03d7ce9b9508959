//! Tells when generations of a workload come, go, or are found good, whichever process does it.
//!
//! The kernel tells (inotify), on a thread that sleeps in a read: nobody asks again and again. A notice says that
//! something may have changed; what has, [`Store::generations`] tells.

use std::{collections::HashMap, io, mem::MaybeUninit, os::fd::OwnedFd, path::Path};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::sync::watch;

use super::Store;

impl Store {
    /// Notices of these workloads, from now on, as long as any of the receivers lives and a while longer.
    pub fn notices(&self, workloads: &[String]) -> io::Result<HashMap<String, watch::Receiver<u64>>> {
        let kernel = inotify::init(CreateFlags::CLOEXEC)?;
        let root = self.generations_dir();
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let all = inotify::add_watch(&kernel, &root, flags)?;
        let senders: HashMap<_, _> =
            workloads.iter().map(|name| (name.clone(), watch::Sender::new(0))).collect();
        let receivers = senders.iter().map(|(name, sender)| (name.clone(), sender.subscribe())).collect();
        let mut watcher = Watcher { kernel, all, flags, senders, known: HashMap::new() };
        watcher.look(&root);
        let thread = std::thread::Builder::new().name("ftd-notices".into());
        thread.spawn(move || {
            if let Err(error) = watcher.run(&root) {
                tracing::error!(%error, "new generations are not noticed any more");
            }
        })?;
        Ok(receivers)
    }
}

struct Watcher {
    kernel: OwnedFd,
    /// The directory of all workloads.
    all: i32,
    flags: WatchFlags,
    senders: HashMap<String, watch::Sender<u64>>,
    known: HashMap<i32, String>,
}

impl Watcher {
    /// Watches the directories of the workloads that there are.
    fn look(&mut self, root: &Path) {
        for name in self.senders.keys() {
            if let Ok(number) = inotify::add_watch(&self.kernel, root.join(name), self.flags) {
                self.known.insert(number, name.clone());
            }
        }
    }

    fn run(&mut self, root: &Path) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        loop {
            let mut told = Vec::new();
            {
                let mut reader = inotify::Reader::new(&self.kernel, &mut buffer);
                // All that the reader holds: the rest would be lost with it.
                while told.is_empty() || !reader.is_buffer_empty() {
                    match reader.next() {
                        Err(rustix::io::Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                        Ok(event) => told.push((event.wd(), event.events())),
                    }
                }
            }
            for (number, events) in told {
                if number == self.all || events.contains(ReadFlags::QUEUE_OVERFLOW) {
                    // A directory that came may have something in it already.
                    self.look(root);
                    self.senders.values().for_each(|sender| sender.send_modify(|count| *count += 1));
                } else if let Some(sender) = self.known.get(&number).and_then(|name| self.senders.get(name)) {
                    sender.send_modify(|count| *count += 1);
                }
            }
            if self.senders.values().all(|sender| sender.receiver_count() == 0) {
                return Ok(());
            }
        }
    }
}
