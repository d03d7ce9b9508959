//! One connection with a peer: the greeting, requests both ways, bulk, heartbeats.
//!
//! A client that TLS turns away sees its side of the handshake succeed and learns of it only after. So a
//! connection counts when the greeting was answered, not before.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use super::{
    Caller, Core,
    beats::{Beats, Rate},
    refused::{self, Why, code, why},
    table::Claim,
    wire::{self, Beat, Bulk, Call, Outcome, Refusal, WireError, service},
    x509::{self, Facts},
};

/// Requests and their answers go before bulk.
const URGENT: i32 = 1;
const BULK: i32 = -1;

/// Who is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// ftd's version.
    pub(super) version: String,
    /// Differs from run to run of ftd.
    pub(super) run: u64,
    /// This connection is to take the place of the one that there is.
    pub(super) replaces: bool,
    /// The number of the newest list of revoked certificates that it knows.
    pub(super) list: u64,
}

/// What is said to that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Welcome {
    /// This connection counts.
    Yes(Hello),
    /// There is another one.
    Double,
}

impl Call for Hello {
    type Answer = Welcome;
    const SERVICE: u16 = service::HELLO;
    const LONGEST: u32 = 1 << 10;
    const LONGEST_ANSWER: u32 = 1 << 10;
}

/// A connection that has been greeted.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) peer: String,
    pub(super) connection: Connection,
    pub(super) address: SocketAddr,
    /// This node has dialled.
    pub(super) ours: bool,
    pub(super) replaces: bool,
    pub(super) hello: Hello,
    /// The peer's certificate.
    pub(super) facts: Facts,
    born: Instant,
    /// When something was last heard, microseconds after `born`.
    heard: AtomicU64,
    measured: Mutex<(Beats, Rate)>,
    /// Requests and bulk that are under way, either way.
    busy: watch::Sender<usize>,
}

/// One more that is under way, as long as it lives.
#[derive(Debug)]
pub(super) struct Busy(Arc<Live>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.send_modify(|busy| *busy -= 1);
    }
}

/// Why a peer did not answer a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// There is no connection.
    #[error("{peer} cannot be reached: {cause}")]
    Unreachable {
        /// The peer.
        peer: String,
        /// Why not, as far as is known.
        cause: String,
    },
    /// It took too long.
    #[error("{peer} does not answer within {}", humantime::format_duration(*limit))]
    Late {
        /// The peer.
        peer: String,
        /// The time it had.
        limit: Duration,
    },
    /// The connection broke, or what came makes no sense. Whether the request was met is not known.
    #[error("the talk with {peer} broke off: {source}")]
    Broken {
        /// The peer.
        peer: String,
        /// How.
        source: WireError,
    },
    /// Too long to be sent, or not to be encoded: nothing was sent.
    #[error("a request to {peer} cannot be sent: {source}")]
    Unsendable {
        /// The peer.
        peer: String,
        /// Why.
        source: WireError,
    },
    /// It does not know such requests.
    #[error("{peer} does not know such requests: its ftd is of another version, or does not do that")]
    Unknown {
        /// The peer.
        peer: String,
    },
    /// It says no.
    #[error("{peer}: {refusal}")]
    Refused {
        /// The peer.
        peer: String,
        /// Why, and what to do.
        refusal: Refusal,
    },
}

impl Live {
    /// When nothing was heard last: how long ago that is.
    pub(super) fn silence(&self) -> Duration {
        let heard = self.born + Duration::from_micros(self.heard.load(Ordering::Relaxed));
        heard.elapsed()
    }

    fn hear(&self) {
        let now = self.born.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        self.heard.fetch_max(now, Ordering::Relaxed);
    }

    pub(super) fn claim(&self, core: &Core) -> Claim {
        let silent = self.silence() > core.settings.silent_after || self.connection.close_reason().is_some();
        Claim { ours: self.ours, replaces: self.replaces, run: self.hello.run, silent }
    }

