//! Two hosts on one cable: network namespaces of their own, joined by a veth pair, with the real kernel on both sides.
//!
//! A thread is on one host at a time; sockets stay on the host on which they were opened.

use std::{
    cell::Cell,
    fs::File,
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use netlink_packet_route::address::AddressHeaderFlags;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{LinkUnspec, LinkVeth};

use super::*;

const WITHIN: Duration = Duration::from_millis(300);

pub(in crate::cluster) struct Host {
    namespace: File,
    pub(in crate::cluster) network: Network,
}

impl Host {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces can be made");
        let namespace = File::open("/proc/thread-self/ns/net").unwrap();
        Self { namespace, network: Network::open().unwrap() }
    }

    /// This thread is on this host from now on.
    pub(in crate::cluster) fn enter(&self) {
        setns(&self.namespace, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// A cable with both ends here, one of them under that number.
    pub(in crate::cluster) async fn pair(&self, near: &str, far: &str, number: u32) {
        let pair = LinkVeth::new(near, far).index(number).build();
        self.network.handle.link().add(pair).execute().await.unwrap();
    }

    pub(in crate::cluster) async fn away(&self, number: u32) {
        self.network.handle.link().del(number).execute().await.unwrap();
    }

    pub(in crate::cluster) async fn index(&self, name: &str) -> u32 {
        let links = self.network.handle.link().get().match_name(name.to_owned()).execute();
        links.boxed().try_next().await.unwrap().expect("the link is there").header.index
    }

    pub(in crate::cluster) async fn up(&self, name: &str, addresses: &[&str]) {
        let index = self.index(name).await;
        let up = LinkUnspec::new_with_index(index).up().build();
        self.network.handle.link().set(up).execute().await.unwrap();
        for address in addresses {
            let address = Address::parse(address).unwrap();
            let mut add = self.network.handle.address().add(index, address.ip, address.prefix);
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            add.execute().await.unwrap();
        }
    }
}

/// The two hosts, `ours` with 10.77.0.1 and fd00:77::1, `theirs` with the same that end in 2.
pub(in crate::cluster) async fn two_hosts() -> (Host, Host) {
    let theirs = Host::new();
    let ours = Host::new();
    let pair = LinkVeth::new("eth0", "far").build();
    ours.network.handle.link().add(pair).execute().await.unwrap();
    let far = ours.index("far").await;
    let there = LinkUnspec::new_with_index(far).setns_by_fd(theirs.namespace.as_raw_fd()).build();
    ours.network.handle.link().set(there).execute().await.unwrap();
    ours.up("eth0", &["10.77.0.1/24", "fd00:77::1/64"]).await;
    theirs.up("far", &["10.77.0.2/24", "fd00:77::2/64"]).await;
    (ours, theirs)
}

/// Runs it on a thread that may go from host to host.
pub(in crate::cluster) fn on_a_thread_of_its_own<F: Future<Output = ()>>(
    work: impl FnOnce() -> F + Send + 'static,
) {
    if unshare_denied() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work());
    };
    thread::spawn(run).join().unwrap();
}

fn unshare_denied() -> bool {
    thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET).is_err()).join().unwrap()
}

/// The kernel's own answer is heard, for both families; ours does not answer to itself; silence takes the whole time.
#[test]
fn a_probe_says_who_has_the_address() {
    on_a_thread_of_its_own(|| async {
        let (ours, theirs) = two_hosts().await;
        for text in ["10.77.0.100/24", "fd00:77::100/64"] {
            let address = Address::parse(text).unwrap();
            let (here, there) = (
                ours.network.carrier(&address).await.unwrap(),
                theirs.network.carrier(&address).await.unwrap(),
            );
            assert_eq!((here.name.as_str(), there.name.as_str()), ("eth0", "far"));
            ours.enter();
            let start = Instant::now();
            assert_eq!(here.probe(address.ip, WITHIN).await.unwrap(), None, "{text}");
            assert!(start.elapsed() >= WITHIN, "{text}: it listens to the end");

            theirs.network.add(&address, &there).await.unwrap();
            theirs.network.add(&address, &there).await.expect("twice does no harm");
            assert!(theirs.network.present(address.ip).await.unwrap());
            assert!(!ours.network.present(address.ip).await.unwrap());
            let start = Instant::now();
            assert_eq!(here.probe(address.ip, WITHIN).await.unwrap(), Some(there.mac), "{text}");
            assert!(start.elapsed() < WITHIN, "{text}: an answer ends it");

            assert!(theirs.network.delete(address.ip).await.unwrap(), "{text}");
            assert!(!theirs.network.delete(address.ip).await.unwrap(), "twice does no harm");
            assert!(!theirs.network.present(address.ip).await.unwrap());
            assert_eq!(here.probe(address.ip, WITHIN).await.unwrap(), None, "{text}");
        }
    });
}

