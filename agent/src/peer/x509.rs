//! What stands in certificates and lists of revoked ones, read from their bytes.
//!
//! Whether a certificate is to be trusted is rustls's business, not this module's: what is read here has been
//! verified before, or is verified here with the CA's key.

use std::collections::HashSet;

use data_encoding::HEXLOWER;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _,
    revocation_list::CertificateRevocationList,
};

/// What ftd needs to know of a node's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The node's name.
    pub name: String,
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// From when on it is valid.
    pub from: jiff::Timestamp,
    /// Until when.
    pub until: jiff::Timestamp,
}

fn moment(seconds: i64) -> jiff::Timestamp {
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX)
}

/// Reads a certificate. `Err` says why it is not that of a node.
pub(super) fn facts(der: &[u8]) -> Result<Facts, String> {
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|error| format!("it is no certificate: {error}"))?;
    if !rest.is_empty() {
        return Err("there is something behind its end".into());
    }
    let names = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let [GeneralName::DNSName(name)] = names else { return Err("it does not name one node".into()) };
    if let Some(flaw) = crate::config::cluster::name_flaw(name) {
        return Err(format!("\"{}\" is no name of a node: {flaw}", name.escape_default()));
    }
    let validity = certificate.validity();
    Ok(Facts {
        name: (*name).to_owned(),
        serial: HEXLOWER.encode(certificate.raw_serial()),
        from: moment(validity.not_before.timestamp()),
        until: moment(validity.not_after.timestamp()),
    })
}

/// A list of revoked certificates that the CA has signed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Revoked {
    /// Each list of a CA has a higher one than those before it.
    pub(super) number: u64,
    /// Serial numbers, in hexadecimal.
    pub(super) serials: HashSet<String>,
}

/// Reads such a list. `Err` says why it is not one of this CA.
pub(super) fn revoked(der: &[u8], authority: &[u8]) -> Result<Revoked, String> {
    let broken = |what: &str| format!("the list of revoked certificates cannot be used: {what}");
    let (_, authority) = X509Certificate::from_der(authority).map_err(|error| broken(&error.to_string()))?;
    let (rest, list) =
        CertificateRevocationList::from_der(der).map_err(|error| broken(&error.to_string()))?;
    if !rest.is_empty() {
        return Err(broken("there is something behind its end"));
    }
    if list.issuer() != authority.subject() {
        return Err(broken("it is another CA's"));
    }
    list.verify_signature(authority.public_key()).map_err(|_| broken("the CA has not signed it"))?;
    let number = list.crl_number().and_then(|number| number.to_u64_digits().first().copied());
    let serials = list.iter_revoked_certificates().map(|one| HEXLOWER.encode(one.raw_serial())).collect();
    Ok(Revoked { number: number.unwrap_or(0), serials })
}
