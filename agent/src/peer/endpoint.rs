//! The UDP port: who may knock, how often, and how this node knocks elsewhere.
//!
//! Anybody can send packets to it. What that can cost is bounded: so many handshakes at a time (`cluster.handshakes`) for
//! strangers, as many again for the addresses of configured peers, so that a flood of the ones does not lock out the
//! others; when half of them are taken, who comes has to show first that he receives at the address that he sends from;
//! and a handshake that is not over in time is ended.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming, MtuDiscoveryConfig,
    ServerConfig, TokioRuntime, TransportConfig, VarInt, crypto::rustls::HandshakeData,
};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    Core, connection,
    error::ClusterError,
    join,
    refused::{self, Why, code, named, why},
    tls::{self, Tls},
};
use crate::config::cluster::{Cluster, Peer};

/// The largest UDP payload that is tried. Ten of these fit in what the kernel cuts up by itself (GSO): with larger ones
/// it is done one by one, which is ten times slower. Links of the usual 1500 bytes take 1452; that is found out.
const LARGEST: u16 = 6400;
/// What may be under way to the other side on one stream, and on all.
const STREAM_WINDOW: u32 = 4 << 20;
const WINDOW: u32 = 16 << 20;
/// Requests, and bulk transfers, that the other side may have under way at a time.
const REQUESTS: u32 = 256;
const BULKS: u32 = 32;
/// Of the kernel's buffers for the socket, if it gives that much.
const SOCKET_BUFFER: usize = 4 << 20;
/// What packets of handshakes that have not begun may take in memory.
const WAITING_BYTES: u64 = 64 << 10;
/// The second address is tried this long after the first.
const STAGGER: Duration = Duration::from_millis(50);

/// An open port.
#[derive(Clone)]
pub(super) struct Port {
    pub(super) endpoint: Endpoint,
    transport: Arc<TransportConfig>,
}

/// Transport settings for both sides.
fn transport(settings: &Cluster) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    let idle = IdleTimeout::try_from(settings.down_after).ok();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(LARGEST);
    transport
        .max_idle_timeout(idle)
        .max_concurrent_bidi_streams(VarInt::from_u32(REQUESTS))
        .max_concurrent_uni_streams(VarInt::from_u32(BULKS))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW))
        .mtu_discovery_config(Some(discovery))
        // Heartbeats that could not be sent in time are of no use later.
        .datagram_send_buffer_size(1 << 10)
        .datagram_receive_buffer_size(Some(16 << 10));
    Arc::new(transport)
}

impl Port {
    /// Opens it.
    pub(super) fn open(listen: SocketAddr, settings: &Cluster) -> io::Result<Self> {
        let socket = UdpSocket::bind(listen)?;
        // As much as there is: the kernel's bound (net.core.rmem_max) may be lower.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER);
        let _ = setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER);
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(LARGEST).map_err(io::Error::other)?;
        let endpoint = Endpoint::new(config, None, socket, Arc::new(TokioRuntime))?;
        Ok(Self { endpoint, transport: transport(settings) })
    }

    /// Lets in by this TLS from now on; connections that there are stay.
    pub(super) fn arm(&self, tls: &Tls, settings: &Cluster) {
        let mut server = ServerConfig::with_crypto(Arc::clone(&tls.server) as _);
        server
            .transport_config(Arc::clone(&self.transport))
            // A connection belongs to the addresses it was made with; over others a new one is made.
            .migration(false)
            .max_incoming(settings.handshakes * 2)
            .incoming_buffer_size(WAITING_BYTES)
            .incoming_buffer_size_total(WAITING_BYTES * settings.handshakes as u64);
        self.endpoint.set_server_config(Some(server));
    }
}

/// The address as it is written in the configuration: an IPv4 one is not shown as an IPv6 one.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Takes in who knocks, for ever.
pub(super) async fn accept(core: Arc<Core>, port: Port) {
    let places = || Arc::new(Semaphore::new(core.settings.handshakes));
    let (strangers, known) = (places(), places());
    while let Some(incoming) = port.endpoint.accept().await {
        let from = plain(incoming.remote_address()).ip();
        let all = if core.knows(from) { &known } else { &strangers };
        let Ok(place) = Arc::clone(all).try_acquire_owned() else {
            core.refusals.tell(
                &core.bus,
                "many",
                &Why::new(
                    "more connections than cluster.handshakes are being made at the same time",
                    "find out who floods this node, and keep him from UDP to node.listen",
                ),
            );
            incoming.refuse();
            continue;
        };
        if all.available_permits() < core.settings.handshakes / 2 && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        let core = Arc::clone(&core);
        tokio::spawn(async move {
            if let Err(why) = knock(&core, incoming).await {
                core.refusals.tell(&core.bus, &named(from), &why);
            }
            drop(place);
        });
    }
}

impl Core {
    /// Whether this is the address of a configured peer.
    fn knows(&self, address: IpAddr) -> bool {
        self.table(|table| {
            table.slots.values().any(|slot| slot.addresses.iter().any(|known| known.ip() == address))
        })
    }
}