/// A service address in a smaller network than the host's own brings no route: the host speaks to its neighbours
/// from its own address, and is not cut off from them when the fence closes.
#[test]
fn a_host_does_not_speak_from_the_service_address() {
    on_a_thread_of_its_own(|| async {
        let (ours, _theirs) = two_hosts().await;
        let text = "10.77.0.100/28";
        let address = Address::parse(text).unwrap();
        let here = ours.network.carrier(&address).await.unwrap();
        ours.network.add(&address, &here).await.unwrap();
        ours.enter();
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("10.77.0.98:9").unwrap();
        assert_eq!(socket.local_addr().unwrap().ip().to_string(), "10.77.0.1");
    });
}

/// The other kernel's cache names the interface that announced last, so a moved address is found at once.
#[test]
fn an_announcement_changes_what_others_know() {
    on_a_thread_of_its_own(|| async {
        let (ours, theirs) = two_hosts().await;
        for text in ["10.77.0.100/24", "fd00:77::100/64"] {
            let address = Address::parse(text).unwrap();
            let here = ours.network.carrier(&address).await.unwrap();
            let there = theirs.network.carrier(&address).await.unwrap();
            // What they know is old: another interface had it.
            let old = [2, 0, 0, 0, 0, 9];
            let known = theirs.network.handle.neighbours();
            let state = netlink_packet_route::neighbour::NeighbourState::Reachable;
            known.add(there.index, address.ip).link_layer_address(&old).state(state).execute().await.unwrap();
            assert_eq!(known_mac(&theirs, address.ip).await, Some(Mac(old)), "{text}");
            ours.network.add(&address, &here).await.unwrap();
            ours.enter();
            // A kernel with locktime keeps an entry for a second against flapping (arp(7)), so once may be too early.
            let done = Cell::new(false);
            let announce = here
                .announce_repeatedly(address.ip, 50, Duration::from_millis(100), || async { !done.get() });
            let learn = async {
                let end = Instant::now() + Duration::from_secs(4);
                while known_mac(&theirs, address.ip).await != Some(here.mac) {
                    assert!(Instant::now() < end, "{text}: they still know the old place");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                done.set(true);
            };
            let (announced, ()) = futures_util::join!(announce, learn);
            announced.unwrap();
        }
    });
}

async fn known_mac(host: &Host, ip: IpAddr) -> Option<Mac> {
    use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
    let all: Vec<_> = host.network.handle.neighbours().get().execute().try_collect().await.unwrap();
    let want = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    let entry =
        all.into_iter().find(|it| it.attributes.contains(&NeighbourAttribute::Destination(want.clone())))?;
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

/// An address whose network no interface has, two have, or one that is down: each is refused by name.
#[test]
fn an_address_without_one_place_is_refused() {
    on_a_thread_of_its_own(|| async {
        let (ours, _theirs) = two_hosts().await;
        let ask = |text: &'static str| ours.network.carrier_of(text);
        assert!(matches!(ask("10.78.0.100/24").await, Err(VipError::NoCarrier { .. })));
        assert!(matches!(ask("fd00:78::100/64").await, Err(VipError::NoCarrier { .. })));
        // The service address itself, left behind, is no network to find it by.
        let address = Address::parse("10.78.0.100/24").unwrap();
        let here = ask("10.77.0.100/24").await.unwrap();
        ours.network.add(&address, &here).await.unwrap();
        assert!(matches!(ask("10.78.0.100/24").await, Err(VipError::NoCarrier { .. })));
        ours.network.delete(address.ip).await.unwrap();
        // Longer than the network, as some write it.
        assert_eq!(ask("10.77.0.100/32").await.unwrap(), here);

        ours.enter();
        ours.network.handle.link().add(LinkVeth::new("eth1", "far1").build()).execute().await.unwrap();
        ours.up("eth1", &["10.77.0.3/16", "10.79.0.3/24"]).await;
        let error = ask("10.77.0.100/24").await.unwrap_err();
        assert!(error.to_string().contains("each of eth0, eth1"), "{error}");
        let down = LinkUnspec::new_with_index(ours.index("eth1").await).down().build();
        ours.network.handle.link().set(down).execute().await.unwrap();
        let error = ask("10.79.0.100/24").await.unwrap_err();
        assert!(error.to_string().contains("ip link set eth1 up"), "{error}");
    });
}

impl Network {
    async fn carrier_of(&self, text: &str) -> Result<Interface, VipError> {
        self.carrier(&Address::parse(text).unwrap()).await
    }
}
