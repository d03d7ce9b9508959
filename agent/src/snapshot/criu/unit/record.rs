//! What is known of a dumped unit, beside CRIU's images.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    super::{Dumped, Version},
    error::{UnitError, file},
};

/// What is beside CRIU's images.
pub(in crate::snapshot) const MANIFEST: &str = "unit.json";
/// The form of [`UnitImage`].
pub(super) const VERSION: u32 = 1;

/// A dumped unit; kept beside CRIU's images as `unit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitImage {
    /// The form of this record.
    pub version: u32,
    /// The unit.
    pub unit: String,
    /// Its main process.
    pub main_pid: u32,
    /// The sockets through which it printed to the journal.
    pub journal: Vec<u64>,
    /// /dev/null as systemd had opened it, in CRIU's words.
    pub nulls: Vec<String>,
    /// Whether it saw other mounts than the host.
    pub own_mounts: bool,
    /// Whether the unit was stopped by the dump.
    pub stopped: bool,
    /// The machine's kind.
    pub machine: String,
    /// The kernel's release.
    pub kernel: String,
    /// CRIU's version.
    pub criu: Version,
    /// When.
    pub taken: jiff::Timestamp,
    /// What it cost.
    pub cost: Dumped,
}

/// The machine's kind, and the kernel's release.
pub(super) fn machine() -> (String, String) {
    let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
    nix::sys::utsname::uname().map(|name| (text(name.machine()), text(name.release()))).unwrap_or_default()
}

/// What every form of the record has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl UnitImage {
    /// Reads the record beside the images in `dir`.
    pub fn read(dir: &Path) -> Result<Self, UnitError> {
        let text = fs::read(dir.join(MANIFEST));
        let unreadable = |error| UnitError::Images { dir: dir.into(), cause: format!("{MANIFEST}: {error}") };
        Self::parse(&text.map_err(unreadable)?, dir)
    }

    /// Reads the text of a record; where it is from is for the error.
    pub fn parse(text: &[u8], from: &Path) -> Result<Self, UnitError> {
        let damaged = |cause: String| UnitError::Images { dir: from.into(), cause };
        let read = |error: serde_json::Error| damaged(format!("{MANIFEST}: {error}"));
        match serde_json::from_slice(text).map_err(read)? {
            Versioned { version: VERSION } => serde_json::from_slice(text).map_err(read),
            Versioned { version } => Err(damaged(format!(
                "it was made by a newer ftd (version {version}; this one reads {VERSION})"
            ))),
        }
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), UnitError> {
        let path = dir.join(MANIFEST);
        let what = format!("{} cannot be written", path.display());
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other);
        text.and_then(|text| fs::write(&path, text)).map_err(file(what))
    }

    /// Whether it is of this unit and this kind of machine.
    pub(super) fn fits(&self, dir: &Path, unit: &str) -> Result<(), UnitError> {
        let (machine, _) = machine();
        let cause = if self.unit != unit {
            format!("it is of {}, not of {unit}", self.unit)
        } else if self.machine != machine {
            format!("it is of a machine of the kind {}; this is {machine}", self.machine)
        } else {
            return Ok(());
        };
        Err(UnitError::Images { dir: dir.into(), cause })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::snapshot::criu::unit) fn image() -> UnitImage {
        UnitImage {
            version: VERSION,
            unit: "x.service".into(),
            main_pid: 71,
            journal: vec![5, 9],
            nulls: vec!["file[51:4]".into()],
            own_mounts: true,
            stopped: true,
            machine: machine().0,
            kernel: String::new(),
            criu: Version::new(4, 2),
            taken: jiff::Timestamp::UNIX_EPOCH,
            cost: Dumped::default(),
        }
    }

    #[test]
    fn the_record_is_kept_and_a_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(UnitImage::read(dir.path()).unwrap_err().to_string().contains(MANIFEST));
        image().write(dir.path()).unwrap();
        assert_eq!(UnitImage::read(dir.path()).unwrap(), image());
        let text = fs::read_to_string(dir.path().join(MANIFEST)).unwrap();
        fs::write(dir.path().join(MANIFEST), text.replace("\"version\": 1,", "\"version\": 2,")).unwrap();
        let error = UnitImage::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("newer ftd"), "{error}");
        fs::write(dir.path().join(MANIFEST), &text[..text.len() / 2]).unwrap();
        assert!(UnitImage::read(dir.path()).is_err());
    }

    #[test]
    fn images_of_another_unit_or_machine_are_refused() {
        let dir = Path::new("/d");
        image().fits(dir, "x.service").unwrap();
        assert!(
            image()
                .fits(dir, "y.service")
                .unwrap_err()
                .to_string()
                .contains("of x.service, not of y.service")
        );
        let other = UnitImage { machine: "s390x".into(), ..image() };
        assert!(other.fits(dir, "x.service").unwrap_err().to_string().contains("s390x"));
    }
}
