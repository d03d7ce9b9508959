//! The BPF programs. Each hangs on one tracepoint, by the kernel's own type information (tp_btf).
//!
//! Most of the time they look at a process that ftd does not care for, so each asks the cheapest
//! question first and leaves. Fields on that path are loaded through pointers that the verifier
//! can follow by type, at the price of one instruction each; everything after the decision to
//! report goes through `bpf_probe_read_kernel`, which the verifier need not follow.
#![no_std]
#![no_main]
// for the one atomic instruction in maps.rs; aya-ebpf needs the same
#![feature(asm_experimental_arch)]

mod cgroup;
mod exit;
mod kernel;
mod maps;
mod oom;
mod signal;
mod tree;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// "Dual MIT/GPL": several helpers are for programs that say they are compatible with the GPL
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
