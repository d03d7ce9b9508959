//! Where deaths are learned from: BPF programs, or pidfds where these cannot be had, or systemd alone.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{PidfdError, PidfdWatch, Probe, ProbeEvent, ProbeOptions, Realtime, Slot};
use crate::{control::ProbeStatus, event::Kind, unit::UnitView};

/// The name of [`Drops::ring_full`](super::Drops::ring_full) in [`ProbeStatus::drops`].
pub const RING_FULL: &str = "ring buffer full";
/// The name of [`Drops::cgroups_full`](super::Drops::cgroups_full).
pub const FILTER_FULL: &str = "filter full";
/// The name of [`Drops::malformed`](super::Drops::malformed).
pub const UNREADABLE: &str = "unreadable";

/// The source in use, and why it is not the better one.
#[derive(Debug)]
pub struct Source {
    way: Way,
    cause: Option<String>,
    followed: Mutex<BTreeMap<Slot, Followed>>,
    /// How many cgroups had not fitted into the filter when it was last refreshed with success.
    mended: AtomicU64,
}

#[derive(Debug)]
enum Way {
    Ebpf(Box<Probe>),
    Pidfd(PidfdWatch),
    None,
}

/// What is followed for a unit, so that only changes are told to the kernel.
#[derive(Debug)]
struct Followed {
    unit: String,
    what: What,
    /// Why it is not followed; then it is tried again.
    error: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum What {
    Cgroup(String),
    Process(u32),
}

impl Source {
    /// Starts the best source that can be had; `sink` gets the events. `None` for the options means that
    /// eBPF is switched off.
    pub fn start(
        options: Option<&ProbeOptions>,
        sink: impl FnMut(ProbeEvent) + Send + Clone + 'static,
    ) -> Self {
        let source = |way, cause| Self { way, cause, followed: Mutex::default(), mended: AtomicU64::new(0) };
        let cause = match options.map(|options| Probe::start(options, sink.clone())) {
            Some(Ok(probe)) => return source(Way::Ebpf(Box::new(probe)), None),
            Some(Err(error)) => error.to_string(),
            None => "switched off: probe.ebpf = false".to_owned(),
        };
        match PidfdWatch::start(sink) {
            Ok(watch) => source(Way::Pidfd(watch), Some(cause)),
            Err(error) => source(Way::None, Some(format!("{cause}; {error}"))),
        }
    }

    /// Why eBPF is not used, if it is not.
    pub fn cause(&self) -> Option<&str> {
        self.cause.as_deref()
    }

    /// Keeps following a unit as systemd now describes it. Answers what is to be told of it: that it
    /// cannot be followed, for a new reason, or that it is again.
    pub fn follow(&self, slot: Slot, unit: &str, view: &UnitView) -> Option<Kind> {
        if view.load_state != "loaded" || view.control_group.is_empty() {
            return None;
        }
        let what = match &self.way {
            Way::Ebpf(_) => What::Cgroup(view.control_group.clone()),
            Way::Pidfd(_) => What::Process(view.main_pid),
            Way::None => return None,
        };
        let mut followed = self.followed();
        let before = followed.remove(&slot);
        let is_followed = before.as_ref().is_some_and(|f| f.what == what && f.error.is_none());
        let done = if is_followed { self.look_again() } else { self.begin(slot, &what) };
        let error = done.err();
        let is_news = error != before.and_then(|f| f.error);
        followed.insert(slot, Followed { unit: unit.to_owned(), what, error: error.clone() });
        is_news.then_some(Kind::UnitWatch { error })
    }

