//! Cargo's subcommands that are not part of Rust. Each has a directory of its own in the cache.

use std::process::Command;

use anyhow::Result;
use harness::Cache;
use harness::step::{Site, Step};

/// A step that installs a subcommand.
pub(super) fn cargo_tool(name: &'static str, version: &'static str) -> Box<dyn Step> {
    Box::new(CargoTool { name, version })
}

struct CargoTool {
    name: &'static str,
    /// The first numbers of the version: `3.8` takes any 3.8.x.
    version: &'static str,
}

impl Step for CargoTool {
    fn name(&self) -> &str {
        self.name
    }

    fn output(&self) -> Option<&str> {
        Some(self.name)
    }

    fn key(&self, _: &Cache) -> Result<String> {
        Ok(format!("{} {}", self.name, self.version))
    }

    fn make(&self, site: &Site<'_>) -> Result<()> {
        let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        install
            .current_dir(site.dir)
            .env("CARGO_TARGET_DIR", site.dir.join("target"))
            .args(["install", "--locked", "--quiet", "--root"])
            .arg(site.dir)
            .args(["--version", &format!("~{}", self.version), self.name]);
        site.log.run(&mut install)?;
        Ok(std::fs::remove_dir_all(site.dir.join("target"))?)
    }
}