/// A handshake, and what comes after it by the protocol that was agreed on.
async fn knock(core: &Arc<Core>, incoming: Incoming) -> Result<(), Why> {
    let limit = core.settings.handshake_within;
    let late = || Why::new("its handshake takes too long", "it may be no ftd; else see the network between");
    let begun = Instant::now();
    let connecting = incoming.accept().map_err(|error| why(&error))?;
    let connection = timeout(limit, connecting).await.map_err(|_| late())?.map_err(|error| why(&error))?;
    let data = connection.handshake_data().and_then(|any| any.downcast::<HandshakeData>().ok());
    let protocol = data.and_then(|data| data.protocol);
    let rest = limit.saturating_sub(begun.elapsed());
    let closing = connection.clone();
    let done = if protocol.as_deref() == Some(tls::JOIN) {
        timeout(limit, join::take_in(core, connection)).await
    } else {
        timeout(rest, connection::welcome(core, connection)).await
    };
    done.unwrap_or_else(|_| {
        refused::close(&closing, code::UNWANTED, "it took too long");
        Err(late())
    })
}

/// Keeps a connection with a peer, for ever.
pub(super) async fn keep(core: Arc<Core>, peer: Peer) {
    let mut changes = core.changes.subscribe();
    let mut wait = core.settings.redial;
    if core.node > peer.name {
        // Of two that start at the same time one dials first, most often.
        sleep(jittered(core.settings.redial)).await;
    }
    loop {
        if changes.wait_for(|_| core.wants(&peer.name).is_some()).await.is_err() {
            return;
        }
        let Some(replaces) = core.wants(&peer.name) else { continue };
        if replaces {
            // Who wishes for another one from now on means one more.
            core.renewing(&peer.name, false);
        }
        let dialled = dial(&core, &peer, replaces).await;
        if replaces && !matches!(dialled, Ok(true)) {
            core.renewing(&peer.name, true);
        }
        match dialled {
            Ok(true) => {
                wait = core.settings.redial;
                continue;
            }
            // It holds another connection for alive: it will notice, or that one is.
            Ok(false) => {}
            Err(why) => {
                tracing::debug!(peer = peer.name, cause = why.cause, "not reached");
                if why.refusal {
                    core.refusals.tell(&core.bus, &peer.name, &why);
                }
                core.failed(&peer.name, why);
            }
        }
        sleep(jittered(wait)).await;
        wait = (wait * 2).min(core.settings.redial_max);
    }
}

/// Between half of it and all of it.
fn jittered(wait: Duration) -> Duration {
    let mut random = [0; 4];
    let _ = super::ca::random(&mut random);
    wait.mul_f64(0.5 + f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX) / 2.0)
}

/// Dials a peer at all of its addresses; the first that answers counts.
async fn dial(core: &Arc<Core>, peer: &Peer, replaces: bool) -> Result<bool, Why> {
    let port = core.port().ok_or_else(|| Why::new("the port for peers is not open", ""))?;
    let tls = core.tls().ok_or_else(|| Why::new("this node is in no cluster", ""))?;
    let mut client = ClientConfig::new(Arc::clone(&tls.client) as _);
    client.transport_config(Arc::clone(&port.transport));
    let mut addresses = peer.addresses.clone();
    // The one that worked goes first, unless it is the one that has gone silent.
    let last = core.table(|table| table.slots.get(&peer.name).and_then(|slot| slot.last));
    let silent = core.current(&peer.name).is_some();
    addresses.sort_by_key(|address| (Some(*address) == last) == silent);
    let limit = core.settings.handshake_within;
    let connected = first(&port.endpoint, &client, &addresses, &peer.name);
    let silence = || why(&quinn::ConnectionError::TimedOut);
    let connection = timeout(limit, connected).await.unwrap_or_else(|_| Err(silence()))?;
    let closing = connection.clone();
    let greeted = timeout(limit, connection::greet(core, connection, &peer.name, replaces)).await;
    greeted.unwrap_or_else(|_| {
        refused::close(&closing, code::UNWANTED, "it took too long");
        Err(silence())
    })
}

/// The first of the addresses that answers.
async fn first(
    endpoint: &Endpoint,
    client: &ClientConfig,
    addresses: &[SocketAddr],
    name: &str,
) -> Result<Connection, Why> {
    let mut attempts = JoinSet::new();
    for (number, address) in addresses.iter().enumerate() {
        let (endpoint, client, name, address) = (endpoint.clone(), client.clone(), name.to_owned(), *address);
        attempts.spawn(async move {
            sleep(STAGGER * number as u32).await;
            let connecting = endpoint.connect_with(client, address, &name);
            connecting.map_err(|error| Why::new(error.to_string(), ""))?.await.map_err(|error| why(&error))
        });
    }
    let mut last = Why::new("it has no address", "");
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => last = error,
            Err(error) => last = Why::new(error.to_string(), ""),
        }
    }
    Err(last)
}

/// Opens the port; one that cannot be had is told once, and tried again until it can.
pub(super) async fn open(core: &Core, listen: SocketAddr) -> Port {
    let mut told = false;
    loop {
        match Port::open(listen, &core.settings) {
            Ok(port) => return port,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    let mend = match error.kind() {
                        io::ErrorKind::AddrInUse => "another program has this port: end it",
                        io::ErrorKind::AddrNotAvailable => "give a network interface this address",
                        io::ErrorKind::PermissionDenied => "choose a port from 1024 up",
                        _ => "see the cause",
                    };
                    let mend = format!("{mend}, or set another node.listen; ftd tries again by itself");
                    core.blocked(Why::new(format!("{listen}: {error}"), mend));
                }
                sleep(AGAIN).await;
            }
        }
    }
}

/// How often a port that cannot be had is tried.
const AGAIN: Duration = Duration::from_secs(2);

/// A port of its own for one talk with a cluster that this node is not in.
pub(super) fn joining(address: SocketAddr) -> Result<Endpoint, ClusterError> {
    let any: SocketAddr = if address.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    Endpoint::client(any).map_err(ClusterError::crypto("no UDP port can be had"))
}
