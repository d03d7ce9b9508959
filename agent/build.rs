//! Builds ../agent-ebpf for the BPF target and leaves its two objects in `OUT_DIR`, where probe/bpf.rs and
//! cluster/fence.rs embed them; and makes the types of CRIU's messages from proto/criu.proto, for snapshot/criu.rs.
//!
//! | variable | meaning |
//! |---|---|
//! | `FTD_EBPF_OBJ` | a ready-made object agent-ebpf, with `fence` beside it; no BPF toolchain is needed then |
//! | `FTD_BPF_CARGO`, `FTD_BPF_RUSTC` | the toolchain to use, instead of those looked for below |
//! | `FTD_BPF_LINKER` | bpf-linker, built against the LLVM of that rustc |
//! | `FTD_BPF_BUILD_STD` | `1`: compile `core` from that toolchain's library source |
//! | `FTD_CACHE` | where `cargo xtask setup` puts its tools; default `~/.cache/ftd` |
//!
//! Without these, what the machine has is taken: rustup's nightly with rust-src, else Debian's rustc-web; each
//! with a bpf-linker that reads its bitcode, of `cargo xtask setup` or of PATH. What does not fit together is
//! passed over.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const TARGET: &str = "bpfel-unknown-none";
/// The probes, and the fence.
const OBJECTS: [&str; 2] = ["agent-ebpf", "fence"];
const VARIABLES: [&str; 7] = [
    "FTD_EBPF_OBJ",
    "FTD_BPF_CARGO",
    "FTD_BPF_RUSTC",
    "FTD_BPF_LINKER",
    "FTD_BPF_BUILD_STD",
    "FTD_CACHE",
    "XDG_CACHE_HOME",
];

