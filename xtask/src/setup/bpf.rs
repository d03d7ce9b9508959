//! The compiler and the linker for the BPF programs.
//!
//! Whoever has rustup's nightly with rust-src needs nothing of Debian's; a bpf-linker in PATH that reads what this
//! nightly writes is taken, else one is built against nightly's own LLVM. Who gives a ready-made object
//! (`FTD_EBPF_OBJ`) needs neither. Everybody else gets Debian's `rustc-web`: one release of Rust whose package for
//! BPF has a ready-made `core`; and bpf-linker is built against the very LLVM that this rustc writes its bitcode with.

use std::ffi::OsStr;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use harness::step::{Site, Step};
use harness::{Cache, command};

use super::apt;

const LINKER: &str = "0.13.0";
/// The releases of LLVM that this bpf-linker can be built against: its features `llvm-N`.
const LLVMS: RangeInclusive<u32> = 21..=23;
/// Debian's, beside rustup's, which come first in PATH.
const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";
/// Debian's other packages of Rust, with which the above conflict.
const RIVALS: [&str; 5] = ["rustc", "cargo", "rustup", "rustc-mozilla", "cargo-mozilla"];
const WITHOUT_DEBIANS: &str = "They are for ftd's BPF programs, which can be had in other ways. Mend: \
    `rustup toolchain install nightly --component rust-src`; or give a built agent-ebpf, with fence beside it, in FTD_EBPF_OBJ";

/// What is needed to build `agent-ebpf`, or nothing if its object is given.
pub(super) fn steps() -> Vec<Box<dyn Step>> {
    if object_is_given() {
        return Vec::new();
    }
    match Nightly::find() {
        Ok(nightly) if linker_in_path().is_some_and(|linker| links(&linker, &nightly)) => Vec::new(),
        Ok(nightly) => vec![Box::new(Linker { compiler: Compiler::Nightly(nightly) })],
        Err(why) => {
            // Those who have no nightly need not be told so.
            if let Some(why) = why {
                eprintln!("setup: rustup's nightly cannot be used for BPF, so Debian's rustc-web is: {why}");
            }
            let packages =
                ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "gcc", "libc6-dev", "ca-certificates"];
            vec![
                apt::packages_beside("bpf", &packages, &RIVALS, WITHOUT_DEBIANS),
                Box::new(Linker { compiler: Compiler::Debian }),
            ]
        }
    }
}

/// Whether no BPF program is built at all; see `agent/build.rs`.
pub(super) fn object_is_given() -> bool {
    std::env::var_os("FTD_EBPF_OBJ").is_some_and(|value| !value.is_empty())
}

/// rustup's nightly, with the library's source.
#[derive(Debug, PartialEq, Eq)]
struct Nightly {
    sysroot: PathBuf,
    llvm: Llvm,
}

/// What a rustc says of itself: its version, and its LLVM's first number.
#[derive(Debug, PartialEq, Eq)]
struct Llvm {
    rustc: String,
    major: u32,
}

impl Nightly {
    /// The machine's. `Err(None)`: there is none; with a text: it cannot be used, for this reason and with this mend.
    fn find() -> Result<Self, Option<String>> {
        let mut which = Command::new("rustup");
        // To look is not to install.
        which.env("RUSTUP_AUTO_INSTALL", "0").args(["which", "--toolchain", "nightly", "rustc"]);
        let rustc = PathBuf::from(command::ok(&mut which).map_err(|_| None::<String>)?.trim());
        let sysroot = rustc.ancestors().nth(2).ok_or(None::<String>)?;
        let words =
            command::ok(Command::new(&rustc).arg("-vV")).map_err(|error| Some(format!("{error:#}")))?;
        Self::at(sysroot, &words).map_err(Some)
    }

