//! The cluster's own CA: who may be a node of it.
//!
//! It is on one node, the one on which `ftctl cluster init` was run, in one file that is replaced as a whole. What has been
//! issued and which tokens are open stands in the same file as the key: a certificate is never given out that
//! the CA does not know of, and a token that was used is used, whenever the node is killed.
//!
//! Certificates begin a little in the past, for nodes whose clocks are behind. Those that are revoked stand in a list
//! that the CA signs (a CRL) and that nodes hand on to each other.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use data_encoding::HEXLOWER;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason,
    RevokedCertParams, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use serde::{Deserialize, Serialize};

use super::{
    disk,
    error::ClusterError,
    identity::{Identity, Issue, Wish, fingerprint, pem},
    x509,
};
use crate::config::cluster::{Cluster, name_flaw};

/// The CA's own certificate ends with the cluster: changing it means to join anew.
const LIFETIME: Duration = Duration::from_hours(24 * 3653);
/// Used and expired tokens are remembered this long, so that who uses one is told what happened to it.
const REMEMBER: Duration = Duration::from_hours(24);

/// The CA of this node's cluster.
pub(super) struct Authority {
    path: PathBuf,
    content: Content,
}

#[derive(Clone, Serialize, Deserialize)]
struct Content {
    cluster: String,
    node: String,
    /// PEM.
    certificate: String,
    /// PEM.
    key: String,
    /// Number of the newest list of revoked certificates.
    list: u64,
    issued: Vec<Issued>,
    tokens: Vec<Open>,
}

/// A certificate that was issued. Kept until it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Issued {
    node: String,
    serial: String,
    until: jiff::Timestamp,
    /// The node has said that it has it.
    confirmed: bool,
    revoked: Option<jiff::Timestamp>,
}

/// A token.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Open {
    /// blake3 of its secret.
    hash: String,
    until: jiff::Timestamp,
    used: Option<(String, jiff::Timestamp)>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.content.cluster).finish_non_exhaustive()
    }
}

impl Authority {
    fn at(dir: &Path) -> PathBuf {
        dir.join("authority.json")
    }

