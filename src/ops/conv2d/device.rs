//! What a GPU launches for a convolution and its gradients: products of `kernels/conv.cu`, or those of
//! `kernels/conv_direct.cu`. What is chosen, and how work is cut into pieces, depends on extents and storage alone.

use super::correlate::Correlation;
use super::{Activation, Geometry};
use crate::device::gpu::launch::{
    Argument, Arguments, Full, Grid, Launches, Pointer, Stored, WeightCopy, Word, kernel,
};
use crate::error::Result;
use crate::ops::pointwise::{SumTo, Walk};
use crate::tensor::Shape;

/// Threads of a block, unless a tile says otherwise.
const THREADS: usize = 256;
/// Stages of shared memory and bytes of a row of one, as in `conv.cu`.
const STAGES: usize = 4;
const ROW: usize = 64;
/// Most rows and columns of a kernel that `conv.cu` takes.
const TAPS: [usize; 2] = [11, 16];
/// Output pixels and products up to which one launch of `conv_direct.cu` is done before the copies that another
/// kernel wants are.
const FEW: (usize, usize) = (64, 1 << 22);
/// Threads that the elements of a small result are spread over.
const SPREAD: usize = 1 << 18;
/// Output pixels of a piece of the weight gradient, at least.
const PIECE: usize = 64;
/// Blocks that a direct weight gradient is cut into, about: enough for any GPU.
const BLOCKS: usize = 2048;
/// Groups of statistics that are added together first, at least, and how many such sums there are at most.
const CHUNK: usize = 64;
const CHUNKS: usize = 1024;
/// Elements that offsets in `conv.cu` reach: they are `int`s. Of larger tensors it takes some images at a time.
const REACH: usize = i32::MAX as usize;

/// What happens to the sums of a convolution before they are stored.
#[derive(Clone, Copy, Default)]
pub(in crate::ops) struct Finish {
    /// Added, one per output channel.
    pub bias: Option<Pointer>,
    /// Applied then.
    pub activation: Activation,
    /// Where mean and variance of each output channel go.
    pub statistics: Option<[Pointer; 2]>,
}

/// Launches `y = x ∗ w`, finished as told.
pub(in crate::ops) fn forward(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [x, w, y]: [Pointer; 3],
    finish: Finish,
) -> Result<()> {
    if finish.statistics.is_none() && is_small(geometry, geometry.output()) {
        return direct_forward(at, geometry, [x, w, y], finish);
    }
    let product = Product::forward(geometry, x.is_narrow(), REACH).by(at.wgmma());
    if product.fits() && [x, w, y].iter().all(|p| p.is_aligned(16)) {
        product.launch(at, [x, w, y], finish)
    } else {
        direct_forward(at, geometry, [x, w, y], finish)
    }
}

/// Bytes of the copy of the weights that [`forward`] needs.
pub(in crate::ops) fn forward_copy(geometry: &Geometry, statistics: bool) -> usize {
    if !statistics && is_small(geometry, geometry.output()) {
        return 0;
    }
    let bytes = |narrow| Product::forward(geometry, narrow, REACH).copy();
    bytes(false).max(bytes(true))
}

/// Bytes of scratch that [`forward`] needs.
pub(in crate::ops) fn forward_scratch(geometry: &Geometry, statistics: bool) -> usize {
    let bytes = |narrow| {
        Product::forward(geometry, narrow, REACH)
            .scratch(statistics)
            .end
    };
    bytes(false).max(bytes(true))
}

/// Launches the gradient for `x`, or a transposed convolution.
pub(in crate::ops) fn input_gradient(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [w, dy, dx]: [Pointer; 3],
) -> Result<()> {
    let product = Product::input_gradient(geometry, dy.is_narrow(), REACH).by(at.wgmma());
    let aligned = [w, dy, dx].iter().all(|p| p.is_aligned(16));
    if aligned && product.fits() && !is_small(geometry, geometry.x) {
        return product.launch(at, [dy, w, dx], Finish::default());
    }
    let len = geometry.x.len();
    let lanes = lanes(len, geometry.w.n);
    let extents = Extents::new(at, geometry)?;
    let arguments = DirectInputGradient {
        dy: dy.into(),
        weights: w.into(),
        dx: dx.into(),
        len: len as u64,
        lanes: at.int(lanes)?,
        extents,
    };
    at.launch(Grid::cover(len * lanes, THREADS as u32), &arguments)
}

/// Bytes of the copy of the weights that [`input_gradient`] needs.
pub(in crate::ops) fn input_gradient_copy(geometry: &Geometry) -> usize {
    if is_small(geometry, geometry.x) {
        return 0;
    }
    let bytes = |narrow| Product::input_gradient(geometry, narrow, REACH).copy();
    bytes(false).max(bytes(true))
}

/// Bytes of scratch that [`input_gradient`] needs.
pub(in crate::ops) fn input_gradient_scratch(geometry: &Geometry) -> usize {
    let bytes = |narrow| {
        Product::input_gradient(geometry, narrow, REACH)
            .scratch(false)
            .end
    };
    bytes(false).max(bytes(true))
}

/// Launches the gradient for `w`, and for a bias if `db` is not null.
pub(in crate::ops) fn weight_gradient(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [x, dy, dw, db]: [Pointer; 4],
) -> Result<()> {
    let (piece, count) = direct_pieces(geometry);
    let small = is_small(geometry, geometry.output());
    let mut beside = Pointer::NULL;
    if db != Pointer::NULL {
        if small && count == 1 {
            beside = db;
        } else {
            let y = geometry.output();
            let shape = Shape::per_channel(y.c);
            SumTo { shape }.launch_of(at, y, [dy, Pointer::NULL], db)?;
        }
    }
    let product = WeightProduct::new(geometry, x.is_narrow(), REACH, at.wgmma());
    let aligned = [x, dy, dw].iter().all(|p| p.is_aligned(16));
    let uniform = x.is_narrow() == dy.is_narrow();
    if aligned && uniform && product.fits() && !small {
        return product.launch(at, [x, dy, dw]);
    }
    let len = geometry.w.len();
    let extents = Extents::new(at, geometry)?;
    let partials = if count == 1 { dw } else { at.scratch() };
    let arguments = DirectWeightGradient {
        x: x.into(),
        dy: dy.address(),
        dy_narrow: i32::from(dy.is_narrow()),
        dw: partials.into(),
        db: beside.into(),
        len: len as u64,
        pixels: geometry.output().rows() as u64,
        piece: piece as u64,
        extents,
    };
    let threads = match beside {
        Pointer::NULL => len,
        _ => len + geometry.w.n,
    };
    let grid = Grid::cover(threads, THREADS as u32);
    at.launch(along_y(grid, count), &arguments)?;
    if count == 1 {
        return Ok(());
    }
    let channels = geometry.w.c;
    add_pieces(at, [partials, dw], geometry.w, [len, count], [channels; 2])
}