fn main() -> ExitCode {
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    match messages().and_then(|()| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Types for the messages that are spoken with CRIU.
fn messages() -> Result<(), String> {
    const FILE: &str = "proto/criu.proto";
    println!("cargo::rerun-if-changed={FILE}");
    let files = protox::compile([FILE], ["proto"]).map_err(|cause| format!("{FILE}: {cause}"))?;
    prost_build::compile_fds(files).map_err(|cause| format!("{FILE}: types cannot be made: {cause}"))
}

fn run() -> Result<(), String> {
    let out_dir = directory("OUT_DIR")?;
    if let Some(object) = given("FTD_EBPF_OBJ") {
        let fence = object.with_file_name("fence");
        for (from, name) in [&object, &fence].into_iter().zip(OBJECTS) {
            println!("cargo::rerun-if-changed={}", from.display());
            copy(from, &out_dir.join(name)).map_err(|cause| {
                format!("{cause}\nGive FTD_EBPF_OBJ the path of a built agent-ebpf with fence beside it, or unset it.")
            })?;
        }
        return Ok(());
    }
    let manifest_dir = directory("CARGO_MANIFEST_DIR")?;
    let source = manifest_dir.join("../agent-ebpf");
    for part in ["src", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", source.join(part).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    // One directory for all profiles and not cargo's own, whose lock the outer cargo holds: beside that
    // of the profile, which OUT_DIR is in (PROFILE/build/PACKAGE/out). CARGO_TARGET_DIR may be relative, to
    // a directory that cargo does not tell.
    let target_dir = out_dir.ancestors().nth(4).ok_or("OUT_DIR is not where cargo puts it")?.join("bpf");
    let mut refusals = Vec::new();
    for toolchain in Toolchain::candidates()? {
        println!("cargo::rerun-if-changed={}", toolchain.linker.display());
        println!("cargo::rerun-if-changed={}", toolchain.rustc.display());
        match toolchain.build(&source, &target_dir) {
            Ok(()) => {
                let built = target_dir.join(TARGET).join("release");
                return OBJECTS.iter().try_for_each(|name| copy(&built.join(name), &out_dir.join(name)));
            }
            Err(refusal) => refusals.push(refusal),
        }
    }
    Err(refusals.join("\n"))
}

/// Contents alone: with the permissions of one that is read-only, the next could not be put in its place.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::read(from)
        .and_then(|object| fs::write(to, object))
        .map_err(|cause| format!("The BPF object {} cannot be copied: {cause}", from.display()))
}

/// A variable's value; an empty one counts as not given.
fn given(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn directory(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {variable}"))
}

struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    linker: PathBuf,
    build_std: bool,
}

impl Toolchain {
    /// What there is, best first; never empty.
    fn candidates() -> Result<Vec<Self>, String> {
        let linker = given("FTD_BPF_LINKER");
        let build_std = env::var("FTD_BPF_BUILD_STD").is_ok_and(|value| value == "1");

        if let Some(rustc) = given("FTD_BPF_RUSTC") {
            let cargo = given("FTD_BPF_CARGO").unwrap_or_else(|| rustc.with_file_name("cargo"));
            let linker = linker
                .or_else(cached_linker)
                .or_else(linker_in_path)
                .ok_or("No bpf-linker for FTD_BPF_RUSTC. Set FTD_BPF_LINKER, or run: cargo xtask setup")?;
            return Ok(vec![Self { cargo, rustc, linker, build_std }]);
        }
        let mut found = Vec::new();
        if let Some((cargo, rustc)) = rustup_nightly() {
            // `setup` builds one only where that of PATH does not do.
            let linkers = linker.clone().map_or_else(
                || cached_linker().into_iter().chain(linker_in_path()).collect(),
                |linker| vec![linker],
            );
            for linker in linkers {
                found.push(Self { cargo: cargo.clone(), rustc: rustc.clone(), linker, build_std: true });
            }
        }
        let (cargo, rustc) = (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc"));
        let has_core = Path::new("/usr/lib/rustlib").join(TARGET).join("lib").is_dir();
        if cargo.exists()
            && rustc.exists()
            && (has_core || build_std)
            && let Some(linker) = linker.or_else(cached_linker).or_else(linker_in_path)
        {
            found.push(Self { cargo, rustc, linker, build_std });
        }
        if found.is_empty() {
            return Err("No toolchain for the BPF programs: neither rustup's nightly with rust-src and \
                 bpf-linker, nor Debian's rustc-web with libstd-rust-web-dev-bpf and bpf-linker.\n\
                 Run: cargo xtask setup   (or set FTD_EBPF_OBJ to a built agent-ebpf, with fence beside it)"
                .into());
        }
        Ok(found)
    }

    fn build(&self, source: &Path, target_dir: &Path) -> Result<(), String> {
        let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_else(|_| "x86_64".into());
        let flags =
            [&format!("--cfg=bpf_target_arch=\"{arch}\""), "-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f");
        let mut build = Command::new(&self.cargo);
        if self.build_std {
            build.arg("-Zbuild-std=core");
        }
        build
            .args(["build", "--locked", "--release", "--target", TARGET, "--manifest-path"])
            .arg(source.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(target_dir)
            // not the workspace's directory: its .cargo/config.toml is for the host
            .current_dir(source);
        // What the outer cargo and rustup set for the host build.
        for variable in [
            "CARGO",
            "RUSTUP_TOOLCHAIN",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTC_WRAPPER",
            "RUSTFLAGS",
            "LD_LIBRARY_PATH",
            "CARGO_BUILD_TARGET",
            "CARGO_MAKEFLAGS",
            "MAKEFLAGS",
        ] {
            build.env_remove(variable);
        }
        build
            .env("RUSTC", &self.rustc)
            // One unstable feature, asm_experimental_arch; see agent-ebpf/src/main.rs.
            .env("RUSTC_BOOTSTRAP", if self.build_std { "1" } else { "aya_ebpf,agent_ebpf" })
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker)
            .env("CARGO_ENCODED_RUSTFLAGS", flags);
        let tools = format!("{} and {}", self.rustc.display(), self.linker.display());
        match build.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!(
                "The BPF programs were not built with {tools} ({status}; the compiler's words are above).\n\
                 If rustc and bpf-linker do not fit together, run: cargo xtask setup"
            )),
            Err(cause) => Err(format!(
                "{} cannot be run: {cause}. Set FTD_BPF_CARGO, or run: cargo xtask setup",
                self.cargo.display()
            )),
        }
    }
}

/// cargo and rustc of rustup's nightly, if the library's source is with it.
fn rustup_nightly() -> Option<(PathBuf, PathBuf)> {
    let mut which = Command::new("rustup");
    // To look is not to install.
    which.env("RUSTUP_AUTO_INSTALL", "0").args(["which", "--toolchain", "nightly", "rustc"]);
    let rustc = output(&mut which)?;
    let rustc = PathBuf::from(rustc);
    let root = rustc.parent()?.parent()?;
    root.join("lib/rustlib/src/rust/library/Cargo.lock")
        .exists()
        .then(|| (rustc.with_file_name("cargo"), rustc))
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// Where `cargo xtask setup` leaves bpf-linker.
fn cached_linker() -> Option<PathBuf> {
    let home = |rest: &str| env::var_os("HOME").map(|home| Path::new(&home).join(rest));
    let cache = env::var_os("FTD_CACHE")
        .map(PathBuf::from)
        .or_else(|| env::var_os("XDG_CACHE_HOME").map(|cache| Path::new(&cache).join("ftd")))
        .or_else(|| home(".cache/ftd"))?;
    Some(cache.join("bpf-tools/bin/bpf-linker")).filter(|linker| linker.exists())
}

fn linker_in_path() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join("bpf-linker")).find(|linker| linker.exists())
}
