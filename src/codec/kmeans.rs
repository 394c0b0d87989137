//! k-means on the codec's own kernel: nearest centroids on all threads, means in a fixed order.
//!
//! In: rows, a start or none. Out: centroids. Always holds: the same rows give the same centroids, on any number of
//! threads: a row's nearest centroid depends on nothing else, and a mean is summed in the rows' order.
//!
//! Lloyd's algorithm: started from sampled rows, a fixed number of rounds; a cluster that loses its last row begins anew
//! at the farthest row of a large one. FAISS's own compares distances that a general matrix product has written to
//! memory, on this program's shapes at a fraction of the speed, and is reproducible on one thread only.

use rayon::prelude::*;

use super::kernel::{self, BLOCK, Level, Rows, Table};

/// Rows whose squared distance from their centroid is below this share of its square are as good as equal to it.
const LEAST: f32 = 1e-5;

/// Rows to cluster: `depth` floats of each.
#[derive(Clone, Copy)]
pub(super) struct Points<'a> {
    pub(super) rows: Rows<'a>,
    pub(super) depth: usize,
}

impl<'a> Points<'a> {
    fn len(&self) -> usize {
        self.rows.data.len() / self.rows.stride
    }

    fn row(&self, index: usize) -> &'a [f32] {
        &self.rows.data[index * self.rows.stride + self.rows.offset..][..self.depth]
    }

    /// The nearest centroid of every row.
    pub(super) fn nearest(&self, centroids: &[f32], level: Level) -> Vec<u32> {
        let table = Table::codebook(centroids, self.depth);
        let mut found = vec![0; self.len()];
        let blocks = self.rows.data.par_chunks(BLOCK * self.rows.stride).zip(found.par_chunks_mut(BLOCK));
        blocks.for_each(|(data, found)| kernel::nearest(level, &table, Rows { data, ..self.rows }, found));
        found
    }
}

/// `count` rows, evenly spaced: where clustering starts.
pub(super) fn start(points: Points<'_>, count: usize) -> Vec<f32> {
    (0..count).flat_map(|i| points.row(i * points.len() / count)).copied().collect()
}

/// Moves `centroids`, `[centroid][depth]`, for a number of rounds. `done` is told of each.
pub(super) fn refine(points: Points<'_>, centroids: &mut [f32], rounds: u32, level: Level, done: &dyn Fn()) {
    for _ in 0..rounds {
        let found = points.nearest(centroids, level);
        move_to_means(points, &found, centroids);
        done();
    }
}

fn move_to_means(points: Points<'_>, found: &[u32], centroids: &mut [f32]) {
    let count = centroids.len() / points.depth;
    // Rows sorted by cluster, in their own order within each.
    let mut ends = vec![0_usize; count + 1];
    for &cluster in found {
        ends[cluster as usize + 1] += 1;
    }
    let sizes: Vec<usize> = ends[1..].to_vec();
    for cluster in 0..count {
        ends[cluster + 1] += ends[cluster];
    }
    let mut next = ends.clone();
    let mut order = vec![0_usize; found.len()];
    for (row, &cluster) in found.iter().enumerate() {
        order[next[cluster as usize]] = row;
        next[cluster as usize] += 1;
    }
    centroids.par_chunks_exact_mut(points.depth).enumerate().for_each(|(cluster, centroid)| {
        let members = &order[ends[cluster]..ends[cluster + 1]];
        if members.is_empty() {
            return;
        }
        let mut sums = vec![0.0_f64; points.depth];
        for &row in members {
            sums.iter_mut().zip(points.row(row)).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // a mean of f32 is an f32
        centroid.iter_mut().zip(sums).for_each(|(mean, sum)| *mean = (sum / members.len() as f64) as f32);
    });
    // The largest clusters give their farthest row, each at most once in a round. Clusters of equal rows have none to
    // give, and half of such a cluster beside the other would be nothing but a tie.
    let mut largest: Vec<usize> = (0..count).filter(|&cluster| sizes[cluster] > 1).collect();
    largest.sort_by_key(|&cluster| (std::cmp::Reverse(sizes[cluster]), cluster));
    let mut givers = largest.into_iter().filter_map(|cluster| {
        let centroid = centroids[cluster * points.depth..][..points.depth].to_vec();
        farthest(points, &order[ends[cluster]..ends[cluster + 1]], &centroid)
    });
    let mut moved = Vec::new();
    for empty in (0..count).filter(|&cluster| sizes[cluster] == 0) {
        let Some(row) = givers.next() else { break };
        moved.push((empty, row));
    }
    for (empty, row) in moved {
        centroids[empty * points.depth..][..points.depth].copy_from_slice(points.row(row));
    }
}

/// The member farthest from the centroid, unless all are next to it.
fn farthest(points: Points<'_>, members: &[usize], centroid: &[f32]) -> Option<usize> {
    let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
    let distance = |row: usize| points.row(row).iter().zip(centroid).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
    let (row, most) = members.iter().map(|&row| (row, distance(row))).max_by(|a, b| a.1.total_cmp(&b.1))?;
    (most > LEAST * square(centroid)).then_some(row)
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    fn error(points: Points<'_>, centroids: &[f32]) -> f64 {
        let found = points.nearest(centroids, Level::detect());
        let distance = |(row, &cluster): (usize, &u32)| -> f64 {
            let centroid = &centroids[cluster as usize * points.depth..][..points.depth];
            points.row(row).iter().zip(centroid).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        found.iter().enumerate().map(distance).sum()
    }

    #[test]
    fn a_round_is_the_naive_one_and_the_error_falls() {
        let data = testing::floats(21, 500 * 7);
        let points = Points { rows: Rows { data: &data, stride: 7, offset: 2 }, depth: 3 };
        let mut centroids = start(points, 16);
        let found = points.nearest(&centroids, Level::detect());
        let mut last = error(points, &centroids);
        refine(points, &mut centroids, 1, Level::detect(), &|| ());
        for cluster in 0..16 {
            let members: Vec<&[f32]> =
                (0..500).filter(|&row| found[row] as usize == cluster).map(|row| points.row(row)).collect();
            for at in 0..3 {
                let mean = members.iter().map(|row| f64::from(row[at])).sum::<f64>() / members.len() as f64;
                assert!((f64::from(centroids[cluster * 3 + at]) - mean).abs() < 1e-6);
            }
        }
        for _ in 0..5 {
            let now = error(points, &centroids);
            assert!(now <= last * (1.0 + 1e-9), "{now} {last}");
            last = now;
            refine(points, &mut centroids, 1, Level::detect(), &|| ());
        }
    }

    #[test]
    fn clusters_that_run_empty_begin_anew_at_far_rows() {
        let data: Vec<f32> = (0..64_u8).flat_map(|i| [f32::from(i % 4), 1.0]).collect();
        let points = Points { rows: Rows { data: &data, stride: 2, offset: 0 }, depth: 2 };
        let mut centroids = vec![0.0; 8 * 2]; // all equal: only the first gets rows
        refine(points, &mut centroids, 12, Level::detect(), &|| ());
        assert!(error(points, &centroids) < 1e-3, "{centroids:?}");
    }
}
