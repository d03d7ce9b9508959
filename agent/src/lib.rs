//! ftd: a fault-tolerance agent for Linux hosts.
//!
//! The parts, from the top down; a part uses only parts below it:
//!
//! ```text
//! cli  control          people: ftctl, the API on a unix socket
//! telemetry             numbers for the outside
//! inject  migrate       what is done on purpose: faults, moves to other nodes
//! heal  cluster         decisions on this host / between hosts
//! replicate             snapshots of this host -> other nodes
//! snapshot  peer        state -> bytes that outlive it, and back / other nodes
//! unit  probe           systemd over D-Bus / kernel -> events
//! event  config         the words that everything above speaks
//! ```
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]

pub mod cli;
pub mod cluster;
pub mod config;
pub mod control;
pub mod daemon;
pub mod event;
pub mod heal;
pub mod inject;
pub mod migrate;
pub mod peer;
pub mod probe;
pub mod replicate;
pub mod snapshot;
pub mod telemetry;
pub mod unit;
