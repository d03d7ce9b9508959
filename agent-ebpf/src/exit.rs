//! Processes that end.

use agent_ebpf::{ExitRecord, NO_SLOT, kind};
use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

use crate::{
    kernel::{Address, Typed, argument, cgroup_of, config, field, offset, own_pid, read, who},
    maps::{header, reserve, slot_of, submit},
};

/// The whole thread group is exiting, with `group_exit_code` (`include/linux/sched/signal.h`).
const SIGNAL_GROUP_EXIT: u32 = 4;

/// Reports the end of a process, not of each thread. It is known to be the last thread by the
/// argument `group_dead`, or, before Linux 6.16, by the count of live threads being 0: two threads
/// that exit together may both see that, and the agent takes them for one.
///
/// The tracepoint comes before the parent's wait returns, and after `do_exit` has brought
/// `signal->maxrss` up to date.
#[btf_tracepoint(function = "sched_process_exit")]
pub fn process_exit(ctx: BtfTracePointContext) -> i32 {
    let task: Typed = argument(&ctx, 0);
    let signal: Typed = field(task, offset!(task_signal));
    if config!(exit_has_group_dead) == 1 {
        if argument::<u8>(&ctx, 1) == 0 {
            return 0;
        }
    } else if field::<u32>(signal, offset!(signal_live)) != 0 {
        return 0;
    }
    let slot = slot_of(cgroup_of(task));

    // What wait_task_zombie in kernel/exit.c gives to the parent. (Since Linux 5.19 the last thread
    // sets the group's code if nobody has, in synchronize_group_exit.)
    let leader: Typed = field(task, offset!(task_group_leader));
    let flags: u32 = field(signal, offset!(signal_flags));
    let status: u32 = if flags & SIGNAL_GROUP_EXIT != 0 {
        field(signal, offset!(signal_group_exit_code))
    } else {
        field(leader, offset!(task_exit_code))
    };
    if slot == NO_SLOT {
        let killed_by = status & 0x7f;
        if config!(elsewhere) == 0
            || killed_by == 0
            || config!(quiet_deaths) >> ((killed_by - 1) & 63) & 1 != 0
        {
            return 0;
        }
    }
    let (task, leader, signal) = (task as Address, leader as Address, signal as Address);
    let pid = own_pid(task);
    if slot == NO_SLOT && pid == 0 {
        return 0;
    }
    if let Some(entry) = reserve::<ExitRecord>() {
        submit(
            entry,
            ExitRecord {
                header: header(kind::EXIT, slot),
                who: who(task, pid),
                ppid: own_pid(read(leader, offset!(task_real_parent))),
                status,
                tgid: read(task, offset!(task_tgid)),
                reserved: 0,
                started: read(leader, offset!(task_start_boottime)),
                max_rss_pages: read(signal, offset!(signal_maxrss)),
            },
        );
    }
    0
}
