//! Mending: what is derived is built again, a lost manifest comes back, damage costs the documents that it touches.

use std::fs;
use std::path::Path;

use memory3::bank::layout::SectionKind;
use memory3::bank::{
    Bank, BankError, Leftovers, Manifest, Repair, RepairOptions, Shard, VerifyOptions, repair, verify,
};

use super::support::*;

fn options(drop_damaged: bool) -> RepairOptions {
    RepairOptions { drop_damaged, records_per_shard: 30, keep: 1000, leftovers: Leftovers::Refuse }
}

fn mend(dir: &Path) -> Repair {
    repair(dir, options(false)).unwrap()
}

fn assert_clean(dir: &Path) {
    let report = verify(dir, VerifyOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn what_is_derived_is_built_again_and_the_generation_stays() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(71, 80);
    let manifest = compile(dir.path(), &docs, &spec(30));
    let before = files(dir.path());
    let index = dir.path().join("index");
    let retrieval = index.join(&manifest.retrieval.file.file);
    fs::remove_dir_all(index.join("catalog")).unwrap();
    for fixed in ["retrieval.faiss", "codec.faiss"] {
        fs::remove_file(index.join(fixed)).unwrap();
    }
    fs::write(&retrieval, "damaged").unwrap();
    fs::remove_file(index.join("generations/000001.json")).unwrap();
    fs::remove_file(index.join(&manifest.prefix.file)).unwrap();
    let done = mend(dir.path());
    assert!(done.damage.is_empty(), "{done:?}");
    assert_eq!(done.generation, 1);
    let mut after = files(dir.path());
    let codec = Path::new("index/codec.faiss").to_owned();
    after.entry(codec.clone()).or_insert_with(|| before[&codec].clone());
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    assert!(before == after, "{done:?}");
    assert_clean(dir.path());
    assert_eq!(mend(dir.path()).done.len(), 1, "only the catalog is always built anew");
}

#[test]
fn a_lost_or_torn_manifest_is_restored_from_the_newest_kept_one() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(72, 60);
    compile(dir.path(), &docs[..30], &spec(20));
    let second = sync(dir.path(), &docs, &spec(20), 1000);
    let path = Manifest::path(dir.path());
    let bytes = fs::read(&path).unwrap();
    for torn in [None, Some(&bytes[..bytes.len() / 2]), Some(&b"{}"[..])] {
        match torn {
            None => fs::remove_file(&path).unwrap(),
            Some(torn) => fs::write(&path, torn).unwrap(),
        }
        let done = mend(dir.path());
        assert!(done.done.iter().any(|done| done.contains("generation 2")), "{done:?}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert_eq!(path.with_extension("json.aside").exists(), torn.is_some());
        assert_clean(dir.path());
    }
    // The newest copy is torn too: the state before it comes back under a number of its own.
    fs::remove_file(&path).unwrap();
    fs::write(Manifest::generation_path(dir.path(), 2), "torn").unwrap();
    let done = mend(dir.path());
    assert_eq!(done.generation, 3, "{done:?}");
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs[..30], &spec(20));
    // Ids of the lost generation are not given again.
    assert_eq!(Manifest::read(dir.path()).unwrap().next_shard, second.next_shard);
    sync(dir.path(), &docs, &spec(20), 1000);
    assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(20));
    assert_clean(dir.path());
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(repair(empty.path(), options(true)), Err(BankError::NotABank { .. })));
}

/// Changes bytes of a shard.
fn damage(dir: &Path, number: u32, change: impl Fn(&mut Vec<u8>, &Shard)) {
    let path = dir.join(format!("shards/{number:06}.m3s"));
    let shard = Shard::open(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes, &shard);
    drop(shard);
    // Under a new inode: another reader's map stays as it is.
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
}

