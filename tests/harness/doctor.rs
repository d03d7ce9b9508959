//! What this machine lacks for test hosts: each thing is tried, not looked up, where trying is cheap.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cache::Cache;
use crate::cgroup::Hierarchies;
use crate::command;
use crate::step;

/// One thing that was looked at.
#[derive(Debug)]
pub struct Finding {
    /// What it is.
    pub thing: &'static str,
    /// How it was found; or what is wrong, and the mend.
    pub verdict: Result<String, String>,
    /// Whether hosts cannot be had without it.
    pub needed: bool,
}

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    let needed = |thing, verdict| Finding { thing, verdict, needed: true };
    let useful = |thing, verdict| Finding { thing, verdict, needed: false };
    vec![
        needed("root", root()),
        needed("ip, nsenter, unshare", tools()),
        needed(
            "namespaces",
            attempt(
                &["unshare", "-m", "-p", "-u", "-i", "-n", "-C", "--fork", "true"],
                "hosts need a kernel with all namespaces, and CAP_SYS_ADMIN: not an unprivileged container",
            ),
        ),
        needed(
            "overlay",
            attempt(&["unshare", "-m", "sh", "-euc", OVERLAY], "load the module: modprobe overlay"),
        ),
        needed(
            "bridge, veth",
            attempt(&["unshare", "-n", "sh", "-euc", BRIDGE], "load the modules: modprobe bridge veth"),
        ),
        needed("cgroup 2", cgroup2()),
        useful("cgroup 1 memory, or controller memory on 2", memory()),
        useful("BTF of the kernel", btf()),
        needed("root file system", rootfs()),
    ]
}

const OVERLAY: &str = "mount -t tmpfs none /mnt; mkdir /mnt/l /mnt/u /mnt/w /mnt/m; \
    mount -t overlay overlay -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w /mnt/m";
const BRIDGE: &str = "ip link add br0 type bridge; ip link add veth0 type veth peer name veth1; \
    ip link set veth0 master br0";

fn attempt(words: &[&str], mend: &str) -> Result<String, String> {
    match command::ok(Command::new(words[0]).args(&words[1..])) {
        Ok(_) => Ok("works".to_owned()),
        Err(error) => Err(format!("{error:#}. {mend}")),
    }
}

fn root() -> Result<String, String> {
    if nix::unistd::geteuid().is_root() {
        Ok("yes".to_owned())
    } else {
        Err("run it as root (sudo -E)".to_owned())
    }
}

fn tools() -> Result<String, String> {
    for tool in ["ip", "unshare", "nsenter"] {
        attempt(&[tool, "--version"], "apt-get install iproute2 util-linux")
            .or_else(|_| attempt(&[tool, "-V"], "apt-get install iproute2 util-linux"))?;
    }
    Ok("there".to_owned())
}

fn cgroup2() -> Result<String, String> {
    let found = Hierarchies::find().map_err(|error| format!("{error:#}"))?;
    let probe = found.unified.join("ftd-lab-doctor");
    let made = fs::create_dir(&probe);
    let kill = probe.join("cgroup.kill").exists();
    let freeze = probe.join("cgroup.freeze").exists();
    let _ = fs::remove_dir(&probe);
    made.map_err(|error| format!("no group can be made in {}: {error}", found.unified.display()))?;
    if !freeze {
        return Err("this kernel cannot freeze groups (5.2 can)".to_owned());
    }
    Ok(format!(
        "at {}{}",
        found.unified.display(),
        if kill { "" } else { ", without cgroup.kill (5.14 has it)" }
    ))
}

fn memory() -> Result<String, String> {
    let found = Hierarchies::find().map_err(|error| format!("{error:#}"))?;
    if let Some(memory) = found.memory {
        return Ok(format!("version 1, at {}", memory.display()));
    }
    let controllers = fs::read_to_string(found.unified.join("cgroup.controllers")).unwrap_or_default();
    if controllers.split_whitespace().any(|name| name == "memory") {
        Ok("version 2".to_owned())
    } else {
        Err("hosts have no memory limit, and out-of-memory tests cannot run".to_owned())
    }
}

fn btf() -> Result<String, String> {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    if path.exists() { Ok("there".to_owned()) } else { Err("ftd on the hosts runs without eBPF".to_owned()) }
}

fn rootfs() -> Result<String, String> {
    let cache = Cache::open().map_err(|error| format!("{error:#}"))?;
    match step::stamp(&cache.path("rootfs")) {
        Some(_) => Ok(format!("in {}", cache.path("rootfs").display())),
        None => Err("`cargo xtask setup` makes it".to_owned()),
    }
}