    /// The CA in `dir`, if it is there.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, ClusterError> {
        let path = Self::at(dir);
        let Some(bytes) = disk::read(&path).map_err(ClusterError::disk(&path))? else { return Ok(None) };
        let content = serde_json::from_slice(&bytes)
            .map_err(ClusterError::crypto("cluster/authority.json in node.state_dir makes no sense"))?;
        Ok(Some(Self { path, content }))
    }

    /// Makes a cluster whose first node is this one. The CA is stored before, the identity after: a crash between
    /// leaves a node without a cluster, and a CA that nobody knows, which the next attempt replaces.
    pub(super) fn make(
        dir: &Path,
        cluster: &str,
        node: &str,
        settings: &Cluster,
        now: jiff::Timestamp,
    ) -> Result<(Self, Identity, Vec<u8>), ClusterError> {
        if let Some(flaw) = name_flaw(cluster) {
            return Err(ClusterError::Name { name: cluster.to_owned(), flaw });
        }
        let wish = Wish::new(node)?;
        let failed = ClusterError::crypto::<rcgen::Error>;
        let what = "the CA cannot be made";
        let key = KeyPair::generate().map_err(failed(what))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        // Told from those of other clusters by its name already.
        let mut random_part = [0; 4];
        random(&mut random_part)?;
        let name = format!("ftd cluster {cluster} {}", HEXLOWER.encode(&random_part));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial()?);
        params.not_before = date(now, settings.clock_skew, Duration::ZERO);
        params.not_after = date(now, Duration::ZERO, LIFETIME);
        let certificate = params.self_signed(&key).map_err(failed(what))?;
        let content = Content {
            cluster: cluster.to_owned(),
            node: node.to_owned(),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            list: 1,
            issued: Vec::new(),
            tokens: Vec::new(),
        };
        let mut authority = Self { path: Self::at(dir), content };
        let issue = authority.change(|content| {
            let issue = content.issue(&wish.request()?, node, settings, now)?;
            content.issued.iter_mut().for_each(|issued| issued.confirmed = true);
            Ok(issue)
        })?;
        let revoked = issue.revoked.clone();
        let identity = wish.fulfilled(issue)?;
        Ok((authority, identity, revoked))
    }

    /// Changes what is known, durably, or not at all.
    fn change<T>(
        &mut self,
        change: impl FnOnce(&mut Content) -> Result<T, ClusterError>,
    ) -> Result<T, ClusterError> {
        let mut content = self.content.clone();
        let answer = change(&mut content)?;
        let bytes =
            serde_json::to_vec_pretty(&content).map_err(ClusterError::crypto("the CA cannot be stored"))?;
        disk::write(&self.path, &bytes).map_err(ClusterError::disk(&self.path))?;
        self.content = content;
        Ok(answer)
    }

    /// Its own certificate.
    pub(super) fn certificate(&self) -> Result<CertificateDer<'static>, ClusterError> {
        pem(&self.content.certificate)
    }

    /// By what it is told from all others.
    pub(super) fn fingerprint(&self) -> Result<[u8; 32], ClusterError> {
        Ok(fingerprint(&self.certificate()?))
    }

    /// The secret of a new token that is valid until then.
    pub(super) fn open(
        &mut self,
        until: jiff::Timestamp,
        now: jiff::Timestamp,
    ) -> Result<[u8; 32], ClusterError> {
        let mut secret = [0; 32];
        random(&mut secret)?;
        self.change(|content| {
            content.forget(now);
            content.tokens.push(Open { hash: hash(&secret), until, used: None });
            Ok(())
        })?;
        Ok(secret)
    }

    /// Until when the last token can be used; `None` when there is none.
    pub(super) fn open_until(&self, now: jiff::Timestamp) -> Option<jiff::Timestamp> {
        let open = |token: &&Open| token.used.is_none() && token.until > now;
        self.content.tokens.iter().filter(open).map(|token| token.until).max()
    }

    /// A certificate for who has the secret of a token, which is used up by it.
    pub(super) fn take_in(
        &mut self,
        secret: &[u8; 32],
        node: &str,
        request: &CertificateSigningRequestDer<'_>,
        settings: &Cluster,
        now: jiff::Timestamp,
    ) -> Result<Issue, ClusterError> {
        let refused = |cause: String| Err(ClusterError::Token { cause });
        self.change(|content| {
            let hash = hash(secret);
            // The secret is random: to find out how much of a hash fits tells nothing.
            let Some(token) = content.tokens.iter_mut().find(|token| token.hash == hash) else {
                return refused("it is not of this cluster, or expired more than a day ago".into());
            };
            if let Some((by, at)) = &token.used {
                return refused(format!("{by} has used it, at {at}: each takes in one node"));
            }
            if token.until <= now {
                return refused(format!("it has expired, at {}", token.until));
            }
            token.used = Some((node.to_owned(), now));
            let has_it = |one: &&Issued| one.node == node && one.revoked.is_none() && one.confirmed;
            if let Some(other) = content.issued.iter().find(|one| has_it(one) && one.until > now) {
                return Err(ClusterError::Taken { node: node.to_owned(), until: other.until });
            }
            // One that was issued and never arrived does not keep the node out, but nor shall anybody else use it.
            let mut lost = content.issued.iter_mut().filter(|one| one.node == node && one.revoked.is_none());
            if let Some(first) = lost.next() {
                first.revoked = Some(now);
                lost.for_each(|one| one.revoked = Some(now));
                content.list += 1;
            }
            content.issue(request, node, settings, now)
        })
    }

    /// The node has said that it has what was issued last for it.
    pub(super) fn confirm(&mut self, node: &str) -> Result<(), ClusterError> {
        self.change(|content| {
            if let Some(last) = content.issued.iter_mut().rfind(|issued| issued.node == node) {
                last.confirmed = true;
            }
            Ok(())
        })
    }

    /// A new certificate for a node that has shown one that is valid.
    pub(super) fn renew(
        &mut self,
        node: &str,
        request: &CertificateSigningRequestDer<'_>,
        settings: &Cluster,
        now: jiff::Timestamp,
    ) -> Result<Issue, ClusterError> {
        self.change(|content| {
            let issue = content.issue(request, node, settings, now)?;
            if let Some(last) = content.issued.last_mut() {
                last.confirmed = true;
            }
            Ok(issue)
        })
    }

    /// Revokes all certificates of a node. Answers the new list.
    pub(super) fn revoke(&mut self, node: &str, now: jiff::Timestamp) -> Result<Vec<u8>, ClusterError> {
        if node == self.content.node {
            return Err(ClusterError::Own { node: node.to_owned() });
        }
        self.change(|content| {
            content.forget(now);
            let valid = |one: &&mut Issued| one.node == node && one.revoked.is_none();
            let mut count = 0;
            for one in content.issued.iter_mut().filter(valid) {
                one.revoked = Some(now);
                count += 1;
            }
            if count == 0 {
                let mut known: Vec<_> = content.issued.iter().filter(|one| one.revoked.is_none()).collect();
                known.sort_by(|a, b| a.node.cmp(&b.node));
                known.dedup_by(|a, b| a.node == b.node);
                let known = known.into_iter().map(|one| one.node.clone()).collect();
                return Err(ClusterError::Unknown { node: node.to_owned(), known });
            }
            content.list += 1;
            content.revoked(now)
        })
    }
}

