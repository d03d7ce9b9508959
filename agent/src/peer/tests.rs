//! Nodes of a cluster in one process, each with a port of its own on the loopback, over real QUIC.

use std::{
    net::UdpSocket,
    sync::atomic::{AtomicUsize, Ordering},
};

use quinn::{ClientConfig, Connection, Endpoint};
use rustls::pki_types::CertificateSigningRequestDer;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::*;
use crate::event::Event;

mod identity;
mod strangers;

/// Nothing here takes as long.
const LIMIT: Duration = Duration::from_mins(1);

/// What the other side makes of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Echo {
    text: String,
    /// Answer after so long, milliseconds.
    after: u64,
}

impl Call for Echo {
    type Answer = (String, String);
    const SERVICE: u16 = service::TEST;
    const LONGEST: u32 = 1000;
    const LONGEST_ANSWER: u32 = 1000;
}

#[derive(Debug, Serialize, Deserialize)]
struct Unknown {}

impl Call for Unknown {
    type Answer = ();
    const SERVICE: u16 = service::TEST + 1;
}

/// Bulk: so many bytes come behind it.
#[derive(Debug, Serialize, Deserialize)]
struct Load {
    bytes: u64,
}

impl Bulk for Load {
    const SERVICE: u16 = service::TEST + 2;
}

/// A port that nobody has.
fn port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A node.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) peers: Peers,
    pub(crate) bus: Arc<Bus>,
    pub(crate) config: Config,
    answered: Arc<AtomicUsize>,
}

impl Node {
    pub(crate) async fn start(name: &str, others: &[(&str, SocketAddr)], settings: &str) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], port()));
        Self::start_at(name, address, others, settings, tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn start_at(
        name: &str,
        address: SocketAddr,
        others: &[(&str, SocketAddr)],
        settings: &str,
        dir: tempfile::TempDir,
    ) -> Self {
        let others: Vec<_> = others.iter().map(|(name, address)| format!("\"{name}={address}\"")).collect();
        let quick = [
            ("heartbeat", "50ms"),
            ("silent_after", "1s"),
            ("down_after", "3s"),
            ("redial", "50ms"),
            ("redial_max", "200ms"),
        ];
        let quick = quick.iter().filter(|(key, _)| !settings.contains(&format!("{key} = ")));
        let quick: String = quick.map(|(key, value)| format!("{key} = \"{value}\"\n")).collect();
        let text = format!(
            "[node]\nname = \"{name}\"\nlisten = \"{address}\"\nstate_dir = \"{}\"\n\
             [cluster]\npeers = [{}]\n{quick}{settings}",
            dir.path().display(),
            others.join(", "),
        );
        let (bus, queue) = Bus::new(name.into(), 0);
        // Nobody writes a journal.
        std::thread::spawn(move || queue.iter().for_each(drop));
        let config = Config::parse(&text, "test".as_ref()).unwrap_or_else(|error| panic!("{error}"));
        let peers = Peers::start(&config, Arc::clone(&bus)).await;
        let answered = Arc::new(AtomicUsize::new(0));
        let (me, count) = (name.to_owned(), Arc::clone(&answered));
        peers.serve(move |caller, Echo { text, after }| {
            let (me, count) = (me.clone(), Arc::clone(&count));
            async move {
                sleep(Duration::from_millis(after)).await;
                count.fetch_add(1, Ordering::Relaxed);
                if text == "refuse" {
                    return Err(Refusal::new("it is refused", "ask for something else"));
                }
                if text == "long" {
                    return Ok((me, "x".repeat(2000)));
                }
                Ok((me, format!("{text} for {}", caller.node)))
            }
        });
        Self { name: name.into(), address, dir, peers, bus, config, answered }
    }

    /// Waits until something has happened, or has happened before.
    pub(crate) async fn event(&self, what: impl Fn(&Kind) -> bool) -> Arc<Event> {
        let (recent, mut follower) = self.bus.recent_and_follow();
        let found = async {
            if let Some(found) = recent.iter().find(|event| what(&event.kind)) {
                return Arc::clone(found);
            }
            loop {
                let event = follower.recv().await.unwrap();
                if what(&event.kind) {
                    return event;
                }
            }
        };
        let found = timeout(LIMIT, found).await;
        found.unwrap_or_else(|_| panic!("{}: it does not happen; what did: {:#?}", self.name, self.told()))
    }

    pub(crate) fn told(&self) -> Vec<Kind> {
        self.bus.recent_and_follow().0.iter().map(|event| event.kind.clone()).collect()
    }

    /// The cause that somebody was refused for.
    async fn refused(&self, cause: &str) -> String {
        let event = self
            .event(|kind| matches!(kind, Kind::PeerRefused { cause: told, .. } if told.contains(cause)))
            .await;
        let Kind::PeerRefused { mend, .. } = &event.kind else { unreachable!() };
        mend.clone()
    }

    pub(crate) async fn up(&self, peer: &str) {
        self.event(|kind| matches!(kind, Kind::PeerUp { peer: up, .. } if up == peer)).await;
    }

    /// Waits until a peer is as it should be.
    pub(crate) async fn until(&self, what: &str, is: impl Fn(&ClusterStatus) -> bool) {
        let mut changes = self.peers.changes();
        let came = timeout(LIMIT, changes.wait_for(|_| is(&self.peers.status()))).await.is_ok();
        assert!(came, "{}: {what}: {:#?}; {:#?}", self.name, self.peers.status(), self.told());
    }

    pub(crate) async fn connected(&self, peer: &str) {
        self.until("connected", |_| self.peers.connected(peer)).await;
    }

    pub(crate) async fn listening(&self) {
        self.event(|kind| matches!(kind, Kind::PeersReady { .. })).await;
    }

    async fn echo(&self, peer: &str, text: &str) -> Result<(String, String), CallError> {
        self.peers.call(peer, &Echo { text: text.into(), after: 0 }).await
    }

    /// Ends it, as a stop of ftd does, and gives what it has on disk.
    pub(crate) async fn stop(self) -> (SocketAddr, tempfile::TempDir) {
        self.peers.stop().await;
        (self.address, self.dir)
    }

    /// As many connections as there are at its port.
    fn connections(&self) -> usize {
        self.peers.core.port().unwrap().endpoint.open_connections()
    }
}

