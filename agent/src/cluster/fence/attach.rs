//! The programs on interfaces: put there, taken up again, and kept when ftd is gone.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, Link as _, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
    },
    util::KernelVersion,
};
use nix::net::if_::if_indextoname;

use super::{FenceError, kernel};
use crate::cluster::vip::Interface;

/// Program, direction, and what its pin is called, before the interface's number.
const PROGRAMS: [(&str, TcAttachType, &str); 2] =
    [("fence_in", TcAttachType::Ingress, "in-"), ("fence_out", TcAttachType::Egress, "out-")];

/// Before a pin's name, until it takes the place of another. A BPF file system allows no dots in names.
const FRESH: &str = "new-";

/// Of the filter, where there are no TCX links: before all others, and always the same, so that one can be replaced
/// that another process has left.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0xf7d, 1);

/// The programs, loaded.
pub(super) struct Programs {
    pub(super) ebpf: Ebpf,
    links: bool,
}

impl Programs {
    pub(super) fn load(mut ebpf: Ebpf) -> Result<Self, FenceError> {
        for (name, ..) in PROGRAMS {
            program(&mut ebpf, name)?.load().map_err(|error| kernel("loaded", &error))?;
        }
        Ok(Self { ebpf, links: has_links() })
    }

    /// Puts these programs into the place of those of an earlier ftd, on all interfaces that are still there.
    pub(super) fn renew_all(&mut self, dir: &Path) -> Result<(), FenceError> {
        for index in attached(dir)? {
            match if_indextoname(index) {
                Ok(name) => self.attach_to(dir, index, &name.to_string_lossy())?,
                Err(_) => forget(dir, index)?,
            }
        }
        Ok(())
    }

    /// Puts both programs onto the interface, or sees that they are there.
    pub(super) fn attach(&mut self, dir: &Path, interface: &Interface) -> Result<(), FenceError> {
        self.attach_to(dir, interface.index, &interface.name)
    }

    fn attach_to(&mut self, dir: &Path, index: u32, name: &str) -> Result<(), FenceError> {
        for (program_name, direction, prefix) in PROGRAMS {
            let pin = dir.join(format!("{prefix}{index}"));
            let program = program(&mut self.ebpf, program_name)?;
            if self.links {
                link(program, name, direction, &pin)?;
            } else {
                filter(program, name, direction, &pin)?;
            }
        }
        Ok(())
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, FenceError> {
    let missing =
        || FenceError::Kernel { deed: "loaded".into(), cause: format!("there is no program {name} in it") };
    ebpf.program_mut(name).ok_or_else(missing)?.try_into().map_err(|error| kernel("loaded", &error))
}

/// Numbers of the interfaces that have pins.
fn attached(dir: &Path) -> Result<Vec<u32>, FenceError> {
    let at = |error| FenceError::Dir { path: dir.to_owned(), error };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(at)? {
        let name = entry.map_err(at)?.file_name();
        let Some(name) = name.to_str() else { continue };
        let name = name.strip_prefix(FRESH).unwrap_or(name);
        let number = PROGRAMS.iter().find_map(|(.., prefix)| name.strip_prefix(prefix)?.parse::<u32>().ok());
        found.extend(number);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn forget(dir: &Path, index: u32) -> Result<(), FenceError> {
    PROGRAMS.iter().try_for_each(|(.., prefix)| {
        let pin = dir.join(format!("{prefix}{index}"));
        remove(&fresh(&pin))?;
        remove(&pin)
    })
}

/// Takes the programs off all interfaces.
pub(super) fn detach_all(dir: &Path) -> Result<(), FenceError> {
    let links = has_links();
    for index in attached(dir)? {
        if !links && let Ok(name) = if_indextoname(index) {
            let name = name.to_string_lossy();
            for (_, direction, _) in PROGRAMS {
                let fail =
                    |error: &(dyn std::error::Error + 'static)| kernel(&format!("taken off {name}"), error);
                let old = SchedClassifierLink::attached(&name, direction, PRIORITY, HANDLE, None)
                    .map_err(|error| fail(&error))?;
                // It may be gone already, with the qdisc.
                if let Err(error) = old.detach() {
                    tracing::debug!(%error, %name, "the filter was not there");
                }
            }
        }
        forget(dir, index)?;
    }
    Ok(())
}

/// TCX links are there since Linux 6.6.
fn has_links() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

pub(super) fn remove(pin: &Path) -> Result<(), FenceError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FenceError::Dir { path: pin.to_owned(), error })
        }
        _ => Ok(()),
    }
}

/// By a TCX link, whose pin keeps it: the first in its chain.
fn link(
    program: &mut SchedClassifier,
    name: &str,
    direction: TcAttachType,
    pin: &Path,
) -> Result<(), FenceError> {
    let fail = |error: &(dyn std::error::Error + 'static)| kernel(&format!("attached to {name}"), error);
    if let Ok(old) = PinnedLink::from_pin(pin) {
        let old: SchedClassifierLink = FdLink::from(old).try_into().map_err(|error| fail(&error))?;
        // The old program runs until the new one is in its place.
        match program.attach_to_link(old) {
            Ok(id) => return program.take_link(id).map(drop).map_err(|error| fail(&error)),
            // Most likely the interface that it was on is gone, and this one has its number. Should there be another
            // reason, the old link goes only when the new one is in place: an interface is never bare.
            Err(error) => tracing::debug!(%error, interface = name, "the link is made anew"),
        }
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(name, direction, options).map_err(|error| fail(&error))?;
    let link = program.take_link(id).map_err(|error| fail(&error))?;
    let link: FdLink = link.try_into().map_err(|error| fail(&error))?;
    let at = |error| FenceError::Dir { path: pin.to_owned(), error };
    let fresh = fresh(pin);
    remove(&fresh)?;
    let _pinned = link.pin(&fresh).map_err(|error| fail(&error))?;
    fs::rename(&fresh, pin).map_err(at)
}

/// What a link is pinned as until it has the name of the one before it.
fn fresh(pin: &Path) -> PathBuf {
    let mut name = OsString::from(FRESH);
    name.push(pin.file_name().unwrap_or_default());
    pin.with_file_name(name)
}

/// By a filter of the clsact queueing discipline, which lives with the interface. Its program's pin only says that it
/// is there.
fn filter(
    program: &mut SchedClassifier,
    name: &str,
    direction: TcAttachType,
    pin: &Path,
) -> Result<(), FenceError> {
    let fail = |error: &(dyn std::error::Error + 'static)| kernel(&format!("attached to {name}"), error);
    match qdisc_add_clsact(name) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        // EEXIST: it is there already, which each kernel says in its own words. What is wrong besides, attaching says.
        Err(error) => tracing::debug!(%error, interface = name, "clsact"),
    }
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    let id = match program.attach_with_options(name, direction, TcAttachOptions::Netlink(options)) {
        Ok(id) => id,
        Err(_) => {
            let old = SchedClassifierLink::attached(name, direction, PRIORITY, HANDLE, None)
                .map_err(|error| fail(&error))?;
            program.attach_to_link(old).map_err(|error| fail(&error))?
        }
    };
    let link = program.take_link(id).map_err(|error| fail(&error))?;
    // Dropped, it would take the filter away.
    std::mem::forget(link);
    remove(pin)?;
    program.pin(pin).map_err(|error| fail(&error))
}
