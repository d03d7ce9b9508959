//! What keeps a node in its cluster: new certificates before the old ones end, and the list of those that are revoked.
//!
//! A certificate is renewed with a new key, over a connection that the old one has opened. Connections that there are go
//! on; then this node makes a new one with the new certificate, which takes the place of the old one while that finishes
//! what is under way. So no request is lost by it.
//!
//! The list of revoked certificates is signed by the CA, and has a number. Nodes tell each other the number of theirs when
//! they meet, and who has the newer one gives it: it does not have to come from the node that has the CA.

use std::{sync::Arc, time::Duration};

use rustls::pki_types::CertificateSigningRequestDer;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::{
    Core, Peers,
    error::ClusterError,
    identity::{Identity, Issue, Wish},
    refused::{self, code},
    wire::{Call, Refusal, service},
    x509,
};
use crate::event::Kind;

/// Asks the node with the CA for a new certificate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Renew {
    /// PKCS #10.
    request: Vec<u8>,
}

impl Call for Renew {
    type Answer = Issue;
    const SERVICE: u16 = service::RENEW;
    const LONGEST: u32 = 4 << 10;
    const LONGEST_ANSWER: u32 = 1 << 20;
}

/// Gives a list of revoked certificates. The answer is the number of the list that is known after that.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Revoked {
    list: Vec<u8>,
}

impl Call for Revoked {
    type Answer = u64;
    const SERVICE: u16 = service::REVOKED;
    const LONGEST: u32 = 1 << 20;
}

/// Asks a node to dial anew: the certificate that it was shown is an old one. Of two nodes the one with the smaller name
/// does that, so that they do not do it both. The answer is whether it can.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct DialAnew {}

impl Call for DialAnew {
    type Answer = bool;
    const SERVICE: u16 = service::DIAL_ANEW;
}

/// Offers all that to other nodes.
pub(super) fn serve(peers: &Peers) {
    let core = Arc::downgrade(&peers.core);
    peers.serve(move |caller, Renew { request }| {
        let core = core.clone();
        async move {
            let ending = || Refusal::new("ftd is ending there", "");
            let core = core.upgrade().ok_or_else(ending)?;
            let node = caller.node;
            let issued = core.with_authority(move |authority, settings| {
                let wish = CertificateSigningRequestDer::from(request);
                authority.renew(&node, &wish, settings, jiff::Timestamp::now())
            });
            issued.await.map_err(|error| Refusal::new(&error, error.mend()))
        }
    });
    let core = Arc::downgrade(&peers.core);
    peers.serve(move |_, Revoked { list }| {
        let core = core.clone();
        async move {
            let core = core.upgrade().ok_or_else(|| Refusal::new("ftd is ending there", ""))?;
            core.take_list(&list).await.map_err(|error| Refusal::new(&error, error.mend()))
        }
    });
    let core = Arc::downgrade(&peers.core);
    peers.serve(move |caller, DialAnew {}| {
        let core = core.clone();
        async move {
            let core = core.upgrade().ok_or_else(|| Refusal::new("ftd is ending there", ""))?;
            Ok(core.dial_anew(&caller.node))
        }
    });
}

impl Core {
    /// Takes a list of revoked certificates over, if it is newer than what is known. Answers the number that is known
    /// then. Connections with those that are in it are closed.
    pub(super) async fn take_list(self: &Arc<Self>, list: &[u8]) -> Result<u64, ClusterError> {
        let Some(identity) = self.identity() else { return Err(ClusterError::Alone) };
        let read = x509::revoked(list, &identity.authority()?)
            .map_err(|cause| ClusterError::Crypto { what: "a list was refused", cause })?;
        let known = self.list_number();
        if read.number <= known {
            return Ok(known);
        }
        let number = read.number;
        self.keep_list(list.to_vec(), read).await?;
        self.rearm();
        self.close_revoked();
        self.touch();
        Ok(number)
    }

    /// Dials a peer anew, if it can be dialled; whether it can.
    fn dial_anew(&self, peer: &str) -> bool {
        let can = self.table(|table| {
            let slot = table.slots.get_mut(peer).filter(|slot| !slot.addresses.is_empty());
            slot.map(|slot| slot.renew = slot.current.is_some()).is_some()
        });
        self.touch();
        can
    }