/// Bytes of scratch that [`weight_gradient`] needs.
pub(in crate::ops) fn weight_gradient_scratch(geometry: &Geometry, bias: bool) -> usize {
    let bias = match bias {
        true => Walk::scratch(1, geometry.output()),
        false => 0,
    };
    let direct = direct_pieces(geometry).1 * geometry.w.len() * size_of::<f32>();
    let bytes = |narrow, wgmma| {
        WeightProduct::new(geometry, narrow, REACH, wgmma)
            .scratch()
            .end
    };
    let products = bytes(false, None).max(bytes(true, None));
    let products = products.max(bytes(true, Some(1)));
    products.max(direct).max(bias)
}

// ---- Correlations: the convolution and its input gradient ----

/// A tile of `conv.cu`.
struct Tile {
    /// Of [`TILES`].
    name: usize,
    rows: usize,
    columns: usize,
    threads: usize,
    /// Rows of which it gives statistics: those of a warp, or with `wgmma` of a warpgroup.
    group: usize,
}

/// Kernels by the tiles they make, without their storage.
const TILES: [&str; 7] = [
    "conv_128x128",
    "conv_128x64",
    "conv_128x32",
    "conv_64x64",
    "conv_wgmma_256x128",
    "conv_wgmma_128x128",
    "conv_wgmma_256x64",
];

const fn tile(name: usize, [rows, columns]: [usize; 2], threads: usize, group: usize) -> Tile {
    Tile {
        name,
        rows,
        columns,
        threads,
        group,
    }
}
const WIDE: Tile = tile(0, [128, 128], 256, 64);
const MEDIUM: Tile = tile(1, [128, 64], 128, 64);
const TALL: Tile = tile(2, [128, 32], 128, 32);
const SMALL: Tile = tile(3, [64, 64], 128, 32);
const FULL_MEDIUM: Tile = tile(1, [128, 64], 128, 32);
const FULL_TALL: Tile = tile(2, [128, 32], 64, 64);
/// For `wgmma`, the first that makes enough blocks.
const WARPGROUPS: [Tile; 3] = [
    tile(4, [256, 128], 256, 128),
    tile(5, [128, 128], 128, 128),
    tile(6, [256, 64], 256, 128),
];

/// The arguments of a tile's kernel: `x`, `w`, `bias`, `y`, statistics, the table of correlations, how many they
/// are, tiles along the channels, activation, where pieces of the sums go and are counted, and their number.
#[derive(Clone, Copy)]
struct Correlate<const TILE: usize>([Word; 12]);

// SAFETY: `Product::launch` fills it with the addresses and extents of its step.
unsafe impl<const TILE: usize> Arguments for Correlate<TILE> {
    const KERNEL: &'static str = TILES[TILE];
    fn words(&self) -> Vec<Word> {
        self.0.to_vec()
    }
}

/// One or several correlations that make up one result, with channels that fill vectors of 16 bytes.
struct Product {
    parts: Vec<Correlation>,
    /// Extent of the tensor that is read, and its channels filled up.
    x: Shape,
    channels: usize,
    outputs: usize,
    taps: usize,
    /// Whether the weights' two channels change places.
    transposed: bool,
    narrow: bool,
    /// Images of a launch; 0 if `conv.cu` cannot take them.
    images: usize,
    /// Blocks from which it goes by `wgmma`.
    wgmma: Option<usize>,
}

/// Offsets of what lies in the scratch of a product.
#[derive(Default)]
struct Scratch {
    x: usize,
    w: usize,
    statistics: usize,
    sums: usize,
    parts: usize,
    end: usize,
}

impl Scratch {
    /// Room for `bytes` more.
    fn take(&mut self, bytes: usize) -> usize {
        let offset = self.end;
        self.end += bytes.next_multiple_of(256);
        offset
    }
}

impl Product {
    fn forward(geometry: &Geometry, narrow: bool, reach: usize) -> Self {
        let channels = filled(geometry.x.c, narrow);
        Self {
            parts: vec![geometry.forward()],
            x: geometry.x,
            channels,
            outputs: geometry.w.n,
            taps: geometry.w.h * geometry.w.w,
            transposed: false,
            narrow,
            images: images(geometry, narrow, reach),
            wgmma: None,
        }
    }

    fn input_gradient(geometry: &Geometry, narrow: bool, reach: usize) -> Self {
        let parts = geometry.phases();
        Self {
            parts: parts.filter(|p| !p.pixels.contains(&0)).collect(),
            x: geometry.output(),
            channels: filled(geometry.w.n, narrow),
            outputs: geometry.x.c,
            taps: geometry.w.h * geometry.w.w,
            transposed: true,
            narrow,
            images: images(geometry, narrow, reach),
            wgmma: None,
        }
    }

    /// By `wgmma` from so many blocks on.
    fn by(self, wgmma: Option<usize>) -> Self {
        Self { wgmma, ..self }
    }

    fn fits(&self) -> bool {
        self.images > 0
    }

    /// The images of each launch: the first, and their number.
    fn launches(&self) -> impl Iterator<Item = (usize, usize)> {
        let (n, images) = (self.x.n, self.images);
        (0..n)
            .step_by(images)
            .map(move |first| (first, images.min(n - first)))
    }

    fn copies_x(&self) -> bool {
        self.x.c != self.channels
    }

    fn copies_w(&self) -> bool {
        self.narrow || self.transposed || self.copies_x()
    }

    /// Output pixels that `images` have in the part that has most.
    fn pixels(&self, images: usize) -> usize {
        let pixels = |p: &Correlation| images * p.pixels[0] * p.pixels[1];
        self.parts.iter().map(pixels).max().unwrap_or(0)
    }

    fn blocks(&self, images: usize, tile: &Tile) -> usize {
        let rows = self.pixels(images).div_ceil(tile.rows);
        self.parts.len() * rows * self.outputs.div_ceil(tile.columns)
    }

