//! Other nodes: who they are, and talking with them.
//!
//! ```text
//! ca, identity, token, x509   who is a node of this cluster, and how one becomes it
//! tls, endpoint, join, renew  the UDP port: who gets in; new certificates, lists of revoked ones
//! table                       all peers, and for each the one connection that counts
//! connection, wire, beats     one connection: requests, bulk, heartbeats
//! ```
//!
//! One QUIC connection per pair of nodes carries all: heartbeats as datagrams, requests as streams of their own, bulk as
//! streams that come after these. Whoever is at the other end has shown a certificate of the cluster's CA, and the name
//! in it is who he is. What is said over it is the business of the parts above: they register what they answer
//! ([`Peers::serve`], [`Peers::serve_bulk`]) and ask others ([`Peers::call`], [`Peers::bulk`]).
//!
//! A node that is in no cluster has no open port.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use futures_util::future::BoxFuture;
use quinn::RecvStream;
use tokio::{sync::watch, time::timeout};

use crate::{
    config::{Config, cluster::Cluster},
    event::{Kind, bus::Bus},
};

mod beats;
mod ca;
mod connection;
mod disk;
mod endpoint;
mod error;
mod identity;
mod join;
mod refused;
mod renew;
mod status;
mod table;
mod tls;
mod token;
mod wire;
mod x509;

#[cfg(test)]
pub(crate) mod tests;

use self::{
    ca::Authority,
    endpoint::Port,
    identity::Identity,
    refused::{Refusals, Why, code},
    table::Table,
    tls::Tls,
    token::Token,
    x509::Revoked,
};
pub use self::{
    connection::{CallError, Outgoing},
    error::ClusterError,
    status::{CertificateStatus, ClusterStatus, Joined, PeerState, PeerStatus, TokenMade},
    wire::{Bulk, Call, LONGEST, Refusal, WireError, fuzz, service},
};

/// Bulk that comes from a peer. Reads like any stream.
pub type Incoming = RecvStream;
/// The other nodes. Cheap to clone; all clones are the same.
#[derive(Debug, Clone)]
pub struct Peers {
    core: Arc<Core>,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The node, by the name in its certificate.
    pub node: String,
    /// Where its packets come from.
    pub address: SocketAddr,
}

/// Makes an answer of a request, both as they go over the wire.
type Answering = dyn Fn(Caller, Vec<u8>) -> BoxFuture<'static, Vec<u8>> + Send + Sync;

/// How requests of a kind are answered.
struct Service {
    longest: u32,
    run: Box<Answering>,
}

/// How bulk of a kind is taken.
struct BulkService {
    longest: u32,
    run: Box<dyn Fn(Caller, Vec<u8>, Incoming) -> BoxFuture<'static, ()> + Send + Sync>,
}

/// What the parts of this module share.
struct Core {
    node: String,
    settings: Cluster,
    listen: Option<SocketAddr>,
    peers: Vec<crate::config::cluster::Peer>,
    /// `cluster` in the state directory.
    dir: PathBuf,
    bus: Arc<Bus>,
    /// Differs from run to run.
    run: u64,
    services: RwLock<HashMap<u16, Arc<Service>>>,
    bulk: RwLock<HashMap<u16, Arc<BulkService>>>,
    table: Mutex<Table>,
    changes: watch::Sender<u64>,
    refusals: Refusals,
    attempts: Mutex<join::Attempts>,
    state: Mutex<State>,
    /// The CA, where it is on this node. Waits for disks: locked only on threads where that may be.
    authority: Mutex<Option<Authority>>,
    /// Held while who this node is changes, by whoever changes it.
    changing: tokio::sync::Mutex<()>,
}

