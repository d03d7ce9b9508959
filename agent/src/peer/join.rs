//! Joining: how a node that has nothing but a token becomes one of the cluster.
//!
//! ```text
//! new node                                             node with the CA
//!   makes a key
//!   connects; the server's certificate must be of the CA
//!   whose fingerprint is in the token  ─────────────────▶
//!   secret, name, request for a certificate  ───────────▶ uses the token up, writes down what it issues
//!   stores all of it, in one file  ◀───────────────────── certificate, CA, list of revoked certificates
//!   "I have it"  ───────────────────────────────────────▶ from now on the name is taken
//! ```
//!
//! This is the one service for clients without a certificate, and it is there only while a token is open. It reads one
//! message of bounded length, takes a bounded number of attempts a minute, and its time is bounded by
//! `cluster.handshake_within`. The secret is sent only to who has shown that he is the cluster.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{ClientConfig, Connection, ConnectionError, VarInt};
use rustls::pki_types::CertificateSigningRequestDer;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use super::{
    Core,
    endpoint::{self, plain},
    error::ClusterError,
    identity::{Identity, Issue, Wish},
    refused::{self, Why, code, why},
    tls,
    token::Token,
    wire::{self, Call, Outcome, Refusal},
};
use crate::event::Kind;

/// What a new node asks for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    secret: [u8; 32],
    node: String,
    /// PKCS #10.
    wish: Vec<u8>,
}

/// What it gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    issue: Issue,
}

#[cfg(test)]
impl Request {
    pub(super) fn of(secret: [u8; 32], node: &str, request: Vec<u8>) -> Self {
        Self { secret, node: node.to_owned(), wish: request }
    }
}

impl Call for Request {
    type Answer = Answer;
    const SERVICE: u16 = 0;
    const LONGEST: u32 = 4 << 10;
    const LONGEST_ANSWER: u32 = 1 << 20;
}

/// "I have it."
const CONFIRMED: &[u8] = b"I have it";

/// Attempts to join in the last minute.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    since: Option<Instant>,
    count: u32,
}

impl Attempts {
    /// One more; whether it may be.
    fn one_more(&mut self, now: Instant, most: u32) -> bool {
        if self.since.is_none_or(|since| now - since > Duration::from_mins(1)) {
            *self = Self { since: Some(now), count: 0 };
        }
        self.count += 1;
        self.count <= most
    }
}

/// Talks with a client without a certificate that wants to join.
pub(super) async fn take_in(core: &Arc<Core>, connection: Connection) -> Result<(), Why> {
    // The one stream that is opened now is all there will be.
    connection.set_max_concurrent_uni_streams(VarInt::from_u32(0));
    connection.set_receive_window(VarInt::from_u32(16 << 10));
    let from = plain(connection.remote_address());
    let odd = |error: wire::WireError| Why::new(format!("it wants to join and makes no sense: {error}"), "");
    let Ok((mut send, mut receive)) = connection.accept_bi().await else { return Ok(()) };
    let head = wire::read_head(&mut receive).await.map_err(odd)?;
    let body = wire::read_body(&mut receive, head.length, Request::LONGEST).await.map_err(odd)?;
    let issued = match wire::decode::<Request>(&body) {
        Err(error) => Err(ClusterError::Request { cause: error.to_string() }),
        Ok(_) if !core.attempt() => Err(ClusterError::Crowded),
        Ok(request) => {
            let name = request.node.clone();
            core.take_in(request).await.map(|issue| (name, issue))
        }
    };
    let result = match issued {
        Err(error) => {
            let refusal = Refusal::new(&error, error.mend());
            let bytes =
                wire::encode_answer(Outcome::Refusal, wire::LONGEST_REFUSAL, &refusal).map_err(odd)?;
            wire::send(&mut send, &bytes).await.map_err(odd)?;
            Err(Why::new(format!("it wants to join: {error}"), error.mend()))
        }
        Ok((node, issue)) => {
            let bytes = wire::encode_answer(Outcome::Answer, Request::LONGEST_ANSWER, &Answer { issue });
            wire::send(&mut send, &bytes.map_err(odd)?).await.map_err(odd)?;
            let mut confirmed = [0; CONFIRMED.len()];
            let read = receive.read_exact(&mut confirmed).await;
            if read.is_ok() && confirmed == CONFIRMED {
                core.joined(&node, from).await;
                Ok(())
            } else {
                let mend = "if it is not in the cluster now, give it a new token: ftctl cluster token";
                Err(Why::new(
                    format!("it joins as {node}, and does not say that it has its certificate"),
                    mend,
                ))
            }
        }
    };
    // What was said is to arrive; the client ends the connection.
    let _ = timeout(Duration::from_secs(1), connection.closed()).await;
    refused::close(&connection, code::DONE, "");
    result
}

impl Core {
    fn attempt(&self) -> bool {
        let mut attempts = self.attempts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        attempts.one_more(Instant::now(), self.settings.joins_per_minute)
    }

    async fn take_in(self: &Arc<Self>, request: Request) -> Result<Issue, ClusterError> {
        let issue = self
            .with_authority(move |authority, settings| {
                let wish = CertificateSigningRequestDer::from(request.wish);
                let now = jiff::Timestamp::now();
                authority.take_in(&request.secret, &request.node, &wish, settings, now)
            })
            .await?;
        // The token is used up; a certificate that never arrived may be in the list now.
        self.take_list(&issue.revoked).await?;
        self.rearm();
        Ok(issue)
    }

