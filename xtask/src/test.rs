//! All tests, from the cheap to the dear.

use anyhow::Result;
use clap::Args;
use harness::{Base, Cache, command};

use crate::setup::{self, Need};
use crate::stage::Stages;
use crate::workspace::Workspace;
use crate::{ensure_root, kernels, package};

/// What of the tests to run.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only tests whose name contains this; `kernels` for the kernels alone.
    #[arg(long, value_name = "FILTER")]
    only: Option<String>,
    /// Leave out what needs root: the scenarios on test hosts, and the kernels.
    #[arg(long)]
    no_hosts: bool,
}

pub(crate) fn run(cache: &Cache, workspace: &Workspace, options: &Options) -> Result<()> {
    let filter = options.only.as_deref();
    let kernels_only = filter == Some("kernels");
    let mut stages = Stages::default();
    if !options.no_hosts {
        ensure_root()?;
    }

    let ready = stages.run("setup", || {
        let needs: &[Need] = match (options.no_hosts, kernels_only) {
            (true, _) => &[Need::Build],
            (_, true) => &[Need::Build, Need::Kernels],
            // The kernels are left out when single tests are asked for.
            _ if filter.is_some() => &[Need::Build, Need::Deb, Need::Hosts],
            _ => &[Need::Build, Need::Deb, Need::Hosts, Need::Kernels],
        };
        setup::need(cache, workspace, needs)
    });
    if ready.is_none() {
        return stages.end();
    }

    if !kernels_only {
        stages.run("unit tests", || {
            let mut cargo = workspace.cargo();
            cargo.args(["test", "--workspace", "--locked"]);
            if let Some(filter) = filter {
                cargo.args(["--", filter]);
            }
            command::show(&mut cargo)
        });
    }
    if options.no_hosts {
        return stages.end();
    }
    if kernels_only {
        stages.run("release build", || package::build(workspace));
    } else {
        let base = stages.run("package", || {
            let deb = package::deb(cache, workspace)?;
            // The helper that makes the layer lies beside this program once it is built.
            package::binary(workspace, "hosts", false)?;
            let base = Base::with_deb(cache, &deb)?;
            Ok((deb, base))
        });
        match base {
            Some((deb, base)) => {
                stages.run("scenarios", || {
                    let mut cargo = workspace.cargo();
                    package::environment(&mut cargo, cache, workspace, &deb, &base)?;
                    cargo.args([
                        "test",
                        "--locked",
                        "--package",
                        "ftd-tests",
                        "--no-fail-fast",
                        "--test",
                        "*",
                    ]);
                    cargo.args(["--", "--test-threads=1"]).args(filter);
                    command::show(&mut cargo)
                });
            }
            None => stages.cannot("scenarios", "there is no package"),
        }
    }
    if kernels_only || filter.is_none() {
        stages.run("kernels", || kernels::run(cache, workspace, &kernels::Options::default()));
    }
    stages.end()
}