    /// Closes connections with nodes whose certificates are revoked.
    pub(super) fn close_revoked(self: &Arc<Self>) {
        let all: Vec<_> =
            self.table(|table| table.slots.values().filter_map(|slot| slot.current.clone()).collect());
        for live in all {
            if self.is_revoked(&live.facts.serial) {
                tracing::warn!(peer = live.peer, "its certificate was revoked");
                refused::close(&live.connection, code::REVOKED, "the certificate was revoked");
                let why = refused::Why::new("its certificate was revoked", "let it join again, if it is to");
                self.lost(&live, why, true);
            }
        }
    }
}

/// Gives the list of revoked certificates to all peers that have an older one, for ever.
pub(super) async fn spread(core: Arc<Core>) {
    let mut changes = core.changes.subscribe();
    let mut given: std::collections::HashMap<(String, u64), u64> = std::collections::HashMap::new();
    loop {
        let number = core.list_number();
        let live: Vec<_> =
            core.table(|table| table.slots.values().filter_map(|slot| slot.current.clone()).collect());
        for live in live {
            let key = (live.peer.clone(), live.hello.run);
            let known = *given.get(&key).unwrap_or(&live.hello.list);
            let Some(list) = core.list().filter(|_| known < number) else { continue };
            match tokio::time::timeout(core.settings.call_within, live.ask(&Revoked { list })).await {
                Ok(Ok(_)) => drop(given.insert(key, number)),
                Ok(Err(error)) => tracing::warn!(peer = live.peer, %error, "the list was not taken"),
                Err(_) => tracing::warn!(peer = live.peer, "the list was not taken in time"),
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Time between attempts to renew, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(10));

/// Renews this node's certificate whenever it is time, for ever.
pub(super) async fn keep(core: Arc<Core>) {
    let mut wait = AGAIN.0;
    let mut told = false;
    loop {
        let Some(identity) = core.identity() else { return };
        let Ok(facts) = identity.facts() else { return };
        let due = facts.until.checked_sub(core.settings.renew_before).unwrap_or(facts.from);
        let left = Duration::try_from(due.duration_since(jiff::Timestamp::now())).unwrap_or_default();
        if !left.is_zero() {
            // In pieces: the clock may be set.
            sleep(left.min(Duration::from_hours(1))).await;
            continue;
        }
        match renew(&core, &identity).await {
            Ok(until) => {
                (wait, told) = (AGAIN.0, false);
                core.bus.emit(None, None, Kind::CertificateRenewed { until });
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    let (cause, mend) = (
                        error.to_string(),
                        "ftd tries again by itself; see that the node with the CA \
                        can be reached: ftctl cluster peers",
                    );
                    tracing::warn!(cause, "the certificate is not renewed");
                    let kind = Kind::CertificateTrouble { cause, mend: mend.into(), until: facts.until };
                    core.bus.emit(None, None, kind);
                }
                sleep(wait).await;
                wait = (wait * 2).min(AGAIN.1);
            }
        }
    }
}

async fn renew(core: &Arc<Core>, old: &Identity) -> Result<jiff::Timestamp, ClusterError> {
    let wish = Wish::new(&old.node)?;
    let request = wish.request()?;
    let issue = if old.issuer == core.node {
        let node = old.node.clone();
        core.with_authority(move |authority, settings| {
            authority.renew(&node, &request, settings, jiff::Timestamp::now())
        })
        .await?
    } else {
        let failed =
            |cause: String| ClusterError::Join { by: old.issuer.clone(), cause, mend: String::new() };
        let live = core.current(&old.issuer).ok_or_else(|| failed("it cannot be reached".into()))?;
        let request = request.to_vec();
        let answer = tokio::time::timeout(core.settings.call_within, live.ask(&Renew { request })).await;
        answer.map_err(|_| failed("no answer in time".into()))?.map_err(|error| failed(error.to_string()))?
    };
    if issue.authority != old.authority {
        return Err(ClusterError::Request { cause: "the new certificate is of another cluster".into() });
    }
    let identity = wish.fulfilled(issue)?;
    let until = identity.facts()?.until;
    core.become_node(identity, None).await?;
    // With each peer a connection that the new certificate has opened.
    let all: Vec<_> =
        core.table(|table| table.slots.values().filter_map(|slot| slot.current.clone()).collect());
    for live in all {
        if core.node < live.peer && core.dial_anew(&live.peer) {
            continue;
        }
        let asked = tokio::time::timeout(core.settings.call_within, live.ask(&DialAnew {})).await;
        if !matches!(asked, Ok(Ok(true))) && !core.dial_anew(&live.peer) {
            tracing::debug!(peer = live.peer, "it goes on with the old certificate until that ends");
        }
    }
    Ok(until)
}