    /// How many requests and bulk transfers are under way.
    pub(super) fn busy(&self) -> watch::Receiver<usize> {
        self.busy.subscribe()
    }

    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        self.busy.send_modify(|busy| *busy += 1);
        Busy(Arc::clone(self))
    }

    pub(super) fn measured(&self) -> MutexGuard<'_, (Beats, Rate)> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, and waits for the answer.
    pub(super) async fn ask<C: Call>(self: &Arc<Self>, request: &C) -> Result<C::Answer, CallError> {
        let _busy = self.begin();
        ask(&self.connection, &self.peer, request).await
    }

    /// Begins a bulk transfer.
    pub(super) async fn bulk<B: Bulk>(self: &Arc<Self>, head: &B) -> Result<Outgoing, CallError> {
        let busy = self.begin();
        let peer = || self.peer.clone();
        let bytes = wire::encode(B::SERVICE, B::LONGEST, head)
            .map_err(|source| CallError::Unsendable { peer: peer(), source })?;
        let broken = |error: String| CallError::Broken { peer: peer(), source: WireError::Short(error) };
        let stream = self.connection.open_uni().await.map_err(|error| broken(error.to_string()))?;
        let _ = stream.set_priority(BULK);
        let mut outgoing = Outgoing { stream, _busy: busy };
        outgoing.write(bytes).await.map_err(|error| broken(error.to_string()))?;
        Ok(outgoing)
    }
}

/// Bulk that goes to a peer. Dropped before it is finished, it is broken off.
#[derive(Debug)]
pub struct Outgoing {
    stream: SendStream,
    /// The connection is not given up before this is done.
    _busy: Busy,
}

impl Outgoing {
    /// Sends these bytes, as soon as the other side takes them.
    pub async fn write(&mut self, bytes: impl Into<Bytes>) -> Result<(), WireError> {
        let written = self.stream.write_chunk(bytes.into()).await;
        written.map_err(|error| WireError::Short(error.to_string()))
    }

    /// Says that this was all, and waits until all of it has arrived. That it was read is not said by that.
    pub async fn finish(mut self) -> Result<(), WireError> {
        let short = |error: String| WireError::Short(error);
        self.stream.finish().map_err(|error| short(error.to_string()))?;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(short("the other side does not want it".into())),
            Err(error) => Err(short(error.to_string())),
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // Without this the other side would take it for whole. After a finish it does nothing.
        let _ = self.stream.reset(quinn::VarInt::from_u32(code::UNWANTED));
    }
}

/// Asks over a connection that may not count yet.
async fn ask<C: Call>(connection: &Connection, peer: &str, request: &C) -> Result<C::Answer, CallError> {
    let peer = || peer.to_owned();
    let bytes = wire::encode(C::SERVICE, C::LONGEST, request)
        .map_err(|source| CallError::Unsendable { peer: peer(), source })?;
    let exchange = async {
        let opened = connection.open_bi().await;
        let (mut send, mut receive) = opened.map_err(|error| WireError::Short(error.to_string()))?;
        let _ = send.set_priority(URGENT);
        wire::send(&mut send, &bytes).await?;
        wire::read_answer(&mut receive, C::LONGEST_ANSWER).await
    };
    let broken = |source| CallError::Broken { peer: peer(), source };
    let (outcome, body) = exchange.await.map_err(broken)?;
    match outcome {
        Outcome::Answer => wire::decode(&body).map_err(broken),
        Outcome::Unknown => Err(CallError::Unknown { peer: peer() }),
        Outcome::Refusal | Outcome::Nonsense => {
            Err(CallError::Refused { peer: peer(), refusal: wire::decode(&body).map_err(broken)? })
        }
    }
}

/// What the certificate that the other side has shown says.
fn shown(connection: &Connection) -> Result<Facts, Why> {
    let chain =
        connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let first = chain.as_ref().and_then(|chain| chain.first());
    let first = first.ok_or_else(|| {
        Why::new("it shows no certificate", "only nodes of the cluster are let in: ftctl cluster join")
    })?;
    x509::facts(first).map_err(|cause| Why::new(format!("its certificate makes no sense: {cause}"), ""))
}

fn live(connection: Connection, ours: bool, replaces: bool, hello: Hello, facts: Facts) -> Arc<Live> {
    Arc::new(Live {
        peer: facts.name.clone(),
        address: super::endpoint::plain(connection.remote_address()),
        connection,
        ours,
        replaces,
        hello,
        facts,
        born: Instant::now(),
        heard: AtomicU64::new(0),
        measured: Mutex::default(),
        busy: watch::Sender::new(0),
    })
}

/// Greets the peer on a connection that this node has dialled. `Ok(false)`: there is another one.
pub(super) async fn greet(
    core: &Arc<Core>,
    connection: Connection,
    peer: &str,
    replaces: bool,
) -> Result<bool, Why> {
    let facts = shown(&connection)?;
    let hello = ask(&connection, peer, &core.hello(replaces)).await;
    let hello = match hello {
        Ok(Welcome::Yes(hello)) => hello,
        Ok(Welcome::Double) => {
            refused::close(&connection, code::DOUBLE, "another connection is used");
            return Ok(false);
        }
        // What TLS says of the end is the better reason.
        Err(error) => {
            return Err(match connection.close_reason() {
                Some(reason) => why(&reason),
                None => Why::new(error.to_string(), ""),
            });
        }
    };
    let live = live(connection, true, replaces, hello, facts);
    core.adopt(&live);
    tokio::spawn(serve(Arc::clone(core), live));
    Ok(true)
}

