//! How a unit's tree of processes grows: forks and execs.

use agent_ebpf::{ExecRecord, ForkRecord, NO_SLOT, kind};
use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

use crate::{
    kernel::{Address, Typed, argument, cgroup_of, field, offset, own_pid, who},
    maps::{header, reserve, slot_of, submit},
};

/// Reports new processes, not new threads.
#[btf_tracepoint(function = "sched_process_fork")]
pub fn process_fork(ctx: BtfTracePointContext) -> i32 {
    let parent: Typed = argument(&ctx, 0);
    let child: Typed = argument(&ctx, 1);
    let child_pid: u32 = field(child, offset!(task_pid));
    let child_tgid: u32 = field(child, offset!(task_tgid));
    if child_pid != child_tgid {
        return 0;
    }
    let slot = slot_of(cgroup_of(parent));
    if slot == NO_SLOT {
        return 0;
    }
    if let Some(entry) = reserve::<ForkRecord>() {
        submit(
            entry,
            ForkRecord {
                header: header(kind::FORK, slot),
                parent: own_pid(parent as Address),
                child: own_pid(child as Address),
            },
        );
    }
    0
}

/// Reports a program's start; the process has its new name by then.
#[btf_tracepoint(function = "sched_process_exec")]
pub fn process_exec(ctx: BtfTracePointContext) -> i32 {
    let task: Typed = argument(&ctx, 0);
    let slot = slot_of(cgroup_of(task));
    if slot == NO_SLOT {
        return 0;
    }
    if let Some(entry) = reserve::<ExecRecord>() {
        let task = task as Address;
        submit(entry, ExecRecord { header: header(kind::EXEC, slot), who: who(task, own_pid(task)) });
    }
    0
}
