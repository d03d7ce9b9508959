//! Following units through the life of their cgroups.
//!
//! systemd removes a unit's cgroup when the unit stops and makes a new one, with a new id, when it
//! starts, and no death may be missed in between. So the kernel side learns the new id by itself,
//! before any process can be in it: the tracepoint comes before the directory is visible.
//!
//! The names that are followed form a tree, whose nodes the agent numbers. `WATCHED` knows the
//! node of each cgroup that exists, `NAMES` the child that a node has by a certain name. A new
//! cgroup that is no such child belongs to the unit of its parent.

use agent_ebpf::{NAME_BYTES, NO_NODE, NO_SLOT, Watched, counter};
use aya_ebpf::{helpers::generated, macros::btf_tracepoint, programs::BtfTracePointContext};

use crate::{
    kernel::{Address, Typed, argument, cgroup_id, field, offset, read},
    maps::{NAME, NAMES, WATCHED, count},
};

/// Whether a cgroup is of the unified hierarchy; ids are only unique within one hierarchy.
#[inline(always)]
fn is_unified(cgroup: Typed) -> bool {
    let root: Typed = field(cgroup, offset!(cgroup_root));
    field::<u32>(root, offset!(cgroup_root_hierarchy_id)) == 0
}

/// A cgroup is being made.
#[btf_tracepoint(function = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    let cgroup: Typed = argument(&ctx, 0);
    if !is_unified(cgroup) {
        return 0;
    }
    let parent_css: Typed = field(cgroup, offset!(cgroup_parent));
    let parent_id = cgroup_id(field(parent_css, offset!(css_cgroup)));
    // SAFETY: values change word by word at most.
    let Some(&parent) = (unsafe { WATCHED.get(&parent_id) }) else { return 0 };
    let mut watched = Watched { slot: parent.slot, node: NO_NODE };
    if parent.node != NO_NODE
        && let Some(key) = NAME.get_ptr_mut(0)
    {
        let kn: Address = field(cgroup, offset!(cgroup_kn));
        let name: Address = read(kn, offset!(kn_name));
        // SAFETY: the key is ours alone while the kernel's cgroup lock is held, see `NAME`; NAMES
        // values are as those of WATCHED.
        let found = unsafe {
            (*key).node = parent.node;
            (*key).name = [0; NAME_BYTES];
            let to = &raw mut (*key).name;
            generated::bpf_probe_read_kernel_str(to.cast(), NAME_BYTES as u32, name as *const _);
            NAMES.get(&*key)
        };
        if let Some(&found) = found {
            watched.node = found.node;
            if found.slot != NO_SLOT {
                watched.slot = found.slot;
            }
        }
    }
    if watched.slot == NO_SLOT && watched.node == NO_NODE {
        return 0;
    }
    if WATCHED.insert(&cgroup_id(cgroup), &watched, 0).is_err() {
        count(counter::CGROUPS_FULL);
    }
    0
}

/// A cgroup is gone; all its processes were before.
#[btf_tracepoint(function = "cgroup_rmdir")]
pub fn cgroup_rmdir(ctx: BtfTracePointContext) -> i32 {
    let cgroup: Typed = argument(&ctx, 0);
    if is_unified(cgroup) {
        let _ = WATCHED.remove(&cgroup_id(cgroup));
    }
    0
}
