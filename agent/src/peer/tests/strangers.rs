//! Those who should not get in, and what they send.

use super::{
    super::{
        tls::{JOIN, PEERS},
        wire,
    },
    *,
};

/// A QUIC client that does what it likes, with the certificate of this node, or with none.
pub(super) struct Raw {
    endpoint: Endpoint,
    client: ClientConfig,
}

impl Raw {
    pub(super) fn new(identity: Option<&Identity>, protocol: &[u8], trusted: &Node) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(trusted.peers.core.identity().unwrap().authority().unwrap()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut client = match identity {
            None => client.with_no_client_auth(),
            Some(identity) => {
                let chain = vec![identity.certificate().unwrap()];
                client.with_client_auth_cert(chain, identity.key().unwrap()).unwrap()
            }
        };
        client.alpn_protocols = vec![protocol.to_vec()];
        let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).unwrap();
        let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
        Self { endpoint, client: ClientConfig::new(Arc::new(client)) }
    }

    pub(super) async fn connect(&self, node: &Node) -> Result<Connection, quinn::ConnectionError> {
        self.endpoint.connect_with(self.client.clone(), node.address, &node.name).unwrap().await
    }

    /// Connects and waits for what comes of it: the end, with its reason.
    pub(super) async fn turned_away(&self, node: &Node) -> String {
        let end = async {
            match self.connect(node).await {
                Err(error) => error.to_string(),
                Ok(connection) => connection.closed().await.to_string(),
            }
        };
        timeout(LIMIT, end).await.expect("it is let in")
    }
}

/// An identity of the cluster under this name.
fn issued(by: &Node, name: &str) -> Identity {
    let mut authority = by.peers.core.authority.lock().unwrap();
    let wish = super::super::identity::Wish::new(name).unwrap();
    let request = wish.request().unwrap();
    let settings = &by.peers.core.settings;
    let issue = authority.as_mut().unwrap().renew(name, &request, settings, jiff::Timestamp::now());
    wish.fulfilled(issue.unwrap()).unwrap()
}