impl Content {
    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, ClusterError> {
        let what = "the CA's key cannot be used";
        let key = KeyPair::from_pem(&self.key).map_err(ClusterError::crypto(what))?;
        Issuer::from_ca_cert_pem(&self.certificate, key).map_err(ClusterError::crypto(what))
    }

    /// Of what is asked for only the key is taken: what the certificate says is the CA's to say.
    fn issue(
        &mut self,
        request: &CertificateSigningRequestDer<'_>,
        node: &str,
        settings: &Cluster,
        now: jiff::Timestamp,
    ) -> Result<Issue, ClusterError> {
        if let Some(flaw) = name_flaw(node) {
            return Err(ClusterError::Name { name: node.to_owned(), flaw });
        }
        self.forget(now);
        let odd = |error: rcgen::Error| ClusterError::Request { cause: error.to_string() };
        let mut wish = CertificateSigningRequestParams::from_der(request).map_err(odd)?;
        let mut params = CertificateParams::new(vec![node.to_owned()]).map_err(odd)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, node);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        params.not_before = date(now, settings.clock_skew, Duration::ZERO);
        params.not_after = date(now, Duration::ZERO, settings.certificate_for);
        wish.params = params;
        let certificate = wish
            .signed_by(&self.issuer()?)
            .map_err(ClusterError::crypto("the certificate cannot be made"))?;
        let facts = x509::facts(certificate.der()).map_err(|cause| ClusterError::Request { cause })?;
        self.issued.push(Issued {
            node: node.to_owned(),
            serial: facts.serial,
            until: facts.until,
            confirmed: false,
            revoked: None,
        });
        Ok(Issue {
            cluster: self.cluster.clone(),
            issuer: self.node.clone(),
            authority: self.certificate.clone(),
            certificate: certificate.pem(),
            revoked: self.revoked(now)?,
        })
    }

    /// The list of revoked certificates, signed.
    fn revoked(&self, now: jiff::Timestamp) -> Result<Vec<u8>, ClusterError> {
        let what = "the list of revoked certificates cannot be made";
        let one = |one: &Issued| {
            Some(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&HEXLOWER.decode(one.serial.as_bytes()).ok()?),
                revocation_time: date(one.revoked?, Duration::ZERO, Duration::ZERO),
                reason_code: Some(RevocationReason::PrivilegeWithdrawn),
                invalidity_date: None,
            })
        };
        let params = CertificateRevocationListParams {
            this_update: date(now, Duration::ZERO, Duration::ZERO),
            next_update: date(now, Duration::ZERO, LIFETIME),
            crl_number: SerialNumber::from(self.list),
            issuing_distribution_point: None,
            revoked_certs: self.issued.iter().filter_map(one).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer()?).map_err(ClusterError::crypto(what))?;
        Ok(list.der().to_vec())
    }

    /// Forgets what has ended: certificates that nobody accepts any more, tokens that nobody remembers.
    fn forget(&mut self, now: jiff::Timestamp) {
        let ago = now.checked_sub(REMEMBER).unwrap_or(now);
        // A clock that is behind accepts a certificate a little longer.
        self.issued.retain(|issued| issued.until > ago);
        self.tokens.retain(|token| token.until > ago);
    }
}

fn hash(secret: &[u8; 32]) -> String {
    blake3::hash(secret).to_string()
}

/// Random bytes that nobody can guess.
pub(super) fn random(bytes: &mut [u8]) -> Result<(), ClusterError> {
    let provider = rustls::crypto::ring::default_provider();
    provider.secure_random.fill(bytes).map_err(|_| ClusterError::Crypto {
        what: "random numbers cannot be had",
        cause: "the kernel gives none".into(),
    })
}

/// A serial number that no other certificate has. Positive, and of a length that does not depend on chance.
fn serial() -> Result<SerialNumber, ClusterError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    bytes[0] = bytes[0] & 0x3f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// A moment as certificates have it.
fn date(at: jiff::Timestamp, before: Duration, after: Duration) -> time::OffsetDateTime {
    rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(at.as_second().max(0) as u64) + after - before
}
