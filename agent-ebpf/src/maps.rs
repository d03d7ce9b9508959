//! The maps, and what all programs do with them.

use core::arch::asm;

use agent_ebpf::{Header, NO_SLOT, NameKey, Watched, counter};
use aya_ebpf::{
    helpers::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf, ring_buf::RingBufEntry},
};

/// Records on their way to the agent, which sets the size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Cgroup id -> what it is to ftd.
#[map]
pub(crate) static WATCHED: HashMap<u64, Watched> = HashMap::with_max_entries(16384, 0);

/// Names that are followed: (parent, name) -> what a new cgroup there is to ftd.
#[map]
pub(crate) static NAMES: HashMap<NameKey, Watched> = HashMap::with_max_entries(4096, 0);

/// Where a key of `NAMES` is put together, being too large for the stack. One is enough: the kernel
/// makes and removes cgroups under one lock (`cgroup_mutex`).
#[map]
pub(crate) static NAME: Array<NameKey> = Array::with_max_entries(1, 0);

/// See [`counter`].
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// Adds one, atomically: an interrupt may run another program in the middle of this one.
#[inline(always)]
pub(crate) fn count(which: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(which) {
        // core has no atomics for this target.
        // SAFETY: the map lookup gave a valid, aligned pointer to a u64.
        unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) value, in(reg) 1_u64) };
    }
}

/// The slot of a cgroup, [`NO_SLOT`] when it is not watched.
#[inline(always)]
pub(crate) fn slot_of(cgroup: u64) -> u32 {
    // SAFETY: values of the map may change while they are read; a slot is one aligned word.
    match unsafe { WATCHED.get(&cgroup) } {
        Some(watched) => watched.slot,
        None => NO_SLOT,
    }
}

/// A record's first fields.
#[inline(always)]
pub(crate) fn header(kind: u32, slot: u32) -> Header {
    // SAFETY: the helper has no preconditions.
    Header { kind, slot, at: unsafe { bpf_ktime_get_boot_ns() } }
}

/// Room for a record; counts the loss when there is none.
#[inline(always)]
pub(crate) fn reserve<T: 'static>() -> Option<RingBufEntry<T>> {
    let entry = EVENTS.reserve::<T>(0);
    count(if entry.is_some() { counter::REPORTED } else { counter::RING_FULL });
    entry
}

/// Hands a whole record over.
#[inline(always)]
pub(crate) fn submit<T: 'static>(mut entry: RingBufEntry<T>, record: T) {
    entry.write(record);
    entry.submit(0);
}