    /// Pieces that the stages of each tile are cut into where there are few tiles: as many as leave a piece eight
    /// stages, and make no more blocks than an H100 holds two of on each multiprocessor. The same everywhere, since sums
    /// depend on it. Tiles of `wgmma`, which are taken where there are many, are left whole.
    fn pieces(&self) -> usize {
        let tile = self.tile();
        if WARPGROUPS.iter().any(|other| other.name == tile.name) {
            return 1;
        }
        let terms = |p: &Correlation| p.taps[0] * p.taps[1] * self.channels;
        let terms = self.parts.iter().map(terms).max().unwrap_or(0);
        let element = if self.narrow { 2 } else { 4 };
        let stages = terms * element / ROW;
        let blocks = self.blocks(self.x.n, tile);
        (264 / blocks.max(1)).min(stages / 8).max(1)
    }

    /// Groups of pixels that give statistics, in all launches.
    fn groups(&self) -> usize {
        let group = self.tile().group;
        self.launches()
            .map(|(_, images)| self.pixels(images).div_ceil(group))
            .sum()
    }

    /// The largest tile that leaves no more of itself empty than half as wide a one would, and makes enough blocks
    /// to keep most GPUs busy.
    fn tile(&self) -> &'static Tile {
        let covered = |tile: &Tile| self.outputs.next_multiple_of(tile.columns);
        let least = self
            .wgmma
            .filter(|_| self.narrow && self.outputs > TALL.columns);
        let enough = |tile: &Tile| least.is_some_and(|least| self.blocks(self.x.n, tile) >= least);
        let mut warpgroups = WARPGROUPS.iter().filter(|tile| enough(tile));
        if let Some(tile) = warpgroups.find(|tile| covered(tile) == covered(&MEDIUM)) {
            return tile;
        }
        match self.narrow {
            true if self.outputs <= TALL.columns => &TALL,
            true if covered(&WIDE) == covered(&MEDIUM) && self.blocks(self.x.n, &WIDE) >= 256 => {
                &WIDE
            }
            true if self.blocks(self.x.n, &MEDIUM) >= 128 => &MEDIUM,
            true => &SMALL,
            false if self.outputs <= FULL_TALL.columns => &FULL_TALL,
            false => &FULL_MEDIUM,
        }
    }

    /// Bytes of the weights as it wants them, if they are not so.
    fn copy(&self) -> usize {
        let element = if self.narrow { 2 } else { 4 };
        match self.fits() && self.copies_w() {
            true => self.outputs * self.taps * self.channels * element,
            false => 0,
        }
    }

    /// With `wgmma` no more than without, whose statistics are of fewer rows.
    fn scratch(&self, statistics: bool) -> Scratch {
        let mut scratch = Scratch::default();
        if !self.fits() {
            return scratch;
        }
        let element = if self.narrow { 2 } else { 4 };
        if self.copies_x() {
            scratch.x = scratch.take(self.x.rows() * self.channels * element);
        }
        if statistics {
            let groups = self.groups();
            scratch.statistics = scratch.take(groups * self.outputs * 8);
            scratch.sums = scratch.take(groups.div_ceil(chunk(groups)) * self.outputs * 16);
        }
        if self.pieces() > 1 {
            let tile = self.tile();
            let blocks = self.pieces() * self.blocks(self.x.n, tile);
            scratch.parts = scratch.take(blocks * tile.rows * tile.columns * size_of::<f32>());
        }
        scratch
    }

    /// Launches the product, of pointers to what is read, the weights and the result.
    fn launch(&self, at: &mut Launches<'_>, [x, w, y]: [Pointer; 3], finish: Finish) -> Result<()> {
        let scratch = self.scratch(finish.statistics.is_some());
        let x = if self.copies_x() {
            pad(at, x, self.x, self.channels, scratch.x)?
        } else {
            x
        };
        let w = if self.copies_w() {
            self.copy_weights(at, w)?
        } else {
            w
        };
        let tile = self.tile();
        let columns = self.outputs.div_ceil(tile.columns);
        let statistics = at.scratch_at(scratch.statistics, false);
        let parts = at.scratch_at(scratch.parts, false);
        let pieces = self.pieces();
        let counted = match pieces {
            1 => Pointer::NULL,
            _ => counters(at, self.blocks(self.x.n, tile))?,
        };
        let mut groups = 0;
        for (first, images) in self.launches() {
            let words = self.parts.iter().flat_map(|p| self.words(p, images));
            let table = at.constant(&words.collect::<Vec<u64>>())?;
            let to = match finish.statistics {
                Some(_) => statistics.after(groups * self.outputs * 8),
                None => Pointer::NULL,
            };
            let words = [
                Stored::from(x.skip(first * self.x.pixels() * self.channels)).word(),
                Stored::from(w).word(),
                Full::from(finish.bias.unwrap_or(Pointer::NULL)).word(),
                Stored::from(y.skip(first * self.parts[0].y.image)).word(),
                Full::from(to).word(),
                Full::from(table).word(),
                at.int(self.parts.len())?.word(),
                at.int(columns)?.word(),
                finish.activation.number().word(),
                Full::from(parts).word(),
                Full::from(counted).word(),
                at.int(pieces)?.word(),
            ];
            let grid = Grid::new(self.blocks(images, tile), tile.threads as u32)
                .with_shared(STAGES * (tile.rows + tile.columns) * ROW);
            let grid = along_y(grid, pieces);
            match tile.name {
                0 => at.launch(grid, &Correlate::<0>(words)),
                1 => at.launch(grid, &Correlate::<1>(words)),
                2 => at.launch(grid, &Correlate::<2>(words)),
                3 => at.launch(grid, &Correlate::<3>(words)),
                4 => at.launch(grid, &Correlate::<4>(words)),
                5 => at.launch(grid, &Correlate::<5>(words)),
                _ => at.launch(grid, &Correlate::<6>(words)),
            }?;
            groups += self.pixels(images).div_ceil(tile.group);
        }
        let Some([mean, variance]) = finish.statistics else {
            return Ok(());
        };
        let part = self.pixels(self.images);
        let chunk = chunk(groups);
        let chunks = groups.div_ceil(chunk);
        let tiles = self.outputs.div_ceil(32);
        let counters = match chunks {
            1 => Pointer::NULL,
            _ => counters(at, tiles)?,
        };
        let arguments = ConvStatistics {
            statistics: statistics.into(),
            sums: at.scratch_at(scratch.sums, false).into(),
            counters: counters.into(),
            mean: mean.into(),
            variance: variance.into(),
            groups: at.int(groups)?,
            outputs: at.int(self.outputs)?,
            pixels: at.int(self.pixels(self.x.n))?,
            rows: at.int(tile.group)?,
            part_groups: at.int(part.div_ceil(tile.group))?,
            part_pixels: at.int(part)?,
            chunk: at.int(chunk)?,
        };
        let grid = Grid::new(tiles, THREADS as u32);
        at.launch(along_y(grid, chunks), &arguments)
    }

    /// The copy of the weights, as the product wants them.
    fn copy_weights(&self, at: &mut Launches<'_>, w: Pointer) -> Result<Pointer> {
        let (rows, columns) = match self.transposed {
            true => (self.x.c, self.outputs),
            false => (self.outputs, self.x.c),
        };
        at.copy(WeightCopy {
            from: w,
            rows,
            taps: self.taps,
            columns,
            turned: self.transposed,
            padded: self.channels,
            narrow: self.narrow,
        })
    }

    /// One part as `struct Correlation` of `conv.cu`, of so many images.
    fn words(&self, of: &Correlation, images: usize) -> Vec<u64> {
        let int = |x: usize| x as u32;
        let signed = |x: isize| (x as i32).cast_unsigned();
        // Weights lie as in the copy, whose innermost channels are those of this product, filled up.
        let (inner, channels) = (
            if self.transposed {
                self.outputs
            } else {
                self.x.c
            },
            self.channels,
        );
        let bank = |x: isize| signed(x / inner as isize * channels as isize);
        let pixels = of.pixels[0] * of.pixels[1];
        let [by_rows, by_columns] = of.pixels.map(fast_division);
        let flat = of.taps == [1, 1]
            && of.stride == [1, 1]
            && of.origin == [0, 0]
            && of.pixels == [of.x.h, of.x.w]
            && (of.y.start, of.y.column, of.y.row)
                == (0, self.outputs, self.outputs * of.pixels[1]);
        let ints = [
            [int(of.x.h), int(of.x.w), int(channels), int(of.pixels[0])],
            [
                int(of.pixels[1]),
                int(images * pixels),
                int(self.outputs),
                int(of.taps[0]),
            ],
            [
                int(of.taps[1]),
                int(of.stride[0]),
                int(of.stride[1]),
                signed(of.origin[0]),
            ],
            [
                signed(of.origin[1]),
                int(of.y.start),
                int(of.y.image),
                int(of.y.row),
            ],
            [
                int(of.y.column),
                bank(of.w.start as isize),
                bank(of.w.row),
                bank(of.w.column),
            ],
            [
                int(self.taps * channels),
                by_rows[0],
                by_rows[1],
                by_columns[0],
            ],
            [by_columns[1], u32::from(flat), 0, 0],
        ];
        let pair = |pair: &[u32]| u64::from(pair[0]) | u64::from(pair[1]) << 32;
        ints.as_flattened().chunks_exact(2).map(pair).collect()
    }
}

