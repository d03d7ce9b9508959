//! `[cluster]`: the other nodes, and how is spoken with them.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{Config, address::Address, explain};

/// `[cluster]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// The other nodes: `"NAME=ADDRESS:PORT"`, with a second address (`,ADDRESS:PORT`) where there is a redundant link.
    pub peers: Vec<Spanned<String>>,
    /// Time between the signs of life that are sent to each peer.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// A peer of which nothing was heard for this long is tried over its other address,
    #[serde(with = "humantime_serde")]
    pub silent_after: Duration,
    /// and after this long it is down.
    #[serde(with = "humantime_serde")]
    pub down_after: Duration,
    /// Wait before a peer is dialled again; doubled each time, half of it random.
    #[serde(with = "humantime_serde")]
    pub redial: Duration,
    /// The longest wait.
    #[serde(with = "humantime_serde")]
    pub redial_max: Duration,
    /// How long a new connection may take until both sides know each other.
    #[serde(with = "humantime_serde")]
    pub handshake_within: Duration,
    /// So many connections may be on their way to that at a time; more are turned away.
    pub handshakes: usize,
    /// How long a request to a peer may take, where nothing else is said.
    #[serde(with = "humantime_serde")]
    pub call_within: Duration,
    /// What bulk transfers to one peer may take of the link, per second; as much as there is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<ByteSize>,
    /// Bulk transfers to one peer use so many streams.
    pub streams: usize,
    /// How long the other side may take to make a snapshot durable that was sent.
    #[serde(with = "humantime_serde")]
    pub transfer_within: Duration,
    /// A snapshot that is not on another node after this long is told of.
    #[serde(with = "humantime_serde")]
    pub replica_late: Duration,
    /// How long a node's certificate is valid.
    #[serde(with = "humantime_serde")]
    pub certificate_for: Duration,
    /// It is renewed this long before its end.
    #[serde(with = "humantime_serde")]
    pub renew_before: Duration,
    /// By how much clocks of nodes may differ: certificates begin that much in the past.
    #[serde(with = "humantime_serde")]
    pub clock_skew: Duration,
    /// How long a token for joining is valid, when no time is given for it.
    #[serde(with = "humantime_serde")]
    pub token_for: Duration,
    /// The longest time that can be given for one.
    #[serde(with = "humantime_serde")]
    pub token_longest: Duration,
    /// At most so many attempts to join a minute, from all sides together.
    pub joins_per_minute: u32,
    /// How long is asked, before a service address is taken, whether somebody has it.
    #[serde(with = "humantime_serde")]
    pub probe: Duration,
    /// So often is a service address announced after it was taken,
    pub announce: u32,
    /// and so long after each other.
    #[serde(with = "humantime_serde")]
    pub announce_every: Duration,
}

impl Default for Cluster {
    fn default() -> Self {
        let days = |days: u64| Duration::from_hours(24 * days);
        Self {
            peers: Vec::new(),
            heartbeat: Duration::from_millis(100),
            silent_after: Duration::from_secs(1),
            down_after: Duration::from_secs(3),
            redial: Duration::from_millis(200),
            redial_max: Duration::from_secs(5),
            handshake_within: Duration::from_secs(5),
            handshakes: 32,
            call_within: Duration::from_secs(5),
            bandwidth: None,
            streams: 4,
            transfer_within: Duration::from_mins(1),
            replica_late: Duration::from_secs(30),
            certificate_for: days(90),
            renew_before: days(30),
            clock_skew: Duration::from_mins(5),
            token_for: Duration::from_mins(10),
            token_longest: days(1),
            joins_per_minute: 30,
            probe: Duration::from_millis(60),
            announce: 5,
            announce_every: Duration::from_secs(1),
        }
    }
}

/// A peer as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name, as it stands in its certificate.
    pub name: String,
    /// Where it listens: one address, or two.
    pub addresses: Vec<SocketAddr>,
}

