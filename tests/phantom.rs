//! Phantoms through their public interface: what is drawn is what is described, and what is written can
//! be read back.

use echograd::data::image::Gray;
use echograd::data::phantom::{
    Echogenicity, Margin, Orientation, Phantom, Posterior, Shape, Site, generate, write,
};
use echograd::data::{self, Label};
use rayon::prelude::*;

fn series(site: Site, count: u64) -> Vec<Phantom> {
    (0..count)
        .into_par_iter()
        .map(|i| generate(site, 3, i))
        .collect()
}

fn mean(values: impl Iterator<Item = u8>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(s, n), v| (s + f64::from(v), n + 1.0));
    sum / count
}

/// Columns and rows of the mask's bounding box, inclusive.
fn bounds(mask: &Gray) -> [usize; 4] {
    let inside = |i: &usize| mask.pixels[*i] == 255;
    let pixels: Vec<usize> = (0..mask.pixels.len()).filter(inside).collect();
    let columns = || pixels.iter().map(|i| i % mask.width);
    let rows = || pixels.iter().map(|i| i / mask.width);
    [
        columns().min().unwrap(),
        columns().max().unwrap(),
        rows().min().unwrap(),
        rows().max().unwrap(),
    ]
}

#[test]
fn an_image_is_a_function_of_site_seed_and_index() {
    let one = generate(Site::A, 3, 5);
    assert_eq!(one, generate(Site::A, 3, 5));
    for other in [
        generate(Site::B, 3, 5),
        generate(Site::A, 4, 5),
        generate(Site::A, 3, 6),
    ] {
        assert_ne!(one.image, other.image);
    }
}

#[test]
fn masks_are_one_region_within_the_frame_and_normals_have_none() {
    for site in Site::ALL {
        for (index, phantom) in series(site, 24).iter().enumerate() {
            let Phantom {
                image,
                mask,
                label,
                descriptors,
            } = phantom;
            assert_eq!((image.width, image.height), (mask.width, mask.height));
            assert_eq!(label.is_lesion(), descriptors.is_some());
            let area = mask.pixels.iter().filter(|&&m| m == 255).count();
            assert!(mask.pixels.iter().all(|&m| m == 0 || m == 255));
            if !label.is_lesion() {
                assert_eq!(area, 0);
                continue;
            }
            let share = area as f64 / mask.pixels.len() as f64;
            assert!((0.005..0.3).contains(&share), "{site} {index}: {share}");
            let [left, right, top, bottom] = bounds(mask);
            assert!(left > 0 && right + 1 < mask.width, "{site} {index}");
            assert!(top > 0 && bottom + 1 < mask.height, "{site} {index}");
        }
    }
}

/// Mean grey level of a strip beside or below the lesion's box, as rows and columns.
fn patch(image: &Gray, columns: std::ops::Range<usize>, rows: std::ops::Range<usize>) -> f64 {
    let rows = rows.start..rows.end.min(image.height);
    mean(rows.flat_map(|y| {
        columns
            .clone()
            .map(move |x| image.pixels[y * image.width + x])
    }))
}

/// What the descriptors say is what the picture shows, on average over a series: the echo pattern inside,
/// and the posterior features below as against beside.
#[test]
fn pictures_show_what_the_descriptors_say() {
    let mut inside: Vec<(Echogenicity, f64)> = Vec::new();
    let mut below: Vec<(Posterior, f64)> = Vec::new();
    for Phantom {
        image,
        mask,
        descriptors,
        ..
    } in series(Site::A, 120)
    {
        let Some(descriptors) = descriptors else {
            continue;
        };
        let lesion = mean(
            (0..mask.pixels.len())
                .filter(|&i| mask.pixels[i] == 255)
                .map(|i| image.pixels[i]),
        );
        inside.push((descriptors.echogenicity, lesion));
        let [left, right, _, bottom] = bounds(&mask);
        let third = (right - left) / 3;
        // Past the halo, which reaches 2.5 mm.
        let rows = bottom + 30..bottom + 70;
        let under = patch(&image, left + third..right - third, rows.clone());
        let (before, after) = (
            left.saturating_sub(2 * third)..left.saturating_sub(third),
            right + third..right + 2 * third,
        );
        let beside: Vec<f64> = [before, after]
            .into_iter()
            .filter(|columns| !columns.is_empty() && columns.end < image.width)
            .map(|columns| patch(&image, columns, rows.clone()))
            .collect();
        if !beside.is_empty() {
            let beside = beside.iter().sum::<f64>() / beside.len() as f64;
            below.push((descriptors.posterior, under - beside));
        }
    }
    fn average<K: PartialEq>(pairs: &[(K, f64)], key: K) -> f64 {
        let values: Vec<f64> = pairs.iter().filter(|p| p.0 == key).map(|p| p.1).collect();
        assert!(values.len() >= 5, "{} cases", values.len());
        values.iter().sum::<f64>() / values.len() as f64
    }
    let anechoic = average(&inside, Echogenicity::Anechoic);
    let hypoechoic = average(&inside, Echogenicity::Hypoechoic);
    let isoechoic = average(&inside, Echogenicity::Isoechoic);
    assert!(anechoic < 25.0, "{anechoic}");
    assert!(hypoechoic > anechoic + 10.0, "{hypoechoic} {anechoic}");
    assert!(isoechoic > hypoechoic + 10.0, "{isoechoic} {hypoechoic}");
    let shadow = average(&below, Posterior::Shadow);
    let unchanged = average(&below, Posterior::Unchanged);
    let enhancement = average(&below, Posterior::Enhancement);
    assert!(unchanged.abs() < 10.0, "{unchanged}");
    assert!(shadow < unchanged - 15.0, "{shadow} {unchanged}");
    assert!(enhancement > unchanged + 15.0, "{enhancement} {unchanged}");
}

