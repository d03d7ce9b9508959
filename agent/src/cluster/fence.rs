//! The fence: what keeps a node without a lease from answering, whatever its user space does.
//!
//! # Why it is in the kernel
//!
//! A lease has an end, and at that end the node must fall silent: another may serve from then on. ftd cannot see to
//! that itself. It may be stopped, killed, hung, starved or swapped out just then; and the services that answer under
//! the address are other processes, which know nothing of leases. The kernel sees every packet, and has a clock. So
//! two small BPF programs on the interface, one for each direction, look each packet of a service address up in a
//! map, and drop it unless the lease there ends later than `CLOCK_BOOTTIME` is now. ftd only ever moves that end.
//! Nothing has to happen for an address to fall silent.
//!
//! # What it promises
//!
//! From the moment in the map on, no packet from the address, no ARP packet and no neighbour advertisement that
//! names it as being here, leaves by the interface; none to it, and no question for it, comes in. Between the look at
//! the clock and the wire there are microseconds (2.3 at most were measured); the margin of the
//! [lease](super::lease) is a thousand times that.
//!
//! # The order of things
//!
//! 1. [`Fence::admit`] puts the address into the map, closed, and the programs onto the interface. Only then may the
//!    address be configured there. An address that is not in the map is nobody's business, and passes.
//! 2. [`Fence::renew`] moves the end. The moment is that at which the renewal was **sent**, plus the length; never
//!    "now" plus something, for an answer may have been long on its way, or ftd stopped after it read it.
//! 3. [`Fence::close`] ends it at once.
//! 4. [`Fence::forget`] takes the address out, and refuses while it is on any interface of this host.
//!
//! # Where it lives
//!
//! Programs, links and maps are pinned in a directory of a BPF file system, and live as long as their names there,
//! whoever runs. A restarted ftd takes them up: it finds the maps by name, and puts its own programs in
//! the place of those that run, in one step (`BPF_LINK_UPDATE`; before Linux 6.6, where there are no such links, a filter
//! of fixed handle and priority is replaced). No packet passes in between that should not, and none is lost. Links of
//! an interface that is gone are dead; if it comes back, it gets new ones.
//!
//! # What it does not cover
//!
//! Packets that bypass the traffic control layer (`AF_XDP`, `PACKET_QDISC_BYPASS`), other interfaces and tunnels, local
//! clients on the fenced host, and a virtual machine that is suspended and resumed while its boot clock stands still:
//! see cluster.md.
#![allow(unsafe_code, reason = "aya::Pod is an unsafe trait")]

mod attach;
pub mod cost;
mod frames;
#[cfg(test)]
mod tests;
pub mod trial;

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use agent_ebpf::fence::{Counts, Lease4, Lease6, SLOTS};
use aya::{
    EbpfLoader, Pod,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use nix::{ifaddrs::getifaddrs, sys::statfs};

use super::vip::Interface;
use crate::probe::BootNs;

/// agent-ebpf's second program file, as agent/build.rs built it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/fence"));

/// Where the package mounts a BPF file system for it.
pub const DEFAULT_DIR: &str = "/run/ftd.bpf";

/// The form of what is pinned; another form has another directory, so that programs never meet maps of another.
const FORM: &str = "fence-1";

const MAPS: [&str; 3] = ["LEASES4", "LEASES6", "COUNTS"];

// bpf(2): BPF_NOEXIST, BPF_EXIST.
const NEW_ONLY: u64 = 1;
const THERE_ONLY: u64 = 2;

/// Plain memory for aya, which the orphan rule keeps from the shared types themselves.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T: Copy>(T);

// SAFETY: all three are repr(C) structures of integers without padding.
unsafe impl Pod for Plain<Lease4> {}
// SAFETY: as above.
unsafe impl Pod for Plain<Lease6> {}
// SAFETY: as above.
unsafe impl Pod for Plain<Counts> {}

/// Why an address cannot be fenced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FenceError {
    /// There is no BPF file system.
    #[error(
        "the fence has no place: {dir} is no BPF file system. Start its mount (systemctl start run-ftd.bpf.mount), or \
         mount one there: mount -t bpf -o mode=0700 bpf {dir}", dir = dir.display()
    )]
    NoBpffs {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// It cannot be written to.
    #[error(
        "the fence's directory {path} cannot be used: {error}. It needs ReadWritePaths= in ftd.service, and root",
        path = path.display()
    )]
    Dir {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The kernel refuses a program or a map.
    #[error(
        "the fence cannot be {deed}: {cause}. It needs Linux 5.10 or newer with CONFIG_NET_CLS_ACT (before 6.6 also \
         the modules sch_ingress and cls_bpf), CAP_BPF and CAP_NET_ADMIN"
    )]
    Kernel {
        /// What was tried.
        deed: String,
        /// The kernel's words.
        cause: String,
    },
    /// All slots are taken.
    #[error(
        "{ip} cannot be fenced: {SLOTS} addresses are already. Put workloads together under fewer addresses"
    )]
    Full {
        /// The address.
        ip: IpAddr,
    },
    /// It was not admitted.
    #[error("{ip} is not fenced, so no lease can be written for it. Admit it first, before it is configured")]
    Unknown {
        /// The address.
        ip: IpAddr,
    },
    /// Whether it is still configured cannot be told.
    #[error(
        "{ip} stays fenced: this host's addresses cannot be read: {error}. ftd needs AF_NETLINK (see security.md); try again"
    )]
    Interfaces {
        /// The address.
        ip: IpAddr,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// It is still configured.
    #[error(
        "{ip} stays fenced: it is on {interface} of this host. Take it off first (ip addr del {ip} dev {interface})"
    )]
    Configured {
        /// The address.
        ip: IpAddr,
        /// The interface.
        interface: String,
    },
}

