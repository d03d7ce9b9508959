//! Victims of the OOM killer.

use agent_ebpf::{NO_SLOT, Offsets, OomRecord, Who, kind};
use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

use crate::{
    kernel::{Address, Typed, argument, cgroup_of, config, offset, own_pid, read, who},
    maps::{header, reserve, slot_of, submit},
};

// enum in include/linux/mm_types_task.h
const MM_FILEPAGES: u32 = 0;
const MM_ANONPAGES: u32 = 1;
const MM_SHMEMPAGES: u32 = 3;

/// Reports whom the OOM killer chose, here or in a memory cgroup.
///
/// Older kernels give only a pid, in the initial PID namespace; then that is all there is, and nothing
/// says that it is of a watched unit.
#[btf_tracepoint(function = "mark_victim")]
pub fn mark_victim(ctx: BtfTracePointContext) -> i32 {
    let record = if config!(oom_has_task) == 1 {
        let task: Typed = argument(&ctx, 0);
        let slot = slot_of(cgroup_of(task));
        let task = task as Address;
        let pid = own_pid(task);
        if slot == NO_SLOT && (config!(elsewhere) == 0 || pid == 0) {
            return 0;
        }
        let mm: Address = read(task, offset!(task_mm));
        OomRecord {
            header: header(kind::OOM, slot),
            who: who(task, pid),
            rss_pages: [rss(mm, MM_ANONPAGES), rss(mm, MM_FILEPAGES), rss(mm, MM_SHMEMPAGES)],
        }
    } else {
        if config!(elsewhere) == 0 || config!(initial_pidns) == 0 {
            return 0;
        }
        let pid: u32 = argument(&ctx, 0);
        OomRecord {
            header: header(kind::OOM, NO_SLOT),
            who: Who { pid, uid: 0, comm: [0; 16] },
            rss_pages: [0; 3],
        }
    };
    if let Some(entry) = reserve::<OomRecord>() {
        submit(entry, record);
    }
    0
}

/// One counter of resident pages. Since Linux 6.2 parts of it lie with each CPU and are not
/// counted in, neither here nor in the kernel's own tracepoint record (`get_mm_counter`).
#[inline(always)]
fn rss(mm: Address, member: u32) -> u64 {
    let base = offset!(mm_rss_stat);
    if base == Offsets::NONE {
        return 0;
    }
    let pages: i64 = read(mm, base + member * config!(rss_stride) + config!(rss_count));
    if pages > 0 { pages as u64 } else { 0 }
}