/// Who this node is, and what it has open.
#[derive(Default)]
struct State {
    identity: Option<Arc<Identity>>,
    /// The CA's certificate and all that it has issued are here.
    is_authority: bool,
    /// Until when somebody may join.
    joins_until: Option<jiff::Timestamp>,
    list: Option<(Vec<u8>, Revoked)>,
    tls: Option<Tls>,
    port: Option<Port>,
    /// Why there is no port.
    problem: Option<Why>,
    tasks: Vec<tokio::task::AbortHandle>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Peers {
    /// What the configuration says, with the identity that this node has, if any. Ends nothing when something is wrong
    /// with it: that is an event.
    pub async fn start(config: &Config, bus: Arc<Bus>) -> Self {
        let mut run = [0; 8];
        let _ = ca::random(&mut run);
        let core = Core {
            node: config.node_name(),
            settings: config.cluster.clone(),
            listen: config.node.listen,
            peers: config.peers(),
            dir: config.node.state_dir.join("cluster"),
            bus,
            run: u64::from_le_bytes(run),
            services: RwLock::default(),
            bulk: RwLock::default(),
            table: Mutex::default(),
            changes: watch::Sender::new(0),
            refusals: Refusals::default(),
            attempts: Mutex::default(),
            state: Mutex::default(),
            authority: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        };
        let peers = Self { core: Arc::new(core) };
        renew::serve(&peers);
        if peers.core.listen.is_some()
            && let Err(error) = peers.core.resume().await
        {
            peers.core.blocked(Why::new(error.to_string(), error.mend()));
        }
        peers
    }

    /// This node's name.
    pub fn node(&self) -> &str {
        &self.core.node
    }

    /// Answers requests of a kind from now on.
    pub fn serve<C, F>(&self, answer: impl Fn(Caller, C) -> F + Send + Sync + 'static)
    where
        C: Call,
        F: Future<Output = Result<C::Answer, Refusal>> + Send + 'static,
    {
        let answer = Arc::new(answer);
        let run = move |caller: Caller, body: Vec<u8>| -> BoxFuture<'static, Vec<u8>> {
            let answer = Arc::clone(&answer);
            Box::pin(async move {
                match connection::decoded::<C>(&body) {
                    Ok(request) => connection::encoded::<C>(answer(caller, request).await),
                    Err(nonsense) => nonsense,
                }
            })
        };
        let service = Service { longest: C::LONGEST.min(LONGEST), run: Box::new(run) };
        let mut services = self.core.services.write().unwrap_or_else(PoisonError::into_inner);
        services.insert(C::SERVICE, Arc::new(service));
    }

    /// Takes bulk of a kind from now on.
    pub fn serve_bulk<B, F>(&self, take: impl Fn(Caller, B, Incoming) -> F + Send + Sync + 'static)
    where
        B: Bulk,
        F: Future<Output = ()> + Send + 'static,
    {
        let run = move |caller: Caller, head: Vec<u8>, stream: Incoming| -> BoxFuture<'static, ()> {
            match connection::decoded::<B>(&head) {
                Ok(head) => Box::pin(take(caller, head, stream)),
                // Dropping the stream tells the other side.
                Err(_) => Box::pin(async {}),
            }
        };
        let service = BulkService { longest: B::LONGEST.min(LONGEST), run: Box::new(run) };
        let mut services = self.core.bulk.write().unwrap_or_else(PoisonError::into_inner);
        services.insert(B::SERVICE, Arc::new(service));
    }

    /// Asks a node, and waits for its answer, as long as `cluster.call_within`. An error does not always say that
    /// nothing was done there: see [`CallError`].
    pub async fn call<C: Call>(&self, node: &str, request: &C) -> Result<C::Answer, CallError> {
        self.call_for(node, request, self.core.settings.call_within).await
    }

    /// The same, with another limit.
    pub async fn call_for<C: Call>(
        &self,
        node: &str,
        request: &C,
        limit: Duration,
    ) -> Result<C::Answer, CallError> {
        let live = self.core.reach(node)?;
        let late = || CallError::Late { peer: node.to_owned(), limit };
        timeout(limit, live.ask(request)).await.map_err(|_| late())?
    }

    /// Begins to send bulk to a node. Dropped before it is finished, it is broken off.
    pub async fn bulk<B: Bulk>(&self, node: &str, head: &B) -> Result<Outgoing, CallError> {
        let limit = self.core.settings.call_within;
        let live = self.core.reach(node)?;
        let late = || CallError::Late { peer: node.to_owned(), limit };
        timeout(limit, live.bulk(head)).await.map_err(|_| late())?
    }

    /// Whether there is a connection with this node.
    pub fn connected(&self, node: &str) -> bool {
        self.core.reach(node).is_ok()
    }

    /// The run of ftd that this node is connected with, by a number; `None`: there is no connection. Another number: what
    /// was asked of the run before, and is not answered yet, never will be. A killed ftd says no good-bye.
    ///
    /// A connection that takes another's place is no end: what is under way on the old one is done, or breaks by itself.
    pub fn run_of(&self, node: &str) -> Option<u64> {
        self.core.reach(node).ok().map(|live| live.hello.run)
    }

    /// Changes whenever a connection comes or goes: who waits for one looks again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.core.changes.subscribe()
    }

