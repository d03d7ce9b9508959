//! Building: release binaries, the .deb, and programs of package ftd-tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::{Base, Cache, command};

use crate::setup::{self, Need};
use crate::workspace::Workspace;

/// Builds ftd and ftctl for release.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    command::show(workspace.cargo().args(["build", "--release", "--package", "ftd", "--bins"]))
}

/// Builds the .deb and returns its path. Cargo's own output goes to standard error.
pub(crate) fn deb(cache: &Cache, workspace: &Workspace) -> Result<PathBuf> {
    setup::need(cache, workspace, &[Need::Build, Need::Deb])?;
    build(workspace)?;
    generate(workspace)?;
    let mut cargo = workspace.cargo();
    // Cargo finds its subcommands by PATH.
    let tools = cache.path("cargo-deb/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(tools).chain(std::env::split_paths(&path));
    cargo.env("PATH", std::env::join_paths(paths).context("the cache's path holds a colon; set FTD_CACHE")?);
    cargo.args(["deb", "--package", "ftd", "--locked", "--no-build", "--strip"]);
    cargo.stderr(std::process::Stdio::inherit());
    let out = cargo.output().context("cargo cannot be started")?;
    ensure!(out.status.success(), "`{}` failed: {}", command::describe(&cargo), out.status);
    // It prints the package's path as its last line.
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let deb = PathBuf::from(text.trim().lines().last().unwrap_or_default());
    ensure!(deb.is_file(), "cargo deb named no package: it printed '{}'", text.trim());
    Ok(deb)
}

/// Has the built ftctl write its man pages and completions to packaging/generated, and checks what is
/// written by hand against it: the configuration that is installed, and its man page.
fn generate(workspace: &Workspace) -> Result<()> {
    let ftctl = workspace.target("release/ftctl");
    let packaging = workspace.root().join("packaging");
    let generated = packaging.join("generated");
    if generated.exists() {
        fs::remove_dir_all(&generated)?;
    }
    let man = generated.join("man");
    fs::create_dir_all(&man)?;
    command::ok(Command::new(&ftctl).arg("man").arg(&man))?;
    for (shell, file) in [("bash", "ftctl.bash"), ("zsh", "_ftctl"), ("fish", "ftctl.fish")] {
        fs::write(generated.join(file), command::ok(Command::new(&ftctl).args(["completions", shell]))?)?;
    }

    let installed = packaging.join("ftd.toml");
    let text = fs::read_to_string(&installed)?;
    let all: Vec<_> = text.lines().map(shown).collect();
    let shows_all = generated.join("all.toml");
    fs::write(&shows_all, all.join("\n"))?;
    let empty = generated.join("empty.toml");
    fs::write(&empty, "")?;
    let of_empty = read_config(&ftctl, &empty)?;
    ensure!(
        read_config(&ftctl, &installed)? == of_empty,
        "{} does not mean the defaults",
        installed.display()
    );
    let mut of_all = read_config(&ftctl, &shows_all)?;
    let workloads = of_all["workload"].take();
    let mut keys = Vec::new();
    leaves(&workloads, &mut keys);
    ensure!(!keys.is_empty(), "{} shows no workload", installed.display());
    of_all["workload"] = serde_json::json!([]);
    ensure!(of_all == of_empty, "{} shows other values than the defaults", installed.display());
    leaves(&of_all, &mut keys);
    let page = fs::read_to_string(packaging.join("man/ftd.toml.5"))?;
    for key in keys {
        // At the beginning of a line, or in a table in one.
        let begins = |part: &str| part.trim_start_matches(['#', ' ']).starts_with(&format!("{key} ="));
        let is_key = |line: &str| line.split(['{', ',']).any(begins);
        ensure!(text.lines().any(is_key), "{} does not show the key {key}", installed.display());
        ensure!(page.contains(&format!(".BR {key} ")), "ftd.toml(5) does not explain the key {key}");
    }
    Ok(())
}

/// A line of the installed configuration with what it shows in force: `#key = value`, `#[section]`.
fn shown(line: &str) -> &str {
    match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|first: char| first == '[' || first.is_ascii_lowercase()) => rest,
        _ => line,
    }
}

fn read_config(ftctl: &Path, file: &Path) -> Result<serde_json::Value> {
    let mut show = Command::new(ftctl);
    // A socket where nobody is: the file alone counts.
    show.args(["--json", "--socket", "/nonexistent", "config", "show", "--config"]).arg(file);
    Ok(serde_json::from_str(&command::ok(&mut show)?)?)
}

/// The names of all keys with a value of their own.
fn leaves(value: &serde_json::Value, keys: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                let section = value.is_object()
                    || value.as_array().is_some_and(|a| a.iter().all(serde_json::Value::is_object));
                if section { leaves(value, keys) } else { keys.push(key.clone()) }
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| leaves(value, keys)),
        _ => {}
    }
}

/// Builds a program of package ftd-tests and returns its path.
pub(crate) fn binary(workspace: &Workspace, name: &str, release: bool) -> Result<PathBuf> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--quiet", "--package", "ftd-tests", "--bin", name]);
    if release {
        cargo.arg("--release");
    }
    command::show(&mut cargo)?;
    Ok(workspace.target(if release { "release" } else { "debug" }).join(name))
}

/// Tells a program of package ftd-tests what there is: `FTD_DEB`, `FTD_BIN` and `FTCTL_BIN` (the release
/// binaries), `FTD_ROOTFS` (the bare root file system) and `FTD_BASE` (what hosts stand on).
pub(crate) fn environment(
    program: &mut Command,
    cache: &Cache,
    workspace: &Workspace,
    deb: &Path,
    base: &Base,
) -> Result<()> {
    program
        .env("FTD_DEB", deb)
        .env("FTD_BIN", workspace.target("release/ftd"))
        .env("FTCTL_BIN", workspace.target("release/ftctl"))
        .env("FTD_ROOTFS", cache.path("rootfs/root"))
        .env("FTD_BASE", base.to_env()?);
    Ok(())
}
