//! Test hosts with a real systemd, and what the scenarios and `cargo xtask` share to prepare them.
//!
//! A *host* is a Debian root file system on an overlay, in mount, PID, UTS, IPC, network and cgroup
//! namespaces of its own, with systemd as PID 1: it boots in a second, costs a few megabytes, and
//! everything that ftd talks to (systemd over D-Bus, cgroups, netlink, BPF) is the real thing. It can be
//! killed, frozen, cut from the network, rebooted on the same disk. A *lab* is a bridge in a network
//! namespace of its own and the hosts on it; several labs live side by side. See [`Lab`] and [`Host`].
//!
//! Nothing of a lab outlives it. It is torn down when its [`Lab`] is dropped, and by a *keeper* process
//! when its owner dies in any other way (see [`lab`]); [`leftovers`] proves it.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use harness::{BootOptions, Lab};
//! let lab = Lab::new()?;
//! let one = lab.boot("vm1", BootOptions::default())?;
//! let two = lab.boot("vm2", BootOptions::default())?;
//! one.wait_running()?;
//! two.wait_running()?;
//! one.ok(["curl", "-sf", "http://10.77.0.12/"])?;
//! two.cut()?;
//! assert!(!one.run(["curl", "-sf", "-m", "1", "http://10.77.0.12/"])?.success());
//! # Ok(()) }
//! ```
//!
//! The parts, each using only parts below it:
//! ```text
//! lab  host  events  journal  own  criu  doctor   what a test or a person handles
//! base  container  enter            file systems of hosts / a host's way up / a command's way in
//! cgroup  mounts  process           the kernel's files
//! step  cache  command              preparing things once, and saying what went wrong
//! ```

pub mod base;
pub mod cache;
pub mod cgroup;
pub mod command;
pub mod container;
pub mod criu;
pub mod doctor;
pub mod enter;
pub mod events;
pub mod ftctl;
pub mod host;
pub mod journal;
pub mod lab;
pub mod metrics;
pub mod mounts;
pub mod own;
pub mod process;
pub mod step;

pub use base::Base;
pub use cache::Cache;
pub use command::Output;
pub use events::Events;
pub use host::{BootOptions, Host};
pub use lab::{Lab, leftovers};

use std::time::Duration;

/// A time limit, made longer on slow machines: multiplied by `FTD_TIME_SCALE` (a number, 1 when unset).
///
/// For limits only ("give up after"), never for a duration that a test measures.
pub fn scaled(limit: Duration) -> Duration {
    let scale = std::env::var("FTD_TIME_SCALE").ok().and_then(|text| text.parse::<f64>().ok());
    limit.mul_f64(scale.filter(|scale| scale.is_finite() && *scale > 0.0).unwrap_or(1.0))
}

/// A number that whoever runs a scenario may give in the environment.
pub fn given(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}