    async fn joined(self: &Arc<Self>, node: &str, from: SocketAddr) {
        let name = node.to_owned();
        if let Err(error) = self.with_authority(move |authority, _| authority.confirm(&name)).await {
            tracing::warn!(node, %error, "it is not written down that the node has its certificate");
        }
        let (peer, address) = (node.to_owned(), from.ip().to_string());
        self.bus.emit(None, None, Kind::PeerJoined { peer, address });
    }
}

/// Joins the cluster of the token, as this node. Nothing is stored here.
pub(super) async fn join(
    token: &Token,
    node: &str,
    limit: Duration,
) -> Result<(Identity, Vec<u8>, Pending), ClusterError> {
    let wish = Wish::new(node)?;
    let request = Request { secret: token.secret, node: node.to_owned(), wish: wish.request()?.to_vec() };
    let refused = |why: Why| ClusterError::Join { by: token.node.clone(), cause: why.cause, mend: why.mend };
    let bytes = wire::encode(Request::SERVICE, Request::LONGEST, &request)
        .map_err(|error| ClusterError::Request { cause: error.to_string() })?;
    let mut last = None;
    for address in &token.addresses {
        let endpoint = endpoint::joining(*address)?;
        let client = ClientConfig::new(tls::joining(token.authority)?);
        let talk = async {
            let connecting = endpoint.connect_with(client, *address, &token.node);
            let connecting = connecting.map_err(|error| Why::new(error.to_string(), ""))?;
            let connection = connecting.await.map_err(|error| explain(&error, token))?;
            let (mut send, mut receive) =
                connection.open_bi().await.map_err(|error| explain(&error, token))?;
            let short = |error: String| match connection.close_reason() {
                Some(reason) => explain(&reason, token),
                None => Why::new(error, ""),
            };
            send.write_all(&bytes).await.map_err(|error| short(error.to_string()))?;
            let answer = wire::read_answer(&mut receive, Request::LONGEST_ANSWER).await;
            let answer = answer.map_err(|error| short(error.to_string()))?;
            Ok((connection, send, answer))
        };
        let late = || Err(Why::new(format!("nothing is heard from {address}"), UNREACHABLE));
        match timeout(limit, talk).await.unwrap_or_else(|_| late()) {
            // Another address may be the one.
            Err(why) => last = Some(why),
            Ok((connection, send, (outcome, body))) => {
                let odd = |error: wire::WireError| refused(Why::new(error.to_string(), ""));
                if outcome != Outcome::Answer {
                    let Refusal { error, mend } = wire::decode(&body).map_err(odd)?;
                    return Err(refused(Why::new(error, mend)));
                }
                let Answer { issue } = wire::decode(&body).map_err(odd)?;
                let revoked = issue.revoked.clone();
                let identity = wish.fulfilled(issue)?;
                return Ok((identity, revoked, Pending { connection, send, endpoint }));
            }
        }
    }
    Err(refused(last.unwrap_or_else(|| Why::new("the token has no address", ""))))
}

const UNREACHABLE: &str = "see whether ftd runs there and UDP to its node.listen is let through; if it listens at \
                           another address, make the token with: ftctl cluster token --address ADDRESS:PORT";

/// What a connection's end means for who wants to join.
fn explain(error: &ConnectionError, token: &Token) -> Why {
    let again = "make a new one on the node that has the CA: ftctl cluster token";
    let code = match error {
        ConnectionError::TransportError(error) => Some(u64::from(error.code)),
        ConnectionError::ConnectionClosed(close) => Some(u64::from(close.error_code)),
        ConnectionError::TimedOut => {
            return Why::new("nothing is heard of it", UNREACHABLE);
        }
        _ => None,
    };
    match code {
        // No protocol in common (116: it wants a certificate): it takes in nobody.
        Some(0x178 | 0x174) if token.until <= jiff::Timestamp::now().as_second() => {
            let at = jiff::Timestamp::from_second(token.until).unwrap_or_default();
            Why::new(format!("the token has expired, at {at}"), again)
        }
        Some(0x178 | 0x174) => Why::new(
            "the token was used already, or ftd there has forgotten it: it takes in nobody now",
            again,
        ),
        Some(0x130) => Why::new(
            "who answers there is not of the token's cluster",
            "see that the token's addresses are those of the cluster, and that nobody is in between",
        ),
        _ => why(error),
    }
}

/// A node that has its certificate, and has not said so yet.
pub(super) struct Pending {
    connection: Connection,
    send: quinn::SendStream,
    endpoint: quinn::Endpoint,
}

impl Pending {
    /// Says that the certificate is stored. That it arrives is not important: the certificate counts all the same.
    pub(super) async fn confirm(mut self) {
        let said = async {
            self.send.write_all(CONFIRMED).await.ok()?;
            self.send.finish().ok()?;
            self.send.stopped().await.ok()
        };
        let _ = timeout(Duration::from_secs(1), said).await;
        refused::close(&self.connection, code::DONE, "");
        self.endpoint.wait_idle().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn attempts_are_counted_by_the_minute() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        assert!(attempts.one_more(now, 2) && attempts.one_more(now, 2) && !attempts.one_more(now, 2));
        assert!(attempts.one_more(now + Duration::from_secs(61), 2));
    }
}
