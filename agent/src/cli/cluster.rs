//! `ftctl cluster`: which nodes belong together, and how they reach each other.

use std::{io::Read as _, net::SocketAddr, time::Duration};

use clap::{Args, Subcommand};

use super::{
    client::{Client, Failure},
    duration, show,
};
use crate::{
    control::{
        millis,
        peers::{Init, Join, MakeToken, Revoke},
    },
    peer::{ClusterStatus, Joined, PeerState, PeerStatus, TokenMade},
};

#[derive(Debug, Args)]
pub(super) struct ClusterArgs {
    #[command(subcommand)]
    what: ClusterCommand,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Make a cluster, with its own CA, whose first node is this one.
    Init {
        /// The cluster's name.
        #[arg(long, default_value = "ftd")]
        name: String,
    },
    /// Make a token with which one other node can join, once. On the node that has the CA.
    Token {
        /// How long it is valid [default: cluster.token_for of the configuration, 10min]
        #[arg(long = "for", value_name = "TIME", value_parser = duration)]
        lasting: Option<Duration>,
        /// Where the other node finds this one [default: where it listens]
        #[arg(long = "address", value_name = "ADDRESS:PORT")]
        addresses: Vec<SocketAddr>,
    },
    /// Join a cluster. The key is made here and never leaves this host.
    Join {
        /// The token; `-` reads it from standard input, where no other user of this host sees it.
        token: String,
    },
    /// Throw a node out: its certificates are not accepted any more, its connections are closed. On the node that has
    /// the CA.
    Revoke {
        /// The node.
        node: String,
    },
    /// Show the other nodes: who can be reached, how fast, how much goes there, until when certificates are valid.
    Peers,
}

pub(super) async fn run(client: &Client, args: ClusterArgs, json: bool) -> Result<(), Failure> {
    match args.what {
        ClusterCommand::Init { name } => {
            let made: ClusterStatus = read(client.post("/v1/cluster/init", &Init { name }).await?)?;
            if json {
                return show::json(&made);
            }
            show::line(&format!(
                "{} is the first node of the cluster {}",
                made.node,
                made.cluster.unwrap_or_default()
            ));
            show::line("another joins by: ftctl cluster token here, ftctl cluster join TOKEN there");
            show::line(
                "keep a copy of cluster/authority.json in node.state_dir in a safe place: it is the CA",
            );
        }
        ClusterCommand::Token { lasting, addresses } => {
            let ask = MakeToken { for_ms: lasting.map(millis), addresses };
            let made: TokenMade = read(client.post("/v1/cluster/token", &ask).await?)?;
            if json {
                return show::json(&made);
            }
            let addresses: Vec<_> = made.addresses.iter().map(ToString::to_string).collect();
            eprintln!(
                "valid until {}, for one node, at {}. On that node:",
                show::time(made.until),
                addresses.join(", ")
            );
            show::line(&format!("ftctl cluster join {}", made.token));
        }
        ClusterCommand::Join { mut token } => {
            if token == "-" {
                token.clear();
                // Not more than a token can be.
                let read = std::io::stdin().take(4096).read_to_string(&mut token);
                read.map_err(|error| Failure::Local(format!("standard input: {error}")))?;
            }
            let joined: Joined = read(client.post("/v1/cluster/join", &Join { token }).await?)?;
            if json {
                return show::json(&joined);
            }
            let until = show::time(joined.until);
            show::line(&format!(
                "joined the cluster {}, taken in by {}; certificate until {until}, renewed before",
                joined.cluster, joined.by
            ));
        }
        ClusterCommand::Revoke { node } => {
            client.post("/v1/cluster/revoke", &Revoke { node: node.clone() }).await?;
            if json {
                return show::json(&serde_json::json!({ "node": node }));
            }
            show::line(&format!("{node} is no longer in the cluster"));
        }
        ClusterCommand::Peers => {
            let status: ClusterStatus = client.get("/v1/cluster/peers").await?;
            if json {
                return show::json(&status);
            }
            peers(&show::all_plain(&status)?);
        }
    }
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(answer: serde_json::Value) -> Result<T, Failure> {
    serde_json::from_value(answer).map_err(|error| {
        Failure::Local(format!("ftd's answer makes no sense: {error}; are ftctl and ftd of one version?"))
    })
}

fn peers(status: &ClusterStatus) {
    let Some(cluster) = &status.cluster else {
        match status.listen {
            None => show::line("no peers: set node.listen and cluster.peers, see ftd.toml(5)"),
            Some(_) => {
                show::line("in no cluster: ftctl cluster init makes one, ftctl cluster join TOKEN joins one");
            }
        }
        problem(status.problem.as_ref());
        return;
    };
    let listen = status.listen.map_or_else(|| "nowhere".into(), |listen| listen.to_string());
    let until = status.certificate.as_ref().map_or_else(|| "?".into(), |own| show::time(own.until));
    let authority = status.authority.as_deref().unwrap_or("?");
    show::line(&format!(
        "{} in cluster {cluster}, on {listen}; certificate until {until}; CA on {authority}",
        status.node
    ));
    problem(status.problem.as_ref());
    if status.peers.is_empty() {
        show::line("no peers: add them to cluster.peers, or let them name this node in theirs");
        return;
    }
    show::line("");
    let mut rows = show::table(&[
        "NODE",
        "STATE",
        "SINCE",
        "ADDRESS",
        "ROUND TRIP",
        "99 %",
        "LOSS",
        "OUT/s",
        "IN/s",
        "FTD",
        "CERTIFICATE UNTIL",
    ]);
    for peer in &status.peers {
        rows.add_row(row(peer));
    }
    show::line(&rows.trim_fmt());
    for peer in status.peers.iter().filter(|peer| peer.state != PeerState::Up) {
        if let Some((cause, mend)) = &peer.problem {
            show::line(&format!("{}: {cause}", peer.name));
            mend_line(mend);
        }
    }
}

fn problem(problem: Option<&(String, String)>) {
    if let Some((cause, mend)) = problem {
        show::line(&show::bad(&format!("peers cannot reach this node: {cause}")));
        mend_line(mend);
    }
}

fn mend_line(mend: &str) {
    if !mend.is_empty() {
        show::line(&format!("  mend: {mend}"));
    }
}

fn row(peer: &PeerStatus) -> [String; 11] {
    let state = match peer.state {
        PeerState::Up => show::good("up"),
        PeerState::Silent => show::bad("silent"),
        PeerState::Down => show::bad("down"),
    };
    let absent = || "-".to_owned();
    let trip = |us: u64| format!("{:.2} ms", us as f64 / 1000.0);
    let bytes = |bytes: u64| bytesize::ByteSize(bytes).to_string();
    let live = peer.state == PeerState::Up;
    [
        peer.name.clone(),
        state,
        show::time(peer.since),
        peer.address.or(peer.addresses.first().copied()).map_or_else(absent, |address| address.to_string()),
        peer.round_trip_us.map_or_else(absent, |(median, _)| trip(median)),
        peer.round_trip_us.map_or_else(absent, |(_, most)| trip(most)),
        if live { format!("{:.1} %", peer.loss * 100.0) } else { absent() },
        if live { bytes(peer.sent_per_s) } else { absent() },
        if live { bytes(peer.received_per_s) } else { absent() },
        peer.version.clone().unwrap_or_else(absent),
        peer.certificate.as_ref().map_or_else(absent, |certificate| show::time(certificate.until)),
    ]
}