/// Multiplier and shift by which `conv.cu` divides numbers below 2³¹ by `divisor` (Granlund, Montgomery 1994):
/// `⌊i·⌈2ˢ/d⌉ / 2ˢ⌋ = ⌊i/d⌋` with `s = 31 + ⌈log₂ d⌉`.
fn fast_division(divisor: usize) -> [u32; 2] {
    let shift = 31 + divisor.next_power_of_two().trailing_zeros();
    let multiplier = (1u64 << shift).div_ceil(divisor as u64);
    [multiplier as u32, shift]
}

// ---- The weight gradient ----

/// Kernels of the weight gradient by the tiles they make, without their storage.
const WEIGHT_TILES: [&str; 3] = [
    "conv_weight_gradient_128x128",
    "conv_weight_gradient_64x64",
    "conv_wgmma_weight_gradient_128x256",
];

/// The arguments of such a kernel: `x`, `dy`, `dw`, the convolution, tiles along the terms, pixels of a piece.
#[derive(Clone, Copy)]
struct WeightGradient<const TILE: usize>([Word; 6]);

// SAFETY: `WeightProduct::launch` fills it with the addresses and extents of its step.
unsafe impl<const TILE: usize> Arguments for WeightGradient<TILE> {
    const KERNEL: &'static str = WEIGHT_TILES[TILE];
    fn words(&self) -> Vec<Word> {
        self.0.to_vec()
    }
}

/// The weight gradient, with channels of both tensors that fill vectors of 16 bytes.
struct WeightProduct {
    forward: Product,
    y: Shape,
    w: Shape,
    /// Channels of `dy` filled up.
    outputs: usize,
    /// Of [`WEIGHT_TILES`], the rows and columns of that tile and its threads.
    tile: usize,
    edges: [usize; 2],
    threads: usize,
    /// Output pixels of a piece, and the number of pieces in all launches.
    piece: usize,
    pieces: usize,
}

impl WeightProduct {
    /// By `wgmma` if there are half as many blocks of its tile, twice as large, or four fifths of that, to which waves
    /// are filled.
    fn new(geometry: &Geometry, narrow: bool, reach: usize, wgmma: Option<usize>) -> Self {
        let other = Self::of(geometry, narrow, reach, false);
        let Some(least) = wgmma.filter(|_| narrow && other.edges[0] == 128) else {
            return other;
        };
        let product = Self::of(geometry, narrow, reach, true);
        let covered = |product: &Self| product.tiles() * product.edges[1];
        let fits = 8 * covered(&product) <= 9 * covered(&other);
        match fits && 5 * product.tiles() * product.pieces >= 2 * least {
            true => product,
            false => other,
        }
    }

    fn of(geometry: &Geometry, narrow: bool, reach: usize, wgmma: bool) -> Self {
        let mut forward = Product::forward(geometry, narrow, reach);
        let outputs = filled(geometry.w.n, narrow);
        // It is `dy` whose rows it reads.
        forward.outputs = outputs;
        let terms = forward.taps * forward.channels;
        let (tile, edges, threads, blocks) = match (narrow, outputs.min(terms) > 64) {
            _ if wgmma => (2, [128, 256], 256, 128_usize),
            (true, true) => (0, [128; 2], 256, 256),
            (true, false) => (1, [64; 2], 128, 512),
            (false, _) => (1, [64; 2], 64, 512),
        };
        // Whole stages of pixels, and several of them.
        let depth = ROW / if narrow { 2 } else { 4 };
        let pixels = geometry.output().rows();
        let tiles = outputs.div_ceil(edges[0]) * terms.div_ceil(edges[1]);
        // The blocks of a few tiles, cut into so many pieces, run in waves. The first number of waves that can be
        // filled to four fifths: one block more than a wave holds would cost another wave. `blocks` is a little
        // less than an H100 holds at a time, and the same everywhere, since sums depend on it.
        let cut = (1..)
            .map(|waves| (waves * blocks, waves * blocks / tiles))
            .find(|(slots, cut)| 5 * cut * tiles >= 4 * slots)
            .map_or(1, |(_, cut)| cut);
        let piece = pixels.div_ceil(cut).max(8 * depth);
        let piece = piece.next_multiple_of(depth);
        let image = geometry.output().pixels();
        let pieces = match forward.fits() {
            true => forward
                .launches()
                .map(|(_, n)| (n * image).div_ceil(piece))
                .sum(),
            false => 0,
        };
        Self {
            forward,
            y: geometry.output(),
            w: geometry.w,
            outputs,
            tile,
            edges,
            threads,
            piece,
            pieces,
        }
    }

