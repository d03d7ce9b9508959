//! The probe on the running kernel, every event and every field.
//!
//! `sudo -E cargo test -p ftd --test probe -- --nocapture`

#![allow(clippy::expect_used, reason = "a test panics where it fails")]

use ftd::probe::selftest;

#[test]
fn selftest() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: the probe's test needs root (BPF programs, control groups). Run it with sudo -E");
        return;
    }
    let mut out = Vec::new();
    let report = selftest::run(&mut out).expect("a Vec can be written to");
    let text = String::from_utf8(out).expect("names and messages are UTF-8");
    println!("{text}");
    assert_eq!(report.failed, 0, "\n{text}");
    assert!(report.passed > 0, "\n{text}");
}
