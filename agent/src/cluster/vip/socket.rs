//! A socket for whole Ethernet frames on one interface; see packet(7).
#![allow(unsafe_code, reason = "nix cannot make the address that a packet socket is bound to")]

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Longer than any frame that is of interest here.
pub(super) const ROOM: usize = 2048;

/// Frames of the protocol by which addresses of one family are resolved: all of IPv6 for IPv6.
pub(super) struct Frames(AsyncFd<OwnedFd>);

impl Frames {
    /// Opens it on the interface of this index. Needs `CAP_NET_RAW`.
    pub(super) fn open(interface: u32, family: IpAddr) -> io::Result<Self> {
        let protocol = if family.is_ipv4() { libc::ETH_P_ARP } else { libc::ETH_P_IPV6 };
        let protocol = (protocol as u16).to_be();
        // With no protocol it receives nothing before it is bound to one interface.
        let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is involved; the descriptor is new and nobody else's.
        let socket = unsafe {
            let raw = libc::socket(libc::AF_PACKET, flags, 0);
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(raw)
        };
        let index = i32::try_from(interface).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: plain data, of which all zeroes is a value; the kernel reads as many bytes as it is told.
        let bound = unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = index;
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length)
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is owned, stays open as long as this lives, and is not replaced.
        Ok(Self(unsafe { AsyncFd::register(socket) }?))
    }

    /// Sends a frame, as it is.
    pub(super) async fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, |socket| Ok(nix::unistd::write(socket, frame).map(drop)?)).await
    }

    /// The next frame; what does not fit into `room` is cut off.
    pub(super) async fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        self.0.async_io(Interest::READABLE, |socket| Ok(nix::unistd::read(socket, room)?)).await
    }
}