#[test]
fn damage_costs_the_documents_that_it_touches_and_the_next_compile_brings_them_back() {
    type Change = fn(&mut Vec<u8>, &Shard);
    let cases: &[(&str, Change, bool, bool)] = &[
        // Name, what is damaged, whether documents are named, whether records are lost.
        ("a code", |bytes, shard| bytes[shard.record_offset(4) as usize + 60] ^= 4, true, true),
        ("token ids", |bytes, shard| bytes[shard.section_range(SectionKind::TokenIds).start as usize] ^= 1, true, true),
        ("texts", |bytes, shard| bytes[shard.section_range(SectionKind::Texts).start as usize + 9] ^= 1, true, true),
        ("vectors", |bytes, shard| bytes[shard.section_range(SectionKind::Vectors).start as usize] ^= 1, true, true),
        (
            "text index",
            |bytes, shard| bytes[shard.section_range(SectionKind::TextIndex).start as usize + 5] ^= 1,
            true,
            true,
        ),
        ("rows", |bytes, shard| bytes[shard.section_range(SectionKind::Documents).start as usize] ^= 1, false, false),
        ("uses", |bytes, shard| bytes[shard.section_range(SectionKind::Uses).start as usize + 8] ^= 1, false, false),
        ("padding", |bytes, shard| bytes[shard.section_range(SectionKind::Uses).end as usize + 1] ^= 1, false, false),
        ("the end", |bytes, _| bytes.truncate(bytes.len() - 7), true, true),
    ];
    let docs = corpus(73, 80);
    for (name, change, named, lost) in cases {
        let dir = tempfile::tempdir().unwrap();
        let whole = compile(dir.path(), &docs, &spec(30));
        damage(dir.path(), 2, change);
        let found = mend(dir.path());
        assert_eq!(found.damage.len(), 1, "{name}: {found:?}");
        assert!(found.damage[0].contains("000002.m3s"), "{name}: {found:?}");
        assert_eq!(!found.documents.is_empty(), *named, "{name}: {found:?}");
        assert_eq!(Manifest::read(dir.path()).unwrap().generation, 1, "{name}: nothing is dropped unasked");
        let done = repair(dir.path(), options(true)).unwrap();
        assert_eq!((done.dropped, done.generation), (true, 2), "{name}: {done:?}");
        let bank = Bank::open(dir.path()).unwrap();
        let report = verify(dir.path(), VerifyOptions { catalog: false, ..VerifyOptions::default() }).unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
        let left: u64 = bank.manifest().shards.iter().map(|shard| shard.records).sum();
        assert_eq!(left < whole.counts.records, *lost, "{name}: {left} of {}", whole.counts.records);
        assert!(left >= whole.counts.records - 30, "{name}: {left}");
        // Ids that were named are gone, all others are as they were.
        let gone = |doc: &&Doc| !found.documents.contains(&doc.id);
        if found.unreadable_documents == 0 {
            assert_holds(&bank, &docs.iter().filter(gone).cloned().collect::<Vec<_>>(), &spec(30));
        }
        sync(dir.path(), &docs, &spec(30), 1000);
        assert_holds(&Bank::open(dir.path()).unwrap(), &docs, &spec(30));
        assert_clean(dir.path());
    }
}

#[test]
fn damage_that_cannot_be_mended_is_told_and_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let docs = corpus(74, 60);
    compile(dir.path(), &docs, &spec(20));
    let second = sync(dir.path(), &docs[5..], &spec(20), 1000);
    let tombstones = dir.path().join("index").join(&second.tombstones.unwrap().file.file);
    let bytes = fs::read(&tombstones).unwrap();
    fs::write(&tombstones, &bytes[..bytes.len() - 1]).unwrap();
    let before = files(dir.path());
    let found = repair(dir.path(), options(true)).unwrap();
    assert!(found.lost.iter().any(|lost| lost.contains("tombstones")), "{found:?}");
    assert!(!found.dropped && before == files(dir.path()));
    // Damage that is dropped does not hide what stays lost.
    fs::write(&tombstones, &bytes).unwrap();
    for codec in [second.codec.files.values().next().unwrap().file.as_str(), "codec.faiss"] {
        fs::write(dir.path().join("index").join(codec), "no codec").unwrap();
    }
    damage(dir.path(), 1, |bytes, shard| bytes[shard.section_range(SectionKind::Texts).start as usize + 9] ^= 1);
    let found = repair(dir.path(), options(true)).unwrap();
    assert!(found.dropped && found.lost.iter().any(|lost| lost.contains("codec")), "{found:?}");
}
