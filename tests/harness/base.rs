//! The read-only file systems under a host's overlay: the root file system that setup made and, on top of
//! it, a layer with a .deb installed.
//!
//! A layer is what `dpkg -i` changed, kept as an overlay's upper directory under the hash of the package
//! and of the root file system below: installing takes seconds, and most runs use the package of the run
//! before. The last few layers are kept, and all that a lab still stands on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::cache::Cache;
use crate::command;
use crate::lab;
use crate::step::{self, Site, Step};
use crate::{container, mounts};

/// The step's name, and its lock's.
const LAYER: &str = "host-layer";
/// How many layers that nobody uses are kept.
const KEEP: usize = 3;

/// What hosts stand on.
#[derive(Debug, Clone)]
pub struct Base {
    /// Read-only trees, topmost first.
    lowers: Vec<PathBuf>,
}

impl Base {
    /// The root file system alone.
    pub fn bare(cache: &Cache) -> Result<Self> {
        let output = cache.path("rootfs");
        ensure!(
            step::stamp(&output).is_some(),
            "there is no root file system for test hosts in {}; `cargo xtask setup` makes it",
            output.display()
        );
        Ok(Self { lowers: vec![output.join("root")] })
    }

    /// The root file system with a package installed; the layer is made if it isn't there.
    pub fn with_deb(cache: &Cache, deb: &Path) -> Result<Self> {
        let bare = Self::bare(cache)?;
        let bytes = fs::read(deb).with_context(|| format!("the package {} cannot be read", deb.display()))?;
        let below = step::stamp(&cache.path("rootfs")).unwrap_or_default();
        let mut hash = blake3::Hasher::new();
        hash.update(below.as_bytes()).update(&bytes);
        let output = format!("layers/{}", &hash.finalize().to_hex()[..16]);
        fs::create_dir_all(cache.path("layers"))?;
        step::ensure(cache, &Layer { output: output.clone(), deb: deb.to_owned(), bare: bare.clone() })?;
        let layer = cache.path(&output);
        // Its stamp's time says when it was last used: see `sweep`.
        fs::File::options().append(true).open(layer.join("stamp"))?.set_modified(SystemTime::now())?;
        sweep(cache)?;
        let mut lowers = vec![layer.join("upper")];
        lowers.extend(bare.lowers);
        Ok(Self { lowers })
    }

    /// What a test's hosts stand on: `FTD_BASE` (a list of directories parted by colons, topmost first, as
    /// `cargo xtask` sets it); else the root file system with the package of `FTD_DEB`; else with the
    /// newest one in `target/debian`; else bare.
    pub fn find() -> Result<Self> {
        if let Some(list) = std::env::var_os("FTD_BASE").filter(|list| !list.is_empty()) {
            let lowers: Vec<_> = std::env::split_paths(&list).collect();
            for path in &lowers {
                ensure!(path.is_dir(), "FTD_BASE names {}, which is no directory", path.display());
            }
            return Ok(Self { lowers });
        }
        let cache = Cache::open()?;
        match built_deb() {
            Some(deb) => Self::with_deb(&cache, &deb),
            None => Self::bare(&cache),
        }
    }

    /// The base that consists of these directories, topmost first.
    pub(crate) fn of(lowers: Vec<PathBuf>) -> Self {
        Self { lowers }
    }

    /// Its directories, topmost first.
    pub fn lowers(&self) -> &[PathBuf] {
        &self.lowers
    }

    /// The value for `FTD_BASE` that names it.
    pub fn to_env(&self) -> Result<std::ffi::OsString> {
        std::env::join_paths(&self.lowers)
            .context("a path of the cache holds a colon; set FTD_CACHE to another")
    }
}

/// The package that is to be tried: that of `FTD_DEB`, else the newest one in `target/debian`.
pub fn built_deb() -> Option<PathBuf> {
    let named = std::env::var_os("FTD_DEB").filter(|deb| !deb.is_empty()).map(PathBuf::from);
    named.or_else(newest_deb)
}

/// The newest package in the work tree's `target/debian`.
fn newest_deb() -> Option<PathBuf> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| tree.join("target"), PathBuf::from);
    let debs = fs::read_dir(target.join("debian")).ok()?.flatten().map(|entry| entry.path());
    debs.filter(|path| path.extension().is_some_and(|e| e == "deb"))
        .max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok())
}

struct Layer {
    output: String,
    deb: PathBuf,
    bare: Base,
}

impl Step for Layer {
    fn name(&self) -> &'static str {
        LAYER
    }

    fn output(&self) -> Option<&str> {
        Some(&self.output)
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(self.output.clone())
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        let mut install = Command::new(lab::helper()?);
        install.arg("install").args([site.dir, &self.deb]).args(&self.bare.lowers);
        site.log.run(&mut install)?;
        mounts::remove_tree(&site.dir.join("work"))?;
        fs::remove_dir(site.dir.join("root")).context("the layer's mount point cannot be removed")
    }
}

/// `hosts install DIR DEB LOWER...`: installs a package over read-only trees, leaving what changed in
/// `DIR/upper`. In a mount namespace of its own, so that nothing stays mounted whatever happens.
pub fn install(dir: &Path, deb: &Path, lowers: &[PathBuf]) -> Result<ExitCode> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("no mount namespace can be made (as root?)")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let root = dir.join("root");
    container::overlay(lowers, &dir.join("upper"), &dir.join("work"), &root)?;
    for (kind, at) in [("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "run"), ("tmpfs", "tmp")] {
        mount(Some(kind), &root.join(at), Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("{kind} cannot be mounted at {}", root.join(at).display()))?;
    }
    mount(Some("/dev"), &root.join("dev"), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    fs::copy(deb, root.join("tmp/package.deb"))
        .with_context(|| format!("the package {} cannot be copied", deb.display()))?;
    // Without /run/systemd/system the maintainer scripts enable services but start none.
    let mut dpkg = Command::new("chroot");
    dpkg.arg(&root).args(["dpkg", "--install", "/tmp/package.deb"]).env_clear();
    dpkg.envs([("PATH", crate::enter::PATH), ("DEBIAN_FRONTEND", "noninteractive"), ("LANG", "C.UTF-8")]);
    let status = command::output(&mut dpkg)?;
    print!("{}", status.stdout);
    eprint!("{}", status.stderr);
    if !status.success() {
        bail!(
            "{} does not install on the test hosts' root file system (are its dependencies in the list of \
             packages in xtask/src/setup/rootfs.rs?)",
            deb.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes all layers but the last used and those that a lab stands on.
fn sweep(cache: &Cache) -> Result<()> {
    let mut layers: Vec<(SystemTime, PathBuf)> = fs::read_dir(cache.path("layers"))?
        .flatten()
        .filter_map(|entry| {
            Some((fs::metadata(entry.path().join("stamp")).ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    layers.sort_by(|a, b| b.cmp(a));
    let used = lab::lowers_in_use();
    for (_, layer) in layers.into_iter().skip(KEEP) {
        if !used.iter().any(|lower| lower.starts_with(&layer)) {
            let _lock = cache.lock(LAYER)?;
            mounts::remove_tree(&layer)?;
        }
    }
    Ok(())
}
