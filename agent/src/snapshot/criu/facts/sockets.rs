//! Sockets, by inode: which protocol, and for unix sockets who is at the other end.
//!
//! /proc/net/unix does not tell the other end; the kernel's socket diagnosis does (sock_diag(7)): one request
//! over netlink, answered by a record for each unix socket of this network namespace.

use std::{collections::HashMap, fs, io, os::fd::AsRawFd as _};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};

/// A unix socket, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnixSocket {
    /// The inode of the other end; 0 for none.
    pub(super) peer: u64,
    /// The name that it is bound to; empty for none, `@` first for abstract ones.
    pub(super) name: String,
    /// A stream, or packets in order; not datagrams.
    pub(super) stream: bool,
}

// linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const UDIAG_SHOW_NAME: u32 = 0x1;
const UDIAG_SHOW_PEER: u32 = 0x4;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_PEER: u16 = 2;
/// struct nlmsghdr, struct unix_diag_msg, struct nlattr
const HEADER: usize = 16;
const MESSAGE: usize = 16;
const ATTRIBUTE: usize = 4;

/// All unix sockets of this network namespace.
pub(super) fn unix() -> io::Result<HashMap<u64, UnixSocket>> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    // The kernel answers at once, or never will.
    setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::seconds(5))?;
    send(netlink.as_raw_fd(), &request(), MsgFlags::empty())?;
    let mut all = HashMap::new();
    let mut bytes = vec![0; 64 << 10];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
        if read(&bytes[..length], &mut all)? {
            return Ok(all);
        }
    }
}

fn request() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(40_u32.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]); // sequence, port
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes()); // in every state
    bytes.extend(0_u32.to_ne_bytes()); // every inode
    bytes.extend((UDIAG_SHOW_NAME | UDIAG_SHOW_PEER).to_ne_bytes());
    bytes.extend([0; 8]); // cookie
    bytes
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Takes over one part of the answer; says whether it was the last.
fn read(mut bytes: &[u8], all: &mut HashMap<u64, UnixSocket>) -> io::Result<bool> {
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = length as usize;
        let Some(message) = bytes.get(HEADER..length) else { break };
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = u32_at(message, 0).unwrap_or(0).cast_signed();
                return Err(io::Error::from_raw_os_error(-errno));
            }
            _ => {
                if let Some((inode, socket)) = unix_socket(message) {
                    all.insert(inode, socket);
                }
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn unix_socket(message: &[u8]) -> Option<(u64, UnixSocket)> {
    let kind = i32::from(*message.get(1)?);
    let inode = u32_at(message, 4)?;
    let mut socket = UnixSocket { peer: 0, name: String::new(), stream: kind != libc::SOCK_DGRAM };
    let mut rest = message.get(MESSAGE..)?;
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let length = usize::from(length);
        let Some(value) = rest.get(ATTRIBUTE..length) else { break };
        match kind {
            UNIX_DIAG_NAME => socket.name = name(value),
            UNIX_DIAG_PEER => socket.peer = u32_at(value, 0)?.into(),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((inode.into(), socket))
}

fn name(bytes: &[u8]) -> String {
    let (at, bytes) = match bytes {
        [0, rest @ ..] => ("@", rest),
        path => ("", path),
    };
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    format!("{at}{}", String::from_utf8_lossy(&bytes[..end]))
}

/// The protocols of sockets that are no unix sockets, by inode, in a process's network namespace. The column
/// of the inode differs from table to table.
pub(super) fn protocols(pid: u32) -> HashMap<u64, &'static str> {
    const TABLES: [(&str, usize); 13] = [
        ("tcp", 9),
        ("tcp6", 9),
        ("udp", 9),
        ("udp6", 9),
        ("udplite", 9),
        ("udplite6", 9),
        ("raw", 9),
        ("raw6", 9),
        ("icmp", 9),
        ("icmp6", 9),
        ("packet", 8),
        ("netlink", 9),
        ("vsock", 9),
    ];
    let mut all = HashMap::new();
    for (table, column) in TABLES {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        let inodes =
            text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(column)?.parse().ok());
        all.extend(inodes.filter(|inode| *inode != 0).map(|inode| (inode, table)));
    }
    all
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        os::unix::{
            fs::MetadataExt as _,
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    };

    use super::*;

    fn inode(fd: &impl std::os::fd::AsRawFd) -> u64 {
        fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().ino()
    }

    #[test]
    fn the_kernel_names_both_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (one, other) = UnixDatagram::pair().unwrap();
        let all = unix().unwrap();
        assert_eq!(all[&inode(&client)].peer, inode(&accepted));
        assert_eq!(all[&inode(&accepted)].name, path.to_str().unwrap());
        assert!(all[&inode(&client)].stream && !all[&inode(&one)].stream);
        assert_eq!(all[&inode(&one)].peer, inode(&other));
        assert_eq!(all[&inode(&listener)].peer, 0);
    }

    #[test]
    fn internet_sockets_are_told_from_unix_sockets() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let all = protocols(std::process::id());
        assert_eq!(all.get(&inode(&tcp)), Some(&"tcp"));
    }

    #[test]
    fn a_cut_answer_is_no_panic() {
        let mut whole = [0; HEADER + MESSAGE];
        whole[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        for claimed in 0..80_u32 {
            whole[..4].copy_from_slice(&claimed.to_ne_bytes());
            for cut in 0..whole.len() {
                let mut all = HashMap::new();
                // A claimed length of 0 must not go round for ever.
                let _ = read(&whole[..cut], &mut all);
            }
        }
    }
}