/// What passed and what did not, of one address since it was admitted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Packets to it, with a lease.
    pub passed_in: u64,
    /// Packets from it, with a lease.
    pub passed_out: u64,
    /// Packets to it and questions for it, without one.
    pub dropped_in: u64,
    /// Packets from it and announcements of it, without one.
    pub dropped_out: u64,
    /// Others said that they have it, while the lease was here.
    pub conflicts: u64,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// The address.
    pub address: IpAddr,
    /// The end of its lease; 0 when it was closed.
    pub until: BootNs,
    /// Its packets.
    pub counters: Counters,
}

struct Maps {
    four: HashMap<MapData, u32, Plain<Lease4>>,
    six: HashMap<MapData, [u32; 4], Plain<Lease6>>,
    counts: PerCpuArray<MapData, Plain<Counts>>,
}

/// The fence of this host.
pub struct Fence {
    dir: PathBuf,
    maps: Maps,
    programs: attach::Programs,
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Fence {
    /// Takes up what is pinned in `dir`, a directory of a BPF file system, and puts programs of this ftd in the place
    /// of those on interfaces; or begins anew. Leases stay as they are.
    pub fn open(dir: &Path) -> Result<Self, FenceError> {
        let home = home_of(dir)?;
        let at = |error| FenceError::Dir { path: home.clone(), error };
        fs::create_dir_all(&home).map_err(at)?;
        // Who can write to the pins can prolong a lease.
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).map_err(at)?;
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            loader.map_pin_path(name, home.join(name));
        }
        let ebpf = loader.load(OBJECT).map_err(|error| kernel("loaded", &error))?;
        let mut fence =
            Self { maps: Maps::pinned(&home)?, programs: attach::Programs::load(ebpf)?, dir: home };
        fence.programs.renew_all(&fence.dir)?;
        Ok(fence)
    }

    /// Has the address fenced on this interface from now on, closed if it was not before. It may be configured
    /// only after that.
    pub fn admit(&mut self, ip: IpAddr, interface: &Interface) -> Result<(), FenceError> {
        self.maps.admit(ip)?;
        self.programs.attach(&self.dir, interface)
    }

    /// Has its packets pass until that moment: the sending of the renewal that was answered, plus the lease's length.
    pub fn renew(&mut self, ip: IpAddr, until: BootNs) -> Result<(), FenceError> {
        self.maps.set(ip, until.0)
    }

    /// No packet of it passes from now on.
    pub fn close(&mut self, ip: IpAddr) -> Result<(), FenceError> {
        self.maps.set(ip, 0)
    }

    /// It is no service address of this host any more; refused while it is configured, for it would pass.
    pub fn forget(&mut self, ip: IpAddr) -> Result<(), FenceError> {
        if let Some(interface) = configured_on(ip)? {
            return Err(FenceError::Configured { ip, interface });
        }
        self.maps.remove(ip)
    }

    /// Takes the fence away, wherever it is: nothing of it is left. Refused while a fenced address is on this host.
    pub fn remove(dir: &Path) -> Result<(), FenceError> {
        let home = home_of(dir)?;
        if !home.exists() {
            return Ok(());
        }
        for one in look(dir)?.unwrap_or_default() {
            if let Some(interface) = configured_on(one.address)? {
                return Err(FenceError::Configured { ip: one.address, interface });
            }
        }
        attach::detach_all(&home)?;
        for name in MAPS {
            attach::remove(&home.join(name))?;
        }
        fs::remove_dir(&home).map_err(|error| FenceError::Dir { path: home, error })
    }

    /// What passed of it, and what did not.
    pub fn counters(&self, ip: IpAddr) -> Result<Counters, FenceError> {
        let (_, slot) = self.maps.entry(ip)?.ok_or(FenceError::Unknown { ip })?;
        self.maps.counters(slot)
    }

    /// All addresses, for people.
    pub fn status(&self) -> Result<Vec<Status>, FenceError> {
        self.maps.status()
    }
}

