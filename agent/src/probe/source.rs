//! Where deaths are learned from: BPF programs, or pidfds where these cannot be had, or systemd alone.

use std::sync::Mutex;

use super::{PidfdWatch, Probe, ProbeEvent, ProbeOptions, Realtime, Slot};
use crate::{control::ProbeStatus, unit::UnitView};

/// The source in use, and why it is not the better one.
#[derive(Debug)]
pub struct Source {
    kind: Kind,
    cause: Option<String>,
    /// What is followed for each unit, so that only changes are told to the kernel.
    followed: Mutex<std::collections::HashMap<Slot, Followed>>,
}

#[derive(Debug)]
enum Kind {
    Ebpf(Probe),
    Pidfd(PidfdWatch),
    None,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Followed {
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
        let followed = Mutex::default();
        let cause = match options.map(|options| Probe::start(options, sink.clone())) {
            Some(Ok(probe)) => return Self { kind: Kind::Ebpf(probe), cause: None, followed },
            Some(Err(error)) => error.to_string(),
            None => "switched off: probe.ebpf = false".to_owned(),
        };
        match PidfdWatch::start(sink) {
            Ok(watch) => Self { kind: Kind::Pidfd(watch), cause: Some(cause), followed },
            Err(error) => Self { kind: Kind::None, cause: Some(format!("{cause}; {error}")), followed },
        }
    }

    /// Why eBPF is not used, if it is not.
    pub fn cause(&self) -> Option<&str> {
        self.cause.as_deref()
    }

    /// Keeps following a unit as systemd now describes it.
    pub fn follow(&self, slot: Slot, view: &UnitView) -> Result<(), String> {
        if view.load_state != "loaded" || view.control_group.is_empty() {
            return Ok(());
        }
        let now = match &self.kind {
            Kind::Ebpf(_) => Followed::Cgroup(view.control_group.clone()),
            Kind::Pidfd(_) => Followed::Process(view.main_pid),
            Kind::None => return Ok(()),
        };
        let mut followed = self.followed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let news = followed.get(&slot) != Some(&now);
        match &self.kind {
            Kind::Ebpf(probe) if news => {
                if followed.contains_key(&slot) {
                    probe.unwatch(slot).map_err(|error| error.to_string())?;
                }
                probe.watch(slot, &view.control_group).map_err(|error| error.to_string())?;
            }
            // Where the kernel does not tell of new cgroups, every change of the unit may mean one.
            Kind::Ebpf(probe) if !probe.follows_in_kernel() => {
                probe.refresh().map_err(|error| error.to_string())?;
            }
            Kind::Pidfd(watch) if news => {
                watch.unwatch(slot);
                // One that has ended meanwhile is told by systemd.
                if view.main_pid != 0 && watch.watch(slot, view.main_pid).is_err() {
                    return Ok(());
                }
            }
            _ => return Ok(()),
        }
        followed.insert(slot, now);
        Ok(())
    }

    /// For `ftctl status` and `doctor`.
    pub fn status(&self) -> ProbeStatus {
        let cause = self.cause.clone();
        let mut status = ProbeStatus { cause, ..ProbeStatus::default() };
        match &self.kind {
            Kind::Ebpf(probe) => {
                let drops = probe.drops();
                status.source = "ebpf".into();
                status.realtime = match probe.realtime() {
                    Realtime::Off => "off: probe.realtime = 0".into(),
                    Realtime::Granted(priority) => format!("SCHED_FIFO {priority}"),
                    Realtime::Refused(cause) => format!("refused: {cause}"),
                };
                status.missing = probe
                    .missing()
                    .iter()
                    .map(|missing| format!("{}: {}", missing.what, missing.effect))
                    .collect();
                status.delivered = drops.delivered;
                status.drops = vec![
                    ("ring buffer full".into(), drops.ring_full),
                    ("filter full".into(), drops.cgroups_full),
                    ("unreadable".into(), drops.malformed),
                ];
            }
            Kind::Pidfd(_) => {
                status.source = "pidfd".into();
                status.realtime = "none: pidfds only".into();
            }
            Kind::None => {
                status.source = "none".into();
                status.realtime = "none".into();
            }
        }
        status
    }
}
