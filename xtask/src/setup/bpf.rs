//! The compiler and the linker for the BPF programs.
//!
//! Whoever has rustup's nightly with rust-src, and a bpf-linker that reads what it writes, needs nothing more,
//! and so does who gives a ready-made object (`FTD_EBPF_OBJ`). Everybody else gets
//! Debian's `rustc-web`: one release of Rust whose package for BPF has a ready-made `core`. bpf-linker is
//! built against the very LLVM that this rustc writes its bitcode with.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use harness::step::{Site, Step};
use harness::{Cache, command};

use super::apt;

const LINKER: &str = "0.13.0";
/// Beside rustup's, which come first in PATH.
const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";
/// Debian's other packages of Rust, with which the above conflict.
const RIVALS: [&str; 5] = ["rustc", "cargo", "rustup", "rustc-mozilla", "cargo-mozilla"];
const WITHOUT_DEBIANS: &str = "They are for ftd's BPF programs, which can be had in other ways. Mend: \
    `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`; or give a built \
    agent-ebpf in FTD_EBPF_OBJ";

/// What is needed to build `agent-ebpf`, or nothing if its object is given.
pub(super) fn steps() -> Vec<Box<dyn Step>> {
    if object_is_given() || has_own_toolchain() {
        return Vec::new();
    }
    vec![
        apt::packages_beside(
            "bpf",
            &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "gcc", "libc6-dev", "ca-certificates"],
            &RIVALS,
            WITHOUT_DEBIANS,
        ),
        Box::new(Linker),
    ]
}

/// Whether no BPF program is built at all; see `agent/build.rs`.
pub(super) fn object_is_given() -> bool {
    std::env::var_os("FTD_EBPF_OBJ").is_some()
}

/// Whether there are rustup's nightly with the library's source, and a bpf-linker in PATH that understands it.
fn has_own_toolchain() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut linkers = std::env::split_paths(&path).map(|dir| dir.join("bpf-linker"));
    let Some(linker) = linkers.find(|linker| linker.is_file()) else { return false };
    let sysroot = command::ok(Command::new("rustc").args(["+nightly", "--print", "sysroot"]));
    let has_source =
        |dir: String| Path::new(dir.trim()).join("lib/rustlib/src/rust/library/Cargo.lock").is_file();
    sysroot.is_ok_and(has_source) && links(&linker)
}

/// Whether this linker reads the bitcode of rustup's nightly: it does not if its LLVM is the older one, as
/// after a `rustup update`.
fn links(linker: &Path) -> bool {
    // Arguments and a result with the attributes that newer LLVMs like to add.
    const SOURCE: &str = "#![no_std]\n#[unsafe(no_mangle)]\n\
        pub extern \"C\" fn trial(a: &mut [u64; 4], b: &u64, c: Option<&u32>) -> bool {\n\
        a[1] = a[0].wrapping_add(*b); c.is_some() }\n";
    let dir = std::env::temp_dir().join(format!("ftd-trial-{}", std::process::id()));
    let trial = || -> Result<()> {
        fs::create_dir_all(&dir)?;
        let (source, bitcode) = (dir.join("trial.rs"), dir.join("trial.bc"));
        fs::write(&source, SOURCE)?;
        let mut compile = Command::new("rustc");
        // For this machine, whose `core` is there ready-made; the bitcode's form is the same.
        compile.args([
            "+nightly",
            "--edition=2024",
            "--crate-type=lib",
            "--emit=llvm-bc",
            "-O",
            "-Cpanic=abort",
        ]);
        command::ok(compile.arg("-o").arg(&bitcode).arg(&source))?;
        let mut link = Command::new(linker);
        link.args(["--target=bpf", "--export=trial", "-o"]).arg(dir.join("trial.o")).arg(&bitcode);
        command::ok(&mut link).map(drop)
    };
    let outcome = trial();
    // No harm if it stays.
    let _ = fs::remove_dir_all(&dir);
    if let Err(error) = &outcome {
        eprintln!(
            "setup: rustup's nightly and {} do not fit together, so Debian's are taken: {error:#}",
            linker.display()
        );
    }
    outcome.is_ok()
}

struct Linker;

impl Step for Linker {
    fn name(&self) -> &'static str {
        "bpf-linker"
    }

    fn output(&self) -> Option<&str> {
        Some("bpf-tools")
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(format!(
            "{LINKER} llvm-{} {}",
            llvm_major()?,
            command::ok(Command::new(RUSTC).arg("--version"))?.trim()
        ))
    }

    fn done(&self, cache: &Cache) -> Result<bool> {
        let stamp = harness::step::stamp(&cache.path("bpf-tools"));
        Ok(Path::new(RUSTC).exists()
            && stamp.as_deref() == Some(self.key(cache)?.as_str())
            && cache.path("bpf-tools/bin/bpf-linker").is_file())
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        let major = llvm_major()?;
        // Of LLVM it needs no more than the shared library, under its name for development.
        let lib = site.dir.join("llvm/lib");
        fs::create_dir_all(&lib)?;
        symlink(libllvm(&major)?, lib.join("libLLVM.so"))?;
        let mut install = Command::new(CARGO);
        install
            .env("RUSTC", RUSTC)
            .env("LLVM_PREFIX", site.dir.join("llvm"))
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .env("CARGO_TARGET_DIR", site.dir.join("target"))
            .args(["install", "--locked", "--force", "--root"])
            .arg(site.dir)
            .arg(format!("bpf-linker@{LINKER}"))
            .args(["--no-default-features", "--features", &format!("llvm-{major}")]);
        // Cargo may itself run below rustup's, which says so to its children.
        for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
            install.env_remove(name);
        }
        site.log.run(&mut install)?;
        fs::remove_dir_all(site.dir.join("target"))?;
        site.log.run(Command::new(site.dir.join("bin/bpf-linker")).arg("--version"))
    }
}

/// The version of the LLVM in Debian's rustc.
fn llvm_major() -> Result<String> {
    let text = command::ok(Command::new(RUSTC).arg("-vV"))?;
    let version = text.lines().find_map(|line| line.strip_prefix("LLVM version: "));
    let major = version.and_then(|version| version.split('.').next()).map(ToOwned::to_owned);
    major.with_context(|| format!("{RUSTC} does not name its LLVM: {text}"))
}

/// `/usr/lib/ARCHITECTURE/libLLVM.so.MAJOR.*`.
fn libllvm(major: &str) -> Result<PathBuf> {
    let prefix = format!("libLLVM.so.{major}.");
    let is_it =
        |path: &Path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(&prefix));
    let libraries = fs::read_dir("/usr/lib")?.flatten().filter_map(|dir| fs::read_dir(dir.path()).ok());
    let mut found: Vec<_> =
        libraries.flatten().flatten().map(|entry| entry.path()).filter(|path| is_it(path)).collect();
    found.sort();
    found
        .into_iter()
        .next()
        .with_context(|| format!("there is no {prefix}* in /usr/lib/*, though {RUSTC} is there"))
}
