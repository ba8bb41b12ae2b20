//! Copies of weights, laid out as kernels want to read them. One launch makes any number of them.

use super::launch::{Full, Grid, Launches, Pointer, kernel};
use crate::error::Result;

/// Rows and columns of a block's tile, and its threads, as in `kernels/conv.cu`.
const TILE: [usize; 2] = [32, 128];
const THREADS: u32 = 256;

/// A copy of f32 weights that lie as `rows × taps × columns`.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// The weights.
    pub from: Pointer,
    /// First extent.
    pub rows: usize,
    /// Middle extent.
    pub taps: usize,
    /// Last extent.
    pub columns: usize,
    /// Whether the copy lies as `columns × taps × rows`.
    pub turned: bool,
    /// Last extent of the copy, filled up with zeros.
    pub padded: usize,
    /// Whether the copy is bf16.
    pub narrow: bool,
}

kernel! {
    struct CopyWeights = "copy_weights" { copies: Full, count: i32 }
}

impl Copy {
    /// Tiles of its rows and its columns.
    fn tiles(&self) -> [usize; 2] {
        let rows = if self.turned { self.padded } else { self.rows };
        let columns = if self.turned {
            self.columns
        } else {
            self.padded
        };
        [rows.div_ceil(TILE[0]), columns.div_ceil(TILE[1])]
    }
}

/// Launches copies, each with the address that it goes to.
pub(super) fn launch(at: &mut Launches<'_>, copies: &[(Copy, u64)]) -> Result<()> {
    let (mut table, mut first) = (Vec::new(), 0);
    for (copy, to) in copies {
        let [rows, columns] = copy.tiles();
        let int = |n| at.int(n).map(|n| u64::from(n.cast_unsigned()));
        let flags = u64::from(copy.turned) | u64::from(copy.narrow) << 1;
        table.extend([
            copy.from.address(),
            *to,
            int(first)? | int(rows)? << 32,
            int(columns)? | int(copy.rows)? << 32,
            int(copy.taps)? | int(copy.columns)? << 32,
            int(copy.padded)? | flags << 32,
        ]);
        first += rows * columns * copy.taps;
    }
    let arguments = CopyWeights {
        copies: at.constant(&table)?.into(),
        count: at.int(copies.len())?,
    };
    at.launch(Grid::new(first, THREADS), &arguments)
}