async fn founder(settings: &str) -> Node {
    let vm1 = Node::start("vm1", &[], settings).await;
    vm1.peers.init("c").await.unwrap();
    vm1.listening().await;
    vm1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_of_the_cluster_nobody_gets_in() {
    let vm1 = founder("").await;
    Raw::new(None, PEERS, &vm1).turned_away(&vm1).await;
    assert!(vm1.refused("it shows no certificate").await.contains("only nodes of the cluster"));
    // Of another cluster.
    let other = founder("").await;
    let stranger = issued(&other, "vm2");
    Raw::new(Some(&stranger), PEERS, &vm1).turned_away(&vm1).await;
    vm1.refused("is of another cluster").await;
    // While a token is open, too.
    vm1.peers.token(None, &[]).await.unwrap();
    Raw::new(None, PEERS, &vm1).turned_away(&vm1).await;
    Raw::new(Some(&stranger), PEERS, &vm1).turned_away(&vm1).await;
    Raw::new(Some(&stranger), JOIN, &vm1).turned_away(&vm1).await;
    // Another version of the protocol.
    let node = issued(&vm1, "vm2");
    let version = Raw::new(Some(&node), b"ftd/2", &vm1).turned_away(&vm1).await;
    vm1.refused("another version of ftd's protocol").await;
    assert!(version.contains("120") || version.contains("protocol"), "{version}");
    // The node's own name, from elsewhere.
    let own = issued(&vm1, "vm1");
    let own = Raw::new(Some(&own), PEERS, &vm1).turned_away(&vm1).await;
    assert!(own.contains("it calls itself vm1"), "{own}");
    vm1.refused("it calls itself vm1").await;
    assert!(vm1.peers.status().peers.is_empty(), "{:?}", vm1.peers.status());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_and_one_under_another_name_are_not_taken_for_a_peer() {
    let vm1 = founder("").await;
    // vm2 of another cluster, which vm1 dials.
    let other = founder("").await;
    let address = SocketAddr::from(([127, 0, 0, 1], port()));
    let vm2 = Node::start_at("vm2", address, &[("vm1", vm1.address)], "", tempfile::tempdir().unwrap()).await;
    vm2.peers.join(&other.peers.token(None, &[]).await.unwrap().token).await.unwrap();
    let mend = vm2.refused("is of another cluster").await;
    assert!(mend.contains("joined the same cluster"), "{mend}");
    vm2.event(|kind| matches!(kind, Kind::PeerDown { peer, up_ms: None, .. } if peer == "vm1")).await;
    // vm3 is where vm4 is expected.
    let vm3 = Node::start("vm3", &[], "").await;
    vm3.peers.join(&vm1.peers.token(None, &[]).await.unwrap().token).await.unwrap();
    vm3.listening().await;
    let vm5 = Node::start("vm5", &[("vm4", vm3.address)], "").await;
    vm5.peers.join(&vm1.peers.token(None, &[]).await.unwrap().token).await.unwrap();
    let down = vm5.event(|kind| matches!(kind, Kind::PeerDown { peer, .. } if peer == "vm4")).await;
    assert!(
        matches!(&down.kind, Kind::PeerDown { cause, mend, .. }
            if cause.contains("is for another node") && mend.contains("node.name")),
        "{down:?}"
    );
    assert!(vm5.peers.status().peers.iter().all(|peer| peer.state == PeerState::Down));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_authenticated_node_sends_is_bounded_and_rubbish_harms_nobody() {
    let vm1 = founder("call_within = \"500ms\"\nhandshake_within = \"1s\"\n").await;
    let raw = Raw::new(Some(&issued(&vm1, "vm2")), PEERS, &vm1);
    // It does not greet: it is sent away in time.
    let mute = raw.turned_away(&vm1).await;
    assert!(mute.contains("too long"), "{mute}");
    // It says something else than a greeting, and one that is too long.
    for (bytes, cause) in [
        (wire::encode(service::TEST, 1000, &"hi").unwrap(), "it does not greet"),
        (vec![1, 1, 0, 0xff, 0xff, 0xff, 0x7f], "are allowed"),
        (vec![9, 1, 0, 1, 0, 0, 0, 0], "version 9"),
        (vec![1, 1, 0, 2, 0, 0, 0, 0xff, 0xff], "makes no sense"),
    ] {
        let connection = raw.connect(&vm1).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let _ = send.finish();
        let end = timeout(LIMIT, connection.closed()).await.unwrap().to_string();
        assert!(end.contains(cause), "{end}");
    }
    // It greets, and then sends rubbish.
    let connection = raw.connect(&vm1).await.unwrap();
    let hello = connection::Hello { version: "x".into(), run: 7, replaces: false, list: 0 };
    let ask = async |bytes: Vec<u8>| {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let _ = send.finish();
        timeout(LIMIT, wire::read_answer(&mut receive, 4096)).await.unwrap()
    };
    let (outcome, _) = ask(wire::encode(service::HELLO, 1000, &hello).unwrap()).await.unwrap();
    assert_eq!(outcome, wire::Outcome::Answer);
    vm1.up("vm2").await;
    let says = async |bytes: Vec<u8>| {
        let (outcome, body) = ask(bytes).await.unwrap();
        (outcome, wire::decode::<Refusal>(&body).map_or_else(|_| String::new(), |refusal| refusal.error))
    };
    let test = service::TEST.to_le_bytes();
    // Four gibibytes announced; another version; cut short; nonsense in the right length; never ends.
    let (outcome, error) = says([&[1], &test[..], &[0xff; 4]].concat()).await;
    assert!(outcome == wire::Outcome::Nonsense && error.contains("1000 are allowed"), "{error}");
    let (outcome, error) = says([&[2], &test[..], &[0; 4]].concat()).await;
    assert!(outcome == wire::Outcome::Nonsense && error.contains("version 2"), "{error}");
    let (outcome, error) = says([&[1], &test[..], &[9, 0, 0, 0, 1]].concat()).await;
    assert!(outcome == wire::Outcome::Nonsense && error.contains("cut short"), "{error}");
    let (outcome, _) = says([&[1], &test[..], &[3, 0, 0, 0, 0xff, 0xff, 0xff]].concat()).await;
    assert_eq!(outcome, wire::Outcome::Nonsense);
    assert_eq!(ask(vec![1, 0xee, 0xee, 0, 0, 0, 0]).await.unwrap().0, wire::Outcome::Unknown);
    let (mut slow, mut receive) = connection.open_bi().await.unwrap();
    slow.write_all(&[1]).await.unwrap();
    let answer = timeout(LIMIT, wire::read_answer(&mut receive, 4096)).await.unwrap().unwrap();
    assert_eq!(answer.0, wire::Outcome::Nonsense, "who does not go on is not waited for");
    let mut bulk = connection.open_uni().await.unwrap();
    bulk.write_all(&[1, 0xee, 0xee, 4, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
    assert!(timeout(LIMIT, bulk.stopped()).await.unwrap().unwrap().is_some());
    for datagram in [vec![], vec![1], vec![9; 9], vec![1; 9], vec![0; 1000]] {
        connection.send_datagram(datagram.into()).unwrap();
    }
    // And it still answers.
    let echo = wire::encode(service::TEST, 1000, &Echo { text: "a".into(), after: 0 }).unwrap();
    assert_eq!(ask(echo).await.unwrap().0, wire::Outcome::Answer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_floods_do_not_keep_peers_out() {
    let (vm1, vm2) = pair("handshakes = 4\nhandshake_within = \"1s\"\n").await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut seed = 1_u64;
    for length in (0..1400).step_by(7) {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) as u8
            })
            .collect();
        let _ = socket.send_to(&bytes, vm1.address);
        // As like a first packet as it can be.
        let initial = [&[0xc3, 0, 0, 0, 1, 8], bytes.as_slice()].concat();
        let _ = socket.send_to(&initial, vm1.address);
    }
    // Many at once that do not go on.
    let raw = Raw::new(Some(&issued(&vm1, "vm9")), PEERS, &vm1);
    let many: Vec<_> = (0..40)
        .filter_map(|_| raw.endpoint.connect_with(raw.client.clone(), vm1.address, "vm1").ok())
        .collect();
    vm1.refused("cluster.handshakes").await;
    assert!(vm1.echo("vm2", "a").await.is_ok());
    // A peer that comes anew in the middle of it gets in.
    vm1.peers.core.current("vm2").unwrap().connection.close(quinn::VarInt::from_u32(99), b"test");
    let end = Instant::now() + LIMIT;
    while let Err(error) = vm2.echo("vm1", "a").await {
        assert!(Instant::now() < end, "{error}; {:#?}", vm1.told());
        sleep(Duration::from_millis(20)).await;
    }
    drop(many);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_door_for_joining_bears_rubbish_and_counts_attempts() {
    let vm1 = founder("joins_per_minute = 3\nhandshake_within = \"1s\"\n").await;
    let made = vm1.peers.token(None, &[]).await.unwrap();
    let raw = Raw::new(None, JOIN, &vm1);
    let ask = async |bytes: &[u8]| {
        let connection = raw.connect(&vm1).await.unwrap();
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        timeout(LIMIT, wire::read_answer(&mut receive, 4096)).await.unwrap().map(|(_, body)| {
            wire::decode::<Refusal>(&body).map_or_else(|_| String::new(), |refusal| refusal.error)
        })
    };
    // Too long, nothing at all, and what a node may ask for but not a stranger.
    assert!(ask(&[1, 0, 0, 0xff, 0xff, 0xff, 0xff]).await.is_err());
    assert!(ask(&[]).await.is_err());
    let echo = wire::encode(service::TEST, 1000, &Echo { text: "a".into(), after: 0 }).unwrap();
    let answer = ask(&echo).await.unwrap();
    assert!(answer.contains("makes no sense"), "{answer}");
    assert_eq!(vm1.answered.load(Ordering::Relaxed), 0);
    // Guesses.
    let guess = |node: &str| {
        let wish = super::super::identity::Wish::new("vm2").unwrap();
        let request = join::Request::of([7; 32], node, wish.request().unwrap().to_vec());
        wire::encode(0, 4096, &request).unwrap()
    };
    let mut answers = Vec::new();
    for name in ["vm2", "../x", "VM2", "vm2"] {
        answers.push(ask(&guess(name)).await.unwrap());
    }
    assert!(answers[0].contains("not of this cluster"), "{answers:?}");
    assert!(answers[3].contains("too many nodes"), "{answers:?}");
    assert!(vm1.peers.status().peers.is_empty());
    // The token is still good for who has it, when the minute is over.
    let again = Node::start("vm2", &[("vm1", vm1.address)], "").await;
    let crowded = again.peers.join(&made.token).await.unwrap_err().to_string();
    assert!(crowded.contains("too many nodes"), "{crowded}");
    *vm1.peers.core.attempts.lock().unwrap() = join::Attempts::default();
    again.peers.join(&made.token).await.unwrap();
}
