//! The service's address, which moves with it: off the source when everything stands still, onto the target before the
//! sockets are made there. In between nobody answers for it, and clients ask again.
//!
//! An address that is not on the source when the move begins is nobody's that moves, and is left alone.

use super::Refused;
use crate::{
    cluster::vip::{Network, VipError},
    config::{Config, address::Address, cluster::Cluster},
};

fn failed(error: VipError) -> Refused {
    Refused::new(error, "see: ip address")
}

fn parse(address: &str) -> Result<Address, Refused> {
    Address::parse(address)
        .map_err(|_| Refused::new(format!("{address} is no address"), "correct address = \"…\""))
}

/// The address of a workload that is on this host.
pub(super) async fn of(config: &Config, workload: &str) -> Result<Option<String>, Refused> {
    let workload = config.workloads.iter().find(|one| *one.name.as_ref() == workload);
    let Some(address) = workload.and_then(crate::config::Workload::service_address) else { return Ok(None) };
    let here = Network::open().map_err(failed)?.present(address.ip).await.map_err(failed)?;
    Ok(here.then(|| address.to_string()))
}

/// Whether it can be on this host.
pub(super) async fn fits(address: Option<&str>) -> Result<(), Refused> {
    let Some(address) = address.map(parse).transpose()? else { return Ok(()) };
    Network::open().map_err(failed)?.carrier(&address).await.map(drop).map_err(failed)
}

/// Takes it off this host.
pub(super) async fn give_up(address: Option<&str>) -> Result<(), Refused> {
    let Some(address) = address.map(parse).transpose()? else { return Ok(()) };
    Network::open().map_err(failed)?.delete(address.ip).await.map(drop).map_err(failed)
}

/// Puts it onto this host, and tells the network so, again and again for a while.
pub(super) async fn take(address: Option<&str>, settings: &Cluster) -> Result<(), Refused> {
    let Some(address) = address.map(parse).transpose()? else { return Ok(()) };
    let network = Network::open().map_err(failed)?;
    let interface = network.carrier(&address).await.map_err(failed)?;
    network.add(&address, &interface).await.map_err(failed)?;
    let (times, every) = (settings.announce, settings.announce_every);
    tokio::spawn(async move {
        // It may have moved on meanwhile.
        let still = || async { network.present(address.ip).await.unwrap_or(false) };
        if let Err(error) = interface.announce_repeatedly(address.ip, times, every, still).await {
            tracing::warn!(%error, "a service address is not announced");
        }
    });
    Ok(())
}