    /// Makes a cluster whose first node is this one.
    pub async fn init(&self, cluster: &str) -> Result<ClusterStatus, ClusterError> {
        let _changing = self.core.may_change()?.lock().await;
        self.core.in_none()?;
        let (dir, cluster) = (self.core.dir.clone(), cluster.to_owned());
        let (node, settings) = (self.core.node.clone(), self.core.settings.clone());
        let made =
            on_the_disk(move || Authority::make(&dir, &cluster, &node, &settings, jiff::Timestamp::now()));
        let (authority, identity, list) = made.await?;
        self.core.has_authority(Some(authority));
        self.core.become_node(identity, Some(list)).await?;
        self.core.run_port();
        Ok(self.status())
    }

    /// A token with which one node can join, within this time. `addresses`: where this node is reached, if not where it
    /// listens.
    pub async fn token(
        &self,
        lasting: Option<Duration>,
        addresses: &[SocketAddr],
    ) -> Result<TokenMade, ClusterError> {
        let core = &self.core;
        let listen = core.listen.ok_or(ClusterError::Off)?;
        let identity = core.identity().ok_or(ClusterError::Alone)?;
        let lasting = lasting.unwrap_or(core.settings.token_for);
        if lasting < Duration::from_secs(1) || lasting > core.settings.token_longest {
            let text = humantime::format_duration;
            return Err(ClusterError::Time { asked: text(lasting), most: text(core.settings.token_longest) });
        }
        let addresses = if addresses.is_empty() { own_addresses(listen) } else { addresses.to_vec() };
        let until = jiff::Timestamp::now().checked_add(lasting).unwrap_or(jiff::Timestamp::MAX);
        let (authority, secret) = core
            .with_authority(move |authority, _| {
                let secret = authority.open(until, jiff::Timestamp::now())?;
                Ok((authority.fingerprint()?, secret))
            })
            .await?;
        core.rearm();
        core.close_door_later();
        let (node, cluster) = (identity.node.clone(), identity.cluster.clone());
        let token = Token { authority, node, addresses: addresses.clone(), secret, until: until.as_second() };
        Ok(TokenMade { token: token.text(), cluster, until, addresses })
    }

    /// Joins the cluster of a token.
    pub async fn join(&self, token: &str) -> Result<Joined, ClusterError> {
        let _changing = self.core.may_change()?.lock().await;
        self.core.in_none()?;
        let token = Token::parse(token).map_err(|cause| ClusterError::Token { cause: cause.into() })?;
        let limit = self.core.settings.handshake_within;
        let (identity, list, pending) = join::join(&token, &self.core.node, limit).await?;
        let facts = identity.facts()?;
        let joined = Joined { cluster: identity.cluster.clone(), by: token.node.clone(), until: facts.until };
        self.core.become_node(identity, Some(list)).await?;
        pending.confirm().await;
        self.core.run_port();
        Ok(joined)
    }

    /// Revokes all certificates of a node, here at once, and on the other nodes as soon as they can be reached.
    pub async fn revoke(&self, node: &str) -> Result<(), ClusterError> {
        self.core.identity().ok_or(ClusterError::Alone)?;
        let name = node.to_owned();
        let list = self
            .core
            .with_authority(move |authority, _| authority.revoke(&name, jiff::Timestamp::now()))
            .await?;
        self.core.take_list(&list).await?;
        self.core.bus.emit(None, None, Kind::PeerRevoked { peer: node.to_owned() });
        Ok(())
    }

    /// Says good-bye to all peers, and waits a moment for it to be heard.
    pub async fn stop(&self) {
        let port = self.core.state().port.take();
        for task in std::mem::take(&mut self.core.state().tasks) {
            task.abort();
        }
        if let Some(port) = port {
            port.endpoint.close(quinn::VarInt::from_u32(code::STOPPING), b"ftd stops");
            let _ = timeout(Duration::from_millis(200), port.endpoint.wait_idle()).await;
        }
    }
}

