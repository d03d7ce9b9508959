//! The fence: packets of a service address pass only before the end of its lease.
//!
//! One program sees what comes in on an interface, the other what goes out. Most packets are of other
//! addresses: those cost one look into a map. A verdict is "drop" or "next program", never "accept": whoever
//! else has programs on the interface is still asked.
//!
//! What must not get out without a lease is what says "the address is here": packets from it, ARP and
//! neighbour advertisements of it. What must not get in is what would make this host say so, or answer: packets
//! to it, questions for it. All else passes, above all what a host without the lease needs to reach the one
//! that has it: its own questions for the address, from an address of its own, and the answers.
//!
//! Offsets into packets are constants in each branch (one per number of VLAN tags): adding a variable to a
//! packet pointer would ask for CAP_PERFMON, and for more of the verifier.
#![no_std]
#![no_main]

use agent_ebpf::fence::{Counts, Lease4, Lease6, SLOTS};
use aya_ebpf::{
    helpers::bpf_ktime_get_boot_ns,
    macros::{classifier, map},
    maps::{HashMap, PerCpuArray},
    programs::TcContext,
};

#[map]
static LEASES4: HashMap<u32, Lease4> = HashMap::with_max_entries(SLOTS, 0);
#[map]
static LEASES6: HashMap<[u32; 4], Lease6> = HashMap::with_max_entries(SLOTS, 0);
#[map]
static COUNTS: PerCpuArray<Counts> = PerCpuArray::with_max_entries(SLOTS, 0);

/// TCX_NEXT, and for cls_bpf TC_ACT_UNSPEC: go on with the next program.
const NEXT: i32 = -1;
/// TC_ACT_SHOT.
const DROP: i32 = 2;

// <linux/if_ether.h>
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;

const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// What is known of an address that is in a map.
#[derive(Clone, Copy)]
struct Lease {
    valid: bool,
    slot: u32,
}

/// Which counter of an address.
#[derive(Clone, Copy)]
enum Count {
    PassedIn,
    PassedOut,
    DroppedIn,
    DroppedOut,
    Conflict,
}

#[inline(always)]
fn count(slot: u32, what: Count) {
    let Some(counts) = COUNTS.get_ptr_mut(slot) else { return };
    // SAFETY: the map lookup gave a valid, aligned pointer; these programs run with softirqs off, so none interrupts
    // another on this processor.
    unsafe {
        match what {
            Count::PassedIn => (*counts).passed_in += 1,
            Count::PassedOut => (*counts).passed_out += 1,
            Count::DroppedIn => (*counts).dropped_in += 1,
            Count::DroppedOut => (*counts).dropped_out += 1,
            Count::Conflict => (*counts).conflicts += 1,
        }
    }
}

/// Four bytes of the packet, as they lie there: directly, which is cheaper by a third, or through the helper where
/// they are not in its linear part.
#[inline(always)]
fn word(packet: &TcContext, at: usize) -> Option<u32> {
    let from = packet.data() + at;
    if from + 4 <= packet.data_end() {
        // SAFETY: the comparison above, which the verifier has seen, keeps it inside the packet.
        return Some(unsafe { core::ptr::read_volatile(from as *const u32) });
    }
    packet.load::<u32>(at).ok()
}

#[inline(always)]
fn half(packet: &TcContext, at: usize) -> Option<u16> {
    let from = packet.data() + at;
    if from + 2 <= packet.data_end() {
        // SAFETY: as above.
        return Some(u16::from_be(unsafe { core::ptr::read_volatile(from as *const u16) }));
    }
    packet.load::<u16>(at).ok().map(u16::from_be)
}

#[inline(always)]
fn byte(packet: &TcContext, at: usize) -> Option<u8> {
    let from = packet.data() + at;
    if from < packet.data_end() {
        // SAFETY: as above.
        return Some(unsafe { core::ptr::read_volatile(from as *const u8) });
    }
    packet.load::<u8>(at).ok()
}

#[inline(always)]
fn address6(packet: &TcContext, at: usize) -> Option<[u32; 4]> {
    Some([word(packet, at)?, word(packet, at + 4)?, word(packet, at + 8)?, word(packet, at + 12)?])
}

#[inline(always)]
fn before(until: u64) -> bool {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_boot_ns() < until }
}

