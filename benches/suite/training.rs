//! Training of a codec on all cores, against FAISS's own training of the whole index on the same vectors.
//!
//! Wall time and processor time of the process, and what the codec loses on vectors held out. FAISS runs with one
//! thread and with all, and its better figure counts: on a machine that does something else too, its threads wait for
//! each other in loops, and all together were seen to take seven times as long as one alone. One run of each.

use std::time::Instant;

use cpu_time::ProcessTime;
use memory3::codec::factory::auto_spec;
use memory3::codec::quality::Distortion;
use memory3::codec::train::{TrainOptions, train};
use memory3::codec::{Codec, CodecSpec, FactorySpec};

use super::measure::Effort;
use super::numbers::Numbers;
use super::peer::{self, Trained};
use super::report::Table;

/// Clusters of the vectors.
const CLUSTERS: usize = 200;

pub fn run(effort: Effort) -> Table {
    let mut table = Table::new(
        "training",
        "seconds of the wall and of the processor; error: held-out sum |x - x'|^2 / sum |x - mean|^2; x_faiss: against \
         FAISS's better figure of one thread and all",
    );
    // Two levels of 256 centroids with 39 vectors each, what `auto` takes for a small corpus; then its full codec with
    // 2 vectors a centroid, where any training is short of them. As many as are advised would take FAISS many minutes.
    let full = [("OPQ10_80,Residual2x8,PQ10x8".parse().unwrap(), 80, 9984), (auto_spec(80).unwrap(), 80, 8192)];
    let quick = [("Residual2x5,PQ4x6".parse().unwrap(), 16, 4000)];
    for (spec, dim, count) in effort.choose(&full[..], &quick) {
        case(&mut table, spec, *dim, *count);
    }
    table
}

fn case(table: &mut Table, spec: &FactorySpec, dim: usize, count: usize) {
    let (vectors, held_out) = vectors(count, dim);
    let ours = measured(|| train(&CodecSpec::Faiss(*spec), dim, &vectors, &TrainOptions::default(), &|| ()).unwrap());
    let threads = rayon::current_num_threads();
    let [one, all] = [1, threads].map(|threads| {
        peer::set_threads(threads);
        eprintln!("training: FAISS on {threads} threads");
        let (trained, wall, cpu) = measured(|| Trained::train(&spec.to_string(), dim, &vectors));
        (error(&trained.into_codec(), &held_out), wall, cpu)
    });
    // FAISS's better one of two is a hard measure: the ratio is a figure of the table, and only gross failure stops.
    let (our_error, their_error) = (error(&ours.0, &held_out), one.0.min(all.0));
    assert!(our_error <= their_error * 1.1, "{spec}: {our_error} against {their_error}");
    table.row(
        format!("{spec}, {count} vectors"),
        &[
            ("threads", Some(threads as f64)),
            ("seconds", Some(ours.1)),
            ("cpu_seconds", Some(ours.2)),
            ("error", Some(our_error)),
            ("faiss_1_seconds", Some(one.1)),
            ("faiss_1_cpu", Some(one.2)),
            ("faiss_all_seconds", Some(all.1)),
            ("faiss_all_cpu", Some(all.2)),
            ("faiss_1_error", Some(one.0)),
            ("faiss_all_error", Some(all.0)),
            ("error_x_faiss", Some(our_error / their_error)),
            ("x_faiss_seconds", Some(one.1.min(all.1) / ours.1)),
            ("x_faiss_cpu", Some(one.2.min(all.2) / ours.2)),
        ],
    );
}

/// What comes out, wall seconds, and processor seconds of all threads.
fn measured<T>(work: impl FnOnce() -> T) -> (T, f64, f64) {
    let (wall, cpu) = (Instant::now(), ProcessTime::now());
    let result = work();
    (result, wall.elapsed().as_secs_f64(), cpu.elapsed().as_secs_f64().max(1e-9))
}

fn error(codec: &Codec, held_out: &[f32]) -> f64 {
    let mut distortion = Distortion::default();
    distortion.add(codec, held_out);
    distortion.relative().unwrap()
}

/// `count` vectors to train on and a quarter as many held out: clusters, with coordinates that go together and unlike
/// spreads, so that a rotation has something to find.
fn vectors(count: usize, dim: usize) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = Numbers::new(3);
    let centres = numbers.normals(CLUSTERS * dim, 1.0);
    let mixing = numbers.normals(dim * dim, 1.0 / (dim as f32).sqrt());
    let spreads: Vec<f32> = (0..dim).map(|at| 2.0 * (-3.0 * at as f32 / dim as f32).exp()).collect();
    let mut draw = |count: usize| {
        let mut vectors = Vec::with_capacity(count * dim);
        for _ in 0..count {
            let centre = &centres[numbers.below(CLUSTERS) * dim..][..dim];
            let own: Vec<f32> = spreads.iter().zip(centre).map(|(s, c)| s * (c + 0.7 * numbers.normal())).collect();
            let mixed = mixing.chunks_exact(dim).map(|row| row.iter().zip(&own).map(|(a, b)| a * b).sum::<f32>());
            vectors.extend(mixed);
        }
        vectors
    };
    let training = draw(count);
    (training, draw(count / 4))
}