/// Ovals are wider than tall exactly if they are called parallel.
#[test]
fn orientation_is_that_of_the_mask() {
    let ovals = |p: &&Phantom| {
        p.descriptors
            .is_some_and(|d| d.shape == Shape::Oval && d.margin == Margin::Circumscribed)
    };
    let series = series(Site::D, 160);
    let mut seen = [0; 2];
    for phantom in series.iter().filter(ovals) {
        let [left, right, top, bottom] = bounds(&phantom.mask);
        let parallel = right - left > bottom - top;
        let described = phantom.descriptors.unwrap().orientation == Orientation::Parallel;
        assert_eq!(parallel, described);
        seen[usize::from(described)] += 1;
    }
    assert!(seen[0] >= 3 && seen[1] >= 20, "{seen:?}");
}

/// How far neighbouring columns are alike, in parts of the image's width.
fn grain(series: &[Phantom]) -> f64 {
    let (mut step, mut spread, mut width) = (0.0, 0.0, 0.0);
    for Phantom { image, .. } in series {
        let level = mean(image.pixels.iter().copied());
        width += image.width as f64 / series.len() as f64;
        for row in image.pixels.chunks_exact(image.width) {
            for pair in row.windows(2) {
                let [a, b] = [pair[0], pair[1]].map(f64::from);
                step += (a - b).powi(2);
                spread += (a - level).powi(2);
            }
        }
    }
    (spread / step).sqrt() / width
}

#[test]
fn sites_differ_in_size_grain_and_frame() {
    let [a, b, c, d] = Site::ALL.map(|site| series(site, 6));
    let pixels = |series: &[Phantom]| series[0].image.pixels.len();
    assert!(pixels(&d) < pixels(&b) && pixels(&b) < pixels(&c));
    let (fine, coarse) = (grain(&a), [grain(&b), grain(&d)]);
    assert!(coarse.iter().all(|&g| g > 1.1 * fine), "{fine} {coarse:?}");
    // The sector leaves the upper corners black.
    for phantom in &c {
        let Gray { width, pixels, .. } = &phantom.image;
        assert!(pixels[..width / 16].iter().all(|&v| v == 0));
    }
    for phantom in &a {
        assert!(phantom.image.pixels[..20].iter().any(|&v| v > 0));
    }
}

#[test]
fn a_written_series_is_read_back_as_busi_and_does_not_depend_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let counts = |threads: usize, name: &str| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let done = |_| {
            calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        };
        let path = folder.path().join(name);
        let counts = pool
            .install(|| write(&[Site::D, Site::B], 14, 2, &path, &done))
            .unwrap();
        assert_eq!(calls.into_inner(), 14);
        counts
    };
    let one = counts(1, "one");
    assert_eq!(one, counts(3, "three"));
    assert_eq!(one.iter().sum::<usize>(), 14);

    let open =
        |name: &str| data::open(&format!("busi:{}", folder.path().join(name).display())).unwrap();
    let (first, second) = (open("one"), open("three"));
    assert_eq!(first.cases(), second.cases());
    assert_eq!(first.cases().len(), 14);
    assert!(first.drops().is_empty());
    let mut left: Vec<Phantom> = (0..7)
        .flat_map(|i| [Site::D, Site::B].map(|site| generate(site, 2, i)))
        .collect();
    for (i, case) in first.cases().iter().enumerate() {
        let (image, mask) = (first.image(i).unwrap(), first.mask(i).unwrap());
        assert_eq!(mask, second.mask(i).unwrap());
        let at = left
            .iter()
            .position(|p| p.image == image && p.mask == mask && p.label == case.label);
        left.remove(at.expect("each file is one of the series"));
    }
    assert_eq!(
        Label::ALL.map(|l| first.cases().iter().filter(|c| c.label == l).count()),
        one
    );
}

#[test]
fn nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let error = write(&[Site::A], 1, 0, folder.path(), &|_| Ok(()))
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("expected a new or empty folder, found files in it"),
        "{error}"
    );
    let entries = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(entries, 1);
    let file = folder.path().join("notes.txt");
    assert!(write(&[Site::A], 1, 0, &file, &|_| Ok(())).is_err());
    assert!(write(&[], 1, 0, &folder.path().join("none"), &|_| Ok(())).is_err());
}

#[test]
fn a_series_that_is_stopped_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let stop = |n| match n {
        3 => Err(echograd::Error::Interrupted),
        _ => Ok(()),
    };
    let result = write(&[Site::A], 10, 0, folder.path(), &stop);
    assert!(matches!(result, Err(echograd::Error::Interrupted)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
