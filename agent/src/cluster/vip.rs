//! The service address: on the interface of one node, found by all.
//!
//! An address moves in four steps. [`Network::carrier`] finds the interface of this host that has the address's
//! network. [`Interface::probe`] asks the others on that network whether somebody has it: a last look
//! that catches a stranger's host and a lease gone wrong, and does not replace the lease, for a host that does not
//! answer may yet have it. [`Network::add`] puts it onto the interface (behind a closed fence, which is opened
//! only with the lease: see [`super::fence`]). [`Interface::announce`] tells the network, so that nobody waits until
//! what he remembers of the old place runs out; again and again for a while, since an announcement may be lost,
//! and somebody who was suspended may have spoken in between.
//!
//! For IPv6 the kernel's own duplicate address detection is left out (`IFA_F_NODAD`): it would keep the
//! address unusable for a second, and behind a closed fence it would see nothing. The probe is in its place.
//!
//! Nothing here remembers anything. What is on the host's interfaces is asked of the kernel each time, so an
//! address that was left behind, by whomever, is found and can be taken off.

mod packet;
mod socket;
#[cfg(test)]
pub(super) mod tests;

use std::{io, net::IpAddr, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::{
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkLayerType},
};
pub use packet::Mac;
use rtnetlink::Handle;
use socket::Frames;
use tokio::{
    task::AbortHandle,
    time::{Instant, timeout_at},
};

use crate::config::address::{Address, same_network};

/// So often is asked in the time for it: RFC 5227's number, not its seconds.
const PROBES: u32 = 3;

/// Why a service address cannot be had or given back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VipError {
    /// The kernel cannot be spoken with.
    #[error("the host's interfaces cannot be read or changed: {0}. ftd needs AF_NETLINK: see security.md")]
    Socket(#[source] io::Error),
    /// The kernel refuses.
    #[error(
        "{address} cannot be {deed}: {error}. It needs CAP_NET_ADMIN (see security.md), and an interface that is up"
    )]
    Netlink {
        /// The address, or what is asked about.
        address: String,
        /// What was tried.
        deed: &'static str,
        /// Why.
        #[source]
        error: rtnetlink::Error,
    },
    /// No interface is in its network.
    #[error(
        "no interface of this host has an address in a network with {address}. Give the interface on which clients \
         reach this node an address of its own there, or correct the workload's address"
    )]
    NoCarrier {
        /// The service address.
        address: Address,
    },
    /// More than one is.
    #[error(
        "{address} could be on each of {}. Let one of them alone have an address of that network", names.join(", ")
    )]
    ManyCarriers {
        /// The service address.
        address: Address,
        /// The interfaces.
        names: Vec<String>,
    },
    /// It is of a kind on which nobody is asked who has an address.
    #[error(
        "{address} cannot be on {name}: it is no Ethernet (nor a bridge, bond or VLAN of it), where others could be \
         asked who has it. Choose an address of a network on Ethernet"
    )]
    NoEthernet {
        /// The service address.
        address: Address,
        /// The interface.
        name: String,
    },
    /// It is switched off.
    #[error("{address} cannot be on {name}: the interface is down. Bring it up (ip link set {name} up)")]
    Down {
        /// The service address.
        address: Address,
        /// The interface.
        name: String,
    },
    /// Frames cannot be sent or received.
    #[error(
        "{ip} cannot be asked for or announced on {name}: {error}. It needs CAP_NET_RAW: see security.md"
    )]
    Frames {
        /// The service address.
        ip: IpAddr,
        /// The interface.
        name: String,
        /// Why.
        #[source]
        error: io::Error,
    },
}

/// An interface that a service address can be on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the kernel.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address on Ethernet.
    pub mac: Mac,
}

/// What came of an announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announced {
    /// It went out.
    Sent,
    /// The kernel dropped it: the fence is closed, or the interface's queue is full.
    Dropped,
}

/// The host's interfaces, by netlink.
#[derive(Debug)]
pub struct Network {
    handle: Handle,
    pump: AbortHandle,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Network {
    /// Opens a way to the kernel; must be called inside a tokio runtime.
    pub fn open() -> Result<Self, VipError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(VipError::Socket)?;
        Ok(Self { handle, pump: tokio::spawn(connection).abort_handle() })
    }

    /// The one interface that is in the address's network: another address of it, by the prefix that it has there,
    /// shares a network with the service address.
    pub async fn carrier(&self, address: &Address) -> Result<Interface, VipError> {
        let ask = |error| VipError::Netlink { address: address.to_string(), deed: "placed", error };
        let near = |message: &AddressMessage| {
            ip_of(message).is_some_and(|other| {
                other != address.ip && same_network(address.ip, other, message.header.prefix_len)
            })
        };
        let all = self.addresses().await.map_err(ask)?;
        let mut found: Vec<u32> = all.iter().filter(|it| near(it)).map(|it| it.header.index).collect();
        found.sort_unstable();
        found.dedup();
        let mut carriers = Vec::new();
        let mut links = self.handle.link().get().execute().boxed();
        while let Some(link) = links.try_next().await.map_err(ask)? {
            let header = &link.header;
            if !found.contains(&header.index) || header.flags.contains(LinkFlags::Loopback) {
                continue;
            }
            let (mut name, mut mac) = (String::new(), None);
            for attribute in &link.attributes {
                match attribute {
                    LinkAttribute::IfName(it) => name.clone_from(it),
                    LinkAttribute::Address(it) => mac = it.as_slice().try_into().ok().map(Mac),
                    _ => {}
                }
            }
            let mac = mac.filter(|_| header.link_layer_type == LinkLayerType::Ether);
            carriers.push((header.index, name, mac, header.flags.contains(LinkFlags::Up)));
        }
        let address = *address;
        if carriers.len() > 1 {
            let names = carriers.into_iter().map(|(_, name, ..)| name).collect();
            return Err(VipError::ManyCarriers { address, names });
        }
        match carriers.pop() {
            None => Err(VipError::NoCarrier { address }),
            Some((_, name, None, _)) => Err(VipError::NoEthernet { address, name }),
            Some((_, name, _, false)) => Err(VipError::Down { address, name }),
            Some((index, name, Some(mac), true)) => Ok(Interface { index, name, mac }),
        }
    }