/// Where others reach a node that listens everywhere: all its addresses but those that are its own business.
fn own_addresses(listen: SocketAddr) -> Vec<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    let all = all.filter_map(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| std::net::IpAddr::V4(v4.ip()));
        v4.or_else(|| Some(address.as_sockaddr_in6()?.ip().into()))
    });
    let other = |ip: &std::net::IpAddr| match ip {
        std::net::IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        std::net::IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && listen.is_ipv6(),
    };
    all.filter(other).map(|ip| SocketAddr::new(ip, listen.port())).take(token::ADDRESSES).collect()
}

/// Does something that waits for a disk, on a thread where it may.
async fn on_the_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClusterError> + Send + 'static,
) -> Result<T, ClusterError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(ClusterError::Crypto { what: "it was broken off", cause: error.to_string() }),
    }
}

impl Core {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        self.state().identity.clone()
    }

    fn port(&self) -> Option<Port> {
        self.state().port.clone()
    }

    fn tls(&self) -> Option<Tls> {
        self.state().tls.clone()
    }

    fn list(&self) -> Option<Vec<u8>> {
        self.state().list.as_ref().map(|(list, _)| list.clone())
    }

    fn list_number(&self) -> u64 {
        self.state().list.as_ref().map_or(0, |(_, read)| read.number)
    }

    fn is_revoked(&self, serial: &str) -> bool {
        self.state().list.as_ref().is_some_and(|(_, read)| read.serials.contains(serial))
    }

    fn service(&self, number: u16) -> Option<Arc<Service>> {
        self.services.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    fn bulk_service(&self, number: u16) -> Option<Arc<BulkService>> {
        self.bulk.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    fn hello(&self, replaces: bool) -> connection::Hello {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        connection::Hello { version, run: self.run, replaces, list: self.list_number() }
    }

    fn reach(&self, node: &str) -> Result<Arc<connection::Live>, CallError> {
        let open = self.current(node).filter(|live| live.connection.close_reason().is_none());
        open.ok_or_else(|| {
            let why = self.table(|table| table.slots.get(node).map(|slot| slot.why.clone()));
            let cause = match why {
                None => "it is not among cluster.peers, and has not come by itself".to_owned(),
                Some(None) => "there is no connection yet".into(),
                Some(Some(why)) => why.cause,
            };
            CallError::Unreachable { peer: node.to_owned(), cause }
        })
    }

    fn may_change(&self) -> Result<&tokio::sync::Mutex<()>, ClusterError> {
        self.listen.map(|_| &self.changing).ok_or(ClusterError::Off)
    }

    fn in_none(&self) -> Result<(), ClusterError> {
        match self.identity() {
            None => Ok(()),
            Some(identity) => {
                Err(ClusterError::Member { cluster: identity.cluster.clone(), node: identity.node.clone() })
            }
        }
    }

    /// Why there is no port; told.
    fn blocked(&self, why: Why) {
        tracing::error!(cause = why.cause, "peers cannot reach this node");
        self.state().problem = Some(why.clone());
        self.bus.emit(None, None, Kind::PeersBlocked { cause: why.cause, mend: why.mend });
    }

    /// Takes up what an earlier run has left.
    async fn resume(self: &Arc<Self>) -> Result<(), ClusterError> {
        let dir = self.dir.clone();
        let loaded = on_the_disk(move || {
            let Some(identity) = Identity::load(&dir)? else { return Ok(None) };
            let path = dir.join("revoked.crl");
            let list = disk::read(&path).map_err(ClusterError::disk(&path))?;
            Ok(Some((identity, Authority::load(&dir)?, list)))
        });
        let Some((identity, authority, list)) = loaded.await? else { return Ok(()) };
        if identity.node != self.node {
            return Err(ClusterError::Crypto {
                what: "this node cannot be in its cluster",
                cause: format!(
                    "it is called {} (node.name), and its certificate is for {}",
                    self.node, identity.node
                ),
            });
        }
        let read = list.map(|list| {
            let read = x509::revoked(&list, &identity.authority()?);
            let failed = ClusterError::crypto("cluster/revoked.crl in node.state_dir cannot be used");
            Ok::<_, ClusterError>((list, read.map_err(failed)?))
        });
        let read = read.transpose()?;
        // One that is left of an attempt to make another cluster is not this one's.
        self.has_authority(authority.filter(|_| identity.issuer == self.node));
        {
            let mut state = self.state();
            (state.identity, state.list) = (Some(Arc::new(identity)), read);
        }
        self.run_port();
        Ok(())
    }

    fn has_authority(&self, authority: Option<Authority>) {
        let joins = authority.as_ref().and_then(|authority| authority.open_until(jiff::Timestamp::now()));
        let mut state = self.state();
        (state.is_authority, state.joins_until) = (authority.is_some(), joins);
        drop(state);
        *self.authority.lock().unwrap_or_else(PoisonError::into_inner) = authority;
    }

    /// Stores who this node is, and goes by it.
    async fn become_node(&self, identity: Identity, list: Option<Vec<u8>>) -> Result<(), ClusterError> {
        if let Some(list) = list {
            let read = x509::revoked(&list, &identity.authority()?)
                .map_err(|cause| ClusterError::Crypto { what: "a list was refused", cause })?;
            self.keep_list(list, read).await?;
        }
        let (dir, stored) = (self.dir.clone(), identity.clone());
        on_the_disk(move || stored.save(&dir)).await?;
        self.state().identity = Some(Arc::new(identity));
        self.rearm();
        Ok(())
    }

    async fn keep_list(&self, list: Vec<u8>, read: Revoked) -> Result<(), ClusterError> {
        let (path, bytes) = (self.dir.join("revoked.crl"), list.clone());
        on_the_disk(move || disk::write(&path, &bytes).map_err(ClusterError::disk(&path))).await?;
        self.state().list = Some((list, read));
        Ok(())
    }

    /// Does something with the CA, if it is here.
    async fn with_authority<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Authority, &Cluster) -> Result<T, ClusterError> + Send + 'static,
    ) -> Result<T, ClusterError> {
        let core = Arc::clone(self);
        on_the_disk(move || {
            let on = core.identity().ok_or(ClusterError::Alone)?.issuer.clone();
            let mut authority = core.authority.lock().unwrap_or_else(PoisonError::into_inner);
            let authority = authority.as_mut().ok_or(ClusterError::Elsewhere { on })?;
            let done = work(authority, &core.settings);
            core.state().joins_until = authority.open_until(jiff::Timestamp::now());
            done
        })
        .await
    }

    /// Goes by the identity, the list and the tokens that there are now.
    fn rearm(&self) {
        let mut state = self.state();
        let Some(identity) = state.identity.clone() else { return };
        let joins = state.joins_until.is_some_and(|until| until > jiff::Timestamp::now());
        let list = state.list.as_ref().map(|(list, _)| list.as_slice());
        match Tls::new(&identity, list, joins) {
            Ok(tls) => {
                if let Some(port) = &state.port {
                    port.arm(&tls, &self.settings);
                }
                state.tls = Some(tls);
            }
            Err(error) => {
                drop(state);
                self.blocked(Why::new(error.to_string(), error.mend()));
            }
        }
    }

    /// The port takes in nobody without a certificate any more when the last token has ended.
    fn close_door_later(self: &Arc<Self>) {
        let Some(until) = self.state().joins_until else { return };
        let left = Duration::try_from(until.duration_since(jiff::Timestamp::now())).unwrap_or_default();
        let core = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(left + Duration::from_millis(10)).await;
            core.rearm();
        });
    }

    /// Opens the port, and does all that goes on while it is open.
    fn run_port(self: &Arc<Self>) {
        let Some(listen) = self.listen else { return };
        let core = Arc::clone(self);
        let opening = tokio::spawn(async move {
            let port = endpoint::open(&core, listen).await;
            {
                let mut state = core.state();
                (state.port, state.problem) = (Some(port.clone()), None);
            }
            core.rearm();
            // Of tokens that an earlier run has made.
            core.close_door_later();
            let (name, until) = match core.identity().map(|identity| identity.facts()) {
                Some(Ok(facts)) => (facts.name, facts.until),
                _ => return,
            };
            core.bus.emit(None, None, Kind::PeersReady { name, address: listen.to_string(), until });
            for peer in core.peers.clone() {
                core.expect(&peer);
                core.spawn(endpoint::keep(Arc::clone(&core), peer));
            }
            core.spawn(renew::spread(Arc::clone(&core)));
            core.spawn(renew::keep(Arc::clone(&core)));
            let telling = Arc::clone(&core);
            core.spawn(async move { telling.refusals.keep_telling(&telling.bus).await });
            core.spawn(endpoint::accept(Arc::clone(&core), port));
        });
        self.state().tasks.push(opening.abort_handle());
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(task).abort_handle();
        self.state().tasks.push(task);
    }
}
