//! The types that the BPF programs share with the agent.
//!
//! Everything here is `repr(C)` without padding, read and written by both sides as plain memory:
//! records go through the ring buffer, keys and values lie in maps, [`Config`] is read-only data
//! that the agent fills in before the programs are verified.
#![no_std]
#![forbid(unsafe_code)]

pub mod fence;

/// A slot that means "not a watched unit".
pub const NO_SLOT: u32 = u32::MAX;

/// A node that means "no name below this cgroup is looked for".
pub const NO_NODE: u32 = 0;

/// The node of the cgroup2 mount's root directory.
pub const ROOT_NODE: u32 = 1;

/// Room for a cgroup's name with its terminating zero: `NAME_MAX` of `include/uapi/linux/limits.h`
/// is 255.
pub const NAME_BYTES: usize = 256;

/// The value of map `WATCHED`, whose key is a cgroup id: what this cgroup is to ftd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Watched {
    /// The unit whose processes are in it, or [`NO_SLOT`].
    pub slot: u32,
    /// Its node in the tree of names that are followed, or [`NO_NODE`].
    pub node: u32,
}

/// The key of map `NAMES`, whose value is a [`Watched`]: what a new cgroup of this name below the
/// cgroup of this node is to ftd.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct NameKey {
    /// The parent's node.
    pub node: u32,
    /// The directory's name, filled up with zeroes.
    pub name: [u8; NAME_BYTES],
}

/// Kinds of record, the first field of each.
pub mod kind {
    /// [`super::ExitRecord`].
    pub const EXIT: u32 = 1;
    /// [`super::OomRecord`].
    pub const OOM: u32 = 2;
    /// [`super::SignalRecord`].
    pub const SIGNAL: u32 = 3;
    /// [`super::ForkRecord`].
    pub const FORK: u32 = 4;
    /// [`super::ExecRecord`].
    pub const EXEC: u32 = 5;
}

/// Indices into the per-CPU map `COUNTERS`. They only grow.
pub mod counter {
    /// Records handed to the ring buffer.
    pub const REPORTED: u32 = 0;
    /// Records lost because the ring buffer was full.
    pub const RING_FULL: u32 = 1;
    /// New cgroups that could not be followed because map `WATCHED` was full.
    pub const CGROUPS_FULL: u32 = 2;
    /// How many counters there are.
    pub const COUNT: u32 = 3;
}

/// What every record begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// See [`kind`].
    pub kind: u32,
    /// The unit, or [`NO_SLOT`].
    pub slot: u32,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub at: u64,
}

/// Who: a process as the agent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Who {
    /// Process id in the agent's PID namespace, 0 when it has none there.
    pub pid: u32,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
    /// Name of the thread group's leader, zero-terminated.
    pub comm: [u8; 16],
}

/// The last thread of a process is exiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct ExitRecord {
    /// `kind::EXIT`.
    pub header: Header,
    /// The process.
    pub who: Who,
    /// Its parent's process id in the agent's PID namespace, or 0.
    pub ppid: u32,
    /// Wait status, see wait(2).
    pub status: u32,
    /// Id of the thread group in the initial PID namespace.
    pub tgid: u32,
    /// Zero; keeps what follows aligned.
    pub reserved: u32,
    /// When the process started, `CLOCK_BOOTTIME` nanoseconds; with `tgid` this is the process's
    /// identity.
    pub started: u64,
    /// Largest resident set, pages.
    pub max_rss_pages: u64,
}

/// The OOM killer chose a victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct OomRecord {
    /// `kind::OOM`.
    pub header: Header,
    /// The victim.
    pub who: Who,
    /// Resident pages: anonymous, file, shared.
    pub rss_pages: [u64; 3],
}

/// A signal was queued for a process of a watched unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SignalRecord {
    /// `kind::SIGNAL`; the slot is the target's.
    pub header: Header,
    /// The sender; the kernel itself is pid 0, uid 0, "kernel".
    pub who: Who,
    /// The target's process id in the agent's PID namespace, or 0.
    pub target: u32,
    /// Signal number.
    pub signal: u32,
}

/// A process of a watched unit made a child process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct ForkRecord {
    /// `kind::FORK`; the slot is the parent's.
    pub header: Header,
    /// The parent's process id in the agent's PID namespace, or 0.
    pub parent: u32,
    /// The child's.
    pub child: u32,
}

/// A process of a watched unit runs another program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct ExecRecord {
    /// `kind::EXEC`.
    pub header: Header,
    /// The process, with its new name.
    pub who: Who,
}

