//! The frames by which hosts of one Ethernet tell who has an address (pure).
//!
//! For IPv4 these are ARP's (RFC 826), used for probing and announcing as RFC 5227 has it; for IPv6 those of
//! neighbour discovery (RFC 4861), used for probing as in RFC 4862, 5.4. A probe never names the address as its
//! sender's: nobody who hears it may learn anything from it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

const ETHERNET: usize = 14;
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const ICMPV6: u8 = 58;
/// A neighbour message counts only with it: no router has passed it on (RFC 4861, 7.1).
const HOP_LIMIT: u8 = 255;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Bit "override" of an advertisement: what the listener knew is out of date (RFC 4861, 4.4).
const OVERRIDE: u8 = 0x20;

/// The address of an Ethernet interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if at == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The frame by which `me` asks who has `ip`, without saying that it wants it itself.
pub(super) fn probe(me: Mac, ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => arp(me, 1, Ipv4Addr::UNSPECIFIED, [0; 6], ip),
        IpAddr::V6(ip) => {
            // The solicited-node address (RFC 4291, 2.7.1): only who has an address with this end listens.
            let [.., x, y, z] = ip.octets();
            let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(x), u16::from_be_bytes([y, z]));
            neighbour(me, Ipv6Addr::UNSPECIFIED, to, SOLICITATION, 0, ip, &[])
        }
    }
}

/// The frames by which `me` tells everybody that it has `ip`.
pub(super) fn announcements(me: Mac, ip: IpAddr) -> Vec<Vec<u8>> {
    match ip {
        // RFC 5227 announces by requests; some hosts bring their caches up to date by replies alone.
        IpAddr::V4(ip) => vec![arp(me, 1, ip, [0; 6], ip), arp(me, 2, ip, me.0, ip)],
        IpAddr::V6(ip) => {
            let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            // Option 2, of one unit of eight bytes: the target's own link-layer address.
            let mut option = vec![2, 1];
            option.extend(me.0);
            vec![neighbour(me, ip, all, ADVERTISEMENT, OVERRIDE, ip, &option)]
        }
    }
}

/// Who else has `ip` or is about to take it, going by this frame: the interface that says so.
pub(super) fn claim(frame: &[u8], me: Mac, ip: IpAddr) -> Option<Mac> {
    let from = Mac(frame.get(6..12)?.try_into().ok()?);
    let (kind, body) = (frame.get(12..14)?, frame.get(ETHERNET..)?);
    let who = match ip {
        IpAddr::V4(ip) if kind == TYPE_ARP => arp_claim(body, ip)?,
        IpAddr::V6(ip) if kind == TYPE_IPV6 => neighbour_claim(body, ip).then_some(from)?,
        _ => return None,
    };
    (who != me && from != me).then_some(who)
}

/// An ARP packet of Ethernet and IPv4, in a broadcast frame.
fn arp(me: Mac, operation: u8, sender: Ipv4Addr, target_mac: [u8; 6], target: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(me.0);
    frame.extend(TYPE_ARP);
    frame.extend([0, 1, 0x08, 0x00, 6, 4, 0, operation]);
    frame.extend(me.0);
    frame.extend(sender.octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame
}

/// Its sender has the address, or, with no address yet, probes for it as we do.
fn arp_claim(body: &[u8], ip: Ipv4Addr) -> Option<Mac> {
    if body.get(..6)? != [0, 1, 0x08, 0x00, 6, 4] {
        return None;
    }
    let (sender, target) = (body.get(14..18)?, body.get(24..28)?);
    let probes = body.get(6..8)? == [0, 1] && sender == [0; 4] && target == ip.octets();
    if sender == ip.octets() || probes { Some(Mac(body.get(8..14)?.try_into().ok()?)) } else { None }
}

fn neighbour(
    me: Mac,
    from: Ipv6Addr,
    to: Ipv6Addr,
    kind: u8,
    flags: u8,
    target: Ipv6Addr,
    option: &[u8],
) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    message.extend(option);
    let sum = checksum(from, to, &message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    // A multicast address has this Ethernet address (RFC 2464, 7).
    let [.., a, b, c, d] = to.octets();
    let mut frame = vec![0x33, 0x33, a, b, c, d];
    frame.extend(me.0);
    frame.extend(TYPE_IPV6);
    frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, HOP_LIMIT]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(message);
    frame
}