/// The addresses of a fence that another process has, or that nobody has any more; `None` when there is none.
pub fn look(dir: &Path) -> Result<Option<Vec<Status>>, FenceError> {
    let home = home_of(dir)?;
    if !home.join(MAPS[0]).exists() {
        return Ok(None);
    }
    Maps::pinned(&home)?.status().map(Some)
}

fn home_of(dir: &Path) -> Result<PathBuf, FenceError> {
    match statfs::statfs(dir) {
        Ok(system) if system.filesystem_type() == statfs::BPF_FS_MAGIC => Ok(dir.join(FORM)),
        _ => Err(FenceError::NoBpffs { dir: dir.to_owned() }),
    }
}

/// The interface of this host that has it. Where that cannot be told, the fence must stay.
fn configured_on(ip: IpAddr) -> Result<Option<String>, FenceError> {
    let has = |it: &nix::ifaddrs::InterfaceAddress| {
        let Some(address) = &it.address else { return false };
        address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip())) == Some(ip)
            || address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())) == Some(ip)
    };
    let mut all = getifaddrs().map_err(|errno| FenceError::Interfaces { ip, error: errno.into() })?;
    Ok(all.find(has).map(|it| it.interface_name))
}

fn kernel(deed: &str, error: &(dyn std::error::Error + 'static)) -> FenceError {
    let mut cause = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if !cause.ends_with(&text) {
            cause = format!("{cause}: {text}");
        }
        next = error.source();
    }
    FenceError::Kernel { deed: deed.to_owned(), cause }
}

impl Maps {
    fn pinned(home: &Path) -> Result<Self, FenceError> {
        let open = |name: &str| {
            let fail = |error: MapError| kernel("read", &error);
            MapData::from_pin(home.join(name)).map_err(fail).map(|data| (data, fail))
        };
        let ((four, fail), (six, _), (counts, _)) = (open(MAPS[0])?, open(MAPS[1])?, open(MAPS[2])?);
        Ok(Self {
            four: Map::HashMap(four).try_into().map_err(fail)?,
            six: Map::HashMap(six).try_into().map_err(fail)?,
            counts: Map::PerCpuArray(counts).try_into().map_err(fail)?,
        })
    }

    /// End and slot of an address.
    fn entry(&self, ip: IpAddr) -> Result<Option<(u64, u32)>, FenceError> {
        let found = match ip {
            IpAddr::V4(_) => self.four.get(&key4(ip), 0).map(|Plain(lease)| (lease.until, lease.slot)),
            IpAddr::V6(_) => self.six.get(&key6(ip), 0).map(|Plain(lease)| (lease.until, lease.slot)),
        };
        match found {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(kernel("read", &error)),
        }
    }