#[inline(always)]
fn lease4(address: u32) -> Option<Lease> {
    let lease = LEASES4.get_ptr(&address)?;
    // SAFETY: the map lookup gave a valid pointer. The element may be given to another key while it is read: the end is
    // read before the address, which tells.
    let (until, of, slot) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*lease).until),
            core::ptr::read_volatile(&raw const (*lease).address),
            core::ptr::read_volatile(&raw const (*lease).slot),
        )
    };
    Some(Lease { valid: of == address && before(until), slot })
}

#[inline(always)]
fn lease6(address: &[u32; 4]) -> Option<Lease> {
    let lease = LEASES6.get_ptr(address)?;
    // SAFETY: as above.
    let (until, last, slot) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*lease).until),
            core::ptr::read_volatile(&raw const (*lease).address),
            core::ptr::read_volatile(&raw const (*lease).slot),
        )
    };
    let same =
        last[0] == address[0] && last[1] == address[1] && last[2] == address[2] && last[3] == address[3];
    Some(Lease { valid: same && before(until), slot })
}

/// Passes or drops by the lease, and counts it.
#[inline(always)]
fn judge(lease: Lease, out: bool) -> i32 {
    match (lease.valid, out) {
        (true, true) => count(lease.slot, Count::PassedOut),
        (true, false) => count(lease.slot, Count::PassedIn),
        (false, true) => count(lease.slot, Count::DroppedOut),
        (false, false) => count(lease.slot, Count::DroppedIn),
    }
    if lease.valid { NEXT } else { DROP }
}

/// Somebody else says that he has the address. It passes, so that this host finds the owner.
#[inline(always)]
fn claimed(lease: Lease) -> i32 {
    if lease.valid {
        count(lease.slot, Count::Conflict);
    }
    NEXT
}

/// What is too short to hold an address says nothing about one.
#[inline(always)]
fn fence(packet: &TcContext, out: bool) -> i32 {
    verdict(packet, out).unwrap_or(NEXT)
}

/// At most two VLAN tags can be in the packet; one more the network card has taken out.
#[inline(always)]
fn verdict(packet: &TcContext, out: bool) -> Option<i32> {
    let kind = half(packet, 12)?;
    if kind != VLAN && kind != QINQ {
        return network::<14>(packet, kind, out);
    }
    let kind = half(packet, 16)?;
    if kind != VLAN && kind != QINQ {
        return network::<18>(packet, kind, out);
    }
    let kind = half(packet, 20)?;
    network::<22>(packet, kind, out)
}

#[inline(always)]
fn network<const AT: usize>(packet: &TcContext, kind: u16, out: bool) -> Option<i32> {
    match kind {
        // RFC 791: source at 12, destination at 16
        IPV4 => {
            let address = word(packet, if out { AT + 12 } else { AT + 16 })?;
            Some(judge(lease4(address)?, out))
        }
        ARP => arp::<AT>(packet, out),
        IPV6 => ipv6::<AT>(packet, out),
        _ => None,
    }
}

/// RFC 826 with Ethernet and IPv4: the sender's address at 14, the target's at 24.
#[inline(always)]
fn arp<const AT: usize>(packet: &TcContext, out: bool) -> Option<i32> {
    let sender = lease4(word(packet, AT + 14)?);
    if out {
        return Some(judge(sender?, true));
    }
    if let Some(lease) = sender {
        return Some(claimed(lease));
    }
    let target = lease4(word(packet, AT + 24)?)?;
    if target.valid { None } else { Some(judge(target, false)) }
}

/// RFC 8200: next header at 6, source at 8, destination at 24; RFC 4861: a neighbour message's target 8 behind.
#[inline(always)]
fn ipv6<const AT: usize>(packet: &TcContext, out: bool) -> Option<i32> {
    let address = address6(packet, if out { AT + 8 } else { AT + 24 })?;
    if let Some(lease) = lease6(&address) {
        return Some(judge(lease, out));
    }
    if byte(packet, AT + 6)? != ICMPV6 {
        return None;
    }
    let kind = byte(packet, AT + 40)?;
    if kind != ADVERTISEMENT && (out || kind != SOLICITATION) {
        return None;
    }
    let lease = lease6(&address6(packet, AT + 48)?)?;
    if !out && kind == ADVERTISEMENT {
        return Some(claimed(lease));
    }
    Some(judge(lease, out))
}

/// For what comes in.
#[classifier]
pub fn fence_in(packet: TcContext) -> i32 {
    fence(&packet, false)
}

/// For what goes out.
#[classifier]
pub fn fence_out(packet: TcContext) -> i32 {
    fence(&packet, true)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// "Dual MIT/GPL": several helpers are for programs that say they are compatible with the GPL
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
