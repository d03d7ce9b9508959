//! Tries the fence for real, on the loopback interface of a network namespace of its own.
//!
//! Part of `ftd probe-test`, which is also run alone with other kernels: older ones have no TCX links.

use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};
use rtnetlink::LinkUnspec;

use super::Fence;
use crate::{
    cluster::vip::{Interface, Mac},
    probe::BootNs,
};

/// How long a packet may take that must arrive: an emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long is waited for what must not come.
const SILENCE: Duration = Duration::from_millis(300);
/// The loopback interface is the first of every network namespace.
const LOOPBACK: u32 = 1;

/// Runs it, with lines of output: `ok fence-NAME` or `FAIL fence-NAME: why`. Answers whether all held; fails only when
/// `out` cannot be written to. Needs root.
pub fn run(out: &mut impl Write) -> io::Result<bool> {
    let dir = Path::new("/run").join(format!("ftd-trial-fence-{}", std::process::id()));
    let place = dir.clone();
    // Namespaces of a thread go with it.
    let results = thread::spawn(move || results(&place))
        .join()
        .unwrap_or_else(|_| vec![("start", Err("it panicked".into()))]);
    let _ = fs::remove_dir(&dir);
    for (name, result) in &results {
        match result {
            Ok(()) => writeln!(out, "ok fence-{name}")?,
            Err(why) => writeln!(out, "FAIL fence-{name}: {why}")?,
        }
    }
    Ok(results.iter().all(|(_, result)| result.is_ok()))
}

type Outcome = (&'static str, Result<(), String>);

fn results(dir: &Path) -> Vec<Outcome> {
    let mut all = Vec::new();
    if let Err(why) = prepare(dir) {
        return vec![("start", Err(why))];
    }
    for (name, ip, other) in [
        ("ipv4", IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9)), IpAddr::V4(Ipv4Addr::LOCALHOST)),
        // Nobody has another address of IPv6 here, so both ends have this one.
        ("ipv6", IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ] {
        all.push((name, passes_and_drops(dir, ip, other)));
    }
    all.push(("stays-with-its-address", stays(dir)));
    let _ = umount2(dir, MntFlags::MNT_DETACH);
    all
}

fn prepare(dir: &Path) -> Result<(), String> {
    let text = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).map_err(|it| text("namespaces", &it))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(|it| text("mounts", &it))?;
    fs::create_dir_all(dir).map_err(|it| text("the directory", &it))?;
    mount(Some("bpf"), dir, Some("bpf"), MsFlags::empty(), none).map_err(|it| text("bpffs", &it))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|it| text("the runtime", &it))?.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|it| text("netlink", &it))?;
        let connection = tokio::spawn(connection);
        let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
        let done = handle.link().set(up).execute().await.map_err(|it| text("loopback", &it));
        connection.abort();
        done
    })
}

fn passes_and_drops(dir: &Path, ip: IpAddr, other: IpAddr) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let service = UdpSocket::bind(SocketAddr::new(ip, 0)).map_err(|it| text(&it))?;
    let client = UdpSocket::bind(SocketAddr::new(other, 0)).map_err(|it| text(&it))?;
    let expect = |state: &str, open: bool| {
        for (from, to, way) in [(&client, &service, "to"), (&service, &client, "from")] {
            let arrived = arrives(from, to, open)?;
            if arrived != open {
                return Err(format!(
                    "{state}: a packet {way} {ip} {}",
                    if arrived { "passed" } else { "was dropped" }
                ));
            }
        }
        Ok(())
    };
    let lo = Interface { index: LOOPBACK, name: "lo".into(), mac: Mac([0; 6]) };
    let open = || Fence::open(dir).map_err(|it| text(&it));
    let mut fence = open()?;
    expect("not admitted", true)?;
    fence.admit(ip, &lo).map_err(|it| text(&it))?;
    expect("admitted", false)?;
    fence.renew(ip, BootNs(u64::MAX)).map_err(|it| text(&it))?;
    expect("with a lease", true)?;
    drop(fence);
    expect("with a lease, and nobody there", true)?;
    let mut fence = open()?;
    expect("taken up", true)?;
    fence.close(ip).map_err(|it| text(&it))?;
    expect("closed", false)?;
    let until = now()?.after(SILENCE);
    fence.renew(ip, until).map_err(|it| text(&it))?;
    drop(fence);
    while now()? < until {
        thread::sleep(until.since(now()?));
    }
    expect("after the lease's end, and nobody there", false)?;
    let counters = open()?.counters(ip).map_err(|it| text(&it))?;
    if counters.passed_in == 0 || counters.passed_out == 0 || counters.dropped_out == 0 {
        return Err(format!("it counted {counters:?}"));
    }
    Ok(())
}

/// The loopback addresses of above are still there, so it cannot be taken away.
fn stays(dir: &Path) -> Result<(), String> {
    match Fence::remove(dir) {
        Err(super::FenceError::Configured { .. }) => Ok(()),
        Err(error) => Err(error.to_string()),
        Ok(()) => Err("it went while the host has a fenced address".into()),
    }
}

fn now() -> Result<BootNs, String> {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|errno| errno.to_string())?;
    Ok(BootNs::default().after(Duration::from(time)))
}

/// Whether a packet that is sent now arrives. What the fence drops may be told to the sender.
fn arrives(from: &UdpSocket, to: &UdpSocket, expected: bool) -> Result<bool, String> {
    let text = |error: io::Error| error.to_string();
    to.set_read_timeout(Some(if expected { PATIENCE } else { SILENCE })).map_err(text)?;
    let _ = from.send_to(b"x", to.local_addr().map_err(text)?);
    match to.recv(&mut [0; 8]) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Ok(false)
        }
        Err(error) => Err(text(error)),
    }
}
