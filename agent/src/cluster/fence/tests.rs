//! The fence with the real kernel: single frames by BPF_PROG_TEST_RUN, and two hosts joined by a cable.

use std::{
    net::{SocketAddr, UdpSocket},
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use aya::{
    TestRunOptions,
    programs::{SchedClassifier, TestRun as _},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};

use super::{
    frames::{arp, ethernet, neighbour, packet, tagged},
    *,
};
use crate::{
    cluster::vip::{
        Announced,
        tests::{Host, on_a_thread_of_its_own, two_hosts},
    },
    config::address::Address,
};

const FAR: u64 = u64::MAX;
const PATIENCE: Duration = Duration::from_millis(150);

/// A BPF file system of this thread's own, which goes with it.
fn bpffs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
    dir
}

/// Where the pins are. Some kernels have files of their own beside it.
fn fence_home(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join(FORM)
}

fn now() -> BootNs {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap();
    BootNs(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn run(fence: &mut Fence, program: &str, frame: &[u8]) -> i32 {
    let program: &mut SchedClassifier = fence.programs.ebpf.program_mut(program).unwrap().try_into().unwrap();
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    program.test_run(options).unwrap().return_value.cast_signed()
}

/// Each kind of frame, in each direction, without a lease, with one, and with no entry: dropped are those, and only
/// those, that say or make the host say that the address is here; and no verdict is ever "accept".
#[test]
fn each_kind_of_packet_is_judged() {
    on_a_thread_of_its_own(|| async {
        let dir = bpffs();
        let mut fence = Fence::open(dir.path()).unwrap();
        let (vip, me, peer) = (ip("10.77.0.100"), ip("10.77.0.1"), ip("10.77.0.2"));
        let (vip6, me6, peer6) = (ip("fd00:77::100"), ip("fd00:77::1"), ip("fd00:77::2"));
        let (zero, zero6, all6) = (ip("0.0.0.0"), ip("::"), ip("ff02::1"));
        let vlan = &[0x81, 0, 0, 5];
        let double = &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6];
        // what, frame, dropped coming in, dropped going out
        let cases = [
            ("packet to it", packet(peer, vip), true, false),
            ("packet from it", packet(vip, peer), false, true),
            ("other packet", packet(peer, me), false, false),
            ("tagged, to it", tagged(vlan, packet(peer, vip)), true, false),
            ("tagged twice, from it", tagged(double, packet(vip, peer)), false, true),
            ("question for it", arp(1, peer, vip), true, false),
            ("answer of it", arp(2, vip, peer), false, true),
            ("announcement of it", arp(1, vip, vip), false, true),
            ("probe for it", arp(1, zero, vip), true, false),
            ("other question", arp(1, peer, me), false, false),
            ("IPv6 to it", packet(peer6, vip6), true, false),
            ("IPv6 from it", packet(vip6, peer6), false, true),
            ("other IPv6", packet(peer6, me6), false, false),
            ("tagged, IPv6 from it", tagged(vlan, packet(vip6, peer6)), false, true),
            ("solicitation for it", neighbour(135, peer6, ip("ff02::1:ff00:100"), vip6), true, false),
            ("IPv6 probe for it", neighbour(135, zero6, ip("ff02::1:ff00:100"), vip6), true, false),
            ("advertisement of it", neighbour(136, vip6, all6, vip6), false, true),
            ("advertisement of it, from another address", neighbour(136, me6, all6, vip6), false, true),
            ("other solicitation", neighbour(135, peer6, all6, me6), false, false),
            ("tagged twice, solicitation", tagged(double, neighbour(135, peer6, all6, vip6)), true, false),
            ("a large one from it", tagged(&packet(vip, peer), vec![0; 3000]), false, true),
            ("neither", tagged(&[0x88, 0xcc], vec![0; 60]), false, false),
        ];
        for (state, until) in [("closed", Some(0)), ("valid", Some(FAR)), ("over", Some(1)), ("absent", None)]
        {
            for ip in [vip, vip6] {
                match until {
                    Some(until) => {
                        fence.maps.admit(ip).unwrap();
                        fence.renew(ip, BootNs(until)).unwrap();
                    }
                    None => fence.forget(ip).unwrap(),
                }
            }
            let shut = matches!(state, "closed" | "over");
            for (what, rest, inward, outward) in &cases {
                let frame = ethernet(rest);
                for (program, dropped) in [("fence_in", *inward), ("fence_out", *outward)] {
                    let want = if dropped && shut { 2 } else { -1 };
                    assert_eq!(run(&mut fence, program, &frame), want, "{what}, {program}, lease {state}");
                }
            }
        }
    });
}

/// Counted are the packets of each address apart, and claims of others only while the lease is here.
#[test]
fn packets_are_counted_by_address() {
    on_a_thread_of_its_own(|| async {
        let dir = bpffs();
        let mut fence = Fence::open(dir.path()).unwrap();
        let (vip, other, peer) = (ip("10.77.0.100"), ip("fd00:77::100"), ip("10.77.0.2"));
        fence.maps.admit(vip).unwrap();
        fence.maps.admit(other).unwrap();
        let (inward, outward) = (ethernet(&packet(peer, vip)), ethernet(&packet(vip, peer)));
        let claim = ethernet(&arp(2, vip, peer));
        let all = |fence: &mut Fence| {
            run(fence, "fence_in", &inward);
            run(fence, "fence_in", &inward);
            run(fence, "fence_out", &outward);
            run(fence, "fence_in", &claim);
        };
        all(&mut fence);
        fence.renew(vip, BootNs(FAR)).unwrap();
        all(&mut fence);
        let want = Counters { passed_in: 2, passed_out: 1, dropped_in: 2, dropped_out: 1, conflicts: 1 };
        assert_eq!(fence.counters(vip).unwrap(), want);
        assert_eq!(fence.counters(other).unwrap(), Counters::default());
        // Another address in the place of a forgotten one begins at nothing.
        fence.forget(vip).unwrap();
        assert!(matches!(fence.counters(vip), Err(FenceError::Unknown { .. })));
        assert!(matches!(fence.renew(vip, BootNs(FAR)), Err(FenceError::Unknown { .. })));
        fence.maps.admit(peer).unwrap();
        assert_eq!(fence.counters(peer).unwrap(), Counters::default());
        let all = look(dir.path()).unwrap().unwrap();
        assert_eq!(all.iter().map(|one| one.address).collect::<Vec<_>>(), [peer, other]);
    });
}

/// There is room for so many, then it is said; and the directory is root's alone.
#[test]
fn no_more_addresses_than_there_is_room_for() {
    on_a_thread_of_its_own(|| async {
        let dir = bpffs();
        assert_eq!(look(dir.path()).unwrap(), None);
        let mut fence = Fence::open(dir.path()).unwrap();
        for last in 0..SLOTS {
            fence.maps.admit(IpAddr::V4((0x0a00_0000 + last).into())).unwrap();
        }
        assert!(matches!(fence.maps.admit(ip("fd00::1")), Err(FenceError::Full { .. })));
        fence.forget(ip("10.0.0.7")).unwrap();
        fence.maps.admit(ip("fd00::1")).unwrap();
        assert_eq!(fs::metadata(&fence.dir).unwrap().mode() & 0o777, 0o700);
        let plain = tempfile::tempdir().unwrap();
        let error = Fence::open(plain.path()).unwrap_err().to_string();
        assert!(error.contains("is no BPF file system") && error.contains("mount -t bpf"), "{error}");
    });
}

fn socket(host: &Host, at: IpAddr) -> UdpSocket {
    host.enter();
    let socket = UdpSocket::bind(SocketAddr::new(at, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends a packet that says when it was sent. What the fence drops may be told to the sender.
fn send(from: &UdpSocket, to: &UdpSocket) -> BootNs {
    let at = now();
    let _ = from.send_to(&at.0.to_ne_bytes(), to.local_addr().unwrap());
    at
}

/// When the next packet was sent; `None` if none comes.
fn receive(to: &UdpSocket) -> Option<BootNs> {
    let mut at = [0; 8];
    to.recv(&mut at).ok()?;
    Some(BootNs(u64::from_ne_bytes(at)))
}

/// Whether a packet that is sent now arrives; others may have waited for an address to be found, and do not count.
fn arrives(from: &UdpSocket, to: &UdpSocket) -> bool {
    let at = send(from, to);
    std::iter::from_fn(|| receive(to)).any(|it| it == at)
}

/// A host that did not find an address asks again each second.
fn arrives_soon(from: &UdpSocket, to: &UdpSocket) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    std::iter::from_fn(|| (Instant::now() < end).then(|| arrives(from, to))).any(|it| it)
}

/// Through the real stack, both families: closed from the start, open with the lease, shut at its very end with nobody
/// there to shut it, and taken up by another fence without a packet lost.
#[test]
fn an_address_answers_only_with_a_lease() {
    on_a_thread_of_its_own(|| async {
        let (ours, theirs) = two_hosts().await;
        let dir = bpffs();
        for (text, peer) in [("10.77.0.100/24", "10.77.0.2"), ("fd00:77::100/64", "fd00:77::2")] {
            let address = Address::parse(text).unwrap();
            let here = ours.network.carrier(&address).await.unwrap();
            ours.enter();
            let mut fence = Fence::open(dir.path()).unwrap();
            fence.admit(address.ip, &here).unwrap();
            ours.network.add(&address, &here).await.unwrap();
            let error = fence.forget(address.ip).unwrap_err().to_string();
            assert!(error.contains("on eth0 of this host"), "{error}");
            let (service, client) = (socket(&ours, address.ip), socket(&theirs, ip(peer)));
            assert!(!arrives(&client, &service), "{text}: nothing gets in without a lease");
            assert!(!arrives(&service, &client), "{text}: nothing gets out");
            fence.renew(address.ip, BootNs(FAR)).unwrap();
            let both = arrives_soon(&client, &service) && arrives_soon(&service, &client);
            assert!(both, "{text}: all passes with it");
            fence.close(address.ip).unwrap();
            assert!(!arrives(&client, &service) && !arrives(&service, &client), "{text}: closed");

            // ftd goes, and comes again: not one of the packets in between is lost, and the lease is as it was.
            fence.renew(address.ip, BootNs(FAR)).unwrap();
            drop(fence);
            assert!(arrives(&client, &service) && arrives(&service, &client), "{text}: ftd is gone");
            for _ in 0..20 {
                ours.enter();
                fence = Fence::open(dir.path()).unwrap();
                assert!(arrives(&client, &service) && arrives(&service, &client), "{text}: taken up");
                fence.admit(address.ip, &here).unwrap();
                assert!(arrives(&client, &service) && arrives(&service, &client), "{text}: admitted again");
                drop(fence);
            }

            // The lease ends, and nobody is there: what was sent after its end never arrives.
            ours.enter();
            fence = Fence::open(dir.path()).unwrap();
            let until = now().after(Duration::from_millis(200));
            fence.renew(address.ip, until).unwrap();
            drop(fence);
            client.set_nonblocking(true).unwrap();
            let (mut last, end) = (BootNs(0), Instant::now() + Duration::from_millis(500));
            while Instant::now() < end {
                send(&service, &client);
                last = receive(&client).unwrap_or(last);
            }
            assert!(last < until, "{text}: {last:?} is after {until:?}");
            assert!(
                until.since(last) < Duration::from_millis(50),
                "{text}: it was open to the end, but for {last:?}"
            );
            client.set_nonblocking(false).unwrap();
            assert!(!arrives(&client, &service), "{text}: and stays shut");

            // The other host has it now: the fenced one reaches it as a client.
            ours.network.delete(address.ip).await.unwrap();
            let there = theirs.network.carrier(&address).await.unwrap();
            theirs.network.add(&address, &there).await.unwrap();
            let own = if address.ip.is_ipv4() { ip("10.77.0.1") } else { ip("fd00:77::1") };
            let (client, service) = (socket(&ours, own), socket(&theirs, address.ip));
            let both = arrives_soon(&client, &service) && arrives_soon(&service, &client);
            assert!(both, "{text}: a client like others");
            ours.enter();
            assert_eq!(
                here.probe(address.ip, PATIENCE).await.unwrap(),
                Some(there.mac),
                "{text}: it can look"
            );
            theirs.network.delete(address.ip).await.unwrap();
            // Nothing is left of it, once the address is not.
            drop(Fence::open(dir.path()).unwrap());
            ours.network.add(&address, &here).await.unwrap();
            assert!(matches!(Fence::remove(dir.path()), Err(FenceError::Configured { .. })), "{text}");
            assert!(look(dir.path()).unwrap().is_some(), "{text}");
            ours.network.delete(address.ip).await.unwrap();
            Fence::remove(dir.path()).unwrap();
            Fence::remove(dir.path()).expect("twice does no harm");
            assert!(!fence_home(&dir).exists(), "{text}: no pin is left");
            ours.network.add(&address, &here).await.unwrap();
            let (client, service) = (socket(&theirs, ip(peer)), socket(&ours, address.ip));
            let both = arrives_soon(&client, &service) && arrives_soon(&service, &client);
            assert!(both, "{text}: no program is left on the interface");
            ours.network.delete(address.ip).await.unwrap();
        }
    });
}

/// An interface that went and came again under its old number: the dead links make room for new ones, under the same
/// names, and the address is fenced there.
#[test]
fn an_interface_that_came_again_is_fenced_anew() {
    on_a_thread_of_its_own(|| async {
        let (ours, _theirs) = two_hosts().await;
        let dir = bpffs();
        let address = Address::parse("10.80.0.100/24").unwrap();
        ours.enter();
        let mut fence = Fence::open(dir.path()).unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            ours.pair("eth1", "far1", 71).await;
            ours.up("eth1", &["10.80.0.1/24"]).await;
            ours.up("far1", &[]).await;
            let here = ours.network.carrier(&address).await.unwrap();
            assert_eq!(here.index, 71);
            fence.admit(address.ip, &here).unwrap();
            let before = fence.counters(address.ip).unwrap().dropped_out;
            assert_eq!(here.announce(address.ip).await.unwrap(), Announced::Dropped);
            assert!(fence.counters(address.ip).unwrap().dropped_out > before);
            let mut names: Vec<_> =
                fs::read_dir(fence_home(&dir)).unwrap().map(|it| it.unwrap().file_name()).collect();
            names.sort();
            seen.push(names);
            ours.away(71).await;
        }
        assert!(seen.iter().all(|names| *names == seen[0]), "{seen:?}");
    });
}
