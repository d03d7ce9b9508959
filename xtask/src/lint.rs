//! Format, lints, licences, and the package's form.

use anyhow::Result;
use harness::{Cache, command};
use std::process::Command;

use crate::package;
use crate::setup::{self, Need};
use crate::stage::Stages;
use crate::workspace::Workspace;

pub(crate) fn run(cache: &Cache, workspace: &Workspace) -> Result<()> {
    setup::need(cache, workspace, &[Need::Build, Need::Deb, Need::Lint])?;
    let mut stages = Stages::default();
    stages.run("format", || command::show(workspace.cargo().args(["fmt", "--all", "--check"])));
    stages.run("format of agent-ebpf", || {
        let manifest = workspace.root().join("agent-ebpf/Cargo.toml");
        command::show(workspace.cargo().args(["fmt", "--check", "--manifest-path"]).arg(manifest))
    });
    stages.run("clippy", || {
        let mut clippy = workspace.cargo();
        clippy.args(["clippy", "--workspace", "--all-targets", "--locked"]);
        // --all-targets leaves out what is not tested by default: the scenarios.
        clippy.args(["--test", "*", "--", "--deny", "warnings"]);
        command::show(&mut clippy)
    });
    stages.run("licences, bans, sources", || {
        // Advisories are in a repository of their own, which is no package registry: where it cannot be
        // reached this would fail for no fault of ftd's. `cargo deny check advisories` does it elsewhere.
        let mut deny = Command::new(cache.path("cargo-deny/bin/cargo-deny"));
        deny.current_dir(workspace.root()).args(["--locked", "check", "bans", "licenses", "sources"]);
        command::show(&mut deny)
    });
    let deb = stages.run("package", || package::deb(cache, workspace));
    match deb {
        Some(deb) => {
            stages.run("lintian", || {
                let mut lintian = Command::new("lintian");
                lintian.args(["--fail-on", "error", "--allow-root"]).arg(deb);
                command::show(&mut lintian)
            });
        }
        None => stages.cannot("lintian", "there is no package"),
    }
    stages.end()
}
