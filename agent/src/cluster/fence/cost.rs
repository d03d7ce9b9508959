//! What the fence costs a packet: the kernel's own measure (BPF_PROG_TEST_RUN), on programs that hang nowhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::{
    EbpfLoader, TestRunOptions,
    maps::{HashMap, MapData},
    programs::{SchedClassifier, TestRun as _},
};
use serde::Serialize;

use super::{
    FenceError, Lease4, Lease6, OBJECT, Plain,
    frames::{arp, ethernet, packet},
    kernel, key4, key6,
};

const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 100));
const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 0x100));
const OWN6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1));
const PEER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 2));

/// Addresses of each family that are in the maps besides.
const OTHERS: u32 = 30;

/// The cost of one kind of packet.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// Which program, `fence_in` or `fence_out`.
    pub program: &'static str,
    /// What kind of packet.
    pub packet: &'static str,
    /// Whether it is one of a service address.
    pub of_service: bool,
    /// Nanoseconds for each run: the mean of `repeat`, as often as there were rounds.
    pub ns: Vec<u64>,
}

/// Measures all kinds in turn, `rounds` times, each time the mean of `repeat` runs. Needs root.
pub fn measure(rounds: u32, repeat: u32) -> Result<Vec<Cost>, FenceError> {
    let fail = |error: &(dyn std::error::Error + 'static)| kernel("measured", error);
    let missing = || FenceError::Kernel { deed: "measured".into(), cause: "its object is not whole".into() };
    let mut ebpf = EbpfLoader::new().load(OBJECT).map_err(|error| fail(&error))?;
    let mut four: HashMap<MapData, u32, Plain<Lease4>> =
        ebpf.take_map("LEASES4").ok_or_else(missing)?.try_into().map_err(|error| fail(&error))?;
    let mut six: HashMap<MapData, [u32; 4], Plain<Lease6>> =
        ebpf.take_map("LEASES6").ok_or_else(missing)?.try_into().map_err(|error| fail(&error))?;
    for slot in 0..=OTHERS {
        let (address, address6) = match slot {
            0 => (key4(VIP), key6(VIP6)),
            _ => (0x0102_0304 + slot, [slot; 4]),
        };
        let lease = Lease4 { until: u64::MAX, address, slot };
        four.insert(address, Plain(lease), 0).map_err(|error| fail(&error))?;
        let lease = Lease6 { until: u64::MAX, address: address6, slot: slot + OTHERS + 1, reserved: 0 };
        six.insert(address6, Plain(lease), 0).map_err(|error| fail(&error))?;
    }
    let kinds = [
        ("fence_in", "IPv4 to a service address", true, packet(PEER, VIP)),
        ("fence_out", "IPv4 from a service address", true, packet(VIP, PEER)),
        ("fence_in", "IPv6 to a service address", true, packet(PEER6, VIP6)),
        ("fence_out", "IPv6 from a service address", true, packet(VIP6, PEER6)),
        ("fence_in", "other IPv4", false, packet(PEER, OWN)),
        ("fence_out", "other IPv4", false, packet(OWN, PEER)),
        ("fence_in", "other IPv6", false, packet(PEER6, OWN6)),
        ("fence_out", "other IPv6", false, packet(OWN6, PEER6)),
        ("fence_in", "other ARP", false, arp(1, PEER, OWN)),
        ("fence_out", "other ARP", false, arp(1, OWN, PEER)),
    ];
    let mut costs = Vec::new();
    for (program, packet, of_service, rest) in &kinds {
        let loaded: &mut SchedClassifier =
            ebpf.program_mut(program).ok_or_else(missing)?.try_into().map_err(|error| fail(&error))?;
        if loaded.fd().is_err() {
            loaded.load().map_err(|error| fail(&error))?;
        }
        costs.push((Cost { program, packet, of_service: *of_service, ns: Vec::new() }, ethernet(rest)));
    }
    for _ in 0..rounds {
        for (cost, frame) in &mut costs {
            let loaded: &SchedClassifier =
                ebpf.program(cost.program).ok_or_else(missing)?.try_into().map_err(|error| fail(&error))?;
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.repeat = repeat;
            let run = loaded.test_run(options).map_err(|error| fail(&error))?;
            cost.ns.push(u64::try_from(run.duration.as_nanos()).unwrap_or(u64::MAX));
        }
    }
    Ok(costs.into_iter().map(|(cost, _)| cost).collect())
}
