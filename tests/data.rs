//! Readers on small generated data sets with the traps of the real ones, and on the real ones where
//! `ECHOGRAD_DATA` names their folder.

use echograd::data::{self, Label, Source};

fn real(spec: &str) -> Box<dyn Source> {
    let (name, folder) = spec.split_once(':').unwrap();
    let root = std::env::var("ECHOGRAD_DATA").expect("ECHOGRAD_DATA names the data sets' folder");
    data::open(&format!("{name}:{root}/{folder}")).unwrap()
}

fn counts(source: &dyn Source) -> [usize; 3] {
    Label::ALL.map(|l| source.cases().iter().filter(|c| c.label == l).count())
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn breast_as_published() {
    let source = real("breast:BrEaST");
    assert_eq!(counts(&*source), [154, 98, 4]);
    assert!(source.drops().is_empty());
    assert!(data::duplicates(source.cases()).is_empty());
    for (i, case) in source.cases().iter().enumerate() {
        let mask = source.mask(i).unwrap();
        assert_eq!((mask.width, mask.height), (case.width, case.height));
        assert_eq!(
            mask.pixels.contains(&255),
            case.label.is_lesion(),
            "{}",
            case.image
        );
        let pixel = case.pixel_mm.unwrap();
        assert!(
            (0.04..0.15).contains(&pixel),
            "{} has {pixel} mm",
            case.image
        );
    }
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn busi_as_published() {
    let source = real("busi:BUSI");
    assert_eq!(counts(&*source), [437, 210, 133]);
    let names: Vec<Vec<&str>> = data::duplicates(source.cases())
        .iter()
        .map(|group| group.iter().map(|&i| &*source.cases()[i].image).collect())
        .collect();
    assert!(
        names.contains(&vec!["benign (433).png", "malignant (145).png"]),
        "{names:?}"
    );
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn uclm_sample() {
    let source = real("uclm:BUS-UCLM-sample");
    assert_eq!(source.cases().len() + source.drops().len(), 24);
    let dropped: Vec<&str> = source.drops().iter().map(|d| &*d.file).collect();
    assert_eq!(dropped, ["HESN_002.png", "HESN_003.png"]);
}
