//! A service address: what clients know, wherever the workload runs.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address {
    /// The address. Never one that many hosts have, nor an IPv4 address dressed up as IPv6.
    pub ip: IpAddr,
    /// Bits of the network: 1 to 32, or 1 to 128.
    pub prefix: u8,
}

impl Address {
    /// Reads `10.77.0.100/24` or `fd00:77::100/64`. `Err`: what is wrong, and the mend.
    pub fn parse(text: &str) -> Result<Self, (String, String)> {
        let form = "write it like \"10.77.0.100/24\" or \"fd00:77::100/64\"";
        let flaw = |what: String| Err((what, form.to_owned()));
        let Some((ip, prefix)) = text.split_once('/') else {
            return flaw(format!(
                "\"{text}\" is no service address: the length of its network (\"/24\") is missing"
            ));
        };
        let Ok(ip) = ip.parse::<IpAddr>() else {
            return flaw(format!("\"{ip}\" is no IP address"));
        };
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        let Some(prefix) = prefix.parse::<u8>().ok().filter(|bits| (1..=longest).contains(bits)) else {
            return flaw(format!(
                "\"/{prefix}\" is no length of a network: 1 to {longest} are possible for {ip}"
            ));
        };
        if let Some(what) = unfit(ip) {
            let mend =
                "choose an address of the network that the nodes share, which nothing else uses".to_owned();
            return Err((format!("{ip} cannot be a service address: {what}"), mend));
        }
        // The first and the last address of a network of four and more are not a host's (RFC 1122, 3.2.1.3).
        if let IpAddr::V4(ip) = ip
            && prefix < 31
        {
            let host = u32::from(ip) & (u32::MAX >> prefix);
            if host == 0 || host == u32::MAX >> prefix {
                let kind =
                    if host == 0 { "the address of the network itself" } else { "its broadcast address" };
                return flaw(format!("{ip} cannot be a service address: in a /{prefix} it is {kind}"));
            }
        }
        Ok(Self { ip, prefix })
    }
}

/// What keeps an address from being one that a single host answers for.
fn unfit(ip: IpAddr) -> Option<&'static str> {
    match ip {
        _ if ip.is_unspecified() => Some("it is no host's"),
        _ if ip.is_loopback() => Some("it never leaves the host"),
        _ if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) => Some("it is many hosts'"),
        IpAddr::V4(ip) if ip.octets()[0] == 0 || ip.octets()[0] >= 240 => Some("its range is reserved"),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Some("it is an IPv4 address; write it as one"),
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            Some("it is link-local, and says nothing without the name of an interface")
        }
        _ => None,
    }
}

/// Whether `ip` is in the network of `prefix` bits that `other` is in.
pub fn same_network(ip: IpAddr, other: IpAddr, prefix: u8) -> bool {
    let prefix = u32::from(prefix);
    match (ip, other) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            (u32::from(a) ^ u32::from(b)).checked_shr(32 - prefix.min(32)).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let differ = Ipv6Addr::to_bits(a) ^ Ipv6Addr::to_bits(b);
            differ.checked_shr(128 - prefix.min(128)).unwrap_or(0) == 0
        }
        _ => false,
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_address_has_a_network_and_is_one_hosts() {
        for good in [
            "10.77.0.100/24",
            "10.0.0.1/31",
            "10.0.0.0/31",
            "10.0.0.7/32",
            "fd00:77::100/64",
            "2001:db8::/128",
        ] {
            assert_eq!(Address::parse(good).unwrap().to_string(), good);
        }
        for (text, cause) in [
            ("10.77.0.100", "is missing"),
            ("10.77.0/24", "no IP address"),
            ("web/24", "no IP address"),
            ("10.77.0.100/33", "1 to 32"),
            ("10.77.0.100/0", "1 to 32"),
            ("fd00::1/129", "1 to 128"),
            ("10.77.0.100/x", "no length"),
            ("10.77.0.0/24", "the network itself"),
            ("10.77.0.255/24", "broadcast"),
            ("127.0.0.1/8", "never leaves"),
            ("0.0.0.0/8", "no host's"),
            ("224.0.0.18/24", "many hosts'"),
            ("240.0.0.1/24", "reserved"),
            ("ff02::1/64", "many hosts'"),
            ("fe80::1/64", "link-local"),
            ("::ffff:10.0.0.1/120", "IPv4"),
        ] {
            let (what, mend) = Address::parse(text).unwrap_err();
            assert!(what.contains(cause) && !mend.is_empty(), "{text}: {what}");
        }
    }

    proptest! {
        /// Two addresses share a network exactly when no bit before the prefix's end differs.
        #[test]
        fn a_network_is_its_first_bits(a: u128, flip in 0u32..128, prefix in 0u8..=128) {
            let b = a ^ (1 << flip);
            let (six_a, six_b) = (IpAddr::V6(Ipv6Addr::from(a)), IpAddr::V6(Ipv6Addr::from(b)));
            prop_assert_eq!(same_network(six_a, six_b, prefix), 127 - flip >= u32::from(prefix));
            let (four_a, four_b) = (a as u32, b as u32);
            let first = (four_a ^ four_b).leading_zeros();
            let prefix = prefix.min(32);
            let (four_a, four_b) = (IpAddr::V4(four_a.into()), IpAddr::V4(four_b.into()));
            prop_assert_eq!(same_network(four_a, four_b, prefix), first >= u32::from(prefix));
            prop_assert!(!same_network(four_a, six_b, prefix));
        }
    }
}
