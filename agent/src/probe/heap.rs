//! Memory that is needed once.
//!
//! The kernel's type information takes tens of megabytes while programs are loaded, and nothing after. The C
//! library keeps what was freed for later, which for a daemon that needs little is never.

#![allow(unsafe_code, reason = "malloc_trim is a function of the C library, which nobody wraps")]

/// Gives freed memory back to the kernel.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time from any thread; it touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
