//! `ftctl doctor`: what this host has and lacks, each finding with cause and mend.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{App, ProbeStatus};
use crate::{
    cluster::fence::{self, FenceError},
    config::Config,
    probe::{FILTER_FULL, RING_FULL, UNREADABLE},
    snapshot::criu::{
        check::{self, Severity},
        facts::{self, CriuFacts},
    },
    unit::cgroup,
};

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub thing: String,
    /// How bad.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do; empty when all is well.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mend: String,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// ftd works, but less well.
    Warn,
    /// Something that ftd is for does not work.
    Fail,
}

fn finding(thing: &str, grade: Grade, found: impl Into<String>, mend: &str) -> Finding {
    Finding { thing: thing.into(), grade, found: found.into(), mend: mend.into() }
}

fn ok(thing: &str, found: impl Into<String>) -> Finding {
    finding(thing, Grade::Ok, found, "")
}

/// What can be seen without a running ftd.
pub fn of_host(config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    let uname = nix::sys::utsname::uname();
    let kernel = uname.map_or_else(|_| "unknown".into(), |u| u.release().to_string_lossy().into_owned());
    all.push(ok("kernel", kernel));
    all.push(if Path::new("/sys/kernel/btf/vmlinux").exists() {
        ok("kernel types (BTF)", "/sys/kernel/btf/vmlinux")
    } else {
        let mend = "use a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian's are); until then ftd \
                    watches through pidfds and D-Bus";
        finding("kernel types (BTF)", Grade::Warn, "there are none: no eBPF", mend)
    });
    all.push(match fs::read_to_string("/sys/kernel/security/lockdown") {
        Ok(text) if text.contains("[confidentiality]") => finding(
            "kernel lockdown",
            Grade::Warn,
            "confidentiality: no eBPF",
            "boot with lockdown=integrity or none",
        ),
        Ok(text) => ok("kernel lockdown", text.trim()),
        Err(_) => ok("kernel lockdown", "not in this kernel"),
    });
    all.push(match cgroup::unified_mount() {
        Ok(mount) if mount.join("cgroup.controllers").exists() => {
            ok("cgroup v2", mount.display().to_string())
        }
        _ => finding(
            "cgroup v2",
            Grade::Fail,
            "not mounted: units cannot be told apart",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
    });
    let dir = &config.node.state_dir;
    all.push(match nix::sys::statvfs::statvfs(dir) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let text = format!("{}: {} MiB free", dir.display(), free >> 20);
            if free < config.journal.max_size.as_u64() {
                let mend = "make room: the journal may grow to journal.max_size";
                finding("state directory", Grade::Warn, text, mend)
            } else {
                ok("state directory", text)
            }
        }
        Err(error) => finding(
            "state directory",
            Grade::Fail,
            format!("{}: {error}", dir.display()),
            "create it, or set node.state_dir",
        ),
    });
    all.push(match nix::unistd::Group::from_name(&config.api.group) {
        Ok(Some(group)) => ok("API group", format!("{} (gid {})", group.name, group.gid)),
        _ => finding(
            "API group",
            Grade::Warn,
            format!("there is no group {}: only root may use the API", config.api.group),
            "systemd-sysusers, or set api.group",
        ),
    });
    all.extend(of_criu(&CriuFacts::read(), facts::kernel(), facts::capabilities()));
    if config.workloads.iter().any(|workload| workload.address.is_some()) {
        all.push(of_fence(Path::new(fence::DEFAULT_DIR)));
    }
    if config.workloads.is_empty() {
        let mend = "add a [[workload]] to the configuration; see ftd.toml(5)";
        all.push(finding("workloads", Grade::Warn, "nothing is under care", mend));
    }
    all
}

/// Whether service addresses of this host can be fenced.
fn of_fence(dir: &Path) -> Finding {
    const THING: &str = "fence";
    match fence::look(dir) {
        Ok(None) => ok(THING, format!("{}: no address yet", dir.display())),
        Ok(Some(all)) => {
            let conflicts: u64 = all.iter().map(|one| one.counters.conflicts).sum();
            let found = format!("{}: {} addresses, {conflicts} conflicts", dir.display(), all.len());
            if conflicts == 0 {
                return ok(THING, found);
            }
            let mend = "another host says that it has an address of this one: see ftctl fence status, and look for it";
            finding(THING, Grade::Warn, found, mend)
        }
        Err(error @ FenceError::NoBpffs { .. }) => {
            let mend = "systemctl start run-ftd.bpf.mount";
            finding(THING, Grade::Fail, error.to_string(), mend)
        }
        Err(error) => {
            finding(THING, Grade::Fail, error.to_string(), "see the cause; ftctl doctor wants root for it")
        }
    }
}

