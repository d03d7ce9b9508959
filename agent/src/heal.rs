//! Healing: what happens to a unit under care -> what ftd does about it.
//!
//! [`machine`] decides, purely; [`supervisor`] feeds it with what probe, systemd, health checks and
//! people say, and turns its outputs into events and actions; [`driver`] carries the actions out.

pub mod driver;
pub mod files;
pub mod guard;
pub mod health;
pub mod machine;
pub mod saved;
pub mod supervisor;