    /// The one in this place, whose rustc says this of itself (`rustc -vV`).
    fn at(sysroot: &Path, words: &str) -> Result<Self, String> {
        if !sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").is_file() {
            return Err(
                "it has no rust-src. Mend, if you want it: rustup component add rust-src --toolchain nightly"
                    .into(),
            );
        }
        let llvm = Llvm::of(words).ok_or_else(|| format!("it does not name its LLVM: {words}"))?;
        let nightly = Self { sysroot: sysroot.to_owned(), llvm };
        if !LLVMS.contains(&nightly.llvm.major) {
            return Err(format!("bpf-linker {LINKER} knows no LLVM {}", nightly.llvm.major));
        }
        Ok(nightly)
    }

    fn bin(&self, program: &str) -> PathBuf {
        self.sysroot.join("bin").join(program)
    }
}

impl Llvm {
    fn of(words: &str) -> Option<Self> {
        let line = |name| words.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let major = line("LLVM version: ")?.split('.').next()?.parse().ok()?;
        Some(Self { rustc: words.lines().next()?.trim().to_owned(), major })
    }
}

fn linker_in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join("bpf-linker")).find(|linker| linker.is_file())
}

/// Whether this linker reads the bitcode of this nightly: it does not if its LLVM is the older one, as
/// after a `rustup update`.
fn links(linker: &Path, nightly: &Nightly) -> bool {
    // Arguments and a result with the attributes that newer LLVMs like to add.
    const SOURCE: &str = "#![no_std]\n#[unsafe(no_mangle)]\n\
        pub extern \"C\" fn trial(a: &mut [u64; 4], b: &u64, c: Option<&u32>) -> bool {\n\
        a[1] = a[0].wrapping_add(*b); c.is_some() }\n";
    let dir = std::env::temp_dir().join(format!("ftd-trial-{}", std::process::id()));
    let trial = || -> Result<()> {
        fs::create_dir_all(&dir)?;
        let (source, bitcode) = (dir.join("trial.rs"), dir.join("trial.bc"));
        fs::write(&source, SOURCE)?;
        let mut compile = Command::new(nightly.bin("rustc"));
        // For this machine, whose `core` is there ready-made; the bitcode's form is the same.
        compile.args(["--edition=2024", "--crate-type=lib", "--emit=llvm-bc", "-O", "-Cpanic=abort"]);
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
            "setup: rustup's nightly and {} do not fit together, so setup builds a bpf-linker that does: {error:#}",
            linker.display()
        );
    }
    outcome.is_ok()
}

/// Whose bitcode bpf-linker is to read.
#[derive(Debug)]
enum Compiler {
    Nightly(Nightly),
    Debian,
}

impl Compiler {
    fn program(&self, name: &str) -> PathBuf {
        match self {
            Self::Nightly(nightly) => nightly.bin(name),
            Self::Debian if name == "cargo" => CARGO.into(),
            Self::Debian => RUSTC.into(),
        }
    }

    /// Asked when it is needed: Debian's is there only after the step before.
    fn llvm(&self) -> Result<Llvm> {
        let rustc = self.program("rustc");
        let words = command::ok(Command::new(&rustc).arg("-vV"))?;
        Llvm::of(&words).with_context(|| format!("{} does not name its LLVM: {words}", rustc.display()))
    }

    /// Its LLVM as a shared library.
    fn libllvm(&self, major: u32) -> Result<PathBuf> {
        let dirs = match self {
            Self::Nightly(nightly) => vec![nightly.sysroot.join("lib")],
            // `/usr/lib/ARCHITECTURE`.
            Self::Debian => fs::read_dir("/usr/lib")?.flatten().map(|entry| entry.path()).collect(),
        };
        let rustc = self.program("rustc");
        libllvm(&dirs, major).with_context(|| {
            format!("there is no libLLVM.so.{major}.* beside {}, which is built with it", rustc.display())
        })
    }
}

struct Linker {
    compiler: Compiler,
}

