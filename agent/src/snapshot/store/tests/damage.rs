//! One flipped bit, anywhere: it is seen, it is named, and it costs no more than what it is in.

use super::*;

/// Flips a bit of a file, and flips it back when dropped.
struct Flip<'a>(&'a Path, Vec<u8>);

impl<'a> Flip<'a> {
    fn new(path: &'a Path, at: usize, bit: usize) -> Self {
        let bytes = fs::read(path).unwrap();
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << bit;
        fs::write(path, flipped).unwrap();
        Self(path, bytes)
    }
}

impl Drop for Flip<'_> {
    fn drop(&mut self) {
        fs::write(self.0, &self.1).unwrap();
    }
}

fn generation_of(damage: &Damage) -> Option<u64> {
    match damage {
        Damage::Generation { number, .. } | Damage::Entry { number, .. } => Some(*number),
        Damage::Pack { .. } => None,
    }
}

#[test]
fn every_flipped_bit_is_named_and_older_generations_are_not_hurt() {
    let mut lab = Lab::new();
    let contents = [content(1, 30_000), content(2, 9_000), content(3, 5_000)];
    for bytes in &contents {
        take(&lab.store, "w", &[("a", bytes), ("first", &contents[0])]).unwrap();
    }
    lab.store.mark_good("w", 2).unwrap();
    assert_eq!(lab.store.verify(|_, _| ()).unwrap().damage, []);
    let mut flips = 0;
    for path in lab.files() {
        let len = usize::try_from(fs::metadata(&path).unwrap().len()).unwrap();
        // All of a small file, and of a larger one its ends and samples between.
        let near = |at: &usize| len < 3000 || *at < 100 || len - *at < 500 || at.is_multiple_of(97);
        for at in (0..len).filter(near) {
            let _flip = Flip::new(&path, at, at % 8);
            flips += 1;
            lab.reopen();
            let verified = lab.store.verify(|_, _| ()).unwrap();
            let named: HashSet<_> = verified.damage.iter().filter_map(generation_of).collect();
            assert!(!verified.damage.is_empty(), "{} byte {at}", path.display());
            assert_eq!(verified.whole + named.len(), 3, "{} byte {at}", path.display());
            for (number, bytes) in (1..).zip(&contents) {
                let whole =
                    ["a", "first"].iter().zip([bytes, &contents[0]]).all(|(entry, bytes)| {
                        match read(&lab.store, "w", number, entry) {
                            Ok(read) => {
                                assert!(
                                    read == *bytes,
                                    "a wrong content was given out: {} byte {at}",
                                    path.display()
                                );
                                true
                            }
                            Err(Error::Chunk { .. } | Error::Damaged { .. }) => false,
                            Err(error) => panic!("{error}"),
                        }
                    });
                assert_eq!(whole, !named.contains(&number), "{} byte {at}", path.display());
            }
        }
    }
    assert!(flips > 3000, "{flips}");
    lab.reopen();
    assert_eq!(lab.store.verify(|_, _| ()).unwrap().whole, 3);
}

#[test]
fn a_file_that_is_cut_short_or_gone_is_named_too() {
    let mut lab = Lab::new();
    take(&lab.store, "w", &[("a", &content(1, 30_000))]).unwrap();
    take(&lab.store, "w", &[("a", &content(2, 30_000))]).unwrap();
    for path in lab.files() {
        let bytes = fs::read(&path).unwrap();
        for len in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..len]).unwrap();
            lab.reopen();
            assert!(!lab.store.verify(|_, _| ()).unwrap().damage.is_empty(), "{} {len}", path.display());
        }
        fs::remove_file(&path).unwrap();
        lab.reopen();
        let verified = lab.store.verify(|_, _| ()).unwrap();
        // A manifest that is gone is a generation that was not there.
        assert_eq!(verified.damage.is_empty(), path.extension().unwrap() == "manifest", "{}", path.display());
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn a_damaged_chunk_is_stored_again_when_it_comes_along_and_that_heals_the_older_generation() {
    let lab = Lab::new();
    let bytes = content(1, 30_000);
    take(&lab.store, "w", &[("a", &bytes)]).unwrap();
    let pack = index::files(&lab.store.packs_dir(), "pack").unwrap().remove(0);
    std::mem::forget(Flip::new(&pack, 100, 3));
    let error = read(&lab.store, "w", 1, "a").unwrap_err();
    assert!(matches!(&error, Error::Chunk { number: 1, offset: 0, .. }), "{error}");
    let error = extracted(&lab.store, 1, "a").unwrap_err();
    assert!(matches!(&error, Error::Chunk { number: 1, offset: 0, .. }), "{error}");
    take(&lab.store, "w", &[("a", &bytes)]).unwrap();
    for number in [1, 2] {
        assert!(read(&lab.store, "w", number, "a").unwrap() == bytes);
    }
    let verified = lab.store.verify(|_, _| ()).unwrap();
    assert!(matches!(&verified.damage[..], [Damage::Pack { .. }]), "{verified:?}");
    // Gc keeps the copy that is whole.
    lab.store.gc().unwrap();
    assert!(read(&lab.store, "w", 1, "a").unwrap() == bytes);
    // Until the rest of the damaged pack is let go as well.
    for number in [3, 4] {
        take(&lab.store, "w", &[("a", number.to_string().as_bytes())]).unwrap();
    }
    lab.store.sweep(&Retention { count: Some(1), ..Retention::default() }, jiff::Timestamp::now()).unwrap();
    assert_eq!(lab.store.verify(|_, _| ()).unwrap().damage, []);
}

#[test]
fn a_damaged_manifest_makes_the_one_before_it_the_last_good_one_and_sweeping_keeps_that() {
    let lab = Lab::new();
    for number in 1..=4 {
        take(&lab.store, "w", &[("a", &content(number, 9_000))]).unwrap();
        lab.store.mark_good("w", number).unwrap();
    }
    let manifest = |number| lab.store.manifest_path("w", number);
    for number in [2, 4] {
        std::mem::forget(Flip::new(&manifest(number), 50, 0));
    }
    assert_eq!(lab.store.last_good("w").unwrap().unwrap().number, 3);
    lab.store.sweep(&Retention { count: Some(1), ..Retention::default() }, jiff::Timestamp::now()).unwrap();
    assert!(read(&lab.store, "w", 3, "a").unwrap() == content(3, 9_000));
    assert_eq!([1, 2, 3, 4].map(|number| manifest(number).exists()), [false, false, true, true]);
    // Its number is not given again.
    assert_eq!(take(&lab.store, "w", &[("a", b"5")]).unwrap(), 5);
}

#[test]
fn a_manifest_under_another_name_is_not_that_generation() {
    let lab = Lab::new();
    take(&lab.store, "w", &[("a", b"1")]).unwrap();
    fs::copy(lab.store.manifest_path("w", 1), lab.store.manifest_path("w", 2)).unwrap();
    assert!(matches!(lab.store.manifest("w", 2), Err(Error::Damaged { .. })));
}