    fn write(&mut self, ip: IpAddr, until: u64, slot: u32, flags: u64) -> Result<(), MapError> {
        match ip {
            IpAddr::V4(_) => {
                let address = key4(ip);
                self.four.insert(address, Plain(Lease4 { until, address, slot }), flags)
            }
            IpAddr::V6(_) => {
                let address = key6(ip);
                self.six.insert(address, Plain(Lease6 { until, address, slot, reserved: 0 }), flags)
            }
        }
    }

    fn admit(&mut self, ip: IpAddr) -> Result<(), FenceError> {
        if self.entry(ip)?.is_some() {
            return Ok(());
        }
        let taken: BTreeSet<u32> = self.entries()?.into_iter().map(|(_, _, slot)| slot).collect();
        let slot = (0..SLOTS).find(|slot| !taken.contains(slot)).ok_or(FenceError::Full { ip })?;
        let processors = nr_cpus().map_err(|(_, error)| kernel("loaded", &error))?;
        let none = PerCpuValues::try_from(vec![Plain(Counts::default()); processors])
            .map_err(|error| kernel("loaded", &error))?;
        self.counts.set(slot, none, 0).map_err(|error| kernel("loaded", &error))?;
        self.write(ip, 0, slot, NEW_ONLY).map_err(|error| kernel("closed", &error))
    }

    fn set(&mut self, ip: IpAddr, until: u64) -> Result<(), FenceError> {
        let (_, slot) = self.entry(ip)?.ok_or(FenceError::Unknown { ip })?;
        self.write(ip, until, slot, THERE_ONLY).map_err(|error| kernel("moved", &error))
    }

    fn remove(&mut self, ip: IpAddr) -> Result<(), FenceError> {
        let removed = match ip {
            IpAddr::V4(_) => self.four.remove(&key4(ip)),
            IpAddr::V6(_) => self.six.remove(&key6(ip)),
        };
        match removed {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(kernel("taken away", &error)),
        }
    }

    /// Address, end and slot of all.
    fn entries(&self) -> Result<Vec<(IpAddr, u64, u32)>, FenceError> {
        let four = self.four.iter().map(|entry| {
            entry
                .map(|(address, Plain(lease))| (IpAddr::from(address.to_ne_bytes()), lease.until, lease.slot))
        });
        let six = self
            .six
            .iter()
            .map(|entry| entry.map(|(address, Plain(lease))| (ip6(address), lease.until, lease.slot)));
        let all: Result<Vec<_>, MapError> = four.chain(six).collect();
        let mut all = all.map_err(|error| kernel("read", &error))?;
        all.sort_unstable();
        Ok(all)
    }

    fn counters(&self, slot: u32) -> Result<Counters, FenceError> {
        let all = self.counts.get(&slot, 0).map_err(|error| kernel("read", &error))?;
        Ok(all.iter().fold(Counters::default(), |sum, Plain(more)| Counters {
            passed_in: sum.passed_in + more.passed_in,
            passed_out: sum.passed_out + more.passed_out,
            dropped_in: sum.dropped_in + more.dropped_in,
            dropped_out: sum.dropped_out + more.dropped_out,
            conflicts: sum.conflicts + more.conflicts,
        }))
    }

    fn status(&self) -> Result<Vec<Status>, FenceError> {
        let one = |(address, until, slot)| {
            Ok(Status { address, until: BootNs(until), counters: self.counters(slot)? })
        };
        self.entries()?.into_iter().map(one).collect()
    }
}

/// An address as it lies in packets; 0 for one of the other family, which is nobody's.
fn key4(ip: IpAddr) -> u32 {
    match ip {
        IpAddr::V4(ip) => u32::from_ne_bytes(ip.octets()),
        IpAddr::V6(_) => 0,
    }
}

fn key6(ip: IpAddr) -> [u32; 4] {
    let bytes = match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(_) => [0; 16],
    };
    std::array::from_fn(|word| u32::from_ne_bytes(std::array::from_fn(|byte| bytes[word * 4 + byte])))
}

fn ip6(address: [u32; 4]) -> IpAddr {
    let mut bytes = [0; 16];
    for (four, word) in bytes.chunks_exact_mut(4).zip(address) {
        four.copy_from_slice(&word.to_ne_bytes());
    }
    IpAddr::from(bytes)
}