/// Waits for the greeting on a connection that the other side has dialled.
pub(super) async fn welcome(core: &Arc<Core>, connection: Connection) -> Result<(), Why> {
    let refuse = |why: Why| {
        refused::close(&connection, code::UNWANTED, &why.cause);
        Err(why)
    };
    let facts = match shown(&connection) {
        Ok(facts) if facts.name == core.node => {
            let mend =
                "a node's keys must be on one host alone: revoke the other, and let it join by its own name";
            return refuse(Why::new(format!("it calls itself {}, as this node does", facts.name), mend));
        }
        Ok(facts) => facts,
        Err(why) => return refuse(why),
    };
    // Who dials two addresses drops the connection that comes second.
    let Ok((mut send, mut receive)) = connection.accept_bi().await else { return Ok(()) };
    let greeting = async {
        let odd = |error: WireError| Why::new(format!("its greeting cannot be read: {error}"), "");
        let head = wire::read_head(&mut receive).await.map_err(odd)?;
        if head.service != service::HELLO {
            return Err(Why::new("it does not greet", "are both of one version of ftd?"));
        }
        let body = wire::read_body(&mut receive, head.length, Hello::LONGEST).await.map_err(odd)?;
        wire::decode::<Hello>(&body).map_err(odd)
    };
    let hello = match greeting.await {
        Ok(hello) => hello,
        Err(why) => return refuse(why),
    };
    let replaces = hello.replaces;
    let live = live(connection.clone(), false, replaces, hello, facts);
    let won = core.adopt(&live);
    let answer = if won { Welcome::Yes(core.hello(false)) } else { Welcome::Double };
    let answer = wire::encode_answer(Outcome::Answer, Hello::LONGEST_ANSWER, &answer);
    if let Ok(answer) = answer {
        let _ = wire::send(&mut send, &answer).await;
    }
    tokio::spawn(serve(Arc::clone(core), live));
    Ok(())
}

/// Does all that a connection is for, until it ends.
async fn serve(core: Arc<Core>, live: Arc<Live>) {
    let until = live.facts.until.duration_since(jiff::Timestamp::now());
    let until = Duration::try_from(until).unwrap_or_default();
    let reason = tokio::select! {
        reason = live.connection.closed() => reason,
        () = requests(&core, &live) => live.connection.closed().await,
        () = bulk(&core, &live) => live.connection.closed().await,
        () = hear(&live) => live.connection.closed().await,
        () = beat(&core, &live) => live.connection.closed().await,
        () = tokio::time::sleep(until) => {
            refused::close(&live.connection, code::EXPIRED, "its certificate has ended");
            core.lost(&live, Why::new("its certificate has ended", "it renews it by itself when it reaches the node \
                with the CA; else: ftctl cluster join"), true);
            return;
        }
    };
    let farewell = matches!(&reason, ConnectionError::ApplicationClosed(close)
        if close.error_code.into_inner() == u64::from(code::STOPPING));
    tracing::debug!(peer = live.peer, %reason, "a connection has ended");
    core.lost(&live, why(&reason), farewell);
}

/// Answers requests, as long as the connection lasts.
async fn requests(core: &Arc<Core>, live: &Arc<Live>) {
    // At most as many at a time as the transport allows the other side to open.
    while let Ok((send, receive)) = live.connection.accept_bi().await {
        let (core, busy) = (Arc::clone(core), live.begin());
        tokio::spawn(async move {
            if let Err(error) = answer(&core, &busy.0, send, receive).await {
                tracing::debug!(peer = busy.0.peer, %error, "a request was not answered");
            }
        });
    }
}

async fn answer(
    core: &Core,
    live: &Live,
    mut send: SendStream,
    mut receive: RecvStream,
) -> Result<(), WireError> {
    let _ = send.set_priority(URGENT);
    let asked = async {
        let head = wire::read_head(&mut receive).await?;
        let Some(service) = core.service(head.service) else { return Ok(None) };
        let body = wire::read_body(&mut receive, head.length, service.longest).await?;
        Ok(Some((service, body)))
    };
    let late = || Err(WireError::Short("it did not come in time".into()));
    let answer = match timeout(core.settings.call_within, asked).await.unwrap_or_else(|_| late()) {
        Ok(Some((service, body))) => (service.run)(live.caller(), body).await,
        Ok(None) => wire::encode_answer(Outcome::Unknown, wire::LONGEST_REFUSAL, &())?,
        Err(error) => {
            let refusal = Refusal::new(&error, "are both of one version of ftd?");
            let bytes = wire::encode_answer(Outcome::Nonsense, wire::LONGEST_REFUSAL, &refusal)?;
            let _ = receive.stop(quinn::VarInt::from_u32(code::UNWANTED));
            bytes
        }
    };
    wire::send(&mut send, &answer).await
}

