//! Why units are not dumped or restored.

use std::{io, path::PathBuf};

use super::{super::CriuError, look::HIDDEN};
use crate::{snapshot::criu::check::Report, unit::manager::JobError};

/// Why a unit was not dumped or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// Something is in the way; nothing was touched.
    #[error("{} cannot be dumped: {}", .0.unit, .0.blockers())]
    Blocked(Box<Report>),
    /// It is not in the state that it should be in.
    #[error("{unit} is {state}: {mend}")]
    State {
        /// The unit.
        unit: String,
        /// Its state.
        state: String,
        /// What to do.
        mend: &'static str,
    },
    /// A PID that the restored processes need is taken; nothing was touched.
    #[error(
        "{unit} cannot be restored: its PID {pid} belongs to {owner} now. End that, or wait for its end, or start \
         the service without its memory"
    )]
    Taken {
        /// The unit.
        unit: String,
        /// The number.
        pid: u32,
        /// Whose it is.
        owner: String,
    },
    /// A file is not as it was; nothing was touched.
    #[error(
        "{unit} cannot be restored: {} {how}. Put the old file back, or choose a newer snapshot, or start the \
         service without its memory",
        path.display()
    )]
    Changed {
        /// The unit.
        unit: String,
        /// The file.
        path: PathBuf,
        /// How it differs.
        how: String,
    },
    /// The images are not what they should be.
    #[error("{} cannot be restored from: {cause}. Choose another snapshot", dir.display())]
    Images {
        /// Where they are.
        dir: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The images are where the unit cannot see them.
    #[error(
        "{} is no place for images: {unit} sees something else there. Choose one outside of {}",
        dir.display(),
        HIDDEN.join(", ")
    )]
    Hidden {
        /// The unit.
        unit: String,
        /// Where they are.
        dir: PathBuf,
    },
    /// systemd would not.
    #[error("{what} {unit}: {cause}")]
    Systemd {
        /// What was asked for.
        what: &'static str,
        /// The unit.
        unit: String,
        /// Why not.
        #[source]
        cause: JobError,
    },
    /// A file or a program could not be used.
    #[error("{what}: {cause}")]
    File {
        /// What.
        what: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// CRIU would not.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// The images are complete, and whoever was to take them has not: the units go on as before.
    #[error("{} is not stopped: its images were not taken over", .units.join(", "))]
    NotTaken {
        /// The units.
        units: Vec<String>,
    },
    /// Several things are in the way; nothing was touched.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Several(Vec<UnitError>),
    /// Some were restored, and run.
    #[error("{failure}\nrestored before it, and running: {}", .restored.join(", "))]
    Partly {
        /// The units that were.
        restored: Vec<String>,
        /// What stopped it.
        #[source]
        failure: Box<UnitError>,
    },
    /// It was started and did not come up.
    #[error("{unit} was not restored: {words}. {mend}")]
    Failed {
        /// The unit.
        unit: String,
        /// CRIU's first error, or systemd's word.
        words: String,
        /// What to do.
        mend: String,
    },
}

impl UnitError {
    /// One error of them all; `None` where there is none.
    pub(super) fn of(mut errors: Vec<Self>) -> Option<Self> {
        if errors.len() > 1 { Some(Self::Several(errors)) } else { errors.pop() }
    }
}

pub(super) fn file(what: impl Into<String>) -> impl FnOnce(io::Error) -> UnitError {
    let what = what.into();
    move |cause| UnitError::File { what, cause }
}
