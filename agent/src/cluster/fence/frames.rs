//! Frames to try the programs with.

use std::net::IpAddr;

pub(super) fn ethernet(rest: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(rest);
    frame
}

/// A UDP packet, from the type of the frame on; nothing when its ends are of two families.
pub(super) fn packet(from: IpAddr, to: IpAddr) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut packet = vec![8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
            packet.extend(from.octets());
            packet.extend(to.octets());
            packet.extend([0, 9, 0, 9, 0, 8, 0, 0]);
            packet
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut packet = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 17, 64];
            packet.extend(from.octets());
            packet.extend(to.octets());
            packet.extend([0, 9, 0, 9, 0, 8, 0, 0]);
            packet
        }
        _ => Vec::new(),
    }
}

pub(super) fn arp(operation: u8, sender: IpAddr, target: IpAddr) -> Vec<u8> {
    let (IpAddr::V4(sender), IpAddr::V4(target)) = (sender, target) else { return Vec::new() };
    let mut packet = vec![8, 6, 0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 2];
    packet.extend(sender.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    packet
}

#[cfg(test)]
pub(super) fn neighbour(kind: u8, from: IpAddr, to: IpAddr, target: IpAddr) -> Vec<u8> {
    let mut packet = packet(from, to);
    packet.truncate(2 + 40);
    packet[7] = 24;
    packet[8] = 58;
    packet.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
    let IpAddr::V6(target) = target else { return Vec::new() };
    packet.extend(target.octets());
    packet
}

#[cfg(test)]
pub(super) fn tagged(tag: &[u8], packet: Vec<u8>) -> Vec<u8> {
    let mut all = tag.to_vec();
    all.extend(packet);
    all
}
