//! Generations that arrive piece by piece.

use proptest::prelude::*;

use super::*;

const SIZE: usize = 200_000;

fn sent() -> (Lab, Parcel) {
    let lab = Lab::new();
    let bytes = content(1, SIZE);
    take_of(&lab.store, from_elsewhere("w"), &[("a", &bytes), ("b", &bytes), ("c", b"c")]).unwrap();
    let parcel = lab.store.parcel("w", 1).unwrap();
    (lab, parcel)
}

/// These chunks, as they go over the wire.
fn bytes_of(parcel: &Parcel, numbers: impl IntoIterator<Item = usize>) -> Vec<u8> {
    let (mut reader, mut bytes) = (parcel.reader().unwrap(), Vec::new());
    for number in numbers {
        let before = bytes.len();
        reader.read(number, &mut bytes).unwrap();
        assert_eq!((bytes.len() - before) as u64, parcel.size(number));
    }
    bytes
}

fn new(store: &Store, parcel: &Parcel) -> Reception {
    match store.receive(parcel.manifest()).unwrap() {
        Receive::New(reception) => reception,
        Receive::Known(known) => panic!("{known:?}"),
    }
}

fn whole(finish: Finish) -> Generation {
    match finish {
        Finish::Whole(generation) => generation,
        Finish::Missing(missing) => panic!("{missing:?}"),
    }
}

#[test]
fn only_what_is_missing_is_asked_for_and_what_arrives_is_as_it_was() {
    let (lab, parcel) = sent();
    let there = Lab::new();
    // A part of it is there, by another workload.
    take(&there.store, "other", &[("x", &content(1, SIZE))]).unwrap();
    let reception = new(&there.store, &parcel);
    assert_eq!(reception.missing().numbers(parcel.count()).count(), 1);
    let there = Lab::new();
    let reception = new(&there.store, &parcel);
    let all: Vec<_> = reception.missing().numbers(parcel.count()).collect();
    assert!(all.len() > 10 && all.len() == parcel.count(), "{all:?}");
    // From the back, on two threads.
    let (odd, even): (Vec<_>, Vec<_>) = all.iter().rev().partition(|number| **number % 2 == 1);
    std::thread::scope(|scope| {
        for numbers in [odd, even] {
            let (reception, parcel) = (&reception, &parcel);
            scope.spawn(move || reception.take(bytes_of(parcel, numbers).as_slice()).unwrap());
        }
    });
    assert!(reception.missing().is_empty());
    let generation = whole(reception.finish(true).unwrap());
    assert_eq!((generation.number, generation.origin, generation.good), (1, Some(1), true));
    assert_eq!(generation.about, lab.store.generations("w").unwrap()[0].about);
    for entry in ["a", "b"] {
        assert!(read(&there.store, "w", 1, entry).unwrap() == content(1, SIZE), "{entry}");
    }
    assert!(there.store.verify(|_, _| ()).unwrap().damage.is_empty());
    // Once more: it is known, and marked when it is good now.
    assert!(
        matches!(there.store.receive(parcel.manifest()).unwrap(), Receive::Known(known) if known.number == 1)
    );
}

#[test]
fn what_arrived_before_a_cut_is_not_asked_for_again_nor_what_a_killed_process_had() {
    let (_, parcel) = sent();
    let mut there = Lab::new();
    let half = parcel.count() / 2;
    let reception = new(&there.store, &parcel);
    let first = bytes_of(&parcel, 0..half);
    // Cut in the middle of a chunk.
    reception.take(&first[..first.len() - 10]).unwrap_err();
    drop(reception);
    there.reopen();
    let reception = new(&there.store, &parcel);
    let missing: Vec<_> = reception.missing().numbers(parcel.count()).collect();
    assert_eq!(missing, (half - 1..parcel.count()).collect::<Vec<_>>());
    reception.take(bytes_of(&parcel, missing).as_slice()).unwrap();
    whole(reception.finish(false).unwrap());
    assert!(read(&there.store, "w", 1, "b").unwrap() == content(1, SIZE));
}