/// Declares [`Offsets`] together with the names by which BTF knows each field.
macro_rules! offsets {
    ($($field:ident = $structure:literal . $path:literal, $need:ident;)*) => {
        /// Where fields lie in the running kernel's structures, in bytes.
        ///
        /// [`Offsets::NONE`] stands for a field that this kernel does not have.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(C)]
        pub struct Offsets {
            $(#[doc = concat!("`", $structure, "::", $path, "`.")] pub $field: u32,)*
        }

        impl Offsets {
            /// No such field.
            pub const NONE: u32 = u32::MAX;

            /// No field is known.
            pub const fn none() -> Self {
                Self { $($field: Self::NONE,)* }
            }

            /// Asks `find` for each field: structure, dotted path. What it does not know stays
            /// [`Offsets::NONE`] and is told to `missing`: structure, path, and whether the
            /// programs cannot work without it.
            pub fn fill(
                find: impl Fn(&str, &str) -> Option<u32>,
                mut missing: impl FnMut(&'static str, &'static str, bool),
            ) -> Self {
                let mut offsets = Self::none();
                $(match find($structure, $path) {
                    Some(offset) => offsets.$field = offset,
                    None => missing($structure, $path, offsets!(@ $need)),
                })*
                offsets
            }
        }
    };
    (@ needed) => { true };
    (@ wanted) => { false };
}

offsets! {
    task_pid = "task_struct"."pid", needed;
    task_tgid = "task_struct"."tgid", needed;
    task_exit_code = "task_struct"."exit_code", needed;
    task_signal = "task_struct"."signal", needed;
    task_cgroups = "task_struct"."cgroups", needed;
    task_group_leader = "task_struct"."group_leader", needed;
    task_thread_pid = "task_struct"."thread_pid", needed;
    task_real_parent = "task_struct"."real_parent", wanted;
    task_real_cred = "task_struct"."real_cred", wanted;
    task_start_boottime = "task_struct"."start_boottime", needed;
    task_comm = "task_struct"."comm", needed;
    task_mm = "task_struct"."mm", wanted;
    signal_live = "signal_struct"."live.counter", needed;
    signal_flags = "signal_struct"."flags", needed;
    signal_group_exit_code = "signal_struct"."group_exit_code", needed;
    signal_maxrss = "signal_struct"."maxrss", wanted;
    cred_uid = "cred"."uid.val", wanted;
    css_set_dfl_cgrp = "css_set"."dfl_cgrp", needed;
    cgroup_kn = "cgroup"."kn", needed;
    cgroup_root = "cgroup"."root", wanted;
    cgroup_parent = "cgroup"."self.parent", wanted;
    cgroup_root_hierarchy_id = "cgroup_root"."hierarchy_id", wanted;
    css_cgroup = "cgroup_subsys_state"."cgroup", wanted;
    kn_id = "kernfs_node"."id", needed;
    kn_name = "kernfs_node"."name", wanted;
    pid_level = "pid"."level", needed;
    pid_numbers = "pid"."numbers", needed;
    upid_nr = "upid"."nr", needed;
    upid_ns = "upid"."ns", needed;
    pidns_inum = "pid_namespace"."ns.inum", needed;
    siginfo_code = "kernel_siginfo"."si_code", wanted;
    task_sighand = "task_struct"."sighand", wanted;
    sighand_action = "sighand_struct"."action", wanted;
    sigaction_handler = "k_sigaction"."sa.sa_handler", wanted;
    mm_rss_stat = "mm_struct"."rss_stat", wanted;
}

/// What the programs must know; constant once they are loaded, so that the verifier sees the
/// values and leaves out what does not apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// Bit `n - 1` stands for signal `n`: signals whose sending to a watched process is reported.
    pub signals: u64,
    /// Likewise: signals that are reported only if the process has no handler for them.
    pub unhandled: u64,
    /// Likewise: deaths by these signals are not reported outside watched units.
    pub quiet_deaths: u64,
    /// Fields of kernel structures.
    pub offsets: Offsets,
    /// `sizeof(struct upid)`.
    pub upid_size: u32,
    /// Distance of one resident-memory counter of an mm from the next: 8 up to Linux 6.1
    /// (`struct mm_rss_stat`), the size of a `percpu_counter` after.
    pub rss_stride: u32,
    /// Where in that distance the count is.
    pub rss_count: u32,
    /// `sizeof(struct k_sigaction)`.
    pub sigaction_size: u32,
    /// Inode number of the agent's PID namespace.
    pub own_pidns: u32,
    /// 1: report abnormal deaths outside watched units too.
    pub elsewhere: u32,
    /// 1: `sched_process_exit` has the argument `group_dead` (Linux 6.16 and newer).
    pub exit_has_group_dead: u32,
    /// 1: the first argument of `mark_victim` is the task, 0: it is only a pid in the initial
    /// PID namespace.
    pub oom_has_task: u32,
    /// 1: the agent's PID namespace is the initial one.
    pub initial_pidns: u32,
}

impl Config {
    /// What stands in the object file; useless until the agent has replaced it.
    pub const fn empty() -> Self {
        Self {
            signals: 0,
            unhandled: 0,
            quiet_deaths: 0,
            offsets: Offsets::none(),
            upid_size: 0,
            rss_stride: 0,
            rss_count: 0,
            sigaction_size: 0,
            own_pidns: 0,
            elsewhere: 0,
            exit_has_group_dead: 0,
            oom_has_task: 0,
            initial_pidns: 0,
        }
    }
}

// no padding anywhere: the sizes are the sums of the fields
const _: () = assert!(size_of::<ExitRecord>() == 16 + 24 + 16 + 16);
const _: () = assert!(size_of::<OomRecord>() == 16 + 24 + 24);
const _: () = assert!(size_of::<SignalRecord>() == 16 + 24 + 8);
const _: () = assert!(size_of::<ForkRecord>() == 16 + 8);
const _: () = assert!(size_of::<ExecRecord>() == 16 + 24);
const _: () = assert!(size_of::<NameKey>() == 4 + NAME_BYTES);
const _: () = assert!(size_of::<Config>() == 24 + size_of::<Offsets>() + 9 * 4);
