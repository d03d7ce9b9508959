//! Who this node is in its cluster: the CA's certificate, its own, and its key, which never leaves it.
//!
//! All in one file that is replaced as a whole, so that a node is in a cluster or not, and has a key that belongs to its
//! certificate, whenever it is killed.

use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _,
};
use serde::{Deserialize, Serialize};

use super::{
    disk,
    error::ClusterError,
    x509::{self, Facts},
};

/// An identity, as it is stored.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Identity {
    /// The cluster's name.
    pub(super) cluster: String,
    /// This node's name.
    pub(super) node: String,
    /// The node that has the CA.
    pub(super) issuer: String,
    /// The CA's certificate, as PEM.
    pub(super) authority: String,
    /// This node's, as PEM.
    certificate: String,
    /// Its key, as PEM.
    key: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("cluster", &self.cluster)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// What a CA gives to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Issue {
    /// The cluster's name.
    pub(super) cluster: String,
    /// The node that has the CA.
    pub(super) issuer: String,
    /// The CA's certificate, as PEM.
    pub(super) authority: String,
    /// The node's, as PEM.
    pub(super) certificate: String,
    /// The newest list of revoked certificates.
    pub(super) revoked: Vec<u8>,
}

/// A key without a certificate yet.
pub(super) struct Wish {
    node: String,
    key: KeyPair,
}

impl Wish {
    /// A new key for this node.
    pub(super) fn new(node: &str) -> Result<Self, ClusterError> {
        if let Some(flaw) = crate::config::cluster::name_flaw(node) {
            return Err(ClusterError::Name { name: node.to_owned(), flaw });
        }
        let key = KeyPair::generate().map_err(ClusterError::crypto("a key cannot be made"))?;
        Ok(Self { node: node.to_owned(), key })
    }

    /// The request for a certificate: proves that who sends it has the key.
    pub(super) fn request(&self) -> Result<CertificateSigningRequestDer<'static>, ClusterError> {
        let failed = ClusterError::crypto::<rcgen::Error>;
        let what = "a request for a certificate cannot be made";
        let mut params = CertificateParams::new(vec![self.node.clone()]).map_err(failed(what))?;
        params.distinguished_name.push(DnType::CommonName, self.node.as_str());
        Ok(params.serialize_request(&self.key).map_err(failed(what))?.der().clone())
    }

    /// The identity that comes of what a CA has given for that. It is looked at closely: what is stored must work.
    pub(super) fn fulfilled(self, issue: Issue) -> Result<Identity, ClusterError> {
        let identity = Identity {
            cluster: issue.cluster,
            node: self.node,
            issuer: issue.issuer,
            authority: issue.authority,
            certificate: issue.certificate,
            key: self.key.serialize_pem(),
        };
        identity.check()?;
        Ok(identity)
    }
}

impl Identity {
    /// Where the identity of the node with this directory is.
    pub(super) fn path(dir: &Path) -> PathBuf {
        dir.join("identity.json")
    }

    /// What is stored in `dir`; `None` when the node is in no cluster.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, ClusterError> {
        let path = Self::path(dir);
        let Some(bytes) = disk::read(&path).map_err(ClusterError::disk(&path))? else { return Ok(None) };
        let identity: Self = serde_json::from_slice(&bytes)
            .map_err(ClusterError::crypto("cluster/identity.json in node.state_dir makes no sense"))?;
        identity.check()?;
        Ok(Some(identity))
    }

    /// Stores it durably.
    pub(super) fn save(&self, dir: &Path) -> Result<(), ClusterError> {
        let path = Self::path(dir);
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(ClusterError::crypto("the identity cannot be written"))?;
        disk::write(&path, &bytes).map_err(ClusterError::disk(&path))
    }

    fn check(&self) -> Result<(), ClusterError> {
        const WHAT: &str = "this node's identity cannot be used";
        let failed = |cause: &str| ClusterError::Crypto { what: WHAT, cause: cause.to_owned() };
        let facts = self.facts()?;
        if facts.name != self.node {
            return Err(failed(&format!("its certificate is for {}, not for {}", facts.name, self.node)));
        }
        let key = KeyPair::from_pem(&self.key).map_err(|error| failed(&error.to_string()))?;
        let certificate = self.certificate()?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|error| failed(&error.to_string()))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(failed("its key is not that of its certificate"));
        }
        let authority = self.authority()?;
        let (_, authority) =
            x509_parser::parse_x509_certificate(&authority).map_err(|error| failed(&error.to_string()))?;
        parsed
            .verify_signature(Some(authority.public_key()))
            .map_err(|_| failed("its certificate is not of this cluster's CA"))
    }

    /// The CA's certificate.
    pub(super) fn authority(&self) -> Result<CertificateDer<'static>, ClusterError> {
        pem(&self.authority)
    }

    /// This node's certificate.
    pub(super) fn certificate(&self) -> Result<CertificateDer<'static>, ClusterError> {
        pem(&self.certificate)
    }

    /// This node's key.
    pub(super) fn key(&self) -> Result<PrivateKeyDer<'static>, ClusterError> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(self.key.as_bytes());
        Ok(key.map_err(ClusterError::crypto("this node's key cannot be read"))?.into())
    }

    /// What its certificate says.
    pub(super) fn facts(&self) -> Result<Facts, ClusterError> {
        x509::facts(&self.certificate()?)
            .map_err(ClusterError::crypto("this node's certificate cannot be read"))
    }
}

/// The certificate in this text.
pub(super) fn pem(text: &str) -> Result<CertificateDer<'static>, ClusterError> {
    CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(ClusterError::crypto("a certificate cannot be read"))
}

/// By what a CA is told from all others.
pub(super) fn fingerprint(authority: &[u8]) -> [u8; 32] {
    blake3::hash(authority).into()
}
