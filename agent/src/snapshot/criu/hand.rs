//! Dumping and restoring a unit by hand, without a running ftd: `ftd dump-unit` and `ftd restore-unit`, and, for what
//! is between the two, `ftd keep-images` and `ftd give-images`. For those who look for a fault, for tests, and
//! for measuring. All print what was done as JSON.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{
    After, Criu,
    unit::{self, DumpUnit},
};
use crate::{
    snapshot::{
        process::{self, Cost, Processes, Progress, Take},
        store::{About, Kind, Settings, Store},
    },
    unit::manager::Systemd,
};

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

/// Keeps directories of images in a store, each as the workload's next generation: one for each line of the standard
/// input, as a running ftd does with one dump after another.
pub fn keep(store: &Path, workload: &str) -> Result<()> {
    let store = Store::open(store, Settings::default())?;
    for dir in io::stdin().lines() {
        let dir = PathBuf::from(dir?);
        let about = About {
            workload: workload.to_owned(),
            kind: Kind::Process,
            node: String::new(),
            boot_id: String::new(),
            time: jiff::Timestamp::now(),
        };
        let unit = workload.to_owned();
        let take = Take { about, files: None, units: vec![unit.clone()], stop: false, limit: LIMIT };
        let kept = process::store_all(&store, take, &[(unit, dir)], Cost::default(), Box::new(|_, _| {}));
        let (generation, _) = kept?;
        println!("{}", json!({ "generation": generation.number, "stats": generation.stats }));
    }
    Ok(())
}

/// Gets a generation of images back, into a directory that is there.
pub fn give(store: &Path, workload: &str, number: u64, dir: &Path) -> Result<()> {
    let store = Store::open(store, Settings::default())?;
    let dirs =
        Processes::open(&store, workload, number)?.extract_to(dir, &mut (Box::new(|_, _| {}) as Progress))?;
    println!("{}", json!(dirs));
    Ok(())
}

/// Does something with a connection to systemd.
fn connected<T>(work: impl AsyncFnOnce(&Systemd) -> T) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(Systemd::alone(work))?)
}
