//! What TLS is to accept: nodes of this cluster, by certificates of its CA that have neither ended nor been revoked.
//!
//! - Both sides show a certificate. Whoever dials also checks that the name in it is that of the node he means.
//! - No session is ever resumed and no early data taken: a resumed session would not look at the certificate again.
//! - While a token for joining is open, and only then, a client without a certificate gets through the handshake, to the
//!   one service that takes tokens (`join`), by a protocol name of its own.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};

use super::{
    error::ClusterError,
    identity::{Identity, fingerprint},
};

/// The protocol between nodes. Another number is another protocol.
pub(super) const PEERS: &[u8] = b"ftd/1";
/// The protocol for joining.
pub(super) const JOIN: &[u8] = b"ftd-join/1";

/// Both sides of TLS, for one identity and one list of revoked certificates.
#[derive(Clone)]
pub(super) struct Tls {
    /// For nodes.
    pub(super) client: Arc<QuicClientConfig>,
    /// For nodes, or for nodes and those that want to join.
    pub(super) server: Arc<QuicServerConfig>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn failed<E: ToString>(error: E) -> ClusterError {
    ClusterError::crypto("TLS cannot be set up")(error)
}

impl Tls {
    /// For this identity; `revoked` is a list of its CA, if there is one.
    pub(super) fn new(
        identity: &Identity,
        revoked: Option<&[u8]>,
        joins: bool,
    ) -> Result<Self, ClusterError> {
        let authority = identity.authority()?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone()).map_err(failed)?;
        let roots = Arc::new(roots);
        let lists = || revoked.map(|list| CertificateRevocationListDer::from(list.to_vec()));
        let chain = vec![identity.certificate()?, authority];

        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .with_crls(lists())
            .build()
            .map_err(failed)?;
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(failed)?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain.clone(), identity.key()?)
            .map_err(failed)?;
        client.alpn_protocols = vec![PEERS.to_vec()];
        client.resumption = Resumption::disabled();

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).with_crls(lists());
        let verifier = if joins { verifier.allow_unauthenticated() } else { verifier };
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier.build().map_err(failed)?)
            .with_single_cert(chain, identity.key()?)
            .map_err(failed)?;
        server.alpn_protocols =
            if joins { vec![PEERS.to_vec(), JOIN.to_vec()] } else { vec![PEERS.to_vec()] };
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(QuicClientConfig::try_from(client).map_err(failed)?),
            server: Arc::new(QuicServerConfig::try_from(server).map_err(failed)?),
        })
    }
}

/// TLS of a node that wants to join a cluster of whose CA it knows the fingerprint.
pub(super) fn joining(authority: [u8; 32]) -> Result<Arc<QuicClientConfig>, ClusterError> {
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { authority, provider: provider() }))
        .with_no_client_auth();
    client.alpn_protocols = vec![JOIN.to_vec()];
    client.resumption = Resumption::disabled();
    Ok(Arc::new(QuicClientConfig::try_from(client).map_err(failed)?))
}

/// Trusts the CA with this fingerprint, which the server has to show along with its own certificate; all else is
/// checked as always.
#[derive(Debug)]
struct Pinned {
    authority: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates.iter().find(|shown| fingerprint(shown) == self.authority);
        let authority = authority.ok_or(CertificateError::UnknownIssuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // QUIC has TLS 1.3 and nothing else.
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}