/// What snapshots of processes need. Without it those of files still work: nothing here is a failure.
fn of_criu(criu: &CriuFacts, kernel: (u32, u32), capabilities: u64) -> Vec<Finding> {
    const THING: &str = "CRIU";
    let findings = check::of_criu_alone(criu, kernel, capabilities);
    let lacks = findings.into_iter().filter(|found| found.severity > Severity::Note);
    let lacks: Vec<_> = lacks.map(|found| finding(THING, Grade::Warn, found.cause, &found.mend)).collect();
    match criu {
        CriuFacts::Found(abilities) if lacks.is_empty() => {
            let can = |able, what| if able { what } else { "" };
            let more = [
                can(abilities.mem_track, ", copies memory in rounds"),
                can(abilities.lazy_pages, ", brings pages later"),
            ];
            vec![ok(THING, format!("{}{}", abilities.version, more.concat()))]
        }
        _ => lacks,
    }
}

/// What the probe says of itself. `realtime` is the priority that it was to have, 0 for none.
fn of_probe(probe: &ProbeStatus, realtime: u8) -> Vec<Finding> {
    let mut all = Vec::new();
    let why = probe.cause.as_deref().unwrap_or("no cause is known");
    all.push(match probe.source.as_str() {
        "ebpf" => ok("kernel probes", "eBPF programs are attached"),
        "pidfd" => {
            let found = format!("no eBPF ({why}); watching through pidfd and D-Bus: slower, never blind");
            finding("kernel probes", Grade::Warn, found, "see the cause")
        }
        _ => {
            let found = format!("neither eBPF nor pidfd ({why}); watching through D-Bus alone: slower");
            finding("kernel probes", Grade::Warn, found, "see the cause")
        }
    });
    // Only the programs have a reader that could have a priority.
    if probe.source == "ebpf" {
        all.push(if realtime == 0 || probe.realtime.starts_with("SCHED_FIFO") {
            ok("real-time reader", probe.realtime.clone())
        } else {
            let mend = "give ftd CAP_SYS_NICE, or set probe.realtime = 0 to be content without";
            finding("real-time reader", Grade::Warn, probe.realtime.clone(), mend)
        });
    }
    for (place, count) in probe.drops.iter().filter(|(_, count)| *count > 0) {
        let (found, mend) = match place.as_str() {
            RING_FULL => (format!("{count} events since ftd started ({place})"), "raise probe.ring"),
            FILTER_FULL => (
                format!("those of {count} new control groups, until ftd looked again ({place})"),
                "watch fewer units, or units that make fewer control groups; ftd looks again until all fit",
            ),
            UNREADABLE => (
                format!("{count} events since ftd started ({place})"),
                "it is a fault of ftd with this kernel: please report it, with the kernel's version",
            ),
            _ => (format!("{count} events since ftd started ({place})"), "see: ftctl events"),
        };
        all.push(finding("lost events", Grade::Warn, found, mend));
    }
    all
}

