//! Each new snapshot goes to the other nodes of its workload.
//!
//! ```text
//! here (send)                                              there (receive)
//!   what have you got of mine?             ─────────────▶  numbers, and which are good
//!   the manifest of the newest that lacks  ─────────────▶  which of its chunks are missing
//!   these, on several streams, as bulk     ─────────────▶  checked, stored; durable pack by pack
//!   that is all                            ─────────────▶  durable: only now it counts as being there
//! ```
//!
//! What is sent is decided anew each time, from what both sides have ([`next`]): nothing has to be remembered here, so
//! nothing can be remembered wrongly. A transfer that breaks off, by a cut link or a killed ftd on either side, is begun
//! again in the same way, and then only the chunks that did not arrive are missing. When snapshots are taken faster than
//! they arrive, those in between are left out: the newest is what counts, and the last good one.
//!
//! A node sends what it has taken itself, and takes from another what that one has taken: the name in its
//! certificate says who it is, and the workload's `nodes` whether it may.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, cluster::Cluster},
    event::{Kind, bus::Bus},
    peer::{Bulk, Call, Peers, service},
    snapshot::store::{Settings, Store},
};

mod receive;
mod send;

#[cfg(test)]
mod tests;

/// Manifests are not larger on the wire: one of 16 GiB of memory in pieces of 32 KiB is 20 MiB.
const LONGEST_MANIFEST: u32 = 32 << 20;

/// What there is of the asking node's generations of a workload.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Have {
    workload: String,
}

/// Numbers of generations where they were taken, and whether they are good.
type There = Vec<(u64, bool)>;

impl Call for Have {
    type Answer = There;
    const SERVICE: u16 = service::REPLICATE;
    const LONGEST_ANSWER: u32 = 1 << 20;
}

/// A generation is to come.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Begin {
    manifest: Vec<u8>,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Begun {
    /// It is there.
    Known,
    /// These chunks are missing (a bit for each).
    Send { transfer: u64, missing: Vec<u8> },
}

impl Call for Begin {
    type Answer = Begun;
    const SERVICE: u16 = service::REPLICATE + 1;
    const LONGEST: u32 = LONGEST_MANIFEST;
    const LONGEST_ANSWER: u32 = 4 << 20;
}

/// Chunks follow, each with its head.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pieces {
    transfer: u64,
}

impl Bulk for Pieces {
    const SERVICE: u16 = service::REPLICATE + 2;
}

/// All chunks were sent, on so many streams.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct End {
    transfer: u64,
    streams: usize,
    good: bool,
}

/// What becomes of the generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Ended {
    /// It is there, durable.
    Whole,
    /// These chunks are missing.
    Missing(Vec<u8>),
}

impl Call for End {
    type Answer = Ended;
    const SERVICE: u16 = service::REPLICATE + 3;
    const LONGEST_ANSWER: u32 = 4 << 20;
}

/// A generation that is there has proved healthy.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Good {
    workload: String,
    number: u64,
}

impl Call for Good {
    type Answer = ();
    const SERVICE: u16 = service::REPLICATE + 4;
}

/// How far a workload's snapshots are on another node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// The workload.
    pub workload: String,
    /// The other node.
    pub peer: String,
    /// The newest generation that this node has taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<u64>,
    /// The newest of these that is durable there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub there: Option<u64>,
    /// When that was taken: what came after is lost if this host is lost now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<jiff::Timestamp>,
    /// Since when there is a newer one that is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind_since: Option<jiff::Timestamp>,
    /// What is being sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sending: Option<Sending>,
    /// Why it is behind, as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<(String, String)>,
}

impl ReplicaStatus {
    /// How long the oldest generation that is not there has waited; zero when all is there.
    pub fn lag(&self, now: jiff::Timestamp) -> Duration {
        let since = self.behind_since.map(|since| Duration::try_from(now.duration_since(since)));
        since.and_then(Result::ok).unwrap_or_default()
    }
}

