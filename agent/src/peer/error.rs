//! Why something about the cluster could not be done.

use std::{io, path::Path, path::PathBuf};

use crate::config::cluster::NAME_MEND;

/// Why `ftctl cluster init`, `token`, `join` or `revoke` did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// No `node.listen`.
    #[error("this node has no peers: node.listen is not set")]
    Off,
    /// It has an identity.
    #[error("this node is in the cluster \"{cluster}\" already, as {node}")]
    Member {
        /// The cluster's name.
        cluster: String,
        /// The node's name in it.
        node: String,
    },
    /// It has none.
    #[error("this node is in no cluster yet")]
    Alone,
    /// The CA is elsewhere.
    #[error("the CA of this cluster is not on this node but on {on}")]
    Elsewhere {
        /// There.
        on: String,
    },
    /// Not a name that a node or cluster can have.
    #[error("\"{name}\" cannot be a name: {flaw}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        flaw: &'static str,
    },
    /// The token is none, or none any more.
    #[error("the token cannot be used: {cause}")]
    Token {
        /// Why.
        cause: String,
    },
    /// A time that cannot be given.
    #[error("a token cannot be valid for {asked}: at least 1s, at most {most} (cluster.token_longest)")]
    Time {
        /// The time.
        asked: humantime::FormattedDuration,
        /// The longest.
        most: humantime::FormattedDuration,
    },
    /// Another node has this name.
    #[error("{node} is in the cluster already, with a certificate until {until}")]
    Taken {
        /// The name.
        node: String,
        /// Until when.
        until: jiff::Timestamp,
    },
    /// There is no such node.
    #[error("no node {node} has a certificate of this cluster; there are: {}", known.join(", "))]
    Unknown {
        /// The name asked for.
        node: String,
        /// Those that have.
        known: Vec<String>,
    },
    /// The node with the CA cannot be thrown out by itself.
    #[error("{node} is this node itself, which has the cluster's CA")]
    Own {
        /// Its name.
        node: String,
    },
    /// More attempts than may be.
    #[error("too many nodes try to join at the same time")]
    Crowded,
    /// A request for a certificate that is not what it should be.
    #[error("the request for a certificate makes no sense: {cause}")]
    Request {
        /// Why.
        cause: String,
    },
    /// The other side could not be asked, or said no.
    #[error("{by} did not take this node in: {cause}")]
    Join {
        /// Who was asked.
        by: String,
        /// Why.
        cause: String,
        /// What to do.
        mend: String,
    },
    /// Keys or certificates could not be made or read.
    #[error("{what}: {cause}")]
    Crypto {
        /// What was being tried.
        what: &'static str,
        /// Why it failed.
        cause: String,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

impl ClusterError {
    pub(super) fn disk(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Disk { path: path.to_owned(), source }
    }

    pub(super) fn crypto<E: ToString>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Crypto { what, cause: error.to_string() }
    }

    /// What a person can do.
    pub fn mend(&self) -> String {
        match self {
            Self::Off => "set node.listen, like \"192.168.56.11:7443\", and cluster.peers; then: systemctl restart \
                          ftd"
            .into(),
            Self::Member { .. } => "to leave it: systemctl stop ftd, remove /var/lib/ftd/cluster (the cluster \
                                    directory in node.state_dir), systemctl start ftd; then revoke the node where \
                                    the CA is"
                .into(),
            Self::Alone => "make one: ftctl cluster init; or join one: ftctl cluster token on its first node, \
                            ftctl cluster join TOKEN here"
                .into(),
            Self::Elsewhere { on } => format!("do it on {on}"),
            Self::Name { .. } => NAME_MEND.into(),
            Self::Token { .. } => "make a new one on the node that has the CA: ftctl cluster token".into(),
            Self::Time { .. } => "give it another time with --for".into(),
            Self::Taken { node, .. } => format!(
                "call this node differently (node.name); or, if it is {node} and has lost its keys: ftctl cluster \
                 revoke {node}, and join again"
            ),
            Self::Unknown { .. } => "name one of these".into(),
            Self::Own { .. } => "revoke other nodes; a cluster without its CA takes in nobody and renews nothing"
                .into(),
            Self::Crowded => "try again in a minute; the bound is cluster.joins_per_minute".into(),
            Self::Request { .. } => "are both sides of one version of ftd?".into(),
            Self::Join { mend, .. } => mend.clone(),
            Self::Crypto { .. } => "see the cause; a file that was damaged comes back from a backup, or by leaving \
                                    and joining again"
                .into(),
            Self::Disk { .. } => "make room, or mend the disk; nothing was changed".into(),
        }
    }
}