impl Live {
    fn caller(&self) -> Caller {
        Caller { node: self.peer.clone(), address: self.address }
    }
}

/// An answer of a service, as it goes over the wire.
pub(super) fn encoded<C: Call>(answer: Result<C::Answer, Refusal>) -> Vec<u8> {
    let bytes = match answer {
        Ok(answer) => wire::encode_answer(Outcome::Answer, C::LONGEST_ANSWER, &answer),
        Err(refusal) => wire::encode_answer(Outcome::Refusal, wire::LONGEST_REFUSAL, &refusal),
    };
    let cut = |error: WireError| {
        let refusal = Refusal::new(format!("the answer cannot be sent: {error}"), "");
        wire::encode_answer(Outcome::Refusal, wire::LONGEST_REFUSAL, &refusal)
    };
    bytes.or_else(cut).unwrap_or_default()
}

/// A request of a service; `Err`: the answer that says what is wrong with it.
pub(super) fn decoded<C: DeserializeOwned>(body: &[u8]) -> Result<C, Vec<u8>> {
    wire::decode(body).map_err(|error| {
        let refusal = Refusal::new(error, "are both of one version of ftd?");
        wire::encode_answer(Outcome::Nonsense, wire::LONGEST_REFUSAL, &refusal).unwrap_or_default()
    })
}

/// Takes bulk, as long as the connection lasts.
async fn bulk(core: &Arc<Core>, live: &Arc<Live>) {
    while let Ok(mut stream) = live.connection.accept_uni().await {
        let (core, busy) = (Arc::clone(core), live.begin());
        tokio::spawn(async move {
            let begun = async {
                let head = wire::read_head(&mut stream).await?;
                let Some(service) = core.bulk_service(head.service) else {
                    return Err(WireError::Nonsense(format!("service {} is not known here", head.service)));
                };
                let body = wire::read_body(&mut stream, head.length, service.longest).await?;
                Ok((service, body))
            };
            let late = || Err(WireError::Short("it did not come in time".into()));
            match timeout(core.settings.call_within, begun).await.unwrap_or_else(|_| late()) {
                Ok((service, body)) => (service.run)(busy.0.caller(), body, stream).await,
                Err(error) => {
                    tracing::debug!(peer = busy.0.peer, %error, "a bulk transfer was not taken");
                    let _ = stream.stop(quinn::VarInt::from_u32(code::UNWANTED));
                }
            }
        });
    }
}

/// Hears heartbeats, and answers them.
async fn hear(live: &Live) {
    while let Ok(datagram) = live.connection.read_datagram().await {
        live.hear();
        match Beat::decode(&datagram) {
            Some(Beat::Ping(number)) => {
                let _ = live.connection.send_datagram(Beat::Pong(number).encode().to_vec().into());
            }
            Some(Beat::Pong(number)) => live.measured().0.answered(number, Instant::now()),
            None => {}
        }
    }
}

/// Sends heartbeats, and notices silence.
async fn beat(core: &Arc<Core>, live: &Arc<Live>) {
    let mut turns = tokio::time::interval(core.settings.heartbeat);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut received = 0;
    let mut silent = false;
    loop {
        turns.tick().await;
        let now = Instant::now();
        let stats = live.connection.stats();
        // Bulk, too, tells that the other side lives.
        if stats.udp_rx.datagrams != received {
            received = stats.udp_rx.datagrams;
            live.hear();
        }
        let number = {
            let mut measured = live.measured();
            measured.1.sample(now, stats.udp_tx.bytes, stats.udp_rx.bytes);
            measured.0.send(now, core.settings.silent_after)
        };
        if live.connection.send_datagram(Beat::Ping(number).encode().to_vec().into()).is_err() {
            return;
        }
        let silence = live.silence();
        if silence > core.settings.down_after {
            // QUIC's own limit grows with the round trip, which a host that was frozen makes very long.
            refused::close(&live.connection, code::UNWANTED, "nothing was heard for too long");
            core.lost(live, why(&ConnectionError::TimedOut), false);
            return;
        }
        let now_silent = silence > core.settings.silent_after;
        if now_silent && !std::mem::replace(&mut silent, now_silent) {
            core.touch();
        }
        silent = now_silent;
    }
}