    /// Whether the address is on any interface of this host.
    pub async fn present(&self, ip: IpAddr) -> Result<bool, VipError> {
        let ask = |error| VipError::Netlink { address: ip.to_string(), deed: "looked for", error };
        Ok(self.addresses().await.map_err(ask)?.iter().any(|message| ip_of(message) == Some(ip)))
    }

    /// Puts the address onto the interface; it may be there already. Usable at once, IPv6 too. It brings no route along:
    /// with a longer prefix than the host's own address has, that would have this host speak to its neighbours from the
    /// service address, and cut it off from them when the fence closes.
    pub async fn add(&self, address: &Address, interface: &Interface) -> Result<(), VipError> {
        let mut request = self.handle.address().add(interface.index, address.ip, address.prefix);
        let mut flags = AddressFlags::Noprefixroute;
        if address.ip.is_ipv6() {
            flags |= AddressFlags::Nodad;
        }
        request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        match request.execute().await {
            Err(error) if errno(&error) != Some(libc::EEXIST) => {
                Err(VipError::Netlink { address: address.to_string(), deed: "added", error })
            }
            _ => Ok(()),
        }
    }

    /// Takes the address off whatever interfaces it is on, with whatever prefix. Says whether it was on any.
    pub async fn delete(&self, ip: IpAddr) -> Result<bool, VipError> {
        let fail = |error| VipError::Netlink { address: ip.to_string(), deed: "taken off", error };
        let mut was = false;
        for message in self.addresses().await.map_err(fail)? {
            if ip_of(&message) != Some(ip) {
                continue;
            }
            match self.handle.address().del(message).execute().await {
                Ok(()) => was = true,
                // Somebody else was quicker.
                Err(error) if matches!(errno(&error), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(was)
    }

    async fn addresses(&self) -> Result<Vec<AddressMessage>, rtnetlink::Error> {
        self.handle.address().get().execute().try_collect().await
    }
}

impl Interface {
    /// Asks for `within` whether somebody else on this interface's network has `ip`, or is about to take it.
    /// Returns with the first who answers.
    pub async fn probe(&self, ip: IpAddr, within: Duration) -> Result<Option<Mac>, VipError> {
        let fail = |error| VipError::Frames { ip, name: self.name.clone(), error };
        let frames = Frames::open(self.index, ip).map_err(fail)?;
        let question = packet::probe(self.mac, ip);
        let (start, mut room) = (Instant::now(), [0; socket::ROOM]);
        for turn in 1..=PROBES {
            let end = start + within * turn / PROBES;
            // A queue that is full: the next question may get through.
            match frames.send(&question).await {
                Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(fail(error)),
                _ => {}
            }
            while let Ok(received) = timeout_at(end, frames.receive(&mut room)).await {
                let length = received.map_err(fail)?;
                if let Some(who) = packet::claim(&room[..length], self.mac, ip) {
                    return Ok(Some(who));
                }
            }
        }
        Ok(None)
    }

    /// Tells everybody on this interface's network that `ip` is here.
    pub async fn announce(&self, ip: IpAddr) -> Result<Announced, VipError> {
        let fail = |error| VipError::Frames { ip, name: self.name.clone(), error };
        let frames = Frames::open(self.index, ip).map_err(fail)?;
        for frame in packet::announcements(self.mac, ip) {
            match frames.send(&frame).await {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Announced::Dropped),
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(Announced::Sent)
    }

    /// Announces it `times` times, `every` so long; ends early when `still` says that it is no longer here.
    pub async fn announce_repeatedly<S: Future<Output = bool>>(
        &self,
        ip: IpAddr,
        times: u32,
        every: Duration,
        still: impl Fn() -> S,
    ) -> Result<(), VipError> {
        for turn in 0..times {
            if turn > 0 {
                tokio::time::sleep(every).await;
            }
            if !still().await {
                break;
            }
            if self.announce(ip).await? == Announced::Dropped {
                tracing::debug!(%ip, interface = self.name, "an announcement was dropped");
            }
        }
        Ok(())
    }
}

/// The address that a message of the kernel is about: the host's own end, where there are two.
fn ip_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut end = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => return Some(*ip),
            AddressAttribute::Address(ip) => end = Some(*ip),
            _ => {}
        }
    }
    end
}

/// What the kernel answered, as a positive number.
fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}