/// A generation on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// Its number.
    pub generation: u64,
    /// Bytes that were sent,
    pub done: u64,
    /// of so many that were missing there.
    pub total: u64,
}

/// Sends snapshots to other nodes, and takes theirs. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Replicas {
    /// As soon as the store is open.
    inner: Arc<OnceLock<Arc<Inner>>>,
}

#[derive(Debug)]
struct Inner {
    peers: Peers,
    store: Store,
    bus: Arc<Bus>,
    settings: Cluster,
    /// Of each workload the nodes that may serve it.
    nodes: BTreeMap<String, Vec<String>>,
    /// Of each as many generations of a kind as are kept.
    keep: BTreeMap<String, usize>,
    /// So many were let go since room was made.
    gone: AtomicUsize,
    status: Mutex<BTreeMap<(String, String), ReplicaStatus>>,
    transfers: Mutex<HashMap<u64, Arc<receive::Transfer>>>,
    /// The number of the next transfer.
    next: AtomicU64,
}

/// Begins. Nothing happens on a node that has no workload in common with another. A store that cannot be opened is told,
/// and tried again.
pub fn start(config: &Config, peers: &Peers, bus: &Arc<Bus>) -> Replicas {
    let here = peers.node();
    let shared = config.workloads.iter().filter_map(|workload| {
        let nodes: Vec<_> = workload.nodes.iter().map(|node| node.as_ref().clone()).collect();
        let ours = nodes.iter().any(|node| node == here) && nodes.len() > 1;
        ours.then(|| (workload.name.as_ref().clone(), nodes))
    });
    let (nodes, replicas): (BTreeMap<_, _>, _) = (shared.collect(), Replicas::default());
    if nodes.is_empty() {
        return replicas;
    }
    let settings = config.cluster.clone();
    let keep = config.workloads.iter().map(|workload| {
        let own = workload.snapshot.as_ref().and_then(|schedule| schedule.keep);
        (workload.name.as_ref().clone(), own.unwrap_or(config.snapshot.keep))
    });
    let keep = keep.collect();
    let (dir, quota) = (config.node.state_dir.join("snapshots"), config.snapshot.quota.as_u64());
    let (peers, bus, cell) = (peers.clone(), Arc::clone(bus), Arc::clone(&replicas.inner));
    tokio::spawn(async move {
        let mut told = false;
        let store = loop {
            let (dir, settings) = (dir.clone(), Settings { quota: Some(quota), ..Settings::default() });
            match stored(move || Store::open(&dir, settings)).await {
                Ok(store) => break store,
                Err(error) if !std::mem::replace(&mut told, true) => {
                    bus.emit(None, None, Kind::FilesTrouble { what: "opening the snapshots".into(), error });
                }
                Err(_) => {}
            }
            tokio::time::sleep(AGAIN).await;
        };
        let inner = Arc::new(Inner {
            peers,
            store,
            bus,
            settings,
            nodes,
            keep,
            gone: AtomicUsize::new(0),
            status: Mutex::default(),
            transfers: Mutex::default(),
            next: AtomicU64::new(1),
        });
        receive::serve(&inner).await;
        send::run(&inner);
        let _ = cell.set(inner);
    });
    replicas
}

/// How often a store that cannot be opened is tried.
const AGAIN: Duration = Duration::from_secs(5);

impl Replicas {
    /// How far each workload's snapshots are on each other node, by workload and node.
    pub fn status(&self) -> Vec<ReplicaStatus> {
        self.inner.get().map(|inner| inner.status().values().cloned().collect()).unwrap_or_default()
    }
}

impl Inner {
    fn status(&self) -> MutexGuard<'_, BTreeMap<(String, String), ReplicaStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does something with the store, on a thread where it may wait for the disk.
async fn stored<T: Send + 'static>(
    work: impl FnOnce() -> crate::snapshot::store::Result<T> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}