/// Everything, seen by a running ftd.
pub async fn of_daemon(app: &App) -> Vec<Finding> {
    let config = app.config.clone();
    // CRIU is asked, and may take its time.
    let of_host = tokio::task::spawn_blocking(move || of_host(&config)).await;
    let mut all = of_host.unwrap_or_else(|error| {
        vec![finding("this host", Grade::Fail, error.to_string(), "see: journalctl -u ftd")]
    });
    all.push(match app.systemd.version().await {
        Ok(version) => ok("systemd", version),
        Err(error) => finding("systemd", Grade::Fail, error.to_string(), "is it PID 1 of this host?"),
    });
    let probe = app.source.status();
    all.extend(of_probe(&probe, app.config.probe.realtime));
    for missing in probe.missing {
        all.push(finding("kernel probes", Grade::Warn, missing, "a newer kernel has it"));
    }
    for (unit, error) in probe.unwatched {
        let found = format!("the kernel does not watch it: {error}");
        let mend = "as it says; ftd tries again every few seconds";
        all.push(finding(&format!("unit {unit}"), Grade::Warn, found, mend));
    }
    let skipped = probe.skipped;
    if skipped > 0 {
        // The kernel does not say which, and there is nothing that could be done: so no warning.
        let found = format!(
            "{skipped} runs were left out, because an interrupt came while the same program was at work; \
             most would have reported nothing"
        );
        all.push(ok("kernel probes", found));
    }
    for unit in app.supervisor.status() {
        let thing = format!("unit {}", unit.unit);
        all.push(if unit.load_state == "loaded" {
            ok(&thing, format!("{} ({})", unit.active_state, unit.sub_state))
        } else {
            let mend = "see: ftctl events --unit, and systemctl status";
            finding(&thing, Grade::Fail, format!("systemd says {}", unit.load_state), mend)
        });
        if let Some(health) = unit.health.filter(|health| !health.proven) {
            let found = format!("{} has never succeeded: a hang would not be healed", health.check);
            let mend = "check the address, and that the service answers there";
            all.push(finding(&thing, Grade::Warn, found, mend));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(source: &str, realtime: &str, drops: &[(&str, u64)]) -> ProbeStatus {
        let drops = drops.iter().map(|(place, count)| ((*place).to_owned(), *count)).collect();
        ProbeStatus { source: source.into(), realtime: realtime.into(), drops, ..ProbeStatus::default() }
    }

    fn grades(findings: &[Finding]) -> Vec<(&str, Grade)> {
        findings.iter().map(|finding| (finding.thing.as_str(), finding.grade)).collect()
    }

    #[test]
    fn a_priority_that_was_not_wanted_is_no_lack() {
        let reader = |probe: &ProbeStatus, wanted| of_probe(probe, wanted).get(1).map(|found| found.grade);
        assert_eq!(reader(&probe("ebpf", "SCHED_FIFO 10", &[]), 10), Some(Grade::Ok));
        assert_eq!(reader(&probe("ebpf", "refused: no CAP_SYS_NICE", &[]), 10), Some(Grade::Warn));
        assert_eq!(reader(&probe("ebpf", "off: probe.realtime = 0", &[]), 0), Some(Grade::Ok));
        let without = of_probe(&probe("pidfd", "none: pidfds only", &[]), 10);
        assert_eq!(grades(&without), [("kernel probes", Grade::Warn)]);
    }

    #[test]
    fn a_host_without_criu_is_warned_and_not_failed() {
        use crate::snapshot::criu::{Abilities, Version};
        let missing = of_criu(&CriuFacts::Missing, (6, 12), u64::MAX);
        assert_eq!(grades(&missing), [("CRIU", Grade::Warn)]);
        let version = Version::new(4, 1);
        let found = Abilities { version, mem_track: true, lazy_pages: false, pidfd_store: true };
        let well = of_criu(&CriuFacts::Found(found), (6, 12), u64::MAX);
        assert_eq!(grades(&well), [("CRIU", Grade::Ok)]);
        assert_eq!(well[0].found, "4.1, copies memory in rounds");
        let old = of_criu(&CriuFacts::Found(found), (6, 18), u64::MAX);
        assert!(old[0].grade == Grade::Warn && old[0].found.contains("6.18"), "{old:?}");
    }

    #[test]
    fn each_loss_has_a_mend_of_its_own() {
        let drops = [(RING_FULL, 1), (FILTER_FULL, 2), (UNREADABLE, 3)];
        let found = of_probe(&probe("ebpf", "SCHED_FIFO 10", &drops), 10);
        let lost: Vec<_> = found.iter().filter(|finding| finding.thing.starts_with("lost")).collect();
        let mends: std::collections::HashSet<_> = lost.iter().map(|finding| &finding.mend).collect();
        assert_eq!((lost.len(), mends.len()), (3, 3));
        assert!(lost[0].mend.contains("probe.ring") && !lost[1].mend.contains("probe.ring"));
        assert_eq!(of_probe(&probe("ebpf", "SCHED_FIFO 10", &[(RING_FULL, 0)]), 10).len(), 2);
    }
}
