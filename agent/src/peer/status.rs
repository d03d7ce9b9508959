//! What people see of peers.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Peers, table::Slot};

/// `ftctl cluster peers`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// This node.
    pub node: String,
    /// The cluster's name; absent when this node is in none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Where this node listens for peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The node that has the CA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// This node's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateStatus>,
    /// Why peers cannot reach this node, and the mend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<(String, String)>,
    /// The peers.
    pub peers: Vec<PeerStatus>,
}

/// A certificate's dates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// From when on it is valid.
    pub from: jiff::Timestamp,
    /// Until when.
    pub until: jiff::Timestamp,
    /// Its serial number, in hexadecimal.
    pub serial: String,
}

/// How a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// There is a connection, and the peer is heard.
    Up,
    /// There is, or was until a moment ago, and nothing is heard.
    Silent,
    /// It cannot be reached.
    Down,
}

/// A peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: PeerState,
    /// Since when it is up, or down.
    pub since: jiff::Timestamp,
    /// Where it is reached, or was last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Where it can be dialled.
    pub addresses: Vec<SocketAddr>,
    /// Round trip of heartbeats, median and 99 %, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_us: Option<(u64, u64)>,
    /// Share of heartbeats that are lost, 0 to 1.
    pub loss: f64,
    /// Bytes per second that go there.
    pub sent_per_s: u64,
    /// Bytes per second that come from there.
    pub received_per_s: u64,
    /// The largest packet that the way takes, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Its ftd's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its certificate, as it was last shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateStatus>,
    /// Why it is not up, and the mend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<(String, String)>,
}

/// A token that was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenMade {
    /// The token: a secret.
    pub token: String,
    /// The cluster.
    pub cluster: String,
    /// Until when it can be used.
    pub until: jiff::Timestamp,
    /// Where the new node will ask.
    pub addresses: Vec<SocketAddr>,
}

/// A cluster that was joined.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Joined {
    /// The cluster.
    pub cluster: String,
    /// Who took this node in.
    pub by: String,
    /// Until when its certificate is valid; it is renewed before.
    pub until: jiff::Timestamp,
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

impl Peers {
    /// How this node and its peers are, now.
    pub fn status(&self) -> ClusterStatus {
        let core = &self.core;
        let identity = core.identity();
        let facts = identity.as_ref().and_then(|identity| identity.facts().ok());
        let problem = core.state().problem.clone().map(|why| (why.cause, why.mend));
        let silent_after = core.settings.silent_after;
        let peers = core
            .table(|table| table.slots.iter().map(|(name, slot)| status(name, slot, silent_after)).collect());
        ClusterStatus {
            node: core.node.clone(),
            cluster: identity.as_ref().map(|identity| identity.cluster.clone()),
            listen: core.listen,
            authority: identity.as_ref().map(|identity| identity.issuer.clone()),
            certificate: facts.map(Into::into),
            problem,
            peers,
        }
    }
}

impl From<super::x509::Facts> for CertificateStatus {
    fn from(facts: super::x509::Facts) -> Self {
        Self { from: facts.from, until: facts.until, serial: facts.serial }
    }
}

fn status(name: &str, slot: &Slot, silent_after: Duration) -> PeerStatus {
    let live = slot.current.as_ref();
    let state = match live {
        Some(live) if live.silence() <= silent_after => PeerState::Up,
        None if !slot.up => PeerState::Down,
        _ => PeerState::Silent,
    };
    let ((round_trip, loss), (sent_per_s, received_per_s)) = live.map_or(((None, 0.0), (0, 0)), |live| {
        let measured = live.measured();
        ((measured.0.round_trip(), measured.0.loss()), measured.1.per_second())
    });
    PeerStatus {
        name: name.to_owned(),
        state,
        since: slot.since,
        address: live.map(|live| live.address).or(slot.last),
        addresses: slot.addresses.clone(),
        round_trip_us: round_trip.map(|(median, most)| (micros(median), micros(most))),
        loss,
        sent_per_s,
        received_per_s,
        mtu: live.map(|live| live.connection.stats().path.current_mtu),
        version: live.map(|live| live.hello.version.clone()),
        certificate: live.map(|live| live.facts.clone().into()),
        problem: slot.why.clone().map(|why| (why.cause, why.mend)),
    }
}
