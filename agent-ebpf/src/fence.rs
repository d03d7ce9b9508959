//! What the fence's programs share with the agent: leases in maps, and what was counted.

/// How many addresses there can be, of both families together.
pub const SLOTS: u32 = 256;

/// The value of map `LEASES4`, whose key is the address as it lies in packets. What is not in the map is no
/// service address, and passes.
///
/// The map may give an element to another key while a program still reads it. So the key is here once more, and
/// before the end: it is written first, and read last. Who sees an end of another address sees its key too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Lease4 {
    /// The key.
    pub address: u32,
    /// Where in map `COUNTS` its packets are counted, below [`SLOTS`].
    pub slot: u32,
    /// Packets pass before this moment: `CLOCK_BOOTTIME`, nanoseconds; 0: never.
    pub until: u64,
}

/// The value of map `LEASES6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Lease6 {
    /// As in [`Lease4`].
    pub address: [u32; 4],
    /// As in [`Lease4`].
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
    /// As in [`Lease4`].
    pub until: u64,
}

/// Packets of one address, per processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// To it, with a lease.
    pub passed_in: u64,
    /// From it, with a lease.
    pub passed_out: u64,
    /// To it, or asking for it, without one.
    pub dropped_in: u64,
    /// From it, or announcing it, without one.
    pub dropped_out: u64,
    /// Claims of others to have it, while the lease was here.
    pub conflicts: u64,
}

const _: () = assert!(size_of::<Lease4>() == 16);
const _: () = assert!(size_of::<Lease6>() == 32);
const _: () = assert!(size_of::<Counts>() == 40);
