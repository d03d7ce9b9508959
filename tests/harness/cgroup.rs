//! The control groups of test hosts.
//!
//! Every host has a group `ftd-lab/LAB/HOST` in the unified hierarchy (version 2), which is the root of
//! its own cgroup namespace: there systemd builds its tree, and there a host is frozen and killed as a
//! whole. Where the memory controller is still on version 1, the host gets a group of the same name in
//! that hierarchy too, with a limit, and sees it at `/run/cgroup-v1/memory`.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::mounts;

/// The group that holds all labs, in each hierarchy.
const TOP: &str = "ftd-lab";

/// Where this machine has its hierarchies.
#[derive(Debug, Clone)]
pub struct Hierarchies {
    /// The unified one.
    pub unified: PathBuf,
    /// The memory controller's, where it is on version 1.
    pub memory: Option<PathBuf>,
}

impl Hierarchies {
    /// Looks for them in the mount table.
    pub fn find() -> Result<Self> {
        let mounts = mounts::list()?;
        let unified = mounts.iter().find(|mount| mount.kind == "cgroup2").context(
            "cgroup version 2 is not mounted. Mend: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        )?;
        let on_v1 = |mount: &&mounts::Mount| {
            mount.kind == "cgroup" && mount.options.split(',').any(|o| o == "memory")
        };
        Ok(Self {
            unified: unified.point.clone(),
            memory: mounts.iter().find(on_v1).map(|mount| mount.point.clone()),
        })
    }

    /// The groups of a lab, whether or not they exist: unified first.
    pub fn of_lab(&self, lab: &str) -> Vec<Group> {
        std::iter::once(&self.unified)
            .chain(&self.memory)
            .map(|root| Group { path: root.join(TOP).join(lab) })
            .collect()
    }

    /// Removes the group above all labs once it is empty.
    pub fn tidy(&self) {
        for root in std::iter::once(&self.unified).chain(&self.memory) {
            // Another lab may be in it: then it stays.
            let _ = fs::remove_dir(root.join(TOP));
        }
    }
}

/// One group.
#[derive(Debug, Clone)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// The group in a directory.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A group below this one, whether or not it exists.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { path: self.path.join(name) }
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Makes it and those above it, and hands the controllers that there are down to it.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.path)
            .with_context(|| format!("the cgroup {} cannot be made (as root?)", self.path.display()))?;
        let mut above: Vec<_> = self.path.ancestors().skip(1).take(3).collect();
        above.reverse();
        for dir in above {
            for controller in ["cpu", "io", "memory", "pids"] {
                // Not on version 1, nor where this controller is bound to version 1: the host goes without.
                let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
        Ok(())
    }

    /// Writes one of its files.
    pub fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("'{value}' cannot be written to {}", path.display()))
    }

    /// Moves the calling process into it.
    pub fn enter(&self) -> Result<()> {
        self.write("cgroup.procs", "0")
    }

    /// Kills everything in it and below, and returns when it is gone.
    ///
    /// Only in the unified hierarchy; on kernels older than 5.14, which lack `cgroup.kill`, one by one.
    pub fn kill(&self, limit: Duration) -> Result<()> {
        if !self.exists() {
            return Ok(());
        }
        if self.path.join("cgroup.kill").exists() {
            self.write("cgroup.kill", "1")?;
        } else {
            for pid in self.processes() {
                // It may have ended by itself.
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
        self.wait_event("populated", false, limit)
    }

    /// Freezes or thaws everything in it and below; returns when the kernel says that it is so.
    pub fn freeze(&self, frozen: bool, limit: Duration) -> Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        self.wait_event("frozen", frozen, limit)
    }

    /// Whether everything in it and below is frozen.
    pub fn is_frozen(&self) -> bool {
        let events = fs::read_to_string(self.path.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "frozen 1")
    }

    /// Waits until `cgroup.events` has this value; the kernel wakes those who poll the file when it changes.
    fn wait_event(&self, name: &str, value: bool, limit: Duration) -> Result<()> {
        let path = self.path.join("cgroup.events");
        let mut file = File::open(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        let wanted = format!("{name} {}", u8::from(value));
        let end = Instant::now() + limit;
        loop {
            let mut text = String::new();
            file.rewind()?;
            file.read_to_string(&mut text)?;
            if text.lines().any(|line| line == wanted) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{} did not become '{wanted}' within {limit:?}", path.display());
            }
            let timeout = PollTimeout::try_from(left.min(Duration::from_secs(1))).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => {
                    return Err(errno).with_context(|| format!("{} cannot be polled", path.display()));
                }
            }
        }
    }

    /// PIDs in it and below, as this process sees them.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        self.walk(&mut |dir| {
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        });
        pids
    }

    /// Removes it and all below, if it is there.
    ///
    /// A group stays busy for a moment after its last process is reaped, and the kernel tells nobody when
    /// that ends: so this tries again every 5 ms.
    pub fn remove(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let mut trouble = None;
            self.walk(&mut |dir| match fs::remove_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => trouble = Some(error),
                _ => {}
            });
            match trouble {
                None => return Ok(()),
                Some(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Some(error) => {
                    return Err(error).with_context(|| {
                        format!(
                            "the cgroup {} cannot be removed (processes in it: {:?})",
                            self.path.display(),
                            self.processes()
                        )
                    });
                }
            }
        }
    }

    /// Visits it and all below, the deepest first.
    fn walk(&self, visit: &mut dyn FnMut(&Path)) {
        fn down(dir: &Path, visit: &mut dyn FnMut(&Path)) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    down(&entry.path(), visit);
                }
            }
            visit(dir);
        }
        if self.exists() {
            down(&self.path, visit);
        }
    }
}