    /// Follows this from now on, and nothing else for the slot.
    fn begin(&self, slot: Slot, what: &What) -> Result<(), String> {
        match (&self.way, what) {
            (Way::Ebpf(probe), What::Cgroup(control_group)) => {
                let done = probe.unwatch(slot).and_then(|()| probe.watch(slot, control_group));
                done.map_err(|error| error.to_string())
            }
            (Way::Pidfd(watch), What::Process(pid)) => {
                watch.unwatch(slot);
                let done = if *pid == 0 { Ok(()) } else { watch.watch(slot, *pid) };
                match done {
                    // One that has ended meanwhile is told by systemd.
                    Ok(()) | Err(PidfdError::Gone { .. }) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Where the kernel does not tell of new cgroups, every change of a unit may mean one.
    fn look_again(&self) -> Result<(), String> {
        match &self.way {
            Way::Ebpf(probe) if !probe.follows_in_kernel() => {
                probe.refresh().map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }

    /// Tries again what went wrong: cgroups that did not fit into the filter, units that could not be
    /// followed. Answers what is to be told, by unit. To be called every few seconds.
    pub fn retry(&self) -> Vec<(String, Kind)> {
        if let Way::Ebpf(probe) = &self.way {
            // Before the refresh: what does not fit during it counts for the next.
            let full = probe.drops().cgroups_full;
            if full > self.mended.load(Ordering::Relaxed) && probe.refresh().is_ok() {
                self.mended.store(full, Ordering::Relaxed);
            }
        }
        let mut news = Vec::new();
        for (slot, followed) in self.followed().iter_mut().filter(|(_, followed)| followed.error.is_some()) {
            let error = self.begin(*slot, &followed.what).err();
            if error != followed.error {
                news.push((followed.unit.clone(), Kind::UnitWatch { error: error.clone() }));
                followed.error = error;
            }
        }
        news
    }

    fn followed(&self) -> MutexGuard<'_, BTreeMap<Slot, Followed>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Units that the kernel does not watch, each with the reason and the mend.
    fn unwatched(&self) -> Vec<(String, String)> {
        let followed = self.followed();
        let with_error = followed.values().filter_map(|f| Some((f.unit.clone(), f.error.clone()?)));
        with_error.collect()
    }

    /// What this kernel lacks, each with its consequence.
    fn missing(&self) -> Vec<String> {
        let Way::Ebpf(probe) = &self.way else { return Vec::new() };
        probe.missing().iter().map(|missing| format!("{}: {}", missing.what, missing.effect)).collect()
    }

    /// For `ftctl status` and `doctor`.
    pub fn status(&self) -> ProbeStatus {
        let (cause, missing, unwatched) = (self.cause.clone(), self.missing(), self.unwatched());
        let mut status = ProbeStatus { cause, missing, unwatched, ..ProbeStatus::default() };
        match &self.way {
            Way::Ebpf(probe) => {
                let drops = probe.drops();
                status.source = "ebpf".into();
                status.realtime = match probe.realtime() {
                    Realtime::Off => "off: probe.realtime = 0".into(),
                    Realtime::Granted(priority) => format!("SCHED_FIFO {priority}"),
                    Realtime::Refused(cause) => format!("refused: {cause}"),
                };
                status.delivered = drops.delivered;
                status.skipped = drops.skipped;
                status.drops = vec![
                    (RING_FULL.into(), drops.ring_full),
                    (FILTER_FULL.into(), drops.cgroups_full),
                    (UNREADABLE.into(), drops.malformed),
                ];
            }
            Way::Pidfd(_) => {
                status.source = "pidfd".into();
                status.realtime = "none: pidfds only".into();
            }
            Way::None => {
                status.source = "none".into();
                status.realtime = "none".into();
            }
        }
        status
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use std::fs;

    use super::*;

    fn view(control_group: &str, main_pid: u32) -> UnitView {
        let control_group = control_group.to_owned();
        UnitView { load_state: "loaded".into(), control_group, main_pid, ..UnitView::default() }
    }

    fn error(news: Option<Kind>) -> String {
        match news {
            Some(Kind::UnitWatch { error: Some(error) }) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_process_that_cannot_be_watched_is_told_once_and_tried_again() {
        // no process has this number, and no system call takes it
        const NO_PID: u32 = u32::MAX;
        let source = Source::start(None, |_| ());
        assert_eq!(source.status().source, "pidfd");
        let told = error(source.follow(Slot(0), "a.service", &view("/a", NO_PID)));
        assert!(told.contains("cannot be watched"), "{told}");
        assert_eq!(source.follow(Slot(0), "a.service", &view("/a", NO_PID)), None, "nothing new");
        assert!(source.retry().is_empty());
        assert_eq!(source.status().unwatched, [("a.service".to_owned(), told)]);
        assert!(source.status().missing.is_empty());
        let news = source.follow(Slot(0), "a.service", &view("/a", std::process::id()));
        assert_eq!(news, Some(Kind::UnitWatch { error: None }));
        assert!(source.unwatched().is_empty());
        assert_eq!(source.follow(Slot(0), "a.service", &view("/a", std::process::id())), None);
    }

    #[test]
    fn a_process_that_is_gone_is_systemds_to_tell() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let source = Source::start(None, |_| ());
        assert_eq!(source.follow(Slot(0), "a.service", &view("/a", child.id())), None);
        assert_eq!(source.follow(Slot(0), "a.service", &view("/a", 0)), None);
    }

    #[test]
    fn a_watch_that_failed_is_made_when_it_can_be() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: it needs root (BPF programs)");
            return;
        }
        let options = ProbeOptions { elsewhere: false, realtime_priority: None, ..ProbeOptions::default() };
        let source = Source::start(Some(&options), |_| ());
        let follow =
            |slot, unit: &str, control_group| source.follow(Slot(slot), unit, &view(control_group, 1));
        assert_eq!(follow(0, "a.service", "/ftd-test-a"), None);
        assert_eq!(follow(1, "b.service", "/ftd-test-b"), None);
        let told = error(follow(1, "b.service", "/ftd-test-a"));
        assert!(told.contains("already watched"), "{told}");
        // neither cgroup is its own now, so coming back to the old one is news too
        assert_eq!(follow(1, "b.service", "/ftd-test-b"), Some(Kind::UnitWatch { error: None }));
        error(follow(1, "b.service", "/ftd-test-a"));
        assert!(source.retry().is_empty(), "it is still taken");
        assert_eq!(follow(0, "a.service", "/ftd-test-c"), None);
        assert_eq!(source.retry(), [("b.service".to_owned(), Kind::UnitWatch { error: None })]);
        assert!(source.unwatched().is_empty());
    }

    #[test]
    fn a_filter_that_was_full_is_refreshed_until_all_fits() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: it needs root (BPF programs, control groups)");
            return;
        }
        // room for the root and the unit
        let (cgroups, realtime_priority, elsewhere) = (2, None, false);
        let options = ProbeOptions { cgroups, realtime_priority, elsewhere, ..ProbeOptions::default() };
        let source = Source::start(Some(&options), |_| ());
        let name = format!("ftd-test-full-{}", std::process::id());
        assert_eq!(source.follow(Slot(0), "a.service", &view(&format!("/{name}"), 1)), None);
        let dir = crate::unit::cgroup::unified_mount().unwrap().join(name);
        fs::create_dir(&dir).unwrap();
        fs::create_dir(dir.join("1")).unwrap();
        let lost = || source.status().drops.iter().map(|(_, count)| count).sum::<u64>();
        source.retry();
        let while_full = (lost(), source.mended.load(Ordering::Relaxed));
        fs::remove_dir(dir.join("1")).unwrap();
        source.retry();
        let with_room = (lost(), source.mended.load(Ordering::Relaxed));
        fs::remove_dir(dir).unwrap();
        assert_eq!((while_full, with_room), ((1, 0), (1, 1)));
    }
}