    /// Tiles of a piece.
    fn tiles(&self) -> usize {
        let terms = self.forward.taps * self.forward.channels;
        self.outputs.div_ceil(self.edges[0]) * terms.div_ceil(self.edges[1])
    }

    fn fits(&self) -> bool {
        self.forward.fits()
    }

    fn copies_y(&self) -> bool {
        self.y.c != self.outputs
    }

    /// Elements of a piece's part of the gradient.
    fn len(&self) -> usize {
        self.outputs * self.forward.taps * self.forward.channels
    }

    /// Whether the kernel writes something else than the gradient itself.
    fn adds(&self) -> bool {
        self.pieces > 1 || self.copies_y() || self.forward.copies_x()
    }

    /// `w` being where the copy of `dy` lies, `sums` the pieces.
    fn scratch(&self) -> Scratch {
        let mut scratch = Scratch::default();
        if !self.fits() {
            return scratch;
        }
        let element = if self.forward.narrow { 2 } else { 4 };
        if self.forward.copies_x() {
            scratch.x = scratch.take(self.forward.x.rows() * self.forward.channels * element);
        }
        if self.copies_y() {
            scratch.w = scratch.take(self.y.rows() * self.outputs * element);
        }
        if self.adds() {
            scratch.sums = scratch.take(self.pieces * self.len() * size_of::<f32>());
        }
        scratch
    }

    fn launch(&self, at: &mut Launches<'_>, [x, dy, dw]: [Pointer; 3]) -> Result<()> {
        let scratch = self.scratch();
        let forward = &self.forward;
        let x = if forward.copies_x() {
            pad(at, x, forward.x, forward.channels, scratch.x)?
        } else {
            x
        };
        let dy = if self.copies_y() {
            pad(at, dy, self.y, self.outputs, scratch.w)?
        } else {
            dy
        };
        let to = if self.adds() {
            at.scratch_at(scratch.sums, false)
        } else {
            dw
        };
        let columns = (forward.taps * forward.channels).div_ceil(self.edges[1]);
        let shared = STAGES * self.edges.iter().sum::<usize>() * ROW;
        let grid = Grid::new(self.tiles(), self.threads as u32).with_shared(shared);
        let mut done = 0;
        for (first, images) in forward.launches() {
            let table = at.constant(&forward.words(&forward.parts[0], images))?;
            let words = [
                Stored::from(x.skip(first * forward.x.pixels() * forward.channels)).word(),
                Stored::from(dy.skip(first * self.y.pixels() * self.outputs)).word(),
                Full::from(to.skip(done * self.len())).word(),
                Full::from(table).word(),
                at.int(columns)?.word(),
                at.int(self.piece)?.word(),
            ];
            let pieces = (images * self.y.pixels()).div_ceil(self.piece);
            let grid = along_y(grid, pieces);
            match self.tile {
                0 => at.launch(grid, &WeightGradient::<0>(words)),
                1 => at.launch(grid, &WeightGradient::<1>(words)),
                _ => at.launch(grid, &WeightGradient::<2>(words)),
            }?;
            done += pieces;
        }
        if self.adds() {
            let channels = [self.w.c, forward.channels];
            add_pieces(at, [to, dw], self.w, [self.len(), self.pieces], channels)?;
        }
        Ok(())
    }
}

// ---- Small kernels ----

kernel! {
    struct Pad = "conv_pad" { from: Stored, to: Stored, vectors: u64, channels: i32, padded: i32 }
}
kernel! {
    struct ConvStatistics = "conv_statistics" {
        statistics: Full, sums: Full, counters: Full, mean: Full, variance: Full, groups: i32, outputs: i32,
        pixels: i32, rows: i32, part_groups: i32, part_pixels: i32, chunk: i32
    }
}
kernel! {
    struct AddPieces = "conv_add_pieces" {
        partials: Full, dw: Full, elements: u64, len: u64, pieces: i32, channels: i32, padded: i32
    }
}

/// Elements of 16 bytes.
fn vector(narrow: bool) -> usize {
    if narrow { 8 } else { 4 }
}

/// As many channels as fill vectors.
fn filled(channels: usize, narrow: bool) -> usize {
    channels.next_multiple_of(vector(narrow))
}

/// Images that one launch of `conv.cu` takes, of a convolution or its gradients, such that all offsets are less than
/// `reach`, those of pixels outside of the image included; 0 if it has too many taps or a single image is too large.
fn images(geometry: &Geometry, narrow: bool, reach: usize) -> usize {
    let (x, w, y) = (geometry.x, geometry.w, geometry.output());
    let inner = filled(x.c, narrow).max(filled(y.c, narrow));
    let most = |of: Shape| {
        let row = (of.w + geometry.padding[1] + 64) * inner;
        (reach / row).saturating_sub(geometry.padding[0] + 64) / of.h
    };
    if w.h > TAPS[0] || w.w > TAPS[1] || inner * inner * w.h * w.w > reach {
        return 0;
    }
    match most(x).min(most(y)) {
        0 => 0,
        most => super::pieces(x.n, most).0,
    }
}

/// Counters of blocks, 0 whenever nothing runs: two a word.
fn counters(at: &mut Launches<'_>, count: usize) -> Result<Pointer> {
    at.constant(&vec![0; count.div_ceil(2)])
}

/// Of so many groups of statistics, how many are added together first.
fn chunk(groups: usize) -> usize {
    groups.div_ceil(CHUNKS).max(CHUNK)
}

/// Whether direct computation of a result that has the pixels of `of` is quick.
fn is_small(geometry: &Geometry, of: Shape) -> bool {
    of.rows() <= FEW.0 && geometry.output().rows() * geometry.w.len() <= FEW.1
}

/// The same grid for each of `count` pieces.
fn along_y(mut grid: Grid, count: usize) -> Grid {
    grid.blocks[1] = u32::try_from(count).unwrap_or(u32::MAX);
    grid
}