impl Peer {
    /// Reads `NAME=ADDRESS:PORT[,ADDRESS:PORT]`. `Err`: what is wrong, and the mend.
    pub fn parse(text: &str) -> Result<Self, (String, String)> {
        let form = "write it like \"vm2=192.168.56.12:7443\"";
        let Some((name, list)) = text.split_once('=') else {
            return Err((format!("\"{text}\" is no peer: the \"=\" is missing"), form.into()));
        };
        if let Some(flaw) = name_flaw(name) {
            return Err((format!("\"{name}\" is no name of a node: {flaw}"), NAME_MEND.into()));
        }
        let mut addresses = Vec::new();
        for address in list.split(',') {
            let address = address.trim();
            let Ok(address) = address.parse::<SocketAddr>() else {
                let mend = "write an IP address and a port, like 192.168.56.12:7443 or [fd00::12]:7443; names are not \
                            looked up, for that may fail when it matters most";
                return Err((format!("\"{address}\" is no address of a peer"), mend.into()));
            };
            if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() {
                return Err((format!("nobody can be reached at {address}"), form.into()));
            }
            if addresses.contains(&address) {
                return Err((format!("{address} is named twice for {name}"), "name it once".into()));
            }
            addresses.push(address);
        }
        if addresses.len() > 2 {
            return Err((format!("{name} has {} addresses", addresses.len()), "name one, or two".into()));
        }
        Ok(Self { name: name.to_owned(), addresses })
    }
}

/// What to do about a name that cannot be.
pub const NAME_MEND: &str = "set node.name to lower case letters, digits and \"-\", like \"vm1\"";

/// What keeps a name from being that of a node: it stands in certificates, where it has to be a name as DNS has them.
pub fn name_flaw(name: &str) -> Option<&'static str> {
    let sound = |part: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
    };
    let number = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > 63 {
        Some("it is longer than 63 bytes")
    } else if !name.split('.').all(sound) {
        Some("it has other characters than a-z, 0-9, \"-\" and \".\" between them")
    } else if name.rsplit('.').next().is_some_and(number) {
        Some("it ends like an IP address: its last part is a number")
    } else {
        None
    }
}

impl Config {
    /// The peers, in the order of the file.
    pub fn peers(&self) -> Vec<Peer> {
        self.cluster.peers.iter().filter_map(|peer| Peer::parse(peer.as_ref()).ok()).collect()
    }
}

