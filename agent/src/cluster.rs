//! Decisions between hosts: which node serves a workload, and that no other does.
//!
//! - [`lease`] (pure): the right to serve, for a time. Its head says why at most one node has it.
//! - [`placement`] (pure): where workloads are, and where they shall be.
//! - [`fence`]: what makes a node unable to answer once its lease has ended.
//! - [`vip`]: the address under which a workload is found.

pub mod fence;
pub mod lease;
pub mod placement;
pub mod vip;

use std::fmt;

use serde::{Deserialize, Serialize};

/// A node of the cluster; its number is given to it when it joins, and never to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

/// A workload of the cluster, by the number that it got when it was first placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkloadId(pub u32);

/// Counts the placements of a workload: each is greater by one than the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The one that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}