/// vm1, which made a cluster, and vm2, which joined it; each knows the other's address.
pub(crate) async fn pair(settings: &str) -> (Node, Node) {
    let addresses = [port(), port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let dir = || tempfile::tempdir().unwrap();
    let vm1 = Node::start_at("vm1", addresses[0], &[("vm2", addresses[1])], settings, dir()).await;
    let vm2 = Node::start_at("vm2", addresses[1], &[("vm1", addresses[0])], settings, dir()).await;
    vm1.peers.init("c").await.unwrap();
    vm1.listening().await;
    let token = vm1.peers.token(None, &[]).await.unwrap();
    vm2.peers.join(&token.token).await.unwrap();
    vm1.up("vm2").await;
    vm2.up("vm1").await;
    (vm1, vm2)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_ask_each_other_and_know_who_asks() {
    let (vm1, vm2) = pair("").await;
    assert_eq!(vm1.echo("vm2", "a").await.unwrap(), ("vm2".into(), "a for vm1".into()));
    assert_eq!(vm2.echo("vm1", "b").await.unwrap(), ("vm1".into(), "b for vm2".into()));
    let refused = vm1.echo("vm2", "refuse").await.unwrap_err();
    assert!(
        matches!(&refused, CallError::Refused { refusal, .. } if refusal.mend.contains("something else"))
    );
    // Too long: the request is not sent, the answer neither.
    let long = vm1.echo("vm2", &"x".repeat(1000)).await.unwrap_err();
    assert!(matches!(long, CallError::Unsendable { source: WireError::Long { .. }, .. }), "{long}");
    let long = vm1.echo("vm2", "long").await.unwrap_err();
    assert!(
        long.to_string().contains("2000 bytes") || long.to_string().contains("1000 are allowed"),
        "{long}"
    );
    assert!(matches!(vm1.peers.call("vm2", &Unknown {}).await, Err(CallError::Unknown { .. })));
    let late = Echo { text: String::new(), after: 5000 };
    let late = vm1.peers.call_for("vm2", &late, Duration::from_millis(50)).await.unwrap_err();
    assert!(late.to_string().contains("does not answer within 50ms"), "{late}");
    let nobody = vm1.echo("vm3", "a").await.unwrap_err();
    assert!(nobody.to_string().contains("not among cluster.peers"), "{nobody}");
    // And after all that it still works.
    assert!(vm1.echo("vm2", "a").await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_arrives_whole_and_heartbeats_go_on_beside_it() {
    const BYTES: u64 = 32 << 20;
    let (vm1, vm2) = pair("").await;
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    vm2.peers.serve_bulk(move |caller, Load { bytes }, mut stream: Incoming| {
        let tell = tell.clone();
        async move {
            let (mut count, mut hasher) = (0_u64, blake3::Hasher::new());
            while let Ok(Some(chunk)) = stream.read_chunk(1 << 20, true).await {
                count += chunk.bytes.len() as u64;
                hasher.update(&chunk.bytes);
            }
            tell.send((caller.node, bytes, count, hasher.finalize())).await.unwrap();
        }
    });
    let mut stream = vm1.peers.bulk("vm2", &Load { bytes: BYTES }).await.unwrap();
    let piece: Vec<u8> = (0..1 << 16).map(|n: u32| (n % 251) as u8).collect();
    let mut hasher = blake3::Hasher::new();
    for _ in 0..BYTES >> 16 {
        hasher.update(&piece);
        stream.write(piece.clone()).await.unwrap();
    }
    stream.finish().await.unwrap();
    let (from, announced, came, hash) = timeout(LIMIT, told.recv()).await.unwrap().unwrap();
    assert_eq!((from.as_str(), announced, came, hash), ("vm1", BYTES, BYTES, hasher.finalize()));
    vm1.until("a round trip", |status| status.peers[0].round_trip_us.is_some()).await;
    let peer = vm1.peers.status().peers.remove(0);
    assert_eq!((peer.state, peer.version.as_deref()), (PeerState::Up, Some(env!("CARGO_PKG_VERSION"))));
    assert!(peer.mtu.unwrap() >= 1200 && peer.certificate.is_some(), "{peer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_dial_at_once_and_one_connection_is_left_on_which_nothing_was_lost() {
    let (vm1, vm2) = pair("").await;
    for round in 0..5 {
        // Both lose all they have, and both dial.
        for node in [&vm1, &vm2] {
            if let Some(live) = node.peers.core.current(if node.name == "vm1" { "vm2" } else { "vm1" }) {
                live.connection.close(quinn::VarInt::from_u32(99), b"test");
            }
        }
        let end = Instant::now() + LIMIT;
        let (one, other) = loop {
            let (one, other) = (vm1.peers.core.reach("vm2"), vm2.peers.core.reach("vm1"));
            if let (Ok(one), Ok(other), 1, 1) = (one, other, vm1.connections(), vm2.connections()) {
                break (one, other);
            }
            assert!(Instant::now() < end, "{round}: {} and {}", vm1.connections(), vm2.connections());
            sleep(Duration::from_millis(20)).await;
        };
        assert_ne!(one.ours, other.ours, "{round}: both hold the same one");
        vm1.echo("vm2", "a").await.unwrap();
        vm2.echo("vm1", "a").await.unwrap();
    }
    // No down, and no second up, for any of it.
    for node in [&vm1, &vm2] {
        let ups = node.told().into_iter().filter(|kind| matches!(kind, Kind::PeerUp { .. })).count();
        let downs = node.told().into_iter().filter(|kind| matches!(kind, Kind::PeerDown { .. })).count();
        assert_eq!((ups, downs), (1, 0), "{:#?}", node.told());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stops_is_down_at_once_and_who_comes_back_is_up() {
    let (vm1, vm2) = pair("").await;
    let begun = Instant::now();
    let (address, dir) = vm2.stop().await;
    let down = vm1.event(|kind| matches!(kind, Kind::PeerDown { .. })).await;
    assert!(
        matches!(&down.kind, Kind::PeerDown { cause, up_ms: Some(_), .. } if cause.contains("was stopped"))
    );
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let away = vm1.echo("vm2", "a").await.unwrap_err();
    assert!(matches!(&away, CallError::Unreachable { .. }), "{away}");
    let vm2 = Node::start_at("vm2", address, &[("vm1", vm1.address)], "", dir).await;
    vm2.up("vm1").await;
    vm1.connected("vm2").await;
    assert!(vm1.echo("vm2", "a").await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_which_nothing_is_heard_is_down_and_a_request_to_it_ends() {
    let (vm1, vm2) = pair("").await;
    // As a host that is gone: not one packet more, and no good-bye.
    let nowhere = UdpSocket::bind("127.0.0.1:0").unwrap();
    vm2.peers.core.port().unwrap().endpoint.rebind(nowhere).unwrap();
    for task in std::mem::take(&mut vm2.peers.core.state().tasks) {
        task.abort();
    }
    vm2.peers.core.current("vm1").unwrap().connection.close(quinn::VarInt::from_u32(98), b"");
    let down = vm1.event(|kind| matches!(kind, Kind::PeerDown { .. })).await;
    assert!(matches!(&down.kind, Kind::PeerDown { mend, .. } if !mend.is_empty()), "{down:?}");
    assert_eq!(vm1.peers.status().peers[0].state, PeerState::Down);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_not_configured_here_is_known_when_it_comes() {
    let vm1 = Node::start("vm1", &[], "").await;
    vm1.peers.init("c").await.unwrap();
    vm1.listening().await;
    let vm9 = Node::start("vm9", &[("vm1", vm1.address)], "").await;
    let token = vm1.peers.token(None, &[]).await.unwrap().token;
    vm9.peers.join(&token).await.unwrap();
    vm1.up("vm9").await;
    vm1.connected("vm9").await;
    assert_eq!(vm1.echo("vm9", "a").await.unwrap().0, "vm9");
    assert!(vm1.peers.status().peers[0].addresses.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_is_taken_is_told_and_tried_again() {
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let vm1 = Node::start_at("vm1", address, &[], "", tempfile::tempdir().unwrap()).await;
    vm1.peers.init("c").await.unwrap();
    let told = vm1.event(|kind| matches!(kind, Kind::PeersBlocked { .. })).await;
    assert!(matches!(&told.kind, Kind::PeersBlocked { mend, .. } if mend.contains("another program")));
    assert!(vm1.peers.status().problem.is_some());
    drop(taken);
    vm1.listening().await;
    assert!(vm1.peers.status().problem.is_none());
}