/// Checks all that has to do with other nodes.
pub(super) fn check(config: &Config, text: &str, say: &mut impl FnMut(Option<usize>, String, String)) {
    let (cluster, node) = (&config.cluster, &config.node);
    let key = |name: &str| explain::find(text, &["cluster", name]);
    let time = |d: Duration| humantime::format_duration(d).to_string();
    if let Some(listen) = node.listen
        && listen.port() == 0
    {
        let mend = "name one, like \"192.168.56.11:7443\"".to_owned();
        say(explain::find(text, &["node", "listen"]), "node.listen has no port".into(), mend);
    }
    if node.listen.is_some()
        && !node.name.is_empty()
        && let Some(flaw) = name_flaw(&node.name)
    {
        let what = format!("\"{}\" is no name of a node: {flaw}", node.name);
        say(explain::find(text, &["node", "name"]), what, NAME_MEND.into());
    }
    if node.listen.is_none()
        && let Some(first) = cluster.peers.first()
    {
        say(
            Some(first.span().start),
            "there are peers, and this node listens nowhere for them".into(),
            "add node.listen, like listen = \"192.168.56.11:7443\", or leave out cluster.peers".into(),
        );
    }
    let mut names = HashSet::new();
    for peer in &cluster.peers {
        let at = Some(peer.span().start);
        match Peer::parse(peer.as_ref()) {
            Err((what, mend)) => say(at, what, mend),
            Ok(peer) if peer.name == node.name => {
                say(at, format!("{} is this node itself", peer.name), "leave it out".into());
            }
            Ok(peer) if !names.insert(peer.name.clone()) => {
                let mend =
                    "name it once; a second address goes behind the first: \"vm2=A:PORT,B:PORT\"".into();
                say(at, format!("{} is named twice", peer.name), mend);
            }
            Ok(_) => {}
        }
    }
    // Heartbeats that are lost now and then must not look like an end.
    if cluster.heartbeat < Duration::from_millis(10)
        || cluster.heartbeat.saturating_mul(3) > cluster.silent_after
        || cluster.silent_after >= cluster.down_after
        || cluster.down_after > Duration::from_mins(10)
    {
        say(
            key("heartbeat").or_else(|| key("down_after")),
            format!(
                "10ms <= cluster.heartbeat, 3 x cluster.heartbeat <= cluster.silent_after < cluster.down_after <= \
                 10min does not hold: {}, {}, {}",
                time(cluster.heartbeat),
                time(cluster.silent_after),
                time(cluster.down_after)
            ),
            "their defaults are 100ms, 1s and 3s".into(),
        );
    }
    if cluster.redial < Duration::from_millis(10) || cluster.redial > cluster.redial_max {
        say(
            key("redial"),
            format!(
                "10ms <= cluster.redial <= cluster.redial_max does not hold: {}, {}",
                time(cluster.redial),
                time(cluster.redial_max)
            ),
            "their defaults are 200ms and 5s".into(),
        );
    }
    for (name, value, default) in [
        ("handshake_within", cluster.handshake_within, "5s"),
        ("call_within", cluster.call_within, "5s"),
        ("transfer_within", cluster.transfer_within, "1min"),
        ("replica_late", cluster.replica_late, "30s"),
    ] {
        if !(Duration::from_millis(100)..=Duration::from_hours(1)).contains(&value) {
            say(
                key(name),
                format!("cluster.{name} is {}: it must be from 100ms to 1h", time(value)),
                format!("leave it out for its default, {default}"),
            );
        }
    }
    for (name, value, default) in
        [("probe", cluster.probe, "60ms"), ("announce_every", cluster.announce_every, "1s")]
    {
        if !(Duration::from_millis(10)..=Duration::from_mins(1)).contains(&value) {
            say(
                key(name),
                format!("cluster.{name} is {}: it must be from 10ms to 1min", time(value)),
                format!("leave it out for its default, {default}"),
            );
        }
    }
    for (name, value, most, default) in [
        ("handshakes", cluster.handshakes, 1024, 32),
        ("streams", cluster.streams, 16, 4),
        ("joins_per_minute", cluster.joins_per_minute as usize, 10_000, 30),
        ("announce", cluster.announce as usize, 100, 5),
    ] {
        if !(1..=most).contains(&value) {
            say(
                key(name),
                format!("cluster.{name} is {value}: it must be from 1 to {most}"),
                format!("leave it out for its default, {default}"),
            );
        }
    }
    if let Some(bandwidth) = cluster.bandwidth
        && bandwidth < ByteSize::kib(64)
    {
        say(
            key("bandwidth"),
            format!("cluster.bandwidth is {bandwidth}: too little for anything to arrive"),
            "use at least \"64KiB\", or leave it out for no bound".into(),
        );
    }
    let (renew, lasts) = (cluster.renew_before, cluster.certificate_for);
    if renew.is_zero() || renew >= lasts || lasts > Duration::from_hours(24 * 3650) {
        say(
            key("renew_before").or_else(|| key("certificate_for")),
            format!(
                "0 < cluster.renew_before < cluster.certificate_for <= 3650d does not hold: {}, {}",
                time(renew),
                time(lasts)
            ),
            "their defaults are 30d and 90d".into(),
        );
    }
    if cluster.clock_skew > Duration::from_hours(24) {
        say(
            key("clock_skew"),
            format!("cluster.clock_skew is {}: it must be from 0s to 1d", time(cluster.clock_skew)),
            "leave it out for its default, 5min".into(),
        );
    }
    if cluster.token_for < Duration::from_secs(1) || cluster.token_for > cluster.token_longest {
        say(
            key("token_for").or_else(|| key("token_longest")),
            format!(
                "1s <= cluster.token_for <= cluster.token_longest does not hold: {}, {}",
                time(cluster.token_for),
                time(cluster.token_longest)
            ),
            "their defaults are 10min and 1d".into(),
        );
    }
    let mut addresses = HashMap::new();
    for workload in &config.workloads {
        if let Some(address) = &workload.address {
            let at = address.span().start;
            match Address::parse(address.as_ref()) {
                Err((what, mend)) => say(Some(at), what, mend),
                Ok(address) => {
                    if let Some(line) = addresses.insert(address.ip, explain::line_of(text, at)) {
                        let what =
                            format!("{} is the address of two workloads (first in line {line})", address.ip);
                        say(Some(at), what, "give each its own, or put their units together".into());
                    }
                }
            }
        }
        let mut seen = HashSet::new();
        for named in &workload.nodes {
            let (name, at) = (named.as_ref().as_str(), Some(named.span().start));
            // Where the name of this node is that of the host, the check may run on another one.
            let known = names.contains(name) || node.name.is_empty() || name == node.name;
            if !seen.insert(name) {
                say(at, format!("\"{name}\" is named twice in nodes"), "name it once".into());
            } else if !known {
                say(
                    at,
                    format!("\"{name}\" in nodes is neither this node nor one of cluster.peers"),
                    format!("add \"{name}=ADDRESS:PORT\" to cluster.peers, or correct the name"),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn errors(text: &str) -> String {
        Config::parse(text, Path::new("ftd.toml")).expect_err("it must be refused").to_string()
    }

    #[test]
    fn a_peer_has_a_name_and_one_or_two_addresses() {
        let peer = Peer::parse("vm2=10.0.0.2:7443, [fd00::2]:7443").unwrap();
        assert_eq!((peer.name.as_str(), peer.addresses.len()), ("vm2", 2));
        for (text, cause) in [
            ("vm2", "the \"=\" is missing"),
            ("VM2=10.0.0.2:1", "no name of a node"),
            ("=10.0.0.2:1", "it is empty"),
            ("10.0.0.2=10.0.0.2:1", "ends like an IP address"),
            ("vm2=10.0.0.2", "\"10.0.0.2\" is no address"),
            ("vm2=host:1", "\"host:1\" is no address"),
            ("vm2=0.0.0.0:1", "nobody can be reached"),
            ("vm2=10.0.0.2:0", "nobody can be reached"),
            ("vm2=10.0.0.2:1,10.0.0.2:1", "named twice"),
            ("vm2=10.0.0.2:1,10.0.0.2:2,10.0.0.2:3", "3 addresses"),
        ] {
            let (what, _) = Peer::parse(text).unwrap_err();
            assert!(what.contains(cause), "{text}: {what}");
        }
        for name in ["vm1", "a-1.example", "0x"] {
            assert_eq!(name_flaw(name), None, "{name}");
        }
        for name in ["a_b", "-a", "a.", "é", &"a".repeat(64), "1", "a/b", "a\0"] {
            assert!(name_flaw(name).is_some(), "{name}");
        }
    }

    #[test]
    fn peers_and_figures_that_make_no_sense_are_named_with_their_lines() {
        let text = "[node]\nname = \"vm1\"\n[cluster]\npeers = [\"vm1=10.0.0.1:1\",\n\"vm2=10.0.0.2:1\",\n\
                    \"vm2=10.0.0.3:1\"]\nheartbeat = \"1s\"\n";
        let all = errors(text);
        assert!(all.contains("ftd.toml:4:10: there are peers, and this node listens nowhere"), "{all}");
        assert!(all.contains("ftd.toml:4:10: vm1 is this node itself"), "{all}");
        assert!(all.contains("ftd.toml:6:1: vm2 is named twice"), "{all}");
        assert!(all.contains("ftd.toml:7:1: 10ms <= cluster.heartbeat"), "{all}");
        assert!(errors("[cluster]\ncertificate_for = \"10d\"\n").contains("renew_before < cluster"));
        assert!(errors("[cluster]\nstreams = 0\n").contains("from 1 to 16"));
        let text = "[node]\nname = \"vm1\"\nlisten = \"10.0.0.1:7443\"\n[cluster]\npeers = [\"vm2=10.0.0.2:1\"]\n\
                    [[workload]]\nname = \"w\"\nunits = [\"a\"]\nnodes = [\"vm1\", \"vm2\", \"vm3\"]\n";
        let all = errors(text);
        assert!(all.contains("ftd.toml:9:24: \"vm3\" in nodes is neither this node"), "{all}");
        let all = errors("[cluster]\nprobe = \"1ms\"\nannounce = 0\nannounce_every = \"2h\"\n");
        assert!(all.contains("cluster.probe is 1ms: it must be from 10ms"), "{all}");
        assert!(all.contains("ftd.toml:3") && all.contains("ftd.toml:4"), "{all}");
        let all = errors(
            "[[workload]]\nname = \"a\"\nunits = [\"a\"]\naddress = \"10.0.0.9/24\"\n[[workload]]\nname = \"b\"\n\
             units = [\"b\"]\naddress = \"10.0.0.9/32\"\n[[workload]]\nname = \"c\"\nunits = [\"c\"]\naddress = \"x\"\n",
        );
        assert!(
            all.contains("ftd.toml:8:11: 10.0.0.9 is the address of two workloads (first in line 4)"),
            "{all}"
        );
        assert!(all.contains("ftd.toml:12:11: \"x\" is no service address"), "{all}");
        let config = Config::parse(&text.replace(", \"vm3\"", ""), Path::new("ftd.toml")).unwrap();
        assert_eq!(config.peers()[0].name, "vm2");
    }
}