/// Launches a copy of `from` with `channels` channels, at byte `offset` of the scratch.
fn pad(
    at: &mut Launches<'_>,
    from: Pointer,
    shape: Shape,
    channels: usize,
    offset: usize,
) -> Result<Pointer> {
    let to = at.scratch_at(offset, from.is_narrow());
    let vectors = shape.rows() * channels / vector(from.is_narrow());
    let arguments = Pad {
        from: from.into(),
        to: to.into(),
        vectors: vectors as u64,
        channels: at.int(shape.c)?,
        padded: at.int(channels)?,
    };
    at.launch(Grid::cover(vectors, THREADS as u32), &arguments)?;
    Ok(to)
}

/// Launches the sum of pieces of `len` elements into a gradient of extent `w`; channels of `w` and of the pieces.
fn add_pieces(
    at: &mut Launches<'_>,
    [partials, dw]: [Pointer; 2],
    w: Shape,
    [len, pieces]: [usize; 2],
    [channels, padded]: [usize; 2],
) -> Result<()> {
    let arguments = AddPieces {
        partials: partials.into(),
        dw: dw.into(),
        elements: w.len() as u64,
        len: len as u64,
        pieces: at.int(pieces)?,
        channels: at.int(channels)?,
        padded: at.int(padded)?,
    };
    at.launch(Grid::new(w.len().div_ceil(32), THREADS as u32), &arguments)
}

// ---- Direct kernels ----

/// What all of them take at the end: rows, columns and channels of x and y, rows and columns of the kernel, stride,
/// padding.
#[derive(Clone, Copy, Debug)]
struct Extents([i32; 12]);

impl Extents {
    fn new(at: &Launches<'_>, geometry: &Geometry) -> Result<Self> {
        let (x, w, y) = (geometry.x, geometry.w, geometry.output());
        let [[sh, sw], [ph, pw]] = [geometry.stride, geometry.padding];
        let extents = [x.h, x.w, x.c, y.h, y.w, y.c, w.h, w.w, sh, sw, ph, pw];
        let mut ints = [0; 12];
        for (int, extent) in ints.iter_mut().zip(extents) {
            *int = at.int(extent)?;
        }
        Ok(Self(ints))
    }
}

/// Declares a kernel with [`Extents`] behind its own parameters.
macro_rules! direct {
    (struct $name:ident = $kernel:literal { $($field:ident: $type:ty),* }) => {
        #[derive(Clone, Copy, Debug)]
        struct $name { $($field: $type,)* extents: Extents }

        // SAFETY: as of `kernel!`; the extents are twelve ints.
        unsafe impl Arguments for $name {
            const KERNEL: &'static str = $kernel;
            fn words(&self) -> Vec<Word> {
                let own = [$(self.$field.word()),*];
                own.into_iter().chain(self.extents.0.map(Argument::word)).collect()
            }
        }
    };
}
direct! {
    struct Direct = "conv_direct" {
        x: Stored, weights: Full, bias: Full, y: Stored, len: u64, lanes: i32, activation: i32
    }
}
direct! {
    struct DirectInputGradient = "conv_direct_input_gradient" {
        dy: Stored, weights: Full, dx: Stored, len: u64, lanes: i32
    }
}
direct! {
    struct DirectWeightGradient = "conv_direct_weight_gradient" {
        x: Stored, dy: u64, dy_narrow: i32, dw: Full, db: Full, len: u64, pixels: u64, piece: u64
    }
}
kernel! {
    struct DirectStatistics = "conv_direct_statistics" {
        y: Stored, mean: Full, variance: Full, pixels: u64, o: i32
    }
}

/// Lanes that share one of `len` elements, each a sum over `channels`.
fn lanes(len: usize, channels: usize) -> usize {
    let mut lanes = 1;
    while lanes < 32 && 8 * lanes <= channels && 2 * lanes * len <= SPREAD {
        lanes *= 2;
    }
    lanes
}

fn direct_forward(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [x, w, y]: [Pointer; 3],
    finish: Finish,
) -> Result<()> {
    let output = geometry.output();
    let (len, lanes) = (output.len(), lanes(output.len(), geometry.x.c));
    let extents = Extents::new(at, geometry)?;
    let arguments = Direct {
        x: x.into(),
        weights: w.into(),
        bias: finish.bias.unwrap_or(Pointer::NULL).into(),
        y: y.into(),
        len: len as u64,
        lanes: at.int(lanes)?,
        activation: finish.activation.number(),
        extents,
    };
    at.launch(Grid::cover(len * lanes, THREADS as u32), &arguments)?;
    let Some([mean, variance]) = finish.statistics else {
        return Ok(());
    };
    let arguments = DirectStatistics {
        y: y.into(),
        mean: mean.into(),
        variance: variance.into(),
        pixels: output.rows() as u64,
        o: at.int(output.c)?,
    };
    at.launch(Grid::new(output.c, THREADS as u32), &arguments)
}

