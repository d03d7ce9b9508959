//! Signals that are sent to processes of watched units.

use agent_ebpf::{NO_SLOT, Offsets, SignalRecord, Who, kind};
use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_task, generated},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};

use crate::{
    kernel::{Address, Typed, argument, cgroup_of, config, offset, own_pid, read, who},
    maps::{header, reserve, slot_of, submit},
};

// enum in include/trace/events/signal.h
const TRACE_SIGNAL_DELIVERED: u32 = 0;
const TRACE_SIGNAL_LOSE_INFO: u32 = 4;

// Values that stand in place of a pointer to struct kernel_siginfo, include/linux/sched/signal.h
const SEND_SIG_NOINFO: u64 = 0;
const SEND_SIG_PRIV: u64 = 1;

// include/uapi/asm-generic/siginfo.h: negative codes that the kernel sets by itself, for a process's own
// timers and descriptors, at a time when any process may be the current one
const SI_TIMER: i32 = -2;
const SI_ASYNCIO: i32 = -4;
const SI_SIGIO: i32 = -5;

const KERNEL: Who = Who { pid: 0, uid: 0, comm: *b"kernel\0\0\0\0\0\0\0\0\0\0" };

// include/uapi/asm-generic/signal-defs.h
const SIG_DFL: u64 = 0;

/// Reports signals of the configured sets that a process will get: not those that it ignores, nor
/// one that was pending already.
#[btf_tracepoint(function = "signal_generate")]
pub fn signal_generate(ctx: BtfTracePointContext) -> i32 {
    let signal: u32 = argument(&ctx, 0);
    let index = signal.wrapping_sub(1) & 63;
    let always = config!(signals) >> index & 1 != 0;
    if !always && config!(unhandled) >> index & 1 == 0 {
        return 0;
    }
    let result: u32 = argument(&ctx, 4);
    if result != TRACE_SIGNAL_DELIVERED && result != TRACE_SIGNAL_LOSE_INFO {
        return 0;
    }
    let task: Typed = argument(&ctx, 2);
    let slot = slot_of(cgroup_of(task));
    if slot == NO_SLOT {
        return 0;
    }
    if !always && handler(task as Address, index) != SIG_DFL {
        return 0;
    }
    // Read as memory, not as an argument: the verifier would take it for a pointer that is never
    // null, and drop the comparisons.
    let mut info = SEND_SIG_NOINFO;
    // SAFETY: the context is an array of u64, this is the second; the destination is a u64.
    unsafe {
        generated::bpf_probe_read_kernel((&raw mut info).cast(), 8, ctx.as_ptr().cast::<u64>().add(1).cast());
    }
    let from_kernel = match info {
        SEND_SIG_NOINFO => false,
        SEND_SIG_PRIV => true,
        // Any negative code may also come from rt_sigqueueinfo(2), from one who would rather be taken
        // for the kernel. Timers and descriptors send signals of ordinary life; one that always
        // matters and has such a code is somebody's.
        info => {
            let code: i32 = read(info, offset!(siginfo_code));
            code > 0 || (!always && (code == SI_TIMER || code == SI_ASYNCIO || code == SI_SIGIO))
        }
    };
    if let Some(entry) = reserve::<SignalRecord>() {
        let sender = if from_kernel {
            KERNEL
        } else {
            // SAFETY: the helper has no preconditions.
            let current = unsafe { bpf_get_current_task() };
            who(current, own_pid(current))
        };
        submit(
            entry,
            SignalRecord {
                header: header(kind::SIGNAL, slot),
                who: sender,
                target: own_pid(task as Address),
                signal,
            },
        );
    }
    0
}

/// What a process does on the signal of this index: a function, or [`SIG_DFL`]; that too where the
/// kernel's structures are not known, so that a signal is rather reported than not.
#[inline(always)]
fn handler(task: Address, index: u32) -> u64 {
    let actions = offset!(sighand_action);
    if actions == Offsets::NONE {
        return SIG_DFL;
    }
    let sighand: Address = read(task, offset!(task_sighand));
    let action = sighand + u64::from(actions) + u64::from(index) * u64::from(config!(sigaction_size));
    read(action, offset!(sigaction_handler))
}