impl Step for Linker {
    fn name(&self) -> &'static str {
        "bpf-linker"
    }

    fn output(&self) -> Option<&str> {
        Some("bpf-tools")
    }

    fn key(&self, _: &Cache) -> Result<String> {
        let Llvm { rustc, major } = self.compiler.llvm()?;
        Ok(format!("{LINKER} llvm-{major} {rustc}"))
    }

    fn done(&self, cache: &Cache) -> Result<bool> {
        let stamp = harness::step::stamp(&cache.path("bpf-tools"));
        Ok(self.compiler.program("rustc").exists()
            && stamp.as_deref() == Some(self.key(cache)?.as_str())
            && cache.path("bpf-tools/bin/bpf-linker").is_file())
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        let major = self.compiler.llvm()?.major;
        // Of LLVM it needs no more than the shared library, under its name for development.
        let lib = site.dir.join("llvm/lib");
        fs::create_dir_all(&lib)?;
        let library = self.compiler.libllvm(major)?;
        symlink(&library, lib.join("libLLVM.so"))?;
        let mut install = Command::new(self.compiler.program("cargo"));
        // Cargo may itself run below rustup's, which says so to its children.
        for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
            install.env_remove(name);
        }
        if let (Compiler::Nightly(_), Some(dir)) = (&self.compiler, library.parent()) {
            // No place where the loader looks by itself.
            install.env("CARGO_ENCODED_RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", dir.display()));
        }
        install
            .env("RUSTC", self.compiler.program("rustc"))
            .env("LLVM_PREFIX", site.dir.join("llvm"))
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .env("CARGO_TARGET_DIR", site.dir.join("target"))
            .args(["install", "--locked", "--force", "--root"])
            .arg(site.dir)
            .arg(format!("bpf-linker@{LINKER}"))
            .args(["--no-default-features", "--features", &format!("llvm-{major}")]);
        site.log.run(&mut install)?;
        fs::remove_dir_all(site.dir.join("target"))?;
        site.log.run(Command::new(site.dir.join("bin/bpf-linker")).arg("--version"))
    }
}

/// The first `libLLVM.so.MAJOR.*` in these directories.
fn libllvm(dirs: &[PathBuf], major: u32) -> Option<PathBuf> {
    let prefix = format!("libLLVM.so.{major}.");
    let is_it =
        |path: &Path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(&prefix));
    let entries = dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| is_it(path)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nLLVM version: 22.1.4\n";

    #[test]
    fn nightly_is_taken_with_its_source_and_an_llvm_that_bpf_linker_knows() {
        let dir = tempfile::tempdir().unwrap();
        let without = Nightly::at(dir.path(), WORDS).unwrap_err();
        assert!(without.contains("rustup component add rust-src --toolchain nightly"), "{without}");
        let library = dir.path().join("lib/rustlib/src/rust/library");
        fs::create_dir_all(&library).unwrap();
        fs::write(library.join("Cargo.lock"), "").unwrap();
        let nightly = Nightly::at(dir.path(), WORDS).unwrap();
        assert_eq!(nightly.bin("rustc"), dir.path().join("bin/rustc"));
        assert_eq!(
            nightly.llvm,
            Llvm { rustc: "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)".into(), major: 22 }
        );
        let newer = Nightly::at(dir.path(), &WORDS.replace("22.1.4", "99.0.0")).unwrap_err();
        assert!(newer.contains("knows no LLVM 99"), "{newer}");
        assert!(Nightly::at(dir.path(), "rustc 1.97.0\n").unwrap_err().contains("does not name its LLVM"));
    }

    #[test]
    fn the_llvm_of_a_toolchain_is_found_under_any_minor_version() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().join("absent"), dir.path().to_owned()];
        for name in
            ["libLLVM-22-rust-1.97.0-nightly.so", "libLLVM.so.2.1", "libLLVM.so.22.1-rust-1.97.0-nightly"]
        {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let found = libllvm(&dirs, 22).unwrap();
        assert_eq!(found.file_name().unwrap(), "libLLVM.so.22.1-rust-1.97.0-nightly");
        assert_eq!(libllvm(&dirs, 23), None);
    }
}