/// Output pixels of a piece of the direct weight gradient, and the number of pieces.
fn direct_pieces(geometry: &Geometry) -> (usize, usize) {
    let pixels = geometry.output().rows();
    let most = BLOCKS.div_ceil(geometry.w.len().div_ceil(THREADS));
    super::pieces(pixels, pixels.div_ceil(most).max(PIECE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(x: Shape, o: usize, kernel: usize) -> Geometry {
        let w = Shape::new(o, kernel, kernel, x.c);
        Geometry::new(x, w, [1, 1], [kernel / 2; 2]).unwrap()
    }

    #[test]
    fn divisions_by_multiplication_are_exact() {
        let last = i32::MAX as u32;
        for divisor in (1..70).chain([127, 128, 1000, 65_535, 65_537, 1 << 30, last as usize]) {
            let [multiplier, shift] = fast_division(divisor);
            let d = divisor as u32;
            let near = |multiple: u32| [multiple.saturating_sub(1), multiple, multiple + 1];
            let multiples = [0, 1, 2, 3, 1000, last / d / 2, last / d].map(|m| m.min(last / d) * d);
            for i in multiples
                .into_iter()
                .flat_map(near)
                .chain([last])
                .filter(|&i| i <= last)
            {
                let found = (u64::from(i) * u64::from(multiplier)) >> shift;
                assert_eq!(found, u64::from(i / d), "{i} / {divisor}");
            }
        }
    }

    #[test]
    fn tiles_follow_from_extents() {
        let chosen = |x: Shape, o: usize, kernel: usize, narrow: bool| {
            let product = Product::forward(&geometry(x, o, kernel), narrow, REACH);
            assert!(product.fits());
            TILES[product.tile().name]
        };
        let map = |edge: usize, c: usize| Shape::new(16, edge, edge, c);
        assert_eq!(chosen(map(128, 64), 128, 3, true), "conv_128x128");
        assert_eq!(chosen(map(128, 64), 192, 3, true), "conv_128x64");
        assert_eq!(chosen(map(128, 96), 24, 1, true), "conv_128x32");
        assert_eq!(chosen(map(8, 1152), 192, 1, true), "conv_64x64");
        assert_eq!(chosen(map(8, 1152), 192, 1, false), "conv_128x64");
        assert_eq!(chosen(map(128, 96), 24, 1, false), "conv_128x32");
    }

    #[test]
    fn tiles_of_wgmma_follow_from_extents() {
        let chosen = |n: usize, edge: usize, [c, o]: [usize; 2], narrow: bool, least: usize| {
            let geometry = geometry(Shape::new(n, edge, edge, c), o, 3);
            let without = Product::forward(&geometry, narrow, REACH);
            let product = Product::forward(&geometry, narrow, REACH).by(Some(least));
            assert!(product.scratch(true).end <= without.scratch(true).end);
            TILES[product.tile().name]
        };
        assert_eq!(chosen(16, 64, [64, 128], true, 256), "conv_wgmma_256x128");
        assert_eq!(chosen(16, 48, [64, 128], true, 256), "conv_wgmma_128x128");
        assert_eq!(chosen(16, 128, [64, 192], true, 256), "conv_wgmma_256x64");
        assert_eq!(chosen(16, 16, [64, 128], true, 256), "conv_64x64");
        assert_eq!(chosen(16, 128, [64, 32], true, 256), "conv_128x32");
        assert_eq!(chosen(16, 64, [64, 128], false, 256), "conv_128x64");
        // As the tests choose.
        assert_eq!(chosen(1, 2, [8, 128], true, 1), "conv_wgmma_256x128");
        assert_eq!(chosen(1, 13, [8, 128], true, 2), "conv_wgmma_128x128");
        assert_eq!(chosen(1, 2, [8, 40], true, 1), "conv_wgmma_256x64");
    }

    /// Blocks that an H100 (132 multiprocessors) holds at a time: those of all pieces fill nearly all of some number of
    /// such waves, unless pieces are as short as they may be.
    #[test]
    fn pieces_fill_waves() {
        for (batch, edge, c, o, kernel) in [
            (16, 256, 64, 64, 3),
            (16, 128, 64, 128, 3),
            (16, 128, 128, 128, 3),
            (16, 64, 256, 256, 3),
            (16, 32, 512, 512, 3),
            (64, 32, 512, 256, 3),
            (64, 16, 512, 512, 3),
            (16, 256, 1, 32, 3),
            (16, 64, 96, 24, 1),
            (64, 16, 672, 192, 1),
            (16, 8, 1152, 320, 1),
        ] {
            let geometry = geometry(Shape::new(batch, edge, edge, c), o, kernel);
            for (narrow, wgmma) in [(false, None), (true, None), (true, Some(256))] {
                let product = WeightProduct::new(&geometry, narrow, REACH, wgmma);
                let resident = 132 * [2, 4, 1][product.tile];
                let blocks = product.tiles() * product.pieces;
                let waves = blocks.div_ceil(resident);
                let depth = ROW / if narrow { 2 } else { 4 };
                let shortest = product.piece == 8 * depth;
                // Rounding pieces to whole stages can leave out a few more.
                assert!(
                    shortest || 4 * blocks >= 3 * waves * resident,
                    "{geometry:?}, {narrow}, {wgmma:?}: {blocks} blocks, {resident} at a time"
                );
            }
        }
    }

    #[test]
    fn tiles_of_wgmma_for_weights_follow_from_extents() {
        let chosen = |n: usize, edge: usize, [c, o]: [usize; 2], least: usize| {
            let geometry = geometry(Shape::new(n, edge, edge, c), o, 3);
            WEIGHT_TILES[WeightProduct::new(&geometry, true, REACH, Some(least)).tile]
        };
        let (by_wgmma, other) = (WEIGHT_TILES[2], WEIGHT_TILES[0]);
        assert_eq!(chosen(16, 64, [128, 128], 256), by_wgmma);
        assert_eq!(chosen(16, 16, [512, 512], 256), by_wgmma);
        assert_eq!(chosen(16, 64, [32, 128], 256), other, "288 terms");
        assert_eq!(chosen(1, 8, [128, 128], 256), other, "5 blocks");
        assert_eq!(chosen(1, 8, [128, 128], 2), by_wgmma);
        assert_eq!(chosen(16, 64, [64, 64], 256), WEIGHT_TILES[1]);
    }

    #[test]
    fn what_offsets_cannot_reach_is_cut_into_launches() {
        let taken = |x: Shape, kernel: usize| images(&geometry(x, 8, kernel), true, REACH);
        let large = |n: usize, c: usize| Shape::new(n, 512, 512, c);
        assert_eq!(taken(large(64, 64), 1), 64);
        assert_eq!(taken(large(64, 128), 1), 32);
        assert_eq!(taken(large(65, 128), 3), 33);
        assert_eq!(taken(Shape::new(2, 1 << 14, 1 << 14, 8), 1), 0);
        assert_eq!(taken(Shape::new(1, 64, 64, 8), 17), 0);
    }
}

#[cfg(all(test, echograd_emulator))]
mod launches {
    //! Tensors beyond what offsets reach, which is not much here.

    use super::*;
    use crate::device::cpu::{self, Io};
    use crate::device::gpu::{self, Gpu};
    use crate::gradcheck::Sampler;
    use crate::ops::conv2d::{Conv2d, Conv2dInputGradient, Conv2dWeightGradient};
    use crate::ops::{Copied, Kernel, Op};
    use crate::tape::{Options, Plan, Tape};

    /// A convolution or a gradient whose kernels reach no more than `reach` elements.
    #[derive(Debug)]
    struct Within<O> {
        op: O,
        geometry: Geometry,
        reach: usize,
        kind: Kind,
    }

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Kind {
        Forward,
        Input,
        Weight,
    }

    impl<T, O: Kernel<T>> Kernel<T> for Within<O> {
        fn run(&self, io: &mut Io<'_, T>) {
            self.op.run(io);
        }
    }

    impl<O: Op> Within<O> {
        fn correlation(&self, narrow: bool) -> Product {
            let of = match self.kind {
                Kind::Forward => Product::forward,
                _ => Product::input_gradient,
            };
            of(&self.geometry, narrow, self.reach)
        }
        fn weights(&self, narrow: bool) -> WeightProduct {
            WeightProduct::new(&self.geometry, narrow, self.reach, None)
        }
    }

    impl<O: Op> Op for Within<O> {
        fn name(&self) -> &'static str {
            self.op.name()
        }
        fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
            self.op.outputs(inputs)
        }
        fn scratch(&self, inputs: &[Shape], outputs: &[Shape]) -> usize {
            self.op.scratch(inputs, outputs)
        }
        fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
            self.op.narrow(output, inputs)
        }
        fn device_copy(&self, _: &[Shape], _: &[Shape]) -> Option<Copied> {
            let bytes = |narrow| self.correlation(narrow).copy();
            let input = match self.kind {
                Kind::Forward => 1,
                Kind::Input => 0,
                Kind::Weight => return None,
            };
            let bytes = bytes(false).max(bytes(true));
            Some(Copied { input, bytes })
        }
        fn device_scratch(&self, _: &[Shape], _: &[Shape]) -> usize {
            let bytes = |narrow| match self.kind {
                Kind::Weight => self.weights(narrow).scratch().end,
                kind => self.correlation(narrow).scratch(kind == Kind::Forward).end,
            };
            bytes(false).max(bytes(true))
        }
        fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
            let (a, b, to) = (at.input(0), at.input(1), at.output(0));
            match self.kind {
                Kind::Forward => {
                    let finish = Finish {
                        statistics: Some([at.output(1), at.output(2)]),
                        ..Finish::default()
                    };
                    self.correlation(a.is_narrow())
                        .launch(at, [a, b, to], finish)
                }
                Kind::Input => {
                    let product = self.correlation(b.is_narrow());
                    product.launch(at, [b, a, to], Finish::default())
                }
                Kind::Weight => self.weights(a.is_narrow()).launch(at, [a, b, to]),
            }
        }
    }

    /// The outputs of an operation on numbers that bf16 holds, by the processor in f64 and by the emulator, within
    /// `tolerance` of the largest, and what the emulator launched.
    fn compare(op: impl Op + 'static, shapes: [Shape; 2], narrow: [bool; 2]) -> Vec<String> {
        let mut tape = Tape::new();
        let vars = shapes.map(|shape| tape.input("input", shape));
        for (var, narrow) in vars.into_iter().zip(narrow) {
            if narrow {
                tape.narrow(var);
            }
        }
        let outputs = tape.push_all(op, &vars).unwrap();
        outputs.iter().for_each(|&y| tape.keep(y));
        let plan = |options| Plan::new(&tape, options).unwrap();
        let mut expected = cpu::Session::<f64>::new(plan(Options::default())).unwrap();
        let stored = narrow.contains(&true);
        let gpu = Gpu::emulator().unwrap();
        let mut found = gpu::Session::new(&gpu, plan(Options::gpu(stored))).unwrap();
        let mut s = Sampler::new(7);
        for (var, shape) in vars.into_iter().zip(shapes) {
            let values = s.narrow_values(shape.len(), 0.2, 1.0);
            let rounded: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            expected.write(var, &values);
            found.write(var, &rounded).unwrap();
        }
        expected.run();
        found.run().unwrap();
        for (index, &y) in outputs.iter().enumerate() {
            let expected = expected.read(y);
            let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let rounding = if tape.values()[y.index()].narrow && stored {
                1.0 / 256.0
            } else {
                0.0
            };
            for (i, (found, expected)) in found.read(y).unwrap().iter().zip(expected).enumerate() {
                let error = (f64::from(*found) - expected).abs();
                assert!(
                    error <= 1e-5 * largest + rounding * expected.abs(),
                    "output {index}, element {i}: {found} for {expected}"
                );
            }
        }
        let launches = found.launches().iter();
        launches.map(|l| l.function.name.to_string()).collect()
    }

    #[test]
    fn tensors_beyond_reach_are_computed_some_images_at_a_time() {
        // Channels that fill vectors and not, images whose pixels fill groups and not, strides, one image at a time
        // and several, the last fewer.
        for (x, o, kernel, stride, images) in [
            (Shape::new(5, 9, 10, 8), 16, 3, 1, 2),
            (Shape::new(3, 8, 8, 24), 40, 1, 1, 1),
            (Shape::new(7, 11, 12, 3), 9, 3, 2, 3),
            (Shape::new(4, 16, 16, 8), 8, 5, 2, 1),
        ] {
            let w = Shape::new(o, kernel, kernel, x.c);
            let padding = kernel / 2;
            let geometry = Geometry::new(x, w, [stride; 2], [padding; 2]).unwrap();
            let y = geometry.output();
            for narrow in [false, true] {
                // As little as lets so many images through.
                let inner = filled(x.c, narrow).max(filled(o, narrow));
                let reach = (images * x.h + padding + 64) * (x.w + padding + 64) * inner;
                let most = super::images(&geometry, narrow, reach);
                assert_eq!(most, super::super::pieces(x.n, images).0);
                let launches = x.n.div_ceil(most);
                let count = |names: &[String], kernel: &str| {
                    let storage = if narrow { "bf16" } else { "f32" };
                    let of = |name: &&String| name.starts_with(kernel) && name.ends_with(storage);
                    names.iter().filter(of).count()
                };
                let op = Conv2d::new(stride, padding).with_statistics();
                let kind = Kind::Forward;
                let op = Within {
                    op,
                    geometry,
                    reach,
                    kind,
                };
                let names = compare(op, [x, w], [narrow, false]);
                let tiles =
                    |names: &[String]| TILES.iter().map(|tile| count(names, tile)).sum::<usize>();
                assert_eq!(tiles(&names), launches, "{names:?}");
                let op = Conv2dInputGradient { geometry };
                let kind = Kind::Input;
                let op = Within {
                    op,
                    geometry,
                    reach,
                    kind,
                };
                let names = compare(op, [w, y], [false, narrow]);
                assert_eq!(tiles(&names), launches, "{names:?}");
                let bias = false;
                let op = Conv2dWeightGradient { geometry, bias };
                let kind = Kind::Weight;
                let op = Within {
                    op,
                    geometry,
                    reach,
                    kind,
                };
                let names = compare(op, [x, y], [narrow; 2]);
                assert_eq!(count(&names, "conv_weight_gradient"), launches, "{names:?}");
            }
        }
    }
}
