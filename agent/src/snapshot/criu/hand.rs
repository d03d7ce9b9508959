//! Dumping and restoring a unit by hand, without a running ftd: `ftd dump-unit` and `ftd restore-unit`, for
//! those who look for a fault, and for tests. Both print what was done as JSON.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    After, Criu,
    unit::{self, DumpUnit},
};
use crate::unit::manager::Systemd;

/// Time for everything that CRIU does.
const LIMIT: Duration = Duration::from_mins(10);

/// Dumps a unit into `dir`, and stops it if wanted.
pub fn dump(name: &str, dir: &Path, stop: bool) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    let dir = dir.canonicalize()?;
    let (name, criu) = (crate::config::unit_name(name), Criu::find()?);
    let after = if stop { After::End } else { After::Run };
    let image = connected(async |systemd| {
        let how = DumpUnit { dir: &dir, after, limit: LIMIT };
        unit::dump_unit(systemd, &criu, &name, how, |_| true).await
    })??;
    println!("{}", serde_json::to_string(&image)?);
    Ok(())
}

/// Restores a unit from `dir`.
pub fn restore(name: &str, dir: &Path) -> Result<()> {
    let dir = dir.canonicalize().with_context(|| format!("{} is not there", dir.display()))?;
    let (name, criu) = (crate::config::unit_name(name), Criu::find()?);
    let restored = connected(async |systemd| unit::restore_unit(systemd, &criu, &name, &dir, LIMIT).await)??;
    println!("{}", serde_json::to_string(&restored)?);
    Ok(())
}

/// Does something with a connection to systemd.
fn connected<T>(work: impl AsyncFnOnce(&Systemd) -> T) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(Systemd::alone(work))?)
}
