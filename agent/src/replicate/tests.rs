//! Snapshots between nodes in one process, over real QUIC and real stores.

use std::path::PathBuf;

use super::*;
use crate::{
    event::{Event, Kind},
    peer::tests::{Node, pair},
    snapshot::store::{self, About, Metadata},
};

const SHARED: &str = "[[workload]]\nname = \"w\"\nunits = [\"a\"]\nnodes = [\"vm1\", \"vm2\"]\n";

/// A store of a node, as another process has it.
fn store_of(node: &Node) -> Store {
    Store::open(&node.dir.path().join("snapshots"), Settings::default()).unwrap()
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn take(store: &Store, node: &str, bytes: &[u8]) -> u64 {
    let about = About {
        workload: "w".into(),
        kind: store::Kind::Files,
        node: node.into(),
        boot_id: "b".into(),
        time: jiff::Timestamp::now(),
    };
    let mut draft = store.begin(about).unwrap();
    draft.add("a", Metadata::new("file", &()).unwrap(), bytes).unwrap();
    draft.commit().unwrap().number
}

fn content(store: &Store, number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let snapshot = store.snapshot("w", number).unwrap();
    std::io::Read::read_to_end(&mut snapshot.open_entry("a").unwrap(), &mut bytes).unwrap();
    bytes
}

/// Waits until this generation is on another node; answers how many bytes went over the wire.
async fn replicated(node: &Node, number: u64) -> u64 {
    let it = |kind: &Kind| matches!(kind, Kind::Replicated { generation, .. } if *generation == number);
    let event: Arc<Event> = node.event(it).await;
    let Kind::Replicated { bytes, .. } = &event.kind else { unreachable!() };
    *bytes
}

async fn behind(node: &Node) -> (String, String) {
    let event = node.event(|kind| matches!(kind, Kind::ReplicaBehind { .. })).await;
    let Kind::ReplicaBehind { cause, mend, .. } = &event.kind else { unreachable!() };
    (cause.clone(), mend.clone())
}

#[test]
fn the_last_good_one_and_the_newest_are_sent_and_no_others() {
    let files = |number, good| (number, store::Kind::Files, good);
    let here = [files(1, true), files(2, false), files(3, true), files(4, false), files(5, false)];
    assert_eq!(send::next(&here, &[]), Some(3));
    assert_eq!(send::next(&here, &[(3, false)]), Some(5));
    assert_eq!(send::next(&here, &[(3, true), (5, false)]), None);
    assert_eq!(send::next(&here[..0], &[]), None);
    assert_eq!(send::next(&here[1..2], &[(1, true)]), Some(2));
    assert_eq!(send::unmarked(&here, &[(1, true), (3, false), (5, false), (9, false)]), [3]);
    // Those of processes, which come often, do not keep files out, nor the other way round.
    let both =
        [here.as_slice(), &[(6, store::Kind::Process, true), (7, store::Kind::Process, false)]].concat();
    let order: Vec<_> = (0..5)
        .scan(Vec::new(), |there, _| {
            let next = send::next(&both, there)?;
            there.push((next, false));
            Some(next)
        })
        .collect();
    assert_eq!(order, [3, 5, 6, 7]);
}

#[tokio::test]
async fn a_pace_is_kept_over_all_who_send() {
    let pace = Arc::new(send::Pace::new(Some(1 << 20)));
    let begun = tokio::time::Instant::now();
    let many: Vec<_> = (0..4)
        .map(|_| {
            let pace = Arc::clone(&pace);
            tokio::spawn(async move {
                for _ in 0..4 {
                    pace.wait(32 << 10).await;
                }
            })
        })
        .collect();
    for one in many {
        one.await.unwrap();
    }
    // The last of sixteen waits for the fifteen before it.
    let took = begun.elapsed();
    assert!((Duration::from_millis(460)..Duration::from_secs(5)).contains(&took), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_here_is_there_and_only_what_is_new_goes_over_the_wire() {
    let (vm1, vm2) = pair(SHARED).await;
    let replicas = start(&vm1.config, &vm1.peers, &vm1.bus);
    let _others = start(&vm2.config, &vm2.peers, &vm2.bus);
    let (here, there) = (store_of(&vm1), store_of(&vm2));
    let mut bytes = noise(1, 3 << 20);
    assert_eq!(take(&here, "vm1", &bytes), 1);
    assert!(replicated(&vm1, 1).await > 3 << 20);
    assert!(content(&there, 1) == bytes);
    vm2.event(|kind| matches!(kind, Kind::ReplicaTaken { peer, .. } if peer == "vm1")).await;
    bytes[1 << 20] ^= 1;
    take(&here, "vm1", &bytes);
    let second = replicated(&vm1, 2).await;
    assert!(second < 300 << 10, "{second}");
    assert!(content(&there, 2) == bytes);
    let generation = there.generations("w").unwrap().pop().unwrap();
    assert_eq!((generation.about.node.as_str(), generation.origin, generation.good), ("vm1", Some(2), false));
    // It proves healthy: known there too.
    here.mark_good("w", 2).unwrap();
    let end = tokio::time::Instant::now() + Duration::from_mins(1);
    while !there.generations("w").unwrap()[1].good {
        assert!(tokio::time::Instant::now() < end, "{:#?}", vm1.told());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let status = replicas.status().remove(0);
    assert_eq!((status.newest, status.there, status.behind_since), (Some(2), Some(2), None));
    // What vm2 takes goes the other way, under a number of its own.
    let number = take(&there, "vm2", b"of vm2");
    assert_eq!(number, 3);
    replicated(&vm2, 3).await;
    assert_eq!(content(&here, 3), b"of vm2");
    assert!(here.verify(|_, _| ()).unwrap().damage.is_empty());
    assert!(there.verify(|_, _| ()).unwrap().damage.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    const SIZE: u64 = 12 << 20;
    let slow = format!("bandwidth = \"4MiB\"\nreplica_late = \"500ms\"\n{SHARED}");
    let (vm1, vm2) = pair(&slow).await;
    let replicas = start(&vm1.config, &vm1.peers, &vm1.bus);
    let others = start(&vm2.config, &vm2.peers, &vm2.bus);
    let here = store_of(&vm1);
    let bytes = noise(2, SIZE as usize);
    take(&here, "vm1", &bytes);
    // What is on its way over there.
    let incoming = vm2.dir.path().join("snapshots/v1/incoming");
    let end = tokio::time::Instant::now() + Duration::from_mins(2);
    loop {
        let files = std::fs::read_dir(&incoming).into_iter().flatten().flatten();
        if files.filter_map(|file| Some(file.metadata().ok()?.len())).sum::<u64>() >= SIZE / 2 {
            break;
        }
        assert!(tokio::time::Instant::now() < end, "{:?}: {:#?}", replicas.status(), vm1.told());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // It takes longer than it may: told, and the cause.
    let (cause, _) = behind(&vm1).await;
    assert!(cause.contains("on its way"), "{cause}");
    // ftd over there is stopped in the middle, and started again.
    drop(others);
    let (address, dir) = vm2.stop().await;
    let vm2 = Node::start_at("vm2", address, &[("vm1", vm1.address)], &slow, dir).await;
    vm2.connected("vm1").await;
    let _others = start(&vm2.config, &vm2.peers, &vm2.bus);
    let second = replicated(&vm1, 1).await;
    vm1.event(|kind| matches!(kind, Kind::ReplicaCaughtUp { .. })).await;
    assert!(second < SIZE / 2 + (64 << 10), "{second} of {SIZE}");
    assert!(content(&store_of(&vm2), 1) == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_shares_no_workload_is_refused_with_the_mend() {
    let late = format!("replica_late = \"300ms\"\n{SHARED}");
    let (vm1, vm2) = pair(&late).await;
    let replicas = start(&vm1.config, &vm1.peers, &vm1.bus);
    take(&store_of(&vm1), "vm1", b"1");
    let (cause, mend) = behind(&vm1).await;
    assert!(cause.contains("does not know such requests") && mend.contains("nodes"), "{cause}; {mend}");
    // It shares another workload.
    let other = SHARED.replace("\"w\"", "\"v\"");
    let config = Config::parse(
        &format!(
            "[node]\nname = \"vm2\"\nlisten = \"{}\"\nstate_dir = \"{}\"\n[cluster]\npeers = [\"vm1={}\"]\n{other}",
            vm2.address,
            vm2.dir.path().display(),
            vm1.address
        ),
        &PathBuf::from("test"),
    )
    .unwrap();
    let _others = start(&config, &vm2.peers, &vm2.bus);
    let end = tokio::time::Instant::now() + Duration::from_mins(1);
    let told = || replicas.status().remove(0).problem.map_or_else(String::new, |(cause, _)| cause);
    while !told().contains("takes no snapshots of w from vm1") {
        assert!(tokio::time::Instant::now() < end, "{}", told());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(store_of(&vm2).generations("w").unwrap().is_empty());
    // And one that another node has taken is not taken from vm1.
    let mine = store_of(&vm1);
    take(&mine, "vm9", b"9");
    let manifest = mine.parcel("w", 2).unwrap().manifest().to_vec();
    let refused = vm1.peers.call("vm2", &Begin { manifest }).await.unwrap_err();
    assert!(refused.to_string().contains("takes no snapshots"), "{refused}");
}