#[test]
fn what_a_killed_process_had_received_is_taken_up_but_for_what_was_in_its_memory() {
    let lab = Lab::new();
    let mut bytes = vec![0; 4 << 20];
    noise(3, &mut bytes);
    take_of(&lab.store, from_elsewhere("w"), &[("a", &bytes)]).unwrap();
    let parcel = lab.store.parcel("w", 1).unwrap();
    let mut there = Lab::new();
    let reception = new(&there.store, &parcel);
    let most = parcel.count() - 10;
    reception.take(bytes_of(&parcel, 0..most).as_slice()).unwrap();
    assert_eq!(index::list(&there.store.incoming_dir()).unwrap().len(), 1);
    // Killed: nothing is closed, nothing said.
    std::mem::forget(reception);
    there.reopen();
    let saved = there.store.salvage().unwrap();
    // A pack is written in pieces of a mebibyte.
    assert!(saved < most && saved > most / 2, "{saved} of {most}");
    assert!(index::list(&there.store.incoming_dir()).unwrap().is_empty());
    assert_eq!(there.store.salvage().unwrap(), 0);
    let reception = new(&there.store, &parcel);
    let missing: Vec<_> = reception.missing().numbers(parcel.count()).collect();
    assert_eq!(missing.len(), parcel.count() - saved);
    reception.take(bytes_of(&parcel, missing).as_slice()).unwrap();
    whole(reception.finish(false).unwrap());
    assert!(read(&there.store, "w", 1, "a").unwrap() == bytes);
}

#[test]
fn a_generation_is_there_only_when_all_of_it_is_and_what_gc_took_is_asked_for_again() {
    let (_, parcel) = sent();
    let there = Lab::new();
    let reception = new(&there.store, &parcel);
    reception.take(bytes_of(&parcel, 1..parcel.count()).as_slice()).unwrap();
    let Finish::Missing(missing) = reception.finish(true).unwrap() else { panic!() };
    assert_eq!(missing.numbers(parcel.count()).collect::<Vec<_>>(), [0]);
    assert!(there.store.generations("w").unwrap().is_empty());
    // Nobody needs its chunks yet: gc may take them. Nothing is lost by it but the time.
    there.store.gc().unwrap();
    reception.take(bytes_of(&parcel, [0]).as_slice()).unwrap();
    let Finish::Missing(missing) = reception.finish(true).unwrap() else { panic!() };
    let missing: Vec<_> = missing.numbers(parcel.count()).collect();
    assert_eq!(missing, (1..parcel.count()).collect::<Vec<_>>());
    reception.take(bytes_of(&parcel, missing).as_slice()).unwrap();
    whole(reception.finish(true).unwrap());
    assert!(there.store.verify(|_, _| ()).unwrap().damage.is_empty());
}

#[test]
fn others_take_snapshots_while_one_arrives() {
    let (_, parcel) = sent();
    let there = Lab::new();
    let reception = new(&there.store, &parcel);
    reception.take(bytes_of(&parcel, 0..3).as_slice()).unwrap();
    take(&there.store, "mine", &[("x", &content(7, 10_000))]).unwrap();
    reception.take(bytes_of(&parcel, 3..parcel.count()).as_slice()).unwrap();
    let draft = there.store.begin(about("mine")).unwrap();
    std::thread::scope(|scope| {
        // The last step waits for the one that writes.
        let finishing = scope.spawn(|| whole(reception.finish(false).unwrap()));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!finishing.is_finished());
        draft.commit().unwrap();
        assert_eq!(finishing.join().unwrap().number, 1);
    });
    assert_eq!(there.store.generations("mine").unwrap().len(), 2);
}

