//! Generations as streams.

use proptest::prelude::*;

use super::*;
use crate::snapshot::store::fuzz;

fn exported() -> (Lab, Vec<u8>) {
    let lab = Lab::new();
    let bytes = content(1, 20_000);
    take_of(&lab.store, from_elsewhere("w"), &[("a", &bytes), ("b", &bytes), ("c", b"c")]).unwrap();
    lab.store.mark_good("w", 1).unwrap();
    let mut stream = Vec::new();
    lab.store.export("w", 1, &mut stream).unwrap();
    (lab, stream)
}

#[test]
fn a_generation_arrives_as_it_was_once_and_with_a_number_that_is_new() {
    let (lab, stream) = exported();
    // What is in it twice travels once.
    assert!(stream.len() < 20_000, "{}", stream.len());
    let there = Lab::new();
    let mut last = (0, 0);
    let generation = there.store.import(stream.as_slice(), |done, total| last = (done, total)).unwrap();
    assert_eq!(last.1, stream.len() as u64);
    assert_eq!(last.0 + 32, last.1);
    assert_eq!((generation.number, generation.origin, generation.good), (1, Some(1), true));
    assert!(read(&there.store, "w", 1, "b").unwrap() == content(1, 20_000));
    assert_eq!(there.store.import(stream.as_slice(), |_, _| ()).unwrap().number, 1);
    // Here it is already.
    assert_eq!(lab.store.import(stream.as_slice(), |_, _| ()).unwrap().number, 1);
    assert_eq!(lab.store.generations("w").unwrap().len(), 1);
    let other = Lab::new();
    take(&other.store, "w", &[("a", &content(1, 20_000))]).unwrap();
    let mut later = about("w");
    later.time = jiff::Timestamp::from_second(9).unwrap();
    other.store.begin(later).unwrap().commit().unwrap();
    // A workload that was elsewhere since, with generations of its own: this one is new here.
    let mut stream = Vec::new();
    other.store.export("w", 2, &mut stream).unwrap();
    let generation = lab.store.import(stream.as_slice(), |_, _| ()).unwrap();
    assert_eq!((generation.number, generation.origin, generation.good), (2, Some(2), false));
    assert_eq!(lab.store.last_good("w").unwrap().unwrap().number, 1);
}

#[test]
fn what_is_there_is_not_written_again() {
    let (_, stream) = exported();
    let there = Lab::new();
    take(&there.store, "other", &[("x", &content(1, 20_000))]).unwrap();
    let generation = there.store.import(stream.as_slice(), |_, _| ()).unwrap();
    assert_eq!((generation.stats.total, generation.stats.new), (40_001, 1));
}

#[test]
fn a_stream_that_is_cut_short_or_changed_anywhere_is_refused_and_leaves_nothing() {
    let (_, stream) = exported();
    let there = Lab::new();
    take(&there.store, "w", &[("a", b"1")]).unwrap();
    let before = there.files();
    for len in (0..stream.len()).filter(|len| len % 61 == 0 || *len < 500 || stream.len() - len < 100) {
        let error = there.store.import(&stream[..len], |_, _| ()).unwrap_err();
        assert!(matches!(&error, Error::Stream { cause } if cause.contains("cut short")), "{len}: {error}");
        assert_eq!(there.files(), before, "{len}");
    }
    for at in (0..stream.len()).filter(|at| at % 61 == 0 || *at < 500 || stream.len() - at < 100) {
        let mut changed = stream.clone();
        changed[at] ^= 1 << (at % 8);
        there.store.import(changed.as_slice(), |_, _| ()).unwrap_err();
        assert_eq!(there.files(), before, "{at}");
    }
}

#[test]
fn a_stream_of_a_newer_format_and_one_past_the_quota_are_refused_as_such() {
    let (_, stream) = exported();
    let mut newer = stream.clone();
    newer[8] = 2;
    let there = Lab::with(Settings { quota: Some(5_000), ..settings() });
    let error = there.store.import(newer.as_slice(), |_, _| ()).unwrap_err();
    assert!(matches!(error, Error::Newer { found: 2, .. }), "{error}");
    let error = there.store.import(stream.as_slice(), |_, _| ()).unwrap_err();
    assert!(matches!(error, Error::Quota { .. }), "{error}");
    assert!(there.files().is_empty());
}

#[test]
fn a_damaged_generation_is_not_exported() {
    let (lab, _) = exported();
    let pack = index::files(&lab.store.packs_dir(), "pack").unwrap().remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[100] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let error = lab.store.export("w", 1, std::io::sink()).unwrap_err();
    assert!(matches!(&error, Error::Chunk { entry, offset: 0, .. } if entry == "a"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn noise_is_no_stream(
        bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..3000, real: bool,
    ) {
        let bytes = if real {
            // Noise behind a right beginning.
            let mut stream = exported().1;
            stream.truncate(at);
            [stream, bytes].concat()
        } else {
            bytes
        };
        fuzz::stream(&bytes);
        fuzz::manifest(&bytes);
        fuzz::pack_index(&bytes);
        let there = Lab::new();
        prop_assert!(there.store.import(bytes.as_slice(), |_, _| ()).is_err());
        prop_assert!(there.files().is_empty());
    }
}