/// An advertisement of the address, or a solicitation of somebody who has none yet and wants this one.
fn neighbour_claim(body: &[u8], ip: Ipv6Addr) -> bool {
    let read = || {
        let length = usize::from(u16::from_be_bytes(body.get(4..6)?.try_into().ok()?));
        if body.first()? >> 4 != 6 || body.get(6..8)? != [ICMPV6, HOP_LIMIT] || length < 24 {
            return None;
        }
        let from: [u8; 16] = body.get(8..24)?.try_into().ok()?;
        let to: [u8; 16] = body.get(24..40)?.try_into().ok()?;
        let message = body.get(40..)?.get(..length)?;
        if checksum(from.into(), to.into(), message) != 0 || message.get(8..24)? != ip.octets() {
            return None;
        }
        Some(match message[0] {
            ADVERTISEMENT => true,
            SOLICITATION => from == [0; 16],
            _ => false,
        })
    };
    read().unwrap_or(false)
}

/// The checksum of a message with its pseudo-header (RFC 4443, 2.3): 0 over one that carries the right sum.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let mut sum = u32::from(ICMPV6) + message.len() as u32;
    for part in [&from.octets()[..], &to.octets(), message] {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ME: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        // Not "no address": that is what a probe says of its sender.
        prop_oneof![
            (1u32..).prop_map(|bits| IpAddr::V4(bits.into())),
            (1u128..).prop_map(|bits| IpAddr::V6(bits.into()))
        ]
    }

    /// One frame of each kind, byte by byte as the RFCs draw them; the sum was added up by hand.
    #[test]
    fn frames_are_as_they_are_drawn() {
        let frame = announcements(ME, "10.77.0.100".parse().unwrap()).remove(0);
        assert_eq!(
            frame,
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0,
                0, 0, 1, 10, 77, 0, 100, 0, 0, 0, 0, 0, 0, 10, 77, 0, 100
            ]
        );
        let frame = probe(ME, "fd00::1:203".parse().unwrap());
        assert_eq!(frame[..14], [0x33, 0x33, 0xff, 1, 2, 3, 2, 0, 0, 0, 0, 1, 0x86, 0xdd]);
        assert_eq!(frame[14..22], [0x60, 0, 0, 0, 0, 24, 58, 255]);
        // ff02 + 0001 + ff01 + 0203, 58 + 24, 8700, fd00 + 0001 + 0203
        let sum = 0xff02 + 1 + 0xff01 + 0x0203 + 58 + 24 + 0x8700 + 0xfd00 + 1 + 0x0203_u32;
        let sum = !((sum & 0xffff) as u16 + (sum >> 16) as u16);
        assert_eq!(frame[56..58], sum.to_be_bytes());
    }

    proptest! {
        /// What another says with our own builder is understood; about another address, or by ourselves, it is nothing.
        #[test]
        fn a_claim_is_of_one_address_and_of_another_host(ip in any_ip(), else_ip in any_ip()) {
            prop_assume!(ip != else_ip);
            for frame in announcements(OTHER, ip).into_iter().chain([probe(OTHER, ip)]) {
                prop_assert_eq!(claim(&frame, ME, ip), Some(OTHER));
                prop_assert_eq!(claim(&frame, OTHER, ip), None);
                prop_assert_eq!(claim(&frame, ME, else_ip), None);
                // Ethernet fills short frames up.
                let mut padded = frame.clone();
                padded.resize(60.max(frame.len()), 0);
                prop_assert_eq!(claim(&padded, ME, ip), Some(OTHER));
                // Cut anywhere, it says nothing.
                for length in 0..frame.len() {
                    prop_assert_eq!(claim(&frame[..length], ME, ip), None);
                }
            }
        }

        /// A client that asks for the address claims nothing.
        #[test]
        fn a_question_of_a_client_is_no_claim(ip: u32, client: u32) {
            prop_assume!(ip != client && client != 0);
            let frame = arp(OTHER, 1, client.into(), [0; 6], ip.into());
            prop_assert_eq!(claim(&frame, ME, IpAddr::V4(ip.into())), None);
        }

        #[test]
        fn a_solicitation_of_a_client_is_no_claim(ip: u128, client: u128) {
            prop_assume!(client != 0);
            let frame = neighbour(OTHER, client.into(), ip.into(), SOLICITATION, 0, ip.into(), &[]);
            prop_assert_eq!(claim(&frame, ME, IpAddr::V6(ip.into())), None);
        }

        /// One flipped bit in what the sum covers, and it counts no more.
        #[test]
        fn a_broken_neighbour_message_counts_for_nothing(ip in 1u128.., bit in 0usize..(86 - 22) * 8) {
            let mut frame = announcements(OTHER, IpAddr::V6(ip.into())).remove(0);
            frame[22 + bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(claim(&frame, ME, IpAddr::V6(ip.into())), None);
        }

        /// Whatever comes by wire, reading it ends and takes nothing for granted.
        #[test]
        fn any_bytes_can_be_read(frame: Vec<u8>, ip in any_ip()) {
            claim(&frame, ME, ip);
            for kind in [TYPE_ARP, TYPE_IPV6] {
                let mut typed = vec![0; 12];
                typed.extend(kind);
                typed.extend(&frame);
                claim(&typed, ME, ip);
            }
        }
    }
}