#[test]
fn what_is_damaged_or_not_asked_for_is_refused_and_what_was_right_is_kept() {
    let (_, parcel) = sent();
    let there = Lab::new();
    let reception = new(&there.store, &parcel);
    let right = bytes_of(&parcel, 0..2);
    for at in (0..right.len()).step_by(97) {
        let mut changed = right.clone();
        changed[at] ^= 1 << (at % 8);
        reception.take(changed.as_slice()).unwrap_err();
    }
    let other = Lab::new();
    take_of(&other.store, from_elsewhere("w"), &[("z", &content(5, 9000))]).unwrap();
    let foreign = other.store.parcel("w", 1).unwrap();
    let error = reception.take(bytes_of(&foreign, [0]).as_slice()).unwrap_err();
    assert!(error.to_string().contains("not asked for"), "{error}");
    // The same twice is no harm.
    reception.take(right.as_slice()).unwrap();
    reception.take(right.as_slice()).unwrap();
    assert_eq!(reception.missing().numbers(parcel.count()).next(), Some(2));
    // A manifest that was changed.
    let mut changed = parcel.manifest().to_vec();
    changed[40] ^= 1;
    assert!(matches!(there.store.receive(&changed), Err(Error::Damaged { .. })));
    // More than may be.
    let small = Lab::with(Settings { quota: Some(20_000), ..settings() });
    let reception = new(&small.store, &parcel);
    let error = reception.take(bytes_of(&parcel, 0..parcel.count()).as_slice()).unwrap_err();
    assert!(matches!(error, Error::Quota { .. }), "{error}");
    // Chunks that the sender does not have.
    let mut reader = parcel.reader().unwrap();
    reader.read(parcel.count(), &mut Vec::new()).unwrap_err();
}

#[test]
fn notices_come_for_what_other_processes_do_too() {
    let lab = Lab::new();
    let names = ["w".to_owned(), "v".to_owned()];
    let mut notices = lab.store.notices(&names).unwrap();
    let other = Store::open(lab.dir.path(), settings()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let told = |notice: &mut tokio::sync::watch::Receiver<u64>| {
        runtime.block_on(async {
            tokio::time::timeout(std::time::Duration::from_secs(20), notice.changed())
                .await
                .unwrap()
                .unwrap();
        });
    };
    take(&other, "w", &[("a", b"1")]).unwrap();
    told(notices.get_mut("w").unwrap());
    // Until the directory of the workload is watched.
    for bytes in [b"2", b"3"] {
        notices.get_mut("w").unwrap().borrow_and_update();
        take(&other, "w", &[("a", bytes)]).unwrap();
        told(notices.get_mut("w").unwrap());
    }
    std::thread::sleep(std::time::Duration::from_millis(50));
    notices.get_mut("w").unwrap().borrow_and_update();
    other.mark_good("w", 3).unwrap();
    told(notices.get_mut("w").unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn noise_is_taken_by_nobody(bytes in prop::collection::vec(any::<u8>(), 1..300), at in 0usize..4000, real: bool) {
        let (_, parcel) = sent();
        let there = Lab::new();
        let reception = new(&there.store, &parcel);
        let mut stream = if real { bytes_of(&parcel, 0..3) } else { Vec::new() };
        let end = stream.len();
        stream.splice(at.min(end).., bytes);
        let _ = reception.take(stream.as_slice());
        prop_assert!(matches!(reception.finish(true).unwrap(), Finish::Missing(_)));
        prop_assert!(there.store.generations("w").unwrap().is_empty());
    }

    #[test]
    fn a_set_of_chunks_goes_over_the_wire_as_it_is(numbers in prop::collection::btree_set(0usize..500, 0..100)) {
        let chunks = Chunks::of(500, |number| numbers.contains(&number));
        let came = Chunks::from_bytes(chunks.as_bytes().to_vec());
        prop_assert_eq!(came.numbers(500).collect::<std::collections::BTreeSet<_>>(), numbers.clone());
        prop_assert_eq!(came.is_empty(), numbers.is_empty());
        // A shorter one than there should be.
        prop_assert!(Chunks::from_bytes(Vec::new()).numbers(500).next().is_none());
    }
}
