//! Reading the kernel's structures.

use core::{mem::MaybeUninit, ptr};

use agent_ebpf::{Config, Offsets, Who};
use aya_ebpf::{EbpfContext as _, helpers::generated, programs::BtfTracePointContext};

/// Set by the agent before loading; the verifier takes its fields for constants.
#[unsafe(no_mangle)]
pub(crate) static CONFIG: Config = Config::empty();

/// A field of [`CONFIG`]. Volatile, or the compiler would use the value in the object file.
macro_rules! config {
    ($($field:ident).+) => {
        // SAFETY: a static's field is valid and aligned.
        unsafe { core::ptr::read_volatile(&raw const $crate::kernel::CONFIG.$($field).+) }
    };
}
/// The offset of a field.
macro_rules! offset {
    ($field:ident) => {
        $crate::kernel::config!(offsets.$field)
    };
}
pub(crate) use {config, offset};

/// A kernel structure whose type the verifier knows.
pub(crate) type Typed = *const u8;

/// A kernel address of which the verifier knows nothing.
pub(crate) type Address = u64;

/// A tracepoint's argument. The verifier must know that it exists, or that this is never reached.
#[inline(always)]
pub(crate) fn argument<T: Copy>(ctx: &BtfTracePointContext, index: usize) -> T {
    // SAFETY: the context is an array of u64, one for each argument, and the verifier checks the index.
    unsafe { ptr::read_volatile(ctx.as_ptr().cast::<u64>().add(index).cast::<T>()) }
}

/// Loads a field through a typed pointer. Does not fail: a bad address gives zero (the kernel turns
/// such loads into ones that recover from a fault).
#[inline(always)]
pub(crate) fn field<T: Copy>(structure: Typed, offset: u32) -> T {
    // SAFETY: the verifier checks that the structure has a field of this size there.
    unsafe { ptr::read_volatile(structure.add(offset as usize).cast::<T>()) }
}

/// Reads a field at any kernel address; zero when the kernel lacks the field or the read fails.
///
/// No branch on the helper's result: each doubles what the verifier must walk, and Linux 6.1 gives
/// up at a million instructions. The helper clears what it cannot read.
#[inline(always)]
pub(crate) fn read<T: Copy>(base: Address, offset: u32) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    if offset != Offsets::NONE {
        // SAFETY: the destination has room for a T.
        unsafe {
            generated::bpf_probe_read_kernel(
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                (base + u64::from(offset)) as *const _,
            );
        }
    }
    // SAFETY: used with integers and arrays of them only, for which all bit patterns are values.
    unsafe { value.assume_init() }
}

/// Id of a cgroup; the inode number of its directory.
#[inline(always)]
pub(crate) fn cgroup_id(cgroup: Typed) -> u64 {
    let kn: Typed = field(cgroup, offset!(cgroup_kn));
    field(kn, offset!(kn_id))
}

/// Id of a task's cgroup in the unified hierarchy. (`bpf_get_current_cgroup_id` would say 1 for
/// tasks on hosts where systemd uses the hybrid layout.)
#[inline(always)]
pub(crate) fn cgroup_of(task: Typed) -> u64 {
    let set: Typed = field(task, offset!(task_cgroups));
    cgroup_id(field(set, offset!(css_set_dfl_cgrp)))
}

/// The number that a task's process has in the agent's PID namespace, 0 if none.
///
/// PID namespaces nest; `struct pid` holds one number for each level (`include/linux/pid.h`). The
/// kernel allows 32 levels (`MAX_PID_NS_LEVEL`); the agent is looked for in the outermost eight.
#[inline(never)]
pub(crate) fn own_pid(task: Address) -> u32 {
    let leader: Address = read(task, offset!(task_group_leader));
    let pid: Address = read(leader, offset!(task_thread_pid));
    let level: u32 = read(pid, offset!(pid_level));
    let own = config!(own_pidns);
    let mut upid = pid + u64::from(offset!(pid_numbers));
    for i in 0..8 {
        if i > level {
            break;
        }
        let ns: Address = read(upid, offset!(upid_ns));
        let inum: u32 = read(ns, offset!(pidns_inum));
        if inum == own {
            return read(upid, offset!(upid_nr));
        }
        upid += u64::from(config!(upid_size));
    }
    0
}

/// Who a task's process is.
#[inline(always)]
pub(crate) fn who(task: Address, pid: u32) -> Who {
    let leader: Address = read(task, offset!(task_group_leader));
    let cred: Address = read(task, offset!(task_real_cred));
    Who { pid, uid: read(cred, offset!(cred_uid)), comm: read(leader, offset!(task_comm)) }
}
