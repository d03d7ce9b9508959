//! systemd, over D-Bus: what a unit is doing, and making it do something else.
//!
//! ftd speaks to PID 1 directly, on the socket that systemctl uses as root, so that a restart of the
//! message bus does not disturb it; where that socket is missing it uses the system bus. Everything is
//! signal-driven: nothing is polled, and no `systemctl` is ever run.

use serde::{Deserialize, Serialize};

pub mod alias;
pub mod cgroup;
pub mod definition;
mod direct;
pub mod manager;

/// A unit as systemd describes it: the properties that healing needs, kept current by signals.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitView {
    /// `loaded`, `not-found`, `masked`, `bad-setting`, `error`.
    pub load_state: String,
    /// systemd's error text when it could not be loaded.
    pub load_error: String,
    /// `active`, `reloading`, `inactive`, `failed`, `activating`, `deactivating`, …
    pub active_state: String,
    /// The finer state: `running`, `dead`, `auto-restart`, `stop-sigterm`, …
    pub sub_state: String,
    /// Why a service ended: `success`, `exit-code`, `signal`, `core-dump`, `oom-kill`, `watchdog`,
    /// `timeout`, `start-limit-hit`, …; empty for units that are not services.
    pub result: String,
    /// Main process id, 0 when it has none.
    pub main_pid: u32,
    /// The cgroup below the cgroup2 mount; empty while it has none.
    pub control_group: String,
    /// The queued job's id, 0 when there is none.
    pub job: u32,
    /// When it last became active, microseconds of CLOCK_MONOTONIC: tells one run from the next.
    pub active_enter: u64,
    /// When it last began to start, likewise; a start that fails changes this and not `active_enter`.
    pub inactive_exit: u64,
    /// How often systemd restarted it by itself.
    pub n_restarts: u32,
    /// `Restart=`.
    pub restart: String,
    /// `RestartSec=`, microseconds.
    pub restart_usec: u64,
    /// `SIGCHLD` code (`CLD_EXITED` 1, `CLD_KILLED` 2, `CLD_DUMPED` 3) of the main process's end.
    pub exec_main_code: i32,
    /// The process that is, or was, the main process of the last run; 0 when there was none.
    pub exec_main_pid: u32,
    /// Exit code or signal that goes with its end.
    pub exec_main_status: i32,
    /// Memory limit of its cgroup, bytes; `u64::MAX` when it has none.
    pub memory_max: u64,
}

impl UnitView {
    /// Serving, or at least said to be.
    pub fn is_active(&self) -> bool {
        matches!(self.active_state.as_str(), "active" | "reloading" | "refreshing")
    }

    /// Down and at rest.
    pub fn is_down(&self) -> bool {
        matches!(self.active_state.as_str(), "inactive" | "failed")
    }

    /// Loaded, so that it can be started.
    pub fn is_loaded(&self) -> bool {
        self.load_state == "loaded"
    }
}
